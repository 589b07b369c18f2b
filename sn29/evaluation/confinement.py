"""What a process that handles a stranger's model may do: use its memory and time, read the libraries and the model, write one
folder. Linux only; nothing but the standard library, so that it stands before anything else is imported.

Several layers, each used wherever the kernel has it:

    limits        memory, CPU seconds, file sizes, open files; no core files; dies with its parent   everywhere
    namespace     a network namespace without an interface                                           where unshare is allowed
    capabilities  none of root's powers but to read what root could                                  everywhere
    landlock      files: reads the libraries, the model and its own folder, writes its folder;       Linux 5.13
                  no TCP (6.7); no signal or abstract socket to processes outside (6.12)
    seccomp       no socket, no program started, no process made, no signal to another one, no       x86_64 and aarch64
                  tracing, no mount; no change of a file's mode, owner, times or attributes
    audit         the same asked of Python alone, for what the layers above leave open               everywhere

A GPU's driver asks for more than a model may have: a Unix socket to its daemon, a helper that it starts. So there it goes
in two steps: `confine`, then the device is initialised, then `seal`, and only then is anything of the model read.

RLIMIT_NPROC is not among the limits. It counts all processes and threads of the user, also those of other programs, and
nothing for root; what it would prevent, seccomp refuses (processes), or counts as memory (a thread's stack).

`describe` tries each forbidden thing in a confined process of its own and says what held: what is told to the operator is
measured, not presumed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import json
import mmap
import os
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPEN_FILES = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one child may use."""

    memory_bytes: int
    cpu_s: int
    file_bytes: int
    """Largest file that it may write."""
    folder: str
    """The only folder that it may write to."""
    readable: tuple[str, ...] = ()
    """Files and folders that it may read, beside the libraries and its own folder."""
    device: str = "cpu"
    parent: int | None = None
    """The process that it works for: it dies with that one, and ends at once when that one is gone already."""

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"


