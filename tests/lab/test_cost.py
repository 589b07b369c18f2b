"""What a config costs: against transformers' own models, torch's count of operations, and what autograd really saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sn29.errors import Reason, Rejected
from sn29.lab.cost import built, config_for, config_of, costs_of
from sn29.training.objective import _ATTENTION

TOKENS = 96
COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
OLD = {"vocab_size": 512, "n_layer": 3, "n_head": 4}
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": (COMMON, "rotary", "SwiGLU"),
    "phi": (COMMON, "rotary", "GELU"),
    "phi3": (COMMON, "rotary", "SwiGLU"),
    "mistral": (COMMON, "rotary", "SwiGLU"),
    "qwen2": (COMMON, "rotary", "SwiGLU"),
    "qwen3": (COMMON | {"head_dim": 32}, "rotary", "SwiGLU"),
    "gemma": (COMMON | {"head_dim": 16}, "rotary", "GeGLU"),
    "olmo2": (COMMON, "rotary", "SwiGLU"),
    "gpt_neox": (COMMON, "rotary", "GELU"),
    "stablelm": (COMMON, "rotary", "SwiGLU"),
    "smollm3": (COMMON | {"no_rope_layers": [1, 1, 0]}, "rotary, none in 1 of 3 layers", "SwiGLU"),
    "nanochat": (COMMON, "rotary", "ReLU squared"),
    "gpt2": (OLD | {"n_embd": 64, "n_positions": 512}, "learned", "GELU"),
    "opt": (COMMON | {"ffn_dim": 256, "word_embed_proj_dim": 32}, "learned", "ReLU"),
    "bloom": (OLD | {"hidden_size": 64}, "ALiBi", "GELU"),
    "mpt": ({"vocab_size": 512, "d_model": 64, "n_layers": 3, "n_heads": 4}, "ALiBi", "GELU"),
    "falcon": (COMMON | {"alibi": True}, "ALiBi", "GELU"),
}


def raw(family: str) -> dict[str, Any]:
    return {"model_type": family, **FAMILIES[family][0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_exact_and_operations_are_those_that_torch_counts(family: str) -> None:
    config = config_of(raw(family))
    costs = costs_of(config, "float32")
    config._attn_implementation = "eager"  # whose products torch counts as what they are
    model = built(config, "cpu")
    assert costs.parameters.total == model.num_parameters() == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, TOKENS, dtype=torch.long), use_cache=False).logits.sum().backward()
    assert 2 * TOKENS * costs.operations(TOKENS).total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (costs.positions, costs.activation, costs.layers) == (FAMILIES[family][1], FAMILIES[family][2], 3)


def test_parts_of_a_llama() -> None:
    costs = costs_of(config_of(raw("llama")))
    p = costs.parameters
    assert (p.embedding, p.head, p.other) == (512 * 64, 512 * 64, 0)
    assert (p.attention, p.mlp, p.norms) == (3 * (64 * 64 + 64 * 64 + 2 * 64 * 32), 3 * 3 * 64 * 176, 7 * 64)
    o = costs.operations(100)
    assert (o.scores, o.projections, o.mlp, o.head) == (12 * 3 * 64 * 100, 6 * p.attention, 6 * p.mlp, 6 * p.head)
    assert o.share == o.scores / (o.scores + 6 * (p.attention + p.mlp + p.head))
    tied = costs_of(config_of(raw("llama") | {"tie_word_embeddings": True}))
    assert tied.is_tied
    assert tied.parameters.head == 0
    assert tied.operations(100) == o
    assert {name.split(".")[0] for name in costs.shapes} == {"embed_tokens", "lm_head", "model"}
    assert {name.split(".")[0] for name in tied.shapes} == {"embed_tokens", "model"}


def test_a_window_sees_as_many_pairs_as_it_does() -> None:
    """Twice the pairs of a token and one that it sees, as everywhere here: the full square of a causal triangle."""
    costs = costs_of(config_of(raw("phi3") | {"sliding_window": 64}))
    assert costs.windows == (64, 64, 64)
    for tokens in (32, 64, 500):
        pairs = sum(min(place + 1, 64) for place in range(tokens))
        assert costs.operations(tokens).scores == pytest.approx(12 * 64 * 3 * 2 * pairs / tokens, rel=0.04)
    mixed = costs_of(config_of({"model_type": "gemma2", **COMMON, "head_dim": 16, "sliding_window": 64}))
    assert mixed.windows == (64, 0, 64)


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_kept_bytes_are_those_that_autograd_saves(family: str, dtype: str) -> None:
    config = config_of(raw(family))
    costs = costs_of(config, dtype)
    model = built(config, "cpu", torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    model.set_attn_implementation(_ATTENTION)
    one, two = (saved(model, rows, dtype) for rows in (1, 2))
    assert costs.kept.of(TOKENS) == pytest.approx(two - one, rel=0.01)
    assert costs.kept.of(TOKENS) / 3.5 < costs.kept_layer.of(TOKENS) < costs.kept.of(TOKENS) / 2.9


def saved(model: Any, rows: int, dtype: str) -> int:
    """Bytes of the tensors that a real forward pass keeps, the weights' own aside."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids, places = torch.zeros(rows, TOKENS, dtype=torch.long), torch.arange(TOKENS).expand(rows, TOKENS)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"),
    ):
        found = model.base_model(input_ids=ids, position_ids=places, use_cache=False)
    assert found is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_attention_that_keeps_its_square_is_seen() -> None:
    assert costs_of(config_of(raw("llama"))).kept.square == pytest.approx(0, abs=1e-9)
    assert costs_of(config_of(raw("bloom")), "float32").kept.square >= 3 * 4 * 4, "at least the probabilities, in float32"


