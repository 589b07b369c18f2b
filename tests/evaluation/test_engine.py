from __future__ import annotations

import math

import pytest
import torch

from sn29.evaluation.engine import all_nats, sample_nats
from sn29.models.checkpoint import load


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"])
def test_the_loss_is_the_sum_of_minus_log_p_of_every_token(family, make_checkpoint):
    model = load(make_checkpoint(family), dtype=torch.float64)
    ids = [5, 6, 7, 250]
    expected = 0.0
    with torch.inference_mode():
        for position, token in enumerate(ids):  # one call a token: no shared arithmetic with the engine
            logits = model(torch.tensor([[1, *ids[:position]]])).logits[0, -1]
            expected -= math.log(torch.softmax(logits, -1)[token].item())
    assert sample_nats(model, ids, start_token=1) == pytest.approx(expected, rel=1e-6)


def test_the_first_token_is_paid_for(make_checkpoint):
    model = load(make_checkpoint(), dtype=torch.float32)
    assert sample_nats(model, [5], start_token=1) > 1.0  # about log(300) for random weights
    assert sample_nats(model, [], start_token=1) == 0.0
    assert sample_nats(model, [5, 6], start_token=1) != sample_nats(model, [5, 6], start_token=2)


def test_what_is_not_finite_becomes_infinite_and_never_nan(make_checkpoint):
    model = load(make_checkpoint(), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    assert all_nats(model, [[5], [7]], start_token=1) == [math.inf, math.inf]
