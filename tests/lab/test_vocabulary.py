"""What may go from a vocabulary: by hand, and by the library on random vocabularies of every kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sn29.errors import Rejected
from sn29.lab.pruning import is_same, random_texts, round_trips, spellings
from sn29.lab.vocabulary import (
    Point,
    Pruned,
    Usage,
    Used,
    Vocabulary,
    covering,
    kept,
    kind_of,
    parameters_of_rows,
    used,
    without_the_rest,
)
from sn29.models.config import parse_config
from sn29.models.tokenizer import Tokenizer, train_bpe

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def special(content: str, id_: int, *, is_special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id_, "content": content, **flags, "special": is_special}


def bpe(vocab: list[str], merges: list[Any], **more: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {entry: id_ for id_, entry in enumerate(vocab)}, "merges": merges, **more}


def content_of(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": None,
        "model": model,
        **more,
    }


def opened(content: dict[str, Any], folder: Path, name: str = "tokenizer.json") -> tuple[Vocabulary, Tokenizer]:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return Vocabulary.read(folder / name)


def sentencepiece(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As Phi3's and Llama 2's: spaces as U+2581, one before the text."""
    normalizers = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    return content_of(model, normalizer=normalizer, decoder={"type": "Sequence", "decoders": decoders}, **more)


def words(seed: int, count: int) -> list[str]:
    """Documents of words that share syllables, the first ones common and the last ones rare."""
    chance = random.Random(seed)
    syllables = ["the", "re", "in", "er", "ing", "at", "on", "ab", "lo", "qu", "é", "zz", "th", "日本"]
    stock = ["".join(chance.choices(syllables, k=chance.randrange(1, 4))) for _ in range(150)]
    weights = [1 / (rank + 1) for rank in range(len(stock))]
    return [" ".join(chance.choices(stock, weights, k=12)) for _ in range(count)]


def byte_level(ignore_merges: bool) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(train_bpe(words(1, 300), 420))
    found["model"]["ignore_merges"] = ignore_merges
    return found


