"""`sn29 train` as a user runs it: real processes, killed where it hurts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from neurons.training import Watch, champion_of, parse_source, train_for
from sn29.corpus import sample_id
from sn29.errors import Reason, Rejected
from sn29.hub import Hub
from sn29.mining import Slice
from sn29.models import checkpoint
from sn29.rules.competition import Competition
from sn29.settings import TrainSettings, read
from sn29.train_command import speaking, train
from sn29.training.parallel import World
from sn29.training.trainer import Progress

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "LICENSE").read_text()
FILE = """\
reward_share: 1.0
families: [LlamaForCausalLM]
tokenizer: {free: true}
limits: {parameters: 8000000, bytes: 100000000, max_tokens: 1024, max_chars: 300, round_trip_failures: 3}
dataset: {folder: "%s", files: "*.parquet", column: text}
samples: {count: 32, window_blocks: 60}
scoring: {rule: oldest_holder, advantage: {initial: 0.004, decay_per_epoch: 0.995, blocks_per_epoch: 361}}
pool: {keep: 6, pending: 3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, byte_tokenizer):
    """A folder with a data set, a competition of it, and the flags that every run here has."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    documents = [TEXT[n * 31 % (len(TEXT) - 400) :][: 40 + n * 17 % 300] for n in range(600)]
    pq.write_table(pa.table({"text": documents}), folder / "text" / "a.parquet", row_group_size=50)
    (folder / "competitions").mkdir()
    (folder / "competitions" / "c00.yaml").write_text(FILE % (folder / "text"))
    return folder, [
        "--competitions.dir", str(folder / "competitions"), "--tokenizer", str(byte_tokenizer), "--threads", "1", "--steps", "40",
        "--hidden-size", "16", "--intermediate-size", "32", "--num-heads", "2", "--checkpoint-every", "10",
        "--pool-documents", "40",
    ]  # fmt: skip


def started(place, work_dir, *more):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sn29.cli", "train", *place[1], "--work.dir", str(work_dir), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place[0], env=environment, start_new_session=True
    )


def killed_when(process, seen):
    """Kills it in the instant in which `seen` is true; whether it was."""
    while process.poll() is None and not seen():
        time.sleep(0.001)
    was = process.poll() is None
    if was:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return was


def test_killed_at_any_instant_it_goes_on_to_the_same_curve(place, tmp_path):
    undisturbed, folder = started(place, tmp_path / "undisturbed", "--json"), tmp_path / "killed" / "training"
    curve = folder / "curve.jsonl"
    instants = [
        lambda: curve.exists() and curve.read_bytes().count(b"\n") >= 16,  # between two checkpoints
        lambda: (folder / "state.pt").exists() and (folder / "state.new").exists(),  # while one is written
    ]
    hits = [killed_when(started(place, tmp_path / "killed"), seen) for seen in instants]
    assert hits[0], "the first run was over before it could be killed"
    with curve.open("a") as cut:
        cut.write('{"step": 99, "lo')
    last = started(place, tmp_path / "killed")
    said, complaint = last.communicate()
    told, _ = undisturbed.communicate()
    assert (last.returncode, undisturbed.returncode) == (0, 0), complaint
    assert str(folder / "checkpoint") in said
    other = tmp_path / "undisturbed" / "training"
    for name in ("curve.jsonl", "checkpoint/model.safetensors", "curve.svg"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert not [p.name for p in folder.iterdir() if p.suffix in (".new", ".old")]

    steps = [json.loads(line) for line in told.splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 41))
    assert [step["loss"] for step in steps] == [json.loads(line)["loss"] for line in curve.read_text().splitlines()]
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]
    assert {"tokens_per_s", "seconds_left", "mfu", "learning_rate", "gradient_norm"} <= steps[0].keys()


def test_two_processes_started_by_one_command_train_and_stop_when_asked(place, tmp_path):
    """And refuse with one line, of one of them."""
    refused = started(place, tmp_path, "--processes", "2", "--shards", "3")
    said, complaint = refused.communicate()
    assert (refused.returncode, said) == (1, "")
    assert [line for line in complaint.splitlines() if line] == [
        "sn29 train: training: the setting is not usable (got 2 processes for 3 shards of data, rule shards are a multiple of "
        "the processes)",
        "  what to do: mend training: shards are a multiple of the processes",
    ]
    running = started(place, tmp_path, "--processes", "2", "--steps", "100000", "--json")
    for line in running.stdout:
        if json.loads(line)["step"] == 5:
            os.killpg(running.pid, signal.SIGTERM)
            break
    lines, complaint = running.communicate()
    folder = tmp_path / "training"
    steps = 5 + len([line for line in lines.splitlines() if line.startswith("{")])
    assert len((folder / "curve.jsonl").read_text().splitlines()) == steps, complaint
    assert (running.returncode, complaint) == (0, "")
    assert (folder / "checkpoint" / "tokenizer.json").exists()
    assert json.loads((folder / "training.json").read_text())["shards"] == 2


def test_a_process_that_is_killed_is_named(place, tmp_path):
    running = started(place, tmp_path, "--processes", "2", "--steps", "100000", "--json")
    next(running.stdout)
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    (second,) = (w for w in workers if "\0RANK=1\0" in Path(f"/proc/{w}/environ").read_text())
    os.kill(int(second), signal.SIGKILL)
    _, complaint = running.communicate()
    assert running.returncode == 1
    assert "sn29 train: training: process 1 of 0 to 1 was ended by SIGKILL" in complaint.splitlines()


# ---- in this process -------------------------------------------------------------------------------------------------


def settings_of(place, work_dir, *more):
    return read(TrainSettings, [*place[1], "--work.dir", str(work_dir), *more])


def competition_of(place) -> Competition:
    from neurons.adapters import read_competitions

    return read_competitions(place[0] / "competitions")[0]["c00"]


def slice_of(folder, *, until=0, exclude=frozenset(), start=""):
    return Slice(folder, 1, start, until, exclude)


def test_a_run_begins_from_a_checkpoint_or_a_config_and_says_what_it_left_out(place, tmp_path):
    settings, competition, hub = settings_of(place, tmp_path), competition_of(place), Hub("http://127.0.0.1:9")
    left_out = {sample_id(TEXT[:40]), sample_id("another")}
    first = train_for(settings, competition, hub, slice_of(tmp_path / "a", until=5, exclude=frozenset(left_out)))
    about = json.loads((tmp_path / "a" / "training.json").read_text())
    assert set(about["excluded"]) == left_out
    train_for(settings, competition, hub, slice_of(tmp_path / "a", until=7, exclude=frozenset({sample_id("another"), "x"})))
    assert json.loads((tmp_path / "a" / "training.json").read_text())["excluded"] == [sample_id("another")]

    second = train_for(settings, competition, hub, slice_of(tmp_path / "b", until=2, start=str(first)))
    losses = [json.loads(line)["loss"] for f in "ab" for line in (tmp_path / f / "curve.jsonl").read_text().splitlines()]
    assert losses[7] < 0.97 * losses[0], "it began where the other was"
    again = train_for(settings, competition, hub, slice_of(tmp_path / "b", until=3, start=str(first)))
    assert again == second

    other = settings_of(place, tmp_path, "--config-file", str(first / "config.json"), "--hidden-size", "64")
    made = train_for(other, competition, hub, slice_of(tmp_path / "c", until=1))
    config = json.loads((made / "config.json").read_text())
    assert config["hidden_size"] == 16
    checkpoint.inspect(checkpoint.local_listing(made), checkpoint.local_reader(made))


def test_sources_are_read_from_their_flag(tmp_path):
    (tmp_path / "web").mkdir()
    hub = Hub("http://127.0.0.1:9")
    found = parse_source(f"{tmp_path}/web/*-1.parquet#body*2.5", hub)
    assert (found.data.folder, found.pattern, found.column, found.weight) == (tmp_path / "web", "*-1.parquet", "body", 2.5)
    found = parse_source(str(tmp_path / "web"), hub)
    assert (found.data.folder, found.pattern, found.column, found.weight) == (tmp_path / "web", "", "text", 1.0)
    (tmp_path / "web" / "[1].bin").touch()
    found = parse_source(f"{tmp_path}/web/[1].bin#body", hub)
    assert (found.data.files(), found.pattern, found.column) == ((("[1].bin", 0),), "[[]1].bin", "body")
    found = parse_source(f"hub:ns/name@{'a' * 40}/data/*/x.parquet", hub)
    assert (found.data.revision, found.pattern) == ("a" * 40, "data/*/x.parquet")
    assert parse_source(f"hub:ns/name@{'a' * 40}", hub).pattern == ""
    nowhere = [f"{tmp_path}/none/*.parquet", f"{tmp_path}/web/none.parquet"]
    for text in ("hub:ns/name/x.parquet", "hub:ns", *nowhere, "#text", "a#b#c"):
        with pytest.raises(Rejected, match="ns" if "hub" in text else "--text: ") as refused:
            parse_source(text, hub, "--text")
        assert refused.value.reason is Reason.SETTING


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer", "adam"], "got adam, rule adamw"),
        (["--start", "nowhere"], "--start: .*got nowhere, rule a checkpoint's folder"),
        (["--start", "champion"], "--start champion: .*no --records"),
        (["--train-device", "cuda"], "--train-device: .*got cuda, rule cpu"),
        (["--config-file", "none.json"], "none.json"),
        (["--context", "500"], "a context of 500 tokens, rule 0 to 127"),
        (["--competition", "c09"], "c09"),
        (["--tokenizer", "none.json"], "--tokenizer: .*got no file none.json"),
        (["--num-heads", "3"], "a width of 16 for 3 heads, rule an even width"),
        (["--num-heads", "16"], "a width of 16 for 16 heads, rule an even width"),
        (["--num-heads", "8", "--num-kv-heads", "3"], "8 heads with 3 heads of keys and values"),
        (["--data", "x.parquet*0.5.5"], r"--data: .*got \*0.5.5 in x.parquet\*0.5.5, rule a weight"),
        (["--warmup-steps", "41"], "got 41 steps in which the rate rises, rule at most all 40 steps"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, list) else None,
)
def test_what_cannot_be_is_said_in_one_line(place, tmp_path, flags, said):
    import re

    with pytest.raises(Rejected) as refused:
        train([*place[1], "--work.dir", str(tmp_path), *flags])
    assert re.search(said, str(refused.value)), str(refused.value)
    assert not (tmp_path / "training" / "checkpoint").exists()


def test_the_first_process_speaks_for_all_and_the_others_of_what_nobody_expected(capsys):
    with speaking(World(1, 2)):
        print("a bar", file=sys.stderr)
    with pytest.raises(SystemExit), speaking(World(1, 2)):
        raise Rejected(Reason.SETTING, 1, 2)
    with pytest.raises(Rejected), speaking(World(0, 2)):
        raise Rejected(Reason.SETTING, 1, 2)
    with pytest.raises(MemoryError) as failed, speaking(World(1, 2)):
        raise MemoryError
    assert failed.value.__notes__ == ["in process 1 of 0 to 1"]
    print("a traceback", file=sys.stderr)
    assert capsys.readouterr().err == "a traceback\n"


def test_a_run_killed_between_two_renames_goes_on_with_its_own_tokenizer(place, tmp_path, byte_tokenizer):
    """It is the start's, and lies in every checkpoint under the name that validators look for."""
    competition, hub = competition_of(place), Hub("http://127.0.0.1:9")
    other = shutil.copy(byte_tokenizer, tmp_path / "bytes.json")
    settings = settings_of(place, tmp_path, "--tokenizer", str(other))
    first = train_for(settings, competition, hub, slice_of(tmp_path / "a", until=1))
    assert (first / "tokenizer.json").read_bytes() == byte_tokenizer.read_bytes()
    assert not (first / "bytes.json").exists()

    without = settings.model_copy(update={"tokenizer": None})
    second = train_for(without, competition, hub, slice_of(tmp_path / "b", until=1, start=str(first)))
    second.rename(tmp_path / "b" / "checkpoint.old")
    again = train_for(without, competition, hub, slice_of(tmp_path / "b", until=2, start=str(first)))
    assert (again / "tokenizer.json").read_bytes() == byte_tokenizer.read_bytes()

    about = json.loads((tmp_path / "b" / "training.json").read_text())
    about["shape"]["layers"] = about["shape"].pop("num_layers")
    (tmp_path / "b" / "training.json").write_text(json.dumps(about))
    with pytest.raises(Rejected, match=r"got .*'layers', rule the shape of a run of this version"):
        train_for(without, competition, hub, slice_of(tmp_path / "b", until=3, start=str(first)))


