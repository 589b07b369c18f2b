"""The loopback node: the unmodified SDK and btcli against it, a chain's own refusals, and each fault it can have."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from beacon import TestBeacon
from bittensor._transport.errors import StorageFunctionNotFound
from bittensor.keyfiles import Keypair
from loopback_node import LoopbackNode
from websockets.asyncio.client import connect

from sn29.localnet.ledger import Ledger, LedgerSubstrate

NETUID = 29
REPOSITORY = Path(__file__).resolve().parents[1]


class Wallet:
    """What the SDK takes for a wallet, out of two development keys."""

    def __init__(self, name: str) -> None:
        self.hotkey = self.hotkeypub = Keypair.create_from_uri(f"//{name}")
        self.coldkey = self.coldkeypub = Keypair.create_from_uri(f"//{name}//cold")


ALICE, BOB, NOBODY = Wallet("Alice"), Wallet("Bob"), Wallet("Nobody")


@contextlib.asynccontextmanager
async def sdk(url: str, *, archives: tuple[str, ...] = ()) -> AsyncIterator[Any]:
    """The SDK's client. Its close gets half a second: under Python 3.11 it may wait for ever when an answer comes just then."""
    client = bt.Client(url, fallback_endpoints=[], archive_endpoints=list(archives))
    await client.__aenter__()
    try:
        yield client
    finally:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.__aexit__(None, None, None), 0.5)


class Net:
    """A chain with Alice (uid 0, a validator) and Bob (uid 1), and a node in front of it."""

    def __init__(self, folder: Path, *, without: tuple[str, ...] = (), block_seconds: float = 0.05, **params: Any) -> None:
        self.path, self.beacon = folder / "chain", TestBeacon()
        params = {"tempo": 20, "weights_rate_limit": 0} | params
        self.ledger = Ledger.create(self.path, netuid=NETUID, block_seconds=block_seconds, beacon=self.beacon, **params)
        for wallet, permit in ((ALICE, True), (BOB, False)):
            self.ledger.register(wallet.hotkey.ss58_address, wallet.coldkey.ss58_address, stake=10, permit=permit)
        self.ledger.advance(1)
        self.node = LoopbackNode(self.path, beacon=self.beacon, without=without)

    def run(self, story: Callable[[Any], Awaitable[None]]) -> None:
        """The story with a connected client of the SDK."""

        async def inside() -> None:
            async with self.client() as client:
                await asyncio.wait_for(story(client), 60)

        with self.node:
            asyncio.run(inside())

    def client(self) -> contextlib.AbstractAsyncContextManager[Any]:
        return sdk(self.node.url)

    def committed(self, wallet: Wallet) -> str | None:
        """What the chain has of the wallet, as hex, whatever any client was told."""
        found = self.ledger.read(
            self.ledger.head(), lambda state: state.get("Commitments.CommitmentOf", NETUID, wallet.hotkey.ss58_address)
        )
        return next(iter(found["info"]["fields"][0].values())) if found else None

    def nonce(self, wallet: Wallet) -> int:
        return self.ledger.next_nonce(wallet.hotkey.ss58_address)


@pytest.fixture(autouse=True, scope="module")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("caches")
    names = {"BITTENSOR_RUNTIME_CACHE_DIR": folder / "runtime", "BTCLI_TOKEN_SYMBOLS_CACHE": folder / "symbols.json"}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in names.items():
            patch.setenv(name, str(path))
        yield


def commitment(*fields: bytes) -> Any:
    return bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": [{f"Raw{len(f)}": f} for f in fields]})


async def commit(client: Any, wallet: Wallet, data: bytes, *, final: bool = False) -> Any:
    return await client.submit_call(
        commitment(data), wallet, signer="hotkey", wait_for_inclusion=True, wait_for_finalization=final
    )


async def set_weights(client: Any, wallet: Wallet, weights: dict[int, float], **options: Any) -> Any:
    return await client.execute(
        bt.SetWeights(netuid=NETUID, weights=weights, **options), wallet, wait_for_inclusion=True, wait_for_finalization=False
    )


