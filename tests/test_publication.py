"""Weights on their way to a real chain's file: due, held back, committed and revealed, by mechanism, and killed on the way."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from beacon import TestBeacon
from loguru import logger
from loopback_node import LoopbackNode

from neurons.ending import Stop
from neurons.validator import _pause, _publish
from sn29 import telemetry
from sn29.chain import Chain, create_wallet, load_wallet
from sn29.errors import Reason, Rejected, Unavailable
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.publication import Publisher, Step, distance
from sn29.records import Head, Weights
from sn29.round_record import RoundRecord
from sn29.step_log import HeldSteps
from sn29.store import ChainSeen, Sent, Store

NETUID = 29
TEMPO = 3000  # blocks of 0.1 s: no epoch passes by itself while a test runs


@dataclass
class Subnet:
    """A chain with one validator and some miners, and the validator's store."""

    folder: Path
    ledger: Ledger
    events: list[dict[str, Any]] = field(default_factory=list)

    def register(self, name: str, *, validator: bool = False) -> str:
        """The hotkey of that name, made and registered."""
        wallet = create_wallet(name, "default", self.folder / "wallets")
        address = str(wallet.hotkey.ss58_address)
        stake = 1000 if validator else 0
        self.ledger.register(address, str(wallet.coldkeypub.ss58_address), stake=stake, permit=validator)
        self.ledger.advance(1)
        return address

    def store(self) -> Store:
        return Store(self.folder / "state" / "store.db")

    def chain(self, name: str = "validator", network: str = "", **options: Any) -> Chain:
        """network: address of a node; the ledger itself when none is named."""
        wallet = load_wallet(name, "default", self.folder / "wallets")
        if network:
            return Chain(NETUID, wallet=wallet, network=network, **options)
        return Chain(NETUID, wallet=wallet, substrate=LedgerSubstrate(self.folder / "chain.db", TestBeacon()), **options)

    def decide(self, weights: Mapping[int, Mapping[str, float]], block: int | None = None) -> dict[int, Weights]:
        """Keeps a finished round at a block (default: the newest final one) that decided these weights."""
        at = self.ledger.finalized() if block is None else block
        decided = {m: Weights(at, dict(row)) for m, row in weights.items()}
        record = RoundRecord(Head(at, "0x" + "0" * 64), {}, (), {}, (), {}, decided, {}, {})
        store = self.store()
        store.open_round(at, {})
        store.finish_round(at, record, decided)
        store.close()
        return decided

    def later(self, blocks: int) -> None:
        self.ledger.advance(blocks)

    def look(self, times: int = 1, *, network: str = "", until_settled: bool = False, **limits: Any) -> dict[int, Any]:
        """What a validator that was started anew does in so many looks, or until nothing is left to do."""
        store = self.store()

        async def story() -> dict[int, Any]:
            chain = self.chain(network=network)
            try:
                publisher = Publisher(chain, store, **limits)
                for _ in range(600 if until_settled else times):
                    steps = await publisher.look()
                    if until_settled and all(isinstance(step, Step) and step.settled for step in steps.values()):
                        break
                    await asyncio.sleep(0.1 if until_settled else 0)
                return steps
            finally:
                await chain.close()

        try:
            return asyncio.run(story())
        finally:
            store.close()

    def row(self, mechanism: int = 0) -> dict[str, float]:
        async def story() -> dict[str, float]:
            async with self.chain() as chain:
                return await chain.weights(chain.hotkey, mechid=mechanism)

        return asyncio.run(story())

    def send_and_die(self, weights: Weights, mechanism: int = 0) -> None:
        """A process that is gone as soon as the chain has its set, which is perhaps not final. What it sent is noted."""
        store = self.store()

        def sending(digest: str) -> None:
            for note in store.sent(mechanism):
                store.keep_sent(mechanism, replace(note, digests=(*note.digests, digest)))

        async def story() -> None:
            before = self.sets()
            async with self.chain() as chain:
                task = asyncio.create_task(chain.set_weights(weights, version_key=100, mechid=mechanism, sending=sending))
                while self.sets() == before:
                    await asyncio.sleep(0.01)
                task.cancel()

        asyncio.run(story())
        store.close()
        self.later(1)

    def sets(self) -> int:
        """How many calls of the validator's hotkey the chain has taken."""
        return self.ledger.next_nonce(self.validator)

    @property
    def validator(self) -> str:
        return str(load_wallet("validator", "default", self.folder / "wallets").hotkey.ss58_address)

    def said(self) -> list[str]:
        return [str(event["event"]) for event in self.events]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Subnet]]:
    """make(**settings of the chain) -> a subnet with its validator."""
    made: list[Subnet] = []
    events: list[dict[str, Any]] = []
    sink = logger.add(lambda m: events.append(dict(m.record["extra"], message=m.record["message"])), level="INFO")

    def new(**params: Any) -> Subnet:
        chosen = {"block_seconds": 0.1, "tempo": TEMPO, "finality_lag": 1, "weights_rate_limit": 0, **params}
        ledger = Ledger.create(tmp_path / "chain.db", netuid=NETUID, beacon=TestBeacon(), **chosen)
        subnet = Subnet(tmp_path, ledger, events)
        made.append(subnet)
        subnet.register("validator", validator=True)
        return subnet

    yield new
    logger.remove(sink)
    for subnet in made:
        subnet.ledger.close()


