"""Hostile weights: wrong tensors (B7, B8), values (B9, A12), safetensors bombs (B11), other formats under the name (B4)."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

from .case import (
    CHILD,
    METADATA,
    Case,
    Expected,
    Files,
    Pays,
    Tensors,
    Twin,
    as_json,
    changed,
    content_of,
    join,
    pack,
    read_json,
    refused,
    split,
    unpack,
    with_header,
    with_tensors,
)

TENSORS = (refused("tensors"),)
NOT_FINITE = (refused("not_finite", at=CHILD),)
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def cases(base: dict[str, Files], canary: str) -> list[Case]:
    """`canary`: a file that appears when a pickle of ours is loaded."""
    return [
        *_tensors(base),
        *_values(base),
        *_headers(base["llama-plain"]),
        *_header_bytes(base),
        *_indexes(base),
        *_shards(base),
        *_formats(base["llama-plain"], canary),
    ]


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def _add(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (dtype, shape, data)})


def _rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new if name == old else name: value for name, value in tensors.items()}


def _shaped(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (tensors[name][0], shape, tensors[name][2])})


def _typed(name: str, dtype: str, width: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        _, shape, data = tensors[name]
        tensors[name] = (dtype, shape, bytes(int(len(data) // 4 * width)))

    return change


def _tensors(base: dict[str, Files]) -> list[Case]:
    llama = base["llama-plain"]
    table: list[tuple[str, str, Callable[[Tensors], Any]]] = [
        ("no-norm", "B8", _drop(NORM)),
        ("no-head", "B7", _drop(HEAD)),
        ("no-query", "B8", _drop(QUERY)),
        ("extra-layer", "B8", _add("model.layers.2.self_attn.q_proj.weight", "F32", (16, 16), bytes(1024))),
        ("extra-bias", "B8", _add("model.layers.0.self_attn.q_proj.bias", "F32", (16,), bytes(64))),
        ("extra-adapter", "B5", _add("base_model.model.lm_head.lora_A.weight", "F32", (4, 16), bytes(256))),
        ("extra-empty", "B11", _add("x", "F32", (0,), b"")),
        ("rotary-buffer", "B8", _add("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,), bytes(16))),
        ("renamed", "B8", _rename(NORM, "model.norm.gamma")),
        ("renamed-prefix", "B8", lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()}),
        ("renamed-case", "B8", _rename(NORM, "Model.norm.weight")),
        ("renamed-nul", "B8", _rename(NORM, "model.norm.weight\0")),
        ("renamed-terminal", "B12", _rename(NORM, "\x1b[2J\x1b]0;owned\x07\nmodel.norm.weight")),
        ("renamed-long", "B11", _rename(NORM, "model.norm.weight" + "x" * 100_000)),
        ("transposed", "B8", _shaped(HEAD, 16, 300)),
        ("flattened", "B8", _shaped(HEAD, 4800)),
        ("three-axes", "B8", _shaped(HEAD, 1, 300, 16)),
        ("scalar", "B8", lambda tensors: tensors.update({NORM: ("F32", (), bytes(4))})),
        ("float64", "B16", _typed(NORM, "F64", 8)),
        ("int64", "B8", _typed(NORM, "I64", 8)),
        ("bytes", "B7", _typed(HEAD, "U8", 1)),
        ("bool", "B8", _typed(NORM, "BOOL", 1)),
        ("float8", "B7", _typed(HEAD, "F8_E4M3", 1)),
        ("packed-4-bit", "B7", lambda tensors: tensors.update({HEAD: ("U8", (2400, 1), bytes(2400))})),
        ("nothing-right", "B8", lambda tensors: {"a": ("F32", (1,), bytes(4))}),
        ("nothing", "B8", lambda tensors: {}),
        ("gpt2-names", "B8", lambda tensors: {f"transformer.h.{i}": value for i, value in enumerate(tensors.values())}),
    ]
    found = [Case(f"tensors-{name}", row, name, with_tensors(llama, change), TENSORS) for name, row, change in table]
    both = with_tensors(base["llama-tied"], _add(HEAD, "F32", (300, 16), bytes(19200)))
    qkv = with_tensors(base["phi3-plain"], _drop("model.layers.1.self_attn.qkv_proj.weight"))
    return [
        *found,
        Case("tensors-tied-and-head", "B7", "tied, and an lm_head beside", both, TENSORS),
        Case("tensors-phi3-no-qkv", "B8", "a Phi3 without one qkv_proj", qkv, TENSORS, "c01"),
        Case("tensors-phi-no-head-bias", "B8", "a Phi without its lm_head.bias",
             with_tensors(base["phi-plain"], _drop("lm_head.bias")), TENSORS, "c01"),
    ]  # fmt: skip


def _values(base: dict[str, Files]) -> list[Case]:
    llama = base["llama-plain"]
    nan, inf, large = (struct.pack("<f", value) for value in (float("nan"), float("inf"), 3e38))

    def put(name: str, value: bytes, at: int = 0) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            dtype, shape, data = tensors[name]
            tensors[name] = (dtype, shape, data[:at] + value + data[at + len(value) :])

        return change

    def fill(value: bytes) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {
            name: (dtype, shape, value * (len(data) // len(value))) for name, (dtype, shape, data) in tensors.items()
        }

    found = [
        Case(f"values-{name}", "B9", why, with_tensors(llama, change), NOT_FINITE)
        for name, why, change in (
            ("nan-first", "NaN in the embedding", put(EMBED, nan)),
            ("nan-last", "NaN as the last number of the head", put(HEAD, nan, 19196)),
            ("inf", "infinity in a norm", put(NORM, inf)),
            ("minus-inf", "minus infinity in a projection", put(QUERY, struct.pack("<f", float("-inf")), 40)),
            ("all-nan", "nothing but NaN", fill(nan)),
            ("nan-payload", "a NaN with a message in its bits", put(QUERY, b"\xef\xbe\xad\x7f", 8)),
        )
    ]
    bf16 = with_tensors(base["llama-bf16"], put(NORM, b"\xc0\x7f"))
    f16 = with_tensors(base["llama-f16"], put(NORM, b"\x00\x7c"))
    huge_norm = with_tensors(
        llama, lambda t: t.update({NORM: ("F32", (16,), large * 16), HEAD: ("F32", (300, 16), large * 4800)})
    )
    zeros = with_tensors(llama, fill(bytes(4)))
    tiny = with_tensors(llama, fill(struct.pack("<I", 1)))
    return [
        *found,
        Case("values-nan-bf16", "B9", "NaN in bfloat16", bf16, NOT_FINITE),
        Case("values-inf-f16", "B9", "infinity in float16", f16, NOT_FINITE),
        Case("values-overflow", "B10", "logits beyond float32", huge_norm, NOT_FINITE),
        # RMSNorm makes zeros of what overflows before it, so this model is uniform.
        Case(
            "values-all-large",
            "B10",
            "finite weights whose products are not",
            with_tensors(llama, fill(large)),
            (Pays(), *NOT_FINITE),
        ),
        Case("values-zero", "A12", "all weights zero: every token alike", zeros, (Pays(),)),
        Case("values-denormal", "A12", "all weights the smallest float", tiny, (Pays(),)),
    ]


def _entry(name: str = NORM, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda made: made[name].update(fields)


def _shifted(name: str, start: int, stop: int) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        first, last = made[name]["data_offsets"]
        made[name]["data_offsets"] = [first + start, last + stop]

    return change


def _headers(llama: Files) -> list[Case]:
    """B11: headers that claim what is not there."""
    edits: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
        ("overlap", "two tensors on the same bytes", lambda made: made[NORM].update(data_offsets=made[QUERY]["data_offsets"])),
        ("same-span", "a norm that reads the start of another", _shifted(NORM, -64, -64)),
        ("beyond", "a tensor behind the end", _shifted(NORM, 10**9, 10**9)),
        ("backwards", "offsets in the wrong order", lambda made: made[NORM]["data_offsets"].reverse()),
        ("negative", "a negative offset", _shifted(NORM, -(10**9), -(10**9))),
        ("huge-offset", "offsets of 2^63", _entry(data_offsets=[2**63, 2**63 + 64])),
        ("huge-shape", "a shape whose product wraps around", _entry(shape=[2**32, 2**32])),
        ("huge-number", "a shape of 10^1000", _entry(shape=[10**1000])),
        ("float-shape", "16.0 rows", _entry(shape=[16.0])),
        ("bool-shape", "true rows", _entry(shape=[True])),
        ("negative-shape", "-16 rows", _entry(shape=[-16])),
        ("text-shape", "the text 16", _entry(shape="16")),
        ("null-shape", "no shape", _entry(shape=None)),
        ("long-shape", "a shape of 10,000 ones", _entry(shape=[16] + [1] * 10_000)),
        ("unknown-dtype", "dtype F33", _entry(dtype="F33")),
        ("list-dtype", "a list as dtype", _entry(dtype=["F32"])),
        ("short-span", "offsets one byte short", _shifted(NORM, 0, -1)),
        ("extra-field", "a fourth field", _entry(strides=[1])),
        ("entry-list", "a list as entry", lambda made: made.update({NORM: [1, 2]})),
        ("entry-null", "null as entry", lambda made: made.update({NORM: None})),
        ("missing-dtype", "no dtype", lambda made: made[NORM].pop("dtype") and None),
        ("metadata-list", "__metadata__ as a list", lambda made: made.update({"__metadata__": []})),
        ("metadata-number", "a number in __metadata__", lambda made: made.update({"__metadata__": {"a": 1}})),
        ("metadata-surrogate", "half a character in __metadata__", lambda made: made.update({"__metadata__": {"a": "\ud800"}})),
        ("metadata-nested", "an object in __metadata__", lambda made: made.update({"__metadata__": {"a": {"b": "c"}}})),
        ("name-surrogate", "half a character as a name",
         lambda made: made.update({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
        ("metadata-3mb", "3 MB of __metadata__", lambda made: made.update({"__metadata__": {"a": "x" * 3_000_000}})),
        ("empty-tensors", "30,000 empty tensors", lambda made: made.update(
            {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)})),
    ]  # fmt: skip
    return [Case(f"header-{name}", "B11", why, with_header(llama, change), TENSORS) for name, why, change in edits]


def _header_bytes(base: dict[str, Files]) -> list[Case]:
    """The same, of headers that are no plain JSON object."""
    llama = base["llama-plain"]
    data = content_of(llama["model.safetensors"])
    header, body = split(data)
    text = json.dumps(header).encode()
    twice = text[:-1] + b', "%s": %s}' % (NORM.encode(), json.dumps(header[NORM]).encode())
    raw: list[tuple[str, str, bytes]] = [
        ("length-2e62", "a header of 2^62 bytes", (1 << 62).to_bytes(8, "little") + data[8:]),
        ("length-all-ones", "a header of 2^64 - 1 bytes", b"\xff" * 8 + data[8:]),
        ("length-0", "a header of 0 bytes", bytes(8) + data[8:]),
        ("length-100mb", "a header of 100 MB", (100 << 20).to_bytes(8, "little") + data[8:]),
        ("length-past-end", "a header as long as the file", len(data).to_bytes(8, "little") + data[8:]),
        ("length-one-short", "a header cut by a byte", (len(text) - 1).to_bytes(8, "little") + text + body),
        ("truncated", "the last 100 bytes are missing", data[:-100]),
        ("trailing", "100 bytes behind the last tensor", data + b"PK" * 50),
        ("zip-behind", "a zip file behind the last tensor", data + _zip({"evil.py": b"x"})),
        ("name-twice", "a tensor twice", join(twice, body)),
        ("nan", "NaN in the header", join(text[:-1] + b', "x": NaN}', body)),
        ("not-json", "no JSON", join(b"{" + b"x" * 100, body)),
        ("list", "a list", join(b"[" + text + b"]", body)),
        ("two-objects", "two objects", join(text + text, body)),
        ("deep", "50,000 lists in each other", join(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b"")),
        ("latin1", "bytes that are no UTF-8", join(text[:-1] + b',"\xff":1}', body)),
        ("digits", "a number of 10,000 digits", join(text[:-1] + b',"x":' + b"9" * 10_000 + b"}", body)),
        ("bloat", "2.5 MB of spaces", join(text + b" " * 2_500_000, body)),
        ("minus-0", "-0 as an offset, which the library reads as a fraction", join(text.replace(b"[0, ", b"[-0, "), body)),
        ("quotes", "a text that does not end, of quotes", join(_quotes(20_000), b"")),
        ("empty-file", "no byte", b""),
        ("seven-bytes", "7 bytes", b"\2\0\0\0\0\0\0"),
    ]
    found = [Case(f"header-{name}", "B11", why, llama | {"model.safetensors": made}, TENSORS) for name, why, made in raw]
    spaced = llama | {"model.safetensors": join(text + b" " * (8 - len(text) % 8), body)}
    return [
        *found,
        Case("header-padded", "B11", "spaces behind the header, as the library writes them", spaced, (Twin("llama-plain"),)),
        Case("header-quotes-long", "B11", "64 kB of quotes", _deep(base["phi-plain"]), TENSORS, "c01"),
    ]


def _quotes(num_bytes: int) -> bytes:
    """A reader that looks for the end of the text from each of its quotes again takes seconds, or half an hour."""
    return b'{"a":"' + b'\\"' * ((num_bytes - 6) // 2)


def _deep(phi: Files) -> Files:
    """A config whose tensors, all of them tiny, allow the longest header."""
    numbers = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1,
               "num_hidden_layers": 128, "partial_rotary_factor": 0.5}  # fmt: skip
    return changed(phi, "config.json", **numbers) | {"model.safetensors": join(_quotes(64_000), bytes(100))}


_INDEX = "model.safetensors.index.json"
_NO_SET = refused("missing_file", "forbidden_file")


def _indexes(base: dict[str, Files]) -> list[Case]:
    """B13 and B12: an index that says otherwise."""
    sharded = base["llama-sharded"]
    names, index = _names(sharded), read_json(sharded, _INDEX)
    expected = (Twin("llama-sharded"), refused("forbidden_file", "missing_file", "tensors", "bad_config"))

    def mapped(change: Callable[[dict[str, str]], dict[str, Any]]) -> Files:
        return sharded | {_INDEX: as_json(index | {"weight_map": change(index["weight_map"])})}

    table: list[tuple[str, str, str, Files]] = [
        ("index-traversal", "B12", "an index that names another miner's file",
         mapped(lambda m: dict.fromkeys(m, "../llama-tied/model.safetensors"))),
        ("index-absolute", "B12", "an index that names /etc/passwd", mapped(lambda m: dict.fromkeys(m, "/etc/passwd"))),
        ("index-pickle", "B4", "an index that names a pickle", mapped(lambda m: dict.fromkeys(m, "pytorch_model.bin"))),
        ("index-url", "B12", "an index that names an address",
         mapped(lambda m: dict.fromkeys(m, "http://127.0.0.1:9/x.safetensors"))),
        ("index-swapped", "B13", "an index that swaps two shards",
         mapped(lambda m: {name: names[(names.index(file) + 1) % len(names)] for name, file in m.items()})),
        ("index-missing-names", "B13", "an index without half of the tensors",
         mapped(lambda m: dict(list(m.items())[::2]))),
        ("index-null-file", "B11", "an index with one name more, in no file", mapped(lambda m: m | {"x": None})),
        ("index-numbers", "B11", "an index with numbers as files", mapped(lambda m: dict.fromkeys(m, 1))),
        ("index-unknown-key", "B11", "an index with a third key", sharded | {_INDEX: as_json(index | {"auto_map": {}})}),
        ("index-list", "B11", "an index that is a list", sharded | {_INDEX: b"[]"}),
        ("index-not-json", "B13", "an index that is no JSON", sharded | {_INDEX: b"import os"}),
        ("index-deep", "B11", "an index of 50,000 lists",
         sharded | {_INDEX: b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"}),
        ("index-5mb", "B11", "an index of 5 MB", sharded | {_INDEX: as_json(index | {"metadata": {"x": "y" * 5_000_000}})}),
        ("index-gone", "B13", "shards without an index", {k: v for k, v in sharded.items() if k != _INDEX}),
    ]  # fmt: skip
    return [Case(name, row, why, files, expected) for name, row, why, files in table]


def _names(sharded: Files) -> list[str]:
    return sorted(name for name in sharded if name.startswith("model-"))


def _shards(base: dict[str, Files]) -> list[Case]:
    """B13: which files count."""
    sharded, single = base["llama-sharded"], base["llama-plain"]
    names = _names(sharded)
    first = names[0]
    repeated = with_tensors(sharded, lambda t: t.update({NORM: _only(sharded, names, NORM)}), first)
    table: list[tuple[str, str, str, Files, tuple[Expected, ...]]] = [
        ("shards-and-single", "B13", "shards and model.safetensors", sharded | {"model.safetensors": single["model.safetensors"]},
         (refused("forbidden_file"),)),
        ("single-and-index", "B13", "model.safetensors and an index",
         single | {_INDEX: sharded[_INDEX]}, (refused("forbidden_file"),)),
        ("shard-gone", "B13", "one shard is missing", {k: v for k, v in sharded.items() if k != names[1]},
         (_NO_SET,)),
        ("shard-beyond", "B13", "a shard beyond the last",
         sharded | {f"model-{len(names) + 1:05d}-of-{len(names):05d}.safetensors":
         sharded[first]}, (_NO_SET,)),
        ("shard-zero", "B13", "a shard 00000", sharded | {names[0].replace("-00001-", "-00000-"): sharded[first]},
         (_NO_SET,)),
        ("shard-counts", "B13", "shards of two sets",
         sharded | {"model-00001-of-00002.safetensors": sharded[first], "model-00002-of-00002.safetensors": sharded[first]},
         (_NO_SET,)),
        ("shard-tensor-twice", "B8", "a tensor in two shards", repeated, TENSORS),
        ("shard-empty", "B8", "a shard without a tensor", sharded | {first: pack({})}, TENSORS),
        ("shard-same-twice", "B8", "one shard under two names", sharded | {names[1]: sharded[first]}, TENSORS),
    ]  # fmt: skip
    found = [Case(name, row, why, files, expected) for name, row, why, files, expected in table]
    many = {f"model-{i + 1:05d}-of-00070.safetensors": pack({f"x{i}": ("F32", (1,), bytes(4))}) for i in range(70)}
    whole = {name: content for name, content in single.items() if name != "model.safetensors"}
    found.append(Case("shards-70", "B17", "70 shards", whole | many, (refused("forbidden_file", "tensors", "missing_file"),)))
    bomb = {f"model-{i + 1:05d}-of-00040.safetensors": _bloated(i) for i in range(40)}
    found.append(Case("shards-bloated", "B11", "40 shards with headers of 100 kB", whole | bomb, TENSORS))
    mixed = with_tensors(single, lambda t: t.update({NORM: ("BF16", (16,), b"\x80\x3f" * 16)}))
    found.append(
        Case("tensors-mixed-dtypes", "B8", "one tensor in bfloat16, the rest in float32", mixed, (Twin("llama-plain"), *TENSORS))
    )
    return found


def _only(files: Files, names: list[str], tensor: str) -> tuple[str, tuple[int, ...], bytes]:
    return next(found[tensor] for found in (unpack(files[name]) for name in names) if tensor in found)


def _bloated(number: int) -> bytes:
    return pack({f"x{number}.{i}": ("F32", (0,), b"") for i in range(1500)})


class _Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({self.path!r}, 'w').close()",)


def pickled(canary: str) -> bytes:
    return pickle.dumps(_Canary(canary))


def _zip(files: dict[str, bytes]) -> bytes:
    made = BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


def torch_zip(canary: str) -> bytes:
    """A checkpoint as torch.save writes it, with a pickle that acts."""
    return _zip({"archive/data.pkl": pickled(canary), "archive/version": b"3\n"})


def _formats(llama: Files, canary: str) -> list[Case]:
    """B4: other formats under an allowed name."""
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", 70) + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(70)
    table: list[tuple[str, str, str, bytes, str]] = [
        ("pickle-as-weights", "model.safetensors", "a pickle", pickled(canary), "tensors"),
        ("torch-as-weights", "model.safetensors", "a torch checkpoint", torch_zip(canary), "tensors"),
        ("numpy-as-weights", "model.safetensors", "numpy objects", npy + pickled(canary), "tensors"),
        ("gguf-as-weights", "model.safetensors", "GGUF", b"GGUF\3\0\0\0" + bytes(100), "tensors"),
        ("html-as-weights", "model.safetensors", "a web page", b"<!DOCTYPE html><html>" * 20, "tensors"),
        ("pointer-as-weights", "model.safetensors", "a large-file pointer",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 99", "tensors"),
        ("pickle-as-config", "config.json", "a pickle", pickled(canary), "bad_config"),
        ("zip-as-config", "config.json", "a zip file", torch_zip(canary), "bad_config"),
    ]  # fmt: skip
    found = [
        Case(name, "B4", f"{path} is {why}", llama | {path: data}, (refused(code),)) for name, path, why, data, code in table
    ]
    # A file that is both: a pickle whose first 8 bytes are the length of a safetensors header cannot be, but a right
    # file may carry a message in __metadata__.
    coded = with_header(llama, lambda made: made.update({"__metadata__": {"format": "pt", "code": "__import__('os')"}}))
    link = llama | {"model.safetensors": b"../llama-tied/model.safetensors"}
    unread = changed(llama, "config.json", torch_dtype="bfloat16")
    return [
        *found,
        Case("metadata-with-code", "B4", "__metadata__ with Python text", coded, (Twin("llama-plain"), refused("tensors"))),
        Case("metadata-flax", "B16", "__metadata__ of another framework",
             with_header(llama, lambda made: made.update({"__metadata__": {"format": "flax"}})),
             (Twin("llama-plain"), refused("tensors"))),
        Case("link-as-weights", "B12", "model.safetensors is a symbolic link to another miner's", link,
             (refused("tensors", "forbidden_file", at=METADATA),), small=("model.safetensors",)),
        Case("dtype-said-otherwise", "B16", "the config says bfloat16, the file holds float32", unread, (Twin("llama-plain"),)),
    ]  # fmt: skip
