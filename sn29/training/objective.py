"""The loss of rows of documents: one call of the model for training, and a head whose logits never exist as a whole.

    rows (sn29/training/packing.py)     -> Batch       tensors of one forward
    Batch -> layers, attention inside each document -> hidden states of scored places -> nats, 128 places at a time

`Objective` owns the model call. A stock transformers model isolates the documents of a packed row only when positions
restart, no cache is used and no mask is given; `use_cache=True` (the default of every config), any 2-D attention mask, a
boolean 4-D mask under eager attention, and families that do not look at positions switch that off without a word. So the
call never has a cache or a mask, documents go through attention kernels of our own (sn29/evaluation/packed.py), and
`require_isolation` tries it on two samples before anything is trained.

Letters in shapes: B rows of a batch, T positions, N scored places, D hidden size, V rows of the head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sn29.errors import Reason, Rejected
from sn29.evaluation.packed import Documents, documents_attention, refusal, varlen_attention
from sn29.training.packing import UNSCORED, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "sn29_training"
"""Name of our kernel in transformers' attention interface."""
ROWS_AT_ONCE = 128
"""Places whose logits exist together on a CPU, where the vocabulary is large. V 100,277, D 256, one core: 20 places (8 MB of
logits) 4.8 ms a place, 64 3.5, 128 2.9, 256 2.8, 512 2.9: below 128 the weight's gradient goes through memory too often."""
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Floats of logits that may exist together beyond that: 4 MB stay in a cache, a GPU wants 1,338 places of 100,277."""
_CUDA_STEP = 64
"""Tokens to which a row of many documents is filled up on CUDA: matrix products want multiples."""
ISOLATION_LIMIT = 1e-3
"""Of `isolation_error`, in float32 (found: 1e-6 for isolated classes, 0.9 to 1.1 for the others); 16-bit weights: 0.25."""


_OWN = "documents of a packed row on their own"


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one forward."""

    ids: Tensor
    """[B, T] what the model sees."""
    positions: Tensor
    """[B, T] place of each token in its document, from 0."""
    scored: Tensor | None
    """[N] scored places among the B * T, ascending; None: all of them."""
    targets: Tensor
    """[N] the next token of each scored place."""
    documents: Documents | None
    """Where the documents of a shared row are; None: each row is one."""

    @property
    def useful(self) -> int:
        """N."""
        return len(self.targets)


def make_batch(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
    """Rows of one mode as tensors. Raises Rejected(SETTING) for no rows.

        packed          rows of one segment and one length      [B, N]
        unpacked        rows of one segment                     [B, T] padded on the right, which no real place sees
        packed_masked   a row with several segments among them  [1, T] all documents one behind the other, no padding
                                                                (on CUDA to a multiple of 64)
    """  # fmt: skip
    if not rows:
        raise Rejected(Reason.SETTING, "a batch of no rows", "one or more", "training")
    device = torch.device(device)
    if any(len(row.starts) > 2 for row in rows):
        return _flat(rows, device)
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths)
    padding = [(0,) * (longest - length) for length in lengths]
    unscored = [(UNSCORED,) * (longest - length) for length in lengths]
    ids = torch.tensor([row.ids + more for row, more in zip(rows, padding, strict=True)])
    targets = torch.tensor([row.targets + more for row, more in zip(rows, unscored, strict=True)])
    return _batch(ids, torch.arange(longest).expand(len(rows), longest), targets.flatten(), None, device)


def _flat(rows: Sequence[Row], device: torch.device) -> Batch:
    ids = list(chain.from_iterable(row.ids for row in rows))
    targets = list(chain.from_iterable(row.targets for row in rows))
    lengths = [stop - start for row in rows for start, stop in pairwise(row.starts)]
    starts = (0, *accumulate(lengths))
    padding = -len(ids) % _CUDA_STEP if device.type == "cuda" else 0
    positions = list(chain.from_iterable(map(range, [*lengths, padding])))
    bounds = torch.tensor(starts, dtype=torch.int32).to(device) if device.type == "cuda" else None
    seen = torch.tensor([ids + [0] * padding, positions])
    return _batch(seen[:1], seen[1:], torch.tensor(targets + [UNSCORED] * padding), Documents(starts, bounds), device)


def _batch(ids: Tensor, positions: Tensor, targets: Tensor, documents: Documents | None, device: torch.device) -> Batch:
    real = targets != UNSCORED
    scored = None if bool(real.all()) else real.nonzero()[:, 0]
    asked = targets if scored is None else targets[scored]
    found = (ids, positions, asked) if scored is None else (ids, positions, asked, scored)
    ids, positions, asked, *some = (tensor.to(device) for tensor in found)
    return Batch(ids, positions, some[0] if some else None, asked, documents)


# --- the model call ---------------------------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention inside each document (`documents` None: each row), causal, differentiable. Shapes as `documents_attention`."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:  # rotary positions have made q and k float32 again
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if documents is None:
        return documents_attention(module, query, key, value, attention_mask, dropout=dropout, **more)
    found: tuple[Tensor, None] = _of_documents(module, query, key, value, documents, dropout, more)
    return found


@torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator, no-untyped-call]
def _of_documents(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, documents: Documents, dropout: float, more: dict[str, Any]
) -> tuple[Tensor, None]:
    """Left out of a compiled graph: lengths differ from batch to batch, and each set of them would be compiled anew."""
    if documents.bounds is not None and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return varlen_attention(module, query, key, value, None, documents=documents, **more)
    return documents_attention(module, query, key, value, None, documents=documents, dropout=dropout, **more)


# Without a mask function of that name transformers makes no mask.
AttentionInterface.register(_ATTENTION, _attention)


class Objective(nn.Module):
    """A causal language model as the loss that it is trained for: the one place that calls the model.

    Root of what is sharded, compiled or spread over processes: inside `forward` the head's weight is whole. The model's
    attention is set to our kernel once, here; `save_pretrained` does not write that down.
    """

    log_count: Tensor | None

    def __init__(self, model: PreTrainedModel, log_count: Tensor | None = None) -> None:
        """`log_count` [V]: ln of the number of tokens that share each row of embedding and head (see trainer.Rows).

        Raises Rejected(FAMILY) for a class whose attention or head is not ours to call; `require_isolation` tries the rest.
        """
        super().__init__()
        self.model = model
        self.register_buffer("log_count", log_count, persistent=False)
        model.set_attn_implementation(_ATTENTION)
        if model.config._attn_implementation != _ATTENTION or not isinstance(model.get_output_embeddings(), nn.Linear):
            limit = "a class with a linear head that takes its attention from transformers' interface"
            raise Rejected(Reason.FAMILY, type(model).__name__, limit, "training")

    def forward(self, batch: Batch) -> Tensor:
        """Nats of the batch's targets in all, [] float64, differentiable. Raises what the model raises."""
        nats: Tensor = self._nats(self.hidden(batch), batch)
        return nats

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, D]. No cache and no mask, whatever the config says."""
        found: Tensor = self.model.base_model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, documents=batch.documents
        ).last_hidden_state
        return found

    @torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator, no-untyped-call]
    def _nats(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Left out of a compiled graph, which would be another one for each number of scored places."""
        head: nn.Linear = self.model.get_output_embeddings()
        hidden = hidden.flatten(0, 1)  # [B * T, D]
        if batch.scored is not None:
            hidden = hidden.index_select(0, batch.scored)
        return summed_nats(hidden, head.weight, head.bias, batch.targets, self.log_count)


# --- the head ---------------------------------------------------------------------------------------------------------


def summed_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_count: Tensor | None = None) -> Tensor:
    """-sum log p(target), [] float64: the head's softmax, a few places at a time.

    hidden [N, D], weight [V, D], bias [V], targets [N], log_count [V]. A row that m tokens share is m equal logits in the
    softmax, l + ln m as one; which of the m it was costs ln m more.
    """
    kind = hidden.device.type
    cast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(kind) if cast else weight.dtype
    if log_count is not None:
        log_count = log_count.to(torch.promote_types(dtype, torch.float32))
        bias = log_count if bias is None else bias + log_count
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    nats: Tensor = _SummedNats.apply(hidden, weight, bias, targets, dtype, wants)  # type: ignore[no-untyped-call]
    return nats if log_count is None else nats + log_count[targets].sum(dtype=torch.float64)


