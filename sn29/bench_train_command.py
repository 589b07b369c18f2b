"""`sn29 bench train`: the packing modes beside one document a step and padded batches, in one process, in turns.

Forward and backward of the same documents through `training.objective.Objective`, head and attention the same for all, so
that what differs is how documents become batches. The optimizer's step costs the same in every mode: `--optimizers`.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from sn29.bench_eval_command import SIZES, Goal, clock, device_name, lengths_like_fineweb, random_model
from sn29.errors import Reason, Rejected
from sn29.training.packing import UNSCORED, Mode, Packing, Row, rows

if TYPE_CHECKING:
    import torch

    from sn29.settings import BenchTrainSettings
    from sn29.training.objective import Objective
    from sn29.training.optimizers import Measured

# (kind of device, this, beside that) -> ratio of useful tokens per second that the issue sets as a goal
GOALS = {
    ("cpu", "packed_masked", "packed"): 1.0,
    ("cpu", "packed_masked", "unpacked"): 1.1,
    ("cuda", "packed_masked", "padded"): 2.0,
}
EQUAL_LOSS = 1e-5
"""Relative difference of the loss of `unpacked` and `packed_masked` from one document a step: the same sums in float32.
In bfloat16 1e-3."""
PADDED_BATCH = 8
START = 0
"""Both start and end token: one id of the random models is as good as another."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One way of making batches. Seconds are CPU seconds on a CPU and wall seconds on CUDA, one a repetition."""

    tokens_per_second: float
    """Median, of scored tokens of text."""
    seconds: list[float]
    ratios: list[float]
    """How many times the useful tokens per second of one document a step, repetition by repetition."""
    batches: int
    """Timed, spread evenly over the pool's."""
    padding: float
    """Share of the tokens that go through the model which belong to no document; of the whole pool."""
    loss: float
    """Nats per scored token."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of the bench found."""

    model: str
    dtype: str
    device: str
    threads: int
    parameters: int
    documents: int
    tokens: int
    row_tokens: int
    batch_tokens: int
    times: int
    loss_difference: float
    """Of `unpacked` and `packed_masked` from one document a step, relative, on the first six documents."""
    ways: dict[str, Figures]
    goals: list[Goal] = field(default_factory=list)


def bench_train(words: list[str]) -> int:
    """Exit 0 when every goal that the issue sets for this kind of device is met, 1 otherwise."""
    from sn29.settings import BenchTrainSettings, read

    settings = read(BenchTrainSettings, words)
    import torch

    if settings.model not in SIZES:
        raise Rejected(Reason.SETTING, settings.model, ", ".join(SIZES), "--model")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Rejected(Reason.SETTING, "cuda", "cpu: this machine has no CUDA device", "--device")
    if settings.optimizers:
        return _bench_optimizers(settings)
    report = measure(settings)
    print(json.dumps(asdict(report), indent=1) if settings.json_output else "\n".join(_lines(report)))
    return 0 if all(goal.met for goal in report.goals) else 1


def measure(settings: BenchTrainSettings) -> Report:
    """The ways in turns, `settings.times` times after one warm-up, on the same documents and the same weights."""
    import torch

    from sn29.training.objective import Objective, require_isolation

    device = torch.device(settings.device)
    torch.set_num_threads(settings.threads)
    model = random_model(SIZES[settings.model], torch.float32, device).train()
    require_isolation(model, getattr(torch, settings.dtype))
    objective = Objective(model)
    vocabulary = SIZES[settings.model].vocab
    documents = [
        [1 + token % (vocabulary - 1) for token in ids]  # none is the start token
        for ids in lengths_like_fineweb(settings.documents, settings.max_tokens, vocabulary)
    ]
    worst = _loss_difference(
        objective, batches_of(documents[:6], settings.row_tokens, settings.batch_tokens), device, settings.dtype
    )
    pool = batches_of(documents, settings.row_tokens, settings.batch_tokens)
    ways = {name: _some(groups, settings.tokens) for name, groups in pool.items()}
    runs = {name: _run_of(objective, groups, device, settings.dtype) for name, groups in ways.items()}
    nats = {name: run() for name, run in runs.items()}  # the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.times):
        for name, run in runs.items():
            begun = clock(device)
            run()
            seconds[name].append(clock(device) - begun)
    useful = {name: _text_tokens(groups) for name, groups in ways.items()}
    speeds = {name: [useful[name] / taken for taken in seconds[name]] for name in ways}
    figures = {
        name: Figures(
            statistics.median(speeds[name]), seconds[name], [a / b for a, b in zip(speeds[name], speeds["alone"], strict=True)],
            len(groups), padding_of(pool[name]), nats[name] / _scored(groups),
        )
        for name, groups in ways.items()
    }  # fmt: skip
    report = Report(
        settings.model, settings.dtype, device_name(device), settings.threads, model.num_parameters(), len(documents),
        sum(map(len, documents)), settings.row_tokens, settings.batch_tokens, settings.times, worst, figures,
    )  # fmt: skip
    report.goals.extend(_goals(report, device.type))
    return report


def batches_of(documents: Sequence[Sequence[int]], row_tokens: int, batch_tokens: int) -> dict[str, list[list[Row]]]:
    """Name -> rows of each forward. `alone` is one document a step, `padded` random batches of eight with padding on the
    right, the others are the trainer's modes, in forwards of about `batch_tokens` scored tokens."""
    from sn29.training.feed import grouped

    modes = {
        mode: Packing(mode, row_tokens, end_token=START, start_token=START, score_end=False, context=0) for mode in Mode
    }  # fmt: skip
    alone, _ = rows(documents, modes[Mode.UNPACKED])
    mixed = random.Random(29).sample(alone, len(alone))
    found = {
        "alone": [[row] for row in alone],
        "padded": [mixed[at : at + PADDED_BATCH] for at in range(0, len(mixed), PADDED_BATCH)],
    }
    for mode, packing in modes.items():
        found[mode.value] = grouped(rows(documents, packing)[0], batch_tokens)
    return found


