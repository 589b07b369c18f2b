"""Controls: 20 and more honest repositories of each family, written by save_pretrained, every one within the rules.

Their weights are drawn wide (initializer_range 0.3), so that each is a function of its own, as trained models are: two
models of transformers' default range give nearly equal losses.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import Accepted, Case, Files, as_json, changed, read_json

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
README = b"---\nlicense: mit\nlibrary_name: transformers\n---\n# A model\n"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


def saved(family: str, seed: int, *, dtype: str = "float32", shards: str | None = None, **config: Any) -> Files:
    """What save_pretrained writes for a model of random weights."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config_class = getattr(transformers, family.removesuffix("ForCausalLM") + "Config")
    model = getattr(transformers, family)(config_class(**{**SHAPE, **config})).to(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


# --- tokenizers that honest miners bring --------------------------------------------------------------------------------

CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _parts(parts: dict[str, Any]) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **empty} | parts


def _bpe(vocab: dict[str, int], merges: list[list[str]], **fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return plain | fields | {"vocab": vocab, "merges": merges}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_level(**parts: Any) -> dict[str, Any]:
    """The 256 bytes, then `th`, `the`, ` the`: ids 0 to 258. As GPT-2's, but small."""
    vocab = {character: index for index, character in enumerate(_alphabet())} | {"th": 256, "the": 257, "\u0120the": 258}
    model = _bpe(vocab, [["t", "h"], ["th", "e"], ["\u0120", "the"]])
    return _parts({"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": model} | parts)


def _cl100k_like() -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Removed", "invert": True}
    plain = BYTE_LEVEL | {"use_regex": False}
    return byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, plain]}, decoder=plain)


def _digits_apart() -> dict[str, Any]:
    digits = {"type": "Digits", "individual_digits": True}
    return byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]})


def special(token: str, id_: int, **fields: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id_, "content": token} | plain | fields


def _with_specials() -> dict[str, Any]:
    pieces = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces,
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [259], "tokens": ["<|bos|>"]}},
    }  # fmt: skip
    return byte_level(added_tokens=[special("<|bos|>", 259), special("<|endoftext|>", 260)], post_processor=template)


def _ignore_merges() -> dict[str, Any]:
    made = byte_level(post_processor=BYTE_LEVEL)
    return made | {"model": made["model"] | {"ignore_merges": True}}


def _byte_fallback() -> dict[str, Any]:
    """As Llama 2's: pieces with U+2581 for the space, bytes for what they do not cover."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "t",
        "h",
        "e",
        "th",
        "the",
        "\u2581the",
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizers = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    merges = [["t", "h"], ["th", "e"], ["\u2581", "the"]]
    model = _bpe({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    return _parts({**parts, "model": model, "added_tokens": [special("<unk>", 0), special("<s>", 1), special("</s>", 2)]})


def _unigram() -> dict[str, Any]:
    pieces = [*((character, -9.0) for character in _alphabet()), ("th", -8.0), ("the", -6.0), ("\u0120the", -5.0)]
    return byte_level(model={"type": "Unigram", "unk_id": 0, "vocab": [list(piece) for piece in pieces], "byte_fallback": False})


TOKENIZERS: dict[str, Callable[[], dict[str, Any]]] = {
    "byte-level": byte_level, "cl100k-like": _cl100k_like, "digits-apart": _digits_apart, "with-specials": _with_specials,
    "ignore-merges": _ignore_merges, "byte-fallback": _byte_fallback, "unigram": _unigram,
}  # fmt: skip


def tokenizer_files(made: dict[str, Any]) -> Files:
    """What a fast tokenizer's save_pretrained writes beside tokenizer.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": as_json(made), "tokenizer_config.json": as_json(config), "special_tokens_map.json": b"{}"}


# --- the controls -------------------------------------------------------------------------------------------------------

