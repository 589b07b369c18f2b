"""The miner's loop on a real chain, a real Hub and real records: what it publishes, when, and kill -9 at every step."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mining_steps
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mining_steps import Training, tools_of
from recorded import losses, refused, round_record
from submitting import NETUID, WatchedChain, WatchedHub
from test_round import RULES, WINDOW, Subnet
from test_submission import Paid, nothing, world

from sn29 import record_files
from sn29.chain import Chain
from sn29.corpus import LocalFolder, draw
from sn29.errors import Reason, Rejected, Unavailable
from sn29.mining import (
    REQUEST,
    STATE,
    Chance,
    Phase,
    Plan,
    State,
    ask_to_publish,
    crown_at_stake,
    holder_of,
    mine,
    note,
    opened,
    read_state,
    run_folder,
)
from sn29.models import checkpoint
from sn29.records import Commitment, ModelId
from sn29.round_record import RoundRecord
from sn29.rules.competition import parse_competition

BEGUN = 4000
"""Blocks that the chain has when a miner starts: more than any record here is of."""
CHAMPION_RULES = RULES[: RULES.index("scoring:")] + "scoring: {rule: champion}\npool: {keep: 4, pending: 4}\n"


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Subnet]:
    with world(tmp_path) as subnet:
        (tmp_path / "text").mkdir()
        texts = [f"the text number {i} about the {word}" for i in range(10) for word in ("sea", "hills", "theatre")]
        pq.write_table(pa.table({"text": texts}), tmp_path / "text" / "a.parquet", row_group_size=5)
        subnet.wallet("ann")
        subnet.ledger.advance(BEGUN)
        yield subnet


@dataclass
class Miner:
    """ann's loop: ready checkpoints, the chances that forecasts give them, and what happens at its steps."""

    subnet: Subnet
    checkpoints: list[Path]
    chances: list[Chance] = field(default_factory=list)
    turn: Callable[[str], None] = nothing
    rules: str = RULES
    substrate: Any = None
    training: Training | None = None
    unusable: list[str] = field(default_factory=list)
    forecasts: int = 0

    @property
    def work(self) -> Path:
        return self.subnet.folder / "work"

    @property
    def records(self) -> Path:
        return self.subnet.folder / "records"

    @property
    def state(self) -> State:
        return read_state(self.work / STATE)

    def plan(self, **changes: Any) -> Plan:
        common = {"publish_at": 0.8, "forecast_every": 0, "steps": 10, "runs": 1, "poll_s": 0.01}
        return Plan(self.work, **{**common, **changes})

    def run(self, **changes: Any) -> State:
        self.training = Training(self.checkpoints, self.turn, self.subnet.folder / "trained.txt")
        self.training.unusable = self.unusable
        hub = WatchedHub(self.subnet.hub.endpoint, self.subnet.hub.add_user("ann"), self.turn)
        tools = tools_of(
            self.subnet.folder / "chain.db", self.subnet.wallet("ann"), hub, self.rules, self.subnet.folder / "text",
            "ann/model", self.training, self._forecast, self.turn, self.substrate,
        )  # fmt: skip
        return asyncio.run(mine(tools, self.plan(**changes)))

    def _forecast(self, _: Path) -> Chance:
        self.forecasts += 1
        return self.chances[self.forecasts - 1]


def recorded(
    miner: Miner,
    block: int,
    ann: float | None,
    before: RoundRecord | None = None,
    *,
    rule: str = "oldest_holder",
    bob: float = 0.0,
) -> RoundRecord:
    """A validator's record: what ann has published, if that was evaluated (its losses exp(ann) times bob's), and bob's model."""
    models = {"bob": (bob, 0.01)} | ({"ann": (ann, 0.01)} if ann is not None else {})
    committed = {"bob": 5, "ann": 6}
    found = round_record(
        block,
        losses(200, block, **models),
        committed,
        rule=rule,
        before=before,
        others=[refused("ann", 6)] if ann is None else [],
    )
    return named(found, miner)


