"""Forecasts of real checkpoints, by the records of a real round on a chain and a Hub of this machine."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import losses, round_record
from test_replay import strange_memories
from test_round import RULES, WINDOW, Subnet, go, subnet  # noqa: F401  (one of them is a fixture)

from neurons.adapters import dataset_of
from sn29 import record_files
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.forecast import NEW, Forecast, _contest, _to_beat, excluded_by, forecast, look
from sn29.hub import Hub
from sn29.records import Entry, Loss
from sn29.round_record import RoundRecord
from sn29.rules.champion import Who
from sn29.rules.competition import Competition, parse_competition
from sn29.rules.decision import score_contest

CHAMPION = RULES.replace("count: 8", "count: 24").replace(
    RULES[RULES.index("scoring:") : RULES.index("pool:")], "scoring: {rule: champion}\n"
)
WORSE = 1.0
"""Initial standard deviation of the weights of a model that is sure of itself, and mostly wrong."""
BETTER = 0.001
"""Of one that says all tokens are equally likely: 1.3 nats a token better or so."""


def rules(text: str = RULES) -> Competition:
    return parse_competition("c00", text)


@pytest.fixture
def recorded(subnet: Subnet, model: Callable[..., Path]) -> Callable[..., Path]:  # noqa: F811
    """recorded(rules, name=folder, ...) -> the records of a validator that has judged these miners' models once."""

    def judged(text: str = RULES, **models: Path) -> Path:
        (subnet.folder / "competitions" / "c00.yaml").write_text(text)
        for name, folder in models.items():
            subnet.publish(name, folder)
        subnet.next_window()
        store, _ = go(subnet, dtype="float32")
        store.close()
        return subnet.folder / "state" / "records"

    return judged


@pytest.fixture
def ask(subnet: Subnet) -> Callable[..., Forecast]:  # noqa: F811
    """ask(folder, records, ...) -> what would become of the folder's model."""

    def asked(folder: Path, records: Path | None, text: str = RULES, **options: Any) -> Forecast:
        dataset = dataset_of(Hub(subnet.hub.endpoint), subnet.folder / "competitions")
        asking = forecast(folder, rules(text), None, records, dataset, subnet.evaluator, threads=1, deadline_s=120, **options)
        return asyncio.run(asking)

    return asked


def record_in(records: Path) -> RoundRecord:
    found = record_files.newest(records)
    assert found is not None
    return found


def test_the_losses_are_the_recorded_ones_to_the_bit_and_a_better_model_wins(recorded, ask, model, subnet):  # noqa: F811
    worse, bad = model(seed=3, initializer_range=WORSE), model(seed=4, initializer_range=WORSE)
    records = recorded(worse=worse)
    told: list[tuple[str, int, int]] = []
    found = ask(model(seed=5, initializer_range=BETTER), records, progress=lambda *now: told.append(now), windows=3)
    assert found.accepted
    assert found.holder == subnet.hotkey("worse")
    assert found.chances[0].probability == 1.0
    assert (found.now, found.first_window) == (WINDOW, 2 * WINDOW)
    assert found.against is not None
    assert found.against.mean < -0.1
    assert not found.behind
    assert [what for what, done, total in told if done == total] == ["check", "draw", "measure", "decide"]
    assert found.num_samples == 8
    again = ask(worse, records, hotkey=subnet.hotkey("worse"))  # it stands already, and holds what there is
    kept = record_in(records).competitions["c00"].models[0]
    assert again.accepted
    assert again.nats_per_sample == sum(kept.losses) / 8
    assert again.probability == 1.0
    lost = ask(bad, records, hotkey=NEW, now=WINDOW + 10, windows=2)
    assert lost.against is not None
    assert lost.behind == (lost.against.mean > 0)


def test_under_champion_the_crown_is_what_counts_and_what_is_missing_is_said(recorded, ask, model, subnet):  # noqa: F811
    records = recorded(CHAMPION, good=model(seed=3, initializer_range=BETTER), bad=model(seed=4, initializer_range=WORSE))
    assert record_in(records).competitions["c00"].memory_after["holder"][0] == subnet.hotkey("good")
    found = ask(model(seed=5, initializer_range=WORSE), records, CHAMPION)
    assert found.accepted
    assert (found.rule, found.holder) == ("champion", subnet.hotkey("good"))
    assert (found.probability, found.behind) == (0.0, True)
    assert found.against is not None
    assert found.against.needed is not None
    assert found.missing > 0.1  # both are cut to 28 % a text
    assert found.prospect is not None
    assert found.prospect.wins_at is None
    assert "never falls below its floor" in found.prospect.why_never
    stands = ask(model(seed=3, initializer_range=BETTER), records, CHAMPION, hotkey=subnet.hotkey("good"))
    assert (stands.crowned, stands.probability) == (True, 1.0)
    assert stands.said == "would be accepted: it holds the crown already"
    mine = ask(model(seed=6, initializer_range=BETTER), records, CHAMPION, hotkey=subnet.hotkey("good"))
    assert mine.holder == subnet.hotkey("bad")  # a second model under the holder's hotkey gives the crown up


