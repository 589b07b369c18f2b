"""What a model must show before a loss of it counts: it does not read ahead, it repeats itself, its files are the listed ones.

The loader builds models that do all of this by construction. The probes ask the built one: a fault of ours, of a library or
of a machine shows here and not in the weights of the subnet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENS = 48
"""Length of the probing text: five passes of it cost about as much as one short sample."""
PLACES = 3


@dataclass(frozen=True, slots=True)
class Probes:
    """What the probes found of a model that passed them."""

    places: tuple[int, ...]
    """Positions t: tokens from t on were changed."""
    influence: float
    """Largest change of a logit before t, over the largest logit. 0 means equal to the bit."""
    tolerance: float
    """The largest that passes: 0 in float32 on the CPU."""


def probe(model: PreTrainedModel, seed: str) -> Probes:
    """Determinism, then causality, on tokens drawn from the seed. Raises Rejected(NOT_DETERMINISTIC | NOT_CAUSAL)."""
    import torch

    rows = model.get_input_embeddings().num_embeddings
    draws = _draws(seed)
    ids = [next(draws) % rows for _ in range(TOKENS)]
    places = tuple(sorted(1 + next(draws) % (TOKENS - 1) for _ in range(PLACES)))
    logits = _logits(model, ids)  # [T, V]
    again = _logits(model, ids)
    if not torch.equal(logits, again):
        differs = int((logits != again).any(-1).nonzero()[0])
        raise Rejected(Reason.NOT_DETERMINISTIC, f"other logits for token {differs} of the same text", "the same bits each time")
    exact = model.dtype == torch.float32 and model.device.type == "cpu"
    tolerance, influence = 0.0 if exact else 1e-4, 0.0
    largest = max(float(logits.abs().max()), 1e-30)
    for t in places:
        changed = [*ids[:t], *((id_ + 1 + next(draws) % max(1, rows - 1)) % rows for id_ in ids[t:])]
        change = float((_logits(model, changed)[:t] - logits[:t]).abs().max()) / largest
        influence = max(influence, change)
        if change > tolerance:
            got = f"a logit before token {t} moved by {change:.1e} when later tokens changed"
            raise Rejected(Reason.NOT_CAUSAL, got, f"at most {tolerance:.0e}" if tolerance else "no change")
    return Probes(places, influence, tolerance)


def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[T, V] in float32. What is not finite becomes a number, so that it is compared too."""
    import torch

    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return torch.nan_to_num(found, nan=1e30, posinf=2e30, neginf=-2e30)


def _draws(seed: str) -> Any:
    """Whole numbers below 2^32, the same from the same seed on every machine, without end."""
    count = 0
    while True:
        digest = hashlib.sha256(f"{seed} {count}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4))
        count += 1


# --- files ------------------------------------------------------------------------------------------------------------


def changed_file(folder: Path, oids: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first of the named files that is not the one of its object id (`sha256:...` or `git:...`); None when all are."""
    for name in names:
        kind, _, wanted = oids[name].partition(":")
        path = folder / name
        if not path.is_file() or path.is_symlink():
            return name
        with path.open("rb") as stream:
            if kind == "sha256":
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            else:
                header = b"blob %d\0" % path.stat().st_size
                found = hashlib.file_digest(stream, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()  # noqa: B023
        if found != wanted:
            return name
    return None
