"""The pallets' rules that the embedded chain keeps: checks and state changes over plain storage, as the chain does.

Nothing here knows a file, a clock, a key pair or the SDK, so any chain of ours can be built on these functions. The
order of the checks is that of subtensor's pallets (subtensor: subnets/weights.rs, coinbase/reveal_commits.rs and
drain_pending_emissions.rs; commitments: lib.rs). Left out: rewards (incentives stay 0), fees, the salted commit-reveal
of old, the opening of timelocked commitments.

Epochs need no work per block: between two changes of the schedule they come every `tempo` blocks, so where a block
stands is arithmetic on the last change (`epoch_of`). Only sealed weights have something to do when an epoch starts
(`reveal_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

Key = int | str
U16 = 65535
MAX_SUBNETS = 4096
MAX_UNREVEALED = 10
MAX_SEALED_BYTES = 5000

_SCHEDULE = "Ledger.Schedule"
_SEALED = "SubtensorModule.TimelockedWeightCommits"
_ACCOUNT = {"nonce": 0, "data": {"free": 0, "reserved": 0, "frozen": 0}}

ITEMS: Mapping[str, Any] = {
    "System.Account": _ACCOUNT,
    "SubtensorModule.NetworksAdded": False,
    "SubtensorModule.NetworkRegisteredAt": 0,
    "SubtensorModule.SubnetworkN": 0,
    "SubtensorModule.Uids": None,
    "SubtensorModule.Keys": None,
    "SubtensorModule.Owner": None,
    "SubtensorModule.IsNetworkMember": False,
    "SubtensorModule.BlockAtRegistration": 0,
    "SubtensorModule.TotalHotkeyAlpha": 0,
    "SubtensorModule.ValidatorPermit": [],
    "SubtensorModule.LastUpdate": [],
    "SubtensorModule.Weights": [],
    "SubtensorModule.Tempo": 360,
    "SubtensorModule.LastEpochBlock": 0,
    "SubtensorModule.PendingEpochAt": 0,
    "SubtensorModule.SubnetEpochIndex": 0,
    "SubtensorModule.BlocksSinceLastStep": 0,
    "SubtensorModule.LastMechansimStepBlock": 0,
    "SubtensorModule.WeightsSetRateLimit": 100,
    "SubtensorModule.MinAllowedWeights": 1,
    "SubtensorModule.MaxWeightsLimit": U16,
    "SubtensorModule.WeightsVersionKey": 0,
    "SubtensorModule.StakeThreshold": 0,
    "SubtensorModule.ImmunityPeriod": 4096,
    "SubtensorModule.MaxAllowedUids": 256,
    "SubtensorModule.Burn": 0,
    "SubtensorModule.MechanismCountCurrent": 1,
    "SubtensorModule.MechanismEmissionSplit": None,
    "SubtensorModule.CommitRevealWeightsEnabled": False,
    "SubtensorModule.CommitRevealWeightsVersion": 4,
    "SubtensorModule.RevealPeriodEpochs": 1,
    _SEALED: [],
    "SubtensorModule.SubnetEpochConsensus": "Yuma",
    "SubtensorModule.SubnetIdentitiesV3": None,
    "SubtensorModule.AssociatedEvmAddress": None,
    "Commitments.CommitmentOf": None,
    "Commitments.RevealedCommitments": None,
    "Commitments.UsedSpaceOf": None,
    "Commitments.MaxSpace": 3100,
    _SCHEDULE: None,
}
"""The storage that this chain has, with what it answers where nothing was ever stored."""

PARAMS: Mapping[str, str] = {
    "tempo": "SubtensorModule.Tempo",
    "weights_rate_limit": "SubtensorModule.WeightsSetRateLimit",
    "min_weights": "SubtensorModule.MinAllowedWeights",
    "max_weight": "SubtensorModule.MaxWeightsLimit",
    "version_key": "SubtensorModule.WeightsVersionKey",
    "stake_threshold": "SubtensorModule.StakeThreshold",
    "immunity_blocks": "SubtensorModule.ImmunityPeriod",
    "max_uids": "SubtensorModule.MaxAllowedUids",
    "mechanisms": "SubtensorModule.MechanismCountCurrent",
    "commit_reveal": "SubtensorModule.CommitRevealWeightsEnabled",
    "commit_reveal_version": "SubtensorModule.CommitRevealWeightsVersion",
    "reveal_epochs": "SubtensorModule.RevealPeriodEpochs",
}
"""The subnet's settings by our names, in the chain's units: `max_weight` in 0..65535, `stake_threshold` in rao."""
_CHAIN_WIDE = ("stake_threshold", "commit_reveal_version")


class DispatchError(Exception):
    """A pallet refuses a call; the message is the chain's own name of the error."""


