"""Both programs are asked to end while they are at it: real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

import neurons
from neurons.status_page import _end
from sn29.chain import Chain, load_wallet
from sn29.hub import Hub
from sn29.localnet import demo, text
from sn29.localnet.http_exchange import Wire
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Fault
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.localnet.network import NETUID, Localnet, prepare
from sn29.records import Loss
from sn29.rules.competition import parse_competition
from sn29.settings import default_cache
from sn29.store import Store, reading
from sn29.submission import submit

WINDOW = 4000
WITHIN_S = 10.0
"""What is promised for both programs."""

# --- the rule, with programs of a few lines ---------------------------------------------------------------------------

PROGRAM = """
import asyncio, os, signal, sqlite3, sys, threading, time
from neurons.ending import Stop
from sn29 import telemetry
from sn29.errors import Unavailable

asked = threading.Event()

async def wait(stop):
    stop.left = "half a sandwich"
    print("up", flush=True)
    await asyncio.sleep(60)

async def clean_up_for_ever(stop):
    try:
        await wait(stop)
    finally:
        await asyncio.sleep(60)

async def in_a_thread(stop):
    stop.left = "a thread"
    asyncio.get_running_loop().call_later(0.1, lambda: print("up", flush=True))
    await asyncio.to_thread(time.sleep, 60)

async def hold_the_loop(stop):
    print("up", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass

async def stay_in_one_call_of_c(stop):
    with sqlite3.connect(":memory:") as db:
        db.create_function("up", 0, lambda: print("up", flush=True) or 1)
        endless = "with recursive n(i) as (select up() union all select i + 1 from n where i < 1e8)"
        db.execute(f"{endless} select count(*) from n").fetchone()

async def fork_a_child_that_is_asked(stop):
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.wait()
    await asyncio.sleep(0.2)
    stop.left = "a child"
    print("up", flush=True)
    await asyncio.sleep(60)

async def fail_while_it_ends(stop):
    try:
        await wait(stop)
    finally:
        raise Unavailable("the chain", "no answer")

async def break_while_it_ends(stop):
    try:
        await wait(stop)
    finally:
        raise ZeroDivisionError

async def lose_the_handler(stop):
    stop.left = "a handler"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a library puts its own in our place, as Ray does
    await asyncio.sleep(1.5)
    print("up", flush=True)
    await asyncio.sleep(60)

async def write_to_nobody(stop):
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)
    print("up", flush=True)
    threading.Thread(target=lambda: (asked.wait(), print("asked", flush=True)), daemon=True).start()
    try:
        await asyncio.sleep(60)
    finally:
        asked.set()
        await asyncio.sleep(60)

async def use_what_is_left(stop):
    try:
        await wait(stop)
    except asyncio.CancelledError:
        while stop.left_s > 0:
            await asyncio.sleep(0.01)
        raise

Stop("sandwich", float(sys.argv[2])).run(globals()[sys.argv[1]])
print("down", flush=True)
"""


def start(program: str, within_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, program, str(within_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_program_that_is_asked_to_end_says_what_it_leaves(number):
    process = start("wait", 10)
    process.send_signal(number)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "down\n")
    first, last = errors.splitlines()
    assert first.endswith("a signal asked for it: it ends within 10 s, a second signal ends it at once")
    assert last.endswith("half a sandwich; start again to go on")


@pytest.mark.parametrize("program", ["clean_up_for_ever", "hold_the_loop", "stay_in_one_call_of_c"])
def test_what_does_not_end_is_cut_in_time(program):
    process = start(program, 2)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    first, last = errors.splitlines()
    assert "it ends within 2 s" in first
    assert "not ended after 1 s: left as a kill would leave it" in last


def test_a_signal_to_a_forked_child_is_not_for_its_parent():
    process = start("fork_a_child_that_is_asked", 10)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert errors.splitlines()[-1].endswith("a child; start again to go on"), "it was there until it was asked itself"


def test_a_thread_that_waits_is_not_waited_for():
    process = start("in_a_thread", 30)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors.splitlines()[-1].endswith("a thread; start again to go on")


def test_a_handler_that_a_library_replaces_is_put_back():
    process = start("lose_the_handler", 10)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert errors.splitlines()[-1].endswith("a handler; start again to go on")


def test_what_is_in_hand_has_the_time_that_is_left():
    process = start("use_what_is_left", 3)
    process.terminate()
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "down\n"), "1 of the 3 seconds is for it, 1 to close, and 1 to end"
    assert errors.splitlines()[-1].endswith("half a sandwich; start again to go on")


def test_a_failure_while_it_ends_is_said_and_a_bug_is_not_hidden():
    process = start("fail_while_it_ends", 10)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "the chain: no answer" in errors
    process = start("break_while_it_ends", 10)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "ZeroDivisionError" in errors


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)  # fmt: skip
def test_a_second_signal_ends_it_at_once_and_the_same_one_twice_is_one(number, status):
    process = start("clean_up_for_ever", 60)
    process.terminate()
    process.terminate()  # to the process and to its group
    assert process.stderr is not None
    assert "a signal asked for it" in process.stderr.readline()
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == status
    assert errors.splitlines()[-1] == "sn29 sandwich: a second signal: ended at once"


def test_a_second_signal_is_heard_though_nobody_reads_what_is_said():
    """A journal that has stalled: standard error is a pipe, and full."""
    process = start("write_to_nobody", 60)
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n", "what is in hand is cancelled though the line cannot be said"
    time.sleep(1)
    process.terminate()
    assert process.wait(30) == 143
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def test_a_program_that_leaves_does_not_wait_for_the_interpreter_to_close():
    code = """
