"""How likely it is that a model committed now wins within the windows to come: the known texts drawn again, judged by the rule.

    world      what texts are like: the losses of all models on the texts of one measured window, as they stand side by side
    window     as many texts as a window has, drawn from that world with replacement, the same ones for all models
    play       windows one after the other, each `window_blocks` after the one before, so that the holder's advantage decays as it
               does; evidence adds up, others may take the crown first, and a new reign forgets what was known
    chance     the share of `draws` plays in which the model has won within the first k windows, for k = 1, 2, ...

To win is to take the crown under `champion`, and more than half of the competition's reward under the other rules.

What is not known. A window of n texts shows the mean gain g over the holder with a standard error of s / sqrt(n), so plays from
these texts alone would be too sure. Hence two levels, as in a nested bootstrap (Efron and Tibshirani 1993, An introduction to
the bootstrap): every play first draws its own world, n of the n texts with replacement (the outer draw: one thinkable truth),
then its windows from that world. The share of plays that win is the predictive probability: calibrated if all gains within a
few standard errors were equally likely before measuring (Rubin 1981, The Bayesian bootstrap). Who measures many checkpoints and
believes the best of them is too sure all the same.

The interval says how the probability hangs on the true mean: `low` and `high` are the shares of plays without an outer draw in
which all losses of the model are scaled so that the mean log ratio to the strongest other model is the 95 % or the 5 % quantile
of its bootstrap distribution (`OUTER` draws of the mean). The probability of a win grows with the gain, so these are the 5 % and
95 % quantiles of the probability over what is not known of the mean.

A worked example: 1,500 texts, g = 0.15 % with s = 1.5 %, a standard error of 0.04 %, the first challenger of an old holder, whose
margin is 0.05 %. Were 0.15 % the truth, it would win after 6 windows. At the 5 % quantile the gain is 0.086 %, and in one play of
four it has won within 20 windows; at the 95 % quantile always. So it wins with a probability of 0 % in the first window, 19 %
(0 % to 95 %) within 4 windows and 93 % (25 % to 100 %) within 20. At g = 0 it is 0.5 %, at 0.05 % 15 %, at 0.3 % 100 %.

What earlier windows showed. Whoever stands already has sums over all windows of the reign, the measured one among them, so this
window's mean is not what is known of it: by luck it may be far from it. A row with sums over more texts than the window has is
scaled so that its mean gain over the holder is that of the sums, and its worlds differ from that mean by sqrt(n / N) of what
they would, N being the sums' number of texts: the standard error is then s / sqrt(N).

A worked example: N = 31,500 texts, 30,000 of a mean gain of 0.02 % and the newest 1,500 of 0.12 %, s = 1.5 %. Known are 0.025 %,
with a standard error of 0.008 %: 0 % (0 % to 0 %) within 20 windows, where the newest window alone gives 77 % (0 % to 100 %).

What is left out, all of it small: that a model which is better by the margin may be stopped before the end of a window (with a
probability of at most `stop_error_rate`), that it may have to wait for a place in the pool, models that are committed later, and
those that were stopped in the measured window, which have no losses on all texts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sn29.records import Head
from sn29.rules.champion import Who, evidence_needed, factor
from sn29.rules.decision import Contest, score_contest
from sn29.rules.evidence import UNIT, Sums, log_evidences, log_ratios, sums_of
from sn29.rules.oldest_holder import usable
from sn29.rules.scoring import Scored
from sn29.rules.scoring_fields import Champion

DRAWS = 400
"""Plays of each kind under `champion`: the standard error of a probability is at most 2.5 %. 20 windows of 1,500 texts: 1 s."""
DRAWS_BY_RULE = 60
"""The same where every window is scored by the rule itself: 1 ms each, at most 6.5 %."""
OUTER = 1000
"""Draws of the mean that the interval's ends are the quantiles of."""
TAIL = 0.05
"""Of the draws of the mean on either side of the interval."""
RIVALS = 3
"""Other challengers that are played, the strongest ones."""

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chance:
    """A probability, 0..1, and the ends of its interval."""

    probability: float
    low: float
    high: float


