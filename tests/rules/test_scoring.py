from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from reference_vectors import REPOSITORY, cases, number, only, table
from test_deviations import EMPTY_IS_NO_ERROR, MATRIX_DEVIATIONS, NAN_IS_NO_LOSS, WIN_DEVIATIONS

from sn29.errors import Rejected
from sn29.records import Entry, Score
from sn29.rules.competition import Competition, parse_competition
from sn29.rules.oldest_holder import advantage_factor, group_losses, holds, judge, shuffled, skewed
from sn29.rules.scoring import Memory, score, win_matrix
from sn29.rules.scoring_fields import (
    Advantage,
    Bootstrap,
    Champion,
    Epsilon,
    LastHolders,
    OldestHolder,
    PairwiseEpsilon,
)

ADVANTAGE = Advantage(initial=0.004, decay_per_epoch=0.995, blocks_per_epoch=361)
EPOCH = 361
INF, NAN = math.inf, math.nan


def competition(group: int = 1, skew: float = 2.0, advantage: Advantage = ADVANTAGE) -> Competition:
    return competition_under(OldestHolder(group=group, skew=skew, advantage=advantage))


def competition_under(rule) -> Competition:
    shipped = parse_competition("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
    return shipped.model_copy(update={"scoring": rule})


def entries_of(blocks: dict[str, int]) -> dict[str, Entry]:
    return {hotkey: Entry(f"content of {hotkey}", block) for hotkey, block in blocks.items()}


def scored(losses, blocks, block=1000, **rule) -> dict[str, Score]:
    found = score(competition(**rule), losses, entries_of(blocks), block, b"seed")
    assert found.duels == ()
    assert found.memory == Memory.empty()
    return {s.hotkey: s for s in found.scores}


def run_vector(given: dict) -> tuple[dict[str, str], dict[str, Score]]:
    """Hotkey of each uid, and our scores. Of equal blocks the reference keeps the given order: so do these rows."""
    hotkeys = {str(uid): f"{place:03d}" for place, uid in enumerate(given["uid_order"])}
    losses = {hotkeys[uid]: row for uid, row in table(given["losses"]).items()}
    blocks = {hotkeys[uid]: block for uid, block in given["blocks"].items()}
    advantage = Advantage(
        initial=given["advantage_initial"],
        decay_per_epoch=given["advantage_decay_per_epoch"],
        blocks_per_epoch=EPOCH,
    )
    rule = OldestHolder(group=1, skew=2.0, advantage=advantage)
    order = sorted(losses, key=lambda hotkey: (blocks[hotkey], hotkey))
    rows = np.array([losses[hotkey] for hotkey in order], dtype=float).reshape(len(order), -1 if order else 0)
    found = judge(rule, order, np.where(rows >= 0, rows, INF), entries_of(blocks), given["current_block"], b"seed")
    return hotkeys, {s.hotkey: s for s in found}


# ---- against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("compute_wins", leave_out=WIN_DEVIATIONS))
def test_wins_are_the_references(case):
    hotkeys, ours = run_vector(case["input"])
    theirs = case["expected"]
    if not theirs:
        assert ours == {}
        return
    for uid, hotkey in hotkeys.items():
        mine = ours.get(hotkey)
        assert (mine.wins if mine else 0) == theirs["wins"][uid]
        assert (mine.win_rate if mine else 0) == pytest.approx(theirs["win_rate"][uid], rel=1e-12)
        assert (mine.win_rate_without_advantage if mine else 0) == pytest.approx(theirs["win_abs_rate"][uid], rel=1e-12)
        if mine:
            assert mine.advantage == pytest.approx(theirs["advantage_factors"][uid], rel=1e-12)


def reference_winner(column: list[float], factors: list[float]) -> int:
    """The reference's rule, with its faults: NaN cannot be beaten, and a holder need not have been scored."""
    holder = 0
    for row in range(1, len(column)):
        if column[row] < column[holder] * factors[holder]:
            holder = row
    return holder


@pytest.mark.parametrize("case", only("compute_wins", WIN_DEVIATIONS))
def test_wins_deviate_from_the_reference_only_where_they_are_meant_to(case):
    given, why = case["input"], WIN_DEVIATIONS[case["name"]]
    if why == EMPTY_IS_NO_ERROR:
        assert "ZeroDivisionError" in case["raises"]
        assert [s.win_rate for s in run_vector(given)[1].values()] == [0, 0]
        return
    losses, factors = table(given["losses"]), case["expected"]["advantage_factors"]
    uids = sorted(losses, key=lambda uid: given["blocks"][uid])
    columns = np.array([losses[uid] for uid in uids]).T
    theirs = [reference_winner(column.tolist(), [factors[uid] for uid in uids]) for column in columns]
    assert {uid: theirs.count(row) for row, uid in enumerate(uids)} == {u: case["expected"]["wins"][u] for u in uids}
    assert np.isnan(columns).any() == (why == NAN_IS_NO_LOSS)

    blocks = [given["blocks"][uid] for uid in uids]
    advantage = Advantage(
        initial=given["advantage_initial"], decay_per_epoch=given["advantage_decay_per_epoch"], blocks_per_epoch=EPOCH
    )
    differences = 0
    for column, winner in zip(columns, theirs, strict=True):
        ours = holds(column[:, None], blocks, given["current_block"], advantage)
        assert ours.sum() == np.isfinite(column).any()
        if ours.sum() == 0 or ours.argmax() != winner or np.nanargmin(column) != np.argmin(column):
            differences += 1
            assert np.isnan(column).any() or not np.isfinite(column).any()
    assert differences > 0


@pytest.mark.parametrize("case", cases("compute_wins", leave_out=MATRIX_DEVIATIONS))
def test_win_matrix_is_the_references(case):
    given = case["input"]
    hotkeys = {str(uid): f"{place:03d}" for place, uid in enumerate(given["uid_order"])}
    advantage = Advantage(
        initial=given["advantage_initial"], decay_per_epoch=given["advantage_decay_per_epoch"], blocks_per_epoch=EPOCH
    )
    matrix = win_matrix(
        {hotkeys[uid]: row for uid, row in table(given["losses"]).items()},
        {hotkeys[uid]: block for uid, block in given["blocks"].items()},
        given["current_block"],
        advantage,
    )
    theirs = case["expected"].get("matrix", {})
    assert len(matrix.hotkeys) == len(theirs)
    for a, row in theirs.items():
        for b, cell in row.items():
            at, to = matrix.hotkeys.index(hotkeys[a]), matrix.hotkeys.index(hotkeys[b])
            assert matrix.wins[at][to] == cell["wins"]
            assert matrix.wins_with_advantage[at][to] == cell["wins_adv"]
            assert matrix.mean_delta[at][to] == pytest.approx(number(cell["loss"]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("case", cases("group_samples"))
def test_groups_are_the_references(case):
    losses = table(case["input"]["losses"])
    ours = group_losses(np.array(list(losses.values())), case["permutation_used"], case["input"]["group_size"])
    theirs = [[number(x) for x in case["expected"][uid]] for uid in losses]
    np.testing.assert_allclose(ours, np.array(theirs).reshape(ours.shape), rtol=1e-12)


@pytest.mark.parametrize("case", cases("group_then_wins_then_skew"))
def test_groups_wins_and_skew_together_are_the_references(case):
    given, theirs = case["input"], case["expected"]
    losses = table(given["losses"])
    by_age = sorted(losses, key=lambda uid: given["blocks"][uid])  # stable: equal blocks keep the given order
    groups = group_losses(np.array([losses[uid] for uid in by_age]), given["permutation"], given["group_size"])
    blocks = [given["blocks"][uid] for uid in by_age]
    rates = holds(groups, blocks, given["current_block"], ADVANTAGE) / groups.shape[1]
    assert rates.tolist() == pytest.approx([theirs["win_rate"][uid] for uid in by_age], rel=1e-12)
    for skew, name in [(1.2, "weights_skew_1_2"), (2.0, "weights_skew_2_0")]:
        assert skewed(rates.tolist(), skew) == pytest.approx([theirs[name][uid] for uid in by_age], rel=1e-6)


@pytest.mark.parametrize("case", cases("weight_skew_and_retention"))
def test_skew_is_the_references(case):
    rates, theirs = case["input"]["win_rate"], case["expected"]["weights"]
    ours = skewed(list(rates.values()), case["input"]["weight_skew_factor"] or 1.2)
    assert ours == pytest.approx([theirs[uid] for uid in rates], rel=1e-6)


# ---- the rules, by themselves ----------------------------------------------------------------------------------------


def test_the_worked_example_of_the_module():
    losses = {
        "oldest": [1000, 900, 1200, 800, INF],
        "middle": [997, 905, 1190, 798, 1500],
        "newest": [996, 890, 1195, 799.5, 1499],
    }
    blocks = {"oldest": 5_000_000, "middle": 5_003_610, "newest": 5_007_220}
    ours = scored(losses, blocks, 5_010_830)
    assert {h: s.wins for h, s in ours.items()} == {"oldest": 1, "middle": 2, "newest": 2}
    assert {h: s.win_rate for h, s in ours.items()} == {"oldest": 0.2, "middle": 0.4, "newest": 0.4}
    assert {h: s.win_rate_without_advantage for h, s in ours.items()} == {"oldest": 0, "middle": 0.4, "newest": 0.6}
    assert {h: round(s.advantage, 6) for h, s in ours.items()} == {
        "oldest": 0.996558,
        "middle": 0.996382,
        "newest": 0.996196,
    }
    assert {h: round(s.weight, 6) for h, s in ours.items()} == {
        "oldest": round(1 / 9, 6),
        "middle": round(4 / 9, 6),
        "newest": round(4 / 9, 6),
    }


@pytest.mark.parametrize(
    ("days", "percent"),
    [(0, 0.4), (1, 0.3619), (3, 0.2964), (7, 0.1987), (14, 0.0987), (30, 0.0199), (60, 0.0010)],
)
def test_the_advantage_shrinks_to_half_in_a_week(days, percent):
    assert (1 - advantage_factor(days * 7200, ADVANTAGE)) * 100 == pytest.approx(percent, abs=6e-5)


def test_a_commitment_from_the_future_has_no_advantage():
    assert advantage_factor(-1, ADVANTAGE) == 1.0


def test_an_order_is_a_permutation_that_only_the_seed_decides():
    assert sorted(shuffled(1500, b"a")) == list(range(1500))
    assert shuffled(1500, b"a") == shuffled(1500, b"a")
    assert shuffled(1500, b"a") != shuffled(1500, b"b")
    assert shuffled(0, b"a") == ()
    assert shuffled(1, b"a") == (0,)


def test_orders_are_pinned_because_validators_of_all_versions_must_agree():
    assert shuffled(10, b"sn29") == (6, 8, 3, 5, 2, 1, 7, 9, 0, 4)
    assert shuffled(10, bytes(32)) == (7, 6, 9, 5, 4, 2, 3, 1, 0, 8)


def test_every_order_is_equally_likely():
    seen = Counter(shuffled(3, number.to_bytes(4, "big")) for number in range(6000))
    assert len(seen) == 6
    assert all(abs(times - 1000) < 120 for times in seen.values())  # four standard deviations are 115


def random_losses(models: int, samples: int, seed: int) -> np.ndarray:
    """Losses around 1000 nats that differ between models by less and by more than the advantage; some unusable."""
    base = np.array(shuffled(samples, b"base%d" % seed), dtype=float) + 500
    rows = [base * (1 + (np.array(shuffled(samples, b"%d/%d" % (seed, m))) / samples - 0.5) / 50) for m in range(models)]
    rows = np.array(rows)
    for m in range(models):
        odd = shuffled(samples, b"odd%d/%d" % (seed, m))
        rows[m, list(odd[: samples // 10])] = INF
        rows[m, list(odd[-samples // 20 :])] = NAN
    rows[:, shuffled(samples, b"dead%d" % seed)[0]] = NAN
    return rows


def plain_wins(losses, blocks, block) -> list[int]:
    """`holds` once more, in the plainest way."""
    wins = [0] * len(losses)
    for column in range(losses.shape[1]):
        holder = None
        for row, loss in enumerate(losses[:, column].tolist()):
            if not math.isfinite(loss):
                continue
            bar = INF
            if holder is not None:
                bar = losses[holder, column] * advantage_factor(block - blocks[holder], ADVANTAGE)
            if loss < bar:
                holder = row
        if holder is not None:
            wins[holder] += 1
    return wins


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_way_and_the_plain_way_agree(seed):
    losses = random_losses(models=2 + seed % 7, samples=60, seed=seed)
    blocks = [1000 * row for row in range(len(losses))]
    block = 1000 * len(losses) + 361 * seed
    assert holds(losses, blocks, block, ADVANTAGE).tolist() == plain_wins(losses, blocks, block)


@pytest.mark.parametrize("group", [1, 3, 10])
def test_the_order_of_the_miners_changes_nothing(group):
    losses = {f"h{row}": values.tolist() for row, values in enumerate(random_losses(6, 100, 7))}
    blocks = {"h0": 50, "h1": 10, "h2": 10, "h3": 10, "h4": 2000, "h5": 7}
    first = score(competition(group), losses, entries_of(blocks), 1000, b"seed")
    for turn in range(1, 6):
        hotkeys = [f"h{(row + turn) % 6}" for row in range(6)]
        others = entries_of(dict(reversed(blocks.items())))
        again = score(competition(group), {h: losses[h] for h in hotkeys}, others, 1000, b"seed")
        assert again == first
    assert sum(s.win_rate for s in first.scores) == pytest.approx(1)
    assert sum(s.weight for s in first.scores) == pytest.approx(1)


@pytest.mark.parametrize("nothing", [NAN, INF, -INF, -1.0])
@pytest.mark.parametrize("block", [0, 5, 999])
def test_a_model_that_was_not_scored_wins_nothing_and_changes_nothing(nothing, block):
    losses = {"a": [10.0, 11.0, 12.0, 13.0], "b": [10.5, 10.0, 12.5, 11.0]}
    blocks = {"a": 5, "b": 6, "dead": block}
    alone = scored(losses, blocks, group=2)
    beside = scored({**losses, "dead": [nothing] * 4}, blocks, group=2)
    dead = beside.pop("dead")
    assert (dead.wins, dead.win_rate, dead.win_rate_without_advantage, dead.weight) == (0, 0, 0, 0)
    assert beside == alone


def test_an_oldest_model_that_failed_on_a_sample_does_not_hold_it():
    ours = scored({"old": [NAN, 10.0], "new": [50.0, 10.0]}, {"old": 1, "new": 2})
    assert {h: s.wins for h, s in ours.items()} == {"new": 1, "old": 1}


def test_a_sample_that_nobody_was_scored_on_gives_nobody_a_point():
    ours = scored({"old": [INF, 10.0, 10.0], "new": [NAN, 9.0, 10.0]}, {"old": 1, "new": 2})
    assert {h: (s.wins, s.win_rate) for h, s in ours.items()} == {"new": (1, 0.5), "old": (1, 0.5)}


def test_a_group_without_a_single_scored_sample_is_left_out_and_the_reference_gave_it_to_the_oldest():
    losses = np.array([[NAN, INF, 1.0, 2.0], [INF, NAN, 3.0, 4.0]])
    assert group_losses(losses, (0, 1, 2, 3), 2).tolist() == [[3.0], [7.0]]


def test_a_group_in_which_each_model_failed_somewhere_is_left_out():
    losses = np.array([[NAN, 1.0, 1.0, 2.0], [1.0, NAN, 3.0, 4.0]])
    assert group_losses(losses, (0, 1, 2, 3), 2).tolist() == [[3.0], [7.0]]


def test_one_failed_sample_costs_the_whole_group():
    assert group_losses(np.array([[1.0, INF], [5.0, 5.0]]), (0, 1), 2).tolist() == [[INF], [10.0]]


def first_of_one_block(seed: bytes, contents: dict[str, str]) -> str:
    losses = {hotkey: [10.0] for hotkey in contents}
    entries = {hotkey: Entry(content, 5) for hotkey, content in contents.items()}
    found = score(competition(), losses, entries, 1000, seed).scores
    backwards = score(competition(), dict(reversed(losses.items())), entries, 1000, seed).scores
    assert found == backwards
    return next(s.hotkey for s in found if s.wins)


def test_of_one_block_a_hash_that_nobody_knows_yet_decides_and_not_the_hotkey():
    by_seed = Counter(first_of_one_block(n.to_bytes(2, "big"), {"a": "one", "b": "two", "c": "three"}) for n in range(600))
    assert set(by_seed) == {"a", "b", "c"}
    assert all(abs(times - 200) < 47 for times in by_seed.values())  # four standard deviations are 46
    for n in range(50):
        seed = n.to_bytes(2, "big")
        one_way = first_of_one_block(seed, {"a": "one", "b": "two"})
        swapped = first_of_one_block(seed, {"b": "one", "a": "two"})
        assert (one_way == "a") == (swapped == "b")


def test_equal_losses_stay_with_the_oldest():
    ours = scored({"a": [10.0], "b": [10.0], "c": [10.0]}, {"a": 300, "b": 200, "c": 100})
    assert (ours["c"].wins, ours["c"].win_rate_without_advantage) == (1, 1)
    none = Advantage(initial=0, decay_per_epoch=1, blocks_per_epoch=361)
    assert scored({"a": [10.0], "b": [10.0]}, {"a": 2, "b": 1}, advantage=none)["b"].wins == 1


def test_nobody_and_nothing():
    for rule in (OldestHolder(), PairwiseEpsilon(), Champion()):
        assert score(competition_under(rule), {}, {}, 1000, b"seed").scores == ()
    for group, row in [(1, []), (5, [1.0, 2.0]), (1, [NAN])]:
        ours = scored({"a": row, "b": row}, {"a": 1, "b": 2}, group=group)
        assert all((s.wins, s.win_rate, s.weight) == (0, 0, 0) for s in ours.values())
    empty = win_matrix({}, {}, 1000, ADVANTAGE)
    assert empty.hotkeys == ()
    assert skewed([], 2.0) == []


def test_rows_of_different_length_are_a_bug():
    with pytest.raises(ValueError, match="different numbers of samples"):
        scored({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1, "b": 2})


def test_a_large_skew_leaves_the_best_with_everything():
    assert skewed([0.6, 0.4], 1e6) == [1.0, 0.0]


def test_samples_that_no_pair_shares_have_no_mean():
    matrix = win_matrix({"a": [1.0, INF], "b": [NAN, 2.0]}, {"a": 1, "b": 2}, 1000, ADVANTAGE)
    assert matrix.mean_delta == ((0.0, INF), (INF, 0.0))


# ---- the section of a competition file -------------------------------------------------------------------------------


def section(text: str) -> str:
    """c00.yaml with another `scoring` section."""
    shipped = (REPOSITORY / "competitions" / "c00.yaml").read_text()
    return shipped[: shipped.index("scoring:")] + text + shipped[shipped.index("\npool:") :]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", Champion()),
        ("scoring: {rule: champion}", Champion()),
        ("scoring: {rule: oldest_holder, group: 3}", OldestHolder(group=3)),
        ("scoring: {rule: pairwise_epsilon, epsilon: {start: 0.01}}", PairwiseEpsilon(epsilon=Epsilon(start=0.01))),
        ("scoring: {rule: champion, share: {kind: last_holders}}", Champion(share=LastHolders(decay=0.5, count=4))),
        ("scoring: {rule: champion, share: {kind: bootstrap, draws: 9}}", Champion(share=Bootstrap(draws=9))),
    ],
)
def test_a_rule_is_chosen_by_name_and_brings_its_own_defaults(text, rule):
    found = parse_competition("c00", section(text))
    assert found.scoring == rule
    assert Competition.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("text", "field", "got", "rule"),
    [
        ("scoring: {rule: newest}", "scoring.rule", "newest", "'champion' or 'oldest_holder' or 'pairwise_epsilon'"),
        ("scoring: {rule: [champion]}", "scoring.rule", "['champion']", "'champion'"),
        ("scoring: {skew: 2}", "scoring.rule", "nothing", "'champion'"),
        ("scoring: champion", "scoring", "champion", "a mapping"),
        ("scoring: {rule: champion, group: 10}", "scoring", "the field group", "one of rule, advantage"),
        ("scoring: {rule: champion, share: {kind: all}}", "scoring.share.kind", "all", "'winner' or 'last_holders'"),
        ("scoring: {rule: champion, share: {kind: winner, count: 2}}", "scoring.share", "the field count", "kind"),
        ("scoring: {rule: champion, advantage: {initial: 0.2}}", "scoring.advantage", "initial 0.2", "at most 0.1"),
        ("scoring: {rule: champion, error_rate: 0}", "scoring.error_rate", "0", "greater than 0"),
        ("scoring: {rule: pairwise_epsilon, temperature: 0}", "scoring.temperature", "0", "greater than 0"),
        ("scoring: {rule: oldest_holder, group: 1501}", "", "samples.count 1500", "at least scoring.group, 1501"),
    ],
)
def test_what_is_wrong_with_a_section_is_named(text, field, got, rule):
    with pytest.raises(Rejected) as failure:
        parse_competition("c00", section(text))
    assert failure.value.got.startswith(got)
    assert rule in failure.value.limit
    assert str(failure.value).startswith(f"c00.yaml: {field}" if field else "c00.yaml")
