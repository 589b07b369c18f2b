from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import recorded

from sn29 import cli, record_files
from sn29.errors import Reason
from sn29.explain import (
    DUEL,
    NORMAL,
    everybody,
    explain,
    first_win_by_decay,
    is_address,
    least_improvement,
    meant,
    prospect,
    towards,
)
from sn29.records import Entry, Outcome
from sn29.replay import contest_of
from sn29.round_record import ModelRecord, RoundRecord
from sn29.rules.decision import Contest, score_contest
from sn29.rules.weights import KEEP, combine

RULES = ("oldest_holder", "pairwise_epsilon", "champion")


def one(rule: str, num_samples: int = 1500, **models: tuple[float, float]) -> RoundRecord:
    """A round in which the first model was committed at block 7000, the next at 7100 and so on."""
    table = recorded.losses(num_samples, 5, **models)
    return recorded.round_record(7560, table, {h: 7000 + 100 * i for i, h in enumerate(models)}, rule=rule)


def text(record: RoundRecord, hotkey: str, written: datetime | None = None) -> str:
    return "\n".join(explain([record], hotkey, written)[0])


def winner(contest: Contest, block: int | None = None) -> str:
    scores = score_contest(contest, block).scores
    return max(scores, key=lambda s: s.weight).hotkey


# --- what would win ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_improvement_wins_and_a_little_less_does_not(rule: str) -> None:
    record = one(rule, ann=(0.0, 0.01), bob=(0.001, 0.012), cid=(0.004, 0.02))
    contest = contest_of("c00", record.competitions["c00"])
    for hotkey in ("bob", "cid"):
        part = least_improvement(contest, hotkey)
        assert part is not None

        def with_part(part: float, hotkey: str = hotkey) -> str:
            better = tuple(x * (1 - part) for x in contest.losses[hotkey])
            entries = {**contest.entries, hotkey: Entry("a new one", 7560)}
            return winner(replace(contest, losses={**contest.losses, hotkey: better}, entries=entries))

        assert with_part(part) == hotkey
        assert with_part(part * 0.99) == "ann"
        assert part > (0.0018 if rule == "champion" else 0.003), "ann has nearly all of her advantage left: 0.2 % or 0.4 %"


def test_the_improvement_is_what_the_rule_says_where_one_can_say_it() -> None:
    """Without noise a model must be better by what is left of the holder's advantage after 560 blocks, and is worse by 0.2 %."""
    record = one("oldest_holder", ann=(0.0, 0.0), bob=(0.002, 0.0))
    part = least_improvement(contest_of("c00", record.competitions["c00"]), "bob")
    left = 0.004 * 0.995 ** (560 / 361)
    assert part == pytest.approx(1 - (1 - left) / math.exp(0.002), rel=2e-3)


def test_decay_alone_wins_at_the_first_block_at_which_it_does() -> None:
    record = one("champion", ann=(0.0, 0.0), bob=(-0.006, 0.002))
    contest = contest_of("c00", record.competitions["c00"])
    block = first_win_by_decay(contest, "bob")
    assert block is not None
    assert (winner(contest, block - 1), winner(contest, block)) == ("ann", "bob")
    assert block > 7560


def test_a_record_without_scores_is_explained_all_the_same() -> None:
    """Somebody's record may lack what the rules come to: they are computed again."""
    record = one("champion", ann=(0.0, 0.01), bob=(0.004, 0.012))
    bare = replace(record, competitions={"c00": replace(record.competitions["c00"], scores=())})
    assert "lost to ann" in text(bare, "bob")
    assert text(bare, "ann").endswith("  it has the largest weight")
    assert "what is left of its advantage is 0.20 %" in text(record, "ann")