# --- due --------------------------------------------------------------------------------------------------------------


def test_weights_are_set_once_however_often_they_are_looked_at(make) -> None:
    subnet = make()
    ann = subnet.register("ann")
    assert subnet.look() == {}
    decided = subnet.decide({0: {ann: 1.0}})
    assert subnet.look(3) == subnet.look() == {0: Step.STANDS}
    assert subnet.sets() == 1
    assert subnet.row() == {ann: 1.0}
    assert [weights for _, weights in subnet.store().publications()] == [decided[0]]
    assert subnet.store().sent() == ()
    assert subnet.said().count("published") == 1


def test_the_same_weights_are_set_again_after_a_tempo_and_newer_ones_before(make) -> None:
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    subnet.later(TEMPO)
    assert subnet.look(2) == {0: Step.STANDS}
    assert subnet.sets() == 2
    newer = subnet.decide({0: {ann: 0.5, ben: 0.5}})
    subnet.look(2)
    assert subnet.sets() == 3
    assert subnet.row() == {ann: 0.5, ben: 0.5}
    assert subnet.store().publications()[-1][1] == newer[0]


def test_the_rate_limit_is_waited_for(make) -> None:
    subnet = make(weights_rate_limit=1000)
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    assert subnet.look() == {0: Step.WAITS}
    assert subnet.store().sent() == (), "nothing was even noted"
    subnet.later(1000)
    assert subnet.look() == {0: Step.STANDS}
    subnet.decide({0: {ann: 1.0}})
    assert subnet.look() == {0: Step.WAITS}
    assert subnet.sets() == 1


def test_weights_stand_as_the_chain_can_have_them(make) -> None:
    """A row that the subnet's limits change is known before it is sent, and is not taken for another one afterwards."""
    subnet = make(max_weight=39322, min_weights=2)  # 60 %
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 0.9, ben: 0.1}})
    assert subnet.look(2) == {0: Step.STANDS}
    assert subnet.row() == pytest.approx({ann: 0.6, ben: 0.4}, abs=1e-4)
    assert subnet.sets() == 1


# --- nothing on a bad read --------------------------------------------------------------------------------------------


def test_nothing_is_set_by_a_node_that_is_behind(make) -> None:
    subnet = make(finality_lag=1000)  # 100 s of 0.1 s
    ann = subnet.register("ann")
    with sqlite3.connect(subnet.folder / "chain.db") as db:  # as if the chain had begun 300 s earlier
        db.execute("update chain set value = value - 300 where name = 'genesis'")
    db.close()
    subnet.decide({0: {ann: 1.0}})
    with pytest.raises(Unavailable, match="behind"):
        subnet.look()
    assert subnet.sets() == 0


def test_nothing_is_set_by_an_empty_metagraph(make) -> None:
    subnet = make(finality_lag=1000)  # at the newest final block, which is 0, nobody was registered
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    with pytest.raises(Unavailable, match="empty"):
        subnet.look()
    assert subnet.sets() == 0


def test_nothing_is_set_by_a_chain_that_does_not_know_the_rounds_block(make) -> None:
    subnet = make()
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}}, block=10**6)
    with pytest.raises(Unavailable, match="at block 1000000"):
        subnet.look()
    assert subnet.sets() == 0


def test_an_unregistered_validator_is_told_so(make, tmp_path: Path) -> None:
    subnet = make()
    stranger = create_wallet("stranger", "default", tmp_path / "wallets")
    subnet.later(3)
    subnet.decide({0: {subnet.validator: 1.0}})

    async def story() -> None:
        async with subnet.chain("stranger") as chain:
            await Publisher(chain, subnet.store()).look()

    with pytest.raises(Rejected) as refused:
        asyncio.run(story())
    assert refused.value.reason is Reason.NOT_REGISTERED
    assert refused.value.got == stranger.hotkey.ss58_address


