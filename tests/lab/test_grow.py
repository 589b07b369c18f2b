"""Operators that make a model larger: what they keep of the function, what they say, and that what is new learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.evaluation.engine import all_nats
from sn29.lab import grow
from sn29.lab.weights import TYPES, Card, Weights, open_weights, save, with_config
from sn29.models import checkpoint

LLAMA, PHI, PHI3 = "LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"
CARD = Card("Grown", [], [], "sn29 lab grow", [])
DOCUMENTS = [[(7 * n + 3 * m) % 300 for n in range(20 + 9 * m)] for m in range(4)]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def livelier(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weights]:
    """livelier(family, **config): a model whose norms, biases and matrices are not what transformers begins with, so that a
    wrong factor or a forgotten bias shows."""

    def make(family: str, **config: Any) -> Weights:
        first = open_weights(make_checkpoint(family, **config))

        def read(name: str) -> Tensor:
            tensor = first.read(name)
            numbers = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            return tensor * 4 + 0.3 * torch.randn(tensor.shape, generator=numbers)

        folder = tmp_path_factory.mktemp("lively") / "model"
        save(replace(first, read=read), folder, CARD)
        return open_weights(folder)

    return make


def loss(weights: Weights, folder: Path) -> list[float]:
    save(weights, folder, CARD)
    model = checkpoint.load(folder, dtype=torch.float32)
    assert model.num_parameters() == weights.num_parameters
    return all_nats(model, DOCUMENTS, weights.config.start_token)


def worst(before: list[float], after: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(after, before, strict=True))


GQA: dict[str, Any] = {"num_key_value_heads": 2}
LOSSLESS: dict[str, tuple[str, dict[str, Any], Callable[[Weights], grow.Grown]]] = {
    "depth-llama": (LLAMA, GQA, lambda w: grow.deepen(w, 5)),
    "depth-llama-biases": (LLAMA, {"attention_bias": True, "mlp_bias": True}, lambda w: grow.deepen(w, 4, "top", noise=0.5)),
    "depth-phi": (PHI, {}, lambda w: grow.deepen(w, 3, noise=0.1)),
    "depth-phi3-places": (PHI3, GQA, lambda w: grow.deepen(w, 4, after=(0, 0))),
    "mlp-llama": (LLAMA, {"mlp_bias": True}, lambda w: grow.widen_mlp(w, 100)),
    "mlp-phi": (PHI, {}, lambda w: grow.widen_mlp(w, 65)),
    "mlp-phi3": (PHI3, {}, lambda w: grow.widen_mlp(w, 96)),
    "split-llama": (LLAMA, {}, lambda w: grow.widen_mlp(w, 100, "split")),
    "split-phi-noise": (PHI, {}, lambda w: grow.widen_mlp(w, 128, "split", noise=0.3)),
    "split-phi3-noise": (PHI3, {}, lambda w: grow.widen_mlp(w, 80, "split", noise=0.3)),
    "hidden-llama": (LLAMA, GQA, lambda w: grow.widen_hidden(w, 44)),
    "hidden-llama-tied": (LLAMA, {"tie_word_embeddings": True}, lambda w: grow.widen_hidden(w, 40)),
    "hidden-heads-llama": (LLAMA, GQA, lambda w: grow.widen_hidden(w, 48, 6)),
    "hidden-phi": (PHI, {}, lambda w: grow.widen_hidden(w, 48)),
    "hidden-phi-tied-qk": (PHI, {"tie_word_embeddings": True, "qk_layernorm": True}, lambda w: grow.widen_hidden(w, 40)),
    "hidden-phi-gqa": (PHI, GQA, lambda w: grow.widen_hidden(w, 48)),
    "hidden-phi3": (PHI3, {}, lambda w: grow.widen_hidden(w, 40)),
    "hidden-phi3-gqa": (PHI3, GQA, lambda w: grow.widen_hidden(w, 64, 8, 2)),
    "heads-llama-groups": (LLAMA, GQA, lambda w: grow.widen_attention(w, 8)),
    "heads-llama-larger-groups": (LLAMA, GQA, lambda w: grow.widen_attention(w, 8, 2)),
    "heads-llama-mha": (LLAMA, {"attention_bias": True}, lambda w: grow.widen_attention(w, 8)),
    "kv-llama-to-mha": (LLAMA, GQA, lambda w: grow.widen_attention(w, 4, 4)),
    "kv-phi3-to-mha": (PHI3, GQA, lambda w: grow.widen_attention(w, 4, 4)),
    "kv-phi-one-group": (PHI, {"num_key_value_heads": 1}, lambda w: grow.widen_attention(w, 4, 2)),
    "vocab-phi": (PHI, {}, lambda w: grow.more_tokens(w, 390)),
    "untie-llama": (LLAMA, {"tie_word_embeddings": True}, grow.untie),
    "untie-phi": (PHI, {"tie_word_embeddings": True}, grow.untie),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSLESS)
def test_the_function_stays(livelier: Callable[..., Weights], tmp_path: Path, case: str):
    """Every document's loss within 1e-5, mostly 1e-7; the number of parameters is that of the class in transformers."""
    family, config, operator = LOSSLESS[case]
    base = livelier(family, **config)
    grown = operator(base)
    assert grown.limit == grow.LOSSLESS
    assert grown.said
    assert worst(loss(base, tmp_path / "base"), loss(grown.weights, tmp_path / "grown")) < 2e-6


