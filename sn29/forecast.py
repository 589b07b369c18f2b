"""What a checkpoint would come to if it were committed now, as one story, without telling anybody of it.

    check     the checks of a validator on the folder: every reason for which it would be refused
    look      the newest round record of a validator: the pool, the crown's holder, what the rule remembers, which texts
    draw      the texts of that record's window again, from the data set at the recorded revision: they must have the recorded ids
    measure   the checkpoint's losses on them, in a validator's own child process and number format
    decide    the rule itself, with the checkpoint as a new entry: how likely it is to win (`chances`), what is still missing, and
              from when on the holder's shrunken advantage would be enough (`explain`)

The recorded losses are of the models as they were measured in that window; who was stopped before its end has no losses on all
texts and is left out. Those of who has to be beaten are needed, somebody else's than the committing hotkey's: if the newest
window does not have them, an older one's texts serve.

Three things are kept apart: a record says that nobody else is entered (a win for certain), a record says who is (a
probability), and no record says anything (nothing is known: no probability).

How fresh the texts are. What they say of texts to come holds if the model was not trained on them more than on others. Whoever
trains on the data set that samples are drawn from leaves them out (`TrainingText.exclude`), and says so: the ids are handed over
in `excluded`, or stand in a file `training.json` in the checkpoint's folder or beside it, {"excluded": ["<id>", ...]}.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sn29 import record_files
from sn29.chances import Chance, chances
from sn29.corpus import DataFiles
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.evaluation.worker import Evaluator, Job, SeveralReasons, memory_needed
from sn29.examination import FixedText
from sn29.explain import Comparison, Prospect, compared, prospect_in
from sn29.measurement import start_token_of, unfit
from sn29.records import Entry, Loss, ModelFacts, Sample, Window
from sn29.replay import contest_of, memory_of
from sn29.round import window_samples
from sn29.round_record import CompetitionRecord, RoundRecord
from sn29.rules.champion import Memory, Who
from sn29.rules.competition import Competition, FolderDataset
from sn29.rules.decision import Contest, score_contest
from sn29.rules.scoring import Scored
from sn29.rules.sequential import portions
from sn29.submission import Checked, check

WINDOWS = 20
"""Windows to come that a probability is given for, beside the first one: a day of windows of 360 blocks of 12 s."""
NEW = "this checkpoint"
"""Stands for a hotkey that is not in the pool."""
LOOK_BACK = 50
"""Records that are read in search of a window in which the holder was measured."""
TRAINING = "training.json"

Dataset = Callable[[Competition, int], DataFiles]
Progress = Callable[[str, int, int], None]
"""Is told (what is being done, how much of it is done, all of it)."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a validator's records say of a competition."""

    record: RoundRecord
    """The newest one with the competition: who is entered, and what the rule remembers."""
    pool: CompetitionRecord
    texts: CompetitionRecord
    """Of the newest window whose losses can be compared with: mostly the same."""
    machine: Mapping[str, str]
    """What measured those."""
    alone: bool
    """Nobody else is entered."""
    crowned: bool
    """The model that is asked about holds the crown already."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a checkpoint that is committed now."""

    competition: str
    rule: str
    facts: ModelFacts | None
    """None when the metadata could not even be read."""
    refusals: tuple[Rejected, ...]
    """Every reason for which validators would refuse it; empty: accepted."""
    now: int
    """Block of the commitment that is thought of."""
    first_window: int
    """Block of the first window that would judge it; -1 where no record says anything."""
    chances: tuple[Chance, ...] = ()
    """That it has won within 1, 2, ... windows; empty when it is refused or nothing is known. See `chances.chances`."""
    holder: str = ""
    """Hotkey that has to be beaten: the crown's, or who has the largest weight; empty: nobody, or this model's own hotkey."""
    against: Comparison | None = None
    """This model against the holder, on these texts; None where there is nobody."""
    prospect: Prospect | None = None
    """What separates it from a win if all windows were like this one; see `explain`."""
    window: Window | None = None
    """Whose texts it was measured on; None: it was not measured."""
    num_samples: int = 0
    nats_per_sample: float = math.nan
    """Over the samples that it could be scored on."""
    warnings: tuple[str, ...] = ()
    """What makes these figures less sure than they look."""
    crowned: bool = False
    """It holds the crown already."""

    @property
    def accepted(self) -> bool:
        return not self.refusals

    @property
    def probability(self) -> float | None:
        """To have won within all windows that were looked at: what a miner decides by. None: no record says who is there."""
        if self.accepted and self.first_window < 0:
            return None
        return self.chances[-1].probability if self.chances else 0.0

    @property
    def near_copy_of(self) -> str:
        """Hotkey of the earlier model that it counts as one with; empty: of none."""
        return self.against.other if self.against is not None and self.against.near_copy else ""

    @property
    def behind(self) -> bool:
        """Its losses are higher than the holder's in the mean."""
        return self.against is not None and self.against.mean > 0

    @property
    def missing(self) -> float:
        """By how much all losses must still fall for their mean to be better by the holder's advantage: below that no number of
        windows shows enough. 0: it is. Without a rule that compares in pairs: for a win on these texts."""
        if self.against is not None and self.against.needed is not None:
            return max(0.0, 1.0 - math.exp(-(self.against.mean + self.against.needed)))
        improvement = self.prospect.improvement if self.prospect else None
        return improvement or 0.0

    @property
    def said(self) -> str:
        """One line: the verdict."""
        if self.refusals:
            return f"would be refused for {self.competition} ({', '.join(r.reason.code for r in self.refusals)})"
        if self.near_copy_of:
            return f"would be accepted, and never win: a near copy of {self.near_copy_of}'s earlier model"
        if self.probability is None:
            return "would be accepted; no record says who is there, so whether it would win is not known"
        if self.crowned:
            return "would be accepted: it holds the crown already"
        if not self.holder:
            return "would be accepted, and win: nobody else has a model there"
        c, f = self.chances[-1], self.chances[0]
        many = f"within {len(self.chances)} windows {c.probability:.0%} ({c.low:.0%} to {c.high:.0%})"
        return f"would be accepted, and win with a probability of {f.probability:.0%} in the first window, {many}"


