"""Text: evaluation samples drawn from pinned parquet files, and training text. The only import of `datasets`.

`draw` gives every validator the same samples: each choice is a number from SHA-256 over the data set's revision, the
hash of the block that opens the window, the competition and the window's index. It never depends on where the files
lie: it sees them through `DataFiles`, a list of paths and a way to read them in pieces.

`TrainingText` streams through the same `DataFiles`, for ever, in an order that a stated seed gives, from any document on.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Sample

if TYPE_CHECKING:
    from datasets import IterableDataset

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
        """A folder named x.parquet, which other programs fill with parts, is a folder; a link to nothing is no file."""
        found = (p for p in self.folder.rglob("*.parquet") if p.is_file())
        return tuple(sorted((p.relative_to(self.folder).as_posix(), p.stat().st_size) for p in found))

    def open(self, path: str) -> BinaryIO:
        return (self.folder / path).open("rb")


@dataclass(frozen=True)
class LocalFile(LocalFolder):
    """One file of a folder, whatever its name ends in and whatever lies beside it."""

    name: str

    def files(self) -> tuple[tuple[str, int], ...]:
        return ((self.name, (self.folder / self.name).stat().st_size),)


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
    files = matching(data, pattern)
    seed = json.dumps([data.revision, block_hash, competition, window])
    share = -(-count // ROW_GROUPS)
    samples: dict[str, Sample] = {}
    seen: list[_RowGroup] = []
    for group in _row_groups(files, column, _Numbers(seed), lambda path: _footer(data, path)):
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


def sample_id(text: str) -> str:
    """What names a sample: the first 32 hex digits of the SHA-256 of its (capped) text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def matching(data: DataFiles, pattern: str) -> tuple[tuple[str, int], ...]:
    """(path, bytes) of the files that match, sorted. `*` never stands for a slash. Raises Rejected(DATASET), Unavailable."""
    files = data.files()
    found = tuple(sorted((path, size) for path, size in files if _matches(path, pattern)))
    if not found:
        raise Rejected(Reason.DATASET, f"no file of {len(files)}", "files that match it", pattern)
    return found


@dataclass(frozen=True, slots=True)
class _RowGroup:
    path: str
    index: int
    num_rows: int
    num_bytes: int
    """Of the text column, unpacked."""


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


def _row_groups(
    files: Sequence[tuple[str, int]],
    column: str,
    numbers: _Numbers,
    footer: Callable[[str], pq.FileMetaData],
    max_bytes: int = MAX_GROUP_BYTES,
) -> Iterator[_RowGroup]:
    """Every row group that has rows, once, in drawn order. A file's footer is read when the file is first drawn."""
    left: dict[str, list[_RowGroup]] = {}
    open_files = [(path, size) for path, size in files if size]
    while open_files:
        path, size = open_files[numbers.pick([size for _, size in open_files])]
        if path not in left:
            left[path] = _groups_of(path, footer(path), column, max_bytes)
        groups = left[path]
        if groups:
            yield groups.pop(numbers.pick([group.num_rows for group in groups]))
        if not groups:
            open_files.remove((path, size))


def _groups_of(path: str, footer: pq.FileMetaData, column: str, max_bytes: int = MAX_GROUP_BYTES) -> list[_RowGroup]:
    """The file's row groups with rows. Raises Rejected(DATASET) when one is too large or the column is not there."""
    kinds = {(leaf := footer.schema.column(at)).path: leaf.logical_type.type for at in range(footer.num_columns)}
    if kinds.get(column) != "STRING":
        got = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())[:200]
        raise Rejected(Reason.DATASET, f"columns {got}", f"a column {column} of strings", path)
    at = list(kinds).index(column)
    groups = []
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if (num_bytes := group.column(at).total_uncompressed_size) > max_bytes:
            got = f"{num_bytes} bytes of {column} in row group {index}"
            raise Rejected(Reason.DATASET, got, f"at most {max_bytes}", path)
        if group.num_rows:
            groups.append(_RowGroup(path, index, group.num_rows, num_bytes))
    return groups


_footers: dict[tuple[str, str], pq.FileMetaData] = {}
"""By revision and path, the newest last. A footer is 480 kB at 120 row groups of 10 columns."""
_MAX_FOOTERS = 64


