"""Where two validators' records of one round differ, first cause first.

A round flows from the chain to the weights, and so does the order here: the block, the competition file in force, the text
and its samples, the commitments and their outcomes, the files that were judged and since when they are claimed, the losses,
what the scoring rule remembered, who was stopped before the last sample, scores, weights. Whoever differs early differs in
everything after it; the first line is the one to look into.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sn29.records import Weights
from sn29.round_record import CompetitionRecord, Json, ModelRecord, RoundRecord, encode


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same."""

    what: str
    """Which value, e.g. `c00: scores[0].weight`."""
    first: str
    """What the first record has there, shortened."""
    second: str
    note: str = ""
    """How much it is, where that can be said."""

    def __str__(self) -> str:
        return f"{self.what}: {self.first} | {self.second}{f' ({self.note})' if self.note else ''}"


def audit(first: RoundRecord, second: RoundRecord) -> tuple[Difference, ...]:
    """Every stage in which the two differ, at most one difference for each stage and competition; empty when they are equal.

    What does not decide anything by itself (versions, machine) stands before the losses: it is their usual cause.
    """
    names = sorted(first.competitions.keys() & second.competitions.keys())
    pairs = [(name, first.competitions[name], second.competitions[name]) for name in names]
    found = [
        _differs("block", first.head.block, second.head.block),
        _differs("block hash", first.head.hash, second.head.hash),
        _differs("competitions", sorted(first.competitions), sorted(second.competitions)),
    ]
    for stage in _STAGES[:_MEASURED]:
        found += [stage(name, a, b) for name, a, b in pairs]
    found.append(_differs("commitments to no competition", _plain(first.no_competition), _plain(second.no_competition)))
    found.append(_differs("software versions", dict(first.versions), dict(second.versions)))
    found.append(_differs("machine", dict(first.machine), dict(second.machine)))
    for stage in _STAGES[_MEASURED:]:
        found += [stage(name, a, b) for name, a, b in pairs]
    found.append(_differs("registered hotkeys", list(first.registered), list(second.registered)))
    found.append(_differs("hall of fame", first.hall_of_fame, second.hall_of_fame))
    found.append(_differs("last weights", _by_mechanism(first.last_weights), _by_mechanism(second.last_weights)))
    found.append(_differs("weights", _by_mechanism(first.weights), _by_mechanism(second.weights)))
    known = tuple(d for d in found if d is not None)
    rest = None if known else _differs("record", json.loads(encode(first)), json.loads(encode(second)))
    return (rest,) if rest else known


def first_difference(first: Json, second: Json, what: str) -> Difference | None:
    """The first place, in the order of keys and indices, where two JSON values are not the same; floats to the bit."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = sorted(first.keys() | second.keys())
        inner = ((first.get(key, _NOTHING), second.get(key, _NOTHING), f"{what}.{key}") for key in keys)
        return next((d for d in (first_difference(*each) for each in inner) if d is not None), None)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return Difference(what, f"{len(first)} entries", f"{len(second)} entries")
        inner = ((a, b, f"{what}[{i}]") for i, (a, b) in enumerate(zip(first, second, strict=True)))
        return next((d for d in (first_difference(*each) for each in inner) if d is not None), None)
    # repr, not ==: true is not 1, 1 is not 1.0, and -0.0 is not 0.0
    return None if repr(first) == repr(second) else Difference(what, _shown(first), _shown(second))


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


# --- stages -----------------------------------------------------------------------------------------------------------


def _file(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    return _differs(f"{name}: competition in force", a.parameters, b.parameters) or _differs(
        f"{name}: competition file's sha256", a.file_sha256, b.file_sha256
    )


def _window(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    return _differs(f"{name}: window", asdict(a.window), asdict(b.window))


def _datasets(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    return _differs(f"{name}: data set's revision", dict(a.datasets), dict(b.datasets))


def _samples(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    return _differs(f"{name}: samples", _plain(a.samples), _plain(b.samples))


def _outcomes(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    one, other = ({m.hotkey: {**asdict(m.outcome), "content_id": ""} for m in r.models} for r in (a, b))
    return _differs(f"{name}: outcomes", one, other)


def _contents(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    one, other = ({m.hotkey: [m.outcome.content_id, m.tokenizer_id] for m in r.models} for r in (a, b))
    return _differs(f"{name}: content and tokenizer", one, other)


def _claims(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    """Since when each claims its content: what a validator has seen of claims that were made again since."""
    one, other = ({m.hotkey: m.entry and asdict(m.entry) for m in r.models} for r in (a, b))
    return _differs(f"{name}: claims", one, other)


def _losses(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    """The largest relative difference, and how many there are; only where both judged the same samples."""
    if [s.id for s in a.samples] != [s.id for s in b.samples]:
        return Difference(f"{name}: losses", "of other samples", "of other samples", "nothing to compare")
    both = [(m, other) for m in a.models if m.evaluated and (other := b.model(m.hotkey)) and other.evaluated]
    unequal = [found for m, other in both for found in _unequal(m, other)]
    if not unequal:
        return None
    relative, hotkey, at, one, two = max(unequal, key=lambda found: found[0])
    total = sum(min(len(m.losses), len(other.losses)) for m, other in both)
    note = f"relative {relative:.3g}, the largest of {len(unequal):,} differences in {total:,} losses"
    return Difference(f"{name}: losses of {hotkey} on sample {a.samples[at].id}", repr(one), repr(two), note)


def _unequal(m: ModelRecord, other: ModelRecord) -> Iterator[tuple[float, str, int, float, float]]:
    for at, (one, two) in enumerate(zip(m.losses, other.losses, strict=False)):  # of what both measured
        if one != two:
            finite = math.isfinite(one) and math.isfinite(two)
            yield abs(one - two) / max(one, two) if finite else math.inf, m.hotkey, at, one, two


def _stopped(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    """Who was stopped where: losses that differ a little, or another memory, can stop a model one portion earlier or later."""
    one, other = ({m.hotkey: _measured(m, len(r.samples)) for m in r.models if m.evaluated} for r in (a, b))
    unequal = [h for h in sorted(one.keys() & other.keys()) if one[h] != other[h]]
    return Difference(f"{name}: measuring of {unequal[0]}", one[unequal[0]], other[unequal[0]]) if unequal else None


def _measured(m: ModelRecord, total: int) -> str:
    return m.stopped or f"measured on all {total:,} samples"


def _memory(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    return _differs(f"{name}: memory before", a.memory_before, b.memory_before)


def _scores(name: str, a: CompetitionRecord, b: CompetitionRecord) -> Difference | None:
    one, other = ({s.hotkey: asdict(s) for s in r.scores} for r in (a, b))
    return (
        _differs(f"{name}: scores", one, other)
        or _differs(f"{name}: duels", a.duels, b.duels)
        or _differs(f"{name}: memory after", a.memory_after, b.memory_after)
    )


_STAGES: tuple[Callable[[str, CompetitionRecord, CompetitionRecord], Difference | None], ...] = (
    _file, _window, _datasets, _samples, _outcomes, _contents, _claims, _losses, _memory, _stopped, _scores,
)  # fmt: skip
_MEASURED = 7
"""Stages before anything is measured."""


def _differs(what: str, first: Json, second: Json) -> Difference | None:
    return first_difference(first, second, what)


def _plain(value: tuple[Any, ...]) -> Json:
    return [asdict(item) for item in value]


def _by_mechanism(weights: Mapping[int, Weights]) -> Json:
    return {str(m): {"block": one.block, "by_hotkey": dict(one.by_hotkey)} for m, one in weights.items()}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