def test_a_gpu_that_is_not_there_is_said_without_a_world_too(place, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    settings = settings_of(place, tmp_path, "--train-device", "cuda")
    with pytest.raises(Rejected, match=r"--train-device: .*got cuda"):
        train_for(settings, competition_of(place), Hub("http://127.0.0.1:9"), slice_of(tmp_path / "a"))


def test_time_left_and_utilisation_are_plain_arithmetic(place, tmp_path):
    watch = Watch(settings_of(place, tmp_path, "--peak-tflops", "2"), tmp_path, World(), lambda progress, watch: None)
    step = Progress(10, 40, 3.0, 1000, 100, 0.5, 1e-3, 1.0, 3e11)
    for seconds in (0.5, 1.5):
        watch.step(Progress(10, 40, 3.0, 1000, 100, seconds, 1e-3, 1.0, 3e11))
    assert watch.seconds_left(step) == 30 * 1.0
    assert watch.utilisation(step) == pytest.approx(0.3)
    assert step.tokens_per_second == 200
    assert Watch(settings_of(place, tmp_path), tmp_path, World()).utilisation(step) is None, "no peak is known of a CPU"


def test_there_is_no_champion_without_records(tmp_path):
    with pytest.raises(Rejected, match="nobody holds the crown of c00"):
        champion_of("c00", tmp_path)


def test_curves_go_to_wandb_where_it_is_installed(tmp_path, monkeypatch):
    """Without an account: offline, below the run's folder. Where it is not installed, what to install is said."""
    import importlib.util

    from sn29.telemetry import Curves

    monkeypatch.setenv("WANDB_MODE", "offline")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(Rejected, match=r"pip install 'sn29\[wandb\]'"):
            Curves("project", tmp_path, {"began": 1.0})
        return
    run = Curves("project", tmp_path, {"began": 1.0})
    run.log({"loss": 1.0}, step=1)
    run.finish()
    assert list(tmp_path.glob("wandb/offline-run-*"))
