from __future__ import annotations

from dataclasses import replace

import pytest
from reference_vectors import REPOSITORY
from test_competition import MODEL, VALID, refusal_of

from sn29.rules.competition import FixedTokenizer, FreeTokenizer, tokenizer_for, violations
from sn29.rules.schedule import (
    Clock,
    CompetitionFile,
    check_files,
    differences,
    in_force,
    parse_file,
    rules_for,
    seconds_of,
)

HISTORY = REPOSITORY / "tests" / "rules" / "history"
HOTKEY = "5FFM6Nvvm78GqyMratgXXvjbqZPi7SHgSQ81nyS96jBuUWgt"
CLOCK = "clock: {block: 1000, time: 2024-08-01T00:00Z, block_seconds: 12}\n"


def changed(*changes: str, more: str = "") -> CompetitionFile:
    return parse_file("c07", text_of(*changes, more=more))


def text_of(*changes: str, more: str = "") -> str:
    return VALID + more + "changes:\n" + "".join(f"  - {change}\n" for change in changes)


def parameters(file: CompetitionFile, block: int) -> int:
    return in_force(file, block).limits.parameters


# ---- what is in force ------------------------------------------------------------------------------------------------


def test_a_file_without_changes_has_one_version_for_ever():
    file = parse_file("c07", VALID)
    assert in_force(file, 0) == in_force(file, 10**9) == file.versions[0].competition
    assert [version.block for version in file.versions] == [0]


def test_a_field_is_set_from_its_block_on():
    file = changed("{at: 100, set: {limits.parameters: 7e9}}", "{at: 200, set: {limits.parameters: 5e9, pool.keep: 2}}")
    assert [parameters(file, block) for block in (0, 99, 100, 199, 200, 10**8)] == [
        6_900_000_000, 6_900_000_000, 7_000_000_000, 7_000_000_000, 5_000_000_000, 5_000_000_000,
    ]  # fmt: skip
    assert (in_force(file, 199).pool.keep, in_force(file, 200).pool.keep) == (6, 2)
    assert file.versions[2].what == ("limits.parameters 7,000,000,000 -> 5,000,000,000", "pool.keep 6 -> 2")
    assert file.versions[2].origin == "changes.1"