def test_evidence_adds_up_under_champion_only() -> None:
    """Better by 0.25 %, of which 0.2 % are asked for: not shown by one window of 1,500 samples, and shown by some."""
    models = {"ann": (0.0, 0.0), "bob": (-0.0025, 0.002)}
    found = prospect("c00", one("champion", **models).competitions["c00"], "bob")
    assert found is not None
    assert found.holder == "ann"
    assert found.wins_by_evidence is not None
    assert (found.wins_by_evidence - 7560) % 360 == 0
    assert 1 <= (found.wins_by_evidence - 7560) // 360 < 100
    records = [one("champion", **models)]
    while records[-1].weights[0].by_hotkey.get("bob", 0.0) == 0.0:
        block = records[-1].head.block + 360
        table = records[0].competitions["c00"].losses
        records.append(recorded.round_record(block, table, {"ann": 7000, "bob": 7100}, rule="champion", before=records[-1]))
    assert records[-1].head.block == found.wins_by_evidence, "as it comes when the windows do look like this one"
    worse = prospect("c00", one("champion", ann=(0.0, 0.0), bob=(0.001, 0.002)).competitions["c00"], "bob")
    assert worse is not None
    assert worse.wins_by_evidence is None


def test_decay_alone_at_the_block_that_the_formula_gives() -> None:
    """Better by 0.2 % on every sample: 0.004 * 0.995 ** epochs is 0.2 % after ln(2) / -ln(0.995) = 138.28 epochs of age."""
    record = one("oldest_holder", ann=(0.0, 0.0), bob=(math.log(1 - 0.002), 0.0))
    block = first_win_by_decay(contest_of("c00", record.competitions["c00"]), "bob")
    assert block == 7000 + math.ceil(361 * math.log(0.5) / math.log(0.995))


def test_a_worse_model_never_wins_and_the_reason_is_given() -> None:
    for rule in ("champion", "oldest_holder"):
        found = prospect("c00", one(rule, ann=(0.0, 0.01), bob=(0.01, 0.01)).competitions["c00"], "bob")
        assert found is not None
        assert found.wins_at is None
        assert "better" in found.why_never if rule == "champion" else "win rate" in found.why_never
    small = prospect("c00", one("champion", ann=(0.0, 0.0), bob=(-0.0004, 0.002)).competitions["c00"], "bob")
    assert small is not None
    assert small.wins_at is None
    assert "floor" in small.why_never
    assert "0.050 %" in small.why_never


def test_a_near_copy_is_told_so() -> None:
    close = one("champion", ann=(0.0, 0.0), bob=(0.0, 1e-7))
    found = prospect("c00", close.competitions["c00"], "bob")
    assert found is not None
    assert found.lost_to is not None
    assert found.lost_to.near_copy
    assert "near copy" in found.why_never
    assert found.wins_at is None
    assert found.improvement is None
    assert "near copy of ann" in text(close, "bob")
    assert "differ from sample to sample" in text(close, "bob")
    assert "would win today" not in text(close, "bob")


def test_the_interval_is_the_rules_own_where_it_has_one() -> None:
    models = {"ann": (0.0, 0.01), "bob": (0.01, 0.01)}
    by_duel = prospect("c00", one("champion", **models).competitions["c00"], "bob")
    plain = prospect("c00", one("oldest_holder", **models).competitions["c00"], "bob")
    assert by_duel is not None
    assert plain is not None
    assert by_duel.lost_to is not None
    assert plain.lost_to is not None
    assert (by_duel.lost_to.kind, plain.lost_to.kind) == (DUEL, NORMAL)
    assert by_duel.lost_to.mean == pytest.approx(plain.lost_to.mean, rel=1e-6), "the same losses, the same sign"
    assert by_duel.lost_to.low < plain.lost_to.low < 0.01 < plain.lost_to.high < by_duel.lost_to.high
    width = 1.96 * math.sqrt(2) * 0.01 / math.sqrt(1500)
    assert plain.lost_to.high - plain.lost_to.mean == pytest.approx(width, rel=0.1)


