"""Pieces of HTML: text that is escaped, tables that scroll, pictures with captions.

What is put together here (head, cells, rows, foot; a picture's title and caption) is HTML already; the rest is plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape


def text(value: object) -> str:
    """Anything as HTML text or attribute."""
    return escape(printable(str(value)))


def printable(string: str) -> str:
    """Control characters, lone surrogates and marks that turn the writing direction become a box."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in string)


def cut(string: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where some are left out."""
    return string if len(string) <= length else string[: length - 1] + "…"


def number(value: float, form: str) -> str:
    """With the format `form`; +inf as its sign."""
    return format(value, form) if math.isfinite(value) else "∞"


def count(how_many: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{how_many:,} {noun}{'' if how_many == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`; of more than five, `a to z`."""
    if len(words) > 5:
        return f"{words[0]} to {words[-1]}"
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def header(*titles: str) -> str:
    """Column titles; those that start with # stand over numbers."""
    return "".join(f'<th scope="col"{" class=n" if t.startswith("#") else ""}>{text(t.removeprefix("#"))}</th>' for t in titles)


def row(head: str, cells: str, kind: str = "") -> str:
    """The first cell is the row's title; `kind` is its class."""
    return f'<tr{kind and f" class={kind}"}><th scope="row">{head}</th>{cells}</tr>'


def table(caption: str, head: str, rows: Sequence[str], foot: str = "") -> str:
    """In a box of its own that scrolls where the screen is narrow, also with the keyboard; rows with sentences become cards
    there, whose cells are named by their columns' titles."""
    titles = re.findall(r"<th [^>]*>([^<]*)</th>", head)[1:]
    has_sentences = any('<td class="why' in row for row in rows)
    body = "\n".join(_named(row, titles) if has_sentences else row for row in rows)
    return (
        f'<div class="box{" cards" if has_sentences else ""}" role="region" aria-label="{text(caption)}" tabindex="0"><table>'
        f"<caption><span>{text(caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>{foot}</table></div>"
    )


def _named(row: str, titles: Sequence[str]) -> str:
    """With its column's title on each cell. Nothing that a stranger wrote holds a `<`: it is escaped."""
    left = iter(titles)
    return re.sub(r"<td(?![^>]* colspan)", lambda _: f'<td data-title="{next(left, "")}"', row)


def figure(title: str, picture: str, caption: str) -> str:
    """A picture under its title, explained below."""
    heading = f"<h3>{title}</h3>" if title else ""
    return f"<figure>{heading}<div>{picture}</div><figcaption>{caption}</figcaption></figure>"
