"""Signed extrinsics between their submission and their finality: checked, held, included, retracted, told to watchers."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sn29.localnet.ledger import Call, InvalidTransaction, Ledger
from sn29.localnet.pallets import CALLS

from .wire import BadExtrinsic, Extrinsic, Wire

Status = str | dict[str, str]
Tell = Callable[[Status], None]
"""Called with each status of a watched extrinsic, as the wire has it: "ready", "future", {"inBlock": hash}, ..."""
_LATE_BLOCKS = 3


class RpcError(Exception):
    """An answer that is a JSON-RPC error."""

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(message)
        self.body = {"code": code, "message": message} | ({} if data is None else {"data": data})


def _invalid(why: str) -> RpcError:
    return RpcError(1010, "Invalid Transaction", why)


@dataclass
class Entry:
    """An extrinsic that the node knows and that is not final."""

    extrinsic: Extrinsic
    dies: float
    """The first block that can no longer take it."""
    due: int | None = 0
    """The first block that may take it; None: none ever will."""
    block: int | None = None
    """The block that took it."""
    told: bool = False
    """Whether the watchers were told of that block."""
    watchers: list[Tell] = field(default_factory=list)

    def tell(self, status: Status) -> None:
        for watcher in self.watchers:
            watcher(status)


class Pool:
    """The node's pool. What it includes is in the ledger at once, in the block that comes next."""

    def __init__(self, ledger: Ledger, wire: Wire, path: Path) -> None:
        """path: a file beside the chain that keeps the included extrinsics' bytes, which the ledger does not."""
        self._ledger, self._wire = ledger, wire
        self._entries: dict[str, Entry] = {}
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")  # belongs to tests; nothing of it need outlive the machine
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS wire"
            " (signer TEXT, nonce INTEGER, call BLOB, data BLOB, PRIMARY KEY (signer, nonce, call))"
        )

    def close(self) -> None:
        self._db.close()

    def __len__(self) -> int:
        return len(self._entries)

    # In

    def submit(self, data: bytes, how: str = "ok") -> Entry:
        """Takes an extrinsic. how: ok, late:N, never, twice (see Faults.submits). Raises RpcError."""
        try:
            extrinsic = self._wire.extrinsic(data)
        except BadExtrinsic as error:
            raise RpcError(1002, f"Verification Error: {error}") from error
        if extrinsic.hash in self._entries and self._waits(self._entries[extrinsic.hash]):
            raise RpcError(1013, "Transaction Already Imported", [extrinsic.hash])
        head = self._ledger.head()
        self._check(extrinsic, head)
        entry = Entry(extrinsic, extrinsic.dies(head + 1))
        word, _, blocks = how.partition(":")
        if word == "never":
            entry.due = None
        elif word == "late":
            entry.due = head + 1 + int(blocks or _LATE_BLOCKS)
        elif extrinsic.nonce == self._ledger.next_nonce(extrinsic.signer):
            self._include(entry)
            if word == "twice":
                self._include_again(extrinsic)
        self._entries[extrinsic.hash] = entry
        return entry

    def _waits(self, entry: Entry) -> bool:
        """Whether it is still in the pool, as seen from outside: no closed block has it."""
        return entry.block is None or entry.block > self._ledger.head()

    def _check(self, extrinsic: Extrinsic, head: int) -> None:
        if (extrinsic.call.module, extrinsic.call.function) not in CALLS:
            raise RpcError(-32000, f"the loopback node has no call {extrinsic.call.module}.{extrinsic.call.function}")
        birth = self._ledger.hash_of(min(extrinsic.birth(head + 1), head))
        if not self._wire.signed_by_signer(extrinsic, self._ledger.hash_of(0), birth):
            raise _invalid("Transaction has a bad signature")
        place = (extrinsic.signer, extrinsic.nonce)
        if any((e.extrinsic.signer, e.extrinsic.nonce) == place and self._waits(e) for e in self._entries.values()):
            raise RpcError(1014, "Priority is too low: (0 vs 0)", "The transaction has too low priority to replace another")
        if extrinsic.nonce < self._ledger.next_nonce(extrinsic.signer):
            raise _invalid("Transaction is outdated")

    def _include(self, entry: Entry) -> None:
        extrinsic = entry.extrinsic
        try:
            entry.block = self._ledger.include(extrinsic.call, extrinsic.signer, extrinsic.nonce).block
        except InvalidTransaction as refusal:  # somebody else used the nonce just now
            if str(refusal) == "Stale":
                raise _invalid("Transaction is outdated") from refusal
            return
        key = (extrinsic.signer, extrinsic.nonce, extrinsic.call.data)
        self._db.execute("INSERT OR REPLACE INTO wire VALUES (?, ?, ?, ?)", (*key, extrinsic.data))

    def _include_again(self, extrinsic: Extrinsic) -> None:
        try:
            self._ledger.include(extrinsic.call, extrinsic.signer, extrinsic.nonce)
        except InvalidTransaction:
            return
        raise AssertionError("the ledger took the same extrinsic twice")

    # Out

    def next_nonce(self, account: str) -> int:
        """The account's next nonce, counting what waits here in a row."""
        waiting = {e.extrinsic.nonce for e in self._entries.values() if e.block is None and e.extrinsic.signer == account}
        nonce = self._ledger.next_nonce(account)
        while nonce in waiting:
            nonce += 1
        return nonce

    def waiting(self) -> list[bytes]:
        """The bytes of all that no closed block has."""
        return [entry.extrinsic.data for entry in self._entries.values() if self._waits(entry)]

    def is_future(self, entry: Entry) -> bool:
        """Whether it waits for an earlier nonce."""
        return entry.block is None and entry.extrinsic.nonce > self._ledger.next_nonce(entry.extrinsic.signer)

    def data_of(self, call: Call, signer: str, nonce: int) -> bytes:
        """The bytes of an extrinsic that a block has."""
        sql = "SELECT data FROM wire WHERE (signer, nonce, call) = (?, ?, ?)"
        row = self._db.execute(sql, (signer, nonce, call.data)).fetchone()
        return bytes(row[0]) if row else self._wire.stand_in(call, signer, nonce)

    # Time

    def tick(self) -> None:
        """What blocks have passed since: held ones are included, watchers told, final ones forgotten."""
        head = self._ledger.head()
        for entry in sorted(self._entries.values(), key=lambda e: e.extrinsic.nonce):
            if entry.block is None:
                self._offer(entry, head)
            if entry.block is not None and entry.block <= head and not entry.told:
                entry.told = True
                entry.tell({"inBlock": self._ledger.hash_of(entry.block)})
            if entry.block is not None and entry.block <= self._ledger.finalized():
                entry.tell({"finalized": self._ledger.hash_of(entry.block)})
                del self._entries[entry.extrinsic.hash]

    def _offer(self, entry: Entry, head: int) -> None:
        """Includes it if it is due, drops it if it can no longer be."""
        extrinsic = entry.extrinsic
        nonce = self._ledger.next_nonce(extrinsic.signer)
        if head + 1 >= entry.dies or extrinsic.nonce < nonce:
            entry.tell("invalid")
            del self._entries[extrinsic.hash]
        elif entry.due is not None and entry.due <= head + 1 and extrinsic.nonce == nonce:
            with contextlib.suppress(RpcError):  # used up just now by somebody else: the next tick drops it
                self._include(entry)

    def reorg(self, depth: int, *, readmit: bool, again: bool) -> None:
        """Replaces the newest blocks; what they had is retracted, and taken again by the next block if `readmit`, or by the
        first of the new ones if `again`."""
        self._ledger.fork(depth, again=again)
        head = self._ledger.head()
        for entry in list(self._entries.values()):
            block = self._block_of(entry, max(1, head - depth))
            if entry.block is not None and entry.block > head - depth and (again or block is None):
                entry.tell({"retracted": self._ledger.hash_of(min(entry.block, head))})
                entry.block, entry.told, entry.due = block, False, 0
                if block is None and not readmit:
                    del self._entries[entry.extrinsic.hash]

    def _block_of(self, entry: Entry, first: int) -> int | None:
        """The block that has it, from `first` to the next one."""
        wanted = (entry.extrinsic.signer, entry.extrinsic.nonce)
        blocks = range(first, self._ledger.head() + 2)
        return next((b for b in blocks if wanted in [(one.signer, one.nonce) for one in self._ledger.extrinsics(b)]), None)

    def forget(self) -> None:
        """What a node loses when it ends: everything that no block has, and all watchers."""
        for entry in list(self._entries.values()):
            entry.watchers.clear()
            if entry.block is None:
                del self._entries[entry.extrinsic.hash]
