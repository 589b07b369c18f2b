"""A stranger's model is tokenised and evaluated in a child process: no wallet, no token, no network, bounded time and memory.

    parent   evaluate(job, ...)  writes job.json, starts `python -m sn29.evaluation.worker job.json`, waits with a deadline
    child    confines itself, checks the files, tokenises, loads, probes, evaluates, writes the result in one rename, exits
    parent   reads the file: Evaluated, or Rejected with the child's reason; no file means ChildEnded, with how it ended

A file and not a pipe: results of any size, and nothing that the child does can block the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sn29.errors import Reason, Rejected, Unavailable, shown
from sn29.evaluation.confinement import Limits, bounded, confine, lift_memory_limit, seal
from sn29.evaluation.probes import PLACES, TOKENS, Probes, changed_file, probe
from sn29.models.checkpoint import is_content, load, tensor_digest
from sn29.records import Loss, ModelFacts, RepoFile, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_BYTES = 3 << 30
"""Memory a child needs beside the model and its activations: the libraries' private data, measured below 1 GiB, with room."""
TOKENIZER_CPU_S, TOKENIZER_CPU_S_A_MB = 20.0, 4.0
"""CPU seconds to load a tokenizer (cl100k: 1.2) and to read each MB of text and back (cl100k: 0.6); dearer ones are ended."""
TOKENIZER_BYTES, TOKENIZER_BYTES_A_MB = 640 << 20, 256 << 20
"""Memory for the same (cl100k: 0.14 GB; 200,000 entries in 17 MB: 0.31 GB)."""


@dataclass(frozen=True, slots=True)
class Job:
    """One model and the samples that it has not been measured on."""

    checkpoint: str
    """Folder with config.json and weights."""
    tokenizer: str
    """Path of the tokenizer.json that reads the samples."""
    start_token: int
    max_tokens: int
    """A longer sample is unscorable under this model: +inf."""
    dtype: str
    """`float32` or `bfloat16`."""
    device: str
    threads: int
    """CPU threads of the child."""
    samples: tuple[Sample, ...]
    files: tuple[RepoFile, ...] = ()
    """The checkpoint's files as the Hub lists them: hashed again in the child. None: a folder that nobody has listed."""
    tokenizer_oid: str = ""
    """Of a tokenizer that is not the model's own: `sha256:...` of its file, hashed again in the child too."""
    every_reason: bool = False
    """Look on after the first reason for a refusal: see `SeveralReasons`."""

    @property
    def own_tokenizer(self) -> bool:
        """The model brings its tokenizer: what is wrong with it is the miner's fault, and else ours."""
        return Path(self.tokenizer).parent == Path(self.checkpoint)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a child found."""

    losses: tuple[Loss, ...]
    """Of the job's samples, in their order; +inf with a reason where there is none."""
    tensor_digest: str
    """Canonical identity of the weights that were scored (`checkpoint.tensor_digest`)."""
    probes: Probes

    def __iter__(self) -> Iterator[Loss]:
        return iter(self.losses)

    def __len__(self) -> int:
        return len(self.losses)


class Ending(Enum):
    """How a child ended that left no result."""

    DEADLINE = "had not ended by its deadline"
    CPU_TIME = "used up its processor time"
    TOKENIZER = "read the texts too slowly with the model's tokenizer"
    MEMORY = "ran out of the memory that it may use"
    DEVICE = "could not use its GPU"
    DEVICE_MEMORY = "found too little free memory on its GPU"
    MACHINE = "was let down by this machine"
    ABORT = "was given up by a library (abort)"
    FAULT = "broke off at a fault of memory or arithmetic"
    KILLED = "was killed from outside"
    ERROR = "ended with an error"


class ChildEnded(Unavailable):
    """The child left no result: of the model nothing is known, and the machine may be at fault."""

    def __init__(self, ending: Ending, detail: str) -> None:
        super().__init__("evaluation", f"the child {ending.value}: {shown(detail, 200)}")
        self.ending = ending


class TooLate(ChildEnded):
    """The child had not ended by its deadline."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(Ending.DEADLINE, f"no result within {deadline_s:g} s")


class FileChanged(Unavailable):
    """A file on this machine's disk is not the one that was fetched: fetch it again."""

    def __init__(self, path: str) -> None:
        super().__init__("evaluation", f"{shown(path)} is not the file that was fetched: its hash is another one")
        self.path = path


