"""The losses of one model on a window's samples: from the store where they are known, else measured, as many as are needed.

known losses    by content, tokenizer, the way that they are computed, and sample: nothing is measured twice; when the
                model runs anyway, two of the known ones are measured again and must be the same to the bit
stopping        under `champion` portion by portion against the holder's losses: see `rules.sequential`. Where it stops
                depends on losses alone, not on what was known: all validators stop at the same sample
in turns        the next model's files come, and are read ahead, while this one is evaluated
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import ChildEnded, Chosen, Decide, Ending, Evaluated, FileChanged, Job, memory_needed
from sn29.examination import (
    EXCUSED_BLOCKS,
    Entrant,
    FixedText,
    Machine,
    Ports,
    listed_files,
    put_off,
    refuse,
    refused,
    say_outcomes,
)
from sn29.models import checkpoint
from sn29.models.disk import Disk
from sn29.models.fetch import fetch
from sn29.records import Commitment, Loss, ModelFacts, Outcome, Sample
from sn29.rules.competition import Competition, FixedTokenizer, named_start_token, tokenizer_for
from sn29.rules.sequential import Bar, Stop, hopeless, portions
from sn29.store import Unanswered
from sn29.telemetry import stage, tell, warn

# Refusals that a failing machine can bring about as well: not believed before our own model has passed, twice.
_MAY_BE_OURS = {Reason.NOT_DETERMINISTIC, Reason.NOT_CAUSAL}

# Endings that say nothing of the model, however often they come. Nobody is refused for them.
_NEVER_THE_MODELS = {Ending.KILLED, Ending.DEVICE, Ending.DEVICE_MEMORY, Ending.MACHINE}

# Endings by time: what is slow now may be slow because of what else runs here, so the second try is a round later.
_SLOW = {Ending.DEADLINE, Ending.CPU_TIME, Ending.TOKENIZER}

_SPOT_CHECKS = 2
"""Known losses that are measured again when their model runs anyway."""


@dataclass(frozen=True, slots=True)
class Against:
    """The crown's holder, measured in full: whoever cannot beat it is not measured to the end."""

    bar: Bar
    nats: tuple[float, ...]
    """Of the window's samples, in their order."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of one entrant."""

    outcome: Outcome
    losses: tuple[Loss, ...] = ()
    """Of the window's samples, in their order, or of the leading ones; empty unless it was evaluated."""
    stopped: str = ""
    """Why only of the leading ones, if so."""
    is_over: bool = False
    """It gave nothing, and is tried again in the next round only: no use to wait for it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Who may do what now: one model more than are evaluated side by side has its files brought."""

    ahead: asyncio.Semaphore
    evaluating: asyncio.Semaphore
    fetching: asyncio.Lock
    """One at a time: room on the disk is asked for before it is filled."""
    told: set[str]
    """Ways to compute losses that were told."""
    entrants: int = 1
    """How many are measured in all."""
    done: set[str] = field(default_factory=set)
    """Hotkeys of those that are over."""
    measuring: set[str] = field(default_factory=set)
    """Hotkeys of those that are evaluated now."""

    @classmethod
    def of(cls, slots: int, entrants: int = 1) -> Turn:
        return cls(asyncio.Semaphore(slots + 1), asyncio.Semaphore(slots), asyncio.Lock(), set(), entrants)

    def tell_stage(self) -> None:
        """Tells the stage, and who is evaluated now."""
        stage("measuring", len(self.done), self.entrants, min(self.measuring, default=""))

    @contextmanager
    def measures(self, hotkey: str) -> Iterator[None]:
        """Inside it this one is evaluated."""
        self.measuring.add(hotkey)
        self.tell_stage()
        try:
            yield
        finally:
            self.measuring.discard(hotkey)


class _NextRound(Unavailable):
    """Said of an evaluation that may succeed in the next round and not in this one."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the table of losses: one model, read by one tokenizer, computed in one way."""

    content: str
    tokenizer_id: str
    profile: str


