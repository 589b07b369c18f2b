"""Our rule: one model holds the crown until another one is shown to be better by more than the holder's advantage.

    claim order   oldest commitment first; of one block by a hash that nobody knows when committing (`rules.scoring`)
    near copies   belong to the earlier commitment (`rules.near_copies`): no duel, no share, nobody's chances touched; who
                  is better than the earlier one by more than the floor of the advantage is no copy of it
    holder        who held the crown in the window before. If it is gone: the last one before it that is here; if there
                  was none: the oldest model that was scored on half of the samples on which anybody was. Who commits
                  another model under the same hotkey has left: leave the old model where it is and improve under a
                  second hotkey (a holder that could renew its model and keep the crown could shake off every
                  challenger just before it has shown enough)
    duel          every other model against the holder, in claim order: the per-sample log ratios of their losses, added up
                  over all windows since the reign began, against the margin (`rules.evidence`)
    crown         the first of them in claim order that is shown to be better by the margin takes it, and a new reign
                  begins: all evidence against the old holder is forgotten
    share         winner: the holder takes all. last_holders: the holder and those before it, each `decay` of the one after
                  it. bootstrap: see `_bootstrap`

The margin. What is left of the holder's advantage, a = max(floor, initial * decay_per_epoch ** age), counted from its
commitment; the mean of ln(challenger's loss / holder's loss) must be shown to be below ln(1 - a).

Who is stopped. A challenger that is shown not to be better by the margin need not be measured to the end of the window
(`rules.sequential`). What was not measured of it is absent: it is no win and no loss, for nobody, in no sum below. Evidence
over the samples up to that moment is evidence like any other, because the bound holds at all moments; the challenger keeps
it, and its rank.

The error rate. The k-th model that ever duels a holder has to show it at an error rate of error_rate / (k (k + 1)); these
sum to error_rate over all k. So a holder loses its crown to models that are not better by the margin with a probability of
at most error_rate, however many there are, however often they are renewed and however long it reigns (a union bound over
challengers of bounds that hold at all times). The thousandth challenger needs evidence of 18.4 where the first one needs
5.3: somebody who enters a thousand models makes an honest one wait for three times the samples, and gets nothing by it.

Evidence counts from a window that was chosen without looking at it. When the crown changes hands, the duels with the new
holder begin in the next window. When a window begins without a holder (the very first one, or the holder is gone), the
first holder is known before a loss is compared; models duel in claim order within that window, and who takes the crown is
challenged by the later ones at once.

A worked example: a holder committed 30 days ago has 0.002 * 0.995 ** 598 = 0.0001 left, so the floor of 0.0005 counts: the
margin is 0.0005001. A challenger, the first of its reign, is better by 0.3 % with a standard deviation of 1.5 % per sample,
1500 samples a window, and needs evidence of ln(2 / 0.01) = 5.30:

    windows   samples   mean log ratio   spread   evidence   confidence sequence     crown
          1      1500          -0.0030    0.015       2.02   -0.00789 to +0.00189    no
          2      3000          -0.0030    0.015       5.22   -0.00553 to -0.00047    no: -0.0005001 is needed
          3      4500          -0.0030    0.015       8.66   -0.00474 to -0.00126    taken

At 0.15 % it is taken after 6 windows, that is 7 hours. A model that is equal in the mean never takes it, with a probability
of 99 %, whatever its noise. Against a holder that has just committed, with 0.2 % left, 0.3 % is enough after 6 windows too,
0.15 % after 84, that is 4.2 days.

Who starts late. All of this is a function of the windows since the reign began, which a new validator has not seen: it begins
with the oldest model and may see near equals differently from the others for as long as they are near equals. It should
begin with a published record of another validator (`sn29 validator --start-record`), which carries the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn29.records import Entry, Score
from sn29.rules.evidence import UNIT, Numbers, Sums, Units, intervals, log_evidence, log_evidences, log_ratios, sums_of
from sn29.rules.near_copies import common, first_of_each
from sn29.rules.oldest_holder import advantage_factor, words
from sn29.rules.scoring_fields import Bootstrap, Champion, FlooredAdvantage, LastHolders

MAX_PAST = 64
"""Holders of the crown that are remembered."""
MAX_EVIDENCE = 1024
"""Challengers of a reign whose evidence is remembered; beyond it the earliest ones start anew."""
MAX_COPIES = 1024
"""Near copies that are remembered."""
BLOCKS = 64
"""Parts of a window that a bootstrap draw chooses from, with replacement."""


@dataclass(frozen=True, slots=True, order=True)
class Who:
    """A hotkey with one content."""

    hotkey: str
    content_id: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one challenger against the holder."""

    who: Who
    rank: int
    """The how-manieth challenger of the reign it is, from 1 on."""
    sums: Sums


