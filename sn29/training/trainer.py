"""Trains a small causal language model on one machine: documents one a row, never packed; killed at any instant, it goes on.

    documents -> pool, sorted by length -> batches -> hidden states of the real tokens -> nats, gradients -> AdamW -> checkpoint

Every document is scored the way a validator scores it: a start token stands in front, is not scored itself, and every
token after it is. Rows are padded on the right; in a causal model no real position sees what comes after it, so padding
needs no mask, and its hidden states are dropped before the head.

Letters in shapes: B rows, T positions, N real tokens of a batch, D hidden size, V rows of the vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from sn29.errors import Reason, Rejected

Documents = Callable[[int], Iterator[list[int]]]
"""`documents(n)` yields token ids of documents, without start token, from document number n on; the same ones each time."""

FAMILIES = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "PhiForCausalLM": (PhiConfig, PhiForCausalLM),
    "Phi3ForCausalLM": (Phi3Config, Phi3ForCausalLM),
}

_LOGITS_AT_ONCE = 1 << 21
"""Logits alive at one time, as a number of floats: 8 MB, which also fits the second-level caches better than all at once."""


@dataclass(frozen=True)
class Shape:
    """What the model is, apart from its weights."""

    family: str
    """`LlamaForCausalLM`, `PhiForCausalLM` or `Phi3ForCausalLM`."""
    vocab_size: int
    """Rows of the embedding: at least the tokenizer's largest id + 1."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    """Longest text in tokens, start token included, that config.json promises."""
    tied: bool
    """Whether the head uses the embedding's weights."""
    start_token: int
    """Id put in front of every document."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True)
class Recipe:
    """How the model is trained."""

    steps: int
    """Optimizer steps in all."""
    batch_tokens: int
    """Scored tokens of a step: rows are added until there are at least so many."""
    max_tokens: int
    """Tokens kept of a document."""
    learning_rate: float
    """Highest, reached after the warm-up; falls to 0 along half a cosine."""
    warmup_steps: int
    """Steps in which the learning rate rises to its highest."""
    weight_decay: float
    """AdamW's, per step and unit of learning rate, on matrices only."""
    clip: float
    """Largest norm of the gradient of the mean loss, nats per token."""
    seed: int
    """Decides the initial weights and the order of the batches."""
    checkpoint_every: int
    """Steps between two writes of checkpoint and state."""
    pool_documents: int = 512
    """Documents that are sorted by length together."""
    count_documents: int = 0
    """Documents read before training to count tokens; 0: no counting, each token of the vocabulary has its own row."""
    min_count: int = 1
    """Tokens seen fewer times than this among the counted documents share one row: see `Rows`."""


@dataclass(frozen=True)
class Progress:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    loss_per_token: float
    """Mean nats of the step's tokens, before its update."""
    tokens_seen: int
    """Scored tokens since the start of training."""
    seconds: float
    """Wall-clock of this step."""
    learning_rate: float


@dataclass(frozen=True)
class Place:
    """How far the documents are used up."""

    pool: int
    """Number of the first document of the current pool."""
    batches: int
    """Batches of that pool already used."""


@dataclass(frozen=True)
class Batch:
    """Rows of one optimizer step."""

    inputs: Tensor
    """[B, T] rows of the vocabulary: start token, then the document without its last token, then padding."""
    real: Tensor
    """[B, T] bool: positions whose next token is scored."""
    targets: Tensor
    """[N] the next token of each real position, row by row."""


