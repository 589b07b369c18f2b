from __future__ import annotations

import json
from typing import Any

import pytest

from sn29.errors import Reason, Rejected
from sn29.models.config import MAX_CONFIG_BYTES, expected_tensors, parse_config, read_config, strict_json

PLAIN: dict[str, dict[str, Any]] = {
    family: {
        "architectures": [family], "model_type": kind, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }
    for family, kind in (("LlamaForCausalLM", "llama"), ("PhiForCausalLM", "phi"), ("Phi3ForCausalLM", "phi3"))
}  # fmt: skip
LLAMA, PHI, PHI3 = PLAIN


def text(family: str = LLAMA, **changes: Any) -> bytes:
    return json.dumps({**PLAIN[family], **changes}).encode()


def refusals(data: bytes) -> list[str]:
    return [str(refusal) for refusal in read_config(data)[1]]


# One key each that some class of transformers 5 obeys and that changes the loss, or costs, or fetches, or runs something.
TOO_MUCH: dict[str, Any] = {
    "_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel", "attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel", "adapter_config": {}, "attn_logit_softcapping": 50.0, "auto_map": {"A": "x.Y"},
    "cross_attention_hidden_size": 8, "custom_pipelines": {}, "final_logit_softcapping": 30.0, "id2label": {"0": "a"},
    "is_causal": False, "is_decoder": True, "is_encoder_decoder": True, "layer_types": ["full_attention"] * 2,
    "num_labels": 10**7, "output_attentions": True, "peft_config": {}, "pretraining_tp": 2, "problem_type": "regression",
    "pruned_heads": {"0": [1]}, "quantization_config": {"quant_method": "bitsandbytes"}, "return_dict": False,
    "sliding_window_pattern": 2, "text_config": {"trust_remote_code": True}, "tokenizer_class": "Evil", "torchscript": True,
    "transformers_weights": "../other/model.safetensors", "trust_remote_code": True, "use_bidirectional_attention": True,
    "chunk_size_feed_forward": 1, "vision_config": {},
}  # fmt: skip


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("key", TOO_MUCH)
def test_a_key_that_could_change_what_is_computed_is_refused_in_every_family(family, key):
    config, (refusal,) = read_config(text(family, **{key: TOO_MUCH[key]}))
    assert refusal.reason is Reason.BAD_CONFIG
    assert key in str(refusal)
    assert config is not None, "its numbers are right, so its tensors can be compared all the same"
    assert key not in config.settings()


def test_what_older_versions_wrote_is_allowed_at_the_value_that_changes_nothing():
    plain = parse_config(text(PHI3))
    older = parse_config(
        text(
            PHI3, pretraining_tp=1, is_causal=True, return_dict=True, attention_bias=False, rope_scaling=None, use_cache=True,
            attention_dropout=0.3, resid_pdrop=0.1, embd_pdrop=0.1, torch_dtype="float64", tie_word_embeddings=None,
        )
    )  # fmt: skip
    assert older.settings() == plain.settings()
    for key, value in (("pretraining_tp", True), ("is_causal", 1), ("attention_bias", True), ("chunk_size_feed_forward", False)):
        assert len(refusals(text(PHI3, **{key: value}))) == 1, key


