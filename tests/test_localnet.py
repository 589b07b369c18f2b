"""The demo's story, small, end to end; and a validator that is killed again and again."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import recorded
from rich.console import Console

import neurons
from sn29 import cli, telemetry
from sn29.chain import Chain, load_wallet
from sn29.explain import towards
from sn29.hub import Hub
from sn29.localnet import demo, text
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.localnet.network import NETUID, Localnet, prepare
from sn29.localnet_commands import _alone
from sn29.records import Outcome
from sn29.round_record import ModelRecord
from sn29.rules.competition import parse_competition
from sn29.settings import DemoSettings, default_cache, read
from sn29.store import Store
from sn29.submission import submit

WINDOW = 4000  # blocks of 0.25 s: no window opens by itself while a test runs


@pytest.mark.timeout(900)  # 130 s on two idle cores
def test_the_demo_tells_its_story(tmp_path: Path) -> None:
    """Ten miners, two rounds, real processes, a node of its own in front of the chain; models of three training steps, so
    their quality is not asked about."""
    node = shlex.join(["env", f"PYTHONPATH={Path(__file__).parents[1]}", sys.executable, "-m", "tests.loopback_node"])
    flags = ["--dir", str(tmp_path / "demo"), "--steps", "3", "--block-seconds", "0.5", "--node", node]
    ended = demo.run(read(DemoSettings, flags))
    demo.check_outcomes(ended)
    assert len(ended.records) == 2
    assert sum(ended.published.values()) == pytest.approx(1.0)
    first, second = ended.records
    alice = {name: hotkey for hotkey, name in ended.names.items()}["alice"]
    blocks = [next(m.outcome.block for m in record.competitions["c00"].models if m.hotkey == alice) for record in (first, second)]
    assert blocks[0] < first.head.block <= blocks[1] < second.head.block, (
        "alice's second commitment is judged in the second round"
    )
    samples = [{s.id for s in record.competitions["c00"].samples} for record in (first, second)]
    assert samples[0] != samples[1]
    log = (ended.folder / "logs" / "validator.jsonl").read_text()
    assert log.count('"event": "remembered"') == 3, "final refusals are not looked into again"
    assert "the files are here already" in log, "a checkpoint is downloaded once"
    assert set(ended.curves) >= {"alice", "alice-2", "bob", "carol", "dave"}


def test_the_closing_table_names_hotkeys_and_where_weights_are_going(capsys: pytest.CaptureFixture[str]) -> None:
    """alice has won what bob held: he still has more on chain, and the table says why."""
    alice, bob, giant = "5Alice" + "a" * 42, "5Bobby" + "b" * 42, "5Giant" + "g" * 42
    first = recorded.round_record(360, recorded.losses(60, 1, **{bob: (0.0, 0.01)}), {bob: 100})
    table = recorded.losses(60, 2, **{alice: (-0.1, 0.01), bob: (0.0, 0.01)})
    refused = ModelRecord(
        Outcome(giant, "c00", 130, "rejected", "giant/model@1", reason="parameters", got="9", limit="at most 8")
    )
    second = recorded.round_record(720, table, {bob: 100, alice: 400}, others=[refused], before=first)
    names = {alice: "alice", bob: "bob", giant: "giant"}
    crew = tuple(demo.Miner(name, "c00", "", "") for name in names.values())
    ended = demo.Ended(Path("demo"), crew, (first, second), second.weights[0].by_hotkey, names, {}, {})
    demo.show_table(Console(width=80), ended)
    said = capsys.readouterr().out
    rows = {line.split()[1]: line.replace("│", " ").split() for line in said.splitlines() if line.startswith("│")}
    assert rows["alice"][1] == "5Ali…aaaa"
    on_chain, on_its_way = float(rows["alice"][-2]), float(rows["alice"][-1])
    assert on_chain < on_its_way
    assert (on_chain, on_its_way) == pytest.approx((second.weights[0].by_hotkey[alice], towards(second)[alice]), abs=1e-4)
    assert float(rows["bob"][-2]) > float(rows["bob"][-1])
    assert "A round moves weights 50% of the way" in said
    assert "giant     5Gia…gggg  c00  refused parameters: 9 / at most 8" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    "words",
    [("demo", "--dir"), ("localnet", "up", "--dir"), ("localnet", "up", "--miner", "ann", "--dir", "here", "--wallet.path")],
)
def test_a_folder_that_cannot_be_made_is_one_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main([*words, str(tmp_path / "file" / "x")]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'x'}: Not a directory" in said
    assert len(said.splitlines()) == 2, "what, and what to do"


def test_a_second_localnet_in_a_folder_is_refused_whatever_its_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until the first one has died, of whatever."""
    command = [sys.executable, "-m", "sn29.cli", "localnet", "up", "--dir", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert any(line.startswith(b"up:") for line in first.stdout)
        assert cli.main(["localnet", "up", "--dir", str(tmp_path), "--port", "1"]) == 1
        assert f"process {first.pid}" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()
    with _alone(tmp_path):
        pass


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def subnet(tmp_path: Path, make_checkpoint) -> Iterator[tuple[Localnet, Path]]:
    """A localnet with four models of two miners a competition, committed, and a window open; its wallets' folder."""
    texts = text.build(default_cache())
    localnet = prepare(tmp_path / "localnet", texts, block_seconds=0.25, window_blocks=WINDOW)
    wallets = tmp_path / "wallets"
    models = {
        "ann": ("c00", make_checkpoint(vocab_size=100_277, hidden_size=8, intermediate_size=16, num_attention_heads=2)),
        "ben": ("c00", make_checkpoint(seed=1, vocab_size=100_277, hidden_size=8, intermediate_size=16, num_attention_heads=2)),
        "cat": ("c01", _with_tokenizer(make_checkpoint("Phi3ForCausalLM", vocab_size=32_000), texts)),
        "dan": ("c01", _with_tokenizer(make_checkpoint("PhiForCausalLM", seed=1, vocab_size=32_000), texts)),
    }
    with localnet.serve():
        for validator in ("calm", "killed"):
            localnet.register(validator, "default", wallets, validator=True)
        for name, (competition, folder) in models.items():
            localnet.register(name, "default", wallets)
            _wait_blocks(localnet, 1)
            asyncio.run(_submit(localnet, wallets, name, competition, folder))
        _next_window(localnet)
        yield localnet, wallets


def _with_tokenizer(folder: Path, texts: text.Texts) -> Path:
    (folder / "tokenizer.json").write_bytes((texts.llama32k / "tokenizer.json").read_bytes())
    return folder


async def _submit(localnet: Localnet, wallets: Path, name: str, competition: str, folder: Path) -> None:
    rules = parse_competition(competition, (localnet.competitions / f"{competition}.yaml").read_text())
    hub = Hub(localnet.endpoint, token=localnet.hub_token(name))
    wallet = load_wallet(name, "default", wallets)
    async with Chain(NETUID, network="local", wallet=wallet, substrate=LedgerSubstrate(localnet.chain)) as chain:
        first = await submit(chain, hub, folder, f"{name}/model", rules, None)
        again = await submit(chain, hub, folder, f"{name}/model", rules, None)
    assert again == first, "a submission that is repeated changes nothing"


def _wait_blocks(localnet: Localnet, blocks: int) -> None:
    ledger = Ledger.open(localnet.chain)
    ledger.advance(blocks)
    ledger.close()


def _next_window(localnet: Localnet) -> None:
    ledger = Ledger.open(localnet.chain)
    ledger.advance((ledger.head() // WINDOW + 1) * WINDOW + ledger.finality_lag - ledger.head())
    ledger.close()


def _start(localnet: Localnet, wallets: Path, state: Path, name: str, rounds: int = 1) -> demo.Running:
    log, errors = state / "log.jsonl", state / "errors"
    state.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(Path(neurons.__file__).parent / "validator.py"),
        "--wallet.name", name, "-H", "default", "--wallet.path", str(wallets), "-n", "localnet",
        "--localnet.dir", str(localnet.folder), "--hub.endpoint", localnet.endpoint, "--netuid", str(NETUID),
        "--competitions.dir", str(localnet.competitions), "--state.dir", str(state), "--dtype", "float32",
        "--threads", "1", "--locks.dir", str(state.parent / "locks"),
        "--rounds", str(rounds), "--poll", "0.2", "--log.file", str(log),
    ]  # fmt: skip
    start = log.stat().st_size if log.exists() else 0
    with errors.open("ab") as stream:
        process = subprocess.Popen(command, stderr=stream, stdin=subprocess.DEVNULL)
    return demo.Running(name, process, log, errors, start)


def _until(one: demo.Running, event: str) -> None:
    """Waits for an event of the process, at most 300 s."""
    ends = time.monotonic() + 300
    while time.monotonic() < ends:
        if any(news["event"] == event for news in one.news()):
            return
        assert one.process.poll() is None, f"ended before {event}: {one.errors.read_text()[-2000:]}"
        time.sleep(0.01)
    raise AssertionError(f"no {event} within 300 s: {one.errors.read_text()[-2000:]}")


async def _row(localnet: Localnet, wallets: Path, name: str) -> dict[str, float]:
    hotkey = load_wallet(name, "default", wallets).hotkey.ss58_address
    async with Chain(NETUID, network="local", substrate=LedgerSubstrate(localnet.chain)) as chain:
        return await chain.weights(hotkey)


@pytest.mark.timeout(900)  # 100 s on two idle cores
def test_a_validator_killed_at_every_stage_ends_where_an_undisturbed_one_does(subnet, tmp_path: Path) -> None:
    localnet, wallets = subnet
    calm = _start(localnet, wallets, tmp_path / "calm", "calm")
    measured = []
    for stage in ("inspected", "samples", "fetched", "evaluated", "scored"):  # scores are said when the round is kept
        one = _start(localnet, wallets, tmp_path / "killed", "killed")
        _until(one, stage)
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        list(one.news())
        measured += [e["measured"] for e in one.events if e["event"] == "evaluated"]
    last = _start(localnet, wallets, tmp_path / "killed", "killed", rounds=0)
    _until(last, "published")
    last.process.terminate()
    assert last.process.wait(10) == 0, last.errors.read_text()[-2000:]
    assert calm.process.wait(300) == 0, calm.errors.read_text()[-2000:]
    status = telemetry.Status.from_json((tmp_path / "calm" / telemetry.STATUS).read_bytes())
    assert status.counters["published"] == 1
    assert {"reading", "inspecting", "fetching", "measuring", "deciding"} <= set(status.stage_seconds)
    starts = telemetry.Status.from_json((tmp_path / "killed" / telemetry.STATUS).read_bytes()).starts
    assert len(starts) == 5, "all but the one that was asked to end"

    rows = [asyncio.run(_row(localnet, wallets, name)) for name in ("calm", "killed")]
    assert rows[0] == rows[1]
    assert len(rows[0]) >= 2
    stores = [Store(tmp_path / name / "store.db", read_only=True) for name in ("calm", "killed")]
    records = [[r.record for r in store.rounds() if r.record] for store in stores]
    assert records[0] == records[1], "all that the round depends on, bit for bit"
    assert sum(measured) == stores[0].count_losses() == stores[1].count_losses(), "nothing that was stored is computed again"
    files = [sorted((tmp_path / name / "records").iterdir()) for name in ("calm", "killed")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert cli.main(["replay", str(files[1][0])]) == 0, "the record gives the same bits again"
    assert [len(store.publications()) for store in stores] == [1, 1]
