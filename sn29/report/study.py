"""The packing study as Markdown, CSV and one HTML file: the same bytes for the same finished runs.

    study (training/study_results.py) -> tables -> study.md, study.html, terminal
                                      -> every number, one a line -> study.csv
                                      -> the three modes as a picture -> study.svg

Losses are nats a token. The HTML file is self-contained: no script, no request; its pictures are inline.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from sn29.report import markup, pictures
from sn29.report.markup import text
from sn29.report.pictures import Line
from sn29.report.style import css
from sn29.training.packing_study import ARMS, REFERENCE
from sn29.training.study_results import DRAWS, Cell, Curve, Difference, Interval, Study

_COLUMNS = (
    {"single": "one by one", "packed": "packed rows", "single_eos": "EOS in front"},
    {"single_eos_all": "EOS, all tokens", "packed_rest": "packed, rest", "packed_first": "packed, firsts"},
)
"""Of two tables, which fit 80 characters each."""
_GROUPS = {
    "modes": ("The three modes, equal scored tokens", "Below zero: the first one has the lower loss."),
    "terms": ("Which part of it does what", ""),
    "start token": ("A start token", "All tokens: first tokens too, as this project's validators score."),
    "equal compute": ("Equal compute", "Each arm trained for the FLOP that `packed` takes for its tokens."),
    "packed first, then": (
        "Packed first, then otherwise",
        "Each `packed` model trained on with 5 % more tokens; against the one that went on packed, and against stopping, which "
        "is what the subnet's seed reported (0.2 % lower).",
    ),
    "learning rate": (
        "Is the learning rate fair?",
        "Half and twice the highest rate against the plan's, one by one; of a study's first seed alone, so that no interval says "
        "what another training would. Fair: none gains much, and all about the same.",
    ),
}  # fmt: skip
_COLOURS = {"packed": 1, "unpacked": 0, "masked": 2, "unpacked+start": 6, "masked+start": 4, "packed-first": 3,
            "unpacked-mixed": 5}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """Plain text; a column whose title starts with # holds numbers."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(study: Study) -> list[Table]:
    """All that the report says in numbers."""
    found = [table for number in range(len(_COLUMNS)) if (table := _losses(study, number)).rows]
    for group in _GROUPS:
        if chosen := _of_group(study, group):
            found.append(_answers(group, chosen))
    found += [t for t in (_places(study, "single", "unpacked"), _places(study, "packed", REFERENCE)) if t.rows]
    return [*found, *(t for t in (_throughput(study), _goals(study)) if t.rows)]


def markdown(study: Study) -> str:
    """study.md."""
    parts = [f"# What packing costs: {_model(study)}", "", *_method(study)]
    for table in tables(study):
        parts += ["", f"## {table.title}", "", _markdown_table(table)]
        if table.note:
            parts += ["", table.note]
    parts += ["", "## Again", "", f"    {command(study)}", "", _versions(study)]
    return "\n".join(parts) + "\n"


def html(study: Study) -> str:
    """study.html."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    title = f"What packing costs: {_model(study)}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{css()}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>",
        '<div class="lead">' + "".join(f"<p>{_words(line)}</p>" for line in _method(study) if line) + "</div>",
    ]
    drawn = _pictures(study)
    if drawn:
        parts.append(f'<section><h2>Pictures</h2><div class="pair">{"".join(drawn)}</div></section>')
    for table in tables(study):
        rows = [
            markup.row(text(row[0]), "".join(_cell(t, c) for t, c in zip(table.head[1:], row[1:], strict=True)))
            for row in table.rows
        ]
        shown = markup.table(table.note.replace("`", ""), markup.header(*table.head), rows)
        parts.append(f"<section><h2>{text(table.title)}</h2>{shown}</section>")
    parts.append(
        f"<section><h2>Again</h2><p><code>{text(command(study))}</code></p><p class=note>{text(_versions(study))}</p></section>"
    )
    return "\n".join(parts) + "\n</body>\n</html>\n"


def picture(study: Study) -> str:
    """study.svg: the three modes against each other; empty while there is nothing to compare."""
    chosen = _of_group(study, "modes")
    return pictures.standalone(_drawn_gaps("modes", chosen)) if chosen else ""


def comma_separated(study: Study) -> str:
    """study.csv: one number a line, with its intervals."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["what", "kind", "arm", "read", "against_kind", "against_arm", "against_read", "seed", "value", "unit",
         "seeds_low", "seeds_high", "documents_low", "documents_high"]
    )  # fmt: skip
    writer.writerows(_lines(study))
    return stream.getvalue()


