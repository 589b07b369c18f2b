"""A validator's weights on chain: set when they are due, read back, never twice, however long a round takes.

    look         is anything due? (one question to the chain, mostly)
      settle     what was sent before: did it land, was it revealed, or must it be sent again?
      due        decided by a newer round than the last set, or a tempo after it; not before the chain's rate limit allows
      move       at most a stated part of all weight in one set: what lies further off is reached by the sets after it
      set        noted in the store, sent, read back, noted again

A note is kept before anything is sent, of encrypted weights with the digest of what is sent: whoever finds a note without a
block does not know whether the chain took it, and looks at the chain. While the newest block shows a set of ours that no final
block shows, nothing is sent. Weights that the chain takes encrypted stand when their epoch of revelation has come and our
row is theirs; a chain that drops them says nothing, so the row is read.

Each mechanism has weights, notes and rows of its own, and its failures are its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from sn29.chain import Chain
from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Metagraph, Neuron, PendingReveal, SubnetParams, Weights
from sn29.store import ChainSeen, Sent, Store
from sn29.telemetry import note, publishing, tell, warn
from sn29.weight_row import conform, fractions

VERSION_KEY = 100
"""0.1.0 as the chain counts versions; an owner who raises the subnet's key above it turns this software's weights away."""
MAX_CHANGE = 0.75
"""A round moves the weights half of the way (`rules.weights.KEEP`), two rounds three quarters. More than that comes of a lost
store or a fault, and may take its time."""
_ROUNDING = 1e-3
"""Two rows on chain that should be equally far apart differ by less than this, for its 16 bits."""
ALARM_EPOCHS = 3
STALE_BLOCKS = 25
"""A node whose newest block is older than so many blocks (5 minutes of 12 s) is behind: what it says of uids may be over."""
EPOCH = 360
"""Blocks after which weights are set again on a subnet whose tempo is 0: it has no epochs of its own."""


class Step(Enum):
    """Where a mechanism's newest weights are."""

    STANDS = "they stand on chain"
    COMMITTED = "they are on chain, encrypted until their epoch"
    WAITS = "not yet: the chain's rate limit holds, or it is not final what became of the set before"
    HELD = "part of the way: the whole of it moves more than one set may"

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to do for these weights."""
        return self in (Step.STANDS, Step.COMMITTED)


@dataclass(frozen=True, slots=True)
class _View:
    """The chain at one finalized block."""

    block: int
    params: SubnetParams
    graph: Metagraph
    me: Neuron

    @property
    def epoch(self) -> int:
        """Blocks after which a set is repeated."""
        return self.params.tempo if self.params.tempo > 0 else EPOCH

    def expected(self, weights: Weights, block: int) -> dict[str, float]:
        """The row that these weights come to if they were set at `block`: who was not there then, or left, has no part.

        Raises Rejected(NO_WEIGHTS) when they cannot be fitted to the subnet's limits.
        """
        there = [n.hotkey for n in sorted(self.graph.neurons, key=lambda n: n.uid) if n.registered_at <= block]
        return fractions(conform(weights.by_hotkey, there, self.params.min_weights, self.params.max_weight))

    def is_row(self, row: Mapping[str, float], weights: Weights, block: int) -> bool:
        """Equal but for the chain's 16-bit rounding, and for those who left since."""
        try:
            expected = self.expected(weights, block)
        except Rejected:
            return False
        step = max(2, len(expected)) / 65535
        return bool(row) and all(abs(row.get(h, 0.0) - expected.get(h, 0.0)) <= step for h in row.keys() | expected.keys())


@dataclass(frozen=True, slots=True)
class _Quiet:
    """Nothing is due for the weights of one round until a final block and a time have come."""

    round: int
    step: Step | Unavailable | Rejected
    until_block: int = 0
    until: float = 0.0
    """By the monotonic clock."""
    pause_s: float = 0.0
    """How long a failure is left alone."""


