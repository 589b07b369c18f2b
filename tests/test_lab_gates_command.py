"""`sn29 lab gates`: what it tells, what it draws, and what it writes when gates are recycled."""

import json
import shutil
import xml.etree.ElementTree as ET

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sn29.cli import main
from sn29.models import checkpoint
from sn29.models.config import parse_config


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
    asked = words(planted, text, "--tolerance", "0.0001", "--recycle", str(out), "--picture", str(picture))
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (pair,) = told["sets"]
    assert {tuple(gate) for gate in pair["gates"]} == {(1, 5), (1, 40)}
    assert pair["zero"]["percent"] > 15 > 5 > max(pair["alone"])
    assert pair["zero"]["interval"]["low"] < pair["zero"]["percent"] < pair["zero"]["interval"]["high"]
    assert told["tokens"] == [3 * 32, 6 * 32]
    assert set(range(0, 64, 2)) <= set(told["dead"]["gates"]["0"])
    assert told["recycled"]["gates"] == told["dead"]["count"] >= 32
    assert told["recycled"]["difference"] <= 1e-5
    assert told["recycled"]["change"]["percent"] == pytest.approx(told["dead"]["change"]["percent"], abs=1e-4)
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
    for heading in ("set (layer: gates)", "one gate", "candidates", "do nothing"):
        assert heading in shown
    assert "of 128 gates" in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max-tokens", "64"), "0 of 13 documents with 64 tokens"),
        (("--documents", "40"), "12 of 13 documents with 32 tokens"),
        (("--device", "cuda"), "sees no GPU"),
        (("--top", "0"), "greater than or equal to 1"),
        (("--text", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_with_both_values(planted, text, more, said, tmp_path, capsys):
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "out"
    assert main(words(planted, text, "--recycle", str(out), *more)) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_not_free_is_refused_before_anything_is_computed(planted, text, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert main(words(planted, text, "--recycle", str(tmp_path / "out"))) == 1
    assert "which is there" in capsys.readouterr().err
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_a_model_is_needed(capsys):
    assert main(["lab", "gates"]) == 1
    assert "no MODEL" in capsys.readouterr().err
