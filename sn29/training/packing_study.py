"""The packing study's runs: one model, the same documents, packed in several ways, read in several ways.

    documents of a seed -> pools -> rows of an arm (packing.py) -> batches -> steps -> held-out documents, one by one and packed

A run is one model trained by one arm from one seed. The seed decides the initial weights and the order of the documents, and
both are the same for all arms. Kinds of runs:

    tokens      every arm until it has scored `plan.tokens` tokens
    compute     arms that take fewer or more FLOP a scored token than `packed`, until they have used as many FLOP as `packed` does
                for `plan.tokens`
    continued   from the end of the seed's `packed` run, 5 % more tokens in another way: what the subnet's seed did
    half, double    the three modes of the first seed with half and twice the learning rate: is it as good for one as for another?

What stands together in a step matters too. `unpacked` rows are put together by length, or half of the work would be padding; rows
of the other arms are mixed. `unpacked-mixed` has the rows of `unpacked` mixed: it differs from `masked` in the padding alone.

FLOP of a step (forward and backward; counted, so that the machine's load changes nothing): 6 P t + 6 V D s + 12 L D a, where
P are the weights of the layers' matrices, t the tokens that go through the layers (padding too), s those that are scored, and a
the pairs of a token and what it may look at. The optimizer is left out: the same for all.

A run is interruptible: every SAVE_SECONDS its state is kept whole, and it goes on from there with the same numbers to the bit;
it is finished when NAME.json is there.

Letters in shapes: B rows, T positions, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sn29.errors import Reason, Rejected
from sn29.training.feed import grouped
from sn29.training.objective import Batch, Objective, make_batch, require_isolation
from sn29.training.packing import Mode, Packing, Row, rows
from sn29.training.shape import Shape, build_model

SAVE_SECONDS = 30.0
"""Wall-clock between two writes of a run's state: what a kill costs at most."""
WARMUP = 0.02
"""Share of a run's tokens in which the learning rate rises; a continued run, which is short, takes a tenth."""
WEIGHT_DECAY = 0.1
CLIP = 1.0
"""Largest norm of the gradient of the mean loss."""
SAME_COMPUTE = 0.005
"""An arm whose FLOP a scored token are this near to `packed`'s needs no second run for equal compute."""
CURVE_POINTS = 8
CURVE_DOCUMENTS = 64
"""How often in a run, and on how many held-out documents, the curve of the held-out loss is taken."""
STEP_TOKENS = 16_384
"""Scored tokens of a step that go through the model together, about."""
FORWARD_TOKENS = 8192
"""Tokens that are evaluated together, padding included."""
_BARREN_POOLS = 20
"""Pools without a row, one after the other, after which the text is given up."""
_HEAD_FLOATS = 1 << 20
"""Logits alive at one time in an evaluation: 4 MB."""

# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to make rows of documents."""

    name: str
    mode: Mode
    start: bool
    """Whether an end-of-text token stands in front of every document, so that its first token is scored."""
    mask_first: bool
    says: str
    by_length: bool = False
    """Whether a step has rows of like length; else they are mixed."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("packed", Mode.PACKED, False, False, "joined with EOS, cut at N, every token scored"),
        Arm("unpacked", Mode.UNPACKED, False, False, "one document a row, like lengths in a step, first token not scored", True),
        Arm("masked", Mode.PACKED_MASKED, False, False, "packed, state and positions reset, first token not scored"),
        Arm("unpacked+start", Mode.UNPACKED, True, False, "as unpacked, EOS in front, first token scored", True),
        Arm("masked+start", Mode.PACKED_MASKED, True, False, "as masked, EOS in front, first token scored"),
        Arm("packed-first", Mode.PACKED, False, True, "as packed, the first token after EOS not scored, no reset"),
        Arm("unpacked-mixed", Mode.UNPACKED, False, False, "as unpacked, all lengths in a step"),
    )
}
REFERENCE = "packed"
"""The arm that says how much equal compute is, and from which continued runs go on."""
MODES = ("packed", "unpacked", "masked")
RATES = {"half": 0.5, "double": 2.0}
"""Kinds of runs of MODES with another learning rate, as a share of the plan's."""
CONTINUED = ("packed", "unpacked", "masked", "unpacked+start", "masked+start")
"""Arms in which the packed run is continued."""


