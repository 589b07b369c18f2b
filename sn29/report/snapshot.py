"""One reading of everything that the pages and the metrics are made of: status.json, the store, the newest records, the disk.

    Reader.read -> Snapshot   frozen; what could not be read is said in it, never raised
    alarms(...)               what somebody should look at, and what to do
    Snapshot.revealed         without what other validators must not see yet

Nothing is written, and the store is opened for reading alone: the program that owns it does not notice.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from sn29 import record_files
from sn29.concealment import clean
from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.records import Outcome, Weights
from sn29.replay import recompute
from sn29.round_record import RoundRecord
from sn29.rules.schedule import CompetitionFile
from sn29.store import ChainSeen, Imported, RulesKept, Sent, reading, shown_upto
from sn29.telemetry import STATUS, STOPPED, Status, Warned

BLOCK_SECONDS = 12.0
EPOCH = 360
"""Blocks between two sets of weights where the store does not say."""
STALE_S = 60.0
"""A program writes its status every 5 s: one that is this old is of a program that hangs or has ended."""
STALE_BLOCKS = 25
"""A newest final block that is older than so many blocks, and than a minute, is old: `publication.STALE_BLOCKS`."""
UNPUBLISHED_S = 900.0
"""So long no set of weights may fail again and again without an alarm."""
LOOP_STARTS, LOOP_S = 4, 900.0
"""So many starts within so many seconds are a program that does not stay up."""
LEAST_FREE, LITTLE_FREE = 1e9, 20e9
"""Bytes of the disk: below the first nothing can be kept; below the second, and a tenth of the disk, the next model may not
find room."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What somebody should look at."""

    name: str
    """One of ALARMS."""
    level: str
    """`critical`: the program does not do its work. `warning`: it does, and will not for ever."""
    sentence: str
    advice: str


ALARMS: Mapping[str, str] = {
    "status_old": "status.json is missing or older than a minute, or says that the program has ended without being asked to; "
    "a warning where it was asked to, an epoch ago or more",
    "restart_loop": "the program was started 4 times or more within 15 minutes, without starts that ended as they were asked to; "
    "a warning while it takes starts that were refused for their settings to be as many",
    "chain_old": "the newest final block, or the start where none was seen, is older than 25 blocks and a minute",
    "weights_old": "no weight set stands on chain that is younger than --weights.alarm-epochs epochs",
    "not_published": "every try to set weights has failed for 15 minutes",
    "disk_full": "the disk of the state folder is nearly full",
    "round_overdue": "a round is still open though the next window has begun",
    "no_round": "no round was finished within two windows of the one before, or of the start",
    "bugs": "the program met an error that nobody expected",
    "store": "the store cannot be read",
    "records": "a round record cannot be read, or not be computed again by this version",
    "rules": "the competition files cannot be read",
}
"""Name -> when it is raised. docs/metrics.md has this table."""


