"""Failures that users of the SDK meet, on a real socket: each shown with a naive use of the SDK, then with ours.

The naive use is what the SDK's own examples do: one client, one call, its answer believed.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from bittensor._transport.errors import StorageFunctionNotFound
from chain_net import NETUID, Net, run
from loopback_node import Faults, LoopbackNode

from neurons.adapters import parse_texts
from sn29.chain import Chain
from sn29.chain_state import bytes_of
from sn29.errors import Unavailable
from sn29.examination import Ports, Rules
from sn29.publication import Publisher, Step
from sn29.records import Head, Weights
from sn29.round import plan_round
from sn29.round_record import RoundRecord
from sn29.store import Store

MakeNet = Callable[..., Net]
ROUND_RULES = """\
reward_share: 1
families: [LlamaForCausalLM]
tokenizer: {free: true}
limits: {parameters: 60000, bytes: 1e6, max_tokens: 300, max_chars: 200, round_trip_failures: 1}
dataset: {folder: text, files: "*.parquet", column: text}
samples: {count: 8, window_blocks: 5}
scoring:
  rule: oldest_holder
  group: 1
  skew: 1.0
  advantage: {initial: 0.004, decay_per_epoch: 0.995, blocks_per_epoch: 361}
pool: {keep: 4, pending: 4}
"""
PATIENCE_S = 1.0
"""How long we watch the SDK wait before we call it waiting for ever; it states a minute or nothing at all."""


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("runtime")))
        patch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path_factory.mktemp("symbols") / "symbols.json"))
        yield


@pytest.fixture
def make_net(tmp_path: Path) -> Iterator[MakeNet]:
    with ExitStack() as stack:

        def make(**params: Any) -> Net:
            net = Net(tmp_path, node=True, **params)
            stack.enter_context(node_of(net))
            return net

        yield make


def node_of(net: Net) -> LoopbackNode:
    assert net.node is not None
    return net.node


@asynccontextmanager
async def naive(net: Net) -> AsyncIterator[Any]:
    client = bt.Client(node_of(net).url)
    try:
        yield await client.connect()
    finally:
        # The SDK's close may wait a minute for a task that missed its cancelling: one in three after a failure in a gather.
        await asyncio.wait({asyncio.ensure_future(client.close())}, timeout=1)


def commitment(text: bytes) -> Any:
    return bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": [{f"Raw{len(text)}": text}]})


async def naive_commit(client: Any, wallet: Any, text: bytes) -> Any:
    return await client.submit_call(commitment(text), wallet, signer="hotkey", wait_for_finalization=False)


def calls_of(net: Net, wallet: Any) -> list[Any]:
    """What the blocks have of this hotkey, in order, with the next one."""
    calls = [call for block in range(net.ledger.head() + 2) for call in net.ledger.extrinsics(block)]
    return [call for call in calls if call.signer == wallet.hotkey.ss58_address]


def taken(net: Net, wallet: Any) -> list[bytes]:
    """What the chain took of this hotkey's commitments, in order: every one, not only the last."""
    ours = [call.call for call in calls_of(net, wallet) if call.error is None and call.call.module == "Commitments"]
    return [bytes.fromhex(next(iter(call.params["info"]["fields"][0].values()))[2:]) for call in ours]


def sets_of(net: Net, wallet: Any) -> list[Any]:
    """The sets and commits of weights of this hotkey that the chain took."""
    return [call.call for call in calls_of(net, wallet) if call.error is None and call.call.module == "SubtensorModule"]


async def hangs(work: Awaitable[Any]) -> bool:
    try:
        await asyncio.wait_for(work, PATIENCE_S)
    except TimeoutError:
        return True
    return False


# Reading


def test_a_drop_while_reading_is_not_seen(make_net: MakeNet) -> None:
    net = make_net()

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            for read in (client.block, chain.head, chain.params):
                node_of(net).faults.drop_requests = 1
                assert await read()
            node_of(net).faults.drop_after_bytes = 100  # in the middle of a message
            assert (await chain.params()).tempo == 360

    run(net.chain(), story)