TERMS = ("packed-first", "unpacked-mixed")
COMPARED = tuple(name for name in ARMS if name not in TERMS)
"""Arms that are trained with equal compute too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the numbers depend on, apart from the text. A study's folder holds runs of one plan."""

    size: str
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    tied: bool
    init_std: float
    tokens: int
    """Scored tokens of a run."""
    batch_tokens: int
    """Scored tokens of a step, as near as whole rows come to it."""
    row_tokens: int
    """N. Documents are cut to N - 1 tokens before anything else, in training and evaluation, so that all arms have the same."""
    learning_rate: float
    """Highest; rises and falls by the tokens that are done: see `rate_at`."""
    device: str
    """`cpu` or `cuda`."""
    bfloat16: bool
    """Whether products are taken in bfloat16 (autocast); weights stay float32."""
    end_token: int = 0
    pool_documents: int = 512
    """Documents that are packed, or sorted by length, together."""
    continue_share: float = 0.05
    """Tokens of a continued run, as a share of `tokens`."""
    continue_rate: float = 0.1
    """Highest learning rate of a continued run, as a share of the first one's."""


SIZES = {
    "tiny": Plan("tiny", 2, 64, 172, 4, 2048, False, 0.1, 2_000_000, 2048, 512, 8e-3, "cpu", False),
    "small": Plan("small", 4, 128, 344, 4, 2048, False, 0.05, 2_000_000, 2048, 512, 4e-3, "cpu", False),
    "medium": Plan(
        "medium", 30, 576, 1536, 9, 32768, True, 0.02, 300_000_000, 131_072, 4096, 1e-3, "cuda", True, pool_documents=8192
    ),
}
"""0.36 million, 1.3 million and 138 million parameters. Rate of `tiny`: of `unpacked` (seed 0) 0.004 ends at 3.667 nats a token,
0.008 at 3.541, 0.016 at 3.652."""


@dataclass(frozen=True, slots=True)
class Run:
    """One model to train."""

    kind: str
    """`tokens`, `compute`, `continued`, `half` or `double`."""
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        prefix = {"tokens": "", "compute": "equal-compute-", "continued": f"{REFERENCE}-then-"}
        return f"{prefix.get(self.kind, self.kind + '-rate-')}{self.arm}-seed{self.seed}"

    @property
    def after(self) -> Run | None:
        """The run whose model this one continues."""
        return Run("tokens", REFERENCE, self.seed) if self.kind == "continued" else None


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents as token ids, one behind the other; may be a file that is mapped into memory."""

    flat: np.ndarray[Any, np.dtype[Any]]
    ends: np.ndarray[Any, np.dtype[np.int64]]
    """[documents] where each ends in `flat`."""

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, number: int, most: int) -> list[int]:
        """At most so many of its first tokens."""
        start = int(self.ends[number - 1]) if number else 0
        found: list[int] = self.flat[start : min(int(self.ends[number]), start + most)].tolist()
        return found


@dataclass(frozen=True, eq=False)
class Texts:
    """The study's documents."""

    training: Tokens
    held_out: Tokens

    def held(self, plan: Plan) -> list[list[int]]:
        """The held-out documents, cut as a competition cuts its samples."""
        return [self.held_out.document(n, plan.row_tokens - 1) for n in range(len(self.held_out))]


def runs_of(plan: Plan, texts: Texts, seeds: Sequence[int]) -> list[Run]:
    """All runs, seed by seed: a study that is stopped has whole seeds. Which arms need a run for equal compute is counted."""
    needs = [name for name in COMPARED if abs(compute_tokens(plan, name, texts) / plan.tokens - 1) > SAME_COMPUTE]
    found = []
    for seed in seeds:
        found += [Run("tokens", name, seed) for name in ARMS]
        found += [Run("continued", name, seed) for name in CONTINUED]
        found += [Run("compute", name, seed) for name in needs]
        if seed == seeds[0]:
            found += [Run(kind, name, seed) for kind in RATES for name in MODES]
    return found


def parameters(plan: Plan) -> int:
    """Of the model, embedding and head included.

    >>> parameters(SIZES["tiny"])
    361280
    """
    tables = plan.vocabulary * plan.hidden * (1 if plan.tied else 2)
    return tables + layer_weights(plan) + (2 * plan.layers + 1) * plan.hidden


def layer_weights(plan: Plan) -> int:
    """P: weights of the layers' matrices, 4 D D + 3 D I each."""
    return plan.layers * plan.hidden * (4 * plan.hidden + 3 * plan.inner)


# --- rows and batches -------------------------------------------------------------------------------------------------


