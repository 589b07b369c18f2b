"""One commitment's way: its metadata inspected, its files fetched, its losses measured; or the refusal, with both values.

What was seen of a revision is kept, because a revision does not change: in later rounds the Hub is asked one thing, whether
everybody can still read the repository. A refusal is for good, so none rests on one reply of the Hub alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from sn29.chain import Chain
from sn29.corpus import DataFiles
from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import (
    ChildEnded,
    Ending,
    Evaluated,
    FileChanged,
    Job,
    evaluate,
    memory_needed,
    self_test,
)
from sn29.hub import FileRefused, Hub, within
from sn29.models import checkpoint, fingerprint
from sn29.models.disk import Disk
from sn29.models.fetch import fetch
from sn29.records import Commitment, Loss, ModelFacts, ModelId, Outcome, RepoListing, Sample, Window
from sn29.rules.competition import Competition, FixedTokenizer, HallOfFame, named_start_token, tokenizer_for, violations
from sn29.rules.schedule import CompetitionFile, in_force, rules_for
from sn29.rules.selection import Claim, Inspected, Refusal, first_claims
from sn29.store import Store, StoredRepository, Unanswered
from sn29.telemetry import tell, warn

T = TypeVar("T")

# Refusals that the world can take back: they are looked at again in the next round, at the cost of one request.
_MAY_HEAL = {Reason.COPY, Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED, Reason.REVISION_GONE}

# Refusals that a failing machine can bring about as well: not believed before our own model has passed, twice.
_MAY_BE_OURS = {Reason.NOT_DETERMINISTIC, Reason.NOT_CAUSAL}

# Endings that say nothing of the model, however often they come. Nobody is refused for them.
_NEVER_THE_MODELS = {Ending.KILLED, Ending.DEVICE, Ending.DEVICE_MEMORY, Ending.MACHINE}

# Endings by time: what is slow now may be slow because of what else runs here, so the second try is a round later.
_SLOW = {Ending.DEADLINE, Ending.CPU_TIME, Ending.TOKENIZER}

EXCUSED_BLOCKS = 50_400
"""A week of 12 s blocks: so long it is remembered in which rounds a model did not answer."""

SOFTWARE = f"sn29 {version('sn29')}"
"""What was decided by other software is looked at again."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The competition files, and whose overrides count."""

    files: Mapping[str, CompetitionFile]
    """By competition name, sorted."""
    hall_of_fame: HallOfFame
    hashes: Mapping[str, str]
    """sha256 hex of each file by its stem: what was decided under other files is not taken over."""
    validator: str = ""
    """Hotkey of this validator."""

    def at(self, name: str, block: int) -> Competition:
        """What is in force at a block."""
        return in_force(self.files[name], block, self.validator)


@dataclass(frozen=True, slots=True)
class Machine:
    """How this validator evaluates: no rule, only what its hardware wants."""

    models_dir: Path
    records_dir: Path
    device: str
    dtype: str
    threads: int
    evaluation_deadline_s: float
    download_deadline_s: float
    models_bytes: int | None = None
    """What `models_dir` may hold; None: as much as its disk has, less a reserve."""
    silence_s: float = 20.0
    """Longest silence of the Hub in a download, before it is asked for the rest."""
    inspection_s: float = 60.0
    """For all that is asked of the Hub for one commitment before its weights: some 130 kB in 10 requests. One that hangs must
    not keep the round from the others, which are looked at one after the other: who came first decides what is a copy."""

    @property
    def work_dir(self) -> Path:
        """Where evaluations have their folders: beside the models, so that what a kill leaves is found and deleted."""
        return self.models_dir.parent / "evaluations"


class FixedText(NamedTuple):
    """The competition's own tokenizer, fetched and checked."""

    path: Path
    """Of tokenizer.json."""
    largest_id: int
    oid: str = ""
    """`sha256:...` of the file that was checked."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What a round needs from outside."""

    chain: Chain
    hub: Hub
    store: Store
    dataset: Callable[[Competition, int], DataFiles]
    """A competition's evaluation text: its data set of that index."""
    tokenizer: Callable[[FixedTokenizer], FixedText]
    """A fixed tokenizer, its fingerprint checked."""
    machine: Machine


