"""Copies (A1-A5, A8, A13, A15): the same model under another hotkey, as it is, salted, re-packed or disguised."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from .case import Accepted, Case, Copy, Files, Tensors, as_json, pack, read_json, refused, unpack, with_tensors
from .honest import README, byte_level, tokenizer_files

CLAIMS = ("claims",)
TENSORS = ("claims", "tensors")
ALIKE = ("claims", "tensors", "losses")
LLAMA, SHARDED, PHI = "llama-plain", "llama-sharded", "phi-plain"


def cases(base: dict[str, Files]) -> list[Case]:
    llama, sharded, phi, tied = base[LLAMA], base[SHARDED], base[PHI], base["llama-tied"]
    rows: list[tuple[str, str, str, Files, str, tuple[str, ...]]] = [
        ("copy-exact", "A2", "the same files under another hotkey", llama, LLAMA, CLAIMS),
        ("copy-exact-phi", "A2", "the same files, with its tokenizer", phi, PHI, CLAIMS),
        ("copy-sharded", "A2", "the same shards", sharded, SHARDED, CLAIMS),
        ("copy-readme", "A3", "and another README", llama | {"README.md": README + b"mine\n"}, LLAMA, CLAIMS),
        ("copy-config-text", "A3", "and the config's keys in another order",
         llama | {"config.json": _reordered(llama)}, LLAMA, CLAIMS),
        ("copy-salted", "A3", "and another generation_config.json",
         llama | {"generation_config.json": b'{"salt": 1}'}, LLAMA, CLAIMS),
        ("copy-tokenizer", "A3", "and a tokenizer.json beside", llama | tokenizer_files(byte_level()), LLAMA, CLAIMS),
        ("copy-less", "A3", "and without generation_config.json",
         {k: v for k, v in llama.items() if k != "generation_config.json"}, LLAMA, CLAIMS),
        ("copy-twice-1", "A13", "one of three copies by one owner", llama, LLAMA, CLAIMS),
        ("copy-twice-2", "A13", "one of three copies by one owner", llama | {"README.md": b"2\n"}, LLAMA, CLAIMS),
        ("copy-twice-3", "A13", "one of three copies by one owner", llama | {"README.md": b"3\n"}, LLAMA, CLAIMS),
        ("copy-metadata", "A3", "other __metadata__ in the same file",
         _packed(llama, {"format": "pt", "salt": "1"}), LLAMA, TENSORS),
        ("copy-reordered", "A3", "the tensors in another order", with_tensors(llama, _reversed), LLAMA, TENSORS),
        ("copy-resharded", "A3", "one file made of shards", _joined(sharded), SHARDED, TENSORS),
        ("copy-cut", "A3", "shards made of one file", _cut(llama), LLAMA, TENSORS),
        ("copy-wider", "A3", "a bfloat16 model written as float32", _widened(base["llama-bf16"]), "llama-bf16", TENSORS),
        ("copy-wider-f16", "A3", "a float16 model written as float32", _widened(base["llama-f16"]), "llama-f16", TENSORS),
        ("copy-untied", "A3", "tied weights written twice", _untied(tied), "llama-tied", ALIKE),
        ("copy-negative-zero", "A3", "one zero made negative", _one_zero(base["phi-uniform"]), "phi-uniform", ALIKE),
        ("copy-noise", "A4", "0.01 % noise on every weight", with_tensors(llama, _noise), LLAMA, ALIKE),
        ("copy-rounded", "A4", "every weight rounded to bfloat16", with_tensors(llama, _rounded), LLAMA, ALIKE),
        ("copy-permuted", "A4", "the neurons of an MLP in another order", with_tensors(llama, _permuted), LLAMA, ALIKE),
        ("copy-rescaled", "A4", "up_proj doubled, down_proj halved", with_tensors(llama, _rescaled), LLAMA, ALIKE),
        ("copy-one-weight", "A4", "one weight moved a little", with_tensors(llama, _nudged), LLAMA, ALIKE),
    ]  # fmt: skip
    found = [
        Case(name, row, why, files, (Copy(of, how),), "c01" if of.startswith("phi") else "c00")
        for name, row, why, files, of, how in rows
    ]
    # Graded, not binary: who takes a part has another function, and is judged by its losses.
    part = "one shard of another miner's, the rest noise"
    found.append(Case("copy-one-shard", "A15", part, _one_shard(sharded), (Copy(SHARDED, ALIKE), Accepted())))
    early = "an exact copy, on the Hub before the original but committed after it"
    found.append(Case("copy-published-first", "A8", early, llama, (Copy(LLAMA, CLAIMS),), block=51))
    return [*found, *_digests(llama)]


def _digests(llama: Files) -> list[Case]:
    """A1, A5: a commitment whose digest is not that of these files for this hotkey."""
    wrong = (refused("digest"),)
    return [
        Case("digest-verbatim", "A1", "another hotkey's commitment, word by word", llama, wrong, digest="hotkey:somebody else"),
        Case("digest-nothing", "A5", "the digest of nothing", llama, wrong, digest="text:"),
        Case("digest-unsalted", "A5", "the digest without a hotkey", llama, wrong, digest="hotkey:"),
        Case("digest-random", "A5", "a digest made up before the model was", llama, wrong, digest="text:soon"),
    ]


def _reordered(files: Files) -> bytes:
    return as_json(dict(reversed(read_json(files, "config.json").items())))


def _packed(files: Files, metadata: dict[str, str]) -> Files:
    return files | {"model.safetensors": pack(unpack(files["model.safetensors"]), metadata)}


def _reversed(tensors: Tensors) -> Tensors:
    return dict(reversed(tensors.items()))


def _shards(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def _joined(files: Files) -> Files:
    tensors: Tensors = {}
    for name in _shards(files):
        tensors |= unpack(files[name])
    rest = {name: content for name, content in files.items() if not name.startswith("model")}
    return rest | {"model.safetensors": pack(tensors, {"format": "pt"})}


def _cut(files: Files) -> Files:
    tensors = unpack(files["model.safetensors"])
    names = list(tensors)
    halves = [names[::2], names[1::2]]
    rest = {name: content for name, content in files.items() if not name.startswith("model")}
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": half for i, half in enumerate(halves)}
    index = {"metadata": {"total_size": sum(len(t[2]) for t in tensors.values())},
             "weight_map": {name: file for file, half in parts.items() for name in half}}  # fmt: skip
    made: Files = {file: pack({name: tensors[name] for name in half}, {"format": "pt"}) for file, half in parts.items()}
    return rest | made | {"model.safetensors.index.json": as_json(index)}


def _one_shard(files: Files) -> Files:
    """All shards but the first with other weights."""
    made = dict(files)
    for name in _shards(files)[1:]:
        made = with_tensors(made, lambda tensors: _each(tensors, lambda values: values[::-1].copy()), name)
    return made


def _widened(files: Files) -> Files:
    def widen(tensors: Tensors) -> Tensors:
        return {name: ("F32", shape, _floats(dtype, data).tobytes()) for name, (dtype, shape, data) in tensors.items()}

    return with_tensors(files, widen)


def _floats(dtype: str, data: bytes) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4")


def _each(tensors: Tensors, change: Any) -> Tensors:
    return {
        name: (dtype, shape, change(np.frombuffer(data, "<f4")).astype("<f4").tobytes())
        for name, (dtype, shape, data) in tensors.items()
    }


def _noise(tensors: Tensors) -> Tensors:
    draw = np.random.default_rng(29)
    return _each(tensors, lambda values: values * (1 + 1e-4 * draw.standard_normal(len(values))))


def _rounded(tensors: Tensors) -> Tensors:
    return _each(tensors, lambda values: ((values.view("<u4") + 0x8000) & 0xFFFF0000).astype("<u4").view("<f4"))


def _mlp(tensors: Tensors, name: str) -> tuple[str, np.ndarray[Any, Any]]:
    full = f"model.layers.0.mlp.{name}_proj.weight"
    _, shape, data = tensors[full]
    return full, np.frombuffer(data, "<f4").reshape(shape)


def _put(tensors: Tensors, name: str, values: np.ndarray[Any, Any]) -> None:
    tensors[name] = ("F32", values.shape, np.ascontiguousarray(values, dtype="<f4").tobytes())


def _permuted(tensors: Tensors) -> None:
    order = np.random.default_rng(29).permutation(_mlp(tensors, "up")[1].shape[0])
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name, values = _mlp(tensors, part)
        _put(tensors, name, np.take(values, order, axis=axis))


def _rescaled(tensors: Tensors) -> None:
    for part, factor in (("up", 2.0), ("down", 0.5)):
        name, values = _mlp(tensors, part)
        _put(tensors, name, values * factor)


def _nudged(tensors: Tensors) -> None:
    dtype, shape, data = tensors["model.norm.weight"]
    first = struct.unpack("<f", data[:4])[0]
    tensors["model.norm.weight"] = (dtype, shape, struct.pack("<f", first * 1.0001) + data[4:])


def _untied(files: Files) -> Files:
    def untie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    raw = read_json(files, "config.json") | {"tie_word_embeddings": False}
    return with_tensors(files, untie) | {"config.json": as_json(raw)}


def _one_zero(files: Files) -> Files:
    def change(tensors: Tensors) -> None:
        dtype, shape, data = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = (dtype, shape, struct.pack("<f", -0.0) + data[4:])

    return with_tensors(files, change)