class Publisher:
    """Sets what rounds decide. Everything that must survive a crash is in the store; here is what saves questions and words."""

    def __init__(
        self,
        chain: Chain,
        store: Store,
        *,
        max_change: float = MAX_CHANGE,
        alarm_epochs: int = ALARM_EPOCHS,
        pause_s: float = 12.0,
        tolerance_s: float = 60.0,
    ) -> None:
        """max_change: share of all weight, above 0 and at most 1, that one set may move. alarm_epochs: age of our last set.

        pause_s: seconds for which a mechanism that failed is left alone; they double up to a hundredfold. tolerance_s: a
        final block that is younger is never called old, however fast blocks come.
        """
        self._chain, self._store = chain, store
        self._max_change, self._alarm_epochs = max_change, alarm_epochs
        self._pause_s, self._tolerance_s = pause_s, tolerance_s
        self._quiet: dict[int, _Quiet] = {}  # by mechanism
        self._said: set[object] = set()
        self._seen = store.chain_seen()
        self._kept = self._seen
        self._grew = time.monotonic() - (max(0.0, time.time() - self._seen.at) if self._seen else 0.0)
        self._block_seconds = 0.0
        """As the chain says; 0 before it has answered this process."""
        self._failing_since: float | None = None
        self.is_sending = False
        """A set is on its way and not read back yet: whoever ends may let it end first; its note tells the rest if not."""

    async def look(self) -> dict[int, Step | Unavailable | Rejected]:
        """Sets the newest weights if they are due; for each mechanism where they are now, or what it last failed with.

        A failure is told when it comes, and tried again after a pause of its own. Raises what concerns every mechanism:
        Unavailable (an unreachable or stale chain) and Rejected (not registered); nothing was set then.
        """
        try:
            steps = await self._look(self._decided())
            self._note_failing(any(not isinstance(step, Step) for step in steps.values()))
            return steps
        except (Unavailable, Rejected):
            self._note_failing(True)
            raise
        finally:
            self.watch()

    def _note_failing(self, is_failing: bool) -> None:
        self._failing_since = (self._failing_since or time.time()) if is_failing else None
        note(unpublished_since=self._failing_since)

    async def see(self) -> None:
        """Notes the newest final block, whatever keeps weights from being set. Raises Unavailable."""
        await self._final()

    def _decided(self) -> dict[int, Weights]:
        """The newest weights by mechanism: those that are ours to set."""
        theirs = self._store.taken_over()
        return {m: weights for m, weights in self._store.weights().items() if weights.by_hotkey and weights.block != theirs}

    async def _look(self, decided: Mapping[int, Weights]) -> dict[int, Step | Unavailable | Rejected]:
        final = await self._final()
        steps: dict[int, Step | Unavailable | Rejected] = {}
        view: _View | None = None
        for mechanism, weights in decided.items():
            quiet = self._quiet.get(mechanism, _Quiet(-1, Step.WAITS))
            if quiet.round == weights.block and (final < quiet.until_block or time.monotonic() < quiet.until):
                steps[mechanism] = quiet.step
                continue
            if view is None:
                known = [max(one.block, self._last(m)[0]) for m, one in decided.items()]
                view = await self._view(final, max(known))
            try:
                steps[mechanism] = await self._publish(view, mechanism, weights)
            except (Unavailable, Rejected) as error:  # one mechanism's trouble does not keep the others from being set
                warn("not_published", str(error), mechanism=mechanism)
                self._leave_alone(mechanism, weights, error)
                steps[mechanism] = error
        return steps

    async def _view(self, block: int, known: int) -> _View:
        """Raises Unavailable for a view that is too old or empty to map hotkeys to uids by, Rejected if we are not in it.

        known: a block that the chain must have: weights were decided or set at it.
        """
        age = time.time() - await self._chain.timestamp(block)
        if block < known or age > self._stale_s:
            why = f"its newest final block is {block}, {age:.0f} s old, and weights were decided or set at block {known}"
            raise Unavailable("weights", f"the node is behind, or this machine's clock is wrong: {why}; nothing is set")
        params, graph = await self._chain.params(block), await self._chain.metagraph(block)
        if not graph.neurons:
            raise Unavailable("weights", f"the metagraph of subnet {self._chain.netuid} is empty; nothing is set")
        me = next((n for n in graph.neurons if n.hotkey == self._chain.hotkey), None)
        if me is None:
            rule = f"a hotkey that is registered on subnet {self._chain.netuid}"
            raise Rejected(Reason.NOT_REGISTERED, self._chain.hotkey, rule)
        view = _View(block, params, graph, me)
        if self._seen is not None:
            reveal_epochs = params.reveal_epochs if params.commit_reveal else 0
            self._keep_seen(replace(self._seen, epoch=view.epoch, reveal_epochs=reveal_epochs))
        return view

    async def _publish(self, view: _View, mechanism: int, weights: Weights) -> Step:
        if mechanism >= view.params.mechanisms:
            rule = f"below {view.params.mechanisms}, as many as subnet {self._chain.netuid} has"
            raise Rejected(Reason.COMPETITION_FILE, f"mechanism {mechanism}", rule)
        updated = view.me.last_update  # of mechanism 0; registration counts as a set
        if mechanism:
            updated = await self._chain.last_update(view.block, mechanism)
        if not await self._settle(view, mechanism, weights, updated):
            return Step.WAITS
        sent = self._taken(mechanism)
        block, last = self._last(mechanism)
        stands = last is not None and last.block >= weights.block and block > view.me.registered_at
        is_whole = last is not None and (last.block > weights.block or last.by_hotkey == weights.by_hotkey)
        if stands and view.block - block < view.epoch and (is_whole or self._max_change < 1):
            step = Step.HELD if not is_whole else Step.COMMITTED if sent else Step.STANDS
            reveals = [at if at > view.block else view.block + STALE_BLOCKS for at in (one.reveals_at for one in sent) if at]
            return self._be_quiet(mechanism, weights, min([block + view.epoch, *reveals]), step)
        if updated and updated + view.params.weights_rate_limit > view.block:
            return self._be_quiet(mechanism, weights, updated + view.params.weights_rate_limit, Step.WAITS)
        return await self._set(view, mechanism, weights, await self._within_reach(view, mechanism, weights))

    def _be_quiet(self, mechanism: int, weights: Weights, until_block: int, step: Step) -> Step:
        self._quiet[mechanism] = _Quiet(weights.block, step, until_block)
        return step

    def _leave_alone(self, mechanism: int, weights: Weights, error: Unavailable | Rejected) -> None:
        last = self._quiet.get(mechanism)
        pause_s = 2 * last.pause_s if last and last.round == weights.block and last.pause_s else self._pause_s
        pause_s = min(max(pause_s, getattr(error, "retry_s", None) or 0.0), 100 * self._pause_s)
        self._quiet[mechanism] = _Quiet(weights.block, error, until=time.monotonic() + pause_s, pause_s=pause_s)

    def _last(self, mechanism: int) -> tuple[int, Weights | None]:
        """(block, weights) of our newest set, standing or on its way; (0, None) when there is none."""
        stands = self._store.last_publication(mechanism)
        on_its_way = [(one.block or 0, one.weights) for one in self._taken(mechanism)]
        return max([stands or (0, None), *on_its_way], key=lambda each: each[0])

    def _taken(self, mechanism: int) -> list[Sent]:
        """What the chain took and does not show yet, oldest first."""
        return [one for one in self._store.sent(mechanism) if one.block is not None]

    # --- what was sent before -----------------------------------------------------------------------------------------

    async def _settle(self, view: _View, mechanism: int, newest: Weights, updated: int) -> bool:
        """updated: block of our last set or commit, as the view shows it. False while that is not the last word on it."""
        unknown = [sent for sent in self._store.sent(mechanism) if sent.block is None]
        for sent in unknown:
            if not await self._find(view, mechanism, sent, updated):
                return False
        due = [s for s in self._taken(mechanism) if s.reveals_at is not None and s.reveals_at <= view.block]
        if due:
            await self._check_reveals(view, mechanism, due)
        block, last = self._last(mechanism)
        newer = updated > max(block, view.me.registered_at)
        plain = not view.params.commit_reveal  # nobody can look into a commit
        if plain and newer and not unknown and ("unknown set", mechanism, updated) not in self._said:
            await self._look_at_unknown(view, mechanism, updated, last, newest)
        return True

    async def _find(self, view: _View, mechanism: int, sent: Sent, updated: int) -> bool:
        """Whether the chain took what was sent; False while a newer block shows a set of ours and no final one does.

        A note of which the chain shows nothing stays: it is sent again, if it is still wanted, so that only one of the
        two can land (see `Chain.set_weights`).
        """
        hidden: tuple[PendingReveal, ...] = ()
        if view.params.commit_reveal:
            hidden = await self._hidden(view, mechanism)
            ours = next((p for p in hidden if p.digest in sent.digests), None)
            if ours is not None:  # when it is revealed, the chain tells: it is asked from now on
                block = ours.commit_block
                found = replace(sent, block=block, reveals_at=block + 1, digests=(ours.digest,))
                self._store.keep_sent(mechanism, found)
                tell("committed", f"weights of the round of block {sent.weights.block} were found on chain", block=block)
                return True
        if updated <= sent.since:
            return await self._chain.last_update(mechid=mechanism) <= sent.since
        is_hidden = any(p.commit_block == updated for p in hidden)  # then the row that stands is an older one
        if not is_hidden and view.is_row(await self._row(view, mechanism), sent.weights, updated):
            self._store.keep_publication(updated, sent.weights, mechanism, sent)
            tell("published", f"weights of the round of block {sent.weights.block} were found on chain", block=updated)
        else:
            self._store.forget_sent(mechanism, sent)
            self._said.add(("unknown set", mechanism, updated))
            warn("not_published", f"what was sent at block {sent.since} is not our row on chain, another one is")
        return True

    async def _check_reveals(self, view: _View, mechanism: int, due: Iterable[Sent]) -> None:
        """The newest commit that the chain has opened must be our row; older ones are overtaken by it."""
        hidden = {p.digest for p in await self._hidden(view, mechanism)}
        opened = [sent for sent in due if hidden.isdisjoint(sent.digests)]
        if not opened:
            return
        row = await self._row(view, mechanism)
        stands = (self._store.last_publication(mechanism) or (0, None))[0]
        for sent in sorted(opened, key=lambda s: s.since, reverse=True):
            block = sent.block or sent.since
            if block <= stands:
                self._store.forget_sent(mechanism, sent)
            elif view.is_row(row, sent.weights, block):
                self._store.keep_publication(block, sent.weights, mechanism, sent)
                tell("revealed", f"weights of the round of block {sent.weights.block} stand on chain", block=block)
                return
            else:
                self._store.forget_sent(mechanism, sent)
                why = "permit, version key, minimum of weights or an unreadable commit"
                warn("reveal_dropped", f"the chain dropped the weights committed at block {block} ({why}); they are set again")

    async def _look_at_unknown(self, view: _View, mechanism: int, updated: int, last: Weights | None, newest: Weights) -> None:
        """A set of this hotkey that we have no note of: ours of a store that was lost, or somebody else's."""
        row = await self._row(view, mechanism)
        for known in (newest, *([last] if last else [])):
            if view.is_row(row, known, updated):
                self._store.keep_publication(updated, known, mechanism)
                tell("published", f"weights of the round of block {known.block} were found on chain", block=updated)
                return
        self._said.add(("unknown set", mechanism, updated))
        if last is not None:
            what = f"block {updated} has a weight set of this hotkey that this validator did not send"
            warn("foreign_weights", f"{what}: does another one run with it?", mechanism=mechanism)

    async def _hidden(self, view: _View, mechanism: int) -> tuple[PendingReveal, ...]:
        """Our commits that are not opened yet, oldest first. Of the view's block, as all that is compared with them is."""
        return await self._chain.pending(self._chain.hotkey, mechanism, view.block)

    async def _row(self, view: _View, mechanism: int) -> dict[str, float]:
        return await self._chain.weights(self._chain.hotkey, view.block, mechid=mechanism)

    # --- a new set ----------------------------------------------------------------------------------------------------

    async def _within_reach(self, view: _View, mechanism: int, weights: Weights) -> Weights:
        """The weights, or a row on the straight way to them that moves `max_change` of all weight: counted from our newest set
        that is on its way, else from our row on chain."""
        wanted = view.expected(weights, view.block)
        on_its_way = self._taken(mechanism)[-1:]
        if on_its_way:
            standing = view.expected(on_its_way[0].weights, view.block)
        else:
            standing = await self._row(view, mechanism)
        change = distance(standing, wanted) if standing and wanted else 0.0
        if change <= self._max_change + _ROUNDING:
            return weights
        part = self._max_change / change
        everybody = sorted(standing.keys() | wanted.keys())
        row = {h: (1 - part) * standing.get(h, 0.0) + part * wanted.get(h, 0.0) for h in everybody}
        if ("held", mechanism, weights.block) not in self._said:
            self._said.add(("held", mechanism, weights.block))
            what = f"the round of block {weights.block} moves {change:.1%} of all weight, more than {self._max_change:.1%}"
            how = "set is that much of it, and more an epoch later; all at once after a start with --weights.max-change 1"
            warn("held_back", f"{what}: LOOK AT IT; {how}", mechanism=mechanism, change=f"{change:.3f}")
        return Weights(weights.block, row)

    async def _set(self, view: _View, mechanism: int, wanted: Weights, weights: Weights) -> Step:
        """weights: what is sent, all of what is wanted or part of the way to it."""
        unknown = next((one for one in self._store.sent(mechanism) if one.block is None), None)
        again = unknown is not None and unknown.weights == weights
        sent = unknown if unknown is not None and again else Sent(view.block, weights)
        if not again:  # the new ones carry the nonce of what is unknown, so the two cannot both land
            self._store.keep_sent(mechanism, sent, instead_of=unknown)

        def sending(digest: str) -> None:
            self._store.keep_sent(mechanism, replace(sent, digests=(*sent.digests, digest)))

        since, digest = (sent.since, "".join(sent.digests[-1:])) if again else (None, "")
        self.is_sending = True
        try:
            with publishing():
                receipt = await self._chain.set_weights(
                    weights, version_key=VERSION_KEY, mechid=mechanism, since=since, digest=digest, sending=sending
                )
        except (Rejected, Unavailable) as error:
            if not again and (isinstance(error, Rejected) or error.certain):  # of an earlier try nothing is known
                self._store.forget_sent(mechanism, sent)
            raise
        finally:
            self.is_sending = False
        if not receipt.verified_by_readback:
            return Step.WAITS  # another set of ours was quicker, maybe an earlier try of this one: `_find` will see
        what = f"weights of the round of block {weights.block}{f' for mechanism {mechanism}' if mechanism else ''}"
        is_whole = weights.by_hotkey == wanted.by_hotkey
        if receipt.mode != "plain":
            reveals_at = receipt.reveals_at or receipt.block + 1
            taken = replace(sent, block=receipt.block, reveals_at=reveals_at, digests=(receipt.digest,))
            self._store.keep_sent(mechanism, taken)
            tell("committed", f"{what} are on chain, encrypted", block=receipt.block, reveals_at=reveals_at)
            return Step.COMMITTED if is_whole else Step.HELD
        self._store.keep_publication(receipt.block, weights, mechanism, sent)
        tell("published", f"{what} set on chain and read back", block=receipt.block)
        return self._be_quiet(mechanism, wanted, receipt.block + view.epoch, Step.STANDS if is_whole else Step.HELD)

    # --- watching the chain and the age of what stands ----------------------------------------------------------------

    @property
    def _stale_s(self) -> float:
        """Seconds after which the newest final block is an old one."""
        seconds = self._block_seconds or (self._seen.block_seconds if self._seen else 12.0)
        return max(STALE_BLOCKS * seconds, self._tolerance_s)

    async def _final(self) -> int:
        """The newest final block, noted with the time at which it grew; the first of this process with its own time."""
        final = (await self._chain.finalized()).block
        is_first = not self._block_seconds
        if is_first:
            self._block_seconds = await self._chain.block_seconds()
        if is_first or self._seen is None or final > self._seen.block:
            age = max(0.0, time.time() - await self._chain.timestamp(final)) if is_first else 0.0
            self._grew = time.monotonic() - age
            before = self._seen or ChainSeen(final, 0.0, 0.0, EPOCH, None)
            self._keep_seen(replace(before, block=final, at=time.time() - age, block_seconds=self._block_seconds))
            note(head=final, head_time=time.time() - age)
        return final

    def _keep_seen(self, seen: ChainSeen) -> None:
        """In the store only now and then: a process that begins with a silent chain counts on from there."""
        self._seen, kept = seen, self._kept
        changed = kept is None or replace(kept, block=seen.block, at=seen.at) != seen
        if kept is None or changed or not 0 <= seen.block - kept.block < STALE_BLOCKS:
            self._kept = seen
            self._store.keep_chain_seen(seen)

    def watch(self) -> None:
        """Says that no new final block comes, once; and once an epoch that our last set that stands is too old, blocks being
        counted on while the chain is silent. Part of every look; asks nobody."""
        still_s = time.monotonic() - self._grew
        sets = {mechanism: self._store.last_publication(mechanism) for mechanism in self._decided()}
        first = self._store.first_decided() or 0
        block = self._seen.block if self._seen else max([first, *(one[0] for one in sets.values() if one)])
        if still_s > self._stale_s and ("still", block) not in self._said:
            self._said.add(("still", block))
            advice = "look at the node of --subtensor.network, or name spare ones with --subtensor.fallbacks"
            warn("no_final_block", f"no new final block for {still_s:.0f} s, the newest is {block}: {advice}", block=block)
        seconds = self._block_seconds or (self._seen.block_seconds if self._seen else 12.0)
        now = block + int(still_s / seconds)
        epoch, patience = (self._seen.epoch, self._seen.reveal_epochs or 0) if self._seen else (EPOCH, 0)
        for mechanism, stands in sets.items():
            since = stands[0] if stands else first
            epochs = (now - since) // epoch
            if epochs < self._alarm_epochs + patience or ("alarm", mechanism, since, epochs) in self._said:
                continue
            self._said.add(("alarm", mechanism, since, epochs))
            which = f" of mechanism {mechanism}" if mechanism else ""
            last = f"the last set{which} that stands on chain is of block {since}" if stands else f"no set{which} stands on chain"
            warn("weights_alarm", f"{last}, {epochs} epochs ago", mechanism=mechanism, epochs=epochs, block=now)


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Share of all weight, 0..1, that lies elsewhere: half the sum of the differences of two rows that sum to 1."""
    return math.fsum(abs(one.get(h, 0.0) - other.get(h, 0.0)) for h in one.keys() | other.keys()) / 2
