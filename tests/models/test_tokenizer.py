"""Tokenizers: GPT-4's ids to the letter, text given back to the character, broken files refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sn29.errors import Reason, Rejected
from sn29.localnet.text import Texts, build, default_cache
from sn29.models.tokenizer import Tokenizer

ADVERSARIAL = (
    "",
    " ",
    "   three spaces before, two after  ",
    "\n\n\ttabs\r\nand\rreturns\r\n\r\n",
    "<|endoftext|>",
    "a<|endoftext|>b <|fim_prefix|><|endofprompt|> </s><s><unk><0x0A><0xFF>",
    "12345678901234567890 1,000,000.00 ٣٤٥ Ⅷ½",
    "naïve cafe\u0301 İstanbul ſtraße ǅ",
    "日本語 中文 한국어 русский ελληνικά עברית हिन्दी ไทย",
    "\U0001f469\u200d\U0001f680 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001d4d0 \U00020000 \U000e0041 \U0010ffff",
    "\ufeff\u200b\u2028\u2029\x00\x01\x7f\x85\xa0\u3000\ue000\uffff",
    "x" * 5000 + "é" * 500 + " " * 500,
    "def f(x):\n    return {'a': x**2, \"b\": [x] * 10}  # 100%\n",
    "".join(map(chr, range(0x250))),
)


@pytest.fixture(scope="module")
def texts() -> Texts:
    return build(default_cache())


@pytest.fixture(scope="module")
def gpt4(texts: Texts) -> Tokenizer:
    return Tokenizer.load(texts.gpt4 / "tokenizer.json")


@pytest.fixture(scope="module")
def llama32k(texts: Texts) -> Tokenizer:
    return Tokenizer.load(texts.llama32k / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [9906, 1917]),
        ("12345678901", [4513, 10961, 16474, 1721]),
        ("It's WE'LL  go\r\n\r\n  x", [2181, 596, 20255, 6, 4178, 220, 733, 881, 220, 865]),
        ("<|endoftext|>", [27, 91, 8862, 728, 428, 91, 29]),
        ("naïve café 日本 \U0001f469\u200d\U0001f680",
         [3458, 38672, 588, 53050, 76502, 22656, 62904, 102, 378, 235, 9468, 248, 222]),
        ("def f(x):\n    return x  # 100%\n\n", [755, 282, 2120, 997, 262, 471, 865, 220, 674, 220, 1041, 15804]),
    ],
)  # fmt: skip
def test_ids_of_gpt4_are_those_of_tiktoken(gpt4: Tokenizer, text: str, ids: list[int]) -> None:
    """Expected: tiktoken 0.14.0, cl100k_base, encode_ordinary."""
    assert gpt4.encode(text) == ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello", [22557]),
        ("Hello world", [22557, 1526]),
        (" leading  spaces", [28705, 5374, 28705, 10599]),
        ("naïve 日本 \U0001f469", [1879, 28920, 333, 28705, 29142, 29119, 28705, 243, 162, 148, 172]),
        ("a\n\n        b", [264, 13, 13, 5390, 287]),
        ("<s></s><0x0A>", [523, 28713, 3176, 28713, 3409, 28734, 28744, 28734, 28741, 28767]),
    ],
)
def test_ids_of_llama32k_are_those_of_sentencepiece(llama32k: Tokenizer, text: str, ids: list[int]) -> None:
    """Expected: sentencepiece on the same model file."""
    assert llama32k.encode(text) == ids


@pytest.mark.parametrize("text", ADVERSARIAL, ids=range(len(ADVERSARIAL)))
def test_texts_come_back_to_the_character(gpt4: Tokenizer, llama32k: Tokenizer, text: str) -> None:
    for tokenizer in (gpt4, llama32k):
        assert tokenizer.round_trips(text, tokenizer.encode(text))
        assert not tokenizer.round_trips(text + "!", tokenizer.encode(text))


def test_what_llama32k_cannot_give_back(llama32k: Tokenizer) -> None:
    """U+2581 stands for the space in its vocabulary: the one character that it loses, of all (here: of every 37th)."""
    every = [chr(n) for n in (*range(0, 0x110000, 37), 0x2581) if not 0xD800 <= n <= 0xDFFF]
    encoded = llama32k.encode_batch(every)
    assert [c for c, ids in zip(every, encoded, strict=True) if not llama32k.round_trips(c, ids)] == ["\u2581"]


def test_special_tokens_are_never_read_out_of_a_text(gpt4: Tokenizer, llama32k: Tokenizer) -> None:
    assert max(gpt4.encode("a<|endoftext|><|endofprompt|>b")) < 100257
    assert not {0, 1, 2} & set(llama32k.encode("a</s><s><unk>b"))


def test_ids_and_names(gpt4: Tokenizer, llama32k: Tokenizer) -> None:
    assert gpt4.id_of("<|endoftext|>") == 100257
    assert gpt4.id_of("no such token") is None
    assert gpt4.largest_id() == 100276
    assert (llama32k.id_of("<s>"), llama32k.id_of("</s>"), llama32k.largest_id()) == (1, 2, 31999)


def test_a_batch_is_what_its_texts_are(gpt4: Tokenizer) -> None:
    assert gpt4.encode_batch(ADVERSARIAL) == [gpt4.encode(text) for text in ADVERSARIAL]


def test_c00_requires_exactly_this_vocabulary(gpt4: Tokenizer) -> None:
    c00 = Path(__file__).parents[2] / "competitions" / "c00.yaml"
    found = re.search(r"fingerprint:\s*['\"]?([0-9a-f]{64})", c00.read_text())
    assert found
    assert gpt4.fingerprint() == found[1]


def tiny(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of four letters and three merges."""
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "c": 2, " ": 3, "ab": 4, "bc": 5, "abc": 6},
        "merges": [["a", "b"], ["b", "c"], ["ab", "c"]],
    }  # fmt: skip
    parts: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    return {"version": "1.0", **parts, "model": model | changes.pop("model", {}), **changes}


