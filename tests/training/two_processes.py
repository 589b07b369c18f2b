"""What each process of test_parallel.py runs, under torchrun: every case of CASES, once in one go and once from `half`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from runs import SHAPE, Pieces, ignore, recipe_of

from sn29.errors import Sn29Error, Unavailable
from sn29.training.optimizers import KINDS, is_installed
from sn29.training.parallel import end, join
from sn29.training.trainer import train

CASES = {
    "adamw": recipe_of("adamw"),
    "accumulation": recipe_of("adamw", accumulation=2),
    "lion": recipe_of("lion"),
    "muon": recipe_of("muon"),
    "sgd": recipe_of("sgd", activation_checkpointing=True),
}
HALF = 6


class Broken(Pieces):
    """The second shard of two cannot be read to its end."""

    def __next__(self) -> list[int]:
        if self.shards == 2 and self.number % 2 and self.number > 40:  # in the second pool
            raise Unavailable("text", "its disk is gone")
        return super().__next__()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = join("cpu")
    for name, recipe in CASES.items():
        if not is_installed(KINDS[recipe.optimizer]):
            continue
        train(folder / name, SHAPE, Pieces, recipe, ignore, until=HALF, world=world)
        if world.is_first:
            shutil.copytree(folder / name, folder / f"{name}-half")
        train(folder / name, SHAPE, Pieces, recipe, ignore, world=world)
    mapped: set[bool] = set()
    see = lambda _: mapped.add("state.pt" in Path("/proc/self/maps").read_text())  # noqa: E731
    train(folder / "from-one", SHAPE, Pieces, CASES["adamw"], see, world=world)
    if world.is_first:
        (folder / "mapped").write_text(str(mapped))
    apart = folder / ("from-one" if world.is_first else "elsewhere")
    for name, where, source in [("apart", apart, Pieces), ("broken", folder / "broken", Broken)]:
        try:
            train(where, SHAPE, source, CASES["adamw"], ignore, world=world)
        except Sn29Error as error:
            (folder / f"{name}-{world.rank}").write_text(str(error))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