async def measure(
    ports: Ports,
    competition: Competition,
    entrant: Entrant,
    samples: tuple[Sample, ...],
    block: int,
    paid: Collection[str] = (),
    against: Against | None = None,
    turn: Turn | None = None,
) -> Measured:
    """The losses of one model on the window's samples, in the round of `block`; of the leading ones if it is `hopeless`.

    The digest of its tensors is in the store afterwards if it was ever evaluated. `paid` are the contents that earn: they
    go last when its files need the place of others.
    """
    commitment, content = entrant.commitment, entrant.facts.content_id
    try:
        async with (turn := turn or Turn.of(1)).ahead:
            chosen = await _way(ports, entrant, turn)
            row = _Row(content, tokenizer_id_of(competition, entrant), _profile(ports, competition, entrant, chosen))
            known = ports.store.losses(row.content, row.tokenizer_id, row.profile, [s.id for s in samples])
            num_known = len(known)
            losses, stop = _settled(commitment, samples, known, against)
            if losses is None or ports.store.tensor_digest(content) is None:
                work = _Work(ports, competition, entrant, samples, block, paid, against, turn)
                known = await work.complete(row, known, chosen)
                losses, stop = _settled(commitment, samples, known, against)
                assert losses is not None
    except Rejected as error:
        outcome = refuse(ports, entrant.admitting, commitment, error)
        say_outcomes([outcome])
        return Measured(outcome)
    except Unavailable as error:
        return Measured(put_off(commitment, error), is_over=isinstance(error, _NextRound))
    _say_measured(competition, commitment, len(known) - num_known, num_known, stop)
    own = tokenizer_for(competition, entrant.facts.has_tokenizer) is None
    limits = competition.limits
    failure = unfit(losses, limits.round_trip_failures, limits.unscored, own_tokenizer=own, total=len(samples))
    if failure is not None:  # of this window's samples, so it is not remembered
        outcome = refused(commitment.hotkey, competition.name, commitment.block, str(commitment.model), failure)
        say_outcomes([outcome])
        return Measured(outcome)
    outcome = Outcome(
        commitment.hotkey, competition.name, commitment.block, "evaluated", str(commitment.model), content_id=content
    )
    return Measured(outcome, losses, str(stop) if stop else "")


def _say_measured(competition: Competition, commitment: Commitment, measured: int, known: int, stop: Stop | None) -> None:
    what = f"{measured} samples measured, {known} known{f'; {stop}' if stop else ''}"
    tell("evaluated", what, hotkey=commitment.hotkey, competition=competition.name, measured=measured, known=known)


def _settled(
    commitment: Commitment, samples: Sequence[Sample], known: Mapping[str, Loss], against: Against | None
) -> tuple[tuple[Loss, ...] | None, Stop | None]:
    """The losses that count, and why no more are needed; None when some that are needed are not known.

    Asked after each portion from the first on, whatever else is known: who has measured more stops at the same place.
    """
    losses: list[Loss] = []
    for upto in portions(len(samples)):
        if any(sample.id not in known for sample in samples[len(losses) : upto]):
            return None, None
        losses += (known[sample.id] for sample in samples[len(losses) : upto])
        if against is not None and upto < len(samples):
            stop = hopeless(against.bar, commitment.hotkey, [loss.nats for loss in losses], against.nats)
            if stop is not None:
                return tuple(losses), stop
    return tuple(losses), None


async def _way(ports: Ports, entrant: Entrant, turn: Turn) -> Chosen:
    machine = ports.machine
    chosen = await ports.evaluator.choose(entrant.facts.vocab_size, device=machine.device, dtype=machine.dtype)
    if str(chosen) not in turn.told:
        turn.told.add(str(chosen))
        tell("engine", f"{chosen}, {machine.dtype}{f'; not the fastest way: {chosen.note}' if chosen.note else ''}")
    return chosen


def _profile(ports: Ports, competition: Competition, entrant: Entrant, chosen: Chosen) -> str:
    """Everything beside weights, tokenizer and text that decides a loss's bits, as text."""
    start = start_token_of(competition, entrant.facts)
    return f"{chosen}, {ports.machine.dtype}, start {start}, at most {competition.limits.max_tokens} tokens"


async def measure_again(
    ports: Ports, competition: Competition, entrant: Entrant, samples: tuple[Sample, ...], block: int
) -> Evaluated:
    """The losses of these samples, whatever is known of them; nothing is kept. Raises Rejected, Unavailable."""
    turn = Turn.of(1)
    work = _Work(ports, competition, entrant, samples, block, (), None, turn)
    return await work._fetch_and_evaluate({}, (), await _way(ports, entrant, turn))


async def profile_of(ports: Ports, competition: Competition, entrant: Entrant) -> str:
    """Under which a loss of this model is kept on this machine. Raises Unavailable."""
    return _profile(ports, competition, entrant, await _way(ports, entrant, Turn.of(1)))


