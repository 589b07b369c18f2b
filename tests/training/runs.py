"""A tiny training run, for the tests of the trainer and for the processes that they start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sn29.training.optimizers import KINDS
from sn29.training.packing import Mode, Packing
from sn29.training.trainer import Recipe, Shape

TEXT = (Path(__file__).resolve().parents[2] / "LICENSE").read_bytes()

SHAPE = Shape(
    family="LlamaForCausalLM", vocab_size=400, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    max_positions=128, tied=True, start_token=399,
)  # fmt: skip
PACKING = Packing(Mode.PACKED_MASKED, row_tokens=60, end_token=398, start_token=399, score_end=False, context=8)
RECIPE = Recipe(
    steps=40, batch_tokens=200, max_tokens=0, learning_rate=2e-2, warmup_steps=4, weight_decay=0.01, clip=1.0, seed=3,
    checkpoint_every=10, packing=PACKING, pool_documents=16, count_documents=50, min_count=2,
)  # fmt: skip


def packing(mode: Mode) -> Packing:
    return replace(PACKING, mode=mode, start_token=None if mode is Mode.PACKED else 399)


def recipe_of(optimizer: str, **fields: Any) -> Recipe:
    """Two shards, as the runs of one and of two processes are compared with."""
    rate = 5e-3 * KINDS[optimizer].usual_rate
    return replace(RECIPE, steps=12, shards=2, optimizer=optimizer, learning_rate=rate, checkpoint_every=100, **fields)


class Pieces:
    """Pieces of the licence as bytes, 20 to 90 of them, for ever; a shard has every `shards`-th one."""

    def __init__(self, shard: int, shards: int) -> None:
        self.number, self.shards = shard, shards

    def __next__(self) -> list[int]:
        number = self.number
        self.number += self.shards
        start = number * 37 % (len(TEXT) - 90)
        return list(TEXT[start : start + 20 + number * 13 % 71])

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class Few(Pieces):
    """The first twenty of them."""

    def __next__(self) -> list[int]:
        if self.number >= 20:
            raise StopIteration
        return super().__next__()


def ignore(_: object) -> None:
    pass


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text().splitlines()]
