"""The chance to win: figures of the docstring, the rule itself play by play, and worlds whose truth is known."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from recorded import c00, head, losses

from sn29 import chances as module
from sn29.chances import Chance, chances, won
from sn29.records import Entry, Window
from sn29.rules.champion import Evidence, Memory, Who
from sn29.rules.decision import Contest, score_contest
from sn29.rules.evidence import Sums

NOW = 5_000_000
FIRST = NOW // 360 + 1
"""The first window after a commitment at block NOW."""
OLD = 1_000_000


in_force = functools.cache(c00)


def who(hotkey: str) -> Who:
    return Who(hotkey, f"content of {hotkey}")


def contest(
    table: dict[str, Any], rule: str = "champion", age: int = OLD, faced: int = 0, evidence: tuple[Evidence, ...] = ()
) -> Contest:
    """`ann` holds the crown since `age` blocks, the others came after it in the table's order, `me` commits at NOW."""
    entries = {h: Entry(who(h).content_id, NOW if h == "me" else NOW - age + place) for place, h in enumerate(table)}
    memory = Memory(block=NOW - 1000, holder=who("ann"), since=NOW - age, faced=faced, evidence=evidence)
    memory = memory if rule == "champion" else Memory.empty()
    return Contest(in_force(rule), Window("c00", FIRST, head(FIRST * 360)), table, entries, memory)


def planted(gain: float, spread: float, count: int = 1500) -> dict[str, tuple[float, ...]]:
    """`me` is better than `ann` by exactly this, with exactly this standard deviation of the log ratio."""
    noise = np.random.default_rng(7).standard_normal(count)
    noise = (noise - noise.mean()) / noise.std()
    return {"ann": (1000.0,) * count, "me": tuple((1000.0 * np.exp(-gain + spread * noise)).tolist())}


def test_the_worked_example_of_the_docstring():
    found = chances(contest(planted(0.0015, 0.015)), "me", 20)
    assert [f"{c.probability:.0%} ({c.low:.0%} to {c.high:.0%})" for c in (found[0], found[3], found[19])] == [
        "0% (0% to 0%)", "19% (0% to 95%)", "93% (25% to 100%)",
    ]  # fmt: skip
    others = [chances(contest(planted(gain, 0.015)), "me", 20)[-1].probability for gain in (0.0, 0.0005, 0.003)]
    assert [f"{p:.3g}" for p in others] == ["0.005", "0.147", "1"]
    sure = score_contest(contest(planted(0.00086, 0.015)))
    assert sure.memory.holder == who("ann")


def many(seed: int, count: int = 200) -> Contest:
    """Five models of which each may take the crown, with evidence from before."""
    table = losses(count, seed, ann=(0.0, 0.01), bob=(-0.008, 0.02), cy=(0.003, 0.02), dan=(-0.012, 0.02), me=(-0.026, 0.02))
    unit = 2**24
    known = Evidence(who("dan"), 2, Sums(1000, -round(0.003 * 1000 * unit), round(0.02**2 * 1000 * unit**2)))
    return contest(table, faced=2, evidence=(known,))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("outer", [False, True])
def test_many_plays_at_once_are_won_in_the_window_in_which_the_rule_itself_gives_the_crown(seed, outer):
    one = many(seed)
    crown = module._crown_of(one, "me", score_contest(one))
    assert crown is not None
    crown = replace(crown, left=(1.0,) * len(crown.left))  # the rule knows of no worlds
    plays = module._Plays(10, 8, 29, outer, lambda done: None)
    together, by_rule = plays.for_crown(crown), plays.by_rule(one, "me")
    assert len(set(by_rule.tolist())) > 2
    assert together.tolist() == by_rule.tolist()


def standing(h: str, gain: float, count: int, spread: float = 0.015) -> Evidence:
    """Sums of so many texts, with the mean gain over the holder and its standard deviation."""
    unit = 2**24
    return Evidence(who(h), 1, Sums(count, -round(gain * count * unit), round((spread**2 + gain**2) * count * unit**2)))


def test_a_lucky_window_counts_among_the_others_of_a_model_that_stands():
    """Of 31,500 texts the newest 1,500 were 0.12 % better, all of them 0.025 %: the margin is 0.05 %."""
    lucky = chances(contest(planted(0.0012, 0.015)), "me", 20, draws=200)[-1]
    assert lucky.probability > 0.5
    evidence = (standing("me", 0.00025, 31_500),)
    known = chances(contest(planted(0.0012, 0.015), faced=1, evidence=evidence), "me", 20, draws=200)[-1]
    assert known.probability < 0.03
    assert known.high < 0.05
    as_usual = chances(contest(planted(0.00025, 0.015), faced=1, evidence=evidence), "me", 20, draws=200)[-1]
    assert known.probability == pytest.approx(as_usual.probability, abs=0.01)
    less = (standing("me", 0.00025, 200),)  # than a window: the window says more
    assert chances(contest(planted(0.0012, 0.015), faced=1, evidence=less), "me", 20, draws=200)[-1].probability > 0.5


