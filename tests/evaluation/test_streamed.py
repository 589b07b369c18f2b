from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.head import Tiles
from sn29.evaluation.packed import Profile, all_nats_packed
from sn29.evaluation.streamed import Streamed, measure, needs, needs_streaming, streamed_nats
from sn29.models.checkpoint import load
from sn29.models.config import ModelConfig, parse_config

SMALL = Profile(256, Tiles(64, 128, compiled=False), "documents")
PLENTY = 1 << 30
MODELS = {
    "llama, grouped": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "llama, one layer, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "phi": ("PhiForCausalLM", {}),
    "phi, grouped, normed, tied": (
        "PhiForCausalLM",
        {"num_key_value_heads": 2, "qk_layernorm": True, "tie_word_embeddings": True},
    ),
    "phi3, grouped, narrow window": ("Phi3ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 5}),
    "phi3, wide window, tied": ("Phi3ForCausalLM", {"sliding_window": 100, "tie_word_embeddings": True}),
}


def samples_of(seed: int = 0) -> list[list[int]]:
    """Odd lengths, none, one token, exactly a row, beyond a row, and many short ones."""
    numbers = random.Random(seed)
    lengths = [1, 0, 1, 2, 7, 63, 64, 65, 129, 255, 256, 257, 321, 190, *(numbers.randrange(1, 90) for _ in range(20))]
    return [[numbers.randrange(300) for _ in range(length)] for length in lengths]


def config_of(folder: Path) -> ModelConfig:
    return parse_config((folder / "config.json").read_bytes())


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    family, config = MODELS[request.param]
    return make_checkpoint(family, **({"initializer_range": 0.2, "num_hidden_layers": 3} | config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_and_resident_give_the_same_bits(folder, dtype):
    samples = samples_of()
    resident = all_nats_packed(load(folder, dtype=dtype), samples, 1, profile=SMALL)
    blocks = config_of(folder).number("num_hidden_layers") + 1
    least = needs(config_of(folder), dtype, SMALL, 321, threads=3).streamed
    for memory_bytes, threads in ((PLENTY, 1), (PLENTY, 3), (least, 3), (least, 1)):
        seen: list[tuple[int, int]] = []
        found = streamed_nats(
            folder, samples, 1, profile=SMALL, memory_bytes=memory_bytes, dtype=dtype, threads=threads,
            progress=lambda *at, seen=seen: seen.append(at),
        )  # fmt: skip
        assert found == resident
        total = seen[-1][1]
        assert seen == [(done, total) for done in range(1, total + 1)]
        if (memory_bytes, threads) != (least, 1):  # one thread's row less leaves room for more rows in a chunk
            assert (total == blocks) == (memory_bytes == PLENTY)  # otherwise several chunks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["documents", "varlen"])
def test_on_cuda_too(folder, attention):
    profile = Profile(256, SMALL.tiles, attention)
    samples = samples_of()
    resident = all_nats_packed(load(folder, dtype=torch.bfloat16, device="cuda"), samples, 1, profile=profile)
    least = needs(config_of(folder), torch.bfloat16, profile, 321).streamed
    for memory_bytes in (PLENTY, least):
        assert resident == streamed_nats(
            folder, samples, 1, profile=profile, memory_bytes=memory_bytes, dtype=torch.bfloat16, device="cuda"
        )


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_converted_as_the_loader_does_whatever_they_are_kept_in(make_checkpoint, tmp_path, kept):
    model = transformers.LlamaForCausalLM.from_pretrained(make_checkpoint(initializer_range=0.2)).to(kept)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    for dtype in (torch.float32, torch.bfloat16):
        resident = all_nats_packed(load(tmp_path, dtype=dtype), samples_of(), 1, profile=SMALL)
        assert streamed_nats(tmp_path, samples_of(), 1, profile=SMALL, memory_bytes=PLENTY, dtype=dtype) == resident


@pytest.mark.parametrize("samples", [[[5, 6]], [[]], []])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan")),
        ("model.layers.0.input_layernorm.weight", -float("inf")),
        ("model.embed_tokens.weight", float("nan")),
        ("lm_head.weight", float("inf")),
        ("model.norm.weight", float("nan")),
        ("lm_head.weight", 3.4e38),  # finite in float32 alone
    ],
)
def test_a_weight_that_is_not_finite_is_found_wherever_it_is(make_checkpoint, name, value, samples):
    folder = make_checkpoint()
    change(folder, lambda weights: weights[name].view(-1)[-1].fill_(value))
    with pytest.raises(Rejected, match=name.replace(".", r"\.")) as refused:
        streamed_nats(folder, samples, 1, profile=SMALL, memory_bytes=PLENTY, dtype=torch.bfloat16)
    assert refused.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize(
    "edit",
    [
        lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
        lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}),
        lambda weights: weights.update({"model.norm.weight": torch.zeros(33)}),
    ],
)
def test_every_tensor_is_used_and_none_is_left_over(make_checkpoint, edit):
    folder = make_checkpoint()
    change(folder, edit)
    with pytest.raises(Rejected) as refused:
        Streamed(folder, profile=SMALL, memory_bytes=PLENTY, dtype=torch.float32)
    assert refused.value.reason is Reason.TENSORS


