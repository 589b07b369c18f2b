from __future__ import annotations

from itertools import permutations

import pytest
from reference_vectors import cases

from sn29.errors import Reason
from sn29.records import Commitment, Entry, Metagraph, ModelId, Neuron
from sn29.rules.champion import Duel
from sn29.rules.competition import Pool
from sn29.rules.selection import (
    Claim,
    Inspected,
    choose,
    claimed_since,
    first_claims,
    large_validators,
    next_round,
    out_of_reach,
    select,
    top_miners,
)

DIGEST = "A" * 43 + "="


def commitment(hotkey: str, block: int, repo: str = "", competition: str = "c00") -> Commitment:
    return Commitment(hotkey, block, ModelId("miner", repo or f"of-{hotkey}", "0" * 40), DIGEST, competition)


def inspected(hotkey: str, block: int, content: str, *oids: str, repo: str = "") -> Inspected:
    return Inspected(commitment(hotkey, block, repo), content, oids)


def hotkeys(commitments) -> list[str]:
    return [c.hotkey for c in commitments]


# ---- next_round ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finalized", "last", "catch_up", "due"),
    [
        (359, None, 2, None),  # no window has passed yet
        (360, None, 2, 360),
        (1500, None, 5, 1440),  # a first start looks at the newest only
        (1500, 1440, 5, None),  # done
        (1799, 1440, 5, None),
        (1800, 1440, 5, 1800),
        (3600, 1440, 2, 3240),  # of the five that were missed the newest two
        (3600, 3240, 2, 3600),
        (3600, 1440, 0, 3600),
        (3600, 1440, 99, 1800),
    ],
)
def test_rounds_are_due_in_order_and_old_ones_are_skipped(finalized, last, catch_up, due):
    assert next_round({"c00": 360}, finalized, last, catch_up) == due
    assert next_round({"c00": 360, "c01": 360}, finalized, last, catch_up) == due


def test_a_round_is_due_when_any_window_opens_and_all_had_one():
    lengths, done = {"c00": 100, "c01": 250}, []
    while (block := next_round(lengths, 620, done[-1] if done else 0, 99)) is not None:
        done.append(block)
    assert done == [250, 300, 400, 500, 600]
    assert next_round({}, 1000, None, 2) is None


# ---- select ----------------------------------------------------------------------------------------------------------


def test_commitments_are_sorted_out_by_competition_oldest_first():
    given = [commitment("b", 30), commitment("a", 20, competition="c01"), commitment("d", 10), commitment("c", 10)]
    for order in permutations(given):
        found = select(order, {"c01", "c00"}, {})
        assert list(found.by_competition) == ["c00", "c01"]
        assert hotkeys(found.by_competition["c00"]) == ["c", "d", "b"]
        assert hotkeys(found.by_competition["c01"]) == ["a"]
        assert found.refused == ()


def test_a_competition_that_is_not_in_force_is_named_with_those_that_are():
    found = select([commitment("a", 1, competition="c07")], ["c01", "c00"], {})
    (refusal,) = found.refused
    assert refusal.failure.reason is Reason.UNKNOWN_COMPETITION
    assert (refusal.failure.got, refusal.failure.limit, refusal.failure.where) == ("c07", "c00, c01", "a")
    assert found.by_competition == {"c00": (), "c01": ()}


def test_a_model_that_is_known_to_belong_to_another_hotkey_is_a_copy():
    model = str(commitment("", 0, "x").model)
    found = select([commitment("late", 200, "x")], ["c00"], {model: Claim(100, "early")})
    (refusal,) = found.refused
    assert refusal.failure.reason is Reason.COPY
    assert refusal.failure.limit == "first committed by early at block 100"
    assert found.by_competition["c00"] == ()


@pytest.mark.parametrize("claim", [Claim(100, "me"), Claim(300, "me"), Claim(300, "other")])
def test_the_owner_and_who_was_there_before_are_no_copies(claim):
    mine = commitment("me", 200, "x")
    assert select([mine], ["c00"], {str(mine.model): claim}).by_competition["c00"] == (mine,)