def test_the_config_of_a_published_model_is_allowed():
    """SmolLM2-135M's has five keys more (huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json)."""
    more = {
        "_name_or_path": "x", "_model_name_or_path": "x", "is_llama_config": True, "unk_token_id": 0, "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    }  # fmt: skip
    assert parse_config(text(LLAMA, **more)) == parse_config(text(LLAMA))
    with pytest.raises(Rejected, match="rope_interleaved"):
        parse_config(text(LLAMA, rope_interleaved=True))


def test_every_key_that_is_wrong_is_told():
    found = refusals(text(is_causal=False, num_hidden_layers=10**7, rope_scaling={"rope_type": "yarn"}, bos_token_id=300))
    assert [next(k for k in ("yarn", "is_causal", "num_hidden_layers") if k in line) for line in found] == [
        "yarn", "is_causal", "num_hidden_layers",
    ]  # fmt: skip
    assert len(refusals(text(**{f"key{i}": i for i in range(5000)}))) <= 20
    assert len(refusals(text(model_type="phi", bos_token_id=300, num_key_value_heads=3))) == 3


@pytest.mark.parametrize("value", [0, -1, 10**7, 2**70, 1.0, True, "8", [], {}, [8]])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim",
    ],
)  # fmt: skip
def test_a_number_that_is_none_or_out_of_bounds_is_refused_before_anything_is_built_from_it(key, value):
    config, (refusal, *_) = read_config(text(**{key: value}))
    assert refusal.reason is Reason.BAD_CONFIG
    assert key in str(refusal)
    assert config is None or key not in config.values


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        (LLAMA, {"hidden_size": 36, "num_attention_heads": 12}, "3 of 3 dimensions"),
        (LLAMA, {"hidden_size": 34, "head_dim": 8}, "divisible by heads"),
        (LLAMA, {"head_dim": 5}, "5 of 5 dimensions"),
        (PHI, {"partial_rotary_factor": 0.4}, "3 of 8 dimensions"),
        (PHI, {"partial_rotary_factor": 0.01}, "0 of 8 dimensions"),
        (PHI3, {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.9}}, "7 of 8 dimensions"),
        (PHI3, {"num_key_value_heads": 3}, "groups"),
        (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e4}}, "one value"),
        (LLAMA, {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default"}}, "one object"),
        (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (PHI3, {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"rope_theta": 0.5}, "rope_theta"),
        (LLAMA, {"sliding_window": 8}, "sliding_window"),
        (PHI, {"head_dim": 8}, "head_dim"),
        (LLAMA, {"hidden_act": ["silu"]}, "hidden_act"),
        (LLAMA, {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        (LLAMA, {"eos_token_id": [10**9]}, "eos_token_id"),
    ],
)
def test_what_the_class_cannot_compute_or_two_readers_would_read_differently_is_refused(family, changes, named):
    (refusal,) = read_config(text(family, **changes))[1]
    assert refusal.reason is Reason.BAD_CONFIG
    assert named in str(refusal)


@pytest.mark.parametrize(
    "data",
    [
        b"[]", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", b'{"a":' * 5000, b'"x"', b'{"a": 1e999}', b'{"a": -Infinity}',
        b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"[" * 9 + b"]" * 9 + b"}", b"", b"\xef\xbb\xbf{}", b"{} {}", b"{'a': 1}",
    ],
)  # fmt: skip
def test_what_is_no_plain_json_object_is_refused(data):
    with pytest.raises(Rejected) as refused:
        parse_config(data)
    assert refused.value.reason is Reason.BAD_CONFIG


def test_brackets_in_strings_are_no_depth_and_a_long_file_is_not_parsed():
    assert strict_json(b'{"a\\"[[[[[[[[[[": "{{{{{{{{{{{"}', Reason.BAD_CONFIG, "x") == {'a"[[[[[[[[[[': "{{{{{{{{{{{"}
    (refusal,) = refusals(b" " * (MAX_CONFIG_BYTES + 1))
    assert str(MAX_CONFIG_BYTES) in refusal


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM", "PhiForCausalLM"], "LlamaForCausalLM", [["x"]], [None]])
def test_a_class_that_is_not_plainly_one_of_ours_is_another_family(architectures):
    _, (refusal,) = read_config(text(architectures=architectures))
    assert refusal.reason is Reason.FAMILY


def test_the_largest_model_of_these_bounds_is_listed_at_once():
    config = parse_config(text(PHI, num_hidden_layers=128, hidden_size=4096, num_attention_heads=32, qk_layernorm=True))
    assert len(expected_tensors(config)) == 128 * 18 + 5


def test_attention_is_bounded_over_all_layers():
    """No parameter limit sees it: each head compares every token with every other one."""
    shape = {"num_hidden_layers": 128, "hidden_size": 512, "num_attention_heads": 256}
    (refusal,) = refusals(text(**shape))
    assert "32768 attention heads in 128 layers" in refusal
    assert "at most 4096" in refusal
    (refusal,) = refusals(text(num_hidden_layers=64, num_attention_heads=16, head_dim=1024))
    assert "1048576 dimensions of attention heads in 64 layers" in refusal
    for layers, hidden, heads in (
        (30, 4096, 32),
        (32, 4096, 32),
        (40, 5120, 40),
        (80, 2560, 40),
        (128, 512, 32),
        (16, 4096, 256),
    ):
        assert refusals(text(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads)) == [], (layers, heads)


def test_minus_zero_is_no_whole_number():
    """safetensors reads it as a fraction; nobody writes it who does not look for a difference between readers."""
    for data in (b'{"a": -0}', b'{"a": [0, -0]}'):
        with pytest.raises(Rejected) as refused:
            strict_json(data, Reason.TENSORS, "x")
        assert "-0" in str(refused.value)
    assert strict_json(b'{"a": [0, -1, -10, -0.5]}', Reason.TENSORS, "x") == {"a": [0, -1, -10, -0.5]}
