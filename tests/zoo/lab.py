"""Children that are listened to: this process imports the libraries and forks itself for every job, as the fork server does.

    stdin    {"job": path of job.json, "folder": working folder, "deadline_s": 60, "environment": {...}}      one line each
    stdout   {"status": exit status or -signal, "late": false, "rss_kb": peak, "wall_s": ..., "events": [...]}

In the fork runs `sn29.evaluation.child.child`, the entry point of the validator's own child: confinement, parsers, probes,
losses. An audit hook tells what it opened for writing and what it ran; it can tell no more than Python does: Rust opens files
unheard.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from sn29.evaluation.child import child
from sn29.evaluation.forkserver import LIBRARIES

# What tells that a repository's code runs, or that the child does more than read a model.
_TELLING = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "os.fork", "shutil.rmtree",
            "os.remove", "os.symlink", "socket.connect", "ctypes.dlopen")  # fmt: skip


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(asked: dict[str, Any]) -> dict[str, Any]:
    heard, tell = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(heard)
        _child(asked, tell)
    os.close(tell)
    descriptor = os.pidfd_open(pid)
    late = not select.select([descriptor], [], [], asked["deadline_s"])[0]
    if late:
        with contextlib.suppress(ProcessLookupError):  # not yet the leader of its group
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    os.close(descriptor)
    os.set_blocking(heard, False)
    with os.fdopen(heard, "rb") as stream:
        events = sorted(set((stream.read() or b"").decode(errors="replace").splitlines()))
    return {
        "status": os.waitstatus_to_exitcode(status), "late": late, "rss_kb": used.ru_maxrss,
        "wall_s": time.monotonic() - began, "cpu_s": used.ru_utime + used.ru_stime, "events": events,
    }  # fmt: skip


def _child(asked: dict[str, Any], tell: int) -> None:
    """Never returns."""
    try:
        os.setsid()
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        errors = os.open(os.path.join(asked["folder"], "errors"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, to in ((nothing, 0), (nothing, 1), (errors, 2)):
            os.dup2(descriptor, to)
        os.set_blocking(tell, False)
        sys.addaudithook(_hook(tell))
        child(asked["job"], None)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  whatever it is, it must not reach the loop of the process that was forked
        import traceback

        traceback.print_exc()
        status = 1
    os._exit(status)


def _hook(tell: int) -> Any:
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        said = ""
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)) or (
                isinstance(mode, str) and set(mode) & set("wax+")
            )
            said = f"write {path}" if writes else ""
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            said = f"exec {name}" if "/models/" in str(name) and "sn29/models" not in str(name) else ""
        elif event in _TELLING:
            said = f"{event} {str(arguments)[:100]}"
        if said:
            with contextlib.suppress(OSError):  # the pipe is full: enough was said
                os.write(tell, said.replace("\n", " ").encode(errors="replace")[:300] + b"\n")

    return hear


if __name__ == "__main__":
    main()