def packing_of(plan: Plan, arm: Arm) -> Packing:
    """End-of-text is a target in all modes: they score the same tokens, apart from the first ones."""
    return Packing(
        mode=arm.mode,
        row_tokens=plan.row_tokens,
        end_token=plan.end_token,
        start_token=plan.end_token if arm.start else None,
        score_end=True,
        context=0,
        mask_first=arm.mask_first,
    )


def pools(tokens: Tokens, plan: Plan, seed: int, first: int = 0) -> Iterator[list[list[int]]]:
    """The seed's documents for ever, `pool_documents` at a time, from pool number `first` on: the same for all arms.

    Each pass over the documents has an order of its own; a pool may hold the end of one pass and the beginning of the next.
    """
    orders: dict[int, list[int]] = {}
    for pool in count(first):
        made = []
        for number in range(pool * plan.pool_documents, (pool + 1) * plan.pool_documents):
            turn, place = divmod(number, len(tokens))
            if turn not in orders:
                orders.clear()
                orders[turn] = np.random.default_rng([seed, turn]).permutation(len(tokens)).tolist()
            made.append(tokens.document(orders[turn][place], plan.row_tokens - 1))
        yield made


def batches(tokens: Tokens, plan: Plan, arm: Arm, seed: int, first: int = 0) -> Iterator[tuple[int, list[Row]]]:
    """(number of its pool, the rows of a step) for ever: a pool's rows, divided evenly, in an order drawn from the seed."""
    carry: tuple[int, ...] = ()
    barren = 0
    for number, pool in enumerate(pools(tokens, plan, seed, first), first):
        made, carry = rows(pool, packing_of(plan, arm), carry)
        barren = 0 if made else barren + 1
        if barren == _BARREN_POOLS:
            got = f"no row of {barren * plan.pool_documents} documents"
            raise Rejected(Reason.SETTING, got, f"text for rows of {plan.row_tokens} tokens", "study")
        if not arm.by_length and arm.mode is not Mode.PACKED:  # packed rows are mixtures already
            made = [made[n] for n in np.random.default_rng([seed, number, 2]).permutation(len(made))]
        groups = grouped(made, plan.batch_tokens)
        for at in np.random.default_rng([seed, number, 1]).permutation(len(groups)):
            yield number, groups[at]


@dataclass(frozen=True, slots=True)
class Work:
    """What a batch asks of the machine."""

    scored: int
    through: int
    """Tokens that go through the layers, padding included."""
    pairs: int
    """Of a token and one that it may look at, padding included."""

    def flop(self, plan: Plan) -> int:
        """Of one step: see the module's head."""
        products = layer_weights(plan) * self.through + plan.vocabulary * plan.hidden * self.scored
        return 6 * products + 12 * plan.layers * plan.hidden * self.pairs


def parts_of(batch: Sequence[Row]) -> list[list[Row]]:
    """What of a batch goes through the model together: its gradients are added up, so that a GPU can hold a step of 131,072."""
    return grouped(batch, STEP_TOKENS)