@dataclass(frozen=True, slots=True)
class Entrant:
    """A commitment whose metadata passed every rule."""

    commitment: Commitment
    facts: ModelFacts
    listing: RepoListing
    admitting: Competition
    """The rules that it was admitted by: grace may make them wider than those in force."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of one entrant."""

    outcome: Outcome
    losses: tuple[Loss, ...] = ()
    """Of the window's samples, in their order; empty unless it was evaluated."""
    is_over: bool = False
    """It gave nothing, and is tried again in the next round only: no use to wait for it."""


class _NextRound(Unavailable):
    """Said of an evaluation that may succeed in the next round and not in this one."""


async def inspect(
    ports: Ports,
    rules: Rules,
    competition: Competition,
    window: Window,
    commitment: Commitment,
    largest_id: int | None,
    *,
    since: int | None = None,
    earlier: Mapping[str, Claim] = MappingProxyType({}),
    block: int | None = None,
) -> Entrant | Inspected | Outcome:
    """Everything that metadata can show; an `Inspected` alone for one whose files others claimed before.

    What is known of the revision is not asked for again: one request without a body then tells whether it is still public.
    What is new costs its list of files, 2 kB, and about 100 kB more unless it is a copy. `largest_id` is the largest id of
    the competition's own tokenizer, if it has one; `since` is what `claimed_since` says; `earlier` are the claims so far;
    `block` is the round's (default: the window's). Takes at most `Machine.inspection_s`.
    """
    hotkey = commitment.hotkey
    admitting = rules_for(rules.files[competition.name], commitment.block, window.seed.block, rules.validator)
    known = ports.store.verdict(hotkey, commitment.block, commitment.encode(), _terms(ports, admitting))
    if known is not None:
        tell("remembered", "refused before: not looked at again", hotkey=hotkey, reason=known.reason)
        return known

    def accept(facts: ModelFacts) -> None:
        shared = tokenizer_for(admitting, facts.has_tokenizer) is not None
        for violation in violations(admitting, facts, largest_id if shared else None):
            raise violation

    kept = ports.store.repository(commitment.model, read_by=SOFTWARE)
    listed = _listed(ports, commitment, window.seed.block if block is None else block)
    try:
        with within(ports.machine.inspection_s):
            listing = kept.listing if kept else await _listing(ports, commitment)
            try:
                seen = _of_commitment(listing, commitment, since)
                if first_claims([seen], earlier).refused:
                    if kept is None:
                        ports.store.keep_repository(listing, None, read_by=SOFTWARE)
                    return seen
                facts = await _facts(ports, listing, kept, accept, listed)
            except Rejected as error:
                if error.reason not in _MAY_HEAL and (kept is None or kept.facts is None):
                    await _confirm(ports, listing)
                raise
    except Rejected as error:
        return _refuse(ports, admitting, commitment, error)
    except Unavailable as error:
        return put_off(commitment, error)
    what = "inspected before, and still public" if kept and kept.facts else f"{facts.num_parameters:,} parameters: allowed"
    tell("inspected", f"{facts.family}, {what}", hotkey=hotkey, competition=competition.name)
    return Entrant(commitment, facts, listing, admitting)


def _of_commitment(listing: RepoListing, commitment: Commitment, since: int | None) -> Inspected:
    """What the files are, if they are the ones that the commitment claims. Raises Rejected(DIGEST | MISSING_FILE)."""
    content = checkpoint.content_id(listing.files)
    expected = checkpoint.digest(content, commitment.hotkey)
    if commitment.digest != expected:
        raise Rejected(Reason.DIGEST, commitment.digest, expected, commitment.hotkey)
    return Inspected(commitment, content, (checkpoint.weights_id(listing.files),), since)