class State(Protocol):
    """Storage as the rules see it, at the block that is being made."""

    block: int

    def get(self, item: str, *key: Key) -> Any: ...

    def items(self, item: str, *prefix: Key) -> list[tuple[tuple[Key, ...], Any]]: ...

    def put(self, item: str, key: tuple[Key, ...], value: Any) -> None: ...


def storage_index(netuid: int, mecid: int) -> int:
    """The key of a mechanism's weights, updates and sealed weights; the netuid itself for mechanism 0."""
    return mecid * MAX_SUBNETS + netuid


# The subnet and its settings


def create_subnet(state: State, netuid: int) -> None:
    state.put("SubtensorModule.NetworksAdded", (netuid,), True)
    state.put("SubtensorModule.NetworkRegisteredAt", (netuid,), state.block)
    set_param(state, netuid, "tempo", state.get("SubtensorModule.Tempo", netuid))


def set_param(state: State, netuid: int, name: str, value: int) -> None:
    """Changes one of `PARAMS`. Another tempo starts the epoch's count of blocks anew, as the owner's call does."""
    if name == "tempo":
        now = epoch_of(state, netuid)
        state.put(PARAMS[name], (netuid,), value)
        _put_schedule(state, netuid, Epoch(state.block, now.index, now.last_step, now.pending))
    else:
        state.put(PARAMS[name], () if name in _CHAIN_WIDE else (netuid,), value)


# Epochs


@dataclass(frozen=True, slots=True)
class Epoch:
    """Where a subnet stands in its epochs, after its block has begun.

    last_block: where the current epoch began (or its count was started anew); index: epochs that have begun so far.
    last_step: block of the last epoch that ran. pending: block of an epoch that the owner triggered, or 0.
    """

    last_block: int
    index: int
    last_step: int
    pending: int


def epoch_of(state: State, netuid: int) -> Epoch:
    """The subnet's epoch at the state's block."""
    schedule = state.get(_SCHEDULE, netuid)
    if schedule is None:
        return Epoch(0, 0, 0, 0)
    last, index, step, pending, first = schedule
    if first is None or state.block < first:
        return Epoch(last, index, step, pending)
    passed = (state.block - first) // state.get("SubtensorModule.Tempo", netuid)
    begun = first + passed * state.get("SubtensorModule.Tempo", netuid)
    return Epoch(begun, index + 1 + passed, begun, 0)


def _put_schedule(state: State, netuid: int, epoch: Epoch) -> None:
    """Keeps where the subnet stands now, with the block at which its next epoch begins (None: never)."""
    tempo = state.get("SubtensorModule.Tempo", netuid)
    first = None
    if tempo:
        # A subnet that has not run for more than `tempo` blocks runs at once, even where its count was started anew.
        first = min(epoch.last_block + tempo, epoch.last_step + tempo + 1, epoch.pending or U16**4)
        first = max(first, state.block + 1)
    state.put(_SCHEDULE, (netuid,), [epoch.last_block, epoch.index, epoch.last_step, epoch.pending, first])


def first_block_of(state: State, netuid: int, index: int) -> int | None:
    """Where the epoch with this index begins as things stand: 0 when it has begun already, None for never."""
    schedule = state.get(_SCHEDULE, netuid)
    if schedule is None or (index > schedule[1] and schedule[4] is None):
        return None
    ahead = index - schedule[1] - 1
    return 0 if ahead < 0 else int(schedule[4] + ahead * state.get("SubtensorModule.Tempo", netuid))


