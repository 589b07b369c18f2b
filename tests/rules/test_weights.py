from __future__ import annotations

import hashlib
import math

import pytest
from reference_vectors import cases, only
from test_deviations import FAME_DEVIATIONS, WEIGHT_DEVIATIONS

from sn29.errors import Rejected
from sn29.records import Score, Weights
from sn29.rules.competition import HallOfFame, HallOfFameEntry, WhenEmpty, parse_hall_of_fame
from sn29.rules.weights import combine, hall_of_fame_shares

SHARES = {"c00": 0.5, "c01": 0.5}


def hotkey(name: str) -> str:
    """A well-formed hotkey for a short name; hotkeys stay as they are."""
    if len(name) == 48:
        return name
    letters = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    return "5" + "".join(letters[b % 58] for b in hashlib.sha512(name.encode()).digest()[:47])


def fame(*entries: tuple[str, int, float], max_fraction: float = 0.4) -> HallOfFame:
    found = [HallOfFameEntry(hotkey=hotkey(h), block=b, reward_epochs=r, reason="a test") for h, b, r in entries]
    return HallOfFame(max_fraction=max_fraction, decay_per_epoch=0.995, blocks_per_epoch=361, entries=tuple(found))


def result(**weights: float) -> list[Score]:
    return [Score(hotkey(h), w, w, w, 0.996, w) for h, w in weights.items()]


def after(scores, last=None, hall=None, shares=None, block=1000, **rest) -> dict[str, float]:
    everybody = [hotkey(name) for name in "abcdefghi"] + [hotkey(f"h{n}") for n in range(10)]
    shares = shares or SHARES
    return dict(combine(shares, scores, hall or fame(), last, block, rest.pop("registered", everybody), **rest).by_hotkey)


# ---- against the reference -------------------------------------------------------------------------------------------


def fame_of(given: dict) -> dict[str, float]:
    entries = [(h, e["block"], e["reward"]) for h, found in given["hall_of_fame"].items() for e in found]
    hall = fame(*entries, max_fraction=given["rewards_max_fraction"])
    return hall_of_fame_shares(hall, given["current_block"], [hotkey(h) for h in given["hotkeys"]])


@pytest.mark.parametrize("case", cases("hall_of_fame", leave_out=FAME_DEVIATIONS))
def test_the_hall_of_fame_pays_what_the_reference_pays(case):
    given, theirs = case["input"], case["expected"]
    ours = fame_of(given)
    assert ours == pytest.approx({hotkey(given["hotkeys"][int(uid)]): w for uid, w in theirs["reward_weights"].items()}, rel=1e-6)
    assert math.fsum(ours.values()) == pytest.approx(theirs["reward_sum"], rel=1e-6)


@pytest.mark.parametrize("case", only("hall_of_fame", {"future_block_grows_max0.4": ""}))
def test_a_reward_that_is_still_to_come_pays_nothing_yet(case):
    assert case["expected"]["reward_sum"] > 0.005  # what a fresh one pays
    assert fame_of(case["input"]) == {}


@pytest.mark.parametrize("case", only("hall_of_fame", {"bad_entry_keeps_earlier_max1.0": ""}))
def test_an_entry_without_a_block_refuses_the_file(case):
    [bad] = [e for e in case["input"]["hall_of_fame"]["A"] if "block" not in e]
    text = (
        f"max_fraction: 1.0\ndecay_per_epoch: 0.995\nblocks_per_epoch: 361\n"
        f"entries:\n  - {{hotkey: {hotkey('A')}, reward_epochs: {bad['reward']}, reason: a fix}}\n"
    )
    with pytest.raises(Rejected, match="block"):
        parse_hall_of_fame(text)


def weights_of(given: dict) -> dict[str, float]:
    name = given["hotkeys"]
    scores = {c: result(**{name[int(uid)]: w for uid, w in found.items()}) for c, found in given["uids_weight"].items()}
    entries = [(h, e["block"], e["reward"]) for h, found in given["hall_of_fame"].items() for e in found]
    previous = {hotkey(name[uid]): w for uid, w in enumerate(given["previous_weights"]) if w}
    return after(
        scores,
        last=Weights(0, previous) if previous else None,
        hall=fame(*entries, max_fraction=given["rewards_max_fraction"]),
        shares=given["competition_reward"],
        block=given["current_block"],
        keep=given["ema_alpha_old"],
    )


