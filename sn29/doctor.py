"""`sn29 doctor`: looks, and changes nothing, at all that a program needs before it is started. A line for each check.

Checks run beside each other, each with a deadline of its own; what one finds never hides another. What several of them
need (the wallet, the chain, the competition files) is asked for once: where it is not to be had, one check says so in red and
the ones that need it say that they know nothing; if it is not among those that were asked for (`--only`), they say it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sn29.concealment import clean
from sn29.errors import NAME_A_WALLET, Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import DoctorOfMiner, DoctorOfValidator

if TYPE_CHECKING:
    from neurons.adapters import RuleFiles
    from sn29.chain import Chain
    from sn29.hub import Hub
    from sn29.records import Identity, Metagraph, Neuron
    from sn29.rules.competition import Competition

T = TypeVar("T")
_GIB = 2**30
_FREE_AT_LEAST = _GIB // 4
"""Bytes of disk that every program needs: a store, logs, a tokenizer."""
_CLOCK_S = 30.0
"""Seconds that this machine's clock and a block's time may be apart, or five blocks if that is more."""
_FINALITY_BLOCKS = 30
"""Blocks without finality after which no round would go on: finality takes two or three."""
_OLD_BLOCKS = 1000
"""A state that is so old is kept by archive nodes alone; others keep 256."""
_NOBODYS_HUB_ID = "Xenova/gpt-4"
"""What the Hub is asked for when no competition names anything; its answer may well be that there is no such thing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    state: Literal["ok", "red", "unknown"]
    """unknown: it needs something that another check is red about."""
    said: str
    """One sentence with what was found and what the rule is."""
    advice: str = ""
    """What to do; empty when it is well."""


class _NotKnown(Unavailable):
    """A check needs what is not to be had; another check says why."""


class _Bad(Rejected):
    """Red, with advice that fits better than the reason's own."""

    def __init__(self, said: str, advice: str) -> None:
        super().__init__(Reason.SETTING, said, advice, advice=advice)
        self.said = said


# ---- running them ----------------------------------------------------------------------------------------------------


async def examine(settings: DoctorOfValidator | DoctorOfMiner) -> AsyncIterator[Finding]:
    """The findings in a fixed order, each as soon as it and those before it are there. Raises Rejected(SETTING)."""
    names = [name for name, _, _ in _checks(settings)]
    unknown = [name for name in settings.only if name not in names]
    if unknown:
        raise Rejected(Reason.SETTING, unknown[0], ", ".join(names), "--only")
    facts = Facts(settings)
    tasks = [
        asyncio.create_task(_one(name, check(facts), advice, settings.check_deadline_s), name=name)
        for name, check, advice in _checks(settings)
        if name in (settings.only or (name,))
    ]
    try:
        for task in tasks:
            await asyncio.wait([task])
            error = task.exception()
            if error is None:
                yield task.result()
            else:  # a bug of ours, which must not hide what the others find
                traceback.print_exception(error)
                yield Finding(task.get_name(), "red", f"{type(error).__name__}: {error}", "report this bug with the traceback")
    finally:
        await facts.close()


async def _one(name: str, check: Coroutine[Any, Any, str], advice: str, deadline_s: float) -> Finding:
    try:
        return Finding(name, "ok", await asyncio.wait_for(check, deadline_s))
    except TimeoutError:
        return Finding(name, "red", f"no answer within {deadline_s:g} s", advice)
    except _NotKnown as error:
        return Finding(name, "unknown", error.why)
    except Sn29Error as error:
        return Finding(name, "red", *_told(error, advice))


def _told(error: Sn29Error, advice: str) -> tuple[str, str]:
    """What a red check says, and what to do: the reason's own advice where it has a better one than the check."""
    if isinstance(error, _Bad):
        return error.said, error.advice
    if not isinstance(error, Rejected):
        return str(error), advice
    if error.reason is Reason.SETTING:
        return f"{error.got}, rule {error.limit}", error.own_advice or advice
    return str(error), error.advice


