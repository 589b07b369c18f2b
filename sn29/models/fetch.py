"""A repository's files from the Hub into a local folder: resumed where it was cut, every byte checked on arrival.

Beside the folder `to` stands `to.part` while a fetch is under way: `parts/OID` grow and survive a kill, `files/` holds
what was checked. At the end `files/` becomes `to` in one rename, so that a folder named `to` is always whole.

A line that drops, stalls, ends early or forgets the Range costs another request for the rest; one that changes bytes
costs the file again. Only a file that comes with the same wrong bytes twice is the repository's fault.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import ModelId, RepoFile, RepoListing

SPARE_DISK_BYTES = 256 << 20
"""What a fetch leaves free on the disk, for the databases and logs that share it."""
_CUTS_WITHOUT_PROGRESS = 5
_PROGRESS_BYTES = 100_000
"""What a connection must bring to count as progress: a line that drops every 1 kB is given up, not asked for ever."""
_DISK_CHECK_BYTES = 64 << 20
"""Others write to the disk too: what is left is looked at again each time that so much has come."""
_LONGEST_PAUSE_S = 8.0
_SILENCE_S = 20.0
_READ_BYTES = 1 << 20


class FileSource(Protocol):
    """Where files come from; `sn29.hub.Hub` is one."""

    def stream(self, repo: ModelId, path: str, *, start: int = 0, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        """The file's bytes from `start` on, one attempt, no silence longer than `timeout_s`."""


@dataclass(frozen=True, slots=True)
class _Download:
    """One call of `fetch`: from where, until when, and who is told."""

    hub: FileSource
    model: ModelId
    ends: float
    """By the monotonic clock."""
    silence_s: float
    progress: Callable[[int], None]
    say: Callable[[str, str], None]

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
    progress: Callable[[int], None] = lambda num_bytes: None,
    room: Callable[[int], object] | None = None,
    silence_s: float = _SILENCE_S,
    say: Callable[[str, str], None] = lambda event, sentence: None,
) -> Path:
    """Bring the listed files, or those whose path `only` takes, into the folder `to`, and return it.

    `to` must be named for one revision: a folder of that name that has every file at its size is taken as it is,
    without a request. `progress` is told the number of bytes each time that some came over the wire; what it raises
    ends the fetch. `room` is asked for the bytes that are still to come, before the first request; it makes them free
    or raises Unavailable (default: looks whether the disk has them: see also `disk.Disk.make_room`). `silence_s` is the
    longest silence of the Hub, `say(event, sentence)` is told of every fault that was dealt with.

    Raises Rejected(FORBIDDEN_FILE) for a path that leads out of the folder, Rejected(CORRUPT) for a file that arrived
    twice with the same other bytes than the listing says, what the Hub says no with, and Unavailable when the Hub, the
    disk or the deadline ends it; what has come by then is kept for the next call.
    """
    wanted = [file for file in listing.files if only(file.path)]
    _check_paths([file.path for file in wanted], str(listing.model))
    if all(_is_there(to, file) for file in wanted) and to.is_dir():
        return to
    download = _Download(hub, listing.model, time.monotonic() + deadline_s, silence_s, progress, say)
    try:
        return _bring(download, wanted, to, room)
    except OSError as error:
        raise Unavailable(str(listing.model), f"the disk: {error.strerror}") from error


def _bring(download: _Download, wanted: list[RepoFile], to: Path, room: Callable[[int], object] | None) -> Path:
    """`fetch`, once the paths are known to be plain."""
    work = to.with_name(to.name + ".part")
    files, parts = work / "files", work / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if to.exists() and not files.exists():  # fetched before, with fewer files
        to.rename(files)
    files.mkdir(exist_ok=True)
    missing = [file for file in wanted if not _is_there(files, file)]
    to_come = sum(file.size for file in missing) - sum(part.stat().st_size for part in parts.iterdir())
    if room is not None:
        room(to_come)
    check_free(parts, to_come)
    for file in missing:
        part = parts / file.oid.replace(":", "-")
        try:
            _fetch_file(download, file, part)
        except Rejected as error:
            if error.reason is Reason.CORRUPT:  # nothing of it will be wanted again
                shutil.rmtree(work)
            raise
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
    spelled = [path.casefold() for path in paths]  # some disks do not tell Config.json from config.json
    for path in paths:
        plain = path.isprintable() and not set("\\:") & set(path) and len(path) <= 1000
        if not plain or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in path.split("/")):
            raise Rejected(Reason.FORBIDDEN_FILE, repr(path[:120]), "a plain path inside the repository", where)
        if path in folders or spelled.count(path.casefold()) > 1:
            raise Rejected(Reason.FORBIDDEN_FILE, repr(path[:120]), "one file of that name", where)


