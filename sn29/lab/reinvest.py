"""Parameters that a smaller vocabulary has freed, spent again without a change of the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sn29.errors import Reason, Rejected
from sn29.lab.grow import Grown, deepen, start, widen_mlp
from sn29.lab.weights import Weights

UNUSED = 0.005
"""Most of the budget that may be left."""
_ROUND = 0.05
"""Most of the freed parameters that may be left for the sake of a round width."""
_STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
"""MLP widths are a multiple of the first of these that comes near enough to the budget: hardware likes round ones."""


def reinvested(weights: Weights, budget: int, how: Literal["mlp", "layers"], *, seed: int = 0) -> Grown:
    """The model grown to at most `budget` parameters: all MLPs as wide as fits; or as many layers as fit, the rest in width.

    Raises Rejected(PARAMETERS) when not even one neuron a layer fits, or more than 0.5 % of the budget is left.
    """
    grown, freed = start(weights), budget - weights.num_parameters
    if how == "layers":
        layers = weights.config.number("num_hidden_layers")
        most = _largest(layers, lambda count: deepen(weights, count).weights, budget)
        if most > layers:
            grown = grown.then(deepen(weights, most, seed=seed))
    inner, deep = weights.config.number("intermediate_size"), grown.weights
    most = _largest(inner, lambda width: widen_mlp(deep, width).weights, budget)
    for step in _STEPS:
        width = max(inner, most // step * step)
        found = grown if width == inner else grown.then(widen_mlp(deep, width, seed=seed))
        left = budget - found.weights.num_parameters
        if left <= UNUSED * budget and (left <= _ROUND * freed or step == 1) and left < freed:
            return found
    limit = f"at least one neuron a layer, and at most {UNUSED:.1%} of all {budget:,} parameters left"
    raise Rejected(Reason.PARAMETERS, f"{freed - left:,} of {freed:,} freed parameters spent", limit, "--reinvest")


def _largest(low: int, made: Callable[[int], Weights], budget: int) -> int:
    """The largest number from `low` on whose model has at most `budget` parameters: each one more costs the same."""
    one = made(low + 1).num_parameters - made(low).num_parameters
    return low + max(0, budget - made(low).num_parameters) // one
