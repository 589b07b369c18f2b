"""The validator: `python neurons/validator.py --help`, or `sn29 validator --help`.

Two loops side by side: rounds, and the publisher that sets the latest weights on time however long a round takes. All
that they share is in the store. Ctrl-C and SIGTERM end both within --stop.within seconds (`neurons.ending`); what was measured
is kept. A set of weights that is on its way may use all of that time to be read back. It is not waited for any longer: the chain
answers within its own deadline, up to twice --chain.deadline, but what was sent is noted, and the next start looks for it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from neurons.ending import Stop
from neurons.status_page import beside
from sn29 import record_files, telemetry
from sn29.concealment import clean
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import ValidatorSettings, read

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from neurons.adapters import RulesReader
    from sn29.chain import Chain
    from sn29.evaluation.worker import Evaluator
    from sn29.examination import Machine, Ports
    from sn29.hub import Hub
    from sn29.publication import Publisher, Step
    from sn29.step_log import HeldSteps
    from sn29.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after --rounds or a signal, 1 when a setting, the wallet or a competition file is wrong, 2: wrong usage."""
    try:
        settings = read(ValidatorSettings, sys.argv[1:] if arguments is None else arguments)
        telemetry.configure(
            as_json=settings.log_json, level=settings.log_level, file=settings.log_file, file_mb=settings.log_file_mb,
            keep=settings.log_keep,
        )  # fmt: skip
        stop = Stop("validator", settings.stop_within_s)
        with _table(settings):
            stop.run(lambda stop: run(settings, stop))
        stop.leave()
    except Sn29Error as error:
        print(f"sn29 validator: {clean(error)}", file=sys.stderr)
        if isinstance(error, Rejected):
            print(f"  what to do: {clean(error.advice)}", file=sys.stderr)
        return error.exit_status
    return 0


def _table(settings: ValidatorSettings) -> AbstractContextManager[None]:
    """The live table of --tui."""
    if not settings.tui:
        return nullcontext()
    from neurons.live_table import shown

    return shown(settings.state_dir)


async def run(settings: ValidatorSettings, stop: Stop) -> None:
    """Both loops until one ends or it is cancelled."""
    from neurons.adapters import RulesReader, open_evaluator
    from sn29.evaluation.confinement import hide
    from sn29.examination import Machine
    from sn29.hub import Hub
    from sn29.store import opened

    hide()
    RulesReader(settings)  # what is wrong with a file is said before anything is opened
    hub = Hub(settings.hub_endpoint, say=telemetry.warn)
    machine = Machine(
        models_dir=settings.state_dir / "models",
        records_dir=settings.state_dir / "records",
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        evaluation_deadline_s=settings.evaluation_deadline_s,
        download_deadline_s=settings.download_deadline_s,
        models_bytes=int(settings.models_gb * 1e9) or None,
        model_bytes=int(settings.evaluation_memory_gb * 1e9) or None,
    )
    path = settings.state_dir / "store.db"
    with alone(settings.state_dir), opened(path, say=telemetry.tell) as store:  # which may have to be brought up to date
        stop.left = _left(store)
        async with beside(settings, "validator", settings.state_dir):
            telemetry.stage("waiting", detail="starting: a model of our own is evaluated first")
            evaluator = await open_evaluator(settings, machine.work_dir)
            try:
                await evaluator.self_test(device=settings.device, dtype=settings.dtype, threads=settings.threads)
                await _judge_and_publish(settings, stop, hub, store, machine, evaluator)
            finally:
                await evaluator.close()
                stop.left = _left(store)
    telemetry.tell("stopped", "nothing is lost: start again to go on")


def _left(store: Store) -> str:
    """What the next start goes on with, in words."""
    rounds = [f"the round of block {opened.block} is open" for opened in store.open_rounds()[-1:]]
    sent = [f"weights of the round of block {one.weights.block} are on their way" for m in range(16) for one in store.sent(m)]
    return "; ".join([*rounds, *sent]) or "no round is open"


