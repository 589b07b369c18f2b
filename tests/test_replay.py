from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded

from sn29 import record_files, replay
from sn29.audit import audit
from sn29.errors import Reason, Rejected
from sn29.records import Entry, Weights
from sn29.round_record import RoundRecord, decode, encode
from sn29.rules.schedule import parse_file
from sn29.rules.scoring import Memory
from sn29.rules.sequential import bar_of, hopeless
from sn29.rules.weights import KEEP

RULES = ("oldest_holder", "pairwise_epsilon", "champion")
BLOCKS = {"ann": 7000, "bob": 7100, "cid": 7200}
ENTRIES = {h: Entry(f"content of {h}", block) for h, block in BLOCKS.items()}


def rounds(rule: str = "oldest_holder", num: int = 3, **models: tuple[float, float]) -> list[RoundRecord]:
    """Rounds that follow on each other; bob is a little better than ann, cid a little worse and noisier."""
    found: list[RoundRecord] = []
    shapes = models or {"ann": (0.0, 0.01), "bob": (-0.006, 0.01), "cid": (0.002, 0.02)}
    for k in range(num):
        table = recorded.losses(200, 50 + k, **shapes)
        before = found[-1] if found else None
        found.append(recorded.round_record(7560 + 360 * k, table, BLOCKS, rule=rule, before=before))
    return found


