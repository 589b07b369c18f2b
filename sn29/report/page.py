"""One HTML file about a subnet's rounds: who was refused and why, who beat whom, what was paid.

    title and summary -> each competition: standings, win matrix, loss by sample -> training -> weights -> refusals -> made from

Self-contained: no script, no request. What miners wrote (names of repositories, reasons that quote them) is hostile: every
string goes through `text`, which escapes it and shows what cannot be printed as a box.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sn29.errors import Reason
from sn29.report import markup, pictures
from sn29.report.markup import text
from sn29.report.pictures import Line
from sn29.report.style import GREY, css
from sn29.round_record import CompetitionRecord, RoundRecord
from sn29.rules.competition import competition_of
from sn29.rules.scoring import win_matrix

Record = Mapping[str, Any]
"""A round as `round.run_round` keeps it, read back from JSON."""

MAX_MODELS = 12
"""Models in a picture of one competition: those with most weight. Tables have all."""
MAX_PANELS = 3
"""Newest rounds among the pictures of weights."""
MAX_PAID = 6
"""Largest weights in the summary."""
_HOW_TO_READ = (
    '<p class="note">A model is measured by its loss on each sample: the nats that it needs for the text. Bits a byte are all '
    "nats / ln 2 / all bytes, so models with different tokenizers can be compared; lower is better. Wins are counted with the "
    "advantage of earlier commitments; a weight is a share of the competition’s reward.</p>"
)
_ADVICE = {
    "unavailable": "nothing to do while it is asked for again in the next round; see that the repository can be reached",
    "waiting": "nothing to do: those that were never evaluated have their turn first, oldest commitment first",
    "sealed": "run `sn29 miner` again: the seal stands, the commitment that says where the model is does not",
    "near_copy": "a model that differs from everybody's earlier ones",
    "out_of_reach": "a better model under another hotkey, or time: `sn29 explain HOTKEY` says which improvement would win",
}


def write_page(
    path: Path,
    records: Sequence[Record],
    published: Mapping[str, float],
    names: Mapping[str, str],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    unigram: Mapping[str, float],
) -> Path:
    """Writes the page to `path`, the same bytes for the same arguments, and returns it.

    `records`: the rounds, oldest first. `published`: weights on chain by hotkey. `names`: hotkey -> a person's name; may lack
    some. `curves`: miner's name -> rows of step, loss (nats per token), tokens. `unigram`: competition -> bits per byte of a
    unigram model on the newest round's samples; may be empty.
    """
    cast = _cast(records, published, names)
    anybody = bool(records and cast.labels)
    parts = [_head(records, anybody=anybody), _summary(records, published, cast)]
    for name in _competitions(records):
        parts.append(_competition(name, [r for r in records if name in r["competitions"]], cast, unigram.get(name)))
    if anybody:
        parts += [_training(curves, records, cast), _weights(records, published, cast), _refusals(records, cast)]
        parts.append(_hotkeys(records, cast))
    if records:
        parts.append(_made_from(records))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part) + "\n</body>\n</html>\n", encoding="utf-8")
    return path


def shown(record: RoundRecord) -> Record:
    """What the page shows of a round's record."""
    return {
        "block": record.head.block,
        "versions": dict(record.versions),
        "machine": dict(record.machine),
        "rules": {name: kept.file_sha256 for name, kept in record.competitions.items()},
        "no_competition": [asdict(outcome) for outcome in record.no_competition],
        "competitions": {name: shown_competition(name, kept) for name, kept in record.competitions.items()},
        "weights": _shown_weights(record),
    }


def _shown_weights(record: RoundRecord) -> dict[str, float]:
    """Hotkey -> share of the subnet's emission, if the mechanisms of the round share it evenly, as is the chain's rule
    unless a subnet's owner splits it otherwise."""
    decided = [one.by_hotkey for one in record.weights.values() if one.by_hotkey]
    hotkeys = sorted({hotkey for row in decided for hotkey in row})
    return {hotkey: math.fsum(row.get(hotkey, 0.0) for row in decided) / len(decided) for hotkey in hotkeys}


