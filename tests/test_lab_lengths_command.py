"""`sn29 lab lengths`: what a training comes back to how often, by source and together, and how it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sn29.cli import main


def write(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
    return path


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """100 texts of 100 bytes."""
    return write(tmp_path / "short.parquet", [f"{n:04}" + "x" * 96 for n in range(100)])


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """10 texts of 3,000 bytes."""
    return write(tmp_path / "long.parquet", [f"{n:04}" + "x" * 2996 for n in range(10)])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["lab", "lengths", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_by_source_and_together(short: Path, long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, both = told(capsys, str(short), str(long), "--tokens", "1e5", "--row-tokens", "1000")
    assert [each["source"] for each in (a, b, both)] == [str(short), str(long), "together"]
    assert [each["tokens"] for each in (a, b, both)] == [10_000, 30_000, 40_000]
    rows = {each["row_tokens"]: each for each in both["contexts"]}
    assert {row: each["tokens"] for row, each in rows.items()} == {512: 10 * 5 * 512, 1024: 10 * 2 * 1024, 2048: 10 * 2048}
    assert rows[2048]["epochs"] == pytest.approx(1e5 / 20_480)
    assert rows[2048]["most"] == 4 * 20_480
    assert both["enough"] == 512, "2,560 tokens of each long one: 3.9 times; 2,048 of them come 4.9 times"
    assert both["asked"] == {"row_tokens": 1000, "tokens": 30_000, "share": 0.75, "epochs": 1e5 / 30_000, "most": 120_000}
    assert a["enough"] == 0
    assert a["asked"]["tokens"] == 0
    assert [each["epochs"] for each in both["evenly"]] == [5e4 / 10_000, pytest.approx(5e4 / 30_000)]


def test_as_many_tokens_as_there_are(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = told(capsys, str(long))
    assert (found["training_tokens"], found["unit"], found["enough"]) == (30_000, "byte", 2048)


def test_a_part_stands_for_all(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "lengths", str(long), "--max-documents", "5"]) == 1
    assert "5 documents" in (err := capsys.readouterr().err)
    assert "--corpus-tokens" in err
    (found,) = told(capsys, str(long), "--max-documents", "5", "--corpus-tokens", "3e6", "--tokens", "3e6")
    assert (found["tokens"], found["corpus_tokens"]) == (15_000, 3e6)
    assert found["contexts"][0]["epochs"] == pytest.approx(3000 / 2560), "512: all but the rest of each is in whole rows"
    (every,) = told(capsys, str(long), "--corpus-tokens", "3e6")
    assert every["corpus_tokens"] == 3e6, "a part that lies in files of its own stands for all, too"
    assert main(["lab", "lengths", str(long), "--max-documents", "5", "--corpus-tokens", "14999"]) == 1
    assert "15,000 or more" in capsys.readouterr().err


def test_sources_that_were_read_in_part_count_as_what_they_are(
    short: Path, long: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(short), str(long), "--max-documents", "5", "--tokens", "1e6"]
    assert main(["lab", "lengths", *words, "--corpus-tokens", "1e6"]) == 1
    assert "one for each of 2 sources" in capsys.readouterr().err
    a, b, both = told(capsys, *words, "--corpus-tokens", "1e6,30000")
    assert both["corpus_tokens"] == pytest.approx(1.03e6)
    rows = both["contexts"][0]
    assert rows["share"] == pytest.approx(10 * 2560 / 1.03e6, rel=1e-3)
    assert rows["epochs"] == pytest.approx(1e6 / (10 * 2560))
    assert [each["epochs"] for each in both["evenly"]] == [pytest.approx(5e5 / 1e6), pytest.approx(5e5 / 30_000)]
    assert rows["tokens"] == b["contexts"][0]["tokens"] == 25_600
    assert a["contexts"][0]["tokens"] == 0


def test_what_is_not_there_is_null_and_no_bar(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "short.svg"
    (found,) = told(capsys, str(short), "--picture", str(picture))
    assert (found["contexts"][0]["epochs"], found["asked"]["epochs"]) == (None, None)
    assert "no text" in "".join(ET.fromstring(picture.read_text()).itertext())
    assert main(["lab", "lengths", str(short)]) == 0
    out = capsys.readouterr().out
    assert "not enough for rows of 512 bytes: no document is as long" in out
    assert "more than 4 times" not in out


def test_what_is_repeated_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = write(tmp_path / "twice.parquet", ["x" * 600, "y" * 200, "x" * 600])
    assert main(["lab", "lengths", str(twice)]) == 0
    out = capsys.readouterr().out
    assert "42.9% of these bytes are in documents equal to an earlier one, and count as new text" in out
    assert "512 to 1,023" in out


def test_for_people(short: Path, long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lengths.svg"
    words = [str(short), str(long), "--tokens", "1e5", "--row-tokens", "2048", "--picture", str(picture)]
    assert main(["lab", "lengths", *words]) == 0
    out = capsys.readouterr().out
    assert "enough for rows of 512 bytes" in out
    assert "warning: rows of 2,048 would see their text 4.9 times; it is enough for 81,920 bytes" in out
    assert "warning: drawn evenly, these come more than 4 times: below 128" in out
    assert f"no document is as long as a row of {2048:,}" in out, "of the short ones"
    assert "together" in ET.fromstring(picture.read_text()).attrib["aria-label"]


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "lengths", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
