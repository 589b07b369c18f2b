"""`sn29 lab grow`: what it writes, what it refuses, and what it plans."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sn29.cli import main
from sn29.errors import Reason
from sn29.hub import Hub
from sn29.lab.grow import more_tokens
from sn29.lab.losses import change, document_nats
from sn29.lab.weights import Card, open_weights, save
from sn29.lab_commands.grow import NewTokens, Verdict, judged
from sn29.localnet.hub import LoopbackHub
from sn29.models import checkpoint

Model = Callable[..., Path]
COMPETITIONS = Path(__file__).resolve().parents[1] / "competitions"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("text")
    pq.write_table(pa.table({"text": [f"Document {n} says the number {n * n}." * 3 for n in range(12)]}), folder / "a.parquet")
    return folder


def test_a_larger_model_with_its_card(model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = model(), tmp_path / "grown"
    words = f"lab grow {source} --layers 4 --intermediate 96 --hidden 48 --heads 6 --out {out} --text {text} --documents 5"
    assert main(shlex.split(words)) == 0
    said = capsys.readouterr().out
    assert "Layers: 2 to 4" in said
    assert "at most 1e-05 either way" in said
    config = open_weights(out).config
    assert [config.number(name) for name in ("num_hidden_layers", "intermediate_size", "hidden_size")] == [4, 96, 48]
    card = (out / "README.md").read_text()
    for expected in (source.name, words, "Layers: 2 to 4", "Hidden size: 32 to 48", "5 documents", "| relative change |"):
        assert expected in card
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("grown*")) == ["grown"]
    checkpoint.load(out, dtype=torch.float32)


def test_the_same_command_gives_the_same_bits(model: Model, text: Path, tmp_path: Path):
    source = model()
    for name in ("one", "two"):
        words = f"lab grow {source} --to 60000 --noise 0.1 --seed 3 --out {tmp_path / name} --text {text} --documents 3"
        assert main(shlex.split(words)) == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    assert 0.995 * 60_000 <= open_weights(tmp_path / "one").num_parameters <= 60_000


def test_json_says_what_was_measured(model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = f"lab grow {model()} --vocab 330 --out {tmp_path / 'out'} --text {text} --documents 4 --json"
    assert main(shlex.split(words)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["vocab_size"] == 330
    loss, new = found["loss"], found["loss"]["new_tokens"]
    assert loss["is_met"]
    assert loss["change"]["largest"] < 1e-6  # among the old tokens
    assert 0 < new["mean"] <= new["largest"] <= new["bound"] * 1.001
    assert new["bound"] == pytest.approx(math.log(1.1))


def test_a_broken_model_does_not_pass_for_one_with_new_tokens(model: Model, tmp_path: Path):
    """MLPs that write nothing move the loss by less than 30 of 300 tokens may take; among the old tokens it shows."""
    source = model()
    base = open_weights(source)
    grown = more_tokens(base, 330)
    whole = grown.weights.read

    def read(name: str) -> torch.Tensor:
        return whole(name) * (0.0 if "down_proj" in name else 1.0)

    save(grown.weights, tmp_path / "sound", Card("", [], [], "", []))
    save(replace(grown.weights, read=read), tmp_path / "broken", Card("", [], [], "", []))
    ids = [[(7 * n + m) % 300 for n in range(40)] for m in range(5)]
    before = document_nats(source, ids)
    sound, broken = (judged(tmp_path / name, before, ids, base, grown, 0.0, "text") for name in ("sound", "broken"))
    assert sound.is_met
    assert not broken.is_met
    assert broken.new_tokens is not None
    allowance = broken.new_tokens.bound * broken.tokens / broken.change.before
    assert abs(broken.change.relative) < allowance


def test_changes_of_documents_do_not_cancel():
    """100 + 100 nats and 100.1 + 99.9: the sum stays, each document moves by 1e-3."""
    found = Verdict(change([100.0, 100.0], [100.1, 99.9]), 20, 2, "text", 1e-4, None)
    assert found.change.relative == pytest.approx(0.0, abs=1e-12)
    assert not found.is_met
    assert "in one document by 1.00e-03" in found.found
    assert replace(found, limit=1.1e-3).is_met


def test_a_new_token_may_take_no_more_than_is_stated():
    same = change([100.0], [100.0])
    assert Verdict(same, 10, 1, "text", 1e-5, NewTokens(0.05, 0.1, 0.1)).is_met
    assert not Verdict(same, 10, 1, "text", 1e-5, NewTokens(0.05, 0.11, 0.1)).is_met


def test_a_claim_that_does_not_hold_leaves_nothing(model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Plain copies change the function: without a limit that is said, with one it is refused, and no folder is left."""
    words = f"lab grow {model()} --layers 3 --place copies --out {tmp_path / 'out'} --text {text} --documents 3"
    assert main(shlex.split(words + " --limit 1e-9")) == 1
    said = capsys.readouterr().err
    assert "at most 1e-09" in said
    assert Reason.CLAIM.sentence in said
    assert main(shlex.split(words + " --limit 1e-9 --json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["loss"]["is_met"]
    assert found["loss"]["relative"] != 0
    assert found["model"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert main(shlex.split(words)) == 0
    assert "another function" in capsys.readouterr().out


def test_a_model_read_layer_by_layer_is_measured_alike(
    model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    """With less memory than all weights need: the same nats to the bit."""
    source, found = model(hidden_size=256, intermediate_size=1024, num_hidden_layers=6), []
    for memory in ("0", "0.06"):  # GB; all at once take 0.072 and 0.080, two layers 0.054
        words = f"lab grow {source} --layers 8 --out {tmp_path / f'out{memory}'} --text {text} --documents 3 --memory {memory}"
        assert main(shlex.split(words + " --max-tokens 64 --threads 1 --json")) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    assert found[0] == found[1]


REFUSED = {
    "nothing": ("{model} --out {out}", "nothing to grow"),
    "no model": ("--layers 3 --out {out}", "no MODEL"),
    "no out": ("{model} --layers 3", "no --out"),
    "both": ("{model} --to 1e6 --layers 3 --out {out}", "--to and --layers"),
    "fewer": ("{model} --layers 1 --out {out}", "at least the 2"),
    "not a number": ("{model} --layers 3 --after x --out {out}", "--after"),
    "there": ("{model} --layers 3 --out {model}", "which is there"),
    "no such model": ("{out} --layers 3 --out {out}", "NAMESPACE/NAME@REVISION"),
    "no such competition": ("{model} --schedule c99 --competitions.dir {competitions}", "c99"),
    "another family": ("{model} --schedule c01 --competitions.dir {competitions}", "PhiForCausalLM, Phi3ForCausalLM"),
    "smaller": ("{model} --to 100 --dry-run", "at most 100"),
    "too large": ("{model} --to 60e12 --dry-run", "--to: "),
    "nothing more": ("{model} --layers 2 --intermediate 64 --out {out}", "has this already"),
    "no more under it": ("{model} --to {parameters} --dry-run", "has this already"),
    "the current folder": ("{model} --layers 3 --out .", "."),
    "the root": ("{model} --layers 3 --out /", "by its name"),
    "nobody's home": ("~nouser-of-sn29/x --layers 3 --out {out}", "~nouser-of-sn29/x"),
    "nobody's config": ("~nouser-of-sn29/x --layers 3 --dry-run", "~nouser-of-sn29/x"),
    "mlp of a recipe": ("{model} --to 1e6 --mlp split --out {out}", "--mlp without effect"),
    "mlp alone": ("{model} --layers 3 --mlp split --out {out}", "--mlp without effect"),
    "places of a recipe": ("{model} --to 1e6 --after 1 --out {out}", "--after without effect"),
    "place without layers": ("{model} --intermediate 99 --place top --out {out}", "--place without effect"),
    "noise on copies": ("{model} --layers 3 --place copies --noise 0.1 --out {out}", "--noise without effect"),
    "noise on random": ("{model} --intermediate 99 --noise 0.1 --out {out}", "--noise without effect"),
    "limit of a plan": ("{model} --layers 3 --limit 0.1 --dry-run", "--limit without effect"),
    "cost of a model": ("{model} --layers 3 --optimizer sgd --out {out}", "--optimizer without effect"),
    "a dry schedule": ("{model} --schedule c01 --dry-run --out {out}", "--dry-run without effect"),
    "a picture of nothing": ("{model} --layers 3 --dry-run --picture {out}", "--picture without effect"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    words, said = REFUSED[case]
    folder = model()
    own = open_weights(folder).num_parameters
    filled = words.format(model=folder, out=tmp_path / "out", competitions=COMPETITIONS, parameters=own)
    assert main(["lab", "grow", *shlex.split(filled)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0]
    assert len(lines) == 2  # and what to do
    assert list(tmp_path.glob("out*")) == []


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    """A config.json of 3.9B parameters, and nothing else."""
    fields = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
        "intermediate_size": 8448, "num_hidden_layers": 32, "num_attention_heads": 32, "bos_token_id": 1,
    }  # fmt: skip
    path = tmp_path / "phi3.json"
    path.write_text(json.dumps(fields))
    return path


def test_a_plan_from_a_config_alone(phi3: Path, capsys: pytest.CaptureFixture[str]):
    assert main(shlex.split(f"lab grow {phi3} --to 6.9e9 --dry-run")) == 0
    assert "6,875,304,960" in capsys.readouterr().out
    assert main(shlex.split(f"lab grow {phi3} --to 6.9e9 --dry-run --json")) == 0
    before, after = json.loads(capsys.readouterr().out)["models"]
    assert before["parameters"] == 3_896_577_024
    assert after["config"]["num_hidden_layers"] == 51


def test_a_plan_reads_a_config_and_nothing_else(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A folder with only that, and a repository whose weights are not fetched."""
    source, alone = model(), tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source / "config.json", alone)
    assert main(shlex.split(f"lab grow {alone} --layers 4 --dry-run --json")) == 0
    expected = json.loads(capsys.readouterr().out)["models"]
    with LoopbackHub(tmp_path / "hub") as served:
        owner = Hub(served.endpoint, served.add_user("ann"))
        owner.create("ann/model")
        owner.upload("ann/model", source, message="model")
        place = f"--hub.endpoint {served.endpoint} --lab.dir {tmp_path / 'work'}"
        assert main(shlex.split(f"lab grow ann/model@main --layers 4 --dry-run --json {place}")) == 0
    assert json.loads(capsys.readouterr().out)["models"] == expected
    assert not (tmp_path / "work").exists()


def test_a_miner_on_the_ramp_is_planned_for(phi3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With 5.05e9 parameters: the limits up to 4.9e9 are passed over, and that is said."""
    fields = {**json.loads(phi3.read_text()), "num_hidden_layers": 42}
    phi3.write_text(json.dumps(fields))
    words = f"lab grow {phi3} --schedule c01 --competitions.dir {COMPETITIONS} --picture {tmp_path / 'ramp.svg'}"
    assert main(shlex.split(words + " --json")) == 0
    out, said = capsys.readouterr()
    assert [step["budget"] for step in json.loads(out)] == [5_150_000_000 + 250_000_000 * n for n in range(8)]
    assert "5 of 13 limits are passed over" in said
    drawn = (tmp_path / "ramp.svg").read_text()
    assert "from block" in drawn
    assert "billions of parameters" in drawn
    phi3.write_text(json.dumps({**fields, "num_hidden_layers": 64}))
    assert main(shlex.split(words)) == 1
    assert "at most 6,900,000,000" in capsys.readouterr().err


def test_names_in_brackets_are_no_markup(model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(text, tmp_path / "[/x]")
    words = f"lab grow {model()} --layers 3 --out '{tmp_path}/out[/x]/y' --text '{tmp_path}/[/x]' --documents 2"
    assert main(shlex.split(words)) == 0
    assert "out[/x]/y" in capsys.readouterr().out


def test_the_steps_of_the_ramp_with_a_config_each(phi3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """c01's file raises limits.parameters from 3.9e9 to 6.9e9 in steps of 0.25e9 from block 10,080,000 on."""
    words = f"lab grow {phi3} --schedule c01 --competitions.dir {COMPETITIONS} --out {tmp_path / 'steps'}"
    assert main(shlex.split(f"{words} --picture {tmp_path}/none/a.svg")) == 1
    assert "none/a.svg" in capsys.readouterr().err
    assert not (tmp_path / "steps").exists(), "the same command with another place for the picture is not refused"
    assert main(shlex.split(words)) == 0
    table = capsys.readouterr().out
    assert "10,281,600" in table
    assert "6,875,304,960" in table
    assert main(shlex.split(words.replace("/steps", "/again") + " --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["budget"] for step in found] == [3_900_000_000 + 250_000_000 * n for n in range(13)]
    assert [step["block"] for step in found][:3] == [0, 10_096_800, 10_113_600]
    assert all(step["parameters"] <= step["budget"] and step["unused"] <= 0.005 for step in found)
    assert all(step["training_bytes"] > 0 and step["flops_per_token"] > 0 for step in found)
    folders = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert folders[0] == "01-3.90B"
    assert folders[-1] == "13-6.90B"
    last = json.loads((tmp_path / "steps" / "13-6.90B" / "config.json").read_text())
    assert last == found[-1]["config"]
