"""The node itself: a websocket server in a thread of its own, with the faults that a test asks for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import sqlite3
import threading
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from sn29.errors import Rejected
from sn29.localnet.ledger import Ledger
from sn29.localnet.text import default_cache

from .faults import Faults, Traffic
from .metadata import metadata
from .pool import Pool, RpcError, Status
from .rpc import Rpc
from .wire import Wire

_POLL_S = 0.02
_SILENT_LOG = logging.getLogger("loopback_node")
_SILENT_LOG.addHandler(logging.NullHandler())
_SILENT_LOG.propagate = False
_INTERNAL = (TypeError, ValueError, LookupError, NotImplementedError, Rejected, sqlite3.Error)
"""What a request may do to the node; it is answered as an internal error, as a node answers a panic of its runtime."""
_SUBMITS = ("author_submitExtrinsic", "author_submitAndWatchExtrinsic")


class _Drop(Exception):
    """The connection is to be cut without an answer."""


class _Mute(Exception):
    """The request is not to be answered."""


class LoopbackNode:
    """A node on 127.0.0.1 over a ledger's file. `with LoopbackNode(path) as node: node.url`.

    All methods and `faults` may be used from any thread while it runs; several nodes may serve one chain.
    """

    def __init__(self, path: Path, *, port: int = 0, beacon: Any = None, without: Collection[str] = ()) -> None:
        """without: storage items that the runtime lacks, "Pallet.Name"; the spec version is another one then."""
        self._path, self.port = Path(path), port
        self.faults, self.traffic = Faults(), Traffic()
        missing = sorted(set(without))
        # The SDK caches metadata by genesis and spec version, so every set of items needs a number of its own.
        spec = {(): 474, ("SubtensorModule.SubnetEpochConsensus",): 461}.get(tuple(missing))
        self._ledger = Ledger.open(self._path, beacon)
        raw = metadata(default_cache() / "metadata", self._ledger.block_seconds, missing)
        self._wire = Wire(raw, spec or 100 + sum(map(ord, "".join(missing))) % 300)
        self._connections: set[ServerConnection] = set()
        self._asked: dict[ServerConnection, float] = {}
        self._heads: dict[tuple[ServerConnection, str], bool] = {}
        self._watches: dict[str, Any] = {}
        self._ids = itertools.count(1)
        self._server: Server | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loopback node", daemon=True)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def spec_version(self) -> int:
        return self._wire.spec_version

    def __enter__(self) -> LoopbackNode:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    # What a test does to it

    def refuse(self, on: bool = True, *, cut: bool = False) -> None:
        """Stops or starts listening; `cut`: open connections are cut too."""
        self._do(self._refuse(on, cut))

    def drop(self) -> None:
        """Cuts all open connections now."""
        self._do(self._cut_all())

    def restart(self, down_s: float = 0.0) -> None:
        """Ends and comes back on the same port after `down_s` seconds, with an empty pool."""
        self._do(self._restart(down_s))

    def reorg(self, depth: int, *, readmit: bool = True, again: bool = False) -> None:
        """Replaces the newest `depth` blocks. readmit: their extrinsics go back to the pool, and into the next block. again:
        the first of the new blocks has them."""
        self._do(self._reorg(depth, readmit, again))

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    async def _refuse(self, on: bool, cut: bool) -> None:
        if on and self._server is not None:
            self._server.close(close_connections=False)
            self._server = None
        elif not on and self._server is None:
            await self._listen()
        if cut:
            await self._cut_all()

    async def _cut_all(self) -> None:
        for connection in list(self._connections):
            connection.transport.abort()

    async def _restart(self, down_s: float) -> None:
        await self._refuse(True, True)
        self._pool.forget()
        await asyncio.sleep(down_s)
        await self._refuse(False, False)

    async def _reorg(self, depth: int, readmit: bool, again: bool) -> None:
        self._pool.reorg(depth, readmit=readmit, again=again)

    # The server

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that started this one
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._pool = Pool(self._ledger, self._wire, self._path.with_name(self._path.name + ".wire"))
        self._rpc = Rpc(self._ledger, self._wire, self._pool, self.faults)
        await self._listen()
        clock = asyncio.create_task(self._clock())
        self._ready.set()
        await self._stop.wait()
        clock.cancel()
        await self._refuse(True, True)
        self._pool.close()
        self._ledger.close()

    async def _listen(self) -> None:
        self._server = await serve(
            self._connected, "127.0.0.1", self.port, process_request=self._handshake, compression=None, ping_interval=None,
            max_size=None, open_timeout=None, close_timeout=1, logger=_SILENT_LOG,
        )  # fmt: skip
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def _handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        if self.faults.silent_handshake:
            await asyncio.Event().wait()
        if self.faults.refusal in ("429", "403"):
            response = connection.respond(HTTPStatus(int(self.faults.refusal)), "too many requests from this address\n")
            if self.faults.retry_after is not None:
                response.headers["Retry-After"] = self.faults.retry_after
            return response
        return None

    async def _connected(self, connection: ServerConnection) -> None:
        self._connections.add(connection)
        self.traffic.connections += 1
        tasks: set[asyncio.Task[None]] = set()
        try:
            async for message in connection:
                task = asyncio.create_task(self._message(connection, message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except ConnectionClosed:
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._connections.discard(connection)
            self._asked.pop(connection, None)
            for watch in [key for key in self._heads if key[0] is connection]:
                del self._heads[watch]

    async def _message(self, connection: ServerConnection, message: str | bytes) -> None:
        self._asked[connection] = self._loop.time()
        frame = json.loads(message)
        frames = frame if isinstance(frame, list) else [frame]
        self.traffic.messages_in += 1
        self.traffic.bytes_in += len(message)
        for each in frames:
            call = ":" + str(each["params"][0]) if each["method"] == "state_call" else ""
            self.traffic.requests[each["method"] + call] += 1
        if self.faults.delay_s:
            await asyncio.sleep(self.faults.delay_s)
        try:
            answers = [self._answer(connection, each) for each in frames]
        except _Mute:
            return
        except _Drop:
            connection.transport.abort()
            return
        if self.faults.refusal == "1008" and not str(frames[0]["method"]).startswith("sn29_"):
            await connection.close(1008, "policy violation: too many requests")
            return
        await self._send(connection, answers if isinstance(frame, list) else answers[0])

    async def _send(self, connection: ServerConnection, answer: Any) -> None:
        text = json.dumps(answer, separators=(",", ":")).encode()
        left = self.faults.drop_after_bytes
        if left is not None and len(text) > left:
            self.faults.drop_after_bytes = None
            connection.transport.write(_frame_head(len(text)) + text[:left])
            connection.transport.close()
            return
        if left is not None:
            self.faults.drop_after_bytes = left - len(text)
        self.traffic.messages_out += 1
        self.traffic.bytes_out += len(text)
        with contextlib.suppress(ConnectionClosed):
            await connection.send(text, text=True)

    # Requests

    def _answer(self, connection: ServerConnection, frame: dict[str, Any]) -> dict[str, Any]:
        method, params = frame["method"], frame.get("params") or []
        reply = {"jsonrpc": "2.0", "id": frame.get("id")}
        control = method.startswith("sn29_")
        if self.faults.silent and not control:
            raise _Mute
        if self.faults.drop_requests > 0 and not control:
            self.faults.drop_requests -= 1
            raise _Drop
        try:
            if control:
                return reply | {"result": self._control(method, params)}
            self._check_policy()
            return reply | {"result": self._result(connection, method, params)}
        except RpcError as error:
            return reply | {"error": error.body}
        except _INTERNAL as error:
            return reply | {"error": {"code": -32603, "message": f"Internal error: {type(error).__name__}: {error}"}}

    def _check_policy(self) -> None:
        messages = {"-32004": "storage work rate limit exceeded", "-32005": "rate limit exceeded"}
        if self.faults.refusal in messages:
            data = {"policy": "loopback"} | ({} if self.faults.retry_after is None else {"retry_after": self.faults.retry_after})
            raise RpcError(int(self.faults.refusal), messages[self.faults.refusal], data)

    def _result(self, connection: ServerConnection, method: str, params: list[Any]) -> Any:
        if method in _SUBMITS:
            return self._submit(connection, method, bytes.fromhex(params[0][2:]))
        if method in ("chain_subscribeNewHeads", "chain_subscribeFinalizedHeads"):
            watch = f"head{next(self._ids)}"
            self._heads[connection, watch] = "Finalized" in method
            return watch
        if method in ("chain_unsubscribeNewHeads", "chain_unsubscribeFinalizedHeads"):
            return self._heads.pop((connection, params[0]), None) is not None
        if method == "author_unwatchExtrinsic":
            entry, tell = self._watches.pop(params[0], (None, None))
            if entry is not None and tell in entry.watchers:
                entry.watchers.remove(tell)
            return entry is not None
        return self._rpc.answer(method, params)

    def _submit(self, connection: ServerConnection, method: str, data: bytes) -> str:
        word = self.faults.submits.popleft() if self.faults.submits else "ok"
        if word == "drop_before":
            raise _Drop
        if word == "swallow":
            raise _Mute
        entry = self._pool.submit(data, word)
        if word == "drop_after":
            raise _Drop
        if word == "mute":
            raise _Mute
        if method == "author_submitExtrinsic":
            return entry.extrinsic.hash
        watch = f"watch{next(self._ids)}"

        def tell(status: Status) -> None:
            self._notify(connection, "author_extrinsicUpdate", watch, status)

        entry.watchers.append(tell)
        self._watches[watch] = (entry, tell)
        tell("future" if self._pool.is_future(entry) else "ready")
        return watch

    def _notify(self, connection: ServerConnection, method: str, watch: str, result: Any) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": {"subscription": watch, "result": result}}
        # Not at once: the answer with the subscription's name goes first.
        self._loop.call_soon(lambda: self._loop.create_task(self._send(connection, message)))

    def _control(self, method: str, params: list[Any]) -> Any:
        """For a test in another process: `sn29_fault [name, value]` and `sn29_traffic []`."""
        if method == "sn29_traffic":
            return vars(self.traffic) | {"requests": dict(self.traffic.requests)}
        name, value = (*params, None)[:2]
        actions = {
            "drop": lambda: self._cut_all(),
            "refuse": lambda: self._refuse(bool(value), False),
            "restart": lambda: self._restart(float(value or 0)),
            "reorg": lambda: self._reorg(int(value), True, False),
        }
        if name in actions:
            self._loop.call_later(0.01, lambda: self._loop.create_task(actions[name]()))
        elif name == "clear":
            self.faults.clear()
        else:
            self.faults.set(name, value)
        return True

    # Time

    async def _clock(self) -> None:
        """Lets the pool and the subscriptions see the blocks that pass."""
        seen = {False: self._rpc.head(), True: self._rpc.finalized()}
        while True:
            await asyncio.sleep(_POLL_S)
            await self._hang_up_on_the_idle()
            with contextlib.suppress(*_INTERNAL):
                self._see_blocks(seen)

    async def _hang_up_on_the_idle(self) -> None:
        for connection, asked in list(self._asked.items()):
            if self.faults.idle_s is not None and self._loop.time() - asked > self.faults.idle_s:
                self._asked.pop(connection, None)
                await connection.close(1000)

    def _see_blocks(self, seen: dict[bool, int]) -> None:
        """seen: the last announced block, of the finalized ones (True) and of all."""
        if len(self._pool):
            self._pool.tick()
        for finalized in (False, True) if self._heads else ():
            now = self._rpc.finalized() if finalized else self._rpc.head()
            for block in range(max(seen[finalized] + 1, now - 50), now + 1):
                self._announce(block, finalized)
            seen[finalized] = now

    def _announce(self, block: int, finalized: bool) -> None:
        header = self._rpc.header(self._ledger.hash_of(block))
        method = "chain_finalizedHead" if finalized else "chain_newHead"
        for (connection, watch), wants_finalized in list(self._heads.items()):
            if wants_finalized == finalized:
                self._notify(connection, method, watch, header)


def _frame_head(size: int) -> bytes:
    """The head of a text message of `size` bytes, sent whole by a server (RFC 6455, section 5.2)."""
    if size < 126:
        return bytes([0x81, size])
    if size < 1 << 16:
        return bytes([0x81, 126]) + size.to_bytes(2, "big")
    return bytes([0x81, 127]) + size.to_bytes(8, "big")