def work_of(batch: Sequence[Row], mode: Mode) -> Work:
    """In the form in which `objective` runs the mode on a CPU: unpacked rows padded to the longest, the others not at all."""
    scored = sum(row.useful for row in batch)
    segments: list[int] = []
    for part in parts_of(batch):
        if mode is Mode.PACKED_MASKED:
            segments += [b - a for row in part for a, b in pairwise(row.starts)]
        else:
            segments += [max(len(row.ids) for row in part)] * len(part)
    return Work(scored, sum(segments), sum(n * (n + 1) // 2 for n in segments))


@lru_cache(maxsize=16)  # 0.3 s for 2 million tokens, and every run for equal compute asks for two
def flop_per_token(plan: Plan, name: str, texts: Texts) -> float:
    """FLOP a scored token of an arm, over the first `tokens` scored tokens (at most 2 million) of seed 0's documents."""
    arm, scored, flop = ARMS[name], 0, 0
    for _, batch in batches(texts.training, plan, arm, 0):
        work = work_of(batch, arm.mode)
        scored, flop = scored + work.scored, flop + work.flop(plan)
        if scored >= min(plan.tokens, 2_000_000):
            break
    return flop / scored


def compute_tokens(plan: Plan, name: str, texts: Texts) -> int:
    """Scored tokens that the arm trains for the FLOP that `packed` takes for `plan.tokens`."""
    if name == REFERENCE:
        return plan.tokens
    return round(plan.tokens * flop_per_token(plan, REFERENCE, texts) / flop_per_token(plan, name, texts))


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """A run in memory: everything that a step reads and changes."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    step: int = 0
    tokens: int = 0
    """Scored so far."""
    through: int = 0
    flop: int = 0
    seconds: float = 0.0
    """CPU seconds of this process on a CPU (busy neighbours count less), seconds on the wall on CUDA; steps only."""
    pool: int = 0


def rate_at(plan: Plan, run: Run, share: float) -> float:
    """The learning rate when this share of the run's tokens is done: a straight rise, then half a cosine down to 0.

    By tokens and not by steps, so that all arms have the same rate after the same number of scored tokens.
    """
    continued = run.kind == "continued"
    highest = plan.learning_rate * (plan.continue_rate if continued else RATES.get(run.kind, 1.0))
    rise = 0.1 if continued else WARMUP
    if share < rise:
        return highest * (share + rise / 20) / (rise * 1.05)
    return highest * (1 + math.cos(math.pi * (share - rise) / (1 - rise))) / 2


def train(
    plan: Plan, run: Run, texts: Texts, folder: Path, tell: Callable[[int, int], None], save_seconds: float = SAVE_SECONDS
) -> dict[str, Any]:
    """Train the run's model, or go on where it was, evaluate it, and write `folder/NAME.json`, which it returns.

    `folder/NAME.jsonl` is the curve: a line a step. `folder/NAME.pt` stays for the runs that continue this one. `tell` gets
    (scored tokens, of how many) after each step. Raises Rejected(NOT_FINITE) when the loss diverges.
    """
    torch.set_num_threads(1)
    device = torch.device(plan.device)
    arm, goal = ARMS[run.arm], goal_of(plan, run, texts)
    learner, first = _begin(plan, run, folder, device)
    if arm.mode is Mode.PACKED_MASKED:
        require_isolation(learner.model, torch.bfloat16 if plan.bfloat16 else torch.float32)
    objective = Objective(learner.model)
    held = texts.held(plan)
    stream = islice(batches(texts.training, plan, arm, run.seed, first), learner.step, None)
    saved = time.monotonic()
    with _open_curve(folder / f"{run.name}.jsonl", learner.step) as curve:
        while learner.tokens < goal:
            before = learner.tokens
            loss = _step(learner, objective, plan, run, arm, stream, goal)
            line: dict[str, Any] = {"tokens": learner.tokens, "loss": round(loss, 5), "seconds": round(learner.seconds, 3)}
            if before * CURVE_POINTS // goal != learner.tokens * CURVE_POINTS // goal:
                line["held_out"] = _short_look(learner.model, held[:CURVE_DOCUMENTS], plan)
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            tell(learner.tokens, goal)
            if time.monotonic() - saved > save_seconds:
                _save(folder, run, learner)
                saved = time.monotonic()
    return _finish(plan, run, folder, learner, held)


def goal_of(plan: Plan, run: Run, texts: Texts) -> int:
    """Scored tokens after which the run ends."""
    if run.kind == "continued":
        return round(plan.tokens * plan.continue_share)
    return compute_tokens(plan, run.arm, texts) if run.kind == "compute" else plan.tokens


def _step(
    learner: Learner, objective: Objective, plan: Plan, run: Run, arm: Arm, stream: Iterator[tuple[int, list[Row]]], goal: int
) -> float:
    """One optimizer step; the batch's mean loss before it, nats per scored token."""
    began = _clock(plan)
    learner.pool, batch = next(stream)
    work = work_of(batch, arm.mode)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate_at(plan, run, learner.tokens / goal)
    learner.optimizer.zero_grad()
    found = 0.0
    for part in parts_of(batch):
        with _precision(plan):
            loss = objective(make_batch(part, plan.device)) / work.scored
        loss.backward()
        found += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(learner.model.parameters(), CLIP))
    if not math.isfinite(found) or not math.isfinite(norm):
        got = f"loss {found} and gradient norm {norm} in step {learner.step + 1}"
        raise Rejected(Reason.NOT_FINITE, got, "a finite loss and gradient", run.name)
    learner.optimizer.step()
    learner.step += 1
    learner.tokens += work.scored
    learner.through += work.through
    learner.flop += work.flop(plan)
    learner.seconds += _clock(plan) - began
    return found


def _precision(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(plan.device, torch.bfloat16) if plan.bfloat16 else contextlib.nullcontext()


def _clock(plan: Plan) -> float:
    return time.perf_counter() if plan.device == "cuda" else time.process_time()


def _begin(plan: Plan, run: Run, folder: Path, device: torch.device) -> tuple[Learner, int]:
    """The run as it was kept last, else its beginning; and the number of its first pool of documents."""
    shape = Shape(
        family="LlamaForCausalLM", vocab_size=plan.vocabulary, hidden_size=plan.hidden, intermediate_size=plan.inner,
        num_layers=plan.layers, num_heads=plan.heads, max_positions=plan.row_tokens, tied=plan.tied,
        start_token=plan.end_token, init_std=plan.init_std,
    )  # fmt: skip
    model = build_model(shape, run.seed).to(device).train()
    learner, first = Learner(model, _optimizer(model, plan)), 0
    if run.after is not None:
        before = torch.load(folder / f"{run.after.name}.pt", weights_only=True, map_location=device)
        model.load_state_dict(before["model"])
        learner.optimizer.load_state_dict(before["optimizer"])
        first = before["pool"] + 1
    state = folder / f"{run.name}.pt"
    if state.exists():
        kept = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(kept.pop("model"))
        learner.optimizer.load_state_dict(kept.pop("optimizer"))
        for field, value in kept.items():
            setattr(learner, field, value)
    return learner, first


def _optimizer(model: PreTrainedModel, plan: Plan) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def _save(folder: Path, run: Run, learner: Learner) -> None:
    """Whole or not at all."""
    state = {
        "model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict(), "step": learner.step,
        "tokens": learner.tokens, "through": learner.through, "flop": learner.flop, "seconds": learner.seconds,
        "pool": learner.pool,
    }  # fmt: skip
    new = folder / f"{run.name}.pt.new"
    with open(new, "wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, folder / f"{run.name}.pt")


def _open_curve(path: Path, step: int) -> Any:
    """The curve, open for appending; lines after `step` go: their steps are done again."""
    lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() else []
    new = path.with_suffix(".jsonl.new")
    new.write_text("".join(lines))
    new.replace(path)
    return open(path, "a")


def _finish(plan: Plan, run: Run, folder: Path, learner: Learner, held: list[list[int]]) -> dict[str, Any]:
    result = {
        "run": asdict(run), "steps": learner.step, "tokens": learner.tokens, "through": learner.through, "flop": learner.flop,
        "seconds": round(learner.seconds, 3), "evaluation": evaluate(learner.model, held, plan),
    }  # fmt: skip
    if run.kind == "tokens" and run.arm == REFERENCE:
        _save(folder, run, learner)
    new = folder / f"{run.name}.json.new"
    with open(new, "w") as out:
        json.dump(result, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, folder / f"{run.name}.json")
    if not (run.kind == "tokens" and run.arm == REFERENCE):
        (folder / f"{run.name}.pt").unlink(missing_ok=True)
    return result


# --- evaluation -------------------------------------------------------------------------------------------------------

VIEWS = {
    "single": "one by one, without the first token (the reference's rule)",
    "single_eos": "one by one, EOS in front: the same tokens as `single`",
    "single_eos_first": "one by one, EOS in front: first tokens only",
    "packed_rest": "on packed rows: the same tokens as `single`",
    "packed_first": "on packed rows: first tokens only",
    "packed_end": "on packed rows: the end-of-text tokens",
}
"""What is measured of each held-out document. Sums of parts (`packed` = rest + first) are made by the reader."""


def evaluate(model: PreTrainedModel, held: Sequence[Sequence[int]], plan: Plan) -> dict[str, Any]:
    """Nats and tokens of each held-out document in each of VIEWS, and by the place in the document.

    {"nats": {view: [documents]}, "tokens": {view: [documents]}, "places": {view: {"nats": [k], "tokens": [k]}}}, where place
    k holds the tokens number 2**k to 2**(k+1) - 1 of their document, counted from 1; `single`, `single_eos` (with the first
    tokens) and `packed` (rest and first).
    """
    bare = _one_by_one(model, held, None, plan)
    eos = _one_by_one(model, held, plan.end_token, plan)
    packed = _on_packed_rows(model, held, plan)
    parts = {
        "single": bare, "single_eos": [n[1:] for n in eos], "single_eos_first": [n[:1] for n in eos],
        "packed_rest": [n[1:-1] for n in packed], "packed_first": [n[:1] for n in packed], "packed_end": [n[-1:] for n in packed],
    }  # fmt: skip
    return {
        "nats": {view: [round(float(n.sum()), 5) for n in found] for view, found in parts.items()},
        "tokens": {view: [len(n) for n in found] for view, found in parts.items()},
        "places": {
            "single": _by_place(bare, 2),
            "single_eos": _by_place(eos, 1),
            "packed": _by_place([n[:-1] for n in packed], 1),
        },
    }


def _short_look(model: PreTrainedModel, held: Sequence[Sequence[int]], plan: Plan) -> dict[str, float]:
    """Mean nats per token of some held-out documents one by one, without and with EOS in front; the same tokens."""
    bare = np.concatenate(_one_by_one(model, held, None, plan))
    eos = np.concatenate([n[1:] for n in _one_by_one(model, held, plan.end_token, plan)])
    return {"single": round(float(bare.mean()), 5), "single_eos": round(float(eos.mean()), 5)}


Nats = np.ndarray[Any, np.dtype[np.float64]]


def _one_by_one(model: PreTrainedModel, held: Sequence[Sequence[int]], start: int | None, plan: Plan) -> list[Nats]:
    """Each document's nats, token by token: from the second token on without a start token, from the first on with one."""
    front = [] if start is None else [start]
    whole = [[*front, *ids] for ids in held]
    return token_nats(model, [ids[:-1] for ids in whole], [ids[1:] for ids in whole], plan)


def _on_packed_rows(model: PreTrainedModel, held: Sequence[Sequence[int]], plan: Plan) -> list[Nats]:
    """Each document's nats, and its end's, in the stream EOS d1 EOS d2 EOS ... cut into rows of N, which all see their past."""
    stream = [plan.end_token]
    for ids in held:
        stream += [*ids, plan.end_token]
    n = plan.row_tokens
    cuts = range(0, len(stream) - 1, n)
    nats = token_nats(model, [stream[i : i + n] for i in cuts], [stream[i + 1 : i + n + 1] for i in cuts], plan)
    ends = np.cumsum([len(ids) + 1 for ids in held])
    return list(np.split(np.concatenate(nats), ends[:-1]))


def token_nats(model: PreTrainedModel, seen: Sequence[Sequence[int]], asked: Sequence[Sequence[int]], plan: Plan) -> list[Nats]:
    """-log p of each asked token given all of its row up to its place; rows of one document each, which all see their past.

    What a row has more than is asked for (the last token of a stream) is left out.
    """
    order = sorted(range(len(seen)), key=lambda i: len(asked[i]))
    found: list[Nats] = [np.empty(0)] * len(seen)
    objective, was_training = Objective(model), model.training
    model.eval()
    with torch.inference_mode(), _precision(plan):
        for some in _of_like_length([i for i in order if len(asked[i])], [len(a) for a in asked]):
            made = [Row(tuple(seen[i][: len(asked[i])]), tuple(asked[i]), (0, len(asked[i]))) for i in some]
            nats = _nats_of(objective, make_batch(made, model.device))
            for i, part in zip(some, np.split(nats, np.cumsum([len(asked[i]) for i in some])[:-1]), strict=True):
                found[i] = part
    model.train(was_training)
    return found


def _nats_of(objective: Objective, batch: Batch) -> Nats:
    """[N] of each scored place, row by row."""
    hidden = objective.hidden(batch).flatten(0, 1)
    if batch.scored is not None:
        hidden = hidden[batch.scored]
    head = objective.model.get_output_embeddings()
    step = max(1, _HEAD_FLOATS // head.weight.shape[0])
    parts = []
    for at in range(0, len(hidden), step):
        logits = head(hidden[at : at + step]).float()
        parts.append(F.cross_entropy(logits, batch.targets[at : at + step], reduction="none").double().cpu().numpy())
    return np.concatenate(parts)


def _of_like_length(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours of an order by length, as many as fit FORWARD_TOKENS with padding."""
    some: list[int] = []
    for i in order:
        if some and (len(some) + 1) * lengths[i] > FORWARD_TOKENS:
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def _by_place(found: Sequence[Nats], first: int) -> dict[str, list[Any]]:
    """Sums over documents by floor(log2(number of the token)); each document's first value is of token number `first`."""
    longest = max((len(n) for n in found), default=0) + first
    nats, tokens = np.zeros(longest.bit_length()), np.zeros(longest.bit_length(), dtype=np.int64)
    places = np.frexp(np.arange(longest + 1))[1] - 1
    for each in found:
        at = places[first : first + len(each)]
        np.add.at(nats, at, each)
        np.add.at(tokens, at, 1)
    return {"nats": [round(float(x), 5) for x in nats], "tokens": tokens.tolist()}
