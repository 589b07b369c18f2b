"""`sn29 bench stream`: a model that is read layer by layer, beside plain reading of the same files, in turns."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.bench_eval_command import SIZES, lengths_like_fineweb, random_model
from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from sn29.settings import BenchStreamSettings

GOAL = 0.5
"""Of the disk's speed (or of the device's, whichever binds: then blocks do not wait)."""
NO_WAIT = 0.1


@dataclass(frozen=True, slots=True)
class Streamed:
    """What one run found. Bytes a second; shares."""

    model: str
    dtype: str
    weights_bytes: int
    allowed_bytes: int
    tokens: int
    disk: list[float]
    streamed: list[float]
    waited: list[float]
    share: float
    """Of the disk's speed: median of the repetitions."""
    same: bool
    """Losses are those of the resident model, to the bit."""

    @property
    def met(self) -> bool:
        return self.share >= GOAL or statistics.median(self.waited) <= NO_WAIT


def bench_stream(words: list[str]) -> int:
    """Exit 1 when losses differ from the resident model's, or the goal is missed."""
    from sn29.settings import BenchStreamSettings, read

    settings = read(BenchStreamSettings, words)
    if settings.model not in SIZES:
        raise Rejected(Reason.SETTING, settings.model, ", ".join(SIZES), "--model")
    found = measure(settings)
    print(json.dumps(asdict(found), indent=1) if settings.json_output else "\n".join(_lines(found)))
    return 0 if found.same and found.met else 1


def measure(settings: BenchStreamSettings) -> Streamed:
    """Random weights in a folder of their own, evaluated resident, then in a part of their size."""
    import torch
    import transformers

    from sn29.evaluation import streamed
    from sn29.evaluation.packed import all_nats_packed, profile_for

    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, settings.dtype)
    with tempfile.TemporaryDirectory(prefix="sn29-bench-") as folder:
        model = random_model(SIZES[settings.model], dtype, torch.device("cpu"))
        model.save_pretrained(folder, max_shard_size="2GB")
        (Path(folder) / "generation_config.json").unlink(missing_ok=True)
        samples = lengths_like_fineweb(settings.samples, settings.max_tokens, SIZES[settings.model].vocab)
        model = model.to(settings.device)
        profile = profile_for(model, row_tokens=settings.row_tokens)
        resident = all_nats_packed(model, samples, 0, profile=profile)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        config = streamed.config_of(Path(folder))
        least = streamed.needs(config, dtype, profile, max(map(len, samples))).streamed
        allowed = max(least, int(weights * settings.share))
        del model
        given: dict[str, Any] = {"profile": profile, "memory_bytes": allowed, "dtype": dtype, "device": settings.device}
        with streamed.Streamed(Path(folder), **given) as one:
            same = one.nats(samples, 0) == resident
            rates = streamed.measure(one, samples, 0, settings.times)
    return Streamed(
        settings.model, settings.dtype, weights, allowed, sum(map(len, samples)), [r.disk for r in rates],
        [r.streamed for r in rates], [r.waited for r in rates], statistics.median(r.share for r in rates), same,
    )  # fmt: skip


def _lines(found: Streamed) -> list[str]:
    disk, streamed, waited = (statistics.median(values) for values in (found.disk, found.streamed, found.waited))
    return [
        f"{found.model}  {found.dtype}  weights {found.weights_bytes / 1e6:,.0f} MB in {found.allowed_bytes / 1e6:,.0f} MB"
        f"  {found.tokens:,} tokens  medians of {len(found.disk)}",
        f"plain reading {disk / 1e9:.2f} GB/s, streamed {streamed / 1e9:.2f} GB/s; waiting for weights {waited:.0%} of the time",
        f"{'pass' if found.met else 'MISS'}  share of the disk's speed: {found.share:.0%}, goal at least {GOAL:.0%},"
        f" or at most {NO_WAIT:.0%} of waiting where the device binds",
        f"{'pass' if found.same else 'MISS'}  losses are those of the resident model, to the bit: {found.same}",
    ]
