"""What a confined process can still do: tried in processes of their own, with each layer and without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sn29.evaluation.confinement import describe

ROOT = Path(__file__).parents[2]
ANYWHERE = {
    "reach a network", "read a file of yours", "write outside its folder", "start a program", "take more memory than its limit",
    "write a file beyond its limit",
}  # fmt: skip


def confined(folder: Path, script: str, *, without: tuple[str, ...] = (), memory: int = 1 << 30, cpu_s: int = 30, readable=()):
    """The script in a process that confined itself first."""
    head = (
        "import ctypes, os, socket, sys, threading\n"
        "from sn29.evaluation.confinement import Limits, bounded, confine\n"
        f"limits = Limits({memory}, {cpu_s}, 1 << 20, {str(folder)!r}, {tuple(map(str, readable))!r})\n"
        f"layers = confine(limits, without={without!r})\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
    )
    return subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    "without", [(), ("namespace", "landlock"), ("seccomp",), ("landlock",), ("namespace", "landlock", "seccomp")], ids="-".join
)
def test_what_is_forbidden_does_not_happen_whatever_layers_there_are(without):
    found = {protection.what: protection for protection in describe(without=without)}
    assert {what for what, protection in found.items() if protection.holds} >= ANYWHERE
    assert all(name not in protection.how for name in without for protection in found.values() if protection.holds)


def test_what_does_not_hold_is_said():
    found = {protection.what: protection for protection in describe(without=("landlock", "seccomp"))}
    assert not found["signal your processes"].holds
    assert found["signal your processes"].how == "this machine has no landlock"
    assert found["read a file of yours"].how == "audit: Python's own calls only"


def test_threads_start_and_the_model_can_be_read_and_nothing_beside_it(tmp_path):
    own, model, wallet = tmp_path / "own", tmp_path / "model", tmp_path / "wallet"
    for folder in (own, model, wallet):
        folder.mkdir()
        (folder / "file").write_text("x")
    script = (
        "thread = threading.Thread(target=lambda: print('thread')); thread.start(); thread.join()\n"
        f"print(open({str(model / 'file')!r}).read(), open({str(own / 'new')!r}, 'w').write('12'))\n"
        f"for path in ({str(wallet / 'file')!r}, {str(wallet)!r}, '/root', '/etc/shadow', '/proc/1/environ'):\n"
        "    try:\n"
        "        os.close(os.open(path, os.O_RDONLY))\n"
        "        print('opened', path)\n"
        "    except (PermissionError, FileNotFoundError):\n"
        "        pass\n"
        f"for path in ({str(wallet / 'file')!r}, {str(model / 'file')!r}, {str(wallet / 'new')!r}):\n"
        "    try:\n"
        "        open(path, 'a')\n"
        "        print('written', path)\n"
        "    except PermissionError:\n"
        "        pass\n"
    )
    for without in ((), ("landlock",)):
        done = confined(own, script, without=without, readable=[model])
        assert done.stdout.splitlines() == ["thread", "x 2"], done
    assert (wallet / "file").read_text() == "x"


def test_no_process_is_made_below_python(tmp_path):
    script = (
        "if 'seccomp' not in layers:\n"
        "    print('-1 -1 -1')\n"
        "else:\n"
        "    argv = (ctypes.c_char_p * 2)(b'/bin/true', None)\n"
        "    print(libc.fork(), libc.execv(b'/bin/true', argv), libc.socket(2, 1, 0))\n"
    )
    assert confined(tmp_path, script).stdout.split() == ["-1"] * 3


def test_a_busy_child_ends_at_its_processor_seconds(tmp_path):
    assert confined(tmp_path, "while True: pass\n", cpu_s=1).returncode == -signal.SIGXCPU


def test_a_part_of_the_work_has_bounds_of_its_own_that_end_with_it(tmp_path):
    script = (
        "import resource\n"
        "before = resource.getrlimit(resource.RLIMIT_DATA)\n"
        "with bounded(cpu_s=5, more_bytes=100 << 20):\n"
        "    try:\n"
        "        bytearray(200 << 20)\n"
        "    except MemoryError:\n"
        "        print('bounded')\n"
        "print(len(bytearray(200 << 20)) >> 20, resource.getrlimit(resource.RLIMIT_DATA) == before, flush=True)\n"
        "with bounded(cpu_s=0.2, more_bytes=1 << 20):\n"
        "    while True: pass\n"
    )
    done = confined(tmp_path, script)
    assert (done.stdout.split(), done.returncode) == (["bounded", "200", "True"], -signal.SIGPROF), done


def test_a_confined_process_dies_with_its_parent(tmp_path):
    script = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "print(child.pid, child.stdout.readline().decode(), flush=True)\n"
        "os._exit(0)\n"
    )
    inner = (
        "import time\nfrom sn29.evaluation.confinement import Limits, confine\n"
        f"confine(Limits(1 << 30, 30, 1 << 20, {str(tmp_path)!r}))\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, inner], capture_output=True, text=True, cwd=ROOT, timeout=60)
    pid = int(done.stdout.split()[0])
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        os.sched_yield()
        signal.sigtimedwait([], 0.01)
    raise AssertionError(json.dumps({"still there": pid}))