def trigger_epoch(state: State, netuid: int, blocks: int) -> None:
    """The owner's call: an epoch `blocks` blocks from now."""
    now = epoch_of(state, netuid)
    if state.get("SubtensorModule.CommitRevealWeightsEnabled", netuid):
        raise DispatchError("DynamicTempoBlockedByCommitReveal")
    if now.pending:
        raise DispatchError("EpochTriggerAlreadyPending")
    if now.last_block + state.get("SubtensorModule.Tempo", netuid) < state.block + blocks:
        raise DispatchError("AutoEpochAlreadyImminent")
    _put_schedule(state, netuid, Epoch(now.last_block, now.index, now.last_step, state.block + blocks))


def get_next_epoch_start_block(state: State, netuid: int) -> int | None:
    """The runtime's answer: where the next epoch is expected; None for a subnet that has none."""
    tempo, now = state.get("SubtensorModule.Tempo", netuid), epoch_of(state, netuid)
    if not tempo:
        return None
    return int(min(now.last_block + tempo, now.pending or now.last_block + tempo))


def _blocks_since_step(state: State, netuid: int) -> int:
    return min(state.block - epoch_of(state, netuid).last_step, int(state.get("SubtensorModule.Tempo", netuid)) + 1)


DERIVED: Mapping[str, Callable[[State, int], Any]] = {
    "SubtensorModule.LastEpochBlock": lambda state, netuid: epoch_of(state, netuid).last_block,
    "SubtensorModule.SubnetEpochIndex": lambda state, netuid: epoch_of(state, netuid).index,
    "SubtensorModule.LastMechansimStepBlock": lambda state, netuid: epoch_of(state, netuid).last_step,
    "SubtensorModule.PendingEpochAt": lambda state, netuid: epoch_of(state, netuid).pending,
    "SubtensorModule.BlocksSinceLastStep": _blocks_since_step,
}
"""Storage per subnet that is worked out from the schedule when it is read, rather than written at every block."""


# Neurons


def register(state: State, netuid: int, hotkey: str, coldkey: str, stake_rao: int, permit: bool) -> int:
    """Gives the hotkey a uid, or keeps the one it has; stake and permit are set either way.

    A full subnet gives up the uid that was registered longest ago without a permit (the chain goes by emission, which a
    chain without rewards does not have). What was committed by the hotkey that leaves stays.
    """
    uid = state.get("SubtensorModule.Uids", netuid, hotkey)
    if uid is None:
        uid = _free_uid(state, netuid)
        state.put("SubtensorModule.Uids", (netuid, hotkey), uid)
        state.put("SubtensorModule.Keys", (netuid, uid), hotkey)
        state.put("SubtensorModule.Owner", (hotkey,), coldkey)
        state.put("SubtensorModule.IsNetworkMember", (hotkey, netuid), True)
        state.put("SubtensorModule.BlockAtRegistration", (netuid, uid), state.block)
        for index in _indexes(state, netuid):
            _put_at(state, "SubtensorModule.LastUpdate", index, uid, state.block)
    state.put("SubtensorModule.TotalHotkeyAlpha", (hotkey, netuid), stake_rao)
    _put_at(state, "SubtensorModule.ValidatorPermit", netuid, uid, permit)
    return int(uid)


def _free_uid(state: State, netuid: int) -> int:
    count = int(state.get("SubtensorModule.SubnetworkN", netuid))
    if count < state.get("SubtensorModule.MaxAllowedUids", netuid):
        state.put("SubtensorModule.SubnetworkN", (netuid,), count + 1)
        return count
    permits = state.get("SubtensorModule.ValidatorPermit", netuid)
    registered = {uid: state.get("SubtensorModule.BlockAtRegistration", netuid, uid) for uid in range(count)}
    leaving = min((uid for uid in registered if not permits[uid]), key=lambda uid: (registered[uid], uid), default=None)
    if leaving is None:
        raise DispatchError("NoNeuronIdAvailable")
    hotkey = state.get("SubtensorModule.Keys", netuid, leaving)
    state.put("SubtensorModule.Uids", (netuid, hotkey), None)
    state.put("SubtensorModule.IsNetworkMember", (hotkey, netuid), None)
    for index in _indexes(state, netuid):
        state.put("SubtensorModule.Weights", (index, leaving), None)
        # What others gave to the uid was not meant for the newcomer.
        for key, row in state.items("SubtensorModule.Weights", index):
            if any(uid == leaving and value for uid, value in row):
                state.put("SubtensorModule.Weights", key, [[uid, 0 if uid == leaving else value] for uid, value in row])
    return leaving


