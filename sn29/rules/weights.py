"""From the scores of a mechanism's competitions to the weights that a validator sets on chain for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from sn29.records import Score, Weights
from sn29.rules.competition import HallOfFame, WhenEmpty

KEEP = 0.5
"""Share of the last weights in the new ones: a round moves them half of the way, so one lucky window pays half at
most."""


def combine(
    shares: Mapping[str, float],
    scores: Mapping[str, Sequence[Score]],
    hall_of_fame: HallOfFame,
    last: Weights | None,
    block: int,
    registered: Collection[str],
    keep: float = KEEP,
    when_empty: Mapping[str, WhenEmpty] = MappingProxyType({}),
) -> Weights:
    """The weights after a round at `block`: `keep` of the last ones and the rest from this round.

    `shares` is each competition's share of the mechanism's reward, `scores` its result. A hotkey earns in every competition that
    it scores in. Only `registered` hotkeys (the metagraph's at `block`) get weight; what others had is spread by
    normalisation. What becomes of the share of a competition without a winner says `when_empty`, by competition:

        share   (also where nothing is said) the others get it in proportion to theirs, never the hall of fame
        hold    it stays with the last weights, as they were divided
        burn    `burn_hotkey` gets it

    A hold without last weights, and a burn to a hotkey that is not registered, are as `share`: the chain takes no
    weight for somebody who is not there. A round in which nobody scored and nothing is burned keeps the last weights as
    they are. Whether a competition is empty for good or only could not be judged (an outage of the Hub) is not known
    here: a caller who knows of an outage passes `hold`.

    Example: c00 and c01 share 0.5 each, c01 has no winner, the last weights are a 0.2 and b 0.8, a wins c00. Of the new
    part, share gives a 1; hold gives a 0.5 + 0.5 * 0.2 = 0.6 and b 0.4; burn gives a 0.5 and the burn hotkey 0.5. With
    `keep` 0.5 the result is half of that and half of the last weights.
    """
    rewards = hall_of_fame_shares(hall_of_fame, block, registered)
    for_models = max(0.0, 1.0 - math.fsum(rewards.values()))
    old = _normalised({h: w for h, w in last.by_hotkey.items() if h in registered}) if last is not None else {}
    earned = _earned(shares, scores, registered)
    held = 0.0
    for name in sorted(shares):
        if any(s.hotkey in registered and s.weight > 0 for s in scores.get(name, ())):
            continue
        policy = when_empty.get(name, WhenEmpty())
        if policy.policy == "burn" and policy.burn_hotkey in registered:
            earned[policy.burn_hotkey] = earned.get(policy.burn_hotkey, 0.0) + shares[name]
        elif policy.policy == "hold":
            held += shares[name]
    models = _normalised(_sum((earned, 1.0), (old, held)) if any(earned.values()) else {})
    if not models and for_models > 1e-9:
        return last if last is not None else Weights(block, {})
    new = _normalised(_sum((models, for_models), (rewards, 1.0)))
    return Weights(block, _normalised(_sum((old, keep), (new, 1.0 - keep))) if old else new)


def hall_of_fame_shares(hall_of_fame: HallOfFame, block: int, registered: Collection[str]) -> dict[str, float]:
    """What each registered hotkey of the hall of fame gets at `block`, as a share of all weights, 0..1.

    An entry pays  reward_epochs * (1 - decay) * decay ** epochs  of the weights, `epochs` being its age. The sum of
    (1 - decay) * decay ** k over all k is 1: in total it pays `reward_epochs` times the miner emission of one epoch.
    An entry whose block is still to come pays nothing yet. Together they get `max_fraction` at most, cut alike.
    """
    shares: dict[str, float] = {}
    for entry in hall_of_fame.entries:
        epochs = (block - entry.block) / hall_of_fame.blocks_per_epoch
        if entry.hotkey in registered and epochs >= 0:
            decay = hall_of_fame.decay_per_epoch
            shares[entry.hotkey] = shares.get(entry.hotkey, 0.0) + entry.reward_epochs * (1 - decay) * decay**epochs
    total = math.fsum(shares.values())
    if total > hall_of_fame.max_fraction:
        shares = {hotkey: share * (hall_of_fame.max_fraction / total) for hotkey, share in shares.items()}
    return dict(sorted(shares.items()))


def _earned(shares: Mapping[str, float], scores: Mapping[str, Sequence[Score]], registered: Collection[str]) -> dict[str, float]:
    earned: dict[str, float] = {}
    for name in sorted(scores):
        for s in sorted(scores[name], key=lambda s: s.hotkey):
            if s.hotkey in registered:
                earned[s.hotkey] = earned.get(s.hotkey, 0.0) + shares[name] * s.weight
    return earned


def _sum(*parts: tuple[Mapping[str, float], float]) -> dict[str, float]:
    hotkeys = {hotkey for part, _ in parts for hotkey in part}
    return {hotkey: math.fsum(part.get(hotkey, 0.0) * factor for part, factor in parts) for hotkey in hotkeys}


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Sum 1, sorted by hotkey, nothing for those with 0; empty when all have 0. Raises ValueError for what is no
    weight."""
    if not all(math.isfinite(w) and w >= 0 for w in weights.values()):
        raise ValueError(f"a weight that is negative or not finite: {dict(weights)}")
    total = math.fsum(weights.values())
    return {hotkey: weights[hotkey] / total for hotkey in sorted(weights) if weights[hotkey] > 0}
