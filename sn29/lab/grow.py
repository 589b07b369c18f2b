"""A larger model that says the same: operators from weights to weights, none of which computes anything before it is read.

    operator          new weights                                       the function
    deepen            blocks whose output projections are zero          the same, to the bit
                      plain copies, the whole stack again               another one: to be measured
    widen_mlp         random in, zero out                               the same
                      or a neuron halved (Net2Net)                      the same but for rounding
    widen_attention   heads random in, zero out; KV heads new or twice  the same
    widen_hidden      zero written, random read, norms rescaled         the same but for rounding
    more_tokens       the mean row                                      within log(1 + k / V) nats a token
    untie             the head is a copy of the embedding               the same

Random in and zero out: a new neuron whose inputs and outputs are both zero has no gradient for ever, and neither has a
SwiGLU neuron with zero gate and up (silu(0) = 0 kills both). With random inputs the outputs move in the first step, and the
inputs from the second one on. New values are drawn from the seed and the tensor's name: the same to the bit in any order.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.lab.weights import TYPES, Weights, with_config
from sn29.models.config import SMALLEST_EPS, ModelConfig

Place = Literal["interleaved", "top", "copies", "stacked"]
Mlp = Literal["random", "split"]

LOSSLESS = 1e-5
"""Largest relative change of a loss in float32 by operators that keep the function."""
ROUNDED = 1e-3
"""The same where new values of a 16-bit type stand for others that it cannot hold: halves of neurons with noise, means."""
_BLOCK = 1_000_000
"""Values that are looked at together."""
_NEW = -1
"""In place of an old index: there is none."""
_USUAL_DEVIATION = 0.02
"""transformers' own initial one, for a tensor of zeros."""
_BIAS_BELOW = 20.0
"""Nats below the mean bias of the head: what a new token of a Phi starts with. exp(-20) = 2.1e-9."""


@dataclass(frozen=True, slots=True)
class Grown:
    """A grown model, and what may be said of it."""

    weights: Weights
    said: tuple[str, ...]
    """Of each operator, a sentence for the card."""
    limit: float | None
    """Largest relative change of a loss in float32; None: the function is another one."""
    nats_per_token: float = 0.0
    """Which it may rise by beside that, for the same text."""

    def then(self, other: Grown) -> Grown:
        limit = None if self.limit is None or other.limit is None else max(self.limit, other.limit)
        return Grown(other.weights, (*self.said, *other.said), limit, self.nats_per_token + other.nats_per_token)


def start(weights: Weights) -> Grown:
    """A model to which nothing has been done."""
    return Grown(weights, (), LOSSLESS)


# --- depth ------------------------------------------------------------------------------------------------------------

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTPUTS = ("self_attn.o_proj", "self_attn.dense", "mlp.down_proj", "mlp.fc2")
"""What a block writes into the residual stream with."""


