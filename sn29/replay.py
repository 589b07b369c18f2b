"""What recorded losses are worth, computed again: under the rules of the record, or under other ones.

    recompute     scores and weights from the record alone
    compare       the same bits as were recorded? what differs first?
    what_if       what the record would have come to under other rules
    simulate      what one new competition file would have changed over many rounds
    by_hand       losses that somebody wrote down, scored like a round

A record by hand is a JSON object, for anybody who has a matrix of losses and wants to know what a rule makes of it:

    {"losses": {"ann": [812.5, 640.25], "bob": [811.0, null]},
     "commit_blocks": {"ann": 7012, "bob": 7350},
     "block": 7560,
     "competition": "c00"}

`losses` has each model's loss in nats on the same samples in the same order, null where it has none; `commit_blocks` says
since when each claims its model, `block` for which block scores are asked. `competition` is a name to be looked up in
--competitions, or an object with the fields of a competition file. May be left out: `content_ids` (equal ones are one
model; default: every model is another one) and `hash` (0x and 64 hex digits: orders the samples into groups; default: 0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from sn29.audit import Difference, first_difference
from sn29.errors import Reason, Rejected
from sn29.records import Entry, Head, Weights, Window
from sn29.round_record import CompetitionRecord, Json, ModelRecord, RoundRecord, SampleRecord
from sn29.rules.competition import Competition, HallOfFame, competition_of, violations
from sn29.rules.decision import Contest, Decision, decide
from sn29.rules.evidence import UNIT
from sn29.rules.fields import validate
from sn29.rules.schedule import CompetitionFile, in_force, rules_for
from sn29.rules.scoring import Memory, Scored
from sn29.rules.scoring_fields import Champion, OldestHolder
from sn29.rules.sequential import Bar, bar_of, hopeless, portions


@dataclass(frozen=True, slots=True)
class Changed:
    """Another competition for a recorded one."""

    competition: Competition
    refused: Mapping[str, Rejected] = field(default_factory=dict)
    """Entries that it does not allow, by hotkey: they are not scored."""


Change = Callable[[CompetitionRecord, Competition], Changed | None]
"""From what was recorded and was in force to what is asked for; None: the competition is not in force then."""


# --- between records and rules ----------------------------------------------------------------------------------------


def competition_record(
    contest: Contest,
    scored: Scored,
    *,
    file_sha256: str,
    datasets: Mapping[str, str],
    samples: Iterable[SampleRecord],
    models: Iterable[ModelRecord],
) -> CompetitionRecord:
    """A competition's part of the round's record, from what was decided on and what came out.

    `models` are all commitments; their `entry` is filled in here. Raises ValueError for an entry that none of them has.
    """
    all_models = [replace(m, entry=contest.entries.get(m.hotkey)) for m in models]
    if strangers := contest.entries.keys() - {m.hotkey for m in all_models}:
        raise ValueError(f"entries without a commitment: {sorted(strangers)}")
    return CompetitionRecord(
        file_sha256=file_sha256,
        parameters=contest.competition.model_dump(mode="json"),
        window=contest.window,
        datasets=dict(datasets),
        samples=tuple(samples),
        models=tuple(sorted(all_models, key=lambda m: (m.outcome.block, m.hotkey))),
        memory_before=contest.memory.to_json(),
        memory_after=scored.memory.to_json(),
        scores=tuple(scored.scores),
        duels=tuple(_without_infinities(duel) for duel in scored.duels),
    )


def contest_of(name: str, kept: CompetitionRecord) -> Contest:
    """What a competition was decided on. Raises Rejected for parameters or a memory that this version cannot read."""
    fields = {key: value for key, value in _mapping(kept.parameters, name).items() if key != "name"}
    return Contest(
        competition=competition_of(f"recorded {name}", name, fields),
        window=kept.window,
        losses=kept.losses,
        entries={m.hotkey: m.entry for m in kept.models if m.entry is not None},
        memory=memory_of(kept.memory_before, kept.window.seed.block - 1, f"{name}: memory before"),
        outage=any(m.outcome.status == "unavailable" for m in kept.models),
    )


def memory_for(competition: Competition, window: Window, before: RoundRecord | None) -> Memory:
    """What a scoring rule remembers when it judges a window, from the record of the round before (None: there is none).

    What that round left; but of a window that it judged already, what it began with. A rule that was not in force then
    begins with nothing.
    """
    kept = before.competitions.get(competition.name) if before is not None else None
    if kept is None or kept.parameters["scoring"]["rule"] != competition.scoring.rule:
        return Memory.empty()
    last = kept.window.seed.block
    if kept.window.index == window.index:
        return memory_of(kept.memory_before, last - 1, f"{competition.name}: memory before")
    return memory_of(kept.memory_after, last, f"{competition.name}: memory after")


def memory_of(data: Json, last: int, where: str) -> Memory:
    """A recorded memory of windows up to that of block `last`. Raises Rejected(RECORD) for one that no rule could have left."""
    try:
        memory = Memory.from_json(_mapping(data, where))
        if wrong := _wrong_in(memory, last):
            raise ValueError(wrong)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Rejected(Reason.RECORD, repr(error)[:200], "a memory of the rules", where) from None
    return memory


def _wrong_in(memory: Memory, last: int) -> str:
    """What no rule could have left; empty: nothing."""
    whos = [*([memory.holder] if memory.holder else []), *memory.past, *(e.who for e in memory.evidence)]
    whos += [who for pair in memory.copies for who in pair]
    if not all(type(text) is str for who in whos for text in (who.hotkey, who.content_id)):
        return "a hotkey or content that is no text"
    sums = [e.sums for e in memory.evidence]
    numbers = [memory.block, memory.since, memory.faced, *(e.rank for e in memory.evidence)]
    if not all(type(n) is int for n in (*numbers, *(n for s in sums for n in (s.count, s.total, s.squares)))):
        return "a number that is not whole"
    if not max(memory.block, memory.since) <= last:
        return f"block {max(memory.block, memory.since)} of a window after that of block {last}"
    if not all(0 <= n < 2**53 for n in (memory.faced, *(e.rank - 1 for e in memory.evidence))):
        return f"ranks {sorted(e.rank for e in memory.evidence)[:8]} of {memory.faced} challengers"
    if not all(0 <= s.count < 2**53 and s.total**2 <= s.count * s.squares <= (s.count * UNIT) ** 2 for s in sums):
        return "sums of no log ratios"
    return ""


def contests_of(record: RoundRecord) -> dict[str, Contest]:
    return {name: contest_of(name, record.competitions[name]) for name in sorted(record.competitions)}


def hall_of_fame_of(record: RoundRecord) -> HallOfFame:
    return validate(HallOfFame, "recorded hall of fame", _mapping(record.hall_of_fame, "hall of fame"))


def _mapping(value: Json, where: str) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise Rejected(Reason.RECORD, str(value)[:80], "an object", where)
    return value


def _without_infinities(duel: Any) -> Json:
    fields = asdict(duel) if is_dataclass(duel) and not isinstance(duel, type) else dict(duel)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}


# --- the same rules ---------------------------------------------------------------------------------------------------


def recompute(record: RoundRecord) -> Decision:
    """Scores and weights from the record alone. Raises Rejected(RECORD) for one that no round could have left."""
    contests, hall = contests_of(record), hall_of_fame_of(record)
    try:
        return decide(contests, hall, record.last_weights, record.head.block, record.registered)
    except ValueError as error:
        raise Rejected(Reason.RECORD, str(error)[:200], "a record that can be decided on") from None


def compare(record: RoundRecord, decision: Decision) -> Difference | None:
    """The first thing that a decision has otherwise than the record, stops before scores before weights; None: the same bits."""
    for name, kept in sorted(record.competitions.items()):
        wrongly = _wrong_stop(name, kept)
        if wrongly:
            return wrongly
        scored = decision.scored[name]
        now = replace(
            kept,
            scores=tuple(scored.scores),
            memory_after=scored.memory.to_json(),
            duels=tuple(_without_infinities(duel) for duel in scored.duels),
        )
        recorded, again = ({s.hotkey: asdict(s) for s in each.scores} for each in (kept, now))
        found = (
            first_difference(recorded, again, f"{name}: scores")
            or first_difference(kept.duels, now.duels, f"{name}: duels")
            or first_difference(kept.memory_after, now.memory_after, f"{name}: memory after")
        )
        if found:
            return found
    return first_difference(_as_json(record.weights), _as_json(decision.weights), "weights")


def _wrong_stop(name: str, kept: CompetitionRecord) -> Difference | None:
    """A model whose measuring ended where the rule does not end it. To measure further than one must is no harm."""
    stopped = [m for m in kept.models if m.stopped]
    bar = _bar(contest_of(name, kept)) if stopped else None
    for m in stopped:
        stop = hopeless(bar, m.hotkey, m.losses, kept.losses[bar.holder]) if bar and m.hotkey != bar.holder else None
        if stop is None or len(m.losses) not in portions(len(kept.samples)):
            return Difference(f"{name}: {m.hotkey}", m.stopped, f"no reason to stop after {len(m.losses):,} samples")
    return None


def _bar(contest: Contest) -> Bar | None:
    """What its challengers were held against; None when nobody may have been stopped."""
    rule = contest.competition.scoring
    if not isinstance(rule, Champion):
        return None
    bar = bar_of(rule, contest.memory, contest.entries, contest.window.seed.block)
    most = max(map(len, contest.losses.values()), default=0)
    return bar if bar and len(contest.losses.get(bar.holder, ())) == most else None


def _as_json(weights: Mapping[int, Weights]) -> Json:
    return {str(m): {"block": one.block, "by_hotkey": dict(one.by_hotkey)} for m, one in weights.items()}


# --- other rules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a record would have come to under other rules."""

    decision: Decision
    refused: Mapping[str, Rejected]
    """By hotkey: see `Changed`."""


