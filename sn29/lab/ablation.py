"""Exact losses of a model whose MLP gates are taken away: only what comes after a gate is computed again.

A gate is one input of an MLP's last matrix: a column of `down_proj` (Llama, Phi3) or `fc2` (Phi), and what feeds it.

    rows of documents      [S a a a  S b b ...]       hidden states before layer l are kept, of one layer at a time
    layer l                runs once; at the input of `down_proj` [1, T, I] it is spread out, a copy for each ablation
    ablations              [B, T, I]                  in each copy the removed gates are 0, or their mean over the tokens
    layers l + 1 to L      run with B copies, as one batch
    final norm, head       -log p of each token, in tiles; sums in float64 for each document

Nothing is approximated: a removed gate is removed where it is, and everything behind it sees that. So the result is what a
forward pass of the whole model with a hook at that place gives (tests/lab/test_ablation.py). On a CPU each thread has rows
and ablations of its own, and no operation is cut among threads: no bit depends on their number.

Letters in shapes: T tokens of a row, D hidden size, I gates of a layer, L layers, B ablations at a time, N documents.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sn29.errors import Reason, Rejected
from sn29.evaluation.head import TiledHead, tiles_for
from sn29.evaluation.packed import Documents, _attention_of, _one_thread_an_operation, _tensors_of
from sn29.evaluation.profile import Profile
from sn29.evaluation.streamed import needs
from sn29.lab.weights import Report, silent
from sn29.models.config import ModelConfig

Removal = Mapping[int, Tensor]
"""Layer -> bool [I], true where a gate is taken away. An empty one is the model as it is."""
T = TypeVar("T")
U = TypeVar("U")

_HEAD_TOKENS = 256
"""Positions whose logits exist at a time in the backward pass: 200 MB with 49,152 entries in float32, gradients included."""
_GATE_BYTES = 160
"""Of one gate: five measures and four scores in float32, and the 64-bit places of four scores three times over."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Documents that go through the model together, each seeing itself alone."""

    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    asked: Tensor
    documents: Documents


@dataclass(slots=True)
class Measures:
    """What one forward and backward pass tells of each gate. All float32 [L, I], of all tokens of all documents."""

    highest: Tensor
    """max |a|"""
    squares: Tensor
    """sum of a^2"""
    first_order: Tensor
    """sum of a dL/da, in nats: what the loss would fall by if it were linear."""
    fisher: Tensor
    """sum of (a dL/da)^2"""
    total: Tensor
    """sum of a"""


@dataclass(frozen=True, slots=True)
class Spike:
    """A dimension of the hidden states behind a layer that is far above all others."""

    layer: int
    dimension: int
    value: float
    """The largest in size, with its sign."""
    median: float
    """Of |hidden state| behind this layer, over all tokens and dimensions."""
    places: tuple[tuple[int, int], ...]
    """(document, position) of the tokens that have it, the largest first; position 0 is the start token."""

    @property
    def ratio(self) -> float:
        return abs(self.value) / self.median


def down_of(layer: nn.Module) -> nn.Linear:
    """The last matrix of a layer's MLP."""
    mlp: Any = layer.mlp
    found = mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj
    assert isinstance(found, nn.Linear)
    return found


@dataclass(frozen=True, slots=True)
class Pieces:
    """How the work is cut. Tokens."""

    row_tokens: int
    """Most of a row, but for a document that is longer."""
    batch_tokens: int
    """Of all copies that go through a layer together, a thread."""


ON_CPU, ON_CUDA = Pieces(128, 1024), Pieces(2048, 16_384)
"""On a CPU rows of 128 give two threads something to do each where one set is removed from a search of 256 tokens."""


def pieces_of(device: str) -> Pieces:
    return ON_CPU if device == "cpu" else ON_CUDA


