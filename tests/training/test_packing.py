from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn29.errors import Rejected
from sn29.training.packing import UNSCORED, Mode, Packing, Row, packed_masked, rows, segments, unpacked

S, E = 1, 2


def packing(mode: Mode, row_tokens: int, **more: object) -> Packing:
    numbers = {"end_token": E, "start_token": S, "score_end": False, "context": 0} | more
    return Packing(mode, row_tokens, **numbers)


# --- the worked examples of the docstrings ----------------------------------------------------------------------------


def test_unpacked_example():
    found = rows([[5, 6, 7], [8, 9]], packing(Mode.UNPACKED, 4))
    assert found == ([Row((1, 8), (8, 9), (0, 2)), Row((1, 5, 6), (5, 6, 7), (0, 3))], ())


def test_packed_example():
    found, carry = rows([[5, 6, 7], [8, 9], [10]], packing(Mode.PACKED, 4))
    assert found == [Row((5, 6, 7, 2), (6, 7, 2, 8), (0, 4)), Row((8, 9, 2, 10), (9, 2, 10, 2), (0, 4))]
    assert carry == (2,)
    masked, _ = rows([[5, 6, 7], [8, 9], [10]], packing(Mode.PACKED, 4, mask_first=True))
    assert [row.targets for row in masked] == [(6, 7, 2, UNSCORED), (9, 2, UNSCORED, 2)]
    assert [row.ids for row in masked] == [row.ids for row in found]
    assert [row.useful for row in masked] == [3, 3]


def test_packed_masked_example():
    found = rows([[5, 6, 7], [8, 9], [10]], packing(Mode.PACKED_MASKED, 4))
    assert found == ([Row((1, 5, 6, 1), (5, 6, 7, 10), (0, 3, 4)), Row((1, 8), (8, 9), (0, 2))], ())


def test_segments_examples():
    one = packing(Mode.PACKED_MASKED, 4)
    assert segments([5, 6, 7], one) == [((1, 5, 6), (5, 6, 7))]
    assert segments([5, 6, 7], packing(Mode.UNPACKED, 4, score_end=True)) == [((1, 5, 6, 7), (5, 6, 7, 2))]
    assert segments([5, 6, 7], packing(Mode.UNPACKED, 4, start_token=None)) == [((5, 6), (6, 7))]
    long = segments([5, 6, 7, 8, 9, 10], packing(Mode.PACKED_MASKED, 4, context=2))
    assert long == [((1, 5, 6, 7), (5, 6, 7, 8)), ((6, 7, 8, 9), (UNSCORED, UNSCORED, 9, 10))]


def test_documents_in_which_nothing_is_asked_make_no_row():
    assert rows([[], []], packing(Mode.UNPACKED, 4, score_end=True)) == ([], ())
    assert rows([[7], []], packing(Mode.PACKED_MASKED, 4, start_token=None)) == ([], ())
    assert rows([[], [7], []], packing(Mode.PACKED, 4)) == ([], (7, E))
    assert rows([], packing(Mode.PACKED, 4), carry=(5, E)) == ([], (5, E))


@pytest.mark.parametrize(
    ("mode", "row_tokens", "more", "said"),
    [
        (Mode.PACKED, 0, {}, "rows of 0 tokens.*1 or more"),
        (Mode.PACKED_MASKED, 8, {"context": 8}, "context of 8 tokens.*0 to 7"),
        (Mode.UNPACKED, 8, {"context": -1}, "context of -1 tokens"),
        (Mode.PACKED_MASKED, 8, {"mask_first": True}, "mask_first with packed_masked.*packed only"),
    ],
)
def test_numbers_that_make_no_row_are_refused(mode, row_tokens, more, said):
    with pytest.raises(Rejected, match=said):
        packing(mode, row_tokens, **more)


def test_a_carry_belongs_to_packed():
    with pytest.raises(Rejected, match="3 tokens carried into unpacked"):
        rows([[5]], packing(Mode.UNPACKED, 4), carry=(1, 2, 3))


# --- whatever the documents ---------------------------------------------------------------------------------------------

