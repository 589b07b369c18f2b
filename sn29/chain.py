"""The chain, as the rest of the house sees it: with `endpoints` below it the one adapter on `bittensor.Client`.

Every call has our own deadline, because the SDK's reads can block for minutes and its writes for ever. Blocks are
polled, never subscribed to. A write is sent once; whatever the SDK says about it, the finalized chain is read back and
decides: a connection that drops while a transaction is watched is reported as a failure although the transaction lands.

Nothing is written twice, because a nonce can be used once: what stands on chain and the nonce that the next write must
carry are read at one block. Either the earlier write of which nothing is known stands there already, or it and the new
one carry the same nonce, and the chain takes only one of them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import bittensor as bt
from bittensor.keyfiles import KeyfileError, WrongPasswordError

from sn29.chain_state import ChainState, bytes_of, commitment_of, reason_of
from sn29.endpoints import FAILURES, Link
from sn29.errors import NAME_A_WALLET, Reason, Rejected, Sn29Error, Unavailable
from sn29.records import MAX_COMMITMENT_BYTES, Head, RawCommitment, Receipt, SubnetParams, Weights
from sn29.weight_row import conform, fractions

_ERA_BLOCKS = 16
"""A transaction that is not included within so many blocks (3 minutes) is void: a lost one cannot land much later."""

_NOT_SENT = (
    bt.ErrorCode.RATE_LIMITED,
    bt.ErrorCode.LIMIT_EXCEEDED,
    bt.ErrorCode.INVALID_ARGUMENT,
    bt.ErrorCode.INSUFFICIENT_BALANCE,
    bt.ErrorCode.SUBNET_NOT_EXISTS,
)
"""Codes of refusals that pass with time or with other arguments, but say for certain that nothing was taken."""
_BAD_PROOF = "BadProof"
"""What the pool says of a signature that is for another block or runtime than its own: one that is too old by then, or was
made just before an upgrade. A new one over a new connection is right."""


def load_wallet(name: str, hotkey: str, path: Path) -> bt.Wallet:
    """The wallet with its hotkey loaded; the coldkey is never read. Raises Rejected(SETTING) without such a hotkey."""
    wallet = bt.Wallet(name, hotkey, path=str(path.expanduser()))
    where = wallet.hotkey_file.path
    try:
        wallet.hotkey  # noqa: B018  (reads the file now, so that a daemon does not find out in its first round)
    except FileNotFoundError as error:
        raise Rejected(Reason.SETTING, f"no hotkey at {where}", "a wallet's name and hotkey", advice=NAME_A_WALLET) from error
    except (KeyfileError, WrongPasswordError, ValueError, OSError) as error:
        raise Rejected(
            Reason.SETTING, f"the hotkey at {where}: {error}", "a readable hotkey file", advice=NAME_A_WALLET
        ) from error
    return wallet


def create_wallet(name: str, hotkey: str, path: Path) -> bt.Wallet:
    """A new hotkey without a password, under a coldkey of that name, which is made if missing. For localnet and tests.

    Raises Rejected(SETTING) rather than overwrite a hotkey.
    """
    wallet = bt.Wallet(name, hotkey, path=str(path.expanduser()))
    if wallet.hotkey_file.exists_on_device():
        raise Rejected(Reason.SETTING, f"{wallet.hotkey_file.path}, which exists", "a new hotkey's name")
    if not wallet.coldkey_file.exists_on_device():
        wallet.create_new_coldkey(use_password=False, suppress=True)
    wallet.create_new_hotkey(use_password=False, suppress=True)
    return wallet


@dataclass(frozen=True, slots=True)
class _Before:
    """What the chain showed at the block at which a write was decided."""

    at: Head
    nonce: int
    """The one that our next write must carry. The pool's own count is not asked: it would make room for two writes."""
    final: int

    def since(self, newest: int) -> int:
        """Block after which a write sent now shows. Not `at`: that may be replaced, and the write may land in a block that
        takes the place of an older one. newest: block of our last write of the kind at `at`."""
        return max(self.final, newest)


