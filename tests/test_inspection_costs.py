"""What a model's metadata costs a validator stays within the bounds that the README states: for 14 GB, whatever is wrong."""

from __future__ import annotations

import pytest
from bench.inspection import Costs, measure


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Costs:
    return measure(tmp_path_factory.mktemp("inspection"), times=1)


def test_every_verdict_costs_at_most_150_kb_and_a_copy_2_kb(costs: Costs) -> None:
    assert costs.num_bytes > 13e9
    assert {what: cost.num_bytes for what, cost in costs.verdicts.items() if cost.num_bytes > 150_000} == {}
    assert costs.verdicts["an exact copy"].said.startswith("copy")
    assert costs.verdicts["an exact copy"].num_bytes <= 2000
    assert costs.verdicts["an exact copy"].requests == 1
    codes = {what: cost.said.partition(":")[0] for what, cost in costs.verdicts.items()}
    assert {what for what, code in codes.items() if code == "allowed"} == {"honest, one file", "honest, three files"}
    assert set(codes.values()) == {
        "allowed", "copy", "forbidden_file", "bad_config", "family", "parameters", "vocabulary", "tensors",
    }  # fmt: skip
    cheap = [cost for what, cost in costs.verdicts.items() if codes[what] in ("forbidden_file", "bad_config", "family")]
    assert max(cost.num_bytes for cost in cheap) <= 5000


def test_a_verdict_takes_at_most_a_second(costs: Costs) -> None:
    assert {what: cost.seconds for what, cost in costs.verdicts.items() if cost.seconds > 1} == {}


def test_each_stage_costs_what_is_said_of_it(costs: Costs) -> None:
    for what, stages in costs.stages.items():
        assert stages["listing"].requests == 1, what
        assert stages["listing"].num_bytes <= 2000, what
        assert stages["config.json"].num_bytes <= 1000, what
        assert 20_000 <= stages["headers and index"].num_bytes <= 67_000, what
        assert 0 < stages["weights, ranged reads"].num_bytes <= 64 << 10, what
        assert (stages["every later round"].requests, stages["every later round"].num_bytes) == (1, 0), what
