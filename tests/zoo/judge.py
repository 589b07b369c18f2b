"""A case's way through the validator: metadata from the Hub, the download, the child; what came out and what it cost.

The same functions as a round calls, on a real Hub, store and disk. Two kinds of child, both forked from a process that has
the libraries, both at the same entry point (`child.child`): the validator's own (`worker.Here`), or the lab's (lab.py), which
are listened to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sn29 import examination, measurement
from sn29.errors import Rejected, Unavailable
from sn29.evaluation import worker
from sn29.evaluation.forkserver import environment
from sn29.evaluation.head import tiles_for
from sn29.evaluation.profile import ROW_TOKENS, Profile
from sn29.examination import Entrant, FixedText, Machine, Ports, Rules
from sn29.hub import Hub
from sn29.models import checkpoint
from sn29.models.fetch import fetch
from sn29.records import Commitment, Head, Loss, Sample, Window
from sn29.rules.competition import HallOfFame
from sn29.rules.near_copies import is_near
from sn29.rules.schedule import in_force, parse_file
from sn29.rules.selection import Claim, Inspected, first_claims
from sn29.store import Store

from .all_cases import TEXTS
from .case import CHILD, DOWNLOAD, METADATA, Accepted, Case, Copy, Expected, Pays, Refused, Twin
from .honest import byte_level
from .serving import LyingHub, place

RULES = """\
reward_share: 0.5
families: [{families}]
tokenizer: {tokenizer}
limits: {{parameters: 60000, bytes: 50e6, max_tokens: 500, max_chars: 500, round_trip_failures: 1}}
dataset: {{folder: text, files: "*.parquet", column: text}}
samples: {{count: 20, window_blocks: 1000}}
pool: {{keep: 4, pending: 4}}
"""
FIXED = "{hub: zoo/tokenizer, fingerprint: null, start_token: 0}"
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What the child found."""

    losses: tuple[Loss, ...]
    tensor_digest: str

    @property
    def nats(self) -> tuple[float, ...]:
        return tuple(loss.nats for loss in self.losses)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        return tuple(loss.num_tokens for loss in self.losses)


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    stage: str
    """The last one it came to."""
    code: str
    """`Reason.code`; `unavailable` or `crashed` when there was no answer, empty when it was scored."""
    said: str
    """The refusal in words."""
    entrant: Entrant | None = None
    scored: Scored | None = None
    num_bytes: int = 0
    """That the Hub sent."""
    requests: int = 0
    parent_s: float = 0.0
    """Of this process: metadata and download."""
    parent_bytes: int = 0
    """By which its peak memory rose."""
    child_s: float = 0.0
    child_bytes: int = 0
    """Peak memory of the child."""
    events: tuple[str, ...] = ()
    """What the child did that a reader of models does not do."""


