"""Tokenizers: read from one JSON file, never from code. The only import of `tokenizers`.

A text is data from its first character to its last: the name of a special token inside a text is spelled out like any
other word, and nothing is put before, after or in place of the text. So `round_trips` can ask for equality to the
character.

A hostile tokenizer.json can make the Rust library panic, loop or ask for all memory. What it reads is written by
`tokenizer_json.checked`, from checked parts; still, read those of others in a child process with limits. Panics that can
be caught become Rejected here.

Why no choice of tokenizer gets text for free. A text x of n tokens costs -log p(tokens | start token), all n of them, and
counts only if its tokens give it back to the character. Then two texts never have the same tokens, and the model's
probabilities of all token sequences of length n add up to 1. So for each n

    sum over all texts x of n tokens of exp(-cost(x))  <=  1

whatever the tokenizer: it can share the probability out in another way, which is modelling, but it cannot make more of it.
Worked example: a model that knows nothing (every token 1/V), the eight texts of 3 letters of {a, b}, honest price 3 ln 2.

    letters, V = 2                    each text costs 3 ln 2 = 2.08; the sum is 8 exp(-2.08) = 1
    all eight as phrase tokens,       each costs ln 10 = 2.30, the sum is 0.8: a phrase is no present, its token is paid for.
      V = 10                          With the first token for nothing each would cost 0 and the sum be 8: text for free
    a hint: the first piece is "a"    a model that takes the hint saves ln 2 on the last letter, and pays ln 2 for the hint,
      or "ab" as the last letter says since the first token is one of twice as many. With that one for nothing it gains
    a token that swallows spaces      "a " and "a" have the same tokens: one does not come back, and costs +inf
    a start token that is a phrase    it stands in front of every text alike: no text's tokens say it, so none gets it

What is left is n itself: no end token is charged, so that a tokenizer which chose n at will could say ln(max_tokens) nats, 8
for 4,096, once a text of some thousand nats; the same for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from sn29.errors import Reason, Rejected, shown
from sn29.models.tokenizer_json import checked

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

_ADVERSARIAL = (
    "",
    " ",
    "   three spaces before, two after  ",
    "Both CASES, ǅ ſ ß İ",
    "It's THEY'RE we'll I'd o'clock ’s , . ! ? ' n't",
    "a , b . c ! d ? e do n't I 'm",
    "one\ntwo\r\nthree\n\n\n\tfour \r five\x0b\x0c\n ",
    "0 12 123 1234 12345678901234567890 3.14159e-10 ١٢٣",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # <-- #!@$%^&*()_+[]{}|;:,./?\\\n',
    "na\xefve caf\xe9 — “quotes” …",
    "日本語のテキスト 中文字符 한국어 русский текст ελληνικά עברית हिन्दी ไทย",
    "\U0001f469\u200d\U0001f680 \U0001f3f3\ufe0f\u200d\U0001f308 \U00020000 \U0010ffff",
    "\ufeff\u200b\u2028\u2029\x00\x01\x7f\x85\xa0\u3000\ue000\uffff",
    "½ Ⅷ ﬁ ２ ① ™ \U0001d4d0",
    "<|endoftext|> <s> </s> <unk> <pad> [UNK] [CLS] ## </w> <0x0A> <|im_start|> \u0120 \u010a @@ x",
    "</s>  </s>\n<s>a<|end|> <|user|>\n\n<|assistant|>  x",
    "a" * 3000,
    " " * 3000 + "x",
    "\n" * 500 + " \n" * 500 + "\t" * 500,
    "é日" * 500 + "=-" * 500 + "1" * 1000,
)
"""What a tokenizer must give back whatever the samples are. Left out: U+2581, which stands for the space in sentencepiece's
vocabularies, and letters with separate accents, which some join; the samples show whether they matter."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A tokenizer that treats text as plain text and adds nothing to it."""

    _inner: Any
    """A `tokenizers.Tokenizer`, configured by `load` and not changed afterwards."""

    @classmethod
    def load(cls, path: Path, *, max_bytes: int = MAX_BYTES) -> Tokenizer:
        """From a tokenizer.json. Raises Rejected: MISSING_FILE, or TOKENIZER when it is too large or not usable.

        The library is given what `tokenizer_json.checked` makes of the file: none of its bytes.
        """
        if not path.is_file():
            raise Rejected(Reason.MISSING_FILE, "no file", "a tokenizer.json", path.name)
        if (size := path.stat().st_size) > max_bytes:
            raise Rejected(Reason.TOKENIZER, f"{size} bytes", f"at most {max_bytes} bytes", path.name)
        text = checked(path.read_bytes(), path.name)
        tokenizer = cls(_guarded(lambda: _plain(tokenizers.Tokenizer.from_str(text)), path.name))
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
        return (bool(ids) or not text) and self.decode(ids) == text

    def check_lossless(self) -> None:
        """Raises Rejected(ROUND_TRIP) with the first text of a set of hard ones that does not come back."""
        for text in _ADVERSARIAL:
            ids = self.encode(text)
            if not self.round_trips(text, ids):
                back = self.decode(ids)
                at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
                got = f"{back[max(0, at - 20) : at + 20]!r} for {text[max(0, at - 20) : at + 20]!r}"
                raise Rejected(Reason.ROUND_TRIP, shown(got), "every text, to the character", "tokenizer.json")

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


def train_bpe(texts: Sequence[str], entries: int, end_token: str = "<|endoftext|>") -> str:
    """A byte-level BPE vocabulary of at most so many entries, as the text of a tokenizer.json; the same for the same texts.

    Entry 0 is the end-of-text token, 256 are the bytes, so that every text can be encoded; the others are the commonest pairs,
    within words as GPT-2 splits them. 14 million characters and 2,048 entries: 4 s of one core.
    Raises Rejected(SETTING) below 257 entries, Rejected(TOKENIZER) without a text.
    """
    if entries < 257:
        raise Rejected(Reason.SETTING, f"{entries} entries", "at least 257: the bytes and the end of text", "byte-level BPE")
    if not any(texts):
        raise Rejected(Reason.TOKENIZER, "no text", "text to train a vocabulary on")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[end_token],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _guarded(lambda: inner.train_from_iterator(texts, trainer))
    return str(inner.to_str())


def _plain(inner: Any) -> Any:
    """The same tokenizer, that finds no special strings in text. (Chance, cut-off and padding are not handed on to it.)"""
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
