"""The page as a reader's browser gets it: read with html.parser, not searched for what the code happens to write."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import recorded

from sn29.errors import Reason
from sn29.report import pictures
from sn29.report.page import shown, write_page
from sn29.report.style import variables

VOID = {"meta", "link", "br", "path", "use", "rect"}  # SVG's paths close themselves
HOSTILE = "</td><script>alert(1)</script> \"onload='x' \u202e\x00\ud800"
ALICE, BOB, CAROL, DAVE, EVE, NOBODY = (f"5{name:e<46}z" for name in ("Alice", "Bob", "Carol", "Dave", "Eve", "Nobody"))
NAMES = {ALICE: "alice", BOB: "bob", CAROL: "carol", DAVE: "da$ve$ <b>", EVE: "eve"}


class Page(HTMLParser):
    """What an HTML parser finds: text by element, attributes, ids, and whether all elements are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.badly_closed: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.badly_closed.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str = "") -> str:
        """Words of the page, or of all elements `tag`, white space made single."""
        return " ".join(" ".join(data for where, data in self.texts if where != "style" and tag in ("", where)).split())


def outcome(
    hotkey: str, competition: str, block: int, status: str = "evaluated", reason: str = "", detail: str = ""
) -> dict[str, Any]:
    return {
        "hotkey": hotkey, "competition": competition, "block": block, "status": status, "model": f"x/y@{'a' * 40}",
        "content_id": "", "reason": reason, "detail": detail,
    }  # fmt: skip


