"""Hostile file lists: code (B1), pickles (B4), adapters (B5), paths (B12), templates (B15, B16), floods (B17), doors (A7)."""

from __future__ import annotations

from collections.abc import Callable

from .case import DOWNLOAD, METADATA, Case, Expected, Files, Lies, Twin, as_json, changed, content_of, refused
from .weights import pickled, torch_zip

FORBIDDEN = (refused("forbidden_file"),)


def cases(base: dict[str, Files], canary: str) -> list[Case]:
    return [
        *_beside(base["llama-plain"], canary),
        *_instead(base["llama-plain"], canary),
        *_unread(base),
        *_floods(base["llama-plain"]),
        *_lying_paths(base["llama-plain"]),
        *_lying(base["llama-plain"]),
        *_doors(base["llama-plain"]),
    ]


def _code(canary: str) -> bytes:
    return f"open({canary!r}, 'w').close()\nclass Evil: pass\n".encode()


def _beside(llama: Files, canary: str) -> list[Case]:
    """A right model with a file that no model needs."""
    table = [*_code_and_pickles(canary), *_other_names(content_of(llama["model.safetensors"]))]
    return [
        Case(f"beside-{number:02d}-{_plain(path)}", row, f"{path[:60]!r} beside a right model", llama | {path: data}, FORBIDDEN)
        for number, (row, path, data) in enumerate(table)
    ]


_Row = tuple[str, str, bytes]
"""(row of threats.md, path, content)."""


def _code_and_pickles(canary: str) -> list[_Row]:
    code, act, zipped = _code(canary), pickled(canary), torch_zip(canary)
    return [
        ("B1", "modeling_evil.py", code),
        ("B1", "modeling_llama.py", code),
        ("B1", "configuration_llama.py", code),
        ("B1", "__init__.py", code),
        ("B1", "sitecustomize.py", code),
        ("B1", "conftest.py", code),
        ("B1", "setup.py", code),
        ("B1", "handler.py", code),
        ("B1", "evil.pyc", b"\xa7\r\r\n" + code),
        ("B1", "evil.so", b"\x7fELF" + bytes(60)),
        ("B1", "evil.pth", b"import os\n"),
        ("B1", "run.sh", b"#!/bin/sh\n"),
        ("B1", "train.ipynb", b"{}"),
        ("B1", "requirements.txt", b"evil\n"),
        ("B1", "pyproject.toml", b"[build-system]\n"),
        ("B1", "Dockerfile", b"FROM evil\n"),
        ("B1", "custom_generate/generate.py", code),
        ("B4", "pytorch_model.bin", zipped),
        ("B4", "training_args.bin", act),
        ("B4", "optimizer.pt", act),
        ("B4", "rng_state.pth", act),
        ("B4", "model.pkl", act),
        ("B4", "model.ckpt", zipped),
        ("B4", "tf_model.h5", b"\x89HDF\r\n"),
        ("B4", "flax_model.msgpack", b"\x80"),
        ("B4", "model.onnx", b"\x08\x07"),
        ("B4", "model.gguf", b"GGUF"),
        ("B4", "pytorch_model.bin.index.json", b'{"weight_map": {"a": "x.bin"}}'),
    ]


def _other_names(weights: bytes) -> list[_Row]:
    return [
        ("B5", "adapter_config.json", as_json({"base_model_name_or_path": "../llama-tied", "peft_type": "LORA"})),
        ("B5", "adapter_model.safetensors", weights),
        ("B13", "consolidated.safetensors", weights),
        ("B13", "model.fp16.safetensors", weights),
        ("B12", "sub/config.json", b"{}"),
        ("B12", "checkpoint-1/model.safetensors", weights),
        ("B12", ".hidden/config.json", b"{}"),
        ("B12", "Config.json", b"{}"),
        ("B12", "config.json ", b"{}"),
        ("B12", "config.json.", b"{}"),
        ("B12", "m\u043edel.safetensors", weights),
        ("B12", "back\\slash.json", b"{}"),
        ("B12", "..json", b"{}"),
        ("B12", "a" * 240 + ".json", b"{}"),
        ("B12", "CON.json", b"{}"),
        ("B12", "model.safetensors:stream", b"x"),
        ("B12", ".gitmodules", b"[submodule 'x']\n\tpath = x\n\turl = http://evil\n"),
        ("B15", "chat_template.jinja", b"{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"),
        ("B17", "samples.json", b"[]"),
        ("B17", "tokenizer.json.gz", b"\x1f\x8b"),
    ]


