"""How long documents are, and what that means for training: pure functions on arrays of lengths in tokens.

For lengths whose logarithm is normal with mean m and deviation s the answers are known, and the tests ask for them:

    median by documents         exp(m)
    median by tokens            exp(m + s^2)                   half of all tokens are in documents shorter than this
    share of the tokens in      Phi((m + s^2 - ln N) / s)      Phi: the normal distribution function
      documents longer than N

"Drawn evenly" is how long contexts are usually fed: the same number of tokens from each length bucket. There are few long
documents, so they come again and again. Up to 4 epochs a token is worth about as much as a new one, after 16 next to
nothing (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sn29.errors import Reason, Rejected
from sn29.evaluation.best_fit import best_fit

SHORT = 512
"""Drawn evenly, shorter documents are one bucket: who wants long ones wants a like number of tokens of each length from here
on, and not of each octave of the short ones, of which the first has a handful of words."""
MAX_EPOCHS = 4.0
"""Repetitions of a token that are as good as new ones, about."""
LIMITS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
POOL_DOCUMENTS = 1000
"""Documents that are packed together, as a trainer does that cannot see them all."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents of `low` to `high` - 1 tokens; low is a power of two and high the next."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Quantile:
    """A share of the documents are no longer than `by_documents`; that share of the tokens are in ones up to `by_tokens`."""

    share: float
    by_documents: int
    by_tokens: int


@dataclass(frozen=True, slots=True)
class Longer:
    """Shares of what is in documents of more than `limit` tokens."""

    limit: int
    documents: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Documents that are equal to an earlier one to the letter: how many, and their shares of all."""

    count: int
    documents: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Repetition:
    """How often each token of a bucket is seen when every bucket gives the same number of tokens."""

    low: int
    high: int
    epochs: float

    @property
    def is_worn(self) -> bool:
        """Seen more often than is as good as new text."""
        return self.epochs > MAX_EPOCHS


@dataclass(frozen=True, slots=True)
class Context:
    """What there is for rows of `row_tokens` that hold one document each, and how often a training sees it."""

    row_tokens: int
    tokens: int
    """Of the whole data in such rows: each document's whole rows, its rest left out."""
    share: float
    """Of all tokens."""
    epochs: float
    """Of these tokens in the training; inf where there are none."""
    most: float
    """Tokens of training that they are enough for, at MAX_EPOCHS."""

    @property
    def is_enough(self) -> bool:
        return self.epochs <= MAX_EPOCHS