class Zoo:
    """The Hub with all cases on it, and a validator's store, disk and children."""

    def __init__(self, folder: Path, cases: list[Case]) -> None:
        self.folder = folder
        self.hub = LyingHub(folder / "hub")
        self.models = {case.name: place(self.hub, folder / "hub", case) for case in cases}
        self.cases = {case.name: case for case in cases}
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(json.dumps(byte_level()))
        machine = Machine(folder / "models", folder / "records", "cpu", "float32", 1, DEADLINE_S, 20.0)
        store = Store(folder / "store.db")
        reader = Hub(self.hub.endpoint, timeout_s=5.0, attempts=1)
        self._ports = Ports(None, reader, store, None, lambda fixed: FixedText(tokenizer, 258), machine, None)  # type: ignore[arg-type]
        self._rules = Rules(
            {
                "c00": parse_file("c00", RULES.format(families="LlamaForCausalLM", tokenizer=FIXED)),
                "c01": parse_file("c01", RULES.format(families="PhiForCausalLM, Phi3ForCausalLM", tokenizer="{free: true}")),
            },
            HallOfFame(max_fraction=0.0, decay_per_epoch=0.995, blocks_per_epoch=361, entries=()),
            {},
        )
        self._claims: dict[str, Mapping[str, Claim]] = {}
        self._samples = tuple(Sample(f"{i:032x}", text) for i, text in enumerate(TEXTS))

    def __enter__(self) -> Zoo:
        self.hub.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hub.stop()
        self._ports.store.close()

    def judge(self, case: Case, child: Child) -> Verdict:
        """The case's verdict. `child` evaluates."""
        self.hub.served.clear()
        began, memory = time.monotonic(), _Memory()
        entrant = self._inspect(case)
        cost: dict[str, Any] = {}

        def so_far() -> dict[str, Any]:
            sent = [line for line in self.hub.served if line.path]
            return {"num_bytes": sum(line.num_bytes for line in sent), "requests": len(sent),
                    "parent_s": time.monotonic() - began, "parent_bytes": memory.risen()}  # fmt: skip

        if isinstance(entrant, Exception):
            return Verdict(METADATA, "bug", f"{type(entrant).__name__}: {entrant}", **so_far())
        if isinstance(entrant, Inspected):
            return Verdict(METADATA, "copy", f"files of an earlier commitment: {entrant.content_id}", **so_far())
        if not isinstance(entrant, Entrant):
            return Verdict(METADATA, entrant.reason, entrant.detail, **so_far())
        try:
            folder = self._fetch(entrant)
        except (Rejected, Unavailable) as error:
            return Verdict(DOWNLOAD, _code(error), str(error), entrant, **so_far())
        cost = so_far()
        job, needed = self._job(entrant, folder), worker.memory_needed(entrant.facts, 500)
        found = child(job, DEADLINE_S, needed)
        spent = {"child_s": found.wall_s, "child_bytes": found.peak_bytes, "events": self._unusual(found, folder)}
        if isinstance(found.result, Scored):
            failure = measurement.unfit(found.result.losses, 1)
            if failure is None:
                return Verdict(CHILD, "", "", entrant, found.result, **cost, **spent)
            return Verdict(CHILD, failure.reason.code, str(failure), entrant, found.result, **cost, **spent)
        return Verdict(CHILD, _code(found.result), str(found.result), entrant, None, **cost, **spent)

    def commitment(self, case: Case) -> Commitment:
        model, hotkey = self.models[case.name], f"5{case.name}"
        kind, _, value = case.digest.partition(":")
        if kind == "text":
            digest = b64encode(hashlib.sha256(value.encode()).digest()).decode()
        else:
            digest = checkpoint.digest(self._content_id(case), value if kind == "hotkey" else hotkey)
        return Commitment(hotkey, case.block, model, digest, case.competition)

    def claimed(self, case: Case) -> Inspected:
        """What the commitment claims, by the Hub's listing."""
        files = Hub(self.hub.endpoint, timeout_s=5.0, attempts=1).listing(self.models[case.name]).files
        return Inspected(self.commitment(case), checkpoint.content_id(files), (checkpoint.weights_id(files),))

    def _content_id(self, case: Case) -> str:
        """As the miner computes it, of what the Hub lists; any, where there is nothing to list."""
        try:
            return checkpoint.content_id(Hub(self.hub.endpoint, timeout_s=5.0, attempts=1).listing(self.models[case.name]).files)
        except (Rejected, Unavailable, UnicodeError):
            return "0" * 64

    def _inspect(self, case: Case) -> Any:
        commitment = self.commitment(case)
        self.hub.served.clear()  # what the miner asked is not the validator's cost
        window = Window(case.competition, 1, Head(1000, "0x" + "0" * 64))
        competition = in_force(self._rules.files[case.competition], 1000)
        largest = 258 if case.competition == "c00" else None
        of = next((expected.of for expected in case.expected if isinstance(expected, Copy)), "")
        look = examination.inspect(
            self._ports, self._rules, competition, window, commitment, largest, earlier=self._claims.get(of, {})
        )
        try:
            found = asyncio.run(look)
        except Exception as bug:  # noqa: BLE001  it would end a round: the case that does it is to be named
            return bug
        if isinstance(found, Entrant):
            self._claims[case.name] = first_claims([_inspected(found)], {}).claims
        return found

    def _fetch(self, entrant: Entrant) -> Path:
        folder = self.folder / "models" / hashlib.sha256(str(entrant.commitment.model).encode()).hexdigest()
        return fetch(self._ports.hub, entrant.listing, folder, only=checkpoint.is_content, deadline_s=20.0, silence_s=5.0)

    def _job(self, entrant: Entrant, folder: Path) -> worker.Job:
        fixed = entrant.commitment.competition == "c00"
        return worker.Job(
            checkpoint=str(folder),
            tokenizer=str(self.folder / "tokenizer.json" if fixed else folder / "tokenizer.json"),
            start_token=measurement.start_token_of(entrant.admitting, entrant.facts),
            max_tokens=500,
            dtype="float32",
            device="cpu",
            threads=1,
            profile=_profile(entrant.facts.vocab_size),
            samples=self._samples,
            files=entrant.listing.files,
        )

    def _unusual(self, found: Found, folder: Path) -> tuple[str, ...]:
        """What the child did, less what it may: write its result, load what belongs to Python and to the libraries."""
        allowed = ("write " + found.folder, "write /dev/null", "write /proc/self/", "ctypes.dlopen")
        return tuple(event for event in found.events if not event.startswith(allowed))


