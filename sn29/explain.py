"""Why a hotkey got the weight that it got: round by round, in plain words, from round records alone.

What would change it is not estimated but tried: the recorded round is scored again by the competition's own rule, with
losses that are lower, or at a later block. So the answers hold for every rule, and they are exactly what the validator
would have decided.

    improvement   the smallest r for which a new model, committed at the window's seed block, whose loss on every sample is
                  (1 - r) times this one's, would have got the largest weight of the competition
    decay         the first block at which today's model would get it with the same losses, because the advantage of
                  earlier models has shrunk by then; blocks become days at 12 s a block
    evidence      the first window in which it would get it if every window to come gave these losses again, under a rule
                  that adds up evidence: there a model that is better, and not yet shown to be, needs no change

"Lost by how much" is the mean over the samples of ln(loss / winner's loss), with an interval: the rule's own confidence
sequence where the rule compares in pairs, else the normal approximation, mean +- 1.96 standard errors (95 %).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

from sn29.errors import Reason
from sn29.records import Entry, Outcome, Score
from sn29.replay import contest_of
from sn29.round_record import CompetitionRecord, Json, RoundRecord
from sn29.rules.decision import Contest, score_contest
from sn29.rules.scoring import Scored
from sn29.rules.weights import KEEP

BLOCK_SECONDS = 12
HORIZON_BLOCKS = 10 * 365 * 86_400 // BLOCK_SECONDS
"""Ten years: an advantage that halves every week is 1e-157 of itself by then."""
LIKE_THIS = 600
"""Windows to come that are tried: 30 days of 360 blocks."""
MOST_IMPROVEMENT = 0.5
"""Nobody halves the loss of a model that competes; what even that does not win, no improvement of all samples wins."""


DUEL, NORMAL = "anytime-valid confidence sequence", "95 %, normal approximation"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against another one, sample by sample."""

    other: str
    """The other one's hotkey."""
    num_samples: int
    """Samples that both were scored on."""
    mean: float
    """Mean of ln(this one's loss / the other's): above 0 when this one is worse."""
    low: float
    high: float
    """Where that mean is, by the interval of `kind`."""
    kind: str
    """DUEL: by the rule's own confidence sequence, over all windows since the reign began. NORMAL: over this window."""
    needed: float | None = None
    """`high` must get below minus this to win; None when the rule does not say."""
    near_copy: bool = False
    """Too much alike to be two models: the place belongs to the earlier one."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What one round says about one commitment."""

    block: int
    outcome: Outcome
    num_samples: int = 0
    """Samples that it was measured on."""
    stopped: str = ""
    """Why those are not all samples of the window; empty: they are."""
    unscored: tuple[str, ...] = ()
    """Why samples could not be scored, one reason for each of them."""
    nats_per_sample: float = math.nan
    score: Score | None = None
    place: int = 0
    """Among all that were evaluated: 1 is the largest weight."""
    num_models: int = 0
    weight: float = 0.0
    """Share of all weights of the competition's mechanism, 0..1, after the moving average."""
    mechanism: int = 0
    before: float = 0.0
    """That share in the weights of the round before, of which a part is kept."""
    towards: float = 0.0
    """The share that `weight` comes to when rounds go on to decide what this one did."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """What separates an evaluated model from the competition's largest weight."""

    holder: str
    lost_to: Comparison | None
    """None when it is the holder itself, or when no sample was scored by both."""
    improvement: float | None
    """Smallest improvement of all losses, 0..1, with which a new model would win; None when none up to 50 % would, for a near
    copy, which stays one however it is scaled, and for who was stopped, whose other losses nobody knows."""
    wins_at: int | None
    """Block from which the shrunken advantage alone is enough; None: never."""
    why_never: str = ""
    wins_by_evidence: int | None = None
    """Under a rule that adds up evidence: block of the window in which it wins if every window to come looks like this
    one; None: not within LIKE_THIS windows, or the rule remembers nothing."""
    stopped: str = ""
    """Why it was measured on some of the samples only; empty: it was on all of them."""


# --- passages ---------------------------------------------------------------------------------------------------------


def passages(records: Iterable[RoundRecord], hotkey: str) -> Iterator[Passage]:
    """Everything that rounds say about a hotkey, in their order."""
    for record in records:
        for outcome in record.outcomes_of(hotkey):
            yield _passage(record, outcome)


