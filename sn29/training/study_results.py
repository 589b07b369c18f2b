"""What finished runs of the packing study say: losses, paired differences with intervals, by place, and throughput. Pure numbers.

Two kinds of 95 % intervals stand beside each other, because they answer two questions:

    over seeds        would another training (weights, order of documents) say the same?   Student's t on the seeds' differences
    over documents    would these models say the same of other documents of the kind?      paired bootstrap of the documents

A difference is taken inside a seed, where both arms began with the same weights and read the same documents, and inside a
document. Percent are of the second loss: 100 (a / b - 1). Worked example, three seeds: a = 4.2, 4.3, 4.1 and b = 4.0 each
time give 5, 7.5 and 2.5 %, mean 5, sd 2.5; t(2 degrees, 0.975) = 4.303, so 5 +- 4.303 * 2.5 / sqrt(3) = 5 +- 6.21 %.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sn29.training.packing_study import ARMS, CONTINUED, MODES, RATES, REFERENCE, SAME_COMPUTE, Run

VIEWS: Mapping[str, tuple[str, ...]] = {
    "single": ("single",),
    "packed": ("packed_rest", "packed_first"),
    "single_eos": ("single_eos",),
    "single_eos_all": ("single_eos", "single_eos_first"),
    "packed_rest": ("packed_rest",),
    "packed_first": ("packed_first",),
    "single_eos_first": ("single_eos_first",),
    "packed_end": ("packed_end",),
}
"""View -> the parts of `packing_study.VIEWS` that it adds up."""
CELL_KINDS = ("tokens", "compute", "continued")
"""Kinds of runs whose losses stand in one table."""
DRAWS = 2000
"""Of the bootstrap."""
_SEED = 29
MARGIN = 0.5
"""Percent: an interval whose upper end is below it says "not above"."""


@dataclass(frozen=True, slots=True)
class Interval:
    """95 %, both ends."""

    low: float
    high: float

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0


@dataclass(frozen=True, slots=True)
class Cell:
    """The loss of the models of one kind of run, read one way: nats a token, mean over seeds."""

    kind: str
    arm: str
    view: str
    seeds: tuple[int, ...]
    loss: float
    over_seeds: Interval | None
    """None with one seed."""


@dataclass(frozen=True, slots=True)
class Side:
    """Runs and how they are read."""

    kind: str
    arm: str
    view: str


_MASKED = Side("tokens", "masked", "single")


@dataclass(frozen=True, slots=True)
class Question:
    """A difference to look at: `a` against `b`."""

    group: str
    asks: str
    a: Side
    b: Side


@dataclass(frozen=True, slots=True)
class Difference:
    """The answer, in percent of b's loss."""

    question: Question
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    """Seed by seed."""
    percent: float
    over_seeds: Interval | None
    over_documents: Interval


@dataclass(frozen=True, slots=True)
class Place:
    """Tokens number `first` to `last` of their document, counted from 1."""

    first: int
    last: int
    losses: Mapping[str, float]
    """Arm -> nats a token, mean over seeds."""
    differences: Mapping[str, tuple[float, Interval | None]]
    """Arm -> nats above the baseline arm's, with the interval over seeds."""


@dataclass(frozen=True, slots=True)
class Throughput:
    arm: str
    tokens_per_second: float
    """Scored tokens a CPU second (CUDA: a second) of training, median over seeds."""
    slowest: float
    fastest: float
    flop_per_token: float
    fill: float
    """Scored tokens among those that go through the layers."""
    against: float | None
    """`tokens_per_second` as a multiple of `packed`'s, median over seeds; None without `packed`."""
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    kind: str
    arm: str
    tokens: tuple[float, ...]
    losses: tuple[float, ...]
    """Of some held-out documents one by one (EOS in front for arms with a start token), mean over seeds."""


@dataclass(frozen=True, slots=True)
class Goal:
    asks: str
    found: str
    met: bool | None
    """None: the numbers do not say."""


@dataclass(frozen=True, slots=True)
class Study:
    """All that a report shows."""

    head: Mapping[str, Any]
    """study.json: plan, text, revision, documents, versions."""
    seeds: tuple[int, ...]
    finished: int
    """Runs that this is made from."""
    documents: int
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    places: Mapping[str, tuple[Place, ...]]
    """View (`single`, `packed`) -> from the first token on."""
    throughput: tuple[Throughput, ...]
    curves: tuple[Curve, ...]
    goals: tuple[Goal, ...]


Result = Mapping[str, Any]
"""NAME.json of a finished run, with `curve` added."""
Results = Mapping[tuple[str, str], Mapping[int, Result]]
"""(kind, arm) -> seed -> result."""


# --- questions --------------------------------------------------------------------------------------------------------