@dataclass(frozen=True, slots=True)
class Memory:
    """What the rule remembers of earlier windows. Whole numbers and names only, so that nothing is lost in writing."""

    block: int = -1
    """Of the last window that was judged; -1: none."""
    holder: Who | None = None
    since: int = -1
    """Block of the window in which the holder took the crown."""
    faced: int = 0
    """Challengers of this reign so far."""
    evidence: tuple[Evidence, ...] = ()
    """By rank."""
    past: tuple[Who, ...] = ()
    """Holders before this one, the last one first, each once."""
    copies: tuple[tuple[Who, Who], ...] = ()
    """(near copy, the model that it belongs to), as long as both are entered: what was found once is not measured again."""

    @classmethod
    def empty(cls) -> Memory:
        return cls()

    def to_json(self) -> dict[str, Any]:
        """For a record: objects, lists, strings and whole numbers. Sums of squares can exceed 2^53."""
        return {
            "block": self.block,
            "holder": _pair(self.holder) if self.holder else None,
            "since": self.since,
            "faced": self.faced,
            "evidence": [
                [e.who.hotkey, e.who.content_id, e.rank, e.sums.count, e.sums.total, e.sums.squares] for e in self.evidence
            ],
            "past": [_pair(who) for who in self.past],
            **({"copies": [[*_pair(copy), *_pair(of)] for copy, of in self.copies]} if self.copies else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Memory:
        """The memory that `to_json` wrote. An empty mapping is an empty memory."""
        if not data:
            return cls()
        return cls(
            block=data["block"],
            holder=Who(*data["holder"]) if data["holder"] else None,
            since=data["since"],
            faced=data["faced"],
            evidence=tuple(Evidence(Who(*row[:2]), row[2], Sums(*row[3:])) for row in data["evidence"]),
            past=tuple(Who(*row) for row in data["past"]),
            copies=tuple((Who(*row[:2]), Who(*row[2:])) for row in data.get("copies", ())),
        )


def _pair(who: Who) -> list[str]:
    return [who.hotkey, who.content_id]


@dataclass(frozen=True, slots=True)
class Duel:
    """One model against the holder of the crown, or a near copy against the model that it copies."""

    challenger: str
    holder: str
    num_samples: int
    """Of all windows of the reign together; of a near copy: those of this window that both were scored on."""
    mean_log_ratio: float
    """Mean of ln(challenger's loss / holder's loss), each cut to +-0.25; negative is better."""
    low: float
    high: float
    """The confidence sequence for it: each end holds, for all times together, at the challenger's error rate."""
    needed: float
    """`high` must get below minus this: -ln(1 - what is left of the holder's advantage)."""
    near_copy: bool
    won: bool
    """Took the crown. Who is better by the margin, but comes after one who took it, has to challenge that one."""
    spread: float
    """Standard deviation of the log ratio over the same samples."""
    error_rate: float
    """The challenger's part of the rule's error rate; 0 for a near copy, which nothing is shown of."""


@dataclass(frozen=True)
class _Window:
    """One window's models in claim order."""

    rule: Champion
    hotkeys: tuple[str, ...]
    losses: Numbers
    """NaN: not measured."""
    entries: Mapping[str, Entry]
    block: int

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """Whether a model was scored on anything."""
        return np.asarray(np.isfinite(self.losses).any(axis=1))

    def who(self, row: int) -> Who:
        return Who(self.hotkeys[row], self.entries[self.hotkeys[row]].content_id)

    def here(self, who: Who) -> bool:
        """Still claims the same content, and was scored if it was evaluated. Without a row it may be unavailable."""
        entry = self.entries.get(who.hotkey)
        same = entry is not None and entry.content_id == who.content_id
        return same and (who.hotkey not in self.hotkeys or bool(self.scored[self.hotkeys.index(who.hotkey)]))

    def row(self, who: Who) -> int | None:
        return self.hotkeys.index(who.hotkey) if who.hotkey in self.hotkeys and self.here(who) else None

    def needed(self, hotkey: str) -> float:
        left = 1.0 - factor(self.block - self.entries[hotkey].block, self.rule.advantage)
        return -math.log1p(-left)

    def ratios(self, row: int, against: int) -> tuple[Units, NDArray[np.bool_] | None]:
        return log_ratios(self.losses[row], self.losses[against])


@dataclass(frozen=True, slots=True)
class _Reign:
    """A holder, and what is known of its challengers."""

    holder: Who
    since: int
    faced: int
    evidence: Mapping[Who, Evidence]
    fresh: bool
    """Began with this window: who takes the crown is challenged in it at once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule makes of a window."""

    scores: tuple[Score, ...]
    duels: tuple[Duel, ...]
    memory: Memory


def judge(
    rule: Champion,
    hotkeys: Sequence[str],
    losses: Numbers,
    entries: Mapping[str, Entry],
    block: int,
    seed: bytes,
    memory: Memory,
) -> Verdict:
    """Scores, duels and what is remembered. Rows of `losses` belong to `hotkeys`, which are in claim order; +inf is what a
    model could not be scored on, NaN what it was not measured on: the samples after the one at which it was stopped.

    `entries` may name models that the validator left out of this window: they keep what they have. Who has no entry loses
    its evidence, and a holder without one the crown. Raises ValueError for a window that is not after the one in
    `memory`: no sample counts twice.
    """
    if block <= memory.block:
        raise ValueError(f"the window of block {block} after that of block {memory.block}: samples would count twice")
    window = _Window(rule, tuple(hotkeys), losses, entries, block)
    first = first_of_each(losses, rule.near_copy, -math.log1p(-rule.advantage.floor))
    reign = _opening(window, memory, first)
    if reign is None:
        return Verdict(_scores(window, first, {}), (), _remember(window, memory, None, first))
    first = _holder_first(window, first, reign)
    duels, left = _fight(window, reign, first)
    copies = [_copy(window, row, of) for row, of in enumerate(first) if row != of]
    remembered = _remember(window, memory, left, first)
    shares = _shares(window, reign, remembered, first, seed)
    return Verdict(_scores(window, first, shares), tuple(sorted((*duels, *copies), key=lambda d: d.challenger)), remembered)


def factor(age_blocks: int, advantage: FlooredAdvantage) -> float:
    """1 - what is left of the advantage at this age: what a later model's loss must get below."""
    return min(advantage_factor(age_blocks, advantage), 1.0 - advantage.floor)


# ---- who holds the crown when the window opens -----------------------------------------------------------------------


def _opening(window: _Window, memory: Memory, first: Sequence[int]) -> _Reign | None:
    """The reign that the window's duels belong to; None when there is nobody to hold the crown."""
    if memory.holder is not None and window.here(memory.holder):
        row = window.row(memory.holder)
        if row is None or first[row] == row or not _is_earlier(window, first[row], row):
            known = {e.who: e for e in memory.evidence}
            return _Reign(memory.holder, memory.since, memory.faced, known, fresh=False)
        return _Reign(window.who(first[row]), window.block, 0, {}, fresh=True)  # what it copies was committed before it
    before = (row for row in (window.row(who) for who in memory.past) if row is not None and first[row] == row)
    row = next(before, None)
    if row is None:
        enough = np.isfinite(window.losses).any(axis=0).sum() / 2
        row = next((r for r in _originals(first) if window.scored[r] and np.isfinite(window.losses[r]).sum() >= enough), None)
    return None if row is None else _Reign(window.who(row), window.block, 0, {}, fresh=True)


def _holder_first(window: _Window, first: list[int], reign: _Reign) -> list[int]:
    """Of near copies of one block it is the holder that they belong to, in whatever order they are this time."""
    row = window.row(reign.holder)
    return first if row is None else [row if of == first[row] else of for of in first]


def _originals(first: Sequence[int]) -> Iterable[int]:
    return (row for row, of in enumerate(first) if row == of)


def _is_earlier(window: _Window, one: int, other: int) -> bool:
    return window.entries[window.hotkeys[one]].block < window.entries[window.hotkeys[other]].block


# ---- duels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bout:
    """A duel before its confidence sequence is worked out."""

    row: int
    holder: Who
    evidence: Evidence
    needed: float
    threshold: float
    shown: bool
    """To be better by the margin."""
    won: bool


def _fight(window: _Window, reign: _Reign, first: Sequence[int]) -> tuple[list[Duel], _Reign]:
    """All duels of the window, and the reign that it leaves behind."""
    bouts: list[_Bout] = []
    now, at = reign, window.row(reign.holder)
    next_reign: _Reign | None = None
    for row in _originals(first):
        if at is None or row == at:
            continue
        known = now.evidence.get(window.who(row)) or Evidence(window.who(row), now.faced + 1, Sums())
        evidence = replace(known, sums=known.sums + sums_of(*window.ratios(row, at)))
        needed, threshold = window.needed(now.holder.hotkey), evidence_needed(window.rule, evidence.rank)
        shown = log_evidence(evidence.sums, needed) >= threshold
        bouts.append(_Bout(row, now.holder, evidence, needed, threshold, shown, shown and next_reign is None))
        now = replace(now, faced=max(now.faced, evidence.rank), evidence={**now.evidence, evidence.who: evidence})
        if shown and next_reign is None:
            crowned = _Reign(window.who(row), window.block, 0, {}, reign.fresh)
            if reign.fresh:
                now, at = crowned, row
            else:
                next_reign = crowned
    return _duels(window, bouts), next_reign or now


def evidence_needed(rule: Champion, rank: int) -> float:
    """Evidence that the challenger of this rank needs: ln(1 / its part of the error rate)."""
    return math.log(rank * (rank + 1) / rule.error_rate)


def _duels(window: _Window, bouts: Sequence[_Bout]) -> list[Duel]:
    spans = intervals([b.evidence.sums for b in bouts], [b.threshold for b in bouts])
    return [
        Duel(
            challenger=window.hotkeys[b.row],
            holder=b.holder.hotkey,
            num_samples=b.evidence.sums.count,
            mean_log_ratio=b.evidence.sums.mean,
            low=low,
            high=min(high, -b.needed) if b.shown else max(high, -b.needed),  # found to 1e-10: never the wrong side
            needed=b.needed,
            near_copy=False,
            won=b.won,
            spread=b.evidence.sums.spread,
            error_rate=math.exp(-b.threshold),
        )
        for b, (low, high) in zip(bouts, spans, strict=True)
    ]


def _copy(window: _Window, row: int, of: int) -> Duel:
    sums, _ = common(window.losses[row], window.losses[of])
    return Duel(
        challenger=window.hotkeys[row],
        holder=window.hotkeys[of],
        num_samples=sums.count,
        mean_log_ratio=sums.mean,
        low=sums.mean,
        high=sums.mean,
        needed=window.needed(window.hotkeys[of]),
        near_copy=True,
        won=False,
        spread=sums.spread,
        error_rate=0.0,
    )


def _remember(window: _Window, memory: Memory, left: _Reign | None, first: Sequence[int]) -> Memory:
    """What the next window needs to know. Evidence of who has entered something else since is dropped."""
    copies = _copies(window, memory, first)
    before = dict.fromkeys([*([memory.holder] if memory.holder else []), *memory.past])
    past = [who for who in before if left is None or who != left.holder][:MAX_PAST]
    if left is None:
        return Memory(block=window.block, past=tuple(past), copies=copies)
    kept = sorted((e for e in left.evidence.values() if _may_return(window, e.who)), key=lambda e: e.rank)[-MAX_EVIDENCE:]
    return Memory(
        block=window.block,
        holder=left.holder,
        since=left.since,
        faced=left.faced,
        evidence=tuple(kept),
        past=tuple(past),
        copies=copies,
    )


def _copies(window: _Window, memory: Memory, first: Sequence[int]) -> tuple[tuple[Who, Who], ...]:
    """Near copies known after this window. Of a model that was measured now, what it was found to be now counts."""
    seen = {window.who(row) for row in range(len(first))}
    found = {window.who(row): window.who(of) for row, of in enumerate(first) if row != of}
    known = {c: of for c, of in memory.copies if c not in seen and _may_return(window, c) and _may_return(window, of)}
    return tuple(sorted({**known, **found}.items())[:MAX_COPIES])


def known_copies(memory: Memory, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Hotkeys whose models are known to be near copies, with the hotkey of the earlier model, of models that are still
    entered: measuring them again helps nobody."""
    entered = {Who(hotkey, entry.content_id) for hotkey, entry in entries.items()}
    return {copy.hotkey: of.hotkey for copy, of in memory.copies if copy in entered and of in entered}


def _may_return(window: _Window, who: Who) -> bool:
    """Only who was there, evaluated or left out by the validator, keeps its evidence: a miner that could choose in which
    windows it is seen (the samples are public as soon as the seed block is) could pick those that favour it."""
    entry = window.entries.get(who.hotkey)
    return entry is not None and entry.content_id == who.content_id


def open_duels(rule: Champion, memory: Memory, entries: Mapping[str, Entry], block: int) -> tuple[Duel, ...]:
    """What is known at a block of everybody who has evidence against the holder, without a new sample."""
    holder = memory.holder
    if holder is None or holder.hotkey not in entries or entries[holder.hotkey].content_id != holder.content_id:
        return ()
    window = _Window(rule, (), np.empty((0, 0)), entries, block)
    known = [e for e in memory.evidence if _may_return(window, e.who)]
    needed = window.needed(holder.hotkey)
    return tuple(
        _duels(
            replace(window, hotkeys=tuple(e.who.hotkey for e in known)),
            [_Bout(i, holder, e, needed, evidence_needed(rule, e.rank), False, False) for i, e in enumerate(known)],
        )
    )


# ---- shares ----------------------------------------------------------------------------------------------------------


def _shares(window: _Window, reign: _Reign, memory: Memory, first: Sequence[int], seed: bytes) -> dict[str, float]:
    """Shares of the reward by hotkey; they sum to 1."""
    share, holder = window.rule.share, memory.holder
    if holder is None:
        return {}
    if isinstance(share, LastHolders):
        copies = {window.hotkeys[row] for row, of in enumerate(first) if row != of}
        paid = [holder.hotkey, *(who.hotkey for who in memory.past if window.here(who) and who.hotkey not in copies)]
        paid = list(dict.fromkeys(paid))[: share.count]
        powers = [share.decay**place for place in range(len(paid))]
        return {hotkey: power / math.fsum(powers) for hotkey, power in zip(paid, powers, strict=True)}
    if isinstance(share, Bootstrap):
        return _bootstrap(window, reign, first, share.draws, seed)
    return {holder.hotkey: 1.0}


def _bootstrap(window: _Window, reign: _Reign, first: Sequence[int], draws: int, seed: bytes) -> dict[str, float]:
    """How often each model ends up with the crown when the window's samples are drawn again.

    A draw puts together 64 of the window's 64 parts, with replacement, the same ones for all models (of a duel with somebody
    who was stopped: of what was measured); evidence of earlier windows stays as it is. Near the crossing validators who
    measure a little differently then pay a little differently, not each to another model.
    """
    opening, num_samples = window.row(reign.holder), window.losses.shape[1]
    if opening is None or num_samples == 0:
        return {reign.holder.hotkey: 1.0}
    blocks = min(BLOCKS, num_samples)
    stream = words(seed + b" bootstrap")
    chosen = np.array([next(stream) % blocks for _ in range(draws * blocks)]).reshape(draws, blocks)
    times = np.stack([np.bincount(row, minlength=blocks) for row in chosen])
    order = list(_originals(first))
    crown, settled = np.full(draws, opening), np.zeros(draws, dtype=bool)
    faced = reign.faced
    for row in order:
        known = reign.evidence.get(window.who(row))
        faced = faced if known or row == opening else faced + 1
        for at in sorted(set(crown[~settled].tolist()) - {row}):
            rank = (known.rank if known else faced) if at == opening else order.index(row) - order.index(at)
            before = known.sums if known and at == opening else Sums()
            won = ~settled & (crown == at) & _redrawn(window, row, at, before, rank, times)
            crown[won] = row
            settled |= won & (not reign.fresh)
    found, counts = np.unique(crown, return_counts=True)
    return {window.hotkeys[row]: count / draws for row, count in zip(found.tolist(), counts.tolist(), strict=True)}


def _redrawn(window: _Window, row: int, at: int, before: Sums, rank: int, times: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each draw whether the model in `row` takes the crown from the one in `at`."""
    ratios, counted = window.ratios(row, at)
    blocks = times.shape[1]
    measured = int(np.count_nonzero(~np.isnan(window.losses[[row, at]]).any(axis=0)))  # the leading ones
    edges = [measured * block // blocks for block in range(blocks + 1)]
    ones = np.ones(len(ratios), dtype=np.int64) if counted is None else counted.astype(np.int64)
    sums = (np.concatenate([[0], np.cumsum(x)]) for x in (ones, ratios, ratios * ratios))
    n, total, squares = (times @ np.diff(x[edges]) for x in sums)
    gains = -(total.astype(np.float64) + float(before.total)) / UNIT
    squared = (squares.astype(np.float64) + float(before.squares)) / UNIT**2
    needed = window.needed(window.hotkeys[at])
    found = log_evidences(n.astype(np.float64) + before.count, gains, squared, needed)
    return np.asarray(found >= evidence_needed(window.rule, rank))


# ---- scores ----------------------------------------------------------------------------------------------------------


def _scores(window: _Window, first: Sequence[int], shares: Mapping[str, float]) -> tuple[Score, ...]:
    """One for every model that was evaluated or is paid."""
    rows = dict(zip(window.hotkeys, _lowest(window, first), strict=True))
    rates = {hotkey: wins / (winnable or 1) for hotkey, (wins, winnable) in rows.items()}
    return tuple(
        Score(
            hotkey=hotkey,
            wins=float(rows.get(hotkey, (0, 0))[0]),
            win_rate=rates.get(hotkey, 0.0),
            win_rate_without_advantage=rates.get(hotkey, 0.0),
            advantage=factor(window.block - window.entries[hotkey].block, window.rule.advantage),
            weight=shares.get(hotkey, 0.0),
        )
        for hotkey in sorted({*window.hotkeys, *shares})
    )


def _lowest(window: _Window, first: Sequence[int]) -> list[tuple[int, int]]:
    """Samples on which each model has the lowest loss of all that were measured on them, near copies left out; and how many
    of those that it was measured on have such a model."""
    best = np.full(window.losses.shape[1], np.inf)
    winner = np.full(len(best), len(first))
    for row in _originals(first):
        lower = window.losses[row] < best
        np.copyto(best, window.losses[row], where=lower)
        np.copyto(winner, row, where=lower)
    wins = np.bincount(winner, minlength=len(first) + 1).tolist()
    winnable = [len(best) - wins[len(first)]] * len(first)
    for row in np.flatnonzero(np.isnan(window.losses[:, -1:]).any(axis=1)).tolist():  # was stopped before the last sample
        winnable[row] = int(np.count_nonzero(~np.isnan(window.losses[row]) & (winner < len(first))))
    return list(zip(wins[: len(first)], winnable, strict=True))
