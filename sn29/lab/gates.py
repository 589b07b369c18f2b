"""Which gates of a model's MLPs carry it, which sets of them do so together, and which do nothing.

A gate is one input of an MLP's last matrix (`ablation.py`). One pass forward and backward gives four measures of every gate;
each finds others (on SmolLM2-135M gate 200 of layer 9 is first by the last two, 14th by the first, below 24th by the second):

    magnitude    max |a| times the norm of its column of the last matrix
    energy       sum of a^2
    first order  |sum of a dL/da|
    fisher       sqrt(sum of (a dL/da)^2)

What any of them names is a candidate, and candidates are ablated exactly. A single ablation is not enough: two gates that feed
the same dimension stand in for each other, so that without one of them nothing happens. Sets are looked for in each layer:

    together    all candidates of the layer are removed at once; where that costs little, no set of them costs much
    beginnings  the dearest alone; pairs of the dearest few; the first 4 and the first 8 by each measure
    by need     if none of these costs enough and all together do: the gates without which the others cost least
    the set     the smallest beginning that costs enough, without its idle members; then with the gate that adds most, as long
                as one adds 1 % of the loss and a fifth of what the set costs: the few that carry, not all that help
    again       without the set's gates, until the rest costs less than what is looked for
    filled      a set that costs little more than it has to, with others of its layer that no set has, where they add 1 % together

Everything is chosen on the documents of the search, and what is said of it is measured on others, by which nothing is chosen
(but a set is not told of when they do not show that it costs anything).

Gates that do nothing are the least important ones, as many as can go while no document's loss changes much: |change| is summed
over documents, so that what helps one and hurts another is no nothing. Counts are tried upwards, and the last one before the
first that changes too much is taken, so that a large change is never passed over because still more gates make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from sn29.lab.ablation import Measures, Removal, Spike, Subject, down_of
from sn29.lab.losses import Change, change
from sn29.lab.weights import Report, silent

SCREENS = ("magnitude", "energy", "first order", "fisher")
_POOL = 32
"""Most candidates of a layer in which sets are looked for."""
_ALONE, _PAIRED = 12, 4
"""Candidates of such a layer that are removed by themselves, and the dearest of them, all pairs of which are."""
_GROUPS = (4,)
"""Gates that stand highest by one measure and are removed together; and as many as a set may have."""
_TRIED = 4
"""Gates that are tried at each step of a set's growth."""
_CROSSED = 4
"""Dearest gates that are set against gates and sets of other layers."""
_LEAST_GAIN, _LEAST_SHARE = 0.01, 0.2
"""What a gate must add to stay in a set, of the loss; and to come into it, of what the set costs, too."""
_SUSPECT = 0.5
"""Sets are looked for where all candidates together cost this part of what a set has to."""
REMOVED = (0.9, 1.0)
"""Shares of a layer's gates that are removed for its curve, the least important first."""
_SHARES = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
"""Of all gates of the model, but for those that have no effect at all: where dead ones are looked for."""
_FINER = 4
"""Points between the last of these that is within the tolerance and the next."""
_FLATTERED = 0.5
"""Of the tolerance, what gates may change on the documents by which they are chosen: 230 gates of SmolLM2-135M that move these by
0.28 % of their loss move others by 0.43 %, and 922 by 0.53 and 0.93 %."""
_SAFE = 1.5
"""Times the threshold: a set that costs less than this in the search is filled."""

Gate = tuple[int, int]
"""(layer, number)"""
Say = Callable[[str], Report]
"""say(what begins) -> the report of its progress."""


def quietly(_: str) -> Report:
    """The `Say` that says nothing."""
    return silent


