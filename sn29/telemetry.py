"""What the programs say: one event a line, for people or (with --log.json) for machines. The only import of loguru and wandb.

An event has a fixed name, a sentence and fields: `tell("fetched", "downloaded 3 files", hotkey=..., bytes=...)`. One
commitment's life can be followed by its hotkey.

A program that has called `keep_status` also says what it is doing now, in a small file that other processes read: see `Status`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any

from loguru import logger

from sn29 import __version__
from sn29.concealment import clean, guard, without_secrets
from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from types import TracebackType

    from loguru import Message, Record

Tell = Callable[..., None]
"""tell(event, sentence, **fields)."""
_whose: ContextVar[str] = ContextVar("whose", default="")
"""Hotkey of the commitment that this task works on."""
_file: _LogFile | None = None


def configure(
    *, as_json: bool = False, level: str = "INFO", file: Path | None = None, file_mb: float = 100.0, keep: int = 5
) -> None:
    """Sends events to standard error, and as JSON lines to `file` as well if one is given.

    The file is begun anew when it has `file_mb` MB (0: never), and `keep` older ones stay beside it, named by their time. What
    libraries log from WARNING on, warnings, and the exception that ends the program or a thread are events too. No output holds
    values of variables. Raises Rejected(SETTING) for a file that cannot be written.
    """
    global _file
    guard()
    logger.remove()
    shape = _for_machines if as_json else _for_people
    colour = not as_json and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    logger.add(_write, level=level, format=shape, colorize=colour, diagnose=False, backtrace=False)
    _file = None
    if file is not None:
        try:
            _file = _LogFile(file, int(file_mb * 1e6), keep)
        except OSError as error:
            raise Rejected(Reason.SETTING, f"{file}: {error.strerror}", "a file that can be written", "--log.file") from None
        logger.add(_file, level=level, format=_for_machines, diagnose=False, backtrace=False)
    sys.excepthook = _ended
    threading.excepthook = _thread_ended
    logging.captureWarnings(True)
    if not any(isinstance(handler, _FromLibraries) for handler in logging.root.handlers):
        logging.root.addHandler(_FromLibraries(logging.WARNING))


def tell(event: str, sentence: str, **fields: Any) -> None:
    """One event at level INFO."""
    _emit("INFO", event, sentence, fields)


def warn(event: str, sentence: str, **fields: Any) -> None:
    """One event that somebody should look at."""
    _emit("WARNING", event, sentence, fields)


def bug(sentence: str) -> None:
    """An exception nobody expected, with its traceback: call it from an `except` block."""
    _emit("ERROR", "bug", sentence, {}, sys.exc_info()[1])


@contextmanager
def about(hotkey: str) -> Iterator[None]:
    """What is told within, also by adapters, tasks and threads that are begun there, is about this hotkey's commitment."""
    token = _whose.set(hotkey)
    try:
        yield
    finally:
        _whose.reset(token)


def _emit(level: str, event: str, sentence: str, fields: Mapping[str, Any], error: BaseException | None = None) -> None:
    """The one way out: what is told is one printable line without secrets, whoever wrote its parts."""
    sentence, trace = clean(sentence), ""
    fields = fields if "hotkey" in fields or not _whose.get() else {"hotkey": _whose.get(), **fields}
    fields = {name: value if _is_number(value) else clean(value) for name, value in fields.items()}
    if error is not None:
        sentence += f": {clean(repr(error))}"
        trace = without_secrets("".join(traceback.format_exception(error)))
    _count(event, sentence, fields, warning=level != "INFO")
    logger.bind(event=event, fields=fields, trace=trace).log(level, "{}", sentence)
    if _file is not None:
        _file.own_up()


def _is_number(value: object) -> bool:
    """Whether JSON has a word for it."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _write(line: str) -> None:
    """To standard error, which is looked up for each line: a live table puts another in its place."""
    with suppress(OSError):  # a full disk behind it
        sys.stderr.write(line)


def _for_people(record: Record) -> str:
    """One line, and a traceback's below it, indented."""
    extra = record["extra"]
    extra["shown"] = "".join(f" {name}={value}" for name, value in extra["fields"].items())
    extra["below"] = "".join(f"    {clean(line)}\n" for line in extra["trace"].splitlines())
    return "{time:MM-DD HH:mm:ss} <level>{level: <7}</level> {extra[event]: <13} {message}{extra[shown]}\n{extra[below]}"