def shown_competition(name: str, kept: CompetitionRecord) -> Record:
    rule = competition_of(f"recorded {name}", name, {k: v for k, v in kept.parameters.items() if k != "name"}).scoring
    matrix = win_matrix(kept.losses, {m.hotkey: m.outcome.block for m in kept.models}, kept.window.seed.block, rule)
    losses = {}
    for model in kept.models:
        reasons = iter(model.unscored)
        rows = ([None, 0, next(reasons)] if loss == math.inf else [loss, 0, ""] for loss in model.losses)
        losses.update({model.hotkey: list(rows)} if model.evaluated else {})
    return {
        "window": asdict(kept.window),
        "samples": [{"id": s.id, "bytes": s.num_bytes} for s in kept.samples],
        "outcomes": [asdict(m.outcome) for m in kept.models],
        "losses": losses,
        "scores": [asdict(s) for s in kept.scores if s.hotkey in losses],
        "win_matrix": {
            "hotkeys": list(matrix.hotkeys),
            "wins": matrix.wins,
            "wins_with_advantage": matrix.wins_with_advantage,
        },
    }


# ---- who is who ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cast:
    """What a hotkey is called and which colour it has, on the whole page."""

    labels: Mapping[str, str]
    colours: Mapping[str, int]

    def html(self, hotkey: str) -> str:
        label = text(self.labels[hotkey])
        return f'<span class="who m{self.colours[hotkey]}" title="{text(hotkey)}">{label}</span>'

    def link(self, hotkey: str) -> str:
        """The same, leading to its row among the hotkeys."""
        return f'<a href="#h-{text(hotkey)}">{self.html(hotkey)}</a>'

    def picture(self, hotkey: str) -> tuple[str, int]:
        """Label, short enough for a picture, and colour."""
        return markup.cut(markup.printable(self.labels[hotkey]), 16), self.colours[hotkey]


def _cast(records: Sequence[Record], published: Mapping[str, float], names: Mapping[str, str]) -> Cast:
    """A hue for everybody who was ever evaluated, the last colour (grey) for the others."""
    evaluated = [s["hotkey"] for r in records for c in r["competitions"].values() for s in c["scores"]]
    seen = [o["hotkey"] for r in records for o in _outcomes(r)]
    paid = [h for r in records for h in r["weights"]]
    everybody = list(dict.fromkeys([*evaluated, *names, *seen, *paid, *published]))
    namesakes = Counter(names.values())
    labels = {}
    for hotkey in everybody:
        short = hotkey if len(hotkey) <= 13 else f"{hotkey[:6]}…{hotkey[-4:]}"
        name = names.get(hotkey, "")
        labels[hotkey] = short if not name else name if namesakes[name] == 1 else f"{name} {short}"
    hues = {hotkey: i % GREY for i, hotkey in enumerate(dict.fromkeys(evaluated))}
    return Cast(labels, {hotkey: hues.get(hotkey, GREY) for hotkey in everybody})


# ---- the standings of one competition --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """One evaluated model."""

    hotkey: str
    outcome: Mapping[str, Any]
    score: Mapping[str, Any]
    nats: tuple[float, ...]
    """By sample, of the leading ones if it was stopped; +inf where it could not be scored."""
    unscored: tuple[str, ...]
    """Why, for each such sample."""
    num_bytes: int
    """Of the samples that it was measured on."""

    @property
    def nats_per_sample(self) -> float:
        return math.fsum(self.nats) / max(1, len(self.nats))

    @property
    def bits_per_byte(self) -> float:
        return math.fsum(self.nats) / math.log(2) / max(1, self.num_bytes)


