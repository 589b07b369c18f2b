"""Metrics for Prometheus, all computed from one `Snapshot`, and the table that says what each is. The only import of
prometheus_client.

A name is `sn29_WHAT_UNIT`; units are seconds, bytes, blocks, epochs, bits and ratios. What is not known has no sample. Hotkeys
are labels only of models that the newest round evaluated, at most MAX_MODELS of a competition, so that series stay few.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from sn29.errors import Reason
from sn29.records import Outcome
from sn29.report.markup import printable
from sn29.report.snapshot import ALARMS, Snapshot
from sn29.rules.schedule import in_force
from sn29.telemetry import STAGES

MAX_MODELS = 20
CONTENT_TYPE = CONTENT_TYPE_LATEST

Sample = tuple[tuple[str, ...], float]
"""Values of the labels, value."""


@dataclass(frozen=True, slots=True)
class Described:
    """One metric."""

    name: str
    help: str
    samples: Callable[[Snapshot], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    kind: str = "gauge"
    """`gauge`, or `counter`, whose name ends in _total."""


def exposition(snapshot: Snapshot) -> bytes:
    """What /metrics answers."""

    class Once(Collector):
        def collect(self) -> Iterable[Metric]:
            return _families(snapshot)

    registry = CollectorRegistry()
    registry.register(Once())
    return generate_latest(registry)


def table() -> str:
    """docs/metrics.md's tables, as Markdown."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    lines += [f"| `{m.name}` | {m.kind} | {', '.join(f'`{x}`' for x in m.labels) or '–'} | {m.help} |" for m in METRICS]
    lines += ["", "| alarm | raised when |", "|---|---|", *(f"| `{name}` | {when} |" for name, when in ALARMS.items())]
    return "\n".join(lines) + "\n"


def _families(snapshot: Snapshot) -> Iterator[Metric]:
    for one in METRICS:
        if one.kind == "counter":
            family: Metric = CounterMetricFamily(one.name.removesuffix("_total"), one.help, labels=one.labels)
        else:
            family = GaugeMetricFamily(one.name, one.help, labels=one.labels)
        for values, value in one.samples(snapshot):
            family.add_metric([printable(x) for x in values], value)  # type: ignore[attr-defined]
        yield family


# --- what each is made of ---------------------------------------------------------------------------------------------


def _one(value: float | None) -> list[Sample]:
    return [] if value is None or not math.isfinite(value) else [((), float(value))]


def _info(s: Snapshot) -> list[Sample]:
    return [((s.status.version, s.status.program, s.status.hotkey), 1.0)] if s.status else []


def _alarms(s: Snapshot) -> list[Sample]:
    raised = {alarm.name: alarm.level for alarm in s.alarms}
    return [((name,), {"warning": 1.0, "critical": 2.0}.get(raised.get(name, ""), 0.0)) for name in ALARMS]


def _stages(s: Snapshot) -> list[Sample]:
    return [((name,), float(s.status.stage == name)) for name in STAGES] if s.status else []


def _stage_seconds(s: Snapshot) -> list[Sample]:
    return [((name,), s.status.stage_seconds.get(name, 0.0)) for name in STAGES] if s.status else []


def _progress(s: Snapshot) -> list[Sample]:
    return _one(s.status.done / s.status.of) if s.status and s.status.of else []


def _events(s: Snapshot) -> list[Sample]:
    return [((event,), float(count)) for event, count in sorted(s.status.counters.items())] if s.status else []


def _set_blocks(s: Snapshot) -> list[Sample]:
    published = s.facts.published.items() if s.facts else ()
    return [((str(mechanism),), float(one.stands[0])) for mechanism, one in published if one.stands]


def _set_ages(s: Snapshot, unit: float) -> list[Sample]:
    return [(labels, (s.block - block) * unit) for labels, block in _set_blocks(s)] if s.block is not None else []


def _sets(s: Snapshot) -> list[Sample]:
    published = s.facts.published.items() if s.facts else ()
    return [((str(mechanism),), float(one.num_sets)) for mechanism, one in published]


