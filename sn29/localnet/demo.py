"""The demo: a whole subnet on this machine, told in the order of the pipeline.

    text -> chain and Hub -> keys -> miners train, publish, commit -> round 1 -> one miner improves -> round 2 -> weights

It starts the production programs as processes and watches what they say (their --log.file). It is no mode of theirs: it
passes a network, a Hub's address and small numbers, and moves the localnet's clock on where people would wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import neurons
from sn29.chain import Chain
from sn29.errors import Reason, Rejected, Unavailable
from sn29.explain import towards
from sn29.localnet import text
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.localnet.network import MAX_CHARS, NETUID, TRAINING_FILES, WINDOW_BLOCKS, Localnet, prepare
from sn29.records import Outcome, Score
from sn29.round_record import RoundRecord
from sn29.rules.weights import KEEP
from sn29.settings import DemoSettings, default_cache
from sn29.store import Store

AT_ONCE = 2  # processes that train at one time, a core each
STEPS = 600  # some 20 s of one core; a model trained for twice as long is 4 to 7 % better, ten times the advantage
SHAPES = {
    "c00": (),  # the miner's defaults: hidden 64, MLP 192, 1 layer, tied; 6.5 million parameters
    "c01": ("--family", "Phi3ForCausalLM", "--hidden-size", "56", "--no-tied"),  # 3.6 million
}


@dataclass(frozen=True, slots=True)
class Miner:
    """One miner of the demo: its own key, repository and process."""

    name: str
    competition: str
    does: str
    expected: str
    """`evaluated`, or the reason code of the refusal that it must get."""
    flags: tuple[str, ...] = ()
    mischief: str = ""
    """Kind of `localnet.mischief`; empty: the honest program."""
    after: tuple[str, ...] = ()
    """Miners that must have committed before."""


@dataclass(slots=True)
class Running:
    """A process of the demo and what it has said so far."""

    title: str
    process: subprocess.Popen[bytes]
    log: Path
    errors: Path
    read_to: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def news(self) -> Iterator[dict[str, Any]]:
        """Events since the last call; whole lines only."""
        if not self.log.exists():
            return
        with self.log.open("rb") as stream:
            stream.seek(self.read_to)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read_to += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            self.events.append(event)
            yield event

    def check(self) -> bool:
        """True when it ended well. Raises Unavailable with its last words when it did not."""
        status = self.process.poll()
        if status:
            words = self.errors.read_text(errors="replace").strip().splitlines()[-3:]
            raise Unavailable(self.title, f"ended with {status}: {' | '.join(words)}; see {self.errors}")
        return status == 0


@dataclass(frozen=True, slots=True)
class Ended:
    """What the demo leaves behind."""

    folder: Path
    crew: tuple[Miner, ...]
    records: tuple[RoundRecord, ...]
    published: Mapping[str, float]
    """Weights on chain at the end, by hotkey."""
    names: Mapping[str, str]
    """Hotkey -> miner's name."""
    curves: Mapping[str, list[dict[str, float]]]
    """Miner's name -> rows of step, loss (nats per token), tokens."""
    unigram: Mapping[str, float]
    """Competition -> bits per byte of a unigram model of the training text on the last round's samples."""