def test_depth_with_zeroed_outputs_is_the_same_to_the_bit(livelier: Callable[..., Weights], tmp_path: Path):
    base = livelier(LLAMA)
    assert loss(base, tmp_path / "base") == loss(grow.deepen(base, 5).weights, tmp_path / "grown")


def test_a_forgotten_eps_would_show(livelier: Callable[..., Weights], tmp_path: Path):
    """The trap of the literature: norm weights rescaled, eps not. With a large eps the loss then moves far beyond the limit."""
    base = livelier(LLAMA, rms_norm_eps=0.05)
    grown = grow.widen_hidden(base, 44).weights
    assert grown.raw["rms_norm_eps"] == pytest.approx(0.05 * 32 / 44)
    before = loss(base, tmp_path / "base")
    assert worst(before, loss(grown, tmp_path / "grown")) < 2e-6
    config = replace(grown.config, values={**grown.config.values, "rms_norm_eps": 0.05})
    forgotten = replace(grown, config=config, raw={**grown.raw, "rms_norm_eps": 0.05})
    assert worst(before, loss(forgotten, tmp_path / "forgotten")) > 1e-4


@pytest.mark.parametrize("place", ["copies", "stacked"])
def test_plain_copies_are_another_function_and_say_so(livelier: Callable[..., Weights], tmp_path: Path, place: grow.Place):
    base = livelier(LLAMA)
    grown = grow.deepen(base, 4, place)
    assert grown.limit is None
    assert "another function" in grown.said[0]
    assert worst(loss(base, tmp_path / "base"), loss(grown.weights, tmp_path / "grown")) > 1e-3
    order = {"copies": [0, 0, 1, 1], "stacked": [0, 1, 0, 1]}[place]
    name = "model.layers.{}.mlp.down_proj.weight"
    assert all(torch.equal(grown.weights.read(name.format(n)), base.read(name.format(of))) for n, of in enumerate(order))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_cost_no_more_than_stated(make_checkpoint: Make, tmp_path: Path, tied: bool):
    """36 tokens beside 300: log(1 + 36 / 300) = 0.113 nats a token at most, and something, because they take probability."""
    base = open_weights(make_checkpoint(LLAMA, tie_word_embeddings=tied))
    grown = grow.more_tokens(base, 336)
    assert grown.nats_per_token == pytest.approx(math.log(1.12))
    before, after = loss(base, tmp_path / "base"), loss(grown.weights, tmp_path / "grown")
    for nats, more, ids in zip(before, after, DOCUMENTS, strict=True):
        assert 0 < more - nats <= len(ids) * grown.nats_per_token


