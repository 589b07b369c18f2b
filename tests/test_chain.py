"""The chain adapter on the embedded chain: real keys, the SDK's own client, several processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from bittensor._transport.errors import StorageFunctionNotFound

from sn29.chain import Chain, create_wallet, load_wallet
from sn29.errors import Reason, Rejected, Unavailable
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.records import Weights

NETUID = 29
BLOCK_S = 0.05


class Net:
    """A chain with wallets, in one folder."""

    def __init__(self, folder: Path, **params: Any) -> None:
        self.folder = folder
        self.ledger = Ledger.create(folder / "chain", netuid=NETUID, block_seconds=BLOCK_S, **params)

    def wallet(self, name: str, *, registered: bool = True, permit: bool = False) -> Any:
        wallet = create_wallet("cold", name, self.folder / "wallets")
        if registered:
            self.ledger.register(wallet.hotkey.ss58_address, wallet.coldkeypub.ss58_address, stake=1, permit=permit)
            self.ledger.advance(1)
        return wallet

    def chain(self, wallet: Any = None, **options: Any) -> Chain:
        options.setdefault("substrate", LedgerSubstrate(self.folder / "chain"))
        return Chain(NETUID, wallet=wallet, **options)


def run(chain: Chain, story: Callable[[Chain], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with chain:
            await story(chain)

    asyncio.run(inside())


def test_commitments_come_back_with_their_blocks_and_as_they_were(tmp_path: Path) -> None:
    net = Net(tmp_path)
    first, second = net.wallet("first"), net.wallet("second")
    blob = bytes(range(128))

    async def story() -> None:
        async with net.chain(first) as a, net.chain(second) as b:
            before = await a.head()
            one = await a.commit(b"model one")
            other = await b.commit(blob)
            again = await a.commit(b"model two")
            assert before.block < one.block < other.block < again.block
            assert one.verified_by_readback
            found = [(c.hotkey, c.block, c.data) for c in await b.commitments()]
            assert found == [(b.hotkey, other.block, blob), (a.hotkey, again.block, b"model two")]
            past = [(c.hotkey, c.block, c.data) for c in await a.commitments(again.block - 1)]
            assert past == [(a.hotkey, one.block, b"model one"), (b.hotkey, other.block, blob)]
            assert await a.commitments(before.block) == ()

    asyncio.run(story())


def test_the_same_bytes_again_move_the_block(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(chain: Chain) -> None:
        first = await chain.commit(b"same")
        second = await chain.commit(b"same")
        assert second.block > first.block
        assert [c.block for c in await chain.commitments()] == [second.block]

    run(net.chain(net.wallet("miner")), story)


def test_room_and_size_of_commitments(tmp_path: Path) -> None:
    net = Net(tmp_path, tempo=1_000_000)

    async def story(chain: Chain) -> None:
        for size in (0, 129):
            with pytest.raises(Rejected) as refusal:
                await chain.commit(b"x" * size)
            assert refusal.value.reason is Reason.MALFORMED_COMMITMENT
        blocks = [(await chain.commit(b"%d" % i)).block for i in range(31)]
        assert blocks == sorted(set(blocks))
        with pytest.raises(Unavailable, match="SpaceLimitExceeded"):
            await chain.commit(b"one too many")

    run(net.chain(net.wallet("miner")), story)


def test_an_unregistered_hotkey_is_refused_and_a_lost_one_not_listed(tmp_path: Path) -> None:
    net = Net(tmp_path, max_uids=1)
    stranger, miner = net.wallet("stranger", registered=False), net.wallet("miner")

    async def story(chain: Chain) -> None:
        with pytest.raises(Rejected) as refusal:
            await chain.commit(b"me too")
        assert refusal.value.reason is Reason.NOT_REGISTERED
        with pytest.raises(Rejected) as refusal:
            await chain.set_weights(Weights(1, {miner.hotkey.ss58_address: 1.0}))
        assert refusal.value.reason is Reason.NOT_REGISTERED
        async with net.chain(miner) as other:
            await other.commit(b"here")
        assert len(await chain.commitments()) == 1
        net.ledger.register(chain.hotkey, chain.hotkey)  # takes the only uid
        net.ledger.advance(1)
        assert await chain.commitments() == ()

    run(net.chain(stranger), story)


def test_other_shapes_of_commitments_reach_the_parser_as_bytes(tmp_path: Path) -> None:
    net = Net(tmp_path)
    wallet = net.wallet("miner")

    async def story(chain: Chain) -> None:
        async with bt.Client("local", substrate=LedgerSubstrate(tmp_path / "chain")) as client:
            for fields in ([{"Raw1": b"a"}, {"Raw1": b"b"}], [{"Sha256": b"\1" * 32}], []):
                call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": fields})
                assert (await client.submit_call(call, wallet, signer="hotkey", wait_for_finalization=False)).success
                (found,) = await chain.commitments()
                assert found.data.startswith(b"[")
        await chain.commit(b"\xff\x00:not utf-8")
        assert (await chain.commitments())[0].data == b"\xff\x00:not utf-8"

    run(net.chain(wallet), story)


def test_weights_are_read_back_by_hotkey(tmp_path: Path) -> None:
    net = Net(tmp_path, weights_rate_limit=0)
    validator = net.wallet("validator", permit=True)
    one, two, three = (net.wallet(name).hotkey.ss58_address for name in ("one", "two", "three"))

    async def story(chain: Chain) -> None:
        assert await chain.weights(chain.hotkey) == {}
        before = (await chain.head()).block
        sent = {one: 0.7, two: 0.2, three: 0.1, "5ThisHotkeyHasLeft": 0.3}
        receipt = await chain.set_weights(Weights(before, sent))
        row = await chain.weights(chain.hotkey)
        assert receipt.verified_by_readback
        assert receipt.block > before
        assert row == pytest.approx({one: 0.7, two: 0.2, three: 0.1}, abs=1e-4)
        assert sum(row.values()) == pytest.approx(1)
        assert await chain.weights(chain.hotkey, before) == {}
        assert await chain.weights("5NotRegistered") == {}
        graph = await chain.metagraph()
        assert {n.hotkey: n.last_update for n in graph.neurons}[chain.hotkey] == receipt.block
        await chain.set_weights(Weights(before, {two: 1.0}))
        assert await chain.weights(chain.hotkey) == {two: 1.0}
        assert await chain.weights(chain.hotkey, receipt.block) == row

    run(net.chain(validator), story)


def test_a_row_is_not_inherited_with_a_uid(tmp_path: Path) -> None:
    net = Net(tmp_path, weights_rate_limit=0, max_uids=3)
    validator, one, two = (net.wallet(name, permit=name == "v") for name in ("v", "one", "two"))

    async def story(chain: Chain) -> None:
        await chain.set_weights(Weights(1, {one.hotkey.ss58_address: 0.5, two.hotkey.ss58_address: 0.5}))
        newcomer = net.wallet("newcomer").hotkey.ss58_address
        assert (await chain.metagraph()).uid_of()[newcomer] == 1
        assert await chain.weights(chain.hotkey) == {two.hotkey.ss58_address: 1.0}

    run(net.chain(validator), story)


def test_the_rate_limit_says_how_long_to_wait(tmp_path: Path) -> None:
    net = Net(tmp_path, weights_rate_limit=10_000)
    validator, miner = net.wallet("validator", permit=True), net.wallet("miner").hotkey.ss58_address

    async def story(chain: Chain) -> None:
        with pytest.raises(Unavailable, match="blocks to wait") as early:
            await chain.set_weights(Weights(1, {miner: 1.0}))  # registration counts as a weight set
        assert 0 < early.value.retry_s <= 10_000 * BLOCK_S
        net.ledger.advance(10_000)
        assert (await chain.set_weights(Weights(1, {miner: 1.0}))).verified_by_readback

    run(net.chain(validator), story)


def test_permit_version_and_empty_weights(tmp_path: Path) -> None:
    net = Net(tmp_path, weights_rate_limit=0)
    validator, plain = net.wallet("validator", permit=True), net.wallet("plain")
    miner = net.wallet("miner").hotkey.ss58_address

    async def refused(wallet: Any, weights: dict[str, float], version_key: int = 0) -> Reason:
        async with net.chain(wallet) as chain:
            with pytest.raises(Rejected) as refusal:
                await chain.set_weights(Weights(1, weights), version_key=version_key)
            return refusal.value.reason

    async def story() -> None:
        assert await refused(plain, {miner: 1.0}) is Reason.NOT_PERMITTED
        assert await refused(validator, {}) is Reason.NO_WEIGHTS
        assert await refused(validator, {"5Gone": 1.0, miner: 0.0}) is Reason.NO_WEIGHTS
        net.ledger.set_params(version_key=7)
        net.ledger.advance(1)
        assert await refused(validator, {miner: 1.0}, 6) is Reason.OUTDATED
        async with net.chain(validator) as chain:
            assert (await chain.params()).version_key == 7
            assert (await chain.set_weights(Weights(1, {miner: 1.0}), version_key=7)).verified_by_readback

    asyncio.run(story())


def test_points_and_settings_of_the_chain(tmp_path: Path) -> None:
    net = Net(tmp_path, tempo=77, max_weight=13107, immunity_blocks=5, min_weights=2)
    net.ledger.advance(50)

    async def story(chain: Chain) -> None:
        head, final = await chain.head(), await chain.finalized()
        assert head.block >= 50
        assert final.block <= (await chain.head()).block - 2
        assert await chain.block_hash(final.block) == final.hash == net.ledger.hash_of(final.block)
        assert await chain.block_seconds() == BLOCK_S
        params = await chain.params(head.block)
        assert (params.tempo, params.min_weights, params.immunity_blocks) == (77, 2, 5)
        assert params.max_weight == pytest.approx(0.2)
        assert not params.commit_reveal
        with pytest.raises(Unavailable, match="no block at height"):
            await chain.block_hash(10**9)
        with pytest.raises(Rejected, match="no wallet"):
            await chain.commit(b"unsigned")

    run(net.chain(), story)


def test_a_missing_subnet_never_looks_empty(tmp_path: Path) -> None:
    Net(tmp_path)

    async def story(chain: Chain) -> None:
        for question in (chain.metagraph, chain.commitments, chain.params):
            with pytest.raises(Unavailable, match="no subnet 30"):
                await question()

    run(Chain(30, substrate=LedgerSubstrate(tmp_path / "chain")), story)


MINER = f"""
import asyncio, sys
from pathlib import Path
from sn29.chain import Chain, load_wallet
from sn29.localnet.ledger import LedgerSubstrate

