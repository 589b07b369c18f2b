"""What is said to whoever mistypes a command, a flag or a value: one line with the nearest word, one that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sn29.cli import main

ROOT = Path(__file__).parents[1]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """(exit status, lines on standard error); nothing on standard output."""
    status = main([*words])
    told = capsys.readouterr()
    assert told.out == ""
    return status, told.err.splitlines()


@pytest.mark.parametrize(
    ("typed", "meant", "listed_by"),
    [
        ("valdator", "validator", "sn29 --help"),
        ("stor check", "store check", "sn29 --help"),
        ("store chek", "store check", "sn29 store --help"),
        ("bench scor", "bench score", "sn29 bench --help"),
        ("lab vocab stat", "lab vocab stats", "sn29 lab vocab --help"),
        ("help valdator", "validator", "sn29 --help"),
    ],
)
def test_a_mistyped_command_is_one_line_with_the_nearest(capsys, typed, meant, listed_by):
    status, (line,) = said(capsys, *typed.split())
    assert status == 2
    assert f"did you mean {meant!r}?" in line
    assert f"`{listed_by}`" in line


def test_a_word_near_to_nothing_has_no_nearest(capsys):
    assert said(capsys, "xyzzy") == (2, ["sn29: no command 'xyzzy'; `sn29 --help` lists all there are"])


def test_the_first_word_of_several_commands_lists_them(capsys):
    status, lines = said(capsys, "store")
    assert status == 2
    assert [line.split()[:3] for line in lines[:-1]] == [["sn29", "store", word] for word in ("check", "compact", "export")]
    assert lines[-1] == "sn29: store needs one of these"


def test_help_is_a_command_too(capsys):
    shown = []
    for words in (["help"], ["--help"], ["help", "store"], ["store", "--help"]):
        assert main(words) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2] == shown[3]
    with pytest.raises(SystemExit) as over:
        main(["help", "audit"])
    assert over.value.code == 0
    assert "usage: sn29 audit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("report --stat.dir x", "sn29 report: no flag --stat.dir; did you mean --state.dir?"),
        ("replay x --rule=champion --jsn", "sn29 replay: no flag --jsn; did you mean --json?"),
        ("replay x --xyzzy=hidden", "sn29 replay: no flag --xyzzy"),
        ("explain", "sn29 explain: HOTKEY is missing: "),
        ("audit a", "sn29 audit: SECOND is missing: another validator's record of the same round"),
        ("audit a b c", "sn29 audit: c: more words than it takes"),
        ("replay x --rule", "sn29 replay: --rule stands without its value"),
        ("config mner", "sn29 config: no program mner; did you mean miner?"),
        ("completion", "sn29 completion: the name of your shell is missing"),
        ("completion ksh", "sn29 completion: no shell ksh"),
    ],
)
def test_wrong_words_are_named_plainly_and_where_the_right_ones_stand(capsys, typed, first):
    status, lines = said(capsys, *typed.split())
    assert status == 2
    assert lines[0].startswith(first)
    assert len(lines) == 2
    assert lines[1].startswith("  what to do: ")
    assert f"`sn29 {typed.split()[0]} --help`" in lines[1]


@pytest.mark.parametrize(
    ("typed", "where", "got", "allowed"),
    [
        ("lab compare --dtype float16", "--dtype", "float16", "float32 or bfloat16"),
        ("config --netuid x", "--netuid", "x", "a whole number, at least 0"),
        ("config miner --publish-at 1.5", "--publish-at", "1.5", "a number, at least 0, at most 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_wrong_usage_and_the_allowed_ones_are_said(capsys, typed, where, got, allowed):
    status, lines = said(capsys, *typed.split())
    assert status == 2
    assert lines[0].endswith(f" {where}: the setting is not usable (got {got}, rule {allowed})")
    assert lines[1].startswith(f"  what to do: {where} (")
    assert lines[1].endswith(f") takes {allowed}")


def test_a_wrong_value_in_the_environment_is_said_the_same(capsys, monkeypatch):
    monkeypatch.setenv("SN29_NETUID", "abc")
    status, lines = said(capsys, "config")
    assert status == 2
    assert "environment SN29_NETUID" in lines[0]
    assert "got abc, rule a whole number, at least 0" in lines[0]


def test_the_wrong_folder_for_competition_files_says_where_to_go(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = said(capsys, "competitions", "check")
    assert status == 1
    assert "no *.yaml" in lines[0]
    assert "clone" in lines[1]
    folder = shutil.copytree(ROOT / "competitions", tmp_path / "competitions")
    c00 = (folder / "c00.yaml").read_text()
    (folder / "c00.yaml").write_text(c00.replace("reward_share:", "rewardshare:"))
    status, lines = said(capsys, "competitions", "check")
    assert status == 1
    assert "rewardshare" in lines[0]
    assert "did you mean reward_share?" in lines[1]


def test_a_file_that_is_no_record_is_called_that(capsys, tmp_path):
    (tmp_path / "store.db").write_bytes(b"SQLite format 3\x00\xff\xfe")
    status, lines = said(capsys, "replay", str(tmp_path / "store.db"))
    assert (status, lines[0]) == (1, f"sn29 replay: {tmp_path / 'store.db'} is no round record")


def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    status, lines = said(capsys, "train", "--work.dir", str(tmp_path / "file" / "work"))
    assert status == 1
    assert len(lines) == 2
    assert lines[0].startswith(f"sn29 train: --work.dir: the setting is not usable (got {tmp_path / 'file' / 'work'}")
    assert "a folder that can be written to" in lines[1]


def test_check_looks_for_the_folder_first_and_names_the_competitions(capsys, tmp_path):
    status, lines = said(capsys, "check", str(tmp_path / "nope"), "--competition", "c00")
    assert status == 1
    assert f"no folder {tmp_path / 'nope'}" in lines[0]
    status, lines = said(capsys, "check", str(tmp_path), "--competitions.dir", str(ROOT / "competitions"))
    assert status == 2
    assert lines[0] == "sn29 check: --competition is missing"
    assert lines[1].endswith("name one with --competition: c00, c01")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_says_what_it_installs_before_pip_is_silent(tmp_path, target):
    done = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"],
        capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "MAKEFLAGS": ""},
    )  # fmt: skip
    before, pip, _ = done.stdout.partition("install --quiet --editable")
    assert pip
    assert f"Installing sn29 and its libraries into {tmp_path / 'venv'}: 1.5 GB" in before
