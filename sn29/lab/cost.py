"""What a model costs, by its config alone: parameters by part, operations for a token, bytes that the backward pass keeps.

    config.json (any causal class of transformers) -> the model without its weights -> Costs

The model is built of tensors that have a shape and no values (torch's FakeTensorMode), so that 70B takes no memory, nothing
is downloaded and no code but transformers' own is run. Each figure is held against that model: parameters are counted on it,
operations are compared with what torch counts in one of its forward passes, and the bytes that backward keeps are those of
the tensors that autograd saves in it.

Operations of a token, forward and backward (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B):

    6 x weights of the matrices       2 forward, 4 backward; embedding rows are looked up and cost nothing
    12 x width of the heads x s       for a layer and a row of s tokens: scores and their sums with all s keys; half of it is
                                      above the diagonal, which causal kernels leave out (`share_causal`)
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from sn29.errors import Reason, Rejected

_ATTENTION = "sn29_cost"
"""Name of the attention below in transformers' interface."""
WITHIN = 0.02
"""Largest relative difference of our operations from those that torch counts."""
DTYPES = ("float32", "mixed", "bfloat16")
"""Of weights and products: all float32; weights float32 and products bfloat16 by autocast; all bfloat16."""
_TRIED = (64, 128)
"""Tokens of the rows that are passed through: what backward keeps is a x s + b x s^2, with b 0 where the class takes its
attention from transformers' interface, as all but a few old ones do."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A number for each part of a model."""

    embedding: int
    """Rows for tokens, and for places where positions are learned."""
    head: int
    """0 for a tied one: its parameters are the embedding's."""
    attention: int
    """Projections into and out of it."""
    mlp: int
    norms: int
    other: int
    """Projections between embedding and layers, in classes that have them."""

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.attention + self.mlp + self.norms + self.other


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of one token, forward and backward, by part."""

    scores: float
    """Attention's own: each token with each other one of its row."""
    projections: float
    mlp: float
    head: float
    other: float

    @property
    def dense(self) -> float:
        """Of all matrices: what does not grow with the row."""
        return self.projections + self.mlp + self.head + self.other

    @property
    def total(self) -> float:
        return self.scores + self.dense

    @property
    def share(self) -> float:
        """Of attention's scores in all, full square."""
        return self.scores / self.total

    @property
    def share_causal(self) -> float:
        """The same where the kernel leaves out what is above the diagonal."""
        return self.scores / 2 / (self.scores / 2 + self.dense)


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that the forward pass of one row leaves for backward, as s tokens x `linear` + s^2 x `square`."""

    linear: float
    square: float

    def of(self, tokens: int) -> float:
        return self.linear * tokens + self.square * tokens**2


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything about a config that a plan needs."""

    family: str
    """Class of the model, e.g. `LlamaForCausalLM`."""
    layers: int
    hidden: int
    vocabulary: int
    heads_width: int
    """Heads x dimensions of one."""
    windows: tuple[int, ...]
    """Of each layer: keys that a token sees; 0: all."""
    positions: str
    """rotary, ALiBi, learned, or rotary with the share of layers that have none."""
    places: int
    """Longest rows that its positions are made for; 0: any."""
    activation: str
    """SwiGLU, GeGLU, ReGLU, or the ungated function's name."""
    is_tied: bool
    parameters: Parts
    weights: Parts
    """Of the matrices that every token is multiplied with: a tied head counts here."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters by name, in the names that `optimizers.stated_bytes` knows: `embed_tokens` and `lm_head`."""
    largest_layer: int
    """Parameters of it."""
    kept: Kept
    """Of all layers together, and what is between them and the head."""
    kept_layer: Kept
    """Of the layer that keeps most."""

    def operations(self, tokens: int) -> Operations:
        """Of a token in rows of so many, one document a row."""
        w, scores = self.weights, scores_of(self.heads_width, self.windows, tokens)
        return Operations(scores, 6.0 * w.attention, 6.0 * w.mlp, 6.0 * w.head, 6.0 * w.other)