def sn29(*words: str, cwd: Path = recorded.REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(recorded.REPOSITORY)}
    command = [sys.executable, "-m", "sn29.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


# --- the same rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_record_read_back_gives_the_recorded_bits(rule: str) -> None:
    for record in rounds(rule):
        again = decode(encode(record))
        decision = replay.recompute(again)
        assert replay.compare(again, decision) is None
        assert {h: w.hex() for h, w in decision.weights[0].by_hotkey.items()} == {
            h: w.hex() for h, w in record.weights[0].by_hotkey.items()
        }
        assert math.fsum(record.weights[0].by_hotkey.values()) == pytest.approx(1)


def with_a_stop(count: int = 32, shift: float = 0.05) -> list[RoundRecord]:
    """ann holds the crown since the first round; in the second bob comes, and is measured on `count` of 200 samples."""
    first = recorded.round_record(7560, recorded.losses(200, 50, ann=(0.0, 0.01)), BLOCKS, rule="champion")
    table = recorded.losses(200, 51, ann=(0.0, 0.01), bob=(shift, 0.01), cid=(-0.001, 0.02))
    bar = bar_of(recorded.c00("champion").scoring, Memory.from_json(first.competitions["c00"].memory_after), ENTRIES, 7920)
    assert bar is not None
    stop = hopeless(bar, "bob", table["bob"][:count], table["ann"])
    short = {**table, "bob": table["bob"][:count]}
    stopped = {"bob": str(stop)}
    return [first, recorded.round_record(7920, short, BLOCKS, rule="champion", before=first, stopped=stopped)]


def test_a_record_of_a_stopped_model_gives_the_recorded_bits() -> None:
    _, second = with_a_stop()
    again = decode(encode(second))
    assert replay.compare(again, replay.recompute(again)) is None
    kept = again.competitions["c00"]
    assert {m.hotkey: len(m.losses) for m in kept.models} == {"ann": 200, "bob": 32, "cid": 200}
    assert [(d["challenger"], d["num_samples"]) for d in kept.duels] == [("bob", 32), ("cid", 200)]


@pytest.mark.parametrize(("count", "shift"), [(32, -0.01), (32, 0.0), (31, 0.05), (150, 0.05)])
def test_a_stop_that_the_rule_does_not_give_is_found(count: int, shift: float) -> None:
    """Who could win, or in the middle of a portion: a validator that measures less than it has to cannot hide it."""
    _, second = with_a_stop(count, shift)
    found = replay.compare(second, replay.recompute(second))
    assert found is not None
    assert found.what == "c00: bob"
    assert found.second == f"no reason to stop after {count} samples"


def test_who_was_stopped_is_not_scored_by_a_rule_that_compares_all_samples(tmp_path: Path) -> None:
    first, second = with_a_stop()
    found = replay.what_if(second, replay.other_rule("oldest_holder"))
    assert sorted(s.hotkey for s in found.decision.scored["c00"].scores) == ["ann", "cid"]
    assert {h: (e.got, e.limit) for h, e in found.refused.items()} == {
        "bob": ("losses on 32 samples", "losses on all 200, which oldest_holder compares")
    }
    assert replay.what_if(second, replay.other_rule("champion")).refused == {}
    simulated = list(replay.simulate([first, second], parse_file("c00", recorded.c00_text("pairwise_epsilon"))))
    assert [sorted(r.refused) for r in simulated] == [[], ["bob"]]
    path = record_files.write(tmp_path, second)
    done = sn29("replay", str(path), "--rule", "oldest_holder")
    assert (done.returncode, "not scored: bob: " in done.stdout) == (0, True), done.stdout
    assert sn29("replay", str(path)).returncode == 0


def test_audit_says_who_was_stopped_where() -> None:
    """Another validator's losses are a little higher: it stops one portion earlier, and that is said after the losses."""
    _, mine = with_a_stop(64)
    _, other = with_a_stop(32)
    first, *rest = audit(mine, other)
    assert first.what == "c00: measuring of bob"
    assert first.first.startswith("stopped after 64 of 200 samples: its losses are")
    assert first.second.startswith("stopped after 32 of 200 samples: its losses are")
    assert rest[0].what.startswith("c00: duels[0]")
    kept = other.competitions["c00"]
    models = tuple(replace(m, losses=tuple(x * 1.5 for x in m.losses)) if m.hotkey == "bob" else m for m in kept.models)
    noisy = replace(other, competitions={"c00": replace(kept, models=models)})
    assert [d.what.partition(" of ")[0] for d in audit(mine, noisy)[:2]] == ["c00: losses", "c00: measuring"]
    assert "of 32 differences in 432 losses" in audit(mine, noisy)[0].note


def test_the_order_of_hotkeys_decides_nothing() -> None:
    table = recorded.losses(60, 1, ann=(0.0, 0.01), bob=(-0.004, 0.01), cid=(0.002, 0.02))
    backwards = {h: table[h] for h in reversed(table)}
    assert encode(recorded.round_record(7560, table, BLOCKS)) == encode(recorded.round_record(7560, backwards, BLOCKS))


def test_a_record_of_the_schema_before_gives_the_recorded_bits() -> None:
    vectors = recorded.REPOSITORY / "tests" / "vectors"
    paths = [vectors / f"round_record_schema2_{name}.json" for name in ("first", "second")]
    for path in paths:
        record = record_files.read(path)
        assert replay.compare(record, replay.recompute(record)) is None
        assert sn29("replay", str(path)).returncode == 0
    text = recorded.c00_text("champion")
    simulated = list(replay.simulate(record_files.read_all(paths), parse_file("c00", text)))
    assert [r.then for r in simulated] == [{"ann": 1.0}, {"ann": 1.0}] == [r.instead for r in simulated]


def two_mechanisms(before: RoundRecord | None = None) -> RoundRecord:
    """c00 paid by mechanism 0 and c01, with the same models, by mechanism 1, each with all of its reward."""
    record = recorded.round_record(7560, recorded.losses(60, 1, ann=(0.0, 0.01), bob=(-0.03, 0.01)), BLOCKS, before=before)
    kept = record.competitions["c00"]
    losses = {"ann": kept.losses["bob"], "bob": kept.losses["ann"]}
    outcomes = {m.hotkey: replace(m.outcome, competition="c01") for m in kept.models}
    models = tuple(replace(m, outcome=outcomes[m.hotkey], losses=losses[m.hotkey]) for m in kept.models)
    c01 = replace(
        kept, models=models, parameters={**kept.parameters, "name": "c01", "mechanism": 1},
        window=replace(kept.window, competition="c01"),
    )  # fmt: skip
    both = replace(record, competitions={"c00": kept, "c01": c01})
    decision = replay.recompute(both)
    scored = {name: replace(k, scores=decision.scored[name].scores) for name, k in both.competitions.items()}
    return replace(both, competitions=scored, weights=decision.weights)


def test_each_mechanism_has_weights_of_its_own() -> None:
    record = two_mechanisms()
    assert {m: max(w.by_hotkey, key=w.by_hotkey.__getitem__) for m, w in record.weights.items()} == {0: "bob", 1: "ann"}
    assert all(math.fsum(w.by_hotkey.values()) == pytest.approx(1) for w in record.weights.values())
    again = decode(encode(record))
    assert again == record
    assert replay.compare(again, replay.recompute(again)) is None
    assert again.weights_of("c01") == record.weights[1].by_hotkey
    assert again.weights_of("c99") == record.weights[0].by_hotkey
    (found,) = replay.simulate([record], parse_file("c01", recorded.c00_text()))
    assert found.then == record.weights[1].by_hotkey
    up = replace(record.weights[1], by_hotkey={**record.weights[1].by_hotkey, "ann": 0.25})
    other = replace(record, weights={**record.weights, 1: up})
    difference = replay.compare(other, replay.recompute(record))
    assert difference is not None
    assert difference.what == audit(other, record)[0].what == "weights.1.by_hotkey.ann"


def test_a_mechanism_remembers_its_own_last_weights() -> None:
    """Half of the way from what each decided last; one that was not there before starts at its result."""
    record = two_mechanisms()
    last = {0: Weights(7200, {"ann": 1.0})}
    decision = replay.recompute(replace(record, last_weights=last))
    assert decision.weights[1] == record.weights[1]
    new = record.weights[0].by_hotkey
    assert decision.weights[0].by_hotkey == pytest.approx({h: (new.get(h, 0) + (h == "ann")) / 2 for h in ("ann", "bob")})


def test_commands_say_which_mechanism(tmp_path: Path) -> None:
    path = record_files.write(tmp_path, two_mechanisms())
    done = sn29("replay", str(path))
    assert done.returncode == 0
    assert "weights\n" in done.stdout
    assert "weights of mechanism 1\n" in done.stdout
    assert sorted(json.loads(sn29("replay", str(path), "--json").stdout)["weights"]) == ["0", "1"]
    told = sn29("explain", "ann", "--records", str(path)).stdout
    assert "of mechanism 1" in told


def test_one_bit_of_a_weight_a_score_or_a_loss_is_found() -> None:
    record = rounds()[0]
    assert record.weights[0].by_hotkey["bob"] > 0
    kept = record.competitions["c00"]

    def up(value: float) -> float:
        return math.nextafter(value, 2.0)

    weights = replace(record.weights[0], by_hotkey={**record.weights[0].by_hotkey, "bob": up(record.weights[0].by_hotkey["bob"])})
    found = replay.compare(replace(record, weights={0: weights}), replay.recompute(record))
    assert found is not None
    assert found.what == "weights.0.by_hotkey.bob"
    scores = tuple(replace(s, weight=up(s.weight)) if s.hotkey == "bob" else s for s in kept.scores)
    other = replace(record, competitions={"c00": replace(kept, scores=scores)}, weights={0: weights})
    found = replay.compare(other, replay.recompute(other))
    assert found is not None
    assert found.what == "c00: scores.bob.weight", "scores come first: weights follow from them"
    worse = replace(kept.models[1], losses=tuple(2 * x for x in kept.models[1].losses))
    other = replace(record, competitions={"c00": replace(kept, models=(kept.models[0], worse, *kept.models[2:]))})
    found = replay.compare(other, replay.recompute(other))
    assert found is not None
    assert found.what.startswith("c00: scores.")


def test_nothing_outside_the_record_decides(tmp_path: Path) -> None:
    """From another folder, in another process, twice."""
    path = record_files.write(tmp_path / "records", rounds("champion")[-1])
    answers = []
    for folder in (tmp_path, tmp_path / "records", tmp_path):
        done = sn29("replay", str(path), "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert len(set(answers)) == 1
    assert json.loads(answers[0])["equal"] is True


def test_the_command_says_what_differs_first(tmp_path: Path) -> None:
    record = rounds()[0]
    weights = replace(record.weights[0], by_hotkey={"ann": 1.0})
    path = record_files.write(tmp_path, replace(record, weights={0: weights}))
    done = sn29("replay", str(path))
    assert done.returncode == 1
    assert "weights.0.by_hotkey.ann: 1.0 |" in done.stdout
    answer = json.loads(sn29("replay", str(path), "--json").stdout)
    assert answer["equal"] is False
    assert answer["difference"]["first"] == "1.0"
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": 2}')
    done = sn29("replay", str(broken))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "broken.json" in done.stderr


def test_no_sample_counts_twice() -> None:
    """A window that is judged in a second round starts from where it started; another rule starts with nothing."""
    first, second = rounds("champion", num=2)
    kept = second.competitions["c00"]
    competition = recorded.c00("champion")
    same, new = kept.window, replace(kept.window, index=kept.window.index + 1)
    assert replay.memory_for(competition, same, second).to_json() == kept.memory_before
    assert replay.memory_for(competition, new, second).to_json() == kept.memory_after
    assert kept.memory_before == first.competitions["c00"].memory_after != kept.memory_after
    for before in (None, rounds("oldest_holder", num=1)[0], replace(second, competitions={})):
        assert replay.memory_for(competition, new, before) == replay.Memory.empty()


def test_a_record_that_no_round_could_have_left_is_refused() -> None:
    record = rounds("champion", num=2)[-1]
    kept = record.competitions["c00"]
    for memory in (kept.memory_after, *strange_memories(kept.memory_before)):
        other = replace(record, competitions={"c00": replace(kept, memory_before=memory)})
        with pytest.raises(Rejected) as error:
            replay.recompute(other)
        assert error.value.reason is Reason.RECORD
    window = replace(kept.window, index=kept.window.index + 1)
    for memory in strange_memories(kept.memory_after):
        other = replace(record, competitions={"c00": replace(kept, memory_after=memory)})
        with pytest.raises(Rejected, match="memory after"):
            replay.memory_for(recorded.c00("champion"), window, other)


def strange_memories(memory: Any) -> list[Any]:
    """What a stranger's record may hold in place of this memory."""
    (row, *_) = memory["evidence"]
    changes: list[dict[str, Any]] = [
        {"block": "x"}, {"block": 10**12}, {"holder": [1]}, {"holder": ["ann", 1]}, {"faced": -1}, {"evidence": [row[:1]]},
        {"evidence": [[*row[:2], 0, *row[3:]]]}, {"evidence": [[*row[:3], -1, *row[4:]]]}, {"evidence": [[*row[:5], 1]]},
        {"evidence": [[*row[:3], 2.5, *row[4:]]]}, {"evidence": [[*row[:5], 10**400]]}, {"past": 5}, {"copies": [["ann"]]},
    ]  # fmt: skip
    return [{"holder": 5}, [], *({**memory, **change} for change in changes)]


# --- other rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_another_rule_gives_what_it_would_have_given_then(rule: str) -> None:
    table = recorded.losses(200, 50, ann=(0.0, 0.01), bob=(-0.006, 0.01), cid=(0.002, 0.02))
    recorded_by = recorded.round_record(7560, table, BLOCKS, rule="oldest_holder")
    found = replay.what_if(recorded_by, replay.other_rule(rule))
    decided_by = recorded.round_record(7560, table, BLOCKS, rule=rule)
    shares = {s.hotkey: s.weight for s in found.decision.scored["c00"].scores}
    assert shares == {s.hotkey: s.weight for s in decided_by.competitions["c00"].scores}
    assert found.decision.weights == decided_by.weights


def test_a_rule_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = record_files.write(tmp_path, rounds()[0])
    done = sn29("replay", str(path), "--rule", "coin_toss")
    assert done.returncode == 1
    assert "coin_toss" in done.stderr
    assert sn29("replay", str(path), "--rule", "pairwise_epsilon").returncode == 0


def test_other_competition_files(tmp_path: Path) -> None:
    """A limit below bob's size: he is not scored, and the answer says why; a competition without a file is not in force."""
    table = recorded.losses(60, 1, ann=(0.0, 0.01), bob=(-0.03, 0.01))
    record = recorded.round_record(7560, table, BLOCKS, num_parameters={"bob": 2_000_000_000})
    assert max(record.weights[0].by_hotkey, key=lambda h: record.weights[0].by_hotkey[h]) == "bob"
    path = record_files.write(tmp_path / "records", record)
    folder = tmp_path / "competitions"
    folder.mkdir()
    (folder / "c00.yaml").write_text(recorded.c00_text(parameters="1.0e9"))
    done = sn29("replay", str(path), "--competitions", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["weights"] == {"0": {"ann": 1.0}}
    assert answer["recorded_weights"] == {"0": record.weights[0].by_hotkey}
    assert "2,000,000,000" in answer["refused"]["bob"]
    assert "1,000,000,000" in answer["refused"]["bob"]
    nowhere = replay.what_if(record, replay.from_files({}))
    assert nowhere.decision.scored == {}
    assert nowhere.decision.weights == {}


def test_simulate_carries_weights_from_round_to_round() -> None:
    """A file that refuses bob from the second round on: he loses half of his weight a round, by the moving average."""
    table = recorded.losses(60, 1, ann=(0.0, 0.01), bob=(-0.03, 0.01))
    found: list[RoundRecord] = []
    for k in range(4):
        before = found[-1] if found else None
        found.append(recorded.round_record(7560 + 360 * k, table, BLOCKS, before=before, num_parameters={"bob": 2_000_000_000}))
    bob = found[0].weights[0].by_hotkey["bob"]
    text = recorded.c00_text() + "\nchanges:\n  - at: 7920\n    set: {limits.parameters: 1.0e9}\n"
    result = list(replay.simulate(found, parse_file("c00", text)))
    assert [r.block for r in result] == [7560, 7920, 8280, 8640]
    assert [r.then["bob"] for r in result] == pytest.approx([bob] * 4)
    assert [r.instead.get("bob", 0.0) for r in result] == pytest.approx([bob * KEEP**k for k in range(4)])
    assert [list(r.refused) for r in result] == [[], ["bob"], ["bob"], ["bob"]]
    same = list(replay.simulate(found, parse_file("c00", recorded.c00_text())))
    assert [r.instead for r in same] == [r.then for r in same], "the same rules change nothing, to the bit"


def test_simulate_carries_what_a_rule_remembers() -> None:
    found = rounds("champion", num=4)
    same = list(replay.simulate(found, parse_file("c00", recorded.c00_text("champion"))))
    assert [r.instead for r in same] == [r.then for r in same]
    changed = list(replay.simulate(rounds("oldest_holder", num=4), parse_file("c00", recorded.c00_text("champion"))))
    assert [r.instead for r in changed] == [r.then for r in same], "champion from the first round on, as if it had always been"
    assert [r.instead for r in changed] != [r.then for r in changed]


def test_simulate_wants_one_validators_rounds_in_order(tmp_path: Path) -> None:
    first, second, third = rounds()
    file = parse_file("c00", recorded.c00_text())
    with pytest.raises(Rejected, match="oldest first"):
        list(replay.simulate([second, first], file))
    with pytest.raises(Rejected, match="no c07"):
        list(replay.simulate([first], parse_file("c07", recorded.c00_text())))
    after_a_gap = list(replay.simulate([first, third], file))
    assert after_a_gap[1].instead == after_a_gap[1].then, "from the recorded weights: the simulation knows nothing in between"


def test_the_simulate_command(tmp_path: Path) -> None:
    paths = [record_files.write(tmp_path / "records", r) for r in rounds()]
    new = tmp_path / "c00.yaml"
    new.write_text(recorded.c00_text("pairwise_epsilon"))
    by_file = sn29("competitions", "simulate", str(new), "--rounds", *map(str, paths))
    assert by_file.returncode == 0, by_file.stderr
    assert "mean weight in 3 rounds" in by_file.stdout
    assert all(f"  {hotkey}  " in by_file.stdout for hotkey in BLOCKS)
    assert sn29("competitions", "simulate", str(new), "--rounds", str(tmp_path / "records")).stdout == by_file.stdout
    data = json.loads(sn29("competitions", "simulate", str(new), "--rounds", str(paths[0]), "--json").stdout)
    assert data[0]["then"] == rounds()[0].weights[0].by_hotkey
    assert sn29("competitions", "simulate", str(new)).returncode == 1


def test_the_simulate_command_passes_over_rounds_without_the_competition(tmp_path: Path) -> None:
    """A third competition that took effect after some rounds: those that have it are compared."""
    first, second, third = rounds("oldest_holder", num=3)
    record_files.write(tmp_path / "records", first)
    for record in (second, third):
        kept = record.competitions["c00"]
        kept = replace(kept, parameters=kept.parameters | {"name": "c07"}, window=replace(kept.window, competition="c07"))
        models = tuple(replace(m, outcome=replace(m.outcome, competition="c07")) for m in kept.models)
        record_files.write(tmp_path / "records", replace(record, competitions={"c07": replace(kept, models=models)}))
    (new := tmp_path / "c07.yaml").write_text(recorded.c00_text())
    done = sn29("competitions", "simulate", str(new), "--rounds", str(tmp_path / "records"))
    assert done.returncode == 0, done.stderr
    assert "1 of 3 rounds skipped: they have no c07" in done.stderr
    assert "mean weight in 2 rounds" in done.stdout
    (nobodys := tmp_path / "c09.yaml").write_text(recorded.c00_text())
    none = sn29("competitions", "simulate", str(nobodys), "--rounds", str(tmp_path / "records"))
    assert none.returncode == 1
    assert none.stdout == ""
    assert "no round has c09" in none.stderr
    assert "c00, c07" in none.stderr
    assert "localnet" in none.stderr


# --- by hand ----------------------------------------------------------------------------------------------------------

WORKED: dict[str, Any] = {
    # `rules.oldest_holder`'s worked example: wins 1, 2, 2 of 5 samples, none grouped
    "losses": {
        "oldest": [1000, 900, 1200, 800, None], "middle": [997, 905, 1190, 798, 1500], "newest": [996, 890, 1195, 799.5, 1499],
    },
    "commit_blocks": {"oldest": 5_000_000, "middle": 5_003_610, "newest": 5_007_220},
    "block": 5_010_830,
}  # fmt: skip


def one_by_one() -> dict[str, Any]:
    fields = recorded.c00("oldest_holder").model_dump(mode="json")
    return {**fields, "scoring": {**fields["scoring"], "group": 1}}


def test_a_record_by_hand_is_scored_like_a_round(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**WORKED, "competition": one_by_one()}))
    done = sn29("replay", str(path), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {s["hotkey"]: s["wins"] for s in answer["scores"]["c00"]} == {"oldest": 1, "middle": 2, "newest": 2}
    assert answer["weights"]["0"] == pytest.approx({"oldest": 1 / 9, "middle": 4 / 9, "newest": 4 / 9})
    named = tmp_path / "named.json"
    named.write_text(json.dumps({**WORKED, "competition": "c00"}))
    folder = tmp_path / "competitions"
    folder.mkdir()
    (folder / "c00.yaml").write_text(recorded.c00_text().replace("rule: oldest_holder", "rule: oldest_holder\n  group: 1"))
    done = sn29("replay", str(named), "--competitions", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answer
    assert sn29("replay", str(named), "--rule", "champion").returncode == 0


def test_the_example_of_the_help_is_one_that_works(tmp_path: Path) -> None:
    text = sn29("replay", "--help").stdout
    example = text[text.index('{"losses"') : text.index('"c00"}') + len('"c00"}')]
    assert json.loads(example) == json.loads(
        str(replay.__doc__)[(a := str(replay.__doc__).index('{"losses"')) :].split("\n\n")[0]
    )
    assert a
    path = tmp_path / "example.json"
    path.write_text(example)
    done = sn29("replay", str(path))
    assert done.returncode == 0, done.stderr
    assert "ann" in done.stdout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"losses": [1, 2]}, "losses"),
        ({"losses": {"oldest": [1.0, "x"]}}, "losses.oldest"),
        ({"losses": {"oldest": [1.0], "middle": [1.0, 2.0]}}, "one length"),
        ({"losses": {"oldest": [-1.0]}}, "losses.oldest"),
        ({"commit_blocks": {"oldest": 1}}, "commit_blocks.middle"),
        ({"block": True}, "block"),
        ({"block": None}, "block"),
        ({"hash": "0x12"}, "64 hex digits"),
        ({"extra": 1}, "extra"),
        ({"competition": {"name": "c00"}}, "competition"),
        ({"competition": 7}, "competition"),
    ],
)
def test_what_is_wrong_by_hand_is_named(change: dict[str, Any], named: str) -> None:
    data = {**WORKED, "competition": one_by_one(), **change}
    with pytest.raises(Rejected) as error:
        replay.by_hand(data, lambda name, block: recorded.c00(), "mine.json")
    assert error.value.reason in (Reason.RECORD, Reason.COMPETITION_FILE)
    assert named in str(error.value)
    with pytest.raises(Rejected, match="block"):
        replay.by_hand({k: v for k, v in data.items() if k != "block"} | change, lambda name, block: recorded.c00(), "x")