def test_a_dethroned_holder_is_told_by_whom() -> None:
    first = recorded.round_record(7560, recorded.losses(1500, 5, ann=(0.0, 0.01)), {"ann": 7000}, rule="champion")
    table = recorded.losses(1500, 6, ann=(0.0, 0.01), bob=(-0.03, 0.01))
    second = recorded.round_record(7920, table, {"ann": 7000, "bob": 7600}, rule="champion", before=first)
    found = prospect("c00", second.competitions["c00"], "ann")
    assert found is not None
    assert found.holder == "bob"
    assert found.lost_to is not None
    assert found.lost_to.other == "bob"
    assert found.lost_to.mean == pytest.approx(0.03, abs=0.002)


# --- in words ---------------------------------------------------------------------------------------------------------


def test_the_timeline_from_refused_to_evaluated() -> None:
    table = recorded.losses(100, 5, ann=(0.0, 0.01))
    no_name = Outcome("bob", "", 7100, "rejected", reason="malformed_commitment", detail="?", got="'hello'", limit="a:b:c:d:e")
    records = [recorded.round_record(7560, table, {"ann": 7000}, no_competition=[no_name])]
    for k in (1, 2, 3):
        others = [recorded.refused("bob", 7600)]
        records.append(recorded.round_record(7560 + 360 * k, table, {"ann": 7000}, others=others, before=records[-1]))
    both = {**table, "bob": (math.inf, *(x * 1.01 for x in table["ann"][1:]))}
    records.append(recorded.round_record(9000, both, {"ann": 7000, "bob": 8700}, before=records[-1]))
    lines, data = explain(records, "bob")
    said = "\n".join(lines)
    order = [
        "round of block 7,560, no competition: the commitment of block 7,100",
        "got 'hello', rule a:b:c:d:e",
        Reason.MALFORMED_COMMITMENT.advice,
        "round of block 7,920, c00: the commitment of block 7,600",
        f"refused: {Reason.PARAMETERS.sentence}: got 9, rule at most 8",
        "the same in 2 more rounds, up to the one of block 8,640",
        "round of block 9,000, c00: the commitment of block 8,700",
        "evaluated on 100 samples",
        "1 of them could not be scored: 1 too_long",
        "place 2 of 2",
        "lost to ann: on 99 samples its losses are 1.00 % higher (1.00 % to 1.00 %, 95 %",
        "would win today: a new model whose losses are",
        "by decay of the advantage alone",
    ]
    at = [said.find(part) for part in order]
    assert -1 not in at, (order[at.index(-1)], said)
    assert at == sorted(at), said
    assert [r["block"] for r in data["rounds"]] == [7560, 7920, 8280, 8640, 9000]
    assert data["prospects"]["c00"]["holder"] == "ann"
    json.dumps(data, allow_nan=False)


def test_who_was_stopped_reads_when_and_why() -> None:
    first = one("champion", 200, ann=(0.0, 0.01))
    table = recorded.losses(200, 6, ann=(0.0, 0.01), bob=(0.05, 0.01))
    short = {**table, "bob": table["bob"][:32]}
    why = "stopped after 32 of 200 samples: its losses are 5.00% higher"
    second = recorded.round_record(7920, short, {"ann": 7000, "bob": 7700}, rule="champion", before=first, stopped={"bob": why})
    lines, data = explain([first, second], "bob")
    said = "\n".join(lines)
    assert f"evaluated on 32 samples, {math.fsum(short['bob']) / 32:.2f} nats a sample\n  {why}\n" in said
    assert "lost to ann: on 32 samples its losses are" in said
    assert "what would win today is not known: it was not measured on all samples" in said
    assert "would win today: a new model" not in said
    assert data["rounds"][0]["stopped"] == data["prospects"]["c00"]["stopped"] == why
    assert "stopped" not in text(second, "ann")


