"""What a child does: it confines itself, checks the files, tokenises, loads, probes and evaluates one stranger's model.

Its parent is the fork server, from which it has every library; who asked for it is `worker.Here`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.confinement import Limits, bounded, confine, lift_memory_limit, seal
from sn29.evaluation.probes import Probes, changed_file, probe, probe_tokens
from sn29.evaluation.profile import ROW_TOKENS, Profile, Tiles
from sn29.evaluation.worker import GO_ON, file_bytes
from sn29.models.checkpoint import is_content, load, tensor_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sn29.evaluation.streamed import Streamed

TOKENIZER_CPU_S, TOKENIZER_CPU_S_A_MB = 20.0, 4.0
"""CPU seconds to load a tokenizer (cl100k: 1.2) and to read each MB of text and back (cl100k: 0.6); dearer ones are ended."""
TOKENIZER_BYTES, TOKENIZER_BYTES_A_MB = 640 << 20, 256 << 20
"""Memory for the same (cl100k: 0.14 GB; 200,000 entries in 17 MB: 0.31 GB)."""


def child(task: str, talk: socket.socket | None) -> None:
    """The whole of a child's work: the job in a file, and who to ask whether to go on."""
    job = json.loads(Path(task).read_text())
    limits = _limits(job)
    confine(limits)
    if limits.gpu:  # its driver needs what a stranger's model must not have: it gets it before anything of the model is read
        _open_device(limits.device)
    seal(limits)
    if job.get("self_test"):
        outcome: dict[str, Any] = {"passed": _self_test(job)}
    else:
        outcome = json.loads(choose(task)) if job.get("choose") else _examine(job, talk)
    result = Path(job["result"])
    part = result.with_suffix(".part")
    part.write_text(json.dumps(outcome))
    part.rename(result)


def _limits(job: dict[str, Any]) -> Limits:
    readable = (job["checkpoint"], job["tokenizer"]) if "checkpoint" in job else ()
    return Limits(
        memory_bytes=job["memory_bytes"],
        cpu_s=int(job.get("deadline_s", 3600) * (job["threads"] + 1)) + 10,  # one thread more hashes the files
        file_bytes=file_bytes(len(job.get("samples", ()))),
        folder=str(Path(job["result"]).parent),
        readable=readable,
        device=job["device"],
    )


def _open_device(device: str) -> None:
    """The driver, and the library of matrix products, are ready."""
    import torch

    lift_memory_limit()
    one = torch.ones(16, 16, device=device)
    float((one @ one).sum())


def _examine(job: dict[str, Any], talk: socket.socket | None) -> dict[str, Any]:
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
    try:
        encoded, problems, largest = _tokenise(job)
    except Rejected as error:
        if tokenizer.parent != folder:
            return _unavailable(Unavailable("evaluation", f"the competition's own tokenizer fails here: {error}"))
        refusals.append(error)
    if refusals and not job["every_reason"]:
        return _refused(refusals)
    with ThreadPoolExecutor(1) as beside:  # hashing goes on while the device computes
        unchanged = beside.submit(changed_file, folder, oids, sorted(heavy))
        try:
            with _model(job, largest, [ids for ids, problem in zip(encoded, problems, strict=True) if not problem]) as model:
                identity = beside.submit(_tensor_digest, job)
                probes = model.probe(" ".join(sample["id"] for sample in job["samples"]))
                told = {
                    "losses": _losses(job, model, encoded, problems, talk),
                    "probes": [probes.places, probes.influence, probes.tolerance],
                    "tensor_digest": identity.result(),
                }
        except Rejected as error:
            refusals.append(error)
        except Unavailable as error:
            told = _unavailable(error)
        changed = unchanged.result()
    return {"changed": changed} if changed else _refused(refusals) if refusals else told


def _refused(refusals: Sequence[Rejected]) -> dict[str, Any]:
    return {"rejected": [[error.reason.name, error.got, error.limit, error.where] for error in refusals]}


def _unavailable(error: Unavailable) -> dict[str, Any]:
    return {"unavailable": [error.what, error.why]}


_Read = tuple[list[list[int]], list[str], int]
"""Ids and problem (or nothing) of each sample, and the largest id that needs a row of the embedding."""

_texts_read: dict[tuple[str, str], tuple[list[int], bool]] = {}
"""(object id of the competition's tokenizer, sample) -> ids, and whether they give the text back. Filled in the fork server."""


