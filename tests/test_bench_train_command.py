from __future__ import annotations

import json

import pytest
import torch

from sn29.bench_eval_command import SIZES
from sn29.bench_train_command import GOALS, batches_of, bench_train
from sn29.errors import Reason, Rejected

FEW = [
    "--model",
    "tiny",
    "--documents",
    "9",
    "--tokens",
    "2000",
    "--max-tokens",
    "600",
    "--row-tokens",
    "256",
    "--batch-tokens",
    "500",
    "--times",
    "2",
]
WAYS = ["alone", "padded", "unpacked", "packed", "packed_masked"]


def test_the_ways_are_timed_in_turns_and_agree(capsys):
    status = bench_train([*FEW, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report["ways"]) == WAYS
    for figures in report["ways"].values():
        assert len(figures["seconds"]) == len(figures["ratios"]) == 2
        assert figures["loss"] == pytest.approx(report["ways"]["alone"]["loss"], rel=0.01)  # random ids, other documents
    assert report["loss_difference"] < 1e-6
    assert report["ways"]["alone"]["ratios"] == [1, 1]
    assert report["ways"]["alone"]["padding"] == report["ways"]["packed"]["padding"] == 0
    assert report["ways"]["padded"]["padding"] > 0
    assert len(report["goals"]) == 3
    assert status == (0 if all(goal["met"] for goal in report["goals"]) else 1)
    assert report["goals"][-1]["met"]  # equal losses do not depend on the machine


def test_the_table_names_every_way_and_every_goal(capsys):
    bench_train([*FEW, "--dtype", "bfloat16"])
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in WAYS)
    assert shown.count("goal at least") == 2
    assert "bfloat16" in shown


def test_every_way_has_the_same_documents():
    documents = [[n] * length for n, length in enumerate([5, 30, 12, 7, 7, 16, 1], start=1)]
    ways = batches_of(documents, 16, 32)
    tokens = sorted(token for document in documents for token in document)
    for name, groups in ways.items():
        seen = sorted(t for group in groups for row in group for t in row.targets if t > 0)
        if name == "packed":  # a first token that nothing stands before, and what does not fill a row
            assert len(tokens) - 17 <= len(seen) < len(tokens)
        else:
            assert seen == tokens, name
    assert [len(group) for group in ways["alone"]] == [1] * 8  # 30 tokens are two rows of 16
    assert all(abs(sum(row.useful for row in group) - 32) <= 16 for group in ways["packed_masked"])


def test_optimizers_have_a_table_of_their_own(capsys):
    assert bench_train(["--optimizers", "--times", "1"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "adamw" in shown
    assert "stated bytes a parameter" in shown


def test_every_goal_is_of_ways_that_there_are():
    assert {way for _, ours, theirs in GOALS for way in (ours, theirs)} <= set(WAYS)
    assert "llama-2k" in SIZES


@pytest.mark.parametrize(
    "words", [["--model", "8b"], ["--dtype", "float16"], ["--documents", "0"], ["--device", "tpu"]], ids=lambda words: words[0]
)
def test_what_is_not_there_is_refused(words):
    with pytest.raises(Rejected) as refused:
        bench_train(words)
    assert refused.value.reason is Reason.SETTING


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("more", [[], ["--optimizers"]], ids=["train", "optimizers"])
def test_a_device_that_is_not_there_is_refused(more):
    with pytest.raises(Rejected, match=r"--device: .*got cuda, rule cpu: this machine has no CUDA device"):
        bench_train([*FEW, "--device", "cuda", *more])
