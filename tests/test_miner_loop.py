"""Two miners left alone on a localnet: they train, forecast, publish, and take the crown from each other."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import neurons
from neurons.miner import alone, in_thread, main
from neurons.training import TokenStream
from sn29 import record_files
from sn29.chain import load_wallet
from sn29.errors import Rejected, Unavailable
from sn29.localnet import demo, text
from sn29.localnet.ledger import Ledger
from sn29.localnet.network import DATASET, NETUID, TRAINING_FILES, Localnet, prepare
from sn29.mining import STATE, holder_of, read_state
from sn29.models.tokenizer import Tokenizer
from sn29.round_record import RoundRecord
from sn29.settings import default_cache

WINDOW = 100_000  # blocks of 0.2 s: no window opens by itself
NAMES = ("ann", "ben")
RULES = f"""\
reward_share: 1
families: [LlamaForCausalLM]
tokenizer: {{free: true}}
limits: {{parameters: 60000, bytes: 2e6, max_tokens: 1000, max_chars: 160, round_trip_failures: 3}}
dataset: {{hub: {DATASET}, revision: "REVISION", files: "data/eval-*.parquet", column: text}}
samples: {{count: 240, window_blocks: {WINDOW}}}
scoring:
  rule: champion
  error_rate: 0.2
  advantage: {{initial: 0.001, decay_per_epoch: 0.995, blocks_per_epoch: 361, floor: 0.0005}}
