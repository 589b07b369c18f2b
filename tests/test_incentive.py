"""The simulation of attacks, in small: its world is the one it states, and its verdicts follow from its runs."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sn29 import incentive
from sn29.errors import Reason, Rejected
from sn29.incentive import HONEST_SD, Claim, Model, Plan, Run, Scene, Summary
from sn29.rules.competition import Competition, parse_competition

ROOT = Path(__file__).parents[1]
BASE = parse_competition("c00", (ROOT / "competitions" / "c00.yaml").read_text())
SMALL = Plan(runs=2, days=2, samples=200, seed=29)


def scene(name: str, days: int = 30) -> Scene:
    (found,) = [s for s in incentive.scenes(days) if s.name == name]
    return found


def rule(name: str) -> Competition:
    (found,) = incentive.chosen_rules(BASE, name)
    return found


# ---- the world -------------------------------------------------------------------------------------------------------


def test_every_scene_has_a_name_of_its_own_and_somebody_to_watch():
    everything = incentive.scenes(30)
    assert len({s.name for s in everything}) == len(everything)
    for s in everything:
        assert s.watched <= {claim.hotkey for claim in s.claims}
        assert s.watched or s.kind == "agreement"
        assert all(claim.model < len(s.models) for claim in s.claims)
        assert s.models[0].parent is None


def test_losses_are_the_parents_times_a_lognormal_ratio():
    models = (Model(parent=None), Model(-0.003, 0.015), Model(0.0, 0.001, parent=1), Model(sd=0.0))
    played = Scene("t", "copies", models, (), frozenset())
    losses = incentive._losses(played, [0, 1, 2, 3], replace(SMALL, samples=100_000), run=0, window=1)
    better, copy = np.log(losses[1] / losses[0]), np.log(losses[2] / losses[1])
    assert better.mean() == pytest.approx(-0.003, abs=4 * 0.015 / 100_000**0.5)
    assert better.std() == pytest.approx(0.015, rel=0.02)
    assert copy.mean() == pytest.approx(0.0, abs=4 * 0.001 / 100_000**0.5)
    assert copy.std() == pytest.approx(0.001, rel=0.02)
    assert abs(np.corrcoef(better, copy)[0, 1]) < 0.02
    assert np.array_equal(losses[3], losses[0])
    tokens = losses[0] / np.exp(np.log(losses[0] / incentive.NATS_PER_TOKEN).mean())
    assert np.log(tokens).std() == pytest.approx(0.8, abs=0.05)


def test_a_window_is_the_same_whoever_stands_in_it_first_and_another_one_in_the_next_run():
    s = scene("6 copies, sd 1.00%")
    first = incentive._losses(s, [0, 1, 2], SMALL, run=0, window=3)
    assert all(np.array_equal(first[p], row) for p, row in incentive._losses(s, [0, 1, 2], SMALL, 0, 3).items())
    assert not np.array_equal(first[0], incentive._losses(s, [0, 1, 2], SMALL, 1, 3)[0])
    assert not np.array_equal(first[0], incentive._losses(s, [0, 1, 2], replace(SMALL, seed=30), 0, 3)[0])


def test_each_validator_measures_a_content_once_and_a_thousandth_off():
    s = scene("6 copies, sd 1.00%")
    plan = replace(SMALL, samples=20_000)
    losses = incentive._losses(s, [0, 1], plan, 0, 1)
    seen = [incentive._with_noise(losses, s, plan, 0, 1, validator) for validator in range(2)]
    for place, row in losses.items():
        assert (seen[0][place] / row - 1).std() == pytest.approx(1e-3, rel=0.05)
        assert not np.array_equal(seen[0][place], seen[1][place])


def test_the_newest_claim_from_before_the_block_stands():
    claims = (Claim("a", -1, 0), Claim("a", 1.0, 1), Claim("b", 0.0, 2))
    s = Scene("t", "copies", (Model(parent=None), Model(), Model()), claims, frozenset({"b"}))
    at = incentive.START_BLOCK
    assert {h: c.model for h, c in incentive._standing(s, at).items()} == {"a": 0}
    assert {h: c.model for h, c in incentive._standing(s, at + 1).items()} == {"a": 0, "b": 2}
    assert {h: c.model for h, c in incentive._standing(s, at + 7200).items()} == {"a": 0, "b": 2}
    assert {h: c.model for h, c in incentive._standing(s, at + 7201).items()} == {"a": 1, "b": 2}


def test_vtrust_is_the_weight_that_the_median_shares():
    assert incentive.vtrust([{"a": 1.0}, {"a": 1.0}, {"b": 1.0}]) == [1.0, 1.0, 0.0]
    assert incentive.vtrust([{"a": 0.7, "b": 0.3}, {"a": 0.6, "b": 0.4}, {"a": 0.5, "b": 0.5}]) == pytest.approx([0.9, 1.0, 0.9])
    assert incentive.vtrust([{}, {}]) == [0.0, 0.0]


# ---- what the rules do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oldest_holder", "pairwise_epsilon", "champion"])
def test_a_copy_of_the_same_content_gets_nothing_and_a_much_better_model_wins(name):
    plan = Plan(runs=2, days=1, samples=1500, seed=29, windows_per_day=4)
    copies, better = scene("6 copies, same content"), scene("1.00% better than 30 d old")
    result = incentive.simulate([rule(name)], [copies, better], plan, workers=1)
    paid, race = result.summaries
    assert (paid.runs, paid.race, race.race) == (2 if name == "champion" else 1, False, True)
    assert race.won_by(1) == 1.0
    if name != "pairwise_epsilon":  # it shares among equals: that is what the simulation is to show
        assert paid.worst == 0.0


def test_noisy_copies_take_most_from_the_oldest_holder_and_nothing_from_the_champion():
    plan = Plan(runs=3, days=1, samples=1500, seed=29)
    result = incentive.simulate([rule("oldest_holder"), rule("champion")], [scene("6 copies, sd 2.00%")], plan, workers=1)
    shares = {s.rule: s.mean for s in result.summaries}
    assert shares["oldest_holder"] > 0.8
    assert shares["champion"] < 0.01


def test_five_validators_are_compared():
    plan = Plan(runs=1, days=1, samples=300, seed=29, windows_per_day=2)
    (summary,) = incentive.simulate([rule("champion")], [scene("five validators")], plan, workers=1).summaries
    assert 0.5 < summary.mean <= 1.0
    assert 0.0 <= summary.worst <= summary.mean


def test_the_same_seed_gives_the_same_figures_with_any_number_of_workers():
    chosen = [scene("6 copies, sd 1.00%"), scene("0.60% better than 30 d old")]
    rules = [rule("oldest_holder"), rule("champion")]
    plan = replace(SMALL, runs=3, windows_per_day=2)
    told: list[tuple[int, int]] = []
    one = incentive.simulate(rules, chosen, plan, 1, lambda done, of: told.append((done, of)))
    assert told == [(done, 8) for done in range(1, 9)]  # champion 3 runs each, the one without memory a quarter
    assert incentive.simulate(rules, chosen, plan, 2) == one
    assert incentive.simulate(rules, chosen, replace(plan, seed=30), 1).summaries != one.summaries


# ---- from runs to verdicts -------------------------------------------------------------------------------------------


def test_runs_are_summed():
    s = scene("1 copy, sd 1.00%", days=2)
    days = (0.5, 1.0, 1.5, 2.0)
    runs = [Run(s.name, "champion", (0.0, 0.0, 0.0, 0.008), days), Run(s.name, "champion", (0.0, 0.1, 0.1, 0.2), days)]
    summary = incentive.summed(s, "champion", runs, days=2)
    assert summary.mean == pytest.approx((0.002 + 0.1) / 2)
    assert summary.worst == pytest.approx(0.1)
    assert summary.below == 0.5
    assert summary.daily == pytest.approx((0.05, 0.104))


def test_races_are_summed_over_those_that_end():
    s = incentive.improvement(0.003, 7, HONEST_SD)
    runs = [Run(s.name, "champion", (1.0,), (0.05,), won) for won in (0.05, 0.1, 1.0, None)]
    summary = incentive.summed(s, "champion", runs, days=3)
    assert summary.daily == (0.75, 0.75, 0.75)
    assert (summary.median_days, summary.most_days) == (0.1, None)
    assert (summary.won_by(1), summary.won_by(7)) == (0.75, 0.75)


def test_goals_are_met_or_not():
    def summary(name: str, kind: str, below: float = 1.0, daily: tuple[float, ...] = (), mean: float = 0.0) -> Summary:
        return Summary(name, kind, bool(daily), "champion", 100, mean, 0.0, below, daily)

    def met(*summaries: Summary) -> list[bool]:
        return [goal.met for goal in incentive.goals(summaries)]

    assert met(summary("a", "copies"), summary("b", "renewed copies", below=0.98)) == [False]
    assert met(summary("a", "copies"), summary("b", "renewed copies", below=0.99)) == [True]
    quick, slow = (incentive.improvement(gain, 30, HONEST_SD).name for gain in (0.003, 0.0015))
    assert met(summary(quick, "improvement", daily=(0.95, 1.0)), summary(slow, "improvement", daily=(0.0,) * 6 + (0.94,))) == [
        True,
        False,
    ]
    assert met(summary("five validators", "agreement", mean=0.995)) == [True]
    assert met(summary("five validators", "agreement", mean=0.9949)) == [False]
    assert met(replace(summary("a", "copies", below=0.0), rule="oldest_holder")) == []


def test_scenes_and_rules_are_chosen_by_name():
    assert {s.kind for s in incentive.chosen_scenes("copies", 2)} == {"copies"}
    assert [s.name for s in incentive.chosen_scenes("sd 0.01%, 60", 2)] == ["6 copies, sd 0.01%, 60 d old"]
    with pytest.raises(Rejected, match="spoilers") as refused:
        incentive.chosen_scenes("nothing of the kind", 2)
    assert refused.value.reason is Reason.SETTING
    assert [c.scoring.rule for c in incentive.chosen_rules(BASE, "all")] == ["oldest_holder", "pairwise_epsilon", "champion"]
    with pytest.raises(Rejected, match="champion"):
        incentive.chosen_rules(BASE, "best")


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"days": 0}, {"samples": 0}, {"windows_per_day": 0}, {"windows_per_day": 7}])
def test_a_plan_that_cannot_be_played_is_refused(wrong):
    with pytest.raises(Rejected):
        replace(SMALL, **wrong)


# ---- for people ------------------------------------------------------------------------------------------------------


def test_the_picture_is_the_same_for_the_same_result_and_its_text_stays_text():
    chosen = [s for s in incentive.scenes(2) if s.name in dict(incentive.PICTURED)]
    assert len(chosen) == len(incentive.PICTURED)
    result = incentive.simulate([rule("oldest_holder")], chosen, SMALL, workers=1)
    drawn = incentive.picture(result)
    assert drawn == incentive.picture(result)
    words = {node.text for node in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert {title for _, title in incentive.PICTURED} <= words


def test_the_command(tmp_path):
    def sn29(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sn29.cli", "simulate", "incentive", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    small = ("--days", "1", "--runs", "2", "--samples", "200", "--windows-per-day", "1", "--workers", "1")
    done = sn29("--attack", "6 copies, sd 0.10%", "--rule", "champion", *small, "--picture", str(tmp_path / "p.svg"))
    assert done.returncode == 0, done.stderr
    assert "6 copies, sd 0.10%, 60 d old" in done.stdout
    assert "pass" in done.stdout
    assert ET.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    done = sn29("--attack", "0.15% better than 0 d old", "--rule", "champion", *small, "--json")
    told = json.loads(done.stdout)
    assert [g["met"] for g in told["goals"]] == [done.returncode == 0]
    assert told["plan"]["samples"] == 200
    assert sn29("--rule", "best").returncode == 1
