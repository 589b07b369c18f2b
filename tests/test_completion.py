"""`sn29 completion`: the scripts, asked by real shells."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sn29.command_table import COMMANDS
from sn29.completion import SHELLS, entries, script

ROOT = Path(__file__).parents[1]

ASK = {
    "bash": 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sn29; printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": 'source $argv[1]; complete -C (string join " " -- $argv[2..]) | string split -f1 \\t',
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The file of each shell's script."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell))
    return {shell: folder / shell for shell in SHELLS}


def offered(scripts: dict[str, Path], shell: str, folder: Path, *words: str) -> list[str]:
    """What the shell would offer for the last word, in a working directory."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not on this machine")
    command = {"bash": ["bash", "--norc", "-c"], "fish": ["fish", "--no-config", "-c"]}[shell]
    name = ["ask"] if shell != "fish" else []
    done = subprocess.run(
        [*command, ASK[shell], *name, str(scripts[shell]), "sn29", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_flags_choices_and_files_are_offered(scripts, shell, tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "mixed").mkdir()

    def ask(*words: str) -> list[str]:
        return offered(scripts, shell, tmp_path, *words)

    assert set(ask("")) >= {"validator", "miner", "lab", "competitions", "completion"}
    assert ask("vali") == ["validator"]
    assert set(ask("lab", "vocab", "")) == {"stats", "prune"}
    assert ask("validator", "--weights.max") == ["--weights.max-change"]
    assert set(ask("miner", "--packing", "")) == {"unpacked", "packed", "packed_masked"}
    assert ask("miner", "--packing", "un") == ["unpacked"]
    assert {name.rstrip("/") for name in ask("competitions", "pin", "mi")} == {"mine.yaml", "mixed"}
    assert "mine.yaml" in ask("validator", "--config", "min")
    assert ask("validator", "--wallet.name", "mi") == [], "a name is no file"
    assert ask("config", "miner", "--sea") == ["--sealed"]
    assert {"validator", "lab", "store"} <= set(ask("config", "")), "what has settings"
    assert not {"config", "completion", "reference", "reasons"} & set(ask("config", ""))
    assert ask("config", "competitions", "ch") == [], "it has none"
    assert ask("train", "--competition", "") == []
    (tmp_path / "competitions").mkdir()
    for name in ("c00.yaml", "c07.yaml", "hall_of_fame.yaml", "notes.txt", "$(touch${IFS}ran).yaml"):
        (tmp_path / "competitions" / name).touch()
    assert set(ask("train", "--competition", "")) == {"c00", "c07"}, "as they are there now"
    assert not list(tmp_path.rglob("ran")), "names of files are not run"
    assert set(ask("validator", "--network", "")) == {"finney", "test", "local", "localnet"}
    assert set(ask("validator", "-n", "lo")) == {"local", "localnet"}
    assert set(ask("replay", "x", "--rule", "")) == {"oldest_holder", "pairwise_epsilon", "champion"}
    assert sorted(set(ask("doctor", ""))) == ["miner", "validator"]
    assert len(ask("doctor", "")) == 2, "each once"
    assert not [word for word in ask("validator", "--tui", "") if word.startswith("-")], "flags are offered behind a dash"
    assert set(ask("completion", "")) >= set(SHELLS)
    assert "--no-tied" in ask("miner", "--no-t")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not on this machine")
def test_zsh_completes_what_is_typed(scripts, tmp_path):
    """A real line editor on a terminal: keys go in, and what stands on the line afterwards is written to a file."""
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "competitions").mkdir()
    (tmp_path / "competitions" / "c07.yaml").touch()
    (tmp_path / "start").write_text(
        f"autoload -U compinit && compinit -u -D\nsource {scripts['zsh']}\nsetopt no_list_beep\nPS1='$ '\n"
        "line() { print -r -- $BUFFER >> lines; BUFFER= }\nzle -N line\nbindkey '^X' line\nprint ready > lines\n"
    )
    typed = {
        "sn29 vali": "sn29 validator ",
        "sn29 lab voc": "sn29 lab vocab ",
        "sn29 validator --weights.max": "sn29 validator --weights.max-change ",
        "sn29 miner --packing un": "sn29 miner --packing unpacked ",
        "sn29 miner --packing=un": "sn29 miner --packing=unpacked ",
        "sn29 config miner --sea": "sn29 config miner --sealed ",
        "sn29 train --competition c0": "sn29 train --competition c07 ",
        "sn29 config comple": "sn29 config comple",
        "sn29 competitions pin mi": "sn29 competitions pin mine.yaml ",
        "sn29 validator --wallet.name mi": "sn29 validator --wallet.name mi",
    }
    lines, keyboard = tmp_path / "lines", pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=keyboard[1], stdout=keyboard[1], stderr=keyboard[1], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip

    def press(keys: str, num_lines: int) -> None:
        os.write(keyboard[0], keys.encode())
        ends = time.monotonic() + 20
        while time.monotonic() < ends and not (lines.exists() and len(lines.read_text().splitlines()) >= num_lines):
            if select.select([keyboard[0]], [], [], 0.05)[0]:
                os.read(keyboard[0], 65536)

    press("source ./start\n", 1)
    for n, text in enumerate(typed):
        press(f"{text}\t\x18", n + 2)
    shell.kill()
    shell.wait()
    assert lines.read_text().splitlines()[1:] == list(typed.values())


def test_a_value_behind_an_equals_sign_is_completed(scripts, tmp_path):
    """bash cuts words at =, so that these are three."""
    assert offered(scripts, "bash", tmp_path, "miner", "--packing", "=", "un") == ["unpacked"]
    assert set(offered(scripts, "bash", tmp_path, "validator", "--dtype", "=")) == {"float32", "bfloat16"}
    assert offered(scripts, "bash", tmp_path, "validator", "--dtype=b") == ["--dtype=bfloat16"]


def test_file_names_with_blanks_stay_whole(scripts, tmp_path):
    (tmp_path / "my record.json").write_text("")
    ask = 'source "$1"; COMP_WORDS=(sn29 replay my); COMP_CWORD=2; _sn29; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", ask, "ask", str(scripts["bash"])], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "my record.json\n"


def test_every_command_and_every_flag_is_in_every_script():
    found = entries()
    assert {entry.words for entry in found} >= set(COMMANDS)
    texts = {shell: script(shell) for shell in SHELLS}
    for entry in found:
        for option in entry.options:
            for flag in option.flags:
                assert flag in texts["bash"]
                assert flag in texts["zsh"]
                assert (f"-l {flag[2:]} " if flag.startswith("--") else f"-s {flag[1:]} ") in texts["fish"], flag


def test_the_script_is_printed_for_known_shells_alone():
    def sn29(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "sn29.cli", "completion", *words], capture_output=True, text=True, cwd=ROOT)

    assert sn29("bash").stdout == script("bash")
    for words in (["tcsh"], []):
        done = sn29(*words)
        assert done.returncode == 2
        assert "bash, zsh, fish" in done.stderr
        assert (words or ["missing"])[0] in done.stderr
    assert "source <(sn29 completion bash)" in sn29("--help").stdout