def deepen(weights: Weights, layers: int, place: Place = "interleaved", *, after: Sequence[int] = (), noise: float = 0.0,
           seed: int = 0) -> Grown:  # fmt: skip
    """More layers.

    `interleaved` (LLaMA Pro, arXiv 2401.02415): blocks with zeroed output projections between the old ones, evenly, or behind
    the layers `after` (numbered from 0), each otherwise a copy of the layer before it; `top`: copies of the last layers, so
    zeroed, behind them. `copies` (interposed, arXiv 2510.08008) and `stacked` (G_stack, arXiv 2405.15319: layer i is layer
    i mod L) keep the output projections, and are another function. `noise` > 0: standard deviation, in those of the tensor,
    that is added to the copied matrices of zeroed blocks, so that no two are alike; the function stays.

    Raises Rejected(SETTING) for fewer layers, and for places that are none; Rejected as `with_config`.
    """
    old = weights.config.number("num_hidden_layers")
    if layers < old:
        raise Rejected(Reason.SETTING, f"{layers} layers", f"at least the {old} that there are", "--layers")
    config, raw = with_config(weights.raw, {"num_hidden_layers": layers})  # before a list of any length is made
    sources = _sources(old, layers, place, after)
    is_new = place in ("interleaved", "top")
    fresh = {number for number, source in enumerate(sources) if source in sources[:number]} if is_new else set()
    origin = {}
    for name in replace(weights, config=config).shapes:
        found = _LAYER.fullmatch(name)
        origin[name] = f"model.layers.{sources[int(found[1])]}.{found[2]}" if found else name

    def read(name: str) -> Tensor:
        found, tensor = _LAYER.fullmatch(name), weights.read(origin[name])
        if found is None or int(found[1]) not in fresh:
            return tensor
        if found[2].startswith(_OUTPUTS):
            return tensor.zero_()
        if noise and tensor.dim() == 2:
            return _plus(tensor, noise * _deviation(tensor), _numbers(seed, "deepen", name))
        return tensor

    said = _said_of_depth(old, layers, place, sources, noise)
    grown = Weights(config, raw, {name: weights.dtypes[origin[name]] for name in origin}, read)
    return Grown(grown, (said,), LOSSLESS if is_new or layers == old else None)