@dataclass(frozen=True, slots=True)
class Plan:
    """What is looked for."""

    top: int = 24
    """Candidates that each measure names over all layers."""
    singles: int = 8
    """Gates that are told of by themselves."""
    threshold: float = 0.15
    """What a set has to cost: share of the loss."""
    largest: int = 8
    """Gates of a set; and candidates that each measure names in each layer."""
    tolerance: float = 0.005
    """What dead gates may change together: share of the loss, up or down, of all documents and of one on average."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What it costs to remove some gates, on the documents that nothing was chosen by."""

    gates: tuple[Gate, ...]
    zero: Change
    mean: Change | None
    """Each gate replaced by its mean instead of 0: what is left of the cost when a gate is a constant."""
    complement: Change | None
    """All other gates of the layer removed instead; None where the gates are of several layers."""
    searched: float
    """Percent that they cost together on the documents of the search, by which they were chosen."""
    alone: tuple[float, ...]
    """Percent that each costs alone, on the documents of the search."""
    ranks: tuple[tuple[int, ...], ...]
    """Of each gate, its rank by each of SCREENS among all gates of the model, from 1."""


@dataclass(frozen=True, slots=True)
class LayerCurve:
    """What a layer's MLP carries, on the documents of the search, in percent of the loss."""

    layer: int
    removed: tuple[int, ...]
    """Gates, the least important first; all of them at the end."""
    percent: tuple[float, ...]
    candidates: int
    together: float
    """All of its candidates removed at once."""


@dataclass(frozen=True, slots=True)
class Dead:
    """The least important gates, as many as do next to nothing together in the search; and what they do on other documents."""

    gates: Removal
    count: int
    parameters: int
    """What feeds them and what they feed."""
    share: float
    """Of all parameters."""
    change: Change
    """On the measured documents."""
    moved: float
    """Percent by which a measured document changes, up or down: `moved`."""
    does_nothing: bool
    """The 95 % interval of `change` and `moved` are within the tolerance."""
    curve: tuple[tuple[float, float, float], ...]
    """(share of all gates that is removed, percent of the loss, `moved` in percent), on the documents of the search."""


@dataclass(frozen=True, slots=True)
class Scan:
    """All that was found."""

    layers: int
    width: int
    parameters: int
    tokens: tuple[int, int]
    """Of the search, and of the measured losses."""
    loss: float
    """Nats a token of the measured documents."""
    candidates: int
    ablations: int
    sets: tuple[Finding, ...]
    crossed: tuple[Finding, ...]
    """Sets and dear gates of two layers that cost together more by the threshold than by themselves."""
    lost: int
    """Sets of the search (also crossed ones) that are left out: their cost on the measured documents may be 0 or less."""
    singles: tuple[Finding, ...]
    """The dearest gates by themselves."""
    curves: tuple[LayerCurve, ...]
    spikes: tuple[Spike, ...]
    dead: Dead


# --- measures ---------------------------------------------------------------------------------------------------------


def screens(subject: Subject, measures: Measures) -> Tensor:
    """[4, L, I] in the order of SCREENS."""
    columns = torch.stack([down_of(layer).weight.float().norm(dim=0) for layer in subject.layers])
    magnitude = measures.highest * columns
    return torch.stack([magnitude, measures.squares, measures.first_order.abs(), measures.fisher.sqrt()]).cpu()


def importance(subject: Subject, measures: Measures) -> Tensor:
    """[L, I]: a gate's place by Fisher plus its place by the energy that it puts out, sum a^2 |column|^2.

    0 is only what has neither: places count from 1 for the least that is above 0.

    Removed in this order, 5 % and 20 % of SmolLM2-135M's gates cost 0.5 % and 2.5 % of the loss; by Fisher alone 0.6 % and 4.5 %,
    by energy alone 3.8 % and 11.6 %, by |sum a dL/da| + 1/2 sum (a dL/da)^2 1.7 % and 11.0 %.
    """
    columns = torch.stack([down_of(layer).weight.float().square().sum(dim=0) for layer in subject.layers])
    both = (measures.fisher, measures.squares * columns)
    zero = torch.zeros(1)
    places = [  # equal ones have one place
        torch.unique(torch.cat([zero, values.flatten().cpu()]), return_inverse=True)[1][1:].view(values.shape) for values in both
    ]
    found: Tensor = (places[0] + places[1]).float()
    return found