async def _listing(ports: Ports, commitment: Commitment) -> RepoListing:
    """The files at the revision. A list that is itself what is wrong must come twice, as `_confirm` asks of all others."""
    try:
        return await asyncio.to_thread(ports.hub.listing, commitment.model)
    except Rejected as error:
        if error.reason in _MAY_HEAL:
            raise
        warn("hub retry", f"{error}; listed again before it counts", hotkey=commitment.hotkey)
        return await asyncio.to_thread(ports.hub.listing, commitment.model)


async def _facts(
    ports: Ports,
    listing: RepoListing,
    kept: StoredRepository | None,
    accept: Callable[[ModelFacts], None],
    listed: _Listed,
) -> ModelFacts:
    """What the metadata says, if it is allowed, of a repository that everybody can read now; the weights' fingerprint is
    taken with it. Raises Rejected, Unavailable."""
    reader, seen = ports.hub.reader(listing), {}

    def read(path: str, start: int, length: int) -> bytes:
        seen[path, start, length] = data = listed(lambda: reader(path, start, length))
        return data

    def look_up(path: str, start: int, length: int) -> bytes:
        return seen[path, start, length] if (path, start, length) in seen else listed(lambda: reader(path, start, length))

    if kept is not None and kept.facts is not None:
        facts = kept.facts
        await asyncio.to_thread(listed, lambda: ports.hub.alive(listing.model))
        accept(facts)
    else:
        facts = await asyncio.to_thread(checkpoint.inspect, listing, read, accept)
        ports.store.keep_repository(listing, facts, read_by=SOFTWARE)
    if ports.store.fingerprint(facts.content_id) is None:
        try:
            taken = await asyncio.to_thread(fingerprint.take, listing.files, look_up, facts.num_layers)
            ports.store.keep_fingerprint(facts.content_id, fingerprint.encode(taken))
        except (Unavailable, Rejected) as error:  # it decides nothing: the model is judged without it
            # Its spans have no hash: of headers that were right when they were read for the facts nothing is believed now.
            if isinstance(error, Rejected) and error.reason in _MAY_HEAL:
                raise
            warn("no_fingerprint", str(error))
    return facts


@dataclass(frozen=True, slots=True)
class _Listed:
    """Calls for files that the Hub has listed. One that it does not give any more is a part of the revision that is gone, and
    it may come back."""

    hub: Hub
    model: ModelId
    was_unanswered: bool
    """In an earlier round: a store that refuses for a while, by its own fault, must not cost anybody his place."""

    def __call__(self, call: Callable[[], T]) -> T:
        """In a thread: it may ask the Hub. Raises what the call raises, and Rejected(REVISION_GONE)."""
        try:
            return call()
        except Rejected as error:
            if error.reason is not Reason.MISSING_FILE:
                raise
            raise Rejected(Reason.REVISION_GONE, error.got, error.limit, error.where) from None
        except FileRefused as error:
            if not self.was_unanswered:
                raise
            self.hub.alive(self.model)
            limit = "every file that the Hub lists, also from its store"
            raise Rejected(Reason.REVISION_GONE, f"{error.why}, as in an earlier round", limit, error.what) from None


def _listed(ports: Ports, commitment: Commitment, block: int) -> _Listed:
    """For the round of `block`."""
    before = ports.store.unanswered(since=block - EXCUSED_BLOCKS, before=block, model=commitment.model)
    return _Listed(ports.hub, commitment.model, bool(before))


async def _confirm(ports: Ports, listing: RepoListing) -> None:
    """A list of files has no hash: before it is held against a miner it must come twice. Raises Unavailable, Rejected."""
    if await asyncio.to_thread(ports.hub.listing, listing.model) != listing:
        raise Unavailable(str(listing.model), "the Hub listed other files the second time")


def _terms(ports: Ports, admitting: Competition) -> str:
    """What a refusal holds under: with other rules, device, number format or deadline the model is looked at again."""
    machine = ports.machine
    terms = f"{SOFTWARE} {admitting.model_dump_json()} {machine.device} {machine.dtype} {machine.evaluation_deadline_s}"
    return hashlib.sha256(terms.encode()).hexdigest()


