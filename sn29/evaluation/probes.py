"""What a model must show before a loss of it counts: it does not read ahead, it repeats itself, its files are the listed ones.

The loader builds models that do all of this by construction. The probes ask the built one: a fault of ours, of a library or
of a machine shows here and not in the weights of the subnet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    exact = model.dtype == torch.float32 and model.device.type == "cpu"
    texts, places = _texts(model.get_input_embeddings().num_embeddings, seed)
    return _judged([_logits(model, ids) for ids in texts], places, "logit", exact=exact)


def probe_tokens(
    token_nats: Callable[[Sequence[Sequence[int]]], Sequence[torch.Tensor]], rows: int, seed: str, *, exact: bool
) -> Probes:
    """As `probe`, for a model of `rows` tokens that gives -log p of the asked tokens [T] of several texts at once."""
    texts, places = _texts(rows, seed)
    return _judged([nats[:, None] for nats in token_nats(texts)], places, "token's -log p", exact=exact)


def _texts(rows: int, seed: str) -> tuple[list[list[int]], tuple[int, ...]]:
    """A text twice, and once for each place t with other tokens from t on; the places."""
    draws = _draws(seed)
    ids = [next(draws) % rows for _ in range(TOKENS)]
    places = tuple(sorted(1 + next(draws) % (TOKENS - 1) for _ in range(PLACES)))
    changed = [[*ids[:t], *((id_ + 1 + next(draws) % max(1, rows - 1)) % rows for id_ in ids[t:])] for t in places]
    return [ids, ids, *changed], places


def _judged(found: Sequence[torch.Tensor], places: tuple[int, ...], what: str, *, exact: bool) -> Probes:
    """What the outputs [T, ...] of the texts show."""
    import torch

    first, again, *changed = (torch.nan_to_num(one.float(), nan=1e30, posinf=2e30, neginf=-2e30) for one in found)
    if not torch.equal(first, again):
        differs = int((first != again).any(-1).nonzero()[0])
        got = f"another {what} for token {differs} of the same text"
        raise Rejected(Reason.NOT_DETERMINISTIC, got, "the same bits each time")
    tolerance, influence = 0.0 if exact else 1e-4, 0.0
    largest = max(float(first.abs().max()), 1e-30)
    for t, other in zip(places, changed, strict=True):
        change = float((other[:t] - first[:t]).abs().max()) / largest
        influence = max(influence, change)
        if change > tolerance:
            got = f"a {what} before token {t} moved by {change:.1e} when later tokens changed"
            raise Rejected(Reason.NOT_CAUSAL, got, f"at most {tolerance:.0e}" if tolerance else "no change")
    return Probes(places, influence, tolerance)


def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[T, V]"""
    import torch

    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return found


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
