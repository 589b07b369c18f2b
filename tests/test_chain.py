"""The chain adapter itself, on the embedded chain: what it does about failures, locks, several processes, wallets."""

from __future__ import annotations

import asyncio
import email.utils
import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from bittensor._transport.errors import StorageFunctionNotFound
from chain_net import NETUID, Net, run

from sn29.chain import Chain, create_wallet, load_wallet
from sn29.errors import Reason, Rejected, Unavailable
from sn29.localnet.ledger import LedgerSubstrate
from sn29.records import Weights

MINER = f"""
import asyncio, sys
from pathlib import Path
from sn29.chain import Chain, load_wallet
from sn29.localnet.ledger import LedgerSubstrate

async def main(folder, name):
    wallet = load_wallet("cold", name, folder / "wallets")
    substrate = LedgerSubstrate(folder / "chain")
    async with Chain({NETUID}, wallet=wallet, substrate=substrate, locks=folder / "locks") as chain:
        blocks = [(await chain.commit(f"{{name}} {{i}}".encode())).block for i in range(10)]
        print(*blocks)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


def test_two_processes_commit_at_once(tmp_path: Path) -> None:
    net = Net(tmp_path, seed=3)
    wallets = {name: net.wallet(name) for name in ("ann", "ben")}
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    miners = {
        name: subprocess.Popen([sys.executable, "-c", MINER, tmp_path, name], env=env, stdout=subprocess.PIPE) for name in wallets
    }
    blocks = {name: [int(b) for b in miner.communicate()[0].split()] for name, miner in miners.items()}
    assert [miner.returncode for miner in miners.values()] == [0, 0]

    async def story(chain: Chain) -> None:
        now = {c.hotkey: (c.block, c.data) for c in await chain.commitments()}
        for name, wallet in wallets.items():
            assert len(set(blocks[name])) == 10
            assert now[wallet.hotkey.ss58_address] == (blocks[name][-1], f"{name} 9".encode())
            then = {c.hotkey: c.data for c in await chain.commitments(blocks[name][4])}
            assert then[wallet.hotkey.ss58_address] == f"{name} 4".encode()

    run(net.chain(), story)


class Dropping(LedgerSubstrate):
    """A node whose connection breaks after it took a transaction."""

    async def submit(self, *args: Any, **options: Any) -> Any:
        await super().submit(*args, **options)
        raise bt.RpcConnectionError("connection lost")


class Blind(LedgerSubstrate):
    """A node that takes a transaction, breaks the connection, and does not see blocks become final."""

    blind = True

    async def submit(self, *args: Any, **options: Any) -> Any:
        await super().submit(*args, **options)
        raise bt.RpcConnectionError("connection lost")

    async def finalized_block_number(self) -> int:
        return 0 if self.blind else await super().finalized_block_number()


class Failing(LedgerSubstrate):
    """A node whose storage cannot be read, always or so many times."""

    def __init__(self, path: Path, error: Exception, times: int = 10**9) -> None:
        super().__init__(path)
        self.error, self.times, self.asked = error, times, 0

    async def query(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return await super().query(*args, **options)


class Swallowing(LedgerSubstrate):
    """A node that takes the first transaction and says nothing more."""

    silent = True

    async def submit(self, *args: Any, **options: Any) -> Any:
        if self.silent:
            self.silent = False
            await asyncio.Event().wait()
        return await super().submit(*args, **options)


def test_a_write_whose_answer_is_lost_is_read_back(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(chain: Chain) -> None:
        receipt = await chain.commit(b"landed")
        assert receipt.verified_by_readback
        assert [(c.block, c.data) for c in await chain.commitments()] == [(receipt.block, b"landed")]

    run(net.chain(net.wallet("miner"), substrate=Dropping(tmp_path / "chain")), story)


def test_a_write_that_never_lands_is_unavailable_and_the_next_one_works(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(chain: Chain) -> None:
        with pytest.raises(Unavailable, match="does not show it"):
            await chain.commit(b"swallowed")
        assert await chain.commitments() == ()
        await chain.commit(b"taken")
        assert [c.data for c in await chain.commitments()] == [b"taken"]

    run(net.chain(net.wallet("miner"), substrate=Swallowing(tmp_path / "chain"), deadline_s=3), story)


def test_a_silent_or_absent_node_is_unavailable() -> None:
    async def ask(address: str) -> str:
        with pytest.raises(Unavailable) as failure:
            await Chain(NETUID, network=address, deadline_s=0.3).head()
        return failure.value.why

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert asyncio.run(ask(f"ws://127.0.0.1:{port}")) == "the chain did not answer within 0.3 s"
    assert asyncio.run(ask(f"ws://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (StorageFunctionNotFound("no SubnetEpochConsensus"), "do not match: no SubnetEpochConsensus"),
        (bt.RpcConnectionError("no route"), "no route"),
        (ConnectionResetError("reset"), "reset"),
        (bt.ChainError("State of the art"), "State of the art"),
    ],
)
def test_failures_of_the_node_are_unavailable(tmp_path: Path, error: Exception, why: str) -> None:
    Net(tmp_path)

    async def story(chain: Chain) -> None:
        with pytest.raises(Unavailable, match=why) as failure:
            await chain.params()
        assert failure.value.retry_s is None
        assert (await chain.head()).block >= 0  # over a new connection

    run(Chain(NETUID, substrate=Failing(tmp_path / "chain", error)), story)


@pytest.mark.parametrize(
    ("stated", "retry_s"),
    [("30", 30), (None, 12), ("Wed, 21 Oct", 12), ("in 1000 s", 990)],
)
def test_a_refusal_under_a_policy_says_when_to_come_again(tmp_path: Path, stated: str | None, retry_s: float) -> None:
    if stated == "in 1000 s":
        stated = email.utils.formatdate(time.time() + 1000, usegmt=True)
    Net(tmp_path)

    async def story(chain: Chain) -> None:
        for _ in range(2):  # the second time nobody is asked
            with pytest.raises(Unavailable, match="refuses traffic: slow down") as failure:
                await chain.params()
            assert failure.value.retry_s == pytest.approx(retry_s, rel=0.5)
        assert substrate.asked == 1

    substrate = Failing(tmp_path / "chain", bt.RpcPolicyError("slow down", retry_after=stated))
    run(Chain(NETUID, substrate=substrate, deadline_s=5), story)


def test_a_short_pause_is_waited_out(tmp_path: Path) -> None:
    Net(tmp_path)

    async def story(chain: Chain) -> None:
        assert (await chain.params()).tempo == 360
        assert substrate.asked > 1

    substrate = Failing(tmp_path / "chain", bt.RpcPolicyError("slow down", retry_after="1"), times=1)
    run(Chain(NETUID, substrate=substrate), story)


def test_one_writer_of_a_hotkey_over_processes(tmp_path: Path) -> None:
    net = Net(tmp_path, weights_rate_limit=0)
    wallet = net.wallet("miner", permit=True)
    locks = tmp_path / "locks"
    locks.mkdir()

    async def story(chain: Chain) -> None:
        with (locks / f"{chain.hotkey}.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            held.write("process 4711")
            held.flush()
            with pytest.raises(Unavailable, match="process 4711 is writing with hotkey"):
                await chain.commit(b"second")
            assert await chain.commitments() == ()
        await chain.commit(b"third")
        await chain.set_weights(Weights(1, {chain.hotkey: 1.0}))
        assert (locks / f"{chain.hotkey}.lock").read_text() == f"process {os.getpid()}"

    run(net.chain(wallet, locks=locks, deadline_s=4), story)
    (tmp_path / "file").write_text("")
    with pytest.raises(Rejected, match="a folder for locks"):
        asyncio.run(net.chain(wallet, locks=tmp_path / "file").commit(b"x"))


def test_a_set_that_landed_unseen_is_not_repeated(tmp_path: Path) -> None:
    """Neither by the process that lost the answer, nor by the next one, which knows only when it began."""
    net = Net(tmp_path, weights_rate_limit=0)
    wallet = net.wallet("validator", permit=True)
    one, two = (net.wallet(name).hotkey.ss58_address for name in ("one", "two"))

    async def blind(substrate: Any) -> int:
        async with net.chain(wallet, substrate=substrate, deadline_s=3) as chain:
            since = (await chain.head()).block
            with pytest.raises(Unavailable, match="does not show it"):
                await chain.set_weights(Weights(1, {one: 1.0}))
            substrate.blind = False
            receipt = await chain.set_weights(Weights(1, {one: 1.0}))
            assert receipt.verified_by_readback
        return since

    async def later(since: int) -> None:
        async with net.chain(wallet) as chain:
            graph = await chain.metagraph()
            first = next(n.last_update for n in graph.neurons if n.hotkey == chain.hotkey)
            assert (await chain.set_weights(Weights(1, {one: 1.0}), since=since)).block == first
            assert (await chain.set_weights(Weights(1, {two: 1.0}), since=since)).block > first
            assert (await chain.set_weights(Weights(1, {two: 1.0}))).block > first

    since = asyncio.run(blind(Blind(tmp_path / "chain")))
    blocks = range(since, net.ledger.head() + 1)
    assert [call.signer for block in blocks for call in net.ledger.extrinsics(block)] == [wallet.hotkey.ss58_address]
    asyncio.run(later(since))


def test_settings_are_checked_before_anything_is_asked(tmp_path: Path) -> None:
    create_wallet("cold", "hot", tmp_path)
    (tmp_path / "cold/hotkeys/torn").write_text('{"secretPhrase": ')
    for wrong in (
        lambda: Chain(NETUID, network="finny"),
        lambda: Chain(NETUID, network="ws://127.0.0.1:1", fallbacks=["http://127.0.0.1:2"]),
        lambda: Chain(NETUID, network="ws://127.0.0.1:1", archives=["finney"]),
        lambda: load_wallet("cold", "missing", tmp_path),
        lambda: load_wallet("cold", "torn", tmp_path),
        lambda: create_wallet("cold", "hot", tmp_path),
    ):
        with pytest.raises(Rejected) as refusal:
            wrong()
        assert refusal.value.reason is Reason.SETTING


def test_a_wallet_survives_and_its_secrets_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = create_wallet("cold", "hot", tmp_path)
    second = create_wallet("cold", "hot2", tmp_path)
    loaded = load_wallet("cold", "hot", tmp_path)
    assert loaded.hotkey.ss58_address == made.hotkey.ss58_address != second.hotkey.ss58_address
    assert made.coldkeypub.ss58_address == second.coldkeypub.ss58_address
    assert "".join(capsys.readouterr()) == ""
    (tmp_path / "cold/coldkey").unlink()
    assert load_wallet("cold", "hot", tmp_path).hotkey.ss58_address == made.hotkey.ss58_address
