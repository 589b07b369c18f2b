"""The one table of devices, and the names that drivers give them."""

from __future__ import annotations

import pytest

from sn29.training.devices import SHEETS, sheet_name


@pytest.mark.parametrize(
    ("called", "name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA A100-SXM4-40GB", "a100", 312),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 165),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA GB200", "gb200", 2250),
        ("NVIDIA RTX A6000", "a6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", "ada6000", 364),
    ],
)
def test_what_drivers_call_them(called: str, name: str, tflops: int) -> None:
    assert sheet_name(called) == name
    assert SHEETS[name].peak == tflops * 1e12


def test_what_is_not_there_has_no_name() -> None:
    assert sheet_name("cpu") is None
    assert sheet_name("AMD Instinct MI300X") is None