def test_a_validator_that_cannot_set_weights_still_sees_the_chain_grow(make, tmp_path: Path) -> None:
    """The pauses between its tries become long: 20 minutes on the public network, where a head is old after 5."""
    subnet = make()
    create_wallet("stranger", "default", tmp_path / "wallets")
    subnet.later(3)
    subnet.decide({0: {subnet.validator: 1.0}})
    status = tmp_path / telemetry.STATUS
    telemetry.keep_status(status, "validator")

    def read() -> telemetry.Status:
        return telemetry.Status.from_json(status.read_bytes())

    async def story() -> None:
        async with subnet.chain("stranger") as chain:
            publisher = Publisher(chain, subnet.store())
            with pytest.raises(Rejected):
                await publisher.look()
            telemetry.stage("deciding")
            since = read().unpublished_since
            assert since is not None
            subnet.later(30)
            head = subnet.ledger.head() - 1
            await _pause(publisher, 0.2, 0.05)
            telemetry.stage("waiting")
            assert (read().head or 0) >= head
            with pytest.raises(Rejected):
                await publisher.look()
        telemetry.stage("deciding")
        assert read().unpublished_since == since

    try:
        asyncio.run(story())
    finally:
        telemetry.leave_status()


def test_rounds_that_nobody_could_copy_are_logged_also_without_a_place_for_weights(make, tmp_path: Path) -> None:
    subnet = make()
    create_wallet("stranger", "default", tmp_path / "wallets")
    subnet.later(3)
    subnet.decide({0: {subnet.validator: 1.0}})
    blocks: list[int] = []

    async def story() -> None:
        logged, store = asyncio.Event(), subnet.store()

        def log(values: Mapping[str, Any], step: int, done: telemetry.Done) -> None:
            blocks.append(step)
            done(True)
            logged.set()

        held = HeldSteps(tmp_path / "held", store, log)
        held.hold(RoundRecord(Head(2, "0x" + "0" * 64), {}, (), {}, (), {}, {0: Weights(2, {})}, {}, {}), {"block": 2})
        async with subnet.chain("stranger") as chain:
            publisher = Publisher(chain, store)
            publishing = asyncio.create_task(_publish(publisher, Stop("validator", 5.0), 0.05, asyncio.Event(), held))
            async with asyncio.timeout(60):
                await logged.wait()
            publishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await publishing
        store.close()

    asyncio.run(story())
    assert blocks == [2]


def test_a_validator_without_a_permit_is_told_so_and_may_try_again(make) -> None:
    subnet = make()
    ann = subnet.register("ann")
    subnet.ledger.register(subnet.validator, subnet.validator, stake=1000, permit=False)
    subnet.later(3)
    subnet.decide({0: {ann: 1.0}})
    refused = subnet.look()[0]
    assert isinstance(refused, Rejected)
    assert refused.reason is Reason.NOT_PERMITTED
    assert subnet.store().sent() == ()
    subnet.ledger.register(subnet.validator, subnet.validator, stake=1000, permit=True)
    subnet.later(3)
    assert subnet.look() == {0: Step.STANDS}


# --- how much a set may move ------------------------------------------------------------------------------------------


def test_a_set_that_moves_too_much_goes_part_of_the_way_and_the_rest_an_epoch_later(make) -> None:
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    odd = subnet.decide({0: {ben: 1.0}})
    assert subnet.look(3) == subnet.look() == {0: Step.HELD}, "also after a restart"
    assert not Step.HELD.settled
    assert subnet.row() == pytest.approx({ann: 0.25, ben: 0.75}, abs=1e-4)
    assert subnet.sets() == 2
    assert subnet.said().count("held_back") == 1
    subnet.later(TEMPO)
    assert subnet.look(3) == subnet.look() == {0: Step.STANDS}
    assert subnet.row() == {ben: 1.0}
    assert subnet.sets() == 3
    assert subnet.store().publications()[-1][1] == odd[0]


def test_two_that_win_in_turn_hold_no_set_back_for_ever(make) -> None:
    """Every round is set, each moves at most what it may, and what stands is never older than an epoch."""
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    rows = [subnet.row()]
    for turn in range(6):
        subnet.later(5)
        subnet.decide({0: {(ben, ann)[turn % 2]: 1.0}})
        subnet.look(2, max_change=0.2)
        rows.append(subnet.row())
    moved = [distance(one, other) for one, other in itertools.pairwise(rows)]
    assert moved == pytest.approx([0.2] * 6, abs=1e-3)
    assert subnet.sets() == 7
    subnet.later(TEMPO)
    subnet.look(max_change=0.2)
    assert subnet.sets() == 8, "what is held is refreshed"


def test_any_change_may_be_allowed_at_once(make) -> None:
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    subnet.decide({0: {ben: 1.0}})
    assert subnet.look() == {0: Step.HELD}
    assert subnet.look(max_change=1.0) == {0: Step.STANDS}
    assert subnet.row() == {ben: 1.0}


