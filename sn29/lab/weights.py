"""A model as a recipe: what each tensor is, computed when it is asked for; and the writer that asks for one after the other.

    read = open_weights(folder)        config, types and a function that reads one tensor
    grown = operator(read)             the same of another config: nothing is computed yet
    save(grown, to, card)              each tensor is computed, checked, written and forgotten

So a 6.9B model is changed with the memory of its largest tensor and what it is made of.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sn29 import __version__
from sn29.errors import Reason, Rejected, Unavailable
from sn29.models import checkpoint
from sn29.models.checkpoint import Tensor as Entry
from sn29.models.config import ModelConfig, expected_tensors, parse_config
from sn29.records import ModelFacts, ModelId, RepoFile, RepoListing

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000
"""Most of one weight file; a larger tensor has a file of its own."""
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt",
)  # fmt: skip
"""Files of the model that was begun with, which hold for what was made of it too."""
_INDEX = "model.safetensors.index.json"

Report = Callable[[int, int], None]
"""report(done, of)."""


def silent(done: int, of: int) -> None:
    """The `Report` that says nothing."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model as a recipe. Operators take one and give another one."""

    config: ModelConfig
    raw: Mapping[str, Any]
    """config.json as it would be written."""
    dtypes: Mapping[str, str]
    """Tensor -> `F32`, `F16` or `BF16`; the names are those of `expected_tensors(config)`."""
    read: Callable[[str], Tensor]
    """A tensor of its own, which the caller may change: in its type, of its shape in `expected_tensors(config)`, on the CPU."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return expected_tensors(self.config)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * TYPES[self.dtypes[name]].itemsize for name, shape in self.shapes.items())


def open_weights(folder: Path) -> Weights:
    """A folder's model. Each `read` reads one tensor from the disk and keeps nothing.

    Raises Rejected as `checkpoint.inspect`; `read` raises Rejected(TENSORS) for a file that became shorter.
    """
    config, places = checkpoint.opened(folder)
    raw = json.loads((folder / "config.json").read_bytes())

    def read(name: str) -> Tensor:
        path, start, entry = places[name]
        return _read(folder / path, start, entry)

    return Weights(config, raw, {name: places[name][2].dtype for name in expected_tensors(config)}, read)


def _read(path: Path, start: int, entry: Entry) -> Tensor:
    found = torch.empty(entry.shape, dtype=TYPES[entry.dtype])
    view = memoryview(found.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while view:
            count = stream.readinto(view)
            if not count:
                raise Rejected(Reason.TENSORS, f"{path.name} ends early", "all values of its header", path.name)
            view = view[count:]
    return found


def with_config(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """A config.json with other values (None: without the key), and its checked numbers.

    What a validator would refuse is refused here: raises Rejected as `parse_config`.
    """
    changed = {key: value for key, value in {**raw, **changes}.items() if key not in changes or value is not None}
    return parse_config(json.dumps(changed).encode()), changed


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """What a model was made from."""

    name: str
    """NAMESPACE/NAME@REVISION, or the folder's name."""
    content_id: str


@dataclass(frozen=True, slots=True)
class Card:
    """What a README.md says of a model that was made from others."""

    title: str
    what: Sequence[str]
    """Paragraphs: what was done, and what that does to the function."""
    sources: Sequence[Source]
    command: str
    figures: Sequence[tuple[str, str]]
    """Rows of name and value."""


def source_of(folder: Path, name: str) -> Source:
    """With the id of its content, for which all of it is read. Raises Rejected(MISSING_FILE)."""
    return Source(name, checkpoint.content_id(checkpoint.local_listing(folder).files))


def check_free(folder: Path) -> None:
    """Raises Rejected(SETTING) for a folder that is not empty, a file, or none that has a name: nothing is written over."""
    limit = "a new folder, or an empty one"
    if folder.name in ("", ".."):
        raise Rejected(Reason.SETTING, folder, f"{limit}, by its name", "--out")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
        raise Rejected(Reason.SETTING, f"{folder}, which is there", limit, "--out")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises Unavailable when the disk that a folder is, or will be, on has less left than that."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise Unavailable("the disk", f"{num_bytes:,} bytes are to be written to {folder.parent}, {free:,} are free")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which is given its name when the block ends; when the block raises, nothing is left.

    Until then it is .NAME.part-XXXXXXXX beside it, made for this run alone: two runs never write into one, and nothing that
    was there is touched. What a killed run leaves is never swept, because nothing shows that it is not at work elsewhere
    (`left_behind` names it). Raises Rejected(SETTING) as `check_free`, also for a folder that was filled meanwhile;
    Unavailable for a disk that is full or fails.
    """
    check_free(folder)
    with scratch_beside(folder) as part:
        yield part
        _sync(part)
        try:
            part.rename(folder)  # over an empty folder, and no other
        except OSError:
            check_free(folder)
            raise
        _sync(folder.parent)


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """.NAME.part-XXXXXXXX beside it, made for this run alone, that goes when the block ends.

    Raises Unavailable for a disk that is full or fails, also in the block.
    """
    part = folder.with_name(f".{folder.name}.part-{secrets.token_hex(4)}")
    try:
        part.mkdir(parents=True)
        yield part
    except OSError as error:
        raise Unavailable(str(folder), f"the disk: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def left_behind(folder: Path) -> list[Path]:
    """What runs to this folder that were killed have left beside it; or write into now."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.part-[0-9a-f]{{8}}")
    return sorted(path for path in folder.parent.glob(".*.part-*") if name.fullmatch(path.name))