async def _beside(work: Callable[[], T]) -> T:
    """The result of blocking work, in a thread that is left behind if it never ends (a dead disk, say): it ends with us."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except (Sn29Error, OSError, ValueError, ImportError) as error:
            future.set_exception(error)
        finally:
            if not future.done():
                future.set_exception(RuntimeError("the traceback is above"))

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


class Facts:
    """What several checks need, each asked for once."""

    def __init__(self, settings: DoctorOfValidator | DoctorOfMiner) -> None:
        self.settings = settings
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._opened: list[Chain] = []

    async def close(self) -> None:
        await asyncio.gather(*(chain.close() for chain in self._opened))

    async def needed(self, fact: Awaitable[T], check: str, why: str) -> T:
        """The fact, or _NotKnown: `check` says what is wrong with it. If that one is not asked for, _Bad with its words."""
        try:
            return await fact
        except _NotKnown:
            raise
        except Sn29Error as error:
            if check in (self.settings.only or (check,)):
                raise _NotKnown("doctor", why) from error
            advice = next(advice for name, _, advice in _checks(self.settings) if name == check)
            raise _Bad(*_told(error, advice)) from error

    async def _once(self, name: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Shielded: a check that runs out of time takes nothing away from the others."""
        if name not in self._asked:
            self._asked[name] = asyncio.create_task(ask())
            self._asked[name].add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may have waited
        found: T = await asyncio.shield(self._asked[name])
        return found

    async def hotkey(self) -> str:
        """Our address. Raises Rejected(SETTING) without such a wallet."""

        def load() -> str:
            from sn29.chain import load_wallet

            s = self.settings
            return str(load_wallet(s.wallet_name, s.wallet_hotkey, s.wallet_path).hotkey.ss58_address)

        return await self._once("hotkey", lambda: _beside(load))

    async def chain(self) -> Chain:
        """The chain of the settings as the program will have it, without a wallet. Raises Rejected(SETTING)."""
        return await self._once("chain", self.open)

    async def first(self) -> Chain:
        """Its first endpoint alone: a spare one that answers must not hide that it does not."""
        return await self._once("first", lambda: self.open(fallbacks=(), archives=()))

    async def open(self, **changes: Any) -> Chain:
        """A chain by the settings but for some fields. Raises Rejected(SETTING)."""

        def make() -> Chain:
            from neurons.adapters import open_chain

            return open_chain(self.settings.model_copy(update=changes), with_wallet=False)

        self._opened.append(await _beside(make))
        return self._opened[-1]

    async def identity(self) -> Identity:
        async def ask() -> Identity:
            return await (await self.chain()).identity()

        return await self._once("identity", ask)

    async def metagraph(self) -> Metagraph:
        async def ask() -> Metagraph:
            return await (await self.chain()).metagraph()

        return await self._once("metagraph", ask)

    async def neuron(self) -> Neuron:
        """Ourselves on the subnet. Raises Rejected(NOT_REGISTERED)."""
        graph, hotkey = await self.metagraph(), await self.needed(self.hotkey(), "wallet", "needs the hotkey")
        found = next((n for n in graph.neurons if n.hotkey == hotkey), None)
        if found is None:
            raise Rejected(Reason.NOT_REGISTERED, hotkey, f"one of the {len(graph.neurons)} of subnet {self.settings.netuid}")
        return found

    async def rules(self) -> RuleFiles:
        """The competition files, as the program would take them. Raises Rejected(COMPETITION_FILE)."""

        def read() -> RuleFiles:
            from neurons.adapters import RulesReader

            return RulesReader(self.settings).files

        return await self._once("rules", lambda: _beside(read))

    async def competitions(self) -> tuple[Competition, ...]:
        """Every version of every competition that may still come into force, or is."""
        files = await self.needed(self.rules(), "competitions", "needs valid competition files")
        return tuple(version.competition for file in files.files.values() for version in file.versions)

    async def pulse(self) -> Pulse:
        return await self._once("pulse", self._take_pulse)

    async def _take_pulse(self) -> Pulse:
        """Looks at the newest block, and if it is old waits for a newer one: at most three block times."""
        chain = await self.first()
        seconds, first = await chain.block_seconds(), await chain.head()
        age = time.time() - await chain.timestamp(first.block)
        finalized = (await chain.finalized()).block
        newest, waited, began = first.block, 0.0, time.monotonic()
        while age > _tolerance(seconds) and newest == first.block and waited < 3 * seconds:
            await asyncio.sleep(min(1.0, seconds / 2))
            newest, waited = (await chain.head()).block, time.monotonic() - began
        return Pulse(first.block, finalized, age, seconds, newest - first.block, waited)


