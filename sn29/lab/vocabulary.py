"""A tokenizer's vocabulary: what of it a text uses, and the same tokenizer without the rest. Pure: contents in, contents out.

Which entries may go without a change to any text that does not use them, by kind of vocabulary:

BPE begins with letters and joins, again and again, the pair of lowest rank. What was joined inside an entry's own span is
the same wherever the entry comes out, so a text needs the joins on its entries' own ways and no others: an entry stays with
every part on its way (its ancestors), and joins of which all three entries stay keep their order. A join that no text took
was never the lowest, so without it each step takes the same pair as before.

    merges  t+h  th+e  e+r  h+e  w+h        a text that gives [the, r] keeps th, the and its letters
                                            "he" goes: on the way to "the", t+h comes first

With `ignore_merges` (Llama 3, tiktoken) a word that is an entry is found whole, before any join. Entries that joins do not
lead to are found in no other way: they have no ancestors. The others keep theirs, since a longer word may be joined of them.

With `byte_fallback` (SentencePiece's BPE, as Phi3 has it) a letter that is no entry is spelled in bytes: the 256 byte
entries stay, and rare letters may go, but not the one that stands for a space: in bytes no decoder would know it. Without
them every letter stays, and every entry with a letter that is none, else a text could not be spelled any more.

Unigram takes the best sum of scores over all ways to cut a text. Fewer candidates leave a best way that did not use them the
best. What is no entry scores 10 below the lowest score of all, so the entry with the lowest score stays too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sn29.errors import Reason, Rejected
from sn29.models.config import ModelConfig, strict_json
from sn29.models.tokenizer import Tokenizer

Counts = npt.NDArray[np.int64]
COVERED = (0.976, 0.997, 0.9999)
"""Shares of the tokens: how many types, the commonest first, make up so much."""
RARE = (0, 1, 2, 5, 10, 100)
"""Types that are seen at most so often."""
FIRST_BYTES = 1 << 20
"""The curve's first point; each next one has twice as much text."""


