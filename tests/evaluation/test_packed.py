from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from sn29.evaluation.engine import all_nats
from sn29.evaluation.head import Tiles
from sn29.evaluation.packed import Profile, all_nats_packed, attention_times, pack, profile_for, refusal
from sn29.models.checkpoint import load

SMALL = Profile(256, Tiles(64, 128, compiled=False), "documents")
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, grouped": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "llama, one group, tied, biased": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": False, "head_dim": 16},
    ),
    "phi": ("PhiForCausalLM", {}),
    "phi, grouped, normed, tied": (
        "PhiForCausalLM",
        {"num_key_value_heads": 2, "qk_layernorm": True, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3, grouped, narrow window": ("Phi3ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 5}),
    "phi3, wide window, tied": ("Phi3ForCausalLM", {"sliding_window": 100, "tie_word_embeddings": True}),
}


def samples_of(seed: int = 0) -> list[list[int]]:
    """Odd lengths, none, one token, exactly a row, beyond a row, and many short ones."""
    numbers = random.Random(seed)
    lengths = [1, 0, 1, 2, 7, 63, 64, 65, 129, 255, 256, 257, 321, 190, *(numbers.randrange(1, 90) for _ in range(20))]
    return [[numbers.randrange(300) for _ in range(length)] for length in lengths]


def worst(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of a sample."""
    return max(abs(a - b) / b if b else abs(a) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    family, config = MODELS[request.param]
    return make_checkpoint(family, initializer_range=0.2, **config)  # logits of some size: the default's are all but equal


def test_in_float32_packed_and_plain_agree_to_a_millionth(folder):
    model = load(folder, dtype=torch.float32)
    samples = samples_of()
    assert worst(all_nats_packed(model, samples, 1, profile=SMALL), all_nats(model, samples, 1)) < 1e-6
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_in_bfloat16_packed_and_plain_are_both_near_float64(folder):
    model = load(folder, dtype=torch.bfloat16)
    exact = load(folder, dtype=torch.float64)
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    samples = [ids for ids in samples_of() if len(ids) != 1]
    truth = all_nats(exact, samples, 1)
    packed, plain = all_nats_packed(model, samples, 1, profile=SMALL), all_nats(model, samples, 1)
    assert worst(plain, truth) < BFLOAT16_BOUND
    assert worst(packed, truth) < BFLOAT16_BOUND
    # A single token has nothing to average over: 8 bits of a logit of about 5 nats.
    one = [ids for ids in samples_of() if len(ids) == 1]
    assert worst(all_nats_packed(model, one, 1, profile=SMALL), all_nats(exact, one, 1)) < 4 * BFLOAT16_BOUND


BFLOAT16_BOUND = 0.004
"""Relative, of texts of 2 tokens and more under these models of 20,000 parameters (found: 1.4e-3); of real texts 2.4e-4."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_has_the_same_bits_in_any_order_and_any_subset(folder, dtype):
    model = load(folder, dtype=dtype)
    samples = samples_of()
    together = all_nats_packed(model, samples, 1, profile=SMALL)
    numbers = random.Random(1)
    for count in (len(samples), 11, 1):
        some = numbers.sample(range(len(samples)), count)
        found = all_nats_packed(model, [samples[n] for n in some], 1, profile=SMALL)
        assert found == [together[n] for n in some]


def test_the_chosen_profile_gives_the_same_losses(make_checkpoint):
    model = load(make_checkpoint(num_key_value_heads=2), dtype=torch.float32)
    samples = samples_of()[:8]
    assert worst(all_nats_packed(model, samples, 1), all_nats(model, samples, 1)) < 1e-6
    assert str(profile_for(model)) == "packed-1 rows of 1024, documents attention, eager tiles 256x300"


def test_what_is_not_finite_becomes_infinite_and_stays_alone(make_checkpoint):
    model = load(make_checkpoint(), dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    samples = [[5, 6, 8], [5, 7, 8], [], [7, 9], [9]]  # the last token of a sample is asked for and never seen
    found = all_nats_packed(model, samples, 1, profile=SMALL)
    assert [math.isfinite(nats) for nats in found] == [True, False, True, False, True]
    assert found[1] == found[3] == math.inf
    assert found[2] == 0.0
    assert worst([found[0], found[4]], all_nats(model, [samples[0], samples[4]], 1)) < 1e-6


def test_no_samples():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    assert all_nats_packed(model, [], 1, profile=SMALL) == []
    assert all_nats_packed(model, [[]], 1, profile=SMALL) == [0.0]


TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("kind", ["Mistral", "Qwen3", "Olmo2"])
def test_other_decoders_go_the_same_way_once_they_are_tried(kind):
    more = {"num_key_value_heads": 2, "pad_token_id": 0} | ({"sliding_window": 9} if kind == "Mistral" else {})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**TINY, **more)).eval()
    assert refusal(model) == ""
    samples = samples_of()[:10]
    assert worst(all_nats_packed(model, samples, 1, profile=SMALL), all_nats(model, samples, 1)) < 1e-6


