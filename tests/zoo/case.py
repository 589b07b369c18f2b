"""What a case is, and the means to make one: JSON that is changed, safetensors files taken apart and put together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

METADATA, DOWNLOAD, CHILD = "metadata", "download", "child"
Content = bytes | Callable[[], bytes]
"""A file's bytes, or what makes them: large ones are made when they are written."""
Files = dict[str, Content]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> (dtype as safetensors names it, shape, bytes)."""
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1, "BOOL": 1}


# --- what is expected ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refused:
    """Refused with one of the codes (`Reason.code`), while looking at one of the stages."""

    codes: tuple[str, ...]
    stages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'/'.join(self.codes)} at {'/'.join(self.stages)}"


@dataclass(frozen=True, slots=True)
class Twin:
    """Scored to the bit like the honest case of that name: what is hostile in it had no effect."""

    of: str

    def __str__(self) -> str:
        return f"as {self.of}"


@dataclass(frozen=True, slots=True)
class Copy:
    """Recognised as the same model as that case, which was committed earlier."""

    of: str
    how: tuple[str, ...]
    """`claims` (the Hub's listing), `tensors` (the canonical digest), `losses` (near copies): by one of these."""

    def __str__(self) -> str:
        return f"copy of {self.of} by {'/'.join(self.how)}"


@dataclass(frozen=True, slots=True)
class Pays:
    """Scored, and every token costs ln(vocabulary): the case's model is uniform, so no text comes for free."""

    def __str__(self) -> str:
        return "pays for every token"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Scored, with a finite loss on every text."""

    def __str__(self) -> str:
        return "accepted"


Expected = Refused | Twin | Copy | Pays | Accepted


def refused(*codes: str, at: str | tuple[str, ...] = METADATA) -> Refused:
    return Refused(codes, (at,) if isinstance(at, str) else at)


# --- a case -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lies:
    """What a Hub says of a repository that is not so: it may be broken, or play along with the miner."""

    rows: tuple[Mapping[str, Any], ...] = ()
    """Rows put into the listing."""
    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Path -> fields of its row in the listing that say something else."""
    bodies: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Path -> what the first, second, ... request for the file reads; the last for all others."""


@dataclass(frozen=True)
class Case:
    """One repository with a commitment to it."""

    name: str
    row: str
    """Of threats.md; `control` for an honest one."""
    why: str
    """What is hostile in it, or what is special in a control."""
    files: Files
    expected: tuple[Expected, ...]
    """One of these must come out."""
    competition: str = "c00"
    block: int = 100
    """Of the commitment; what it copies stands at block 50."""
    digest: str = ""
    """Of the commitment, if it is not the one of these files for this hotkey."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the repository: private, gated; or `gone`, or `rewritten` (the committed revision is not in the history)."""
    small: tuple[str, ...] = ()
    """Paths that git holds itself, whatever their name and size."""
    lies: Lies | None = None


# --- JSON ---------------------------------------------------------------------------------------------------------------


def changed(files: Files, path: str, **changes: Any) -> Files:
    """The files with other values in one JSON object."""
    return files | {path: as_json(read_json(files, path) | changes)}


def without(files: Files, path: str, *keys: str) -> Files:
    """The files without some keys of one JSON object."""
    return files | {path: as_json({key: value for key, value in read_json(files, path).items() if key not in keys})}


def read_json(files: Files, path: str) -> dict[str, Any]:
    return dict(json.loads(content_of(files[path])))


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def content_of(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content()


# --- safetensors --------------------------------------------------------------------------------------------------------


def unpack(data: Content) -> Tensors:
    data = content_of(data)
    header, body = split(data)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def pack(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with the tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == math.prod(shape) * WIDTH[dtype], name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return join(header, b"".join(data for _, _, data in tensors.values()))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, body)."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + body


def with_header(files: Files, change: Callable[[dict[str, Any]], Any], path: str = "model.safetensors") -> Files:
    """The files with another header on the same bytes; `change` edits it in place or returns another."""
    header, body = split(content_of(files[path]))
    made = change(header)
    return files | {path: join(header if made is None else made, body)}


def with_tensors(files: Files, change: Callable[[Tensors], Any], path: str = "model.safetensors") -> Files:
    """The files with other tensors in a well-formed file."""
    tensors = unpack(files[path])
    made = change(tensors)
    return files | {path: pack(tensors if made is None else made, {"format": "pt"})}