# ---- this machine ----------------------------------------------------------------------------------------------------


def _installed() -> importlib.metadata.Distribution:
    """What pip knows of us. Raises _Bad."""
    try:
        return importlib.metadata.distribution("sn29")
    except importlib.metadata.PackageNotFoundError:
        raise _Bad("sn29 is not installed here", "install it with pip, which brings what it needs") from None


async def python(_: Facts) -> str:
    from packaging.specifiers import SpecifierSet

    asked = _installed().metadata["Requires-Python"] or ""
    said = f"{platform.python_version()}, rule {asked or 'any'}"
    if not SpecifierSet(asked).contains(platform.python_version(), prereleases=True):
        raise _Bad(said, f"make the virtual environment with a Python {asked}")
    return said


async def packages(_: Facts) -> str:
    """The versions that decide numbers must be the pinned ones, or validators disagree."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in _installed().requires or ()]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, rule {requirement.specifier}")
    if wrong:
        fitting = "install sn29 again into this virtual environment: pip brings the versions that it asks for"
        raise _Bad("; ".join(wrong), fitting)
    return f"{len(wanted)} packages as pyproject.toml asks"


async def device(facts: Facts) -> str:
    """A tiny model of our own is evaluated on the device, in a child as a miner's would be; a GPU must hold the largest one."""
    from sn29.evaluation.worker import Here

    s = facts.settings
    assert isinstance(s, DoctorOfValidator)
    async with Here() as here:
        await here.self_test(device=s.device, dtype=s.dtype, threads=s.threads, deadline_s=s.check_deadline_s)
    if s.device == "cpu":
        return f"cpu evaluates in {s.dtype}"
    free, total = await _gpu_bytes(s.device)
    said = f"{s.device} evaluates in {s.dtype}, {_gib(free)} of {_gib(total)} are free"
    # the weights, and logits of one text in float32 with a copy, over a vocabulary of 130,000
    need = max(
        int(_bytes_of(s.dtype) * c.limits.parameters + 8 * 130_000 * c.limits.max_tokens) for c in await facts.competitions()
    )
    if free < need:
        raise _Bad(f"{said}, rule {_gib(need)}", "free the GPU, or take a larger one with --device")
    return f"{said}, rule {_gib(need)}"


async def confinement(facts: Facts) -> str:
    """What a stranger's model must not be able to do is tried in a process that is confined as for the device."""
    from sn29.evaluation.confinement import describe

    s = facts.settings
    assert isinstance(s, DoctorOfValidator)
    found = await _beside(lambda: describe(device=s.device))
    told = [f"{one.what} ({one.how})" for one in found if not one.holds]
    if any(not one.holds and one.can_hold for one in found):
        advice = "use Linux 6.7 or newer on x86-64 or 64-bit Arm, as root or with user namespaces"
        raise _Bad(f"a stranger's model can {'; '.join(told)}", advice)
    said = f"a stranger's model cannot {', '.join(one.what for one in found if one.holds)}"
    return f"{said}; it can {'; '.join(told)}" if told else said


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


async def _gpu_bytes(device: str) -> tuple[int, int]:
    """(free, total) bytes, asked for in a child: a driver that hangs does not hang us. Raises Unavailable."""
    code = "import sys, torch; print(*torch.cuda.mem_get_info(torch.device(sys.argv[1])))"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, device, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, errors = await child.communicate()
    except asyncio.CancelledError:
        child.kill()
        raise
    if child.returncode:
        raise Unavailable(device, (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1][:200])
    free, total = out.split()
    return int(free), int(total)