async def forecast(
    folder: Path,
    competition: Competition,
    fixed: FixedText | None,
    records: Path | None,
    dataset: Dataset,
    evaluator: Evaluator,
    *,
    threads: int,
    deadline_s: float,
    device: str = "cpu",
    now: int = 0,
    hotkey: str = "",
    windows: int = WINDOWS,
    seed: int = 29,
    excluded: Collection[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> Forecast:
    """What would become of the checkpoint in `folder`, with its tokenizer in it or `fixed`.

    `competition` is in force now; `records` is a folder of a validator's round records, or one of them (None: there
    are none yet). `now` is the chain's
    block (0: that of the newest record), `hotkey` the one that would commit (its older model goes then; empty: a new one).
    `excluded` are ids of samples that the model was not trained on. Raises Rejected(RECORD | DATASET) for records and texts
    that do not fit together, Rejected(SETTING) for a path that is not there, Unavailable when the data set or the child gave
    no answer.
    """
    progress("check", 0, 1)
    checked = await check(folder, competition, fixed, threads=threads, deadline_s=deadline_s, evaluator=evaluator)
    me = Who(hotkey or NEW, checked.facts.content_id if checked.facts else "")
    unread: list[Sn29Error] = []
    known: Known | None = None
    if records is not None:
        known = await asyncio.to_thread(look, records, competition.name, me, unread.append, now or None)
    checked = replace(checked, refusals=(*checked.refusals, *_copies(known, checked, hotkey)))
    progress("check", 1, 1)
    plain = _unmeasured(competition, known, checked, now, windows)
    plain = replace(plain, warnings=tuple(f"a record was passed over: {error}" for error in unread))
    if known is None or checked.refusals or checked.facts is None or not known.texts.losses:
        return plain
    recorded = contest_of(competition.name, known.texts).competition
    progress("draw", 0, 1)
    samples = await asyncio.to_thread(_texts, dataset, recorded, known.texts)
    progress("draw", 1, 1)
    bench = _Bench(evaluator, threads, deadline_s, device, known.machine.get("dtype", "bfloat16"), progress)
    try:
        losses = await bench.losses(folder, recorded, checked.facts, fixed, samples)
    except Rejected as error:
        return replace(plain, refusals=error.found if isinstance(error, SeveralReasons) else (error,), chances=())
    limits = recorded.limits
    failure = unfit(losses, limits.round_trip_failures, limits.unscored, own_tokenizer=fixed is None)
    if failure is not None:
        return replace(plain, refusals=(failure,), chances=())
    left_out = {s.id for s in samples} <= {*excluded, *excluded_by(folder)}
    plain = replace(plain, warnings=(*plain.warnings, *_warnings(known, competition, recorded, device, left_out=left_out)))
    contest = _contest(competition.name, known, losses, Entry(checked.facts.content_id, plain.now), me.hotkey)
    return await asyncio.to_thread(_decided, plain, contest, me.hotkey, losses, known, windows, seed, progress)


def refused(competition: Competition, refusals: tuple[Rejected, ...]) -> Forecast:
    """Of a model that was refused before it was looked at here."""
    return Forecast(competition.name, competition.scoring.rule, None, refusals, 0, -1)


# --- look -------------------------------------------------------------------------------------------------------------


def look(records: Path, competition: str, me: Who, skip: record_files.Skip, last: int | None = None) -> Known | None:
    """What the newest records say of the competition to who commits this; None: none of them says anything.

    What cannot be read in a folder is passed over, and `skip` is told; so are names of blocks after `last`, untold. Raises
    Rejected(SETTING) for a path that is not there, Rejected(RECORD), and Unavailable when who has to be beaten was not
    measured lately.
    """
    if not records.exists():
        raise Rejected(Reason.SETTING, f"no {records}", "a folder of a validator's round records, or one record", "--records")
    of_folder = records.is_dir()
    found = record_files.newest_first(records, skip, last=last) if of_folder else iter([(records, record_files.read(records))])
    newest: RoundRecord | None = None
    for (_, record), _ in zip(found, range(LOOK_BACK), strict=False):
        kept = record.competitions.get(competition)
        if kept is None:
            continue
        newest = newest or record
        pool, memory = newest.competitions[competition], _memory(newest, competition)
        entries = {**{m.hotkey: m.entry for m in pool.models if m.entry}, me.hotkey: Entry(me.content_id, newest.head.block)}
        known = Known(newest, pool, kept, record.machine, alone=len(entries) == 1, crowned=memory.holder == me)
        rows, opener = _rows(pool, kept).keys() - {me.hotkey}, _opener(memory, entries)
        wanted = {opener.hotkey} - {me.hotkey} if opener is not None else set()
        if known.alone or known.crowned or (wanted <= rows and rows):
            return known
    if newest is None:
        return None
    who = ", ".join(wanted) or "everybody else"
    raise Unavailable("records", f"{who}, to be compared with, was measured in none of the newest {LOOK_BACK} rounds here")


def _memory(record: RoundRecord, competition: str) -> Memory:
    """What the rule remembers when the next window opens. Raises Rejected(RECORD)."""
    return memory_of(record.competitions[competition].memory_after, record.head.block, f"{competition}: memory after")


def _opener(memory: Memory, entries: Mapping[str, Entry]) -> Who | None:
    """Who holds the crown when the next window opens: the last holder that is still entered. None: there is none."""
    before = ((memory.holder,) if memory.holder else ()) + memory.past
    return next((w for w in before if w.hotkey in entries and entries[w.hotkey].content_id == w.content_id), None)


def _rows(pool: CompetitionRecord, kept: CompetitionRecord) -> dict[str, tuple[float, ...]]:
    """Losses over a whole window of those who are in the pool with the same model."""
    contents = {m.hotkey: m.entry.content_id for m in pool.models if m.entry is not None}
    return {
        m.hotkey: m.losses
        for m in kept.models
        if m.evaluated and not m.stopped and m.entry is not None and contents.get(m.hotkey) == m.entry.content_id
    }


def _copies(known: Known | None, checked: Checked, hotkey: str) -> tuple[Rejected, ...]:
    """The claim that somebody else has on the same files, weights or tensors, in whatever competition."""
    facts, models = checked.facts, known.record.competitions.values() if known else ()
    for m in (m for kept in models for m in kept.models if m.entry is not None and m.hotkey != hotkey):
        same = facts is not None and m.entry is not None and m.entry.content_id == facts.content_id
        same = same or (facts is not None and m.facts is not None and m.facts.weights_id == facts.weights_id)
        if same or (checked.tensor_digest and m.tensor_digest == checked.tensor_digest):
            block = m.entry.block if m.entry is not None else m.outcome.block
            return (Rejected(Reason.COPY, f"the model that {m.hotkey} committed at block {block:,}", "a model of your own"),)
    return ()


def _unmeasured(competition: Competition, known: Known | None, checked: Checked, now: int, windows: int) -> Forecast:
    """What is known without a text: all there is where the model is refused, or nobody else is there."""
    certain = known is not None and not checked.refusals and (known.alone or known.crowned)
    rule, first = competition.scoring.rule, -1
    if known is not None:
        now = max(now, known.record.head.block)
        length = contest_of(competition.name, known.pool).competition.samples.window_blocks
        first = (now // length + 1) * length
    chances = (Chance(1.0, 1.0, 1.0),) * windows if certain else ()
    crowned = known is not None and known.crowned
    return Forecast(competition.name, rule, checked.facts, checked.refusals, now, first, chances, crowned=crowned)


# --- draw and measure ---------------------------------------------------------------------------------------------------


def excluded_by(folder: Path) -> frozenset[str]:
    """Ids of the samples that a file TRAINING in the folder or beside it names; none where there is no such file.

    Raises Rejected(SETTING) for a file of another form, Unavailable when it cannot be read.
    """
    for path in (folder / TRAINING, folder.parent / TRAINING):
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise Unavailable(str(path), error.strerror or str(error)) from None
            except ValueError:
                found = None
            ids = found.get("excluded") if isinstance(found, dict) else None
            if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
                raise Rejected(Reason.SETTING, "another form", 'an object with "excluded", a list of ids', str(path))
            return frozenset(ids)
    return frozenset()


def _texts(dataset: Dataset, recorded: Competition, kept: CompetitionRecord) -> tuple[Sample, ...]:
    """The recorded window's samples, drawn again. Raises Rejected(DATASET) when they are others than were recorded."""
    samples, revisions = window_samples(dataset, _pinned(recorded, kept), kept.window)
    where = f"{kept.window.competition}: window {kept.window.index}"
    for name, recorded_revision in kept.datasets.items():
        if revisions.get(name) != recorded_revision:
            got = f"revision {revisions.get(name, 'of no such data set')} of {name}"
            raise Rejected(Reason.DATASET, got, f"{recorded_revision}, as recorded", where)
    got_ids, wanted = [s.id for s in samples], [s.id for s in kept.samples]
    if got_ids != wanted:
        at = next((i for i, (a, b) in enumerate(zip(got_ids, wanted, strict=False)) if a != b), min(len(got_ids), len(wanted)))
        got, rule = (f"{ids[at]} as sample {at + 1}" if at < len(ids) else f"{len(ids)} samples" for ids in (got_ids, wanted))
        raise Rejected(Reason.DATASET, got, f"{rule}, as recorded", where)
    return samples


def _pinned(recorded: Competition, kept: CompetitionRecord) -> Competition:
    """With the recorded revisions, where the competition names none."""
    pinned = [
        source
        if isinstance(source, FolderDataset) or source.revision
        else source.model_copy(update={"revision": kept.datasets.get(f"{index} {source.hub}")})
        for index, source in enumerate(recorded.datasets)
    ]
    return recorded.model_copy(update={"datasets": tuple(pinned)})


@dataclass(frozen=True, slots=True)
class _Bench:
    """What measures, and how."""

    evaluator: Evaluator
    threads: int
    deadline_s: float
    device: str
    dtype: str
    progress: Progress

    async def losses(
        self, folder: Path, competition: Competition, facts: ModelFacts, fixed: FixedText | None, samples: tuple[Sample, ...]
    ) -> tuple[Loss, ...]:
        """Of all samples, as a validator's child measures them. Raises Rejected with the child's reason, Unavailable."""
        chosen = await self.evaluator.choose(facts.vocab_size, device=self.device, dtype=self.dtype)
        job = Job(
            checkpoint=str(folder.absolute()),
            tokenizer=str((fixed.path if fixed else folder / "tokenizer.json").absolute()),
            tokenizer_oid=fixed.oid if fixed else "",
            start_token=start_token_of(competition, facts),
            max_tokens=competition.limits.max_tokens,
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            profile=chosen.profile,
            samples=samples,
            portions=portions(len(samples))[:-1],
        )

        def told(losses: tuple[Loss, ...]) -> bool:
            self.progress("measure", len(losses), len(samples))
            return True

        self.progress("measure", 0, len(samples))
        memory = memory_needed(facts, job.max_tokens)
        found = await self.evaluator.evaluate(job, deadline_s=self.deadline_s, memory_bytes=memory, decide=told)
        self.progress("measure", len(samples), len(samples))
        return found.losses


def _warnings(known: Known, competition: Competition, recorded: Competition, device: str, *, left_out: bool) -> tuple[str, ...]:
    found = []
    if not left_out:
        found.append(
            f"not fresh for certain: nothing says that the {len(known.texts.samples):,} texts of window "
            f"{known.texts.window.index} were left out of the model's training text"
        )
    if known.texts is not known.pool:
        block = known.texts.window.seed.block
        found.append(f"the texts are of the window of block {block:,}: the holder was not measured in a newer one")
    if (measured_on := known.machine.get("device", device)).partition(":")[0] != device.partition(":")[0]:
        found.append(f"measured on {device}, the recorded losses on {measured_on}: they differ in the last digits")
    if competition.model_copy(update={"pool": recorded.pool}) != recorded:
        found.append("the competition's rules are others now than in the record: the recorded ones were used, but for the checks")
    return tuple(found)


# --- decide -------------------------------------------------------------------------------------------------------------


def _contest(name: str, known: Known, losses: tuple[Loss, ...], entry: Entry, hotkey: str) -> Contest:
    """The first window that judges the checkpoint, as if its texts were the measured ones."""
    recorded = contest_of(name, known.pool)
    length = recorded.competition.samples.window_blocks
    index = entry.block // length + 1
    mine = recorded.entries.get(hotkey)
    if mine is not None and mine.content_id == entry.content_id:
        entry = mine  # it stands already
    rows = {h: row for h, row in _rows(known.pool, known.texts).items() if h != hotkey}
    return Contest(
        competition=recorded.competition,
        window=replace(recorded.window, index=index, seed=replace(recorded.window.seed, block=index * length)),
        losses={**rows, hotkey: tuple(loss.nats for loss in losses)},
        entries={**recorded.entries, hotkey: entry},
        memory=_memory(known.record, name),
    )


def _decided(
    plain: Forecast,
    contest: Contest,
    hotkey: str,
    losses: tuple[Loss, ...],
    known: Known,
    windows: int,
    seed: int,
    progress: Progress,
) -> Forecast:
    """The forecast of a model that was measured."""
    scored = [loss.nats for loss in losses if math.isfinite(loss.nats)]
    measured = replace(plain, window=known.texts.window, num_samples=len(losses), nats_per_sample=math.fsum(scored) / len(scored))
    if known.alone or known.crowned:
        return measured
    opening = score_contest(contest)
    holder = _to_beat(contest, opening, hotkey)
    found = chances(contest, hotkey, windows, seed=seed, progress=lambda done, total: progress("decide", done, total))
    return replace(
        measured,
        holder=holder,
        chances=found,
        against=compared(opening, contest, hotkey, holder),
        prospect=prospect_in(contest, hotkey),
    )


def _to_beat(contest: Contest, opening: Scored, hotkey: str) -> str:
    """The crown's holder when the window opens, or else who has most of the reward beside this model."""
    opener = _opener(contest.memory, contest.entries)
    if opener is not None and opener.hotkey != hotkey:
        return opener.hotkey
    others = [s for s in opening.scores if s.hotkey != hotkey and s.hotkey in contest.losses]
    return max(others, key=lambda s: (s.weight, s.win_rate, s.hotkey)).hotkey
