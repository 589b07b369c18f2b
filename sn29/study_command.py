"""`sn29 study packing`: what packing costs, measured: runs in a folder, and a report that is made from the finished ones."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from rich.table import Table as Shown

    from sn29.corpus import TextSource
    from sn29.models.tokenizer import Tokenizer
    from sn29.report.study import Table
    from sn29.settings import StudyPackingSettings
    from sn29.training.packing_study import Plan, Run, Texts

PLAN, RUNS = "study.json", "runs"
"""In the study's folder: what its numbers depend on, and a JSON file (and a curve) for each run."""
END_TOKENS = ("<|endoftext|>", "</s>", "<eos>")
"""Names of a tokenizer's end of text, the first that it has."""


def study_packing(words: list[str]) -> int:
    """Exit 0: all runs are done and the report is written, which says whether the goals are met."""
    from sn29.settings import StudyPackingSettings, read

    settings = read(StudyPackingSettings, words)
    if settings.report_only:
        if not (settings.dir / PLAN).exists():
            raise Rejected(Reason.SETTING, f"no {PLAN}", "the folder of a study", str(settings.dir))
    else:
        _run_all(settings)
    return _report(settings)


def _run_all(settings: StudyPackingSettings) -> None:
    from sn29.training.packing_study import runs_of

    wanted = _plan(settings)
    with _alone(settings.dir):
        plan, texts = prepare(settings, wanted)
        runs = runs_of(plan, texts, range(settings.first_seed, settings.first_seed + settings.seeds))
        (settings.dir / RUNS).mkdir(exist_ok=True)
        _carry_out(settings, plan, texts, runs)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that ends with the process. Raises Rejected(SETTING) when another study works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Rejected(Reason.SETTING, f"a study that works in {folder}", "a --dir of its own", "sn29 study") from None
        yield


def _require_device(plan: Plan) -> None:
    import torch

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise Rejected(Reason.SETTING, "no CUDA device", f"one for the size {plan.size}, or --device cpu", "--device")


# --- the plan and its documents -----------------------------------------------------------------------------------------


def _plan(settings: StudyPackingSettings) -> Plan:
    """As the flags want it, apart from the end token, which is the tokenizer's. Raises Rejected(SETTING)."""
    from sn29.training.packing_study import SIZES

    if settings.size not in SIZES:
        raise Rejected(Reason.SETTING, settings.size, ", ".join(SIZES), "--size")
    plan = _overridden(SIZES[settings.size], settings)
    _require_device(plan)
    return plan


def prepare(settings: StudyPackingSettings, plan: Plan) -> tuple[Plan, Texts]:
    """The plan, and the documents as tokens: made at the first call, read back by later ones.

    Raises Rejected(SETTING) when the folder holds a study of another plan or text, or of other versions of what computes.
    """
    from importlib.metadata import version

    from sn29.training.packing_study import COMPARED, Plan, compute_tokens, parameters

    folder, kept = settings.dir, settings.dir / PLAN
    versions = {name: version(name) for name in ("torch", "transformers")}
    if kept.exists():
        written = json.loads(kept.read_text())
        plan = replace(plan, end_token=written["plan"]["end_token"])
        wanted = {"plan": asdict(plan), "text": _source(settings), "held_out": settings.held_out, "versions": versions}
        for key, value in wanted.items():
            if written[key] != json.loads(json.dumps(value)):
                raise Rejected(
                    Reason.SETTING, f"{key} {_differing(written[key], value)}", _differing(value, written[key]), str(kept)
                )
        return Plan(**written["plan"]), open_texts(folder)
    training, held_out, revision = _documents(settings)
    plan, about = _write_tokens(folder, plan, training, held_out, settings.tokenizer)
    texts = open_texts(folder)
    head = {
        "plan": asdict(plan), "text": _source(settings), "held_out": settings.held_out, "revision": revision, **about,
        "parameters": parameters(plan), "versions": versions,
        "flags": _flags(settings, plan), "compute_tokens": {name: compute_tokens(plan, name, texts) for name in COMPARED},
    }  # fmt: skip
    _write_whole(kept, (json.dumps(head, indent=1) + "\n").encode())
    return plan, texts


