"""A miner's loop with a training that takes no time, for tests that watch it or stop it between any two of its steps.

As a program it kills itself (SIGKILL) there: `python mining_steps.py` reads one JSON object from standard input

    {"chain": PATH, "wallets": PATH, "hub": URL, "rules": TEXT, "text": FOLDER, "checkpoints": [FOLDER, ...],
     "chances": [P, ...], "plan": {...}, "miners": {NAME: {"token": HUB TOKEN, "work": FOLDER, "deaths": [N, ...]}}}

and for each miner runs the loop once for every N, dying after that many steps, then once to the end. All of them are forks of
one process, so that importing everything is paid for once.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitting import Turn, WatchedChain, WatchedHub

from sn29 import telemetry
from sn29.chain import load_wallet
from sn29.corpus import LocalFolder
from sn29.errors import Reason, Rejected
from sn29.mining import Chance, Plan, Slice, State, Tools, mine
from sn29.records import Commitment
from sn29.rules.competition import parse_competition
from sn29.submission import submit


class Training:
    """Puts the next ready checkpoint where a trainer would write it; like one, it goes on where it was after a death."""

    def __init__(self, checkpoints: Sequence[Path], turn: Turn, log: Path) -> None:
        self.checkpoints, self.turn, self.log = checkpoints, turn, log
        self.slices: list[Slice] = []
        self.unusable: list[str] = []
        """Starts that a trainer refuses."""

    async def __call__(self, asked: Slice) -> Path:
        self.turn("train")
        self.slices.append(asked)
        if asked.start in self.unusable:
            raise Rejected(Reason.REPOSITORY_GONE, "HTTP 404", "a public repository", asked.start)
        done = self.log.read_text().splitlines() if self.log.exists() else []
        name = f"{asked.run} {asked.until} {asked.start}"
        if name not in done:
            part, final = asked.folder / "part", asked.folder / "checkpoint"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.checkpoints[len(done)], part)
            (part / "training.json").write_text("{}")  # no part of a model: it must not be uploaded
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            (asked.folder / "state.pt").write_text("weights, optimizer, place in the text")
            self.log.write_text("\n".join([*done, name]) + "\n")
        self.turn("trained")
        return asked.folder / "checkpoint"


def tools_of(
    subnet_chain: Path,
    wallet: Any,
    hub: WatchedHub,
    rules: str,
    text: Path,
    repo: str,
    training: Training,
    forecast: Callable[[Path], Chance],
    turn: Turn,
    substrate: Any = None,
) -> Tools:
    """The loop's tools on a real chain, a real Hub and real text."""
    competition = parse_competition("c00", rules)
    chain = WatchedChain(subnet_chain, wallet, turn, substrate)

    async def measured(folder: Path) -> Chance:
        turn("forecast")
        found = forecast(folder)
        turn("measured")
        return found

    async def publish(folder: Path) -> Commitment:
        turn("publish")
        async with chain:
            found = await submit(chain, hub, folder, repo, competition, None)
        turn("published")
        return found

    return Tools(chain, lambda _: competition, lambda *_: LocalFolder(text), repo, training, measured, publish)


def main() -> None:
    asked = json.load(sys.stdin)
    telemetry.configure(level="CRITICAL")
    for name, miner in asked["miners"].items():
        for death in (*miner["deaths"], None):
            child = os.fork()
            if child == 0:
                _mine(asked, name, miner, death)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == (-signal.SIGKILL if death else 0), f"{name} ended with {status}, not killed after {death} steps"


def _mine(asked: dict[str, Any], name: str, miner: dict[str, Any], death: int | None) -> State:
    steps = 0

    def turn(step: str) -> None:
        nonlocal steps
        steps += step != "look"
        if steps == death:
            os.kill(os.getpid(), signal.SIGKILL)

    work = Path(miner["work"])
    work.mkdir(exist_ok=True)
    training = Training([Path(p) for p in asked["checkpoints"]], turn, work / "trained.txt")

    def forecast(_: Path) -> Chance:
        done = len((work / "trained.txt").read_text().splitlines())
        return Chance(asked["chances"][done - 1], "as asked for")

    hub = WatchedHub(asked["hub"], miner["token"], turn)
    wallet = load_wallet(name, "default", Path(asked["wallets"]))
    chain, text = Path(asked["chain"]), Path(asked["text"])
    tools = tools_of(chain, wallet, hub, asked["rules"], text, f"{name}/model", training, forecast, turn)
    return asyncio.run(mine(tools, Plan(work_dir=work, **asked["plan"])))


if __name__ == "__main__":
    main()
