"""How losses are computed, beside weights and text: what decides their last bits. No torch here: the validator reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["documents", "varlen"]
VERSION = 1
"""Of the engine's arithmetic: one more with every change that moves a bit of a loss."""
ROW_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of a packed row, by kind of device. 1,500 samples fill rows of 1,024 to 98.8%."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the logits are cut."""

    rows: int
    columns: int
    compiled: bool
    """The fold is compiled by torch: one pass over a tile where eager mode makes six."""

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'} tiles {self.rows}x{self.columns}"


@dataclass(frozen=True, slots=True)
class Profile:
    """Losses of one model, text and number format are comparable to the bit within one profile on one kind of device."""

    row_tokens: int
    tiles: Tiles
    attention: Attention

    def __str__(self) -> str:
        return f"packed-{VERSION} rows of {self.row_tokens}, {self.attention} attention, {self.tiles}"
