"""A stranger's model is tokenised and evaluated in a child process: no wallet, no token, no network, bounded time and memory.

    parent   Here.evaluate(job, ...)  writes job.json, has a child forked (`forkserver`), waits with a deadline
    child    confines itself, checks the files, tokenises, loads, probes; evaluates portion after portion of the samples and
             tells the losses of each
    parent   says after each portion whether to go on
    child    writes the result in one rename, exits
    parent   reads the file: Evaluated, or Rejected with the child's reason; no file means ChildEnded, with how it ended

The result is a file: of any size, and nothing that the child does can block the parent.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from sn29.errors import Reason, Rejected, Unavailable, shown
from sn29.evaluation.forkserver import ForkServer, Talk
from sn29.evaluation.probes import PLACES, TOKENS, Probes
from sn29.evaluation.profile import Profile, Tiles
from sn29.records import Loss, ModelFacts, RepoFile, Sample

BASE_BYTES = 3 << 30
"""Memory a child needs beside the model and its activations: the libraries' private data, measured below 1 GiB, with room."""


@dataclass(frozen=True, slots=True)
class Job:
    """One model and the samples that it has not been measured on."""

    checkpoint: str
    """Folder with config.json and weights."""
    tokenizer: str
    """Path of the tokenizer.json that reads the samples."""
    start_token: int
    max_tokens: int
    """A longer sample is unscorable under this model: +inf."""
    dtype: str
    """`float32` or `bfloat16`."""
    device: str
    threads: int
    """CPU threads of the child; they move no bit of a loss."""
    profile: Profile
    samples: tuple[Sample, ...]
    files: tuple[RepoFile, ...] = ()
    """The checkpoint's files as the Hub lists them: hashed again in the child. None: a folder that nobody has listed."""
    tokenizer_oid: str = ""
    """Of a tokenizer that is not the model's own: `sha256:...` of its file, hashed again in the child too."""
    portions: tuple[int, ...] = ()
    """Numbers of leading samples, rising, after which `decide` is asked; nothing is asked about all of them."""
    model_bytes: int | None = None
    """What weights and activations may take; a model that needs more is streamed layer by layer. None: all that there is."""
    every_reason: bool = False
    """Look on after the first reason for a refusal: see `SeveralReasons`."""

    @property
    def own_tokenizer(self) -> bool:
        """The model brings its tokenizer: what is wrong with it is the miner's fault, and else ours."""
        return Path(self.tokenizer).parent == Path(self.checkpoint)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a child found."""

    losses: tuple[Loss, ...]
    """Of the job's samples, in their order; +inf with a reason where there is none. Fewer when `decide` said so."""
    tensor_digest: str
    """Canonical identity of the weights that were scored (`checkpoint.tensor_digest`)."""
    probes: Probes

    def __iter__(self) -> Iterator[Loss]:
        return iter(self.losses)

    def __len__(self) -> int:
        return len(self.losses)


class Ending(Enum):
    """How a child ended that left no result."""

    DEADLINE = "had not ended by its deadline"
    CPU_TIME = "used up its processor time"
    TOKENIZER = "read the texts too slowly with the model's tokenizer"
    MEMORY = "ran out of the memory that it may use"
    DEVICE = "could not use its GPU"
    DEVICE_MEMORY = "found too little free memory on its GPU"
    MACHINE = "was let down by this machine"
    ABORT = "was given up by a library (abort)"
    FAULT = "broke off at a fault of memory or arithmetic"
    KILLED = "was killed from outside"
    ERROR = "ended with an error"


class ChildEnded(Unavailable):
    """The child left no result: of the model nothing is known, and the machine may be at fault."""

    def __init__(self, ending: Ending, detail: str) -> None:
        super().__init__("evaluation", f"the child {ending.value}: {shown(detail, 200)}")
        self.ending = ending


