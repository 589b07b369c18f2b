"""Lengths of documents: against closed forms, against worked examples, and against plain loops."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn29.errors import Reason, Rejected
from sn29.lab.lengths import (
    LIMITS,
    Bucket,
    Context,
    Duplicates,
    Longer,
    PackingLoss,
    Quantile,
    Repetition,
    best_fit_crop,
    best_fit_split,
    buckets,
    contexts,
    drawn_evenly,
    duplicates,
    greedy_crop,
    joined_and_cut,
    joined_below,
    longer_than,
    longest_enough,
    measure,
    quantiles,
)

MEAN, DEVIATION = 6.6, 1.1
"""Of the logarithm: about FineWeb-Edu's, in GPT-4 tokens."""


@pytest.fixture(scope="module")
def log_normal() -> np.ndarray:
    """200,000 lengths, at evenly spread quantiles, so that nothing is left to chance; in mixed order."""
    normal = NormalDist(MEAN, DEVIATION)
    exact = [math.exp(normal.inv_cdf((n + 0.5) / 200_000)) for n in range(200_000)]
    return np.random.default_rng(0).permutation(np.maximum(1, np.rint(exact).astype(np.int64)))


@pytest.mark.parametrize("limit", LIMITS)
def test_shares_of_a_log_normal_corpus_are_those_of_the_closed_form(log_normal: np.ndarray, limit: int) -> None:
    found, ln = longer_than(log_normal, limit), math.log(limit)
    assert found.tokens == pytest.approx(NormalDist().cdf((MEAN + DEVIATION**2 - ln) / DEVIATION), rel=0.01, abs=1e-4)
    assert found.documents == pytest.approx(NormalDist().cdf((MEAN - ln) / DEVIATION), rel=0.01, abs=1e-4)


def test_quantiles_and_buckets_of_a_log_normal_corpus_are_those_of_the_closed_form(log_normal: np.ndarray) -> None:
    normal = NormalDist(MEAN, DEVIATION)
    for found in quantiles(log_normal):
        assert found.by_documents == pytest.approx(math.exp(normal.inv_cdf(found.share)), rel=0.01)
        expected = math.exp(normal.inv_cdf(found.share) + DEVIATION**2)
        assert found.by_tokens == pytest.approx(expected, rel=0.01)
    by_tokens = NormalDist(MEAN + DEVIATION**2, DEVIATION)
    for bucket in buckets(log_normal):
        expected = by_tokens.cdf(math.log(bucket.high)) - by_tokens.cdf(math.log(bucket.low))
        assert bucket.tokens / log_normal.sum() == pytest.approx(expected, abs=0.001)


def test_buckets() -> None:
    assert buckets([1, 2, 3, 9]) == (Bucket(1, 2, 1, 1), Bucket(2, 4, 2, 5), Bucket(4, 8, 0, 0), Bucket(8, 16, 1, 9))
    assert [b.low for b in buckets([2**20, 2**20 - 1])] == [2**19, 2**20]


def test_short_buckets_are_joined() -> None:
    three = (Bucket(1, 2, 1, 1), Bucket(2, 4, 2, 5), Bucket(4, 8, 1, 6))
    assert joined_below(three, 4) == (Bucket(1, 4, 3, 6), Bucket(4, 8, 1, 6))
    assert joined_below(three, 1) == three
    assert joined_below(three[2:], 8) == three[2:]


def test_quantiles() -> None:
    assert quantiles([6, 1, 2, 1], [0.25, 0.5, 0.75, 1.0]) == (
        Quantile(0.25, 1, 2),
        Quantile(0.5, 1, 6),
        Quantile(0.75, 2, 6),
        Quantile(1.0, 6, 6),
    )


def test_longer_than() -> None:
    assert longer_than([1, 3, 6], 3) == Longer(3, 1 / 3, 0.6)
    assert longer_than([1, 3, 6], 6) == Longer(6, 0, 0)


def test_duplicates() -> None:
    assert duplicates([5, 2, 5, 8], [7, 3, 7, 9]) == Duplicates(1, 0.25, 0.25)
    assert duplicates([5, 5, 5], [1, 1, 1]) == Duplicates(2, 1 - 1 / 3, 10 / 15)
    assert duplicates([5, 5], [2**63, 2**63 + 1]).count == 0


def test_duplicates_of_large_hashes() -> None:
    """As signed integers the largest have no room; as floats, 2^63 + 1 and 2^63 + 2 would be one."""
    assert duplicates([1, 1, 1], [2**63 + 1, 5, 2**63 + 2]).count == 0
    assert duplicates([1, 1, 1], [2**64 - 1, 5, 2**64 - 1]).count == 1


def test_even_draws_of_three_buckets() -> None:
    """12,000 tokens, 4,000 from each bucket."""
    three = (Bucket(512, 1024, 11, 8000), Bucket(1024, 2048, 2, 3000), Bucket(2048, 4096, 0, 0), Bucket(4096, 8192, 1, 1000))
    found = drawn_evenly(three, 12_000)
    assert found == (Repetition(512, 1024, 0.5), Repetition(1024, 2048, 4000 / 3000), Repetition(4096, 8192, 4.0))
    assert [r.is_worn for r in found] == [False, False, False], "4 epochs are as good as new text"
    assert [r.is_worn for r in drawn_evenly(three, 12_001)] == [False, False, True]


