"""The reference's rule: the oldest model holds a group of samples until a later one is better by its advantage.

A worked example: three models, committed 30, 20 and 10 epochs ago, five samples, an advantage of 0.4 % that shrinks to
99.5 % of itself with every epoch. `bar` is what a later model must get below: the holder's loss times its factor.

    model    factor      sample 1   sample 2   sample 3   sample 4   sample 5
    oldest   0.996558        1000        900       1200        800       +inf
    middle   0.996382         997        905       1190        798       1500
    newest   0.996196         996        890       1195      799.5       1499
    bar of the oldest      996.56     896.90    1195.87     797.25       +inf
    holder after middle    oldest     oldest     middle     oldest     middle
    its bar                996.56     896.90    1185.69     797.25    1494.57
    winner                 newest     newest     middle     oldest     middle

Wins 1, 2, 2; win rates 0.2, 0.4, 0.4. Without the advantage they would be 0, 0.4, 0.6.

It pays for variance: the lowest of several noisy numbers wins, whatever their mean is. `champion` does not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sn29.records import Entry, Score
from sn29.rules.scoring_fields import Advantage, OldestHolder

Losses = NDArray[np.float64]
"""Models x samples (or groups of samples): nats, +inf where a model could not be scored. Rows are in claim order."""
_WORD = 2**64 - 1


def judge(
    rule: OldestHolder, hotkeys: Sequence[str], losses: Losses, entries: Mapping[str, Entry], block: int, seed: bytes
) -> tuple[Score, ...]:
    """The standing of every model; `seed` decides which samples are grouped."""
    blocks = [entries[hotkey].block for hotkey in hotkeys]
    groups = group_losses(losses, shuffled(losses.shape[1], seed), rule.group)
    wins = holds(groups, blocks, block, rule.advantage)
    plain_wins = _count_wins(groups.argmin(axis=0), len(hotkeys)) if groups.size else wins
    won = groups.shape[1] or 1
    weights = skewed([count / won for count in wins.tolist()], rule.skew)
    return tuple(
        Score(
            hotkey=hotkey,
            wins=float(wins[row]),
            win_rate=float(wins[row] / won),
            win_rate_without_advantage=float(plain_wins[row] / won),
            advantage=advantage_factor(block - blocks[row], rule.advantage),
            weight=weights[row],
        )
        for row, hotkey in enumerate(hotkeys)
    )


def advantage_factor(age_blocks: int, advantage: Advantage) -> float:
    """What a later model's loss must get below, as a fraction of the loss of a model committed `age_blocks` ago.

    1 - initial * decay_per_epoch ** epochs. A commitment from the future (negative age) has no advantage: 1.
    """
    if age_blocks < 0:
        return 1.0
    return 1.0 - advantage.initial * math.pow(advantage.decay_per_epoch, age_blocks / advantage.blocks_per_epoch)


def shuffled(n: int, seed: bytes) -> tuple[int, ...]:
    """The numbers 0 to n - 1 in an order that `seed` decides: the same on every machine and in every version.

    Fisher-Yates from the back; each index comes from the next 64-bit word of SHA-256(seed, counter), and a word above
    the largest multiple of the range is drawn again, so that every order is equally likely.
    """
    order = list(range(n))
    stream = words(seed)
    for last in range(n - 1, 0, -1):
        choices = last + 1
        fair = 2**64 - 2**64 % choices
        word = next(stream)
        while word >= fair:
            word = next(stream)
        place = word % choices
        order[last], order[place] = order[place], order[last]
    return tuple(order)


def words(seed: bytes) -> Iterator[int]:
    """64-bit words, four from each SHA-256(seed, counter): no end of them, and only the seed decides."""
    counter = 0
    while True:
        digest = hashlib.sha256(seed + counter.to_bytes(8, "big")).digest()
        number = int.from_bytes(digest, "big")
        yield number >> 192
        yield number >> 128 & _WORD
        yield number >> 64 & _WORD
        yield number & _WORD
        counter += 1


def group_losses(losses: Losses, order: Sequence[int], group: int) -> Losses:
    """Models x samples -> models x groups: sums over `group` samples at a time, taken in `order`; a rest is left out.

    A sum, not a mean, so a long text counts for more than a short one. A model that cannot be scored on one sample of
    a group cannot win the group: its sum is +inf. A sample that no model can be scored on adds nothing to its group,
    and a group that no model can be scored on is left out: nobody earns a point with it.
    """
    losses = usable(losses)
    places = np.array(order[: len(order) - len(order) % group], dtype=np.intp).reshape(-1, group).T.copy()
    failed = losses.max(initial=0.0) == np.inf
    scorable = losses.min(axis=0, initial=np.inf) < np.inf if failed else np.ones(losses.shape[1], dtype=bool)
    sums = np.zeros((len(losses), places.shape[1]))
    for row, values in enumerate(losses):
        counted = np.where(scorable, values, 0.0) if failed else values
        for part in counted[places]:  # one after the other: np.sum may add in another order on another processor
            sums[row] += part
    if not failed:
        return sums
    return sums[:, np.isfinite(sums).any(axis=0) & scorable[places].any(axis=0)]


def holds(losses: Losses, blocks: Sequence[int], block: int, advantage: Advantage) -> NDArray[np.int64]:
    """How many columns each model wins. Rows of `losses`, and `blocks` with them, are in claim order.

    The oldest model holds a column until a later one gets below the holder's loss times the holder's factor; then
    that one holds it, with a factor of its own. Only who can be scored can hold: a column without a finite loss has
    no winner.
    """
    losses = usable(losses)
    if not losses.size:
        return np.zeros(len(losses), dtype=np.int64)
    factors = [advantage_factor(block - b, advantage) for b in blocks]
    holder = np.zeros(losses.shape[1], dtype=np.intp)
    bar = losses[0] * factors[0]
    for row in range(1, len(losses)):
        taken = losses[row] < bar
        holder[taken] = row
        bar[taken] = losses[row, taken] * factors[row]
    return _count_wins(holder[np.isfinite(bar)], len(losses))


def skewed(win_rates: Sequence[float], skew: float) -> list[float]:
    """Win rates to shares of the reward: win_rate ** skew, normalised to sum 1; all 0 when nobody won."""
    best = max(win_rates, default=0.0)
    if best == 0:
        return [0.0] * len(win_rates)
    powers = [(rate / best) ** skew for rate in win_rates]  # over the best: a large skew cannot make all of them 0
    total = sum(powers)
    return [power / total for power in powers]


def usable(losses: Losses) -> Losses:
    """What is no loss (NaN, below 0) becomes +inf: it wins nothing, against nobody."""
    if losses.min(initial=np.inf) >= 0:  # the least of anything and NaN is NaN
        return losses
    return np.where(losses >= 0, losses, np.inf)


def _count_wins(winners: NDArray[np.intp], num_models: int) -> NDArray[np.int64]:
    return np.bincount(winners, minlength=num_models).astype(np.int64)