def _indexes(state: State, netuid: int) -> list[int]:
    return [storage_index(netuid, mecid) for mecid in range(state.get("SubtensorModule.MechanismCountCurrent", netuid))]


def _put_at(state: State, item: str, index: int, uid: int, value: int | bool) -> None:
    """Sets one place of a subnet's vector, which grows to hold it."""
    vector = list(state.get(item, index))
    vector += [type(value)()] * (uid + 1 - len(vector))
    vector[uid] = value
    state.put(item, (index,), vector)


# Commitments


def set_commitment(state: State, signer: str, *, netuid: int, info: Mapping[str, Any]) -> None:
    """Stores what the hotkey commits to, with the including block; room is given per epoch."""
    if state.get("SubtensorModule.Uids", netuid, signer) is None:
        raise DispatchError("AccountNotAllowedCommit")
    fields = info["fields"]
    if len(fields) > 3:
        raise DispatchError("TooManyFieldsInCommitmentInfo")
    epoch = epoch_of(state, netuid).index
    usage = state.get("Commitments.UsedSpaceOf", netuid, signer) or {"last_epoch": epoch, "used_space": 0}
    used = usage["used_space"] if usage["last_epoch"] == epoch else 0
    used += max(100, sum(_size(field) for field in fields))
    if used > state.get("Commitments.MaxSpace"):
        raise DispatchError("SpaceLimitExceeded")
    state.put("Commitments.UsedSpaceOf", (netuid, signer), {"last_epoch": epoch, "used_space": used})
    record = {"deposit": 0, "block": state.block, "info": {"fields": fields}}
    state.put("Commitments.CommitmentOf", (netuid, signer), record)


def _size(field: Any) -> int:
    """Bytes that one field is charged for: raw ones, hashes and timelocked ones by their length, marks nothing."""
    if not isinstance(field, Mapping):
        return 0
    (value,) = field.values()
    data = value["encrypted"] if isinstance(value, Mapping) else value
    return len(data) // 2 - 1 if data else 0  # of "0x" and two digits a byte


# Weights


@dataclass(frozen=True, slots=True)
class Row:
    """One validator's weights: whose, uids and their values in 0..65535, and the version of the rules that it follows."""

    hotkey: str
    dests: list[int]
    weights: list[int]
    version_key: int


def set_mechanism_weights(
    state: State, signer: str, *, netuid: int, mecid: int, dests: list[int], weights: list[int], version_key: int
) -> None:
    """The plain call; a subnet with commit-reveal takes sealed weights only."""
    if state.get("SubtensorModule.CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealEnabled")
    _set_row(state, netuid, mecid, Row(signer, dests, weights, version_key))