def test_what_the_heads_become():
    new = grow._NEW
    assert grow.head_sources(4, 2, 6, 3) == ([0, 1, 2, 3, new, new], [0, 1, new])
    assert grow.head_sources(4, 2, 4, 4) == ([0, 1, 2, 3], [0, 0, 1, 1])
    assert grow.head_sources(4, 2, 6, 2) == ([0, 1, new, 2, 3, new], [0, 1])
    assert grow.head_sources(6, 2, 8, 4) == ([0, 1, 2, new, 3, 4, 5, new], [0, 0, 1, 1])
    assert grow.head_sources(9, 3, 12, 4) == ([*range(9), new, new, new], [0, 1, 2, new])
    with pytest.raises(Rejected, match="at least 4 KV heads"):
        grow.head_sources(8, 2, 9, 3)  # groups of 4 go into two groups of 3 each
    with pytest.raises(Rejected, match="as many heads for each"):
        grow.head_sources(4, 2, 6, 4)


def all_at_once(base: Weights, seed: int = 0) -> grow.Grown:
    """Tokens, residual stream with heads, MLP, layers: one recipe from operators."""
    found = grow.start(base)
    found = found.then(grow.more_tokens(found.weights, 310, seed=seed))
    found = found.then(grow.widen_hidden(found.weights, 48, 6, seed=seed))
    found = found.then(grow.widen_mlp(found.weights, 80, seed=seed))
    return found.then(grow.deepen(found.weights, 4, noise=0.1, seed=seed))


def test_a_seed_gives_the_same_bits_in_any_order(livelier: Callable[..., Weights]):
    base = livelier(PHI3)
    one, two, other = (all_at_once(base, seed).weights for seed in (5, 5, 6))
    names = [*one.dtypes]
    backwards = {name: two.read(name) for name in reversed(names)}
    assert all(torch.equal(one.read(name), backwards[name]) for name in names)
    assert any(not torch.equal(one.read(name), other.read(name)) for name in names)
    assert torch.equal(one.read("model.layers.0.mlp.down_proj.weight"), one.read("model.layers.0.mlp.down_proj.weight"))


@pytest.mark.parametrize("family", [LLAMA, PHI, PHI3])
def test_everything_that_is_new_learns(livelier: Callable[..., Weights], tmp_path: Path, family: str):
    """After 50 steps of AdamW every value that was not there before has had a gradient and moved: no dead neuron."""
    base = livelier(family)
    grown = all_at_once(base).weights
    save(grown, tmp_path / "grown", CARD)
    model = checkpoint.load(tmp_path / "grown", dtype=torch.float32).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    numbers = torch.Generator().manual_seed(1)
    for _ in range(50):
        ids = torch.randint(0, 310, (4, 64), generator=numbers)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            seen[name] += p.grad.abs()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if name.endswith("k_proj.bias"):  # moves all logits of a query alike: softmax does not see it
            continue
        assert bool((seen[name] > 0).all()), f"{name}: {int((seen[name] == 0).sum())} values without a gradient"
        assert bool((p.detach() != before[name]).all()), f"{name}: {int((p.detach() == before[name]).sum())} values did not move"


