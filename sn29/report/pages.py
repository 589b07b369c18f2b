"""What each page says: now, one competition, one miner, one round. A `Snapshot` in, HTML of the page's main part out.

Headings begin at h1. All that miners wrote is hostile and goes through `text`, which escapes it. Addresses come from `Links`: the
same pages are served one by one, and written into one file.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from sn29 import explain
from sn29.changeover import differences
from sn29.errors import Reason, Sn29Error
from sn29.records import Outcome
from sn29.replay import contest_of
from sn29.report import markup, page, pictures
from sn29.report.markup import text
from sn29.report.page import Cast, Standing
from sn29.report.pictures import Line
from sn29.report.snapshot import Published, Round, Snapshot, lasting
from sn29.report.style import GREY
from sn29.round_record import CompetitionRecord, address
from sn29.rules.competition import FixedTokenizer, HubDataset
from sn29.rules.decision import score_contest
from sn29.rules.schedule import CompetitionFile, in_force
from sn29.telemetry import STOPPED

Links = Callable[[str, str], str]
"""(kind of page, its name) -> where it is; kinds: now, competition, miner, round."""

MAX_LINES = 6
"""Models in the picture of weights over time."""
NEWEST = 12
"""Rounds in the list of the first page."""
MANY_MINERS = 40
"""More of them are folded away on the first page."""
CHANGES = 5
"""Coming changes of a competition that are told."""
_ORDER = {"evaluated": 0, "waiting": 1, "unavailable": 2, "rejected": 3}
_STAGES = {
    "waiting": "Waiting for the next window",
    "training": "Training",
    "reading": "Reading chain and text",
    "inspecting": "Looking at models’ metadata",
    "fetching": "Downloading a model",
    "measuring": "Measuring losses",
    "deciding": "Deciding weights",
    "publishing": "Setting weights on chain",
    "stopped": "Stopped",
}
_SHORT = {"validator": ("waiting", "reading", "inspecting", "fetching", "measuring", "deciding", "publishing"),
          "miner": ("waiting", "training", "measuring", "publishing")}  # fmt: skip


def cast_of(snapshot: Snapshot) -> Cast:
    """Everybody's colour and short name: a hue for whoever was evaluated, in the order in which they first were."""
    judged = [kept for one in snapshot.rounds for _, kept in sorted(one.record.competitions.items())]
    evaluated = [m.hotkey for kept in judged for m in kept.models if m.evaluated]
    hues = {hotkey: i % GREY for i, hotkey in enumerate(dict.fromkeys(evaluated))}
    paid = [h for one in snapshot.rounds for w in one.record.weights.values() for h in w.by_hotkey]
    chain = [h for p in (snapshot.facts.published.values() if snapshot.facts else ()) if p.stands for h in p.stands[1].by_hotkey]
    everybody = dict.fromkeys([*hues, *snapshot.hotkeys, *paid, *chain])
    labels = {hotkey: hotkey if len(hotkey) <= 13 else f"{hotkey[:4]}…{hotkey[-4:]}" for hotkey in everybody}
    return Cast(labels, {hotkey: hues.get(hotkey, GREY) for hotkey in everybody})


# --- small things -----------------------------------------------------------------------------------------------------


def when(seconds: float) -> str:
    """A time in UTC, as an element."""
    at = datetime.fromtimestamp(min(max(seconds, 0.0), 4e9), UTC)
    return f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M} UTC</time>'


def _ago(snapshot: Snapshot, seconds: float | None) -> str:
    return "" if seconds is None else f"{lasting(snapshot.at - seconds)} ago"


def _in(snapshot: Snapshot, block: int) -> str:
    """`in 40 min`, of a block to come."""
    at = snapshot.time_of(block)
    return "" if at is None else f"in {lasting(at - snapshot.at)}" if at > snapshot.at else "due now"


