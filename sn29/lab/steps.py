"""Real training steps, timed: what this machine does of a model's operations, and how longer rows change that.

    random weights, random tokens -> forward and backward (training.objective) and the optimizer's step -> seconds
    a large matrix product        -> the rate that they are a share of

A model with the widths of the config, as few layers as are asked for and a head that is smaller by as much, so that a large one
can be timed on a small machine: each part has the share of the operations that it has in the whole.

What is judged is the increase: how much longer a token takes in longer rows, which is attention alone. A plan without attention
is 100 % of it off, whatever the model; rows from which on attention adds less than MIN_INCREASE are refused, because there the
clock's noise is as large. The speed itself is measured, not planned: there is nothing to judge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from sn29.errors import Reason, Rejected
from sn29.lab.cost import Costs, built, costs_of, with_layers
from sn29.lab.plan import Devices, Job, memory_of, work
from sn29.training.objective import Batch, Objective, make_batch
from sn29.training.optimizers import Optimizer
from sn29.training.packing import Row

WITHIN = {"cpu": 0.5, "cuda": 0.5}
"""How far a planned time may be from the measured one, of the longest rows' measured increase."""
WITHIN_BYTES = 0.05
"""How far planned memory may be from the measured peak, on CUDA."""
SQUARE = {"cpu": 0.5, "cuda": 1.0}
"""Scores as the time has them, in parts of the full square: torch's kernel for CPUs leaves out what is above the diagonal and is
as fast as matrix products (SmolLM2-135M, rows of 4,096 to 256: 1.53 measured, 1.48 by half the square, 1.93 by all of it)."""
MIN_INCREASE = 1 / 3
"""Of the time of a token, from the shortest to the longest rows, by the plan."""


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one length. Seconds are CPU seconds of a thread on a CPU, and wall seconds on CUDA."""

    row_tokens: int
    rows: int
    seconds: float
    """Of forward and backward: the least, for what others do on the machine only adds to it."""
    optimizer_seconds: float
    utilisation: float
    """Of the matrix rate, in operations of `plan.work`."""
    mfu: float
    """The same in operations that are done once."""
    relative: float
    """Seconds a token, to those of the first length."""
    planned: float
    """The same by the plan."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What one measurement found."""

    device: str
    """cpu, or what the driver calls it."""
    memory_bytes: float
    """Of the device, all of it."""
    layers: int
    parameters: int
    matrix_rate: float
    """FLOP/s of a large product in the type of the products."""
    peak_bytes: int
    """Of the device, on CUDA; 0 elsewhere."""
    planned_bytes: float
    """By `plan.memory_of`, for the longest rows."""
    steps: tuple[Step, ...]

    @property
    def increase(self) -> float:
        """Of the time of a token from the first length to the last, as measured; 1 % where it is less."""
        return max(0.01, self.steps[-1].relative - 1)

    @property
    def errors(self) -> tuple[float, ...]:
        """Of each step: planned less measured time of a token, in parts of the increase. Without attention the last is -1."""
        return tuple((step.planned - step.relative) / self.increase for step in self.steps)

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors))

    @property
    def bytes_error(self) -> float:
        """0 where memory cannot be measured."""
        return self.planned_bytes / self.peak_bytes - 1 if self.peak_bytes else 0.0

    @property
    def is_within(self) -> bool:
        kind = "cuda" if self.peak_bytes else "cpu"
        return self.worst <= WITHIN[kind] and abs(self.bytes_error) <= WITHIN_BYTES


