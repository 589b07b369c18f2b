"""A miner's submission, from a folder to a commitment on chain, as one story.

    check     what a validator would check, on the folder: metadata, rules, then a child process that loads and evaluates
    submit    upload as one commit, private -> the same checks on what the Hub now has -> commit on chain -> read back -> public

Every step may be repeated: an upload of the same files makes no new revision, a commitment that already stands on chain
is not written again (it would only make the model younger).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from sn29.chain import Chain
from sn29.errors import Reason, Rejected
from sn29.evaluation.worker import Job, evaluate, memory_needed
from sn29.examination import start_token_of, unfit
from sn29.hub import Hub
from sn29.models import checkpoint
from sn29.models.checkpoint import Read
from sn29.records import Commitment, Loss, ModelFacts, ModelId, RepoListing, Sample
from sn29.rules.competition import Competition, violations
from sn29.telemetry import tell

# Texts that a tokenizer must give back and a model must be able to score: plain words, line ends, scripts, a special token.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\r\nline ends\n\n",
    "naïve façade, Ελληνικά, русский, 日本語, العربية, 👩‍👩‍👧",
    "x = {'a': 1.5e-3, \"b\": [0x1F, None]}  # code",
    "literally <|endoftext|> and </s>",
)


@dataclass(frozen=True, slots=True)
class FixedText:
    """The competition's own tokenizer, fetched and checked."""

    path: Path
    largest_id: int


@dataclass(frozen=True, slots=True)
class Checked:
    """The answer of the checks."""

    facts: ModelFacts | None
    """None when the metadata could not even be read."""
    refusals: tuple[Rejected, ...]
    """Empty: allowed."""
    losses: tuple[Loss, ...] = ()
    """Of the probe texts, when the model was loaded."""


def inspect(listing: RepoListing, read: Read, competition: Competition, fixed: FixedText | None) -> Checked:
    """The checks that need no weights, as a validator runs them."""
    try:
        facts = checkpoint.inspect(listing, read)
    except Rejected as error:
        return Checked(None, (error,))
    return Checked(facts, violations(competition, facts, fixed.largest_id if fixed else None))


async def check(folder: Path, competition: Competition, fixed: FixedText | None, *, threads: int, deadline_s: float) -> Checked:
    """All checks on a folder: those of the metadata, then the child process of the validator on probe texts.

    Raises Unavailable when the child gave no answer.
    """
    checked = inspect(checkpoint.local_listing(folder), checkpoint.local_reader(folder), competition, fixed)
    if checked.facts is None or checked.refusals:
        return checked
    facts = checked.facts
    job = Job(
        checkpoint=str(folder.absolute()),
        tokenizer=str((fixed.path if fixed else folder / "tokenizer.json").absolute()),
        start_token=start_token_of(competition, facts),
        max_tokens=competition.limits.max_tokens,
        dtype="bfloat16",
        device="cpu",
        threads=threads,
        samples=tuple(Sample(f"{i:032x}", text) for i, text in enumerate(PROBES)),
    )
    try:
        losses = await evaluate(job, deadline_s=deadline_s, memory_bytes=memory_needed(facts, 512))
    except Rejected as error:
        return Checked(facts, (error,))
    failure = unfit(losses, competition.limits.round_trip_failures)
    return Checked(facts, (failure,) if failure else (), losses)


async def submit(
    chain: Chain,
    hub: Hub,
    folder: Path,
    repo: str,
    competition: Competition,
    fixed: FixedText | None,
    *,
    force: bool = False,
) -> Commitment:
    """Publishes the folder and commits to it. Raises Rejected when the rules refuse what was uploaded (unless forced)."""
    namespace, _, name = repo.partition("/")
    largest = Commitment(chain.hotkey, 0, ModelId(namespace, name, "0" * 40), checkpoint.digest("", ""), competition.name)
    largest.encode()  # too long a name is said before anything is uploaded
    standing = {c.hotkey: c for c in await chain.commitments()}.get(chain.hotkey)
    stands_here = standing is not None and f"{namespace}:{name}:".encode() in standing.data
    # Private until the commitment stands: whoever sees the files first could commit them under another hotkey.
    await asyncio.to_thread(hub.create, repo, private=True)
    await asyncio.to_thread(hub.set_private, repo, True)
    try:
        commitment = await _publish(chain, hub, folder, ModelId(namespace, name, "0" * 40), competition, fixed, force=force)
        stands_here = True
    finally:
        if stands_here:  # also when an update was refused: what stands on chain must stay visible
            await asyncio.to_thread(hub.set_private, repo, False)
    tell("public", f"{commitment.model} can be seen by everybody", hotkey=chain.hotkey)
    return commitment


async def _publish(
    chain: Chain, hub: Hub, folder: Path, model: ModelId, competition: Competition, fixed: FixedText | None, *, force: bool
) -> Commitment:
    """Upload, check, commit, read back, on a repository that only its owner can see."""
    message = f"model for {competition.name}"
    revision = await asyncio.to_thread(hub.upload, model.repo, folder, message=message)
    model = replace(model, revision=revision)
    tell("uploaded", f"{model}", hotkey=chain.hotkey, competition=competition.name)
    listing = await asyncio.to_thread(lambda: hub.listing(model, as_owner=True))
    checked = await asyncio.to_thread(inspect, listing, hub.reader(model, as_owner=True), competition, fixed)
    if checked.refusals and not force:
        raise checked.refusals[0]
    digest = checkpoint.digest(checkpoint.content_id(listing.files), chain.hotkey)
    data = Commitment(chain.hotkey, 0, model, digest, competition.name).encode()
    standing = {c.hotkey: c for c in await chain.commitments()}.get(chain.hotkey)
    if standing is None or standing.data != data:
        await chain.commit(data)
        standing = {c.hotkey: c for c in await chain.commitments()}.get(chain.hotkey)
    if standing is None or standing.data != data:
        raise Rejected(Reason.MALFORMED_COMMITMENT, standing.data if standing else "nothing", data, "read back from the chain")
    commitment = Commitment.parse(chain.hotkey, standing.block, standing.data)
    tell("committed", f"{model} for {competition.name}", hotkey=chain.hotkey, block=commitment.block)
    return commitment
