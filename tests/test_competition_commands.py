"""`sn29 competitions show | diff | pin`, and the reader that a validator has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from loguru import logger

from neurons.adapters import RulesReader, parse_texts, read_git_texts, read_texts
from sn29 import telemetry
from sn29.cli import main
from sn29.competition_commands import compare, pin_file
from sn29.errors import Rejected, Unavailable
from sn29.hub import Hub
from sn29.localnet.hub import LoopbackHub, add_user
from sn29.models.tokenizer import Tokenizer
from sn29.rules.schedule import parse_file
from sn29.rules.yaml_text import hub_places, with_pins
from sn29.settings import ValidatorSettings, read

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "tests" / "rules" / "history"
C00, C01 = ((ROOT / "competitions" / f"{name}.yaml").read_text() for name in ("c00", "c01"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped files, to be changed."""
    return shutil.copytree(ROOT / "competitions", tmp_path / "competitions")


def replace_in(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


# ---- show ------------------------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status = main(["competitions", "show", *words])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_show_says_what_is_in_force_and_what_comes_next(capsys):
    text = shown(capsys, str(ROOT / "competitions"), "--at", "10096799")
    c01 = text[text.index("c01 at block 10,096,799") :]
    assert "limits.parameters                  3,900,000,000" in c01
    first = (
        "block 10,096,800 (2027-02-02T00:17Z by the file's clock): limits.parameters 3,900,000,000 -> 4,150,000,000  (changes.0)"
    )
    assert first in c01
    assert "no change comes after this block" in text[: text.index("c01 at")]


def test_show_finds_the_block_of_a_time_by_the_files_clock(capsys):
    answer = json.loads(shown(capsys, str(HISTORY), "--at", "2024-08-12T07:00Z", "--json"))["competitions"]
    assert (answer["c00"]["rules"]["reward_share"], answer["c01"]["rules"]["reward_share"]) == (0.5, 0.5)
    assert answer["c01"]["in_force_since"] == answer["c01"]["block"] == 3_590_873
    coming = answer["c01"]["next"][0]
    assert (coming["block"], coming["time"], coming["origin"]) == (3_626_873, "2024-08-17T07:00Z", "changes.3")
    assert any("coldint/phi3_stock_tokenizer" in line for line in coming["what"])


def test_show_takes_a_date_for_the_shipped_files(capsys):
    answer = json.loads(shown(capsys, str(ROOT / "competitions"), "--at", "2027-02-10", "--json"))["competitions"]["c01"]
    assert answer["rules"]["limits"]["parameters"] in range(4_150_000_000, 5_400_000_000, 250_000_000), "two weeks into the ramp"


def test_show_says_what_the_hall_of_fame_pays(capsys, folder):
    entry = f"entries:\n  - {{hotkey: {'5' * 48}, block: 1000, reward_epochs: 1, reason: a fix}}\n"
    replace_in(folder / "hall_of_fame.yaml", "entries: []\n", entry)
    assert "0.5000% of the weights at block 1,000 (1 epochs" in shown(capsys, str(folder), "--at", "1000")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no-clock", "--at", "2027-01-01"], "c01.yaml has changes and no clock"),
        ([str(HISTORY), "--at", "tomorrow"], "tomorrow"),
        (["nowhere"], "nowhere"),
    ],
)
def test_show_refuses_what_it_cannot_answer(capsys, words, named, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    copy = folder.parent / "no-clock"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_text(re.sub(r"^clock: .*$", "", path.read_text(), flags=re.M))
    assert main(["competitions", "show", *words]) == 1
    assert named in capsys.readouterr().err


def test_check_asks_the_rules_of_a_block(capsys, make_checkpoint, tmp_path):
    """A file whose limit falls to 10 parameters: what was allowed before is refused by both numbers after."""
    path = tmp_path / "c09.yaml"
    path.write_text(C01[: C01.index("changes:")] + "changes: [{at: 500, set: {limits.parameters: 10}}]\n")
    model = str(make_checkpoint("Phi3ForCausalLM"))
    for at, refused in (("499", False), ("500", True)):
        main(["check", model, "--competition", str(path), "--metadata-only", "--at", at])
        assert ("at most 10)" in capsys.readouterr().out) is refused


# ---- diff ------------------------------------------------------------------------------------------------------------


def test_files_that_say_the_same_do_not_differ(capsys, tmp_path):
    (tmp_path / "c01.yaml").write_text("# another comment\n" + C01.replace("3.9e9", "3900000000"))
    assert main(["competitions", "diff", str(ROOT / "competitions/c01.yaml"), str(tmp_path / "c01.yaml")]) == 0
    assert "no difference" in capsys.readouterr().out


def test_every_field_that_differs_is_told_with_its_block(capsys, folder):
    replace_in(folder / "c01.yaml", "pending: 3", "pending: 1")
    replace_in(folder / "c01.yaml", "step: 0.25e9}", "step: 1.5e9}")
    (folder / "c02.yaml").write_text(C00.replace("reward_share: 0.5", "reward_share: 0"))
    assert main(["competitions", "diff", str(ROOT / "competitions"), str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = next(d for d in found if d["file"] == "c01.yaml")
    assert first == {"file": "c01.yaml", "block": 0, "field": "pool.pending", "old": "3", "new": "1"}
    ramp = [(d["block"], d["old"], d["new"]) for d in found if d["field"] == "limits.parameters"]
    assert ramp[0] == (10_096_800, "4,150,000,000", "3,900,000,000")
    assert ramp[-1] == (10_281_600, "6,900,000,000", "the same in both")
    assert {"file": "c02.yaml", "block": 0, "field": "the file", "old": "-", "new": "there"} in found


def test_two_files_are_compared_whatever_their_names_and_one_need_not_fit_to_others(capsys, tmp_path):
    new = tmp_path / "c01-new.yaml"
    new.write_text(C01.replace("reward_share: 0.5", "reward_share: 0.7") + f"overrides: {{{'5' * 48}: {{pool.pending: 0}}}}\n")
    assert main(["competitions", "diff", str(ROOT / "competitions/c01.yaml"), str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["c01-new.yaml: reward_share: 0.5 -> 0.7", f"c01-new.yaml: overrides.{'5' * 48}.pool.pending: - -> 0"]


def test_a_hall_of_fame_differs_by_its_entries(folder):
    old = parse_texts(read_texts(folder))
    replace_in(folder / "hall_of_fame.yaml", "max_fraction: 0.4", "max_fraction: 1.0")
    (found,) = compare(old, parse_texts(read_texts(folder)))
    assert found == ("hall_of_fame.yaml", 0, "max_fraction", "0.4", "1")


# ---- pin -------------------------------------------------------------------------------------------------------------

REVISION, FINGERPRINT = "a" * 40, "f" * 64


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("d: {hub: a/b, revision: null}  # why\n", f'd: {{hub: a/b, revision: "{REVISION}"}}  # why\n'),
        ("d:\n  hub: a/b  # x\n  revision:   # y\n", f'd:\n  hub: a/b  # x\n  revision: "{REVISION}"   # y\n'),
        ("d:\n  hub: a/b  # x\n  start_token: 1", f'd:\n  hub: a/b  # x\n  revision: "{REVISION}"\n  start_token: 1'),
        ("d:\n  start_token: 1\n  hub: a/b", f'd:\n  start_token: 1\n  hub: a/b\n  revision: "{REVISION}"'),
        ("d: {hub: 'a/b', start_token: 1}\r\n", f"d: {{hub: 'a/b', revision: \"{REVISION}\", start_token: 1}}\r\n"),
        ("l:\r\n  - hub: a/b\r\n    x: ü\r\n", f'l:\r\n  - hub: a/b\r\n    revision: "{REVISION}"\r\n    x: ü\r\n'),
    ],
)
def test_a_pin_changes_nothing_but_itself(before, after):
    (place,) = hub_places("f.yaml", before)
    assert with_pins("f.yaml", before, {place: {"revision": REVISION}}) == after


def test_places_are_found_wherever_a_hub_is_named():
    text = (HISTORY / "c01.yaml").read_text()
    found = [(".".join(map(str, p.path)), p.hub, p.is_tokenizer) for p in hub_places("c01.yaml", text)]
    assert found == [
        ("dataset", "HuggingFaceFW/fineweb-edu-score-2", False),
        ("changes.3.set.tokenizer", "coldint/phi3_stock_tokenizer", True),
        ("changes.4.set.tokenizer.default", "coldint/phi3_stock_tokenizer", True),
    ]


@pytest.fixture
def hub(tmp_path, byte_tokenizer):
    """A Hub with a data set and two tokenizers; (hub, revisions by name)."""
    names = {"HuggingFaceFW/fineweb-edu-score-2": "dataset", "coldint/phi3_stock_tokenizer": "model", "Xenova/gpt-4": "model"}
    with LoopbackHub(tmp_path / "hub") as server:
        revisions = {}
        for name, kind in names.items():
            content = tmp_path / name
            content.mkdir(parents=True)
            if kind == "model":
                shutil.copy(byte_tokenizer, content / "tokenizer.json")
            else:
                (content / "README.md").write_text("text")
            owner = Hub(server.endpoint, token=add_user(tmp_path / "hub", name.partition("/")[0]))
            owner.create(name, kind=kind)
            revisions[name] = owner.upload(name, content, message="content", kind=kind)
        yield Hub(server.endpoint), revisions


def test_pin_writes_every_pin_and_keeps_every_comment(hub, tmp_path, byte_tokenizer, capsys):
    client, revisions = hub
    path = Path(shutil.copy(HISTORY / "c01.yaml", tmp_path / "c01.yaml"))
    path.chmod(0o640)
    assert main(["competitions", "pin", str(path), "--hub.endpoint", client.endpoint]) == 0
    assert "5 pins written" in capsys.readouterr().out
    file, fingerprint = parse_file("c01", path.read_text()), Tokenizer.load(byte_tokenizer).fingerprint()
    assert file.unpinned == ()
    stock = revisions["coldint/phi3_stock_tokenizer"]
    assert f'{{hub: coldint/phi3_stock_tokenizer, revision: "{stock}", fingerprint: "{fingerprint}"' in path.read_text()
    assert f'  revision: "{revisions["HuggingFaceFW/fineweb-edu-score-2"]}"\n' in path.read_text()
    old, new = (HISTORY / "c01.yaml").read_text().splitlines(), path.read_text().splitlines()
    kept = [line for line in new if line in old]
    assert len(kept) == len(old) - 3  # three lines were changed: data set, one fingerprint, the default in one line
    assert len(new) == len(old) + 1  # and one came in: the first tokenizer's revision
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.glob("*.part")] + [p.name for p in tmp_path.glob(".*.part")] == []
    assert pin_file(path, client) == (), "a pin that is there stays"


def test_a_tokenizer_whose_content_is_another_one_gets_no_revision(hub, folder):
    before = (folder / "c00.yaml").read_text()
    with pytest.raises(Rejected) as refused:  # c00 has the fingerprint of the real GPT-4 tokenizer, the Hub a small one
        pin_file(folder / "c00.yaml", hub[0])
    assert "3bbe182d" in refused.value.limit
    assert (folder / "c00.yaml").read_text() == before


def test_pin_refuses_a_file_that_is_wrong_before_it_asks_anybody(folder):
    replace_in(folder / "c01.yaml", "pending: 3", "pending: much")
    with pytest.raises(Rejected, match=r"pool\.pending"):
        pin_file(folder / "c01.yaml", Hub("http://127.0.0.1:9"))


# ---- the validator's reader ------------------------------------------------------------------------------------------


@pytest.fixture
def events():
    """(event, sentence) of everything that is told from here on."""
    found: list[tuple[str, str]] = []
    telemetry.configure(level="CRITICAL")
    handler = logger.add(lambda m: found.append((m.record["extra"]["event"], m.record["message"])), level="INFO")
    yield found
    logger.remove(handler)


def settings(folder: Path, *more: str) -> ValidatorSettings:
    return read(ValidatorSettings, ["--network", "localnet", "--competitions.dir", str(folder), *more])


def test_new_files_are_taken_over_and_a_bad_one_is_refused_once(folder, events):
    reader = RulesReader(settings(folder))
    c01 = folder / "c01.yaml"
    good = c01.read_text()
    replace_in(c01, "pending: 3", "pending: 4")
    assert reader.rules().at("c01", 0).pool.pending == 3, "between rounds only"
    reader.look_again()
    assert reader.rules().at("c01", 0).pool.pending == 4
    first_hash = reader.rules().hashes["c01"]
    replace_in(c01, "pending: 4", "pending: many")
    for _ in range(3):
        reader.look_again()
        assert reader.rules().at("c01", 0).pool.pending == 4
        assert reader.rules().hashes["c01"] == first_hash
    c01.write_text(good)
    reader.look_again()
    assert reader.rules().at("c01", 0).pool.pending == 3
    assert [event for event, _ in events] == ["rules", "rules_refused", "rules"]
    said = events[1][1]
    assert all(word in said for word in ("c01.yaml: pool.pending", "many", "a number", "the rules of before stay in force"))


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", C01.replace("reward_share: 0.5", "reward_share: 0.7").encode()])
def test_whatever_is_wrong_with_a_file_the_last_good_rules_stay(folder, events, text):
    reader = RulesReader(settings(folder))
    before = reader.files
    (folder / "c01.yaml").write_bytes(text)
    reader.look_again()
    reader.look_again()
    assert reader.files is before
    assert [event for event, _ in events] == ["rules_refused"]
    shutil.rmtree(folder)
    reader.look_again()
    assert reader.files is before
    assert len(events) == 2


def test_rules_follow_the_block_and_overrides_the_validator(folder):
    me = "5" * 48
    (folder / "c01.yaml").write_text(C01 + f"\noverrides: {{{me}: {{pool.pending: 0}}}}\n")
    mine, others = RulesReader(settings(folder), validator=me), RulesReader(settings(folder))
    assert [mine.rules().at("c01", block).limits.parameters / 1e9 for block in (0, 10_096_800)] == [3.9, 4.15]
    assert [reader.rules().at("c01", 0).pool.pending for reader in (mine, others)] == [0, 3]


def test_a_public_network_refuses_a_pin_that_is_missing_later(folder):
    for name in ("c00", "c01"):
        replace_in(
            folder / f"{name}.yaml", "  revision: null                  # its commit, 40", f'  revision: "{REVISION}"  # 40'
        )
    public = ["--network", "finney"]
    assert RulesReader(settings(folder, *public)).rules().files
    replace_in(folder / "c01.yaml", "changes:\n", "changes:\n  - {at: 9000000, set: {dataset.revision: null}}\n")
    with pytest.raises(Rejected, match=r"dataset\.revision from block 9000000 on without a pin"):
        RulesReader(settings(folder, *public))
    assert RulesReader(settings(folder)).rules().files


def git(folder: Path, *words: str) -> str:
    names = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(["git", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_files_come_from_a_pinned_git_commit(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    repository = folder.parent
    git(repository, "init", "--quiet")
    git(repository, "add", "competitions")
    git(repository, "commit", "--quiet", "-m", "rules")
    commit = git(repository, "rev-parse", "HEAD")
    expected = read_texts(folder)
    replace_in(folder / "c01.yaml", "pending: 3", "pending: 4")
    git(repository, "commit", "--quiet", "-am", "later")
    cache = tmp_path / "cache" / "sn29" / "competitions.git"
    reader = RulesReader(settings(tmp_path / "nowhere", "--competitions.git", f"{repository}@{commit}"))
    assert reader.rules().at("c01", 0).pool.pending == 3
    reader.look_again()
    assert reader.files == parse_texts(expected)
    shutil.rmtree(repository / ".git")
    assert read_git_texts(f"{repository}@{commit}", cache) == expected, "a commit that is here needs no repository"
    with pytest.raises(Unavailable, match="git"):
        read_git_texts(f"{repository}@{'0' * 40}", cache)
    for wrong in ("no-revision", f"{repository}@main", f"@{commit}"):
        with pytest.raises(Rejected, match="40 hex digits"):
            read_git_texts(wrong, cache)