def named(record: RoundRecord, miner: Miner) -> RoundRecord:
    """ann by her real hotkey and what she has on chain."""
    hotkey, kept = miner.subnet.hotkey("ann"), record.competitions["c00"]
    data = standing(miner.subnet, "ann")
    model = str(Commitment.parse(hotkey, 0, data).model) if data else f"ann/model@{'a' * 40}"

    def renamed(name: str) -> str:
        return hotkey if name == "ann" else name

    models = tuple(
        replace(m, outcome=replace(m.outcome, hotkey=hotkey, model=model)) if m.hotkey == "ann" else m for m in kept.models
    )
    after = json.loads(json.dumps(kept.memory_after).replace('"ann"', f'"{hotkey}"'))
    before = json.loads(json.dumps(kept.memory_before).replace('"ann"', f'"{hotkey}"'))
    scores = tuple(replace(s, hotkey=renamed(s.hotkey)) for s in kept.scores)
    kept = replace(kept, models=models, scores=scores, memory_after=after, memory_before=before)
    return replace(record, competitions={"c00": kept})


def standing(subnet: Subnet, name: str) -> bytes | None:
    """What the hotkey has on chain, also while a loop runs."""
    hotkey = subnet.hotkey(name)
    found = subnet.ledger.read(subnet.ledger.head(), lambda s: s.get("Commitments.CommitmentOf", NETUID, hotkey))
    if found is None:
        return None
    ((_, text),) = found["info"]["fields"][0].items()
    return bytes.fromhex(text.removeprefix("0x"))


def tell(miner: Miner, record: RoundRecord) -> None:
    record_files.write(miner.records, record)


def content(folder: Path) -> str:
    files = checkpoint.local_listing(folder).files
    return checkpoint.content_id(tuple(f for f in files if checkpoint.is_allowed(f.path)))


# --- when it publishes ------------------------------------------------------------------------------------------------


def test_the_first_checkpoint_that_is_likely_enough_to_win_is_published(quick, model, events):
    folders = [model(seed=seed) for seed in range(4)]
    miner = Miner(quick, folders, [Chance(p, f"chance {p}") for p in (0.1, 0.79, 0.8)])
    state = miner.run(steps=10, forecast_every=4)
    assert [(s.run, s.until) for s in miner.training.slices] == [(1, 4), (1, 8), (1, 10)]
    assert state.published
    assert state.phase is Phase.OVER
    assert state.content_id == content(folders[2]), "the third checkpoint"
    commitment = Commitment.parse(state.hotkey, state.block, standing(quick, "ann"))
    assert str(commitment.model) == state.published
    assert [e for e, _ in events if e in ("forecast", "submitted")] == ["forecast"] * 3 + ["submitted"]
    uploaded = (miner.work / "candidates" / state.content_id[:16]).iterdir()
    assert sorted(p.name for p in uploaded) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


def test_nothing_is_published_that_never_gets_there(quick, model):
    miner = Miner(quick, [model(seed=0)], [Chance(0.7, "")])
    state = miner.run()
    assert state == replace(State(state.hotkey, "c00", "ann/model"), phase=Phase.OVER, steps=10, planned=10)
    assert standing(quick, "ann") is None


def test_at_probability_0_the_end_of_the_run_is_published_unmeasured(quick, model):
    miner = Miner(quick, [model(seed=0)])
    assert miner.run(publish_at=0.0, forecast_every=3).published
    assert [s.until for s in miner.training.slices] == [10]
    again = miner.run(publish_at=0.0)
    assert again == miner.state
    assert quick.ledger.next_nonce(quick.hotkey("ann")) == 1, "the same command again does nothing more"


def test_each_run_goes_on_from_the_one_before_and_the_same_model_is_not_published_twice(quick, model, events):
    folders = [model(seed=0), model(seed=0), model(seed=1)]

    miner = Miner(quick, folders, [Chance(1.0, "")] * 3)
    judge = Judge(miner)
    miner.turn = judge.turn
    state = miner.run(runs=3, records=miner.records)
    assert [(s.run, s.start) for s in miner.training.slices] == [
        (1, ""), (2, str(run_folder(miner.work, 1) / "checkpoint")), (3, str(run_folder(miner.work, 2) / "checkpoint")),
    ]  # fmt: skip
    assert quick.ledger.next_nonce(quick.hotkey("ann")) == 2
    assert state.content_id == content(folders[2])
    assert not run_folder(miner.work, 1).exists(), "nothing begins from it any more"
    assert [p.name for p in run_folder(miner.work, 2).iterdir()] == ["checkpoint"], "the third has a state of its own"
    assert [text for event, text in events if event == "held"] == ["not published: it is what stands already"]


