"""What the lab's commands read: models with files that are none of theirs, tokenizers, documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sn29.errors import Reason, Rejected
from sn29.hub import Hub
from sn29.lab.weights import open_weights
from sn29.lab_commands import inputs
from sn29.localnet.hub import LoopbackHub
from sn29.models import checkpoint

NOWHERE = "http://127.0.0.1:9"


def test_a_folder_is_taken_as_it_is(model: Callable[..., Path], tmp_path: Path):
    source = model()
    assert inputs.model_folder(str(source), NOWHERE, tmp_path) == (source, source.name)


def test_foreign_files_of_a_folder_are_passed_over(model: Callable[..., Path], tmp_path: Path):
    """A chat template, another framework's weights, a folder: a validator refuses them, and they are no part of the model."""
    source = model()
    digest = checkpoint.tensor_digest(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")
    with pytest.raises(Rejected):
        open_weights(source)
    folder, name = inputs.model_folder(str(source), NOWHERE, tmp_path)
    assert name == source.name
    assert open_weights(folder).num_parameters > 0
    assert checkpoint.tensor_digest(folder) == digest
    assert sorted(path.name for path in source.iterdir())[0] == "chat_template.jinja"  # nothing was touched


def test_a_revision_of_the_hub_is_fetched_once(model: Callable[..., Path], tmp_path: Path):
    """By its commit or by a branch, without the files that are no part of it; what is fetched once needs no second look."""
    source = model()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    with LoopbackHub(tmp_path / "hub") as served:
        owner = Hub(served.endpoint, served.add_user("ann"))
        owner.create("ann/model")
        revision = owner.upload("ann/model", source, message="model")
        for asked in ("ann/model@main", f"ann/model@{revision}"):
            folder, name = inputs.model_folder(asked, served.endpoint, tmp_path / "work")
            assert name == f"ann/model@{revision}"
            assert folder == tmp_path / "work" / "starts" / revision
    assert checkpoint.tensor_digest(folder) == checkpoint.tensor_digest(source)
    assert not (folder / "chat_template.jinja").exists()
    assert (folder / "tokenizer.json").exists()


def test_what_is_no_model_is_named(tmp_path: Path):
    with pytest.raises(Rejected, match="NAMESPACE/NAME@REVISION") as error:
        inputs.model_folder(str(tmp_path / "none"), NOWHERE, tmp_path)
    assert error.value.reason is Reason.SETTING
    with pytest.raises(Rejected, match=r"tokenizer\.json beside the model"):
        inputs.tokenizer_of(tmp_path)


def test_documents_as_text_and_tokens(byte_tokenizer: Path, tmp_path: Path):
    """Once each, cut at the limit, the same ones in the same order for the same seed."""
    texts = ["the first", "the second one", "the first", "", "a third", "the fourth document"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    tokenizer = inputs.tokenizer_of(tmp_path, byte_tokenizer)
    found = inputs.documents(str(tmp_path), NOWHERE, tokenizer, 0, 4)
    assert sorted(text for text, _ in found) == sorted({*texts} - {""})
    assert all(ids == tokenizer.encode(text)[:4] for text, ids in found)
    three = inputs.documents(str(tmp_path), NOWHERE, tokenizer, 3)
    assert three == inputs.documents(str(tmp_path), NOWHERE, tokenizer, 3)
    assert three != inputs.documents(str(tmp_path), NOWHERE, tokenizer, 3, seed=30)
    assert all(ids == tokenizer.encode(text) for text, ids in three)
    assert {text for text, _ in three} < {*texts}
    with pytest.raises(Rejected, match="--text"):
        inputs.documents(str(tmp_path / "none"), NOWHERE, tokenizer, 1)


def test_a_picture_is_whole_and_touches_nothing_beside_it(tmp_path: Path):
    (tmp_path / "a.svg.part").write_text("mine")
    for said in ("one", "two"):
        inputs.write_picture(tmp_path / "a.svg", said)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.svg": "two", "a.svg.part": "mine"}


@pytest.mark.parametrize("place", ["/", ".", "{here}", "{here}/none/a.svg", "{here}/file/a.svg"])
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(Rejected, match="a file that can be written") as error:
        inputs.write_picture(Path(place.format(here=tmp_path)), "picture")
    assert error.value.reason is Reason.SETTING
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_command_line_can_be_typed_again():
    assert inputs.command_line("lab grow", ["a model", "--layers", "3"]) == "sn29 lab grow 'a model' --layers 3"


def test_work_is_told_of_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    with inputs.progress("reading all of it") as report:
        report(1, 2)
    assert capsys.readouterr().err == "  reading all of it\n"
