"""Competition files over time: which rules are in force at a block, and what a change leaves to older models.

A file's fields are its rules before the first change. `changes` says what becomes of them:

    clock: {block: 5020713, time: 2025-02-27T07:00Z, block_seconds: 12}     # only when a change is given by its time
    changes:
      - at: 2025-03-01T07:00Z
        set: {scoring.group: 10, scoring.skew: 2.0}
      - at: 10080000
        ramp: {limits.parameters: {from: 3.9e9, to: 6.9e9, over_blocks: 201600, step: 0.25e9}}

A ramp of n = (to - from) / step steps has the value `from + k * step` from block `at + ceil(k * over_blocks / n)` on:
`from` at the very start, `to` after `over_blocks`. Here a step of 0.25e9 every 16,800 blocks, which are 56 hours.

What is in force is a pure function of file and block, because two validators must change their rules at the same block.
The chain could tell the time of a block, but only afterwards, and blocks come late by minutes and hours over a year. So
a file that says times also says which block each time is: an anchor, and the seconds of a block. What it announces
as 07:00 may then happen a little later by the clock on the wall, and happens at one block for everybody.

Every competition that will ever be in force is made and checked when the file is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field, TypeAdapter

from sn29.errors import Reason, Rejected
from sn29.rules.competition import SCHEDULE_FIELDS, Competition, Pool, check_together, competition_of, read_fields
from sn29.rules.fields import Hotkey, Number, Section, WholeNumber, broken, validate
from sn29.rules.yaml_text import shown

MAX_STEPS = 1000
"""Steps of one ramp: more say that `step` was mistyped."""
# What no change may set: the name, the schedule itself, and samples.window_blocks. Windows are numbered
# `block // window_blocks`: with another length a number would come twice, and which round is due would depend on when a
# validator looks.
_FIXED_FIELDS = ("name", *SCHEDULE_FIELDS)
OVERRIDABLE = ("pool.keep", "pool.pending")
"""What a file may set for one validator: how many models it evaluates in a round, which is a question of its hardware.
Every other field decides what a loss or a win is, or who is paid: validators that differ there disagree on weights,
and the chain takes the difference from them."""

_utc = TypeAdapter(AwareDatetime)


def _time(value: str) -> str:
    try:
        seconds_of(value)
    except Rejected as error:
        raise broken(value, error.limit) from None
    return value


_Time = Annotated[str, AfterValidator(_time)]


# ---- what a file says ------------------------------------------------------------------------------------------------


class Clock(Section):
    """Which block a time is: `block + (time - this time) / block_seconds`, rounded up."""

    block: Annotated[WholeNumber, Field(ge=0)]
    time: _Time
    """UTC time of that block."""
    block_seconds: Annotated[Number, Field(gt=0)]

    def time_of(self, block: int) -> str:
        """UTC time of a block, to the minute, as `block_at` reads it."""
        seconds = math.floor(seconds_of(self.time) + (block - self.block) * self.block_seconds)
        seconds = min(seconds, 19_999_999_999)  # the year 2603; pydantic takes larger numbers for milliseconds
        return str(_utc.validate_python(seconds).strftime("%Y-%m-%dT%H:%MZ"))

    def block_at(self, time: str) -> int:
        """The first block at or after a time such as 2024-08-06 or 2024-08-06T07:00Z."""
        return self.block + math.ceil((seconds_of(time) - seconds_of(self.time)) / self.block_seconds)


class Ramp(Section):
    """A number that grows or shrinks in steps."""

    from_: Annotated[Number, Field(alias="from")]
    to: Number
    over_blocks: Annotated[WholeNumber, Field(gt=0)]
    step: Annotated[Number, Field(gt=0)]
    """Size of one step; up or down, as `from` and `to` say. A whole number of steps leads from one to the other."""


class Change(Section):
    """What becomes different, and from when on: one of `set` and `ramp`."""

    at: Any
    """A block, or a UTC time if the file has a clock."""
    set: Mapping[str, Any] = {}
    """New values by dotted field, such as `limits.parameters`; a whole section is replaced by a mapping."""
    ramp: Mapping[str, Any] = {}
    """A Ramp by dotted field."""


class _Schedule(Section):
    clock: Clock | None = None
    changes: tuple[Any, ...] = ()
    overrides: Mapping[Hotkey, Mapping[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class Version:
    """The rules from one block on, until the next version's block."""

    block: int
    competition: Competition
    origin: str = ""
    """Which changes of the file made it: `changes.0`; empty for the first."""
    what: tuple[str, ...] = ()
    """What became different: `limits.parameters 3,900,000,000 -> 4,150,000,000`; empty for the first."""


@dataclass(frozen=True, slots=True)
class CompetitionFile:
    """A whole file: the rules of every block."""

    name: str
    versions: tuple[Version, ...]
    """By block; the first one's block is 0."""
    clock: Clock | None
    overrides: Mapping[str, Mapping[str, Any]]
    """By validator hotkey: values by dotted field."""

    @property
    def unpinned(self) -> tuple[str, ...]:
        """`Competition.unpinned` of the rules of every block, those of later ones with their block."""
        first, *later = self.versions
        new = chain.from_iterable(
            (
                f"{field} from block {now.block} on"
                for field in now.competition.unpinned
                if field not in before.competition.unpinned
            )
            for before, now in pairwise([first, *later])
        )
        return (*first.competition.unpinned, *new)