def chances(
    contest: Contest,
    hotkey: str,
    windows: int,
    *,
    seed: int = 29,
    draws: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Chance, ...]:
    """The chance that `hotkey` has won within 1, 2, ... `windows` windows, the first being the one that the contest is about.

    The contest has the losses of one measured window, all rows over all its texts, the model's among them, and the first
    coming window's block; its memory is what the window before that left. The same arguments give the same numbers on
    every machine up to rounding. `progress` is told plays done and all. Raises ValueError when rows differ in length.
    """
    lengths = {len(row) for row in contest.losses.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"rows of {sorted(lengths)} losses, where all must be over the same texts")
    opening = score_contest(contest)
    contest = _pooled(contest)
    if any(duel.challenger == hotkey and duel.near_copy for duel in opening.duels):
        return (Chance(0.0, 0.0, 0.0),) * windows  # the place is the earlier model's, however often it is looked at
    crown = _crown_of(contest, hotkey, opening)
    number = draws or (DRAWS_BY_RULE if crown is None else DRAWS)
    low, high = _ends(contest, hotkey, opening, seed)
    shares = []
    for kind, (shift, outer) in enumerate(((0.0, True), (high, False), (low, False))):
        world = replace(contest, losses=_scaled(contest.losses, hotkey, shift))

        def told(done: int, before: int = kind * number) -> None:
            progress(before + done, 3 * number)

        plays = _Plays(windows, number, seed, outer, told)
        won = plays.by_rule(world, hotkey) if crown is None else plays.for_crown(_crown_of(world, hotkey, opening) or crown)
        shares.append([float(np.mean(won <= k)) for k in range(windows)])
    return tuple(Chance(p, min(p, worse), max(p, better)) for p, worse, better in zip(*shares, strict=True))


def won(scored: Scored, contest: Contest, hotkey: str) -> bool:
    """The crown under `champion`, else more than half of the reward."""
    if isinstance(contest.competition.scoring, Champion):
        return scored.memory.holder is not None and scored.memory.holder.hotkey == hotkey
    return any(score.hotkey == hotkey and score.weight > 0.5 for score in scored.scores)


def _scaled(losses: Mapping[str, Sequence[float]], hotkey: str, shift: float) -> dict[str, Sequence[float]]:
    """With one model's losses times exp(shift)."""
    scale = math.exp(shift)
    return {h: [x * scale for x in row] if h == hotkey and shift else row for h, row in losses.items()}


def _pooled(contest: Contest) -> Contest:
    """With every row that more is known of than this window shows scaled to the mean that is known."""
    losses, holder = dict(contest.losses), contest.memory.holder
    for hotkey, sums in _known(contest).items():
        assert holder is not None
        mine, theirs = (usable(np.array(contest.losses[h], dtype=np.float64)) for h in (hotkey, holder.hotkey))
        here = sums_of(*log_ratios(mine, theirs))
        losses.update(_scaled({hotkey: losses[hotkey]}, hotkey, sums.mean - here.mean))
    return replace(contest, losses=losses)


def _known(contest: Contest) -> dict[str, Sums]:
    """Sums against the crown's holder of those who stand in the contest, where they are of more texts than its window has."""
    holder = contest.memory.holder
    if holder is None or holder.hotkey not in contest.losses or contest.entries[holder.hotkey].content_id != holder.content_id:
        return {}
    here = {h: e.content_id for h, e in contest.entries.items() if h in contest.losses}
    found = {e.who.hotkey: e.sums for e in contest.memory.evidence if here.get(e.who.hotkey) == e.who.content_id}
    return {h: sums for h, sums in found.items() if h != holder.hotkey and sums.count > len(contest.losses[h])}


def _left(sums: Sums, number: int) -> float:
    """How much of a deviation from the mean is left where such sums are known beside a window of so many texts: 0..1."""
    return math.sqrt(min(1.0, number / max(sums.count, 1)))


