"""What the chain promises, whatever stands behind the adapter: every test runs on the embedded ledger and on the node.

With SN29_CHAIN_ENDPOINT set (a ws:// address; SN29_CHAIN_NETUID, else 29), the tests that only read run there as well.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from chain_net import BLOCK_S, NETUID, Net, run

from sn29.chain import Chain
from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Weights

MakeNet = Callable[..., Net]


@pytest.fixture(autouse=True, scope="module")
def metadata_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(params=["ledger", "node"])
def make_net(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeNet]:
    """make_net(**params) -> a chain of the test's own behind the backend."""
    with ExitStack() as stack:

        def make(**params: Any) -> Net:
            net = Net(tmp_path, node=request.param == "node", **params)
            if net.node is not None:
                stack.enter_context(net.node)
            return net

        yield make


LIVE = os.environ.get("SN29_CHAIN_ENDPOINT")


@pytest.fixture(params=["ledger", "node", *(["live"] if LIVE else [])])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chain]:
    """A chain with somebody on it, to read from."""
    if request.param == "live":
        yield Chain(int(os.environ.get("SN29_CHAIN_NETUID", NETUID)), network=str(LIVE))
        return
    net = Net(tmp_path, node=request.param == "node", tempo=77)
    wallets = [net.wallet(name, permit=name == "validator") for name in ("validator", "miner")]
    net.ledger.advance(100)

    async def populate() -> None:
        async with net.chain(wallets[1]) as chain:
            await chain.commit(b"somebody:was:here")

    with net.node or ExitStack():
        asyncio.run(populate())
        yield net.chain()


# Reading


def test_points_of_the_chain(reader: Chain) -> None:
    async def story(chain: Chain) -> None:
        final, head = await chain.finalized(), await chain.head()
        assert 0 < final.block <= head.block
        assert await chain.block_hash(final.block) == final.hash
        assert (await chain.head()).block >= head.block
        seconds = await chain.block_seconds()
        assert seconds > 0
        earlier, later = await chain.timestamp(final.block - 1), await chain.timestamp(final.block)
        assert later - earlier == pytest.approx(seconds, rel=3)  # a slot may be empty on a public chain
        with pytest.raises(Unavailable, match="no block at height"):
            await chain.block_hash(10**9)

    run(reader, story)


def test_the_identity_of_the_chain(reader: Chain) -> None:
    async def story(chain: Chain) -> None:
        identity = await chain.identity()
        assert identity.genesis == await chain.block_hash(0)
        assert len(identity.genesis) == 66
        assert identity.spec_version > 100

    run(reader, story)


def test_the_settings_of_the_subnet(reader: Chain) -> None:
    async def story(chain: Chain) -> None:
        block = (await chain.finalized()).block
        params = await chain.params(block)
        assert params.tempo > 0
        assert 0 < params.max_weight <= 1
        assert params.mechanisms >= 1 <= params.reveal_epochs
        if params.last_epoch_block is not None and params.next_epoch_block is not None:
            assert params.last_epoch_block <= block < params.next_epoch_block <= block + params.tempo + 1
        assert await chain.next_epoch_block() in range(block, block + 2 * params.tempo)
        assert await chain.stake_threshold() >= 0

    run(reader, story)


def test_neurons_and_commitments_at_one_block(reader: Chain) -> None:
    async def story(chain: Chain) -> None:
        block = (await chain.finalized()).block
        graph, found = await chain.metagraph(block), await chain.commitments(block)
        assert graph.block == block
        assert [n.uid for n in graph.neurons] == list(range(len(graph.neurons)))
        assert len(set(graph.uid_of())) == len(graph.neurons) > 1
        assert {c.hotkey for c in found} <= set(graph.uid_of())
        assert found == tuple(sorted(found, key=lambda c: (c.block, c.hotkey)))
        assert all(c.block <= block for c in found)
        assert found == await chain.commitments(block)
        validator = next(n for n in graph.neurons if n.permit)
        assert sum((await chain.weights(validator.hotkey, block)).values()) in (0, pytest.approx(1))
        assert await chain.pending("5NobodyOfThisName") == ()

    run(reader, story)


