"""A stranger's model is tokenised and evaluated in a child process: no wallet, no token, no network, bounded time and memory.

    parent   evaluate(job, ...)  writes job.json, starts `python -m sn29.evaluation.worker job.json`, waits with a deadline
    child    limits itself, loads, evaluates, writes the result to a file in one rename, exits
    parent   reads the file: losses, or Rejected with the child's reason; no file means Unavailable (crash or deadline)

A file and not a pipe: results of any size, and nothing that the child does can block the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Loss, Sample

BASE_BYTES = 3 << 30
"""Memory a child needs beside the model and its activations: the libraries' private data, measured below 1 GiB, with room."""


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
    max_round_trip_failures: int
    """More samples than this that the tokenizer does not give back, and the model is rejected."""
    dtype: str
    """`float32` or `bfloat16`."""
    device: str
    threads: int
    """CPU threads of the child."""
    samples: tuple[Sample, ...]


async def evaluate(job: Job, *, deadline_s: float, memory_bytes: int) -> tuple[Loss, ...]:
    """The losses of the job's samples, in their order.

    Raises Rejected with the reason that the child found, Unavailable when it crashed, ran out of memory or of time.
    """
    with tempfile.TemporaryDirectory(prefix="sn29-evaluation-") as folder:
        task, result = Path(folder, "job.json"), Path(folder, "result.json")
        task.write_text(json.dumps({**asdict(job), "result": str(result), "memory_bytes": memory_bytes}))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sn29.evaluation.worker", str(task),
            env=_environment(folder), cwd=folder, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, errors = await asyncio.wait_for(process.communicate(), deadline_s)
        except TimeoutError:
            raise Unavailable("evaluation", f"no result within {deadline_s:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the whole group, also when we are cancelled
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if not result.exists():
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise Unavailable("evaluation", f"the child ended with {process.returncode}: {last[0][:200]}")
        return _read_result(json.loads(result.read_text()), job.samples)


def _environment(home: str) -> dict[str, str]:
    """What the child may know: where programs and libraries are, and nothing of the validator (no token, no wallet, no home)."""
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV")
    alone = {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {name: os.environ[name] for name in kept if name in os.environ} | alone


def _read_result(result: dict[str, Any], samples: Sequence[Sample]) -> tuple[Loss, ...]:
    if "rejected" in result:
        reason, got, limit, where = result["rejected"]
        raise Rejected(Reason[reason], got, limit, where)
    rows = result["losses"]
    return tuple(
        Loss(sample.id, math.inf if nats is None else nats, tokens, reason)
        for sample, (nats, tokens, reason) in zip(samples, rows, strict=True)
    )


# --- in the child -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point of the child."""
    job = json.loads(Path(sys.argv[1]).read_text())
    _confine(job["memory_bytes"], job["device"])
    try:
        outcome: dict[str, Any] = {"losses": _losses(job)}
    except Rejected as error:
        outcome = {"rejected": [error.reason.name, error.got, error.limit, error.where]}
    result = Path(job["result"])
    part = result.with_suffix(".part")
    part.write_text(json.dumps(outcome))
    part.rename(result)


def _confine(memory_bytes: int, device: str) -> None:
    """Dies with its parent; no core files, bounded memory, no sockets, an empty network namespace if the machine allows one."""
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent = 1  # PR_SET_PDEATHSIG: a validator that is killed leaves no child behind
    libc.prctl(die_with_parent, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if device == "cpu":  # a CUDA context reserves address space far beyond what it uses
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    new_user, new_network = 0x10000000, 0x40000000
    if libc.unshare(new_network) != 0:  # only root may; others become root of a user namespace of their own
        libc.unshare(new_user | new_network)
    sys.addaudithook(_no_sockets)


def _no_sockets(event: str, _: object) -> None:
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError(f"{event} in the evaluation child")


def _losses(job: dict[str, Any]) -> list[tuple[float | None, int, str]]:
    """(nats or None for +inf, tokens, reason) of each sample."""
    import torch

    from sn29.evaluation.engine import all_nats
    from sn29.models.checkpoint import load
    from sn29.models.tokenizer import Tokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = Tokenizer.load(Path(job["tokenizer"]))
    texts = [sample["text"] for sample in job["samples"]]
    encoded = [tokenizer.encode(text) for text in texts]
    problems = [
        "round_trip" if not tokenizer.round_trips(text, ids) else "too_long" if len(ids) > job["max_tokens"] else ""
        for text, ids in zip(texts, encoded, strict=True)
    ]
    failures = problems.count("round_trip")
    if failures > job["max_round_trip_failures"]:
        raise Rejected(Reason.ROUND_TRIP, f"{failures} samples", f"at most {job['max_round_trip_failures']}")
    model = load(Path(job["checkpoint"]), dtype=getattr(torch, job["dtype"]), device=job["device"])
    rows, largest = (
        model.get_input_embeddings().num_embeddings,
        max((max(ids, default=0) for ids in encoded), default=0),
    )
    if max(largest, job["start_token"]) >= rows:
        raise Rejected(Reason.VOCABULARY, f"{rows} rows", f"an id of {max(largest, job['start_token'])} occurs")
    good = [ids for ids, problem in zip(encoded, problems, strict=True) if not problem]
    nats = iter(all_nats(model, good, job["start_token"]))
    found = [math.inf if problem else next(nats) for problem in problems]
    if good and not any(map(math.isfinite, found)):
        raise Rejected(Reason.NOT_FINITE, "no finite loss on any sample", "finite losses")
    return [
        (value if math.isfinite(value) else None, len(ids), problem or ("" if math.isfinite(value) else "not_finite"))
        for value, ids, problem in zip(found, encoded, problems, strict=True)
    ]


if __name__ == "__main__":
    main()
