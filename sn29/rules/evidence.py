"""How sure it is that one model is better than another: a confidence sequence for the mean log ratio of their losses.

What is measured. For a sample with losses C of the challenger and H of the holder, g = ln(H / C) is the challenger's
gain, cut to CLIP on both sides: no sample counts as more than 28 % worse or 22 % better. A sample that only one of the
two could be scored on counts as -CLIP for the challenger or +CLIP against the holder, so nobody gains by failing where
it is bad; one that neither could be scored on is not counted, nor is one that was not measured because the challenger was
stopped before it (`rules.sequential`). What is asked is whether the mean of g over the data set
is more than m, whatever the distribution of g, at every moment at which somebody looks.

What the cut means. It is the price of a bound that holds for any distribution: without one, a single text (a loss of +inf)
would decide. A challenger that gives up a part p of the texts entirely loses p / 4 of its mean gain, no more: who is better
by 0.36 % on 99 % of the texts and useless on 1 % is still better by 0.1 % here, though its total loss may be higher. Asking for
lower total nats besides was left out for that reason: it would hand the crown to whoever finds one text that breaks a model.

The inequality. For y >= -1 and 0 <= t < 1, with psi(t) = -ln(1 - t) - t,

    exp(t y - psi(t) y^2) <= 1 + t y

(Fan, Grama and Liu 2015, Exponential inequalities for martingales with applications, lemma 4.1: (ln(1 + u) - u) / u^2 grows
with u, so at u = t y it is at least what it is at u = -t.) With y = 2 (g - m), which is at least -1 because |g| and |m|
are at most 1/4, and t = theta / 2: if the mean of g is at most m, given all that was drawn before, then

    E_theta = exp(theta * sum(g - m) - 4 psi(theta / 2) * sum((g - m)^2))

has an expectation of at most 1 at all times and is a supermartingale from 1 on. So is the mean E of E_theta over the six
values in THETAS. Ville's inequality (1939): the probability that E ever reaches 1 / a is at most a. This is the
self-normalised kind of bound in Howard, Ramdas, McAuliffe and Sekhon 2020 (Time-uniform Chernoff bounds via nonnegative
supermartingales), mixed over theta as in Robbins 1970. It is exact: it needs no smallest number of samples, no normal
distribution and no estimate of a variance, because heavy tails show in the sum of squares. It needs only n, sum g and
sum g^2, so windows add up, and the order of samples does not matter. The bound on the mean is the largest m at which E
still reaches 1 / a. E falls as m grows: the slope of each exponent is at most n (4 psi(theta / 2) - theta), since g - m is at
most 1/2, and psi(t) is below t / 2 up to t = 1/2. So whoever is shown to be above m is shown to be above any smaller m, and
a margin that shrinks from window to window does no harm.

What it takes for granted: that samples are independent draws from the data set. Texts of one row group of a parquet file
may be more alike than that; what two models of the same kind differ by is much less so than their losses.

What THETAS are good for. A model that is better by d with a standard deviation s per sample is found soonest with theta
near d / s^2. At s = 1.5 % and d = 0.25 % that is 11, and THETAS end at 1, which CLIP sets; at s = 5 % and d = 0.1 % it is
0.4. Each of six costs ln 6 = 1.8 in the exponent.

A worked example: n = 4500 samples, g of mean 0.3 % and standard deviation 1.5 %, m = 0.05 %: sum(g - m) = 11.25,
sum((g - m)^2) = 4500 * (0.015^2 + 0.0025^2) = 1.0406, 4 psi(1/2) = 0.7726. E_1 = exp(11.25 - 0.804) = exp(10.45), and its
part of E is exp(10.45 - ln 6) = exp(8.65); with the others E is exp(8.66), evidence enough at a = 1/5700. Of a third of the
samples E is exp(2.02), of two thirds exp(5.22): not enough at a = 1/200 = exp(-5.30).

Numbers. The log ratio is computed with + - * / alone, ln(C / H) = 2 artanh((C - H) / (C + H)), and rounded to 2^-24
(6e-8, the relative precision of a float32 loss). Sums are then sums of integers: exact, in any order, on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLIP = 0.25
"""Largest log ratio that one sample counts for, either way."""
UNIT = 2**24
"""Log ratios are kept in whole units of 1 / UNIT."""
THETAS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_KAPPAS = tuple(4 * (-math.log1p(-theta / 2) - theta / 2) for theta in THETAS)
_BISECTIONS = 32
"""Halvings of the span of 1/2 in which a bound lies: it is found to 1e-10."""
_PART = 2**18
"""Squares of this many log ratios fit into 63 bits: (UNIT * CLIP)^2 * 2^18 = 2^62."""

Numbers = NDArray[np.float64]
Units = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sums:
    """What is remembered of samples: exact, in units of 1 / UNIT and its square."""

    count: int = 0
    total: int = 0
    """Sum of the log ratios ln(challenger / holder): negative is better."""
    squares: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """0 of nothing."""
        return self.total / (self.count * UNIT) if self.count else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the log ratios; 0 of nothing."""
        squared = self.count * self.squares - self.total**2
        return math.sqrt(squared) / (self.count * UNIT) if self.count else 0.0


