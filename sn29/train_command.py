"""`sn29 train`: a training run for a competition, by one process or many."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import TrainSettings, make_folder, read

if TYPE_CHECKING:
    from neurons.training import Watch
    from sn29.training.parallel import World
    from sn29.training.trainer import Progress

_TO_END_S = 1800
"""Seconds in which a step may end and a checkpoint be written before the launcher kills; its own 30 s would lose them."""
_MEANWHILE_S = 2.0
"""In which the first process says what all refuse: the launcher ends the rest with whichever is over first."""


def train(words: list[str]) -> int:
    """Exit status: 0 trained, or stopped with a checkpoint; 1 refused, with one line of the first process that says why."""
    settings = read(TrainSettings, words)
    if settings.processes > 1 and "WORLD_SIZE" not in os.environ:
        return _spread(settings.processes, words)
    from sn29.training.parallel import end, join

    world = join(settings.train_device)
    try:
        with speaking(world):
            status = _run(settings, world)
    finally:
        world.leave()
    if world.processes > 1:
        end(status)
    return status


@contextmanager
def speaking(world: World) -> Iterator[None]:
    """The first process says what all refuse, so the others are silent then. What nobody expected is said with its process."""
    try:
        if world.is_first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    except (Sn29Error, KeyboardInterrupt):
        if world.is_first:
            raise
        time.sleep(_MEANWHILE_S)
        raise SystemExit(1) from None
    finally:
        if world.processes > 1 and (error := sys.exc_info()[1]) is not None:
            error.add_note(f"in process {world.rank} of 0 to {world.processes - 1}")


def _spread(processes: int, words: list[str]) -> int:
    """This command in so many processes of this machine, under torch's own launcher."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's: the processes say why themselves
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"sn29-{os.getpid()}", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2, shutdown_timeout=_TO_END_S,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "sn29.cli", "train", *words)
    except ChildFailedError as failed:
        for rank, failure in failed.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # that one is the launcher's, for the rest
                name = signal.Signals(-failure.exitcode).name
                raise Unavailable("training", f"process {rank} of 0 to {processes - 1} was ended by {name}") from None
        return 1
    except SignalException:  # handed on to the processes, which have ended
        return 0
    return 0


def _run(settings: TrainSettings, world: World) -> int:
    from neurons.adapters import read_competitions
    from neurons.miner import chosen
    from neurons.training import train_for
    from sn29 import telemetry
    from sn29.hub import Hub
    from sn29.mining import Slice

    telemetry.configure(
        as_json=settings.log_json, level=settings.log_level, file=settings.log_file if world.is_first else None,
        file_mb=settings.log_file_mb, keep=settings.log_keep,
    )  # fmt: skip
    competition = chosen(read_competitions(settings.competitions_dir)[0], settings.competition)
    hub = Hub(settings.hub_endpoint, token=os.environ.get("HF_TOKEN") or None)
    folder = settings.work_dir / "training"
    asked = Slice(folder, 1, settings.start, settings.until, _recorded_samples(settings))
    with _alone(folder, world), _Display(settings, folder) as display, _asked_to_stop() as over:
        found = train_for(
            settings, competition, hub, asked, over.is_set, told=display.step, saved=lambda step: draw(folder), world=world
        )
    if world.is_first:
        display.say_end(found, stopped=over.is_set())
    return 0


def _recorded_samples(settings: TrainSettings) -> frozenset[str]:
    """Ids of the newest record's samples, on which `sn29 forecast` measures: they are kept out of the text."""
    from sn29 import record_files

    newest = record_files.newest(settings.records) if settings.records else None
    kept = newest.competitions.get(settings.competition) if newest else None
    return frozenset(sample.id for sample in kept.samples) if kept else frozenset()


@contextmanager
def _alone(folder: Path, world: World) -> Iterator[None]:
    """A lock that ends with the process. Raises Rejected(SETTING) when another run works in the folder."""
    make_folder(folder, "--work.dir")
    with (folder / "lock").open("w") as stream:
        if world.is_first:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Rejected(Reason.SETTING, f"a run that works in {folder}", "a --work.dir of its own", "sn29 train") from None
        yield


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM let the step end and the checkpoint be written; a second Ctrl-C ends at once.

    A second SIGTERM does not: torch's launcher sends its own beside the one that all of a group are sent.
    """
    over = threading.Event()

    def ask(number: int, _: object) -> None:
        if over.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        over.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Display:
    """Steps as they come: a bar on standard error, or JSON lines on standard output."""

    def __init__(self, settings: TrainSettings, folder: Path) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._settings, self._folder = settings, folder
        self._last: Progress | None = None
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True, disable=settings.json_output)
        self._task = self._bar.add_task("training", total=settings.steps, said="")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, progress: Progress, watch: Watch) -> None:
        self._last = progress
        share, left = watch.utilisation(progress), watch.seconds_left(progress)
        if self._settings.json_output:
            said: dict[str, Any] = {
                "step": progress.step, "steps": progress.steps, "loss": progress.loss_per_token, "tokens": progress.tokens_seen,
                "tokens_per_s": round(progress.tokens_per_second, 1), "seconds": round(progress.seconds, 4),
                "learning_rate": progress.learning_rate, "gradient_norm": progress.gradient_norm, "seconds_left": round(left, 1),
                "mfu": share,
            }  # fmt: skip
            print(json.dumps(said), flush=True)
            return
        parts = [f"loss {progress.loss_per_token:.4f}", f"{progress.tokens_per_second:,.0f} tokens/s"]
        parts += [f"MFU {share:.1%}"] if share is not None else []
        self._bar.update(self._task, completed=progress.step, said=", ".join([*parts, f"{_duration(left)} left"]))

    def say_end(self, checkpoint: Path, *, stopped: bool) -> None:
        if self._settings.json_output:
            return
        if self._last is None:
            print(f"nothing left to do: {checkpoint} is trained; another --work.dir begins another run")
            return
        last = self._last
        print(
            f"step {last.step} of {last.steps}: loss {last.loss_per_token:.4f} nats per token, {last.tokens_seen:,} tokens seen"
        )
        print(f"{checkpoint}  curve: {self._folder / 'curve.svg'}")
        if stopped and last.step < last.steps:
            print("stopped; the same command goes on")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def draw(folder: Path) -> None:
    """Writes curve.svg beside the curve."""
    from sn29.report.pictures import training_curve

    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    picture = training_curve([each["tokens"] for each in lines], [each["loss"] for each in lines], "training loss by tokens seen")
    new = folder / "curve.svg.new"
    new.write_text(picture, encoding="utf-8")
    new.replace(folder / "curve.svg")