def test_a_ramp_begins_at_from_and_ends_at_to_after_its_blocks():
    ramp = "{at: 1000, ramp: {limits.parameters: {from: 3e9, to: 4e9, over_blocks: 10, step: 0.25e9}}}"
    values = [parameters(changed(ramp), block) // 10**6 for block in range(998, 1013)]
    # a step every 2.5 blocks: at 1003 (2.5 rounded up), 1005, 1008 and 1010
    assert values == [6900, 6900, 3000, 3000, 3000, 3250, 3250, 3500, 3500, 3500, 3750, 3750, 4000, 4000, 4000]


def test_a_ramp_goes_down_too_and_keeps_decimals_as_they_are_written():
    file = changed("{at: 10, ramp: {scoring.advantage.initial: {from: 0.4, to: 0.1, over_blocks: 3, step: 0.1}}}")
    assert [in_force(file, block).scoring.advantage.initial for block in (9, 10, 11, 12, 13)] == [0.004, 0.4, 0.3, 0.2, 0.1]


def test_a_ramp_from_the_value_that_is_there_changes_nothing_at_its_start():
    file = changed("{at: 10, ramp: {limits.parameters: {from: 6.9e9, to: 7e9, over_blocks: 5, step: 0.1e9}}}")
    assert [version.block for version in file.versions] == [0, 15]


def test_a_time_is_the_first_block_at_or_after_it():
    file = changed("{at: 2024-08-01T01:00Z, set: {pool.keep: 2}}", "{at: 2024-08-02, set: {pool.keep: 3}}", more=CLOCK)
    assert [version.block for version in file.versions] == [0, 1300, 8200]
    clock = Clock(block=1000, time="2024-08-01T00:00Z", block_seconds=12)
    assert (clock.block_at("2024-08-01T00:00:01Z"), clock.block_at("2024-07-31T23:59:48Z")) == (1001, 999)
    assert clock.time_of(8200) == "2024-08-02T00:00Z"
    assert seconds_of("1970-01-02") == 86400


def test_a_whole_section_is_replaced():
    file = changed("{at: 10, set: {tokenizer: {free: true}, families: [PhiForCausalLM]}}")
    assert isinstance(in_force(file, 9).tokenizer, FixedTokenizer)
    assert isinstance(in_force(file, 10).tokenizer, FreeTokenizer)
    assert in_force(file, 10).families == ("PhiForCausalLM",)


def test_one_data_set_becomes_several():
    two = "[{folder: a, files: '*', column: t}, {folder: b, files: '*', column: t, weight: 3}]"
    file = changed(f"{{at: 10, set: {{datasets: {two}}}}}", "{at: 20, set: {datasets.1.weight: 1}}")
    assert [tuple(d.weight for d in in_force(file, block).datasets) for block in (9, 10, 20)] == [(1,), (1, 3), (1, 1)]


def test_what_is_not_pinned_later_is_known_at_once():
    file = changed("{at: 10, set: {dataset.revision: null}}", "{at: 20, set: {pool.keep: 2}}")
    assert file.unpinned == ("dataset.revision from block 10 on",)


def test_a_verdict_is_keyed_by_the_rules_in_force_not_by_the_file():
    file = changed("{at: 10, set: {limits.parameters: 7e9}}", "{at: 20, set: {limits.parameters: 6.9e9}}")
    ids = [in_force(file, block).id for block in (0, 10, 20)]
    assert ids[0] == ids[2] != ids[1]


# ---- what is wrong with a change -------------------------------------------------------------------------------------

WRONG = [
    # changes, more, field, got, rule
    (["{at: 20, set: {pool.keep: 1}}", "{at: 10, set: {pool.keep: 2}}"], "", "changes.1.at", "block 10", "sorted"),
    (["{at: 0, set: {pool.keep: 1}}"], "", "changes.0.at", "block 0", "from 1 on"),
    (["{at: 1.5, set: {pool.keep: 1}}"], "", "changes.0: at", "1.5", "whole number"),
    (["{at: 10}"], "", "changes.0", "neither", "one of the two"),
    (["{set: {pool.keep: 1}}"], "", "changes.0: at", "nothing", "a value"),
    (["{at: 10, sets: {pool.keep: 1}}"], "", "changes.0", "sets", "at, set, ramp"),
    (["{at: 2024-08-06, set: {pool.keep: 1}}"], "", "changes.0.at", "2024-08-06", "clock"),
    (["{at: tomorrow, set: {pool.keep: 1}}"], CLOCK, "changes.0: at", "tomorrow", "2024-08-06T07:00Z"),
    (["{at: 2024-02-30, set: {pool.keep: 1}}"], CLOCK, "changes.0: at", "2024-02-30", "a UTC time"),
    (["{at: 2023-08-06, set: {pool.keep: 1}}"], CLOCK, "changes.0.at", "block -2", "from 1 on"),
    (["{at: 10, set: {pool.keeps: 1}}"], "", "changes.0 (block 10): pool", "keeps", "keep, pending"),
    (["{at: 10, set: {pol.keep: 1}}"], "", "changes.0 (block 10)", "pol", "reward_share"),
    (["{at: 10, set: {limits.parameters: -1}}"], "", "changes.0 (block 10): limits.parameters", "-1", "greater than 0"),
    (["{at: 10, set: {reward_share.x: 1}}"], "", "changes.0 (block 10)", "x inside 1", "inside a section"),
    (["{at: 10, set: {families.1: PhiForCausalLM}}"], "", "changes.0 (block 10)", "1", "below 1"),
    (["{at: 10, set: {samples.count: 9}}"], "", "changes.0 (block 10)", "samples.count 9", "at least scoring.group"),
    (["{at: 10, set: {samples.window_blocks: 10}}"], "", "samples.window_blocks", "10", "360, at every block"),
    (["{at: 10, set: {name: c08}}"], "", "changes.0.set.name", "name", "no name"),
    (["{at: 10, set: {clock.block: 1}}"], "", "changes.0.set.clock.block", "clock.block", "no schedule"),
    (["{at: 10, set: {pool: {keep: 1, pending: 1}, pool.keep: 2}}"], "", "set.pool.keep", "block 10", "changes.0 ends"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 9, over_blocks: 90, step: 1}}}", "{at: 99, set: {pool.keep: 2}}"], "",
     "changes.1.set.pool.keep", "block 99", "after 100, where changes.0 ends"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 2, over_blocks: 90, step: 0.3}}}"], "", "pool.keep", "by 0.3", "a whole number"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 2, over_blocks: 90, step: 0.5}}}"], "", "pool.keep", "1.5", "whole number"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 1, over_blocks: 90, step: 1}}}"], "", "pool.keep", "from 1 to 1", "at least one"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 9, over_blocks: 7, step: 1}}}"], "", "pool.keep", "8 steps", "over_blocks"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 5001, over_blocks: 1e6, step: 1}}}"], "", "pool.keep", "5000 steps", "1000"),
    (["{at: 10, ramp: {pool.keep: {from: 1, to: 9, step: 1}}}"], "", "pool.keep: over_blocks", "nothing", "a value"),
    (["{at: 10, ramp: {pool.keep: 7}}"], "", "pool.keep", "7", "from, to, over_blocks, step"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "more", "field", "got", "rule"), WRONG)
