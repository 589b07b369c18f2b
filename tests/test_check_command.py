"""`sn29 check` and `sn29 reasons`: on folders and on repositories of a loopback Hub, as a miner runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi as Api

from sn29.cli import main
from sn29.errors import Reason
from sn29.hub import Hub
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Fault

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def owner(served: LoopbackHub) -> Hub:
    return Hub(served.endpoint, served.add_user("ann"))


@pytest.fixture
def publish(owner: Hub, tmp_path: Path) -> Callable[..., str]:
    """publish(folder, name, spoil) -> REPO@REVISION, after `spoil` has changed a copy of the folder."""

    def made(folder: Path, name: str, spoil: Callable[[Path], None] = lambda folder: None) -> str:
        copy = shutil.copytree(folder, tmp_path / name)
        spoil(copy)
        owner.create(f"ann/{name}")
        return f"ann/{name}@{owner.upload(f'ann/{name}', copy, message='model')}"

    return made


@pytest.fixture
def run(served: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(model, *flags) -> (exit status, all that was printed): against c01 at tiny size, everything kept in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rules = tmp_path / "c09.yaml"
    rules.write_text((ROOT / "competitions" / "c01.yaml").read_text().replace("parameters: 3.9e9", "parameters: 40000"))

    def ran(model: object, *flags: str) -> tuple[int, str]:
        status = main(["check", str(model), "--competition", str(rules), "--hub.endpoint", served.endpoint, *flags])
        told = capsys.readouterr()
        return status, told.out + told.err

    return ran


@pytest.fixture(scope="module")
def honest(make_checkpoint, byte_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "model"
    shutil.copytree(make_checkpoint("Phi3ForCausalLM", tie_word_embeddings=True, vocab_size=258), folder)
    shutil.copy(byte_tokenizer, folder / "tokenizer.json")
    return folder


def test_a_repository_is_judged_as_a_validator_judges_it(run, publish, honest, tmp_path):
    model = publish(honest, "good")
    status, told = run(model)
    assert status == 0, told
    assert "allowed for c09" in told
    assert len([path for path in (tmp_path / "cache/sn29/models").iterdir() if path.is_dir()]) == 1
    status, told = run("ann/good@main", "--metadata-only")
    assert status == 0, told
    assert model.partition("@")[2] in told


def test_what_the_metadata_refuses_is_refused_without_a_download_and_with_all_reasons(
    run, publish, make_checkpoint, served, tmp_path
):
    def spoil(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"is_causal": False, "attn_implementation": "evil/kernel"}))
        (folder / "modeling.py").write_text("open('canary', 'w')")

    model = publish(make_checkpoint("Phi3ForCausalLM", num_hidden_layers=3), "bad", spoil)
    served.served.clear()
    status, told = run(model, "--json")
    answer = json.loads(told)
    assert (status, answer["allowed"]) == (1, False)
    codes = [refusal["reason"] for refusal in answer["refusals"]]
    assert codes == ["forbidden_file", "bad_config", "bad_config", "parameters", "tokenizer"]
    assert all(refusal["got"] and refusal["limit"] and refusal["advice"] for refusal in answer["refusals"])
    assert sum(row.num_bytes for row in served.served) < 20_000
    assert not (tmp_path / "cache/sn29/models").exists()
    _, told = run(model)
    assert all(f"({code})" in told for code in codes)
    assert told.count("what to do: ") == len(codes)


def gone(owner: Hub, served: LoopbackHub) -> None:
    owner.delete("ann/lost")


def hidden(owner: Hub, served: LoopbackHub) -> None:
    owner.set_private("ann/lost", True)


def gated(owner: Hub, served: LoopbackHub) -> None:
    """It lists its files to everybody, and gives them to nobody."""
    Api(endpoint=served.endpoint, token=served.add_user("ann")).update_repo_settings("ann/lost", gated="manual")


@pytest.mark.parametrize("flag", ["", "--metadata-only"])
@pytest.mark.parametrize("change", [gone, hidden, gated])
def test_a_repository_that_others_cannot_see_is_refused_by_name(change, flag, run, publish, honest, owner, served):
    owner.delete("ann/lost")
    model = publish(honest, "lost")
    change(owner, served)
    status, told = run(model, "--json", *filter(None, [flag]))
    ((refusal),) = json.loads(told)["refusals"]
    assert status == 1
    expected = Reason.REPOSITORY_CLOSED if change is gated else Reason.REPOSITORY_GONE
    assert refusal["reason"] == expected.code
    assert f"({expected.code})" in run(model)[1]


@pytest.mark.parametrize("place", ["/tree/", "resolve/.*config", "store GET", "zoo/tokenizer"])
def test_a_hub_that_does_not_answer_has_an_exit_status_and_json_of_its_own(place, run, publish, honest, served, tmp_path):
    """Also for the competition's own tokenizer: nothing is known of the model then."""
    if place == "zoo/tokenizer":
        rules = tmp_path / "c09.yaml"
        text = rules.read_text().replace("\n  free: true", "\n  hub: zoo/tokenizer\n  fingerprint: null\n  start_token: 0")
        rules.write_text(text)
    model = publish(honest, "silent")
    served.faults.set(Fault(place, status=503, headers={"Retry-After": "60"}))
    try:
        status, told = run(model, "--json")
        answer = json.loads(told)
        assert (status, answer["allowed"]) == (2, None)
        assert answer["unavailable"]
        status, told = run(model)
        assert (status, "nothing is known" in told) == (2, True)
    finally:
        served.faults.set()