# --- a vocabulary -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """The content of a tokenizer.json that `Tokenizer.load` accepts, with the ids that the library gives its entries."""

    content: Mapping[str, Any]
    ids: Mapping[str, int]
    """Entry or added token -> id: no two have the same."""

    @classmethod
    def read(cls, path: Path) -> tuple[Vocabulary, Tokenizer]:
        """Raises Rejected as `Tokenizer.load`, and TOKENIZER when two entries have one id."""
        tokenizer = Tokenizer.load(path)
        content = strict_json(path.read_bytes(), Reason.TOKENIZER, path.name)
        ids = dict(_model_ids(content["model"]))
        for token in added_tokens(content):
            found = tokenizer.id_of(token)
            assert found is not None, f"{token} is in the file that was loaded"
            ids[token] = found
        if len(set(ids.values())) != len(ids):
            raise Rejected(Reason.TOKENIZER, "two entries with one id", "an id of its own for each entry", path.name)
        return cls(content, ids), tokenizer

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.content["model"]
        return found

    @property
    def is_bpe(self) -> bool:
        return isinstance(self.model["vocab"], dict)

    @cached_property
    def entries(self) -> list[str]:
        """Those of the model itself, in the order of their ids; added tokens may be among them."""
        return sorted(vocab := dict(_model_ids(self.model)), key=vocab.__getitem__)

    @cached_property
    def special(self) -> frozenset[str]:
        """Special tokens, and the name of what is unknown: no text is spelled with them."""
        unknown = self.model.get("unk_token")
        if not self.is_bpe and (number := self.model.get("unk_id")) is not None:
            unknown = self.entries[number]
        named = [unknown] if isinstance(unknown, str) and unknown in self.ids else []
        return frozenset([*(token["content"] for token in self.content.get("added_tokens") or () if token["special"]), *named])

    @cached_property
    def spelling(self) -> frozenset[str]:
        """Entries without which some text could not be spelled: all bytes; where bytes do not do it, all letters, and entries
        with letters that are none. Where they do, the letters that stand for others, as U+2581 for a space."""
        fallback = {f"<0x{byte:02X}>" for byte in range(256)} if self.model.get("byte_fallback") else set()
        held, letters = fallback & self.ids.keys(), {entry for entry in self.entries if len(entry) == 1}
        if len(held) == 256:
            steps = [self.content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
            return frozenset(held | letters & {"\u2581", *_named_letters(steps)})
        whole = {entry for entry in self.entries if not letters.issuperset(entry)} - self.special
        return frozenset(held | letters | whole)

    @cached_property
    def types(self) -> list[str]:
        """Entries that a text can be made of, and added tokens that are not special, in the order of their ids."""
        return sorted({*self.entries, *added_tokens(self.content)} - self.special, key=self.ids.__getitem__)

    @property
    def num_ids(self) -> int:
        return max(self.ids.values()) + 1

    def __len__(self) -> int:
        return len(self.ids)


def _model_ids(model: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    vocab = model["vocab"]
    return vocab.items() if isinstance(vocab, dict) else ((piece[0], number) for number, piece in enumerate(vocab))


def added_tokens(content: Mapping[str, Any]) -> list[str]:
    """In the order of the file."""
    return [token["content"] for token in content.get("added_tokens") or ()]


def _named_letters(part: Any) -> set[str]:
    """Of all texts that steps put in, look for or take away."""
    if isinstance(part, list):
        return {letter for inner in part for letter in _named_letters(inner)}
    if not isinstance(part, dict):
        return set()
    named = ("prepend", "content", "String", "replacement", "str_rep")
    return {
        c for key, value in part.items() for c in (value if key in named and isinstance(value, str) else _named_letters(value))
    }


# --- what stays -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries that stay, each under the first reason that it has."""

    used: frozenset[str]
    spelling: frozenset[str]
    added: frozenset[str]
    """Added tokens, and whatever the files beside the model, post-processor or padding name."""
    listed: frozenset[str]
    """Asked for."""
    ancestors: frozenset[str]

    @property
    def entries(self) -> frozenset[str]:
        return self.used | self.spelling | self.added | self.listed | self.ancestors


def kept(vocabulary: Vocabulary, used: Collection[int], *, listed: Collection[int] = (), named: Collection[int] = ()) -> Kept:
    """What has to stay so that texts of the ids `used` and `listed` are cut as before, and every text can still be spelled.

    named: ids that files beside the tokenizer name. Raises Rejected(TOKENIZER) when the post-processor names an id of nobody.
    """
    entry_of = {id_: entry for entry, id_ in vocabulary.ids.items()}
    processed = _processor_ids(vocabulary.content)
    if strange := sorted(processed - entry_of.keys()):
        raise Rejected(Reason.TOKENIZER, f"id {strange[0]} in post_processor or padding", "an entry's", "tokenizer.json")
    by_name = {entry_of[id_] for id_ in {*named, *processed} if id_ in entry_of}
    seen: set[str] = set()

    def first(group: Collection[str]) -> frozenset[str]:
        new = frozenset(group) - seen
        seen.update(new)
        return new

    of_use, spelling = first([entry_of[id_] for id_ in used]), first(vocabulary.spelling)
    added, asked = (
        first({*vocabulary.special, *added_tokens(vocabulary.content), *by_name}),
        first([entry_of[id_] for id_ in listed]),
    )
    return Kept(of_use, spelling, added, asked, first(ancestors(vocabulary, seen)))


def ancestors(vocabulary: Vocabulary, entries: Collection[str]) -> set[str]:
    """Parts on the entries' own ways, letters included; of a Unigram vocabulary the entry with the lowest score."""
    if not vocabulary.is_bpe:
        pieces = vocabulary.model["vocab"]
        return {min(pieces, key=lambda piece: piece[1])[0]}
    ranks = {pair: rank for rank, pair in enumerate(map(_pair, vocabulary.model["merges"]))}  # of one listed twice the last
    fallback = bool(vocabulary.model.get("byte_fallback"))
    held = vocabulary.model["vocab"]
    return {part for entry in entries if entry in held for part in _way(entry, ranks, held, fallback)}


def _way(entry: str, ranks: Mapping[tuple[str, str], int], held: Mapping[str, int], fallback: bool) -> Iterator[str]:
    """Everything that joining an entry's letters goes through; nothing when it does not end in the entry."""
    parts: list[str] = []
    for letter in entry:
        parts += [letter] if letter in held or not fallback else [f"<0x{byte:02X}>" for byte in letter.encode()]
    passed = set(parts)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, math.inf), at) for at, pair in enumerate(pairwise(parts)))
        if rank == math.inf:
            return
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        passed.add(parts[at])
    yield from passed - {entry} if parts == [entry] else ()


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _processor_ids(content: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    _with_ids(content.get("post_processor"), lambda id_: found.add(id_) or id_)  # type: ignore[func-returns-value]
    if isinstance(padding := content.get("padding"), dict) and isinstance(padding.get("pad_id"), int):
        found.add(padding["pad_id"])
    return found


def _with_ids(part: Any, new: Callable[[int], int]) -> Any:
    """A post-processor with other ids: {"ids": [1]} of a template, ["</s>", 2] of RoBERTa's and BERT's."""
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], new(part[1])]
        return [_with_ids(inner, new) for inner in part]
    if isinstance(part, dict):
        return {
            key: [new(id_) for id_ in value] if key == "ids" and isinstance(value, list) else _with_ids(value, new)
            for key, value in part.items()
        }
    return part


