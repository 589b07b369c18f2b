"""A new validator takes over another one's newest records with their losses, and is at work in the window that is open.

    newest two     of the other's records. If the newest is of the round that is due, what is remembered (crowns, weights) comes
                   from the one before it, and the newest one's losses let this validator judge that round itself, at once.
                   Else it begins from the newest alone: no round would ask for its losses. So it does where the round was judged
                   by other files or software than ours, and leaves the open window to those who know by what it is judged, also
                   where the newest is of an earlier round
    rows           models whose losses the record holds, whose commitment stands on chain, that the Hub still serves and our own
                   rules admit
    drawn          cells (model x text) of all rows, by a secret of this store: the same ones every time, and nobody else knows
                   them. Besides, every cell that is not finite, or not between a quarter and four times its row's median of
                   nats a byte
    measured       here, from the files, to the same bits; and so must the tensors be. Else no loss is taken over: of a machine
                   of another kind, which is off by a little, the record is begun from all the same; a record that is off by
                   more is refused
    taken over     into the table of losses, each cell marked with the import that it came with, in one step with what is
                   remembered. It is measured again only where its model runs anyway (`measurement`); this validator's record
                   of the round does not tell it from its own, `sn29 store check` does

The draw finds a share f of wrong cells (of all of them) but with probability (1 - f)^n, n cells being drawn: of 200 cells, 1 % of
wrong ones go unseen with 13 %, 2 % with 1.8 %, 5 % with 0.004 %. A few wrong ones that look like any other are so not found. They
count in one window, but what it leaves stays: a crown that they move under `champion`, and this window's part of the weights that
are carried on. What a scoring rule remembers is taken on trust besides (`round.begin_with`), which moves a crown in an easier
way: whom an operator names here, it trusts.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from sn29 import record_files
from sn29.audit import first_difference
from sn29.errors import Reason, Rejected, Unavailable
from sn29.examination import Entrant, Ports, Rules, inspect
from sn29.measurement import measure_again, profile_of, tokenizer_id_of
from sn29.models.checkpoint import digest
from sn29.records import Commitment, Loss, Outcome, Sample
from sn29.round import begin_with, check_record, commitments_at, window_samples
from sn29.round_record import ModelRecord, RoundRecord, address
from sn29.rules.competition import Competition, tokenizer_for
from sn29.rules.selection import next_round
from sn29.store import Imported, LossesOfAnother, RulesKept, StoredLoss
from sn29.telemetry import stage, tell, warn

_OTHER_MACHINE = {"float32": 1e-5, "bfloat16": 2e-3}
"""Up to this share of a loss (of at least 1 nat a token) the difference may be another machine's, beyond it is no machine's: for
float32 what the engine's own tests allow between profiles, for bfloat16 a guess. No loss is taken over with either."""
_ODD = 4.0
"""Factor between a cell's nats a byte and its row's median from which on it is measured, drawn or not."""
_SHARES = (0.01, 0.05)
_SOFTWARE = ("sn29", "torch", "transformers", "tokenizers", "numpy")
"""Whatever moves a loss or a weight: as `changeover.software`, whose rules and engine a record names by their package."""


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

    def odd(self) -> set[int]:
        """Places of cells that stand out."""
        rates = [nats / max(sample.num_bytes, 1) for sample, nats in zip(self.samples, self.model.losses, strict=True)]
        middle = median([rate for rate in rates if math.isfinite(rate)] or [0.0])
        return {place for place, rate in enumerate(rates) if not middle / _ODD <= rate <= middle * _ODD}

    def cells(self) -> list[StoredLoss]:
        content, tokenizer = self.entrant.facts.content_id, self.model.tokenizer_id
        return [StoredLoss(content, tokenizer, self.profile, loss) for loss in self.losses()]

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
    disagree with what is measured here: then nothing was taken over. Unavailable when chain or Hub do not answer.
    """
    if ports.store.last_finished() is not None:
        tell("warm_start", "rounds were judged here already: nothing is taken over")
        return False
    newest, path, before = _newest(named)
    if _differences(rules, newest):
        return await begin_from(ports, rules, newest, path)
    due = await _due(ports, rules)
    if newest.head.block != due or before is None:
        why = (
            "has none beside it that it follows on" if newest.head.block == due else f"is not of the round that is due, of {due}"
        )
        tell("warm_start", f"{path} {why}: begun from without its losses, which no round would ask for")
        return await begin_with(ports, newest)
    for record in (newest, before):
        await check_record(ports, record)
    stage("measuring", detail=f"a sample of the losses of {path}")
    rows = await _rows(ports, rules, newest, path)
    drawn = _drawn(rows, f"{ports.store.secret()} {address(newest)}", cells)
    digests = await _check(ports, rows, drawn, newest.head.block, path)
    losses = None if digests is None else _taken(rows, drawn, digests, newest, before, path)
    begun = await begin_with(ports, before, losses)
    if losses is not None:
        came = losses.came
        random = sum(len(drawn.get(number, ())) for number in digests or ())
        unseen = ", ".join(f"{share:.0%} of them with at most {(1 - share) ** random:.1%}" for share in _SHARES)
        what = f"{came.cells:,} losses of {len({cell.content_id for cell in losses.cells})} models were taken over from {path}"
        how = f"{came.checked:,} were measured here and are the same to the bit, {random:,} of them drawn"
        tell("warm_start", f"{what}; {how}. Wrong ones would have gone unseen: {unseen}", block=came.block, cells=came.cells)
    return begun


async def begin_from(ports: Ports, rules: Rules, record: RoundRecord, path: Path) -> bool:
    """As `begin_with`; where it was judged by other rules than ours, that is said, and the window that is open is left out."""
    others, due = _differences(rules, record), await _due(ports, rules)
    begun = await begin_with(ports, record)
    if begun and others:
        is_open = due is not None and record.head.block < due
        what = f"{path} was judged by other rules than are here, named second ({'; '.join(others)})"
        by = "out, since by which it is judged is not known" if is_open else "to those who judge it by the former"
        warn("warm_start", f"{what}: begun from without its losses: the window that is open is left {by}", block=due)
        if due is not None and is_open:
            ports.store.keep_rules(RulesKept(due, {}, {}))
    return begun


async def _due(ports: Ports, rules: Rules) -> int | None:
    """Block of the round that would be due on a first start."""
    lengths = {name: rules.at(name, 0).samples.window_blocks for name in rules.files}
    return next_round(lengths, (await ports.chain.finalized()).block, None, 1)


def _newest(named: Sequence[Path]) -> tuple[RoundRecord, Path, RoundRecord | None]:
    """The newest record with its file, and the one that it followed on if that is there."""
    try:
        found = [next(record_files.newest_first(path), None) for path in named]
    except Unavailable as error:
        raise Rejected(Reason.SETTING, str(error), "records that can be read", "--warm-start") from None
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


def _differences(rules: Rules, record: RoundRecord) -> list[str]:
    """What a round was judged by that is not so here, each as `name theirs -> ours`."""
    found = []
    for name in sorted({*record.competitions, *rules.files}):
        kept, ours = record.competitions.get(name), rules.hashes.get(name)
        theirs = kept.file_sha256 if kept is not None else None
        if theirs == ours:
            continue
        found.append(f"file of {name} {(theirs or 'none')[:12]} -> {(ours or 'none')[:12]}")
        if kept is not None and name in rules.files:
            competition = rules.at(name, kept.window.seed.block).model_dump(mode="json")
            change = first_difference(kept.parameters, competition, name)
            found += [f"{change.what} {change.first} -> {change.second}"] if change is not None else []
    change = first_difference(record.hall_of_fame, rules.hall_of_fame.model_dump(mode="json"), "hall of fame")
    found += [f"{change.what} {change.first} -> {change.second}"] if change is not None else []
    pairs = ((name, record.versions.get(name, "none"), version(name)) for name in _SOFTWARE)
    # without the build that a local part names: 2.9.0+cu126 and 2.9.0+cu128 are the same code
    found += [f"{name} {old} -> {new}" for name, old, new in pairs if old.partition("+")[0] != new.partition("+")[0]]
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


async def _rows(ports: Ports, rules: Rules, record: RoundRecord, path: Path) -> list[_Row]:
    """Of every model that was evaluated, that is still served, and that our rules admit; one for each content."""
    if record.machine.get("dtype") != ports.machine.dtype:
        got = f"losses in {record.machine.get('dtype')}"
        raise Rejected(Reason.RECORD, got, f"{ports.machine.dtype}, as this validator measures", str(path))
    found: dict[tuple[str, str], _Row] = {}
    trouble = ""
    for name, kept in sorted(record.competitions.items()):
        competition, window = rules.at(name, kept.window.seed.block), kept.window
        samples, _ = await asyncio.to_thread(window_samples, ports.dataset, competition, window)
        ours, theirs = [s.id for s in samples], [s.id for s in kept.samples]
        if ours != theirs:
            got, limit = (f"{len(ids)} texts, the first {ids[:1]}" for ids in (theirs, ours))
            raise Rejected(Reason.RECORD, got, f"{limit}, drawn here", f"{path}: {name}: samples")
        shared = tokenizer_for(competition, has_own=False)
        largest_id = (await asyncio.to_thread(ports.tokenizer, shared)).largest_id if shared else None
        on_chain = await commitments_at(ports, window.seed.block - 1)
        for model in (m for m in kept.models if m.losses and m.entry is not None):
            assert model.entry is not None
            commitment, why = on_chain.get(model.hotkey), "the chain shows another commitment, or none"
            if isinstance(commitment, Commitment) and _is_of(commitment, name, model.entry.content_id, model.outcome.model):
                entrant = await inspect(ports, rules, competition, window, commitment, largest_id, block=record.head.block)
                if isinstance(entrant, Entrant) and tokenizer_id_of(competition, entrant) == model.tokenizer_id:
                    profile = await profile_of(ports, competition, entrant)
                    row = _Row(competition, entrant, model, samples[: len(model.losses)], profile)
                    found.setdefault((entrant.facts.content_id, name), row)
                    continue
                why = entrant.detail if isinstance(entrant, Outcome) else "the Hub shows another model"
                trouble = why if isinstance(entrant, Outcome) and entrant.status == "unavailable" else trouble
            warn("warm_start", f"its losses are left out: {why}", hotkey=model.hotkey)
    if not found and trouble:
        raise Unavailable("warm start", trouble)
    if not found:
        warn("warm_start", f"{path} has no losses of a model that stands and is served: begun from without them")
    return list(found.values())


def _is_of(commitment: Commitment, competition: str, content_id: str, model: str) -> bool:
    expected = competition, model, digest(content_id, commitment.hotkey)
    return (commitment.competition, str(commitment.model), commitment.digest) == expected


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


async def _check(ports: Ports, rows: list[_Row], drawn: dict[int, list[int]], block: int, path: Path) -> dict[int, str] | None:
    """The digest of the tensors of each row that was measured; one that cannot be measured is left out: its owner may have
    closed the repository just now, which says nothing of the record. None where this machine computes otherwise, and where
    there is no row.

    Raises Rejected(RECORD) at the first cell that no machine gives, Unavailable when none could be measured for now.
    """
    digests, trouble = dict[int, str](), None
    for number, places in _to_measure(rows, drawn).items():
        row, hotkey = rows[number], rows[number].model.hotkey
        where = f"{path}: {row.competition.name}: {hotkey}"
        try:
            found = await measure_again(ports, row.competition, row.entrant, tuple(row.samples[p] for p in places), block)
        except (Rejected, Unavailable) as error:
            warn("warm_start", f"its losses are left out: they cannot be checked now ({error})", hotkey=hotkey)
            trouble = error if isinstance(error, Unavailable) else trouble
            continue
        if row.model.tensor_digest not in ("", found.tensor_digest):
            raise Rejected(Reason.RECORD, f"tensors {row.model.tensor_digest}", f"{found.tensor_digest}, read here", where)
        theirs = row.losses()
        for place, mine in zip(places, found.losses, strict=True):
            if not _is_equal(theirs[place], mine, _OTHER_MACHINE[ports.machine.dtype], where):
                return None
        digests[number] = found.tensor_digest
    if trouble is not None and not digests:
        raise trouble
    return digests or None


def _to_measure(rows: list[_Row], drawn: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """By row: the drawn cells, and those that stand out."""
    every = {number: sorted({*drawn.get(number, ()), *row.odd()}) for number, row in enumerate(rows)}
    return {number: places for number, places in every.items() if places}


def _is_equal(theirs: Loss, mine: Loss, bound: float, where: str) -> bool:
    """To the bit. Raises Rejected(RECORD) for a difference beyond `bound`, as a share of the loss."""
    if (theirs.nats, theirs.reason) == (mine.nats, mine.reason):
        return True
    share = math.inf
    if math.isfinite(theirs.nats) and math.isfinite(mine.nats):
        share = abs(theirs.nats - mine.nats) / max(abs(mine.nats), float(mine.num_tokens), 1.0)
    got = f"{theirs.nats!r} nats on sample {theirs.sample}{f' ({theirs.reason})' if theirs.reason else ''}"
    limit = f"{mine.nats!r}, measured here{f' ({mine.reason})' if mine.reason else ''}"
    if share > bound:
        raise Rejected(Reason.RECORD, got, f"{limit}, but for {bound:g} of it", where)
    warn("warm_start", f"none of its losses is taken over, as by a machine of another kind: got {got}, rule {limit} ({where})")
    return False


def _taken(
    rows: list[_Row],
    drawn: Mapping[int, Sequence[int]],
    digests: Mapping[int, str],
    record: RoundRecord,
    before: RoundRecord,
    path: Path,
) -> LossesOfAnother:
    """Of the rows that were measured, and of those of which nothing was drawn. Tensors are those that were read here, known
    since the round before where its record has them."""
    asked = _to_measure(rows, drawn)
    kept = [row for number, row in enumerate(rows) if number in digests or number not in asked]
    cells = [cell for row in kept for cell in row.cells()]
    old = {(m.facts.content_id, m.tensor_digest) for c in before.competitions.values() for m in c.models if m.facts}
    found = [(rows[number].entrant.facts.content_id, tensors) for number, tensors in digests.items()]
    tensors = [(*each, (before if each in old else record).head.block) for each in found]
    checked = sum(len(asked[number]) for number in digests)
    came = Imported(str(path.absolute()), address(record), record.head.block, time.time(), len(cells), checked)
    return LossesOfAnother(came, cells, tensors)
