"""Trains a causal language model from documents; killed at any instant, it goes on to the same curve.

    documents of a shard -> rows (packing) -> groups -> nats of scored tokens (objective) -> gradients -> optimizer -> checkpoint

A step takes `accumulation` groups of each shard of the data. Its loss is the mean over the scored tokens of all of them, so
one process with two shards and two processes with one each do the same (tests/training/test_parallel.py: to 1e-5). Many
processes share weights, gradients and optimizer state by FSDP2: see sn29/training/parallel.py.

`folder` of a run holds

    checkpoint/    config.json, generation_config.json, model.safetensors: what a miner uploads
    state.pt       all that a resumed run needs: weights, optimizer, place in the data, random state
    curve.jsonl    step, loss in nats per token, tokens seen
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TextIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sn29.errors import Reason, Rejected, Sn29Error
from sn29.models import checkpoint
from sn29.training import parallel
from sn29.training.feed import Documents as Documents
from sn29.training.feed import Feed, Open, Portions
from sn29.training.objective import Objective, make_batch, require_isolation
from sn29.training.optimizers import Optimizer, kind_of
from sn29.training.packing import Packing, Row
from sn29.training.parallel import World
from sn29.training.shape import FAMILIES as FAMILIES
from sn29.training.shape import Shape as Shape
from sn29.training.shape import build_model as build_model
from sn29.training.shape import shape_of as shape_of
from sn29.training.shape import training_flops, with_vocabulary
from sn29.training.shared_rows import Rows as Rows

_WITHOUT_EFFECT = {
    "architectures", "bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings",
    "original_max_position_embeddings", "transformers_version", "_name_or_path",
}  # fmt: skip
"""Fields of a config in which the model to start from may differ: none of them changes a loss."""


@dataclass(frozen=True)
class Recipe:
    """How the model is trained."""

    steps: int
    """Optimizer steps in all."""
    batch_tokens: int
    """Scored tokens of a step, over all shards and groups, as near as whole rows come to it."""
    max_tokens: int
    """Tokens kept of a document; 0: all."""
    learning_rate: float
    """Highest, reached after the warm-up."""
    warmup_steps: int
    """Steps in which the learning rate rises to its highest."""
    weight_decay: float
    """Per step and unit of learning rate, on matrices only."""
    clip: float
    """Largest norm of the gradient of the mean loss, nats per token; 0: not clipped."""
    seed: int
    """Decides the initial weights and the order of the groups."""
    checkpoint_every: int
    """Steps between two writes of checkpoint and state."""
    packing: Packing
    """How documents become rows."""
    optimizer: str = "adamw"
    """A name of `optimizers.KINDS`."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: half a cosine down to 0, or stable and then a straight fall to 0."""
    decay_share: float = 0.2
    """Of wsd: the share of all steps in which it falls."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products; weights, optimizer and sums are float32."""
    accumulation: int = 1
    """Groups of a shard that are added up for one step: each is one forward and backward pass."""
    shards: int = 1
    """Parts that the data is read in, each packed on its own; a multiple of the processes."""
    activation_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of being kept: less memory, a third more work."""
    compile: bool = False
    """Layers through torch.compile."""
    pool_documents: int = 512
    """Documents of a shard that are packed, or sorted by length, together."""
    count_documents: int = 2000
    """Documents read before training to count tokens; 0: no counting, each token of the vocabulary has its own row."""
    min_count: int = 8
    """Tokens seen fewer times than this in the counted documents share one row: see `Rows`."""


_MAY_CHANGE = {"checkpoint_every": 0, "activation_checkpointing": False, "compile": False}
"""What may differ when a run is resumed."""


@dataclass(frozen=True)
class Progress:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    steps: int
    """Of the recipe."""
    loss_per_token: float
    """Mean nats of the step's tokens, before its update."""
    tokens_seen: int
    """Scored tokens since the start of training."""
    tokens: int
    """Of them in this step."""
    seconds: float
    """Wall-clock of this step, from the end of the one before: reading and packing included."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    flops: float
    """Floating-point operations of the step, without padding and recomputation: see `training_flops`."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Run:
    """A training run in memory: everything that a step reads and changes."""

    objective: Objective
    """Around the model with R rows of vocabulary."""
    rows: Rows
    optimizer: Optimizer
    feeds: list[Feed]
    """Of this process's shards."""
    world: World
    step: int = 0
    tokens_seen: int = 0


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 0 .. steps - 1: a straight rise over the warm-up, then by the schedule down to 0 after the last step.

    cosine: half a cosine. wsd: the highest rate until the last `decay_share` of the steps, then a straight fall (Hägele et al.
    2024).
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "wsd":
        falling = max(1, round(recipe.decay_share * recipe.steps))
        return recipe.learning_rate * min(1.0, (recipe.steps - step) / falling)
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def never() -> bool:
    return False


