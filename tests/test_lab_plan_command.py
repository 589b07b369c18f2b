"""`sn29 lab plan`: what it tells of sizes, configs and the Hub's, measured and published, and how it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from sn29.cli import main
from sn29.hub import Hub
from sn29.lab.plan import Compared
from sn29.lab.published import Published
from sn29.lab_commands.plan import _published_verdict
from sn29.localnet.hub import LoopbackHub

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
PARAMETERS = 2 * 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder of which only config.json is there: nothing else is read."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "tiny"


def told(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    assert main(["lab", "plan", *words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["lab", "plan", *words]) == (2 if "-1" in words else 1), "a value that its flag never takes is wrong usage"
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = told(capsys, str(folder), "--devices", "4xh100", "--mfu", "0.3", "--price", "2", "--tokens", "1e9")
    assert (found["name"], found["parameters"]) == ("tiny", PARAMETERS)
    plan = found["plan"]
    assert plan["fits"]
    assert plan["mfu"] == pytest.approx(0.3)
    assert plan["tokens_per_second"] == pytest.approx(0.3 * 4 * 989e12 / found["operations"]["total"])
    assert plan["days"] == pytest.approx(1e9 / plan["tokens_per_second"] / 86_400)
    assert plan["cost"] == pytest.approx(plan["days"] * 24 * 4 * 2)
    assert plan["memory_total"] == pytest.approx(sum(plan["memory"].values()))
    assert [each["row_tokens"] for each in found["sweep"]] == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert {each["name"] for each in found["optimizers"]} >= {"adamw", "adamw8bit", "lion", "muon", "adafactor"}


def test_a_size_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["lab", "plan", "6.9B", "--devices", "2x48GB", "--dtype", "bfloat16", "--lengths", "2048,8192"]) == 0
    out = capsys.readouterr().out
    assert "6,893,064,192 parameters" in out
    assert "DOES NOT FIT" in out
    assert "adamw8bit, adamw8bit_ao, lion, lion8bit, adafactor, muon, sgd would fit" in out
    assert main(["lab", "plan", "6.9B", "--devices", "2x48GB", "--dtype", "bfloat16", "--optimizer", "lion"]) == 0
    out = capsys.readouterr().out
    assert "--peak-tflops gives it" in out
    assert "DOES NOT FIT" not in out


def test_several_sizes_side_by_side_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    found = told(capsys, "300M", "7B", "--lengths", "512,4096,32768", "--picture", str(picture))
    small, large = ([each["slower"] for each in model["sweep"]] for model in found)
    assert small[0] == large[0] == 0
    assert small[1] < large[1] < 0
    assert small[2] < large[2]
    drawn = ET.fromstring(picture.read_text())
    assert "300M" in drawn.attrib["aria-label"]
    assert "7B" in "".join(drawn.itertext())


def test_a_model_of_the_hub(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json is all that is asked for: there is nothing else in the repository."""
    with LoopbackHub(tmp_path / "hub") as server:
        alice = Hub(server.endpoint, server.add_user("alice"))
        alice.create("alice/tiny")
        revision = alice.upload("alice/tiny", folder, message="a config")
        for name in (revision, "main"):
            (found,) = told(capsys, f"alice/tiny@{name}", "--hub.endpoint", server.endpoint)
            assert (found["name"], found["parameters"]) == (f"alice/tiny@{revision}", PARAMETERS)


MEASURE = [
    "--measure", "cpu", "--measure-lengths", "16,512", "--measure-tokens", "512", "--times", "1", "--dtype", "float32",
    "--row-tokens", "512", "--lengths", "512",
]  # fmt: skip