@dataclass(frozen=True)
class Round:
    """One record, with the file that it is in."""

    path: Path
    record: RoundRecord
    sha256: str
    """Of the file."""
    written: float
    """Seconds since 1970."""

    @property
    def block(self) -> int:
        return self.record.head.block

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Of all competitions, and of those that named none."""
        kept = (m.outcome for _, c in sorted(self.record.competitions.items()) for m in c.models)
        return (*self.record.no_competition, *kept)

    @property
    def pays(self) -> bool:
        """Whether it decided any weight."""
        return any(weights.by_hotkey for weights in self.record.weights.values())


@dataclass(frozen=True, slots=True)
class Published:
    """One mechanism's weights."""

    decided: Weights | None
    """By the newest round that is ours to publish; None: not to be seen yet, see `Snapshot.revealed`."""
    stands: tuple[int, Weights] | None
    """Block of our newest set on chain that was read back, and what it is."""
    on_its_way: tuple[Sent, ...]
    num_sets: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What the store says."""

    chain: str
    """Genesis and subnet; empty before it was ever used."""
    seen: ChainSeen | None
    open_rounds: tuple[int, ...]
    """Blocks, oldest first."""
    last_finished: int | None
    first_decided: int | None
    published: Mapping[int, Published]
    """By mechanism."""
    rules: tuple[RulesKept, ...] = ()
    """What rounds were, are and will be judged by, by block."""
    imports: tuple[Imported, ...] = ()
    """Losses that a warm start took over."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything at one moment."""

    at: float
    """Seconds since 1970 by this machine's clock, as all times here."""
    folder: Path | None
    """The state folder; None where records alone were named."""
    status: Status | None
    facts: Facts | None
    rounds: tuple[Round, ...]
    """The newest records, oldest first."""
    files: Mapping[str, CompetitionFile]
    """Competition files as they are now, by name; empty where they cannot be read."""
    free_bytes: int
    disk_bytes: int
    """Of the disk that the state folder is on; 0: not known."""
    alarms: tuple[Alarm, ...]
    alarm_epochs: int = 3
    """--weights.alarm-epochs."""
    finished: tuple[int, float] | None = None
    """(block, when it was written) of the newest record, also of one that is withheld."""
    withheld: int = 0
    """Rounds that are left out, see `revealed`."""
    older: int = 0
    """Records that were not read: older ones than the newest."""

    def revealed(self) -> Snapshot:
        """Without the rounds whose weights the chain does not show yet, or may not show: others would copy them. All is shown
        where it is known that weights are set in the open, and of records alone, which somebody has named."""
        published = self.facts.published if self.facts else {}
        upto = shown_upto(self.facts.seen if self.facts else None, [(one.decided, one.stands) for one in published.values()])
        if self.folder is None or upto == math.inf:
            return self
        shown = {m: replace(one, decided=one.stands[1] if one.stands else None) for m, one in published.items()}
        rounds = tuple(one for one in self.rounds if one.block <= upto or not one.pays)
        facts = replace(self.facts, published=shown) if self.facts else None
        return replace(self, facts=facts, rounds=rounds, withheld=len(self.rounds) - len(rounds))

    @property
    def newest(self) -> Round | None:
        return self.rounds[-1] if self.rounds else None

    @property
    def is_live(self) -> bool:
        """A program writes its status now and then, until it ends: its age says whether it lives."""
        return self.status is not None and self.status.stage != STOPPED and abs(self.at - self.status.updated) <= STALE_S

    @property
    def was_asked_to_stop(self) -> bool:
        return self.status is not None and self.status.stage == STOPPED and not self.status.detail

    @property
    def validator(self) -> Status | None:
        """The status, if it is one of a validator."""
        return self.status if self.status is not None and self.status.program == "validator" else None

    @property
    def is_healthy(self) -> bool:
        return not any(alarm.level == "critical" for alarm in self.alarms)

    @property
    def block_seconds(self) -> float:
        seen = self.facts.seen if self.facts else None
        return seen.block_seconds if seen and seen.block_seconds > 0 else BLOCK_SECONDS

    @property
    def patience(self) -> int:
        """Epochs after which the weight set on chain is too old: before it stands it waits to be revealed."""
        return self.alarm_epochs + ((self.facts.seen.reveal_epochs or 0) if self.facts and self.facts.seen else 0)

    @property
    def epoch(self) -> int:
        """Blocks."""
        seen = self.facts.seen if self.facts else None
        return seen.epoch if seen and seen.epoch > 0 else EPOCH

    @property
    def head(self) -> tuple[int, float] | None:
        """(newest final block that was seen, when it came)."""
        found = []
        if self.status is not None and self.status.head is not None:
            found.append((self.status.head, self.status.head_time or self.status.updated))
        if self.facts is not None and self.facts.seen is not None:
            found.append((self.facts.seen.block, self.facts.seen.at))
        return max(found, default=None)

    @property
    def block(self) -> int | None:
        """The block that it is now: the newest final one, and counted on from there; without any the newest record's."""
        if self.head is None:
            return self.newest.block if self.newest else None
        block, since = self.head
        return block + max(0, int((self.at - since) / self.block_seconds))

    def time_of(self, block: int) -> float | None:
        """When a block came or will come, in seconds since 1970, counted from the newest one that was seen."""
        return None if self.head is None else self.head[1] + (block - self.head[0]) * self.block_seconds

    @property
    def warnings(self) -> tuple[Warned, ...]:
        return self.status.warnings if self.status else ()

    @property
    def competitions(self) -> tuple[str, ...]:
        """Names of all that are in force or were judged."""
        judged = {name for one in self.rounds for name in one.record.competitions}
        return tuple(sorted(judged | set(self.files)))

    @property
    def hotkeys(self) -> tuple[str, ...]:
        """Everybody that a record names."""
        return tuple(sorted({o.hotkey for one in self.rounds for o in one.outcomes}))