def log_ratios(challenger: Numbers, holder: Numbers) -> tuple[Units, NDArray[np.bool_] | None]:
    """ln(challenger / holder) of every sample in units of 1 / UNIT, and which samples count; None: all of them.

    Losses are at least 0, +inf where a model could not be scored, NaN where it was not measured: that counts for nobody.
    """
    one, other = 0.5 * challenger, 0.5 * holder  # halves: the sum of two stays finite
    with np.errstate(invalid="ignore"):  # NaN, inf / inf and 0 / 0: below
        t = (one - other) / (one + other)
    np.clip(t, -CLIP / 2, CLIP / 2, out=t)  # artanh of more than that is beyond CLIP / 2
    square = t * t
    series = ((square / 7 + 1 / 5) * square + 1 / 3) * square + 1.0  # the next term is below 2e-9 for t <= 1/8
    series *= t
    series *= 2.0 * UNIT
    np.clip(series, -CLIP * UNIT, CLIP * UNIT, out=series)
    np.rint(series, out=series)
    if not np.isnan(series).any():
        return series.astype(np.int64), None
    measured = ~(np.isnan(challenger) | np.isnan(holder))
    mine, theirs = np.isfinite(challenger), np.isfinite(holder)
    series[np.isnan(series)] = 0.0  # not measured, neither was scored, or both losses are 0
    series[measured & ~mine & theirs] = CLIP * UNIT
    series[measured & mine & ~theirs] = -CLIP * UNIT
    return series.astype(np.int64), measured & (mine | theirs)


def sums_of(ratios: Units, counted: NDArray[np.bool_] | None) -> Sums:
    """What `log_ratios` gives, added up."""
    parts = [ratios[at : at + _PART] for at in range(0, len(ratios), _PART)]
    total, squares = sum(int(p.sum()) for p in parts), sum(int(np.dot(p, p)) for p in parts)
    return Sums(len(ratios) if counted is None else int(counted.sum()), total, squares)


def log_evidence(sums: Sums, gain: float) -> float:
    """ln E: how much speaks against a mean gain of the challenger of at most `gain`."""
    total, squares = -sums.total / UNIT, sums.squares / UNIT**2
    above = total - sums.count * gain
    squared = squares - 2 * gain * total + sums.count * gain * gain
    exponents = [theta * above - kappa * squared for theta, kappa in zip(THETAS, _KAPPAS, strict=True)]
    most = max(exponents)
    return most + math.log(math.fsum(math.exp(e - most) for e in exponents) / len(THETAS))


def log_evidences(counts: Numbers, totals: Numbers, squares: Numbers, gain: Numbers | float) -> Numbers:
    """`log_evidence` of many at once. `totals` and `squares` are of gains, in nats."""
    above = totals - counts * gain
    squared = squares - 2 * gain * totals + counts * gain * gain
    exponents = np.stack([theta * above - kappa * squared for theta, kappa in zip(THETAS, _KAPPAS, strict=True)])
    most = exponents.max(axis=0)
    return np.asarray(most + np.log(np.exp(exponents - most).sum(axis=0) / len(THETAS)), dtype=np.float64)


def intervals(sums: Sequence[Sums], thresholds: Sequence[float]) -> list[tuple[float, float]]:
    """The confidence sequence for the mean log ratio ln(challenger / holder), one (low, high) for each of `sums`.

    `thresholds` are ln(1 / error rate). Each end holds at its error rate for all times together, both at twice that.
    """
    if not sums:
        return []
    counts = np.array([s.count for s in sums], dtype=np.float64)
    totals = np.array([s.total / UNIT for s in sums])
    squares = np.array([s.squares / UNIT**2 for s in sums])
    needed = np.array(thresholds)
    low = _least(counts, totals, squares, needed)
    high = -_least(counts, -totals, squares, needed)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _least(counts: Numbers, totals: Numbers, squares: Numbers, thresholds: Numbers) -> Numbers:
    """The largest m, to 1e-10, such that the mean is shown to be above m; -CLIP, which it always is, if there is none."""
    low, high = np.full(len(counts), -CLIP), np.full(len(counts), CLIP)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        shown = log_evidences(counts, totals, squares, middle) >= thresholds
        low, high = np.where(shown, middle, low), np.where(shown, high, middle)
    return low