def _on_their_way(s: Snapshot) -> list[Sample]:
    published = s.facts.published.items() if s.facts else ()
    return [((str(mechanism),), float(len(one.on_its_way))) for mechanism, one in published]


def _known(outcome: Outcome, judged: Collection[str]) -> str:
    """Its competition; empty for a name that is none: a miner may write what it likes."""
    return outcome.competition if outcome.competition in judged else ""


def _outcomes(s: Snapshot) -> list[Sample]:
    if s.newest is None:
        return []
    kinds = ("evaluated", "rejected", "waiting", "unavailable")
    judged = s.newest.record.competitions
    found = Counter((_known(o, judged), o.status) for o in s.newest.outcomes)
    names = dict.fromkeys([*judged, *(name for name, _ in found)])
    return [((name, status), float(found[name, status])) for name in names for status in kinds]


def _refusals(s: Snapshot) -> list[Sample]:
    if s.newest is None:
        return []
    codes = {reason.code for reason in Reason}
    rejected = [o for o in s.newest.outcomes if o.status == "rejected" and o.reason in codes]
    found = Counter((_known(o, s.newest.record.competitions), o.reason) for o in rejected)
    return [(labels, float(count)) for labels, count in sorted(found.items())]


def _samples(s: Snapshot) -> list[Sample]:
    kept = s.newest.record.competitions if s.newest else {}
    return [((name,), float(len(one.samples))) for name, one in sorted(kept.items())]


def _models(s: Snapshot) -> Iterator[tuple[str, str, Mapping[str, float]]]:
    """(competition, hotkey, figures by name) of the newest round, most weight first."""
    kept = s.newest.record.competitions if s.newest else {}
    for name, one in sorted(kept.items()):
        weights = s.newest.record.weights_of(name) if s.newest else {}
        scores = sorted(one.scores, key=lambda score: (-score.weight, -score.win_rate, score.hotkey))
        for place, score in enumerate(scores[:MAX_MODELS]):
            losses = one.losses.get(score.hotkey, ())
            num_bytes = sum(sample.num_bytes for sample in one.samples[: len(losses)])
            bits = math.fsum(losses) / math.log(2) / num_bytes if num_bytes else math.inf
            figures = {"share": score.weight, "win_rate": score.win_rate, "weight": weights.get(score.hotkey, 0.0), "bits": bits}
            yield name, score.hotkey, figures | {"crown": float(place == 0 and score.weight > 0)}


def _of_models(figure: str) -> Callable[[Snapshot], list[Sample]]:
    def samples(s: Snapshot) -> list[Sample]:
        return [((name, hotkey), x[figure]) for name, hotkey, x in _models(s) if math.isfinite(x[figure])]

    return samples


def _limits(s: Snapshot) -> list[Sample]:
    block = s.block or 0
    return [((name,), float(in_force(file, block).limits.parameters)) for name, file in sorted(s.files.items())]


def _changes(s: Snapshot) -> list[Sample]:
    block = s.block or 0
    coming = {name: [v.block for v in file.versions if v.block > block] for name, file in sorted(s.files.items())}
    return [((name,), float(blocks[0])) for name, blocks in coming.items() if blocks]