class Rows:
    """Which row of the trained embedding each token uses.

    From 300,000 tokens of text nothing can be learnt about most of a vocabulary of 100,277. Tokens without a row of their own
    share one, so they share one logit, and the softmax over all V tokens needs it once, with its number of tokens m:
    sum_v exp(l_v) = sum_own exp(l_v) + exp(l_shared + ln m). Nothing is approximated: the saved model repeats the shared row
    m times and has the same losses. For 100,277 tokens of which 12,000 have their own row, a step costs a tenth.
    """

    def __init__(self, own: Sequence[int], vocab_size: int) -> None:
        """`own`: the ids that have a row of their own, ascending."""
        shared = vocab_size - len(own)
        self.own = tuple(own)
        self.size = len(own) + (shared > 0)
        """Rows of the trained embedding; the shared one is the last."""
        self.row_of = torch.full((vocab_size,), self.size - 1)
        """[V] the row of each token id."""
        self.row_of[list(own)] = torch.arange(len(own))
        self.log_count = torch.zeros(self.size)
        """[rows] ln of the number of tokens that use the row."""
        if shared:
            self.log_count[-1] = math.log(shared)

    @classmethod
    def counted(cls, documents: Documents, shape: Shape, recipe: Recipe) -> Rows:
        """By the recipe: own rows for the start token and for tokens seen at least `min_count` times."""
        if not recipe.count_documents:
            return cls(range(shape.vocab_size), shape.vocab_size)
        counts: Counter[int] = Counter()
        for document in islice(documents(0), recipe.count_documents):
            counts.update(document)
        own = {token for token, count in counts.items() if count >= recipe.min_count} | {shape.start_token}
        return cls(sorted(own), shape.vocab_size)

    def expand(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with V rows."""
        return {k: v[self.row_of] if _by_token(k) else v for k, v in trained.items()}

    def reduce(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with a row for each own token and, last, the mean of all others."""

        def rows(tensor: Tensor) -> Tensor:
            total = torch.zeros(self.size, *tensor.shape[1:], dtype=torch.float64)
            total.index_add_(0, self.row_of, tensor.double())
            counts = torch.bincount(self.row_of).double()
            return (total.T / counts).T.to(tensor.dtype)

        return {k: rows(v) if _by_token(k) else v for k, v in full.items()}


def _by_token(name: str) -> bool:
    """Whether the weight has one row for each token."""
    return name.startswith(("model.embed_tokens.", "lm_head."))


@dataclass
class Run:
    """A training run in memory: everything that a step reads and changes."""

    model: PreTrainedModel
    """With `rows.size` rows, not V."""
    rows: Rows
    optimizer: torch.optim.AdamW
    step: int
    place: Place
    tokens_seen: int


def build_model(shape: Shape, seed: int) -> PreTrainedModel:
    """A fresh float32 model. Raises Rejected(FAMILY). The caller's random state stays as it was."""
    if shape.family not in FAMILIES:
        raise Rejected(Reason.FAMILY, shape.family, ", ".join(FAMILIES))
    make_config, make_model = FAMILIES[shape.family]
    config = make_config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.init_std,
        bos_token_id=shape.start_token,
        eos_token_id=shape.start_token,
        pad_token_id=None,  # Phi3's default, 32000, would freeze that token's embedding
        use_cache=False,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = make_model(config)
    return model


class _SummedNats(torch.autograd.Function):
    """-sum log softmax(hidden @ weight.T + bias)[target], a few rows at a time.

    The gradients are made in the forward pass, while a chunk's probabilities are at hand: no logits are kept and none are
    computed twice. In one piece, 512 tokens x 100,277 x 4 B would be 205 MB, and the gradient as much again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        """hidden [N, D], weight [V, D], bias [V], targets [N] -> [] float64."""
        nats = torch.zeros((), dtype=torch.float64)
        to_hidden, to_weight, to_bias = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, _LOGITS_AT_ONCE // len(weight))
        for i in range(0, len(hidden), rows):
            part, wanted = hidden[i : i + rows], targets[i : i + rows, None]
            logp = torch.log_softmax(torch.addmm(bias, part, weight.T), dim=1)
            nats -= logp.gather(1, wanted).sum(dtype=torch.float64)
            slope = logp.exp_().scatter_add_(1, wanted, logp.new_full(wanted.shape, -1.0))  # d nats / d logits
            to_hidden[i : i + rows] = slope @ weight
            to_weight.addmm_(slope.T, part)
            to_bias += slope.sum(0)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        return to_hidden * grads[0], to_weight * grads[0], to_bias * grads[0], None


def summed_nats(model: PreTrainedModel, batch: Batch, log_count: Tensor | None = None) -> Tensor:
    """Total nats of the batch's targets, [] float64. `log_count` [V]: ln of the tokens behind each row, 0 when None."""
    hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state[batch.real]
    head = model.lm_head
    offset = torch.zeros(len(head.weight)) if log_count is None else log_count
    offset = offset.to(head.weight.dtype)
    bias = offset if head.bias is None else head.bias + offset
    nats: Tensor = _SummedNats.apply(hidden, head.weight, bias, batch.targets)
    return nats + offset[batch.targets].sum(dtype=torch.float64)  # one token of a row has 1/m of its probability


def make_batch(documents: Sequence[Tensor], start: int) -> Batch:
    """One document a row, padded on the right to the longest. `documents`: non-empty [tokens] int64; `start`: the start row."""
    shape = (len(documents), max(map(len, documents)))
    inputs, real = torch.full(shape, start), torch.zeros(shape, dtype=torch.bool)
    for row, document in enumerate(documents):
        inputs[row, 1 : len(document)] = document[:-1]
        real[row, : len(document)] = True
    return Batch(inputs, real, torch.cat(list(documents)))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 0 .. steps - 1: a straight rise over the warm-up, then half a cosine down to 0 after the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2


def batches(documents: Documents, recipe: Recipe, rows: Rows, start_token: int, place: Place) -> Iterator[tuple[Place, Batch]]:
    """Batches from `place` on, each with the place after it. Ends with the documents."""
    stream, first, skip = documents(place.pool), place.pool, place.batches
    start = int(rows.row_of[start_token])
    while pool := list(islice(stream, recipe.pool_documents)):
        cut = [rows.row_of[torch.tensor(document[: recipe.max_tokens])] for document in pool if document]
        for number, members in enumerate(_groups(cut, recipe, first)):
            if number >= skip:
                yield Place(first, number + 1), make_batch(members, start)
        first, skip = first + len(pool), 0


def _groups(pool: list[Tensor], recipe: Recipe, first: int) -> list[list[Tensor]]:
    """The pool's documents in groups of like length, each of at least `batch_tokens` (but the last), in a shuffled order."""
    groups: list[list[Tensor]] = [[]]
    tokens = 0
    for document in sorted(pool, key=len):
        if tokens >= recipe.batch_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(document)
        tokens += len(document)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + first))
    return [groups[i] for i in order if groups[i]]


