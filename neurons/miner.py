"""The miner: `python neurons/miner.py --help`, or `sn29 miner --help`.

Ctrl-C and SIGTERM end it within --stop.within seconds (`neurons.ending`): a step of the training is ended and a checkpoint
written, if that is done by then; else the last checkpoint stands, and its later steps are done again.

Trains a model on the competition's kind of text, measures it by the validators' own rule, publishes it when it would win,
follows up what became of it and trains on: see `sn29.mining` for the loop. With --model it publishes that folder and ends.

The repository is private from before the upload until the commitment is final. With --sealed the chain gets the digest
alone first, and where the model is when that is final; see `sn29.submission` for the order of the steps.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from neurons.ending import Stop
from neurons.status_page import beside
from sn29 import telemetry
from sn29.concealment import clean, conceal
from sn29.errors import Reason, Rejected, Sn29Error
from sn29.rules.competition import Competition, tokenizer_for
from sn29.settings import MinerSettings, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neurons.adapters import Tokenizers
    from sn29.chain import Chain
    from sn29.evaluation.worker import Evaluator
    from sn29.hub import Hub
    from sn29.mining import Chance, Plan, Slice, Tools
    from sn29.records import Commitment
    from sn29.rules.schedule import CompetitionFile
    from sn29.submission import FixedText


Chosen = TypeVar("Chosen")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all that was asked for is done or a signal ended it, 1 when something was refused, with one line that
    says what, 2 for wrong usage."""
    try:
        settings = read(MinerSettings, sys.argv[1:] if arguments is None else arguments)
        telemetry.configure(
            as_json=settings.log_json, level=settings.log_level, file=settings.log_file, file_mb=settings.log_file_mb,
            keep=settings.log_keep,
        )  # fmt: skip
        conceal(settings.hub_token, "(--hub.token)")
        if settings.publish_now:
            return _ask_to_publish(settings)
        stop = Stop("miner", settings.stop_within_s)
        stop.run(lambda stop: run(settings, stop))
        stop.leave()
    except Sn29Error as error:
        print(f"sn29 miner: {clean(error)}", file=sys.stderr)
        if isinstance(error, Rejected):
            print(f"  what to do: {clean(error.advice)}", file=sys.stderr)
        return error.exit_status
    return 0


def _ask_to_publish(settings: MinerSettings) -> int:
    from sn29.mining import ask_to_publish

    path = ask_to_publish(settings.work_dir, give_up_crown=settings.give_up_crown)
    print(f"asked for in {path}: the miner of this folder publishes its checkpoint when its next forecast is due")
    return 0


async def run(settings: MinerSettings, stop: Stop) -> None:
    """The loop, or the submission of --model."""
    from neurons.adapters import Tokenizers, open_chain, read_files
    from sn29.evaluation.worker import Here
    from sn29.hub import Hub

    file = chosen(read_files(settings).files, settings.competition)
    if "/" not in settings.repo:
        raise Rejected(Reason.SETTING, settings.repo or "nothing", "namespace/name", "--repo")
    _check_records(settings)
    hub = Hub(settings.hub_endpoint, token=settings.hub_token or None)
    chain = open_chain(settings)  # a missing key is said now, not after the training
    with alone(settings.work_dir):
        async with beside(settings, "miner", settings.work_dir), Here() as here:
            telemetry.note(hotkey=chain.hotkey)
            miner = _Miner(settings, file, chain, hub, Tokenizers(hub, settings.work_dir / "tokenizers"), here)
            try:
                await (miner.loop() if settings.model is None else miner.submit_once(settings.model))
            finally:
                stop.left = _left(settings)


def _left(settings: MinerSettings) -> str:
    """What the next start goes on with, in words."""
    from sn29.mining import STATE, read_state

    if settings.model is not None or not (settings.work_dir / STATE).exists():
        return f"what was done for {settings.model or settings.repo} is not done again"
    state = read_state(settings.work_dir / STATE)
    return f"training run {state.run} is at {state.phase!s}, its last checkpoint stands"