def candidates(scores: Tensor, top: int, top_of_layer: int) -> list[list[int]]:
    """For each layer the gates that any measure names among its `top` of the model or `top_of_layer` of the layer.

    The best first: by the highest place that any measure gives it, within the model.
    """
    _, layers, width = scores.shape
    places = scores.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view(scores.shape)  # 0 is the highest
    of_layer = scores.argsort(dim=2, descending=True).argsort(dim=2)
    named = ((places < top) | (of_layer < top_of_layer)).any(dim=0)
    best = places.amin(dim=0)
    return [
        sorted(torch.arange(width)[named[layer]].tolist(), key=lambda gate: (int(best[layer, gate]), gate))
        for layer in range(layers)
    ]


# --- the search -------------------------------------------------------------------------------------------------------


class _Costs:
    """What ablations cost on the documents of the search, in shares of the loss; each is computed once."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._known: dict[frozenset[Gate], float] = {}
        self._base = float(subject.nats([{}]).sum())

    @property
    def count(self) -> int:
        return len(self._known)

    def of(self, sets: Sequence[Collection[Gate]], report: Report) -> list[float]:
        wanted = list(dict.fromkeys(frozenset(gates) for gates in sets if frozenset(gates) not in self._known))
        removals = [removal_of(gates, self._subject.width) for gates in wanted]
        nats = self._subject.nats(removals, report=report).sum(1).tolist()
        self._known.update((gates, value / self._base - 1) for gates, value in zip(wanted, nats, strict=True))
        return [self._known[frozenset(gates)] for gates in sets]


def removal_of(gates: Collection[Gate], width: int) -> Removal:
    found: dict[int, Tensor] = {}
    for layer, number in gates:
        found.setdefault(layer, torch.zeros(width, dtype=torch.bool))[number] = True
    return found


def sets_of_layer(
    costs: _Costs, pool: Sequence[Gate], ranked: Sequence[Sequence[Gate]], plan: Plan, report: Report
) -> list[tuple[Gate, ...]]:
    """Every set among the candidates of one layer that costs as much as is looked for; none shares a gate with another.

    pool: the candidates, the best first. ranked: the same by each measure, the highest first.
    """
    found: list[tuple[Gate, ...]] = []
    left = list(pool)
    while left and costs.of([left], report)[0] >= _SUSPECT * plan.threshold:
        rest = [[gate for gate in gates if gate in left] for gates in ranked]
        chosen = _grown(costs, left, rest, plan, report)
        if costs.of([chosen], report)[0] < plan.threshold:
            break
        found.append(chosen)
        left = [gate for gate in left if gate not in chosen]
    return found


def _grown(costs: _Costs, pool: Sequence[Gate], ranked: Sequence[Sequence[Gate]], plan: Plan, report: Report) -> tuple[Gate, ...]:
    """The set that grows from the best beginning, dearest gates first. What is left over when nothing is dear is no set."""
    first = list(pool[:_ALONE])
    alone = dict(zip(first, costs.of([[gate] for gate in first], report), strict=True))
    order = sorted(first, key=lambda gate: -alone[gate])
    small = [(order[0],), *combinations(order[:_PAIRED], 2)]
    sizes = [size for size in _GROUPS if size < plan.largest] + [plan.largest]
    groups = [tuple(gates[:size]) for gates in ranked for size in sizes if len(gates) >= size]
    starts = [*small, *groups]
    values = dict(zip(starts, costs.of(starts, report), strict=True))
    if max(values.values()) < plan.threshold <= costs.of([pool], report)[0]:
        more = _by_need(costs, pool, plan, report)
        values.update(zip(more, costs.of(more, report), strict=True))
    enough = [start for start in values if values[start] >= plan.threshold]
    best = max(enough, key=lambda start: (-len(start), values[start])) if enough else max(small, key=lambda start: values[start])
    best = _without_idle(costs, best, plan, report)
    chosen = _with_more(costs, best, [gate for gate in [*order, *pool[_ALONE:]] if gate not in best], plan, report)
    return tuple(sorted(chosen, key=lambda gate: -alone.get(gate, 0.0)))


def _by_need(costs: _Costs, pool: Sequence[Gate], plan: Plan, report: Report) -> list[tuple[Gate, ...]]:
    """The 2, 3, ... gates without which the others of the pool cost least: what no order by a measure shows."""
    without = costs.of([[other for other in pool if other != gate] for gate in pool], report)
    needed = [gate for _, gate in sorted(zip(without, pool, strict=True))]
    return [tuple(needed[:size]) for size in range(2, min(plan.largest, len(pool)) + 1)]


def _with_more(costs: _Costs, start: tuple[Gate, ...], ranked: Sequence[Gate], plan: Plan, report: Report) -> tuple[Gate, ...]:
    """The set with what adds most of the next few, and again; those that were tried come first the next time, the best ahead."""
    chosen, cost, left = start, costs.of([start], report)[0], list(ranked)
    while left and len(chosen) < plan.largest:
        tried = left[:_TRIED]
        values = costs.of([(*chosen, gate) for gate in tried], report)
        best = max(values)
        if best - cost < max(_LEAST_GAIN, _LEAST_SHARE * cost):
            break
        tried = [gate for _, gate in sorted(zip(values, tried, strict=True), reverse=True)]
        chosen, cost, left = (*chosen, tried[0]), best, [*tried[1:], *left[_TRIED:]]
    return chosen


def filled(
    costs: _Costs, sets: Sequence[tuple[Gate, ...]], ranked: Sequence[Sequence[Sequence[Gate]]], plan: Plan, report: Report
) -> list[tuple[Gate, ...]]:
    """The sets; none shares a gate. What costs less than _SAFE times what is looked for is made as large as a set may be.

    With what stands highest in the layer by one measure and is in no other set: by the measure that makes it dearest, if it adds
    _LEAST_GAIN. ranked: layer -> candidates by each measure, the highest first.
    """
    found = list(sets)
    for number, chosen in enumerate(sets):
        cost = costs.of([chosen], report)[0]
        if cost >= _SAFE * plan.threshold:
            continue
        taken = {gate for gates in found for gate in gates}
        orders = ranked[chosen[0][0]]
        larger = [(*chosen, *(gate for gate in gates if gate not in taken))[: plan.largest] for gates in orders]
        values = costs.of(larger, report)
        if max(values) >= cost + _LEAST_GAIN:
            found[number] = larger[values.index(max(values))]
    return found


def _without_idle(costs: _Costs, chosen: tuple[Gate, ...], plan: Plan, report: Report) -> tuple[Gate, ...]:
    """The smallest of the sets that are left when members go, the idlest first, at less than a member must bring for each."""
    if len(chosen) == 1:
        return chosen
    cost = costs.of([chosen], report)[0]
    without = costs.of([[other for other in chosen if other != gate] for gate in chosen], report)
    idlest = [gate for _, gate in sorted(zip(without, chosen, strict=True), reverse=True)]
    smaller = [tuple(idlest[gone:]) for gone in range(1, len(idlest))]
    least = plan.threshold if cost >= plan.threshold else 0.0
    kept = [
        some
        for gone, (some, value) in enumerate(zip(smaller, costs.of(smaller, report), strict=True), 1)
        if value >= max(least, cost - gone * _LEAST_GAIN)
    ]
    return kept[-1] if kept else chosen


def _crossed(costs: _Costs, parts: Sequence[tuple[Gate, ...]], plan: Plan, report: Report) -> list[tuple[Gate, ...]]:
    """Pairs of parts in different layers that cost together as much more than by themselves as a set has to cost."""
    pairs = [(a, b) for a, b in combinations(parts, 2) if a[0][0] != b[0][0]]
    joint = costs.of([(*a, *b) for a, b in pairs], report)
    apart = [sum(costs.of([a, b], report)) for a, b in pairs]
    return [(*a, *b) for (a, b), cost, sums in zip(pairs, joint, apart, strict=True) if cost - sums >= plan.threshold]


# --- what does nothing ------------------------------------------------------------------------------------------------


def dead_gates(search: Subject, measured: Subject, order: Tensor, idle: int, tolerance: float, report: Report) -> Dead:
    """The least important gates, as many as can go while documents of the search change by at most _FLATTERED of `tolerance`.

    order: gates of the model as layer * I + number; the first `idle` of them put out nothing on the documents of the search. The
    measured documents then say whether these gates do nothing; they choose nothing.
    """
    total = len(order)
    base = search.nats([{}])[0]
    points: dict[int, tuple[float, float]] = {}

    def look(counts: Collection[int]) -> tuple[int, int]:
        """(the last count before documents change by more, the next that was tried: the same when there is none)."""
        wanted = sorted({*counts} - {*points})
        for count, nats in zip(wanted, search.nats([_first(order, n, search) for n in wanted], report=report), strict=True):
            points[count] = (float(nats.sum() / base.sum()) - 1, moved(base, nats))
        tried = sorted(points)
        beyond = next((n for n in tried if not points[n][1] <= _FLATTERED * tolerance), None)
        return (total, total) if beyond is None else (max(n for n in tried if n < beyond), beyond)  # 0 changes nothing

    within, beyond = look({0, *(idle + round(share * (total - idle)) for share in _SHARES)})
    if beyond - within > _FINER:
        within, _ = look([within + (beyond - within) * n // (_FINER + 1) for n in range(1, _FINER + 1)])
    before, after = measured.nats([{}, _first(order, within, measured)], report=report)
    found, drift = change(before.tolist(), after.tolist()), moved(before, after)
    parameters = within * parameters_of_gate(measured)
    nothing = found.is_within(100 * tolerance) and drift <= tolerance
    curve = tuple((count / total, *(100 * value for value in points[count])) for count in sorted(points))
    share = parameters / num_parameters(measured)
    return Dead(_first(order, within, measured), within, parameters, share, found, 100 * drift, nothing, curve)  # type: ignore[arg-type]


def moved(before: Tensor, after: Tensor) -> float:
    """What a document's loss changes by, up or down: the sum of |change| over documents, of the sum of their nats. Both [N]."""
    return float((after - before).abs().sum() / before.sum())