def train(
    folder: Path,
    shape: Shape,
    documents: Documents,
    recipe: Recipe,
    report: Callable[[Progress], None],
    start: Path | None = None,
) -> Path:
    """Train, or go on where a killed run with the same shape and recipe was, and return `folder/checkpoint`.

    `folder` then holds `checkpoint/` (config.json, generation_config.json, model.safetensors: what a miner uploads), `state.pt`
    (what a resumed run needs) and `curve.jsonl` (step, loss in nats per token, tokens). `start`: a checkpoint folder of the same
    shape to begin from instead of fresh weights. Uses as many threads as torch is set to.

    Raises Rejected: SETTING when `folder` belongs to another shape or recipe, or the documents run out; NOT_FINITE when the loss
    diverges; TENSORS when `start` has other tensors than the shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _resume(folder, shape, recipe) or _begin(shape, documents, recipe, start)
    with _open_curve(folder / "curve.jsonl", run.step) as curve:
        stream = batches(documents, recipe, run.rows, shape.start_token, run.place)
        while run.step < recipe.steps:
            place, batch = next(stream, (None, None))
            if place is None or batch is None:
                raise Rejected(Reason.SETTING, f"documents for {run.step} steps", f"enough for {recipe.steps}", "training")
            progress = _take_step(run, recipe, batch)
            run.place = place
            line = {"step": run.step, "loss": progress.loss_per_token, "tokens": run.tokens_seen}
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            report(progress)
            if run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps:
                _save(folder, run, shape, recipe)
    return folder / "checkpoint"


def _take_step(run: Run, recipe: Recipe, batch: Batch) -> Progress:
    began = time.perf_counter()
    rate = learning_rate(recipe, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad()
    loss = summed_nats(run.model, batch, run.rows.log_count) / len(batch.targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip)
    if not math.isfinite(loss.item()):
        raise Rejected(Reason.NOT_FINITE, f"loss {loss.item()} in step {run.step + 1}", "a finite loss", "training")
    run.optimizer.step()
    run.step += 1
    run.tokens_seen += len(batch.targets)
    return Progress(run.step, loss.item(), run.tokens_seen, time.perf_counter() - began, rate)


def _begin(shape: Shape, documents: Documents, recipe: Recipe, start: Path | None) -> Run:
    rows = Rows.counted(documents, shape, recipe)
    model = _small_model(shape, rows, recipe.seed)
    if start is not None:
        full = build_model(shape, recipe.seed)
        try:
            load_model(full, start / "model.safetensors")
        except RuntimeError as error:
            raise Rejected(Reason.TENSORS, str(error), f"the tensors of {shape}", str(start)) from error
        model.load_state_dict(rows.reduce(full.state_dict()))
    return Run(model, rows, _optimizer(model, recipe), 0, Place(0, 0), 0)


def _small_model(shape: Shape, rows: Rows, seed: int) -> PreTrainedModel:
    """The model that is trained: as `shape`, but with only `rows.size` rows of vocabulary."""
    small = replace(shape, vocab_size=rows.size, start_token=int(rows.row_of[shape.start_token]))
    return build_model(small, seed).train()


def _optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def _save(folder: Path, run: Run, shape: Shape, recipe: Recipe) -> None:
    """Write checkpoint, then state; each appears whole or not at all."""
    full = build_model(shape, recipe.seed)
    full.load_state_dict(run.rows.expand(run.model.state_dict()))
    new, old, final = (folder / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint"))
    shutil.rmtree(new, ignore_errors=True)
    full.save_pretrained(new)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    state = {
        "made_for": _made_for(shape, recipe),
        "own": list(run.rows.own),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "place": asdict(run.place),
        "tokens_seen": run.tokens_seen,
    }
    with open(folder / "state.new", "wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(folder / "state.new", folder / "state.pt")


def _resume(folder: Path, shape: Shape, recipe: Recipe) -> Run | None:
    """The run that was saved last in this folder; None when none was."""
    if not (folder / "state.pt").exists():
        return None
    state = torch.load(folder / "state.pt", weights_only=True)
    if state["made_for"] != _made_for(shape, recipe):
        raise Rejected(Reason.SETTING, f"a run of {state['made_for']}", _made_for(shape, recipe), str(folder))
    rows = Rows(state["own"], shape.vocab_size)
    model = _small_model(shape, rows, recipe.seed)
    model.load_state_dict(state["model"])
    optimizer = _optimizer(model, recipe)
    optimizer.load_state_dict(state["optimizer"])
    return Run(model, rows, optimizer, state["step"], Place(**state["place"]), state["tokens_seen"])


def _made_for(shape: Shape, recipe: Recipe) -> str:
    """What a state may be resumed with; how often it is written may change."""
    return json.dumps({"shape": asdict(shape), "recipe": asdict(replace(recipe, checkpoint_every=0))}, sort_keys=True)


def _open_curve(path: Path, step: int) -> Any:
    """The curve, open for appending, without lines after `step` (they were written after the last state, or only in part)."""
    lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() else []
    path.with_suffix(".new").write_text("".join(lines))
    path.with_suffix(".new").replace(path)
    return open(path, "a")
