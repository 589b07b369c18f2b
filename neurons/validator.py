"""The validator: `python neurons/validator.py --help`, or `sn29 validator --help`.

Two loops side by side: rounds, and the publisher that sets the latest weights on time however long a round takes. All
that they share is in the store. Ctrl-C and SIGTERM end both; what was measured is kept.
"""

from __future__ import annotations

import asyncio
import fcntl
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sn29 import record_files, telemetry
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import ValidatorSettings, read

if TYPE_CHECKING:
    from neurons.adapters import RulesReader
    from sn29.chain import Chain
    from sn29.evaluation.worker import Evaluator
    from sn29.examination import Machine, Ports
    from sn29.hub import Hub
    from sn29.publication import Publisher
    from sn29.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after --rounds or a signal, 1 when a setting, the wallet or a competition file is wrong."""
    try:
        settings = read(ValidatorSettings, sys.argv[1:] if arguments is None else arguments)
        telemetry.configure(as_json=settings.log_json, level=settings.log_level, file=settings.log_file)
        asyncio.run(run(settings))
    except Sn29Error as error:
        print(f"sn29 validator: {error}", file=sys.stderr)
        return 1
    return 0


async def run(settings: ValidatorSettings) -> None:
    """Both loops until one ends or a signal comes."""
    from neurons.adapters import RulesReader, open_evaluator
    from sn29.evaluation.confinement import hide
    from sn29.examination import Machine
    from sn29.hub import Hub
    from sn29.store import Store

    hide()
    RulesReader(settings)  # what is wrong with a file is said before anything is opened
    hub = Hub(settings.hub_endpoint, say=telemetry.warn)
    store = Store(settings.state_dir / "store.db")
    lock = alone(settings.state_dir)
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
    evaluator = await open_evaluator(settings, machine.work_dir)
    try:
        await evaluator.self_test(device=settings.device, dtype=settings.dtype, threads=settings.threads)
        await _judge_and_publish(settings, hub, store, machine, evaluator)
    finally:
        await evaluator.close()
    store.close()
    lock.close()
    telemetry.tell("stopped", "nothing is lost: start again to go on")


async def _judge_and_publish(settings: ValidatorSettings, hub: Hub, store: Store, machine: Machine, evaluator: Evaluator) -> None:
    """Until one of the two loops ends or a signal comes."""
    from neurons.adapters import RulesReader, Tokenizers, dataset_of, open_chain
    from sn29.examination import Ports
    from sn29.publication import Publisher
    from sn29.round import begin_with

    chain = open_chain(settings)
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
        if settings.start_record is not None:
            await begin_with(ports, record_files.read(settings.start_record))
        rounds_done = asyncio.Event()
        rounds = asyncio.create_task(_rounds(settings, ports, reader, rounds_done))
        publishing = asyncio.create_task(_publish(publisher, settings.poll_s, rounds_done))
        _on_signals(rounds, publishing)
        await _until_over(rounds, publishing)
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


async def _rounds(settings: ValidatorSettings, ports: Ports, reader: RulesReader, done: asyncio.Event) -> None:
    """One round after the other, waiting for the chain in between. Each is run by the rules in force at its block."""
    from sn29.round import plan_round, run_round

    finished = 0
    while not settings.rounds or finished < settings.rounds:
        try:
            reader.look_again()
            rules = reader.rules()
            plan = await plan_round(ports, rules, catch_up=settings.catch_up)
            if plan is not None:
                await _belong(ports.chain, ports.store)
                await run_round(ports, rules, plan)
                finished += 1
                continue
        except Sn29Error as error:
            telemetry.warn("unavailable", str(error))
        except Exception:  # noqa: BLE001 - one of the two daemon loops: a bug is logged with its traceback, the loop goes on
            telemetry.bug("the round failed; it is tried again")
        await asyncio.sleep(settings.poll_s)
    done.set()


async def _publish(publisher: Publisher, poll_s: float, rounds_done: asyncio.Event) -> None:
    """Sets weights whenever they are due; ends when the rounds are done and nothing is left to do for their weights."""
    from sn29.publication import Step

    pause_s = poll_s
    while True:
        last_look = rounds_done.is_set()
        try:
            steps = await publisher.look()
            if last_look and all(isinstance(step, Step) and step.settled for step in steps.values()):
                return
            pause_s = poll_s
        except (Unavailable, Rejected) as error:  # no mechanism can be set, e.g. not registered (yet): said until mended
            telemetry.warn("not_published", str(error))
            pause_s = min(max(2 * pause_s, getattr(error, "retry_s", None) or 0.0), 100 * poll_s)
        except Exception:  # noqa: BLE001 - the other daemon loop
            telemetry.bug("setting weights failed; it is tried again")
        await asyncio.sleep(pause_s)


def alone(state_dir: Path) -> TextIO:
    """A lock that ends with the process. Raises Rejected(SETTING) when another validator has it: two would set weights twice."""
    stream = (state_dir / "lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise Rejected(
            Reason.SETTING, f"a validator that works in {state_dir}", "a --state.dir of its own", "--state.dir"
        ) from None
    return stream


def _on_signals(*tasks: asyncio.Task[None]) -> None:
    def stop() -> None:
        for task in tasks:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


async def _until_over(*tasks: asyncio.Task[None]) -> None:
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        telemetry.tell("stopping", "a signal asked for it")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
