"""Trains a small causal language model: documents one a row, never packed; killed at any instant, it goes on.

    documents -> pool, sorted by length -> batches -> hidden states of real tokens -> nats, gradients -> AdamW -> checkpoint

Every document is scored the way a validator scores it: a start token stands in front, is not scored itself, and every
token after it is. Rows are padded on the right; in a causal model no real position sees what comes after it, so padding
needs no mask, and its hidden states are dropped before the head.

Letters in shapes: B rows of a batch, T positions, N real tokens, D hidden size, V ids of the vocabulary, R trained rows of
the embedding (see `Rows`; R <= V).
"""

from __future__ import annotations

import hashlib
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
from typing import Any, TextIO

import torch
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
from transformers.utils import logging as transformers_logging

from sn29.errors import Reason, Rejected
from sn29.models import checkpoint

Documents = Callable[[int], Iterator[list[int]]]
"""`documents(n)`: token ids of documents, without start token, from document number n on; the same ones each time."""

FAMILIES = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "PhiForCausalLM": (PhiConfig, PhiForCausalLM),
    "Phi3ForCausalLM": (Phi3Config, Phi3ForCausalLM),
}

_WITHOUT_EFFECT = {
    "architectures", "bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings",
    "original_max_position_embeddings", "transformers_version", "_name_or_path",
}  # fmt: skip
"""Fields of a config in which the model to start from may differ: none of them changes a loss."""

