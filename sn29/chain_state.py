"""What is on the chain, read for the rest of the house: one subnet at any block, every question under our deadline.

Blocks are polled, never subscribed to. What decides weights is read at one finalized block; a subnet that is missing is a
failure, never an empty answer. `chain.Chain` adds the writing.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, Self, TypeVar

import bittensor as bt
from bittensor._transport.errors import StorageFunctionNotFound
from bittensor.settings import default_archive_endpoints, default_fallback_endpoints, resolve_endpoint

from sn29.endpoints import FAILURES, Endpoints, Link, Rpc, is_pruned, pause_of
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.records import Head, Identity, Metagraph, Neuron, PendingReveal, RawCommitment, SubnetParams
from sn29.weight_row import TOP, fractions

T = TypeVar("T")
_MAX_SUBNETS = 4096
"""Weights of mechanism m are stored under m * 4096 + netuid."""
_KEPT_GRAPHS = 4
_RAW_FIELD = re.compile(r"Raw\d+")

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
}
"""The chain's refusals that trying again does not mend, by the chain's own names."""
_CODES: Mapping[Any, Reason] = {
    bt.ErrorCode.NOT_REGISTERED: Reason.NOT_REGISTERED,
    bt.ErrorCode.NOT_AUTHORIZED: Reason.NOT_PERMITTED,
}
"""The same for the SDK's checks before sending, which carry a code and no name."""


