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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

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
from sn29.hub import Hub
from sn29.models import checkpoint, fingerprint
from sn29.models.disk import Disk
from sn29.models.fetch import fetch
from sn29.records import Commitment, Loss, ModelFacts, Outcome, RepoListing, Sample, Window
from sn29.rules.competition import Competition, FixedTokenizer, HallOfFame, named_start_token, tokenizer_for, violations
from sn29.rules.schedule import CompetitionFile, in_force, rules_for
from sn29.rules.selection import Claim, Inspected, Refusal, first_claims
from sn29.store import Store, StoredRepository
from sn29.telemetry import tell, warn

# Refusals that the world can take back: they are looked at again in the next round, at the cost of one request.
_MAY_HEAL = {Reason.COPY, Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED, Reason.REVISION_GONE}

# Refusals that a failing machine can bring about as well: not believed before our own model has passed, twice.
_MAY_BE_OURS = {Reason.NOT_DETERMINISTIC, Reason.NOT_CAUSAL}

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


@dataclass(frozen=True, slots=True)
class Ports:
    """What a round needs from outside."""

    chain: Chain
    hub: Hub
    store: Store
    dataset: Callable[[Competition, int], DataFiles]
    """A competition's evaluation text: its data set of that index."""
    tokenizer: Callable[[FixedTokenizer], tuple[Path, int]]
    """Path of a fixed tokenizer, fingerprint checked, and its largest id."""
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
) -> Entrant | Inspected | Outcome:
    """Everything that metadata can show; an `Inspected` alone for one whose files others claimed before.

    What is known of the revision is not asked for again: one request without a body then tells whether it is still public.
    What is new costs its list of files, 2 kB, and about 100 kB more unless it is a copy. `largest_id` is the largest id of
    the competition's own tokenizer, if it has one; `since` is what `claimed_since` says; `earlier` are the claims so far.
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
    try:
        listing = kept.listing if kept else await asyncio.to_thread(ports.hub.listing, commitment.model)
        try:
            seen = _of_commitment(listing, commitment, since)
            if first_claims([seen], earlier).refused:
                if kept is None:
                    ports.store.keep_repository(listing, None, read_by=SOFTWARE)
                return seen
            facts = await _facts(ports, listing, kept, accept)
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


async def _facts(
    ports: Ports, listing: RepoListing, kept: StoredRepository | None, accept: Callable[[ModelFacts], None]
) -> ModelFacts:
    """What the metadata says, if it is allowed, of a repository that everybody can read now; the weights' fingerprint is
    taken with it. Raises Rejected, Unavailable."""
    reader, seen = ports.hub.reader(listing), {}

    def read(path: str, start: int, length: int) -> bytes:
        with _listed():
            seen[path, start, length] = data = reader(path, start, length)
        return data

    def look_up(path: str, start: int, length: int) -> bytes:
        return seen[path, start, length] if (path, start, length) in seen else reader(path, start, length)

    if kept is not None and kept.facts is not None:
        facts = kept.facts
        with _listed():
            await asyncio.to_thread(ports.hub.alive, listing.model)
        accept(facts)
    else:
        facts = await asyncio.to_thread(checkpoint.inspect, listing, read, accept)
        ports.store.keep_repository(listing, facts, read_by=SOFTWARE)
    if ports.store.fingerprint(facts.content_id) is None:
        try:
            with _listed():
                taken = await asyncio.to_thread(fingerprint.take, listing.files, look_up, facts.num_layers)
            ports.store.keep_fingerprint(facts.content_id, fingerprint.encode(taken))
        except Unavailable as error:  # it decides nothing: the model is judged without it
            warn("no_fingerprint", str(error))
    return facts


@contextmanager
def _listed() -> Iterator[None]:
    """A listed file that the Hub does not find any more: a part of the revision is gone, and it may come back."""
    try:
        yield
    except Rejected as error:
        if error.reason is not Reason.MISSING_FILE:
            raise
        raise Rejected(Reason.REVISION_GONE, error.got, error.limit, error.where) from None


async def _confirm(ports: Ports, listing: RepoListing) -> None:
    """A list of files has no hash: before it is held against a miner it must come twice. Raises Unavailable, Rejected."""
    if await asyncio.to_thread(ports.hub.listing, listing.model) != listing:
        raise Unavailable(str(listing.model), "the Hub listed other files the second time")


def _terms(ports: Ports, admitting: Competition) -> str:
    """What a refusal holds under: with other rules, another device or number format the model is looked at again."""
    terms = f"{SOFTWARE} {admitting.model_dump_json()} {ports.machine.device} {ports.machine.dtype}"
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
            found = await _fetch_and_evaluate(ports, competition, entrant, missing, paid)
            ports.store.keep_losses(content, tokenizer_id, profile, found.losses)
            ports.store.keep_tensor_digest(content, found.tensor_digest, block)
            known |= {loss.sample: loss for loss in found.losses}
    except Rejected as error:
        outcome = _refuse(ports, entrant.admitting, commitment, error)
        say_refused([outcome])
        return Measured(outcome)
    except Unavailable as error:
        return Measured(put_off(commitment, error))
    tell(
        "evaluated", f"{len(missing)} samples measured, {len(samples) - len(missing)} known",
        hotkey=commitment.hotkey, competition=competition.name, measured=len(missing), known=len(samples) - len(missing),
    )  # fmt: skip
    losses = tuple(known[s.id] for s in samples)
    failure = unfit(losses, competition.limits.round_trip_failures)
    if failure is not None:  # of this window's samples, so it is not remembered
        outcome = refused(commitment.hotkey, competition.name, commitment.block, str(commitment.model), failure)
        say_refused([outcome])
        return Measured(outcome)
    outcome = Outcome(
        commitment.hotkey, competition.name, commitment.block, "evaluated", str(commitment.model), content_id=content
    )
    return Measured(outcome, losses)


def unfit(losses: Sequence[Loss], round_trip_failures: int) -> Rejected | None:
    """Why a model with these losses is out, if it is: decided over the whole window, however much of it was known before."""
    failures = sum(loss.reason == Reason.ROUND_TRIP.code for loss in losses)
    if failures > round_trip_failures:
        return Rejected(Reason.ROUND_TRIP, f"{failures} samples", f"at most {round_trip_failures}")
    if losses and not any(math.isfinite(loss.nats) for loss in losses):
        return Rejected(Reason.NOT_FINITE, "no finite loss on any sample", "finite losses")
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
    ports: Ports, competition: Competition, entrant: Entrant, samples: tuple[Sample, ...], paid: Collection[str]
) -> Evaluated:
    """The model's files brought here, and what the child finds in them; nobody deletes them meanwhile.

    A file that the child finds changed is our disk's fault: it is fetched once more. Raises Rejected, Unavailable.
    """
    machine, facts = ports.machine, entrant.facts
    fixed = tokenizer_for(competition, facts.has_tokenizer)
    disk = Disk(machine.models_dir, budget_bytes=machine.models_bytes, say=tell)
    try:
        with disk.using(facts.content_id) as folder:
            job = Job(
                checkpoint=str(folder.absolute()),
                tokenizer=str((ports.tokenizer(fixed)[0] if fixed else folder / "tokenizer.json").absolute()),
                start_token=start_token_of(competition, facts),
                max_tokens=competition.limits.max_tokens,
                dtype=machine.dtype,
                device=machine.device,
                threads=machine.threads,
                samples=samples,
                files=tuple(f for f in entrant.listing.files if checkpoint.is_content(f.path)),
            )
            await _fetch(ports, entrant, folder, lambda num_bytes: disk.make_room(num_bytes, paid))
            try:
                return await _evaluate(ports, entrant, job)
            except FileChanged as error:
                if error.path not in {file.path for file in job.files}:  # the name is the child's: we delete none but these
                    raise
                warn("disk", f"{error}; thrown away", hotkey=entrant.commitment.hotkey)
                _throw_away(folder / error.path)
                await _fetch(ports, entrant, folder, lambda num_bytes: disk.make_room(num_bytes, paid))
                return await _evaluate(ports, entrant, job)
    except OSError as error:
        raise Unavailable("disk", str(error)) from None


def _throw_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


async def _fetch(ports: Ports, entrant: Entrant, folder: Path, room: Callable[[int], object]) -> None:
    """The model's verified files in their folder, one a content: two commitments of one content share it."""
    received, cancelled = 0, threading.Event()

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        if cancelled.is_set():  # a thread cannot be stopped from outside: it stops itself at the next piece
            raise Unavailable("download", "the validator is stopping")

    machine = ports.machine
    try:
        with _listed():
            await asyncio.to_thread(
                fetch, ports.hub, entrant.listing, folder,
                only=checkpoint.is_content, deadline_s=machine.download_deadline_s, silence_s=machine.silence_s,
                progress=count, room=room, say=warn,
            )  # fmt: skip
    finally:
        cancelled.set()
    what = f"{received:,} bytes downloaded, every file's hash checked" if received else "the files are here already"
    tell("fetched", what, hotkey=entrant.commitment.hotkey, bytes=received)