def test_a_silent_node_is_left_at_our_deadline(make_net: MakeNet) -> None:
    net = make_net()
    net.ledger.advance(100)

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            node_of(net).faults.silent = True
            assert await hangs(client.block())
            with pytest.raises(Unavailable, match=r"did not answer within 2 s"):
                await chain.head()
            node_of(net).faults.silent = False
            assert (await chain.head()).block > 0

    run(net.chain(deadline_s=2), story)


def test_a_silent_handshake_too(make_net: MakeNet) -> None:
    net = make_net()
    node_of(net).faults.silent_handshake = True

    async def story() -> None:
        assert await hangs(bt.Client(node_of(net).url).connect())
        chain = net.chain(deadline_s=0.5)
        with pytest.raises(Unavailable, match="did not answer"):
            await chain.open()
        await chain.close()

    asyncio.run(story())


def test_another_endpoint_answers_for_a_silent_one(make_net: MakeNet) -> None:
    net = make_net()

    async def story() -> None:
        with LoopbackNode(net.folder / "chain", beacon=net.beacon) as second:
            node_of(net).faults.silent = True
            client = bt.Client(node_of(net).url, fallback_endpoints=[second.url])
            assert await hangs(client.connect())
            async with net.chain(fallbacks=[second.url], deadline_s=12) as chain:
                head = await chain.head()
                assert head.hash == net.ledger.hash_of(head.block)
                asked = second.traffic.total
                silent = node_of(net).traffic.total
                await chain.params()
                assert second.traffic.total > asked
                assert node_of(net).traffic.total == silent  # remembered
                second.refuse(cut=True)
                node_of(net).faults.silent = False
                assert (await chain.head()).block >= head.block

    asyncio.run(story())


def test_a_node_that_is_down_and_comes_back(make_net: MakeNet) -> None:
    net = make_net()
    net.ledger.advance(100)

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            await chain.head()
            node_of(net).refuse(cut=True)
            with pytest.raises((bt.BittensorError, OSError)):
                await client.block()
            with pytest.raises(Unavailable):
                await chain.head()
            node_of(net).refuse(False)
            assert (await chain.head()).block > 0
            node_of(net).restart()
            assert (await chain.head()).block > 0

    run(net.chain(deadline_s=5), story)


def test_blocks_are_polled_because_subscriptions_end_with_their_connection(make_net: MakeNet) -> None:
    net = make_net()

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            waiting = asyncio.create_task(client.wait_for_block(10**6))
            seen = (await chain.head()).block
            while not node_of(net).traffic.requests["chain_subscribeNewHeads"]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            node_of(net).drop()
            with pytest.raises(bt.ChainError, match="Connection lost"):
                await waiting
            while (await chain.head()).block <= seen:
                await asyncio.sleep(0.02)

    run(net.chain(), story)


@pytest.mark.parametrize("refusal", ["429", "-32005"])
def test_a_policy_refusal_is_waited_for_and_no_other_endpoint_bothered(make_net: MakeNet, refusal: str) -> None:
    net = make_net()

    async def story() -> None:
        with LoopbackNode(net.folder / "chain", beacon=net.beacon) as second:
            faults = node_of(net).faults
            async with net.chain(fallbacks=[second.url], deadline_s=12) as chain:
                await chain.head()
                if refusal == "429":
                    await chain.close()
                faults.refusal, faults.retry_after = refusal, "60"
                asked = node_of(net).traffic.total
                with pytest.raises((bt.RpcPolicyError, bt.ChainError)):
                    async with naive(net) as client:
                        await client.block()
                for _ in range(3):
                    with pytest.raises(Unavailable, match="refuses traffic") as failure:
                        await chain.head()
                assert (failure.value.retry_s or 0) > 30
                assert node_of(net).traffic.total <= asked + 10
                assert second.traffic.total == 0

    asyncio.run(story())


