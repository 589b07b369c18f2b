"""Connections to one chain through several endpoints, on our own deadlines: below `chain`, above `bittensor.Client`.

The SDK waits a minute and five times over for a silent endpoint, so every connection here has exactly one address, and
changing to the next one is done here. An endpoint that fails is shunned for a while; so is one that stands still, or that
has not the newest block that is known to be final, also when it is the only one: what it would say is over. A refusal for
too much traffic is no failure: asking elsewhere would be more of what was refused, so that is waited for. An endpoint that
shuts us out is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import bittensor as bt
from bittensor._transport.errors import StateDiscardedError, StorageFunctionNotFound, SubstrateRequestException

from sn29.records import Head

T = TypeVar("T")

FAILURES = (OSError, bt.BittensorError, StorageFunctionNotFound)
"""What the SDK raises when the chain does not answer or refuses; TimeoutError is an OSError. The rest are bugs."""
SHUN_S = 300.0
"""Seconds for which an endpoint that failed is asked last."""
PAUSE_S = 12.0
"""Seconds to leave an endpoint in peace that does not say for how long it refuses traffic: one block of finney."""
STUCK_BLOCKS = 10
"""An endpoint whose newest block, or newest final block, does not move for so many blocks' time is left."""
_SHUT = (403, 1008)
"""HTTP status and websocket code of an endpoint that does not want us, now or later; others say: too much at once."""
_KEPT_HASHES = 1024
_PAGE = 1000
"""Keys of a storage map per request: the most that a node gives."""
_DEFAULTS: Mapping[tuple[str, str], Any] = {("SubtensorModule", "SubnetEpochConsensus"): "Yuma"}
"""Storage that the SDK's SetWeights asks for and that older runtimes lack, with how these behave: Yuma was all there was."""


class NoBlock(bt.ChainError):  # type: ignore[misc]
    """The endpoint has no block of this height."""

    def __init__(self, block: int) -> None:
        super().__init__(f"no block at height {block}")
        self.block = block


class Rpc(bt.RpcSubstrate):  # type: ignore[misc]  # the SDK's classes are untyped to us
    """The SDK's connection to one address, with three of its habits mended."""

    def __init__(self, address: str) -> None:
        super().__init__(address, fallback_endpoints=[], archive_endpoints=[])
        self._hashes: dict[int, str] = {}
        self._final = -1

    async def finalized_block_number(self) -> int:
        found = await self._read(lambda raw: raw.get_chain_finalised_head())
        self._final = int(await self._read(lambda raw: raw.get_block_number(found)))
        self._keep(self._final, str(found))
        return self._final

    async def block_hash(self, block: int | None = None) -> str:
        """The SDK remembers the hash of a block that included a write of ours, even when that block is replaced later, and
        would go on reading from it. Here only hashes of final blocks are kept."""
        if block is None:
            return str(await super().block_hash())
        if block not in self._hashes:
            found = await self._read(lambda raw: raw.rpc_request("chain_getBlockHash", [block]))
            if found is None:
                raise NoBlock(block)
            if block > self._final:
                return str(found)
            self._keep(block, str(found))
        return self._hashes[block]

    def _keep(self, block: int, block_hash: str) -> None:
        while len(self._hashes) >= _KEPT_HASHES:
            self._hashes.pop(next(iter(self._hashes)))
        self._hashes[block] = block_hash

    async def query(
        self, module: str, storage_function: str, params: list[Any] | None = None, block_hash: str | None = None
    ) -> Any:
        try:
            return await super().query(module, storage_function, params, block_hash)
        except StorageFunctionNotFound:
            if (module, storage_function) in _DEFAULTS:
                return _DEFAULTS[module, storage_function]
            raise

    async def query_map(
        self, module: str, storage_function: str, params: list[Any] | None = None, block_hash: str | None = None
    ) -> list[tuple[Any, Any]]:
        """Large pages, and an entry that cannot be decoded is None instead of the end of the whole answer.

        Not asked for are the token symbols: the client wants them on connecting, for display, and can do without.
        """
        if (module, storage_function) == ("SubtensorModule", "TokenSymbol"):
            raise bt.ChainError("token symbols are not used")

        async def pages(raw: Any) -> list[tuple[Any, Any]]:
            found = await raw.query_map(
                module, storage_function, params or [], block_hash, page_size=_PAGE, ignore_decoding_errors=True
            )
            return [(key[0] if isinstance(key, tuple | list) and len(key) == 1 else key, value) async for key, value in found]

        return list(await self._read(pages))


class Link:
    """One open connection."""

    def __init__(self, address: str, network: str, substrate: Any) -> None:
        self.address = address
        self.substrate = substrate
        self.client = bt.Client(network, substrate=substrate)

    async def query(self, item: Any, params: list[Any], block_hash: str | None) -> Any:
        """One storage item at a block's hash: unlike the client's own, without asking for the hash again."""
        return await self.substrate.query(item[0], item[1], params, block_hash=block_hash)