def test_a_file_that_becomes_shorter_is_refused(make_checkpoint):
    folder = make_checkpoint()
    with Streamed(folder, profile=SMALL, memory_bytes=PLENTY, dtype=torch.float32) as model:
        os.truncate(folder / "model.safetensors", 20_000)
        with pytest.raises(Rejected, match="ends early"):
            model.nats([[5, 6]], 1)


def test_memory_that_is_too_small_is_named_with_what_is_needed(make_checkpoint):
    folder = make_checkpoint()
    config = config_of(folder)
    least = needs(config, torch.float32, SMALL, 300).streamed
    with pytest.raises(Unavailable, match=f"{least:,} bytes are needed .* {least - 1:,} are allowed"):
        streamed_nats(folder, [[5] * 300], 1, profile=SMALL, memory_bytes=least - 1, dtype=torch.float32)
    with pytest.raises(Unavailable, match=f"{least:,} bytes are needed"):
        needs_streaming(config, torch.float32, SMALL, 300, least - 1)
    streamed_nats(folder, [[5] * 300], 1, profile=SMALL, memory_bytes=least, dtype=torch.float32)


def test_only_what_does_not_fit_is_streamed():
    """Llama of 6.9 billion parameters with 100k tokens: 13.8 GB in bfloat16, 0.4 GB a layer, 0.8 GB the head."""
    shape = {
        "vocab_size": 100_277, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 30,
        "num_attention_heads": 32,
    }  # fmt: skip
    config = ModelConfig("LlamaForCausalLM", shape, 0)
    profile = Profile(1024, Tiles(1024, 2048, compiled=True), "documents")
    found = needs(config, torch.bfloat16, profile, 4096)
    assert 13.8e9 < found.resident < 16e9
    assert 1.2e9 < found.streamed < 3e9
    assert not needs_streaming(config, torch.bfloat16, profile, 4096, 16_000_000_000)
    assert needs_streaming(config, torch.bfloat16, profile, 4096, 8_000_000_000)
    assert needs_streaming(config, torch.float32, profile, 4096, 16_000_000_000)
    # what binds is the longest sample, the rows at a time and the type
    assert needs(config, torch.bfloat16, profile, 8192).streamed > found.streamed
    assert needs(config, torch.bfloat16, profile, 4096, threads=2).streamed > found.streamed
    assert needs(config, torch.float32, profile, 4096).streamed > 1.8 * found.streamed


