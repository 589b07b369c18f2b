"""One commitment's way: its metadata inspected, its files fetched, its losses measured; or the refusal, with both values."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sn29.chain import Chain
from sn29.corpus import DataFiles
from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import Job, TooLate, evaluate, memory_needed, self_test
from sn29.hub import Hub
from sn29.models import checkpoint
from sn29.models.fetch import fetch
from sn29.records import Commitment, Loss, ModelFacts, Outcome, RepoListing, Sample, Window
from sn29.rules.competition import Competition, FixedTokenizer, HallOfFame, named_start_token, tokenizer_for, violations
from sn29.rules.schedule import CompetitionFile, in_force, rules_for
from sn29.rules.selection import Refusal
from sn29.store import Store
from sn29.telemetry import tell, warn

# Refusals that the world can take back: they are looked at again in the next round, at the cost of one request.
_MAY_HEAL = {Reason.COPY, Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED, Reason.REVISION_GONE}


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


async def inspect(
    ports: Ports, rules: Rules, competition: Competition, window: Window, commitment: Commitment, largest_id: int | None
) -> Entrant | Outcome:
    """Everything that metadata can show. One request to the Hub for what is known already, about 100 kB for what is new.

    `largest_id` is the largest id of the competition's own tokenizer, if it has one.
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

    try:
        listing = await asyncio.to_thread(ports.hub.listing, commitment.model)
        expected = checkpoint.digest(checkpoint.content_id(listing.files), hotkey)
        if commitment.digest != expected:
            raise Rejected(Reason.DIGEST, commitment.digest, expected, hotkey)
        facts = await asyncio.to_thread(checkpoint.inspect, listing, ports.hub.reader(commitment.model), accept)
    except Rejected as error:
        return _refuse(ports, admitting, commitment, error)
    except Unavailable as error:
        return put_off(commitment, error)
    tell(
        "inspected", f"{facts.family}, {facts.num_parameters:,} parameters: allowed", hotkey=hotkey, competition=competition.name
    )
    return Entrant(commitment, facts, listing, admitting)


def _terms(ports: Ports, admitting: Competition) -> str:
    """What a refusal holds under: with other rules, another device or number format the model is looked at again."""
    terms = f"{admitting.model_dump_json()} {ports.machine.device} {ports.machine.dtype}"
    return hashlib.sha256(terms.encode()).hexdigest()


def _refuse(ports: Ports, admitting: Competition, commitment: Commitment, error: Rejected) -> Outcome:
    """The refusal, remembered unless the world can take it back."""
    outcome = refused(commitment.hotkey, commitment.competition, commitment.block, str(commitment.model), error)
    if error.reason not in _MAY_HEAL:
        ports.store.keep_verdict(outcome, commitment.encode(), _terms(ports, admitting))
    return outcome


async def measure(
    ports: Ports, competition: Competition, entrant: Entrant, samples: tuple[Sample, ...]
) -> tuple[Outcome, tuple[Loss, ...]]:
    """The losses of one model on the window's samples, from the store where they are known."""
    commitment, content = entrant.commitment, entrant.facts.content_id
    fixed = tokenizer_for(competition, entrant.facts.has_tokenizer)
    tokenizer_id = tokenizer_id_of(competition, entrant)
    start_token = start_token_of(competition, entrant.facts)
    device = ports.machine.device.partition(":")[0]
    profile = f"{device} {ports.machine.dtype} start={start_token} max_tokens={competition.limits.max_tokens} plain-1"
    try:
        known = ports.store.losses(content, tokenizer_id, profile, [s.id for s in samples])
        missing = tuple(s for s in samples if s.id not in known)
        if missing:
            folder = await _fetch(ports, entrant)
            job = Job(
                checkpoint=str(folder.absolute()),
                tokenizer=str((ports.tokenizer(fixed)[0] if fixed else folder / "tokenizer.json").absolute()),
                start_token=start_token,
                max_tokens=competition.limits.max_tokens,
                dtype=ports.machine.dtype,
                device=ports.machine.device,
                threads=ports.machine.threads,
                samples=missing,
            )
            found = await _evaluate(ports, entrant, job)
            ports.store.keep_losses(content, tokenizer_id, profile, found)
            known |= {loss.sample: loss for loss in found}
    except Rejected as error:
        outcome = _refuse(ports, entrant.admitting, commitment, error)
        say_refused([outcome])
        return outcome, ()
    except Unavailable as error:
        return put_off(commitment, error), ()
    tell(
        "evaluated", f"{len(missing)} samples measured, {len(samples) - len(missing)} known",
        hotkey=commitment.hotkey, competition=competition.name, measured=len(missing), known=len(samples) - len(missing),
    )  # fmt: skip
    losses = tuple(known[s.id] for s in samples)
    failure = unfit(losses, competition.limits.round_trip_failures)
    if failure is not None:  # of this window's samples, so it is not remembered
        outcome = refused(commitment.hotkey, competition.name, commitment.block, str(commitment.model), failure)
        say_refused([outcome])
        return outcome, ()
    outcome = Outcome(
        commitment.hotkey, competition.name, commitment.block, "evaluated", str(commitment.model), content_id=content
    )
    return outcome, losses


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


async def _fetch(ports: Ports, entrant: Entrant) -> Path:
    """The model's verified files, one folder a content: two commitments of one content share it."""
    received, cancelled = 0, threading.Event()

    def count(num_bytes: int) -> None:
        nonlocal received
        received += num_bytes
        if cancelled.is_set():  # a thread cannot be stopped from outside: it stops itself at the next piece
            raise Unavailable("download", "the validator is stopping")

    folder = ports.machine.models_dir / entrant.facts.content_id
    deadline_s = ports.machine.download_deadline_s
    try:
        await asyncio.to_thread(
            fetch, ports.hub, entrant.listing, folder, only=checkpoint.is_content, deadline_s=deadline_s, progress=count
        )
    except OSError as error:
        raise Unavailable("disk", str(error)) from None
    finally:
        cancelled.set()
    what = f"{received:,} bytes downloaded, every file's hash checked" if received else "the files are here already"
    tell("fetched", what, hotkey=entrant.commitment.hotkey, bytes=received)
    return folder


async def _evaluate(ports: Ports, entrant: Entrant, job: Job) -> tuple[Loss, ...]:
    """The child's losses. A crash or a missed deadline is tried once more at once, so that all validators try alike.

    Before the model is blamed, a model of our own must pass on this machine. Raises Rejected(CRASHED | DEADLINE), else
    what the child found, or Unavailable when it is the machine that fails.
    """
    machine, memory = ports.machine, memory_needed(entrant.facts, job.max_tokens)
    while True:
        try:
            losses = await evaluate(job, deadline_s=machine.evaluation_deadline_s, memory_bytes=memory)
        except Unavailable as error:
            warn("retry", str(error), hotkey=entrant.commitment.hotkey)
            await self_test(device=machine.device, dtype=machine.dtype, threads=machine.threads)
            if ports.store.count_failure(entrant.commitment) < 2:
                continue
            if isinstance(error, TooLate):
                raise Rejected(Reason.DEADLINE, error.why, f"{machine.evaluation_deadline_s:.0f} s") from None
            raise Rejected(Reason.CRASHED, error.why, "a result") from None
        ports.store.forget_failures(entrant.commitment)
        return losses


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
