"""`sn29 bench eval`: the packed engine beside the plain twin and padded batches, in one process, in turns."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sn29.evaluation.packed import Profile
    from sn29.settings import BenchEvalSettings

Losses = list[float]
Engine = Callable[[], Losses]


@dataclass(frozen=True, slots=True)
class Size:
    """A model of random weights, made from these numbers; nothing is downloaded."""

    family: str
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int

    def config(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.groups,
            "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip


SIZES = {
    "tiny": Size("Llama", 1_000, 64, 192, 2, 4, 2),
    "llama-2k": Size("Llama", 2_048, 128, 384, 4, 4, 4),
    "llama-100k": Size("Llama", 100_277, 384, 1_024, 6, 6, 6),
    "phi3-32k": Size("Phi3", 32_064, 384, 1_024, 6, 6, 6),
    "phi-50k": Size("Phi", 51_200, 384, 1_536, 6, 6, 6),
    "llama-8k": Size("Llama", 8_192, 768, 2_048, 6, 12, 12),
    "1.1b": Size("Llama", 100_277, 2_048, 5_632, 16, 32, 8),
    "phi3-3.8b": Size("Phi3", 32_064, 3_072, 8_192, 32, 32, 32),
    "6.9b": Size("Llama", 100_277, 4_096, 11_008, 30, 32, 32),
}
"""Name -> model. The first six are for a CPU; the largest has 6.89 billion parameters."""

# (kind of device, model, dtype) -> ratio to the plain twin that the issue sets as a goal
GOALS = {
    ("cpu", "llama-100k", "bfloat16"): 3.5,
    ("cpu", "llama-100k", "float32"): 1.4,
    ("cpu", "phi3-32k", "bfloat16"): 2.2,
    ("cpu", "llama-8k", "bfloat16"): 1.25,
    ("cuda", "1.1b", "bfloat16"): 2.5,
    ("cuda", "6.9b", "bfloat16"): 1.4,
}
MEMORY_GOAL = 1 / 30
"""Of memory above the weights, against the plain twin, on a CPU."""
OUTSIDE_GOAL = 0.05
UTILISATION_GOAL = 0.6
"""Of the matrix-product rate of the same run, 6.9b on CUDA."""
PADDED_BATCH = 8


@dataclass(frozen=True, slots=True)
class Goal:
    what: str
    wanted: str
    found: str
    met: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """One engine. Seconds are CPU seconds on a CPU and wall seconds on CUDA, one a repetition."""

    tokens_per_second: float
    """Median."""
    seconds: list[float]
    ratios: list[float]
    """How many times faster than the plain twin, repetition by repetition."""
    peak_bytes: int | None
    """Above the weights, the most of one extra run; None where this machine cannot tell."""
    worst_difference: float
    """Of a sample's loss from the plain twin's, relative."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of the bench found."""

    model: str
    dtype: str
    device: str
    threads: int
    parameters: int
    samples: int
    tokens: int
    times: int
    profile: str
    fill: float
    """Tokens of the samples among those of the packed rows; 0.99 for the 1,500 samples of a window."""
    engines: dict[str, Figures]
    share_outside: float
    """Of the packed engine's wall time, neither in the model's layers nor in its head."""
    matrix_rate: float
    """FLOP/s of a matrix product on this device and these threads, the best of five."""
    utilisation: float
    """Of that rate, by the packed engine: 2 FLOP a parameter and token, and causal attention."""
    ceiling: float
    """Times the plain twin that an engine would reach whose matrix products ran at that rate and all else took no time."""
    goals: list[Goal] = field(default_factory=list)


def bench_eval(words: list[str]) -> int:
    """Exit 0 when every goal that the issue sets for this model, type and device is met, 1 otherwise."""
    from sn29.settings import BenchEvalSettings, read

    settings = read(BenchEvalSettings, words)
    if settings.model not in SIZES:
        raise Rejected(Reason.SETTING, settings.model, ", ".join(SIZES), "--model")
    if settings.dtype not in ("float32", "bfloat16"):
        raise Rejected(Reason.SETTING, settings.dtype, "float32 or bfloat16", "--dtype")
    report = measure(settings)
    print(json.dumps(asdict(report), indent=1) if settings.json_output else "\n".join(_lines(report)))
    return 0 if all(goal.met for goal in report.goals) else 1


