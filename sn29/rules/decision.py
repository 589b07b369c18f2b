"""From what a round measured to scores and weights: the one place where they are decided.

The validator decides with `decide`, and a replay of the round's record does so too: nothing else stands between losses
and weights, so the two cannot drift apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sn29.records import Entry, Weights, Window
from sn29.rules.competition import Competition, HallOfFame, WhenEmpty
from sn29.rules.scoring import Memory, Scored, score
from sn29.rules.weights import combine


@dataclass(frozen=True, slots=True)
class Contest:
    """One competition in one round, measured and not yet scored."""

    competition: Competition
    """As it is in force in this round."""
    window: Window
    losses: Mapping[str, Sequence[float]]
    """Nats of every sample, by hotkey; all over the same samples in the same order."""
    entries: Mapping[str, Entry]
    """What each of these hotkeys entered, and since when; and everybody else's valid entry that was not evaluated in this
    round, for want of a place or of an answer: a rule may let them keep what they have."""
    memory: Memory
    """What the scoring rule remembers of earlier windows. A window that is judged in a second round (another competition's
    window opened meanwhile) starts from the same memory again: none of its samples may count twice."""
    outage: bool = False
    """Whether some of its models did not answer: then an empty competition is not empty for good: its share stays with the
    last weights, whatever `when_empty` says."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a round decides."""

    scored: Mapping[str, Scored]
    """Scores, memory and duels, by competition."""
    weights: Mapping[int, Weights]
    """By mechanism, sorted: those that a competition of the round is paid by."""


def group_seed(window: Window) -> bytes:
    """What orders the samples into groups: sha256 of "<seed block's hash> <competition> <window's index> groups"."""
    return hashlib.sha256(f"{window.seed.hash} {window.competition} {window.index} groups".encode()).digest()


def score_contest(contest: Contest, block: int | None = None) -> Scored:
    """The standings of one competition. Ages are counted to the window's seed block, or to another `block` if one is
    asked for."""
    at = contest.window.seed.block if block is None else block
    return score(contest.competition, contest.losses, contest.entries, at, group_seed(contest.window), contest.memory)


def decide(
    contests: Mapping[str, Contest],
    hall_of_fame: HallOfFame,
    last: Mapping[int, Weights],
    block: int,
    registered: Collection[str],
) -> Decision:
    """Scores of every competition, and the weights of the round of `block`, each mechanism's by themselves.

    `last` is what the round before decided, by mechanism (empty in the first one); `registered` are the subnet's hotkeys
    at `block`. The hall of fame is paid by every mechanism alike, so that it gets its share of the subnet's emission
    however that is split between them. Does not depend on the order of a mapping. The weights belong to `block` also
    when the last ones are kept.
    """
    scored = {name: score_contest(contests[name]) for name in sorted(contests)}
    weights = {}
    for mechanism in sorted({contest.competition.mechanism for contest in contests.values()}):
        paid = {name: contest for name, contest in contests.items() if contest.competition.mechanism == mechanism}
        combined = combine(
            {name: contest.competition.reward_share for name, contest in paid.items()},
            {name: scored[name].scores for name in paid},
            hall_of_fame,
            last.get(mechanism),
            block,
            registered,
            when_empty={name: _on_empty(contest) for name, contest in paid.items()},
        )
        weights[mechanism] = replace(combined, block=block)
    return Decision(scored, weights)


def _on_empty(contest: Contest) -> WhenEmpty:
    return WhenEmpty("hold") if contest.outage else contest.competition.on_empty
