from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from neurons.adapters import RulesReader
from sn29.chain import load_wallet
from sn29.errors import NAME_A_WALLET, Reason, Rejected, Sn29Error, Unavailable, nearest, reasons_table
from sn29.settings import ValidatorSettings, read
from sn29.store import Store


def test_every_reason_has_a_sentence_and_something_to_do():
    for reason in Reason:
        assert reason.code == reason.name.lower()
        for text in (reason.sentence, reason.advice):
            assert len(text) > 5
            assert not text.endswith(".")
            assert "|" not in text, "it stands in a table"
    assert len({reason.sentence for reason in Reason}) == len(Reason), "a sentence twice would make one reason of two"


def test_the_table_has_a_row_for_each():
    rows = reasons_table().splitlines()
    assert len(rows) == 2 + len(Reason)
    assert all(row.startswith(f"| `{reason.code}` | ") for row, reason in zip(rows[2:], Reason, strict=True))


@pytest.mark.parametrize("error", [Unavailable("text", "gone", 3.0), Rejected(Reason.SETTING, 1, 2, "here")], ids=str)
def test_a_failure_is_the_same_in_another_process(error: Sn29Error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_refusal_says_what_to_do_about_itself():
    """Not about all of its kind: the wallet, the pins, the folder, the field that was meant."""
    with pytest.raises(Rejected) as refused:
        load_wallet("nobody", "none", Path("/nowhere"))
    assert refused.value.advice == NAME_A_WALLET
    with pytest.raises(Rejected) as refused:
        RulesReader(
            read(ValidatorSettings, ["-n", "test", "--competitions.dir", str(Path(__file__).parents[1] / "competitions")])
        )
    assert "`sn29 competitions pin FILE`" in refused.value.advice
    with pytest.raises(Rejected) as refused:
        Store(Path("/nowhere/store.db"), read_only=True)
    assert "--state.dir" in refused.value.advice
    assert Rejected(Reason.SETTING, 3, "at most 2", "--rounds").advice == "mend --rounds: at most 2"
    assert Rejected(Reason.SETTING, 3, "at most 2", "--rounds", advice="other words").advice == "other words"
    assert Rejected(Reason.DIGEST, 3, 2).advice == Reason.DIGEST.advice


def test_the_nearest_word_is_a_near_one():
    assert nearest("valdator", ["miner", "validator"]) == "validator"
    assert nearest("xyzzy", ["miner", "validator"]) == ""
