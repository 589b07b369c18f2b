"""`sn29 data stats`: how long documents are, what share of the tokens long ones hold, and what packing does to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.errors import Reason, Rejected
from sn29.lab_commands.inputs import new_table, write_picture

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sn29.corpus import TextSource
    from sn29.hub import Hub
    from sn29.lab.lengths import Lengths, Repetition
    from sn29.models.tokenizer import Tokenizer
    from sn29.rules.competition import Competition
    from sn29.settings import DataSettings, DataStatsSettings

BATCH = 256
"""Documents that are tokenised together."""
TOGETHER = "together"
"""Name of all sources."""
BAR = 10
"""Characters of the longest bar."""


@dataclass(frozen=True, slots=True)
class Read:
    """Documents of one source, in the order in which they were read."""

    name: str
    lengths: list[int]
    """Tokens of each; those without one are left out."""
    contents: list[int]
    """Of each, 64 bits of a hash of its text: among 10 million different ones two agree once in 400,000 cases."""
    is_all: bool
    """The source has no more."""


def data_stats(words: list[str]) -> int:
    """Always 0: lengths are neither right nor wrong."""
    from sn29.settings import DataStatsSettings, read

    settings = read(DataStatsSettings, words)
    if settings.evenly_tokens and settings.max_documents:
        got, limit = f"--max-documents {settings.max_documents}", "--max-documents 0: epochs are of all documents"
        raise Rejected(Reason.SETTING, got, limit, "--evenly-tokens")
    tokenizer, found = read_sources(settings)
    from sn29.lab.lengths import measure

    measured = [
        (each, measure(each.lengths, each.contents, row_tokens=settings.row_tokens, evenly_tokens=settings.evenly_tokens))
        for each in found
    ]
    unit = "token" if tokenizer else "byte"
    if settings.picture is not None:
        write_picture(settings.picture, _picture(*measured[-1], unit))
    if settings.json_output:
        print(json.dumps([_as_json(each, about, unit) for each, about in measured], indent=1))
    else:
        _show(measured, unit, settings)
    return 0


# ---- what is looked at -----------------------------------------------------------------------------------------------


def read_sources(settings: DataSettings) -> tuple[Tokenizer | None, list[Read]]:
    """(what counts tokens, None for bytes; each source, and last all of them together where there are several).

    Raises Rejected, Unavailable.
    """
    tokenizer, sources = _opened(settings)
    found = [_read(name, source, tokenizer, settings) for name, source in sources]
    return tokenizer, [*found, *([_together(found)] if len(found) > 1 else [])]


def _opened(settings: DataSettings) -> tuple[Tokenizer | None, list[tuple[str, TextSource]]]:
    """(what counts tokens, None for bytes; (name, source) of everything that is looked at). Raises Rejected, Unavailable."""
    from sn29.hub import Hub
    from sn29.models.tokenizer import Tokenizer

    hub = Hub(settings.hub_endpoint)
    competition = _competition(settings)
    if not settings.sources and competition is None:
        raise Rejected(Reason.SETTING, "no source", "a folder, a file, hub:NAMESPACE/NAME@REVISION or --competition", "SOURCE")
    sources = [(word, _source(word, settings, hub)) for word in settings.sources]
    path = settings.tokenizer
    if competition is not None:
        sources += _sources_of(competition, settings, hub)
        path = path or _tokenizer_of(competition, hub)
    return (None if path is None else Tokenizer.load(path)), sources


def _source(word: str, settings: DataSettings, hub: Hub) -> TextSource:
    from neurons.training import parse_source

    found = parse_source(word, hub, "SOURCE")
    return replace(found, pattern=found.pattern or settings.pattern, column=settings.column or found.column)


def _competition(settings: DataSettings) -> Competition | None:
    if not settings.competition:
        return None
    from neurons.adapters import read_competitions
    from neurons.miner import chosen

    return chosen(read_competitions(settings.competitions_dir)[0], settings.competition)


def _sources_of(competition: Competition, settings: DataSettings, hub: Hub) -> Iterator[tuple[str, TextSource]]:
    from neurons.adapters import dataset_of
    from sn29.corpus import TextSource

    opened = dataset_of(hub, settings.competitions_dir)
    for number, dataset in enumerate(competition.datasets):
        pattern, column = settings.pattern or dataset.files, settings.column or dataset.column
        yield f"{competition.name} {pattern}", TextSource(opened(competition, number), pattern, column)


def _tokenizer_of(competition: Competition, hub: Hub) -> Path | None:
    """The competition's, fetched and checked; None where it has none of its own."""
    from neurons.adapters import Tokenizers
    from sn29.rules.competition import tokenizer_for
    from sn29.settings import default_cache

    prescribed = tokenizer_for(competition, has_own=False)
    return None if prescribed is None else Tokenizers(hub, default_cache() / "tokenizers")(prescribed).path