class Judge:
    """A validator that says at once what it thinks of a commitment, in windows that are its own."""

    def __init__(self, miner: Miner, ann: float | None = 0.05, rule: str = "oldest_holder") -> None:
        self.miner, self.ann, self.rule, self.block = miner, ann, rule, WINDOW_OF_RECORDS
        self.last: RoundRecord | None = None

    def turn(self, step: str) -> None:
        if step == "published":
            self.judge(self.ann)

    def judge(self, ann: float | None) -> RoundRecord:
        self.block += WINDOW_OF_RECORDS
        self.last = recorded(self.miner, self.block, ann, None, rule=self.rule)
        tell(self.miner, self.last)
        return self.last


WINDOW_OF_RECORDS = 360


# --- what holds it back -----------------------------------------------------------------------------------------------


def test_what_no_record_has_judged_yet_is_not_replaced(quick, model, events):
    miner = Miner(quick, [model(seed=seed) for seed in range(3)], [Chance(1.0, "")] * 3)
    judge = Judge(miner)

    def turn(step: str) -> None:
        if step == "train" and len(miner.training.slices) == 2:  # a record comes while the third slice is trained
            judge.judge(0.05)
        if step == "look" and len(miner.training.slices) == 3:  # windows pass
            quick.ledger.advance(WINDOW // 2)

    miner.turn = turn
    miner.records.mkdir()
    state = miner.run(runs=1, steps=9, forecast_every=3, records=miner.records, follow=0)
    first, second = (text for event, text in events if event == "submitted")
    assert first != second
    (held,) = (text for event, text in events if event == "held")
    assert "no record has judged the commitment of block" in held
    assert miner.forecasts == 2, "what cannot be published is not measured"
    assert [e for e, _ in events if e in ("judged", "unknown")] == ["judged", "unknown"], "the second was never named"
    assert state.judged == "unknown"


@pytest.mark.parametrize("give_up", [False, True])
def test_a_crown_is_not_given_up_unless_told_to(quick, model, events, give_up):
    miner = Miner(quick, [model(seed=seed) for seed in range(2)], [Chance(1.0, "")] * 2, rules=CHAMPION_RULES)
    judge = Judge(miner, ann=-0.3, rule="champion")
    judge.block = 0
    record: list[RoundRecord] = []

    def turn(step: str) -> None:
        if step == "published" and not record:
            first = recorded(miner, 360, -0.3, rule="champion")
            record.append(recorded(miner, 720, -0.3, first, rule="champion"))
            tell(miner, first)
            tell(miner, record[0])
        elif step == "look" and record:
            quick.ledger.advance(WINDOW // 2)

    miner.turn = turn
    state = miner.run(runs=2, records=miner.records, give_up_crown=give_up, follow=0)
    first = holder_of(record[0].competitions["c00"])
    assert first is not None
    assert first.hotkey == state.hotkey
    assert sum(e == "submitted" for e, _ in events) == (2 if give_up else 1)
    assert any("holds the crown" in text for event, text in events if event == "held") is not give_up


def test_a_crown_that_is_won_while_a_checkpoint_is_measured_is_not_given_up(quick, model, events):
    miner = Miner(quick, [model(seed=seed) for seed in range(2)], [Chance(1.0, "")] * 2, rules=CHAMPION_RULES)

    def turn(step: str) -> None:
        if step == "published":
            tell(miner, recorded(miner, 360, None, rule="champion"))  # judged: refused there
        elif step == "measured" and miner.forecasts == 2:
            first = recorded(miner, 720, -0.3, rule="champion")
            tell(miner, first)
            tell(miner, recorded(miner, 1080, -0.3, first, rule="champion"))

    miner.turn = turn
    state = miner.run(runs=2, records=miner.records)
    assert (state.holder, state.seen) == (state.hotkey, 1080)
    assert state.content_id == content(miner.checkpoints[0])
    assert quick.ledger.next_nonce(quick.hotkey("ann")) == 1
    assert [text.partition(":")[2] for event, text in events if event == "held"] == [
        " this hotkey holds the crown: another model would give it up; publish under a second hotkey, or --give-up-crown"
    ]


def waiting(block: int, reason: str) -> RoundRecord:
    no = refused("ann", 6)
    queue = replace(no, outcome=replace(no.outcome, status="waiting", reason=reason, detail=reason))
    return round_record(block, losses(200, block, bob=(0.0, 0.01)), {"bob": 5}, others=[queue])


def test_what_waits_for_its_turn_is_not_judged_and_what_rests_is(quick, model, events):
    miner = Miner(quick, [model(seed=seed) for seed in range(2)], [Chance(1.0, "")] * 2)
    blocks = iter(range(360, 4000, 360))

    def turn(step: str) -> None:
        reason = ""
        if step == "published":
            reason = "waiting" if len(miner.training.slices) == 1 else "near_copy"
        elif step == "trained" and len(miner.training.slices) == 2:
            reason = "waiting"
        elif step == "look" and [event for event, _ in events][-1:] == ["held"]:
            reason = "near_copy"
        if reason:
            tell(miner, named(waiting(next(blocks), reason), miner))

    miner.turn = turn
    state = miner.run(runs=2, records=miner.records)
    assert [e for e, _ in events if e in ("submitted", "queued", "held", "judged")] == [
        "submitted", "queued", "held", "judged", "submitted", "judged",
    ]  # fmt: skip
    assert state.content_id == content(miner.checkpoints[1])


def test_without_records_a_hotkey_that_is_paid_holds_back(quick, model, events):
    """And says so with another exit status, when that was all that it was started for."""
    paid = Paid(quick.folder / "chain.db")
    miner = Miner(quick, [model(seed=0)], rules=CHAMPION_RULES, substrate=paid)
    with pytest.raises(Rejected, match="this hotkey is paid") as refused_:
        miner.run(publish_at=0.0)
    assert refused_.value.reason is Reason.SETTING
    assert standing(quick, "ann") is None
    assert miner.run(publish_at=0.0, give_up_crown=True).published
    assert miner.run(publish_at=0.0).judged == "paid"


def test_what_is_on_its_way_to_the_crown_is_left_alone(quick, model, events):
    miner = Miner(quick, [model(seed=seed) for seed in range(3)], [Chance(1.0, "")] * 3, rules=CHAMPION_RULES)
    story: list[RoundRecord] = []

    def turn(step: str) -> None:
        if step == "published" and not story:  # better than bob, and not yet shown to be
            story.append(recorded(miner, 360, None, rule="champion"))
            story.append(recorded(miner, 720, -0.004, story[0], rule="champion"))
            tell(miner, story[1])

        if step == "look" and any(event == "held" for event, _ in events):  # and no record comes any more
            wins_at.append(max(wins_at[-1], miner.state.wins_at))
            quick.ledger.advance(WINDOW)

    wins_at = [0]
    miner.turn = turn
    state = miner.run(runs=2, records=miner.records, follow=5)
    first = holder_of(story[1].competitions["c00"])
    assert first is not None
    assert first.hotkey == "bob"
    assert 720 < wins_at[-1] <= 720 + 20 * 360
    assert [text for event, text in events if event == "held"] == [
        f"not published: what stands is on its way to the crown: by the evidence so far it wins at block {wins_at[-1]}"
    ]
    assert state.content_id == content(miner.checkpoints[1]), "the last model of all waits until that is over"


@pytest.mark.parametrize("asked", [False, True])
def test_where_no_record_says_who_is_there_it_waits_for_one_or_until_it_is_told_to(quick, model, events, asked):
    miner = Miner(quick, [model(seed=0)], [Chance(None, "nothing is known"), Chance(1.0, "alone")])
    miner.records.mkdir()

    def turn(step: str) -> None:
        if step == "measured" and miner.forecasts == 1:
            asyncio.get_running_loop().call_later(0.1, comes)
        if step == "published":
            quick.ledger.advance(3 * WINDOW)

    def comes() -> None:
        assert standing(quick, "ann") is None
        if asked:
            ask_to_publish(miner.work)
        else:
            Judge(miner).judge(None)

    miner.turn = turn
    assert miner.run(records=miner.records, follow=0, publish_at=0.5).published
    (waiting,) = (text for event, text in events if event == "waiting")
    assert waiting.startswith("nothing is known; a record of a validator is waited for")
    forecasts = [text for event, text in events if event == "forecast"]
    assert (miner.forecasts, forecasts) == ((1, []) if asked else (2, ["alone; published from 0.5 on"]))


def test_what_is_published_beside_a_loop_is_known_to_it(quick, model):
    miner = Miner(quick, [model(seed=0)])
    before = miner.run(publish_at=0.0)
    other = model(seed=1)
    beside = Commitment(before.hotkey, 5000, ModelId("ann", "model", "b" * 40), "digest", "c00")
    note(miner.work, beside, other)
    after = miner.state
    assert (after.published, after.block, after.content_id, after.judged) == (str(beside.model), 5000, content(other), "")
    note(miner.work, replace(beside, hotkey="somebody else's"), other)
    assert miner.state == after


@pytest.mark.parametrize(("rules", "holder", "said"), [
    (CHAMPION_RULES, None, "this hotkey is paid"),
    (CHAMPION_RULES, "bob", ""),
    (CHAMPION_RULES, "ann", "this hotkey holds the crown"),
    (RULES, "ann", ""),
])  # fmt: skip
def test_a_crown_is_at_stake_by_the_records_or_without_them_by_the_incentive(quick, rules, holder, said):
    chain = WatchedChain(quick.folder / "chain.db", quick.wallet("ann"), nothing, Paid(quick.folder / "chain.db"))
    holder = quick.hotkey("ann") if holder == "ann" else holder
    found = asyncio.run(crown_at_stake(chain, parse_competition("c00", rules), holder))
    assert found.startswith(said)
    assert bool(found) is bool(said)


def test_a_folder_that_cannot_be_looked_at_is_unavailable():
    with pytest.raises(Unavailable, match="long"):
        record_files.newest(Path("x" * 300))


# --- told to ----------------------------------------------------------------------------------------------------------


def test_a_request_is_answered_once_whatever_the_probability(quick, model, events):
    miner = Miner(quick, [model(seed=seed) for seed in range(3)], [Chance(0.0, "")] * 3)

    def turn(step: str) -> None:
        if step == "train" and len(miner.training.slices) == 1:
            ask_to_publish(miner.work)

    miner.turn = turn
    state = miner.run(steps=9, forecast_every=3, follow=-2)
    assert state.content_id == content(miner.checkpoints[1])
    assert [e for e, _ in events if e in ("asked", "submitted")] == ["asked", "submitted"]
    assert not (miner.work / REQUEST).exists()
    with pytest.raises(Rejected, match="whose runs are over"):
        ask_to_publish(miner.work)


def test_a_request_that_nothing_can_answer_any_more_is_dropped(quick, model, events):
    miner = Miner(quick, [model(seed=0)])
    miner.turn = lambda step: (ask_to_publish(miner.work), None)[1] if step == "publish" else None
    miner.run(publish_at=0.0)
    assert not (miner.work / REQUEST).exists()
    assert [text for event, text in events if event == "asked"] == [
        "somebody asked for a publication: nothing is, the runs are over"
    ]


def test_a_request_is_for_a_miner_that_is_there(tmp_path):
    with pytest.raises(Rejected, match=r"miner\.json"):
        ask_to_publish(tmp_path)
    assert not (tmp_path / REQUEST).exists()


# --- the crown of another ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", "champion"])
def test_a_run_that_is_behind_a_new_holder_ends_if_the_plan_says_so_and_the_next_begins_from_the_holder(quick, model, start):
    """Ahead of the holder after the first slice, behind it from then on; a run that began from the holder goes to its end."""
    chances = [Chance(0.1, "", behind=behind) for behind in (False, True, True, True, True, True)]
    miner = Miner(quick, [model(seed=seed) for seed in range(6)], chances)
    miner.records.mkdir()  # begun when nobody held anything

    def turn(step: str) -> None:
        if step == "train" and not miner.training.slices:
            tell(miner, recorded(miner, 360, None))

    miner.turn = turn
    miner.run(runs=2, steps=9, forecast_every=3, start=start, records=miner.records)
    own, bob = str(run_folder(miner.work, 1) / "checkpoint"), f"bob/model@{'a' * 40}"
    first = [(1, 3, ""), (1, 6, ""), (1, 9, "")]
    second = [(2, 3, own), (2, 6, own), (2, 9, own)]
    if start:
        first, second = first[:2], [(run, until, bob) for run, until, _ in second]
    assert [(s.run, s.until, s.start) for s in miner.training.slices] == first + second


def test_a_first_run_begins_from_the_holder_or_from_nothing(quick, model):
    miner = Miner(quick, [])
    nobody = opened(miner.plan(start="champion", records=miner.records), "ann", "c00", "ann/model")
    assert nobody.start == ""
    (miner.work / STATE).unlink()
    tell(miner, recorded(miner, 360, None))
    assert opened(miner.plan(start="champion", records=miner.records), "ann", "c00", "ann/model").start == f"bob/model@{'a' * 40}"


@pytest.mark.parametrize("run", [1, 2])
def test_a_holders_model_that_cannot_be_trained_on_does_not_end_the_loop(quick, model, events, run):
    """Deleted, gated, of another shape: once is enough, also for the next start."""
    bob = f"bob/model@{'a' * 40}"
    miner = Miner(quick, [model(seed=seed) for seed in range(3)], [Chance(0.1, "", behind=True)] * 3, unusable=[bob])
    miner.records.mkdir()

    def turn(step: str) -> None:
        if step == "train" and len(miner.training.slices) == 1:
            tell(miner, recorded(miner, 360, None))

    if run == 1:
        tell(miner, recorded(miner, 360, None))
    else:
        miner.turn = turn
    miner.run(runs=2, start="champion", records=miner.records)
    own = str(run_folder(miner.work, 1) / "checkpoint")
    starts = [(1, bob), (1, ""), (2, own)] if run == 1 else [(1, ""), (2, own)]
    assert [(s.run, s.start) for s in miner.training.slices] == starts
    assert miner.state.refused == (bob if run == 1 else "")
    miner.run(runs=3, start="champion", records=miner.records)
    assert [(s.run, s.start.partition("/training")[2]) for s in miner.training.slices] == [(3, "-2/checkpoint")]


def test_a_start_that_was_named_and_cannot_be_trained_on_is_refused_and_can_be_mended(quick, model):
    miner = Miner(quick, [model(seed=0)], [Chance(0.1, "")], unusable=["bob/modle@main"])
    with pytest.raises(Rejected, match="bob/modle@main"):
        miner.run(start="bob/modle@main")
    miner.run(start="bob/model@main")
    assert [s.start for s in miner.training.slices] == ["bob/model@main"]


def test_other_steps_than_the_run_was_begun_with_are_refused_with_both_numbers(quick, model):
    miner = Miner(quick, [model(seed=seed) for seed in range(3)], [Chance(0.1, "")] * 3)
    miner.turn = lambda step: quit_() if step == "forecast" else None

    def quit_() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        miner.run(steps=10, forecast_every=5)
    with pytest.raises(Rejected, match=r"got 12, rule 10, which run 1 in "):
        miner.run(steps=12)
    miner.turn = nothing
    assert miner.run(steps=10).phase is Phase.OVER
    assert miner.run(steps=12, runs=2).steps == 12, "the next run may have others"


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_samples_of_the_open_window_and_of_the_newest_record_are_kept_out_of_the_text(quick, model):
    miner = Miner(quick, [model(seed=0)], [Chance(0.0, "")])
    record = recorded(miner, 360, None)
    tell(miner, record)
    before = final_block(quick)
    miner.run(records=miner.records)
    (slice_,) = miner.training.slices
    opened = range(before // WINDOW, final_block(quick) // WINDOW + 1)  # one, or two where the machine is slow
    recorded_ids = {s.id for s in record.competitions["c00"].samples}
    assert slice_.exclude in [drawn_ids(quick, window) | recorded_ids for window in opened]


def drawn_ids(subnet: Subnet, window: int) -> set[str]:
    seed = ask(subnet, lambda chain: chain.block_hash(window * WINDOW))
    data = LocalFolder(subnet.folder / "text")
    return {s.id for s in draw(data, "*.parquet", "text", 8, 200, block_hash=seed, competition="c00", window=window)}


def final_block(subnet: Subnet) -> int:
    return ask(subnet, lambda chain: chain.finalized()).block


def ask(subnet: Subnet, question: Callable[[Chain], Awaitable[Any]]) -> Any:
    async def answered() -> Any:
        async with subnet.chain("ann") as chain:
            return await question(chain)

    return asyncio.run(answered())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_candidate_that_is_refused_ends_the_miner_and_is_not_tried_again(quick, model):
    bad = model(seed=0, hidden_size=64, intermediate_size=256)
    miner = Miner(quick, [bad, model(seed=1)], [Chance(1.0, "")] * 2)
    with pytest.raises(Rejected) as refused_:
        miner.run()
    assert refused_.value.reason is Reason.PARAMETERS
    assert (miner.state.phase, miner.state.candidate) == (Phase.OVER, "")
    assert list((miner.work / "candidates").iterdir()) == []
    assert miner.run(publish_at=0.0).published == "", "nor by the same command again"
    assert quick.ledger.next_nonce(quick.hotkey("ann")) == 0


def test_a_loop_trains_on_after_a_candidate_that_is_refused(quick, model, events):
    bad = model(seed=0, hidden_size=64, intermediate_size=256)
    miner = Miner(quick, [bad, model(seed=1)])
    state = miner.run(publish_at=0.0, runs=2, follow=-2)
    assert [s.run for s in miner.training.slices] == [1, 2]
    assert state.content_id == content(miner.checkpoints[1])
    (said,) = (text for event, text in events if event == "refused")
    assert said.endswith("; training goes on")


@pytest.mark.parametrize("fault", ["cut short", "no folder"])
def test_a_candidate_is_whole_or_not_there(quick, model, fault):
    folder = model(seed=0)
    miner = Miner(quick, [folder])
    half = miner.work / "candidates" / content(folder)[:16]
    if fault == "cut short":
        half.mkdir(parents=True)
        (half / "config.json").write_text("{")
        assert miner.run(publish_at=0.0).published
        assert content(half) == content(folder)
    else:
        miner.work.mkdir()
        half.parent.write_text("no folder")
        with pytest.raises(Unavailable, match="candidates"):
            miner.run(publish_at=0.0)
        assert miner.state.phase is Phase.MEASURE


def test_what_does_not_answer_is_waited_for_in_a_loop_and_told_in_a_single_run(quick, model, events):
    miner = Miner(quick, [model(seed=0), model(seed=1)], [Chance(0.0, "")] * 2)
    failing = ["train", "forecast"]

    def turn(step: str) -> None:
        if failing and step == failing[0]:
            failing.pop(0)
            raise Unavailable("the Hub", "no answer")

    miner.turn = turn
    with pytest.raises(Unavailable):
        miner.run()
    assert miner.state.phase is Phase.TRAIN
    with pytest.raises(Unavailable):
        miner.run()
    assert miner.state.phase is Phase.MEASURE
    failing += ["forecast", "train"]
    assert miner.run(runs=2).phase is Phase.OVER
    assert [text for event, text in events if event == "unavailable"] == [
        "no forecast: the Hub: no answer; training goes on", "the Hub: no answer; tried again in 0.01 s"
    ]  # fmt: skip


def test_a_forecast_that_others_files_do_not_allow_ends_nothing(quick, model, events):
    miner = Miner(quick, [model(seed=seed) for seed in range(2)], [Chance(1.0, "")] * 2)

    def turn(step: str) -> None:
        if step == "forecast" and len(miner.training.slices) == 1:
            raise Rejected(Reason.DATASET, "other texts", "the recorded ones")

    miner.turn = turn
    assert miner.run(steps=4, forecast_every=2).published
    (said,) = (text for event, text in events if event == "unavailable")
    assert said.endswith("; training goes on")


def test_a_record_of_another_time_or_software_hides_no_other(quick, model, events):
    """One of a block that no chain has reached, and one whose rules nobody here can read."""
    miner = Miner(quick, [model(seed=seed) for seed in range(2)], [Chance(1.0, ""), Chance(0.0, "")])
    for block in (360, 999_999_999_960):
        tell(miner, recorded(miner, block, None))

    def turn(step: str) -> None:
        if step == "published":
            strange = recorded(miner, 720, 0.05)
            kept = replace(strange.competitions["c00"], parameters={"nobody": "knows"})
            tell(miner, replace(strange, competitions={"c00": kept}))
            tell(miner, recorded(miner, 1080, 0.05))

    miner.turn = turn
    state = miner.run(runs=2, records=miner.records)
    assert (state.seen, state.holder, state.judged) == (1080, "bob", "evaluated")
    assert any("our chances cannot be read" in text for event, text in events if event == "record")


def test_records_that_are_gone_are_not_taken_for_an_empty_pool(quick, model):
    miner = Miner(quick, [model(seed=0)], [Chance(1.0, "nobody is there")])
    tell(miner, recorded(miner, 360, None))

    def turn(step: str) -> None:
        if step == "trained":
            for path in miner.records.iterdir():
                path.unlink()

    miner.turn = turn
    with pytest.raises(Unavailable, match="the records are gone"):
        miner.run(records=miner.records)
    assert miner.forecasts == 0


def test_a_record_that_cannot_be_read_is_passed_over(quick, model, events):
    """Somebody copies them here, one by one, while they are read."""
    miner = Miner(quick, [model(seed=seed) for seed in range(2)], [Chance(0.0, "")] * 2)
    tell(miner, recorded(miner, 360, None))
    half = miner.records / f"720-{'a' * 16}.json"
    half.write_text('{"schema": 5,')
    forecasts: list[str] = []

    def turn(step: str) -> None:
        if step == "forecast":
            forecasts.append(step)
            if len(forecasts) == 1:
                record_files.read(half)

    miner.turn = turn
    state = miner.run(steps=4, forecast_every=2, records=miner.records)
    assert (state.seen, state.holder) == (360, "bob")
    said = [text for event, text in events if event == "record"]
    assert said
    assert all(text.startswith("passed over: ") and half.name in text for text in said)
    (no,) = (text for event, text in events if event == "unavailable")
    assert half.name in no
    assert no.endswith("; training goes on")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the JSON that a miner wrote"),
        ("[]", "a JSON object"),
        ('{"hotkey": "a"}', "a state with hotkey"),
        ('{"hotkey": "a", "competition": "c00", "repo": "a/b", "phase": "sleep"}', "sleep"),
        ('{"hotkey": "a", "competition": "c00", "repo": "a/b", "phase": "train", "steps": "3"}', "steps '3'"),
        ('{"hotkey": "a", "competition": "c00", "repo": "a/b", "phase": "train", "colour": 3}', "colour"),
        ('{"hotkey": "b", "competition": "c00", "repo": "a/b", "phase": "train"}', "hotkey b"),
        ('{"hotkey": "a", "competition": "c01", "repo": "a/b", "phase": "train"}', "competition c01"),
        ('{"hotkey": "a", "competition": "c00", "repo": "a/c", "phase": "train"}', "repository a/c"),
    ],
)
def test_a_state_of_another_miner_or_of_nobody_is_refused(tmp_path, text, complaint):
    (tmp_path / STATE).write_text(text)
    with pytest.raises(Rejected) as refused_:
        opened(Plan(tmp_path, 0.8, 0, 10, 1), "a", "c00", "a/b")
    assert refused_.value.reason is Reason.SETTING
    assert complaint in str(refused_.value)
    assert (tmp_path / STATE).read_text() == text


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_a_miner_killed_at_every_step_ends_where_an_undisturbed_one_does(tmp_path, quick, model):
    """Two runs, each with a publication; killed before and after each of the miner's own steps and each write of a submission."""
    folders = [model(seed=seed) for seed in range(2)]
    steps = 2 * 4 + 2 * (2 + 4) - 1  # train, trained, forecast, measured; publish, published, and four writes (then three)
    deaths = {"calm": [], **{f"after{n}": [n] for n in range(1, steps + 1)}, "often": [2, 3, 4, 4, 5, 5, 5]}
    miners = {}
    for name, after in deaths.items():
        quick.wallet(name)
        miners[name] = {"token": quick.hub.add_user(name), "work": str(tmp_path / name), "deaths": after}
    asked = {
        "chain": str(tmp_path / "chain.db"), "wallets": str(tmp_path / "wallets"), "hub": quick.hub.endpoint,
        "rules": RULES, "text": str(tmp_path / "text"), "checkpoints": [str(f) for f in folders],
        "chances": [0.8, 0.9], "miners": miners,
        "plan": {"publish_at": 0.8, "forecast_every": 0, "steps": 10, "runs": 2, "poll_s": 0.02, "follow": -2},
    }  # fmt: skip
    subprocess.run([sys.executable, mining_steps.__file__], input=json.dumps(asked), text=True, check=True, timeout=170)
    for name in deaths:
        state = read_state(tmp_path / name / STATE)
        log = (tmp_path / name / "trained.txt").read_text().replace(f"/{name}/", "/calm/")
        assert log == (tmp_path / "calm" / "trained.txt").read_text(), "every slice once, in order, from the same starts"
        assert (state.phase, state.run, state.steps, state.content_id) == (Phase.OVER, 2, 10, content(folders[1]))
        assert quick.ledger.next_nonce(quick.hotkey(name)) == 2, "two commitments, neither of them twice"
        commitment = Commitment.parse(state.hotkey, state.block, standing(quick, name))
        assert str(commitment.model) == state.published