def _who(cast: Cast, links: Links, hotkey: str) -> str:
    """A miner's short name, leading to its page."""
    return f'<a href="{text(links("miner", hotkey))}">{cast.html(hotkey)}</a>' if hotkey in cast.labels else text(hotkey)


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are (HTML), one below the other; empty ones are left out."""
    return f'<dl class="facts">{"".join(f"<dt>{text(k)}</dt><dd>{v}</dd>" for k, v in rows if v)}</dl>'


def _tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """(name, figure, what it means), figures and meanings as HTML."""
    cells = (f"<div><dt>{text(name)}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in rows if value)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _command(line: str) -> str:
    """One that is selected whole by a click, to be copied."""
    return f'<pre tabindex="0" aria-label="Command"><code>{text(line)}</code></pre>'


def _commands(said: str) -> str:
    """Text in which what stands between backquotes is a command, as HTML."""
    parts = text(said).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


# --- now --------------------------------------------------------------------------------------------------------------


def now(s: Snapshot, cast: Cast, links: Links) -> str:
    """What the program does at this moment, and whether somebody should look."""
    program = s.status.program.capitalize() if s.status else "Validator" if s.folder else "Recorded rounds"
    sections = {
        "runs": _who_runs(s), "alarms": _alarms(s), "work": _work(s, cast),
        "tiles": _now_tiles(s), "crowns": _crowns(s, cast, links), "miners": _miners(s, cast, links),
        "rounds": _round_list(s, cast, links), "weights": _weights_on_chain(s, cast, links), "judged": _judged_by(s),
        "warnings": _warnings(s, cast, links), "counters": _counters(s),
    }  # fmt: skip
    spoken = {"alarms": ' role="status"'}
    parts = (f'<div data-live="{name}"{spoken.get(name, "")}>{part}</div>' for name, part in sections.items())
    return "\n".join([f"<h1>{text(program)}</h1>", *parts])


def _who_runs(s: Snapshot) -> str:
    if s.status is None:
        return ""
    key = f'Hotkey <code class="key">{text(s.status.hotkey)}</code><br>' if s.status.hotkey else ""
    since = f"sn29 {text(s.status.version)}, process {s.status.pid}, running since {when(s.status.started)}"
    return f'<p class="note">{key}{since}</p>'


def _alarms(s: Snapshot) -> str:
    found = s.alarms
    if not found and s.status is not None and s.was_asked_to_stop:
        return f'<p class="state">Stopped {_ago(s, s.status.updated)}, as it was asked to</p>'
    if not found:
        return '<p class="state good">All is well</p>' if s.folder is not None else ""
    rows = "".join(
        f'<li class="{text(a.level)}"><b>{"Critical" if a.level == "critical" else "Warning"}: {text(a.sentence)}</b>'
        f"<p>What to do: {_commands(a.advice)}.</p></li>"
        for a in found
    )
    worst = "bad" if any(a.level == "critical" for a in found) else "warn"
    return f'<p class="state {worst}">{markup.count(len(found), "alarm")}</p><ul class="alarms">{rows}</ul>'


def _work(s: Snapshot, cast: Cast) -> str:
    """The stage, how far it is, and about how long it will take."""
    status = s.status
    if status is None:
        return ""
    what = f"Round of block {status.round:,}" if status.round is not None else ""
    upto = s.at if s.is_live else status.updated  # of a program that is gone the time stands still
    share = min(1.0, status.done / status.of) if status.of else None
    counted, done = upto - status.counted_since, status.done - status.done_before
    left = ""
    if s.is_live and counted > 3 and done > 0 and status.done < status.of:
        left = f"about {lasting(counted * (status.of - status.done) / done)} left"
    amount = ""
    if status.of:
        amount = f"{status.done:,} of {status.of:,}"
    if status.of and status.stage == "fetching":
        size, unit = (1e9, "GB") if status.of >= 1e9 else (1e6, "MB")
        amount = f"{status.done / size:.2f} of {status.of / size:.2f} {unit}"
    bar = ""
    if status.of:
        bar = f'<progress max="1" value="{share:.4f}" aria-label="{text(_STAGES.get(status.stage, status.stage))}"></progress>'
    names = _SHORT.get(status.program, _SHORT["validator"])
    at = names.index(status.stage) if status.stage in names else -1
    marks = [" aria-current=step" if i == at else " class=past" if 0 < i < at else "" for i in range(len(names))]
    steps = "".join(f"<li{mark}>{name}</li>" for mark, name in zip(marks, names, strict=True))
    spent = "" if status.stage == STOPPED else f"for {lasting(upto - status.stage_started)}"
    more = " ".join(filter(None, [amount, spent]))
    return (
        f'<section class="work" aria-label="Stage"><p class="note">{what or "No round in hand"}</p>'
        f'<p class="big" aria-live="polite">{text(_STAGES.get(status.stage, status.stage))}</p>{bar}'
        f'<p class="more"><span>{text(_named(status.detail, cast))}</span><span>{more}{f", {left}" if left else ""}</span></p>'
        f'<ol class="stages" aria-label="Stages of a round">{steps}</ol></section>'
    )


def _now_tiles(s: Snapshot) -> str:
    rows: list[tuple[str, str, str]] = []
    for mechanism, one in sorted(s.facts.published.items()) if s.facts else ():
        rows.append(_published_tile(s, mechanism, one, several=len(s.facts.published) > 1 if s.facts else False))
    if s.head is not None:
        rows.append(("Newest final block", f"{s.head[0]:,}", f"came {_ago(s, s.head[1])}"))
    if s.status is not None and s.status.next_window is not None and s.is_live:
        seed = s.status.next_window
        rows.append(("Next window", _in(s, seed) or f"{seed:,}", f"block {seed:,}"))
    if s.newest is not None:
        status = Counter(o.status for o in s.newest.outcomes)
        looked = f"{markup.count(status['evaluated'], 'model')} evaluated, {status['rejected']} refused"
        rows.append(("Newest round", f"{s.newest.block:,}", f"{looked}, finished {_ago(s, s.newest.written)}"))
    if s.disk_bytes:
        rows.append(("Disk", f"{s.free_bytes / 1e9:,.0f} GB free", f"of {s.disk_bytes / 1e9:,.0f} GB"))
    tiles = _tiles(rows) if rows else ""
    if s.withheld:
        what = f"{markup.count(s.withheld, 'newer round')} will be shown when the chain is known to have revealed the weights"
        return f'{tiles}<p class="note">{what}: this page can be seen from other machines, and others could copy them.</p>'
    return tiles if s.newest else f'{tiles}<p class="lead">No round has been finished yet.</p>'


def _published_tile(s: Snapshot, mechanism: int, one: Published, *, several: bool) -> tuple[str, str, str]:
    name = f"Last weight set, mechanism {mechanism}" if several else "Last weight set"
    waiting = f"; {markup.count(len(one.on_its_way), 'set')} on the way" if one.on_its_way else ""
    if one.stands is None and one.decided is None:
        return name, "none yet", f"a set is not shown before the chain has revealed it{waiting}"
    if one.stands is None and one.decided is not None:
        nobody = "no model has won anything yet, so there is nobody to pay"
        due = f"the weights of the round of block {one.decided.block:,} are still to be set"
        return name, "none yet", f"{due if one.decided.by_hotkey else nobody}{waiting}"
    assert one.stands is not None
    block, weights = one.stands
    age = lasting((s.block - block) * s.block_seconds) if s.block is not None else ""
    epochs = f", {(s.block - block) / s.epoch:.1f} epochs" if s.block is not None else ""
    newest = ""
    if one.decided is not None and one.decided.block != weights.block:
        newest = f"; the weights of the round of block {one.decided.block:,} are still to be set"
    return name, f"{age} ago", f"block {block:,}{epochs}; of the round of block {weights.block:,}{newest}{waiting}"


def _crowns(s: Snapshot, cast: Cast, links: Links) -> str:
    rows = []
    for name in s.competitions:
        rounds = [one for one in s.rounds if name in one.record.competitions]
        link = f'<a href="{text(links("competition", name))}">{text(name)}</a>'
        holder = _holder(rounds[-1].record.competitions[name]) if rounds else None
        if holder is None:
            said = "nobody" if rounds else _not_judged_yet(s, name)
            rows.append(markup.row(link, f"<td>{said}</td>" + 4 * '<td class="n">–</td>'))
            continue
        since = next((one.block for one in reversed(rounds) if _holder_of(one, name) != holder.hotkey), None)
        reign = [one.block for one in rounds if since is None or one.block > since]
        kept = rounds[-1].record.competitions[name]
        count = Counter(m.outcome.status for m in kept.models)
        held = f"{'at least ' if since is None and len(rounds) > 1 else ''}{markup.count(len(reign), 'round')}"
        evaluated, bits = f"{count['evaluated']} / {len(kept.models)}", markup.number(holder.bits_per_byte, ".4f")
        figures = (held, bits, evaluated, f"{rounds[-1].block:,}")
        cells = "".join(f'<td class="n">{figure}</td>' for figure in figures)
        rows.append(markup.row(link, f"<td>{_who(cast, links, holder.hotkey)}</td>{cells}"))
    if not rows:
        return ""
    head = markup.header("Competition", "Crown", "#Held for", "#Bits a byte", "#Evaluated", "#By the round of")
    return (
        f"<section><h2>Competitions</h2>{markup.table('Who holds each crown, by the newest round of each', head, rows)}</section>"
    )


def _not_judged_yet(s: Snapshot, name: str) -> str:
    """Of a competition that no round has judged: from which block on one will."""
    since = next((kept.since for kept in (s.facts.rules if s.facts else ()) if f"{name}.yaml" in kept.texts), 0)
    return f"in force from block {_since(s, since)}" if s.block is not None and since > s.block else "no round yet"


def _miners(s: Snapshot, cast: Cast, links: Links) -> str:
    """What became of everybody in the newest round, each with its page."""
    one = s.newest
    if one is None:
        return ""
    if not one.outcomes:
        return '<section><h2>Miners</h2><p class="note">Nobody had committed to anything in the newest round.</p></section>'
    sentences = {reason.code: reason.sentence for reason in Reason}
    paid = {o: one.record.weights_of(o.competition).get(o.hotkey, 0.0) for o in one.outcomes}
    rows = []
    for o in sorted(one.outcomes, key=lambda o: (_ORDER.get(o.status, 4), -paid[o], o.competition, o.hotkey)):
        why = f": <b>{text(o.reason)}</b> {text(sentences.get(o.reason, ''))}" if o.status != "evaluated" else ""
        cells = f'<td>{text(o.competition) or "–"}</td>{_weight(paid[o])}<td class="why">{page.said_status(o.status)}{why}</td>'
        rows.append(markup.row(_who(cast, links, o.hotkey), cells))
    head = markup.header("Miner", "Competition", "#Weight", "Outcome")
    said = markup.count(len(rows), "commitment")
    caption = f"{said} in the round of block {one.block:,}; each name leads to the whole story, and what to do"
    table = markup.table(caption, head, rows)
    if len(rows) > MANY_MINERS:
        table = f"<details><summary>Show all {len(rows):,}</summary>{table}</details>"
    return f"<section><h2>Miners</h2>{table}</section>"


def _holder_of(one: Round, name: str) -> str:
    holder = _holder(one.record.competitions[name])
    return holder.hotkey if holder else ""


def _crowns_of(one: Round, cast: Cast, links: Links) -> str:
    holders = {name: _holder_of(one, name) for name in sorted(one.record.competitions)}
    said = {name: _who(cast, links, h) if h else "nobody" for name, h in holders.items()}
    return ", ".join(f'<span class="crown">{text(name)}: {who}</span>' for name, who in said.items())


def _round_list(s: Snapshot, cast: Cast, links: Links) -> str:
    rows = []
    for one in reversed(s.rounds):
        status = Counter(o.status for o in one.outcomes)
        others = sum(count for name, count in status.items() if name not in ("evaluated", "rejected"))
        link = f'<a href="{text(links("round", str(one.block)))}">{one.block:,}</a>'
        cells = "".join(f'<td class="n">{n}</td>' for n in (status["evaluated"], status["rejected"], others))
        rows.append(markup.row(link, f'<td>{when(one.written)}</td>{cells}<td class="why">{_crowns_of(one, cast, links)}</td>'))
    if not rows:
        return ""
    head = markup.header("Block", "Finished", "#Evaluated", "#Refused", "#Others", "Crowns")
    caption = "Newest first; others: they waited for a place, or did not answer"
    more = ""
    if older := rows[NEWEST:]:
        said = f"{markup.count(len(older), 'older round')}"
        more = f"<details><summary>{said}</summary>{markup.table(said, head, older)}</details>"
    if s.older:
        said = f"{markup.count(s.older, 'record')} of still older rounds: `sn29 report --rounds N` shows more than these."
        more += f'<p class="note">{_commands(said)}</p>'
    return f"<section><h2>Rounds</h2>{markup.table(caption, head, rows[:NEWEST])}{more}</section>"


def _weights_on_chain(s: Snapshot, cast: Cast, links: Links) -> str:
    parts = []
    published = s.facts.published if s.facts else {}
    for mechanism, one in sorted(published.items()):
        decided, stands = one.decided.by_hotkey if one.decided else {}, one.stands[1].by_hotkey if one.stands else {}
        if not decided and not stands:
            parts.append('<p class="note">None yet: no model has won anything.</p>' if one.decided else "")
            continue
        set_at = f"Set at block {one.stands[0]:,}" if one.stands else "Not set yet"
        caption = f"Mechanism {mechanism}: shares of 1" if len(published) > 1 else "Shares of 1"
        titles = (f"Decided at block {one.decided.block:,}" if one.decided else "Decided", set_at)
        parts.append(_two_weights(caption, titles, (decided, stands), cast, links))
    if any(parts) and s.newest is not None:
        parts.append(_unclaimed(s.newest))
    return f"<section><h2>Weights</h2>{''.join(parts)}</section>" if any(parts) else ""


def _unclaimed(one: Round) -> str:
    """Why weights are larger than a competition's share: what others do not pay goes to those that have a winner."""
    empty: dict[int, list[str]] = {}
    paying: dict[int, list[str]] = {}
    for name, kept in sorted(one.record.competitions.items()):
        is_shared = isinstance(kept.parameters, Mapping) and kept.parameters.get("when_empty", "share") == "share"
        if _holder(kept) is not None:
            paying.setdefault(kept.mechanism, []).append(name)
        elif is_shared and not any(m.outcome.status == "unavailable" for m in kept.models):  # else it stays, or is burnt
            empty.setdefault(kept.mechanism, []).append(name)
    said = [
        f"No model won anything in {markup.listed(names)}: in this round {markup.listed(paying[mechanism])} got the whole reward."
        for mechanism, names in sorted(empty.items())
        if mechanism in paying
    ]
    return f'<p class="note">{text(" ".join(said))}</p>' if said else ""


