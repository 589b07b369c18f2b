from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.engine import sample_nats
from sn29.evaluation.worker import (
    BASE_BYTES,
    ChildEnded,
    Ending,
    FileChanged,
    Job,
    TooLate,
    _environment,
    ended,
    evaluate,
    read_result,
    self_test,
)
from sn29.models.checkpoint import load, local_listing, tensor_digest
from sn29.models.tokenizer import Tokenizer
from sn29.records import RepoFile, Sample

TEXTS = ("the theatre", "a", "über 日本 \r\n", "x" * 60)


def job(folder: Path, tokenizer: Path, **changes) -> Job:
    samples = tuple(Sample(f"{i:032x}", text) for i, text in enumerate(TEXTS))
    plain = Job(str(folder), str(tokenizer), 1, 50, "float32", "cpu", 1, samples)
    return replace(plain, **changes)


def run(task: Job, deadline_s: float = 120, memory_bytes: int = BASE_BYTES):
    return asyncio.run(evaluate(task, deadline_s=deadline_s, memory_bytes=memory_bytes))


def test_the_child_gives_the_engines_losses_and_a_reason_where_there_is_none(make_checkpoint, byte_tokenizer):
    folder = make_checkpoint()
    files = (*local_listing(folder).files, RepoFile("README.md", 5, "git:" + "0" * 40))  # a README is listed and not fetched
    found = run(job(folder, byte_tokenizer, files=files))
    torch.set_num_threads(1)  # as the job: float32 sums depend on how they are split
    tokenizer, model = Tokenizer.load(byte_tokenizer), load(folder, dtype=torch.float32)
    assert [loss.sample for loss in found.losses] == [f"{i:032x}" for i in range(4)]
    for text, loss in zip(TEXTS[:3], found.losses, strict=False):
        assert loss.nats == sample_nats(model, tokenizer.encode(text), 1)
        assert (loss.num_tokens, loss.reason) == (len(tokenizer.encode(text)), "")
    long = found.losses[3]
    assert (long.nats, long.num_tokens, long.reason) == (math.inf, 60, "too_long")
    assert found.tensor_digest == tensor_digest(folder)
    assert (found.probes.influence, found.probes.tolerance, len(found.probes.places)) == (0, 0, 3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_changed_on_this_disk_is_no_fault_of_the_model(make_checkpoint, byte_tokenizer, tmp_path, name):
    """Here it would be refused for NaN, or for its config: what is said of another file than the committed one is void."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_checkpoint(), tmp_path / "model")
    files = local_listing(folder).files
    if name == "config.json":
        (folder / name).write_text((folder / name).read_text().replace("silu", "siluu"))
    else:
        state = load_file(folder / name)
        state["lm_head.weight"][0, 0] = float("nan")
        save_file(state, folder / name, {"format": "pt"})
    with pytest.raises(FileChanged) as changed:
        run(job(folder, byte_tokenizer, files=files))
    assert changed.value.path == name


def test_nan_weights_are_one_typed_refusal(make_checkpoint, byte_tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_checkpoint(), tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(Rejected) as refused:
        run(job(folder, byte_tokenizer))
    assert refused.value.reason is Reason.NOT_FINITE
    assert "lm_head.weight" in refused.value.got


def test_an_id_beyond_the_embedding_is_refused(make_checkpoint, byte_tokenizer):
    with pytest.raises(Rejected) as refused:
        run(job(make_checkpoint(vocab_size=200, bos_token_id=1), byte_tokenizer))
    assert refused.value.reason is Reason.VOCABULARY


def test_a_miners_tokenizer_may_not_know_ids_that_its_model_does_not(make_checkpoint, byte_tokenizer, tmp_path):
    """Whether or not a sample has one: the verdict must not hang on the samples."""
    far = {
        "id": 300,
        "content": "zzzz",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    more = [far | {"id": 258 + i, "content": f"zz{i}zz"} for i in range(43)]
    path = own_tokenizer(make_checkpoint(), byte_tokenizer.read_text(), tmp_path, added_tokens=more)
    with pytest.raises(Rejected) as refused:
        run(job(path.parent, path))
    assert (refused.value.reason, refused.value.got) == (Reason.VOCABULARY, "300 rows")
    assert refused.value.limit == "a row for the id 300"


def own_tokenizer(folder: Path, raw: str, tmp_path: Path, **parts) -> Path:
    """A copy of the checkpoint with a tokenizer.json of its own."""
    copy = shutil.copytree(folder, tmp_path / "own")
    (copy / "tokenizer.json").write_text(json.dumps(json.loads(raw) | parts))
    return copy / "tokenizer.json"


def test_a_text_that_the_tokenizer_loses_is_unscorable(make_checkpoint, byte_tokenizer, tmp_path):
    """One that joins accents passes the hard texts, and the samples show what it loses."""
    path = own_tokenizer(make_checkpoint(), byte_tokenizer.read_text(), tmp_path, normalizer={"type": "NFC"})
    samples = (Sample("0" * 32, "cafe\u0301"), Sample("1" * 32, "caf\xe9"))
    found = run(job(path.parent, path, samples=samples))
    assert [(loss.reason, math.isinf(loss.nats)) for loss in found.losses] == [("round_trip", True), ("", False)]


def test_a_miners_tokenizer_that_loses_text_is_refused_whatever_the_samples_are(make_checkpoint, byte_tokenizer, tmp_path):
    path = own_tokenizer(make_checkpoint(), byte_tokenizer.read_text(), tmp_path, normalizer={"type": "Lowercase"})
    with pytest.raises(Rejected) as refused:
        run(job(path.parent, path, samples=(Sample("1" * 32, "lower"),)))
    assert refused.value.reason is Reason.ROUND_TRIP
    assert "both cases" in refused.value.got


def test_this_machine_passes_its_self_test_and_one_without_the_device_does_not():
    asyncio.run(self_test(device="cpu", dtype="float32", threads=1))
    with pytest.raises(ChildEnded) as failed:
        asyncio.run(self_test(device="cuda:99", dtype="float32", threads=1))
    assert failed.value.ending is Ending.DEVICE


def test_a_deadline_ends_the_child_and_is_unavailable(make_checkpoint, byte_tokenizer):
    with pytest.raises(TooLate, match="no result within") as late:
        run(job(make_checkpoint(), byte_tokenizer), deadline_s=0.3)
    assert isinstance(late.value, Unavailable)
    assert late.value.ending is Ending.DEADLINE


def test_too_little_memory_is_unavailable_and_not_the_end_of_the_parent(make_checkpoint, byte_tokenizer):
    with pytest.raises(ChildEnded) as end:
        run(job(make_checkpoint(), byte_tokenizer), memory_bytes=50 << 20)
    assert end.value.ending is Ending.MEMORY


@pytest.mark.parametrize(
    ("status", "errors", "ending"),
    [
        (-9, "", Ending.KILLED),
        (-24, "", Ending.CPU_TIME),
        (-27, "", Ending.TOKENIZER),
        (-11, "Fatal Python error: Segmentation fault", Ending.FAULT),
        (-6, "thread '<unnamed>' panicked at src/lib.rs:1:1:\nfatal runtime error: failed to initiate panic", Ending.ABORT),
        (-6, "memory allocation of 800000 bytes failed", Ending.MEMORY),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc", Ending.MEMORY),
        (-64, "", Ending.KILLED),
        (1, "Traceback (most recent call last):\nMemoryError", Ending.MEMORY),
        (1, "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried", Ending.MEMORY),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", Ending.MEMORY),
        (1, "torch.AcceleratorError: CUDA error: device-side assert triggered", Ending.DEVICE),
        (1, "ValueError: something", Ending.ERROR),
        (0, "", Ending.ERROR),
    ],
)
def test_how_a_child_ended_is_told_in_words(status, errors, ending):
    found = ended(status, errors)
    assert found.ending is ending
    assert ending.value in str(found)
    assert "\x1b" not in str(ended(1, "\x1b[31mred"))


def test_results_of_any_size_are_read_and_nothing_else_is(tmp_path):
    samples = tuple(Sample(f"{i:032x}", "") for i in range(100_000))
    rows = [[i / 3, i, ""] for i in range(len(samples))]
    (tmp_path / "result.json").write_text(json.dumps({"losses": rows, "tensor_digest": "d", "probes": [[1, 2, 3], 0.0, 0.0]}))
    found = read_result(tmp_path, samples)
    assert [loss.nats for loss in found.losses] == [i / 3 for i in range(len(samples))]
    with pytest.raises(ChildEnded):  # another number of losses
        read_result(tmp_path, samples[1:])
    for content in ("", "[]", "{}", '{"losses": []}', '{"rejected": ["NO_SUCH", "", "", ""]}'):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ChildEnded, match="no result that can be read"):
            read_result(tmp_path, ())
    (tmp_path / "result.json").rename(tmp_path / "other")
    (tmp_path / "result.json").symlink_to("other")
    with pytest.raises(ChildEnded, match="not a file"):
        read_result(tmp_path, ())


def test_a_hundred_children_die_and_leave_nothing_behind(tmp_path, monkeypatch):
    """By deadline, by memory, by a file that is no file, and by our own cancellation: no process, descriptor or folder stays."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    broken = job(tmp_path / "nowhere", tmp_path / "folder" / "tokenizer.json", samples=())
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)

    async def one(number: int) -> str:
        deadline_s, memory = [(0.02, BASE_BYTES), (60, 1 << 20), (60, BASE_BYTES), (60, BASE_BYTES)][number % 4]
        task = asyncio.ensure_future(evaluate(broken, deadline_s=deadline_s, memory_bytes=memory))
        if number % 4 == 3:
            await asyncio.sleep(0.02)
            task.cancel()
        try:
            await task
        except (Unavailable, Rejected) as error:
            return type(error).__name__
        except asyncio.CancelledError:
            return "cancelled"
        return "no death"

    async def all_of_them() -> list[str]:
        return [name for start in range(0, 100, 4) for name in await asyncio.gather(*map(one, range(start, start + 4)))]

    descriptors = len(os.listdir("/proc/self/fd"))
    found = asyncio.run(all_of_them())
    assert {name: found.count(name) for name in found} == {"TooLate": 25, "ChildEnded": 25, "Rejected": 25, "cancelled": 25}
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""


def test_the_child_knows_none_of_our_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SN29_WALLET_PASSWORD", "hf_secret")
    found = _environment(str(tmp_path))
    assert "hf_secret" not in json.dumps(found)
    assert (found["HOME"], found["HF_HUB_OFFLINE"]) == (str(tmp_path), "1")
