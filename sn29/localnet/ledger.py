"""An embedded chain: one SQLite file that stands behind the SDK's public `Substrate` protocol.

`Ledger` is the file with its clock and its history, `LedgerSubstrate` what `bittensor.Client(substrate=...)` talks to;
the rules are in `pallets`. Any number of processes may open the same file at once.

Blocks come from the wall clock, and a block is closed as soon as anybody may have seen its number: every look at the
clock and every write takes the file's one write lock, and what is written at head h belongs to block h + 1. State is
kept as rows (item, key, block, value), so every past block can be read as it was. What blocks do by themselves (open
sealed weights) is done when somebody first sees that they have passed, at the blocks to which it belongs.

The newest blocks are not final and can be replaced (`fork`), as on a public chain.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import bittensor as bt
import bittensor_core
from bittensor.keyfiles import Keypair

from sn29.errors import Reason, Rejected
from sn29.localnet.pallets import (
    CALLS,
    DERIVED,
    ITEMS,
    MAX_SEALED_BYTES,
    PARAMS,
    RUNTIME_CALLS,
    DispatchError,
    Key,
    Row,
    State,
    create_subnet,
    decode_row,
    register,
    reveal_weights,
    set_param,
    trigger_epoch,
)

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


class Beacon(Protocol):
    """A drand beacon: what weights are sealed for. The public one's signatures cannot be had without a network."""

    def signature(self, reveal_round: int) -> str | None:
        """The signature of a round, in hex; None when that round was not published."""


@dataclass(frozen=True, slots=True)
class Inclusion:
    """Where a signed call landed, and the pallet's error if it was refused there."""

    block: int
    position: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Included:
    """A call in a block. Positions count from 1: 0 is the block's own timestamp, as on the chain."""

    position: int
    signer: str
    nonce: int
    call: Call
    error: str | None


def _encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