@pytest.mark.parametrize("refusal", ["403", "1008"])
def test_an_endpoint_that_shuts_us_out_does_not_keep_us_from_the_others(make_net: MakeNet, refusal: str) -> None:
    net = make_net()
    net.ledger.advance(100)  # what is final is block 0 for the first moments of a ledger

    async def story() -> None:
        with LoopbackNode(net.folder / "chain", beacon=net.beacon) as second:
            node_of(net).faults.refusal = refusal
            client = bt.Client(node_of(net).url, fallback_endpoints=[second.url])
            with pytest.raises(bt.RpcPolicyError):
                await client.connect()
            asked = node_of(net).traffic.total
            async with net.chain(fallbacks=[second.url], deadline_s=12) as chain:
                for _ in range(3):
                    assert (await chain.head()).block > 0
            assert node_of(net).traffic.total <= asked + 1

    asyncio.run(story())


def test_a_connection_that_was_closed_for_want_of_questions_is_opened_again(make_net: MakeNet) -> None:
    net = make_net()

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            before = (await chain.head()).block
            await client.block()
            connections = node_of(net).traffic.connections
            node_of(net).faults.idle_s = 0.05
            await asyncio.sleep(0.3)
            node_of(net).faults.idle_s = None
            assert await client.block() > before
            assert (await chain.head()).block > before
            assert node_of(net).traffic.connections == connections + 2

    run(net.chain(), story)


def test_a_frozen_endpoint_is_left_and_what_is_final_never_goes_back(make_net: MakeNet) -> None:
    """As a validator asks: what is final, again and again, for its rounds and for its weights."""
    net = make_net(weights_rate_limit=0, tempo=50_000)
    validator, miner = net.wallet("validator", permit=True), net.wallet("miner").hotkey.ss58_address
    net.ledger.advance(100)
    store = Store(net.folder / "store.db")

    async def story() -> None:
        with LoopbackNode(net.folder / "chain", beacon=net.beacon) as second:
            node_of(net).faults.stands_at = net.ledger.head()
            async with naive(net) as client, net.chain(validator, fallbacks=[second.url], deadline_s=8) as chain:
                stood = await client.finalized_block()
                seen = [(await chain.finalized()).block]
                decide(store, seen[0] + 20, {miner: 1.0})
                publisher, failures = Publisher(chain, store, pause_s=0.05), 0
                while (step := await looked(publisher)) is not Step.STANDS:
                    failures += 1
                    seen.append((await chain.finalized()).block)
                    assert failures < 200
                    await asyncio.sleep(0.05)
                assert step is Step.STANDS
                assert await chain.weights(chain.hotkey) == {miner: 1.0}
                files = parse_texts({"c00.yaml": ROUND_RULES})
                ports: Any = Ports(chain, None, store, None, None, None, None)  # type: ignore[arg-type]  # no models are looked at
                rules, plan = Rules(files.files, files.hall_of_fame, files.hashes), None
                while plan is None:  # on a quick machine no window is open yet
                    plan = await plan_round(ports, rules, catch_up=1)
                    await asyncio.sleep(0.05)
                assert plan.block > seen[0]
                assert await client.finalized_block() == stood  # the SDK goes on looking at the standing one
                second.drop()  # and back to the first is not possible: it has not what was final
                seen.append((await chain.finalized()).block)
                second.refuse(cut=True)
                with pytest.raises(Unavailable):  # of the two failures it tells the last
                    await chain.finalized()
                with pytest.raises(Unavailable, match=r"lags: it has not block|Connect call failed"):
                    await chain.finalized()
                node_of(net).faults.stands_at = None
                seen.append((await chain.finalized()).block)
                assert seen == sorted(seen)

    asyncio.run(story())
    store.close()


def test_of_the_only_endpoint_it_is_said_that_it_stands_still(make_net: MakeNet) -> None:
    net = make_net()
    net.ledger.advance(100)

    async def story(chain: Chain) -> None:
        node_of(net).faults.stands_at = net.ledger.head()
        final = await chain.finalized()
        await asyncio.sleep(1)
        for question in (chain.finalized, chain.finalized):
            with pytest.raises(Unavailable, match=rf"127\.0\.0\.1.* stands still: no final block after {final.block} for"):
                await question()
        node_of(net).faults.stands_at = None
        assert (await chain.finalized()).block > final.block

    run(net.chain(), story)


def decide(store: Store, block: int, *rows: dict[str, float]) -> None:
    """Keeps a finished round that decided these weights, by mechanism."""
    weights = {mechanism: Weights(block, row) for mechanism, row in enumerate(rows)}
    store.open_round(block, {})
    store.finish_round(block, RoundRecord(Head(block, "0x" + "0" * 64), {}, (), {}, (), {}, weights, {}, {}), weights)


