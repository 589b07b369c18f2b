"""Gates are removed exactly: as hooks on the whole model, one document at a time, would remove them."""

import pytest
import torch

from sn29.evaluation.engine import all_nats
from sn29.lab.ablation import Pieces, Subject, down_of, needed_bytes
from sn29.models import checkpoint
from sn29.models.config import parse_config

FAMILIES = ("LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM")
DOCUMENTS = [[(7 * n + k * k) % 300 for n in range(length)] for k, length in enumerate((23, 40, 9, 31))]


def loaded(make_checkpoint, family, **config):
    return checkpoint.load(make_checkpoint(family, num_hidden_layers=3, **config), dtype=torch.float32)


def removal(*gates, width=64):
    found = {}
    for layer, number in gates:
        found.setdefault(layer, torch.zeros(width, dtype=torch.bool))[number] = True
    return found


def by_hooks(model, removed, instead=None):
    """Nats of DOCUMENTS with the whole model run for each, and the gates replaced as they enter the last matrix."""
    handles = []
    for layer, mask in removed.items():
        value = torch.zeros(mask.shape) if instead is None else instead[layer]

        def replace(_, given, mask=mask, value=value):
            return (torch.where(mask, value, given[0]),)

        handles.append(down_of(model.base_model.layers[layer]).register_forward_pre_hook(replace))
    found = all_nats(model, DOCUMENTS, 1)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_removal_is_what_hooks_on_the_whole_model_give(make_checkpoint, family):
    model = loaded(make_checkpoint, family)
    subject = Subject(model, DOCUMENTS, 1, Pieces(64, 128), threads=2)
    everything = torch.ones(64, dtype=torch.bool)
    removals = [
        {}, removal((1, 5)), removal((0, 3), (0, 60)), {1: everything}, removal((2, 9), (0, 1)), removal((1, 7), (2, 7)),
        {2: everything}, {0: everything, 1: everything, 2: everything},
    ]  # fmt: skip
    found = subject.nats(removals)
    for nats, removed in zip(found.tolist(), removals, strict=True):
        assert nats == pytest.approx(by_hooks(model, removed), rel=1e-6)
    assert (found[3] != found[0]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_can_be_replaced_by_its_mean_over_the_tokens(make_checkpoint, family):
    model = loaded(make_checkpoint, family)
    subject = Subject(model, DOCUMENTS, 1, Pieces(64, 1024))
    seen = []
    handle = down_of(model.base_model.layers[1]).register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    all_nats(model, DOCUMENTS, 1)
    handle.remove()
    subject.measure()
    assert torch.allclose(subject.means[1], torch.cat(seen).mean(0), atol=1e-7)
    removals = [removal((1, 4), (1, 33)), {1: torch.ones(64, dtype=torch.bool)}]
    found = subject.nats(removals, mean=True)
    for nats, removed in zip(found.tolist(), removals, strict=True):
        assert nats == pytest.approx(by_hooks(model, removed, subject.means), rel=1e-6)


def test_no_bit_depends_on_threads(make_checkpoint):
    model = loaded(make_checkpoint, "LlamaForCausalLM")
    removals = [removal((layer, gate)) for layer in range(3) for gate in (1, 20, 63)]
    one, three = (Subject(model, DOCUMENTS, 1, Pieces(40, 1024), threads=threads).nats(removals) for threads in (1, 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_are_sums_over_tokens_of_gates_and_gradients(make_checkpoint, family):
    model = loaded(make_checkpoint, family)
    found = Subject(model, DOCUMENTS, 1, Pieces(64, 1024)).measure()
    down = down_of(model.base_model.layers[1])
    kept = []

    def keep(_, given):
        given[0].requires_grad_().retain_grad()
        kept.append(given[0])

    handle = down.register_forward_pre_hook(keep)
    for ids in DOCUMENTS:
        logits = model(input_ids=torch.tensor([[1, *ids[:-1]]]), use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").backward()
    handle.remove()
    gates, gradients = (torch.cat([each[0] for each in some]) for some in (kept, [each.grad for each in kept]))
    product = gates.detach() * gradients
    for name, expected in (
        ("highest", gates.abs().amax(0)), ("squares", gates.square().sum(0)), ("total", gates.sum(0)),
        ("first_order", product.sum(0)), ("fisher", product.square().sum(0)),
    ):  # fmt: skip
        assert torch.allclose(getattr(found, name)[1], expected.detach(), rtol=1e-4, atol=1e-6), name


def test_a_massive_activation_is_found_with_its_tokens(make_checkpoint):
    model = loaded(make_checkpoint, "LlamaForCausalLM")
    assert Subject(model, DOCUMENTS, 1).spikes() == []
    with torch.no_grad():
        model.base_model.embed_tokens.weight[1, 6] = -5000.0  # the start token, in dimension 6
    found = Subject(model, DOCUMENTS, 1, Pieces(40, 1024)).spikes()
    assert {(spike.layer, spike.dimension) for spike in found} == {(0, 6), (1, 6), (2, 6)}
    starts = {(number, 0) for number in range(4)}
    assert all(starts <= set(spike.places) and spike.value < -4900 and spike.ratio > 1000 for spike in found)


def test_memory_counts_weights_tokens_and_what_the_backward_pass_keeps(make_checkpoint):
    config = parse_config((make_checkpoint("LlamaForCausalLM", num_hidden_layers=3) / "config.json").read_bytes())

    def needed(dtype=torch.float32, lengths=(100, 100, 40), backward=True):
        return needed_bytes(config, dtype, "cpu", lengths, backward=backward)

    plain = needed()
    assert plain - needed(lengths=(100, 100)) == 40 * 32 * (2 * 4 + 12), "hidden states"
    assert plain - needed(backward=False) > 128 * 3 * 5 * 64 * 4, "five copies of the gates of a row in each layer"
    assert plain - needed(torch.bfloat16) > 2 * 2 * 3 * 64 * 32, "the MLPs alone, twice as large"