class _SummedNats(torch.autograd.Function):
    """-sum log softmax(hidden @ weight.T + bias)[target], a few places at a time.

    The gradients are made in the forward pass, while the probabilities are at hand: no logits are kept and none are
    computed twice. All at once, 512 places x 100,277 x 4 B would be 205 MB, and the gradient as much again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, wants: bool
    ) -> Tensor:
        """Products in `dtype`, softmax and sums of gradients in float32 or better. `wants`: gradients will be asked for."""
        ctx.grads = None
        with torch.autocast(hidden.device.type, enabled=False):
            if not wants:
                return _nats_only(hidden, weight.to(dtype), bias, targets, dtype)
            nats, ctx.grads = _nats_and_slopes(hidden, weight.to(dtype), bias, targets, dtype)
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("backward a second time through the same loss: its gradients were made once and used up")
        (to_hidden, to_weight, to_bias), ctx.grads = ctx.grads, None
        for tensor in (to_hidden, to_weight, to_bias):
            if tensor is not None:
                tensor.mul_(grads[0])  # in place: the largest is as large as the head
        return to_hidden, to_weight, to_bias, None, None, None


def _places_at_once(weight: Tensor) -> int:
    most = LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cpu"])
    return max(ROWS_AT_ONCE, most // len(weight))


def _logits(part: Tensor, weight: Tensor, bias: Tensor | None, exact: torch.dtype) -> Tensor:
    """[n, V] in float32 or better."""
    found = (part @ weight.T).to(exact)
    return found if bias is None else found.add_(bias)


def _nats_only(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    nats, step = torch.zeros((), dtype=torch.float64, device=hidden.device), _places_at_once(weight)
    for i in range(0, len(hidden), step):
        logits = _logits(hidden[i : i + step].to(dtype), weight, bias, exact)
        asked = logits.gather(1, targets[i : i + step, None])[:, 0]
        nats += (logits.logsumexp(1) - asked).sum(dtype=torch.float64)
    return nats


def _nats_and_slopes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """Nats, and d nats / d (hidden, weight, bias): the last two in float32 or better."""
    exact = torch.promote_types(dtype, torch.float32)
    nats, step = torch.zeros((), dtype=torch.float64, device=hidden.device), _places_at_once(weight)
    to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=exact)
    to_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
    for i in range(0, len(hidden), step):
        part, wanted = hidden[i : i + step].to(dtype), targets[i : i + step, None]
        slope = _logits(part, weight, bias, exact)
        highest, asked = slope.amax(1, keepdim=True), slope.gather(1, wanted)
        total = slope.sub_(highest).exp_().sum(1, keepdim=True)
        nats += (total.log() + highest - asked).sum(dtype=torch.float64)
        slope.scatter_add_(1, wanted, -total)  # now d nats / d logits, times `total`
        if to_bias is not None:
            to_bias += (1 / total).T.mm(slope)[0]
        if dtype != exact:
            slope = (slope / total).to(dtype)
            to_hidden[i : i + step] = slope @ weight
            to_weight += slope.T @ part
            continue
        # Divided where it is small: [n, D] twice, not [n, V].
        to_hidden[i : i + step] = (slope @ weight).div_(total)
        to_weight.addmm_(slope.T, part / total)
    return nats, (to_hidden, to_weight, to_bias)


# --- the self-test ----------------------------------------------------------------------------------------------------


def isolation_error(model: PreTrainedModel, products: torch.dtype | None = None) -> float:
    """How far a document in a packed row is from the same document alone: 0 isolated, about 1 not at all.

    Two random samples, packed by `Objective`'s call and one by one by the model's own: the largest difference of a logit,
    as a share of what plain concatenation would make of it. As a share, because a fresh model's logits are all but equal
    and would hide a leak. `products`: under autocast to it. inf where the packed logits are not finite; raises
    Rejected(FAMILY) for a model that does not take what a packed row needs, Rejected(NOT_FINITE) for one whose own are none.
    """
    vocabulary, device = model.config.vocab_size, model.device
    numbers = torch.Generator().manual_seed(29)
    first, second = (torch.randint(0, vocabulary, (length,), generator=numbers).tolist() for length in (23, 37))
    both = Row((*first, *second), (UNSCORED,) * 60, (0, 23, 60))
    autocast = torch.autocast(device.type, products, enabled=products is not None)
    with torch.no_grad(), _as_it_was(model), autocast:
        if model.config._attn_implementation == _ATTENTION:
            model.set_attn_implementation("sdpa")
        try:
            alone = torch.cat([_own_logits(model, ids) for ids in (first, second)])
            concatenated = _own_logits(model, [*first, *second])[23:]
            hidden = Objective(model).hidden(make_batch([both], device))[0, :60]
            packed = model.get_output_embeddings()(hidden).float()
        except torch.OutOfMemoryError:
            raise  # says nothing of the class
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            got = f"{type(model).__name__}: packed, it ends in {type(error).__name__}: {str(error)[:120]}"
            raise Rejected(Reason.FAMILY, got, _OWN, "training") from error
    if not alone.isfinite().all():
        raise Rejected(Reason.NOT_FINITE, f"{type(model).__name__}: logits that are not", "finite logits", "training")
    wrong = (packed - alone).abs().max().item()
    leak = (concatenated - alone[23:]).abs().max().item()
    return wrong / leak if math.isfinite(wrong) and leak else (math.inf if not math.isfinite(wrong) or wrong else 0.0)


def require_isolation(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Raises Rejected(FAMILY) for a model whose documents are not on their own in a packed row; see `refusal` for others.

    Tried as the model is, which is exact, and again under autocast where the products will be in `dtype` of 16 bits: on CUDA
    that is another kernel. Raises Rejected(NOT_FINITE) as `isolation_error`.
    """
    with _as_it_was(model):
        why = refusal(model)
    if why:
        raise Rejected(Reason.FAMILY, f"{type(model).__name__}: {why}", _OWN, "training")
    for products in (None,) if dtype.itemsize > 2 else (None, dtype):
        limit = ISOLATION_LIMIT if (products or model.dtype).itemsize > 2 else 0.25
        error = isolation_error(model, products)
        if not error <= limit:
            how = f" in {str(products).removeprefix('torch.')}" if products else ""
            got = f"{type(model).__name__}: packed and single logits differ{how} by {error:.2g} of what no isolation would make"
            raise Rejected(Reason.FAMILY, got, f"at most {limit:g}", "training")


def _own_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[T, V] float32, by transformers' own call of one unpadded row."""
    found: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return found


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout inside; its mode and its attention as before behind it."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(attention)