async def looked(publisher: Publisher, mechanism: int = 0) -> Any:
    """Where a mechanism's weights are after one look; the failure if there was one."""
    try:
        return (await publisher.look()).get(mechanism)
    except Unavailable as error:
        return error


def test_a_runtime_without_an_item_of_storage(make_net: MakeNet) -> None:
    net = make_net(without=["SubtensorModule.SubnetEpochConsensus"], weights_rate_limit=0)
    validator, miner = net.wallet("validator", permit=True), net.wallet("miner").hotkey.ss58_address

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            with pytest.raises(StorageFunctionNotFound):
                await client.execute(bt.SetWeights(netuid=NETUID, weights={1: 1.0}), validator)
        assert (await chain.set_weights(Weights(1, {miner: 1.0}))).verified_by_readback

    run(net.chain(validator), story)


def test_a_runtime_without_an_item_that_nothing_can_stand_for(make_net: MakeNet) -> None:
    net = make_net(without=["SubtensorModule.MaxWeightsLimit"])

    async def story(chain: Chain) -> None:
        with pytest.raises(Unavailable, match=r"runtime and bittensor .* do not match: .*MaxWeightsLimit"):
            await chain.params()

    run(net.chain(), story)


def test_a_missing_subnet_is_no_empty_one(make_net: MakeNet) -> None:
    net = make_net()

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            assert await client.subnets.commitments(30) == {}
            assert await client.subnets.metagraph(30) is None
        for question in (chain.metagraph, chain.commitments, chain.params):
            with pytest.raises(Unavailable, match="no subnet 30"):
                await question()

    run(net.chain(netuid=30), story)


def test_a_large_commitment_reads_as_something_else(make_net: MakeNet) -> None:
    net = make_net()
    wallet = net.wallet("foreign")

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": [{"BigRaw": b"model" * 40}]})
            assert (await client.submit_call(call, wallet, signer="hotkey", wait_for_finalization=False)).success
            assert (await client.read("commitment", netuid=NETUID, hotkey_ss58=chain.hotkey)).data != "model" * 40
        (found,) = await chain.commitments()
        assert b"BigRaw" in found.data

    run(net.chain(wallet), story)


def test_a_forgotten_state_is_asked_of_an_archive(make_net: MakeNet) -> None:
    net = make_net()
    wallet = net.wallet("miner")

    async def story() -> None:
        with LoopbackNode(net.folder / "chain", beacon=net.beacon) as archive:
            async with net.chain(wallet) as chain, net.chain(archives=[archive.url]) as patient, naive(net) as client:
                receipt = await chain.commit(b"long ago")
                net.ledger.advance(100)
                node_of(net).faults.keeps_states = 50
                with pytest.raises(bt.ChainError, match="State discarded"):
                    await client.subnets.commitments(NETUID, block=receipt.block)
                with pytest.raises(Unavailable, match="name an archive node"):
                    await chain.commitments(receipt.block)
                assert [c.data for c in await patient.commitments(receipt.block)] == [b"long ago"]
                assert (await patient.metagraph(receipt.block)).neurons

    asyncio.run(story())


def test_the_hash_of_a_replaced_block_is_not_kept(make_net: MakeNet) -> None:
    """The SDK remembers the block that included a write by number, and reads from it even when it is no more."""
    net = make_net(finality_lag=40)
    wallet = net.wallet("miner")
    net.ledger.advance(50)

    async def story() -> None:
        async with naive(net) as client, net.chain(wallet) as chain:
            result = await naive_commit(client, wallet, b"undone")
            block = int(result.extrinsic_id.split("-")[0])
            stale = await client._substrate.block_hash(block)
            assert stale == await chain.block_hash(block) == net.ledger.hash_of(block)
            node_of(net).reorg(net.ledger.head() - block + 1, readmit=False)
            assert net.ledger.hash_of(block) != stale
            assert await chain.block_hash(block) == net.ledger.hash_of(block)

    asyncio.run(story())


# Writing


