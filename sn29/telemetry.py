"""What the programs say: one event a line, for people or (with --log.json) for machines. The only import of loguru and wandb.

An event has a fixed name, a sentence and fields: `tell("fetched", "downloaded 3 files", hotkey=..., bytes=...)`. One
commitment's life can be followed by its hotkey.

A program that has called `keep_status` also says what it is doing now, in a small file that other processes read: see `Status`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from sn29 import __version__
from sn29.concealment import clean, conceal_environment, without_secrets
from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from types import TracebackType

    from loguru import Message, Record

Tell = Callable[..., None]
"""tell(event, sentence, **fields)."""
_whose: ContextVar[str] = ContextVar("whose", default="")
"""Hotkey of the commitment that this task works on."""


def configure(
    *, as_json: bool = False, level: str = "INFO", file: Path | None = None, file_mb: float = 100.0, keep: int = 5
) -> None:
    """Sends events to standard error, and as JSON lines to `file` as well if one is given.

    The file is begun anew when it has `file_mb` MB (0: never), and `keep` older ones stay beside it, named by their time. What
    libraries log from WARNING on, and the exception that ends the program, are events too. No output holds values of variables.
    Raises Rejected(SETTING) for a file that cannot be written.
    """
    conceal_environment()
    logger.remove()
    shape = _for_machines if as_json else _for_people
    colour = not as_json and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    logger.add(_write, level=level, format=shape, colorize=colour, diagnose=False, backtrace=False)
    if file is not None:
        size, path = int(file_mb * 1e6) or None, str(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            logger.add(
                path, level=level, format=_for_machines, rotation=size, retention=keep, encoding="utf-8", watch=True,
                diagnose=False, backtrace=False,
            )  # fmt: skip
        except OSError as error:
            raise Rejected(Reason.SETTING, f"{path}: {error.strerror}", "a file that can be written", "--log.file") from None
    sys.excepthook = _ended
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
    fields = {name: value if isinstance(value, int | float) else clean(value) for name, value in fields.items()}
    if error is not None:
        sentence += f": {clean(repr(error))}"
        trace = without_secrets("".join(traceback.format_exception(error)))
    _count(event, sentence, fields, warning=level != "INFO")
    logger.bind(event=event, fields=fields, trace=trace).log(level, "{}", sentence)


def _write(line: str) -> None:
    """To standard error, which is looked up for each line: a live table puts another in its place."""
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
    extra["line"] = json.dumps(line, default=str)
    return "{extra[line]}\n"


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


# --- what a program is doing now --------------------------------------------------------------------------------------

STATUS = "status.json"
"""Name of the file, in the program's own folder."""
STAGES = ("waiting", "training", "reading", "inspecting", "fetching", "measuring", "deciding", "publishing")
"""What a program can be at, in the order of a round; a miner trains before."""
MAX_WARNINGS = 20
MAX_STARTS = 10
_LONGEST_SENTENCE = 400
_LEAST_PAUSE_S = 1.0


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
    """One of STAGES."""
    done: int = 0
    of: int = 0
    """How many there are to do in this stage; 0 when that is not known."""
    stage_started: float = 0.0
    detail: str = ""
    """One line: whose model, or why it waits."""
    head: int | None = None
    """Newest final block that was seen."""
    head_time: float | None = None
    """When that block came."""
    next_window: int | None = None
    """Seed block of the next window of any competition."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Event -> how often it was told since the start."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> seconds spent in it since the start, without the one in hand."""
    warnings: tuple[Warned, ...] = ()
    """The last MAX_WARNINGS, oldest first."""
    starts: tuple[float, ...] = ()
    """When the last MAX_STARTS processes of this folder began, this one among them, oldest first."""

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
            found = cls(**known | {"starts": tuple(known.get("starts", ()))}, warnings=tuple(warned))
            _check_numbers(found)
            texts = [found.version, found.program, found.hotkey, found.stage, found.detail]
            said = [text for w in found.warnings for text in (w.event, w.sentence, w.hotkey)]
            if not all(isinstance(x, str) for x in (*texts, *said)):
                raise ValueError("a text that is none")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
            raise Rejected(Reason.SETTING, str(error)[:200], "what a validator or a miner writes", where) from None
        return found


def _check_numbers(status: Status) -> None:
    """Raises ValueError."""
    numbers: list[object] = [status.pid, status.started, status.updated, status.stage_started, status.done, status.of]
    numbers += [x for x in (status.round, status.head, status.head_time, status.next_window) if x is not None]
    numbers += [*status.counters.values(), *status.stage_seconds.values(), *status.starts, *(w.time for w in status.warnings)]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError("a number that is none")


class _Board:
    """Keeps the file of one program."""

    def __init__(self, path: Path, program: str) -> None:
        now = time.time()
        self._path = path
        self._lock = threading.Lock()  # events come from threads too
        starts = (*_starts(path), now)[-MAX_STARTS:]
        self._status = Status(__version__, program, os.getpid(), now, now, stage_started=now, starts=starts)
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
            self._status = replace(self._status, **changes)
            self._write(now=now)

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


def _starts(path: Path) -> tuple[float, ...]:
    try:
        return Status.from_json(path.read_bytes()).starts
    except (OSError, Rejected):
        return ()


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


def leave_status() -> None:
    """The file stays as it is now."""
    global _board
    if _board is not None:
        _board.change(now=True)
    _board = None


def stage(name: str, done: int = 0, of: int = 0, detail: str = "") -> None:
    """What the program is at, one of STAGES, and how far. Waiting, it has no round in hand."""
    if _board is not None:
        idle: dict[str, Any] = {"round": None} if name == "waiting" else {}
        _board.change(stage=name, done=done, of=of, detail=_line(clean(detail)), **idle)


def note(**facts: Any) -> None:
    """Facts of `Status`: hotkey, round, head, head_time, next_window; without any the file only says that the program lives."""
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


def open_wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases with `log(values, step=n)` and `finish()`; a folder's run goes on when it is opened again.

    Of its own accord wandb also sends the command line, where a token may stand, all output and the repository: not here.
    WANDB_MODE=offline writes below the folder, for `wandb sync` later. Raises Rejected(SETTING) where it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise Rejected(Reason.SETTING, "--wandb without the package", "pip install 'sn29[wandb]'", "--wandb") from None
    name = hashlib.sha256(f"{folder.resolve()} {config.get('began')}".encode()).hexdigest()[:16]
    quiet = wandb.Settings(
        console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True
    )
    return wandb.init(project=project, dir=folder, id=name, resume="allow", config=dict(config), settings=quiet)
