"""A stranger's config.json as checked numbers, and the tensors that a model of these numbers has.

Keys by allow-list: one unknown key can change what a model computes (`"is_causal": false` makes a Llama read ahead), so a
key is a number that is checked here, or has no part in a loss, or must stand at the one value that changes nothing, or
is refused. Nothing of the file reaches transformers but what `settings` gives: built here, of checked values alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from sn29.errors import Reason, Rejected

FAMILIES = {"LlamaForCausalLM": "llama", "PhiForCausalLM": "phi", "Phi3ForCausalLM": "phi3"}
"""Class name in `architectures` -> `model_type` that must stand beside it."""

MAX_CONFIG_BYTES = 64 * 1024
_MAX_DEPTH = 8
"""Brackets inside brackets; what is read here needs four."""
_MOST_KEYS = 12
"""Wrong keys of one config.json that are told one by one."""

T = TypeVar("T")


class Refusals(list[Rejected]):
    """All that is wrong with something, in the order in which it was found."""

    def of(self, check: Callable[[], T]) -> T | None:
        """What the check returns; None when it refuses, which is kept."""
        try:
            return check()
        except Rejected as error:
            self.append(error)
            return None


# --- JSON -------------------------------------------------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not finite")
    return value


def _whole_number(text: str) -> int:
    if text == "-0":  # safetensors reads it as a fraction, and refuses
        raise ValueError("-0 is not a whole number")
    return int(text)


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""How JSON can name half a character; UTF-8 cannot hold one."""
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""Never goes back: a string that does not end takes all that is left, once. With a closing quote that must be there, each
quote inside it is where the search begins again: 32 kB of `\\"` took 3 seconds, the 477 kB of a header that is allowed 25
minutes, in one call that nothing interrupts. (The parser refuses such a string afterwards.)"""


def _depth_checked(text: str) -> str:
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} brackets inside each other")
    return text


def strict_json(data: bytes, reason: Reason, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, infinities, half characters or deep nesting. Raises Rejected(reason)."""
    try:
        value = json.loads(
            _depth_checked(data.decode("utf-8")),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole_number,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Rejected(reason, "half of a surrogate pair", "texts of whole characters", where) from None
    except (ValueError, RecursionError) as error:
        raise Rejected(reason, f"{type(error).__name__}: {str(error)[:80]}", "a JSON object", where) from None
    if not isinstance(value, dict):
        raise Rejected(reason, type(value).__name__, "a JSON object", where)
    return value


# --- config.json ------------------------------------------------------------------------------------------------------

# field -> (lowest, highest); whole numbers. Bounds are above any model that fits a competition: they only keep a crafted
# number from costing time or memory before the parameter limit is looked at (20,000 layers: 8 minutes), and thin models
# from costing what no parameter limit sees (5,000 layers of 26 parameters: 1.4 s for 24 tokens; attention: below).
_WHOLE = {
    "vocab_size": (1, 1 << 18),  # logits of 4,096 tokens in float32: 4.3 GB
    "hidden_size": (1, 1 << 14),
    "intermediate_size": (1, 1 << 17),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 256),
    "num_key_value_heads": (1, 256),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 1 << 20),
    "original_max_position_embeddings": (1, 1 << 20),
    "sliding_window": (1, 1 << 20),
}
_MOST_HEADS = 4096
_MOST_ATTENTION = 1 << 19
"""Of all layers together: attention heads, and their dimensions. Each head compares every token with every other one, at a
cost that its parameters do not show: a layer of 512 takes 0.2 s of a core for 2,048 tokens with 8 heads of 64, and 1.9 s
with 256 heads of 2; 128 of those are 134.8 million parameters. A 7B has 1,024 heads with 131,072 dimensions, 80 layers of 40
heads of 64 have 3,200 with 204,800. What is allowed takes at most four times as long as a 7B's attention."""
SMALLEST_EPS = 1e-12
_REAL = {
    "rope_theta": (1.0, 1e9),
    "rms_norm_eps": (SMALLEST_EPS, 0.1),
    "layer_norm_eps": (SMALLEST_EPS, 0.1),
    "partial_rotary_factor": (0.01, 1.0),
}
_FLAG = {"attention_bias", "mlp_bias", "qk_layernorm", "tie_word_embeddings"}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# Known to have no part in the loss of an evaluated model, or checked elsewhere: never handed on. (Dropout: a model under
# evaluation has none. Its data type: the headers say it. Ids: the start token is checked below.)
_WITHOUT_EFFECT = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "initializer_range", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "attention_dropout", "embd_pdrop", "resid_pdrop",
    "_name_or_path", "_model_name_or_path", "is_llama_config", "transformers.js_config",
}  # fmt: skip
# Keys that older versions wrote, at the one value that changes nothing.
_PINNED: dict[str, Any] = {
    "pretraining_tp": 1, "is_causal": True, "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False,
    "return_dict": True, "output_attentions": False, "output_hidden_states": False, "torchscript": False,
    "chunk_size_feed_forward": 0, "attention_bias": False, "mlp_bias": False, "rope_interleaved": False,
}  # fmt: skip
_FIELDS = {
    "LlamaForCausalLM": {"rms_norm_eps", "attention_bias", "mlp_bias", "head_dim"},
    "PhiForCausalLM": {"layer_norm_eps", "qk_layernorm", "partial_rotary_factor"},
    "Phi3ForCausalLM": {"rms_norm_eps", "partial_rotary_factor", "original_max_position_embeddings", "sliding_window"},
}
_COMMON = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rope_theta", "rope_parameters", "tie_word_embeddings", "hidden_act",
}  # fmt: skip
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROTARY_SHARE = {"LlamaForCausalLM": 1.0, "PhiForCausalLM": 0.5, "Phi3ForCausalLM": 1.0}
"""Part of a head that positions turn, when config.json does not say."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a config.json that decide the computation, each checked."""

    family: str
    values: Mapping[str, Any]
    """Field of config.json -> checked value; fields that the file leaves out are left out here. Rotary positions stand
    as `rope_theta` and `partial_rotary_factor`, wherever the file has them."""
    start_token: int

    def number(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        return int(default if value is None and default is not None else value)  # type: ignore[arg-type]

    @property
    def head_dim(self) -> int:
        return self.number("head_dim", self.number("hidden_size") // self.number("num_attention_heads"))

    @property
    def tied(self) -> bool:
        return bool(self.values.get("tie_word_embeddings", False))

    @property
    def rotary_share(self) -> float:
        return float(self.values.get("partial_rotary_factor", _ROTARY_SHARE[self.family]))

    def settings(self) -> dict[str, Any]:
        """Arguments of the family's transformers config class: checked values, and nothing that a file could add."""
        plain = {key: value for key, value in self.values.items() if key not in ("rope_theta", "partial_rotary_factor")}
        rope = {"rope_type": "default", "rope_theta": self.values.get("rope_theta", 10_000.0)}
        if self.family != "LlamaForCausalLM":
            rope["partial_rotary_factor"] = self.rotary_share
        nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        return {**plain, "rope_parameters": rope, **nothing}


def parse_config(data: bytes) -> ModelConfig:
    """The checked numbers of a config.json.

    Raises Rejected(FAMILY) for a class we do not know, Rejected(BAD_CONFIG) naming the key otherwise.
    """
    config, refusals = read_config(data)
    if refusals or config is None:
        raise refusals[0]
    return config


def read_config(data: bytes) -> tuple[ModelConfig | None, tuple[Rejected, ...]]:
    """Everything that is wrong with a config.json; and its numbers, when those are right on which shapes depend.

    So a file with one key too many can still be compared with its tensors. The numbers are to be used for nothing
    else when there is a refusal.
    """
    refusals = Refusals()
    if len(data) > MAX_CONFIG_BYTES:
        wrong = Rejected(Reason.BAD_CONFIG, f"more than {MAX_CONFIG_BYTES} bytes", f"{MAX_CONFIG_BYTES} bytes", "config.json")
        return None, (wrong,)
    raw = refusals.of(lambda: strict_json(data, Reason.BAD_CONFIG, "config.json"))
    family = refusals.of(lambda: _family(raw)) if raw is not None else None
    if raw is None or family is None:
        return None, tuple(refusals)
    refusals.of(lambda: _check_model_type(raw, family))
    values: dict[str, Any] = dict(refusals.of(lambda: _rotary(raw, family)) or {})
    for key in sorted(raw.keys() - _WITHOUT_EFFECT - {"rope_parameters", "rope_scaling", *_rotary_names(family)}):
        if len(refusals) == _MOST_KEYS:
            break
        if raw[key] is not None or key not in _COMMON | _FIELDS[family]:
            checked = refusals.of(lambda key=key: _field(family, key, raw[key]))  # type: ignore[misc]
            values.update({} if checked is None else {key: checked})
    for key in _NEEDED:
        if raw.get(key) is None:
            refusals.append(Rejected(Reason.BAD_CONFIG, f"no {key}", f"{key} is stated", "config.json"))
    if not set(_NEEDED) <= values.keys():
        return None, tuple(refusals)
    start_token = refusals.of(lambda: _start_token(raw, values["vocab_size"]))
    config = ModelConfig(family, MappingProxyType(values), start_token or 0)
    fits = refusals.of(lambda: _check_heads(config))
    return config if fits else None, tuple(refusals)


def _family(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures")
    family = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise Rejected(Reason.FAMILY, architectures, f"one of {', '.join(FAMILIES)}", "config.json: architectures")
    return family


def _check_model_type(raw: Mapping[str, Any], family: str) -> None:
    if raw.get("model_type") != FAMILIES[family]:
        raise Rejected(Reason.BAD_CONFIG, raw.get("model_type"), FAMILIES[family], "config.json: model_type")


def _field(family: str, key: str, value: Any) -> Any:
    """The checked value of a key; None for one that is there without effect. Raises Rejected(BAD_CONFIG)."""
    if key in _COMMON or key in _FIELDS[family]:
        return _checked(key, value)
    if key not in _PINNED:
        allowed = ", ".join(sorted(_COMMON | _FIELDS[family]))
        raise Rejected(Reason.BAD_CONFIG, f"{key[:60]} = {str(value)[:60]}", f"only {allowed}", "config.json")
    if value != _PINNED[key] or type(value) is not type(_PINNED[key]):
        raise Rejected(Reason.BAD_CONFIG, str(value)[:60], json.dumps(_PINNED[key]), f"config.json: {key}")
    return None


def _checked(key: str, value: Any) -> Any:
    where = f"config.json: {key}"
    if key in _FLAG:
        if not isinstance(value, bool):
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], "true or false", where)
    elif key == "hidden_act":
        if value not in _ACTIVATIONS:
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], f"one of {', '.join(_ACTIVATIONS)}", where)
    else:
        low, high = _WHOLE.get(key) or _REAL[key]
        kinds = (int,) if key in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], f"a number from {low} to {high}", where)
    return value