def run(settings: DemoSettings) -> Ended:
    """The whole story. Raises Rejected(SETTING) for a folder that will not do, Unavailable when a part of it fails."""
    folder = _new_folder(settings.folder or Path(tempfile.mkdtemp(prefix="sn29-demo-")))
    console = Console(highlight=False)
    stage = Stage(folder, console if console.is_terminal else Console(highlight=False, width=140))
    with ExitStack() as cleanup:
        cleanup.callback(stage.stop_all)
        stage.chapter("Text and tokenizers", "real ones, from pinned packages; every hash is checked")
        texts = text.build(default_cache(), stage.say)
        stage.chapter("Chain and Hub", f"in {folder}")
        localnet = prepare(folder / "localnet", texts, block_seconds=settings.block_seconds, say=stage.say)
        stage.start("localnet", "-m", "sn29.cli", "localnet", "up", "--localnet.dir", str(localnet.folder))
        if settings.node:
            stage.start_node(shlex.split(settings.node), localnet)
        crew = miners(texts, folder, settings.steps)
        stage.register(localnet, crew)
        stage.chapter("Miners", "each is a process with a key and a repository of its own; two at a time")
        stage.run_miners(localnet, crew)
        stage.chapter("Round 1", "the validator: read, check, fetch, evaluate, score, set weights")
        stage.start_validator(localnet)
        stage.next_window(localnet)
        again = improved(folder, settings.steps)
        stage.run_miners(localnet, (again,), meanwhile=stage.tell_round)
        stage.wait_for_publication(1)
        stage.chapter("Round 2", "new samples, drawn by a newer block; what is known is not fetched again")
        stage.next_window(localnet)
        stage.wait_for_publication(2)
        ended = stage.ended(localnet, crew, texts)
    show_table(stage.console, ended)
    return ended