def _footer(data: DataFiles, path: str) -> pq.FileMetaData:
    key = (data.revision, path)
    if key not in _footers:
        _footers[key] = _read_footer(data, path)
        if len(_footers) > _MAX_FOOTERS:
            del _footers[next(iter(_footers))]
    return _footers[key]


def _read_footer(data: DataFiles, path: str) -> pq.FileMetaData:
    with _reading(path), data.open(path) as file:
        return pq.ParquetFile(file).metadata


def _read_group(data: DataFiles, group: _RowGroup, footer: pq.FileMetaData, column: str) -> pa.ChunkedArray:
    """The column as large strings, every one of them UTF-8: that is not looked at before a string becomes Python's."""
    with _reading(group.path, f"row group {group.index}: "), data.open(group.path) as file:
        table = pq.ParquetFile(file, metadata=footer).read_row_group(group.index, [column], use_threads=False)
        texts = table[column].cast(pa.large_string())
        texts.validate(full=True)
        return texts


def _texts(data: DataFiles, group: _RowGroup, column: str, max_chars: int, seed: str) -> Iterator[str]:
    """The capped texts of a row group in drawn order, without the blank ones."""
    rows = _read_group(data, group, _footer(data, group.path), column)
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
        id_ = sample_id(text)
        samples.setdefault(id_, Sample(id_, text))


@contextmanager
def _reading(path: str, part: str = "") -> Iterator[None]:
    """Names the file, and the part of it, in what goes wrong with it."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        got = part + " ".join(str(error).split())[:200]
        raise Rejected(Reason.DATASET, got, "a parquet file with text in UTF-8", path) from error
    except OSError as error:
        raise Unavailable(path, " ".join(str(error).split())[:200]) from error


# --- training text ----------------------------------------------------------------------------------------------------

WINDOW_FILES = 16
"""Files whose row groups are mixed with each other. A footer is up to 4 MB (1,000 row groups of 10 columns), so that much
of 16 is read before the first document; a data set with more files is gone through 16 at a time, drawn anew each pass."""
BLOCK_BYTES = 32_000_000
"""Row groups are joined until they hold this much text, unpacked, and their documents are mixed: some 16 row groups of web
text. That much is in memory, and read again when a run is resumed."""
MAX_TRAINING_GROUP_BYTES = 1_000_000_000
"""Largest text column of one row group, unpacked: it is read whole. A file written without a row group size has 2^20 rows
in each, 3 GB of web text: such a file has to be written again with smaller ones."""
_GROUPS_EACH = 8
"""Shards get whole row groups when a window has so many for each, so that one is at most an eighth longer than another;
else each reads all row groups and takes every so-manieth row."""
_ROWS_AT_ONCE = 256
"""Rows that become Python's strings together: 3 times faster than one by one."""


@dataclass(frozen=True)
class TextSource:
    """The text column of the parquet files of a data set that match a pattern."""

    data: DataFiles
    pattern: str
    """`*` never stands for a slash. Empty: every .parquet file."""
    column: str
    weight: float = 1.0
    """Its share of the documents, in proportion to the other sources' weights."""


