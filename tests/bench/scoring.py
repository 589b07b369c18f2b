"""How long it takes to score 256 models on 20 000 samples, beside a plain loop over samples and models.

    python tests/bench/scoring.py [--models 256] [--samples 20000] [--times 5]

Not a test: times depend on the machine. Prints, for `oldest_holder` and `champion`, the median of several runs on one
core, the time of a loop in plain Python that comes to the same result, and the ratio. The champion's figures are those of a
window in mid-reign, when every model has met the holder before, and of the very first window.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # one core; before numpy is imported

import numpy as np  # noqa: E402

from sn29.records import Entry  # noqa: E402
from sn29.rules.competition import parse_competition  # noqa: E402
from sn29.rules.oldest_holder import advantage_factor, shuffled  # noqa: E402
from sn29.rules.scoring import Memory, Scored, score  # noqa: E402
from sn29.rules.scoring_fields import Champion, OldestHolder  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK, SEED = 5_000_400, b"bench"


def losses_of(models: int, samples: int, seed: int) -> dict[str, np.ndarray]:
    """Texts of about 1400 nats; models within 1 % of each other in the mean, with 1.5 % of noise per sample."""
    numbers = np.random.default_rng(seed)
    text = np.exp(7.2 + 0.8 * numbers.standard_normal(samples))
    shift = np.random.default_rng(0).uniform(0, 0.01, models)
    return {f"{m:03d}": text * np.exp(shift[m] + 0.015 * numbers.standard_normal(samples)) for m in range(models)}


def plain_oldest_holder(rows: list[list[float]], blocks: list[int], rule: OldestHolder) -> list[int]:
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


def plain_log_ratios(rows: list[list[float]], holder: int) -> list[float]:
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


def median_s(work: Callable[[], Scored], times: int) -> tuple[float, Scored]:
    found, taken = work(), []
    for _ in range(times):
        start = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=256)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    shipped = parse_competition("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
    oldest = shipped.model_copy(update={"scoring": OldestHolder()})
    champion = shipped.model_copy(update={"scoring": Champion()})
    losses = losses_of(given.models, given.samples, 1)
    entries = {hotkey: Entry(f"content {hotkey}", 4_900_000 + 100 * int(hotkey)) for hotkey in losses}
    before = score(champion, losses_of(given.models, given.samples, 2), entries, BLOCK - 360, SEED).memory
    rows = [row.tolist() for row in losses.values()]
    print(f"{given.models} models, {given.samples} samples, one core, numpy {np.__version__}, median of {given.times}")

    seconds, found = median_s(lambda: score(oldest, losses, entries, BLOCK, SEED), given.times)
    start = time.perf_counter()
    wins = plain_oldest_holder(rows, [e.block for e in entries.values()], oldest.scoring)
    plain = time.perf_counter() - start
    same = wins == [s.wins for s in found.scores]
    print(f"oldest_holder          {seconds:8.4f} s   plain loop {plain:7.2f} s   {plain / seconds:6.0f} times   same: {same}")

    for name, memory in (("champion, mid-reign", before), ("champion, first window", Memory.empty())):
        seconds, found = median_s(lambda memory=memory: score(champion, losses, entries, BLOCK, SEED, memory), given.times)
        holder = (memory.holder or found.memory.holder).hotkey
        start = time.perf_counter()
        means = plain_log_ratios(rows, sorted(losses).index(holder))
        plain = time.perf_counter() - start
        fought = [d for d in found.duels if d.num_samples == given.samples and d.holder == holder]
        same = all(abs(d.mean_log_ratio - means[sorted(losses).index(d.challenger)]) < 1e-7 for d in fought)
        print(f"{name:22} {seconds:8.4f} s   plain loop {plain:7.2f} s   {plain / seconds:6.0f} times   same: {same}")


if __name__ == "__main__":
    sys.exit(main())