def _two_weights(
    caption: str, titles: tuple[str, str], weights: tuple[Mapping[str, float], Mapping[str, float]], cast: Cast, links: Links
) -> str:
    """A table with two columns, most of the first one first."""
    first, second = weights
    hotkeys = sorted({*first, *second}, key=lambda h: (-first.get(h, 0.0), -second.get(h, 0.0), h))
    cells = {h: _weight(first.get(h, 0.0)) + _weight(second.get(h, 0.0)) for h in hotkeys}
    rows = [markup.row(_who(cast, links, h), cells[h]) for h in hotkeys]
    return markup.table(caption, markup.header("Miner", *(f"#{title}" for title in titles)), rows)


def _weight(weight: float) -> str:
    return f'<td class="n">{weight:.4f}</td>' if weight else '<td class="n none">0</td>'


def _judged_by(s: Snapshot) -> str:
    """By which software and files, from which block on; and whose losses were taken over."""
    if s.facts is None or not s.facts.rules:
        return ""
    first, *later = s.facts.rules
    rows = [(first.since, [f"{name} {version}" for name, version in sorted(first.software.items())])]
    rows += [(new.since, differences(old, new)) for old, new in zip(s.facts.rules, later, strict=False)]
    versions = markup.table(
        "Versions that decide losses and weights; a change takes effect with the first window after it",
        markup.header("From block", "What"),
        [markup.row(_since(s, block), f"<td>{text(', '.join(what))}</td>") for block, what in rows],
    )
    taken = []
    for one in s.facts.imports:
        counts = f'<td class="n">{one.cells:,}</td><td class="n">{one.checked:,}</td>'
        taken.append(markup.row(f"{one.block:,}", f"<td>{text(Path(one.source).name)}</td>{counts}<td>{when(one.at)}</td>"))
    head = markup.header("Round of block", "Record", "#Losses", "#Measured here too", "When")
    imports = markup.table("Losses taken over from other validators' records (warm start)", head, taken) if taken else ""
    return f"<details><summary>What rounds are judged by</summary>{versions}{imports}</details>"


