"""The fast engine: many texts in one row without padding, attention inside each text, the head in tiles.

    samples      [a a a a a] [b b] [c c c]            lengths 5, 2, 3
    a row        [S a a a a  S b   S c c  . . .]      fixed shape [1, row_tokens]; each text behind the start token
    positions    [0 1 2 3 4  0 1   0 1 2  0 0 0]
    attention    inside each text, through transformers' own attention interface; padding sees nothing
    asked        [a a a a a  b b   c c c]             to the tiled head, without the padding

A row's shape never depends on what shares it: texts of at most `row_tokens` tokens share rows of exactly that many, a
longer text has a row of its own, its length rounded up. Every matrix product then has a shape that the text alone
decides, so a text's loss is the same to the bit in any order and any subset (tests/evaluation/test_packed.py).

`engine.all_nats` is the plain twin, and what runs where this cannot: a model whose positions depend on the longest text of
a call, or whose logits are more than one linear layer.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sn29.evaluation import engine
from sn29.evaluation.best_fit import best_fit
from sn29.evaluation.head import MakeHead, TiledHead, tiles_for
from sn29.evaluation.profile import ROW_TOKENS
from sn29.evaluation.profile import Attention as Attention
from sn29.evaluation.profile import Profile as Profile
from sn29.evaluation.profile import Tiles as Tiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Watch = Callable[[str], AbstractContextManager[object]]
"""watch("body") and watch("head") stand around the model's own work, so that a benchmark can tell it from ours."""

_LONG_STEP = 64
"""Tokens to which a row of one long text is rounded up: 3% of padding on average just beyond a row of 1,024."""
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Positions whose angles depend on nothing else in the call; `dynamic` and `longrope` look at the longest text."""
_PLAIN_HEADS = ("LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM")
"""Logits are one linear layer of the last hidden state: read in transformers 5.23. Others are tried, see `refusal`."""


@dataclass(frozen=True, slots=True)
class Row:
    """Samples that share one forward, by their numbers, in order."""

    samples: tuple[int, ...]
    size: int
    """Tokens of the row, padding included."""


def pack(lengths: Sequence[int], row_tokens: int) -> list[Row]:
    """Rows for samples of these lengths (0 is left out): long ones alone, then best fit; the same for the same lengths."""
    longest_first = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    alone = [Row((n,), -(-lengths[n] // _LONG_STEP) * _LONG_STEP) for n in longest_first if lengths[n] > row_tokens]
    return [*alone, *(Row(tuple(numbers), row_tokens) for numbers in best_fit(lengths, row_tokens))]


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the texts of a row are; handed through the model to every attention layer."""

    starts: tuple[int, ...]
    """First token of each text, and the end of the last one; what is behind it is padding."""
    bounds: Tensor | None = None
    """The same as int32 on the device, for kernels that read it there."""

    @property
    def longest(self) -> int:
        return max(stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False))


def _window(module: nn.Module, given: int | None) -> int | None:
    """Keys that a token sees, itself included; None for all before it. Phi3 hands its own on, others have it in the module."""
    window = given if given is not None else getattr(module, "sliding_window", None)
    return window if isinstance(window, int) else None


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """torch's scaled dot product attention, one call a text. query [B, heads, row, D] -> [B, row, heads, D].

    `documents` None: each row is one text. Pieces come from `split` and go into `cat`: with slices and writes into one
    tensor the gradient is copied whole for each text, and backward takes 1.3 to 2.2 times as long (14 to 42 texts, CPU).
    """
    window, grouped = _window(module, sliding_window), query.shape[1] != key.shape[1]
    starts = (0, query.shape[2]) if documents is None else documents.starts
    lengths = [stop - start for start, stop in pairwise(starts)]
    padding = query.shape[2] - sum(lengths)
    parts = []
    pieces = [torch.split(x, [*lengths, padding], dim=2)[: len(lengths)] for x in (query, key, value)]
    for q, k, v in zip(*pieces, strict=True):
        if window is None or q.shape[2] <= window:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped, dropout_p=dropout)
            parts.append(found.transpose(1, 2))
            continue
        step = max(64, min(window, 1024))
        for first in range(0, q.shape[2], step):  # a block of queries and the keys that one of them sees
            last, low = min(first + step, q.shape[2]), max(0, first - window + 1)
            mask = _band(last - first, last - low, window, query.device)
            block = q[:, :, first:last], k[:, :, low:last], v[:, :, low:last]
            found = F.scaled_dot_product_attention(*block, attn_mask=mask, scale=scaling, enable_gqa=grouped, dropout_p=dropout)
            parts.append(found.transpose(1, 2))
    if padding:
        parts.append(query.new_zeros(len(query), padding, query.shape[1], value.shape[3]))
    return torch.cat(parts, dim=1), None


