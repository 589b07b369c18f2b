"""`sn29 data stats`: what it tells of folders, files, Hub data sets and competitions, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sn29.cli import main
from sn29.data_command import Read, _show
from sn29.hub import Hub
from sn29.lab.lengths import measure
from sn29.localnet.hub import LoopbackHub
from sn29.settings import DataStatsSettings


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=50)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 texts of 10 letters (two of them the same), 10 of 1,500; no two in one place of the order."""
    write(tmp_path / "text" / "data" / "train-0.parquet", [f"short {n % 99:04}" for n in range(100)])
    write(tmp_path / "text" / "data" / "eval-0.parquet", [f"{n:04}" + "x" * 1496 for n in range(10)])
    return tmp_path / "text"


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["data", "stats", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_in_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (all_of_it,) = told(capsys, str(folder))
    assert (all_of_it["documents"], all_of_it["tokens"], all_of_it["unit"], all_of_it["is_all"]) == (110, 16_000, "byte", True)
    assert [(b["low"], b["documents"], b["tokens"]) for b in all_of_it["buckets"] if b["documents"]] == [
        (8, 100, 1000),
        (1024, 10, 15_000),
    ]
    assert all_of_it["duplicates"] == {"count": 1, "documents": pytest.approx(1 / 110), "tokens": pytest.approx(10 / 16_000)}
    assert [(longer["limit"], longer["tokens"]) for longer in all_of_it["longer"]][:3] == [
        (512, 15 / 16),
        (1024, 15 / 16),
        (2048, 0),
    ]
    assert [r["epochs"] for r in all_of_it["evenly"]] == [8.0, pytest.approx(8 / 15)]
    assert {loss["how"] for loss in all_of_it["packing"]} == {
        "joined with end tokens, cut", "greedy, cropped", "best fit, cropped", "best fit, split",
    }  # fmt: skip


def test_tokens_of_a_tokenizer(folder: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "data" / "train-1.parquet", ["the other the"] * 3)
    (found,) = told(capsys, str(folder / "data" / "train-1.parquet"), "--tokenizer", str(byte_tokenizer))
    assert (found["unit"], found["documents"], found["tokens"]) == (
        "token",
        3,
        3 * len(["the", " ", "o", "the", "r", " ", "the"]),
    )
    assert found["duplicates"]["count"] == 2


def test_several_sources_are_told_of_one_by_one_and_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, str(folder / "data" / "train-0.parquet"), str(folder))
    assert [each["documents"] for each in found] == [100, 110, 210]
    assert found[2]["source"] == "together"
    assert found[2]["duplicates"]["count"] == 101, "what stands in both is twice there"


def test_a_part_is_drawn_from_all_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (part,) = told(capsys, str(folder), "--max-documents", "60")
    assert (part["documents"], part["is_all"]) == (60, False)
    assert part["longest"] == 1500
    assert told(capsys, str(folder), "--max-documents", "60") == [part]
    assert told(capsys, str(folder), "--max-documents", "60", "--seed", "3") != [part]
    (exactly,) = told(capsys, str(folder), "--max-documents", "110")
    assert exactly["is_all"]


def test_a_part_is_of_more_files_than_are_mixed_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        write(tmp_path / f"{number}.parquet", [f"the text of file {number}"] * 100)
    (part,) = told(capsys, str(tmp_path), "--max-documents", "2000")
    assert part["documents"] - part["duplicates"]["count"] > 20, "of 40 files, each of them one text"


def test_a_part_says_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, scope, within in (
        (["--max-documents", "60"], "(a part: row groups drawn over all files)", ", looked for within this part alone\n"),
        ([], "(all of it)", "of the bytes\n"),
    ):
        assert main(["data", "stats", str(folder), *words]) == 0
        shown = capsys.readouterr().out
        assert scope in shown
        assert within in shown


def test_the_file_that_is_named_is_all_that_is_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "some [1].bin", ["abc"])
    (folder / "gone.parquet").symlink_to(folder / "nothing")
    (found,) = told(capsys, str(folder / "some [1].bin"), "--pattern", "of other sources")
    assert (found["documents"], found["tokens"]) == (1, 3)
    (found,) = told(capsys, str(folder / "data" / "eval-*.parquet"))
    assert found["documents"] == 10


def test_a_pattern_and_a_column(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "data" / "body-0.parquet", ["abc"], column="body")
    (found,) = told(capsys, str(folder), "--pattern", "data/body-*.parquet", "--column", "body")
    assert (found["documents"], found["tokens"]) == (1, 3)