def _refuse(ports: Ports, admitting: Competition, commitment: Commitment, error: Rejected) -> Outcome:
    """The refusal, remembered unless the world can take it back."""
    outcome = refused(commitment.hotkey, commitment.competition, commitment.block, str(commitment.model), error)
    if error.reason not in _MAY_HEAL:
        ports.store.keep_verdict(outcome, commitment.encode(), _terms(ports, admitting))
    return outcome


async def measure(
    ports: Ports,
    competition: Competition,
    entrant: Entrant,
    samples: tuple[Sample, ...],
    block: int,
    paid: Collection[str] = (),
) -> Measured:
    """The losses of one model on the window's samples, in the round of `block`; from the store where they are known.

    The digest of its tensors is in the store afterwards if it was ever evaluated. `paid` are the contents that earn: they
    go last when its files need the place of others.
    """
    commitment, content = entrant.commitment, entrant.facts.content_id
    tokenizer_id = tokenizer_id_of(competition, entrant)
    start_token = start_token_of(competition, entrant.facts)
    device = ports.machine.device.partition(":")[0]
    profile = f"{device} {ports.machine.dtype} start={start_token} max_tokens={competition.limits.max_tokens} plain-1"
    try:
        known = ports.store.losses(content, tokenizer_id, profile, [s.id for s in samples])
        missing = tuple(s for s in samples if s.id not in known)
        if missing or ports.store.tensor_digest(content) is None:
            found = await _fetch_and_evaluate(ports, competition, entrant, missing, block, paid)
            ports.store.keep_losses(content, tokenizer_id, profile, found.losses)
            ports.store.keep_tensor_digest(content, found.tensor_digest, block)
            known |= {loss.sample: loss for loss in found.losses}
    except Rejected as error:
        outcome = _refuse(ports, entrant.admitting, commitment, error)
        say_refused([outcome])
        return Measured(outcome)
    except Unavailable as error:
        return Measured(put_off(commitment, error), is_over=isinstance(error, _NextRound))
    tell(
        "evaluated", f"{len(missing)} samples measured, {len(samples) - len(missing)} known",
        hotkey=commitment.hotkey, competition=competition.name, measured=len(missing), known=len(samples) - len(missing),
    )  # fmt: skip
    losses = tuple(known[s.id] for s in samples)
    own = tokenizer_for(competition, entrant.facts.has_tokenizer) is None
    failure = unfit(losses, competition.limits.round_trip_failures, competition.limits.unscored, own_tokenizer=own)
    if failure is not None:  # of this window's samples, so it is not remembered
        outcome = refused(commitment.hotkey, competition.name, commitment.block, str(commitment.model), failure)
        say_refused([outcome])
        return Measured(outcome)
    outcome = Outcome(
        commitment.hotkey, competition.name, commitment.block, "evaluated", str(commitment.model), content_id=content
    )
    return Measured(outcome, losses)


def unfit(
    losses: Sequence[Loss], round_trip_failures: int, unscored: float = 1.0, *, own_tokenizer: bool = True
) -> Rejected | None:
    """Why a model with these losses is out, if it is: decided over the whole window, however much of it was known before.

    For `unscored` see `rules.competition.Limits`.
    """
    reasons = [loss.reason for loss in losses]
    lost, not_finite = reasons.count(Reason.ROUND_TRIP.code), reasons.count("not_finite")
    if lost > round_trip_failures:
        return Rejected(Reason.ROUND_TRIP, f"{lost} samples", f"at most {round_trip_failures}")
    if losses and not any(math.isfinite(loss.nats) for loss in losses):
        return Rejected(Reason.NOT_FINITE, "no finite loss on any sample", "finite losses")
    too_long = reasons.count("too_long") if own_tokenizer else 0
    if not_finite + too_long > unscored * len(losses):
        reason = Reason.NOT_FINITE if not_finite >= too_long else Reason.TOKENIZER
        got = f"{not_finite:,} samples with no finite loss and {too_long:,} of too many tokens, of {len(losses):,}"
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


