"""What a program shows of itself while it runs: STATE_DIR/status.json, and with --status.port the pages of `sn29 report`.

The pages are served by a process of their own, which has no wallet and no token: it opens the store read-only and reads files, so
nothing that it does, and no request that it gets, can hold up or end a round. When it ends it is started again, later each time;
when the program ends it ends too, however the program ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sn29 import telemetry
from sn29.concealment import without_secrets
from sn29.errors import Reason, Rejected
from sn29.settings import NeuronSettings, ValidatorSettings

BEAT_S = 5.0
"""A status that is much older than this is of a program that hangs or has ended."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 300.0
_LIVED_S = 60.0
"""A page that was served for so long had a good start: the next pause is the first one again."""
_KEPT = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR", "SSL_CERT_FILE", "GIT_SSL_CAINFO",
)  # fmt: skip
"""All that the page's process has of our environment."""


@asynccontextmanager
async def beside(settings: NeuronSettings, program: str, folder: Path) -> AsyncIterator[None]:
    """Inside it `folder` says what the program does, and the pages are served if a port was given for them."""
    telemetry.keep_status(folder / telemetry.STATUS, program)
    tasks = [asyncio.create_task(_beat())]
    if settings.status_port:
        tasks.append(asyncio.create_task(_serve(settings, folder)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        error = sys.exc_info()[1]
        why = "" if error is None or isinstance(error, asyncio.CancelledError) else str(error) or repr(error)
        settled = isinstance(error, Rejected) and error.reason in (Reason.SETTING, Reason.COMPETITION_FILE)
        telemetry.leave_status(why, settled=settled)


async def _beat() -> None:
    while True:
        telemetry.note()
        await asyncio.sleep(BEAT_S)


async def _serve(settings: NeuronSettings, folder: Path) -> None:
    """Keeps the page's process alive. Why there is no page is said once, until there is one again."""
    host = f"[{settings.status_host}]" if ":" in settings.status_host else settings.status_host
    where, pause_s = f"{host}:{settings.status_port}", _FIRST_PAUSE_S
    git = without_secrets(settings.competitions_git)  # the commit is in the cache: it is not fetched again
    command = [
        sys.executable, "-m", "sn29.cli", "report", "--serve", where, "--state.dir", str(folder.absolute()),
        "--competitions.dir", str(settings.competitions_dir.absolute()), "--competitions.git", git,
        "--parent", str(os.getpid()),
    ]  # fmt: skip
    if isinstance(settings, ValidatorSettings):
        command += ["--weights.alarm-epochs", str(settings.weights_alarm_epochs)]
    told = ""

    def is_up() -> None:
        nonlocal told
        told = ""
        telemetry.tell("status_page", f"status page, metrics and health check on http://{where}/")

    while True:
        began = asyncio.get_running_loop().time()
        said = (await _until_it_ends(command, folder, is_up)).removeprefix(f"{where}: ")
        if asyncio.get_running_loop().time() - began > _LIVED_S:
            pause_s = _FIRST_PAUSE_S
        if said != told:
            told = said
            telemetry.warn("status_page", f"no page on http://{where}/: {said}; all else goes on, and the page is tried again")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _until_it_ends(command: list[str], folder: Path, is_up: Callable[[], None]) -> str:
    """Why: its last lines on standard error, or its exit status. Calls `is_up` when it serves. Whoever cancels this ends the
    process too."""
    here = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"PYTHONPATH": here}
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment, start_new_session=True,
            cwd=folder,  # where no .env and no sn29.yaml is
        )  # fmt: skip
    except OSError as error:
        return str(error)
    try:
        last: deque[str] = deque(maxlen=2)  # what is wrong, and what to do
        assert process.stdout is not None
        assert process.stderr is not None
        if await _line(process.stdout):  # its one line: that it is up
            is_up()
        while line := await _line(process.stderr):
            last.append(line.strip())
        status = await process.wait()
    finally:
        await _end(process)
    why = "; ".join(last)[-300:].removeprefix("sn29 report: ").replace("--serve", "--status.port")  # the flag that is given here
    return why or f"it ended without a word (exit status {status})"


async def _line(stream: asyncio.StreamReader) -> str:
    """The next one, empty at the end; of one that is too long a part."""
    try:
        return (await stream.readline()).decode(errors="replace")
    except ValueError:
        return "a line that is too long\n"


async def _end(process: Process) -> None:
    """It only reads, so that nothing is lost by a kill, and it is not waited for while it closes its libraries."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