async def _evaluate(ports: Ports, entrant: Entrant, job: Job) -> Evaluated:
    """What the child found. A failure that may be the machine's is tried once more at once, so that all validators try alike.

    Before the model is blamed, a model of our own must pass on this machine. Raises Rejected, or Unavailable when it is
    the machine that fails, FileChanged among it.
    """
    machine, memory = ports.machine, memory_needed(entrant.facts, job.max_tokens)
    while True:
        try:
            found = await evaluate(job, deadline_s=machine.evaluation_deadline_s, memory_bytes=memory)
        except (ChildEnded, Rejected) as error:
            if isinstance(error, Rejected) and error.reason not in _MAY_BE_OURS:
                raise
            if isinstance(error, ChildEnded) and error.ending is Ending.KILLED:  # no model can do that: somebody else did
                raise
            warn("retry", str(error), hotkey=entrant.commitment.hotkey)
            await self_test(device=machine.device, dtype=machine.dtype, threads=machine.threads)
            if ports.store.count_failure(entrant.commitment) < 2:
                continue
            raise _blame(error, machine) if isinstance(error, ChildEnded) else error from None
        ports.store.forget_failures(entrant.commitment)
        moved = f"later tokens move a logit by {found.probes.influence:.1g}, {found.probes.tolerance:.1g} is allowed"
        tell("probed", f"the same bits each time; {moved}", hotkey=entrant.commitment.hotkey, tensors=found.tensor_digest)
        return found


def _blame(error: ChildEnded, machine: Machine) -> Rejected:
    """What an evaluation that ended twice without a result says about the model."""
    if error.ending is Ending.TOKENIZER:
        return Rejected(Reason.TOKENIZER, error.why, "texts that are read in time")
    if error.ending in (Ending.DEADLINE, Ending.CPU_TIME):
        return Rejected(Reason.DEADLINE, error.why, f"{machine.evaluation_deadline_s:.0f} s")
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
