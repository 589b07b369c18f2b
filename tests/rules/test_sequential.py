"""Stopping a hopeless challenger: when it happens, how rarely to one that is not, and that the rest is absent, not lost."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from reference_vectors import REPOSITORY

from sn29.records import Entry, Head, Window
from sn29.rules.champion import Evidence, Memory, Sums, Who
from sn29.rules.competition import parse_competition
from sn29.rules.evidence import CLIP, log_ratios, sums_of
from sn29.rules.scoring import score, win_matrix
from sn29.rules.scoring_fields import Bootstrap, Champion, OldestHolder, PairwiseEpsilon
from sn29.rules.sequential import BETS, Bar, bar_of, hopeless, measuring_order, portions

INF = math.inf
BLOCK, WINDOW = 5_000_400, 360
OLD = BLOCK - 30 * 7200
TEXTS = np.exp(7.2 + 0.8 * np.random.default_rng(0).standard_normal(1500))
"""The holder's losses."""
SEED = b"seed"


def bar(**known: Sums) -> Bar:
    return Bar("ann", 0.0005, 0.02, known)


def apart(mean: float, spread: float = 0.015, count: int = 1500) -> np.ndarray:
    """Losses whose log ratio to TEXTS has exactly this mean and this standard deviation, over any even number of samples."""
    return TEXTS[:count] * np.exp(mean + spread * np.where(np.arange(count) % 2, 1.0, -1.0))


def stops_at(row: np.ndarray, against: Bar | None = None) -> int:
    return next((n for n in portions(1500) if hopeless(against or bar(), "bob", row[:n], TEXTS)), 1500)


def sums(row: np.ndarray) -> Sums:
    return sums_of(*log_ratios(row, TEXTS[: len(row)]))


# ---- when ------------------------------------------------------------------------------------------------------------


def test_portions_double_and_end_with_all():
    assert portions(1500) == (16, 32, 64, 128, 256, 512, 1024, 1500)
    assert portions(1024) == (16, 32, 64, 128, 256, 512, 1024)
    assert portions(16) == (16,)
    assert portions(5) == (5,)


