"""Text: evaluation samples drawn from pinned parquet files, and training documents. The only import of `datasets`.

`draw` gives every validator the same samples: each choice is a number from SHA-256 over the data set's revision, the
hash of the block that opens the window, the competition and the window's index. It never depends on where the files
lie: it sees them through `DataFiles`, a list of paths and a way to read them in pieces.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Sample

ROW_GROUPS = 15
"""Row groups that a draw is spread over. One costs one chunk of the text column, 2.1 MB at 1000 rows of web text: 15 of
them 32 MB and 30 requests, against 5 MB for two groups, whose neighbours are often alike."""
MAX_GROUP_BYTES = 20_000_000
"""Largest text column of one row group, unpacked. A row group is read whole, and some files have one of gigabytes."""


class DataFiles(Protocol):
    """A data set at one revision, as far as a draw needs it."""

    @property
    def revision(self) -> str:
        """Names the content for good: a Hub commit, or a hash of the files."""
        ...

    def files(self) -> tuple[tuple[str, int], ...]:
        """(path with forward slashes, size in bytes) of all files. May raise Unavailable."""
        ...

    def open(self, path: str) -> BinaryIO:
        """A file to seek and read in; the caller closes it. May raise Unavailable, also when it is read."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """The parquet files below a folder of this machine, which must not change while it is used."""

    folder: Path

    @cached_property
    def revision(self) -> str:
        """sha256 hex over the sorted paths and the sha256 of each file; read once per object (7 MB: 10 ms)."""
        entries = []
        for path, _ in self.files():
            with (self.folder / path).open("rb") as file:
                entries.append((path, hashlib.file_digest(file, "sha256").hexdigest()))
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def files(self) -> tuple[tuple[str, int], ...]:
        found = ((p.relative_to(self.folder).as_posix(), p.stat().st_size) for p in self.folder.rglob("*.parquet"))
        return tuple(sorted(found))

    def open(self, path: str) -> BinaryIO:
        return (self.folder / path).open("rb")


# --- evaluation samples -----------------------------------------------------------------------------------------------


def draw(
    data: DataFiles,
    pattern: str,
    column: str,
    count: int,
    max_chars: int,
    *,
    block_hash: str,
    competition: str,
    window: int,
) -> tuple[Sample, ...]:
    """`count` different samples, in the order in which they were drawn; texts are `capped` to `max_chars` characters.

    The files that match the pattern are taken in proportion to their size, a file's row groups in proportion to their
    rows, and of each row group an equal share of its rows. Blank texts and texts drawn before are passed over.
    Raises Unavailable when a file cannot be read, Rejected(DATASET) when the files cannot serve a draw.
    """
    files = sorted((path, size) for path, size in data.files() if _matches(path, pattern))
    if not files:
        raise Rejected(Reason.DATASET, "no file", f"files that match {pattern}", data.revision)
    seed = json.dumps([data.revision, block_hash, competition, window])
    share = -(-count // ROW_GROUPS)
    samples: dict[str, Sample] = {}
    seen: list[_RowGroup] = []
    for group in _row_groups(data, files, column, _Numbers(seed)):
        seen.append(group)
        _take(samples, min(len(samples) + share, count), _texts(data, group, column, max_chars, seed))
        if len(samples) == count:
            return tuple(samples.values())
    for group in seen:  # a small data set: every row group has given its share, so take what they have left
        _take(samples, count, _texts(data, group, column, max_chars, seed))
    if len(samples) < count:
        raise Rejected(Reason.DATASET, f"{len(samples)} different texts", f"at least {count}", pattern)
    return tuple(samples.values())


def capped(text: str, max_chars: int) -> str:
    """The text, or its beginning of at most `max_chars` characters, cut at the last space (in a word if it has none).

    The space itself goes too. A cut depends on characters alone, so that it is the same for all tokenizers.
    """
    if len(text) <= max_chars:
        return text
    at = text.rfind(" ", 0, max_chars)
    return text[: at if at > 0 else max_chars]


@dataclass(frozen=True, slots=True)
class _RowGroup:
    path: str
    index: int
    num_rows: int


class _Numbers:
    """Whole numbers that nobody can steer, all equally likely: SHA-256 of a seed and a counter, with rejection."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self._count = 0

    def below(self, limit: int) -> int:
        """Uniform over 0..limit-1."""
        usable = 2**256 - 2**256 % limit
        while True:
            digest = hashlib.sha256(self._seed + b"\n%d" % self._count).digest()
            self._count += 1
            if (number := int.from_bytes(digest)) < usable:
                return number % limit

    def pick(self, sizes: Sequence[int]) -> int:
        """An index, in proportion to the sizes."""
        left = self.below(sum(sizes))
        for index, size in enumerate(sizes):
            if left < size:
                return index
            left -= size
        raise AssertionError("sizes changed while one was picked")


