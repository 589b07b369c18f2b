"""What will stand on chain for a validator's shares: fitted to the subnet's smallest count and largest share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sn29.errors import Reason, Rejected

TOP = 65535
"""The chain's largest value of a weight; the largest of a row always has it."""


def conform(shares: Mapping[str, float], order: Sequence[str], min_weights: int = 1, max_weight: float = 1.0) -> dict[str, int]:
    """The chain's values (1..65535, the largest 65535) by hotkey, from non-negative shares; empty when nothing is left.

    order: the registered hotkeys by uid; a share for anybody else is dropped. In this order:

    1. Every share is divided by the largest and rounded to 65535ths; what rounds to 0 is left out.
    2. With fewer than `min_weights` hotkeys, the first of `order` that have nothing get 1 of 65535 each: the chain takes
       no shorter row, and nobody can be given less. Where fewer are registered at all, it takes a row of all of them.
    3. No hotkey gets more than `max_weight` of the sum: what is cut off goes to the others in proportion, until nobody
       is above it.

    The SDK's own fitting leaves such values as they are, and so does the chain, so a row can be compared exactly.
    Raises Rejected(NO_WEIGHTS) when too few have weight for `max_weight`, or nobody may have any.
    """
    row = {h: float(shares[h]) for h in order if shares.get(h, 0) > 0}
    if not row:
        return {}
    top = max(row.values())
    row = {h: w for h, w in row.items() if round(w / top * TOP)}
    row |= dict.fromkeys([h for h in order if h not in row][: max(0, min_weights - len(row))], top / TOP)
    limit = round(max_weight * TOP)
    if limit <= 0:
        raise Rejected(Reason.NO_WEIGHTS, f"a largest weight of {max_weight:.4g}", "a subnet that lets somebody have weight")
    if len(row) * limit < TOP:
        rule = f"at least {math.ceil(TOP / limit)}, of which none may have more than {max_weight:.4g}"
        raise Rejected(Reason.NO_WEIGHTS, f"{len(row)} hotkeys with weight", rule)
    cut = _cutoff(sorted(row.values(), reverse=True), limit / TOP)
    values = {h: max(1, round(min(w, cut) / cut * TOP)) for h, w in row.items()}
    while limit * sum(values.values()) < TOP * TOP:  # rounding down may leave the largest a hair above the limit
        values = {h: min(v + 1, TOP) for h, v in values.items()}
    return {h: values[h] for h in order if h in values}


def fractions(values: Mapping[str, int]) -> dict[str, float]:
    """The row as shares of its sum: what the chain's own values mean."""
    total = sum(values.values())
    return {hotkey: value / total for hotkey, value in values.items()}


def _cutoff(falling: Sequence[float], limit: float) -> float:
    """The value that nobody may exceed so that it is at most `limit` of the sum of all, cut down to it.

    With the k largest cut down to c, c / (k c + rest) = limit, hence c = limit rest / (1 - k limit).
    """
    rest = math.fsum(falling)
    if falling[0] <= limit * rest:
        return falling[0]
    for k, value in enumerate(falling):
        if k * limit < 1:
            cut = limit * rest / (1 - k * limit)
            if k and value <= cut:
                return cut
        rest -= value
    return falling[-1]
