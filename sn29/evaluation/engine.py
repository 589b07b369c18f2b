"""The loss of a text: total nats from its first token on. The plain engine: one sample at a time, nothing shared.

Every faster path is compared with this one, so it stays as simple as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def sample_nats(model: PreTrainedModel, ids: Sequence[int], start_token: int) -> float:
    """-log p(text | start token) in nats; NaN or +inf as the model gives them.

    The start token stands in front and is not scored, so that the first token of the text is paid for like every other:
    a tokenizer with longer first tokens gets nothing for free.

        ids           [ 5,  6,  7]
        the model sees [ S,  5,  6]
        and is asked   [ 5,  6,  7]      three predictions, the sum of their -log p is the loss

    The log-softmax is in float32 whatever the model's dtype; the sum over tokens is in float64.
    """
    if not ids:
        return 0.0
    seen = torch.tensor([[start_token, *ids[:-1]]], device=model.device)  # [1, T]
    asked = torch.tensor(ids, device=model.device)  # [T]
    logits = model(input_ids=seen, use_cache=False).logits[0]  # [T, V]
    per_token = F.cross_entropy(logits.float(), asked, reduction="none")  # [T], nats
    return float(per_token.double().sum())


def all_nats(model: PreTrainedModel, samples: Sequence[Sequence[int]], start_token: int) -> list[float]:
    """`sample_nats` of each sample; what is not finite becomes +inf, so NaN never leaves this module."""
    found = (sample_nats(model, ids, start_token) for ids in samples)
    return [nats if math.isfinite(nats) else math.inf for nats in found]