Rules = Callable[[], Mapping[str, CompetitionFile]]
"""The competition files as they are now. Raises Rejected, Unavailable."""


@dataclass
class Reader:
    """Reads one state folder, or records, again and again; a record that was read is kept."""

    folder: Path | None
    records: Sequence[Path] = ()
    """Files and folders, instead of the state folder's."""
    rules: Rules = dict
    rounds: int = 40
    alarm_epochs: int = 3
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: dict[Path, tuple[tuple[int, int], Round | Rejected]] = field(default_factory=dict)

    def read(self) -> Snapshot:
        """Never raises for what it reads: that is an alarm."""
        with self._lock:
            found: list[Alarm] = []  # what could not be read
            status = self._status(found)
            facts = self._facts(found)
            rounds, older = self._rounds(found)
            try:
                files = self.rules()
            except Sn29Error as error:
                files = {}
                advice = "`sn29 competitions check` says what is wrong; the rules of before stay in force meanwhile"
                found.append(Alarm("rules", "warning", clean(error), advice))
            free, size = _disk(self.folder)
            newest = (rounds[-1].block, rounds[-1].written) if rounds else None
            now = Snapshot(
                time.time(), self.folder, status, facts, rounds, files, free, size, (), self.alarm_epochs, newest, older=older
            )
            names = {alarm.name for alarm in found}
            raised = [*(alarm for alarm in alarms(now) if alarm.name not in names), *found]
            return replace(now, alarms=tuple(sorted(raised, key=lambda alarm: alarm.level != "critical")))

    def _status(self, found: list[Alarm]) -> Status | None:
        if self.folder is None:
            return None
        try:
            return Status.from_json((self.folder / STATUS).read_bytes()[: 1 << 20])
        except FileNotFoundError:
            return None
        except (OSError, Sn29Error) as error:
            found.append(Alarm("status_old", "critical", f"{STATUS} cannot be read: {error}", _LOOK_AT_PROGRAM))
            return None

    def _facts(self, found: list[Alarm]) -> Facts | None:
        path = self.folder / "store.db" if self.folder is not None else None
        try:
            if path is None or not path.exists():
                return None
            with reading(path, briefly=True) as store:
                theirs = store.taken_over()
                decided = {m: w for m, w in store.weights().items() if w.block != theirs}
                return Facts(
                    store.chain() or "", store.chain_seen(), tuple(one.block for one in store.open_rounds()),
                    store.last_finished(), store.first_decided(),
                    {
                        m: Published(w, store.last_publication(m), store.sent(m), store.count_publications(m))
                        for m, w in decided.items()
                    },
                    store.rules_kept(), tuple(store.imports().values()),
                )  # fmt: skip
        except (Sn29Error, OSError, ValueError, TypeError, AttributeError) as error:  # of rows that are no JSON, or another one
            advice = (
                "`sn29 store check` says what is damaged; a store of an older version is brought up to date at the next start"
            )
            found.append(Alarm("store", "critical", clean(error), advice))
            return None

    def _rounds(self, found: list[Alarm]) -> tuple[tuple[Round, ...], int]:
        """The newest, and how many older records there are."""
        try:
            if self.records:
                paths = record_files.paths(self.records)
            else:
                folder = (self.folder or Path()) / record_files.FOLDER
                paths = record_files.paths([folder]) if record_files.has_any(folder) else []
        except (Sn29Error, OSError) as error:
            found.append(Alarm("records", "warning", clean(error), _LOOK_AT_RECORDS))
            return (), 0
        rounds: dict[int, Round] = {}
        wrong: list[Sn29Error] = []
        looked = set[Path]()
        for path in reversed(paths):
            if len(rounds) + len(wrong) == self.rounds:
                break
            one = self._round(path)
            looked.add(path)
            if isinstance(one, Round):
                rounds.setdefault(one.block, one)
            else:
                wrong.append(one)
        self._kept = {path: kept for path, kept in self._kept.items() if path in looked}
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            found.append(Alarm("records", "warning", f"{clean(wrong[0])}{more}", _LOOK_AT_RECORDS))
        return tuple(rounds[block] for block in sorted(rounds)), len(paths) - len(looked)

    def _round(self, path: Path) -> Round | Sn29Error:
        """The record, which this version can compute again; or why there is none."""
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if path not in self._kept or self._kept[path][0] != stamp:
                self._kept[path] = (stamp, _judged(path, stat.st_mtime))
            return self._kept[path][1]
        except OSError as error:
            return Unavailable(str(path), error.strerror or str(error))
        except Unavailable as error:
            return error