def what_if(record: RoundRecord, change: Change, hall_of_fame: HallOfFame | None = None) -> Alternative:
    """Scores and weights under other competitions.

    A rule's memory of earlier rounds is kept unless the competition changes its rule: a new rule starts with none. The
    samples stay the recorded ones, whatever the other competition says of samples. Who was stopped then was not measured on
    all of them: a rule that compares all samples cannot score it.
    """
    contests: dict[str, Contest] = {}
    refused: dict[str, Rejected] = {}
    for name, kept in sorted(record.competitions.items()):
        recorded = contest_of(name, kept)
        asked = change(kept, recorded.competition)
        if asked is not None:
            asked = _comparable(kept, asked)
            contests[name] = changed(recorded, asked)
            refused.update(asked.refused)
    hall = hall_of_fame if hall_of_fame is not None else hall_of_fame_of(record)
    decision = decide(contests, hall, record.last_weights, record.head.block, record.registered)
    return Alternative(decision, refused)


def _comparable(kept: CompetitionRecord, asked: Changed) -> Changed:
    """Without those who were stopped, where the rule asked for cannot score them."""
    rule = asked.competition.scoring
    if isinstance(rule, Champion):
        return asked
    limit = f"losses on all {len(kept.samples):,}, which {rule.rule} compares"
    counts = {m.hotkey: f"losses on {len(m.losses):,} samples" for m in kept.models if m.stopped}
    stopped = {hotkey: Rejected(Reason.RECORD, count, limit, hotkey) for hotkey, count in counts.items()}
    return replace(asked, refused={**stopped, **asked.refused})


