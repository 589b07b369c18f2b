from __future__ import annotations

import json
from dataclasses import replace

import pytest
from reference_vectors import REPOSITORY

from sn29.errors import Reason, Rejected
from sn29.records import ModelFacts
from sn29.rules.competition import (
    Competition,
    FixedTokenizer,
    FolderDataset,
    FreeTokenizer,
    HubDataset,
    WhenEmpty,
    check_together,
    named_start_token,
    parse_competition,
    parse_hall_of_fame,
    samples_per_dataset,
    tokenizer_for,
    violations,
)

FOLDER = REPOSITORY / "competitions"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "hall_of_fame")

VALID = """\
reward_share: 1
families: [LlamaForCausalLM]
tokenizer:
  hub: Xenova/gpt-4
  fingerprint: "{fingerprint}"
  start_token: 100257
limits: {{parameters: 6.9e9, bytes: 1.5e+10, max_tokens: 4096, max_chars: 17500, round_trip_failures: 3}}
dataset:
  hub: HuggingFaceFW/fineweb-edu-score-2
  revision: "{revision}"
  files: data/*/*.parquet
  column: text
samples: {{count: 100, window_blocks: 360}}
scoring:
  rule: oldest_holder
  group: 10
  skew: 2.0
  advantage: {{initial: 0.004, decay_per_epoch: 0.995, blocks_per_epoch: 361}}
pool: {{keep: 6, pending: 3}}
""".format(fingerprint="f" * 64, revision="a" * 40)

FAME = """\
max_fraction: 0.4
decay_per_epoch: 0.995
blocks_per_epoch: 361
entries:
  - {hotkey: 5FFM6Nvvm78GqyMratgXXvjbqZPi7SHgSQ81nyS96jBuUWgt, block: 3382073, reward_epochs: 0.2, reason: a claim}
"""


def refusal_of(read, *arguments) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read(*arguments)
    assert caught.value.reason is Reason.COMPETITION_FILE
    assert "\n" not in str(caught.value)
    return caught.value


# ---- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_competition_is_valid(path):
    competition = parse_competition(path.stem, path.read_text())
    assert competition.name == path.stem
    assert "dataset.folder" not in competition.unpinned


def test_the_shipped_competitions_fit_together():
    check_together([parse_competition(path.stem, path.read_text()) for path in FILES])


def test_the_shipped_hall_of_fame_is_valid():
    assert parse_hall_of_fame((FOLDER / "hall_of_fame.yaml").read_text()).max_fraction == 0.4


def test_the_shipped_competitions_are_the_two_that_the_subnet_is_known_for():
    c00, c01 = (parse_competition(path.stem, path.read_text()) for path in FILES)
    assert c00.families == ("LlamaForCausalLM",)
    assert isinstance(c00.tokenizer, FixedTokenizer)
    assert c00.tokenizer.hub == "Xenova/gpt-4"
    assert c00.limits.parameters == 6_900_000_000
    assert c01.families == ("PhiForCausalLM", "Phi3ForCausalLM")
    assert isinstance(c01.tokenizer, FreeTokenizer)
    assert c01.limits.parameters == 3_900_000_000


def test_every_field_says_what_it_is():
    schema = json.loads(json.dumps(Competition.model_json_schema()))
    sections = {"Competition": schema, **schema["$defs"]}
    silent = [
        f"{section}.{field}"
        for section, content in sections.items()
        for field, said in content["properties"].items()
        if not {"description", "$ref", "oneOf", "const"} & set(said)
        and (section, field) not in {("FreeTokenizer", "free"), ("FolderDataset", "folder"), ("HubDataset", "hub")}
    ]  # fmt: skip
    assert silent == []


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_numbers_are_numbers_as_people_write_them():
    limits = parse_competition("c", VALID).limits
    assert (limits.parameters, limits.bytes) == (6_900_000_000, 15_000_000_000)
    assert isinstance(limits.parameters, int)
    assert parse_competition("c", VALID.replace("6.9e9", "69E8")).limits.parameters == 6_900_000_000
    assert parse_competition("c", VALID.replace("skew: 2.0", "skew: .5")).scoring.skew == 0.5


def test_a_competition_cannot_be_changed():
    competition = parse_competition("c", VALID)
    with pytest.raises(ValueError, match="frozen"):
        competition.limits.parameters = 1


