"""Recycled gates change nothing at the start, and learn."""

from dataclasses import replace

import pytest
import torch
from test_gates import FAMILIES, documents, lessons, trained

from sn29.errors import Reason, Rejected
from sn29.lab.ablation import ON_CPU, Subject, down_of
from sn29.lab.gates import Plan, scan
from sn29.lab.recycling import proved, recycled
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
    dead = scan(search, measured, Plan(tolerance=0)).dead
    found = {(layer, int(gate)) for layer, mask in dead.gates.items() for gate in mask.nonzero()}
    assert len(planted & found) >= 0.95 * len(planted)
    assert dead.does_nothing

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


DEAD = {1: torch.arange(64) % 3 == 0}


def changed(weights, name, change):
    """The weights with change(tensor) in the place of one."""
    tensor = change(weights.read(name))
    return replace(weights, read=lambda asked: tensor.clone() if asked == name else weights.read(asked))


def added(tensor, at, value):
    tensor[at] += value
    return tensor


def proof_of(source, weights, folder):
    save(weights, folder, CARD)
    return proved(source, folder, DEAD, documents(1), ON_CPU, device="cpu", threads=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_proved_in_the_type_that_it_has(make_checkpoint, family, dtype, tmp_path):
    model = checkpoint.load(make_checkpoint(family), dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source")
    proof = proof_of(tmp_path / "source", recycled(open_weights(tmp_path / "source"), DEAD, 7), tmp_path / "new")
    assert proof.difference <= 1e-6
    assert proof.change.largest > 1e-5, "the gates were not idle"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_not_what_it_is_said_to_be_fails_the_proof(make_checkpoint, dtype, tmp_path):
    checkpoint.load(make_checkpoint("LlamaForCausalLM"), dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    source = open_weights(tmp_path / "source")
    right, mlp = recycled(source, DEAD, 7), "model.layers.1.mlp."
    for number, (wrong, said) in enumerate(
        (
            (source, "has the inputs that it had"),
            (changed(right, mlp + "down_proj.weight", lambda t: added(t, (5, 3), 1e-4)), "what is to be 0 is not"),
            (changed(right, mlp + "up_proj.weight", lambda t: added(t, (1, 0), 0.01)), "is not the source's"),
            (changed(right, "model.norm.weight", lambda t: added(t, 4, 0.01)), "model.norm.weight: a value"),
            (
                changed(right, mlp + "gate_proj.weight", lambda _: source.read(mlp + "gate_proj.weight")),
                "gate_proj.weight: a dead",
            ),
        )
    ):
        with pytest.raises(Rejected, match=said) as refusal:
            proof_of(tmp_path / "source", wrong, tmp_path / f"new{number}")
        assert refusal.value.reason is Reason.CLAIM


def test_fresh_inputs_that_overflow_fail_the_proof(make_checkpoint, tmp_path):
    """0 times infinity is no number."""
    source = make_checkpoint("LlamaForCausalLM")
    right = recycled(open_weights(source), DEAD, 7)
    rows = DEAD[1][:, None].expand(64, 32)
    for name in ("gate_proj", "up_proj"):
        right = changed(right, f"model.layers.1.mlp.{name}.weight", lambda tensor: torch.where(rows, 3e38, tensor))
    with pytest.raises(Rejected) as refusal:
        proof_of(source, right, tmp_path / "new")
    assert refusal.value.reason is Reason.NOT_FINITE