def test_an_exact_copy_is_refused_and_a_near_one_never_wins(recorded, ask, model, subnet):  # noqa: F811
    good = model(seed=3, initializer_range=0.02)
    records = recorded(CHAMPION, good=good)
    copy = ask(good, records, CHAMPION)
    assert [r.reason for r in copy.refusals] == [Reason.COPY]
    assert subnet.hotkey("good") in copy.refusals[0].got
    assert (copy.probability, copy.window) == (0.0, None)
    near = shutil.copytree(good, subnet.folder / "near")
    nudge(near)
    found = ask(near, records, CHAMPION)
    assert found.accepted
    assert found.near_copy_of == subnet.hotkey("good")
    assert found.probability == 0.0
    assert "near copy" in found.said


def nudge(folder: Path) -> None:
    """Every weight a millionth larger: other files and tensors, the same model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: w * (1 + 1e-5) for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def test_all_reasons_for_a_refusal_are_told_and_nothing_is_measured(recorded, ask, model, subnet):  # noqa: F811
    records = recorded(good=model(seed=3))
    large = model(seed=5, num_hidden_layers=8)
    found = ask(large, records)
    assert [r.reason for r in found.refusals] == [Reason.PARAMETERS]
    assert found.chances == ()
    assert "refused" in found.said
    assert found.num_samples == 0


def test_without_a_record_nothing_is_known_and_an_empty_pool_is_won_for_certain(ask, model, tmp_path):
    made = round_record(360, losses(20, 1, ann=(0.0, 0.01)), {"ann": 5})
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "of another competition"
    record_files.write(other, replace(made, competitions={}))
    folder = model(seed=5)
    for records in (None, empty, other):
        found = ask(folder, records)
        assert found.accepted
        assert (found.probability, found.holder, found.first_window) == (None, "", -1)
        assert "no record says who is there" in found.said
    with pytest.raises(Rejected, match="not there") as refused:
        ask(folder, tmp_path / "not there")
    assert refused.value.reason is Reason.SETTING
    nobody = replace(made.competitions["c00"], models=(), scores=(), memory_after={})
    record_files.write(empty, replace(made, competitions={"c00": nobody}))
    found = ask(folder, empty, windows=3)
    assert [c.probability for c in found.chances] == [1.0] * 3
    assert found.said == "would be accepted, and win: nobody else has a model there"


STOPPED = {"bob": "stopped after 64 of 200 samples"}
COMMITTED = {"ann": 5, "bob": 6, "cid": 7}


def windows_of(*rounds: dict[str, tuple[float, float]], stopped: int, folder: Path, past: tuple[str, ...] = ()) -> list[Path]:
    """Rounds of models with these losses, written down; from round `stopped` on, bob was stopped."""
    found: list[RoundRecord] = []
    for number, models in enumerate(rounds):
        block = 360 * (number + 1)
        early = STOPPED if number >= stopped else {}
        table = {h: row[:64] if h in early else row for h, row in losses(200, block, **models).items()}
        before = found[-1] if found else None
        found.append(round_record(block, table, COMMITTED, rule="champion", before=before, stopped=early))
        kept = found[-1].competitions["c00"]
        memory = {**kept.memory_after, "past": [[h, f"content of {h}"] for h in past]}
        found[-1] = replace(found[-1], competitions={"c00": replace(kept, memory_after=memory)})
    return [record_files.write(folder, each) for each in found]


def test_nobody_wins_because_a_rival_was_stopped(tmp_path):
    """ann holds the crown, and bob was stopped: what ann commits next has to beat bob, of whom an older window knows."""
    two = {"ann": (0.0, 0.01), "bob": (0.2, 0.01)}
    _, newest = windows_of(two, two, stopped=1, folder=tmp_path)
    again = Who("ann", "a new one")
    known = look(tmp_path, "c00", again, print)
    assert known is not None
    assert not known.alone
    assert not known.crowned
    assert (known.record.head.block, known.texts.window.seed.block) == (720, 360)
    with pytest.raises(Unavailable, match="everybody else, to be compared with"):
        look(newest, "c00", again, print)
    challenger = look(newest, "c00", Who("dan", "another"), print)  # ann was measured: she is who has to be beaten
    assert challenger is not None
    crowned = look(newest, "c00", Who("ann", "content of ann"), print)
    assert crowned is not None
    assert crowned.crowned


def test_who_gives_the_crown_up_has_to_beat_the_holder_before(tmp_path):
    """Not cid, who is weaker and was measured to the end."""
    three = {"ann": (0.0, 0.01), "bob": (0.2, 0.01), "cid": (0.3, 0.01)}
    _, newest = windows_of(three, three, stopped=1, folder=tmp_path, past=("bob",))
    again = Who("ann", "a new one")
    with pytest.raises(Unavailable, match="bob, to be compared with"):
        look(newest, "c00", again, print)
    known = look(tmp_path, "c00", again, print)
    assert known is not None
    assert known.texts.window.seed.block == 360
    measured = losses(200, 360, **three)["ann"]
    contest = _contest("c00", known, tuple(Loss("", x, 1) for x in measured), Entry("a new one", 730), "ann")
    assert _to_beat(contest, score_contest(contest), "ann") == "bob"


def test_only_who_is_alone_wins_without_a_rival(tmp_path):
    (path,) = windows_of({"ann": (0.0, 0.01)}, stopped=1, folder=tmp_path)
    found = [look(path, "c00", Who(hotkey, "a new one"), print) for hotkey in ("ann", "dan")]
    assert [known is not None and known.alone for known in found] == [True, False]


def test_a_strangers_memory_is_refused_in_one_line(tmp_path):
    two = {"ann": (0.0, 0.01), "bob": (0.01, 0.01)}
    (path,) = windows_of(two, stopped=1, folder=tmp_path)
    record = record_files.read(path)
    kept = record.competitions["c00"]
    for memory in strange_memories(kept.memory_after):
        changed = replace(record, competitions={"c00": replace(kept, memory_after=memory)})
        strange = record_files.write(tmp_path / "strange", changed)
        with pytest.raises(Rejected, match="c00: memory after") as refused:
            look(strange, "c00", Who("dan", "another"), print)
        assert refused.value.reason is Reason.RECORD


def test_a_half_copied_record_is_passed_over_and_told(tmp_path):
    two = {"ann": (0.0, 0.01), "bob": (0.01, 0.01)}
    (path,) = windows_of(two, stopped=1, folder=tmp_path)
    half = tmp_path / f"720-{'0' * 16}.json"
    half.write_bytes(path.read_bytes()[:1000])
    told: list[Sn29Error] = []
    known = look(tmp_path, "c00", Who("dan", "another"), told.append)
    assert known is not None
    assert known.record.head.block == 360
    assert [half.name in str(error) for error in told] == [True]
    with pytest.raises(Rejected):
        look(half, "c00", Who("dan", "another"), told.append)


def test_texts_that_are_not_the_recorded_ones_are_refused_with_both(recorded, ask, model, subnet):  # noqa: F811
    records = recorded(good=model(seed=3))
    record = record_in(records)
    kept = record.competitions["c00"]
    samples = (replace(kept.samples[0], id="0" * 32), *kept.samples[1:])
    forged = record_files.write(subnet.folder / "forged", replace(record, competitions={"c00": replace(kept, samples=samples)}))
    with pytest.raises(Rejected) as refused:
        ask(model(seed=5), forged)
    assert refused.value.reason is Reason.DATASET
    assert kept.samples[0].id in refused.value.got
    assert "0" * 32 in refused.value.limit
    with (subnet.folder / "competitions" / "text" / "b.parquet").open("wb") as other:
        other.write((subnet.folder / "competitions" / "text" / "a.parquet").read_bytes())
    with pytest.raises(Rejected, match=r"revision .* of 0 text"):
        ask(model(seed=5), records)


def test_whether_the_texts_are_fresh_is_read_beside_the_checkpoint_or_warned_of(recorded, ask, model, subnet):  # noqa: F811
    records = recorded(good=model(seed=3))
    ids = [s.id for s in record_in(records).competitions["c00"].samples]
    folder = model(seed=5)
    assert "not fresh for certain" in ask(folder, records).warnings[0]
    assert ask(folder, records, excluded=ids).warnings == ()
    (folder.parent / "training.json").write_text(json.dumps({"excluded": ids}))
    assert ask(folder, records).warnings == ()
    (folder.parent / "training.json").write_text(json.dumps({"excluded": ids[1:]}))
    assert len(ask(folder, records).warnings) == 1
    for other in ("[]", "{", '{"excluded": "abc"}', '{"excluded": {"a": 1}}', '{"excluded": [1]}'):
        (folder.parent / "training.json").write_text(other)
        with pytest.raises(Rejected, match="list of ids"):
            excluded_by(folder)


def test_a_window_in_which_the_holder_was_measured_is_looked_for(recorded, subnet, model):  # noqa: F811
    """In the newest round the Hub did not answer for the holder: the round before has its losses."""
    records = recorded(CHAMPION, good=model(seed=3), bad=model(seed=4, initializer_range=WORSE))
    record = record_in(records)
    kept = record.competitions["c00"]
    head = replace(record.head, block=2 * WINDOW)
    models = tuple(
        replace(m, outcome=replace(m.outcome, status="unavailable"), losses=(), unscored=())
        if m.hotkey == subnet.hotkey("good")
        else m
        for m in kept.models
    )
    newer = replace(kept, window=replace(kept.window, index=2, seed=head), models=models)
    record_files.write(records, replace(record, head=head, competitions={"c00": newer}))
    new = Who("dan", "another")
    known = look(records, "c00", new, print)
    assert known is not None
    assert known.record.head.block == 2 * WINDOW
    assert known.texts.window.seed.block == WINDOW
    alone = record_files.write(subnet.folder / "alone", replace(record, head=head, competitions={"c00": newer}))
    with pytest.raises(Unavailable, match=f"{subnet.hotkey('good')}, to be compared with"):
        look(alone, "c00", new, print)
    assert look(records, "c07", new, print) is None
