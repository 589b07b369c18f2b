"""The pallets' rules that the embedded chain keeps: checks and state changes over plain storage, as the chain does.

Nothing here knows a file, a clock, a key pair or the SDK, so any chain of ours can be built on these functions. The
order of the checks is that of subtensor's pallets (subtensor: subnets/weights.rs; commitments: lib.rs). Left out:
rewards (incentives stay 0), fees, commit-reveal of weights, mechanisms other than 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

Key = int | str
U16 = 65535

ITEMS: Mapping[str, Any] = {
    "System.Account": {"nonce": 0, "data": {"free": 0, "reserved": 0, "frozen": 0}},
    "SubtensorModule.NetworksAdded": False,
    "SubtensorModule.SubnetworkN": 0,
    "SubtensorModule.Uids": None,
    "SubtensorModule.Keys": None,
    "SubtensorModule.Owner": None,
    "SubtensorModule.BlockAtRegistration": 0,
    "SubtensorModule.TotalHotkeyAlpha": 0,
    "SubtensorModule.ValidatorPermit": [],
    "SubtensorModule.LastUpdate": [],
    "SubtensorModule.Weights": [],
    "SubtensorModule.Tempo": 360,
    "SubtensorModule.WeightsSetRateLimit": 100,
    "SubtensorModule.MinAllowedWeights": 1,
    "SubtensorModule.MaxWeightsLimit": U16,
    "SubtensorModule.WeightsVersionKey": 0,
    "SubtensorModule.StakeThreshold": 0,
    "SubtensorModule.ImmunityPeriod": 4096,
    "SubtensorModule.MaxAllowedUids": 256,
    "SubtensorModule.CommitRevealWeightsEnabled": False,
    "SubtensorModule.SubnetEpochConsensus": "Yuma",
    "Commitments.CommitmentOf": None,
    "Commitments.RevealedCommitments": None,
    "Commitments.UsedSpaceOf": None,
    "Commitments.MaxSpace": 3100,
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
}
"""The subnet's settings by our names, in the chain's units: `max_weight` in 0..65535, `stake_threshold` in rao."""


class DispatchError(Exception):
    """A pallet refuses a call; the message is the chain's own name of the error."""


class State(Protocol):
    """Storage as the rules see it, at the block that is being made."""

    block: int

    def get(self, item: str, *key: Key) -> Any: ...

    def items(self, item: str, *prefix: Key) -> list[tuple[tuple[Key, ...], Any]]: ...

    def put(self, item: str, key: tuple[Key, ...], value: Any) -> None: ...


def register(state: State, netuid: int, hotkey: str, coldkey: str, stake_rao: int, permit: bool) -> int:
    """Gives the hotkey a uid, or keeps the one it has; stake and permit are set either way.

    A full subnet gives up the uid that was registered longest ago without a permit (the chain goes by emission, which a
    chain without rewards does not have).
    """
    uid = state.get("SubtensorModule.Uids", netuid, hotkey)
    if uid is None:
        uid = _free_uid(state, netuid)
        state.put("SubtensorModule.Uids", (netuid, hotkey), uid)
        state.put("SubtensorModule.Keys", (netuid, uid), hotkey)
        state.put("SubtensorModule.Owner", (hotkey,), coldkey)
        state.put("SubtensorModule.BlockAtRegistration", (netuid, uid), state.block)
        _put_at(state, "SubtensorModule.LastUpdate", netuid, uid, state.block)
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
    state.put("SubtensorModule.Uids", (netuid, state.get("SubtensorModule.Keys", netuid, leaving)), None)
    state.put("SubtensorModule.Weights", (netuid, leaving), None)
    return leaving


def _put_at(state: State, item: str, netuid: int, uid: int, value: int | bool) -> None:
    """Sets one place of a subnet's vector, which grows to hold it."""
    vector = list(state.get(item, netuid))
    vector += [type(value)()] * (uid + 1 - len(vector))
    vector[uid] = value
    state.put(item, (netuid,), vector)