def _some(groups: Sequence[list[Row]], tokens: int) -> list[list[Row]]:
    """About so many scored tokens' worth of the groups, evenly spread: short documents and long ones in their shares."""
    count = max(1, round(len(groups) * min(1.0, tokens / _scored(groups))))
    return [groups[(2 * n + 1) * len(groups) // (2 * count)] for n in range(count)]


def _loss_difference(objective: Objective, ways: dict[str, list[list[Row]]], device: torch.device, dtype: str) -> float:
    """Largest relative difference of the loss of a mode whose documents are on their own from one document a step."""
    nats = {name: _run_of(objective, ways[name], device, dtype)() for name in ("alone", Mode.UNPACKED, Mode.PACKED_MASKED)}
    return max(abs(each / nats["alone"] - 1) for each in nats.values())


def _run_of(objective: Objective, groups: Sequence[Sequence[Row]], device: torch.device, dtype: str) -> Callable[[], float]:
    """Forward and backward of every group, gradients cleared between them as between steps. Returns the nats in all."""
    import torch

    from sn29.training.objective import make_batch

    def run() -> float:
        total = 0.0
        for group in groups:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                nats = objective(make_batch(group, device))
            nats.backward()
            objective.zero_grad()
            total += nats.item()
        return total

    return run


def _text_tokens(groups: Sequence[Sequence[Row]]) -> int:
    """Scored tokens that are text: the EOS between packed documents is none."""
    return sum(len(row.targets) - row.targets.count(UNSCORED) - row.targets.count(START) for group in groups for row in group)


def _scored(groups: Sequence[Sequence[Row]]) -> int:
    return sum(row.useful for group in groups for row in group)


def padding_of(groups: Sequence[Sequence[Row]]) -> float:
    """Share of the tokens that go through the model which belong to no row."""
    real = sum(len(row.ids) for group in groups for row in group)
    shared = [any(len(row.starts) > 2 for row in group) for group in groups]  # one behind the other: objective.make_batch
    longest = [max(len(row.ids) for row in group) for group in groups]
    passed = [
        sum(len(row.ids) for row in group) if flat else len(group) * most
        for group, flat, most in zip(groups, shared, longest, strict=True)
    ]
    return 1 - real / sum(passed)


# --- goals and table --------------------------------------------------------------------------------------------------


def _goals(report: Report, kind: str) -> Iterator[Goal]:
    ways = report.ways
    for (device, ours, theirs), wanted in GOALS.items():
        if device == kind:
            ratios = [a / b for a, b in zip(ways[ours].ratios, ways[theirs].ratios, strict=True)]
            found = statistics.median(ratios)
            spread = f"{found:.2f}x [{min(ratios):.2f} to {max(ratios):.2f}]"
            yield Goal(f"{ours} beside {theirs}, useful tokens", f"at least {wanted}x", spread, found >= wanted)
    limit = EQUAL_LOSS if report.dtype == "float32" else 1e-3
    worst = report.loss_difference
    yield Goal("loss of unpacked and packed_masked from one document a step", f"within {limit:g}", f"{worst:.1e}", worst <= limit)


def _lines(report: Report) -> Iterator[str]:
    yield (
        f"{report.model}  {report.parameters / 1e6:,.1f} M parameters  {report.dtype}  {report.device}  {report.threads} threads"
        f"  a pool of {report.documents} documents, {report.tokens:,} tokens  rows of {report.row_tokens:,}"
        f"  forwards of {report.batch_tokens:,}  medians of {report.times}"
    )
    unit = "CPU second" if report.device == "cpu" else "second"
    yield f"{'':14} {'useful tokens per ' + unit:>30} {'times one document a step':>26} {'batches':>8} {'padding':>8} {'loss':>9}"
    for name, f in report.ways.items():
        spread = f"{statistics.median(f.ratios):.2f} [{min(f.ratios):.2f} to {max(f.ratios):.2f}]"
        yield f"{name:14} {f.tokens_per_second:30,.0f} {spread:>26} {f.batches:8} {f.padding:8.1%} {f.loss:9.5f}"
    for goal in report.goals:
        yield f"{'pass' if goal.met else 'MISS'}  {goal.what}: {goal.found}, goal {goal.wanted}"


def _bench_optimizers(settings: BenchTrainSettings) -> int:
    """Exit 0; 1 when the state of one is more than 5% off what is stated."""
    import torch

    from sn29.training import optimizers

    torch.set_num_threads(settings.threads)
    found = optimizers.measure(times=settings.times, device=settings.device)
    if settings.json_output:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        print("\n".join(_optimizer_lines(found)))
    wrong = [
        each.name
        for each in found
        if each.measured_bytes is not None and abs(each.measured_bytes - each.stated_bytes) > 0.05 * each.stated_bytes
    ]
    return 1 if wrong else 0


def _optimizer_lines(found: Sequence[Measured]) -> Iterator[str]:
    yield f"{'':16} {'package':20} {'stated bytes a parameter':>25} {'measured':>9} {'ns a parameter and step':>24}"
    for each in found:
        known = each.measured_bytes is not None and each.step_ns is not None
        cost = f"{each.measured_bytes:9.2f} {each.step_ns:24.1f}" if known else f"{'not installed':>34}"
        yield f"{each.name:16} {each.package:20} {each.stated_bytes:25.2f} {cost}"
