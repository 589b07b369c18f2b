"""SN9's rule: every model against every other one on mean loss, an advantage that shrinks linearly, and a softmax.

    epsilon      of a model of some age: from `start` to `end` over the first `blocks`, linearly
    competitive  a model whose loss is below (1 - end) times the loss of every model committed before it or in the same
                 block; the others play no further part, so that copies cannot lower anybody's win rate
    match        of two competitive models the later one must get below the earlier one's loss * (1 - its epsilon)
    share        softmax of (matches won / matches played) / temperature

Sources: taoverse's LinearDecay, and compute_competitive_uids, compute_wins and the softmax of SN9's validator.

A worked example at block 10 000 000, epsilon from 0.5 % to 0.05 % in 50 400 blocks, temperature 0.01:

    model   age, blocks   mean loss   epsilon    bar for later ones   competitive?
    a            50 400     2.3000    0.05 %     2.29885              the oldest one
    b            25 200     2.2950    0.275 %    2.28869              2.2950 < 2.29885: yes
    c             1 000     2.2945    0.491 %    2.28323              2.2945 < 2.29885, not < 0.9995 * 2.2950 = 2.29385: no

b wins its match against a (2.2950 < 2.29885): win rates 1 and 0, shares 1 and e**-100 = 4e-44. At temperature 1 they
would be 0.731 and 0.269.

What is different from SN9, and why: a model that could not be scored on a sample on which somebody was scored has no
mean, so it is not competitive; SN9 keeps an oldest model of loss +inf. Who is not competitive gets nothing; SN9 gives
e**-100 to each, and at higher temperatures a share for being registered. Two models of one block that are within `end` of
each other put each other out in SN9; here the one that comes first in claim order stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sn29.records import Entry, Score
from sn29.rules.oldest_holder import Losses, usable
from sn29.rules.scoring_fields import Epsilon, PairwiseEpsilon


def judge(
    rule: PairwiseEpsilon, hotkeys: Sequence[str], losses: Losses, entries: Mapping[str, Entry], block: int
) -> tuple[Score, ...]:
    """The standing of every model."""
    blocks = [entries[hotkey].block for hotkey in hotkeys]
    epsilons = [epsilon_left(block - b, rule.epsilon) for b in blocks]
    means = mean_losses(losses)
    playing = competitive(means, blocks, rule.epsilon)
    wins = matches_won(means, blocks, epsilons, playing)
    plain_wins = matches_won(means, blocks, [0.0] * len(blocks), playing)
    # Who is alone has no match to lose: its rate is 1, as in SN9.
    rates, plain_rates = ({row: won[row] / (len(playing) - 1) if len(playing) > 1 else 1.0 for row in playing}
                          for won in (wins, plain_wins))  # fmt: skip
    shares = softmax(rates, rule.temperature)
    return tuple(
        Score(
            hotkey=hotkey,
            wins=float(wins.get(row, 0)),
            win_rate=rates.get(row, 0.0),
            win_rate_without_advantage=plain_rates.get(row, 0.0),
            advantage=1.0 - epsilons[row],
            weight=shares.get(row, 0.0),
        )
        for row, hotkey in enumerate(hotkeys)
    )


def epsilon_left(age_blocks: int, epsilon: Epsilon) -> float:
    """start - min(age / blocks, 1) * (start - end); a commitment from the future has the start."""
    return epsilon.start - min(max(age_blocks, 0) / epsilon.blocks, 1.0) * (epsilon.start - epsilon.end)


def mean_losses(losses: Losses) -> list[float]:
    """Mean nats over the samples on which somebody was scored; +inf for who was not scored on one of them.

    Exactly rounded sums (math.fsum), so that the order of the samples does not matter to the bit.
    """
    losses = usable(losses)
    scorable = np.isfinite(losses).any(axis=0)
    counted = losses if scorable.all() else losses[:, scorable]
    rows = counted.tolist()
    return [math.fsum(row) / len(row) if row and math.isfinite(max(row)) else math.inf for row in rows]


def competitive(means: Sequence[float], blocks: Sequence[int], epsilon: Epsilon) -> tuple[int, ...]:
    """Rows of the models that beat all earlier ones, and all of their block, at fully decayed epsilon."""
    decayed = 1.0 - epsilon_left(epsilon.blocks, epsilon)

    def stands(row: int, other: int) -> bool:
        if blocks[other] > blocks[row] or means[row] < decayed * means[other]:
            return True
        first_of_equals = blocks[other] == blocks[row] and row < other
        return first_of_equals and not means[other] < decayed * means[row]

    rows = range(len(means))
    return tuple(r for r in rows if math.isfinite(means[r]) and all(stands(r, other) for other in rows if other != r))


def matches_won(
    means: Sequence[float], blocks: Sequence[int], epsilons: Sequence[float], playing: Sequence[int]
) -> dict[int, int]:
    """Matches won by each of the rows in `playing` against the others of them; equal losses are won by nobody."""
    return {a: sum(_wins(a, b, means, blocks, epsilons) for b in playing if b != a) for a in playing}


def softmax(rates: Mapping[int, float], temperature: float) -> dict[int, float]:
    """exp(rate / temperature), normalised to sum 1; nothing of nothing."""
    best = max(rates.values(), default=0.0)
    powers = {row: math.exp((rate - best) / temperature) for row, rate in rates.items()}
    total = math.fsum(powers.values())
    return {row: power / total for row, power in powers.items()}


def _wins(a: int, b: int, means: Sequence[float], blocks: Sequence[int], epsilons: Sequence[float]) -> bool:
    mine = means[a] * (1.0 - epsilons[a]) if blocks[a] < blocks[b] else means[a]
    other = means[b] * (1.0 - epsilons[b]) if blocks[b] < blocks[a] else means[b]
    return mine < other