class TooLate(ChildEnded):
    """The child had not ended by its deadline."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(Ending.DEADLINE, f"no result within {deadline_s:g} s")


class FileChanged(Unavailable):
    """A file on this machine's disk is not the one that was fetched: fetch it again."""

    def __init__(self, path: str) -> None:
        super().__init__("evaluation", f"{shown(path)} is not the file that was fetched: its hash is another one")
        self.path = path


class SeveralReasons(Rejected):
    """The first of `found`, which are all that the child came to: for a job that asks for every reason."""

    def __init__(self, found: Sequence[Rejected]) -> None:
        super().__init__(found[0].reason, found[0].got, found[0].limit, found[0].where)
        self.found = tuple(found)


def memory_needed(facts: ModelFacts, max_tokens: int) -> int:
    """Bytes that the child may use: libraries, the weights in float32 three times over (read, cast, kept), logits likewise."""
    return BASE_BYTES + 12 * facts.num_parameters + 12 * max_tokens * facts.vocab_size


Decide = Callable[[tuple[Loss, ...]], bool]
"""decide(losses so far, in the order of the job's samples) -> whether to measure on."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """How this machine computes the losses of a model. Its text is part of what a loss is kept under."""

    profile: Profile
    device: str
    """The processor's name, or the one that the GPU's driver gives."""
    libraries: str
    """torch and transformers, with their versions."""
    note: str = ""
    """Why it is not the fastest way, if it is not."""

    def __str__(self) -> str:
        return f"{self.profile}, {self.device}, {self.libraries}"


class Evaluator(Protocol):
    """What measures models: this machine (`Here`), or several (`fleet.Fleet`)."""

    slots: int
    """Evaluations that may run side by side."""

    async def choose(self, vocab_size: int, *, device: str, dtype: str) -> Chosen:
        """The way for models of this vocabulary; measured or compiled at the first call. Raises Unavailable."""
        ...

    async def evaluate(self, job: Job, *, deadline_s: float, memory_bytes: int, decide: Decide | None = None) -> Evaluated:
        """The losses of the job's samples, with the identity of what was scored and what the probes found.

        Raises Rejected with the reason that the child found, ChildEnded (TooLate at the deadline) when it left no result,
        FileChanged when a file is not the listed one, whatever else the child found is void then, and Unavailable when it
        is the competition's own tokenizer that fails, or memory that is too small for any way to evaluate the model.
        """
        ...

    async def self_test(self, *, device: str, dtype: str, threads: int, deadline_s: float = 300) -> Probes:
        """That this machine can evaluate at all: a tiny model of our own in a child, and what the probes found of it.

        A driver fault or a full GPU must never look like a fault of a miner's model. Raises Unavailable when it cannot.
        """
        ...

    async def close(self) -> None:
        """Ends every child."""
        ...


class Here:
    """This machine: one evaluation at a time, each in a child of its own. Belongs to one event loop."""

    slots = 1

    def __init__(self, work_dir: Path | None = None) -> None:
        """`work_dir` is where children get their folders, and keeps compiled code from one start to the next; None: the
        system's place for temporary files, and code is compiled again (10 CPU seconds)."""
        self._work_dir = work_dir
        self._server = ForkServer(work_dir / "compiled" if work_dir else None)
        self._chosen: dict[tuple[int, str, str], Chosen] = {}
        self._chosen_in = 0
        """Start of the server that they were asked of."""
        self._choosing = asyncio.Lock()
        self._read: tuple[int, str, frozenset[str]] = (0, "", frozenset())
        """Start of the server, object id of a tokenizer, and the samples that the server has read through it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def choose(self, vocab_size: int, *, device: str, dtype: str) -> Chosen:
        key = vocab_size, device, dtype
        async with self._choosing:
            return await self._choose(key)

    async def _choose(self, key: tuple[int, str, str]) -> Chosen:
        """Asked again of a server that was started since: what was compiled in the old one is gone."""
        if self._chosen_in != self._server.starts:
            self._chosen.clear()
        if key not in self._chosen:
            vocab_size, device, dtype = key
            asked = {"choose": True, "vocab_size": vocab_size, "device": device, "dtype": dtype, "threads": 1}
            if device == "cpu":  # in the server: every child then has the compiled code
                said = json.loads(await self._server.call(f"{_CHILD}:choose", json.dumps(asked)))
            else:  # whoever has touched a GPU cannot be forked
                with _folder_in(self._work_dir) as folder:
                    await self._run(_write(asked, folder, BASE_BYTES, 300), 300)
                    said = _read(folder, 0, dict)
            profile = said.pop("profile")
            tiles = Tiles(**profile.pop("tiles"))
            self._chosen[key] = Chosen(Profile(tiles=tiles, **profile), **said)
            self._chosen_in = self._server.starts
        return self._chosen[key]

    async def evaluate(self, job: Job, *, deadline_s: float, memory_bytes: int, decide: Decide | None = None) -> Evaluated:
        with _folder_in(self._work_dir) as folder:
            if job.tokenizer_oid and not job.own_tokenizer:
                await self._read_texts(job, folder)
            task = write_job(job, folder, memory_bytes, deadline_s)
            told: list[Loss] = []
            talk = _Portions(job, decide, told) if decide is not None and job.portions else None
            await self._run(task, deadline_s, talk)
            found = read_result(folder, job.samples, some=talk is not None and talk.stopped)
            if found.losses[: len(told)] != tuple(told) or (talk is not None and talk.stopped and len(found) != len(told)):
                raise ChildEnded(Ending.ERROR, "its result is not what it told portion by portion")
            return found

    async def self_test(self, *, device: str, dtype: str, threads: int, deadline_s: float = 300) -> Probes:
        test = {"self_test": True, "device": device, "dtype": dtype, "threads": threads}
        with _folder_in(self._work_dir) as folder:
            await self._run(_write(test, folder, BASE_BYTES, deadline_s), deadline_s)
            return _read(folder, 0, lambda result: _probes(result["passed"]))

    async def _read_texts(self, job: Job, folder: Path) -> None:
        """Texts of the competition's own tokenizer are read once, in the server: every child then has their ids."""
        wanted = frozenset(sample.id for sample in job.samples)
        if self._read[:2] == (self._server.starts, job.tokenizer_oid) and wanted <= self._read[2]:
            return
        texts = folder / "texts.json"
        texts.write_text(json.dumps([job.tokenizer, job.tokenizer_oid, [[s.id, s.text] for s in job.samples]]))
        try:
            await self._server.call(f"{_CHILD}:read_texts", str(texts))
        except Unavailable as error:
            raise Unavailable("the competition's tokenizer", error.why) from None
        finally:
            texts.unlink()
        self._read = self._server.starts, job.tokenizer_oid, wanted

    async def close(self) -> None:
        await self._server.close()

    async def _run(self, task: Path, deadline_s: float, talk: Talk | None = None) -> None:
        """Returns when the child has left a result. Raises ChildEnded, ServerEnded."""
        folder = task.parent
        try:
            status = await self._server.run(f"{_CHILD}:child", str(task), folder=folder, deadline_s=deadline_s, talk=talk)
        except TimeoutError:
            raise TooLate(deadline_s) from None
        if status != 0 or not (folder / _RESULT).exists():
            raise ended(status, _last_words(folder / "errors"))


