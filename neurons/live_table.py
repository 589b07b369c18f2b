"""`sn29 validator --tui`: what the round is at, who stands where in it, the last weight set and warnings, below the lines.

It hears what is told, and reads the program's status file and, twice a minute at most, its store; nothing waits for it. The
cursor is never hidden and no other screen is opened, so that whatever ends the program, a kill too, leaves the terminal as it is.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sn29 import telemetry
from sn29.concealment import clean
from sn29.errors import Sn29Error
from sn29.store import reading
from sn29.telemetry import STAGES, STATUS, STOPPED, Event, Status, Warned

_READ_S = 30.0
"""Between two looks into the store."""
_KNOWN = {"inspected", "remembered", "refused", "waiting", "unavailable", "fetched", "probed", "evaluated", "scored", "suspect"}
"""Events that say how far a commitment has come."""
_COLOURS = {"refused": "red", "unavailable": "yellow", "waiting": "dim", "scored": "green"}
_FRAME = 13
"""Lines of all but the rows."""


@dataclass(slots=True)
class _Place:
    """One commitment in the round."""

    at: str
    said: str
    competition: str = ""
    loss: str = ""
    weight: str = ""


@dataclass(slots=True)
class Board:
    """All that is shown. `hear` is called by any thread, `show` by the one that draws."""

    folder: Path
    """The validator's state folder."""
    places: dict[str, _Place] = field(default_factory=dict)
    """By hotkey, the last that moved at the end."""
    last_set: str = "none yet"
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _read_at: float = float("-inf")

    def hear(self, event: Event) -> None:
        hotkey = str(event.fields.get("hotkey", ""))
        with self._lock:
            if event.event == "round":
                self.places.clear()
            elif event.event == "published":
                self._read_at = float("-inf")
            elif event.event in _KNOWN and hotkey:
                place = self.places.pop(hotkey, _Place("", ""))
                place.at, place.said = event.event, event.sentence
                place.competition = str(event.fields.get("competition", place.competition))
                place.loss = str(event.fields.get("loss_per_sample", place.loss))
                place.weight = str(event.fields.get("weight", place.weight))
                self.places[hotkey] = place

    def show(self, height: int) -> RenderableType:
        """For a terminal of so many lines."""
        try:
            status: Status | None = Status.from_json((self.folder / STATUS).read_bytes())
        except (OSError, Sn29Error):  # not there yet
            status = None
        if time.monotonic() - self._read_at > _READ_S:
            self._read_at = time.monotonic()
            with suppress(Sn29Error), reading(self.folder / "store.db") as store:
                self.last_set = _last_set(store.last_publication(), status)
        if status is None or status.pid != os.getpid():  # of the process before us
            return Text("starting", style="dim")
        if status.stage == STOPPED:
            return Text("stopped", style="dim")
        warnings = status.warnings[-3:]
        with self._lock:
            places = sorted(self.places.items(), key=lambda item: -float(item[1].weight or -1))
        rows = max(3, height - _FRAME - len(warnings))
        lines = Table.grid(expand=True)  # each part keeps to the width: a line that is wrapped would leave its rest behind
        lines.add_column(no_wrap=True, overflow="ellipsis")
        for part in (*_head(status), *_stages(status), self._table(places, rows), f"last weight set: {self.last_set}"):
            lines.add_row(part)
        for warned in warnings:
            lines.add_row(_warning(warned))
        return lines

    def _table(self, places: list[tuple[str, _Place]], rows: int) -> RenderableType:
        if not places:
            hint = "no model was looked at yet: a round shows those that were committed to on chain before its block"
            return Text(f"\n{hint}\n", style="dim")
        table = Table(box=SIMPLE_HEAD, expand=True, show_edge=False)
        table.add_column("hotkey", no_wrap=True, width=14)
        table.add_column("for", no_wrap=True)
        table.add_column("at", no_wrap=True)
        table.add_column("nats a sample", justify="right", no_wrap=True)
        table.add_column("weight", justify="right", no_wrap=True)
        table.add_column("what was said last", no_wrap=True, overflow="ellipsis", ratio=1)
        for hotkey, place in places[:rows]:
            at = Text(place.at, style=_COLOURS.get(place.at, ""))
            said = Text(place.said.removeprefix(f"{hotkey}: "))
            table.add_row(Text(f"{hotkey[:13]}…"), Text(place.competition), at, Text(place.loss), Text(place.weight), said)
        if len(places) > rows:
            table.add_row(Text(f"{len(places) - rows} more", style="dim"))
        return table


def _head(status: Status) -> Iterator[Text]:
    parts = [f"sn29 {status.version}", status.hotkey and f"{status.hotkey[:13]}…", f"up {_span(time.time() - status.started)}"]
    if status.head is not None and status.head_time is not None:
        parts.append(f"block {status.head:,} of {_span(time.time() - status.head_time)} ago")
        if status.next_window is not None:
            parts.append(f"next window in {max(0, status.next_window - status.head):,} blocks")
    parts.append(f"round of block {status.round:,}" if status.round is not None else "no round in hand")
    yield Text(" · ".join(filter(None, parts)), style="bold")


def _stages(status: Status) -> Iterator[RenderableType]:
    line = Text()
    for stage in STAGES:
        if stage != "training":
            line.append(stage, style="reverse" if stage == status.stage else "dim").append("  ")
    grid = Table.grid(padding=(0, 1))
    for _ in range(3):
        grid.add_column(no_wrap=True, overflow="ellipsis")
    if status.of:
        bar = ProgressBar(total=status.of, completed=status.done, width=24)
        grid.add_row(bar, Text(f"{status.done:,} of {status.of:,}"), Text(clean(status.detail)))
    else:
        grid.add_row(Text(clean(status.detail) or f"for {_span(time.time() - status.stage_started)}", style="dim"))
    yield line
    yield grid


def _warning(warned: Warned) -> Text:
    when = time.strftime("%H:%M:%S", time.localtime(warned.time))
    return Text(f"{when} {warned.event}: {warned.sentence}", style="yellow")


def _last_set(found: tuple[int, object] | None, status: Status | None) -> str:
    if found is None:
        return "none yet"
    ago = f", {status.head - found[0]:,} blocks ago" if status and status.head is not None else ""
    return f"at block {found[0]:,}{ago}"


def _span(seconds: float) -> str:
    s = max(0, int(seconds))
    return f"{s} s" if s < 120 else f"{s // 60} min" if s < 7200 else f"{s // 3600} h"


@contextmanager
def shown(folder: Path) -> Iterator[None]:
    """Within, the table stands below what is told. Nothing happens where standard error is no terminal."""
    console = Console(stderr=True, soft_wrap=True)  # what is told stays one line, however narrow the terminal
    if not (sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal):
        yield
        return
    board = Board(folder)
    live = Live(
        get_renderable=lambda: board.show(console.height), console=console, refresh_per_second=2, transient=True,
        redirect_stdout=False, vertical_overflow="crop",
    )  # fmt: skip
    with telemetry.heard_by(board.hear), live:
        console.show_cursor(True)
        yield