def _new_folder(folder: Path) -> Path:
    """With the folder of logs in it. Raises Rejected(SETTING)."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise Rejected(Reason.SETTING, f"{folder}, which is not empty", "a new folder", "--dir")
        (folder / "logs").mkdir(parents=True)
    except OSError as error:
        why = f"{folder}: {error.strerror or error}"
        raise Rejected(Reason.SETTING, why, "a new folder where one can be made", "--dir") from None
    return folder


def miners(texts: text.Texts, folder: Path, steps: int) -> tuple[Miner, ...]:
    """The cast. The later honest miner of each competition trains twice as long."""
    llama, phi3 = _recipe("c00", texts, steps), _recipe("c01", texts, steps)

    def twice(flags: tuple[str, ...]) -> tuple[str, ...]:
        at = flags.index("--steps") + 1
        return (*flags[:at], str(2 * int(flags[at])), *flags[at + 1 :], "--seed", "1")

    trained = str(folder / "alice" / "training" / "checkpoint")
    one_step = ("--steps", "1", "--force")
    return (
        Miner("alice", "c00", "trains a Llama", "evaluated", llama),
        Miner("carol", "c01", "trains a Phi3", "evaluated", phi3),
        Miner("bob", "c00", "trains a Llama for twice as long", "evaluated", twice(llama), after=("alice",)),
        Miner("dave", "c01", "trains a Phi3 for twice as long", "evaluated", twice(phi3), after=("carol",)),
        Miner(
            "copycat",
            "c00",
            "commits alice's model under its own key",
            "copy",
            ("--of", "alice/model"),
            "copy",
            ("alice",),
        ),
        Miner("giant", "c01", "is over the parameter limit", "parameters", (*phi3, "--hidden-size", "256", *one_step)),
        Miner(
            "stray",
            "c00",
            "brings a Phi3 where a Llama is asked for",
            "family",
            (*llama, "--family", "Phi3ForCausalLM", *one_step),
        ),
        Miner(
            "rewriter",
            "c00",
            "replaces its repository after committing",
            "revision_gone",
            ("--model", trained),
            "rewrite",
            ("alice",),
        ),
        Miner("nanny", "c00", "has NaN in its weights", "not_finite", ("--model", trained), "nan", ("alice",)),
        Miner("mumble", "c00", "writes a string on chain that is no commitment", "malformed_commitment", (), "garbage"),
    )


def improved(folder: Path, steps: int) -> Miner:
    """alice, who trains on from her own model while the first round runs, and commits again."""
    start = ("--start", str(folder / "alice" / "training" / "checkpoint"))
    flags = ("--text", TRAINING_FILES, "--steps", str(2 * (steps or STEPS)), "--seed", "2", *start)
    return Miner("alice", "c00", "trains on and commits again", "evaluated", flags)


def _recipe(competition: str, texts: text.Texts, steps: int) -> tuple[str, ...]:
    own = ("--tokenizer", str(texts.llama32k / "tokenizer.json")) if competition == "c01" else ()
    return ("--text", TRAINING_FILES, *SHAPES[competition], *own, "--steps", str(steps or STEPS))


# --- the stage --------------------------------------------------------------------------------------------------------


class Stage:
    """The demo's processes, and what the audience sees of them."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.wallets = folder / "wallets"
        self.network = "localnet"
        self.running: list[Running] = []
        self.validator: Running | None = None
        self.validator_hotkey = ""
        self.names: dict[str, str] = {}
        self.began = time.monotonic()

    def chapter(self, title: str, why: str) -> None:
        self.console.print(f"\n[bold]{title}[/bold]  [dim]{why} ({time.monotonic() - self.began:.0f} s)[/dim]")

    def say(self, what: str) -> None:
        self.console.print(f"  {what}")

    # processes

    def start(self, title: str, *command: str, token: str = "") -> Running:
        """A Python process whose events and errors go to files in the demo's folder."""
        log, errors = self.folder / "logs" / f"{title}.jsonl", self.folder / "logs" / f"{title}.err"
        environment = {**os.environ, "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *command, "--log.file", str(log)], env=environment,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            )  # fmt: skip
        one = Running(title, process, log, errors)
        self.running.append(one)
        return one

    def start_node(self, command: Sequence[str], localnet: Localnet) -> None:
        """A node in front of the chain's file, which everybody talks to from now on. Raises Unavailable if it does not start."""
        errors = self.folder / "node.err"
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [*command, str(localnet.chain)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream
            )
        self.running.append(Running("node", process, self.folder / "logs" / "node.jsonl", errors))
        assert process.stdout is not None
        self.network = process.stdout.readline().decode().strip()
        if not self.network.startswith("ws://"):
            raise Unavailable("node", f"`{shlex.join(command)}` printed no ws:// address; see {errors}")
        self.say(f"a node as a process of its own: {self.network}")

    def stop_all(self) -> None:
        """Ends what still runs, gently first."""
        for one in self.running:
            if one.process.poll() is None:
                one.process.terminate()
        for one in self.running:
            try:
                one.process.wait(10)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()

    def register(self, localnet: Localnet, crew: tuple[Miner, ...]) -> None:
        """Keys for everybody."""
        for miner in crew:
            self.names[localnet.register(miner.name, "default", self.wallets)] = miner.name
        self.validator_hotkey = localnet.register("validator", "default", self.wallets, validator=True)
        self.say(f"{len(self.names)} miners and a validator registered on subnet {NETUID}, each with an sr25519 key")

    def common_flags(self, localnet: Localnet, wallet: str) -> tuple[str, ...]:
        return (
            "--wallet.name", wallet, "--wallet.hotkey", "default", "--wallet.path", str(self.wallets),
            "--netuid", str(NETUID), "--subtensor.network", self.network, "--localnet.dir", str(localnet.folder),
            "--locks.dir", str(self.folder / "locks"), "--hub.endpoint", localnet.endpoint,
            "--competitions.dir", str(localnet.competitions),
        )  # fmt: skip

    # miners

    def run_miners(self, localnet: Localnet, crew: tuple[Miner, ...], meanwhile: Callable[[], None] = lambda: None) -> None:
        """All of them to the end, at most AT_ONCE at a time, each after those it depends on."""
        waiting, working, done = list(crew), dict[str, Running](), set[str]()
        columns = (
            TextColumn("  {task.description:<9}"),
            BarColumn(24),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            tasks = {m.name: progress.add_task(m.name, total=1.0, start=False, shown=m.does) for m in crew}
            while waiting or working:
                ready = [m for m in waiting if done.issuperset(m.after)]
                for miner in ready[: AT_ONCE - len(working)]:
                    waiting.remove(miner)
                    working[miner.name] = self._start_miner(localnet, miner)
                    progress.start_task(tasks[miner.name])
                for name, one in list(working.items()):
                    for event in one.news():
                        self._show_miner(progress, tasks[name], name, event)
                    if one.check():
                        del working[name]
                        done.add(name)
                        progress.update(tasks[name], completed=1.0)
                meanwhile()
                time.sleep(0.2)

    def _start_miner(self, localnet: Localnet, miner: Miner) -> Running:
        program = ("-m", "sn29.localnet.mischief", miner.mischief) if miner.mischief else (_program("miner.py"),)
        again = sum(one.title.startswith(miner.name) for one in self.running)
        work = self.folder / (f"{miner.name}-{again + 1}" if again else miner.name)
        flags = (
            *self.common_flags(localnet, miner.name), "--repo", f"{miner.name}/model", "--competition", miner.competition,
            "--work.dir", str(work), "--threads", "1", "--cycles", "1", "--publish-at", "0", *miner.flags,
        )  # fmt: skip
        return self.start(work.name, *program, *flags, token=localnet.hub_token(miner.name))

    def _show_miner(self, progress: Progress, task: Any, name: str, event: Mapping[str, Any]) -> None:
        if event["event"] == "training":
            shown = f"step {event['step']} of {event['steps']}, {event['loss']:.2f} nats per token"
            progress.update(task, completed=event["step"] / event["steps"], shown=shown)
        elif event["event"] in ("committed", "rewritten"):
            where = f" at block {event['block']}" if "block" in event else ""
            progress.update(task, shown=f"{event['event']}{where}")
            progress.console.print(f"  {name}: {event['message']}{where}")
        elif event["event"] == "check" and event["level"] == "WARNING":
            progress.console.print(
                f"  {name}: its own check says: {event['message'].split('(')[0].strip()}; it commits all the same"
            )

    # the validator

    def start_validator(self, localnet: Localnet) -> None:
        flags = (
            *self.common_flags(localnet, "validator"), "--state.dir", str(self.folder / "validator"),
            "--dtype", "float32", "--threads", "2", "--rounds", "2", "--poll", "0.5",
        )  # fmt: skip
        self.say(f"[dim]$ python neurons/validator.py {' '.join(flags)}[/dim]")
        self.validator = self.start("validator", _program("validator.py"), *flags)

    def next_window(self, localnet: Localnet) -> None:
        """Moves the chain's clock to where the next window's samples are drawn, instead of waiting 72 minutes."""
        ledger = Ledger.open(localnet.chain)
        head = ledger.head()
        target = (head // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS + ledger.finality_lag
        ledger.advance(target - head)
        opened = target - ledger.finality_lag
        self.say(f"the chain's clock is moved from block {head} to {target}; block {opened} opens the window")
        ledger.close()

    def tell_round(self) -> None:
        """What the validator has said since, in the audience's words."""
        assert self.validator is not None
        for event in self.validator.news():
            who = self.names.get(event.get("hotkey", ""), "")
            line = _round_line(event, who)
            if line:
                self.say(line)
        self.validator.check()

    def wait_for_publication(self, number: int) -> None:
        """Until the validator has set weights `number` times."""
        assert self.validator is not None
        while sum(e["event"] == "published" for e in self.validator.events) < number:
            ended = self.validator.process.poll() is not None
            self.tell_round()
            if ended and sum(e["event"] == "published" for e in self.validator.events) < number:
                raise Unavailable("validator", f"ended before weight set {number}; see {self.validator.log}")
            time.sleep(0.2)

    # the end

    def ended(self, localnet: Localnet, crew: tuple[Miner, ...], texts: text.Texts) -> Ended:
        store = Store(self.folder / "validator" / "store.db", read_only=True)
        records = tuple(r.record for r in store.rounds() if r.record)
        store.close()
        published = asyncio.run(_weights_on_chain(localnet, self.validator_hotkey))
        curves = {
            path.parent.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(self.folder.glob("*/training/curve.jsonl"))
        }
        return Ended(self.folder, crew, records, published, self.names, curves, unigram(texts, records[-1]))


def _program(name: str) -> str:
    return str(Path(neurons.__file__).parent / name)


def _round_line(event: Mapping[str, Any], who: str) -> str:
    """One event of the validator as a line; empty for what would only repeat."""
    kind, message, name = event["event"], event["message"], f"{who:<9}" if who else ""
    if kind == "refused":
        return f"[red]refused[/red]    {name} {message.removeprefix(event.get('hotkey', '') + ': ')}"
    if kind in ("inspected", "remembered", "fetched", "evaluated"):
        return f"{kind:<10} {name} {message}"
    if kind == "scored":
        return f"[green]scored[/green]     {name} {message}, {event['loss_per_sample']} nats a sample, weight {event['weight']}"
    if kind in ("samples", "published", "unavailable", "not_published", "bug"):
        return f"{kind:<10} {message}"
    return ""


async def _weights_on_chain(localnet: Localnet, hotkey: str) -> dict[str, float]:
    async with Chain(NETUID, network="local", substrate=LedgerSubstrate(localnet.chain)) as chain:
        return await chain.weights(hotkey)


def unigram(texts: text.Texts, record: RoundRecord) -> dict[str, float]:
    """Bits per byte of a unigram model with add-one smoothing, fitted on all training text, on the samples of a record."""
    from sn29.corpus import LocalFolder, TextSource, capped, one_pass
    from sn29.models.tokenizer import Tokenizer

    found = {}
    data = LocalFolder(texts.dataset)
    drawn_from = (capped(t, MAX_CHARS) for t in one_pass(TextSource(data, "data/eval-*.parquet", "text"), seed=0))
    evaluation = {hashlib.sha256(t.encode()).hexdigest()[:32]: t for t in drawn_from}
    for name, folder in (("c00", texts.gpt4), ("c01", texts.llama32k)):
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        training = one_pass(TextSource(data, TRAINING_FILES, "text"), seed=0)
        counts = Counter(i for ids in tokenizer.encode_batch(list(training)) for i in ids)
        total = sum(counts.values()) + tokenizer.largest_id() + 1
        samples = [evaluation[s.id] for s in record.competitions[name].samples]
        nats = -sum(math.log((counts[i] + 1) / total) for ids in tokenizer.encode_batch(samples) for i in ids)
        found[name] = nats / math.log(2) / sum(len(s.encode()) for s in samples)
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """One miner at the end: what the last round says of it."""

    outcome: Outcome
    weight: float
    """On chain."""
    towards: float
    """What the last round's result alone would make of it: a round moves weights only part of the way (rules.weights)."""
    score: Score | None = None
    loss: float = math.inf
    """Nats per sample."""
    bits_per_byte: float = math.inf


def rows(ended: Ended) -> dict[str, Row]:
    """By hotkey."""
    record = ended.records[-1]
    aims = towards(record)  # the demo's competitions are of one mechanism

    def row_of(outcome: Outcome) -> Row:
        return Row(outcome, ended.published.get(outcome.hotkey, 0.0), aims.get(outcome.hotkey, 0.0))

    found = {o.hotkey: row_of(o) for o in record.no_competition}
    for kept in record.competitions.values():
        scores = {s.hotkey: s for s in kept.scores}
        for model in kept.models:
            row = row_of(model.outcome)
            if model.evaluated:
                nats, measured = sum(model.losses), kept.samples[: len(model.losses)]
                bits = nats / math.log(2) / sum(s.num_bytes for s in measured)
                row = replace(row, score=scores[model.hotkey], loss=nats / len(measured), bits_per_byte=bits)
            found[model.hotkey] = row
    return found


def show_table(console: Console, ended: Ended) -> None:
    table = Table(title="What the second round decided", title_style="bold")
    for column in ("miner", "hotkey", "compe-\ntition"):
        table.add_column(column, no_wrap=True)
    for column in ("nats a\nsample", "bits a\nbyte", "wins", "weight\non chain", "on its\nway to"):  # 80 columns in all
        table.add_column(column, justify="right", no_wrap=True)
    found, hotkey_of = rows(ended), {name: hotkey for hotkey, name in ended.names.items()}
    refused = []
    for miner in ended.crew:
        row = found[hotkey_of[miner.name]]
        short = f"{row.outcome.hotkey[:4]}…{row.outcome.hotkey[-4:]}"
        if row.score:
            figures = f"{row.loss:.1f}", f"{row.bits_per_byte:.3f}", f"{row.score.wins:g}"
            table.add_row(miner.name, short, miner.competition, *figures, f"{row.weight:.4f}", f"{row.towards:.4f}")
        else:
            refused.append(f"  {miner.name:<8}  {short}  {miner.competition}  {_outcome_line(row.outcome, ended.names)}")
    console.print(table)
    console.print(
        f"  A round moves weights {1 - KEEP:.0%} of the way, so that one lucky window pays {1 - KEEP:.0%} at most: "
        "who has just won has less on chain than is on its way."
    )
    for line in refused:
        console.print(line)
    for name, curve in ended.curves.items():
        if len(curve) > 20:
            start, end = learnt(curve)
            console.print(f"  {name} trained from {start:.2f} to {end:.2f} nats a token in {len(curve)} steps")
    for name, bits in ended.unigram.items():
        console.print(f"  {name}: a unigram model of the training text needs {bits:.3f} bits a byte on the same samples")


def _outcome_line(outcome: Outcome, names: Mapping[str, str]) -> str:
    """Outcome, reason and both values in one line; hotkeys by name, long hashes cut."""
    values = outcome.limit if outcome.reason == Reason.COPY.code else f"{outcome.got or outcome.detail} / {outcome.limit}"
    for hotkey, name in names.items():
        values = values.replace(hotkey, name)
    values = escape(re.sub(r"[0-9a-f]{40,64}", lambda found: found[0][:8] + "...", values))
    status = "refused" if outcome.status == "rejected" else outcome.status
    return f"[red]{status}[/red] {outcome.reason}: {values}"


def check_outcomes(ended: Ended) -> None:
    """That every miner met the end it must meet. A demo that tells another story has found a bug: RuntimeError."""
    found, hotkey_of = rows(ended), {name: hotkey for hotkey, name in ended.names.items()}
    for miner in ended.crew:
        row = found[hotkey_of[miner.name]]
        got = row.outcome.reason or row.outcome.status
        if got != miner.expected:
            raise RuntimeError(f"{miner.name}: {got} instead of {miner.expected}")
        if miner.expected != "evaluated" and row.weight > 0:
            raise RuntimeError(f"{miner.name}: refused, but weight {row.weight}")


def learnt(curve: list[dict[str, float]]) -> tuple[float, float]:
    """Training loss in nats per token: of the first step, and the mean of the last 20."""
    last = [row["loss"] for row in curve[-20:]]
    return curve[0]["loss"], sum(last) / len(last)


def check_training(ended: Ended) -> None:
    """That training has taught something: a quarter below the model's own start, and below a unigram model."""
    for name in ("alice", "bob", "carol", "dave"):
        start, end = learnt(ended.curves[name])
        if not end < 0.75 * start:
            raise RuntimeError(f"{name}: trained from {start:.2f} to only {end:.2f} nats a token")
    found, hotkey_of = rows(ended), {name: hotkey for hotkey, name in ended.names.items()}
    for miner in ended.crew:
        row, limit = found[hotkey_of[miner.name]], ended.unigram[miner.competition]
        if miner.expected == "evaluated" and not row.bits_per_byte < limit:
            raise RuntimeError(f"{miner.name}: {row.bits_per_byte:.3f} bits a byte, not below a unigram model's {limit:.3f}")