def _first(order: Tensor, count: int, subject: Subject) -> Removal:
    mask = torch.zeros(subject.num_layers * subject.width, dtype=torch.bool)
    mask[order[:count]] = True
    return {layer: each for layer, each in enumerate(mask.view(subject.num_layers, subject.width)) if each.any()}


def parameters_of_gate(subject: Subject) -> int:
    """What feeds a gate and what it feeds: rows of the first matrices with their biases, and a column of the last."""
    mlp: Any = subject.layers[0].mlp
    down = down_of(subject.layers[0])
    held = sum(int(parameter.numel()) for parameter in mlp.parameters())
    return (held - (0 if down.bias is None else down.bias.numel())) // subject.width


def num_parameters(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.model.parameters())


# --- all of it --------------------------------------------------------------------------------------------------------


def scan(search: Subject, measured: Subject, plan: Plan, say: Say = quietly) -> Scan:
    """Look for sets and dead gates on one set of documents, and measure them on another one."""
    if not plan.threshold > 0 < plan.top:
        raise ValueError("a set costs more than nothing, and there are candidates")
    costs = _Costs(search)
    measures = search.measure(say("one pass forward and backward"))
    measured.means = search.means
    scores, order = screens(search, measures), importance(search, measures)
    named = candidates(scores, plan.top, plan.largest)
    pools = [[(layer, gate) for gate in gates[:_POOL]] for layer, gates in enumerate(named)]
    together = costs.of(pools, say("all candidates of a layer"))
    ranked = [
        [sorted(pool, key=lambda gate, of=of: -float(of[gate])) for of in scores]  # type: ignore[misc]
        for pool in pools
    ]
    sets = [
        found
        for layer, pool in enumerate(pools)
        for found in sets_of_layer(costs, pool, ranked[layer], plan, say(f"sets in layer {layer}"))
    ]
    sets = filled(costs, sets, ranked, plan, say("sets that cost little more than they have to"))
    places = scores.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view(scores.shape)
    singles = [(layer, gate) for pool in pools for layer, gate in pool if int(places[:, layer, gate].min()) < plan.top]
    alone = dict(zip(singles, costs.of([[gate] for gate in singles], say("candidates by themselves")), strict=True))
    dearest = sorted(alone, key=lambda gate: -alone[gate])[: plan.singles]
    in_sets = {gate for gates in sets for gate in gates}
    parts = [*sets, *((gate,) for gate in dearest[:_CROSSED] if gate not in in_sets)]
    crossed = _crossed(costs, parts, plan, say("sets across layers"))
    found = _findings(costs, measured, places, [*sets, *crossed, *((gate,) for gate in dearest)], say)
    ascending = order.flatten().argsort()
    dead = dead_gates(search, measured, ascending, int((order == 0).sum()), plan.tolerance, say("gates that do nothing"))
    curves = _curves(search, order, [len(gates) for gates in named], together, say("curves of the layers"))
    loss = found[0].zero.before / measured.num_tokens if found else dead.change.before / measured.num_tokens
    several = [found[: len(sets)], found[len(sets) : len(sets) + len(crossed)]]
    one, across = (_dearest([each for each in some if each.zero.is_above_zero]) for some in several)
    return Scan(
        search.num_layers, search.width, num_parameters(search), (search.num_tokens, measured.num_tokens), loss,
        sum(map(len, named)), costs.count, one, across, len(sets) + len(crossed) - len(one) - len(across),
        _dearest(found[len(sets) + len(crossed) :]), curves, tuple(search.spikes()), dead,
    )  # fmt: skip


