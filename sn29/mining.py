"""The miner's loop, as one story: what the tool does that a miner leaves running.

    look      at the records of a validator: what became of our commitment, and who holds the crown now
    train     some steps more of the training run; what is evaluated in the open window is kept out of its text
    measure   the checkpoint by the validator's own rule: the probability that a commitment made now wins
    publish   if that is as high as the plan asks for, or somebody asked for it: a copy of the checkpoint, as
              `submission.submit` does it; then look, train and measure go on
    begin     when the run's steps are over, the next run: from the newest checkpoint, or from the crown's new holder

What holds a publication back, however good the model is (`_held_back`): the hotkey has one commitment, and a new one takes
the place of what stands there. So nothing is published while our own hotkey holds the crown (it would be given up, and
had to be won again: publish under a second hotkey), nor before a record has judged what stands, nor while what stands is on
its way to the crown by the evidence so far, which a new model would have to collect anew.

All that must not be forgotten is one file, `miner.json`, written whole before and after each step, and every step can be
repeated: killed at any instant, the same command goes on where it was. A training run resumes from its own checkpoint, a
candidate is a folder of its own that training does not touch, and a submission that was cut off is ended by doing it again.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sn29 import record_files
from sn29.chain import Chain
from sn29.corpus import DataFiles
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable, shown
from sn29.explain import first_win_by_evidence
from sn29.models import checkpoint
from sn29.records import Commitment, Head, Window
from sn29.replay import contest_of
from sn29.round import window_samples
from sn29.round_record import CompetitionRecord, ModelRecord, RoundRecord
from sn29.rules.competition import Competition
from sn29.rules.scoring_fields import Champion
from sn29.submission import is_verdict, named_in, passed_over, stands, verdict
from sn29.telemetry import stage, tell, warn

STATE = "miner.json"
REQUEST = "publish-now.json"
ON_ITS_WAY = 20
"""Windows to come in which what stands must win by evidence, or it is replaced: a day of windows of 360 blocks."""
CHAMPION = "champion"
"""The start of a run that begins from whoever holds the crown then."""
PLAINLY, KNOWINGLY = "yes", "and give the crown up"
_OF_MODELS = tuple(Reason)[: tuple(Reason).index(Reason.DATASET)]
_OF_FILES = (Reason.COPY, *_OF_MODELS[_OF_MODELS.index(Reason.FORBIDDEN_FILE) :])
"""Refusals of a model, wherever it is; those of its files, which no other token, key or network would mend."""


class Phase(StrEnum):
    """What is to be done next; what stands in the state file was done."""

    TRAIN = "train"
    MEASURE = "measure"
    PUBLISH = "publish"
    OVER = "over"
    """All runs are done: only the verdict on what was published is waited for."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a miner must not forget."""

    hotkey: str
    competition: str
    repo: str
    phase: Phase = Phase.TRAIN
    run: int = 1
    """Number of the training run."""
    start: str = ""
    """What the run began from: a folder, namespace/name@REVISION, or empty for fresh weights."""
    steps: int = 0
    """Steps of the run that its checkpoint holds."""
    candidate: str = ""
    """Folder of the model that is being published."""
    content_id: str = ""
    """Of what was published last."""
    published: str = ""
    """namespace/name@revision of our newest commitment; empty: none yet."""
    block: int = -1
    """Of that commitment."""
    judged: str = ""
    """What became of it: the status in the newest record that names it, `paid` or `unknown`; empty: not known yet."""
    wins_at: int = -1
    """Block of the window in which it wins if all windows to come look like the last one; -1: in none that is near."""
    seen: int = -1
    """Block of the newest record that was read."""
    holder: str = ""
    """Hotkey with the largest weight of the competition in that record; empty: nobody, or no record."""
    champion: str = ""
    """Its model, namespace/name@revision."""
    answered: str = ""
    """The last request to publish that was answered."""
    asked: str = ""
    """Whether somebody asked for the candidate: PLAINLY or KNOWINGLY; empty: nobody did."""
    queued: int = -1
    """Block of the newest record by which our commitment still waits for its turn."""
    refused: str = ""
    """The last model of a holder that could not be trained on."""
    planned: int = 0
    """Steps that the run was begun for; 0: none was begun."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a miner runs; may be changed from start to start."""

    work_dir: Path
    publish_at: float
    """Probability of winning from which on a checkpoint is published; 0: every run's last one, unmeasured."""
    forecast_every: int
    """Steps between two forecasts; 0: at the end of a run only."""
    steps: int
    """Steps of a training run."""
    runs: int
    """Training runs; 0: without end."""
    start: str = ""
    """What the first run begins from, as `State.start`; CHAMPION: any run whose own model is behind it, from the holder."""
    records: Path | None = None
    """Folder where the records of a validator appear; None: only our incentive on chain says anything."""
    follow: int = 3
    """Windows after which a commitment that no record names is given up on."""
    give_up_crown: bool = False
    """Publish although the own hotkey holds the crown."""
    poll_s: float = 12.0