class ChainState:
    """One subnet on one chain, to read from."""

    def __init__(
        self,
        netuid: int,
        *,
        network: str = "finney",
        fallbacks: Sequence[str] | None = None,
        archives: Sequence[str] | None = None,
        substrate: Any = None,
        deadline_s: float = 60.0,
    ) -> None:
        """network: finney, test, local, archive or a ws:// address; not used when `substrate` is given.

        fallbacks: addresses of the same chain that are asked when `network` does not answer; None: the SDK's for it.
        archives: addresses that keep the state of all past blocks, for questions that the others have forgotten.
        substrate: any implementation of the SDK's `Substrate` protocol; it is opened and closed by this object.
        deadline_s: seconds that one question to the chain may take, over all endpoints.
        Raises Rejected(SETTING) for an unknown network or an address that is none.
        """
        self.netuid = netuid
        self._deadline_s = deadline_s
        if substrate is not None:
            self._endpoints = Endpoints("local", {"embedded": lambda: substrate}, deadline_s)
            self._archives = Endpoints("local", {}, deadline_s)
        else:
            self._endpoints, self._archives = _endpoints(network, fallbacks, archives, deadline_s)
        self._graphs: dict[str, Metagraph] = {}

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connects. Optional: any call does when there is no connection."""

        async def nothing(_: Link) -> None: ...

        await self._ask("chain connection", nothing)

    async def close(self) -> None:
        """Disconnects; does not wait longer than 5 s for dead connections."""
        await self._endpoints.close()
        await self._archives.close()

    @property
    def addresses(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(endpoints in order of preference, archives); the one address of an embedded chain is `embedded`."""
        return self._endpoints.addresses, self._archives.addresses

    async def identity(self) -> Identity:
        """Which chain answers: its genesis never changes, its rules may."""

        async def question(link: Link) -> Identity:
            return Identity(str(await link.substrate.block_hash(0)), int(await link.substrate.spec_version()))

        return await self._ask("identity of the chain", question)

    async def head(self) -> Head:
        """The newest block; it may still be replaced on a public chain. Raises Unavailable as `finalized` does."""
        return await self._ask("head", self._endpoints.newest)

    async def finalized(self) -> Head:
        """The newest block that can no longer change; never an older one than before.

        Raises Unavailable, naming the endpoint, where no new one came for ten blocks' time, or where it has not the one
        that was final before.
        """
        return await self._ask("finalized block", self._endpoints.final)

    async def block_hash(self, block: int) -> str:
        """0x and 64 hex digits. Raises Unavailable for a block that is not there yet."""
        return (await self._ask(f"hash of block {block}", lambda link: pin(link, block))).hash

    async def block_seconds(self) -> float:
        """Seconds between two blocks, as the chain states them (12 on finney)."""
        return float(await self._ask("block time", lambda link: link.client.block_time()))

    async def timestamp(self, block: int | None = None) -> float:
        """The chain's own time of a block (default: the head), in seconds since 1970."""
        return float((await self._ask("timestamp", lambda link: link.client.timestamp(block))).timestamp())

    async def params(self, block: int | None = None) -> SubnetParams:
        """The subnet's settings at a block (default: the head). Raises Unavailable when the subnet does not exist."""
        return await self._params(await self._ask("subnet", lambda link: self._existing(link, block)))

    async def stake_threshold(self) -> float:
        """The stake (in the subnet's own token) that a hotkey must have to set weights."""
        item = bt.storage.SubtensorModule.StakeThreshold
        return int(await self._ask("stake threshold", lambda link: link.query(item, [], None)) or 0) / 10**9

    async def next_epoch_block(self) -> int | None:
        """The block at which the next reward run is expected; None where there is none (tempo 0)."""
        found = await self._ask("next epoch", lambda link: link.client.epochs.next_epoch_start_block(self.netuid))
        return int(found) if found is not None else None

    async def metagraph(self, block: int | None = None) -> Metagraph:
        """All neurons at a block (default: the head). Raises Unavailable when the subnet does not exist."""
        return await self._graph(await self._point(block))

    async def commitments(self, block: int | None = None) -> tuple[RawCommitment, ...]:
        """What the registered hotkeys have on chain at a block (default: the head), oldest first, ties by hotkey.

        An entry of any other shape than one raw field comes as JSON, which our parser refuses; one that cannot even be
        decoded is left out. Raises Unavailable when the subnet does not exist: an empty answer always means that nobody
        committed.
        """
        at = await self._point(block)
        registered = (await self._graph(at)).uid_of()
        module, item = bt.storage.Commitments.CommitmentOf
        entries = await self._ask(
            "commitments", lambda link: link.substrate.query_map(module, item, [self.netuid], block_hash=at.hash)
        )
        raw = (commitment_of(str(hotkey), record) for hotkey, record in entries if str(hotkey) in registered)
        return tuple(sorted((c for c in raw if c is not None), key=lambda c: (c.block, c.hotkey)))

    async def weights(self, hotkey: str, block: int | None = None, mechid: int = 0) -> dict[str, float]:
        """That validator's row at a block (default: the head), by hotkey, summing to 1; empty when it set none.

        A uid that changed hands after the row was set is left out, as the chain does: its owner was not meant. With
        commit-reveal it is the newest row that was revealed.
        """
        at = await self._point(block)
        graph = await self._graph(at)
        validator = next((n for n in graph.neurons if n.hotkey == hotkey), None)
        if validator is None:
            return {}
        item, index = bt.storage.SubtensorModule, self._index(mechid)

        async def question(link: Link) -> tuple[Any, Any]:
            row = await link.query(item.Weights, [index, validator.uid], at.hash)
            return row, await link.query(item.LastUpdate, [index], at.hash) if mechid else None

        row, updates = await self._ask("weights", question)
        updated = int(updates[validator.uid]) if validator.uid < len(updates or ()) else validator.last_update
        meant = {n.uid: n.hotkey for n in graph.neurons if n.registered_at <= updated}
        return fractions({meant[int(uid)]: int(value) for uid, value in row or () if int(uid) in meant and int(value)})

    async def pending(self, hotkey: str, mechid: int = 0, block: int | None = None) -> tuple[PendingReveal, ...]:
        """That validator's encrypted commits of weights which the chain has not opened at a block (default: the head),
        oldest first."""
        return await self._pending(hotkey, block, mechid)

    # Parts of answers

    async def _point(self, block: int | None) -> Head:
        return await self._ask("block", lambda link: pin(link, block))

    async def _existing(self, link: Link, block: int | None) -> Head:
        """The block (default: the head), after a look whether the subnet exists there.

        The one question before many also spares asking for the block's runtime once for each of them.
        """
        point = await pin(link, block)
        if not await link.query(bt.storage.SubtensorModule.NetworksAdded, [self.netuid], point.hash):
            raise Unavailable("subnet", f"there is no subnet {self.netuid} at block {point.block}")
        return point

    async def _params(self, at: Head) -> SubnetParams:
        item = bt.storage.SubtensorModule
        asked = (
            item.Tempo,
            item.WeightsSetRateLimit,
            item.MinAllowedWeights,
            item.MaxWeightsLimit,
            item.WeightsVersionKey,
            item.CommitRevealWeightsEnabled,
            item.ImmunityPeriod,
            item.RevealPeriodEpochs,
            item.MechanismCountCurrent,
            item.LastEpochBlock,
        )

        async def question(link: Link) -> Any:
            api, method = "SubnetInfoRuntimeApi", "get_next_epoch_start_block"
            return await asyncio.gather(
                asyncio.gather(*(link.query(one, [self.netuid], at.hash) for one in asked)),
                link.substrate.runtime_call(api, method, [self.netuid], block_hash=at.hash),
            )

        values, following = await self._ask("subnet settings", question)
        tempo, rate, least, most, key, reveal, immunity, reveal_epochs, mechanisms, last_epoch = values
        return SubnetParams(
            tempo=int(tempo),
            weights_rate_limit=int(rate),
            min_weights=int(least),
            max_weight=int(most) / TOP,
            version_key=int(key),
            commit_reveal=bool(reveal),
            immunity_blocks=int(immunity),
            reveal_epochs=max(1, int(reveal_epochs or 0)),
            mechanisms=max(1, int(mechanisms or 0)),
            last_epoch_block=int(last_epoch) if last_epoch is not None else None,
            next_epoch_block=int(following) if following is not None else None,
        )

    async def _graph(self, at: Head) -> Metagraph:
        """The neurons at a block; the newest few answers are kept, because a state at a hash never changes."""
        if at.hash not in self._graphs:

            async def question(link: Link) -> Any:
                snapshot = await link.client.at(at.block)
                return await snapshot.subnets.metagraph(self.netuid, commitments=False)

            graph = await self._ask("metagraph", question)
            if graph is None:
                raise Unavailable("subnet", f"there is no subnet {self.netuid} at block {at.block}")
            while len(self._graphs) >= _KEPT_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[at.hash] = Metagraph(self.netuid, at.block, tuple(_neuron_of(n) for n in graph))
        return self._graphs[at.hash]

    async def _pending(self, hotkey: str, block: int | None, mechid: int) -> tuple[PendingReveal, ...]:
        module, item = bt.storage.SubtensorModule.TimelockedWeightCommits

        async def question(link: Link) -> Any:
            point = await self._existing(link, block)
            return await link.substrate.query_map(module, item, [self._index(mechid)], block_hash=point.hash)

        found = [
            PendingReveal(hotkey, int(commit_block), int(reveal_round), int(epoch), sha256(bytes_of(sealed)).hexdigest())
            for epoch, commits in await self._ask("pending reveals", question)
            for who, commit_block, sealed, reveal_round in commits or ()
            if str(who) == hotkey
        ]
        return tuple(sorted(found, key=lambda p: (p.commit_block, p.reveal_round)))

    def _index(self, mechid: int) -> int:
        return mechid * _MAX_SUBNETS + self.netuid

    # One question

    async def _ask(self, what: str, question: Callable[[Link], Awaitable[T]]) -> T:
        """The answer of the first endpoint that has one; of an archive when the others have forgotten the block."""
        try:
            try:
                return await self._endpoints.ask(question)
            except bt.ChainError as error:
                if not is_pruned(error) or not len(self._archives):
                    raise
            self._archives.genesis = self._endpoints.genesis
            return await self._archives.ask(question)
        except FAILURES as error:
            raise self._meaning(what, error) from error

    def _meaning(self, what: str, error: Exception) -> Sn29Error:
        """What a failure of the SDK means to us: try again, or never."""
        if isinstance(error, TimeoutError):
            return Unavailable(what, f"the chain did not answer within {self._deadline_s:g} s")
        if isinstance(error, StorageFunctionNotFound):
            # Of an old block that is for good, as if it were forgotten.
            why = f"the chain's runtime and bittensor {bt.__version__} do not match: {error}"
            return Unavailable(what, why, forgotten=True)
        if isinstance(error, bt.RpcPolicyError):
            return Unavailable(what, f"the node refuses traffic: {error}", pause_of(error))
        if is_pruned(error):
            why = "the node has forgotten this block: name an archive node (subtensor.archives)"
            return Unavailable(what, why, forgotten=True)
        if isinstance(error, bt.ChainError):
            reason = reason_of(error)
            if reason:
                return Rejected(reason, error.name or error.message, f"subnet {self.netuid}", what)
            return Unavailable(what, f"{error.name}: {error.message}" if error.name else error.message)
        return Unavailable(what, str(error) or type(error).__name__)


