"""The validator's live table on a real terminal (a pseudo one), and plain lines where there is none."""

from __future__ import annotations

import ast
import asyncio
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from struct import pack

import pytest

import neurons
from neurons.ending import Stop
from neurons.live_table import Board
from neurons.validator import _judge_and_publish
from sn29.errors import Sn29Error
from sn29.evaluation.worker import Here
from sn29.examination import Machine
from sn29.hub import Hub
from sn29.localnet import text
from sn29.localnet.network import NETUID, Localnet, prepare
from sn29.settings import ValidatorSettings, default_cache, read
from sn29.store import Store
from sn29.telemetry import STOPPED, Status

ROOT = Path(__file__).parents[1]
HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"

# ---- a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """A process on a pseudo-terminal, and all that it wrote."""

    def __init__(self, *command: str, lines: int = 40, columns: int = 120, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):  # the terminal's own size
            environment.pop(name, None)
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
        self._theirs, self.written = theirs, ""

    def read_until(self, seen: Callable[[str], bool], seconds: float = 120) -> None:
        """Until what was written pleases, or the process has ended."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not seen(self.shown()):
            if select.select([self._ours], [], [], 0.1)[0]:
                self.written += os.read(self._ours, 65536).decode(errors="replace")
            elif self.process.poll() is not None:
                return

    def end(self, number: int, seconds: float = 30) -> int:
        """Sends a signal; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        self.read_until(lambda _: False, 0.5)
        return status

    def shown(self) -> str:
        """What was written, without the sequences that move and colour."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.written)

    def assert_clean(self) -> None:
        """The cursor is visible, no other screen is open, no colour is left on, and keys are echoed as before."""
        hidden, visible = self.written.rfind("\x1b[?25l"), self.written.rfind("\x1b[?25h")
        assert visible > hidden or hidden == -1
        assert "\x1b[?1049h" not in self.written
        colours = re.findall(r"\x1b\[([0-9;]*)m", self.written)
        assert not colours or colours[-1] in ("", "0")
        assert termios.tcgetattr(self._theirs)[:4] == self.before[:4]


ROUND = f"""
import sys, time
from pathlib import Path
from neurons.live_table import shown
from sn29 import telemetry as t
folder = Path(sys.argv[1])
t.configure()
t.keep_status(folder / "status.json", "validator")
t.note(hotkey="5Validator", head=7000, head_time=time.time(), next_window=7200, round=6840)
with shown(folder):
    t.tell("round", "round of block 6840", block=6840)
    t.stage("measuring", 3, 8, "c01: {HOTKEY}")
    t.warn("unavailable", "too many \\x1b[2Jparameters [red]x[/red]", hotkey="5Giant", competition="c01")
    t.tell("evaluated", "60 samples measured, 0 known", hotkey="{HOTKEY}", competition="c01", measured=60, known=0)
    t.tell("scored", "c01: 20 wins", hotkey="{HOTKEY}", competition="c01", loss_per_sample="812.50", weight="0.625")
    for n in range(60):
        t.tell("waiting", "no place", hotkey=f"5Waits{{n:02d}}", competition="c00")
    time.sleep(1.1)
    t.note()  # the file is written once a second at most
    time.sleep(0.8)
    print("drawn", flush=True)
    if sys.argv[2] == "hang":
        time.sleep(60)
    if sys.argv[2] == "fail":
        raise ValueError("nobody expected it")