def test_a_folder_or_a_missing_pin_is_named():
    assert parse_competition("c", VALID).unpinned == ()
    loose = VALID.replace(f'"{"a" * 40}"', "null").replace(f'"{"f" * 64}"', "null")
    assert parse_competition("c", loose).unpinned == ("tokenizer.fingerprint", "dataset.revision")
    local = VALID.replace("hub: HuggingFaceFW/fineweb-edu-score-2", "folder: text").replace(f'  revision: "{"a" * 40}"\n', "")
    competition = parse_competition("c", local)
    assert isinstance(competition.dataset, FolderDataset)
    assert competition.unpinned == ("dataset.folder",)


def test_a_sha_of_digits_is_not_taken_for_a_number():
    for sha in ("1" * 40, "1" * 20 + "e" + "1" * 19, "12345678901234567890123456789012345678e1"):
        dataset = parse_competition("c", VALID.replace(f'"{"a" * 40}"', sha)).dataset
        assert isinstance(dataset, HubDataset)
        assert dataset.revision == sha


BROKEN = [
    # replace, by, field, got, rule
    ("reward_share: 1", "reward_share: 1.5", "reward_share", "1.5", "less than or equal to 1"),
    ("reward_share: 1", "reward_share: -0.1", "reward_share", "-0.1", "greater than or equal to 0"),
    ("reward_share: 1", "reward_share: true", "reward_share", "True", "a number"),
    ("reward_share: 1", "reward_share: yes", "reward_share", "yes", "a number"),
    ("reward_share: 1", "reward_share: '1'", "reward_share", "1", "a number"),
    ("reward_share: 1", "reward_share: .nan", "reward_share", "nan", "a finite number"),
    ("reward_share: 1", "reward_share:", "reward_share", "null", "a number"),
    ("reward_share: 1", "", "reward_share", "nothing", "a value"),
    ("reward_share: 1", "reward_share: 1\nmechanism: 16", "mechanism", "16", "less than or equal to 15"),
    ("reward_share: 1", "reward_share: 1\nmechanism: -1", "mechanism", "-1", "greater than or equal to 0"),
    ("reward_share: 1", "reward_share: 1\nmechanism: 0.5", "mechanism", "0.5", "a whole number"),
    ("reward_share: 1", "reward_share: 1\nx: 1", "", "the field x", "one of reward_share, families"),
    ("reward_share: 1", "reward_share: 1\n7: 1", "", "the field 7", "one of reward_share"),
    ("reward_share: 1", "reward_share: 1\nname: c", "", "the field name", "the file's name"),
    ("6.9e9", ".inf", "limits.parameters", "inf", "a finite number"),
    ("6.9e9", "6.95", "limits.parameters", "6.95", "a whole number"),
    ("6.9e9", "0", "limits.parameters", "0", "greater than 0"),
    ("6.9e9", "1_000", "limits.parameters", "1_000", "a number"),
    ("6.9e9", "0x10", "limits.parameters", "0x10", "a number"),
    ("4096", "1:30", "limits.max_tokens", "1:30", "a number"),
    ("keep: 6", "keep: 06", "pool.keep", "06", "a number"),
    ("max_chars", "max_char", "limits", "the field max_char", "max_chars"),
    ("limits: {", "limits: [] #", "limits", "[]", "a mapping with the fields parameters"),
    ("[LlamaForCausalLM]", "[Llama]", "families.0", "Llama", "'LlamaForCausalLM'"),
    ("[LlamaForCausalLM]", "[]", "", "families []", "at least one"),
    ("[LlamaForCausalLM]", "[LlamaForCausalLM, LlamaForCausalLM]", "", "families", "each once"),
    ("[LlamaForCausalLM]", "LlamaForCausalLM", "families", "LlamaForCausalLM", "a valid tuple"),
    ("hub: Xenova/gpt-4", "hub: gpt-4", "tokenizer.hub", "gpt-4", "owner/name"),
    ("hub: Xenova/gpt-4", "hub: 4", "tokenizer.hub", "4", "a valid string"),
    ("hub: Xenova/gpt-4", "free: true\n  hub: Xenova/gpt-4", "tokenizer", "the field hub", "free, start_token"),
    ("f" * 64, "f" * 63, "tokenizer.fingerprint", "f" * 63, "64 hex digits"),
    (f'fingerprint: "{"f" * 64}"', "", "tokenizer.fingerprint", "nothing", "a value"),
    ("start_token: 100257", "start_token: -1", "tokenizer.start_token", "-1", "greater than or equal to 0"),
    ("a" * 40, "main", "dataset.revision", "main", "40 hex digits"),
    ("hub: HuggingFaceFW", "folder: x\n  hub: HuggingFaceFW", "dataset", "the field hub", "folder, files, column"),
    ("files: data", "files: ../data", "dataset.files", "../data", "inside the data set"),
    ("files: data", "files: /data", "dataset.files", "/data", "inside the data set"),
    ("column: text", "column: ''", "dataset.column", "", "at least 1 character"),
    ("parameters: 6.9e9", "parameters: 6.9e9, min_parameters: 7e9", "", "limits.min_parameters 7,000", "at most 6,900,000,000"),
    ("column: text", "column: text\n  weight: 0", "dataset.weight", "0", "greater than 0"),
    ("reward_share: 1", "reward_share: 1\ndatasets: []", "", "dataset and datasets", "one of the two"),
    ("reward_share: 1", "reward_share: 1\nwhen_empty: keep", "when_empty", "keep", "'share', 'hold' or 'burn'"),
    ("reward_share: 1", "reward_share: 1\nwhen_empty: burn", "", "burn_hotkey None", "burn and its hotkey"),
    ("reward_share: 1", "reward_share: 1\nburn_hotkey: " + "5" * 48, "", "when_empty share", "burn and its hotkey"),
    ("reward_share: 1", "reward_share: 1\ngrace_blocks: -1", "grace_blocks", "-1", "greater than or equal to 0"),
    ("count: 100", "count: 9", "", "samples.count 9", "at least scoring.group, 10"),
    ("oldest_holder", "newest", "scoring.rule", "newest", "'oldest_holder'"),
    ("skew: 2.0", "skew: 0", "scoring.skew", "0", "greater than 0"),
    ("initial: 0.004", "initial: 1", "scoring.advantage.initial", "1", "less than 1"),
    ("decay_per_epoch: 0.995", "decay_per_epoch: 1.1", "scoring.advantage.decay_per_epoch", "1.1", "or equal to 1"),
]