# --- the smaller vocabulary -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pruned:
    """A vocabulary without some entries, numbered anew in the old order."""

    vocabulary: Vocabulary
    new_id: Mapping[int, int]
    """Old id -> new id, of what stays."""

    def remapped(self, ids: Sequence[int]) -> list[int]:
        """Raises KeyError for an id that went."""
        return [self.new_id[id_] for id_ in ids]

    def as_json(self) -> bytes:
        return json.dumps(self.vocabulary.content, ensure_ascii=False).encode()


def without_the_rest(vocabulary: Vocabulary, entries: Collection[str]) -> Pruned:
    """The tokenizer.json with these entries alone: everything but entries, merges and ids is copied as it is.

    Added tokens that are no entry of the model come behind the model's, in the order of the file: the library numbers them so.
    """
    stays = frozenset(entries)
    model, held = dict(vocabulary.model), [entry for entry in vocabulary.entries if entry in stays]
    ids = {entry: number for number, entry in enumerate(held)}
    if vocabulary.is_bpe:
        model |= {"vocab": dict(ids), "merges": [merge for merge in model["merges"] if _stays(_pair(merge), stays)]}
    else:
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in stays]
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[vocabulary.entries[model["unk_id"]]]
    for token in added_tokens(vocabulary.content):
        ids.setdefault(token, len(ids))
    new_id = {vocabulary.ids[entry]: number for entry, number in ids.items()}
    content = dict(vocabulary.content) | {"model": model}
    content["added_tokens"] = [token | {"id": ids[token["content"]]} for token in content.get("added_tokens") or ()]
    content["post_processor"] = _with_ids(content.get("post_processor"), new_id.__getitem__)
    if isinstance(padding := content.get("padding"), dict) and isinstance(padding.get("pad_id"), int):
        content["padding"] = padding | {"pad_id": new_id[padding["pad_id"]]}
    return Pruned(Vocabulary(content, ids), new_id)


def _stays(pair: tuple[str, str], stays: frozenset[str]) -> bool:
    return pair[0] in stays and pair[1] in stays and pair[0] + pair[1] in stays


