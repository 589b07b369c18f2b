"""A cheap fingerprint of a model's weights, read before anything is downloaded: whom does a new model look like?

Of eight tensors or so the first values are read by ranged requests, one request a tensor and 64 kB in all. Each leaves
its norm and two projections on 64 seeded directions: of the values as they stand, and of the values sorted.

    as they stand   an equal, rounded, noisy or trained-on tensor points where the earlier one does (a cosine above 0.9);
                    of two that were trained apart the cosine is 0 +- 1/sqrt(values)
    sorted          tells a tensor whose rows or columns were permuted: the sorted values of a copy are the same to its
                    noise, those of independent tensors differ by about sqrt(2/values)

The tensors are mostly those that a permutation of heads or neurons leaves alone: embedding, head, norms. A suspect is told
of, and nothing else happens to it: who knows the scheme can disguise these values (at the price of their part of the
loss), and two honest miners who trained on from the same public model are alike too. The losses decide.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sn29.models.checkpoint import Read, Tensor, tensors_of
from sn29.records import RepoFile

BUDGET_BYTES = 64 << 10
MAX_VALUES = 4096
"""Of one tensor: 8 kB in bfloat16, 16 kB in float32. The same number whatever the data type, so that both compare."""
_DIRECTIONS = 64
_ALIKE_COSINE = 0.9
"""Seven standard deviations from what independent tensors of 64 values or more have, and less than 40 steps of training
leave: `python tests/models/test_fingerprint.py` prints what it makes of real pairs."""
_ALIKE_SORTED = 0.25
"""Of the distance that independent tensors have, sqrt(2 / values), at most."""
_FEWEST_ALIKE = 2
"""Tensors that must be alike, and at least a quarter of those that both have: one could be a public tokenizer's embedding."""

Numbers = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True, slots=True)
class TensorPrint:
    """What is kept of one tensor's first values."""

    num_values: int
    norm: float
    """Root mean square."""
    spread: float
    """Root mean square without the mean; 0 for values that are all the same, which tell nothing."""
    plain: tuple[float, ...]
    """Projections of the values without their mean, scaled to length 1, as they stand."""
    ordered: tuple[float, ...]
    """The same of the values sorted."""


Fingerprint = Mapping[str, TensorPrint]
"""By tensor."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How an earlier model's weights are those of a later one."""

    earlier: int
    """The earlier model's place in the order that was given."""
    alike: int
    """Tensors that are alike."""
    compared: int
    """Tensors that could be compared."""
    difference: float
    """Of the values of the alike tensors, relative; the median, of two middle ones the larger. 0: equal."""

    def __str__(self) -> str:
        return f"{self.alike} of {self.compared} tensors are alike, to {self.difference:.2%}"


# --- taking -----------------------------------------------------------------------------------------------------------


def take(files: Sequence[RepoFile], read: Read, num_layers: int) -> Fingerprint:
    """The fingerprint of inspected files. Reads the headers once more, then at most BUDGET_BYTES, one span a tensor.

    A span has no hash: a bit that the line flips can hide a likeness, or feign one. Raises what `read` raises, and
    Rejected as `checkpoint.tensors_of`.
    """
    places = tensors_of(files, read)
    found, left = {}, BUDGET_BYTES
    for name in _chosen(places, num_layers):
        path, start, tensor = places[name]
        count = min(math.prod(tensor.shape), MAX_VALUES)
        num_bytes = count * _WIDTH[tensor.dtype]
        if num_bytes > left:
            continue
        left -= num_bytes
        found[name] = print_of(_values(read(path, start, num_bytes), tensor))
    return found


def _chosen(names: Iterable[str], num_layers: int) -> list[str]:
    """The tensors to read, the most telling first: each family calls them otherwise."""
    middle, last = num_layers // 2, num_layers - 1
    wanted = (
        r"model\.embed_tokens\.weight",
        rf"model\.layers\.{middle}\.input_layernorm\.weight",
        r"lm_head\.weight",
        rf"model\.layers\.{middle}\.self_attn\.(o_proj|dense)\.weight",
        rf"model\.layers\.{middle}\.mlp\.(down_proj|fc2)\.weight",
        r"model\.(norm|final_layernorm)\.weight",
        rf"model\.layers\.{last}\.self_attn\.(q_proj|qkv_proj)\.weight",
        rf"model\.layers\.{last}\.mlp\.(up_proj|gate_up_proj|fc1)\.weight",
        rf"model\.layers\.{last}\.input_layernorm\.weight",
    )
    found = (next((name for name in names if re.fullmatch(pattern, name)), None) for pattern in wanted)
    return list(dict.fromkeys(name for name in found if name is not None))


_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}