async def _fetch_and_evaluate(
    ports: Ports, competition: Competition, entrant: Entrant, samples: tuple[Sample, ...], block: int, paid: Collection[str]
) -> Evaluated:
    """The model's files brought here, and what the child finds in them; nobody deletes them meanwhile.

    A file that the child finds changed is our disk's fault: it is fetched once more. Raises Rejected, Unavailable.
    """
    machine, facts = ports.machine, entrant.facts
    _unless_it_is_over(ports, entrant.commitment, block)
    fixed = await _fixed_text(ports, tokenizer_for(competition, facts.has_tokenizer))
    disk = Disk(machine.models_dir, budget_bytes=machine.models_bytes, say=tell)
    try:
        with disk.using(facts.content_id) as folder:
            job = Job(
                checkpoint=str(folder.absolute()),
                tokenizer=str((fixed.path if fixed else folder / "tokenizer.json").absolute()),
                tokenizer_oid=fixed.oid if fixed else "",
                start_token=start_token_of(competition, facts),
                max_tokens=competition.limits.max_tokens,
                dtype=machine.dtype,
                device=machine.device,
                threads=machine.threads,
                samples=samples,
                files=tuple(f for f in entrant.listing.files if checkpoint.is_content(f.path)),
            )
            await _fetch(ports, entrant, folder, block, lambda num_bytes: disk.make_room(num_bytes, paid))
            try:
                return await _evaluate(ports, entrant, job, block)
            except FileChanged as error:
                if error.path not in {file.path for file in job.files}:  # the name is the child's: we delete none but these
                    raise
                warn("disk", f"{error}; thrown away", hotkey=entrant.commitment.hotkey)
                _throw_away(folder / error.path)
                await _fetch(ports, entrant, folder, block, lambda num_bytes: disk.make_room(num_bytes, paid))
                return await _evaluate(ports, entrant, job, block)
    except OSError as error:
        raise Unavailable("disk", str(error)) from None


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


async def _fetch(ports: Ports, entrant: Entrant, folder: Path, block: int, room: Callable[[int], object]) -> None:
    """The model's verified files in their folder, one a content: two commitments of one content share it."""
    received, cancelled = 0, threading.Event()

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        if cancelled.is_set():  # a thread cannot be stopped from outside: it stops itself at the next piece
            raise Unavailable("download", "the validator is stopping")

    machine, listed = ports.machine, _listed(ports, entrant.commitment, block)
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


async def _evaluate(ports: Ports, entrant: Entrant, job: Job, block: int) -> Evaluated:
    """What the child found. A failure that may be the model's is tried once more: at once, or in the next round if it is one
    of time.

    Before the model is blamed, a model of our own must pass on this machine. Raises Rejected, or Unavailable when it is
    the machine that fails, FileChanged among it.
    """
    machine, memory, commitment = ports.machine, memory_needed(entrant.facts, job.max_tokens), entrant.commitment
    while True:
        try:
            found = await evaluate(job, deadline_s=machine.evaluation_deadline_s, memory_bytes=memory, work_dir=machine.work_dir)
        except (ChildEnded, Rejected) as error:
            if not _may_be_the_models(error, job):
                raise
            warn("retry", str(error), hotkey=commitment.hotkey)
            await self_test(device=machine.device, dtype=machine.dtype, threads=machine.threads, work_dir=machine.work_dir)
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


def refused(hotkey: str, competition: str, block: int, model: str, error: Rejected) -> Outcome:
    return Outcome(
        hotkey,
        competition,
        block,
        "rejected",
        model,
        reason=error.reason.code,
        detail=str(error),
        got=error.got,
        limit=error.limit,
    )


def say_refused(outcomes: Iterable[Outcome]) -> None:
    for o in outcomes:
        if o.status == "rejected":
            warn("refused", o.detail, hotkey=o.hotkey, competition=o.competition, reason=o.reason)


def outcome_of(refusal: Refusal) -> Outcome:
    c = refusal.commitment
    return refused(c.hotkey, c.competition, c.block, str(c.model), refusal.failure)


def put_off(c: Commitment, error: Unavailable) -> Outcome:
    warn("unavailable", str(error), hotkey=c.hotkey, competition=c.competition)
    return Outcome(c.hotkey, c.competition, c.block, "unavailable", str(c.model), reason="unavailable", detail=str(error))