def test_fetched_models_keep_to_their_budget_of_disk(run, publish, honest, make_checkpoint, tmp_path):
    other = shutil.copytree(make_checkpoint("Phi3ForCausalLM", seed=7, tie_word_embeddings=True, vocab_size=258), tmp_path / "b")
    shutil.copy(honest / "tokenizer.json", other)
    size = sum(path.stat().st_size for path in other.iterdir())
    budget = ("--models.gb", str(1.5 * size / 1e9))
    kept = []
    for name, folder in (("one", honest), ("two", other)):
        status, told = run(publish(folder, f"budget-{name}"), *budget)
        assert status == 0, told
        (whole,) = (path.name for path in (tmp_path / "cache/sn29/models").iterdir() if path.is_dir())
        kept.append(whole)
    assert kept[0] != kept[1]
    status, told = run(publish(honest, "budget-three"), "--models.gb", str(0.1 * size / 1e9))
    assert (status, "disk" in told) == (2, True)


def test_a_revision_that_is_not_there_is_refused_by_name(run, publish, honest):
    model = publish(honest, "rewritten")
    status, told = run(model.partition("@")[0] + "@" + "1" * 40)
    assert status == 1
    assert "(revision_gone)" in told


def test_a_model_that_is_only_too_large_is_evaluated_too_when_it_is_here_already(run, make_checkpoint, byte_tokenizer, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_checkpoint("PhiForCausalLM", num_hidden_layers=3), tmp_path / "model")
    shutil.copy(byte_tokenizer, folder / "tokenizer.json")
    state = load_file(folder / "model.safetensors")
    state["lm_head.bias"] = torch.full_like(state["lm_head.bias"], float("nan"))
    save_file(state, folder / "model.safetensors")
    status, told = run(folder)
    assert status == 1
    assert "(parameters)" in told
    assert "(not_finite)" in told


def test_what_tokenizer_and_weights_show_is_told_together(run, honest, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(honest, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("inf")
    save_file(state, folder / "model.safetensors")
    status, told = run(folder, "--json")
    assert status == 1
    assert [refusal["reason"] for refusal in json.loads(told)["refusals"]] == ["round_trip", "not_finite"]


@pytest.mark.parametrize(
    ("model", "named"),
    [("a@b@c", "namespace/name"), ("a/b@c", "a/b"), ("nowhere", "nowhere"), ("x@" + "0" * 40, "namespace/name")],
)
def test_what_is_neither_a_folder_nor_a_repository_is_said(model, named, run):
    status, told = run(model)
    assert status == 1
    assert named in told
    assert "Traceback" not in told


def test_reasons_are_printed_as_a_table(capsys):
    assert main(["reasons"]) == 0
    told = capsys.readouterr().out
    assert all(f"| `{reason.code}` | {reason.sentence} | {reason.advice} |" in told for reason in Reason)
    assert main(["reasons", "x"]) == 2