def _since(s: Snapshot, block: int) -> str:
    coming = s.block is not None and block > s.block
    return f"{block:,}{f' ({_in(s, block)})' if coming else ''}" if block else "the start"


def _warnings(s: Snapshot, cast: Cast, links: Links) -> str:
    if s.status is None:
        return ""
    rows = []
    for one in reversed(s.warnings):
        who = _who(cast, links, one.hotkey) if one.hotkey else "–"
        sentence = text(_named(one.sentence, cast))
        said = f'<td><code class="event">{text(one.event)}</code></td><td class="why">{sentence}</td>'
        rows.append(markup.row(when(one.time), f"{said}<td>{who}</td>"))
    if not rows:
        return '<section><h2>Warnings</h2><p class="note">None since the start.</p></section>'
    head = markup.header("Time", "Event", "What was said", "Miner")
    table = markup.table("The last ones since the start, newest first", head, rows)
    return f"<section><h2>Warnings</h2>{table}</section>"


def _counters(s: Snapshot) -> str:
    if s.status is None:
        return ""
    rows = [markup.row(f"<code>{text(k)}</code>", f'<td class="n">{v:,}</td>') for k, v in sorted(s.status.counters.items())]
    spent = [
        markup.row(text(_STAGES.get(k, k)), f'<td class="n">{lasting(v)}</td>')
        for k, v in sorted(s.status.stage_seconds.items(), key=lambda kv: -kv[1])
    ]
    tables = markup.table("How often each event was told since the start", markup.header("Event", "#Times"), rows)
    tables += markup.table("Where the time went since the start", markup.header("Stage", "#Time"), spent) if spent else ""
    return f'<details><summary>Events and times since the start</summary><div class="pair">{tables}</div></details>'


# --- one competition --------------------------------------------------------------------------------------------------


