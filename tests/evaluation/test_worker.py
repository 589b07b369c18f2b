from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.child import processor
from sn29.evaluation.engine import sample_nats
from sn29.evaluation.packed import all_nats_packed
from sn29.evaluation.probes import probe
from sn29.evaluation.profile import Profile, Tiles
from sn29.evaluation.streamed import Needs, needs
from sn29.evaluation.worker import (
    BASE_BYTES,
    ChildEnded,
    Ending,
    FileChanged,
    Here,
    Job,
    SeveralReasons,
    TooLate,
    _last_words,
    ended,
    read_result,
    sweep,
)
from sn29.models.checkpoint import load, local_listing, tensor_digest
from sn29.models.config import parse_config
from sn29.models.tokenizer import Tokenizer
from sn29.records import RepoFile, Sample

SMALL = Profile(256, Tiles(64, 128, compiled=False), "documents")
TEXTS = ("the theatre", "a", "über 日本 \r\n", "x" * 60)


def job(folder: Path, tokenizer: Path, **changes) -> Job:
    samples = tuple(Sample(f"{i:032x}", text) for i, text in enumerate(TEXTS))
    plain = Job(str(folder), str(tokenizer), 1, 50, "float32", "cpu", 1, SMALL, samples)
    return replace(plain, **changes)


@pytest.fixture
def run(evaluator):
    """run(job, deadline_s, memory_bytes, decide) -> Evaluated"""

    def run(task: Job, deadline_s: float = 120, memory_bytes: int = BASE_BYTES, decide=None):
        return asyncio.run(evaluator.evaluate(task, deadline_s=deadline_s, memory_bytes=memory_bytes, decide=decide))

    return run