async def memory(facts: Facts) -> str:
    """A validator's children read the largest model into memory; a miner's needs depend on its own model."""
    from sn29.evaluation.streamed import free_memory
    from sn29.evaluation.worker import BASE_BYTES

    free = free_memory()
    need = BASE_BYTES
    if isinstance(facts.settings, DoctorOfValidator):
        copies = 2 * _bytes_of(facts.settings.dtype)  # as read from the files, and in the model
        need += max(int(copies * c.limits.parameters) for c in await facts.competitions())
    said = f"{_gib(free)} are free, rule {_gib(need)}"
    if free < need:
        raise _Bad(said, "stop other programs, or take a machine with more memory: evaluations would be killed half-way")
    return said


async def disk(facts: Facts) -> str:
    """The models of one window, all competitions, beside what is in the folder already."""
    s = facts.settings
    folder = s.state_dir if isinstance(s, DoctorOfValidator) else s.work_dir
    need = _FREE_AT_LEAST
    if isinstance(s, DoctorOfValidator):
        by_name: dict[str, int] = {}
        for c in await facts.competitions():
            size = int(c.limits.bytes) * (c.pool.keep + c.pool.pending)
            by_name[c.name] = max(size, by_name.get(c.name, 0))
        need += sum(by_name.values())

    def look() -> tuple[int, int, Path]:
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        kept = sum(p.stat().st_size for p in (folder / "models").rglob("*") if p.is_file())
        return shutil.disk_usage(there).free, kept, there

    free, kept, there = await _beside(look)
    said = f"{_gib(free)} are free at {there}, rule {_gib(max(need - kept, _FREE_AT_LEAST))}"
    flag = "--state.dir" if isinstance(s, DoctorOfValidator) else "--work.dir"
    if not os.access(there, os.W_OK | os.X_OK):
        raise _Bad(f"{there} cannot be written to", f"give it to this user, or name another folder with {flag}")
    if free < max(need - kept, _FREE_AT_LEAST):
        raise _Bad(said, f"free some room, or name a folder on a larger disk with {flag}")
    return said


async def store(facts: Facts) -> str:
    s = facts.settings
    assert isinstance(s, DoctorOfValidator)
    path = s.state_dir / "store.db"

    def look() -> str | None:
        from sn29.store import Store

        opened = Store(path, read_only=True)
        kept = opened.chain()
        opened.close()
        return kept

    def compare(identity: Identity) -> None:
        from sn29.store import Store

        opened = Store(path, read_only=True)
        opened.check_chain(identity, s.netuid)
        opened.close()

    if not path.exists():
        return f"none yet at {path}: it is made at the first start"
    from sn29.store import SCHEMA

    kept, said = await _beside(look), f"schema {SCHEMA} at {path}"
    if kept is None:
        return f"{said}, not used yet"
    try:
        identity = await facts.identity()
    except Sn29Error:
        return f"{said}, of {kept}; whether that is this chain is not known"
    await _beside(lambda: compare(identity))
    return f"{said}, of this chain"


# ---- the subnet ------------------------------------------------------------------------------------------------------


async def competition_files(facts: Facts) -> str:
    files = await facts.rules()
    unpinned = [f"{name}.yaml: {', '.join(file.unpinned)}" for name, file in files.files.items() if file.unpinned]
    said = f"{', '.join(files.files)} and {len(files.hall_of_fame.entries)} hall of fame entries"
    return f"{said}; not pinned, which is enough here: {'; '.join(unpinned)}" if unpinned else f"{said}, all pinned"


async def wallet(facts: Facts) -> str:
    s = facts.settings
    return f"{s.wallet_name}/{s.wallet_hotkey} is {await facts.hotkey()}"


async def registration(facts: Facts) -> str:
    await facts.needed(facts.identity(), "chain", "needs the chain")
    neuron = await facts.neuron()
    return f"uid {neuron.uid} of subnet {facts.settings.netuid}, since block {neuron.registered_at}"