def test_the_name_of_somebody_elses_repository_claims_nothing():
    """Whoever commits another one's repository first, without its digest, must not shut its owner out."""
    squatter, owner = commitment("squatter", 100, "x"), commitment("owner", 101, "x")
    found = select([squatter, owner], ["c00"], {})
    assert hotkeys(found.by_competition["c00"]) == ["squatter", "owner"]
    verified = [Inspected(owner, "content")]  # the squatter's digest does not match the files
    claims = first_claims(verified, {})
    assert hotkeys(claims.owners) == ["owner"]
    assert select([squatter, owner], ["c00"], claims.claims).by_competition["c00"] == (squatter, owner)


def test_nothing_to_select():
    assert select([], [], {}).by_competition == {}
    assert select([commitment("a", 1)], [], {}).refused[0].failure.limit == "none in force"


# ---- claimed_since ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "first_seen", "since"),
    [
        (500, 500, 500),  # nothing was seen before
        (500, 480, 480),  # its own seal
        (500, 140, 140),  # just within one window
        (500, 139, 500),  # held back for longer
        (500, 510, 500),  # seen later only: the commitment itself is older
    ],
)
def test_an_earlier_commitment_of_the_same_digest_counts_for_one_window(block, first_seen, since):
    assert claimed_since(commitment("a", block), first_seen, 360) == since


def test_a_seal_is_older_than_a_copy_that_came_before_its_commitment():
    """Also where the copy was looked at first, and where it names the very repository that it copies."""
    original, copy = inspected("z", 30, "content", "weights", repo="r"), inspected("b", 20, "content", "weights", repo="r")
    known = first_claims([copy], {}).claims
    sealed = Inspected(original.commitment, "content", ("weights",), since=10)
    for given in ([sealed, copy], [copy, sealed]):
        found = first_claims(given, known)
        assert hotkeys(found.owners) == ["z"]
        assert [r.failure.reason for r in found.refused] == [Reason.COPY]
        assert found.claims["content"] == Claim(10, "z")
    assert hotkeys(select([original.commitment], {"c00"}, known, {original.commitment: 10}).by_competition["c00"]) == ["z"]
    assert select([original.commitment], {"c00"}, known).refused[0].failure.reason is Reason.COPY


# ---- first_claims ----------------------------------------------------------------------------------------------------


def test_the_first_commitment_of_a_content_keeps_it_whatever_the_repository():
    given = [inspected("c", 300, "same"), inspected("a", 200, "same"), inspected("b", 100, "same")]
    for order in permutations(given):
        found = first_claims(order, {})
        assert hotkeys(found.owners) == ["b"]
        assert hotkeys(r.commitment for r in found.refused) == ["a", "c"]
        assert {r.failure.reason for r in found.refused} == {Reason.COPY}
        assert {r.failure.limit for r in found.refused} == {"first committed by b at block 100"}


def test_of_one_block_the_smaller_hotkey_is_first():
    for order in permutations([inspected("b", 100, "same"), inspected("a", 100, "same")]):
        assert hotkeys(first_claims(order, {}).owners) == ["a"]


def test_one_weight_file_in_common_is_a_copy_even_with_another_config():
    found = first_claims([inspected("a", 1, "x", "sha256:1", "sha256:2"), inspected("b", 2, "y", "sha256:2")], {})
    assert hotkeys(found.owners) == ["a"]
    assert found.refused[0].failure.got == "sha256:2"


def test_a_copy_claims_nothing_of_its_own():
    given = [inspected("a", 1, "x", "one"), inspected("b", 2, "y", "one", "two"), inspected("c", 3, "z", "two")]
    assert hotkeys(first_claims(given, {}).owners) == ["a", "c"]


def test_claims_are_remembered_after_their_owner_has_moved_on():
    known = first_claims([inspected("a", 100, "x", "one")], {}).claims
    found = first_claims([inspected("a", 300, "new"), inspected("b", 200, "x", "one")], known)
    assert hotkeys(found.owners) == ["a"]
    assert hotkeys(r.commitment for r in found.refused) == ["b"]
    assert known["x"] == Claim(100, "a")
    assert found.claims["new"] == Claim(300, "a")


