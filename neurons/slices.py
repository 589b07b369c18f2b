"""A slice of the miner's training in processes of its own, one for each GPU: `python -m neurons.slices FILE` under torchrun.

The miner writes the slice and its own settings into a file, starts the processes and waits; the first of them writes down what
it refuses. A miner that is stopped asks them to write a checkpoint; one that is killed leaves them to end the slice: they hold
a lock, so that no second set trains in the same folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sn29 import telemetry
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import MinerSettings, settings_of

if TYPE_CHECKING:
    from sn29.mining import Slice

FILE, FAILED, LOCK = "slice.json", "slice-failed.json", "slice.lock"
_LAST_S = 3.0
"""Of the time in which the miner must have ended: kept for the launcher's own end, once its processes have theirs. Before it a
step may end and a checkpoint be written; then they are killed, and the last checkpoint stands."""


async def train_in_processes(settings: MinerSettings, block: int, asked: Slice) -> Path:
    """As `training.train_for`, in `settings.processes` processes of this machine, by the rules in force at `block`.

    Raises what it raises in the first of them; Unavailable when they end otherwise, or others still train in the folder.
    """
    folder = asked.folder
    with alone(folder):
        pass
    values = settings.model_dump(mode="json", exclude_none=True)
    named = {s.names[0]: values[s.field] for s in settings_of(MinerSettings) if s.field in values and not s.extra["secret"]}
    slice_ = {**asdict(asked), "folder": str(folder), "exclude": sorted(asked.exclude)}
    try:
        (folder / FAILED).unlink(missing_ok=True)
        (folder / FILE).write_text(json.dumps({"settings": named, "block": block, "slice": slice_}))
    except OSError as error:
        raise Unavailable(str(folder), error.strerror or str(error)) from None
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.processes),
        "--shutdown-timeout", str(max(1, int(settings.stop_within_s - _LAST_S))), "-m", "neurons.slices", str(folder / FILE),
        start_new_session=True,  # Ctrl-C is for the miner, who passes it on once
        env={**os.environ, **({"HF_TOKEN": settings.hub_token} if settings.hub_token else {})},
    )  # fmt: skip
    try:
        status = await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()
        raise
    if (folder / FAILED).exists():
        raise _error(json.loads((folder / FAILED).read_text()))
    if status:
        raise Unavailable("training", f"its processes ended with {status}; what they said is above")
    return folder / "checkpoint"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A lock that ends with the process. Raises Unavailable."""
    with opened_for_lock(folder / LOCK) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Unavailable("training", f"processes of a miner that was killed still train in {folder}") from None
        yield


def opened_for_lock(path: Path) -> TextIO:
    """The file, made with its folder where it is not there. Raises Unavailable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise Unavailable(str(path), error.strerror or str(error)) from None


def _error(data: dict[str, str]) -> Sn29Error:
    if data["reason"] == "unavailable":
        return Unavailable(data["got"], data["limit"])
    reason = next(r for r in Reason if r.code == data["reason"])
    return Rejected(reason, data["got"], data["limit"], data["where"])


def main() -> int:
    """One of the processes. Exit status: 0 when the slice is trained; 1 when it was refused, or stopped with a checkpoint."""
    path = Path(sys.argv[1])
    data = json.loads(path.read_text())
    settings = MinerSettings(**data["settings"])
    asked = _slice(data["slice"])
    from sn29.training.parallel import join

    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    try:
        world = join(settings.train_device)
        telemetry.configure(
            as_json=settings.log_json, level=settings.log_level if world.is_first else "CRITICAL",
            file=settings.log_file if world.is_first else None, file_mb=0,  # the miner, which writes it too, begins it anew
        )  # fmt: skip
        with alone(path.parent) if world.is_first else contextlib.nullcontext():
            return _train(settings, data["block"], asked, over, world)
    except Sn29Error as error:
        _write_down(path.parent, error)
        return 1


def _train(settings: MinerSettings, block: int, asked: Slice, over: threading.Event, world: Any) -> int:
    from neurons.adapters import read_files
    from neurons.training import train_for
    from sn29.hub import Hub
    from sn29.rules.schedule import in_force

    competition = in_force(read_files(settings).files[settings.competition], block)
    try:
        hub = Hub(settings.hub_endpoint, token=os.environ.get("HF_TOKEN") or None)
        train_for(settings, competition, hub, asked, over.is_set, world=world)
    finally:
        world.leave()
    return int(over.is_set())  # whether or not this was the last step: what is done is not done again


def _slice(data: dict[str, Any]) -> Slice:
    from sn29.mining import Slice

    return Slice(Path(data["folder"]), data["run"], data["start"], data["until"], frozenset(data["exclude"]))


def _write_down(folder: Path, error: Sn29Error) -> None:
    """By whichever process is first: they all refuse the same."""
    if isinstance(error, Rejected):
        found = {"reason": error.reason.code, "got": error.got, "limit": error.limit, "where": error.where}
    else:
        found = {"reason": "unavailable", "got": getattr(error, "what", "training"), "limit": getattr(error, "why", str(error))}
    part = folder / f"{FAILED}.{os.getpid()}"
    part.write_text(json.dumps(found))
    part.replace(folder / FAILED)


if __name__ == "__main__":
    from sn29.training.parallel import end

    end(main())
