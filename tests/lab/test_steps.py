"""Timed steps: what is timed and what is refused. How long they take is nobody's promise in a test."""

from __future__ import annotations

import pytest
import torch

from sn29.errors import Reason, Rejected
from sn29.lab.cost import config_of, costs_of
from sn29.lab.steps import MIN_INCREASE, WITHIN, Step, Timed, enough_lengths, measure, twin

TINY = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_steps_of_a_shallow_twin(dtype: str) -> None:
    seen: list[tuple[int, int]] = []
    config = config_of(TINY)
    found = measure(
        config, (16, 256), tokens=256, layers=2, dtype=dtype, times=2, checkpointing=dtype == "mixed",
        report=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    costs = costs_of(twin(config, 2))
    assert (found.device, found.layers, found.parameters) == ("cpu", 2, costs.parameters.total)
    assert found.memory_bytes > 1e8
    assert [(step.row_tokens, step.rows) for step in found.steps] == [(16, 16), (256, 1)]
    assert seen[-1] == (6, 6)
    first, second = found.steps
    assert (first.relative, first.planned) == (1.0, 1.0)
    assert second.relative == pytest.approx(second.seconds / first.seconds)
    factor = 5 / 3 / (4 / 3) if dtype == "mixed" else 1
    dense, scores = costs.operations(64).dense, costs.operations(1).scores / 2  # half the square, on a CPU
    assert second.planned == pytest.approx((dense + 256 * factor * scores) / (dense + 16 * factor * scores))
    assert found.worst == pytest.approx(abs(second.planned - second.relative) / max(0.01, second.relative - 1))
    assert second.mfu * found.matrix_rate == pytest.approx(256 * costs.operations(256).total / second.seconds)


def test_a_twin_has_the_shares_of_the_whole() -> None:
    whole, small = costs_of(config_of(TINY)).operations(64), costs_of(twin(config_of(TINY), 2)).operations(64)
    assert (small.share, small.head / small.total) == pytest.approx((whole.share, whole.head / whole.total))
    assert twin(config_of(TINY), 0).vocab_size == 128


def timed(*steps: tuple[float, float], peak: int = 0, planned: float = 0.0) -> Timed:
    """Of (measured, planned) seconds a token, beside the first."""
    found = tuple(Step(256 << n, 8 >> n, 1.0, 0.1, 0.5, 0.4, real, plan) for n, (real, plan) in enumerate(steps))
    return Timed("NVIDIA H100" if peak else "cpu", 16e9, 2, 10**6, 1e11, peak, planned, found)


def test_a_plan_without_attention_misses() -> None:
    for increase in (0.05, 0.5, 5.0):
        assert timed((1.0, 1.0), (1 + increase / 2, 1.0), (1 + increase, 1.0)).worst == pytest.approx(1.0)
    assert WITHIN["cpu"] < 1 > WITHIN["cuda"]
    assert not timed((1.0, 1.0), (1.5, 1.0)).is_within
    assert not timed((1.0, 1.0), (1.5, 2.1)).is_within
    assert not timed((1.0, 1.0), (0.9, 1.4)).is_within, "no increase at all"
    assert timed((1.0, 1.0), (1.5, 1.6)).is_within


def test_memory_that_is_not_what_was_planned_misses() -> None:
    assert timed((1.0, 1.0), (1.5, 1.5), peak=10**9, planned=1.04e9).is_within
    assert not timed((1.0, 1.0), (1.5, 1.5), peak=10**9, planned=1.06e9).is_within
    assert not timed((1.0, 1.0), (1.5, 1.5), peak=10**9, planned=0.94e9).is_within


@pytest.mark.parametrize("lengths", [(64,), (16, 32)])
def test_lengths_that_cannot_tell_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(Rejected, match="attention adds") as caught:
        measure(config_of(TINY), lengths, tokens=64)
    assert caught.value.reason is Reason.SETTING


def test_lengths_go_on_until_attention_shows() -> None:
    costs = costs_of(config_of(TINY | {"max_position_embeddings": 1 << 15}))
    found = enough_lengths(costs)
    assert found == tuple(256 << n for n in range(len(found)))
    increase = [costs.operations(length).total / costs.operations(256).total - 1 for length in found]
    assert increase[-1] >= MIN_INCREASE + 0.1 > increase[-2]
    assert enough_lengths(costs_of(config_of(TINY))) == (256,), "its positions end there"


def test_what_has_no_room_is_refused_before_it_is_built() -> None:
    with pytest.raises(Rejected, match="--measure-layers") as caught:
        measure(
            config_of(TINY | {"hidden_size": 1 << 14, "intermediate_size": 1 << 16, "max_position_embeddings": 1 << 20}),
            (),
            tokens=128,
        )
    assert caught.value.reason is Reason.SETTING


def test_a_family_whose_attention_is_its_own_is_refused() -> None:
    with pytest.raises(Rejected) as caught:
        measure(
            config_of({"model_type": "mpt", "vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 2}), (16, 512), tokens=32
        )
    assert caught.value.reason is Reason.FAMILY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(Rejected, match="no CUDA device"):
        measure(config_of(TINY), (16, 256), tokens=32, device="cuda")