@dataclass(frozen=True, slots=True)
class Chance:
    """What a forecast says of a checkpoint."""

    probability: float | None
    """That a commitment made now wins within the windows that the forecast looks at; 0 for one that is refused, None where no
    record says who is there."""
    said: str
    """In one line."""
    behind: bool = False
    """Whether its losses are higher than the holder's: then the holder's model is the better one to train on from."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a training run."""

    folder: Path
    """The run's own: checkpoints, curve, state."""
    run: int
    start: str
    """As `State.start`; without effect when `folder` holds a checkpoint already."""
    until: int
    """Steps of the run after which it pauses, its checkpoint written."""
    exclude: frozenset[str]
    """Ids of evaluation samples that must not be trained on."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What the loop works with."""

    chain: Chain
    competition: Callable[[int], Competition]
    """The rules in force at a block."""
    dataset: Callable[[Competition, int], DataFiles]
    """Opens a competition's data set of an index."""
    repo: str
    train: Callable[[Slice], Awaitable[Path]]
    """Trains until the slice's end and returns the checkpoint's folder. Killed, it goes on when it is called again."""
    forecast: Callable[[Path], Awaitable[Chance]]
    publish: Callable[[Path], Awaitable[Commitment]]
    """Checks and submits a folder; may be repeated."""


async def mine(tools: Tools, plan: Plan) -> State:
    """Until the plan's runs are done and what was published is judged; without end if `runs` is 0.

    What does not answer (`Unavailable`) is waited for, but in a single run (`runs` 1). There, and for what is refused, it ends,
    and the same call goes on. A model that is refused ends it only when there is nothing left to train. What the last run ends
    with is published before it is over, also when that has to wait for what stands, but not where it would give a crown up.
    Raises Rejected(SETTING) for a folder of another hotkey, competition or repository, a run of other steps, and when the
    plan's runs are over with nothing published but a model that was held back; what training, checks and chain refuse.
    """
    state = opened(plan, tools.chain.hotkey, tools.competition(0).name, tools.repo)
    pause_s = plan.poll_s
    while True:
        try:
            state = _keep(plan.work_dir, await _look(tools, plan, state))
            if state.phase is Phase.OVER:
                _drop_request(plan.work_dir)
            if _is_over(plan, state):
                return state
            stage(_STAGES.get(state.phase, "waiting"), detail=f"run {state.run}, step {state.steps}")
            state = _keep(plan.work_dir, await _STEPS[state.phase](tools, plan, state))
            pause_s = plan.poll_s
        except Unavailable as error:
            if plan.runs == 1:
                raise
            warn("unavailable", f"{error}; tried again in {pause_s:g} s", hotkey=tools.chain.hotkey)
            stage("waiting", detail=f"tried again: {error}")
            await asyncio.sleep(max(pause_s, error.retry_s or 0.0))
            pause_s = min(2 * pause_s, 50 * plan.poll_s)


async def _rules(tools: Tools) -> tuple[int, Competition]:
    """The newest final block, and the competition in force at it."""
    async with tools.chain:
        block = (await tools.chain.finalized()).block
    return block, tools.competition(block)


