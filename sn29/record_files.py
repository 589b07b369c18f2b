"""Round records as files: `<block>-<first 16 hex digits of the sha256>.json`, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.round_record import MAX_BYTES, RoundRecord, decode, encode

FOLDER = "records"
"""Of a validator's state folder: the one that its records are in."""
_NAME = re.compile(r"(?P<block>[0-9]{1,15})-(?P<digest>[0-9a-f]{16})\.json")


def read(path: Path) -> RoundRecord:
    """Raises Rejected(RECORD) for what is no record, or not the one that the file's name says; Unavailable when the file
    cannot be read. A file of any other name is read without that check."""
    text = read_text(path)
    named = _NAME.fullmatch(path.name)
    digest = hashlib.sha256(text).hexdigest()
    if named and named["digest"] != digest[:16]:
        raise Rejected(Reason.RECORD, f"sha256 {digest[:16]}...", f"{named['digest']}..., as its name says", str(path))
    record = decode(text, str(path))
    if named and int(named["block"]) != record.head.block:
        raise Rejected(Reason.RECORD, f"block {record.head.block}", f"{named['block']}, as its name says", str(path))
    return record


def read_text(path: Path) -> bytes:
    """The bytes of a file, one more than MAX_BYTES at most. Raises Unavailable."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Unavailable(str(path), error.strerror or str(error)) from None


def written(path: Path) -> datetime:
    """When the file was written, by this machine's clock. Raises Unavailable."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError as error:
        raise Unavailable(str(path), error.strerror or str(error)) from None


def write(folder: Path, record: RoundRecord) -> Path:
    """The file, complete and flushed to disk; writing the same record again changes nothing. Raises Unavailable."""
    text = encode(record)
    path = folder / f"{record.head.block}-{hashlib.sha256(text).hexdigest()[:16]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)  # mkstemp makes it private; a record is for everybody
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
        flush(folder)
    except OSError as error:
        raise Unavailable(str(path), error.strerror or str(error)) from None
    return path


def keep_only(path: Path) -> None:
    """Deletes other records of the same block beside this one."""
    block = path.name.partition("-")[0]
    for other in path.parent.glob(f"{block}-*.json"):
        if other != path and _NAME.fullmatch(other.name):
            other.unlink()


def paths(named: Iterable[Path]) -> list[Path]:
    """Files as they are, and of a folder the records in it; by block as far as names tell it. Raises Rejected(SETTING)
    when there is none."""
    found: list[Path] = []
    for path in named:
        found += [p for p in path.iterdir() if _NAME.fullmatch(p.name)] if path.is_dir() else [path]
    if not found:
        raise Rejected(Reason.SETTING, ", ".join(map(str, named)) or "nothing", "files or folders with round records")
    return sorted(found, key=_by_block)


def _by_block(path: Path) -> tuple[int, str]:
    """A shell lists 10080-... before 7200-...; files of other names come first, in their own order."""
    named = _NAME.fullmatch(path.name)
    return (int(named["block"]), path.name) if named else (-1, "")


def read_all(named: Iterable[Path]) -> Iterator[RoundRecord]:
    """One record after the other, so that a year of them needs the memory of one. Raises as `read` and `paths` do."""
    return map(read, paths(named))


Skip = Callable[[Sn29Error], None]
"""Is told of a record that cannot be read, which is then passed over: one that is just being copied here, say."""


def _raise(error: Sn29Error) -> None:
    raise error


def since(named: Path, block: int, skip: Skip = _raise, *, last: int | None = None) -> Iterator[RoundRecord]:
    """Records of later blocks than this one, by block: of a folder, or the one file. None where nothing is yet: a validator's
    folder appears with its first record. Names of blocks after `last`, which no chain has reached, are passed over. Raises as
    `read` does, unless `skip` is told instead; Unavailable for a folder that cannot be read."""
    for path in _by_blocks(named, last):
        if not -1 < _by_block(path)[0] <= block:
            try:
                record = read(path)
            except Sn29Error as error:
                skip(error)
            else:
                if record.head.block > block:
                    yield record


def newest(named: Path, skip: Skip = _raise, *, last: int | None = None) -> RoundRecord | None:
    """The record of the latest block, of a folder or the one file; None where nothing is yet. Arguments, errors as of `since`."""
    return next((record for _, record in newest_first(named, skip, last=last)), None)


def newest_first(named: Path, skip: Skip = _raise, *, last: int | None = None) -> Iterator[tuple[Path, RoundRecord]]:
    """Every file and its record, the latest block first. Arguments and errors as of `since`."""
    for path in reversed(_by_blocks(named, last)):
        try:
            record = read(path)
        except Sn29Error as error:
            skip(error)
        else:
            yield path, record


def has_any(named: Path) -> bool:
    """Whether a record's file is there, whatever is in it. Raises Unavailable."""
    return bool(_by_blocks(named))


def _by_blocks(named: Path, last: int | None = None) -> list[Path]:
    """Of a validator's state folder the records are in the folder FOLDER in it, from the first one on. Raises Unavailable."""
    try:
        named = named / FOLDER if (named / FOLDER).is_dir() else named
        if not named.is_dir():
            return [named] if named.exists() else []
        found = [p for p in named.iterdir() if _NAME.fullmatch(p.name)]
    except OSError as error:
        raise Unavailable(str(named), error.strerror or str(error)) from None
    return sorted((p for p in found if last is None or _by_block(p)[0] <= last), key=_by_block)


def flush(path: Path) -> None:
    """A file, or the names in a folder, to the disk: a new name survives a power cut only when its folder is flushed too.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