def _last_words(errors: Path) -> str:
    """The end of what a child said; nothing when there is no such file, or another thing in its place."""
    try:
        descriptor = os.open(errors, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as said:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        said.seek(max(0, os.fstat(descriptor).st_size - 4000))
        return said.read().decode(errors="replace").strip()


@dataclass(slots=True)
class _Portions:
    """Our side of the conversation: a line of losses from the child, a byte back."""

    job: Job
    decide: Decide
    told: list[Loss]
    stopped: bool = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for upto in self.job.portions:
            samples = self.job.samples[len(self.told) : upto]
            try:
                line = await reader.readline()
                if not line:  # it has found something to refuse, or has died: its result says
                    return
                self.told += _losses_in(json.loads(line, parse_constant=_no_constant), samples)
            except (ValueError, TypeError, RecursionError, OSError) as error:
                why = f"no losses that can be read ({type(error).__name__}: {shown(error, 100)})"
                raise ChildEnded(Ending.ERROR, why) from None
            self.stopped = not self.decide(tuple(self.told))
            writer.write(STOP if self.stopped else GO_ON)
            if self.stopped:
                return


GO_ON, STOP = b"+", b"."
_CHILD = "sn29.evaluation.child"


# --- a child's folder: job.json, result.json, errors -------------------------------------------------------------------

_PREFIX, _RESULT = "sn29-evaluation-", "result.json"


@contextmanager
def _folder_in(work_dir: Path | None) -> Iterator[Path]:
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=work_dir) as folder:
        yield Path(folder).absolute()


