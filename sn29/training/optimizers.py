"""Optimizers by name, from well-kept packages, with what each keeps for a parameter stated and measured.

    adamw adafactor muon sgd      torch.optim
    lion soap                     pytorch_optimizer
    adamw8bit lion8bit            bitsandbytes: one process; a CPU or a GPU
    adamw8bit_ao                  torchao: one process; its first step is compiled (10 s, a C compiler)

Sophia is not among them: its Hessian wants a second derivative of the loss, which neither the fused attention nor the head
in pieces (sn29/training/objective.py) has. Learning rates are not alike: `Kind.usual_rate`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sn29.errors import Reason, Rejected

Shape = tuple[int, ...]
Groups = list[dict[str, Any]]
"""Parameters with their weight decay, as torch's optimizers take them."""
_BETAS = (0.9, 0.95)
_BLOCK = 256
"""Values of an 8-bit state that share a scale."""
_SMALL_8BIT = 4096
"""Tensors with fewer values keep their state in float32 (bitsandbytes and torchao)."""
_LARGEST_SIDE = 8192
"""SOAP turns a side of a matrix only up to this length: the rotation of a longer one would be larger than the model."""


@dataclass(frozen=True, slots=True)
class Kind:
    """An optimizer by its name."""

    name: str
    package: str
    """What has to be installed for it; empty: torch itself."""
    make: Callable[[Groups, Groups, float], list[torch.optim.Optimizer]]
    """make(hidden matrices, everything else, learning rate)."""
    hidden_bytes: Callable[[Shape], float]
    """Bytes of state for a hidden matrix of this shape, in float32."""
    other_bytes: Callable[[Shape], float]
    """The same for embedding, head and vectors."""
    usual_rate: float
    """Learning rate to begin with, as a share of AdamW's."""
    is_sharded: bool
    """Whether it works on parameters that many processes share (FSDP2): tests/training/test_parallel.py tries all of them.

    torchao's 8-bit state does not: two processes step with it, but cannot put it together for a checkpoint (0.18: a state
    with parts that torch.load refuses, and no padding where a matrix does not divide).
    """
    about: str


def _values(each: float) -> Callable[[Shape], float]:
    return lambda shape: each * math.prod(shape)


