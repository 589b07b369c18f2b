"""The embedded chain: its clock, its history, its signatures, and what survives a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from bittensor.keyfiles import Keypair

from sn29.errors import Reason, Rejected
from sn29.localnet.ledger import Call, InvalidTransaction, Ledger, LedgerSubstrate

NETUID = 29
DAY = 86_400
"""Block time of a chain that stands still during a test: only `advance` moves it."""
ALICE, BOB, CAROL = (Keypair.create_from_uri(f"//{name}") for name in ("Alice", "Bob", "Carol"))


def still_chain(path: Path, **params: Any) -> Ledger:
    return Ledger.create(path, netuid=NETUID, block_seconds=DAY, seed=1, **params)


def commitment(data: bytes) -> Call:
    fields = [{f"Raw{len(data)}": "0x" + data.hex()}]
    return Call("Commitments", "set_commitment", {"netuid": NETUID, "info": {"fields": fields}})


def weights(dests: list[int], values: list[int], version_key: int = 0) -> Call:
    row = {"netuid": NETUID, "mecid": 0, "dests": dests, "weights": values, "version_key": version_key}
    return Call("SubtensorModule", "set_mechanism_weights", row)


def send(ledger: Ledger, key: Keypair, call: Call) -> str | None:
    """Signs and submits, and makes the block; the chain's error, if any."""
    nonce = ledger.next_nonce(key.ss58_address)
    included = ledger.submit(call, key.ss58_address, nonce, key.sign(ledger.payload(call, nonce)))
    ledger.advance(1)
    return included.error


def stored(ledger: Ledger, block: int, item: str, *key: Any) -> Any:
    return ledger.read(block, lambda state: state.get(item, *key))


def test_block_hashes_are_fixed_by_the_seed_and_unknown_without(tmp_path: Path) -> None:
    seeded = [Ledger.create(tmp_path / name, netuid=NETUID, seed=7) for name in "ab"]
    free = [Ledger.create(tmp_path / name, netuid=NETUID) for name in "cd"]
    assert seeded[0].hash_of(5) == seeded[1].hash_of(5) != seeded[0].hash_of(6)
    assert free[0].hash_of(5) != free[1].hash_of(5)
    assert len(seeded[0].hash_of(5)) == 66