def test_what_is_known_of_a_rival_counts_too():
    """`bob` was 1 % better in this window, by 4,000 texts he is not better at all: he takes the crown from nobody."""
    table = losses(200, 3, ann=(0.0, 0.001), bob=(-0.012, 0.02), me=(-0.009, 0.015))
    new = chances(contest(table), "me", 8, draws=60)[-1].probability
    weak = chances(contest(table, faced=1, evidence=(standing("bob", -0.001, 4000, 0.02),)), "me", 8, draws=60)[-1].probability
    alone = chances(contest({h: table[h] for h in ("ann", "me")}, faced=1), "me", 8, draws=60)[-1].probability
    assert new < weak - 0.2
    assert weak == pytest.approx(alone, abs=0.05)


def test_others_who_take_the_crown_first_are_part_of_the_plays():
    """Where `dan` is crowned before, `me` has to begin anew, against him."""
    crowded = many(1)
    crowded = replace(crowded, memory=replace(crowded.memory, evidence=(standing("dan", 0.01, 1000, 0.02),)))
    alone = replace(crowded, losses={h: crowded.losses[h] for h in ("ann", "me")})
    with_dan, without = (chances(each, "me", 8, draws=50) for each in (crowded, alone))
    assert sum(c.probability for c in without) > 1 + sum(c.probability for c in with_dan)


def share_won(one: Contest, windows: int, draws: int, seed: int, *, outer: bool) -> float:
    crown = module._crown_of(one, "me", score_contest(one))
    assert crown is not None
    return float(np.mean(module._Plays(windows, draws, seed, outer, lambda done: None).for_crown(crown) < windows))


def truth(random: np.random.Generator, gain: float, spread: float, count: int) -> np.ndarray[Any, Any]:
    """Log ratios of a window's texts in a world of that true gain, with heavy tails."""
    return np.asarray(-gain + spread * random.standard_t(6, count) / math.sqrt(1.5))


def test_forecasts_of_two_hundred_planted_challengers_are_calibrated():
    """Gains are spread evenly from well below the margin to well above it, as the flat prior has it: of the challengers whose
    forecast lies in a bin, as many win by the rule itself as it says, within three binomial standard errors."""
    random = np.random.default_rng(29)
    count, windows, spread = 300, 4, 0.015
    forecasts, wins = [], []
    for _ in range(200):
        gain = random.uniform(0.0, 0.012)
        nats = np.full(count, 1000.0)
        world = contest({"ann": nats, "me": nats * np.exp(truth(random, gain, spread, count))})
        forecasts.append(share_won(world, windows, 40, 29, outer=True))  # the probability of `chances` without its interval
        memory, has_won = world.memory, False
        for number in range(windows):
            drawn = {"ann": nats, "me": nats * np.exp(truth(random, gain, spread, count))}
            window = Window("c00", FIRST + number, head((FIRST + number) * 360))
            now = replace(world, losses=drawn, window=window, memory=memory)
            scored = score_contest(now)
            has_won, memory = won(scored, now, "me"), scored.memory
            if has_won:
                break
        wins.append(has_won)
    for low, high in pairwise((0.0, 0.1, 0.5, 0.9, 1.01)):
        chosen = [(p, w) for p, w in zip(forecasts, wins, strict=True) if low <= p < high]
        said, found = np.mean([p for p, _ in chosen]), np.mean([w for _, w in chosen])
        error = math.sqrt(max(said * (1 - said), 0.01) / len(chosen))
        assert abs(found - said) <= 3 * error, f"{len(chosen)} forecasts of {said:.2f} in the mean, {found:.2f} of them won"
        assert len(chosen) >= 10


