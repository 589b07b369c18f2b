"""Commands on a validator's store: check, compact, export. Check and export only read, beside a validator that runs."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sn29 import record_files
from sn29.errors import Reason, Rejected, Sn29Error
from sn29.round_record import CompetitionRecord, RoundRecord, decode
from sn29.settings import StoreCheckSettings, StoreCompactSettings, StoreExportSettings, make_folder, read
from sn29.store import Store, compact, no_store, reading

STORE = "store.db"
"""Name of the store in a validator's state folder."""


class Progress(Protocol):
    """Is told how far something is."""

    def __call__(self, what: str, done: int, of: int) -> None:
        """of: how many there are; 0 where nobody knows."""
        ...


# --- check ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at the store came to."""

    check: str
    is_fault: bool
    said: str


def _looked_at(folder: Path) -> AbstractContextManager[Store]:
    """Its store, beside a validator that may write it; on a read-only disk as it lies, because SQLite can put no files there."""
    return reading(folder / STORE, briefly=not os.access(folder, os.W_OK))


def check_store(words: list[str]) -> int:
    settings = read(StoreCheckSettings, words)
    with _looked_at(settings.state_dir) as store, store.snapshot(), _shown(quiet=settings.json_output) as progress:
        found = list(findings(store, settings.state_dir / record_files.FOLDER, progress))
    faults = [finding for finding in found if finding.is_fault]
    if settings.json_output:
        print(json.dumps({"whole": not faults, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        _print_table(
            ("", "check", "found"), [("FAULT" if f.is_fault else "ok", f.check, f.said) for f in found], str(settings.state_dir)
        )
    return 1 if faults else 0


def findings(store: Store, records: Path, progress: Progress) -> Iterator[Finding]:
    """Every look in its order. What can be explained by a round that is open, or by a file that was deleted, is no fault."""
    progress("pages of the file", 0, 0)
    faults = store.faults()
    said = f"{faults[0]}{f', and {len(faults) - 1} more' if len(faults) > 1 else ''}" if faults else "every page is whole"
    yield Finding("integrity", bool(faults), said)
    if faults:
        return
    opened = [kept.block for kept in store.open_rounds()]
    yield Finding("open rounds", False, f"of block {', '.join(map(str, opened))}" if opened else "none")
    references = _References(store)
    unreadable, strange, gone, blocks = [], [], 0, 0
    names = {path.name for path in records.glob("*.json")} if records.is_dir() else set[str]()
    for block, text in store.record_texts():
        progress("records", blocks, 0)
        blocks += 1
        try:
            record = decode(text, f"record of block {block}")
        except Rejected as error:
            unreadable.append(str(error))
            continue
        if record.head.block != block:
            strange.append(f"the round of block {block} has the record of block {record.head.block}")
        gone += f"{block}-{hashlib.sha256(text).hexdigest()[:16]}.json" not in names
        references.add(record)
    yield _counted("records in the store", unreadable + strange, f"{blocks} finished rounds, each with its own record")
    wrong = list(_wrong_files(records, progress))
    absent = f"; {gone} of {blocks} records have no file in it" if gone else ""
    yield _counted("record files", wrong, f"{len(names)} in {records}, each with the hash that it is named by{absent}")
    yield _counted("losses in the records", references.differing, f"{references.equal:,} cells are as they were recorded")
    foreign, imported, cells = references.foreign(progress)
    why = " (of a round that is open, or of models that were refused after they were measured)" if foreign else ""
    yield Finding("losses", False, f"{cells:,} cells, {imported:,} of them imported; no record refers to {foreign:,}{why}")
    for came in store.imports().values():
        said = f"{came.cells:,} losses of the round of block {came.block}, {came.checked:,} of them measured here as well"
        yield Finding("imported", False, f"{said}, from {came.source}")


def _counted(check: str, faults: Sequence[str], said: str) -> Finding:
    if not faults:
        return Finding(check, False, said)
    return Finding(check, True, f"{len(faults)}: {faults[0]}{'; ...' if len(faults) > 1 else ''}")


def _wrong_files(records: Path, progress: Progress) -> Iterator[str]:
    paths = sorted(records.glob("*.json")) if records.is_dir() else []
    for done, path in enumerate(paths):
        progress("files", done, len(paths))
        try:
            record_files.read(path)
        except Sn29Error as error:
            yield str(error)


class _References:
    """Which losses the records refer to, and whether they say the same."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_sample: dict[str, frozenset[str]] = {}  # sample -> contents; one set for all samples of a window
        self.equal = 0
        self.differing: list[str] = []

    def add(self, record: RoundRecord) -> None:
        for name, kept in record.competitions.items():
            contents = frozenset(m.outcome.content_id for m in kept.models if m.losses)
            for sample in kept.samples:
                known = self._by_sample.get(sample.id)
                self._by_sample[sample.id] = contents if known is None else known | contents
            self._compare(f"block {record.head.block}, {name}", kept)

    def _compare(self, where: str, kept: CompetitionRecord) -> None:
        for model in kept.models:
            ids = [sample.id for sample in kept.samples[: len(model.losses)]]
            known = self._store.nats(model.outcome.content_id, model.tokenizer_id, ids)
            for sample, nats in zip(ids, model.losses, strict=True):
                if nats in known.get(sample, (nats,)):
                    self.equal += sample in known
                else:
                    got = f"{known[sample][0]!r} nats in the store and {nats!r} in the record"
                    self.differing.append(f"{where}, {model.hotkey}, sample {sample}: {got}")

    def foreign(self, progress: Progress) -> tuple[int, int, int]:
        """(cells that no record refers to, imported ones, all)."""
        foreign = imported = cells = 0
        for cells, cell in enumerate(self._store.each_loss(), 1):
            if cells % 100_000 == 0:
                progress("losses", cells, 0)
            foreign += cell.content_id not in self._by_sample.get(cell.loss.sample, ())
            imported += cell.imported > 0
        return foreign, imported, cells


# --- compact ----------------------------------------------------------------------------------------------------------


def compact_store(words: list[str]) -> int:
    settings = read(StoreCompactSettings, words)
    from neurons.validator import alone

    path = settings.state_dir / STORE
    if not path.exists():
        raise no_store(path)
    rule = f"a folder that nothing works in; this is process {os.getpid()}"
    with alone(settings.state_dir, "a `sn29 store compact`", rule) as lock, _shown() as progress:
        owner = path.stat()
        with suppress(PermissionError):  # root, who may have made the lock just now, does not lock the validator out
            os.fchown(lock.fileno(), owner.st_uid, owner.st_gid)
        done = compact(path, settings.keep_rounds, lambda what: progress(what, 0, 0))
    if settings.json_output:
        print(json.dumps(asdict(done), indent=2))
        return 0
    print(f"{path}: {done.bytes_before:,} bytes before, {done.bytes_after:,} now")
    if settings.keep_rounds:
        print(f"forgotten: {done.rounds:,} rounds and {done.losses:,} losses; the files in {record_files.FOLDER}/ are all there")
    return 0


# --- export -----------------------------------------------------------------------------------------------------------

_KEY = {"round": (int, "block of the round"), "competition": (str, "its name"), "hotkey": (str, "whose, as an ss58 address")}
TABLES: Mapping[str, Mapping[str, tuple[type, str]]] = {
    "losses": {
        "content_id": (str, "sha256 hex over the model's files"),
        "tokenizer_id": (str, "fingerprint of the competition's tokenizer, or object id of the model's own"),
        "profile": (str, "everything else that decides a loss's bits: engine, device, libraries, number format, start token"),
        "sample": (str, "first 32 hex digits of the sha256 of the text"),
        "nats": (float, "summed loss of the text, inf where it cannot be scored"),
        "tokens": (int, "tokens of the text; of an imported row the sum stands at its first cell"),
        "reason": (str, "why it cannot be scored; empty otherwise"),
        "imported": (int, "number of the import that it came with; 0: measured by this validator"),
    },
    "outcomes": {
        **_KEY,
        "commit_block": (int, "block of the commitment"),
        "status": (str, "evaluated, rejected, unavailable or waiting"),
        "model": (str, "namespace/name@revision"),
        "content_id": (str, "sha256 hex over the model's files; empty unless it was evaluated"),
        "reason": (str, "code of the reason: see `sn29 reasons`"),
        "detail": (str, "the sentence with both values"),
        "got": (str, "what was found"),
        "limit": (str, "what the rule asks for"),
        "stopped": (str, "why it was measured on the leading samples only; empty: on all, or on none"),
        "samples": (int, "how many samples it was measured on"),
    },
    "scores": {
        **_KEY,
        "wins": (float, "what a win is, the competition's rule says"),
        "win_rate": (float, "wins over what could be won"),
        "win_rate_without_advantage": (float, "the same without any advantage of earlier commitments"),
        "advantage": (float, "the factor that a later model's loss must get below"),
        "weight": (float, "share of the competition's reward, 0 to 1"),
    },
    "weights": {
        "round": _KEY["round"],
        "mechanism": (int, "number of the mechanism"),
        "hotkey": _KEY["hotkey"],
        "weight": (float, "share that the round decided, 0 to 1"),
    },
    "publications": {
        "block": (int, "block at which the weights were set on chain, and read back"),
        "mechanism": (int, "number of the mechanism"),
        "round": (int, "block of the round that decided them"),
        "hotkey": _KEY["hotkey"],
        "weight": (float, "share that was set, 0 to 1"),
    },
}
"""Table -> column -> (type, what it is)."""
COLUMNS = "columns.md"


def export_store(words: list[str]) -> int:
    settings = read(StoreExportSettings, words)
    out = settings.out
    with _looked_at(settings.state_dir) as store, store.snapshot(), _shown(quiet=settings.json_output) as progress:
        make_folder(out, "--out")
        try:
            part = Path(tempfile.mkdtemp(prefix=".export-", dir=out))
            try:
                written = dict(_write(store, part, settings.format, progress))
                for path in sorted(part.iterdir()):  # all is there: now it takes the place of an export of before
                    path.replace(out / path.name)
            finally:
                shutil.rmtree(part)
        except OSError as error:
            got = f"{error.filename or out}: {error.strerror}"
            raise Rejected(Reason.SETTING, got, "a folder that can be written to", "--out") from None
    if settings.json_output:
        print(json.dumps({"folder": str(out), "rows": written}, indent=2))
    else:
        rows = [(f"{name}.{settings.format}", f"{count:,}", ", ".join(TABLES[name])) for name, count in written.items()]
        _print_table(("file", "rows", f"columns (see {COLUMNS})"), rows, str(out))
    return 0


def _write(store: Store, folder: Path, suffix: str, progress: Progress) -> Iterator[tuple[str, int]]:
    """(table, rows) of each file as it is written."""
    rows: Mapping[str, Callable[[], Iterable[Sequence[Any]]]] = {
        "losses": lambda: _losses(store),
        "outcomes": lambda: _of_records(store, _outcomes),
        "scores": lambda: _of_records(store, _scores),
        "weights": lambda: _weights(store),
        "publications": lambda: _publications(store),
    }
    for name, columns in TABLES.items():
        types = {column: kind for column, (kind, _) in columns.items()}
        counted = _counting(rows[name](), partial(progress, name, of=0))
        path = folder / f"{name}.{suffix}"
        if suffix == "parquet":
            from sn29.corpus import write_parquet

            yield name, write_parquet(path, types, counted)
        else:
            yield name, _write_csv(path, list(types), counted)
    (folder / COLUMNS).write_text(columns_text(), encoding="utf-8")


def columns_text() -> str:
    """The tables in Markdown."""
    parts = []
    for name, columns in TABLES.items():
        rows = (f"| `{column}` | {kind.__name__} | {about} |" for column, (kind, about) in columns.items())
        parts.append("\n".join([f"## {name}\n", "| column | type | what it is |", "|---|---|---|", *rows]))
    return "\n\n".join(["# Tables of `sn29 store export`", *parts]) + "\n"


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(map(_cell, row))
            count += 1
    return count


def _cell(value: object) -> object:
    """For CSV: every digit of a number; and before text that a spreadsheet would run as a formula, some of which is a miner's
    own, an apostrophe."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
    return repr(value) if isinstance(value, float) else value


def _counting(rows: Iterable[Sequence[Any]], tell: Callable[[int], None]) -> Iterator[Sequence[Any]]:
    for count, row in enumerate(rows):
        if count % 10_000 == 0:
            tell(count)
        yield row


def _losses(store: Store) -> Iterator[Sequence[Any]]:
    for cell in store.each_loss():
        loss = cell.loss
        yield (
            cell.content_id, cell.tokenizer_id, cell.profile, loss.sample, loss.nats, loss.num_tokens, loss.reason, cell.imported,
        )  # fmt: skip


def _of_records(store: Store, of: Callable[[RoundRecord], Iterable[Sequence[Any]]]) -> Iterator[Sequence[Any]]:
    for block, text in store.record_texts():
        yield from of(decode(text, f"record of block {block}"))


def _outcomes(record: RoundRecord) -> Iterator[Sequence[Any]]:
    entered = [(m.outcome, m.stopped, len(m.losses)) for c in record.competitions.values() for m in c.models]
    for o, stopped, samples in [*entered, *((outcome, "", 0) for outcome in record.no_competition)]:
        yield (
            record.head.block, o.competition, o.hotkey, o.block, o.status, o.model, o.content_id, o.reason, o.detail, o.got,
            o.limit, stopped, samples,
        )  # fmt: skip


def _scores(record: RoundRecord) -> Iterator[Sequence[Any]]:
    for name, kept in sorted(record.competitions.items()):
        for s in kept.scores:
            shares = (s.wins, s.win_rate, s.win_rate_without_advantage, s.advantage, s.weight)
            yield (record.head.block, name, s.hotkey, *map(float, shares))


def _weights(store: Store) -> Iterator[Sequence[Any]]:
    for block, decided in store.decided():
        for mechanism, weights in sorted(decided.items()):
            for hotkey, weight in sorted(weights.by_hotkey.items()):
                yield block, mechanism, hotkey, float(weight)


def _publications(store: Store) -> Iterator[Sequence[Any]]:
    for mechanism in store.mechanisms():
        for block, weights in store.publications(mechanism):
            for hotkey, weight in sorted(weights.by_hotkey.items()):
                yield block, mechanism, weights.block, hotkey, float(weight)


# --- shown ------------------------------------------------------------------------------------------------------------


@contextmanager
def _shown(*, quiet: bool = False) -> Iterator[Progress]:
    """Progress on standard error while it runs; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn()
    with Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def progress(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of or None)

        yield progress


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, title_justify="left", show_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False)
