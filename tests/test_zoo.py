"""The zoo is judged right: every hostile repository by its verdict, every honest one accepted, at a bounded cost.

Children are the lab's (tests/zoo/lab.py), which tell what they open and run; some cases go through the validator's own as
well. All of them through those: `python -m tests.zoo FOLDER --judge`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from zoo.all_cases import all_cases, write
from zoo.case import CHILD, METADATA, Case, Copy
from zoo.copies import CLAIMS
from zoo.honest import FAMILIES
from zoo.judge import Child, Verdict, Zoo, lab, own_children, recognised, wrong
from zoo.open_cases import EXPECTED_OPEN

from sn29.models.checkpoint import is_content
from sn29.rules.selection import first_claims

pytestmark = pytest.mark.timeout(1200)

# What a repository cannot show: A9 is the samples' seed, A14 what other validators do.
ROWS = {f"A{n}" for n in range(1, 16)} - {"A9", "A14"} | {f"B{n}" for n in range(1, 18)}
WITH_OWN_CHILD = (
    "llama-plain", "phi3-sliding-window", "values-nan-first", "tokenizer-splitter-backtrack", "tokenizer-raw-deep",
    "tokenizer-normalizer-lowercase", "unread-chat-template", "free-phrase-added",
)  # fmt: skip


@dataclass
class Judged:
    cases: list[Case]
    verdicts: dict[str, Verdict]
    zoo: Zoo
    child: Child
    canary: Path
    written: list[str]
    """Paths that came, went or changed while the cases were judged, outside the validator's own folders."""

    def hostile(self) -> list[Case]:
        return [case for case in self.cases if case.row != "control"]

    def honest(self) -> list[Case]:
        return [case for case in self.cases if case.row == "control"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    top = tmp_path_factory.mktemp("zoo")
    canary = top / "canary"
    run = top / "deep" / "inside" / "run"  # what climbs out of a folder by ../../.. is still seen
    for folder in (canary, run):
        folder.mkdir(parents=True)
    cases = all_cases(canary)
    with Zoo(run, cases) as zoo, lab() as child:
        before = snapshot(top)
        verdicts = {case.name: zoo.judge(case, child) for case in cases}
        after = snapshot(top)
        changed = sorted({path for path, _ in before.items() ^ after.items()})
        yield Judged(cases, verdicts, zoo, child, canary, changed)


def snapshot(top: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file but those of the validator's store and model folders."""
    own = ("deep/inside/run/models/", "deep/inside/run/store.db")
    found = {path.relative_to(top).as_posix(): path.lstat() for path in top.rglob("*") if not path.is_dir()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items() if not name.startswith(own)}


def test_the_zoo_is_large_and_covers_every_row(judged: Judged) -> None:
    assert {case.row for case in judged.hostile()} == ROWS
    assert len(judged.hostile()) >= 100
    of_family = Counter(case.name.partition("-")[0] for case in judged.honest())
    assert set(of_family) == set(FAMILIES)
    assert min(of_family.values()) >= 20


def test_every_control_is_accepted(judged: Judged) -> None:
    assert [w for case in judged.honest() if (w := wrong(case, judged.verdicts[case.name], judged.verdicts.__getitem__))] == []


def test_every_hostile_repository_gets_its_verdict(judged: Judged) -> None:
    misjudged = [
        w
        for case in judged.hostile()
        if case.name not in EXPECTED_OPEN and (w := wrong(case, judged.verdicts[case.name], judged.verdicts.__getitem__))
    ]
    assert misjudged == [], "\n" + "\n".join(misjudged)


def test_what_is_listed_as_open_is_open(judged: Judged) -> None:
    """Whoever mends a case takes it off the list."""
    cases = {case.name: case for case in judged.cases}
    mended = [
        name for name in EXPECTED_OPEN if not wrong(cases[name], judged.verdicts[name], judged.verdicts.__getitem__)
        and above_honest(judged, name) <= 200e6
    ]  # fmt: skip
    assert mended == []


def test_no_code_of_theirs_ran_and_nothing_was_written_outside(judged: Judged) -> None:
    assert sorted(judged.canary.iterdir()) == []
    assert judged.written == []
    assert {event for verdict in judged.verdicts.values() for event in verdict.events} == set()


def test_model_folders_hold_what_is_evaluated_and_nothing_else(judged: Judged) -> None:
    """No link, no README, no half of a refused file; and nothing at all of what metadata showed."""
    models = judged.zoo.folder / "models"
    files = [path for path in models.rglob("*") if not path.is_dir()]
    assert [path for path in files if path.is_symlink() or not is_content(path.name)] == []
    assert len(list(models.iterdir())) == sum(verdict.stage == CHILD for verdict in judged.verdicts.values())


def test_the_canary_sings_when_code_runs(tmp_path: Path) -> None:
    """The payloads are sharp, and the lab hears a child that writes, unpickles, or runs a repository's code."""
    program = (
        "import os, pickle, sys\n"
        "from zoo.lab import _hook\n"
        "from zoo.weights import pickled\n"
        "heard, tell = os.pipe()\n"
        "sys.addaudithook(_hook(tell))\n"
        "exec(compile('pass', '/x/models/abc/modeling_evil.py', 'exec'))\n"
        "pickle.loads(pickled(sys.argv[1]))\n"
        "print(os.read(heard, 100000).decode())\n"
    )
    canary = tmp_path / "code-was-run"
    done = subprocess.run([sys.executable, "-c", program, str(canary)], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert canary.exists(), done.stderr
    for event in (f"write {canary}", "pickle.find_class", "exec /x/models/abc/modeling_evil.py"):
        assert event in done.stdout


def test_a_case_takes_at_most_200_mb(judged: Judged) -> None:
    """Above an honest model's child, and above what the parent holds."""
    assert {name for name in judged.verdicts if above_honest(judged, name) > 200e6} - EXPECTED_OPEN.keys() == set()
    assert {name: v.parent_bytes for name, v in judged.verdicts.items() if v.parent_bytes > 64e6} == {}


def test_a_case_takes_at_most_10_seconds(judged: Judged) -> None:
    """Of the parent and the child together. Most take a fifth of one; on a busy machine a slow one has a second try."""
    cases = {case.name: case for case in judged.cases}
    slow = [name for name, verdict in judged.verdicts.items() if seconds(verdict) > 10]
    assert [name for name in slow if seconds(judged.zoo.judge(cases[name], judged.child)) > 10] == []


def seconds(verdict: Verdict) -> float:
    return verdict.parent_s + verdict.child_s


def above_honest(judged: Judged, name: str) -> float:
    return judged.verdicts[name].child_bytes - median(judged.verdicts[case.name].child_bytes for case in judged.honest())


def test_what_metadata_shows_costs_at_most_150_kb_and_an_exact_copy_2_kb(judged: Judged) -> None:
    by_metadata = {
        case.name: judged.verdicts[case.name] for case in judged.hostile() if judged.verdicts[case.name].stage == METADATA
    }
    dear = {name: verdict.num_bytes for name, verdict in by_metadata.items() if verdict.num_bytes > 150_000}
    # A page with 1,000 names is 108 kB, and a list is asked for twice before it is held against anybody.
    assert dear.keys() <= {"flood-1200-files"}
    assert max(dear.values(), default=0) <= 220_000
    exact = [case.name for case in judged.hostile() if [e.how for e in case.expected if isinstance(e, Copy)] == [CLAIMS]]
    assert len(exact) >= 10
    assert {name: judged.verdicts[name].num_bytes for name in exact if judged.verdicts[name].num_bytes > 2000} == {}
    at_all = sum(bool(judged.verdicts[case.name].code) for case in judged.hostile() if not case.name.startswith("tokenizer-"))
    assert len(by_metadata) >= 0.9 * at_all  # of what can be refused, tokenizers apart: those are files to be read


def test_no_control_is_taken_for_another(judged: Judged) -> None:
    honest = [case for case in judged.honest() if judged.verdicts[case.name].stage == CHILD]
    alike = [
        (later.name, earlier.name, how)
        for at, later in enumerate(honest)
        for earlier in honest[:at]
        if later.competition == earlier.competition
        and (how := recognised(judged.verdicts[later.name], judged.verdicts[earlier.name]))
    ]
    assert alike == []


def test_copies_are_attributed_and_never_the_original(judged: Judged) -> None:
    """Whoever is looked at first: it is the earlier commitment that keeps the claim, and the original is scored."""
    cases = {case.name: case for case in judged.cases}
    copies = [case for case in judged.hostile() if any(isinstance(expected, Copy) for expected in case.expected)]
    assert len(copies) >= 20
    known = [case for case in copies if judged.verdicts[case.name].code == "copy"]
    assert len(known) >= 10
    for case in copies:
        of = cases[next(expected.of for expected in case.expected if isinstance(expected, Copy))]
        assert judged.verdicts[of.name].code == ""
        assert judged.verdicts[of.name].scored is not None
        if case in known:
            copy, original = judged.zoo.claimed(case), judged.zoo.claimed(of)
            for both in ([copy, original], [original, copy]):
                assert [refusal.commitment for refusal in first_claims(both, {}).refused] == [copy.commitment], case.name


def test_the_validators_own_child_finds_the_same(judged: Judged) -> None:
    cases = {case.name: case for case in judged.cases}
    with own_children() as own:
        verdicts = {name: judged.zoo.judge(cases[name], own) for name in WITH_OWN_CHILD}
    for name, verdict in verdicts.items():
        lab_verdict = judged.verdicts[name]
        assert (verdict.stage, verdict.code) == (lab_verdict.stage, lab_verdict.code), name
        if lab_verdict.scored is not None and verdict.scored is not None:
            assert verdict.scored.nats == lab_verdict.scored.nats, name
            assert all(map(math.isfinite, verdict.scored.nats)) or verdict.code, name


def test_the_command_writes_what_it_says(judged: Judged, tmp_path: Path) -> None:
    some = [case for case in judged.cases if case.name in WITH_OWN_CHILD]
    write(some, tmp_path)
    assert {path.name for path in (tmp_path / "repositories").iterdir()} == set(WITH_OWN_CHILD)
    assert (tmp_path / "repositories" / "llama-plain" / "config.json").read_bytes() == some[0].files["config.json"]