def _plain(path: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in path)[:24].strip("-")


def _instead(llama: Files, canary: str) -> list[Case]:
    """Something else in the place of the weights, or nothing."""
    rest = {name: content for name, content in llama.items() if name != "model.safetensors"}
    missing = (refused("missing_file", "forbidden_file"),)
    return [
        Case("no-weights", "B8", "no weights", rest, missing),
        Case("no-config", "B8", "no config.json", {"model.safetensors": llama["model.safetensors"]}, missing),
        Case("nothing-at-all", "B8", "a README alone", {"README.md": b"soon\n"}, missing),
        Case("pickle-only", "B4", "pytorch_model.bin and no safetensors",
         rest | {"pytorch_model.bin": torch_zip(canary)}, missing),
        Case("adapter-only", "B5", "an adapter and no model",
             {"adapter_config.json": b"{}", "adapter_model.safetensors": llama["model.safetensors"]}, missing),
        Case("upper-case", "B12", "MODEL.SAFETENSORS", rest | {"MODEL.SAFETENSORS": llama["model.safetensors"]}, missing),
    ]  # fmt: skip


def _unread(base: dict[str, Files]) -> list[Case]:
    """Allowed names with hostile content: read by nobody, so the losses are the twin's. Or refused, with a reason."""
    llama, phi = base["llama-plain"], base["phi-plain"]
    bomb = "{% for a in range(99999999) %}{% for b in range(99999999) %}{{ a }}{% endfor %}{% endfor %}"
    deep = b"[" * 200_000
    table: list[tuple[str, str, str, str, str, bytes]] = [
        ("generation-broken", "B16", "llama", "generation_config.json", "no JSON", b"{{{"),
        ("generation-watermark", "B16", "llama", "generation_config.json", "a watermark",
         as_json({"watermarking_config": {"hashing_key": "x" * 100, "seeding_scheme": 7}})),
        ("generation-code", "B1", "llama", "generation_config.json", "custom_generate", as_json({"custom_generate": "evil/x"})),
        ("generation-deep", "B6", "llama", "generation_config.json", "200,000 lists", deep),
        ("special-tokens-deep", "B6", "llama", "special_tokens_map.json", "200,000 lists", deep),
        ("added-tokens-bomb", "B14", "llama",
         "added_tokens.json", "ids of 10^18", as_json({f"t{i}": 10**18 for i in range(2000)})),
        ("vocabulary-lies", "B14", "llama", "vocab.json", "another vocabulary", as_json({"a": 0})),
        ("merges-garbage", "B14", "llama", "merges.txt", "no merges", b"\0" * 5000),
        ("sentencepiece-garbage", "B14", "llama", "tokenizer.model", "no protobuf", b"\xff" * 5000),
        ("fixed-tokenizer-hostile", "B14", "llama", "tokenizer.json", "hostile where the competition brings its own",
         as_json({"model": {"type": "Evil"}})),
        ("attributes-filter", "B12", "llama", ".gitattributes", "a filter that runs", b"* filter=evil diff=evil\n"),
        ("readme-terminal", "B12", "llama", "README.md", "terminal codes", b"\x1b]0;owned\x07\x1b[2J"),
        ("readme-template", "B15", "llama", "README.md", "a template", bomb.encode()),
    ]  # fmt: skip
    loose = (Twin("llama-plain"), refused("bad_config", "tokenizer", "forbidden_file", "too_large"))
    found: list[Case] = [
        Case(f"unread-{name}", row, f"{path}: {why}", (llama if of == "llama" else phi) | {path: data}, loose)
        for name, row, of, path, why, data in table
    ]
    in_phi: list[tuple[str, str, str, dict[str, object]]] = [
        ("unread-tokenizer-auto-map", "B1", "tokenizer_config.json names code",
         {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
        ("unread-chat-template", "B15", "tokenizer_config.json with a template that never ends", {"chat_template": bomb}),
        ("unread-tokenizer-file", "B12", "tokenizer_config.json names another file",
         {"tokenizer_file": "../phi-tied/tokenizer.json", "vocab_file": "/etc/passwd"}),
        ("unread-added-decoder", "B14", "tokenizer_config.json adds tokens",
         {"added_tokens_decoder": {"5": {"content": " ", "lstrip": True, "special": False}}}),
    ]  # fmt: skip
    for name, row, why, put in in_phi:
        files = changed(phi, "tokenizer_config.json", **put)
        found.append(Case(name, row, why, files, (Twin("phi-plain"), refused("tokenizer", at=(METADATA, "child"))), "c01"))
    return found


def _floods(llama: Files) -> list[Case]:
    def zeros(num_bytes: int) -> Callable[[], bytes]:
        return lambda: bytes(num_bytes)

    many = {f"model-{i:05d}.json": b"{}" for i in range(1, 1200)}
    some = {f"part-{i:02d}.json": b"{}" for i in range(70)}
    return [
        Case("flood-1200-files", "B17", "1,200 files: more than a page of the Hub", llama | many, FORBIDDEN),
        Case("flood-70-files", "B17", "70 files", llama | some, FORBIDDEN),
        Case("flood-readme", "B17", "a README of 60 MB", llama | {"README.md": zeros(60_000_000)}, (refused("too_large"),)),
        Case("flood-tokenizer", "B17", "a tokenizer.json of 60 MB", llama | {"tokenizer.json": zeros(60_000_000)},
             (refused("too_large", "tokenizer"),)),
        Case("flood-generation", "B17", "a generation_config.json of 20 MB",
         llama | {"generation_config.json": zeros(20_000_000)},
             (refused("too_large", "bad_config", "forbidden_file"), Twin("llama-plain"))),
    ]  # fmt: skip


_ROW = {"oid": "a" * 40, "type": "file"}


def _listed(path: str, size: int = 2) -> Lies:
    return Lies(rows=({"path": path, "size": size, **_ROW},))


def _lying_paths(llama: Files) -> list[Case]:
    """The Hub lists what no Hub should."""
    table: list[tuple[str, str, Lies, tuple[Expected, ...]]] = [
        ("lie-path-up", "the listing names ../../evil.json", _listed("../../evil.json"), FORBIDDEN),
        ("lie-path-absolute", "the listing names /tmp/evil.json", _listed("/tmp/evil.json"), FORBIDDEN),
        ("lie-path-windows", "the listing names C:\\evil.json", _listed("C:\\evil.json"), FORBIDDEN),
        ("lie-path-nul", "the listing names a zero byte", _listed("evil\0.json"), FORBIDDEN),
        ("lie-path-newline", "the listing names a line end", _listed("config.json\n"), FORBIDDEN),
        ("lie-path-reversed", "the listing names letters that run backwards", _listed("model\u202esnosj.json"), FORBIDDEN),
        ("lie-path-surrogate", "the listing names half a character", _listed("\ud800.json"),
         (refused("forbidden_file", "unavailable"),)),
        ("lie-path-long", "a path of 100,000 letters", _listed("a" * 100_000 + ".json"), FORBIDDEN),
        ("lie-path-empty", "an empty path", _listed(""), (refused("forbidden_file", "unavailable"),)),
        ("lie-path-dots", "a path of two dots", _listed(".."), FORBIDDEN),
        ("lie-path-twice", "config.json twice", _listed("config.json"),
         (refused("forbidden_file", "bad_config", "unavailable", at=(METADATA, DOWNLOAD)),)),
        ("lie-path-folder", "model.safetensors is a folder, too", _listed("model.safetensors/x.json"), FORBIDDEN),
    ]  # fmt: skip
    return [Case(name, "B12", why, llama, expected, lies=lies) for name, why, lies, expected in table]


def _lying(llama: Files) -> list[Case]:
    """The Hub itself says what is not so, or plays along."""
    weights = content_of(llama["model.safetensors"])
    config = content_of(llama["config.json"])

    def size(path: str, stated: object) -> Lies:
        return Lies(stated={path: {"size": stated, **({"lfs": None} if path == "config.json" else {})}})

    hostile = content_of(changed(llama, "config.json", is_causal=False)["config.json"])
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    corrupt: tuple[Expected, ...] = (refused("corrupt", at=DOWNLOAD),)
    unknown: tuple[Expected, ...] = (refused("unavailable", "forbidden_file", at=METADATA),)
    # Other bytes of a small file than the listing's id: the line may be at fault, so nobody is refused for good.
    closer = (refused("bad_config", "corrupt", "unavailable", at=(METADATA, DOWNLOAD)),)
    table: list[tuple[str, str, str, Lies, tuple[Expected, ...]]] = [
        ("lie-size-huge", "B17", "a tokenizer.json of 10^15 bytes",
         _listed("tokenizer.json", 10**15), (refused("too_large", "tokenizer"),)),
        ("lie-size-negative", "B17", "a file of -1 bytes", _listed("README.md", -1), unknown),
        ("lie-size-none", "B17", "a file without a size", Lies(rows=({"path": "README.md", **_ROW},)), unknown),
        ("lie-oid-none", "B17", "a file without an id", Lies(rows=({"path": "README.md", "size": 3, "type": "file"},)), unknown),
        ("lie-config-longer", "B17", "config.json is stated longer than it is", size("config.json", len(config) + 10), closer),
        ("lie-config-shorter", "B17", "config.json is stated shorter than it is", size("config.json", 40), closer),
        ("lie-weights-other", "A6", "other weights than the listing's sha256",
         Lies(bodies={"model.safetensors": (flipped,)}), corrupt),
        ("lie-weights-longer", "B17", "weights that go on and on", Lies(bodies={"model.safetensors": (weights + bytes(10**6),)}),
         (Twin("llama-plain"), *corrupt)),
        ("lie-weights-shorter", "B17", "weights that end early", Lies(bodies={"model.safetensors": (weights[:-50],)}), corrupt),
        ("lie-config-later", "A6", "another config.json for the download than for the look before",
         Lies(bodies={"config.json": (config, hostile)}), corrupt),
        ("lie-config-first", "A6", "a hostile config.json first, then the right one",
         Lies(bodies={"config.json": (hostile, config)}),
         closer),
    ]  # fmt: skip
    found = [Case(name, row_, why, llama, expected, lies=lies) for name, row_, why, lies, expected in table]
    # The listing and the download agree on the hostile config; only the look before is shown a right one.
    two_faced = Lies(bodies={"config.json": (config + b" " * (len(hostile) - len(config)), hostile)})
    files = llama | {"config.json": hostile}
    expected = (refused("bad_config", "corrupt", "unavailable", at=(METADATA, DOWNLOAD, "child")),)
    return [
        *found,
        Case("lie-two-faces", "A6", "the right config.json is shown, the hostile one is listed", files, expected, lies=two_faced),
    ]


def _doors(llama: Files) -> list[Case]:
    table: list[tuple[str, str, dict[str, object], tuple[str, ...]]] = [
        (
            "door-private",
            "private after the commitment",
            {"private": True},
            ("repository_gone", "repository_closed", "repository_private"),
        ),
        ("door-gated", "behind a gate", {"gated": "manual"}, ("repository_closed", "repository_gated")),
        ("door-gated-auto", "behind a gate that opens by itself", {"gated": "auto"}, ("repository_closed", "repository_gated")),
        ("door-gone", "deleted", {"gone": True}, ("repository_gone",)),
        ("door-rewritten", "history rewritten", {"rewritten": True}, ("revision_gone",)),
    ]
    return [Case(name, "A7", why, llama, (refused(*codes),), settings=settings) for name, why, settings, codes in table]
