"""A round as the step log that operators of this subnet have sent to Weights & Biases since 2024, field by field, and when.

Names are theirs; models are by uid. `original_format_json` is the whole of it as one text, as before. What no record has is left
out: intermediate_size, and the pages of the data set, in whose place stand the ids of the samples. Losses are nats.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sn29.round_record import CompetitionRecord, ModelRecord, RoundRecord
from sn29.rules.competition import competition_of
from sn29.rules.scoring import win_matrix
from sn29.store import Store, shown_upto
from sn29.telemetry import Done, warn

MAX_HELD = 500
"""Steps, of some 100 KB to some MB each: about three weeks of rounds."""


class HeldSteps:
    """Steps that wait until the chain shows the weights of their rounds (`store.shown_upto`): others would copy them before.
    Each is a file in a folder until it is logged, so that a restart loses none."""

    def __init__(self, folder: Path, store: Store, log: Callable[[Mapping[str, Any], int, Done], None]) -> None:
        """log(values, step, done), as of `telemetry.Curves`."""
        self._folder, self._store, self._log = folder, store, log
        self._on_its_way = threading.Event()

    def hold(self, record: RoundRecord, step: Mapping[str, Any]) -> None:
        """Of more than MAX_HELD the oldest are dropped. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / "part"
        pays = any(weights.by_hotkey for weights in record.weights.values())
        part.write_text(json.dumps({"pays": pays, "step": step}, allow_nan=False), encoding="utf-8")
        part.replace(self._folder / f"{record.head.block:012d}.json")
        old = sorted(self._folder.glob("*.json"))[:-MAX_HELD]
        for path in old:
            path.unlink(missing_ok=True)
        if old:
            warn("wandb", f"more than {MAX_HELD} rounds are not logged yet: the oldest are dropped", dropped=len(old))

    def show(self) -> None:
        """Logs what may be seen by now; in the order of rounds, since Weights & Biases drops a step after a later one. So the
        next one waits until this one is known to be there; one that could not be logged is tried again.

        Raises OSError.
        """
        if self._on_its_way.is_set():
            return
        for path in sorted(self._folder.glob("*.json")):
            try:
                held = json.loads(path.read_bytes())
            except ValueError:  # cut short by a power failure
                held = None
            if held is not None:
                if held["pays"] and int(path.stem) > self._shown():
                    return
                self._on_its_way.set()
                self._log(held["step"], int(path.stem), partial(self._done, path))
                if self._on_its_way.is_set() or path.exists():  # not known yet; or it could not be logged
                    return
            path.unlink(missing_ok=True)

    def _done(self, path: Path, taken: bool) -> None:
        if taken:
            try:
                path.unlink(missing_ok=True)
            except OSError:  # it would be logged again and again: once more, by the next start, does no harm
                return
        self._on_its_way.clear()

    def _shown(self) -> float:
        theirs = self._store.taken_over()
        decided = {m: weights for m, weights in self._store.weights().items() if weights.block != theirs}
        return shown_upto(self._store.chain_seen(), [(one, self._store.last_publication(m)) for m, one in decided.items()])


def step_log(record: RoundRecord, uids: Mapping[str, int], *, now: float, step_s: float) -> dict[str, Any]:
    """What is logged of a round. uids: of the hotkeys that are registered; whoever is not has no place in it.

    now: seconds since 1970; step_s: seconds that the round took.
    """
    uid_data: dict[str, Any] = {}
    for name, kept in sorted(record.competitions.items()):
        uid_data |= _models(name, kept, record.weights_of(name), uids)
    step = {
        "timestamp": now,
        "block": record.head.block,
        "uids": sorted(map(int, uid_data)),
        "competitions": sorted(record.competitions),
        "competition_info": {name: _info(kept) for name, kept in sorted(record.competitions.items())},
        "step_time": step_s,
        "uid_data": uid_data,
    }
    return {
        "time": now,
        "block": record.head.block,
        "step_time": step_s,
        "uid_data": {uid: row["loss_sum_avg"] for uid, row in uid_data.items()},
        "weight_data": {uid: row["weight"] for uid, row in uid_data.items()},
        "original_format_json": json.dumps(step, allow_nan=False),
    }


def _info(kept: CompetitionRecord) -> dict[str, Any]:
    lengths, ids = [s.num_bytes for s in kept.samples], [s.id for s in kept.samples]
    return {"n_samples": len(ids), "sample_lengths": lengths, "samples": ids}


def _models(name: str, kept: CompetitionRecord, weights: Mapping[str, float], uids: Mapping[str, int]) -> dict[str, Any]:
    """uid as text -> everything about one evaluated model."""
    rule = competition_of(f"recorded {name}", name, {k: v for k, v in kept.parameters.items() if k != "name"}).scoring
    matrix = win_matrix(kept.losses, {m.hotkey: m.outcome.block for m in kept.models}, kept.window.seed.block, rule)
    wins = dict(zip(matrix.hotkeys, matrix.wins_with_advantage, strict=True))
    scores = {s.hotkey: s for s in kept.scores}
    rows = {}
    for model in (m for m in kept.models if m.evaluated and m.hotkey in uids):
        against = {str(uids[h]): won for h, won in zip(matrix.hotkeys, wins[model.hotkey], strict=True) if h in uids}
        rows[str(uids[model.hotkey])] = {
            "uid": uids[model.hotkey], "hotkey": model.hotkey, "label": model.outcome.model, "competition": name,
            "block": model.outcome.block, **_size(model), **_losses(model, [s.num_bytes for s in kept.samples]),
            "win_matrix_row": against, "win_total": sum(against.values()), "weight": weights.get(model.hotkey, 0.0),
        }  # fmt: skip
        if (score := scores.get(model.hotkey)) is not None:
            rows[str(uids[model.hotkey])] |= {
                "adv_factor": 100 * (1 - score.advantage), "win_rate": score.win_rate,
                "win_abs_rate": score.win_rate_without_advantage,
            }  # fmt: skip
    return rows


def _size(model: ModelRecord) -> dict[str, Any]:
    facts = model.facts
    if facts is None:
        return {}
    return {
        "n_parameters": facts.num_parameters, "n_layers": facts.num_layers, "hidden_size": facts.hidden_size,
        "embed_size": facts.vocab_size,
    }  # fmt: skip


def _losses(model: ModelRecord, num_bytes: Sequence[int]) -> dict[str, Any]:
    """Sums are of a sample, pt is per token by the model's mean tokens of a sample; an infinite loss is null and in no mean."""
    finite = [loss for loss in model.losses if loss < math.inf]
    tokens = model.num_tokens / len(finite) if finite else 0.0
    mean = sum(finite) / len(finite) if finite else None
    std = math.sqrt(sum((loss - mean) ** 2 for loss in finite) / len(finite)) if mean is not None else None
    per_token = 1 / tokens if tokens else None
    return {
        "losses": [loss if loss < math.inf else None for loss in model.losses],
        "n_samples": len(model.losses), "n_inf": len(model.losses) - len(finite),
        "avg_sample_len": sum(num_bytes[: len(model.losses)]) / max(1, len(model.losses)),
        "loss_sum_avg": mean, "loss_sum_std": std,
        "loss_pt_avg": mean * per_token if mean is not None and per_token else None,
        "loss_pt_std": std * per_token if std is not None and per_token else None,
    }  # fmt: skip