def test_neurons_with_zero_in_and_out_are_dead(livelier: Callable[..., Weights], tmp_path: Path):
    """The trap that `random in, zero out` avoids, so that the test above can fail: with zero gates nothing ever moves."""
    base = livelier(LLAMA)
    grown = grow.widen_mlp(base, 80).weights

    def read(name: str) -> Tensor:
        tensor = grown.read(name)
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[64:] = 0
        return tensor

    save(replace(grown, read=read), tmp_path / "dead", CARD)
    model = checkpoint.load(tmp_path / "dead", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        ids = torch.tensor(DOCUMENTS[:1])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    gate = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    assert bool((gate[64:] == 0).all())


def test_halves_with_noise_are_not_alike(livelier: Callable[..., Weights]):
    base = livelier(LLAMA)
    name = "model.layers.0.mlp.down_proj.weight"
    alike, apart = (grow.widen_mlp(base, 128, "split", noise=noise).weights.read(name) for noise in (0.0, 0.5))
    pairs = [(n, m) for n in range(64) for m in range(64, 128) if torch.equal(alike[:, n], alike[:, m])]
    assert len(pairs) == 64
    assert all(not torch.equal(apart[:, n], apart[:, m]) for n, m in pairs)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_sixteen_bits_keep_norms_that_they_cannot_hold_in_float32(livelier: Callable[..., Weights], tmp_path: Path, kind: str):
    """With norms in 16 bits the same model moves by more than the limit."""
    lively = livelier(LLAMA)
    small = replace(lively, dtypes=dict.fromkeys(lively.dtypes, kind), read=lambda name: lively.read(name).to(TYPES[kind]))
    grown = grow.widen_hidden(small, 44)
    types = grown.weights.dtypes
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert types["lm_head.weight"] == kind
    assert "kept in float32" in grown.said[0]
    before = loss(small, tmp_path / "small")
    assert worst(before, loss(grown.weights, tmp_path / "grown")) < 2e-6
    wide = grown.weights
    rounded = replace(wide, dtypes=dict.fromkeys(types, kind), read=lambda name: wide.read(name).to(TYPES[kind]))
    assert worst(before, loss(rounded, tmp_path / "rounded")) > 1e-5
    quarter = grow.widen_hidden(small, 128).weights.dtypes  # sqrt(32 / 128) = 1/2 moves no digit
    assert set(quarter.values()) == {kind}


def test_a_phi_in_sixteen_bits_states_a_wider_limit(livelier: Callable[..., Weights], tmp_path: Path):
    """The mean that is written into the new values has more digits than they hold."""
    lively = livelier(PHI)
    small = replace(lively, dtypes=dict.fromkeys(lively.dtypes, "BF16"), read=lambda name: lively.read(name).bfloat16())
    grown = grow.widen_hidden(small, 48)
    assert grown.limit == grow.ROUNDED
    assert worst(loss(small, tmp_path / "small"), loss(grown.weights, tmp_path / "grown")) < grow.ROUNDED


def with_eps(weights: Weights, eps: float) -> Weights:
    config, raw = with_config(weights.raw, {"rms_norm_eps": eps})
    return replace(weights, config=config, raw=raw)


REFUSED: dict[str, tuple[str, Callable[[Weights], object], str]] = {
    "fewer-layers": (LLAMA, lambda w: grow.deepen(w, 1), "at least the 2"),
    "places-out-of-range": (LLAMA, lambda w: grow.deepen(w, 3, after=(2,)), "numbers from 0 to 1"),
    "places-too-many": (LLAMA, lambda w: grow.deepen(w, 3, after=(0, 1)), "1 numbers"),
    "narrower-mlp": (LLAMA, lambda w: grow.widen_mlp(w, 60), "at least the 64"),
    "split-twice": (LLAMA, lambda w: grow.widen_mlp(w, 129, "split"), "at most 128"),
    "narrower": (PHI3, lambda w: grow.widen_hidden(w, 24), "at least the 32"),
    "phi3-head-size": (PHI3, lambda w: grow.widen_hidden(w, 44), "a multiple of 8"),
    "phi-heads": (PHI, lambda w: grow.widen_attention(w, 8), "no head_dim"),
    "llama-heads-not-dividing": (LLAMA, lambda w: grow.widen_attention(w, 5), "divisible"),
    "fewer-tokens": (LLAMA, lambda w: grow.more_tokens(w, 299), "at least the 300"),
    "untied-already": (LLAMA, grow.untie, "not tied"),
    "smallest-eps": (LLAMA, lambda w: grow.widen_hidden(with_eps(w, 1e-12), 44), "shrink to 7.27e-13, by 32 / 44"),
    "too-many-layers": (LLAMA, lambda w: grow.deepen(w, 129), "num_hidden_layers"),
    "layers-that-no-list-holds": (LLAMA, lambda w: grow.deepen(w, 10**12), "num_hidden_layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_both_values(livelier: Callable[..., Weights], case: str):
    family, operator, said = REFUSED[case]
    with pytest.raises(Rejected, match=said) as error:
        operator(livelier(family))
    assert error.value.reason in (Reason.SETTING, Reason.BAD_CONFIG)