def competition(s: Snapshot, cast: Cast, links: Links, name: str) -> str:
    """Standings with confidence, pictures, what is allowed now and what changes next."""
    rounds = [one for one in s.rounds if name in one.record.competitions]
    parts = [f"<h1>Competition {text(name)}</h1>"]
    if rounds:
        newest = rounds[-1]
        pictured = "".join([_confidence(newest, cast, name), _history(rounds, cast, name)])
        parts += [_lead(s, newest, cast, links, name), _standings(newest, cast, links, name)]
        parts += [f'<div class="pair">{pictured}</div>', _duels(newest, cast, name), _not_evaluated(newest, cast, links, name)]
    else:
        parts.append('<p class="lead">No round of it has been finished yet.</p>')
    if name in s.files:
        parts.append(_rules(s, s.files[name]))
    return "\n".join(part for part in parts if part)


def _holder(kept: CompetitionRecord) -> Standing | None:
    return page.holder_of(_all_standings(kept))


def _all_standings(kept: CompetitionRecord) -> list[Standing]:
    """Best first. `page.standings_of`, without the win matrix that it is given on the demo's page."""
    found = []
    for score in kept.scores:
        model = kept.model(score.hotkey)
        if model is not None and model.evaluated:
            num_bytes = sum(sample.num_bytes for sample in kept.samples[: len(model.losses)])
            shown = {"wins": score.wins, "win_rate": score.win_rate, "advantage": score.advantage, "weight": score.weight}
            found.append(Standing(score.hotkey, {"block": model.outcome.block}, shown, model.losses, model.unscored, num_bytes))
    return sorted(found, key=lambda x: (-x.score["weight"], -x.score["wins"], x.nats_per_sample, x.hotkey))


def _lead(s: Snapshot, one: Round, cast: Cast, links: Links, name: str) -> str:
    kept = one.record.competitions[name]
    holder = _holder(kept)
    block = f'<a href="{text(links("round", str(one.block)))}">round of block {one.block:,}</a>'
    if holder is None:
        return f'<p class="lead">Nobody won anything in the {block}.</p>'
    memory = kept.memory_after if isinstance(kept.memory_after, dict) else {}
    since = memory.get("since")
    reign = f", since the window of block {since:,}" if isinstance(since, int) and since >= 0 else ""
    needed = next((d.get("needed") for d in kept.duels if isinstance(d, dict) and d.get("holder") == holder.hotkey), None)
    ahead = f" A challenger must be shown to be better by {explain.percent(needed)}." if isinstance(needed, float) else ""
    bits = f", at {markup.number(holder.bits_per_byte, '.4f')} bits a byte"
    return f'<p class="lead">{_who(cast, links, holder.hotkey)} holds the crown{reign}{bits}, by the {block}.{ahead}</p>'


def _compared(name: str, kept: CompetitionRecord) -> dict[str, explain.Comparison]:
    """Each evaluated model against the holder, as the rule found it; empty where the record cannot be scored again."""
    holder = _holder(kept)
    if holder is None:
        return {}
    try:
        contest = contest_of(name, kept)
        scored = score_contest(contest)
    except (Sn29Error, ValueError):  # somebody else's record, as in `replay.recompute`
        return {}
    found = {h: explain.compared(scored, contest, h, holder.hotkey) for h in kept.losses if h != holder.hotkey}
    return {hotkey: one for hotkey, one in found.items() if one is not None}


def _standings(one: Round, cast: Cast, links: Links, name: str) -> str:
    kept = one.record.competitions[name]
    standings, compared, weights = _all_standings(kept), _compared(name, kept), one.record.weights_of(name)
    rows = []
    for i, x in enumerate(standings):
        figures = (
            markup.number(x.bits_per_byte, ".4f"), markup.number(x.nats_per_sample, ",.1f"), f"{x.score['win_rate']:.3f}",
            f"{x.score['weight']:.3f}", f"{weights.get(x.hotkey, 0.0):.3f}",
        )  # fmt: skip
        cells = "".join(f'<td class="n">{figure}</td>' for figure in figures)
        notes = []
        if len(x.nats) < len(kept.samples):
            notes.append(f"stopped after {len(x.nats):,} of {len(kept.samples):,} samples")
        if x.unscored:
            notes.append(f"{len(x.unscored):,} samples could not be scored")
        said = "; ".join(filter(None, [_against(compared.get(x.hotkey), cast), *notes])) or "holds the crown"
        is_first = i == 0 and x.score["weight"] > 0
        cells += f'<td class="why">{text(said)}</td>'
        rows.append(markup.row(_who(cast, links, x.hotkey), cells, "first" if is_first else ""))
    head = markup.header("Miner", "#Bits a byte", "#Nats a sample", "#Win rate", "#Share", "#Weight", "Against the holder")
    num_bytes = sum(sample.num_bytes for sample in kept.samples)
    caption = f"{markup.count(len(kept.samples), 'sample')} with {num_bytes:,} bytes of text; weight: after the moving average"
    if not rows:
        return '<section><h2>Standings</h2><p class="note">No model was evaluated in the newest round.</p></section>'
    return f"<section><h2>Standings</h2>{markup.table(caption, head, rows)}{_unclaimed(one)}</section>"


def _against(c: explain.Comparison | None, cast: Cast) -> str:
    if c is None:
        return ""
    if c.near_copy:
        return f"near copy of {cast.labels.get(c.other, c.other)}’s earlier model"
    way = "higher" if c.mean >= 0 else "lower"
    low, high = (c.low, c.high) if c.mean >= 0 else (-c.high, -c.low)
    bounded = math.isfinite(low) and math.isfinite(high)
    between = f"{explain.percent(low)} to {explain.percent(high)}" if bounded else "no bound yet"
    return f"loss {explain.percent(abs(c.mean))} {way} ({between}, {c.num_samples:,} samples)"


