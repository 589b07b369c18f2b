from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sn29.evaluation.head import TiledHead, Tiles, fold_for, has_compiler, tiles_for

EAGER = Tiles(64, 128, compiled=False)
CPU = torch.device("cpu")


def layer(vocab: int, dtype: torch.dtype, bias: bool = False, scale: float = 0.2) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(vocab)
    weight = (scale * torch.randn(vocab, 32, generator=generator)).to(dtype)
    return weight, torch.randn(vocab, generator=generator).to(dtype) if bias else None


def positions(count: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 32, generator=generator).to(dtype), torch.randint(vocab, (count,), generator=generator)


def full(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, asked: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), asked, reduction="none")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 127, 128, 129, 300, 1024])
def test_tiles_give_what_full_logits_give(vocab, dtype, bias):
    weight, offset = layer(vocab, dtype, bias)
    hidden, asked = positions(150, vocab, dtype)
    head = TiledHead(weight, offset, EAGER)
    head.add(hidden, asked)
    # One product a tile may round a bfloat16 logit the other way than one product for all: 2^-8 of a logit of about 3.
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(head.finish(), full(hidden, weight, offset, asked), rtol=tolerance, atol=tolerance)


def test_the_first_and_the_last_column_of_a_tile_are_found():
    weight, _ = layer(300, torch.float32)
    asked = torch.tensor([0, 127, 128, 255, 256, 299])
    hidden, _ = positions(6, 300, torch.float32)
    head = TiledHead(weight, None, EAGER)
    head.add(hidden, asked)
    torch.testing.assert_close(head.finish(), full(hidden, weight, None, asked), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_gets_the_same_bits_whatever_else_is_asked(dtype):
    weight, _ = layer(1000, dtype)
    hidden, asked = positions(200, 1000, dtype)
    head = TiledHead(weight, None, EAGER)
    head.add(hidden, asked)
    together = head.finish()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for part in order.split([1, 90, 64, 45]):  # pieces that fill no tile, one, and more than one
        head.add(hidden[part], asked[part])
    assert torch.equal(head.finish(), together[order])
    head.add(hidden[17:18], asked[17:18])
    assert torch.equal(head.finish(), together[17:18])


def test_logits_that_are_sure_lose_no_digits():
    # nats of 1e-4 and less: log(sum) - logit would lose them to rounding, the terms of log_softmax do not
    weight, asked = torch.zeros(300, 32), torch.tensor([7])
    weight[7, 0] = 1.0
    head = TiledHead(weight, None, EAGER)
    for logit in (0.0, 5.0, 14.0, 80.0):
        hidden = torch.zeros(1, 32)
        hidden[0, 0] = logit
        head.add(hidden, asked)
        torch.testing.assert_close(head.finish(), full(hidden, weight, None, asked), rtol=1e-6, atol=1e-7)


def test_what_is_not_finite_is_not_hidden():
    weight, _ = layer(300, torch.float32)
    hidden, asked = positions(3, 300, torch.float32)
    head = TiledHead(weight, None, EAGER)
    hidden[1] = torch.nan
    head.add(hidden, asked)
    assert head.finish().isfinite().tolist() == [True, False, True]
    weight[200] = torch.inf
    head.add(hidden, asked)
    assert not head.finish().isfinite().any()


def test_tokens_that_cannot_be_add_nothing():
    # -inf in a whole tile: exp(-inf - -inf) would be NaN
    weight = torch.zeros(300, 32)
    bias = torch.zeros(300)
    bias[:128] = -torch.inf
    head = TiledHead(weight, bias, EAGER)
    head.add(torch.zeros(2, 32), torch.tensor([200, 5]))
    found = head.finish()
    assert found[0].item() == pytest.approx(torch.log(torch.tensor(172.0)).item(), rel=1e-6)
    assert found[1] == torch.inf


def test_nothing_asked_nothing_given():
    assert len(TiledHead(layer(300, torch.float32)[0], None, EAGER).finish()) == 0


@pytest.mark.skipif(not has_compiler("cpu"), reason="no C++ compiler")
def test_the_compiled_fold_gives_what_the_eager_one_gives():
    tiles = Tiles(64, 128, compiled=True)
    _, why_eager = fold_for(tiles, torch.bfloat16, CPU, torch.get_num_threads())
    assert why_eager == ""
    weight, _ = layer(300, torch.bfloat16)
    hidden, asked = positions(150, 300, torch.bfloat16)
    heads = [TiledHead(weight, None, tiles), TiledHead(weight, None, EAGER)]
    for head in heads:
        head.add(hidden, asked)
    compiled, eager = (head.finish() for head in heads)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    heads[0].add(hidden.flip(0), asked.flip(0))
    assert torch.equal(heads[0].finish().flip(0), compiled)


def test_the_cut_depends_on_machine_and_vocabulary():
    assert tiles_for(CPU, 100_000, compiled=True) == Tiles(1024, 2048, True)
    assert tiles_for(CPU, 100_000, compiled=False) == Tiles(256, 4096, False)
    assert tiles_for(CPU, 300) == Tiles(256, 300, False)
    assert tiles_for(CPU, 100_000).compiled == has_compiler("cpu")
