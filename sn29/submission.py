"""A miner's submission, from a folder to a commitment on chain, as one story.

    check     what a validator would check, on the folder: metadata, rules, then a child process that loads and evaluates;
              `check_published` does the same on a repository
    submit    1 hide    the repository is made private, before anything is uploaded
              2 upload  the folder, as one commit
              3 check   the metadata again, on what the Hub now has
              4 seal    if asked for: a commitment to the digest alone; wait until its block is final
              5 commit  namespace, name, revision, digest, competition; wait until its block is final
              6 show    the repository is made public
    follow_up   until a validator's record names the commitment: accepted, refused and why, its place

Nobody can be faster: until step 6 nobody else has seen a byte of the model, and by then the commitment stands in a block
that no fork can take away. The digest of steps 4 and 5 is of no use to others, it is made for the hotkey. With a seal
not even the repository's name is known before the claim is final, and a validator that saw the seal counts from it.

Every step may be repeated, and a submission that was cut off anywhere is ended by running it again: what is done is read
from the chain and the Hub. An upload of the same files makes no new revision, a commitment that already stands on chain
is not written again (it would only make the model younger). A repository is never made public while it holds files that
no final commitment of ours names, whatever failed before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sn29 import record_files
from sn29.chain import Chain
from sn29.concealment import conceal, reveal
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.evaluation.profile import ROW_TOKENS, Profile, Tiles
from sn29.evaluation.worker import Evaluator, Here, Job, SeveralReasons, memory_needed
from sn29.examination import FixedText as FixedText
from sn29.explain import Passage, passages
from sn29.hub import Hub
from sn29.measurement import start_token_of, unfit
from sn29.models import checkpoint
from sn29.models.checkpoint import Read
from sn29.models.disk import Disk
from sn29.models.fetch import fetch
from sn29.records import Commitment, Loss, ModelFacts, ModelId, RawCommitment, RepoFile, RepoListing, Sample, Sealed
from sn29.round_record import RoundRecord
from sn29.rules.competition import Competition, violations
from sn29.rules.scoring_fields import Champion
from sn29.telemetry import tell, warn

# Texts that a tokenizer must give back and a model must be able to score: plain words, line ends, scripts, a special token.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\r\nline ends\n\n",
    "naïve façade, Ελληνικά, русский, 日本語, العربية, 👩‍👩‍👧",
    "x = {'a': 1.5e-3, \"b\": [0x1F, None]}  # code",
    "literally <|endoftext|> and </s>",
)


# With these and no others a model can be loaded all the same.
_LOADABLE = {Reason.FAMILY, Reason.PARAMETERS, Reason.TOO_LARGE}


@dataclass(frozen=True, slots=True)
class Checked:
    """The answer of the checks: every reason that applies."""

    facts: ModelFacts | None
    """None when the metadata could not even be read."""
    refusals: tuple[Rejected, ...]
    """Empty: allowed."""
    losses: tuple[Loss, ...] = ()
    """Of the probe texts, when the model was loaded."""
    tensor_digest: str = ""
    """Canonical identity of the weights, when they were loaded: see `models.checkpoint.tensor_digest`."""


def inspect(listing: RepoListing, read: Read, competition: Competition, fixed: FixedText | None) -> Checked:
    """The checks that need no weights, as a validator runs them; it stops at the first reason, here all are found.

    Raises what `read` raises.
    """
    found = checkpoint.inspect_all(listing, read)
    if found.facts is None:
        return Checked(None, found.refusals)
    broken = violations(competition, found.facts, fixed.largest_id if fixed else None)
    return Checked(found.facts, (*found.refusals, *broken))


async def check(
    folder: Path,
    competition: Competition,
    fixed: FixedText | None,
    *,
    threads: int,
    deadline_s: float,
    files: tuple[RepoFile, ...] = (),
    evaluator: Evaluator | None = None,
) -> Checked:
    """All checks on a folder: those of the metadata, then the child process of the validator on probe texts.

    A model that is only too large or of another family is still evaluated, so that its owner hears of both. `files` is how
    the Hub lists the folder's, which the child then makes sure of. `evaluator` runs the child; None: one that is started for
    it, in 5 s. Raises Unavailable when the child gave no answer.
    """
    checked = inspect(checkpoint.local_listing(folder), checkpoint.local_reader(folder), competition, fixed)
    facts = checked.facts
    if facts is None or not all(refusal.reason in _LOADABLE for refusal in checked.refusals):
        return checked
    job = Job(
        checkpoint=str(folder.absolute()),
        tokenizer=str((fixed.path if fixed else folder / "tokenizer.json").absolute()),
        start_token=start_token_of(competition, facts),
        max_tokens=competition.limits.max_tokens,
        dtype="bfloat16",
        device="cpu",
        threads=threads,
        profile=Profile(ROW_TOKENS["cpu"], Tiles(256, min(4096, facts.vocab_size), compiled=False), "documents"),
        samples=tuple(Sample(f"{i:032x}", text) for i, text in enumerate(PROBES)),
        files=files,
        tokenizer_oid=fixed.oid if fixed else "",
        every_reason=True,
    )
    memory = memory_needed(facts, 512)
    try:
        if evaluator is not None:
            found = await evaluator.evaluate(job, deadline_s=deadline_s, memory_bytes=memory)
        else:
            async with Here() as here:
                found = await here.evaluate(job, deadline_s=deadline_s, memory_bytes=memory)
    except SeveralReasons as errors:
        return Checked(facts, (*checked.refusals, *errors.found))
    except Rejected as error:
        return Checked(facts, (*checked.refusals, error))
    limits = competition.limits
    failure = unfit(found.losses, limits.round_trip_failures, limits.unscored, own_tokenizer=fixed is None)
    return Checked(facts, (*checked.refusals, *((failure,) if failure else ())), found.losses, found.tensor_digest)


async def check_published(
    hub: Hub,
    listing: RepoListing,
    competition: Competition,
    fixed: FixedText | None,
    models_dir: Path,
    *,
    threads: int,
    deadline_s: float,
    models_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda num_bytes, total: None,
) -> Checked:
    """The same on a repository, in a validator's order: what the metadata refuses is not downloaded.

    The files come into a folder of `models_dir`, each checked on arrival, and stay there for the next call, until another
    model needs the place: the longest unused is deleted first, to keep to `models_bytes` (None: what the disk has). `progress`
    is told of each piece that came, and of the bytes of all. Raises Unavailable when Hub, disk or child gave no answer,
    Rejected when the repository closes meanwhile.
    """
    checked = await asyncio.to_thread(inspect, listing, hub.reader(listing), competition, fixed)
    if checked.facts is None or checked.refusals:
        return checked
    disk, files = Disk(models_dir, budget_bytes=models_bytes), tuple(f for f in listing.files if checkpoint.is_content(f.path))
    total = sum(file.size for file in files)
    try:
        with disk.using(checked.facts.content_id) as folder:
            try:
                await asyncio.to_thread(
                    fetch, hub, listing, folder, only=checkpoint.is_content, deadline_s=deadline_s, room=disk.make_room,
                    progress=lambda num_bytes: progress(num_bytes, total),
                )  # fmt: skip
            except Rejected as error:
                return Checked(checked.facts, (error,))
            return await check(folder, competition, fixed, threads=threads, deadline_s=deadline_s, files=files)
    except OSError as error:
        raise Unavailable("disk", str(error)) from None


async def submit(
    chain: Chain,
    hub: Hub,
    folder: Path,
    repo: str,
    competition: Competition,
    fixed: FixedText | None,
    *,
    sealed: bool = False,
    force: bool = False,
) -> Commitment:
    """Publishes the folder and commits to it: the commitment as it stands in a final block.

    Raises Rejected when the rules refuse what is uploaded (unless forced), Unavailable when chain or Hub do not answer or a
    fork took the commitment away: then the repository stays private, and running it again goes on.
    """
    namespace, _, name = repo.partition("/")
    local = checkpoint.local_listing(folder)
    digest = checkpoint.digest(checkpoint.content_id(local.files), chain.hotkey)
    # Too long a name, and what the folder alone shows, is said before anything is hidden or uploaded.
    Commitment(chain.hotkey, 0, ModelId(namespace, name, "0" * 40), digest, competition.name).encode()
    _refuse(inspect(local, checkpoint.local_reader(folder), competition, fixed), force)
    standing = await _shown(chain, hub, repo)
    if standing is not None and (standing.digest, standing.competition) == (digest, competition.name):
        tell("public", f"{standing.model} is committed to and can be seen already", hotkey=chain.hotkey, block=standing.block)
        return standing
    conceal(repo, "(--repo)")  # nothing that is told or logged names it before the chain does
    await asyncio.to_thread(hub.create, repo, private=True)
    await asyncio.to_thread(hub.set_private, repo, True)
    try:
        model, digest = await _upload(chain, hub, folder, repo, competition, fixed, force)
        block = await _claim(chain, model, digest, competition, sealed)
    except Sn29Error:
        await _show_what_stands(chain, hub, repo)
        raise
    await asyncio.to_thread(hub.set_private, repo, False)
    tell("public", f"{model} can be seen by everybody", hotkey=chain.hotkey)
    return Commitment(chain.hotkey, block, model, digest, competition.name)


# --- afterwards -------------------------------------------------------------------------------------------------------


def named_in(records: Iterable[RoundRecord], hotkey: str, model: str) -> Passage | None:
    """What the newest of these records that names our commitment to `model` (namespace/name@revision) says of it.

    A commitment that validators could not look at (`unavailable`) is not named: they try again.
    """
    found = (p for p in passages(records, hotkey) if p.outcome.model == model and p.outcome.status != "unavailable")
    return max(found, key=lambda passage: passage.block, default=None)


def verdict(passage: Passage) -> str:
    """One line: what became of a commitment in a round."""
    o, where = passage.outcome, f"round of block {passage.block:,}, {passage.outcome.competition or 'no competition'}"
    if o.status == "rejected":
        return f"{where}: refused: {o.detail or o.reason}"
    if o.status != "evaluated":
        return f"{where}: {o.status}: {o.detail or o.reason}"
    share = f", {passage.score.weight:.2%} of the competition's reward" if passage.score else ""
    stopped = f"; {passage.stopped}" if passage.stopped else ""
    place = f"place {passage.place} of {passage.num_models}{share}"
    return f"{where}: accepted, {passage.nats_per_sample:.2f} nats a sample on {passage.num_samples:,} samples, {place}{stopped}"


def is_verdict(passage: Passage) -> bool:
    """Whether the round has made up its mind. Who waits for a place, or for its seal to be opened, has its turn still to come; a
    near copy, or a model that is out of reach, rests for good."""
    return passage.outcome.status != "waiting" or passage.outcome.reason in ("near_copy", "out_of_reach")


def passed_over(error: Sn29Error) -> None:
    """A record that is just being copied here, or is none: the next ones are read all the same. Each is told once."""
    _told_once(f"passed over: {error}")


@lru_cache(maxsize=1000)
def _told_once(text: str) -> None:
    warn("record", text)


async def stands(chain: Chain, folder: Path) -> bool:
    """Whether this folder, and no other model, is what our hotkey has on chain, sealed or in the open. Raises Unavailable."""
    digest = checkpoint.digest(checkpoint.content_id(checkpoint.local_listing(folder).files), chain.hotkey)
    async with chain:
        standing = await _own(chain)
    return standing is not None and digest.encode() in standing.data


async def follow_up(
    chain: Chain, records: Path, commitment: Commitment, *, window_blocks: int, windows: int, poll_s: float
) -> Passage | None:
    """Waits until a validator's record judges the commitment; None when none did within so many windows of blocks, counted from
    the newest record by which it waits for its turn.

    `records`: the folder where they appear; what is no record there is told and passed over. Only the commitment's next window
    can judge it. What does not answer is asked again, for ever.
    """
    waited = seen = commitment.block
    while True:
        found: Passage | None = None
        try:
            block = (await chain.finalized()).block
            for record in record_files.since(records, seen, passed_over, last=block):
                seen = record.head.block
                found = named_in((record,), commitment.hotkey, str(commitment.model)) or found
        except Unavailable as error:
            warn("unavailable", f"{error}; asked again", hotkey=commitment.hotkey)
            await asyncio.sleep(max(poll_s, error.retry_s or 0.0))
            continue
        if found is not None and is_verdict(found):
            return found
        waited = found.block if found is not None else waited
        if block > (waited // window_blocks + 1 + windows) * window_blocks:
            return None
        await asyncio.sleep(poll_s)


# --- the Hub's side ---------------------------------------------------------------------------------------------------


async def _upload(
    chain: Chain, hub: Hub, folder: Path, repo: str, competition: Competition, fixed: FixedText | None, force: bool
) -> tuple[ModelId, str]:
    """Steps 2 and 3, on a repository that only its owner can see: the model, and the digest of what the Hub has of it."""
    revision = await asyncio.to_thread(hub.upload, repo, folder, message=f"model for {competition.name}")
    model = ModelId.parse(f"{repo}@{revision}")
    tell("uploaded", f"{model}", hotkey=chain.hotkey, competition=competition.name)
    listing = await asyncio.to_thread(lambda: hub.listing(model, as_owner=True))
    _refuse(await asyncio.to_thread(inspect, listing, hub.reader(model, as_owner=True), competition, fixed), force)
    return model, checkpoint.digest(checkpoint.content_id(listing.files), chain.hotkey)


def _refuse(checked: Checked, force: bool) -> None:
    if checked.refusals and not force:
        raise checked.refusals[0]


async def _shown(chain: Chain, hub: Hub, repo: str) -> Commitment | None:
    """Our commitment, if it is final, names what the repository holds, and everybody can see that; else None."""
    standing = await _committed(chain, hub, repo)
    if standing is None:
        return None
    try:
        await asyncio.to_thread(hub.listing, standing.model)
    except Rejected:  # private, or gated
        return None
    return standing


async def _committed(chain: Chain, hub: Hub, repo: str) -> Commitment | None:
    """Our commitment, if it is final and names what the main branch of the repository holds; else None."""
    standing = await _own(chain, (await chain.finalized()).block)
    try:
        found = Commitment.parse(chain.hotkey, standing.block, standing.data) if standing else None
        if found is not None and found.model.repo == repo:
            revision = await asyncio.to_thread(hub.resolve, repo)
            return found if found.model.revision == revision else None
    except Rejected:  # other software's commitment, a seal, or a repository that is gone
        pass
    return None


async def _show_what_stands(chain: Chain, hub: Hub, repo: str) -> None:
    """After a failure: a repository that holds nothing new is made public again, any other one stays private."""
    try:
        if await _committed(chain, hub, repo) is not None:
            await asyncio.to_thread(hub.set_private, repo, False)
            reveal(repo)
            return
    except Sn29Error:  # what failed before may fail here too; the first failure is told
        pass
    warn("hidden", f"{repo} stays private: no final commitment names what it holds; run it again", hotkey=chain.hotkey)


# --- the chain's side -------------------------------------------------------------------------------------------------


async def _claim(chain: Chain, model: ModelId, digest: str, competition: Competition, sealed: bool) -> int:
    """Steps 4 and 5; the block of the commitment. What stands already is not written again, and all of it is final.

    Final, because a block that is not can be replaced by one with somebody else's commitment before ours.
    """
    seal = Sealed(chain.hotkey, 0, digest, competition.name).encode()
    data = Commitment(chain.hotkey, 0, model, digest, competition.name).encode()
    standing = await _own(chain)
    if standing is not None and standing.data != data:
        await _warn_if_paid(chain, standing, digest, competition)
    if sealed and (standing is None or standing.data != data):
        receipt = await chain.commit(seal)
        tell("sealed", f"the digest alone, for {competition.name}", hotkey=chain.hotkey, block=receipt.block)
    receipt = await chain.commit(data)
    reveal(model.repo)  # a final block names it to everybody, while its files are still private
    tell("committed", f"{model} for {competition.name}", hotkey=chain.hotkey, block=receipt.block)
    return receipt.block


async def _own(chain: Chain, block: int | None = None) -> RawCommitment | None:
    """What our hotkey has on chain at a block (default: the head)."""
    return next((c for c in await chain.commitments(block) if c.hotkey == chain.hotkey), None)


async def _warn_if_paid(chain: Chain, standing: RawCommitment, digest: str, competition: Competition) -> None:
    """Another model takes the place of the one that this hotkey is paid for: said before the first write."""
    if digest.encode() in standing.data:
        return
    incentive = next((n.incentive for n in (await chain.metagraph()).neurons if n.hotkey == chain.hotkey), 0.0)
    if incentive > 0:
        lost = "the crown, if it has it" if isinstance(competition.scoring, Champion) else "the age of its claim"
        why = f"this hotkey is paid today and gives up {lost}: its model is no longer committed to; use another hotkey instead"
        warn("paid", why, hotkey=chain.hotkey, competition=competition.name, incentive=f"{incentive:.4f}")