def test_a_change_that_is_wrong_is_refused_when_the_file_is_read(changes, more, field, got, rule):
    failure = refusal_of(parse_file, "c07", text_of(*changes, more=more))
    assert field in failure.where
    assert failure.where.startswith("c07.yaml: ")
    assert got in failure.got
    assert rule in failure.limit


def test_every_step_of_a_ramp_is_checked_not_only_its_ends():
    good = "{at: 1, ramp: {scoring.group: {from: 10, to: 100, over_blocks: 90, step: 10}}}"
    assert in_force(changed(good), 91).scoring.group == 100
    failure = refusal_of(parse_file, "c07", text_of(good, "{at: 50, set: {samples.count: 55}}"))
    assert failure.where == "c07.yaml: changes.0 (block 51)"  # 50 samples of a group at 41, 60 at 51
    assert failure.limit == "at least scoring.group, 60"


# ---- several files ---------------------------------------------------------------------------------------------------


def test_the_shares_of_all_files_must_sum_to_one_at_every_block():
    def file(name: str, share: str, then: str, at: int) -> CompetitionFile:
        text = VALID.replace("reward_share: 1", f"reward_share: {share}")
        return parse_file(name, text + f"changes: [{{at: {at}, set: {{reward_share: {then}}}}}]\n")

    check_files([file("c00", "0.9", "0.5", 100), file("c01", "0.1", "0.5", 100)])
    failure = refusal_of(check_files, [file("c00", "0.9", "0.5", 100), file("c01", "0.1", "0.5", 101)])
    assert failure.got == "0.5 (c00) + 0.1 (c01) = 0.6"
    assert "from block 100 on" in failure.where
    assert "c00.yaml: reward_share 0.9 -> 0.5" in failure.where
    assert refusal_of(check_files, [file("c00", "0.8", "0.9", 100), file("c01", "0.1", "0.1", 100)]).where == (
        "competitions: reward_share"
    )


def test_the_shares_of_each_mechanism_must_sum_to_one_at_every_block():
    def file(name: str, share: str, mechanism: int, then: str = "") -> CompetitionFile:
        text = VALID.replace("reward_share: 1", f"reward_share: {share}") + f"mechanism: {mechanism}\n{then}"
        return parse_file(name, text)

    check_files([file("c00", "0.4", 0), file("c01", "0.6", 0), file("c02", "1", 1)])
    failure = refusal_of(check_files, [file("c00", "0.5", 0), file("c01", "0.5", 1)])
    assert (failure.got, failure.where) == ("0.5 (c00) = 0.5", "competitions: reward_share")
    failure = refusal_of(check_files, [file("c00", "1", 0), file("c01", "0.5", 1)])
    assert (failure.got, failure.where) == ("0.5 (c01) = 0.5", "competitions: reward_share of mechanism 1")
    moves = file("c01", "0.5", 0, "changes: [{at: 100, set: {mechanism: 1, reward_share: 1}}]\n")
    failure = refusal_of(check_files, [file("c00", "0.5", 0), moves])
    assert failure.got == "0.5 (c00) = 0.5"
    assert "from block 100 on" in failure.where
    grows = file("c00", "0.5", 0, "changes: [{at: 100, set: {reward_share: 1}}]\n")
    check_files([grows, moves])
    assert in_force(moves, 99).mechanism == 0 < in_force(moves, 100).mechanism == 1


