"""The embedded chain: its clock, its history, its signatures, and what survives a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import beacon
import bittensor as bt
import bittensor_core
import pytest
from bittensor.keyfiles import Keypair

from sn29.errors import Reason, Rejected
from sn29.localnet.ledger import Call, Included, InvalidTransaction, Ledger, LedgerSubstrate

NETUID = 29
DAY = 86_400
"""Block time of a chain that stands still during a test: only `advance` moves it."""
ALICE, BOB, CAROL = (Keypair.create_from_uri(f"//{name}") for name in ("Alice", "Bob", "Carol"))


def still_chain(path: Path, **params: Any) -> Ledger:
    return Ledger.create(path, netuid=NETUID, block_seconds=DAY, seed=1, **params)


def commitment(data: bytes) -> Call:
    fields = [{f"Raw{len(data)}": "0x" + data.hex()}]
    return Call("Commitments", "set_commitment", {"netuid": NETUID, "info": {"fields": fields}})


def weights(dests: list[int], values: list[int], version_key: int = 0, mecid: int = 0) -> Call:
    row = {"netuid": NETUID, "mecid": mecid, "dests": dests, "weights": values, "version_key": version_key}
    return Call("SubtensorModule", "set_mechanism_weights", row)


LONG_AGO = 1000
"""A beacon round whose signature every block of a new chain has."""


def sealed_call(commit: bytes, reveal_round: int = LONG_AGO, mecid: int = 0, version: int = 4) -> Call:
    about = {"commit": "0x" + commit.hex(), "reveal_round": reveal_round, "commit_reveal_version": version}
    return Call("SubtensorModule", "commit_timelocked_mechanism_weights", {"netuid": NETUID, "mecid": mecid} | about)


def sealed(key: Keypair, row: dict[int, int], reveal_round: int = LONG_AGO, *, version_key: int = 0, mecid: int = 0) -> Call:
    """What the SDK's core makes of a row, for a round of our choice."""

    def vector(values: list[int]) -> bytes:
        return bytes([len(values) * 4]) + b"".join(value.to_bytes(2, "little") for value in values)

    payload = bytes([32 * 4]) + bytes(key.public_key) + vector(list(row)) + vector(list(row.values()))
    envelope, _ = bittensor_core.encrypt_at_round(payload + version_key.to_bytes(8, "little"), reveal_round)
    return sealed_call(bytes(bittensor_core.inner_ciphertext(envelope)), reveal_round, mecid)


def sealed_chain(path: Path, missing: frozenset[int] = frozenset(), **params: Any) -> Ledger:
    """Epochs of 10 blocks, sealed weights, ALICE (a validator), BOB and CAROL registered at block 1, the head."""
    settings = {"tempo": 10, "weights_rate_limit": 0, "commit_reveal": True} | params
    ledger = still_chain(path, beacon=beacon.TestBeacon(missing), **settings)
    for key in (ALICE, BOB, CAROL):
        ledger.register(key.ss58_address, CAROL.ss58_address, stake=1, permit=key is ALICE)
    ledger.advance(1)
    return ledger


def row_of(ledger: Ledger, block: int | None = None, index: int = NETUID) -> dict[int, int]:
    row = stored(ledger, ledger.head() if block is None else block, "SubtensorModule.Weights", index, 0)
    return dict(row)


def advance_to(ledger: Ledger, block: int) -> None:
    ledger.advance(block - ledger.head())


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