def standings_of(part: Record) -> list[Standing]:
    """Best first: by weight, then wins, then loss."""
    outcomes = {o["hotkey"]: o for o in part["outcomes"] if o["status"] == "evaluated"}
    found = []
    for score in part["scores"]:
        losses = part["losses"][score["hotkey"]]
        nats = tuple(math.inf if row[0] is None else float(row[0]) for row in losses)
        unscored = tuple(row[2] or "cannot be scored" for row in losses if row[0] is None)
        num_bytes = sum(s["bytes"] for s in part["samples"][: len(nats)])
        found.append(Standing(score["hotkey"], outcomes[score["hotkey"]], score, nats, unscored, num_bytes))
    return sorted(found, key=lambda s: (-s.score["weight"], -s.score["wins"], s.nats_per_sample, s.hotkey))


def holder_of(standings: Sequence[Standing]) -> Standing | None:
    """Who holds the competition: most weight, and any at all."""
    return standings[0] if standings and standings[0].score["weight"] > 0 else None


def _competition(name: str, rounds: Sequence[Record], cast: Cast, unigram: float | None) -> str:
    newest = rounds[-1]
    part = newest["competitions"][name]
    standings = standings_of(part)
    holder = holder_of(standings)
    held = f"held by {text(cast.labels[holder.hotkey])}" if holder else "held by nobody"
    lines = [
        f'<section id="c-{text(name)}">',
        f"<h2>Competition {text(name)} <small>{held}</small></h2>",
        standings_table(newest, part, standings, cast, unigram),
        duels(part, standings, cast),
    ]
    for earlier in reversed(rounds[:-1]):
        before = earlier["competitions"][name]
        table = standings_table(earlier, before, standings_of(before), cast, None)
        lines.append(f"<details><summary>Standings of the round of block {earlier['block']:,}</summary>{table}</details>")
    return "\n".join([*lines, "</section>"])


def standings_table(record: Record, part: Record, standings: Sequence[Standing], cast: Cast, unigram: float | None) -> str:
    num_samples, num_bytes = len(part["samples"]), sum(s["bytes"] for s in part["samples"])
    rows = [_standing_row(s, cast, num_samples, first=s is holder_of(standings)) for s in standings]
    for o in sorted(part["outcomes"], key=lambda o: cast.labels[o["hotkey"]]):
        if o["status"] != "evaluated":
            said = f"<b>{said_status(o['status'])}</b> {text(said_of(o, cast))} {_to_refusal(o['hotkey'])}"
            rows.append(markup.row(cast.link(o["hotkey"]), f'<td class="why" colspan="6"><span>{said}</span></td>'))
    foot = ""
    if unigram is not None:
        nats = unigram * math.log(2) * num_bytes / max(1, num_samples)
        cells = f'<td class="n">{nats:,.1f}</td><td class="n">{unigram:.3f}</td><td class="n" colspan="3"></td>'
        cells += '<td class="why">for comparison: a unigram model of the training text</td>'
        foot = f"<tfoot>{markup.row('unigram', cells)}</tfoot>"
    head = markup.header("Miner", "#Nats a sample", "#Bits a byte", "#Wins", "#Win rate", "#Weight", "Outcome")
    caption = (
        f"Round of block {record['block']:,}: {markup.count(num_samples, 'sample')} with {num_bytes:,} bytes of text, "
        f"drawn by the hash of block {part['window']['seed']['block']:,}"
    )
    return markup.table(caption, head, rows, foot)


def _standing_row(s: Standing, cast: Cast, num_samples: int, *, first: bool) -> str:
    said = f"evaluated, committed at block {s.outcome['block']:,}"
    if len(s.nats) < num_samples:
        said += (
            f"; stopped after {len(s.nats):,} of {num_samples:,} samples, shown not to be better than the holder by its advantage"
        )
    if s.unscored:
        reasons = "; ".join(dict.fromkeys(s.unscored))
        said += f"; {len(s.unscored):,} of {len(s.nats):,} samples cannot be scored: {reasons}"
    figures = (
        markup.number(s.nats_per_sample, ",.1f"), markup.number(s.bits_per_byte, ".3f"), f"{s.score['wins']:,g}",
        f"{s.score['win_rate']:.3f}", f"{s.score['weight']:.3f}",
    )  # fmt: skip
    cells = "".join(f'<td class="n">{figure}</td>' for figure in figures) + f'<td class="why">{text(said)}</td>'
    return markup.row(cast.link(s.hotkey), cells, kind="first" if first else "")


