"""Which models are the same model in disguise, told by their losses.

The losses of a model are its fingerprint. The standard deviation of the per-sample log ratio of two models' losses was
measured to be at most 1e-7 for exact, permuted or rescaled copies, 2e-4 for 0.1 % noise on the weights, 3e-4 for weights
rounded to bfloat16, and 3e-2 or more for models that were trained apart. Below 1e-3 they are one model, which belongs to
the earlier commitment.
"""

from __future__ import annotations

import math

import numpy as np

from sn29.rules.evidence import CLIP, UNIT, Numbers, Sums, log_ratios, sums_of

MIN_COMMON = 16
"""Samples that two models must both be scored on to be called near copies, unless they are equal on all of them. Two
models that differ by 1 % per sample look like one on 16 samples with a probability below 1e-11 (chi-square with 15 degrees
of freedom below 0.16)."""
_FILTER = 512
"""Samples that the first look at all pairs uses: of 20 000 samples it sorts out pairs that differ by 0.6 % or more."""


def first_of_each(losses: Numbers, threshold: float, margin: float = math.inf) -> list[int]:
    """For each row the row of the model that it belongs to: its own, or that of the earliest model that it copies.

    Rows are in claim order; NaN where a model was not measured. A copy of a copy belongs to the first of them. A later model
    whose mean log ratio is more than `margin` below the earlier one's is no copy, however alike they are: it has a real
    improvement to show (40 steps of fine-tuning vary by 8e-4 only), and a copy that is worth the margin has to be made.
    """
    first = list(range(len(losses)))
    for row, earlier in _candidates(losses, threshold):
        if first[row] == row and is_near(losses[row], losses[earlier], threshold, margin):
            first[row] = first[earlier]
    return first


def is_near(one: Numbers, other: Numbers, threshold: float, margin: float = math.inf) -> bool:
    """Whether the log ratio, over the samples on which both were scored, varies by less than the threshold.

    A pair with a sample on which it differs by CLIP is not near: the cut would hide how much. Nor is one of which either was
    not measured to the end (NaN), unless they are equal wherever both were: 16 samples call 38 % of models that vary by
    1.1e-3 near, and decide by chance whether the later one is better by the margin; who was stopped has lost anyhow.
    """
    sums, largest = common(one, other)
    if sums.count == 0 or largest >= CLIP * UNIT:
        return False
    if sums.squares == 0:
        return True
    if sums.mean < -margin:  # `one` is the later model, and better by more than that
        return False
    whole = not (np.isnan(one).any() or np.isnan(other).any())
    return whole and sums.count >= MIN_COMMON and sums.spread < threshold


def common(one: Numbers, other: Numbers) -> tuple[Sums, int]:
    """Sums over the samples on which both were scored, and the largest log ratio among them, in units of 1 / UNIT."""
    both = np.isfinite(one) & np.isfinite(other)
    ratios, _ = log_ratios(one, other) if both.all() else log_ratios(one[both], other[both])
    return sums_of(ratios, None), int(np.abs(ratios).max(initial=0))


def _candidates(losses: Numbers, threshold: float) -> list[tuple[int, int]]:
    """Pairs (row, earlier row) that may be near copies, in order; never leaves out one that is.

    The squared deviations of some samples are no more than those of all samples, n * threshold^2 for near copies. They
    come from products of matrices, which differ in the last bits from machine to machine: `room` is wider than that.
    """
    part = losses[:, :_FILTER]
    known = np.isfinite(part) & (part > 0)
    logs = np.log(np.where(known, part, 1.0))
    weights = known.astype(np.float64)
    squares = logs * logs
    counts = weights @ weights.T
    of_row = squares @ weights.T
    of_both = of_row + of_row.T
    sums = logs @ weights.T
    deviations = of_both - 2.0 * (logs @ logs.T) - (sums - sums.T) ** 2 / np.maximum(counts, 1.0)
    room = losses.shape[1] * (1.01 * threshold + 1e-6) ** 2 + 1e-11 * of_both
    scored = np.isfinite(losses).any(axis=1)
    near = (deviations <= room) & np.logical_and.outer(scored, scored)
    rows, earlier = np.nonzero(np.tril(near, -1))
    return list(zip(rows.tolist(), earlier.tolist(), strict=True))