import asyncio, atexit
from neurons.ending import Stop
atexit.register(lambda: print("closed", flush=True))
async def wait(stop):
    print("up", flush=True)
    await asyncio.sleep(60 * asked)
for asked in (0, 1):
    stop = Stop("sandwich", 10)
    stop.run(wait)
    print("down", end="")
    stop.leave()
print("not left", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "downup\n"], "who ends by itself goes on"
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "down")


def test_the_page_s_process_is_not_waited_for_while_it_closes():
    async def story() -> int | None:
        code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True); sys.stdin.read()"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )  # fmt: skip
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        await _end(process)
        return process.returncode

    assert asyncio.run(story()) == -signal.SIGKILL


# --- the validator and the miner --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subnet(tmp_path_factory, make_checkpoint) -> Iterator[tuple[Localnet, LoopbackHub, Path]]:
    """A localnet whose one competition has one model, and a miner who has nothing yet."""
    tmp_path = tmp_path_factory.mktemp("subnet")
    localnet = prepare(tmp_path / "localnet", text.build(default_cache()), block_seconds=1.0, window_blocks=WINDOW)
    (localnet.competitions / "c01.yaml").unlink()
    rules = localnet.competitions / "c00.yaml"
    rules.write_text(rules.read_text().replace("reward_share: 0.5", "reward_share: 1"))
    wallets = tmp_path / "wallets"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
    slow = make_checkpoint(vocab_size=100_277, **shape)
    with localnet.serve() as hub:
        for name in ("val", "slow"):
            localnet.register(name, "default", wallets, validator=True)
        for name in ("ann", "ben"):
            localnet.register(name, "default", wallets)
        ledger = Ledger.open(localnet.chain)
        ledger.advance(1)
        ledger.close()
        asyncio.run(submitted(localnet, wallets, "ann", slow))
        yield localnet, hub, wallets


async def submitted(localnet: Localnet, wallets: Path, name: str, folder: Path) -> None:
    rules = parse_competition("c00", (localnet.competitions / "c00.yaml").read_text())
    hub = Hub(localnet.endpoint, token=localnet.hub_token(name))
    wallet = load_wallet(name, "default", wallets)
    async with Chain(NETUID, network="local", wallet=wallet, substrate=LedgerSubstrate(localnet.chain)) as chain:
        await submit(chain, hub, folder, f"{name}/model", rules, None)


def run(program: str, localnet: Localnet, folder: Path, name: str, *flags: str) -> demo.Running:
    folder.mkdir(parents=True, exist_ok=True)
    log, errors = folder / "log.jsonl", folder / "errors"
    command = [
        sys.executable, str(Path(neurons.__file__).parent / f"{program}.py"),
        "--wallet.name", name, "-H", "default", "--wallet.path", str(localnet.folder.parent / "wallets"), "-n", "localnet",
        "--localnet.dir", str(localnet.folder), "--hub.endpoint", localnet.endpoint, "--netuid", str(NETUID),
        "--competitions.dir", str(localnet.competitions), "--threads", "1", "--locks.dir", str(folder.parent / "locks"),
        "--poll", "0.2", "--log.file", str(log), *flags,
    ]  # fmt: skip
    read_to = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, "HF_TOKEN": localnet.hub_token(name), "OMP_NUM_THREADS": "1"}
    with errors.open("ab") as stream:
        process = subprocess.Popen(command, stderr=stream, stdin=subprocess.DEVNULL, env=environment)
    return demo.Running(name, process, log, errors, read_to)