def _is_there(folder: Path, file: RepoFile) -> bool:
    path = folder / file.path
    return path.is_file() and path.stat().st_size == file.size


def check_free(folder: Path, num_bytes: int) -> None:
    """Raises Unavailable when the disk of a folder has no place for so many bytes beside what must stay free."""
    free = shutil.disk_usage(folder).free - SPARE_DISK_BYTES
    if num_bytes > free:
        raise Unavailable("disk", f"{num_bytes:,} bytes of disk are needed, {max(0, free):,} may be used")


def _fetch_file(download: _Download, file: RepoFile, part: Path) -> None:
    """Complete `part` and check it; wrong bytes are thrown away and fetched once more."""
    where = f"{download.model} {file.path}"
    wrong: list[str] = []
    while len(wrong) < 2:
        found = _complete(download, file, part)
        if found == file.oid:
            return
        part.unlink()
        wrong.append(found)
        download.say("wrong_bytes", f"{where}: {found} came instead of {file.oid}; thrown away")
    if wrong[0] != wrong[1]:
        raise Unavailable(where, f"other bytes came each time ({wrong[0]}, then {wrong[1]}): the line or our disk changes them")
    raise Rejected(Reason.CORRUPT, wrong[0], file.oid, where)


def _complete(download: _Download, file: RepoFile, part: Path) -> str:
    """Append to `part` what it lacks, over as many connections as it takes; the oid of what it then holds, if whole."""
    part.touch()
    where, digest = f"{download.model} {file.path}", _start_digest(file)
    with part.open("r+b") as out:
        while data := out.read(_READ_BYTES):
            digest.update(data)
            download.left_s()
        cuts = 0
        while out.tell() < file.size:
            before = out.tell()
            error = _append(download, file, out, digest)
            come = out.tell() - before
            if error is None and come == 0:
                break  # the Hub says that there is no more of it
            if out.tell() == file.size:
                break
            error = error or Unavailable(where, "the reply ended early")
            cuts = 0 if come >= _PROGRESS_BYTES else cuts + 1
            if cuts >= _CUTS_WITHOUT_PROGRESS:
                raise error
            download.say("download_cut", f"{error}; goes on at byte {out.tell():,} of {file.size:,}")
            download.pause(error.retry_s or min(_LONGEST_PAUSE_S, 0.25 * 2**cuts), error)
        if out.tell() != file.size:
            return f"{out.tell():,} of {file.size:,} bytes"
    return f"{file.oid.partition(':')[0]}:{digest.hexdigest()}"


def _append(download: _Download, file: RepoFile, out: BinaryIO, digest: hashlib._Hash) -> Unavailable | None:
    """One connection: write what it brings, and no more than the file's size. What ended it before its time, if anything."""
    timeout_s = min(download.silence_s, download.left_s())
    checked = out.tell()
    with closing(download.hub.stream(download.model, file.path, start=out.tell(), timeout_s=timeout_s)) as pieces:
        while out.tell() < file.size:
            try:
                data = next(pieces, b"")
            except Unavailable as error:
                return error
            if not data:
                return None
            taken = data[: file.size - out.tell()]
            out.write(taken)
            digest.update(taken)
            download.progress(len(taken))
            download.left_s()
            if out.tell() - checked >= _DISK_CHECK_BYTES:
                checked = out.tell()
                check_free(Path(out.name).parent, file.size - checked)
    return None


def _start_digest(file: RepoFile) -> hashlib._Hash:
    """git hashes a header with the size before the content; large file storage the content alone."""
    return hashlib.sha256() if file.oid.startswith("sha256:") else hashlib.sha1(b"blob %d\0" % file.size)