def changed(recorded: Contest, asked: Changed) -> Contest:
    """The contest under another competition."""
    losses = {hotkey: row for hotkey, row in recorded.losses.items() if hotkey not in asked.refused}
    same_rule = asked.competition.scoring.rule == recorded.competition.scoring.rule
    memory = recorded.memory if same_rule else Memory.empty()
    entries = {hotkey: entry for hotkey, entry in recorded.entries.items() if hotkey not in asked.refused}
    return replace(recorded, competition=asked.competition, losses=losses, entries=entries, memory=memory)


def from_files(files: Mapping[str, CompetitionFile]) -> Change:
    """What these files ask for at the window's seed block; a competition that has no file is not in force."""

    def change(kept: CompetitionRecord, recorded: Competition) -> Changed | None:
        file = files.get(recorded.name)
        return None if file is None else from_file(file, kept)

    return change


def from_file(file: CompetitionFile, kept: CompetitionRecord) -> Changed:
    block = kept.window.seed.block
    found = {
        m.hotkey: violations(rules_for(file, m.outcome.block, block), m.facts)
        for m in kept.models
        if m.entry is not None and m.facts is not None
    }
    return Changed(in_force(file, block), {hotkey: broken[0] for hotkey, broken in found.items() if broken})


def other_rule(rule: str, change: Change | None = None) -> Change:
    """The recorded competitions, or those of `change`, under another scoring rule; whom they allow stays the same."""

    def under_rule(kept: CompetitionRecord, recorded: Competition) -> Changed | None:
        asked = Changed(recorded) if change is None else change(kept, recorded)
        return asked and replace(asked, competition=with_rule(asked.competition, rule))

    return under_rule