@pytest.mark.parametrize("case", cases("update_weights", leave_out=WEIGHT_DEVIATIONS))
def test_weights_are_the_references(case):
    given = case["input"]
    theirs = {hotkey(given["hotkeys"][int(uid)]): w for uid, w in case["expected"].items()}
    assert weights_of(given) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("case", only("update_weights", WEIGHT_DEVIATIONS))
def test_a_hotkey_in_two_competitions_is_paid_by_both(case):
    assert case["expected"] == {"1": 0.5, "2": 0.5}
    assert weights_of(case["input"]) == pytest.approx({hotkey("h1"): 0.75, hotkey("h2"): 0.25})


# ---- the rules, by themselves ----------------------------------------------------------------------------------------


def test_the_unit_of_a_reward_is_the_emission_of_one_epoch():
    hall, paid = fame(("a", 1000, 0.2)), 0.0
    for epoch in range(4000):
        paid += hall_of_fame_shares(hall, 1000 + 361 * epoch, [hotkey("a")])[hotkey("a")]
    assert paid == pytest.approx(0.2, rel=1e-6)
    assert hall_of_fame_shares(fame(("a", 1000, 1)), 1000, [hotkey("a")]) == pytest.approx({hotkey("a"): 0.005})


def test_an_entry_pays_from_its_block_on():
    hall, paid_to = fame(("a", 1000, 1)), [hotkey("a")]
    assert hall_of_fame_shares(hall, 999, paid_to) == {}
    fresh, next_block = (hall_of_fame_shares(hall, block, paid_to)[hotkey("a")] for block in (1000, 1001))
    assert fresh > next_block > 0


def test_two_entries_of_one_hotkey_add_up():
    hall = fame(("a", 1000, 0.2), ("a", 1361, 1.0))
    assert hall_of_fame_shares(hall, 1361, [hotkey("a")]) == pytest.approx({hotkey("a"): 0.005995})


@pytest.mark.parametrize("scores", [{}, {"c00": []}, {"c00": result(a=0.0, b=0.0), "c01": []}])
def test_a_round_in_which_nobody_scored_keeps_the_last_weights(scores):
    last = Weights(500, {hotkey("a"): 0.25, hotkey("b"): 0.75})
    assert combine(SHARES, scores, fame(("h9", 1000, 1e9)), last, 1000, [hotkey("a"), hotkey("h9")]) is last
    assert after(scores) == {}
    assert after(scores, last=Weights(500, {})) == {}


# ---- a competition without a valid model -----------------------------------------------------------------------------

HOLD, BURN = WhenEmpty("hold"), WhenEmpty("burn", hotkey("h9"))
C00_ONLY = {"c00": result(a=1.0), "c01": []}
LAST = Weights(500, {hotkey("a"): 0.2, hotkey("b"): 0.8})


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (WhenEmpty(), {"a": 0.6, "b": 0.4}),
        (HOLD, {"a": 0.4, "b": 0.6}),
        (BURN, {"a": 0.35, "b": 0.4, "h9": 0.25}),
    ],
)
def test_the_share_of_an_empty_competition_goes_where_the_file_says(policy, expected):
    ours = after(C00_ONLY, last=LAST, when_empty={"c01": policy})
    assert ours == pytest.approx({hotkey(name): w for name, w in expected.items()})


@pytest.mark.parametrize(("policy", "rest"), [(HOLD, {"last": None}), (WhenEmpty("burn", "nobody"), {})])
def test_what_cannot_be_held_or_burned_is_shared(policy, rest):
    assert after(C00_ONLY, when_empty={"c01": policy}, **rest) == {hotkey("a"): 1.0}


def test_a_competition_that_has_a_winner_burns_nothing():
    both = {"c00": result(a=1.0), "c01": result(b=1.0)}
    assert after(both, when_empty={"c00": BURN, "c01": HOLD}) == pytest.approx({hotkey("a"): 0.5, hotkey("b"): 0.5})


