"""`sn29 forecast` as a miner runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from test_forecast import CHAMPION, WORSE, record_in, recorded  # noqa: F401  (one of them is a fixture)
from test_round import WINDOW, Subnet, subnet  # noqa: F401

from sn29 import record_files
from sn29.chances import Chance
from sn29.cli import main
from sn29.errors import Reason, Rejected
from sn29.explain import DUEL, Comparison, Prospect
from sn29.forecast import Forecast
from sn29.forecast_command import as_json, told
from sn29.records import Head, Window

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(subnet: Subnet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: F811
    """run(checkpoint, records, *flags) -> (exit status, standard output, standard error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(subnet.folder / "cache"))

    def ran(checkpoint: object, records: object, *flags: str) -> tuple[int, str, str]:
        folder = str(subnet.folder / "competitions")
        common = ["--competition", "c00", "--competitions.dir", folder, "--hub.endpoint", subnet.hub.endpoint, "--threads", "1"]
        given = ["--records", str(records)] if records else []
        status = main(["forecast", str(checkpoint), *common, *given, *flags])
        said = capsys.readouterr()
        return status, said.out, said.err

    return ran


def test_a_published_model_is_fetched_and_its_answer_is_json_with_a_status(run, recorded, model, subnet):  # noqa: F811
    recorded(CHAMPION, good=model(seed=3), bad=model(seed=4, initializer_range=WORSE))
    other = subnet.publish("other", model(seed=5, initializer_range=WORSE))
    status, out, _ = run(other.model, subnet.folder / "state", "--json", "--fail-below", "0.5", "--windows", "5")
    answer = json.loads(out)
    assert status == 3
    assert (answer["accepted"], answer["probability"], answer["holder"]) == (True, 0.0, subnet.hotkey("good"))
    assert len(answer["chances"]) == 5
    assert answer["prospect"]["wins_at"] is None
    assert (answer["now"], answer["first_window"]) == (WINDOW, 2 * WINDOW)


def test_a_refused_model_is_told_every_reason_and_nothing_is_evaluated(run, recorded, model, subnet, tmp_path):  # noqa: F811
    empty = tmp_path / "nothing"
    empty.mkdir()
    bad = model(seed=5, num_hidden_layers=8)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    (bad / "modeling.py").write_text("")
    status, out, _ = run(bad, empty, "--json")
    answer = json.loads(out)
    assert (status, answer["accepted"]) == (1, False)
    assert [r["reason"] for r in answer["refusals"]] == ["forbidden_file", "bad_config", "parameters"]
    status, out, _ = run(bad, empty)
    assert status == 1
    assert out.count("what to do: ") == 3


def test_what_cannot_be_known_is_said_with_status_2(run, recorded, model, subnet):  # noqa: F811
    records = recorded(CHAMPION, good=model(seed=3))
    record = record_in(records)
    kept = record.competitions["c00"]
    models = tuple(replace(m, outcome=replace(m.outcome, status="unavailable"), losses=(), unscored=()) for m in kept.models)
    alone = record_files.write(subnet.folder / "alone", replace(record, competitions={"c00": replace(kept, models=models)}))
    status, _, err = run(model(seed=5), alone)
    assert status == 2
    assert "nothing is known, try again" in err
    status, out, _ = run(model(seed=5), alone, "--json")
    assert (status, json.loads(out)["accepted"]) == (2, None)


def test_what_no_record_says_is_no_certainty(run, model, tmp_path):
    """The only file is half a record: it is passed over, and told."""
    half = tmp_path / "records" / f"720-{'0' * 16}.json"
    half.parent.mkdir()
    half.write_text('{"schema"')
    folder = model(seed=5)
    status, out, _ = run(folder, half.parent)
    assert status == 0
    assert "no record says who is there" in out
    assert "warning: a record was passed over" in out
    assert half.name in out
    status, out, _ = run(folder, half.parent, "--json", "--fail-below", "0.1")
    assert (status, json.loads(out)["probability"]) == (3, None)
    status, out, err = run(folder, half)
    assert (status, out) == (1, "")
    assert half.name in err


@pytest.mark.parametrize(
    ("checkpoint", "records", "flags", "said"),
    [
        ("nowhere", "there", (), "nowhere"),
        ("there", None, (), "--records"),
        ("there", "nowhere", (), "which is not there"),
        ("there", "there", ("--competition", "c77"), "c77"),
        ("there", "there", ("--fail-below", "1.5"), "--fail-below"),
        ("no/name@" + "0" * 39 + "!", "there", (), "0!"),
    ],
    ids=["folder", "no-records", "records", "competition", "probability", "revision"],
)
def test_bad_input_is_one_line_that_names_it(run, tmp_path, checkpoint, records, flags, said):
    (tmp_path / "there").mkdir()
    at = tmp_path / checkpoint if "/" not in checkpoint else checkpoint
    status, out, err = run(at, tmp_path / records if records else None, *flags)
    assert (status, out) == (2 if "--fail-below" in flags else 1, ""), "a value that its flag never takes is wrong usage"
    assert said in err
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in err


def some_forecast() -> Forecast:
    against = Comparison("ann", 1500, -0.0015, -0.004, 0.001, DUEL, needed=0.0005)
    prospect = Prospect("ann", against, 0.004, 12_200, "", 9_000)
    window = Window("c00", 5, Head(1800, "0x" + "a" * 64))
    odds = tuple(Chance(k / 20, k / 40, min(1.0, k / 10)) for k in range(20))
    return Forecast(
        "c00", "champion", None, (), 5_000, 5_040, odds, "ann", against, prospect, window, 1500, 1234.5, ("something",)
    )  # fmt: skip


def test_the_lines_say_verdict_interval_what_is_missing_and_the_date():
    lines = told(some_forecast(), datetime(2027, 2, 1, tzinfo=UTC))
    assert lines[0] == (
        "c00: would be accepted, and win with a probability of 0% in the first window, within 20 windows 95% (48% to 100%)"
    )
    assert "  within 10 windows 45.0% (22.5% to 90.0%)" in lines
    assert any("0.15 % lower than ann's (-0.10 % to 0.40 %, anytime-valid confidence sequence)" in line for line in lines)
    assert any("must be lower by 0.050 %" in line and "it remains to be shown" in line for line in lines)
    assert any("by decay of the advantage alone it wins at block 12,200, in 1.0 days" in line for line in lines)
    assert any("about 2027-02-02 00:00 UTC" in line for line in lines)  # 7,200 blocks of 12 s
    assert lines[-1] == "  warning: something"
    short = replace(some_forecast(), against=replace(some_forecast().against, mean=0.001))
    assert any("0.15 % are missing" in line for line in told(short, None))


def test_the_json_holds_all_of_it_and_no_number_that_json_does_not_know():
    found = replace(some_forecast(), nats_per_sample=float("nan"), refusals=(Rejected(Reason.FAMILY, "a", "b", "c"),))
    answer = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert answer["nats_per_sample"] is None
    assert answer["refusals"][0]["reason"] == "family"
    assert answer["wins_by_decay_in_s"] == 7200 * 12
    assert (answer["accepted"], answer["missing"]) == (False, 0.0)