def until(one: demo.Running, event: str) -> None:
    ends = time.monotonic() + 240
    while not any(news["event"] == event for news in one.news()):
        assert one.process.poll() is None, f"ended before {event}: {one.errors.read_text()[-2000:]}"
        assert time.monotonic() < ends, f"no {event}: {one.errors.read_text()[-2000:]}"
        time.sleep(0.01)


def descendants(pid: int) -> set[int]:
    """All processes below it, by the parent that each names."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listens(pid: int) -> bool:
    """It has a handler for SIGTERM: before, a signal ends Python itself."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()
    return bool(caught) and bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)


def stop(one: demo.Running, number: int = signal.SIGTERM) -> str:
    """The last line that it says. It and all below it have ended within the promised time, and it is no failure."""
    below = descendants(one.process.pid)
    began = time.monotonic()
    one.process.send_signal(number)
    status = one.process.wait(WITHIN_S)
    print(f"ended {time.monotonic() - began:.2f} s after the signal, {len(below)} processes below it")  # shown with -rP
    assert status == 0, one.errors.read_text()[-3000:]
    while any(map(is_running, below)):
        assert time.monotonic() < began + WITHIN_S, "a child outlives it"
        time.sleep(0.01)
    list(one.news())
    events = [event for event in one.events if event["event"] == "stopped"]
    assert len(events) == 1
    assert events[0]["message"].endswith("; start again to go on")
    assert "not ended after" not in events[0]["message"]
    return str(events[0]["message"])


def whole(state: Path) -> Store:
    """The state folder of a validator that has ended: nothing is half written, nothing is left lying about."""
    assert not list(state.glob("evaluations/sn29-evaluation-*")), "texts of an evaluation are left"
    assert not list((state / "records").glob(".*"))
    store = Store(state / "store.db", read_only=True)
    assert store.faults() == ()
    return store


def losses(state: Path) -> int:
    with closing(whole(state)) as store:
        return store.count_losses()


