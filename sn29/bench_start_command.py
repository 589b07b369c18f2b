"""`sn29 bench start`: how soon a model's first loss is there, beside a new interpreter that only imports the libraries."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.bench_eval_command import SIZES, random_model
from sn29.errors import Reason, Rejected
from sn29.records import Loss, Sample

if TYPE_CHECKING:
    from sn29.evaluation.profile import Profile
    from sn29.evaluation.worker import Job
    from sn29.settings import BenchStartSettings

GOAL_S = 1.0
"""Seconds beyond reading the weights."""


@dataclass(frozen=True, slots=True)
class Started:
    """What one run found; seconds on the wall."""

    model: str
    weights_bytes: int
    first_loss_s: list[float]
    """From the job to its first loss: fork, confinement, tokenising, hashing begun, loading, probes, one short text."""
    reading_s: list[float]
    """Plain reading of the weights' file."""
    row_s: list[float]
    """One row through the model, which the first loss takes."""
    imports_s: list[float]
    """A new interpreter imports what a child needs, and ends."""

    @property
    def beyond_s(self) -> float:
        return statistics.median(self.first_loss_s) - statistics.median(self.reading_s) - statistics.median(self.row_s)


def bench_start(words: list[str]) -> int:
    """Exit 1 when the goal is missed."""
    from sn29.settings import BenchStartSettings, read

    settings = read(BenchStartSettings, words)
    if settings.model not in SIZES:
        raise Rejected(Reason.SETTING, settings.model, ", ".join(SIZES), "--model")
    found = asyncio.run(measure(settings))
    if settings.json_output:
        print(json.dumps(asdict(found), indent=1))
    else:
        medians = map(statistics.median, (found.first_loss_s, found.reading_s, found.row_s, found.imports_s))
        first, reading, row, imports = medians
        print(f"{found.model}  weights {found.weights_bytes / 1e6:,.0f} MB  medians of {len(found.first_loss_s)}")
        print(f"first loss after {first:.2f} s, of it plain reading {reading:.2f} s and one row through the model {row:.2f} s")
        print(f"a new interpreter needs {imports:.2f} s to import the libraries")
        met = "pass" if found.beyond_s <= GOAL_S else "MISS"
        print(f"{met}  beyond reading and the row: {found.beyond_s:.2f} s, goal at most {GOAL_S:.0f} s")
    return 0 if found.beyond_s <= GOAL_S else 1


async def measure(settings: BenchStartSettings) -> Started:
    """In turns, after one start that warms up."""
    import torch
    import transformers

    from sn29.evaluation.forkserver import LIBRARIES, environment
    from sn29.evaluation.packed import all_nats_packed
    from sn29.evaluation.worker import BASE_BYTES, Here
    from sn29.localnet.vocabulary import bytes_alone

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="sn29-bench-") as place:
        folder = Path(place)
        model = random_model(SIZES[settings.model], torch.bfloat16, torch.device("cpu"))
        model.save_pretrained(folder / "model")
        (folder / "model" / "generation_config.json").unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(bytes_alone()))
        weights = folder / "model" / "model.safetensors"
        firsts, readings, rows, imports = [], [], [], []
        async with Here(folder / "work") as here:
            chosen = await here.choose(SIZES[settings.model].vocab, device="cpu", dtype="bfloat16")
            job = _job(folder, chosen.profile)
            torch.set_num_threads(1)
            for _ in range(settings.times + 1):
                heard: list[float] = []
                begun = time.perf_counter()

                def decide(_: tuple[Loss, ...], heard: list[float] = heard) -> bool:
                    heard.append(time.perf_counter())
                    return False

                await here.evaluate(job, deadline_s=600, memory_bytes=BASE_BYTES + 12 * weights.stat().st_size, decide=decide)
                firsts.append(heard[0] - begun)
                begun = time.perf_counter()
                weights.read_bytes()
                readings.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                all_nats_packed(model, [[1]], 0, profile=chosen.profile)
                rows.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                program = f"import {', '.join(LIBRARIES)}"
                subprocess.run([sys.executable, "-c", program], check=True, env=environment(str(folder)), cwd=folder)
                imports.append(time.perf_counter() - begun)
        return Started(settings.model, weights.stat().st_size, firsts[1:], readings[1:], rows[1:], imports[1:])


def _job(folder: Path, profile: Profile) -> Job:
    from sn29.evaluation.worker import Job

    samples = (Sample("0" * 32, "a"), Sample("1" * 32, "b"))
    return Job(
        checkpoint=str(folder / "model"), tokenizer=str(folder / "tokenizer.json"), start_token=0, max_tokens=64,
        dtype="bfloat16", device="cpu", threads=1, profile=profile, samples=samples, portions=(1,),
    )  # fmt: skip