def duels(part: Record, standings: Sequence[Standing], cast: Cast) -> str:
    """Win matrix and loss by sample, side by side."""
    if len(standings) < 2:
        return '<p class="note">Fewer than two models were evaluated: there is nobody to compare.</p>'
    return f'<div class="pair">{_win_matrix(part, standings, cast)}{_by_sample(standings, cast)}</div>'


def _win_matrix(part: Record, standings: Sequence[Standing], cast: Cast) -> str:
    matrix = part["win_matrix"]
    shown = {s.hotkey for s in standings[:MAX_MODELS]}
    at = [i for i, hotkey in enumerate(matrix["hotkeys"]) if hotkey in shown]
    hotkeys = [matrix["hotkeys"][i] for i in at]
    wins, plain = ([[matrix[key][a][b] for b in at] for a in at] for key in ("wins_with_advantage", "wins"))
    num_samples = len(part["samples"])
    said = [
        f"{cast.labels[a]} beats {cast.labels[b]} on {wins[i][j]}"
        for i, a in enumerate(hotkeys) for j, b in enumerate(hotkeys) if i != j
    ]  # fmt: skip
    alt = markup.printable(f"Win matrix over {num_samples} samples, with advantage: {'; '.join(said)}.")
    picture = pictures.win_matrix([cast.picture(h) for h in hotkeys], wins, plain, num_samples, alt)
    caption = (
        f"On how many of {num_samples:,} samples the row beats the column: large with the row’s advantage, small without. "
        "Blue: more than half; orange: less. Oldest commitment first."
    )
    return markup.figure("Win matrix", picture, caption)


def _by_sample(standings: Sequence[Standing], cast: Cast) -> str:
    holder, others = standings[0], standings[1:MAX_MODELS]
    lines, lower = [], []
    for s in others:
        pairs = zip(s.nats, holder.nats, strict=False)  # who was stopped has fewer
        deltas = sorted(a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b))
        if len(deltas) >= 2:
            label, colour = cast.picture(s.hotkey)
            share = [100 * i / (len(deltas) - 1) for i in range(len(deltas))]
            lines.append(Line(label, colour, pictures.thinned(share), pictures.thinned(deltas)))
            lower.append(f"{cast.labels[s.hotkey]} on {sum(d < 0 for d in deltas):,} of {len(deltas):,}")
    if not lines:
        return ""
    name = cast.labels[holder.hotkey]
    said = f"Less loss than {name}, without any advantage: {'; '.join(lower)}."
    picture = pictures.differences(
        lines, cast.picture(holder.hotkey)[0], markup.printable(f"Loss by sample against {name}. {said}")
    )
    caption = f"Each model’s loss less {text(name)}’s on the same text, sorted. {text(said)}"
    return markup.figure(f"Loss by sample, against {text(name)}", picture, caption)


# ---- the page's other sections ---------------------------------------------------------------------------------------


def _head(records: Sequence[Record], *, anybody: bool) -> str:
    links = [(f"c-{name}", name) for name in _competitions(records)]
    if anybody:
        links += [("training", "Training"), ("weights", "Weights"), ("refusals", "Refusals"), ("hotkeys", "Hotkeys")]
    if records:
        links.append(("made-from", "Made from"))
    nav = " ".join(f'<a href="#{text(where)}">{text(what)}</a>' for where, what in links)
    # The policy is a second lock: were a string ever not escaped, a browser would still load and run nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>Rounds of the subnet</title>\n<style>{css()}</style>\n</head>\n<body>\n<h1>Rounds of the subnet</h1>\n"
        f'<nav aria-label="Sections">{nav}</nav>'
    )


