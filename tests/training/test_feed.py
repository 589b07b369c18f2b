"""The feed: every document once, and the same rows again from any step."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
from runs import Few, Pieces, packing

from sn29.errors import Reason, Rejected
from sn29.training.feed import Feed, Portions, grouped
from sn29.training.packing import UNSCORED, Mode, Row
from sn29.training.shared_rows import Rows


def feed(mode, source=Pieces, shard=0, shards=1, **portions):
    cut = replace(Portions(packing(mode), group_tokens=200, max_tokens=0, pool_documents=16, seed=3), **portions)
    return Feed(source(shard, shards), shard, cut, Rows.all_own(400))


@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_it_goes_on_from_every_group(mode):
    whole = feed(mode)
    taken = [(whole.take(), whole.state_dict()) for _ in range(25)]
    assert taken[-1][1]["pool"] >= 3, "several pools"
    for at in range(0, 24, 5):
        again = feed(mode)
        again.load_state_dict(taken[at][1])
        assert [again.take() for _ in range(24 - at)] == [group for group, _ in taken[at + 1 :]]


@pytest.mark.parametrize("mode", [Mode.UNPACKED, Mode.PACKED_MASKED], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_token_of_every_document_is_scored_once(mode, shards):
    """Of the first four pools, whatever the groups."""
    scored = []
    for shard in range(shards):
        source = feed(mode, shard=shard, shards=shards)
        while source.state_dict()["pool"] < 4:
            group, pool = source.take(), source.state_dict()["pool"]
            scored += [t for row in group for t in row.targets if t != UNSCORED] if pool < 4 else []
    expected = [t for number in range(64 * shards) for t in next(Pieces(number, 1))]
    assert sorted(scored) == sorted(expected)


def row_of(scored: int) -> Row:
    return Row((1,) * scored, (2,) * scored, (0, scored))


def test_groups_are_cut_nearest_to_an_even_division():
    made = [row_of(n) for n in (30, 30, 30, 50)]
    assert grouped(made, 70) == [made[:2], made[2:]]
    assert grouped(made, 1000) == [made]
    assert grouped([], 70) == []
    numbers = np.random.default_rng(0)
    made = [row_of(int(n)) for n in numbers.integers(1, 16, 200)]
    groups = grouped(made, 64)
    assert list(chain.from_iterable(groups)) == made
    assert all(abs(sum(row.useful for row in group) - 64) <= 17 for group in groups)


@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_groups_are_about_as_large_as_asked_for(mode):
    """Within a row, and what a pool of 880 tokens is off four groups of 200."""
    source = feed(mode)
    sizes = [sum(row.useful for row in source.take()) for _ in range(60)]
    assert max(abs(size - 200) for size in sizes) <= 60 + 20
    assert abs(sum(sizes) / 60 - 200) < 20


def test_the_order_is_the_seeds():
    assert feed(Mode.PACKED_MASKED).take() == feed(Mode.PACKED_MASKED).take()
    others = [feed(Mode.PACKED_MASKED, seed=seed) for seed in range(4, 9)]
    assert any(other.take() != feed(Mode.PACKED_MASKED).take() for other in others)


def test_a_step_of_packed_documents_has_all_lengths():
    """Best fit gives full rows by their longest document; a step of neighbours would see like ones only."""

    class Two(Pieces):
        def __next__(self):
            return (super().__next__() * 3)[: 17 if self.number % 4 else 55]

    source = feed(Mode.PACKED_MASKED, Two, pool_documents=64)
    groups = [source.take() for _ in range(20)]
    mixed = [group for group in groups if len({len(row.starts) for row in group}) > 1]
    assert len(mixed) > 10, "rows of one long document and of three short ones"


def test_documents_are_cut_where_that_is_asked_for():
    source = feed(Mode.UNPACKED, max_tokens=10)
    assert {len(row.ids) for _ in range(3) for row in source.take()} == {10}


def test_text_that_ends_and_text_without_rows_are_told_apart():
    source = feed(Mode.PACKED_MASKED, Few)
    with pytest.raises(StopIteration):
        list(islice(iter(source.take, None), 100)) and source.take()

    class Empty(Pieces):
        def __next__(self):
            return []

    with pytest.raises(Rejected, match="no row of 320 documents") as refused:
        feed(Mode.PACKED_MASKED, Empty).take()
    assert refused.value.reason is Reason.SETTING


def test_a_pool_with_fewer_groups_than_before_goes_on_with_the_next():
    """As when the samples of a newly opened window are left out of the text."""
    source = feed(Mode.PACKED_MASKED)
    for _ in range(3):
        source.take()
    state = source.state_dict()

    class Fewer(Pieces):
        def __next__(self):
            return super().__next__()[:2]

    again = feed(Mode.PACKED_MASKED, Fewer)
    again.load_state_dict({**state, "used": 3})
    again.take()
    assert again.state_dict()["pool"] == state["pool"] + 1