def test_committed_weights_go_part_of_the_way_from_what_is_on_its_way(make) -> None:
    subnet = make(commit_reveal=True)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    subnet.later(5)
    subnet.decide({0: {ben: 1.0}})
    assert subnet.look(2) == {0: Step.HELD}
    assert [dict(sent.weights.by_hotkey) for sent in subnet.store().sent()] == [{ann: 1.0}, {ann: 0.25, ben: 0.75}]
    assert [len(sent.digests) for sent in subnet.store().sent()] == [1, 1]


def test_a_commit_of_somebody_else_with_our_hotkey_is_not_taken_for_ours(make) -> None:
    """Ours was never sent: its note has another digest than the commit on chain, or none."""
    subnet = make(commit_reveal=True)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    for digests in ((), ("ab" * 32,)):
        decided = subnet.decide({0: {ann: 1.0}})
        since = subnet.ledger.finalized()
        subnet.send_and_die(Weights(1, {ben: 1.0}))
        subnet.store().keep_sent(0, Sent(since, decided[0], digests=digests))
        subnet.later(5)
        assert subnet.look(until_settled=True) == {0: Step.COMMITTED}
        subnet.later(TEMPO)
    subnet.look()
    assert subnet.said().count("not_published") == 2
    assert subnet.said().count("revealed") == 1, "the newest, which overtakes the other"
    assert subnet.row() == {ann: 1.0}


def test_distance_is_the_part_of_all_weight_that_moves() -> None:
    assert distance({"a": 1.0}, {"a": 1.0}) == 0
    assert distance({"a": 1.0}, {"b": 1.0}) == 1
    assert distance({"a": 0.5, "b": 0.5}, {"a": 0.75, "c": 0.25}) == 0.5


# --- the alarm --------------------------------------------------------------------------------------------------------


def test_an_alarm_when_the_last_set_is_too_old(make) -> None:
    subnet = make()
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    subnet.ledger.register(subnet.validator, subnet.validator, stake=1000, permit=False)
    subnet.later(2 * TEMPO)
    for _ in range(2):
        assert isinstance(subnet.look()[0], Rejected)
    assert "weights_alarm" not in subnet.said()
    subnet.later(TEMPO)
    assert isinstance(subnet.look()[0], Rejected)
    assert subnet.said().count("weights_alarm") == 1
    told = next(event for event in subnet.events if event["event"] == "weights_alarm")
    assert told["fields"]["epochs"] == 3
    assert "3 epochs ago" in told["message"]


def test_an_alarm_when_no_set_ever_landed(make) -> None:
    subnet = make(weights_rate_limit=20 * TEMPO)
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    assert subnet.look(2, alarm_epochs=1) == {0: Step.WAITS}
    assert "weights_alarm" not in subnet.said()
    subnet.later(TEMPO)
    subnet.decide({0: {ann: 1.0}})
    subnet.look(2, alarm_epochs=1)
    assert subnet.said().count("weights_alarm") == 1


def test_a_chain_that_stands_still_is_told_once_and_the_alarm_counts_on(make) -> None:
    """With one endpoint that answers every question: the clock of this process notices."""
    subnet = make(block_seconds=0.01, tempo=100)
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    store = subnet.store()

    async def story() -> None:
        async with subnet.chain() as chain:
            publisher = Publisher(chain, store, tolerance_s=0.5, alarm_epochs=1)
            assert await publisher.look() == {0: Step.STANDS}
            stand_still(subnet)
            await publisher.look()
            assert "no_final_block" not in subnet.said()
            await asyncio.sleep(0.6)
            for _ in range(3):
                with pytest.raises(Unavailable, match="stands still"):
                    await publisher.look()
            assert subnet.said().count("no_final_block") == 1
            await asyncio.sleep(0.6)
            with suppress(Unavailable):
                await publisher.look()
            assert subnet.said().count("weights_alarm") == 1
            stand_still(subnet, on=False)
            subnet.later(5)
            await publisher.look()
            await publisher.look()
            assert (subnet.said().count("no_final_block"), subnet.said().count("weights_alarm")) == (1, 1)

    asyncio.run(story())
    store.close()


def stand_still(subnet: Subnet, name: str = "chain.db", *, on: bool = True) -> None:
    """The chain makes no blocks any more, or does again."""
    with sqlite3.connect(subnet.folder / name) as db:
        db.execute("update chain set value = value + ? where name = 'offset'", (-(10**9) if on else 10**9,))
    db.close()