def _summary(records: Sequence[Record], published: Mapping[str, float], cast: Cast) -> str:
    if not records:
        return '<p class="lead">No round has been finished yet.</p>'
    newest = records[-1]
    status = Counter(o["status"] for o in _outcomes(newest))
    blocks = markup.listed([f"{record['block']:,}" for record in records])
    rounds = f"{markup.count(len(records), 'round')}, of {'block' if len(records) == 1 else 'blocks'} {blocks}"
    waiting = sum(n for key, n in status.items() if key not in ("evaluated", "rejected"))
    looked = (
        f"In {'it' if len(records) == 1 else 'the newest'}, {markup.count(status['evaluated'], 'model')} "
        f"{'was' if status['evaluated'] == 1 else 'were'} evaluated and {status['rejected']} refused"
    ) + (f"; {waiting} could not be looked at or had to wait." if waiting else ".")
    crowns = []
    for name in sorted(newest["competitions"]):
        holder = holder_of(standings_of(newest["competitions"][name]))
        if holder is None:
            crowns.append(f"<li>{text(name)}: nobody won anything.</li>")
            continue
        bits = f" and {holder.bits_per_byte:.3f} bits a byte" if math.isfinite(holder.bits_per_byte) else ""
        won = f"{holder.score['win_rate']:.0%} of the wins"
        crowns.append(f"<li>{text(name)}: {cast.html(holder.hotkey)} holds the crown with {won}{bits}.</li>")
    paid = [f"{text(cast.labels[h])} {w:.1%}" for h, w in sorted(published.items(), key=lambda kv: (-kv[1], kv[0])) if w > 0]
    more = f" and {len(paid) - MAX_PAID} more" if len(paid) > MAX_PAID else ""
    chain = f"Weights on chain now: {', '.join(paid[:MAX_PAID])}{more}." if paid else "No weights are on chain."
    return f'<div class="lead"><p>{rounds}. {looked}</p><ul>{"".join(crowns)}</ul><p>{chain}</p></div>\n{_HOW_TO_READ}'


def _training(curves: Mapping[str, Sequence[Mapping[str, float]]], records: Sequence[Record], cast: Cast) -> str:
    entered = {o["hotkey"]: o["competition"] for r in records for o in _outcomes(r)}
    hotkeys = {label: hotkey for hotkey, label in cast.labels.items()}
    groups: dict[str, list[tuple[Line, Line]]] = {}
    short = []
    for name in sorted(curves):
        rows = [r for r in curves[name] if math.isfinite(r["loss"])]
        if len(rows) < 3:
            short.append(name)
            continue
        owner = hotkeys.get(name) or hotkeys.get(re.sub(r"-\d+$", "", name), "")  # alice-2 is alice's second training
        tokens, losses = pictures.thinned([r["tokens"] for r in rows]), [r["loss"] for r in rows]
        label, colour = markup.cut(markup.printable(name), 16), cast.colours.get(owner, GREY)
        raw = Line(label, colour, tokens, pictures.thinned(losses))
        mean = Line(label, colour, tokens, pictures.thinned(pictures.smoothed(losses)), dashed=cast.labels.get(owner) != name)
        groups.setdefault(entered.get(owner, ""), []).append((raw, mean))
    if not groups:
        return '<section id="training"><h2>Training</h2><p class="note">There are no training curves.</p></section>'
    boxes = "".join(_curves_box(competition, lines) for competition, lines in sorted(groups.items()))
    left_out = f" Not drawn, with fewer than three steps: {text(', '.join(short))}." if short else ""
    return (
        '<section id="training"><h2>Training</h2><p class="note">Tokens of different tokenizers differ: compare curves within a '
        f"picture only. Thin: each step; thick: their running mean; dashed: a later training of the same miner.{left_out}</p>"
        f'<div class="pair">{boxes}</div></section>'
    )