@dataclass(slots=True)
class _Sent:
    """A set of weights that was sent, or may have been."""

    values: Mapping[int, int]
    """The chain's values by uid."""
    since: int
    """Block after which the chain may show it."""
    timelocked: bool
    digests: frozenset[str] = frozenset()
    """sha256 hex of the bytes of a timelocked set, one for each time that it was sent: any of them may land."""
    forgotten: bool = False
    """It may have been sent once more, and nobody remembers that digest."""

    def and_before(self, earlier: _Sent) -> _Sent:
        """This one, sent after an earlier one of the same row."""
        digests, forgotten = self.digests | earlier.digests, self.forgotten or earlier.forgotten
        return _Sent(self.values, min(self.since, earlier.since), self.timelocked, digests, forgotten)


class _Sealing:
    """The substrate that the SDK seals weights with: notes the digest of what it sealed.

    The SDK refuses rows shorter than the subnet's least count, which the chain does not ask for where fewer are registered;
    `conform` has seen to the count.
    """

    def __init__(self, substrate: Any) -> None:
        self._substrate, self.digest = substrate, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._substrate, name)

    async def query(self, module: str, name: str, params: list[Any] | None = None, block_hash: str | None = None) -> Any:
        if name == bt.storage.SubtensorModule.MinAllowedWeights[1]:
            return 0
        return await self._substrate.query(module, name, params, block_hash=block_hash)

    async def compose(self, call: Any) -> Any:
        _, _, params = call
        if "commit" in params:
            self.digest = sha256(bytes_of(params["commit"])).hexdigest()
        return await self._substrate.compose(call)