def _profile(vocab_size: int) -> Profile:
    """As a validator chooses it on a CPU for a vocabulary that is too small for the compiler."""
    return Profile(ROW_TOKENS["cpu"], tiles_for(torch.device("cpu"), vocab_size, compiled=False), "documents")


def _code(error: Rejected | Unavailable) -> str:
    return error.reason.code if isinstance(error, Rejected) else "crashed" if error.what == "evaluation" else "unavailable"


# --- is it right? -------------------------------------------------------------------------------------------------------


def wrong(case: Case, verdict: Verdict, twins: Callable[[str], Verdict]) -> str:
    """Why the verdict is none of those that the case must get; empty when it is one of them."""
    misses = [_miss(expected, case, verdict, twins) for expected in case.expected]
    if verdict.events:
        return f"{case.name} ({case.row}): the child did {verdict.events[:3]}"
    if not all(misses):
        return ""
    return f"{case.name} ({case.row}, {case.why}): {'; '.join(misses)}"


def _miss(expected: Expected, case: Case, verdict: Verdict, twins: Callable[[str], Verdict]) -> str:
    got = f"{verdict.code or 'scored'} at {verdict.stage} ({verdict.said[:160]})"
    if isinstance(expected, Refused):
        return "" if verdict.code in expected.codes and verdict.stage in expected.stages else f"not {expected} but {got}"
    if isinstance(expected, Copy):
        how = recognised(verdict, twins(expected.of))
        return "" if how in expected.how else f"not {expected} but {how or got}"
    if verdict.code or verdict.scored is None:
        return f"not {expected} but {got}"
    nats = verdict.scored.nats
    if isinstance(expected, Accepted):
        return "" if all(map(math.isfinite, nats)) else f"losses {nats}"
    if isinstance(expected, Twin):
        twin = twins(expected.of).scored
        return "" if twin is not None and twin.nats == nats else f"other losses than {expected.of}"
    assert isinstance(expected, Pays)
    assert verdict.entrant is not None
    price = math.log(verdict.entrant.facts.vocab_size)
    paid = all(
        math.isclose(loss, tokens * price, rel_tol=1e-5) and tokens > 0
        for loss, tokens in zip(nats, verdict.scored.num_tokens, strict=True)
    )
    return "" if paid else f"not ln({verdict.entrant.facts.vocab_size}) for every token: {nats} for {verdict.scored.num_tokens}"


def recognised(later: Verdict, earlier: Verdict) -> str:
    """By what the later model is known to be the earlier one; empty when it is not."""
    if later.code == "copy":
        return "claims"
    if later.entrant is None or earlier.entrant is None:
        return ""
    claims = first_claims([_inspected(earlier.entrant), _inspected(later.entrant)], {})
    if [refusal.commitment for refusal in claims.refused] == [later.entrant.commitment]:
        return "claims"
    if later.scored is None or earlier.scored is None:
        return ""
    if later.scored.tensor_digest and later.scored.tensor_digest == earlier.scored.tensor_digest:
        return "tensors"
    return "losses" if is_near(np.array(later.scored.nats), np.array(earlier.scored.nats), 1e-3) else ""