def test_a_missing_subnet_never_looks_empty(make_net: MakeNet) -> None:
    async def story(chain: Chain) -> None:
        for question in (chain.metagraph, chain.commitments, chain.params):
            with pytest.raises(Unavailable, match="no subnet 30"):
                await question()

    run(make_net().chain(netuid=30), story)


# Commitments


def test_commitments_come_back_with_their_blocks_and_as_they_were(make_net: MakeNet) -> None:
    net = make_net()
    first, second = net.wallet("first"), net.wallet("second")
    blob = bytes(range(128))

    async def story() -> None:
        async with net.chain(first) as a, net.chain(second) as b:
            before = await a.head()
            one = await a.commit(b"model one")
            other = await b.commit(blob)
            again = await a.commit(b"\xff\x00:not utf-8")
            assert before.block < one.block < other.block < again.block <= (await a.finalized()).block
            assert one.verified_by_readback
            found = [(c.hotkey, c.block, c.data) for c in await b.commitments()]
            assert found == [(b.hotkey, other.block, blob), (a.hotkey, again.block, b"\xff\x00:not utf-8")]
            past = [(c.hotkey, c.block, c.data) for c in await a.commitments(again.block - 1)]
            assert past == [(a.hotkey, one.block, b"model one"), (b.hotkey, other.block, blob)]
            assert await a.commitments(before.block) == ()

    asyncio.run(story())


def test_the_same_bytes_are_not_written_again_unless_told(make_net: MakeNet) -> None:
    """A process that died after sending calls the same again; what stands must not lose its age by that."""
    net = make_net()

    async def story(chain: Chain) -> None:
        first = await chain.commit(b"same")
        assert await chain.commit(b"same") == first
        moved = await chain.commit(b"same", again=True)
        assert moved.block > first.block
        assert [c.block for c in await chain.commitments()] == [moved.block]

    run(net.chain(net.wallet("miner")), story)


def test_room_and_size_of_commitments(make_net: MakeNet) -> None:
    net = make_net(tempo=50_000, block_seconds=0.02)

    async def story(chain: Chain) -> None:
        for size in (0, 129):
            with pytest.raises(Rejected) as refusal:
                await chain.commit(b"x" * size)
            assert refusal.value.reason is Reason.MALFORMED_COMMITMENT
        for i in range(31):
            await chain.commit(b"%d" % i)
        with pytest.raises(Unavailable, match="SpaceLimitExceeded"):
            await chain.commit(b"one too many")

    run(net.chain(net.wallet("miner")), story)


def test_an_unregistered_hotkey_is_refused_and_a_lost_one_not_listed(make_net: MakeNet) -> None:
    net = make_net(max_uids=1)
    stranger, miner = net.wallet("stranger", registered=False), net.wallet("miner")

    async def story() -> None:
        async with net.chain(stranger) as chain:
            with pytest.raises(Rejected) as refusal:
                await chain.commit(b"me too")
            assert refusal.value.reason is Reason.NOT_REGISTERED
        async with net.chain(miner) as chain:
            receipt = await chain.commit(b"mine")
            net.wallet("newcomer")  # takes the only uid
            assert await chain.commitments() == ()
            assert [c.data for c in await chain.commitments(receipt.block)] == [b"mine"]
            with pytest.raises(Rejected):
                await chain.commit(b"mine")

    asyncio.run(story())


def test_foreign_commitments_are_no_obstacle(make_net: MakeNet) -> None:
    """Other shapes than one raw field come as bytes that no parser of ours takes, one by one, beside the good ones."""
    net = make_net(tempo=50_000)
    miner, foreign = net.wallet("miner"), net.wallet("foreign")
    shapes: list[list[Any]] = [
        [{"BigRaw": b"x" * 300}],
        [{"Raw3": b"one"}, {"Raw3": b"two"}],
        [{"Sha256": "0x" + "ab" * 32}],
        [{"TimelockEncrypted": {"encrypted": b"\x01\x02", "reveal_round": 2**63}}],
        [],
    ]

    async def story() -> None:
        async with net.chain(miner) as ours, net.chain(foreign) as theirs:
            await ours.commit(b"good")
            for fields in shapes:
                call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": fields})
                assert (await submit(theirs, foreign, call)).success
                found = {c.hotkey: c.data for c in await ours.commitments()}
                assert found[ours.hotkey] == b"good"
                assert found[theirs.hotkey][:1] == b"["
                assert ours.hotkey in {c.hotkey for c in await ours.commitments((await ours.head()).block)}

    asyncio.run(story())


