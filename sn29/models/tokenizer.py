"""Tokenizers: read from one JSON file, never from code. The only import of `tokenizers`.

A text is data from its first character to its last: the name of a special token inside a text is spelled out like any
other word, and nothing is put before, after or in place of the text. So `round_trips` can ask for equality to the
character.

A hostile tokenizer.json can make the Rust library panic, loop or ask for all memory: read those of others in a child
process with limits. Panics that can be caught become Rejected here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from sn29.errors import Reason, Rejected

MAX_BYTES = 20_000_000
"""Largest tokenizer.json that is opened; cl100k's takes 4 MB, a vocabulary of 200,000 entries about 15 MB."""

_PROBES = (
    "",
    " ",
    "Hello world",
    "  two spaces before, three after   ",
    "It's THEY'RE we'll I'd o'clock ’s",
    "0 12 123 1234 12345678901234567890 3.14159e-10 ١٢٣ ½ Ⅷ",
    "one\ntwo\r\nthree\n\n\n\tfour \r five\x0b\x0c",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # <-- #!@$%^&*()_+[]{}|;:,./?\n',
    "naïve café Ångström — “quotes” … cafe\u0301 İstanbul ſtraße",
    "日本語のテキスト 中文字符 한국어 русский текст ελληνικά עברית हिन्दी ไทย",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f600\U0001f600 \U0001d4d0 \U00020000",
    "\ufeff \u200b \u2060 \u2581 \x00 \x7f \x85 \xa0 \u3000 \uffff",
    "<|endoftext|><|endofprompt|></s><s><unk><0x0A>",
    "a" * 50 + " " * 50 + "=" * 50 + "\n" * 20,
)
"""What a fingerprint asks a tokenizer to encode: every kind of character on which splitters and normalizers differ."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A tokenizer that treats text as plain text and adds nothing to it."""

    _inner: Any
    """A `tokenizers.Tokenizer`, configured by `load` and not changed afterwards."""

    @classmethod
    def load(cls, path: Path, *, max_bytes: int = MAX_BYTES) -> Tokenizer:
        """From a tokenizer.json. Raises Rejected: MISSING_FILE, or TOKENIZER when it is too large or not usable."""
        if not path.is_file():
            raise Rejected(Reason.MISSING_FILE, "no file", "a tokenizer.json", path.name)
        if (size := path.stat().st_size) > max_bytes:
            raise Rejected(Reason.TOKENIZER, f"{size} bytes", f"at most {max_bytes} bytes", path.name)
        tokenizer = cls(_guarded(lambda: _plain(tokenizers.Tokenizer.from_file(str(path))), path.name))
        if tokenizer.largest_id() < 0:
            raise Rejected(Reason.TOKENIZER, "an empty vocabulary", "at least one token", path.name)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. Raises Rejected(TOKENIZER) when the library gives up on it."""
        return list(_guarded(lambda: self._inner.encode(text, add_special_tokens=False).ids))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, for many texts on all cores."""
        batch = list(texts)
        found = _guarded(lambda: self._inner.encode_batch_fast(batch, add_special_tokens=False))
        return [list(encoding.ids) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens by their names. Raises Rejected(TOKENIZER)."""
        return str(_guarded(lambda: self._inner.decode(list(ids), skip_special_tokens=False)))

    def round_trips(self, text: str, ids: Sequence[int]) -> bool:
        """True when the ids give back the text to the character: only then is their loss the text's."""
        return self.decode(ids) == text

    def id_of(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary, e.g. `<|endoftext|>`; None when there is none."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def largest_id(self) -> int:
        """Over vocabulary and added tokens; an embedding needs one row more. cl100k: 100276, with holes below."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def fingerprint(self) -> str:
        """sha256 hex of content and behaviour: vocabulary with ids, ordered merges, added tokens, ids of probe texts.

        Whatever the JSON's layout: two files with one fingerprint have the same entries and read the probes alike.
        """
        model = json.loads(self._inner.to_str())["model"]
        added = self._inner.get_added_tokens_decoder().items()
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        content = {
            "vocabulary": sorted((id_, token) for token, id_ in vocabulary.items()),
            "merges": _ordered_entries(model),
            "added": sorted((id_, token.content, token.special) for id_, token in added),
            "probes": list(zip(_PROBES, self.encode_batch(_PROBES), strict=True)),
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _plain(inner: Any) -> Any:
    """The same tokenizer without what its file may ask for besides: chance, cut-off, padding, special strings found in text."""
    if getattr(inner.model, "dropout", None) is not None:  # merges left out at random: another loss at each reading
        inner.model.dropout = None
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


def _ordered_entries(model: dict[str, Any]) -> list[Any]:
    """What decides segmentation, in order: BPE's merges as pairs; of other kinds the vocabulary, with its scores."""
    if "merges" not in model:
        return list(model["vocab"])
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _guarded(call: Callable[[], T], where: str = "") -> T:
    """The call's result; the library's failures (bare `Exception`, and Rust panics, which are none) become Rejected."""
    try:
        return call()
    except BaseException as failure:
        if type(failure) is Exception or type(failure).__name__ == "PanicException":
            what = " ".join(str(failure).split())[:200] or type(failure).__name__
            raise Rejected(Reason.TOKENIZER, what, "a tokenizer that works", where) from failure
        raise
