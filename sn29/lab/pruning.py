"""A model without the rows of tokens that went from its vocabulary, and the proof of what that does to its losses.

A token's probability is exp(its logit) over the sum of all; the rows that stay keep their logits, so at each place

    p(token) of the new model = p(token) of the old one / (1 - what the old one gave to all rows that went)

and of a document that is cut as before the nats are    new = old + sum over its places of log(1 - p_removed),    never more.
Both sides are measured apart: the right one from the old model's logits, tile by tile, the left one from the new files.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.evaluation.head import TiledHead, Tiles
from sn29.lab.compare import FEW
from sn29.lab.losses import change, document_nats
from sn29.lab.vocabulary import Pruned, Vocabulary
from sn29.lab.weights import Report, Weights, open_weights, silent, with_config
from sn29.models.config import ModelConfig, strict_json
from sn29.models.tokenizer import Tokenizer
from sn29.training.study_results import Interval

ROWS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
"""Tensors that have a row for each id; a tied head is the embedding, Phi's head has a bias."""
MAX_ERROR = 1e-6
"""Of the identity above, relative to a document's nats, in float32."""
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_NO_IDS_LEFT_OUT = ("bad_words_ids", "forced_decoder_ids", "sequence_bias", "force_words_ids")
"""Settings of generation with ids inside ids: refused where they are set."""
STALE = ("vocab.json", "merges.txt", "tokenizer.model")
"""The old vocabulary in forms that fast tokenizers do not need."""
_GENERATION, _TOKENIZER, _SPECIAL, _ADDED = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