def command(study: Study) -> str:
    """What makes this study anew: a command for each run of seeds that follow each other."""
    found = []
    for first in (seed for seed in study.seeds if seed - 1 not in study.seeds):
        many = next(n for n in count(1) if first + n not in study.seeds)
        after = f" --first-seed {first}" if first else ""
        found.append(f"sn29 study packing {study.head['flags']} --seeds {many}{after}")
    return " && ".join(found)


# --- words ------------------------------------------------------------------------------------------------------------


def _model(study: Study) -> str:
    size, tokens = study.head["parameters"] / 1e6, study.head["plan"]["tokens"] / 1e6
    return f"{size:.2f} million parameters, {tokens:g} million tokens, {markup.count(len(study.seeds), 'seed')}"


def _method(study: Study) -> list[str]:
    plan, documents = study.head["plan"], study.head["documents"]["training"]
    mean = documents["tokens_after_cut"] / documents["documents"]
    row = plan["row_tokens"]
    alike = " and ".join(f"`{arm.name}`" for arm in ARMS.values() if arm.by_length)
    return [
        f"A Llama of {plan['layers']} layers of {plan['hidden']} (vocabulary {plan['vocabulary']:,}) is trained from each seed "
        f"in each way on the same documents in the same order: {plan['tokens']:,} scored tokens, {plan['batch_tokens']:,} a "
        f"step, rows of {row}, AdamW, highest learning rate {plan['learning_rate']:g}, cosine. "
        f"Documents are cut to {row - 1} tokens (mean {mean:.0f} then, {row / (mean + 1):.1f} a row); end-of-text is a target "
        f"in all arms. Steps of {alike} have documents of like length, or half of the work would be padding; "
        "those of all other arms are mixed.",
        "",
        f"Evaluated on {study.documents:,} held-out documents, one by one and joined in packed rows. Intervals are 95 %: over "
        "seeds (Student's t on the differences inside a seed: would another training say the same?) and over documents (paired "
        f"bootstrap, {DRAWS:,} draws: would other documents?). Made from {markup.count(study.finished, 'finished run')}.",
        "",
        "Arms: " + "; ".join(f"`{arm.name}` {arm.says}" for arm in ARMS.values()) + ".",
    ]


def _versions(study: Study) -> str:
    head = study.head
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    return f"Text: {head['text']}, revision {head['revision'][:12]}; tokenizer {head['tokenizer'][:12]}; {versions}."


def percent(value: float) -> str:
    return f"{value:+.2f} %".replace("-", "−")


def interval(found: Interval | None) -> str:
    return "–" if found is None else f"{found.low:+.2f} to {found.high:+.2f}".replace("-", "−")


# --- tables -----------------------------------------------------------------------------------------------------------


def _losses(study: Study, number: int) -> Table:
    by_place = {(cell.kind, cell.arm, cell.view): cell for cell in study.cells}
    columns, rows = _COLUMNS[number], []
    for kind, label in (("tokens", "{}"), ("continued", "→ {}"), ("compute", "{} (FLOP)")):
        for arm in ARMS:
            if (kind, arm, "single") in by_place:
                rows.append((label.format(arm), *(_loss(by_place[kind, arm, view]) for view in columns)))
    seeds = study.cells[0].seeds if study.cells else ()
    of = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    note = (
        f"Nats a token, mean of {of}, ± half of its 95 % interval over seeds. A line: how trained (→: packed, then 5 % more "
        "tokens so; FLOP: as many as `packed` used). A column: how read (EOS in front: one by one, the same tokens).",
        "As above. EOS, all tokens: one by one, EOS in front, first tokens too. Packed: on packed rows, without first tokens and "
        "first tokens only.",
    )[number]
    heads = ("trained", *(f"#{title}" for title in columns.values()))
    return Table(("Losses", "Losses, read in more ways")[number], note, heads, tuple(rows))


def _loss(cell: Cell) -> str:
    if cell.over_seeds is None:
        return f"{cell.loss:.4f}"
    return f"{cell.loss:.4f} ± {(cell.over_seeds.high - cell.over_seeds.low) / 2:.4f}"


