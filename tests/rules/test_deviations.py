"""Every place where our rules answer otherwise than the reference validator's vectors, with the reason: all of them, here.

A case that is not listed must be answered like the reference (`test_scoring`, `test_weights`, `test_pairwise_epsilon`,
`test_selection`); a case that is listed must be answered otherwise, and those files say how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import pytest
from reference_vectors import REPOSITORY, VECTORS

NAN_IS_NO_LOSS = "the reference lets a NaN hold for ever and win the plain comparison; NaN is no loss here"
NO_POINT_FOR_NOTHING = "the reference gives a sample that nobody was scored on to the oldest; nobody gets it here"
EMPTY_IS_NO_ERROR = "the reference divides by zero; no samples mean that nobody wins"
UNSCORED_IS_NOT_COMPETITIVE = "SN9 keeps an oldest model of loss +inf among the competitive ones; its share is the same"

WIN_DEVIATIONS = {
    "newer_nan_never_wins_but_argmin_takes_nan": NAN_IS_NO_LOSS,
    "random_02": NAN_IS_NO_LOSS,
    "random_07": NAN_IS_NO_LOSS,
    "random_17": NAN_IS_NO_LOSS,
    "random_22": NAN_IS_NO_LOSS,
    "random_32": NAN_IS_NO_LOSS,
    "random_37": NAN_IS_NO_LOSS,
    "random_47": NAN_IS_NO_LOSS,
    "random_52": NAN_IS_NO_LOSS,
    "all_inf_oldest_wins": NO_POINT_FOR_NOTHING,
    "random_01": NO_POINT_FOR_NOTHING,
    "zero_samples_raises": EMPTY_IS_NO_ERROR,
}
MATRIX_DEVIATIONS = {name: why for name, why in WIN_DEVIATIONS.items() if why != NO_POINT_FOR_NOTHING}
FAME_DEVIATIONS = {
    "future_block_grows_max0.4": "there a reward that is still to come pays more than a fresh one; here nothing yet",
    "bad_entry_keeps_earlier_max1.0": "there an entry without a block is passed over; here the file is refused",
}
WEIGHT_DEVIATIONS = {
    "uid_in_two_comps_last_wins": "there the last competition replaces what the first one gave; here both pay",
}
SN9_DEVIATIONS = {"sn9_1": UNSCORED_IS_NOT_COMPETITIVE}

OF_ONE_CASE: Mapping[str, Mapping[str, str]] = {
    "compute_wins": WIN_DEVIATIONS,
    "hall_of_fame": FAME_DEVIATIONS,
    "update_weights": WEIGHT_DEVIATIONS,
    "sn9_pairwise": SN9_DEVIATIONS,
}
OF_EVERY_CASE = {
    "pool_selection": "there the pool is a list of uids with priorities that a restart forgets; here `selection.choose` goes by"
    " hotkey, weight and evidence, and a new commitment is always judged",
    "forced_reevaluation_window": "there ten uids are looked at again by the clock on the wall; here models are evaluated when"
    " a function of recorded losses and decayed advantage says that it can matter (`selection.out_of_reach`)",
    "model_identity": "there a base64 hash of the downloaded folder; here a content id from the Hub's metadata before a download",
    "tokenize": "there every text gets an end token and its first token is free; here a start token that is not scored",
    "mathutils_count_mean_std": "there pairs of means and t tests, for logs; here `rules.evidence`, which decides",
    "mathutils_pairs": "the same",
}
NOT_IN_THE_VECTORS = {
    "sn9_pairwise": "SN9 gives e**(-1 / temperature) to every registered model, competitive or not; here nobody (3.7e-44)",
    "compute_wins": "ties of a block go by a seeded hash, not by uid or dict order; groups come from a shared seed",
    "update_weights": "an empty round never erases weights",
}
"""Deviations that no recorded case is large or odd enough to show; `test_scoring`, `test_weights` and `test_champion` do."""


@pytest.mark.skipif(not VECTORS.exists(), reason=f"no {VECTORS.name} in ../shared/vectors or SN29_VECTORS")
def test_every_deviation_is_listed_and_every_case_is_read():
    vectors = {name: cases for name, cases in json.loads(VECTORS.read_text()).items() if name != "meta"}
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests" / "rules").glob("test_*.py"))
    read = set(re.findall(r"\b(?:cases|only)\(\"(\w+)\"", tests))
    assert read | set(OF_EVERY_CASE) == set(vectors)
    assert not read & set(OF_EVERY_CASE)
    assert set(NOT_IN_THE_VECTORS) <= read
    for section, deviations in OF_ONE_CASE.items():
        named = {case.get("name", str(place)) for place, case in enumerate(vectors[section])}
        assert set(deviations) <= named, section
        assert len(deviations) < len(named) / 2, f"{section}: more deviations than agreement"