def unfit(
    losses: Sequence[Loss], round_trip_failures: int, unscored: float = 1.0, *, own_tokenizer: bool = True, total: int = 0
) -> Rejected | None:
    """Why a model with these losses is out, if it is: decided over the whole window, however much of it was known before.

    `total` is the number of the window's samples where these are the leading ones only. For `unscored` see
    `rules.competition.Limits`.
    """
    reasons = [loss.reason for loss in losses]
    lost, not_finite = reasons.count(Reason.ROUND_TRIP.code), reasons.count("not_finite")
    if lost > round_trip_failures:
        return Rejected(Reason.ROUND_TRIP, f"{lost} samples", f"at most {round_trip_failures}")
    if losses and not any(math.isfinite(loss.nats) for loss in losses):
        return Rejected(Reason.NOT_FINITE, "no finite loss on any sample", "finite losses")
    too_long = reasons.count("too_long") if own_tokenizer else 0
    if not_finite + too_long > unscored * max(total, len(losses)):
        reason = Reason.NOT_FINITE if not_finite >= too_long else Reason.TOKENIZER
        got = f"{not_finite:,} samples with no finite loss and {too_long:,} of too many tokens, of {max(total, len(losses)):,}"
        return Rejected(reason, got, f"at most {unscored:.1%} of the samples (limits.unscored)")
    return None


def start_token_of(competition: Competition, facts: ModelFacts) -> int:
    """The competition's, else the model's own."""
    chosen = named_start_token(competition, facts.has_tokenizer)
    return facts.start_token if chosen is None else chosen


