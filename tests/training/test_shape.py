"""Shapes: from numbers and from config.json, and what a step of training computes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from runs import SHAPE

from sn29.errors import Reason, Rejected
from sn29.models import checkpoint
from sn29.training.packing import Row
from sn29.training.shape import FAMILIES, build_model, shape_of, training_flops


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_saved_model_gives_back_its_shape(tmp_path, family):
    """Also what only config.json says: groups of heads, the base of the rotary positions."""
    tied = family == "LlamaForCausalLM"
    shape = replace(SHAPE, family=family, tied=tied, num_heads=4, num_kv_heads=2)
    build_model(shape, seed=1).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["rope_parameters"]["rope_theta"] = 5000.0
    (tmp_path / "config.json").write_text(json.dumps(said))

    found = shape_of(tmp_path)
    assert (found.family, found.tied, found.num_kv_heads, found.start_token) == (family, tied, 2, 399)
    again = build_model(found, seed=1)
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    loaded = checkpoint.load(tmp_path, dtype=torch.float32)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert shape_of(tmp_path / "config.json", start_token=7).start_token == 7


def test_a_config_that_is_none_is_refused(tmp_path):
    for text, reason in ((None, Reason.MISSING_FILE), ("{", Reason.BAD_CONFIG), ('{"architectures": ["X"]}', Reason.FAMILY)):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(Rejected) as refused:
            shape_of(tmp_path)
        assert refused.value.reason is reason
    with pytest.raises(Rejected) as refused:
        build_model(replace(SHAPE, family="GPT2LMHeadModel"), seed=0)
    assert refused.value.reason is Reason.FAMILY


def test_the_work_of_a_step_is_counted_by_hand():
    """One layer of width 8 with 2 heads and an MLP of 16, vocabulary 10; rows of 3 and 2 tokens, 4 of them scored."""
    shape = replace(SHAPE, vocab_size=10, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, start_token=1)
    model = build_model(shape, seed=0)
    matrices = 4 * 8 * 8 + 3 * 8 * 16
    row = Row(ids=(1, 2, 3, 1, 4), targets=(2, 3, -1, 4, 5), starts=(0, 3, 5))
    pairs = 3 * 4 / 2 + 2 * 3 / 2
    assert training_flops(model, [row]) == 6 * matrices * 5 + 6 * 10 * 8 * 4 + 12 * 1 * 8 * pairs
    assert training_flops(model, [row, row]) == 2 * training_flops(model, [row])