@pytest.mark.parametrize(("old", "new", "field", "got", "rule"), BROKEN)
def test_what_is_wrong_is_named_with_its_field_and_both_values(old, new, field, got, rule):
    assert old in VALID
    failure = refusal_of(parse_competition, "c07", VALID.replace(old, new))
    assert failure.where == (f"c07.yaml: {field}" if field else "c07.yaml")
    assert got in failure.got
    assert rule in failure.limit


@pytest.mark.parametrize(
    ("text", "where", "got"),
    [
        ("", "c07.yaml", "null"),
        ("- 1", "c07.yaml", "[1]"),
        ("a: 1\nb: [", "c07.yaml: line 2", "expected"),
        ("a: 1\n\tb: 2", "c07.yaml: line 2", "cannot start any token"),
        ("a: 1\nb: 2\na: 3", "c07.yaml: line 3", "a a second time"),
        (VALID + "pool: {keep: 1, pending: 1}", "c07.yaml: line 20", "pool a second time"),
        (VALID.replace("pending: 3", "keep: 3"), "c07.yaml: line 19", "keep a second time"),
        ("a: &x 1\nb: *x", "c07.yaml: line 2", "alias"),
        ("a: !!python/object/apply:os.system [ls]", "c07.yaml: line 1", "a tag"),
        ("? [1]\n: 2", "c07.yaml: line 1", "unhashable key"),
        ("a: 1\n---\nb: 2", "c07.yaml: line 2", "found another document"),
        ("a: \x01", "c07.yaml", "#x0001"),
    ],
)
def test_text_that_is_no_yaml_is_named_with_its_line(text, where, got):
    failure = refusal_of(parse_competition, "c07", text)
    assert failure.where == where
    assert got in failure.got


@pytest.mark.parametrize("name", ["", "C00", "../c00", "c" * 17, "c 0"])
def test_a_name_that_no_commitment_could_spell_is_refused(name):
    assert "a name like" in refusal_of(parse_competition, name, VALID).limit


# ---- several data sets -----------------------------------------------------------------------------------------------

ONE = VALID[VALID.index("dataset:\n") : VALID.index("samples:")]


def with_weights(count: int, *weights: float) -> Competition:
    sections = "".join(f"  - {{folder: text{n}, files: '*', column: t, weight: {w}}}\n" for n, w in enumerate(weights))
    return parse_competition("c", VALID.replace(ONE, f"datasets:\n{sections}").replace("count: 100", f"count: {count}"))


