"""The documents are true: their tree is the tree, commands and flags exist and are run by tests, links and examples hold."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = ("README.md", "SECURITY.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in (
    "validator", "miner", "owner", "research", "architecture", "packing", "metrics",
)))  # fmt: skip
PAGES = {name: (ROOT / name).read_text() for name in WRITTEN}
"""docs/commands.md has a test of its own."""
RUN_BY = {
    "bench eval": "test_bench_eval_command.py",
    "bench score": "test_bench_score_command.py",
    "bench start": "test_bench_start_command.py",
    "bench stream": "test_bench_stream_command.py",
    "bench train": "test_bench_train_command.py",
    "check": "test_check_command.py",
    "competitions check": "test_cli.py",
    "competitions diff": "test_competition_commands.py",
    "competitions pin": "test_competition_commands.py",
    "competitions show": "test_competition_commands.py",
    "competitions simulate": "test_replay.py",
    "config": "test_cli.py",
    "data stats": "test_data_command.py",
    "doctor": "test_doctor.py",
    "explain": "test_explain.py",
    "forecast": "test_forecast_command.py",
    "lab compare": "test_lab_compare_command.py",
    "lab gates": "test_lab_gates_command.py",
    "lab grow": "test_lab_grow_command.py",
    "lab lengths": "test_lab_lengths_command.py",
    "lab plan": "test_lab_plan_command.py",
    "lab vocab prune": "test_lab_vocab_command.py",
    "lab vocab stats": "test_lab_vocab_command.py",
    "localnet up": "test_cli.py",
    "miner": "test_miner_loop.py",
    "reasons": "test_check_command.py",
    "replay": "test_replay.py",
    "audit": "test_replay.py",
    "report": "test_report_command.py",
    "simulate incentive": "test_incentive.py",
    "simulate sequential": "test_stopping.py",
    "store check": "test_store_command.py",
    "store compact": "test_store_command.py",
    "store export": "test_store_command.py",
    "study packing": "test_study_command.py",
    "train": "test_train_command.py",
    "validator": "test_localnet.py",
}
"""The test that runs a command as its user would. What the documents show and no test runs stands in NOT_RUN with why."""
NOT_RUN = {
    "docker": "no engine where the tests run: tests/test_docker.py lints the files and runs their commands outside",
}
_GROUPS = {"localnet", "competitions", "simulate", "data", "study", "bench", "lab", "store"}


def _tree() -> set[str]:
    """Files that the section `The house` names."""
    section = PAGES["docs/architecture.md"].split("## The house")[1].split("\n## ")[0]
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
    """Indented lines that are commands, environment and comment taken off."""
    lines = (line for page in PAGES.values() for line in page.splitlines() if line.startswith("    "))
    found = (re.sub(r"^(\w+=\S+ )+", "", line.strip()).split("  #")[0].strip() for line in lines)
    return sorted({line for line in found if line.startswith(("sn29 ", "python ", "docker "))})


def _verbs(words: list[str]) -> list[str]:
    """`lab vocab stats` of `sn29 lab vocab stats SOURCE`."""
    return words[: 3 if words[:2] == ["lab", "vocab"] else 2 if words[0] in _GROUPS else 1]


def _is_run(verbs: list[str]) -> bool:
    """The test has the words as a user types them, as arguments, the last one behind a helper of its own, or the function."""
    name = RUN_BY[" ".join(verbs)]
    text = (ROOT / "tests" / name).read_text()
    forms = [" ".join(verbs), ", ".join(f'"{verb}"' for verb in verbs), f"{'_'.join(verbs)}(", f"neurons/{verbs[0]}"]
    return any(form in text for form in forms) or (verbs[0] in name and f'run("{verbs[-1]}"' in text)


@cache
def _help(start: tuple[str, ...]) -> str:
    done = subprocess.run([*start, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", _commands())
def test_every_command_and_flag_exists_and_is_run_by_a_test_or_says_why_not(command: str) -> None:
    words = shlex.split(command)
    if words[0] in NOT_RUN:
        return
    if words[0] == "python":
        if words[1] == "-m":
            assert (ROOT / f"{words[2].replace('.', '/')}").exists() or (ROOT / f"{words[2].replace('.', '/')}.py").exists()
            return
        assert (ROOT / words[1]).is_file()
        start: tuple[str, ...] = (sys.executable, words[1])
        rest = words[2:]
    else:
        verbs = _verbs(words[1:])
        start, rest = (sys.executable, "-m", "sn29.cli", *verbs), words[1 + len(verbs) :]
        assert _is_run(verbs), f"{RUN_BY[' '.join(verbs)]} does not run {' '.join(verbs)}"
    for flag in (word for word in rest if word.startswith("-")):
        assert re.search(rf"(?<![\w.-]){re.escape(flag)}(?![\w.-])", _help(start)), f"{command}: no {flag} in its --help"


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            heads = [re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in
                     re.findall(r"(?m)^#+ (.*)$", path.read_text())]  # fmt: skip
            assert anchor in heads, f"{page} links to {target}#{anchor}"


def test_tests_that_documents_name_are_there() -> None:
    for page, text in PAGES.items():
        for name in re.findall(r"`(tests/[\w/]+(?:\.py|/))", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_smallest_competition_of_the_owners_page_is_valid() -> None:
    from sn29.rules.competition import parse_competition

    first, *_ = re.findall(r"```yaml\n(.*?)```", PAGES["docs/owner.md"], re.DOTALL)
    found = parse_competition("c02", first)
    assert (found.reward_share, found.limits.parameters) == (0.2, 150_000_000)


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^    make (\w+)", PAGES["README.md"], re.MULTILINE) == ["demo", "test"]
    for target in re.findall(r"^    make (\w+)", "\n".join(PAGES.values()), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_owners_page_states_the_limits_that_are_in_force():
    from sn29.rules.competition import parse_competition

    for name in ("c00", "c01"):
        competition = parse_competition(name, (ROOT / "competitions" / f"{name}.yaml").read_text())
        row = next(line for line in PAGES["docs/owner.md"].splitlines() if line.startswith(f"| {name} |"))
        assert f"{competition.limits.parameters / 1e9:g}e9" in row
        assert f"{competition.reward_share:.0%}".replace("%", " %") in row
        for family in competition.families:
            assert f"`{family}`" in row


def test_the_readme_tells_the_demo_that_is_played():
    from sn29.localnet.demo import miners
    from sn29.localnet.text import Texts

    for miner in miners(Texts(Path("unused")), Path("unused"), 0):
        row = next(line for line in PAGES["README.md"].splitlines() if line.startswith("|") and miner.name in line)
        if miner.expected != "evaluated":
            assert f"`{miner.expected}`" in row


def test_the_miners_page_has_every_reason_for_which_something_is_refused():
    from sn29.errors import reasons_table

    assert reasons_table() in PAGES["docs/miner.md"], "paste what `sn29 reasons` prints"