def tokenizer_id_of(competition: Competition, entrant: Entrant) -> str:
    """Fingerprint of the competition's tokenizer, or the object id of the model's own, which is known without the file."""
    shared = tokenizer_for(competition, entrant.facts.has_tokenizer)
    if shared is not None:
        return shared.fingerprint or ""
    return next((f.oid for f in entrant.listing.files if f.path == "tokenizer.json"), "")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """One model that has to be evaluated."""

    ports: Ports
    competition: Competition
    entrant: Entrant
    samples: tuple[Sample, ...]
    block: int
    paid: Collection[str]
    against: Against | None
    turn: Turn

    async def complete(self, row: _Row, known: Mapping[str, Loss], chosen: Chosen) -> dict[str, Loss]:
        """What is known with what was missing; both are in the store. Raises Rejected, Unavailable.

        When a known loss comes out differently, this machine is not to be trusted with any of the row: all are measured
        anew.
        """
        store = self.ports.store
        checked = _drawn([s for s in self.samples if s.id in known], f"{self.block} {row}")
        found = await self._fetch_and_evaluate(known, checked, chosen)
        again, new = found.losses[: len(checked)], found.losses[len(checked) :]
        wrong = [loss for loss in again if loss != known[loss.sample]]
        if wrong:
            got, before = wrong[0], known[wrong[0].sample]
            what = (
                f"{got.nats!r} nats on sample {got.sample} where {before.nats!r} were measured before: the row is measured anew"
            )
            warn("mismatch", what, hotkey=self.entrant.commitment.hotkey, content=row.content)
            store.forget_losses(row.content, row.tokenizer_id, row.profile)
            return await self.complete(row, {}, chosen)
        store.keep_losses(row.content, row.tokenizer_id, row.profile, new)
        store.keep_tensor_digest(row.content, found.tensor_digest, self.block)
        return {**known, **{loss.sample: loss for loss in new}}

    async def _fetch_and_evaluate(self, known: Mapping[str, Loss], checked: Sequence[Sample], chosen: Chosen) -> Evaluated:
        """The model's files brought here, and what the child finds in them; nobody deletes them meanwhile.

        A file that the child finds changed is our disk's fault: it is fetched once more. Raises Rejected, Unavailable.
        """
        ports, commitment = self.ports, self.entrant.commitment
        _unless_it_is_over(ports, commitment, self.block)
        shared = tokenizer_for(self.competition, self.entrant.facts.has_tokenizer)
        fixed = await _fixed_text(ports, shared)
        disk = Disk(ports.machine.models_dir, budget_bytes=ports.machine.models_bytes, say=tell)
        try:
            with disk.using(self.entrant.facts.content_id) as folder:
                job, decide = self._job(folder, fixed, chosen, known, checked)
                room = partial(disk.make_room, paid=self.paid)
                async with await self._fetched(folder, room):
                    with self.turn.measures(commitment.hotkey):
                        return await self._evaluated(folder, job, decide, room)
        except OSError as error:
            raise Unavailable("disk", str(error)) from None

    async def _evaluated(self, folder: Path, job: Job, decide: Decide | None, room: Callable[[int], object]) -> Evaluated:
        try:
            return await _evaluate(self.ports, self.entrant, job, self.block, decide)
        except FileChanged as error:
            if all(error.path != file.path for file in job.files):  # the name is the child's
                raise
            warn("disk", f"{error}; thrown away", hotkey=self.entrant.commitment.hotkey)
            _throw_away(folder / error.path)
            await self._fetch(folder, room)
            return await _evaluate(self.ports, self.entrant, job, self.block, decide)

    async def _fetch(self, folder: Path, room: Callable[[int], object]) -> None:
        """While nothing is evaluated, that is what the validator is at."""

        def progress(received: int, size: int) -> None:
            if not self.turn.measuring:
                stage("fetching", received, size, self.entrant.commitment.hotkey)

        await _fetch(self.ports, self.entrant, folder, self.block, room, progress)

    async def _fetched(self, folder: Path, room: Callable[[int], object]) -> AbstractAsyncContextManager[object]:
        """The files are here, if possible while another model is evaluated; it is this one's turn inside the context.

        Without room beside the other it waits for that one's end, and nobody else fetches before it.
        """
        turn = self.turn
        async with turn.fetching:
            try:
                await self._fetch(folder, room)
            except Unavailable as error:
                if error.what != "disk" or not turn.evaluating.locked():
                    raise
                await turn.evaluating.acquire()
                try:
                    await self._fetch(folder, room)
                except BaseException:
                    turn.evaluating.release()
                    raise
                return _Held(turn.evaluating)
        await asyncio.to_thread(_read_ahead, folder)
        return turn.evaluating

    def _job(
        self, folder: Path, fixed: FixedText | None, chosen: Chosen, known: Mapping[str, Loss], checked: Sequence[Sample]
    ) -> tuple[Job, Decide | None]:
        """The job of a child, and who is asked between portions: nobody when everything is to be measured."""
        machine, facts, samples = self.ports.machine, self.entrant.facts, self.samples
        missing = [s for s in samples if s.id not in known]
        job = Job(
            checkpoint=str(folder.absolute()),
            tokenizer=str((fixed.path if fixed else folder / "tokenizer.json").absolute()),
            tokenizer_oid=fixed.oid if fixed else "",
            start_token=start_token_of(self.competition, facts),
            max_tokens=self.competition.limits.max_tokens,
            dtype=machine.dtype,
            device=machine.device,
            threads=machine.threads,
            profile=chosen.profile,
            samples=(*checked, *missing),
            files=tuple(f for f in self.entrant.listing.files if checkpoint.is_content(f.path)),
            model_bytes=machine.model_bytes,
        )
        if self.against is None:
            return job, None
        counts = {sum(s.id not in known for s in samples[:upto]) for upto in portions(len(samples))[:-1]}
        asked = sorted(len(checked) + count for count in counts - {0, len(missing)})

        def decide(losses: tuple[Loss, ...]) -> bool:
            now = {**known, **{loss.sample: loss for loss in losses}}
            return _settled(self.entrant.commitment, samples, now, self.against)[0] is None

        return replace(job, portions=tuple(asked)), decide


@dataclass(frozen=True, slots=True)
class _Held:
    """A semaphore that was acquired before the context begins."""

    semaphore: asyncio.Semaphore

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        self.semaphore.release()


def _drawn(samples: Sequence[Sample], seed: str) -> list[Sample]:
    """A few samples, by the hash of the seed with each one's id."""
    return sorted(samples, key=lambda s: hashlib.sha256(f"{seed} {s.id}".encode()).digest())[:_SPOT_CHECKS]


def _read_ahead(folder: Path) -> None:
    """Asks the kernel to read the files while another model is evaluated; what was just downloaded it still has."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


async def _fixed_text(ports: Ports, wanted: FixedTokenizer | None) -> FixedText | None:
    """The competition's tokenizer, for a model that is read through it. No miner is at fault where it is wrong."""
    try:
        return await asyncio.to_thread(ports.tokenizer, wanted) if wanted else None
    except Rejected as error:
        raise Unavailable("the competition's tokenizer", str(error)) from None


def _throw_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