async def submit(chain: Chain, wallet: Any, call: Any) -> Any:
    """Past our own adapter, with what it is connected to."""
    return await chain._endpoints.ask(
        lambda link: link.client.submit_call(call, wallet, signer="hotkey", wait_for_finalization=False)
    )


# Weights


def test_weights_are_read_back_by_hotkey(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0)
    validator = net.wallet("validator", permit=True)
    one, two, three = (net.wallet(name).hotkey.ss58_address for name in ("one", "two", "three"))

    async def story(chain: Chain) -> None:
        assert await chain.weights(chain.hotkey) == {}
        before = (await chain.head()).block
        sent = Weights(before, {one: 0.7, two: 0.2, three: 0.1, "5ThisHotkeyHasLeft": 0.3})
        expected = await chain.conformed(sent)
        receipt = await chain.set_weights(sent)
        row = await chain.weights(chain.hotkey)
        assert receipt.verified_by_readback
        assert (receipt.mode, receipt.reveal_round) == ("plain", None)
        assert receipt.block > before
        assert row == expected == pytest.approx({one: 0.7, two: 0.2, three: 0.1}, abs=1e-4)
        assert await chain.weights(chain.hotkey, before) == {}
        assert await chain.weights("5NotRegistered") == {}
        graph = await chain.metagraph()
        assert {n.hotkey: n.last_update for n in graph.neurons}[chain.hotkey] == receipt.block
        await chain.set_weights(Weights(before, {two: 1.0}))
        assert await chain.weights(chain.hotkey) == {two: 1.0}
        assert await chain.weights(chain.hotkey, receipt.block) == row

    run(net.chain(validator), story)


def test_a_row_is_fitted_to_the_limits_before_it_is_sent(make_net: MakeNet) -> None:
    """So that what stands on chain can be compared with what was sent, to the last bit."""
    net = make_net(weights_rate_limit=0, min_weights=4, max_weight=26214)
    validator = net.wallet("validator", permit=True)
    one, two, *others = (net.wallet(f"miner {i}").hotkey.ss58_address for i in range(5))

    async def story(chain: Chain) -> None:
        net.ledger.set_params(max_weight=13107)
        net.ledger.advance(1)
        with pytest.raises(Rejected, match="4 hotkeys with weight") as refusal:
            await chain.set_weights(Weights(1, {one: 0.9, two: 0.1}))
        assert refusal.value.reason is Reason.NO_WEIGHTS
        net.ledger.set_params(max_weight=26214)
        net.ledger.advance(1)
        weights = Weights(1, {one: 0.9, two: 0.05, others[0]: 0.05})
        receipt = await chain.set_weights(weights)
        row = await chain.weights(chain.hotkey)
        assert receipt.verified_by_readback
        assert row == await chain.conformed(weights)
        assert len(row) == 4
        assert max(row.values()) <= 0.4
        assert row[one] == pytest.approx(0.4, abs=1e-4)

    run(net.chain(validator), story)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_subnet_with_fewer_neurons_than_its_least_count(make_net: MakeNet, sealed: bool) -> None:
    net = make_net(weights_rate_limit=0, min_weights=8, commit_reveal=sealed, tempo=100)
    validator, miner = net.wallet("validator", permit=True), net.wallet("miner").hotkey.ss58_address

    async def story(chain: Chain) -> None:
        receipt = await chain.set_weights(Weights(1, {miner: 1.0}))
        assert receipt.verified_by_readback
        assert receipt.mode == ("timelocked" if sealed else "plain")
        if sealed:
            net.ledger.advance(300)
        assert await chain.weights(chain.hotkey) == await chain.conformed(Weights(1, {miner: 1.0}))
        assert len(await chain.weights(chain.hotkey)) == 2

    run(net.chain(validator), story)


