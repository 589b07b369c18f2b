"""One repository as the loopback Hub keeps it and shows it: git, visibility, large files, and rows of its replies."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sn29.localnet.git_objects import Commit, Entry, GitRepository, is_valid_path, pointer, write_whole
from sn29.localnet.http_exchange import Refusal

LARGE_FILE_BYTES = 10_000_000
"""The public Hub's limit: a file of this size or more must be a large file; so are the suffixes below at any size."""
LARGE_FILE_SUFFIXES = (".safetensors", ".parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubRepository:
    kind: str
    """`models` or `datasets`."""
    namespace: str
    name: str
    git: GitRepository

    @property
    def id(self) -> str:
        return f"{self.namespace}/{self.name}"

    def exists(self) -> bool:
        return (self.git.folder / "hub.json").exists()

    def settings(self) -> dict[str, Any]:
        """{"private": bool, "gated": False | "auto" | "manual"}"""
        settings: dict[str, Any] = json.loads((self.git.folder / "hub.json").read_bytes())
        return settings

    def has_large_file(self, sha256: str, size: object) -> bool:
        file = self.git.large_file(sha256)
        return bool(_SHA256.fullmatch(sha256)) and file.exists() and file.stat().st_size == size

    def apply(self, blobs: dict[str, str], key: str, value: Mapping[str, Any]) -> None:
        """One operation of a commit on the map path -> blob oid. Raises Refusal for one that cannot be done."""
        path = str(value.get("path", "")).rstrip("/")
        if not is_valid_path(path):
            raise Refusal(400, message=f"{path!r} is not a path")
        if key == "file":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except (binascii.Error, KeyError) as error:
                raise Refusal(400, message=f"{path}: the content is not base64") from error
            if len(content) >= LARGE_FILE_BYTES:
                raise Refusal(400, message=f"{path}: {len(content)} bytes must go to large file storage")
            blobs[path] = self.git.add_blob(content)
        elif key == "lfsFile":
            oid, size = str(value.get("oid")), value.get("size")
            if not self.has_large_file(oid, size):
                raise Refusal(400, message=f"{path}: large file {oid} was not uploaded")
            blobs[path] = self.git.add_blob(pointer(oid, int(str(size))))
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in blobs if p == path or (key == "deletedFolder" and p.startswith(path + "/"))]
            if not gone:
                raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            for each in gone:
                del blobs[each]
        else:
            raise Refusal(400, message=f"unknown operation {key!r}")


def write_settings(git: GitRepository, settings: Mapping[str, Any]) -> None:
    write_whole(git.folder / "hub.json", json.dumps(settings).encode())


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to large file storage. An empty one never does."""
    return size > 0 and (size >= LARGE_FILE_BYTES or path.endswith(LARGE_FILE_SUFFIXES))


def message(header: Mapping[str, Any]) -> str:
    """A commit's message from the header that the client sent."""
    return f"{header.get('summary') or 'no message'}\n\n{header.get('description') or ''}".strip()


def date(commit: Commit) -> str:
    return datetime.fromtimestamp(commit.when_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def row(entry: Entry) -> dict[str, Any]:
    """A row of `tree` and `paths-info`."""
    kind = "directory" if entry.is_folder else "file"
    lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    shown = {"type": kind, "path": entry.path, "oid": entry.oid, "size": entry.size}
    return {**shown, "lfs": lfs} if entry.sha256 else shown


def sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    """A file in a repository's info, with sizes and oids when the caller asked for `blobs`."""
    if not blobs:
        return {"rfilename": entry.path}
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    shown = {"rfilename": entry.path, "size": entry.size, "blobId": entry.oid}
    return {**shown, "lfs": lfs} if entry.sha256 else shown


def log_row(commit: Commit) -> dict[str, Any]:
    """A row of `commits`."""
    title, _, rest = commit.message.partition("\n\n")
    authors = [{"user": commit.author}]
    return {"id": commit.oid, "title": title, "message": rest, "authors": authors, "date": date(commit)}