def _dearest(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda each: -each.zero.percent))


def _findings(costs: _Costs, subject: Subject, places: Tensor, sets: Sequence[tuple[Gate, ...]], say: Say) -> list[Finding]:
    """Each set on the measured documents: zero, mean, and for sets of one layer with more than one gate the complement."""
    removals = [removal_of(gates, subject.width) for gates in sets]
    others: list[Removal] = [
        {layer: ~mask for layer, mask in removal.items()} if len(removal) == 1 and len(gates) > 1 else {}
        for removal, gates in zip(removals, sets, strict=True)
    ]
    nats = subject.nats([{}, *removals, *(removal for removal in others if removal)], report=say("what was found, measured"))
    means = subject.nats(removals, mean=True, report=say("the same with means")) if removals else nats[:0]
    base, zeros, rest = nats[0].tolist(), nats[1 : len(sets) + 1], iter(nats[len(sets) + 1 :])
    return [
        Finding(
            gates,
            change(base, zero.tolist()),
            change(base, mean.tolist()),
            change(base, next(rest).tolist()) if other else None,
            100 * costs.of([gates], silent)[0],
            tuple(100 * cost for cost in costs.of([[gate] for gate in gates], silent)),
            tuple(tuple(int(place) + 1 for place in places[:, layer, gate]) for layer, gate in gates),
        )
        for gates, zero, mean, other in zip(sets, zeros, means, others, strict=True)
    ]


def _curves(
    subject: Subject, order: Tensor, named: Sequence[int], together: Sequence[float], report: Report
) -> tuple[LayerCurve, ...]:
    counts = tuple(round(share * subject.width) for share in REMOVED)
    removals: list[Removal] = []
    for layer, values in enumerate(order):
        ascending = values.argsort()
        for count in counts:
            mask = torch.zeros(subject.width, dtype=torch.bool)
            mask[ascending[:count]] = True
            removals.append({layer: mask})
    nats = subject.nats([*removals, {}], report=report).sum(1)
    percent = (100 * (nats[:-1] / nats[-1] - 1)).view(len(order), len(counts)).tolist()
    return tuple(
        LayerCurve(layer, counts, tuple(each), named[layer], 100 * together[layer]) for layer, each in enumerate(percent)
    )