def test_a_row_is_not_inherited_with_a_uid(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0, max_uids=3)
    validator, one, two = (net.wallet(name, permit=name == "v") for name in ("v", "one", "two"))

    async def story(chain: Chain) -> None:
        await chain.set_weights(Weights(1, {one.hotkey.ss58_address: 0.5, two.hotkey.ss58_address: 0.5}))
        newcomer = net.wallet("newcomer").hotkey.ss58_address
        assert (await chain.metagraph()).uid_of()[newcomer] == 1
        assert await chain.weights(chain.hotkey) == {two.hotkey.ss58_address: 1.0}

    run(net.chain(validator), story)


def test_the_rate_limit_says_how_long_to_wait(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=10_000)
    validator, miner = net.wallet("validator", permit=True), net.wallet("miner").hotkey.ss58_address

    async def story(chain: Chain) -> None:
        with pytest.raises(Unavailable, match="blocks to wait") as early:
            await chain.set_weights(Weights(1, {miner: 1.0}))  # registration counts as a weight set
        assert 0 < (early.value.retry_s or 0) <= 10_000 * BLOCK_S
        assert early.value.certain
        with pytest.raises(Unavailable, match="blocks to wait") as doubtful:  # an earlier set may still land
            await chain.set_weights(Weights(1, {miner: 1.0}), since=(await chain.head()).block)
        assert not doubtful.value.certain
        net.ledger.advance(10_000)
        assert (await chain.set_weights(Weights(1, {miner: 1.0}))).verified_by_readback

    run(net.chain(validator), story)


def test_permit_version_and_empty_weights(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0)
    validator, plain = net.wallet("validator", permit=True), net.wallet("plain")
    stranger = net.wallet("stranger", registered=False)
    miner = net.wallet("miner").hotkey.ss58_address

    async def refused(wallet: Any, weights: dict[str, float], version_key: int = 0, mechid: int = 0) -> Reason:
        async with net.chain(wallet) as chain:
            with pytest.raises(Rejected) as refusal:
                await chain.set_weights(Weights(1, weights), version_key=version_key, mechid=mechid)
            return refusal.value.reason

    async def story() -> None:
        assert await refused(plain, {miner: 1.0}) is Reason.NOT_PERMITTED
        assert await refused(stranger, {miner: 1.0}) is Reason.NOT_REGISTERED
        assert await refused(validator, {}) is Reason.NO_WEIGHTS
        assert await refused(validator, {"5Gone": 1.0, miner: 0.0}) is Reason.NO_WEIGHTS
        assert await refused(validator, {miner: 1.0}, mechid=1) is Reason.SETTING
        net.ledger.set_params(version_key=7)
        net.ledger.advance(1)
        assert await refused(validator, {miner: 1.0}, 6) is Reason.OUTDATED
        async with net.chain(validator) as chain:
            assert (await chain.params()).version_key == 7
            assert (await chain.set_weights(Weights(1, {miner: 1.0}), version_key=7)).verified_by_readback

    asyncio.run(story())


def test_mechanisms_have_weights_of_their_own(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0, mechanisms=2)
    validator = net.wallet("validator", permit=True)
    one, two = (net.wallet(name).hotkey.ss58_address for name in ("one", "two"))

    async def story(chain: Chain) -> None:
        assert (await chain.params()).mechanisms == 2
        first = await chain.set_weights(Weights(1, {one: 1.0}))
        second = await chain.set_weights(Weights(1, {two: 1.0}), mechid=1)
        assert [first.verified_by_readback, second.verified_by_readback] == [True, True]
        assert second.block > first.block
        assert await chain.last_update() == first.block
        assert await chain.last_update(mechid=1) == second.block
        assert await chain.last_update(first.block - 1, mechid=1) < first.block
        assert await chain.weights(chain.hotkey) == {one: 1.0}
        assert await chain.weights(chain.hotkey, mechid=1) == {two: 1.0}
        assert next(n.last_update for n in (await chain.metagraph()).neurons if n.hotkey == chain.hotkey) == first.block

    run(net.chain(validator), story)


# Sealed weights


