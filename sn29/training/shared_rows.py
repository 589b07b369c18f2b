"""Rows of the embedding that rare tokens share while a small model is trained."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Rows:
    """Which row of the trained embedding each token uses. V ids of the vocabulary, R trained rows of the embedding.

    From a few hundred thousand tokens of text nothing can be learnt about most of a vocabulary of 100,277. Tokens without a
    row of their own share one; they have the same logit then, and the softmax over all V tokens needs it once, with their
    number m:  sum_v exp(l_v) = sum_own exp(l_v) + exp(l_shared + ln m).  Nothing is approximated: the saved model repeats
    the shared row m times and has the same losses. At hidden size 64, a step of 270 tokens takes 30 ms with 5,400 rows
    and 380 ms with 100,277.
    """

    def __init__(self, own: Sequence[int], vocab_size: int) -> None:
        """`own`: the ids that have a row of their own, ascending."""
        shared = vocab_size - len(own)
        self.own = tuple(own)
        self.size = len(own) + (shared > 0)
        """R; the shared row is the last."""
        self.row_of = torch.full((vocab_size,), self.size - 1)
        """[V] the row of each token id."""
        self.row_of[list(own)] = torch.arange(len(own))
        self.log_count = torch.zeros(self.size)
        """[R] ln of the number of tokens that use the row."""
        if shared:
            self.log_count[-1] = math.log(shared)
        self._list = self.row_of.tolist() if shared else None

    @property
    def is_shared(self) -> bool:
        """Whether any tokens share a row."""
        return self._list is not None

    @classmethod
    def all_own(cls, vocab_size: int) -> Rows:
        return cls(range(vocab_size), vocab_size)

    @classmethod
    def counted(cls, documents: Iterable[Sequence[int]], vocab_size: int, min_count: int, always: Iterable[int]) -> Rows:
        """Own rows for tokens seen at least `min_count` times in these documents, and for those of `always`."""
        counts: Counter[int] = Counter()
        for document in documents:
            counts.update(document)
        return cls(sorted({token for token, count in counts.items() if count >= min_count} | set(always)), vocab_size)

    @classmethod
    def found(cls, full: dict[str, Tensor], always: Iterable[int] = ()) -> Rows:
        """Of a trained model: the tokens whose rows are equal go on sharing one, all others keep their own."""
        table = torch.cat([v.reshape(len(v), -1) for k, v in full.items() if _by_token(k)], dim=1)
        digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in table]
        ((common, count),) = Counter(digests).most_common(1)
        kept = set(always)
        own = [i for i, digest in enumerate(digests) if count == 1 or digest != common or i in kept]
        return cls(own, len(digests))

    def of(self, tokens: Sequence[int]) -> list[int]:
        """The rows of these tokens."""
        if self._list is None:
            return list(tokens)
        return [self._list[token] for token in tokens]

    def expand(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with R rows -> with V rows."""
        if not self.is_shared:
            return dict(trained)
        return {k: v[self.row_of] if _by_token(k) else v for k, v in trained.items()}

    def reduce(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with V rows, equal where they are shared -> with R rows."""
        if not self.is_shared:
            return dict(full)
        token_of = {row: token for token, row in enumerate(self.row_of.tolist())}
        some = torch.tensor([token_of[row] for row in range(self.size)])
        return {k: v[some] if _by_token(k) else v for k, v in full.items()}


def _by_token(name: str) -> bool:
    """Whether the weight has one row for each token."""
    return name.startswith(("model.embed_tokens.", "lm_head."))
