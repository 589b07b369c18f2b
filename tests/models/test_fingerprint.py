"""The fingerprint on real pairs of models: `python tests/models/test_fingerprint.py` prints what it makes of each pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sn29.models import checkpoint, fingerprint
from sn29.models.fingerprint import BUDGET_BYTES, Fingerprint, likenesses

REPOSITORY = Path(__file__).resolve().parents[2]
Tensors = dict[str, torch.Tensor]
SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


# --- pairs ------------------------------------------------------------------------------------------------------------


def trained(to: Path, *, seed: int = 0, steps: int, rate: float = 3e-3, start: Path | None = None, family: str = "Llama") -> Path:
    """A byte model that learns the LICENSE for real: from `start`, or from a random beginning."""
    import transformers

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if start is not None:
        model.load_state_dict(load_file(start / "model.safetensors"))
    text = torch.tensor(list((REPOSITORY / "LICENSE").read_bytes()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        places = torch.randint(len(text) - 32, (8,))
        rows = torch.stack([text[place : place + 32] for place in places])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(to)
    return to


def changed(source: Path, to: Path, change: Callable[[Tensors], Any]) -> Path:
    to.mkdir(parents=True)
    tensors = load_file(source / "model.safetensors")
    made = change(tensors)
    save_file({k: v.contiguous() for k, v in (made or tensors).items()}, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_bytes((source / "config.json").read_bytes())
    return to


def heads_permuted(tensors: Tensors) -> None:
    """The two groups of heads change places, and the neurons of every MLP: the same function."""
    order = torch.randperm(SHAPE["intermediate_size"], generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        name = f"model.layers.{layer}"
        for part in ("q", "k", "v"):
            tensors[f"{name}.self_attn.{part}_proj.weight"] = torch.cat(
                list(reversed(tensors[f"{name}.self_attn.{part}_proj.weight"].chunk(2)))
            )
        o = f"{name}.self_attn.o_proj.weight"
        tensors[o] = torch.cat(list(reversed(tensors[o].chunk(2, dim=1))), dim=1)
        for part in ("gate", "up"):
            tensors[f"{name}.mlp.{part}_proj.weight"] = tensors[f"{name}.mlp.{part}_proj.weight"][order]
        tensors[f"{name}.mlp.down_proj.weight"] = tensors[f"{name}.mlp.down_proj.weight"][:, order]


def stream_permuted(tensors: Tensors) -> None:
    """The dimensions of the residual stream in another order, everywhere: the same function."""
    order = torch.randperm(SHAPE["hidden_size"], generator=torch.Generator().manual_seed(2))
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
            tensors[name] = tensor[order]
        else:
            tensors[name] = tensor[:, order]


def rescaled(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("up_proj.weight"):
            tensors[name] = tensors[name] * 2
            tensors[name.replace("up_", "down_")] = tensors[name.replace("up_", "down_")] / 2


def noisy(share: float) -> Callable[[Tensors], Tensors]:
    torch.manual_seed(3)
    return lambda tensors: {name: t * (1 + share * torch.randn_like(t)) for name, t in tensors.items()}


def rounded(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def make_pairs(to: Path, steps: int = 150) -> dict[str, tuple[Path, Path]]:
    """What was done -> (the earlier model, the later one)."""
    base = trained(to / "base", steps=steps)
    apart = trained(to / "apart", seed=1, steps=steps)
    made = {
        "exact copy": changed(base, to / "copy", lambda tensors: None),
        "heads and neurons permuted": changed(base, to / "heads", heads_permuted),
        "residual stream permuted": changed(base, to / "stream", stream_permuted),
        "MLP rescaled": changed(base, to / "rescaled", rescaled),
        "noise of 0.1 %": changed(base, to / "noise", noisy(1e-3)),
        "noise of 3 %": changed(base, to / "noise3", noisy(3e-2)),
        "rounded to bfloat16": changed(base, to / "rounded", rounded),
        "trained on for 40 steps": trained(to / "on", seed=2, steps=40, rate=3e-4, start=base),
        "40 steps at the first rate": trained(to / "fast", seed=2, steps=40, start=base),
        "trained apart": apart,
        "trained apart, not at all": trained(to / "new", seed=5, steps=0),
        "its own beginning, untrained": trained(to / "twin", seed=0, steps=0),
    }
    return {name: (base, later) for name, later in made.items()}


def taken(folder: Path) -> tuple[Fingerprint, list[tuple[str, int, int]]]:
    """(fingerprint, what was read for it beside the headers)."""
    listing, read, asked = checkpoint.local_listing(folder), checkpoint.local_reader(folder), []

    def counting(path: str, start: int, length: int) -> bytes:
        asked.append((path, start, length))
        return read(path, start, length)

    facts = checkpoint.inspect(listing, read)
    found = fingerprint.take(listing.files, counting, facts.num_layers)
    return found, asked[2 * sum(f.path.endswith(".safetensors") for f in listing.files) :]


def telling(one: Fingerprint, two: Fingerprint) -> list[tuple[float, float]]:
    """(cosine, distance of the sorted values in units of sqrt(2 / values)) of each tensor that tells something."""
    found = []
    for a, b in ((one[name], two[name]) for name in one if one[name].spread and two[name].spread):
        sorts = float(np.linalg.norm(np.subtract(a.ordered, b.ordered))) / 8
        found.append((1 - float(np.sum(np.subtract(a.plain, b.plain) ** 2)) / 128, sorts / np.sqrt(2 / a.num_values)))
    return found


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fingerprint, Fingerprint]]:
    made = make_pairs(tmp_path_factory.mktemp("pairs"), steps=60)
    return {what: (taken(earlier)[0], taken(later)[0]) for what, (earlier, later) in made.items()}


@pytest.mark.parametrize(
    ("what", "most"),
    [("exact copy", 0.0), ("heads and neurons permuted", 0.0), ("residual stream permuted", 0.0), ("MLP rescaled", 0.0),
     ("noise of 0.1 %", 0.002), ("rounded to bfloat16", 0.003), ("trained on for 40 steps", 0.1)],
)  # fmt: skip
def test_a_copy_in_disguise_resembles_its_original(pairs, what, most):
    found = likenesses(pairs[what])[1]
    assert found is not None
    assert found.earlier == 0
    assert found.alike >= 4
    assert found.difference <= most


@pytest.mark.parametrize("what", ["trained apart", "trained apart, not at all"])
def test_models_that_were_trained_apart_resemble_nobody(pairs, what):
    one, two = pairs[what]
    assert likenesses([one, two]) == [None, None]
    assert all(cosine < 0.6 and ordered > 0.5 for cosine, ordered in telling(one, two))


def test_the_first_of_those_that_are_equally_alike_is_named(pairs):
    (base, copy), (_, noisy), (_, apart) = (pairs[what] for what in ("exact copy", "noise of 0.1 %", "trained apart"))
    found = likenesses([apart, base, noisy, copy, copy, {}])
    assert [one and one.earlier for one in found] == [None, None, 1, 1, 1, None]
    assert str(found[3]) == "6 of 6 tensors are alike, to 0.00%"


def test_a_fingerprint_comes_back_from_its_text(pairs):
    one, two = pairs["noise of 0.1 %"]
    assert fingerprint.decode(fingerprint.encode(two)) == two
    again = [fingerprint.decode(fingerprint.encode(each)) for each in (one, two)]
    assert likenesses(again) == likenesses([one, two])


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eight_tensors_or_so_of_each_family_are_read_within_the_budget(make_checkpoint, tmp_path, family, dtype):
    shape = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    source = make_checkpoint(family, **shape)
    folder = changed(source, tmp_path / "made", lambda tensors: {k: t.to(getattr(torch, dtype)) for k, t in tensors.items()})
    found, asked = taken(folder)
    assert len(asked) == len(found) == len(set(asked))
    assert len(found) >= (5 if dtype == "float32" else 8)
    assert sum(length for _, _, length in asked) <= BUDGET_BYTES == 65_536
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= found.keys()
    like = likenesses([taken(source)[0], found])[1]
    assert like is not None, "another data type is no disguise"
    assert like.alike == like.compared > 2


def test_values_that_tell_nothing_are_not_compared(make_checkpoint, tmp_path):
    """Two models of zeros, or with a weight that is no number, are not alike for that."""
    source = make_checkpoint()
    zeros = changed(source, tmp_path / "zeros", lambda tensors: {k: torch.zeros_like(t) for k, t in tensors.items()})
    strange = changed(source, tmp_path / "strange", lambda tensors: {k: t * float("inf") for k, t in tensors.items()})
    found = [taken(folder)[0] for folder in (zeros, zeros, strange, strange)]
    assert likenesses(found) == [None] * 4
    assert all(math.isfinite(t.norm) for one in found for t in one.values())


def test_the_directions_are_the_same_on_every_machine():
    values = np.arange(1, 5, dtype=np.float64)
    found = fingerprint.print_of(values)
    assert (found.num_values, found.norm, found.spread) == (4, pytest.approx(30**0.5 / 2), pytest.approx(5**0.5 / 2))
    assert found.plain == found.ordered
    assert found.plain[:6] == (0.44721, -1.78885, -1.34164, -0.44721, 0.89443, 1.34164)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for what, (earlier, later) in make_pairs(Path(folder)).items():
            one, two = taken(earlier)[0], taken(later)[0]
            cosines, sorts = zip(*telling(one, two), strict=True)
            said = str(likenesses([one, two])[1] or "no likeness")
            print(
                f"{what:28} {said:42} cosine {min(cosines):6.3f}..{max(cosines):.3f}, sorted {min(sorts):.2f}..{max(sorts):.2f}"
            )
