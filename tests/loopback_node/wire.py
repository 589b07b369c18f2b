"""Between the ledger's plain values and the bytes of the wire: storage keys and values, events, extrinsics, runtime calls.

All of it follows the runtime's metadata, read by the same library that the SDK uses (`bittensor_core`), so an item that
the ledger gains is served without a change here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import bittensor_core

from sn29.localnet.ledger import Call
from sn29.localnet.pallets import ITEMS, Key

from .metadata import compact, read_compact

SS58 = 42
_NOBODY = "5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM"
"""The account of 32 zero bytes: what a field of the runtime's answers holds where the ledger knows nobody."""
_INFO = {"weight": {"ref_time": 0, "proof_size": 0}, "class": "Normal", "pays_fee": "No"}


class BadExtrinsic(Exception):
    """Bytes that are no signed extrinsic of this runtime."""


@dataclass(frozen=True, slots=True)
class Extrinsic:
    """A signed extrinsic, taken apart; its signature not yet checked."""

    data: bytes
    call_data: bytes
    call: Call
    signer: str
    nonce: int
    era: Any
    """"00" (immortal) or {"period": blocks, "phase": blocks}."""
    tip: int
    signature: bytes
    crypto: int
    """0 for ed25519, 1 for sr25519."""

    @property
    def hash(self) -> str:
        return "0x" + blake2b(self.data, digest_size=32).hexdigest()

    def birth(self, block: int) -> int:
        """The block at which its era starts, as seen from `block`; 0 for an immortal one."""
        if self.era == "00":
            return 0
        period, phase = self.era["period"], self.era["phase"]
        return int((max(block, phase) - phase) // period * period + phase)

    def dies(self, block: int) -> float:
        """The first block that can no longer take it, when `block` could: the era's bytes alone say that only for a while."""
        return float("inf") if self.era == "00" else self.birth(block) + int(self.era["period"])


class Wire:
    """One runtime's bytes."""

    def __init__(self, metadata: bytes, spec_version: int) -> None:
        self.metadata, self.spec_version = metadata, spec_version
        self._runtime = bittensor_core.Runtime(metadata, spec_version, 1, SS58)
        self._types = {entry["id"]: entry["type"] for entry in json.loads(self._runtime.registry_json())["types"]}
        self._apis = self._runtime.runtime_api_map()
        self._entries: dict[str, Any] = {}
        self._prefixes: dict[bytes, str] = {}
        for item in [*ITEMS, "System.Number", "System.Events", "System.BlockHash", "Timestamp.Now"]:
            pallet, name = item.split(".")
            try:
                self._entries[item] = self._runtime.storage_entry(pallet, name)
            except KeyError:
                continue  # an item that this runtime does not have
            self._prefixes[bytes(self._runtime.storage_prefix(pallet, name))] = item
        pallets = self._runtime.metadata_ir()["pallets"]
        self._pallet_index = {pallet["name"]: pallet["index"] for pallet in pallets}
        self._error_index = {(pallet["name"], e["name"]): e["index"] for pallet in pallets for e in pallet["errors"]}
        self.storage_key = lru_cache(maxsize=200_000)(self._storage_key)

    # Storage

    def _storage_key(self, item: str, key: tuple[Key, ...]) -> bytes:
        return bytes(self._runtime.storage_key(*item.split("."), list(key)))

    def item_of(self, storage_key: bytes) -> str | None:
        """The item that a key or a prefix belongs to; None when the ledger does not keep it."""
        return self._prefixes.get(storage_key[:32])

    def params_of(self, item: str, storage_key: bytes) -> tuple[Key, ...]:
        """The item's parameters in a whole storage key."""
        entry = self._entries[item]
        if not entry.param_types:
            return ()
        return tuple(self._runtime.decode_storage_key_params(*item.split("."), storage_key, 0))

    def value(self, item: str, value: Any) -> bytes:
        return self._encode(self._entries[item].value_type, value)

    def _encode(self, type_string: str, value: Any) -> bytes:
        return bytes(self._runtime.encode(type_string, self._whole(int(type_string.split("::")[1]), value)))

    def _whole(self, kind: int, value: Any) -> Any:
        """The value with all that its type asks for: missing fields are zero, text is bytes, fields unknown to it go."""
        shape, detail = next(iter(self._types[kind]["def"].items()))
        match shape:
            case "composite" if self._name(kind) == "AccountId32":
                return value or _NOBODY
            case "composite":
                fields = detail.get("fields", [])
                if fields and "name" in fields[0]:
                    given = value or {}
                    return {field["name"]: self._whole(field["type"], given.get(field["name"])) for field in fields}
                return self._whole(fields[0]["type"], value) if len(fields) == 1 else value
            case "sequence":
                return self._sequence(detail["type"], value)
            case "array":
                return [self._whole(detail["type"], None)] * detail["len"] if value is None else value
            case "tuple":
                given = value if value is not None else [None] * len(detail)
                return tuple(self._whole(inner, part) for inner, part in zip(detail, given, strict=True))
            case "compact":
                return value or 0
            case "variant" if self._name(kind) == "Option":
                return None if value is None else self._whole(detail["variants"][1]["fields"][0]["type"], value)
            case "variant" if value is None:
                return self._first(detail["variants"])
            case "primitive" if value is None:
                return "" if detail == "str" else False if detail == "bool" else 0
        return value

    def _sequence(self, kind: int, value: Any) -> Any:
        if isinstance(value, str):
            data = bytes.fromhex(value[2:]) if value.startswith("0x") else value.encode()
            return list(data) if "compact" in self._types[kind]["def"] else data
        return [self._whole(kind, element) for element in value or []]

    def _first(self, variants: list[Any]) -> Any:
        """The variant with the smallest index, as zero."""
        first = min(variants, key=lambda variant: int(variant["index"]))
        fields = first.get("fields")
        return {first["name"]: self._whole(fields[0]["type"], None)} if fields else first["name"]

    def _name(self, kind: int) -> str:
        return str((self._types[kind].get("path") or [""])[-1])

    # Runtime calls

    def runtime_params(self, api: str, method: str, data: bytes) -> list[Any] | None:
        """The arguments of a runtime call; None when this runtime has no such call."""
        definition = self._apis.get(api, {}).get(method)
        if definition is None:
            return None
        values, at = [], 0
        for _, kind in definition["inputs"]:
            value = self._runtime.decode(kind, data[at:], False)
            values.append(value)
            at += len(self._runtime.encode(kind, value)) if len(definition["inputs"]) > 1 else 0
        return values

    def runtime_result(self, api: str, method: str, value: Any) -> bytes:
        return self._encode(self._apis[api][method]["output"], value)

    # Extrinsics

    def extrinsic(self, data: bytes) -> Extrinsic:
        """Takes a signed extrinsic apart. Raises BadExtrinsic."""
        try:
            seen = self._runtime.decode_extrinsic(data, True)
            scheme, signature = next(iter(seen["signature"].items()))
            era = seen["era"] if seen["era"] == "00" else dict(zip(("period", "phase"), seen["era"], strict=True))
            call = Call(
                seen["call"]["call_module"],
                seen["call"]["call_function"],
                {argument["name"]: argument["value"] for argument in seen["call"]["call_args"]},
            )
            extra, _ = self._parts(era, seen["nonce"], seen["tip"], bytes(32), bytes(32))
        except (ValueError, KeyError, TypeError) as error:
            raise BadExtrinsic(str(error)) from error
        # Length, version, address (kind and 32 bytes), signature (kind and 64 bytes), extensions, call.
        start = read_compact(data, 0)[1] + 1 + 33 + 65
        if data[start : start + len(extra)] != extra:
            raise BadExtrinsic("extensions other than era, nonce and tip")
        return Extrinsic(
            data=data,
            call_data=data[start + len(extra) :],
            call=Call(call.module, call.function, _plain_arguments(call)),
            signer=seen["address"],
            nonce=seen["nonce"],
            era=era,
            tip=seen["tip"],
            signature=bytes.fromhex(signature[2:]),
            crypto={"Ed25519": 0, "Sr25519": 1}[scheme],
        )

    def _parts(self, era: Any, nonce: int, tip: int, genesis: bytes, birth: bytes) -> tuple[bytes, bytes]:
        extra, additional = self._runtime.signature_payload_parts(
            era=era, nonce=nonce, tip=tip, tip_asset_id=None, genesis_hash=genesis, era_block_hash=birth, metadata_hash=None
        )
        return bytes(extra), bytes(additional)

    def signed_by_signer(self, extrinsic: Extrinsic, genesis: str, birth: str) -> bool:
        """Whether the signature covers this call, nonce and era on this chain, under this runtime."""
        hashes = (bytes.fromhex(genesis[2:]), bytes.fromhex(birth[2:]))
        payload = extrinsic.call_data + b"".join(self._parts(extrinsic.era, extrinsic.nonce, extrinsic.tip, *hashes))
        if len(payload) > 256:
            payload = blake2b(payload, digest_size=32).digest()
        public_key = bytes(bittensor_core.ss58_decode(extrinsic.signer))
        keypair = bittensor_core.Keypair(public_key=public_key, crypto_type=extrinsic.crypto)
        # The core's `verify` also takes a signature of "<Bytes>...</Bytes>", which a node does not; nobody signs that here.
        return bool(keypair.verify(payload, extrinsic.signature))

    def timestamp_extrinsic(self, now_ms: int) -> bytes:
        """The unsigned extrinsic that stands first in every block."""
        body = b"\x05" + bytes(self._runtime.compose_call("Timestamp", "set", {"now": now_ms}))
        return compact(len(body)) + body

    def stand_in(self, call: Call, signer: str, nonce: int) -> bytes:
        """An extrinsic for a call that came to the ledger without one (through its SDK seam); its signature is empty."""
        data, _ = self._runtime.encode_signed_extrinsic(
            bytes(self._runtime.compose_call(call.module, call.function, dict(call.params))),
            public_key=bytes(bittensor_core.ss58_decode(signer)),
            signature=bytes(64),
            signature_version=1,
            era="00",
            nonce=nonce,
            tip=0,
            tip_asset_id=None,
            metadata_hash_enabled=False,
        )
        return bytes(data)

    # Events

    def events(self, included: Sequence[tuple[Call, str, str | None, Sequence[Mapping[str, Any]]]]) -> bytes:
        """System.Events of a block: the timestamp's, then of each (call, signer, error, events of its pallet)."""
        timestamp = {"weight": _INFO["weight"], "class": "Mandatory", "pays_fee": "Yes"}
        records = [_record(0, {"System": {"ExtrinsicSuccess": {"dispatch_info": timestamp}}})]
        for position, (call, signer, error, own) in enumerate(included, start=1):
            records += [_record(position, event) for event in own]
            paid = {"TransactionFeePaid": {"who": signer, "actual_fee": 0, "tip": 0}}
            records.append(_record(position, {"TransactionPayment": paid}))
            records.append(_record(position, {"System": self._outcome(call, error)}))
        return bytes(self._runtime.encode(self._entries["System.Events"].value_type, records))

    def _outcome(self, call: Call, error: str | None) -> Mapping[str, Any]:
        if error is None:
            return {"ExtrinsicSuccess": {"dispatch_info": _INFO}}
        index = self._error_index.get((call.module, error))
        if index is None:
            return {"ExtrinsicFailed": {"dispatch_error": {"Other": None}, "dispatch_info": _INFO}}
        module = {"index": self._pallet_index[call.module], "error": bytes([index, 0, 0, 0])}
        return {"ExtrinsicFailed": {"dispatch_error": {"Module": module}, "dispatch_info": _INFO}}


def _record(position: int, event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"phase": {"ApplyExtrinsic": position}, "event": event, "topics": []}


def pallet_events(call: Call, signer: str, uid: int | None) -> list[Mapping[str, Any]]:
    """What the call's own pallet tells of it after a success."""
    params = call.params
    match call.function:
        case "set_commitment":
            return [{"Commitments": {"Commitment": {"netuid": params["netuid"], "who": signer}}}]
        case "set_mechanism_weights":
            return [{"SubtensorModule": {"WeightsSet": (params["mecid"] * 4096 + params["netuid"], uid or 0)}}]
        case "commit_timelocked_mechanism_weights":
            digest = blake2b(bytes.fromhex(params["commit"][2:]), digest_size=32).digest()
            index = params["mecid"] * 4096 + params["netuid"]
            return [{"SubtensorModule": {"TimelockedWeightsCommitted": (signer, index, digest, params["reveal_round"])}}]
    return []


def _plain_arguments(call: Call) -> Mapping[str, Any]:
    """The decoded arguments as the ledger takes them: bytes as 0x hex, always."""
    params = dict(call.params)
    if call.function == "set_commitment":
        params["info"] = {"fields": [_plain_field(field) for field in params["info"]["fields"]]}
    if "commit" in params:
        params["commit"] = _hex(params["commit"])
    return params


def _plain_field(field: Any) -> Any:
    if isinstance(field, str):
        return field
    (name, value), *_ = field.items()
    if isinstance(value, Mapping):
        return {name: {key: _hex(inner) if key == "encrypted" else inner for key, inner in value.items()}}
    return {name: _hex(value)}


def _hex(value: Any) -> str:
    """The decoder shows bytes as text where they are text, else as 0x hex."""
    if isinstance(value, str):
        return value if value.startswith("0x") else "0x" + value.encode().hex()
    return "0x" + bytes(value).hex()