def phi3_like() -> dict[str, Any]:
    """Every way to join two pieces is a merge, as converters of SentencePiece models write them."""
    trained = list(
        json.loads(train_bpe([text.replace("é", "e").replace("日本", "n") for text in words(1, 300)], 420))["model"]["vocab"]
    )
    pieces = [piece.replace("Ġ", SPACE) for piece in trained if len(piece) > 1 and piece != "<|endoftext|>"]
    letters = sorted({letter for piece in pieces for letter in piece} | set("é日本xyz"))
    held = [*letters, *pieces]
    merges = [
        [text[:cut], text[cut:]] for text in pieces for cut in range(1, len(text)) if text[:cut] in held and text[cut:] in held
    ]
    model = bpe(["<unk>", "<s>", "</s>", *BYTES, *held], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return sentencepiece(model, added_tokens=[special("<unk>", 0), special("<s>", 1), special("</s>", 2)])


def unigram() -> dict[str, Any]:
    chance = random.Random(5)
    pieces = sorted(
        {word[a:b] for text in words(1, 60) for word in text.split() for a in range(4) for b in range(a + 1, a + 5)} - {""}
    )
    scored = [[piece, -round(chance.uniform(2, 12), 2)] for piece in pieces]
    head = [["<unk>", 0.0], *([byte, -14.0] for byte in BYTES), [SPACE, -3.0]]
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": head + scored}
    return sentencepiece(model, added_tokens=[special("<unk>", 0)])


def pruned_by(vocabulary: Vocabulary, tokenizer: Tokenizer, texts: list[str]) -> Pruned:
    ids = {id_ for document in tokenizer.encode_batch(texts) for id_ in document}
    return without_the_rest(vocabulary, kept(vocabulary, ids).entries)


KINDS = {
    "byte-level": lambda: byte_level(False), "ignore-merges": lambda: byte_level(True), "phi3": phi3_like, "unigram": unigram,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_before_and_every_text_comes_back(kind: str, tmp_path: Path) -> None:
    vocabulary, before = opened(KINDS[kind](), tmp_path)
    counted, other = words(2, 25), words(3, 200)
    pruned = pruned_by(vocabulary, before, counted)
    new, after = opened(dict(pruned.vocabulary.content), tmp_path, "pruned.json")
    assert len(pruned.vocabulary) < 0.95 * len(vocabulary)
    assert new.ids == pruned.vocabulary.ids, "the library numbers the entries as it was told"
    assert sorted(new.ids.values()) == list(range(len(new)))
    cut = [is_same(old, new, pruned) for old, new in zip(before.encode_batch(counted), after.encode_batch(counted), strict=True)]
    assert all(cut)
    unchanged = 0
    for old, found in zip(before.encode_batch(other), after.encode_batch(other), strict=True):
        assert is_same(old, found, pruned) == all(id_ in pruned.new_id for id_ in old)
        unchanged += is_same(old, found, pruned)
    assert 0 < unchanged < len(other), "texts that were not counted: some need what went"
    went = sorted(set(vocabulary.ids.values()) - pruned.new_id.keys())
    trips = round_trips(before, after, [*random_texts(300, 7), *other, *spellings(before, went, 7)])
    assert trips.different == ()
    assert trips.whole > 200


@pytest.mark.parametrize("kind", ["byte-level", "phi3"])
def test_without_the_parts_on_the_way_texts_are_cut_otherwise(kind: str, tmp_path: Path) -> None:
    """What the closure is for: the same texts, and only what comes out of them."""
    vocabulary, before = opened(KINDS[kind](), tmp_path)
    counted = words(2, 25)
    ids = {id_ for document in before.encode_batch(counted) for id_ in document}
    stays = kept(vocabulary, ids)
    naive = without_the_rest(vocabulary, stays.entries - stays.ancestors)
    _, after = opened(dict(naive.vocabulary.content), tmp_path, "naive.json")
    cut = [is_same(old, new, naive) for old, new in zip(before.encode_batch(counted), after.encode_batch(counted), strict=True)]
    assert not all(cut)


def test_an_entry_keeps_its_own_way_and_no_other(tmp_path: Path) -> None:
    merges = ["t h", "th e", "e r", "h e", "w h"]  # as files of former years write them
    vocabulary, tokenizer = opened(content_of(bpe([*"ehrtw", "th", "the", "er", "he", "wh"], merges)), tmp_path)
    the, r = tokenizer.encode("ther")
    stays = kept(vocabulary, [the, r])
    assert (stays.used, stays.ancestors, stays.spelling) == ({"the", "r"}, {"th"}, set("ehtw"))
    pruned = without_the_rest(vocabulary, stays.entries)
    assert pruned.vocabulary.model["merges"] == ["t h", "th e"]
    assert list(pruned.vocabulary.model["vocab"]) == [*"ehrtw", "th", "the"], "in the old order"
    assert pruned.remapped([the, r]) == [6, 2]
    with pytest.raises(KeyError):
        pruned.remapped([vocabulary.ids["wh"]])


def test_whole_words_that_joins_do_not_lead_to_need_no_parts(tmp_path: Path) -> None:
    """With ignore_merges a word that is an entry is found at once: here "he" is joined first, so "the" is never joined."""
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    model = bpe([*"ehrt", "he", "th", "the", "her"], [["h", "e"], ["t", "h"], ["th", "e"], ["he", "r"]], ignore_merges=True)
    vocabulary, tokenizer = opened(content_of(model, pre_tokenizer=split), tmp_path)
    ids = tokenizer.encode("the")
    assert ids == [vocabulary.ids["the"]]
    assert kept(vocabulary, ids).ancestors == set()
    assert kept(vocabulary, tokenizer.encode("her")).ancestors == {"he"}, "a longer word may be joined of it"
    both = without_the_rest(vocabulary, kept(vocabulary, tokenizer.encode("the her")).entries)
    _, after = opened(dict(both.vocabulary.content), tmp_path, "pruned.json")
    assert is_same(tokenizer.encode("the her"), after.encode("the her"), both)


def test_rare_letters_go_where_bytes_spell_them_and_stay_elsewhere(tmp_path: Path) -> None:
    with_bytes, tokenizer = opened(phi3_like(), tmp_path)
    pruned = pruned_by(with_bytes, tokenizer, ["on the"])
    assert "é" not in pruned.vocabulary.ids
    assert set(BYTES) <= pruned.vocabulary.ids.keys()
    _, after = opened(dict(pruned.vocabulary.content), tmp_path, "pruned.json")
    assert after.decode(after.encode("é 日本")) == "é 日本"
    without_bytes, tokenizer = opened(content_of(bpe([*"aé", "aé"], [["a", "é"]])), tmp_path)
    assert pruned_by(without_bytes, tokenizer, ["a"]).vocabulary.ids.keys() == {"a", "é"}


def test_letters_that_steps_name_stay_beside_bytes(tmp_path: Path) -> None:
    """U+2581 in bytes is no space for the decoder, and ~ stands for - here: neither is used alone."""
    model = bpe(["<unk>", *BYTES, SPACE, "~", "a", "b", SPACE + "a"], [[SPACE, "a"]], unk_token="<unk>", byte_fallback=True)
    content = sentencepiece(model)
    content["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": "-"}, "content": "~"})
    content["decoder"]["decoders"].insert(0, {"type": "Replace", "pattern": {"String": "~"}, "content": "-"})
    vocabulary, before = opened(content, tmp_path)
    pieces = json.loads(json.dumps([[entry, -float(len(entry))] for entry in model["vocab"]]))
    unigram_ = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": pieces}
    for number, (held, tokenizer) in enumerate(((vocabulary, before), opened(content | {"model": unigram_}, tmp_path, "u.json"))):
        pruned = without_the_rest(held, kept(held, [held.ids[SPACE + "a"]]).entries)
        assert "b" not in pruned.vocabulary.ids, number
        _, after = opened(dict(pruned.vocabulary.content), tmp_path, "pruned.json")
        for text in ("a b", "-", "b - b"):
            assert after.decode(after.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_of_letters_that_are_no_entries_stay(tmp_path: Path) -> None:
    """日 and 本 are in no other piece, and without bytes nothing else spells them."""
    pieces = [["<unk>", 0.0], *([letter, -5.0] for letter in "abht"), ["日本", -6.0], ["ab", -4.0]]
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": pieces}
    vocabulary, before = opened(content_of(model, added_tokens=[special("<unk>", 0)], decoder={"type": "Fuse"}), tmp_path)
    pruned = pruned_by(vocabulary, before, ["hat"])
    assert {"日本", "ab"} - pruned.vocabulary.ids.keys() == {"ab"}
    _, after = opened(dict(pruned.vocabulary.content), tmp_path, "pruned.json")
    assert after.decode(after.encode("a日本b")) == "a日本b"
    blind = without_the_rest(vocabulary, pruned.vocabulary.ids.keys() - {"日本"})
    _, after = opened(dict(blind.vocabulary.content), tmp_path, "blind.json")
    went = sorted(set(vocabulary.ids.values()) - blind.new_id.keys())
    assert round_trips(before, after, list(random_texts(500, 1))).different == (), "at random nobody writes it"
    assert "日本" in round_trips(before, after, spellings(before, went, 1)).different


def test_of_a_merge_that_is_listed_twice_the_last_one_counts(tmp_path: Path) -> None:
    """As the library has it: bc is joined before ab. And no rank is taken for none, however many are listed twice."""
    vocabulary, tokenizer = opened(content_of(bpe([*"abc", "ab", "bc", "abc"], ["a b", "b c", "a bc", "a b"])), tmp_path)
    assert [vocabulary.entries[id_] for id_ in tokenizer.encode("abc")] == ["abc"]
    assert kept(vocabulary, tokenizer.encode("abc")).ancestors == {"bc"}
    content = byte_level(False)
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merges[0]] * 60 + merges
    vocabulary, before = opened(content, tmp_path)
    last = ["".join(merge).replace("Ġ", " ") for merge in merges[-40:]]
    pruned = pruned_by(vocabulary, before, last)
    _, after = opened(dict(pruned.vocabulary.content), tmp_path, "pruned.json")
    assert all(is_same(before.encode(text), after.encode(text), pruned) for text in last)