def test_fewer_samples_than_a_group_are_refused_and_not_zero() -> None:
    contest = replay.by_hand({**WORKED, "competition": "c00"}, lambda name, block: recorded.c00("oldest_holder"), "mine.json")
    with pytest.raises(Rejected, match="got 5 samples, rule at least 10"):
        replay.decide_by_hand(contest)
    other = replay.changed(contest, replay.Changed(replay.with_rule(contest.competition, "champion")))
    assert replay.decide_by_hand(other).weights[0].by_hotkey


# --- audit ------------------------------------------------------------------------------------------------------------


def test_equal_records_have_no_difference(tmp_path: Path) -> None:
    record = rounds()[-1]
    assert audit(record, decode(encode(record))) == ()
    one, two = record_files.write(tmp_path / "a", record), record_files.write(tmp_path / "b", record)
    done = sn29("audit", str(one), str(two))
    assert (done.returncode, done.stdout.strip()) == (0, "equal")


def test_the_first_cause_comes_first(tmp_path: Path) -> None:
    """One validator measured bob 0.1 % higher on one sample; scores and weights follow from that."""
    table = recorded.losses(60, 1, ann=(0.0, 0.01), bob=(-0.005, 0.01))
    mine = recorded.round_record(7560, table, BLOCKS)
    noisy = tuple(x * (1.5 if i == 17 else 1.0 + 1e-9) for i, x in enumerate(table["bob"]))
    other = recorded.round_record(7560, {**table, "bob": noisy}, BLOCKS)
    found = audit(mine, other)
    sample = mine.competitions["c00"].samples[17].id
    assert found[0].what == f"c00: losses of bob on sample {sample}"
    assert "relative 0.333" in found[0].note
    assert "of 60 differences in 120 losses" in found[0].note
    assert [d.what.partition(":")[0] for d in found] == ["c00", "c00", "weights.0.by_hotkey.ann"]
    one, two = record_files.write(tmp_path / "a", mine), record_files.write(tmp_path / "b", other)
    done = sn29("audit", str(one), str(two))
    assert done.returncode == 1
    assert done.stdout.startswith(f"first cause: c00: losses of bob on sample {sample}")
    data = json.loads(sn29("audit", str(one), str(two), "--json").stdout)
    assert data["equal"] is False
    assert len(data["differences"]) == len(found)