@pytest.mark.parametrize("fault", ["drop_after", "mute"])
def test_a_write_whose_answer_is_lost_is_read_back(make_net: MakeNet, fault: str) -> None:
    net = make_net()
    one, two = net.wallet("one"), net.wallet("two")

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            node_of(net).faults.submits.extend([fault, fault])
            if fault == "drop_after":
                assert not (await naive_commit(client, one, b"landed")).success
            else:
                assert await hangs(naive_commit(client, one, b"landed"))
            receipt = await chain.commit(b"landed")
            assert receipt.verified_by_readback
            assert taken(net, one) == taken(net, two) == [b"landed"]

    run(net.chain(two, deadline_s=4), story)


def test_a_write_that_never_reached_the_node_does_not_spoil_the_next(make_net: MakeNet) -> None:
    """The SDK's own count of nonces goes on although nothing was taken; the next write then waits for one that never comes."""
    net = make_net()
    one, two = net.wallet("one"), net.wallet("two")

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            node_of(net).faults.submits.append("swallow")
            assert await hangs(naive_commit(client, one, b"swallowed"))
            assert await hangs(naive_commit(client, one, b"next"))
            assert taken(net, one) == []
        node_of(net).faults.submits.append("swallow")
        with pytest.raises(Unavailable, match="does not show it"):
            await chain.commit(b"swallowed")
        await chain.commit(b"next")
        assert taken(net, two) == [b"next"]

    run(net.chain(two, deadline_s=4), story)


def test_a_write_that_is_never_included_ends_at_the_deadline(make_net: MakeNet) -> None:
    net = make_net(block_seconds=0.02)
    one, two = net.wallet("one"), net.wallet("two")

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            node_of(net).faults.submits.extend(["never", "never"])
            assert await hangs(naive_commit(client, one, b"lost"))
        with pytest.raises(Unavailable, match="does not show it"):
            await chain.commit(b"lost")
        await chain.commit(b"found")
        assert taken(net, two) == [b"found"]

    run(net.chain(two, deadline_s=4), story)


def test_a_write_that_lands_late_is_not_written_twice(make_net: MakeNet) -> None:
    net = make_net(block_seconds=0.5)
    one, two = net.wallet("one"), net.wallet("two")

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            node_of(net).faults.submits.append("late:6")
            with suppress(TimeoutError):
                await asyncio.wait_for(naive_commit(client, one, b"once"), 0.2)
        async with naive(net) as client:  # tried again, as one does
            await naive_commit(client, one, b"once")
        node_of(net).faults.submits.append("late:6")
        for _ in range(3):
            with suppress(Unavailable):
                await chain.commit(b"once")
        assert (await chain.commitments())[-1].data == b"once"
        assert taken(net, one) == [b"once", b"once"]
        assert taken(net, two) == [b"once"]

    run(net.chain(two, deadline_s=1.5), story)


def test_a_write_in_a_replaced_block_is_not_called_done(make_net: MakeNet) -> None:
    net = make_net(finality_lag=10)
    one, two = net.wallet("one"), net.wallet("two")
    net.ledger.advance(20)  # what is undone below is not their registration

    async def story(chain: Chain) -> None:
        async with naive(net) as client:
            assert (await naive_commit(client, one, b"done")).success
            node_of(net).reorg(5, readmit=False)
            assert taken(net, one) == []
        writing = asyncio.create_task(chain.commit(b"done"))
        while not taken(net, two) and not writing.done():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        node_of(net).reorg(8)  # the node takes it into another block
        receipt = await writing
        assert taken(net, two) == [b"done"]
        assert [call.call.function for call in net.ledger.extrinsics(receipt.block)] == ["set_commitment"]

    run(net.chain(two, deadline_s=30), story)


def write_of(chain: Chain, what: str, miner: str) -> Awaitable[Any]:
    return chain.commit(b"done") if what == "commitment" else chain.set_weights(Weights(1, {miner: 1.0}))