async def main(folder, name):
    wallet = load_wallet("cold", name, folder / "wallets")
    async with Chain({NETUID}, wallet=wallet, substrate=LedgerSubstrate(folder / "chain")) as chain:
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

    run(net.chain(net.wallet("miner"), substrate=Swallowing(tmp_path / "chain"), deadline_s=0.5), story)


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
    ("error", "why", "retry_s"),
    [
        (StorageFunctionNotFound("no SubnetEpochConsensus"), "do not match: no SubnetEpochConsensus", None),
        (bt.RpcPolicyError("slow down", retry_after="30"), "refuses traffic: slow down", 30.0),
        (bt.RpcPolicyError("slow down", retry_after="Wed, 21 Oct"), "refuses traffic: slow down", None),
        (bt.RpcConnectionError("no route"), "no route", None),
        (ConnectionResetError("reset"), "reset", None),
    ],
)
def test_failures_of_the_node_are_unavailable(tmp_path: Path, error: Exception, why: str, retry_s: float | None) -> None:
    class Failing(LedgerSubstrate):
        async def query(self, *args: Any, **options: Any) -> Any:
            raise error

    Net(tmp_path)

    async def story(chain: Chain) -> None:
        with pytest.raises(Unavailable, match=why) as failure:
            await chain.params()
        assert failure.value.retry_s == retry_s
        assert (await chain.head()).block >= 0  # over a new connection

    run(Chain(NETUID, substrate=Failing(tmp_path / "chain")), story)


def test_settings_are_checked_before_anything_is_asked(tmp_path: Path) -> None:
    create_wallet("cold", "hot", tmp_path)
    (tmp_path / "cold/hotkeys/torn").write_text('{"secretPhrase": ')
    for wrong in (
        lambda: Chain(NETUID, network="finny"),
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
