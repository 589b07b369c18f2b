"""A new validator takes over another one's newest records with their losses, and is at work in the window that is open.

    newest two     of the other's records. If the newest is of the round that is due, what is remembered (crowns, weights, claims)
                   comes from the one before it, and the newest one's losses let this validator judge that round itself, at once;
                   else what is remembered comes from the newest
    rows           models whose losses the record holds, that the Hub still serves and our own rules admit
    drawn          cells (model x text) of all rows, by the hash of the record's address and our own hotkey: the same ones every
                   time, and whoever wrote the record cannot have picked one whose wrong cells nobody draws
    measured       here, from the files; every one must agree, and so must the tensors. Else nothing at all is taken over
    taken over     into the table of losses, each cell marked with the import that it came with

The draw finds a share f of wrong cells but with probability (1 - f)^n, n cells being drawn: of 200 cells, 1 % of wrong ones go
unseen with 13 %, 2 % with 1.8 %, 5 % with 0.004 %. A single changed cell is not found; it moves no mean by more than its share.
What a model is, its claim and its age are looked up here or taken from the record as by `round.begin_with`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sn29 import record_files
from sn29.errors import Reason, Rejected, Unavailable
from sn29.examination import Entrant, Ports, Rules, inspect
from sn29.measurement import measure_again, profile_of, tokenizer_id_of
from sn29.models.checkpoint import digest
from sn29.records import Commitment, Loss, ModelId, Sample
from sn29.round import begin_with, check_record, window_samples
from sn29.round_record import ModelRecord, RoundRecord, address
from sn29.rules.competition import Competition, tokenizer_for
from sn29.rules.selection import next_round
from sn29.store import Imported, StoredLoss
from sn29.telemetry import stage, tell, warn

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-3}
"""Largest difference of one loss between machines, as a share of it (at least 1 nat a token counts): for float32 what the engine's
own tests allow between profiles (1e-5), for bfloat16, of which some 1e-4 are known (performance of one model on two devices; not
measured here), four times the least advantage (5e-4) by which a model wins. On one kind of machine it is 0."""
_SHARES = (0.01, 0.05)


@dataclass(frozen=True, slots=True)
class _Row:
    """One model's losses in one competition of the record."""

    competition: Competition
    entrant: Entrant
    model: ModelRecord
    samples: tuple[Sample, ...]
    """Of the losses, in their order."""
    profile: str
    """The way in which this machine would compute them."""

    def losses(self) -> tuple[Loss, ...]:
        """The tokens of one text stand in no record: their sum stands at the first cell that has a loss, and so it is right."""
        reasons, left = iter(self.model.unscored), self.model.num_tokens
        found = []
        for sample, nats in zip(self.samples, self.model.losses, strict=True):
            tokens, left = (left, 0) if math.isfinite(nats) else (0, left)
            found.append(Loss(sample.id, nats, tokens, "" if math.isfinite(nats) else next(reasons)))
        return tuple(found)


async def warm_start(ports: Ports, rules: Rules, named: Sequence[Path], *, cells: int) -> bool:
    """Takes over from the folders (or files) of another validator's records; False where rounds were judged here already.

    cells: how many are drawn. Raises Rejected(RECORD) for records that are not of this chain, do not give their own bits, or
    disagree with what is measured here: then nothing was taken over. Unavailable when nothing could be checked.
    """
    if ports.store.last_finished() is not None:
        tell("warm_start", "rounds were judged here already: nothing is taken over")
        return False
    newest, path, before = _newest(named)
    lengths = {name: rules.at(name, 0).samples.window_blocks for name in rules.files}
    due = next_round(lengths, (await ports.chain.finalized()).block, None, 1)
    begin = before if before is not None and newest.head.block == due else newest
    for record in (newest, begin):
        await check_record(ports, record)
    stage("measuring", detail=f"a sample of the losses of {path}")
    rows = await _rows(ports, rules, newest, path)
    drawn = _drawn(rows, f"{address(newest)} {ports.chain.hotkey}", cells)
    worst, digests = await _check(ports, rows, drawn, newest.head.block, path)
    kept = {number: row for number, row in enumerate(rows) if number in digests or number not in drawn}
    checked = sum(len(drawn[number]) for number in digests)
    num_cells = sum(len(row.samples) for row in kept.values())
    source = str(path.absolute())
    came = Imported(source, address(newest), newest.head.block, time.time(), num_cells, checked, worst)
    _take_over(ports, kept, came, digests)
    return await begin_with(ports, begin)


def _newest(named: Sequence[Path]) -> tuple[RoundRecord, Path, RoundRecord | None]:
    """The newest record with its file, and the one that it followed on if that is there."""
    found = [next(record_files.newest_first(path), None) for path in named]
    newest = max((one for one in found if one is not None), key=lambda one: one[1].head.block, default=None)
    if newest is None:
        raise Rejected(Reason.SETTING, ", ".join(map(str, named)), "files or folders with round records", "--warm-start")
    path, record = newest
    for folder in dict.fromkeys([path.parent, *named]):
        for _, other in record_files.newest_first(folder):
            if other.head.block < record.head.block:
                if dict(other.weights) == dict(record.last_weights):
                    return record, path, other
                break
    return record, path, None


# --- rows -------------------------------------------------------------------------------------------------------------