async def permit(facts: Facts) -> str:
    neuron = await facts.needed(facts.neuron(), "registration", "needs a registered hotkey")
    if not neuron.permit:
        said = f"uid {neuron.uid} has no validator permit, with a stake of {neuron.stake:,.0f}"
        raise _Bad(said, "the hotkeys with most stake have one: add stake with `btcli stake add`, then wait for the next epoch")
    return f"uid {neuron.uid} may set weights"


async def stake(facts: Facts) -> str:
    neuron = await facts.needed(facts.neuron(), "registration", "needs a registered hotkey")
    least = await (await facts.chain()).stake_threshold()
    said = f"{neuron.stake:,.2f}, rule at least {least:,.2f}"
    if neuron.stake < least:
        raise _Bad(said, "the chain takes no weights from this hotkey: add stake with `btcli stake add`")
    return said


@dataclass(frozen=True, slots=True)
class Pulse:
    """How the chain moves, seen from here."""

    head: int
    finalized: int
    age_s: float
    """Our clock less the newest block's time."""
    block_seconds: float
    new_blocks: int
    """That came while we waited, if we did."""
    waited_s: float

    @property
    def tolerance_s(self) -> float:
        return _tolerance(self.block_seconds)

    @property
    def is_catching_up(self) -> bool:
        """Blocks come faster than they are made: the node is loading old ones."""
        return self.new_blocks > 3 + self.waited_s / self.block_seconds


def _tolerance(block_seconds: float) -> float:
    return max(_CLOCK_S, 5 * block_seconds)


async def chain(facts: Facts) -> str:
    return lag_of(await facts.pulse())


def lag_of(pulse: Pulse) -> str:
    """Whether the node keeps up with its chain. Raises _Bad."""
    if pulse.is_catching_up or (pulse.age_s > pulse.tolerance_s and not pulse.new_blocks):
        doing = "the node is still catching up" if pulse.new_blocks else f"no newer one came within {pulse.waited_s:.0f} s"
        said = f"block {pulse.head} is {pulse.age_s:,.0f} s old and {doing}"
        raise _Bad(said, "name another node with --subtensor.network, or spare ones with --subtensor.fallbacks")
    behind = pulse.head - pulse.finalized
    if behind > _FINALITY_BLOCKS:
        said = f"the last final block is {behind} blocks behind block {pulse.head}, rule {_FINALITY_BLOCKS}"
        raise _Bad(said, "rounds begin at final blocks: wait until the chain goes on, or name another node")
    return f"block {pulse.head}, the last {behind} not yet final, one every {pulse.block_seconds:g} s"


async def clock(facts: Facts) -> str:
    pulse = await facts.needed(facts.pulse(), "chain", "needs the chain")
    try:
        return skew_of(pulse)
    except _NotKnown:
        await facts.needed(_kept_up(pulse), "chain", "needs a chain that has new blocks")
        raise


async def _kept_up(pulse: Pulse) -> str:
    return lag_of(pulse)


async def spares(facts: Facts) -> str:
    """Every endpoint but the first, each asked itself: one that is dead is not noticed before it is needed."""
    endpoints, archives = (await facts.chain()).addresses
    asked = [*((address, False) for address in endpoints[1:]), *((address, True) for address in archives)]
    if not asked:
        return "none: the chain is embedded" if facts.settings.network == "localnet" else "none are named"
    found = await asyncio.gather(*(_spare(facts, address, is_archive=is_archive) for address, is_archive in asked))
    highest = max(head or 0 for head, _ in found)
    said, is_well = [], True
    for head, words in found:
        behind = highest - head if head is not None else 0
        said.append(f"{words}, {behind} behind" if behind > _FINALITY_BLOCKS else words)
        is_well = is_well and head is not None and behind <= _FINALITY_BLOCKS
    if not is_well:
        raise _Bad("; ".join(said), "name others with --subtensor.fallbacks and --subtensor.archives, or none")
    return "; ".join(said)


