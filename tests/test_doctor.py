"""`sn29 doctor` on a real subnet of this machine: all green, and each check red by a real fault."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from loopback_node import LoopbackNode
from recorded import losses, round_record

from sn29 import cli, doctor, record_files
from sn29.chain import Chain
from sn29.errors import Rejected
from sn29.localnet import text
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.localnet.network import NETUID, Localnet, prepare
from sn29.records import Identity
from sn29.settings import DoctorOfMiner, DoctorOfValidator, default_cache, read
from sn29.store import Store

ROOT = Path(__file__).parents[1]
BLOCK_SECONDS = 0.5


@dataclass
class Subnet:
    """A localnet with a validator `val` and a miner `min`."""

    net: Localnet
    folder: Path

    @property
    def flags(self) -> list[str]:
        return [
            "--network", "localnet", "--localnet.dir", str(self.net.folder), "--hub.endpoint", self.net.endpoint,
            "--competitions.dir", str(self.net.competitions), "--wallet.path", str(self.folder / "wallets"),
            "--state.dir", str(self.folder / "state"),
        ]  # fmt: skip

    def identity(self) -> Identity:
        async def story() -> Identity:
            async with Chain(NETUID, substrate=LedgerSubstrate(self.net.chain)) as chain:
                return await chain.identity()

        return asyncio.run(story())

    def examine(self, only: str, *flags: str) -> dict[str, doctor.Finding]:
        """The findings of some checks of the validator, later flags beating the subnet's own."""
        return findings(DoctorOfValidator, [*self.flags, "-w", "val", "--only", only, *flags])


def findings(kind: type[DoctorOfValidator] | type[DoctorOfMiner], flags: list[str]) -> dict[str, doctor.Finding]:
    async def all_of_them() -> dict[str, doctor.Finding]:
        return {finding.check: finding async for finding in doctor.examine(read(kind, flags))}

    return asyncio.run(all_of_them())


def assert_red(finding: doctor.Finding, *words: str) -> None:
    assert finding.state == "red", finding
    assert finding.advice, "what to do"
    for word in words:
        assert word in finding.said + finding.advice, finding


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of settings of the developer's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def subnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subnet]:
    folder = tmp_path_factory.mktemp("doctor")
    net = prepare(folder / "net", text.build(default_cache()), block_seconds=BLOCK_SECONDS)
    with net.serve():
        net.register("val", "default", folder / "wallets", validator=True)
        net.register("min", "default", folder / "wallets")
        ledger = Ledger.open(net.chain)
        ledger.advance(2)
        ledger.close()
        yield Subnet(net, folder)


