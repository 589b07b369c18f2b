"""`sn29 lab gates`: what it tells, what it draws, and what it writes when gates are recycled."""

import json
import os
import shutil
import xml.etree.ElementTree as ET

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sn29.cli import main
from sn29.models import checkpoint
from sn29.models.config import parse_config
from sn29.report import pictures


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """12 texts of 60 characters and one that is too short."""
    folder = tmp_path_factory.mktemp("text")
    texts = [f"text {n} of the twelve: {chr(97 + n) * 8} and {n * 7919} the other things" for n in range(12)]
    pq.write_table(pa.table({"text": [*texts, "short"]}), folder / "texts.parquet")
    return folder


@pytest.fixture
def planted(model):
    """A Phi in which gates 5 and 40 of the last layer make the bytes of ASCII likely, and the first layer's even ones nothing."""
    folder = model(family="PhiForCausalLM", vocab_size=300)
    loaded = checkpoint.load(folder, dtype=torch.float32)
    with torch.no_grad():
        loaded.lm_head.weight[:258, 3] = -1.5
        loaded.lm_head.weight[[*range(0, 94), *range(220, 230), 256, 257], 3] = 1.5
        last, first = loaded.model.layers[1].mlp, loaded.model.layers[0].mlp
        for gate in (5, 40):
            last.fc1.weight[gate] = 0
            last.fc1.bias[gate] = 5.0
            last.fc2.weight[:, gate] = 0
            last.fc2.weight[3, gate] = 4.0
        first.fc2.weight[:, ::2] = 0
    tokenizer = (folder / "tokenizer.json").read_bytes()
    shutil.rmtree(folder)
    loaded.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


def words(model, text, *more):
    return [
        "lab", "gates", str(model), "--text", str(text), "--documents", "6", "--search-documents", "3", "--max-tokens", "32",
        "--top", "8", *more,
    ]  # fmt: skip


def test_sets_and_dead_gates_are_told_drawn_and_recycled(planted, text, tmp_path, capsys):
    picture, out = tmp_path / "gates.svg", tmp_path / "recycled"
    asked = words(planted, text, "--tolerance", "0", "--recycle", str(out), "--picture", str(picture))
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (pair,) = told["sets"]
    assert {tuple(gate) for gate in pair["gates"]} == {(1, 5), (1, 40)}
    assert pair["zero"]["percent"] > 15 > 5 > max(pair["alone"])
    assert pair["zero"]["interval"]["low"] < pair["zero"]["percent"] < pair["zero"]["interval"]["high"]
    assert told["tokens"] == [3 * 32, 6 * 32]
    assert told["dead"]["gates"] == {"0": [*range(0, 64, 2)]}
    assert told["recycled"]["gates"] == told["dead"]["count"] == 32
    assert told["recycled"]["proof"]["difference"] == told["recycled"]["proof"]["change"]["percent"] == 0
    drawn = ET.parse(picture).getroot()
    assert "5 + 40" in "".join(drawn.itertext()).replace("40 + 5", "5 + 40")

    assert parse_config((out / "config.json").read_bytes()).family == "PhiForCausalLM"
    assert (out / "tokenizer.json").read_bytes() == (planted / "tokenizer.json").read_bytes()
    new, old = (checkpoint.load(folder, dtype=torch.float32).model.layers[0].mlp for folder in (out, planted))
    assert not torch.equal(new.fc1.weight[0], old.fc1.weight[0])
    assert not new.fc2.weight[:, ::2].any()
    card = (out / "README.md").read_text()
    assert "sn29 lab gates" in card
    assert f"{told['dead']['count']:,} gates" in card


