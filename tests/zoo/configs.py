"""Hostile config.json: code and kernels by name (B1-B3), bombs (B6), keys that change the computation (A11, B16)."""

from __future__ import annotations

from typing import Any

from .case import Case, Expected, Files, Tensors, Twin, as_json, changed, content_of, read_json, refused, with_tensors, without

BAD = (refused("bad_config"),)


def cases(base: dict[str, Files]) -> list[Case]:
    """`base`: name of a control -> its files; changed copies of three of them."""
    return [*_one_key(base), *_shapes(base), *_texts(base["llama-plain"]), *_families(base)]


# name, row, what is put in, what must come out
_LLAMA: list[tuple[str, str, dict[str, Any], tuple[Expected, ...]]] = [
    ("auto-map", "B1", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}}, BAD),
    ("auto-map-elsewhere", "B1", {"auto_map": {"AutoModelForCausalLM": "evil/code--modeling.Evil"}}, BAD),
    ("trust-remote-code", "B1", {"trust_remote_code": True}, BAD),
    ("custom-pipelines", "B1", {"custom_pipelines": {"text-generation": {"impl": "evil.Pipe"}}}, BAD),
    ("custom-generate", "B1", {"custom_generate": "evil/generate"}, BAD),
    ("kernel-internal", "B2", {"_attn_implementation_internal": "evil/kernel"}, BAD),
    ("kernel-public", "B2", {"attn_implementation": "evil/kernel:main"}, BAD),
    ("kernel-private", "B2", {"_attn_implementation": "evil/kernel"}, BAD),
    ("kernel-auto", "B2", {"_attn_implementation_autoset": True}, BAD),
    ("kernel-flash", "B2", {"attn_implementation": "paged|flash_attention_2"}, BAD),
    ("kernel-experts", "B2", {"_experts_implementation": "evil/kernel"}, BAD),
    ("kernel-config", "B2", {"kernel_config": {"RMSNorm": "evil/kernel:Norm"}}, BAD),
    ("kernel-use", "B2", {"use_kernels": True}, BAD),
    ("nested-config", "B3", {"text_config": {"model_type": "lightglue", "trust_remote_code": True}}, BAD),
    ("nested-detector", "B3", {"keypoint_detector_config": {"trust_remote_code": True, "_name_or_path": "evil/x"}}, BAD),
    ("commit-hash", "B3", {"_commit_hash": "0" * 40}, BAD),
    ("quantized", "B7", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, BAD),
    ("quantized-empty", "B7", {"quantization_config": {}}, BAD),
    ("compression", "B7", {"compression_config": {"format": "pack-quantized"}}, BAD),
    ("third-weights", "B13", {"transformers_weights": "../llama-tied/model.safetensors"}, BAD),
    ("not-causal", "A11", {"is_causal": False}, BAD),
    ("not-causal-null", "A11", {"is_causal": None}, (*BAD, Twin("llama-plain"))),
    ("bidirectional", "A11", {"use_bidirectional_attention": True}, BAD),
    ("decoder", "A11", {"is_decoder": False}, (*BAD, Twin("llama-plain"))),
    ("encoder-decoder", "A11", {"is_encoder_decoder": True}, BAD),
    ("cross-attention", "A11", {"add_cross_attention": True}, BAD),
    ("prefix", "A11", {"prefix_allowed_tokens_fn": "x"}, BAD),
    ("layer-types", "A11", {"layer_types": ["full_attention", "chunked_attention"]}, BAD),
    ("window-in-llama", "A11", {"sliding_window": 4, "use_sliding_window": True}, BAD),
    ("chunked-attention", "A11", {"attention_chunk_size": 4}, BAD),
    ("num-labels", "B6", {"num_labels": 10_000_000}, BAD),
    ("id2label", "B6", {"id2label": {str(i): "x" for i in range(2000)}}, BAD),
    ("pruned-heads", "B6", {"pruned_heads": {"0": [0, 1]}}, BAD),
    ("layers-1e7", "B6", {"num_hidden_layers": 10_000_000}, BAD),
    ("layers-16000", "B6", {"num_hidden_layers": 16_000}, BAD),
    ("layers-500", "B6", {"num_hidden_layers": 500}, (refused("bad_config", "parameters"),)),
    ("layers-0", "B6", {"num_hidden_layers": 0}, BAD),
    ("layers-negative", "B6", {"num_hidden_layers": -1}, BAD),
    ("layers-true", "B6", {"num_hidden_layers": True}, BAD),
    ("layers-float", "B6", {"num_hidden_layers": 2.0}, BAD),
    ("layers-text", "B6", {"num_hidden_layers": "2"}, BAD),
    ("layers-list", "B6", {"num_hidden_layers": [2]}, BAD),
    ("vocabulary-1e7", "B6", {"vocab_size": 10_000_000}, BAD),
    ("vocabulary-1e6", "B10", {"vocab_size": 1_000_000}, (refused("bad_config", "parameters"),)),
    ("vocabulary-0", "B6", {"vocab_size": 0}, BAD),
    ("hidden-1e9", "B6", {"hidden_size": 10**9}, BAD),
    ("hidden-30000", "B6", {"hidden_size": 30_000}, (refused("bad_config", "parameters"),)),
    ("inner-1e12", "B6", {"intermediate_size": 10**12}, BAD),
    ("inner-inf", "B6", {"intermediate_size": 1e308 * 10}, BAD),
    ("positions-1e9", "B6", {"max_position_embeddings": 10**9}, BAD),
    ("heads-0", "B6", {"num_attention_heads": 0}, BAD),
    ("heads-odd", "B6", {"num_attention_heads": 5}, BAD),
    ("heads-17", "B6", {"num_key_value_heads": 17}, BAD),
    ("heads-groups", "B6", {"num_attention_heads": 4, "num_key_value_heads": 3}, BAD),
    ("head-width-0", "B6", {"head_dim": 0}, BAD),
    ("head-width-odd", "B6", {"head_dim": 7}, (refused("bad_config", "tensors"),)),
    ("heads-in-all", "B6", {"num_hidden_layers": 128, "num_attention_heads": 256, "hidden_size": 512}, BAD),
    ("heads-wide-in-all", "B6", {"num_hidden_layers": 64, "num_attention_heads": 16, "head_dim": 1024}, BAD),
    ("eps-0", "B16", {"rms_norm_eps": 0.0}, BAD),
    ("eps-negative", "B16", {"rms_norm_eps": -1e-5}, BAD),
    ("eps-large", "B16", {"rms_norm_eps": 1e30}, BAD),
    ("theta-0", "B16", {"rope_theta": 0}, BAD),
    ("theta-negative", "B16", {"rope_theta": -10000.0}, BAD),
    ("rope-yarn", "B16", {"rope_scaling": {"rope_type": "yarn", "factor": 1e30}}, BAD),
    ("rope-yarn-5", "B16", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0}}, BAD),
    ("rope-dynamic", "B16", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, BAD),
    ("rope-longrope", "B16",
     {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}}, BAD),
    ("rope-llama3", "B16", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, BAD),
    ("rope-list", "B16", {"rope_parameters": [10000.0]}, BAD),
    ("rope-nested", "B16", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, BAD),
    ("rope-theta-nan-text", "B16", {"rope_parameters": {"rope_type": "default", "rope_theta": "NaN"}}, BAD),
    ("rope-partial", "B16", {"partial_rotary_factor": 0.5}, BAD),
    ("return-dict", "B16", {"return_dict": False}, BAD),
    ("hidden-states", "B16", {"output_hidden_states": True, "output_attentions": True}, BAD),
    ("torchscript", "B16", {"torchscript": True}, BAD),
    ("chunked-mlp", "B16", {"chunk_size_feed_forward": 1}, BAD),
    ("softcap", "B16", {"final_logit_softcapping": 30.0}, BAD),
    ("attention-softcap", "B16", {"attn_logit_softcapping": 50.0}, BAD),
    ("logit-scale", "B16", {"logits_scaling": 1e-3}, BAD),
    ("embedding-scale", "B16", {"embedding_multiplier": 12.0}, BAD),
    ("tensor-parallel", "B16", {"pretraining_tp": 2}, BAD),
    ("tp-plan", "B16", {"base_model_tp_plan": {"layers.*": "colwise"}}, BAD),
    ("activation-unknown", "B16", {"hidden_act": "quick_gelu2"}, BAD),
    ("activation-list", "B16", {"hidden_act": ["silu"]}, BAD),
    ("activation-object", "B16", {"hidden_act": {"silu": 1}}, BAD),
    ("tied-text", "B16", {"tie_word_embeddings": "true"}, BAD),
    ("bias-number", "B16", {"attention_bias": 1}, BAD),
    ("start-huge", "B14", {"bos_token_id": 10**9}, BAD),
    ("start-negative", "B14", {"bos_token_id": -1}, BAD),
    ("start-true", "B14", {"bos_token_id": True}, BAD),
    ("start-text", "B14", {"bos_token_id": "0"}, BAD),
    ("start-nested", "B14", {"bos_token_id": [[1]]}, BAD),
    ("start-long-list", "B14", {"bos_token_id": [1, *range(5000)]}, (*BAD, Twin("llama-plain"))),
    ("unknown-key", "B16", {"a_key_of_tomorrow": 1}, BAD),
    ("dunder-key", "B16", {"__class__": "os.system"}, BAD),
    ("long-key", "B6", {"k" * 10_000: 1}, BAD),
    ("terminal-codes", "B12", {"\x1b]0;owned\x07\n\x1b[2J": "\x1b[31m"}, BAD),
    # Nothing reads these, so whatever stands there changes nothing.
    ("dtype-float64", "B16", {"dtype": "float64"}, (*BAD, Twin("llama-plain"))),
    ("dtype-nonsense", "B16", {"torch_dtype": "os.system('x')"}, (*BAD, Twin("llama-plain"))),
    ("initializer", "B16", {"initializer_range": "wide"}, (*BAD, Twin("llama-plain"))),
    ("dropout-whole", "B16", {"attention_dropout": 1.0}, (*BAD, Twin("llama-plain"))),
    ("cache-text", "B16", {"use_cache": "always"}, (*BAD, Twin("llama-plain"))),
    ("version-nonsense", "B16", {"transformers_version": "99.0; import os"}, (*BAD, Twin("llama-plain"))),
    ("name-or-path", "B5", {"_name_or_path": "../llama-tied"}, (*BAD, Twin("llama-plain"))),
]  # fmt: skip
_PHI: list[tuple[str, str, str, dict[str, Any], tuple[Expected, ...]]] = [
    ("phi", "phi-not-causal", "A11", {"is_causal": False}, BAD),
    ("phi", "phi-rotary-0", "B16", {"partial_rotary_factor": 0.0}, BAD),
    ("phi", "phi-rotary-2", "B16", {"partial_rotary_factor": 2.0}, BAD),
    ("phi", "phi-eps-large", "B16", {"layer_norm_eps": 10.0}, BAD),
    ("phi", "phi-window", "A11", {"sliding_window": 4}, BAD),
    ("phi3", "phi3-not-causal", "A11", {"is_causal": False}, BAD),
    ("phi3", "phi3-window-0", "A11", {"sliding_window": 0}, BAD),
    ("phi3", "phi3-window-negative", "A11", {"sliding_window": -8}, BAD),
    ("phi3", "phi3-layer-types", "A11", {"layer_types": ["full_attention", "sliding_attention"]}, BAD),
    ("phi3", "phi3-original-0", "B16", {"original_max_position_embeddings": 0}, BAD),
    ("phi3", "phi3-head-width", "B16", {"head_dim": 16}, BAD),
    ("phi3", "phi3-longrope", "B16",
     {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}}, BAD),
]  # fmt: skip