# The SDK against it


def test_the_sdk_reads_the_same_through_the_node_and_through_the_ledgers_own_seam(tmp_path: Path) -> None:
    net = Net(tmp_path, mechanisms=2)

    async def story(client: Any) -> None:
        await commit(client, ALICE, b"plain text")
        await commit(client, BOB, bytes(range(128)))
        await set_weights(client, ALICE, {0: 0.25, 1: 0.75})
        await set_weights(client, ALICE, {1: 1.0}, mechid=1)
        block = await client.block()
        async with bt.Client("local", substrate=LedgerSubstrate(net.path, net.beacon)) as direct:
            for read, options in [
                ("commitments", {}),
                ("weights", {}),
                ("weights", {"mechid": 1}),
                ("uid", {"hotkey_ss58": BOB.hotkey.ss58_address}),
                ("epoch_status", {}),
                ("subnet_hyperparameters", {}),
                ("commit_reveal_enabled", {}),
                ("mechanism_count", {}),
                ("timelocked_weight_commits", {}),
                ("blocks_since_last_update", {"uid": 0}),
                ("neurons", {}),
            ]:
                ours = [await (await each.at(block)).read(read, netuid=NETUID, **options) for each in (client, direct)]
                assert repr(ours[0]) == repr(ours[1]), read
            graphs = [await each.subnets.metagraph(NETUID, block=block, commitments=True) for each in (client, direct)]
            # The ledger has no collateral; on the wire a runtime that has none is one that has zero.
            none = dict.fromkeys(("collateral_locked", "collateral_min", "collateral_earned"))
            neurons = [[replace(neuron, **none) for neuron in graph.neurons] for graph in graphs]
            assert repr(neurons[0]) == repr(neurons[1])
            assert [g.tempo for g in graphs] == [20, 20]
            assert await client.block_time() == await direct.block_time()
            assert await client.spec_version() == await direct.spec_version() == net.node.spec_version
            assert await client.timestamp(block=block) == await direct.timestamp(block=block)

    net.run(story)