def _values(data: bytes, tensor: Tensor) -> Numbers:
    """The values as float64; what is not finite as 0: the evaluation refuses it."""
    if tensor.dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[tensor.dtype])
    found: Numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return found


def print_of(values: Numbers) -> TensorPrint:
    """Of one tensor's first values."""
    centred = values - values.mean()
    norm, spread = (float(np.sqrt(np.mean(each**2))) for each in (values, centred))
    if spread <= 1e-6 * norm:
        return TensorPrint(len(values), norm, 0.0, (), ())
    unit = centred / (spread * math.sqrt(len(values)))
    return TensorPrint(len(values), norm, spread, _projected(unit), _projected(np.sort(unit)))


def _projected(unit: Numbers) -> tuple[float, ...]:
    return tuple(round(float(x), 5) for x in _directions()[:, : len(unit)] @ unit)


@cache
def _directions() -> Numbers:
    """[directions, values] of +1 and -1, the same on every machine and with every version of numpy."""
    bits = hashlib.shake_256(b"sn29 fingerprint 1").digest(_DIRECTIONS * MAX_VALUES // 8)
    signs = np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(_DIRECTIONS, MAX_VALUES)
    return 2.0 * signs - 1.0


# --- comparing --------------------------------------------------------------------------------------------------------


def likenesses(prints: Sequence[Fingerprint]) -> list[Likeness | None]:
    """For each fingerprint the earlier one that it is most like, if it is like one at all. Given in claim order.

    Of equally like ones the first. 256 models take 0.3 s.
    """
    names, count = sorted({name for one in prints for name in one}), len(prints)
    compared = np.zeros((count, count), int)
    differences = np.full((len(names), count, count), np.nan)
    for name, difference in zip(names, differences, strict=True):
        for rows in _comparable(prints, name):
            ends = np.ix_(rows, rows)
            compared[ends] += 1
            difference[ends] = _differences([prints[row][name] for row in rows])
    alike = np.isfinite(differences).sum(axis=0)
    suspect = np.tril(alike >= np.maximum(_FEWEST_ALIKE, compared / 4), -1)
    ordered = np.sort(differences, axis=0)  # NaN last
    found: list[Likeness | None] = []
    for row in range(count):
        likes = []
        for earlier in map(int, np.flatnonzero(suspect[row])):
            count_alike = int(alike[row, earlier])
            median = float(ordered[count_alike // 2, row, earlier])
            likes.append(Likeness(earlier, count_alike, int(compared[row, earlier]), round(median, 4)))
        found.append(min(likes, key=lambda one: (-one.alike / one.compared, one.difference, one.earlier), default=None))
    return found


def _comparable(prints: Sequence[Fingerprint], name: str) -> Iterable[list[int]]:
    """Rows whose tensor of this name was read to the same length and tells something."""
    by_length: dict[int, list[int]] = {}
    for row, one in enumerate(prints):
        if name in one and one[name].spread > 0:
            by_length.setdefault(one[name].num_values, []).append(row)
    return by_length.values()


def _differences(tensors: Sequence[TensorPrint]) -> Numbers:
    """[n, n] relative differences of tensors that are alike, as they stand or sorted; NaN for the others."""
    plain = _distances(np.array([tensor.plain for tensor in tensors]))
    ordered = _distances(np.array([tensor.ordered for tensor in tensors]))
    permuted = np.where(ordered <= _ALIKE_SORTED * math.sqrt(2 / tensors[0].num_values), ordered, np.nan)
    turned = np.where(plain <= math.sqrt(2 - 2 * _ALIKE_COSINE), plain, permuted)
    norms, spreads = (np.array([getattr(tensor, part) for tensor in tensors]) for part in ("norm", "spread"))
    stretched = np.subtract.outer(spreads, spreads)
    found: Numbers = np.sqrt(stretched**2 + np.outer(spreads, spreads) * turned**2) / np.maximum.outer(norms, norms)
    return found


def _distances(projected: Numbers) -> Numbers:
    """[n, n] distances of unit vectors, estimated from their projections."""
    squares = (projected**2).sum(axis=1)
    found: Numbers = np.sqrt(np.maximum(squares[:, None] + squares - 2 * projected @ projected.T, 0) / _DIRECTIONS)
    return found


# --- as text ----------------------------------------------------------------------------------------------------------


def encode(fingerprint: Fingerprint) -> str:
    return json.dumps({name: [t.num_values, t.norm, t.spread, t.plain, t.ordered] for name, t in fingerprint.items()})


def decode(text: str) -> Fingerprint:
    """What `encode` wrote."""
    return {
        name: TensorPrint(count, norm, spread, tuple(plain), tuple(ordered))
        for name, (count, norm, spread, plain, ordered) in json.loads(text).items()
    }