def _answers(group: str, chosen: Sequence[Difference]) -> Table:
    title, note = _GROUPS[group]
    rows = tuple(
        (d.question.asks, percent(d.percent), interval(d.over_seeds), interval(d.over_documents), f"{len(d.seeds)}")
        for d in chosen
    )
    return Table(
        title,
        note,
        ("first against second", "#loss", "#over seeds", "#over documents", "#seeds"),
        rows,
    )


def _places(study: Study, view: str, baseline: str) -> Table:
    arms = [arm for arm in ARMS if any(arm in place.differences for place in study.places[view])]
    rows = []
    for place in study.places[view]:
        if baseline in place.losses:
            cells = [_above(place.differences[arm]) if arm in place.differences else "–" for arm in arms]
            rows.append((_span(place.first, place.last), f"{place.losses[baseline]:.3f}", *cells))
    how = "one by one" if view == "single" else "on packed rows"
    note = f"Nats a token: of `{baseline}`, and how much more of the others (± over seeds). Token 1 is a document's first."
    if view == "single":
        note += " Arms with a start token are read with EOS in front."
    head = ("token of its document", f"#{baseline}", *(f"#{arm}" for arm in arms))
    return Table(f"By place in the document, {how}", note, head, tuple(rows))


def _above(found: tuple[float, Interval | None]) -> str:
    value, over = found
    shown = f"{value:+.3f}" + (f" ± {(over.high - over.low) / 2:.3f}" if over else "")
    return shown.replace("-", "−")


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"


def _throughput(study: Study) -> Table:
    rows = []
    for t in study.throughput:
        spread, flop = f"{t.slowest:,.0f} to {t.fastest:,.0f}", f"{t.flop_per_token / 1e6:.3f}"
        rows.append((t.arm, f"{t.tokens_per_second:,.0f}", spread, _times(t.against), flop, f"{100 * t.fill:.1f} %"))
    second = "second" if study.head["plan"]["device"] == "cuda" else "CPU second"
    note = (
        f"Scored tokens a {second} while the runs above were trained, median over seeds; the machine may have been busy, and "
        "`sn29 bench train` measures the modes in turns. MFLOP of a scored token: 6 a weight and token, 12 x layers x width a "
        "pair of tokens. Scored: of all tokens, padding included."
    )
    head = ("trained", "#tokens/s", "#slowest to fastest", "#x packed", "#MFLOP", "#scored")
    return Table("Throughput", note, head, tuple(rows))


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _goals(study: Study) -> Table:
    words = {True: "yes", False: "no", None: "not known"}
    return Table("What was hoped for", "", ("goal", "found", "met"), tuple((g.asks, g.found, words[g.met]) for g in study.goals))


def _markdown_table(table: Table) -> str:
    heads = [title.removeprefix("#") for title in table.head]
    rule = ["---:" if title.startswith("#") else "---" for title in table.head]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *table.rows))


def _cell(title: str, value: str) -> str:
    return f"<td{' class=n' if title.startswith('#') else ''}>{_words(value)}</td>"