def _inspected(entrant: Entrant) -> Inspected:
    return Inspected(entrant.commitment, entrant.facts.content_id, (entrant.facts.weights_id,))


# --- children -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a child left."""

    result: Scored | Rejected | Unavailable
    wall_s: float = 0.0
    peak_bytes: int = 0
    events: tuple[str, ...] = ()
    folder: str = ""


Child = Callable[[worker.Job, float, int], Found]


@contextmanager
def own_children() -> Iterator[Child]:
    """The validator's own, forked by its `Here` as in a round."""
    with tempfile.TemporaryDirectory(prefix="sn29-zoo-") as folder, asyncio.Runner() as runner:
        here = worker.Here(Path(folder))

        def child(job: worker.Job, deadline_s: float, memory_bytes: int) -> Found:
            began, stop, peaks = time.monotonic(), threading.Event(), [0]
            watcher = threading.Thread(target=_watch_forked, args=(stop, peaks))
            watcher.start()
            try:
                evaluated = runner.run(here.evaluate(job, deadline_s=deadline_s, memory_bytes=memory_bytes))
                result: Scored | Rejected | Unavailable = _scored(evaluated)
            except (Rejected, Unavailable) as error:
                result = error
            finally:
                stop.set()
                watcher.join()
            return Found(result, time.monotonic() - began, peaks[0])

        try:
            runner.run(here.self_test(device="cpu", dtype="float32", threads=1))  # the fork server is there
            yield child
        finally:
            runner.run(here.close())


def _watch_forked(stop: threading.Event, peaks: list[int]) -> None:
    """Peak memory of what this process's children have forked, some 50 times a second."""
    while not stop.wait(0.02):
        for server in _children("self"):
            peaks[0] = max(peaks[0], *(_status("VmHWM", pid) for pid in _children(server)), 0)


def _children(pid: str) -> list[str]:
    try:
        return [child for listed in Path(f"/proc/{pid}/task").glob("*/children") for child in listed.read_text().split()]
    except OSError:  # ended meanwhile
        return []


def _scored(evaluated: worker.Evaluated) -> Scored:
    return Scored(evaluated.losses, evaluated.tensor_digest)


@contextmanager
def lab() -> Iterator[Child]:
    """Children forked from one process: see lab.py."""
    script = Path(__file__).with_name("lab.py")
    source = str(Path(worker.__file__).parents[2])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ours
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def child(job: worker.Job, deadline_s: float, memory_bytes: int) -> Found:
        with tempfile.TemporaryDirectory(prefix="sn29-zoo-") as folder:
            task = worker.write_job(job, Path(folder), memory_bytes, deadline_s)
            asked = {"job": str(task), "folder": folder, "deadline_s": deadline_s, "environment": environment(folder)}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            ended = json.loads(process.stdout.readline())
            result = _read(job, Path(folder), ended)
        return Found(result, ended["wall_s"], ended["rss_kb"] * 1024, tuple(ended["events"]), folder)

    try:
        yield child
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def _read(job: worker.Job, folder: Path, ended: dict[str, Any]) -> Scored | Rejected | Unavailable:
    """What the validator's parent makes of a child's end."""
    try:
        if ended["late"]:
            raise worker.TooLate(DEADLINE_S)
        if ended["status"] != 0 or not (folder / "result.json").exists():
            raise worker.ended(ended["status"], (folder / "errors").read_text(errors="replace")[-4000:].strip())
        return _scored(worker.read_result(folder, job.samples))
    except (Rejected, Unavailable) as error:
        return error


class _Memory:
    """Peak resident memory of this process from now on."""

    def __init__(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._before = _status("VmRSS")

    def risen(self) -> int:
        return max(0, _status("VmHWM") - self._before)


def _status(name: str, pid: str = "self") -> int:
    """Bytes of a line of /proc/PID/status; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
