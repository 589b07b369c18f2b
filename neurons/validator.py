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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from neurons.ending import Stop
from neurons.status_page import beside
from sn29 import record_files, telemetry
from sn29.concealment import clean
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import ValidatorSettings, read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from neurons.adapters import RulesReader
    from sn29.chain import Chain
    from sn29.evaluation.worker import Evaluator
    from sn29.examination import Machine, Ports
    from sn29.hub import Hub
    from sn29.publication import Publisher, Step
    from sn29.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after --rounds or a signal, 1 when a setting, the wallet or a competition file is wrong."""
    try:
        settings = read(ValidatorSettings, sys.argv[1:] if arguments is None else arguments)
        telemetry.configure(
            as_json=settings.log_json, level=settings.log_level, file=settings.log_file, file_mb=settings.log_file_mb,
            keep=settings.log_keep,
        )  # fmt: skip
        with _table(settings):
            Stop("validator", settings.stop_within_s).run(lambda stop: run(settings, stop))
    except Sn29Error as error:
        print(f"sn29 validator: {clean(error)}", file=sys.stderr)
        return 1
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
    from sn29.store import Store

    hide()
    RulesReader(settings)  # what is wrong with a file is said before anything is opened
    hub = Hub(settings.hub_endpoint, say=telemetry.warn)
    lock = alone(settings.state_dir)  # before the store, which may have to be brought up to date
    store = Store(settings.state_dir / "store.db", say=telemetry.tell)
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
    stop.left = _left(store)
    try:
        async with beside(settings, "validator", settings.state_dir):
            telemetry.stage("waiting", detail="starting: a model of our own is evaluated first")
            evaluator = await open_evaluator(settings, machine.work_dir)
            try:
                await evaluator.self_test(device=settings.device, dtype=settings.dtype, threads=settings.threads)
                await _judge_and_publish(settings, stop, hub, store, machine, evaluator)
            finally:
                stop.left = _left(store)
                await evaluator.close()
    finally:
        store.close()
        lock.close()
    telemetry.tell("stopped", "nothing is lost: start again to go on")


def _left(store: Store) -> str:
    """What the next start goes on with, in words."""
    rounds = [f"the round of block {opened.block} is open" for opened in store.open_rounds()[-1:]]
    sent = [f"weights of the round of block {one.weights.block} are on their way" for m in range(16) for one in store.sent(m)]
    return "; ".join([*rounds, *sent, f"{store.count_losses():,} losses are kept"])


async def _judge_and_publish(
    settings: ValidatorSettings, stop: Stop, hub: Hub, store: Store, machine: Machine, evaluator: Evaluator
) -> None:
    """Until one of the two loops ends or it is cancelled."""
    from neurons.adapters import RulesReader, Tokenizers, dataset_of, open_chain
    from sn29.examination import Ports
    from sn29.publication import Publisher
    from sn29.round import begin_with

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
        await _until_it_answers(chain, store, publisher, settings.poll_s)
        reader = RulesReader(settings, validator=chain.hotkey)
        names = ", ".join(reader.files.files)
        telemetry.tell("started", f"validator {chain.hotkey} on {settings.network}", competitions=names)
        tokenizers = Tokenizers(hub, settings.state_dir / "tokenizers")
        ports = Ports(chain, hub, store, dataset_of(hub, settings.competitions_dir), tokenizers, machine, evaluator)
        if settings.warm_start:
            from sn29.warm_start import warm_start

            named = [path.expanduser() for path in settings.warm_start]
            await warm_start(ports, reader.rules(), named, cells=settings.warm_start_cells)
        if settings.start_record is not None:
            await begin_with(ports, record_files.read(settings.start_record))
        rounds_done = asyncio.Event()
        log = telemetry.open_wandb(settings.wandb, settings.state_dir, {"hotkey": chain.hotkey}) if settings.wandb else None
        rounds = asyncio.create_task(_rounds(settings, ports, reader, rounds_done, log))
        publishing = asyncio.create_task(_publish(publisher, stop, settings.poll_s, rounds_done))
        try:
            await _until_over(rounds, publishing)
        finally:
            if log is not None:
                log.finish()
    finally:
        await chain.close()


async def _until_it_answers(chain: Chain, store: Store, publisher: Publisher, poll_s: float) -> None:
    """Waits for the chain, as it would later on, and checks that it is the store's. Raises Rejected(SETTING)."""
    pause_s = poll_s
    while True:
        try:
            await _belong(chain, store)
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