def loaded(folder: Path, content: dict[str, Any], indent: int | None = None) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, indent=indent))
    return Tokenizer.load(path)


def test_a_fingerprint_is_of_content_and_not_of_layout(tmp_path: Path) -> None:
    plain = loaded(tmp_path, tiny()).fingerprint()
    as_text = ["a b", "b c", "ab c"]
    assert loaded(tmp_path, dict(reversed(tiny().items())), indent=4).fingerprint() == plain
    assert loaded(tmp_path, tiny(model={"merges": as_text})).fingerprint() == plain


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}},
        {"model": {"vocab": {"a": 1, "b": 0, "c": 2, " ": 3, "ab": 4, "bc": 5, "abc": 6}}},
        {"model": {"vocab": {"a": 0, "b": 1, "c": 2, " ": 3, "ab": 4, "bc": 5, "abc": 6, "d": 7}}},
        {"added_tokens": [{"id": 6, "content": "abc", "single_word": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "special": True}]},
        {"normalizer": {"type": "Lowercase"}},
    ],
)  # fmt: skip
def test_a_fingerprint_shows_every_change(tmp_path: Path, change: dict[str, Any]) -> None:
    assert loaded(tmp_path, tiny(**change)).fingerprint() != loaded(tmp_path, tiny()).fingerprint()


def test_cut_off_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "a"}  # fmt: skip
    tokenizer = loaded(tmp_path, tiny(truncation=truncation, padding=padding))
    assert tokenizer.encode("abc abc") == [6, 3, 6]
    assert tokenizer.encode_batch(["abc abc", "a"])[1] == [0]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", '{"version": "1.0", "model": {}}', json.dumps(tiny(model={"vocab": {}, "merges": []})),
     json.dumps(tiny(model={"merges": [["a", "z"]]}))],
)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(Rejected) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert (caught.value.reason, caught.value.where) == (Reason.TOKENIZER, "tokenizer.json")


def test_a_large_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(Rejected) as missing:
        Tokenizer.load(path)
    assert missing.value.reason == Reason.MISSING_FILE
    path.write_text(json.dumps(tiny()))
    with pytest.raises(Rejected, match="at most 100 bytes"):
        Tokenizer.load(path, max_bytes=100)


def test_a_panic_of_the_library_is_a_refusal(tmp_path: Path) -> None:
    """A word splitter that backtracks without end meets the regex engine's own limit, and the engine panics."""
    split = {"type": "Split", "pattern": {"Regex": "(a+a+)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer = loaded(tmp_path, tiny(pre_tokenizer=split))
    for call in (lambda: tokenizer.encode("a" * 40), lambda: tokenizer.encode_batch(["a" * 40])):
        with pytest.raises(Rejected) as caught:
            call()
        assert caught.value.reason == Reason.TOKENIZER


def test_merges_are_never_left_out_by_chance(byte_tokenizer: Path, tmp_path: Path) -> None:
    """BPE dropout would give another loss at each reading, and every validator another one."""
    raw = json.loads(byte_tokenizer.read_text())
    raw["model"]["dropout"] = 0.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    text = "the theatre of the thesis " * 20
    ids = Tokenizer.load(byte_tokenizer).encode(text)
    assert all(Tokenizer.load(path).encode(text) == ids for _ in range(5))
