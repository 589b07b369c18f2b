"""The step log of Weights & Biases has the fields that operators know, from a round's record."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import refused, round_record

from sn29.records import Weights
from sn29.round_record import RoundRecord
from sn29.step_log import MAX_HELD, HeldSteps, step_log
from sn29.store import ChainSeen, Store
from sn29.telemetry import Curves, heard_by

ROOT = Path(__file__).parents[1]
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


def finished(store: Store, held: HeldSteps, block: int, paid: bool = True) -> RoundRecord:
    """A round that is held back as soon as it has ended."""
    record = round_record(block, TABLE, {"ann": 7000, "ben": 7100, "gone": 7150})
    record = replace(record, weights={0: Weights(block, {"ann": 1.0} if paid else {})})
    store.open_round(block, {})
    store.finish_round(block, record, record.weights)
    held.hold(record, step_log(record, UIDS, now=1.7e9, step_s=12.5))
    held.show()
    return record


def test_a_step_waits_until_the_chain_shows_its_weights(tmp_path):
    """As the pages do; by the order of rounds, and beyond a restart."""
    with closing(Store(tmp_path / "store.db")) as store:
        sent: list[tuple[int, int]] = []

        def log(values, step, done):
            sent.append((values["block"], step))
            done(True)

        held = HeldSteps(tmp_path / "held", store, log)
        held.show()
        first = finished(store, held, 7200)
        for reveal_epochs in (None, 1):  # nobody has asked; concealed
            store.keep_chain_seen(ChainSeen(7210, 0.0, 12.0, 360, reveal_epochs))
            held.show()
            assert sent == []
        finished(store, held, 7560)
        finished(store, held, 7920, paid=False)
        store.keep_publication(7600, first.weights[0])
        held.show()
        assert sent == [(7200, 7200)]
        second = HeldSteps(tmp_path / "held", store, log)
        (tmp_path / "held" / f"{7000:012d}.json").write_text("")  # cut short
        second.show()
        assert sent == [(7200, 7200)], "none twice; and one of a round that pays nobody waits for those before it"
        store.keep_chain_seen(ChainSeen(7930, 0.0, 12.0, 360, 0))
        second.show()
        assert sent == [(block, block) for block in (7200, 7560, 7920)]
        finished(store, second, 8280)
        assert sent[-1] == (8280, 8280), "set in the open: at once"
        assert list((tmp_path / "held").iterdir()) == []


def test_a_step_is_kept_until_it_is_logged_and_the_next_one_waits_for_it(tmp_path):
    """Weights & Biases drops a step that comes after a later one."""
    with closing(Store(tmp_path / "store.db")) as store:
        asked = []
        held = HeldSteps(tmp_path / "held", store, lambda values, step, done: asked.append((step, done)))
        store.keep_chain_seen(ChainSeen(7210, 0.0, 12.0, 360, 0))
        for block in (7200, 7560):
            finished(store, held, block)
        held.show()
        assert [step for step, _ in asked] == [7200], "it is on its way"
        asked[-1][1](False)
        assert len(list((tmp_path / "held").iterdir())) == 2
        held.show()
        assert [step for step, _ in asked] == [7200, 7200], "wandb did not take it"
        asked[-1][1](True)
        assert [path.name for path in (tmp_path / "held").iterdir()] == [f"{7560:012d}.json"]
        HeldSteps(tmp_path / "held", store, lambda values, step, done: asked.append((step, done))).show()
        held.show()
        assert [step for step, _ in asked] == [7200, 7200, 7560, 7560], "also by another process, when ours has ended"


def test_no_more_steps_are_held_than_some_weeks_have(tmp_path):
    record = round_record(7200, TABLE, {"ann": 7000, "ben": 7100, "gone": 7150})
    events = []
    with closing(Store(tmp_path / "store.db")) as store, heard_by(events.append):
        held = HeldSteps(tmp_path / "held", store, lambda values, step, done: None)
        held.hold(record, {})
        for block in range(MAX_HELD + 1):
            (tmp_path / "held" / f"{block:012d}.json").write_text("{}")
        held.hold(record, {})
    kept = sorted(int(path.stem) for path in (tmp_path / "held").glob("*.json"))
    assert kept == [*range(2, MAX_HELD + 1), 7200], "the newest"
    assert [(e.event, e.fields["dropped"]) for e in events if e.level == "WARNING"] == [("wandb", 2)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb, an extra, is not installed")
def test_wandb_takes_it_offline(logged, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["sn29", "miner", "--hub.token", "tok-9988776655"])
    run = Curves("project", tmp_path, {"hotkey": "5Validator"})
    run.log(logged[1], step=7200)
    print("said on standard output")
    run.finish(60)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"original_format_json" in kept
    for secret in (b"tok-9988776655", b"said on standard output"):
        assert secret not in kept, "nothing is sent but what is logged"


WANDB = """
import os, threading
class UsageError(Exception): pass
class Settings:
    mode = "online"
    def __init__(self, **given): self.settings = self
