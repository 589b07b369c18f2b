"""A process that has imported the libraries once, and forks a child for each job: a child starts at once, and clean.

    validator     ForkServer.run("module:function", argument)      one line to the server, one line back when it ended
    fork server   `python -m sn29.evaluation.forkserver`           imports torch and transformers, compiles, runs nothing else
    child         module:function(argument, socket)                forked from it at once, where a new interpreter takes 5 s

A child that has handled one stranger's files never handles another's: what a hostile tokenizer left in it dies with it, and
a confinement to one model's folder cannot be widened again. Serving many models from one child would save the fork.

The server has one thread (a process with more of them cannot be forked safely, nor can it enter a user namespace), no
variable of the validator's environment beside the few named here, no file of a stranger, and it dies with the validator.
`multiprocessing`'s own fork server hands the parent's environment on, tokens and all, and imports the parent's main module
into every child.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sn29.errors import Unavailable

_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV", "CXX")
_MESSAGE_BYTES = 1 << 16
_LINE_BYTES = 1 << 24
"""Longest line that a child may say: 20,000 losses are 0.5 MB."""
_PR_SET_PDEATHSIG = 1
_START_S = 120.0
"""Seconds in which the server must have imported its libraries: 4 on a quiet machine."""
LIBRARIES = (
    "tokenizers", "safetensors.torch", "transformers.models.llama.modeling_llama", "transformers.models.phi.modeling_phi",
    "transformers.models.phi3.modeling_phi3", "sn29.models.tokenizer", "sn29.evaluation.packed", "sn29.evaluation.streamed",
    "sn29.evaluation.child",
)  # fmt: skip
"""What a child finds imported. The first family takes 5 s of imports, and transformers puts them off until it is asked for."""


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ServerEnded(Unavailable):
    """The fork server is gone, and with it all its children."""


class ForkServer:
    """The validator's side: starts the server when it is first needed, and again when it has died.

        async with ForkServer(cache) as server:
            status = await server.run("sn29.evaluation.child:child", "/a/folder/job.json", folder=..., deadline_s=900)

    Belongs to one event loop.
    """

    def __init__(self, cache: Path | None = None, *, libraries: Sequence[str] = LIBRARIES) -> None:
        """`cache` is where compiled code is kept from one start to the next; None: nowhere."""
        self._cache, self._libraries = cache, tuple(libraries)
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._pids: dict[int, int] = {}
        """Number of a request -> its child, until the server says that it has ended."""
        self._count = 0
        self._starting = asyncio.Lock()
        self.starts = 0
        """How often a server was started: one that died has taken along what it was called for."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def run(self, target: str, argument: str, *, folder: Path, deadline_s: float, talk: Talk | None = None) -> int:
        """Forks a child that calls `target(argument, socket)`, in `folder`, where its errors go.

        `talk`, when given, is awaited beside it with the two directions of our end of that socket; otherwise the child has
        None. Gives the exit status, below 0 the signal that ended it. Raises TimeoutError at the deadline, ServerEnded, and
        what `talk` raises; whatever it is, the child and all of its group have been killed by then.
        """
        ours, theirs = socket.socketpair() if talk else (None, None)
        with contextlib.ExitStack() as closing:
            if ours is not None:
                closing.callback(ours.close)
            with theirs or contextlib.nullcontext():
                asked = {"fork": target, "argument": argument, "folder": str(folder)}
                number, answer = await self._ask(asked, [theirs.fileno()] if theirs else [])
            try:
                async with asyncio.timeout(deadline_s), asyncio.TaskGroup() as both:
                    if talk is not None:
                        both.create_task(_converse(talk, ours))
                    return int((await asyncio.shield(answer))["status"])
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                if not answer.done():
                    self._send({"id": number, "kill": True})
                    _kill(self._pids.get(number))  # the server may be busy; it has not let go of the number yet
                    with contextlib.suppress(TimeoutError, ServerEnded):
                        await asyncio.wait_for(asyncio.shield(answer), 10)
                self._waiting.pop(number, None)
                self._pids.pop(number, None)

    async def call(self, target: str, argument: str, *, deadline_s: float = 300) -> str:
        """What `target(argument)` says in the server itself: children inherit what it leaves behind, a compiled function say.

        Only our own code and data: whatever happens to it happens to the server. Raises Unavailable with its error, and
        ServerEnded at the deadline.
        """
        number, answer = await self._ask({"call": target, "argument": argument}, [])
        try:
            said = await asyncio.wait_for(answer, deadline_s)
        except TimeoutError:
            await self.close()  # it does nothing else meanwhile
            raise ServerEnded("fork server", f"{target} had not ended within {deadline_s:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in said:
            raise Unavailable("fork server", str(said["error"]))
        return str(said["said"])

    async def close(self) -> None:
        """Ends the server and its children."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()  # the server sees it, kills its children and ends
            self._control = None
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
            self._process = None
        self._give_up("it was closed")
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _ask(self, what: Mapping[str, Any], fds: list[int]) -> tuple[int, asyncio.Future[Mapping[str, Any]]]:
        async with self._starting:
            if self._control is None:
                await self._start()
        self._count += 1
        answer = self._waiting[self._count] = asyncio.get_running_loop().create_future()
        self._send({**what, "id": self._count}, fds)
        return self._count, answer

    async def _start(self) -> None:
        await self.close()  # of one that died
        self.starts += 1
        self._home = tempfile.TemporaryDirectory(prefix="sn29-forkserver-", ignore_cleanup_errors=True)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sn29.evaluation.forkserver", str(there.fileno()), *self._libraries,
                env=environment(self._home.name, self._cache), cwd=self._home.name, pass_fds=[there.fileno()],
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        here.setblocking(False)
        self._control = here
        ready = self._waiting[0] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(here, self._read)
        try:
            await asyncio.wait_for(ready, _START_S)
        except TimeoutError:
            await self.close()
            raise ServerEnded("fork server", f"it had not imported its libraries within {_START_S:.0f} s") from None
        except asyncio.CancelledError:  # while it imports it would not see that nobody waits, and `close` would wait for it
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            raise
        finally:
            self._waiting.pop(0, None)

    def _send(self, what: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        if self._control is None:
            return
        try:
            socket.send_fds(self._control, [json.dumps(what).encode()], list(fds))
        except OSError as error:
            self._give_up(str(error))

    def _read(self) -> None:
        """An answer has come, or the server's end."""
        assert self._control is not None
        try:
            data = self._control.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
            self._give_up("it has died")
            return
        said = json.loads(data)
        if "pid" in said:
            self._pids[said["id"]] = said["pid"]
            return
        answer = self._waiting.get(said["id"])
        if answer is not None and not answer.done():
            answer.set_result(said)

    def _give_up(self, why: str) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ServerEnded("fork server", why))