def _read(name: str, source: TextSource, tokenizer: Tokenizer | None, settings: DataSettings) -> Read:
    """Reads on to the end or to --max-documents, with progress on standard error."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sn29.corpus import one_pass, spread

    lengths: list[int] = []
    contents: list[int] = []
    texts = spread(source, settings.seed) if settings.max_documents else one_pass(source, settings.seed)
    looked_at = islice(texts, settings.max_documents or None)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=settings.max_documents or None)
        while batch := list(islice(looked_at, BATCH)):
            ids = tokenizer.encode_batch(batch) if tokenizer else [text.encode() for text in batch]
            for text, tokens in zip(batch, ids, strict=True):
                if tokens:
                    lengths.append(len(tokens))
                    contents.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))
            told = f"{name}: {len(lengths):,} documents, {sum(lengths):,} {'tokens' if tokenizer else 'bytes'}"
            progress.update(task, completed=len(lengths), description=told)
    if not lengths:
        raise Rejected(Reason.DATASET, "no document", "at least one", name)
    return Read(name, lengths, contents, not settings.max_documents or next(texts, None) is None)


def _together(parts: Sequence[Read]) -> Read:
    """One after another: what is a duplicate across sources is one too."""
    lengths = [length for part in parts for length in part.lengths]
    return Read(TOGETHER, lengths, [one for part in parts for one in part.contents], all(part.is_all for part in parts))


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _show(measured: Sequence[tuple[Read, Lengths]], unit: str, settings: DataStatsSettings) -> None:
    from rich.console import Console

    console = Console()
    for each, about in measured:
        _head(console, each, about, unit)
        for make in (_histogram, _quantiles, _longer, _evenly, _packing):
            console.print(make(about, unit), "")
        worn = [name for name, repetition in zip(evenly_names(about.evenly), about.evenly, strict=True) if repetition.is_worn]
        if worn:
            told = "seen more than 4 times when drawn evenly, after which text is worth less and less (Muennighoff et al. 2023)"
            console.print(f"warning: {told}: {', '.join(worn)}", highlight=False, soft_wrap=True)
    if settings.picture is not None:
        console.print(f"The histogram: {settings.picture}", highlight=False, markup=False, soft_wrap=True)


def _as_json(each: Read, about: Lengths, unit: str) -> dict[str, object]:
    return {"source": each.name, "is_all": each.is_all, "unit": unit, **asdict(about)}


def _head(console: Console, each: Read, about: Lengths, unit: str) -> None:
    scope = "all of it" if each.is_all else "a part: row groups drawn over all files"
    if each.name == TOGETHER and not each.is_all:
        scope = "as much of each source as was read, whatever it has"
    repeated = about.duplicates
    within = "" if each.is_all else ", looked for within this part alone"
    lines = (
        f"\n{each.name} ({scope})",
        f"{about.documents:,} documents, {about.tokens:,} {unit}s, {about.mean:,.0f} a document, the longest {about.longest:,}",
        f"exact duplicates: {repeated.count:,} documents ({repeated.documents:.2%}) with {repeated.tokens:.2%} of the {unit}s"
        f"{within}",
    )
    console.print("\n".join(lines), end="\n\n", highlight=False, markup=False, soft_wrap=True)


def _histogram(about: Lengths, unit: str) -> Table:
    table = new_table(f"{unit}s", "documents", "share", "", f"their {unit}s", "share", "")
    table.columns[3].justify = table.columns[6].justify = "left"
    for bucket in about.buckets:
        documents, tokens = bucket.documents / about.documents, bucket.tokens / about.tokens
        table.add_row(
            f"{bucket.low:,} to {bucket.high - 1:,}", f"{bucket.documents:,}", f"{documents:.1%}", _bar(documents),
            f"{bucket.tokens:,}", f"{tokens:.1%}", _bar(tokens),
        )  # fmt: skip
    return table


def _quantiles(about: Lengths, unit: str) -> Table:
    table = new_table("share", "of documents: no longer than", f"of {unit}s: in ones no longer than")
    for q in about.quantiles:
        table.add_row(f"{q.share:.0%}", f"{q.by_documents:,}", f"{q.by_tokens:,}")
    return table


def _longer(about: Lengths, unit: str) -> Table:
    table = new_table("longer than", "of the documents", f"of the {unit}s")
    for longer in about.longer:
        table.add_row(f"{longer.limit:,}", f"{longer.documents:.1%}", f"{longer.tokens:.1%}")
    return table


def _evenly(about: Lengths, unit: str) -> Table:
    table = new_table("drawn evenly", f"epochs of {about.evenly_tokens:,} {unit}s")
    for name, repetition in zip(evenly_names(about.evenly), about.evenly, strict=True):
        table.add_row(name, f"{repetition.epochs:,.2f}")
    return table


def evenly_names(found: Sequence[Repetition]) -> list[str]:
    """`below 512`, `512 to 1,023`, and so on."""
    return [f"{r.low:,} to {r.high - 1:,}" if number else f"below {r.high:,}" for number, r in enumerate(found)]


def _packing(about: Lengths, unit: str) -> Table:
    table = new_table(f"rows of {about.row_tokens:,} {unit}s", "left out", "padding", "without their beginning")
    for loss in about.packing:
        table.add_row(loss.how, f"{loss.left_out:.1%}", f"{loss.padded:.1%}", f"{loss.severed:.1%}")
    return table


def _bar(share: float) -> str:
    return "█" * round(share * BAR) or ("▏" if share else "")


def _picture(each: Read, about: Lengths, unit: str) -> str:
    from sn29.report import pictures

    names = [_short(bucket.low) for bucket in about.buckets]
    documents = [bucket.documents / about.documents for bucket in about.buckets]
    tokens = [bucket.tokens / about.tokens for bucket in about.buckets]
    alt = f"{each.name}: {about.documents:,} documents and their {about.tokens:,} {unit}s by the document's length"
    return pictures.standalone(pictures.lengths(names, documents, tokens, alt))


def _short(number: int) -> str:
    """4,096 as 4k."""
    return f"{number // 1024}k" if number >= 1024 else str(number)