# --- ids in files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beside:
    """Files beside a model that name tokens; None: there is no such file."""

    tokenizer: Mapping[str, Any] | None
    special: Mapping[str, Any] | None
    added: Mapping[str, Any] | None
    generation: Mapping[str, Any] | None
    stale: tuple[str, ...]
    """Those of `STALE` that are there."""

    @classmethod
    def read(cls, folder: Path) -> Beside:
        """Raises Rejected(TOKENIZER | BAD_CONFIG) for a file that is no JSON object, or whose tokens are none."""
        tokenizer, special, added = (_object(folder / name, Reason.TOKENIZER) for name in (_TOKENIZER, _SPECIAL, _ADDED))
        generation = _object(folder / _GENERATION, Reason.BAD_CONFIG)
        found = cls(tokenizer, special, added, generation, tuple(name for name in STALE if (folder / name).is_file()))
        by_id = (found.tokenizer or {}).get("added_tokens_decoder") or {}
        tokens = by_id.values() if isinstance(by_id, dict) else [None]
        if not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in tokens):
            raise Rejected(Reason.TOKENIZER, f"added_tokens_decoder {by_id}", "ids, each with a token's content", _TOKENIZER)
        if strange := [token for token, id_ in (found.added or {}).items() if type(id_) is not int]:
            raise Rejected(Reason.TOKENIZER, f"{strange[0]} {(found.added or {})[strange[0]]}", "tokens with their ids", _ADDED)
        return found

    def tokens(self) -> Iterator[tuple[str, str]]:
        """(token, file that names it): beginning, end, padding and so on, and all that were added."""
        for key, value in (self.tokenizer or {}).items():
            if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
                yield from ((name, _TOKENIZER) for name in _names(value))
        for token in ((self.tokenizer or {}).get("added_tokens_decoder") or {}).values():
            yield from ((name, _TOKENIZER) for name in _names(token))
        for value in (self.special or {}).values():
            yield from ((name, _SPECIAL) for name in _names(value))
        yield from ((name, _ADDED) for name in self.added or {})

    def ids(self, vocabulary: Vocabulary) -> set[int]:
        """Of all that the files name, by the vocabulary. Raises Rejected(TOKENIZER) for a token that tokenizer.json does not
        hold: transformers numbers it behind the last entry, where there may be no row; BAD_CONFIG as `named_ids`."""
        for token, file in self.tokens():
            if token not in vocabulary.ids:
                limit = "tokens of tokenizer.json (AutoTokenizer's save_pretrained writes all into it)"
                raise Rejected(Reason.TOKENIZER, f"{token!r}, which is not in tokenizer.json", limit, file)
        return {vocabulary.ids[token] for token, _ in self.tokens()} | named_ids(self.generation or {}, _GENERATION)

    def renamed(self, pruned: Pruned, new_id: Mapping[int, int]) -> dict[str, bytes | None]:
        """What takes their place; None: left out. Names of special tokens stay as they are. Raises as `renamed`."""
        files: dict[str, bytes | None] = dict.fromkeys(self.stale)
        files["tokenizer.json"] = pruned.as_json()
        ids = pruned.vocabulary.ids
        if self.tokenizer is not None:
            config = dict(self.tokenizer)
            if by_id := config.get("added_tokens_decoder"):
                config["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in by_id.values()}
            files[_TOKENIZER] = _as_json(config)
        if self.added is not None:
            files[_ADDED] = _as_json({token: ids[token] for token in self.added})
        if self.generation is not None:
            files[_GENERATION] = _as_json({**self.generation, **renamed(self.generation, new_id, _GENERATION)})
        return files


def _object(path: Path, reason: Reason) -> dict[str, Any] | None:
    return strict_json(path.read_bytes(), reason, path.name) if path.is_file() else None


def _names(value: Any) -> list[str]:
    """Tokens that a value stands for: "</s>", {"content": "</s>", ...}, or some of these in a list or under names."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, dict):
        return _names(value["content"]) if "content" in value else [name for inner in value.values() for name in _names(inner)]
    return [name for inner in value for name in _names(inner)] if isinstance(value, list) else []


def named_ids(raw: Mapping[str, Any], where: str) -> set[int]:
    """Ids that a config.json or generation_config.json names: beginning, end, padding and so on. Below 0 is none.

    Raises Rejected(BAD_CONFIG) for what is no whole number.
    """
    return {id_ for key in raw if key.endswith("_token_id") for id_ in _listed(key, raw[key], where) if id_ >= 0}


def _listed(key: str, value: Any, where: str) -> list[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(id_) is not int for id_ in found):
        raise Rejected(Reason.BAD_CONFIG, f"{key} {value!r}", "a whole number, or a list of them", where)
    return found


def renamed(raw: Mapping[str, Any], new_id: Mapping[int, int], where: str) -> dict[str, Any]:
    """The file's values that are ids, with the new ones. Raises Rejected(BAD_CONFIG) for an id that has no row."""
    found: dict[str, Any] = {}
    if set_ := [key for key in _NO_IDS_LEFT_OUT if raw.get(key)]:
        raise Rejected(Reason.SETTING, set_[0], "a file without it: its ids would have to be renamed inside", where)
    for key, value in raw.items():
        if key in _ID_LISTS:
            found[key] = [new_id[id_] for id_ in _listed(key, value, where) if id_ in new_id]
        elif key.endswith("_token_id") and (ids := _listed(key, value, where)):
            if strange := [id_ for id_ in ids if id_ >= 0 and id_ not in new_id]:
                limit = "an id below the old embedding's rows: the file is of another model, or older"
                raise Rejected(Reason.BAD_CONFIG, f"{key} {strange[0]}", limit, where)
            new = [new_id.get(id_, id_) for id_ in ids]
            found[key] = new if isinstance(value, list) else new[0]
    return found


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of the old embedding are the rows of the new one, in order."""

    old: tuple[int, ...]
    of: int
    """Rows that the old embedding has."""

    @property
    def new_id(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.old)}

    @property
    def removed(self) -> int:
        return self.of - len(self.old)


def rows_of(pruned: Pruned, config: ModelConfig, named: Collection[int], multiple: int = 1) -> Rows:
    """A row for each entry, behind them those of ids that config.json names without an entry.

    multiple: as many rows that went, those of the lowest ids, stay without an entry as make a multiple of it.
    Raises Rejected(VOCABULARY) when the embedding has no row for an entry, SETTING when it has too few for the multiple.
    """
    of = config.number("vocab_size")
    rows = sorted(pruned.new_id, key=pruned.new_id.__getitem__)
    if rows and max(rows) >= of:
        raise Rejected(
            Reason.VOCABULARY, f"{of} rows", f"at least {max(rows) + 1}: the tokenizer's ids", "config.json: vocab_size"
        )
    held = set(rows)
    rows += sorted({id_ for id_ in {*named, config.start_token} if id_ < of} - held)
    held.update(rows)
    if (wanted := -(-len(rows) // multiple) * multiple) > of:
        got = f"{len(rows):,} rows that stay, the next multiple is {wanted:,}"
        raise Rejected(Reason.SETTING, got, f"at most the {of:,} rows that there were", "--multiple")
    rows += [id_ for id_ in range(of) if id_ not in held][: wanted - len(rows)]
    return Rows(tuple(rows), of)


def with_rows(weights: Weights, rows: Rows) -> Weights:
    """The model with these rows of embedding and head alone: everything else is the same to the bit.

    Raises Rejected as `parse_config` and `renamed`.
    """
    new_id = rows.new_id
    changes = {"vocab_size": len(rows.old), **renamed(weights.raw, new_id, "config.json")}
    config, raw = with_config(weights.raw, changes)
    start = new_id[weights.config.start_token]
    if config.start_token != start:  # the file named none, which stands for id 0
        config, raw = with_config(raw, {"bos_token_id": start})
    index = torch.tensor(rows.old)

    def read(name: str) -> Tensor:
        found = weights.read(name)
        return found[index] if name in ROWS else found

    return Weights(config, raw, weights.dtypes, read)


def check_tensors(old: Weights, folder: Path, rows: Rows) -> None:
    """What was written, read again: these rows of embedding, head and bias, all else the same, to the bit.

    Losses alone do not show it: rows of tokens that the measured documents do not hold might be those of others.
    Raises Rejected(CLAIM) naming the first tensor that is not so.
    """
    new, index = open_weights(folder), torch.tensor(rows.old)
    for name in old.shapes:
        before, after = old.read(name), new.read(name)
        before = before[index] if name in ROWS else before
        if before.dtype != after.dtype or not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
            limit = "the old rows under their new ids, to the bit" if name in ROWS else "the old one, to the bit"
            raise Rejected(Reason.CLAIM, f"another {name}", limit, "the tensors that were written")


# --- what the old model gave to what went -----------------------------------------------------------------------------


class KeptShare(TiledHead):
    """In the place of -log p of a token: log(1 - p_removed) at each position, float64, in the same tiles."""

    def __init__(self, stays: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> None:
        """`stays` [V] of bool: the rows that are kept."""
        super().__init__(weight, bias, tiles)
        self._sides = torch.stack([stays, ~stays], dim=1).to(weight.device, torch.float64)  # [V, 2]

    def _flush(self) -> None:
        rows, device = self.tiles.rows, self._weight.device
        highest = torch.full((rows,), torch.finfo(torch.float32).min, device=device)
        sums = torch.zeros((rows, 2), dtype=torch.float64, device=device)
        for column in range(0, len(self._weight), self.tiles.columns):
            part = slice(column, column + self.tiles.columns)
            logits = F.linear(self._hidden, self._weight[part], None if self._bias is None else self._bias[part]).float()
            higher = torch.maximum(highest, logits.amax(1))
            sums = sums * torch.exp(highest - higher).double()[:, None]
            sums += torch.exp(logits - higher[:, None]).double() @ self._sides[part]
            highest = higher
        self._found.append(-torch.log1p(sums[:, 1] / sums[:, 0])[: self._filled].clone())
        self._filled = 0


def log_kept(
    folder: Path,
    documents: Sequence[Sequence[int]],
    rows: Rows,
    *,
    threads: int = 2,
    memory_bytes: int = 0,
    report: Report = silent,
) -> list[float]:
    """Of each document the sum of log(1 - p_removed) over its places, of the old model in float32. Raises as `document_nats`."""
    stays = torch.zeros(rows.of, dtype=torch.bool)
    stays[list(rows.old)] = True
    head = partial(KeptShare, stays)
    return document_nats(folder, documents, threads=threads, memory_bytes=memory_bytes, report=report, head=head)


# --- proofs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segmentation:
    """How documents are cut by both tokenizers."""

    documents: int = 0
    unchanged: int = 0
    broken: int = 0
    """Made of tokens that all stay, and yet cut otherwise: none, or the proof fails."""
    tokens_before: int = 0
    tokens_after: int = 0

    @property
    def changed_share(self) -> float:
        return 1 - self.unchanged / self.documents

    @property
    def inflation(self) -> float:
        return self.tokens_after / self.tokens_before - 1

    def __add__(self, other: Segmentation) -> Segmentation:
        return Segmentation(*(getattr(self, name) + getattr(other, name) for name in Segmentation.__slots__))


def segmentation(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], pruned: Pruned) -> Segmentation:
    """Of the same documents, by the old tokenizer and by the new one."""
    unchanged = broken = 0
    for old, new in zip(before, after, strict=True):
        if is_same(old, new, pruned):
            unchanged += 1
        elif all(id_ in pruned.new_id for id_ in old):
            broken += 1
    return Segmentation(len(before), unchanged, broken, sum(map(len, before)), sum(map(len, after)))


def is_same(old: Sequence[int], new: Sequence[int], pruned: Pruned) -> bool:
    return [pruned.new_id.get(id_) for id_ in old] == list(new)


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """What both tokenizers give back of texts at random."""

    texts: int
    whole: int
    """Come back to the character, from the new one."""
    different: tuple[str, ...]
    """Texts that do not come back as they did before: none, or the proof fails."""


def round_trips(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> RoundTrips:
    old = [before.decode(ids) for ids in before.encode_batch(texts)]
    new = [after.decode(ids) for ids in after.encode_batch(texts)]
    different = tuple(text for text, a, b in zip(texts, old, new, strict=True) if a != b)
    return RoundTrips(len(texts), sum(map(str.__eq__, texts, new)), different)


def spellings(tokenizer: Tokenizer, went: Sequence[int], seed: int) -> list[str]:
    """Of entries that went, each alone and behind another one by chance: what has to be spelled in another way now."""
    others = random.Random(seed).sample(went, len(went))
    return [tokenizer.decode(ids) for pair in zip(others, went, strict=True) for ids in (pair[1:], pair)]


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Any Unicode, controls, bytes as Latin-1, one script, white space, ASCII, and all of them in turns; 1 to 60 characters."""
    chance = random.Random(seed)
    controls = [chr(n) for n in (*range(32), 0x7F, *range(0x80, 0xA0), 0x200B, 0x200D, 0x2028, 0xFEFF, 0xFFFE, 0xFFFF)]

    def anywhere() -> str:
        at = chance.randrange(0x110000 - 0x800)
        return chr(at if at < 0xD800 else at + 0x800)

    def assigned() -> str:
        while unicodedata.category(found := chr(chance.randrange(0x20000))) in ("Cn", "Cs"):
            pass
        return found

    kinds = (
        anywhere, assigned, lambda: chance.choice(controls), lambda: chr(chance.randrange(256)),
        lambda: chance.choice(" \t\n\r\u3000\xa0"), lambda: chr(chance.randrange(32, 127)),
    )  # fmt: skip
    for number in range(count):
        of = kinds[number % (len(kinds) + 1) :][:1] or kinds
        yield "".join(chance.choice(of)() for _ in range(chance.randrange(1, 61)))


@dataclass(frozen=True, slots=True)
class LossProof:
    """Losses of documents before and after, in nats, float32."""

    documents: int
    tokens: int
    effect: Effect | None
    error: float
    """The largest |old + sum log(1 - p_removed) - new| / old of a document that is cut as before."""
    risen: int
    """Documents that are cut as before and cost more: none, or the proof fails."""

    @property
    def holds(self) -> bool:
        return self.tokens > 0 and self.error <= MAX_ERROR and not self.risen


def loss_proof(
    old_folder: Path,
    new_folder: Path,
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    rows: Rows,
    *,
    threads: int = 2,
    memory_bytes: int = 0,
    report: Report = silent,
) -> list[DocumentLoss]:
    """Losses of the same documents by both models, and the identity's other side. Raises as `document_nats`.

    The old model is gone through twice, once for its losses and once for what it gave to the rows that went.
    """
    total = 3 * len(before)

    def part(number: int) -> Report:
        return lambda done, of: report(int((number + done / max(1, of)) * len(before)), total)

    def nats(folder: Path, documents: Sequence[Sequence[int]], number: int) -> list[float]:
        return document_nats(folder, documents, threads=threads, memory_bytes=memory_bytes, report=part(number))

    old = nats(old_folder, before, 0)
    gained = log_kept(old_folder, before, rows, threads=threads, memory_bytes=memory_bytes, report=part(1))
    new = nats(new_folder, after, 2)
    return [DocumentLoss(*each) for each in zip(map(len, before), old, gained, new, strict=True)]


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """Of one document."""

    tokens: int
    """As the old tokenizer cuts it."""
    old: float
    log_kept: float
    """Sum of log(1 - p_removed): what renormalisation alone changes."""
    new: float

    @property
    def error(self) -> float:
        return abs(self.old + self.log_kept - self.new) / (self.old or 1.0)


@dataclass(frozen=True, slots=True)
class Effect:
    """On the losses of some documents together."""

    documents: int
    before: float
    """Nats."""
    after: float
    percent: float
    interval: Interval | None
    """Of `percent`, 95 % over documents; None with fewer than FEW."""


def effect(losses: Sequence[DocumentLoss]) -> Effect | None:
    """None without a token."""
    if not any(each.old for each in losses):
        return None
    found = change([each.old for each in losses], [each.new for each in losses])
    return Effect(len(losses), found.before, found.after, found.percent, found.interval if len(losses) >= FEW else None)


def summed(losses: Sequence[DocumentLoss]) -> LossProof:
    """Of documents that are cut as before."""
    risen = sum(each.new > each.old * (1 + MAX_ERROR) for each in losses)
    return LossProof(
        len(losses), sum(e.tokens for e in losses), effect(losses), max((e.error for e in losses), default=0.0), risen
    )