# ---- grace -----------------------------------------------------------------------------------------------------------

SHRINKS = changed("{at: 1000, set: {limits.parameters: 5e9}}", more="grace_blocks: 300\n")
SIX = replace(MODEL, num_parameters=6_000_000_000, vocab_size=200_000)


def is_admitted(file: CompetitionFile, commit_block: int, block: int, facts=SIX) -> bool:
    return not violations(rules_for(file, commit_block, block), facts)


def test_a_model_that_was_committed_before_a_limit_shrank_keeps_its_right_for_the_grace():
    answers = [is_admitted(SHRINKS, 900, block) for block in (999, 1000, 1299, 1300, 5000)]
    assert answers == [True, True, True, False, False]


def test_who_commits_after_the_change_has_no_right_to_keep():
    assert [is_admitted(SHRINKS, commit, 1100) for commit in (999, 1000, 1100)] == [True, False, False]


def test_without_grace_the_rules_in_force_decide():
    strict = changed("{at: 1000, set: {limits.parameters: 5e9}}")
    assert [is_admitted(strict, 900, block) for block in (999, 1000)] == [True, False]


def test_grace_never_refuses_what_the_rules_in_force_admit():
    grows = changed("{at: 1000, set: {limits.parameters: 8e9, families: [PhiForCausalLM]}}", more="grace_blocks: 300\n")
    seven = replace(SIX, num_parameters=7_500_000_000, family="PhiForCausalLM")
    assert [is_admitted(grows, 900, block, seven) for block in (999, 1000)] == [False, True]
    assert rules_for(grows, 900, 1100).families == ("PhiForCausalLM", "LlamaForCausalLM")
    assert rules_for(grows, 900, 1400) == in_force(grows, 1400)


def test_grace_widens_size_and_family_and_nothing_else():
    file = changed(
        "{at: 1000, set: {limits: {parameters: 5e9, min_parameters: 1e9, bytes: 1e10, max_tokens: 10, max_chars: 20,"
        " round_trip_failures: 0}, scoring.skew: 1.5}}",
        more="grace_blocks: 300\n",
    )
    graced, now = rules_for(file, 900, 1100), in_force(file, 1100)
    assert {field for field, _, _ in differences(now, graced)} == {"limits.parameters", "limits.min_parameters", "limits.bytes"}
    assert (graced.limits.parameters, graced.limits.min_parameters, graced.limits.bytes) == (6_900_000_000, 0, 15_000_000_000)


# ---- per validator ---------------------------------------------------------------------------------------------------


def test_an_override_is_for_one_validator_and_for_how_much_it_evaluates():
    file = parse_file("c07", VALID + f"overrides: {{{HOTKEY}: {{pool.pending: 0}}}}\n")
    assert in_force(file, 5, HOTKEY).pool.pending == 0
    assert in_force(file, 5).pool.pending == in_force(file, 5, "somebody else").pool.pending == 3
    assert rules_for(file, 1, 5, HOTKEY).pool.pending == 0


@pytest.mark.parametrize(
    ("override", "got", "rule"),
    [
        (f"{HOTKEY}: {{scoring.skew: 9}}", "scoring.skew", "pool.keep, pool.pending"),
        (f"{HOTKEY}: {{pool.keep: 0}}", "0", "greater than 0"),
        ("12: {pool.keep: 1}", "12", "string"),
        ("me: {pool.keep: 1}", "me", "a hotkey"),
    ],
)
def test_an_override_of_what_decides_scores_is_refused(override, got, rule):
    failure = refusal_of(parse_file, "c07", VALID + f"overrides: {{{override}}}\n")
    assert failure.where.startswith("c07.yaml: overrides")
    assert got in failure.got
    assert rule in failure.limit


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_c01_grows_from_3_9_to_6_9_billion_in_28_days():
    file = parse_file("c01", (REPOSITORY / "competitions" / "c01.yaml").read_text())
    start = 10_080_000
    assert [parameters(file, start + blocks) / 1e9 for blocks in (-1, 0, 16_799, 16_800, 201_599, 201_600)] == [
        3.9, 3.9, 3.9, 4.15, 6.65, 6.9,
    ]  # fmt: skip
    assert len(file.versions) == 13
    assert start % in_force(file, 0).samples.window_blocks == 0, "a window opens at the first step"


