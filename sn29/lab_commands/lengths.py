"""`sn29 lab lengths`: what there is of long text, and how often a training comes back to it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sn29.errors import Reason, Rejected
from sn29.lab_commands.inputs import new_table, say

if TYPE_CHECKING:
    from rich.table import Table

    from sn29.data_command import Read
    from sn29.lab.lengths import Context, Repetition, Scale
    from sn29.lab_settings import LabLengthsSettings

_FIRST = 512
"""Tokens of the shortest rows that are told of."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one source, or of all together. A token is a byte where no tokenizer is given."""

    source: str
    unit: str
    documents: int
    tokens: int
    """Looked at."""
    corpus_tokens: float
    """Of all of it."""
    training_tokens: float
    longest: int
    contexts: tuple[Context, ...]
    enough: int
    """Tokens of the longest rows whose text comes MAX_EPOCHS times at most; 0: none do."""
    asked: Context
    """Rows of --row-tokens."""
    evenly: tuple[Repetition, ...]
    repeated: float
    """Share of the tokens looked at that are in documents equal to an earlier one; they count as new text."""


def lengths(words: list[str]) -> int:
    """Always 0: lengths are neither right nor wrong."""
    from sn29.data_command import read_sources
    from sn29.lab_commands.inputs import check_place, write_picture
    from sn29.lab_settings import LabLengthsSettings
    from sn29.settings import read

    settings = read(LabLengthsSettings, words)
    if settings.picture is not None:
        check_place(settings.picture)
    packages = not settings.sources and not settings.competition
    tokenizer, found = read_sources(_of_packages(settings) if packages else settings)
    if packages:
        found = [replace(found[0], name="packages")]
    unit = "token" if tokenizer else "byte"
    sources = found[:-1] if len(found) > 1 else found
    scales = _scales(sources, settings)
    answers = [_answer(each, scale, settings, unit) for each, scale in zip(sources, scales, strict=True)]
    if len(found) > 1:  # a document of each stands for as many as its source says
        answers.append(_answer(found[-1], np.repeat(scales, [len(each.lengths) for each in sources]), settings, unit))
    if settings.picture is not None:
        write_picture(settings.picture, _picture(answers[-1]))
    if settings.json_output:
        print(json.dumps([_finite(asdict(answer)) for answer in answers], indent=1, allow_nan=False))
    else:
        _show(answers, settings)
    return 0


def _of_packages(settings: LabLengthsSettings) -> LabLengthsSettings:
    import sys

    from sn29.localnet import text
    from sn29.settings import default_cache

    folder = text.build(default_cache(), lambda what: print(f"  {what}", file=sys.stderr)).dataset
    return settings.model_copy(update={"sources": [str(folder)]})


def _scales(found: Sequence[Read], settings: LabLengthsSettings) -> list[float]:
    """How many times what was read of each source all of it is. Raises Rejected(SETTING) where that is not known."""
    given, flag = settings.corpus_tokens, "--corpus-tokens"
    if given and len(given) != len(found):
        names = ", ".join(each.name for each in found)
        raise Rejected(Reason.SETTING, f"{len(given)} numbers", f"one for each of {len(found)} sources: {names}", flag)
    scales = []
    for number, each in enumerate(found):
        total, all_of_it = sum(each.lengths), given[number] if given else 0.0
        if not each.is_all and not given:
            got = f"{len(each.lengths):,} documents of {each.name}, which has more"
            raise Rejected(Reason.SETTING, got, f"{flag} with what all of it has, or --max-documents 0")
        if given and not total <= all_of_it < math.inf:
            raise Rejected(Reason.SETTING, f"{all_of_it:,.0f}", f"{total:,} or more: so many were read of {each.name}", flag)
        scales.append(all_of_it / total if given else 1.0)
    return scales