def test_measured_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["lab", "plan", str(folder), *MEASURE, "--devices", "here", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    measured = found["measured"]
    assert status == (0 if measured["worst"] <= 0.5 else 1)
    assert [(step["row_tokens"], step["rows"]) for step in measured["steps"]] == [(16, 32), (512, 1)]
    assert (found["job"]["devices"]["name"], found["job"]["devices"]["peak"]) == ("here", measured["matrix_rate"])
    assert found["utilisation"] == pytest.approx(measured["steps"][1]["utilisation"])
    assert "measured here" in found["utilisation_source"]
    assert found["plan"]["tokens_per_second"] == pytest.approx(512 / measured["steps"][1]["seconds"]), "as it was measured"


def test_what_was_measured_here_is_not_used_for_another_device(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["lab", "plan", str(folder), *MEASURE, "--devices", "8xh100", "--peak-tflops", "60"])
    out = capsys.readouterr().out
    assert "what was measured on cpu is not used: --devices is 8xh100" in out
    assert "40% of the peak, assumed" in out, "nor what was published of 16-bit products"
    assert "a plan without attention: 100%" in out
    assert ("pass  what longer rows add" in out) == (status == 0)
    assert ("MISS  what longer rows add" in out) == (status == 1)


def test_a_float32_peak_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = told(capsys, "6.9B", "--dtype", "float32", "--devices", "64xh100", "--lengths", "2048")
    assert (found["plan"]["tokens_per_second"], found["plan"]["days"]) == (0, None)


def test_a_step_that_is_larger_than_asked_for_is_marked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["lab", "plan", str(folder), "--batch-tokens", "1024", "--row-tokens", "256", "--lengths", "64,512"]) == 0
    out = capsys.readouterr().out
    assert "a step has 2,048 tokens: more than the 1,024 of --batch-tokens" in out
    assert "1 > step" in out
    assert "2 > step" not in out


def test_rows_beyond_the_positions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "plan", str(folder), "--row-tokens", "1024"]) == 0
    assert "warning: tiny is made for rows of 512 tokens at most" in capsys.readouterr().out
    learned = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    (folder / "config.json").write_text(json.dumps(learned))
    assert "the 512 places that tiny has learned" in refused(capsys, str(folder), "--row-tokens", "256")
    assert told(capsys, str(folder), "--row-tokens", "256", "--lengths", "256,512")[0]["remarks"] == []


def test_the_network_between_machines_is_not_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for devices, remarks in (("8xh100", 0), ("16xh100", 1)):
        assert (
            len(told(capsys, str(folder), "--devices", devices, "--lengths", "512", "--row-tokens", "512")[0]["remarks"])
            == remarks
        )


def test_published_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--published")
    assert len(found["rows"]) == 120
    assert found["mean_error"] == {
        "a100": pytest.approx(0.084, abs=0.001), "h100": pytest.approx(0.143, abs=0.001),
        "a100-40gb": pytest.approx(0.047, abs=0.001),
    }  # fmt: skip
    assert main(["lab", "plan", "--published"]) == 0
    out = capsys.readouterr().out
    assert "fitted on these rows; without it 9.3%" in out
    assert "fitted on these rows; without it 15.3%" in out
    assert "30 of 31 planned speeds are too high; rows of 8,192 and more by +20%" in out
    assert out.count("the price of long rows is understated") == 1
    assert "nothing is fitted on these rows" in out


def test_published_rows_that_are_missed_are_said_so() -> None:
    row = Published("h100", "7b", 8192, 1, False, 1000.0)
    (line, bias) = _published_verdict("h100", [Compared(row, 0.5, 0.6)], 0.3)
    assert line.startswith("MISS  h100: 20.0% off on average of 1 rows")
    assert "1 of 1 planned speeds are too high" in bias
    (line,) = _published_verdict("h100", [Compared(row, 0.5, 0.51)], 0.3)
    assert line.startswith("pass")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "no model"),
        (["huge"], "got huge"),
        (["6.9B", "--devices", "2xVoodoo"], "2xVoodoo"),
        (["6.9B", "--optimizer", "newton"], "newton"),
        (["6.9B", "--lengths", "4096,512"], "4096,512"),
        (["1K"], "1,000 parameters"),
        (["6.9B", "--rows", "-1"], "--rows"),
        (["0"], "0 parameters"),
        (["1e400"], "inf parameters"),
        (["1e30"], "1e+30 parameters"),
        (["6,9B"], "6.9B: a point"),
        (["6.9B", "--published"], "--published"),
        (["--published", "--picture", "x.svg"], "--published"),
        (["6.9B", "--measure", "cpu", "--mfu", "0.3"], "--mfu"),
        (["6.9B", "--devices", "here"], "--measure"),
        (["6.9B", "--measure", "cpu", "--measure-lengths", "2048"], "--measure-lengths"),
    ],
    ids=[
        "nothing",
        "no such model",
        "devices",
        "optimizer",
        "lengths",
        "size",
        "rows",
        "zero",
        "infinite",
        "huge",
        "comma",
        "published and a model",
        "published and a picture",
        "mfu and measure",
        "here alone",
        "one length",
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert what in refused(capsys, *words)


def test_a_config_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert "hidden_size" in refused(capsys, str(folder))
    (folder / "config.json").write_text("not json")
    assert "a JSON object" in refused(capsys, str(folder / "config.json"))
    (folder / "config.json").unlink()
    assert "without config.json" in refused(capsys, str(folder))