def scores_of(heads_width: int, windows: Sequence[int], tokens: int) -> float:
    """Operations of a token's scores in rows of so many, forward and backward, in layers of these windows (0: none).

    Full square; a window of w sees w - w^2 / 2s keys on average, causal, and counts twice that.
    """
    return 12.0 * heads_width * sum(tokens if not w or tokens <= w else 2 * w - w * w / tokens for w in windows)


def config_of(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """A config.json as transformers' own class for its model_type: no code of the repository, whatever `auto_map` says.

    Raises Rejected(BAD_CONFIG) for a kind of model that transformers does not have, and for values that its class does not take.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise Rejected(Reason.BAD_CONFIG, f"model_type {kind}", "one that transformers has", "config.json")
    fields = {key: value for key, value in raw.items() if key not in ("auto_map", "model_type", "quantization_config")}
    _check_numbers(fields, CONFIG_MAPPING[kind].attribute_map)
    with _silent():
        try:
            config: PreTrainedConfig = CONFIG_MAPPING[kind](**fields)
        except Exception as error:
            # transformers checks fields with a class of huggingface_hub's, which has no other parent
            if not isinstance(error, TypeError | ValueError | KeyError | AttributeError) and "Strict" not in type(error).__name__:
                raise
            raise Rejected(Reason.BAD_CONFIG, " ".join(str(error).split())[:160], f"a config of {kind}", "config.json") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Rejected(Reason.BAD_CONFIG, f"model_type {kind}", "a causal language model", "config.json")
    return config


_NUMBERS = {
    "num_hidden_layers": 1000, "hidden_size": 1 << 20, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16, "intermediate_size": 1 << 22, "ffn_dim": 1 << 22, "n_inner": 1 << 22, "ffn_hidden_size": 1 << 22,
    "expansion_ratio": 1 << 10, "word_embed_proj_dim": 1 << 20, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 30,
}  # fmt: skip
"""Field -> the most that is planned, a hundred times what there is; the least is 1."""


def _check_numbers(fields: Mapping[str, Any], called: Mapping[str, str]) -> None:
    """`called`: field -> what this family calls it. Other than numbers are the family's class's to look at.

    Raises Rejected(BAD_CONFIG).
    """
    for field, most in _NUMBERS.items():
        for name in {field, called.get(field, field)}:
            value = fields.get(name)
            if isinstance(value, int) and not 1 <= value <= most:
                raise Rejected(Reason.BAD_CONFIG, f"{name} {value}", f"1 to {most:,}", "config.json")
    heads, groups = (fields.get(called.get(name, name)) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        got = f"num_key_value_heads {groups} of num_attention_heads {heads}"
        raise Rejected(Reason.BAD_CONFIG, got, "a number that divides them", "config.json")


def costs_of(config: PreTrainedConfig, dtype: str = "mixed") -> Costs:
    """`dtype`: one of `DTYPES`, which decides what is kept.

    Raises Rejected(BAD_CONFIG) for a class whose operations are not what the formulas say: experts, state spaces, and such.
    """
    model = built(config, "meta")
    parts = _Places(model)
    alike = len({tuple(p.shape for p in layer.parameters()) for layer in parts.layers}) == 1
    few = with_layers(config, 2) if alike and len(parts.layers) > 2 else config
    scale = len(parts.layers) / few.num_hidden_layers
    with _silent(), FakeTensorMode():
        small = built(few, "cpu", torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        small.set_attn_implementation(_ATTENTION)
        _compare(small)
        kept, kept_layer = _kept(small, dtype, scale)
    return Costs(
        family=type(model).__name__,
        layers=len(parts.layers),
        hidden=config.hidden_size,
        vocabulary=len(parts.head.weight),
        heads_width=_heads_width(config),
        windows=_windows(config, len(parts.layers)),
        positions=(positions := _positions(model)),
        places=0 if positions in ("ALiBi", "none") else int(getattr(config, "max_position_embeddings", 0) or 0),
        activation=_activation(config, parts),
        is_tied=parts.is_tied,
        parameters=parts.parameters(),
        weights=parts.weights(),
        shapes=parts.shapes(),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in parts.layers),
        kept=kept,
        kept_layer=kept_layer,
    )


# --- the model without its weights ------------------------------------------------------------------------------------


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' remarks on ids and on configs that it generates text with."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def built(config: PreTrainedConfig, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh model in training mode, without values on the device `meta` or inside a FakeTensorMode.

    Raises Rejected(BAD_CONFIG) for what its class cannot be built from.
    """
    make = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(config, "pad_token_id", None) not in range(config.vocab_size):  # Phi3's default beside a smaller vocabulary
        config.pad_token_id = None
    with _silent(), torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model: PreTrainedModel = make._from_config(config, dtype=dtype).train()
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError) as error:
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise Rejected(Reason.BAD_CONFIG, got, f"a config that {make.__name__} can be built from", "config.json") from None
    return model


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same with fewer layers, lists with an entry for each of them included."""
    short = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(short, name, value[:layers])
    short.num_hidden_layers = layers
    return short


class _Scores(torch.autograd.Function):
    """The two products of attention, keeping for backward what flash kernels keep: q, k, v, the result, a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key_of_all, value_of_all = (x.repeat_interleave(groups, 1) for x in (key, value))
        found = (query @ key_of_all.transpose(2, 3) @ value_of_all).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, found, query.new_empty(query.shape[:3], dtype=torch.float32))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As many operations as torch's own: the four products of the gradients."""
        query, key, value, _, _ = ctx.saved_tensors
        groups, up = query.shape[1] // key.shape[1], grads[0].transpose(1, 2)
        key_of_all, value_of_all = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = up @ value_of_all.transpose(2, 3)
        to_value = (scores.transpose(2, 3) @ up).unflatten(1, (-1, groups)).sum(2)
        to_key = (scores.transpose(2, 3) @ query).unflatten(1, (-1, groups)).sum(2)
        return scores @ key_of_all, to_key, to_value


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """[B, heads, T, D] -> [B, T, heads, D]: right in shapes, operations and kept bytes; there are no values.

    The result is kept twice, for attention's backward and for the projection's, as by `packed.documents_attention`.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return torch.cat([_Scores.apply(query, key, value)], dim=1), None  # type: ignore[no-untyped-call]


# Without a mask function of that name transformers makes no mask.
AttentionInterface.register(_ATTENTION, _attention)


def _passed(model: nn.Module, rows: int, tokens: int) -> None:
    """One forward pass of a model, or of its base. Raises Rejected(BAD_CONFIG) for a class that looks at values on its way."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    places = {"position_ids": torch.arange(tokens).expand(rows, tokens)}
    takes_places = "position_ids" in inspect.signature(model.forward).parameters
    try:
        model(input_ids=ids, use_cache=False, **(places if takes_places else {}))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        got = f"{type(model).__name__}: without values it ends in {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Rejected(Reason.BAD_CONFIG, got, "a dense model whose shapes do not depend on values", "config.json") from None


