"""What a process that handles a stranger's model may do: use its memory and time, read the libraries and the model, write one
folder. Linux only; nothing but the standard library, so that it stands before anything else is imported.

Several layers, each used wherever the kernel has it:

    limits      memory, CPU seconds, file sizes, open files; no core files; dies with its parent   everywhere
    namespace   a network namespace without an interface                                           where unshare is allowed
    landlock    files: reads the libraries, the model and its own folder, writes its folder;       Linux 5.13
                no TCP (6.7); no signal or abstract socket to processes outside (6.12)
    seccomp     no socket, no program started, no process made, no tracing, no mount               x86_64 and aarch64
    audit       the same asked of Python alone, for what the layers above leave open               everywhere

`describe` tries each forbidden thing in a confined process of its own and says what held: what is told to the operator is
measured, not presumed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterator
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


def confine(limits: Limits, *, without: Collection[str] = ()) -> tuple[str, ...]:
    """Confine this process for good, before it starts a thread. Gives the names of the layers that hold.

    `without` leaves layers out, as a kernel without them does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    gpu = limits.device != "cpu"
    _limit(libc, limits, gpu)
    layers = ["limits"]
    if "namespace" not in without and _own_network(libc):
        layers.append("namespace")
    if "landlock" not in without and _landlock(libc, limits, gpu):
        layers.append("landlock")
    if "seccomp" not in without and _seccomp(libc, gpu):
        layers.append("seccomp")
    roots = None if "landlock" in layers else [os.path.realpath(path) for path in _readable(limits, gpu)]
    sys.addaudithook(_refuser(roots, os.path.realpath(limits.folder)))
    return (*layers, "audit")


# --- limits -----------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22


def _limit(libc: ctypes.CDLL, limits: Limits, gpu: bool) -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a validator that is killed leaves no child behind
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        # Private memory that can be written: what a process can use up. Not the address space, of which a mapped file and
        # a library's reserve take much and cost nothing. A CUDA context reserves so much that there it must be lifted.
        (resource.RLIMIT_DATA, limits.memory_bytes, resource.RLIM_INFINITY if gpu else limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 5),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
    ):
        most = resource.getrlimit(kind)[1]
        bounded = [value if most == resource.RLIM_INFINITY or 0 <= value <= most else most for value in (soft, hard)]
        resource.setrlimit(kind, (bounded[0], bounded[1]))


def lift_memory_limit() -> None:
    """For a device whose driver reserves address space far beyond what it uses."""
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


# --- Landlock ---------------------------------------------------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""System calls, of one number on every machine."""
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8
"""Write a file, remove folders and files, make folders and files."""
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OF_FILES = 1 << 1 | _READ_FILE | _TRUNCATE | _IOCTL
"""Rights that can be given on a file and not only on a folder."""


def _landlock(libc: ctypes.CDLL, limits: Limits, gpu: bool) -> bool:
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
    for path in _readable(limits, gpu):
        _allow(libc, ruleset, path, files & (_READ_FILE | _READ_DIR))
    _allow(libc, ruleset, limits.folder, files & (_READ_FILE | _READ_DIR | _WRITE | _TRUNCATE))
    for path in ["/dev/null", *(["/dev"] if gpu else [])]:
        _allow(libc, ruleset, path, files & (_READ_FILE | _READ_DIR | _WRITE | _TRUNCATE | _IOCTL))
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


def _readable(limits: Limits, gpu: bool) -> list[str]:
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
    driver = ["/proc", "/sys", "/dev", "/run/nvidia-persistenced", "/etc/OpenCL", "/etc/nvidia"] if gpu else []
    ours = [str(Path(__file__).parents[1]), f"{sys.base_prefix}/lib", f"{sys.prefix}/lib", f"{sys.prefix}/pyvenv.cfg"]
    return [*libraries, *python, *system, *linker, *driver, *ours, *limits.readable, limits.folder]


# --- seccomp ----------------------------------------------------------------------------------------------------------

# Numbers of the refused system calls; a third column stands for both machines.
_CALLS = {
    "x86_64": (0xC000003E, 56, {
        "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "ptrace": 101, "unshare": 272, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250,
        "open_by_handle_at": 304,
    }),
    "aarch64": (0xC00000B7, 220, {
        "socket": 198, "execve": 221, "execveat": 281, "ptrace": 117, "unshare": 97, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219,
        "open_by_handle_at": 265,
    }),
}  # fmt: skip
_CALLS_OF_BOTH = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "fsmount": 432, "pidfd_open": 434, "pidfd_getfd": 438,
}  # fmt: skip
_CLONE3 = 435
_ALLOW, _ERRNO, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
"""Instructions of the kernel's filter language."""


def _seccomp(libc: ctypes.CDLL, gpu: bool) -> bool:
    if platform.machine() not in _CALLS or sys.maxsize < 1 << 32:
        return False
    program = _filter(platform.machine(), gpu)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    program_of = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, program_of, 0, 0) == 0)