# --- what texts use ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """How far the counting was at some place of the corpus."""

    num_bytes: int
    documents: int
    tokens: int
    seen: int
    """Types that have occurred."""
    new_per_million: float
    """Of a million tokens since the point before: those of types that had not occurred until then."""


class Usage:
    """Counts of the types of a corpus, and the curve of those never seen against its size."""

    def __init__(self, vocabulary: Vocabulary, first_bytes: int = FIRST_BYTES) -> None:
        self._types = np.array([vocabulary.ids[entry] for entry in vocabulary.types], dtype=np.int64)
        self._counts: Counts = np.zeros(vocabulary.num_ids, dtype=np.int64)
        self._before = self._counts.copy()
        self._next_bytes = first_bytes
        self.num_bytes = self.documents = 0
        self.points: list[Point] = []

    def add(self, ids: Sequence[Sequence[int]], num_bytes: int) -> None:
        """Some documents as ids, and the bytes of their texts together."""
        flat = np.fromiter((id_ for document in ids for id_ in document), dtype=np.int64)
        self._counts += np.bincount(flat, minlength=len(self._counts))
        self.num_bytes += num_bytes
        self.documents += len(ids)
        if self.num_bytes >= self._next_bytes:
            self._mark()
            while self._next_bytes <= self.num_bytes:
                self._next_bytes *= 2

    def finish(self) -> Counts:
        """Count of each id; the curve has its last point at the end of the text. Raises Rejected(DATASET) without a token."""
        if not self._counts.any():
            raise Rejected(Reason.DATASET, "no token", "at least one", "the corpus")
        if not self.points or self.points[-1].num_bytes < self.num_bytes:
            self._mark()
        return self._counts

    def _mark(self) -> None:
        tokens = int(self._counts.sum())
        since = tokens - int(self._before.sum())
        new = int(self._counts[self._before == 0].sum())
        seen = int((self._counts[self._types] > 0).sum())
        self.points.append(Point(self.num_bytes, self.documents, tokens, seen, 1e6 * new / since if since else 0.0))
        self._before = self._counts.copy()


@dataclass(frozen=True, slots=True)
class Rare:
    """Types that occur at most so often."""

    at_most: int
    types: int
    per_million: float
    """Tokens of theirs in a million."""


@dataclass(frozen=True, slots=True)
class NeverSeen:
    """Types of one kind, and those of them that do not occur."""

    kind: str
    types: int
    never: int


@dataclass(frozen=True, slots=True)
class Used:
    """What a corpus uses of a vocabulary."""

    types: int
    """Entries that a text can be made of."""
    added: int
    """Others: special tokens, and what is unknown."""
    tokens: int
    seen: int
    needed: int
    """Never seen, and yet not to be left out: bytes, letters, and parts on the way to what is seen."""
    curve: tuple[Point, ...]
    kinds: tuple[NeverSeen, ...]
    coverage: tuple[tuple[float, int], ...]
    """(share of the tokens, types that make up so much, the commonest first)."""
    rare: tuple[Rare, ...]

    @property
    def never(self) -> int:
        return self.types - self.seen

    @property
    def prunable(self) -> int:
        return self.never - self.needed

    @property
    def per_doubling(self) -> float:
        """By how much the share never seen falls when the text gets twice as long, at the end of the curve; 0 if not known.

        Between the last point and the one before it that is nearest to half as far.
        """
        last = self.curve[-1]
        before = [point for point in self.curve if 0 < point.num_bytes <= 0.6 * last.num_bytes]
        if not before:
            return 0.0
        return (last.seen - before[-1].seen) / self.types / math.log2(last.num_bytes / before[-1].num_bytes)

    def bytes_until(self, share: float) -> float | None:
        """Text after which so much is never seen, if the share goes on to fall as it does; None when that cannot be said."""
        left = self.never / self.types - share
        if left <= 0 or self.per_doubling <= 0 or left / self.per_doubling > 30:
            return None
        return float(self.curve[-1].num_bytes * 2 ** (left / self.per_doubling))