def test_the_lowest_score_of_a_unigram_vocabulary_stays(tmp_path: Path) -> None:
    """What is no entry costs 10 more than the lowest score. Without q (-50) that is -40 and not -60, and x y z another text."""
    pieces = [["<unk>", 0.0], ["xy", -12.0], ["yz", -1.0], ["z", -30.0], ["q", -50.0], ["y", -45.0], ["o", -5.0], ["oo", -9.0]]
    content = content_of(
        {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": pieces}, added_tokens=[special("<unk>", 0)]
    )
    vocabulary, tokenizer = opened(content, tmp_path)
    assert [pieces[id_][0] for id_ in tokenizer.encode("xyz")] == ["xy", "z"]
    stays = kept(vocabulary, tokenizer.encode("xyz"))
    assert stays.entries == {"xy", "z", "<unk>", "q", "y", "o"}, "letters too, since no bytes spell them"
    for entries, is_as_before in ((stays.entries | {"yz"}, True), ({"<unk>", "xy", "z", "yz"}, False)):
        pruned = without_the_rest(vocabulary, entries)
        _, after = opened(dict(pruned.vocabulary.content), tmp_path, "pruned.json")
        assert is_same(tokenizer.encode("xyz"), after.encode("xyz"), pruned) == is_as_before


def test_everything_that_names_an_id_names_the_new_one(tmp_path: Path) -> None:
    """Added tokens inside and behind the model's entries, holes between ids, a post-processor, padding, an id of a config."""
    model = bpe(["a", "b", "c", "ab", "bc"], [["a", "b"], ["b", "c"]]) | {
        "vocab": {"a": 0, "b": 1, "c": 2, "ab": 4, "bc": 5, "<s>": 9}
    }
    processor = {
        "type": "Sequence", "processors": [
            {"type": "ByteLevel", "trim_offsets": True},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [9], "tokens": ["<s>"]}}},
            {"type": "RobertaProcessing", "sep": ["<s>", 9], "cls": ["<s>", 9], "trim_offsets": True, "add_prefix_space": False},
        ],
    }  # fmt: skip
    padding = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 9,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    normalizer = {"type": "NFC"}
    content = content_of(
        model, added_tokens=[special("<s>", 9), special("<x>", 10, is_special=False)], post_processor=processor, padding=padding,
        normalizer=normalizer,
    )  # fmt: skip
    vocabulary, tokenizer = opened(content, tmp_path)
    pruned = without_the_rest(vocabulary, kept(vocabulary, tokenizer.encode("abc"), named=[5, 77]).entries)
    assert pruned.vocabulary.ids == {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "<s>": 5, "<x>": 6}, (
        "5 is bc, which a config names"
    )
    again = json.loads(pruned.as_json())
    (_, template, roberta) = again["post_processor"]["processors"]
    assert (template["special_tokens"]["<s>"]["ids"], roberta["sep"], roberta["cls"]) == ([5], ["<s>", 5], ["<s>", 5])
    assert [(token["content"], token["id"]) for token in again["added_tokens"]] == [("<s>", 5), ("<x>", 6)]
    assert (again["padding"]["pad_id"], again["normalizer"]) == (5, normalizer)
    new, _ = opened(again, tmp_path, "pruned.json")
    assert new.ids == pruned.vocabulary.ids
    without_bc = without_the_rest(vocabulary, kept(vocabulary, tokenizer.encode("abc")).entries)
    assert "bc" not in without_bc.vocabulary.ids