def _curves_box(competition: str, lines: Sequence[tuple[Line, Line]]) -> str:
    """The picture of one competition. What comes before a twentieth of the longest run is steep, and may be cut off above."""
    raw, mean = [line for line, _ in lines], [line for _, line in lines]
    start = max(line.x[-1] for line in mean) / 20
    top = max(y for line in mean for x, y in zip(line.x, line.y, strict=True) if x >= min(start, line.x[-1]))
    ends = "; ".join(f"{line.label} {line.y[-1]:.2f}" for line in mean)
    title = f"Competition {competition}" if competition else "No competition"
    picture = pictures.curves(raw, mean, top, f"{title}, training loss against tokens. At the end: {ends}.")
    highest = max(line.y[0] for line in mean)
    above = f" The first steps, from {highest:.1f} on, are above the picture." if highest > top else ""
    return markup.figure(text(title), picture, f"Nats per token at the end: {text(ends)}.{above}")


def _weights(records: Sequence[Record], published: Mapping[str, float], cast: Cast) -> str:
    columns = [(f"Block {r['block']:,}", r["weights"]) for r in records]
    columns.append(("On chain", published))
    order = sorted(cast.labels, key=lambda h: (-published.get(h, 0.0), -records[-1]["weights"].get(h, 0.0), cast.labels[h]))
    drawn = columns[-1 - MAX_PANELS :]
    shown = order[: 2 * MAX_MODELS]
    panels = [(title, [weights.get(h, 0.0) for h in shown]) for title, weights in drawn]
    said = "; ".join(f"{cast.labels[h]} {published.get(h, 0.0):.3f}" for h in shown)
    picture = pictures.weights([cast.picture(h) for h in shown], panels, markup.printable(f"Weights; on chain: {said}."))
    rows = []
    for hotkey in order:
        cells = "".join(_weight_cell(weights.get(hotkey, 0.0)) for _, weights in columns)
        rows.append(markup.row(cast.link(hotkey), cells))
    table = markup.table("Shares of 1", markup.header("Miner", *(f"#{title}" for title, _ in columns)), rows)
    caption = "What each round decided, and what the chain has now; all on one scale."
    return (
        '<section id="weights"><h2>Weights</h2><p class="note">A round moves the weights only part of the way, so that '
        "one lucky window does not decide all. The chain keeps 16 bits of each.</p>"
        f'<div class="pair">{markup.figure("", picture, caption)}{table}</div></section>'
    )


def _hotkeys(records: Sequence[Record], cast: Cast) -> str:
    """Everybody in full, to be copied."""
    models = {o["hotkey"]: o["model"] for r in records for o in _outcomes(r) if o["model"]}
    refused = {o["hotkey"] for r in records for o in _outcomes(r) if o["status"] != "evaluated"}
    rows = []
    for hotkey in sorted(cast.labels, key=lambda h: (cast.labels[h], h)):
        why = f"<br>{_to_refusal(hotkey)}" if hotkey in refused else ""
        cells = f'<td class="why"><code class="whole">{text(hotkey)}</code>{why}</td>'
        cells += f'<td class="why"><code>{text(models.get(hotkey, "–"))}</code></td>'
        rows.append(markup.row(f'<span id="h-{text(hotkey)}">{cast.html(hotkey)}</span>', cells))
    table = markup.table("A click on a hotkey selects all of it", markup.header("Miner", "Hotkey", "Newest model"), rows)
    more = "More of one miner: <code>sn29 explain HOTKEY</code> with <code>--records</code> and the folder of these rounds."
    return f'<section id="hotkeys"><h2>Hotkeys and models</h2><p class="note">{more}</p>{table}</section>'


def _to_refusal(hotkey: str) -> str:
    return f'<a href="#r-{text(hotkey)}">what to do</a>'


