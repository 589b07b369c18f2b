"""A slice of training in two processes: as the miner starts it, with what goes wrong in them told by the miner."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from neurons.slices import FAILED, FILE, LOCK, alone, train_in_processes
from sn29.errors import Reason, Rejected, Unavailable
from sn29.mining import Slice
from sn29.settings import MinerSettings, read

RULES = """\
reward_share: 1
families: [LlamaForCausalLM]
tokenizer: {free: true}
limits: {parameters: 60000, bytes: 1e6, max_tokens: 300, max_chars: 200, round_trip_failures: 1}
dataset: {folder: text, files: "*.parquet", column: text}
samples: {count: 8, window_blocks: 360}
scoring: {rule: champion}
pool: {keep: 4, pending: 4}
"""


@pytest.fixture
def settings(tmp_path: Path, byte_tokenizer: Path) -> MinerSettings:
    (tmp_path / "competitions" / "text").mkdir(parents=True)
    (tmp_path / "competitions" / "c00.yaml").write_text(RULES)
    texts = [f"the text number {i} about the {word}" for i in range(100) for word in ("sea", "hills", "theatre")]
    pq.write_table(pa.table({"text": texts}), tmp_path / "competitions" / "text" / "a.parquet", row_group_size=50)
    flags = (
        "--competitions.dir", str(tmp_path / "competitions"), "--work.dir", str(tmp_path / "work"), "--tokenizer",
        str(byte_tokenizer), "--hidden-size", "8", "--intermediate-size", "16", "--num-heads", "2", "--min-count", "0",
        "--steps", "6", "--processes", "2", "--threads", "1", "--log.file", str(tmp_path / "log.jsonl"),
        "--hub.token", "hf_secret",
    )  # fmt: skip
    return read(MinerSettings, list(flags))


def test_two_processes_train_a_slice(settings, tmp_path):
    folder = tmp_path / "work" / "training"
    found = asyncio.run(train_in_processes(settings, 0, Slice(folder, 1, "", 4, frozenset({"ab" * 16}))))
    assert found == folder / "checkpoint"
    assert len((folder / "curve.jsonl").read_text().splitlines()) == 4
    assert (found / "tokenizer.json").exists()
    about = json.loads((folder / "training.json").read_text())
    assert about["shards"] == 2
    assert about["excluded"] == ["ab" * 16]
    assert "hf_secret" not in "".join(p.read_text(errors="replace") for p in folder.glob("*.json"))
    steps = [json.loads(line).get("step") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1, "one of them speaks"


def test_what_the_processes_refuse_is_told_by_the_miner(settings, tmp_path):
    folder = tmp_path / "work" / "training"
    shutil.rmtree(tmp_path / "competitions" / "text")
    with pytest.raises(Rejected) as refused:
        asyncio.run(train_in_processes(settings, 0, Slice(folder, 1, "", 6, frozenset())))
    assert refused.value.reason is Reason.DATASET
    assert (folder / FAILED).exists()


def test_processes_that_a_killed_miner_left_are_waited_for(settings, tmp_path):
    folder = tmp_path / "work" / "training"
    folder.mkdir(parents=True)
    with alone(folder), pytest.raises(Unavailable, match="still train in"):
        asyncio.run(train_in_processes(settings, 0, Slice(folder, 1, "", 6, frozenset())))
    assert (folder / LOCK).exists()


def test_processes_that_are_stopped_write_a_checkpoint_and_have_not_trained_the_slice(settings, tmp_path):
    folder = tmp_path / "work" / "training"
    settings = settings.model_copy(update={"steps": 5000})

    async def story() -> None:
        training = asyncio.create_task(train_in_processes(settings, 0, Slice(folder, 1, "", 5000, frozenset())))
        while not lines(folder):
            assert not training.done(), "it ended by itself"
            await asyncio.sleep(0.1)
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training

    asyncio.run(story())
    assert 0 < lines(folder) < 5000
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == lines(folder)
    alone_ = subprocess.Popen([sys.executable, "-m", "neurons.slices", str(folder / FILE)])
    before = lines(folder)
    while lines(folder) == before:
        assert alone_.poll() is None, "it ended by itself"
        time.sleep(0.1)
    alone_.terminate()
    assert alone_.wait(60) == 1, "a process that is stopped alone has not done what was asked for"


def lines(folder: Path) -> int:
    curve = folder / "curve.jsonl"
    return len(curve.read_text().splitlines()) if curve.exists() else 0
