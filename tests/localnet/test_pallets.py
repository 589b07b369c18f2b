"""The chain's rules by themselves: where epochs begin, and what a sealed row is."""

from __future__ import annotations

import random
from typing import Any

import bittensor_core
import pytest

from sn29.localnet.pallets import (
    ITEMS,
    DispatchError,
    Key,
    Row,
    create_subnet,
    decode_row,
    epoch_of,
    first_block_of,
    get_next_epoch_start_block,
    register,
    set_param,
    storage_index,
    trigger_epoch,
)

NETUID = 29
ALICE = bittensor_core.ss58_encode(bytes(range(32)))


class Memory:
    """`State` at its newest block only."""

    def __init__(self) -> None:
        self.block = 0
        self._stored: dict[tuple[Any, ...], Any] = {}

    def get(self, item: str, *key: Key) -> Any:
        value = self._stored.get((item, *key))
        return ITEMS[item] if value is None else value

    def items(self, item: str, *prefix: Key) -> list[tuple[tuple[Key, ...], Any]]:
        start = (item, *prefix)
        return [(key[1:], value) for key, value in self._stored.items() if key[: len(start)] == start and value is not None]

    def put(self, item: str, key: tuple[Key, ...], value: Any) -> None:
        self._stored[(item, *key)] = value


class Scheduler:
    """The same schedule as subtensor keeps it: four counters, and a look at them in every block."""

    def __init__(self, tempo: int) -> None:
        self.tempo, self.block = tempo, 0
        self.last = self.index = self.since_step = self.pending = 0

    def step(self) -> None:
        self.block += 1
        self.since_step = min(self.since_step + 1, self.tempo + 1)
        due = (0 < self.pending <= self.block) or self.since_step > self.tempo or self.block - self.last >= self.tempo
        if self.tempo and due:
            self.last, self.pending, self.since_step = self.block, 0, 0
            self.index += 1

    def set_tempo(self, tempo: int) -> None:
        self.tempo, self.last = tempo, self.block


@pytest.mark.parametrize("seed", range(6))
def test_epochs_begin_where_a_look_at_every_block_would_begin_them(seed: int) -> None:
    chance, state = random.Random(seed), Memory()
    set_param(state, NETUID, "tempo", 7)
    create_subnet(state, NETUID)
    chain = Scheduler(7)
    for block in range(1, 600):
        chain.step()
        state.block = block
        now = epoch_of(state, NETUID)
        since = state.block - now.last_step
        assert (now.last_block, now.index, now.pending) == (chain.last, chain.index, chain.pending)
        assert min(since, chain.tempo + 1) == chain.since_step or not chain.tempo
        if chance.random() < 0.03:
            tempo = chance.choice([1, 2, 5, 11, 40])
            chain.set_tempo(tempo)
            set_param(state, NETUID, "tempo", tempo)
        elif chance.random() < 0.1 and not chain.pending and chain.last + chain.tempo >= block + 2:
            trigger_epoch(state, NETUID, 2)
            chain.pending = block + 2
    assert chain.index > 20


def test_the_next_epochs_are_known_until_somebody_moves_them() -> None:
    state = Memory()
    create_subnet(state, NETUID)
    state.block = 725
    assert [first_block_of(state, NETUID, index) for index in (0, 2, 3, 5)] == [0, 720, 1080, 1800]
    assert get_next_epoch_start_block(state, NETUID) == 1080
    trigger_epoch(state, NETUID, 10)
    assert get_next_epoch_start_block(state, NETUID) == 735
    assert [first_block_of(state, NETUID, index) for index in (3, 4)] == [735, 1095]
    with pytest.raises(DispatchError, match="EpochTriggerAlreadyPending"):
        trigger_epoch(state, NETUID, 10)
    set_param(state, NETUID, "tempo", 0)
    assert get_next_epoch_start_block(state, NETUID) is None
    assert first_block_of(state, NETUID, 4) is None
    state.block = 10_000
    assert epoch_of(state, NETUID).index == 2


def test_an_owner_cannot_trigger_an_epoch_that_is_near_or_with_commit_reveal() -> None:
    state = Memory()
    create_subnet(state, NETUID)
    state.block = 355
    with pytest.raises(DispatchError, match="AutoEpochAlreadyImminent"):
        trigger_epoch(state, NETUID, 8)
    set_param(state, NETUID, "commit_reveal", True)
    with pytest.raises(DispatchError, match="DynamicTempoBlockedByCommitReveal"):
        trigger_epoch(state, NETUID, 3)


def test_weights_given_to_a_uid_do_not_pass_to_its_next_owner() -> None:
    state = Memory()
    for name, value in (("max_uids", 2), ("mechanisms", 2)):
        set_param(state, NETUID, name, value)
    create_subnet(state, NETUID)
    register(state, NETUID, "validator", "owner", 0, permit=True)
    register(state, NETUID, "miner", "owner", 0, permit=False)
    for index in (NETUID, storage_index(NETUID, 1)):
        state.put("SubtensorModule.Weights", (index, 0), [[0, 5], [1, 65535]])
        state.put("SubtensorModule.Weights", (index, 1), [[1, 65535]])
    state.block = 9
    assert register(state, NETUID, "newcomer", "owner", 0, permit=False) == 1
    for index in (NETUID, storage_index(NETUID, 1)):
        assert state.get("SubtensorModule.Weights", index, 0) == [[0, 5], [1, 0]]
        assert state.get("SubtensorModule.Weights", index, 1) == []
        assert state.get("SubtensorModule.LastUpdate", index) == [0, 9]
    assert state.get("SubtensorModule.IsNetworkMember", "miner", NETUID) is False


@pytest.mark.parametrize("count", [0, 1, 63, 64, 256])
def test_a_sealed_row_is_decoded_from_scale(count: int) -> None:
    length = bytes([count * 4]) if count < 64 else (count * 4 + 1).to_bytes(2, "little")
    values = [uid * 255 for uid in range(count)]
    payload = bytes([32 * 4]) + bytes(range(32))
    for vector in (range(count), values):
        payload += length + b"".join(value.to_bytes(2, "little") for value in vector)
    payload += (7).to_bytes(8, "little")
    assert decode_row(payload, bittensor_core.ss58_encode) == Row(ALICE, list(range(count)), values, 7)
    for cut in {0, 1, 20, len(payload) - 1}:
        assert decode_row(payload[:cut], bittensor_core.ss58_encode) is None
    assert decode_row(bytes([31 * 4]) + payload[2:], bittensor_core.ss58_encode) is None
    assert decode_row(b"\xff" * 90, bittensor_core.ss58_encode) is None