def test_a_hash_gives_its_block_once_the_block_is_there(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain")
    assert ledger.number_of(ledger.hash_of(3)) is None
    ledger.advance(3)
    assert ledger.number_of(ledger.hash_of(3)) == 3
    assert ledger.number_of("0x" + "12" * 32) is None


def test_the_clock_moves_blocks_and_the_final_one_lags(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "chain", netuid=NETUID, block_seconds=0.01, finality_lag=3)
    asyncio.run(asyncio.sleep(0.1))
    first = ledger.head()
    assert first >= 10
    assert ledger.finalized() >= first - 3
    assert ledger.advance(1000) >= first + 1000


def test_what_is_written_is_in_the_next_block_and_history_stays(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain")
    uid = ledger.register(ALICE.ss58_address, CAROL.ss58_address)
    assert stored(ledger, ledger.head(), "SubtensorModule.Uids", NETUID, ALICE.ss58_address) is None
    ledger.advance(1)
    assert send(ledger, ALICE, commitment(b"one")) is None
    ledger.advance(5)
    assert send(ledger, ALICE, commitment(b"two!")) is None
    key = ("Commitments.CommitmentOf", NETUID, ALICE.ss58_address)
    assert uid == 0
    assert stored(ledger, 1, *key) is None
    assert stored(ledger, 7, *key) == {"block": 2, "deposit": 0, "info": {"fields": [{"Raw3": "0x6f6e65"}]}}
    assert stored(ledger, 8, *key)["block"] == 8


def test_a_wrong_signature_is_refused_without_a_trace(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain")
    ledger.register(ALICE.ss58_address, CAROL.ss58_address)
    call = commitment(b"mine")
    payload = ledger.payload(call, 0)
    for signature in (BOB.sign(payload), ALICE.sign(ledger.payload(call, 1)), ALICE.sign(payload)[::-1]):
        with pytest.raises(InvalidTransaction, match="BadProof"):
            ledger.submit(call, ALICE.ss58_address, 0, signature)
    ledger.advance(1)
    assert stored(ledger, ledger.head(), "Commitments.CommitmentOf", NETUID, ALICE.ss58_address) is None
    assert ledger.next_nonce(ALICE.ss58_address) == 0


def test_a_signed_call_counts_once_and_on_its_own_chain(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain")
    other = Ledger.create(tmp_path / "other", netuid=NETUID, block_seconds=DAY)
    for chain in (ledger, other):
        chain.register(ALICE.ss58_address, CAROL.ss58_address)
    call = commitment(b"mine")
    signature = ALICE.sign(ledger.payload(call, 0))
    assert ledger.submit(call, ALICE.ss58_address, 0, signature).error is None
    with pytest.raises(InvalidTransaction, match="Stale"):
        ledger.submit(call, ALICE.ss58_address, 0, signature)
    with pytest.raises(InvalidTransaction, match="Future"):
        ledger.submit(call, ALICE.ss58_address, 9, ALICE.sign(ledger.payload(call, 9)))
    with pytest.raises(InvalidTransaction, match="BadProof"):
        other.submit(call, ALICE.ss58_address, 0, signature)


def test_an_epoch_has_room_for_31_small_commitments(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain", tempo=100)
    ledger.register(ALICE.ss58_address, CAROL.ss58_address)
    ledger.register(BOB.ss58_address, CAROL.ss58_address)
    assert [send(ledger, ALICE, commitment(b"x" * 7)) for _ in range(32)] == [None] * 31 + ["SpaceLimitExceeded"]
    assert [send(ledger, BOB, commitment(b"x" * 128)) for _ in range(25)] == [None] * 24 + ["SpaceLimitExceeded"]
    ledger.advance(100 - ledger.head() % 100)
    assert send(ledger, ALICE, commitment(b"x" * 7)) is None


def test_a_row_is_upscaled_so_that_its_largest_weight_is_65535(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain", weights_rate_limit=0)
    for key in (ALICE, BOB, CAROL):
        ledger.register(key.ss58_address, CAROL.ss58_address, permit=key is ALICE)
    ledger.advance(1)
    assert send(ledger, ALICE, weights([1, 2], [3, 1])) is None
    assert stored(ledger, 2, "SubtensorModule.Weights", NETUID, 0) == [[1, 65535], [2, 21845]]
    assert stored(ledger, 2, "SubtensorModule.LastUpdate", NETUID) == [2, 1, 1]
    assert stored(ledger, 1, "SubtensorModule.LastUpdate", NETUID) == [1, 1, 1]


@pytest.mark.parametrize(
    ("sender", "call", "error"),
    [
        (ALICE, weights([1], [1, 2]), "WeightVecNotEqualSize"),
        (ALICE, weights([1, 2, 0, 3], [1, 1, 1, 1]), "UidsLengthExceedUidsInSubNet"),
        (Keypair.create_from_uri("//Dave"), weights([1], [1]), "HotKeyNotRegisteredInSubNet"),
        (ALICE, weights([1, 2], [1, 1], version_key=4), "IncorrectWeightVersionKey"),
        (BOB, weights([0, 2], [1, 1], version_key=5), "NeuronNoValidatorPermit"),
        (BOB, weights([1], [1], version_key=5), None),
        (ALICE, weights([1, 1], [1, 1], version_key=5), "DuplicateUids"),
        (ALICE, weights([1, 7], [1, 1], version_key=5), "UidVecContainInvalidOne"),
        (ALICE, weights([1], [1], version_key=5), "WeightVecLengthIsLow"),
        (ALICE, weights([1, 2], [9, 1], version_key=5), "MaxWeightExceeded"),
        (ALICE, weights([1, 2], [4, 1], version_key=5), None),
    ],
)
def test_weights_must_pass_the_chain_s_checks(tmp_path: Path, sender: Keypair, call: Call, error: str | None) -> None:
    ledger = still_chain(tmp_path / "chain", weights_rate_limit=0, version_key=5, min_weights=2, max_weight=int(0.85 * 65535))
    for key in (ALICE, BOB, CAROL):
        ledger.register(key.ss58_address, CAROL.ss58_address, permit=key is ALICE)
    assert send(ledger, sender, call) == error


def test_a_full_subnet_gives_a_uid_to_the_newcomer(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain", max_uids=2)
    ledger.register(ALICE.ss58_address, CAROL.ss58_address, permit=True)
    ledger.register(BOB.ss58_address, CAROL.ss58_address)
    ledger.advance(1)
    send(ledger, BOB, commitment(b"bob was here"))
    assert ledger.register(CAROL.ss58_address, CAROL.ss58_address) == 1
    ledger.advance(1)
    now = ledger.head()
    assert stored(ledger, now, "SubtensorModule.Uids", NETUID, BOB.ss58_address) is None
    assert stored(ledger, now, "SubtensorModule.Keys", NETUID, 1) == CAROL.ss58_address
    assert stored(ledger, now, "Commitments.CommitmentOf", NETUID, BOB.ss58_address)["block"] == 2
    assert stored(ledger, now - 1, "SubtensorModule.Keys", NETUID, 1) == BOB.ss58_address
    assert send(ledger, BOB, commitment(b"and gone")) == "AccountNotAllowedCommit"


def test_files_are_checked(tmp_path: Path) -> None:
    still_chain(tmp_path / "chain")
    (tmp_path / "text").write_text("not a chain, and longer than the hundred bytes of an SQLite header" * 9)
    for make in (
        lambda: still_chain(tmp_path / "chain"),
        lambda: Ledger.open(tmp_path / "missing"),
        lambda: Ledger.open(tmp_path / "text"),
        lambda: still_chain(tmp_path / "new", colour=3),
    ):
        with pytest.raises(Rejected) as refusal:
            make()
        assert refusal.value.reason is Reason.SETTING


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    still_chain(path)
    script = f"""
import os, signal
from pathlib import Path
from sn29.localnet.ledger import Ledger
ledger = Ledger.open(Path({str(path)!r}))
ledger.register({ALICE.ss58_address!r}, {BOB.ss58_address!r}, stake=12.5, permit=True)
ledger.advance(4)
ledger._db.execute("BEGIN IMMEDIATE")
ledger._db.execute("UPDATE chain SET value = 99 WHERE name = 'head'")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    assert done.returncode == -signal.SIGKILL
    again = Ledger.open(path)
    assert again.head() == 4  # the killed transaction left nothing, the finished ones everything
    assert stored(again, 4, "SubtensorModule.TotalHotkeyAlpha", ALICE.ss58_address, NETUID) == 12_500_000_000
    assert stored(again, 4, "SubtensorModule.ValidatorPermit", NETUID) == [True]
    assert again.hash_of(4) == Ledger.create(tmp_path / "twin", netuid=NETUID, seed=1).hash_of(4)


def test_what_the_ledger_does_not_know_is_named(tmp_path: Path) -> None:
    still_chain(tmp_path / "chain").advance(5)

    async def ask() -> None:
        substrate = LedgerSubstrate(tmp_path / "chain")
        with pytest.raises(bt.ConnectionNotReady):
            await substrate.block_number()
        async with bt.Client("local", substrate=substrate) as client:
            with pytest.raises(NotImplementedError, match=r"storage SubtensorModule\.Bonds"):
                await client.query(bt.storage.SubtensorModule.Bonds, [NETUID, 0])
            with pytest.raises(NotImplementedError, match=r"storage SubtensorModule\.Bonds"):
                await client.query_map(bt.storage.SubtensorModule.Bonds, [NETUID])
            with pytest.raises(NotImplementedError, match=r"runtime call DelegateInfoRuntimeApi\.get_delegates"):
                await client.runtime(("DelegateInfoRuntimeApi", "get_delegates"), [])
            with pytest.raises(NotImplementedError, match=r"constant Balances\.ExistentialDeposit"):
                await client.constant(("Balances", "ExistentialDeposit"))
            with pytest.raises(NotImplementedError, match=r"call Balances\.transfer_all"):
                await client.compose(("Balances", "transfer_all", {}))
            with pytest.raises(ValueError, match="Raw3"):
                await client.compose(("Commitments", "set_commitment", {"info": {"fields": [{"Raw3": b"four"}]}}))
            with pytest.raises(bt.ChainError, match="no block at height 9"):
                await client.query(bt.storage.SubtensorModule.Tempo, [NETUID], block=9)

    asyncio.run(ask())


def test_the_sdk_s_own_reads_work(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain", tempo=50)
    ledger.register(ALICE.ss58_address, CAROL.ss58_address, stake=3)
    ledger.advance(1)
    send(ledger, ALICE, commitment(b"hello"))

    async def ask() -> None:
        async with bt.Client("local", substrate=LedgerSubstrate(tmp_path / "chain")) as client:
            assert await client.neurons.uid(ALICE.ss58_address, NETUID) == 0
            assert (await client.read("commitment", netuid=NETUID, hotkey_ss58=ALICE.ss58_address)).data == "hello"
            graph = await client.subnets.metagraph(NETUID)
            assert graph.neurons[0].commitment.block == 2
            assert graph.neurons[0].total_stake.amount == 3
            assert await client.subnets.metagraph(30) is None
            assert (await client.timestamp(2) - await client.timestamp(1)).total_seconds() == DAY
            assert await client.block_time() == DAY
            assert await client.query(("System", "Number"), block=1) == 1

    asyncio.run(ask())
