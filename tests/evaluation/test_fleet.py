from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.evaluation.fleet import Fleet, _Place, free_place, left, memory_need
from sn29.evaluation.fleet_worker import Facts, Failure, parcels, versions
from sn29.evaluation.packed import all_nats_packed
from sn29.evaluation.worker import BASE_BYTES, ChildEnded, Ending, FileChanged, Here, Job, SeveralReasons, TooLate
from sn29.models.checkpoint import content_id, load, local_listing
from sn29.models.tokenizer import Tokenizer
from sn29.records import Sample

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'sn29[fleet]'")
"""Looked for, not imported: what Ray starts takes the environment that it was first imported in."""

# --- evaluators of the workers ----------------------------------------------------------------------------------------


class Noting(Here):
    """As `Here`, with a line in the log for each job's begin and end, and what the worker's environment holds."""

    def __init__(self, folder: Path, log: Path) -> None:
        super().__init__(folder)
        self._log = log
        note(log, "born", environment=[f"{k}={v}" for k, v in os.environ.items()], parent=os.getppid())

    async def evaluate(self, job, **more):
        note(self._log, "begin", samples=job.samples[0].id, checkpoint=job.checkpoint, tokenizer=job.tokenizer)
        try:
            found = await super().evaluate(job, **more)
        except asyncio.CancelledError:
            note(self._log, "cancelled", samples=job.samples[0].id)
            raise
        note(self._log, "end", samples=job.samples[0].id)
        return found


def note(log: Path, what: str, **more) -> None:
    """One write, so that lines of several processes do not mix."""
    line = json.dumps({"what": what, "pid": os.getpid(), **more}) + "\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def noted(log: Path, what: str) -> list[dict]:
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return [line for line in lines if line["what"] == what]


