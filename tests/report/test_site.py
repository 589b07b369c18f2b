"""The pages as text: read with html.parser, as a browser reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from recorded import WINDOW, c00_text
from test_page import Page
from watched import ALICE, BOB, CAROL, DAVE, EVE, FIRST, HOSTILE, VALIDATOR, ZED, Watched, telling, watched

from sn29 import cli, telemetry
from sn29.records import Weights
from sn29.report import pages
from sn29.report.site import Site, answer_json, everything, link, parsed, whole
from sn29.report.snapshot import Reader, Snapshot, alarms
from sn29.round_record import decode
from sn29.rules.schedule import CompetitionFile, parse_file
from sn29.store import Imported, RulesKept

CHANGES = f"""
grace_blocks: 50400
changes:
  - at: {FIRST + 40_000}
    ramp: {{limits.parameters: {{from: 6.9e9, to: 3.9e9, over_blocks: 201600, step: 0.25e9}}}}
"""


def rules() -> dict[str, CompetitionFile]:
    return {"c00": parse_file("c00", c00_text("champion") + CHANGES)}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watched(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def snapshot(state: Watched) -> Iterator[Snapshot]:
    with telling(state):
        yield Reader(state.folder, rules=rules).read()


@pytest.fixture(scope="module")
def site() -> Site:
    return Site()


def read(site: Site, snapshot: Snapshot, path: str) -> Page:
    source = site.answer(snapshot, path)
    assert source is not None
    page = Page(source)
    assert page.badly_closed == []
    assert page.open == []
    return page


def links(page: Page) -> set[str]:
    return {value for tag, name, value in page.attributes if tag == "a" and name == "href"}


PATHS = ("/", "/competition/c00", *(f"/miner/{hotkey}" for hotkey in (ALICE, BOB, EVE, ZED)), f"/round/{FIRST}")


@pytest.mark.parametrize("path", PATHS)
def test_every_page_is_whole_and_leads_only_to_pages_that_exist(site: Site, snapshot: Snapshot, path: str) -> None:
    page = read(site, snapshot, path)
    assert page.tags["h1"] == page.tags["main"] == page.tags["header"] == page.tags["footer"] == 1
    levels = [int(tag[1]) for tag, _ in page.texts if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for target in links(page):
        if target.startswith("#"):
            assert target[1:] in ids
        elif target.endswith(".json"):
            assert answer_json(snapshot, target.removesuffix(".json")) is not None
        elif target not in ("/metrics", "/healthz"):
            assert site.answer(snapshot, target) is not None, target


@pytest.mark.parametrize("path", PATHS)
def test_what_miners_wrote_is_text(site: Site, snapshot: Snapshot, path: str) -> None:
    source = site.answer(snapshot, path) or ""
    page = read(site, snapshot, path)
    assert "<script>alert" not in source
    assert "\u202e" not in source
    assert "\x00" not in source
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags["script"] == (path == "/")


def test_now_says_stage_progress_age_of_weights_and_that_all_is_well(site: Site, snapshot: Snapshot, state: Watched) -> None:
    well = replace(snapshot, alarms=())
    said = read(site, well, "/").text()
    window = state.newest.head.block + WINDOW
    for words in (
        "All is well", "Measuring losses", f"Round of block {window:,}", "2 of 5", VALIDATOR, "Last weight set", "mismatch",
        f"block {state.newest.head.block + 30:,}", f"block {window + WINDOW:,}", "812.5 nats where 812.6 were measured",
        "1 set on the way", "4 models evaluated, 2 refused",
    ):  # fmt: skip
        assert words in said, words
    assert "Warnings None since" not in said
    page = read(site, well, "/")
    (bar,) = [(name, value) for tag, name, value in page.attributes if tag == "progress" and name == "value"]
    assert float(bar[1]) == 0.4
    assert ("li", "aria-current", "step") in page.attributes


def test_alarms_come_first_with_what_to_do(site: Site, snapshot: Snapshot) -> None:
    assert snapshot.status is not None
    silent = replace(snapshot.status, updated=snapshot.at - 300)
    old = replace(snapshot, status=silent)
    page = read(site, replace(old, alarms=tuple(alarms(old))), "/")
    said = page.text()
    assert "Critical: no word from the program for 5 min" in said
    assert said.index("What to do: look at its log") < said.index("Measuring losses")
    assert page.text("title").startswith("(")


def test_a_competition_says_who_leads_how_surely_what_is_allowed_and_what_changes(site: Site, snapshot: Snapshot) -> None:
    page = read(site, snapshot, "/competition/c00")
    said = page.text()
    for words in (
        "holds the crown, since the window of block 4,810,320", "A challenger must be shown to be better by", "samples)",
        "Loss against the holder, with confidence", "Crowns and weights, round by round", "Win matrix", "Loss by sample",
        "at most 6,900,000,000 parameters", "Block 4,867,120", "limits.parameters 6,900,000,000 -> 6,650,000,000",
        "the number of parameters is outside the competition's limits", "shrink or grow the model",
    ):  # fmt: skip
        assert words in said, words
    assert page.tags["svg"] == 4
    alts = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert all(len(alt) > 20 for alt in alts)


def test_a_miner_is_told_what_explain_tells(
    site: Site, snapshot: Snapshot, state: Watched, capsys: pytest.CaptureFixture
) -> None:
    said = read(site, snapshot, f"/miner/{DAVE}").text()
    assert cli.main(["explain", DAVE, "--state.dir", str(state.folder)]) == 0
    told = capsys.readouterr().out.replace(ALICE, f"{ALICE[:4]}…{ALICE[-4:]}")
    for line in told.splitlines():
        if not line.startswith(("round of block", "what the round")):
            assert " ".join(line.split()) in said, line
    assert "Would win today with" in said
    assert "Loss by sample, against the holder" in said
    assert f"sn29 explain {DAVE} --state.dir {state.folder}" in said
    bob = read(site, snapshot, f"/miner/{BOB}").text()
    assert "Would take the crown" in bob
    assert "UTC if every window looks like this one" in bob or "UTC as the holder’s advantage decays" in bob
    assert "Its model was refused" in read(site, snapshot, f"/miner/{EVE}").text()
    assert "Would take" not in read(site, snapshot, f"/miner/{ALICE}").text(), "it has it"


def test_a_round_has_its_record_and_the_command_that_computes_it_again(
    site: Site, snapshot: Snapshot, state: Watched, capsys: pytest.CaptureFixture
) -> None:
    block = state.newest.head.block
    page = read(site, snapshot, f"/round/{block}")
    said = page.text()
    (command,) = page.text("code").split("sn29 replay ")[1:]
    path = Path(command.split()[0])
    assert cli.main(["replay", str(path)]) == 0
    assert "the same bits as recorded" in capsys.readouterr().out
    assert snapshot.rounds[-1].sha256 in said
    assert path.name in said
    assert "torch 2.13.0" in said
    assert "All 6 commitments" in said
    body = answer_json(snapshot, f"/round/{block}")
    assert isinstance(body, bytes)
    assert decode(body) == state.newest, "its JSON is the record"


@pytest.mark.parametrize(
    "path",
    ["/x", "/competition/", "/competition/none", "/miner/5X", "/round/1", "/round/x", "//", "/miner/a/b", "/competition/c00/", "",
     "x", "/round/" + "9" * 300, "/miner/%ff", "/miner/..%2f..%2fetc%2fpasswd", "/status"],
)  # fmt: skip
def test_there_is_no_other_page(site: Site, snapshot: Snapshot, path: str) -> None:
    assert site.answer(snapshot, path) is None
    assert path == "/status" or answer_json(snapshot, path) is None


@pytest.mark.parametrize("name", ["c00", ALICE, "a/b", "ü \"<'", "%2f"])
def test_addresses_come_back_as_they_went(name: str) -> None:
    assert parsed(link("miner", name)) == ("miner", name)
    assert unquote(link("miner", name)) == f"/miner/{name}"


def test_the_one_file_has_every_page_and_asks_for_nothing(snapshot: Snapshot) -> None:
    source = whole(snapshot)
    page = Page(source)
    assert page.badly_closed == []
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {"now", "competition-c00", f"miner-{CAROL}", f"round-{FIRST}"} <= set(ids)
    targets = links(page)
    assert all(target.startswith("#") for target in targets)
    assert {target[1:] for target in targets} <= set(ids)
    assert page.tags["script"] == 0
    assert page.tags["link"] == 1, "the icon, which is in the file"
    assert not [v for _, name, v in page.attributes if name in ("src", "srcset") or v.startswith(("http:", "https:", "//"))]
    assert "<script>alert" not in source


def test_the_same_is_there_as_json(snapshot: Snapshot, state: Watched) -> None:
    found = json.loads(json.dumps(everything(snapshot), allow_nan=False))
    assert found["now"]["status"]["stage"] == "measuring"
    assert found["now"]["weights"]["0"]["set_at"] == state.newest.head.block + 30
    assert [one["block"] for one in found["now"]["rounds"]] == [record.head.block for record in state.records]
    competition = found["competitions"]["c00"]
    assert [one["block"] for one in competition["rounds"]] == [record.head.block for record in reversed(state.records)]
    newest = competition["rounds"][0]
    assert newest["holder"] == ALICE
    assert {one["hotkey"] for one in newest["standings"]} == {ALICE, BOB, CAROL, DAVE}
    against = {one["hotkey"]: one["against_holder"] for one in newest["standings"]}
    assert against[ALICE] is None
    assert against[DAVE]["mean"] > 0
    assert competition["changes"][0]["block"] == FIRST + 40_000 + math.ceil(201_600 / 12)
    assert found["miners"][EVE]["rounds"][0]["outcome"]["reason"] == "parameters"


def test_nothing_at_all_is_said_plainly(site: Site, tmp_path: Path) -> None:
    empty = Reader(tmp_path).read()
    said = read(site, empty, "/").text()
    assert "No round has been finished yet." in said
    assert "no status.json" in said
    assert Page(whole(empty)).badly_closed == []


def test_a_miner_that_trains_has_a_page_too(site: Site, tmp_path: Path) -> None:
    telemetry.configure(level="CRITICAL")
    telemetry.keep_status(tmp_path / telemetry.STATUS, "miner")
    telemetry.stage("training", 300, 1000)
    at_work = replace(Reader(tmp_path).read(), alarms=())
    telemetry.leave_status()
    said = read(site, at_work, "/").text()
    for words in ("Miner", "Training", "300 of 1,000", "All is well", "waiting training measuring publishing"):
        assert words in said, words
    ended = read(site, Reader(tmp_path).read(), "/").text()
    assert "Stopped" in ended
    assert "Training" not in ended.split("Where the time went")[0]
    assert "All is well" not in ended.partition("const parts")[0]


def test_the_time_that_is_left_is_counted_from_where_the_stage_was_taken_up(site: Site, snapshot: Snapshot) -> None:
    assert snapshot.status is not None
    began = snapshot.at - 10
    status = replace(snapshot.status, stage_started=began - 5, counted_since=began, done_before=90_000, done=90_100, of=100_000)

    def said(**changes) -> str:
        return read(site, replace(snapshot, status=replace(status, **changes)), "/").text()

    assert "90,100 of 100,000 for 15 s , about 16 min left" in said().replace(" s,", " s ,")
    assert "left" not in said(done=90_000).split("Setting")[0].partition("90,000 of")[2][:60], "nothing is known yet"
    gone = said(updated=snapshot.at - 7200)
    assert "about" not in gone.partition("90,100 of")[2][:60]
    assert "for 2 h" not in gone


def test_a_crown_of_an_older_round_says_so(site: Site, snapshot: Snapshot) -> None:
    newest = snapshot.rounds[-1]
    empty = replace(newest, record=replace(newest.record, competitions={}))
    said = read(site, replace(snapshot, rounds=(*snapshot.rounds[:-1], empty)), "/").text()
    crowns = said.partition("Who holds each crown")[2].partition("Miners")[0]
    assert f"{snapshot.rounds[-2].block:,}" in crowns
    assert f"{newest.block:,}" not in crowns


def test_the_date_of_a_forecast_does_not_depend_on_when_a_file_was_copied(snapshot: Snapshot) -> None:
    copied = replace(snapshot, rounds=tuple(replace(one, written=one.written + 30 * 86_400) for one in snapshot.rounds))

    def tile(s: Snapshot) -> str:
        page = Page(Site().answer(s, f"/miner/{BOB}") or "").text()
        return page.partition("Would take the crown")[2][:40]

    assert "UTC" in tile(snapshot)
    assert tile(copied) == tile(snapshot)


def test_every_part_of_the_first_page_is_there_from_the_beginning(site: Site, snapshot: Snapshot, tmp_path: Path) -> None:
    """What appears later has its place already: an open page is brought up to date part by part."""

    def parts(s: Snapshot) -> list[str]:
        return [value for _, name, value in read(site, s, "/").attributes if name == "data-live"]

    assert parts(Reader(tmp_path).read()) == parts(snapshot)
    assert {"alarms", "work", "tiles", "crowns", "rounds", "weights", "warnings", "counters", "pages"} <= set(parts(snapshot))


def test_a_page_that_was_made_is_kept_until_a_round_comes(snapshot: Snapshot, state: Watched, tmp_path: Path) -> None:
    site = Site()
    first = site.answer(snapshot, "/competition/c00")
    assert site.answer(snapshot, "/competition/c00") == first
    fewer = replace(snapshot, rounds=snapshot.rounds[:2])
    assert site.answer(fewer, "/competition/c00") != first
    again = Reader(watched(tmp_path, rounds=2).folder, rules=rules).read()
    assert (
        site.answer(replace(again, at=fewer.at, status=fewer.status, facts=fewer.facts, alarms=fewer.alarms), "/round/1") is None
    )


def test_colours_and_names_of_strangers_do_not_collide(snapshot: Snapshot) -> None:
    cast = pages.cast_of(snapshot)
    assert len({cast.colours[h] for h in (ALICE, BOB, CAROL, DAVE)}) == 4
    assert cast.colours[EVE] == cast.colours[ZED]
    assert len(set(cast.labels.values())) == len(cast.labels)
    assert HOSTILE not in cast.html(ZED)


def test_a_coming_change_of_the_software_and_losses_of_others_are_told(site: Site, snapshot: Snapshot) -> None:
    assert snapshot.facts is not None
    assert snapshot.block is not None
    coming = snapshot.block + 100
    kept = (
        RulesKept(0, {"c00.yaml": "a"}, {"rules": "1", "torch": "2.9"}),
        RulesKept(coming, {"c00.yaml": "a"}, {"rules": "2", "torch": "2.9"}),
    )
    took = Imported("/home/somebody/<b>7200.json", "ab" * 32, 7200, 1.7e9, 12_345, 200)
    changed = replace(snapshot, facts=replace(snapshot.facts, rules=kept, imports=(took,)))
    said = read(site, changed, "/").text()
    for words in ("rules 1, torch 2.9", f"{coming:,} (in ", "rules 1 -> 2", "12,345", "<b>7200.json"):
        assert words in said, words
    assert "somebody" not in said, "where files lie on our machine is nobody's business"
    found = json.loads(json.dumps(answer_json(changed, "/status")))
    assert [one["from_block"] for one in found["judged_by"]] == [0, coming]
    assert found["imports"][0]["cells"] == 12_345
    assert "What rounds are judged by" not in read(site, replace(snapshot, facts=replace(snapshot.facts, rules=())), "/").text()


def test_every_miner_of_the_newest_round_is_one_click_away(site: Site, snapshot: Snapshot) -> None:
    page = read(site, snapshot, "/")
    said = page.text().partition("6 commitments in the round of block")[2].partition("Rounds")[0]
    for words in ("refused: parameters the number of parameters is outside", "refused: malformed_commitment", "evaluated"):
        assert words in said, words
    assert {link("miner", hotkey) for hotkey in (ALICE, BOB, CAROL, DAVE, EVE, ZED)} <= links(page)
    everywhere = "".join(read(site, snapshot, path).text() for path in PATHS)
    assert "rejected" not in everywhere, "one word for one thing"
    named = [value for tag, name, value in page.attributes if (tag, name) == ("td", "data-title")]
    assert {"Competition", "Weight", "Outcome", "Crowns"} <= set(named)


def test_a_program_that_was_asked_to_stop_is_no_alarm_and_waits_for_no_window(site: Site, snapshot: Snapshot) -> None:
    assert snapshot.status is not None
    assert "Next window" in read(site, snapshot, "/").text()
    ended = replace(snapshot.status, stage=telemetry.STOPPED, detail="", updated=snapshot.at - 300)
    stopped = replace(snapshot, status=ended)
    assert [alarm.name for alarm in alarms(stopped) if alarm.name != "disk_full"] == []
    said = read(site, replace(stopped, alarms=()), "/").text()
    assert "Stopped 5 min ago, as it was asked to" in said
    assert "All is well" not in said
    assert "Next window" not in said


def test_a_competition_that_is_to_come_says_from_which_block_on(site: Site, snapshot: Snapshot) -> None:
    assert snapshot.facts is not None
    assert snapshot.block is not None
    coming = snapshot.block + 100
    kept = (RulesKept(0, {"c00.yaml": "a"}, {}), RulesKept(coming, {"c00.yaml": "a", "c02.yaml": "b"}, {}))
    files = {**snapshot.files, "c02": parse_file("c02", c00_text("champion"))}
    found = replace(snapshot, files=files, facts=replace(snapshot.facts, rules=kept))
    assert f"c02 in force from block {coming:,} (in " in read(site, found, "/").text()
    known = replace(found, facts=replace(snapshot.facts, rules=kept[:1]))
    assert "c02 no round yet" in read(site, known, "/").text()


def _with_an_empty_one(snapshot: Snapshot, **parameters: object) -> Snapshot:
    """Its newest round judged c01 too, in which nobody won anything."""
    newest = snapshot.rounds[-1]
    kept = newest.record.competitions["c00"]
    seed = replace(kept.window, competition="c01")
    empty = replace(kept, window=seed, models=(), scores=(), duels=(), parameters={**kept.parameters, **parameters})
    record = replace(newest.record, competitions={"c00": kept, "c01": empty})
    return replace(snapshot, rounds=(*snapshot.rounds[:-1], replace(newest, record=record)))


def test_why_a_weight_is_larger_than_its_competitions_share_is_said(snapshot: Snapshot) -> None:
    shared = _with_an_empty_one(snapshot)
    words = "No model won anything in c01: in this round c00 got the whole reward."
    for path in ("/", "/competition/c00", f"/round/{snapshot.rounds[-1].block}"):
        assert words in read(Site(), shared, path).text(), path
    held = _with_an_empty_one(snapshot, when_empty="hold")
    assert "No model won anything" not in read(Site(), held, "/").text(), "nobody else got it"
    nobody = read(Site(), shared, "/competition/c01")
    assert nobody.tags["svg"] == 0, "an empty picture says nothing"
    assert "No model was evaluated in the newest round." in nobody.text()


def test_weights_of_nobody_are_told_in_words(site: Site, snapshot: Snapshot) -> None:
    assert snapshot.facts is not None
    one = snapshot.facts.published[0]
    assert one.decided is not None

    def said(**changes) -> str:
        facts = replace(snapshot.facts, published={0: replace(one, stands=None, on_its_way=(), **changes)})
        return read(site, replace(snapshot, facts=facts), "/").text()

    due = said()
    assert f"Last weight set none yet the weights of the round of block {one.decided.block:,} are still to be set" in due
    nobody = said(decided=Weights(one.decided.block, {}))
    assert "Last weight set none yet no model has won anything yet, so there is nobody to pay" in nobody
    assert "Weights None yet: no model has won anything." in nobody
    assert "block -1" not in said(decided=None)


def test_rounds_that_are_not_in_the_list_are_counted(site: Site, snapshot: Snapshot, tmp_path: Path) -> None:
    many = watched(tmp_path, rounds=pages.NEWEST + 3)
    found = Reader(tmp_path, rounds=pages.NEWEST + 2).read()
    page = read(site, found, "/")
    said = page.text()
    assert "2 older rounds" in said
    assert "1 record of still older rounds: sn29 report --rounds N shows more than these" in said
    assert link("round", str(many.records[1].head.block)) in links(page)
    assert "older round" not in read(site, snapshot, "/").text()