def _compare(model: PreTrainedModel) -> None:
    """Raises Rejected(BAD_CONFIG) where our operations of a forward pass are not those that torch counts in it."""
    tokens, layers = _TRIED[1], model.config.num_hidden_layers
    ours = tokens * (2.0 * _Places(model).weights().total + 4.0 * _heads_width(model.config) * layers * tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _passed(model, 1, tokens)
    counted = counter.get_total_flops()
    if not abs(ours / counted - 1) <= WITHIN:
        got = f"{type(model).__name__}: {counted:,} operations in a forward pass of {tokens} tokens"
        raise Rejected(Reason.BAD_CONFIG, got, f"{ours:,.0f} within {WITHIN:.0%}: a dense model with attention", "config.json")


# --- what is where ----------------------------------------------------------------------------------------------------


class _Places:
    """Which part each module of a model belongs to."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises Rejected(BAD_CONFIG) for a class without layers, or without a linear head."""
        self.model, self.head = model, model.get_output_embeddings()
        count = getattr(model.config, "num_hidden_layers", None)
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
        if not lists or not isinstance(self.head, nn.Linear) or not _heads_width(model.config):
            limit = "a causal language model with layers of attention and a linear head"
            raise Rejected(Reason.BAD_CONFIG, type(model).__name__, limit, "config.json")
        self.layers = list(lists[0])
        self.is_tied = self.head.weight is model.get_input_embeddings().weight
        if any(parameter.dim() > 2 for layer in self.layers for parameter in layer.parameters()):
            got = f"{type(model).__name__}, with experts or convolutions in its layers"
            raise Rejected(Reason.BAD_CONFIG, got, "a dense model with attention", "config.json")
        self._inside = {id(module) for layer in self.layers for module in layer.modules()}
        attention = [module for module in model.modules() if "Attention" in type(module).__name__]
        self._attention = {id(module) for each in attention for module in each.modules()}

    def of(self, module: nn.Module) -> str:
        """The part of the parameters that the module itself holds: a field of `Parts`."""
        if module is self.head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if "Norm" in type(module).__name__:
            return "norms"
        if id(module) in self._attention:
            return "attention"
        return "mlp" if id(module) in self._inside else "other"

    def parameters(self) -> Parts:
        """All of them, each once."""
        seen: set[int] = set()
        found = dict.fromkeys(Parts.__slots__, 0)
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                part = "embedding" if parameter is self.model.get_input_embeddings().weight else self.of(module)
                found[part] += 0 if id(parameter) in seen else parameter.numel()
                seen.add(id(parameter))
        return Parts(**found)

    def weights(self) -> Parts:
        """Of the matrices."""
        found = dict.fromkeys(Parts.__slots__, 0)
        for module in self.model.modules():
            if is_matrix(module):
                found[self.of(module)] += module.weight.numel()
        return Parts(**found)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Matrices of embeddings and head under the names by which the trainer's optimizers know them."""
        found = {}
        for path, module in self.model.named_modules():
            part = {"embedding": "embed_tokens.", "head": "lm_head."}.get(self.of(module), "")
            for name, parameter in module.named_parameters(recurse=False):
                found[f"{part}{path}.{name}"] = tuple(parameter.shape)
        head = next(path for path, module in self.model.named_modules() if module is self.head)
        return {name: shape for name, shape in found.items() if not (self.is_tied and name == f"lm_head.{head}.weight")}


def is_matrix(module: nn.Module) -> bool:
    """Whether each token is multiplied with its weight: a linear layer, or what GPT-2 has for one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _heads_width(config: PreTrainedConfig) -> int:
    """0 for a config without heads."""
    heads = getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or not heads:
        return 0
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _windows(config: PreTrainedConfig, layers: int) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return (0,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding"] * layers
    return tuple(window if "sliding" in kind else 0 for kind in kinds)


def _positions(model: PreTrainedModel) -> str:
    config = model.config
    nested = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(nested, "alibi", False):
        return "ALiBi"
    if not getattr(config, "rotary_dim", 0) and not any("Rotary" in type(module).__name__ for module in model.modules()):
        return "learned" if sum(isinstance(module, nn.Embedding) for module in model.modules()) > 1 else "none"
    without = list(getattr(config, "no_rope_layers", None) or []).count(0)  # SmolLM3: 1 is a layer that has them
    return f"rotary, none in {without} of {config.num_hidden_layers} layers" if without else "rotary"


def _activation(config: PreTrainedConfig, parts: _Places) -> str:
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    name = str(next((getattr(config, key) for key in names if getattr(config, key, None)), "gelu"))  # bloom and mpt name none
    gated = any("gate" in path for path, module in parts.layers[0].named_modules() if is_matrix(module))
    if not gated:
        return {"relu2": "ReLU squared", "relu": "ReLU"}.get(name, "GELU" if "gelu" in name else name)
    return {"silu": "SwiGLU", "swish": "SwiGLU", "relu": "ReGLU"}.get(name, "GeGLU" if "gelu" in name else f"{name}, gated")


# --- what backward keeps ----------------------------------------------------------------------------------------------


def _kept(model: PreTrainedModel, dtype: str, scale: float) -> tuple[Kept, Kept]:
    """(of a row in all layers, of which there are `scale` times as many as here; in the one that keeps most).

    Two rows less one: what all rows share is left out.
    """
    parts, whole, most = _Places(model), [], []
    for tokens in _TRIED:
        one, two = (_saved(model, parts, rows, tokens, dtype) for rows in (1, 2))
        *layers, outside = [b - a for a, b in zip(one, two, strict=True)]
        whole.append(sum(layers) * scale + outside)
        most.append(float(max(layers)))
    return _curve(whole), _curve(most)


def _curve(values: list[float]) -> Kept:
    """Through 0 and both values."""
    (s, t), (a, b) = _TRIED, values
    square = (b / t - a / s) / (t - s)
    return Kept(a / s - square * s, square)


def _saved(model: PreTrainedModel, parts: _Places, rows: int, tokens: int, dtype: str) -> list[int]:
    """Bytes that autograd saves in each layer, and last those outside of them, without the head; each tensor once."""
    held: dict[int, tuple[Tensor, int]] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    at = len(parts.layers)

    def enter(number: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal at
            at = number

        return hook

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in weights and place not in held:
            held[place] = (tensor, at)
        return tensor

    hooks = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(parts.layers)]
    hooks += [layer.register_forward_hook(enter(len(parts.layers))) for layer in parts.layers]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"),
    ):
        _passed(model.base_model, rows, tokens)
    for hook in hooks:
        hook.remove()
    found = [0] * (len(parts.layers) + 1)
    for tensor, number in held.values():
        found[number] += tensor.untyped_storage().nbytes()
    return found


# --- a size as a config -----------------------------------------------------------------------------------------------

_FAMILIES = {"llama": 3, "phi3": 3, "phi": 2}
"""model_type -> matrices of its MLP."""
HEAD_DIM = 128


SIZES = (1e6, 1e13)
"""Parameters of a model that is asked for by its size."""


def config_for(parameters: float, *, family: str = "llama", vocabulary: int = 100_288) -> dict[str, Any]:
    """A config.json of about so many parameters, by this recipe:

        width   a multiple of 512 from 1e9 parameters on, else of 64; heads of 128 (64 below a width of 1,024), one of keys each
        MLP     8/3 of the width, up to a multiple of 256 (Llama; 4 times it for Phi, which has no gate)
        layers  so many that the count is nearest
        of the widths with a count within 2 % and 60 to 160 of width a layer (from 60 x (parameters / 1e9)^(1/3) below 1e9), the
        one whose width / layers is nearest to 128 x (parameters / 7e9)^(1/6), at most 128: 12 layers of 768 at 125M, 32 of
        4,096 at 7B (Brown et al. 2020, table 2.1; Touvron et al. 2023, table 2)

    6.9e9 -> 30 layers of 4,096: 6.89e9. Head and embedding have weights of their own. Raises Rejected(SETTING).
    """
    if family not in _FAMILIES:
        raise Rejected(Reason.SETTING, family, ", ".join(_FAMILIES), "--family")
    if not SIZES[0] <= parameters <= SIZES[1]:
        raise Rejected(Reason.SETTING, f"{parameters:,.7g} parameters", f"{SIZES[0]:,.0f} to {SIZES[1]:,.0f}", "SIZE")
    wanted = min(128.0, 128 * (parameters / 7e9) ** (1 / 6))
    thinnest = min(60.0, 60 * (parameters / 1e9) ** (1 / 3))
    step = 512 if parameters >= 1e9 else 64
    found = []
    for width in range(step, 65_536 + 1, step):
        inner = 4 * width if family == "phi" else -(-8 * width // (3 * 256)) * 256
        layer = 4 * width**2 + _FAMILIES[family] * width * inner
        layers = max(1, round((parameters - 2 * vocabulary * width) / layer))
        miss = abs(2 * vocabulary * width + layers * layer - parameters) / parameters
        if miss <= 0.02 and thinnest <= width / layers <= 160:
            found.append((abs(math.log(width / layers / wanted)), width, inner, layers))
    if not found:
        got = f"{parameters:,.0f} parameters"
        limit = f"what {family} with {vocabulary:,} tokens can have within 2 % and {thinnest:.0f} to 160 of width a layer"
        raise Rejected(Reason.SETTING, got, limit, "SIZE")
    _, width, inner, layers = min(found)
    heads = width // (HEAD_DIM if width >= 1024 and not width % HEAD_DIM else 64)
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM"}[family]],
        "model_type": family, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "max_position_embeddings": 131_072, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