def noting(log: Path):
    """By value: a worker cannot import the tests."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return lambda folder: Noting(folder, log)


# --- jobs -------------------------------------------------------------------------------------------------------------


def job_of(folder: Path, tokenizer: Path, number: int, texts, profile, **changes) -> Job:
    samples = tuple(Sample(f"{number:016x}{i:016x}", text) for i, text in enumerate(texts))
    plain = Job(str(folder), str(tokenizer), 1, 400, "float32", "cpu", 1, profile, samples)
    return replace(plain, **changes)


def run(fleet, job: Job, deadline_s: float = 120, memory_bytes: int = BASE_BYTES, decide=None):
    return fleet.evaluate(job, deadline_s=deadline_s, memory_bytes=memory_bytes, decide=decide)


async def until(condition, within_s: float = 60):
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends, "it does not come"
        await asyncio.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> set[int]:
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child} | descendants(child)
    return found


TEXTS = [f"the theatre {i} über 日本 {'x ' * (i % 40)}" for i in range(60)]


@needs_ray
def test_a_killed_workers_job_is_done_by_another_and_no_other_job_twice(make_checkpoint, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    log, events, killed = tmp_path / "log", [], []
    before = descendants(os.getpid())

    def kill_the_first(losses) -> bool:
        """In the middle of a job: its child waits for what we say."""
        if not killed:
            (mine,) = [line for line in noted(log, "begin") if line["samples"] == losses[0].sample]
            os.kill(mine["pid"], signal.SIGKILL)
            killed.append(mine["samples"])
        return True

    async def story():
        async with await Fleet.open(
            "local:2", device="cpu", threads=1, cache=tmp_path / "cache", make=noting(log), say=lambda *said: events.append(said)
        ) as fleet:
            assert fleet.slots == 2
            assert os.environ["HF_TOKEN"] == "hf_secret"  # ours is as it was
            chosen = await fleet.choose(300, device="cpu", dtype="float32")
            jobs = [
                job_of(make_checkpoint(seed=n), byte_tokenizer, n, TEXTS[n:], chosen.profile, portions=(16,)) for n in range(3)
            ]
            found = await asyncio.gather(*(run(fleet, job, decide=kill_the_first) for job in jobs))
            ours = {pid: environment_of(pid) for pid in descendants(os.getpid()) - before}
        async with Here(tmp_path / "cache" / "evaluations") as here:
            assert await here.choose(300, device="cpu", dtype="float32") == chosen
            return found, [await run(here, job) for job in jobs], ours

    found, alone, ours = asyncio.run(story())
    assert found == alone  # to the bit, with digests and probes
    begun, ended = ([line["samples"] for line in noted(log, what)] for what in ("begin", "end"))
    assert sorted(begun) == sorted([each.losses[0].sample for each in found] + killed)  # only the lost one twice
    assert sorted(ended) == sorted(each.losses[0].sample for each in found)
    assert [event for event, _ in events] == ["evaluated_again"]
    assert len({line["pid"] for line in noted(log, "begin")}) >= 2
    assert len(ours) >= 6  # Ray's own, workers, fork servers
    assert "hf_secret" not in json.dumps(list(ours.values())) + json.dumps(noted(log, "born"))
    assert [pid for pid in ours if lives(pid)] == []


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


@needs_ray
def test_a_worker_without_our_files_gets_them_and_errors_come_back_as_they_are(make_checkpoint, byte_tokenizer, tmp_path):
    log, cache = tmp_path / "log", tmp_path / "cache"
    folder = shutil.copytree(make_checkpoint(), tmp_path / "model")
    own = shutil.copytree(folder, tmp_path / "own")
    shutil.copy(byte_tokenizer, own / "tokenizer.json")

    async def story():
        where = {"device": "cpu", "threads": 1, "cache": cache, "shared_files": False}
        async with await Fleet.open("local:1", **where, make=noting(log)) as fleet:
            chosen = await fleet.choose(300, device="cpu", dtype="float32")
            job = job_of(folder, byte_tokenizer, 1, TEXTS, chosen.profile, files=local_listing(folder).files)
            await brings_files(fleet, job, own)
            await asks_us(fleet, replace(job, portions=(16, 32)))
            await tells_errors(fleet, job)
            await rests(fleet, job)
            await is_replaced(fleet)

    async def brings_files(fleet, job, own):
        alone = await run(fleet, job)
        assert [loss.nats for loss in alone.losses] == engines_nats(job)
        copy = cache / "models" / content_id(job.files)
        (begun,) = noted(log, "begin")
        assert begun["checkpoint"] == str(copy)
        assert Path(begun["tokenizer"]).parent.name.startswith("tokenizer-")
        mine = replace(job, checkpoint=str(own), tokenizer=str(own / "tokenizer.json"), files=())
        assert (await run(fleet, mine)).losses == alone.losses
        assert noted(log, "begin")[1]["tokenizer"] == noted(log, "begin")[1]["checkpoint"] + "/tokenizer.json"
        before = (copy / "model.safetensors").stat().st_ino
        await run(fleet, job)
        assert (copy / "model.safetensors").stat().st_ino == before  # not brought again
        spoil(copy / "model.safetensors")
        assert await run(fleet, job) == alone  # the child sees it, and the copy is made anew
        assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    async def asks_us(fleet, job):
        told = []
        found = await run(fleet, job, decide=lambda losses: told.append(losses) or len(losses) < 32)
        assert [len(losses) for losses in told] == [16, 32]
        assert found.losses == told[-1]

        def fails(losses):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await run(fleet, job, decide=fails)
        begun = len(noted(log, "begin"))
        task = asyncio.create_task(run(fleet, job))
        await until(lambda: len(noted(log, "begin")) > begun)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(noted(log, "cancelled")) == 2  # the child was gone before we went on
        assert len(await run(fleet, job)) == len(job.samples)

    async def tells_errors(fleet, job):
        with pytest.raises(Rejected) as refused:
            await run(fleet, replace(job, tokenizer=job.checkpoint + "/config.json", files=()))
        assert refused.value.reason is Reason.TOKENIZER
        with pytest.raises(TooLate) as late:
            await run(fleet, job, deadline_s=0.01)
        assert (late.value.ending, late.value.what) == (Ending.DEADLINE, "evaluation")
        with pytest.raises(ChildEnded) as end:
            await run(fleet, job, memory_bytes=50 << 20)
        assert end.value.ending in (Ending.MEMORY, Ending.MACHINE)
        with pytest.raises(Unavailable, match="needs 1,125,899,906,842,624 bytes of memory, the largest worker has"):
            await run(fleet, job, memory_bytes=1 << 50)
        shutil.rmtree(cache / "models")
        spoil(folder / "model.safetensors")
        with pytest.raises(FileChanged) as changed:  # ours, and nobody's fault but our disk's
            await run(fleet, job)
        assert changed.value.path == "model.safetensors"

    async def rests(fleet, job):
        with pytest.raises(Unavailable, match="no worker passes the self-test"):
            await fleet.self_test(device="cpu", dtype="no_such_type", threads=1)
        with pytest.raises(Unavailable, match="no worker is left that can be used"):
            await run(fleet, job)
        assert (await fleet.self_test(device="cpu", dtype="float32", threads=1)).influence == 0
        assert len(fleet.workers) == 1

    async def is_replaced(fleet):
        """The only one, while it has nothing to do: the next job finds out, and waits for another."""
        os.kill(fleet.workers[0].pid, signal.SIGKILL)
        chosen = await fleet.choose(300, device="cpu", dtype="float32")
        found = await run(fleet, job_of(own, byte_tokenizer, 2, TEXTS[:3], chosen.profile))
        assert len(found) == 3
        assert len({line["pid"] for line in noted(log, "born")}) == 2

    asyncio.run(story())


def engines_nats(job: Job) -> list[float]:
    """In this process."""
    model, tokenizer = load(Path(job.checkpoint), dtype=torch.float32), Tokenizer.load(Path(job.tokenizer))
    return all_nats_packed(
        model, [tokenizer.encode(s.text) for s in job.samples], job.start_token, profile=job.profile, threads=1
    )


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# --- without Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        Rejected(Reason.VOCABULARY, "200 rows", "a row for the id 300", "config.json"),
        Unavailable("disk", "full", 5.0, certain=True),
        ChildEnded(Ending.FAULT, "SIGSEGV"),
        TooLate(30),
        FileChanged("model.safetensors"),
        SeveralReasons([Rejected(Reason.CORRUPT, 1, 2), Rejected(Reason.TOKENIZER, "a", "b", "tokenizer.json")]),
    ],
)
def test_an_error_is_the_same_after_its_way(error: Sn29Error):
    found = pickle.loads(pickle.dumps(Failure.of(error))).error()
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert repr(found.__dict__) == repr(error.__dict__)


def place(node: str, memory: int, takes: int | None = None, ill: str = "", pid: int = 1) -> _Place:
    return _Place(None, Facts(node, node, pid, 0, memory, "", {}), takes, ill)


def test_a_model_goes_to_the_smallest_free_worker_that_it_fits_into():
    small, large, busy, ill = place("a", 24), place("b", 80), place("c", 16, takes=10), place("d", 16, ill="it rests")
    places = [large, small, busy, ill]
    assert free_place([p for p in places if not p.ill], 10, "cuda") is small
    assert free_place(places, 30, "cuda") is large
    assert free_place(places, 90, "cuda") is None
    assert free_place([busy, ill], 1, "cuda") is None


def test_workers_without_gpus_share_the_memory_of_their_machine():
    one, two, other = place("a", 24, takes=20, pid=1), place("a", 24, pid=2), place("b", 24, takes=None, pid=3)
    assert [left(p, [one, two, other], "cpu") for p in (two, other)] == [4, 24]
    assert free_place([one, two, other], 3, "cpu") is other  # the emptier one
    assert free_place([one, two], 5, "cpu") is None
    assert free_place([one, two], 5, "cuda") is two


def test_what_a_model_needs_on_a_gpu_is_its_weights_in_the_format_of_the_job(make_checkpoint, byte_tokenizer, tmp_path):
    folder = make_checkpoint()
    job = job_of(folder, byte_tokenizer, 1, ["a"], None)
    assert memory_need(job, 123) == 123
    sizes = [memory_need(replace(job, device="cuda", dtype=dtype), 123) for dtype in ("float32", "bfloat16")]
    stored = (folder / "model.safetensors").stat().st_size
    assert 0.9 * stored < 2 * (sizes[0] - sizes[1]) < stored  # the file has a header besides
    assert memory_need(replace(job, device="cuda", model_bytes=1000), 123) == 1000  # streamed
    assert memory_need(replace(job, device="cuda", checkpoint=str(tmp_path)), 123) == 0


def test_parcels_are_named_by_their_content(make_checkpoint, byte_tokenizer, tmp_path):
    folder = shutil.copytree(make_checkpoint(), tmp_path / "model")
    model, tokenizer = parcels(job_of(folder, byte_tokenizer, 1, ["a"], None))
    assert model.name == content_id(local_listing(folder).files)
    assert [file.path for file in tokenizer.files] == ["tokenizer.json"]
    shutil.copy(byte_tokenizer, folder)
    (whole,) = parcels(job_of(folder, folder / "tokenizer.json", 1, ["a"], None))
    assert whole.name != model.name
    assert "tokenizer.json" in [file.path for file in whole.files]


@pytest.mark.parametrize("where", ["local:0", "local:", "local", "2", "", "ray://host:10001", "host", "local:x"])
def test_a_place_that_is_none_is_refused(where, tmp_path):
    with pytest.raises(Rejected) as refused:
        asyncio.run(Fleet.open(where, device="cpu", threads=1, cache=tmp_path))
    assert (refused.value.reason, refused.value.where) == (Reason.SETTING, "--fleet")


def test_versions_name_what_decides_a_number():
    assert {"torch", "transformers", "tokenizers", "sn29"} <= versions().keys()
