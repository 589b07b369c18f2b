"""The README is true: its tree is the tree, its commands and flags exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _tree() -> set[str]:
    """Files that the section `The house` names."""
    section = README.split("## The house")[1].split("\n## ")[0]
    found, folder = set(), ""
    for line in section.splitlines():
        if match := re.fullmatch(r"    (\S+/)", line):
            folder = match[1]
        elif match := re.match(r"      (\S+)  ?\s*\S", line):
            found.add(folder + match[1])
    return found


def test_the_tree_names_every_file_once_with_a_line():
    tracked = {p.relative_to(ROOT).as_posix() for folder in ("sn29", "neurons") for p in (ROOT / folder).rglob("*.py")}
    tracked |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "competitions").iterdir()}
    tracked = {name for name in tracked if not name.endswith("__init__.py")}
    assert _tree() == tracked


def _commands() -> list[str]:
    """Indented lines that are commands of ours, environment and comment taken off."""
    lines = (re.sub(r"^(\w+=\S+ )+", "", line.strip()).split("  #")[0] for line in README.splitlines() if line.startswith("    "))
    return [line.strip() for line in lines if line.startswith(("sn29 ", "python neurons/"))]


@pytest.mark.parametrize("command", [c for c in _commands() if "cli.py" not in c])
def test_every_command_and_flag_of_the_readme_exists(command):
    words = shlex.split(command)
    program = words[:2] if words[0] == "python" else words[:1]
    rest = words[len(program) :]
    pairs = ("localnet", "competitions", "simulate", "data", "study", "bench", "lab")
    verbs = [] if words[0] == "python" else rest[: 3 if rest[1:2] == ["vocab"] else 2 if rest[0] in pairs else 1]
    start = [sys.executable, str(ROOT / program[1])] if words[0] == "python" else [sys.executable, "-m", "sn29.cli", *verbs]
    done = subprocess.run([*start, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for flag in (word for word in rest if word.startswith("-")):
        assert re.search(rf"(?<![\w.-]){re.escape(flag)}(?![\w.-])", done.stdout), f"{command}: no {flag} in its --help"


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert re.findall(r"^    make (\w+)", README, re.MULTILINE) == ["demo", "test"]


def test_the_readme_states_the_limits_that_are_in_force():
    from sn29.rules.competition import parse_competition

    for name in ("c00", "c01"):
        competition = parse_competition(name, (ROOT / "competitions" / f"{name}.yaml").read_text())
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
        assert f"{competition.limits.parameters / 1e9:g}e9" in row
        assert f"{competition.reward_share:.0%}".replace("%", " %") in row
        for family in competition.families:
            assert f"`{family}`" in row


def test_the_readme_tells_the_demo_that_is_played():
    from sn29.localnet.demo import miners
    from sn29.localnet.text import Texts

    for miner in miners(Texts(Path("unused")), Path("unused"), 0):
        row = next(line for line in README.splitlines() if line.startswith("|") and miner.name in line)
        if miner.expected != "evaluated":
            assert f"`{miner.expected}`" in row


def test_the_readme_has_every_reason_for_which_something_is_refused():
    from sn29.errors import reasons_table

    assert reasons_table() in README, "paste what `sn29 reasons` prints"