def _is_over(plan: Plan, state: State) -> bool:
    """Nobody waits for a verdict that no record will tell."""
    return state.phase is Phase.OVER and (plan.records is None or bool(state.judged) or not state.published)


# --- look -------------------------------------------------------------------------------------------------------------


async def _look(tools: Tools, plan: Plan, state: State) -> State:
    """What validators made of our commitment, and who holds the crown."""
    block, competition = await _rules(tools)
    length = competition.samples.window_blocks
    if plan.records is not None:
        if state.seen < 0:
            newest = record_files.newest(plan.records, passed_over, last=block)
            records: Iterable[RoundRecord] = () if newest is None else (newest,)
        else:
            records = record_files.since(plan.records, state.seen, passed_over, last=block)
        for record in records:
            state = _read(record, state)
    if not state.published or state.judged:
        return state
    if plan.records is None and (incentive := await _incentive(tools.chain)) > 0:
        tell("judged", f"{state.published}: paid by the chain, incentive {incentive:.4f}", hotkey=state.hotkey)
        return replace(state, judged="paid")
    if block > (max(state.block, state.queued) // length + 1 + plan.follow) * length:
        why = "no record of a validator names it" if plan.records else "no incentive (without --records nothing else is known)"
        warn("unknown", f"{state.published}: {why} after {plan.follow} windows", hotkey=state.hotkey, block=state.block)
        return replace(state, judged="unknown")
    return state


async def _incentive(chain: Chain) -> float:
    async with chain:
        return next((n.incentive for n in (await chain.metagraph()).neurons if n.hotkey == chain.hotkey), 0.0)


def _read(record: RoundRecord, state: State) -> State:
    """The state after a newer record."""
    kept = record.competitions.get(state.competition)
    state = replace(state, seen=record.head.block)
    found = named_in((record,), state.hotkey, state.published) if state.published else None
    if found is not None and is_verdict(found):
        if found.outcome.status in ("evaluated", "rejected") or state.judged != found.outcome.status:  # a rest is told once
            tell("judged", verdict(found), hotkey=state.hotkey, status=found.outcome.status, block=found.block)
        state = replace(state, judged=found.outcome.status)
    elif found is not None:
        if state.queued < 0:
            tell("queued", verdict(found), hotkey=state.hotkey, block=found.block)
        state = replace(state, queued=found.block)
    if kept is None:
        return state
    first = holder_of(kept)
    hotkey, model = (first.hotkey, first.outcome.model) if first else ("", "")
    if (hotkey, model) != (state.holder, state.champion):
        whose = "our own" if hotkey == state.hotkey else hotkey
        sentence = f"{model} of {whose} has the largest weight" if hotkey else "nobody has any weight"
        tell("crown", sentence, hotkey=hotkey, ours=hotkey == state.hotkey, block=record.head.block)
    return replace(state, holder=hotkey, champion=model, wins_at=_wins_at(kept, state))


def holder_of(kept: CompetitionRecord) -> ModelRecord | None:
    """Who has the largest weight of a competition in a round; None when nobody has any."""
    best = min(kept.scores, key=lambda s: (-s.weight, -s.win_rate, s.hotkey), default=None)
    return kept.model(best.hotkey) if best is not None and best.weight > 0 else None


def _wins_at(kept: CompetitionRecord, state: State) -> int:
    """See `State.wins_at`: under a rule that adds up evidence, for a challenger that was measured to the end."""
    mine = kept.model(state.hotkey)
    if mine is None or not mine.evaluated or mine.stopped or mine.outcome.model != state.published:
        return -1
    try:
        contest = contest_of(state.competition, kept)
        if not isinstance(contest.competition.scoring, Champion):
            return -1
        block = first_win_by_evidence(contest, state.hotkey, ON_ITS_WAY)
    except (Sn29Error, ValueError) as error:  # somebody else's file, as in `replay.recompute`
        warn("record", f"what it says of our chances cannot be read: {error}", hotkey=state.hotkey, block=state.seen)
        return -1
    return -1 if block is None else block


# --- train ------------------------------------------------------------------------------------------------------------


async def _train(tools: Tools, plan: Plan, state: State) -> State:
    """One slice of the run."""
    slice_steps = plan.forecast_every if plan.publish_at > 0 and plan.forecast_every else plan.steps
    until = min(plan.steps, state.steps + slice_steps)
    block, competition = await _rules(tools)
    exclude = await _open_samples(tools, block, competition) | _recorded_samples(plan, state, block)
    try:
        await tools.train(Slice(run_folder(plan.work_dir, state.run), state.run, state.start, until, exclude))
    except Rejected as error:
        return _without_holder(plan, state, error)
    _tidy(plan.work_dir, state.run)
    return replace(state, phase=Phase.MEASURE, steps=until)


def _without_holder(plan: Plan, state: State, error: Rejected) -> State:
    """The run begun from our own model, where the holder's cannot be trained on: nobody may end our loop. Else raises `error`."""
    folder = run_folder(plan.work_dir, state.run)
    own = str(run_folder(plan.work_dir, state.run - 1) / "checkpoint") if state.run > 1 else ""
    is_holders = state.start not in ("", own) and (state.run > 1 or plan.start == CHAMPION)
    if not is_holders or error.reason not in _OF_MODELS or (folder / "state.pt").exists():
        raise error
    shutil.rmtree(folder, ignore_errors=True)
    what = f"{state.start} cannot be trained on: {error}; begun from {own or 'fresh weights'} instead"
    warn("start", what, hotkey=state.hotkey, run=state.run)
    return replace(state, start=own, refused=state.start)


def _tidy(work_dir: Path, run: int) -> None:
    """Deletes what the run began from, when it has weights of its own; of the run before the checkpoint is kept."""
    if not (run_folder(work_dir, run) / "state.pt").exists():
        return
    shutil.rmtree(work_dir / "starts", ignore_errors=True)
    for number in range(1, run - 1):
        shutil.rmtree(run_folder(work_dir, number), ignore_errors=True)
    for path in run_folder(work_dir, run - 1).glob("*") if run > 1 else ():
        if path.is_file():
            path.unlink(missing_ok=True)
        elif path.name != "checkpoint":
            shutil.rmtree(path, ignore_errors=True)


def run_folder(work_dir: Path, run: int) -> Path:
    """Of a training run; the first one's is `training`."""
    return work_dir / ("training" if run == 1 else f"training-{run}")


async def _open_samples(tools: Tools, block: int, competition: Competition) -> frozenset[str]:
    """Ids of the samples of the window that is open at the block: what a validator measures models on while we train."""
    index = block // competition.samples.window_blocks
    first = index * competition.samples.window_blocks
    async with tools.chain:
        window = Window(competition.name, index, Head(first, await tools.chain.block_hash(first)))
    samples, _ = await asyncio.to_thread(window_samples, tools.dataset, competition, window)
    return frozenset(sample.id for sample in samples)


def _recorded_samples(plan: Plan, state: State, block: int) -> frozenset[str]:
    """Ids of the newest record's samples: a forecast measures on them."""
    record = record_files.newest(plan.records, passed_over, last=block) if plan.records else None
    kept = record.competitions.get(state.competition) if record else None
    return frozenset(sample.id for sample in kept.samples) if kept else frozenset()


# --- measure ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """Why nothing is published now."""

    why: str
    passes: bool
    """By itself, by a record or by time."""


async def _measure(tools: Tools, plan: Plan, state: State) -> State:
    """Whether the checkpoint is published, and else what comes next."""
    folder = run_folder(plan.work_dir, state.run) / "checkpoint"
    asked = _asked(plan.work_dir)
    if asked is not None and asked.token == state.answered:  # it was killed before it could take it away
        _drop_request(plan.work_dir, asked)
        asked = None
    held = await _held_back(tools, plan, state, asked.how if asked else "")
    if asked is not None:
        return _answer(plan, state, folder, asked, held)
    if held is not None:
        return await _hold(tools, plan, state, folder, held)
    if plan.publish_at <= 0:
        return _candidate(plan, state, folder) if state.steps >= plan.steps else replace(state, phase=Phase.TRAIN)
    try:
        await _look_at_records(tools, plan, state)
        chance = await tools.forecast(folder)
    except Sn29Error as error:  # of records and texts, which are others': a checkpoint that is refused has a chance of 0
        if plan.runs == 1 and state.steps >= plan.steps:
            raise
        warn("unavailable", f"no forecast: {error}; training goes on", hotkey=state.hotkey, run=state.run, step=state.steps)
        return _next(plan, state, behind=False)
    if chance.probability is None:
        return await _first_record(tools, plan, state, chance)
    tell(
        "forecast", f"{chance.said}; published from {plan.publish_at:g} on", hotkey=state.hotkey, run=state.run,
        step=state.steps, probability=round(chance.probability, 4),
    )  # fmt: skip
    if chance.probability >= plan.publish_at:
        return _candidate(plan, state, folder)
    return _next(plan, state, behind=chance.behind)


async def _look_at_records(tools: Tools, plan: Plan, state: State) -> None:
    """Raises Unavailable where there were records before: nobody else would be there by an empty folder."""
    if plan.records is None or state.seen < 0:
        return
    if not record_files.has_any(plan.records):
        raise Unavailable(str(plan.records), f"the records are gone; the newest one was of block {state.seen:,}")
    block, competition = await _rules(tools)
    if block > state.seen + (1 + plan.follow) * competition.samples.window_blocks:
        why = f"the newest record is of block {state.seen:,}: who is there, and who holds the crown, may be others now"
        warn("records", why, hotkey=state.hotkey, block=block)


async def _first_record(tools: Tools, plan: Plan, state: State, chance: Chance) -> State:
    """More of the run, or at its end a wait for a record that was not there yet, or for somebody who asks for a publication."""
    told = f"{chance.said}; a record of a validator is waited for (--publish-at 0 publishes without one)"
    tell("waiting", told, hotkey=state.hotkey, run=state.run, step=state.steps)
    if state.steps < plan.steps:
        return _next(plan, state, behind=False)

    async def waits(later: State) -> bool:
        return later.seen == state.seen

    return await _wait(tools, plan, state, waits)


async def _hold(tools: Tools, plan: Plan, state: State, folder: Path, held: _Held) -> State:
    """What comes next when a checkpoint is held back: the last one of all waits, if that helps."""
    tell("held", f"not published: {held.why}", hotkey=state.hotkey, run=state.run, step=state.steps)
    if not _is_last(plan, state):
        return _next(plan, state, behind=False)
    if not held.passes and not state.published:
        raise Rejected(Reason.SETTING, held.why, "a hotkey that has nothing to lose, or --give-up-crown", "--wallet.hotkey")
    if not held.passes or _content_of(folder) == state.content_id:
        return _next(plan, state, behind=False)

    async def waits(later: State) -> bool:
        return await _held_back(tools, plan, later, "") == held

    return await _wait(tools, plan, state, waits)


async def _wait(tools: Tools, plan: Plan, state: State, waits: Callable[[State], Awaitable[bool]]) -> State:
    """Looks again and again, for as long as that is so and nobody asks for a publication."""
    while not _asked(plan.work_dir) and await waits(state):
        await asyncio.sleep(plan.poll_s)
        state = _keep(plan.work_dir, await _look(tools, plan, state))
    return state


def _is_last(plan: Plan, state: State) -> bool:
    """Nothing more is trained."""
    return 0 < plan.runs <= state.run and state.steps >= plan.steps


async def _held_back(tools: Tools, plan: Plan, state: State, asked: str) -> _Held | None:
    """Why nothing is published now; None: nothing speaks against it. `asked` as `State.asked`."""
    block, competition = await _rules(tools)
    if not plan.give_up_crown and asked != KNOWINGLY:
        why = await crown_at_stake(tools.chain, competition, state.holder if plan.records else None)
        if why:
            return _Held(why, passes=False)
    if asked:
        return None
    if state.published and not state.judged:
        why = f"no record has judged the commitment of block {state.block} yet, and a new one would take its place"
        return _Held(why, passes=True)
    if state.wins_at >= 0 and block <= state.wins_at + plan.follow * competition.samples.window_blocks:
        why = f"what stands is on its way to the crown: by the evidence so far it wins at block {state.wins_at}"
        return _Held(why, passes=True)
    return None


async def crown_at_stake(chain: Chain, competition: Competition, holder: str | None) -> str:
    """Why a new commitment of our hotkey would cost it the crown; empty: it would not.

    `holder` is who holds it by a validator's records; None: no records, so that our incentive on chain has to tell.
    """
    if not isinstance(competition.scoring, Champion):
        return ""
    paid = holder is None and await _incentive(chain) > 0
    if not paid and holder != chain.hotkey:
        return ""
    has = "is paid" if paid else "holds the crown"
    return f"this hotkey {has}: another model would give it up; publish under a second hotkey, or --give-up-crown"


def _candidate(plan: Plan, state: State, folder: Path, asked: str = "") -> State:
    """The checkpoint in a folder of its own, which no training changes. What stands already is not published again.

    Raises Unavailable when the disk does not take it.
    """
    try:
        content = _content_of(folder)
        if content == state.content_id:
            tell("held", "not published: it is what stands already", hotkey=state.hotkey, run=state.run, step=state.steps)
            return _next(plan, state, behind=False)
        final = plan.work_dir / "candidates" / content[:16]
        if not final.exists() or _content_of(final) != content:
            _copy(folder, final)
    except OSError as error:
        raise Unavailable(str(plan.work_dir / "candidates"), error.strerror or str(error)) from None
    return replace(state, phase=Phase.PUBLISH, candidate=final.name, asked=asked)


def _copy(folder: Path, final: Path) -> None:
    """The files that may be published, whole and on the disk, or no folder of that name. Raises OSError."""
    part = final.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for path in sorted(folder.iterdir()):
            if checkpoint.is_allowed(path.name):
                shutil.copyfile(path, part / path.name)
                record_files.flush(part / path.name)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # the disk may be full of it
        raise
    record_files.flush(final.parent)


def _content_of(folder: Path) -> str:
    """Content id of a checkpoint, of its files that may be published."""
    return checkpoint.content_id(tuple(f for f in checkpoint.local_listing(folder).files if checkpoint.is_allowed(f.path)))


# --- publish ----------------------------------------------------------------------------------------------------------


async def _publish(tools: Tools, plan: Plan, state: State) -> State:
    """The candidate's submission; what stood before is not needed any more. A refused candidate is not tried again.

    What held it back is asked again: records may have told of a crown since. Not for one that stands on chain already.
    """
    candidates = plan.work_dir / "candidates"
    folder = candidates / state.candidate
    dropped = replace(state, phase=Phase.MEASURE, candidate="", asked="")
    if not folder.is_dir() or (not await stands(tools.chain, folder) and await _held_back(tools, plan, state, state.asked)):
        return dropped  # which says why
    try:
        commitment = await tools.publish(folder)
    except Rejected as error:
        if error.reason not in _OF_FILES:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        state = _keep(plan.work_dir, _next(plan, dropped, behind=False))
        if state.phase is Phase.OVER:
            raise
        warn("refused", f"not published: {error}; training goes on", hotkey=state.hotkey, run=state.run, step=state.steps)
        return state
    for other in candidates.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    tell("submitted", f"{commitment.model} stands on chain", hotkey=state.hotkey, block=commitment.block, run=state.run)
    return _next(plan, _published(dropped, commitment, _content_of(folder)), behind=False)


def _published(state: State, commitment: Commitment, content_id: str) -> State:
    return replace(
        state, published=str(commitment.model), block=commitment.block, content_id=content_id, judged="", queued=-1, wins_at=-1
    )


def note(work_dir: Path, commitment: Commitment, folder: Path) -> None:
    """Tells the miner of this folder, if there is one of the same hotkey and competition, what was published beside it."""
    if (work_dir / STATE).exists():
        state = read_state(work_dir / STATE)
        if (state.hotkey, state.competition) == (commitment.hotkey, commitment.competition):
            _keep(work_dir, _published(state, commitment, _content_of(folder)))


# --- begin ------------------------------------------------------------------------------------------------------------


def _next(plan: Plan, state: State, *, behind: bool) -> State:
    """More of the run, or the next one: from the crown's holder if the plan says so and it is ahead of us.

    A run that was begun from the same holder's model goes on to its end.
    """
    others = state.holder not in ("", state.hotkey)
    from_champion = plan.start == CHAMPION and others and behind and state.champion not in (state.start, state.refused)
    if state.steps < plan.steps and not from_champion:
        return replace(state, phase=Phase.TRAIN)
    if _is_last(plan, state):
        return replace(state, phase=Phase.OVER)
    return _begun(plan, state, state.champion if from_champion else "")


def _begun(plan: Plan, state: State, start: str = "") -> State:
    """At the next run; `start` empty: from the newest checkpoint."""
    start = start or str(run_folder(plan.work_dir, state.run) / "checkpoint")
    tell("run", f"run {state.run + 1} begins from {start}", hotkey=state.hotkey, run=state.run + 1, start=start)
    return replace(state, phase=Phase.TRAIN, run=state.run + 1, start=start, steps=0, planned=plan.steps)


async def _over(_: Tools, plan: Plan, state: State) -> State:
    """Nothing to do but to look again."""
    await asyncio.sleep(plan.poll_s)
    return state


_STEPS: dict[Phase, Callable[[Tools, Plan, State], Awaitable[State]]] = {
    Phase.TRAIN: _train,
    Phase.MEASURE: _measure,
    Phase.PUBLISH: _publish,
    Phase.OVER: _over,
}
_STAGES = {Phase.TRAIN: "training", Phase.MEASURE: "measuring", Phase.PUBLISH: "publishing"}
"""What `telemetry.stage` is told."""


# --- requests from outside --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody's wish that the next checkpoint be published, whatever its probability."""

    token: str
    give_up_crown: bool

    @property
    def how(self) -> str:
        """As `State.asked`."""
        return KNOWINGLY if self.give_up_crown else PLAINLY


def ask_to_publish(work_dir: Path, *, give_up_crown: bool = False) -> Path:
    """Leaves a request for the miner that works in this folder, answered at the end of its slice. Raises Rejected(SETTING)."""
    if not (work_dir / STATE).exists():
        raise Rejected(Reason.SETTING, f"no {STATE} in {work_dir}", "the folder of a miner that was started", "--work.dir")
    if read_state(work_dir / STATE).phase is Phase.OVER:
        raise Rejected(Reason.SETTING, f"{work_dir}, whose runs are over", "a miner that trains; see --model", "--publish-now")
    return _write(work_dir / REQUEST, {"token": uuid.uuid4().hex, "give_up_crown": give_up_crown})


def _asked(work_dir: Path) -> Request | None:
    path = work_dir / REQUEST
    if not path.exists():
        return None
    data = _object(path)
    return Request(str(data.get("token", "")), data.get("give_up_crown") is True)


def _drop_request(work_dir: Path, request: Request | None = None) -> None:
    """Takes this one away, and no newer one; None: any, because nothing is trained any more that could answer it."""
    found = _asked(work_dir)
    if found is None or found != (request or found):
        return
    (work_dir / REQUEST).unlink(missing_ok=True)
    if request is None:
        warn("asked", "somebody asked for a publication: nothing is, the runs are over")


def _answer(plan: Plan, state: State, folder: Path, asked: Request, held: _Held | None) -> State:
    """The request is done with: in the state first, so that it is never answered twice."""
    tell("asked", "somebody asked for this checkpoint to be published", hotkey=state.hotkey, run=state.run, step=state.steps)
    if held is not None:
        warn("held", f"not published: {held.why}", hotkey=state.hotkey, run=state.run, step=state.steps)
        state = _next(plan, state, behind=False)
    else:
        state = _candidate(plan, state, folder, asked.how)
    state = _keep(plan.work_dir, replace(state, answered=asked.token))
    _drop_request(plan.work_dir, asked)
    return state


# --- the state file ---------------------------------------------------------------------------------------------------


def opened(plan: Plan, hotkey: str, competition: str, repo: str) -> State:
    """The state of a miner in its folder; a new one where there is none. Raises Rejected(SETTING)."""
    path = plan.work_dir / STATE
    if not path.exists():
        return _keep(plan.work_dir, _first_run(plan, State(hotkey, competition, repo)))
    state = read_state(path)
    for name, kept, wanted in (
        ("hotkey", state.hotkey, hotkey), ("competition", state.competition, competition), ("repository", state.repo, repo),
    ):  # fmt: skip
        if kept != wanted:
            got, rule = f"{path} of the {name} {kept}", f"{wanted}, or a --work.dir of its own"
            raise Rejected(Reason.SETTING, got, rule, "--work.dir")
    if state.phase is Phase.OVER:
        return _begun(plan, state) if plan.runs == 0 or state.run < plan.runs else state
    if state.steps == 0 and not (run_folder(plan.work_dir, state.run) / "state.pt").exists():  # nothing is trained yet
        return _first_run(plan, state) if state.run == 1 else replace(state, planned=plan.steps)
    if state.planned not in (0, plan.steps):
        rule = f"{state.planned}, which run {state.run} in {plan.work_dir} was begun for; or a --work.dir of its own"
        raise Rejected(Reason.SETTING, plan.steps, rule, "--steps")
    if plan.start not in ("", CHAMPION, state.start):
        tell("run", f"run {state.run} has begun already: --start {plan.start} has no effect", hotkey=state.hotkey, run=state.run)
    return state


def _first_run(plan: Plan, state: State) -> State:
    """Its start by the plan; fresh weights where the crown's holder is asked for and there is none, or none to train on."""
    state = replace(state, planned=plan.steps, start="" if plan.start == CHAMPION else plan.start)
    if plan.start != CHAMPION:
        return state
    first = holder_in(plan.records, state.competition) if plan.records else None
    if first is None or first.outcome.model in ("", state.refused):
        tell("run", "no holder to begin from: the first run begins from fresh weights", hotkey=state.hotkey, run=1)
        return state
    return replace(state, start=first.outcome.model)


def holder_in(records: Path, competition: str, last: int | None = None) -> ModelRecord | None:
    """Who has the largest weight in the newest record, of a block up to `last`; None: nobody. Raises Unavailable."""
    record = record_files.newest(records, passed_over, last=last)
    kept = record.competitions.get(competition) if record else None
    return holder_of(kept) if kept else None


def read_state(path: Path) -> State:
    """Raises Rejected(SETTING) for a file that no miner of this version wrote."""
    data = _object(path)
    known = {field.name: field.type for field in fields(State)}
    unknown = sorted(data.keys() - known.keys())
    if unknown:
        raise Rejected(Reason.SETTING, f"the field {shown(unknown[0])}", ", ".join(known), str(path))
    for name, value in data.items():
        kind = int if known[name] == "int" else str
        if type(value) is not kind:
            raise Rejected(Reason.SETTING, f"{name} {value!r}", f"a {kind.__name__}", str(path))
    try:
        return State(**{**data, "phase": Phase(data["phase"])})
    except (KeyError, TypeError, ValueError) as error:
        raise Rejected(Reason.SETTING, error, "a state with hotkey, competition, repo and phase", str(path)) from None


def _keep(work_dir: Path, state: State) -> State:
    _write(work_dir / STATE, asdict(state))
    return state


def _object(path: Path) -> dict[str, Any]:
    """Raises Rejected(SETTING), Unavailable."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unavailable(str(path), error.strerror or str(error)) from None
    except ValueError as error:
        raise Rejected(Reason.SETTING, error, "the JSON that a miner wrote", str(path)) from None
    if not isinstance(data, dict):
        raise Rejected(Reason.SETTING, type(data).__name__, "a JSON object", str(path))
    return data


def _write(path: Path, value: object) -> Path:
    """Whole or not at all, and on the disk. Raises Unavailable."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        record_files.flush(path.parent)
    except OSError as error:
        raise Unavailable(str(path), error.strerror or str(error)) from None
    return path