def test_the_holder_and_a_stranger() -> None:
    record = one("oldest_holder", ann=(0.0, 0.01), bob=(0.01, 0.01))
    assert "it has the largest weight" in text(record, "ann")
    assert "0.40 % of its loss" in text(record, "ann")
    assert "no commitment of it was seen" in text(record, "zoe")
    assert explain([], "zoe")[1] == {"hotkey": "zoe", "rounds": []}


def test_the_date_counts_from_when_the_record_was_written() -> None:
    record = one("oldest_holder", ann=(0.0, 0.0), bob=(math.log(1 - 0.002), 0.0))
    said = text(record, "bob", datetime(2026, 3, 1, 12, 0, tzinfo=UTC))
    # (7000 + 49,921) - 7560 = 49,361 blocks of 12 s: 6 days, 20 hours and 32 minutes
    assert "wins at block 56,921, 6.9 days after" in said
    assert "about 2026-03-08 08:32 UTC" in said


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_explained(rule: str) -> None:
    record = one(rule, num_samples=60, ann=(0.0, 0.01), bob=(0.005, 0.02), cid=(-0.001, 0.03))
    for hotkey in ("ann", "bob", "cid"):
        assert "means for c00" in text(record, hotkey)


ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"  # substrate's well-known development keys
BOB = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
GIANT = "5FLSigC9HGRKVhB9FiEo4Y3koPsNmBmLJbpXg2mp1hXcS59Y"


def three() -> list[RoundRecord]:
    """Two rounds: alice and bob evaluated; giant refused in both, and copycat, in the second, as a copy of alice's."""
    table = recorded.losses(100, 5, **{ALICE: (0.0, 0.01), BOB: (0.05, 0.01)})
    giant = Outcome(GIANT, "c00", 7200, "rejected", "giant/model@1", reason="parameters", got="9", limit="at most 8")
    copy = Outcome(
        "copycat", "c00", 7300, "rejected", "copycat/model@1", reason="copy", got="71cf", limit=f"first committed by {ALICE}"
    )
    first = recorded.round_record(7560, table, {ALICE: 7000, BOB: 7100}, others=[ModelRecord(giant)])
    others = [ModelRecord(giant), ModelRecord(copy)]
    return [first, recorded.round_record(7920, table, {ALICE: 7000, BOB: 7100}, others=others, before=first)]


def test_one_letter_that_is_wrong_makes_an_address_none():
    assert is_address(ALICE)
    assert is_address(GIANT)
    for at in range(len(ALICE)):
        assert not is_address(ALICE[:at] + ("x" if ALICE[at] != "x" else "y") + ALICE[at + 1 :])
    for word in ("", "giant", ALICE[:-1], ALICE + "1", "1" * 48, "z" * 48, ALICE.replace("G", "0")):
        assert not is_address(word)


@pytest.mark.parametrize("word", [GIANT, "5FL", "5FLS\u2026S59Y", "5FLS...S59Y", "giant", "giant/model"])
def test_who_is_meant(word: str) -> None:
    assert [one.hotkey for one in meant(word, everybody(three()))] == [GIANT]


@pytest.mark.parametrize(("word", "number"), [("", 0), ("gian", 0), ("5", 3), ("5F", 2), ("5FLS...QQQQ", 0), ("giant/other", 0)])
def test_who_is_not_meant(word: str, number: int) -> None:
    assert len(meant(word, everybody(three()))) == number


def test_a_copy_is_told_whose_and_one_more_round_is_one_round() -> None:
    said = "\n".join(explain(three(), "copycat")[0])
    assert f"  refused: {Reason.COPY.sentence}: first committed by {ALICE}\n" in said
    assert "71cf" not in said
    assert "the same in 1 more round, the one of block 7,920" in "\n".join(explain(three(), GIANT)[0])


