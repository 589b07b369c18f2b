"""The page's pictures: numbers in, SVG text out, the same bytes for the same numbers.

Text stays text, in the page's own font, and every colour is a variable of the page's style sheet, so that one picture is
right on light and on dark paper. One unit is one CSS pixel; pictures are made for a column of 420, a phone's width.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sn29.report.style import GREY, MINERS, ROLES, variables

WIDTH = 420
MAX_POINTS = 300
"""Points that a line is drawn with; more cannot be seen in a picture this wide."""

_INK, _MUTED, _RULE = (ROLES[name][0] for name in ("ink", "muted", "rule"))
_MORE, _LESS = ROLES["more"][0], ROLES["less"][0]
_CHARACTER = 8.2  # width of a character of a short hotkey at 12 px, rounded up: the reader’s font is not known
_SETTINGS: Mapping[str, object] = {
    "svg.fonttype": "none",  # text, not outlines
    "text.parse_math": False,  # a name with $ in it is a name
    "font.family": "DejaVu Sans",  # comes with matplotlib; for measuring only
    "font.size": 12,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 1,
    "axes.unicode_minus": True,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "path.simplify": False,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a picture, with its name at its end."""

    label: str
    colour: int
    """Index into the palette."""
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def win_matrix(
    names: Sequence[tuple[str, int]], wins: Sequence[Sequence[int]], plain: Sequence[Sequence[int]], num_samples: int, alt: str
) -> str:
    """Row against column: on how many samples, large with the row's advantage, small without. `names`: (label, colour)."""
    longest = max(len(label) for label, _ in names) * _CHARACTER
    left = longest + 24
    side = min(92.0, max(46.0, (WIDTH - left - 4) / len(names)))
    steep = longest > side - 8
    top = longest * 0.72 + 22 if steep else 30.0
    width, height = max(WIDTH, left + side * len(names) + (longest * 0.6 if steep else 4)), top + side * len(names) + 4
    with _figure(width, height) as figure:
        axes = _axes(figure, 0, 0, width, height)
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        for row, (label, colour) in enumerate(names):
            middle = top + side * (row + 0.5)
            axes.plot([6], [middle], "o", color=_miner(colour), markersize=7, markeredgewidth=0)
            axes.text(17, middle, label, color=_INK, va="center_baseline")
            across = left + side * (row + (0.5 if not steep else 0.42))
            angle, where = (40, "left") if steep else (0, "center")
            axes.text(across, top - 8, label, color=_INK, ha=where, va="baseline", rotation=angle, rotation_mode="anchor")
            for column in range(len(names)):
                cell = None if row == column else (wins[row][column], plain[row][column])
                _cell(axes, left + side * column, top + side * row, side - 2, cell, num_samples)
        return _svg(figure, "matrix", alt, wide=width > WIDTH)