def read_texts(path: str) -> str:
    """In the fork server: [tokenizer, its object id, [[sample id, text], ...]] of the file. Only the last call's are kept.

    Raises RuntimeError for another file than the object id's, Rejected for one that is no tokenizer.
    """
    from sn29.models.tokenizer import Tokenizer

    place, oid, samples = json.loads(Path(path).read_text())
    file = Path(place)
    if changed_file(file.parent, {file.name: oid}, [file.name]):
        raise RuntimeError("its file is not the one that was checked")
    tokenizer = Tokenizer.load(file)
    read = {}
    for name, text in samples:
        if (oid, name) not in _texts_read:
            ids = tokenizer.encode(text)
            _texts_read[oid, name] = ids, tokenizer.round_trips(text, ids)
        read[oid, name] = _texts_read[oid, name]
    _texts_read.clear()
    _texts_read.update(read)
    return f"{len(read)} texts"


def _tokenise(job: dict[str, Any]) -> _Read:
    """Raises Rejected."""
    keys = [(job["tokenizer_oid"], sample["id"]) for sample in job["samples"]]
    if job["tokenizer_oid"] and all(key in _texts_read for key in keys):
        found = [_texts_read[key] for key in keys]
        return _judged(job, [ids for ids, _ in found], [whole for _, whole in found], job["start_token"])
    return _read_here(job)


def _read_here(job: dict[str, Any]) -> _Read:
    """In bounded time and memory. A miner's own tokenizer needs a row for every id that it can give."""
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
        whole = [tokenizer.round_trips(text, ids) for text, ids in zip(texts, encoded, strict=True)]
    return _judged(job, encoded, whole, largest)


def _judged(job: dict[str, Any], encoded: list[list[int]], whole: Sequence[bool], largest: int) -> _Read:
    problems = [
        "round_trip" if not is_whole else "too_long" if len(ids) > job["max_tokens"] else ""
        for ids, is_whole in zip(encoded, whole, strict=True)
    ]
    return encoded, problems, max(largest, *(max(ids, default=0) for ids in encoded), 0)


# --- the model, resident or streamed ------------------------------------------------------------------------------------


class _Model(Protocol):
    def probe(self, seed: str) -> Probes:
        """Raises Rejected."""
        ...

    def nats(self, samples: Sequence[Sequence[int]]) -> list[float]:
        """Of each sample."""
        ...


@contextmanager
def _model(job: dict[str, Any], largest: int, samples: Sequence[Sequence[int]]) -> Iterator[_Model]:
    """The model, ready: all of it in memory, or layer by layer where it may not take so much.

    Raises Rejected as `checkpoint.load`, VOCABULARY for an id that it has no row for, and Unavailable for too little memory,
    and where it cannot be computed as the profile says.
    """
    import torch

    from sn29.evaluation.head import fold_for
    from sn29.evaluation.streamed import Streamed, needs_streaming
    from sn29.models.config import parse_config

    torch.set_num_threads(1)  # rows are shared among threads, never an operation
    folder, dtype, profile = Path(job["checkpoint"]), getattr(torch, job["dtype"]), _profile_of(job)
    config = parse_config((folder / "config.json").read_bytes())
    if largest >= config.number("vocab_size"):
        raise Rejected(Reason.VOCABULARY, f"{config.number('vocab_size')} rows", f"a row for the id {largest}")
    if why := fold_for(profile.tiles, dtype, torch.device(job["device"]), 1)[1]:  # other bits would be kept as the profile's
        raise Unavailable("evaluation", f"the compiled output layer is not there: {why}")
    allowed, longest = job["model_bytes"], max(map(len, samples), default=1)
    if allowed is None or not needs_streaming(config, dtype, profile, longest, allowed, job["threads"]):
        yield _Resident(load(folder, dtype=dtype, device=job["device"]), job, profile)
        return
    more = {"dtype": dtype, "device": job["device"], "threads": job["threads"]}
    with Streamed(folder, profile=profile, memory_bytes=allowed, **more) as streamed:
        yield _InStreams(streamed, job, config.number("vocab_size"))


class _Resident:
    def __init__(self, model: PreTrainedModel, job: dict[str, Any], profile: Profile) -> None:
        """Raises Unavailable for a model that cannot be packed: families that are allowed can, so the fault is ours."""
        from sn29.evaluation.packed import refusal

        if why := refusal(model):
            raise Unavailable("evaluation", f"{type(model).__name__}: {why}")
        self._model, self._job, self._profile, self._compared = model, job, profile, False

    def probe(self, seed: str) -> Probes:
        return probe(self._model, seed)

    def nats(self, samples: Sequence[Sequence[int]]) -> list[float]:
        from sn29.evaluation.packed import all_nats_packed

        start, threads = self._job["start_token"], self._job["threads"]
        found = all_nats_packed(self._model, samples, start, profile=self._profile, threads=threads)
        if not self._compared and any(samples):
            shortest = min((n for n, ids in enumerate(samples) if ids), key=lambda n: len(samples[n]))
            self._agree_with_the_twin(samples[shortest], found[shortest])
        return found

    def _agree_with_the_twin(self, ids: Sequence[int], packed: float) -> None:
        """The fast engine and the plain one give one text the same loss, but for rounding; else the fault is ours.

        Of short texts that a model is sure of little is left to compare: a token counts as 10 nats at least.
        """
        from sn29.evaluation.engine import sample_nats

        plain = sample_nats(self._model, ids, self._job["start_token"])
        limit = 1e-5 if self._job["dtype"] == "float32" else 0.02
        if math.isfinite(packed) and not abs(packed - plain) <= limit * max(abs(plain), 10.0 * len(ids)):
            raise Unavailable("evaluation", f"the packed engine gives {packed} nats where the plain one gives {plain}")
        self._compared = True