def needed_bytes(
    config: ModelConfig, dtype: torch.dtype, device: str, lengths: Sequence[int], *, backward: bool, threads: int = 1
) -> int:
    """What a model and its subjects with documents of these lengths take, beside what the libraries take.

    The weights; each thread's batch of copies in a block, and its tile of logits; hidden states before and behind a layer of
    every token, and three float32 copies of them for `spikes`; and with `backward` what `measure` keeps: what every block made of
    a row, the logits of a part of it and their gradients, and all measures, scores and places of all gates.
    """
    hidden, inner, layers = (config.number(name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    pieces = pieces_of(device)
    tiles = tiles_for(torch.device(device), config.number("vocab_size"), compiled=False)
    row = max(min(pieces.row_tokens, sum(lengths)), *lengths)
    profile = Profile(max(pieces.batch_tokens, row), tiles, "documents")
    found = needs(config, dtype, profile, row, threads if device == "cpu" else 1).resident
    found += sum(lengths) * hidden * (2 * dtype.itemsize + 12)
    if not backward:
        return found
    heads = config.number("num_attention_heads")
    attention = 5 * heads * config.head_dim + 6 * config.number("num_key_value_heads", heads) * config.head_dim
    found += layers * row * ((attention + 5 * inner + 4 * hidden) * dtype.itemsize + 24 * hidden)
    return found + _HEAD_TOKENS * config.number("vocab_size") * (dtype.itemsize + 16) + layers * inner * _GATE_BYTES


class Subject:
    """A model and the documents on which its gates are judged."""

    def __init__(
        self,
        model: PreTrainedModel,
        documents: Sequence[Sequence[int]],
        start_token: int,
        pieces: Pieces = ON_CPU,
        *,
        threads: int = 1,
    ) -> None:
        """Documents of at least one token each. The weights get no gradient any more."""
        self.model, self.device = model.requires_grad_(False).eval(), model.device
        self.lengths = tuple(len(ids) for ids in documents)
        self.num_tokens = sum(self.lengths)
        self.batch_tokens = pieces.batch_tokens
        self.threads = threads if self.device.type == "cpu" else 1
        self._base: Any = model.base_model
        self.layers: list[nn.Module] = list(self._base.layers)
        self._norm: nn.Module = self._base.final_layernorm if hasattr(self._base, "final_layernorm") else self._base.norm
        self._rows = [*self._in_rows(documents, start_token, pieces.row_tokens)]
        self._kept: tuple[int, list[Tensor]] | None = None
        self.means: Tensor | None = None
        """What a gate is replaced by in a mean ablation, [L, I]: its mean over all tokens of the documents that `measure` saw."""
        self.num_layers, self.width = len(self.layers), down_of(self.layers[0]).in_features

    def _in_rows(self, documents: Sequence[Sequence[int]], start_token: int, row_tokens: int) -> Iterator[_Row]:
        """In the given order, as many to a row as fit."""
        left = list(enumerate(documents))
        while left:
            count, size = 1, len(left[0][1])
            while count < len(left) and size + len(left[count][1]) <= row_tokens:
                size += len(left[count][1])
                count += 1
            taken, left = left[:count], left[count:]
            texts = [ids for _, ids in taken]
            made = _tensors_of(texts, size, start_token, self.device)
            yield _Row(tuple(n for n, _ in taken), tuple(map(len, texts)), *made)

    # --- exact ablation -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def nats(self, removals: Sequence[Removal], *, mean: bool = False, report: Report = silent) -> Tensor:
        """float64 [removals, N]: nats of each document behind the start token, every token scored.

        `mean`: a removed gate gives its mean (`means`) instead of 0. Removals are taken in the order of their first layers, so
        that the hidden states before one layer are kept at a time. Raises Rejected(NOT_FINITE) for a loss that is no number.
        """
        if mean and self.means is None:
            raise ValueError("no means: measure first")
        found = torch.zeros(len(removals), len(self.lengths), dtype=torch.float64)
        firsts = [min(removal, default=self.num_layers) for removal in removals]
        now, done = threading.local(), 0
        with self._with_hooks({layer for removal in removals for layer in removal}, now, mean):
            for first, group in groupby(sorted(range(len(removals)), key=lambda n: firsts[n]), key=lambda n: firsts[n]):
                work = self._pieces(first, [*group])

                def ablated(piece: tuple[_Row, Tensor, list[int]], first: int = first) -> Tensor:
                    row, hidden, some = piece
                    now.removed = self._masks([removals[n] for n in some])
                    return self._nats(row, self._through(row, hidden, first, self.num_layers)).expand(len(some), -1)

                for (row, _, some), nats in zip(work, self._in_lanes(work, ablated), strict=True):
                    found[torch.tensor(some)[:, None], torch.tensor(row.numbers)] = nats
                done += len({n for _, _, some in work for n in some})
                report(done, len(removals))
        _check_losses(found, removals)
        return found

    def _pieces(self, first: int, numbers: list[int]) -> list[tuple[_Row, Tensor, list[int]]]:
        """(row, its hidden states before the layer, removals): what one thread does at a time."""
        found = []
        for row, hidden in zip(self._rows, self._before(first), strict=True):
            step = max(1, self.batch_tokens // len(row.asked)) if first < self.num_layers else len(numbers)
            found += [(row, hidden, numbers[at : at + step]) for at in range(0, len(numbers), step)]
        return found

    def _masks(self, removals: Sequence[Removal]) -> dict[int, Tensor]:
        """Layer -> bool [B, 1, I]"""
        nothing = torch.zeros(self.width, dtype=torch.bool)
        layers = {layer for removal in removals for layer in removal}
        return {n: torch.stack([removal.get(n, nothing) for removal in removals])[:, None].to(self.device) for n in layers}

    @contextlib.contextmanager
    def _with_hooks(self, layers: set[int], now: threading.local, mean: bool) -> Iterator[None]:
        with _attention_of(self.model, "sn29_documents"), _one_thread_an_operation(self.device), contextlib.ExitStack() as hooks:
            for layer in layers:
                instead = self.means[layer] if mean and self.means is not None else torch.zeros((), device=self.device)
                hook = _replacing(layer, now, instead.to(self.model.dtype))
                hooks.callback(down_of(self.layers[layer]).register_forward_pre_hook(hook).remove)
            yield

    # --- layers -------------------------------------------------------------------------------------------------------

    def _through(self, row: _Row, hidden: Tensor, first: int, last: int) -> Tensor:
        """Layers first to last - 1. hidden [1, T, D]; [B, T, D] behind the first ablated layer."""
        angles = self._base.rotary_emb(hidden, position_ids=row.positions)
        for layer in self.layers[first:last]:
            hidden = layer(
                hidden, attention_mask=None, position_embeddings=angles, position_ids=row.positions, use_cache=False,
                documents=row.documents,
            )  # fmt: skip
        return hidden

    def _before(self, layer: int) -> list[Tensor]:
        """Hidden states [1, T, D] before a layer, of every row. Going up costs one pass in all; going down begins anew."""
        if self._kept is None or self._kept[0] > layer:
            self._kept = (0, [self._base.embed_tokens(row.ids) for row in self._rows])
        at, hidden = self._kept
        if at < layer:
            pairs = [*zip(self._rows, hidden, strict=True)]
            self._kept = (layer, self._in_lanes(pairs, lambda pair: self._through(*pair, at, layer)))
        return self._kept[1]

    def _in_lanes(self, work: Sequence[T], do: Callable[[T], U]) -> list[U]:
        """do(each), in the order of `work`; each is done by one thread, as fast as threads are free."""
        found: dict[int, U] = {}
        left = iter([*enumerate(work)])  # next() of it is one step of the interpreter, so nothing is taken twice

        def lane() -> None:
            if self.device.type == "cpu":
                torch.set_num_threads(1)  # torch keeps it for each thread, as it does inference mode
            with torch.inference_mode():
                found.update((number, do(each)) for number, each in left)

        with ThreadPoolExecutor(self.threads) as pool:
            for part in [pool.submit(lane) for _ in range(self.threads)]:
                part.result()
        return [found[number] for number in range(len(work))]

    def _nats(self, row: _Row, hidden: Tensor) -> Tensor:
        """[B, T, D] behind the last layer -> float64 [B, documents of the row]"""
        output: Any = self.model.get_output_embeddings()
        head = TiledHead(output.weight, output.bias, tiles_for(self.device, len(output.weight), compiled=False))
        for each in self._norm(hidden):
            head.add(each, row.asked)
        per_token = head.finish().double().view(len(hidden), -1)
        return torch.stack([part.sum(1) for part in torch.split(per_token, [*row.lengths], dim=1)], dim=1).cpu()

    # --- one pass -----------------------------------------------------------------------------------------------------

    def measure(self, report: Report = silent) -> Measures:
        """What a forward and a backward pass over all documents tell of each gate; `means` are there from then on.

        Raises Rejected(NOT_FINITE) for a gate or gradient that float32 does not hold the square of.
        """
        found = Measures(*(torch.zeros(self.num_layers, self.width, device=self.device) for _ in range(5)))
        with _attention_of(self.model, "sn29_documents"), _one_thread_an_operation(self.device), contextlib.ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                hooks.callback(down_of(layer).register_forward_pre_hook(_measuring(found, number)).remove)
            for done, row in enumerate(self._rows):
                embedded = self._base.embed_tokens(row.ids).detach().requires_grad_()
                hidden = self._norm(self._through(row, embedded, 0, self.num_layers))
                hidden.backward(self._backward_of_head(hidden[0].detach(), row.asked)[None])
                report(done + 1, len(self._rows))
        for name in ("squares", "fisher", "first_order", "total"):
            wrong = (~getattr(found, name).isfinite()).nonzero().tolist()
            if wrong:
                raise Rejected(
                    Reason.NOT_FINITE, f"gate {wrong[0][1]} of layer {wrong[0][0]}", "finite activations and gradients"
                )
        self.means = found.total / self.num_tokens
        return found

    def _backward_of_head(self, hidden: Tensor, asked: Tensor) -> Tensor:
        """The gradient [T, D] of the nats of all tokens; their logits exist in pieces."""
        output: Any = self.model.get_output_embeddings()
        gradients: list[Tensor] = []
        for some, ids in zip(torch.split(hidden, _HEAD_TOKENS), torch.split(asked, _HEAD_TOKENS), strict=True):
            leaf = some.detach().requires_grad_()
            gradients += torch.autograd.grad(F.cross_entropy(output(leaf).float(), ids, reduction="sum"), leaf)
        return torch.cat(gradients)

    @torch.inference_mode()
    def spikes(self, *, least: float = 100.0, ratio: float = 1000.0) -> list[Spike]:
        """Massive activations behind each layer, the largest first.

        By default as Sun et al. (arXiv 2402.17762) define them: above 100, and above 1,000 times the median of |hidden state|.
        """
        found: list[Spike] = []
        places = [
            (number, at) for row in self._rows for number, n in zip(row.numbers, row.lengths, strict=True) for at in range(n)
        ]
        with _attention_of(self.model, "sn29_documents"), _one_thread_an_operation(self.device):
            for layer in range(self.num_layers):
                hidden = torch.cat([each[0] for each in self._before(layer + 1)]).float()  # [all tokens, D]
                size = hidden.abs()
                median = float(size.median())
                for dimension in (size.amax(0) > max(least, ratio * median)).nonzero()[:, 0].tolist():
                    column = size[:, dimension]
                    order = column.argsort(descending=True)[: int((column > max(least, ratio * median)).sum())].tolist()
                    value = float(hidden[order[0], dimension])
                    found.append(Spike(layer, dimension, value, median, tuple(places[at] for at in order)))
        return sorted(found, key=lambda spike: -spike.ratio)


def _check_losses(nats: Tensor, removals: Sequence[Removal]) -> None:
    """nats [removals, N]. Raises Rejected(NOT_FINITE)."""
    for number, document in (~nats.isfinite()).nonzero().tolist()[:1]:
        gone = sum(int(mask.sum()) for mask in removals[number].values())
        got = f"a loss of {float(nats[number, document])} for document {document + 1}" + f" without {gone} gates" * bool(gone)
        raise Rejected(Reason.NOT_FINITE, got, "finite losses")


def _replacing(layer: int, now: threading.local, instead: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    """A hook: the layer's gates [1 or B, T, I] become [B, T, I], those that this thread has removed now replaced."""

    def replace(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        removed = now.removed.get(layer) if hasattr(now, "removed") else None
        return (given[0] if removed is None else torch.where(removed, instead, given[0]),)

    return replace


def _measuring(into: Measures, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds up one layer's measures: of its gates [1, T, I] now, of their gradient when it comes."""

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        gates = given[0].detach()[0].float()
        into.highest[layer] = torch.maximum(into.highest[layer], gates.abs().amax(0))
        into.squares[layer] += gates.square().sum(0)
        into.total[layer] += gates.sum(0)

        def back(gradient: Tensor) -> None:
            product = gates * gradient[0].float()
            into.first_order[layer] += product.sum(0)
            into.fisher[layer] += product.square().sum(0)

        given[0].register_hook(back)  # type: ignore[no-untyped-call]

    return look
