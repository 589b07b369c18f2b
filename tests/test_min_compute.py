"""min_compute.yml: every figure says where it is from, and those that follow from other files do follow."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

import sn29
from sn29.rules.competition import parse_competition

ROOT = Path(__file__).parents[1]
SPEC = yaml.safe_load((ROOT / "min_compute.yml").read_text())


@pytest.mark.parametrize("role", ["validator", "miner"])
def test_every_requirement_says_where_it_is_from(role):
    for name, part in SPEC["compute_spec"][role].items():
        assert part.get("from"), name
    assert SPEC["compute_spec"][role]["python"]["min"] == (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    )


def test_the_figures_follow_from_the_competitions_and_the_release():
    assert SPEC["version"] == sn29.__version__
    c00 = parse_competition("c00", (ROOT / "competitions" / "c00.yaml").read_text())
    storage = SPEC["compute_spec"]["validator"]["storage_gb"]
    assert storage["a_checkpoint_at_the_limit"] == c00.limits.parameters * 2 / 1e9
    assert SPEC["compute_spec"]["validator"]["gpu"]["memory_gb"] > storage["a_checkpoint_at_the_limit"]
