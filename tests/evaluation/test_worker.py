from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.engine import sample_nats
from sn29.evaluation.worker import BASE_BYTES, Job, TooLate, evaluate, self_test
from sn29.models.checkpoint import load
from sn29.models.tokenizer import Tokenizer
from sn29.records import Sample

TEXTS = ("the theatre", "a", "über 日本 \r\n", "x" * 60)


def job(folder: Path, tokenizer: Path, **changes) -> Job:
    samples = tuple(Sample(f"{i:032x}", text) for i, text in enumerate(TEXTS))
    plain = Job(str(folder), str(tokenizer), 1, 50, "float32", "cpu", 1, samples)
    return replace(plain, **changes)


def run(task: Job, deadline_s: float = 120, memory_bytes: int = BASE_BYTES):
    return asyncio.run(evaluate(task, deadline_s=deadline_s, memory_bytes=memory_bytes))


def test_the_child_gives_the_engines_losses_and_a_reason_where_there_is_none(make_checkpoint, byte_tokenizer):
    folder = make_checkpoint()
    losses = run(job(folder, byte_tokenizer))
    torch.set_num_threads(1)  # as the job: float32 sums depend on how they are split
    tokenizer, model = Tokenizer.load(byte_tokenizer), load(folder, dtype=torch.float32)
    assert [loss.sample for loss in losses] == [f"{i:032x}" for i in range(4)]
    for text, loss in zip(TEXTS[:3], losses, strict=False):
        assert loss.nats == sample_nats(model, tokenizer.encode(text), 1)
        assert (loss.num_tokens, loss.reason) == (len(tokenizer.encode(text)), "")
    assert (losses[3].nats, losses[3].num_tokens, losses[3].reason) == (math.inf, 60, "too_long")


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


def test_a_text_that_the_tokenizer_loses_is_unscorable(make_checkpoint, byte_tokenizer, tmp_path):
    raw = json.loads(byte_tokenizer.read_text())
    raw["normalizer"] = {"type": "Lowercase"}
    lossy = tmp_path / "tokenizer.json"
    lossy.write_text(json.dumps(raw))
    samples = (Sample("0" * 32, "Upper"), Sample("1" * 32, "lower"))
    losses = run(job(make_checkpoint(), lossy, samples=samples))
    assert [(loss.reason, math.isinf(loss.nats)) for loss in losses] == [("round_trip", True), ("", False)]


def test_this_machine_passes_its_self_test_and_one_without_the_device_does_not():
    asyncio.run(self_test(device="cpu", dtype="float32", threads=1))
    with pytest.raises(Unavailable, match="the child ended with"):
        asyncio.run(self_test(device="cuda:99", dtype="float32", threads=1))


def test_a_deadline_ends_the_child_and_is_unavailable(make_checkpoint, byte_tokenizer):
    with pytest.raises(TooLate, match="no result within"):
        run(job(make_checkpoint(), byte_tokenizer), deadline_s=0.3)


def test_too_little_memory_is_unavailable_and_not_the_end_of_the_parent(make_checkpoint, byte_tokenizer):
    with pytest.raises(Unavailable, match="the child ended with"):
        run(job(make_checkpoint(), byte_tokenizer), memory_bytes=50 << 20)


def test_the_child_has_no_network_and_none_of_our_secrets(tmp_path):
    """The child's own confinement, in a process of its own: no socket connects, and the environment is bare."""
    script = (
        "import socket, os, json\n"
        "from sn29.evaluation import worker\n"
        "worker._confine(4 << 30, 'cpu')\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', 9), timeout=2)\n"
        "    print('connected')\n"
        "except PermissionError as error:\n"
        "    print('blocked', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.startswith("blocked"), done
    os.environ["HF_TOKEN"] = "hf_secret"
    try:
        from sn29.evaluation.worker import _environment

        assert "hf_secret" not in json.dumps(_environment(str(tmp_path)))
    finally:
        del os.environ["HF_TOKEN"]