def _confidence(one: Round, cast: Cast, name: str) -> str:
    standings, compared = _all_standings(one.record.competitions[name]), _compared(name, one.record.competitions[name])
    drawn = [
        (cast.picture(x.hotkey)[0], 100 * c.mean, None, (100 * c.low, 100 * c.high))
        for x in standings[: page.MAX_MODELS]
        for c in [compared.get(x.hotkey)]
        if c is not None and math.isfinite(c.low) and math.isfinite(c.high) and not c.near_copy
    ]
    if not drawn:
        return ""
    kinds = sorted({c.kind for c in compared.values()})
    said = "; ".join(f"{label} {value:+.2f} %, {low:.2f} to {high:.2f}" for label, value, _, (low, high) in drawn)
    picture = pictures.gaps(drawn, markup.printable(f"Loss against the crown’s holder: {said}"))
    caption = f"Mean difference in loss on the same texts, with its interval: {text('; '.join(kinds))}. Left of 0 is better."
    return markup.figure("Loss against the holder, with confidence", picture, caption)


def _duels(one: Round, cast: Cast, name: str) -> str:
    part = page.shown_competition(name, one.record.competitions[name])
    return f"<section><h2>Sample by sample</h2>{page.duels(part, page.standings_of(part), cast)}</section>"


def _history(rounds: Sequence[Round], cast: Cast, name: str) -> str:
    crowns = [(one.block, _holder_of(one, name)) for one in rounds]
    rows = [one.record.weights_of(name) for one in rounds]
    entered = {m.hotkey for one in rounds for m in one.record.competitions[name].models}
    paid = {h for row in rows for h, w in row.items() if w > 0 and h in entered}
    if not paid:
        return ""
    order = sorted(paid, key=lambda h: (-rows[-1].get(h, 0.0), -max(row.get(h, 0.0) for row in rows), h))
    blocks = [float(one.block) for one in rounds]
    lines = [Line(*cast.picture(h), blocks, [min(1.0, row.get(h, 0.0)) for row in rows]) for h in order[:MAX_LINES]]
    reigns = [(block, hotkey) for i, (block, hotkey) in enumerate(crowns) if i == 0 or crowns[i - 1][1] != hotkey]
    said = "; ".join(f"from block {block:,} {cast.labels.get(hotkey, 'nobody')}" for block, hotkey in reigns[-8:])
    band = [(float(block), cast.colours.get(hotkey) if hotkey else None) for block, hotkey in crowns]
    picture = pictures.history(
        lines, band, markup.printable(f"Crown: {said}. Weights over {markup.count(len(rounds), 'round')}.")
    )
    caption = f"Crown: {text(said)}. Weights are those of the whole mechanism after the moving average."
    return markup.figure("Crowns and weights, round by round", picture, caption)


def _not_evaluated(one: Round, cast: Cast, links: Links, name: str) -> str:
    found = [m.outcome for m in one.record.competitions[name].models if not m.evaluated]
    if not found:
        return ""
    rows = [_outcome_row(o, cast, links) for o in sorted(found, key=lambda o: (o.status, o.reason, o.hotkey))]
    head = markup.header("Miner", "Reason", "What to do", "Outcome")
    return f"<section><h2>Not evaluated</h2>{markup.table('In the newest round', head, rows)}</section>"


def _outcome_row(o: Outcome, cast: Cast, links: Links) -> str:
    shown = {"detail": o.detail, "reason": o.reason, "hotkey": o.hotkey}
    why = f"<b>{text(o.reason)}</b> {text(page.said_of(shown, cast))}" if o.status != "evaluated" else text(o.model)
    advice = page.advice(o.reason) if o.status != "evaluated" else ""
    return markup.row(
        _who(cast, links, o.hotkey),
        f'<td class="why">{why}</td><td class="why">{advice}</td><td>{page.said_status(o.status)}</td>',
    )


def _rules(s: Snapshot, file: CompetitionFile) -> str:
    block = s.block or 0
    rules, limits = in_force(file, block), in_force(file, block).limits
    sizes = f"{limits.parameters:,} parameters" + (f", at least {limits.min_parameters:,}" if limits.min_parameters else "")
    tokenizer = rules.tokenizer
    reads = tokenizer.hub if isinstance(tokenizer, FixedTokenizer) else "any: each model brings its own"
    rows = [
        ("Share of the reward", f"{rules.reward_share:.0%}{f' of mechanism {rules.mechanism}' if rules.mechanism else ''}"),
        ("Families", text(", ".join(rules.families))),
        ("Size", f"at most {sizes}, {limits.bytes / 1e9:,.2f} GB of files"),
        ("Tokenizer", text(reads)),
        ("Samples", f"{rules.samples.count:,} every {rules.samples.window_blocks:,} blocks"),
        ("A sample", f"at most {limits.max_tokens:,} tokens and {limits.max_chars:,} characters"),
        ("Text", text(", ".join(d.hub if isinstance(d, HubDataset) else d.folder for d in rules.datasets))),
        ("Scoring", f"rule <code>{text(rules.scoring.rule)}</code>"),
        ("Evaluated at most", f"{rules.pool.keep + rules.pool.pending} models a round: {rules.pool.keep} that stay, "
                              f"{rules.pool.pending} new ones"),
    ]  # fmt: skip
    coming = [v for v in file.versions if v.block > block]
    changes = "".join(f"<li>Block {v.block:,}{_at_time(s, v.block)}: {text('; '.join(v.what))}</li>" for v in coming[:CHANGES])
    left = f"and {len(coming) - CHANGES} more, up to block {coming[-1].block:,}" if len(coming) > CHANGES else ""
    told = f'<ul>{changes}</ul><p class="note">{left}</p>' if coming else '<p class="note">No change is announced.</p>'
    return (
        f"<section><h2>Rules in force</h2>{_facts(rows)}<h3>What changes next</h3>{told}"
        f'<p class="note">All fields: {_commands("`sn29 competitions show`")}</p></section>'
    )


def _at_time(s: Snapshot, block: int) -> str:
    at = s.time_of(block)
    return "" if at is None else f", about {when(at)}"


