"""What stopping hopeless challengers saves and what it costs, played with fixed seeds: `sn29 simulate sequential`.

Every run is played twice on the same numbers, once measured in full and once with `rules.sequential`, by the rule of a
competition file (`rules.scoring.score`, with its memory from window to window). A window has `samples` new texts of lognormal
length, at 2.35 nats a token; a challenger's loss on a text is the holder's times exp(gap + sd * z), z a number of its own for
each text: standard normal, or of Student's t with 3 degrees of freedom, scaled to the same variance (heavy tails). The holder
is 30 days old, so that only the floor of its advantage is left. A season ends when the crown changes hands, or after `windows`.

What is counted. `stopped`: samples of the first window after which the challenger was stopped, median of those that were.
`wrongly`: runs in which it took the crown when it was measured in full and was stopped in a window before that or in it.
`other`: runs whose season ended otherwise than in full: another winner, or another window. `saved`: part of the challenger's
samples of all windows that were not measured; seasons that ended at different windows are compared up to the earlier end.
Left out: that a challenger which cannot win any more rests (`rules.selection.out_of_reach`), which saves more in both.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from sn29.errors import Reason, Rejected
from sn29.records import Entry
from sn29.rules.competition import Competition
from sn29.rules.scoring import Memory, score
from sn29.rules.scoring_fields import Champion
from sn29.rules.sequential import bar_of, hopeless, portions

START_BLOCK = 5_000_400
HOLDER_BLOCK = START_BLOCK - 30 * 7200
WINDOW_BLOCKS = 360
HOLDER = "holder"
MAX_MEDIAN = 128
"""Goal: samples after which a hopeless challenger is decided, in the median."""
HOPELESS = 0.01
"""Who is worse by this much or more is called hopeless in the goal."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Challenger:
    """How its losses arise from the holder's."""

    gap: float
    """Mean of ln(its loss / the holder's): negative is better."""
    sd: float = 0.015
    heavy: bool = False
    """Student's t instead of the normal distribution."""

    def __str__(self) -> str:
        return f"{self.sd:.1%}{' t3' if self.heavy else ''}"


GAPS = (0.05, 0.01, 0.005, 0.0, -0.0015, -0.003, -0.01)
NOISES = ((0.005, False), (0.015, False), (0.015, True), (0.03, False))
"""(standard deviation, heavy tails). Measured: 0.1 to 1.6 % between a model and one trained on from it, else 3 % and more."""
MIXED = tuple(Challenger(gap) for gap in (0.01, 0.005, 0.003, 0.002, 0.02, 0.05, 0.01, -0.003))
"""A round of six pool models, of which one is the holder, and three new challengers, two of them hopeless."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it is played."""

    runs: int
    windows: int
    samples: int
    seed: int

    def __post_init__(self) -> None:
        for flag, value in (("runs", self.runs), ("windows", self.windows), ("samples", self.samples)):
            if value < 1:
                raise Rejected(Reason.SETTING, value, "at least 1", f"--{flag}")


@dataclass(frozen=True, slots=True)
class Season:
    """One run, measured in one way."""

    measured: tuple[Mapping[str, int], ...]
    """Window by window: samples of each challenger."""
    winner: str
    """Who took the crown in the last of them; empty: nobody."""


def play(competition: Competition, challengers: Sequence[Challenger], plan: Plan, run: int) -> Season:
    """A season by the competition's rule: with its `stop_error_rate`, which may be 0."""
    rule = competition.scoring
    assert isinstance(rule, Champion)
    names = [f"challenger{n}" for n in range(len(challengers))]
    entries = {HOLDER: Entry("held", HOLDER_BLOCK), **{n: Entry(f"of {n}", START_BLOCK - 360 + i) for i, n in enumerate(names)}}
    alone = score(competition, {HOLDER: [1.0] * 16}, {HOLDER: entries[HOLDER]}, START_BLOCK - WINDOW_BLOCKS, b"first")
    memory, measured = alone.memory, []
    for window in range(plan.windows):
        block = START_BLOCK + window * WINDOW_BLOCKS
        losses = _losses(challengers, plan, run, window)
        table: dict[str, Sequence[float]] = {HOLDER: losses[0].tolist()}
        for name, row in zip(names, losses[1:], strict=True):
            table[name] = row[: _measured(rule, memory, entries, block, name, row, losses[0])].tolist()
        seed = hashlib.sha256(f"{plan.seed}:{block}".encode()).digest()
        found = score(competition, table, entries, block, seed, memory)
        measured.append({name: len(table[name]) for name in names})
        memory = found.memory
        if memory.holder is not None and memory.holder.hotkey != HOLDER:
            return Season(tuple(measured), memory.holder.hotkey)
    return Season(tuple(measured), "")