async def _rounds(settings: ValidatorSettings, ports: Ports, reader: RulesReader, done: asyncio.Event, log: Any) -> None:
    """One round after the other, waiting for the chain in between. Each is run by the rules in force at its block."""
    from sn29 import changeover
    from sn29.round import plan_round, run_round

    finished, running, said = 0, changeover.software(), set[int]()
    while not settings.rounds or finished < settings.rounds:
        try:
            reader.look_again()
            block = (await ports.chain.finalized()).block
            changeover.note(ports.store, block, reader.files.texts, running, reader.rules)
            due = changeover.due(ports.store, block, running, settings.catch_up, reader.rules, said)
            plan = None
            if due is not None:
                plan = await plan_round(ports, due.rules, catch_up=settings.catch_up, since=due.since, last=due.last)
            if due is not None and plan is not None:
                await _belong(ports.chain, ports.store)
                began = time.monotonic()
                await run_round(ports, due.rules, plan)
                telemetry.stage("waiting")
                finished += 1
                if log is not None:
                    await _log_round(ports, plan.block, log, time.monotonic() - began)
                continue
            telemetry.stage("waiting")
        except Sn29Error as error:
            telemetry.warn("unavailable", str(error))
            telemetry.stage("waiting", detail=f"tried again: {error}")
        except Exception:  # noqa: BLE001 - one of the two daemon loops: a bug is logged with its traceback, the loop goes on
            telemetry.bug("the round failed; it is tried again")
            telemetry.stage("waiting", detail="the round failed; it is tried again")
        await asyncio.sleep(settings.poll_s)
    done.set()


async def _log_round(ports: Ports, block: int, log: Any, seconds: float) -> None:
    """The finished round as a step of Weights & Biases."""
    from sn29.step_log import step_log

    record = await asyncio.to_thread(record_files.newest, ports.machine.records_dir)
    if record is not None and record.head.block == block:
        uids = (await ports.chain.metagraph(block)).uid_of()
        log.log(await asyncio.to_thread(step_log, record, uids, now=time.time(), step_s=seconds), step=block)


async def _publish(publisher: Publisher, stop: Stop, poll_s: float, rounds_done: asyncio.Event) -> None:
    """Sets weights whenever they are due; ends when the rounds are done and nothing is left to do for their weights."""
    from sn29.publication import Step

    pause_s = poll_s
    while True:
        last_look = rounds_done.is_set()
        try:
            steps = await _look(publisher, stop)
            if last_look and all(isinstance(step, Step) and step.settled for step in steps.values()):
                return
            pause_s = poll_s
        except (Unavailable, Rejected) as error:  # no mechanism can be set, e.g. not registered (yet): said until mended
            telemetry.warn("not_published", str(error))
            pause_s = min(max(2 * pause_s, getattr(error, "retry_s", None) or 0.0), 100 * poll_s)
        except Exception:  # noqa: BLE001 - the other daemon loop
            telemetry.bug("setting weights failed; it is tried again")
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


def alone(state_dir: Path, rule: str = "a --state.dir of its own") -> TextIO:
    """A lock that ends with the process, with the process's number in it.

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
        who = stream.read(20).strip()
        stream.close()
        got = f"a validator that works in {state_dir}{f' (process {who})' if who else ''}"
        raise Rejected(Reason.SETTING, got, rule, "--state.dir") from None
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
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