def seconds_of(time: str) -> int:
    """Seconds since 1970 of a UTC time. Raises Rejected(COMPETITION_FILE)."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d)?Z)?", time):
            return int(_utc.validate_python(time if "T" in time else f"{time}T00:00Z").timestamp())
    except ValueError:
        pass  # such as the 30th of February
    raise Rejected(Reason.COMPETITION_FILE, time, "a UTC time such as 2024-08-06T07:00Z")


# ---- what is in force ------------------------------------------------------------------------------------------------


def in_force(file: CompetitionFile, block: int, validator: str = "") -> Competition:
    """The rules of a block; with a hotkey, those of that validator. A window's block is the one of its seed."""
    found = file.versions[_index(file, block)].competition
    override = file.overrides.get(validator)
    return found if override is None else _overridden(found, override, f"{file.name}.yaml: overrides.{validator}")


def rules_for(file: CompetitionFile, commit_block: int, block: int, validator: str = "") -> Competition:
    """The rules by which a model that was committed at `commit_block` is admitted in a window whose seed is `block`.

    They are those in force at `block`; and for `grace_blocks` after a change a model that was committed before it may
    still have the family and the size that the older rules allowed. Each limit counts by itself: the widest that was in
    force at any block from max(commit_block, block - grace_blocks) to `block`. Grace never refuses what the rules in
    force admit. Lengths, tokenizer, samples and scoring are never graced: all models of a window answer for the same
    text.

    Example: parameters fall from 7e9 to 5e9 at block 1000, grace_blocks is 300. A model of 6e9 committed at block 999
    is admitted up to block 1299 and refused from 1300 on; one committed at block 1000 is refused at once.
    """
    now = in_force(file, block, validator)
    since = max(commit_block, block - now.grace_blocks)
    if since >= block:
        return now
    valid = [version.competition for version in file.versions[_index(file, since) : _index(file, block) + 1]]
    limits = now.limits.model_copy(
        update={
            "parameters": max(c.limits.parameters for c in valid),
            "min_parameters": min(c.limits.min_parameters for c in valid),
            "bytes": max(c.limits.bytes for c in valid),
        }
    )
    families = dict.fromkeys(chain(now.families, *(c.families for c in valid)))
    return now.model_copy(update={"limits": limits, "families": tuple(families)})


def check_files(files: Sequence[CompetitionFile]) -> None:
    """That these can be in force together at every block. Raises Rejected(COMPETITION_FILE) naming block and files."""
    for block in sorted({version.block for file in files for version in file.versions}) or [0]:
        try:
            check_together([in_force(file, block) for file in files])
        except Rejected as error:
            if block == 0:
                raise
            what = "; ".join(f"{f.name}.yaml: {w}" for f in files for v in f.versions if v.block == block for w in v.what)
            raise Rejected(error.reason, error.got, error.limit, f"{error.where} from block {block} on ({what})") from None


