"""The chain, as the rest of the house sees it: the one adapter on `bittensor.Client`.

Every call has our own deadline, because the SDK's reads can block for minutes and its writes for ever. Blocks are
polled, never subscribed to. A write is sent once; whatever the SDK says about it, the chain is read back and decides: a
connection that drops while a transaction is watched is reported as a failure although the transaction lands. After a
deadline the client is closed, so that neither a dead socket nor a nonce that was never used is carried on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import bittensor as bt
from bittensor._transport.errors import StorageFunctionNotFound
from bittensor.keyfiles import KeyfileError, WrongPasswordError
from bittensor.settings import default_archive_endpoints, default_fallback_endpoints, resolve_endpoint

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.records import (
    MAX_COMMITMENT_BYTES,
    Head,
    Metagraph,
    Neuron,
    RawCommitment,
    Receipt,
    SubnetParams,
    Weights,
)

T = TypeVar("T")
_U16 = 65535
_RAW_FIELD = re.compile(r"Raw\d+")
_FAILURES = (OSError, bt.BittensorError, StorageFunctionNotFound)
"""What the SDK raises when the chain does not answer or refuses; TimeoutError is an OSError. The rest are bugs."""
_ERA_BLOCKS = 16
"""A transaction that is not included within so many blocks (3 minutes) is void: a lost one cannot land much later."""

_REASONS: Mapping[str, Reason] = {
    "HotKeyNotRegisteredInSubNet": Reason.NOT_REGISTERED,
    "HotKeyNotRegisteredInNetwork": Reason.NOT_REGISTERED,
    "AccountNotAllowedCommit": Reason.NOT_REGISTERED,
    "NeuronNoValidatorPermit": Reason.NOT_PERMITTED,
    "NotEnoughStakeToSetWeights": Reason.NOT_PERMITTED,
    "StakeAmountTooLow": Reason.NOT_PERMITTED,
    "IncorrectWeightVersionKey": Reason.OUTDATED,
    "UidVecContainInvalidOne": Reason.REFUSED_BY_CHAIN,
    "DuplicateUids": Reason.REFUSED_BY_CHAIN,
    "WeightVecLengthIsLow": Reason.REFUSED_BY_CHAIN,
    "MaxWeightExceeded": Reason.REFUSED_BY_CHAIN,
    "BadProof": Reason.REFUSED_BY_CHAIN,
}
"""The chain's refusals that trying again does not mend, by the chain's own names."""
_CODES: Mapping[Any, Reason] = {
    bt.ErrorCode.NOT_REGISTERED: Reason.NOT_REGISTERED,
    bt.ErrorCode.NOT_AUTHORIZED: Reason.NOT_PERMITTED,
}
"""The same for the SDK's checks before sending, which carry a code and no name."""
_NOT_SENT = (
    bt.ErrorCode.RATE_LIMITED,
    bt.ErrorCode.LIMIT_EXCEEDED,
    bt.ErrorCode.INVALID_ARGUMENT,
    bt.ErrorCode.INSUFFICIENT_BALANCE,
    bt.ErrorCode.SUBNET_NOT_EXISTS,
)
"""Codes of refusals that pass with time or with other arguments, but say for certain that nothing was taken."""


def load_wallet(name: str, hotkey: str, path: Path) -> bt.Wallet:
    """The wallet with its hotkey loaded; the coldkey is never read. Raises Rejected(SETTING) without such a hotkey."""
    wallet = bt.Wallet(name, hotkey, path=str(path.expanduser()))
    where = wallet.hotkey_file.path
    try:
        wallet.hotkey  # noqa: B018  (reads the file now, so that a daemon does not find out in its first round)
    except FileNotFoundError as error:
        raise Rejected(Reason.SETTING, f"no hotkey at {where}", "a wallet's name and hotkey") from error
    except (KeyfileError, WrongPasswordError, ValueError, OSError) as error:
        raise Rejected(Reason.SETTING, f"the hotkey at {where}: {error}", "a readable hotkey file") from error
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