class Chain(ChainState):
    """One subnet on one chain. Reads need no wallet; writes are signed with the wallet's hotkey, one at a time."""

    def __init__(
        self,
        netuid: int,
        *,
        network: str = "finney",
        fallbacks: Sequence[str] | None = None,
        archives: Sequence[str] | None = None,
        wallet: Any = None,
        substrate: Any = None,
        deadline_s: float = 60.0,
        locks: Path | None = None,
    ) -> None:
        """As `ChainState`; a write takes at most twice `deadline_s`.

        locks: folder of the files that keep two processes from writing with one hotkey; None: only this object is kept.
        """
        super().__init__(
            netuid, network=network, fallbacks=fallbacks, archives=archives, substrate=substrate, deadline_s=deadline_s
        )
        self._wallet = wallet
        self._locks = locks
        self._writing = asyncio.Lock()
        self._unknown: dict[int, _Sent] = {}
        """By mechanism: the last set of weights, while it is not known what became of it."""

    @property
    def hotkey(self) -> str:
        """Our own ss58 address. Raises Rejected(SETTING) without a wallet."""
        if self._wallet is None:
            raise Rejected(Reason.SETTING, "no wallet", "a wallet with a hotkey")
        return str(self._wallet.hotkey.ss58_address)

    async def last_update(self, block: int | None = None, mechid: int = 0) -> int:
        """The block of our last set (or commit) of that mechanism's weights, or of our registration, as the chain counts it
        at a block (default: the head); 0 when not registered."""
        return await self._last_update(await self._point(block), mechid)

    async def conformed(self, weights: Weights) -> dict[str, float]:
        """The row that would stand on chain if these weights were set now, by hotkey, summing to 1: see `conform`.

        Empty when no hotkey with weight is registered. Raises Rejected(NO_WEIGHTS) or Unavailable.
        """
        at = await self._point(None)
        graph, params = await self._graph(at), await self._params(at)
        order = [n.hotkey for n in sorted(graph.neurons, key=lambda n: n.uid)]
        return fractions(conform(weights.by_hotkey, order, params.min_weights, params.max_weight))

    async def commit(self, data: bytes, *, again: bool = False) -> Receipt:
        """Writes our commitment; its block is the including one. Returns when the finalized chain shows it.

        The same bytes that stand already are not written again, because that would move their block and lose the age of
        our claim; so a process that died after sending may simply call this again. again: write them all the same.
        Raises Rejected (NOT_REGISTERED), or Unavailable: the epoch's room is used up, or the chain does not show it.
        """
        if not 0 < len(data) <= MAX_COMMITMENT_BYTES:
            limit = f"1 to {MAX_COMMITMENT_BYTES} bytes"
            raise Rejected(Reason.MALFORMED_COMMITMENT, f"{len(data)} bytes", limit, self.hotkey)
        call = bt.calls.Commitments.set_commitment(netuid=self.netuid, info={"fields": [{f"Raw{len(data)}": data}]})

        async def landed(at: Head, since: int) -> Receipt | None:
            ours = await self._commitment(at)
            taken = ours is not None and ours.block > since and ours.data == data
            return Receipt(ours.block, verified_by_readback=True) if ours is not None and taken else None

        async with self._only_writer():
            with _nothing_sent():
                before = await self._before()
                standing = await self._commitment(before.at)
            if standing is not None and standing.data == data and not again:
                return await self._read_back("commitment", landed, standing.block - 1, None, None)
            since = before.since(standing.block if standing is not None else 0)
            return await self._write("commitment", before.nonce, since, lambda link: link.substrate.compose(call), landed)

    async def set_weights(
        self,
        weights: Weights,
        *,
        version_key: int = 0,
        mechid: int = 0,
        since: int | None = None,
        digest: str | Collection[str] = "",
        sending: Callable[[str], None] | None = None,
    ) -> Receipt:
        """Sets our row, mapped to uids by a fresh metagraph; hotkeys that left the subnet are dropped, and the rest is
        fitted to the subnet's limits (see `conform`). Returns when the finalized chain shows it.

        With commit-reveal the row shows only after its reveal, and the receipt is for the commit of it. A receipt that
        is not `verified_by_readback` means: the chain counts a weight set of ours, but it is of another row.
        since, digest: a set of the same row that the chain shows after this block is the one asked for, and is not repeated:
        for a caller that died after sending. digest is all that `sending` was told since, one for each time that it was
        sent; without it nothing is sent while a later commit of ours waits for its reveal.
        sending: called with the digest of the encrypted bytes just before they are sent, so that it can be kept.
        Raises Rejected (NOT_REGISTERED, NOT_PERMITTED, OUTDATED, NO_WEIGHTS, REFUSED_BY_CHAIN) or Unavailable, with
        `retry_s` while the chain's rate limit holds; `certain` when neither this nor an earlier one can land any more.
        """
        kept = frozenset({digest} if isinstance(digest, str) else digest) - {""}
        told = None if since is None else _Sent({}, since, True, kept, forgotten=not kept)
        in_doubt = told is not None or mechid in self._unknown
        try:
            async with self._only_writer():
                return await self._set(weights, version_key, mechid, told, sending)
        except Unavailable as error:
            error.certain = error.certain and not in_doubt
            raise

    async def _set(
        self,
        weights: Weights,
        version_key: int,
        mechid: int,
        told: _Sent | None,
        sending: Callable[[str], None] | None,
    ) -> Receipt:
        with _nothing_sent():
            before = await self._before()
            graph, params = await self._graph(before.at), await self._params(before.at)
            if not 0 <= mechid < params.mechanisms:
                raise Rejected(Reason.SETTING, f"mechanism {mechid}", f"one of the subnet's {params.mechanisms}, from 0")
            uids = graph.uid_of()
            values = conform(weights.by_hotkey, list(uids), params.min_weights, params.max_weight)
            if not values:
                raise Rejected(Reason.NO_WEIGHTS, f"{len(weights.by_hotkey)} hotkeys", "at least one that is registered")
            updated = await self._last_update(before.at, mechid)
            since = before.since(updated)
            sent = _Sent({uids[hotkey]: value for hotkey, value in values.items()}, since, params.commit_reveal)
            known = self._unknown.get(mechid)
            if told is not None:
                sent = sent.and_before(told)
            if known is not None and known.values == sent.values:
                sent = sent.and_before(known)
            taken = await self._weights_landed(sent, params, mechid)(before.at, sent.since) if told or known else None
            if taken is None or not (taken.verified_by_readback or (sent.forgotten and taken.digest)):
                taken = None
                await self._check_rate_limit(updated, before.at.block, params)
        landed = self._weights_landed(sent, params, mechid)
        if taken is not None:
            receipt = await self._read_back("weights", landed, sent.since, None, None)
        else:
            call = self._weights_call(sent, version_key, mechid, sending)
            receipt = await self._send(sent, mechid, lambda: self._write("weights", before.nonce, since, call, landed))
        if sent.forgotten and receipt.digest and receipt.digest not in sent.digests:
            why = f"a commit of block {receipt.block} waits for its reveal, and nobody knows whether it is of this row"
            raise Unavailable("weights", why)
        self._unknown.pop(mechid, None)
        return receipt

    async def _send(self, sent: _Sent, mechid: int, write: Callable[[], Awaitable[Receipt]]) -> Receipt:
        """Sends a set of weights, remembered until it is known what became of it."""
        overtaken = self._unknown.get(mechid)
        self._unknown[mechid] = sent
        try:
            return await write()
        except (Rejected, Unavailable) as error:
            if isinstance(error, Rejected):
                del self._unknown[mechid]
            elif error.certain and overtaken is not None:
                self._unknown[mechid] = overtaken
            elif error.certain:
                del self._unknown[mechid]
            raise

    def _weights_call(
        self, sent: _Sent, version_key: int, mechid: int, sending: Callable[[str], None] | None
    ) -> Callable[[Link], Awaitable[Any]]:
        """Sealed weights are the SDK's affair; plain ones are one call, all of whose checks were made with better words."""
        if not sent.timelocked:
            dests, values = list(sent.values), list(sent.values.values())
            call = bt.calls.SubtensorModule.set_mechanism_weights(
                netuid=self.netuid, mecid=mechid, dests=dests, weights=values, version_key=version_key
            )
            return lambda link: link.substrate.compose(call)
        row = {uid: float(value) for uid, value in sent.values.items()}
        intent = bt.SetWeights(netuid=self.netuid, weights=row, version_key=version_key, mechid=mechid)

        async def sealed(link: Link) -> Any:
            sealing = _Sealing(link.substrate)
            built = await intent.build(sealing, self._wallet)
            sent.timelocked = bool(sealing.digest)  # commit-reveal may have been turned off just now
            if sealing.digest:
                sent.digests |= {sealing.digest}
                if sending is not None:
                    sending(sealing.digest)
            return built

        return sealed

    def _weights_landed(self, sent: _Sent, params: SubnetParams, mechid: int) -> Callable[[Head, int], Awaitable[Receipt | None]]:
        """Looks at a block for a set of ours that is newer than the block it is called with."""

        async def landed(at: Head, since: int) -> Receipt | None:
            updated = await self._last_update(at, mechid)
            if updated <= since:
                return None
            same = await self._values(at, mechid) == sent.values
            if not sent.timelocked:
                return Receipt(updated, verified_by_readback=same)
            hidden = [p for p in await self._pending(self.hotkey, at.block, mechid) if p.commit_block > since]
            ours = [p for p in hidden if p.digest in sent.digests]
            if same and not ours:  # it is revealed already
                return Receipt(updated, True, mode="timelocked", reveals_at=_reveal_block(params, updated))
            if not hidden:  # another's, and revealed
                return Receipt(updated, verified_by_readback=False, mode="timelocked")
            found = (ours or hidden)[-1]
            return Receipt(
                found.commit_block,
                verified_by_readback=bool(ours),
                mode="timelocked",
                reveal_round=found.reveal_round,
                reveals_at=_reveal_block(params, found.commit_block),
                digest=found.digest,
            )

        return landed

    async def _check_rate_limit(self, last: int, block: int, params: SubnetParams) -> None:
        """Asks here what the SDK asks again before it signs, because its answer does not say how long to wait."""
        wait = last + params.weights_rate_limit - block
        if last and wait > 0:
            why = f"last set at block {last}; {wait} of {params.weights_rate_limit} blocks to wait"
            raise Unavailable("weights", why, retry_s=wait * await self.block_seconds(), certain=True)

    @asynccontextmanager
    async def _only_writer(self) -> AsyncIterator[None]:
        """One write at a time of one hotkey, over all processes that share the folder of locks."""
        name = f"{self.hotkey}.lock"  # a wallet is needed: say so before anything is asked
        async with self._writing:
            if self._locks is None:
                yield
                return
            try:
                self._locks.mkdir(parents=True, exist_ok=True)
                file = (self._locks / name).open("a+")
            except OSError as error:
                raise Rejected(Reason.SETTING, f"{self._locks} ({error})", "a folder for locks that can be written") from error
            with file:
                clock = asyncio.get_running_loop().time
                end = clock() + self._deadline_s
                while not _locked(file.fileno()):
                    if clock() >= end:
                        file.seek(0)
                        who = file.read().strip() or "another process"
                        why = f"{who} is writing with hotkey {self.hotkey}"
                        raise Unavailable("write", why, retry_s=self._deadline_s, certain=True)
                    await asyncio.sleep(min(0.05, self._deadline_s / 10))
                file.truncate(0)
                file.write(f"process {os.getpid()}")
                file.flush()
                yield  # closing the file gives the lock back, and so does the end of the process

    async def _before(self) -> _Before:
        """The newest block, with our nonce there, and the newest final one. Raises Rejected(NOT_REGISTERED)."""

        async def question(link: Link) -> _Before:
            final = await self._endpoints.final(link)
            at = await self._existing(link, None)
            account, uid = await asyncio.gather(
                link.query(bt.storage.System.Account, [self.hotkey], at.hash),
                link.query(bt.storage.SubtensorModule.Uids, [self.netuid, self.hotkey], at.hash),
            )
            if uid is None:
                raise Rejected(Reason.NOT_REGISTERED, self.hotkey, f"a hotkey of subnet {self.netuid}")
            return _Before(at, int(account["nonce"]), final.block)

        return await self._ask("state before a write", question)

    async def _write(
        self,
        what: str,
        nonce: int,
        since: int,
        build: Callable[[Link], Awaitable[Any]],
        landed: Callable[[Head, int], Awaitable[Receipt | None]],
    ) -> Receipt:
        """Sends once, then looks at the finalized chain until the deadline, unless it was certainly refused.

        build: gives the composed call. landed: given a finalized block and `since`, the receipt if the chain shows a later
        write of ours.
        """
        under_way = False

        async def send(link: Link) -> Any:
            nonlocal under_way
            built = await build(link)
            call = getattr(built, "call", built)  # an intent's call comes with extras
            under_way = True
            return await link.substrate.submit(
                call,
                self._wallet.hotkey,
                nonce=nonce,
                period=_ERA_BLOCKS,
                wait_for_inclusion=True,
                wait_for_finalization=False,
            )

        problem: Exception | None = None
        included: Head | None = None
        try:
            result = await self._endpoints.ask(send, hop=False)
            if result.extrinsic_id:
                included = Head(int(result.extrinsic_id.split("-")[0]), str(result.block_hash))
            if not result.success:
                problem = result.error or bt.ChainError(result.message)
        except FAILURES as error:
            problem = error
        if isinstance(problem, bt.ChainError) and problem.name == _BAD_PROOF:
            await self._endpoints.renew()
        if problem is not None and (not under_way or (included is None and _is_certain(problem))):
            raise self._not_taken(what, problem) from problem
        return await self._read_back(what, landed, since, included, problem)

    async def _read_back(
        self,
        what: str,
        landed: Callable[[Head, int], Awaitable[Receipt | None]],
        since: int,
        included: Head | None,
        problem: Exception | None,
    ) -> Receipt:
        """The receipt, once the finalized chain shows it. A chain that is away meanwhile may come back.

        included: the block that was seen to hold the write, if any; with a problem, the one in which it failed. Only when
        that block is final has it failed for good: in another block it may succeed. Raises what the problem means then, or
        Unavailable at the deadline, or when so many blocks have passed that the transaction is void.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + self._deadline_s
        void_after: int | None = None
        pause_s = self._deadline_s / 4
        trouble = problem
        while True:
            try:
                pause_s = min(await self.block_seconds() / 2, self._deadline_s / 4)
                if void_after is None and included is None:
                    void_after = (await self.head()).block + _ERA_BLOCKS
                final = await self.finalized()
                if included is not None and final.block >= included.block:
                    stands = await self.block_hash(included.block) == included.hash
                    if stands and problem is not None:
                        raise self._not_taken(what, problem) from problem
                    included = included if stands else None  # another block took its place, and may hold the write or not
                if final.block > since and (included is None or final.block >= included.block):
                    receipt = await landed(final, since)
                    if receipt is not None:
                        return receipt
                if void_after is not None and final.block > void_after:
                    break
            except Unavailable as error:
                if error.certain:
                    raise
                trouble = trouble or error
            if clock() >= end:
                break
            await asyncio.sleep(pause_s)
        why = f"sent, but the chain does not show it ({trouble or 'the chain said it was taken'})"
        raise Unavailable(what, why) from trouble

    def _not_taken(self, what: str, problem: Exception) -> Sn29Error:
        """What a failure means that says for certain that nothing was taken."""
        meaning = self._meaning(what, problem)
        if isinstance(meaning, Unavailable):
            meaning.certain = True
        return meaning

    # Our own on chain

    async def _commitment(self, at: Head) -> RawCommitment | None:
        """Our own on chain at a block."""
        item = bt.storage.Commitments.CommitmentOf
        record = await self._ask("commitment", lambda link: link.query(item, [self.netuid, self.hotkey], at.hash))
        return commitment_of(self.hotkey, record)

    async def _last_update(self, at: Head, mechid: int) -> int:
        """The block of our last set (or commit) of weights, as the chain counts it at a block; 0 when not registered."""
        item = bt.storage.SubtensorModule

        async def question(link: Link) -> int:
            uid = await link.query(item.Uids, [self.netuid, self.hotkey], at.hash)
            updates = await link.query(item.LastUpdate, [self._index(mechid)], at.hash) or []
            return int(updates[uid]) if uid is not None and uid < len(updates) else 0

        return await self._ask("last update", question)

    async def _values(self, at: Head, mechid: int) -> dict[int, int]:
        """Our own row as it is stored, by uid."""
        item = bt.storage.SubtensorModule

        async def question(link: Link) -> Any:
            uid = await link.query(item.Uids, [self.netuid, self.hotkey], at.hash)
            return await link.query(item.Weights, [self._index(mechid), uid], at.hash) if uid is not None else ()

        return {int(uid): int(value) for uid, value in await self._ask("weights", question) or ()}


@contextmanager
def _nothing_sent() -> Iterator[None]:
    """Marks what fails inside as a failure before anything was sent."""
    try:
        yield
    except Unavailable as error:
        error.certain = True
        raise


def _locked(descriptor: int) -> bool:
    """Whether the file's lock is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_certain(problem: Exception) -> bool:
    """Whether the failure of a transaction that was passed on says for certain that the chain did not take it."""
    if isinstance(problem, bt.ChainError):
        # "Invalid" is what the pool says when it forgets a transaction, which may be because it was included.
        if problem.name in (_BAD_PROOF, "Invalid"):
            return bool(problem.name == _BAD_PROOF)
        return reason_of(problem) is not None or problem.code in _NOT_SENT
    return False


def _reveal_block(params: SubnetParams, commit_block: int) -> int | None:
    """The first block of the epoch that reveals a commit; None when the runtime does not tell its epochs."""
    following, newest = params.next_epoch_block, params.last_epoch_block
    if following is None or params.tempo <= 0:
        return None
    if newest is not None and commit_block < newest:  # committed so many epochs ago
        following -= -((commit_block - newest) // params.tempo) * params.tempo
    if commit_block >= following:  # the epoch ran between the decision and the inclusion
        following += params.tempo
    return following + (params.reveal_epochs - 1) * params.tempo