def test_every_stage_is_looked_at_in_the_order_of_causes() -> None:
    record = rounds()[-1]
    kept = record.competitions["c00"]
    ann, bob, cid = kept.models
    moved = {0: replace(record.weights[0], by_hotkey={"ann": 1.0})}

    def with_kept(**changes: Any) -> RoundRecord:
        return replace(record, competitions={"c00": replace(kept, **changes)}, weights=moved)

    stages = [
        (replace(record, head=recorded.head(1), weights=moved), "block"),
        (replace(record, head=replace(record.head, hash="0x00"), weights=moved), "block hash"),
        (with_kept(parameters={**kept.parameters, "reward_share": 0.5}), "c00: competition in force.reward_share"),
        (with_kept(file_sha256="0"), "c00: competition file's sha256"),
        (with_kept(datasets={"HuggingFaceFW/fineweb-edu-score-2": "d" * 40}), "c00: data set's revision"),
        (with_kept(samples=(*kept.samples[:-1], replace(kept.samples[-1], id="0"))), "c00: samples[199].id"),
        (with_kept(models=(replace(ann, outcome=replace(ann.outcome, block=1)), bob, cid)), "c00: outcomes.ann.block"),
        (with_kept(models=(bob, cid)), "c00: outcomes.ann"),
        (with_kept(models=(replace(ann, tokenizer_id="other"), bob, cid)), "c00: content and tokenizer.ann[1]"),
        (with_kept(models=(replace(ann, entry=replace(ann.entry, block=1)), bob, cid)), "c00: claims.ann.block"),
        (replace(record, versions={"sn29": "0.1.0"}, weights=moved), "software versions.torch"),
        (replace(record, machine={"dtype": "bfloat16", "device": "cpu"}, weights=moved), "machine.dtype"),
        (with_kept(memory_before={"else": 1}), "c00: memory before"),
        (with_kept(scores=kept.scores[1:]), "c00: scores.ann"),
        (replace(record, registered=("ann",), weights=moved), "registered hotkeys"),
        (replace(record, last_weights={}, weights=moved), "last weights"),
        (replace(record, weights=moved), "weights"),
    ]
    for other, expected in stages:
        first = audit(record, other)[0]
        assert first.what.startswith(expected), (first, expected)
    facts = replace(ann, num_tokens=999)
    (rest,) = audit(record, replace(record, competitions={"c00": replace(kept, models=(facts, bob, cid))}))
    assert "num_tokens" in rest.what, "no difference goes unsaid"
