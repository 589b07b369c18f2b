"""python -m tests.zoo FOLDER [--judge] [--lab] [--only TEXT]: writes the zoo; judges it, as a table."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from sn29 import telemetry

from .all_cases import all_cases, write
from .case import Case, Copy, Twin
from .judge import Child, Verdict, Zoo, lab, own_children, wrong
from .open_cases import EXPECTED_OPEN


def main() -> int:
    """Exit status 1 when a case was judged wrong that is not known to be."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--judge", action="store_true", help="judge every case, with children as a round has them")
    parser.add_argument("--lab", action="store_true", help="judge with children that are listened to (lab.py)")
    parser.add_argument("--only", default="", help="cases whose name or row has this in it, and their twins")
    asked = parser.parse_args()
    telemetry.configure(level="ERROR")
    canary = (asked.folder / "canary").absolute()
    canary.mkdir(parents=True, exist_ok=True)
    cases = all_cases(canary)
    write(cases, asked.folder)
    honest = sum(case.row == "control" for case in cases)
    print(f"{honest} controls, {len(cases) - honest} hostile, rows {', '.join(sorted({c.row for c in cases} - {'control'}))}")
    if not asked.judge:
        return 0
    with tempfile.TemporaryDirectory() as run, ExitStack() as stack:
        child = stack.enter_context(lab() if asked.lab else own_children())
        zoo = stack.enter_context(Zoo(Path(run), wanted(cases, asked.only)))
        return report(zoo, child, canary)


def wanted(cases: list[Case], only: str) -> list[Case]:
    found = {case.name for case in cases if only in case.name or only == case.row}
    found |= {e.of for case in cases if case.name in found for e in case.expected if isinstance(e, Twin | Copy)}
    return [case for case in cases if case.name in found]


def report(zoo: Zoo, child: Child, canary: Path) -> int:
    verdicts: dict[str, Verdict] = {}
    misjudged, began = [], time.monotonic()
    for case in zoo.cases.values():
        verdict = verdicts[case.name] = zoo.judge(case, child)
        miss = wrong(case, verdict, verdicts.__getitem__)
        mark = "" if not miss else "  (known)" if case.name in EXPECTED_OPEN else "  WRONG"
        print(
            f"{case.row:7} {case.name:44} {verdict.stage:8} {verdict.code or 'scored':15} {verdict.num_bytes / 1e3:9.1f} kB "
            f"{verdict.parent_s:6.2f} s {verdict.parent_bytes / 1e6:6.1f} MB {verdict.child_s:6.2f} s "
            f"{verdict.child_bytes / 1e6:7.1f} MB{mark}",
            flush=True,
        )
        if miss and not mark.startswith("  (known"):
            misjudged.append(miss)
    ran = sorted(path.name for path in canary.iterdir())
    summary(zoo, verdicts, time.monotonic() - began)
    print("code that was run:", ", ".join(ran) or "none")
    for miss in misjudged:
        print("WRONG", miss)
    return 1 if misjudged or ran else 0


def summary(zoo: Zoo, verdicts: dict[str, Verdict], seconds: float) -> None:
    hostile = [name for name, case in zoo.cases.items() if case.row != "control"]
    stages = Counter(verdicts[name].stage for name in hostile if verdicts[name].code)
    print(
        f"\n{len(verdicts)} cases in {seconds:.0f} s; hostile ones refused: {dict(stages)}, "
        f"scored: {sum(not verdicts[n].code for n in hostile)}"
    )
    refused = [verdicts[name] for name in hostile if verdicts[name].stage == "metadata"]
    if refused:
        print(
            f"refused by metadata: median {statistics.median(v.num_bytes for v in refused) / 1e3:.1f} kB, most "
            f"{max(v.num_bytes for v in refused) / 1e3:.1f} kB; most {max(v.parent_s for v in refused):.2f} s, "
            f"{max(v.parent_bytes for v in refused) / 1e6:.1f} MB"
        )
    honest = [v.child_bytes for n, v in verdicts.items() if n not in hostile and v.child_bytes]
    above = {n: verdicts[n].child_bytes - statistics.median(honest) for n in hostile if verdicts[n].child_bytes and honest}
    if above:
        most, slowest = max(above, key=above.__getitem__), max(hostile, key=lambda n: verdicts[n].child_s)
        print(f"children: honest {statistics.median(honest) / 1e6:.0f} MB; most above: {above[most] / 1e6:.0f} MB ({most}); "
              f"slowest {verdicts[slowest].child_s:.2f} s ({slowest})")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
