"""Recycled gates change nothing at the start, and learn."""

import pytest
import torch
from test_gates import FAMILIES, documents, lessons, trained

from sn29.lab.ablation import Subject, down_of
from sn29.lab.gates import Plan, scan
from sn29.lab.recycling import recycled
from sn29.lab.weights import Card, open_weights, save
from sn29.models import checkpoint

FIRST = {"LlamaForCausalLM": ("gate_proj", "up_proj"), "PhiForCausalLM": ("fc1",), "Phi3ForCausalLM": ("gate_up_proj",)}
CARD = Card("a test", (), (), "none", ())


def widened(make_checkpoint, family, folder):
    """A trained model with 64 gates a layer, a quarter more of which nothing comes out. Returns the planted (layer, gate)."""
    small = trained(checkpoint.load(make_checkpoint(family), dtype=torch.float32))
    torch.manual_seed(5)
    config = type(small.config)(**{**small.config.to_dict(), "intermediate_size": 80})
    large = type(small)(config)
    places = torch.randperm(80)[:64].sort().values
    state = large.state_dict()
    for name, tensor in small.state_dict().items():
        if ".mlp." not in name or name.endswith(("down_proj.bias", "fc2.bias")):
            state[name].copy_(tensor)
        elif name.endswith(("down_proj.weight", "fc2.weight")):
            state[name].zero_()[:, places] = tensor
        else:
            rows = torch.cat([places, places + 80]) if "gate_up_proj" in name else places
            state[name][rows] = tensor
    large.load_state_dict(state)
    large.config.architectures = [family]
    large.save_pretrained(folder)
    idle = set(range(80)) - set(places.tolist())
    return {(layer, gate) for layer in range(2) for gate in idle}


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_dead_gates_are_found_recycled_without_a_change_and_learn(make_checkpoint, family, tmp_path):
    planted = widened(make_checkpoint, family, tmp_path / "wide")
    model = checkpoint.load(tmp_path / "wide", dtype=torch.float32)
    search, measured = (Subject(model, documents(seed), 1) for seed in (0, 1))
    dead = scan(search, measured, Plan(tolerance=1e-4)).dead
    found = {(layer, int(gate)) for layer, mask in dead.gates.items() for gate in mask.nonzero()}
    assert len(planted & found) >= 0.95 * len(planted)
    assert abs(dead.change.relative) <= 1e-4

    weights = open_weights(tmp_path / "wide")
    save(recycled(weights, dead.gates, seed=7), tmp_path / "new", CARD)
    new = checkpoint.load(tmp_path / "new", dtype=torch.float32)
    after = Subject(new, documents(1), 1).nats([{}])
    assert torch.allclose(after, measured.nats([dead.gates]), rtol=1e-5)

    layer, gate = sorted(planted & found)[0]
    mlp = new.base_model.layers[layer].mlp
    was = model.base_model.layers[layer].mlp
    for name in FIRST[family]:
        rows, old = getattr(mlp, name).weight.detach().clone(), getattr(was, name).weight
        assert not torch.equal(rows[gate], old[gate]), name
        living = torch.tensor([g for g in range(80) if (layer, g) not in found])
        assert torch.equal(rows[living], old[living]), name
        assert float(rows[gate].std()) == pytest.approx(float(old[living].std()), rel=0.6)
    assert not down_of(new.base_model.layers[layer]).weight[:, gate].any()

    before = [getattr(mlp, name).weight[gate].detach().clone() for name in FIRST[family]]
    trained(new, steps=4)
    columns = [down_of(new.base_model.layers[layer]).weight[:, gate] for layer, gate in planted & found]
    assert all(column.abs().max() > 1e-4 for column in columns)
    assert all(not torch.equal(getattr(mlp, name).weight[gate], old) for name, old in zip(FIRST[family], before, strict=True))


def test_fresh_inputs_depend_on_the_seed_and_not_on_the_order_of_reading(make_checkpoint):
    weights = open_weights(make_checkpoint("LlamaForCausalLM"))
    dead = {1: torch.arange(64) % 2 == 0}
    names = [f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    one, again, other = (recycled(weights, dead, seed) for seed in (1, 1, 2))
    forward = [one.read(name) for name in names]
    backward = [again.read(name) for name in reversed(names)][::-1]
    assert all(map(torch.equal, forward, backward))
    assert not torch.equal(forward[0], other.read(names[0]))
    assert not torch.equal(forward[0][::2], forward[1][::2])
    untouched = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(one.read(untouched), weights.read(untouched))


def test_recycled_gates_help_where_dead_ones_do_not(make_checkpoint, tmp_path):
    """All gates of a model dead: with zero inputs it cannot learn what its MLPs have to do, recycled it does."""
    model = checkpoint.load(make_checkpoint("LlamaForCausalLM", hidden_size=8, num_attention_heads=2), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.base_model.layers:
            for matrix in layer.mlp.parameters():
                matrix.zero_()
    model.save_pretrained(tmp_path / "dead")
    everything = {layer: torch.ones(64, dtype=torch.bool) for layer in range(2)}
    save(recycled(open_weights(tmp_path / "dead"), everything, seed=3), tmp_path / "new", CARD)
    losses = []
    for folder in ("dead", "new"):
        learned = trained(checkpoint.load(tmp_path / folder, dtype=torch.float32), steps=60)
        losses.append(float(Subject(learned, lessons(), 1).nats([{}]).sum()))
    assert losses[1] < losses[0]
