from __future__ import annotations

import json

import pytest

from sn29.bench_eval_command import GOALS, SIZES, bench_eval
from sn29.errors import Reason, Rejected

FEW = ["--model", "tiny", "--samples", "3", "--max-tokens", "40", "--times", "2", "--row-tokens", "64", "--dtype", "float32"]


def test_the_engines_are_timed_in_turns_and_agree(capsys):
    assert bench_eval([*FEW, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["engines"]) == ["plain", "padded", "packed"]
    for figures in report["engines"].values():
        assert len(figures["seconds"]) == len(figures["ratios"]) == 2
        assert figures["worst_difference"] < 1e-6
    assert 0 <= report["share_outside"] < 1
    assert report["profile"].startswith("packed-1 rows of 64, documents attention")
    assert report["goals"] == []


def test_the_table_names_every_engine(capsys):
    assert bench_eval(FEW) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("plain", "padded", "packed", "no goal is set", "outside the model"))


def test_every_goal_is_of_a_model_that_there_is():
    assert {model for _, model, _ in GOALS} <= SIZES.keys()


@pytest.mark.parametrize("words", [["--model", "8b"], ["--dtype", "float16"]])
def test_an_unknown_model_or_type_is_refused(words):
    with pytest.raises(Rejected) as refused:
        bench_eval(words)
    assert refused.value.reason is Reason.SETTING
