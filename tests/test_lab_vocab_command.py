"""`sn29 lab vocab stats` and `prune`: what they tell, what they write, and how they refuse."""

from __future__ import annotations

import json
import random
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sn29.cli import main
from sn29.errors import Reason, Rejected
from sn29.lab.pruning import Rows, rows_of, with_rows
from sn29.lab.vocabulary import Vocabulary, without_the_rest
from sn29.lab.weights import Card, Weights, open_weights, save, with_config
from sn29.lab_commands.prune import Work, _is_drawn, prepared
from sn29.lab_settings import LabVocabPruneSettings
from sn29.models import checkpoint
from sn29.models.tokenizer import Tokenizer, train_bpe
from sn29.settings import read

Told = Callable[..., Any]


def sentences(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    stock = ["".join(chance.choices(["ba", "ne", "tor", "il", "qu", "ast"], k=chance.randrange(1, 4))) for _ in range(120)]
    return [f"{n} " + " ".join(chance.choices(stock, [1 / (r + 1) for r in range(120)], k=14)) for n in range(count)]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of 400 entries, of which a text as those below uses a part."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_text(train_bpe(sentences(1, 400), 400))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """60 documents of the commonest words."""
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": [" ".join(sentence.split()[:9]) for sentence in sentences(1, 60)]}), path, row_group_size=20)
    return path


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], vocabulary: Path, tmp_path: Path) -> Callable[..., Path]:
    """folder(family, **config) -> a model with 420 rows and the tokenizer."""

    def make(family: str = "LlamaForCausalLM", **config: Any) -> Path:
        given = {"vocab_size": 420, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 410, **config}
        found = shutil.copytree(make_checkpoint(family, **given), tmp_path / "model")
        shutil.copy(vocabulary, found / "tokenizer.json")
        return found

    return make


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def run(*words: object, command: str) -> Any:
        assert main(["lab", "vocab", command, *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


QUICK = ("--held-out", 10, "--documents", 6, "--random-texts", 60)


def test_stats_of_a_text(text: Path, vocabulary: Path, folder: Callable[..., Path], told: Told) -> None:
    model = folder()
    found = told(text, "--model", model, command="stats")
    counted = {id_ for ids in Tokenizer.load(vocabulary).encode_batch(pq.read_table(text)["text"].to_pylist()) for id_ in ids}
    assert (found["documents"], found["types"], found["added"], found["seen"]) == (60, 399, 1, len(counted))
    assert found["never"] == 399 - len(counted)
    held = {each["what"]: each for each in found["held"]}
    total = open_weights(model).num_parameters
    assert held["all rows"]["parameters"] == 420 * 2 * 32
    assert held["never seen"]["share"] == pytest.approx(found["never"] * 64 / total)
    assert held["rows without an entry"]["rows"] == 20
    assert found["prunable"] + found["needed"] == found["never"]


def test_stats_of_a_config_alone_and_of_a_model_that_is_thought_of(
    text: Path, vocabulary: Path, folder: Callable[..., Path], told: Told
) -> None:
    model = folder(tie_word_embeddings=True)
    (model / "model.safetensors").unlink()
    (found, other) = (
        told(text, "--tokenizer", vocabulary, *words, command="stats")["held"][0]
        for words in (("--model", model / "config.json"), ("--hidden-size", 100, "--parameters", 1e6))
    )
    assert found["parameters"] == 420 * 32
    assert (other["rows"], other["parameters"], other["share"]) == (400, 80_000, 0.08)


def test_stats_as_tables_and_picture(
    text: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["lab", "vocab", "stats", str(text), "--tokenizer", str(vocabulary), "--picture", str(tmp_path / "curve.svg")]
    assert main([*words, "--max-documents", "40"]) == 0
    shown = capsys.readouterr().out
    for part in ("40 documents", "399 types", "never seen", "97.6 %", "parts of a character", "may go together"):
        assert part in shown
    assert ET.parse(tmp_path / "curve.svg").getroot().tag.endswith("svg")
    assert "% never seen" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"])
def test_a_pruned_model_is_whole_and_says_what_was_done(
    family: str, text: Path, folder: Callable[..., Path], tmp_path: Path, told: Told
) -> None:
    model = folder(family, tie_word_embeddings=family == "LlamaForCausalLM")
    found = told(model, "--out", tmp_path / "small", "--text", text, *QUICK, command="prune")
    entries, rows = found["entries"], found["rows"]
    assert entries["after"] < entries["before"] == 400
    assert (rows["before"], rows["after"]) == (420, entries["after"] + 1), "and the padding's row, which has no entry"
    assert sum(found["stays"].values()) == entries["after"]
    proof = found["proof"]
    assert proof["counted"]["unchanged"] == proof["counted"]["documents"] == 60 - proof["held_out"]["documents"]
    assert 0 < proof["held_out"]["documents"] <= 10
    assert proof["losses"]["error"] < 1e-6
    assert proof["losses"]["effect"]["percent"] < 0
    assert proof["random"]["texts"] == 60 + 2 * (400 - entries["after"]), "and what went, alone and in pairs"
    assert proof["losses"]["effect"]["documents"] == proof["losses"]["documents"]
    # what a validator asks for
    small = tmp_path / "small"
    facts = checkpoint.inspect(checkpoint.local_listing(small), checkpoint.local_reader(small))
    assert (facts.vocab_size, facts.num_parameters) == (rows["after"], found["parameters"]["after"])
    vocabulary, tokenizer = Vocabulary.read(small / "tokenizer.json")
    tokenizer.check_lossless()
    assert tokenizer.largest_id() < facts.vocab_size
    assert (proof["fingerprint"], len(vocabulary)) == (tokenizer.fingerprint(), entries["after"])
    config = json.loads((small / "config.json").read_bytes())
    assert (config["bos_token_id"], config["pad_token_id"]) == (vocabulary.ids["<|endoftext|>"], entries["after"])
    checkpoint.load(small, dtype=torch.float32)
    card = (small / "README.md").read_text()
    assert f"lab vocab prune {model}" in card
    assert proof["fingerprint"] in card


@pytest.mark.parametrize("how", ["mlp", "layers"])
def test_freed_parameters_are_spent_again(how: str, text: Path, folder: Callable[..., Path], tmp_path: Path, told: Told) -> None:
    model = folder()
    found = told(model, "--out", tmp_path / "grown", "--text", text, *QUICK, "--reinvest", how, command="prune")
    counts = found["parameters"]
    assert counts["pruned"] < counts["after"] <= counts["before"]
    assert counts["after"] >= 0.995 * counts["before"]
    assert counts["after"] - counts["pruned"] >= 0.9 * (counts["before"] - counts["pruned"])
    assert found["reinvested"]["step"]["largest"] <= 1e-5
    assert open_weights(tmp_path / "grown").num_parameters == counts["after"]
    assert "MLP width" in (tmp_path / "grown" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown", "model", "text.parquet"]


def test_rare_tokens_words_to_keep_and_a_round_number_of_rows(
    text: Path, folder: Callable[..., Path], tmp_path: Path, told: Told
) -> None:
    model = folder()
    (tmp_path / "keep.txt").write_text("quastquast torilne\n")
    few = told(model, "--out", tmp_path / "few", "--text", text, *QUICK, "--min-count", 5, command="prune")
    assert few["proof"]["counted"]["unchanged"] < few["proof"]["counted"]["documents"], "rare tokens were in the text itself"
    assert few["proof"]["counted"]["broken"] == 0
    proof = few["proof"]
    assert (proof["on_counted"]["documents"], proof["on_held_out"]["documents"]) == (6, 3)
    assert 0 < proof["recut_counted"]["documents"] <= 6
    recut = sum(proof[name]["documents"] for name in ("recut_counted", "recut_held_out") if proof[name])
    assert proof["losses"]["documents"] == 9 - recut
    card = (tmp_path / "few" / "README.md").read_text()
    for part in (
        "uses less than 5 times",
        "less than 5 times |",
        "counted documents that are cut otherwise",
        "too few documents",
    ):
        assert part in card
    words = ("--min-count", 5, "--keep", tmp_path / "keep.txt", "--multiple", 32)
    kept = told(model, "--out", tmp_path / "kept", "--text", text, *QUICK, *words, command="prune")
    assert kept["stays"]["listed"] > 0
    assert kept["rows"]["after"] % 32 == 0
    assert kept["rows"]["after"] > kept["entries"]["after"] > few["entries"]["after"]


def test_what_counted_documents_cost_is_shown_without_held_out_ones(
    text: Path, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    words = (folder(), "--out", tmp_path / "few", "--text", text, "--held-out", 0, "--documents", 12, "--random-texts", 20)
    assert main(["lab", "vocab", "prune", *map(str, words), "--min-count", "5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "loss of 12 counted documents" in shown
    assert "counted documents that are cut otherwise" in shown
    assert "held-out" not in shown


def test_tokens_that_only_other_files_name_keep_their_rows(
    text: Path, folder: Callable[..., Path], vocabulary: Path, tmp_path: Path, told: Told
) -> None:
    """Padding that is an entry like others for tokenizer.json: without its row, transformers would number it behind the last."""
    from transformers import AutoTokenizer

    model = folder()
    content = json.loads(vocabulary.read_bytes())
    content["model"]["vocab"] |= {"[PAD]": 400, "<|im_end|>": 401}
    (model / "tokenizer.json").write_text(json.dumps(content))
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"400": {"content": "[PAD]", **flags}, "401": {"content": "<|im_end|>", **flags}},
    }  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    (model / "added_tokens.json").write_text('{"[PAD]": 400}')
    found = told(model, "--out", tmp_path / "small", "--text", text, *QUICK, command="prune")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert max(tokenizer.get_vocab().values()) < found["rows"]["after"] < 420
    old = open_weights(model).read("model.embed_tokens.weight")
    new = open_weights(tmp_path / "small").read("model.embed_tokens.weight")
    for token, id_ in (("[PAD]", tokenizer.pad_token_id), ("<|im_end|>", tokenizer.eos_token_id)):
        assert torch.equal(new[id_], old[content["model"]["vocab"][token]])
    assert json.loads((tmp_path / "small" / "added_tokens.json").read_bytes()) == {"[PAD]": tokenizer.pad_token_id}


def test_documents_that_are_cut_otherwise_are_no_longer_than_others(
    text: Path, folder: Callable[..., Path], tmp_path: Path, told: Told
) -> None:
    """Documents of some 120 tokens, of which the first 16 are measured, whether they are cut as before or not."""
    long = tmp_path / "long.parquet"
    documents = [" ".join([*document.split()] * 12) for document in pq.read_table(text)["text"].to_pylist()]
    pq.write_table(pa.table({"text": documents}), long)
    words = ("--text", long, "--documents", 40, "--random-texts", 20, "--min-count", 36, "--max-tokens", 16)
    found = told(folder(), "--out", tmp_path / "small", *words, command="prune")["proof"]
    tokens = found["counted"]["tokens_before"] / found["counted"]["documents"]
    assert tokens > 100
    assert found["recut_counted"] is not None
    assert found["recut_counted"]["before"] / found["recut_counted"]["documents"] < 16 * 10, "nats; all tokens have some 700"
    assert "up to 16 tokens" in (tmp_path / "small" / "README.md").read_text()


def test_a_corpus_of_one_document_is_counted(text: Path, folder: Callable[..., Path], tmp_path: Path, told: Told) -> None:
    model = folder()
    drawn = next(one for one in pq.read_table(text)["text"].to_pylist() if _is_drawn(one))
    pq.write_table(pa.table({"text": [drawn]}), tmp_path / "one.parquet")
    found = told(model, "--out", tmp_path / "small", "--text", tmp_path / "one.parquet", *QUICK, command="prune")
    assert (found["text"]["documents"], found["proof"]["held_out"], found["proof"]["on_held_out"]) == (1, None, None)


def test_files_that_stay_behind_are_named(text: Path, folder: Callable[..., Path], tmp_path: Path, told: Told) -> None:
    model = folder()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "merges.txt").write_text("")
    found = told(model, "--out", tmp_path / "small", "--text", text, *QUICK, command="prune")
    assert found["not_taken"] == ["chat_template.jinja", "merges.txt"]
    assert "chat_template.jinja, merges.txt" in (tmp_path / "small" / "README.md").read_text()


def test_prune_as_a_table(text: Path, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lab", "vocab", "prune", str(folder()), "--out", str(tmp_path / "small"), "--text", str(text), *map(str, QUICK)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for part in ("counted documents cut as before", "renormalisation", "held-out", f"The model: {tmp_path / 'small'}"):
        assert part in " ".join(shown.split())


def test_nothing_is_written_when_a_proof_fails(
    text: Path, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head so large that float32 has no loss: every part before the loss is well, and the folder does not come to be."""
    model = folder(tie_word_embeddings=False)
    weights = open_weights(model)

    def read(name: str) -> torch.Tensor:
        found = weights.read(name)
        return torch.full_like(found, 3e38) if name in ("lm_head.weight", "model.norm.weight") else found

    large = tmp_path / "large"
    save(Weights(weights.config, weights.raw, weights.dtypes, read), large, Card("t", (), (), "c", ()), beside=model)
    before = sorted(path.name for path in tmp_path.iterdir())
    for more in ((), ("--reinvest", "mlp")):
        words = [
            "lab",
            "vocab",
            "prune",
            str(large),
            "--out",
            str(tmp_path / "new"),
            "--text",
            str(text),
            *map(str, QUICK),
            *more,
        ]
        assert main(words) == 1
        assert "losses are not finite" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_text_that_comes_back_otherwise_fails_the_proof(
    text: Path, folder: Callable[..., Path], vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The decoder knows Q by the entry ZZ alone, which no document uses: spelled Z and Z it stays what it is."""
    model = folder()
    content = json.loads(vocabulary.read_bytes())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "Q"}, "content": "ZZ"}
    known = {"type": "Replace", "pattern": {"String": "ZZ"}, "content": "Q"}
    content["decoder"] = {"type": "Sequence", "decoders": [known, content["decoder"]]}
    content["model"]["vocab"]["ZZ"] = 400
    content["model"]["merges"].append(["Z", "Z"])
    (model / "tokenizer.json").write_text(json.dumps(content))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["lab", "vocab", "prune", str(model), "--out", str(tmp_path / "new"), "--text", str(text), *map(str, QUICK)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "texts come back otherwise" in said
    assert "what the command claims of its result was measured, and does not hold" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def without_ancestors(work: Work) -> Work:
    pruned = without_the_rest(work.vocabulary, work.stays.entries - work.stays.ancestors)
    rows = rows_of(pruned, work.old.config, {0, 410})
    return replace(work, pruned=pruned, rows=rows, new=with_rows(work.old, rows))


def other_rows(work: Work) -> Work:
    (*others, a, b) = work.rows.old
    return replace(work, new=with_rows(work.old, Rows((*others, b, a), work.rows.of)))


def rows_of_others(work: Work) -> Work:
    (*others, a, b, padding) = work.rows.old
    rows = Rows((*others, b, a, padding), work.rows.of)
    return replace(work, rows=rows, new=with_rows(work.old, rows))


def other_config(work: Work) -> Work:
    config, raw = with_config(work.new.raw, {"rms_norm_eps": 0.1})
    return replace(work, new=replace(work.new, config=config, raw=raw))


@pytest.mark.parametrize("reinvest", ["nothing", "mlp"])
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without_ancestors, "documents cut otherwise"), (other_rows, "another model.embed_tokens.weight"),
        (rows_of_others, "another row for"), (other_config, "new loss = old loss"),
    ],
    ids=["segmentation", "tensors", "rows", "identity"],
)  # fmt: skip
def test_each_proof_fails_on_what_is_wrong(
    spoil: Callable[[Work], Work], complaint: str, reinvest: str, text: Path, folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = folder()
    words = [str(model), "--out", str(tmp_path / "new"), "--text", str(text), *map(str, QUICK), "--reinvest", reinvest]
    work = prepared(read(LabVocabPruneSettings, words), words)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Rejected, match=complaint) as failed:
        spoil(work).write()
    assert failed.value.reason is Reason.CLAIM
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_lines_to_keep_are_part_of_the_proof(text: Path, folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("quastquast torilne\n\n")
    words = [str(folder()), "--out", str(tmp_path / "new"), "--text", str(text), "--keep", str(tmp_path / "keep.txt")]
    work = prepared(read(LabVocabPruneSettings, [*words, "--min-count", "5"]), words)
    assert work.text.lines == ("quastquast torilne",)
    pruned = without_the_rest(work.vocabulary, work.stays.entries - {max(work.stays.listed, key=len)})
    rows = rows_of(pruned, work.old.config, {0, 410})
    with pytest.raises(Rejected, match="1 of 1 lines of --keep cut otherwise"):
        replace(work, pruned=pruned, rows=rows).write()


def test_what_is_too_little_to_be_spent_is_not_said_to_be(
    text: Path, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some hundred rows of 64 parameters are less than a neuron in each of many layers, and than 0.5 % of a wide model."""
    model = folder(num_hidden_layers=100, intermediate_size=512)
    words = [str(model), "--out", str(tmp_path / "new"), "--text", str(text), *map(str, QUICK), "--reinvest", "mlp"]
    assert main(["lab", "vocab", "prune", *words]) == 1
    assert "freed parameters spent" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "no MODEL"),
        (("MODEL",), "no --out"),
        (("MODEL", "--out", "MODEL"), "a new folder, or an empty one"),
        (("MODEL", "--out", "MODEL/tokenizer.json/new", "--text", "nowhere"), "Not a directory"),
        (("MODEL", "--out", "new", "--keep", "nowhere"), "--keep"),
        (("MODEL", "--out", "new", "--text", "nowhere"), "--text"),
        (("MODEL", "--out", "new", "--tokenizer", "MODEL/config.json"), "tokenizer"),
        (("MODEL", "--out", "new", "--multiple", "0"), "--multiple"),
        (("MODEL", "--out", "new", "--multiple", "500"), "at most the 420 rows that there were"),
    ],
    ids=["nothing", "no-out", "taken", "no-folder", "keep", "text", "tokenizer", "multiple", "too-large-a-multiple"],
)
def test_what_prune_cannot_do_is_said_in_a_line(
    words: tuple[str, ...],
    complaint: str,
    text: Path,
    folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = folder()
    given = [str(tmp_path / word) if word == "new" else word.replace("MODEL", str(model)) for word in words]
    more = [] if "--text" in given else ["--text", str(text)]
    status = 2 if words[-2:] == ("--multiple", "0") else 1  # a value that its flag never takes is wrong usage
    assert main(["lab", "vocab", "prune", *given, *more]) == status
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("generation_config.json", "[1]", "generation_config.json"), ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("added_tokens.json", "[1, 2]", "added_tokens.json"),
        ("generation_config.json", '{"pad_token_id": 420}', "an id below the old embedding's rows"),
    ],
    ids=["list", "empty-list", "tokens", "stale"],
)  # fmt: skip
def test_files_beside_the_model_are_refused_in_a_line(
    file: str,
    content: str,
    complaint: str,
    text: Path,
    folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = folder()
    (model / file).write_text(content)
    assert main(["lab", "vocab", "prune", str(model), "--out", str(tmp_path / "new"), "--text", str(text)]) == 1
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_a_model_with_fewer_rows_than_ids_is_refused(
    text: Path, folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder(vocab_size=399, pad_token_id=0)
    for words in (
        ["prune", str(model), "--out", str(tmp_path / "new"), "--text", str(text)],
        ["stats", str(text), "--model", str(model)],
    ):
        assert main(["lab", "vocab", *words]) == 1
        assert "at least" in capsys.readouterr().err
