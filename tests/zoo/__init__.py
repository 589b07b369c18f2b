"""The zoo: repositories as hostile and as honest miners publish them, each with the verdict that it must get.

    python -m tests.zoo FOLDER            writes every repository into FOLDER/repositories, and FOLDER/cases.json
    python -m tests.zoo FOLDER --judge    judges each by the validator's own path, real child processes, as a table

    case.py              what a case is, and the means to make one
    honest.py            controls: real tiny models of each family, every one of which must be accepted
    files.py configs.py weights.py tokenizer_files.py copies.py     the hostile ones, by what is hostile in them
    serving.py           the loopback Hub with the zoo on it, and lies of a Hub that plays along with a miner
    judge.py             metadata, download, child: the way of a commitment, with what it cost and what it touched
    lab.py               child processes that tell what they open and run

Each case names its row of threats.md (A1..A15, B1..B17).
"""