def _words(value: str) -> str:
    """As HTML: what stands between `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(value))


# --- numbers, one a line ------------------------------------------------------------------------------------------------


def _lines(study: Study) -> Iterator[Sequence[object]]:
    for cell in study.cells:
        yield (
            "loss",
            cell.kind,
            cell.arm,
            cell.view,
            "",
            "",
            "",
            "",
            _number(cell.loss),
            "nats/token",
            *_ends(cell.over_seeds),
            "",
            "",
        )
    for d in study.differences:
        sides = (d.question.a.kind, d.question.a.arm, d.question.a.view, d.question.b.kind, d.question.b.arm, d.question.b.view)
        yield ("difference", *sides, "", _number(d.percent), "%", *_ends(d.over_seeds), *_ends(d.over_documents))
        for seed, value in zip(d.seeds, d.each, strict=True):
            yield ("difference of a seed", *sides, seed, _number(value), "%", "", "", "", "")
    for view, places in study.places.items():
        for place in places:
            for arm, loss in place.losses.items():
                where = f"{view}, tokens {place.first} to {place.last}"
                yield ("loss by place", "tokens", arm, where, "", "", "", "", _number(loss), "nats/token", "", "", "", "")
    for curve in study.curves:
        for tokens, loss in zip(curve.tokens, curve.losses, strict=True):
            yield (
                "curve",
                curve.kind,
                curve.arm,
                f"after {tokens:.0f} tokens",
                "",
                "",
                "",
                "",
                _number(loss),
                "nats/token",
                "",
                "",
                "",
                "",
            )
    for t in study.throughput:
        yield ("throughput", "tokens", t.arm, "", "", "", "", "", _number(t.tokens_per_second), "tokens/s", "", "", "", "")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _ends(found: Interval | None) -> tuple[str, str]:
    return ("", "") if found is None else (_number(found.low), _number(found.high))


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(study: Study) -> list[str]:
    """Figures as HTML, those for which there are numbers."""
    found = []
    for group in ("modes", "start token", "packed first, then"):
        if chosen := _of_group(study, group):
            title, note = _GROUPS[group]
            note = f"{_words(note)} Percent of the loss; dark: 95 % over documents, light: over seeds."
            found.append(markup.figure(text(title), _drawn_gaps(group, chosen), note))
    curves = {curve.arm: curve for curve in study.curves if curve.kind == "tokens" and curve.tokens}
    if "unpacked" in curves and len(curves) > 1 and all(len(curve.tokens) > 2 for curve in curves.values()):
        found += [_curves(curves), _gains(curves)]
    found += [
        drawn for view, base in (("single", "unpacked"), ("packed", REFERENCE)) if (drawn := _drawn_places(study, view, base))
    ]
    return found


def _of_group(study: Study, group: str) -> list[Difference]:
    return [d for d in study.differences if d.question.group == group]


def _drawn_gaps(group: str, chosen: Sequence[Difference]) -> str:
    rows = [(d.question.asks, d.percent, _pair(d.over_seeds), (d.over_documents.low, d.over_documents.high)) for d in chosen]
    said = "; ".join(f"{d.question.asks} {percent(d.percent)}" for d in chosen)
    return pictures.gaps(rows, f"{_GROUPS[group][0]}: {said}.")


def _pair(found: Interval | None) -> tuple[float, float] | None:
    return None if found is None else (found.low, found.high)


def _curves(curves: Mapping[str, Curve]) -> str:
    found = list(curves.values())
    lines = [Line(c.arm, _COLOURS[c.arm], c.tokens, c.losses) for c in found]
    said = ", ".join(f"{c.arm} {c.losses[-1]:.3f}" for c in found)
    top = max(c.losses[1] if len(c.losses) > 2 else c.losses[0] for c in found)
    drawn = pictures.curves(lines, lines, top, f"Loss of held-out documents against tokens. At the end: {said}.")
    note = "Some held-out documents one by one while it is trained (EOS in front for arms with a start token), mean over seeds."
    return markup.figure("Held-out loss while it is trained", drawn, note)


def _gains(curves: Mapping[str, Curve]) -> str:
    base = curves["unpacked"]
    lines = []
    for arm, curve in curves.items():
        if arm != "unpacked":
            points = list(zip(curve.tokens, curve.losses, base.losses, strict=False))[1:]
            lines.append(Line(arm, _COLOURS[arm], [p[0] for p in points], [100 * (p[1] / p[2] - 1) for p in points]))
    said = ", ".join(f"{line.label} {percent(line.y[-1])}" for line in lines)
    drawn = pictures.above(lines, "tokens seen", "% of unpacked’s loss", f"Held-out loss against unpacked's: {said}.")
    return markup.figure("The same, against unpacked", drawn, "Above zero: worse than one document a row.")


def _drawn_places(study: Study, view: str, baseline: str) -> str:
    places = study.places[view]
    lines = []
    for arm in ARMS:
        points = [(p.first, p.differences[arm][0]) for p in places if arm in p.differences and p.first > 1]
        if len(points) > 1:
            lines.append(Line(arm, _COLOURS[arm], [x for x, _ in points], [y for _, y in points]))
    if not lines:
        return ""
    how = "one by one" if view == "single" else "on packed rows"
    said = ", ".join(f"{line.label} {line.y[0]:+.2f} at its first" for line in lines)
    drawn = pictures.above(
        lines, "token of its document", f"nats above {baseline}", f"Loss by place, {how}: {said}.", doubling=True
    )
    return markup.figure(
        f"By place in the document, {how}", drawn, f"Nats a token above {baseline}, from the second token on; mean over seeds."
    )