def with_rule(competition: Competition, rule: str) -> Competition:
    """The same competition under another scoring rule: with the advantage of its own one, where both have one of that
    kind, and else with the rule's defaults. Raises Rejected(COMPETITION_FILE) for a rule that is not known."""
    fields = competition.model_dump(mode="json", exclude={"name"})
    old = fields["scoring"]
    scoring: dict[str, Any] = {"rule": rule}
    if rule == old["rule"]:
        scoring = old
    elif "advantage" in old and rule != "pairwise_epsilon":
        scoring["advantage"] = {key: old["advantage"][key] for key in ("initial", "decay_per_epoch", "blocks_per_epoch")}
    return competition_of(f"{competition.name} with --rule {rule}", competition.name, {**fields, "scoring": scoring})


@dataclass(frozen=True, slots=True)
class Simulated:
    """One recorded round, as it was and as it would have been."""

    block: int
    then: Mapping[str, float]
    """Weights by hotkey as recorded, of the mechanism that pays the competition."""
    instead: Mapping[str, float]
    refused: Mapping[str, Rejected]


@dataclass(frozen=True, slots=True)
class _Left:
    """What a simulated round leaves to the next one."""

    block: int
    weights: Mapping[int, Weights]
    window: int
    before: Memory
    after: Memory

    def memory(self, window: int) -> Memory:
        """A window that is judged a second time starts from where it started: no sample counts twice."""
        return self.before if window == self.window else self.after


def simulate(records: Iterable[RoundRecord], file: CompetitionFile) -> Iterator[Simulated]:
    """What a new file for a competition would have changed, round by round.

    Records are of one validator, oldest first (Rejected(RECORD) otherwise). Where one round follows on the one before it,
    memory and last weights are those that the new file would have left; after a gap they are the recorded ones. Models
    that were refused then were not measured, so they stay out.
    """
    left: _Left | None = None
    name = file.name
    for record in records:
        block = record.head.block
        if left is not None and block <= left.block:
            raise Rejected(Reason.RECORD, f"block {block} after {left.block}", "records oldest first")
        if name not in record.competitions:
            known = ", ".join(sorted(record.competitions))
            raise Rejected(Reason.RECORD, f"no {name} in the round of block {block}", f"one of {known}")
        if left is not None and {last.block for last in record.last_weights.values()} != {left.block}:
            left = None
        kept = record.competitions[name]
        contests = contests_of(record)
        asked = _comparable(kept, from_file(file, kept))
        contest = changed(contests[name], asked)
        if left is not None:
            contest = replace(contest, memory=left.memory(kept.window.index))
        last = left.weights if left is not None else record.last_weights
        decision = decide({**contests, name: contest}, hall_of_fame_of(record), last, block, record.registered)
        left = _Left(block, decision.weights, kept.window.index, contest.memory, decision.scored[name].memory)
        instead = decision.weights[contest.competition.mechanism].by_hotkey
        yield Simulated(block, record.weights_of(name), instead, asked.refused)