def _judged(path: Path, written: float) -> Round | Rejected:
    """Raises Unavailable."""
    try:
        record = record_files.read(path)
        recompute(record)
        return Round(path, record, hashlib.sha256(record_files.read_text(path)).hexdigest(), written)
    except Rejected as error:
        named = path.name in error.where
        return error if named else Rejected(error.reason, error.got, error.limit, f"{path.name}: {error.where or 'the record'}")
    except ValueError as error:
        return Rejected(Reason.RECORD, error, "one that this version can compute again", str(path))


def _disk(folder: Path | None) -> tuple[int, int]:
    """(free bytes, all bytes); zeros: not known."""
    try:
        found = shutil.disk_usage(folder) if folder is not None else None
    except OSError:
        found = None
    return (found.free, found.total) if found else (0, 0)


_LOOK_AT_PROGRAM = "look at its log, and whether its service runs; start it again: it goes on where it was"
_PUBLISHING = "`sn29 doctor validator` checks permit, stake and connection"
_LOOK_AT_RECORDS = "`sn29 replay FILE` says what is wrong with it; take the file out of the folder, or restore it from a backup"


# --- alarms -----------------------------------------------------------------------------------------------------------


def alarms(snapshot: Snapshot) -> list[Alarm]:
    """What is known of a program by its folder alone; nothing where no folder was named."""
    if snapshot.folder is None:
        return []
    checks = [_status_old, _restart_loop, _chain_old, _not_published, _disk_full, _round_overdue, _no_round, _bugs]
    if snapshot.was_asked_to_stop:  # nobody works or follows the chain, and whoever asked for that knows; for a while
        checks = [_status_old, _disk_full]
    found = [check(snapshot) for check in checks]
    return [alarm for alarm in (*found, *_weights_old(snapshot)) if alarm is not None]


def _status_old(s: Snapshot) -> Alarm | None:
    if s.is_live:
        return None
    if s.status is None:
        return Alarm("status_old", "critical", f"no {STATUS} in {s.folder}", _LOOK_AT_PROGRAM)
    if s.was_asked_to_stop:  # or was to be started again, and ends before it can say so
        age = s.at - s.status.updated
        said = f"the program was asked to stop {lasting(age)} ago, and has not been at work since then"
        return Alarm("status_old", "warning", said, _LOOK_AT_PROGRAM) if age >= s.epoch * s.block_seconds else None
    if s.status.stage == STOPPED:
        said = f"the program ended {lasting(s.at - s.status.updated)} ago: {s.status.detail}"
        return Alarm("status_old", "critical", said, _LOOK_AT_PROGRAM)
    age = s.at - s.status.updated
    said = f"no word from the program for {lasting(age)}" if age >= 0 else f"its last word is of {lasting(-age)} from now"
    return Alarm("status_old", "critical", said, _LOOK_AT_PROGRAM)


def _restart_loop(s: Snapshot) -> Alarm | None:
    starts = [at for at in (s.status.starts if s.status else ()) if s.at - at < LOOP_S]
    refused = [at for at in (s.status.refused if s.status else ()) if s.at - at < LOOP_S]
    times = len(starts) + len(refused)
    if times < LOOP_STARTS:
        return None
    # Refused starts are a supervisor's loop, or a person's tries: no reason to end a program that is up by now.
    level = "critical" if len(starts) >= LOOP_STARTS else "warning"
    advice = "its log says why it ends; `sn29 doctor validator` with the same flags checks all that it needs"
    said = f"started {times} times within {lasting(LOOP_S)}"
    said += f", {len(refused)} of them refused for their settings" if refused else ""
    return Alarm("restart_loop", level, said, advice)


def _chain_old(s: Snapshot) -> Alarm | None:
    status = s.validator
    if s.status is not None and not s.is_live:  # nobody follows the chain
        return None
    if status is not None and status.head is None:  # it has not seen any itself: since its start
        if status.stage != "waiting":  # a warm start, which measures before it follows the chain
            return None
        age, said = s.at - status.started, "no block of the chain was seen since the start, {} ago"
    elif s.head is not None:
        age, said = s.at - s.head[1], f"the newest final block, {s.head[0]:,}, is {{}} old"
    else:
        return None
    if age <= max(STALE_BLOCKS * s.block_seconds, 60.0):
        return None
    advice = "look at the node of --subtensor.network, or name spare ones with --subtensor.fallbacks"
    return Alarm("chain_old", "critical", said.format(lasting(age)), advice)