t.tell("over", "all is done")
"""


def test_the_table_shows_stage_standings_and_warnings_and_goes(tmp_path):
    terminal = Terminal(sys.executable, "-c", ROUND, str(tmp_path), "end", lines=30)
    terminal.read_until(lambda shown: "all is done" in shown, 30)
    assert terminal.process.wait(30) == 0
    shown = terminal.shown()
    assert re.search(r"block 7,000 of \d s ago · next window in 200 blocks · round of block 6,840", shown)
    assert "waiting  reading  inspecting  fetching  measuring  deciding  publishing" in shown
    assert "\x1b[7mmeasuring" in terminal.written, "the stage in hand stands out"
    assert "3 of 8" in shown
    row = next(line for line in shown.splitlines() if "scored" in line and "…" in line)
    assert row.split() == [f"{HOTKEY[:13]}…", "c01", "scored", "812.50", "0.625", "c01:", "20", "wins"]
    assert re.search(r"\d+ more", shown), "as many rows as the terminal has room for"
    said = r"unavailable: too many \?\[2Jparameters \[red\]x\[/red\]"
    assert re.search(said, shown), "no sequence and no markup of strangers"
    assert "\x1b[2J" not in terminal.written
    assert "last weight set: none yet" in shown
    assert shown.rstrip().splitlines()[-1].endswith("all is done")
    terminal.assert_clean()


def test_a_narrow_terminal_cuts_the_table_and_leaves_what_is_told_whole(tmp_path):
    terminal = Terminal(sys.executable, "-c", ROUND, str(tmp_path), "end", lines=30, columns=50)
    terminal.read_until(lambda shown: "all is done" in shown, 30)
    assert terminal.process.wait(30) == 0
    written = re.sub(r"\x1b\[\d*[AK]|\r", "\n", terminal.written)  # where a line begins anew
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).splitlines()
    told = [line for line in lines if re.match(r"\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert any(line.rstrip().endswith(f"hotkey={HOTKEY} competition=c01 measured=60 known=0") for line in told)
    drawn = [line.removesuffix("drawn") for line in lines if line not in told]
    assert max(map(len, drawn)) <= 50
    assert any(line.startswith("sn29 ") and line.endswith("…") for line in drawn)
    frames = terminal.shown().count("last weight set: none yet")
    assert sum(line.startswith("waiting  reading") for line in drawn) == frames, "a frame has as many lines as ever"
    terminal.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_whatever_ends_it_leaves_the_terminal_clean(number, tmp_path):
    terminal = Terminal(sys.executable, "-c", ROUND, str(tmp_path), "hang")
    terminal.read_until(lambda shown: "drawn" in shown, 30)
    assert terminal.end(number) != 0
    assert "measuring" in terminal.shown()
    terminal.assert_clean()


def test_an_error_is_told_below_a_clean_terminal(tmp_path):
    terminal = Terminal(sys.executable, "-c", ROUND, str(tmp_path), "fail")
    terminal.read_until(lambda shown: "nobody expected it')" in shown, 30)
    assert terminal.process.wait(30) == 1
    assert "ValueError('nobody expected it')" in terminal.shown()
    terminal.assert_clean()


def test_without_a_terminal_there_are_plain_lines(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ROUND, str(tmp_path), "end"], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 65, "one an event"
    assert all(re.match(r"\d\d-\d\d \d\d:\d\d:\d\d (INFO   |WARNING) \w+ ", line) for line in lines)
    assert "\x1b" not in done.stderr + done.stdout
    dumb = Terminal(sys.executable, "-c", ROUND, str(tmp_path), "end", TERM="dumb")
    dumb.read_until(lambda shown: "all is done" in shown, 30)
    assert "\x1b[?" not in dumb.written


# ---- the validator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def localnet(tmp_path_factory: pytest.TempPathFactory) -> Localnet:
    folder = tmp_path_factory.mktemp("terminal")
    found = prepare(folder / "localnet", text.build(default_cache()), block_seconds=0.25, window_blocks=4000)
    found.register("val", "default", folder / "wallets", validator=True)
    return found


@pytest.mark.parametrize("with_table", [True, False], ids=["tui", "lines"])
def test_ctrl_c_ends_the_validator_and_its_table(localnet, tmp_path, with_table):
    terminal = Terminal(
        sys.executable, str(Path(neurons.__file__).parent / "validator.py"), "--wallet.name", "val", "--wallet.path",
        str(localnet.folder.parent / "wallets"), "-n", "localnet", "--localnet.dir", str(localnet.folder), "--hub.endpoint",
        localnet.endpoint, "--netuid", str(NETUID), "--competitions.dir", str(localnet.competitions),
        "--state.dir", str(tmp_path), "--locks.dir", str(tmp_path / "locks"), "--threads", "1", "--poll", "0.2",
        *["--tui"] * with_table,
    )  # fmt: skip
    started = "no round in hand" if with_table else " started "
    with localnet.serve():
        terminal.read_until(lambda shown: " started " in shown and started in shown[shown.rfind(" started ") :])
        assert terminal.end(signal.SIGINT) == 0, terminal.shown()[-2000:]
    shown = terminal.shown()
    assert ("last weight set: none yet" in shown) is with_table
    assert ("no model was looked at yet: a round shows" in shown) is with_table
    assert " stopped " in shown
    assert shown.rstrip().endswith("stopped") is with_table, (
        "the last frame does not say that no round is in hand: one may be open"
    )
    terminal.assert_clean()


def test_a_validator_whose_settings_are_refused_has_not_started(localnet, tmp_path, events):
    words = ["--wallet.name", "val", "--wallet.path", str(localnet.folder.parent / "wallets"), "-n", "localnet"]
    words += ["--localnet.dir", str(localnet.folder), "--netuid", str(NETUID), "--locks.dir", str(tmp_path / "locks")]
    words += ["--competitions.dir", str(localnet.competitions), "--warm-start", str(tmp_path / "nothing")]
    settings, hub = read(ValidatorSettings, words), Hub(localnet.endpoint)
    machine = Machine(tmp_path / "models", tmp_path / "records", "cpu", "float32", 1, 120, 60)
    with closing(Store(tmp_path / "store.db")) as store, pytest.raises(Sn29Error):
        asyncio.run(_judge_and_publish(settings, Stop("validator", 10), hub, store, machine, Here(tmp_path)))
    assert "started" not in [event for event, _ in events]


def test_a_table_shows_nothing_of_the_process_before_it(tmp_path):
    board = Board(tmp_path)
    status = Status("0.1.0", "validator", os.getpid() + 1, 0.0, 0.0)
    (tmp_path / "status.json").write_text(status.to_json())
    assert str(board.show(40)) == "starting"
    (tmp_path / "status.json").write_text(replace(status, pid=os.getpid(), stage=STOPPED).to_json())
    assert str(board.show(40)) == "stopped"


# ---- progress bars ---------------------------------------------------------------------------------------------------


def test_every_bar_goes_to_a_terminal_s_standard_error_and_leaves_nothing():
    """Rich draws a transient bar on a terminal alone. The demo is a story told to people: it keeps its bars."""
    found = 0
    for file in sorted(path for top in ("sn29", "neurons") for path in (ROOT / top).rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if "rich.progress" in source and file.name != "demo.py" else ():
            is_bar = isinstance(node, ast.Call) and ast.unparse(node.func) == "Progress"
            if is_bar and any(keyword.arg == "console" for keyword in node.keywords):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given["transient"] == "True", f"{file}:{node.lineno}"
                assert given["console"] == "Console(stderr=True)", f"{file}:{node.lineno}"
                found += 1
    assert found >= 5