def test_every_mechanism_has_its_own_row_and_update(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", commit_reveal=False, weights_rate_limit=5, mechanisms=2)
    ledger.advance(4)
    assert send(ledger, ALICE, weights([1], [1])) is None
    assert send(ledger, ALICE, weights([2], [1], mecid=1)) is None
    assert [row_of(ledger), row_of(ledger, index=4096 + NETUID)] == [{1: 65535}, {2: 65535}]
    assert stored(ledger, 7, "SubtensorModule.LastUpdate", NETUID) == [6, 1, 1]
    assert stored(ledger, 7, "SubtensorModule.LastUpdate", 4096 + NETUID) == [7, 1, 1]
    assert send(ledger, ALICE, weights([1], [1], mecid=1)) == "SettingWeightsTooFast"
    assert send(ledger, ALICE, weights([1], [1], mecid=2)) == "MechanismDoesNotExist"


def test_sealed_weights_are_hidden_until_the_epoch_of_their_reveal(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", mechanisms=2, reveal_epochs=2)
    assert send(ledger, ALICE, sealed(ALICE, {1: 3, 2: 1})) is None
    assert send(ledger, ALICE, sealed(ALICE, {2: 9}, mecid=1)) is None
    assert stored(ledger, 3, "SubtensorModule.LastUpdate", NETUID) == [2, 1, 1]
    ((_, pending),) = ledger.read(19, lambda state: state.items("SubtensorModule.TimelockedWeightCommits", NETUID))
    assert [(hotkey, block, at) for hotkey, block, _, at in pending] == [(ALICE.ss58_address, 2, LONG_AGO)]
    ledger.advance(200)
    assert [row_of(ledger, block) for block in (19, 20)] == [{}, {1: 65535, 2: 21845}]
    assert [row_of(ledger, block, 4096 + NETUID) for block in (19, 20)] == [{}, {2: 65535}]
    assert stored(ledger, 203, "SubtensorModule.LastUpdate", NETUID) == [2, 1, 1]  # moved by the commit, not by the reveal
    assert ledger.read(20, lambda state: state.items("SubtensorModule.TimelockedWeightCommits")) == []


def test_the_last_of_several_sealed_rows_stands_and_at_most_ten_wait(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", tempo=20)
    calls = [sealed(ALICE, {1: 1, 2: count}) for count in range(11)]
    assert [send(ledger, ALICE, call) for call in calls] == [None] * 10 + ["TooManyUnrevealedCommits"]
    advance_to(ledger, 20)
    assert row_of(ledger) == {1: 7282, 2: 65535}
    assert send(ledger, ALICE, calls[10]) is None


def test_the_round_s_time_decides_where_in_the_reveal_epoch_a_row_is_opened(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain")
    rounds = [bt.timelock.round_at(ledger.timestamp_ms(block) / 1000) for block in (13, 20)]
    assert send(ledger, ALICE, sealed(ALICE, {1: 1}, rounds[0])) is None
    assert send(ledger, BOB, sealed(BOB, {1: 1}, rounds[1])) is None  # due one epoch later than its own reveal
    advance_to(ledger, 50)
    shown = [block for block in range(51) if row_of(ledger, block)]
    assert shown[0] in (13, 14)  # a round's time is whole seconds, a block's is not
    assert stored(ledger, 50, "SubtensorModule.Weights", NETUID, 1) == []
    assert len(ledger.read(19, lambda state: state.items("SubtensorModule.TimelockedWeightCommits", NETUID))) == 1
    assert ledger.read(20, lambda state: state.items("SubtensorModule.TimelockedWeightCommits", NETUID)) == []


@pytest.mark.parametrize(
    ("call", "before_the_reveal"),
    [
        (sealed(ALICE, {1: 1, 2: 1}, version_key=4), {"version_key": 5}),
        (sealed(ALICE, {1: 1}), {"min_weights": 2}),
        (sealed(ALICE, {1: 9, 2: 1}), {"max_weight": 40000}),
        (sealed(ALICE, {1: 1, 2: 1}), {"stake_threshold": 10**12}),
        (sealed(ALICE, {1: 1, 2: 1}), {"permit": False}),
        (sealed(ALICE, {1: 1, 7: 1}), {}),
        (sealed(BOB, {1: 1, 2: 1}), {}),  # another's row, copied
        (sealed(ALICE, {1: 1, 2: 1}, 4242), {}),  # a round that was never published
        (sealed_call(bytes.fromhex(sealed(ALICE, {1: 1}).params["commit"][2:]), LONG_AGO + 1), {}),
        (sealed_call(b"not a ciphertext"), {}),
    ],
)  # fmt: skip
def test_a_sealed_row_that_fails_the_checks_is_dropped_without_a_word(
    tmp_path: Path, call: Call, before_the_reveal: dict[str, Any]
) -> None:
    ledger = sealed_chain(tmp_path / "chain", frozenset({4242}))
    assert send(ledger, ALICE, call) is None
    if "permit" in before_the_reveal:
        ledger.register(ALICE.ss58_address, CAROL.ss58_address, stake=1, permit=False)
    else:
        ledger.set_params(**before_the_reveal)
    advance_to(ledger, 25)
    assert row_of(ledger) == {}
    assert stored(ledger, 25, "SubtensorModule.LastUpdate", NETUID)[0] == 2
    advance_to(ledger, 30)
    assert ledger.read(30, lambda state: state.items("SubtensorModule.TimelockedWeightCommits")) == []


def test_commits_are_checked_when_they_are_made(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", weights_rate_limit=5)
    assert send(ledger, ALICE, sealed_call(b"early")) == "CommittingWeightsTooFast"
    advance_to(ledger, 5)
    assert send(ledger, ALICE, weights([1], [1])) == "CommitRevealEnabled"
    assert send(ledger, ALICE, sealed_call(b"old", version=3)) == "IncorrectCommitRevealVersion"
    assert send(ledger, ALICE, sealed_call(b"elsewhere", mecid=1)) == "MechanismDoesNotExist"
    assert send(ledger, Keypair.create_from_uri("//Dave"), sealed_call(b"who")) == "HotKeyNotRegisteredInSubNet"
    assert send(ledger, ALICE, sealed_call(b"good")) is None
    assert send(ledger, ALICE, sealed_call(b"again")) == "CommittingWeightsTooFast"
    ledger.set_params(commit_reveal=False)
    assert send(ledger, BOB, sealed_call(b"late")) == "CommitRevealDisabled"


def test_a_sealed_row_outlives_a_change_of_hands_but_is_older_than_it(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", max_uids=3)
    assert send(ledger, ALICE, sealed(ALICE, {1: 1, 2: 1})) is None
    assert ledger.register(Keypair.create_from_uri("//Dave").ss58_address, CAROL.ss58_address) == 1
    advance_to(ledger, 10)
    # The chain stores the row as sealed; whoever reads it goes by these two blocks, as its own epochs do.
    assert row_of(ledger) == {1: 65535, 2: 65535}
    assert stored(ledger, 10, "SubtensorModule.LastUpdate", NETUID)[0] == 2
    assert stored(ledger, 10, "SubtensorModule.BlockAtRegistration", NETUID, 1) == 3


def test_a_validator_that_left_before_the_reveal_has_no_row(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", max_uids=3)
    assert send(ledger, BOB, sealed(BOB, {1: 1})) is None
    assert ledger.register(Keypair.create_from_uri("//Dave").ss58_address, CAROL.ss58_address) == 1
    advance_to(ledger, 10)
    assert stored(ledger, 10, "SubtensorModule.Weights", NETUID, 1) == []


def test_one_jump_and_many_looks_make_the_same_chain(tmp_path: Path) -> None:
    chains = [sealed_chain(tmp_path / name, mechanisms=2) for name in ("jump", "steps")]
    for ledger in chains:
        for mecid in (0, 1):
            assert send(ledger, ALICE, sealed(ALICE, {1: 1 + mecid, 2: 1}, mecid=mecid)) is None
    chains[0].advance(100_000)
    for block in range(4, 31):
        advance_to(chains[1], block)
        for index in (NETUID, 4096 + NETUID):
            assert row_of(chains[0], block, index) == row_of(chains[1], block, index)
        for item in ("SubnetEpochIndex", "LastEpochBlock", "BlocksSinceLastStep", "PendingEpochAt", "LastUpdate"):
            assert stored(chains[0], block, f"SubtensorModule.{item}", NETUID) == stored(
                chains[1], block, f"SubtensorModule.{item}", NETUID
            )
    assert stored(chains[0], 100_003, "SubtensorModule.SubnetEpochIndex", NETUID) == 10_000


def test_commit_reveal_needs_a_beacon(tmp_path: Path) -> None:
    for turn_on in (
        lambda: still_chain(tmp_path / "a", commit_reveal=True),
        lambda: still_chain(tmp_path / "b").set_params(commit_reveal=True),
    ):
        with pytest.raises(Rejected, match="no drand here"):
            turn_on()
    ledger = sealed_chain(tmp_path / "chain")
    assert send(ledger, ALICE, sealed(ALICE, {1: 1})) is None
    blind = Ledger.open(tmp_path / "chain")
    assert blind.head() == 2
    with pytest.raises(Rejected, match="opened with the beacon"):
        blind.advance(10)
    assert ledger.head() == 2  # what could not be done was not done by halves
    advance_to(ledger, 10)
    assert row_of(ledger) == {1: 65535}
    assert blind.head() == 10


def test_an_epoch_can_be_triggered_by_the_owner(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain", tempo=100)
    ledger.trigger_epoch(4)
    ledger.advance(20)
    blocks = [stored(ledger, block, "SubtensorModule.LastEpochBlock", NETUID) for block in (4, 5, 20)]
    assert blocks == [0, 5, 5]
    assert [stored(ledger, block, "SubtensorModule.PendingEpochAt", NETUID) for block in (0, 1, 4, 5)] == [0, 5, 5, 0]
    with pytest.raises(Rejected, match="AutoEpochAlreadyImminent"):
        ledger.trigger_epoch(99)


def test_a_front_that_checks_signatures_itself_is_held_to_the_same_nonces(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain")
    ledger.register(ALICE.ss58_address, CAROL.ss58_address)
    call = commitment(b"from the node")
    assert ledger.include(call, ALICE.ss58_address, 0).position == 1
    assert ledger.include(weights([1, 2], [1, 1]), ALICE.ss58_address, 1).error == "UidsLengthExceedUidsInSubNet"
    for nonce, name in ((1, "Stale"), (3, "Future")):
        with pytest.raises(InvalidTransaction, match=name):
            ledger.include(call, ALICE.ss58_address, nonce)
    with pytest.raises(NotImplementedError, match=r"call Balances\.burn"):
        ledger.include(Call("Balances", "burn", {}), ALICE.ss58_address, 2)
    ledger.advance(1)
    first, second = ledger.extrinsics(1)
    assert first == Included(1, ALICE.ss58_address, 0, call, None)
    assert (second.position, second.nonce, second.error) == (2, 1, "UidsLengthExceedUidsInSubNet")
    assert ledger.extrinsics(2) == ()


def test_a_fork_undoes_the_newest_blocks_and_keeps_the_rest(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain", finality_lag=3)
    ledger.register(ALICE.ss58_address, CAROL.ss58_address)
    ledger.advance(1)
    assert send(ledger, ALICE, commitment(b"final")) is None
    ledger.advance(3)
    assert send(ledger, ALICE, commitment(b"replaced")) is None
    ledger.register(BOB.ss58_address, CAROL.ss58_address)
    assert (ledger.head(), ledger.finalized()) == (6, 3)
    before = [ledger.hash_of(block) for block in range(7)]
    (undone,) = ledger.fork(2)
    assert (undone.call, undone.nonce) == (commitment(b"replaced"), 1)
    after = [ledger.hash_of(block) for block in range(7)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True] * 5 + [False] * 2
    assert ledger.head() == 6
    assert [ledger.number_of(block_hash) for block_hash in before[4:]] == [4, None, None]
    assert ledger.number_of(after[6]) == 6
    now = stored(ledger, 6, "Commitments.CommitmentOf", NETUID, ALICE.ss58_address)
    assert now["block"] == 2
    assert stored(ledger, 6, "SubtensorModule.Uids", NETUID, BOB.ss58_address) is None
    assert ledger.next_nonce(ALICE.ss58_address) == 1
    assert ledger.extrinsics(6) == ()
    ledger.fork(1)
    assert ledger.hash_of(6) not in (before[6], after[6])
    for depth in (0, 4):
        with pytest.raises(Rejected, match="not final"):
            ledger.fork(depth)


def test_a_fork_over_a_reveal_does_it_again(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", finality_lag=4)
    assert send(ledger, ALICE, sealed(ALICE, {1: 1})) is None
    advance_to(ledger, 11)
    assert row_of(ledger) == {1: 65535}
    ledger.fork(3)
    assert [row_of(ledger, block) for block in (9, 10)] == [{}, {1: 65535}]


def test_files_are_checked(tmp_path: Path) -> None:
    still_chain(tmp_path / "chain")
    (tmp_path / "text").write_text("not a chain, and longer than the hundred bytes of an SQLite header" * 9)
    old = still_chain(tmp_path / "old")
    old._db.execute("DELETE FROM chain WHERE name = 'settled'")  # as the version before this one made it
    for make in (
        lambda: Ledger.open(tmp_path / "old"),
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


def test_the_sdk_sets_weights_plain_and_sealed_and_follows_the_epochs(tmp_path: Path) -> None:
    ledger = sealed_chain(tmp_path / "chain", mechanisms=2, finality_lag=0)
    wallet = SimpleNamespace(hotkey=ALICE, hotkeypub=ALICE, coldkey=CAROL, coldkeypub=CAROL)

    async def write(client: Any, mechid: int, row: dict[int, float]) -> Any:
        intent = bt.SetWeights(netuid=NETUID, weights=row, mechid=mechid)
        # What was sent is in the next block, which a chain that stands still never makes.
        return await client.execute(intent, wallet, wait_for_inclusion=False, wait_for_finalization=False)

    async def use() -> None:
        async with bt.Client("local", substrate=LedgerSubstrate(tmp_path / "chain", beacon.TestBeacon())) as client:
            for mechid in (0, 1):
                result = await write(client, mechid, {1: 1.0, 2: 0.5})
                assert result.success
                assert result.data["reveal_round"] > bt.timelock.current_round()
            ledger.advance(1)
            ((epoch, (pending,)),) = (await client.weights.timelocked_weight_commits(NETUID, mechid=1)).items()
            assert (epoch, pending["hotkey"], pending["commit_block"]) == (0, ALICE.ss58_address, 2)
            status = await client.epochs.epoch_status(netuid=NETUID)
            assert (status["epoch_index"], status["blocks_since_last_step"], status["next_epoch_start_block"]) == (0, 2, 10)
            assert await client.epochs.blocks_since_last_update(netuid=NETUID, uid=0) == 0
            assert await client.weights.weights(NETUID) == {}
            advance_to(ledger, 14)  # the SDK picks a round some blocks into the reveal epoch
            assert await client.weights.weights(NETUID) != await client.weights.weights(NETUID, block=10) == {}
            for mechid in (0, 1):
                assert (await client.weights.weights(NETUID, mechid=mechid))[0] == pytest.approx({1: 2 / 3, 2: 1 / 3}, abs=1e-4)
            assert (await client.epochs.epoch_status(netuid=NETUID))["last_epoch_block"] == 10
            assert await client.weights.timelocked_weight_commits(NETUID) == {}
            settings = await client.read("subnet_hyperparameters", netuid=NETUID)
            assert (settings["tempo"], settings["commit_reveal_weights_enabled"]) == (10, True)
            ledger.set_params(commit_reveal=False)
            ledger.advance(1)
            assert (await write(client, 1, {2: 1.0})).success
            ledger.advance(1)
            assert await client.weights.weights(NETUID, mechid=1) == {0: {2: 1.0}}
            assert [neuron.last_update for neuron in await client.read("neurons", netuid=NETUID)] == [2, 1, 1]
            assert [subnet.neuron_count for subnet in await client.read("subnets")] == [3]
            assert await client.read("mechanism_count", netuid=NETUID) == 2

    asyncio.run(use())


def test_commitments_of_every_shape_are_stored_and_charged(tmp_path: Path) -> None:
    ledger = still_chain(tmp_path / "chain")
    ledger.register(ALICE.ss58_address, CAROL.ss58_address)
    ledger.advance(1)
    shapes: list[list[Any]] = [
        [{"Raw5": b"first"}, {"Raw6": b"second"}, {"Sha256": b"\x01" * 32}],
        [{"BigRaw": b"b" * 512}],
        [{"TimelockEncrypted": {"encrypted": b"x" * 200, "reveal_round": 5}}, "ResetBondsFlag"],
        [{"Raw1": b"a"}] * 4,
    ]

    async def use() -> list[Any]:
        async with bt.Client("local", substrate=LedgerSubstrate(tmp_path / "chain")) as client:
            seen = []
            for fields in shapes:
                info = {"fields": fields}
                call = await client.compose(("Commitments", "set_commitment", {"netuid": NETUID, "info": info}))
                error = send(ledger, ALICE, call)
                found = (await client.subnets.commitments(NETUID))[ALICE.ss58_address]
                used = stored(ledger, ledger.head(), "Commitments.UsedSpaceOf", NETUID, ALICE.ss58_address)["used_space"]
                seen.append((error, found.data[:12], len(found.fields), used))
            with pytest.raises(ValueError, match="BigRaw cannot hold 513"):
                await client.compose(("Commitments", "set_commitment", {"info": {"fields": [{"BigRaw": bytes(513)}]}}))
            return seen

    assert asyncio.run(use()) == [
        (None, "firstsecond\n", 3, 100),
        (None, "bigraw:0x626", 1, 612),
        (None, "", 2, 812),
        ("TooManyFieldsInCommitmentInfo", "", 2, 812),
    ]