_LOGITS_AT_ONCE = 1 << 21
"""Floats of logits alive at one time: 8 MB."""


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
    init_std: float = 0.1
    """Standard deviation of the initial weights. At hidden size 64, 250 steps with 0.02 end 10 % higher."""


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
    count_documents: int = 2000
    """Documents read before training to count tokens; 0: no counting, each token of the vocabulary has its own row."""
    min_count: int = 8
    """Tokens seen fewer times than this in the counted documents share one row: see `Rows`."""


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

    From a few hundred thousand tokens of text nothing can be learnt about most of a vocabulary of 100,277. Tokens without a
    row of their own share one; they have the same logit then, and the softmax over all V tokens needs it once, with their
    number m:  sum_v exp(l_v) = sum_own exp(l_v) + exp(l_shared + ln m).  Nothing is approximated: the saved model repeats
    the shared row m times and has the same losses. At hidden size 64, a step of 270 tokens takes 30 ms with 5,400 rows
    and 380 ms with 100,277.
    """

    def __init__(self, own: Sequence[int], vocab_size: int) -> None:
        """`own`: the ids that have a row of their own, ascending."""
        shared = vocab_size - len(own)
        self.own = tuple(own)
        self.size = len(own) + (shared > 0)
        """R; the shared row is the last."""
        self.row_of = torch.full((vocab_size,), self.size - 1)
        """[V] the row of each token id."""
        self.row_of[list(own)] = torch.arange(len(own))
        self.log_count = torch.zeros(self.size)
        """[R] ln of the number of tokens that use the row."""
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

    @classmethod
    def found(cls, full: dict[str, Tensor]) -> Rows:
        """Of a trained model: the tokens whose rows are equal go on sharing one, all others keep their own."""
        table = torch.cat([v.reshape(len(v), -1) for k, v in full.items() if _by_token(k)], dim=1)
        digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in table]
        ((common, count),) = Counter(digests).most_common(1)
        return cls([i for i, digest in enumerate(digests) if count == 1 or digest != common], len(digests))

    def expand(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with R rows -> with V rows."""
        return {k: v[self.row_of] if _by_token(k) else v for k, v in trained.items()}

    def reduce(self, full: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with V rows, equal where they are shared -> with R rows."""
        token_of = {row: token for token, row in enumerate(self.row_of.tolist())}
        some = torch.tensor([token_of[row] for row in range(self.size)])
        return {k: v[some] if _by_token(k) else v for k, v in full.items()}


def _by_token(name: str) -> bool:
    """Whether the weight has one row for each token."""
    return name.startswith(("model.embed_tokens.", "lm_head."))


@dataclass
class Run:
    """A training run in memory: everything that a step reads and changes."""

    model: PreTrainedModel
    """With R rows of vocabulary."""
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
    """-sum log softmax(hidden @ weight.T + bias)[target], a few tokens at a time.

    The gradients are made in the forward pass, while the probabilities are at hand: no logits are kept and none are
    computed twice. All at once, 512 tokens x 100,277 x 4 B would be 205 MB, and the gradient as much again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        """hidden [N, D], weight [R, D], bias [R], targets [N] -> [] float64."""
        nats = torch.zeros((), dtype=torch.float64)
        to_hidden, to_weight, to_bias = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        step = max(1, _LOGITS_AT_ONCE // len(weight))
        for i in range(0, len(hidden), step):
            part, wanted = hidden[i : i + step], targets[i : i + step, None]
            logp = torch.log_softmax(torch.addmm(bias, part, weight.T), dim=1)
            nats -= logp.gather(1, wanted).sum(dtype=torch.float64)
            slope = logp.exp_().scatter_add_(1, wanted, logp.new_full(wanted.shape, -1.0))  # d nats / d logits
            to_hidden[i : i + step] = slope @ weight
            to_weight.addmm_(slope.T, part)
            to_bias += slope.sum(0)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        return to_hidden * grads[0], to_weight * grads[0], to_bias * grads[0], None


def summed_nats(model: PreTrainedModel, batch: Batch, log_count: Tensor) -> Tensor:
    """Total nats of the batch's targets, [] float64. `log_count` [R]: ln of the number of tokens behind each row."""
    hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state[batch.real]  # [N, D]
    head = model.lm_head
    log_count = log_count.to(hidden.dtype)
    bias = log_count if head.bias is None else head.bias + log_count
    nats: Tensor = _SummedNats.apply(hidden, head.weight, bias, batch.targets)  # type: ignore[no-untyped-call]
    # That is the cost of naming the row; which of its m tokens it was costs ln m more.
    return nats + log_count[batch.targets].sum(dtype=torch.float64)


def make_batch(documents: Sequence[Tensor], start: int) -> Batch:
    """One document a row, padded on the right. `documents`: rows of their tokens, not empty; `start`: the start token's."""
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
    """The documents in groups of like length, each of at least `batch_tokens` (but the last), in a shuffled order."""
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

    `folder` then holds `checkpoint/` (config.json, generation_config.json, model.safetensors: what a miner uploads),
    `state.pt` (what a resumed run needs) and `curve.jsonl` (step, loss in nats per token, tokens seen). `start`: a
    checkpoint folder of the same shape to begin from instead of fresh weights; the recipe's counting is not used then.
    Runs on as many threads as torch is set to.

    Raises Rejected: SETTING when `folder` holds a run of another shape or recipe, or the documents run out; NOT_FINITE
    when the loss diverges; what `checkpoint.load` raises, or BAD_CONFIG, when `start` is not usable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _resume(folder, shape, recipe) or _begin(shape, documents, recipe, start)
    with _open_curve(folder / "curve.jsonl", run.step) as curve:
        stream = batches(documents, recipe, run.rows, shape.start_token, run.place)
        while run.step < recipe.steps:
            upcoming = next(stream, None)
            if upcoming is None:
                raise Rejected(Reason.SETTING, f"text for {run.step} steps", f"text for {recipe.steps} steps", "training")
            run.place, batch = upcoming
            progress = _take_step(run, recipe, batch)
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
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip)
    if not math.isfinite(loss.item()):
        raise Rejected(Reason.NOT_FINITE, f"loss {loss.item()} in step {run.step + 1}", "a finite loss", "training")
    run.optimizer.step()
    run.step += 1
    run.tokens_seen += len(batch.targets)
    return Progress(run.step, loss.item(), run.tokens_seen, time.perf_counter() - began, rate)


def _begin(shape: Shape, documents: Documents, recipe: Recipe, start: Path | None) -> Run:
    trained = None if start is None else _weights(start, shape)
    rows = Rows.counted(documents, shape, recipe) if trained is None else Rows.found(trained)
    model = _small_model(shape, rows, recipe.seed)
    if trained is not None:
        model.load_state_dict(rows.reduce(trained))
    return Run(model, rows, _optimizer(model, recipe), 0, Place(0, 0), 0)


def _weights(folder: Path, shape: Shape) -> dict[str, Tensor]:
    """The weights of a checkpoint that computes what a model of this shape computes, in float32."""
    model = checkpoint.load(folder, dtype=torch.float32)
    ours, theirs = build_model(shape, seed=0).config.to_dict(), model.config.to_dict()
    for key in sorted(ours.keys() - _WITHOUT_EFFECT):
        if ours[key] != theirs.get(key):
            raise Rejected(Reason.BAD_CONFIG, f"{key} {theirs.get(key)}", f"{key} {ours[key]}", str(folder))
    weights: dict[str, Tensor] = model.state_dict()
    return weights


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
    transformers_logging.disable_progress_bar()  # a bar for each write of one small file
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


def _open_curve(path: Path, step: int) -> TextIO:
    """The curve, open for appending. Lines after `step` go: they are of steps that are done again, or half written."""
    lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() else []
    path.with_suffix(".new").write_text("".join(lines))
    path.with_suffix(".new").replace(path)
    return open(path, "a")
