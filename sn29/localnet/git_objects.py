"""A bare git repository on disk, object by object: just enough git for a Hub, and nothing that git would refuse.

Blobs, trees and commits are loose objects under their true SHA-1 names, so that a revision of the loopback Hub is a
real git commit and `git fsck --full --strict` has no complaint. Large files stand behind git-lfs pointer blobs; their
bytes are kept where git-lfs keeps them, under `lfs/objects`. Every write is a temporary file and a rename: a process
killed at any instant leaves each object and each reference either whole or absent.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MAIN = "refs/heads/main"
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
_POINTER_MAX_BYTES = 200
_COMMIT = re.compile(
    r"tree (?P<tree>[0-9a-f]{40})\n(?:parent (?P<parent>[0-9a-f]{40})\n)?"
    r"author (?P<author>.*) <[^>]*> (?P<when_s>\d+) \+0000\ncommitter [^\n]*\n\n(?P<message>.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder of a tree. `size` is that of the content, for a large file not that of its pointer."""

    path: str
    oid: str
    """SHA-1 of the blob (for a large file: of its pointer) or of the tree."""
    is_folder: bool
    size: int = 0
    sha256: str = ""
    """Of the content of a large file; empty for files that git holds itself."""
    pointer_size: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    oid: str
    tree: str
    parent: str | None
    author: str
    when_s: int
    """Seconds since 1970."""
    message: str


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that no reader and no crash ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="tmp_obj_")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def blob_oid(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The blob that stands in git for a large file (git-lfs specification, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_valid_path(path: str) -> bool:
    """Whether git takes the path: relative, no empty, dot or `.git` part, no control character."""
    parts = path.split("/")
    return path.isprintable() and all(part not in ("", ".", "..") and part.lower() != ".git" for part in parts)


class GitRepository:
    """One bare repository with one branch, main."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._objects = folder / "objects"

    def init(self) -> None:
        self._objects.mkdir(parents=True)
        (self.folder / "refs/heads").mkdir(parents=True)
        write_whole(self.folder / "HEAD", f"ref: {MAIN}\n".encode())
        write_whole(self.folder / "config", b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n")

    def head(self) -> str:
        """The commit that main points to."""
        return (self.folder / MAIN).read_text().strip()

    def find(self, revision: str) -> str | None:
        """The commit of a branch name or a 40-digit sha; None unless main's history holds it."""
        if revision in ("main", MAIN):
            return self.head()
        return revision if any(commit.oid == revision for commit in self.history(self.head())) else None

    def history(self, oid: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        next_oid: str | None = oid
        while next_oid:
            commit = _read_commit(self._objects, next_oid)
            yield commit
            next_oid = commit.parent

    def entries(self, oid: str) -> tuple[Entry, ...]:
        """Files and folders of a commit at all depths, sorted by path."""
        return _read_tree(self._objects, _read_commit(self._objects, oid).tree)

    def files(self, oid: str) -> dict[str, Entry]:
        return {entry.path: entry for entry in self.entries(oid) if not entry.is_folder}

    def add_blob(self, data: bytes) -> str:
        return _add(self._objects, b"blob", data)

    def read_blob(self, oid: str) -> bytes:
        return _read(self._objects, oid)

    def large_file(self, sha256: str) -> Path:
        """Where the bytes of a large file are or go."""
        return self.folder / "lfs/objects" / sha256[:2] / sha256[2:4] / sha256

    def commit(self, blobs: Mapping[str, str], parent: str | None, author: str, when_s: int, message: str) -> str:
        """Point main at a new commit that holds exactly `blobs` (path -> blob oid); not if the parent already does.

        Raises ValueError when a path is invalid or is both a file and a folder.
        """
        tree = self._add_tree(blobs)
        if parent and _read_commit(self._objects, parent).tree == tree:
            return parent
        who = f"{author} <{author}@localnet> {when_s} +0000"
        lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
        text = "\n".join(lines) + "\n\n" + message.replace("\0", "").rstrip("\n") + "\n"
        oid = _add(self._objects, b"commit", text.encode())
        write_whole(self.folder / MAIN, f"{oid}\n".encode())
        return oid

    def _add_tree(self, blobs: Mapping[str, str]) -> str:
        files: dict[str, str] = {}
        folders: dict[str, dict[str, str]] = {}
        for path, oid in blobs.items():
            if not is_valid_path(path):
                raise ValueError(f"{path!r} is not a path")
            first, _, rest = path.partition("/")
            if rest:
                folders.setdefault(first, {})[rest] = oid
            else:
                files[first] = oid
        if both := files.keys() & folders.keys():
            raise ValueError(f"{min(both)!r} is both a file and a folder")
        rows = [(name.encode(), b"100644", oid) for name, oid in files.items()]
        rows += [(name.encode() + b"/", b"40000", self._add_tree(inner)) for name, inner in folders.items()]
        # git orders a folder as if its name ended with a slash
        data = b"".join(mode + b" " + key.rstrip(b"/") + b"\0" + bytes.fromhex(oid) for key, mode, oid in sorted(rows))
        return _add(self._objects, b"tree", data)


def _place(objects: Path, oid: str) -> Path:
    return objects / oid[:2] / oid[2:]


def _add(objects: Path, kind: bytes, data: bytes) -> str:
    whole = kind + b" %d\0" % len(data) + data
    oid = hashlib.sha1(whole).hexdigest()
    if not _place(objects, oid).exists():
        write_whole(_place(objects, oid), zlib.compress(whole, 1))
    return oid


def _read(objects: Path, oid: str) -> bytes:
    return zlib.decompress(_place(objects, oid).read_bytes()).partition(b"\0")[2]


def _size(objects: Path, oid: str) -> int:
    """Bytes of an object's content, from its first bytes."""
    with _place(objects, oid).open("rb") as file:
        # A compressed block opens with its code tables, up to some 300 bytes, before the first letter of content.
        header = zlib.decompressobj().decompress(file.read(1024), 32)
    return int(header.partition(b"\0")[0].split()[1])


@lru_cache(maxsize=4096)
def _read_commit(objects: Path, oid: str) -> Commit:
    found = _COMMIT.fullmatch(_read(objects, oid).decode())
    if not found:
        raise ValueError(f"{oid} is not a commit of this Hub")
    part = found.groupdict()
    return Commit(oid, part["tree"], part["parent"], part["author"], int(part["when_s"]), part["message"].rstrip("\n"))


@lru_cache(maxsize=256)
def _read_tree(objects: Path, oid: str, prefix: str = "") -> tuple[Entry, ...]:
    found: list[Entry] = []
    rest = _read(objects, oid)
    while rest:
        header, _, rest = rest.partition(b"\0")
        mode, _, name = header.partition(b" ")
        child, rest, path = rest[:20].hex(), rest[20:], prefix + name.decode()
        if mode == b"40000":
            found += [Entry(path, child, is_folder=True), *_read_tree(objects, child, path + "/")]
        else:
            found.append(_file_entry(objects, path, child))
    return tuple(sorted(found, key=lambda entry: entry.path))


def _file_entry(objects: Path, path: str, oid: str) -> Entry:
    size = _size(objects, oid)
    found = _POINTER.fullmatch(_read(objects, oid)) if size <= _POINTER_MAX_BYTES else None
    if not found:
        return Entry(path, oid, is_folder=False, size=size)
    return Entry(path, oid, False, size=int(found[2]), sha256=found[1].decode(), pointer_size=size)