def part(
    name: str, seed: int, losses: Mapping[str, list[float | None]], refused: list[dict[str, Any]], weights: list[float]
) -> dict[str, Any]:
    """One competition's record; `losses` in claim order, `weights` likewise; a loss of None cannot be scored."""
    hotkeys = list(losses)
    table = [[math.inf if x is None else x for x in losses[h]] for h in hotkeys]
    wins = [[sum(x < y for x, y in zip(a, b, strict=True)) for b in table] for a in table]
    return {
        "window": {"competition": name, "index": seed // 360, "seed": {"block": seed, "hash": f"0x{seed:064x}"}},
        "samples": [{"id": f"{i:032x}", "bytes": 100} for i in range(len(table[0]))] if table else [],
        "outcomes": [*(outcome(h, name, 10 * (i + 1)) for i, h in enumerate(hotkeys)), *refused],
        "losses": {h: [[x, 40, "" if x is not None else "4310 tokens, more than 4096"] for x in losses[h]] for h in hotkeys},
        "scores": [
            {"hotkey": h, "wins": 2.0 - i, "win_rate": 0.6 - 0.2 * i, "advantage": 0.996, "weight": w}
            for i, (h, w) in enumerate(zip(hotkeys, weights, strict=True))
        ],
        "win_matrix": {"hotkeys": hotkeys, "wins": wins, "wins_with_advantage": wins},
    }  # fmt: skip


def record(block: int, competitions: dict[str, Any], weights: dict[str, float], nowhere: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1, "block": block, "versions": {"sn29": "0.1.0", "torch": "2.13.0"},
        "rules": {name: f"{name}{'f' * 61}" for name in competitions}, "machine": {"dtype": "float32", "device": "cpu"},
        "no_competition": nowhere, "competitions": competitions, "weights": weights,
    }  # fmt: skip


COPY = outcome(
    EVE, "c00", 40, "rejected", "copy", f"{EVE}: {Reason.COPY.sentence} (got content 12ab, rule committed at 10 by {ALICE})"
)
GARBAGE = outcome(
    NOBODY, "", 41, "rejected", "malformed_commitment", f"{Reason.MALFORMED_COMMITMENT.sentence} (got {HOSTILE}, rule a:b)"
)
CLOSED = outcome(EVE, "c01", 42, "unavailable", "unavailable", "hub: no answer within 30 s")
RECORDS = [
    record(
        360,
        {"c00": part("c00", 360, {ALICE: [100.0, 200.0, 300.0]}, [COPY], [1.0]), "c01": part("c01", 360, {}, [], [])},
        {ALICE: 1.0}, [GARBAGE],
    ),
    record(
        720,
        {
            "c00": part("c00", 720, {ALICE: [100.0, 210.0, 300.0, 90.0], BOB: [90.0, 200.0, 310.0, None]}, [COPY], [0.75, 0.25]),
            "c01": part("c01", 720, {CAROL: [50.0, 60.0], DAVE: [55.0, 59.0]}, [CLOSED], [0.9, 0.1]),
        },
        {ALICE: 0.5, BOB: 0.125, CAROL: 0.3, DAVE: 0.075}, [GARBAGE],
    ),
]  # fmt: skip
PUBLISHED = {ALICE: 0.5, BOB: 0.125, CAROL: 0.3, DAVE: 0.075}
CURVES = {
    "alice": [{"step": i, "loss": 4 + 6 / i, "tokens": 100 * i} for i in range(1, 500)],
    "alice-2": [{"step": i, "loss": 3.5, "tokens": 100 * i} for i in range(1, 4)],
    "eve": [{"step": 1, "loss": 9.0, "tokens": 100}],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_page(tmp_path_factory.mktemp("page") / "new" / "report.html", RECORDS, PUBLISHED, NAMES, CURVES, {"c00": 3.25})
    return path.read_text(encoding="utf-8")


def test_who_was_stopped_is_compared_on_what_was_measured(tmp_path: Path) -> None:
    table = recorded.losses(200, 50, ann=(0.0, 0.01), bob=(0.05, 0.01))
    table["bob"] = table["bob"][:32]
    found = recorded.round_record(7560, table, {"ann": 7000, "bob": 7100}, rule="champion", stopped={"bob": "why"})
    path = write_page(tmp_path / "report.html", [shown(found)], {"ann": 1.0}, {}, {}, {})
    said = Page(path.read_text(encoding="utf-8")).text()
    assert "stopped after 32 of 200 samples, shown not to be better than the holder by its advantage" in said
    num_bytes = sum(s.num_bytes for s in found.competitions["c00"].samples[:32])
    assert f"{math.fsum(table['bob']) / 32:,.1f} {math.fsum(table['bob']) / math.log(2) / num_bytes:.3f}" in said
    assert "bob on 0 of 32" in said


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_same_arguments_give_the_same_bytes(source: str, tmp_path: Path) -> None:
    again = write_page(tmp_path / "report.html", RECORDS, PUBLISHED, NAMES, CURVES, {"c00": 3.25})
    assert again.read_text(encoding="utf-8") == source
    assert len(source) < 300_000


def test_nothing_is_requested_and_nothing_runs(source: str, page: Page) -> None:
    assert "://" not in source
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert source.count("url(") == source.count("url(#")
    assert "@import" not in source


def test_hostile_text_is_shown_and_not_obeyed(source: str, page: Page) -> None:
    assert "<script>alert(1)</script>" in page.text()
    assert "da$ve$ <b>" in page.text("text"), "a picture shows the name as it is"
    assert not {"\x00", "\u202e"} & set(source)


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.badly_closed == []
    assert page.open == []
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert [value for value, count in ids.items() if count > 1] == []
    targets = {value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert targets <= set(ids)


def test_everybody_and_every_reason_is_there(page: Page) -> None:
    words = page.text()
    for name in (*NAMES.values(), "5Nobod…eeez"):
        assert name in words
    for sentence in (Reason.COPY.sentence, Reason.MALFORMED_COMMITMENT.sentence, "hub: no answer within 30 s"):
        assert sentence in words
    assert "got content 12ab, rule committed at 10 by alice" in words
    assert f"{EVE}: {Reason.COPY.sentence}" not in words, "the hotkey is in the row already"
    assert Reason.COPY.advice in words
    assert "commit again with sn29 miner , which writes the string for you" in words


def test_a_miner_leads_to_its_refusal_and_to_its_hotkey_in_full(source: str, page: Page) -> None:
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {f"h-{hotkey}" for hotkey in (ALICE, BOB, EVE, NOBODY)} | {f"r-{EVE}", f"r-{NOBODY}"} <= ids
    assert f"r-{ALICE}" not in ids
    targets = [value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert targets.count(f"r-{EVE}") > 1, "from the standings and from its hotkey"
    assert set(targets) <= ids
    assert f'<code class="whole">{EVE}</code>' in source
    assert "rejected" not in page.text()


def test_the_figures_of_the_standings(page: Page) -> None:
    cells = page.text("td")
    bits = (100 + 210 + 300 + 90) / math.log(2) / 400
    assert f"175.0 {bits:.3f} 2 0.600 0.750 evaluated, committed at block 10" in cells
    assert "∞ ∞ 1 0.400 0.250" in cells
    assert "1 of 4 samples cannot be scored: 4310 tokens, more than 4096" in cells
    assert f"{3.25 * math.log(2) * 100:.1f} 3.250" in cells, "the unigram model in both units"


def test_the_summary_says_who_holds_what(page: Page) -> None:
    words = page.text()
    assert "2 rounds, of blocks 360 and 720. In the newest, 4 models were evaluated and 2 refused" in words
    assert "; 1 could not be looked at or had to wait." in words
    assert "c00: alice holds the crown with 60% of the wins" in words
    assert "c01: carol holds the crown with 60% of the wins" in words
    assert "alice 50.0%, carol 30.0%, bob 12.5%, da$ve$ <b> 7.5%" in words


def test_where_the_page_comes_from(page: Page) -> None:
    words = page.text()
    for part_of_it in (f"0x{720:064x}", f"0x{360:064x}", f"c01{'f' * 61}", "torch 2.13.0", "on cpu in float32"):
        assert part_of_it in words


def test_tables_and_pictures_can_be_read_aloud(page: Page) -> None:
    assert page.tags["caption"] == page.tags["table"] > 0
    assert all(value in ("row", "col") for tag, name, value in page.attributes if tag == "th" and name == "scope")
    assert page.tags["th"] == sum(tag == "th" and name == "scope" for tag, name, _ in page.attributes)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert page.tags["svg"] == len(labels) == 2 + 2 + 1 + 1  # two matrices, two comparisons, one group of curves, weights
    assert any("alice beats bob on 2; bob beats alice on 2" in label for label in labels)


def test_pictures_follow_the_paper(source: str) -> None:
    drawn = "".join(piece.split("</svg>")[0] for piece in source.split("<svg")[1:])
    assert not [light for light, _ in variables().values() if light in drawn]
    assert "var(--ink)" in drawn
    assert "prefers-color-scheme:dark" in source
    assert len({light for light, _ in variables().values()}) == len(variables()), "one colour, one variable"


def test_a_miner_has_one_colour_everywhere(source: str) -> None:
    classes = {piece.split('"')[0] for piece in source.split('class="who ')[1:] if piece.split(">")[1].startswith("bob<")}
    assert classes == {"m1"}
    assert re.search(r'var\(--m1\)"[^>]*>bob</text>', source), "its name at the end of its line"


def test_curves_that_are_too_short_are_named(page: Page) -> None:
    assert "Not drawn, with fewer than three steps: eve." in page.text()
    assert "Nats per token at the end: alice 4.01; alice-2 3.50." in page.text()


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(360, {"c00": part("c00", 360, {}, [], [])}, {}, [])],
        [record(360, {"c00": part("c00", 360, {ALICE: [None, None], BOB: [None, 1.0]}, [], [0.0, 0.0])}, {}, [])],
        [record(360, {"c00": part("c00", 360, {ALICE: [1.0, 2.0], BOB: [1.0, 2.0]}, [], [1.0, 0.0])}, {ALICE: 1.0}, [])],
    ],
    ids=["no round", "nobody came", "nobody won", "twins"],
)
def test_thin_rounds_make_a_page_too(records: list[dict[str, Any]], tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "report.html", records, {}, {}, {}, {}).read_text(encoding="utf-8"))
    assert page.badly_closed == []
    assert "No weights are on chain." in page.text() or "No round has been finished yet." in page.text()