_ASKED: Mapping[tuple[str, str], tuple[tuple[str, str, str], ...]] = {
    ("modes", "tokens"): (
        ("packed against unpacked, one by one", "packed single", "unpacked single"),
        ("masked against unpacked, one by one", "masked single", "unpacked single"),
        ("masked against packed, one by one", "masked single", "packed single"),
        ("unpacked against packed, on packed rows", "unpacked packed", "packed packed"),
        ("masked against packed, on packed rows", "masked packed", "packed packed"),
    ),
    ("terms", "tokens"): (
        ("packed-first (no reset) against packed, one by one", "packed-first single", "packed single"),
        ("packed: EOS in front against none, same tokens", "packed single_eos", "packed single"),
        ("packed with EOS in front against unpacked without", "packed single_eos", "unpacked single"),
        ("packed against unpacked, EOS in front of both", "packed single_eos", "unpacked single_eos"),
        ("packed against masked, EOS in front of both", "packed single_eos", "masked single_eos"),
        ("mixed lengths in a step: unpacked-mixed against unpacked", "unpacked-mixed single", "unpacked single"),
        ("masked against unpacked-mixed (padding alone: should be 0)", "masked single", "unpacked-mixed single"),
    ),
    ("start token", "tokens"): (
        ("unpacked+start, EOS in front, against unpacked, same tokens", "unpacked+start single_eos", "unpacked single"),
        ("masked+start, EOS in front, against masked, same tokens", "masked+start single_eos", "masked single"),
        ("packed against unpacked+start, EOS in front, same tokens", "packed single_eos", "unpacked+start single_eos"),
        ("masked+start against unpacked+start, all tokens", "masked+start single_eos_all", "unpacked+start single_eos_all"),
        ("masked+start against packed, all tokens", "masked+start single_eos_all", "packed single_eos_all"),
    ),
    ("equal compute", "compute"): (
        ("unpacked against packed, one by one", "unpacked single", "packed single"),
        ("masked against packed, one by one", "masked single", "packed single"),
        ("masked against unpacked, one by one", "masked single", "unpacked single"),
        ("unpacked against packed, on packed rows", "unpacked packed", "packed packed"),
        ("masked against packed, on packed rows", "masked packed", "packed packed"),
        ("masked+start against packed, all tokens", "masked+start single_eos_all", "packed single_eos_all"),
        ("masked+start against unpacked+start, all tokens", "masked+start single_eos_all", "unpacked+start single_eos_all"),
    ),
}
"""(group, kind of runs) -> (words, arm and view, the other arm and view)."""


def questions() -> tuple[Question, ...]:
    """Every difference that the report shows, in its order."""
    found = [
        Question(group, asks, Side(kind, *a.split()), Side(kind, *b.split()))
        for (group, kind), asked in _ASKED.items()
        for asks, a, b in asked
    ]
    more, on = "packed first, then", f"{REFERENCE} on"
    for view, how in (("single", "one by one"), ("single_eos", "EOS in front, same tokens")):
        arms = [arm for arm in CONTINUED if arm != REFERENCE and ARMS[arm].start == (view == "single_eos")]
        went_on, stopped = Side("continued", REFERENCE, view), Side("tokens", REFERENCE, view)
        found.append(Question(more, f"{on} against stopping, {how}", went_on, stopped))
        for other, b in (("stopping", stopped), (on, went_on)):
            found += [Question(more, f"{arm} against {other}, {how}", Side("continued", arm, view), b) for arm in arms]
    for arm in MODES:
        for kind in RATES:
            b = Side("tokens", arm, "single")
            found.append(Question("learning rate", f"{arm}, {kind} the rate", Side(kind, arm, "single"), b))
    return tuple(found)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_study(head: Path, runs: Path) -> Study:
    """From study.json and the folder of the runs; the same numbers for the same files."""
    about = json.loads(head.read_text())
    results: dict[tuple[str, str], dict[int, Result]] = {}
    for path in sorted(runs.glob("*.json")):
        result = json.loads(path.read_text())
        run = Run(**result["run"])
        held = [line for line in map(json.loads, path.with_suffix(".jsonl").read_text().splitlines()) if "held_out" in line]
        results.setdefault((run.kind, run.arm), {})[run.seed] = {**result, "curve": held}
    return studied(about, results)


