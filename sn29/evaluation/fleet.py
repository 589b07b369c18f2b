"""Many GPUs and hosts: one Ray actor a GPU, each with an evaluator of its own (`worker.Here`) on its machine.

    validator   Fleet.evaluate(job)   the free worker with the least memory that the model fits into
                _ask(worker, "bring") its files, where the worker's machine lacks them: fetched from the keeper
                _ask(worker, "begin") -> a portion's losses, or the end      asks `decide` here, in the validator
                _ask(worker, "go_on") -> the next portion's losses, or the end
    keeper      an actor on the validator's machine, reads files in pieces
    worker      an actor: `Here`, and so fork server and children, in the actor's process

A worker that is lost (its process, its machine, the line to it) is first killed as far as Ray reaches, and only then is its
job done by another: nothing is evaluated twice while it lives. What was refused, ended or changed in a child travels as the
error that it is. A child that leaves no result (`ChildEnded`) counts only when its worker passes the self-test right after;
else the worker rests and the job is done elsewhere.

Losses are comparable to the bit on one kind of device. Workers with other versions of what decides a number than the
validator's are not used, and of several kinds of device only the one that most workers have (`choose`).

Security. Whoever reaches a Ray cluster's ports with its token may run any program on all its machines: Ray protects a cluster
from outside only, never its members from each other. "local:N" starts a cluster of its own for one validator: it announces
itself on the loopback address, has no dashboard, and a token of its own; but Ray's servers listen on all addresses of the
machine and cannot be told otherwise (2.60), so that the token is what protects them: let the firewall close those ports too.
"auto" or HOST:PORT joins a cluster that its operator started on purpose (`ray start`), on machines of one owner, in a
network of their own, with token authentication on (`RAY_AUTH_MODE=token`). No wallet and no token of the Hub is there: a
local cluster is started without them, and a worker forgets whatever else its machine's environment holds; strangers' models
run in confined children as everywhere.

The validator's own machine and the cluster's head are the two that must live: Ray ends a process that has not reached the
head for 60 seconds (2.60, whatever we do), so that such a validator starts again, by its supervisor, when there is one again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import math
import os
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sn29.errors import Reason, Rejected, Unavailable, shown
from sn29.evaluation.fleet_worker import Facts, Failure, Make, Portion, Said, Worker, parcels, versions
from sn29.evaluation.forkserver import environment
from sn29.evaluation.probes import Probes
from sn29.evaluation.worker import ChildEnded, Chosen, Decide, Ending, Evaluated, FileChanged, Here, Job
from sn29.models import checkpoint
from sn29.records import RepoFile

_TRIES = 3
"""Workers that one job may lose: a job that takes them all down must not."""
_GRACE_S = 60.0
"""Seconds beyond a job's deadline in which a worker must have said how it ended."""
_START_S = 180.0
"""Seconds in which a new worker must have said what it is: 2 on a quiet machine, 20 where torch is read from a slow disk."""
_MUSTER_S = 60.0
"""Seconds after which new machines of the cluster are looked for."""
_PIECE_BYTES = 4 << 20
_GPU_ROOM_BYTES = 2 << 30
"""GPU memory beside the weights: libraries, and a row of 8,192 tokens with its tile of logits (performance.md, section 1)."""
_OBJECTS_BYTES = 256 << 20
"""Of a local cluster's shared memory: a job's texts and some pieces of files."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}

Say = Callable[[str, str], None]
"""say(event, sentence)."""


class _Lost(Exception):
    """A worker is gone, or its machine fails: whatever it did has no result."""

    is_the_jobs = False
    """It had begun with the job, which may be what took it down."""


# --- files for machines that lack them --------------------------------------------------------------------------------


class _Keeper:
    """The actor on the validator's machine that reads its files. Any member of the cluster may ask it for any: as Ray is."""

    def read(self, path: str, start: int) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(start)
            return stream.read(_PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class _FromKeeper:
    """`fleet_worker.Read` in a worker."""

    keeper: Any

    def __call__(self, path: str, start: int, timeout_s: float | None) -> bytes:
        import ray

        try:
            data: bytes = ray.get(self.keeper.read.remote(path, start), timeout=timeout_s)
        except ray.exceptions.RayError as error:
            raise Unavailable("the validator's files", shown(error)) from None
        return data


# --- the validator's side ---------------------------------------------------------------------------------------------


def memory_need(job: Job, memory_bytes: int) -> int:
    """Bytes of a worker's memory: on a CPU what the child may use, on a GPU the weights in the job's format and some room.

    Of a checkpoint whose headers cannot be read 0: the child says what is wrong with it.
    """
    if job.device == "cpu":
        return memory_bytes
    folder = Path(job.checkpoint)
    try:
        files = [RepoFile(path.name, path.stat().st_size, "") for path in folder.iterdir()]
        tensors = checkpoint.tensors_of(files, checkpoint.local_reader(folder)).values()
    except (Rejected, OSError):
        return 0
    need = _ITEM_BYTES[job.dtype] * sum(math.prod(tensor.shape) for _, _, tensor in tensors) + _GPU_ROOM_BYTES
    return need if job.model_bytes is None else min(need, job.model_bytes)  # it is streamed layer by layer then


@dataclass(eq=False, slots=True)
class _Place:
    """A worker as the validator sees it."""

    actor: Any
    facts: Facts
    takes: int | None = None
    """Bytes of the job that it works on; None: it is free."""
    ill: str = ""
    """Why it is not used."""
    has_others: bool = False
    """A file of its machine that has the name of one of the validator's was another."""
    chosen: dict[tuple[int, str], Chosen] = field(default_factory=dict)


def left(place: _Place, places: list[_Place], device: str) -> int:
    """Bytes that a job may take there: workers without GPUs share their machine's memory."""
    if device != "cpu":
        return place.facts.memory_bytes
    return place.facts.memory_bytes - sum(p.takes or 0 for p in places if p.facts.node == place.facts.node)


def free_place(places: list[_Place], need: int, device: str) -> _Place | None:
    """Where a job is done: the smallest that it fits into, so that the large ones stay free for large models."""
    fit = [p for p in places if p.takes is None and not p.ill and need <= left(p, places, device)]
    return min(fit, key=lambda p: (p.facts.memory_bytes, -left(p, places, device), p.facts.host, p.facts.pid), default=None)


class Fleet:
    """An `Evaluator` of many workers. Belongs to one event loop; a process has one fleet at a time.

        async with await Fleet.open("local:2", device="cpu", threads=1, cache=folder) as fleet:
            found = await fleet.evaluate(job, deadline_s=900, memory_bytes=memory)

    `evaluate` may be called for more jobs than there are `slots`: they wait, the first come first. `decide` is called here,
    in the event loop; it is asked again from the first portion on when a worker was lost with the job, so that it must not
    remember.
    """

    def __init__(
        self, device: str, threads: int, cache: Path, cache_bytes: int | None, shared_files: bool | None, make: Make, say: Say
    ) -> None:
        self._device = "cpu" if device == "cpu" else "cuda"
        self._threads, self._cache, self._cache_bytes = threads, cache, cache_bytes
        self._shared_files, self._make, self._say = shared_files, make, say
        self._places: list[_Place] = []
        self._chosen: dict[tuple[int, str], tuple[Chosen, str]] = {}
        """The way, and the processor that it goes with."""
        self._change = asyncio.Condition()
        self._mustering: asyncio.Task[None] | None = None
        self._mustered = -math.inf
        self._is_wanting = False
        """A worker was lost since machines were looked at."""
        self._passing: set[asyncio.Task[Any]] = set()
        self._ray: Any = None
        self._is_local, self._raylet, self._node = False, 0, ""
        self._keeper: Any = None
        self._own = ThreadPoolExecutor(1, "ray")
        """Ray's processes die with the thread that started them: this one lives as long as the fleet."""
        self.slots = 1

    @classmethod
    async def open(
        cls,
        where: str,
        *,
        device: str,
        threads: int,
        cache: Path,
        cache_bytes: int | None = None,
        shared_files: bool | None = None,
        make: Make = Here,
        say: Say = lambda event, sentence: None,
    ) -> Fleet:
        """`where`: "local:N" for N workers on this machine, "auto" or HOST:PORT for a cluster that this machine has joined.

        A worker is a GPU; with device "cpu" it is `threads` CPUs. `cache` is a folder on each worker's machine, for its
        evaluator and for copies of files, which may hold `cache_bytes` (None: all but a reserve of its disk). `shared_files`
        says whether workers can read the validator's files under the same names; None: each job's are looked for. To be
        called early: for "local:N" the process's environment is emptied of secrets for some seconds.
        Raises Rejected(SETTING), and Unavailable when there is no cluster or no worker.
        """
        fleet = cls(device, threads, cache.absolute(), cache_bytes, shared_files, make, say)
        try:
            await fleet._in_ray(fleet._connect, where)
            fleet._node = fleet._ray.get_runtime_context().get_node_id()
            await fleet._muster()
            if not fleet._usable():
                raise fleet._empty()
        except BaseException:
            await fleet.close()
            raise
        return fleet

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def workers(self) -> tuple[Facts, ...]:
        """Those that are used."""
        return tuple(place.facts for place in self._usable())

    # --- what an evaluator does

    async def choose(self, vocab_size: int, *, device: str, dtype: str) -> Chosen:
        """The way of the kind of device that most workers have; the others are not used for any job from then on."""
        key = vocab_size, dtype
        if key not in self._chosen:
            await asyncio.gather(*(self._choose_at(place, key) for place in self._usable()))
            kinds = Counter(_kind(place.chosen[key], place.facts) for place in self._usable() if key in place.chosen)
            if not kinds:
                raise self._empty()
            most = min(kinds, key=lambda kind: (-kinds[kind], kind))
            same = [p for p in self._usable() if key in p.chosen and _kind(p.chosen[key], p.facts) == most]
            self._chosen[key] = min(((p.chosen[key], p.facts.processor) for p in same), key=str)
            await asyncio.gather(*(self._admit(place) for place in self._usable()))
        return self._chosen[key][0]

    async def evaluate(self, job: Job, *, deadline_s: float, memory_bytes: int, decide: Decide | None = None) -> Evaluated:
        """As `Evaluator.evaluate`. Raises Unavailable besides when no worker is left, when the model fits into none, and when
        it took several workers down."""
        need, lost = memory_need(job, memory_bytes), 0
        while True:
            place = await self._take(need)
            try:
                return await self._evaluate_at(place, job, deadline_s, memory_bytes, decide)
            except _Lost as error:
                lost += error.is_the_jobs
                self._say("evaluated_again", f"{place.facts}: {error}")
                if lost == _TRIES:
                    why = f"{lost} workers failed with the same model, the last one: {error}"
                    raise Unavailable("fleet", why) from None
            finally:
                place.takes = None
                await self._notify()

    async def self_test(self, *, device: str, dtype: str, threads: int, deadline_s: float = 300) -> Probes:
        """Of all workers that are free, those that rest among them: who passes is used again, who fails rests.

        A worker that is busy is tested when its own job fails. Gives what the probes found where it was worst. Raises
        Unavailable when none passes.
        """
        free = [place for place in self._places if place.takes is None]
        found = await asyncio.gather(*(self._test(place, dtype, threads, deadline_s) for place in free))
        await self._notify()
        passed = [probes for probes in found if not isinstance(probes, str)]
        if not passed:
            failed = next((why for why in found if isinstance(why, str)), "there is none that has nothing to do")
            raise Unavailable("fleet", f"no worker passes the self-test: {failed}")
        return max(passed, key=lambda probes: probes.influence)

    async def close(self) -> None:
        """Ends all workers, and a cluster of our own."""
        for task in [*self._passing, *([self._mustering] if self._mustering else [])]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._ray is not None:
            await asyncio.gather(*(self._end(place) for place in self._places))
            await self._in_ray(self._disconnect)
        self._places = []
        self._own.shutdown()

    # --- one job

    async def _evaluate_at(
        self, place: _Place, job: Job, deadline_s: float, memory_bytes: int, decide: Decide | None
    ) -> Evaluated:
        """Raises _Lost besides what `evaluate` raises."""
        here = await self._files_at(place, job)
        is_over = False
        try:
            within_s = deadline_s + _GRACE_S
            said = await self._ask(place, "begin", here, deadline_s, memory_bytes, decide is not None, within_s=within_s)
            while isinstance(said, Portion):
                assert decide is not None
                said = await self._ask(place, "go_on", decide(said.losses), within_s=within_s)
            is_over = True
            return await self._result(place, job, here, said)
        except _Lost as error:
            error.is_the_jobs = is_over = True
            raise
        finally:
            if not is_over:  # we are cancelled, or `decide` has failed: the child must end first
                await asyncio.shield(self._keep(self._stop(place)))

    async def _result(self, place: _Place, job: Job, here: Job, said: Said) -> Evaluated:
        """What a worker said at the end, or the error that it is. Raises _Lost when the worker is at fault."""
        if isinstance(said, Evaluated):
            return said
        assert isinstance(said, Failure)
        error = said.error()
        is_copy = here is not job
        if isinstance(error, FileChanged) and not is_copy and self._shared_files is None and place.facts.node != self._node:
            place.has_others = True
            raise _Lost(f"{error}; it gets copies of ours from now on")
        if isinstance(error, FileChanged) and is_copy:
            await self._ask(place, "throw_away", here.checkpoint, within_s=_GRACE_S)
            raise _Lost(f"{error}; this copy was thrown away")
        may_be_ours = isinstance(error, ChildEnded) and error.ending is not Ending.KILLED  # no model can kill its child
        if may_be_ours and isinstance(why := await self._test(place, job.dtype, job.threads, 300), str):
            raise _Lost(f"{error}, and the worker's self-test: {why}")
        raise error

    async def _files_at(self, place: _Place, job: Job) -> Job:
        """The job with the names that its files have on the worker's machine, brought there if need be."""
        there = await self._ask(place, "has", job.checkpoint, job.tokenizer, job.files, within_s=_GRACE_S)
        if self._shared_files or (self._shared_files is None and there and not place.has_others):
            return job
        wanted = await asyncio.to_thread(parcels, job)
        if self._keeper is None:
            self._keeper = await self._in_ray(self._start_keeper)
        num_bytes = sum(file.size for parcel in wanted for file in parcel.files)
        deadline_s = 300 + num_bytes / 2e6  # what brings less than 2 MB/s is no network for a fleet
        within_s = len(wanted) * deadline_s + _GRACE_S
        said = await self._ask(place, "bring", _FromKeeper(self._keeper), wanted, deadline_s, within_s=within_s)
        if isinstance(said, Failure):
            raise said.error()
        folder, *other = said
        name = Path(job.tokenizer).name
        return replace(job, checkpoint=folder, tokenizer=f"{other[0] if other else folder}/{name}")

    async def _stop(self, place: _Place) -> None:
        with contextlib.suppress(_Lost):
            if not await self._ask(place, "stop", _GRACE_S / 2, within_s=_GRACE_S):
                await self._drop(place)

    async def _test(self, place: _Place, dtype: str, threads: int, deadline_s: float) -> Probes | str:
        """What the probes found, or why a worker cannot evaluate."""
        try:
            said = await self._ask(place, "self_test", dtype, threads, deadline_s, within_s=deadline_s + _GRACE_S)
        except _Lost as error:
            return str(error)
        place.ill = str(said.error()) if isinstance(said, Failure) else ""
        if place.ill:
            self._say("worker_rests", f"{place.facts}: {place.ill}")
        else:
            await self._admit(place)
        self._count()
        probes: Probes = said
        return place.ill or probes

    async def _ask(self, place: _Place, method: str, *arguments: Any, within_s: float) -> Any:
        """What a worker's method gives. Raises _Lost; the worker has been killed then, as far as Ray reaches."""
        exceptions = self._ray.exceptions
        try:
            async with asyncio.timeout(within_s):
                return await getattr(place.actor, method).remote(*arguments)
        except exceptions.RayTaskError:  # a bug in the worker; some are TimeoutErrors as well
            raise
        except TimeoutError:
            why = f"no answer to {method} within {within_s:.0f} s"
        except exceptions.RayError as error:
            why = shown(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 200)
        await asyncio.shield(self._keep(self._drop(place)))
        raise _Lost(why)

    # --- places

    async def _take(self, need: int) -> _Place:
        """A free worker that so many bytes fit into, from now on busy."""
        async with self._change:
            while True:
                if time.monotonic() - self._mustered > _MUSTER_S:
                    self._muster_beside()
                if place := free_place(self._usable(), need, self._device):
                    place.takes = need
                    return place
                largest = max((p.facts.memory_bytes for p in self._usable()), default=0)
                if largest < need and (self._mustering is None or self._mustering.done()):
                    if not largest:
                        raise self._empty()
                    raise Unavailable("fleet", f"the model needs {need:,} bytes of memory, the largest worker has {largest:,}")
                await self._change.wait()

    async def _notify(self) -> None:
        self._count()
        async with self._change:
            self._change.notify_all()

    def _usable(self) -> list[_Place]:
        return [place for place in self._places if not place.ill]

    def _count(self) -> None:
        self.slots = max(1, len(self._usable()))

    def _empty(self) -> Unavailable:
        ill = sorted({place.ill for place in self._places if place.ill})
        why = f"they rest: {ill[0]}" if ill else "look at `ray status`, and start machines with `ray start --address=...`"
        return Unavailable("fleet", f"no worker is left that can be used; {why}", 60.0)

    async def _drop(self, place: _Place) -> None:
        """Killed first, forgotten then, and another looked for."""
        if place in self._places:
            self._places.remove(place)
            await self._in_ray(functools.partial(self._ray.kill, place.actor, no_restart=True))
            self._muster_beside()
            self._count()

    async def _end(self, place: _Place) -> None:
        with contextlib.suppress(_Lost):
            await self._ask(place, "close", within_s=20)
            await self._in_ray(functools.partial(self._ray.kill, place.actor, no_restart=True))

    # --- mustering workers

    def _muster_beside(self) -> None:
        self._mustered, self._is_wanting = time.monotonic(), True
        if self._mustering is None or self._mustering.done():
            self._mustering = asyncio.create_task(self._muster())

    async def _muster(self) -> None:
        """A worker for every GPU (or so many CPUs) of the cluster that has none of ours; again if one is lost meanwhile."""
        self._mustered, self._is_wanting = time.monotonic(), True
        while self._is_wanting:
            self._is_wanting = False
            try:
                nodes = [node for node in await self._in_ray(self._ray.nodes) if node["Alive"]]
            except self._ray.exceptions.RayError as error:
                self._say("no_cluster", shown(error))
                break
            alive = {node["NodeID"] for node in nodes}
            self._places = [place for place in self._places if place.takes is not None or place.facts.node in alive]
            starting = []
            for node in nodes:
                there = sum(place.facts.node == node["NodeID"] for place in self._places)
                starting += [self._start(node) for _ in range(self._room(node) - there)]
            await asyncio.gather(*starting)
        await self._notify()

    def _room(self, node: Mapping[str, Any]) -> int:
        has = node["Resources"]
        return int(has.get("CPU", 0)) // self._threads if self._device == "cpu" else int(has.get("GPU", 0))

    async def _start(self, node: Mapping[str, Any]) -> None:
        name = node["NodeManagerHostname"]
        place = await self._in_ray(self._new_place, node)
        try:
            memory = int(node["Resources"].get("memory", 0))
            facts = await self._ask(place, "facts", node["NodeID"], memory, within_s=_START_S)
        except (_Lost, self._ray.exceptions.RayTaskError) as error:
            await self._in_ray(functools.partial(self._ray.kill, place.actor, no_restart=True))
            self._say("no_worker", f"on {name}: {shown(error)}")
            return
        place.facts = facts
        self._raylet = facts.parent
        await self._admit(place)
        self._places.append(place)

    async def _admit(self, place: _Place) -> None:
        """What it says of itself compared with the validator and the fleet."""
        mine = versions()
        if other := [f"{name} {v} instead of {mine[name]}" for name, v in place.facts.versions.items() if v != mine[name]]:
            place.ill = f"it has other versions: {', '.join(other)}"
            self._say("worker_not_used", f"{place.facts}: {place.ill}")
            return
        await asyncio.gather(*(self._choose_at(place, key) for key in self._chosen if key not in place.chosen))
        self._check_kind(place)

    def _new_place(self, node: Mapping[str, Any]) -> _Place:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        wants = {"num_cpus": self._threads} if self._device == "cpu" else {"num_cpus": 0, "num_gpus": 1}
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor = self._ray.remote(Worker).options(scheduling_strategy=there, max_concurrency=4, max_restarts=0, **wants)
        unknown = Facts(node["NodeID"], node["NodeManagerHostname"], 0, 0, 0, "", {})
        return _Place(actor.remote(self._make, self._device, self._cache, self._cache_bytes), unknown)

    async def _choose_at(self, place: _Place, key: tuple[int, str]) -> None:
        try:
            said = await self._ask(place, "choose", *key, within_s=_START_S + 300)
        except _Lost as error:
            self._say("worker_lost", f"{place.facts}: {error}")
            return
        if isinstance(said, Failure):
            place.ill = str(said.error())
            self._say("worker_rests", f"{place.facts}: {place.ill}")
        else:
            place.chosen[key] = said

    def _check_kind(self, place: _Place) -> None:
        """A worker of another kind than the chosen one gives other bits."""
        for key, (chosen, processor) in self._chosen.items():
            mine = place.chosen.get(key)
            if mine is not None and _kind(mine, place.facts) != _kind(chosen, replace(place.facts, processor=processor)):
                place.ill = f"it is of another kind: {mine} {place.facts.processor}, the fleet {chosen} {processor}"
                self._say("worker_not_used", f"{place.facts}: {place.ill}")

    # --- Ray itself

    async def _in_ray(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._own, work, *arguments)

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        """A task that is not forgotten when we are cancelled."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        return task

    def _connect(self, where: str) -> None:
        num_workers = _parsed(where)
        if importlib.util.find_spec("ray") is None:
            raise Rejected(Reason.SETTING, "no ray is installed", "pip install 'sn29[fleet]'", "--fleet")
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        if num_workers:
            self._is_local = True
            with _without_secrets():
                self._ray = _ray_here(num_workers, self._threads, self._device, quiet)
            return
        try:
            ray.init(address=where, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise Unavailable("fleet", f"no cluster at {where}: {shown(error)}") from None
        self._ray = ray

    def _start_keeper(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._node, soft=False)
        return (
            self._ray.remote(_Keeper).options(scheduling_strategy=here, num_cpus=0, max_concurrency=8, max_restarts=-1).remote()
        )

    def _disconnect(self) -> None:
        with _ends(self._raylet if self._is_local else 0):
            self._ray.shutdown()


def _kind(chosen: Chosen, facts: Facts) -> str:
    """What must be alike for losses to be. Not the attention, which each worker finds out by measuring: the job says which."""
    return f"{chosen.device}, {facts.processor}, {chosen.libraries}, {chosen.profile.row_tokens}, {chosen.profile.tiles}"


def _parsed(where: str) -> int:
    """Workers of a local cluster, 0 for one that exists. Raises Rejected(SETTING)."""
    kind, _, number = where.partition(":")
    if kind == "local" and number.isdecimal() and 0 < int(number) < 1000:
        return int(number)
    if where == "auto" or (number.isdecimal() and kind not in ("local", "ray")):
        return 0
    limit = "local:N, auto or HOST:PORT of a cluster that this machine has joined (`ray start --address=...`)"
    raise Rejected(Reason.SETTING, where, limit, "--fleet")


def _ray_here(num_workers: int, threads: int, device: str, quiet: Mapping[str, Any]) -> Any:
    """Ray, with a cluster on this machine. Raises Unavailable.

    127.0.0.2 is the loopback device as well; 127.0.0.1 Ray would replace by an address that others can reach.
    """
    import ray

    gpus = {} if device != "cpu" else {"num_gpus": 0}
    try:
        ray.init(
            address="local", num_cpus=num_workers * threads, include_dashboard=False, object_store_memory=_OBJECTS_BYTES,
            _node_ip_address="127.0.0.2", _temp_dir=f"{_home().name}/ray", **gpus, **quiet,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise Unavailable("fleet", f"Ray does not start: {shown(error)}") from None
    found = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else num_workers
    if found < num_workers:
        ray.shutdown()
        raise Rejected(Reason.SETTING, f"local:{num_workers}", f"at most {found}, the number of GPUs here", "--fleet")
    return ray


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Home of the local clusters of this process: Ray keeps their token there, and reads it once."""
    return tempfile.TemporaryDirectory(prefix="sn29-fleet-")


@contextlib.contextmanager
def _without_secrets() -> Iterator[None]:
    """This process's environment as a child's: what Ray starts inherits it. No dashboard's statistics, and no memory monitor
    that would kill a worker for what a model's child uses: children have bounds of their own."""
    before = dict(os.environ)
    alone = environment(_home().name) | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    os.environ.clear()
    os.environ.update(alone)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _ends(pid: int) -> Iterator[None]:
    """What process `pid` of ours has started is over when the block is: Ray's agents may outlive it by a minute."""
    told = (Path("/proc") / str(pid) / "task").glob("*/children") if pid else ()
    children = [int(child) for path in told for child in path.read_text().split()]
    watched = []
    for child in [*children, pid] if pid else ():
        with contextlib.suppress(ProcessLookupError):
            watched.append(os.pidfd_open(child))
    try:
        yield
    finally:
        for pidfd in watched:
            if not select.select([pidfd], [], [], 5)[0]:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], 5)
            os.close(pidfd)
