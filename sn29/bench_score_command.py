"""`sn29 bench score`: how long it takes to score many models on many samples, beside a plain loop over both."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sn29.records import Entry
from sn29.rules.competition import Competition
from sn29.rules.oldest_holder import advantage_factor, shuffled
from sn29.rules.scoring import Memory, Scored, score
from sn29.rules.scoring_fields import Champion, OldestHolder

if TYPE_CHECKING:
    from sn29.settings import BenchScoreSettings

T = TypeVar("T")
BLOCK, SEED = 5_000_400, b"bench"


@dataclass(frozen=True, slots=True)
class Timed:
    """One rule, timed."""

    rule: str
    seconds: float
    """Wall time of one window's scores, one core: median."""
    ratios: list[float]
    """How many times faster than the plain loop, repetition by repetition."""
    same: bool
    """Both came to the same result."""


def bench_score(words: list[str]) -> int:
    """Exit 1 when a fast path and its plain loop disagree."""
    from sn29.settings import BenchScoreSettings, read

    settings = read(BenchScoreSettings, words)
    found = list(measure(settings))
    if settings.json_output:
        print(json.dumps([asdict(timed) for timed in found], indent=1))
    else:
        print(
            f"{settings.models} models, {settings.samples} samples, one core, numpy {np.__version__}, {platform.machine()},"
            f" medians of {settings.times}"
        )
        for t in found:
            spread = f"{statistics.median(t.ratios):.0f} [{min(t.ratios):.0f} to {max(t.ratios):.0f}]"
            print(f"{t.rule:24} {t.seconds:8.4f} s   {spread:>18} times a plain loop   {'same result' if t.same else 'DIFFERS'}")
    return 0 if all(timed.same for timed in found) else 1


def measure(settings: BenchScoreSettings) -> Iterator[Timed]:
    """`oldest_holder`, then `champion` in mid-reign, when every model has met the holder before, and in a first window."""
    oldest, champion = _competition(OldestHolder()), _competition(Champion())
    losses = losses_of(settings.models, settings.samples, 1)
    entries = {hotkey: Entry(f"content {hotkey}", 4_900_000 + 100 * int(hotkey)) for hotkey in losses}
    before = score(champion, losses_of(settings.models, settings.samples, 2), entries, BLOCK - 360, SEED).memory
    rows = [row.tolist() for row in losses.values()]
    blocks, rule = [e.block for e in entries.values()], oldest.scoring
    assert isinstance(rule, OldestHolder)
    found, wins, timed = _turns(
        lambda: score(oldest, losses, entries, BLOCK, SEED), lambda: _plain_oldest_holder(rows, blocks, rule), settings.times
    )
    yield Timed("oldest_holder", *timed, wins == [s.wins for s in found.scores])
    for name, memory in (("champion, mid-reign", before), ("champion, first window", Memory.empty())):
        holder = (memory.holder or score(champion, losses, entries, BLOCK, SEED, memory).memory.holder).hotkey  # type: ignore[union-attr]
        found, means, timed = _turns(
            lambda memory=memory: score(champion, losses, entries, BLOCK, SEED, memory),  # type: ignore[misc]
            lambda holder=holder: _plain_log_ratios(rows, sorted(losses).index(holder)),  # type: ignore[misc]
            settings.times,
        )
        fought = [d for d in found.duels if d.num_samples == settings.samples and d.holder == holder]
        same = all(abs(d.mean_log_ratio - means[sorted(losses).index(d.challenger)]) < 1e-7 for d in fought)
        yield Timed(name, *timed, same)


def _competition(rule: OldestHolder | Champion) -> Competition:
    """What scoring reads of a competition is its rule."""
    return Competition.model_construct(name="bench", scoring=rule)


def losses_of(models: int, samples: int, seed: int) -> dict[str, Any]:
    """Hotkey -> losses [samples] of about 1,400 nats; models within 1% of each other, with 1.5% of noise per sample."""
    numbers = np.random.default_rng(seed)
    text = np.exp(7.2 + 0.8 * numbers.standard_normal(samples))
    shift = np.random.default_rng(0).uniform(0, 0.01, models)
    return {f"{m:03d}": text * np.exp(shift[m] + 0.015 * numbers.standard_normal(samples)) for m in range(models)}


def _turns(ours: Callable[[], Scored], plain: Callable[[], T], times: int) -> tuple[Scored, T, tuple[float, list[float]]]:
    """Both in turns after one warm-up; (median seconds of ours, ratios)."""
    found, expected = ours(), plain()
    seconds, ratios = [], []
    for _ in range(times):
        begun = time.perf_counter()
        ours()
        between = time.perf_counter()
        plain()
        seconds.append(between - begun)
        ratios.append((time.perf_counter() - between) / seconds[-1])
    return found, expected, (statistics.median(seconds), ratios)


def _plain_oldest_holder(rows: list[list[float]], blocks: list[int], rule: OldestHolder) -> list[int]:
    """Wins, in the plainest way. Rows are in claim order."""
    factors = [advantage_factor(BLOCK - block, rule.advantage) for block in blocks]
    order = shuffled(len(rows[0]), SEED)
    wins = [0] * len(rows)
    for at in range(0, len(order) - len(order) % rule.group, rule.group):
        holder, bar = None, math.inf
        for m, row in enumerate(rows):
            loss = 0.0
            for place in order[at : at + rule.group]:
                loss += row[place]
            if loss < bar:
                holder, bar = m, loss * factors[m]
        if holder is not None:
            wins[holder] += 1
    return wins


def _plain_log_ratios(rows: list[list[float]], holder: int) -> list[float]:
    """Mean log ratio of every model to the holder, in the plainest way: the heart of the champion's rule, without its
    search for near copies."""
    against = rows[holder]
    means = []
    for row in rows:
        total = squares = 0.0
        for mine, other in zip(row, against, strict=True):
            x = min(max(math.log(mine / other), -0.25), 0.25)
            total += x
            squares += x * x
        means.append(total / len(row))
    return means