async def _spare(facts: Facts, address: str, *, is_archive: bool) -> tuple[int | None, str]:
    """(its newest block or None if it is of no use, what is to be said of it)."""
    name, deadline_s = f"{'archive' if is_archive else 'spare'} {address}", 0.8 * facts.settings.check_deadline_s

    async def ask() -> int:
        there = await facts.open(network=address, fallbacks=(), archives=())
        genesis, head = (await there.identity()).genesis, (await there.head()).block
        with contextlib.suppress(Unavailable):  # if only the spare answers, there is nothing to compare it with
            ours = (await facts.identity()).genesis
            if genesis != ours:
                raise Rejected(Reason.SETTING, f"genesis {genesis}", ours)
        if is_archive:
            await there.timestamp(max(1, head - _OLD_BLOCKS))
        return head

    try:
        head = await asyncio.wait_for(ask(), deadline_s)
        return head, f"{name} is at block {head}"
    except TimeoutError:
        return None, f"{name}: no answer within {deadline_s:g} s"
    except Sn29Error as error:
        return None, f"{name}: {_told(error, '')[0]}"


def skew_of(pulse: Pulse) -> str:
    """Whether this machine's clock is the chain's. Raises _Bad; _NotKnown where an old block says nothing about the clock."""
    advice = "set the clock: a machine on the internet keeps it with NTP (`timedatectl set-ntp true`)"
    if pulse.age_s < -pulse.tolerance_s:
        raise _Bad(f"{-pulse.age_s:,.0f} s behind the chain's newest block, rule {pulse.tolerance_s:g} s", advice)
    if pulse.age_s <= pulse.tolerance_s:
        return f"{pulse.age_s:.1f} s after the chain's newest block, rule {pulse.tolerance_s:g} s"
    if pulse.is_catching_up or not pulse.new_blocks:
        raise _NotKnown("clock", "needs a chain that has new blocks")
    raise _Bad(f"{pulse.age_s:,.0f} s ahead of the chain's newest block, rule {pulse.tolerance_s:g} s", advice)


def _hub(facts: Facts, token: str = "") -> Hub:
    from sn29.hub import Hub

    return Hub(facts.settings.hub_endpoint, token=token or None, timeout_s=10, attempts=2)


async def hub(facts: Facts) -> str:
    """Any answer will do, also that there is nothing of that name."""

    def ask() -> str:
        with contextlib.suppress(Rejected):
            _hub(facts).resolve(_NOBODYS_HUB_ID)
        return f"{facts.settings.hub_endpoint} answers"

    return await _beside(ask)


async def token(facts: Facts) -> str:
    s = facts.settings
    assert isinstance(s, DoctorOfMiner)
    where = f"make one that may write at {s.hub_endpoint}/settings/tokens and give it as HF_TOKEN"

    def ask() -> str:
        try:
            return f"the Hub knows it as {_hub(facts, s.hub_token).whoami()}"
        except Rejected as error:
            raise _Bad(f"{s.hub_endpoint}: {error.got}", where) from None

    return await _beside(ask)


async def records(facts: Facts) -> str:
    """The miner's loop measures by them; whoever publishes without a forecast needs none."""
    s = facts.settings
    assert isinstance(s, DoctorOfMiner)
    if s.records is None:
        if s.model is not None or s.publish_at <= 0:
            return "none are named, and none are needed to publish without a forecast"
        raise _Bad("none are named, and a forecast needs them", "name a folder of them: --records; or --publish-at 0")
    named = s.records

    def look() -> str:
        from sn29 import record_files

        if not named.exists():
            raise _Bad(f"there is no {named}", "name a folder of a validator's round records: --records")
        newest = record_files.newest(named)
        if newest is None:
            return f"{named} is empty: no round has been judged yet, and until one is nothing is published by a forecast"
        kept = newest.competitions.get(s.competition)
        if kept is None:
            advice = "name the records of a validator that judges it: --records"
            raise _Bad(f"the newest one, of block {newest.head.block:,}, does not know {s.competition}", advice)
        measured = sum(m.evaluated for m in kept.models)
        return f"the newest one is of block {newest.head.block:,}: {measured} models of {s.competition} were evaluated"

    return await _beside(look)


