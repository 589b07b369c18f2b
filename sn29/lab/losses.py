"""What a change of a model does to its losses: nats of documents, and the difference with an interval."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.evaluation.head import MakeHead, TiledHead, Tiles, tiles_for
from sn29.evaluation.packed import Profile, all_nats_packed, profile_for
from sn29.evaluation.profile import ROW_TOKENS
from sn29.evaluation.streamed import config_of, free_memory, needs_streaming, streamed_nats
from sn29.lab.compare import jackknife_interval
from sn29.lab.weights import Report, silent
from sn29.models import checkpoint
from sn29.models.config import ModelConfig
from sn29.training.study_results import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AT_ONCE = 32
"""Documents between two reports."""


def document_nats(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int = 2,
    memory_bytes: int = 0,
    report: Report = silent,
    head: MakeHead = TiledHead,
    finite: bool = True,
) -> list[float]:
    """Nats of each document behind the model's start token: the validators' rule, every token scored.

    A model that needs more than `memory_bytes` (0: than is free) is read layer by layer: the same losses to the bit on a CPU.
    Raises Rejected as `checkpoint.load`, Rejected(SETTING) as `check_ids`, Rejected(NOT_FINITE) for a loss, Unavailable when
    even layer by layer needs more memory. With another `head`, the sums of what that says of each position. Not `finite`: +inf
    for a document whose loss is no number, as validators have it, and no refusal.
    """
    config, kind = config_of(folder), getattr(torch, dtype)
    check_ids(documents, config.number("vocab_size"))
    memory_bytes = memory_bytes or free_memory(device)
    if (profile := layer_by_layer(config, documents, dtype, device, threads, memory_bytes)) is None:
        model = checkpoint.load(folder, dtype=kind, device=device)
        return of_model(model, documents, config.start_token, threads=threads, report=report, head=head, finite=finite)
    found = streamed_nats(
        folder, documents, config.start_token, profile=profile, memory_bytes=memory_bytes, dtype=kind, device=device,
        threads=threads, progress=report, head=head,
    )  # fmt: skip
    return _finite(found) if finite else found


def layer_by_layer(
    config: ModelConfig,
    documents: Sequence[Sequence[int]],
    dtype: str = "float32",
    device: str = "cpu",
    threads: int = 2,
    memory_bytes: int = 0,
) -> Profile | None:
    """How a model that needs more memory than `memory_bytes` (0: than is free) is evaluated; None: it fits as a whole.

    Raises Unavailable when even layer by layer needs more.
    """
    tiles = tiles_for(torch.device(device), config.number("vocab_size"), compiled=False)
    profile = Profile(ROW_TOKENS[torch.device(device).type], tiles, "documents")
    longest = max(map(len, documents), default=0)
    memory_bytes = memory_bytes or free_memory(device)
    return profile if needs_streaming(config, getattr(torch, dtype), profile, longest, memory_bytes, threads) else None


def of_model(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    start_token: int,
    *,
    threads: int = 2,
    report: Report = silent,
    head: MakeHead = TiledHead,
    finite: bool = True,
) -> list[float]:
    """The same for a model that is loaded. Raises Rejected(SETTING) as `check_ids`, Rejected(NOT_FINITE) for a loss."""
    check_ids(documents, model.config.vocab_size)
    profile = profile_for(model, compiled=False)
    found: list[float] = []
    for first in range(0, len(documents), _AT_ONCE):
        part = documents[first : first + _AT_ONCE]
        found += all_nats_packed(model, part, start_token, profile=profile, threads=threads, head=head)
        report(len(found), len(documents))
    return _finite(found) if finite else found


def check_ids(documents: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises Rejected(SETTING) for no document, and for a token that the model has no row for."""
    if not documents:
        raise Rejected(Reason.SETTING, "no document", "at least one", "--text")
    largest = max((max(ids) for ids in documents if ids), default=0)
    if largest >= vocab_size:
        raise Rejected(Reason.SETTING, f"token {largest}", f"ids below the model's {vocab_size}", "--tokenizer")


def _finite(found: list[float]) -> list[float]:
    wrong = next((number for number, nats in enumerate(found) if not math.isfinite(nats)), None)
    if wrong is not None:
        raise Rejected(Reason.NOT_FINITE, f"a loss of {found[wrong]} for document {wrong + 1}", "finite losses")
    return found


# --- what new tokens take ---------------------------------------------------------------------------------------------


@dataclass
class Taken:
    """What the rows of the head behind the first `rows` take from these: of each position log(1 + p_new / p_first), in nats.

    `head` for `document_nats`, which then gives the nats among the first rows alone; with `total` they are those among all.
    """

    rows: int
    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def head(self, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> TiledHead:
        return _FirstRows(self, weight, bias, tiles)

    def add(self, nats: Tensor) -> None:
        """[n] positions, float32."""
        with self._lock:  # each thread has a head of its own
            self.tokens += len(nats)
            self.total += float(nats.double().sum())
            self.largest = max(self.largest, float(nats.max()))


class _FirstRows(TiledHead):
    def __init__(self, taken: Taken, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> None:
        super().__init__(weight[: taken.rows], None if bias is None else bias[: taken.rows], tiles)
        self._taken, self._all = taken, (weight, bias)

    def _flush(self) -> None:
        filled, (weight, bias) = self._filled, self._all
        super()._flush()
        asked = (self._hidden * weight[self._asked]).sum(1) + (0.0 if bias is None else bias[self._asked])
        first = self._found[-1] + asked[:filled].float()  # log of the sum over the first rows
        others = torch.full_like(first, -torch.inf)
        for column in range(self._taken.rows, len(weight), self.tiles.columns):
            part = slice(column, column + self.tiles.columns)
            logits = F.linear(self._hidden[:filled], weight[part], None if bias is None else bias[part]).float()
            others = torch.logaddexp(others, logits.logsumexp(1))
        self._taken.add(torch.log1p(torch.exp(others - first)))


# --- differences ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """Losses of the same documents before and after."""

    before: float
    """Nats of all documents."""
    after: float
    percent: float
    """100 (after / before - 1)."""
    interval: Interval | None
    """Of `percent`, 95 % over documents, as `compare.jackknife_interval`."""
    largest: float
    """Of one document: the largest |after / before - 1|."""

    @property
    def relative(self) -> float:
        return self.after / self.before - 1

    @property
    def is_above_zero(self) -> bool:
        """All of the interval."""
        return self.interval is not None and self.interval.low > 0

    def is_within(self, percent: float) -> bool:
        """All of the interval, up and down; also where no document changes at all."""
        return not self.largest or (self.interval is not None and max(-self.interval.low, self.interval.high) <= percent)


def change(before: Sequence[float], after: Sequence[float]) -> Change:
    """The difference that a change made to the nats of documents, by document. Some of them have to have a loss."""
    sums = math.fsum(before), math.fsum(after)
    largest = max(abs(b / a - 1) for a, b in zip(before, after, strict=True) if a > 0)
    return Change(*sums, 100 * (sums[1] / sums[0] - 1), jackknife_interval(before, after), largest)
