"""The probes pass every honest family and name what they find in a model that reads ahead, or changes its mind."""

from __future__ import annotations

import hashlib

import pytest
import torch
import transformers

from sn29.errors import Reason, Rejected
from sn29.evaluation.probes import changed_file, probe
from sn29.models.checkpoint import git_blob, load

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def built(family: str = "Llama", **config):
    torch.manual_seed(0)
    config_class, model_class = getattr(transformers, family + "Config"), getattr(transformers, family + "ForCausalLM")
    return model_class(config_class(**{**SHAPE, **config})).eval()


@pytest.mark.parametrize("family", ["Llama", "Phi", "Phi3"])
def test_an_honest_model_passes_to_the_bit(make_checkpoint, family):
    model = load(make_checkpoint(family + "ForCausalLM"), dtype=torch.float32)
    found = probe(model, "seed")
    assert (found.influence, found.tolerance) == (0, 0)
    assert len(found.places) == 3
    assert all(0 < t < 48 for t in found.places)
    assert found == probe(model, "seed")
    assert found.places != probe(model, "another seed").places


@pytest.mark.parametrize("family", ["Llama", "Phi", "Phi3"])
def test_so_does_one_in_bfloat16_and_one_of_two_rows(make_checkpoint, family):
    model = load(make_checkpoint(family + "ForCausalLM"), dtype=torch.bfloat16)
    assert probe(model, "seed").influence <= probe(model, "seed").tolerance == 1e-4
    tiny = built(family, vocab_size=2, bos_token_id=0, eos_token_id=0)
    assert probe(tiny, "seed").influence == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_ahead_is_found(dtype):
    """One key of config.json does it in transformers 5; ours never hands that key on, and this is what would show it."""
    model = built(is_causal=False).to(dtype)
    with pytest.raises(Rejected) as refused:
        probe(model, "seed")
    assert refused.value.reason is Reason.NOT_CAUSAL
    assert "moved by" in refused.value.got


def test_a_last_layer_that_reads_ahead_a_little_is_found_too():
    model = built()
    model.model.layers[-1].mlp.register_forward_hook(lambda _, given, hidden: hidden + 1e-4 * given[0].mean(1, keepdim=True))
    with pytest.raises(Rejected) as refused:
        probe(model, "seed")
    assert refused.value.reason is Reason.NOT_CAUSAL


def test_a_model_that_draws_is_found():
    model = built(attention_dropout=0.5).train()
    with pytest.raises(Rejected) as refused:
        probe(model, "seed")
    assert (refused.value.reason, refused.value.limit) == (Reason.NOT_DETERMINISTIC, "the same bits each time")


def test_a_model_whose_logits_are_no_numbers_is_compared_all_the_same():
    model = built()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    assert probe(model, "seed").influence == 0


def test_files_are_known_by_their_object_ids(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    oids = {"config.json": git_blob(b"{}"), "model.safetensors": "sha256:" + hashlib.sha256(b"weights").hexdigest()}
    assert changed_file(tmp_path, oids, sorted(oids)) is None
    for name, content in (("config.json", b"[]"), ("model.safetensors", b"weightz")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        assert changed_file(tmp_path, oids, sorted(oids)) == name
        (tmp_path / name).write_bytes(before)
    (tmp_path / "config.json").rename(tmp_path / "other")
    assert changed_file(tmp_path, oids, sorted(oids)) == "config.json"
    (tmp_path / "config.json").symlink_to("other")
    assert changed_file(tmp_path, oids, sorted(oids)) == "config.json"
