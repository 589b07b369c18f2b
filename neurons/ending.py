"""How the two programs end: within a stated time of the first SIGTERM or Ctrl-C, and at once on the second.

    first     the program's task is cancelled: what is in hand is ended or rolled back, children end, the files are closed;
              exit status 0, and one line says what was left
    in time   what has not ended LAST_S before the time is over is left as a kill would leave it: exit status 0 too
    second    the process ends where it is: 130 or 143, as a shell says it

Signals are heard in a thread: Python calls handlers between two lines of the main one, which may be in one call of C for a minute
(a copy of a large store), and C itself writes the signal's number to a pipe at once.

A cut is safe because a kill is: whatever must not be lost was flushed before it was counted as done, and files are written
beside their place and renamed. So threads that wait for the Hub or write a file that nobody relies on yet are not waited for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from sn29 import telemetry
from sn29.errors import Sn29Error

LAST_S = 1.0
"""Kept of the time for the end itself: the line that is said, and the interpreter's own closing."""
_CLOSING_S = 1.0
"""Before that, for children to end and files to be closed, once what is in hand has had its time."""
_SAME_S = 0.5
"""A second signal so soon is the first one again: `timeout` and systemd send theirs to a process and to its group."""
_SAY_S = 0.3
"""So long a line about a signal is waited for: where nobody reads standard error, whoever writes to it waits for ever."""
_LISTEN_S = 0.5
"""Pause after which the handlers are set again: Ray, when it is started, puts one in their place that aborts the process 3 s
after a SIGTERM, whatever it is doing then."""
_THREADS = "sn29-work"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
"""Else a child that is forked, and sent a signal, would tell its parent to end."""


class Stop:
    """Runs one program, and ends it when it is asked to."""

    def __init__(self, program: str, within_s: float) -> None:
        """program: `validator` or `miner`, for the lines. within_s: seconds from the first signal to the end."""
        self._program, self._within_s = program, within_s
        self._asked_at: float | None = None
        self._cancel: Callable[[], object] = lambda: None
        self.left = "nothing was begun"
        """What the program leaves behind, in words: it keeps this up to date, at the latest when it is cancelled."""

    def is_asked(self) -> bool:
        return self._asked_at is not None

    @property
    def left_s(self) -> float:
        """Seconds that what is in hand still has; all of them while nobody asked for the end."""
        over = time.monotonic() - self._asked_at if self._asked_at is not None else 0.0
        return max(0.0, self._within_s - LAST_S - _CLOSING_S - over)

    def run(self, program: Callable[[Stop], Coroutine[Any, Any, None]]) -> None:
        """Returns when the program has ended, by itself or by a signal. Raises what it raises, unless a signal came first."""
        with self._ears():
            asyncio.run(self._watch(program))

    def leave(self) -> None:
        """Ends the process if a signal asked for it: with torch in it the interpreter takes seconds to close, for nothing."""
        if self.is_asked():
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            self._end()

    async def _watch(self, program: Callable[[Stop], Coroutine[Any, Any, None]]) -> None:
        threads = ThreadPoolExecutor(thread_name_prefix=_THREADS)
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads)
        task = asyncio.create_task(program(self))
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if self.is_asked():  # before there was anything to cancel
            task.cancel()
        try:
            while not (await asyncio.wait([task], timeout=_LISTEN_S))[0]:
                self._listen()
            task.result()
        except (asyncio.CancelledError, Sn29Error) as error:  # what breaks off while it is stopped is no failure
            if not self.is_asked():
                raise
            if isinstance(error, Sn29Error):
                telemetry.warn("unavailable", str(error))
        if not self.is_asked():
            return
        threads.shutdown(wait=False, cancel_futures=True)
        telemetry.tell("stopped", f"{self.left}; start again to go on")
        if await self._are_busy():
            os._exit(0)

    async def _are_busy(self) -> bool:
        """Whether a thread is still at work after a moment, such as one that waits for a reply of the Hub."""
        for _ in range(10):
            if not any(thread.name.startswith(_THREADS) for thread in threading.enumerate()):
                return False
            await asyncio.sleep(0.05)
        return True

    # --- signals ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _ears(self) -> Iterator[None]:
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        woken = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        before = self._listen()
        threading.Thread(target=self._hear, args=(ear,), name="sn29-ears", daemon=True).start()
        try:
            yield
        finally:
            if not self.is_asked():  # afterwards ours stay: the process is ending, and a late signal changes nothing
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(woken)
                os.close(mouth)

    @staticmethod
    def _listen() -> dict[signal.Signals, Any]:
        """Puts handlers that do nothing in the place of those that would end the process; these, by signal."""
        return {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}

    def _hear(self, ear: int) -> None:
        """In a thread of its own, until the other end is closed."""
        while heard := os.read(ear, 1):
            if heard[0] in _SIGNALS:
                self._ask(heard[0])
        os.close(ear)

    def _ask(self, number: int) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > _SAME_S:
                _say(os.write, 2, f"sn29 {self._program}: a second signal: ended at once\n".encode())
                os._exit(128 + number)
            return
        self._asked_at = now
        cut_s = self._within_s - LAST_S
        for seconds, end in ((cut_s, self._cut), (cut_s + LAST_S / 2, self._end)):
            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
        what = f"a signal asked for it: it ends within {self._within_s:g} s, a second signal ends it at once"
        _say(telemetry.tell, "stopping", what)
        with suppress(RuntimeError):  # its loop has ended meanwhile
            self._cancel()

    def _cut(self) -> None:
        """In a thread of its own: the main one is busy with what does not end."""
        what = f"not ended after {self._within_s - LAST_S:g} s: left as a kill would leave it, nothing is half written"
        telemetry.warn("stopped", f"{what}; start again to go on")
        telemetry.leave_status()
        self._end()

    def _end(self) -> None:
        os._exit(0)


def _say(say: Callable[..., object], *words: object) -> None:
    """In a thread of its own, and not waited for longer than _SAY_S."""
    saying = threading.Thread(target=say, args=words, daemon=True)
    saying.start()
    saying.join(_SAY_S)