def confine(limits: Limits, *, without: Collection[str] = ()) -> tuple[str, ...]:
    """Confine this process for good, before it starts a thread. Gives the names of the layers that hold.

    `without` leaves layers out, as a kernel without them does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _limit(libc, limits)
    layers, readable, writable = ["limits"], _readable(limits), _writable(limits)
    if "namespace" not in without and _own_network(libc):
        layers.append("namespace")
    if "capabilities" not in without and _drop_capabilities(libc):
        layers.append("capabilities")
    if "landlock" not in without and _landlock(libc, readable, writable):
        layers.append("landlock")
    if "seccomp" not in without and _seccomp(libc, gpu=limits.gpu, sealed=not limits.gpu):
        layers.append("seccomp")
    roots = None if "landlock" in layers else [os.path.realpath(path) for path in (*readable, *writable)]
    sys.addaudithook(_refuser(roots, [os.path.realpath(path) for path in writable]))
    return (*layers, "audit")


def seal(limits: Limits, *, without: Collection[str] = ()) -> None:
    """Take back what a GPU's driver needed to begin: once its device is initialised, before anything of a model is read.

    From here on no socket, no program, no process; and at most `limits.memory_bytes` more memory than there is now. On a
    CPU nothing is left to be taken back.
    """
    if not limits.gpu:
        return
    most = _data_bytes() + limits.memory_bytes
    _bound(resource.RLIMIT_DATA, most, most)
    if "seccomp" not in without:
        _seccomp(ctypes.CDLL(None, use_errno=True), gpu=True, sealed=True)


def hide() -> None:
    """Close this process's memory, environment and open files to other processes of its user: for one that holds secrets.

    Neither /proc/PID/environ nor a debugger reads them then, and it leaves no core file; root still can. Programs that it
    starts are not hidden.
    """
    with contextlib.suppress(AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


# --- limits -----------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22


def _limit(libc: ctypes.CDLL, limits: Limits) -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a validator that is killed leaves no child behind
    if limits.parent is not None and os.getppid() != limits.parent:  # killed while this process began: no signal comes
        sys.exit(f"process {limits.parent}, which this one works for, has ended")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        # Private memory that can be written: what a process can use up. Not the address space, of which a mapped file and
        # a library's reserve take much and cost nothing. A CUDA context may reserve much: lifted until `seal`.
        (resource.RLIMIT_DATA, limits.memory_bytes, resource.RLIM_INFINITY if limits.gpu else limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 5),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
    ):
        _bound(kind, soft, hard)


def _bound(kind: int, soft: int, hard: int) -> None:
    """Never above what the limit is already."""
    most = resource.getrlimit(kind)[1]
    bounded = [value if most == resource.RLIM_INFINITY or 0 <= value <= most else most for value in (soft, hard)]
    resource.setrlimit(kind, (bounded[0], bounded[1]))


def lift_memory_limit() -> None:
    """While a device is initialised whose driver may reserve far more than it uses; `seal` sets it again."""
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def bounded(*, cpu_s: float, more_bytes: int) -> Iterator[None]:
    """Within: at most so many CPU seconds, or the process dies by SIGPROF, and so much more memory than it has now.

    A library that does not come back to Python cannot be interrupted in another way.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = _data_bytes() + more_bytes
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    resource.setrlimit(resource.RLIMIT_DATA, (now if soft == resource.RLIM_INFINITY else min(now, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) << 10


# --- network namespace ------------------------------------------------------------------------------------------------


def _own_network(libc: ctypes.CDLL) -> bool:
    new_user, new_network = 0x10000000, 0x40000000
    if libc.unshare(new_network) == 0:  # only root may; others become root of a user namespace of their own
        return True
    return bool(libc.unshare(new_user | new_network) == 0)


# --- capabilities -----------------------------------------------------------------------------------------------------

_VERSION_3, _READ_ALL = 0x20080522, 1 << 2


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Keeps CAP_DAC_READ_SEARCH alone, where it is there: under `sudo` the libraries may lie in another user's home.

    A process with fewer of them than its parent cannot trace the parent either, nor read its memory and environment.
    """
    header, held = struct.pack("Ii", _VERSION_3, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, held) != 0:
        return False
    effective, permitted = struct.unpack("6I", held.raw)[:2]
    kept = struct.pack("6I", effective & _READ_ALL, permitted & _READ_ALL, 0, 0, 0, 0)
    return bool(libc.capset(header, kept) == 0)


# --- Landlock ---------------------------------------------------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""System calls, of one number on every machine."""
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8
"""Write a file, remove folders and files, make folders and files."""
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OF_FILES = 1 << 1 | _READ_FILE | _TRUNCATE | _IOCTL
"""Rights that can be given on a file and not only on a folder."""


def _landlock(libc: ctypes.CDLL, readable: list[str], writable: list[str]) -> bool:
    libc.syscall.restype = ctypes.c_long
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1  # each of these versions brought one right more
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    for path in readable:
        _allow(libc, ruleset, path, files & (_READ_FILE | _READ_DIR))
    for path in writable:
        device = _IOCTL if path.startswith("/dev/") else 0
        _allow(libc, ruleset, path, files & (_READ_FILE | _READ_DIR | _WRITE | _TRUNCATE | device))
    held = bool(libc.syscall(_RESTRICT, ruleset, 0) == 0)
    os.close(ruleset)
    return held


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this machine
        return
    if not os.path.isdir(path):
        rights &= _OF_FILES
    libc.syscall(_ADD, ruleset, 1, struct.pack("=Qi", rights, opened), 0)
    os.close(opened)


def _readable(limits: Limits) -> list[str]:
    """What the interpreter, the libraries and the driver read. No home, no wallet, no other process."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    specs = [importlib.util.find_spec(name) for name in packages]
    libraries = {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin}
    python = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    system = [
        "/usr", "/lib", "/lib64", "/opt", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd",
        "/etc/ssl/openssl.cnf", "/dev/urandom", "/dev/random", "/dev/zero", f"/proc/{os.getpid()}", "/proc/cpuinfo",
        "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems", "/sys/devices/system", "/sys/fs/cgroup",
    ]  # fmt: skip
    linker = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    driver = _OF_DRIVERS if limits.gpu else []
    ours = [str(Path(__file__).parents[1]), f"{sys.base_prefix}/lib", f"{sys.prefix}/lib", f"{sys.prefix}/pyvenv.cfg"]
    return [*libraries, *python, *system, *linker, *driver, *ours, *limits.readable]


# What CUDA reads while it begins; of /proc what the driver has there, and never the whole of it: the environment of each
# process of the same user stands in it.
_OF_DRIVERS = [
    "/proc/driver/nvidia", "/proc/driver/nvidia-caps", "/proc/driver/nvidia-uvm", "/proc/devices", "/proc/modules",
    "/proc/sys/vm", "/sys/bus", "/sys/class", "/sys/dev", "/sys/devices", "/sys/module", "/etc/OpenCL", "/etc/nvidia",
    "/run/nvidia-persistenced",
]  # fmt: skip
_DEVICE = re.compile(r"nvidia.*|kfd|dri|dxg")
"""Of /dev: NVIDIA's (nvidia0, nvidiactl, nvidia-uvm, nvidia-caps, ...), AMD's, and Windows' below Linux."""


def _writable(limits: Limits) -> list[str]:
    """Its folder; nothing; with a GPU its devices, and the names of its own threads: CUDA of driver 570 does not begin
    without being able to write those."""
    if not limits.gpu:
        return [limits.folder, "/dev/null"]
    devices = [f"/dev/{name}" for name in sorted(os.listdir("/dev")) if _DEVICE.fullmatch(name)]
    return [limits.folder, "/dev/null", f"/proc/{os.getpid()}/task", *devices]


# --- seccomp ----------------------------------------------------------------------------------------------------------

# Numbers of the system calls that are refused whatever they ask for.
_CALLS = {
    "x86_64": {
        "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "ptrace": 101, "unshare": 272, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250,
        "open_by_handle_at": 304, "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "shmget": 29,
        "memfd_create": 319, "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94,
        "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "setxattr": 188, "lsetxattr": 189,
        "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    },
    "aarch64": {
        "socket": 198, "execve": 221, "execveat": 281, "ptrace": 117, "unshare": 97, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219,
        "open_by_handle_at": 265, "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "shmget": 194,
        "memfd_create": 279, "fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88, "setxattr": 5,
        "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
    },
}  # fmt: skip
_CALLS_OF_BOTH = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsmount": 432, "pidfd_open": 434, "pidfd_getfd": 438, "fchmodat2": 452,
    "setxattrat": 463, "removexattrat": 466, "open_tree_attr": 467, "file_setattr": 469,
}  # fmt: skip
# Those whose arguments are looked at.
_ASKED = {
    "x86_64": {"arch": 0xC000003E, "clone": 56, "kill": 62, "tgkill": 234, "prlimit64": 302, "mmap": 9},
    "aarch64": {"arch": 0xC00000B7, "clone": 220, "kill": 129, "tgkill": 131, "prlimit64": 261, "mmap": 222},
}
_TO_BEGIN = {"socket", "fork", "vfork", "execve", "memfd_create"}
"""What drivers of GPUs ask for while they begin: they talk to a daemon over a Unix socket, and start a helper that makes
missing devices."""
_CLONE3 = 435
_ALLOW, _ERRNO, _EPERM, _ENOMEM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 12, 38
_LOAD, _AND, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x35, 0x06
"""Instructions of the kernel's filter language: (instruction, steps to skip if so, steps to skip if not, number)."""
_ARGUMENTS = 16
"""Where they begin in what the filter sees: (call, machine, address, arguments), 8 bytes for each of these."""
_PASS, _DENY, _MISSING = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ERRNO | _ENOSYS)
_NO_MEMORY = (_RETURN, 0, 0, _ERRNO | _ENOMEM)
_THREAD, _SHARED_AND_ANONYMOUS = 0x00010000, 0x21


def _seccomp(libc: ctypes.CDLL, *, gpu: bool, sealed: bool) -> bool:
    if platform.machine() not in _CALLS or sys.maxsize < 1 << 32:
        return False
    program = _filter(platform.machine(), gpu, sealed)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    program_of = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, program_of, 0, 0) == 0)