def _measured(
    rule: Champion, memory: Memory, entries: Mapping[str, Entry], block: int, name: str, row: Numbers, holder: Numbers
) -> int:
    """Samples of a challenger that are measured, portion by portion."""
    bar, total = bar_of(rule, memory, entries, block), len(holder)
    if bar is None:
        return total
    return next((n for n in portions(total) if hopeless(bar, name, row[:n], holder)), total)  # type: ignore[arg-type]


def _losses(challengers: Sequence[Challenger], plan: Plan, run: int, window: int) -> list[Numbers]:
    """The holder's nats, then each challenger's."""
    numbers = np.random.default_rng([plan.seed, zlib.crc32(repr(challengers).encode()), run, window])
    tokens = np.minimum(600 * np.exp(0.8 * numbers.standard_normal(plan.samples)), 4096)
    holder = 2.35 * tokens
    found = [holder]
    for c in challengers:
        z = numbers.standard_t(3, plan.samples) / math.sqrt(3) if c.heavy else numbers.standard_normal(plan.samples)
        found.append(holder * np.exp(c.gap + c.sd * z))
    return found


# ---- many runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One challenger over all runs."""

    challenger: Challenger
    stopped: float
    """Runs in which it was stopped in the first window, 0..1."""
    median: float | None
    """Samples until then; None: never."""
    wins: float
    """Runs in which it took the crown when measured in full."""
    wrongly: float
    """Of all runs: those in which it took the crown in full and was stopped up to then."""
    other: float
    """Runs whose season ended otherwise."""
    saved: float
    """Part of its samples that was not measured."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """A round of many models, over all runs; the holder's samples are counted too."""

    first: float
    """Part of the samples of the first window that was not measured."""
    season: float
    """The same for all windows."""
    other: float
    """Runs whose season ended otherwise."""


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that a simulation found."""

    plan: Plan
    error_rate: float
    rows: tuple[Row, ...]
    mixed: Mixed
    goals: tuple[tuple[str, str, bool], ...]
    """(what, found, met)."""


def simulate(competition: Competition, plan: Plan, advance: Callable[[int, int], None] = lambda done, of: None) -> Result:
    """All challengers and the mixed round. Raises Rejected(SETTING) for a competition that stops nobody."""
    rule = competition.scoring
    if not isinstance(rule, Champion) or rule.stop_error_rate == 0:
        raise Rejected(Reason.SETTING, f"rule {rule.rule}", "rule champion with a stop_error_rate above 0", "--competition")
    full = competition.model_copy(update={"scoring": rule.model_copy(update={"stop_error_rate": 0.0})})
    cast = [Challenger(gap, sd, heavy) for sd, heavy in NOISES for gap in GAPS]
    rows = []
    for done, one in enumerate(cast):
        advance(done, len(cast) + 1)
        pairs = [(play(full, [one], plan, run), play(competition, [one], plan, run)) for run in range(plan.runs)]
        rows.append(_row(one, pairs, plan))
    advance(len(cast), len(cast) + 1)
    pairs = [(play(full, MIXED, plan, run), play(competition, MIXED, plan, run)) for run in range(plan.runs)]
    return Result(plan, rule.stop_error_rate, tuple(rows), _mixed(pairs, plan), _goals(rows, rule.stop_error_rate))


def _row(one: Challenger, pairs: Sequence[tuple[Season, Season]], plan: Plan) -> Row:
    name, runs = "challenger0", len(pairs)
    first = [short.measured[0][name] for _, short in pairs]
    stopped = [count for count in first if count < plan.samples]
    wrongly = [full.winner and min(m[name] for m in short.measured[: len(full.measured)]) < plan.samples for full, short in pairs]
    return Row(
        one, len(stopped) / runs, statistics.median(stopped) if stopped else None, sum(bool(f.winner) for f, _ in pairs) / runs,
        sum(map(bool, wrongly)) / runs, _other(pairs), _saved(pairs, plan, 0, None),
    )  # fmt: skip


def _other(pairs: Sequence[tuple[Season, Season]]) -> float:
    return sum((f.winner, len(f.measured)) != (s.winner, len(s.measured)) for f, s in pairs) / len(pairs)


def _saved(pairs: Sequence[tuple[Season, Season]], plan: Plan, holders: int, windows: int | None) -> float:
    """Part of the samples that was not measured, of windows that both played; `holders` are measured in full besides."""
    spent = planned = 0
    for full, short in pairs:
        for a, b in list(zip(full.measured, short.measured, strict=False))[:windows]:
            planned += sum(a.values()) + holders * plan.samples
            spent += sum(b.values()) + holders * plan.samples
    return 1 - spent / planned


def _mixed(pairs: Sequence[tuple[Season, Season]], plan: Plan) -> Mixed:
    return Mixed(_saved(pairs, plan, 1, 1), _saved(pairs, plan, 1, None), _other(pairs))


def _goals(rows: Sequence[Row], error_rate: float) -> tuple[tuple[str, str, bool], ...]:
    plain = [r for r in rows if r.challenger.gap >= HOPELESS and r.challenger.sd <= 0.015]
    medians = [r.median if r.median is not None and r.stopped > 0.5 else math.inf for r in plain]
    worst = max(r.wrongly for r in rows)
    other = max(r.other for r in rows)
    return (
        (f"who is worse by {HOPELESS:.0%} or more (sd up to 1.5%) is decided after {MAX_MEDIAN} samples in the median",
         f"at most {max(medians):,.0f}", max(medians) <= MAX_MEDIAN),
        (f"who takes the crown in full is stopped before in at most {error_rate:.1%} of the runs",
         f"at most {worst:.1%}", worst <= error_rate),
        (f"at most {error_rate:.1%} of the seasons end otherwise than in full", f"at most {other:.1%}", other <= error_rate),
    )  # fmt: skip


# ---- in words --------------------------------------------------------------------------------------------------------


def tables(result: Result) -> tuple[Table, ...]:
    plan, mixed = result.plan, result.mixed
    table = Table(
        "better by", "sd", "stopped", "after", "wins in full", "wrongly stopped", "ends otherwise", "saved", box=box.SIMPLE,
        title=f"{plan.runs} runs, up to {plan.windows} windows of {plan.samples:,} samples, error rate {result.error_rate:g}",
    )  # fmt: skip
    for r in result.rows:
        after = "-" if r.median is None else f"{r.median:,.0f}"
        shares = (f"{x:.1%}" for x in (r.wins, r.wrongly, r.other, r.saved))
        table.add_row(f"{0 - r.challenger.gap:+.2%}", str(r.challenger), f"{r.stopped:.0%}", after, *shares)
    goals = Table("goal", "found", "", box=box.SIMPLE)
    for what, found, met in result.goals:
        goals.add_row(what, found, "pass" if met else "MISS")
    gaps = ", ".join(f"{-c.gap:+.1%}" for c in MIXED)
    said = f"{mixed.first:.0%} of the first window, {mixed.season:.0%} of all, {mixed.other:.1%} end otherwise"
    goals.add_row(f"samples saved in a round of the holder and models better by {gaps}", said, "")
    return table, goals


def as_json(result: Result) -> str:
    """Everything, as one JSON object."""
    return json.dumps(asdict(result), indent=1)
