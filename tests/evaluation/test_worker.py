from __future__ import annotations

import asyncio
import hashlib
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
from sn29.evaluation.probes import probe
from sn29.evaluation.worker import (
    BASE_BYTES,
    ChildEnded,
    Ending,
    FileChanged,
    Job,
    SeveralReasons,
    TooLate,
    _environment,
    ended,
    evaluate,
    read_result,
    self_test,
    sweep,
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
    assert found.probes == probe(model, " ".join(f"{i:032x}" for i in range(4))), "of this model and these samples"
    assert (found.probes.influence, found.probes.tolerance) == (0, 0)


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


def tiny() -> torch.nn.Module:
    """Of the self-test's size: where the probes look depends on nothing else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, num_key_value_heads=2)).eval()


def test_every_reason_is_found_for_who_asks_for_every_one(make_checkpoint, byte_tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    path = own_tokenizer(make_checkpoint(), byte_tokenizer.read_text(), tmp_path, normalizer={"type": "Lowercase"})
    state = load_file(path.with_name("model.safetensors"))
    state["lm_head.weight"][0, 0] = float("nan")
    save_file(state, path.with_name("model.safetensors"))
    with pytest.raises(SeveralReasons) as refused:
        run(job(path.parent, path, every_reason=True))
    assert [one.reason for one in refused.value.found] == [Reason.ROUND_TRIP, Reason.NOT_FINITE]
    assert refused.value.reason is Reason.ROUND_TRIP
    with pytest.raises(Rejected) as first:
        run(job(path.parent, path))
    assert type(first.value) is Rejected
    assert first.value.reason is Reason.ROUND_TRIP


@pytest.mark.parametrize("spoil", ["changed", "gone", "not usable"])
def test_what_is_wrong_with_the_competitions_own_tokenizer_is_no_fault_of_a_model(
    make_checkpoint, byte_tokenizer, tmp_path, spoil
):
    """It was checked when the program began; what happens to the file later is this machine's doing."""
    path = shutil.copy(byte_tokenizer, tmp_path / "tokenizer.json")
    oid = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    if spoil == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if spoil == "not usable" else path.read_bytes() + b"\n")
    with pytest.raises(Unavailable, match="the competition's") as failed:
        run(job(make_checkpoint(), path, tokenizer_oid="" if spoil == "not usable" else oid))
    assert isinstance(failed.value, FileChanged) == (spoil != "not usable")
    assert not isinstance(failed.value, ChildEnded), "nothing that a model could be blamed for"


def test_this_machine_passes_its_self_test_and_one_without_the_device_does_not():
    found = asyncio.run(self_test(device="cpu", dtype="float32", threads=1))
    assert found == probe(tiny(), "self-test")
    with pytest.raises(ChildEnded) as failed:
        asyncio.run(self_test(device="cuda:99", dtype="float32", threads=1))
    assert failed.value.ending is Ending.DEVICE


def test_a_deadline_ends_the_child_and_is_unavailable(make_checkpoint, byte_tokenizer):
    with pytest.raises(TooLate, match=r"no result within 0\.3 s") as late:
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
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", Ending.DEVICE_MEMORY),
        (1, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Ending.DEVICE_MEMORY),
        (1, "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", Ending.DEVICE),
        (
            -6,
            "terminate called after throwing an instance of 'c10::AcceleratorError'\n  CUDA error: launch failed",
            Ending.DEVICE,
        ),
        (1, "RuntimeError: can't start new thread", Ending.MACHINE),
        (1, "Traceback (most recent call last):\nOSError: [Errno 28] No space left on device: 'result.part'", Ending.MACHINE),
        (1, "BlockingIOError: [Errno 11] Resource temporarily unavailable", Ending.MACHINE),
        (1, "OSError: [Errno 12] Cannot allocate memory", Ending.MEMORY),
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


DIGEST = "ab" * 32
WELL = {"losses": [[1.5, 3, ""]], "tensor_digest": DIGEST, "probes": [[1, 2, 3], 0.0, 0.0]}


def left(folder: Path, result: object) -> Path:
    """A child's folder with its result: JSON, or the bytes as they are."""
    text = result if isinstance(result, bytes) else json.dumps(result).encode()
    (folder / "result.json").write_bytes(text)
    return folder


def test_results_of_any_size_are_read(tmp_path):
    samples = tuple(Sample(f"{i:032x}", "") for i in range(100_000))
    rows = [[i / 3, i, ""] for i in range(len(samples))]
    found = read_result(left(tmp_path, WELL | {"losses": rows}), samples)
    assert [loss.nats for loss in found.losses] == [i / 3 for i in range(len(samples))]
    with pytest.raises(ChildEnded):  # another number of losses
        read_result(tmp_path, samples[1:])
    (tmp_path / "result.json").rename(tmp_path / "other")
    (tmp_path / "result.json").symlink_to("other")
    with pytest.raises(ChildEnded, match="not a file"):
        read_result(tmp_path, ())