@pytest.mark.parametrize("what", ["commitment", "weights"])
def test_a_write_may_end_in_an_older_block_than_it_was_decided_at(make_net: MakeNet, what: str) -> None:
    """A branch that takes the place of ours may have it in a block whose number was not new to us any more."""
    net = make_net(finality_lag=12, weights_rate_limit=0, block_seconds=1)
    wallet = net.wallet("validator", permit=True)
    miner = net.wallet("miner").hotkey.ss58_address
    net.ledger.advance(100)

    async def story(chain: Chain) -> None:
        decided = net.ledger.head()
        writing = asyncio.ensure_future(write_of(chain, what, miner))
        while not calls_of(net, wallet) and not writing.done():
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.5)  # the block is closed
        node_of(net).reorg(net.ledger.head() - decided + 4, again=True)
        net.ledger.advance(13)
        receipt = await writing
        assert receipt.verified_by_readback
        assert receipt.block < decided
        assert len(calls_of(net, wallet)) == 1

    run(net.chain(wallet, deadline_s=60), story)


def test_a_write_that_failed_in_a_replaced_block_may_succeed_in_another(make_net: MakeNet) -> None:
    net = make_net(finality_lag=12, weights_rate_limit=0, block_seconds=1)
    one, two = (net.wallet(name, permit=True) for name in ("one", "two"))
    miner = net.wallet("miner").hotkey.ss58_address
    net.ledger.advance(50)

    async def story(chain: Chain) -> None:
        before = net.ledger.head() - 2
        for wallet in (one, two):  # from now on nobody may set weights
            net.ledger.register(wallet.hotkey.ss58_address, wallet.coldkeypub.ss58_address, stake=1, permit=False)
        net.ledger.advance(2)
        async with naive(net) as client:
            call = bt.calls.SubtensorModule.set_mechanism_weights(netuid=NETUID, mecid=0, dests=[2], weights=[1], version_key=0)
            result = await client.submit_call(call, one, signer="hotkey", wait_for_finalization=False)
            assert result.error.name == "NeuronNoValidatorPermit"
        writing = asyncio.create_task(chain.set_weights(Weights(1, {miner: 1.0})))
        while not calls_of(net, two) and not writing.done():
            await asyncio.sleep(0.01)
        assert calls_of(net, two)[0].error == "NeuronNoValidatorPermit"
        await asyncio.sleep(1.5)  # the block is closed: it knows of the failure
        assert not writing.done()
        node_of(net).reorg(net.ledger.head() - before)
        while not (sets_of(net, one) and sets_of(net, two)) and not writing.done():
            await asyncio.sleep(0.01)
        net.ledger.advance(13)
        assert (await writing).verified_by_readback
        assert len(sets_of(net, one)) == len(sets_of(net, two)) == 1  # what the SDK was told is not so

    run(net.chain(two, deadline_s=60), story)


def test_a_signature_for_an_old_block_is_made_anew(make_net: MakeNet) -> None:
    """A node that lags by more than a transaction lives: it is refused for certain, and nothing is wrong with the wallet."""
    net = make_net()
    wallet = net.wallet("miner")
    net.ledger.advance(100)

    async def story(chain: Chain) -> None:
        node_of(net).faults.lag = 40
        with pytest.raises(Unavailable, match="BadProof") as refusal:
            await chain.commit(b"late")
        assert refusal.value.certain
        node_of(net).faults.lag = 0
        assert (await chain.commit(b"late")).verified_by_readback
        assert taken(net, wallet) == [b"late"]

    run(net.chain(wallet), story)


def test_two_writers_of_one_hotkey_wait_for_each_other(make_net: MakeNet) -> None:
    net = make_net()
    one, two = net.wallet("one"), net.wallet("two")

    async def story() -> None:
        async with naive(net) as a, naive(net) as b:
            results = await asyncio.gather(
                *(naive_commit(client, one, text) for client, text in ((a, b"a"), (b, b"b"))), return_exceptions=True
            )
            assert sum(getattr(result, "success", False) for result in results) == 1
        locks = net.folder / "locks"
        async with net.chain(two, locks=locks) as a, net.chain(two, locks=locks) as b:
            blocks = [receipt.block for receipt in await asyncio.gather(a.commit(b"a"), b.commit(b"b"))]
            assert len(set(blocks)) == 2
        assert sorted(taken(net, two)) == [b"a", b"b"]

    asyncio.run(story())