class TrainingText:
    """Documents for ever, pass after pass in another order, of one of `shards` shards; blank ones are passed over.

    The order depends on the seed, the shards, `block_bytes` and the files alone. All shards together give every document
    once a pass; a shard that is through with its pass starts the next. Files are drawn `WINDOW_FILES` at a time, of these
    the row groups, joined to blocks of `block_bytes`, of these the documents: no buffer that a resumed run has to fill again.
    `state_dict` names the place of the next document, and going on there reads one block (and the window's footers).

    Sources take turns so that at any time each has its share of the documents, to within one: of those that are behind
    theirs comes the one that is soonest a whole document behind (Balinski and Young's quota method). What `exclude` names (ids of
    samples: `sample_id` of the text `capped` to `max_chars` characters, 0 = whole) is never given, whatever a saved state
    was made with. What is read is read by row group, so a data set on the Hub is never downloaded whole.

    Worked example: weights 2 and 1 give sources 0 1 0 0 1 0 ...; the second source's next pass begins when it has ended.
    """

    def __init__(
        self,
        sources: Sequence[TextSource],
        *,
        seed: int,
        shards: int = 1,
        shard: int = 0,
        exclude: Collection[str] = (),
        max_chars: int = 0,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Raises Rejected(SETTING | DATASET) for what cannot serve, Unavailable when the files cannot be listed."""
        if not sources:
            raise Rejected(Reason.SETTING, "no source", "at least one", "training text")
        if not 0 <= shard < shards:
            raise Rejected(Reason.SETTING, f"shard {shard} of {shards}", "0 <= shard < shards", "training text")
        for source in sources:
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise Rejected(Reason.SETTING, source.weight, "a finite weight above 0", f"training text {source.pattern}")
        self._exclude, self._max_chars = frozenset(exclude), max_chars
        total = math.fsum(source.weight for source in sources)
        self._shares = [source.weight / total for source in sources]
        deal = _Deal(shards, shard, block_bytes)
        self._streams = [_SourceStream(source, (seed, number), deal) for number, source in enumerate(sources)]
        self._of = {
            "seed": seed, "shards": shards, "shard": shard, "block_bytes": block_bytes,
            "sources": [stream.named() for stream in self._streams],
        }  # fmt: skip

    def __iter__(self) -> TrainingText:
        return self

    def __next__(self) -> str:
        """The next document. Raises Unavailable when it cannot be read: asked again, it goes on with the same document."""
        given = [stream.given for stream in self._streams]
        due = [share * (sum(given) + 1) - so_far for share, so_far in zip(self._shares, given, strict=True)]
        behind = (number for number, behind_by in enumerate(due) if behind_by > 1e-9)
        first = min(behind, key=lambda number: ((given[number] + 1) / self._shares[number], -due[number]))
        return self._streams[first].next(self._is_wanted)

    def state_dict(self) -> dict[str, Any]:
        """The place of the next document, for JSON: some 300 bytes for each source."""
        return {"of": self._of, "at": [stream.state() for stream in self._streams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with exactly the next document. Raises Rejected(SETTING) for a state of other files, seed or shards."""
        of = state.get("of", {})
        for name, ours in self._of.items():
            if of.get(name) != ours:
                raise Rejected(Reason.SETTING, of.get(name), ours, f"{name} of the training text that a checkpoint goes on with")
        for stream, at in zip(self._streams, state["at"], strict=True):
            stream.load(at)

    def _is_wanted(self, text: str) -> bool:
        if not text.strip():
            return False
        if not self._exclude:
            return True
        return sample_id(capped(text, self._max_chars) if self._max_chars else text) not in self._exclude


def one_pass(source: TextSource, seed: int) -> Iterator[str]:
    """Every document of a source once, in the order in which one process trains on it where it is the only, or the first,
    source: `WINDOW_FILES` files after the other. Raises as `TrainingText` does."""
    rows = _SourceStream(source, (seed, 0), _Deal(1, 0, BLOCK_BYTES)).row
    while (text := rows()) is not None:
        if text.strip():
            yield text


def spread(source: TextSource, seed: int) -> Iterator[str]:
    """Every document of a source once, as a beginning of which stands for all: row groups are drawn over all files, by their
    sizes, and mixed `BLOCK_BYTES` at a time. Footers stay in memory, of drawn files. Raises as `TrainingText` does."""
    footers: dict[str, pq.FileMetaData] = {}

    def footer(path: str) -> pq.FileMetaData:
        return footers.setdefault(path, _read_footer(source.data, path))

    numbers = _Numbers(json.dumps(["spread", seed]))
    groups = _row_groups(_files_of(source), source.column, numbers, footer, MAX_TRAINING_GROUP_BYTES)
    reader = _BlockReader(source.data, source.column, footers)
    for number, block in enumerate(_joined(groups, BLOCK_BYTES)):
        for _, row in reader.rows([_Block(tuple(block), (seed, number), 0, 1)]):
            if row["text"].strip():
                yield row["text"]


def _joined(groups: Iterable[_RowGroup], block_bytes: int) -> Iterator[list[_RowGroup]]:
    """Neighbours together, until there are so many bytes of them."""
    block: list[_RowGroup] = []
    num_bytes = 0
    for group in groups:
        block.append(group)
        num_bytes += group.num_bytes
        if num_bytes >= block_bytes:
            yield block
            block, num_bytes = [], 0
    if block:
        yield block


@dataclass(frozen=True, slots=True)
class _Deal:
    """Which part of a source is ours."""

    shards: int
    shard: int
    block_bytes: int

    def blocks(self, groups: Sequence[_RowGroup], key: tuple[int, ...]) -> list[_Block]:
        """Our blocks of a window, from the window's row groups in their drawn order.

        Who gets the odd row group or row moves on from window to window and from block to block.
        """
        by_group = len(groups) >= _GROUPS_EACH * self.shards
        mine = groups[(self.shard + sum(key[2:])) % self.shards :: self.shards] if by_group else groups
        parts = 1 if by_group else self.shards
        places = enumerate(_joined(mine, self.block_bytes))
        return [_Block(tuple(g), (*key, n), (self.shard + sum(key[2:]) + n) % parts, parts) for n, g in places]


class _SourceStream:
    """One source's documents of one shard, pass after pass."""

    def __init__(self, source: TextSource, key: tuple[int, int], deal: _Deal) -> None:
        self._source, self._key, self._deal = source, key, deal
        self._paths = _files_of(source)
        self.given = 0
        """Documents, of all passes."""
        self._pass = self._window = self._given_before = 0
        """`_given_before`: before this pass."""
        self._footers: dict[str, pq.FileMetaData] = {}
        self._blocks: list[_Block] = []
        self._stream: IterableDataset | None = None
        self._from: dict[str, Any] | None = None
        """Where a stream that is not open yet starts: its state as it was saved."""
        self._rows: Iterator[dict[str, str]] | None = None

    def named(self) -> list[Any]:
        """What a saved state must be of. The files by their paths and sizes: hashing their content takes minutes at 100 GB."""
        files_id = hashlib.sha256(json.dumps(self._paths).encode()).hexdigest()[:16]
        return [self._source.pattern, self._source.column, self._source.weight, files_id]

    def next(self, is_wanted: Callable[[str], bool]) -> str:
        """Raises Unavailable; Rejected(DATASET) when a whole pass has nothing that is wanted."""
        while True:
            text = self.row()
            if text is None:
                if self.given == self._given_before:
                    got = f"no document in a pass over {len(self._paths)} files"
                    limit = f"at least one that may be trained on for each of {self._deal.shards} shards"
                    raise Rejected(Reason.DATASET, got, limit, self._source.pattern)
                self._given_before = self.given
            elif is_wanted(text):
                self.given += 1
                return text

    def row(self) -> str | None:
        """The next row's text, blank or not; None once when a pass is over. Raises Unavailable."""
        while True:
            rows = self._open() if self._rows is None else self._rows
            self._rows = None  # when reading fails it is opened again, at the row that failed
            row = next(rows, None)
            if row is not None:
                self._rows = rows
                return row["text"]
            self._stream = self._from = None
            self._window += 1
            if self._window * WINDOW_FILES >= len(self._paths):
                self._pass, self._window = self._pass + 1, 0
                return None

    def state(self) -> dict[str, Any]:
        return {
            "pass": self._pass, "window": self._window, "given": self.given, "given_before": self._given_before,
            "stream": self._from if self._stream is None else self._stream.state_dict(),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self._pass, self._window = state["pass"], state["window"]
        self.given, self._given_before = state["given"], state["given_before"]
        self._stream, self._from, self._rows = None, state["stream"], None

    def _open(self) -> Iterator[dict[str, str]]:
        at = self._from if self._stream is None else self._stream.state_dict()
        if self._stream is None:
            self._stream = self._window_stream()
        if at is not None:
            block = at["examples_iterable"]
            if block["shard_example_idx"] == self._blocks[block["shard_idx"]].size:  # or it would be read to see that it is over
                at = {**at, "examples_iterable": {**block, "shard_idx": block["shard_idx"] + 1, "shard_example_idx": 0}}
            self._stream.load_state_dict(at)
        return iter(self._stream)

    def _window_stream(self) -> IterableDataset:
        """This window's rows as a stream of `datasets`, whose shards are our blocks."""
        # Imported here: it takes 0.8 s, and its first stream imports torch; a validator, which only draws, needs neither.
        from datasets import IterableDataset
        from datasets.iterable_dataset import ExamplesIterable

        order = _order(len(self._paths), *self._key, self._pass)
        paths = sorted(self._paths[at][0] for at in order[self._window * WINDOW_FILES :][:WINDOW_FILES])
        data, column = self._source.data, self._source.column
        self._footers = {path: footer for path, footer in self._footers.items() if path in paths}
        for path in paths:  # one by one, so that what was read is kept when the next cannot be
            self._footers[path] = self._footers.get(path) or _read_footer(data, path)
        groups = [g for path in paths for g in _groups_of(path, self._footers[path], column, MAX_TRAINING_GROUP_BYTES)]
        key = (*self._key, self._pass, self._window)
        self._blocks = self._deal.blocks([groups[at] for at in _order(len(groups), *key)], key)
        # Not IterableDataset.from_parquet: it cannot be resumed inside of a row group without reading those before, its
        # shuffle is a buffer that a resumed run has lost, and a stream of it that is open when the interpreter ends aborts
        # the process (the scanner's threads, pyarrow 26), about every second time. Nor from_generator, which is this line
        # and a builder: it pickles the connection to name the stream, and leaves a lock file in the user's cache for each.
        reader = _BlockReader(data, column, self._footers)
        return IterableDataset(ExamplesIterable(reader.rows, {"blocks": self._blocks}))


@dataclass(frozen=True, slots=True)
class _Block:
    """Row groups that are read together, and the rows of them that one shard gives: part, part + parts, ... of the order."""

    groups: tuple[_RowGroup, ...]
    key: tuple[int, ...]
    part: int
    parts: int

    @property
    def size(self) -> int:
        """Rows that the shard gives."""
        return len(range(self.part, sum(group.num_rows for group in self.groups), self.parts))


@dataclass(frozen=True, slots=True, eq=False)
class _BlockReader:
    """Reads blocks, for `datasets`."""

    data: DataFiles
    column: str
    footers: Mapping[str, pq.FileMetaData]

    def rows(self, blocks: Sequence[_Block]) -> Iterator[tuple[int, dict[str, str]]]:
        """(a number, row) of each row in the shard's order; a null is an empty text."""
        for block in blocks:
            yield from enumerate({"text": text or ""} for text in self._texts(block))

    def _texts(self, block: _Block) -> Iterator[str | None]:
        read = (_read_group(self.data, group, self.footers[group.path], self.column) for group in block.groups)
        rows = pa.concat_arrays([chunk for texts in read for chunk in texts.chunks])
        order = _order(len(rows), *block.key)[block.part :: block.parts]
        for start in range(0, len(order), _ROWS_AT_ONCE):
            yield from rows.take(pa.array(order[start : start + _ROWS_AT_ONCE])).to_pylist()


def _files_of(source: TextSource) -> tuple[tuple[str, int], ...]:
    if source.pattern:
        return matching(source.data, source.pattern)
    found = tuple(sorted((path, size) for path, size in source.data.files() if path.endswith(".parquet")))
    if not found:
        raise Rejected(Reason.DATASET, "no .parquet file", "at least one", "training text")
    return found


def _order(count: int, *key: int) -> list[int]:
    """A permutation of 0..count-1, the same everywhere: by the raw numbers of Philox under the SHA-256 of the key.

    numpy promises its bit generators' raw numbers to all releases, and not `permutation`.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    numbers = np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(count)
    return [int(at) for at in np.argsort(numbers, kind="stable")]


# --- flat tables ------------------------------------------------------------------------------------------------------

_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_BATCH_ROWS = 50_000


def write_parquet(path: Path, columns: Mapping[str, type], rows: Iterable[Sequence[Any]]) -> int:
    """A parquet file of whole numbers, floats and texts, some rows in memory at a time; how many it has. Raises OSError."""
    schema = pa.schema([(name, _TYPES[kind]) for name, kind in columns.items()])
    left, count = iter(rows), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(left, _BATCH_ROWS)):
            arrays = [pa.array(values, of.type) for values, of in zip(zip(*batch, strict=True), schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            count += len(batch)
    return count
