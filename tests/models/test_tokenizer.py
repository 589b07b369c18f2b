"""Tokenizers: GPT-4's ids to the letter, text given back to the character, broken files refused."""

import json
import math
import re
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sn29.errors import Reason, Rejected
from sn29.evaluation.engine import sample_nats
from sn29.localnet.text import Texts, build, default_cache
from sn29.models.tokenizer import Tokenizer, train_bpe

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


def raw(content: dict[str, Any]) -> Tokenizer:
    """As the library reads it, without our rules."""
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


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
    with pytest.raises(Rejected, match="pre_tokenizer Split"):  # our own rule comes first
        loaded(tmp_path, tiny(pre_tokenizer=split))
    tokenizer = raw(tiny(pre_tokenizer=split))
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


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "'both cases"),
        ({"normalizer": {"type": "NFKC"}}, "'Both CASES, D"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "'' for ' '"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}}, "for '   three"),
        ({"normalizer": {"type": "Prepend", "prepend": " "}}, "for"),
        ({"decoder": None}, "for"),
        ({"pre_tokenizer": None}, "for"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}, "for"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_loses_text_is_refused_with_the_place(byte_tokenizer: Path, tmp_path: Path, change, shown) -> None:
    tokenizer = loaded(tmp_path, json.loads(byte_tokenizer.read_text()) | change)
    with pytest.raises(Rejected) as caught:
        tokenizer.check_lossless()
    assert caught.value.reason is Reason.ROUND_TRIP
    assert shown in caught.value.got


def test_lossless_tokenizers_pass(gpt4: Tokenizer, llama32k: Tokenizer, byte_tokenizer: Path, tmp_path: Path) -> None:
    gpt4.check_lossless()
    llama32k.check_lossless()
    joins_accents = json.loads(byte_tokenizer.read_text()) | {"normalizer": {"type": "NFC"}}
    for content in (json.loads(byte_tokenizer.read_text()), joins_accents):
        loaded(tmp_path, content).check_lossless()


def test_an_added_token_takes_no_space_around_it(byte_tokenizer: Path, tmp_path: Path) -> None:
    """Phi-3's own `</s>` asks for the spaces behind it, and is no special token: as the library reads it, they are lost."""
    end = {
        "id": 258,
        "content": "</s>",
        "single_word": False,
        "lstrip": True,
        "rstrip": True,
        "normalized": False,
        "special": False,
    }
    content = json.loads(byte_tokenizer.read_text()) | {"added_tokens": [end]}
    text = "a </s>  b"
    as_it_is, ours = raw(content), loaded(tmp_path, content)
    assert not as_it_is.round_trips(text, as_it_is.encode(text))
    assert ours.round_trips(text, ours.encode(text))
    assert 258 in ours.encode(text)
    ours.check_lossless()


# ---- no text for free ------------------------------------------------------------------------------------------------

AB = ["".join(letters) for n in range(1, 7) for letters in product("ab", repeat=n)]
"""All texts of one to six letters of a and b."""


def letters(**changes: Any) -> dict[str, Any]:
    model = {"vocab": {"a": 0, "b": 1}, "merges": []} | changes.pop("model", {})
    return tiny(**{"decoder": {"type": "Fuse"}, **changes, "model": model})


def added(contents: list[str], start: int = 2, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"added_tokens": [{"id": start + i, "content": text, **plain, **flags} for i, text in enumerate(contents)]}


PHRASES = ["".join(text) for text in product("ab", repeat=3)]
PAIRS = {"vocab": {"a": 0, "b": 1, "aa": 2, "ab": 3, "ba": 4, "bb": 5}, "merges": ["a a", "a b", "b a", "b b"]}
LOOKS_AHEAD = {
    "type": "Split",
    "pattern": {"Regex": r"\A[ab](?=[ab]*b\z)|\A[ab]{2}|[ab]"},
    "behavior": "Isolated",
    "invert": False,
}
NO_B = {"type": "Split", "pattern": {"String": "b"}, "behavior": "Removed", "invert": False}
SUFFIX_FIRST = {"type": "Replace", "pattern": {"String": "ab"}, "content": "b"}
TRICKS = {
    "letters": letters(),
    "phrases as added tokens": letters(**added(PHRASES)),
    "whole texts as added tokens": letters(**added(AB[2:])),
    "pairs as entries": letters(model=PAIRS),
    "the first piece says what the text ends with": letters(model=PAIRS, pre_tokenizer=LOOKS_AHEAD),
    "a token that swallows": letters(**added(["ab"], lstrip=True, rstrip=True)),
    "a token that stands alone": letters(**added(["ab", "aab"], single_word=True)),
    "letters go on the way in": letters(normalizer=SUFFIX_FIRST),
    "letters go on the way back": letters(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, SUFFIX_FIRST]}),
    "letters are removed": letters(pre_tokenizer=NO_B),
    "all entries are one": letters(model={"vocab": {"a": 0, "b": 0}}),
}  # fmt: skip