class Endpoints:
    """The endpoints of one chain in order of preference; at most one of them is connected."""

    def __init__(
        self, network: str, makers: Mapping[str, Callable[[], Any]], deadline_s: float, *, pause_s: float = PAUSE_S
    ) -> None:
        """makers: what makes a `Substrate` for each address. deadline_s: seconds that one question may take in all.

        pause_s: seconds to leave an endpoint in peace that refuses traffic and does not say for how long.
        """
        self._network, self._makers, self._deadline_s, self._pause_s = network, makers, deadline_s, pause_s
        self._shunned: dict[str, float] = {}
        self._refused: dict[str, tuple[float, str]] = {}
        self._refusals: Counter[str] = Counter()
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}  # (address, what) -> (highest block, when first seen)
        self._final: Head | None = None
        self._link: Link | None = None
        self._opening = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self.genesis: str | None = None
        """Hash of block 0, once an endpoint has told it; endpoints of another chain are refused from then on."""

    def __len__(self) -> int:
        return len(self._makers)

    @property
    def addresses(self) -> tuple[str, ...]:
        """In order of preference."""
        return tuple(self._makers)

    async def close(self) -> None:
        """Disconnects; does not wait longer than 5 s for dead connections."""
        link, self._link = self._link, None
        if link is not None:
            self._close_soon(link)
        if self._closing:
            await asyncio.wait(self._closing, timeout=5)

    async def renew(self) -> None:
        """Ends the connection, so that the next question opens one that knows the runtime of then."""
        if self._link is not None:
            await self._leave(self._link)

    async def ask(self, question: Callable[[Link], Awaitable[T]], *, hop: bool = True) -> T:
        """The first endpoint's answer, asked once of each until one gives it; they share the deadline.

        hop: without it only one endpoint is asked, with all of the time: for writes. Raises one of FAILURES.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + self._deadline_s
        tries = len(self) if hop else 1
        while True:
            await self._wait_until_welcome(end)
            used: list[Link] = []
            try:
                return await bounded(self._through(question, used), max(0.0, end - clock()) / tries)
            except bt.RpcPolicyError as refusal:
                if used and await self._is_waited_for(used[0], refusal):
                    if not hop:
                        raise
                    continue
                tries -= 1
                if not tries or clock() >= end:
                    raise
            except FAILURES as error:
                lost = is_transport(error) or self._is_behind(error)
                if used and lost:
                    self._shun(used[0].address)
                    await self._leave(used[0])
                tries -= 1
                if not lost or not tries or clock() >= end:
                    raise

    async def newest(self, link: Link) -> Head:
        """The endpoint's newest block. Raises RpcConnectionError where that stands still, or is older than what is final."""
        asked, known = time.monotonic(), self._final
        block = int(await link.client.block())
        if known is not None and block < known.block:
            raise bt.RpcConnectionError(f"{link.address} lags: its newest block is {block}, and block {known.block} is final")
        await self._check_moves(link, "block", block, asked)
        return Head(block, str(await link.substrate.block_hash(block)))

    async def final(self, link: Link) -> Head:
        """The newest final block, never an older one than the last time: an endpoint that has it may not know that it is
        final. Raises RpcConnectionError for one that has it not, or where finality stands still."""
        asked, known = time.monotonic(), self._final
        block = int(await link.client.finalized_block())
        await self._check_moves(link, "final block", block, asked)
        if known is not None and block <= known.block:
            await _check_has(link, known)
            return known
        point = Head(block, str(await link.substrate.block_hash(block)))
        if self._final is None or block > self._final.block:
            self._final = point
        return point

    async def _check_moves(self, link: Link, what: str, block: int, asked: float) -> None:
        """asked: when, by our clock, the question was sent whose answer is `block`: answers may be late and out of order."""
        best, since = self._seen.get((link.address, what), (-1, 0.0))
        if block > best:
            self._seen[link.address, what] = block, time.monotonic()
        elif asked - since > STUCK_BLOCKS * float(await link.client.block_time()):
            raise bt.RpcConnectionError(f"{link.address} stands still: no {what} after {best} for {asked - since:.0f} s")

    def _is_behind(self, error: Exception) -> bool:
        """Whether an endpoint says that it has not a block which is known to be final."""
        return isinstance(error, NoBlock) and self._final is not None and error.block <= self._final.block

    async def _is_waited_for(self, link: Link, refusal: Any) -> bool:
        """Notes a refusal under a policy; False when the endpoint is left for another: it shuts us out, or it refused again
        after the pause without saying for how long."""
        address, pause_s = link.address, pause_of(refusal, self._pause_s)
        self._refused[address] = time.monotonic() + pause_s, str(refusal)
        self._refusals[address] += 1
        shut = refusal.status_code in _SHUT or (refusal.retry_after is None and self._refusals[address] > 1)
        if shut:
            self._shun(address, pause_s)
        # A refused request leaves the connection as it is; a refused connection is none.
        if shut or refusal.status_code is not None:
            await self._leave(link)
        return not shut

    async def _through(self, question: Callable[[Link], Awaitable[T]], used: list[Link]) -> T:
        link = await self._connected(used)
        answer = await question(link)
        self._refusals.pop(link.address, None)
        return answer

    async def _connected(self, used: list[Link]) -> Link:
        """used: gets the connection before anything is asked over it."""
        async with self._opening:
            if self._link is None:
                address = self._preferred()
                link = Link(address, self._network, self._makers[address]())
                used.append(link)
                try:
                    self.genesis = await self._open(link)
                except BaseException:  # also when our deadline cancels it: half a connection is closed, not leaked
                    self._close_soon(link)
                    raise
                self._link = link
            else:
                used.append(self._link)
            return self._link

    async def _open(self, link: Link) -> str:
        """Connects; the genesis. Raises RpcConnectionError for another chain than before, or one that is behind."""
        await link.client.connect()
        genesis = str(await link.substrate.block_hash(0))
        if self.genesis not in (None, genesis):
            raise bt.RpcConnectionError(f"{link.address} is of another chain: genesis {genesis}, not {self.genesis}")
        if self._final is not None:
            await _check_has(link, self._final)
        return genesis

    def _preferred(self) -> str:
        """The first that is not shunned; if all are, one that does not refuse, or whose time is up first."""
        now = time.monotonic()

        def rank(address: str) -> tuple[bool, float]:
            left = self._shunned.get(address, 0.0) - now
            return (left > 0 and self._refused.get(address, (0.0, ""))[0] > now, max(left, 0.0))

        return min(self._makers, key=rank)

    def _shun(self, address: str, seconds: float = SHUN_S) -> None:
        self._shunned[address] = time.monotonic() + max(seconds, SHUN_S)

    async def _leave(self, link: Link) -> None:
        """Closes a connection that failed, unless somebody else did. A live one is closed within the second that is waited
        for; a dead one in the background."""
        if self._link is link:
            self._link = None
            await asyncio.wait({self._close_soon(link)}, timeout=1)

    def _close_soon(self, link: Link) -> asyncio.Task[None]:
        task = asyncio.ensure_future(_close(link.client))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _wait_until_welcome(self, end: float) -> None:
        """Waits out a refusal under a traffic policy. Raises RpcPolicyError when that would be after `end`."""
        address = self._link.address if self._link is not None else self._preferred()
        until, why = self._refused.get(address, (0.0, ""))
        left = until - time.monotonic()
        if left <= 0:
            return
        if asyncio.get_running_loop().time() + left >= end:
            raise bt.RpcPolicyError(why, retry_after=f"{left:.3f}")
        await asyncio.sleep(left)