def twin(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same with so many layers (0, or more than there are: all), and of its vocabulary the same share."""
    if not 0 < layers < config.num_hidden_layers:
        return config
    small = with_layers(config, layers)
    small.vocab_size = max(64, round(config.vocab_size * layers / config.num_hidden_layers))
    return small


def enough_lengths(costs: Costs, square: float = 1.0, shortest: int = 256) -> tuple[int, ...]:
    """Doubling from `shortest` on until attention adds a tenth more than MIN_INCREASE, or positions end."""
    lengths = [shortest]
    while (
        _increase(costs, lengths, square) < MIN_INCREASE + 0.1
        and lengths[-1] < 1 << 20
        and 2 * lengths[-1] <= (costs.places or math.inf)
    ):
        lengths.append(2 * lengths[-1])
    return tuple(lengths)


def _increase(costs: Costs, lengths: Sequence[int], square: float, checkpointing: bool = False) -> float:
    """Of the time of a token from the first length to the last, by the plan."""
    first, last = (_work(costs, length, checkpointing, square) for length in (lengths[0], lengths[-1]))
    return last / first - 1


def _work(costs: Costs, length: int, checkpointing: bool, square: float) -> float:
    return work(costs, length, 1, checkpointing=checkpointing, sharded=False, square=square)


def measure(
    config: PreTrainedConfig,
    lengths: Sequence[int],
    *,
    tokens: int,
    layers: int = 0,
    optimizer: str = "adamw",
    dtype: str = "float32",
    checkpointing: bool = False,
    device: str = "cpu",
    times: int = 5,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Timed:
    """Steps of `tokens` in rows of each length in turns, `times` times after one to warm up, on the threads that torch is set to.

    `lengths`: ascending; none: `enough_lengths`. Raises Rejected(SETTING) for what does not fit into the memory that is free,
    lengths that cannot tell a plan from one without attention, or a device that is not there;
    Rejected(FAMILY) for a class whose attention is not ours to call (training/objective.py).
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Rejected(Reason.SETTING, "cuda", "cpu: this machine has no CUDA device", "--measure")
    small = twin(config, layers)
    costs = costs_of(small, dtype)
    lengths = lengths or enough_lengths(costs, SQUARE[device])
    if (more := _increase(costs, lengths, SQUARE[device], checkpointing)) < MIN_INCREASE:
        got = f"rows of {lengths[0]:,} to {lengths[-1]:,} tokens, over which attention adds {more:.0%} to the time of a token"
        raise Rejected(Reason.SETTING, got, f"{MIN_INCREASE:.0%} or more, or a plan without it would pass", "--measure-lengths")
    rows = [max(1, tokens // length) for length in lengths]
    longest = max(range(len(lengths)), key=lambda n: rows[n] * costs.kept.of(lengths[n]))
    job = Job(lengths[longest], tokens, optimizer, dtype, Devices(1, device, 0.0, 0.0))
    needed = memory_of(costs, job, rows[longest], checkpointing=checkpointing).total
    free = _free_bytes(device)
    if needed > free:
        got = f"{needed / 1e9:.1f} GB for {small.num_hidden_layers} layers and {tokens:,} tokens a step"
        raise Rejected(Reason.SETTING, got, f"{free / 1e9:.1f} GB: fewer --measure-layers or --measure-tokens", "--measure")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench = _Bench(small, optimizer, dtype, checkpointing, device)
    batches = [bench.batch(length, count) for length, count in zip(lengths, rows, strict=True)]
    seconds: list[list[tuple[float, float]]] = [[] for _ in lengths]
    for turn in range(times + 1):
        for number, batch in enumerate(batches):
            taken = bench.step(batch)
            if turn:
                seconds[number].append(taken)
            report(turn * len(batches) + number + 1, (times + 1) * len(batches))
    passes = [min(taken for taken, _ in each) for each in seconds]
    updates = [min(taken for _, taken in each) for each in seconds]
    each = [_work(costs, length, checkpointing, SQUARE[device]) for length in lengths]
    steps = _steps(costs, lengths, rows, passes, updates, bench.matrix_rate(), each)
    name, peak = (torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()) if device == "cuda" else ("cpu", 0)
    memory = float(torch.cuda.mem_get_info()[1]) if device == "cuda" else _machine_bytes("MemTotal:")
    return Timed(name, memory, small.num_hidden_layers, costs.parameters.total, bench.rate, peak, needed, steps)


def _steps(
    costs: Costs,
    lengths: Sequence[int],
    rows: Sequence[int],
    passes: Sequence[float],
    updates: Sequence[float],
    rate: float,
    each: Sequence[float],
) -> tuple[Step, ...]:
    """`each`: operations of a token as the time has them, for each length."""
    found = []
    for number, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        per_token = passes[number] / (length * count)
        first = passes[0] / (lengths[0] * rows[0])
        once = costs.operations(length).total
        found.append(
            Step(
                length, count, passes[number], updates[number], each[number] / per_token / rate, once / per_token / rate,
                per_token / first, each[number] / each[0],
            )
        )  # fmt: skip
    return tuple(found)


def _free_bytes(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return _machine_bytes("MemAvailable:")


def _machine_bytes(name: str) -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class _Bench:
    """A model of random weights, and its optimizer."""

    def __init__(self, config: PreTrainedConfig, optimizer: str, dtype: str, checkpointing: bool, device: str) -> None:
        """Raises as `Objective` and `optimizers.kind_of`."""
        self.device, self.products = torch.device(device), torch.float32 if dtype == "float32" else torch.bfloat16
        self.casts = dtype == "mixed"
        self.rate = 0.0
        torch.manual_seed(29)
        model = built(config, device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.vocabulary = config.vocab_size
        self.objective = Objective(model)
        self.optimizer = Optimizer(optimizer, self.objective.named_parameters(), 1e-5, 0.0)

    def batch(self, length: int, rows: int) -> Batch:
        numbers = torch.Generator().manual_seed(length)
        texts = torch.randint(0, self.vocabulary, (rows, length + 1), generator=numbers).tolist()
        return make_batch([Row(tuple(ids[:-1]), tuple(ids[1:]), (0, length)) for ids in texts], self.device)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer."""
        begun = self._clock()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.casts):
            nats = self.objective(batch)
        (nats / batch.useful).backward()
        passed = self._clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return passed - begun, self._clock() - passed

    def matrix_rate(self) -> float:
        """FLOP/s of a large product, the best of five of four."""
        size = 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(size, size, device=self.device, dtype=self.products) for _ in range(2))
        at = [self._clock()]
        for _ in range(6):
            for _ in range(4):
                a @ b
            at.append(self._clock())
        self.rate = 4 * 2 * size**3 / min(later - earlier for earlier, later in pairwise(at[1:]))
        return self.rate

    def _clock(self) -> float:
        """On a CPU the time that a thread of this process had, so that others' work on the machine is not counted."""
        if self.device.type != "cuda":
            return time.process_time() / torch.get_num_threads()
        torch.cuda.synchronize()
        return time.perf_counter()