def _sources(old: int, layers: int, place: Place, after: Sequence[int]) -> list[int]:
    """Of each new layer the old one that it is, or is made from."""
    more, each = layers - old, [*range(old)]
    if after:
        if place not in ("interleaved", "copies") or len(after) != more or not all(0 <= at < old for at in after):
            got = f"--after {','.join(map(str, after))} with --place {place}"
            limit = f"{more} numbers from 0 to {old - 1}, and --place interleaved or copies"
            raise Rejected(Reason.SETTING, got, limit, "--after")
        return sorted([*each, *after])
    if place == "stacked":
        return [number % old for number in range(layers)]
    if place == "top":
        return [*each, *(old - 1 - (more - 1 - number) % old for number in range(more))]
    return sorted([*each, *(max(0, (number + 1) * old // more - 1) for number in range(more))])


def _said_of_depth(old: int, layers: int, place: Place, sources: Sequence[int], noise: float) -> str:
    behind = [source for number, source in enumerate(sources) if source in sources[:number]]
    where = f"behind the old layers {', '.join(map(str, behind))}"
    if place == "stacked":
        return f"Layers: {old} to {layers}, the whole stack again (G_stack). This is another function."
    if place == "copies":
        return f"Layers: {old} to {layers}, plain copies {where}. This is another function."
    more = f"; noise of {noise:g} standard deviations on their other matrices" if noise else ""
    return f"Layers: {old} to {layers}, copies with zeroed output projections {where}{more}. The function is the same."


# --- width ------------------------------------------------------------------------------------------------------------

# Tensor -> what its rows and columns are. `hidden` is written by the rows of some and the embedding's columns, and read by
# the other columns.
_AXES: Mapping[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocab", "hidden"), "lm_head.weight": ("vocab", "hidden"), "lm_head.bias": ("vocab",),
    "q_proj.weight": ("q", "hidden"), "k_proj.weight": ("kv", "hidden"), "v_proj.weight": ("kv", "hidden"),
    "q_proj.bias": ("q",), "k_proj.bias": ("kv",), "v_proj.bias": ("kv",), "qkv_proj.weight": ("qkv", "hidden"),
    "o_proj.weight": ("hidden", "q"), "o_proj.bias": ("hidden",), "dense.weight": ("hidden", "q"), "dense.bias": ("hidden",),
    "gate_proj.weight": ("inner", "hidden"), "up_proj.weight": ("inner", "hidden"), "gate_up_proj.weight": ("two", "hidden"),
    "gate_proj.bias": ("inner",), "up_proj.bias": ("inner",), "fc1.weight": ("inner", "hidden"), "fc1.bias": ("inner",),
    "down_proj.weight": ("hidden", "inner"), "down_proj.bias": ("hidden",), "fc2.weight": ("hidden", "inner"),
    "fc2.bias": ("hidden",),
}  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm", "final_layernorm", "model.norm")

Fill = Callable[[Tensor, int, int, torch.Generator], Tensor]
"""fill(tensor, axis, how many, numbers) -> what is put beside a tensor along an axis."""


def _axes(name: str) -> tuple[str, ...]:
    return _AXES.get(".".join(name.rsplit(".", 2)[-2:]), ())


def _part(name: str) -> str:
    return name.rsplit(".", 2)[-2]


def _zero(tensor: Tensor, axis: int, more: int, _: torch.Generator) -> Tensor:
    return tensor.new_zeros([more if at == axis else size for at, size in enumerate(tensor.shape)])


def _mean(tensor: Tensor, axis: int, more: int, _: torch.Generator) -> Tensor:
    size, total = tensor.shape[axis], torch.zeros(1, dtype=torch.float64)
    for block in tensor.split(max(1, size * _BLOCK // tensor.numel()), axis):  # type: ignore[no-untyped-call]
        total = total + block.sum(dim=axis, keepdim=True, dtype=torch.float64)  # which copies the block in float64
    mean = (total / size).to(tensor.dtype)
    return mean.expand([more if at == axis else size for at, size in enumerate(tensor.shape)])


def _random(tensor: Tensor, axis: int, more: int, numbers: torch.Generator) -> Tensor:
    shape = [more if at == axis else size for at, size in enumerate(tensor.shape)]
    return _draw(shape, _deviation(tensor), numbers).to(tensor.dtype)


def _extended(tensor: Tensor, axis: int, sources: Tensor, fill: Fill, numbers: torch.Generator) -> Tensor:
    """Along an axis: old slices by their indices, and what `fill` gives where there is none."""
    missing = int((sources == _NEW).sum())
    if not missing:
        return tensor.index_select(axis, sources)
    found = tensor.index_select(axis, sources.clamp(min=0))
    return found.index_copy_(axis, (sources == _NEW).nonzero()[:, 0], fill(tensor, axis, missing, numbers))


def _more(old: int, new: int) -> Tensor:
    return torch.cat([torch.arange(old), torch.full((new - old,), _NEW)])


def _at_least(new: int, old: int, what: str, flag: str) -> None:
    if new < old:
        raise Rejected(Reason.SETTING, f"{what} {new}", f"at least the {old} that there are", flag)


# --- MLP --------------------------------------------------------------------------------------------------------------


def widen_mlp(weights: Weights, inner: int, how: Mlp = "random", *, noise: float = 0.0, seed: int = 0) -> Grown:
    """More neurons in each MLP.

    `random`: gate and up (fc1) random at the deviation of the tensor, down (fc2) zero. `split` (Net2Net, arXiv 1511.05641):
    neurons drawn by the seed stand twice, and the output of each is half of what it was; with `noise` > 0 one half is given
    what the other one is taken, in standard deviations of down: halves that are exactly alike would stay so for ever.

    Raises Rejected(SETTING) for a width below the old one; Rejected as `with_config`.
    """
    old = weights.config.number("intermediate_size")
    _at_least(inner, old, "MLP width", "--intermediate")
    if how == "split" and inner > 2 * old:
        raise Rejected(Reason.SETTING, f"MLP width {inner}", f"at most {2 * old}: each neuron is split once", "--intermediate")
    config, raw = with_config(weights.raw, {"intermediate_size": inner})
    more = inner - old

    def read(name: str) -> Tensor:
        tensor, axes = weights.read(name), _axes(name)
        if not more or not {"inner", "two"} & set(axes):
            return tensor
        chosen = torch.randperm(old, generator=_numbers(seed, "split", _LAYER.fullmatch(name)[1]))[:more]  # type: ignore[index]
        rows = torch.cat([torch.arange(old), chosen]) if how == "split" else _more(old, inner)
        numbers = _numbers(seed, "widen_mlp", name)
        if axes[0] == "hidden":
            if how == "random":
                return _extended(tensor, 1, rows, _zero, numbers)
            tensor[:, chosen] *= 0.5
            found = tensor.index_select(1, rows)
            shift = _draw([found.shape[0], more], noise * _deviation(tensor), numbers).to(found.dtype) if noise else 0.0
            found[:, old:] += shift
            found[:, chosen] -= shift
            return found
        fill = _zero if tensor.dim() == 1 else _random
        if axes[0] == "inner":
            return _extended(tensor, 0, rows, fill, numbers)
        return torch.cat([_extended(half, 0, rows, fill, numbers) for half in tensor.split(old)])  # type: ignore[no-untyped-call]

    exact = how == "random" or not noise or all(kind == "F32" for kind in weights.dtypes.values())
    halves = "neurons split in halves" + f", noise {noise:g}" * bool(noise)
    said = "new neurons random in, zero out" if how == "random" else halves
    text = f"MLP width: {old} to {inner}, {said}. The function is the same{' but for rounding' * (how == 'split')}."
    return Grown(Weights(config, raw, weights.dtypes, read), (text,), LOSSLESS if exact else ROUNDED)


# --- attention and the residual stream ----------------------------------------------------------------------------------


def head_sources(heads: int, kv_heads: int, new_heads: int, new_kv_heads: int) -> tuple[list[int], list[int]]:
    """Of each new head, and of each new KV head, the old one that it is; -1 for a new one.

    An old head must share its keys and values with no other ones than before, so an old group of g heads goes into
    ceil(g / g') new groups of g', whose KV heads are all copies of its own. What is left over is new:

        4 heads, 2 KV -> 6 heads, 3 KV    heads 0 1 2 3 - -      KV 0 1 -       one group more
        4 heads, 2 KV -> 4 heads, 4 KV    heads 0 1 2 3          KV 0 0 1 1     each KV head twice
        4 heads, 2 KV -> 6 heads, 2 KV    heads 0 1 - 2 3 -      KV 0 1         larger groups

    Raises Rejected(SETTING) when the groups do not come out even, or there are too few of them.
    """
    if new_heads % new_kv_heads:
        got = f"{new_heads} heads with {new_kv_heads} KV heads"
        raise Rejected(Reason.SETTING, got, "as many heads for each KV head", "--heads, --kv-heads")
    group, new_group = heads // kv_heads, new_heads // new_kv_heads
    copies = -(-group // new_group)
    if copies * kv_heads > new_kv_heads:
        got = f"{new_heads} heads with {new_kv_heads} KV heads"
        why = f"{kv_heads} old ones with {group} heads each go into groups of {new_group}"
        limit = f"at least {copies * kv_heads} KV heads: {why}"
        raise Rejected(Reason.SETTING, got, limit, "--heads, --kv-heads")
    slots, kv = [_NEW] * new_heads, [_NEW] * new_kv_heads
    for old in range(kv_heads):
        for copy in range(copies):
            at = old * copies + copy
            kv[at] = old
            held = range(old * group + copy * new_group, old * group + min(group, (copy + 1) * new_group))
            slots[at * new_group : at * new_group + len(held)] = held
    return slots, kv


@dataclass(frozen=True, slots=True)
class _Wider:
    """What a widening of the attention or the residual stream knows."""

    weights: Weights
    sources: Mapping[str, Tensor]
    """Axis -> old index of each new one."""
    hidden: tuple[int, int]
    """Before and after."""
    seed: int

    def read(self, name: str) -> Tensor:
        tensor, axes = self.weights.read(name), _axes(name)
        numbers = _numbers(self.seed, "widen", name)
        if not axes and name.rpartition(".")[0].endswith(_NORMS):
            return self._norm(name, tensor)
        for at, axis in enumerate(axes):
            if axis in self.sources:
                tensor = _extended(tensor, at, self.sources[axis], self._fill(name, axis, at), numbers)
        return tensor

    def _fill(self, name: str, axis: str, at: int) -> Fill:
        is_phi = self.weights.config.family == "PhiForCausalLM"
        if axis == "hidden" and (at == 0 or _part(name) == "embed_tokens"):
            return _mean if is_phi else _zero  # written
        if (axis == "q" and at == 1) or name.endswith(".bias"):
            return _zero
        return _random

    def _norm(self, name: str, tensor: Tensor) -> Tensor:
        """A norm's weight times sqrt(d / d'), new entries the mean; a bias is zero there."""
        old, new = self.hidden
        if old == new:
            return tensor
        if name.endswith(".bias"):
            return _extended(tensor, 0, _more(old, new), _zero, torch.Generator())
        scaled = (tensor.double() * math.sqrt(old / new)).to(TYPES[_norm_type(self.weights.dtypes[name], old, new)])
        return _extended(scaled, 0, _more(old, new), _mean, torch.Generator())


def _norm_type(kind: str, old: int, new: int) -> str:
    """float32 for a factor that 16 bits cannot hold: only powers of two leave a value's digits alone."""
    is_exact = math.log2(new / old) % 2 == 0
    return kind if is_exact else "F32"


def widen_attention(weights: Weights, heads: int, kv_heads: int = 0, *, seed: int = 0) -> Grown:
    """More heads and KV heads of the same size (`kv_heads` 0: as few more as keep the groups): see `head_sources`.

    New heads have random queries, keys and values, and zero columns in the output projection. Raises Rejected(SETTING) for
    fewer heads, and for Phi and Phi3, whose heads are as large as their number and the hidden size say: there heads grow with
    `widen_hidden`. Rejected(BAD_CONFIG) for a number of heads that does not divide the hidden size: transformers refuses it.
    """
    hidden = weights.config.number("hidden_size")
    family, size = weights.config.family, weights.config.head_dim
    if family != "LlamaForCausalLM" and heads != hidden // size:
        got = f"{heads} heads with hidden size {hidden}"
        limit = f"{hidden // size} heads: config.json of {family} has no head_dim; grow --hidden too"
        raise Rejected(Reason.SETTING, got, limit, "--heads")
    return _widen(weights, hidden, heads, kv_heads, seed)


def widen_hidden(weights: Weights, hidden: int, heads: int = 0, kv_heads: int = 0, *, seed: int = 0) -> Grown:
    """A wider residual stream of d' instead of d values.

    RMSNorm (Llama, Phi3): the new values are zero, as nothing writes there yet. The mean square falls by d / d', so the norm's
    weight is multiplied by sqrt(d / d') and its eps by d / d'. LayerNorm (Phi): zeros would move the mean, so everything that
    writes puts the mean of what it writes into the new places (LEMON, arXiv 2310.07999): then mean and centred sum of squares
    stay, and weight and eps change as above; the norm gives zero there. What reads them is random.

    For Phi and Phi3 the number of heads follows (`heads` 0): the size of a head stays. Raises Rejected(SETTING) for a smaller
    size, and one that the heads do not divide.
    """
    config = weights.config
    old, size, head = config.number("hidden_size"), config.head_dim, config.number("num_attention_heads")
    _at_least(hidden, old, "hidden size", "--hidden")
    if config.family != "LlamaForCausalLM":
        if hidden % size or heads not in (0, hidden // size):
            got = f"hidden size {hidden}" + f" with {heads} heads" * bool(heads)
            limit = f"a multiple of {size} with hidden / {size} heads: a head of {config.family} stays {size} wide"
            raise Rejected(Reason.SETTING, got, limit, "--hidden")
        heads = hidden // size
    return _widen(weights, hidden, heads or head, kv_heads, seed)


def _widen(weights: Weights, hidden: int, heads: int, kv_heads: int, seed: int) -> Grown:
    config = weights.config
    old_hidden, old_heads, size = config.number("hidden_size"), config.number("num_attention_heads"), config.head_dim
    old_kv = config.number("num_key_value_heads", old_heads)
    _at_least(heads, old_heads, "heads", "--heads")
    kv_heads = kv_heads or usual_kv_heads(old_heads, old_kv, heads)
    _at_least(kv_heads, old_kv, "KV heads", "--kv-heads")
    q, kv = head_sources(old_heads, old_kv, heads, kv_heads)
    rows_q, rows_kv = _rows(q, size), _rows(kv, size)
    first, second = old_heads * size, old_kv * size
    sources = {
        "hidden": _more(old_hidden, hidden), "q": rows_q, "kv": rows_kv,
        "qkv": torch.cat([rows_q, _shifted(rows_kv, first), _shifted(rows_kv, first + second)]),
    }  # fmt: skip
    wider = _Wider(weights, sources, (old_hidden, hidden), seed)
    new_config, raw = with_config(weights.raw, width_changes(config, hidden, heads, kv_heads))
    dtypes = {
        name: _norm_type(kind, old_hidden, hidden) if name.endswith(tuple(f"{norm}.weight" for norm in _NORMS)) else kind
        for name, kind in weights.dtypes.items()
    }
    grown = Weights(new_config, raw, dtypes, wider.read)
    said = _said_of_width(config.family, (old_hidden, hidden), (old_heads, heads), (old_kv, kv_heads), dtypes != weights.dtypes)
    rounds = config.family == "PhiForCausalLM" and hidden != old_hidden and any(kind != "F32" for kind in weights.dtypes.values())
    return Grown(grown, said, ROUNDED if rounds else LOSSLESS)


_EPS = {"LlamaForCausalLM": 1e-6, "PhiForCausalLM": 1e-5, "Phi3ForCausalLM": 1e-5}
"""transformers' own, for a config.json that does not say."""


def width_changes(config: ModelConfig, hidden: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Fields of config.json that `widen_hidden` and `widen_attention` change. Raises Rejected(SETTING) for too small an eps."""
    changes: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if config.family == "LlamaForCausalLM":
        changes["head_dim"] = config.head_dim
    if hidden != (old := config.number("hidden_size")):
        name = "layer_norm_eps" if config.family == "PhiForCausalLM" else "rms_norm_eps"
        eps = float(config.values.get(name, _EPS[config.family]))
        changes[name] = eps * old / hidden
        if changes[name] < SMALLEST_EPS:
            got = f"{name} {eps:g}, which has to shrink to {changes[name]:.3g}, by {old} / {hidden}"
            raise Rejected(Reason.SETTING, got, f"at least {SMALLEST_EPS:g} after that", "--hidden")
    return changes


def usual_kv_heads(heads: int, kv_heads: int, new_heads: int) -> int:
    """As many heads for each as there were, where that comes out even; else as many KV heads as there were."""
    group = heads // kv_heads
    return new_heads // group if new_heads % group == 0 else kv_heads


def _rows(heads: Iterable[int], size: int) -> Tensor:
    """Old row of each new one: whole heads."""
    each = torch.tensor([*heads])[:, None]
    return torch.where(each == _NEW, _NEW, each * size + torch.arange(size)).flatten()


def _shifted(rows: Tensor, by: int) -> Tensor:
    return torch.where(rows == _NEW, _NEW, rows + by)


_KEPT_IN_FLOAT32 = (
    "The norm weights are kept in float32, because 16 bits cannot hold the factor: who loads them in bfloat16 rounds each by up "
    "to 0.4 %, in float16 by up to 0.05 %."
)


def _said_of_width(
    family: str, hidden: tuple[int, int], heads: tuple[int, int], kv: tuple[int, int], in_float32: bool
) -> tuple[str, ...]:
    said = []
    kept = f" {_KEPT_IN_FLOAT32}" * in_float32
    if hidden[0] != hidden[1]:
        ratio = hidden[0] / hidden[1]
        written = "the mean is" if family == "PhiForCausalLM" else "nothing is"
        how = f"{written} written into the new values and random weights read them"
        norms = f"norm weights times {math.sqrt(ratio):.6g}, eps times {ratio:.6g}"
        said.append(f"Hidden size: {hidden[0]} to {hidden[1]}: {how}; {norms}. The function is the same but for rounding.{kept}")
    if heads[0] != heads[1] or kv[0] != kv[1]:
        what = f"Heads: {heads[0]} to {heads[1]}, KV heads: {kv[0]} to {kv[1]}"
        said.append(f"{what}: new heads random in, zero out; old ones keep their keys and values. The function is the same.")
    return tuple(said)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def more_tokens(weights: Weights, vocab: int, *, seed: int = 0) -> Grown:
    """Rows for k = V' - V new tokens, each the mean of the old ones (in an input that is not the head too: random around it).

    Not lossless: a new token takes probability from the others. With the mean row its logit is the mean of the old logits, so
    exp of it is at most their mean exp, Z / V (Jensen), and no token's loss rises by more than log(1 + k / V), whatever the
    text; a trained model is far below it. A Phi's head has a bias: 20 less than the mean there leaves 2e-9 of that.

    Raises Rejected(SETTING) for fewer tokens, Rejected as `with_config`.
    """
    old = weights.config.number("vocab_size")
    _at_least(vocab, old, "vocabulary", "--vocab")
    config, raw = with_config(weights.raw, {"vocab_size": vocab})
    tied, more = weights.config.tied, vocab - old

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        if not more or _axes(name)[:1] != ("vocab",):
            return tensor
        found = _extended(tensor, 0, _more(old, vocab), _mean, torch.Generator())
        if name == "lm_head.bias":
            found[old:] -= _BIAS_BELOW
        elif _part(name) == "embed_tokens" and not tied:
            found[old:] += _random(tensor, 0, more, _numbers(seed, "more_tokens", name))
        return found

    has_bias = "lm_head.bias" in weights.dtypes
    bound = math.log1p(more / old * (math.exp(-_BIAS_BELOW) if has_bias else 1.0))
    said = (
        f"Vocabulary: {old} to {vocab}, new rows the mean of the old ones: no token's loss rises by more than {bound:.3g} nats."
    )
    return Grown(Weights(config, raw, weights.dtypes, read), (said,), LOSSLESS, bound)


def untie(weights: Weights) -> Grown:
    """The head is a matrix of its own, which begins as a copy of the embedding. Raises Rejected(SETTING) where it is one."""
    if not weights.config.tied:
        raise Rejected(Reason.SETTING, "a model whose head is not tied", "one whose head is tied", "--untie")
    config, raw = with_config(weights.raw, {"tie_word_embeddings": False})
    embedding = "model.embed_tokens.weight"
    dtypes = {**weights.dtypes, "lm_head.weight": weights.dtypes[embedding]}

    def read(name: str) -> Tensor:
        return weights.read(embedding if name == "lm_head.weight" else name)

    return Grown(Weights(config, raw, dtypes, read), ("The head is untied. The function is the same.",), LOSSLESS)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _numbers(seed: int, *what: str) -> torch.Generator:
    """A stream of its own for each tensor: what is drawn does not depend on what was read before."""
    digest = hashlib.sha256("|".join([str(seed), *what]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def _draw(shape: Sequence[int], deviation: float, numbers: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=numbers) * deviation


def _plus(tensor: Tensor, deviation: float, numbers: torch.Generator) -> Tensor:
    return (tensor.float() + _draw(tensor.shape, deviation, numbers)).to(tensor.dtype)


def _deviation(tensor: Tensor) -> float:
    """Of some million of the values, to three digits: the same on every machine, whatever order it adds in. Never 0."""
    values = tensor.reshape(-1)
    some = values[:: max(1, values.numel() // _BLOCK)].double()
    return float(f"{float(some.square().mean().sqrt()):.3g}") or _USUAL_DEVIATION