def test_rows_of_one_document() -> None:
    """Documents of 5, 9 and 20 tokens, 64 tokens of training."""
    found = contexts([5, 9, 20], 64, [4, 8, 16, 32])
    assert found == (
        Context(4, 32, 32 / 34, 2.0, 128.0),
        Context(8, 24, 24 / 34, 64 / 24, 96.0),
        Context(16, 16, 16 / 34, 4.0, 64.0),
        Context(32, 0, 0.0, math.inf, 0.0),
    )
    assert [each.is_enough for each in found] == [True, True, True, False], "4 epochs are as good as new text"
    assert longest_enough(found) == found[2]
    assert longest_enough(contexts([5, 9, 20], 65, [4, 8, 16])) == contexts([5, 9, 20], 65, [8])[0]
    assert longest_enough(contexts([5, 9, 20], 1000, [4, 8, 16])) is None
    assert contexts([5, 9, 20], 640, [4], scale=10) == (Context(4, 320, 320 / 340, 2.0, 1280.0),), "a tenth of the documents"


def test_documents_that_stand_for_different_numbers() -> None:
    """Of one source a tenth was read, of the other all: 50 documents of 5 tokens and one of 20."""
    scale = np.array([10.0] * 5 + [1.0])
    lengths = [5] * 5 + [20]
    assert contexts(lengths, 2200, [4], scale=scale) == contexts([5] * 50 + [20], 2200, [4])
    assert contexts(lengths, 2200, [4]) != contexts(lengths, 2200, [4], scale=scale)
    assert buckets(lengths, scale) == buckets([5] * 50 + [20])


@pytest.mark.parametrize("row", [512, 2048, 8192])
def test_rows_of_one_document_of_a_log_normal_corpus_are_those_of_the_closed_form(log_normal: np.ndarray, row: int) -> None:
    """A document has a k-th row where it is at least k rows long: the sum of those probabilities."""
    normal = NormalDist(MEAN, DEVIATION)
    expected = row * sum(1 - normal.cdf(math.log(k * row - 0.5)) for k in range(1, 400)) * len(log_normal)
    (found,) = contexts(log_normal, 1e9, [row])
    assert found.tokens == pytest.approx(expected, rel=0.01)
    assert found.epochs == pytest.approx(1e9 / expected, rel=0.01)
    assert found.most == pytest.approx(4 * expected, rel=0.01)


def test_packing_losses() -> None:
    assert joined_and_cut([3, 5], 4) == PackingLoss("joined with end tokens, cut", 0, 0, 1 / 8)
    assert greedy_crop([6, 4, 3, 9, 5], 10) == PackingLoss("greedy, cropped", 2 / 27, 0, 0)
    crop, split = best_fit_crop([6, 4, 3, 12], 10), best_fit_split([6, 4, 3, 12], 10)
    assert (crop.left_out, crop.padded, crop.severed) == (pytest.approx(2 / 25), pytest.approx(7 / 30), 0)
    assert (split.left_out, split.padded, split.severed) == (0, pytest.approx(5 / 30), pytest.approx(2 / 25))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), row=st.integers(1, 40))
def test_packing_losses_are_those_of_laying_out_every_token(lengths: list[int], row: int) -> None:
    stream = [(document, place) for document, length in enumerate(lengths) for place in range(length + 1)]
    rows = [stream[at : at + row] for at in range(0, len(stream), row)]
    begun = [{document for document, place in r if place == 0} for r in rows]
    severed = sum(
        document not in begun[n] for n, r in enumerate(rows) for document, place in r if place < lengths[document]
    )  # fmt: skip
    assert joined_and_cut(lengths, row).severed == pytest.approx(severed / sum(lengths))
    kept, at = 0, 0
    while at < len(lengths):
        laid = []
        while at < len(lengths) and len(laid) < row:
            laid += [at] * lengths[at]
            at += 1
        kept += len(laid[:row])
    assert greedy_crop(lengths, row).left_out == pytest.approx(1 - kept / sum(lengths))
    assert best_fit_crop(lengths, row).left_out == pytest.approx(longer_than_by(lengths, row))
    assert best_fit_split(lengths, row).severed == pytest.approx(longer_than_by(lengths, row))


def longer_than_by(lengths: list[int], row: int) -> float:
    return sum(max(0, length - row) for length in lengths) / sum(lengths)


def test_all_together(log_normal: np.ndarray) -> None:
    some = log_normal[:20_000]
    found = measure(some, np.arange(len(some)), row_tokens=2048, evenly_tokens=10**9)
    assert (found.documents, found.tokens, found.longest) == (20_000, some.sum(), some.max())
    assert sum(bucket.tokens for bucket in found.buckets) == found.tokens
    short = sum(bucket.tokens for bucket in found.buckets if bucket.low < 512)
    assert found.evenly[0].epochs == pytest.approx(10**9 / len(found.evenly) / short)
    assert [(r.low, r.high) for r in found.evenly[1:]] == [(b.low, b.high) for b in found.buckets if b.low >= 512 and b.tokens]
    joined, greedy, crop, split = found.packing
    assert split.padded < 0.01, "rows of 2,048 from pools of 1,000 documents"
    assert 0.2 < crop.left_out < greedy.left_out < 0.6
    assert 0.2 < joined.severed < 0.6
    assert measure(some, np.arange(len(some)), row_tokens=2048).evenly_tokens == found.tokens


@pytest.mark.parametrize(("lengths", "got"), [([], "no document"), ([3, 0], "a document of 0 tokens")])
def test_nothing_to_measure_is_refused(lengths: list[int], got: str) -> None:
    with pytest.raises(Rejected) as caught:
        measure(lengths, lengths, row_tokens=10)
    assert (caught.value.reason, caught.value.got) == (Reason.DATASET, got)


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(Rejected, match="rows of 0 tokens"):
        measure([1], [1], row_tokens=0)