def _answer(each: Read, scale: Scale, settings: LabLengthsSettings, unit: str) -> Answer:
    from sn29.lab.lengths import SHORT, buckets, contexts, drawn_evenly, duplicates, joined_below, longest_enough

    corpus = float((np.asarray(each.lengths) * scale).sum())
    tokens = settings.tokens or corpus
    rows = [_FIRST << n for n in range(max(1, max(each.lengths) // _FIRST).bit_length())]
    told = contexts(each.lengths, tokens, rows, scale=scale)
    enough = longest_enough(told)
    evenly = drawn_evenly(joined_below(buckets(each.lengths, scale), SHORT), tokens)
    (asked,) = contexts(each.lengths, tokens, [settings.row_tokens], scale=scale)
    return Answer(
        each.name, unit, len(each.lengths), sum(each.lengths), corpus, tokens, max(each.lengths), told,
        enough.row_tokens if enough else 0, asked, evenly, duplicates(each.lengths, each.contents).tokens,
    )  # fmt: skip


def _finite(value: Any) -> Any:
    """For JSON, which has no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- what is shown ----------------------------------------------------------------------------------------------------


def _show(answers: Sequence[Answer], settings: LabLengthsSettings) -> None:
    from rich.console import Console

    console = Console()
    for answer in answers:
        say(console, "", *_head(answer))
        console.print("", _contexts(answer), "", _evenly(answer), "")
        say(console, *_verdict(answer))
    if settings.picture is not None:
        say(console, f"The picture: {settings.picture}")


def _head(answer: Answer) -> tuple[str, ...]:
    unit, told = answer.unit, f"{answer.source}: {answer.documents:,} documents, {answer.tokens:,} {answer.unit}s"
    of = "" if answer.corpus_tokens == answer.tokens else f", which stand for {answer.corpus_tokens:,.0f}"
    again = f"{answer.repeated:.1%} of these {unit}s are in documents equal to an earlier one, and count as new text"
    return (
        f"{told}{of}, the longest {answer.longest:,}", *([again] if answer.repeated else []),
        f"a training of {answer.training_tokens:,.0f} {unit}s",
    )  # fmt: skip


def _contexts(answer: Answer) -> Table:
    unit = answer.unit
    table = new_table(
        f"rows of one document, {unit}s", f"share of the {unit}s", "seen", f"{unit}s of training at 4 times at most"
    )
    for each in answer.contexts:
        seen = f"{each.epochs:,.2f} times" if math.isfinite(each.epochs) else "not there"
        table.add_row(f"{each.row_tokens:,}", f"{each.share:.1%}", seen, f"{each.most:,.0f}")
    return table


def _evenly(answer: Answer) -> Table:
    from sn29.data_command import evenly_names

    table = new_table("a document's length, drawn evenly", "seen")
    for name, each in zip(evenly_names(answer.evenly), answer.evenly, strict=True):
        table.add_row(name, f"{each.epochs:,.2f} times{'  above 4' if each.is_worn else ''}")
    return table


def _verdict(answer: Answer) -> list[str]:
    from sn29.data_command import evenly_names

    asked, unit = answer.asked, answer.unit
    if answer.enough:
        said = [f"enough for rows of {answer.enough:,} {unit}s: their text comes 4 times at most"]
    elif not answer.contexts[0].tokens:
        said = [f"not enough for rows of {_FIRST} {unit}s: no document is as long"]
    else:
        said = [f"not enough for rows of {_FIRST} {unit}s: their text comes more than 4 times"]
    if not asked.is_enough:
        said.append(
            f"warning: rows of {asked.row_tokens:,} would see their text {asked.epochs:,.1f} times; it is enough for "
            f"{asked.most:,.0f} {unit}s of training; above 4 times a token is worth less and less (Muennighoff et al. 2023)"
            if math.isfinite(asked.epochs)
            else f"warning: no document is as long as a row of {asked.row_tokens:,}"
        )
    worn = [name for name, each in zip(evenly_names(answer.evenly), answer.evenly, strict=True) if each.is_worn]
    return [*said, *([f"warning: drawn evenly, these come more than 4 times: {', '.join(worn)}"] if worn else [])]


def _picture(answer: Answer) -> str:
    from sn29.lab.lengths import MAX_EPOCHS
    from sn29.report import pictures

    rows = [each.row_tokens for each in answer.contexts]
    names = [f"{row // 1024}k" if row >= 1024 else str(row) for row in rows]
    epochs = [each.epochs for each in answer.contexts]
    seen = f"a training of {answer.training_tokens:,.0f} {answer.unit}s sees the text of rows of each length"
    alt = f"{answer.source}: how often {seen}"
    return pictures.standalone(pictures.repetition(names, epochs, MAX_EPOCHS, f"{answer.unit}s of a row of one document", alt))