def test_tables_name_the_gates_and_the_tokens(planted, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(words(planted, text, "--threads", "1")) == 0
    shown = capsys.readouterr().out
    assert "1: 5 40" in shown or "1: 40 5" in shown
    for heading in ("set (layer: gates)", "one gate", "candidates", "least important", "on the documents of the search"):
        assert heading in shown
    assert "of 128 gates" in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max-tokens", "64"), "0 of 13 documents with 64 tokens"),
        (("--documents", "40"), "12 of 13 documents with 32 tokens"),
        (("--device", "cuda"), "sees no GPU"),
        (("--memory", "0.001"), "1,000,000 may be used: --dtype bfloat16"),
        (("--picture", "/nowhere/gates.svg"), "/nowhere/gates.svg"),
        (("--top", "0"), "a whole number, at least 1"),
        (("--text", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_with_both_values(planted, text, more, said, tmp_path, capsys):
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "out"
    status = 2 if more[0] == "--top" else 1  # a value that its flag never takes is wrong usage
    assert main(words(planted, text, "--recycle", str(out), *more)) == status
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_not_free_is_refused_before_anything_is_computed(planted, text, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert main(words(planted, text, "--recycle", str(tmp_path / "out"))) == 1
    assert "which is there" in capsys.readouterr().err
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_in_bfloat16_it_is_proved_in_float32(planted, text, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / ".out.part-00c0ffee").mkdir()
    assert main(words(planted, text, "--dtype", "bfloat16", "--tolerance", "0", "--recycle", str(out), "--json")) == 0
    shown = capsys.readouterr()
    assert ".out.part-00c0ffee: of another run" in shown.err
    told = json.loads(shown.out)
    assert told["dead"]["gates"] == {"0": [*range(0, 64, 2)]}
    assert told["recycled"]["proof"]["difference"] == 0
    nats, coarse = told["recycled"]["proof"]["change"]["before"], told["dead"]["change"]["before"]
    assert nats != coarse
    assert nats == pytest.approx(coarse, rel=0.02)


def test_where_no_gate_is_dead_nothing_is_written(model, text, tmp_path, capsys):
    folder = model(family="PhiForCausalLM", vocab_size=300)
    assert main(words(folder, text, "--tolerance", "0", "--recycle", str(tmp_path / "out"))) == 1
    shown = capsys.readouterr()
    assert "no gate to recycle" in shown.err
    assert "no gate is shown to do nothing" in shown.out
    assert not (tmp_path / "out").exists()


def test_documents_that_are_cut_to_the_same_tokens_count_once(planted, tmp_path, capsys):
    """Else what was found would be measured on what it was found by."""
    texts = [f"/* This file is distributed under the same licence */ and differs {n}" for n in range(12)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    assert main(words(planted, tmp_path)) == 1
    assert "1 of 12 documents with 32 tokens that no other begins with" in capsys.readouterr().err


def test_a_model_that_overflows_is_refused(model, text, tmp_path, capsys):
    folder = model(family="LlamaForCausalLM", vocab_size=300)
    loaded = checkpoint.load(folder, dtype=torch.float32)
    with torch.no_grad():
        loaded.model.layers[1].mlp.gate_proj.weight[7] = 3e38
        loaded.model.layers[1].mlp.up_proj.weight[7] = 3e38
    loaded.save_pretrained(folder)
    picture, out = tmp_path / "gates.svg", tmp_path / "out"
    assert main(words(folder, text, "--recycle", str(out), "--picture", str(picture))) == 1
    assert "a loss of nan for document 1" in capsys.readouterr().err
    assert not picture.exists()
    assert not out.exists()


def test_a_loss_that_falls_is_drawn_below_zero():
    drawn = [pictures.gates([5.0, 20.0], [1.0, low], [], [0, 50, 100], [0, low, 5], [0, 9, 9], 0.5, "x") for low in (0.0, -9.0)]
    assert drawn[0] != drawn[1]
    assert "−1" in "".join(ET.fromstring(pictures.standalone(drawn[1])).itertext())
    assert "−1" not in "".join(ET.fromstring(pictures.standalone(drawn[0])).itertext())


@pytest.mark.timeout(1800)
def test_on_smollm2_the_pair_of_layer_11_is_found(capsys):
    """Minutes: the model that `tests/bench/smollm2.py` makes, with the settings and the text that are the default."""
    folder = os.environ.get("SN29_SMOLLM2")
    if not folder:
        pytest.skip("SN29_SMOLLM2 names no folder: python tests/bench/smollm2.py FOLDER makes one")
    assert main(["lab", "gates", folder, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    dearest = told["sets"][0]
    assert {tuple(gate) for gate in dearest["gates"]} == {(11, 1229), (11, 1487)}
    assert dearest["zero"]["interval"]["low"] > 30
    assert dearest["complement"]["percent"] < 5
    assert max(dearest["alone"]) < 10
    gates = [tuple(gate) for each in told["sets"] for gate in each["gates"]]
    assert len(gates) == len(set(gates))
    assert {layer for layer, _ in gates} >= {0, 2, 11, 28}
    assert told["dead"]["count"] > 0
    assert told["dead"]["does_nothing"]


def test_a_model_is_needed(capsys):
    assert main(["lab", "gates"]) == 1
    assert "no MODEL" in capsys.readouterr().err
