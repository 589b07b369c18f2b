"""An embedded chain: one SQLite file that stands behind the SDK's public `Substrate` protocol.

`Ledger` is the file with its clock and its history, `LedgerSubstrate` what `bittensor.Client(substrate=...)` talks to;
the rules are in `pallets`. Any number of processes may open the same file at once.

Blocks come from the wall clock, and a block is closed as soon as anybody may have seen its number: every look at the
clock and every write takes the file's one write lock, and what is written at head h belongs to block h + 1. State is
kept as rows (item, key, block, value), so every past block can be read as it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import bittensor as bt
from bittensor.keyfiles import Keypair

from sn29.errors import Reason, Rejected
from sn29.localnet.pallets import CALLS, ITEMS, PARAMS, DispatchError, Key, State, get_metagraph, register

T = TypeVar("T")
_RAO = 10**9
_SPEC_VERSION = 474
"""The runtime whose storage is imitated: the first with SubnetEpochConsensus, which the SDK's SetWeights reads."""


class InvalidTransaction(Exception):
    """Refused before inclusion, without using up a nonce; the message is the SDK's name of the reason."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call in plain JSON values (bytes as 0x hex)."""

    module: str
    function: str
    params: Mapping[str, Any]

    @property
    def data(self) -> bytes:
        return _encode({"module": self.module, "function": self.function, "params": self.params}).encode()


@dataclass(frozen=True, slots=True)
class Inclusion:
    """Where a signed call landed, and the pallet's error if it was refused there."""

    block: int
    position: int
    error: str | None


def _encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