def sweep(work_dir: Path) -> None:
    """Deletes the folders, with the texts in them, that a killed validator's evaluations left. None must be running."""
    for left in work_dir.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def write_job(job: Job, folder: Path, memory_bytes: int, deadline_s: float) -> Path:
    """What the child reads; its only argument."""
    return _write(asdict(job), folder, memory_bytes, deadline_s)


def _write(job: dict[str, Any], folder: Path, memory_bytes: int, deadline_s: float) -> Path:
    task = folder / "job.json"
    more = {"result": str(folder / _RESULT), "memory_bytes": memory_bytes, "deadline_s": deadline_s}
    task.write_text(json.dumps(job | more))
    return task


# --- what a child may say: nothing that it wrote is taken on trust but numbers, within what numbers can be ---------------

_CHILDS_REASONS = {
    reason.name: reason
    for reason in (
        Reason.FORBIDDEN_FILE, Reason.MISSING_FILE, Reason.TOO_LARGE, Reason.BAD_CONFIG, Reason.FAMILY, Reason.TENSORS,
        Reason.VOCABULARY, Reason.TOKENIZER, Reason.ROUND_TRIP, Reason.NOT_FINITE, Reason.NOT_CAUSAL,
        Reason.NOT_DETERMINISTIC,
    )
}  # fmt: skip
"""What the files alone can show. Who came first, or whose setting is wrong, is not a child's to say."""
_UNSCORED = frozenset({Reason.ROUND_TRIP.code, "too_long", "not_finite"})
_Found = TypeVar("_Found")


def read_result(folder: Path, samples: Sequence[Sample], *, some: bool = False) -> Evaluated:
    """What the child wrote, of leading samples alone if `some`. Raises Rejected, FileChanged, Unavailable, or ChildEnded when
    it is no result."""
    return _read(folder, len(samples), lambda result: _read_result(result, samples, some=some))