def _rotary_names(family: str) -> tuple[str, ...]:
    return ("rope_theta",) if family == "LlamaForCausalLM" else ("rope_theta", "partial_rotary_factor")


def _rotary(raw: Mapping[str, Any], family: str) -> dict[str, Any]:
    """`rope_theta` and `partial_rotary_factor`, where the file has them.

    Plain rotary positions only: scaled kinds depend on what else is in the batch, or on the longest text seen.
    """
    tables = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None}
    where = f"config.json: {next(iter(tables), 'rope_parameters')}"
    table: Any = next(iter(tables.values()), {})
    if len(tables) > 1 or not isinstance(table, dict):
        got = " and ".join(tables) if len(tables) > 1 else type(table).__name__
        raise Rejected(Reason.BAD_CONFIG, got, "one object", where)
    names = _rotary_names(family)
    if table.get("rope_type", "default") != "default" or not set(table) <= {"rope_type", *names}:
        raise Rejected(Reason.BAD_CONFIG, str(table)[:80], f"rope_type default with {', '.join(names)}", where)
    found = {}
    for name in names:
        stated = [_checked(name, value) for value in (table.get(name), raw.get(name)) if value is not None]
        if len(set(stated)) > 1:
            raise Rejected(Reason.BAD_CONFIG, f"{name} {stated[0]} and {stated[1]}", "one value", where)
        found.update({name: stated[0]} if stated else {})
    return found


