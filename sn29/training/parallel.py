"""One process or many: torch.distributed, started by `torchrun`, with FSDP2 for weights, gradients and optimizer state.

Tried: accelerate 1.15 with its FSDP2 plugin, and torch's own `fully_shard`. Accelerate leaves its plugin out on a CPU without
a word: with `cpu=True` two gloo processes trained under DDP, without it each trained alone. So nobody could test here what would
run on GPUs; and it calls the same function in the end, with data loaders, averages over micro-batches (ours are weighted by
scored tokens) and state folders of its own that would have to be kept out. `fully_shard` comes with torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sn29.errors import Reason, Rejected, Sn29Error

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)
"""The longest that one process may wait for the others: while rank 0 writes a large checkpoint."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run; this one is number `rank`."""

    rank: int = 0
    processes: int = 1
    device: str = "cpu"
    """Of this process, e.g. `cuda:1`."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def shards(self, total: int) -> tuple[int, ...]:
        """The data shards of this process: every `processes`-th one."""
        return tuple(range(self.rank, total, self.processes))

    def summed(self, numbers: Sequence[float]) -> list[float]:
        """Each number, added over all processes."""
        if self.processes == 1:
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(held)
        found: list[float] = held.tolist()
        return found

    def gathered(self, mine: Any) -> list[Any]:
        """What each process gives, by rank, known to all."""
        if self.processes == 1:
            return [mine]
        found = [None] * self.processes
        dist.all_gather_object(found, mine)
        return found

    def agree(self, failed: Sn29Error | None) -> None:
        """Every process calls this with what it could not do; all raise the first of it."""
        first = next((error for error in self.gathered(failed) if error is not None), None)
        if first is not None:
            raise first

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here; every process calls this, and what is raised in one (of Sn29Error) all raise."""
        failed: Sn29Error | None = None
        found: list[T] = []
        try:
            found.append(work())
        except Sn29Error as error:
            failed = error
        self.agree(failed)
        return found[0]

    def leave(self) -> None:
        if self.processes > 1:
            dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """Ends this process at once, when all is written and the world is left.

    gloo's threads are still there then, and Python's own end, which does not wait for them, aborted 4 of 29 processes that had
    gone on with a run: what was finished looked killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def alone(device: str) -> World:
    """One process. `device`: cpu or cuda. Raises Rejected(SETTING) for a device that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Rejected(Reason.SETTING, device, "cpu: torch sees no CUDA device here", "--train-device")
    return World(device=device)


def join(device: str) -> World:
    """The world that `torchrun` describes in the environment; one process without it. Raises as `alone`."""
    world = alone(device)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return world
    if device.startswith("cuda"):
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), device)


def threads_of(all_together: int) -> int:
    """This process's part of the threads of all that `torchrun` started on this machine, at least 1."""
    return max(1, all_together // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def shard(objective: nn.Module, world: World, *, bfloat16: bool) -> None:
    """FSDP2: each layer a unit, and the rest (embedding, last norm, head) one, in place.

    With `bfloat16` layers are gathered in it, and gradients added in float32; embedding, norm and head stay float32, and so
    do the hidden states between the layers, as under autocast in one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.split(":")[0], (world.processes,))
    halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, cast_forward_inputs=False)
    policy = halved if bfloat16 else MixedPrecisionPolicy()
    model: Any = objective.model
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be in shards, as a plain one."""
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()