def set_commitment(state: State, signer: str, *, netuid: int, info: Mapping[str, Any]) -> None:
    """Stores what the hotkey commits to, with the including block; room is given per epoch (here: `tempo` blocks)."""
    if state.get("SubtensorModule.Uids", netuid, signer) is None:
        raise DispatchError("AccountNotAllowedCommit")
    fields = info["fields"]
    if len(fields) > 3:
        raise DispatchError("TooManyFieldsInCommitmentInfo")
    epoch = state.block // max(1, state.get("SubtensorModule.Tempo", netuid))
    usage = state.get("Commitments.UsedSpaceOf", netuid, signer) or {"last_epoch": epoch, "used_space": 0}
    used = usage["used_space"] if usage["last_epoch"] == epoch else 0
    size = sum(len(value) // 2 - 1 for field in fields for value in field.values())  # of "0x" and two digits a byte
    used += max(100, size)
    if used > state.get("Commitments.MaxSpace"):
        raise DispatchError("SpaceLimitExceeded")
    state.put("Commitments.UsedSpaceOf", (netuid, signer), {"last_epoch": epoch, "used_space": used})
    record = {"deposit": 0, "block": state.block, "info": {"fields": fields}}
    state.put("Commitments.CommitmentOf", (netuid, signer), record)


def set_mechanism_weights(
    state: State, signer: str, *, netuid: int, mecid: int, dests: list[int], weights: list[int], version_key: int
) -> None:
    """Stores the hotkey's row, max-upscaled to u16, after the chain's checks in the chain's order."""
    if mecid != 0 or not state.get("SubtensorModule.NetworksAdded", netuid):
        raise DispatchError("MechanismDoesNotExist")
    if len(dests) != len(weights):
        raise DispatchError("WeightVecNotEqualSize")
    if len(dests) > state.get("SubtensorModule.SubnetworkN", netuid):
        raise DispatchError("UidsLengthExceedUidsInSubNet")
    uid = state.get("SubtensorModule.Uids", netuid, signer)
    if uid is None:
        raise DispatchError("HotKeyNotRegisteredInSubNet")
    _check_validator(state, signer, netuid, uid, dests == [uid], version_key)
    _check_row(state, netuid, dests, weights, dests == [uid])
    top = max(weights, default=0)
    upscaled = [(2 * value * U16 + top) // (2 * top) if top else 0 for value in weights]
    state.put("SubtensorModule.Weights", (netuid, uid), [list(pair) for pair in zip(dests, upscaled, strict=True)])
    _put_at(state, "SubtensorModule.LastUpdate", netuid, uid, state.block)


def _check_validator(state: State, signer: str, netuid: int, uid: int, only_self: bool, version_key: int) -> None:
    if state.get("SubtensorModule.TotalHotkeyAlpha", signer, netuid) < state.get("SubtensorModule.StakeThreshold"):
        raise DispatchError("NotEnoughStakeToSetWeights")
    if version_key < state.get("SubtensorModule.WeightsVersionKey", netuid):
        raise DispatchError("IncorrectWeightVersionKey")
    last = state.get("SubtensorModule.LastUpdate", netuid)[uid]
    if last and state.block - last < state.get("SubtensorModule.WeightsSetRateLimit", netuid):
        raise DispatchError("SettingWeightsTooFast")
    if not only_self and not state.get("SubtensorModule.ValidatorPermit", netuid)[uid]:
        raise DispatchError("NeuronNoValidatorPermit")


def _check_row(state: State, netuid: int, dests: list[int], weights: list[int], only_self: bool) -> None:
    if len(set(dests)) != len(dests):
        raise DispatchError("DuplicateUids")
    count = state.get("SubtensorModule.SubnetworkN", netuid)
    if any(not 0 <= uid < count for uid in dests):
        raise DispatchError("UidVecContainInvalidOne")
    if only_self:
        return
    if len(dests) < min(count, state.get("SubtensorModule.MinAllowedWeights", netuid)):
        raise DispatchError("WeightVecLengthIsLow")
    if max(weights, default=0) * U16 > sum(weights) * state.get("SubtensorModule.MaxWeightsLimit", netuid):
        raise DispatchError("MaxWeightExceeded")


def get_metagraph(state: State, netuid: int) -> dict[str, Any] | None:
    """The runtime's answer about a whole subnet; None when there is none. No rewards are computed: incentives are 0."""
    if not state.get("SubtensorModule.NetworksAdded", netuid):
        return None
    hotkeys = [hotkey for (_, _uid), hotkey in sorted(state.items("SubtensorModule.Keys", netuid))]
    registered = dict(state.items("SubtensorModule.BlockAtRegistration", netuid))
    tempo = int(state.get("SubtensorModule.Tempo", netuid))
    since_step = state.block % max(1, tempo)
    stakes = [state.get("SubtensorModule.TotalHotkeyAlpha", hotkey, netuid) for hotkey in hotkeys]
    return {
        "netuid": netuid,
        "block": state.block,
        "name": "localnet",
        "symbol": "",
        "tempo": tempo,
        "last_step": state.block - since_step,
        "blocks_since_last_step": since_step,
        "owner_hotkey": "",
        "owner_coldkey": "",
        "network_registered_at": 0,
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


CALLS: Mapping[tuple[str, str], Callable[..., None]] = {
    ("Commitments", "set_commitment"): set_commitment,
    ("SubtensorModule", "set_mechanism_weights"): set_mechanism_weights,
}
