"""One commitment's way to its losses: everything that metadata shows, or the refusal, with both values.

What was seen of a revision is kept, because a revision does not change: in later rounds the Hub is asked one thing, whether
everybody can still read the repository. A refusal is for good, so none rests on one reply of the Hub alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from sn29.chain import Chain
from sn29.corpus import DataFiles
from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import Evaluator
from sn29.hub import FileRefused, Hub, within
from sn29.models import checkpoint, fingerprint
from sn29.records import Commitment, ModelFacts, ModelId, Outcome, RepoListing, Window
from sn29.rules.competition import Competition, FixedTokenizer, HallOfFame, tokenizer_for, violations
from sn29.rules.schedule import CompetitionFile, in_force, rules_for
from sn29.rules.selection import Claim, Inspected, Refusal, first_claims
from sn29.store import Store, StoredRepository
from sn29.telemetry import tell, warn

T = TypeVar("T")

# Refusals that the world can take back: they are looked at again in the next round, at the cost of one request.
_MAY_HEAL = {Reason.COPY, Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED, Reason.REVISION_GONE}

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
    model_bytes: int | None = None
    """What one model may take of the device's memory; a larger one is streamed. None: all that there is."""
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
    evaluator: Evaluator
    """This machine, or a fleet of them."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A commitment whose metadata passed every rule."""

    commitment: Commitment
    facts: ModelFacts
    listing: RepoListing
    admitting: Competition
    """The rules that it was admitted by: grace may make them wider than those in force."""


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
    listed = listed_files(ports, commitment, window.seed.block if block is None else block)
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
        return refuse(ports, admitting, commitment, error)
    except Unavailable as error:
        return put_off(commitment, error)
    what = "inspected before, and still public" if kept and kept.facts else f"{facts.num_parameters:,} parameters: allowed"
    tell(
        "inspected", f"{facts.family}, {what}", hotkey=hotkey, competition=competition.name, model=commitment.model,
        block=commitment.block,
    )  # fmt: skip
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
        warn("hub_retry", f"{error}; listed again before it counts", hotkey=commitment.hotkey)
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
            warn("no_fingerprint", str(error), model=listing.model)
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


def listed_files(ports: Ports, commitment: Commitment, block: int) -> _Listed:
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


def refuse(ports: Ports, admitting: Competition, commitment: Commitment, error: Rejected) -> Outcome:
    """The refusal, remembered unless the world can take it back."""
    outcome = refused(commitment.hotkey, commitment.competition, commitment.block, str(commitment.model), error)
    if error.reason not in _MAY_HEAL:
        ports.store.keep_verdict(outcome, commitment.encode(), _terms(ports, admitting))
    return outcome


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


def say_outcomes(outcomes: Iterable[Outcome]) -> None:
    """What became of commitments whose way ends here in this round: refused, or waiting for something."""
    for o in outcomes:
        facts = {"hotkey": o.hotkey, "competition": o.competition, "reason": o.reason, "model": o.model}
        if o.status == "rejected":
            warn("refused", o.detail, **facts)
        elif o.status == "waiting":
            tell("waiting", o.detail, **facts)


def outcome_of(refusal: Refusal) -> Outcome:
    c = refusal.commitment
    return refused(c.hotkey, c.competition, c.block, str(c.model), refusal.failure)


def put_off(c: Commitment, error: Unavailable) -> Outcome:
    warn("unavailable", str(error), hotkey=c.hotkey, competition=c.competition, model=c.model)
    return Outcome(c.hotkey, c.competition, c.block, "unavailable", str(c.model), reason="unavailable", detail=str(error))
