"""Gates that do nothing begin again: fresh inputs, and outputs of zero, so that training can use them.

A gate that is removed is a column of zeros in the MLP's last matrix. Then what feeds it changes nothing, and can be drawn anew:
rows of `gate_proj` and `up_proj` (Llama), of both halves of `gate_up_proj` (Phi3), of `fc1` with its bias (Phi). The function is
that of the model without these gates, to the last bit of each product. And unlike a gate whose inputs and outputs are zero, it
learns: the column's gradient is the gate's activation times the gradient behind it, which is not zero with random inputs.
Dormant neurons are recycled in this way by ReDo (Sokar et al. 2023, arXiv 2302.12902).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sn29.errors import Reason, Rejected
from sn29.evaluation.streamed import config_of
from sn29.lab.ablation import Pieces, Removal, Subject
from sn29.lab.losses import Change, change
from sn29.lab.weights import Weights, open_weights
from sn29.models import checkpoint

UNCHANGED = 1e-5
"""What one document's loss may differ by, relative, in float32, from that of the model without the recycled gates."""
_OF_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|gate_up_proj|fc1|down_proj|fc2)\.(weight|bias)")
_BITS = {2: torch.int16, 4: torch.int32}


def recycled(weights: Weights, dead: Removal, seed: int) -> Weights:
    """The model with fresh inputs and zero outputs for these gates; the same for the same seed, whatever is read first.

    Fresh rows are normal, with the standard deviation of the living rows of their tensor (of all, where none lives).
    """

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        gone = _gone(name, dead)
        if gone is None or _is_zeroed(name):
            return tensor if gone is None else tensor.masked_fill_(gone, 0)
        living = tensor[~gone[:, 0]] if not gone.all() else tensor
        deviation = float(living.float().square().mean().sqrt()) or 1 / math.sqrt(tensor.shape[1])
        number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
        fresh = torch.randn((int(gone.sum()), tensor.shape[1]), generator=torch.Generator().manual_seed(number))
        tensor[gone[:, 0]] = (fresh * deviation).to(tensor.dtype)
        return tensor

    return replace(weights, read=read)


def _gone(name: str, dead: Removal) -> Tensor | None:
    """Which values of a tensor are of dead gates: bool [1, I] of a last matrix, [rows, 1] of a first one, [I] of its bias."""
    found = _OF_MLP.fullmatch(name)
    if found is None or (mask := dead.get(int(found[1]))) is None or not mask.any():
        return None
    if found[2] in ("down_proj", "fc2"):
        return mask[None] if found[3] == "weight" else None
    rows = torch.cat([mask, mask]) if found[2] == "gate_up_proj" else mask
    return rows[:, None] if found[3] == "weight" else rows


def _is_zeroed(name: str) -> bool:
    """Of what `_gone` says: outputs, and biases of inputs; the rest is drawn anew."""
    return name.endswith((".bias", "down_proj.weight", "fc2.weight"))


# --- the proof --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proof:
    """Losses in float32."""

    difference: float
    """The largest of one document, relative, between the written model and the old one without these gates."""
    change: Change
    """From the old model as it was."""


def proved(
    source: Path, written: Path, dead: Removal, documents: Sequence[Sequence[int]], pieces: Pieces, *, device: str, threads: int
) -> Proof:
    """That what was written is the source with these gates begun again: by its tensors, and by its losses in float32.

    Raises Rejected(CLAIM) as `check`, and for a document whose loss differs by more than UNCHANGED from the model without the
    gates; Rejected(NOT_FINITE) for a loss that is no number.
    """
    check(open_weights(source), open_weights(written), dead)

    def nats(folder: Path, removals: Sequence[Removal]) -> list[list[float]]:
        model = checkpoint.load(folder, dtype=torch.float32, device=device)
        subject = Subject(model, documents, config_of(folder).start_token, pieces, threads=threads)
        found: list[list[float]] = subject.nats(removals).tolist()
        return found

    before, without = nats(source, [{}, dead])
    (after,) = nats(written, [{}])
    difference = max(abs(a - b) / b for a, b in zip(after, without, strict=True))
    if not difference <= UNCHANGED:
        raise Rejected(
            Reason.CLAIM,
            f"a relative difference of {difference:.2g} of one document",
            f"{UNCHANGED:g} from the model without these gates",
            "--recycle",
        )
    return Proof(difference, change(before, after))


def check(old: Weights, new: Weights, dead: Removal) -> None:
    """That dead gates put out exactly 0 and have other inputs, and that every other value is the old one's to the bit.

    Raises Rejected(CLAIM) naming the first tensor in which that is not so.
    """
    if (new.raw, new.dtypes) != (old.raw, old.dtypes):
        raise Rejected(Reason.CLAIM, "another config.json or other types of weights", "those of the source", "--recycle")
    for name in old.dtypes:
        was, now = old.read(name), new.read(name)
        gone = _gone(name, dead)
        same = was.view(_BITS[was.itemsize]) == now.view(_BITS[now.itemsize])
        fault = "" if (same if gone is None else same | gone).all() else "a value of another gate is not the source's"
        if gone is not None and _is_zeroed(name) and now.masked_select(gone).any():
            fault = "what is to be 0 is not"
        if gone is not None and not _is_zeroed(name) and (same.all(1) & gone[:, 0]).any():
            fault = "a dead gate has the inputs that it had"
        if fault:
            raise Rejected(Reason.CLAIM, f"{name}: {fault}", "only dead gates changed, with outputs of 0", "--recycle")
