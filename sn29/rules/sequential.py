"""When a challenger need not be measured to the end of the window: it is shown not to be better by the margin.

Under `champion` the holder of the crown is measured first and in full. A challenger is measured in portions of the window's
samples, and after each of them it is asked whether it can still be one that the crown is for. The samples are taken in an
order that the hash of the window's seed block shuffles (`measuring_order`): a draw takes a hundred neighbours at a time and
one data set after the other, and its first 64 samples would stand for themselves alone.

What "hopeless" means. With g = ln(H / C), a sample's gain over the holder, cut to CLIP on both sides as in `rules.evidence`,
and m the margin: that the mean of g is at least m, is refuted at `stop_error_rate`. It is the mirror image of the evidence
that gives the crown. A bet against the challenger starts with 1 and has, after samples with gains g,

    K_t = product of (1 + t y),    y = (m - g) / (CLIP - m) >= -1,    0 < t < 1

If the mean of g is at least m, given all that was drawn before, the mean of y is at most 0, so no K_t grows in the mean;
neither does their mean K over the bets in BETS. By Ville's inequality K ever reaches 1 / a with a probability of at most a:
this is betting on the mean of a bounded variable (Waudby-Smith and Ramdas 2023), without a normal distribution and without a
smallest number of samples. K_t falls as m does (y grows with m), so a margin that shrinks from window to window does no harm.

All windows of a reign count together. Of earlier windows only the sums are remembered, and from them K_t is at least
exp(t sum(y) - psi(t) sum(y^2)), psi(t) = -ln(1 - t) - t (the inequality of `rules.evidence`), sample by sample: what is used
is never more than K. In this window it is K itself, each ln(1 + t y) rounded down to 2^-24, so that sums are whole numbers.

The error rate. A challenger that is better by the margin is stopped, in all windows of its reign together, with a probability
of at most `stop_error_rate`. That is the worst case, one that is better by the margin exactly, which never wins. Who wins is
better by more, and K shrinks: measured with `sn29 simulate sequential`. The crown's own error rate is untouched: its evidence
holds at whatever moment somebody stops looking (optional stopping), so also over what was measured of a window.

What is not asked. Whether the rest of this window could bring the evidence over the threshold: who is better by 0.15 % needs
six windows, none of the first five can bring it there, and stopping it in each of them would take the crown from it. Nor
whether it is a near copy: that is decided once, over what was measured, and is not measured again.

Why it takes the samples that it takes. The bound must hold for a challenger that is worse on nearly every text and better by
CLIP on a few. If it is worse by d beyond the margin, (d / (CLIP + d)) of such texts make up for it; to have missed them in n
samples has the probability (1 - d / (CLIP + d))^n. No bound without further assumptions stops one that is 1 % worse before 95
samples at a = 2 %, and one that is 0.5 % worse before 180. This one needs about 112 and 215.

A worked example: 1 % worse with a standard deviation of 1.5 %, m = 0.05 %, a = 0.02, so that K must reach 50. y is 0.0421 in
the mean, and ln(1 + 0.95 y) 0.0375: K_0.95 after 64 samples is exp(2.4), of which 3/4 are 8.3, after 128 exp(4.8), 3/4 of it
91: stopped after 128 of 1,500.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sn29.records import Entry, Window
from sn29.rules.champion import Memory, factor
from sn29.rules.evidence import CLIP, UNIT, Numbers, Sums, log_ratios, sums_of
from sn29.rules.oldest_holder import shuffled, usable
from sn29.rules.scoring_fields import Champion

FIRST = 16
"""Samples of the first portion: the plainly worse are stopped here. Who is stopped is called a near copy only if it is equal."""
BETS = ((0.95, 3 / 4), (1 / 2, 1 / 16), (1 / 4, 1 / 16), (1 / 8, 1 / 16), (1 / 16, 1 / 16))
"""(t, its part of the capital). The first is for who is plainly worse, and the best one up to standard deviations of 5 %; the
others find in later windows what is a little worse, or noisier. Its part of 3/4 costs ln(4 / 3) = 0.29 in the exponent."""


def portions(total: int) -> tuple[int, ...]:
    """How many of `total` samples are measured after each portion: 16, 32, 64, ... and all of them."""
    found = []
    count = FIRST
    while count < total:
        found.append(count)
        count *= 2
    return (*found, total)


def measuring_order(window: Window, total: int) -> tuple[int, ...]:
    """Places of the drawn samples in the order in which they are measured and recorded: shuffled by sha256 of
    "<seed block's hash> <competition> <window's index> order", which nobody knows when committing."""
    seed = hashlib.sha256(f"{window.seed.hash} {window.competition} {window.index} order".encode()).digest()
    return shuffled(total, seed)


@dataclass(frozen=True, slots=True)
class Bar:
    """What the challengers of one window are held against."""

    holder: str
    """Hotkey of the crown's holder: it is measured first, and in full."""
    needed: float
    """By how much the mean log ratio of losses must be below 0: -ln(1 - what is left of the holder's advantage)."""
    error_rate: float
    known: Mapping[str, Sums]
    """By hotkey: what was measured against this holder in earlier windows. Who is not in it has not been measured."""


