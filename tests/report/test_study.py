"""The study's files: complete, self-contained, the same bytes each time."""

from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console

from sn29.report import study as report
from sn29.study_command import _shown
from sn29.training.packing_study import ARMS, COMPARED, CONTINUED, MODES, RATES, Run
from sn29.training.study_results import VIEWS, Study, questions, studied

PARTS = ("single", "single_eos", "single_eos_first", "packed_rest", "packed_first", "packed_end")
HEAD = {
    "plan": {
        "tokens": 2_000_000, "device": "cpu", "layers": 2, "hidden": 64, "vocabulary": 2048, "batch_tokens": 2048,
        "row_tokens": 512, "learning_rate": 0.008,
    },
    "parameters": 361_280, "text": "<b>a&b</b>", "revision": "0" * 64, "tokenizer": "1" * 64, "versions": {"torch": "2.13"},
    "documents": {"training": {"documents": 100, "tokens": 30_000, "tokens_after_cut": 24_700}},
    "flags": "--size tiny", "compute_tokens": {"packed": 2_000_000, "unpacked": 2_150_000, "masked": 2_170_000},
}  # fmt: skip


def result(run: Run) -> dict[str, object]:
    """Numbers that differ by arm and seed, of two documents of eight tokens."""
    level = 30.0 + list(ARMS).index(run.arm) + 0.3 * run.seed
    places = {
        view: {"nats": [level / 10, level / 5, level / 2], "tokens": [2, 4, 8]} for view in ("single", "single_eos", "packed")
    }
    curve = [{"tokens": 500_000.0 * n, "held_out": {"single": level / n, "single_eos": level / n}} for n in (1, 2, 3, 4)]
    return {
        "run": {"kind": run.kind, "arm": run.arm, "seed": run.seed}, "steps": 10, "tokens": 2_000_000, "through": 2_100_000,
        "flop": 3 * 10**12, "seconds": 120.0 + run.seed, "curve": curve,
        "evaluation": {
            "nats": {part: [level, level + 1 + n] for n, part in enumerate(PARTS)},
            "tokens": {part: [8, 8] for part in PARTS}, "places": places,
        },
    }  # fmt: skip


def whole_study(seeds: int = 2) -> Study:
    runs = [Run("tokens", arm, seed) for arm in ARMS for seed in range(seeds)]
    runs += [Run("continued", arm, seed) for arm in CONTINUED for seed in range(seeds)]
    runs += [Run("compute", arm, seed) for arm in COMPARED if arm != "packed" for seed in range(seeds)]
    runs += [Run(kind, arm, 0) for kind in RATES for arm in MODES]
    results: dict[tuple[str, str], dict[int, object]] = {}
    for run in runs:
        results.setdefault((run.kind, run.arm), {})[run.seed] = result(run)
    head = {**HEAD, "compute_tokens": {**HEAD["compute_tokens"], "unpacked+start": 2_150_000, "masked+start": 2_170_000}}
    return studied(head, results)


def test_a_whole_study_answers_every_question_in_every_file():
    study = whole_study()
    made, page = report.markdown(study), report.html(study)
    for question in questions():
        assert f"| {question.asks} |" in made
        assert question.asks in page
    for arm in ARMS:
        assert f"| {arm} |" in made
    assert made.count("\n## ") == 13
    assert "sn29 study packing --size tiny --seeds 2" in made


def test_the_files_are_the_same_bytes_each_time():
    first, second = whole_study(), whole_study()
    for write in (report.markdown, report.comma_separated, report.html, report.picture):
        assert write(first) == write(second)


def test_the_page_is_self_contained_and_escapes_what_it_is_given():
    page = report.html(whole_study())
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "<b>a&b</b>" not in page
    assert "&lt;b&gt;a&amp;b&lt;/b&gt;" in page
    assert page.count("<svg") == 7
    assert page.count("<table") == 12
    assert page.count("<tr") == page.count("</tr>")


def test_the_csv_has_every_number_with_its_intervals():
    study = whole_study()
    rows = list(csv.DictReader(io.StringIO(report.comma_separated(study))))
    assert len({len(row) for row in rows}) == 1
    losses = {(row["kind"], row["arm"], row["read"]): row for row in rows if row["what"] == "loss"}
    assert len(losses) == len(study.cells) == (7 + 5 + 4) * len(VIEWS)
    found = [row for row in rows if row["what"] == "difference"]
    assert len(found) == len(questions())
    for row, d in zip(found, study.differences, strict=True):
        assert float(row["value"]) == pytest.approx(d.percent, rel=1e-5)
        if d.question.group == "learning rate":  # of the first seed only
            assert row["seeds_low"] == row["seeds_high"] == ""
        else:
            assert float(row["seeds_low"]) <= float(row["value"]) <= float(row["seeds_high"])
        assert float(row["documents_low"]) <= float(row["documents_high"])
    assert sum(row["what"] == "difference of a seed" for row in rows) == sum(len(d.seeds) for d in study.differences)


def test_the_command_names_seeds_that_do_not_follow_each_other():
    study = studied(HEAD, {("tokens", "packed"): {seed: result(Run("tokens", "packed", seed)) for seed in (0, 1, 5)}})
    small = "sn29 study packing --size tiny"
    assert report.command(study) == f"{small} --seeds 2 && {small} --seeds 1 --first-seed 5"


def test_the_tables_of_losses_and_answers_fit_a_screen_of_80_characters():
    """With losses below 10, differences below 10 % and up to 10 seeds."""
    console = Console(width=80)
    wide = console.options.update(max_width=1000)
    for table in report.tables(whole_study()):
        if not table.title.startswith("By place"):
            assert console.measure(_shown(table), options=wide).minimum <= 80, table.title
        if table.title.startswith("Losses"):
            assert console.measure(_shown(table), options=wide).maximum <= 80, table.title


def test_throughput_without_packed_is_a_dash():
    study = studied(HEAD, {("tokens", "masked"): {0: result(Run("tokens", "masked", 0))}})
    assert "| – |" in report.markdown(study)


def test_one_seed_has_no_interval_over_seeds_and_says_so():
    study = whole_study(seeds=1)
    made = report.markdown(study)
    assert "| – |" in made
    assert "1 seed" in made
    report.html(study)


def test_a_study_that_has_just_begun_has_a_report():
    study = studied(HEAD, {("tokens", "packed"): {3: result(Run("tokens", "packed", 3))}})
    made = report.markdown(study)
    assert "--seeds 1 --first-seed 3" in made
    assert "<svg" not in report.html(study)
    assert report.picture(study) == ""
    assert "| packed |" in made