@pytest.mark.parametrize("gain", [0.006, 0.0066])
def test_nine_intervals_of_ten_hold_the_true_probability(gain):
    """Of a challenger whose true gain is known: what it wins with is counted in plays from its own world, and of 50 windows in
    which it might have been measured at least nine in ten, less three binomial standard errors, have it in their interval."""
    count, windows, spread = 300, 4, 0.015
    truly = share_won(contest(planted(gain, spread, count)), windows, 400, 1, outer=False)
    assert 0.03 < truly < 0.97
    random, held, widths, nats = np.random.default_rng(31), 0, [], np.full(count, 1000.0)
    for _ in range(50):
        measured = contest({"ann": nats, "me": nats * np.exp(-gain + spread * random.standard_normal(count))})
        found = chances(measured, "me", windows, draws=40)[-1]
        held += found.low <= truly <= found.high
        widths.append(found.high - found.low)
    assert held >= 50 * 0.9 - 3 * math.sqrt(50 * 0.9 * 0.1)
    assert np.mean(widths) < 0.9


def test_an_equal_model_wins_no_more_often_than_the_rules_error_rate():
    (*_, last) = chances(contest(planted(0.0, 0.015)), "me", 20)
    assert last.probability <= c00("champion").scoring.error_rate
    assert last.high <= c00("champion").scoring.error_rate


def test_a_much_better_model_wins_at_once():
    first = chances(contest(planted(0.02, 0.015)), "me", 3)[0]
    assert first == Chance(1.0, 1.0, 1.0)


def test_a_worse_model_never_wins():
    assert chances(contest(planted(-0.004, 0.015)), "me", 20)[-1] == Chance(0.0, 0.0, 0.0)


def test_a_near_copy_has_no_chance_however_long_one_waits():
    assert chances(contest(planted(0.0004, 0.0005)), "me", 50) == (Chance(0.0, 0.0, 0.0),) * 50
    better = chances(contest(planted(0.004, 0.0005)), "me", 50)  # by more than the floor: no copy
    assert better[-1].probability == 1.0


def test_a_young_holders_advantage_decays_while_one_waits():
    """0.2 % of a new holder's loss are needed at first: 0.22 % would take 25 windows to show, but it shrinks."""
    young = contest(planted(0.0022, 0.003), age=1)
    found = [c.low for c in chances(young, "me", 26, draws=15)]
    assert found[0] == 0.0
    assert found == sorted(found)
    rule = young.competition.scoring
    lasting = rule.model_copy(update={"advantage": rule.advantage.model_copy(update={"decay_per_epoch": 1.0})})
    never = replace(young, competition=young.competition.model_copy(update={"scoring": lasting}))
    assert sum(found) > 1 + sum(c.low for c in chances(never, "me", 26, draws=15))
    assert chances(contest(planted(0.0022, 0.003)), "me", 5, draws=15)[-1].low == 1.0  # before an old holder


@pytest.mark.parametrize("rule", ["oldest_holder", "pairwise_epsilon"])
def test_under_other_rules_more_than_half_of_the_reward_is_a_win(rule):
    table = losses(300, 5, ann=(0.0, 0.015), bob=(0.001, 0.02), me=(-0.02, 0.015))
    assert chances(contest(table, rule), "me", 2)[0].probability > 0.95
    worse = losses(300, 5, ann=(0.0, 0.015), bob=(0.001, 0.02), me=(0.02, 0.015))
    assert chances(contest(worse, rule), "me", 2)[-1].probability < 0.05


def test_who_holds_the_crown_with_another_model_gives_it_up():
    """`me` commits to something else: then the oldest of the others holds it, who is far behind."""
    table = losses(300, 5, bob=(0.0, 0.015), me=(-0.05, 0.015))
    given_up = contest(table)
    memory = replace(given_up.memory, holder=Who("me", "its older model"))
    found = chances(replace(given_up, memory=memory), "me", 3, draws=20)
    assert found[0].probability == 1.0
    behind = losses(300, 5, bob=(0.0, 0.015), me=(0.02, 0.015))
    found = chances(replace(given_up, memory=memory, losses=behind), "me", 3, draws=20)
    assert found[-1].probability == 0.0


def test_the_same_seed_gives_the_same_numbers_and_progress_is_told():
    one, told = contest(planted(0.001, 0.015, 300)), []
    first = chances(one, "me", 8, seed=5, draws=40, progress=lambda done, total: told.append((done, total)))
    assert first[-1].probability == share_won(one, 8, 40, 5, outer=True)
    assert chances(one, "me", 8, seed=5, draws=40) == first
    assert told[-1] == (120, 120)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(c.low <= c.probability <= c.high for c in first)


def test_rows_over_different_texts_cannot_be_drawn_together():
    table = {**planted(0.001, 0.015, 100), "ann": (1000.0,) * 99}
    with pytest.raises(ValueError, match="99, 100"):
        chances(contest(table), "me", 2)
