"""`sn29 lab vocab stats`: what a text uses of a vocabulary, and what the rest holds of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.errors import Reason, Rejected
from sn29.lab_commands.inputs import check_place, new_table, say

if TYPE_CHECKING:
    from rich.table import Table

    from sn29.lab.vocabulary import Used, Vocabulary
    from sn29.lab_commands.inputs import OpenText
    from sn29.lab_settings import LabVocabStatsSettings
    from sn29.models.config import ModelConfig
    from sn29.models.tokenizer import Tokenizer

AT_ONCE = 256
"""Documents that are tokenised together."""
SEEDS_SHARE = 0.2
"""Of a 100k vocabulary: what the text that this project began with took for never used."""


@dataclass(frozen=True, slots=True)
class Held:
    """Rows of embedding and head."""

    what: str
    rows: int
    parameters: int
    share: float
    """Of the model."""


def stats(words: list[str]) -> int:
    """Always 0: that tokens do not occur is neither right nor wrong."""
    from sn29.lab_settings import LabVocabStatsSettings
    from sn29.settings import read

    settings = read(LabVocabStatsSettings, words)
    from sn29.lab.vocabulary import Usage, Vocabulary, used

    if settings.picture is not None:
        check_place(settings.picture)
    folder, config = _model(settings)
    vocabulary, tokenizer = Vocabulary.read(_tokenizer(settings, folder))
    if config is not None and config.number("vocab_size") < vocabulary.num_ids:
        raise Rejected(Reason.VOCABULARY, config.number("vocab_size"), f"at least {vocabulary.num_ids}", "vocab_size")
    opened = open_corpus(settings.source, settings.hub_endpoint)
    usage = Usage(vocabulary)
    for texts, ids in encoded(opened, tokenizer, settings.seed, settings.max_documents):
        usage.add(ids, sum(len(text.encode()) for text in texts))
    found = used(vocabulary, usage)
    held = _held(found, vocabulary, config, settings)
    if settings.picture is not None:
        _draw(settings.picture, found, opened.name)
    if settings.json_output:
        print(json.dumps(_as_json(found, held, opened.name, usage.documents), indent=1))
    else:
        _show(found, held, opened.name, usage.documents, settings)
    return 0


# --- what is looked at ------------------------------------------------------------------------------------------------


def open_corpus(source: str, hub_endpoint: str, flag: str = "SOURCE") -> OpenText:
    """As `open_text`; by default all text of the packages, not its eval part alone."""
    from sn29.lab_commands.inputs import open_text

    opened = open_text(source, hub_endpoint, flag)
    return opened if source else replace(opened, source=replace(opened.source, pattern=""))


def encoded(opened: OpenText, tokenizer: Tokenizer, seed: int, count: int = 0) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Texts and ids of `count` documents (0: all), some at a time, with progress. Raises Rejected, Unavailable."""
    from sn29.lab_commands.inputs import progress, some_texts

    texts = some_texts(opened, count, seed)
    done = tokens = 0
    with progress(opened.name) as report:
        while batch := list(islice(texts, AT_ONCE)):
            ids = tokenizer.encode_batch(batch)
            yield batch, ids
            done, tokens = done + len(batch), tokens + sum(map(len, ids))
            report(done, count)
    if not tokens:
        raise Rejected(Reason.DATASET, "no token", "at least one", opened.name)


def _model(settings: LabVocabStatsSettings) -> tuple[Path | None, ModelConfig | None]:
    """(folder of --model, its checked config); both None without one."""
    from sn29.lab_commands.inputs import local_path, model_folder
    from sn29.models.config import parse_config

    if not settings.model:
        return None, None
    path = local_path(settings.model)
    if path.is_file():
        return path.parent, parse_config(path.read_bytes())
    folder, _ = model_folder(settings.model, settings.hub_endpoint, settings.work_dir)
    if not (folder / "config.json").is_file():
        raise Rejected(Reason.MISSING_FILE, "no config.json", "a model's folder", settings.model)
    return folder, parse_config((folder / "config.json").read_bytes())


def _tokenizer(settings: LabVocabStatsSettings, folder: Path | None) -> Path:
    """--tokenizer, the one beside --model, or GPT-4's of the packages."""
    if settings.tokenizer is not None:
        return settings.tokenizer
    if folder is not None:
        if not (folder / "tokenizer.json").is_file():
            raise Rejected(Reason.SETTING, "no tokenizer.json beside the model", "a tokenizer.json", "--tokenizer")
        return folder / "tokenizer.json"
    import sys

    from sn29.localnet import text
    from sn29.settings import default_cache

    return text.build(default_cache(), lambda what: print(f"  {what}", file=sys.stderr)).gpt4 / "tokenizer.json"