# ---- the whole history of the subnet ---------------------------------------------------------------------------------

GIB15, GIB22, GB42 = 16_106_127_360, 24_159_191_040, 42 * 10**9
LLAMA, PHI, PHI3 = "LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"
GPT4, STOCK = "Xenova/gpt-4", "coldint/phi3_stock_tokenizer"
ALL, ONE, BOTH, LONG, CUT = {LLAMA, PHI, PHI3}, {LLAMA}, {PHI, PHI3}, (20480, 20480), (17500, 15000)
# from; then for c00 and c01: reward, parameters in 1e9, bytes, tokenizer, free, families; then max_chars of both, group, skew
VERSIONS = [
    ("2024-07-15", (1, 6.9, GIB15, GPT4, False, ALL), (0, 3.9, GIB15, None, True, BOTH), LONG, 1, 1.2),
    ("2024-07-31", (0.9, 7.5, GIB15, GPT4, False, ONE), (0.1, 3.9, GIB15, None, True, BOTH), LONG, 1, 1.2),
    ("2024-08-06", (0.75, 7.0, GIB15, GPT4, False, ONE), (0.25, 3.9, GIB15, None, True, BOTH), LONG, 1, 1.2),
    ("2024-08-12", (0.5, 7.0, GIB15, GPT4, False, ONE), (0.5, 7.0, GIB15, None, True, BOTH), LONG, 1, 1.2),
    ("2024-08-17", (0.5, 7.0, GIB15, GPT4, False, ONE), (0.5, 7.0, GIB15, STOCK, False, BOTH), LONG, 1, 1.2),
    ("2024-08-21", (0.5, 10.5, GIB22, GPT4, True, ONE), (0.5, 10.5, GIB22, STOCK, True, BOTH), LONG, 1, 1.2),
    ("2024-10-17", (0.5, 10.5, GIB22, GPT4, True, ONE), (0.5, 10.5, GIB22, STOCK, True, BOTH), CUT, 5, 1.2),
    ("2024-12-03", (0.5, 10.5, GIB22, GPT4, True, ONE), (0.5, 10.5, GIB22, STOCK, True, {PHI3}), CUT, 5, 1.2),
    ("2024-12-05", (0.5, 20.1, GB42, GPT4, True, ONE), (0.5, 20.1, GB42, STOCK, True, {PHI3}), CUT, 5, 1.2),
    ("2025-02-27", (0.5, 20.1, GB42, GPT4, True, ONE), (0.5, 20.1, GB42, STOCK, True, {PHI3}), CUT, 10, 2.0),
]  # fmt: skip


def numbers(file: CompetitionFile, block: int) -> tuple:
    c = in_force(file, block)
    free = isinstance(c.tokenizer, FreeTokenizer)
    hub = getattr(tokenizer_for(c, has_own=False), "hub", None)
    return c.reward_share, c.limits.parameters / 1e9, c.limits.bytes, hub, free, set(c.families)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version[0])
def test_every_version_that_the_subnet_ever_had_can_be_written_down(version):
    since, *expected, max_chars, group, skew = version
    files = [parse_file(name, (HISTORY / f"{name}.yaml").read_text()) for name in ("c00", "c01")]
    check_files(files)
    block = files[0].clock.block_at(f"{since}T12:00Z")
    assert [numbers(file, block) for file in files] == expected
    rules = [in_force(file, block) for file in files]
    assert tuple(c.limits.max_chars for c in rules) == max_chars
    assert [(c.scoring.group, c.scoring.skew, c.limits.max_tokens, c.pool.keep) for c in rules] == [(group, skew, 4096, 6)] * 2
    assert all((c.scoring.advantage.initial, c.scoring.advantage.decay_per_epoch) == (0.004, 0.995) for c in rules)


def test_the_history_has_no_version_besides_these():
    files = [parse_file(name, (HISTORY / f"{name}.yaml").read_text()) for name in ("c00", "c01")]
    blocks = sorted({version.block for file in files for version in file.versions})
    times = [files[0].clock.time_of(block)[:10] for block in blocks[1:]]
    assert times == [version[0] for version in VERSIONS[1:]]