class SeveralReasons(Rejected):
    """The first of `found`, which are all that the child came to: for a job that asks for every reason."""

    def __init__(self, found: Sequence[Rejected]) -> None:
        super().__init__(found[0].reason, found[0].got, found[0].limit, found[0].where)
        self.found = tuple(found)


def memory_needed(facts: ModelFacts, max_tokens: int) -> int:
    """Bytes that the child may use: libraries, the weights in float32 three times over (read, cast, kept), logits likewise."""
    return BASE_BYTES + 12 * facts.num_parameters + 12 * max_tokens * facts.vocab_size


async def evaluate(job: Job, *, deadline_s: float, memory_bytes: int, work_dir: Path | None = None) -> Evaluated:
    """The losses of the job's samples, with the identity of what was scored and what the probes found.

    Raises Rejected with the reason that the child found, ChildEnded (TooLate at the deadline) when it left no result,
    FileChanged when a file is not the listed one, whatever else the child found is void then, and Unavailable when it is
    the competition's own tokenizer that fails. `work_dir` is where the child gets its folder: the system's by default.
    """
    with _folder_in(work_dir) as folder:
        task = write_job(job, folder, memory_bytes, deadline_s, parent=os.getpid())
        await _run_child(task, deadline_s)
        return read_result(folder, job.samples)


async def self_test(*, device: str, dtype: str, threads: int, deadline_s: float = 300, work_dir: Path | None = None) -> Probes:
    """That this machine can evaluate at all: a tiny model of our own in a child, and what the probes found of it.

    A driver fault or a full GPU must never look like a fault of a miner's model. Raises Unavailable when it cannot.
    """
    test = {"self_test": True, "device": device, "dtype": dtype, "threads": threads}
    with _folder_in(work_dir) as folder:
        await _run_child(_write(test, folder, BASE_BYTES, deadline_s, os.getpid()), deadline_s)
        return _read(folder, 0, lambda result: _probes(result["passed"]))


# --- a child's folder: job.json, result.json, errors -------------------------------------------------------------------

_PREFIX, _RESULT = "sn29-evaluation-", "result.json"


@contextmanager
def _folder_in(work_dir: Path | None) -> Iterator[Path]:
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=work_dir) as folder:
        yield Path(folder).absolute()


def sweep(work_dir: Path) -> None:
    """Deletes the folders, with the texts in them, that a killed validator's evaluations left. None must be running."""
    for left in work_dir.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def write_job(job: Job, folder: Path, memory_bytes: int, deadline_s: float, parent: int | None = None) -> Path:
    """What the child reads; its only argument. It ends with its parent, if that is named."""
    return _write(asdict(job), folder, memory_bytes, deadline_s, parent)


def _write(job: dict[str, Any], folder: Path, memory_bytes: int, deadline_s: float, parent: int | None) -> Path:
    task = folder / "job.json"
    more = {"result": str(folder / _RESULT), "memory_bytes": memory_bytes, "deadline_s": deadline_s, "parent": parent}
    task.write_text(json.dumps(job | more))
    return task


# --- what a child may say: nothing that it wrote is taken on trust but numbers, within what numbers can be ---------------

_CHILDS_REASONS = {
    reason.name: reason
    for reason in (
        Reason.FORBIDDEN_FILE, Reason.MISSING_FILE, Reason.TOO_LARGE, Reason.BAD_CONFIG, Reason.FAMILY, Reason.TENSORS,
        Reason.VOCABULARY, Reason.TOKENIZER, Reason.ROUND_TRIP, Reason.NOT_FINITE, Reason.NOT_CAUSAL,
        Reason.NOT_DETERMINISTIC,
    )
}  # fmt: skip
"""What the files alone can show. Who came first, or whose setting is wrong, is not a child's to say."""
_UNSCORED = frozenset({Reason.ROUND_TRIP.code, "too_long", "not_finite"})
_Found = TypeVar("_Found")


def read_result(folder: Path, samples: Sequence[Sample]) -> Evaluated:
    """What the child wrote. Raises Rejected, FileChanged, Unavailable, or ChildEnded when it is no result."""
    return _read(folder, len(samples), lambda result: _read_result(result, samples))