def test_what_a_round_moves_weights_towards_is_its_own_result() -> None:
    """Also where a hotkey whose weight is kept has left the subnet, and in a round without weights before."""
    first, second = three()
    left = replace(second, registered=tuple(h for h in second.registered if h != BOB), last_weights=first.weights | {
        0: replace(first.weights[0], by_hotkey={ALICE: 0.3, BOB: 0.5, GIANT: 0.2})
    })  # fmt: skip
    scores = {"c00": second.competitions["c00"].scores}
    for record in (first, second, left):
        alone = combine({"c00": 1.0}, scores, recorded.NOBODY, None, 7920, record.registered)
        both = combine({"c00": 1.0}, scores, recorded.NOBODY, record.last_weights.get(0), 7920, record.registered)
        found = towards(replace(record, weights={0: both}))
        assert found == pytest.approx(dict(alone.by_hotkey), abs=1e-9)
    assert towards(replace(second, weights={})) == {}


def test_a_weight_that_is_on_its_way_is_told_where_to() -> None:
    table = recorded.losses(100, 5, ann=(0.0, 0.01), bob=(-0.05, 0.01))
    first = recorded.round_record(7560, {"ann": table["ann"]}, {"ann": 7000})
    second = recorded.round_record(7920, table, {"ann": 7000, "bob": 7600}, before=first)
    said = "\n".join(explain([second], "bob")[0])
    weight = second.weights[0].by_hotkey["bob"]
    assert weight < 0.6, "half of what it won"
    assert f"a round moves weights {1 - KEEP:.0%} of the way: from 0.00% to {weight:.2%} now, towards" in said
    assert "of the way" not in "\n".join(explain([first], "ann")[0]), "there is none to go"


def test_the_command_finds_whom_one_means_and_lists_them_where_it_does_not(tmp_path: Path, capsys) -> None:
    for record in three():
        record_files.write(tmp_path / "records", record)
    at = ["--records", str(tmp_path / "records")]
    for word in ("giant", "5FLS\u2026S59Y"):
        assert cli.main(["explain", word, *at]) == 0
        assert capsys.readouterr().out.startswith(f"{GIANT}  giant/model")
    assert cli.main(["explain", "giant", *at, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hotkey"] == GIANT
    stranger = "5DAAnrj7VHTznn2AWBemMuyBwZWs6FNFjdyVXUeYum3PTXFy"
    for word, status, why in (
        (stranger, 1, "no commitment of"),
        (stranger[:-1] + "z", 2, "no ss58"),
        ("5", 2, "more than one"),
        ("x", 2, "no ss58"),
    ):
        assert cli.main(["explain", word, *at]) == status
        said = capsys.readouterr()
        assert said.out == ""
        assert why in said.err
        assert f"{GIANT}  giant/model" in said.err
        assert Reason.PARAMETERS.sentence in said.err


def test_the_command(tmp_path: Path) -> None:
    def sn29(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(recorded.REPOSITORY)}
        command = [sys.executable, "-m", "sn29.cli", "explain", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    first = one("oldest_holder", 100, ann=(0.0, 0.01), bob=(0.01, 0.01))
    second = recorded.round_record(7920, first.competitions["c00"].losses, {"ann": 7000, "bob": 7100}, before=first)
    for record in (first, second):
        record_files.write(tmp_path / "state" / "records", record)
    done = sn29("bob", "--state.dir", "state")
    assert done.returncode == 0, done.stderr
    assert "round of block 7,560" in done.stdout
    assert "lost to ann" in done.stdout
    only = sn29("bob", "--records", str(tmp_path / "state" / "records"), "--round", "7920", "--json")
    assert only.returncode == 0, only.stderr
    assert json.loads(only.stdout)["hotkey"] == "bob"
    assert [r["block"] for r in json.loads(only.stdout)["rounds"]] == [7920]
    missing = sn29("bob", "--state.dir", "state", "--round", "5")
    assert missing.returncode == 1
    assert "--round" in missing.stderr
    nowhere = sn29("bob", "--state.dir", "nowhere")
    assert nowhere.returncode == 1
    assert "Traceback" not in nowhere.stderr