@pytest.mark.parametrize(
    "result",
    [
        b"", b"\xff", b"[" * 200_000, b'{"losses":' * 100_000, [], {}, 5, None, "changed",
        *(WELL | {"losses": [row]} for row in (
            [[], 1, ""], [-1e9, 1, ""], ["1", 1, ""], [True, 1, ""], [10**4000, 1, ""], [float("nan"), 1, ""],
            [float("inf"), 1, ""], [1.0, "1", ""], [1.0, -1, ""], [1.0, 1.5, ""], [1.0, 2**40, ""], [1.0, True, ""],
            [1.0, 1, "too_long"], [1.0, 1, {}], [None, 1, ""], [None, 1, "copy"], [None, 1, []], [1.0, 1], 7,
        )),
        *(WELL | {"tensor_digest": digest} for digest in ("d", DIGEST.upper(), DIGEST + "0", {"x": 1}, 5, None)),
        *(WELL | {"probes": probes} for probes in (
            [[1], 0, 0], [["a", "b", "c"], 0, 0], [[1, 2, 48], 0, 0], [[1, 2, 3], None, 0], [[1, 2, 3], 0, 2], [[1, 2, 3], 0], {},
        )),
        {"losses": []},
        *({"rejected": [row]} for row in (
            ["NO_SUCH", "", "", ""], ["COPY", "x", "y", "z"], ["SETTING", "x", "y", "z"], [{"a": 1}, "x", "y", "z"],
            ["TENSORS", {}, "y", "z"], ["TENSORS", "x"], ["TENSORS", "x", "y", "z", "w"], [],
        )),
        {"rejected": []}, {"rejected": "TENSORS"}, {"rejected": None}, {"changed": {}}, {"changed": 5}, {"unavailable": []},
    ],
    ids=lambda result: repr(result)[:60],
)  # fmt: skip
def test_what_a_child_wrote_is_read_as_what_it_must_be_or_not_at_all(tmp_path, result):
    """Its process has read a stranger's files: whatever is in the result, the parent gets typed values or a `ChildEnded`."""
    samples = (Sample("0" * 32, "text"),)
    with pytest.raises(ChildEnded, match="no result that can be read") as read:
        read_result(left(tmp_path, result), samples)
    assert read.value.ending is Ending.ERROR
    assert len(str(read.value)) < 400
    assert read_result(left(tmp_path, WELL), samples).losses[0].nats == 1.5


def test_a_samples_reason_is_one_of_three_and_a_refusals_one_that_files_can_show(tmp_path):
    samples = (Sample("0" * 32, "text"),)
    for reason in ("round_trip", "too_long", "not_finite"):
        (loss,) = read_result(left(tmp_path, WELL | {"losses": [[None, 3, reason]]}), samples)
        assert (loss.nats, loss.num_tokens, loss.reason) == (math.inf, 3, reason)
    with pytest.raises(Rejected) as refused:
        read_result(left(tmp_path, {"rejected": [["NOT_CAUSAL", "got", "limit", ""]]}), samples)
    assert (refused.value.reason, refused.value.got) == (Reason.NOT_CAUSAL, "got")
    with pytest.raises(Unavailable, match="words") as failed:
        read_result(left(tmp_path, {"unavailable": "words" * 1000}), samples)
    assert len(str(failed.value)) < 400


def test_children_have_their_folders_where_they_are_told_and_what_a_kill_left_is_swept_away(tmp_path):
    work = tmp_path / "state" / "evaluations"
    asyncio.run(self_test(device="cpu", dtype="float32", threads=1, work_dir=work))
    assert list(work.iterdir()) == []
    (work / "sn29-evaluation-abc").mkdir()
    (work / "sn29-evaluation-abc" / "job.json").write_text("texts")
    (work / "other").write_text("somebody else's")
    sweep(work)
    assert [path.name for path in work.iterdir()] == ["other"]
    sweep(tmp_path / "nowhere")


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
    assert {name: found.count(name) for name in found} == {"TooLate": 25, "ChildEnded": 25, "Unavailable": 25, "cancelled": 25}
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""


def test_the_child_knows_none_of_our_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SN29_WALLET_PASSWORD", "hf_secret")
    found = _environment(str(tmp_path))
    assert "hf_secret" not in json.dumps(found)
    assert (found["HOME"], found["HF_HUB_OFFLINE"]) == (str(tmp_path), "1")
