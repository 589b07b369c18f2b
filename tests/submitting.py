"""A miner that can be watched and stopped between any two of its steps.

As a program it kills itself (SIGKILL) there: `python submitting.py` reads one JSON object from standard input

    {"chain": PATH, "wallets": PATH, "hub": URL, "rules": TEXT, "folder": PATH, "sealed": BOOL,
     "miners": {NAME: {"token": HUB TOKEN, "deaths": [N, ...]}}}

and for each miner submits once for every N, dying after that many steps, then once to the end. All submissions are forks
of one process, so that importing everything is paid for once.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sn29 import telemetry
from sn29.chain import Chain, load_wallet
from sn29.hub import Hub
from sn29.localnet.ledger import LedgerSubstrate
from sn29.rules.competition import parse_competition
from sn29.submission import submit

NETUID = 29
Turn = Callable[[str], None]
"""What happens after a step; it is told the step's name."""


class WatchedHub(Hub):
    """After each of its writes somebody else has a turn."""

    def __init__(self, endpoint: str, token: str, turn: Turn) -> None:
        super().__init__(endpoint, token=token)
        self._turn = turn

    def create(self, *args: Any, **options: Any) -> None:
        super().create(*args, **options)
        self._turn("create")

    def set_private(self, repo_name: str, private: bool, *args: Any) -> None:
        super().set_private(repo_name, private, *args)
        self._turn("hide" if private else "show")

    def upload(self, *args: Any, **options: Any) -> str:
        revision = super().upload(*args, **options)
        self._turn("upload")
        return revision


class WatchedChain(Chain):
    """After each commitment, and at every look whether it is final, somebody else has a turn."""

    def __init__(self, path: Path, wallet: Any, turn: Turn, substrate: Any = None) -> None:
        super().__init__(NETUID, network="local", wallet=wallet, substrate=substrate or LedgerSubstrate(path))
        self._turn = turn

    async def commit(self, data: bytes) -> Any:
        receipt = await super().commit(data)
        self._turn("seal" if data.startswith(b"sealed:") else "commit")
        return receipt

    async def finalized(self) -> Any:
        found = await super().finalized()
        self._turn("look")
        return found


def main() -> None:
    asked = json.load(sys.stdin)
    telemetry.configure(level="CRITICAL")
    for name, miner in asked["miners"].items():
        for death in (*miner["deaths"], None):
            child = os.fork()
            if child == 0:
                asyncio.run(_submit(asked, name, miner["token"], death))
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == (-signal.SIGKILL if death else 0), f"{name} ended with {status}"


async def _submit(asked: dict[str, Any], name: str, token: str, death: int | None) -> None:
    steps = 0

    def turn(step: str) -> None:
        nonlocal steps
        steps += step != "look"
        if steps == death:
            os.kill(os.getpid(), signal.SIGKILL)

    wallet = load_wallet(name, "default", Path(asked["wallets"]))
    hub = WatchedHub(asked["hub"], token, turn)
    rules = parse_competition("c00", asked["rules"])
    async with WatchedChain(Path(asked["chain"]), wallet, turn) as chain:
        await submit(chain, hub, Path(asked["folder"]), f"{name}/model", rules, None, sealed=asked["sealed"])


if __name__ == "__main__":
    main()