def test_an_id_of_the_post_processor_that_nobody_has_is_named(tmp_path: Path) -> None:
    processor = {"type": "BertProcessing", "sep": ["a", 41], "cls": ["a", 0]}
    vocabulary, _ = opened(content_of(bpe([*"ab"], []), post_processor=processor), tmp_path)
    with pytest.raises(Rejected, match=r"id 41 in post_processor"):
        kept(vocabulary, [0])


def test_usage_of_a_text_by_hand(tmp_path: Path) -> None:
    """a 6 times, b 3, c once; d, ab and <s> never. Of the second half's five tokens one is of a type that was new."""
    model = bpe([*"abcd", "ab", "<s>"], [["a", "b"]])
    vocabulary, _ = opened(content_of(model, added_tokens=[special("<s>", 5)]), tmp_path)
    usage = Usage(vocabulary, first_bytes=100)
    usage.add([[0, 0, 0], [1, 1]], 100)
    usage.add([[0, 0, 0, 1, 2]], 100)
    found = used(vocabulary, usage)
    assert (found.types, found.added, found.tokens, found.seen, found.never) == (5, 1, 10, 3, 2)
    assert (found.needed, found.prunable) == (1, 1), "d is a letter that nothing else spells"
    assert found.curve == (Point(100, 2, 5, 2, 1e6), Point(200, 3, 10, 3, 2e5))
    assert [(rare.at_most, rare.types, rare.per_million) for rare in found.rare[:4]] == [
        (0, 2, 0),
        (1, 3, 1e5),
        (2, 3, 1e5),
        (5, 4, 4e5),
    ]
    assert found.coverage[0] == (0.976, 3)
    assert [covering(np.array([6, 3, 1]), share) for share in (0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 2, 2, 3, 3]
    assert {kind.kind: (kind.types, kind.never) for kind in found.kinds if kind.types} == {
        "single bytes": (4, 1),
        "ASCII letters": (1, 1),
    }
    assert found.per_doubling == pytest.approx(1 / 5), "one type more in twice the text"
    assert found.bytes_until(0.2) == pytest.approx(400)
    assert found.bytes_until(0.5) is None, "it is below that already"


def test_added_tokens_that_text_is_made_of_are_counted(tmp_path: Path) -> None:
    """Runs of spaces, as NeoX's and Phi-2's tokenizers have them: no special tokens, and never to be left out."""
    content = content_of(
        bpe([*"ab "], []), added_tokens=[special("<s>", 3), *(special(" " * n, n + 2, is_special=False) for n in (2, 4))]
    )
    content["added_tokens"][2]["id"] = 5
    vocabulary, tokenizer = opened(content, tmp_path)
    usage = Usage(vocabulary)
    usage.add(tokenizer.encode_batch(["a    b", "<s>b"]), 10)
    found = used(vocabulary, usage)
    assert (found.types, found.added) == (5, 1)
    assert found.seen == 3, "a, b and four spaces"
    assert {kind.kind: (kind.types, kind.never) for kind in found.kinds if kind.types}["white space"] == (2, 1)
    assert found.prunable == 0


def test_the_curve_has_its_points_at_doublings_and_at_the_end(tmp_path: Path) -> None:
    vocabulary, _ = opened(content_of(bpe([*"ab"], [])), tmp_path)
    usage = Usage(vocabulary, first_bytes=10)
    for _ in range(9):
        usage.add([[0]], 7)
    usage.finish()
    assert [point.num_bytes for point in usage.points] == [14, 21, 42, 63]
    usage.finish()
    assert len(usage.points) == 4
    with pytest.raises(Rejected, match="no token"):
        Usage(vocabulary).finish()


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        (b"a", "single bytes"), (b"\xe6\x97", "parts of a character"), (b" \n", "white space"), (b" the", "ASCII letters"),
        (b"x1", "other ASCII"), (b"  the", "other ASCII"), (" é".encode(), "beyond ASCII"),
    ],
)  # fmt: skip
def test_kinds(spelling: bytes, kind: str) -> None:
    assert kind_of(spelling) == kind