def differences(old: Competition | Mapping[str, Any], new: Competition | Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """(dotted field, old value, new value) of all that is not the same; a value that is not there is shown as `-`."""
    flat_old, flat_new = (dict(_flat(c.model_dump() if isinstance(c, Competition) else c)) for c in (old, new))
    fields = list(dict.fromkeys([*flat_old, *flat_new]))
    absent = object()
    return tuple(
        (field, _plain(flat_old.get(field, "-")), _plain(flat_new.get(field, "-")))
        for field in fields
        if flat_old.get(field, absent) != flat_new.get(field, absent)
    )


def _index(file: CompetitionFile, block: int) -> int:
    return max(0, sum(version.block <= block for version in file.versions) - 1)


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{index}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _plain(value: object) -> str:
    """As a reader compares it: numbers with thousands in groups."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{int(value):,}" if value == int(value) and abs(value) < 1e15 else repr(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value)


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_file(name: str, text: str) -> CompetitionFile:
    """`<name>.yaml` with all its changes. Raises Rejected(COMPETITION_FILE); what a change breaks names the change."""
    where, fields = f"{name}.yaml", read_fields(name, text)
    said = {key: value for key, value in fields.items() if key in SCHEDULE_FIELDS}
    schedule = validate(_Schedule, where, said)
    rules: dict[str, Any] = {key: value for key, value in fields.items() if key not in SCHEDULE_FIELDS}
    versions = [Version(0, competition_of(where, name, rules))]
    for block, sets in _points(where, schedule):
        origin = ", ".join(dict.fromkeys(origin for origin, _, _ in sets))
        here, last = f"{where}: {origin} (block {block})", versions[-1].competition
        for _, field, value in sets:
            rules = _with(rules, field.split("."), value, here)
        competition = competition_of(here, name, rules)
        if competition.samples.window_blocks != last.samples.window_blocks:
            got, rule = f"{competition.samples.window_blocks:,}", f"{last.samples.window_blocks:,}, at every block"
            raise _refused(got, rule, f"{here}: samples.window_blocks")
        if competition != last:  # the start of a ramp changes nothing, as a rule
            what = tuple(f"{field} {old} -> {new}" for field, old, new in differences(last, competition))
            versions.append(Version(block, competition, origin, what))
    for hotkey, override in schedule.overrides.items():
        for version in versions:
            _overridden(version.competition, override, f"{where}: overrides.{hotkey}")
    return CompetitionFile(name, tuple(versions), schedule.clock, schedule.overrides)


_Set = tuple[str, str, Any]  # (changes.0, dotted field, value)


def _points(where: str, schedule: _Schedule) -> list[tuple[int, list[_Set]]]:
    """Every block at which something changes, in order, with what is set there."""
    points: dict[int, list[_Set]] = {}
    busy: dict[str, tuple[int, str]] = {}  # field -> last block of what was said about it so far, and where
    last = 0
    for number, raw in enumerate(schedule.changes):
        origin = f"changes.{number}"
        change = validate(Change, f"{where}: {origin}", raw)
        block = _block(f"{where}: {origin}", change.at, schedule.clock)
        if block < max(last, 1):
            raise _refused(f"block {block}", f"a block from {max(last, 1)} on: changes are sorted", f"{where}: {origin}.at")
        last = block
        if bool(change.set) == bool(change.ramp):
            raise _refused("set and ramp" if change.set else "neither set nor ramp", "one of the two", f"{where}: {origin}")
        for field, value in (change.set or change.ramp).items():
            kind = "set" if change.set else "ramp"
            at = f"{where}: {origin}.{kind}.{field}"
            steps = [(block, value)] if change.set else _steps(at, validate(Ramp, at, value), block)
            if field.split(".")[0] in _FIXED_FIELDS:
                raise _refused(f"the field {field}", "a field of the rules: no name, no schedule", at)
            taken = next((b for f, b in busy.items() if _overlap(f, field) and b[0] >= block), None)
            if taken is not None:
                raise _refused(f"block {block}", f"a block after {taken[0]}, where {taken[1]} ends", at)
            busy[field] = (steps[-1][0], origin)
            for step_block, step_value in steps:
                points.setdefault(step_block, []).append((origin, field, step_value))
    return sorted(points.items())


def _block(where: str, at: object, clock: Clock | None) -> int:
    if isinstance(at, str):
        if clock is None:
            raise _refused(at, "a block, or a clock in the file: {block, time, block_seconds}", f"{where}.at")
        return clock.block_at(validate(_Moment, where, {"at": at}).at)
    return validate(_Height, where, {"at": at}).at


class _Moment(Section):
    at: _Time


class _Height(Section):
    at: Annotated[WholeNumber, Field(ge=0)]


def _steps(where: str, ramp: Ramp, block: int) -> list[tuple[int, float]]:
    """(block, value) of every step, `from` and `to` included."""
    way = ramp.to - ramp.from_
    count = round(abs(way) / ramp.step)
    if count == 0 or abs(count * ramp.step - abs(way)) > 1e-9 * abs(way):
        raise _refused(f"from {ramp.from_:g} to {ramp.to:g} by {ramp.step:g}", "a whole number of steps, at least one", where)
    if count > min(MAX_STEPS, ramp.over_blocks):
        raise _refused(f"{count} steps", f"at most {MAX_STEPS}, and no more than over_blocks", where)
    # Decimals again: 0.1 + 2 * 0.1 is 0.30000000000000004, and what was meant is 0.3.
    values = [float(f"{ramp.from_ + way * k / count:.15g}") for k in range(count)] + [ramp.to]
    return [(block + math.ceil(k * ramp.over_blocks / count), value) for k, value in enumerate(values)]


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted field is, or lies inside, the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _with(rules: Any, path: Sequence[str], value: Any, where: str) -> Any:
    """A copy with another value at the path. Fields that no record knows are found when the copy is validated."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(rules, list):
        if not part.isdecimal() or int(part) >= len(rules):
            raise _refused(part, f"the number of an element, below {len(rules)}", where)
        return [_with(inner, rest, value, where) if i == int(part) else inner for i, inner in enumerate(rules)]
    if not isinstance(rules, Mapping):
        raise _refused(f"{part} inside {shown(rules)}", "a field inside a section", where)
    twin = {"dataset": "datasets", "datasets": "dataset"}.get(part) if not rest else None  # a file has one of the two
    return {
        **{k: v for k, v in rules.items() if k != twin},
        part: _with(rules.get(part, {} if rest else None), rest, value, where),
    }


def _overridden(competition: Competition, override: Mapping[str, Any], where: str) -> Competition:
    for field in override:
        if field not in OVERRIDABLE:
            raise _refused(f"the field {field}", f"one of {', '.join(OVERRIDABLE)}", where)
    fields = {field.removeprefix("pool."): value for field, value in override.items()}
    return competition.model_copy(update={"pool": validate(Pool, where, {**competition.pool.model_dump(), **fields})})


def _refused(got: str, rule: str, where: str) -> Rejected:
    return Rejected(Reason.COMPETITION_FILE, got, rule, where)