def _in_8_bits(states: int, *, whole_blocks: bool = False) -> Callable[[Shape], float]:
    """One byte a value, a float32 scale for each block, a table of 256 float32; 4 bytes a value where a tensor is small.

    `whole_blocks`: also where it is no whole number of blocks.
    """

    def found(shape: Shape) -> float:
        count = math.prod(shape)
        if count < _SMALL_8BIT or (whole_blocks and count % _BLOCK):
            return 4.0 * count * states
        return states * (count + 4.0 * -(-count // _BLOCK) + 4 * 256)

    return found


def _factored(shape: Shape) -> float:
    """A float32 for each row and each column; for each value of a vector."""
    return 4.0 * (sum(shape[-2:]) if len(shape) > 1 else math.prod(shape))


def _rotated(shape: Shape) -> float:
    """Two moments, and for each side that is turned its statistics and its rotation."""
    sides = [side for side in shape if len(shape) > 1 and side <= _LARGEST_SIDE]
    return 8.0 * math.prod(shape) + sum(8.0 * side * side for side in sides)


def _adamw(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW([*hidden, *others], lr=rate, betas=_BETAS, fused=True)]


def _adafactor(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor([*hidden, *others], lr=rate)]


def _muon(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    # match_rms_adamw: updates as large as AdamW's, so that one rate serves both (Liu et al. 2025, Moonlight)
    return [
        *([torch.optim.Muon(hidden, lr=rate, adjust_lr_fn="match_rms_adamw")] if hidden else []),
        *([torch.optim.AdamW(others, lr=rate, betas=_BETAS, fused=True)] if others else []),
    ]


def _sgd(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([*hidden, *others], lr=rate, momentum=0.9, nesterov=True)]


def _lion(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    made = importlib.import_module("pytorch_optimizer").Lion([*hidden, *others], lr=rate, betas=(0.9, 0.99))
    return [made]


def _soap(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    made = importlib.import_module("pytorch_optimizer").SOAP([*hidden, *others], lr=rate, max_precondition_dim=_LARGEST_SIDE)
    return [made]


def _adamw8bit(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    made = importlib.import_module("bitsandbytes").optim.AdamW8bit([*hidden, *others], lr=rate, betas=_BETAS)
    return [made]


def _lion8bit(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    made = importlib.import_module("bitsandbytes").optim.Lion8bit([*hidden, *others], lr=rate, betas=(0.9, 0.99))
    return [made]


def _adamw8bit_ao(hidden: Groups, others: Groups, rate: float) -> list[torch.optim.Optimizer]:
    made = importlib.import_module("torchao.optim").AdamW8bit([*hidden, *others], lr=rate, betas=_BETAS)
    return [made]


_AO = _in_8_bits(2, whole_blocks=True)
_KINDS = (
    Kind("adamw", "", _adamw, _values(8), _values(8), 1.0, True, "the usual one"),
    Kind("adamw8bit", "bitsandbytes", _adamw8bit, _in_8_bits(2), _in_8_bits(2), 1.0, False, "AdamW in 8 bits"),
    Kind("adamw8bit_ao", "torchao", _adamw8bit_ao, _AO, _AO, 1.0, False, "AdamW in 8 bits, compiled"),
    Kind("lion", "pytorch_optimizer", _lion, _values(4), _values(4), 0.2, True, "the sign of a momentum"),
    Kind("lion8bit", "bitsandbytes", _lion8bit, _in_8_bits(1), _in_8_bits(1), 0.2, False, "Lion in 8 bits"),
    Kind("adafactor", "", _adafactor, _factored, _factored, 1.0, False, "a second moment for rows and columns only"),
    Kind("muon", "", _muon, _values(4), _values(8), 1.0, True, "orthogonal steps for hidden matrices, AdamW for the rest"),
    Kind("soap", "pytorch_optimizer", _soap, _rotated, _rotated, 0.5, False, "AdamW in turned coordinates"),
    Kind("sgd", "", _sgd, _values(4), _values(4), 10.0, True, "gradient with momentum"),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _KINDS}


def kind_of(name: str) -> Kind:
    """Raises Rejected(SETTING) for a name that is none, and for a package that is not installed, with what to install."""
    if name not in KINDS:
        raise Rejected(Reason.SETTING, name, ", ".join(KINDS), "optimizer")
    kind = KINDS[name]
    if not is_installed(kind):
        limit = f"{kind.package}: pip install 'sn29[optim]'"
        raise Rejected(Reason.SETTING, f"{name} without {kind.package}", limit, "optimizer")
    return kind


def is_installed(kind: Kind) -> bool:
    return not kind.package or importlib.util.find_spec(kind.package) is not None


class Optimizer:
    """One or two of torch's optimizers that step as one."""

    def __init__(self, name: str, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float) -> None:
        """`named`: a model's parameters with their names; weights decay in matrices only. Raises as `kind_of`."""
        self.kind = kind_of(name)
        hidden: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for path, parameter in named:
            (vectors if parameter.dim() < 2 else hidden if _is_hidden(path, parameter) else tables).append(parameter)
        inner, outer = ([{"params": p, "weight_decay": weight_decay}] if p else [] for p in (hidden, tables))
        others = [*outer, *([{"params": vectors, "weight_decay": 0.0}] if vectors else [])]
        self.parts = self.kind.make(inner, others, learning_rate)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next steps."""
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_bytes(self) -> int:
        """What it keeps for the parameters of this process, in bytes; nothing before the first step."""
        return sum(t.numel() * t.element_size() for part in self.parts for state in part.state.values() for t in _tensors(state))


def _is_hidden(path: str, parameter: nn.Parameter) -> bool:
    """A matrix inside the layers: neither embedding nor head, which have a row for each token."""
    return parameter.dim() == 2 and not {"embed_tokens", "lm_head"} & set(path.split("."))


def _tensors(held: Any) -> Iterator[Tensor]:
    """The plain tensors behind a state, inside lists and inside tensors made of several."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from _tensors(getattr(held, name))
        else:
            yield held
    elif isinstance(held, Mapping):
        for inner in held.values():
            yield from _tensors(inner)
    elif isinstance(held, Sequence) and not isinstance(held, str):
        for inner in held:
            yield from _tensors(inner)


def stated_bytes(name: str, shapes: Mapping[str, Shape]) -> float:
    """Bytes of state for parameters of these names and shapes, in float32, by the formulas of `KINDS`.

    adamw, 1,000 x 1,000: 8 MB. Without some bytes for the number of the step. Raises Rejected(SETTING).
    """
    if name not in KINDS:
        raise Rejected(Reason.SETTING, name, ", ".join(KINDS), "optimizer")
    kind = KINDS[name]
    is_table = {path: bool({"embed_tokens", "lm_head"} & set(path.split("."))) for path in shapes}
    return sum(
        (kind.other_bytes if is_table[path] or len(shape) != 2 else kind.hidden_bytes)(shape) for path, shape in shapes.items()
    )


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """What an optimizer costs for hidden matrices of 512 x 512."""

    name: str
    package: str
    stated_bytes: float
    """Of state, per parameter."""
    measured_bytes: float | None
    """None where its package is not installed."""
    step_ns: float | None
    """Nanoseconds per parameter and step: the median."""


def measure(
    names: Sequence[str] = tuple(KINDS), *, parameters: int = 1 << 20, times: int = 5, device: str = "cpu"
) -> list[Measured]:
    """Bytes of state and time of a step for each name, on as many threads as torch is set to. Raises Rejected(SETTING)."""
    found = []
    for name in names:
        if name not in KINDS:
            raise Rejected(Reason.SETTING, name, ", ".join(KINDS), "optimizer")
        side, count = 512, max(1, parameters // 512**2)
        shapes = {f"layers.{n}.weight": (side, side) for n in range(count)}
        total = count * side * side
        stated = stated_bytes(name, shapes) / total
        if not is_installed(KINDS[name]):
            found.append(Measured(name, KINDS[name].package, stated, None, None))
            continue
        numbers = torch.Generator(device=device).manual_seed(29)
        named = {path: nn.Parameter(torch.randn(shape, generator=numbers, device=device)) for path, shape in shapes.items()}
        optimizer = Optimizer(name, named.items(), 1e-4, 0.0)
        seconds = [_timed_step(optimizer, list(named.values()), numbers) for _ in range(times + 2)]
        step_ns = statistics.median(seconds[2:]) / total * 1e9  # the first ones make the state, and compile
        found.append(Measured(name, KINDS[name].package, stated, optimizer.state_bytes() / total, step_ns))
    return found


def _timed_step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], numbers: torch.Generator) -> float:
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=numbers, device=parameter.device)
    _synchronize(parameters[0].device)
    begun = time.perf_counter()
    optimizer.step()
    _synchronize(parameters[0].device)
    return time.perf_counter() - begun


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
