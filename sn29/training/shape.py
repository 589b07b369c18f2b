"""What a model is apart from its weights: made from a few numbers, or from a whole config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from sn29.errors import Reason, Rejected
from sn29.models.config import MAX_CONFIG_BYTES, parse_config
from sn29.training.packing import Row

FAMILIES = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "PhiForCausalLM": (PhiConfig, PhiForCausalLM),
    "Phi3ForCausalLM": (Phi3Config, Phi3ForCausalLM),
}


@dataclass(frozen=True)
class Shape:
    """What the model is, apart from its weights."""

    family: str
    """`LlamaForCausalLM`, `PhiForCausalLM` or `Phi3ForCausalLM`."""
    vocab_size: int
    """Rows of the embedding: at least the tokenizer's largest id + 1."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    """Longest text in tokens, start token included, that config.json promises."""
    tied: bool
    """Whether the head uses the embedding's weights."""
    start_token: int
    """Id that config.json names as start of a text; the packing says what stands in front of documents."""
    init_std: float = 0.1
    """Standard deviation of the initial weights. At hidden size 64, 250 steps with 0.02 end 10 % higher."""
    num_kv_heads: int = 0
    """Heads of keys and values; 0: as many as `num_heads`."""
    more: str = ""
    """JSON object of further fields of the config, as a checked config.json gives them (`shape_of`)."""

    def __post_init__(self) -> None:
        """Raises Rejected(SETTING) for heads that no class of transformers can compute."""
        groups = self.num_kv_heads or self.num_heads
        if self.num_heads % groups:
            got = f"{self.num_heads} heads with {groups} heads of keys and values"
            raise Rejected(Reason.SETTING, got, "as many for each of these", "shape of the model")
        if self.hidden_size % (2 * self.num_heads) and "head_dim" not in self.more:  # positions turn pairs
            got = f"a width of {self.hidden_size} for {self.num_heads} heads"
            raise Rejected(Reason.SETTING, got, "an even width for each head", "shape of the model")


def shape_of(config: Path, start_token: int | None = None, init_std: float = 0.02) -> Shape:
    """The shape that a config.json, or the checkpoint folder around one, describes.

    `start_token`: instead of the one that the file names. Raises Rejected(MISSING_FILE | FAMILY | BAD_CONFIG).
    """
    path = config / "config.json" if config.is_dir() else config
    try:
        with path.open("rb") as file:
            found = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    except OSError as error:
        raise Rejected(Reason.MISSING_FILE, error.strerror or error, "config.json of a model", str(path)) from None
    heads = found.number("num_attention_heads")
    return Shape(
        family=found.family,
        vocab_size=found.number("vocab_size"),
        hidden_size=found.number("hidden_size"),
        intermediate_size=found.number("intermediate_size"),
        num_layers=found.number("num_hidden_layers"),
        num_heads=heads,
        max_positions=found.number("max_position_embeddings", 2048),
        tied=found.tied,
        start_token=found.start_token if start_token is None else start_token,
        init_std=init_std,
        num_kv_heads=found.number("num_key_value_heads", heads),
        more=json.dumps(found.settings(), sort_keys=True),
    )


def build_model(shape: Shape, seed: int, device: str = "cpu") -> PreTrainedModel:
    """A fresh float32 model; on the device `meta` without weights. Raises Rejected(FAMILY).

    The caller's random state stays as it was.
    """
    if shape.family not in FAMILIES:
        raise Rejected(Reason.FAMILY, shape.family, ", ".join(FAMILIES), "training")
    make_config, make_model = FAMILIES[shape.family]
    fields: dict[str, Any] = json.loads(shape.more) if shape.more else {}
    fields |= {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads or shape.num_heads,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "initializer_range": shape.init_std,
        "bos_token_id": shape.start_token,
        "eos_token_id": shape.start_token,
        "pad_token_id": None,  # Phi3's default, 32000, would freeze that token's embedding
        "use_cache": False,
    }
    config = make_config(**fields, attn_implementation="sdpa", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model: PreTrainedModel = make_model(config)
    return model


def with_vocabulary(shape: Shape, size: int, start_token: int) -> Shape:
    """The same with another number of tokens."""
    return replace(shape, vocab_size=size, start_token=start_token)


def training_flops(model: PreTrainedModel, rows: Iterable[Row]) -> float:
    """Floating-point operations of forward and backward pass for these rows, without padding.

    6 for each weight of a matrix and token (2 forward, 4 backward: Kaplan et al. 2020), the head for scored places only;
    12 x layers x width of the heads for each pair of a token and one that it sees (Chowdhery et al. 2022, appendix B).
    """
    config = model.config
    layers = model.base_model.layers
    inside = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    head = config.vocab_size * config.hidden_size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    across = 12 * len(layers) * config.num_attention_heads * width
    total = 0.0
    for row in rows:
        pairs = sum(length * (length + 1) / 2 for length in (stop - start for start, stop in pairwise(row.starts)))
        total += 6.0 * inside * len(row.ids) + 6.0 * head * row.useful + across * pairs
    return total
