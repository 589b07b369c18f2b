"""Hostile tokenizer.json (B14, A10): what kills or stalls the library, what loses text, what tries to get text for free.

All of them read for a Phi in c01, where every model brings its own. `phi-plain` reads through the same byte-level BPE
without the change; `phi-uniform` gives every token the same probability, so that a loss counts tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .case import CHILD, DOWNLOAD, METADATA, Case, Content, Expected, Files, Pays, Twin, as_json, changed, refused
from .honest import BYTE_LEVEL, byte_level, special
from .weights import pickled

ANY = (METADATA, DOWNLOAD, CHILD)
UNUSABLE = (refused("tokenizer", "too_large", at=ANY),)
LOSSY = (refused("round_trip", "tokenizer", at=ANY),)
HARMLESS = (Pays(), *LOSSY)
"""Another tokenizer, no better and no cheaper than others: legal where it loses nothing. Judged under a uniform model."""
NEUTRAL = (Twin("phi-plain"), *UNUSABLE)
"""Without effect, or refused: both are right."""
BEYOND = (refused("vocabulary", "tokenizer", at=ANY),)


def cases(base: dict[str, Files], canary: str, phrase: str) -> list[Case]:
    """`phrase` is a whole text of those that are evaluated."""
    return [
        *_table(base, "normalizer", _normalizers()),
        *_table(base, "splitter", _splitters()),
        *_table(base, "decoder", _decoders()),
        *_table(base, "model", [*_bpe_models(), *_other_models()]),
        *_table(base, "added", _added()),
        *_table(base, "rest", _rest()),
        *_raw(base["phi-plain"], canary),
        *_free_text(base, phrase),
    ]


Row = tuple[str, str, dict[str, Any], tuple[Expected, ...]]
"""(name, why, parts of tokenizer.json, what must come out)."""


def _table(base: dict[str, Files], kind: str, rows: list[Row]) -> list[Case]:
    found = []
    for name, why, parts, expected in rows:
        model = base["phi-uniform" if Pays() in expected else "phi-plain"]
        files = model | {"tokenizer.json": as_json(byte_level(**parts))}
        found.append(Case(f"tokenizer-{kind}-{name}", "B14", why, files, expected, "c01"))
    return found


def hostile_parts() -> dict[str, list[Any]]:
    """Field of tokenizer.json -> the values that the tables below put there, small ones: for the fuzzer."""
    found: dict[str, list[Any]] = {}
    for rows in (_normalizers(), _splitters(), _decoders(), _bpe_models(), _other_models(), _added(), _rest()):
        for _, _, parts, _ in rows:
            for name, value in parts.items():
                if len(json.dumps(value)) < 20_000:
                    found.setdefault(name, []).append(value)
    return found


def _replace(of: str, by: str, *, regex: bool = False) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": of}, "content": by}


def _sequence(kind: str, parts: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: parts}


def _nested(kind: str, inner: Any, depth: int) -> Any:
    for _ in range(depth):
        inner = _sequence(kind, [inner])
    return inner


_DEEP = 200
"""Sequences in each other; serde stops at 128 levels. json.dumps cannot write many more."""


def _normalizers() -> list[Row]:
    grow = _sequence("normalizers", [_replace("a", "a" * 10)] * 8)
    return [
        ("lowercase", "letters lose their case", {"normalizer": {"type": "Lowercase"}}, LOSSY),
        ("nfkc", "compatible characters become one", {"normalizer": {"type": "NFKC"}}, LOSSY),
        ("nfc", "accents are joined", {"normalizer": {"type": "NFC"}}, (Twin("phi-plain"), *LOSSY)),
        ("strip", "spaces at both ends go", {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, LOSSY),
        ("accents", "accents go", {"normalizer": _sequence("normalizers", [{"type": "NFD"}, {"type": "StripAccents"}])}, LOSSY),
        ("bert", "clean text", {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                                               "strip_accents": None, "lowercase": True}}, LOSSY),
        ("erase", "e is erased", {"normalizer": _replace("e", "")}, LOSSY),
        ("erase-all", "everything is erased", {"normalizer": _replace(".", "", regex=True)}, LOSSY),
        ("replace-nothing", "a Replace that does not say what", {"normalizer": {"type": "Replace", "content": "x"}}, UNUSABLE),
        ("replace-by-nothing", "a Replace that does not say by what",
         {"normalizer": {"type": "Replace", "pattern": {"String": "x"}}}, UNUSABLE),
        ("squeeze", "two spaces become one", {"normalizer": _replace("  ", " ")}, LOSSY),
        ("prepend", "a letter in front", {"normalizer": {"type": "Prepend", "prepend": "x"}}, LOSSY),
        ("grow", "a grows to 10^8 letters", {"normalizer": grow}, LOSSY),
        ("grow-slowly", "every letter twice, eight times over",
         {"normalizer": _sequence("normalizers", [_replace("(.)", "$1$1", regex=True)] * 8)}, LOSSY),
        ("grow-empty", "what matches nowhere grows everywhere", {"normalizer": _replace("", "xxxxxxxxxx", regex=True)}, LOSSY),
        ("backtrack", "a pattern without end", {"normalizer": _replace("(a+a+)+b", "x", regex=True)}, UNUSABLE),
        ("precompiled", "a table of garbage",
         {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 50}}, LOSSY),
        ("precompiled-huge", "a table that points out of itself",
         {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////////////////////w=="}}, LOSSY),
        ("nested", "200 sequences in each other", {"normalizer": _nested("normalizers", {"type": "NFC"}, _DEEP)}, UNUSABLE),
        ("deep", "40 sequences in each other", {"normalizer": _nested("normalizers", {"type": "NFC"}, 40)}, (*NEUTRAL, *LOSSY)),
        ("many", "20,000 steps", {"normalizer": _sequence("normalizers", [{"type": "NFC"}] * 20_000)}, LOSSY),
        ("byte-level", "bytes twice", {"normalizer": {"type": "ByteLevel"}}, LOSSY),
        ("unknown", "a type that does not exist", {"normalizer": {"type": "Evil"}}, UNUSABLE),
        ("nmt", "control characters go", {"normalizer": {"type": "Nmt"}}, LOSSY),
    ]  # fmt: skip


def _split(pattern: str, behavior: str = "Isolated", **fields: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False} | fields


def _then_bytes(first: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": _sequence("pretokenizers", [first, BYTE_LEVEL | {"use_regex": False}])}


def _splitters() -> list[Row]:
    return [
        ("backtrack", "(a+a+)+b: the regex engine gives up and panics", _then_bytes(_split("(a+a+)+b")), UNUSABLE),
        ("quadratic", "a pattern that looks at the rest from every place",
         _then_bytes(_split(r"(?:.*,){1,8}\z")), (*NEUTRAL, *LOSSY)),
        ("nested-star", "(x*)*y", _then_bytes(_split("(x*)*y|(a*)*b")), (*NEUTRAL, *LOSSY)),
        ("look-ahead", "the first word's length says whether a z comes later", _then_bytes(_split(r"\A\w(?=[\s\S]*z)|\w+")),
         HARMLESS),
        ("look-behind", "a look-behind of 1,000 letters", _then_bytes(_split("(?<=" + "a" * 1000 + ")b")), NEUTRAL),
        ("recursion", "a pattern that calls itself", _then_bytes(_split(r"(?<p>\((?:[^()]|\g<p>)*\))")), NEUTRAL),
        ("back-reference", "a pattern with a memory", _then_bytes(_split(r"(\w+)\s+\1\1\1*")), NEUTRAL),
        ("repeat-huge", "(a{1000}){1000}", _then_bytes(_split("(?:(?:a{1000}){1000}){1000}")), NEUTRAL),
        ("alternatives", "60,000 alternatives", _then_bytes(_split("|".join(f"x{i}" for i in range(60_000)))), UNUSABLE),
        ("long", "a pattern of 1 MB", _then_bytes(_split("(?:" * 10 + "a" * 1_000_000 + ")" * 10)), UNUSABLE),
        ("deep", "10,000 brackets", _then_bytes(_split("(" * 10_000 + "a" + ")" * 10_000)), UNUSABLE),
        ("invalid", "a bracket that does not close", _then_bytes(_split("(a")), UNUSABLE),
        ("empty", "a pattern that matches nothing, everywhere", _then_bytes(_split("")), HARMLESS),
        ("removed", "spaces are removed", _then_bytes(_split(r"\s+", "Removed")), LOSSY),
        ("removed-all", "everything is removed", _then_bytes(_split(r"[\s\S]+", "Removed")), LOSSY),
        ("whitespace", "spaces are dropped between words", {"pre_tokenizer": {"type": "WhitespaceSplit"}}, LOSSY),
        ("punctuation", "punctuation is dropped", _then_bytes({"type": "Punctuation", "behavior": "Removed"}), LOSSY),
        ("delimiter", "split at e", _then_bytes({"type": "CharDelimiterSplit", "delimiter": "e"}), LOSSY),
        ("fixed-0", "pieces of length 0", _then_bytes({"type": "FixedLength", "length": 0}), (*NEUTRAL, *LOSSY)),
        ("fixed-huge", "pieces of length 2^63", _then_bytes({"type": "FixedLength", "length": 2**63}), NEUTRAL),
        ("leading-space", "a space in front: one character for free",
         {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, LOSSY),
        ("metaspace-long", "a replacement of two characters", {"pre_tokenizer": {"type": "Metaspace", "replacement": "ab",
         "prepend_scheme": "always", "split": True}}, UNUSABLE),
        ("nested", "200 sequences in each other", {"pre_tokenizer": _nested("pretokenizers", BYTE_LEVEL, _DEEP)}, UNUSABLE),
        ("many", "5,000 steps", {"pre_tokenizer": _sequence("pretokenizers", [_split(r"\d")] * 5000 + [BYTE_LEVEL])}, UNUSABLE),
        ("none", "bytes are never made", {"pre_tokenizer": None}, LOSSY),
        ("unknown", "a type that does not exist", {"pre_tokenizer": {"type": "Evil"}}, UNUSABLE),
        ("number", "a number", {"pre_tokenizer": 7}, UNUSABLE),
    ]  # fmt: skip


def _decoders() -> list[Row]:
    return [
        ("none", "bytes are never joined", {"decoder": None}, LOSSY),
        ("erase", "e is erased on the way back", {"decoder": _sequence("decoders", [BYTE_LEVEL, _replace("e", "")])}, LOSSY),
        ("replace-nothing", "a Replace that does not say what", {"decoder": {"type": "Replace", "content": "x"}}, UNUSABLE),
        ("strip", "the first space goes",
         {"decoder": _sequence("decoders", [BYTE_LEVEL, {"type": "Fuse"}, {"type": "Strip", "content": " ",
                                                                               "start": 1, "stop": 1}])}, LOSSY),
        ("strip-huge", "10^18 letters are stripped", {"decoder": _sequence("decoders", [BYTE_LEVEL, {"type": "Fuse"},
         {"type": "Strip", "content": "t", "start": 10**18, "stop": 10**18}])}, LOSSY),
        ("wordpiece", "spaces are cleaned up", {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, LOSSY),
        ("ctc", "repeated tokens become one",
         {"decoder": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}}, LOSSY),
        ("grow", "the text grows on the way back",
         {"decoder": _sequence("decoders", [BYTE_LEVEL] + [_replace("e", "e" * 10)] * 8)}, LOSSY),
        ("backtrack", "a pattern without end",
         {"decoder": _sequence("decoders", [BYTE_LEVEL, _replace("(a+a+)+b", "", regex=True)])}, UNUSABLE),
        ("nested", "200 sequences in each other", {"decoder": _nested("decoders", BYTE_LEVEL, _DEEP)}, UNUSABLE),
        ("unknown", "a type that does not exist", {"decoder": {"type": "Evil"}}, UNUSABLE),
    ]  # fmt: skip


def _bpe_models() -> list[Row]:
    plain = byte_level()["model"]
    vocab, merges = plain["vocab"], plain["merges"]

    def bpe(**fields: Any) -> dict[str, Any]:
        return {"model": plain | fields}

    letters = _letters()
    big = {"model": plain | {"vocab": vocab | {f"token number {i}": 259 + i for i in range(400_000)}}}
    return [
        ("id-beyond", "an id that the embedding does not have", bpe(vocab=vocab | {"the": 5000}), BEYOND),
        ("id-2e31", "an id of 2^31", bpe(vocab=vocab | {"the": 2**31}), BEYOND),
        ("id-2e32", "an id of 2^32", bpe(vocab=vocab | {"the": 2**32}), UNUSABLE),
        ("id-2e64", "an id of 2^64", bpe(vocab=vocab | {"the": 2**64}), UNUSABLE),
        ("id-negative", "an id of -1", bpe(vocab=vocab | {"the": -1}), UNUSABLE),
        ("id-float", "an id of 1.5", bpe(vocab=vocab | {"the": 1.5}), UNUSABLE),
        ("id-true", "true as an id", bpe(vocab=vocab | {"the": True}), UNUSABLE),
        ("id-text", "a text as an id", bpe(vocab=vocab | {"the": "257"}), UNUSABLE),
        ("id-shared", "th and the have one id", bpe(vocab=vocab | {"the": 256}), LOSSY),
        ("id-all-shared", "all tokens have one id", bpe(vocab=dict.fromkeys(vocab, 0)), LOSSY),
        ("vocabulary-empty", "no entry", bpe(vocab={}, merges=[]), UNUSABLE),
        ("vocabulary-400k", "400,000 entries", big, UNUSABLE),
        ("vocabulary-list", "a list", bpe(vocab=list(vocab)), UNUSABLE),
        ("vocabulary-letters", "26 letters and nothing for the rest", bpe(vocab=letters, merges=[]), LOSSY),
        ("vocabulary-unknown-fused", "everything unknown is one token",
         bpe(vocab=letters | {"<unk>": 27}, merges=[], unk_token="<unk>",
                                                                        fuse_unk=True), LOSSY),
        ("token-1mb", "a token of 1 MB", bpe(vocab=vocab | {"x" * 1_000_000: 259}), (*NEUTRAL,)),
        ("merge-unknown", "a merge of tokens that are not there", bpe(merges=[*merges, ["q", "zz"]]), UNUSABLE),
        ("merge-no-result", "a merge whose result is not there", bpe(merges=[*merges, ["q", "z"]]), UNUSABLE),
        ("merge-of-three", "a merge of three", bpe(merges=[*merges, ["t", "h", "e"]]), UNUSABLE),
        ("merge-numbers", "a merge of numbers", bpe(merges=[[1, 2]]), UNUSABLE),
        ("merge-empty", "a merge of nothing", bpe(merges=[["", ""]]), UNUSABLE),
        ("merges-twice", "the same merges 20,000 times", bpe(merges=merges * 20_000), (Twin("phi-plain"), *UNUSABLE)),
        ("prefix", "continuing_subword_prefix", bpe(continuing_subword_prefix="##"), LOSSY),
        ("prefix-multibyte", "a prefix that cuts characters", bpe(continuing_subword_prefix="\U0001f469\u200d"), LOSSY),
        ("suffix", "end_of_word_suffix", bpe(end_of_word_suffix="</w>"), LOSSY),
        ("dropout", "merges left out by chance", bpe(dropout=0.5), NEUTRAL),
        ("dropout-2", "a chance of 2", bpe(dropout=2.0), UNUSABLE),
        ("unknown-missing", "an unk_token that is not there", bpe(unk_token="<none>"), NEUTRAL),
        ("fallback-without-bytes", "byte_fallback without byte tokens", bpe(byte_fallback=True, vocab=letters, merges=[]), LOSSY),
    ]  # fmt: skip


def _letters() -> dict[str, int]:
    return {character: index for index, character in enumerate("abcdefghijklmnopqrstuvwxyz ")}


def _other_models() -> list[Row]:
    plain, letters = byte_level()["model"], _letters()
    vocab, merges = plain["vocab"], plain["merges"]
    pieces = [["<unk>", 0.0], *([token, -5.0] for token in vocab)]
    return [
        ("unigram-empty", "no piece", {"model": {"type": "Unigram", "unk_id": 0, "vocab": []}}, UNUSABLE),
        ("unigram-unknown-beyond", "unk_id behind the end",
         {"model": {"type": "Unigram", "unk_id": 10**6, "vocab": pieces}}, UNUSABLE),
        ("unigram-none", "no unk_id", {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, LOSSY),
        ("unigram-scores", "scores of 1e308",
         {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[p, 1e308] for p, _ in pieces]}}, (*HARMLESS, *BEYOND)),
        ("unigram-same", "one piece twice",
         {"model": {"type": "Unigram", "unk_id": 0, "vocab": [*pieces, *pieces]}}, (*HARMLESS, *BEYOND)),
        ("unigram-empty-piece", "an empty piece",
         {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["", 5.0], *pieces]}}, (*HARMLESS, *BEYOND)),
        ("unigram-bytes", "the letters <0x0A> and the byte 0x0A have one token", _unigram_with_bytes(), LOSSY),
        ("wordpiece", "words of 10^18 letters",
         {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 10**18, "vocab": {"[UNK]": 0, **{f"##{c}": i for i, c in enumerate(letters, 1)}}}}, LOSSY),
        ("wordpiece-no-unknown", "no [UNK]",
         {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100, "vocab": {"a": 0}}}, LOSSY),
        ("wordlevel", "every word unknown", {"model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}, LOSSY),
        ("wordlevel-no-unknown", "no unknown word",
         {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}, LOSSY),
        ("type-unknown", "a type that does not exist", {"model": {"type": "Evil", "vocab": {}}}, UNUSABLE),
        ("type-list", "a list as type", {"model": {"type": ["BPE"], "vocab": vocab, "merges": merges}}, UNUSABLE),
        ("null", "no model", {"model": None}, UNUSABLE),
    ]  # fmt: skip


def _unigram_with_bytes() -> dict[str, Any]:
    """Unigram finds its byte pieces in the text, too: `<0x0A>` comes back as a line end. (BPE makes its by merges alone.)"""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), ("\u2581", -2.0), ("the", -4.0)]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}
    return {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [list(piece) for piece in pieces], "byte_fallback": True},
        "pre_tokenizer": metaspace,
        "decoder": _sequence("decoders", [{"type": "ByteFallback"}, metaspace]),
    }


def _added() -> list[Row]:
    def one(content: str, id_: int = 259, **fields: Any) -> dict[str, Any]:
        return {"added_tokens": [special(content, id_, **{"special": False} | fields)]}

    crowd = {"added_tokens": [special(f"<t{i}>", 259 + i, special=False) for i in range(150_000)]}
    return [
        ("left-spaces", "a word that swallows the spaces before it", one("the", lstrip=True), HARMLESS),
        ("right-spaces", "a word that swallows the spaces behind it", one("the", rstrip=True), HARMLESS),
        ("normalized", "a token that matches the lowered text",
         one("THE", normalized=True) | {"normalizer": {"type": "Lowercase"}}, LOSSY),
        ("shadow", "two names for one id",
         {"added_tokens": [special(" the", 259, special=False), special(" and", 259, special=False)]}, HARMLESS),
        ("shadow-model", "a name for an id of the vocabulary", one("theatre", 257), HARMLESS),
        ("empty", "an empty token", one(""), (Twin("phi-plain"), *LOSSY)),
        ("space", "the space", one(" "), (*HARMLESS, *BEYOND)),
        ("id-beyond", "an id that the embedding does not have", one("the", 100_000), (*HARMLESS, *BEYOND)),
        ("id-2e31", "an id of 2^31", one("zzzz", 2**31), (*BEYOND, Twin("phi-plain"))),
        ("id-2e64", "an id of 2^64", one("zzzz", 2**64), UNUSABLE),
        ("id-negative", "an id of -1", one("zzzz", -1), UNUSABLE),
        ("crowd", "150,000 tokens", crowd, UNUSABLE),
        ("long", "a token of 1 MB", one("x" * 1_000_000), NEUTRAL),
        ("single-word", "a token that must stand alone", one("theatre", single_word=True, lstrip=True, rstrip=True), HARMLESS),
        ("special-words", "ordinary words as special tokens",
         {"added_tokens": [special("the", 257), special(" ", 32)]}, (*NEUTRAL, *LOSSY, *BEYOND)),
        ("numbers", "a number as content", {"added_tokens": [special("a", 259) | {"content": 7}]}, UNUSABLE),
        ("missing-fields", "only a name", {"added_tokens": [{"content": "a"}]}, UNUSABLE),
        ("object", "an object", {"added_tokens": {"a": 259}}, UNUSABLE),
    ]  # fmt: skip


def _rest() -> list[Row]:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    flood_pieces = [{"SpecialToken": {"id": "a", "type_id": 0}}] * 50_000 + [{"Sequence": {"id": "A", "type_id": 0}}]
    flood = {"type": "TemplateProcessing", "single": flood_pieces, "pair": flood_pieces,
             "special_tokens": {"a": {"id": "a", "ids": [1] * 1000, "tokens": ["a"] * 1000}}}  # fmt: skip
    alone = [{"SpecialToken": {"id": "a", "type_id": 0}}]
    no_text = {"type": "TemplateProcessing", "single": alone, "pair": alone,
               "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}}}  # fmt: skip
    padding = {"strategy": {"Fixed": 10**18}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
               "pad_token": "a"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    return [
        ("padding-1e18", "padding to 10^18", {"padding": padding}, NEUTRAL),
        ("padding-multiple", "padding to multiples of 2^60",
         {"padding": padding | {"strategy": "BatchLongest", "pad_to_multiple_of": 2**60}}, NEUTRAL),
        ("padding-0", "padding to multiples of 0",
         {"padding": padding | {"strategy": "BatchLongest", "pad_to_multiple_of": 0}}, NEUTRAL),
        ("truncation-1", "only the first token is kept", {"truncation": cut}, NEUTRAL),
        ("truncation-0", "no token is kept", {"truncation": cut | {"max_length": 0}}, NEUTRAL),
        ("truncation-stride", "a stride beyond the length", {"truncation": cut | {"stride": 10**9}}, NEUTRAL),
        ("template-unknown", "a template with an unknown token", {"post_processor": template}, (*NEUTRAL, *LOSSY)),
        ("template-flood", "a template of 50,000 tokens", {"post_processor": flood}, NEUTRAL),
        ("template-no-text", "a template without the text", {"post_processor": no_text}, (*NEUTRAL, *LOSSY)),
        ("bert-ids", "a closing token of id 2^31",
         {"post_processor": {"type": "BertProcessing", "sep": ["a", 2**31], "cls": ["b", 2**31]}}, NEUTRAL),
        ("roberta-trim", "offsets trimmed", {"post_processor": {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2],
         "trim_offsets": True, "add_prefix_space": True}}, NEUTRAL),
        ("version", "version 99", {"version": "99.0"}, (*NEUTRAL,)),
        ("unknown-key", "a key that nobody knows", {"auto_map": {"AutoTokenizer": "evil.Evil"}}, NEUTRAL),
    ]  # fmt: skip


def _raw(phi: Files, canary: str) -> list[Case]:
    """Bytes that are no plain JSON object, or one that two readers read differently."""
    plain = json.dumps(byte_level()).encode()
    inner = plain[1:-1]
    lower = b', "normalizer": {"type": "Lowercase"}}'
    table: list[tuple[str, str, Content, tuple[Expected, ...]]] = [
        ("not-json", "no JSON", b"{{{", UNUSABLE),
        ("empty", "no byte", b"", UNUSABLE),
        ("null", "null", b"null", UNUSABLE),
        ("list", "a list", b"[" + plain + b"]", UNUSABLE),
        ("trailing", "two objects", plain + plain, UNUSABLE),
        ("key-twice", "the normalizer twice", b"{" + inner + lower, LOSSY),
        ("nan", "NaN as dropout", plain.replace(b'"dropout": null', b'"dropout": NaN'), UNUSABLE),
        ("surrogate", "half a character as a token", plain.replace(b'"th": 256', b'"\\ud800": 256'), UNUSABLE),
        ("mark", "a byte order mark", b"\xef\xbb\xbf" + plain, UNUSABLE),
        ("latin1", "bytes that are no UTF-8", plain[:-1] + b', "\xff": 1}', UNUSABLE),
        ("deep", "100,000 lists", b"{" + inner + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", UNUSABLE),
        ("digits", "an id of 10,000 digits", plain.replace(b'"th": 256', b'"th": ' + b"9" * 10_000), UNUSABLE),
        ("pickle", "a pickle", pickled(canary), UNUSABLE),
        ("21-mb", "21 MB of spaces behind", lambda: plain + b" " * 21_000_000, UNUSABLE),
        ("proto", "a sentencepiece file", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2", UNUSABLE),
    ]  # fmt: skip
    found = [
        Case(f"tokenizer-raw-{name}", "B14", why, phi | {"tokenizer.json": data}, expected, "c01")
        for name, why, data, expected in table
    ]
    none = {name: content for name, content in phi.items() if name != "tokenizer.json"}
    return [
        *found,
        Case("tokenizer-none", "B14", "no tokenizer.json in c01", none, (refused("tokenizer", "missing_file"),), "c01"),
    ]


def _free_text(base: dict[str, Files], phrase: str) -> list[Case]:
    """A10 under a uniform model: whatever the tokens are, each costs ln(vocabulary), the first one too."""
    uniform = base["phi-uniform"]

    def one(name: str, why: str, made: dict[str, Any], make: Callable[[Files], Files] = lambda files: files) -> Case:
        return Case(f"free-{name}", "A10", why, make(uniform | {"tokenizer.json": as_json(made)}), HARMLESS, "c01")

    plain = byte_level()["model"]
    phrase_bytes = phrase.replace(" ", "\u0120")
    words = {"added_tokens": [special(phrase, 259, special=False)]}
    as_piece = byte_level(model=plain | {"vocab": plain["vocab"] | {phrase_bytes: 259}, "ignore_merges": True},
                          pre_tokenizer=BYTE_LEVEL | {"use_regex": False})  # fmt: skip
    hint = _split(r"\A[\s\S](?=[\s\S]*the)|\A[\s\S]{2}|[\s\S]+")
    return [
        one("phrase-added", "a whole text as an added token", byte_level(**words)),
        one("phrase-piece", "a whole text as an entry of the vocabulary", as_piece),
        one("phrase-start", "the phrase's token is the start token", byte_level(**words),
            lambda files: changed(files, "config.json", bos_token_id=259)),
        one("hint", "the first token's length says something of the rest", byte_level(**_then_bytes(hint))),
        one("start-list", "a list of start tokens",
         byte_level(), lambda files: changed(files, "config.json", bos_token_id=[257, 258])),
        one("start-none", "no start token but an end token",
         byte_level(), lambda files: changed(files, "config.json", bos_token_id=None)),
        one("special-phrase", "a whole text as a special token", byte_level(added_tokens=[special(phrase, 259)])),
        one("template", "a template that adds tokens", byte_level(post_processor=BYTE_LEVEL)),
        one("many-spaces", "runs of spaces as tokens",
         byte_level(added_tokens=[special(" " * n, 257 + n, special=False) for n in range(2, 40)])),
    ]  # fmt: skip