# name -> (what save_pretrained is told, files beside)
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {}, "grouped-heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one-key-head": {"num_key_value_heads": 1},
    "attention-bias": {"attention_bias": True}, "mlp-bias": {"mlp_bias": True},
    "all-biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True}, "wide-heads": {"head_dim": 16},
    "three-heads": {"hidden_size": 24, "num_attention_heads": 3}, "theta": {"rope_theta": 500000.0},
    "eps": {"rms_norm_eps": 1e-5}, "gelu": {"hidden_act": "gelu"}, "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "one-layer": {"num_hidden_layers": 1}, "ten-layers": {"num_hidden_layers": 10},
    "smallest-vocabulary": {"vocab_size": 259}, "large-vocabulary": {"vocab_size": 1000}, "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"}, "sharded": {"shards": "20KB"},
    "sharded-tied-bf16": {"shards": "10KB", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "long-context": {"max_position_embeddings": 131072},
    "dropout-and-ids": {"attention_dropout": 0.1, "eos_token_id": [2, 3], "bos_token_id": 5},
}  # fmt: skip
PHIS: dict[str, dict[str, Any]] = {
    "plain": {}, "grouped-heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one-key-head": {"num_key_value_heads": 1},
    "qk-layernorm": {"qk_layernorm": True}, "tied": {"tie_word_embeddings": True}, "whole-rotary": {"partial_rotary_factor": 1.0},
    "quarter-rotary": {"partial_rotary_factor": 0.25}, "theta": {"rope_theta": 50000.0}, "eps": {"layer_norm_eps": 1e-6},
    "gelu": {"hidden_act": "gelu"}, "relu": {"hidden_act": "relu"}, "one-layer": {"num_hidden_layers": 1},
    "eight-layers": {"num_hidden_layers": 8}, "large-vocabulary": {"vocab_size": 1000}, "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"}, "sharded": {"shards": "20KB"}, "sharded-bf16": {"shards": "10KB", "dtype": "bfloat16"},
    "long-context": {"max_position_embeddings": 131072},
    "dropouts": {"attention_dropout": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}, "eos-list": {"eos_token_id": [2, 3]},
}  # fmt: skip
PHI3S: dict[str, dict[str, Any]] = {
    "plain": {}, "grouped-heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one-key-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True}, "sliding-window": {"sliding_window": 8}, "wide-window": {"sliding_window": 2047},
    "half-rotary": {"partial_rotary_factor": 0.5}, "theta": {"rope_theta": 250000.0}, "eps": {"rms_norm_eps": 1e-6},
    "gelu": {"hidden_act": "gelu"}, "tanh": {"hidden_act": "gelu_pytorch_tanh"}, "one-layer": {"num_hidden_layers": 1},
    "eight-layers": {"num_hidden_layers": 8}, "large-vocabulary": {"vocab_size": 1000}, "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"}, "sharded": {"shards": "20KB"},
    "sharded-tied": {"shards": "20KB", "tie_word_embeddings": True},
    "long-context": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    "dropouts": {"attention_dropout": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", "c00", LLAMAS),
    "phi": ("PhiForCausalLM", "c01", PHIS),
    "phi3": ("Phi3ForCausalLM", "c01", PHI3S),
}


def controls() -> list[Case]:
    found = []
    for prefix, (family, competition, shapes) in FAMILIES.items():
        for number, (name, told) in enumerate(shapes.items()):
            told = {"eos_token_id": 2, **told} if family != "LlamaForCausalLM" else told
            files = saved(family, seed=1000 * len(found) + number, **told)
            if competition == "c01":  # each brings a tokenizer: all kinds in turn, the plain one first
                kinds = list(TOKENIZERS)
                files |= tokenizer_files(TOKENIZERS[kinds[number % len(kinds)]]())
            found.append(Case(f"{prefix}-{name}", "control", _told(told), files, (Accepted(),), competition, block=50))
    plain = {case.name: case.files for case in found}
    llama = [saved("LlamaForCausalLM", seed) for seed in (9001, 9002, 9003)]
    phi3 = saved("Phi3ForCausalLM", 9004, eos_token_id=2) | tokenizer_files(byte_level())
    older = changed(phi3, "config.json", torch_dtype="float32", rope_scaling=None, _name_or_path="me/mine")
    return [
        *found,
        Case("llama-with-readme", "control", "README, licence, .gitattributes", llama[0] | _beside(), (Accepted(),)),
        Case("llama-with-tokenizer", "control", "a tokenizer beside", _with_tokenizer(llama[1]), (Accepted(),)),
        Case("llama-old-config", "control", "config.json of transformers 4.40", _old_config(llama[2]), (Accepted(),)),
        Case("phi3-old-config", "control", "rope_scaling null, a name, torch_dtype", older, (Accepted(),), "c01"),
        Case("phi-uniform", "control", "predicts all tokens alike", uniform(plain["phi-plain"]), (Accepted(),), "c01"),
    ]


def uniform(files: Files) -> Files:
    """A Phi whose output layer is zero: every token costs exactly ln(vocabulary)."""
    from .case import with_tensors

    def zero(tensors: Any) -> None:
        for name in ("lm_head.weight", "lm_head.bias"):
            dtype, shape, data = tensors[name]
            tensors[name] = (dtype, shape, bytes(len(data)))

    return with_tensors(files, zero)


def _told(told: dict[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in told.items()) or "as the library makes it"


def _beside() -> Files:
    return {"README.md": README, "LICENSE": b"MIT\n", ".gitattributes": ATTRIBUTES}


def _with_tokenizer(files: Files) -> Files:
    vocabulary = byte_level()["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in vocabulary["merges"])
    return files | tokenizer_files(byte_level()) | {"vocab.json": as_json(vocabulary["vocab"]), "merges.txt": merges.encode()}


def _old_config(files: Files) -> Files:
    raw = read_json(files, "config.json")
    raw.pop("dtype", None)
    raw.pop("rope_parameters", None)
    old = {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "rope_theta": 10000.0, "rope_scaling": None, "pretraining_tp": 1,
        "torch_dtype": "float32", "transformers_version": "4.40.0", "use_cache": True,
    }  # fmt: skip
    return files | {"config.json": as_json(raw | old)}