async def _fetch(
    ports: Ports,
    entrant: Entrant,
    folder: Path,
    block: int,
    room: Callable[[int], object],
    progress: Callable[[int, int], None],
) -> None:
    """The model's verified files in their folder, one a content: two commitments of one content share it.

    progress(received, size): called in the thread that receives, in bytes.
    """
    received, cancelled = 0, threading.Event()
    size = sum(f.size for f in entrant.listing.files if checkpoint.is_content(f.path))

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        if cancelled.is_set():  # a thread cannot be stopped from outside: it stops itself at the next piece
            raise Unavailable("download", "the validator is stopping")
        progress(min(received, size), size)

    machine, listed = ports.machine, listed_files(ports, entrant.commitment, block)
    bring = partial(
        fetch, ports.hub, entrant.listing, folder,
        only=checkpoint.is_content, deadline_s=machine.download_deadline_s, silence_s=machine.silence_s,
        progress=count, room=room, say=warn,
    )  # fmt: skip
    try:
        await asyncio.to_thread(listed, bring)
    finally:
        cancelled.set()
    what = f"{received:,} bytes downloaded, every file's hash checked" if received else "the files are here already"
    tell("fetched", what, hotkey=entrant.commitment.hotkey, bytes=received)


async def _evaluate(ports: Ports, entrant: Entrant, job: Job, block: int, decide: Decide | None) -> Evaluated:
    """What the child found. A failure that may be the model's is tried once more: at once, or in the next round if it is one
    of time.

    Before the model is blamed, a model of our own must pass on this machine. Raises Rejected, or Unavailable when it is
    the machine that fails, FileChanged among it.
    """
    machine, memory, commitment = ports.machine, memory_needed(entrant.facts, job.max_tokens), entrant.commitment
    while True:
        try:
            found = await ports.evaluator.evaluate(
                job, deadline_s=machine.evaluation_deadline_s, memory_bytes=memory, decide=decide
            )
        except (ChildEnded, Rejected) as error:
            if not _may_be_the_models(error, job):
                raise
            warn("retry", str(error), hotkey=commitment.hotkey)
            await ports.evaluator.self_test(device=machine.device, dtype=machine.dtype, threads=machine.threads)
            tries = ports.store.count_failure(commitment)
            if tries < 2 and isinstance(error, ChildEnded) and error.ending in _SLOW:
                _note_that_it_is_over(ports, commitment, block)
                raise _NextRound(error.what, f"{error.why}; tried once more in the next round") from None
            if tries < 2:
                continue
            raise _blame(error, machine) if isinstance(error, ChildEnded) else error from None
        ports.store.forget_failures(commitment)
        moved = f"later tokens move a logit by {found.probes.influence:.1g}, {found.probes.tolerance:.1g} is allowed"
        tell("probed", f"the same bits each time; {moved}", hotkey=commitment.hotkey, tensors=found.tensor_digest)
        return found


def _may_be_the_models(error: ChildEnded | Rejected, job: Job) -> bool:
    """Whether a failed evaluation can be the model's fault and the machine's. A plain refusal is the model's alone; a full or
    broken GPU or disk is ours alone, as is a tokenizer that is not the model's."""
    if isinstance(error, Rejected):
        return error.reason in _MAY_BE_OURS
    return error.ending not in _NEVER_THE_MODELS and (job.own_tokenizer or error.ending is not Ending.TOKENIZER)


def _note_that_it_is_over(ports: Ports, commitment: Commitment, block: int) -> None:
    row = Unanswered(commitment.hotkey, str(commitment.model), block, placed=True, over=True)
    ports.store.keep_unanswered([row], forget_before=block - EXCUSED_BLOCKS)


def _unless_it_is_over(ports: Ports, commitment: Commitment, block: int) -> None:
    """A round that waits for others is tried again and again; a slow model gets one try in it. Raises Unavailable."""
    if any(row.over for row in ports.store.unanswered(since=block, before=block + 1, model=commitment.model)):
        raise _NextRound("evaluation", "it took too long in this round; tried once more in the next round")


def _blame(error: ChildEnded, machine: Machine) -> Rejected:
    """What an evaluation that ended twice without a result says about the model."""
    if error.ending is Ending.TOKENIZER:
        return Rejected(Reason.TOKENIZER, error.why, "texts that are read in time")
    if error.ending in (Ending.DEADLINE, Ending.CPU_TIME):
        return Rejected(Reason.DEADLINE, error.why, f"{machine.evaluation_deadline_s:g} s")
    return Rejected(Reason.CRASHED, error.why, "a result")
