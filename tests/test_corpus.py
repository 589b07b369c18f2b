"""Draws are the same everywhere and for everybody; training text comes in an order that can be had again."""

import io
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sn29.corpus import LocalFolder, capped, documents, draw
from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Sample


@dataclass
class Shelf:
    """Parquet files in memory, with whatever revision and sizes a test wants to state."""

    revision: str
    content: Mapping[str, bytes]
    sizes: Mapping[str, int] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def files(self) -> tuple[tuple[str, int], ...]:
        return tuple((path, self.sizes.get(path, len(data))) for path, data in list(self.content.items())[::-1])

    def open(self, path: str) -> BinaryIO:
        self.opened.append(path)
        return io.BytesIO(self.content[path])


def parquet(texts: list[str | None], group: int = 10, column: str = "text") -> bytes:
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group)
    return sink.getvalue()


def numbered(first: int, last: int) -> list[str | None]:
    return [f"text number {n}, of some length" for n in range(first, last)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, first in (("a", 0), ("b", 300), ("c", 600)):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(parquet(numbered(first, first + 300)))
    return tmp_path


def ids(
    data: LocalFolder | Shelf, count: int = 40, *, block_hash: str = "0x01", competition: str = "c00", window: int = 7
) -> list[str]:
    drawn = draw(data, "data/*.parquet", "text", count, 1000, block_hash=block_hash, competition=competition, window=window)
    return [sample.id for sample in drawn]


def test_a_draw_is_repeated_to_the_letter(folder: Path) -> None:
    assert ids(LocalFolder(folder)) == ids(LocalFolder(folder))


def test_where_the_files_lie_does_not_matter(folder: Path) -> None:
    local = LocalFolder(folder)
    content = {path: (folder / path).read_bytes() for path, _ in local.files()}
    assert ids(Shelf(local.revision, content)) == ids(local)


@pytest.mark.parametrize("change", [{"block_hash": "0x02"}, {"competition": "c01"}, {"window": 8}])
def test_block_competition_and_window_each_change_the_draw(folder: Path, change: dict[str, Any]) -> None:
    shared = set(ids(LocalFolder(folder))) & set(ids(LocalFolder(folder), **change))
    assert len(shared) < 20  # of 40 from 900; by chance about 2


def test_the_revision_changes_the_draw_and_is_the_content(folder: Path) -> None:
    before = LocalFolder(folder)
    drawn = ids(before)
    (folder / "README.md").write_text("not text that is drawn from")
    assert LocalFolder(folder).revision == before.revision
    (folder / "data" / "c.parquet").write_bytes(parquet(numbered(700, 1000)))
    after = LocalFolder(folder)
    assert after.revision != before.revision
    assert ids(after) != drawn


def test_frozen_draw() -> None:
    """Validators of different versions must agree: these ids change only together with the rule."""
    content = {"data/x.parquet": parquet(numbered(0, 100)), "data/y.parquet": parquet(numbered(100, 160), group=20)}
    shelf = Shelf("revision", content, {"data/x.parquet": 1000, "data/y.parquet": 500})
    drawn = draw(shelf, "data/*.parquet", "text", 6, 17, block_hash="0xab", competition="c00", window=3)
    assert drawn == (
        Sample("3a77ea339a17a2dc88974663a5951b35", "text number 91,"),
        Sample("0fe47e329cf90b11a3cdbedd8c7b6875", "text number 125,"),
        Sample("e93848d56bbf46ebaeea86788b57842e", "text number 111,"),
        Sample("fc162f01a3ee173d1f40051f253ff3c7", "text number 72,"),
        Sample("236bd375b8263f12c8aaf0238667b705", "text number 62,"),
        Sample("cc2fc609a5e6061032a12040d341c1fe", "text number 27,"),
    )


def test_all_samples_differ_and_carry_their_own_id(folder: Path) -> None:
    drawn = draw(LocalFolder(folder), "data/*.parquet", "text", 200, 1000, block_hash="0x1", competition="c", window=1)
    assert len({s.id for s in drawn}) == len({s.text for s in drawn}) == len(drawn) == 200


def test_blank_and_repeated_texts_are_passed_over() -> None:
    texts: list[str | None] = ["one", None, "", "  \n", "one", "two", "two words", "three", "one"]
    shelf = Shelf("r1", {"data/x.parquet": parquet(texts, group=4)})
    drawn = draw(shelf, "data/*.parquet", "text", 4, 100, block_hash="0x", competition="c", window=0)
    assert sorted(s.text for s in drawn) == ["one", "three", "two", "two words"]
    with pytest.raises(Rejected) as caught:
        draw(shelf, "data/*.parquet", "text", 5, 100, block_hash="0x", competition="c", window=0)
    assert (caught.value.reason, caught.value.got) == (Reason.DATASET, "4 different texts")


def test_what_a_cut_leaves_blank_is_passed_over() -> None:
    shelf = Shelf("r7", {"data/x.parquet": parquet(["    far away", "here"])})
    with pytest.raises(Rejected, match="1 different texts"):
        draw(shelf, "data/*.parquet", "text", 2, 3, block_hash="0x", competition="c", window=0)


def test_texts_that_a_cut_makes_equal_are_one_sample() -> None:
    shelf = Shelf("r2", {"data/x.parquet": parquet(["two words", "two worlds", "three"])})
    drawn = draw(shelf, "data/*.parquet", "text", 2, 6, block_hash="0x", competition="c", window=0)
    assert sorted(s.text for s in drawn) == ["three", "two"]


def test_every_text_is_drawn_now_and_then() -> None:
    shelf = Shelf("r3", {f"data/{n}.parquet": parquet(numbered(10 * n, 10 * n + 10), group=3) for n in range(3)})
    seen = {sample for window in range(300) for sample in ids(shelf, 1, window=window)}
    assert len(seen) == 30


def test_a_draw_is_spread_and_reads_no_more_than_it_needs() -> None:
    shelf = Shelf("r4", {f"data/{n:03}.parquet": parquet(numbered(100 * n, 100 * n + 100)) for n in range(60)})
    assert len(ids(shelf, 60)) == 60
    assert 10 <= len(set(shelf.opened)) <= 15
    footers, texts = 15, 15
    assert len(shelf.opened) <= footers + texts


def test_a_small_data_set_gives_all_it_has() -> None:
    shelf = Shelf("r5", {"data/x.parquet": parquet(numbered(0, 25))})
    assert len(set(ids(shelf, 25))) == 25


def test_a_pattern_is_matched_between_slashes() -> None:
    files = {path: parquet([path]) for path in ("data/x.parquet", "data/old/x.parquet", "x.parquet", "more/data/x.parquet")}
    drawn = draw(Shelf("r6", files), "data/*.parquet", "text", 1, 100, block_hash="0x", competition="c", window=0)
    assert drawn[0].text == "data/x.parquet"
    with pytest.raises(Rejected, match="1 different texts"):
        draw(Shelf("r6", files), "data/*.parquet", "text", 2, 100, block_hash="0x", competition="c", window=0)


def big_row_group() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [str(n) * 1_000_000 for n in range(10, 21)]})
    pq.write_table(table, sink, use_dictionary=False, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "got"),
    [
        ("large", big_row_group(), "row group 0"),
        ("column", parquet(["a"], column="body"), "body (STRING)"),
        ("garbage", b"not parquet at all, but long enough to look for a footer", "magic bytes"),
    ],
)
def test_files_that_cannot_serve_a_draw_are_refused(name: str, data: bytes, got: str) -> None:
    with pytest.raises(Rejected) as caught:
        ids(Shelf(name, {"data/x.parquet": data}), 1)
    assert caught.value.reason == Reason.DATASET
    assert got in caught.value.got
    assert caught.value.where == "data/x.parquet"


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="no file"):
        ids(LocalFolder(tmp_path), 1)