def _filter(machine: str, gpu: bool) -> list[tuple[int, int, int, int]]:
    """(instruction, steps to skip if so, steps to skip if not, number) each, over (call, machine, address, arguments).

    A process made by clone is refused and a thread is not; clone3 hides its flags in memory, so it does not exist here, and
    the C library falls back to clone. Drivers of GPUs talk to their daemon over a Unix socket and start a helper.
    """
    arch, clone, calls = _CALLS[machine]
    refused = {name: number for name, number in (calls | _CALLS_OF_BOTH).items() if not (gpu and name in _FOR_DRIVERS)}
    deny, missing, allow = (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ERRNO | _ENOSYS), (_RETURN, 0, 0, _ALLOW)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, arch), deny, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the same calls by other numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), deny]
    for number in refused.values():
        program += [(_EQUAL, 0, 1, number), deny]
    program += [(_EQUAL, 0, 1, _CLONE3), missing]
    if gpu:
        unix = socket.AF_UNIX
        program += [(_EQUAL, 0, 4, calls["socket"]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, unix), deny, allow]
    else:
        thread = 0x00010000
        program += [(_EQUAL, 0, 4, clone), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, thread), deny, allow]
    return [*program, allow]


_FOR_DRIVERS = {"socket", "fork", "vfork", "execve"}


# --- audit ------------------------------------------------------------------------------------------------------------

_REFUSED_EVENTS = {
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "os.forkpty", "subprocess.Popen",
}  # fmt: skip


def _refuser(roots: list[str] | None, folder: str) -> Any:
    """The hook that Python asks. `roots` are the folders that may be read, where no Landlock sees to it."""

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        if event in _REFUSED_EVENTS:
            raise PermissionError(f"{event} in the evaluation child")
        if event == "open" and roots is not None and isinstance(values[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(values[0]))
            writes = bool(values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if not any(path == root or path.startswith(root + os.sep) for root in ([folder, "/dev/null"] if writes else roots)):
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


def describe(*, without: Collection[str] = (), timeout_s: float = 30) -> tuple[Protection, ...]:
    """Tries what is forbidden in a confined process and tells what held. Raises OSError when no process can be started."""
    with tempfile.TemporaryDirectory(prefix="sn29-confinement-") as folder, tempfile.NamedTemporaryFile() as secret:
        asked = json.dumps({"folder": folder, "secret": secret.name, "without": list(without)})
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-m", "sn29.evaluation.confinement", asked],
            cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.splitlines() or ["no message"])[-1][:200]
        return (Protection("any of it", False, f"the trial itself failed: {last}"),)
    found = json.loads(done.stdout)
    return tuple(Protection(what, held, _by(layers, found["layers"])) for what, (layers, held) in found["tried"].items())


def _by(layers: list[str], there: list[str]) -> str:
    holding = [layer for layer in layers if layer in there]
    if not holding:
        return f"this machine has no {' and no '.join(layers)}"
    return " and ".join(holding) + (": Python's own calls only" if holding == ["audit"] else "")


def _try_all(asked: dict[str, Any]) -> dict[str, Any]:
    """In the child: {layers, tried: what -> (layers that can hold it, held)}. The calls go past Python where they can."""
    parent, libc = os.getppid(), ctypes.CDLL(None)
    layers = confine(Limits(1 << 30, 60, 1 << 20, asked["folder"]), without=asked["without"])
    secret = os.fsencode(asked["secret"])

    def opens(flags: int) -> bool:
        return bool(libc.open(secret, flags) >= 0) if "landlock" in layers else _python_opens(secret, flags)

    tried = {
        "reach a network": (["namespace", "landlock", "seccomp", "audit"], not _connects()),
        "read a file of yours": (["landlock", "audit"], not opens(os.O_RDONLY)),
        "write outside its folder": (["landlock", "audit"], not opens(os.O_WRONLY)),
        "start a program": (["seccomp", "audit"], not _starts()),
        "signal your processes": (["landlock"], bool(libc.kill(parent, 0) != 0)),
        "take more memory than its limit": (["limits"], not _allocates(2 << 30)),
        "write a file beyond its limit": (["limits"], not _grows(Path(asked["folder"]), 2 << 20)),
    }
    return {"layers": layers, "tried": tried}


def _connects() -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as here:
            here.settimeout(2)
            here.connect(("127.0.0.1", 9))
    except ConnectionRefusedError:  # a network answered
        return True
    except OSError:
        return False
    return True


def _python_opens(path: bytes, flags: int) -> bool:
    try:
        os.close(os.open(path, flags))
    except OSError:
        return False
    return True


def _starts() -> bool:
    try:
        return subprocess.run([sys.executable, "-c", ""], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def _allocates(num_bytes: int) -> bool:
    try:
        return bool(bytearray(num_bytes))
    except MemoryError:
        return False


def _grows(folder: Path, num_bytes: int) -> bool:
    try:
        (folder / "large").write_bytes(bytes(num_bytes))
    except OSError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(_try_all(json.loads(sys.argv[1]))))