def train(
    folder: Path,
    shape: Shape,
    open_documents: Open,
    recipe: Recipe,
    report: Callable[[Progress], None],
    start: Path | None = None,
    *,
    until: int = 0,
    asked_to_stop: Callable[[], bool] = never,
    saved: Callable[[int], None] = lambda step: None,
    beside: Mapping[str, Path] = MappingProxyType({}),
    world: World | None = None,
) -> Path:
    """Train, or go on where a killed run with the same shape and recipe was, and return `folder/checkpoint`.

    `start`: a checkpoint folder of the same shape to begin from instead of fresh weights; the recipe's counting is not used
    then. `until`: end after so many steps of the recipe, with checkpoint and state; 0: all. `asked_to_stop` is looked at
    after each step; `saved` is told after each checkpoint (first process only, as `report`). `beside`: by name, files that a copy
    of lies in every checkpoint. Every process of a `world` calls this with the same arguments; the folder must be one that all
    of them see. Runs on as many threads as torch is set to.

    Raises Rejected: SETTING when `folder` holds a run of another shape or recipe, the recipe does not fit the world, or the
    documents run out; NOT_FINITE when the loss diverges, with the last checkpoint left as it was; what `checkpoint.load`
    raises, or BAD_CONFIG, when `start` is not usable; FAMILY for a class that cannot be packed exactly.
    """
    world = world or World()
    check_world(recipe, world)
    folder.mkdir(parents=True, exist_ok=True)
    with _random_state(recipe, world):
        run = _opened(folder, shape, open_documents, recipe, start, world)
        goal = min(recipe.steps, until or recipe.steps)
        with _open_curve(folder / "curve.jsonl", run) as curve, _Ahead(run, recipe, goal) as ahead:
            begun, over = time.perf_counter(), False
            while run.step < goal and not over:
                progress, over = _take_step(run, recipe, ahead, asked_to_stop, begun)
                begun += progress.seconds
                if world.is_first:
                    line = {"step": run.step, "loss": progress.loss_per_token, "tokens": run.tokens_seen}
                    curve.write(json.dumps(line) + "\n")
                    curve.flush()
                    report(progress)
                if over or run.step % recipe.checkpoint_every == 0 or run.step == goal:
                    _save(folder, run, shape, recipe, ahead.states, beside)
                    if world.is_first:
                        saved(run.step)
    return folder / "checkpoint"


def check_world(recipe: Recipe, world: World) -> None:
    """Raises Rejected(SETTING) where these processes cannot run it."""
    if recipe.shards % world.processes:
        got = f"{world.processes} processes for {recipe.shards} shards of data"
        raise Rejected(Reason.SETTING, got, "shards are a multiple of the processes", "training")
    if world.processes > 1 and not kind_of(recipe.optimizer).is_sharded:
        got = f"{recipe.optimizer} in {world.processes} processes"
        raise Rejected(Reason.SETTING, got, f"one process, or {', '.join(_sharded())}", "optimizer")


def _sharded() -> list[str]:
    from sn29.training.optimizers import KINDS

    return [name for name, kind in KINDS.items() if kind.is_sharded]


@contextmanager
def _random_state(recipe: Recipe, world: World) -> Iterator[None]:
    """Dropout's numbers, where a config asks for it, are the run's own; the caller's state stays as it was."""
    device = torch.device(world.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed + 7_919 * world.rank)
        yield


# --- a step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Taken:
    """What this process puts into one step."""

    groups: list[list[Row]]
    states: dict[int, dict[str, Any]]
    """By shard, after these groups."""


