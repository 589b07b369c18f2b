"""From a shard of documents to the rows of each step, for ever, and exactly again from any step.

    documents of one shard -> pool -> rows (packing.py) -> groups of about equally many scored tokens, in shuffled order

A checkpoint holds where the documents stood when the pool began, what was carried into it and how many of its groups are
used: after a restart the pool is read again, at most `pool_documents` documents for each shard, and the used groups are
passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from sn29.errors import Reason, Rejected
from sn29.training.packing import Mode, Packing, Row, rows
from sn29.training.shared_rows import Rows

T = TypeVar("T")
_BARREN_POOLS = 20
"""Pools without a row, one after the other, after which the text is given up."""


class Documents(Protocol):
    """Token ids of documents, without start token, for ever, of one shard."""

    def __next__(self) -> list[int]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: JSON-able, small."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with exactly the document that came next then."""
        ...


Open = Callable[[int, int], Documents]
"""open(shard, shards): the documents of one shard, from their beginning."""


@dataclass(frozen=True, slots=True)
class Portions:
    """How documents are cut into what a step takes."""

    packing: Packing
    group_tokens: int
    """Scored tokens of a group, as near as whole rows come to it: see `grouped`."""
    max_tokens: int
    """Tokens kept of a document; 0: all."""
    pool_documents: int
    """Documents that are packed, or sorted by length, together."""
    seed: int


class Feed:
    """The groups of one shard. Its state belongs to the groups that were taken."""

    def __init__(self, documents: Documents, shard: int, portions: Portions, vocabulary: Rows) -> None:
        """`vocabulary`: documents, start and end token become its rows."""
        self._documents, self._shard, self._vocabulary = documents, shard, vocabulary
        packing = portions.packing
        start = None if packing.start_token is None else vocabulary.of([packing.start_token])[0]
        (end,) = vocabulary.of([packing.end_token])
        self._portions = replace(portions, packing=replace(packing, start_token=start, end_token=end))
        self._began = documents.state_dict()
        self._carry_in: tuple[int, ...] = ()
        self._carry_out: tuple[int, ...] = ()
        self._pool = -1
        self._groups: list[list[Row]] = []
        self._used = 0

    def take(self) -> list[Row]:
        """The next group. Raises StopIteration where documents end, Rejected(SETTING) where they give no rows at all."""
        barren = 0
        while self._used == len(self._groups):
            self._next_pool()
            barren += not self._groups
            if barren == _BARREN_POOLS:
                got = f"no row of {barren * self._portions.pool_documents} documents"
                raise Rejected(Reason.SETTING, got, f"text for rows of {self._portions.packing.row_tokens} tokens", "training")
        self._used += 1
        return self._groups[self._used - 1]

    def _next_pool(self) -> None:
        self._began, self._carry_in = self._documents.state_dict(), self._carry_out
        self._pool += 1
        self._make_pool()

    def _make_pool(self) -> None:
        most, vocabulary = self._portions.max_tokens or None, self._vocabulary
        drawn = [vocabulary.of(ids[:most]) for ids in _some(self._documents, self._portions.pool_documents)]
        if not drawn:
            raise StopIteration
        made, self._carry_out = rows(drawn, self._portions.packing, self._carry_in)
        self._groups, self._used = self._in_groups(made), 0

    def _in_groups(self, made: Sequence[Row]) -> list[list[Row]]:
        mode = self._portions.packing.mode
        if mode is Mode.PACKED_MASKED:  # best fit gives rows by length, and their order costs no padding
            made = self._shuffled(made)
        groups = [group for group in grouped(made, self._portions.group_tokens) if any(row.useful for row in group)]
        # a packed stream has its own order: documents are shuffled already
        return self._shuffled(groups) if mode is Mode.UNPACKED else groups

    def _shuffled(self, things: Sequence[T]) -> list[T]:
        numbers = torch.Generator().manual_seed((self._portions.seed * 1_000_003 + self._pool) * 4_099 + self._shard)
        return [things[i] for i in torch.randperm(len(things), generator=numbers).tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self._began, "carry": list(self._carry_in), "pool": self._pool, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where other documents are left out than before, and the pool has fewer groups, it goes on with the next pool."""
        self._documents.load_state_dict(state["documents"])
        self._began, self._carry_in, self._carry_out = state["documents"], tuple(state["carry"]), tuple(state["carry"])
        self._pool, self._groups, self._used = state["pool"], [], 0
        if self._pool < 0:
            return
        self._make_pool()
        self._used = min(state["used"], len(self._groups))


def grouped(made: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Neighbouring rows in groups of about `tokens` scored tokens: each cut is the one nearest to an even division.

    Rows of 30, 30, 30, 50 scored tokens by 70: two groups, cut at 60, which is nearer to 70 than 90 is.
    """
    ends = np.cumsum([row.useful for row in made])
    if not len(ends):
        return []
    many = max(1, round(ends[-1] / tokens))
    wanted = ends[-1] * np.arange(1, many) / many
    cuts = [int(np.abs(ends - target).argmin()) + 1 for target in wanted]
    bounds = sorted({0, *cuts, len(made)})
    return [list(made[a:b]) for a, b in pairwise(bounds)]


def _some(documents: Documents, count: int) -> list[list[int]]:
    return list(islice(iter(documents.__next__, None), count))