async def _rows(ports: Ports, rules: Rules, record: RoundRecord, path: Path) -> list[_Row]:
    """Of every model that was evaluated, that is still served, and that our rules admit; one for each content."""
    if record.machine.get("dtype") != ports.machine.dtype:
        got = f"losses in {record.machine.get('dtype')}"
        raise Rejected(Reason.RECORD, got, f"{ports.machine.dtype}, as this validator measures", str(path))
    found: dict[tuple[str, str], _Row] = {}
    for name, kept in sorted(record.competitions.items()):
        if name not in rules.files:
            warn("warm_start", f"{name} is no competition here: its losses are left out")
            continue
        competition, window = rules.at(name, kept.window.seed.block), kept.window
        samples, _ = await asyncio.to_thread(window_samples, ports.dataset, competition, window)
        ours, theirs = [s.id for s in samples], [s.id for s in kept.samples]
        if ours != theirs:
            got, limit = (f"{len(ids)} texts, the first {ids[:1]}" for ids in (theirs, ours))
            raise Rejected(Reason.RECORD, got, f"{limit}, drawn here", f"{path}: {name}: samples")
        shared = tokenizer_for(competition, has_own=False)
        largest_id = (await asyncio.to_thread(ports.tokenizer, shared)).largest_id if shared else None
        for model in (m for m in kept.models if m.losses and m.entry is not None):
            assert model.entry is not None
            commitment = Commitment(
                model.hotkey, model.outcome.block, ModelId.parse(model.outcome.model),
                digest(model.entry.content_id, model.hotkey), name,
            )  # fmt: skip
            entrant = await inspect(ports, rules, competition, window, commitment, largest_id, block=record.head.block)
            if not isinstance(entrant, Entrant) or tokenizer_id_of(competition, entrant) != model.tokenizer_id:
                warn(
                    "warm_start", "its losses are left out: the Hub does not show what the record says of it", hotkey=model.hotkey
                )
                continue
            profile = await profile_of(ports, competition, entrant)
            row = _Row(competition, entrant, model, samples[: len(model.losses)], profile)
            found.setdefault((entrant.facts.content_id, name), row)
    return list(found.values())


def _drawn(rows: Sequence[_Row], seed: str, cells: int) -> dict[int, list[int]]:
    """Places of the drawn cells, by the place of their row."""

    def order(cell: tuple[int, int]) -> bytes:
        row = rows[cell[0]]
        text = f"{seed} {row.competition.name} {row.entrant.facts.content_id} {row.samples[cell[1]].id}"
        return hashlib.sha256(text.encode()).digest()

    every = [(number, place) for number, row in enumerate(rows) for place in range(len(row.samples))]
    found: dict[int, list[int]] = {}
    for number, place in sorted(sorted(every, key=order)[:cells]):
        found.setdefault(number, []).append(place)
    return found


# --- the check --------------------------------------------------------------------------------------------------------


async def _check(
    ports: Ports, rows: list[_Row], drawn: dict[int, list[int]], block: int, path: Path
) -> tuple[float, dict[int, str]]:
    """The largest difference, and the digest of the tensors of each row that was measured; one that cannot be measured now is
    left out. Raises Rejected(RECORD) at the first cell that does not agree, Unavailable when none could be measured."""
    worst, digests = 0.0, dict[int, str]()
    trouble = Unavailable("warm start", "the record has no losses of a model that is served")
    for number, places in sorted(drawn.items()):
        row, hotkey = rows[number], rows[number].model.hotkey
        where = f"{path}: {row.competition.name}: {hotkey}"
        try:
            found = await measure_again(ports, row.competition, row.entrant, tuple(row.samples[p] for p in places), block)
        except Rejected as error:
            raise Rejected(Reason.RECORD, f"losses of {row.model.outcome.model}", f"none: {error}", where) from None
        except Unavailable as error:
            warn("warm_start", f"its losses are left out: they cannot be checked now ({error})", hotkey=hotkey)
            trouble = error
            continue
        if row.model.tensor_digest not in ("", found.tensor_digest):
            raise Rejected(Reason.RECORD, f"tensors {row.model.tensor_digest}", f"{found.tensor_digest}, read here", where)
        theirs = row.losses()
        for place, mine in zip(places, found.losses, strict=True):
            worst = max(worst, _difference(theirs[place], mine, BOUNDS[ports.machine.dtype], where))
        digests[number] = found.tensor_digest
    if not digests:
        raise trouble
    return worst, digests


def _difference(theirs: Loss, mine: Loss, bound: float, where: str) -> float:
    """As a share of the loss. Raises Rejected(RECORD) beyond the bound."""
    if theirs.nats == mine.nats and theirs.reason == mine.reason:
        return 0.0
    share = math.inf
    if math.isfinite(theirs.nats) and math.isfinite(mine.nats):
        share = abs(theirs.nats - mine.nats) / max(abs(mine.nats), float(mine.num_tokens), 1.0)
    if share > bound:
        got = f"{theirs.nats!r} nats on sample {theirs.sample}{f' ({theirs.reason})' if theirs.reason else ''}"
        limit = f"{mine.nats!r}, measured here{f' ({mine.reason})' if mine.reason else ''}, but for {bound:g} of it"
        raise Rejected(Reason.RECORD, got, limit, where)
    return share


def _take_over(ports: Ports, rows: Mapping[int, _Row], came: Imported, digests: Mapping[int, str]) -> None:
    cells = [
        StoredLoss(row.entrant.facts.content_id, row.model.tokenizer_id, row.profile, loss)
        for row in rows.values()
        for loss in row.losses()
    ]
    tensors = {row.entrant.facts.content_id: digests.get(n, row.model.tensor_digest) for n, row in rows.items()}
    taken = ports.store.import_losses(came, cells, {content: found for content, found in tensors.items() if found})
    unseen = ", ".join(f"{share:.0%} with {(1 - share) ** came.checked:.1%}" for share in _SHARES)
    what = f"{taken:,} losses of {len(rows)} models were taken over from {came.source}"
    how = f"{came.checked:,} of them were measured here, the largest difference is {came.worst:.1g} of a loss"
    tell("warm_start", f"{what}; {how}. So many wrong ones would have gone unseen: {unseen}", block=came.block, cells=taken)
