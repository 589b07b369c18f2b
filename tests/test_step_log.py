"""The step log of Weights & Biases has the fields that operators know, from a round's record."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest

from sn29.step_log import step_log
from sn29.telemetry import open_wandb
from tests.recorded import refused, round_record

TABLE = {"ann": (1000.0, 900.0, 1200.0, math.inf), "ben": (900.0, 800.0, 1300.0, 700.0), "gone": (990.0, 899.0, 1190.0, 690.0)}
UIDS = {"ann": 7, "ben": 3}
OF_A_MODEL = {
    "uid", "n_parameters", "n_layers", "embed_size", "hidden_size", "competition", "label", "block", "losses",
    "n_samples", "n_inf", "avg_sample_len", "loss_pt_avg", "loss_pt_std", "loss_sum_avg", "loss_sum_std", "adv_factor",
    "win_rate", "win_abs_rate", "win_total", "win_matrix_row", "weight",
}  # fmt: skip
"""Every field of former years but intermediate_size, which no record has."""


@pytest.fixture(scope="module")
def logged():
    record = round_record(7200, TABLE, {"ann": 7000, "ben": 7100, "gone": 7150}, others=[refused("cat", 7050)])
    return record, step_log(record, UIDS, now=1.7e9, step_s=12.5)


def test_a_step_has_the_fields_of_former_years(logged):
    record, step = logged
    assert set(step) == {"time", "block", "step_time", "uid_data", "weight_data", "original_format_json"}
    assert (step["time"], step["block"], step["step_time"]) == (1.7e9, 7200, 12.5)
    whole = json.loads(step["original_format_json"])
    assert {"timestamp", "block", "uids", "competitions", "competition_info", "step_time", "uid_data"} == set(whole)
    assert whole["uids"] == [3, 7], "by uid; whoever is not registered or was refused has no place in it"
    assert whole["competition_info"]["c00"]["sample_lengths"] == [1000, 1001, 1002, 1003]
    for row in whole["uid_data"].values():
        assert set(row) >= OF_A_MODEL
    assert step["weight_data"] == {str(UIDS[h]): record.weights[0].by_hotkey.get(h, 0.0) for h in UIDS}


def test_the_figures_are_the_record_s(logged):
    record, step = logged
    ann, ben = (json.loads(step["original_format_json"])["uid_data"][uid] for uid in ("7", "3"))
    assert ann["losses"] == [1000.0, 900.0, 1200.0, None], "an infinite loss is null: JSON has no other word"
    assert (ann["n_samples"], ann["n_inf"], ann["avg_sample_len"]) == (4, 1, 1001.5)
    assert ann["loss_sum_avg"] == pytest.approx(3100 / 3)
    assert ann["loss_sum_std"] == pytest.approx(math.sqrt(sum((x - 3100 / 3) ** 2 for x in (1000, 900, 1200)) / 3))
    assert ann["loss_pt_avg"] == pytest.approx(3100 / 1000), "of 1,000 scored tokens"
    assert ben["loss_pt_avg"] == pytest.approx(3700 / 1000)
    assert step["uid_data"] == {"7": ann["loss_sum_avg"], "3": ben["loss_sum_avg"]}
    assert ben["win_matrix_row"]["7"] == 3, "lower on three of the four samples, also below ann's advantage"
    assert ann["win_matrix_row"]["3"] == 1
    assert ben["win_total"] == sum(ben["win_matrix_row"].values())
    scores = {s.hotkey: s for s in record.competitions["c00"].scores}
    assert (ben["win_rate"], ben["win_abs_rate"]) == (scores["ben"].win_rate, scores["ben"].win_rate_without_advantage)
    assert 0 < ann["adv_factor"] < 1, "percent"
    assert ann["n_parameters"] == 1_000_000


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb, an extra, is not installed")
def test_wandb_takes_it_offline(logged, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["sn29", "miner", "--hub.token", "tok-9988776655"])
    run = open_wandb("project", tmp_path, {"hotkey": "5Validator"})
    run.log(logged[1], step=7200)
    print("said on standard output")
    run.finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"original_format_json" in kept
    for secret in (b"tok-9988776655", b"said on standard output"):
        assert secret not in kept, "nothing is sent but what is logged"
