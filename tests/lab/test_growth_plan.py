"""Plans of larger models: nearest under the budget, exact counts, each step grown from the one before, and their cost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from sn29.errors import Reason, Rejected
from sn29.lab import growth_plan
from sn29.lab.cost import config_of, costs_of
from sn29.lab.weights import open_weights
from sn29.training.optimizers import stated_bytes

PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
    "intermediate_size": 8448, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 32000,
}  # fmt: skip
RAMP = [3_900_000_000 + 250_000_000 * step for step in range(13)]


def test_seven_billion_from_four():
    """The worked example of the module."""
    plan = growth_plan.planned(PHI3, 6_900_000_000)
    assert growth_plan.count(growth_plan.numbers_of(PHI3)) == 3_896_577_024
    assert plan.parameters == 6_875_304_960
    assert plan.changes == {"num_hidden_layers": (32, 51), "intermediate_size": (8448, 10112)}
    assert 0 <= plan.unused <= growth_plan.UNUSED


@pytest.mark.parametrize("budget", [4_000_000_000, 6_900_000_000, 7_000_000_000, 10_500_000_000, 20_100_000_000])
def test_counts_are_those_of_transformers(budget: int):
    """Also where it widens: 10.5e9 and 20.1e9 are the limits that the subnet has had."""
    plan = growth_plan.planned(PHI3, budget)
    raw = {key: value for key, value in plan.raw.items() if key not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(**raw, pad_token_id=None))
    assert model.num_parameters() == plan.parameters <= budget
    assert plan.unused <= growth_plan.UNUSED
    assert growth_plan.THINNEST <= plan.aspect <= growth_plan.WIDEST
    assert ("hidden_size" in plan.changes) == (budget > 1.8 * 3_896_577_024)


def test_a_schedule_grows_from_step_to_step():
    plans = growth_plan.schedule(PHI3, RAMP)
    assert [plan.budget for plan in plans] == RAMP
    assert plans[0].changes == {}
    for before, after in itertools.pairwise(plans):
        assert before.parameters < after.parameters
        assert after.unused <= growth_plan.UNUSED
        for field, (old, new) in after.changes.items():
            assert before.config.number(field) == old < new
    assert plans[-1].parameters > 0.995 * 6.9e9


def test_a_schedule_counts_growth_from_its_first_model():
    """Of phi-2 (2.8e9): above 1.8 times as many the width grows too, in steps that fit; counted from step to step it never
    did, and the MLP came to ten times the width."""
    phi2 = {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560,
        "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4,
    }  # fmt: skip
    plans = growth_plan.schedule(phi2, RAMP)
    ratios = [plan.config.number("intermediate_size") / plan.config.number("hidden_size") for plan in plans]
    assert max(ratios) < 6.5
    assert ratios[-1] < 6
    assert plans[-1].config.number("hidden_size") == 3200
    assert all(plan.unused <= growth_plan.UNUSED for plan in plans)
    for before, after in itertools.pairwise(plans):
        assert all(before.config.number(field) == old < new for field, (old, new) in after.changes.items())


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("times", [1.3, 2.6], ids=["deeper", "wider"])
def test_a_plan_can_be_carried_out(make_checkpoint: Callable[..., Path], family: str, times: float):
    """What operators make has the planned config and count; 32 wide with 4 layers of 8 is thin already, so MLPs grow."""
    base = open_weights(make_checkpoint(family, num_key_value_heads=2))
    plan = growth_plan.planned(base.raw, int(times * base.num_parameters))
    grown = growth_plan.carried_out(base, plan)
    assert grown.weights.config == plan.config
    assert grown.weights.num_parameters == plan.parameters
    assert ("hidden_size" in plan.changes) == (times == 2.6)
    read = {name: tuple(grown.weights.read(name).shape) for name in grown.weights.dtypes}
    assert read == grown.weights.shapes


def test_less_than_there_is_cannot_be_planned():
    with pytest.raises(Rejected, match="3,896,577,024") as error:
        growth_plan.planned(PHI3, 3_000_000_000)
    assert error.value.reason is Reason.PARAMETERS


def test_more_than_a_validator_takes_is_told_of_the_budget():
    with pytest.raises(Rejected, match=r"--to: .*60,000,000,000,000 parameters, which take") as error:
        growth_plan.planned(PHI3, 60_000_000_000_000)
    assert error.value.reason is Reason.PARAMETERS


@pytest.mark.parametrize(("family", "tied"), [("LlamaForCausalLM", True), ("PhiForCausalLM", False), ("Phi3ForCausalLM", False)])
def test_the_cost_is_that_of_the_lab(make_checkpoint: Callable[..., Path], family: str, tied: bool):
    """`cost.py` counts the same operations on the model itself."""
    base = open_weights(make_checkpoint(family, tie_word_embeddings=tied, num_key_value_heads=2))
    found = growth_plan.cost(base.config, 128)
    assert found.flops_per_token == costs_of(config_of(base.raw)).operations(128).total
    assert found.training_bytes == 8 * base.num_parameters + stated_bytes("adamw", base.shapes)
    assert found.file_bytes == 2 * base.num_parameters


def test_the_cost_of_rows_beyond_a_window_is_that_of_the_lab():
    raw = {**PHI3, "sliding_window": 2047, "num_hidden_layers": 4, "pad_token_id": None}
    found = growth_plan.cost(growth_plan.numbers_of(raw), 16_384).flops_per_token
    assert found == pytest.approx(costs_of(config_of(raw)).operations(16_384).total)
    assert found < growth_plan.cost(growth_plan.numbers_of({**raw, "sliding_window": None}), 16_384).flops_per_token / 1.4


def test_a_config_alone_can_be_grown_but_not_read():
    sketch = growth_plan.sketch(json.dumps({**PHI3, "dtype": "bfloat16"}).encode())
    grown = growth_plan.carried_out(sketch, growth_plan.planned(sketch.raw, 6_900_000_000)).weights
    assert grown.num_parameters == 6_875_304_960
    assert grown.num_bytes == 2 * grown.num_parameters
    with pytest.raises(Rejected, match=r"config\.json alone"):
        grown.read("lm_head.weight")
