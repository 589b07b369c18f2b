"""What a confined process can still do: tried in processes of their own, with each layer and without."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sn29.evaluation.confinement import describe

ROOT = Path(__file__).parents[2]
ANYWHERE = {
    "reach a network", "reach a socket of yours", "read a file of yours", "read your environment", "write outside its folder",
    "change the mode of a file of yours", "start a program", "signal your processes", "take more memory than its limit",
    "write a file beyond its limit",
}  # fmt: skip
SHARED = "take shared memory beyond its limit"
NEEDS_SECCOMP = pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this machine")


def confined(folder: Path, script: str, *, without: tuple[str, ...] = (), memory: int = 1 << 30, cpu_s: int = 30, **limits):
    """The script in a process that confined itself first."""
    head = (
        "import ctypes, os, socket, sys, threading\n"
        "from sn29.evaluation.confinement import Limits, bounded, confine, lift_memory_limit, seal\n"
        f"limits = Limits({memory}, {cpu_s}, 1 << 20, {str(folder)!r}, **{limits!r})\n"
        f"layers = confine(limits, without={without!r})\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
    )
    return subprocess.run([sys.executable, "-c", head + script], capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    "without",
    [(), ("namespace", "landlock"), ("seccomp",), ("landlock",), ("namespace", "capabilities", "landlock", "seccomp")],
    ids="-".join,
)
def test_what_is_forbidden_does_not_happen_whatever_layers_there_are(without, device):
    found = {protection.what: protection for protection in describe(device=device, without=without)}
    assert {what for what, protection in found.items() if protection.holds} >= ANYWHERE
    assert all(name not in protection.how for name in without for protection in found.values() if protection.holds)
    assert [what for what, protection in found.items() if not protection.can_hold] == ([SHARED] if device != "cpu" else [])


@NEEDS_SECCOMP
def test_what_does_not_hold_is_said():
    with_all, found = ({p.what: p for p in describe(without=without)} for without in ((), ("landlock", "seccomp")))
    assert with_all[SHARED].holds
    assert not found[SHARED].holds
    assert found[SHARED].how == "this machine has no seccomp"
    assert found["read a file of yours"].how == "audit: Python's own calls only"


@NEEDS_SECCOMP
def test_what_a_gpu_needs_to_begin_is_taken_back_when_it_has_begun(tmp_path):
    """A socket to a daemon and a helper's process; memory, which nothing can lift again. Threads remain."""
    script = (
        "def trial():\n"
        "    pid = libc.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(0)\n"
        "    return [libc.socket(1, 1, 0) >= 0, pid > 0, libc.socket(2, 1, 0) >= 0, libc.memfd_create(b'', 0) >= 0]\n"
        "lift_memory_limit()\n"
        "print(trial(), len(bytearray(2 << 30)) >> 30, flush=True)\n"
        "seal(limits)\n"
        "print(trial(), flush=True)\n"
        "for lift in (lambda: None, lift_memory_limit):\n"
        "    try:\n"
        "        lift()\n"
        "        bytearray(2 << 30)\n"
        "    except (MemoryError, ValueError) as error:\n"
        "        print(type(error).__name__)\n"
        "print(len(bytearray(100 << 20)) >> 20, flush=True)\n"
        "thread = threading.Thread(target=lambda: print('thread')); thread.start(); thread.join()\n"
    )
    done = confined(tmp_path, script, device="cuda:0")
    assert done.stdout.splitlines() == [
        "[True, True, False, True] 2", "[False, False, False, True]", "MemoryError", "ValueError", "100", "thread",
    ], done  # fmt: skip


def test_with_a_gpu_no_other_process_can_be_looked_at(tmp_path):
    script = (
        "for name in ('environ', 'cmdline', 'maps', 'root'):\n"
        "    for pid in (1, os.getppid()):\n"
        "        try:\n"
        "            os.close(os.open(f'/proc/{pid}/{name}', os.O_RDONLY))\n"
        "            print('opened', name, pid)\n"
        "        except PermissionError:\n"
        "            pass\n"
        "for path in ('/proc/self/maps', '/proc/meminfo', f'/proc/self/task/{threading.get_native_id()}/comm'):\n"
        "    os.close(os.open(path, os.O_RDWR if path.endswith('comm') else os.O_RDONLY))\n"
        "for folder in ('/dev', '/dev/shm', '/proc'):\n"
        "    try:\n"
        "        print(os.listdir(folder))\n"
        "    except PermissionError:\n"
        "        print('closed')\n"
    )
    done = confined(tmp_path, script, device="cuda:0")
    if "landlock" in confined(tmp_path, "print(layers)").stdout:
        assert done.stdout.split() == ["closed"] * 3, done