def measure(settings: BenchEvalSettings) -> Report:
    """The engines in turns, `settings.times` times after one warm-up, on the same samples and the same weights."""
    import torch

    from sn29.evaluation.packed import profile_for

    device = torch.device(settings.device)
    torch.set_num_threads(settings.threads)
    model = random_model(SIZES[settings.model], getattr(torch, settings.dtype), device)
    samples = lengths_like_fineweb(settings.samples, settings.max_tokens, SIZES[settings.model].vocab)
    profile = profile_for(model, row_tokens=settings.row_tokens)
    inside = _Inside(device)
    engines = _engines(model, samples, profile, inside, settings.threads)
    found = {name: run() for name, run in engines.items()}  # the warm-up, in which the fold is compiled
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    walls = []
    inside.reset()
    for _ in range(settings.times):
        for name, run in engines.items():
            begun, wall = clock(device), time.perf_counter()
            run()
            seconds[name].append(clock(device) - begun)
            if name == "packed":
                walls.append(time.perf_counter() - wall)
    lanes = settings.threads if device.type == "cpu" else 1
    share_outside = max(0.0, 1 - inside.seconds() / (sum(walls) * lanes))
    tokens = sum(map(len, samples))
    figures = {
        name: Figures(
            tokens / statistics.median(taken), taken, [a / b for a, b in zip(seconds["plain"], taken, strict=True)],
            _peak(engines[name], device), _worst(found[name], found["plain"]),
        )
        for name, taken in seconds.items()
    }  # fmt: skip
    rate, flops = _matrix_rate(device, model.dtype, settings.threads), _flops(model, samples)
    utilisation = flops / statistics.median(walls) / rate
    ceiling = statistics.median(seconds["plain"]) / (flops / (rate / lanes))
    report = Report(
        settings.model, settings.dtype, device_name(device), settings.threads, model.num_parameters(), len(samples), tokens,
        settings.times, str(profile), _fill(samples, profile.row_tokens), figures, share_outside, rate, utilisation, ceiling,
    )  # fmt: skip
    report.goals.extend(_goals(report, device.type))
    return report


def lengths_like_fineweb(count: int, most: int, vocab: int) -> list[list[int]]:
    """Samples of random ids: lengths log-normal with median 600 and sigma 0.9, cut at `most`."""
    numbers = random.Random(29)
    lengths = [min(most, max(1, round(600 * math.exp(numbers.gauss(0, 0.9))))) for _ in range(count)]
    return [[numbers.randrange(vocab) for _ in range(length)] for length in lengths]


def random_model(size: Size, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, of weights from seed 29, on the device."""
    import torch
    import transformers

    torch.manual_seed(29)
    config = getattr(transformers, f"{size.family}Config")(**size.config())
    with device:
        model = getattr(transformers, f"{size.family}ForCausalLM")._from_config(config, dtype=dtype, attn_implementation="sdpa")
    found: PreTrainedModel = model.to(device).eval()
    return found


def _engines(
    model: PreTrainedModel, samples: Sequence[Sequence[int]], profile: Profile, inside: _Inside, threads: int
) -> dict[str, Engine]:
    from sn29.evaluation.packed import all_nats_packed

    return {
        "plain": lambda: [_reference_nats(model, ids, 0) for ids in samples],
        "padded": lambda: _padded_nats(model, samples, 0),
        "packed": lambda: all_nats_packed(model, samples, 0, profile=profile, threads=threads, watch=inside),
    }


def _reference_nats(model: PreTrainedModel, ids: Sequence[int], start_token: int) -> float:
    """`engine.sample_nats` as reference validators run it: with the key-value cache, and the sum taken in float32."""
    import torch
    import torch.nn.functional as F

    with torch.inference_mode():
        seen = torch.tensor([[start_token, *ids[:-1]]], device=model.device)
        logits = model(input_ids=seen, use_cache=True).logits[0]
        return float(F.cross_entropy(logits.float(), torch.tensor(ids, device=model.device), reduction="sum"))


def _padded_nats(model: PreTrainedModel, samples: Sequence[Sequence[int]], start_token: int) -> Losses:
    """Batches of eight of similar length, padded on the right, where nothing looks; full logits, one sample's at a time."""
    import torch
    import torch.nn.functional as F

    found = [0.0] * len(samples)
    order = sorted(range(len(samples)), key=lambda n: len(samples[n]))
    with torch.inference_mode():
        for at in range(0, len(order), PADDED_BATCH):
            numbers = order[at : at + PADDED_BATCH]
            longest = len(samples[numbers[-1]])
            rows = [[start_token, *samples[n][:-1]] + [0] * (longest - len(samples[n])) for n in numbers]
            hidden = model.base_model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).last_hidden_state
            for n, states in zip(numbers, hidden, strict=True):
                logits = model.get_output_embeddings()(states[: len(samples[n])])
                asked = torch.tensor(samples[n], device=model.device)
                found[n] = float(F.cross_entropy(logits.float(), asked, reduction="none").double().sum())
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


