from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sn29.evaluation.best_fit import best_fit


def test_the_worked_example():
    assert best_fit([6, 4, 3, 5, 2], 10) == [[0, 1], [3, 2, 4]]


def test_the_tightest_row_is_taken_not_the_first():
    # after 7 and 8 there is room for 3 and 2: the 2 goes where nothing is left over
    assert best_fit([7, 8, 2], 10) == [[1, 2], [0]]


def test_nothing_and_too_much_are_left_out():
    assert best_fit([], 10) == []
    assert best_fit([0, 11, 10, 0], 10) == [[2]]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 40))
def test_every_length_that_fits_is_in_exactly_one_row_and_no_row_is_too_full(lengths, room):
    rows = best_fit(lengths, room)
    assert sorted(n for row in rows for n in row) == [n for n, length in enumerate(lengths) if 0 < length <= room]
    assert all(sum(lengths[n] for n in row) <= room for row in rows)
    # Two rows that would fit into one are never left apart: the second was opened because the first had no room.
    totals = sorted(sum(lengths[n] for n in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > room