def differences(lines: Sequence[Line], holder: str, alt: str) -> str:
    """Each model's loss less the holder's, sample by sample, sorted; x is the share of samples, 0 to 100."""
    ends = max(len(line.label) for line in lines) * _CHARACTER + 22
    with _figure(WIDTH, 260) as figure:
        axes = _axes(figure, 48, 40, WIDTH - 48 - ends, 206)
        _grid(axes)
        axes.axhline(0, color=_MUTED, linewidth=1)
        for line in lines:
            axes.plot(line.x, line.y, color=_miner(line.colour), linewidth=2, solid_capstyle="round")
        axes.set_xlim(0, 100)
        axes.margins(y=0.06)
        axes.set_xlabel("samples, lowest difference first (%)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.14 * (high - low)), max(high, 0.0))  # room for the words under the zero line
        axes.annotate(
            f"below: less loss than {holder}", (1, 0), (-6, -6), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="top", color=_MUTED, fontsize=11,
        )  # fmt: skip
        axes.set_title("nats", loc="left", fontsize=11, color=_MUTED, x=-0.02, pad=4, ha="right")
        _label_ends(axes, lines)
        return _svg(figure, "differences", alt)


def curves(lines: Sequence[Line], smooth: Sequence[Line], top: float, alt: str) -> str:
    """Loss against tokens up to a loss of `top`: raw in light, smoothed on top, with the name at the end."""
    ends = max(len(line.label) for line in smooth) * _CHARACTER + 14
    with _figure(WIDTH, 280) as figure:
        axes = _axes(figure, 36, 40, WIDTH - 36 - ends, 222)
        _grid(axes)
        for line in lines:
            axes.plot(line.x, line.y, color=_miner(line.colour), linewidth=1, alpha=0.28)
        for line in smooth:
            axes.plot(line.x, line.y, color=_miner(line.colour), linewidth=2, linestyle=(0, (4, 1.6)) if line.dashed else "-")
        axes.set_xlim(0, max(line.x[-1] for line in smooth))
        low = min(min(line.y) for line in lines)
        axes.set_ylim(low - 0.06 * (top - low), max(top, low + 0.01))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.set_xlabel("tokens seen")
        axes.set_title("nats per token", loc="left", fontsize=11, color=_MUTED, pad=4, x=-0.1)
        _label_ends(axes, smooth)
        return _svg(figure, "curves", alt)


def training_curve(tokens: Sequence[float], losses: Sequence[float], alt: str) -> str:
    """A file of its own: loss in nats per token against scored tokens, each step in light and smoothed on top."""
    x, y = list(tokens), list(losses)
    mean = smoothed(y)
    top = max(mean[len(y) // 50 :])
    raw, smooth = Line("", 0, thinned(x), thinned(y)), Line("loss", 0, thinned(x), thinned(mean))
    return standalone(curves([raw], [smooth], top * 1.02, alt))


def gaps(rows: Sequence[tuple[str, float, tuple[float, float] | None, tuple[float, float]]], alt: str) -> str:
    """Differences in percent, one below the other: (label, value, wide interval in light or None, narrow one in dark)."""
    line, width = 46, WIDTH
    height = 26 + line * len(rows) + 24
    ends = [0.0, *(x for _, value, wide, narrow in rows for x in (value, *(wide or ()), *narrow))]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.1
    with _figure(width, height) as figure:
        axes = _axes(figure, 8, 30, width - 70, height - 38)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(rows), 0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=11, pad=5)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %".replace("-", "−") if value else "0"))
        axes.axvline(0, color=_MUTED, linewidth=1)
        for row, (label, value, wide, narrow) in enumerate(rows):
            at = row + 0.68
            colour = _MORE if value <= 0 else _LESS
            if wide is not None:
                axes.plot(wide, (at, at), color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
            axes.plot(narrow, (at, at), color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot([value], [at], "o", color=colour, markersize=7, markeredgewidth=0)
            behind = {"facecolor": ROLES["paper"][0], "linewidth": 0, "pad": 1.5}  # the line at 0 does not cross the name
            axes.text(
                0, row + 0.22, label, color=_INK, fontsize=11, va="center", transform=axes.get_yaxis_transform(), bbox=behind
            )
            shown = f"{value:+.2f} %".replace("-", "−")
            axes.text(1.01, at, shown, color=_INK, fontsize=11, va="center", transform=axes.get_yaxis_transform())
        return _svg(figure, "gaps", alt)


def above(lines: Sequence[Line], along: str, what: str, alt: str, *, doubling: bool = False) -> str:
    """Lines about a baseline at 0; `doubling`: each step to the right is twice as far."""
    ends = max(len(line.label) for line in lines) * _CHARACTER + 22
    with _figure(WIDTH, 280) as figure:
        axes = _axes(figure, 46, 40, WIDTH - 46 - ends, 218)
        _grid(axes)
        axes.axhline(0, color=_MUTED, linewidth=1)
        first = math.log2(min(line.x[0] for line in lines)) if doubling else 0.0
        drawn = [Line(n.label, n.colour, [math.log2(x) - first for x in n.x], n.y) if doubling else n for n in lines]
        for line in drawn:
            mark = "o" if doubling else ""
            axes.plot(line.x, line.y, color=_miner(line.colour), linewidth=2, marker=mark, markersize=4, clip_on=False)
        axes.set_xlim(0, max(line.x[-1] for line in drawn))
        axes.xaxis.set_major_locator(MaxNLocator(9 if doubling else 4, integer=doubling, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{2 ** round(x + first)}" if doubling else _short(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
        axes.set_xlabel(along)
        axes.set_title(what, loc="left", fontsize=11, color=_MUTED, pad=4, x=-0.1)
        _label_ends(axes, drawn)
        return _svg(figure, "above", alt)


def weights(names: Sequence[tuple[str, int]], panels: Sequence[tuple[str, Sequence[float]]], alt: str) -> str:
    """Bars, a panel for each (title, weights in the order of `names`), all on one scale."""
    left = max(len(label) for label, _ in names) * _CHARACTER + 24
    gap, line = 14, 22
    across = max(80.0, (WIDTH - left - gap * (len(panels) - 1)) / len(panels))
    width, height = max(WIDTH, left + len(panels) * (across + gap) - gap), 26 + line * len(names) + 4
    scale = (across - 46) / max([w for _, row in panels for w in row if w > 0] or [1.0])
    with _figure(width, height) as figure:
        axes = _axes(figure, 0, 0, width, height)
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        for row, (label, colour) in enumerate(names):
            middle = 26 + line * (row + 0.5)
            axes.plot([6], [middle], "o", color=_miner(colour), markersize=7, markeredgewidth=0)
            axes.text(17, middle, label, color=_INK, va="center_baseline")
        for panel, (title, values) in enumerate(panels):
            start = left + panel * (across + gap)
            axes.text(start, 14, title, color=_MUTED, fontsize=11)
            axes.plot([start, start], [24, height - 4], color=_RULE, linewidth=1)
            for row, (value, (_, colour)) in enumerate(zip(values, names, strict=True)):
                middle = 26 + line * (row + 0.5)
                axes.add_patch(Rectangle((start, middle - 6), value * scale, 12, facecolor=_miner(colour), linewidth=0))
                shown, ink = (f"{value:.3f}", _INK) if value else ("0", _MUTED)
                axes.text(start + value * scale + 5, middle, shown, color=ink, fontsize=11, va="center_baseline")
        return _svg(figure, "weights", alt, wide=width > WIDTH)


def history(lines: Sequence[Line], crowns: Sequence[tuple[float, int | None]], alt: str) -> str:
    """Weights, 0 to 1, against blocks; above them a band that has the colour of who held the crown: (block, colour or None)."""
    ends = max([len(line.label) for line in lines] or [0]) * _CHARACTER + 16
    first, last = crowns[0][0], crowns[-1][0]
    step = (last - first) / max(1, len(crowns) - 1) or 1.0
    length = last + step - first  # the newest round is as long as the others
    with _figure(WIDTH, 300) as figure:
        axes = _axes(figure, 40, 40, WIDTH - 40 - ends, 184)
        band = _axes(figure, 40, 266, WIDTH - 40 - ends, 10)
        _grid(axes)
        for line in lines:
            marker = "o" if len(line.x) < 12 else ""
            axes.plot(line.x, line.y, color=_miner(line.colour), linewidth=2, marker=marker, markersize=4, clip_on=False)
        axes.set_xlim(first, first + length)
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axes.set_xticks([first, last] if last > first else [first], [f"block {first:,.0f}", f"{last:,.0f}"][: 1 + (last > first)])
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        if last > first:
            axes.get_xticklabels()[1].set_horizontalalignment("center")
        axes.text(0, 1.05, "weight, %", transform=axes.transAxes, ha="left", va="bottom", fontsize=11, color=_MUTED)
        band.set_axis_off()
        band.set_xlim(first, first + length)
        band.set_ylim(0, 1)
        ends_at = [*(block for block, _ in crowns[1:]), first + length]
        for (block, colour), end in zip(crowns, ends_at, strict=True):
            if colour is not None and end > block:
                band.add_patch(Rectangle((block, 0), end - block, 1, facecolor=_miner(colour), linewidth=0))
        band.text(0, 1.5, "who held the crown", transform=band.transAxes, va="bottom", fontsize=11, color=_MUTED)
        if lines:
            _label_ends(axes, [Line(n.label, n.colour, [x - first for x in n.x], n.y) for n in lines], across=length)
        return _svg(figure, "history", alt)


def lengths(names: Sequence[str], documents: Sequence[float], tokens: Sequence[float], alt: str) -> str:
    """Bars, two for each bucket of lengths: its share of the documents and of the tokens, 0 to 1."""
    with _figure(WIDTH, 260) as figure:
        axes = _axes(figure, 40, 40, WIDTH - 48, 190)
        _grid(axes)
        for shares, colour, shift, label in ((documents, GREY, -0.2, "of the documents"), (tokens, 0, 0.2, "of the tokens")):
            places = [at + shift for at in range(len(shares))]
            axes.bar(places, [100 * share for share in shares], 0.38, color=_miner(colour), label=label)
        every = -(-len(names) // 9)  # more would touch each other
        axes.set_xticks(range(0, len(names), every), names[::every])
        axes.set_xlabel("tokens of a document, from here to twice as many")
        axes.set_title("%", loc="left", fontsize=11, color=_MUTED, x=-0.06, pad=4)
        axes.legend(frameon=False, fontsize=11, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, labelcolor=_INK)
        return _svg(figure, "lengths", alt)


def never_seen(megabytes: Sequence[float], shares: Sequence[float], alt: str) -> str:
    """Percent of a vocabulary that is in no text so far, against the size of the text: each step to the right is twice as far."""
    with _figure(WIDTH, 260) as figure:
        axes = _axes(figure, 40, 44, WIDTH - 64, 186)
        _grid(axes)
        axes.plot([math.log2(x) for x in megabytes], shares, color=_miner(0), linewidth=2, marker="o", markersize=4)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{2.0**x:g}" if x >= 0 else f"1/{2.0**-x:g}"))
        axes.set_xlabel("MB of text")
        axes.set_title("% never seen", loc="left", fontsize=11, color=_MUTED, x=-0.06, pad=11)
        axes.annotate(
            f"{shares[-1]:.1f}", (math.log2(megabytes[-1]), shares[-1]), (0, 8), textcoords="offset points", ha="center",
            color=_INK, fontsize=11,
        )  # fmt: skip
        return _svg(figure, "never-seen", alt)


def repetition(names: Sequence[str], epochs: Sequence[float], most: float, along: str, alt: str) -> str:
    """A bar for each name: how often its text comes, on a scale of doublings; those above `most` in another colour. Infinity is
    no bar: there is no text."""
    there = [each for each in epochs if math.isfinite(each)]
    with _figure(WIDTH, 260) as figure:
        axes = _axes(figure, 44, 40, WIDTH - 52, 190)
        _grid(axes)
        low = math.floor(min([0.0, *map(math.log2, there)])) - 1
        for at, each in enumerate(epochs):
            if math.isfinite(each):
                axes.bar(at, math.log2(each) - low, 0.6, bottom=low, color=_LESS if each > most else _MORE)
            else:
                axes.annotate("no text", (at, low), (0, 6), textcoords="offset points", ha="center", color=_MUTED, fontsize=11)
        axes.axhline(math.log2(most), color=_MUTED, linewidth=1)
        axes.set_ylim(low, max([*map(math.log2, there), math.log2(most)]) + 0.6)
        axes.yaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{2.0**y:g}" if y >= 0 else f"1/{2.0**-y:g}"))
        every = -(-len(names) // 9)
        axes.set_xticks(range(0, len(names), every), names[::every])
        axes.set_xlabel(along)
        axes.set_title("times", loc="left", fontsize=11, color=_MUTED, x=-0.06, pad=4)
        return _svg(figure, "repetition", alt)


def gates(
    whole: Sequence[float],
    least: Sequence[float],
    sets: Sequence[tuple[int, float, str]],
    shares: Sequence[float],
    costs: Sequence[float],
    moved: Sequence[float],
    tolerance: float,
    alt: str,
) -> str:
    """Two panels, the change of the loss in percent on a log scale beyond -0.1 and 0.1: by layer, and by share of gates removed.

    By layer: its whole MLP removed (bars), its least 90 % (dots), and the named sets: (layer, percent, names). By share: of all
    documents (`costs`) and of one, up or down (`moved`).
    """
    linear, height = 0.1, 520
    with _figure(WIDTH, height) as figure:
        upper, lower = _axes(figure, 44, 300, WIDTH - 56, 190), _axes(figure, 44, 40, WIDTH - 56, 190)
        values = [*whole, *least, *costs, *moved, *(percent for _, percent, _ in sets)]
        low, top = min(-linear, 2 * min(values)), 4 * max(*values, 10.0)
        powers = [10.0**n for n in range(-1, 1 + int(math.log10(top)))]
        for axes, title in ((upper, "% more loss, by layer"), (lower, "% more loss, by share of all gates removed")):
            _grid(axes)
            axes.set_yscale("symlog", linthresh=linear, linscale=0.4)
            axes.set_ylim(low, top)
            axes.set_yticks([*(-power for power in reversed(powers) if -power >= low), 0.0, *powers])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
            axes.minorticks_off()
            axes.axhline(0, color=_MUTED, linewidth=1)
            axes.set_title(title, loc="left", fontsize=11, color=_MUTED, pad=4, x=-0.1)
        upper.bar(range(len(whole)), whole, 0.7, color=_miner(GREY), alpha=0.45, label="whole MLP")
        upper.plot(range(len(least)), least, "o", color=_miner(0), markersize=4, label="its least 90 %")
        _name_sets(upper, sets, len(whole))
        upper.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        lower.plot(shares, moved, color=_miner(GREY), linewidth=5, alpha=0.5, label="one document, up or down")
        lower.plot(shares, costs, color=_miner(0), linewidth=2, marker="o", markersize=3, label="all documents")
        for bound in (-tolerance, tolerance):
            lower.axhline(bound, color=_MUTED, linewidth=1, linestyle=(0, (4, 1.6)))
        upper.legend(frameon=False, fontsize=11, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, labelcolor=_INK)
        lower.legend(frameon=False, fontsize=11, loc="upper left", labelcolor=_INK)
        lower.set_xlim(0, 100)
        lower.set_xlabel("% of the gates, the least important first")
        return _svg(figure, "gates", alt)


def _name_sets(axes: Axes, sets: Sequence[tuple[int, float, str]], layers: int) -> None:
    """Markers, with names left of them in the last third of the layers, else right of them; none lies on another."""
    bottom, top = (axes.transData.transform((0, limit))[1] for limit in axes.get_ylim())
    for right in (False, True):
        side = [(layer, percent, name) for layer, percent, name in sets if (layer > 0.6 * layers) == right]
        ups = [190 * (axes.transData.transform((0, percent))[1] - bottom) / (top - bottom) for _, percent, _ in side]
        for (layer, percent, name), at, up in zip(side, ups, spread(ups, 14, 4, 186) if side else [], strict=True):
            axes.plot([layer], [percent], "D", color=_miner(1), markersize=6)
            axes.annotate(
                name, (layer, percent), (-8 if right else 8, up - at), textcoords="offset points",
                ha="right" if right else "left", va="center", color=_miner(1), fontsize=11,
            )  # fmt: skip


def standalone(svg: str) -> str:
    """A picture as a file of its own: its colours follow the reader's light or dark paper, as on the page."""
    light, dark = ("".join(f"--{name}:{pair[at]};" for name, pair in variables().items()) for at in (0, 1))
    style = f"svg{{{light}background:var(--paper)}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    head, _, rest = svg.partition(">")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} {spaces} font-family="system-ui, sans-serif"><style>{style}</style>{rest}\n'


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean over about a fifteenth of the values: symmetric at the steep start, one-sided at the end."""
    half = max(1, len(values) // 30)
    sums = list(accumulate(values, initial=0.0))
    found = []
    for at in range(len(values)):
        first, end = at - min(at, half), min(at + min(at, half) + 1, len(values))
        found.append((sums[end] - sums[first]) / (end - first))
    return found


def thinned(values: Sequence[float]) -> list[float]:
    """At most MAX_POINTS of the values, evenly taken, first and last among them."""
    if len(values) <= MAX_POINTS:
        return list(values)
    return [values[round(i * (len(values) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved as little as needed so that no two are nearer than `gap` and all lie between low and high.

    When there is no room for that they go below `low`.
    """
    order = sorted(range(len(places)), key=lambda i: -places[i])
    moved = list(places)
    ceiling = high
    for i in order:
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    floor = low
    for i in reversed(order):
        if moved[i] >= floor:
            break
        moved[i] = floor
        floor += gap
    return moved if moved[order[0]] <= high else [high - gap * order.index(i) for i in range(len(places))]


# ---- parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with rc_context(dict(_SETTINGS)):  # type: ignore[arg-type]
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """In pixels from the picture's lower left corner."""
    across, up = figure.get_size_inches() * 72
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.patch.set_visible(False)
    return axes


def _grid(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=_RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, pad=5)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _cell(axes: Axes, x: float, y: float, side: float, cell: tuple[int, int] | None, num_samples: int) -> None:
    if cell is None:
        axes.text(x + side / 2, y + side / 2, "–", color=_MUTED, ha="center", va="center")
        return
    won, plain = cell
    lean = won / max(1, num_samples) - 0.5
    colour, strength = (_MORE if lean > 0 else _LESS), 0.06 + 0.84 * abs(lean)
    axes.add_patch(Rectangle((x, y), side, side, facecolor=colour, alpha=round(strength, 3), linewidth=0))
    axes.text(x + side / 2, y + side / 2 + 1, f"{won}", color=_INK, ha="center", va="baseline", fontsize=15)
    axes.text(x + side / 2, y + side / 2 + 15, f"{plain}", color=_INK, ha="center", va="baseline", fontsize=10.5)


def _label_ends(axes: Axes, lines: Sequence[Line], across: float = 0.0) -> None:
    """Names right of the picture, moved apart, each tied to the end of its line by a thin stroke. across: where the picture ends,
    unless it begins at 0."""
    low, high = axes.get_ylim()
    box = axes.get_window_extent()
    ends = [(line.y[-1] - low) / (high - low) * box.height for line in lines]
    for line, end, place in zip(lines, ends, spread(ends, 15, 4, box.height - 4), strict=True):
        x = line.x[-1] / (across or axes.get_xlim()[1]) * box.width
        axes.plot(
            [x / box.width, 1, 1 + 11 / box.width], [end / box.height, end / box.height, place / box.height],
            color=_miner(line.colour), linewidth=1, alpha=0.55, transform=axes.transAxes, clip_on=False,
        )  # fmt: skip
        axes.text(
            1 + 14 / box.width, place / box.height, line.label, color=_miner(line.colour), va="center_baseline",
            transform=axes.transAxes,
        )  # fmt: skip


def _short(value: float) -> str:
    """1,500 as 1.5k and 2,000,000 as 2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _miner(colour: int) -> str:
    return MINERS[colour % len(MINERS)][0]


def _svg(figure: Figure, name: str, alt: str, *, wide: bool = False) -> str:
    """The picture as an element of an HTML page: no prolog, no metadata, no ids but its own, colours as variables."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": f"{name} {alt}"}), warnings.catch_warnings():  # ids that no other picture of the page has
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's font has them
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    drawn = stream.getvalue()
    inner = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, flags=re.DOTALL)  # it would apply to the whole page
    inner = inner.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    for variable, (light, _) in variables().items():
        inner = inner.replace(light, f"var(--{variable})")
    across, up = (round(x) for x in figure.get_size_inches() * 72)
    kind = ' class="wide"' if wide else ""
    head = f'<svg{kind} role="img" aria-label="{escape(alt)}" viewBox="0 0 {across} {up}" width="{across}" height="{up}">'
    return head + re.sub(r"\n\s*", "\n", inner).strip()