def standings_json(one: Round, name: str, *, compare: bool) -> dict[str, Any]:
    """One round of one competition; a loss that is infinite is null. compare: with each model against the holder."""
    kept = one.record.competitions[name]
    compared, weights = _compared(name, kept) if compare else {}, one.record.weights_of(name)
    standings = [
        {
            "hotkey": x.hotkey,
            "bits_per_byte": x.bits_per_byte if math.isfinite(x.bits_per_byte) else None,
            "nats_per_sample": x.nats_per_sample if math.isfinite(x.nats_per_sample) else None,
            **{key: x.score[key] for key in ("wins", "win_rate")},
            "share": x.score["weight"],
            "weight": weights.get(x.hotkey, 0.0),
            "num_samples": len(x.nats),
            "against_holder": _finite(asdict(compared[x.hotkey])) if x.hotkey in compared else None,
        }
        for x in _all_standings(kept)
    ]
    refused = [asdict(m.outcome) for m in kept.models if not m.evaluated]
    return {"block": one.block, "holder": _holder_of(one, name) or None, "standings": standings, "not_evaluated": refused}


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


# --- one miner --------------------------------------------------------------------------------------------------------


def miner(s: Snapshot, cast: Cast, links: Links, hotkey: str) -> str:
    """Its timeline, how far it is from the crown, and when it would take it."""
    stories = [list(same) for _, same in groupby(explain.passages((o.record for o in s.rounds), hotkey), key=explain.same_story)]
    label = cast.labels.get(hotkey, hotkey)
    parts = [f"<h1>Miner {text(label)}</h1>", f'<p class="note"><code class="key">{text(hotkey)}</code></p>']
    newest = next((one for one in reversed(s.rounds) if one.record.outcomes_of(hotkey)), None)
    if newest is None:
        return "\n".join([*parts, '<p class="lead">No round here says anything about it: no commitment of it was seen.</p>'])
    parts.append(_miner_lead(newest, hotkey))
    for name, kept in sorted(newest.record.competitions.items()):
        if kept.model(hotkey) is not None:
            parts.append(_prospect(s, newest, cast, name, kept, hotkey))
    steps, shown = "", None
    for story in reversed(stories):
        outcome = story[0].outcome
        steps += _story(story, s, cast, links, named=(outcome.block, outcome.model) != shown)
        shown = (outcome.block, outcome.model)
    said = f"Newest first, of the {markup.count(len(s.rounds), 'round')} shown here."
    parts.append(f'<section><h2>Timeline</h2><p class="note">{said}</p><ol class="line">{steps}</ol></section>')
    parts.append(f'<p class="note">The same in a terminal:</p>{_command(_explain_command(s, hotkey))}')
    return "\n".join(part for part in parts if part)


def _explain_command(s: Snapshot, hotkey: str) -> str:
    where = ["--state.dir", str(s.folder)] if s.folder is not None else ["--records", str(s.rounds[-1].path.parent)]
    return shlex.join(["sn29", "explain", hotkey, *where])


def _miner_lead(newest: Round, hotkey: str) -> str:
    o = newest.record.outcomes_of(hotkey)[-1]
    said = {"evaluated": "It was evaluated", "rejected": "Its model was refused"}.get(o.status, f"Its model is {o.status}")
    weight = newest.record.weights_of(o.competition).get(hotkey, 0.0)
    paid = f", and has {weight:.2%} of the weight" if weight else ", and has no weight"
    return f'<p class="lead">{text(said)} in the round of block {newest.block:,}{paid}.</p>'


def _story(story: Sequence[explain.Passage], s: Snapshot, cast: Cast, links: Links, *, named: bool) -> str:
    """named: with the commitment that it is about, unless that is the one of the story above."""
    first = story[0]
    head, *lines = explain.told(story)
    blocks = {one.block: one for one in s.rounds}
    where = f'<a href="{text(links("round", str(first.block)))}">Round of block {first.block:,}</a>'
    what = head.partition(", ")[2]
    at = f' <span class="note">{when(blocks[first.block].written)}</span>' if first.block in blocks else ""
    body = "".join(f"<p>{_commands(_named(line.strip(), cast))}</p>" for line in lines)
    commitment = f'<p class="note">{text(what)}</p>' if named else ""
    return f'<li class="{text(first.outcome.status)}"><p><b>{where}</b>{at}</p>{commitment}{body}</li>'


def _named(line: str, cast: Cast) -> str:
    for hotkey, label in cast.labels.items():
        line = line.replace(hotkey, label)
    return line


def _prospect(s: Snapshot, newest: Round, cast: Cast, name: str, kept: CompetitionRecord, hotkey: str) -> str:
    try:
        found = explain.prospect(name, kept, hotkey)
    except (Sn29Error, ValueError):  # somebody else's record, as in `replay.recompute`
        return ""
    if found is None:
        return ""
    _, *lines = explain.told_prospect(newest.record, name, kept, found, None)  # the date is in the tile
    said = "".join(f"<li>{text(_named(line.strip(), cast))}</li>" for line in lines)
    tiles = _prospect_tiles(s, newest, kept, found) if found.holder != hotkey else []
    picture = _losses_against(cast, kept, hotkey, found.holder)
    return f"<section><h2>Against the crown of {text(name)}</h2>{_tiles(tiles)}<ul>{said}</ul>{picture}</section>"