def test_dataset_is_datasets_with_one_element():
    listed = "datasets:\n  - " + ONE.removeprefix("dataset:\n  ").replace("\n  ", "\n    ")
    assert parse_competition("c", VALID.replace(ONE, listed)) == parse_competition("c", VALID)
    assert parse_competition("c", VALID).datasets == (parse_competition("c", VALID).dataset,)
    assert with_weights(100, 1, 2).unpinned == ("datasets.0.folder", "datasets.1.folder")
    wrong = refusal_of(parse_competition, "c", VALID.replace(ONE, "datasets: [{folder: a, files: '*'}]\n"))
    assert wrong.where == "c.yaml: datasets.0.column"


@pytest.mark.parametrize(
    ("count", "weights", "expected"),
    [
        (100, [1], (100,)),
        (1500, [0.30, 0.25, 0.35, 0.05, 0.03, 0.02], (450, 375, 525, 75, 45, 30)),
        (10, [0.30, 0.35, 0.35], (3, 4, 3)),
        (10, [1, 1, 1], (4, 3, 3)),
        (100, [7, 7, 7, 7, 7, 7, 7], (15, 15, 14, 14, 14, 14, 14)),
        (101, [1e-3, 2e-3], (34, 67)),
    ],
)
def test_each_data_set_gives_its_part_of_the_samples(count, weights, expected):
    assert samples_per_dataset(with_weights(count, *weights)) == expected
    assert sum(expected) == count


def test_a_data_set_that_would_never_give_a_sample_is_refused():
    failure = refusal_of(with_weights, 100, 1, 1e-6)
    assert failure.got == "samples.count 100 = 100 + 0"
    assert failure.limit == "at least one sample of every data set"


def test_an_empty_competition_shares_unless_it_says_otherwise():
    assert parse_competition("c", VALID).on_empty == WhenEmpty("share", "")
    hotkey = "5" * 48
    burning = parse_competition("c", VALID + f"when_empty: burn\nburn_hotkey: {hotkey}\n")
    assert burning.on_empty == WhenEmpty("burn", hotkey)


# ---- a model against the rules ---------------------------------------------------------------------------------------

MODEL = ModelFacts(
    content_id="c", weights_id="w", family="LlamaForCausalLM", num_parameters=6_900_000_000, num_bytes=15_000_000_000,
    vocab_size=100_277, hidden_size=1, num_layers=1, start_token=1, has_tokenizer=False,
)  # fmt: skip


def test_a_model_on_every_limit_is_allowed():
    assert violations(parse_competition("c00", VALID), MODEL, largest_id=100_276) == ()


@pytest.mark.parametrize(
    ("change", "reason", "got", "limit"),
    [
        ({"family": "PhiForCausalLM"}, Reason.FAMILY, "PhiForCausalLM", "LlamaForCausalLM"),
        ({"num_parameters": 6_900_000_001}, Reason.PARAMETERS, "6,900,000,001", "at most 6,900,000,000"),
        ({"num_bytes": 15_000_000_001}, Reason.TOO_LARGE, "15,000,000,001 bytes", "at most 15,000,000,000 bytes"),
        ({"vocab_size": 100_276}, Reason.VOCABULARY, "100276 rows", "at least 100277: the ids go up to 100276"),
        ({"vocab_size": 300}, Reason.VOCABULARY, "300 rows", "at least 100277: the ids go up to 100276"),
    ],
)
def test_a_model_beyond_a_limit_is_told_both_values(change, reason, got, limit):
    (found,) = violations(parse_competition("c00", VALID), replace(MODEL, **change), largest_id=100_276)
    assert (found.reason, found.got, found.limit) == (reason, got, limit)
    assert found.where.startswith("c00: ")


def test_a_free_tokenizer_must_be_there_and_only_a_start_token_that_is_given_needs_a_row():
    fixed = VALID[VALID.index("  hub: Xenova") : VALID.index("limits:")]
    free = parse_competition("c01", VALID.replace(fixed, "  free: true\n"))
    assert [v.reason for v in violations(free, MODEL)] == [Reason.TOKENIZER]
    small = replace(MODEL, has_tokenizer=True, vocab_size=300)
    assert violations(free, small) == ()
    given = parse_competition("c01", VALID.replace(fixed, "  free: true\n  start_token: 300\n"))
    assert [v.limit for v in violations(given, small)] == ["at least 301: the ids go up to 300"]


def test_a_model_can_be_too_small():
    competition = parse_competition("c00", VALID.replace("parameters: 6.9e9", "parameters: 6.9e9, min_parameters: 3.2e9"))
    assert violations(competition, replace(MODEL, num_parameters=3_200_000_000)) == ()
    (found,) = violations(competition, replace(MODEL, num_parameters=3_199_999_999))
    assert (found.reason, found.got, found.limit) == (Reason.PARAMETERS, "3,199,999,999", "at least 3,200,000,000")
    assert found.where == "c00: limits.min_parameters"