class _InStreams:
    """Each call reads all weights once."""

    def __init__(self, streamed: Streamed, job: dict[str, Any], rows: int) -> None:
        self._streamed, self._job, self._rows = streamed, job, rows

    def probe(self, seed: str) -> Probes:
        exact = self._job["dtype"] == "float32" and self._job["device"] == "cpu"
        start = self._job["start_token"]
        return probe_tokens(lambda texts: self._streamed.token_nats(texts, start), self._rows, seed, exact=exact)

    def nats(self, samples: Sequence[Sequence[int]]) -> list[float]:
        return self._streamed.nats(samples, self._job["start_token"])


def _tensor_digest(job: dict[str, Any]) -> str:
    return tensor_digest(Path(job["checkpoint"]), threads=1 if job["device"] == "cpu" else job["threads"])


def _losses(
    job: dict[str, Any], model: _Model, encoded: list[list[int]], problems: list[str], talk: socket.socket | None
) -> list[Any]:
    """(nats or None for +inf, tokens, reason) of each sample; of the leading ones alone when the parent says so."""
    found: list[Any] = []
    for upto in [*(job["portions"] if talk else ()), len(encoded)]:
        part = [*zip(encoded, problems, strict=True)][len(found) : upto]
        nats = iter(model.nats([ids for ids, problem in part if not problem]))
        told = [_told(math.inf if problem else next(nats), len(ids), problem) for ids, problem in part]
        found += told
        if talk is not None and upto < len(encoded):
            talk.sendall(json.dumps(told).encode() + b"\n")
            if talk.recv(1) != GO_ON:
                break
    return found


def _told(nats: float, num_tokens: int, problem: str) -> tuple[float | None, int, str]:
    finite = math.isfinite(nats)
    return nats if finite else None, num_tokens, problem or ("" if finite else "not_finite")


def _profile_of(job: dict[str, Any]) -> Profile:
    given = job["profile"]
    return Profile(given["row_tokens"], Tiles(**given["tiles"]), given["attention"])


def _self_test(job: dict[str, Any]) -> list[Any]:
    """What the probes find of a tiny Llama with random weights, which has finite losses on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sn29.evaluation.engine import all_nats

    torch.set_num_threads(1)
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


# --- the way of this machine --------------------------------------------------------------------------------------------


def choose(asked: str) -> str:
    """`Chosen` as JSON, of this machine, for a question as JSON (or the path of a file with it).

    On a CPU it leaves the compiled fold behind. It is compiled in a process of its own, which the compiler's threads end
    with, and read from the cache here.
    """
    import torch

    job = json.loads(asked if asked.startswith("{") else Path(asked).read_text())
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    if device.type != "cpu":
        return json.dumps(_choose_on_gpu(job, device))
    from sn29.evaluation.head import fold_for, tiles_for

    torch.set_num_threads(1)
    tiles, why = tiles_for(device, job["vocab_size"]), ""
    if tiles.compiled:
        if (pid := os.fork()) == 0:
            try:
                fold_for(tiles, dtype, device, 1)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        why = fold_for(tiles, dtype, device, 1)[1]
        if why:
            tiles = tiles_for(device, job["vocab_size"], compiled=False)
    profile = Profile(ROW_TOKENS["cpu"], tiles, "documents")
    return json.dumps({"profile": asdict(profile), "device": processor(), "libraries": _libraries(), "note": why})


def _choose_on_gpu(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Measured with a small model of the usual head size. The fold is eager: a confined child can start no compiler."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sn29.evaluation.head import tiles_for
    from sn29.evaluation.packed import profile_for

    config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8)
    model = LlamaForCausalLM(config).to(device=device, dtype=getattr(torch, job["dtype"])).eval()
    profile = profile_for(model, compiled=False)
    tiles = tiles_for(device, job["vocab_size"], compiled=False)
    name = torch.cuda.get_device_name(device)
    return {"profile": asdict(replace(profile, tiles=tiles)), "device": name, "libraries": _libraries()}


def processor() -> str:
    """This machine's, by the name that it gives itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _libraries() -> str:
    return f"torch {version('torch')}, transformers {version('transformers')}"
