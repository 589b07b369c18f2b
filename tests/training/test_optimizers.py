"""Optimizers by name: what they keep is what is stated, they learn, and they go on as if nothing had been."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sn29.errors import Reason, Rejected
from sn29.training.optimizers import KINDS, Optimizer, is_installed, kind_of, measure, stated_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def installed(name):
    """The name, as a case that is passed over where its package is missing, or takes long: torchao compiles its first step."""
    kind = KINDS[name]
    marks = [] if is_installed(kind) else [pytest.mark.skip(reason=f"{kind.package} is not installed (sn29[optim])")]
    return pytest.param(name, marks=marks, id=name)


NAMES = [installed(name) for name in KINDS]


class Toy(nn.Module):
    """A regression with a matrix of each sort: as embedding, inside, and vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Linear(32, 64, bias=False)
        self.inner = nn.Linear(64, 64)
        self.out = nn.Linear(64, 16, bias=False)
        self.wanted = torch.randn(32, 16)

    def loss(self, step):
        numbers = torch.Generator().manual_seed(step)
        given = torch.randn(64, 32, generator=numbers)
        found = self.out(torch.tanh(self.inner(torch.tanh(self.embed_tokens(given)))))
        return ((found - torch.sin(given @ self.wanted / 4)) ** 2).mean()


def optimizer_of(name, toy):
    rate = {"adafactor": 0.03, "sgd": 0.2}.get(name, 0.02 * KINDS[name].usual_rate)
    return Optimizer(name, toy.named_parameters(), rate, 0.0), rate


def take(toy, optimizer, steps, rate):
    found = []
    for step in steps:
        optimizer.set_rate(rate * (1 - step / 200))
        optimizer.zero_grad()
        loss = toy.loss(step)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name):
    toy = Toy()
    optimizer, rate = optimizer_of(name, toy)
    found = take(toy, optimizer, range(200), rate)
    assert sum(found[-5:]) < 0.5 * sum(found[:5])


@pytest.mark.parametrize("name", NAMES)
def test_what_it_keeps_is_what_is_stated(name):
    """On matrices of two forms, an embedding and a vector; and on the ones of the table."""
    shapes = {"layers.0.up.weight": (192, 128), "layers.0.out.weight": (96, 96), "embed_tokens.weight": (500, 96), "norm": (96,)}
    named = {path: nn.Parameter(torch.randn(shape)) for path, shape in shapes.items()}
    optimizer = Optimizer(name, named.items(), 1e-3, 0.0)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state_bytes() == pytest.approx(stated_bytes(name, shapes), rel=0.05)
    (row,) = measure([name], parameters=1 << 18, times=1)
    assert row.measured_bytes == pytest.approx(row.stated_bytes, rel=0.05)
    assert row.step_ns > 0


def test_the_stated_bytes_are_the_known_ones():
    """Per parameter of a 512 x 512 matrix inside the layers."""
    found = {name: stated_bytes(name, {"layers.0.weight": (512, 512)}) / 512**2 for name in KINDS}
    assert (found["adamw"], found["lion"], found["muon"], found["sgd"], found["soap"]) == (8, 4, 4, 4, 24)
    assert found["adafactor"] == pytest.approx(0.0156, abs=1e-4)
    assert found["adamw8bit"] == pytest.approx(2.039, abs=1e-3)
    assert found["lion8bit"] == pytest.approx(1.02, abs=1e-3)


def test_muon_takes_the_matrices_inside_the_layers_only():
    toy = Toy()
    optimizer, _ = optimizer_of("muon", toy)
    muon, adamw = optimizer.parts
    assert sorted(map(id, muon.param_groups[0]["params"])) == sorted(map(id, (toy.inner.weight, toy.out.weight)))
    groups = {
        group["weight_decay"]: group["params"]
        for group in Optimizer("muon", toy.named_parameters(), 1, 0.5).parts[1].param_groups
    }
    assert [p is toy.embed_tokens.weight for p in groups[0.5]] == [True], "the embedding decays"
    assert [p is toy.inner.bias for p in groups[0.0]] == [True], "a vector does not"
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)


def test_a_name_that_is_none_and_a_package_that_is_missing_are_said():
    with pytest.raises(Rejected, match=r"got adam, rule adamw, .*sgd") as refused:
        kind_of("adam")
    assert refused.value.reason is Reason.SETTING
    for name, kind in KINDS.items():
        if not is_installed(kind):
            with pytest.raises(Rejected, match=rf"{name} without {kind.package}, rule .*pip install 'sn29\[optim\]'"):
                kind_of(name)