def test_the_order_is_a_shuffle_that_the_seed_block_decides():
    window = Window("c00", 7, Head(2520, "0x" + "1" * 64))
    order = measuring_order(window, 1500)
    assert sorted(order) == list(range(1500))
    assert order == measuring_order(window, 1500)
    others = [replace(window, index=8), replace(window, competition="c01"), replace(window, seed=Head(2520, "0x" + "2" * 64))]
    assert len({order, *(measuring_order(other, 1500) for other in others)}) == 4
    assert len({place // 100 for place in order[:64]}) > 10, "a draw takes a hundred neighbours at a time"


@pytest.mark.parametrize(
    ("mean", "stopped"), [(0.3, 16), (0.05, 32), (0.01, 128), (0.005, 256), (0.0, 1500), (-0.0015, 1500), (-0.003, 1500)]
)
def test_the_worse_the_sooner_and_never_who_is_better(mean, stopped):
    assert stops_at(apart(mean)) == stopped


def test_the_worked_example():
    stop = hopeless(bar(), "bob", apart(0.01)[:128], TEXTS)
    assert stop is not None
    assert stop.log_capital == pytest.approx(math.log(91), abs=0.1)
    assert hopeless(bar(), "bob", apart(0.01)[:64], TEXTS) is None
    assert (stop.measured, stop.total, stop.num_samples, stop.needed) == (128, 1500, 128, 0.0005)
    assert str(stop) == (
        "stopped after 128 of 1,500 samples: its losses are 1.00% higher than ann's on the 128 samples so far, to win they "
        f"must be 0.05% lower in the mean; odds of {math.exp(stop.log_capital):,.0f} to 1 against that, 50 to 1 are enough"
    )
    assert "odds of 10^" in str(hopeless(bar(), "bob", apart(0.3)[:256], TEXTS))


def test_who_needs_six_windows_is_stopped_in_none_of_them():
    """+0.15 %: no rest of the first five windows could bring its evidence to the threshold, and yet it wins in the sixth."""
    numbers, seen = np.random.default_rng(3), Sums()
    for _ in range(6):
        row = TEXTS * np.exp(-0.0015 + 0.015 * numbers.standard_normal(1500))
        assert stops_at(row, bar(bob=seen)) == 1500
        seen += sums(row)


def test_earlier_windows_of_the_reign_count():
    """0.2 % worse is not found in 512 samples of one window; with what is remembered of two more, it is in the first 16."""
    assert stops_at(apart(0.002)) == 1024
    before = sums(apart(0.002)) + sums(apart(0.002))
    assert stops_at(apart(0.002), bar(bob=before)) == 16
    nothing_new = hopeless(bar(bob=before), "bob", [], TEXTS)
    assert nothing_new is not None
    assert (nothing_new.measured, nothing_new.num_samples) == (0, 3000)
    assert hopeless(bar(eve=before), "bob", [], TEXTS) is None, "another challenger's"


def test_what_cannot_be_scored_speaks_against_it_and_what_neither_can_for_nobody():
    assert hopeless(bar(), "bob", [INF] * 16, TEXTS) is not None
    both = [INF] * 16
    assert hopeless(bar(), "bob", both, [*both, *TEXTS]) is None
    found = hopeless(bar(), "bob", [*both, *apart(0.3)[:16]], [*both, *TEXTS])
    assert found is not None
    assert (found.measured, found.num_samples) == (32, 16)
    assert hopeless(bar(), "bob", [math.nan] * 16, TEXTS) == hopeless(bar(), "bob", [INF] * 16, TEXTS)


def test_the_last_sample_stops_nobody_and_the_holder_is_no_challenger():
    assert hopeless(bar(), "bob", apart(0.05), TEXTS) is None
    assert hopeless(bar(), "bob", apart(0.05)[:-1], TEXTS) is not None
    with pytest.raises(ValueError, match="16 samples of ann"):
        hopeless(bar(), "ann", apart(0.05)[:16], TEXTS)
    with pytest.raises(ValueError, match="1500 samples of bob against 16"):
        hopeless(bar(), "bob", apart(0.05), TEXTS[:16])


# ---- how rarely it is wrong ------------------------------------------------------------------------------------------


def test_the_capital_is_the_product_of_the_bets():
    gains = np.random.default_rng(1).uniform(-0.2, 0.2, 40)
    row = TEXTS[:40] * np.exp(-gains)
    stop = hopeless(Bar("ann", 0.0005, 0.9999, {}), "bob", row, TEXTS)
    plain = math.fsum(part * math.prod(1 + t * (0.0005 - g) / (CLIP - 0.0005) for g in gains) for t, part in BETS)
    assert math.fsum(part for _, part in BETS) == 1
    if stop is None:
        assert plain <= 1 / 0.9999
    else:
        assert math.exp(stop.log_capital) == pytest.approx(plain, rel=1e-4)
        assert math.exp(stop.log_capital) <= plain * (1 + 1e-6), "rounded down"


def test_what_is_remembered_bets_no_more_than_the_samples_did():
    row = apart(0.02, 0.05)
    certain = Bar("ann", 0.0005, 0.9, {})
    at_once = hopeless(certain, "bob", row[:512], TEXTS)
    in_two = hopeless(
        replace(certain, known={"bob": sums(row[:256])}), "bob", row[256:512], np.concatenate([TEXTS[256:], TEXTS[:256]])
    )
    assert at_once is not None
    assert in_two is not None
    assert in_two.num_samples == at_once.num_samples == 512
    assert 0 < in_two.log_capital < at_once.log_capital


@pytest.mark.parametrize(("high", "share"), [(CLIP, 0.04), (0.05, 0.5), (0.02, 0.9)])
def test_against_who_is_better_by_the_margin_the_capital_does_not_grow_in_the_mean(high, share):
    """Of all outcomes of 14 samples with two gains, weighted with their probabilities, K has a mean of at most 1."""
    needed = 0.0005
    low = (needed - share * high) / (1 - share)
    total = 0.0
    for highs in range(15):
        gains = np.array([high] * highs + [low] * (14 - highs))
        row = TEXTS[:14] * np.exp(-gains)
        probability = math.comb(14, highs) * share**highs * (1 - share) ** (14 - highs)
        stop = hopeless(Bar("ann", needed, 1e9, {}), "bob", row, TEXTS)  # everybody is "stopped": K is told
        assert stop is not None
        total += probability * math.exp(stop.log_capital)
    assert 0.9 < total <= 1 + 1e-5


@pytest.mark.parametrize("kind", ["normal", "heavy", "jackpots"])
def test_who_is_better_by_the_margin_exactly_is_ever_stopped_as_rarely_as_is_said(kind):
    """300 seasons of 6 windows of 300 samples at 10 %. Jackpots: worse on nearly every text, and better by CLIP on a few."""
    numbers, error_rate, seasons = np.random.default_rng(29), 0.1, 300
    ever = 0
    for _ in range(seasons):
        seen, stopped = Sums(), False
        for _ in range(6):
            if kind == "normal":
                gains = 0.0005 + 0.03 * numbers.standard_normal(300)
            elif kind == "heavy":
                gains = 0.0005 + 0.03 * numbers.standard_t(3, 300) / math.sqrt(3)
            else:
                gains = np.where(numbers.random(300) < 0.04, CLIP, (0.0005 - 0.04 * CLIP) / 0.96)
            row, holder = TEXTS[:300] * np.exp(-gains), TEXTS[:300]
            against = Bar("ann", 0.0005, error_rate, {"bob": seen})
            stopped = stopped or any(hopeless(against, "bob", row[:n], holder) for n in portions(300))
            seen += sums(row)
        ever += stopped
    assert ever <= seasons * error_rate + 2 * math.sqrt(seasons * error_rate * (1 - error_rate))
    if kind == "jackpots":
        assert ever > 0, "a bound that never errs asks for too much"


# ---- against whom ----------------------------------------------------------------------------------------------------


def memory() -> Memory:
    evidence = (Evidence(Who("bob", "content of bob"), 1, Sums(16, 5, 7)), Evidence(Who("eve", "another"), 2, Sums(16, 1, 1)))
    return Memory(BLOCK - WINDOW, Who("ann", "content of ann"), BLOCK - 10 * WINDOW, 2, evidence)


ENTRIES = {
    h: Entry(f"content of {h}", b) for h, b in (("ann", OLD), ("bob", BLOCK - 20), ("cid", BLOCK - 10), ("eve", BLOCK - 5))
}


def test_the_bar_is_the_rules_own():
    found = bar_of(Champion(), memory(), ENTRIES, BLOCK)
    assert found is not None
    assert (found.holder, found.error_rate) == ("ann", 0.02)
    assert found.known == {"bob": Sums(16, 5, 7)}, "eve has entered something else since"
    rows = {h: apart(m).tolist() for h, m in (("ann", 0.0), ("bob", 0.01))}
    [duel] = judged(rows, memory()).duels
    assert duel.needed == found.needed == pytest.approx(0.0005001, abs=1e-7)


def test_nobody_is_stopped_without_a_holder_or_where_the_file_says_so():
    assert bar_of(Champion(stop_error_rate=0), memory(), ENTRIES, BLOCK) is None
    assert bar_of(Champion(), Memory.empty(), ENTRIES, BLOCK) is None
    assert bar_of(Champion(), memory(), {h: e for h, e in ENTRIES.items() if h != "ann"}, BLOCK) is None
    assert bar_of(Champion(), memory(), {**ENTRIES, "ann": Entry("another", OLD)}, BLOCK) is None


def test_the_field_of_the_competition_file():
    text = (REPOSITORY / "competitions" / "c00.yaml").read_text()
    assert parse_competition("c00", text).scoring.stop_error_rate == 0.02
    never = text.replace("  rule: champion ", "  stop_error_rate: 0\n  rule: champion ")
    assert parse_competition("c00", never).scoring.stop_error_rate == 0


# ---- what was not measured is absent ---------------------------------------------------------------------------------


def judged(rows, before=None, rule=None):
    shipped = parse_competition("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
    competition = shipped.model_copy(update={"scoring": rule or Champion()})
    return score(competition, rows, ENTRIES, BLOCK, SEED, before or memory())


def rows_of(**means: float) -> dict[str, list[float]]:
    numbers = np.random.default_rng(7)
    return {h: (TEXTS * np.exp(mean + 0.015 * numbers.standard_normal(1500))).tolist() for h, mean in means.items()}


def test_a_stopped_model_keeps_what_it_showed_and_its_rank():
    rows = rows_of(ann=0.0, bob=0.05, cid=-0.003)
    short = {**rows, "bob": rows["bob"][:64]}
    found, full = judged(short), judged(rows)
    mine = next(e for e in found.memory.evidence if e.who.hotkey == "bob")
    assert mine.sums == Sums(16, 5, 7) + sums_of(*log_ratios(np.array(rows["bob"][:64]), np.array(rows["ann"][:64])))
    assert [(e.who, e.rank) for e in found.memory.evidence] == [(e.who, e.rank) for e in full.memory.evidence]
    assert [d for d in found.duels if d.challenger == "cid"] == [d for d in full.duels if d.challenger == "cid"]
    assert (
        {s.hotkey: s.weight for s in found.scores} == {s.hotkey: s.weight for s in full.scores} == {"ann": 1, "bob": 0, "cid": 0}
    )


def test_win_rates_are_over_what_was_measured():
    """bob is best on the 64 samples that it was measured on, and neither wins nor loses the others."""
    rows = {"ann": TEXTS.tolist(), "cid": (TEXTS * 0.999).tolist(), "bob": apart(-0.1, count=64).tolist()}
    found = {s.hotkey: s for s in judged(rows).scores}
    assert (found["bob"].wins, found["bob"].win_rate) == (64, 1.0)
    assert (found["cid"].wins, found["cid"].win_rate) == (1436, 1436 / 1500)
    matrix = win_matrix(rows, {h: ENTRIES[h].block for h in rows}, BLOCK, Champion())
    at = matrix.hotkeys.index
    assert matrix.wins[at("bob")][at("ann")] == 64
    assert matrix.wins[at("ann")][at("bob")] == 0
    assert matrix.mean_delta[at("bob")][at("ann")] == pytest.approx((apart(-0.1, count=64) - TEXTS[:64]).mean())


def test_who_was_not_measured_to_the_end_is_a_near_copy_only_if_it_is_equal():
    noise = np.exp(1e-4 * np.random.default_rng(1).standard_normal(1500))
    rows = rows_of(ann=0.0, bob=0.03)
    in_full = {**rows, "cid": (np.array(rows["bob"]) * noise).tolist()}
    assert [(d.challenger, d.holder) for d in judged(in_full).duels if d.near_copy] == [("cid", "bob")]
    assert not [d for d in judged({**in_full, "bob": rows["bob"][:64]}).duels if d.near_copy]
    [equal] = [d for d in judged({**rows, "bob": rows["bob"][:64], "cid": rows["bob"]}).duels if d.near_copy]
    assert (equal.challenger, equal.holder, equal.num_samples) == ("cid", "bob", 64)


def test_a_model_that_is_stopped_does_not_take_the_crown_back_as_the_original_of_a_copy():
    """The holder is better by 0.1 % with a spread of 0.08 %; on the first 16 samples it is not better by the floor of 0.05 %."""
    drawn = -0.001 + 0.0008 * np.random.default_rng(3).standard_normal(1500)
    drawn[:16] = -0.00045 + 0.0005 * np.tile([1.0, -1.0], 8)
    first = np.array(rows_of(ann=0.0)["ann"])
    rows = {"ann": first.tolist(), "bob": (first * np.exp(drawn)).tolist()}
    crown = replace(memory(), holder=Who("bob", "content of bob"), evidence=(), faced=0)
    assert judged({**rows, "ann": rows["ann"][:16]}, crown).memory.holder == crown.holder
    assert judged(rows, crown).memory.holder == crown.holder


@pytest.mark.parametrize("measured", [16, 40, 64, 100, 1024])
def test_a_bootstrap_redraws_what_was_measured(measured):
    """Whatever is drawn of 64 parts, a stopped model has about as many samples as it was measured on, not of the window."""
    rule = Champion(share=Bootstrap(draws=100), stop_error_rate=0.02)
    rows = rows_of(ann=0.0, bob=0.05, cid=-0.0075)
    full, short = judged(rows, rule=rule), judged({**rows, "bob": rows["bob"][:measured]}, rule=rule)
    assert [s.weight for s in short.scores] == [s.weight for s in full.scores]
    assert 0 < next(s.weight for s in short.scores if s.hotkey == "cid") < 1
    better = {**rows, "bob": (np.array(rows["ann"][:measured]) * 0.9).tolist()}
    won = {s.hotkey: s.weight for s in judged(better, rule=rule).scores}
    assert won["bob"] == (1.0 if measured >= 100 else 0.0), "100 samples with a gain of 0.105 are evidence of 8.2, of 64 of 4.6"


def test_a_fresh_reign_counts_what_there_is():
    """Somebody who was stopped against a holder that is gone now: half of the samples are needed to begin a reign."""
    rows = rows_of(bob=0.0, cid=-0.05)
    found = judged({"bob": rows["bob"][:64], "cid": rows["cid"]}, Memory.empty())
    assert found.memory.holder == Who("cid", "content of cid")
    assert [(d.challenger, d.num_samples) for d in found.duels] == [("bob", 64)]


@pytest.mark.parametrize("rule", [OldestHolder(), PairwiseEpsilon()])
def test_other_rules_compare_all_samples_or_nothing(rule):
    with pytest.raises(ValueError, match="different numbers of samples"):
        judged({"ann": [1.0] * 20, "bob": [1.0] * 16}, rule=rule)


def test_what_is_behind_the_last_measured_sample_cannot_matter():
    """Any prefixes of any rows: shares stay shares, no duel counts more than was measured, and no order of hotkeys matters."""
    numbers = np.random.default_rng(5)
    for share, _ in itertools.product((Champion(), Champion(share=Bootstrap(draws=8))), range(30)):
        rows = rows_of(ann=0.0, bob=numbers.normal(0, 0.02), cid=numbers.normal(0, 0.02), eve=numbers.normal(0, 0.02))
        short = {h: row[: numbers.integers(1, 200)] if h != "ann" else row[:200] for h, row in rows.items()}
        short["cid"][:2] = [INF] * len(short["cid"][:2])
        found = judged(short, Memory(BLOCK - 1, Who("ann", "content of ann"), BLOCK - 1), share)
        assert math.fsum(s.weight for s in found.scores) == pytest.approx(1)
        assert all(d.num_samples == len(short[d.challenger]) for d in found.duels if not d.near_copy and d.holder == "ann")
        assert judged(dict(reversed(short.items())), Memory(BLOCK - 1, Who("ann", "content of ann"), BLOCK - 1), share) == found