def _endpoints(
    network: str, fallbacks: Sequence[str] | None, archives: Sequence[str] | None, deadline_s: float
) -> tuple[Endpoints, Endpoints]:
    """The endpoints and the archives of a network. Raises Rejected(SETTING) for an unknown name or address."""
    try:
        label, first = resolve_endpoint(network)
    except ValueError as error:
        raise Rejected(Reason.SETTING, network, "finney, test, local, archive or a ws:// address") from error
    spare = default_fallback_endpoints(label) if fallbacks is None else fallbacks
    old = default_archive_endpoints(label) if archives is None else archives
    for address in (*spare, *old):
        if not address.startswith(("ws://", "wss://")):
            raise Rejected(Reason.SETTING, address, "a ws:// or wss:// address")

    def pool(addresses: Sequence[str]) -> Endpoints:
        return Endpoints(label, {address: partial(Rpc, address) for address in dict.fromkeys(addresses)}, deadline_s)

    return pool([first, *spare]), pool(old)


async def pin(link: Link, block: int | None) -> Head:
    """A block (default: the head) with its hash."""
    number = int(await link.client.block()) if block is None else block
    return Head(number, str(await link.substrate.block_hash(number)))


def reason_of(error: Any) -> Reason | None:
    """Why the chain will never take it; None when it may another time."""
    return _REASONS.get(error.name) if error.name else _CODES.get(error.code)