def _for_machines(record: Record) -> str:
    extra = record["extra"]
    line = {"time": record["time"].timestamp(), "level": record["level"].name, "event": extra["event"]}
    line |= {"message": record["message"], **extra["fields"]}
    if extra["trace"]:
        line["traceback"] = extra["trace"]
    extra["line"] = json.dumps(line, allow_nan=False)
    return "{extra[line]}\n"


class _LogFile:
    """Whole lines at the end of a file, which several processes may write and begin anew: each holds its lock for a line.

    What cannot be written is lost, and counted: a full disk is no reason to stop.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        """max_bytes 0: never begun anew. Raises OSError."""
        self._path, self._max, self._keep = path, max_bytes, keep
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._opened()
        self._lost, self._why, self._told = 0, "", False

    def write(self, line: str) -> None:
        try:
            self._append(line.encode())
        except OSError as error:
            self._lost, self._why = self._lost + 1, error.strerror or str(error)
        else:
            self._why = ""

    def stop(self) -> None:
        os.close(self._fd)

    def own_up(self) -> None:
        """Tells that lines are lost, and later that they are no more; once each."""
        if self._why and not self._told:
            self._told = True
            warn("log_file", f"{self._path}: {self._why}: events are not in it until there is room again")
        elif self._told and not self._why:
            lost, self._told, self._lost = self._lost, False, 0
            tell("log_file", f"{self._path}: is written again", lost=lost)

    def _append(self, line: bytes) -> None:
        self._lock()
        try:
            if self._max and (size := os.fstat(self._fd).st_size) and size + len(line) > self._max:
                with suppress(OSError):  # a folder that nobody may write to: the file grows on
                    self._begin_anew()
            size = os.fstat(self._fd).st_size
            if os.write(self._fd, line) < len(line):
                os.ftruncate(self._fd, size)  # half a line is none
                raise OSError(None, "no room for a whole line")
        finally:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _lock(self) -> None:
        """Of the file that has the name now: another process, or logrotate, may have moved ours away."""
        while True:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                    return
            fd = self._opened()
            os.close(self._fd)
            self._fd = fd

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _begin_anew(self) -> None:
        """Called with the lock, which ends with it. Files beside it go that we have named, and no others."""
        path, stem, suffix = self._path, re.escape(self._path.stem), re.escape(self._path.suffix)
        path.rename(path.with_name(f"{path.stem}.{datetime.now(UTC):%Y-%m-%d_%H-%M-%S_%f}{path.suffix}"))
        ours = re.compile(rf"{stem}\.\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{{6}}{suffix}")
        old = sorted(other for other in path.parent.iterdir() if ours.fullmatch(other.name))
        for other in old[: max(0, len(old) - self._keep)]:
            other.unlink(missing_ok=True)
        self._lock()


@dataclass(frozen=True, slots=True)
class Event:
    """What was told, as the log has it."""

    time: float
    """Seconds since 1970."""
    level: str
    """INFO, WARNING or ERROR."""
    event: str
    sentence: str
    fields: Mapping[str, Any]


@contextmanager
def heard_by(ear: Callable[[Event], None]) -> Iterator[None]:
    """Within, `ear` hears every event, whatever --log.level says; it is called in the thread that tells, and must not tell."""

    def hear(message: Message) -> None:
        r = message.record
        ear(Event(r["time"].timestamp(), r["level"].name, r["extra"]["event"], r["message"], r["extra"]["fields"]))

    sink = logger.add(hear, level="INFO", format="{message}")
    try:
        yield
    finally:
        logger.remove(sink)


class _FromLibraries(logging.Handler):
    """What libraries log, as events."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "ERROR" if record.levelno >= logging.ERROR else "WARNING"
        error = record.exc_info[1] if record.exc_info else None
        _emit(level, "library", f"{record.name}: {record.getMessage()}", {}, error)


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Instead of Python's own last words, which show what an exception's text holds."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        _emit("ERROR", "bug", "ended by what nobody expected", {}, error)