def _not_published(s: Snapshot) -> Alarm | None:
    since = s.status.unpublished_since if s.status else None
    if since is None or s.at - since < UNPUBLISHED_S:
        return None
    said = f"no weights could be set for {lasting(s.at - since)}"
    return Alarm("not_published", "warning", said, "the last warnings `not_published` say why: " + _PUBLISHING)


def _since_start(s: Snapshot) -> float | None:
    """Blocks."""
    return (s.at - s.validator.started) / s.block_seconds if s.validator is not None and s.is_live else None


def _weights_old(s: Snapshot) -> list[Alarm]:
    """As `Publisher.watch` counts: from the set that stands, or from the first round that decided any; without any from the
    start."""
    if s.facts is None:
        return []
    blocks = _since_start(s)
    if not s.facts.published and blocks is not None and blocks >= s.alarm_epochs * s.epoch:
        said = f"no weights were decided in {blocks / s.epoch:,.0f} epochs since the start"
        return [Alarm("weights_old", "critical", said, "its stage and the last warnings say what the rounds wait for")]
    if s.block is None:
        return []
    found = []
    for mechanism, one in sorted(s.facts.published.items()):
        since = one.stands[0] if one.stands else s.facts.first_decided or (one.decided.block if one.decided else s.block)
        epochs = (s.block - since) // s.epoch
        if epochs >= s.patience:
            which = f" of mechanism {mechanism}" if mechanism else ""
            said = (
                f"the weight set{which} on chain is of block {since:,}, {epochs:,} epochs ago"
                if one.stands
                else f"no weight set{which} stands on chain, {epochs:,} epochs after the first decision"
            )
            advice = "the last warnings say what the chain refuses; " + _PUBLISHING
            found.append(Alarm("weights_old", "critical", said, advice))
    return found


def _disk_full(s: Snapshot) -> Alarm | None:
    if not s.disk_bytes or (s.free_bytes >= LEAST_FREE and s.free_bytes >= min(LITTLE_FREE, s.disk_bytes / 10)):
        return None
    level = "critical" if s.free_bytes < LEAST_FREE else "warning"
    said = f"{s.free_bytes / 1e9:.1f} GB of {s.disk_bytes / 1e9:.0f} GB are free on the disk of {s.folder}"
    return Alarm("disk_full", level, said, "free some of it, or bound the models with --models.gb")


def _round_overdue(s: Snapshot) -> Alarm | None:
    if s.facts is None or s.block is None:
        return None
    late = [block for block in s.facts.open_rounds if block + _window(s) <= s.block and block > (s.facts.last_finished or -1)]
    if not late:
        return None
    said = f"the round of block {late[-1]:,} is open though the next window began at block {late[-1] + _window(s):,}"
    return Alarm("round_overdue", "warning", said, "its stage and the last warnings say what it waits for")


def _no_round(s: Snapshot) -> Alarm | None:
    if s.facts is None:
        return None
    last, started, now = s.facts.last_finished, _since_start(s), s.block
    ages = [] if started is None else [started]
    ages += [] if last is None or now is None else [now - last]
    if not ages or min(ages) < 2 * _window(s):
        return None
    said = "no round was finished yet, more than two windows after the start"
    if last is not None:
        said = f"the last finished round is of block {last:,}, more than two windows ago"
    return Alarm("no_round", "warning", said, "the last warnings say what rounds wait for: the chain, the Hub or the data set")


def _window(s: Snapshot) -> int:
    """Blocks of the shortest window."""
    lengths = [file.versions[0].competition.samples.window_blocks for file in s.files.values()]
    kept = s.newest.record.competitions.values() if s.newest else ()
    lengths += [int(k.window.seed.block // k.window.index) for k in kept if k.window.index]
    return min(lengths, default=EPOCH)


def _bugs(s: Snapshot) -> Alarm | None:
    count = s.status.counters.get("bug", 0) if s.status else 0
    if not count:
        return None
    times = "once" if count == 1 else f"{count:,} times"
    said = f"an error that nobody expected came {times} since the start"
    return Alarm("bugs", "warning", said, "its traceback is in the log: please report it; the program goes on")


def lasting(seconds: float) -> str:
    """A span of time in words: `45 s`, `12 min`, `3 h 5 min`, `2 days 4 h`."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"