def _flags(settings: StudyPackingSettings, plan: Plan) -> str:
    """Of the command that makes this study anew, apart from seeds and folder."""
    given = {
        "text": settings.text, "pattern": settings.pattern, "column": settings.column, "max-documents": settings.max_documents,
        "tokenizer": settings.tokenizer, "tokens": settings.tokens, "row-tokens": settings.row_tokens,
        "batch-tokens": settings.batch_tokens, "learning-rate": settings.learning_rate, "device": settings.device,
    }  # fmt: skip
    named = [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value]
    return " ".join([f"--size {plan.size}", f"--held-out {settings.held_out}", *named])


def _differing(one: Any, other: Any) -> str:
    """What of two plans is not alike, as the first has it."""
    if isinstance(one, dict) and isinstance(other, dict):
        return ", ".join(f"{k} {v}" for k, v in one.items() if other.get(k) != v)
    return str(one)


def _overridden(plan: Plan, settings: StudyPackingSettings) -> Plan:
    """The size's plan with what the flags name."""
    flags = {"tokens": settings.tokens, "row_tokens": settings.row_tokens, "batch_tokens": settings.batch_tokens}
    named: dict[str, Any] = {name: value for name, value in flags.items() if value}
    if settings.learning_rate:
        named["learning_rate"] = settings.learning_rate
    if settings.device:
        named["device"] = settings.device
        named["bfloat16"] = plan.bfloat16 and settings.device == "cuda"
    found = replace(plan, **named)
    if found.row_tokens < 8:
        raise Rejected(Reason.SETTING, f"{found.row_tokens} tokens", "at least 8", "--row-tokens")
    if found.batch_tokens > found.tokens:
        raise Rejected(Reason.SETTING, f"{found.tokens} tokens", f"at least one batch of {found.batch_tokens}", "--tokens")
    return found


def _source(settings: StudyPackingSettings) -> str:
    """The text and what is made of it, as the flags name them."""
    most = f"at most {settings.max_documents} documents" if settings.max_documents else ""
    column = f"column {settings.column}" if settings.column not in ("", "text") else ""
    tokenizer = f"tokenizer {settings.tokenizer}" if settings.tokenizer else ""
    return ", ".join(part for part in (settings.text or "packages", settings.pattern, column, most, tokenizer) if part)


def _documents(settings: StudyPackingSettings) -> tuple[list[str], list[str], str]:
    """Texts for training, texts held out, and the data set's revision. Raises Rejected, Unavailable.

    Of one pass over the documents in an order that is always the same, the first are held out; a text that is there twice is
    taken once.
    """
    from sn29.corpus import one_pass

    source = _text_source(settings)
    most = settings.max_documents + settings.held_out if settings.max_documents else None
    seen: dict[str, None] = {}
    for text in one_pass(source, seed=29):
        seen[text] = None
        if len(seen) == most:
            break
    texts = list(seen)
    if len(texts) <= settings.held_out:
        got, limit = f"{len(texts)} different texts", f"more than the {settings.held_out} held out"
        raise Rejected(Reason.DATASET, got, limit, _source(settings))
    return texts[settings.held_out :], texts[: settings.held_out], source.data.revision


def _text_source(settings: StudyPackingSettings) -> TextSource:
    """The packages' texts, a folder's or the Hub's. Raises Rejected(SETTING), Unavailable."""
    from neurons.training import parse_source
    from sn29.corpus import LocalFolder, TextSource
    from sn29.hub import Hub

    if not settings.text:
        from sn29.localnet import text
        from sn29.settings import default_cache

        folder = text.build(default_cache(), lambda what: print(f"  {what}", file=sys.stderr)).dataset
        return TextSource(LocalFolder(folder), settings.pattern, settings.column or "text")
    found = parse_source(settings.text, Hub(settings.hub_endpoint), "--text")
    return replace(found, pattern=found.pattern or settings.pattern, column=settings.column or found.column)