@pytest.mark.timeout(300)
def test_a_validator_ends_in_time_at_every_stage_and_goes_on(subnet, tmp_path: Path) -> None:
    localnet, hub, _ = subnet
    state, flags = tmp_path / "val", ("--dtype", "float32", "--state.dir", str(tmp_path / "val"))

    one = run("validator", localnet, state, "val", *flags)
    while not listens(one.process.pid):
        assert one.process.poll() is None, one.errors.read_text()[-2000:]
        time.sleep(0.01)
    stop(one)  # while it imports its libraries
    one = run("validator", localnet, state, "val", *flags)
    while not descendants(one.process.pid):
        assert one.process.poll() is None, one.errors.read_text()[-2000:]
        time.sleep(0.01)
    assert stop(one) == "no round is open; start again to go on", "while its first child starts"

    ledger = Ledger.open(localnet.chain)
    ledger.advance((ledger.head() // WINDOW + 1) * WINDOW + ledger.finality_lag - ledger.head())
    block = (ledger.head() // WINDOW) * WINDOW
    ledger.close()
    hub.faults.set(Fault(r"GET .*/ann/model/.*safetensors", skip=2, wire=Wire(bytes_per_s=20_000)))
    one = run("validator", localnet, state, "val", *flags)
    until(one, "samples")
    while not any(p.stat().st_size > 10_000 for p in state.glob("models/**/*") if p.is_file()):
        time.sleep(0.01)
    assert stop(one) == f"the round of block {block} is open; start again to go on", "while it fetches"
    assert losses(state) == 0
    hub.faults.set()

    one = run("validator", localnet, state, "val", *flags)
    until(one, "fetched")
    while not list(state.glob("evaluations/sn29-evaluation-*/job.json")):
        time.sleep(0.01)
    time.sleep(0.5)
    assert stop(one) == f"the round of block {block} is open; start again to go on", "while a child evaluates"
    assert losses(state) == 0

    one = run("validator", localnet, state, "val", *flags)
    until(one, "weights")
    while not is_sending(state):
        time.sleep(0.01)
    assert stop(one) == "no round is open; start again to go on", "while weights are being set: they are read back first"
    assert losses(state) == 60
    assert [event["event"] for event in one.events].count("published") == 1
    with closing(sqlite3.connect(state / "store.db")) as db, db:
        db.execute("delete from publication")  # another validator's, who has set nothing yet
    state = Path(shutil.copytree(state, tmp_path / "slow"))
    flags = ("--dtype", "float32", "--state.dir", str(state))
    one = run("validator", localnet, state, "slow", *flags, "--stop.within", "2")
    while not is_sending(state):
        time.sleep(0.01)
    one.process.terminate()
    assert one.process.wait(WITHIN_S) == 0
    assert is_sending(state), "there was no time to read them back"
    whole(state).close()
    one = run("validator", localnet, state, "slow", *flags)
    until(one, "published")
    assert stop(one, signal.SIGINT) == "no round is open; start again to go on", "while it waits for a window"
    store = whole(state)
    assert len(store.publications()) == 1
    assert store.sent() == ()
    assert len({event["block"] for event in one.events if event["event"] == "published"}) == 1, "set once, and found again"
    assert [event for event in one.events if event["event"] in ("bug", "not_published", "foreign_weights")] == []


def test_a_damaged_store_is_one_line_and_damaged_losses_are_no_reason_to_stop(subnet, tmp_path: Path) -> None:
    localnet, _, _ = subnet
    state = tmp_path / "val"
    store = Store(state / "store.db")
    store.open_round(WINDOW, {"plan": "x" * 20_000})
    for number in range(20):
        store.keep_losses(f"content {number}", "tokenizer", "p", [Loss(f"{i:032x}", 1.0, 1, "") for i in range(100)])
    store.close()
    damage(state / "store.db", "loss")
    one = run("validator", localnet, state, "val", "--state.dir", str(state))
    while not descendants(one.process.pid):
        assert one.process.poll() is None, one.errors.read_text()[-2000:]
        time.sleep(0.01)
    assert stop(one) == f"the round of block {WINDOW} is open; start again to go on"
    damage(state / "store.db", "round")
    one = run("validator", localnet, state, "val", "--state.dir", str(state))
    assert one.process.wait(60) == 1
    last = one.errors.read_text().splitlines()[-1]
    assert last.startswith(f"sn29 validator: {state / 'store.db'}: database disk image is malformed"), last


def damage(path: Path, table: str) -> None:
    """The first page of a table."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma wal_checkpoint(truncate)")
        query = "select rootpage, page_size from sqlite_master, pragma_page_size where name = ?"
        page, size = db.execute(query, (table,)).fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)


def is_sending(state: Path) -> bool:
    """Its weights are noted as about to be sent, and not known to have arrived."""
    if not (state / "store.db").exists():
        return False
    with reading(state / "store.db") as store:
        return any(sent.block is None for sent in store.sent())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", ["1", "2"], ids=["one process", "two processes"])
def test_a_miner_ends_in_time_and_goes_on_from_its_checkpoint(subnet, tmp_path: Path, processes) -> None:
    localnet, _, _ = subnet
    folder = tmp_path / "ben"
    flags = (
        "--work.dir", str(folder / "work"), "--repo", "ben/model", "--competition", "c00", "--publish-at", "0",
        "--text", "data/train-*.parquet", "--steps", "100000", "--processes", processes, "--hidden-size", "8",
        "--intermediate-size", "16", "--num-heads", "2",
    )  # fmt: skip
    trained = 0
    for number in (signal.SIGTERM, signal.SIGINT)[: 3 - int(processes)]:
        one = run("miner", localnet, folder, "ben", *flags)
        before, ends = steps(folder), time.monotonic() + 120
        while steps(folder) <= before:
            assert one.process.poll() is None, one.errors.read_text()[-3000:]
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert stop(one, number) == "training run 1 is at train, its last checkpoint stands; start again to go on"
        kept = int(torch.load(folder / "work" / "training" / "state.pt", weights_only=True)["step"])
        assert trained < kept == steps(folder), "the step is ended and a checkpoint of it written; the next start goes on there"
        trained = kept


def steps(folder: Path) -> int:
    """Of all curves; os.walk, because folders come and go below it."""
    found = [Path(at) / "curve.jsonl" for at, _, names in os.walk(folder / "work") if "curve.jsonl" in names]
    return sum(len(path.read_text().splitlines()) for path in found)
