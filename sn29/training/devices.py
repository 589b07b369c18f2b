"""What devices can do by their vendors' sheets: the one table of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_SHEETS = {
    "gb200": (186, 2250), "b200": (180, 2250), "h200": (141, 989), "h100": (80, 989), "a100": (80, 312), "a100-40gb": (40, 312),
    "l40s": (48, 362), "l40": (48, 181), "ada6000": (48, 364), "a6000": (48, 155), "rtx4090": (24, 165), "rtx3090": (24, 71),
    "a10": (24, 125), "l4": (24, 121), "t4": (16, 65),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sheet:
    memory_gib: float
    """Sold as GB."""
    peak: float
    """Dense 16-bit floating-point operations a second, sums in 32 bits."""


SHEETS: Mapping[str, Sheet] = {name: Sheet(gib, 1e12 * tflops) for name, (gib, tflops) in _SHEETS.items()}


def sheet_name(device: str) -> str | None:
    """The name in the table of what a driver calls a device, the longest that fits; None for one that is not there.

    `NVIDIA H100 80GB HBM3` -> h100, `NVIDIA GeForce RTX 4090` -> rtx4090, `NVIDIA RTX 6000 Ada Generation` -> ada6000
    """
    called = device.lower().replace(" ", "")
    if "6000ada" in called:
        return "ada6000"
    return max((name for name in SHEETS if name in called), key=len, default=None)