def _one_key(base: dict[str, Files]) -> list[Case]:
    llama = base["llama-plain"]
    found = [
        Case(f"config-{name}", row, f"config.json: {str(put)[:80]}", changed(llama, "config.json", **put), expected)
        for name, row, put, expected in _LLAMA
    ]
    for family, name, row, put, expected in _PHI:
        files = changed(base[f"{family}-plain"], "config.json", **put)
        found.append(Case(f"config-{name}", row, f"config.json: {str(put)[:80]}", files, expected, "c01"))
    return found


def _shapes(base: dict[str, Files]) -> list[Case]:
    """Numbers that are legal by themselves and that the tensors do not have."""
    llama = base["llama-plain"]
    table: list[tuple[str, str, dict[str, Any], str]] = [
        ("config-fewer-layers", "B8", {"num_hidden_layers": 1}, "tensors"),
        ("config-more-layers", "B8", {"num_hidden_layers": 3}, "tensors"),
        ("config-wider", "B8", {"intermediate_size": 33}, "tensors"),
        ("config-biased", "B8", {"attention_bias": True}, "tensors"),
        ("config-tied-with-head", "B7", {"tie_word_embeddings": True}, "tensors"),
        ("config-more-rows", "B8", {"vocab_size": 301}, "tensors"),
        ("config-over-the-limit", "B7", {"intermediate_size": 100_000}, "parameters"),
        ("config-vocabulary-below-ids", "B14", {"vocab_size": 200}, "vocabulary"),
    ]
    found = [
        Case(name, row, f"config.json: {put}", changed(llama, "config.json", **put), (refused(code),))
        for name, row, put, code in table
    ]
    # Three heads of 16 that a hidden size of 16 is no multiple of: the tensors fit, but transformers refuses to build it.
    three = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    found.append(Case("config-heads-no-multiple", "B6", f"config.json: {three}", _three_heads(llama, three), BAD))
    untied = changed(base["llama-tied"], "config.json", tie_word_embeddings=False)
    found.append(Case("config-untied-without-head", "B7", "no lm_head, not tied", untied, (refused("tensors"),)))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "model_type"):
        files = without(llama, "config.json", key)
        found.append(Case(f"config-without-{key.replace('_', '-')}", "B6", f"no {key}", files, BAD))
    return found