def _start_token(raw: Mapping[str, Any], vocab_size: int) -> int:
    """The model's own beginning-of-text id, else its end-of-text id, else 0: constant, so it says nothing of a text."""
    for key in ("bos_token_id", "eos_token_id"):
        value = raw.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], f"an id from 0 to {vocab_size - 1}", f"config.json: {key}")
        return value
    return 0


def _check_heads(config: ModelConfig) -> bool:
    """True, or Rejected: what these classes of transformers can compute at all."""
    heads, hidden = config.number("num_attention_heads"), config.number("hidden_size")
    groups = config.number("num_key_value_heads", heads)
    if heads % groups:
        raise Rejected(Reason.BAD_CONFIG, f"{heads} heads, {groups} groups", "heads divisible by groups", "config.json")
    if hidden % heads:
        raise Rejected(Reason.BAD_CONFIG, f"hidden {hidden}, {heads} heads", "hidden divisible by heads", "config.json")
    layers = config.number("num_hidden_layers")
    for found, most, what in (
        (layers * heads, _MOST_HEADS, "attention heads"),
        (layers * heads * config.head_dim, _MOST_ATTENTION, "dimensions of attention heads"),
    ):
        if found > most:
            raise Rejected(Reason.BAD_CONFIG, f"{found} {what} in {layers} layers", f"at most {most}", "config.json")
    turned = int(config.head_dim * config.rotary_share)
    if turned < 2 or turned % 2:
        got = f"{turned} of {config.head_dim} dimensions of a head turned by positions"
        raise Rejected(Reason.BAD_CONFIG, got, "an even number, at least 2", "config.json")
    return True