@functools.lru_cache(maxsize=64)
def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] of bool: the last query sees the last `window` keys, each one before it one place earlier."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) & (back < window)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """torch's variable-length flash attention, one call a row; CUDA, 16-bit types. Shapes as in `documents_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    window, end = _window(module, sliding_window), documents.starts[-1]
    assert documents.bounds is not None
    q, k, v = (x[0].transpose(0, 1)[:end] for x in (query, key, value))  # [tokens, heads, D]
    found = varlen_attn(
        q, k, v, documents.bounds, documents.bounds, documents.longest, documents.longest,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
        num_splits=1,  # a text's bits do not depend on the longest one beside it
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return F.pad(found, (0, 0, 0, 0, 0, query.shape[2] - end))[None], None


_KERNELS: dict[Attention, Callable[..., tuple[Tensor, None]]] = {"documents": documents_attention, "varlen": varlen_attention}
# Under names of our own, and without a mask function: transformers then makes no mask, and each kernel above sees to it.
for _name, _kernel in _KERNELS.items():
    AttentionInterface.register(f"sn29_{_name}", _kernel)


def attention_times(model: PreTrainedModel, row_tokens: int, times: int = 5) -> dict[Attention, float]:
    """Seconds of each kernel that runs on this device for one layer of a row of four texts: medians after a warm-up."""
    config, device = model.config, model.device
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    shapes = [(1, row_tokens, count, size) for count in (heads, groups, groups)]
    q, k, v = (torch.randn(shape, device=device, dtype=model.dtype).transpose(1, 2) for shape in shapes)
    starts = tuple(row_tokens * part // 16 for part in (0, 1, 3, 7, 16))
    documents = Documents(starts, torch.tensor(starts, dtype=torch.int32, device=device))
    found: dict[Attention, float] = {}
    for name, kernel in _KERNELS.items():
        taken = []
        try:
            for _ in range(times + 2):
                _synchronize(device)
                begun = time.perf_counter()
                kernel(nn.Identity(), q, k, v, None, documents=documents, sliding_window=getattr(config, "sliding_window", None))
                _synchronize(device)
                taken.append(time.perf_counter() - begun)
        except (RuntimeError, NotImplementedError, ImportError):
            continue  # not for this device, type or size of head
        found[name] = statistics.median(taken[2:])
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the engine -------------------------------------------------------------------------------------------------------


def profile_for(model: PreTrainedModel, *, row_tokens: int = 0, compiled: bool | None = None) -> Profile:
    """The fastest way for this model on its device, from the model and the machine alone; `row_tokens` 0: the device's own.

    On a CPU the loop over texts is the only kernel (FlexAttention is half as fast and takes 50 s to compile, varlen is for
    GPUs). On CUDA what runs is measured, and variable-length attention is left only for something 10% faster: validators
    with equal devices shall come to the same choice.
    """
    device = model.device
    row_tokens = row_tokens or ROW_TOKENS[device.type]
    attention: Attention = "documents"
    if device.type == "cuda":
        seconds = attention_times(model, row_tokens)
        if seconds.get("varlen", math.inf) <= 1.1 * seconds["documents"]:
            attention = "varlen"
    tiles = tiles_for(device, model.get_output_embeddings().weight.shape[0], compiled=compiled)
    return Profile(row_tokens, tiles, attention)


def refusal(model: PreTrainedModel) -> str:
    """Why this model cannot be packed exactly; "" when it can. Its texts are then evaluated by the plain twin.

    Models of other families than ours are tried on two short texts: packed and plain must agree.
    """
    config, head = model.config, model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"its output layer is {type(head).__name__}, not one linear layer"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {table.get("rope_type", "default") for table in ([rope] if "rope_type" in rope else rope.values()) if table}
    if not kinds <= set(_STATIC_ROPE):
        return f"its rotary positions ({', '.join(sorted(kinds - set(_STATIC_ROPE)))}) depend on the longest text of a call"
    if type(model).__name__ in _PLAIN_HEADS:
        return ""
    if not getattr(model, "_supports_attention_backend", False) or model.base_model is model:
        return "it does not take its attention from transformers' interface"
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(isinstance(window, int) and window > _SEEN_WINDOW for window in windows):
        return "its window is wider than a short trial can show"
    return _disagreement(model)


_SEEN_WINDOW = 16
"""Tokens; well below the two texts of the trial."""


def _disagreement(model: PreTrainedModel) -> str:
    """What differs when two short texts are evaluated packed and plain; "" when nothing does beyond rounding."""
    texts = [[n % model.config.vocab_size for n in range(3, 3 + length)] for length in (23, 37)]
    tiles = tiles_for(model.device, 1, compiled=False)
    profile = Profile(64, Tiles(64, min(4096, model.config.vocab_size), tiles.compiled), "documents")
    limit = 1e-5 if model.dtype == torch.float32 else 0.02
    try:
        found = _packed(model, texts, 0, profile, _unwatched)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"packed, it ends in {type(error).__name__}: {str(error)[:120]}"
    plain = engine.all_nats(model, texts, 0)
    if all(abs(a - b) <= limit * abs(b) for a, b in zip(found, plain, strict=True)):
        return ""
    return f"packed, it gives {found} where it gives {plain} one by one"


def _unwatched(_: str) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


def all_nats_packed(
    model: PreTrainedModel,
    samples: Sequence[Sequence[int]],
    start_token: int,
    *,
    profile: Profile | None = None,
    threads: int = 1,
    watch: Watch = _unwatched,
    head: MakeHead = TiledHead,
) -> list[float]:
    """As `engine.all_nats`: nats of each sample behind the start token, +inf where it is not finite, 0 for an empty one.

    `profile` None: the fastest one (`profile_for`). Losses are comparable to the bit within one profile, to 1e-7 relative
    in float32 and 1e-4 in bfloat16 between profiles; `threads`, on a CPU, moves no bit. A model that cannot be packed
    exactly goes to the plain twin. With another `head`, the sums of what that says of each position.
    """
    if head is TiledHead and refusal(model):
        return engine.all_nats(model, samples, start_token)
    return _packed(model, samples, start_token, profile or profile_for(model), watch, threads, head)


def _packed(
    model: PreTrainedModel,
    samples: Sequence[Sequence[int]],
    start_token: int,
    profile: Profile,
    watch: Watch,
    threads: int = 1,
    head: MakeHead = TiledHead,
) -> list[float]:
    rows = pack([len(ids) for ids in samples], profile.row_tokens)
    lane = _Lane(model, samples, start_token, profile, watch, head)
    with _attention_of(model, f"sn29_{profile.attention}"), _one_thread_an_operation(model.device):
        if model.device.type != "cpu" or min(threads, len(rows)) < 2:
            found = lane.run(iter(rows))
        else:
            found = {}
            left = iter(rows)  # of a list: next() is one step of the interpreter, so no row is taken twice
            with ThreadPoolExecutor(min(threads, len(rows))) as pool:
                for part in [pool.submit(lane.run, left) for _ in range(threads)]:
                    found.update(part.result())
    return [found.get(number, 0.0) for number in range(len(samples))]


@dataclass(frozen=True, slots=True)
class _Lane:
    """What one thread does: rows, one after the other, through the layers, and what comes out through a head of its own."""

    model: PreTrainedModel
    samples: Sequence[Sequence[int]]
    start_token: int
    profile: Profile
    watch: Watch
    head: MakeHead

    @torch.inference_mode()
    def run(self, rows: Iterator[Row]) -> dict[int, float]:
        """Nats by the samples' numbers."""
        device, layer, taken = self.model.device, self.model.get_output_embeddings(), []
        if device.type == "cpu":
            torch.set_num_threads(1)  # torch keeps it for each thread
        head = self.head(layer.weight, layer.bias, self.profile.tiles)
        for row in rows:
            taken.append(row)
            texts = [self.samples[number] for number in row.samples]
            ids, positions, asked, documents = _tensors_of(texts, row.size, self.start_token, device)
            with self.watch("body"):
                hidden = self.model.base_model(
                    input_ids=ids, position_ids=positions, use_cache=False, documents=documents
                ).last_hidden_state
            with self.watch("head"):
                head.add(hidden[0, : len(asked)], asked)
        with self.watch("head"):
            per_token = head.finish()
        return _sums(per_token.cpu(), taken, [len(ids) for ids in self.samples])


def _sums(per_token: Tensor, rows: Sequence[Row], lengths: Sequence[int]) -> dict[int, float]:
    """Each sample's sum in float64, in the order of its tokens."""
    found, at = {}, 0
    for row in rows:
        for number in row.samples:
            nats = float(per_token[at : at + lengths[number]].double().sum())
            found[number] = nats if math.isfinite(nats) else math.inf
            at += lengths[number]
    return found


def _tensors_of(
    texts: Sequence[Sequence[int]], size: int, start_token: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """ids [1, size], positions [1, size], asked [tokens] without the padding, and where the texts are."""
    seen = [token for ids in texts for token in (start_token, *ids[:-1])]
    positions = [place for ids in texts for place in range(len(ids))]
    starts = (0, *_running(len(ids) for ids in texts))
    padding = [0] * (size - len(seen))
    both = torch.tensor([seen + padding, positions + padding]).to(device)
    asked = torch.tensor([token for ids in texts for token in ids]).to(device)
    bounds = torch.tensor(starts, dtype=torch.int32).to(device) if device.type == "cuda" else None
    return both[:1], both[1:], asked, Documents(starts, bounds)


@contextlib.contextmanager
def _one_thread_an_operation(device: torch.device) -> Iterator[None]:
    """On a CPU no operation is cut among threads: rows are.

    torch cuts an elementwise operation into one piece a thread. Where a piece ends inside a vector, the values left over go
    through scalar code, whose exp, cos and tanh differ in the last bit: with 3 threads, up to 23% of losses then moved with
    the order of the samples. And a process without threads of its own can be forked.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _running(lengths: Iterator[int]) -> Iterator[int]:
    total = 0
    for length in lengths:
        total += length
        yield total


@contextlib.contextmanager
def _attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model's attention layers use this kernel inside the block, and their own again behind it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