async def _check_has(link: Link, known: Head) -> None:
    """Raises RpcConnectionError unless the endpoint has this block."""
    try:
        found = str(await link.substrate.block_hash(known.block))
    except bt.ChainError as error:
        if is_transport(error):
            raise
        raise bt.RpcConnectionError(f"{link.address} lags: it has not block {known.block}, which is final") from error
    if found != known.hash:
        raise bt.RpcConnectionError(f"{link.address} has another block {known.block} than the final one {known.hash}")


def is_transport(error: Exception) -> bool:
    """Whether a failure is the connection's, not the chain's answer."""
    if isinstance(error, bt.ChainError):
        # The SDK says ChainError also for a session that is closed or whose handshake failed; a node's answer has a payload.
        cause = error.__cause__
        return type(cause) is SubstrateRequestException and cause.payload is None
    return not isinstance(error, StorageFunctionNotFound)


def is_pruned(error: Exception) -> bool:
    """Whether the node has forgotten the state of the block that was asked about: an archive node knows it."""
    return isinstance(error, bt.ChainError) and isinstance(error.__cause__, StateDiscardedError)


def pause_of(refusal: Any, unsaid: float = PAUSE_S) -> float:
    """Seconds that an endpoint asks to be left in peace: a number or an HTTP date; at least 1. unsaid: when it does not say."""
    text = (refusal.retry_after or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return max(1.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(1.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return unsaid


async def bounded(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of `work`; raises TimeoutError after `seconds`, also when `work` does not let itself be cancelled."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        task.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise TimeoutError
    return task.result()


async def _close(client: Any) -> None:
    # AssertionError: what the SDK's own task ends with after the node closed the connection in good order (1000).
    with contextlib.suppress(*FAILURES, SubstrateRequestException, AssertionError):
        await client.close()