class Run:
    def log(self, values, step):
        if os.environ["BAD"] == "log": raise RuntimeError("the service is gone")
        print("sent", step, flush=True)
    def finish(self):
        print("finished", flush=True)
        if os.environ["BAD"] == "finish": threading.Event().wait()
def setup(settings): return settings
def login(verify, prompt): return os.environ["BAD"] != "login"
def init(*, id, **_):
    print("opened", id, flush=True)
    if os.environ["BAD"] == "init": threading.Event().wait()
    return Run()
"""
"""A stand-in for a service that cannot be had here: each of its steps can fail or never return."""
PROGRAM = """
import sys
from pathlib import Path
from sn29 import telemetry
telemetry.configure()
curves = telemetry.Curves("project", Path(sys.argv[1]), {"hotkey": sys.argv[2]})
for step in (1, 2):
    curves.log({"x": 1}, step, lambda taken, step=step: print("taken" if taken else "lost", step, flush=True))
telemetry.tell("on", "the program goes on")
curves.finish(float(sys.argv[3]))
telemetry.tell("over", "it ends")
"""


def _with_wandb(bad: str, folder: Path, hotkey: str = "5Ann", within_s: float = 60) -> tuple[list[str], str]:
    """What was sent, and what was said. A wait that is no event's would be cut by the test's own limit."""
    (folder / "wandb.py").write_text(WANDB)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), hotkey, str(within_s)], capture_output=True, text=True, check=True,
        timeout=60, env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "BAD": bad},
    )  # fmt: skip
    assert " on " in done.stderr
    assert " over " in done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("bad", "steps", "warning"),
    [
        ("", ["opened", "sent", "taken", "sent", "taken", "finished"], ""),
        ("login", ["lost", "lost"], "UsageError: no API key"),
        ("log", ["opened", "lost", "lost"], "RuntimeError: the service is gone"),
    ],
)
def test_what_fails_at_wandb_is_one_warning_and_nothing_more(bad, steps, warning, tmp_path):
    sent, said = _with_wandb(bad, tmp_path)
    assert [line.split()[0] for line in sent] == steps
    assert said.count("WARNING") == bool(warning)
    assert warning in said


@pytest.mark.parametrize(("bad", "last"), [("init", "opened"), ("finish", "finished")])
def test_nobody_waits_for_a_wandb_that_does_not_answer(bad, last, tmp_path):
    sent, said = _with_wandb(bad, tmp_path, within_s=3)
    assert sent[-1].split()[0] == last
    assert "not all was sent within 3 s" in said


def test_validators_in_equal_containers_have_runs_of_their_own(tmp_path):
    runs = {hotkey: _with_wandb("", tmp_path, hotkey)[0][0] for hotkey in ("5Ann", "5Ben")}
    assert runs["5Ann"] != runs["5Ben"]
    assert _with_wandb("", tmp_path, "5Ann")[0][0] == runs["5Ann"], "which go on"