async def _judge_and_publish(
    settings: ValidatorSettings, stop: Stop, hub: Hub, store: Store, machine: Machine, evaluator: Evaluator
) -> None:
    """Until one of the two loops ends or it is cancelled."""
    from neurons.adapters import RulesReader, Tokenizers, dataset_of, open_chain
    from sn29 import changeover
    from sn29.examination import Ports
    from sn29.publication import Publisher
    from sn29.step_log import HeldSteps

    chain = open_chain(settings)
    telemetry.note(hotkey=chain.hotkey)
    telemetry.stage("waiting", detail="starting: the chain is asked")
    publisher = Publisher(
        chain,
        store,
        max_change=settings.weights_max_change,
        alarm_epochs=settings.weights_alarm_epochs,
        pause_s=settings.poll_s,
    )
    try:
        await _until_it_answers(lambda: _belong(chain, store), publisher, settings.poll_s)
        reader = RulesReader(settings, validator=chain.hotkey)
        tokenizers = Tokenizers(hub, settings.state_dir / "tokenizers")
        ports = Ports(chain, hub, store, dataset_of(hub, settings.competitions_dir), tokenizers, machine, evaluator)
        if settings.warm_start:
            from sn29.warm_start import warm_start

            named = [path.expanduser() for path in settings.warm_start]
            cells = settings.warm_start_cells
            await _until_it_answers(lambda: warm_start(ports, reader.rules(), named, cells=cells), publisher, settings.poll_s)
        if settings.start_record is not None:
            from sn29.warm_start import begin_from

            path, record = settings.start_record, record_files.read(settings.start_record)
            await _until_it_answers(lambda: begin_from(ports, reader.rules(), record, path), publisher, settings.poll_s)
        rounds_done = asyncio.Event()
        log = telemetry.Curves(settings.wandb, settings.state_dir, {"hotkey": chain.hotkey}) if settings.wandb else None
        held = HeldSteps(settings.state_dir / "wandb-held", store, log.log) if log is not None else None
        noted = NotedRules(ports, reader, changeover.software(), asyncio.Lock())
        await _until_it_answers(noted.look, publisher, settings.poll_s)  # before the publisher notes that we are here
        names = ", ".join(reader.files.files)
        telemetry.tell("started", f"validator {chain.hotkey} on {settings.network}", competitions=names)
        rounds = asyncio.create_task(_rounds(settings, noted, rounds_done, held))
        watching = asyncio.create_task(noted.watch(rounds_done, settings.poll_s))
        publishing = asyncio.create_task(_publish(publisher, stop, settings.poll_s, rounds_done, held))
        try:
            await _until_over(rounds, publishing, watching)
        finally:
            if log is not None:
                log.finish(min(3.0, stop.left_s))
    finally:
        await chain.close()


async def _until_it_answers(step: Callable[[], Awaitable[object]], publisher: Publisher, poll_s: float) -> None:
    """One step of the start: waits for chain and Hub, as it would later on. Raises what the step raises but Unavailable."""
    pause_s = poll_s
    while True:
        try:
            await step()
        except Unavailable as error:
            telemetry.warn("unavailable", str(error))
            publisher.watch()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 100 * poll_s)
        else:
            return


async def _belong(chain: Chain, store: Store) -> None:
    """One store, one network: raises Rejected(SETTING) otherwise. An upgraded runtime is only told."""
    identity = await chain.identity()
    before = store.belong_to(identity, chain.netuid)
    if before is not None:
        telemetry.warn("runtime", f"the chain's runtime is {identity.spec_version} now; it was {before}")


@dataclass(frozen=True, slots=True)
class NotedRules:
    """The competition files, looked at every poll while a round is worked on as well: from which block on new ones hold must not
    depend on how long a round takes here."""

    ports: Ports
    reader: RulesReader
    running: Mapping[str, str]
    planning: asyncio.Lock
    """Nothing is noted between the choice of a round's rules and its opening."""

    async def look(self) -> int:
        """Reads files that changed, and notes what holds from which block on; the final block at which it looked."""
        from sn29 import changeover

        self.reader.look_again()
        block = (await self.ports.chain.finalized()).block
        changeover.note(self.ports.store, block, self.reader.files.texts, self.running, self.reader.rules)
        return block

    async def watch(self, done: asyncio.Event, poll_s: float) -> None:
        said = ""
        while not done.is_set():
            try:
                async with self.planning:
                    await self.look()
                said = ""
            except Unavailable:  # the publisher tells that the chain does not answer
                pass
            except Sn29Error as error:
                if str(error) != said:
                    telemetry.warn("rules_unread", f"the competition files could not be looked at: {error}; it is tried again")
                said = str(error)
            except Exception:  # noqa: BLE001 - the third daemon loop: files may lie on a network's disk
                telemetry.bug("looking at the competition files failed; it is tried again")
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), poll_s)