async def _converse(talk: Talk, ours: socket.socket | None) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LINE_BYTES)
    try:
        await talk(reader, writer)
    finally:
        writer.close()


def environment(home: str, cache: Path | None = None) -> dict[str, str]:
    """What server and children may know: where programs and libraries are, and nothing of the validator (no token, no
    wallet, no home).

    One thread a library: what has more cannot be forked, and rows of samples are shared among threads by the engine.
    """
    alone = {
        "HOME": home, "HF_HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "CUDA_CACHE_PATH": f"{home}/cuda",
        "TORCHINDUCTOR_CACHE_DIR": str(cache.absolute()) if cache else f"{home}/compiled",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    found = {name: os.environ[name] for name in _KEPT if name in os.environ}
    if "PYTHONPATH" in found:  # the server works in another folder
        parts = [os.path.abspath(part) for part in found["PYTHONPATH"].split(os.pathsep) if part]
        found["PYTHONPATH"] = os.pathsep.join(parts)
    return found | alone


# --- in the server ----------------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, int] = {}
        """Number of the request -> process."""

    def serve(self) -> None:
        """Until the validator is gone."""
        self._say({"id": 0})
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._ended(key.data, key.fd)
                elif not self._take():
                    for pid in self._children.values():
                        _kill(pid)
                    return

    def _take(self) -> bool:
        """One request; False when there will be no more."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 1)
        except OSError:
            return False
        if not data:
            return False
        asked = json.loads(data)
        if "fork" in asked:
            self._fork(asked, fds)
        elif "kill" in asked and asked["id"] in self._children:
            _kill(self._children[asked["id"]])
        elif "call" in asked:
            self._say({"id": asked["id"], **_called(asked["call"], asked["argument"])})
        for fd in fds:
            os.close(fd)
        return True

    def _fork(self, asked: Mapping[str, Any], fds: Sequence[int]) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            print(f"fork: {error}", file=sys.stderr)
            self._say({"id": asked["id"], "status": -signal.SIGKILL})  # no model can do that
            return
        if pid == 0:
            self._selector.close()
            self._control.close()
            _be_child(server, asked, fds)
        pidfd = os.pidfd_open(pid)
        self._children[asked["id"]] = pid
        self._say({"id": asked["id"], "pid": pid})
        self._selector.register(pidfd, selectors.EVENT_READ, asked["id"])

    def _ended(self, number: int, pidfd: int) -> None:
        pid = self._children.pop(number)
        _kill(pid)  # what is left of its group
        self._selector.unregister(pidfd)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._say({"id": number, "status": status})

    def _say(self, what: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the validator is gone: the next select says so
            self._control.send(json.dumps(what).encode())


def _kill(pid: int | None) -> None:
    """With its group."""
    if pid is None:
        return
    for kill in (os.killpg, os.kill):  # a child that has not made its group yet is killed alone
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _called(target: str, argument: str) -> dict[str, str]:
    try:
        return {"said": str(_function(target)(argument))[: _MESSAGE_BYTES // 2]}
    except Exception as error:  # noqa: BLE001 - told to the validator, which decides
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _be_child(server: int, asked: Mapping[str, Any], fds: Sequence[int]) -> None:
    """The whole life of a child."""
    status = 1
    try:
        os.setsid()
        _die_with(server)
        folder = asked["folder"]
        os.chdir(folder)
        os.environ.update(environment(folder))
        tempfile.tempdir = folder
        errors = os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(errors, 2)
        os.close(errors)
        with socket.socket(fileno=fds[0]) if fds else contextlib.nullcontext() as talk:
            _function(asked["fork"])(asked["argument"], talk)
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of a child may run on into the server's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def _die_with(parent: int) -> None:
    """SIGKILL when the parent dies, or now if it already has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Entry point of the server: number of its socket, what to import.

    It ends when nobody holds the other end of the socket any more, and takes its home along.
    """
    control, *libraries = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the validator says when to end
    for name in libraries:
        importlib.import_module(name)
    _Server(socket.socket(fileno=int(control))).serve()
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)
    os._exit(0)  # the interpreter takes a second or more to close torch, in which a validator that ends waits for us


if __name__ == "__main__":
    main()
