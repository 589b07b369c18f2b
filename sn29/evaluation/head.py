"""-log p of asked tokens from hidden states, in tiles: the logits of a text never exist as a whole.

One pass over the vocabulary keeps three numbers a position: the highest logit so far, the sum of exp(logit - highest), and
the asked token's logit. 4,096 positions of a vocabulary of 100,000 need 3.1 GB as full float32 logits with their copies; a
tile of 1,024 x 2,048 needs 8 MB.

    hidden [rows, H] x weight [columns, H] -> one tile of logits [rows, columns], in the model's dtype
    folded into highest, total, target [rows], in float32, tiles always in the same order
    at the end       log(total) - (target - highest)      the same terms as log_softmax has

A tile always has the same shape, whatever is asked: positions are gathered until a tile is full, the last one is padded.
So each position's bits do not depend on what else is asked (tests/evaluation/test_head.py).
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sn29.evaluation.profile import Tiles as Tiles

Fold = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""fold(logits [rows, columns], place [rows], highest, total, target) -> the three, one tile further. `place` is the asked
token's column in this tile, below 0 or beyond the last column when it is in another one."""

MakeHead = Callable[[Tensor, Tensor | None, Tiles], "TiledHead"]
"""make(weight, bias, tiles): what an engine asks of each position; `TiledHead` itself, unless something else is wanted."""

_LOWEST = torch.finfo(torch.float32).min
"""Start of `highest`: finite, so that a tile of -inf adds exp(-inf) = 0 and not NaN."""
_FEW_COLUMNS = 16_384
"""Vocabularies below this fold in eager mode: the head is too small a part to pay the compiler (10 CPU seconds, once)."""


def tiles_for(device: torch.device, vocab_size: int, *, compiled: bool | None = None) -> Tiles:
    """The fastest measured cut for a vocabulary on a kind of device; `compiled` None: where a compiler is there and pays.

    It depends on the machine and the model, never on the samples. CPU, 100k vocabulary, bfloat16, against full logits:
    compiled 1,024 x 2,048 4.0x, eager 256 x 4,096 2.5x (performance.md, section 2).
    """
    if compiled is None:
        compiled = vocab_size >= _FEW_COLUMNS and has_compiler(device.type)
    if device.type == "cuda":
        return Tiles(1024, min(vocab_size, 1 << 15), compiled)
    return Tiles(1024, min(vocab_size, 2048), True) if compiled else Tiles(256, min(vocab_size, 4096), False)


@functools.cache
def has_compiler(device_type: str) -> bool:
    """What torch.compile needs on this kind of device: a C++ compiler, and Triton beside it on CUDA."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    return device_type == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def _fold(logits: Tensor, place: Tensor, highest: Tensor, total: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One tile further; see Fold."""
    columns = logits.shape[1]
    asked = logits.gather(1, place.clamp(0, columns - 1)[:, None])[:, 0].float()
    values = logits.float()
    higher = torch.maximum(highest, values.amax(1))
    total = total * torch.exp(highest - higher) + torch.exp(values - higher[:, None]).sum(1)
    return higher, total, torch.where((place >= 0) & (place < columns), asked, target)


_compiling = threading.Lock()


@functools.cache
def fold_for(tiles: Tiles, dtype: torch.dtype, device: torch.device, threads: int) -> tuple[Fold, str]:
    """The fold of this shape, and why it is not the compiled one if it was wanted and cannot be had ("" otherwise).

    A compiled fold is tried on one tile and compared with the eager one before it is trusted. It is made for the number of
    threads that torch has now: `threads` only names it.
    """
    if not tiles.compiled:
        return _fold, ""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    generator = torch.Generator(device).manual_seed(0)
    # No pool of processes beside a child whose processes are counted; one entry a shape, dtype and number of threads.
    alone, many = inductor.patch(compile_threads=1), dynamo.patch(recompile_limit=64)
    with torch.inference_mode(), _compiling, alone, many:
        logits = torch.randn((tiles.rows, tiles.columns), generator=generator, device=device).to(dtype)
        place = torch.arange(tiles.rows, device=device) * 7 % (2 * tiles.columns) - tiles.columns // 2
        compiled = torch.compile(_fold, dynamic=False, fullgraph=True)
        try:
            state = compiled(logits, place, *_start(tiles.rows, device))
        except (RuntimeError, OSError) as error:  # no headers, no writable folder, an unknown processor
            return _fold, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        expected = _fold(logits, place, *_start(tiles.rows, device))
    if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(state, expected, strict=True)):
        return _fold, "the compiled fold computes something else"
    return compiled, ""


def _start(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    lowest = torch.full((rows,), _LOWEST, device=device)
    return lowest, torch.zeros(rows, device=device), torch.zeros(rows, device=device)


class TiledHead:
    """The output layer of a model, asked for -log p of one token at each of any number of positions."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> None:
        """`weight` [V, H] and `bias` [V] or None stay where they are; nothing is copied."""
        self.tiles = tiles
        self._weight, self._bias = weight, bias
        self._fold, self.why_eager = fold_for(tiles, weight.dtype, weight.device, torch.get_num_threads())
        self._hidden = weight.new_zeros(tiles.rows, weight.shape[1])
        self._asked = torch.zeros(tiles.rows, dtype=torch.long, device=weight.device)
        self._filled = 0
        self._found: list[Tensor] = []

    @torch.inference_mode()
    def add(self, hidden: Tensor, asked: Tensor) -> None:
        """Positions: hidden states [n, H] and the ids [n] whose -log p is wanted. The n may be any number."""
        taken = 0
        while taken < len(asked):
            count = min(self.tiles.rows - self._filled, len(asked) - taken)
            into = slice(self._filled, self._filled + count)
            self._hidden[into] = hidden[taken : taken + count]
            self._asked[into] = asked[taken : taken + count]
            self._filled += count
            taken += count
            if self._filled == self.tiles.rows:
                self._flush()

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """-log p in nats, float32, of all positions in the order in which they were added; the head is empty again."""
        if self._filled:
            self._flush()
        found = torch.cat(self._found) if self._found else torch.zeros(0, device=self._weight.device)
        self._found = []
        return found

    def _flush(self) -> None:
        highest, total, target = _start(self.tiles.rows, self._weight.device)
        for column in range(0, len(self._weight), self.tiles.columns):
            upto = column + self.tiles.columns
            logits = F.linear(self._hidden, self._weight[column:upto], None if self._bias is None else self._bias[column:upto])
            if logits.shape[1] < self.tiles.columns:  # the last tile has the shape of all others: one compilation
                logits = F.pad(logits, (0, self.tiles.columns - logits.shape[1]), value=-torch.inf)
            highest, total, target = self._fold(logits, self._asked - column, highest, total, target)
        self._found.append((torch.log(total) - (target - highest))[: self._filled].clone())
        self._filled = 0