async def _rounds(settings: ValidatorSettings, noted: NotedRules, done: asyncio.Event, held: HeldSteps | None) -> None:
    """One round after the other, waiting for the chain in between. Each is run by the rules in force at its block."""
    from sn29 import changeover
    from sn29.round import plan_round, run_round

    finished, said, ports = 0, set[int](), noted.ports
    while not settings.rounds or finished < settings.rounds:
        try:
            async with noted.planning:
                block = await noted.look()
                due = changeover.due(ports.store, block, noted.running, settings.catch_up, noted.reader.rules, said)
                plan = None
                if due is not None:
                    plan = await plan_round(ports, due.rules, catch_up=settings.catch_up, since=due.since, last=due.last)
            if due is not None and plan is not None:
                await _belong(ports.chain, ports.store)
                began = time.monotonic()
                await run_round(ports, due.rules, plan)
                telemetry.stage("waiting")
                finished += 1
                if held is not None:
                    await _hold_step(ports, plan.block, held, time.monotonic() - began)
                continue
            telemetry.stage("waiting")
        except Sn29Error as error:
            telemetry.warn("unavailable", str(error))
            telemetry.stage("waiting", detail=f"tried again: {error}")
        except Exception:  # noqa: BLE001 - one of the three daemon loops: a bug is logged with its traceback, the loop goes on
            telemetry.bug("the round failed; it is tried again")
            telemetry.stage("waiting", detail="the round failed; it is tried again")
        await asyncio.sleep(settings.poll_s)
    done.set()


async def _hold_step(ports: Ports, block: int, held: HeldSteps, seconds: float) -> None:
    """The finished round as a step of Weights & Biases, which the publisher's loop shows when its weights stand."""
    from sn29.step_log import step_log

    record = await asyncio.to_thread(record_files.newest, ports.machine.records_dir)
    if record is not None and record.head.block == block:
        uids = (await ports.chain.metagraph(block)).uid_of()
        held.hold(record, await asyncio.to_thread(step_log, record, uids, now=time.time(), step_s=seconds))


async def _publish(publisher: Publisher, stop: Stop, poll_s: float, rounds_done: asyncio.Event, held: HeldSteps | None) -> None:
    """Sets weights whenever they are due; ends when the rounds are done and nothing is left to do for their weights."""
    from sn29.publication import Step

    pause_s = 0.0
    while True:
        try:
            await _pause(publisher, pause_s, poll_s)
            last_look = rounds_done.is_set()
            try:
                steps = await _look(publisher, stop)
            finally:  # a round that pays nobody, or is judged in the open, is shown also where no weights can be set
                if held is not None:
                    _show(held)
            if last_look and all(isinstance(step, Step) and step.settled for step in steps.values()):
                return
            pause_s = poll_s
        except (Unavailable, Rejected) as error:  # no mechanism can be set, e.g. not registered (yet): said until mended
            telemetry.warn("not_published", str(error))
            pause_s = min(max(2 * pause_s, 2 * poll_s, getattr(error, "retry_s", None) or 0.0), 100 * poll_s)
        except Exception:  # noqa: BLE001 - another daemon loop
            telemetry.bug("setting weights failed; it is tried again")
            pause_s = max(pause_s, poll_s)


def _show(held: HeldSteps) -> None:
    try:
        held.show()
    except OSError as error:
        telemetry.warn("wandb", f"what is held back cannot be read: {error}; weights are set all the same")


async def _pause(publisher: Publisher, pause_s: float, poll_s: float) -> None:
    """However long weights are left alone, the chain is looked at at each poll: it is not what is old then."""
    while pause_s > poll_s:
        await asyncio.sleep(poll_s)
        pause_s -= poll_s
        with suppress(Sn29Error):
            await publisher.see()
    await asyncio.sleep(pause_s)


async def _look(publisher: Publisher, stop: Stop) -> Mapping[int, Step | Sn29Error]:
    """`Publisher.look`, which is not cut off while a set is on its way and there is time: it is better read back now."""
    looking = asyncio.create_task(publisher.look())
    try:
        return await asyncio.shield(looking)
    except asyncio.CancelledError:
        while publisher.is_sending and stop.left_s > 0 and not looking.done():
            await asyncio.wait([looking], timeout=min(0.05, stop.left_s))
        looking.cancel()
        with suppress(asyncio.CancelledError, Sn29Error):
            await looking
        raise


def alone(state_dir: Path, who: str = "a validator", rule: str = "a --state.dir of its own") -> TextIO:
    """A lock that ends with the process, with the process's number in it, and `who` it is.

    Raises Rejected(SETTING) when another process has it: two validators would set weights twice; and when the folder cannot be
    written to.
    """
    path = state_dir / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise Rejected(Reason.SETTING, f"{path}: {error.strerror}", "a folder that can be written to", "--state.dir") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        number, _, other = stream.read(200).strip().partition(" ")
        stream.close()
        got = f"{other or 'another process'} that works in {state_dir}{f' (process {number})' if number else ''}"
        raise Rejected(Reason.SETTING, got, rule, "--state.dir") from None
    stream.truncate(0)
    stream.write(f"{os.getpid()} {who}\n")
    stream.flush()
    return stream


async def _until_over(*tasks: asyncio.Task[None]) -> None:
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second time would cut off what it does about the first
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
