"""Rows of the embedding that rare tokens share: exact, and found again."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from runs import PACKING, SHAPE, TEXT, Pieces

from sn29.evaluation.engine import sample_nats
from sn29.training.objective import Objective, make_batch
from sn29.training.packing import rows as rows_of
from sn29.training.shape import FAMILIES, build_model, with_vocabulary
from sn29.training.shared_rows import Rows


def small_model(shape, rows, seed):
    return build_model(with_vocabulary(shape, rows.size, rows.of([shape.start_token])[0]), seed)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_row_is_exact(family, tied):
    """The small model with one row for many tokens and the full model that repeats it have the same losses."""
    shape = replace(SHAPE, family=family, tied=tied)
    rows = Rows([*range(0, 300, 2), 399], shape.vocab_size)
    assert rows.size == 152
    small = small_model(shape, rows, seed=5).double()
    full = build_model(shape, seed=6).double()
    full.load_state_dict(rows.expand(small.state_dict()))
    sample = list(TEXT[:40])  # odd and even bytes: tokens with and without a row of their own

    start, end = rows.of([399, 398])
    made, _ = rows_of([rows.of(sample)], replace(PACKING, start_token=start, end_token=end))
    nats = Objective(small.eval(), rows.log_count.double())(make_batch(made))
    assert nats.item() == pytest.approx(sample_nats(full.eval(), sample, 399), rel=1e-6)  # the engine's softmax is float32


def test_rows_are_found_again_in_a_checkpoint():
    rows = Rows([1, 5, 399], SHAPE.vocab_size)
    small = small_model(SHAPE, rows, seed=5).state_dict()
    full = rows.expand(small)
    found = Rows.found(full)
    assert found.own == (1, 5, 399)
    for name, tensor in found.reduce(full).items():
        assert torch.equal(tensor, small[name]), name
    assert Rows.found(full, always=(7,)).own == (1, 5, 7, 399)
    fresh = build_model(SHAPE, seed=5).state_dict()
    assert not Rows.found(fresh).is_shared
    assert Rows.found(fresh).reduce(fresh).keys() == fresh.keys()


def test_tokens_that_are_often_seen_get_their_own_row():
    seen = list(islice(iter(Pieces(0, 1).__next__, None), 50))
    rows = Rows.counted(seen, 400, 2, always=(399,))
    often = {token for token in range(256) if sum(d.count(token) for d in seen) >= 2}
    assert set(rows.own) == often | {399}
    assert rows.log_count[-1].item() == pytest.approx(math.log(400 - len(rows.own)))
    assert rows.of([399, 300, 398])[1:] == [rows.size - 1, rows.size - 1]
    assert Rows.all_own(400).of([3, 399]) == [3, 399]