def test_a_column_of_numbers_is_refused() -> None:
    with pytest.raises(Rejected, match="a column id of strings"):
        draw(Shelf("n", {"x.parquet": parquet(["a"])}), "*", "id", 1, 9, block_hash="0x", competition="c", window=0)


class Broken(io.BytesIO):
    """Fails in the middle of reading, as a connection does."""

    def __init__(self, data: bytes, failure: Exception) -> None:
        super().__init__(data)
        self.failure = failure

    def read(self, size: int | None = -1, /) -> bytes:
        raise self.failure


@pytest.mark.parametrize("failure", [OSError("connection reset"), Unavailable("data/x.parquet", "connection reset")])
def test_a_file_that_cannot_be_read_is_unavailable(failure: Exception) -> None:
    class Shaky(Shelf):
        def open(self, path: str) -> BinaryIO:
            return Broken(self.content[path], failure)

    with pytest.raises(Unavailable, match=r"data/x\.parquet: connection reset"):
        ids(Shaky("shaky", {"data/x.parquet": parquet(["a"])}), 1)


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 8, "one two"),
        ("one two three", 7, "one"),
        ("one two three", 6, "one"),
        ("onetwothree", 5, "onetw"),
        (" leading", 4, " lea"),
        ("", 4, ""),
    ],
)
def test_capped(text: str, max_chars: int, expected: str) -> None:
    assert capped(text, max_chars) == expected


def training_files(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*.parquet"))


def test_documents_come_once_in_an_order_that_can_be_had_again(folder: Path) -> None:
    files = training_files(folder)
    first = list(documents(files, "text", seed=1, shuffle_buffer=50))
    assert sorted(first) == sorted(str(text) for text in numbered(0, 900))
    assert first == list(documents(files, "text", seed=1, shuffle_buffer=50))
    assert first != list(documents(files, "text", seed=2, shuffle_buffer=50))
    assert first[123:] == list(documents(files, "text", seed=1, shuffle_buffer=50, skip=123))


def test_documents_without_a_buffer_come_as_they_lie(folder: Path) -> None:
    assert list(documents(training_files(folder), "text", seed=1)) == numbered(0, 900)


def test_documents_of_a_file_that_is_gone_are_unavailable(folder: Path) -> None:
    with pytest.raises(Unavailable, match=r"gone\.parquet"):
        next(documents([folder / "gone.parquet"], "text", seed=1))
    with pytest.raises(Rejected, match="no file"):
        documents([], "text", seed=1)


def test_a_process_that_leaves_a_stream_unfinished_ends_well(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from sn29.corpus import documents\n"
        "stream = documents([Path(p) for p in sys.argv[1:]], 'text', seed=1, shuffle_buffer=100)\n"
        "print(next(stream))"
    )
    command = [sys.executable, "-c", program, *map(str, training_files(folder))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("text number")