def studied(about: Mapping[str, Any], results: Results) -> Study:
    """All numbers of the report."""
    known = _with_equal_compute(about, results)
    differences = tuple(d for q in questions() if (d := difference(q, known)) is not None)
    level = _alike(results, "tokens")
    speeds = tuple(_throughput(level))
    finished = [result for by_seed in results.values() for result in by_seed.values()]
    return Study(
        head=about,
        seeds=tuple(sorted({seed for by_seed in results.values() for seed in by_seed})),
        finished=len(finished),
        documents=len(finished[0]["evaluation"]["nats"]["single"]) if finished else 0,
        cells=tuple(_cells(_alike(results, *CELL_KINDS))),
        differences=differences,
        places={"single": _places(level, "single", "unpacked"), "packed": _places(level, "packed", "packed")},
        throughput=speeds,
        curves=tuple(curve for kind in sorted({kind for kind, _ in results}) for curve in _curves(_alike(results, kind))),
        goals=tuple(_goals(differences, speeds)),
    )


def _with_equal_compute(about: Mapping[str, Any], results: Results) -> Results:
    """Where an arm needed no run of its own for equal compute, the one for equal tokens serves."""
    known = dict(results)
    for arm, tokens in about["compute_tokens"].items():
        if abs(tokens / about["plan"]["tokens"] - 1) <= SAME_COMPUTE and ("tokens", arm) in results:
            known["compute", arm] = results["tokens", arm]
    return known


def _alike(results: Results, *kinds: str) -> Results:
    """Runs of these kinds, of the seeds that all their arms have: a mean over other seeds is not another arm's fault."""
    chosen = {key: by_seed for key, by_seed in results.items() if key[0] in kinds}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in chosen.values()))) if chosen else []
    return {key: {seed: by_seed[seed] for seed in seeds} for key, by_seed in chosen.items() if seeds}


Sums = tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]
"""Nats and tokens of each document."""


def _sums(result: Result, view: str) -> Sums:
    found, parts = result["evaluation"], VIEWS[view]
    nats, tokens = (np.array([found[what][part] for part in parts], dtype=np.float64) for what in ("nats", "tokens"))
    return nats.sum(axis=0), tokens.sum(axis=0)


def loss_of(result: Result, view: str) -> float:
    """Nats a token."""
    nats, tokens = _sums(result, view)
    return float(nats.sum() / tokens.sum())


def _cells(results: Results) -> Iterable[Cell]:
    for kind in CELL_KINDS:
        for arm in ARMS:
            by_seed = results.get((kind, arm), {})
            for view in VIEWS if by_seed else ():
                losses = [loss_of(by_seed[seed], view) for seed in sorted(by_seed)]
                yield Cell(kind, arm, view, tuple(sorted(by_seed)), statistics.fmean(losses), t_interval(losses))


def difference(question: Question, results: Results) -> Difference | None:
    """None when no seed has both."""
    a, b = (results.get((side.kind, side.arm), {}) for side in (question.a, question.b))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    each = [100 * (loss_of(a[s], question.a.view) / loss_of(b[s], question.b.view) - 1) for s in seeds]
    documents = bootstrap([_sums(a[s], question.a.view) for s in seeds], [_sums(b[s], question.b.view) for s in seeds])
    return Difference(question, tuple(seeds), tuple(each), statistics.fmean(each), t_interval(each), documents)


# --- intervals --------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return Interval(mean - half, mean + half)


@cache
def t_quantile(degrees: int, probability: float = 0.975) -> float:
    """Of Student's distribution, above its middle: 12.706 for 1 degree of freedom, 2.776 for 4, 2.262 for 9.

    The density c (1 + x^2 / d)^(-(d + 1) / 2) with x = sqrt(d) tan(u) is c sqrt(d) cos(u)^(d - 1), which is smooth: Simpson's
    rule in 2,000 steps, then bisection. No library of ours has it.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def above_middle(angle: float) -> float:
        steps = 2000
        at = np.linspace(0.0, angle, steps + 1)
        values = np.cos(at) ** (degrees - 1)
        return float(scale * angle / steps / 3 * (values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum()))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_middle(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def bootstrap(a: Sequence[Sums], b: Sequence[Sums]) -> Interval:
    """Of the mean over seeds of 100 (loss a / loss b - 1), over draws of as many documents with replacement; paired.

    `a`, `b`: for each seed (nats [documents], tokens [documents]). Always the same draws.
    """
    weights = _draws(len(a[0][0]))
    percents = np.zeros(len(weights))
    for (nats_a, tokens_a), (nats_b, tokens_b) in zip(a, b, strict=True):
        percents += 100 * ((weights @ nats_a) / (weights @ tokens_a) / ((weights @ nats_b) / (weights @ tokens_b)) - 1)
    low, high = np.quantile(percents / len(a), [0.025, 0.975])
    return Interval(float(low), float(high))


@cache
def _draws(documents: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[DRAWS, documents] how often each is drawn."""
    return np.random.default_rng(_SEED).multinomial(documents, np.full(documents, 1 / documents), DRAWS).astype(np.float64)


# --- by place, curves, throughput, goals --------------------------------------------------------------------------------