# Everything at once

SEED, OPERATIONS, WRITERS, PUBLISHERS = 2029, 1000, 14, 6
PLAIN, SEALED = 40, 10  # operations of each: at most ten sealed rows may wait
SUBMIT_FAULTS = ("drop_before", "drop_after", "swallow", "mute", "late:2", "never", "twice")


class Writer:
    """One hotkey's operations: each is a write that nobody else makes, tried until the chain is known to have it.

    It dies at any moment; the next one knows what it wanted, since when, and the digests of what was sent encrypted.
    """

    def __init__(self, net: Net, nodes: list[LoopbackNode], number: int, targets: list[str]) -> None:
        self.net, self.targets, self.chance = net, targets, random.Random(SEED + number)
        self.nodes = nodes[number % 2 :] + nodes[: number % 2]
        self.wallet = net.wallet(f"writer {number}", permit=True)
        self.happened: Counter[str] = Counter()
        self.spells: set[asyncio.Task[None]] = set()
        self.sealed: Counter[str] = Counter()  # digests of the receipts

    def new_chain(self) -> Chain:
        first, second = (node.url for node in self.nodes)
        return self.net.chain(self.wallet, network=first, fallbacks=[second], deadline_s=2, locks=self.net.folder / "locks")

    def row(self, operation: int) -> dict[str, float]:
        return {self.targets[0]: 1.0, self.targets[1]: (operation + 1) / OPERATIONS}

    async def run(self, operations: range, sealed: bool) -> None:
        self.chain = self.new_chain()
        for operation in operations:
            await self.disturb()
            since, told = None, list[str]()
            while True:
                try:
                    since = (await self.chain.head()).block if since is None else since
                    await self.mortal(self.write(operation, sealed, since, told))
                    break
                except Unavailable as error:
                    self.happened[error.why.split(":")[0][:40]] += 1
                    await asyncio.sleep(0.05)
                except TimeoutError:
                    self.happened["killed"] += 1
                    await self.chain.close()
                    self.chain = self.new_chain()
        await self.chain.close()

    async def mortal(self, work: Awaitable[Any]) -> Any:
        """Raises TimeoutError when it dies meanwhile."""
        killed = self.chance.random() < 0.05
        return await asyncio.wait_for(work, self.chance.uniform(0, 0.3) if killed else None)

    async def write(self, operation: int, sealed: bool, since: int, told: list[str]) -> None:
        kind = operation % 2 + 1 if sealed else operation % 3
        if kind == 0:
            receipt = await self.chain.commit(b"%d" % operation)
        else:
            weights = Weights(since, self.row(operation))
            receipt = await self.chain.set_weights(weights, mechid=kind - 1, since=since, digest=told, sending=told.append)
        assert receipt.verified_by_readback
        if sealed:
            self.sealed[receipt.digest] += 1

    async def disturb(self) -> None:
        node, dice = self.chance.choice(self.nodes), self.chance.random()
        if dice < 0.2:
            node.faults.submits.append(self.chance.choice(SUBMIT_FAULTS))
        elif dice < 0.25:
            node.faults.drop_requests += 1
        elif dice < 0.28:
            node.faults.drop_after_bytes = self.chance.randrange(1, 3000)
        elif dice < 0.30:
            await asyncio.to_thread(node.drop)
        elif dice < 0.33:
            await asyncio.to_thread(node.reorg, self.chance.choice([1, 2]), readmit=self.chance.random() < 0.5)
        elif dice < 0.335:
            await asyncio.to_thread(node.restart)
        elif dice < 0.37:
            self.cast(node, self.chance.choice(SPELLS))

    def cast(self, node: LoopbackNode, spell: dict[str, Any]) -> None:
        async def for_a_while() -> None:
            self.happened["spell " + next(iter(spell))] += 1
            values = {"stands_at": self.net.ledger.head()} if spell.keys() == {"stands_at"} else spell
            for name, value in values.items():
                node.faults.set(name, value)
            await asyncio.sleep(0.4)
            for name in values:
                node.faults.set(name, getattr(Faults(), name))

        task = asyncio.create_task(for_a_while())
        self.spells.add(task)
        task.add_done_callback(self.spells.discard)

    def check(self) -> None:
        """Every operation is in the final blocks exactly once."""
        sets = sets_of(self.net, self.wallet)
        plain = Counter((s.params["mecid"], *s.params["weights"]) for s in sets if "weights" in s.params)
        commitments = Counter(taken(self.net, self.wallet))
        digests = Counter(sha256(bytes_of(s.params["commit"])).hexdigest() for s in sets if "commit" in s.params)
        assert len(plain) + len(commitments) == PLAIN, "some were lost"
        assert len(digests) == SEALED, "some were lost"
        assert {*plain.values(), *commitments.values(), *digests.values()} == {1}, "some were written twice"
        assert digests == self.sealed


