"""Fairness between tokenizers, shown on models whose true losses are known in closed form; and what the intervals find.

A model of independent bytes gives a text the same nats however it is cut. As a model of tokens it is a table of what follows
what: where the pair t h is always merged, a lone t is never followed by h. `unigram_llama` builds that table as a real
LlamaForCausalLM, so that the whole way from the folder to the comparison is held against the closed form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sn29.errors import Reason, Rejected
from sn29.lab.compare import (
    FEW,
    LOST,
    NOT_FINITE,
    TOO_LONG,
    Comparison,
    Document,
    Measured,
    Reading,
    compare,
    excerpts,
    measured,
    ratio_interval,
    read,
)
from sn29.lab.losses import document_nats
from sn29.models.tokenizer import Tokenizer, train_bpe

TEXTS = [
    f"The {a} and the {b} went {c} the {d}, then home again."
    for a in ("cat", "hare", "old man")
    for b in ("dog", "tortoise")
    for c in ("to", "over", "past")
    for d in ("hill", "river", "market")
]
DOCUMENTS = [Document(text, "fables" if number % 3 else "tales") for number, text in enumerate(TEXTS)]
START = 287
"""Id of the start token in the models below, and their last one."""


def byte_probabilities(smoothing: float) -> dict[int, float]:
    """Of each byte: as often as in TEXTS, and a share of all alike."""
    counts = Counter("".join(TEXTS).encode())
    return {b: (1 - smoothing) * counts[b] / counts.total() + smoothing / 256 for b in range(256)}


def oracle_nats(text: str, p: Mapping[int, float]) -> float:
    return -math.fsum(math.log(p[b]) for b in text.encode())


def write_tokenizer(path: Path, pairs: Sequence[str], normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Bytes are ids 0 to 255; the pairs, none of which can overlap another, follow."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    spelled = {chr(b): b for b in range(33, 127)}
    rest = sorted(set(letters) - spelled.keys())
    vocabulary = spelled | dict(zip(rest, sorted(set(range(256)) - set(range(33, 127))), strict=True))
    vocabulary |= {pair: 256 + number for number, pair in enumerate(pairs)}
    inner = Library(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.save(str(path))
    return Tokenizer.load(path)


def bytes_of_ids(tokenizer: Tokenizer) -> list[int]:
    """Id below 256 -> its byte; ASCII alone, which is all that TEXTS have."""
    return [tokenizer.decode([n]).encode()[0] if len(tokenizer.decode([n]).encode()) == 1 else 255 for n in range(256)]


def unigram_llama(folder: Path, pairs: Sequence[str], p: Mapping[int, float]) -> Path:
    """A checkpoint with its tokenizer whose loss of a text is `oracle_nats`; texts must not end with a pair's first letter.

    One-hot embeddings, a layer that adds nothing, and an output layer that reads log p(next | last) off the last token.
    """
    size = START + 1
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, rms_norm_eps=1e-6,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=START, eos_token_id=START, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    folder.mkdir()
    at = bytes_of_ids(write_tokenizer(folder / "tokenizer.json", pairs))
    seconds = {ord(a): sum(p[ord(y)] for x, y in pairs if x == a) for a, _ in pairs}  # p of being merged, of each first letter
    fresh = [p[at[n]] * (1 - seconds.get(at[n], 0.0)) for n in range(256)]
    fresh += [p[ord(a)] * p[ord(b)] for a, b in pairs]
    table = torch.full((size, size), 1e-30, dtype=torch.float64)  # [last, next]
    table[:, : len(fresh)] = torch.tensor(fresh, dtype=torch.float64)
    for last in range(256):
        if at[last] in seconds:
            for a, b in pairs:
                if ord(a) == at[last]:
                    table[last, at.index(ord(b))] = 1e-30
            table[last, : len(fresh)] /= 1 - seconds[at[last]]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(table.log().T * math.sqrt(1 / size + 1e-6))  # what the last norm multiplies by, undone
    model.save_pretrained(folder)
    return folder


def of_folder(folder: Path, documents: Sequence[Document] = DOCUMENTS) -> Measured:
    reading = read(Tokenizer.load(folder / "tokenizer.json"), documents, 256)
    return measured(folder.name, reading, document_nats(folder, [reading.ids[n] for n in reading.scored]))


PAIRS = {"bytes": [], "long first token": ["Th"], "many pairs": ["Th", "th", "an", "ou"]}


# --- (a), (b): the same likelihood of the bytes is the same loss, however the text is cut ---------------------------------


def test_one_byte_model_in_three_tokenizers_has_one_loss(tmp_path: Path) -> None:
    p = byte_probabilities(0.01)
    found = [of_folder(unigram_llama(tmp_path / name, pairs, p)) for name, pairs in PAIRS.items()]
    for each in found:
        assert each.nats == pytest.approx([oracle_nats(text, p) for text in TEXTS], rel=1e-5)
    told = compare(DOCUMENTS, found)
    assert [pair.total.percent for pair in told.pairs] == pytest.approx([0.0, 0.0], abs=1e-3)
    assert len({model.tokens for model in told.models}) == 3, "they are cut differently"


def test_a_free_first_token_would_have_told_them_apart() -> None:
    p = byte_probabilities(0.01)
    ours = sum(oracle_nats(text, p) for text in TEXTS)
    first_free = [sum(oracle_nats(text[len(cut) :], p) for text in TEXTS) for cut in ("T", "Th")]
    assert 1 - first_free[1] / first_free[0] > 0.01, "1 % for nothing, where 0.4 % wins a crown"
    assert first_free[0] < ours


@pytest.mark.parametrize(("entries", "part"), [(257, 0), (300, 1), (420, 2)])
def test_trained_tokenizers_cost_an_oracle_of_bytes_the_same(tmp_path: Path, entries: int, part: int) -> None:
    p, path = byte_probabilities(0.1), tmp_path / "tokenizer.json"
    path.write_text(train_bpe(TEXTS[part::3], entries))
    tokenizer = Tokenizer.load(path)
    reading = read(tokenizer, DOCUMENTS, 10_000)
    nats = [math.fsum(oracle_nats(tokenizer.decode([token]), p) for token in ids) for ids in reading.ids]
    bare = measured("bytes", _reading([len(text.encode()) for text in TEXTS]), [oracle_nats(text, p) for text in TEXTS])
    told = compare(DOCUMENTS, [bare, measured("bpe", reading, nats)])
    assert told.pairs[0].total.percent == pytest.approx(0.0, abs=1e-9)
    assert told.models[0].bits_per_byte == pytest.approx(told.models[1].bits_per_byte, rel=1e-12)


# --- (c): per token the order can be the other way round -------------------------------------------------------------------


def test_nats_per_token_can_say_the_opposite(tmp_path: Path) -> None:
    worse = of_folder(unigram_llama(tmp_path / "worse", [], byte_probabilities(0.05)))
    better = of_folder(unigram_llama(tmp_path / "better", PAIRS["many pairs"], byte_probabilities(0.01)))
    told = compare(DOCUMENTS, [worse, better])
    assert told.pairs[0].total.percent < 0
    assert told.models[1].bits_per_byte < told.models[0].bits_per_byte
    assert told.models[1].nats_per_token > told.models[0].nats_per_token
    assert told.warning.endswith("by them worse would be the best model here, by the nats of the same text it is better")
    assert not told.as_many_tokens


def test_nats_per_token_may_be_compared_where_the_tokens_are_the_same() -> None:
    told = of_numbers([10.0, 20.0], [11.0, 22.0])
    assert (told.as_many_tokens, told.warning) == (True, "")


# --- what intervals find ---------------------------------------------------------------------------------------------------


def _reading(lengths: Sequence[int]) -> Reading:
    return Reading(tuple((0,) * n for n in lengths), ("",) * len(lengths))


def of_numbers(*models: Sequence[float], sizes: Sequence[int] = ()) -> Comparison:
    """Losses of documents of so many bytes, a token each byte; +inf: too long."""
    sizes = sizes or [40] * len(models[0])
    documents = [Document("x" * size, "one") for size in sizes]
    found = []
    for number, nats in enumerate(models):
        problems = tuple("" if math.isfinite(value) else TOO_LONG for value in nats)
        reading = Reading(_reading(sizes).ids, problems)
        found.append(measured("ABC"[number], reading, [value for value in nats if math.isfinite(value)]))
    return compare(documents, found)


def drawn(documents: int, percent: float, seed: int) -> Comparison:
    """Documents of 100 bytes to 20 kB; the second model is better by so many percent, give or take 2 % a document."""
    numbers = np.random.default_rng(seed)
    sizes = np.exp(numbers.normal(7.0, 0.8, documents)).clip(100, 20_000).astype(int)
    first = sizes * numbers.normal(0.65, 0.08, documents)
    second = first * (1 - percent / 100) * (1 + 0.02 * numbers.standard_normal(documents))
    return of_numbers(first.tolist(), second.tolist(), sizes=sizes.tolist())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_difference_of_a_fifth_of_a_percent_is_found_in_1500_documents(seed: int) -> None:
    (pair,) = drawn(1500, 0.2, seed).pairs
    assert pair.alike_interval is not None
    assert pair.alike_interval.high < 0
    assert pair.alike == pytest.approx(-0.2, abs=0.15), "3 standard errors of 0.05"
    assert pair.alike_interval.high - pair.alike_interval.low == pytest.approx(2 * 1.96 * 2 / math.sqrt(1500), rel=0.06)


@pytest.mark.parametrize(("documents", "spread"), [(10, 0.8), (10, 1.2), (20, 0.8), (50, 0.8), (200, 0.8)])
def test_where_there_is_no_difference_one_interval_in_twenty_finds_one(documents: int, spread: float) -> None:
    """A percentile bootstrap finds one in 9 to 16 of 100 at 10 documents."""
    numbers = np.random.default_rng(29)
    wrong = 0
    for _ in range(1000):
        first = np.exp(numbers.normal(7.0, spread, documents)) * numbers.normal(0.65, 0.08, documents)
        second = first * (1 + 0.02 * numbers.standard_normal(documents))
        found = ratio_interval(first.tolist(), second.tolist())
        wrong += found is not None and not found.low <= 0 <= found.high
    assert 25 <= wrong <= 74, "50 are expected of 1,000, with a standard error of 7"


def test_the_interval_of_a_ratio() -> None:
    """Documents of 1 nat that differ by 0.1 up and down: each of ten moves the ratio by 0.1 / 9; t of 9 degrees is 2.262157."""
    found = ratio_interval([1.0] * 10, [1.1, 0.9] * 5)
    half = 100 * 2.262157 * math.sqrt(0.9 * 10 * (0.1 / 9) ** 2)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(-half, rel=1e-5), pytest.approx(half, rel=1e-5))
    assert ratio_interval([1.0] * 9, [1.1] * 9) is None
    long = ratio_interval([1.0] * 10 + [200.0], [1.1, 0.9] * 5 + [220.0])
    assert long is not None
    assert long.high - long.low > 100, "one long document decides: of an effective 1.1 documents nothing is known"


def test_the_worked_example() -> None:
    told = of_numbers([10.0, 20.0, 30.0], [9.0, 21.0, 27.0], sizes=[10, 20, 30])
    (pair,) = told.pairs
    assert pair.total.percent == pytest.approx(-5)
    assert pair.alike == pytest.approx(100 * (0.9 * 1.05 * 0.9) ** (1 / 3) - 100)
    assert (pair.mean, pair.won) == (-1.0, pytest.approx(2 / 3))
    assert [round(model.bits_per_byte, 3) for model in told.models] == [1.443, 1.371]
    assert pair.total.interval is None, f"fewer than {FEW}"
    assert [(group.name, group.documents) for group in pair.by_length] == [("8 to 15 bytes", 1), ("16 to 31 bytes", 2)]
    assert pair.mean_interval is not None
    half = 4.302653 * 2.0 / math.sqrt(3)  # differences -1, 1, -3; t of 2 degrees
    assert (pair.mean_interval.low, pair.mean_interval.high) == pytest.approx((-1 - half, -1 + half), rel=1e-5)


def test_several_models_are_each_set_against_the_first() -> None:
    told = of_numbers([10.0] * 20, [9.0] * 20, [12.0] * 20)
    assert [(pair.first, pair.second, round(pair.total.percent, 6)) for pair in told.pairs] == [("A", "B", -10), ("A", "C", 20)]
    wilson = told.pairs[0].won_interval
    assert told.pairs[0].won == 1.0
    assert wilson is not None
    assert (round(wilson.low, 3), wilson.high) == (0.839, 1.0)


def test_sources_are_told_of_one_by_one(tmp_path: Path) -> None:
    both = [of_folder(unigram_llama(tmp_path / name, [], byte_probabilities(s))) for name, s in (("a", 0.02), ("b", 0.01))]
    (pair,) = compare(DOCUMENTS, both).pairs
    assert [(group.name, group.documents) for group in pair.by_source] == [("fables", 36), ("tales", 18)]
    together = sum(group.bits_per_byte[1] * group.bytes for group in pair.by_source) / pair.total.bytes
    assert together == pytest.approx(pair.total.bits_per_byte[1])


# --- documents without a loss ------------------------------------------------------------------------------------------------


def test_documents_that_do_not_come_back_are_named_and_lost(tmp_path: Path) -> None:
    lower = write_tokenizer(tmp_path / "lower.json", [], normalizers.Lowercase())
    documents = [Document("all in small letters", "a"), Document("One Capital", "a"), Document("small again", "a")]
    lossy = read(lower, documents, 256)
    assert lossy.problems == ("", LOST, "")
    whole = read(write_tokenizer(tmp_path / "whole.json", []), documents, 256)
    told = compare(documents, [measured("whole", whole, [5.0, 5.0, 5.0]), measured("lossy", lossy, [4.0, 4.0])])
    (pair,) = told.pairs
    assert (told.common, pair.total.documents, told.models[1].problems) == (2, 2, ((1, LOST),))
    assert pair.won == pytest.approx(2 / 3), "the one without a loss is lost, not left out"
    assert list(excerpts(documents, told.models[1])) == ["document 2 (a) has no loss under lossy: round_trip: 'One Capital'"]


def test_documents_of_too_many_tokens_have_no_loss(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", [])
    assert read(tokenizer, [Document("x" * 9, "a"), Document("x" * 8, "a")], 8).problems == (TOO_LONG, "")


def test_nothing_in_common_is_refused_with_the_reasons() -> None:
    for first, second, said in (
        ([math.inf, 3.0], [3.0, math.inf], "A: 1 too_long; B: 1 too_long: "),
        ([3.0, 3.0], [math.inf, math.inf], "B: 2 too_long: "),
    ):
        with pytest.raises(Rejected) as refused:
            of_numbers(first, second)
        assert refused.value.reason is Reason.DATASET
        assert str(refused.value).startswith(said)


def test_a_loss_that_is_no_number_is_a_document_lost() -> None:
    documents = [Document(text, "one") for text in ("a", "bb", "ccc")]
    both = measured("whole", _reading([1, 2, 3]), [1.0, 2.0, 3.0]), measured("wild", _reading([1, 2, 3]), [0.5, math.inf, 2.0])
    told = compare(documents, both)
    assert (told.common, told.models[0].problems, told.models[1].problems) == (2, (), ((1, NOT_FINITE),))
    assert told.pairs[0].won == pytest.approx(2 / 3)
    (line,) = excerpts(documents, told.models[1])
    assert line == "document 2 (one) has no loss under wild: not_finite: 'bb'"


def test_groups_that_a_model_cannot_score_are_named() -> None:
    documents = [Document("x" * 20, "a"), Document("x" * 20, "a"), Document("x" * 40, "b")]
    lossy = Measured("lossy", Reading(_reading([20, 20, 40]).ids, ("", "", LOST)), (9.0, 9.0, math.inf))
    (pair,) = compare(documents, [measured("whole", _reading([20, 20, 40]), [10.0, 10.0, 20.0]), lossy]).pairs
    assert ([group.name for group in pair.by_source], [group.name for group in pair.by_length]) == (["a"], ["16 to 31 bytes"])
    assert pair.unscored == (("32 to 63 bytes", 1), ("b", 1))


def test_an_empty_document_is_refused() -> None:
    with pytest.raises(Rejected, match="document 2 is empty"):
        of_numbers([1.0, 0.0], [1.0, 0.0], sizes=[1, 0])


def test_one_model_is_not_compared() -> None:
    with pytest.raises(Rejected, match="at least two"):
        of_numbers([1.0])
