"""`sn29 lab compare`: what it tells of folders with their own tokenizers, and how it refuses."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sn29.cli import main
from sn29.corpus import sample_id
from sn29.models.tokenizer import train_bpe

TEXTS = [f"number {n}: the {'same ' * (n % 7)}words, then the others. " * (1 + n % 3) for n in range(24)]
Model = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:12]}), folder / "first.parquet")
    pq.write_table(pa.table({"text": TEXTS[12:]}), folder / "second.parquet")
    return folder


@pytest.fixture
def other(model: Model) -> Path:
    """A model with a vocabulary of its own."""
    folder = model(seed=1, max_position_embeddings=256)
    (folder / "tokenizer.json").write_text(train_bpe(TEXTS, 290))
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["lab", "compare", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_tokenizers_on_two_sources(
    model: Model, other: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, picture = model(max_position_embeddings=256), tmp_path / "compared.svg"
    sources = f"{text / 'first.parquet'},{text / 'second.parquet'}"
    words = [str(one), str(other), "--text", sources, "--documents", "20", "--picture", str(picture)]
    everything = told(capsys, *words)
    found = everything["documents"]
    assert (found["documents"], found["common"], found["as_many_tokens"]) == (20, 20, False)
    assert found["sources"] == {"first.parquet": 10, "second.parquet": 10}
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"]) == (one.name, other.name)
    assert sum(group["documents"] for group in pair["by_source"]) == 20
    assert pair["total"]["percent"] == pytest.approx(100 * (found["models"][1]["nats"] / found["models"][0]["nats"] - 1))
    sums = [sum(each["nats"][n] for each in found["each"]) for n in (0, 1)]
    assert sums == pytest.approx([model["nats"] for model in found["models"]])
    assert len({each["id"] for each in found["each"]}) == 20
    assert [len(everything["models"][n][key]) for n in (0, 1) for key in ("content_id", "tokenizer")] == [64] * 4
    assert [source.partition("@")[0] for source in everything["text"]] == ["first.parquet", "second.parquet"]
    assert ET.parse(picture).getroot().tag.endswith("svg")
    assert main(["lab", "compare", *words]) == 0
    shown = capsys.readouterr().out
    assert "warning: nats per token are not comparable" in shown
    assert f"{other.name} against {one.name}" in shown
    assert "each document counting alike" in shown


def test_a_model_against_itself_differs_in_nothing(model: Model, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = model(max_position_embeddings=256)
    found = told(capsys, str(one), str(one), "--text", str(text), "--documents", "12")["documents"]
    (pair,) = found["pairs"]
    assert (pair["total"]["percent"], pair["total"]["interval"], pair["won"]) == (0.0, {"low": 0.0, "high": 0.0}, 0.5)
    assert (pair["first"], pair["second"]) == (f"{one} (1)", f"{one} (2)")
    assert found["as_many_tokens"]


def test_documents_without_a_loss_are_named(model: Model, other: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(model(max_position_embeddings=256)), str(other), "--text", str(text), "--documents", "24"]
    limited = [*words, "--max-tokens", "45"]
    found = told(capsys, *limited)["documents"]
    problems = [len(each["problems"]) for each in found["models"]]
    assert 0 < problems[1] < problems[0], "fewer tokens a byte: fewer documents too long"
    assert found["common"] == 24 - problems[0]
    assert main(["lab", "compare", *limited]) == 0
    shown = capsys.readouterr().out
    assert f"{problems[0]} too_long" in shown
    assert "has no loss under" in shown


def test_a_tokenizer_for_models_that_have_none(
    model: Model, byte_tokenizer: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, bare = model(max_position_embeddings=256), model(max_position_embeddings=256)
    (bare / "tokenizer.json").unlink()
    words = [str(one), str(bare), "--text", str(text), "--documents", "6"]
    assert told(capsys, *words, "--tokenizer", str(byte_tokenizer))["documents"]["as_many_tokens"]
    assert main(["lab", "compare", *words]) == 1
    assert "no tokenizer.json beside the model" in capsys.readouterr().err


def test_layer_by_layer_says_the_same(model: Model, other: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = {"num_hidden_layers": 10, "hidden_size": 128, "intermediate_size": 1024, "max_position_embeddings": 256}
    words = [str(model(**deep)), str(other), "--text", str(text), "--documents", "6", "--threads", "1"]
    whole, streamed = told(capsys, *words), told(capsys, *words, "--memory", "0.05")
    assert streamed == whole


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["A"], "1 models, rule at least two"),
        (["A", "B", "--documents", "0"], "--documents 0 and no --tasks"),
        (["A", "nowhere"], "nowhere"),
        (["A", "B", "--text", "nowhere"], "nowhere"),
        (["A", "TEXT"], "no config.json"),
        (["A", "B", "--text", "TEXT,TEXT"], "each source once"),
        (["A", "B", "--picture", "nowhere/x.svg"], "nowhere/x.svg: No such file"),
        (["A", "B", "--picture", "TEXT"], "a folder"),
        (["A", "B", "--tasks", "sciqq"], "piqa, sciq"),
        (["A", "B", "--max-tokens", "2"], "0 of 24 documents"),
        (["A", "B", "--tokenizer", "nowhere.json"], ""),
    ],
    ids=[
        "one",
        "nothing",
        "model",
        "text",
        "no-model",
        "text-twice",
        "picture",
        "picture-folder",
        "task",
        "too-long",
        "not-needed",
    ],
)
def test_what_cannot_be_compared(
    model: Model, other: Path, text: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    named = {"A": str(model(max_position_embeddings=256)), "B": str(other), "TEXT": str(text), "TEXT,TEXT": f"{text},{text}"}
    rest = [] if "--text" in words else ["--text", str(text)]
    status = main(["lab", "compare", *(named.get(word, word) for word in words), *rest])
    assert status == (1 if complaint else 0)
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert not (status and shown.out), "before anything is measured"


def test_a_device_that_is_not_there(model: Model, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert main(["lab", "compare", str(model()), str(model()), "--text", str(text), "--device", "cuda"]) == 1
    assert "got no CUDA device" in capsys.readouterr().err


def test_a_source_without_a_document_is_refused(model: Model, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"text": ["", "  "]}), text / "blank.parquet")
    for source in (text / "blank.parquet", f"{text / 'first.parquet'},{text / 'blank.parquet'}"):
        assert main(["lab", "compare", str(model()), str(model()), "--text", str(source)]) == 1
        assert "blank.parquet" in capsys.readouterr().err


def test_documents_come_from_all_files_of_a_source(
    model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 40 files a pass reads 16 first. A comma too many adds no source."""
    many = tmp_path / "many"
    many.mkdir()
    for n in range(40):
        pq.write_table(pa.table({"text": [f"file {n}, row {m}" for m in range(30)]}), many / f"{n:02}.parquet")
    one = model(max_position_embeddings=256)
    found = told(capsys, str(one), str(one), "--text", f"{many},", "--documents", "200")["documents"]
    assert found["sources"] == {"many": 200}
    known = {sample_id(f"file {n}, row {m}"): n for n in range(40) for m in range(30)}
    assert len({known[each["id"]] for each in found["each"]}) > 16


