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
from dataclasses import replace

import torch
from torch import Tensor

from sn29.lab.ablation import Removal
from sn29.lab.weights import Weights

_OF_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|gate_up_proj|fc1|down_proj|fc2)\.(weight|bias)")


def recycled(weights: Weights, dead: Removal, seed: int) -> Weights:
    """The model with fresh inputs and zero outputs for these gates; the same for the same seed, whatever is read first.

    Fresh rows are normal, with the standard deviation of the living rows of their tensor (of all, where none lives).
    """

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        found = _OF_MLP.fullmatch(name)
        if found is None or (mask := dead.get(int(found[1]))) is None or not mask.any():
            return tensor
        if found[2] in ("down_proj", "fc2"):
            if found[3] == "weight":
                tensor[:, mask] = 0
            return tensor
        rows = torch.cat([mask, mask]) if found[2] == "gate_up_proj" else mask
        if found[3] == "bias":
            tensor[rows] = 0
            return tensor
        living = tensor[~rows] if not rows.all() else tensor
        deviation = float(living.float().square().mean().sqrt()) or 1 / math.sqrt(tensor.shape[1])
        number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
        fresh = torch.randn((int(rows.sum()), tensor.shape[1]), generator=torch.Generator().manual_seed(number))
        tensor[rows] = (fresh * deviation).to(tensor.dtype)
        return tensor

    return replace(weights, read=read)
