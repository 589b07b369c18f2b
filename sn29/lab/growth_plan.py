"""Which larger model: the config nearest under a number of parameters, by a stated recipe, and what its steps cost.

    residual   up to 1.8 times the parameters: as wide as it is. Above: width times the cube root of the growth, to the nearest
    stream     multiple of 128 that keeps heads and groups as they are and fits (else of whole groups), MLP and heads with it;
               in a schedule both are counted from the model that it begins with
    depth      then as many layers as fit, down to a width of 60 for each layer (usual models have 60 to 160)
    MLP width  then what is left, as a multiple of 256, or the largest smaller power of two that leaves at most 0.5 % unused

Depth comes first because identity blocks are exact to the bit in every type, and because stacking did better than width at equal
cost (arXiv 2405.15319). Worked example, Phi3 of 3072 and 96 a head, 32 layers, MLP 8448, 3,896,577,024 parameters: for 6.9e9,
which is 1.77 times as many, 51 layers (3072 / 60) and MLP 10112: 6,875,304,960 parameters, 0.36 % unused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.lab.cost import scores_of
from sn29.lab.grow import Grown, Place, deepen, start, usual_kv_heads, widen_hidden, widen_mlp, width_changes
from sn29.lab.weights import Weights, with_config
from sn29.models.config import ModelConfig, expected_tensors, parse_config
from sn29.training.devices import SHEETS
from sn29.training.optimizers import stated_bytes

WIDENS_ABOVE = 1.8
"""Growth from which depth alone would make models too deep: 20.1e9 from 3.9e9 would take 170 layers of 3072."""
THINNEST, WIDEST = 60, 160
"""Hidden size for each layer."""
UNUSED = 0.005
"""Most of the budget that may be left."""
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Of an MLP width: matrix products like round numbers."""
_WIDTHS = 128
_H100_FLOPS = 0.4 * SHEETS["h100"].peak
"""A second: 40 % of what its sheet says of dense products in bfloat16."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A model that is only a config yet."""

    budget: int
    """Parameters that it may have."""
    raw: Mapping[str, Any]
    """Its config.json."""
    config: ModelConfig
    changes: Mapping[str, tuple[int, int]]
    """Field of config.json -> before and after."""

    @property
    def parameters(self) -> int:
        return count(self.config)

    @property
    def unused(self) -> float:
        """Share of the budget."""
        return 1 - self.parameters / self.budget

    @property
    def aspect(self) -> float:
        """Hidden size for each layer."""
        return self.config.number("hidden_size") / self.config.number("num_hidden_layers")