def _weight_cell(weight: float) -> str:
    return f'<td class="n">{weight:.4f}</td>' if weight else '<td class="n none">0</td>'


def _refusals(records: Sequence[Record], cast: Cast) -> str:
    blocks: dict[tuple[str, str, str, str], list[int]] = {}
    for record in records:
        for o in _outcomes(record):
            if o["status"] != "evaluated":
                blocks.setdefault((o["hotkey"], o["competition"], o["reason"], said_of(o, cast)), []).append(record["block"])
    if not blocks:
        return '<section id="refusals"><h2>Refusals</h2><p class="note">Nobody was refused.</p></section>'
    rows, linked = [], set[str]()
    for (hotkey, competition, reason, said), seen in sorted(blocks.items(), key=lambda kv: (cast.labels[kv[0][0]], kv[1])):
        blocks_seen = markup.listed([f"{block:,}" for block in seen])
        cells = f'<td>{text(competition) or "–"}</td><td class="why"><b>{text(reason)}</b> {text(said)}</td>'
        cells += f'<td class="why">{advice(reason)}</td><td>{blocks_seen}</td>'
        first = "" if hotkey in linked else f' id="r-{text(hotkey)}"'
        linked.add(hotkey)
        rows.append(markup.row(f"<span{first}>{cast.link(hotkey)}</span>", cells))
    head = markup.header("Miner", "Competition", "Reason", "What to do", "Rounds of block")
    return f'<section id="refusals"><h2>Refusals</h2>{markup.table("Who was not evaluated, and why", head, rows)}</section>'


def _made_from(records: Sequence[Record]) -> str:
    rows = []
    for record in reversed(records):
        for name, part in sorted(record["competitions"].items()):
            seed = part["window"]["seed"]
            rows.append(
                f'<tr><th scope="row" class="n">{record["block"]:,}</th><td>{text(name)}</td>'
                f'<td class="n">{part["window"]["index"]:,}</td><td class="n">{seed["block"]:,}</td>'
                f'<td class="why hash"><code>{text(seed["hash"])}</code></td>'
                f'<td class="why hash"><code>{text(record["rules"].get(name, ""))}</code></td></tr>'
            )
    head = markup.header("#Round of block", "Competition", "#Window", "#Seed block", "Its hash", "sha256 of the rules’ file")
    newest = records[-1]
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in sorted(newest["versions"].items()))
    machine = newest.get("machine", {})
    ran = f" Evaluated on {text(machine['device'])} in {text(machine['dtype'])}." if machine else ""
    return (
        f'<section id="made-from"><h2>What this page was made from</h2><p class="note">{versions}.{ran}</p>'
        f"{markup.table('The seed block’s hash draws the samples; commitments are read as of the block before it', head, rows)}"
        "</section>"
    )


# ---- what the records say ----------------------------------------------------------------------------------------------


def _outcomes(record: Record) -> list[Mapping[str, Any]]:
    """Of all competitions, and of those that named none."""
    return [*record["no_competition"], *(o for _, c in sorted(record["competitions"].items()) for o in c["outcomes"])]


def _competitions(records: Sequence[Record]) -> list[str]:
    return sorted({name for record in records for name in record["competitions"]})


def said_status(status: str) -> str:
    """A record's word, as HTML, as everything that people read has it."""
    return text("refused" if status == "rejected" else status)


def said_of(outcome: Mapping[str, Any], cast: Cast) -> str:
    """The outcome's sentence with both values. Its own hotkey is in the row already; others are called by their names."""
    said = str(outcome["detail"] or outcome["reason"]).removeprefix(f"{outcome['hotkey']}: ")
    for hotkey, label in cast.labels.items():
        said = said.replace(hotkey, label)
    return said


def advice(reason: str) -> str:
    """As HTML; what stands between backquotes is a command."""
    known = {r.code: r.advice for r in Reason}
    return re.sub("`([^`]+)`", r"<code>\1</code>", text(known.get(reason) or _ADVICE.get(reason, "")))
