"""A chain with wallets in one folder, behind one of the backends that the adapter serves; for the tests of the chain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from beacon import TestBeacon
from loopback_node import LoopbackNode

from sn29.chain import Chain, create_wallet
from sn29.localnet.ledger import Ledger, LedgerSubstrate

NETUID = 29
BLOCK_S = 0.05


class Net:
    """`node` is there (and must be entered by the caller) when the backend is a node; the ledger is there always."""

    def __init__(self, folder: Path, *, node: bool = False, without: Collection[str] = (), **params: Any) -> None:
        # One seed: the SDK caches a node's metadata by genesis, and need not fetch it for each test.
        params.setdefault("block_seconds", BLOCK_S)
        params.setdefault("seed", round(params["block_seconds"] * 1000))
        self.folder, self.beacon = folder, TestBeacon()
        self.ledger = Ledger.create(folder / "chain", netuid=NETUID, beacon=self.beacon, **params)
        self.node = LoopbackNode(folder / "chain", beacon=self.beacon, without=without) if node else None

    def wallet(self, name: str, *, registered: bool = True, permit: bool = False) -> Any:
        wallet = create_wallet("cold", name, self.folder / "wallets")
        if registered:
            self.ledger.register(wallet.hotkey.ss58_address, wallet.coldkeypub.ss58_address, stake=1, permit=permit)
            self.ledger.advance(1)
        return wallet

    def chain(self, wallet: Any = None, netuid: int = NETUID, **options: Any) -> Chain:
        if self.node is not None:
            options.setdefault("network", self.node.url)
        else:
            options.setdefault("substrate", LedgerSubstrate(self.folder / "chain", self.beacon))
        return Chain(netuid, wallet=wallet, **options)


def run(chain: Chain, story: Callable[[Chain], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with chain:
            await story(chain)

    asyncio.run(inside())