class Chain:
    """One subnet on one chain. Reads need no wallet; writes are signed with the wallet's hotkey, one at a time."""

    def __init__(
        self,
        netuid: int,
        *,
        network: str = "finney",
        wallet: Any = None,
        substrate: Any = None,
        deadline_s: float = 60.0,
    ) -> None:
        """network: finney, test, local, archive or a ws:// address; not used when `substrate` is given.

        substrate: any implementation of the SDK's `Substrate` protocol; it is opened and closed by this object.
        deadline_s: seconds that one question to the chain may take; a write takes at most twice that.
        Raises Rejected(SETTING) for an unknown network.
        """
        self.netuid = netuid
        self._wallet = wallet
        self._deadline_s = deadline_s
        self._network = "local" if substrate is not None else network
        self._make_substrate = _rpc(network) if substrate is None else lambda: substrate
        self._client: Any = None
        self._substrate: Any = None
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connects. Optional: any call does when there is no connection."""

        async def nothing(_: Any) -> None: ...

        await self._ask("chain connection", nothing)

    async def close(self) -> None:
        """Disconnects; does not wait longer than 5 s for a dead connection."""
        client, self._client = self._client, None
        if client is not None:
            await _close(client)

    @property
    def hotkey(self) -> str:
        """Our own ss58 address. Raises Rejected(SETTING) without a wallet."""
        if self._wallet is None:
            raise Rejected(Reason.SETTING, "no wallet", "a wallet with a hotkey")
        return str(self._wallet.hotkey.ss58_address)

    # Reading

    async def head(self) -> Head:
        """The newest block; it may still be replaced on a public chain."""
        return await self._point("head", lambda client: client.block())

    async def finalized(self) -> Head:
        """The newest block that can no longer change."""
        return await self._point("finalized block", lambda client: client.finalized_block())

    async def block_hash(self, block: int) -> str:
        """0x and 64 hex digits. Raises Unavailable for a block that is not there yet."""
        return str(await self._ask(f"hash of block {block}", lambda _: self._substrate.block_hash(block)))

    async def block_seconds(self) -> float:
        """Seconds between two blocks, as the chain states them (12 on finney)."""
        return float(await self._ask("block time", lambda client: client.block_time()))

    async def params(self, block: int | None = None) -> SubnetParams:
        """The subnet's settings at a block (default: the head). Raises Unavailable when the subnet does not exist."""
        item = bt.storage.SubtensorModule
        asked = (
            item.Tempo,
            item.WeightsSetRateLimit,
            item.MinAllowedWeights,
            item.MaxWeightsLimit,
            item.WeightsVersionKey,
            item.CommitRevealWeightsEnabled,
            item.ImmunityPeriod,
        )

        async def question(client: Any) -> list[Any]:
            snapshot = await self._existing(client, block)
            return list(await asyncio.gather(*(snapshot.query(one, [self.netuid]) for one in asked)))

        tempo, rate, least, most, key, reveal, immunity = await self._ask("subnet settings", question)
        return SubnetParams(
            tempo=int(tempo),
            weights_rate_limit=int(rate),
            min_weights=int(least),
            max_weight=int(most) / _U16,
            version_key=int(key),
            commit_reveal=bool(reveal),
            immunity_blocks=int(immunity),
        )

    async def metagraph(self, block: int | None = None) -> Metagraph:
        """All neurons at a block (default: the head). Raises Unavailable when the subnet does not exist."""

        async def question(client: Any) -> Any:
            snapshot = await client.at(block)
            return await snapshot.subnets.metagraph(self.netuid, commitments=False)

        graph = await self._ask("metagraph", question)
        if graph is None:
            raise Unavailable("metagraph", _no_subnet(self.netuid, block))
        neurons = (
            Neuron(
                uid=n.uid,
                hotkey=n.hotkey,
                coldkey=n.coldkey,
                permit=n.validator_permit,
                stake=n.total_stake.amount,
                incentive=n.incentive,
                last_update=n.last_update,
                registered_at=n.block_at_registration,
            )
            for n in graph
        )
        return Metagraph(self.netuid, graph.block, tuple(neurons))

    async def commitments(self, block: int | None = None) -> tuple[RawCommitment, ...]:
        """What the registered hotkeys have on chain at a block (default: the head), oldest first, ties by hotkey.

        Raises Unavailable when the subnet does not exist: an empty answer always means that nobody committed.
        """

        async def question(client: Any) -> Any:
            snapshot = await self._existing(client, block)
            return await snapshot.subnets.commitments(self.netuid)

        found = await self._ask("commitments", question)
        raw = (RawCommitment(c.hotkey, c.block, _bytes_of(c.fields)) for c in found.values() if c.uid is not None)
        return tuple(sorted(raw, key=lambda c: (c.block, c.hotkey)))

    async def weights(self, hotkey: str, block: int | None = None) -> dict[str, float]:
        """That validator's row at a block (default: the head), by hotkey, summing to 1; empty when it set none.

        A uid that changed hands after the row was set is left out, as the chain does: its owner was not meant.
        """
        graph = await self.metagraph(block)
        validator = next((n for n in graph.neurons if n.hotkey == hotkey), None)
        if validator is None:
            return {}
        item = bt.storage.SubtensorModule.Weights
        row = await self._ask("weights", lambda client: client.query(item, [self.netuid, validator.uid], block=graph.block))
        meant = {n.uid: n.hotkey for n in graph.neurons if n.registered_at <= validator.last_update}
        shares = {meant[int(uid)]: int(value) for uid, value in row or () if int(uid) in meant and int(value)}
        total = sum(shares.values())
        return {hotkey: value / total for hotkey, value in shares.items()}

    # Writing

    async def commit(self, data: bytes) -> Receipt:
        """Writes our commitment; its block is always the including block, also for the same bytes again.

        Raises Rejected (NOT_REGISTERED), or Unavailable: the epoch's room is used up, or the chain does not show it.
        """
        if not 0 < len(data) <= MAX_COMMITMENT_BYTES:
            limit = f"1 to {MAX_COMMITMENT_BYTES} bytes"
            raise Rejected(Reason.MALFORMED_COMMITMENT, f"{len(data)} bytes", limit, self.hotkey)
        call = bt.calls.Commitments.set_commitment(netuid=self.netuid, info={"fields": [{f"Raw{len(data)}": data}]})

        async def landed(since: int) -> Receipt | None:
            ours = await self._ask(
                "commitment", lambda client: client.read("commitment", netuid=self.netuid, hotkey_ss58=self.hotkey)
            )
            if ours is None or ours.block <= since or _bytes_of(ours.fields) != data:
                return None
            return Receipt(int(ours.block), verified_by_readback=True)

        def send(client: Any) -> Any:
            return client.submit_call(call, self._wallet, signer="hotkey", period=_ERA_BLOCKS, wait_for_finalization=False)

        return await self._write("commitment", send, landed)

    async def set_weights(self, weights: Weights, *, version_key: int = 0) -> Receipt:
        """Sets our row, mapped to uids by a fresh metagraph; hotkeys that left the subnet are dropped.

        With commit-reveal the row shows only after its reveal, and the receipt is for the commit of it. A receipt that
        is not `verified_by_readback` means: the chain counts a weight set of ours, but the row is not the one sent.
        Raises Rejected (NOT_REGISTERED, NOT_PERMITTED, OUTDATED, NO_WEIGHTS, REFUSED_BY_CHAIN) or Unavailable, with
        `retry_s` while the chain's rate limit holds.
        """
        graph = await self.metagraph()
        params = await self.params(graph.block)
        uids = graph.uid_of()
        if self.hotkey not in uids:
            raise Rejected(Reason.NOT_REGISTERED, self.hotkey, f"a hotkey of subnet {self.netuid}")
        row = {hotkey: w for hotkey, w in weights.by_hotkey.items() if hotkey in uids and w > 0}
        if not row:
            raise Rejected(Reason.NO_WEIGHTS, f"{len(weights.by_hotkey)} hotkeys", "at least one that is registered")
        await self._check_rate_limit(graph, params)
        intent = bt.SetWeights(
            netuid=self.netuid, weights={uids[hotkey]: w for hotkey, w in row.items()}, version_key=version_key
        )

        async def landed(since: int) -> Receipt | None:
            now = await self.metagraph()
            updated = next((n.last_update for n in now.neurons if n.hotkey == self.hotkey), 0)
            if updated <= since:
                return None
            same = params.commit_reveal or _same_row(row, await self.weights(self.hotkey, now.block), params.max_weight)
            return Receipt(updated, verified_by_readback=same)

        def send(client: Any) -> Any:
            return client.execute(intent, self._wallet, period=_ERA_BLOCKS, wait_for_finalization=False)

        return await self._write("weights", send, landed)

    async def _check_rate_limit(self, graph: Metagraph, params: SubnetParams) -> None:
        """Asks here what the SDK asks again before it signs, because its answer does not say how long to wait."""
        last = next(n.last_update for n in graph.neurons if n.hotkey == self.hotkey)
        wait = last + params.weights_rate_limit - graph.block
        if last and wait > 0:
            why = f"last set at block {last}; {wait} of {params.weights_rate_limit} blocks to wait"
            raise Unavailable("weights", why, retry_s=wait * await self.block_seconds())

    async def _write(
        self, what: str, send: Callable[[Any], Awaitable[Any]], landed: Callable[[int], Awaitable[Receipt | None]]
    ) -> Receipt:
        """Sends once, then looks at the chain until the deadline, unless it was certainly refused.

        landed: given the head before sending, the receipt if the chain shows a later write of ours.
        """
        async with self._writing:
            self.hotkey  # noqa: B018  (a wallet is needed: say so before anything is sent)
            since = (await self.head()).block
            pause_s = min(await self.block_seconds() / 2, self._deadline_s / 4)
            problem: Exception | None = None
            try:
                result = await self._within_deadline(send)
                if not result.success:
                    problem = result.error or bt.ChainError(result.message)
            except _FAILURES as error:
                problem = error
            if problem is not None and _is_certain(problem):
                raise self._meaning(what, problem) from problem
            receipt = await self._read_back(landed, since, pause_s)
            if receipt is None:
                why = f"sent, but the chain does not show it ({problem or 'the chain said it was taken'})"
                raise Unavailable(what, why) from problem
            return receipt

    async def _read_back(self, landed: Callable[[int], Awaitable[Receipt | None]], since: int, pause_s: float) -> Receipt | None:
        """The receipt, once the chain shows it; None at the deadline. A chain that is away meanwhile may come back."""
        clock = asyncio.get_running_loop().time
        end = clock() + self._deadline_s
        while True:
            try:
                receipt = await landed(since)
            except Unavailable:
                receipt = None
            if receipt is not None or clock() >= end:
                return receipt
            await asyncio.sleep(pause_s)

    # One question

    async def _point(self, what: str, number: Callable[[Any], Awaitable[int]]) -> Head:
        async def question(client: Any) -> Head:
            block = int(await number(client))
            return Head(block, str(await self._substrate.block_hash(block)))

        return await self._ask(what, question)

    async def _existing(self, client: Any, block: int | None) -> Any:
        """A snapshot at the block (default: the head), after a look whether the subnet exists there."""
        snapshot = await client.at(block)
        if not await snapshot.query(bt.storage.SubtensorModule.NetworksAdded, [self.netuid]):
            raise Unavailable("subnet", _no_subnet(self.netuid, snapshot.block))
        return snapshot

    async def _ask(self, what: str, question: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await self._within_deadline(question)
        except _FAILURES as error:
            raise self._meaning(what, error) from error

    async def _within_deadline(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """The answer, or what the SDK raises. A failed connection is closed, so the next question opens another."""
        client = None
        try:
            async with asyncio.timeout(self._deadline_s):
                client = await self._connected()
                return await question(client)
        except bt.ChainError:
            raise
        except _FAILURES:
            if client is self._client:
                await self.close()
            raise

    async def _connected(self) -> Any:
        async with self._opening:
            if self._client is None:
                substrate = self._make_substrate()
                client = bt.Client(self._network, substrate=substrate)
                try:
                    await client.connect()
                except BaseException:  # also when our deadline cancels it: half a connection is closed, not leaked
                    await _close(client)
                    raise
                self._client, self._substrate = client, substrate
            return self._client

    def _meaning(self, what: str, error: Exception) -> Sn29Error:
        """What a failure of the SDK means to us: try again, or never."""
        if isinstance(error, TimeoutError):
            return Unavailable(what, f"the chain did not answer within {self._deadline_s:g} s")
        if isinstance(error, StorageFunctionNotFound):
            return Unavailable(what, f"the chain's runtime and bittensor {bt.__version__} do not match: {error}")
        if isinstance(error, bt.RpcPolicyError):
            wait = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", error.retry_after or "")
            return Unavailable(what, f"the node refuses traffic: {error}", float(wait[1]) if wait else None)
        if isinstance(error, bt.ChainError):
            reason = _reason(error)
            if reason:
                return Rejected(reason, error.name or error.message, f"subnet {self.netuid}", what)
            return Unavailable(what, f"{error.name}: {error.message}" if error.name else error.message)
        return Unavailable(what, str(error) or type(error).__name__)


async def _close(client: Any) -> None:
    """Closes within 5 s or gives up: the client is not used again either way."""
    with contextlib.suppress(*_FAILURES):
        async with asyncio.timeout(5):
            await client.close()


def _rpc(network: str) -> Callable[[], Any]:
    """Makes connections to a network, with the SDK's spare endpoints. Raises Rejected(SETTING) for an unknown name."""
    try:
        label, endpoint = resolve_endpoint(network)
    except ValueError as error:
        raise Rejected(Reason.SETTING, network, "finney, test, local, archive or a ws:// address") from error
    spare, archive = default_fallback_endpoints(label), default_archive_endpoints(label)
    return lambda: bt.RpcSubstrate(endpoint, fallback_endpoints=spare, archive_endpoints=archive)


def _reason(error: Any) -> Reason | None:
    """Why the chain will never take it; None when it may another time."""
    return _REASONS.get(error.name) if error.name else _CODES.get(error.code)


def _is_certain(problem: Exception) -> bool:
    """Whether the failure says for certain that the chain did not take the write."""
    if isinstance(problem, bt.ChainError):
        # "Invalid" is what the pool says when it forgets a transaction, which may be because it was included.
        return _reason(problem) is not None or (problem.code in _NOT_SENT and problem.name != "Invalid")
    return isinstance(problem, StorageFunctionNotFound)


def _bytes_of(fields: list[Any]) -> bytes:
    """The bytes of a commitment that is one raw field; any other shape as JSON, which our parser refuses."""
    if len(fields) == 1 and isinstance(fields[0], dict) and len(fields[0]) == 1:
        ((kind, value),) = fields[0].items()
        if _RAW_FIELD.fullmatch(kind) and isinstance(value, str) and value.startswith("0x"):
            return bytes.fromhex(value[2:])
    return json.dumps(fields, default=str).encode()


def _same_row(sent: Mapping[str, float], found: Mapping[str, float], max_weight: float) -> bool:
    """Whether the row on chain is the one sent, within u16 steps; if the SDK may clip shares, only hotkeys count."""
    if max_weight < 1:
        return set(found) <= set(sent)
    total, step = sum(sent.values()), len(sent) / _U16
    return set(found) <= set(sent) and all(abs(found.get(h, 0.0) - w / total) <= step for h, w in sent.items())


def _no_subnet(netuid: int, block: int | None) -> str:
    return f"there is no subnet {netuid} at {'the head' if block is None else f'block {block}'}"