def _ends(contest: Contest, hotkey: str, opening: Scored, seed: int) -> tuple[float, float]:
    """By how much the mean log ratio to the strongest other model may be lower, and higher, than measured: (<= 0, >= 0)."""
    others = [score for score in opening.scores if score.hotkey != hotkey and score.hotkey in contest.losses]
    if not others:
        return 0.0, 0.0
    against = max(others, key=lambda score: (score.weight, score.win_rate, score.hotkey)).hotkey
    crowned = contest.memory.holder
    if crowned is not None and crowned.hotkey in contest.losses and crowned.hotkey != hotkey:
        against = crowned.hotkey
    mine, theirs = (usable(np.array(contest.losses[h], dtype=np.float64)) for h in (hotkey, against))
    units, counted = log_ratios(mine, theirs)
    ratios = (units if counted is None else units[counted]) / UNIT
    if not len(ratios):
        return 0.0, 0.0
    random = np.random.default_rng([seed, 1])
    number, together = len(ratios), max(1, 250_000 // len(ratios))  # 2 MB of places
    sizes = [min(together, OUTER - done) for done in range(0, OUTER, together)]
    means = np.concatenate([ratios[random.integers(number, size=(size, number))].mean(axis=1) for size in sizes])
    left = _left(_known(contest).get(hotkey, Sums()), len(mine))
    low, high = left * (np.quantile(means, [TAIL, 1 - TAIL]) - ratios.mean())
    return min(float(low), 0.0), max(float(high), 0.0)


# --- a crown, many plays at once ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Crown:
    """A holder and its challengers, near copies left out, in claim order."""

    rule: Champion
    losses: Numbers
    """[models, texts]"""
    claimed: tuple[int, ...]
    """Block of each one's claim."""
    places: tuple[int, ...]
    """Place in claim order among all models, of which only the strongest are played: ranks of a new reign count all."""
    holder: int
    mine: int
    ranks: tuple[int, ...]
    sums: tuple[Sums, ...]
    left: tuple[float, ...]
    """How much of a world's deviation from each one's mean gain is left: see `_left`."""
    block: int
    """Of the first window."""
    length: int
    """Blocks from window to window."""

    def needed(self, holder: int, window: int) -> float:
        left = factor(self.block + window * self.length - self.claimed[holder], self.rule.advantage)
        return -math.log1p(left - 1.0)


def _crown_of(contest: Contest, hotkey: str, opening: Scored) -> _Crown | None:
    """The duel for the crown; None where there is none, or its holder is not there or was not measured."""
    rule, holder = contest.competition.scoring, contest.memory.holder
    if not isinstance(rule, Champion) or holder is None or holder.hotkey not in contest.losses:
        return None
    if contest.entries[holder.hotkey].content_id != holder.content_id or holder.hotkey == hotkey:
        return None
    copies = {duel.challenger for duel in opening.duels if duel.near_copy}
    if holder.hotkey in copies:
        return None
    order = sorted(contest.losses.keys() - copies, key=lambda h: (contest.entries[h].block, h == hotkey, h))
    known = {e.who: e for e in contest.memory.evidence}
    faced, ranks, sums = contest.memory.faced, {}, {}
    for h in order:
        if h != holder.hotkey:
            evidence = known.get(Who(h, contest.entries[h].content_id))
            faced += evidence is None
            ranks[h], sums[h] = (evidence.rank, evidence.sums) if evidence else (faced, Sums())
    rows = {h: usable(np.array(contest.losses[h], dtype=np.float64)) for h in order}
    ahead = {h: log_ratios(rows[h], rows[holder.hotkey])[0].sum() for h in order}
    rivals = sorted((h for h in order if ahead[h] < 0 and h not in (hotkey, holder.hotkey)), key=lambda h: (ahead[h], h))
    played = [h for h in order if h in {hotkey, holder.hotkey, *rivals[:RIVALS]}]
    return _Crown(
        rule=rule,
        losses=np.stack([rows[h] for h in played]),
        claimed=tuple(contest.entries[h].block for h in played),
        places=tuple(order.index(h) for h in played),
        holder=played.index(holder.hotkey),
        mine=played.index(hotkey),
        ranks=tuple(ranks.get(h, 0) for h in played),
        sums=tuple(sums.get(h, Sums()) for h in played),
        left=tuple(_left(sums.get(h, Sums()), len(rows[h])) for h in played),
        block=contest.window.seed.block,
        length=contest.competition.samples.window_blocks,
    )


class _Reigns:
    """Where `draws` plays of one crown stand, window after window."""

    def __init__(self, crown: _Crown, worlds: Places) -> None:
        """`worlds`: [plays, texts], the places of each play's texts."""
        self.crown, draws = crown, len(worlds)
        self.holder = np.full(draws, crown.holder)
        before = np.array([[s.count, -s.total / UNIT, s.squares / UNIT**2] for s in crown.sums])
        self.known = np.repeat(before[:, :, None], draws, axis=2)
        """[models, (count, sum of gains, sum of squared gains), plays]"""
        needs = np.array([evidence_needed(crown.rule, max(rank, 1)) for rank in crown.ranks])
        self.needs = np.repeat(needs[:, None], draws, axis=1)
        """[models, plays]: evidence that each needs."""
        self._table: dict[tuple[int, int], Numbers] = {}
        self.moved = np.zeros((len(crown.losses), draws))
        """[models, plays]: what is added to each gain over the first holder, so that a world's mean is a thinkable one."""
        for row, left in enumerate(crown.left):
            if left < 1:
                count, gained, _ = self._gains(row, crown.holder)
                times = _times(worlds, len(count))
                means = (times @ gained) / np.maximum(times @ count, 1)
                self.moved[row] = (1 - left) * (gained.sum() / max(count.sum(), 1) - means)

    def _gains(self, row: int, holder: int) -> Numbers:
        """[3, texts]: what a text adds to count, sum of gains, sum of their squares."""
        if (row, holder) not in self._table:
            units, counted = log_ratios(self.crown.losses[row], self.crown.losses[holder])
            gains = -units / UNIT
            ones = np.ones(len(units)) if counted is None else counted.astype(np.float64)
            self._table[row, holder] = np.stack([ones, gains, gains * gains])
        return self._table[row, holder]

    def judge(self, plays: Places, texts: Places, window: int) -> Places:
        """The plays that the model wins by this window's texts, [plays, texts of a window]."""
        times = _times(texts, self.crown.losses.shape[1])
        taken = np.full(len(plays), -1)
        holders = self.holder[plays]
        for holder in np.unique(holders).tolist():
            here = np.flatnonzero(holders == holder)
            at, needed = plays[here], self.crown.needed(holder, window)
            for row in range(len(self.crown.losses)):
                if row == holder:
                    continue
                count, gained, squared = self._gains(row, holder) @ times[here].T
                moved = self.moved[row, at] - self.moved[holder, at]
                squared = squared + 2 * moved * gained + moved * moved * count
                self.known[row][:, at] += np.stack([count, gained + moved * count, squared])
                count, gained, squared = self.known[row][:, at]
                shown = log_evidences(count, gained, squared, needed) >= self.needs[row, at]
                taken[here[shown & (taken[here] < 0)]] = row  # the first in claim order
        for row in {*taken.tolist()} - {-1}:
            self._crown(plays[taken == row], row)
        ended: Places = plays[taken == self.crown.mine]
        return ended

    def _crown(self, plays: Places, row: int) -> None:
        """A new reign: what was known is forgotten, and all others begin anew, in claim order."""
        self.holder[plays] = row
        self.known[:, :, plays] = 0.0
        for other, place in enumerate(self.crown.places):
            rank = place + 1 - (self.crown.places[row] < place)
            self.needs[other, plays] = evidence_needed(self.crown.rule, rank)


def _times(texts: Places, number: int) -> Numbers:
    """[plays, texts]: how often each text was drawn."""
    offset = np.arange(len(texts))[:, None] * number
    counts = np.bincount((texts + offset).ravel(), minlength=len(texts) * number)
    return counts.reshape(len(texts), number).astype(np.float64)


# --- plays --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plays:
    """What is drawn. A play's texts depend on the seed and its number alone: both ways to judge see the same ones."""

    windows: int
    draws: int
    seed: int
    outer: bool
    """Each play draws its own world first."""
    told: Callable[[int], None]
    """Is told the number of plays done."""

    def _texts(self, play: int, number: int) -> Iterator[Places]:
        """Places of the texts of the play's world, then those of one window after the other."""
        random = np.random.default_rng([self.seed, 2, play])
        world = random.integers(number, size=number) if self.outer else np.arange(number)
        yield world
        while True:
            yield world[random.integers(number, size=number)]

    def for_crown(self, crown: _Crown) -> Places:
        """The window, from 0 on, in which each play is won; `windows` for never."""
        number = crown.losses.shape[1]
        together = max(1, min(self.draws, 2_000_000 // number))  # 16 MB of counts
        found = np.full(self.draws, self.windows)
        for start in range(0, self.draws, together):
            numbers = range(start, min(start + together, self.draws))
            texts = [self._texts(play, number) for play in numbers]
            reigns, left = _Reigns(crown, np.stack([next(each) for each in texts])), np.arange(len(texts))
            for window in range(self.windows):
                if not len(left):
                    break
                ended = reigns.judge(left, np.stack([next(texts[play]) for play in left.tolist()]), window)
                found[start + ended] = window
                left = np.setdiff1d(left, ended)
            self.told(numbers.stop)
        return found

    def by_rule(self, contest: Contest, hotkey: str) -> Places:
        """The same, every window scored by the competition's rule itself."""
        length, first = contest.competition.samples.window_blocks, contest.window
        rows = {h: np.array(row, dtype=np.float64) for h, row in contest.losses.items()}
        number = len(rows[hotkey])
        found = np.full(self.draws, self.windows)
        for play in range(self.draws):
            memory, windows = contest.memory, self._texts(play, number)
            next(windows)
            for window, texts in zip(range(self.windows), windows, strict=False):
                lots = hashlib.sha256(f"{first.seed.hash} {self.seed} {play} {window}".encode()).hexdigest()
                at = replace(first, index=first.index + window, seed=Head(first.seed.block + window * length, f"0x{lots}"))
                drawn = {h: row[texts].tolist() for h, row in rows.items()}
                now = replace(contest, window=at, losses=drawn, memory=memory)
                scored = score_contest(now)
                if won(scored, now, hotkey):
                    found[play] = window
                    break
                memory = scored.memory
            self.told(play + 1)
        return found