def _write_tokens(
    folder: Path, plan: Plan, training: Sequence[str], held_out: Sequence[str], given: Path | None
) -> tuple[Plan, dict[str, Any]]:
    """Tokenizer and tokens of the documents, each file whole or not at all; the plan with the tokenizer's end token, and what
    they are, in numbers. Raises Rejected(SETTING) when the tokenizer has no end token, or ids that the plan has no rows for.
    """
    from sn29.models.tokenizer import Tokenizer, train_bpe

    _write_whole(folder / "tokenizer.json", given.read_bytes() if given else train_bpe(training, plan.vocabulary).encode())
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.largest_id() >= plan.vocabulary:
        raise Rejected(Reason.SETTING, f"id {tokenizer.largest_id()}", f"ids below {plan.vocabulary}", "--tokenizer")
    end = next((found for name in END_TOKENS if (found := tokenizer.id_of(name)) is not None), None)
    if end is None:
        raise Rejected(Reason.SETTING, "no end token", " or ".join(END_TOKENS), "--tokenizer")
    about: dict[str, Any] = {"tokenizer": tokenizer.fingerprint(), "documents": {}}
    for name, texts in (("training", training), ("held_out", held_out)):
        lengths = _write_part(folder, name, texts, tokenizer, end)
        cut = sum(min(n, plan.row_tokens - 1) for n in lengths)
        about["documents"][name] = {"documents": len(lengths), "tokens": sum(lengths), "tokens_after_cut": cut}
    return replace(plan, end_token=end), about


def _write_part(folder: Path, name: str, texts: Sequence[str], tokenizer: Tokenizer, end: int) -> list[int]:
    """Tokens of the texts one behind the other, and where each ends. Returns their lengths.

    Raises Rejected(SETTING) when the end token is inside a text.
    """
    import io

    import numpy as np

    lengths: list[int] = []
    parts = []
    for at in range(0, len(texts), 10_000):
        found = tokenizer.encode_batch(texts[at : at + 10_000])
        lengths += [len(ids) for ids in found]
        parts.append(np.fromiter((token for ids in found for token in ids), dtype=np.int32))
        if (parts[-1] == end).any():
            raise Rejected(Reason.SETTING, f"{tokenizer.decode([end])!r} inside a text", "an end token of no text", "--tokenizer")
    for what, array in (("tokens", np.concatenate(parts)), ("ends", np.cumsum(np.asarray(lengths, dtype=np.int64)))):
        stream = io.BytesIO()
        np.save(stream, array)
        _write_whole(folder / f"{name}.{what}.npy", stream.getvalue())
    return lengths


def open_texts(folder: Path) -> Texts:
    """The documents of a prepared study, mapped into memory."""
    import numpy as np

    from sn29.training.packing_study import Texts, Tokens

    def part(name: str) -> Tokens:
        flat, ends = (np.load(folder / f"{name}.{what}.npy", mmap_mode="r") for what in ("tokens", "ends"))
        return Tokens(flat, ends)

    return Texts(part("training"), part("held_out"))


def _write_whole(path: Path, data: bytes) -> None:
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, path)


# --- runs ---------------------------------------------------------------------------------------------------------------


def _carry_out(settings: StudyPackingSettings, plan: Plan, texts: Texts, runs: Sequence[Run]) -> None:
    """All runs that are not finished, `settings.workers` at a time, each in a process of one thread."""
    import multiprocessing

    from sn29.training.packing_study import goal_of

    folder = settings.dir / RUNS
    goals = {run.name: goal_of(plan, run, texts) for run in runs}
    left = [run for run in runs if not (folder / f"{run.name}.json").exists()]
    if not left:
        return
    crew = ProcessPoolExecutor(
        settings.workers, multiprocessing.get_context("spawn"), initializer=leave_with, initargs=(os.getpid(),)
    )
    try:
        with _progress(runs, left, goals, folder) as shown:
            _in_turn(settings, plan, left, crew, shown)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()  # a run that is stopped goes on from its last state
        crew.shutdown()


