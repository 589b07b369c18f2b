"""A validator's weights on chain: set when they are due, read back, never twice, however long a round takes."""

from __future__ import annotations

from collections.abc import Mapping

from sn29.chain import Chain
from sn29.errors import Reason, Rejected
from sn29.records import Weights
from sn29.store import Store
from sn29.telemetry import tell, warn

VERSION_KEY = 100
"""0.1.0 as the chain counts versions; an owner who raises the subnet's key above it turns this software's weights away."""


async def publish(chain: Chain, store: Store) -> bool:
    """Sets the newest weights on chain if they are due; True when they were set and read back.

    Due: decided by a newer round than the last set, or a tempo after it (validators that fall silent lose their standing).
    A set that landed while we could not see it (a crash, a lost reply) is found by reading the row back, not repeated.
    """
    weights = store.weights()
    if weights is None or not weights.by_hotkey or weights.block == store.taken_over():
        return False
    head, params = await chain.head(), await chain.params()
    me = next((n for n in (await chain.metagraph()).neurons if n.hotkey == chain.hotkey), None)
    if me is None:
        raise Rejected(Reason.NOT_REGISTERED, chain.hotkey, f"a hotkey that is registered on subnet {chain.netuid}")
    last_block, last = next(reversed(store.publications()), (None, None))
    fresh = last is None or last.block < weights.block
    if not fresh and last_block is not None and head.block - last_block < params.tempo:
        return False
    since = weights.block if last_block is None else last_block
    if fresh and me.last_update > since and _same(await chain.weights(chain.hotkey), weights):
        store.keep_publication(me.last_update, weights)
        return True
    if me.last_update + params.weights_rate_limit > head.block:  # registration counts as a set
        return False
    receipt = await chain.set_weights(weights, version_key=VERSION_KEY)
    if not receipt.verified_by_readback:
        warn("not_published", "the row on chain is not the one that was sent: it is set again when the rate limit allows")
        return False
    store.keep_publication(receipt.block, weights)
    tell("published", f"weights of the round of block {weights.block} set on chain and read back", block=receipt.block)
    return True


def _same(on_chain: Mapping[str, float], weights: Weights) -> bool:
    """Equal but for the chain's 16-bit rounding: each share within 1/65535 of the largest."""
    hotkeys = on_chain.keys() | weights.by_hotkey.keys()
    return all(abs(on_chain.get(h, 0.0) - weights.by_hotkey.get(h, 0.0)) <= 2 / 65535 for h in hotkeys)