def test_the_child_gives_the_engines_losses_and_a_reason_where_there_is_none(run, make_checkpoint, byte_tokenizer):
    folder = make_checkpoint()
    files = (*local_listing(folder).files, RepoFile("README.md", 5, "git:" + "0" * 40))  # a README is listed and not fetched
    found = run(job(folder, byte_tokenizer, files=files))
    tokenizer, model = Tokenizer.load(byte_tokenizer), load(folder, dtype=torch.float32)
    expected = all_nats_packed(model, [tokenizer.encode(text) for text in TEXTS[:3]], 1, profile=SMALL)
    assert [loss.sample for loss in found.losses] == [f"{i:032x}" for i in range(4)]
    for text, nats, loss in zip(TEXTS[:3], expected, found.losses, strict=False):
        assert loss.nats == nats == pytest.approx(sample_nats(model, tokenizer.encode(text), 1), rel=1e-6)
        assert (loss.num_tokens, loss.reason) == (len(tokenizer.encode(text)), "")
    long = found.losses[3]
    assert (long.nats, long.num_tokens, long.reason) == (math.inf, 60, "too_long")
    assert found.tensor_digest == tensor_digest(folder)
    assert found.probes == probe(model, " ".join(f"{i:032x}" for i in range(4))), "of this model and these samples"
    assert (found.probes.influence, found.probes.tolerance) == (0, 0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_changed_on_this_disk_is_no_fault_of_the_model(run, make_checkpoint, byte_tokenizer, tmp_path, name):
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


@pytest.mark.parametrize("streamed", [False, True])
def test_nan_weights_are_one_typed_refusal(run, make_checkpoint, byte_tokenizer, tmp_path, streamed):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_checkpoint(), tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(Rejected) as refused:
        run(job(folder, byte_tokenizer, model_bytes=needed(folder).resident - 1 if streamed else None))
    assert refused.value.reason is Reason.NOT_FINITE
    assert "lm_head.weight" in refused.value.got


def needed(folder: Path) -> Needs:
    """By the texts of `job`."""
    return needs(parse_config((folder / "config.json").read_bytes()), torch.float32, SMALL, max(map(len, TEXTS)))


def test_an_id_beyond_the_embedding_is_refused(run, make_checkpoint, byte_tokenizer):
    with pytest.raises(Rejected) as refused:
        run(job(make_checkpoint(vocab_size=200, bos_token_id=1), byte_tokenizer))
    assert refused.value.reason is Reason.VOCABULARY


def test_a_miners_tokenizer_may_not_know_ids_that_its_model_does_not(run, make_checkpoint, byte_tokenizer, tmp_path):
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


def test_a_text_that_the_tokenizer_loses_is_unscorable(run, make_checkpoint, byte_tokenizer, tmp_path):
    """One that joins accents passes the hard texts, and the samples show what it loses."""
    path = own_tokenizer(make_checkpoint(), byte_tokenizer.read_text(), tmp_path, normalizer={"type": "NFC"})
    samples = (Sample("0" * 32, "cafe\u0301"), Sample("1" * 32, "caf\xe9"))
    found = run(job(path.parent, path, samples=samples))
    assert [(loss.reason, math.isinf(loss.nats)) for loss in found.losses] == [("round_trip", True), ("", False)]


def test_a_miners_tokenizer_that_loses_text_is_refused_whatever_the_samples_are(run, make_checkpoint, byte_tokenizer, tmp_path):
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


def test_every_reason_is_found_for_who_asks_for_every_one(run, make_checkpoint, byte_tokenizer, tmp_path):
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
    run, make_checkpoint, byte_tokenizer, tmp_path, spoil
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
    assert not isinstance(failed.value, ChildEnded), "nothing that a model could be blamed for"


def test_this_machine_passes_its_self_test_and_one_without_the_device_does_not():
    async def story():
        async with Here() as here:
            assert await here.self_test(device="cpu", dtype="float32", threads=1) == probe(tiny(), "self-test")
            with pytest.raises(ChildEnded) as failed:
                await here.self_test(device="cuda:99", dtype="float32", threads=1)
            return failed.value.ending

    assert asyncio.run(story()) is Ending.DEVICE


def test_a_deadline_ends_the_child_and_is_unavailable(run, make_checkpoint, byte_tokenizer):
    with pytest.raises(TooLate, match=r"no result within 0\.005 s") as late:
        run(job(make_checkpoint(), byte_tokenizer), deadline_s=0.005)
    assert isinstance(late.value, Unavailable)
    assert late.value.ending is Ending.DEADLINE


def test_too_little_memory_is_unavailable_and_not_the_end_of_the_parent(run, evaluator, make_checkpoint, byte_tokenizer):
    """Unless the model is streamed: layer by layer it fits, and gives the same bits."""
    asyncio.run(evaluator.choose(300, device="cpu", dtype="float32"))  # the server is there
    status = Path(f"/proc/{evaluator.server_pid}/status").read_text()
    libraries = int(next(line for line in status.splitlines() if line.startswith("VmData:")).split()[1]) << 10
    large = make_checkpoint(hidden_size=512, intermediate_size=4096, num_hidden_layers=8)  # 0.24 GB
    task, tight = job(large, byte_tokenizer, portions=(2,)), libraries + (200 << 20)
    with pytest.raises(ChildEnded) as end:
        run(task, memory_bytes=tight)
    assert end.value.ending is Ending.MEMORY
    whole = run(task)
    assert (whole.probes.influence, whole.probes.tolerance) == (0, 0)
    task = replace(task, model_bytes=needed(large).streamed)
    assert run(task, memory_bytes=tight) == whole  # losses to the bit, digest, probes
    assert run(task, memory_bytes=tight, decide=lambda losses: False).losses == whole.losses[:2]


def test_a_model_that_cannot_even_be_streamed_in_what_it_may_take_is_unavailable(run, make_checkpoint, byte_tokenizer):
    """A setting of this machine: no fault of the model, and nothing that its files could be blamed for."""
    folder = make_checkpoint()
    least = needed(folder).streamed
    with pytest.raises(Unavailable, match=rf"memory: {least:,} bytes are needed .*, {least - 1:,} are allowed") as failed:
        run(job(folder, byte_tokenizer, model_bytes=least - 1))
    assert type(failed.value) is Unavailable
    assert run(job(folder, byte_tokenizer, model_bytes=least)) == run(job(folder, byte_tokenizer))
    changed = (RepoFile("model.safetensors", 5, "sha256:" + "0" * 64),)
    with pytest.raises(FileChanged):  # then nothing counts that was seen in it
        run(job(folder, byte_tokenizer, model_bytes=least - 1, files=changed))


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
        {"rejected": []}, {"rejected": "TENSORS"}, {"rejected": None}, {"changed": {}}, {"changed": 5},
        *({"unavailable": said} for said in ([], 5, "words", ["memory"], ["memory", 5], ["memory", "a", "b"])),
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
    with pytest.raises(Unavailable, match=r"what\?: words") as failed:
        read_result(left(tmp_path, {"unavailable": ["what\n", "words" * 1000]}), samples)
    assert type(failed.value) is Unavailable
    assert len(str(failed.value)) < 400


def test_children_have_their_folders_where_they_are_told_and_what_a_kill_left_is_swept_away(tmp_path):
    work = tmp_path / "state" / "evaluations"

    async def story():
        async with Here(work) as here:
            await here.self_test(device="cpu", dtype="float32", threads=1)

    asyncio.run(story())
    assert not list(work.glob("sn29-*"))
    (work / "sn29-evaluation-abc").mkdir()
    (work / "sn29-evaluation-abc" / "job.json").write_text("texts")
    (work / "other").write_text("somebody else's")
    sweep(work)
    assert not list(work.glob("sn29-*"))
    assert (work / "other").exists()
    sweep(tmp_path / "nowhere")


def test_a_hundred_children_die_and_leave_nothing_behind(tmp_path, monkeypatch, make_checkpoint, byte_tokenizer):
    """By deadline, by a GPU that is not there, by a file that is none, by our own cancellation: nothing stays."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    broken = job(tmp_path / "nowhere", tmp_path / "folder" / "tokenizer.json", samples=())
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    elsewhere = job(make_checkpoint(), byte_tokenizer, device="cuda:99", samples=())

    async def one(here: Here, number: int) -> str:
        deadline_s, asked = 0.001 if number % 4 == 0 else 60, elsewhere if number % 4 == 1 else broken
        task = asyncio.ensure_future(here.evaluate(asked, deadline_s=deadline_s, memory_bytes=BASE_BYTES))
        if number % 4 == 3:
            await asyncio.sleep(0.005)
            task.cancel()
        try:
            await task
        except (Unavailable, Rejected) as error:
            return type(error).__name__
        except asyncio.CancelledError:
            return "cancelled"
        return "no death"

    async def all_of_them() -> list[str]:
        async with Here() as here:
            await here.choose(300, device="cpu", dtype="float32")  # the server is there
            rounds = [await asyncio.gather(*(one(here, n) for n in range(at, at + 4))) for at in range(0, 100, 4)]
        return [name for names in rounds for name in names]

    ours = Path(f"/proc/self/task/{os.getpid()}/children")
    children, descriptors = ours.read_text(), len(os.listdir("/proc/self/fd"))  # other tests' too
    found = asyncio.run(all_of_them())
    assert {name: found.count(name) for name in found} == {"TooLate": 25, "ChildEnded": 25, "Unavailable": 25, "cancelled": 25}
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert ours.read_text() == children


def test_a_server_that_was_started_again_has_the_compiled_fold_again_or_says_so(make_checkpoint, byte_tokenizer, tmp_path):
    """Without it a child would fold in eager mode, and other bits would be kept as the compiled ones."""

    async def story():
        async with Here(tmp_path / "work") as here:
            chosen = await here.choose(20_000, device="cpu", dtype="float32")
            task = job(make_checkpoint(vocab_size=20_000), byte_tokenizer, profile=chosen.profile)
            before = await here.evaluate(task, deadline_s=120, memory_bytes=BASE_BYTES)
            os.kill(here._server._process.pid, signal.SIGKILL)
            while here._server._control is not None:
                await asyncio.sleep(0.01)
            for again in (task, replace(task, model_bytes=1)):  # resident, and streamed
                with pytest.raises(Unavailable, match="the compiled output layer is not there") as failed:
                    await here.evaluate(again, deadline_s=120, memory_bytes=BASE_BYTES)
                assert not isinstance(failed.value, ChildEnded)
            assert await here.choose(20_000, device="cpu", dtype="float32") == chosen
            assert await here.evaluate(task, deadline_s=120, memory_bytes=BASE_BYTES) == before

    asyncio.run(story())


def test_the_last_words_of_a_child_are_read_from_a_file_and_from_nothing_else(tmp_path):
    assert _last_words(tmp_path / "errors") == ""
    (tmp_path / "errors").write_text("word " * 2000 + "end\n")
    assert _last_words(tmp_path / "errors").endswith("word end")
    assert len(_last_words(tmp_path / "errors")) <= 4000
    os.mkfifo(tmp_path / "fifo")
    assert _last_words(tmp_path / "fifo") == "", "and nobody waits for a writer"
    (tmp_path / "link").symlink_to("errors")
    assert _last_words(tmp_path / "link") == ""


def stops_at(*counts: int):
    """A `decide` that notes how many losses it was shown, and stops at the last of these numbers."""
    shown: list[int] = []

    def decide(losses) -> bool:
        shown.append(len(losses))
        return len(losses) < counts[-1]

    return decide, shown


def test_portion_by_portion_the_parent_says_whether_to_go_on(run, make_checkpoint, byte_tokenizer):
    texts = [f"text number {i} " + "ab" * (i % 7) for i in range(40)]
    samples = tuple(Sample(f"{i:032x}", text) for i, text in enumerate(texts))
    task = job(make_checkpoint(), byte_tokenizer, samples=samples, portions=(8, 16, 32))
    whole = run(task)
    assert len(whole) == 40  # nobody to ask
    decide, shown = stops_at(100)
    assert run(task, decide=decide) == whole
    assert shown == [8, 16, 32]
    decide, shown = stops_at(8, 16)
    part = run(task, decide=decide)
    assert part.losses == whole.losses[:16]  # to the bit
    assert shown == [8, 16]
    assert part.tensor_digest == whole.tensor_digest


def test_a_decision_that_fails_ends_the_child_and_is_ours(run, make_checkpoint, byte_tokenizer):
    def decide(losses) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(job(make_checkpoint(), byte_tokenizer, portions=(2,)), decide=decide)


def test_the_way_is_chosen_by_vocabulary_and_a_compiled_fold_is_inherited(make_checkpoint, byte_tokenizer, tmp_path):
    async def story():
        async with Here(tmp_path / "cache") as here:
            small = await here.choose(300, device="cpu", dtype="float32")
            large = await here.choose(20_000, device="cpu", dtype="float32")
            task = job(make_checkpoint(vocab_size=20_000), byte_tokenizer, profile=large.profile)
            begun = await here.evaluate(task, deadline_s=120, memory_bytes=BASE_BYTES)
            eager = replace(large.profile, tiles=Tiles(256, 4096, compiled=False))
            return small, large, begun, await here.evaluate(replace(task, profile=eager), deadline_s=120, memory_bytes=BASE_BYTES)

    small, large, compiled, eager = asyncio.run(story())
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert str(small) == f"packed-1 rows of 1024, documents attention, eager tiles 256x300, {processor()}, {libraries}"
    assert large.profile.tiles == Tiles(1024, 2048, compiled=True)
    assert large.note == ""
    for one, other in zip(compiled.losses[:3], eager.losses, strict=False):
        assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_texts_of_the_competitions_tokenizer_are_read_once_for_all_models(tmp_path, make_checkpoint, byte_tokenizer, monkeypatch):
    """The second model's child has no tokenizer to read: the file is gone by then, and only its hash is asked for."""
    oid = f"sha256:{hashlib.sha256(byte_tokenizer.read_bytes()).hexdigest()}"
    path = Path(shutil.copy(byte_tokenizer, tmp_path / "tokenizer.json"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    async def story():
        async with Here() as here:
            tasks = [job(make_checkpoint(seed=seed), path, tokenizer_oid=oid) for seed in (1, 2)]
            apart = [replace(task, tokenizer_oid="") for task in tasks]
            found = [await here.evaluate(task, deadline_s=120, memory_bytes=BASE_BYTES) for task in (*tasks, *apart)]
            told = await here._server.call("tests.evaluation.test_worker:count_texts", "")
            other = replace(tasks[0], samples=(Sample("f" * 32, "another text"),))
            await here.evaluate(other, deadline_s=120, memory_bytes=BASE_BYTES)
            left = await here._server.call("tests.evaluation.test_worker:count_texts", "")
            path.write_text("{}")
            with pytest.raises(Unavailable, match="not the one that was checked"):
                await here.evaluate(tasks[0], deadline_s=120, memory_bytes=BASE_BYTES)
            return found, told, left

    found, told, left = asyncio.run(story())
    assert (found[0], found[1]) == (found[2], found[3])
    assert found[0].losses != found[1].losses
    assert (told, left) == ("4", "1")


def count_texts(_: str) -> str:
    """In the fork server."""
    from sn29.evaluation.child import _texts_read

    return str(len(_texts_read))