def test_an_endpoint_that_stands_still_is_left_for_one_that_goes_on(make) -> None:
    """It answers every question, and shows the set before: what is newer is set through the other one."""
    subnet = make(block_seconds=0.05)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    store = subnet.store()

    async def story(first: str, spare: str) -> None:
        async with subnet.chain(network=first, fallbacks=[spare]) as chain:
            publisher = Publisher(chain, store, max_change=1.0, pause_s=0.05)
            assert await publisher.look() == {0: Step.STANDS}
            subnet.later(100)
            newest = subnet.decide({0: {ben: 1.0}})
            ends = time.monotonic() + 30
            while store.publications()[-1][1] != newest[0] and time.monotonic() < ends:
                with suppress(Unavailable):
                    await publisher.look()
                await asyncio.sleep(0.1)
            assert await publisher.look() == {0: Step.STANDS}

    with sqlite3.connect(subnet.folder / "chain.db") as db:
        db.execute("vacuum into ?", (str(subnet.folder / "frozen.db"),))
    db.close()
    stand_still(subnet, "frozen.db")
    beacon = TestBeacon()
    with (
        LoopbackNode(subnet.folder / "frozen.db", beacon=beacon) as frozen,
        LoopbackNode(subnet.folder / "chain.db", beacon=beacon) as good,
    ):
        asyncio.run(story(frozen.url, good.url))
    store.close()
    assert subnet.sets() == 2
    assert subnet.row() == {ben: 1.0}


def test_a_chain_that_already_stands_still_is_told_at_the_first_look(make) -> None:
    subnet = make()
    subnet.look()
    assert subnet.said() == []
    stand_still(subnet)
    with sqlite3.connect(subnet.folder / "chain.db") as db:  # as if the chain had begun 300 s earlier
        db.execute("update chain set value = value - 300 where name = 'genesis'")
    db.close()
    assert subnet.look() == {}, "nothing is decided, and nothing due"
    assert subnet.said() == ["no_final_block"]
    seen = subnet.store().chain_seen()
    assert seen is not None
    assert seen.reveal_epochs is None, "nobody has asked yet whether weights are concealed"


def test_an_alarm_when_the_chain_is_silent_from_the_start(make) -> None:
    """Counted on from the block and the time that the process before has kept."""
    subnet = make()
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    store = subnet.store()
    seen = store.chain_seen()
    assert seen is not None
    assert (seen.block_seconds, seen.epoch, seen.reveal_epochs) == (0.1, TEMPO, 0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nowhere = f"ws://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(Unavailable):
            subnet.look(network=nowhere)
        assert "weights_alarm" not in subnet.said()
        store.keep_chain_seen(ChainSeen(seen.block, seen.at - 4 * TEMPO * 0.1, 0.1, TEMPO, 0))
        with pytest.raises(Unavailable):
            subnet.look(network=nowhere)
    assert subnet.said().count("weights_alarm") == 1
    assert "no_final_block" in subnet.said()


def test_a_validator_waits_for_a_chain_that_does_not_answer_yet(make) -> None:
    """And says meanwhile what a publisher says."""
    from neurons.validator import _belong, _until_it_answers

    subnet = make()
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    store = subnet.store()
    store.keep_chain_seen(ChainSeen(1, time.time() - 4 * TEMPO * 0.1, 0.1, TEMPO, 0))

    async def story(node: LoopbackNode) -> None:
        chain = subnet.chain(network=node.url, deadline_s=5)
        waiting = asyncio.create_task(_until_it_answers(lambda: _belong(chain, store), Publisher(chain, store), 0.05))
        while "weights_alarm" not in subnet.said():
            await asyncio.sleep(0.02)
        assert not waiting.done()
        node.refuse(False)
        await waiting
        await chain.close()

    with LoopbackNode(subnet.folder / "chain.db", beacon=TestBeacon()) as node:
        node.refuse()
        asyncio.run(asyncio.wait_for(story(node), 60))
    assert {"unavailable", "no_final_block"} <= set(subnet.said())
    assert store.chain() is not None
    store.close()


def test_no_alarm_before_committed_weights_can_stand(make) -> None:
    subnet = make(commit_reveal=True, reveal_epochs=3)
    ann = subnet.register("ann")
    for _ in range(8):
        subnet.decide({0: {ann: 1.0}})
        subnet.look()
        subnet.later(TEMPO)
    assert "revealed" in subnet.said()
    assert "weights_alarm" not in subnet.said(), "what is revealed is three epochs old"


def test_a_subnet_without_epochs_is_served_like_others(make) -> None:
    subnet = make(tempo=0)
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}})
    assert subnet.look(3) == subnet.look() == {0: Step.STANDS}
    assert subnet.sets() == 1
    subnet.later(360)
    subnet.look(2)
    assert subnet.sets() == 2
    subnet.ledger.register(subnet.validator, subnet.validator, stake=1000, permit=False)
    subnet.later(3 * 360)
    assert isinstance(subnet.look()[0], Rejected)
    assert subnet.said().count("weights_alarm") == 1