SPELLS: tuple[dict[str, Any], ...] = (
    {"silent": True},
    {"silent_handshake": True},
    {"delay_s": 0.02},
    {"refusal": "403", "retry_after": "1"},
    {"refusal": "-32005", "retry_after": "1"},
    {"lag": 3},
    {"lag": 30},
    {"stands_at": None},
    {"idle_s": 0.05},
)


class PublishingWriter(Writer):
    """The same with a validator's own means: rounds decide two rows at a time, and its notes are all that survives."""

    async def run(self, operations: range, sealed: bool) -> None:
        self.open()
        for operation in operations[::2]:
            await self.disturb()
            await self.decide(operation)
            while True:
                try:
                    steps = await self.mortal(self.publisher.look())
                    if len(steps) == 2 and all(isinstance(step, Step) and step.settled for step in steps.values()):
                        break
                    self.happened.update(str(step)[:40] for step in steps.values() if isinstance(step, Unavailable))
                except Unavailable as error:
                    self.happened[error.why.split(":")[0][:40]] += 1
                except TimeoutError:
                    self.happened["killed"] += 1
                    await self.close()
                    self.open()
                await asyncio.sleep(0.05)
        await self.close()

    def open(self) -> None:
        self.chain, self.store = self.new_chain(), Store(self.net.folder / f"{self.wallet.hotkey_str}.db")
        self.publisher = Publisher(self.chain, self.store, max_change=1.0, pause_s=0.02)

    async def close(self) -> None:
        self.store.close()
        await self.chain.close()

    async def decide(self, operation: int) -> None:
        final = None
        while final is None:
            with suppress(Unavailable):
                final = (await self.chain.finalized()).block
        block = max(final, (self.store.last_finished() or 0) + 1)
        decide(self.store, block, self.row(operation), self.row(operation + 1))

    def check(self) -> None:
        sets = sets_of(self.net, self.wallet)
        plain = Counter((s.params["mecid"], *s.params["weights"]) for s in sets if "weights" in s.params)
        sealed = [s for s in sets if "commit" in s.params]
        assert (len(plain), len(sealed)) == (PLAIN, SEALED)
        assert set(plain.values()) == {1}, "some were written twice"


@pytest.mark.timeout(900)  # a minute alone, several on a machine that does other work
def test_a_thousand_operations_under_random_faults_lose_nothing_and_write_nothing_twice(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0, tempo=50_000, mechanisms=2, block_seconds=0.1)
    assert (WRITERS + PUBLISHERS) * (PLAIN + SEALED) == OPERATIONS
    targets = [net.wallet(name).hotkey.ss58_address for name in ("one", "two")]
    print(f"seed {SEED}")
    with LoopbackNode(net.folder / "chain", beacon=net.beacon) as second:
        nodes = [node_of(net), second]
        writers = [Writer(net, nodes, i, targets) for i in range(WRITERS)]
        writers += [PublishingWriter(net, nodes, WRITERS + i, targets) for i in range(PUBLISHERS)]

        async def story() -> None:
            await asyncio.gather(*(writer.run(range(PLAIN), sealed=False) for writer in writers))
            net.ledger.set_params(commit_reveal=True)
            net.ledger.advance(20)
            await asyncio.gather(*(writer.run(range(PLAIN, PLAIN + SEALED), sealed=True) for writer in writers))

        asyncio.run(story())
    print(sum((writer.happened for writer in writers), Counter()))
    net.ledger.advance(5)
    for writer in writers:
        writer.check()