class _Inside:
    """A watch (see packed.Watch) that adds up the seconds inside the model: events on CUDA, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def reset(self) -> None:
        self._spans.clear()

    @contextlib.contextmanager
    def __call__(self, _: str) -> Iterator[None]:
        begun = self._now()
        try:
            yield
        finally:
            self._spans.append((begun, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> float:
        if not self._cuda:
            return float(sum(stop - start for start, stop in self._spans))
        import torch

        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(stop) for start, stop in self._spans)) / 1000


def clock(device: torch.device) -> float:
    """CPU seconds of this process, so that busy neighbours count less; on CUDA seconds on the wall, work all done."""
    if device.type != "cuda":
        return time.process_time()
    import torch

    torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(run: Engine, device: torch.device) -> int | None:
    """Bytes that one run needs at most beyond what is there before it."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left in the heap is not ours to use again
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _matrix_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of one large product; on a CPU with one thread, times the threads."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(6):
        begun = clock(device)
        for _ in range(4):
            a @ b
        taken.append(clock(device) - begun)
    return 4 * 2 * size**3 / min(taken[1:]) * (1 if device.type == "cuda" else threads)


def _flops(model: PreTrainedModel, samples: Sequence[Sequence[int]]) -> float:
    """Of one evaluation: products with every matrix but the embedding, and attention's lower triangle."""
    config = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - config.vocab_size * config.hidden_size
    triangle = sum(len(ids) ** 2 for ids in samples) / 2
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * triangle
    return float(2.0 * matrices * sum(map(len, samples)) + attention)


def _fill(samples: Sequence[Sequence[int]], row_tokens: int) -> float:
    from sn29.evaluation.packed import pack

    lengths = [len(ids) for ids in samples]
    return sum(lengths) / sum(row.size for row in pack(lengths, row_tokens))


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _worst(found: Losses, expected: Losses) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


# --- goals and table --------------------------------------------------------------------------------------------------


def _goals(report: Report, kind: str) -> Iterator[Goal]:
    packed, plain = report.engines["packed"], report.engines["plain"]
    wanted = GOALS.get((kind, report.model, report.dtype))
    if wanted is not None:
        spread = f"{packed.ratio:.2f}x [{min(packed.ratios):.2f} to {max(packed.ratios):.2f}]"
        yield Goal("tokens per second against the plain twin", f"at least {wanted}x", spread, packed.ratio >= wanted)
        if kind == "cpu" and packed.peak_bytes is not None and plain.peak_bytes:
            share = packed.peak_bytes / plain.peak_bytes
            yield Goal("memory above the weights", "at most 1/30", f"1/{1 / max(share, 1e-9):.0f}", share <= MEMORY_GOAL)
        yield Goal("time outside the model", "under 5%", f"{report.share_outside:.1%}", report.share_outside < OUTSIDE_GOAL)
    if kind == "cuda" and report.model == "6.9b" and report.dtype == "bfloat16":
        found = report.utilisation
        yield Goal("of the matrix-product rate of this run", "at least 60%", f"{found:.0%}", found >= UTILISATION_GOAL)


def _lines(report: Report) -> Iterator[str]:
    yield (
        f"{report.model}  {report.parameters / 1e6:,.0f} M parameters  {report.dtype}  {report.device}  {report.threads} threads"
        f"  {report.samples} samples  {report.tokens:,} tokens  medians of {report.times}"
    )
    yield f"{report.profile}, filled to {report.fill:.1%}"
    unit = "CPU second" if report.device == "cpu" else "second"
    yield f"{'':8} {'tokens per ' + unit:>22} {'times the plain twin':>26} {'peak MB over weights':>22} {'worst sample':>13}"
    for name, f in report.engines.items():
        spread = f"{f.ratio:.2f} [{min(f.ratios):.2f} to {max(f.ratios):.2f}]"
        peak = "unknown" if f.peak_bytes is None else f"{f.peak_bytes / 1e6:,.1f}"
        yield f"{name:8} {f.tokens_per_second:22,.0f} {spread:>26} {peak:>22} {f.worst_difference:13.1e}"
    yield (
        f"packed: {report.share_outside:.1%} of its time outside the model, {report.utilisation:.0%} of the matrix-product rate"
        f" ({report.matrix_rate / 1e9:,.0f} GFLOP/s)"
    )
    yield f"at that rate the matrix products alone allow {report.ceiling:.2f} times the plain twin, whatever the engine"
    for goal in report.goals:
        yield f"{'pass' if goal.met else 'MISS'}  {goal.what}: {goal.found}, goal {goal.wanted}"
    if not report.goals:
        yield "no goal is set for this model, type and device"