def test_the_seeds_claim_of_embedding_and_head() -> None:
    costs = costs_of(config_of(config_for(6.9e9)))
    p = costs.parameters
    assert (p.total, p.embedding + p.head) == (6_893_064_192, 821_559_296)
    assert (p.embedding + p.head) / p.total == pytest.approx(0.119, abs=0.0005)
    assert (costs.layers, costs.hidden) == (30, 4096)


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("parameters", [3e8, 7e9])
def test_a_size_is_within_2_percent(family: str, parameters: float) -> None:
    costs = costs_of(config_of(config_for(parameters, family=family)))
    assert costs.parameters.total == pytest.approx(parameters, rel=0.02)
    assert costs.family.lower().startswith(family + "for")


@pytest.mark.parametrize("parameters", [1e9, 7e9, 7e10, 1e13])
def test_a_size_has_a_usual_shape(parameters: float) -> None:
    raw = config_for(parameters)
    assert 60 <= raw["hidden_size"] / raw["num_hidden_layers"] <= 160


@pytest.mark.parametrize("parameters", [0.0, 999_999.0, 1e14, 1e30, float("inf"), float("nan")])
def test_a_size_that_is_none_is_refused(parameters: float) -> None:
    with pytest.raises(Rejected, match="1,000,000 to 10,000,000,000,000") as caught:
        config_for(parameters)
    assert caught.value.reason is Reason.SETTING


def test_a_size_that_no_config_has_is_refused() -> None:
    with pytest.raises(Rejected, match="1,000,000 parameters") as caught:
        config_for(1e6)
    assert caught.value.reason is Reason.SETTING
    with pytest.raises(Rejected, match="mixtral"):
        config_for(1e9, family="mixtral")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "nobodys"}, "model_type nobodys"),
        ({}, "model_type None"),
        ({"model_type": "t5"}, "a causal language model"),
        ({"model_type": "llama", **COMMON, "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", **COMMON, "num_attention_heads": 5, "num_key_value_heads": 5}, "multiple"),
        ({"model_type": "mixtral", **COMMON, "num_local_experts": 4}, "experts"),
        ({"model_type": "mamba", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}, "Mamba"),
    ],
    ids=["unknown", "none", "t5", "text for a number", "heads", "experts", "state space"],
)
def test_what_cannot_be_planned_is_refused(config: dict[str, Any], what: str) -> None:
    with pytest.raises(Rejected, match=what) as caught:
        costs_of(config_of(config))
    assert caught.value.reason is Reason.BAD_CONFIG


@pytest.mark.parametrize("number", [0, -1, 10**12])
@pytest.mark.parametrize(
    "name",
    ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"],
)
def test_a_number_that_no_model_has_is_refused_before_anything_is_built(name: str, number: int) -> None:
    for config, field in ((raw("llama") | {name: number}, name), (raw("gpt2") | {"n_layer": number}, "n_layer")):
        with pytest.raises(Rejected, match=f"{field} {number}") as caught:
            config_of(config)
        assert caught.value.reason is Reason.BAD_CONFIG


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(Rejected, match="num_key_value_heads 3 of num_attention_heads 4"):
        config_of(raw("llama") | {"num_key_value_heads": 3})


def test_places_are_those_that_positions_are_made_for() -> None:
    assert {family: costs_of(config_of(raw(family))).places for family in ("llama", "gpt2", "bloom")} == {
        "llama": 512, "gpt2": 512, "bloom": 0,
    }  # fmt: skip


def test_code_of_a_repository_is_never_asked_for() -> None:
    config = config_of(raw("llama") | {"auto_map": {"AutoConfig": "strange.Config"}, "pad_token_id": 32_000})
    assert costs_of(config).family == "LlamaForCausalLM"