def _matches(path: str, pattern: str) -> bool:
    """Part by part between the slashes, so `*` never stands for a slash."""
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _row_groups(data: DataFiles, files: Sequence[tuple[str, int]], column: str, numbers: _Numbers) -> Iterator[_RowGroup]:
    """Every row group that has rows, once, in drawn order. A file's footer is read when the file is first drawn."""
    left: dict[str, list[_RowGroup]] = {}
    open_files = [(path, size) for path, size in files if size]
    while open_files:
        path, size = open_files[numbers.pick([size for _, size in open_files])]
        if path not in left:
            left[path] = _groups_of(path, _footer(data, path), column)
        groups = left[path]
        if groups:
            yield groups.pop(numbers.pick([group.num_rows for group in groups]))
        if not groups:
            open_files.remove((path, size))


def _groups_of(path: str, footer: pq.FileMetaData, column: str) -> list[_RowGroup]:
    """The file's row groups with rows. Raises Rejected(DATASET) when one is too large or the column is not there."""
    kinds = {(leaf := footer.schema.column(at)).path: leaf.logical_type.type for at in range(footer.num_columns)}
    if kinds.get(column) != "STRING":
        got = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())[:200]
        raise Rejected(Reason.DATASET, f"columns {got}", f"a column {column} of strings", path)
    at = list(kinds).index(column)
    groups = []
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if (num_bytes := group.column(at).total_uncompressed_size) > MAX_GROUP_BYTES:
            got = f"{num_bytes} bytes of {column} in row group {index}"
            raise Rejected(Reason.DATASET, got, f"at most {MAX_GROUP_BYTES}", path)
        if group.num_rows:
            groups.append(_RowGroup(path, index, group.num_rows))
    return groups


_footers: dict[tuple[str, str], pq.FileMetaData] = {}
"""By revision and path, the newest last. A footer is 480 kB at 120 row groups of 10 columns."""
_MAX_FOOTERS = 64


def _footer(data: DataFiles, path: str) -> pq.FileMetaData:
    key = (data.revision, path)
    if key not in _footers:
        with _reading(path), data.open(path) as file:
            _footers[key] = pq.ParquetFile(file).metadata
        if len(_footers) > _MAX_FOOTERS:
            del _footers[next(iter(_footers))]
    return _footers[key]


def _texts(data: DataFiles, group: _RowGroup, column: str, max_chars: int, seed: str) -> Iterator[str]:
    """The capped texts of a row group in drawn order, without the blank ones."""
    footer = _footer(data, group.path)
    with _reading(group.path), data.open(group.path) as file:
        table = pq.ParquetFile(file, metadata=footer).read_row_group(group.index, [column], use_threads=False)
        rows = table[column]
    numbers = _Numbers(json.dumps([seed, group.path, group.index]))
    left = list(range(len(rows)))
    while left:
        at = numbers.below(len(left))
        left[at], left[-1] = left[-1], left[at]
        text = capped(rows[left.pop()].as_py() or "", max_chars)
        if text.strip():
            yield text


def _take(samples: dict[str, Sample], until: int, texts: Iterator[str]) -> None:
    """Adds the texts that are new, until there are so many samples."""
    while len(samples) < until and (text := next(texts, None)) is not None:
        id_ = hashlib.sha256(text.encode()).hexdigest()[:32]
        samples.setdefault(id_, Sample(id_, text))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Names the file in what goes wrong with it."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise Rejected(Reason.DATASET, " ".join(str(error).split())[:200], "a parquet file", path) from error
    except OSError as error:
        raise Unavailable(path, " ".join(str(error).split())[:200]) from error


# --- training text ----------------------------------------------------------------------------------------------------


def documents(files: Sequence[Path], column: str, *, seed: int, shuffle_buffer: int = 0, skip: int = 0) -> Iterator[str]:
    """The documents of parquet files, once: the same order for the same seed, from document number `skip` on.

    Shuffled are the files, then the documents through a buffer of `shuffle_buffer` (0: as they lie, files in given
    order). Skipping reads what it skips: 15,000 documents take 0.1 s. Raises Rejected(DATASET) without a file.
    """
    if not files:
        raise Rejected(Reason.DATASET, "no file", "at least one parquet file")
    # Imported here: it takes 0.8 s, and its first stream imports torch; a validator, which only draws, needs neither.
    from datasets import IterableDataset

    # Not IterableDataset.from_parquet: a stream of it that is open when the interpreter ends aborts the process
    # (the scanner's threads, pyarrow 26), about every second time.
    source = {"files": [str(path) for path in files], "column": column}
    stream = IterableDataset.from_generator(_rows, gen_kwargs=source)
    if shuffle_buffer > 1:
        # One file at a time fills the buffer; the default of ten is 20 times slower.
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer, max_buffer_input_shards=1)
    return (row["text"] for row in stream.skip(skip))


def _rows(files: Sequence[str], column: str) -> Iterator[dict[str, str]]:
    for path in files:
        with _reading(path), Path(path).open("rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=[column], use_threads=False):
                yield from ({"text": text} for text in batch[column].to_pylist())
