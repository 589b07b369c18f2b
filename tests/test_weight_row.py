"""The row that will stand on chain: limits kept, nothing left to the SDK or the chain to change."""

from __future__ import annotations

import pytest
from bittensor.intents.weights import clip_to_max_weight, normalize
from hypothesis import given
from hypothesis import strategies as st

from sn29.errors import Reason, Rejected
from sn29.weight_row import TOP, conform, fractions

ORDER = [f"hotkey {i}" for i in range(20)]


def test_values_are_65535ths_of_the_largest_and_nothing_else_is_added() -> None:
    assert conform({"hotkey 3": 0.5, "hotkey 1": 0.25, "hotkey 2": 1e-9, "hotkey 0": 0.0, "gone": 3.0}, ORDER) == {
        "hotkey 1": 32768,
        "hotkey 3": TOP,
    }
    assert conform({"gone": 1.0}, ORDER, min_weights=3) == {}
    assert fractions({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}


def test_too_short_a_row_is_filled_up_with_the_least_there_is() -> None:
    assert conform({"hotkey 1": 1.0}, ORDER, min_weights=3) == {"hotkey 0": 1, "hotkey 1": TOP, "hotkey 2": 1}


def test_what_is_above_the_largest_share_goes_to_the_others() -> None:
    row = fractions(conform({"hotkey 0": 0.8, "hotkey 1": 0.1, "hotkey 2": 0.06, "hotkey 3": 0.04}, ORDER, max_weight=0.4))
    assert row == pytest.approx({"hotkey 0": 0.4, "hotkey 1": 0.3, "hotkey 2": 0.18, "hotkey 3": 0.12}, abs=1e-4)
    assert max(row.values()) <= 0.4


def test_limits_that_cannot_be_kept_are_said() -> None:
    with pytest.raises(Rejected, match="at least 3, of which none") as refusal:
        conform({"hotkey 0": 0.8, "hotkey 1": 0.1}, ORDER, max_weight=0.34)
    assert refusal.value.reason is Reason.NO_WEIGHTS
    with pytest.raises(Rejected, match="a largest weight of 0"):
        conform({"hotkey 0": 0.8}, ORDER, max_weight=0.0)


def test_a_subnet_smaller_than_its_least_count_takes_a_row_of_all() -> None:
    assert conform({"hotkey 0": 0.8}, ORDER[:2], min_weights=8) == {"hotkey 0": TOP, "hotkey 1": 1}
    assert len(conform({"hotkey 0": 0.8}, ORDER, min_weights=30)) == len(ORDER)


@given(
    st.dictionaries(st.sampled_from(ORDER), st.floats(1e-6, 1), min_size=1),
    st.integers(1, 20),
    st.integers(TOP // 20, TOP),
)
def test_the_sdk_and_the_chain_leave_the_values_as_they_are(shares: dict[str, float], least: int, limit: int) -> None:
    try:
        values = list(conform(shares, ORDER, least, limit / TOP).values())
    except Rejected:
        assert least * limit < TOP  # too few hotkeys for the largest share
        return
    assert len(values) >= least
    assert max(values) == TOP
    assert max(values) * TOP <= limit * sum(values)  # the chain's check
    uids = list(range(len(values)))
    clipped = clip_to_max_weight(values, limit / TOP) if limit < TOP else values
    assert normalize(uids, [float(v) for v in clipped]) == (uids, values)