def _prospect_tiles(s: Snapshot, newest: Round, kept: CompetitionRecord, found: explain.Prospect) -> list[tuple[str, str, str]]:
    blocks = [block for block in (found.wins_by_evidence, found.wins_at) if block is not None]
    tiles = [("Would take the crown", "never", "with this model")]
    if blocks:
        at = s.time_of(min(blocks))
        if at is None:  # no chain was seen: from when the file was written
            at = newest.written + (min(blocks) - kept.window.seed.block) * explain.BLOCK_SECONDS
        how = (
            "if every window looks like this one" if min(blocks) == found.wins_by_evidence else "as the holder’s advantage decays"
        )
        tiles = [("Would take the crown", when(at) if at < 4e9 else "in centuries", how)]
    if found.improvement is not None:
        less = f"{explain.percent(found.improvement)} less loss"
        tiles.append(("Would win today with", less, "a new model, on every sample"))
    if found.lost_to is not None and not found.lost_to.near_copy:
        way = "higher" if found.lost_to.mean >= 0 else "lower"
        tiles.append(("Its loss now", f"{explain.percent(abs(found.lost_to.mean))} {way}", "than the holder’s"))
    return tiles


def _losses_against(cast: Cast, kept: CompetitionRecord, hotkey: str, holder: str) -> str:
    if hotkey == holder or holder not in kept.losses:
        return ""
    pairs = zip(kept.losses[hotkey], kept.losses[holder], strict=False)  # who was stopped has fewer
    deltas = sorted(a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b))
    if len(deltas) < 2:
        return ""
    share = [100 * i / (len(deltas) - 1) for i in range(len(deltas))]
    line = Line(*cast.picture(hotkey), pictures.thinned(share), pictures.thinned(deltas))
    lower = sum(d < 0 for d in deltas)
    name = cast.labels.get(holder, holder)
    said = f"On {lower:,} of {len(deltas):,} samples its loss is lower than {name}’s."
    picture = pictures.differences([line], cast.picture(holder)[0], markup.printable(f"Loss by sample against {name}. {said}"))
    caption = f"Its loss less the holder’s on the same text, sorted. {text(said)}"
    return markup.figure("Loss by sample, against the holder", picture, caption)


# --- one round --------------------------------------------------------------------------------------------------------


def one_round(s: Snapshot, cast: Cast, links: Links, one: Round) -> str:
    """The record, what made it, every outcome, and how to compute it again."""
    record = one.record
    replay = shlex.join(["sn29", "replay", str(one.path)])
    parts = [
        f"<h1>Round of block {one.block:,}</h1>",
        f'<p class="lead">Finished {when(one.written)}. Crowns: {_crowns_of(one, cast, links) or "none"}.</p>',
        "<section><h2>The record</h2>",
        "<p>Everything that the weights depend on is in one file. Whoever has it can compute them again, to the bit:</p>",
        _command(replay),
        _facts([
            ("File", f"<code>{text(one.path.name)}</code>"),
            ("sha256 of the file", f"<code>{text(one.sha256)}</code>"),
                ("Address", f"<code>{text(address(record))}</code>" if address(record) != one.sha256 else ""),
            ("Block’s hash", f"<code>{text(record.head.hash)}</code>"),
            ("Versions", text(", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())))),
            ("Evaluated on", text(", ".join(f"{k} {v}" for k, v in sorted(record.machine.items())))),
        ]),
        "</section>",
        _windows(one), _outcomes(one, cast, links), _decided(one, cast, links),
    ]  # fmt: skip
    return "\n".join(parts)


def _windows(one: Round) -> str:
    rows = []
    for name, kept in sorted(one.record.competitions.items()):
        pinned = {source: f" at {revision[:12]}" if revision else "" for source, revision in kept.datasets.items()}
        sources = ", ".join(f"{re.sub('^[0-9]+ ', '', source)}{revision}" for source, revision in sorted(pinned.items()))
        rows.append(
            markup.row(
                text(name),
                f'<td class="n">{kept.window.index:,}</td><td class="n">{kept.window.seed.block:,}</td>'
                f'<td class="n">{len(kept.samples):,}</td><td class="why">{text(sources)}</td>'
                f"<td><code>{text(kept.file_sha256)}</code></td>",
            )
        )
    if not rows:
        return ""
    head = markup.header("Competition", "#Window", "#Seed block", "#Samples", "Drawn from", "sha256 of the rules’ file")
    return f"<section><h2>Windows</h2>{markup.table('The seed block’s hash draws the samples', head, rows)}</section>"


def _outcomes(one: Round, cast: Cast, links: Links) -> str:
    if not one.outcomes:
        return '<section><h2>Outcomes</h2><p class="note">Nobody had committed to anything.</p></section>'
    rows = []
    for o in sorted(one.outcomes, key=lambda o: (_ORDER.get(o.status, 4), o.competition, o.hotkey)):
        shown = {"detail": o.detail, "reason": o.reason, "hotkey": o.hotkey}
        why = f": <b>{text(o.reason)}</b> {text(page.said_of(shown, cast))}" if o.status != "evaluated" else ""
        model = f" <code>{text(o.model)}</code>" if o.model else ""
        cells = f'<td class="why">{page.said_status(o.status)}{why}{model}</td><td>{text(o.competition) or "–"}</td>'
        cells += f'<td class="n">{o.block:,}</td>'
        rows.append(markup.row(_who(cast, links, o.hotkey), cells))
    head = markup.header("Miner", "Outcome, and the model", "Competition", "#Committed at")
    return f"<section><h2>Outcomes</h2>{markup.table(f'All {len(rows):,} commitments', head, rows)}</section>"


def _decided(one: Round, cast: Cast, links: Links) -> str:
    parts = []
    for mechanism, weights in sorted(one.record.weights.items()):
        before = one.record.last_weights.get(mechanism)
        was = before.by_hotkey if before else {}
        caption = f"Mechanism {mechanism}: shares of 1" if len(one.record.weights) > 1 else "Shares of 1"
        if weights.by_hotkey or was:
            parts.append(_two_weights(caption, ("Decided", "Before"), (weights.by_hotkey, was), cast, links))
    none = '<p class="note">None: no model has won anything.</p>'
    return f"<section><h2>Weights</h2>{''.join(parts) or none}{_unclaimed(one)}</section>" if one.record.weights else ""