def test_sealed_weights_are_hidden_until_their_epoch(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0, tempo=100, commit_reveal=True, reveal_epochs=2, mechanisms=2)
    validator = net.wallet("validator", permit=True)
    one, two = (net.wallet(name).hotkey.ss58_address for name in ("one", "two"))

    async def story(chain: Chain) -> None:
        params = await chain.params()
        assert params.commit_reveal
        assert params.reveal_epochs == 2
        receipt = await chain.set_weights(Weights(1, {one: 0.75, two: 0.25}))
        other = await chain.set_weights(Weights(1, {two: 1.0}), mechid=1)
        assert [receipt.verified_by_readback, other.verified_by_readback] == [True, True]
        assert receipt.mode == other.mode == "timelocked"
        (waiting,) = await chain.pending(chain.hotkey)
        assert (waiting.commit_block, waiting.reveal_round) == (receipt.block, receipt.reveal_round)
        assert waiting.digest == receipt.digest != other.digest
        assert await chain.pending(chain.hotkey, block=receipt.block - 1) == ()
        assert [p.commit_block for p in await chain.pending(chain.hotkey, mechid=1)] == [other.block]
        assert await chain.weights(chain.hotkey) == {}
        assert receipt.reveals_at is not None
        net.ledger.advance(max(0, receipt.reveals_at - 20 - (await chain.head()).block))
        assert await chain.weights(chain.hotkey) == {}
        net.ledger.advance(100)
        assert await chain.weights(chain.hotkey) == pytest.approx({one: 0.75, two: 0.25}, abs=1e-4)
        assert await chain.weights(chain.hotkey, mechid=1) == {two: 1.0}
        assert await chain.pending(chain.hotkey) == ()
        assert await chain.pending(chain.hotkey, block=receipt.block) == (waiting,)

    run(net.chain(validator), story)


def test_a_sealed_commit_is_told_from_another_by_its_digest(make_net: MakeNet) -> None:
    """What was sent is known before it is sent, so that a later process can find it, and does not take another's for it."""
    net = make_net(weights_rate_limit=0, tempo=50_000, commit_reveal=True)
    validator = net.wallet("validator", permit=True)
    one, two = (net.wallet(name).hotkey.ss58_address for name in ("one", "two"))
    told: list[str] = []

    async def story() -> None:
        async with net.chain(validator) as earlier:
            since = (await earlier.head()).block
            receipt = await earlier.set_weights(Weights(1, {one: 1.0}), sending=told.append)
            assert told == [receipt.digest]
        async with net.chain(validator) as later:
            assert await later.set_weights(Weights(1, {one: 1.0}), since=since, digest=told) == receipt
            with pytest.raises(Unavailable, match=f"block {receipt.block} waits for its reveal") as doubt:
                await later.set_weights(Weights(1, {one: 1.0}), since=since)
            assert not doubt.value.certain
            other = await later.set_weights(Weights(1, {two: 1.0}), since=since, digest="0" * 64)  # never arrived
            assert [p.digest for p in await later.pending(later.hotkey)] == [receipt.digest, other.digest]

    asyncio.run(story())


def test_sealed_weights_that_cannot_be_opened_or_taken_are_dropped_silently(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0, tempo=100, commit_reveal=True)
    validator, miner = net.wallet("validator", permit=True), net.wallet("miner").hotkey.ss58_address

    async def story(chain: Chain) -> None:
        receipt = await chain.set_weights(Weights(1, {miner: 1.0}))
        assert receipt.verified_by_readback
        net.ledger.set_params(version_key=5)  # newer than the one in the sealed row
        net.ledger.advance(300)
        assert await chain.pending(chain.hotkey) == ()
        assert await chain.weights(chain.hotkey) == {}

    run(net.chain(validator), story)


def test_sealed_weights_may_wait_in_tens_and_no_more(make_net: MakeNet) -> None:
    net = make_net(weights_rate_limit=0, tempo=50_000, commit_reveal=True)
    validator = net.wallet("validator", permit=True)
    one, two = (net.wallet(name).hotkey.ss58_address for name in ("one", "two"))

    async def story(chain: Chain) -> None:
        for i in range(10):
            await chain.set_weights(Weights(1, {one: 1.0 + i, two: 1.0}))
        assert len(await chain.pending(chain.hotkey)) == 10
        with pytest.raises(Unavailable, match="TooManyUnrevealedCommits"):
            await chain.set_weights(Weights(1, {one: 1.0}))

    run(net.chain(validator), story)