def _read(folder: Path, num_samples: int, of: Callable[[dict[str, Any]], _Found]) -> _Found:
    path = folder / _RESULT
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.lstat().st_size > _file_bytes(num_samples):
            raise ValueError("not a file, or too large")
        return of(json.loads(path.read_bytes(), parse_constant=_no_constant))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ChildEnded(Ending.ERROR, f"no result that can be read ({type(error).__name__}: {shown(error, 100)})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read_result(result: dict[str, Any], samples: Sequence[Sample]) -> Evaluated:
    if "changed" in result:
        raise FileChanged(_text(result["changed"]))
    if "unavailable" in result:
        raise Unavailable("evaluation", shown(_text(result["unavailable"])))
    if "rejected" in result:
        found = [Rejected(_CHILDS_REASONS[_text(name)], *map(_text, rest)) for name, *rest in result["rejected"]]
        raise found[0] if len(found) == 1 else SeveralReasons(found)
    losses = tuple(
        _loss(sample, nats, tokens, reason) for sample, (nats, tokens, reason) in zip(samples, result["losses"], strict=True)
    )
    if not re.fullmatch("[0-9a-f]{64}", _text(result["tensor_digest"])):
        raise ValueError("a tensor digest that is none")
    return Evaluated(losses, result["tensor_digest"], _probes(result["probes"]))


def _loss(sample: Sample, nats: object, tokens: object, reason: object) -> Loss:
    """Finite and not negative without a reason, or null with one of the three."""
    fits = reason in _UNSCORED if nats is None else reason == ""
    if not fits or not isinstance(reason, str) or not isinstance(tokens, int):
        raise ValueError("a loss that is none")
    loss = math.inf if nats is None else float(_number(nats, sys.float_info.max))
    return Loss(sample.id, loss, int(_number(tokens, 2**31 - 1)), reason)


def _probes(found: Any) -> Probes:
    places, influence, tolerance = found
    if len(places) != PLACES or not all(isinstance(place, int) and 0 < place < TOKENS for place in places):
        raise ValueError("other places than the probes have")
    return Probes(tuple(places), float(_number(influence, 1.0)), float(_number(tolerance, 1.0)))


def _number(value: object, largest: float) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise ValueError(f"{shown(value, 40)} instead of a number from 0 to {largest:g}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value, 40)} instead of a text")
    return value


def _file_bytes(num_samples: int) -> int:
    """Largest file that a child may write."""
    return (64 << 20) + 1024 * num_samples


# --- how a child ends ---------------------------------------------------------------------------------------------------


async def _run_child(task: Path, deadline_s: float) -> None:
    """Returns when the child has left a result. Raises ChildEnded."""
    folder = task.parent
    errors = folder / "errors"
    with errors.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sn29.evaluation.worker", str(task),
            env=_environment(str(folder)), cwd=folder, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
    try:
        await asyncio.wait_for(process.wait(), deadline_s)
    except TimeoutError:
        raise TooLate(deadline_s) from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # the whole group, also when we are cancelled
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode != 0 or not (folder / _RESULT).exists():
        with errors.open("rb") as said:
            said.seek(max(0, errors.stat().st_size - 4000))
            last = said.read().decode(errors="replace").strip()
        raise ended(process.returncode or 0, last)


_OF_MEMORY = re.compile(
    r"MemoryError|annot allocate memory|can't allocate memory|memory allocation of \d+ bytes|bad_alloc|out of memory"
    r"|OutOfMemory|too many memory regions"
)
_OF_DEVICE = re.compile(r"CUDA|cuDNN|CUDNN|CUBLAS|NVRM|NCCL|ECC error")
_OF_DEVICE_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
)
# A full disk, no process or file left, and so on. Not 12, no memory: that is how the child's own limit says no.
_OF_MACHINE = re.compile(r"^[\w.]*Error: \[Errno (?!12\])\d+\]|\(os error (?!12\))\d+\)", re.MULTILINE)
_OF_THREADS = re.compile(r"can't start new thread|Thread creation failed")
_OF_SIGNAL = {
    signal.SIGXCPU: Ending.CPU_TIME, signal.SIGPROF: Ending.TOKENIZER, signal.SIGKILL: Ending.KILLED,
    signal.SIGABRT: Ending.ABORT, signal.SIGSEGV: Ending.FAULT, signal.SIGBUS: Ending.FAULT, signal.SIGILL: Ending.FAULT,
    signal.SIGFPE: Ending.FAULT,
}  # fmt: skip