def test_tokens_before_a_change_keep_their_bits(make_checkpoint):
    samples = samples_of()
    changed = [[*ids[: len(ids) // 2], *((id_ + 1) % 300 for id_ in ids[len(ids) // 2 :])] for ids in samples]
    with Streamed(make_checkpoint(initializer_range=0.2), profile=SMALL, memory_bytes=PLENTY, dtype=torch.float32) as model:
        first, second = model.token_nats(samples, 1), model.token_nats(changed, 1)
        assert [len(values) for values in first] == [len(ids) for ids in samples]
        assert model.nats(samples, 1) == [float(values.double().sum()) for values in first]
        for ids, a, b in zip(samples, first, second, strict=True):
            half = len(ids) // 2
            assert torch.equal(a[:half], b[:half])
            assert not len(ids) or not torch.equal(a[half:], b[half:])


def test_weights_are_dropped_behind_their_block(make_checkpoint):
    folder = make_checkpoint(num_hidden_layers=3)
    with Streamed(folder, profile=SMALL, memory_bytes=PLENTY, dtype=torch.float32) as model:
        model.nats([[5, 6, 7]], 1)
        held = {name: values.device.type for name, values in model._base.named_parameters()}
        assert held.pop("norm.block.weight") == "cpu"
        assert set(held.values()) == {"meta"}
        size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
        assert model.traffic.num_bytes == size
        model.nats([[5, 6, 7]], 1)
        assert model.traffic.num_bytes == 2 * size - 32 * 4  # the last norm stays


def test_an_id_without_a_row_is_an_error_as_in_the_resident_model(make_checkpoint):
    with Streamed(make_checkpoint(), profile=SMALL, memory_bytes=PLENTY, dtype=torch.float32) as model:
        with pytest.raises(IndexError, match="ids from 0 to 300 for 300 rows"):
            model.nats([[5, 300, 6]], 1)
        assert len(model.nats([[5, 299, 6]], 1)) == 1


def test_reading_and_evaluating_are_measured_in_turns(make_checkpoint):
    with Streamed(make_checkpoint(), profile=SMALL, memory_bytes=PLENTY, dtype=torch.float32) as model:
        rates = measure(model, [[5, 6, 7]], 1, times=2)
    assert len(rates) == 2
    assert all(rate.disk > 0 and rate.share == rate.streamed / rate.disk > 0 and 0 <= rate.waited <= 1 for rate in rates)


# --- a model of four times the memory ---------------------------------------------------------------------------------

CHILD = """
import ctypes, json, sys
from pathlib import Path
import torch
from sn29.evaluation.head import Tiles
from sn29.evaluation.packed import Profile
from sn29.evaluation.streamed import streamed_nats

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
how = dict(profile=Profile(256, Tiles(64, 128, compiled=False), "documents"), memory_bytes=job["memory"], dtype=torch.bfloat16)
streamed_nats(Path(job["small"]), [[5, 6, 7]], 1, **how)  # what libraries take once is not the model's
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
before = status("VmRSS")
nats = streamed_nats(Path(job["large"]), job["samples"], 1, **how)
print(json.dumps({"nats": nats, "grown": status("VmHWM") - before}))
"""


def large_checkpoint(folder: Path) -> int:
    """A Llama of 32 layers of 8 MB in bfloat16; bytes of its weights."""
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=640, intermediate_size=1280, num_hidden_layers=32, num_attention_heads=10,
        bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: values.shape for name, values in transformers.LlamaForCausalLM(config).named_parameters()}
    noise = 0.05 * torch.randn(640 * 1280, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weights = {
        name: noise.roll(997 * number)[: shape.numel()].view(shape) if len(shape) == 2 else noise.new_ones(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }
    save_file({name: values.contiguous() for name, values in weights.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    return sum(values.nbytes for values in weights.values())


def test_a_model_of_four_times_the_memory_is_evaluated_within_it(make_checkpoint, tmp_path):
    memory = large_checkpoint(tmp_path) // 4
    assert needs_streaming(config_of(tmp_path), torch.bfloat16, SMALL, 200, memory)
    samples = [ids for ids in samples_of() if 30 < len(ids) <= 200][-4:]
    job = {"small": str(make_checkpoint()), "large": str(tmp_path), "memory": memory, "samples": samples}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(job)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["grown"] <= memory
    assert found["nats"] == all_nats_packed(load(tmp_path, dtype=torch.bfloat16), samples, 1, profile=SMALL)