def _read(folder: Path, num_samples: int, of: Callable[[dict[str, Any]], _Found]) -> _Found:
    path = folder / _RESULT
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.lstat().st_size > file_bytes(num_samples):
            raise ValueError("not a file, or too large")
        return of(json.loads(path.read_bytes(), parse_constant=_no_constant))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ChildEnded(Ending.ERROR, f"no result that can be read ({type(error).__name__}: {shown(error, 100)})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_result(result: dict[str, Any], samples: Sequence[Sample], *, some: bool) -> Evaluated:
    if "changed" in result:
        raise FileChanged(_text(result["changed"]))
    if "unavailable" in result:
        what, why = map(_text, result["unavailable"])
        raise Unavailable(shown(what, 40), shown(why))
    if "rejected" in result:
        found = [Rejected(_CHILDS_REASONS[_text(name)], *map(_text, rest)) for name, *rest in result["rejected"]]
        raise found[0] if len(found) == 1 else SeveralReasons(found)
    losses = tuple(_losses_in(result["losses"], samples[: len(result["losses"])] if some else samples))
    if not re.fullmatch("[0-9a-f]{64}", _text(result["tensor_digest"])):
        raise ValueError("a tensor digest that is none")
    return Evaluated(losses, result["tensor_digest"], _probes(result["probes"]))


def _losses_in(told: Sequence[Any], samples: Sequence[Sample]) -> Iterator[Loss]:
    """What a child says of these samples. Raises ValueError, TypeError."""
    for sample, (nats, tokens, reason) in zip(samples, told, strict=True):
        yield _loss(sample, nats, tokens, reason)


def _loss(sample: Sample, nats: object, tokens: object, reason: object) -> Loss:
    """Finite and not negative without a reason, or null with one of the three."""
    fits = reason in _UNSCORED if nats is None else reason == ""
    if not fits or not isinstance(reason, str) or not isinstance(tokens, int):
        raise ValueError("a loss that is none")
    loss = math.inf if nats is None else float(_number(nats, sys.float_info.max))
    return Loss(sample.id, loss, int(_number(tokens, 2**31 - 1)), reason)


def _probes(found: Any) -> Probes:
    places, influence, tolerance = found
    if len(places) != PLACES or not all(isinstance(place, int) and 0 < place < TOKENS for place in places):
        raise ValueError("other places than the probes have")
    return Probes(tuple(places), float(_number(influence, 1.0)), float(_number(tolerance, 1.0)))


def _number(value: object, largest: float) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise ValueError(f"{shown(value, 40)} instead of a number from 0 to {largest:g}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value, 40)} instead of a text")
    return value


def file_bytes(num_samples: int) -> int:
    """Largest file that a child may write."""
    return (64 << 20) + 1024 * num_samples


# --- how a child ends ---------------------------------------------------------------------------------------------------


_OF_MEMORY = re.compile(
    r"MemoryError|annot allocate memory|can't allocate memory|memory allocation of \d+ bytes|bad_alloc|out of memory"
    r"|OutOfMemory|too many memory regions"
)
_OF_DEVICE = re.compile(r"CUDA|cuDNN|CUDNN|CUBLAS|NVRM|NCCL|ECC error")
_OF_DEVICE_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
)
# A full disk, no process or file left, and so on. Not 12, no memory: that is how the child's own limit says no.
_OF_MACHINE = re.compile(r"^[\w.]*Error: \[Errno (?!12\])\d+\]|\(os error (?!12\))\d+\)", re.MULTILINE)
_OF_THREADS = re.compile(r"can't start new thread|Thread creation failed")
_OF_SIGNAL = {
    signal.SIGXCPU: Ending.CPU_TIME, signal.SIGPROF: Ending.TOKENIZER, signal.SIGKILL: Ending.KILLED,
    signal.SIGABRT: Ending.ABORT, signal.SIGSEGV: Ending.FAULT, signal.SIGBUS: Ending.FAULT, signal.SIGILL: Ending.FAULT,
    signal.SIGFPE: Ending.FAULT,
}  # fmt: skip


def ended(status: int, errors: str) -> ChildEnded:
    """How a child without a result ended: exit status (below 0 a signal) and the end of what it said."""
    last = (errors.splitlines() or ["no message"])[-1]
    sent = signal.Signals(-status).name if status < 0 and -status in {*signal.Signals} else f"exit status {status}"
    return ChildEnded(_ending(status, errors, last), f"{sent}, {last}")


def _ending(status: int, errors: str, last: str) -> Ending:
    anywhere = ((_OF_DEVICE_MEMORY, Ending.DEVICE_MEMORY), (_OF_THREADS, Ending.MACHINE), (_OF_MEMORY, Ending.MEMORY))
    for pattern, ending in anywhere:
        if pattern.search(errors):
            return ending
    if status < 0:
        by_signal = _OF_SIGNAL.get(signal.Signals(-status) if -status in {*signal.Signals} else signal.SIGKILL, Ending.KILLED)
        return Ending.DEVICE if by_signal is Ending.ABORT and "CUDA error" in errors else by_signal
    if _OF_DEVICE.search(last):
        return Ending.DEVICE
    return Ending.MACHINE if _OF_MACHINE.search(last) else Ending.ERROR