def test_sources_of_one_name_are_told_apart(model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other" / "text").mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"another text, number {n}" for n in range(9)]}), tmp_path / "other/text/a.parquet")
    one, words = model(max_position_embeddings=256), [str(text), str(tmp_path / "other" / "text")]
    found = told(capsys, str(one), str(one), "--text", ",".join(words), "--documents", "12")["documents"]
    assert found["sources"] == dict.fromkeys(words, 6)


def test_a_tokenizer_that_validators_refuse_is_told(model: Model, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It reads these documents without a loss, and is refused all the same."""
    one, lossy = model(max_position_embeddings=256), model(max_position_embeddings=256)
    content = json.loads((lossy / "tokenizer.json").read_text())
    (lossy / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    words = [str(one), str(lossy), "--text", str(text), "--documents", "6"]
    assert main(["lab", "compare", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"warning: validators refuse {lossy.name}: ")
    assert "6 of 6 documents" in shown
    warnings = [each["warning"] for each in told(capsys, *words)["models"]]
    assert (warnings[0], "does not give back" in warnings[1]) == ("", True)


def test_a_document_whose_loss_is_no_number_is_lost(model: Model, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finite weights, and one token whose hidden state grows beyond float32: 170 x 5.6e20 x 1e38."""
    from safetensors.torch import load_file, save_file

    one, wild = model(max_position_embeddings=256), model(max_position_embeddings=256, seed=1)
    letter = json.loads((wild / "tokenizer.json").read_text())["model"]["vocab"]["Z"]
    tensors = load_file(wild / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[letter] = 0
    embedding[letter, 0] = 10
    for name, value in (("gate", 30.0), ("up", 1e20)):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"][0] = 0
        tensors[f"model.layers.0.mlp.{name}_proj.weight"][0, 0] = value
    tensors["model.layers.0.mlp.down_proj.weight"][1, 0] = 1e38
    save_file(tensors, wild / "model.safetensors", metadata={"format": "pt"})
    pq.write_table(pa.table({"text": [*TEXTS[:11], "A Zebra"]}), text / "first.parquet")
    words = [str(one), str(wild), "--text", str(text / "first.parquet"), "--documents", "12"]
    found = told(capsys, *words)["documents"]
    ((number, problem),) = found["models"][1]["problems"]
    assert (found["common"], problem, found["models"][0]["problems"]) == (11, "not_finite", [])
    assert found["each"][number]["nats"][1] is None
    assert main(["lab", "compare", *words]) == 0
    assert f"has no loss under {wild.name}: not_finite: 'A Zebra'" in capsys.readouterr().out


def test_of_a_given_tokenizer_the_ids_that_occur_count(
    model: Model, byte_tokenizer: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """257 rows, and a tokenizer whose last id, 257, is `the`: in these documents it does not occur."""
    one, small = model(max_position_embeddings=256), model(max_position_embeddings=256, vocab_size=257)
    (small / "tokenizer.json").unlink()
    pq.write_table(pa.table({"text": [f"plain words, number {n}" for n in range(6)]}), text / "first.parquet")
    words = [str(one), str(small), "--tokenizer", str(byte_tokenizer), "--documents", "6", "--text"]
    assert told(capsys, *words, str(text / "first.parquet"))["documents"]["common"] == 6
    assert main(["lab", "compare", *words, str(text / "second.parquet")]) == 1
    assert f"{small.name}: --tokenizer: the setting is not usable (got token 257" in capsys.readouterr().err
    if importlib.util.find_spec("lm_eval") is None:
        return
    task = text / "one.jsonl"
    task.write_text('{"doc_id": 0, "idx": 0, "label": 0, "request": {"context": "so", "continuation": " the"}}')
    assert main(["lab", "compare", *words, str(text / "first.parquet"), "--tasks", str(task)]) == 1
    shown = capsys.readouterr()
    assert "got token 257" in shown.err
    assert "6 of 6 documents" in shown.out, "what is known is told before tasks run"


def test_a_tokenizer_with_more_ids_than_rows_is_refused(model: Model, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, small = model(), model(vocab_size=200)
    assert main(["lab", "compare", str(one), str(small), "--text", str(text)]) == 1
    assert "got 200 rows, rule a row for the id 257" in capsys.readouterr().err


def test_tasks_of_a_file(model: Model, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"doc_id": n, "idx": i, "label": n % 2, "request": {"context": f"Question: {n}?\nAnswer:", "continuation": answer}}
        for n in range(12)
        for i, answer in enumerate((" the one", " another"))
    ]
    path = tmp_path / "colours.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    words = [str(model(max_position_embeddings=256)), str(other), "--documents", "0", "--limit", "11", "--tasks", str(path)]
    if importlib.util.find_spec("lm_eval") is None:
        assert main(["lab", "compare", *words]) == 1
        assert "pip install 'sn29[tasks]'" in capsys.readouterr().err
        return
    found = told(capsys, *words)
    ((task,),) = (pair["results"] for pair in found["tasks"])
    assert (found["documents"], task["task"], task["items"]) == (None, "colours", 11)
    assert 0 <= task["accuracy"]["first"] <= 1
    assert task["interval"]["low"] <= task["percent"] <= task["interval"]["high"]
    assert main(["lab", "compare", *words]) == 0
    assert "colours, by bytes" in capsys.readouterr().out
    limited = told(capsys, *words, "--max-tokens", "2")
    assert limited["tasks"][0]["results"] == [task], "a limit of documents"


def test_task_files_have_names_of_their_own(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    line = {"doc_id": 0, "idx": 0, "label": ["b"], "request": {"context": "a", "continuation": " b"}}
    for name in ("piqa", "sciq"):
        (tmp_path / name / "rc_0shot").mkdir(parents=True)
        (tmp_path / name / "rc_0shot" / "requests.jsonl").write_text(json.dumps(line))
    one, files = str(model()), [str(path) for path in sorted(tmp_path.glob("*/rc_0shot/requests.jsonl"))]
    found = told(capsys, one, one, "--documents", "0", "--tasks", ",".join(files))
    assert [task["task"] for task in found["tasks"][0]["results"]] == ["piqa/rc_0shot", "sciq/rc_0shot"]


def test_a_task_name_that_occurs_twice_is_refused(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").touch()
    (tmp_path / "x.json").touch()
    tasks = f"{tmp_path / 'x.jsonl'},{tmp_path / 'x.json'}"
    assert main(["lab", "compare", str(model()), str(model()), "--documents", "0", "--tasks", tasks]) == 1
    shown = capsys.readouterr().err
    assert "x.jsonl and " in shown
    assert "rule one task of the name x" in shown
