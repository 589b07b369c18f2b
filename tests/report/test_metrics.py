"""What Prometheus reads, parsed by its own client."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from recorded import WINDOW, c00_text
from watched import ALICE, BOB, CAROL, DAVE, FIRST, VALIDATOR, Watched, telling, watched

from sn29 import record_files
from sn29.records import Outcome
from sn29.report.metrics import METRICS, exposition, table
from sn29.report.snapshot import ALARMS, Reader
from sn29.rules.schedule import parse_file

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
BASE_UNITS = {
    "seconds", "bytes", "block", "blocks", "epochs", "ratio", "byte", "total", "info", "up", "healthy", "alarm", "stage", "open",
    "sent", "models", "refusals", "samples", "crown", "parameters",
}  # fmt: skip


def read(state: Watched) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, values of the labels) -> value."""
    with telling(state):
        text = exposition(Reader(state.folder, rules=lambda: {"c00": parse_file("c00", c00_text("champion"))}).read())
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_everything_that_a_validator_knows_of_itself(tmp_path: Path) -> None:
    state = watched(tmp_path)
    found = read(state)
    newest = state.newest.head.block
    assert found["sn29_info", (VALIDATOR, "validator", "0.1.0")] == 1
    assert found["sn29_up", ()] == 1
    assert found["sn29_stage", ("measuring",)] == 1
    assert found["sn29_stage", ("waiting",)] == 0
    assert found["sn29_stage_progress_ratio", ()] == 0.4
    assert found["sn29_events_total", ("evaluated",)] == 2
    assert found["sn29_head_block", ()] == state.head
    assert 8 <= found["sn29_head_age_seconds", ()] < 120
    assert found["sn29_round_block", ()] == newest + WINDOW
    assert found["sn29_round_finished_block", ()] == newest
    assert found["sn29_rounds_open", ()] == 1
    assert found["sn29_weights_set_block", ("0",)] == newest + 30
    age = found["sn29_weights_set_age_blocks", ("0",)]
    assert state.head - (newest + 30) <= age <= state.head - (newest + 30) + 10
    assert found["sn29_weights_set_age_epochs", ("0",)] == age / 360
    assert found["sn29_weights_sent", ("0",)] == 1
    assert found["sn29_weights_sets_total", ("0",)] == 1
    assert {name for name, _ in found} == {m.name for m in METRICS} - {"sn29_next_change_block"}, "none is announced"


def test_what_the_newest_round_says_of_models(tmp_path: Path) -> None:
    found = read(state := watched(tmp_path))
    kept = state.newest.competitions["c00"]
    assert {labels: value for (name, labels), value in found.items() if name == "sn29_crown"} == {
        ("c00", ALICE): 1, ("c00", BOB): 0, ("c00", CAROL): 0, ("c00", DAVE): 0,
    }  # fmt: skip
    assert found["sn29_models", ("c00", "evaluated")] == 4
    assert found["sn29_models", ("c00", "rejected")] == 1
    assert found["sn29_models", ("", "rejected")] == 1
    assert found["sn29_refusals", ("c00", "parameters")] == 1
    assert found["sn29_samples", ("c00",)] == len(kept.samples)
    bits = {h: found["sn29_model_bits_per_byte", ("c00", h)] for h in (ALICE, BOB, CAROL, DAVE)}
    assert sorted(bits, key=lambda h: bits[h]) == [BOB, ALICE, CAROL, DAVE]
    assert found["sn29_model_weight_ratio", ("c00", ALICE)] == state.newest.weights[0].by_hotkey[ALICE]
    assert found["sn29_limit_parameters", ("c00",)] == 6.9e9


def test_alarms_are_all_told_raised_or_not(tmp_path: Path) -> None:
    watched(tmp_path)
    text = exposition(Reader(tmp_path).read()).decode()
    found = {
        s.labels["alarm"]: s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name == "sn29_alarm"
    }
    assert set(found) == set(ALARMS)
    assert (found["status_old"], found["bugs"]) == (2, 0)
    assert "sn29_up 0.0" in text


def test_a_miner_chooses_no_label(tmp_path: Path) -> None:
    """By a competition that is none, or characters that cannot be sent."""
    state = watched(tmp_path)
    newest = replace(
        state.newest,
        no_competition=tuple(
            Outcome(f"5{i:e>47}", f"mine-{i}", FIRST, "rejected", "", "", "unknown_competition", "x", "y", "z") for i in range(99)
        ),
    )
    record_files.keep_only(record_files.write(tmp_path / "records", newest))
    found = read(state)
    assert found["sn29_models", ("", "rejected")] == 99
    assert found["sn29_refusals", ("", "unknown_competition")] == 99
    assert not [labels for _, labels in found if any("mine" in label for label in labels)]


def test_the_age_at_which_weights_are_an_alarm_is_a_metric(tmp_path: Path) -> None:
    watched(tmp_path)
    assert "sn29_weights_alarm_epochs 20.0" in exposition(Reader(tmp_path, alarm_epochs=20).read()).decode()


def test_a_folder_without_anything_has_metrics_too(tmp_path: Path) -> None:
    found = list(text_string_to_metric_families(exposition(Reader(tmp_path).read()).decode()))
    assert {family.name for family in found} == {m.name.removesuffix("_total") for m in METRICS}


def test_names_are_unique_and_end_in_what_they_count() -> None:
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"sn29(_[a-z]+)+", metric.name)
        assert metric.name.rpartition("_")[2] in BASE_UNITS
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.help
        assert len(metric.help) < 120


def test_the_documented_table_is_the_table() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), (
        "write it anew: python -c 'import sn29.report.metrics as m; print(m.table())'"
    )