def test_namesakes_are_told_apart(tmp_path: Path) -> None:
    names = {ALICE: "twin", BOB: "twin"}
    page = Page(write_page(tmp_path / "report.html", RECORDS, PUBLISHED, names, {}, {}).read_text(encoding="utf-8"))
    assert "twin 5Alice…eeez" in page.text()
    assert "twin 5Bobee…eeez" in page.text()


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([10.0, 50.0], [10.0, 50.0]),
        ([50.0, 50.0], [50.0, 35.0]),
        ([0.0, 2.0, 4.0], [0.0, 15.0, 30.0]),
        ([100.0, 99.0, 98.0], [100.0, 85.0, 70.0]),
    ],
)
def test_labels_are_moved_apart(places: list[float], expected: list[float]) -> None:
    assert pictures.spread(places, 15, 0, 100) == expected


def test_more_labels_than_room_keep_their_distance() -> None:
    places = sorted(pictures.spread([50.0] * 10, 15, 0, 100))
    assert places[-1] == 100
    assert all(b - a == 15 for a, b in pairwise(places))


def test_a_running_mean_keeps_both_ends() -> None:
    assert pictures.smoothed([5.0] * 100) == [5.0] * 100
    mean = pictures.smoothed([float(x) for x in range(100)])
    assert mean[0] == 0.0
    assert mean[50] == 50.0
    assert mean[-1] == 97.5


def test_long_lines_are_thinned_to_their_ends() -> None:
    thin = pictures.thinned([float(x) for x in range(10_000)])
    assert (thin[0], thin[-1], len(thin)) == (0.0, 9999.0, pictures.MAX_POINTS)
    assert thin == sorted(thin)