def _check_records(settings: MinerSettings) -> None:
    """What the loop needs is said before it trains. Raises Rejected(SETTING)."""
    from sn29.mining import CHAMPION

    if settings.records is not None and not settings.records.exists():
        raise Rejected(Reason.SETTING, f"no {settings.records}", "a folder of a validator's round records", "--records")
    if settings.records is None and settings.model is None and settings.publish_at > 0:
        wanted = "a folder of a validator's round records; or --publish-at 0, to publish without a forecast"
        raise Rejected(Reason.SETTING, "no --records", wanted, "--publish-at")
    if settings.records is None and settings.model is None and settings.start == CHAMPION:
        raise Rejected(Reason.SETTING, "no --records", "a folder of a validator's round records", f"--start {CHAMPION}")


@contextmanager
def alone(work_dir: Path) -> Iterator[None]:
    """A lock that ends with the process. Raises Rejected(SETTING) when another miner works in the folder, Unavailable."""
    from neurons.slices import opened_for_lock

    with opened_for_lock(work_dir / "lock") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            got, rule = f"a miner that works in {work_dir}", "a --work.dir of its own"
            raise Rejected(Reason.SETTING, got, rule, "--work.dir") from None
        yield


def chosen(competitions: Mapping[str, Chosen], name: str) -> Chosen:
    """One of them by its name. Raises Rejected(UNKNOWN_COMPETITION)."""
    if name not in competitions:
        raise Rejected(Reason.UNKNOWN_COMPETITION, name, ", ".join(competitions), "--competition")
    return competitions[name]


