"""Round records for tests: decided by the real rules on made-up losses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sn29.records import Entry, Head, ModelFacts, Outcome, Window
from sn29.replay import competition_record, memory_for
from sn29.round_record import ModelRecord, RoundRecord, SampleRecord
from sn29.rules.competition import Competition, HallOfFame, parse_competition
from sn29.rules.decision import Contest, decide

REPOSITORY = Path(__file__).resolve().parents[1]
NOBODY = HallOfFame(max_fraction=0.0, decay_per_epoch=0.995, blocks_per_epoch=361, entries=())
WINDOW = 360


def c00_text(rule: str = "oldest_holder", parameters: str = "6.9e9") -> str:
    """c00.yaml for itself (all of the reward), with another scoring rule and limit."""
    text = (REPOSITORY / "competitions" / "c00.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("scoring:"))
    end = next(i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith((" ", "#")))
    text = "\n".join([*lines[:start], "scoring:", f"  rule: {rule}", "", *lines[end:]])
    text = "\n".join(line for line in text.splitlines() if not line.startswith("grace_blocks:"))
    return text.replace("reward_share: 0.5", "reward_share: 1").replace("parameters: 6.9e9", f"parameters: {parameters}")


def c00(rule: str = "oldest_holder") -> Competition:
    return parse_competition("c00", c00_text(rule))


def lengths(num_samples: int, seed: int) -> np.ndarray[Any, Any]:
    """Nats of a plain model on texts of lognormal length."""
    return 2.35 * np.exp(np.random.default_rng(seed).normal(6.0, 0.7, num_samples))


def losses(num_samples: int, seed: int, **models: tuple[float, float]) -> dict[str, tuple[float, ...]]:
    """hotkey=(shift, sd): the plain model's loss times exp(shift + sd * a standard normal of its own for each sample)."""
    plain = lengths(num_samples, seed)
    rng = np.random.default_rng([seed, 1])
    return {
        h: tuple((plain * np.exp(shift + sd * rng.standard_normal(num_samples))).tolist()) for h, (shift, sd) in models.items()
    }


def head(block: int) -> Head:
    return Head(block, "0x" + hashlib.sha256(str(block).encode()).hexdigest())


def facts(hotkey: str, num_parameters: int) -> ModelFacts:
    return ModelFacts(
        f"content of {hotkey}", f"weights of {hotkey}", "LlamaForCausalLM", num_parameters, 2 * num_parameters, 100_277, 64, 1,
        100_257, True,
    )  # fmt: skip


def model(hotkey: str, block: int, row: Sequence[float], num_parameters: int = 1_000_000) -> ModelRecord:
    outcome = Outcome(hotkey, "c00", block, "evaluated", f"{hotkey}/model@{'a' * 40}", content_id=f"content of {hotkey}")
    unscored = tuple("too_long" for x in row if x == float("inf"))
    return ModelRecord(outcome, None, "tokenizer", facts(hotkey, num_parameters), 1000, tuple(row), unscored)


def refused(hotkey: str, block: int) -> ModelRecord:
    detail = f"{hotkey}: the number of parameters is outside the competition's limits (got 9, rule at most 8)"
    return ModelRecord(
        Outcome(hotkey, "c00", block, "rejected", f"{hotkey}/model@{'b' * 40}", "", "parameters", detail, "9", "at most 8")
    )


def round_record(
    block: int,
    table: Mapping[str, Sequence[float]],
    commit_blocks: Mapping[str, int],
    *,
    rule: str = "oldest_holder",
    before: RoundRecord | None = None,
    others: Sequence[ModelRecord] = (),
    no_competition: Sequence[Outcome] = (),
    num_parameters: Mapping[str, int] | None = None,
    stopped: Mapping[str, str] = MappingProxyType({}),
) -> RoundRecord:
    """The round at `block` in which `table` was measured, following on `before`; `stopped` says why some rows are shorter."""
    competition, window = c00(rule), Window("c00", block // WINDOW, head(block))
    memory = memory_for(competition, window, before)
    entries = {hotkey: Entry(f"content of {hotkey}", commit_blocks[hotkey]) for hotkey in table}
    contest = Contest(competition, window, table, entries, memory)
    registered = sorted({*table, *(m.hotkey for m in others)})
    last = before.weights if before else {}
    decision = decide({"c00": contest}, NOBODY, last, block, registered)
    num_samples = max(map(len, table.values()))
    samples = [SampleRecord(hashlib.sha256(f"{block} {i}".encode()).hexdigest()[:32], 1000 + i) for i in range(num_samples)]
    size = num_parameters or {}
    models = [model(h, commit_blocks[h], row, size.get(h, 1_000_000)) for h, row in table.items()]
    models = [*(replace(m, stopped=stopped.get(m.hotkey, "")) for m in models), *others]
    kept = competition_record(
        contest, decision.scored["c00"], file_sha256=hashlib.sha256(c00_text(rule).encode()).hexdigest(),
        datasets={"HuggingFaceFW/fineweb-edu-score-2": "c" * 40}, samples=samples, models=models,
    )  # fmt: skip
    return RoundRecord(
        head(block), {"c00": kept}, tuple(no_competition), NOBODY.model_dump(mode="json"), tuple(registered), last,
        decision.weights, {"sn29": "0.1.0", "torch": "2.13.0"},
        {"device": "cpu", "dtype": "float32"},
    )  # fmt: skip
