from __future__ import annotations

import math

import numpy as np
import pytest
from reference_vectors import REPOSITORY, cases, number
from test_deviations import SN9_DEVIATIONS

from sn29.records import Entry, Score
from sn29.rules.competition import parse_competition
from sn29.rules.pairwise_epsilon import competitive, epsilon_left, mean_losses, softmax
from sn29.rules.scoring import score
from sn29.rules.scoring_fields import Epsilon, PairwiseEpsilon

INF, NAN = math.inf, math.nan
SN9 = PairwiseEpsilon(epsilon=Epsilon(start=0.005, end=0.0005, blocks=50400), temperature=0.01)


def scored(losses, blocks, block=1_000_000, rule=SN9) -> dict[str, Score]:
    shipped = parse_competition("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
    entries = {hotkey: Entry(f"content of {hotkey}", b) for hotkey, b in blocks.items()}
    found = score(shipped.model_copy(update={"scoring": rule}), losses, entries, block, b"seed")
    return {s.hotkey: s for s in found.scores}


@pytest.mark.parametrize("case", cases("sn9_linear_decay"))
def test_epsilon_is_sn9s(case):
    epsilon = Epsilon(start=case["start"], end=case["end"], blocks=case["decay_blocks"])
    assert epsilon_left(case["age"], epsilon) == pytest.approx(case["expected"], rel=1e-12)


@pytest.mark.parametrize("case", cases("sn9_pairwise"))
@pytest.mark.parametrize("samples", [1, 3])
def test_wins_and_shares_are_sn9s(case, samples):
    """SN9's one number per model is a row of one sample, or the mean of several."""
    given, theirs = case["input"], case["expected"]
    epsilon = Epsilon(start=given["epsilon"][0], end=given["epsilon"][1], blocks=given["epsilon"][2])
    losses = {uid: [number(x)] if samples == 1 else [number(x) * f for f in (0.5, 1.0, 1.5)] for uid, x in given["score"].items()}
    rule = PairwiseEpsilon(epsilon=epsilon, temperature=given["temperature"])
    ours = scored(losses, given["blocks"], given["current_block"], rule)

    uids = list(given["score"])
    means = mean_losses(np.array([losses[uid] for uid in uids]))
    playing = [int(uids[row]) for row in competitive(means, [given["blocks"][uid] for uid in uids], epsilon)]
    without_unscored = [uid for uid in theirs["competitive_uids"] if number(given["score"][str(uid)]) < INF]
    assert playing == without_unscored
    assert (playing != theirs["competitive_uids"]) == (case["name"] in SN9_DEVIATIONS)
    for uid in uids:
        assert ours[uid].wins == theirs["wins"].get(uid, 0) - (case["name"] in SN9_DEVIATIONS and theirs["wins"].get(uid, 0))
        assert ours[uid].win_rate == pytest.approx(theirs["win_rate"].get(uid, 0))
        # SN9 gives e**(-1 / temperature) to whoever is registered; nobody gets it here: e**-100 = 3.7e-44, in float32 3.8e-44
        assert ours[uid].weight == pytest.approx(theirs["step_weights"][uid], rel=1e-6, abs=1e-43)
        assert (ours[uid].weight == 0) == (int(uid) not in playing)


def test_the_worked_example_of_the_module():
    losses = {"a": [2.3], "b": [2.295], "c": [2.2945]}
    block = 10_000_000
    blocks = {"a": block - 50_400, "b": block - 25_200, "c": block - 1000}
    ours = scored(losses, blocks, block)
    assert {h: round(s.advantage, 5) for h, s in ours.items()} == {"a": 0.9995, "b": 0.99725, "c": 0.99509}
    bars = [round(s.advantage * losses[h][0], 5) for h, s in ours.items()]
    assert bars == [2.29885, 2.28869, 2.28323]
    assert {h: (s.wins, s.win_rate) for h, s in ours.items()} == {"a": (0, 0), "b": (1, 1), "c": (0, 0)}
    assert ours["b"].weight == 1
    assert ours["a"].weight == pytest.approx(math.exp(-100))
    warm = scored(losses, blocks, block, SN9.model_copy(update={"temperature": 1.0}))
    assert {h: round(s.weight, 3) for h, s in warm.items()} == {"a": 0.269, "b": 0.731, "c": 0}


def test_who_was_not_scored_somewhere_has_no_mean():
    losses = {"a": [1.0, NAN, INF], "b": [2.0, 3.0, -1.0], "c": [2.1, 3.1, INF]}
    assert mean_losses(np.array(list(losses.values()))) == [INF, 2.5, 2.6]
    ours = scored(losses, {"a": 1, "b": 2, "c": 3})
    assert {h: s.weight for h, s in ours.items()} == {"a": 0, "b": 1, "c": 0}


def test_the_order_of_the_samples_does_not_matter_to_the_bit():
    rows = np.array([[1e16, 1.0, 1e-3, 7.0], [1.0, 1e16, 7.0, 1e-3]])
    assert len(set(mean_losses(rows))) == 1


def test_of_equal_models_of_one_block_one_stays_where_sn9_puts_both_out():
    ours = scored({"a": [2.0], "b": [2.0]}, {"a": 5, "b": 5})
    assert sorted((s.wins, s.win_rate, s.weight) for s in ours.values()) == [(0, 0, 0), (0, 1, 1)]
    assert competitive([2.0, 2.0005], [5, 5], SN9.epsilon) == competitive([2.0005, 2.0], [5, 5], SN9.epsilon) == (0,)
    assert competitive([2.0, 1.99], [5, 5], SN9.epsilon) == (1,)


def test_without_epsilon_the_plain_wins_show():
    """b is below a by 0.3 %, which is less than a's epsilon of 0.5 % and more than what it decays to."""
    ours = scored({"a": [2.0], "b": [1.994]}, {"a": 999_990, "b": 999_995})
    assert (ours["a"].win_rate, ours["b"].win_rate) == (1, 0)
    assert (ours["a"].win_rate_without_advantage, ours["b"].win_rate_without_advantage) == (0, 1)


def test_an_unscored_model_does_not_put_out_those_of_its_block():
    assert competitive([INF, 2.0], [5, 5], SN9.epsilon) == (1,)


def test_nobody_and_nothing():
    assert softmax({}, 0.01) == {}
    assert all(s.weight == 0 for s in scored({"a": [INF], "b": [NAN]}, {"a": 1, "b": 2}).values())
    assert scored({"a": [], "b": []}, {"a": 1, "b": 2})["a"].weight == 0
