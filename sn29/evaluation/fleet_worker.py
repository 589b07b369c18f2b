"""What runs on a fleet's machines (`fleet`): one worker a GPU, with an evaluator of its own, and the files that it lacks.

No Ray here: Ray calls a `Worker`'s methods in threads of its own, and carries what they take and give.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable, shown
from sn29.evaluation.child import processor
from sn29.evaluation.forkserver import environment
from sn29.evaluation.probes import Probes
from sn29.evaluation.worker import Chosen, Evaluated, Evaluator, FileChanged, Job
from sn29.models import checkpoint
from sn29.models.disk import Disk
from sn29.models.fetch import FileSource, fetch
from sn29.records import Loss, ModelId, RepoFile, RepoListing

_PINNED = ("sn29", "torch", "transformers", "tokenizers", "safetensors", "numpy")
"""What decides a number."""
_NOWHERE = ModelId("local", "fleet", "0" * 40)
_GPU_S = 120.0
"""Seconds in which torch must have said what GPU there is."""

Make = Callable[[Path], Evaluator]
"""make(folder that it may use) -> the evaluator of one worker."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker says of itself when it starts."""

    node: str
    """Ray's id of its machine."""
    host: str
    pid: int
    parent: int
    """Process of Ray on that machine."""
    memory_bytes: int
    """What models may use: its GPU's memory; on a CPU the machine's, shared with the other workers there."""
    processor: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"worker {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Portion:
    """A worker asks whether to go on."""

    losses: tuple[Loss, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of ours on its way: their constructors take other arguments than pickle would give them."""

    kind: type[Sn29Error]
    message: tuple[Any, ...]
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, error: Sn29Error) -> Failure:
        fields = {name: _each(value, Sn29Error, cls.of) for name, value in error.__dict__.items()}
        return cls(type(error), error.args, fields)

    def error(self) -> Sn29Error:
        """The same again."""
        found = self.kind.__new__(self.kind)
        found.args = self.message
        found.__dict__.update({name: _each(value, Failure, Failure.error) for name, value in self.fields.items()})
        return found


def _each(value: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """The value, changed where it or a part of it is of that kind: an error may hold others."""
    if isinstance(value, tuple):
        return tuple(_each(part, kind, change) for part in value)
    return change(value) if isinstance(value, kind) else value


Said = Portion | Evaluated | Failure | None
"""None: it was stopped."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Files of one folder of the validator's, under a name that says their content."""

    name: str
    folder: str
    files: tuple[RepoFile, ...]


Read = Callable[[str, int, float | None], bytes]
"""read(path, start, timeout_s) -> the next bytes of a file of the validator's, none at its end. Raises Unavailable."""


class _Theirs(FileSource):
    """A folder of the validator's as `fetch` wants it."""

    def __init__(self, read: Read, folder: str) -> None:
        self._read, self._folder = read, folder

    def stream(self, repo: ModelId, path: str, *, start: int = 0, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        while data := self._read(f"{self._folder}/{path}", start, timeout_s):
            yield data
            start += len(data)


class Worker:
    """The actor's side. Its methods run in threads of Ray's, its evaluator in one thread with one event loop: so `decide`
    may wait for the validator's answer."""

    def __init__(self, make: Make, device: str, cache: Path, cache_bytes: int | None) -> None:
        _forget_secrets()
        self._device, self._cache = device, cache
        self._disk = Disk(cache / "models", budget_bytes=cache_bytes)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="evaluator", daemon=True).start()
        self._evaluator: Evaluator = self._wait(_made(make, cache / "evaluations"))
        self._job: _Running | None = None
        self._held = contextlib.ExitStack()

    def facts(self, node: str, memory_bytes: int) -> Facts:
        """`memory_bytes` is the machine's."""
        if self._device != "cpu":
            memory_bytes = _gpu_memory()
        name = processor() if self._device == "cpu" else ""
        return Facts(node, platform.node(), os.getpid(), os.getppid(), memory_bytes, name, versions())

    def choose(self, vocab_size: int, dtype: str) -> Chosen | Failure:
        found: Chosen | Failure = self._wait(_told(self._evaluator.choose(vocab_size, device=self._device, dtype=dtype)))
        return found

    def self_test(self, dtype: str, threads: int, deadline_s: float) -> Probes | Failure:
        test = self._evaluator.self_test(device=self._device, dtype=dtype, threads=threads, deadline_s=deadline_s)
        found: Probes | Failure = self._wait(_told(test))
        return found

    def has(self, folder: str, tokenizer: str, files: tuple[RepoFile, ...]) -> bool:
        """Whether a job's files can be read here under the validator's names."""
        listed = (Path(folder, file.path) for file in files)
        there = all(path.is_file() and path.stat().st_size == file.size for path, file in zip(listed, files, strict=True))
        return there and Path(folder, "config.json").is_file() and Path(tokenizer).is_file()

    def bring(self, read: Read, parcels: tuple[Parcel, ...], deadline_s: float) -> tuple[str, ...] | Failure:
        """Folders with the parcels' files, fetched and hashed unless they are here; kept until the job ends."""
        self._let_go()
        try:
            return tuple(str(self._bring(read, parcel, deadline_s)) for parcel in parcels)
        except (Sn29Error, OSError) as error:
            self._let_go()
            if isinstance(error, Rejected) and error.reason is Reason.CORRUPT:  # the validator's disk, and not the Hub's file
                error = FileChanged(error.where.removeprefix(f"{_NOWHERE} "))
            return Failure.of(error if isinstance(error, Sn29Error) else _disk(error))

    def _let_go(self) -> None:
        """The copies may be deleted by whoever needs their place."""
        with contextlib.suppress(FileNotFoundError):  # somebody has cleaned up the cache already
            self._held.close()

    def throw_away(self, folder: str) -> None:
        """A copy that is not what was fetched."""
        with _alone(self._cache / "locks" / Path(folder).name):
            shutil.rmtree(folder, ignore_errors=True)

    def _bring(self, read: Read, parcel: Parcel, deadline_s: float) -> Path:
        folder = self._held.enter_context(self._disk.using(parcel.name))
        listing, source = RepoListing(_NOWHERE, parcel.files), _Theirs(read, parcel.folder)
        with _alone(self._cache / "locks" / parcel.name):  # another worker of this machine may want the same
            return fetch(source, listing, folder, deadline_s=deadline_s, room=self._disk.make_room)

    def begin(self, job: Job, deadline_s: float, memory_bytes: int, has_decide: bool) -> Said:
        """Until the first portion, or the end."""
        job = replace(job, device=self._device)  # Ray shows a worker its own GPU only, as the first
        self._job = _Running()
        work = self._job.whole(self._evaluator, job, deadline_s, memory_bytes, has_decide)
        asyncio.run_coroutine_threadsafe(work, self._loop)
        return self._said(self._job)

    def go_on(self, whether: bool) -> Said:
        """`decide`'s answer: until the next portion, or the end."""
        assert self._job is not None
        self._job.answers.put(whether)
        return self._said(self._job)

    def _said(self, job: _Running) -> Said:
        said = job.news.get()
        if not isinstance(said, Portion):
            self._let_go()
        if isinstance(said, BaseException):
            raise said
        return said

    def stop(self, within_s: float) -> bool:
        """Ends the job; whether its child is gone."""
        if self._job is None:
            return True
        self._job.answers.put(False)
        if self._job.task is not None:
            self._loop.call_soon_threadsafe(self._job.task.cancel)
        return self._job.ended.wait(within_s)

    def close(self) -> None:
        self._wait(self._evaluator.close())

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Running:
    """A job under way in a worker."""

    def __init__(self) -> None:
        self.news: queue.SimpleQueue[Said | BaseException] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.task: asyncio.Task[None] | None = None
        self.ended = threading.Event()

    async def whole(self, evaluator: Evaluator, job: Job, deadline_s: float, memory_bytes: int, has_decide: bool) -> None:
        self.task = asyncio.current_task()
        said: Said | BaseException = None
        try:
            decide = self._decide if has_decide else None
            said = await _told(evaluator.evaluate(job, deadline_s=deadline_s, memory_bytes=memory_bytes, decide=decide))
        except BaseException as error:
            said = None if isinstance(error, asyncio.CancelledError) else error
            raise
        finally:
            self.ended.set()
            self.news.put(said)

    def _decide(self, losses: tuple[Loss, ...]) -> bool:
        self.news.put(Portion(losses))
        return self.answers.get()


async def _told(work: Any) -> Any:
    """What is expected as a value: Ray would wrap what is raised. A disk that fails is this machine's, and no bug."""
    try:
        return await work
    except Sn29Error as error:
        return Failure.of(error)
    except OSError as error:
        return Failure.of(_disk(error))


def _disk(error: OSError) -> Unavailable:
    return Unavailable(f"worker on {platform.node()}", str(error))


async def _made(make: Make, folder: Path) -> Evaluator:
    return make(folder)


def _forget_secrets() -> None:
    for name in os.environ.keys() - environment("").keys():
        if not name.startswith("RAY_"):
            del os.environ[name]


def versions() -> dict[str, str]:
    """Of what decides a number, as installed here."""
    return {name: importlib.metadata.version(name) for name in _PINNED}


def _gpu_memory() -> int:
    """Of the first GPU that this process may see; asked by a process of its own, or this one would take half a GB of it."""
    asked = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False, timeout=_GPU_S)
    if said.returncode != 0:
        raise RuntimeError(f"no GPU to be used: {shown((said.stderr.splitlines() or ['no message'])[-1])}")
    return int(said.stdout)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def parcels(job: Job) -> tuple[Parcel, ...]:
    """The job's checkpoint, and its tokenizer where that is none of the checkpoint's files.

    Reads the files of a folder that nobody has listed, to hash them. Raises Rejected(MISSING_FILE).
    """
    folder, tokenizer = Path(job.checkpoint), Path(job.tokenizer)
    files = tuple(f for f in job.files or checkpoint.local_listing(folder).files if checkpoint.is_content(f.path))
    model = Parcel(checkpoint.content_id(files), str(folder), files)
    if tokenizer.parent == folder:
        return (model,)
    content = tokenizer.read_bytes()
    file = RepoFile(tokenizer.name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
    return model, Parcel(f"tokenizer-{file.oid.removeprefix('sha256:')}", str(tokenizer.parent), (file,))
