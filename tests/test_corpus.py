"""Draws are the same everywhere and for everybody; training text comes in an order that can be had again."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sn29.corpus import (
    DataFiles,
    LocalFile,
    LocalFolder,
    TextSource,
    TrainingText,
    capped,
    draw,
    one_pass,
    sample_id,
    spread,
)
from sn29.errors import Reason, Rejected, Unavailable
from sn29.hub import Hub, HubDataset
from sn29.localnet.hub import LoopbackHub
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


def damaged(texts: list[str | None], group: int = 10) -> bytes:
    """The letters "\\xff" of the texts as that byte, which no UTF-8 has."""
    sink = io.BytesIO()
    column = pa.array([(text or "").encode().replace(b"\\xff", b"\xff") for text in texts], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), sink, row_group_size=group)
    return sink.getvalue()


def test_text_that_is_not_utf_8_is_refused_with_file_and_row_group(tmp_path: Path) -> None:
    data = damaged([*numbered(0, 14), r"caf\xff", *numbered(15, 20)])
    (tmp_path / "x.parquet").write_bytes(data)
    shelf_of = Shelf("damaged", {"data/x.parquet": data})
    for read in (
        lambda: ids(shelf_of, 20),
        lambda: list(islice(text(shelf_of), 20)),
        lambda: list(one_pass(TextSource(shelf_of, "", "text"), 0)),
        lambda: list(spread(TextSource(shelf_of, "", "text"), 0)),
    ):
        with pytest.raises(Rejected, match=r"data/x\.parquet: .*got row group 1: .*rule a parquet file .* UTF-8") as caught:
            read()
        assert caught.value.reason == Reason.DATASET


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


def test_a_folder_gives_its_files_and_nothing_else(folder: Path) -> None:
    before = LocalFolder(folder)
    expected, revision = before.files(), before.revision
    (folder / "parts.parquet").mkdir()
    (folder / "parts.parquet" / "part-0.txt").write_text("x")
    (folder / "gone.parquet").symlink_to(folder / "nothing")
    assert (LocalFolder(folder).files(), LocalFolder(folder).revision) == (expected, revision)
    (folder / "parts.parquet" / "part-0.parquet").write_bytes(parquet(["x"]))
    assert [path for path, _ in LocalFolder(folder).files()][-1] == "parts.parquet/part-0.parquet"


def test_a_file_is_a_source_of_its_own(tmp_path: Path) -> None:
    """Under any name, and without a look at what lies beside it: the folder may be a home folder."""
    (tmp_path / "plain[1].bin").write_bytes(parquet(["a", "b"]))
    (tmp_path / "beside").mkdir(mode=0o000)
    only = LocalFile(tmp_path, "plain[1].bin")
    assert [path for path, _ in only.files()] == ["plain[1].bin"]
    assert sorted(one_pass(TextSource(only, escape("plain[1].bin"), "text"), 0)) == ["a", "b"]
    changed = only.revision
    (tmp_path / "plain[1].bin").write_bytes(parquet(["a", "c"]))
    assert LocalFile(tmp_path, "plain[1].bin").revision != changed


def test_a_process_that_leaves_a_stream_unfinished_ends_well(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from sn29.corpus import LocalFolder, TextSource, TrainingText\n"
        "stream = TrainingText([TextSource(LocalFolder(Path(sys.argv[1])), '', 'text')], seed=1)\n"
        "print(next(stream))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("text number")


# ---- training text ---------------------------------------------------------------------------------------------------

BLOCK = 1000
"""Bytes of a block in these tests: three row groups of ten of `numbered`."""


def shelf(num_files: int, rows: int = 30, group: int = 10) -> Shelf:
    files = {f"data/{n:03}.parquet": parquet(numbered(rows * n, rows * n + rows), group) for n in range(num_files)}
    return Shelf(f"shelf {num_files} {rows} {group}", files)


def text(*data: DataFiles, weights: tuple[float, ...] = (), seed: int = 1, **more: Any) -> TrainingText:
    sources = [TextSource(d, "data/*.parquet", "text", w) for d, w in zip(data, weights or [1.0] * len(data), strict=True)]
    return TrainingText(sources, seed=seed, **{"block_bytes": BLOCK, **more})


def first_pass(stream: TrainingText) -> list[str]:
    """What the only source gives in its first pass."""
    found = []
    for document in stream:
        if stream.state_dict()["at"][0]["pass"]:
            return found
        found.append(document)
    raise AssertionError("it ended")


def test_training_text_comes_pass_after_pass_in_another_order() -> None:
    stream = text(shelf(3))
    first, second = list(islice(stream, 90)), list(islice(stream, 90))
    assert sorted(first) == sorted(second) == sorted(str(n) for n in numbered(0, 90))
    assert first != second
    assert first[:30] != sorted(first[:30])
    assert list(islice(text(shelf(3)), 180)) == first + second
    assert list(islice(text(shelf(3), seed=2), 90)) != first


def test_the_order_of_training_text_is_kept_for_good() -> None:
    """Runs go on across releases: this order changes only together with a new kind of state."""
    stream = text(shelf(2, rows=6, group=3), shards=2, shard=1)
    assert "".join(document.split()[2] for document in islice(stream, 12)) == "6,8,11,1,3,9,8,3,0,2,4,11,"


def test_documents_of_different_row_groups_and_files_are_mixed() -> None:
    stream = text(shelf(10, rows=100), block_bytes=10_000)
    for _ in range(5):
        together = [int(document.split()[2].rstrip(",")) // 10 for document in islice(stream, 100)]
        assert len(set(together)) > 10, "row groups among a hundred documents that follow each other"


@pytest.mark.parametrize("num_files", [1, 3, 16, 40])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_all_shards_together_give_every_document_once_a_pass(num_files: int, shards: int) -> None:
    data = shelf(num_files)
    parts = [first_pass(text(data, shards=shards, shard=shard)) for shard in range(shards)]
    assert sorted(document for part in parts for document in part) == sorted(str(n) for n in numbered(0, 30 * num_files))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= max(30, 0.25 * max(lengths))


def test_one_pass_is_the_first_of_a_training_run() -> None:
    data = Shelf("some", {**shelf(20).content, "x.parquet": parquet(["elsewhere", " "])})
    assert list(one_pass(TextSource(data, "data/*.parquet", "text"), 5)) == first_pass(text(data, seed=5, block_bytes=32_000_000))
    assert set(one_pass(TextSource(data, "", "text"), 5)) == {*numbered(0, 600), "elsewhere"}, "no pattern: every file"


def test_a_beginning_of_spread_text_is_of_all_files() -> None:
    data = shelf(40, rows=100)
    source = TextSource(data, "", "text")
    first = list(islice(spread(source, 0), 1000))
    assert len({int(document.split()[2].rstrip(",")) // 100 for document in first}) > 16, "of 40 files"
    assert len(set(first)) == 1000
    assert first == list(islice(spread(source, 0), 1000)) != list(islice(spread(source, 1), 1000))
    assert sorted(spread(source, 0)) == sorted(str(n) for n in numbered(0, 4000))


def test_spread_text_opens_no_file_that_it_does_not_need() -> None:
    texts: list[str | None] = [f"{n} " + "x" * 40_000 for n in range(100)]
    data = Shelf("large", {f"data/{n}.parquet": parquet(texts, group=50) for n in range(60)})
    next(spread(TextSource(data, "", "text"), 0))
    assert len(set(data.opened)) < 30, "32 MB, 2 MB from each row group"


def test_files_without_rows_are_gone_past() -> None:
    data = Shelf("empty", {f"data/{n:03}.parquet": parquet([] if n % 20 else [f"text {n}"]) for n in range(41)})
    assert sorted(first_pass(text(data))) == ["text 0", "text 20", "text 40"]


def test_more_shards_than_row_groups_share_the_rows() -> None:
    parts = [first_pass(text(shelf(1, rows=20, group=20), shards=8, shard=shard)) for shard in range(8)]
    assert sorted(map(len, parts)) == [2, 2, 2, 2, 3, 3, 3, 3]
    some = [text(shelf(1, rows=5), shards=8, shard=shard) for shard in range(8)]
    with pytest.raises(Rejected) as caught:
        list(map(next, some))
    assert caught.value.reason == Reason.DATASET
    assert caught.value.limit == "at least one that may be trained on for each of 8 shards"


@settings(max_examples=40, deadline=None)
@given(
    stop=st.integers(0, 260),
    shards=st.integers(1, 3),
    group=st.sampled_from([3, 10, 30]),
    num_files=st.sampled_from([1, 2, 20]),
    sources=st.integers(1, 2),
)
def test_training_text_goes_on_at_exactly_the_next_document(
    stop: int, shards: int, group: int, num_files: int, sources: int
) -> None:
    """Row groups, blocks, windows of 16 files and passes all end somewhere on the way."""

    def opened() -> TrainingText:
        data = [shelf(num_files, group=group), shelf(2, rows=7)][:sources]
        return text(*data, weights=(3.0, 1.0)[:sources], shards=shards, shard=shards - 1)

    undisturbed = list(islice(opened(), stop + 40))
    first = opened()
    assert list(islice(first, stop)) == undisturbed[:stop]
    state = json.dumps(first.state_dict())
    assert len(state) < 400 * sources
    again = opened()
    next(again)  # what was read before does not matter
    again.load_state_dict(json.loads(state))
    assert json.dumps(again.state_dict()) == state, "a run that ends before it reads anything goes on in the same place"
    assert list(islice(again, 40)) == undisturbed[stop:]


@pytest.mark.parametrize("stop", [1799, 1800, 1801])
def test_going_on_reads_one_block(stop: int) -> None:
    data = shelf(8, rows=300)
    stream = text(data)
    list(islice(stream, stop))
    state = stream.state_dict()
    expected = next(stream)
    data.opened.clear()
    again = text(data)
    again.load_state_dict(state)
    assert next(again) == expected
    assert len(data.opened) <= 8 + 3, "footers, and the three row groups of a block"


@pytest.mark.parametrize(
    ("change", "got", "limit"),
    [
        ({"seed": 2}, "1", "2"),
        ({"shards": 2}, "1", "2"),
        ({"block_bytes": 5}, "1000", "5"),
        ({"weights": (2.0, 1.0)}, "text, 1.0", "text, 2.0"),
    ],
    ids=["seed", "shards", "block", "weights"],
)
def test_a_place_in_another_text_is_refused(change: dict[str, Any], got: str, limit: str) -> None:
    state = text(shelf(1), shelf(2)).state_dict()
    with pytest.raises(Rejected) as caught:
        text(shelf(1), shelf(2), **change).load_state_dict(state)
    assert caught.value.reason == Reason.SETTING
    assert got in caught.value.got.replace("'", "")
    assert limit in caught.value.limit.replace("'", "")
    with pytest.raises(Rejected, match="sources of the training text"):
        text(shelf(1), shelf(3)).load_state_dict(state)


def test_sources_have_their_shares_at_any_time() -> None:
    few = Shelf("few", {"data/x.parquet": parquet([f"few {n}" for n in range(10)])})
    many = Shelf("many", {"data/x.parquet": parquet([f"many {n}" for n in range(1000)])})
    stream = text(few, many, weights=(1.0, 3.0))
    found = [document.split()[0] for document in islice(stream, 400)]
    for at in range(1, 401):
        assert abs(Counter(found[:at])["few"] - at / 4) <= 1
    assert "".join(document[0] for document in islice(text(few, many, weights=(2.0, 1.0)), 6)) == "fmffmf"


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.0, 3.0, 7.7, 40.0]), min_size=1, max_size=14))
@example([47.0, 24.0, 7.0, 6.0, 5.0, 4.0, 3.0, 1.0, 1.0, 1.0, 1.0])
def test_many_sources_are_never_a_document_off_their_shares(weights: list[float]) -> None:
    stream = text(*(Shelf(str(n), {"data/x.parquet": parquet([str(n)])}) for n in range(len(weights))), weights=tuple(weights))
    given = [0] * len(weights)
    for at in range(1, 151):
        given[int(next(stream))] += 1
        assert all(abs(so_far - at * weight / sum(weights)) < 1 for so_far, weight in zip(given, weights, strict=True))


def test_a_source_that_ends_starts_its_next_pass() -> None:
    few = Shelf("few", {"data/x.parquet": parquet([f"few {n}" for n in range(10)])})
    stream = text(few, shelf(4))
    given = [document for document in islice(stream, 200) if document.startswith("few")]
    assert all(count == 10 for count in Counter(given).values())
    assert [place["pass"] for place in stream.state_dict()["at"]] == [9, 0]


def test_evaluation_samples_are_passed_over() -> None:
    data, max_chars = shelf(3), 16
    drawn = draw(data, "data/*.parquet", "text", 20, max_chars, block_hash="0x", competition="c00", window=3)
    wanted = text(data, exclude={sample.id for sample in drawn}, max_chars=max_chars)
    found = first_pass(wanted)
    assert not {capped(document, max_chars) for document in found} & {sample.text for sample in drawn}
    everything = first_pass(text(data))
    assert found == [d for d in everything if sample_id(capped(d, max_chars)) not in {s.id for s in drawn}]
    assert max(map(len, found)) > max_chars, "a document that is trained on is not cut"


def test_what_is_excluded_later_does_not_move_the_place() -> None:
    stream = text(shelf(3))
    seen = list(islice(stream, 33))
    later = text(shelf(3), exclude=[sample_id(str(n)) for n in numbered(0, 45)])
    later.load_state_dict(stream.state_dict())
    rest = first_pass(stream)
    assert first_pass(later) == [document for document in rest if document in [str(n) for n in numbered(45, 90)]]
    assert not set(seen) & set(rest)


def test_blank_documents_are_passed_over_and_a_pass_without_any_is_refused() -> None:
    rows = Shelf("blank", {"data/x.parquet": parquet([None, "", " \n ", "word", "\t"])})
    assert list(islice(text(rows), 3)) == ["word"] * 3
    with pytest.raises(Rejected, match="no document in a pass over 1 files"):
        next(text(rows, exclude=[sample_id("word")]))


def test_a_read_that_fails_is_tried_again_at_the_same_document() -> None:
    class Shaky(Shelf):
        def open(self, path: str) -> BinaryIO:
            opened = super().open(path)
            return Broken(self.content[path], Unavailable(path, "reset")) if len(self.opened) % 5 == 0 else opened

    data = shelf(20)
    shaky = Shaky(data.revision, data.content)
    stream, found, failures = text(shaky), [], 0
    while len(found) < 700:
        try:
            found.append(next(stream))
        except Unavailable:
            failures += 1
            assert json.loads(json.dumps(stream.state_dict()))["at"][0]["given"] == len(found)
    assert failures > 10
    assert found == list(islice(text(data), 700))


@pytest.mark.parametrize(
    ("reason", "words", "make"),
    [
        (Reason.SETTING, "got no source", lambda: TrainingText([], seed=1)),
        (Reason.SETTING, "got 0.0, rule a finite weight above 0", lambda: text(shelf(1), weights=(0.0,))),
        (Reason.SETTING, "got nan", lambda: text(shelf(1), weights=(float("nan"),))),
        (Reason.SETTING, "got shard 2 of 2", lambda: text(shelf(1), shards=2, shard=2)),
        (Reason.DATASET, "got no file of 0", lambda: text(Shelf("r", {}))),
        (Reason.DATASET, "got columns id (NONE), body (STRING), rule a column text of strings", lambda: next(text(of_body()))),
        (Reason.DATASET, "rule a parquet file", lambda: next(text(Shelf("r", {"data/x.parquet": b"text" * 99})))),
    ],
    ids=["none", "zero", "nan", "shard", "no file", "column", "garbage"],
)
def test_text_that_cannot_serve_is_refused(reason: Reason, words: str, make: Any) -> None:
    with pytest.raises(Rejected) as caught:
        make()
    assert caught.value.reason == reason
    assert words in str(caught.value)


def of_body() -> Shelf:
    return Shelf("body", {"data/x.parquet": parquet(["a"], column="body")})


def test_text_streams_from_the_hub_without_downloading_it(tmp_path: Path) -> None:
    texts = [os.urandom(1500).hex() for _ in range(1000)]
    (tmp_path / "up" / "data").mkdir(parents=True)
    (tmp_path / "up" / "data" / "a.parquet").write_bytes(parquet(list(texts), group=20))
    with LoopbackHub(tmp_path / "hub") as server:
        alice = Hub(server.endpoint, server.add_user("alice"))
        alice.create("alice/text", kind="dataset")
        revision = alice.upload("alice/text", tmp_path / "up", message="text", kind="dataset")
        remote = HubDataset(Hub(server.endpoint), "alice/text", revision)
        server.served.clear()
        stream = text(remote, block_bytes=200_000)
        first = list(islice(stream, 50))
        assert sum(line.num_bytes for line in server.served if line.port == "store") < 800_000, "of 1.6 MB"
        rest = first_pass(stream)
    assert sorted(first + rest) == sorted(texts)
    assert first + rest == first_pass(text(LocalFolder(tmp_path / "up"), block_bytes=200_000))


def test_a_stream_leaves_nothing_in_the_cache_of_the_user(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from sn29.corpus import LocalFolder, TextSource, TrainingText\n"
        "stream = TrainingText([TextSource(LocalFolder(Path(sys.argv[1])), 'data/*.parquet', 'text')], seed=1)\n"
        "print([next(stream) for _ in range(2000)][-1])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == list(islice(text(LocalFolder(folder), block_bytes=32_000_000), 2000))[-1], "in any process"
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