def _thread_ended(end: threading.ExceptHookArgs) -> None:
    if not issubclass(end.exc_type, SystemExit):
        name = end.thread.name if end.thread else "one"
        _emit("ERROR", "bug", f"thread {name} ended by what nobody expected", {}, end.exc_value)


# --- what a program is doing now --------------------------------------------------------------------------------------

STATUS = "status.json"
"""Name of the file, in the program's own folder."""
STAGES = ("waiting", "training", "reading", "inspecting", "fetching", "measuring", "deciding", "publishing")
"""What a program can be at, in the order of a round; a miner trains before."""
STOPPED = "stopped"
"""Instead of a stage: the program has ended."""
MAX_WARNINGS = 20
MAX_STARTS = 10
_LONGEST_SENTENCE = 400
_LEAST_PAUSE_S = 1.0
_LARGEST = 1e15
"""No block, time or count is larger."""


@dataclass(frozen=True, slots=True)
class Warned:
    """One warning."""

    time: float
    """Seconds since 1970."""
    event: str
    sentence: str
    hotkey: str = ""
    """Whom it is about, if anybody."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a program is doing, as of `updated`. Times are seconds since 1970 by the program's machine."""

    version: str
    program: str
    """`validator` or `miner`."""
    pid: int
    started: float
    updated: float
    hotkey: str = ""
    """Empty until the wallet was read."""
    round: int | None = None
    """Block of the round in hand."""
    stage: str = STAGES[0]
    """One of STAGES, or STOPPED."""
    done: int = 0
    of: int = 0
    """How many there are to do in this stage; 0 when that is not known."""
    stage_started: float = 0.0
    done_before: int = 0
    """How many were done at `counted_since`, when counting to `of` began in this stage: a stage goes on where it was left."""
    counted_since: float = 0.0
    detail: str = ""
    """One line: whose model, why it waits, or why it has stopped; empty there: it was asked to."""
    head: int | None = None
    """Newest final block that was seen."""
    head_time: float | None = None
    """When that block came."""
    next_window: int | None = None
    """Seed block of the next window of any competition."""
    unpublished_since: float | None = None
    """Since when every try to set weights has failed; None while they do not."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Event -> how often it was told since the start."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> seconds spent in it since the start, without the one in hand."""
    warnings: tuple[Warned, ...] = ()
    """The last MAX_WARNINGS, oldest first."""
    starts: tuple[float, ...] = ()
    """When the last MAX_STARTS processes of this folder began that did not stay up, and this one, oldest first. One that ended
    as it was asked to is not among them, nor one of `refused`: `leave_status`."""
    refused: tuple[float, ...] = ()
    """When the last MAX_STARTS began that were refused for their settings, oldest first."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        """Fields that are not known are left out. Raises Rejected(SETTING) for what no program wrote."""
        where = STATUS
        try:
            data = json.loads(text)
            known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
            names = {one.name for one in fields(Warned)}
            warned = [Warned(**{k: v for k, v in row.items() if k in names}) for row in known.pop("warnings", ())]
            begun = {name: tuple(known.get(name, ())) for name in ("starts", "refused")}
            found = cls(**known | begun, warnings=tuple(warned))
            _check_numbers(found)
            texts = [found.version, found.program, found.hotkey, found.stage, found.detail, *found.counters, *found.stage_seconds]
            said = [text for w in found.warnings for text in (w.event, w.sentence, w.hotkey)]
            if not all(isinstance(x, str) and x.isprintable() for x in (*texts, *said)):
                raise ValueError("a text that is none")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
            raise Rejected(Reason.SETTING, str(error)[:200], "what a validator or a miner writes", where) from None
        return found


def _check_numbers(status: Status) -> None:
    """Raises ValueError."""
    numbers: list[object] = [status.pid, status.started, status.updated, status.stage_started, status.done, status.of]
    numbers += [status.done_before, status.counted_since]
    some = (status.round, status.head, status.head_time, status.next_window, status.unpublished_since)
    numbers += [x for x in some if x is not None]
    numbers += [*status.counters.values(), *status.stage_seconds.values(), *(w.time for w in status.warnings)]
    numbers += [*status.starts, *status.refused]
    if not all(isinstance(x, int | float) and -_LARGEST <= x <= _LARGEST for x in numbers):
        raise ValueError("a number that is none")


class _Board:
    """Keeps the file of one program."""

    def __init__(self, path: Path, program: str) -> None:
        now = time.time()
        self._path = path
        self._lock = threading.Lock()  # events come from threads too
        starts, refused = _starts(path)
        starts = (*starts, now)[-MAX_STARTS:]
        self._status = Status(__version__, program, os.getpid(), now, now, stage_started=now, starts=starts, refused=refused)
        self._counters: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._warnings: deque[Warned] = deque(maxlen=MAX_WARNINGS)
        self._publishing = 0.0
        self._written = -math.inf

    def change(self, *, now: bool = False, **changes: Any) -> None:
        """Notes the changes, and writes the file: now, or when a second has passed since it was written."""
        with self._lock:
            if changes.get("stage", self._status.stage) != self._status.stage:
                before, spent = self._status.stage, max(0.0, time.time() - self._status.stage_started)
                self._seconds[before] = self._seconds.get(before, 0.0) + spent
                changes["stage_started"], now = time.time(), True
            done, of = changes.get("done", self._status.done), changes.get("of", self._status.of)
            if "stage_started" in changes or of != self._status.of or done < self._status.done:
                changes |= {"done_before": done, "counted_since": time.time()}
            self._status = replace(self._status, **changes)
            self._write(now=now)

    def end(self, why: str, *, settled: bool) -> None:
        starts, refused = self._status.starts, self._status.refused
        if settled and why:
            refused = (*refused, *starts[-1:])[-MAX_STARTS:]
        if settled or not why:
            starts = starts[:-1]
        self.change(stage=STOPPED, done=0, of=0, detail=why, round=None, starts=starts, refused=refused, now=True)

    def count(self, event: str, warned: Warned | None) -> None:
        with self._lock:
            self._counters[event] += 1
            if warned is not None:
                self._warnings.append(warned)
            self._write(now=False)

    def publishes(self, *, begins: bool) -> None:
        with self._lock:
            self._publishing = time.time() if begins else 0.0
            self._write(now=True)

    def _write(self, *, now: bool) -> None:
        if not now and time.monotonic() - self._written < _LEAST_PAUSE_S:
            return
        self._written = time.monotonic()
        status = replace(
            self._status, updated=time.time(), counters=dict(self._counters), stage_seconds=dict(self._seconds),
            warnings=tuple(self._warnings),
        )  # fmt: skip
        if self._publishing and status.stage == "waiting":  # weights are set beside a round too, which is not told then
            status = replace(status, stage="publishing", stage_started=self._publishing, done=0, of=0, detail="")
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            part.write_text(status.to_json(), encoding="utf-8")
            part.replace(self._path)
        except OSError:
            pass  # a full disk: the file grows old, which its readers say; no reason to stop


def _starts(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`starts` and `refused` of the process before."""
    try:
        before = Status.from_json(path.read_bytes())
    except (OSError, Rejected):
        return (), ()
    return before.starts, before.refused


