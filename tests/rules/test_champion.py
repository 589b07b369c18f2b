from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_vectors import REPOSITORY

from sn29.records import Entry
from sn29.rules.champion import Sums, Who, known_copies, open_duels
from sn29.rules.competition import Competition, parse_competition
from sn29.rules.evidence import CLIP, UNIT, intervals, log_evidence, log_ratios, sums_of
from sn29.rules.near_copies import first_of_each, is_near
from sn29.rules.scoring import Memory, Scored, score
from sn29.rules.scoring_fields import Bootstrap, Champion, FlooredAdvantage, LastHolders, OldestHolder, PairwiseEpsilon

INF, NAN = math.inf, math.nan
BLOCK = 5_000_400
DAY = 7200
WINDOW = 360
OLD = BLOCK - 30 * DAY
"""So old that only the floor of the advantage is left."""


def under(rule=None) -> Competition:
    shipped = parse_competition("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
    return shipped.model_copy(update={"scoring": rule or Champion()})


def entries_of(blocks: dict[str, int]) -> dict[str, Entry]:
    return {hotkey: Entry(f"content of {hotkey}", block) for hotkey, block in blocks.items()}


def texts(numbers: np.random.Generator, samples: int = 1500) -> np.ndarray:
    """The holder's losses: about 1400 nats a text."""
    return np.exp(7.2 + 0.8 * numbers.standard_normal(samples))


def apart(base: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """Losses whose log ratio to `base` has exactly this mean and this standard deviation."""
    return base * np.exp(mean + spread * np.where(np.arange(len(base)) % 2, 1.0, -1.0))


def weights(found: Scored) -> dict[str, float]:
    return {s.hotkey: s.weight for s in found.scores if s.weight}


class Season:
    """Window after window under one competition."""

    def __init__(self, entries, rule=None, block=BLOCK):
        self.competition, self.entries, self.block, self.memory = under(rule), entries, block, Memory.empty()

    def play(self, losses) -> Scored:
        found = score(self.competition, losses, self.entries, self.block, self.block.to_bytes(8, "big"), self.memory)
        self.block, self.memory = self.block + WINDOW, found.memory
        return found


# ---- evidence --------------------------------------------------------------------------------------------------------


def test_log_ratios_are_logarithms_of_ratios():
    numbers = np.random.default_rng(0)
    holder, wanted = texts(numbers, 4000), numbers.uniform(-0.3, 0.3, 4000)
    found, counted = log_ratios(holder * np.exp(wanted), holder)
    assert counted is None
    assert np.abs(found / UNIT - np.clip(wanted, -CLIP, CLIP)).max() < 4e-8  # half a unit, and the series


def test_what_only_one_was_scored_on_counts_against_the_other():
    found, counted = log_ratios(np.array([INF, 5.0, INF, 0.0, 1.0, 0.0]), np.array([5.0, INF, INF, 0.0, 0.0, 1.0]))
    assert (found / UNIT).tolist() == [CLIP, -CLIP, 0, 0, CLIP, -CLIP]
    assert counted is not None
    assert counted.tolist() == [True, True, False, True, True, True]


def test_the_largest_losses_do_not_overflow():
    found, _ = log_ratios(np.array([1.6e308]), np.array([1.7e308]))
    assert found[0] / UNIT == pytest.approx(math.log(16 / 17), abs=1e-7)


def test_sums_are_exact_and_add_up():
    numbers = np.random.default_rng(1)
    holder = texts(numbers, 3000)
    ratios, _ = log_ratios(apart(holder, 0.001, 0.1), holder)
    whole = sums_of(ratios, None)
    assert whole == sums_of(ratios[:700], None) + sums_of(ratios[700:], None) == sums_of(ratios[::-1], None)
    assert whole.squares == sum(int(x) ** 2 for x in ratios)
    assert (whole.mean, whole.spread) == (pytest.approx(0.001, abs=1e-7), pytest.approx(0.1, abs=1e-7))
    most = sums_of(np.full(2**19, int(CLIP * UNIT)), None)
    assert most == Sums(2**19, 2**41, 2**63)  # more than 63 bits hold


def test_the_inequality_holds_where_it_is_tight_and_everywhere_else():
    y = np.concatenate([np.linspace(-1, 3, 4001), [10, 100]])
    for t in (0.5, 0.25, 1 / 64):
        psi = -math.log1p(-t) - t
        assert (np.exp(t * y - psi * y**2) <= 1 + t * y + 1e-12).all()
        assert math.exp(-t - psi) == pytest.approx(1 - t)


@pytest.mark.parametrize(("low", "high", "share"), [(-0.25, 0.01, 0.04), (-0.02, 0.02, 0.5), (-0.01, 0.25, 0.96)])
def test_evidence_against_what_is_true_never_grows_in_the_mean(low, high, share):
    """Of all outcomes of 12 samples with two values, weighted with their probabilities, E has a mean of at most 1."""
    total = 0.0
    for highs in range(13):
        ratio = highs * round(high * UNIT) + (12 - highs) * round(low * UNIT)
        square = highs * round(high * UNIT) ** 2 + (12 - highs) * round(low * UNIT) ** 2
        probability = math.comb(12, highs) * (1 - share) ** highs * share ** (12 - highs)
        true_gain = -((1 - share) * high + share * low)
        total += probability * math.exp(log_evidence(Sums(12, ratio, square), true_gain))
    assert 0.5 < total <= 1 + 1e-6


def test_evidence_falls_as_the_margin_grows():
    for total, squares in ((-3000 * 0.2 * UNIT, 3000 * 0.05 * UNIT**2), (0, 3000 * 1e-4 * UNIT**2), (750 * UNIT, 190 * UNIT**2)):
        found = [log_evidence(Sums(3000, int(total), int(squares)), m) for m in np.linspace(-CLIP, CLIP, 101)]
        assert all(a >= b for a, b in itertools.pairwise(found))


def test_the_interval_is_where_the_evidence_reaches_the_threshold():
    ratios, _ = log_ratios(apart(np.full(4500, 1000.0), -0.003, 0.015), np.full(4500, 1000.0))
    sums = sums_of(ratios, None)
    [(low, high)] = intervals([sums], [math.log(200)])
    assert log_evidence(sums, -high) == pytest.approx(math.log(200), abs=1e-5)
    mirrored = replace(sums, total=-sums.total)
    assert log_evidence(mirrored, low) == pytest.approx(math.log(200), abs=1e-5)
    assert low < sums.mean < high
    assert intervals([Sums()], [math.log(200)]) == [(-CLIP, CLIP)]
    assert intervals([], []) == []


def test_the_bound_covers_the_truth_as_often_as_it_says():
    """400 seasons of 30 windows of 200 samples with heavy tails: at 10 % no more than 10 % of them miss once."""
    numbers = np.random.default_rng(7)
    missed = 0
    for _ in range(400):
        sums, wrong = Sums(), False
        for _ in range(30):
            x = np.where(numbers.random(200) < 0.02, 0.245, -0.005) + 0.01 * numbers.standard_normal(200)  # mean 0
            part, _ = log_ratios(np.exp(x), np.ones(200))
            sums += sums_of(part, None)
            wrong |= log_evidence(sums, 1e-4) >= math.log(10)
        missed += wrong
    assert missed <= 40


# ---- near copies -----------------------------------------------------------------------------------------------------


def test_near_copies_belong_to_the_first_of_them():
    numbers = np.random.default_rng(2)
    base = texts(numbers)
    rows = [
        base,
        base * np.exp(0.03 * numbers.standard_normal(1500)),
        base * np.exp(0.0002 * numbers.standard_normal(1500)),
        base * np.exp(0.01 * numbers.standard_normal(1500)),
        base * 1.002,
    ]
    rows.append(rows[1] * np.exp(0.0009 * numbers.standard_normal(1500)))
    rows.append(rows[5] * np.exp(0.0009 * numbers.standard_normal(1500)))  # of rows[1] it is not near: 0.0013
    assert not is_near(rows[6], rows[1], 1e-3)
    assert first_of_each(np.array(rows), 1e-3) == [0, 1, 0, 3, 0, 1, 1]
    assert first_of_each(np.array(rows), 0.0) == [0, 1, 2, 3, 4, 5, 6]


def test_failing_on_samples_does_not_hide_a_copy():
    numbers = np.random.default_rng(3)
    base = texts(numbers)
    copy = base * np.exp(0.0005 * numbers.standard_normal(1500))
    copy[:400] = INF
    other = base * np.exp(0.03 * numbers.standard_normal(1500))
    other[300:] = INF
    assert first_of_each(np.array([base, other, copy]), 1e-3) == [0, 1, 0]


def test_few_samples_make_a_copy_only_of_equals():
    close = np.array([[100.0] * 15, [100.01] * 15, [100.0] * 15])
    assert first_of_each(close, 1e-3) == [0, 1, 0]
    assert first_of_each(np.full((2, 16), [[100.0], [100.01]]), 1e-3) == [0, 0]
    nothing = np.array([[INF, 1.0], [1.0, INF], [INF, INF], [INF, INF]])
    assert first_of_each(nothing, 1e-3) == [0, 1, 2, 3]


def test_a_constant_ratio_beyond_the_cut_is_no_copy():
    assert first_of_each(np.array([[100.0] * 50, [160.0] * 50]), 1e-3) == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_first_look_at_all_pairs_leaves_no_copy_out(seed):
    numbers = np.random.default_rng(seed)
    base = texts(numbers, 3000)
    rows = base * np.exp(numbers.choice([0.0004, 0.0012, 0.004, 0.05], (24, 1)) * numbers.standard_normal((24, 3000)))
    rows[numbers.random(rows.shape) < 0.02] = INF
    plain = list(range(24))
    for row in range(24):
        plain[row] = next((plain[e] for e in range(row) if is_near(rows[row], rows[e], 1e-3)), row)
    assert first_of_each(rows, 1e-3) == plain
    assert 1 < len(set(plain)) < 24


# ---- the crown -------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_module():
    season = Season(entries_of({"holder": OLD, "new": BLOCK - 10}))
    base = np.full(1500, 1000.0)
    rows = []
    for _ in range(3):
        found = season.play({"holder": base, "new": apart(base, -0.003, 0.015)})
        [duel] = found.duels
        season_sums = next((e.sums for e in found.memory.evidence), None)
        evidence = round(log_evidence(season_sums, duel.needed), 2) if season_sums else None
        rows.append((duel.num_samples, round(duel.mean_log_ratio, 4), round(duel.spread, 3), evidence))
        rows[-1] += (round(duel.low, 5), round(duel.high, 5), duel.won)
        assert round(duel.needed, 7) == 0.0005001
        assert duel.error_rate == pytest.approx(0.005)
    assert rows == [
        (1500, -0.003, 0.015, 2.02, -0.00789, 0.00189, False),
        (3000, -0.003, 0.015, 5.22, -0.00553, -0.00047, False),
        (4500, -0.003, 0.015, None, -0.00474, -0.00126, True),
    ]
    assert weights(found) == {"new": 1}
    assert season.memory.holder == Who("new", "content of new")


@pytest.mark.parametrize(("gain", "age", "windows"), [(0.0015, 30, 6), (0.003, 0, 6), (0.0015, 0, 84)])
def test_the_other_figures_of_the_module(gain, age, windows):
    season = Season(entries_of({"holder": BLOCK - age * DAY - 20, "new": BLOCK - 10}))
    base = np.full(1500, 1000.0)
    taken = next(
        n for n in range(1, 200) if weights(season.play({"holder": base, "new": apart(base, -gain, 0.015)})) == {"new": 1}
    )
    assert taken == windows


def test_six_noisy_copies_never_take_the_crown():
    for seed in range(4):
        numbers = np.random.default_rng(seed)
        season = Season(entries_of({"holder": BLOCK - 60 * DAY, **{f"copy{n}": BLOCK - 100 + n for n in range(6)}}))
        for _ in range(30):
            base = texts(numbers)
            copies = {f"copy{n}": base * np.exp(0.01 * numbers.standard_normal(1500)) for n in range(6)}
            assert weights(season.play({"holder": base, **copies})) == {"holder": 1}


@pytest.mark.parametrize(("gain", "windows"), [(0.003, 20), (0.0015, 7 * 20)])
def test_an_honest_improvement_takes_it(gain, windows):
    for seed in range(5):
        numbers = np.random.default_rng(seed)
        season = Season(entries_of({"holder": OLD, "new": BLOCK - 10}))
        for _ in range(windows):
            base = texts(numbers)
            found = season.play({"holder": base, "new": base * np.exp(-gain + 0.015 * numbers.standard_normal(1500))})
            if weights(found) == {"new": 1}:
                break
        assert weights(found) == {"new": 1}


def test_of_two_that_are_better_the_earlier_one_takes_it_and_the_later_one_must_beat_that_one():
    season = Season(entries_of({"holder": OLD, "first": BLOCK - 30 * DAY + 1, "second": BLOCK - 10}))
    base = np.full(1500, 1000.0)
    season.play({"holder": base})
    found = season.play({"holder": base, "first": apart(base, -0.02, 0.015), "second": apart(base, -0.05, 0.014)})
    by_name = {d.challenger: d for d in found.duels}
    assert (by_name["first"].won, by_name["second"].won) == (True, False)
    assert by_name["second"].high < -by_name["second"].needed
    assert season.memory.evidence == ()  # evidence against the new holder starts with the next window
    found = season.play({"holder": base, "first": apart(base, -0.02, 0.015), "second": apart(base, -0.05, 0.014)})
    assert weights(found) == {"second": 1}
    assert [(d.challenger, d.holder, d.won) for d in found.duels] == [("holder", "first", False), ("second", "first", True)]


def test_at_the_first_start_all_duels_are_fought_in_one_pass():
    season = Season(entries_of({"a": OLD, "b": OLD + 1, "c": OLD + 2, "d": OLD + 3}))
    base = np.full(1500, 1000.0)
    losses = {"a": base, "b": apart(base, -0.02, 0.02), "c": apart(base, 0.0, 0.03), "d": apart(base, -0.05, 0.01)}
    found = season.play(losses)
    assert [(d.challenger, d.holder, d.won) for d in found.duels] == [("b", "a", True), ("c", "b", False), ("d", "b", True)]
    assert weights(found) == {"d": 1}
    assert season.memory.past == ()  # nobody else held it at the end of a window


def test_every_challenger_of_a_reign_has_a_smaller_part_of_the_error_rate():
    base = np.full(1500, 1000.0)
    season = Season(entries_of({"holder": OLD, "a": BLOCK - 5, "b": BLOCK - 4, "c": BLOCK - 3}))
    rates = {}
    for names in (["b"], ["a", "b"], ["c"], ["a", "b", "c"]):
        found = season.play({"holder": base, **{n: apart(base, 0.01, 0.01 * "_abc".index(n)) for n in names}})
        rates.update({(len(rates), d.challenger): round(0.01 / d.error_rate) for d in found.duels})
    assert [(name, part) for (_, name), part in rates.items()] == [
        ("b", 2), ("a", 6), ("b", 2), ("c", 12), ("a", 6), ("b", 2), ("c", 12),
    ]  # fmt: skip


def test_near_copies_have_no_duel_and_take_no_place_in_line():
    numbers = np.random.default_rng(0)
    base = texts(numbers)
    season = Season(entries_of({"holder": OLD, "copy": BLOCK - 5, "new": BLOCK - 4}))
    losses = {
        "holder": base,
        "copy": base * np.exp(-0.0004 + 1e-4 * numbers.standard_normal(1500)),
        "new": apart(base, 0.01, 0.02),
    }
    copy, new = season.play(losses).duels
    assert (copy.near_copy, copy.holder, copy.won, copy.error_rate) == (True, "holder", False, 0)
    assert copy.mean_log_ratio == pytest.approx(-0.0004, abs=1e-5)
    assert copy.spread == pytest.approx(1e-4, rel=0.1)
    assert (new.near_copy, round(0.01 / new.error_rate)) == (False, 2)


def test_a_model_that_fails_where_it_is_bad_gains_nothing():
    """It is better by 1 % on nine samples of ten and cannot be scored on the others."""
    base = np.full(1500, 1000.0)
    fails = apart(base, -0.01, 0.015)
    fails[::10] = INF
    season = Season(entries_of({"holder": OLD, "fails": BLOCK - 10}))
    for _ in range(5):
        found = season.play({"holder": base, "fails": fails})
    assert weights(found) == {"holder": 1}
    assert found.duels[0].mean_log_ratio == pytest.approx(0.9 * -0.01 + 0.1 * CLIP, abs=2e-3)
    assert found.duels[0].num_samples == 7500


def test_a_holder_that_fails_is_dethroned():
    base = np.full(1500, 1000.0)
    season = Season(entries_of({"holder": OLD, "new": BLOCK - 10}))
    season.play({"holder": base, "new": apart(base, 0.05, 0.01)})
    found = season.play({"holder": np.where(np.arange(1500) < 400, base, INF), "new": apart(base, 0.05, 0.01)})
    assert weights(found) == {"new": 1}


# ---- who is gone -----------------------------------------------------------------------------------------------------


def crowned(*names: str) -> Season:
    """A season in which each of the names took the crown from the one before; 30 days old, all of them."""
    season = Season(entries_of({name: OLD + place for place, name in enumerate(names)}))
    base = np.full(1500, 1000.0)
    for count in range(1, len(names) + 1):
        season.play({name: apart(base, -0.05 * place, 0.01 * (place + 1)) for place, name in enumerate(names[:count])})
        assert season.memory.holder == Who(names[count - 1], f"content of {names[count - 1]}")
    return season


ROWS = {name: apart(np.full(1500, 1000.0), 0.0, spread) for name, spread in (("a", 0.01), ("b", 0.03), ("c", 0.05))}


def test_a_holder_that_is_gone_is_followed_by_the_one_before_it():
    season = crowned("a", "b", "c")
    season.entries = {h: e for h, e in season.entries.items() if h != "c"}
    assert weights(season.play({"a": ROWS["a"], "b": ROWS["b"]})) == {"b": 1}


def test_a_holder_that_committed_something_else_is_gone():
    season = crowned("a", "b", "c")
    season.entries["c"] = Entry("another content", BLOCK)
    found = season.play({**ROWS, "c": apart(ROWS["b"], 0.01, 0.02)})
    assert weights(found) == {"b": 1}
    assert season.memory.past[:2] == (Who("c", "content of c"), Who("a", "content of a"))


def test_a_holder_that_was_not_evaluated_keeps_the_crown_and_one_that_could_not_be_scored_does_not():
    season = crowned("a", "b")
    assert weights(season.play({"a": ROWS["a"]})) == {"b": 1}
    assert weights(season.play({})) == {"b": 1}
    assert weights(season.play({"a": ROWS["a"], "b": np.full(1500, NAN)})) == {"a": 1}


def test_nobody_holds_what_nobody_was_scored_on():
    season = Season(entries_of({"a": OLD, "b": OLD + 1}))
    found = season.play({"a": [INF] * 20, "b": [NAN] * 20})
    assert (weights(found), found.memory.holder) == ({}, None)
    assert {s.hotkey: s.wins for s in found.scores} == {"a": 0, "b": 0}
    assert weights(season.play({"a": [INF] * 20, "b": [5.0] * 20})) == {"b": 1}


def test_the_oldest_that_was_scored_on_half_of_the_samples_is_the_first_holder():
    season = Season(entries_of({"junk": OLD, "half": OLD + 1, "new": OLD + 2}))
    found = season.play({"junk": [9.0] * 4 + [INF] * 6, "half": [9.05] * 5 + [INF] * 5, "new": [9.1] * 10})
    assert {d.holder for d in found.duels} == {"half"}


def test_what_a_holder_copies_takes_the_crown_from_it():
    """The copy was evaluated before the older original had a place."""
    numbers = np.random.default_rng(0)
    season = Season(entries_of({"original": OLD, "copy": OLD + 5}))
    base = texts(numbers)
    copy = base * np.exp(1e-4 * numbers.standard_normal(1500))
    assert weights(season.play({"copy": copy})) == {"copy": 1}
    assert weights(season.play({"copy": copy, "original": base})) == {"original": 1}
    assert weights(season.play({"copy": copy, "original": base})) == {"original": 1}


def test_a_near_copy_of_one_block_does_not_take_turns_with_the_holder():
    numbers = np.random.default_rng(0)
    season = Season(entries_of({"one": OLD, "two": OLD}), Champion(share=LastHolders()))
    base = texts(numbers)
    near = base * np.exp(1e-4 * numbers.standard_normal(1500))
    first = weights(season.play({"one": base, "two": near}))
    assert len(first) == 1
    for _ in range(12):
        assert weights(season.play({"one": base, "two": near})) == first


def test_a_window_is_never_counted_twice():
    season = crowned("a")
    with pytest.raises(ValueError, match="count twice"):
        score(season.competition, {"a": ROWS["a"]}, season.entries, season.memory.block, b"", season.memory)


# ---- shares ----------------------------------------------------------------------------------------------------------


def test_the_last_holders_share():
    rule = Champion(share=LastHolders(decay=0.5, count=3))
    season = crowned("a", "b", "c", "d")
    season.competition = under(rule)
    rows = {h: apart(np.full(1500, 1000.0), 0.0, 0.01 * (n + 1)) for n, h in enumerate("abcd")}
    assert weights(season.play(rows)) == {"d": 4 / 7, "c": 2 / 7, "b": 1 / 7}
    del season.entries["c"]
    assert weights(season.play({h: rows[h] for h in "abd"})) == {"d": 4 / 7, "b": 2 / 7, "a": 1 / 7}
    rows["b"] = apart(rows["a"], 0.0, 1e-5)  # now a near copy of a: one place together
    assert weights(season.play({h: rows[h] for h in "abd"})) == {"d": 2 / 3, "a": 1 / 3}


def test_bootstrap_shares_go_over_from_one_to_the_other_near_the_crossing():
    numbers = np.random.default_rng(4)
    season = Season(entries_of({"holder": OLD, "new": BLOCK - 10}), Champion(share=Bootstrap(draws=200)))
    shares = []
    for _ in range(5):
        base = texts(numbers)
        found = season.play({"holder": base, "new": base * np.exp(-0.003 + 0.015 * numbers.standard_normal(1500))})
        shares.append(weights(found).get("new", 0.0))
    assert shares[0] == 0
    assert any(0 < share < 1 for share in shares)
    assert shares[-1] == 1
    assert all(abs(math.fsum(weights(found).values()) - 1) < 1e-12 for found in [found])


def test_bootstrap_goes_up_the_same_ladder_as_the_crown_at_the_first_start():
    base = np.full(1500, 1000.0)
    losses = {"a": base, "b": apart(base, -0.05, 0.02), "c": apart(base, 0.0, 0.03), "d": apart(base, -0.1, 0.01)}
    season = Season(entries_of({"a": OLD, "b": OLD + 1, "c": OLD + 2, "d": OLD + 3}), Champion(share=Bootstrap(draws=50)))
    assert weights(season.play(losses)) == {"d": 1}
    assert weights(season.play({"a": base})) == {"d": 1}


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_survives_writing_and_goes_on_to_the_same_bits():
    numbers = np.random.default_rng(5)
    season = Season(entries_of({"holder": OLD, "a": BLOCK - 5, "b": BLOCK - 3}), Champion(share=LastHolders()))
    for _ in range(6):
        base = texts(numbers)
        losses = {
            "holder": base,
            "a": base * np.exp(-0.002 + 0.015 * numbers.standard_normal(1500)),
            "b": base * np.exp(0.002 + 0.05 * numbers.standard_normal(1500)),
        }
        kept = Memory.from_json(json.loads(json.dumps(season.memory.to_json())))
        assert kept == season.memory
        again = score(season.competition, losses, season.entries, season.block, season.block.to_bytes(8, "big"), kept)
        assert season.play(losses) == again
    assert season.memory.past
    assert season.memory.evidence
    assert Memory.from_json({}) == Memory.empty() == Memory.from_json(Memory.empty().to_json())


def test_a_near_copy_is_measured_once():
    """What is known of it is kept while the validator leaves it out, and forgotten with either of the two."""
    base = np.full(1500, 1000.0)
    season = Season(entries_of({"holder": OLD, "copy": BLOCK - 10, "other": BLOCK - 5}))
    season.play({"holder": base, "copy": apart(base, 0.0, 0.0005), "other": apart(base, 0.002, 0.015)})
    for _ in range(3):
        assert known_copies(season.memory, season.entries) == {"copy": "holder"}
        assert Memory.from_json(json.loads(json.dumps(season.memory.to_json()))) == season.memory
        season.play({"holder": base, "other": apart(base, 0.002, 0.015)})
    for gone in ("holder", "copy"):
        without = {hotkey: entry for hotkey, entry in season.entries.items() if hotkey != gone}
        assert known_copies(season.memory, without) == {}
    season.entries["copy"] = Entry("a model of its own", BLOCK)
    season.play({"holder": base, "copy": apart(base, 0.001, 0.015)})
    assert season.memory.copies == ()


@pytest.mark.parametrize("spread", [0.0004, 0.0008, 0.001, 0.0012])
def test_a_small_improvement_that_hardly_varies_is_no_copy_and_the_crown_does_not_go_back(spread):
    """As 40 steps of fine-tuning from the holder's own weights: 0.3 % better, alike on every sample."""
    numbers = np.random.default_rng(3)
    base = texts(numbers)
    season = Season(entries_of({"holder": OLD, "tuned": BLOCK - 5}))
    holders = []
    for _ in range(8):
        tuned = base * np.exp(-0.003 + spread * numbers.standard_normal(1500))
        season.play({"holder": base, "tuned": tuned})
        holders.append(season.memory.holder.hotkey)
    assert holders[-6:] == ["tuned"] * 6


def test_who_chooses_when_to_be_seen_starts_anew_each_time():
    """A miner that is public only in windows that favour it (their samples can be known) must not add those windows up."""
    base = np.full(1500, 1000.0)
    season = Season(entries_of({"holder": OLD, "picky": BLOCK - 10}))
    season.play({"holder": base, "picky": apart(base, -0.003, 0.015)})
    away = season.entries.pop("picky")
    season.play({"holder": base})
    season.entries["picky"] = away
    [duel] = season.play({"holder": base, "picky": apart(base, -0.003, 0.015)}).duels
    assert (duel.num_samples, round(0.01 / duel.error_rate)) == (1500, 6)


def test_open_duels_are_those_of_the_last_window_at_another_block():
    base = np.full(1500, 1000.0)
    season = Season(entries_of({"holder": OLD, "new": BLOCK - 10}))
    [played] = season.play({"holder": base, "new": apart(base, 0.002, 0.015)}).duels
    [known] = open_duels(season.competition.scoring, season.memory, season.entries, BLOCK)
    assert known == played
    later = open_duels(season.competition.scoring, season.memory, season.entries, BLOCK + 10 * WINDOW)
    assert later[0].needed <= known.needed
    assert open_duels(season.competition.scoring, season.memory, {"new": season.entries["new"]}, BLOCK) == ()


def test_evidence_waits_for_who_is_left_out_and_is_dropped_for_who_recommits():
    base = np.full(1500, 1000.0)
    season = Season(entries_of({"holder": OLD, "new": BLOCK - 10}))
    rows = {"holder": base, "new": apart(base, -0.003, 0.015)}
    season.play(rows)
    season.play({"holder": base})
    assert season.play(rows).duels[0].num_samples == 3000
    season.entries["new"] = Entry("something else", BLOCK)
    [duel] = season.play(rows).duels
    assert (duel.num_samples, round(0.01 / duel.error_rate)) == (1500, 6)
    assert len(season.memory.evidence) == 1


# ---- properties of all rules -----------------------------------------------------------------------------------------

RULES = [
    Champion(),
    Champion(share=LastHolders()),
    Champion(share=Bootstrap(draws=8)),
    OldestHolder(group=1),
    OldestHolder(group=4),
    PairwiseEpsilon(),
    PairwiseEpsilon(temperature=1.0),
]
ORDERED = {2, 4}
"""Rules in which the window's order of samples has a meaning: parts of the bootstrap, groups."""

FIXED = settings(deadline=None, derandomize=True, database=None)
"""The same examples on every machine and every day."""


def name_of(rule) -> str:
    share = f"-{rule.share.kind}" if isinstance(rule, Champion) else ""
    return f"{rule.rule}{share}{getattr(rule, 'group', '')}{getattr(rule, 'temperature', '')}"


loss = st.one_of(
    st.floats(0, 4000), st.floats(900, 1100), st.sampled_from([1000.0, 1000.0, 998.0, 996.0, 0.0, INF, NAN, -1.0, 5e-324, 1e300])
)


@st.composite
def windows(draw, most_models: int = 6, most_samples: int = 40):
    """Losses and entries of some models; some are like each other, some commit in the same block."""
    samples = draw(st.integers(0, most_samples))
    models = draw(st.integers(0, most_models))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = texts(numbers, samples)
    losses = {}
    for n in range(models):
        if draw(st.booleans()):
            losses[f"h{n}"] = draw(st.lists(loss, min_size=samples, max_size=samples))
        else:
            shift, spread = draw(st.sampled_from([0.0, -0.003, -0.05, 0.01])), draw(st.sampled_from([0, 1e-4, 0.01, 0.05]))
            losses[f"h{n}"] = (base * np.exp(shift + spread * numbers.standard_normal(samples))).tolist()
    blocks = {hotkey: BLOCK - draw(st.sampled_from([1, 2, 3, 1000, 60 * DAY])) for hotkey in losses}
    return losses, entries_of(blocks)


def judged(rule, losses, entries, memory=None) -> Scored:
    return score(under(rule), losses, entries, BLOCK, b"seed", memory or Memory.empty())


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@settings(FIXED, max_examples=60)
@given(window=windows())
def test_weights_are_shares(rule, window):
    found = judged(rule, *window)
    assert [s.hotkey for s in found.scores] == sorted(window[0])
    paid = [s.weight for s in found.scores]
    assert all(math.isfinite(w) and w >= 0 for w in paid)
    assert math.fsum(paid) == pytest.approx(1, abs=1e-12) or not any(paid)
    assert all(math.isfinite(x) for s in found.scores for x in (s.wins, s.win_rate, s.win_rate_without_advantage, s.advantage))
    for duel in found.duels:
        assert duel.low <= duel.high
        assert not duel.won or duel.high <= -duel.needed


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@settings(FIXED, max_examples=40)
@given(window=windows(), order=st.randoms(use_true_random=False))
def test_the_order_of_the_miners_changes_nothing(rule, window, order):
    losses, entries = window
    hotkeys = list(losses)
    order.shuffle(hotkeys)
    assert judged(rule, {h: losses[h] for h in hotkeys}, {h: entries[h] for h in reversed(hotkeys)}) == judged(rule, *window)


@pytest.mark.parametrize("rule", [rule for n, rule in enumerate(RULES) if n not in ORDERED], ids=name_of)
@settings(FIXED, max_examples=40)
@given(window=windows(), order=st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_nothing(rule, window, order):
    losses, entries = window
    columns = list(range(len(next(iter(losses.values()), []))))
    order.shuffle(columns)
    assert judged(rule, {h: [row[c] for c in columns] for h, row in losses.items()}, entries) == judged(rule, *window)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@settings(FIXED, max_examples=40)
@given(window=windows(), power=st.integers(-20, 20))
def test_another_unit_of_loss_changes_nothing(rule, window, power):
    """Powers of two, which change no digit; a loss too small or too large for that is left out."""
    losses, entries = window
    losses = {h: [NAN if x < 1e-200 or x > 1e200 else x for x in row] for h, row in losses.items()}
    scaled = {h: [x * 2.0**power for x in row] for h, row in losses.items()}
    assert judged(rule, scaled, entries) == judged(rule, losses, entries)


@settings(FIXED, max_examples=40)
@given(window=windows(), scale=st.floats(0.01, 100))
def test_any_unit_of_loss_gives_the_same_weights_under_champion(window, scale):
    losses, entries = window
    losses = {h: [NAN if x < 1e-200 or x > 1e200 else x for x in row] for h, row in losses.items()}
    scaled = {h: [x * scale for x in row] for h, row in losses.items()}
    assert weights(judged(Champion(), scaled, entries)) == weights(judged(Champion(), losses, entries))


def with_copy(window, data, spread: float):
    """The window with a later copy of one of its models, and the hotkeys of the copier: a model of its own, and the copy."""
    losses, entries = window
    model = data.draw(st.sampled_from(sorted(losses)), label="copied")
    own = data.draw(st.sampled_from(sorted(losses)), label="copier's own")
    numbers = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    row = np.array(losses[model]) * np.exp(spread * numbers.standard_normal(len(losses[model])))
    block = data.draw(st.integers(entries[model].block + 1, BLOCK))
    return {**losses, "z": row.tolist()}, {**entries, "z": Entry("content of z", block)}, own


def share_of(found: Scored, *hotkeys: str) -> float:
    return math.fsum(s.weight for s in found.scores if s.hotkey in hotkeys)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@settings(FIXED, max_examples=60)
@given(window=windows().filter(lambda w: w[0]), data=st.data())
def test_an_exact_copy_never_earns(rule, window, data):
    losses, entries, own = with_copy(window, data, 0.0)
    assert share_of(judged(rule, losses, entries), own, "z") <= share_of(judged(rule, *window), own) + 1e-12


@pytest.mark.parametrize("rule", RULES[:3], ids=name_of)
@settings(FIXED, max_examples=60)
@given(window=windows(most_samples=60).filter(lambda w: w[0]), data=st.data())
def test_a_near_copy_never_earns_under_champion(rule, window, data):
    losses, entries, own = with_copy(window, data, 2e-4)
    assert share_of(judged(rule, losses, entries), own, "z") <= share_of(judged(rule, *window), own) + 1e-12


def test_the_advantage_never_falls_below_its_floor():
    rule = Champion(advantage=FlooredAdvantage(initial=0.004, floor=0.001))
    season = Season(entries_of({"old": BLOCK - 365 * DAY, "new": BLOCK}), rule)
    found = season.play({"old": [5.0], "new": [5.0]})
    assert {s.hotkey: round(s.advantage, 6) for s in found.scores} == {"old": 0.999, "new": 0.996}