def _passage(record: RoundRecord, outcome: Outcome) -> Passage:
    block, weight = record.head.block, record.weights_of(outcome.competition).get(outcome.hotkey, 0.0)
    before, aim = _moved(record, outcome)
    kept = record.competitions.get(outcome.competition)
    mechanism = kept.mechanism if kept else 0
    model = kept.model(outcome.hotkey) if kept else None
    if kept is None or model is None or not model.evaluated:
        return Passage(block, outcome, weight=weight, mechanism=mechanism, before=before, towards=aim)
    scored = [x for x in model.losses if math.isfinite(x)]
    order = [s.hotkey for s in _best_first(kept.scores)]
    return Passage(
        block, outcome, len(model.losses), model.stopped, model.unscored, math.fsum(scored) / len(scored) if scored else math.inf,
        next((s for s in kept.scores if s.hotkey == outcome.hotkey), None),
        order.index(outcome.hotkey) + 1 if outcome.hotkey in order else 0, len(order), weight, mechanism, before, aim,
    )  # fmt: skip


def _moved(record: RoundRecord, outcome: Outcome) -> tuple[float, float]:
    """See `Passage`: before, towards."""
    kept = record.competitions.get(outcome.competition)
    mechanism = kept.mechanism if kept else 0
    old = record.last_weights.get(mechanism)
    before = old.by_hotkey.get(outcome.hotkey, 0.0) if old else 0.0
    return before, towards(record, mechanism).get(outcome.hotkey, 0.0)


def towards(record: RoundRecord, mechanism: int = 0) -> dict[str, float]:
    """Hotkey -> share of all weights, 0..1, that the round's own result would give it: a round keeps KEEP of the weights that
    the round before decided, of hotkeys that are still registered (`rules.weights.combine`), and this undoes that."""
    now, old = record.weights.get(mechanism), record.last_weights.get(mechanism)
    if now is None or old is None or now.by_hotkey == old.by_hotkey:
        return dict(now.by_hotkey) if now else {}
    left = {hotkey: weight for hotkey, weight in old.by_hotkey.items() if hotkey in record.registered}
    total = math.fsum(left.values())
    if total <= 0:
        return dict(now.by_hotkey)
    aims = {h: (now.by_hotkey.get(h, 0.0) - KEEP * left.get(h, 0.0) / total) / (1 - KEEP) for h in {*now.by_hotkey, *left}}
    return {hotkey: aim for hotkey, aim in sorted(aims.items()) if aim > 1e-12}


def _best_first(scores: Iterable[Score]) -> list[Score]:
    return sorted(scores, key=lambda s: (-s.weight, -s.win_rate, s.hotkey))


# --- what would win ---------------------------------------------------------------------------------------------------


def prospect(name: str, kept: CompetitionRecord, hotkey: str) -> Prospect | None:
    """For a model that was evaluated in a competition in which somebody got weight; else None."""
    if hotkey not in kept.losses:
        return None
    return prospect_in(contest_of(name, kept), hotkey, next(m.stopped for m in kept.models if m.hotkey == hotkey))


def prospect_in(contest: Contest, hotkey: str, stopped: str = "") -> Prospect | None:
    """The same for a contest, recorded or made up; None where nobody gets weight. `stopped` as in `Prospect`."""
    now = score_contest(contest)
    best = _best_first(now.scores)
    if not best or best[0].weight <= 0:
        return None
    holder = best[0].hotkey
    if holder == hotkey:
        return Prospect(holder, None, None, None)
    lost_to = compared(now, contest, hotkey, holder)
    wins_at = first_win_by_decay(contest, hotkey)
    why = "" if wins_at is not None else _why_never(contest, hotkey, holder)
    better = lost_to is not None and lost_to.kind == DUEL and lost_to.mean < 0 and not lost_to.near_copy
    by_evidence = first_win_by_evidence(contest, hotkey) if better else None
    copies = lost_to is not None and lost_to.near_copy
    improvement = None if copies or stopped else least_improvement(contest, hotkey)
    return Prospect(holder, lost_to, improvement, wins_at, why, by_evidence, stopped)


def compared(scored: Scored, contest: Contest, hotkey: str, other: str) -> Comparison | None:
    """A model against another one: as the rule found it where it compares in pairs, else over the contest's losses."""
    return _duel(scored, hotkey, other) or _normal(contest.losses, hotkey, other)