_board: _Board | None = None


def keep_status(path: Path, program: str) -> None:
    """From here on `path` says what this process does. Raises Rejected(SETTING) when its folder cannot be made."""
    global _board
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Rejected(Reason.SETTING, f"{path.parent}: {error.strerror}", "a folder that can be written to") from None
    _board = _Board(path, program)
    _board.change(now=True)


def leave_status(why: str = "", *, settled: bool = False) -> None:
    """The file says that the program has ended, and why if it was not asked to. This start is forgotten where it was asked to;
    where the end is settled, as by a setting that is refused, it is counted apart: it may have been a person's mistake."""
    global _board
    if _board is not None:
        _board.end(_line(clean(why)), settled=settled)
    _board = None


def stage(name: str, done: int = 0, of: int = 0, detail: str = "") -> None:
    """What the program is at, one of STAGES, and how far. Waiting, it has no round in hand."""
    if _board is not None:
        idle: dict[str, Any] = {"round": None} if name == "waiting" else {}
        _board.change(stage=name, done=done, of=of, detail=_line(clean(detail)), **idle)


def note(**facts: Any) -> None:
    """Facts of `Status`: hotkey, round, head, head_time, next_window, unpublished_since; without any the file only says that
    the program lives."""
    if _board is not None:
        _board.change(**facts)