class _Ahead:
    """The groups of the steps; on a GPU those of the next step are read and packed while this one is computed."""

    def __init__(self, run: Run, recipe: Recipe, goal: int) -> None:
        """`goal`: the last step's number, after which nothing is read."""
        self._run, self._recipe, self._goal = run, recipe, goal
        self._pool = ThreadPoolExecutor(1) if run.world.device.startswith("cuda") else None
        self._next: Future[_Taken | None] | None = None
        self.states: dict[int, dict[str, Any]] = {}
        """By shard: the place in the data after the last step."""

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self) -> list[list[Row]] | None:
        """`accumulation` groups of each shard of this process; None where a shard has no more."""
        found = self._take() if self._next is None else self._next.result()
        if self._pool is not None and self._run.step + 1 < self._goal:
            self._next = self._pool.submit(self._take)
        if found is None:
            return None
        self.states = found.states
        return found.groups

    def _take(self) -> _Taken | None:
        feeds, shards = self._run.feeds, self._run.world.shards(self._recipe.shards)
        try:
            groups = [feed.take() for feed in feeds for _ in range(self._recipe.accumulation)]
        except StopIteration:
            return None
        return _Taken(groups, {shard: feed.state_dict() for shard, feed in zip(shards, feeds, strict=True)})


def _take_step(run: Run, recipe: Recipe, ahead: _Ahead, asked_to_stop: Callable[[], bool], begun: float) -> tuple[Progress, bool]:
    """One step, and whether any process was asked to stop."""
    world, groups, failed = run.world, None, None
    try:
        groups = ahead.take()
    except Sn29Error as error:
        failed = error
    batches = [make_batch(group, world.device) for group in groups or []]
    mine = [sum(batch.useful for batch in batches), groups is None, asked_to_stop(), failed is not None]
    tokens, ended, over, failures = world.summed(mine)
    if failures:
        world.agree(failed)
    if ended:
        raise Rejected(Reason.SETTING, f"text for {run.step} steps", f"text for {recipe.steps} steps", "training")
    rate = learning_rate(recipe, run.step)
    run.optimizer.set_rate(rate)
    run.optimizer.zero_grad()
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    kind = torch.device(world.device).type
    for batch in batches:
        with torch.autocast(kind, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            found = run.objective(batch)
        # FSDP takes the mean of the processes' gradients
        (found * (world.processes / tokens)).backward()
        nats += found.detach()
    norm = _clipped_norm(run, recipe)
    flops = sum(training_flops(run.objective.model, group) for group in groups or [])
    nats_sum, flops_sum = world.summed([nats.item(), flops])
    loss = nats_sum / tokens
    if not math.isfinite(loss) or not math.isfinite(norm):
        got = f"loss {loss} and gradient norm {norm} in step {run.step + 1}"
        raise Rejected(Reason.NOT_FINITE, got, "a finite loss and gradient", "training")
    run.optimizer.step()
    run.step += 1
    run.tokens_seen += int(tokens)
    seconds = time.perf_counter() - begun
    return Progress(run.step, recipe.steps, loss, run.tokens_seen, int(tokens), seconds, rate, norm, flops_sum), bool(over)


def _clipped_norm(run: Run, recipe: Recipe) -> float:
    """The norm of the gradient, which is then not longer than `clip`."""
    norm = torch.nn.utils.clip_grad_norm_(run.objective.parameters(), recipe.clip or math.inf)
    return float(parallel.whole(norm))


# --- beginning, saving, going on --------------------------------------------------------------------------------------


def mend(folder: Path) -> None:
    """A folder whose run was killed between two renames gets its checkpoint back. For one process, before any looks there."""
    old, final = folder / "checkpoint.old", folder / "checkpoint"
    if old.exists() and not final.exists():
        old.rename(final)


def _opened(folder: Path, shape: Shape, open_documents: Open, recipe: Recipe, start: Path | None, world: World) -> Run:
    """The run that was saved last in this folder, else a new one.

    All find the same, before anything is done together that would wait for ever for a process that does something else.
    """
    if world.is_first:
        mend(folder)
    state: dict[str, Any] | None = None
    if (folder / "state.pt").exists():  # processes of a host share the file's pages: with AdamW it holds 12 bytes a parameter
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu", mmap=world.processes > 1)
    steps = world.gathered(0 if state is None else state["step"])
    if len(set(steps)) > 1:
        got = f"a run of {min(steps)} and of {max(steps)} steps in {folder}, by process"
        raise Rejected(Reason.SETTING, got, "one folder that all processes see", "training")
    if state is None:
        return world.together(lambda: _begin(shape, open_documents, recipe, start, world))
    return world.together(lambda: _resume(state, str(folder), shape, open_documents, recipe, world))


def _begin(shape: Shape, open_documents: Open, recipe: Recipe, start: Path | None, world: World) -> Run:
    trained = None if start is None else _weights(start, shape)
    first = recipe.packing.start_token
    always = {recipe.packing.end_token, shape.start_token, shape.start_token if first is None else first}
    if trained is not None:
        rows = Rows.found(trained, always)
    elif recipe.count_documents:
        counted = islice(iter(open_documents(0, 1).__next__, None), recipe.count_documents)
        rows = Rows.counted(counted, shape.vocab_size, recipe.min_count, always)
    else:
        rows = Rows.all_own(shape.vocab_size)
    model = _small_model(shape, rows, recipe.seed)
    if trained is not None:
        model.load_state_dict(rows.reduce(trained))
    return _running(model, rows, open_documents, recipe, world)


def _weights(folder: Path, shape: Shape) -> dict[str, Tensor]:
    """The weights of a checkpoint that computes what a model of this shape computes, in float32."""
    model = checkpoint.load(folder, dtype=torch.float32)
    ours, theirs = build_model(shape, seed=0, device="meta").config.to_dict(), model.config.to_dict()
    for key in sorted(ours.keys() - _WITHOUT_EFFECT):
        if ours[key] != theirs.get(key):
            raise Rejected(Reason.BAD_CONFIG, f"{key} {theirs.get(key)}", f"{key} {ours[key]}", str(folder))
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def _small_model(shape: Shape, rows: Rows, seed: int) -> PreTrainedModel:
    """The model that is trained: as `shape`, but with only `rows.size` rows of vocabulary."""
    small = with_vocabulary(shape, rows.size, rows.of([shape.start_token])[0])
    return build_model(small, seed).train()


def _running(model: PreTrainedModel, rows: Rows, open_documents: Open, recipe: Recipe, world: World) -> Run:
    """Everything around a model with its weights. Every process holds all weights on the CPU until here."""
    if world.processes == 1:  # tried with the device's own kernels; what is going to be sharded may not fit there whole
        model.to(world.device)
    require_isolation(model, getattr(torch, recipe.dtype))
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = Objective(model, rows.log_count if rows.is_shared else None)
    if recipe.compile:
        for layer in model.base_model.layers:
            layer.compile(dynamic=True)
    if world.processes > 1:
        parallel.shard(objective, world, bfloat16=recipe.dtype == "bfloat16")
    objective.to(world.device)
    optimizer = Optimizer(recipe.optimizer, objective.named_parameters(), recipe.learning_rate, recipe.weight_decay)
    group = -(-recipe.batch_tokens // (recipe.shards * recipe.accumulation))
    portions = Portions(recipe.packing, group, recipe.max_tokens, recipe.pool_documents, recipe.seed)
    feeds = [Feed(open_documents(number, recipe.shards), number, portions, rows) for number in world.shards(recipe.shards)]
    return Run(objective, rows, optimizer, feeds, world)


def _whole_state(run: Run) -> tuple[dict[str, Tensor], Any]:
    """(the model's weights by their names, the optimizer's state), whole and on the CPU in the first process."""
    if not run.optimizer.kind.is_sharded:
        weights = {name.removeprefix("model."): value for name, value in run.objective.state_dict().items()}
        return weights, [part.state_dict() for part in run.optimizer.parts]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named, optimizer = get_state_dict(run.objective, run.optimizer.parts, options=options)
    return {name.removeprefix("model."): value for name, value in named.items() if isinstance(value, Tensor)}, optimizer


def _save(
    folder: Path, run: Run, shape: Shape, recipe: Recipe, places: dict[int, dict[str, Any]], beside: Mapping[str, Path]
) -> None:
    """Write checkpoint, then state; each appears whole or not at all. Every process takes part, the first one writes."""
    weights, optimizer = _whole_state(run)
    everywhere = run.world.gathered((places, _random_states(run.world)))

    def write() -> None:
        if run.world.is_first:
            _write(folder, run, shape, recipe, everywhere, (weights, optimizer), beside)

    run.world.together(write)  # it is written when any of them goes on


def _random_states(world: World) -> list[Tensor]:
    """The CPU's, and that of this process's GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(world.device)] if world.device.startswith("cuda") else [])]


def _write(
    folder: Path,
    run: Run,
    shape: Shape,
    recipe: Recipe,
    everywhere: Sequence[tuple[dict[int, dict[str, Any]], list[Tensor]]],
    state: tuple[dict[str, Tensor], Any],
    beside: Mapping[str, Path],
) -> None:
    weights, optimizer = state
    bad = [name for name, value in weights.items() if not all(map(math.isfinite, torch.aminmax(value)))]
    if bad:
        raise Rejected(Reason.NOT_FINITE, f"NaN or infinity in {bad[0]} after step {run.step}", "finite weights", "training")
    _write_checkpoint(folder, run, shape, weights, beside)
    whole = {
        "made_for": _made_for(shape, recipe),
        "own": list(run.rows.own),
        "model": weights,
        "optimizer": optimizer,
        "step": run.step,
        "places": {number: place for held, _ in everywhere for number, place in held.items()},
        "random": [random for _, random in everywhere],
        "tokens_seen": run.tokens_seen,
    }
    with open(folder / "state.new", "wb") as out:
        torch.save(whole, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(folder / "state.new", folder / "state.pt")


def _write_checkpoint(folder: Path, run: Run, shape: Shape, weights: dict[str, Tensor], beside: Mapping[str, Path]) -> None:
    full = {name: value.contiguous() for name, value in run.rows.expand(weights).items()}
    if shape.tied:
        full.pop("lm_head.weight", None)
    new, old, final = (folder / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint"))
    shutil.rmtree(new, ignore_errors=True)
    transformers_logging.disable_progress_bar()  # a bar for each write of one small file
    build_model(shape, 0, device="meta").save_pretrained(new, state_dict=full)
    for name, path in beside.items():
        shutil.copyfile(path, new / name)
    for path in new.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _resume(state: dict[str, Any], where: str, shape: Shape, open_documents: Open, recipe: Recipe, world: World) -> Run:
    _require_same(json.loads(state["made_for"]), json.loads(_made_for(shape, recipe)), where)
    rows = Rows(state["own"], shape.vocab_size)
    model = _small_model(shape, rows, recipe.seed)
    model.load_state_dict(state["model"])
    run = _running(model, rows, open_documents, recipe, world)
    _load_optimizer(run, state)
    for number, feed in zip(world.shards(recipe.shards), run.feeds, strict=True):
        feed.load_state_dict(state["places"][number])
    run.step, run.tokens_seen = state["step"], state["tokens_seen"]
    if len(state["random"]) == world.processes:
        cpu, *cuda = state["random"][world.rank]
        torch.set_rng_state(cpu)
        if cuda and world.device.startswith("cuda"):
            torch.cuda.set_rng_state(cuda[0], world.device)
    return run


def _load_optimizer(run: Run, state: dict[str, Any]) -> None:
    if not run.optimizer.kind.is_sharded:
        for part, held in zip(run.optimizer.parts, state["optimizer"], strict=True):
            part.load_state_dict(held)
        return
    named = {f"model.{name}": value for name, value in state["model"].items()}
    set_state_dict(
        run.objective,
        run.optimizer.parts,
        model_state_dict=named,
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True, cpu_offload=True),
    )
    for part in run.optimizer.parts:
        for held in part.state.values():  # numbers of steps are taken as they are, and would keep the file's pages in use
            held.update({name: value.clone() for name, value in held.items() if isinstance(value, Tensor) and not value.dim()})


def _made_for(shape: Shape, recipe: Recipe) -> str:
    """What a state may be resumed with."""
    return json.dumps({"shape": asdict(shape), "recipe": asdict(replace(recipe, **_MAY_CHANGE))}, sort_keys=True)  # type: ignore[arg-type]


def _require_same(held: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Raises Rejected(SETTING) with the first field that differs."""
    for name in sorted(held.keys() | asked.keys()):
        was, now = held.get(name), asked.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            _require_same(was, now, where)
        elif was != now:
            raise Rejected(Reason.SETTING, f"{name} {now}", f"{name} {was}, with which the run was begun", where)


@contextmanager
def _open_curve(path: Path, run: Run) -> Iterator[TextIO]:
    """The curve, open for appending. Lines after the run's step go: they are of steps that are done again, or half written."""
    if not run.world.is_first:
        with open(os.devnull, "w") as nowhere:
            yield nowhere
        return
    lines = path.read_text().splitlines(keepends=True)[: run.step] if path.exists() else []
    path.with_suffix(".new").write_text("".join(lines))
    path.with_suffix(".new").replace(path)
    with open(path, "a") as curve:
        yield curve