def _in_turn(settings: StudyPackingSettings, plan: Plan, left: list[Run], crew: ProcessPoolExecutor, shown: _Shown) -> None:
    """Never more than `settings.workers` are handed over, so that a process that is left alone has nothing to go on with."""
    going: dict[Future[float], Run] = {}
    while left or going:
        while len(going) < settings.workers and (run := _next_ready(left, settings.dir / RUNS)) is not None:
            left.remove(run)
            going[crew.submit(carry_out_one, settings.dir, plan, run)] = run
        done, _ = wait(going, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in done:
            run = going.pop(future)
            shown.finished(run, future.result())
        shown.going(going.values())


def _next_ready(left: Sequence[Run], folder: Path) -> Run | None:
    """The first run whose predecessor, if it has one, is finished."""
    return next((r for r in left if r.after is None or (folder / f"{r.after.name}.json").exists()), None)


def carry_out_one(folder: Path, plan: Plan, run: Run) -> float:
    """In a process of its own: the run, from where it was. Returns its seconds."""
    from sn29.training.packing_study import train

    began = time.monotonic()
    train(plan, run, open_texts(folder), folder / RUNS, lambda done, goal: None)
    return time.monotonic() - began


def leave_with(parent: int) -> None:
    """This process ends within a second of its parent, also of one that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Shown:
    """The study's progress on standard error: a line for each run that ends, and a bar with the time left."""

    def __init__(
        self, bar: Any, task: Any, all_runs: Sequence[Run], left: Sequence[Run], goals: dict[str, int], folder: Path
    ) -> None:
        self._bar, self._task, self._goals, self._folder = bar, task, goals, folder
        self._runs, self._open = len(all_runs), len(left)
        self._done = sum(goals.values()) - sum(goals[run.name] for run in left)

    def finished(self, run: Run, seconds: float) -> None:
        self._done += self._goals[run.name]
        self._open -= 1
        result = json.loads((self._folder / f"{run.name}.json").read_text())["evaluation"]
        nats, tokens = (sum(result[kind]["single"]) for kind in ("nats", "tokens"))
        loss = nats / tokens
        self._bar.console.print(
            f"{run.name}: {self._goals[run.name]:,} tokens in {seconds:.0f} s, {loss:.4f} nats a token one by one; "
            f"{self._runs - self._open} of {self._runs} runs", highlight=False, soft_wrap=True,
        )  # fmt: skip

    def going(self, runs: Any) -> None:
        part = sum(_tokens_done(self._folder / f"{run.name}.jsonl") for run in runs)
        names = ", ".join(run.name for run in runs)
        self._bar.update(self._task, completed=self._done + part, description=names)


def _tokens_done(curve: Path) -> int:
    """By the last whole line of a curve that is being written."""
    if not curve.exists():
        return 0
    lines = curve.read_bytes()[-2000:].split(b"\n")[:-1]
    return int(json.loads(lines[-1])["tokens"]) if lines and lines[-1].startswith(b"{") else 0


def _progress(runs: Sequence[Run], left: Sequence[Run], goals: dict[str, int], folder: Path) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    @contextmanager
    def shown() -> Iterator[_Shown]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=600) as bar:
            task = bar.add_task("starting", total=sum(goals.values()))
            yield _Shown(bar, task, runs, left, goals, folder)

    return shown()


# --- report -------------------------------------------------------------------------------------------------------------


def _report(settings: StudyPackingSettings) -> int:
    from sn29.report import study as report
    from sn29.training.study_results import read_study

    study = read_study(settings.dir / PLAN, settings.dir / RUNS)
    if not study.finished:
        raise Rejected(Reason.SETTING, "no finished run", "at least one", str(settings.dir / RUNS))
    written = {"study.md": report.markdown(study), "study.csv": report.comma_separated(study), "study.html": report.html(study)}
    if drawn := report.picture(study):
        written["study.svg"] = drawn
    for name, content in written.items():
        _write_whole(settings.dir / name, content.encode())
    if settings.json_output:
        print(json.dumps(asdict(study), indent=1))
        return 0
    _print_tables(report.tables(study))
    print(f"\n{', '.join(written)} are in {settings.dir}")
    return 0


def _print_tables(tables: Sequence[Table]) -> None:
    """Those that fit the screen; no number is cut or broken."""
    from rich.console import Console

    console = Console()
    without_end = console.options.update(max_width=1000)
    for table in tables:
        shown = _shown(table)
        if console.measure(shown, options=without_end).minimum > console.width:
            console.print(f"{table.title}: wider than {console.width} characters, see study.md\n")
        else:
            console.print(shown, "")


def _shown(table: Table) -> Shown:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Shown

    shown = Shown(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    for title in table.head:
        number = title.startswith("#")
        shown.add_column(title.removeprefix("#"), justify="right" if number else "left", no_wrap=number)
    for row in table.rows:
        shown.add_row(*row)
    return shown
