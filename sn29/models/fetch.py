"""A repository's files from the Hub into a local folder: resumed where it was cut, every byte checked on arrival.

Beside the folder `to` stands `to.part` while a fetch is under way: `parts/OID` grow and survive a kill, `files/` holds
what was checked. At the end `files/` becomes `to` in one rename, so that a folder named `to` is always whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import ModelId, RepoFile, RepoListing

SPARE_DISK_BYTES = 256 << 20
"""What a fetch leaves free on the disk, for the databases and logs that share it."""
_CUTS_WITHOUT_PROGRESS = 5
_LONGEST_PAUSE_S = 8.0
_SILENCE_S = 20.0
_READ_BYTES = 1 << 20


class FileSource(Protocol):
    """Where files come from; `sn29.hub.Hub` is one."""

    def stream(self, repo: ModelId, path: str, *, start: int = 0, timeout_s: float | None = None) -> Iterator[bytes]:
        """The file's bytes from `start` on, one attempt, no silence longer than `timeout_s`."""


@dataclass(frozen=True, slots=True)
class _Download:
    """One call of `fetch`: from where, until when, and who is told."""

    hub: FileSource
    model: ModelId
    ends: float
    """By the monotonic clock."""
    progress: Callable[[int], None]

    def left_s(self) -> float:
        """Seconds left, more than 0. Raises Unavailable at the deadline."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise Unavailable(str(self.model), "the download did not end in time")
        return left

    def pause(self, seconds: float, error: Unavailable) -> None:
        """Sleep, or raise the error at once when less time than that is left."""
        if seconds >= self.left_s():
            raise error
        time.sleep(seconds)


def fetch(
    hub: FileSource,
    listing: RepoListing,
    to: Path,
    *,
    only: Callable[[str], bool] = lambda path: True,
    deadline_s: float,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Bring the listed files, or those whose path `only` takes, into the folder `to`, and return it.

    `to` must be named for one revision: a folder of that name that has every file at its size is taken as it is,
    without a request. `progress` is told the number of bytes each time that some came over the wire. Raises
    Rejected(FORBIDDEN_FILE) for a path that leads out of the folder, Rejected(CORRUPT) for a file that arrived twice
    with other bytes than the listing says, what the Hub says no with, and Unavailable when the Hub, the disk or the
    deadline ends it; what has come by then is kept for the next call.
    """
    wanted = [file for file in listing.files if only(file.path)]
    _check_paths([file.path for file in wanted], str(listing.model))
    if all(_is_there(to, file) for file in wanted) and to.is_dir():
        return to
    download = _Download(hub, listing.model, time.monotonic() + deadline_s, progress or (lambda num_bytes: None))
    work = to.with_name(to.name + ".part")
    files, parts = work / "files", work / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if to.exists() and not files.exists():  # fetched before, with fewer files
        to.rename(files)
    files.mkdir(exist_ok=True)
    missing = [file for file in wanted if not _is_there(files, file)]
    _check_disk(missing, parts, str(listing.model))
    for file in missing:
        part = parts / file.oid.replace(":", "-")
        _fetch_file(download, file, part)
        (files / file.path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, files / file.path)
    if to.exists():
        shutil.rmtree(to)
    files.rename(to)
    shutil.rmtree(work)
    return to


def _check_paths(paths: list[str], where: str) -> None:
    """Raises Rejected(FORBIDDEN_FILE) for a path that is not plainly inside its folder, or that two files claim."""
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    for path in paths:
        plain = path.isprintable() and not set("\\:") & set(path) and len(path) <= 1000
        if not plain or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in path.split("/")):
            raise Rejected(Reason.FORBIDDEN_FILE, repr(path[:120]), "a plain path inside the repository", where)
        if path in folders or paths.count(path) > 1:
            raise Rejected(Reason.FORBIDDEN_FILE, repr(path[:120]), "one file of that name", where)


def _is_there(folder: Path, file: RepoFile) -> bool:
    path = folder / file.path
    return path.is_file() and path.stat().st_size == file.size


def _check_disk(missing: list[RepoFile], parts: Path, where: str) -> None:
    needed = sum(file.size for file in missing) - sum(part.stat().st_size for part in parts.iterdir())
    free = shutil.disk_usage(parts).free - SPARE_DISK_BYTES
    if needed > free:
        raise Unavailable(where, f"needs {needed:,} bytes of disk, {max(0, free):,} may be used")


def _fetch_file(download: _Download, file: RepoFile, part: Path) -> None:
    """Complete `part` and check it; wrong bytes are thrown away and fetched once more."""
    for last in (False, True):
        found = _complete(download, file, part)
        if found == file.oid:
            return
        part.unlink()
        if last:
            raise Rejected(Reason.CORRUPT, found, file.oid, f"{download.model} {file.path}")


def _complete(download: _Download, file: RepoFile, part: Path) -> str:
    """Append to `part` what it lacks, over as many connections as it takes; the oid of what it then holds, if whole."""
    part.touch()
    digest = _start_digest(file)
    with part.open("r+b") as out:
        while data := out.read(_READ_BYTES):
            digest.update(data)
            download.left_s()
        cuts = 0
        while out.tell() < file.size:
            before = out.tell()
            try:
                _append(download, file, out, digest)
                break  # the body ended where the server said: a file still short then is not as stated
            except Unavailable as error:
                cuts = 0 if out.tell() > before else cuts + 1
                if cuts >= _CUTS_WITHOUT_PROGRESS:
                    raise
                download.pause(error.retry_s or min(_LONGEST_PAUSE_S, 0.25 * 2**cuts), error)
        if out.tell() != file.size:
            return f"{out.tell():,} of {file.size:,} bytes"
    return f"{file.oid.partition(':')[0]}:{digest.hexdigest()}"


def _append(download: _Download, file: RepoFile, out: BinaryIO, digest: hashlib._Hash) -> None:
    """One connection: write what it brings, and no more than the file's size."""
    timeout_s = min(_SILENCE_S, download.left_s())
    for data in download.hub.stream(download.model, file.path, start=out.tell(), timeout_s=timeout_s):
        taken = data[: file.size - out.tell()]
        out.write(taken)
        digest.update(taken)
        download.progress(len(taken))
        if out.tell() == file.size:
            return
        download.left_s()


def _start_digest(file: RepoFile) -> hashlib._Hash:
    """git hashes a header with the size before the content; large file storage the content alone."""
    return hashlib.sha256() if file.oid.startswith("sha256:") else hashlib.sha1(b"blob %d\0" % file.size)