def test_a_signed_call_lands_in_a_block_with_its_events_and_the_past_stays_readable(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        first = await commit(client, ALICE, b"one")
        second = await commit(client, ALICE, b"two", final=True)
        assert first.success
        assert second.success
        block, index = map(int, second.extrinsic_id.split("-"))
        assert await client.finalized_block() >= block
        one = await client.read("commitment", netuid=NETUID, hotkey_ss58=ALICE.hotkey.ss58_address)
        assert (one.data, one.block) == ("two", block)
        past = await (await client.at(block - 1)).read("commitment", netuid=NETUID, hotkey_ss58=ALICE.hotkey.ss58_address)
        assert (past.data, past.block) == ("one", int(first.extrinsic_id.split("-")[0]))
        told = [(e["module_id"], e["event_id"]) for e in second.events]
        assert told == [
            ("Commitments", "Commitment"),
            ("TransactionPayment", "TransactionFeePaid"),
            ("System", "ExtrinsicSuccess"),
        ]
        body = await client._substrate.raw.get_block(block_number=block)
        call = body.extrinsics[index]["call"]
        assert (call["call_function"], body.extrinsics[index]["address"]) == ("set_commitment", ALICE.hotkey.ss58_address)
        assert body.extrinsics[0]["call"]["call_function"] == "set"
        with pytest.raises(bt.ChainError, match="no block at height"):
            await client.subnets.commitments(NETUID, block=block + 10_000)

    net.run(story)


def test_a_pallets_refusal_comes_as_the_modules_own_error(tmp_path: Path) -> None:
    net = Net(tmp_path, version_key=7)

    async def story(client: Any) -> None:
        results = [
            await set_weights(client, BOB, {0: 1.0}, version_key=7),
            await set_weights(client, ALICE, {1: 1.0}, version_key=6),
            await commit(client, NOBODY, b"who"),
            await client.submit_call(commitment(b"1", b"2", b"3", b"4"), BOB, signer="hotkey", wait_for_finalization=False),
        ]
        assert [(r.success, r.error.name) for r in results] == [
            (False, "NeuronNoValidatorPermit"),
            (False, "IncorrectWeightVersionKey"),
            (False, "AccountNotAllowedCommit"),
            (False, "TooManyFieldsInCommitmentInfo"),
        ]
        assert net.nonce(NOBODY) == 1  # a refused call uses up its nonce

    net.run(story)


def test_sealed_weights_are_hidden_until_their_epoch_and_then_stand(tmp_path: Path) -> None:
    net = Net(tmp_path, commit_reveal=1, tempo=10)

    async def story(client: Any) -> None:
        result = await set_weights(client, ALICE, {0: 0.5, 1: 0.5})
        assert result.success
        pending = await client.weights.timelocked_weight_commits(NETUID)
        ((commit,),) = pending.values()
        assert (commit["hotkey"], commit["reveal_round"]) == (ALICE.hotkey.ss58_address, result.data["reveal_round"])
        assert await client.weights.weights(NETUID) == {}
        net.ledger.advance(100)
        assert await client.weights.timelocked_weight_commits(NETUID) == {}
        assert await client.weights.weights(NETUID) == {0: {0: 0.5, 1: 0.5}}

    net.run(story)


def test_other_fields_than_raw_ones_come_back_as_the_chain_shows_them(tmp_path: Path) -> None:
    net = Net(tmp_path)
    fields = [{"BigRaw": b"b" * 400}, {"TimelockEncrypted": {"encrypted": b"\x00\xff", "reveal_round": 5}}, {"Sha256": bytes(32)}]

    async def story(client: Any) -> None:
        call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": fields})
        assert (await client.submit_call(call, ALICE, signer="hotkey", wait_for_finalization=False)).success
        (found,) = (await client.subnets.commitments(NETUID)).values()
        assert found.fields == [
            {"BigRaw": "b" * 400},
            {"TimelockEncrypted": {"encrypted": "0x00ff", "reveal_round": 5}},
            {"Sha256": "0x" + "00" * 32},
        ]
        assert (await commit(client, BOB, b"")).success

    net.run(story)


def test_a_runtime_without_the_item_that_the_sdks_set_weights_reads(tmp_path: Path) -> None:
    net = Net(tmp_path, without=("SubtensorModule.SubnetEpochConsensus",))

    async def story(client: Any) -> None:
        assert await client.spec_version() == 461
        with pytest.raises(StorageFunctionNotFound):
            await set_weights(client, ALICE, {1: 1.0})
        assert (await commit(client, ALICE, b"the rest works")).success

    net.run(story)


def test_many_commitments_come_in_pages(tmp_path: Path) -> None:
    net = Net(tmp_path, max_uids=256)
    for number in range(130):
        keypair = Keypair.create_from_uri(f"//miner{number}")
        net.ledger.register(keypair.ss58_address, ALICE.coldkey.ss58_address)
    net.ledger.advance(1)

    async def story(client: Any) -> None:
        uids = await client.query_map(bt.storage.SubtensorModule.Uids, [NETUID])
        assert sorted(uid for _, uid in uids) == list(range(132))

    net.run(story)


def test_a_hundred_transactions_in_flight_at_once_all_land(tmp_path: Path) -> None:
    net = Net(tmp_path, tempo=2)  # every second block gives new room for commitments

    async def story(client: Any) -> None:
        wallets = [Wallet(f"many{n}") for n in range(50)]
        for wallet in wallets:
            net.ledger.register(wallet.hotkey.ss58_address, wallet.coldkey.ss58_address)
        net.ledger.advance(1)
        results = await asyncio.gather(*(commit(client, wallet, b"%d" % n) for n, wallet in enumerate(wallets * 2)))
        assert all(result.success for result in results)
        assert {net.nonce(wallet) for wallet in wallets} == {2}

    net.run(story)


# What a node refuses


async def ask(url: str, method: str, *params: Any) -> Any:
    """One request by hand: its result, or its error's body."""
    async with connect(url) as connection:
        await connection.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
        answer = json.loads(await connection.recv())
    return answer.get("result", answer.get("error"))


def test_a_node_refuses_what_is_not_signed_for_it_and_what_is_too_old(tmp_path: Path) -> None:
    net, other = Net(tmp_path / "a"), Net(tmp_path / "b")

    async def story(client: Any) -> None:
        async def signed(by: Any, **options: Any) -> str:
            call = await by._substrate.compose(commitment(b"x"))
            options = {"nonce": 0, "era": {"period": 8}} | options
            return str((await by._substrate.raw.sign_without_nonce_tracking(call, ALICE.hotkey, **options)).data_hex)

        async def refusal(data: str) -> tuple[int, Any]:
            error = await ask(net.node.url, "author_submitExtrinsic", data)
            return error["code"], error.get("data")

        good = await signed(client, era=None)
        broken = good[:200] + ("0" if good[200] != "0" else "1") + good[201:]
        assert await refusal(broken) == (1010, "Transaction has a bad signature")
        with other.node:
            async with other.client() as elsewhere:
                assert await refusal(await signed(elsewhere, era=None)) == (1010, "Transaction has a bad signature")
        old = await signed(client)
        net.ledger.advance(20)
        # The era is told by its phase alone, so an old one is read as a new one with another first block.
        assert await refusal(old) == (1010, "Transaction has a bad signature")
        assert (await refusal("0x0102"))[0] == 1002
        later = await signed(client, nonce=1, era=None)
        await ask(net.node.url, "author_submitExtrinsic", good)
        await asyncio.sleep(0.2)
        assert await refusal(good) == (1010, "Transaction is outdated")
        assert isinstance(await ask(net.node.url, "author_submitExtrinsic", later), str)
        assert net.nonce(ALICE) == 2

    net.run(story)


def test_the_pool_takes_no_second_of_the_same_nonce_and_holds_a_future_one(tmp_path: Path) -> None:
    net = Net(tmp_path, block_seconds=60)

    async def story(client: Any) -> None:
        async def signed(nonce: int, data: bytes) -> str:
            call = await client._substrate.compose(commitment(data))
            return str((await client._substrate.raw.sign_without_nonce_tracking(call, ALICE.hotkey, nonce=nonce)).data_hex)

        async def submit(data: str) -> Any:
            return await ask(net.node.url, "author_submitExtrinsic", data)

        first = await signed(0, b"first")
        assert isinstance(await submit(await signed(1, b"second")), str)
        assert net.nonce(ALICE) == 0  # it waits for the first
        assert isinstance(await submit(first), str)
        assert (await submit(first))["code"] == 1013
        assert (await submit(await signed(0, b"instead")))["code"] == 1014
        await wait_for(lambda: net.nonce(ALICE) == 2)
        net.ledger.advance(1)
        assert net.committed(ALICE) == "0x" + b"second".hex()

    net.run(story)


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


# Faults


@pytest.mark.parametrize(("word", "lands"), [("drop_before", False), ("drop_after", True)])
def test_a_connection_cut_at_a_submit(tmp_path: Path, word: str, lands: bool) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        net.node.faults.submits.append(word)
        assert not (await commit(client, ALICE, b"x")).success  # the SDK says so in both cases
        net.ledger.advance(1)
        assert (net.committed(ALICE) is not None) == lands
        assert (await commit(client, ALICE, b"again")).success

    net.run(story)


@pytest.mark.parametrize(("word", "lands"), [("swallow", False), ("mute", True), ("never", False)])
def test_a_submit_of_which_nothing_is_ever_heard(tmp_path: Path, word: str, lands: bool) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        net.node.faults.submits.append(word)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(commit(client, ALICE, b"x"), 0.4)
        net.ledger.advance(1)
        assert (net.committed(ALICE) is not None) == lands

    net.run(story)


def test_a_submit_that_is_included_late_and_one_that_the_node_includes_twice(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        start = net.ledger.head()
        net.node.faults.set("submits", ["late:6", "twice"])
        late = await commit(client, ALICE, b"late")
        assert late.success
        assert int(late.extrinsic_id.split("-")[0]) >= start + 6
        twice = await commit(client, BOB, b"twice")
        assert twice.success
        assert net.nonce(BOB) == 1

    net.run(story)


def test_a_connection_cut_in_the_middle_of_an_answer_and_requests_that_get_none(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        net.node.faults.drop_after_bytes = 700
        metagraph = await client.subnets.metagraph(NETUID)  # the SDK asks again by itself
        assert len(metagraph.neurons) == 2
        assert net.node.faults.drop_after_bytes is None
        before = net.node.traffic.connections
        net.node.faults.drop_requests = 1
        assert await client.block() > 0
        assert net.node.traffic.connections == before + 1

    net.run(story)


def test_a_silent_node_keeps_its_callers_waiting(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        net.node.faults.silent = True
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.block(), 0.2)
        net.node.faults.clear()
        assert await client.block() > 0
        net.node.faults.silent_handshake = True
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(connect(net.node.url).__aenter__(), 0.2)

    net.run(story)


def test_a_node_that_is_down_and_one_that_comes_back_on_its_port(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        net.node.faults.submits.append("never")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(commit(client, ALICE, b"x"), 0.2)
        await asyncio.to_thread(net.node.refuse, True, cut=True)
        with pytest.raises(ConnectionRefusedError):
            await connect(net.node.url)
        with pytest.raises(bt.RpcConnectionError):
            await client.block()
        await asyncio.to_thread(net.node.refuse, False)
        assert await client.block() > 0
        assert await ask(net.node.url, "account_nextIndex", ALICE.hotkey.ss58_address) == 1
        url = net.node.url
        await asyncio.to_thread(net.node.restart)
        assert net.node.url == url
        assert await ask(url, "account_nextIndex", ALICE.hotkey.ss58_address) == 0  # its pool is gone

    net.run(story)


@pytest.mark.parametrize("readmit", [True, False])
def test_blocks_that_are_not_final_can_be_replaced(tmp_path: Path, readmit: bool) -> None:
    net = Net(tmp_path, block_seconds=60, finality_lag=3)

    async def story(client: Any) -> None:
        waiting = asyncio.create_task(commit(client, ALICE, b"x", final=True))
        await wait_for(lambda: net.nonce(ALICE) == 1)
        net.ledger.advance(1)
        assert net.committed(ALICE) is not None
        head = net.ledger.hash_of(net.ledger.head())
        await asyncio.to_thread(net.node.reorg, 1, readmit=readmit)
        assert await ask(net.node.url, "chain_getHeader", head) is None
        assert not (await waiting).success  # the SDK takes "retracted" for the end
        assert net.committed(ALICE) is None
        await wait_for(lambda: net.nonce(ALICE) == (1 if readmit else 0))
        net.ledger.advance(1)
        assert (net.committed(ALICE) is not None) == readmit

    net.run(story)


def test_the_endpoints_policy_refuses_at_the_door_by_an_answer_and_by_closing(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def refused(before: str | None, after: str | None) -> Any:
        """What a client is told that meets the first refusal when it connects and the second when it asks."""

        async def connect_and_ask() -> None:
            net.node.faults.refusal = before
            async with net.client() as client:
                net.node.faults.refusal = after
                await client.block()

        with pytest.raises(bt.RpcPolicyError) as caught:
            await connect_and_ask()
        return caught.value.retry_after

    async def story(_: Any) -> None:
        net.node.faults.retry_after = "7"
        assert [await refused(None, "-32004"), await refused(None, "-32005")] == ["7", "7"]
        assert await refused(None, "1008") is None
        assert [await refused("429", None), await refused("403", None)] == ["7", "7"]
        net.node.faults.clear()

    net.run(story)


def test_a_node_that_has_thrown_old_states_away_and_an_archive(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        first = int((await commit(client, ALICE, b"old")).extrinsic_id.split("-")[0])
        await commit(client, ALICE, b"new")
        net.ledger.advance(50)
        net.node.faults.keeps_states = 20
        with pytest.raises(bt.ChainError, match="State discarded"):
            await client.subnets.commitments(NETUID, block=first)
        with LoopbackNode(net.path) as archive:
            async with sdk(net.node.url, archives=(archive.url,)) as both:
                (found,) = (await both.subnets.commitments(NETUID, block=first)).values()
                assert found.data == "old"

    net.run(story)


def test_two_nodes_show_the_same_blocks(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        result = await commit(client, ALICE, b"x")
        with LoopbackNode(net.path) as second:
            one, two = [await ask(each.url, "chain_getBlock", result.block_hash) for each in (net.node, second)]
        assert one == two
        assert len(one["block"]["extrinsics"]) == 2

    net.run(story)


def test_heads_are_announced_and_requests_counted(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(client: Any) -> None:
        net.node.traffic.reset()
        numbers = []
        async for head in client.blocks():
            numbers.append(head.number)
            if len(numbers) == 3:
                break
        assert numbers == list(range(numbers[0], numbers[0] + 3))
        net.node.faults.delay_s = 0.01
        await client.finalized_block()
        counted = net.node.traffic
        assert counted.requests["chain_getFinalizedHead"] == 1
        assert counted.total == sum(counted.requests.values()) == counted.messages_in
        assert counted.bytes_in > 0
        assert counted.bytes_out > counted.bytes_in / 10

    net.run(story)


# Other processes


@contextlib.contextmanager
def node_process(net: Net, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.loopback_node", str(net.path), *options]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def test_a_node_as_a_process_takes_its_faults_over_the_wire(tmp_path: Path) -> None:
    net = Net(tmp_path)

    async def story(url: str) -> None:
        async with sdk(url) as client:
            assert (await commit(client, ALICE, b"x")).success
            assert await ask(url, "sn29_fault", "submits", ["drop_after"])
            assert not (await commit(client, ALICE, b"y")).success
            assert await ask(url, "sn29_fault", "clear")
            counted = await ask(url, "sn29_traffic")
            assert counted["requests"]["author_submitAndWatchExtrinsic"] == 2
            assert (await ask(url, "sn29_fault", "nonsense", 1))["code"] == -32603
        net.ledger.advance(1)
        assert net.committed(ALICE) == "0x" + b"y".hex()

    with node_process(net) as url:
        asyncio.run(story(url))


def test_btcli_reads_the_chain(tmp_path: Path) -> None:
    net = Net(tmp_path, block_seconds=60)

    async def story(client: Any) -> None:
        waiting = [asyncio.create_task(commit(client, wallet, wallet.hotkey.ss58_address.encode())) for wallet in (ALICE, BOB)]
        await wait_for(lambda: net.nonce(ALICE) + net.nonce(BOB) == 2)
        net.ledger.advance(1)
        await asyncio.gather(*waiting)

        async def btcli(*arguments: str) -> Any:
            command = [sys.executable, "-c", "from bittensor.cli.main import main; main()", "query", *arguments]
            command += ["--network", net.node.url, "--json", "--netuid", str(NETUID)]
            environment = os.environ | {"HOME": str(tmp_path), "NO_COLOR": "1"}
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environment)
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode() + out.decode()
            return json.loads(out)

        graph, commitments = await asyncio.gather(btcli("metagraph"), btcli("commitments"))
        assert graph["hotkeys"] == [w.hotkey.ss58_address for w in (ALICE, BOB)]
        assert {found["hotkey"]: found["commitment"] for found in commitments} == {
            wallet.hotkey.ss58_address: wallet.hotkey.ss58_address for wallet in (ALICE, BOB)
        }

    net.run(story)
