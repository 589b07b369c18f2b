"""Sets of gates that carry a model are found where no single ablation shows them; and gates that do nothing."""

import pytest
import torch

from sn29.errors import Reason, Rejected
from sn29.lab.ablation import Subject, down_of
from sn29.lab.gates import Plan, candidates, importance, moved, parameters_of_gate, scan, screens
from sn29.models import checkpoint

FAMILIES = ("LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM")
WORDS = tuple(range(40, 50))
"""The only tokens of the documents: a model that always says these has a low loss."""


def documents(seed, count=6, length=24, words=WORDS):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(words)[torch.randint(len(words), (count, length), generator=generator)].tolist()


def planted(make_checkpoint, *feeds):
    """A Phi that knows WORDS by one direction of its hidden states alone, to which each (layer, gate) adds as much.

    The last norm makes of the direction what it makes of half of it: one feeder less is hardly seen, none at all is.
    """
    model = checkpoint.load(make_checkpoint("PhiForCausalLM"), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[list(WORDS), 3] = 0.8
        for layer, gate in feeds:
            mlp = model.model.layers[layer].mlp
            mlp.fc1.weight[gate] = 0
            mlp.fc1.bias[gate] = 5.0  # gelu gives 5 whatever comes in
            mlp.fc2.weight[:, gate] = 0
            mlp.fc2.weight[3, gate] = 4.0
    return model


def found(model, **plan):
    return scan(Subject(model, documents(0), 1), Subject(model, documents(1), 1, threads=2), Plan(**plan))


def test_a_pair_that_no_single_ablation_shows_is_found(make_checkpoint):
    told = found(planted(make_checkpoint, (1, 12), (1, 45)))
    (pair,) = told.sets
    assert set(pair.gates) == {(1, 12), (1, 45)}
    assert pair.zero.percent > 30
    assert pair.zero.interval.low > 25
    assert max(pair.alone) < 5
    assert abs(pair.complement.percent) < 5, "all others of the layer"
    assert abs(pair.mean.percent) < 0.1, "a constant is its mean"
    assert told.crossed == ()
    assert told.curves[1].percent[-1] > 30 > abs(told.curves[1].percent[0])


def test_three_that_stand_in_for_each_other_are_found_though_no_pair_shows_them(make_checkpoint):
    told = found(planted(make_checkpoint, (1, 2), (1, 30), (1, 63)))
    (three,) = told.sets
    assert set(three.gates) == {(1, 2), (1, 30), (1, 63)}


def test_two_of_different_layers_are_found_together(make_checkpoint):
    told = found(planted(make_checkpoint, (0, 9), (1, 21)), top=4)
    assert told.sets == ()
    (pair,) = told.crossed
    assert set(pair.gates) == {(0, 9), (1, 21)}
    assert pair.zero.percent > 30
    assert pair.complement is None


def test_a_model_without_such_gates_has_no_set(make_checkpoint):
    told = found(checkpoint.load(make_checkpoint("PhiForCausalLM"), dtype=torch.float32))
    assert told.sets == told.crossed == ()
    assert len(told.singles) == 8
    assert told.singles[0].zero.percent < 15


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_measures_together_name_the_gates_that_matter_most(make_checkpoint, family):
    """All 128 gates ablated one by one: the measures name less than a quarter of them, and the best are among these."""
    model = trained(checkpoint.load(make_checkpoint(family), dtype=torch.float32))
    subject = Subject(model, lessons(), 1, threads=2)
    measures = subject.measure()
    named = {(layer, gate) for layer, of in enumerate(candidates(screens(subject, measures), 12, 1)) for gate in of}
    gates = [(layer, gate) for layer in range(2) for gate in range(64)]
    nats = subject.nats([{}, *({layer: torch.arange(64) == gate} for layer, gate in gates)]).sum(1)
    costs = nats[1:] - nats[0]
    best = {gates[n] for n in costs.topk(10).indices.tolist()}
    assert len(named) < 32
    assert len(best & named) >= 6, "7 to 10 of 10 when this was written, of which one measure alone names 3 to 6"
    assert len({gates[n] for n in costs.topk(6).indices.tolist()} & named) >= 5, "6 of 6"
    ranks = [each.argsort().argsort().float() for each in (importance(subject, measures).flatten(), costs.abs())]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.5


def lessons():
    """Texts in which each word follows from the one before."""
    return [[WORDS[(a * n) % 10] for n in range(25)] for a in range(1, 9)]


def trained(model, steps=60):
    """A model that has learned something of `lessons`."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(lessons())
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=text, labels=text, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_without_output_are_dead_and_what_they_cost_is_said(make_checkpoint, family):
    model = checkpoint.load(make_checkpoint(family), dtype=torch.float32)
    idle = {(layer, gate) for layer in range(2) for gate in range(0, 64, 4)}
    with torch.no_grad():
        for layer, gate in idle:
            down_of(model.base_model.layers[layer]).weight[:, gate] = 0
    told = found(model, tolerance=0)
    dead = {(layer, int(gate)) for layer, mask in told.dead.gates.items() for gate in mask.nonzero()}
    assert dead == idle
    assert told.dead.does_nothing
    assert told.dead.change.interval.low == told.dead.change.interval.high == told.dead.moved == 0
    each = {"LlamaForCausalLM": 3 * 32, "PhiForCausalLM": 2 * 32 + 1, "Phi3ForCausalLM": 3 * 32}[family]
    assert parameters_of_gate(Subject(model, documents(0), 1)) == each
    assert told.dead.parameters == len(dead) * each
    assert told.dead.share == pytest.approx(told.dead.parameters / sum(p.numel() for p in model.parameters()))
    percent = {"PhiForCausalLM": 0.1}.get(family, 0.01)
    more = found(model, tolerance=percent / 100).dead
    assert len(idle) < more.count < 128
    assert more.does_nothing == (max(-more.change.interval.low, more.change.interval.high, more.moved) <= percent)
    at = [share for share, _, _ in more.curve].index(more.count / 128)
    assert all(drift <= percent / 2 for _, _, drift in more.curve[: at + 1]), "half of what is asked for, on these documents"
    assert more.curve[at + 1][2] > percent / 2


def test_gates_that_make_up_for_each_other_are_not_dead(make_checkpoint):
    """The even ones of a layer undo what the odd ones do: each alone costs 9 % or more, some counts of them next to nothing."""
    model = checkpoint.load(make_checkpoint("PhiForCausalLM"), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[list(WORDS), 3] = 0.8
        first, last = (layer.mlp for layer in model.model.layers)
        first.fc2.weight.zero_()
        last.fc1.weight.zero_()
        last.fc1.bias.copy_(1 + torch.arange(64) / 64)
        last.fc2.weight.zero_()
        last.fc2.weight[3] = torch.tensor([-0.0198, 0.02]).repeat(32)
    told = found(model, tolerance=0.015).dead
    assert told.count == 64, "those of the first layer"
    assert any(0.5 < share < 1 and abs(percent) < 1.5 for share, percent, _ in told.curve), "the trap is there"
    assert told.does_nothing


def test_changes_that_cancel_between_documents_are_no_nothing():
    assert moved(torch.tensor([10.0, 10.0]), torch.tensor([11.0, 9.0])) == pytest.approx(0.1)


def test_gates_that_rest_in_the_search_alone_are_not_said_to_do_nothing(make_checkpoint):
    """A gate that only tokens from 60 on wake up."""
    model = checkpoint.load(make_checkpoint("PhiForCausalLM"), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = 0
        model.model.embed_tokens.weight[60:70, 7] = 1.0
        mlp = model.model.layers[0].mlp
        mlp.fc1.weight[30] = 0
        mlp.fc1.weight[30, 7] = 50.0
        mlp.fc1.bias[30] = -60.0
        mlp.fc2.weight[:, 30] = 2 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    others = documents(1, words=range(60, 70))
    told = scan(Subject(model, documents(0), 1), Subject(model, others, 1), Plan(tolerance=0)).dead
    assert told.count == 1
    assert told.gates[0].nonzero().tolist() == [[30]]
    assert told.change.largest > 0.01
    assert not told.does_nothing


def test_only_gates_that_put_out_nothing_have_place_zero(make_checkpoint):
    model = checkpoint.load(make_checkpoint("PhiForCausalLM"), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.fc2.weight[:, 5] *= 1e-4
    subject = Subject(model, documents(0), 1)
    assert float(importance(subject, subject.measure()).min()) > 0
    with torch.no_grad():
        model.model.layers[0].mlp.fc2.weight[:, 6] = 0
    assert (importance(subject, subject.measure()) == 0).nonzero().tolist() == [[0, 6]]


def two_pairs(make_checkpoint):
    """One for WORDS, one for tokens from 60 on, in the same layer; each pair has the other's words against it."""
    model = planted(make_checkpoint, (1, 12), (1, 45))
    with torch.no_grad():
        model.lm_head.weight[list(range(60, 70)), 5] = 0.8
        mlp = model.model.layers[1].mlp
        for gate in (20, 33):
            mlp.fc1.weight[gate] = 0
            mlp.fc1.bias[gate] = 5.0
            mlp.fc2.weight[:, gate] = 0
            mlp.fc2.weight[5, gate] = 4.0
    return model


def test_the_measured_documents_choose_no_set(make_checkpoint):
    model = two_pairs(make_checkpoint)
    both = (*WORDS, *range(60, 70))
    search = Subject(model, documents(0, words=both), 1)
    same, others, first = (
        scan(search, Subject(model, documents(3, words=words), 1), Plan()) for words in (both, range(100, 300), WORDS)
    )
    assert {frozenset(each.gates) for each in same.sets} == {frozenset({(1, 12), (1, 45)}), frozenset({(1, 20), (1, 33)})}
    assert {each.gates for each in others.sets} == {each.gates for each in same.sets}
    assert max(each.zero.percent for each in others.sets) < 15 < min(each.searched for each in others.sets)
    (pair,) = first.sets
    assert set(pair.gates) == {(1, 12), (1, 45)}
    assert first.lost == 1, "without the other pair the loss of these words falls: it is no set that dominates"


def test_a_set_that_hardly_costs_enough_is_filled_with_gates_of_no_other(make_checkpoint):
    """Six gates feed what both pairs feed, each too little to join a set by itself."""
    model = two_pairs(make_checkpoint)
    helpers = {(1, gate) for gate in range(50, 56)}
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        for _, gate in helpers:
            mlp.fc1.weight[gate] = 0
            mlp.fc1.bias[gate] = 5.0
            mlp.fc2.weight[:, gate] = 0
            mlp.fc2.weight[[3, 5], gate] = 0.1
    both = (*WORDS, *range(60, 70))
    search, measured = (Subject(model, documents(seed, words=both), 1) for seed in (0, 1))
    pairs = scan(search, measured, Plan()).sets
    assert sorted(len(each.gates) for each in pairs) == [2, 2]
    threshold = 0.9 * min(each.searched for each in pairs) / 100
    told = scan(search, measured, Plan(threshold=threshold)).sets
    assert helpers <= max((set(each.gates) for each in told), key=len)
    gates = [gate for each in told for gate in each.gates]
    assert len(gates) == len(set(gates))
    assert sum(each.searched for each in told) > sum(each.searched for each in pairs) + 1


def test_losses_that_are_no_numbers_are_refused(make_checkpoint):
    """Finite weights, whose products are not."""
    model = checkpoint.load(make_checkpoint("LlamaForCausalLM"), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[7] = 3e38
        model.model.layers[1].mlp.up_proj.weight[7] = 3e38
    with pytest.raises(Rejected, match="a loss of nan for document 1") as refusal:
        found(model)
    assert refusal.value.reason is Reason.NOT_FINITE