class _Rows:
    """`State` on the ledger's rows: reads the newest value at or before `block`, writes at `block`."""

    def __init__(self, db: sqlite3.Connection, block: int) -> None:
        self._db, self.block = db, block

    def get(self, item: str, *key: Key) -> Any:
        if item in DERIVED:
            return DERIVED[item](self, *key)  # type: ignore[arg-type]  # their only key is a netuid
        row = self._db.execute(
            "SELECT value FROM storage WHERE item = ? AND key = ? AND block <= ? ORDER BY block DESC LIMIT 1",
            (item, _encode(key), self.block),
        ).fetchone()
        value = json.loads(row[0]) if row else None
        return ITEMS[item] if value is None else value

    def items(self, item: str, *prefix: Key) -> list[tuple[tuple[Key, ...], Any]]:
        if item in DERIVED:
            return [(key, self.get(item, *key)) for key, _ in self.items("SubtensorModule.NetworksAdded", *prefix)]
        start = _encode(prefix)[:-1] + ("," if prefix else "")
        rows = self._db.execute(
            "SELECT key, value, max(block) FROM storage WHERE item = ? AND key >= ? AND key < ? AND block <= ? GROUP BY key",
            (item, start, start + "\U0010ffff", self.block),
        )
        return [(tuple(json.loads(key)), json.loads(value)) for key, value, _ in rows if value != "null"]

    def put(self, item: str, key: tuple[Key, ...], value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO storage VALUES (?, ?, ?, ?)", (item, _encode(key), self.block, _encode(value)))


class _Pulses:
    """What this chain knows of its beacon (`pallets.Drand`)."""

    def __init__(self, beacon: Beacon | None, genesis: float, block_seconds: float) -> None:
        self._beacon, self._genesis, self._block_seconds = beacon, genesis, block_seconds

    def block_of(self, reveal_round: int) -> int:
        """The first block whose time is that of the round or later."""
        seconds = float(bt.timelock.reveal_time(reveal_round).timestamp()) - self._genesis
        return max(0, math.ceil(seconds / self._block_seconds))

    def signature(self, reveal_round: int) -> str | None:
        """Raises Rejected(SETTING) without a beacon: to drop what others could open would be another chain."""
        if self._beacon is None:
            raise Rejected(Reason.SETTING, "sealed weights that are due", "a chain opened with the beacon they were sealed for")
        return self._beacon.signature(reveal_round)

    def unseal(self, sealed: str, signature: str) -> Row | None:
        """The row in a commit (0x hex); None when the signature does not open it or it is no row."""
        commit = bytes.fromhex(sealed.removeprefix("0x"))
        # As the SDK wraps it: SCALE bytes, then the round, which the signature makes superfluous.
        envelope = (len(commit) << 2 | 1).to_bytes(2, "little") + commit + bytes(8)
        try:
            payload = bytes(bittensor_core.decrypt_with_signature(envelope, signature))
        except ValueError:
            return None
        return decode_row(payload, bittensor_core.ss58_encode)


class Ledger:
    """The chain's file. Synchronous and safe to use from several threads and processes."""

    def __init__(self, path: Path, beacon: Beacon | None = None) -> None:
        """Use `create` or `open`."""
        self._beacon = beacon
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
        beacon: Beacon | None = None,
        **params: int,
    ) -> Ledger:
        """A new chain with one empty subnet. Raises Rejected(SETTING) where there is one already.

        seed: makes the block hashes the same each time; without it nobody can know them before.
        beacon: opens sealed weights; without it commit-reveal cannot be turned on. The SDK seals for a moment some three
        blocks into the reveal epoch, in steps of 3 s: on a fast chain an epoch must be longer than that, or is missed.
        params: further subnet settings, see `PARAMS`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = cls(path, beacon)
        secret = secrets.token_hex(32) if seed is None else hashlib.sha256(f"sn29 {seed}".encode()).hexdigest()
        facts = {
            "secret": secret,
            "netuid": netuid,
            "genesis": time.time(),
            "block_seconds": block_seconds,
            "finality_lag": finality_lag,
            "offset": 0,
            "head": 0,
            "settled": 0,
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
            # One row for every time that the newest blocks were replaced: the first of them.
            ledger._db.execute("CREATE TABLE fork (block INTEGER)")
            ledger._db.executemany("INSERT INTO chain VALUES (?, ?)", facts.items())
            genesis = _Rows(ledger._db, 0)
            create_subnet(genesis, netuid)
            ledger._put_params(genesis, netuid, {"tempo": tempo, **params})
        return ledger._load()

    @classmethod
    def open(cls, path: Path, beacon: Beacon | None = None) -> Ledger:
        """The chain of an existing file. Raises Rejected(SETTING) when it is not there or not a chain.

        beacon: needed where sealed weights may come to be opened; without it that raises Rejected(SETTING).
        """
        if not path.is_file():
            raise Rejected(Reason.SETTING, f"{path}, which does not exist", "a chain that was created before")
        try:
            return cls(path, beacon)._load()
        except sqlite3.DatabaseError as error:
            raise Rejected(Reason.SETTING, f"{path} ({error})", "a chain's file") from error

    def _load(self) -> Ledger:
        facts = dict(self._db.execute("SELECT name, value FROM chain"))
        if "settled" not in facts:
            raise sqlite3.DatabaseError("made by an older version: remove the localnet's folder")
        self.netuid = int(facts["netuid"])
        self.block_seconds = float(facts["block_seconds"])
        self.finality_lag = int(facts["finality_lag"])
        self._genesis = float(facts["genesis"])
        self._secret = bytes.fromhex(facts["secret"])
        self._pulses = _Pulses(self._beacon, self._genesis, self.block_seconds)
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
        facts = dict(self._db.execute("SELECT name, value FROM chain WHERE name IN ('offset', 'head', 'settled')"))
        now = int((time.time() - self._genesis) // self.block_seconds) + facts["offset"]
        head = max(now, facts["head"])
        if head > facts["head"]:
            self._set_fact("head", head)
        # The next block begins before anything is written in it.
        if head + 1 > facts["settled"]:
            reveal_weights(self._at, self.netuid, facts["settled"] + 1, head + 1, self._pulses)
            self._set_fact("settled", head + 1)
        return int(head)

    def _set_fact(self, name: str, value: int) -> None:
        self._db.execute("UPDATE chain SET value = ? WHERE name = ?", (value, name))

    def _at(self, block: int) -> _Rows:
        return _Rows(self._db, block)

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

    def fork(self, depth: int, *, again: bool = False) -> tuple[Included, ...]:
        """Replaces the newest `depth` blocks by empty ones: the head keeps its number, and their hashes change.

        What was written in them is undone, nonces and settings included, and so is what waits for the next block.
        again: the first of the new blocks has all of the undone calls, so that they stand in an older one than before.
        Returns the calls that were undone, oldest first. Raises Rejected(SETTING) for a block that is final.
        """
        if not 0 < depth <= self.finality_lag:
            raise Rejected(Reason.SETTING, f"{depth} blocks", f"1 to {self.finality_lag}, which are not final")
        with self._lock():
            first = max(1, self._tick() - depth + 1)
            undone = self._included("block >= ?", first)
            for table in ("storage", "extrinsic"):
                self._db.execute(f"DELETE FROM {table} WHERE block >= ?", (first,))
            self._db.execute("INSERT INTO fork VALUES (?)", (first,))
            for one in undone if again else ():
                self._execute(self._at(first), one.call, one.signer, one.nonce, "")
            self._set_fact("settled", first - 1)
            self._tick()
        return undone

    def timestamp_ms(self, block: int) -> int:
        """The chain's own time of a block: its slot. `advance` moves it ahead of the wall clock."""
        return int((self._genesis + block * self.block_seconds) * 1000)

    def hash_of(self, block: int) -> str:
        """The block's hash: nobody without the file can know it before, and `number_of` can undo it."""
        number = block.to_bytes(8, "big")
        with self._mutex:
            forks = self._db.execute("SELECT count(*) FROM fork WHERE block <= ?", (block,)).fetchone()[0]
        again = forks.to_bytes(8, "big") if forks else b""
        body = hashlib.sha256(self._secret + number + again).digest()[:24]
        return "0x" + (body + self._masked(body, number)).hex()

    def number_of(self, block_hash: str) -> int | None:
        """The block with this hash; None when the chain has none, or has replaced it."""
        raw = bytes.fromhex(block_hash.removeprefix("0x"))
        block = int.from_bytes(self._masked(raw[:24], raw[24:]), "big")
        return block if block <= self.head() and self.hash_of(block) == block_hash else None

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

    def _put_params(self, state: State, netuid: int, params: Mapping[str, int]) -> None:
        for name, value in params.items():
            if name not in PARAMS:
                raise Rejected(Reason.SETTING, name, " ".join(PARAMS))
            if name == "commit_reveal" and value and self._beacon is None:
                raise Rejected(Reason.SETTING, "commit_reveal", "a chain opened with a beacon: there is no drand here")
            set_param(state, netuid, name, value)

    def trigger_epoch(self, blocks: int) -> None:
        """An epoch `blocks` blocks after the next block, as the subnet's owner may ask. Raises Rejected(SETTING)."""
        with self._lock():
            try:
                trigger_epoch(self._next_block(), self.netuid, blocks)
            except DispatchError as refusal:
                raise Rejected(Reason.SETTING, str(refusal), "an epoch that is not near, without commit-reveal") from refusal

    # Reading and writing

    def read(self, block: int, ask: Callable[[State], T]) -> T:
        """What `ask` makes of the state at a block that exists."""
        with self._mutex:
            return ask(self._at(block))

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
        return self._include(call, signer, nonce, signature.hex())

    def include(self, call: Call, signer: str, nonce: int) -> Inclusion:
        """The same for a front that has checked a signature of its own. Raises InvalidTransaction (Stale, Future)."""
        return self._include(call, signer, nonce, "")

    def _include(self, call: Call, signer: str, nonce: int, signature: str) -> Inclusion:
        with self._lock():
            return self._execute(self._next_block(), call, signer, nonce, signature)

    def _execute(self, state: _Rows, call: Call, signer: str, nonce: int, signature: str) -> Inclusion:
        rule = _rule(call.module, call.function)
        account = state.get("System.Account", signer)
        if nonce != account["nonce"]:
            raise InvalidTransaction("Stale" if nonce < account["nonce"] else "Future")
        state.put("System.Account", (signer,), account | {"nonce": nonce + 1})
        error = None
        try:
            rule(state, signer, **call.params)
        except DispatchError as refusal:
            error = str(refusal)
        # Position 0 is the block's own timestamp, as on the chain.
        position = 1 + self._db.execute("SELECT count(*) FROM extrinsic WHERE block = ?", (state.block,)).fetchone()[0]
        row = (state.block, position, signer, nonce, call.data.decode(), signature, error)
        self._db.execute("INSERT INTO extrinsic VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return Inclusion(state.block, position, error)

    def extrinsics(self, block: int) -> tuple[Included, ...]:
        """The calls in a block, in their order."""
        with self._mutex:
            return self._included("block = ?", block)

    def _included(self, where: str, block: int) -> tuple[Included, ...]:
        rows = self._db.execute(
            f"SELECT position, signer, nonce, call, error FROM extrinsic WHERE {where} ORDER BY block, position", (block,)
        )
        return tuple(Included(at, signer, nonce, Call(**json.loads(call)), error) for at, signer, nonce, call, error in rows)

    def _next_block(self) -> _Rows:
        """The state that the next block will have; open for writing until the lock is given back."""
        return self._at(self._tick() + 1)


class LedgerSubstrate:
    """The part of the SDK's `Substrate` protocol that a miner and a validator use, on a ledger's file.

    Storage, runtime calls, constants and calls that the ledger does not have raise NotImplementedError naming them.
    """

    def __init__(self, path: Path, beacon: Beacon | None = None) -> None:
        self._path, self._beacon = path, beacon
        self._open: Ledger | None = None
        self.token_symbols: dict[int, str] = {}

    async def connect(self) -> None:
        if self._open is None:
            self._open = await asyncio.to_thread(Ledger.open, self._path, self._beacon)

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
        if (api, method) not in RUNTIME_CALLS:
            raise NotImplementedError(f"the ledger has no runtime call {api}.{method}")
        block = await self._block_of(block_hash)
        return await self._ask(self._ledger.read, block, lambda state: RUNTIME_CALLS[api, method](state, *params))

    async def compose(self, call: tuple[str, str, Mapping[str, Any]] | Call) -> Call:
        if isinstance(call, Call):
            return call
        module, function, params = call
        _rule(module, function)
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


def _rule(module: str, function: str) -> Callable[..., None]:
    if (module, function) not in CALLS:
        raise NotImplementedError(f"the ledger has no call {module}.{function}")
    return CALLS[module, function]


def _known(module: str, storage_function: str) -> str:
    item = f"{module}.{storage_function}"
    if item not in ITEMS:
        raise NotImplementedError(f"the ledger has no storage {item}")
    return item


def _failed(name: str, **where: Any) -> Any:
    error = bt.ChainError(name, name)
    return bt.ExtrinsicResult(success=False, message=name, error=error, **where)


def _fits(name: str, size: int) -> bool:
    """Whether the chain's type for a call's field takes so many bytes."""
    if name.startswith("Raw"):
        return name == f"Raw{size}" and size <= 128
    return size <= _LONGEST.get(name, size)


_LONGEST = {"BigRaw": 512, "encrypted": 1024, "commit": MAX_SEALED_BYTES}


def _plain(value: Any) -> Any:
    """A call's arguments as JSON values. Raises ValueError for bytes that do not fit where they are put."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(inner, bytes) and not _fits(name, len(inner)):
                raise ValueError(f"the field {name} cannot hold {len(inner)} bytes")
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