# --- unknown outcomes -------------------------------------------------------------------------------------------------


def test_a_set_that_landed_unseen_is_found_and_not_repeated(make) -> None:
    """As after a kill between the chain's inclusion and our note of it, once with a note and once without a store."""
    subnet = make()
    ann = subnet.register("ann")
    decided = subnet.decide({0: {ann: 1.0}})
    subnet.store().keep_sent(0, Sent(subnet.ledger.finalized(), decided[0]))

    async def story() -> int:
        async with subnet.chain() as chain:
            return (await chain.set_weights(decided[0], version_key=100)).block

    landed = asyncio.run(story())
    assert subnet.look() == {0: Step.STANDS}
    assert [block for block, _ in subnet.store().publications()] == [landed]
    assert subnet.store().sent() == ()
    subnet.store().close()
    for path in (subnet.folder / "state").iterdir():
        path.unlink()
    subnet.decide({0: {ann: 1.0}}, block=decided[0].block)
    assert subnet.look() == {0: Step.STANDS}
    assert [block for block, _ in subnet.store().publications()] == [landed]
    assert subnet.sets() == 1


def test_a_note_of_a_set_that_never_landed_is_sent_again(make) -> None:
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    decided = subnet.decide({0: {ann: 1.0}})
    subnet.store().keep_sent(0, Sent(subnet.ledger.finalized(), decided[0]))
    assert subnet.look() == {0: Step.STANDS}
    assert subnet.sets() == 1
    subnet.store().keep_sent(0, Sent(subnet.ledger.finalized(), decided[0]))
    subnet.later(5)
    subnet.decide({0: {ann: 0.5, ben: 0.5}})
    assert subnet.look() == {0: Step.STANDS}, "a newer round's weights take the place of what was noted"
    assert subnet.row() == {ann: 0.5, ben: 0.5}
    assert subnet.store().sent() == ()


def test_somebody_elses_set_with_our_hotkey_is_said_and_replaced(make) -> None:
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()

    async def intruder() -> None:
        async with subnet.chain() as chain:
            await chain.set_weights(Weights(1, {ben: 1.0}), version_key=100)

    asyncio.run(intruder())
    subnet.later(TEMPO)
    assert subnet.look(max_change=1.0) == {0: Step.STANDS}
    assert subnet.said().count("foreign_weights") == 1
    assert subnet.row() == {ann: 1.0}


_CHILD = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from beacon import install
install()
from test_publication import NETUID, LedgerSubstrate, Publisher, Store, TestBeacon, Chain, load_wallet
folder = Path({folder!r})

async def story():
    wallet = load_wallet("validator", "default", folder / "wallets")
    store = Store(folder / "state" / "store.db")
    async with Chain(NETUID, wallet=wallet, substrate=LedgerSubstrate(folder / "chain.db", TestBeacon())) as chain:
        await chain.head()
        print("ready", flush=True)
        while True:
            await Publisher(chain, store).look()
            await asyncio.sleep(0.05)