def _three_heads(llama: Files, numbers: dict[str, int]) -> Files:
    """With the tensors that these numbers imply."""

    def widen(tensors: Tensors) -> None:
        for layer in range(2):
            for part in "qkvo":
                shape = (16, 48) if part == "o" else (48, 16)
                tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = ("F32", shape, bytes(4 * 48 * 16))

    return with_tensors(changed(llama, "config.json", **numbers), widen)


def _texts(llama: Files) -> list[Case]:
    """config.json as bytes that are no plain JSON object, or one that two readers read differently."""
    plain = content_of(llama["config.json"]).strip()
    inner = plain[1:-1]
    table: list[tuple[str, str, bytes]] = [
        ("key-twice", "a key twice, the second one hostile", b"{" + inner + b', "vocab_size": 300, "vocab_size": 301}'),
        ("key-twice-escaped", "a key twice, once with an escape", b"{" + inner + b', "hidden_si\\u007ae": 16}'),
        ("nan", "NaN as a number", b"{" + inner + b', "rope_theta": NaN}'),
        ("infinity", "Infinity as a number", b"{" + inner + b', "rope_theta": Infinity}'),
        ("overflow", "1e400", b"{" + inner + b', "rope_theta": 1e400}'),
        ("digits", "a number of 10,000 digits", b"{" + inner + b', "rope_theta": ' + b"9" * 10_000 + b"}"),
        ("deep", "30,000 lists in each other", b"{" + inner + b', "rope_theta": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
        ("deep-unread", "30,000 objects below a key that nobody reads",
         b"{" + inner + b', "initializer_range": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}"),
        ("comment", "a comment", b"// config\n" + plain),
        ("trailing", "two objects", plain + plain),
        ("quotes", "a text that does not end, of 32,000 quotes", b'{"a":"' + b'\\"' * 32_000),
        ("mark", "a byte order mark", b"\xef\xbb\xbf" + plain),
        ("utf16", "UTF-16", plain.decode().encode("utf-16")),
        ("latin1", "bytes that are no UTF-8", plain + b"\xff\xfe"),
        ("surrogate", "half a character", b"{" + inner + b', "hidden_act": "\\ud800"}'),
        ("nul", "zero bytes behind", plain + b"\0" * 100),
        ("empty", "no byte", b""),
        ("list", "a list", b"[" + plain + b"]"),
        ("null", "null", b"null"),
        ("one-megabyte", "1 MB of spaces behind", plain + b" " * 1_000_000),
        ("python", "a Python program", b"import os\nos.system('true')\n"),
    ]  # fmt: skip
    return [Case(f"config-{name}", "B6", f"config.json: {why}", llama | {"config.json": text}, BAD) for name, why, text in table]


def _families(base: dict[str, Files]) -> list[Case]:
    llama, phi = base["llama-plain"], base["phi-plain"]
    family = (refused("family"),)
    either = (refused("family", "bad_config"),)
    table: list[tuple[str, Any, Any, tuple[Expected, ...]]] = [
        ("mistral", ["MistralForCausalLM"], "mistral", family),
        ("bert", ["BertLMHeadModel"], "bert", family),
        ("lightglue", ["LightGlueForKeypointMatching"], "lightglue", family),
        ("classifier", ["LlamaForSequenceClassification"], "llama", family),
        ("headless", ["LlamaModel"], "llama", family),
        ("remote", ["EvilForCausalLM"], "llama", family),
        ("two", ["LlamaForCausalLM", "PhiForCausalLM"], "llama", family),
        ("none", [], "llama", family),
        ("null", None, "llama", family),
        ("text", "LlamaForCausalLM", "llama", family),
        ("number", [7], "llama", family),
        ("nested", [["LlamaForCausalLM"]], "llama", family),
        ("other-type", ["LlamaForCausalLM"], "gpt2", either),
        ("type-list", ["LlamaForCausalLM"], ["llama"], either),
        ("type-case", ["LlamaForCausalLM"], "Llama", either),
        ("type-remote", ["LlamaForCausalLM"], "evil", either),
    ]
    found = [
        Case(f"family-{name}", "B3", f"architectures {architectures}, model_type {kind}",
             changed(llama, "config.json", architectures=architectures, model_type=kind), expected)
        for name, architectures, kind, expected in table
    ]  # fmt: skip
    phi3_named_phi = changed(base["phi3-plain"], "config.json", architectures=["PhiForCausalLM"], model_type="phi")
    llama_as_phi3 = base["phi3-plain"] | {"config.json": as_json(read_json(phi, "config.json") | {"model_type": "phi3"})}
    return [
        *found,
        Case("family-phi-in-c00", "B3", "a Phi where Llamas compete", phi, (refused("family"),), "c00"),
        Case("family-llama-in-c01", "B3", "a Llama where Phis compete", llama, (refused("family"),), "c01"),
        Case("family-phi3-named-phi", "B3", "the tensors of a Phi3 under a Phi's name", phi3_named_phi,
             (refused("bad_config", "tensors"),), "c01"),
        Case("family-phi-typed-phi3", "B3", "class Phi, type phi3", llama_as_phi3, either, "c01"),
    ]  # fmt: skip