def test_a_tenth_of_the_samples_may_be_unscored_unless_the_file_says_otherwise():
    assert parse_competition("c00", VALID).limits.unscored == 0.1, "files from before are valid"
    few = parse_competition("c00", VALID.replace("parameters: 6.9e9", "parameters: 6.9e9, unscored: 0.02"))
    assert few.limits.unscored == 0.02
    with pytest.raises(Rejected) as refused:
        parse_competition("c00", VALID.replace("parameters: 6.9e9", "parameters: 6.9e9, unscored: 1.1"))
    assert "limits.unscored" in str(refused.value)


def test_a_free_tokenizer_may_have_a_default_for_models_that_bring_none():
    fixed = VALID[VALID.index("  hub: Xenova") : VALID.index("limits:")]
    inner = fixed.replace("\n  ", "\n    ").replace("  hub", "    hub", 1)
    free = parse_competition("c01", VALID.replace(fixed, "  free: true\n  default:\n" + inner))
    default = tokenizer_for(free, has_own=False)
    assert default is not None
    assert default.hub == "Xenova/gpt-4"
    assert tokenizer_for(free, has_own=True) is None
    assert (named_start_token(free, has_own=False), named_start_token(free, has_own=True)) == (100257, None)
    assert violations(free, MODEL, largest_id=100_276) == ()
    assert [v.reason for v in violations(free, replace(MODEL, vocab_size=100_257))] == [Reason.VOCABULARY]
    assert violations(free, replace(MODEL, vocab_size=300, has_tokenizer=True)) == ()
    loose = VALID.replace(fixed, "  free: true\n  default:\n" + inner.replace(f'"{"f" * 64}"', "null"))
    assert parse_competition("c01", loose).unpinned == ("tokenizer.default.fingerprint",)


def test_all_violations_are_told_at_once():
    worst = replace(MODEL, family="Gpt", num_parameters=10**12, num_bytes=10**12, vocab_size=1)
    found = violations(parse_competition("c00", VALID), worst, largest_id=100_276)
    assert [v.reason for v in found] == [Reason.FAMILY, Reason.PARAMETERS, Reason.TOO_LARGE, Reason.VOCABULARY]


# ---- together --------------------------------------------------------------------------------------------------------


def with_share(name: str, share: str) -> Competition:
    return parse_competition(name, VALID.replace("reward_share: 1", f"reward_share: {share}"))


def test_shares_must_sum_to_one():
    check_together([with_share(f"c{n}", "0.1") for n in range(10)])
    failure = refusal_of(check_together, [with_share("c1", "0.5"), with_share("c0", "0.6")])
    assert failure.got == "0.6 (c0) + 0.5 (c1) = 1.1"
    assert failure.limit == "1"
    refusal_of(check_together, [with_share("c0", "0.5"), with_share("c1", "0.500000002")])


def test_there_must_be_competitions_and_each_once():
    assert refusal_of(check_together, []).limit == "at least one"
    assert refusal_of(check_together, [with_share("c0", "0.5")] * 2).got == "c0, c0"


# ---- the hall of fame ------------------------------------------------------------------------------------------------


def test_a_hall_of_fame_is_read():
    (entry,) = parse_hall_of_fame(FAME).entries
    assert (entry.block, entry.reward_epochs, entry.reason, entry.url) == (3382073, 0.2, "a claim", "")


@pytest.mark.parametrize(
    ("old", "new", "field", "got"),
    [
        ("block: 3382073, ", "", "entries.0.block", "nothing"),
        ("reward_epochs: 0.2", "reward_epochs: -1", "entries.0.reward_epochs", "-1"),
        ("reward_epochs", "reward", "entries.0", "the field reward"),
        (", reason: a claim", "", "entries.0.reason", "nothing"),
        ("5FFM6", "0FFM6", "entries.0.hotkey", "0FFM6"),
        ("max_fraction: 0.4", "max_fraction: 1.4", "max_fraction", "1.4"),
        ("decay_per_epoch: 0.995", "decay_per_epoch: 1", "decay_per_epoch", "1"),
    ],
)
def test_an_entry_that_is_wrong_is_refused_with_the_whole_file(old, new, field, got):
    assert old in FAME
    failure = refusal_of(parse_hall_of_fame, FAME.replace(old, new))
    assert failure.where == f"hall_of_fame.yaml: {field}"
    assert got in failure.got