asyncio.run(story())
"""


@pytest.mark.parametrize(
    ("moment", "commit_reveal", "mechanism"),
    [("noted", False, 0), ("included", False, 0), ("noted", True, 0), ("included", True, 0), ("included", False, 1)],
)
def test_a_publisher_killed_between_send_and_note_sets_once(make, moment: str, commit_reveal: bool, mechanism: int) -> None:
    """kill -9 as soon as the note is there, or as soon as the chain has the call; blocks are long enough to be in between."""
    subnet = make(block_seconds=0.5, commit_reveal=commit_reveal, mechanisms=2)
    ann = subnet.register("ann")
    subnet.store().close()
    script = _CHILD.format(tests=str(Path(__file__).parent), folder=str(subnet.folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        subnet.decide({mechanism: {ann: 1.0}})
        store = subnet.store()
        ends = time.monotonic() + 60
        while time.monotonic() < ends and not (store.sent(mechanism) if moment == "noted" else subnet.sets()):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    assert [sent.block for sent in store.sent(mechanism)] == [None], "killed between send and note"
    assert store.publications(mechanism) == ()
    step = Step.COMMITTED if commit_reveal else Step.STANDS
    assert subnet.look(until_settled=True) == subnet.look(2) == {mechanism: step}
    assert subnet.sets() == 1
    if commit_reveal:
        assert [sent.block is None for sent in store.sent()] == [False]
        subnet.later(2 * TEMPO)
        subnet.look()
        assert "revealed" in subnet.said()
    assert subnet.row(mechanism) == {ann: 1.0}
    assert store.publications(mechanism)[0][1].by_hotkey == {ann: 1.0}


def test_a_note_older_than_what_the_node_keeps_is_settled(make) -> None:
    """Of a set of another mechanism, killed before its receipt: the row of then is known to no node but an archive."""
    subnet = make(mechanisms=2, block_seconds=0.05)
    ann = subnet.register("ann")
    decided = subnet.decide({1: {ann: 1.0}})
    subnet.store().keep_sent(1, Sent(subnet.ledger.finalized(), decided[1]))
    subnet.send_and_die(decided[1], 1)
    subnet.later(1000)
    with LoopbackNode(subnet.folder / "chain.db", beacon=TestBeacon()) as node:
        node.faults.keeps_states = 256
        assert subnet.look(network=node.url) == {1: Step.STANDS}
    assert subnet.sets() == 1
    assert subnet.store().sent(1) == ()


@pytest.mark.parametrize("commit_reveal", [False, True])
def test_nothing_is_sent_while_a_newer_block_than_the_final_one_shows_a_set_of_ours(make, commit_reveal: bool) -> None:
    """With a note without a block, and the commit already revealed at the head: what is final decides, later."""
    subnet = make(commit_reveal=commit_reveal, finality_lag=200)
    ann = subnet.register("ann")
    subnet.later(TEMPO)
    decided = subnet.decide({0: {ann: 1.0}})
    epoch = asyncio.run(_next_epoch(subnet))
    subnet.later(epoch - 20 - subnet.ledger.head())
    subnet.store().keep_sent(0, Sent(subnet.ledger.finalized(), decided[0]))
    subnet.send_and_die(decided[0])
    subnet.later(epoch + 20 - subnet.ledger.head())
    assert subnet.look(3) == subnet.look() == {0: Step.WAITS}
    subnet.later(200)
    subnet.look(3)
    assert subnet.sets() == 1
    assert (subnet.store().sent(), subnet.row()) == ((), {ann: 1.0})


async def _next_epoch(subnet: Subnet) -> int:
    async with subnet.chain() as chain:
        found = await chain.next_epoch_block()
        assert found is not None
        return found


def test_a_commit_that_only_the_head_shows_as_revealed_is_not_repeated(make) -> None:
    subnet = make(commit_reveal=True, finality_lag=20)
    ann = subnet.register("ann")
    subnet.later(20)
    decided = subnet.decide({0: {ann: 1.0}})
    subnet.store().keep_sent(0, Sent(subnet.ledger.finalized(), decided[0]))
    subnet.send_and_die(decided[0])
    subnet.later(30)
    subnet.later(asyncio.run(_next_epoch(subnet)) + 3 - subnet.ledger.head())
    assert subnet.row() == {ann: 1.0}, "of the head"
    assert subnet.look(2) == subnet.look() == {0: Step.COMMITTED}
    subnet.later(20)
    assert subnet.look() == {0: Step.STANDS}
    assert subnet.said().count("revealed") == 1
    assert subnet.sets() == 1


def test_a_set_that_was_certainly_not_taken_leaves_no_note(make) -> None:
    """Another process with our hotkey was quicker: the newest block has its set, the final one does not."""
    subnet = make(weights_rate_limit=1000, finality_lag=50)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.later(1100)
    subnet.decide({0: {ann: 1.0}})
    subnet.send_and_die(Weights(1, {ben: 1.0}))
    failed = subnet.look()[0]
    assert isinstance(failed, Unavailable)
    assert failed.certain
    assert subnet.store().sent() == ()
    assert subnet.sets() == 1


# --- commit-reveal ----------------------------------------------------------------------------------------------------


def test_committed_weights_are_read_back_after_their_epoch(make) -> None:
    subnet = make(commit_reveal=True)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    decided = subnet.decide({0: {ann: 0.75, ben: 0.25}})
    assert subnet.look(3) == subnet.look(2) == {0: Step.COMMITTED}
    assert subnet.sets() == 1
    assert subnet.row() == {}
    (sent,) = subnet.store().sent()
    assert (sent.weights, sent.block is None, sent.reveals_at is None) == (decided[0], False, False)
    assert "published" not in subnet.said(), "nothing stands yet"
    subnet.later(sent.reveals_at + 2 - subnet.ledger.head())
    subnet.look()
    assert subnet.said().count("revealed") == 1
    assert subnet.store().publications() == ((sent.block, decided[0]),)
    assert subnet.row() == pytest.approx({ann: 0.75, ben: 0.25}, abs=1e-4)


def test_weights_that_the_chain_drops_silently_are_noticed_and_set_again(make) -> None:
    """The owner raises the version key above ours between commit and reveal, and lowers it again."""
    subnet = make()
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 0.5, ben: 0.5}})
    subnet.look()
    subnet.ledger.set_params(commit_reveal=True)
    subnet.later(5)
    subnet.decide({0: {ann: 1.0}})
    assert subnet.look() == {0: Step.COMMITTED}
    (sent,) = subnet.store().sent()
    subnet.ledger.set_params(version_key=1000)
    subnet.later(sent.reveals_at + 2 - subnet.ledger.head())
    subnet.ledger.set_params(version_key=0)
    subnet.later(3)
    assert subnet.row() == {ann: 0.5, ben: 0.5}
    assert subnet.look() == {0: Step.COMMITTED}
    assert subnet.said().count("reveal_dropped") == 1
    assert "foreign_weights" not in subnet.said()
    assert subnet.sets() == 3
    (again,) = subnet.store().sent()
    subnet.later(again.reveals_at + 2 - subnet.ledger.head())
    subnet.look()
    assert subnet.row() == {ann: 1.0}
    assert subnet.said().count("revealed") == 1


def test_of_several_commits_the_newest_that_was_opened_must_stand(make) -> None:
    subnet = make(commit_reveal=True, reveal_epochs=2)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    subnet.decide({0: {ann: 1.0}})
    subnet.look()
    subnet.later(5)
    newest = subnet.decide({0: {ann: 0.5, ben: 0.5}})
    subnet.look()
    assert len(subnet.store().sent()) == 2
    subnet.later(3 * TEMPO)
    subnet.look()
    assert subnet.row() == {ann: 0.5, ben: 0.5}
    assert "reveal_dropped" not in subnet.said()
    assert [weights for _, weights in subnet.store().publications()] == [newest[0]]


# --- mechanisms -------------------------------------------------------------------------------------------------------


def test_each_mechanism_has_its_own_row(make) -> None:
    subnet = make(mechanisms=2)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    decided = subnet.decide({0: {ann: 1.0}, 1: {ben: 1.0}})
    assert subnet.look(3) == subnet.look() == {0: Step.STANDS, 1: Step.STANDS}
    assert (subnet.row(0), subnet.row(1)) == ({ann: 1.0}, {ben: 1.0})
    assert subnet.sets() == 2
    assert [subnet.store().publications(m)[0][1] for m in (0, 1)] == [decided[0], decided[1]]


def test_a_mechanism_that_the_subnet_does_not_have_is_said_and_the_others_are_set(make) -> None:
    subnet = make()
    ann = subnet.register("ann")
    subnet.decide({0: {ann: 1.0}, 1: {ann: 1.0}})
    steps = subnet.look(3)
    assert steps[0] is Step.STANDS
    assert isinstance(steps[1], Rejected)
    assert "mechanism 1" in str(steps[1])
    assert subnet.said().count("not_published") == 1, "it is left alone for a while"
    assert subnet.row() == {ann: 1.0}


def test_every_mechanisms_failure_is_told_and_tried_again_after_its_own_pause(make) -> None:
    """Mechanisms 1 and 2 fail, each in its own way; 0 is set on time all the while."""
    subnet = make(mechanisms=2)
    ann = subnet.register("ann")
    store = subnet.store()

    async def story() -> None:
        async with subnet.chain() as chain:
            publisher = Publisher(chain, store, pause_s=0.05)
            for turn in range(3):
                subnet.decide({0: {ann: 1.0}, 1: {"nobody": 1.0}, 2: {ann: 1.0}})
                steps = await publisher.look()
                assert steps[0] is Step.STANDS
                assert [type(steps[m]) for m in (1, 2)] == [Rejected, Rejected]
                assert subnet.said().count("not_published") == 2 * turn + 2, "a new round is tried at once"
                assert await publisher.look() == steps
                subnet.later(5)
            ends = time.monotonic() + 20
            while subnet.said().count("not_published") < 10 and time.monotonic() < ends:
                await publisher.look()
            assert subnet.said().count("not_published") == 10, "again and again, with longer pauses"

    asyncio.run(story())
    store.close()
    told = [event["fields"]["mechanism"] for event in subnet.events if event["event"] == "not_published"]
    assert (told.count(1), told.count(2)) == (5, 5)
    assert subnet.sets() == 3


def test_a_killed_set_of_another_mechanism_is_found(make) -> None:
    subnet = make(mechanisms=2)
    ann, ben = subnet.register("ann"), subnet.register("ben")
    decided = subnet.decide({0: {ann: 1.0}, 1: {ben: 1.0}})
    subnet.store().keep_sent(1, Sent(subnet.ledger.finalized(), decided[1]))

    async def story() -> None:
        async with subnet.chain() as chain:
            await chain.set_weights(decided[1], version_key=100, mechid=1)

    asyncio.run(story())
    assert subnet.look(2) == {0: Step.STANDS, 1: Step.STANDS}
    assert subnet.sets() == 2, "one of each"
    assert subnet.store().sent(1) == ()