pool: {{keep: 4, pending: 4}}
"""
SHAPE = (
    "--hidden-size", "16", "--intermediate-size", "32", "--num-heads", "2", "--min-count", "0", "--batch-tokens", "1024",
    "--max-tokens", "160", "--learning-rate", "0.003",
)  # fmt: skip


@dataclass(slots=True)
class Process(demo.Running):
    begun: int = 0
    """Bytes that its log had when it was started."""


@dataclass
class Stage:
    """The localnet and the processes on it."""

    folder: Path
    localnet: Localnet
    tokenizer: Path
    running: dict[str, Process] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in (*NAMES, "val")})

    @property
    def wallets(self) -> Path:
        return self.folder / "wallets"

    @property
    def records(self) -> Path:
        return self.folder / "val" / "records"

    def hotkey(self, name: str) -> str:
        return str(load_wallet(name, "default", self.wallets).hotkey.ss58_address)

    def start(self, name: str) -> None:
        """A miner, or the validator `val`, with the flags that a user would give."""
        work = self.folder / name
        work.mkdir(exist_ok=True)
        log, errors = work / "log.jsonl", work / "errors"
        common = (
            "--wallet.name", name, "--wallet.path", str(self.wallets), "-n", "localnet", "--localnet.dir",
            str(self.localnet.folder), "--hub.endpoint", self.localnet.endpoint, "--netuid", str(NETUID),
            "--competitions.dir", str(self.localnet.competitions), "--locks.dir", str(self.folder / "locks"),
            "--threads", "1", "--poll", "0.2", "--log.file", str(log),
        )  # fmt: skip
        own = ("--state.dir", str(work), "--dtype", "float32")
        if name != "val":
            own = (
                "--work.dir", str(work), "--repo", f"{name}/model", "--text", TRAINING_FILES, "--tokenizer", str(self.tokenizer),
                "--records", str(self.records), "--seed", str(NAMES.index(name)), "--steps", "60", "--publish-at", "0.8", *SHAPE,
            )  # fmt: skip
        program = Path(neurons.__file__).parent / ("validator.py" if name == "val" else "miner.py")
        environment = {**os.environ, "HF_TOKEN": self.localnet.hub_token(name), "OMP_NUM_THREADS": "1"}
        read_to = log.stat().st_size if log.exists() else 0
        with errors.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, str(program), *common, *own], stderr=stream, stdin=subprocess.DEVNULL, env=environment
            )
        self.running[name] = Process(name, process, log, errors, read_to, begun=read_to)

    def kill(self, name: str) -> None:
        """kill -9; what it had said is kept."""
        one = self.running[name]
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        self.events[name] += one.news()

    def look(self) -> None:
        """Takes in what everybody has said; nobody may have ended."""
        for name, one in self.running.items():
            self.events[name] += one.news()
            assert one.process.poll() is None, f"{name} ended: {one.errors.read_text()[-2000:]}"

    def said(self, name: str, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events[name] if e["event"] == event]

    def rounds(self) -> list[RoundRecord]:
        return list(record_files.since(self.records, -1))

    def next_window(self) -> None:
        ledger = Ledger.open(self.localnet.chain)
        ledger.advance((ledger.head() // WINDOW + 1) * WINDOW + ledger.finality_lag - ledger.head())
        ledger.close()

    def stop(self) -> None:
        for one in self.running.values():
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()


@pytest.fixture
def stage(tmp_path: Path, byte_tokenizer: Path) -> Iterator[Stage]:
    localnet = prepare(tmp_path / "localnet", text.build(default_cache()), block_seconds=0.2, window_blocks=WINDOW)
    written = (localnet.competitions / "c00.yaml").read_text()
    revision = written.split('revision: "')[1][:40]
    shutil.rmtree(localnet.competitions)
    localnet.competitions.mkdir()
    (localnet.competitions / "c00.yaml").write_text(RULES.replace("REVISION", revision))
    found = Stage(tmp_path, localnet, byte_tokenizer)
    for name in NAMES:
        localnet.register(name, "default", found.wallets)
    localnet.register("val", "default", found.wallets, validator=True)
    found.records.mkdir(parents=True)
    with localnet.serve():
        try:
            yield found
        finally:
            found.stop()


@pytest.mark.timeout(600)
def test_two_miners_take_the_crown_from_each_other(stage: Stage) -> None:
    """Nobody helps them: windows open when there is something new to judge, or 15 s have passed, the first one at once: until a
    record says that nobody is there they publish nothing. One of them is killed."""
    for name in ("val", *NAMES):
        stage.start(name)
    opened, opened_at, judged, ends = 0, 0.0, 0, time.monotonic() + 500
    while len(crowns(stage.rounds())) < 3:
        assert time.monotonic() < ends, told(stage)
        stage.look()
        committed = sum(len(stage.said(name, "submitted")) for name in NAMES)
        news = committed > judged or time.monotonic() > opened_at + 15
        if (committed or opened == 0) and news and len(stage.rounds()) == opened:
            stage.next_window()
            opened, opened_at, judged = opened + 1, time.monotonic(), committed
        if opened == 2 and stage.running["ann"].begun == 0:
            stage.kill("ann")
            stage.start("ann")
        time.sleep(0.1)
    assert stage.running["ann"].begun > 0, "it was killed on the way"
    holders = crowns(stage.rounds())
    assert holders[0] == holders[2], told(stage)
    assert {stage.hotkey(name) for name in NAMES} == set(holders)
    for name in NAMES:
        check_story(stage, name)
    ben = stage.running["ben"]
    ben.process.terminate()
    assert ben.process.wait(60) == 0
    assert ben.errors.read_text().rstrip().endswith("start again to go on")


def crowns(rounds: list[RoundRecord]) -> list[str]:
    """Hotkeys that held the crown, each once for each time that it took it."""
    found: list[str] = []
    for record in rounds:
        holder = holder_of(record.competitions["c00"])
        if holder is not None and found[-1:] != [holder.hotkey]:
            found.append(holder.hotkey)
    return found


def check_story(stage: Stage, name: str) -> None:
    """What a miner published was likely enough to win, and was not published by who held the crown; records were followed."""
    chance, ours = -1.0, False
    for event in stage.events[name]:
        if event["event"] == "forecast" and "probability" in event:  # without: a warning
            chance = event["probability"]
        elif event["event"] == "crown":
            ours = event["ours"]
        elif event["event"] == "submitted":
            assert chance >= 0.8, f"{name} published at {chance}"
            assert not ours, f"{name} gave its own crown up"
            chance = -1.0
    assert "evaluated" in [event["status"] for event in stage.said(name, "judged")]
    state = read_state(stage.folder / name / STATE)
    assert state.run > 1
    assert state.published.startswith(f"{name}/model@")


def told(stage: Stage) -> str:
    """The story so far, for whoever has to find out why it did not end."""
    kinds = ("forecast", "submitted", "judged", "crown", "held", "run", "scored", "unavailable", "bug")
    lines = [
        (e["time"], f"{name} {e['event']} {e['message']}")
        for name, all_ in stage.events.items()
        for e in all_
        if e["event"] in kinds
    ]
    return "\n".join(line for _, line in sorted(lines))


# --- what is said at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--repo", "ann/model"], "--publish-at: the setting is not usable (got no --records, rule a folder of a validator's"),
        (["--repo", "ann/model", "--records", "nowhere"], "--records: the setting is not usable (got no nowhere, rule a folder"),
        (
            ["--repo", "a/b", "--publish-at", "0", "--start", "champion"],
            "--start champion: the setting is not usable (got no --rec",
        ),
        (["--publish-at", "0"], "--repo: the setting is not usable (got nothing, rule namespace/name)"),
        (["--repo", "ann/model", "--publish-at", "1.5"], "--publish-at: the setting is not usable (got 1.5"),
        (["--publish-now"], "got no miner.json in"),
    ],
)
def test_a_miner_that_cannot_run_says_so_in_one_line_before_it_begins(tmp_path, capsys, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    competitions = str(Path(neurons.__file__).parents[1] / "competitions")
    assert main(["--competitions.dir", competitions, "--work.dir", str(tmp_path / "work"), *flags]) == (
        2 if "1.5" in flags else 1
    )
    said = capsys.readouterr().err.splitlines()
    assert complaint in said[0]
    assert len(said) == 2, "and what to do"
    assert not (tmp_path / "work").exists(), "nothing was begun"


def test_a_training_that_fails_while_it_is_stopped_stays_stopped() -> None:
    over = threading.Event()

    def work() -> Path:
        assert over.wait(60)
        raise Unavailable("the Hub", "no answer")

    async def story() -> None:
        training = asyncio.create_task(in_thread(work, over))
        await asyncio.sleep(0.01)
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training

    asyncio.run(story())


class Gone:
    def state_dict(self) -> dict[str, int]:
        return {}

    def __next__(self) -> str:
        raise Unavailable("the Hub", "no answer", retry_s=500)


def test_text_that_does_not_come_is_not_waited_for_by_who_is_stopped(byte_tokenizer: Path) -> None:
    stream = TokenStream(Gone(), Tokenizer.load(byte_tokenizer), lambda: True)
    with pytest.raises(Unavailable):
        next(stream)


def test_one_folder_has_one_miner(tmp_path, capsys):
    with alone(tmp_path), pytest.raises(Rejected, match="a miner that works in"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