def test_a_competition_and_the_hub(
    folder: Path, tmp_path: Path, byte_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LoopbackHub(tmp_path / "hub") as server:
        alice = Hub(server.endpoint, server.add_user("alice"))
        alice.create("alice/text", kind="dataset")
        revision = alice.upload("alice/text", folder, message="text", kind="dataset")
        for name in (f"hub:alice/text@{revision}", "hub:alice/text"):
            (found,) = told(capsys, name, "--hub.endpoint", server.endpoint, "--pattern", "data/train-*.parquet")
            assert (found["source"], found["documents"]) == (name, 100)
        shutil.copytree(Path(__file__).parents[1] / "competitions", tmp_path / "competitions")
        rules = tmp_path / "competitions" / "c00.yaml"
        rules.write_text(
            rules.read_text(encoding="utf-8")
            .replace("HuggingFaceFW/fineweb-edu-score-2", "alice/text")
            .replace("data/*/*.parquet", "data/eval-*.parquet"),
            encoding="utf-8",
        )
        words = ["--competition", "c00", "--competitions.dir", str(tmp_path / "competitions"), "--hub.endpoint", server.endpoint]
        (found,) = told(capsys, *words, "--tokenizer", str(byte_tokenizer))
        assert (found["source"], found["documents"], found["tokens"]) == ("c00 data/eval-*.parquet", 10, 15_000)


def test_tables_and_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lengths.svg"
    assert main(["data", "stats", str(folder), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "110 documents, 16,000 bytes, 145 a document, the longest 1,500", "1 documents (0.91%)", "1,024 to 2,047", "93.8%",
        "drawn evenly", "warning: seen more than 4 times", ": below 512\n",
    ):  # fmt: skip
        assert words in shown
    assert ET.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert not list(tmp_path.glob("*.new"))


def test_no_number_is_cut_away_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The width of a pipe or a log. 10 million documents of 20 billion tokens, and 10^12 of them drawn evenly."""
    monkeypatch.setenv("COLUMNS", "80")
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(6.5, 1.5, 20_000)).astype(int) + 1, 1_048_575)
    about = measure(lengths, np.arange(20_000), row_tokens=2048, evenly_tokens=10**12)
    buckets = tuple(replace(b, documents=b.documents * 500, tokens=b.tokens * 500) for b in about.buckets)
    many = replace(about, documents=about.documents * 500, tokens=about.tokens * 500, buckets=buckets)
    _show([(Read("here", [], [], True), many)], "token", DataStatsSettings())
    shown = capsys.readouterr().out
    assert "…" not in shown
    for bucket in many.buckets:
        assert f"{bucket.low:,} to {bucket.high - 1:,} " in shown
        assert f" {bucket.documents:,} " in shown
        assert f" {bucket.tokens:,} " in shown
    for quantile in about.quantiles:
        assert re.search(rf"{quantile.share:.0%} +{quantile.by_documents:,} +{quantile.by_tokens:,}\n", shown)
    for repetition in about.evenly:
        assert f" {repetition.epochs:,.2f}\n" in shown


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "SOURCE: the setting is not usable (got no source, rule a folder, a file, hub:NAMESPACE/NAME@REVISION or"),
        (["nowhere"], "SOURCE: the setting is not usable (got nowhere, rule a folder, a .parquet file, FOLDER/GLOB or hub:"),
        (["FOLDER", "--column", "body"], "got columns text (STRING), rule a column body of strings"),
        (["FOLDER", "--pattern", "x/*.parquet"], "x/*.parquet: the data set cannot serve samples (got no file of 2"),
        (["FOLDER", "--evenly-tokens", "9"], "--evenly-tokens: the setting is not usable (got --max-documents 100000"),
        (["FOLDER", "--row-tokens", "0"], "--row-tokens: the setting is not usable (got 0"),
        (["FOLDER", "--picture", "FOLDER/none/x.svg"], "--picture: the setting is not usable"),
        (["FOLDER", "--tokenizer", "FOLDER/none.json"], "none.json: a file that every model needs is missing"),
        (["--competition", "c77"], "got c77, rule c00, c01"),
        (["hub:alice"], "got alice"),
        (["FOLDER/plain.bin"], "plain.bin: the data set cannot serve samples (got Parquet magic bytes not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_refused(
    folder: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "plain.bin").write_bytes(b"no parquet file, and long enough to look for a footer")
    status = 2 if "--row-tokens" in words else 1  # a value that its flag never takes is wrong usage
    assert main(["data", "stats", *(word.replace("FOLDER", str(folder)) for word in words)]) == status
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""