# --- by hand ----------------------------------------------------------------------------------------------------------

_BY_HAND: dict[str, type | tuple[type, ...]] = {
    "losses": dict, "commit_blocks": dict, "block": int, "competition": (str, dict)
}  # fmt: skip
_BY_HAND_TOO: dict[str, type | tuple[type, ...]] = {"content_ids": dict, "hash": str}
_NO_HALL = HallOfFame(max_fraction=0.0, decay_per_epoch=0.995, blocks_per_epoch=361, entries=())


def is_by_hand(data: Json) -> bool:
    """A record of a validator names its schema."""
    return isinstance(data, dict) and "schema" not in data


def by_hand(data: Json, look_up: Callable[[str, int], Competition], where: str) -> Contest:
    """The contest of a record by hand; `look_up` finds a competition by its name as it is in force at a block. Raises
    Rejected(RECORD), naming the field."""
    known = {**_BY_HAND, **_BY_HAND_TOO}
    for key, value in _mapping(data, where).items():
        kind = known.get(key)
        if kind is None or not isinstance(value, kind) or isinstance(value, bool):
            raise Rejected(Reason.RECORD, f"{key[:40]}: {str(value)[:80]}", f"fields {', '.join(known)}; see --help", where)
    if missing := [key for key in _BY_HAND if key not in data]:
        raise Rejected(Reason.RECORD, "nothing", "a value", f"{where}: {missing[0]}")
    named, block = data["competition"], data["block"]
    if isinstance(named, str):
        competition = look_up(named, block)
    else:
        name = str(named.get("name", "by-hand"))
        fields = {key: value for key, value in named.items() if key != "name"}
        competition = competition_of(f"{where}: competition", name, fields)
    seed = Head(block, data.get("hash", "0x" + 64 * "0"))
    if not re.fullmatch("0x[0-9a-f]{64}", seed.hash):
        raise Rejected(Reason.RECORD, seed.hash[:80], "0x and 64 hex digits", f"{where}: hash")
    losses = {hotkey: _row(row, f"{where}: losses.{hotkey}") for hotkey, row in data["losses"].items()}
    lengths = {hotkey: len(row) for hotkey, row in losses.items()}
    if len(set(lengths.values())) > 1:
        raise Rejected(Reason.RECORD, f"rows of {sorted(set(lengths.values()))}", "rows of one length", f"{where}: losses")
    entries = {hotkey: _entry(hotkey, data, where) for hotkey in losses}
    window = Window(competition.name, block // competition.samples.window_blocks, seed)
    return Contest(competition, window, losses, entries, Memory.empty())


def decide_by_hand(contest: Contest) -> Decision:
    """A first round, with nobody else and nothing before it. Raises Rejected(RECORD) for fewer samples than make a group."""
    rule, count = contest.competition.scoring, max(map(len, contest.losses.values()), default=0)
    if isinstance(rule, OldestHolder) and count < rule.group:
        raise Rejected(Reason.RECORD, f"{count} samples", f"at least {rule.group}, a group of rule oldest_holder", "losses")
    return decide({contest.competition.name: contest}, _NO_HALL, {}, contest.window.seed.block, sorted(contest.losses))


def _entry(hotkey: str, data: Mapping[str, Json], where: str) -> Entry:
    block = data["commit_blocks"].get(hotkey)
    if type(block) is not int:
        raise Rejected(Reason.RECORD, block, "a whole number", f"{where}: commit_blocks.{hotkey}")
    content = data.get("content_ids", {}).get(hotkey, f"content of {hotkey}")
    return Entry(str(content), block)


def _row(row: Json, where: str) -> tuple[float, ...]:
    right = isinstance(row, list) and all(x is None or (type(x) in (int, float) and x >= 0) for x in row)
    if not right:
        raise Rejected(Reason.RECORD, str(row)[:80], "a list of nats, 0 or more, or null", where)
    return tuple(math.inf if x is None else float(x) for x in row)