def test_everything_is_well_on_a_localnet(subnet, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", subnet.net.hub_token("min"))
    before = sorted(subnet.folder.rglob("*"))
    assert cli.main(["doctor", *subnet.flags, "-w", "val"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = ["python", "packages", "memory", "disk", "competitions", "wallet", "chain", "clock", "spares", "registration", "hub"]
    assert [line.split()[:2] for line in lines] == [
        ["ok", name] for name in [*checks, "dataset", "device", "confinement", "permit", "stake", "store"]
    ]
    miner = [*(flag for flag in subnet.flags if "state" not in flag), "--publish-at", "0"]
    assert cli.main(["doctor", "miner", *miner, "--work.dir", str(subnet.folder / "work"), "-w", "min", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert said["program"] == "miner"
    assert [finding["check"] for finding in said["findings"]] == [*checks, "dataset", "records", "token"]
    made = {path.name for path in set(subnet.folder.rglob("*")) - set(before)}
    assert made <= {"chain.db-shm", "chain.db-wal"}, "nothing is written"


def test_one_that_is_silent_and_one_that_is_broken_hide_nothing(subnet, capsys):
    """A node that takes connections and never answers, a wallet that is missing: the rest is found as ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        words = ["-n", node, "-w", "nobody", "--doctor.deadline", "3", "--json"]
        only = "python,wallet,chain,clock,registration,stake,hub,store"
        status = cli.main(["doctor", "validator", *subnet.flags, *words, "--only", only])
    assert status == 1
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    states = {name: finding["state"] for name, finding in found.items()}
    assert states.pop("clock") != "ok"
    assert states.pop("registration") != "ok"
    assert states.pop("stake") != "ok"
    assert states == {"python": "ok", "wallet": "red", "chain": "red", "hub": "ok", "store": "ok"}


def test_a_disk_that_never_answers_does_not_keep_the_doctor():
    """A thread that hangs is left behind, so that the program ends."""
    code = (
        "import asyncio, time\nfrom sn29 import doctor\n"
        "async def main():\n"
        "    never = doctor._beside(lambda: time.sleep(600))\n"
        "    print((await doctor._one('disk', never, 'look at it', 0.2)).state)\n"
        "asyncio.run(main())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert done.stdout.strip() == "red"


# ---- each check, red -------------------------------------------------------------------------------------------------


def _with_package(folder: Path, name: str, version: str, *metadata: str) -> dict[str, doctor.Finding]:
    """Findings of a Python that has another package of that name installed in front of the right one."""
    info = folder / "packages" / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata, ""]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT)])}
    command = [sys.executable, "-m", "sn29.cli", "doctor", "--only", "python,packages", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 1, done.stderr
    return {f["check"]: doctor.Finding(**f) for f in json.loads(done.stdout)["findings"]}


def test_another_python(tmp_path):
    assert_red(_with_package(tmp_path, "sn29", "0.1.0", "Requires-Python: >=3.99")["python"], "rule >=3.99")


def test_another_release_of_what_decides_numbers(tmp_path):
    found = _with_package(tmp_path, "torch", "1.0.0")
    assert_red(found["packages"], "torch 1.0.0", "==2.13.0")
    assert found["python"].state == "ok"


def _competitions(subnet: Subnet, folder: Path, *changes: tuple[str, str]) -> tuple[str, str]:
    """The flag for the subnet's competitions with other words in c00.yaml."""
    folder.mkdir()
    for path in subnet.net.competitions.iterdir():
        words = path.read_text()
        for old, new in changes if path.name == "c00.yaml" else ():
            assert old in words
            words = words.replace(old, new)
        (folder / path.name).write_text(words)
    return "--competitions.dir", str(folder)


def test_too_little_memory(subnet, tmp_path):
    flags = _competitions(subnet, tmp_path / "c", ("parameters: 8e6", "parameters: 8e12"))
    assert_red(subnet.examine("memory", *flags)["memory"], "GiB are free", "rule 29,8")


def test_too_little_room(subnet, tmp_path):
    flags = _competitions(subnet, tmp_path / "c", ("bytes: 60e6", "bytes: 60e15"))
    assert_red(subnet.examine("disk", *flags)["disk"], "GiB are free", "--state.dir")


def test_competition_files_that_are_wrong_or_not_pinned(subnet, tmp_path):
    flags = _competitions(subnet, tmp_path / "a", ("reward_share: 0.5", "reward_share: 0.9"))
    found = subnet.examine("competitions,dataset", *flags)
    assert_red(found["competitions"], "0.9")
    assert found["dataset"].state == "unknown"
    revision = next(line for line in (subnet.net.competitions / "c00.yaml").read_text().splitlines() if "revision" in line)
    bare = revision.partition("revision: ")[2].partition(",")[0]
    flags = _competitions(subnet, tmp_path / "b", (f"revision: {bare}", "revision: null"))
    assert "not pinned" in subnet.examine("competitions", *flags)["competitions"].said
    assert_red(subnet.examine("competitions", *flags, "-n", "test")["competitions"], "c00.yaml", "competitions pin")


def test_no_such_wallet(subnet):
    found = subnet.examine("wallet,permit", "-w", "nobody")
    assert_red(found["wallet"], "nobody", "btcli wallet create")
    assert found["permit"].state == "unknown"


def test_a_hotkey_that_is_not_registered(subnet):
    from sn29.chain import create_wallet

    create_wallet("stranger", "default", subnet.folder / "wallets")
    found = subnet.examine("registration,permit,stake", "-w", "stranger")
    assert_red(found["registration"], "btcli subnets register")
    assert [found[name].state for name in ("permit", "stake")] == ["unknown", "unknown"]


def test_no_such_subnet(subnet):
    assert_red(subnet.examine("registration", "--netuid", "77")["registration"], "no subnet 77")


def test_no_permit(subnet):
    found = subnet.examine("permit,registration", "-w", "min")
    assert_red(found["permit"], "no validator permit", "stake")
    assert found["registration"].state == "ok"


def test_no_node_there(subnet):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        found = subnet.examine("chain,clock", "-n", f"ws://127.0.0.1:{nobody.getsockname()[1]}")
    assert_red(found["chain"], "--subtensor.fallbacks")
    assert found["clock"].state == "unknown"


def test_what_nobody_else_says_is_said(subnet, capsys):
    """A check that needs another one which was not asked for says itself what is wrong, and what to do."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nowhere = f"ws://127.0.0.1:{nobody.getsockname()[1]}"
        for check in ("clock", "registration", "stake"):
            assert_red(subnet.examine(check, "-n", nowhere)[check], "could not connect", "--subtensor.fallbacks")
        assert cli.main(["doctor", *subnet.flags, "-n", nowhere, "--only", "clock"]) == 1
        assert "not well: clock" in capsys.readouterr().out
        assert cli.main(["doctor", *subnet.flags, "-n", nowhere, "--only", "clock,chain"]) == 1
        assert "not well: chain; not known: clock" in capsys.readouterr().out
    assert_red(subnet.examine("permit", "-w", "nobody")["permit"], "nobody", "btcli wallet create")


def test_a_first_endpoint_that_is_dead_is_not_hidden_by_a_spare_one(subnet):
    """And each spare and archive is asked itself."""
    with LoopbackNode(subnet.net.chain) as node, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nowhere = f"ws://127.0.0.1:{nobody.getsockname()[1]}"
        found = subnet.examine("chain,clock,spares,registration", "-n", nowhere, "--subtensor.fallbacks", node.url)
        assert_red(found["chain"], "--subtensor.fallbacks")
        assert (found["clock"].state, found["registration"].state) == ("unknown", "ok"), "the program would go on"
        assert (found["spares"].state, found["spares"].said.split(" is at")[0]) == ("ok", f"spare {node.url}")
        both = [
            "--subtensor.fallbacks",
            f"{node.url.replace('127.0.0.1', 'localhost')},{nowhere}",
            "--subtensor.archives",
            node.url,
        ]
        found = subnet.examine("chain,spares", "-n", node.url, *both)
        assert found["chain"].state == "ok"
        assert_red(found["spares"], f"spare {nowhere}: ", f"archive {node.url} is at block")
    assert "embedded" in subnet.examine("spares")["spares"].said


def test_a_spare_of_another_chain_and_an_archive_that_forgets(subnet, own):
    ledger, flags = own
    ledger.advance(2000)
    with LoopbackNode(Path(flags[1]) / "chain.db") as node:
        node.faults.keeps_states = 256
        asked = ["-n", node.url, "--subtensor.fallbacks", "none", "--subtensor.archives", node.url]
        assert_red(subnet.examine("spares", *asked)["spares"], f"archive {node.url}", "has forgotten")
        with LoopbackNode(subnet.net.chain) as other:
            asked = ["-n", node.url, "--subtensor.fallbacks", other.url, "--subtensor.archives", "none"]
            assert_red(subnet.examine("spares", *asked)["spares"], f"spare {other.url}: genesis 0x", "rule 0x")


def test_no_localnet_there(subnet, tmp_path):
    assert_red(subnet.examine("chain", "--localnet.dir", str(tmp_path))["chain"], "sn29 localnet up")


def test_no_hub_there(subnet):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        found = subnet.examine("hub,dataset,chain", "--hub.endpoint", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert_red(found["hub"], "--hub.endpoint")
    assert_red(found["dataset"])
    assert found["chain"].state == "ok"


def test_a_data_set_without_the_files(subnet, tmp_path):
    flags = _competitions(subnet, tmp_path / "c", ("data/eval-*.parquet", "data/other-*.parquet"))
    found = subnet.examine("hub,dataset", *flags)
    assert_red(found["dataset"], "data/other-*.parquet")
    assert found["hub"].state == "ok"


def test_no_such_device(subnet):
    assert_red(subnet.examine("device", "--device", "cuda:99")["device"], "nvidia-smi")


def test_what_a_strangers_model_cannot_do_is_tried_as_for_the_device(subnet):
    """With a GPU the child is confined otherwise, in two steps; the trial needs none."""
    found = [subnet.examine("confinement", "--device", device)["confinement"] for device in ("cpu", "cuda:99")]
    assert [finding.state for finding in found] == ["ok", "ok"], found
    assert all(finding.said.startswith("a stranger's model cannot reach a network, reach a socket of yours") for finding in found)
    shared = "take shared memory beyond its limit"
    assert [finding.said.partition("; it can ")[2].startswith(shared) for finding in found] == [False, True]
    assert shared in found[0].said


def test_a_store_of_another_schema(subnet, tmp_path):
    Store(tmp_path / "store.db").close()
    assert "schema" in subnet.examine("store", "--state.dir", str(tmp_path))["store"].said
    with sqlite3.connect(tmp_path / "store.db") as db:
        db.execute("update meta set value = '99' where key = 'schema'")
    db.close()
    assert_red(subnet.examine("store", "--state.dir", str(tmp_path))["store"], "99", "--state.dir")


def test_a_store_of_another_chain(subnet, own, tmp_path):
    store = Store(tmp_path / "store.db")
    flags = ["--state.dir", str(tmp_path)]
    assert "not used yet" in subnet.examine("store", *flags)["store"].said
    store.belong_to(subnet.identity(), NETUID)
    store.close()
    assert "of this chain" in subnet.examine("store", *flags)["store"].said
    assert_red(subnet.examine("store", *flags, *own[1])["store"], subnet.identity().genesis, "--state.dir")
    assert_red(subnet.examine("store", *flags, "--netuid", "30")["store"], "netuid 29", "netuid 30")
    found = subnet.examine("store", *flags, "--localnet.dir", str(tmp_path / "nowhere"))["store"]
    assert (found.state, "not known" in found.said) == ("ok", True)


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_token_that_the_hub_does_not_know(subnet, token):
    flags = ["--hub.endpoint", subnet.net.endpoint, "--hub.token", token, "--only", "token"]
    assert_red(findings(DoctorOfMiner, flags)["token"], "HF_TOKEN")


def test_records_that_a_miner_would_measure_by(subnet, tmp_path):
    def found(*flags: str) -> doctor.Finding:
        return findings(DoctorOfMiner, [*miner_flags, "--only", "records", *flags])["records"]

    miner_flags = [flag for flag in subnet.flags if "state" not in flag]
    assert_red(found(), "a forecast needs them", "--records", "--publish-at 0")
    assert found("--publish-at", "0").state == "ok"
    assert found("--model", str(tmp_path)).state == "ok"
    assert_red(found("--records", str(tmp_path / "nowhere")), "nowhere")
    assert "no round has been judged yet" in found("--records", str(tmp_path)).said
    record = round_record(360, losses(20, 1, ann=(0.0, 0.0)), {"ann": 5})
    record_files.write(tmp_path / "records", record)
    for folder in (tmp_path, tmp_path / "records"):
        assert found("--records", str(folder)).said == "the newest one is of block 360: 1 models of c00 were evaluated"
    assert_red(found("--records", str(tmp_path), "--competition", "c01"), "does not know c01")
    (path,) = (tmp_path / "records").iterdir()
    path.write_bytes(b"{}")
    assert_red(found("--records", str(tmp_path)), "the round record is not usable")


def test_a_check_that_does_not_exist(subnet):
    with pytest.raises(Rejected, match=r"--only.*weather.*registration"):
        subnet.examine("chain,weather")


# ---- chains of their own ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(subnet: Subnet, tmp_path: Path) -> Iterator[tuple[Ledger, list[str]]]:
    """A new chain with the subnet's validator on it, and the flag that names it."""
    from sn29.chain import load_wallet

    ledger = Ledger.create(tmp_path / "own" / "chain.db", netuid=NETUID, block_seconds=BLOCK_SECONDS)
    wallet = load_wallet("val", "default", subnet.folder / "wallets")
    ledger.register(wallet.hotkey.ss58_address, wallet.hotkey.ss58_address, stake=100, permit=True)
    ledger.advance(2)
    yield ledger, ["--localnet.dir", str(tmp_path / "own")]
    ledger.close()


def test_too_little_stake(subnet, own):
    ledger, flags = own
    ledger.set_params(stake_threshold=1000 * 10**9)
    ledger.advance(1)
    found = subnet.examine("stake,permit", *flags)
    assert_red(found["stake"], "100.00, rule at least 1,000.00")
    assert found["permit"].state == "ok"


def test_a_clock_that_is_slow(subnet, own):
    ledger, flags = own
    ledger.advance(600)  # its blocks are 300 s ahead of this machine's clock now
    found = subnet.examine("chain,clock", *flags)
    assert_red(found["clock"], "s behind", "rule 30 s", "NTP")
    assert found["chain"].state == "ok"


def _long_ago(folder: str, offset: int) -> None:
    """The chain began 1,000 s ago; `offset` blocks are added to those that the clock has made since."""
    with sqlite3.connect(Path(folder) / "chain.db") as db:
        db.execute("update chain set value = value - 1000 where name = 'genesis'")
        db.execute("update chain set value = ? where name = 'offset'", (offset,))
    db.close()


def test_a_clock_that_is_fast(subnet, own):
    """Blocks come in time, but each one's own time is 1,000 s ago."""
    _, flags = own
    _long_ago(flags[1], round(-1000 / BLOCK_SECONDS) + 4)
    found = subnet.examine("chain,clock", *flags)
    assert_red(found["clock"], "s ahead", "NTP")
    assert found["chain"].state == "ok"


def test_a_chain_that_stands_still(subnet, own):
    _, flags = own
    _long_ago(flags[1], -1_000_000)
    found = subnet.examine("chain,clock", *flags)
    assert_red(found["chain"], "no newer one", "--subtensor.network")
    assert found["clock"].state == "unknown"


def test_a_node_that_loads_old_blocks_and_one_without_finality():
    catching_up = doctor.Pulse(head=1000, finalized=998, age_s=5000, block_seconds=12, new_blocks=200, waited_s=2)
    with pytest.raises(Rejected, match="catching up"):
        doctor.lag_of(catching_up)
    stuck = doctor.Pulse(head=1000, finalized=900, age_s=5, block_seconds=12, new_blocks=0, waited_s=0)
    with pytest.raises(Rejected, match="100 blocks behind"):
        doctor.lag_of(stuck)
    assert "5.0 s after" in doctor.skew_of(stuck)