def test_who_commits_the_same_again_keeps_the_first_claim():
    known = first_claims([inspected("a", 100, "x")], {}).claims
    found = first_claims([inspected("a", 300, "x"), inspected("b", 200, "x")], known)
    assert hotkeys(found.owners) == ["a"]
    assert found.claims["x"] == Claim(100, "a")


def test_an_older_commitment_that_turns_up_later_takes_the_claim():
    known = first_claims([inspected("b", 200, "x")], {}).claims
    found = first_claims([inspected("a", 100, "x"), inspected("b", 200, "x")], known)
    assert hotkeys(found.owners) == ["a"]
    assert found.claims["x"] == Claim(100, "a")


def test_what_is_known_is_not_changed_in_place():
    known: dict[str, Claim] = {}
    first_claims([inspected("a", 1, "x")], known)
    assert known == {}


@pytest.mark.parametrize("case", cases("commitment_dedupe"))
def test_the_owners_are_the_references(case):
    """The reference compares repository and revision: here they are the content. What it discarded, we judge again."""
    given = {h: c for h, c in case["input"]["commitments"].items() if isinstance(c, list)}
    ours = first_claims([inspected(h, block, model) for h, (model, block) in given.items()], {})
    theirs = given if case["name"] == "discarded" else case["expected"]["kept"]
    assert {c.hotkey: c.block for c in ours.owners} == {h: block for h, (_, block) in theirs.items()}


# ---- choose ----------------------------------------------------------------------------------------------------------


def test_few_candidates_are_all_chosen_oldest_first():
    given = [commitment("b", 2), commitment("a", 3), commitment("c", 1)]
    found = choose(given, Pool(keep=2, pending=1), {}, {})
    assert hotkeys(found.chosen) == ["c", "b", "a"]
    assert found.waiting == ()


def test_the_best_stay_then_come_the_new_ones_then_those_not_seen_for_longest():
    given = [commitment(h, block) for block, h in enumerate(["best", "second", "third", "seen", "unseen", "new2", "new3"])]
    weights = {"best": 0.6, "second": 0.3, "third": 0.1}
    evaluated = {str(commitment(h, 0).model): 7 for h in ("best", "second", "third", "seen")}
    evaluated[str(commitment("third", 0).model)] = 9
    for order in (given, given[::-1]):
        found = choose(order, Pool(keep=2, pending=2), weights, evaluated)
        assert hotkeys(found.chosen) == ["best", "second", "unseen", "new2"]
        assert hotkeys(found.waiting) == ["seen", "third", "new3"]


def test_a_new_model_of_the_best_miner_is_judged_at_once():
    improved = commitment("best", 500, "improved")
    others = [commitment(f"new{n}", n) for n in range(5)]
    assert improved in choose([*others, improved], Pool(keep=1, pending=1), {"best": 1.0}, {}).chosen


def test_everybody_gets_a_turn():
    given = [commitment(f"h{n}", n) for n in range(7)]
    evaluated: dict[str, int] = {}
    for window in range(4):
        for chosen in choose(given, Pool(keep=1, pending=1), {"h0": 1.0}, evaluated).chosen:
            evaluated[str(chosen.model)] = window
    assert len(evaluated) == 5  # h0 in every window, and four others in four windows
    for window in range(4, 6):
        for chosen in choose(given, Pool(keep=1, pending=1), {"h0": 1.0}, evaluated).chosen:
            evaluated[str(chosen.model)] = window
    assert len(evaluated) == 7
    assert hotkeys(choose(given, Pool(keep=1, pending=1), {"h0": 1.0}, evaluated).chosen) == ["h0", "h1"]


@pytest.mark.parametrize("case", cases("weight_skew_and_retention"))
def test_the_pool_keeps_whom_the_reference_keeps(case):
    rates = case["input"]["win_rate"]
    given = [commitment(str(uid), 1) for uid in case["input"]["uids_pool"]]
    seen = {str(c.model): 1 for c in given}
    found = choose(given, Pool(keep=case["input"]["pool_size"], pending=0), rates, seen)
    assert set(hotkeys(found.chosen)) == {str(uid) for uid in case["expected"]["kept_pool_ascending"]}
    assert set(hotkeys(found.waiting)) == {str(uid) for uid in case["expected"]["dropped"]}


