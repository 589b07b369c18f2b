"""`sn29 study packing` at the smallest size, as a real process: killed, gone on with, and reported again."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sn29 import cli
from sn29.models.tokenizer import Tokenizer, train_bpe
from sn29.settings import StudyPackingSettings, read
from sn29.study_command import _plan, prepare

REPORTS = ("study.md", "study.csv", "study.html", "study.svg")


def write_text(folder: Path, documents: int = 90, ends: str = "") -> Path:
    numbers, words = random.Random(1), ["alpha", "beta", "gamma", "river", "stone", "light", "dark", "seven", "eight", "nine"]
    texts = [f"{n} " + " ".join(numbers.choices(words, k=numbers.randrange(3, 60))) + ends for n in range(documents)]
    folder.mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
    return folder


def flags(text: Path, folder: Path) -> list[str]:
    small = {"tokens": 1500, "row-tokens": 64, "batch-tokens": 256, "held-out": 20, "seeds": 1, "size": "tiny"}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    return ["study", "packing", "--dir", str(folder), "--text", str(text), *words]


def finished(folder: Path) -> dict[str, int]:
    """Name of each finished run -> when its result was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").glob("*.json")}


def kill_after(command: list[str], folder: Path, runs: int) -> None:
    """Kills the process when so many runs are done."""
    process = subprocess.Popen([sys.executable, "-m", "sn29.cli", *command], stderr=subprocess.DEVNULL, env=os.environ)
    until = time.monotonic() + 120
    while len(finished(folder)) < runs and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_study_goes_on_and_its_report_can_be_made_again(tmp_path, capsys):
    text, folder = write_text(tmp_path / "text"), tmp_path / "study"
    kill_after(flags(text, folder), folder, 1)
    before = finished(folder)
    assert len(before) >= 1
    assert not (folder / "study.md").exists()

    assert cli.main(flags(text, folder)) == 0
    after = finished(folder)
    assert before.items() <= after.items()  # nothing is done twice
    assert len(after) >= 18  # seven arms, five continued, six of other rates; equal compute where it differs
    said = capsys.readouterr().out
    assert "The three modes" in said
    written = {name: (folder / name).read_bytes() for name in REPORTS}
    assert "| → masked+start |" in written["study.md"].decode()
    assert b"Is the learning rate fair?" in written["study.md"]

    for name in REPORTS:
        (folder / name).unlink()
    assert cli.main(["study", "packing", "--dir", str(folder), "--report-only", "--json"]) == 0
    study = json.loads(capsys.readouterr().out)
    assert study["finished"] == len(after)
    assert {name: (folder / name).read_bytes() for name in REPORTS} == written

    # the folder holds one plan: another is refused with both values, and nothing is written
    assert cli.main([*flags(text, folder), "--row-tokens", "128"]) == 1
    said = capsys.readouterr().err
    assert "row_tokens 128" in said
    assert "row_tokens 64" in said
    assert finished(folder) == after

    # and numbers of one torch
    kept = json.loads((folder / "study.json").read_text())
    kept["versions"]["torch"] = "1.0"
    (folder / "study.json").write_text(json.dumps(kept))
    assert cli.main([*flags(text, folder), "--seeds", "2"]) == 1
    said = capsys.readouterr().err
    assert f"torch {torch.__version__}" in said
    assert "torch 1.0" in said
    assert finished(folder) == after


def test_two_studies_do_not_work_in_one_folder(tmp_path, capsys):
    text, folder = write_text(tmp_path / "text"), tmp_path / "study"
    folder.mkdir()
    with (folder / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cli.main(flags(text, folder)) == 1
    said = capsys.readouterr().err
    assert "a study that works in" in said
    assert not (folder / "study.json").exists()


def tokenizer_file(path: Path, names: list[str], *, special: bool = True) -> Path:
    """Bytes first, so that id 0 is a letter; then these end tokens."""
    inner = json.loads(train_bpe(["alpha beta " * 9], 300))
    entries = [token for token in inner["model"]["vocab"] if token != "<|endoftext|>"]
    inner["model"]["vocab"] = {token: n for n, token in enumerate(entries)}
    shape = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    inner["added_tokens"] = [
        {"id": len(entries) + n, "content": name, "special": special, **shape} for n, name in enumerate(names)
    ]
    path.write_text(json.dumps(inner))
    return path


def test_the_end_token_is_the_tokenizers_own(tmp_path):
    text, folder = write_text(tmp_path / "text"), tmp_path / "study"
    own = tokenizer_file(tmp_path / "own.json", ["<eos>", "</s>"])
    settings = read(StudyPackingSettings, [*flags(text, folder)[2:], "--tokenizer", str(own)])
    folder.mkdir()
    plan, texts = prepare(settings, _plan(settings))
    assert plan.end_token == Tokenizer.load(own).id_of("</s>") > 200
    assert not (texts.training.flat == plan.end_token).any()
    assert prepare(settings, _plan(settings))[0] == plan  # read back


@pytest.mark.parametrize(
    ("names", "special", "says"),
    [(["<pad>"], True, "no end token"), (["</s>"], False, "inside a text")],
)
def test_a_tokenizer_without_an_end_of_its_own_is_refused(names, special, says, tmp_path, capsys):
    text, folder = write_text(tmp_path / "text", ends="</s>"), tmp_path / "study"
    own = tokenizer_file(tmp_path / "own.json", names, special=special)
    assert cli.main([*flags(text, folder), "--tokenizer", str(own)]) == 1
    assert says in capsys.readouterr().err
    assert not (folder / "study.json").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--size", "huge"], "tiny, small, medium"),
        (["--held-out", "90"], "90 different texts"),
        (["--column", "body"], "body"),
        (["--tokens", "100"], "100 tokens"),
        (["--row-tokens", "1"], "at least 8"),
        (["--pattern", "data/*"], "data/*"),
        (["--text", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_studied_is_said_in_one_line_and_nothing_is_written(more, says, tmp_path, capsys):
    text, folder = write_text(tmp_path / "text"), tmp_path / "study"
    assert cli.main([*flags(text, folder), *more]) == 1
    assert says in capsys.readouterr().err
    assert not (folder / "study.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_size_for_a_gpu_is_refused_where_there_is_none(tmp_path, capsys):
    assert cli.main(["study", "packing", "--dir", str(tmp_path / "study"), "--size", "medium"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert cli.main(["study", "packing", "--dir", str(tmp_path), "--report-only"]) == 1
    assert "no study.json" in capsys.readouterr().err