def _set_row(state: State, netuid: int, mecid: int, row: Row) -> None:
    """Stores the hotkey's row, max-upscaled to u16, after the chain's checks in the chain's order."""
    if len(row.dests) != len(row.weights):
        raise DispatchError("WeightVecNotEqualSize")
    index = _existing_index(state, netuid, mecid)
    if len(row.dests) > state.get("SubtensorModule.SubnetworkN", netuid):
        raise DispatchError("UidsLengthExceedUidsInSubNet")
    uid = state.get("SubtensorModule.Uids", netuid, row.hotkey)
    if uid is None:
        raise DispatchError("HotKeyNotRegisteredInSubNet")
    plain = not state.get("SubtensorModule.CommitRevealWeightsEnabled", netuid)
    only_self = row.dests == [uid]
    _check_validator(state, netuid, row)
    if plain:  # a sealed row was counted when it was committed
        _check_rate(state, netuid, index, uid, "SettingWeightsTooFast")
    if not only_self and not state.get("SubtensorModule.ValidatorPermit", netuid)[uid]:
        raise DispatchError("NeuronNoValidatorPermit")
    _check_row(state, netuid, row, only_self)
    top = max(row.weights, default=0)
    upscaled = [(2 * value * U16 + top) // (2 * top) if top else 0 for value in row.weights]
    state.put("SubtensorModule.Weights", (index, uid), [list(pair) for pair in zip(row.dests, upscaled, strict=True)])
    if plain:
        _put_at(state, "SubtensorModule.LastUpdate", index, uid, state.block)


def _existing_index(state: State, netuid: int, mecid: int) -> int:
    count = state.get("SubtensorModule.MechanismCountCurrent", netuid)
    if not state.get("SubtensorModule.NetworksAdded", netuid) or not 0 <= mecid < count:
        raise DispatchError("MechanismDoesNotExist")
    return storage_index(netuid, mecid)


def _check_validator(state: State, netuid: int, row: Row) -> None:
    if state.get("SubtensorModule.TotalHotkeyAlpha", row.hotkey, netuid) < state.get("SubtensorModule.StakeThreshold"):
        raise DispatchError("NotEnoughStakeToSetWeights")
    if row.version_key < state.get("SubtensorModule.WeightsVersionKey", netuid):
        raise DispatchError("IncorrectWeightVersionKey")


def _check_rate(state: State, netuid: int, index: int, uid: int, error: str) -> None:
    updates = state.get("SubtensorModule.LastUpdate", index)
    last = updates[uid] if uid < len(updates) else 0
    if last and state.block - last < state.get("SubtensorModule.WeightsSetRateLimit", netuid):
        raise DispatchError(error)


def _check_row(state: State, netuid: int, row: Row, only_self: bool) -> None:
    if len(set(row.dests)) != len(row.dests):
        raise DispatchError("DuplicateUids")
    count = state.get("SubtensorModule.SubnetworkN", netuid)
    if any(not 0 <= uid < count for uid in row.dests):
        raise DispatchError("UidVecContainInvalidOne")
    if only_self:
        return
    if len(row.dests) < min(count, state.get("SubtensorModule.MinAllowedWeights", netuid)):
        raise DispatchError("WeightVecLengthIsLow")
    if max(row.weights, default=0) * U16 > sum(row.weights) * state.get("SubtensorModule.MaxWeightsLimit", netuid):
        raise DispatchError("MaxWeightExceeded")


# Sealed weights (commit-reveal v4)


def commit_timelocked_mechanism_weights(
    state: State, signer: str, *, netuid: int, mecid: int, commit: str, reveal_round: int, commit_reveal_version: int
) -> None:
    """Keeps a sealed row (0x hex) for the epoch in which it will be opened. The chain does not look at the round."""
    index = _existing_index(state, netuid, mecid)
    if not state.get("SubtensorModule.CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealDisabled")
    if commit_reveal_version != state.get("SubtensorModule.CommitRevealWeightsVersion"):
        raise DispatchError("IncorrectCommitRevealVersion")
    uid = state.get("SubtensorModule.Uids", netuid, signer)
    if uid is None:
        raise DispatchError("HotKeyNotRegisteredInSubNet")
    _check_rate(state, netuid, index, uid, "CommittingWeightsTooFast")
    epoch = epoch_of(state, netuid).index
    queue = state.get(_SEALED, index, epoch)
    if sum(hotkey == signer for hotkey, *_ in queue) >= MAX_UNREVEALED:
        raise DispatchError("TooManyUnrevealedCommits")
    state.put(_SEALED, (index, epoch), [*queue, [signer, state.block, commit, reveal_round]])
    _put_at(state, "SubtensorModule.LastUpdate", index, uid, state.block)


class Drand(Protocol):
    """What the chain knows of the beacon whose signatures open sealed rows."""

    def block_of(self, reveal_round: int) -> int:
        """The first block whose time is the round's or later: none before it can have the signature."""

    def signature(self, reveal_round: int) -> str | None:
        """The round's signature; None when it was not published."""

    def unseal(self, sealed: str, signature: str) -> Row | None:
        """The row in a commit (0x hex); None when the signature does not open it or it is no row."""


@dataclass(frozen=True, slots=True, order=True)
class _Due:
    """Something that a block does with the rows sealed in an epoch: opens one, or drops the rest (position -1)."""

    block: int
    mecid: int
    epoch: int
    position: int
    sealed: tuple[Any, ...]


def reveal_weights(at: Callable[[int], State], netuid: int, since: int, until: int, drand: Drand) -> None:
    """What the blocks `since` to `until` do, before anything else, with the rows that were sealed earlier.

    A row is opened in the first block of its reveal epoch that has the signature, and set like a plain one; one that
    does not open or that the checks refuse is dropped without a word. What the reveal epoch did not open is dropped at
    its end. `at` gives the state at a block; the subnet's settings must not change between the two blocks.
    """
    mechanisms = range(at(since).get("SubtensorModule.MechanismCountCurrent", netuid))
    for due in sorted(due for mecid in mechanisms for due in _due(at(since), netuid, mecid, until, drand)):
        state, key = at(due.block), (storage_index(netuid, due.mecid), due.epoch)
        if due.position < 0:
            state.put(_SEALED, key, None)
            continue
        hotkey, _, commit, reveal_round = due.sealed
        signature = drand.signature(reveal_round)
        if signature is None:
            continue  # the chain tries again at every block of the epoch
        rest = [one for one in state.get(_SEALED, *key) if tuple(one) != due.sealed]
        state.put(_SEALED, key, rest or None)
        row = drand.unseal(commit, signature)
        if row is not None and row.hotkey == hotkey:
            with suppress(DispatchError):
                _set_row(state, netuid, due.mecid, row)


def _due(state: State, netuid: int, mecid: int, until: int, drand: Drand) -> Iterator[_Due]:
    period = state.get("SubtensorModule.RevealPeriodEpochs", netuid)
    for (_, epoch), queue in state.items(_SEALED, storage_index(netuid, mecid)):
        begin, end = (first_block_of(state, netuid, int(epoch) + period + later) for later in (0, 1))
        if begin is None or begin > until:
            continue
        for position, sealed in enumerate(queue):
            block = max(state.block, begin, drand.block_of(sealed[3]))
            if block <= until and (end is None or block < end):
                yield _Due(block, mecid, int(epoch), position, tuple(sealed))
        if end is not None and end <= until:
            yield _Due(max(state.block, end), mecid, int(epoch), -1, ())


def decode_row(payload: bytes, address: Callable[[bytes], str]) -> Row | None:
    """The row in what a commit seals (SCALE: account, uids, values, version key); None when it is none.

    address: the ss58 address of 32 bytes.
    """
    try:
        account, rest = _vector(payload, 1)
        dests, rest = _vector(rest, 2)
        weights, rest = _vector(rest, 2)
    except ValueError:
        return None
    if len(account) != 32 or len(rest) < 8:
        return None
    return Row(address(bytes(account)), dests, weights, int.from_bytes(rest[:8], "little"))


def _vector(data: bytes, width: int) -> tuple[list[int], bytes]:
    """A SCALE vector of unsigned integers of `width` bytes, and what follows it. Raises ValueError when it is cut off."""
    if not data:
        raise ValueError("no length")
    mode = data[0] & 3
    size = (1, 2, 4, 0)[mode]
    if not size:
        raise ValueError("longer than any commit")
    count, data = int.from_bytes(data[:size], "little") >> 2, data[size:]
    if len(data) < count * width:
        raise ValueError("cut off")
    values = [int.from_bytes(data[at : at + width], "little") for at in range(0, count * width, width)]
    return values, data[count * width :]


# What the runtime answers


def get_metagraph(state: State, netuid: int) -> dict[str, Any] | None:
    """The runtime's answer about a whole subnet; None when there is none. No rewards are computed: incentives are 0."""
    if not state.get("SubtensorModule.NetworksAdded", netuid):
        return None
    hotkeys = _hotkeys(state, netuid)
    registered = dict(state.items("SubtensorModule.BlockAtRegistration", netuid))
    stakes = [state.get("SubtensorModule.TotalHotkeyAlpha", hotkey, netuid) for hotkey in hotkeys]
    return {
        "netuid": netuid,
        "block": state.block,
        "name": "localnet",
        "symbol": "",
        "tempo": int(state.get("SubtensorModule.Tempo", netuid)),
        "last_step": epoch_of(state, netuid).last_step,
        "blocks_since_last_step": _blocks_since_step(state, netuid),
        "owner_hotkey": "",
        "owner_coldkey": "",
        "network_registered_at": state.get("SubtensorModule.NetworkRegisteredAt", netuid),
        "num_uids": len(hotkeys),
        "max_uids": state.get("SubtensorModule.MaxAllowedUids", netuid),
        "hotkeys": hotkeys,
        "coldkeys": [state.get("SubtensorModule.Owner", hotkey) for hotkey in hotkeys],
        "active": [True] * len(hotkeys),
        "validator_permit": state.get("SubtensorModule.ValidatorPermit", netuid),
        "last_update": state.get("SubtensorModule.LastUpdate", netuid),
        "block_at_registration": [registered[netuid, uid] for uid in range(len(hotkeys))],
        "alpha_stake": stakes,
        "total_stake": stakes,
    }


def _hotkeys(state: State, netuid: int) -> list[str]:
    return [hotkey for _, hotkey in sorted(state.items("SubtensorModule.Keys", netuid))]


def get_neurons_lite(state: State, netuid: int) -> list[dict[str, Any]]:
    """The runtime's answer about the neurons of a subnet, by uid, without their weights."""
    permits, updates = (state.get(f"SubtensorModule.{item}", netuid) for item in ("ValidatorPermit", "LastUpdate"))
    zeros = dict.fromkeys(("rank", "emission", "incentive", "consensus", "trust", "validator_trust", "dividends"), 0)
    neurons = []
    for uid, hotkey in enumerate(_hotkeys(state, netuid)):
        coldkey, stake = state.get("SubtensorModule.Owner", hotkey), state.get("SubtensorModule.TotalHotkeyAlpha", hotkey, netuid)
        known = {"hotkey": hotkey, "coldkey": coldkey, "uid": uid, "netuid": netuid, "active": True}
        about = {"stake": [[coldkey, stake]], "last_update": updates[uid], "validator_permit": permits[uid], "pruning_score": U16}
        neurons.append(known | {"axon_info": dict(_AXON), "prometheus_info": dict(_PROMETHEUS)} | zeros | about)
    return neurons


_PROMETHEUS = dict.fromkeys(("block", "version", "ip", "port", "ip_type"), 0)
_AXON = _PROMETHEUS | dict.fromkeys(("protocol", "placeholder1", "placeholder2"), 0)


def get_neurons(state: State, netuid: int) -> list[dict[str, Any]]:
    """The same with weights and bonds instead of the pruning score."""
    rows = {key[1]: row for key, row in state.items("SubtensorModule.Weights", netuid)}
    lite = get_neurons_lite(state, netuid)
    return [neuron | {"weights": rows.get(neuron["uid"], []), "bonds": []} for neuron in lite]


def get_subnet_hyperparams_v3(state: State, netuid: int) -> list[dict[str, Any]] | None:
    """The runtime's answer about the settings that this chain has, as names and tagged values; None without a subnet."""
    if not state.get("SubtensorModule.NetworksAdded", netuid):
        return None
    return [{"name": name, "value": {tag: state.get(item, netuid)}} for name, (tag, item) in _HYPERPARAMETERS.items()]


_HYPERPARAMETERS = {
    "immunity_period": ("U16", "SubtensorModule.ImmunityPeriod"),
    "min_allowed_weights": ("U16", "SubtensorModule.MinAllowedWeights"),
    "max_weights_limit": ("U16", "SubtensorModule.MaxWeightsLimit"),
    "tempo": ("U16", "SubtensorModule.Tempo"),
    "weights_version": ("U64", "SubtensorModule.WeightsVersionKey"),
    "weights_rate_limit": ("U64", "SubtensorModule.WeightsSetRateLimit"),
    "commit_reveal_period": ("U64", "SubtensorModule.RevealPeriodEpochs"),
    "commit_reveal_weights_enabled": ("Bool", "SubtensorModule.CommitRevealWeightsEnabled"),
    "max_allowed_uids": ("U16", "SubtensorModule.MaxAllowedUids"),
}


CALLS: Mapping[tuple[str, str], Callable[..., None]] = {
    ("Commitments", "set_commitment"): set_commitment,
    ("SubtensorModule", "set_mechanism_weights"): set_mechanism_weights,
    ("SubtensorModule", "commit_timelocked_mechanism_weights"): commit_timelocked_mechanism_weights,
}

RUNTIME_CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("SubnetInfoRuntimeApi", "get_metagraph"): get_metagraph,
    ("SubnetInfoRuntimeApi", "get_next_epoch_start_block"): get_next_epoch_start_block,
    ("SubnetInfoRuntimeApi", "get_subnet_hyperparams_v3"): get_subnet_hyperparams_v3,
    ("NeuronInfoRuntimeApi", "get_neurons"): get_neurons,
    ("NeuronInfoRuntimeApi", "get_neurons_lite"): get_neurons_lite,
}
