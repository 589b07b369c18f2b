"""Rows for training from documents: one document a row, packed the common way, or packed with every document on its own.

    documents        [a a a a a] [b b] [c c c]                  S: start token, E: end token

    unpacked         S a a a a     S b     S c c                one document a row, shortest first
    packed           a a a a a E b b     E c c c E ...          one stream, cut every N tokens; attention crosses documents
    packed_masked    S a a a a|S b|. .   S c c|. . . . .        whole documents share a row, each with positions of its own

A row says for each of its tokens which one comes next, and whether that is counted. Pure functions on token lists: no
torch, no randomness; the order of rows is the trainer's to shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sn29.errors import Reason, Rejected
from sn29.evaluation.best_fit import best_fit

UNSCORED = -1
"""The target of a place that carries no loss."""


class Mode(StrEnum):
    """How documents become rows."""

    UNPACKED = "unpacked"
    PACKED = "packed"
    PACKED_MASKED = "packed_masked"


@dataclass(frozen=True, slots=True)
class Packing:
    """What decides the rows. Raises Rejected(SETTING) for numbers that no row can be made with."""

    mode: Mode
    row_tokens: int
    """N: tokens of a packed row; a row of one document, and a segment of a shared row, has at most so many."""
    end_token: int
    """EOS: stands between the documents of `packed`; elsewhere the last target of a document where `score_end`."""
    start_token: int | None
    """Stands in front of every document of `unpacked` and `packed_masked`, whose first token is scored then. None: it is
    not scored. `packed` has none: the EOS of the document before stands there."""
    score_end: bool
    """Whether EOS is the last target of a document. Validators never ask for it; in `packed` it always is one."""
    context: int
    """Tokens of what came before that a later piece of a long document sees again, unscored."""
    mask_first: bool = False
    """For the study: `packed`, but a document's first token carries no loss. Nothing is reset."""

    def __post_init__(self) -> None:
        if self.row_tokens < 1:
            raise Rejected(Reason.SETTING, f"rows of {self.row_tokens} tokens", "1 or more", "packing")
        if not 0 <= self.context < self.row_tokens:
            limit = f"0 to {self.row_tokens - 1}, less than a row of {self.row_tokens}"
            raise Rejected(Reason.SETTING, f"a context of {self.context} tokens", limit, "packing")
        if self.mask_first and self.mode is not Mode.PACKED:
            raise Rejected(Reason.SETTING, f"mask_first with {self.mode}", f"{Mode.PACKED} only", "packing")


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens that go through the model side by side."""

    ids: tuple[int, ...]
    """What the model sees."""
    targets: tuple[int, ...]
    """The next token at each place; UNSCORED where no loss is counted."""
    starts: tuple[int, ...]
    """First place of each segment, and the end of the last: attention and positions start anew there."""

    @property
    def useful(self) -> int:
        """Scored places."""
        return len(self.targets) - self.targets.count(UNSCORED)


Segment = tuple[tuple[int, ...], tuple[int, ...]]
"""(ids, targets) of a document or of a piece of one, of equal lengths."""


def rows(documents: Sequence[Sequence[int]], packing: Packing, carry: Sequence[int] = ()) -> tuple[list[Row], tuple[int, ...]]:
    """A pool of documents, without start and end tokens -> its rows, and what goes into the next pool's `carry`.

    Only `packed` carries anything. Documents without tokens, and those in which nothing is scored, make no row. Worked
    examples stand at the three functions below. Raises Rejected(SETTING) for a carry in another mode than `packed`.
    """
    if packing.mode is Mode.PACKED:
        return packed(documents, packing, carry)
    if carry:
        raise Rejected(Reason.SETTING, f"{len(carry)} tokens carried into {packing.mode}", "none", "packing")
    return (unpacked if packing.mode is Mode.UNPACKED else packed_masked)(documents, packing), ()


def unpacked(documents: Sequence[Sequence[int]], packing: Packing) -> list[Row]:
    """One document a row, shortest first, so that neighbours have like lengths; see `segments` for long ones.

        documents [5, 6, 7], [8, 9]; S = 1, N = 4      ids [1, 8]     targets [8, 9]       starts [0, 2]
                                                       ids [1, 5, 6]  targets [5, 6, 7]    starts [0, 3]
    """  # fmt: skip
    pieces = sorted(_all_segments(documents, packing), key=lambda piece: len(piece[0]))
    return [Row(ids, targets, (0, len(ids))) for ids, targets in pieces]


def packed(documents: Sequence[Sequence[int]], packing: Packing, carry: Sequence[int]) -> tuple[list[Row], tuple[int, ...]]:
    """Tokenise, join with EOS, cut at N: the common way. Attention and positions run across documents.

        documents [5, 6, 7], [8, 9], [10]; E = 2, N = 4        stream 5 6 7 2 8 9 2 10 2
        ids [5, 6, 7, 2]   targets [6, 7, 2, 8]    starts [0, 4]
        ids [8, 9, 2, 10]  targets [9, 2, 10, 2]   starts [0, 4]         carried: 2

    The ids are, row for row, those of subnet 9 (macrocosm-os/pretraining, `SubsetFalconLoader`: `buffer += ids + [eos]`,
    then `buffer[:N]` again and again). Its loss has N - 1 targets a row and so never asks for a row's first token; here
    the last place of a row is asked for it, and every token of the stream but the very first is scored once.
    With `mask_first` a place that holds EOS carries no loss: [6, 7, 2, UNSCORED] above.
    """
    stream = list(carry)
    for document in documents:
        if document:
            stream += document
            stream.append(packing.end_token)
    size, found = packing.row_tokens, []
    for at in range(0, len(stream) - size, size):
        ids, targets = tuple(stream[at : at + size]), tuple(stream[at + 1 : at + size + 1])
        if packing.mask_first:
            seen = zip(ids, targets, strict=True)
            targets = tuple(UNSCORED if token == packing.end_token else target for token, target in seen)
        found.append(Row(ids, targets, (0, size)))
    return found, tuple(stream[len(found) * size :])


def packed_masked(documents: Sequence[Sequence[int]], packing: Packing) -> list[Row]:
    """Documents share rows of at most N tokens, best fit, longest first; none is cut that a row can hold.

        documents [5, 6, 7], [8, 9], [10]; S = 1, N = 4        lengths 3, 2, 1
        ids [1, 5, 6, 1]  targets [5, 6, 7, 10]  starts [0, 3, 4]
        ids [1, 8]        targets [8, 9]         starts [0, 2]

    No padding: a row may be shorter than N. 1,000 documents of web lengths fill rows of 2,048 to 99.4%.
    """
    pieces = list(_all_segments(documents, packing))
    return [_joined([pieces[n] for n in numbers]) for numbers in best_fit([len(ids) for ids, _ in pieces], packing.row_tokens)]


def segments(document: Sequence[int], packing: Packing) -> list[Segment]:
    """A document as (ids, targets) of at most N places: one as a rule, several with context where it is longer.

        [5, 6, 7]; S = 1                 ids [1, 5, 6]     targets [5, 6, 7]
        ... with score_end, E = 2        ids [1, 5, 6, 7]  targets [5, 6, 7, 2]
        ... without start token          ids [5, 6]        targets [6, 7]

        [5, 6, 7, 8, 9, 10]; S = 1, N = 4, context 2
        ids [1, 5, 6, 7]     targets [5, 6, 7, 8]
        ids [6, 7, 8, 9]     targets [UNSCORED, UNSCORED, 9, 10]

    Each target is scored in exactly one piece. A later piece has no start token: it is not the start of a document.
    """
    front = () if packing.start_token is None else (packing.start_token,)
    whole = (*front, *document, *((packing.end_token,) if packing.score_end and document else ()))
    ids, targets = whole[:-1], whole[1:]
    if len(targets) <= packing.row_tokens:
        return [(ids, targets)] if targets else []
    found = [(ids[: packing.row_tokens], targets[: packing.row_tokens])]
    done = packing.row_tokens
    while done < len(targets):
        first = done - packing.context
        stop = min(first + packing.row_tokens, len(targets))
        found.append((ids[first:stop], (UNSCORED,) * packing.context + targets[done:stop]))
        done = stop
    return found


def _all_segments(documents: Sequence[Sequence[int]], packing: Packing) -> Iterator[Segment]:
    for document in documents:
        yield from segments(document, packing)


def _joined(pieces: Sequence[Segment]) -> Row:
    ids: list[int] = []
    targets: list[int] = []
    starts = [0]
    for seen, asked in pieces:
        ids += seen
        targets += asked
        starts.append(len(ids))
    return Row(tuple(ids), tuple(targets), tuple(starts))