def _filter(machine: str, gpu: bool, sealed: bool) -> list[tuple[int, int, int, int]]:
    """The program. A second one only takes away: the kernel asks all, and the strictest answer counts.

    A process made by clone is refused and a thread is not; clone3 hides its flags in memory, so it does not exist here, and
    the C library falls back to clone. Signals and limits are for this process alone. Shared memory that no file holds is
    beyond every limit, so there is none; but a GPU's driver lives on it.
    """
    asked, me = _ASKED[machine], os.getpid()
    waived = (set() if sealed else _TO_BEGIN) | ({"memfd_create"} if gpu else set())
    refused = {name: number for name, number in (_CALLS[machine] | _CALLS_OF_BOTH).items() if name not in waived}
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, asked["arch"]), _DENY, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the same calls by other numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), _DENY]
    for number in refused.values():
        program += [(_EQUAL, 0, 1, number), _DENY]
    program += [(_EQUAL, 0, 1, _CLONE3), _MISSING]
    for name in ("kill", "tgkill"):
        program += [(_EQUAL, 0, 4, asked[name]), (_LOAD, 0, 0, _ARGUMENTS), (_EQUAL, 1, 0, me), _DENY, _PASS]
    own = [(_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, me), _DENY, _PASS]
    program += [(_EQUAL, 0, 5, asked["prlimit64"]), (_LOAD, 0, 0, _ARGUMENTS), *own]
    if sealed:
        program += [(_EQUAL, 0, 4, asked["clone"]), (_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 1, 0, _THREAD), _DENY, _PASS]
    else:
        unix = [(_LOAD, 0, 0, _ARGUMENTS), (_EQUAL, 1, 0, socket.AF_UNIX), _DENY, _PASS]
        program += [(_EQUAL, 0, 4, _CALLS[machine]["socket"]), *unix]
    if not gpu:
        flags = [(_LOAD, 0, 0, _ARGUMENTS + 8 * 3), (_AND, 0, 0, _SHARED_AND_ANONYMOUS)]
        program += [(_EQUAL, 0, 5, asked["mmap"]), *flags, (_EQUAL, 1, 0, _SHARED_AND_ANONYMOUS), _PASS, _NO_MEMORY]
    return [*program, _PASS]