def _held(found: Used, vocabulary: Vocabulary, config: ModelConfig | None, settings: LabVocabStatsSettings) -> tuple[Held, ...]:
    from sn29.lab.vocabulary import parameters_of_rows

    if config is None:
        rows, total, one = vocabulary.num_ids, settings.parameters, 2 * settings.hidden_size
    else:
        from math import prod

        from sn29.models.config import expected_tensors

        rows, one = config.number("vocab_size"), parameters_of_rows(config, 1)
        total = sum(map(prod, expected_tensors(config).values()))
    empty = rows - len(vocabulary)
    named = (
        ("all rows", rows),
        ("never seen", found.never),
        ("of these may go", found.prunable),
        ("rows without an entry", empty),
        ("may go together", found.prunable + empty),
    )
    return tuple(Held(what, count, count * one, count * one / total) for what, count in named)


# --- what is shown ----------------------------------------------------------------------------------------------------


def _as_json(found: Used, held: Sequence[Held], name: str, documents: int) -> dict[str, object]:
    pace = {"per_doubling": found.per_doubling, "bytes_until_20_percent": found.bytes_until(SEEDS_SHARE)}
    about = {"source": name, "documents": documents, "never": found.never, "prunable": found.prunable}
    return {**about, **asdict(found), **pace, "held": [asdict(each) for each in held]}


def _show(found: Used, held: Sequence[Held], name: str, documents: int, settings: LabVocabStatsSettings) -> None:
    from rich.console import Console

    console = Console()
    size = bytes_shown(found.curve[-1].num_bytes)
    say(console, f"\n{name}: {documents:,} documents, {size}, {found.tokens:,} tokens")
    say(console, f"vocabulary: {found.types:,} types, {found.added:,} added tokens that no text is made of", "")
    for make in (_curve, _kinds, _coverage, _rare):
        console.print(make(found), "")
    if found.per_doubling:
        told = f"with each doubling of the text {100 * found.per_doubling:.1f} points less are never seen"
        until = found.bytes_until(SEEDS_SHARE)
        say(console, told + (f"; at that pace it is {SEEDS_SHARE:.0%} at {bytes_shown(until)}" if until else ""), "")
    model = settings.model or f"an untied model of {settings.parameters:.3g} parameters, {settings.hidden_size:,} wide"
    say(console, f"Parameters in embedding and head of {model}:")
    console.print(_parameters(held))
    say(console, f"{found.needed:,} types that are never seen have to stay: bytes, letters, and parts on the way to what is seen")
    if settings.picture is not None:
        say(console, f"The curve: {settings.picture}")


def _curve(found: Used) -> Table:
    shown = new_table("text", "documents", "tokens", "types seen", "never seen", "share", "new of a million tokens")
    for at, point in enumerate(found.curve):
        never = found.types - point.seen
        shown.add_row(
            bytes_shown(point.num_bytes), f"{point.documents:,}", f"{point.tokens:,}", f"{point.seen:,}", f"{never:,}",
            f"{never / found.types:.1%}", f"{point.new_per_million:,.0f}" if at else "",
        )  # fmt: skip
    return shown


def _kinds(found: Used) -> Table:
    shown = new_table("made of", "types", "never seen", "share")
    for kind in found.kinds:
        shown.add_row(kind.kind, f"{kind.types:,}", f"{kind.never:,}", f"{kind.never / max(1, kind.types):.1%}")
    return shown


def _coverage(found: Used) -> Table:
    shown = new_table("of the tokens", "are of the commonest types", "of all types")
    for share, types in found.coverage:
        shown.add_row(f"{100 * share:g} %", f"{types:,}", f"{types / found.types:.1%}")
    return shown


def _rare(found: Used) -> Table:
    shown = new_table("seen at most", "types", "of all types", "their tokens of a million")
    for rare in found.rare:
        shown.add_row(
            "once" if rare.at_most == 1 else f"{rare.at_most:,} times",
            f"{rare.types:,}",
            f"{rare.types / found.types:.1%}",
            f"{rare.per_million:,.0f}",
        )
    return shown


def _parameters(held: Sequence[Held]) -> Table:
    shown = new_table("", "rows", "parameters", "of the model")
    for each in held:
        shown.add_row(each.what, f"{each.rows:,}", f"{each.parameters:,}", f"{each.share:.2%}")
    return shown


def bytes_shown(count: float) -> str:
    """14,160,192 as 14.2 MB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def _draw(path: Path, found: Used, name: str) -> None:
    from sn29.lab_commands.inputs import write_picture
    from sn29.report import pictures

    megabytes = [point.num_bytes / 1e6 for point in found.curve]
    shares = [100 * (1 - point.seen / found.types) for point in found.curve]
    alt = f"{name}: of {found.types:,} types {shares[-1]:.1f} % are never seen in {bytes_shown(found.curve[-1].num_bytes)}"
    write_picture(path, pictures.standalone(pictures.never_seen(megabytes, shares, alt)))