@contextmanager
def publishing() -> Iterator[None]:
    """Weights are being set, which is the stage while no round is in hand."""
    if _board is None:
        yield
        return
    _board.publishes(begins=True)
    try:
        yield
    finally:
        _board.publishes(begins=False)


def _count(event: str, sentence: str, fields: Mapping[str, Any], *, warning: bool) -> None:
    if _board is not None:
        hotkey = str(fields.get("hotkey", ""))
        is_ours = warning and event != "refused"  # a refusal is the miner's business; rounds tell of it
        _board.count(event, Warned(time.time(), event, _line(sentence), _line(hotkey)) if is_ours else None)


def _line(text: str) -> str:
    """One line of at most _LONGEST_SENTENCE characters."""
    return " ".join(text.split())[:_LONGEST_SENTENCE]


# --- curves elsewhere -------------------------------------------------------------------------------------------------

_WANDB_PAUSE_S = 600.0
_WANDB_QUEUE = 10_000
Done = Callable[[bool], None]
"""done(whether wandb has it)."""


def _nobody_asks(taken: bool) -> None:
    """Where it is all the same."""


class Curves:
    """A run of Weights & Biases; a folder's run goes on when it is opened again.

    A thread of its own opens it and sends. Nobody waits for it, and whatever fails in it is one warning: with what is logged
    _WANDB_PAUSE_S later it is opened again, and what was logged meanwhile is not sent, which `done` hears.

    Of its own accord wandb also sends the command line, where a token may stand, all output and the repository: not here.
    WANDB_MODE=offline writes below the folder, for `wandb sync` later.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        """config: what is said of the run. Raises Rejected(SETTING) where wandb is not installed."""
        if find_spec("wandb") is None:
            raise Rejected(Reason.SETTING, "--wandb without the package", "pip install 'sn29[wandb]'", "--wandb")
        self._project, self._folder, self._config = project, folder, dict(config)
        self._queue: Queue[tuple[Mapping[str, Any], int, Done] | None] = Queue(_WANDB_QUEUE)
        self._queue.put(({}, 0, _nobody_asks))  # opens it
        self._thread = threading.Thread(target=self._work, name="sn29-work-wandb", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], step: int, done: Done = _nobody_asks) -> None:
        """`done` is called once it is known whether wandb has it, in the thread that sends; not at all when the program ends
        before. It must not raise."""
        try:
            self._queue.put_nowait((values, step, done))
        except Full:
            done(False)

    def finish(self, within_s: float = 10.0) -> None:
        """Waits as long for all to be sent."""
        with suppress(Full):
            self._queue.put_nowait(None)
        self._thread.join(within_s)
        if self._thread.is_alive():
            warn("wandb", f"not all was sent within {within_s:.3g} s; `wandb sync` sends what lies in {self._folder / 'wandb'}")

    def _work(self) -> None:
        run, closed_until = None, 0.0
        while (item := self._queue.get()) is not None:
            values, step, done = item
            if run is None and time.monotonic() < closed_until:
                done(False)
                continue
            try:
                run = run or self._opened()
                if values:
                    run.log(dict(values), step=step)
            except Exception as error:  # noqa: BLE001 - its errors have no common root, and none of them is the program's
                run, closed_until = None, time.monotonic() + _WANDB_PAUSE_S
                said = f"{type(error).__name__}: {error}"
                warn("wandb", f"{said}; tried again in {_WANDB_PAUSE_S / 60:g} min, nothing waits for it")
            done(run is not None)
        if run is not None:
            run.finish()

    def _opened(self) -> Any:
        import wandb

        if wandb.setup(wandb.Settings(silent=True)).settings.mode == "online" and not wandb.login(verify=False, prompt=False):
            raise wandb.UsageError("no API key: set WANDB_API_KEY, or `wandb login` once")
        about = f"{self._folder.resolve()} {self._config.get('began')} {self._config.get('hotkey')}"
        quiet = wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True,
            x_disable_stats=True, silent=True,
        )  # fmt: skip
        return wandb.init(
            project=self._project, dir=self._folder, id=hashlib.sha256(about.encode()).hexdigest()[:16], resume="allow",
            config=self._config, settings=quiet, reinit="create_new",
        )  # fmt: skip