# --- tensors ----------------------------------------------------------------------------------------------------------


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds, as transformers 5.23 builds the model."""
    hidden, inner = config.number("hidden_size"), config.number("intermediate_size")
    heads = config.number("num_attention_heads")
    q, kv = heads * config.head_dim, config.number("num_key_value_heads", heads) * config.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.number("vocab_size"), hidden)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (width,)
        if bias:
            tensors[f"{name}.bias"] = (width,)

    for index in range(config.number("num_hidden_layers")):
        at, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        if config.family == "LlamaForCausalLM":
            bias, mlp_bias = bool(config.values.get("attention_bias")), bool(config.values.get("mlp_bias"))
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{at}.{name}_proj", rows, hidden, bias)
            linear(f"{at}.o_proj", hidden, q, bias)
            linear(f"{mlp}.gate_proj", inner, hidden, mlp_bias)
            linear(f"{mlp}.up_proj", inner, hidden, mlp_bias)
            linear(f"{mlp}.down_proj", hidden, inner, mlp_bias)
        elif config.family == "PhiForCausalLM":
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{at}.{name}_proj", rows, hidden, True)
            linear(f"{at}.dense", hidden, q, True)
            if config.values.get("qk_layernorm"):
                norm(f"{at}.q_layernorm", config.head_dim, True)
                norm(f"{at}.k_layernorm", config.head_dim, True)
            linear(f"{mlp}.fc1", inner, hidden, True)
            linear(f"{mlp}.fc2", hidden, inner, True)
        else:
            linear(f"{at}.qkv_proj", q + 2 * kv, hidden, False)
            linear(f"{at}.o_proj", hidden, q, False)
            linear(f"{mlp}.gate_up_proj", 2 * inner, hidden, False)
            linear(f"{mlp}.down_proj", hidden, inner, False)
        phi = config.family == "PhiForCausalLM"
        norm(f"model.layers.{index}.input_layernorm", hidden, phi)
        if not phi:
            norm(f"model.layers.{index}.post_attention_layernorm", hidden, False)
    phi = config.family == "PhiForCausalLM"
    norm("model.final_layernorm" if phi else "model.norm", hidden, phi)
    if not config.tied:
        tensors["lm_head.weight"] = (config.number("vocab_size"), hidden)
    if phi:
        tensors["lm_head.bias"] = (config.number("vocab_size"),)
    return tensors