def commitment_of(hotkey: str, record: Any) -> RawCommitment | None:
    """A stored commitment as bytes; None where there is none, or none that can be read."""
    if not isinstance(record, dict) or not isinstance(record.get("info"), dict):
        return None
    return RawCommitment(hotkey, int(record.get("block") or 0), _field_bytes(list(record["info"].get("fields") or [])))


def bytes_of(value: Any) -> bytes:
    """The bytes that the SDK gives or takes as such, as 0x hex or as a list of numbers."""
    return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else bytes(value)


def _field_bytes(fields: list[Any]) -> bytes:
    """The bytes of a commitment that is one raw field; any other shape as JSON, which our parser refuses."""
    if len(fields) == 1 and isinstance(fields[0], dict) and len(fields[0]) == 1:
        ((kind, value),) = fields[0].items()
        if _RAW_FIELD.fullmatch(kind) and isinstance(value, str) and re.fullmatch(r"0x(?:[0-9a-fA-F]{2})*", value):
            return bytes.fromhex(value[2:])
    return json.dumps(fields, default=str).encode()


def _neuron_of(neuron: Any) -> Neuron:
    return Neuron(
        uid=neuron.uid,
        hotkey=neuron.hotkey,
        coldkey=neuron.coldkey,
        permit=neuron.validator_permit,
        stake=neuron.total_stake.amount,
        incentive=neuron.incentive,
        last_update=neuron.last_update,
        registered_at=neuron.block_at_registration,
    )