def used(vocabulary: Vocabulary, usage: Usage) -> Used:
    """Everything about a corpus that has been counted. Raises Rejected(DATASET) when it has no token."""
    counts = usage.finish()
    of_types = np.array([counts[vocabulary.ids[entry]] for entry in vocabulary.types], dtype=np.int64)
    tokens, seen = int(of_types.sum()), int((of_types > 0).sum())
    stays = kept(vocabulary, np.flatnonzero(counts).tolist()).entries
    held = sum(entry in stays for entry in vocabulary.types)
    return Used(
        types=len(vocabulary.types),
        added=len(vocabulary) - len(vocabulary.types),
        tokens=tokens,
        seen=seen,
        needed=held - seen,
        curve=tuple(usage.points),
        kinds=kinds(vocabulary, of_types),
        coverage=tuple((share, covering(of_types, share)) for share in COVERED),
        rare=tuple(
            Rare(most, int((of_types <= most).sum()), 1e6 * int(of_types[of_types <= most].sum()) / max(1, tokens))
            for most in RARE
        ),
    )


def covering(counts: Counts, share: float) -> int:
    """Types, the commonest first, that make up so much of the tokens. [6, 3, 1], 0.9 -> 2"""
    running = np.cumsum(np.sort(counts)[::-1])
    return int(np.searchsorted(running, share * running[-1] - 1e-9)) + 1


def kinds(vocabulary: Vocabulary, counts: Counts) -> tuple[NeverSeen, ...]:
    """Never-seen types by what they are made of; `counts` of `vocabulary.types`."""
    found = {kind: [0, 0] for kind in KINDS}
    spelled = _spelled(vocabulary)
    for entry, count in zip(vocabulary.types, counts.tolist(), strict=True):
        each = found[kind_of(spelled(entry))]
        each[0] += 1
        each[1] += count == 0
    return tuple(NeverSeen(kind, types, never) for kind, (types, never) in found.items())


KINDS = ("single bytes", "parts of a character", "white space", "ASCII letters", "other ASCII", "beyond ASCII")


def kind_of(spelling: bytes) -> str:
    """One of `KINDS`; a space before letters is no part of their kind.

    b"a" single bytes, b"\xe6\x97" parts of a character, b" the" ASCII letters, b"x1" other ASCII, " é" beyond ASCII
    """
    if len(spelling) == 1:
        return "single bytes"
    try:
        text = spelling.decode()
    except UnicodeDecodeError:
        return "parts of a character"
    if not text.strip():
        return "white space"
    if not text.isascii():
        return "beyond ASCII"
    return "ASCII letters" if text.removeprefix(" ").isalpha() else "other ASCII"


def _spelled(vocabulary: Vocabulary) -> Callable[[str], bytes]:
    """entry -> its bytes in a text, by the kind of vocabulary."""
    if "ByteLevel" in json.dumps([vocabulary.content.get("pre_tokenizer"), vocabulary.content.get("decoder")]):
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = (byte for byte in range(256) if byte not in visible)
        byte_of = {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
        held = set(vocabulary.entries)  # an added token beside them stands for itself
        return lambda entry: b"".join(bytes([byte_of[c]]) if c in byte_of and entry in held else c.encode() for c in entry)

    def spelled(entry: str) -> bytes:
        if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">") and entry in vocabulary.spelling:
            return bytes([int(entry[3:5], 16)])
        return entry.replace("\u2581", " ").encode()

    return spelled


def parameters_of_rows(config: ModelConfig, rows: int) -> int:
    """Of so many ids: a row of the embedding, one of the head where it has its own, and Phi's bias."""
    one = config.number("hidden_size") * (1 if config.tied else 2) + (config.family == "PhiForCausalLM")
    return rows * one
