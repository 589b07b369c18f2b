"""The study's statistics against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from sn29.training.packing_study import ARMS, COMPARED, CONTINUED
from sn29.training.study_results import (
    VIEWS,
    Interval,
    Question,
    Side,
    bootstrap,
    difference,
    loss_of,
    questions,
    studied,
    t_interval,
    t_quantile,
)

PARTS = ("single", "single_eos", "single_eos_first", "packed_rest", "packed_first", "packed_end")


def result(losses: dict[str, list[float]], tokens: list[int], *, arm: str = "packed", seed: int = 0, seconds: float = 2.0):
    """A finished run whose documents have these nats, the same in all views that are not named."""
    nats = {part: losses.get(part, losses["single"]) for part in PARTS}
    places = {view: {"nats": [3.0, 8.0], "tokens": [1, 4]} for view in ("single", "single_eos", "packed")}
    return {
        "run": {"kind": "tokens", "arm": arm, "seed": seed}, "steps": 1, "tokens": 100, "through": 125, "flop": 5000,
        "seconds": seconds, "evaluation": {"nats": nats, "tokens": dict.fromkeys(PARTS, tokens), "places": places},
        "curve": [{"tokens": 50, "held_out": {"single": 5.0, "single_eos": 6.0}}],
    }  # fmt: skip


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (100, 1.98397)])
def test_students_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)


def test_the_interval_over_seeds_is_the_worked_example():
    found = t_interval([5.0, 7.5, 2.5])
    half = 4.30265 * 2.5 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(5 - half, abs=1e-4), pytest.approx(5 + half, abs=1e-4))
    assert t_interval([5.0]) is None
    assert t_interval([2.0, 2.0]) == Interval(2.0, 2.0)


def test_the_bootstrap_of_two_documents_is_the_hand_counted_one():
    ones = np.ones(2)
    # Draws (2, 0), (1, 1), (0, 2) with chances 1/4, 1/2, 1/4 give -50, 0 and +50 %.
    found = bootstrap([(np.array([1.0, 3.0]), ones)], [(np.array([2.0, 2.0]), ones)])
    assert found == Interval(-50.0, 50.0)


def test_the_bootstrap_is_paired():
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(10, 500, 300).astype(float)
    nats = tokens * numbers.uniform(2, 6, 300)
    found = bootstrap([(1.02 * nats, tokens)], [(nats, tokens)])
    assert found.low == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0)


def test_the_bootstrap_covers_as_the_normal_law_does():
    numbers = np.random.default_rng(1)
    base, tokens = np.full(400, 100.0), np.full(400, 25.0)
    found = bootstrap([(base + numbers.normal(0, 4, 400), tokens)], [(base, tokens)])
    assert found.high - found.low == pytest.approx(2 * 1.96 * 4 / math.sqrt(400), rel=0.15)


def test_a_difference_is_taken_inside_a_seed():
    a = {0: result({"single": [42.0]}, [10]), 1: result({"single": [43.0]}, [10]), 2: result({"single": [41.0]}, [10]),
         9: result({"single": [1.0]}, [10])}  # fmt: skip
    b = {seed: result({"single": [40.0]}, [10]) for seed in range(3)}
    question = Question("modes", "?", Side("tokens", "masked", "single"), Side("tokens", "packed", "single"))
    found = difference(question, {("tokens", "masked"): a, ("tokens", "packed"): b})
    assert found.seeds == (0, 1, 2)
    assert found.each == (pytest.approx(5.0), pytest.approx(7.5), pytest.approx(2.5))
    assert found.percent == pytest.approx(5.0)
    assert found.over_documents == Interval(pytest.approx(5.0), pytest.approx(5.0))  # one document
    assert difference(question, {("tokens", "masked"): a}) is None


def test_views_add_up_their_parts():
    one = result({"single": [8.0, 4.0], "packed_rest": [9.0, 3.0], "packed_first": [7.0, 5.0]}, [2, 2])
    assert loss_of(one, "single") == 3.0
    assert loss_of(one, "packed") == (9 + 3 + 7 + 5) / 8


def head(**compute: int):
    return {"plan": {"tokens": 100, "device": "cpu"}, "compute_tokens": {"packed": 100, **compute}}


def test_equal_tokens_serve_as_equal_compute_where_they_are_the_same():
    runs = {("tokens", arm): {0: result({"single": [40.0]}, [10], arm=arm)} for arm in ("packed", "masked", "unpacked")}
    asked = {
        d.question.asks for d in studied(head(masked=100, unpacked=110), runs).differences if d.question.group == "equal compute"
    }
    assert asked == {"masked against packed, one by one", "masked against packed, on packed rows"}


def test_goals_are_met_by_intervals_and_not_by_means():
    def runs(masked: list[float]):
        same = {seed: result({"single": [40.0]}, [10], arm="packed", seed=seed) for seed in range(3)}
        other = {seed: result({"single": [m]}, [10], arm="masked", seed=seed, seconds=1.0) for seed, m in enumerate(masked)}
        return {("tokens", "packed"): same, ("tokens", "unpacked"): same, ("tokens", "masked"): other}

    clear = [goal.met for goal in studied(head(), runs([39.0, 39.1, 38.9])).goals]
    assert clear == [True, True, True, True]
    noisy = [goal.met for goal in studied(head(), runs([39.9, 41.0, 38.0])).goals]
    assert noisy[:2] == [None, False]  # the upper end is far above the margin: nobody knows
    level = [goal.met for goal in studied(head(), runs([40.01, 39.99, 40.0])).goals]
    assert level[:2] == [True, False]
    worse = [goal.met for goal in studied(head(), runs([41.0, 41.1, 40.9])).goals]
    assert worse[:2] == [False, False]
    slightly = [goal.met for goal in studied(head(), runs([40.02, 40.03, 40.02])).goals]
    assert slightly[:2] == [False, False]  # clear of zero, though below the margin


def test_one_seed_says_nothing_of_losses():
    one = {
        ("tokens", arm): {0: result({"single": [nats] * 2}, [10, 10], arm=arm)}
        for arm, nats in (("packed", 40.0), ("unpacked", 40.0), ("masked", 30.0), ("unpacked-mixed", 30.0))
    }
    goals = studied(head(), one).goals
    assert [goal.met for goal in goals[:3]] == [None, None, None]
    assert all("one seed; over documents" in goal.found for goal in goals[:3])
    assert "unpacked-mixed" in goals[1].asks


def test_means_are_of_the_seeds_that_all_arms_have():
    """Seed 1 is dear and slow, and only `packed` has it."""
    dear = result({"single": [80.0]}, [10], arm="packed", seed=1, seconds=100.0)
    runs = {
        ("tokens", "packed"): {0: result({"single": [40.0]}, [10], arm="packed"), 1: dear},
        ("tokens", "masked"): {0: result({"single": [40.0]}, [10], arm="masked")},
        ("half", "packed"): {0: result({"single": [40.0]}, [10], arm="packed")},
    }
    study = studied(head(), runs)
    assert {(cell.arm, cell.seeds, cell.loss) for cell in study.cells if cell.view == "single"} == {
        ("packed", (0,), 4.0), ("masked", (0,), 4.0)
    }  # fmt: skip
    assert [(t.arm, t.seeds, t.tokens_per_second, t.against) for t in study.throughput] == [
        ("packed", (0,), 50.0, 1.0), ("masked", (0,), 50.0, 1.0)
    ]  # fmt: skip


def test_what_is_not_known_is_null_for_machines():
    study = studied(head(), {("tokens", "masked"): {0: result({"single": [40.0]}, [10], arm="masked")}})
    assert study.throughput[0].against is None
    json.dumps(asdict(study), allow_nan=False)


def test_throughput_and_places_come_from_the_runs():
    runs = {
        ("tokens", "packed"): {s: result({"single": [40.0]}, [10], arm="packed", seed=s) for s in (0, 1)},
        ("tokens", "unpacked"): {s: result({"single": [40.0]}, [10], arm="unpacked", seed=s, seconds=4.0) for s in (0, 1)},
    }
    study = studied(head(), runs)
    packed, unpacked = study.throughput
    assert (packed.tokens_per_second, unpacked.tokens_per_second, unpacked.against) == (50.0, 25.0, 0.5)
    assert (packed.fill, packed.flop_per_token) == (0.8, 50.0)
    first, second = study.places["single"]
    assert (first.first, first.last, first.losses["packed"]) == (1, 1, 3.0)
    assert (second.first, second.last, second.losses["packed"]) == (2, 3, 2.0)
    assert second.differences["packed"][0] == 0.0
    assert {(c.arm, c.losses) for c in study.curves} == {("packed", (5.0,)), ("unpacked", (5.0,))}


def test_every_question_names_what_is_run_and_read():
    asked = questions()
    assert len({(q.group, q.asks) for q in asked}) == len(asked)
    groups = {q.group for q in asked}
    assert groups == {"modes", "terms", "start token", "equal compute", "packed first, then", "learning rate"}
    for arm in CONTINUED:  # each of them against stopping and, but itself, against going on packed
        against = {q.b.kind for q in asked if q.a.kind == "continued" and q.a.arm == arm}
        assert against == ({"tokens"} if arm == "packed" else {"tokens", "continued"})
    for q in asked:
        assert {q.a.arm, q.b.arm} <= ARMS.keys()
        assert {q.a.view, q.b.view} <= VIEWS.keys()
        assert all(side.arm in COMPARED for side in (q.a, q.b) if side.kind == "compute")
