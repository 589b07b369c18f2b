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
from sn29.records import Loss, ModelFacts, Sample

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
    dtype: str
    """`float32` or `bfloat16`."""
    device: str
    threads: int
    """CPU threads of the child."""
    samples: tuple[Sample, ...]


class TooLate(Unavailable):
    """The child had not ended by its deadline."""


def memory_needed(facts: ModelFacts, max_tokens: int) -> int:
    """Bytes that the child may use: libraries, the weights in float32 three times over (read, cast, kept), logits likewise."""
    return BASE_BYTES + 12 * facts.num_parameters + 12 * max_tokens * facts.vocab_size


async def evaluate(job: Job, *, deadline_s: float, memory_bytes: int) -> tuple[Loss, ...]:
    """The losses of the job's samples, in their order; +inf with a reason where there is none.

    Raises Rejected with the reason that the child found, TooLate, or Unavailable when it crashed or ran out of memory.
    """
    return _read_result(await _run_child(asdict(job), deadline_s, memory_bytes), job.samples)


async def self_test(*, device: str, dtype: str, threads: int, deadline_s: float = 300) -> None:
    """That this machine can evaluate at all: a tiny model of our own in a child. Raises Unavailable when it cannot.

    A driver fault or a full GPU must never look like a fault of a miner's model.
    """
    job = {"self_test": True, "device": device, "dtype": dtype, "threads": threads}
    await _run_child(job, deadline_s, BASE_BYTES)


async def _run_child(job: dict[str, Any], deadline_s: float, memory_bytes: int) -> dict[str, Any]:
    """What the child wrote into its result file."""
    with tempfile.TemporaryDirectory(prefix="sn29-evaluation-") as folder:
        task, result, errors = Path(folder, "job.json"), Path(folder, "result.json"), Path(folder, "errors")
        task.write_text(json.dumps({**job, "result": str(result), "memory_bytes": memory_bytes}))
        with errors.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sn29.evaluation.worker", str(task),
                env=_environment(folder), cwd=folder, start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip
        try:
            await asyncio.wait_for(process.wait(), deadline_s)
        except TimeoutError:
            raise TooLate("evaluation", f"no result within {deadline_s:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the whole group, also when we are cancelled
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if not result.exists():
            last = errors.read_text(errors="replace")[-4000:].strip().splitlines()[-1:] or ["no message"]
            raise Unavailable("evaluation", f"the child ended with {process.returncode}: {last[0][:200]}")
        return dict(json.loads(result.read_text()))


def _environment(home: str) -> dict[str, str]:
    """What the child may know: where programs and libraries are, and nothing of the validator (no token, no wallet, no home)."""
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV")
    alone = {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = {name: os.environ[name] for name in kept if name in os.environ}
    if "PYTHONPATH" in found:  # the child works in another folder
        found["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in found["PYTHONPATH"].split(os.pathsep) if part)
    return found | alone


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
        outcome: dict[str, Any] = {"passed": _self_test(job)} if job.get("self_test") else {"losses": _losses(job)}
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
    hard = memory_bytes if device == "cpu" else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, hard))
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
    if job["device"] != "cpu":  # tokenised within bounds; a CUDA context reserves address space far beyond what it uses
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
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
    return [
        (value if math.isfinite(value) else None, len(ids), problem or ("" if math.isfinite(value) else "not_finite"))
        for value, ids, problem in zip(found, encoded, problems, strict=True)
    ]


def _self_test(job: dict[str, Any]) -> bool:
    """A tiny Llama with random weights gives finite losses on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sn29.evaluation.engine import all_nats

    torch.set_num_threads(job["threads"])
    if job["device"] != "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).to(device=job["device"], dtype=getattr(torch, job["dtype"])).eval()
    if not all(map(math.isfinite, all_nats(model, [[1, 2, 3]], 0))):
        raise RuntimeError("the self-test's loss is not finite")
    return True


if __name__ == "__main__":
    main()