def count(config: ModelConfig) -> int:
    """Parameters: elements of all tensors."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def planned(raw: Mapping[str, Any], budget: int, first: ModelConfig | None = None) -> Planned:
    """The config nearest under `budget` parameters by the recipe above; `first`: what growth is counted from, if not from it.

    Raises Rejected(PARAMETERS) for a budget below the model's own, for one whose model no validator takes, and where more than
    0.5 % would be left; Rejected as `with_config` for `raw` itself.
    """
    base = numbers_of(raw)
    if budget < count(base):
        raise Rejected(Reason.PARAMETERS, f"{count(base):,} parameters", f"at most {budget:,}", "--to")
    try:
        return _nearest(raw, base, first or base, budget)
    except Rejected as error:
        if error.reason is not Reason.BAD_CONFIG:
            raise
        got = f"{budget:,} parameters, which take {f'{error.where} '.partition(': ')[2]}{error.got}"
        raise Rejected(Reason.PARAMETERS, got, error.limit, "--to") from None


def _nearest(raw: Mapping[str, Any], base: ModelConfig, first: ModelConfig, budget: int) -> Planned:
    changes = next(found for found in map(dict, _widths(base, first, budget)) if _count(raw, found) <= budget)
    hidden = changes.get("hidden_size", base.number("hidden_size"))
    layers = base.number("num_hidden_layers")
    one = _count(raw, {**changes, "num_hidden_layers": layers + 1}) - _count(raw, changes)
    deepest = max(layers, hidden // THINNEST)
    changes["num_hidden_layers"] = min(deepest, layers + (budget - _count(raw, changes)) // one)
    inner = changes.get("intermediate_size", base.number("intermediate_size"))
    one = _count(raw, {**changes, "intermediate_size": inner + 1}) - _count(raw, {**changes, "intermediate_size": inner})
    most = inner + (budget - _count(raw, changes)) // one
    for multiple in _MULTIPLES:
        width = max(inner, most // multiple * multiple)
        config, found = with_config(raw, {**changes, "intermediate_size": width})
        if 1 - count(config) / budget <= UNUSED:
            return Planned(budget, found, config, _changed(base, config))
    got, limit = f"{1 - count(config) / budget:.2%} of {budget:,} parameters unused", f"at most {UNUSED:.1%}"
    raise Rejected(Reason.PARAMETERS, got, limit, "the recipe")


def numbers_of(raw: Mapping[str, Any]) -> ModelConfig:
    """The checked numbers. Raises Rejected as `with_config`."""
    return with_config(raw, {})[0]


def _count(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> int:
    return count(with_config(raw, changes)[0])


def _widths(base: ModelConfig, first: ModelConfig, budget: int) -> Iterator[Mapping[str, Any]]:
    """Changes of width to try: the widest first, round ones first; the last one is none."""
    growth = budget / count(first)
    hidden, heads = (base.number(name) for name in ("hidden_size", "num_attention_heads"))
    kv = base.number("num_key_value_heads", heads)
    groups = base.head_dim * heads // kv
    wanted = first.number("hidden_size") * growth ** (1 / 3) if growth > WIDENS_ABOVE else 0.0
    for step in (math.lcm(groups, _WIDTHS), groups):
        if groups < step > hidden // 4:  # a small model has no room for round numbers
            continue
        for width in range(round(wanted / step) * step, hidden, -step):
            more = width * heads // hidden
            if width * heads % hidden or width % more:  # Llama's heads may be wider or narrower than hidden / heads
                continue
            changes = width_changes(base, width, more, usual_kv_heads(heads, kv, more))
            usual = round(first.number("intermediate_size") * width / first.number("hidden_size"))
            yield {**changes, "intermediate_size": max(usual, base.number("intermediate_size"))}
    yield {}


def _changed(before: ModelConfig, after: ModelConfig) -> dict[str, tuple[int, int]]:
    both = {
        name: tuple(c.number(name, c.number("num_attention_heads")) for c in (before, after)) for name in _FIELDS
    }  # one of keys and values for each head, where the file does not say
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


def schedule(raw: Mapping[str, Any], budgets: Sequence[int]) -> list[Planned]:
    """One model for each budget, each grown from the one before. Raises as `planned`."""
    found: list[Planned] = []
    for budget in budgets:
        found.append(planned(found[-1].raw if found else raw, budget, numbers_of(raw)))
    return found


def carried_out(weights: Weights, plan: Planned, *, place: Place = "interleaved", noise: float = 0.0, seed: int = 0) -> Grown:
    """The operators that make the planned model. Raises as they do."""
    new, found = plan.config, start(weights)
    heads = new.number("num_attention_heads")
    if "hidden_size" in plan.changes:
        kv_heads = new.number("num_key_value_heads", heads)
        found = found.then(widen_hidden(found.weights, new.number("hidden_size"), heads, kv_heads, seed=seed))
    if "intermediate_size" in plan.changes:
        found = found.then(widen_mlp(found.weights, new.number("intermediate_size"), noise=noise, seed=seed))
    if "num_hidden_layers" in plan.changes:
        found = found.then(deepen(found.weights, new.number("num_hidden_layers"), place, noise=noise, seed=seed))
    return found


def sketch(data: bytes) -> Weights:
    """A model of which there is only a config.json: operators change it, nothing can be read. Raises as `parse_config`."""
    config = parse_config(data)
    raw = json.loads(data)
    kind = {"bfloat16": "BF16", "float16": "F16"}.get(str(raw.get("dtype") or raw.get("torch_dtype")), "F32")

    def read(name: str) -> Tensor:
        raise Rejected(Reason.MISSING_FILE, "a config.json alone", "a model's folder", name)

    return Weights(config, raw, dict.fromkeys(expected_tensors(config), kind), read)


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of training a model."""

    flops_per_token: float
    """Forward and backward, rows of `row_tokens`, causal attention counted in full."""
    training_bytes: float
    """Weights and gradients in float32 and the optimizer's state; without activations."""
    file_bytes: int
    """Of the weights in bfloat16."""
    h100_hours: float
    """Of a billion tokens, at 40 % of 989 TFLOP/s."""


def cost(config: ModelConfig, row_tokens: int, optimizer: str = "adamw") -> Cost:
    """Operations as `sn29/lab/cost.py` counts them, from the config alone. Raises Rejected(SETTING) for an optimizer that is
    none."""
    shapes = expected_tensors(config)
    heads = config.number("num_attention_heads")
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed_tokens" not in name)
    matrices += math.prod(shapes["model.embed_tokens.weight"]) if config.tied else 0  # the head
    windows = (config.number("sliding_window", 0),) * config.number("num_hidden_layers")
    flops, parameters = 6.0 * matrices + scores_of(heads * config.head_dim, windows, row_tokens), count(config)
    return Cost(flops, 8.0 * parameters + stated_bytes(optimizer, shapes), 2 * parameters, 1e9 * flops / _H100_FLOPS / 3600)


def said(plan: Planned) -> str:
    """What a plan changes, in a line."""
    names = dict(zip(_FIELDS, ("layers", "hidden", "MLP", "heads", "KV heads"), strict=True))
    return ", ".join(f"{names[field]} {a} to {b}" for field, (a, b) in plan.changes.items()) or "nothing"
