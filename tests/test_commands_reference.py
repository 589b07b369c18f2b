"""docs/commands.md is what `sn29 reference` prints, on any machine; and `sn29 --help` says all that there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sn29 import cli
from sn29.command_table import COMMANDS, GROUPS
from sn29.settings import programs, settings_of

ROOT = Path(__file__).parents[1]


def test_the_reference_is_fresh_and_the_same_everywhere(tmp_path):
    """Printed with another home, another width of the terminal, and on one core."""
    env = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data"), "COLUMNS": "50"}
    one_core = [sys.executable, "-c", "import os, sys; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
                "os.cpu_count = lambda: 1; from sn29.cli import main; sys.exit(main(['reference']))"]  # fmt: skip
    done = subprocess.run(one_core, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    kept = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert done.stdout == kept, "stale: sn29 reference > docs/commands.md"


def test_the_reference_has_every_command_and_every_flag_with_its_variable():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]}
    for words in COMMANDS:
        assert any(title == f"sn29 {' '.join(words)}" or title.startswith(f"sn29 {' '.join(words)} ") for title in sections), (
            words
        )
    for kind in programs():
        name = " ".join(["sn29", *kind.program_words()])
        section = next(part for title, part in sections.items() if title == name or title.startswith(f"{name} "))
        for setting in settings_of(kind):
            place = text if setting.names[0].split(".")[0] in ("config", "log", "logging") else section
            assert f"`--{setting.names[0]}`" in place, (name, setting.names[0])
            assert f"`{setting.variables[0]}`" in place, (name, setting.variables[0])


def test_no_path_of_a_machine_is_in_it():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert str(Path.home()) + "/" not in text
    assert not re.search(r"/(root|home|tmp)/", text)


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_is_carried_out_by_a_function(words):
    module, _, function = COMMANDS[words].place.partition(":")
    assert callable(getattr(import_module(module), function))


def test_help_shows_every_command_once_under_its_group():
    text = cli.usage([])
    for words, command in COMMANDS.items():
        line = next(line for line in text.splitlines() if f"{line} ".startswith(f"  sn29 {' '.join(words)} "))
        assert line.endswith(command.about)
        before = text[: text.index(line)]
        assert max(GROUPS, key=lambda group: before.rfind(GROUPS[group].upper())) == command.group
    assert max(map(len, text.splitlines())) <= 130