class _Rows:
    """`State` on the ledger's rows: reads the newest value at or before `block`, writes at `block`."""

    def __init__(self, db: sqlite3.Connection, block: int) -> None:
        self._db, self.block = db, block

    def get(self, item: str, *key: Key) -> Any:
        row = self._db.execute(
            "SELECT value FROM storage WHERE item = ? AND key = ? AND block <= ? ORDER BY block DESC LIMIT 1",
            (item, _encode(key), self.block),
        ).fetchone()
        value = json.loads(row[0]) if row else None
        return ITEMS[item] if value is None else value

    def items(self, item: str, *prefix: Key) -> list[tuple[tuple[Key, ...], Any]]:
        start = _encode(prefix)[:-1] + ("," if prefix else "")
        rows = self._db.execute(
            "SELECT key, value, max(block) FROM storage WHERE item = ? AND key >= ? AND key < ? AND block <= ? GROUP BY key",
            (item, start, start + "\U0010ffff", self.block),
        )
        return [(tuple(json.loads(key)), json.loads(value)) for key, value, _ in rows if value != "null"]

    def put(self, item: str, key: tuple[Key, ...], value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO storage VALUES (?, ?, ?, ?)", (item, _encode(key), self.block, _encode(value)))


class Ledger:
    """The chain's file. Synchronous and safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        """Use `create` or `open`."""
        self._mutex = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        # A killed process loses nothing; a power cut loses at most the newest blocks.
        self._db.execute("PRAGMA synchronous = NORMAL")

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        netuid: int,
        block_seconds: float = 12.0,
        tempo: int = 360,
        seed: int | None = None,
        finality_lag: int = 2,
        **params: int,
    ) -> Ledger:
        """A new chain with one empty subnet. Raises Rejected(SETTING) where there is one already.

        seed: makes the block hashes the same each time; without it nobody can know them before.
        params: further subnet settings, see `PARAMS`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = cls(path)
        secret = secrets.token_hex(32) if seed is None else hashlib.sha256(f"sn29 {seed}".encode()).hexdigest()
        facts = {
            "secret": secret,
            "netuid": netuid,
            "genesis": time.time(),
            "block_seconds": block_seconds,
            "finality_lag": finality_lag,
            "offset": 0,
            "head": 0,
        }
        with ledger._lock():
            if ledger._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise Rejected(Reason.SETTING, f"{path}, which exists", "a new file for a new chain")
            ledger._db.execute("CREATE TABLE chain (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
            ledger._db.execute(
                "CREATE TABLE storage (item TEXT, key TEXT, block INTEGER, value TEXT, PRIMARY KEY (item, key, block))"
                " WITHOUT ROWID"
            )
            ledger._db.execute(
                "CREATE TABLE extrinsic (block INTEGER, position INTEGER, signer TEXT, nonce INTEGER, call TEXT,"
                " signature TEXT, error TEXT, PRIMARY KEY (block, position)) WITHOUT ROWID"
            )
            ledger._db.executemany("INSERT INTO chain VALUES (?, ?)", facts.items())
            genesis = _Rows(ledger._db, 0)
            genesis.put("SubtensorModule.NetworksAdded", (netuid,), True)
            ledger._put_params(genesis, netuid, {"tempo": tempo, **params})
        return ledger._load()

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """The chain of an existing file. Raises Rejected(SETTING) when it is not there or not a chain."""
        if not path.is_file():
            raise Rejected(Reason.SETTING, f"{path}, which does not exist", "a chain that was created before")
        try:
            return cls(path)._load()
        except sqlite3.DatabaseError as error:
            raise Rejected(Reason.SETTING, f"{path} ({error})", "a chain's file") from error

    def _load(self) -> Ledger:
        facts = dict(self._db.execute("SELECT name, value FROM chain"))
        self.netuid = int(facts["netuid"])
        self.block_seconds = float(facts["block_seconds"])
        self.finality_lag = int(facts["finality_lag"])
        self._genesis = float(facts["genesis"])
        self._secret = bytes.fromhex(facts["secret"])
        return self

    def close(self) -> None:
        with self._mutex:
            self._db.close()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._mutex:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _tick(self) -> int:
        """The head, moved on by the clock, never back. Only under the lock."""
        facts = dict(self._db.execute("SELECT name, value FROM chain WHERE name IN ('offset', 'head')"))
        now = int((time.time() - self._genesis) // self.block_seconds) + facts["offset"]
        if now > facts["head"]:
            self._db.execute("UPDATE chain SET value = ? WHERE name = 'head'", (now,))
        return int(max(now, facts["head"]))

    # The clock

    def head(self) -> int:
        """The newest block. Nothing is ever added to it or to an older one."""
        with self._lock():
            return self._tick()

    def finalized(self) -> int:
        return max(0, self.head() - self.finality_lag)

    def advance(self, blocks: int) -> int:
        """Lets `blocks` blocks pass at once, for every process; returns the new head."""
        with self._lock():
            self._tick()
            self._db.execute("UPDATE chain SET value = value + ? WHERE name = 'offset'", (blocks,))
            return self._tick()

    def timestamp_ms(self, block: int) -> int:
        """The chain's own time of a block: its slot. `advance` moves it ahead of the wall clock."""
        return int((self._genesis + block * self.block_seconds) * 1000)

    def hash_of(self, block: int) -> str:
        """The block's hash: nobody without the file can know it before, and `number_of` can undo it."""
        body = hashlib.sha256(self._secret + block.to_bytes(8, "big")).digest()[:24]
        return "0x" + (body + self._masked(body, block.to_bytes(8, "big"))).hex()

    def number_of(self, block_hash: str) -> int | None:
        """The block with this hash; None when the chain has none."""
        raw = bytes.fromhex(block_hash.removeprefix("0x"))
        block = int.from_bytes(self._masked(raw[:24], raw[24:]), "big")
        return block if self.hash_of(block) == block_hash and block <= self.head() else None

    def _masked(self, body: bytes, number: bytes) -> bytes:
        mask = hashlib.sha256(self._secret + body).digest()
        return bytes(a ^ b for a, b in zip(number, mask, strict=False))

    # Setting up, without fees and signatures: in force from the next block on

    def register(self, hotkey: str, coldkey: str, *, stake: float = 0, permit: bool = False) -> int:
        """The hotkey's uid, from the next block on. Registering again keeps the uid and sets stake (TAO) and permit."""
        with self._lock():
            return register(self._next_block(), self.netuid, hotkey, coldkey, int(stake * _RAO), permit)

    def set_params(self, **params: int) -> None:
        """Changes subnet settings (see `PARAMS`) from the next block on."""
        with self._lock():
            self._put_params(self._next_block(), self.netuid, params)

    @staticmethod
    def _put_params(state: State, netuid: int, params: Mapping[str, int]) -> None:
        for name, value in params.items():
            if name not in PARAMS:
                raise Rejected(Reason.SETTING, name, " ".join(PARAMS))
            key = () if name == "stake_threshold" else (netuid,)
            state.put(PARAMS[name], key, value)

    # Reading and writing

    def read(self, block: int, ask: Callable[[State], T]) -> T:
        """What `ask` makes of the state at a block that exists."""
        with self._mutex:
            return ask(_Rows(self._db, block))

    def next_nonce(self, account: str) -> int:
        """The nonce that the account's next call must carry; counts calls that wait for the next block."""
        with self._lock():
            return int(self._next_block().get("System.Account", account)["nonce"])

    def payload(self, call: Call, nonce: int) -> bytes:
        """What the signer signs: the call, the nonce and this chain's identity."""
        return _encode([call.data.decode(), nonce, self.hash_of(0)]).encode()

    def submit(self, call: Call, signer: str, nonce: int, signature: bytes) -> Inclusion:
        """Takes a signed call into the next block. Raises InvalidTransaction (BadProof, Stale, Future)."""
        if not Keypair(ss58_address=signer).verify(self.payload(call, nonce), signature):
            raise InvalidTransaction("BadProof")
        with self._lock():
            state = self._next_block()
            account = state.get("System.Account", signer)
            if nonce != account["nonce"]:
                raise InvalidTransaction("Stale" if nonce < account["nonce"] else "Future")
            state.put("System.Account", (signer,), account | {"nonce": nonce + 1})
            error = None
            try:
                CALLS[call.module, call.function](state, signer, **call.params)
            except DispatchError as refusal:
                error = str(refusal)
            # Position 0 is the block's own timestamp, as on the chain.
            taken = self._db.execute("SELECT count(*) FROM extrinsic WHERE block = ?", (state.block,)).fetchone()[0]
            position = taken + 1
            row = (state.block, position, signer, nonce, call.data.decode(), signature.hex(), error)
            self._db.execute("INSERT INTO extrinsic VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return Inclusion(state.block, position, error)

    def _next_block(self) -> _Rows:
        """The state that the next block will have; open for writing until the lock is given back."""
        return _Rows(self._db, self._tick() + 1)


class LedgerSubstrate:
    """The part of the SDK's `Substrate` protocol that a miner and a validator use, on a ledger's file.

    Storage, runtime calls, constants and calls that the ledger does not have raise NotImplementedError naming them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: Ledger | None = None
        self.token_symbols: dict[int, str] = {}

    async def connect(self) -> None:
        if self._open is None:
            self._open = await asyncio.to_thread(Ledger.open, self._path)

    async def close(self) -> None:
        if self._open is not None:
            await asyncio.to_thread(self._open.close)
            self._open = None

    @property
    def _ledger(self) -> Ledger:
        if self._open is None:
            raise bt.ConnectionNotReady("the ledger is not open")
        return self._open

    async def _ask(self, work: Callable[..., T], *args: Any) -> T:
        """Runs in a thread: the file's lock may be held by another process."""
        try:
            return await asyncio.to_thread(work, *args)
        except sqlite3.Error as error:
            raise bt.RpcConnectionError(f"the ledger's file: {error}") from error

    async def _block_of(self, block_hash: str | None) -> int:
        if block_hash is None:
            return await self._ask(self._ledger.head)
        block = await self._ask(self._ledger.number_of, block_hash)
        if block is None:
            raise bt.ChainError(f"no block with hash {block_hash}")
        return block

    def balance(self, rao: int, netuid: int = 0) -> Any:
        return bt.Balance(rao, netuid)

    async def block_number(self) -> int:
        return await self._ask(self._ledger.head)

    async def finalized_block_number(self) -> int:
        return await self._ask(self._ledger.finalized)

    async def block_hash(self, block: int | None = None) -> str:
        head = await self._ask(self._ledger.head)
        if block is not None and not 0 <= block <= head:
            raise bt.ChainError(f"no block at height {block}")
        return self._ledger.hash_of(head if block is None else block)

    async def block_time(self) -> float:
        return self._ledger.block_seconds

    async def spec_version(self) -> int:
        return _SPEC_VERSION

    async def constant(self, module: str, name: str) -> Any:
        if (module, name) != ("Aura", "SlotDuration"):
            raise NotImplementedError(f"the ledger has no constant {module}.{name}")
        return round(self._ledger.block_seconds * 1000)

    async def query(
        self, module: str, storage_function: str, params: list[Key] | None = None, block_hash: str | None = None
    ) -> Any:
        return (await self.query_batch(module, storage_function, [params or []], block_hash))[0]

    async def query_batch(
        self, module: str, storage_function: str, param_sets: list[list[Key]], block_hash: str | None = None
    ) -> list[Any]:
        block = await self._block_of(block_hash)
        if (module, storage_function) == ("System", "Number"):
            return [block]
        if (module, storage_function) == ("Timestamp", "Now"):
            return [self._ledger.timestamp_ms(block)]
        item = _known(module, storage_function)
        return await self._ask(self._ledger.read, block, lambda state: [state.get(item, *key) for key in param_sets])

    async def query_map(
        self, module: str, storage_function: str, params: list[Key] | None = None, block_hash: str | None = None
    ) -> list[tuple[Any, Any]]:
        if (module, storage_function) == ("SubtensorModule", "TokenSymbol"):
            # Client.connect asks for it and lives without it, but would write an answer to a file in the user's home.
            raise bt.ChainError("the ledger keeps no token symbols")
        item, prefix = _known(module, storage_function), tuple(params or ())
        block = await self._block_of(block_hash)
        found = await self._ask(self._ledger.read, block, lambda state: state.items(item, *prefix))
        rests = [(key[len(prefix) :], value) for key, value in found]
        return [(rest[0] if len(rest) == 1 else rest, value) for rest, value in rests]

    async def map_has_entries(self, module: str, storage_function: str, params: list[Key], block_hash: str | None = None) -> bool:
        return bool(await self.query_map(module, storage_function, params, block_hash))

    async def runtime_call(self, api: str, method: str, params: list[Any], block_hash: str | None = None) -> Any:
        if (api, method) != ("SubnetInfoRuntimeApi", "get_metagraph"):
            raise NotImplementedError(f"the ledger has no runtime call {api}.{method}")
        block = await self._block_of(block_hash)
        return await self._ask(self._ledger.read, block, lambda state: get_metagraph(state, params[0]))

    async def compose(self, call: tuple[str, str, Mapping[str, Any]] | Call) -> Call:
        if isinstance(call, Call):
            return call
        module, function, params = call
        if (module, function) not in CALLS:
            raise NotImplementedError(f"the ledger has no call {module}.{function}")
        return Call(module, function, _plain(params))

    async def estimate_fee(self, call: Call, keypair: Any) -> Any:
        return bt.Balance(0, 0)

    async def account_next_index(self, address: str) -> int:
        return await self._ask(self._ledger.next_nonce, address)

    async def submit(
        self,
        call: Call,
        keypair: Any,
        *,
        nonce: int | None = None,
        period: int | None = None,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> Any:
        """Signs, submits and waits. `period` has no effect: a call is in the next block or refused."""
        ledger, signer = self._ledger, str(keypair.ss58_address)
        if nonce is None:
            nonce = await self.account_next_index(signer)
        signature = bytes(keypair.sign(ledger.payload(call, nonce)))
        try:
            included = await self._ask(ledger.submit, call, signer, nonce, signature)
        except InvalidTransaction as refusal:
            return _failed(str(refusal))
        if not (wait_for_inclusion or wait_for_finalization):
            return bt.ExtrinsicResult(success=True, message="submitted")
        reached = ledger.finalized if wait_for_finalization else ledger.head
        while await self._ask(reached) < included.block:
            await asyncio.sleep(min(ledger.block_seconds / 4, 0.5))
        where = {
            "block_hash": ledger.hash_of(included.block),
            "extrinsic_id": f"{included.block}-{included.position:04d}",
            "fee": bt.Balance(0, 0),
        }
        if included.error:
            return _failed(included.error, **where)
        return bt.ExtrinsicResult(success=True, message="Success", **where)


def _known(module: str, storage_function: str) -> str:
    item = f"{module}.{storage_function}"
    if item not in ITEMS:
        raise NotImplementedError(f"the ledger has no storage {item}")
    return item


def _failed(name: str, **where: Any) -> Any:
    error = bt.ChainError(name, name)
    return bt.ExtrinsicResult(success=False, message=name, error=error, **where)


def _plain(value: Any) -> Any:
    """A call's arguments as JSON values. Raises ValueError for a raw field that is not named for its length."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name.startswith("Raw") and isinstance(inner, bytes) and (name != f"Raw{len(inner)}" or len(inner) > 128):
                raise ValueError(f"a commitment's field {name} cannot hold {len(inner)} bytes")
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
