"""The reference validator's own results: inputs, and what its code made of them.

They are not part of the repository. They are looked for in the folder that SN29_VECTORS names, or in ../shared/vectors
beside the repository; without them the tests that need them are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_FOLDER = Path(os.environ.get("SN29_VECTORS") or REPOSITORY.parent / "shared" / "vectors")
VECTORS = _FOLDER / "reference_scoring.json"


def cases(section: str, leave_out: dict[str, str] | None = None) -> list[Any]:
    """The section's cases as parameters, without those whose names are keys of `leave_out`."""
    if not VECTORS.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {VECTORS.name} in ../shared/vectors or SN29_VECTORS"))]
    found = {case.get("name", str(place)): case for place, case in enumerate(json.loads(VECTORS.read_text())[section])}
    unknown = sorted(set(leave_out or ()) - set(found))
    assert not unknown, f"{section} has no case {unknown}"
    return [pytest.param(case, id=name) for name, case in found.items() if name not in (leave_out or ())]


def only(section: str, names: dict[str, str]) -> list[Any]:
    """The cases whose names are keys of `names`."""
    return [p for p in cases(section) if p.id is None or p.id in names]


def number(value: float | str) -> float:
    """Numbers that JSON cannot hold stand there as Infinity, -Infinity and NaN."""
    return float(value)


def table(losses: dict[str, list[float | str] | None]) -> dict[str, list[float]]:
    """Losses by uid, without the models that have none."""
    return {uid: [number(x) for x in row] for uid, row in losses.items() if row is not None}