def ended(status: int, errors: str) -> ChildEnded:
    """How a child without a result ended: exit status (below 0 a signal) and the end of what it said."""
    last = (errors.splitlines() or ["no message"])[-1]
    sent = signal.Signals(-status).name if status < 0 and -status in {*signal.Signals} else f"exit status {status}"
    return ChildEnded(_ending(status, errors, last), f"{sent}, {last}")


def _ending(status: int, errors: str, last: str) -> Ending:
    anywhere = ((_OF_DEVICE_MEMORY, Ending.DEVICE_MEMORY), (_OF_THREADS, Ending.MACHINE), (_OF_MEMORY, Ending.MEMORY))
    for pattern, ending in anywhere:
        if pattern.search(errors):
            return ending
    if status < 0:
        by_signal = _OF_SIGNAL.get(signal.Signals(-status) if -status in {*signal.Signals} else signal.SIGKILL, Ending.KILLED)
        return Ending.DEVICE if by_signal is Ending.ABORT and "CUDA error" in errors else by_signal
    if _OF_DEVICE.search(last):
        return Ending.DEVICE
    return Ending.MACHINE if _OF_MACHINE.search(last) else Ending.ERROR


def _environment(home: str) -> dict[str, str]:
    """What the child may know: where programs and libraries are, and nothing of the validator (no token, no wallet, no home)."""
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV")
    alone = {
        "HOME": home, "HF_HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "CUDA_CACHE_PATH": f"{home}/cuda",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # fmt: skip
    found = {name: os.environ[name] for name in kept if name in os.environ}
    if "PYTHONPATH" in found:  # the child works in another folder
        found["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in found["PYTHONPATH"].split(os.pathsep) if part)
    return found | alone


# --- in the child -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point of the child."""
    job = json.loads(Path(sys.argv[1]).read_text())
    limits = _limits(job)
    confine(limits)
    if limits.gpu:  # its driver needs what a stranger's model must not have: it gets it before anything of the model is read
        _open_device(limits.device)
    seal(limits)
    outcome = {"passed": _self_test(job)} if job.get("self_test") else _examine(job)
    result = Path(job["result"])
    part = result.with_suffix(".part")
    part.write_text(json.dumps(outcome))
    part.rename(result)


def _limits(job: dict[str, Any]) -> Limits:
    readable = (job["checkpoint"], job["tokenizer"]) if "checkpoint" in job else ()
    return Limits(
        memory_bytes=job["memory_bytes"],
        cpu_s=int(job.get("deadline_s", 3600) * (job["threads"] + 1)) + 10,  # one thread more hashes the files
        file_bytes=_file_bytes(len(job.get("samples", ()))),
        folder=str(Path(job["result"]).parent),
        readable=readable,
        device=job["device"],
        parent=job.get("parent"),
    )


def _open_device(device: str) -> None:
    """The driver, and the library of matrix products, are ready."""
    import torch

    lift_memory_limit()
    one = torch.ones(16, 16, device=device)
    float((one @ one).sum())


def _examine(job: dict[str, Any]) -> dict[str, Any]:
    """The result: losses with digest and probes, or what is wrong. A file that has changed voids all else."""
    folder, tokenizer = Path(job["checkpoint"]), Path(job["tokenizer"])
    oids = {file["path"]: file["oid"] for file in job["files"] if is_content(file["path"])}  # a README is not fetched
    heavy = {name for name in oids if name.endswith(".safetensors")}
    if changed := changed_file(folder, oids, sorted(oids.keys() - heavy)):
        return {"changed": changed}
    if job["tokenizer_oid"] and changed_file(tokenizer.parent, {tokenizer.name: job["tokenizer_oid"]}, [tokenizer.name]):
        return {"changed": "the competition's tokenizer"}
    encoded: list[list[int]] = []
    problems: list[str] = []
    largest, refusals = job["start_token"], []
    try:  # on a CPU before torch is imported, whose memory would blur the tokenizer's bound
        encoded, problems, largest = _tokenise(job)
    except Rejected as error:
        if tokenizer.parent != folder:
            return {"unavailable": f"the competition's own tokenizer fails here: {error}"}
        refusals.append(error)
    if refusals and not job["every_reason"]:
        return _refused(refusals)
    with ThreadPoolExecutor(1) as beside:  # hashing goes on while the device computes
        unchanged = beside.submit(changed_file, folder, oids, sorted(heavy))
        try:
            model = _load(job, largest)
            identity = beside.submit(_tensor_digest, job)
            probes = probe(model, " ".join(sample["id"] for sample in job["samples"]))
            told = {
                "losses": _losses(job, model, encoded, problems),
                "probes": [probes.places, probes.influence, probes.tolerance],
                "tensor_digest": identity.result(),
            }
        except Rejected as error:
            refusals.append(error)
        changed = unchanged.result()
    return {"changed": changed} if changed else _refused(refusals) if refusals else told


def _refused(refusals: Sequence[Rejected]) -> dict[str, Any]:
    return {"rejected": [[error.reason.name, error.got, error.limit, error.where] for error in refusals]}


def _tokenise(job: dict[str, Any]) -> tuple[list[list[int]], list[str], int]:
    """Ids and problem (or nothing) of each sample, in bounded time and memory, and the largest id that needs a row.

    A miner's own tokenizer needs a row for every id that it can give. Raises Rejected.
    """
    from sn29.models.tokenizer import Tokenizer

    texts = [sample["text"] for sample in job["samples"]]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with bounded(
        cpu_s=TOKENIZER_CPU_S + TOKENIZER_CPU_S_A_MB * megabytes,
        more_bytes=TOKENIZER_BYTES + int(TOKENIZER_BYTES_A_MB * megabytes),
    ):
        tokenizer, largest = Tokenizer.load(Path(job["tokenizer"])), job["start_token"]
        if Path(job["tokenizer"]).parent == Path(job["checkpoint"]):  # the miner's, not the competition's
            largest = max(largest, tokenizer.largest_id())
            tokenizer.check_lossless()
        encoded = [tokenizer.encode(text) for text in texts]
        problems = [
            "round_trip" if not tokenizer.round_trips(text, ids) else "too_long" if len(ids) > job["max_tokens"] else ""
            for text, ids in zip(texts, encoded, strict=True)
        ]
    return encoded, problems, max(largest, *(max(ids, default=0) for ids in encoded), 0)


def _load(job: dict[str, Any], largest: int) -> PreTrainedModel:
    """The model. Raises Rejected as `checkpoint.load`, and VOCABULARY for an id that it has no row for."""
    import torch

    torch.set_num_threads(job["threads"])
    model = load(Path(job["checkpoint"]), dtype=getattr(torch, job["dtype"]), device=job["device"])
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise Rejected(Reason.VOCABULARY, f"{rows} rows", f"a row for the id {largest}")
    return model


def _tensor_digest(job: dict[str, Any]) -> str:
    return tensor_digest(Path(job["checkpoint"]), threads=1 if job["device"] == "cpu" else job["threads"])


def _losses(job: dict[str, Any], model: PreTrainedModel, encoded: list[list[int]], problems: list[str]) -> list[Any]:
    """(nats or None for +inf, tokens, reason) of each sample."""
    from sn29.evaluation.engine import all_nats

    good = [ids for ids, problem in zip(encoded, problems, strict=True) if not problem]
    nats = iter(all_nats(model, good, job["start_token"]))
    found = [math.inf if problem else next(nats) for problem in problems]
    return [
        (value if math.isfinite(value) else None, len(ids), problem or ("" if math.isfinite(value) else "not_finite"))
        for value, ids, problem in zip(found, encoded, problems, strict=True)
    ]


def _self_test(job: dict[str, Any]) -> list[Any]:
    """What the probes find of a tiny Llama with random weights, which has finite losses on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sn29.evaluation.engine import all_nats

    torch.set_num_threads(job["threads"])
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).to(device=job["device"], dtype=getattr(torch, job["dtype"])).eval()
    try:
        probes = probe(model, "self-test")
    except Rejected as error:
        raise RuntimeError(f"this machine: {error}") from None
    if not all(map(math.isfinite, all_nats(model, [[1, 2, 3]], 0))):
        raise RuntimeError("the self-test's loss is not finite")
    return [probes.places, probes.influence, probes.tolerance]


if __name__ == "__main__":
    main()