@dataclass(frozen=True, slots=True)
class PackingLoss:
    """What a way of making rows does to the text. Shares of all tokens; `padded` is of the rows' places."""

    how: str
    left_out: float
    """In no row."""
    padded: float
    """Places that hold no token."""
    severed: float
    """In a row that does not hold the beginning of their document."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """All about the lengths of some documents."""

    documents: int
    tokens: int
    mean: float
    longest: int
    quantiles: tuple[Quantile, ...]
    buckets: tuple[Bucket, ...]
    longer: tuple[Longer, ...]
    duplicates: Duplicates
    evenly_tokens: int
    evenly: tuple[Repetition, ...]
    row_tokens: int
    packing: tuple[PackingLoss, ...]


def measure(
    lengths: Sequence[int] | Counts, contents: Sequence[int] | npt.NDArray[Any], *, row_tokens: int, evenly_tokens: int = 0
) -> Lengths:
    """Everything below, of documents in the order in which they are trained on.

    contents: a number below 2^64 for each document's content, equal for equal ones. evenly_tokens: how many are drawn
    evenly, 0 = as many as there are. Raises Rejected(DATASET) without a document, Rejected(SETTING) for rows without a token.
    """
    all_of_them = _counts(lengths)
    found = buckets(all_of_them)
    drawn = evenly_tokens or int(all_of_them.sum())
    return Lengths(
        documents=len(all_of_them),
        tokens=int(all_of_them.sum()),
        mean=float(all_of_them.mean()),
        longest=int(all_of_them.max()),
        quantiles=quantiles(all_of_them),
        buckets=found,
        longer=tuple(longer_than(all_of_them, limit) for limit in LIMITS),
        duplicates=duplicates(all_of_them, contents),
        evenly_tokens=drawn,
        evenly=drawn_evenly(joined_below(found, SHORT), drawn),
        row_tokens=row_tokens,
        packing=(
            joined_and_cut(all_of_them, row_tokens),
            greedy_crop(all_of_them, row_tokens),
            best_fit_crop(all_of_them, row_tokens),
            best_fit_split(all_of_them, row_tokens),
        ),
    )


Scale = float | npt.NDArray[np.float64]
"""How many documents of the whole data one that was read stands for: of all of them, or of each."""


def buckets(lengths: Sequence[int] | Counts, scale: Scale = 1.0) -> tuple[Bucket, ...]:
    """From the shortest document's power of two to the longest one's, empty ones between them too; of the whole data.

    [1, 2, 3, 9] -> 1 to 1 (1 document, 1 token), 2 to 3 (2, 5), 4 to 7 (0, 0), 8 to 15 (1, 9)
    """
    counts = _counts(lengths)
    powers = np.frexp(counts.astype(np.float64))[1] - 1
    times = np.broadcast_to(scale, counts.shape)
    found = []
    for power in range(int(powers.min()), int(powers.max()) + 1):
        inside = powers == power
        tokens = round(float((counts * times)[inside].sum()))
        found.append(Bucket(2**power, 2 ** (power + 1), round(float(times[inside].sum())), tokens))
    return tuple(found)


def joined_below(found: Sequence[Bucket], limit: int) -> tuple[Bucket, ...]:
    """The buckets that end at `limit` or before as one.

    Buckets 1 to 1 (1 document, 1 token), 2 to 3 (2, 5), 4 to 7 (1, 6), limit 4 -> 1 to 3 (3, 6), 4 to 7 (1, 6)
    """
    short, long = [b for b in found if b.high <= limit], [b for b in found if b.high > limit]
    if not short:
        return tuple(long)
    together = Bucket(short[0].low, short[-1].high, sum(b.documents for b in short), sum(b.tokens for b in short))
    return (together, *long)


def quantiles(lengths: Sequence[int] | Counts, shares: Sequence[float] = SHARES) -> tuple[Quantile, ...]:
    """Lengths that occur, no means of two.

    [1, 1, 2, 6], share 0.5: two of four documents are no longer than 1; half of the 10 tokens are in those up to 6
    """
    ordered = np.sort(_counts(lengths))
    tokens = np.cumsum(ordered)
    found = []
    for share in shares:
        by_documents = ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
        by_tokens = ordered[int(np.searchsorted(tokens, share * tokens[-1] - 1e-9))]
        found.append(Quantile(share, int(by_documents), int(by_tokens)))
    return tuple(found)


def longer_than(lengths: Sequence[int] | Counts, limit: int) -> Longer:
    """[1, 3, 6], limit 3: one document of three, 6 tokens of 10; the document of 3 tokens is not longer."""
    counts = _counts(lengths)
    inside = counts[counts > limit]
    return Longer(limit, len(inside) / len(counts), float(inside.sum() / counts.sum()))


def duplicates(lengths: Sequence[int] | Counts, contents: Sequence[int] | npt.NDArray[Any]) -> Duplicates:
    """Lengths [5, 2, 5, 8], contents [7, 3, 7, 9]: the third repeats the first, 1 document of 4 and 5 tokens of 20."""
    counts = _counts(lengths)
    _, first = np.unique(np.asarray(contents, dtype=np.uint64), return_index=True)
    repeated = int(counts.sum() - counts[first].sum())
    return Duplicates(len(counts) - len(first), 1 - len(first) / len(counts), float(repeated / counts.sum()))


def drawn_evenly(found: Sequence[Bucket], tokens: float) -> tuple[Repetition, ...]:
    """`tokens` drawn with an equal share from each bucket that has any: epochs = share * tokens / the bucket's tokens.

    Buckets of 8,000, 3,000 and 1,000 tokens, 12,000 drawn: 4,000 from each, which is 0.5, 1.33 and 4 epochs
    """
    filled = [bucket for bucket in found if bucket.tokens]
    return tuple(Repetition(b.low, b.high, tokens / len(filled) / b.tokens) for b in filled)


def contexts(
    lengths: Sequence[int] | Counts, tokens: float, row_tokens: Sequence[int], *, scale: Scale = 1.0
) -> tuple[Context, ...]:
    """For `tokens` of training in rows of each of these lengths.

    Lengths [5, 9, 20], 64 tokens of training: rows of 4 hold 4 + 8 + 20 = 32 of the 34 tokens, seen twice; rows of 8 hold 24,
    seen 2.67 times; rows of 16 hold 16, seen 4 times
    """
    counts, found = _counts(lengths), []
    for row in map(_row, row_tokens):
        inside = float((counts // row * row * scale).sum())
        epochs = tokens / inside if inside else math.inf
        found.append(Context(row, round(inside), inside / float((counts * scale).sum()), epochs, MAX_EPOCHS * inside))
    return tuple(found)


def longest_enough(found: Sequence[Context]) -> Context | None:
    """The longest rows whose text comes MAX_EPOCHS times at most; None where there are none."""
    return max((each for each in found if each.is_enough), key=lambda each: each.row_tokens, default=None)


def joined_and_cut(lengths: Sequence[int] | Counts, row_tokens: int) -> PackingLoss:
    """All documents one after another with an end token each, cut every `row_tokens`.

    Lengths [3, 5], rows of 4: a a a . | b b b b | b .  One of the 8 tokens has its document's beginning in another row.
    """
    counts, row = _counts(lengths), _row(row_tokens)
    starts = np.cumsum(counts + 1) - counts - 1
    severed = np.maximum(0, starts + counts - (starts // row + 1) * row)
    return PackingLoss("joined with end tokens, cut", 0.0, 0.0, float(severed.sum() / counts.sum()))


def greedy_crop(lengths: Sequence[int] | Counts, row_tokens: int) -> PackingLoss:
    """Documents in their order; the one that the row cannot hold is cropped, and the next row begins with the next document.

    Lengths [6, 4, 3, 9, 5], rows of 10: [6 4] [3 7] [5 ..]. 2 of the 9 are left out, of 27 in all.
    """
    counts, row = _counts(lengths), _row(row_tokens)
    left_out, room = 0, row
    for length in counts.tolist():
        if length >= room:
            left_out += length - room
            room = row
        else:
            room -= length
    return PackingLoss("greedy, cropped", float(left_out / counts.sum()), 0.0, 0.0)


def best_fit_crop(lengths: Sequence[int] | Counts, row_tokens: int) -> PackingLoss:
    """Documents cropped to a row, then best fit in pools.

    Lengths [6, 4, 3, 12], rows of 10: [10] [6 4] [3]. 2 of the 12 are left out, of 25; 7 places of 30 are padding.
    """
    counts, row = _counts(lengths), _row(row_tokens)
    cropped = np.minimum(counts, row)
    return PackingLoss("best fit, cropped", 1 - float(cropped.sum() / counts.sum()), _padded(_pools(cropped), row), 0.0)


def best_fit_split(lengths: Sequence[int] | Counts, row_tokens: int) -> PackingLoss:
    """Documents longer than a row in pieces of a row, then best fit in pools: what `packed_masked` does without context.

    Lengths [6, 4, 3, 12], rows of 10: [10] [6 4] [3 2]. Nothing is left out; the 2 of the 12 are severed; 5 of 30 padding.
    """
    counts, row = _counts(lengths), _row(row_tokens)
    severed = np.maximum(0, counts - row)
    pieces = [np.append(np.full(int((pool // row).sum()), row), pool[pool % row > 0] % row) for pool in _pools(counts)]
    return PackingLoss("best fit, split", 0.0, _padded(pieces, row), float(severed.sum() / counts.sum()))


def _pools(counts: Counts) -> list[Counts]:
    return np.split(counts, range(POOL_DOCUMENTS, len(counts), POOL_DOCUMENTS))


def _padded(pools: Sequence[Counts], row: int) -> float:
    """Share of the places of all rows that stay empty."""
    places = tokens = 0
    for pool in pools:
        places += len(best_fit(pool.tolist(), row)) * row
        tokens += int(pool.sum())
    return 1 - tokens / places


def _counts(lengths: Sequence[int] | Counts) -> Counts:
    counts = np.asarray(lengths, dtype=np.int64)
    if not len(counts) or counts.min() < 1:
        got = f"a document of {counts.min()} tokens" if len(counts) else "no document"
        raise Rejected(Reason.DATASET, got, "documents of at least one token", "lengths")
    return counts


def _row(row_tokens: int) -> int:
    if row_tokens < 1:
        raise Rejected(Reason.SETTING, f"rows of {row_tokens} tokens", "1 or more", "packing")
    return row_tokens