def llama(rows: int, seed: int, sharpness: float) -> Any:
    """A tiny model of random weights; the sharper, the surer of what it says. 0 knows nothing: every token 1/rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **shape)).eval()
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    return model


@pytest.mark.parametrize("trick", TRICKS)
def test_no_tokenizer_makes_text_free(trick: str) -> None:
    """The docstring's sum, for texts that come back: by number of tokens at most 1, whatever the model and its start token.

    The library reads these files as they are: what our rules refuse would not pay either.
    """
    tokenizer = raw(TRICKS[trick])
    encoded = {text: tokenizer.encode(text) for text in AB}
    back = {text: ids for text, ids in encoded.items() if tokenizer.round_trips(text, ids)}
    assert len({tuple(ids) for ids in back.values()}) == len(back)
    rows = tokenizer.largest_id() + 1
    for seed, sharpness, start in ((0, 0.0, 0), (1, 200.0, rows // 2), (2, 1000.0, rows - 1)):
        model, sums = llama(rows, seed, sharpness), defaultdict(float)
        for ids in back.values():
            sums[len(ids)] += math.exp(-sample_nats(model, ids, start))
        assert all(total <= 1 + 1e-5 for total in sums.values()), (trick, dict(sums))


def test_the_worked_example() -> None:
    """Three letters of {a, b}: 3 ln 2 by letters, ln 10 as a phrase, and nothing at all if the first token were not charged."""
    by_letters, by_phrase = raw(letters()), raw(letters(**added(PHRASES)))
    blank2, blank10 = llama(2, 0, 0.0), llama(10, 0, 0.0)
    for text in PHRASES:
        assert sample_nats(blank2, by_letters.encode(text), 0) == pytest.approx(3 * math.log(2), rel=1e-6)
        (phrase,) = by_phrase.encode(text)
        assert sample_nats(blank10, [phrase], 0) == pytest.approx(math.log(10), rel=1e-6)
        assert sample_nats(blank10, [], phrase) == 0  # what a first token in the start token's place would cost


def test_a_text_without_a_token_is_no_text_that_came_back(byte_tokenizer: Path, tmp_path: Path) -> None:
    removed = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Removed", "invert": False}
    tokenizer = loaded(tmp_path, json.loads(byte_tokenizer.read_text()) | {"pre_tokenizer": removed})
    assert tokenizer.encode("text") == []
    assert tokenizer.round_trips("", [])
    assert not tokenizer.round_trips("text", [])


# --- a vocabulary of one's own ----------------------------------------------------------------------------------------

RIVER = ["The river runs through the old town.", "A stone, a river and an old stone bridge.", "naïve café \U0001f469"] * 20


def test_a_trained_vocabulary_is_lossless_and_the_same_each_time(tmp_path: Path) -> None:
    made = train_bpe(RIVER, 300)
    assert train_bpe(RIVER, 300) == made
    path = tmp_path / "tokenizer.json"
    path.write_text(made)
    tokenizer = Tokenizer.load(path)
    tokenizer.check_lossless()
    assert tokenizer.id_of("<|endoftext|>") == 0
    assert tokenizer.largest_id() == 299
    assert tokenizer.round_trips(RIVER[0], ids := tokenizer.encode(RIVER[0]))
    assert len(ids) < 20 < len(RIVER[0])
    assert 0 not in tokenizer.encode("<|endoftext|>")


def test_a_vocabulary_without_room_or_text_is_refused() -> None:
    with pytest.raises(Rejected) as refused:
        train_bpe(RIVER, 256)
    assert (refused.value.reason, refused.value.got) == (Reason.SETTING, "256 entries")
    with pytest.raises(Rejected) as refused:
        train_bpe(["", ""], 300)
    assert refused.value.reason is Reason.TOKENIZER