# --- audit ------------------------------------------------------------------------------------------------------------

_REFUSED_EVENTS = {
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "os.forkpty", "subprocess.Popen", "os.kill", "os.killpg", "os.chmod", "os.chown", "os.utime", "os.setxattr",
    "os.removexattr",
}  # fmt: skip


def _refuser(roots: list[str] | None, writable: list[str]) -> Any:
    """The hook that Python asks. `roots` are the folders that may be read, where no Landlock sees to it."""

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        if event in _REFUSED_EVENTS:
            raise PermissionError(f"{event} in the evaluation child")
        if event == "open" and roots is not None and isinstance(values[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(values[0]))
            writes = bool(values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if not any(path == root or path.startswith(root + os.sep) for root in (writable if writes else roots)):
                raise PermissionError(f"open of {path} in the evaluation child")

    return refuse


# --- what holds on this machine ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Protection:
    """One thing that a stranger's model must not be able to do."""

    what: str
    holds: bool
    """It was tried in a confined process, below Python where that can be, and failed."""
    how: str
    """The layers that see to it, or what is missing."""
    can_hold: bool = True
    """False for what no machine can hold with this device."""


def describe(*, device: str = "cpu", without: Collection[str] = (), timeout_s: float = 30) -> tuple[Protection, ...]:
    """Tries what is forbidden in a process that is confined, and sealed, as for a model on this device; tells what held.

    The device itself is not needed for it. Raises OSError when no process can be started.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sn29-confinement-") as folder,
        tempfile.TemporaryDirectory(prefix="sn29-confinement-") as yours,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        secret, daemon = Path(yours, "secret"), Path(yours, "daemon")
        secret.touch()
        listening.bind(str(daemon))
        listening.listen()
        asked = {"folder": folder, "secret": str(secret), "daemon": str(daemon), "parent": os.getpid(), "device": device}
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-m", "sn29.evaluation.confinement", json.dumps({**asked, "without": [*without]})],
            cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.splitlines() or ["no message"])[-1][:200]
        return (Protection("any of it", False, f"the trial itself failed: {last}"),)
    found = json.loads(done.stdout)
    return tuple(
        Protection(what, False, "a GPU's driver needs it", can_hold=False)
        if device != "cpu" and what == _SHARED_MEMORY and not held
        else Protection(what, held, _by(layers, found["layers"], held))
        for what, (layers, held) in found["tried"].items()
    )


_SHARED_MEMORY = "take shared memory beyond its limit"


def _by(layers: list[str], there: list[str], held: bool) -> str:
    holding = [layer for layer in layers if layer in there]
    if not holding:
        return f"this machine has no {' and no '.join(layers)}"
    if not held:
        return f"{' and '.join(holding)} did not keep it off"
    return " and ".join(holding) + (": Python's own calls only" if holding == ["audit"] else "")


def _try_all(asked: dict[str, Any]) -> dict[str, Any]:
    """In the child: {layers, tried: what -> (layers that can hold it, held)}. The calls go past Python where they can."""
    parent, secret = asked["parent"], asked["secret"]
    limits = Limits(1 << 30, 60, 1 << 20, asked["folder"], device=asked["device"], parent=parent)
    layers = confine(limits, without=asked["without"])
    if limits.gpu:
        lift_memory_limit()
    seal(limits, without=asked["without"])
    trial = _Trial(layers)
    tried: dict[str, tuple[list[str], Callable[[bool], bool]]] = {
        "reach a network": (
            ["namespace", "landlock", "seccomp", "audit"], lambda below: trial.connects(below, socket.AF_INET, ("127.0.0.1", 9))
        ),
        "reach a socket of yours": (["seccomp", "audit"], lambda below: trial.connects(below, socket.AF_UNIX, asked["daemon"])),
        "read a file of yours": (["landlock", "audit"], lambda below: trial.opens(below, secret, os.O_RDONLY)),
        "read your environment": (
            ["capabilities", "landlock", "audit"], lambda below: trial.opens(below, f"/proc/{parent}/environ", os.O_RDONLY)
        ),
        "write outside its folder": (["landlock", "audit"], lambda below: trial.opens(below, secret, os.O_WRONLY)),
        "change the mode of a file of yours": (["seccomp", "audit"], lambda below: trial.changes(below, secret)),
        "start a program": (["seccomp", "audit"], lambda below: trial.starts(below)),
        "signal your processes": (["landlock", "seccomp", "audit"], lambda below: trial.signals(below, parent)),
        "take more memory than its limit": (["limits"], lambda below: _allocates(2 << 30)),
        _SHARED_MEMORY: (["seccomp"], lambda below: _shares(2 << 30)),
        "write a file beyond its limit": (["limits"], lambda below: _grows(Path(asked["folder"]), 2 << 20)),
    }  # fmt: skip
    found = {}
    for what, (holding, does) in tried.items():
        below = any(layer in layers for layer in holding if layer != "audit")
        found[what] = (holding, not does(below))
    return {"layers": layers, "tried": found}


class _Trial:
    """Each thing tried by the C library, below what Python refuses; where only Python's hook is there, by Python."""

    def __init__(self, layers: Collection[str]) -> None:
        self._layers = layers
        self._libc = ctypes.CDLL(None, use_errno=True)

    def connects(self, below: bool, family: int, address: Any) -> bool:
        if not below:
            try:
                with socket.socket(family, socket.SOCK_STREAM) as here:
                    here.connect(address)
            except OSError as error:
                return error.errno == errno.ECONNREFUSED  # a network answered
            return True
        opened = self._libc.socket(family, socket.SOCK_STREAM, 0)
        if opened < 0:
            return False
        if family == socket.AF_UNIX:
            raw = struct.pack("H", family) + os.fsencode(address) + b"\0"
        else:
            raw = struct.pack("=H", family) + struct.pack("!H4s8x", address[1], socket.inet_aton(address[0]))
        reached = self._libc.connect(opened, raw, len(raw)) == 0 or ctypes.get_errno() == errno.ECONNREFUSED
        os.close(opened)
        return bool(reached)

    def opens(self, below: bool, path: str, flags: int) -> bool:
        if below:
            return bool(self._libc.open(os.fsencode(path), flags) >= 0)
        return _done(lambda: os.close(os.open(path, flags)))

    def changes(self, below: bool, path: str) -> bool:
        return bool(self._libc.chmod(os.fsencode(path), 0o600) == 0) if below else _done(lambda: os.chmod(path, 0o600))

    def starts(self, below: bool) -> bool:
        if not below:
            return _done(lambda: subprocess.run([sys.executable, "-c", ""], check=True, capture_output=True))
        pid = self._libc.fork()
        if pid == 0:
            self._libc.execv(b"/bin/true", (ctypes.c_char_p * 2)(b"true", None))
            os._exit(0)
        if pid > 0:
            os.waitpid(pid, 0)
        return bool(pid > 0)

    def signals(self, below: bool, pid: int) -> bool:
        return bool(self._libc.kill(pid, 0) == 0) if below else _done(lambda: os.kill(pid, 0))


def _done(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def _allocates(num_bytes: int) -> bool:
    try:
        return bool(bytearray(num_bytes))
    except MemoryError:
        return False


def _shares(num_bytes: int) -> bool:
    return _done(lambda: mmap.mmap(-1, num_bytes).close())


def _grows(folder: Path, num_bytes: int) -> bool:
    return _done(lambda: (folder / "large").write_bytes(bytes(num_bytes)))


if __name__ == "__main__":
    print(json.dumps(_try_all(json.loads(sys.argv[1]))))