def save(
    weights: Weights,
    folder: Path,
    card: Card | Callable[[Path], Card],
    *,
    beside: Path | None = None,
    files: Mapping[str, bytes | None] | None = None,
    report: Report = silent,
    shard_bytes: int = SHARD_BYTES,
) -> ModelFacts:
    """Write a model, tensor by tensor: the memory is that of the tensor in hand and what it is computed from.

    `beside`: the folder whose tokenizer files and licence are copied; `files` are written over them (None: left out). `card`
    may be a function: it is called with the written folder before that has its name, to measure it; what it raises leaves
    nothing. All is written into a `new_folder`. Returns what `checkpoint.inspect` says.

    Raises as `new_folder` and `check_room`, Rejected(NOT_FINITE) naming a tensor, Rejected as `checkpoint.inspect` and as
    `weights.read`.
    """
    with new_folder(folder) as part:
        check_room(part, weights.num_bytes)
        small: dict[str, bytes | None] = {"config.json": (json.dumps(weights.raw, indent=2, sort_keys=True) + "\n").encode()}
        if beside is not None:
            small |= {name: (beside / name).read_bytes() for name in BESIDE if (beside / name).is_file()}
        small |= files or {}
        listed = _write_weights(weights, part, report, shard_bytes)
        for name, content in sorted(small.items()):
            if content is not None:
                listed.append(_write(part / name, content))
        listing = RepoListing(ModelId("local", "model", "0" * 40), tuple(listed))
        checkpoint.inspect(listing, checkpoint.local_reader(part))
        listed.append(_write(part / "README.md", _card_text(card if isinstance(card, Card) else card(part)).encode()))
        return checkpoint.inspect(replace(listing, files=tuple(listed)), checkpoint.local_reader(part))


def _write_weights(weights: Weights, folder: Path, report: Report, shard_bytes: int) -> list[RepoFile]:
    """model.safetensors, or shards with their index; with the hashes of what was written."""
    shapes = weights.shapes
    sizes = {name: math.prod(shape) * TYPES[weights.dtypes[name]].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    of = len(shards)
    names = [f"model-{number + 1:05d}-of-{of:05d}.safetensors" for number in range(of)] if of > 1 else ["model.safetensors"]
    total, done, listed = sum(sizes.values()), 0, []
    for file, held in zip(names, shards, strict=True):
        with (folder / file).open("wb") as stream:
            hashed = _Hashed(stream)
            hashed.write(_header({name: (weights.dtypes[name], shapes[name], sizes[name]) for name in held}))
            for name in held:
                hashed.write(_bytes_of(name, weights.read(name), weights.dtypes[name], shapes[name]))
                done += sizes[name]
                report(done, total)
            stream.flush()
            os.fsync(stream.fileno())
            listed.append(RepoFile(file, stream.tell(), f"sha256:{hashed.digest.hexdigest()}"))
    if of > 1:
        where = {name: file for file, held in zip(names, shards, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        listed.append(_write(folder / _INDEX, (json.dumps(index, indent=1) + "\n").encode()))
    return listed


class _Hashed:
    """A file's bytes and their hash, in one pass."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.stream.write(data)


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """8 bytes of length and the JSON of a safetensors file: https://huggingface.co/docs/safetensors (format)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(name: str, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> memoryview:
    """A tensor's values as they stand in the file. Raises Rejected(NOT_FINITE)."""
    if tuple(tensor.shape) != shape or tensor.dtype != TYPES[dtype]:
        raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of {dtype}")
    if tensor.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        raise Rejected(Reason.NOT_FINITE, f"NaN or infinity in {name}", "finite weights")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(path: Path, content: bytes) -> RepoFile:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return RepoFile(path.name, len(content), checkpoint.git_blob(content))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the model card ---------------------------------------------------------------------------------------------------

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")


def _card_text(card: Card) -> str:
    """Markdown, with the head that the Hub reads (https://huggingface.co/docs/hub/model-cards)."""
    base = [f"- {found[1]}" for source in card.sources if (found := _HUB_NAME.fullmatch(source.name))]
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *(["base_model:", *base] if base else []),
        "---",
    ]
    made = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    parts = [
        "\n".join(head),
        f"# {card.title}",
        *card.what,
        "## Made from\n\n" + "\n".join(f"- `{source.name}`, content id `{source.content_id}`" for source in card.sources),
        f"## Command\n\n```\n{card.command}\n```",
    ]
    if card.figures:
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in card.figures]
        parts.append("## Figures\n\n" + "\n".join(["| | |", "| --- | --- |", *rows]))
    parts.append(f"Made by sn29 {__version__} with {made}, Python {platform.python_version()}.")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