async def dataset(facts: Facts) -> str:
    """One text is drawn from every data set as a round would: listing, pattern, column and a row group, over the network."""
    competitions = await facts.competitions()

    def draw_one() -> str:
        from neurons.adapters import dataset_of
        from sn29.corpus import draw

        open_dataset = dataset_of(_hub(facts), facts.settings.competitions_dir)
        drawn = set()
        for competition in competitions:
            for index, source in enumerate(competition.datasets):
                if source not in drawn:
                    draw(
                        open_dataset(competition, index), source.files, source.column, 1, competition.limits.max_chars,
                        block_hash="0x", competition=competition.name, window=0,
                    )  # fmt: skip
                    drawn.add(source)
        return f"a text was drawn from each of {len(drawn)} data sets" if len(drawn) > 1 else "a text was drawn"

    return await _beside(draw_one)


# ---- the list --------------------------------------------------------------------------------------------------------

_Check = tuple[str, Callable[[Facts], Coroutine[Any, Any, str]], str]
"""(name, check, what to do when nothing answers or a setting is wrong)"""


def _checks(settings: DoctorOfValidator | DoctorOfMiner) -> tuple[_Check, ...]:
    node = "look at the node of --subtensor.network and the way there; spare ones: --subtensor.fallbacks"
    internet = "look at the way to --hub.endpoint: network, proxy, firewall"
    both: tuple[_Check, ...] = (
        ("python", python, ""),
        ("packages", packages, "install sn29 into this virtual environment with pip"),
        ("memory", memory, ""),
        ("disk", disk, "look at the disk: it does not answer"),
        ("competitions", competition_files, "see `sn29 competitions check`"),
        ("wallet", wallet, NAME_A_WALLET),
        ("chain", chain, node),
        ("clock", clock, node),
        ("spares", spares, node),
        ("registration", registration, node),
        ("hub", hub, internet),
        ("dataset", dataset, internet),
    )
    if isinstance(settings, DoctorOfMiner):
        return (*both, ("records", records, "look at the folder of --records: it does not answer"), ("token", token, internet))
    gpu = "see what the driver says (`nvidia-smi`), or name another --device"
    store_advice = "name another --state.dir, or keep the file and run the version of sn29 that wrote it"
    return (
        *both,
        ("device", device, gpu),
        ("confinement", confinement, "look at what the trial process said"),
        ("permit", permit, node),
        ("stake", stake, node),
        ("store", store, store_advice),
    )


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB"


# ---- the command -----------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """`sn29 doctor [validator|miner] [the program's flags]`: exit status 0 when everything is well, else 1."""
    from sn29.settings import read

    role, flags = (words[0], words[1:]) if words[:1] in (["validator"], ["miner"]) else ("validator", words)
    settings = read(DoctorOfMiner, flags) if role == "miner" else read(DoctorOfValidator, flags)
    findings = asyncio.run(_all(settings))
    is_well = all(finding.state == "ok" for finding in findings)
    if settings.json_output:
        print(json.dumps({"ok": is_well, "program": role, "findings": [asdict(f) for f in findings]}, indent=2))
    elif not is_well:
        red, unknown = (", ".join(f.check for f in findings if f.state == state) for state in ("red", "unknown"))
        said = [f"{what}: {names}" for what, names in (("not well", red), ("not known", unknown)) if names]
        print(f"\n{'; '.join(said)}", flush=True)
    return 0 if is_well else 1


async def _all(settings: DoctorOfValidator | DoctorOfMiner) -> list[Finding]:
    from rich.console import Console
    from rich.text import Text

    console, found = Console(highlight=False, soft_wrap=True), []
    marks = {"ok": ("ok ", "green"), "red": ("RED", "bold red"), "unknown": ("?  ", "yellow")}
    async for finding in examine(settings):
        finding = replace(finding, said=clean(finding.said), advice=clean(finding.advice))
        found.append(finding)
        if not settings.json_output:
            console.print(Text.assemble(marks[finding.state], f"  {finding.check:<13} {finding.said}"))
            if finding.advice:
                console.print(Text(f"     {'':<13} -> {finding.advice}"))
    return found