def bar_of(rule: Champion, memory: Memory, entries: Mapping[str, Entry], block: int) -> Bar | None:
    """The bar in the window of `block`; None: everybody is measured in full, because the file says so or nobody held the
    crown before this window and is still entered. The same is to be done when the holder turns out not to be measured."""
    holder = memory.holder
    if rule.stop_error_rate == 0 or holder is None or holder.hotkey not in entries:
        return None
    entry = entries[holder.hotkey]
    if entry.content_id != holder.content_id:
        return None
    needed = -math.log1p(factor(block - entry.block, rule.advantage) - 1.0)
    same = (e for e in memory.evidence if e.who.hotkey in entries and entries[e.who.hotkey].content_id == e.who.content_id)
    return Bar(holder.hotkey, needed, rule.stop_error_rate, {e.who.hotkey: e.sums for e in same})


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a challenger is not measured any further."""

    holder: str
    measured: int
    """Leading samples of this window that were measured; 0: what is known from earlier windows is enough."""
    total: int
    """Samples of the window."""
    num_samples: int
    """Those that the verdict rests on, of all windows of the reign."""
    mean_log_ratio: float
    """Over them: mean of ln(challenger's loss / holder's loss), each cut to +-0.25."""
    needed: float
    log_capital: float
    """ln K of the bet against it."""
    error_rate: float

    def __str__(self) -> str:
        """E.g. `stopped after 64 of 1,500 samples: its losses are 5.03 % higher than ann's on the 64 samples so far, to win
        they must be 0.05 % lower in the mean; odds of 312 to 1 against that, 50 to 1 are enough`."""
        gap = f"{abs(self.mean_log_ratio):.2%} {'higher' if self.mean_log_ratio >= 0 else 'lower'}"
        odds = f"10^{self.log_capital / math.log(10):.0f}" if self.log_capital > 14 else f"{math.exp(self.log_capital):,.0f}"
        return (
            f"stopped after {self.measured:,} of {self.total:,} samples: its losses are {gap} than {self.holder}'s on the "
            f"{self.num_samples:,} samples so far, to win they must be {self.needed:.2%} lower in the mean; odds of {odds} to 1 "
            f"against that, {1 / self.error_rate:,.0f} to 1 are enough"
        )


def hopeless(bar: Bar, challenger: str, losses: Sequence[float], holder_losses: Sequence[float]) -> Stop | None:
    """Why a challenger needs no further sample; None: measure on, or nothing is left to measure.

    `losses` are its nats on the leading samples of the window, +inf where it cannot be scored; `holder_losses` those of the
    holder on all of them, in the same order. Without a loss it is asked of earlier windows alone. Raises ValueError for
    the holder itself, and for more losses than the holder has.
    """
    total, measured = len(holder_losses), len(losses)
    if challenger == bar.holder or measured > total:
        raise ValueError(f"{measured} samples of {challenger} against {total} of {bar.holder}")
    if measured == total:
        return None
    mine, theirs = (usable(np.asarray(row[:measured], dtype=np.float64)) for row in (losses, holder_losses))
    ratios, counted = log_ratios(mine, theirs)
    seen = ratios if counted is None else ratios[counted]
    before = bar.known.get(challenger, Sums())
    capital = _log_capital(before, -seen / UNIT, bar.needed)
    if capital < -math.log(bar.error_rate):
        return None
    sums = before + sums_of(seen, None)
    return Stop(bar.holder, measured, total, sums.count, sums.mean, bar.needed, capital, bar.error_rate)


def _log_capital(before: Sums, gains: Numbers, needed: float) -> float:
    """ln K: at most what the bets have after earlier windows and these gains, in nats."""
    room = CLIP - needed
    gained = -before.total / UNIT
    shortfall = (before.count * needed - gained) / room
    squared = (before.count * needed * needed - 2 * needed * gained + before.squares / UNIT**2) / room**2
    y = (needed - gains) / room
    exponents = []
    for t, part in BETS:
        psi = -math.log1p(-t) - t
        now = int(np.floor(np.log1p(t * y) * UNIT).astype(np.int64).sum()) / UNIT
        exponents.append(math.log(part) + t * shortfall - psi * squared + now)
    most = max(exponents)
    return most + math.log(math.fsum(math.exp(e - most) for e in exponents))


def settled_before(bar: Bar, entries: Mapping[str, Entry], total: int) -> dict[str, Stop]:
    """Hotkeys of challengers that what is known of earlier windows settles, before a window of `total` samples is measured."""
    nobody = (0.0,) * total  # of the holder's losses only their number counts here
    stops = {hotkey: hopeless(bar, hotkey, (), nobody) for hotkey in bar.known if hotkey in entries and hotkey != bar.holder}
    return {hotkey: stop for hotkey, stop in stops.items() if stop is not None}