# ---- choose: other validators, and who rests -------------------------------------------------------------------------


def neuron(hotkey: str, stake: float, last_update: int = 1000, permit: bool = True) -> Neuron:
    return Neuron(0, hotkey, "cold", permit, stake, 0.0, last_update, 0)


def test_the_validators_that_count_are_large_permitted_and_recent():
    neurons = [neuron("small", 1), neuron("b", 9), neuron("a", 9), neuron("old", 50, 0), neuron("miner", 99, permit=False)]
    for order in permutations(neurons):
        assert large_validators(Metagraph(29, 1201, tuple(order)), count=2) == ("a", "b")
    assert large_validators(Metagraph(29, 1200, tuple(neurons)), count=1) == ("old",)


def test_top_miners_are_those_that_anybody_rewards():
    assert top_miners([{"a": 0.9, "b": 0.05, "c": 0.05}, {"b": 0.06, "d": 0.94}]) == {"a", "b", "d"}
    assert top_miners([]) == frozenset()


def duel(challenger: str, low: float, *, won: bool = False) -> Duel:
    return Duel(challenger, "holder", 1500, low / 2, low, 0.001, 0.003, False, won, 0.01, 0.005)


def test_a_challenger_rests_while_even_its_best_case_is_not_enough():
    entries = {h: Entry(h, 1) for h in ("holder", "far", "near", "winner")}
    duels = [duel("far", -0.0012), duel("near", -0.0031), duel("winner", 0.0, won=True)]
    assert out_of_reach(duels, entries, {"holder": 0.003}) == {"far"}
    assert out_of_reach(duels, entries, {"holder": 0.0011}) == frozenset(), "the advantage decayed"
    gone = {h: e for h, e in entries.items() if h != "holder"}
    assert out_of_reach(duels, gone, {}) == frozenset(), "against another holder everything is open"


def test_new_models_come_before_favoured_ones_and_resting_ones_get_no_place():
    given = [commitment(h, block) for h, block in (("rest", 1), ("seen", 2), ("top", 3), ("new", 4), ("kept", 5))]
    last = {str(c.model): 100 for c in given if c.hotkey != "new"}
    found = choose(given, Pool(keep=1, pending=2), {"kept": 1.0}, last, favoured={"top"}, resting={"rest"})
    assert hotkeys(found.chosen) == ["top", "new", "kept"]
    assert hotkeys(found.waiting) == ["seen", "rest"]
    found = choose(given, Pool(keep=2, pending=1), {"kept": 1.0}, last, challenging=["seen"], favoured={"top"})
    assert hotkeys(found.chosen) == ["seen", "new", "kept"]
    found = choose(given, Pool(keep=1, pending=9), {"kept": 1.0}, last, favoured={"top"}, resting={"rest"})
    assert hotkeys(found.waiting) == ["rest"]
    found = choose(given, Pool(keep=1, pending=9), {"kept": 1.0}, {}, resting={"rest"})
    assert hotkeys(found.waiting) == ["rest"], "also under a new revision, or in a store that has not seen it evaluated"


def test_a_flood_of_new_models_does_not_stop_who_has_something_to_show():
    """Eight hotkeys commit something new in each window; the challenger is evaluated in every one."""
    honest, holder = commitment("honest", 5), commitment("holder", 1)
    evaluated = {str(honest.model): 100, str(holder.model): 100}
    for window in range(10):
        flood = [commitment(f"f{i}", 100 + window, repo=f"r{i}-{window}") for i in range(8)]
        found = choose([*flood, honest, holder], Pool(keep=6, pending=3), {"holder": 1.0}, evaluated, challenging=["honest"])
        assert {"honest", "holder"} <= set(hotkeys(found.chosen))
        assert len(found.chosen) == 9
