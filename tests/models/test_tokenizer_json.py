"""Our own reading of tokenizer.json: what the known tokenizers have passes, what is crafted is refused before the library."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers

from sn29.errors import Reason, Rejected
from sn29.models.tokenizer_json import MAX_ADDED, MAX_ENTRIES, MAX_ENTRY_BYTES, checked, is_plain_regex

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BPE: dict[str, Any] = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
}  # fmt: skip
ADDED = {"id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
NO_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def split(pattern: str, **fields: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | fields


def sequence(name: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", name: [*steps]}


def file(**parts: Any) -> bytes:
    return json.dumps({"version": "1.0", "added_tokens": [], "model": BPE} | parts).encode()


def refusal(data: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        checked(data)
    assert (caught.value.reason, caught.value.where) == (Reason.TOKENIZER, "tokenizer.json")
    return caught.value


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "post_processor": BYTE_LEVEL},  # GPT-2, Phi-2
        {"pre_tokenizer": sequence("pretokenizers", split(CL100K), BYTE_LEVEL | {"use_regex": False}), "decoder": BYTE_LEVEL},
        {"pre_tokenizer": split(CL100K, behavior="Removed", invert=True)},  # GPT-4, early
        {"normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, SPACE),
         "model": BPE | {"byte_fallback": True},
         "decoder": sequence("decoders", NO_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP)},  # Llama 2, Phi-3
        {"pre_tokenizer": METASPACE, "decoder": METASPACE},  # Mistral
        {"normalizer": {"type": "NFC"}, "added_tokens": [ADDED]},  # Qwen
        {"normalizer": SPACE, "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                                                "invert": False}},  # Gemma
        {"pre_tokenizer": sequence("pretokenizers", {"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL,
                                   {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]"))},  # Falcon
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2]], "byte_fallback": False}},
        {"model": {name: value for name, value in BPE.items() if name != "type"} | {"end_of_word_suffix": ""}},
        {"truncation": {"max_length": 3}, "padding": {"anything": 10**18}},
    ],
)  # fmt: skip
def test_known_tokenizers_pass_and_the_library_reads_what_is_written(parts):
    text = checked(file(**parts))
    assert tokenizers.Tokenizer.from_str(text).get_vocab_size(with_added_tokens=False) == 3
    written = json.loads(text)
    assert (written["post_processor"], written["truncation"], written["padding"]) == (None, None, None)


def test_steps_inside_each_other_are_laid_flat_and_keep_their_order():
    inner = sequence("normalizers", {"type": "NFC"}, {"type": "NFD"})
    written = json.loads(checked(file(normalizer=sequence("normalizers", inner, {"type": "Lowercase"}))))
    assert written["normalizer"] == sequence("normalizers", {"type": "NFC"}, {"type": "NFD"}, {"type": "Lowercase"})


def test_chance_is_left_out():
    assert json.loads(checked(file(model=BPE | {"dropout": 0.5})))["model"]["dropout"] is None


def replace(of: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": of}, "content": by}


@pytest.mark.parametrize(
    ("parts", "got"),
    [
        ({"auto_map": {"AutoTokenizer": "evil.Evil"}}, "the field auto_map"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "normalizer Precompiled"),
        ({"normalizer": {"type": "Evil"}}, "normalizer Evil"),
        ({"normalizer": {"type": ["NFC"]}}, "normalizer: {"),
        ({"normalizer": {"type": "NFC", "x": 1}}, "normalizer NFC: x 1"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}}, "pattern {'Regex'"),
        ({"normalizer": replace("", "x")}, "pattern {'String': ''}"),
        ({"normalizer": replace("a", "x" * 65)}, "content xxx"),
        ({"normalizer": sequence("normalizers", *[replace("a", "aaaaaaaaaa")] * 8)}, "makes 1e+08 letters of one"),
        ({"decoder": sequence("decoders", *[replace("a", "aa")] * 5)}, "a decoder that makes 32 letters"),
        ({"normalizer": sequence("normalizers", *[{"type": "NFC"}] * 17)}, "17 steps in the normalizer"),
        ({"normalizer": sequence("pretokenizers", {"type": "NFC"})}, "a Sequence of"),
        ({"pre_tokenizer": split("(a+a+)+b")}, "pre_tokenizer Split: pattern"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
        ({"pre_tokenizer": METASPACE | {"replacement": "ab"}}, "replacement ab"),
        ({"pre_tokenizer": split("a", behavior="Evil")}, "behavior Evil"),
        ({"pre_tokenizer": split("a", invert=1)}, "invert 1"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "WhitespaceSplit"),
        ({"decoder": {"type": "Strip", "content": "t", "start": 10**18, "stop": 0}}, "start 1000000000000000000"),
        ({"decoder": STRIP | {"stop": 1}}, "stop 1"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder WordPiece"),
        ({"decoder": {"type": "CTC"}}, "decoder CTC"),
        ({"decoder": 7}, "decoder: 7"),
        ({"model": None}, "a model of None"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "a model of type WordPiece"),
        ({"model": BPE | {"vocab": {}, "merges": []}}, "an empty vocabulary"),
        ({"model": BPE | {"vocab": ["a"]}}, "BPE: vocab"),
        ({"model": BPE | {"vocab": {"a": True}}}, "'a' with the id True"),
        ({"model": BPE | {"vocab": {"a": -1}}}, "'a' with the id -1"),
        ({"model": BPE | {"vocab": {"a": MAX_ENTRIES}}}, f"'a' with the id {MAX_ENTRIES}"),
        ({"model": BPE | {"vocab": {"a": 0, "b": 0}}}, "two entries with one id"),
        ({"model": BPE | {"vocab": {"a": 0, "x" * (MAX_ENTRY_BYTES + 1): 1}}}, f"an entry of {MAX_ENTRY_BYTES + 1} bytes"),
        ({"model": BPE | {"vocab": {"\ud800": 0}}}, "half of a surrogate pair"),
        ({"model": BPE | {"vocab": {f"{i}": i for i in range(MAX_ENTRIES + 1)}}}, f"{MAX_ENTRIES + 1} entries"),
        ({"model": BPE | {"merges": ["a z"]}}, "the merge a z"),
        ({"model": BPE | {"merges": ["b a"]}}, "the merge b a"),
        ({"model": BPE | {"merges": [["a", "b", "c"]]}}, "the merge ['a', 'b', 'c']"),
        ({"model": BPE | {"merges": [["", "a"]]}}, "the merge ['', 'a']"),
        ({"model": BPE | {"merges": [[1, 2]]}}, "the merge [1, 2]"),
        ({"model": BPE | {"continuing_subword_prefix": "é"}}, "continuing_subword_prefix é"),
        ({"model": BPE | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix </w>"),
        ({"model": BPE | {"dropout": 2.0}}, "dropout 2.0"),
        ({"model": BPE | {"fuse_unk": "yes"}}, "fuse_unk yes"),
        ({"model": {"type": "Unigram", "unk_id": 1, "vocab": [["a", 0.0]]}}, "unk_id 1"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["", 0.0]]}}, "the piece ['', 0.0]"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 1e308]]}}, "the piece ['a', 1e+308]"),
        ({"added_tokens": {"a": 3}}, "dict added tokens"),
        ({"added_tokens": [ADDED] * (MAX_ADDED + 1)}, f"{MAX_ADDED + 1} added tokens"),
        ({"added_tokens": [ADDED | {"content": ""}]}, "the added token"),
        ({"added_tokens": [ADDED | {"content": 7}]}, "the added token"),
        ({"added_tokens": [ADDED | {"id": 2**31}]}, "the added token"),
        ({"added_tokens": [{"content": "a"}]}, "the added token"),
    ],
)  # fmt: skip
def test_what_is_crafted_is_refused_with_what_was_found(parts, got):
    error = refusal(file(**parts))
    assert got in error.got, error


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{{{", file() + file(), b"\xef\xbb\xbf" + file(), file()[:-1] + b', "version": "1.0"}',
        file().replace(b'"dropout": null', b'"dropout": NaN'), file()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        file().replace(b'"ab": 2', b'"ab": ' + b"9" * 10_000), file()[:-1] + b', "\xff": 1}',
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_plain_json_object_is_refused(data):
    refusal(data)


KNOWN = (
    CL100K,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[一-龥぀-ゟ゠-ヿ]+", r"\p{N}{1,3}", "[0-9][0-9][0-9]", r"\d", " ", r"\s?\p{L}+", " ?[^(\\s|[.,!?…。，、।۔،])]+",
)  # fmt: skip


@pytest.mark.parametrize("pattern", KNOWN)
def test_the_splitters_of_known_tokenizers_pass(pattern):
    assert is_plain_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+a+)+b", "(x*)*y", r"(?:.*,){1,8}\z", r"\A\w(?=[\s\S]*z)|\w+", "(?<=aa)b", r"(?<p>\((?:[^()]|\g<p>)*\))",
        r"(\w+)\s+\1", "(?:(?:a{1000}){1000}){1000}", "a{999}", "(a", "a)", "[a", "", "|a", "a|", "x*", "x?", "x{0,3}", r"(?!\S)",
        "(?:ab)+", "(?i:a+)", r"\s*\s*x", "a{0,99}a{0,99}x", "a?a?a?a?a?b", r"\p{N}{1,3}+a", "a(?!b)c", "[a&&b]",
        "[[:alpha:]]", r"\b", r"\Ka", "a**", "a*?b", "^a",
        "a" * 1001, r"(?i)a", r"(?#x)a", r"\p{N}{1,3}++",
    ],
)  # fmt: skip
def test_what_repeats_groups_looks_around_or_matches_nothing_does_not(pattern):
    assert not is_plain_regex(pattern)