METRICS: tuple[Described, ...] = (
    Described("sn29_info", "1; what runs", _info, ("version", "program", "hotkey")),
    Described("sn29_up", "1 while the program writes its status, else 0", lambda s: _one(float(s.is_live))),
    Described("sn29_healthy", "0 while an alarm is critical, else 1: what /healthz says", lambda s: _one(float(s.is_healthy))),
    Described("sn29_alarm", "0: not raised, 1: a warning, 2: critical; names below", _alarms, ("alarm",)),
    Described(
        "sn29_start_time_seconds", "when the program began, since 1970", lambda s: _one(s.status.started if s.status else None)
    ),
    Described(
        "sn29_status_age_seconds",
        "since the program last wrote its status",
        lambda s: _one(s.at - s.status.updated if s.status else None),
    ),
    Described("sn29_stage", "1 for the stage that the program is at, 0 for the others", _stages, ("stage",)),
    Described(
        "sn29_stage_elapsed_seconds",
        "since the stage in hand began",
        lambda s: _one(s.at - s.status.stage_started if s.status else None),
    ),
    Described(
        "sn29_stage_progress_ratio", "done of what the stage in hand has to do, 0 to 1; none where that is not known", _progress
    ),
    Described(
        "sn29_stage_seconds_total",
        "spent in each stage since the start, without the one in hand",
        _stage_seconds,
        ("stage",),
        "counter",
    ),
    Described("sn29_events_total", "events told since the start, by name", _events, ("event",), "counter"),
    Described("sn29_head_block", "newest final block of the chain that was seen", lambda s: _one(s.head[0] if s.head else None)),
    Described("sn29_head_age_seconds", "since that block came", lambda s: _one(s.at - s.head[1] if s.head else None)),
    Described(
        "sn29_next_window_block", "seed block of the next window", lambda s: _one(s.status.next_window if s.status else None)
    ),
    Described(
        "sn29_round_block",
        "block of the round in hand; none while it waits",
        lambda s: _one(s.status.round if s.status else None),
    ),
    Described(
        "sn29_round_finished_block", "block of the newest finished round", lambda s: _one(s.finished[0] if s.finished else None)
    ),
    Described(
        "sn29_round_age_seconds",
        "since the newest round was finished",
        lambda s: _one(s.at - s.finished[1] if s.finished else None),
    ),
    Described(
        "sn29_rounds_open",
        "rounds that were opened and not finished",
        lambda s: _one(len(s.facts.open_rounds) if s.facts else None),
    ),
    Described(
        "sn29_weights_set_block", "block of our newest weight set on chain that was read back", _set_blocks, ("mechanism",)
    ),
    Described("sn29_weights_set_age_blocks", "blocks since then", lambda s: _set_ages(s, 1.0), ("mechanism",)),
    Described("sn29_weights_set_age_epochs", "epochs since then", lambda s: _set_ages(s, 1 / s.epoch), ("mechanism",)),
    Described(
        "sn29_weights_alarm_epochs",
        "age from which on it is an alarm: --weights.alarm-epochs, and as long as weights wait to be revealed",
        lambda s: _one(s.patience if s.facts else None),
    ),
    Described("sn29_weights_sets_total", "weight sets on chain that were read back, ever", _sets, ("mechanism",), "counter"),
    Described("sn29_weights_sent", "sets that were sent and do not stand on chain yet", _on_their_way, ("mechanism",)),
    Described(
        "sn29_models",
        "models of the newest round by outcome; competition is empty for commitments that name none of them",
        _outcomes,
        ("competition", "status"),
    ),
    Described(
        "sn29_refusals",
        "models of the newest round that were refused, by reason: `sn29 reasons`",
        _refusals,
        ("competition", "reason"),
    ),
    Described("sn29_samples", "texts of the newest round's window", _samples, ("competition",)),
    Described("sn29_model_bits_per_byte", "loss of a model in the newest round", _of_models("bits"), ("competition", "hotkey")),
    Described(
        "sn29_model_win_rate_ratio",
        "share of its comparisons that it won, 0 to 1",
        _of_models("win_rate"),
        ("competition", "hotkey"),
    ),
    Described(
        "sn29_model_reward_ratio",
        "share of the competition's reward in the newest round, 0 to 1",
        _of_models("share"),
        ("competition", "hotkey"),
    ),
    Described(
        "sn29_model_weight_ratio",
        "weight after the newest round, as it is published, 0 to 1",
        _of_models("weight"),
        ("competition", "hotkey"),
    ),
    Described(
        "sn29_crown", "1 for the model with the largest share, 0 for the others", _of_models("crown"), ("competition", "hotkey")
    ),
    Described("sn29_limit_parameters", "parameters that a model may have now", _limits, ("competition",)),
    Described(
        "sn29_next_change_block",
        "block at which the competition's rules change next; none: no change is announced",
        _changes,
        ("competition",),
    ),
    Described(
        "sn29_disk_free_bytes", "free on the disk of the state folder", lambda s: _one(s.free_bytes if s.disk_bytes else None)
    ),
    Described("sn29_disk_size_bytes", "size of that disk", lambda s: _one(s.disk_bytes or None)),
)
"""Every metric, in the order in which they are told."""