def least_improvement(contest: Contest, hotkey: str) -> float | None:
    """See `Prospect.improvement`; found by halving to within 0.001 of itself or 1e-7, and rounded up."""
    now = contest.window.seed.block
    entry = Entry(f"{contest.entries[hotkey].content_id} improved", now)

    def wins(part: float) -> bool:
        better = tuple(loss * (1 - part) for loss in contest.losses[hotkey])
        tried = replace(contest, losses={**contest.losses, hotkey: better}, entries={**contest.entries, hotkey: entry})
        return _wins(score_contest(tried), hotkey)

    if not wins(MOST_IMPROVEMENT):
        return None
    low, high = 0.0, MOST_IMPROVEMENT
    while high - low > max(1e-7, high * 1e-3):
        middle = (low + high) / 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def first_win_by_decay(contest: Contest, hotkey: str) -> int | None:
    """See `Prospect.wins_at`; the advantage only shrinks, so the first block is found by halving."""
    now = contest.window.seed.block

    def wins(block: int) -> bool:
        return _wins(score_contest(contest, block), hotkey)

    low, high = now, now + HORIZON_BLOCKS
    if not wins(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def first_win_by_evidence(contest: Contest, hotkey: str, windows: int = LIKE_THIS) -> int | None:
    """See `Prospect.wins_by_evidence`; None: not within so many windows."""
    start, length = contest.window.seed.block, contest.competition.samples.window_blocks
    for block in range(start, start + windows * length + 1, length):
        scored = score_contest(contest, block)
        if _wins(scored, hotkey):
            return block
        contest = replace(contest, memory=scored.memory)
    return None


def _wins(scored: Scored, hotkey: str) -> bool:
    mine = next((s.weight for s in scored.scores if s.hotkey == hotkey), 0.0)
    return mine > max((s.weight for s in scored.scores if s.hotkey != hotkey), default=0.0)


def _why_never(contest: Contest, hotkey: str, holder: str) -> str:
    end = score_contest(contest, contest.window.seed.block + HORIZON_BLOCKS)
    duel = _duel(end, hotkey, holder)
    if duel is not None and duel.near_copy:
        return "it is a near copy of an earlier model, and the place belongs to the earlier commitment whatever its age"
    if duel is not None and duel.needed is not None:
        shown = f"shown to be better by {percent(-duel.high)} only" if duel.high < 0 else "not shown to be better at all"
        floor = f"the holder's advantage never falls below its floor, {percent(duel.needed)}"
        return f"{floor}, and by the samples so far this model is {shown}"
    best, mine = _best_first(end.scores)[0], next(s for s in end.scores if s.hotkey == hotkey)
    return f"even with the advantage gone its win rate would be {mine.win_rate:.3f}, that of {best.hotkey} {best.win_rate:.3f}"


def _duel(scored: Scored, hotkey: str, holder: str) -> Comparison | None:
    """What the rule itself found: against the holder, against whom it is a near copy of, or when it lost the crown."""
    for d in scored.duels:
        if d.challenger == hotkey and (d.near_copy or d.holder == holder):
            return Comparison(d.holder, d.num_samples, d.mean_log_ratio, d.low, d.high, DUEL, d.needed, d.near_copy)
    for d in scored.duels:
        if (d.challenger, d.holder) == (holder, hotkey) and d.won:
            return Comparison(d.challenger, d.num_samples, -d.mean_log_ratio, -d.high, -d.low, DUEL)
    return None


def _normal(losses: Mapping[str, Sequence[float]], hotkey: str, holder: str) -> Comparison | None:
    pairs = zip(losses[hotkey], losses.get(holder, ()), strict=False)  # who was stopped has fewer
    ratios = [math.log(a / b) for a, b in pairs if 0 < a < math.inf and 0 < b < math.inf]
    if len(ratios) < 2:
        return None
    mean = math.fsum(ratios) / len(ratios)
    error = math.sqrt(math.fsum((r - mean) ** 2 for r in ratios) / (len(ratios) - 1) / len(ratios))
    return Comparison(holder, len(ratios), mean, mean - 1.96 * error, mean + 1.96 * error, NORMAL)


# --- whom they name ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A hotkey of some rounds, as `sn29 explain` lists it."""

    hotkey: str
    repositories: frozenset[str]
    """Every namespace/name that its commitments named."""
    newest: Outcome

    @property
    def name(self) -> str:
        return f"{self.hotkey}  {self.newest.model.partition('@')[0] or '(no repository)'}"

    def __str__(self) -> str:
        o = self.newest
        reason = next((r for r in Reason if r.code == o.reason), None)
        became = {"rejected": f"refused: {reason.sentence if reason else o.reason}"}.get(o.status, o.status)
        return f"{self.name:<70}  {o.competition or '-'}: {became}"


def everybody(records: Iterable[RoundRecord]) -> list[Seen]:
    """Whom these rounds name, by repository."""
    repositories: dict[str, set[str]] = {}
    newest: dict[str, Outcome] = {}
    for record in records:
        entered = (m.outcome for _, c in sorted(record.competitions.items()) for m in c.models)
        for outcome in (*record.no_competition, *entered):
            newest[outcome.hotkey] = outcome
            named = outcome.model.partition("@")[0]
            repositories.setdefault(outcome.hotkey, set()).update({named} - {""})
    found = (Seen(hotkey, frozenset(repositories[hotkey]), outcome) for hotkey, outcome in newest.items())
    return sorted(found, key=lambda one: (one.newest.model, one.hotkey))


def meant(word: str, seen: Iterable[Seen]) -> list[Seen]:
    """Who may be meant by a hotkey, its beginning, its beginning and end as pages show it (5CQG...StPu), or the owner or the
    whole name of a repository."""
    start, _, end = word.replace("\u2026", "...").partition("...")
    found = []
    for one in seen:
        owners = {name.partition("/")[0] for name in one.repositories}
        if word in (owners | one.repositories) or (start and one.hotkey.startswith(start) and one.hotkey.endswith(end)):
            found.append(one)
    return [one for one in found if one.hotkey == word] or found


_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def is_address(word: str) -> bool:
    """Whether it is an ss58 address of 32 bytes: one wrong letter, and its checksum is another one."""
    if not re.fullmatch(f"[{_BASE58}]{{46,48}}", word):
        return False
    number = 0
    for letter in word:
        number = number * 58 + _BASE58.index(letter)
    data = number.to_bytes(36, "big").lstrip(b"\0")
    return len(data) == 35 and hashlib.blake2b(b"SS58PRE" + data[:-2]).digest()[:2] == data[-2:]


# --- in words ---------------------------------------------------------------------------------------------------------


def explain(records: Iterable[RoundRecord], hotkey: str, written: datetime | None = None) -> tuple[list[str], Json]:
    """The timeline of a hotkey as lines and as JSON; `written` is when the last record was written, for dates to count from."""
    lines: list[str] = []
    data: list[Json] = []
    newest: RoundRecord | None = None
    seen: list[Passage] = []
    for record in records:
        found = list(passages([record], hotkey))
        seen += found
        newest = record if found else newest
    for _, same in groupby(seen, key=same_story):
        story = list(same)
        lines += told(story)
        data += [_passage_json(p) for p in story]
    if newest is None:
        return [f"{hotkey}: no round here says anything about it: no commitment of it was seen"], {"hotkey": hotkey, "rounds": []}
    prospects: dict[str, Json] = {}
    for name, kept in sorted(newest.competitions.items()):
        found_prospect = prospect(name, kept, hotkey)
        if found_prospect is not None:
            lines += told_prospect(newest, name, kept, found_prospect, written)
            prospects[name] = _finite(asdict(found_prospect))
    return lines, {"hotkey": hotkey, "rounds": data, "prospects": prospects, "at_block": newest.head.block}


def same_story(p: Passage) -> tuple[object, ...]:
    """Refusals of one commitment for one reason are told once; an evaluation is news every time."""
    return p.outcome if p.outcome.status != "evaluated" else (p.outcome, p.block)  # type: ignore[return-value]


def told(story: Sequence[Passage]) -> list[str]:
    p, o = story[0], story[0].outcome
    where = o.competition or "no competition"
    head = f"round of block {p.block:,}, {where}: the commitment of block {o.block:,}"
    lines = [f"{head}{f', {o.model}' if o.model else ''}"]
    if o.status == "evaluated":
        lines += _told_evaluated(p)
    elif o.status == "rejected":
        reason = next((r for r in Reason if r.code == o.reason), None)
        values = o.limit if reason is Reason.COPY else f"got {o.got}, rule {o.limit}"  # who has it says more than a hash of it
        lines.append(f"  refused: {reason.sentence if reason else o.reason}: {values}")
        lines += [f"  what to do: {reason.advice}"] if reason else []
    else:
        lines.append(f"  {o.status}: {o.detail or o.reason}")
    if len(story) > 1:
        more = f"{len(story) - 1} more rounds, up to the one" if len(story) > 2 else "1 more round, the one"
        lines.append(f"  the same in {more} of block {story[-1].block:,}")
    return lines


def _told_evaluated(p: Passage) -> list[str]:
    lines = [f"  evaluated on {p.num_samples:,} samples, {p.nats_per_sample:.2f} nats a sample"]
    lines += [f"  {p.stopped}"] if p.stopped else []
    if p.unscored:
        reasons = ", ".join(f"{p.unscored.count(r)} {r or 'cannot be scored'}" for r in dict.fromkeys(p.unscored))
        lines.append(f"  {len(p.unscored):,} of them could not be scored: {reasons}")
    if p.score is not None:
        s = p.score
        lines.append(
            f"  place {p.place} of {p.num_models}: win rate {s.win_rate:.3f}, {s.weight:.2%} of the competition's reward; "
            f"weight after this round {p.weight:.2%}{f' of mechanism {p.mechanism}' if p.mechanism else ''}"
        )
        if abs(p.towards - p.weight) >= 5e-5:
            half = f"a round moves weights {1 - KEEP:.0%} of the way"
            lines.append(f"  {half}: from {p.before:.2%} to {p.weight:.2%} now, towards {p.towards:.2%} of all weights")
    return lines


def told_prospect(record: RoundRecord, name: str, kept: CompetitionRecord, p: Prospect, written: datetime | None) -> list[str]:
    lines = [f"what the round of block {record.head.block:,} means for {name}"]
    if p.lost_to is None and p.improvement is None and p.wins_at is None and not p.why_never:
        advantage = next((1 - s.advantage for s in kept.scores if s.hotkey == p.holder), None)  # none: recorded otherwise
        left = f"; what is left of its advantage is {percent(advantage)} of its loss" if advantage is not None else ""
        return [*lines, f"  it has the largest weight{left}"]
    if p.lost_to is not None and p.lost_to.near_copy:
        on = f"on {p.lost_to.num_samples:,} samples"
        lines.append(f"  near copy of {p.lost_to.other}'s earlier model {on}: the two count as one model")
        lines.append("  to win it must differ from sample to sample: what scales all losses alike leaves it a copy")
    elif p.lost_to is not None:
        c = p.lost_to
        worse = c.mean >= 0
        way = "its losses are" if worse else "although its losses are"
        than = f"{percent(abs(c.mean))} {'higher' if worse else 'lower'}"
        low, high = (c.low, c.high) if worse else (-c.high, -c.low)
        between = f"{percent(low)} to {percent(high)}, {c.kind}"
        lines.append(f"  lost to {c.other}: on {c.num_samples:,} samples {way} {than} ({between})")
        if c.needed is not None:
            lines.append(
                f"  to win they must be shown to be lower by {percent(c.needed)}, what is left of the holder's advantage"
            )
    if p.improvement is not None:
        lines.append(
            f"  would win today: a new model whose losses are {percent(p.improvement)} lower than this one's on every sample"
        )
    elif p.stopped:
        lines.append("  what would win today is not known: it was not measured on all samples")
    elif p.lost_to is None or not p.lost_to.near_copy:
        lines.append(f"  no improvement of all losses up to {MOST_IMPROVEMENT:.0%} would win today")
    if p.wins_by_evidence is not None:
        after = p.wins_by_evidence - kept.window.seed.block
        like = f"if every window to come looks like this one it wins at block {p.wins_by_evidence:,}"
        lines.append(f"  {like}{_when(after, written)}")
    if p.wins_at is None:
        lines.append(f"  by decay of the advantage alone it never wins: {p.why_never}")
    else:
        after = p.wins_at - kept.window.seed.block
        lines.append(f"  by decay of the advantage alone it wins at block {p.wins_at:,}{_when(after, written)}")
    return lines


def _when(blocks: int, written: datetime | None) -> str:
    return when(blocks, written, "{} days after this window's seed block", ", counted from when the record was written")


def when(blocks: int, since: datetime | None, days: str, counted: str = "") -> str:
    """How long so many blocks take, in the words of `days`, and the date; none without `since`, or in a century."""
    span = timedelta(seconds=blocks * BLOCK_SECONDS)
    text = f", {days.format(f'{span.total_seconds() / 86_400:.1f}')} at {BLOCK_SECONDS} s a block"
    if since is None or span > timedelta(days=36_500):
        return text
    return f"{text}: about {(since + span).astimezone(UTC):%Y-%m-%d %H:%M} UTC{counted}"


def percent(value: float) -> str:
    """Two significant digits, never as a power of ten: 0.36 %, 1.2 %, 0.00012 %; `unbounded` for an infinite end."""
    if not math.isfinite(value):
        return "unbounded"
    percent = value * 100
    digits = 2 if percent == 0 else max(0, 1 - math.floor(math.log10(abs(percent))))
    return f"{percent:.{digits}f} %"


def _passage_json(p: Passage) -> Json:
    return _finite(asdict(p))


def _finite(value: Any) -> Json:
    """Infinity and NaN as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
