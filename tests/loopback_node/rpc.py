"""The node's JSON-RPC methods over the ledger: what a request is answered, without connections and faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sn29.localnet.ledger import Ledger
from sn29.localnet.pallets import RUNTIME_CALLS, Key, State

from .faults import Faults
from .metadata import wrapped
from .pool import Pool, RpcError
from .wire import Wire, pallet_events

_ZERO = "0x" + "00" * 32


class Rpc:
    """Answers requests. `METHODS` at the end names them all."""

    def __init__(self, ledger: Ledger, wire: Wire, pool: Pool, faults: Faults) -> None:
        self._ledger, self._wire, self._pool, self._faults = ledger, wire, pool, faults

    def answer(self, method: str, params: list[Any]) -> Any:
        """The result. Raises RpcError."""
        found = METHODS.get(method)
        if found is None:
            raise RpcError(-32601, "Method not found")
        return found(self, *params)

    # Blocks

    def head(self) -> int:
        """The newest block that this node shows."""
        head, last = self._ledger.head() - self._faults.lag, self._faults.stands_at
        return max(0, head if last is None else min(head, last))

    def finalized(self) -> int:
        return max(0, min(self._ledger.finalized(), self.head() - self._ledger.finality_lag))

    def _number(self, block_hash: str) -> int | None:
        block = self._ledger.number_of(block_hash)
        return block if block is not None and block <= self.head() else None

    def _block(self, block_hash: str | None) -> int:
        if block_hash is None:
            return self.head()
        block = self._number(block_hash)
        if block is None:
            raise RpcError(4003, f"Client error: UnknownBlock: Header was not found in the database: {block_hash}")
        return block

    def block_hash(self, block: int | None = None) -> str | None:
        head = self.head()
        wanted = head if block is None else int(block)
        return self._ledger.hash_of(wanted) if 0 <= wanted <= head else None

    def finalized_head(self) -> str:
        return self._ledger.hash_of(self.finalized())

    def header(self, block_hash: str | None = None) -> dict[str, Any] | None:
        block = self.head() if block_hash is None else self._number(block_hash)
        if block is None:
            return None
        return {
            "parentHash": self._ledger.hash_of(block - 1) if block else _ZERO,
            "number": hex(block),
            "stateRoot": _ZERO,
            "extrinsicsRoot": _ZERO,
            "digest": {"logs": []},
        }

    def block(self, block_hash: str | None = None) -> dict[str, Any] | None:
        header = self.header(block_hash)
        if header is None:
            return None
        number = int(header["number"], 16)
        data = [self._wire.timestamp_extrinsic(self._ledger.timestamp_ms(number))] if number else []
        data += [self._pool.data_of(one.call, one.signer, one.nonce) for one in self._ledger.extrinsics(number)]
        return {"block": {"header": header, "extrinsics": ["0x" + each.hex() for each in data]}, "justifications": None}

    def _events(self, block: int) -> bytes:
        own = []
        for one in self._ledger.extrinsics(block):
            uid = None
            if "netuid" in one.call.params:
                netuid = one.call.params["netuid"]
                uid = self._ledger.read(block, partial(_uid_of, netuid, one.signer))
            own.append((one.call, one.signer, one.error, [] if one.error else pallet_events(one.call, one.signer, uid)))
        return self._wire.events(own)

    # State

    def runtime_version(self, block_hash: str | None = None) -> dict[str, Any]:
        self._block(block_hash)
        return {
            "specName": "node-subtensor",
            "implName": "node-subtensor",
            "authoringVersion": 1,
            "specVersion": self._wire.spec_version,
            "implVersion": 1,
            "apis": [],
            "transactionVersion": 1,
            "stateVersion": 1,
        }

    def _at(self, block_hash: str | None) -> int:
        """The block whose state is asked for. Raises RpcError where this node has thrown it away."""
        block, keeps = self._block(block_hash), self._faults.keeps_states
        if keeps is not None and block < self.head() - keeps:
            raise RpcError(4003, f"Client error: Api called for an unknown Block: State already discarded for {block_hash}")
        return block

    def storage(self, key: str, block_hash: str | None = None) -> str | None:
        return self._values([key], self._at(block_hash))[0]

    def query_storage(self, keys: list[str], block_hash: str | None = None) -> list[dict[str, Any]]:
        block = self._at(block_hash)
        values = self._values(keys, block)
        return [{"block": self._ledger.hash_of(block), "changes": [list(pair) for pair in zip(keys, values, strict=True)]}]

    def _values(self, keys: list[str], block: int) -> list[str | None]:
        return self._ledger.read(block, lambda state: [self._value(state, bytes.fromhex(key[2:])) for key in keys])

    def _value(self, state: State, key: bytes) -> str | None:
        item = self._wire.item_of(key)
        if item is None:
            return None
        if item == "System.Events":
            return "0x" + self._events(state.block).hex()
        try:
            params = self._wire.params_of(item, key)
        except (ValueError, IndexError):
            return None  # half a key
        value = self._plain(state, item, params)
        return None if value is None else "0x" + self._wire.value(item, value).hex()

    def _plain(self, state: State, item: str, params: tuple[Key, ...]) -> Any:
        match item:
            case "System.Number":
                return state.block
            case "Timestamp.Now":
                return self._ledger.timestamp_ms(state.block)
            case "System.BlockHash":
                return self._ledger.hash_of(int(params[0])) if int(params[0]) < state.block else None
        return state.get(item, *params)

    def keys_paged(self, prefix: str, count: int, start: str | None = None, block_hash: str | None = None) -> list[str]:
        item = self._wire.item_of(bytes.fromhex(prefix[2:]))
        if item is None:
            return []
        rows = self._ledger.read(self._at(block_hash), lambda state: state.items(item))
        keys = sorted("0x" + self._wire.storage_key(item, key).hex() for key, _ in rows)
        return [key for key in keys if key.startswith(prefix) and (start is None or key > start)][:count]

    def call(self, name: str, data: str, block_hash: str | None = None) -> str | None:
        block = self._at(block_hash)
        if name == "Metadata_metadata_at_version":
            wanted = int.from_bytes(bytes.fromhex(data.removeprefix("0x")), "little")
            return "0x" + (wrapped(self._wire.metadata) if wanted == 15 else b"\x00").hex()
        api, _, method = name.partition("_")
        params = self._wire.runtime_params(api, method, bytes.fromhex(data.removeprefix("0x")))
        if params is None:
            raise RpcError(4003, f"Client error: Execution failed: Exported method {name} is not found")
        return "0x" + self._wire.runtime_result(api, method, self._computed(api, method, params, block)).hex()

    def _computed(self, api: str, method: str, params: list[Any], block: int) -> Any:
        if (api, method) == ("TransactionPaymentApi", "query_info"):
            return {"weight": {"ref_time": 0, "proof_size": 0}, "class": "Normal", "partial_fee": 0}
        compute = RUNTIME_CALLS.get((api, method))
        if compute is None:
            raise RpcError(-32000, f"the loopback node does not compute {api}_{method}")
        return self._ledger.read(block, lambda state: compute(state, *params))

    # The pool and the node

    def next_index(self, account: str) -> int:
        return self._pool.next_nonce(account)

    def pending(self) -> list[str]:
        return ["0x" + data.hex() for data in self._pool.waiting()]

    def properties(self) -> dict[str, Any]:
        return {"isEthereum": False, "ss58Format": 42, "tokenDecimals": 9, "tokenSymbol": "TAO"}

    def health(self) -> dict[str, Any]:
        return {"peers": 0, "isSyncing": False, "shouldHavePeers": False}


def _uid_of(netuid: int, hotkey: str, state: State) -> Any:
    return state.get("SubtensorModule.Uids", netuid, hotkey)


METHODS: dict[str, Callable[..., Any]] = {
    "chain_getBlockHash": Rpc.block_hash,
    "chain_getHead": Rpc.block_hash,
    "chain_getFinalizedHead": Rpc.finalized_head,
    "chain_getFinalisedHead": Rpc.finalized_head,
    "chain_getHeader": Rpc.header,
    "chain_getBlock": Rpc.block,
    "state_getRuntimeVersion": Rpc.runtime_version,
    "state_getStorage": Rpc.storage,
    "state_getStorageAt": Rpc.storage,
    "state_queryStorageAt": Rpc.query_storage,
    "state_getKeysPaged": Rpc.keys_paged,
    "state_call": Rpc.call,
    "account_nextIndex": Rpc.next_index,
    "system_accountNextIndex": Rpc.next_index,
    "system_properties": Rpc.properties,
    "system_health": Rpc.health,
    "author_pendingExtrinsics": Rpc.pending,
    "system_chain": lambda _: "Loopback",
    "system_name": lambda _: "Loopback node",
    "system_version": lambda _: "1",
    "rpc_methods": lambda _: {"methods": sorted(METHODS)},
}