DOCUMENTS = st.lists(st.lists(st.integers(3, 40), max_size=30), max_size=12)


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in which no token is twice."""
    numbers = iter(range(3, 10**9))
    return [[next(numbers) for _ in range(length)] for length in lengths]


def scored(found: Sequence[Row]) -> Counter[int]:
    return Counter(target for row in found for target in row.targets if target != UNSCORED)


def segments_of(row: Row) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(row.ids[a:b], row.targets[a:b]) for a, b in pairwise(row.starts)]


LENGTHS, ROW = st.lists(st.integers(0, 30), max_size=12), st.integers(1, 12)


@pytest.mark.parametrize("mode", [Mode.UNPACKED, Mode.PACKED_MASKED])
@given(lengths=LENGTHS, row_tokens=ROW, context=st.integers(0, 11), start=st.booleans(), end=st.booleans())
def test_each_token_is_scored_exactly_once_behind_its_own_past(mode, lengths, row_tokens, context, start, end):
    documents = numbered(lengths)
    made = packing(
        mode, row_tokens, start_token=S if start else None, score_end=end, context=min(context, row_tokens - 1)
    )  # fmt: skip
    found, carry = rows(documents, made)
    assert carry == ()
    expected = Counter(token for document in documents for token in (document if start else document[1:]))
    if end:
        expected[E] = sum(map(bool, documents))
    assert scored(found) == +expected
    past = {token: document[:n] for document in documents for n, token in enumerate(document)}
    for row in found:
        assert len(row.ids) == len(row.targets) == row.starts[-1] <= row_tokens
        assert row.starts[0] == 0
        assert all(a < b for a, b in pairwise(row.starts))
        assert row.useful > 0
        for ids, targets in segments_of(row):
            for place, target in enumerate(targets):
                if target not in (UNSCORED, E):  # what the segment shows up to here is the document's own past
                    seen = [token for token in ids[: place + 1] if token != S]
                    assert seen == past[target][len(past[target]) - len(seen) :]
            # the unscored ones are context at the front of a later piece, and no more of it than was asked for
            again = len(targets) - len([t for t in targets if t != UNSCORED])
            assert targets[:again] == (UNSCORED,) * again
            assert again in (0, made.context)


@given(lengths=LENGTHS, row_tokens=ROW)
def test_no_document_is_cut_that_a_row_can_hold(lengths, row_tokens):
    documents = numbered(lengths)
    whole = {tuple(document) for document in documents if 0 < len(document) <= row_tokens}
    masked = packed_masked(documents, packing(Mode.PACKED_MASKED, row_tokens))
    found = {targets for row in masked for _, targets in segments_of(row)}
    assert whole <= found


@given(documents=DOCUMENTS, row_tokens=st.integers(1, 40))
def test_the_masked_rows_hold_the_very_segments_of_the_unpacked_ones(documents, row_tokens):
    alone = [segment for row in unpacked(documents, packing(Mode.UNPACKED, row_tokens)) for segment in segments_of(row)]
    masked = packed_masked(documents, packing(Mode.PACKED_MASKED, row_tokens))
    shared = [segment for row in masked for segment in segments_of(row)]
    assert sorted(alone) == sorted(shared)
    assert alone == sorted(alone, key=lambda segment: len(segment[0]))


def subnet_9(documents: Sequence[Sequence[int]], row_tokens: int) -> list[list[int]]:
    """The rule of macrocosm-os/pretraining, line by line: rows of one long buffer."""
    buffer: list[int] = []
    for document in documents:
        buffer += document
        buffer += [E]
    batch = []
    while len(buffer) >= row_tokens:
        batch.append(buffer[:row_tokens])
        buffer = buffer[row_tokens:]
    return batch


def test_packed_is_the_rule_of_subnet_9_token_for_token_over_many_pools():
    numbers = random.Random(29)
    for _ in range(200):
        row_tokens = numbers.randrange(1, 40)
        made = packing(Mode.PACKED, row_tokens)
        pools = [
            [[numbers.randrange(3, 99) for _ in range(numbers.randrange(1, 50))] for _ in range(numbers.randrange(6))]
            for _ in range(numbers.randrange(1, 8))
        ]
        found: list[Row] = []
        carry: tuple[int, ...] = ()
        for pool in pools:
            more, carry = rows(pool, made, carry)
            assert len(carry) <= row_tokens  # a full row waits for the token after it
            found += more
        everything = [document for pool in pools for document in pool]
        expected = subnet_9(everything, row_tokens)
        assert [list(row.ids) for row in found] == expected[: len(found)]
        assert len(expected) - len(found) in (0, 1)
        # Targets: its shifted labels, and the first token of the next row, for which it never asks.
        stream = [token for document in everything for token in (*document, E)]
        assert [t for row in found for t in row.targets] == stream[1 : 1 + len(found) * row_tokens]
        assert [row.targets[:-1] for row in found] == [row.ids[1:] for row in found]
        assert all(row.starts == (0, row_tokens) and row.useful == row_tokens for row in found)


def test_web_lengths_leave_at_most_a_hundredth_of_a_row_empty():
    numbers = random.Random(7)
    for _ in range(3):
        documents = [[3] * max(1, round(600 * math.exp(numbers.gauss(0, 0.9)))) for _ in range(1000)]
        for row_tokens, limit in ((1024, 0.01), (2048, 0.01), (4096, 0.01)):
            found = packed_masked(documents, packing(Mode.PACKED_MASKED, row_tokens))
            padding = 1 - sum(len(row.ids) for row in found) / (len(found) * row_tokens)
            assert padding <= limit, (row_tokens, padding)


def test_the_same_documents_make_the_same_rows():
    documents = numbered([5, 5, 3, 9, 1, 5, 3])
    assert packed_masked(documents, packing(Mode.PACKED_MASKED, 9)) == packed_masked(documents, packing(Mode.PACKED_MASKED, 9))