def _places(results: Results, view: str, baseline: str) -> tuple[Place, ...]:
    """Arms of equal tokens, read in the view; differences to the baseline arm. A start token's arms are read with EOS."""
    by_arm: dict[str, dict[int, list[float]]] = {}
    tokens: list[int] = []
    for arm in ARMS:
        source = "single_eos" if view == "single" and ARMS[arm].start else view
        for seed, result in results.get(("tokens", arm), {}).items():
            found = result["evaluation"]["places"][source]
            tokens = found["tokens"] if len(found["tokens"]) > len(tokens) else tokens
            losses = [n / t if t else math.nan for n, t in zip(found["nats"], found["tokens"], strict=True)]
            by_arm.setdefault(arm, {})[seed] = losses
    made = []
    for k in range(len(tokens)):
        at_k = {arm: [row[k] for row in rows.values() if k < len(row)] for arm, rows in by_arm.items()}
        means = {arm: mean for arm, found in at_k.items() if found and math.isfinite(mean := statistics.fmean(found))}
        if means:
            made.append(Place(2**k, 2 ** (k + 1) - 1, means, _above(by_arm, baseline, k)))
    return tuple(made)


def _above(
    by_arm: Mapping[str, Mapping[int, Sequence[float]]], baseline: str, k: int
) -> dict[str, tuple[float, Interval | None]]:
    base = by_arm.get(baseline, {})
    found = {}
    for arm, rows in by_arm.items():
        each = [rows[s][k] - base[s][k] for s in sorted(rows.keys() & base.keys()) if k < min(len(rows[s]), len(base[s]))]
        each = [value for value in each if math.isfinite(value)]
        if arm != baseline and each:
            found[arm] = (statistics.fmean(each), t_interval(each))
    return found


def _curves(results: Results) -> Iterable[Curve]:
    for (kind, arm), by_seed in sorted(results.items()):
        view = "single_eos" if ARMS[arm].start else "single"
        points = list(zip(*(by_seed[seed]["curve"] for seed in sorted(by_seed)), strict=False))
        yield Curve(
            kind, arm, tuple(statistics.fmean(p["tokens"] for p in point) for point in points),
            tuple(statistics.fmean(p["held_out"][view] for p in point) for point in points),
        )  # fmt: skip


def _throughput(results: Results) -> Iterable[Throughput]:
    """`results`: all arms of the same seeds."""
    packed = results.get(("tokens", REFERENCE))
    for arm in ARMS:
        by_seed = results.get(("tokens", arm))
        if not by_seed:
            continue
        speeds = {seed: result["tokens"] / result["seconds"] for seed, result in by_seed.items()}
        total = {key: sum(result[key] for result in by_seed.values()) for key in ("tokens", "through", "flop")}
        against = [speed / (packed[s]["tokens"] / packed[s]["seconds"]) for s, speed in speeds.items()] if packed else None
        yield Throughput(
            arm, statistics.median(speeds.values()), min(speeds.values()), max(speeds.values()),
            total["flop"] / total["tokens"], total["tokens"] / total["through"],
            statistics.median(against) if against else None, tuple(by_seed),
        )  # fmt: skip


def _goals(differences: Sequence[Difference], speeds: Sequence[Throughput]) -> Iterable[Goal]:
    """What the issue hopes for. Of losses only the interval over seeds decides: documents say nothing of another training."""
    found = {d.question.b.arm: d for d in differences if d.question.a == _MASKED and d.question.b.kind == "tokens"}
    for other, asks, judge in (
        ("unpacked", f"not above `unpacked` (margin {MARGIN} %)", _not_above),
        ("unpacked-mixed", f"not above `unpacked-mixed` (margin {MARGIN} %)", _not_above),
        ("packed", "below `packed`, the interval clear of 0", lambda over: over.below),
    ):
        if other in found:
            d = found[other]
            over, of = (d.over_seeds, "over seeds") if d.over_seeds else (d.over_documents, "one seed; over documents")
            shown = f"{d.percent:+.2f} % ({of} {over.low:+.2f} to {over.high:+.2f})"
            yield Goal(f"loss of `masked` one by one {asks}", shown, judge(d.over_seeds) if d.over_seeds else None)
    by_arm = {speed.arm: speed for speed in speeds}
    for other, wanted in (("packed", 1.0), ("unpacked", 1.1)):
        if "masked" in by_arm and other in by_arm:
            ratio = by_arm["masked"].tokens_per_second / by_arm[other].tokens_per_second
            yield Goal(f"scored tokens a second of `masked`: at least {wanted:.1f}x `{other}`", f"{ratio:.2f}x", ratio >= wanted)


def _not_above(over: Interval) -> bool | None:
    """Yes when it is below MARGIN with its upper end, no when it is above 0 with its lower end, else nobody knows."""
    return False if over.above else True if over.high < MARGIN else None