async def in_thread(work: Callable[[], Path], over: threading.Event) -> Path:
    """Whoever cancels it sets `over`, and it ends when the work has; whatever the work raises then, it stays cancelled."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        over.set()
        with suppress(Sn29Error):
            await task
        raise


@dataclass(frozen=True, slots=True)
class _Miner:
    """What the loop's tools are made of."""

    settings: MinerSettings
    file: CompetitionFile
    chain: Chain
    hub: Hub
    tokenizers: Tokenizers
    evaluator: Evaluator
    told: set[str] = field(default_factory=set)
    """Warnings of forecasts, each of which is told once."""

    async def loop(self) -> None:
        from sn29.mining import Plan, mine

        s = self.settings
        telemetry.tell("started", f"miner {self.chain.hotkey} for {s.competition}", hotkey=self.chain.hotkey)
        start = str(Path(s.start).expanduser().absolute()) if s.start and Path(s.start).expanduser().is_dir() else s.start
        plan = Plan(
            s.work_dir, s.publish_at, s.forecast_every, s.steps, s.cycles, start, s.records, s.follow, s.give_up_crown, s.poll_s
        )
        state = await mine(self._tools(plan), plan)
        what = f"{state.published}: {state.judged or 'not judged yet'}" if state.published else "nothing was published"
        telemetry.tell("over", f"{state.run} training runs are done; {what}", hotkey=self.chain.hotkey)

    def _tools(self, plan: Plan) -> Tools:
        from neurons.adapters import dataset_of
        from sn29.mining import Tools

        dataset = dataset_of(self.hub, self.settings.competitions_dir)
        return Tools(
            self.chain, self._rules_at, dataset, self.settings.repo, self._train, lambda f: self._forecast(f, plan), self._publish
        )

    async def submit_once(self, folder: Path) -> None:
        """Publishes the folder, and with --records waits for what becomes of it. Raises Rejected(SETTING) where that gives the
        crown up."""
        from sn29.mining import crown_at_stake, holder_in, note
        from sn29.submission import follow_up, stands, verdict

        telemetry.tell("started", f"miner {self.chain.hotkey} for {self.settings.competition}", hotkey=self.chain.hotkey)
        s, (block, competition) = self.settings, await self._rules_now()
        if not s.give_up_crown and not await stands(self.chain, folder):
            known = holder_in(s.records, s.competition, block) if s.records else None
            holder = (known.hotkey if known else "") if s.records else None
            if why := await crown_at_stake(self.chain, competition, holder):
                raise Rejected(Reason.SETTING, why, "a hotkey that has nothing to lose, or --give-up-crown", "--wallet.hotkey")
        commitment = await self._publish(folder)
        note(s.work_dir, commitment, folder)
        length = competition.samples.window_blocks
        if s.records is None:
            return
        async with self.chain:
            found = await follow_up(self.chain, s.records, commitment, window_blocks=length, windows=s.follow, poll_s=s.poll_s)
        if found is None:
            telemetry.warn("unknown", f"{commitment.model}: no record of {s.follow} windows names it", hotkey=commitment.hotkey)
        else:
            telemetry.tell("judged", verdict(found), hotkey=commitment.hotkey, status=found.outcome.status, block=found.block)

    # the tools

    def _rules_at(self, block: int) -> Competition:
        from sn29.rules.schedule import in_force

        return in_force(self.file, block)

    async def _rules_now(self) -> tuple[int, Competition]:
        async with self.chain:
            block = (await self.chain.head()).block
        return block, self._rules_at(block)

    def _fixed(self, competition: Competition, *, own: bool) -> FixedText | None:
        """The competition's tokenizer; None where models bring their own."""
        prescribed = tokenizer_for(competition, own)
        return self.tokenizers(prescribed) if prescribed else None

    async def _train(self, asked: Slice) -> Path:
        """In a thread, so that a signal is heard: the checkpoint is written, and then it ends."""
        from neurons.slices import train_in_processes
        from neurons.training import train_for

        block, competition = await self._rules_now()
        # Another run on the same text reads it in another order.
        settings = self.settings.model_copy(update={"seed": self.settings.seed + asked.run - 1})
        if settings.processes > 1:
            return await train_in_processes(settings, block, asked)
        over = threading.Event()
        return await in_thread(lambda: train_for(settings, competition, self.hub, asked, over.is_set), over)

    async def _forecast(self, folder: Path, plan: Plan) -> Chance:
        from neurons.adapters import dataset_of
        from sn29.forecast import forecast
        from sn29.mining import Chance

        s, (block, competition) = self.settings, await self._rules_now()
        fixed = await asyncio.to_thread(self._fixed, competition, own=(folder / "tokenizer.json").exists())
        found = await forecast(
            folder, competition, fixed, plan.records, dataset_of(self.hub, s.competitions_dir), self.evaluator,
            threads=s.threads, deadline_s=s.evaluation_deadline_s, device=s.forecast_device or s.train_device, now=block,
            hotkey=self.chain.hotkey,
        )  # fmt: skip
        for warning in found.warnings:
            if warning not in self.told:
                self.told.add(warning)
                telemetry.warn("forecast", warning, hotkey=self.chain.hotkey)
        for refusal in found.refusals:
            telemetry.warn("check", str(refusal), hotkey=self.chain.hotkey, reason=refusal.reason.code)
        return Chance(found.probability, found.said, found.behind)

    async def _publish(self, folder: Path) -> Commitment:
        """The checks of a validator, then the submission. Raises Rejected when they refuse it, unless it is forced."""
        from sn29.submission import check, submit

        s, competition = self.settings, (await self._rules_now())[1]
        fixed = await asyncio.to_thread(self._fixed, competition, own=(folder / "tokenizer.json").exists())
        checked = await check(
            folder, competition, fixed, threads=s.threads, deadline_s=s.evaluation_deadline_s, evaluator=self.evaluator
        )  # fmt: skip
        for refusal in checked.refusals:
            telemetry.warn("check", str(refusal), hotkey=self.chain.hotkey, reason=refusal.reason.code)
        if checked.refusals and not s.force:
            raise checked.refusals[0]
        if not checked.refusals:
            telemetry.tell("check", "a validator would evaluate this model", hotkey=self.chain.hotkey)
        async with self.chain:
            return await submit(self.chain, self.hub, folder, s.repo, competition, fixed, sealed=s.sealed, force=s.force)


if __name__ == "__main__":
    sys.exit(main())