def test_a_winner_who_is_no_longer_registered_leaves_the_competition_empty():
    scores = {"c00": result(a=1.0), "c01": result(gone=1.0)}
    ours = after(scores, when_empty={"c01": BURN}, registered=[hotkey("a"), hotkey("h9")])
    assert ours == pytest.approx({hotkey("a"): 0.5, hotkey("h9"): 0.5})


def test_an_empty_round_holds_everything_or_burns_what_the_file_says():
    assert after({}, last=LAST, when_empty={"c00": HOLD, "c01": HOLD}) == dict(LAST.by_hotkey)
    burned = after({}, last=LAST, when_empty={"c01": BURN})
    assert burned == pytest.approx({hotkey("a"): 0.1, hotkey("b"): 0.4, hotkey("h9"): 0.5})
    held = after({}, last=LAST, when_empty={"c00": HOLD, "c01": BURN})
    assert held == pytest.approx({hotkey("a"): 0.15, hotkey("b"): 0.6, hotkey("h9"): 0.25})


def test_a_burn_leaves_the_hall_of_fame_its_part():
    ours = after(C00_ONLY, hall=fame(("h8", 1000, 40)), when_empty={"c01": BURN})
    assert ours == pytest.approx({hotkey("a"): 0.4, hotkey("h9"): 0.4, hotkey("h8"): 0.2})


def test_a_hall_of_fame_that_takes_everything_needs_no_scores():
    hall = fame(("h9", 1000, 1e9), max_fraction=1.0)
    last = Weights(500, {hotkey("a"): 1.0})
    assert after({}, last=last, hall=hall) == pytest.approx({hotkey("a"): 0.5, hotkey("h9"): 0.5})
    assert after({"c00": result(a=1.0)}, hall=hall) == {hotkey("h9"): 1.0}


def test_the_hall_of_fame_is_capped_also_when_a_competition_has_no_winner():
    ours = after({"c00": result(a=1.0), "c01": []}, hall=fame(("h9", 1000, 1e9)))
    assert ours == pytest.approx({hotkey("a"): 0.6, hotkey("h9"): 0.4})


def test_a_winner_can_be_in_the_hall_of_fame_too():
    assert after({"c00": result(a=1.0)}, hall=fame(("a", 1000, 1))) == {hotkey("a"): 1.0}


def test_weights_move_half_of_the_way_in_a_round():
    last = Weights(500, {hotkey("a"): 1.0})
    for expected in (0.5, 0.75, 0.875):
        last = Weights(1000, after({"c00": result(b=1.0)}, last=last))
        assert last.by_hotkey[hotkey("b")] == pytest.approx(expected)


def test_who_is_no_longer_registered_gets_nothing_and_leaves_no_hole():
    last = Weights(500, {hotkey("gone"): 0.5, hotkey("a"): 0.5})
    scores = {"c00": result(gone=0.9, b=0.1)}
    ours = after(scores, last=last, hall=fame(("gone", 1000, 50)), registered=[hotkey("a"), hotkey("b")])
    assert ours == pytest.approx({hotkey("a"): 0.5, hotkey("b"): 0.5})


def test_weights_sum_to_one_in_order_of_hotkey_and_do_not_depend_on_the_order_of_the_scores():
    scores = {"c00": result(c=0.5, a=0.3, b=0.2, d=0.0), "c01": result(e=0.9, a=0.1)}
    last = Weights(500, {hotkey("b"): 0.1, hotkey("f"): 0.9})
    hall = fame(("a", 900, 3), ("i", 10, 20))
    ours = after(scores, last=last, hall=hall)
    turned = {name: list(reversed(found)) for name, found in reversed(scores.items())}
    assert list(after(turned, last=last, hall=hall).items()) == list(ours.items())
    assert list(ours) == sorted(ours)
    assert math.fsum(ours.values()) == pytest.approx(1, abs=1e-12)
    assert all(w > 0 for w in ours.values())
    assert hotkey("d") not in ours


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.5])
def test_a_weight_that_is_none_is_a_bug(wrong):
    with pytest.raises(ValueError, match="negative or not finite"):
        after({"c00": result(a=wrong, b=1.0)})
