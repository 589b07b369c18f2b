"""The simulation of stopping, in small: the world it states, both ways of measuring on the same numbers, and its verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sn29 import stopping
from sn29.errors import Rejected
from sn29.rules.competition import parse_competition
from sn29.rules.scoring_fields import Champion, OldestHolder
from sn29.stopping import Challenger, Plan, Season

ROOT = Path(__file__).parents[1]
BASE = parse_competition("c00", (ROOT / "competitions" / "c00.yaml").read_text())
FULL = BASE.model_copy(update={"scoring": Champion(stop_error_rate=0)})
SMALL = Plan(runs=2, windows=3, samples=600, seed=29)


@pytest.mark.parametrize("heavy", [False, True])
def test_losses_are_the_holders_times_a_ratio_of_the_stated_size(heavy):
    plan = Plan(1, 1, 200_000, 29)
    holder, row = stopping._losses([Challenger(0.01, 0.015, heavy)], plan, 0, 0)
    ratio = np.log(row / holder)
    assert ratio.mean() == pytest.approx(0.01, abs=4 * 0.015 / 200_000**0.5)
    assert ratio.std() == pytest.approx(0.015, rel=0.1)
    assert (np.abs(ratio - 0.01).max() > 0.15) == heavy
    assert not np.array_equal(row, stopping._losses([Challenger(0.01, 0.015, heavy)], plan, 1, 0)[1])


def test_a_hopeless_challenger_is_measured_in_full_or_stopped():
    assert stopping.play(FULL, [Challenger(0.05)], SMALL, 0) == Season(({"challenger0": 600},) * 3, "")
    season = stopping.play(BASE, [Challenger(0.05)], SMALL, 0)
    assert [m["challenger0"] for m in season.measured] == [32, 16, 16]
    assert season.winner == ""


def test_who_is_better_wins_at_the_same_moment_in_both_ways():
    for run in range(3):
        full, short = (stopping.play(c, [Challenger(-0.01)], SMALL, run) for c in (FULL, BASE))
        assert full == short
        assert full.winner == "challenger0"


def test_a_mixed_round_is_decided_alike_with_half_of_the_samples():
    for run in range(2):
        full, short = (stopping.play(c, stopping.MIXED, Plan(2, 6, 1500, 29), run) for c in (FULL, BASE))
        assert (full.winner, len(full.measured)) == (short.winner, len(short.measured)) == ("challenger7", len(full.measured))
        assert sum(short.measured[0].values()) < sum(full.measured[0].values()) / 2


def test_seasons_are_summed_up():
    plan = Plan(runs=4, windows=2, samples=1000, seed=1)
    full = Season(({"challenger0": 1000}, {"challenger0": 1000}), "challenger0")
    pairs = [
        (full, full),
        (full, Season(({"challenger0": 1000}, {"challenger0": 64}), "")),
        (Season(full.measured, ""), Season(({"challenger0": 128}, {"challenger0": 16}), "")),
        (Season(full.measured, ""), Season(({"challenger0": 64}, {"challenger0": 16}), "")),
    ]
    row = stopping._row(Challenger(0.0), pairs, plan)
    assert (row.stopped, row.median, row.wins, row.wrongly, row.other) == (0.5, 96, 0.5, 0.25, 0.25)
    assert row.saved == pytest.approx(1 - (2000 + 1064 + 144 + 80) / 8000)
    mixed = stopping._mixed(pairs, plan)
    assert mixed.first == pytest.approx(1 - (4000 + 1000 + 1000 + 128 + 64) / 8000)


def test_goals_are_met_or_not():
    def met(**changes: float | None) -> list[bool]:
        values = {"stopped": 1.0, "median": 128.0, "wins": 1.0, "wrongly": 0.02, "other": 0.02, "saved": 0.9, **changes}
        return [goal[2] for goal in stopping._goals([stopping.Row(Challenger(0.01), **values)], 0.02)]

    assert met() == [True, True, True]
    assert met(median=192) == met(stopped=0.5) == met(median=None) == [False, True, True]
    assert met(wrongly=0.03) == [True, False, True]
    assert met(other=0.03) == [True, True, False]


def test_what_cannot_be_played_is_refused():
    for competition in (FULL, BASE.model_copy(update={"scoring": OldestHolder()})):
        with pytest.raises(Rejected, match="stop_error_rate above 0"):
            stopping.simulate(competition, SMALL)
    with pytest.raises(Rejected, match="at least 1"):
        Plan(0, 1, 1, 1)


def test_the_command():
    command = [sys.executable, "-m", "sn29.cli", "simulate", "sequential", "--runs", "2", "--windows", "2", "--samples", "600"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    told = json.loads(done.stdout)
    assert done.returncode == (0 if all(goal[2] for goal in told["goals"]) else 1), done.stderr
    assert told["plan"]["samples"] == 600
    assert len(told["rows"]) == len(stopping.GAPS) * len(stopping.NOISES)
    worst = next(r for r in told["rows"] if r["challenger"] == {"gap": 0.05, "sd": 0.015, "heavy": False})
    assert (worst["stopped"], worst["median"]) == (1.0, 32)
    shown = subprocess.run([*command, "--runs", "1"], capture_output=True, text=True, cwd=ROOT)
    assert "-5.00%" in shown.stdout
    assert "samples saved in a round" in shown.stdout
