"""From the losses of one competition's models to their scores, by the rule that the competition names.

    champion           ours, and the default: `rules.champion`
    oldest_holder      the reference's: `rules.oldest_holder`
    pairwise_epsilon   SN9's: `rules.pairwise_epsilon`

Wherever rows stand for models they are in claim order: oldest commitment first. The chain's storage does not say who came
first within a block, and a uid, a hotkey or the place of an extrinsic can be chosen by who wants to be first. So of one
block the order is that of sha256(window's seed, content id): it is fixed by a block that comes after the commitments, so
nobody can search for a content that comes first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sn29.records import Entry, Score
from sn29.rules import champion, oldest_holder, pairwise_epsilon
from sn29.rules.champion import Duel as Duel
from sn29.rules.champion import Memory as Memory
from sn29.rules.competition import Competition
from sn29.rules.oldest_holder import Losses, usable
from sn29.rules.scoring_fields import Advantage, Champion, OldestHolder, PairwiseEpsilon, Scoring

_NOTHING = Memory.empty()


@dataclass(frozen=True, slots=True)
class Scored:
    """What a window decides in one competition."""

    scores: tuple[Score, ...]
    """Sorted by hotkey: everybody who was evaluated, and who is paid without it."""
    memory: Memory
    """For the next window; under the rules that remember nothing, what came in."""
    duels: tuple[Duel, ...]
    """Sorted by challenger; none under the other rules."""


def score(
    competition: Competition,
    losses: Mapping[str, Sequence[float]],
    entries: Mapping[str, Entry],
    block: int,
    seed: bytes,
    memory: Memory = _NOTHING,
) -> Scored:
    """The standing of every model in `losses`.

    `losses` has one row of nats per hotkey, all over the same samples in the same order; +inf (or NaN, or less than 0) is
    a sample that the model could not be scored on. Under `champion` a row may be shorter than the longest one: the model was
    not measured on the samples after it, which is neither a win nor a loss. `entries` has at least these hotkeys. Whoever has
    a valid commitment and was left out by the validator's own choice belongs in it too, and a holder of the crown that did
    not answer. `block` is the window's; `seed` is the same for all validators, and unknown when the models were committed.
    `memory` is what the window before left. Raises ValueError when the rows differ in length under another rule, or when
    `memory` knows this window already.
    """
    rule = competition.scoring
    hotkeys, table = _in_claim_order(losses, entries, seed)
    if isinstance(rule, Champion):
        verdict = champion.judge(rule, hotkeys, table, entries, block, seed, memory)
        return Scored(verdict.scores, verdict.memory, verdict.duels)
    lengths = {hotkey: len(row) for hotkey, row in losses.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"losses over different numbers of samples: {lengths}")
    if isinstance(rule, OldestHolder):
        scores = oldest_holder.judge(rule, hotkeys, table, entries, block, seed)
    else:
        scores = pairwise_epsilon.judge(rule, hotkeys, table, entries, block)
    return Scored(tuple(sorted(scores, key=lambda s: s.hotkey)), memory, ())


def advantage_factor(age_blocks: int, rule: Scoring | Advantage) -> float:
    """What a later model's loss must get below, as a fraction of the loss of a model committed `age_blocks` ago."""
    if isinstance(rule, Champion):
        return champion.factor(age_blocks, rule.advantage)
    if isinstance(rule, PairwiseEpsilon):
        return 1.0 - pairwise_epsilon.epsilon_left(age_blocks, rule.epsilon)
    return oldest_holder.advantage_factor(age_blocks, rule.advantage if isinstance(rule, OldestHolder) else rule)


@dataclass(frozen=True, slots=True)
class WinMatrix:
    """Every model against every other one, oldest commitment first; for reports, no score depends on it."""

    hotkeys: tuple[str, ...]
    wins: tuple[tuple[int, ...], ...]
    """[a][b]: samples on which a's loss is below b's."""
    wins_with_advantage: tuple[tuple[int, ...], ...]
    """[a][b]: samples on which a's loss times a's factor is below b's: where b would not take the sample from a."""
    mean_delta: tuple[tuple[float, ...], ...]
    """[a][b]: mean of a's loss less b's, in nats per sample, where both were scored; +inf when there is no such
    sample."""


def win_matrix(
    losses: Mapping[str, Sequence[float]], commit_blocks: Mapping[str, int], block: int, rule: Scoring | Advantage
) -> WinMatrix:
    """Pairwise comparison, sample by sample, under the advantage of any rule; of who was stopped, on what was measured."""
    hotkeys = tuple(sorted(losses, key=lambda hotkey: (commit_blocks[hotkey], hotkey)))
    table = _table(hotkeys, losses)
    factors = [advantage_factor(block - commit_blocks[hotkey], rule) for hotkey in hotkeys]
    rows = range(len(hotkeys))
    return WinMatrix(
        hotkeys=hotkeys,
        wins=tuple(tuple(int((table[a] < table[b]).sum()) for b in rows) for a in rows),
        wins_with_advantage=tuple(tuple(int((table[a] * factors[a] < table[b]).sum()) for b in rows) for a in rows),
        mean_delta=tuple(tuple(_mean_delta(table[a], table[b]) for b in rows) for a in rows),
    )


def _in_claim_order(
    losses: Mapping[str, Sequence[float]], entries: Mapping[str, Entry], seed: bytes
) -> tuple[tuple[str, ...], Losses]:
    def claim(hotkey: str) -> tuple[int, bytes, bytes]:
        content = entries[hotkey].content_id.encode()
        lots = (hashlib.sha256(seed + b"\0" + content + tail).digest() for tail in (b"", b"\0" + hotkey.encode()))
        return entries[hotkey].block, *lots  # type: ignore[return-value]

    hotkeys = tuple(sorted(losses, key=claim))
    return hotkeys, _table(hotkeys, losses)


def _table(hotkeys: Sequence[str], losses: Mapping[str, Sequence[float]]) -> Losses:
    """A row for each, NaN behind its last loss."""
    lengths = [len(losses[hotkey]) for hotkey in hotkeys]
    table = np.zeros((len(hotkeys), max(lengths, default=0)))
    for row, hotkey in enumerate(hotkeys):
        table[row, : lengths[row]] = losses[hotkey]
    table = usable(table)
    for row, length in enumerate(lengths):
        table[row, length:] = np.nan
    return table


def _mean_delta(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    return float((a[both] - b[both]).mean()) if both.any() else float("inf")