def test_what_cannot_be_packed_exactly_goes_to_the_plain_twin():
    torch.manual_seed(0)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    config = transformers.LlamaConfig(**TINY, rope_parameters=dynamic, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config).eval()
    assert "dynamic" in refusal(model)
    samples = [[5, 6, 7], list(range(3, 90))]
    assert all_nats_packed(model, samples, 1) == all_nats(model, samples, 1)
    # logits that are more than one linear layer: the trial finds it
    gemma = transformers.Gemma2Config(
        **TINY, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.01, sliding_window=9, attn_logit_softcapping=None
    )
    assert "one by one" in refusal(transformers.Gemma2ForCausalLM(gemma).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_order_nor_threads_move_a_bit(make_checkpoint, dtype):
    model = load(make_checkpoint(intermediate_size=1001, initializer_range=0.2), dtype=dtype)
    numbers = random.Random(0)
    samples = [[numbers.randrange(300) for _ in range(numbers.randrange(1, 120))] for _ in range(12)]
    profile, before = profile_for(model, row_tokens=256), torch.get_num_threads()
    alone = all_nats_packed(model, samples, 1, profile=profile)
    try:
        torch.set_num_threads(3)
        for threads in (1, 2, 3, 20):
            assert all_nats_packed(model, samples[::-1], 1, profile=profile, threads=threads) == alone[::-1]
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_rows_hold_every_sample_once_and_waste_little():
    numbers = random.Random(0)
    lengths = [min(4096, max(1, round(math.exp(numbers.gauss(math.log(600), 0.9))))) for _ in range(1500)] + [0, 0]
    rows = pack(lengths, 2048)
    assert sorted(n for row in rows for n in row.samples) == list(range(1500))
    for row in rows:
        total = sum(lengths[n] for n in row.samples)
        assert total <= row.size
        assert row.size == 2048 if total <= 2048 else (len(row.samples) == 1 and row.size - total < 64)
    assert sum(lengths) / sum(row.size for row in rows) > 0.98
    assert pack([], 2048) == []


def test_kernels_that_this_device_has_are_timed(make_checkpoint):
    times = attention_times(load(make_checkpoint(), dtype=torch.float32), 256, times=1)
    assert times.keys() == {"documents"}  # variable-length attention is for CUDA
    assert times["documents"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["documents", "varlen"])
def test_on_cuda_order_moves_nothing_and_the_plain_twin_is_near(folder, attention):
    model = load(folder, dtype=torch.bfloat16, device="cuda")
    profile = Profile(256, SMALL.tiles, attention)
    samples = samples_of()
    forth = all_nats_packed(model, samples, 1, profile=profile)
    assert all_nats_packed(model, samples[::-1], 1, profile=profile) == forth[::-1]
    assert worst(forth, all_nats(model, samples, 1)) < 4 * BFLOAT16_BOUND
