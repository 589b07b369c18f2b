"""From the losses of one competition's models to their scores.

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

Wherever rows stand for models they are in claim order: oldest commitment first, and of one block the smaller hotkey
first. The chain's storage does not say who came first within a block. The hotkey is what every validator sees alike;
a uid can pass to somebody else, and the order of a dictionary depends on who asked for what first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sn29.records import Score
from sn29.rules.competition import Advantage, Competition

Losses = NDArray[np.float64]
"""Models x samples (or groups of samples): nats, +inf where a model could not be scored."""


def score(
    competition: Competition,
    losses: Mapping[str, Sequence[float]],
    commit_blocks: Mapping[str, int],
    block: int,
    seed: bytes,
) -> tuple[Score, ...]:
    """The standing of every model in `losses`, sorted by hotkey.

    `losses` has one row of nats per hotkey, all over the same samples in the same order; `commit_blocks` says since
    when each of them claims its model; `block` is the block that the round is about; `seed` is the same for all
    validators and decides which samples are grouped. Raises ValueError when the rows differ in length.
    """
    rule = competition.scoring
    hotkeys, table = _in_claim_order(losses, commit_blocks)
    blocks = [commit_blocks[hotkey] for hotkey in hotkeys]
    groups = group_losses(table, shuffled(table.shape[1], seed), rule.group)
    wins = oldest_holder(groups, blocks, block, rule.advantage)
    plain_wins = _count_wins(groups.argmin(axis=0), len(hotkeys)) if groups.size else wins
    won = groups.shape[1] or 1
    weights = skewed([count / won for count in wins.tolist()], rule.skew)
    scores = [
        Score(
            hotkey=hotkey,
            wins=float(wins[row]),
            win_rate=float(wins[row] / won),
            win_rate_without_advantage=float(plain_wins[row] / won),
            advantage=advantage_factor(block - blocks[row], rule.advantage),
            weight=weights[row],
        )
        for row, hotkey in enumerate(hotkeys)
    ]
    return tuple(sorted(scores, key=lambda s: s.hotkey))


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
    words = _words(seed)
    for last in range(n - 1, 0, -1):
        choices = last + 1
        fair = 2**64 - 2**64 % choices
        word = next(word for word in words if word < fair)
        order[last], order[word % choices] = order[word % choices], order[last]
    return tuple(order)


def group_losses(losses: Losses, order: Sequence[int], group: int) -> Losses:
    """Models x samples -> models x groups: sums over `group` samples at a time, taken in `order`; a rest is left out.

    A sum, not a mean, so a long text counts for more than a short one. A model that cannot be scored on one sample of
    a group cannot win the group: its sum is +inf. A sample that no model can be scored on adds nothing to its group,
    and a group that no model can be scored on is left out: nobody earns a point with it.
    """
    taken = _usable(losses)[:, list(order[: len(order) - len(order) % group])]
    scorable = np.isfinite(taken).any(axis=0)
    parts = np.where(scorable, taken, 0.0).reshape(len(losses), taken.shape[1] // group, group)
    sums = np.zeros(parts.shape[:2])
    for place in range(group):
        sums += parts[:, :, place]  # one after the other: np.sum may add in another order on another processor
    somebody = np.isfinite(sums).any(axis=0) & scorable.reshape(-1, group).any(axis=1)
    return sums[:, somebody]


def oldest_holder(losses: Losses, blocks: Sequence[int], block: int, advantage: Advantage) -> NDArray[np.int64]:
    """How many columns each model wins. Rows of `losses`, and `blocks` with them, are in claim order.

    The oldest model holds a column until a later one gets below the holder's loss times the holder's factor; then
    that one holds it, with a factor of its own. Only who can be scored can hold: a column without a finite loss has
    no winner.
    """
    losses = _usable(losses)
    factors = np.array([advantage_factor(block - b, advantage) for b in blocks])
    if not losses.size:
        return np.zeros(len(losses), dtype=np.int64)
    holder = np.zeros(losses.shape[1], dtype=np.int64)
    columns = np.arange(losses.shape[1])
    for row in range(1, len(losses)):
        bar = losses[holder, columns] * factors[holder]
        holder = np.where(losses[row] < bar, row, holder)
    return _count_wins(holder[np.isfinite(losses[holder, columns])], len(losses))


def skewed(win_rates: Sequence[float], skew: float) -> list[float]:
    """Win rates to shares of the reward: win_rate ** skew, normalised to sum 1; all 0 when nobody won."""
    best = max(win_rates, default=0.0)
    if best == 0:
        return [0.0] * len(win_rates)
    powers = [(rate / best) ** skew for rate in win_rates]  # over the best: a large skew cannot make all of them 0
    total = sum(powers)
    return [power / total for power in powers]


@dataclass(frozen=True, slots=True)
class WinMatrix:
    """Every model against every other one, in claim order; for reports, no score depends on it."""

    hotkeys: tuple[str, ...]
    wins: tuple[tuple[int, ...], ...]
    """[a][b]: samples on which a's loss is below b's."""
    wins_with_advantage: tuple[tuple[int, ...], ...]
    """[a][b]: samples on which a's loss times a's factor is below b's: where b would not take the sample from a."""
    mean_delta: tuple[tuple[float, ...], ...]
    """[a][b]: mean of a's loss less b's, in nats per sample, where both were scored; +inf when there is no such
    sample."""


def win_matrix(
    losses: Mapping[str, Sequence[float]], commit_blocks: Mapping[str, int], block: int, advantage: Advantage
) -> WinMatrix:
    """Pairwise comparison, sample by sample; arguments as in `score`."""
    hotkeys, table = _in_claim_order(losses, commit_blocks)
    factors = [advantage_factor(block - commit_blocks[hotkey], advantage) for hotkey in hotkeys]
    rows = range(len(hotkeys))
    return WinMatrix(
        hotkeys=hotkeys,
        wins=tuple(tuple(int((table[a] < table[b]).sum()) for b in rows) for a in rows),
        wins_with_advantage=tuple(tuple(int((table[a] * factors[a] < table[b]).sum()) for b in rows) for a in rows),
        mean_delta=tuple(tuple(_mean_delta(table[a], table[b]) for b in rows) for a in rows),
    )


def _in_claim_order(losses: Mapping[str, Sequence[float]], commit_blocks: Mapping[str, int]) -> tuple[tuple[str, ...], Losses]:
    hotkeys = tuple(sorted(losses, key=lambda hotkey: (commit_blocks[hotkey], hotkey)))
    lengths = {hotkey: len(losses[hotkey]) for hotkey in hotkeys}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"losses over different numbers of samples: {lengths}")
    num_samples = next(iter(lengths.values()), 0)
    table = np.array([losses[hotkey] for hotkey in hotkeys], dtype=np.float64).reshape(len(hotkeys), num_samples)
    return hotkeys, _usable(table)


def _usable(losses: Losses) -> Losses:
    """What is no loss (NaN, below 0) becomes +inf: it wins nothing, against nobody."""
    return np.where(losses >= 0, losses, np.inf)


def _count_wins(winners: NDArray[np.intp], num_models: int) -> NDArray[np.int64]:
    return np.bincount(winners, minlength=num_models).astype(np.int64)


def _mean_delta(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    return float((a[both] - b[both]).mean()) if both.any() else float("inf")


def _words(seed: bytes) -> Iterator[int]:
    counter = 0
    while True:
        digest = hashlib.sha256(seed + counter.to_bytes(8, "big")).digest()
        yield from (int.from_bytes(digest[at : at + 8], "big") for at in range(0, 32, 8))
        counter += 1