@NEEDS_SECCOMP
def test_another_process_is_left_alone_and_its_own_end_is_its_own(tmp_path):
    """Below Python: neither a signal nor another limit for the parent; a library's abort still ends the child itself."""
    script = (
        "import resource, signal\n"
        "now = (ctypes.c_ulong * 2)()\n"
        "print(libc.kill(os.getppid(), 0), libc.prlimit(os.getppid(), resource.RLIMIT_CORE, None, now))\n"
        "print(libc.kill(os.getpid(), 0), libc.prlimit(0, resource.RLIMIT_CORE, None, now), flush=True)\n"
        "os.abort()\n"
    )
    done = confined(tmp_path, script)
    assert (done.stdout.split(), done.returncode) == (["-1", "-1", "0", "0"], -signal.SIGABRT), done


@NEEDS_SECCOMP
def test_no_file_gets_another_mode_owner_time_or_attribute(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.write_text("x")
    script = (
        f"path, at = {str(other).encode()!r}, -100\n"
        f"opened = os.open({str(own)!r}, os.O_RDONLY)\n"
        "print([libc.chmod(path, 0o777), libc.fchmodat(at, path, 0o777, 0), libc.fchmod(opened, 0o777),\n"
        "    libc.chown(path, 1, 1), libc.lchown(path, 1, 1), libc.fchownat(at, path, 1, 1, 0), libc.fchown(opened, 1, 1),\n"
        "    libc.utimes(path, None), libc.utimensat(at, path, None, 0), libc.futimens(opened, None),\n"
        "    libc.setxattr(path, b'user.x', b'1', 1, 0), libc.lsetxattr(path, b'user.x', b'1', 1, 0),\n"
        "    libc.removexattr(path, b'user.x'), libc.syscall(452, at, path, 0o777, 0)])\n"
    )
    done = confined(own, script)
    assert json.loads(done.stdout) == [-1] * 14, done
    assert other.stat().st_mode & 0o777 != 0o777


# By the kernel's own numbers: the C library makes one call by another.
METADATA = {
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utimes": 235, "fchownat": 260,
    "futimesat": 261, "fchmodat": 268, "utimensat": 280, "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466,
    "file_setattr": 469,
}  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are of that machine")
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_nor_by_any_call_of_the_kernel(device, tmp_path):
    script = (
        "seal(limits)\n"
        f"for name, number in {METADATA!r}.items():\n"
        "    if libc.syscall(number, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != 1:\n"
        "        print(name)\n"
        "print('done')\n"
    )
    assert confined(tmp_path, script, device=device).stdout.split() == ["done"]


def test_no_power_of_root_is_left_but_to_read(tmp_path):
    lines = confined(tmp_path, "print(open('/proc/self/status').read())\n").stdout.splitlines()
    held = {line.split()[0]: int(line.split()[1], 16) for line in lines if line.startswith(("CapEff", "CapPrm", "CapInh"))}
    assert held.keys() == {"CapEff:", "CapPrm:", "CapInh:"}
    assert all(value & ~(1 << 2) == 0 for value in held.values()), held


def test_who_hides_cannot_be_traced(tmp_path):
    script = (
        "import ctypes\nfrom sn29.evaluation.confinement import hide\n"
        "libc = ctypes.CDLL(None)\nprint(libc.prctl(3))\nhide()\nprint(libc.prctl(3))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.split() == ["1", "0"], done


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
        done = confined(own, script, without=without, readable=(str(model),))
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


def test_a_process_whose_parent_is_gone_before_it_is_tied_to_it_ends(tmp_path):
    """It would evaluate for nobody until its deadline."""
    assert confined(tmp_path, "print('runs')\n", parent=os.getpid()).stdout.split() == ["runs"]
    late = confined(tmp_path, "print('runs')\n", parent=2**22 + 1)
    assert (late.returncode, late.stdout) == (1, "")
    assert "has ended" in late.stderr


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