def test_entries_of_byte_level_vocabularies_are_bytes(tmp_path: Path) -> None:
    vocabulary, tokenizer = opened(byte_level(False), tmp_path)
    usage = Usage(vocabulary)
    usage.add(tokenizer.encode_batch(words(1, 300)), 1)
    found = {kind.kind: kind for kind in used(vocabulary, usage).kinds}
    assert found["single bytes"].types == 256
    assert found["parts of a character"].types + found["beyond ASCII"].types >= 2, "日 and 本 are three bytes each"
    assert found["ASCII letters"].types > 100


def test_the_parameters_of_a_row() -> None:
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    for family, model_type, tied, each in (
        ("LlamaForCausalLM", "llama", True, 8), ("LlamaForCausalLM", "llama", False, 16), ("PhiForCausalLM", "phi", False, 17),
    ):  # fmt: skip
        raw = {**config, "architectures": [family], "model_type": model_type, "tie_word_embeddings": tied}
        assert parameters_of_rows(parse_config(json.dumps(raw).encode()), 3) == 3 * each


def test_two_entries_with_one_id_are_refused(tmp_path: Path) -> None:
    """The library gives an added token the number of entries, which a hole below leaves to another one."""
    model = bpe([], []) | {"vocab": {"a": 0, "b": 2}}
    with pytest.raises(Rejected, match="two entries with one id"):
        opened(content_of(model, added_tokens=[special("<s>", 2)]), tmp_path)


def test_a_share_that_does_not_fall_is_not_foretold() -> None:
    flat = Used(10, 0, 4, 2, 0, (Point(100, 1, 2, 2, 0.0), Point(200, 2, 4, 2, 0.0)), (), (), ())
    alone = Used(10, 0, 4, 2, 0, (Point(100, 1, 2, 2, 0.0),), (), (), ())
    assert (flat.per_doubling, flat.bytes_until(0.2)) == (0.0, None)
    assert (alone.per_doubling, alone.bytes_until(0.2)) == (0.0, None)
