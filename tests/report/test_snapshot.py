"""What is read of a state folder, and what somebody should look at."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import WINDOW, c00_text
from watched import ALICE, EVE, FIRST, ZED, telling, watched

from sn29 import telemetry
from sn29.errors import Reason, Rejected
from sn29.records import Weights
from sn29.report import metrics
from sn29.report.site import everything, whole
from sn29.report.snapshot import ALARMS, LITTLE_FREE, Published, Reader, alarms, lasting
from sn29.rules.schedule import parse_file
from sn29.store import ChainSeen, Store


def rules():
    return {"c00": parse_file("c00", c00_text("champion"))}


def names(snapshot) -> list[str]:
    found = [alarm.name for alarm in snapshot.alarms]
    assert set(found) <= set(ALARMS)
    return [name for name in found if name != "disk_full"]  # the machine's own disk is as it is


def test_a_validator_at_work_is_well(tmp_path: Path) -> None:
    state = watched(tmp_path)
    with telling(state):
        found = Reader(tmp_path, rules=rules).read()
    assert names(found) == []
    assert found.is_live
    assert [one.record for one in found.rounds] == list(state.records)
    assert found.facts is not None
    stands = found.facts.published[0].stands
    assert stands is not None
    assert stands[0] == state.newest.head.block + 30
    assert len(found.facts.published[0].on_its_way) == 1
    assert found.facts.open_rounds == (state.newest.head.block + WINDOW,)
    assert found.head is not None
    assert found.head[0] == state.head
    assert {ALICE, EVE, ZED} <= set(found.hotkeys)
    assert found.competitions == ("c00",)
    assert found.disk_bytes > 0


def test_a_program_that_is_silent_is_an_alarm_that_healthz_knows(tmp_path: Path) -> None:
    state = watched(tmp_path)
    found = Reader(tmp_path).read()
    assert "status_old" in names(found)
    assert not found.is_healthy
    with telling(state):
        now = Reader(tmp_path).read()
    assert now.status is not None
    later = replace(now, status=replace(now.status, updated=now.at - 61))
    first = alarms(later)[0]
    assert first.name == "status_old"
    assert "61 s" in first.sentence
    assert "start it again" in first.advice


def test_a_chain_that_does_not_grow_is_an_alarm_and_old_weights_are_counted_on(tmp_path: Path) -> None:
    watched(tmp_path, age_s=4 * 360 * 12.0)
    found = Reader(tmp_path).read()
    assert set(names(found)) == {"status_old", "chain_old", "weights_old", "no_round", "round_overdue"}
    levels = [alarm.level for alarm in found.alarms]
    assert levels == sorted(levels), "critical ones first"
    (old,) = [a for a in found.alarms if a.name == "weights_old"]
    assert "epochs ago" in old.sentence
    assert "weights_old" not in names(Reader(tmp_path, alarm_epochs=30).read())


def test_weights_that_were_never_set_are_an_alarm_after_some_epochs(tmp_path: Path) -> None:
    watched(tmp_path, rounds=5, published=False)
    (old,) = [a for a in Reader(tmp_path).read().alarms if a.name == "weights_old"]
    assert "no weight set stands on chain" in old.sentence
    assert [a for a in Reader(tmp_path, alarm_epochs=9).read().alarms if a.name == "weights_old"] == []


def test_a_program_that_does_not_stay_up_and_one_with_bugs(tmp_path: Path) -> None:
    telemetry.configure(level="CRITICAL")
    for _ in range(4):
        telemetry.keep_status(tmp_path / telemetry.STATUS, "validator")
    try:
        raise ValueError("nobody expected it")
    except ValueError:
        telemetry.bug("the round failed")
    telemetry.stage("reading")
    found = Reader(tmp_path).read()
    telemetry.leave_status()
    assert names(found) == ["restart_loop", "bugs"]
    assert not found.is_healthy
    assert found.facts is None
    assert found.rounds == ()


def test_a_program_that_was_stopped_and_started_again_and_again_does_stay_up(tmp_path: Path) -> None:
    telemetry.configure(level="CRITICAL")
    path = tmp_path / telemetry.STATUS
    for why, settled in (("", False), ("no wallet", True), ("", False), ("no pins", True), ("", False)):
        telemetry.keep_status(path, "validator")
        telemetry.leave_status(why, settled=settled)
    telemetry.keep_status(path, "validator")
    assert names(Reader(tmp_path).read()) == []
    for _ in range(3):
        telemetry.leave_status("the disk is gone")
        telemetry.keep_status(path, "validator")
    assert names(Reader(tmp_path).read()) == ["restart_loop"]
    telemetry.leave_status()


def test_a_loop_of_refused_starts_is_a_warning_that_stays(tmp_path: Path) -> None:
    telemetry.configure(level="CRITICAL")
    path = tmp_path / telemetry.STATUS

    def loop() -> list[tuple[str, str]]:
        return [(a.level, a.sentence) for a in Reader(tmp_path).read().alarms if a.name == "restart_loop"]

    for _ in range(3):
        telemetry.keep_status(path, "validator")
        assert loop() == [], "a person tries some settings"
        telemetry.leave_status("the store is damaged", settled=True)
    telemetry.keep_status(path, "validator")
    try:
        said = "started 4 times within 15 min, 3 of them refused for their settings"
        assert loop() == [("warning", said)], "also in the seconds in which it runs"
        assert Reader(tmp_path).read().is_healthy, "it may stay up now: nobody should end it for that"
    finally:
        telemetry.leave_status("the store is damaged", settled=True)
    assert loop() == [("warning", said.replace("3 of them", "4 of them"))]


def test_a_program_that_never_got_anywhere_is_not_well(tmp_path: Path) -> None:
    Store(tmp_path / "store.db").close()
    telemetry.configure(level="CRITICAL")
    telemetry.keep_status(tmp_path / telemetry.STATUS, "validator")
    try:
        fresh = Reader(tmp_path).read()
        assert names(fresh) == []
        assert fresh.status is not None

        def after(hours: float, **changes) -> list[str]:
            began = replace(fresh.status, started=fresh.at - 3600 * hours, **changes)
            return [a.name for a in alarms(replace(fresh, status=began)) if a.name != "disk_full"]

        assert after(0.05) == []
        assert after(0.2) == ["chain_old"]
        assert after(0.2, stage="measuring") == [], "a warm start does not follow the chain yet"
        assert after(0.2, head=9000, head_time=fresh.at) == []
        assert after(72, head=9000, head_time=fresh.at) == ["no_round", "weights_old"]
        assert after(0.2, head=9000, head_time=fresh.at, unpublished_since=fresh.at - 100) == []
        assert after(0.3, head=9000, head_time=fresh.at, unpublished_since=fresh.at - 1000) == ["not_published"]
    finally:
        telemetry.leave_status()


def test_a_program_that_ended_says_so_and_is_not_told_to_hang(tmp_path: Path) -> None:
    state = watched(tmp_path)
    with telling(state):
        pass
    found = Reader(tmp_path, rules=rules).read()
    assert not found.is_live
    assert names(found) == [], "it was asked to"
    assert found.was_asked_to_stop

    def after(epochs: float) -> dict[str, str]:
        later = replace(found, at=found.at + epochs * found.epoch * found.block_seconds)
        return {a.name: a.level for a in alarms(later) if a.name != "disk_full"}

    assert after(0.9) == {}, "nor for what nobody does since then"
    assert after(1.1) == {"status_old": "warning"}, "a start that ended before it could say so is seen in the end"
    assert after(5) == {"status_old": "warning", "weights_old": "critical"}
    telemetry.keep_status(tmp_path / telemetry.STATUS, "validator")
    telemetry.leave_status("no wallet")
    (broken,) = [a for a in Reader(tmp_path, rules=rules).read().alarms if a.name == "status_old"]
    assert (broken.level, "no wallet" in broken.sentence) == ("critical", True)
    assert "look at its log" in broken.advice


def test_of_a_program_that_ended_nobody_says_that_its_chain_is_old(tmp_path: Path) -> None:
    with telling(watched(tmp_path)):
        pass
    ended = Reader(tmp_path, rules=rules).read()
    assert "chain_old" not in [a.name for a in alarms(replace(ended, at=ended.at + 3600))]


def test_a_status_from_the_future_is_of_nobody_who_lives(tmp_path: Path) -> None:
    with telling(watched(tmp_path)):
        now = Reader(tmp_path).read()
    assert now.status is not None
    later = replace(now, status=replace(now.status, updated=now.at + 86_400))
    assert not later.is_live
    assert alarms(later)[0].name == "status_old"


def test_a_record_that_this_version_cannot_compute_again_is_an_alarm_and_the_rest_is_shown(tmp_path: Path) -> None:
    state = watched(tmp_path)
    for path in sorted((tmp_path / "records").iterdir())[1:3]:
        data = json.loads(path.read_text())
        data["competitions"]["c00"]["parameters"]["retired"] = 3
        path.unlink()
        text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(text).hexdigest()[:16]
        path.with_name(f"{data['head']['block']}-{digest}.json").write_bytes(text)
    found = Reader(tmp_path).read()
    (alarm,) = [a for a in found.alarms if a.name == "records"]
    assert "retired" in alarm.sentence
    assert "and 1 more" in alarm.sentence
    assert [one.record for one in found.rounds] == [state.records[0], state.records[3]]
    assert ALICE in whole(found)
    json.dumps(everything(found), allow_nan=False)


def test_a_row_of_the_store_that_is_none_is_an_alarm(tmp_path: Path) -> None:
    watched(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as db:
        db.execute("update round set weights = '{' where weights is not null")
    found = Reader(tmp_path).read()
    assert "store" in names(found)
    assert len(found.rounds) == 4


def test_weights_that_the_chain_conceals_are_not_for_others(tmp_path: Path) -> None:
    state = watched(tmp_path, rounds=2)
    with closing(Store(tmp_path / "store.db")) as store:
        assert Reader(tmp_path).read().revealed().withheld == 0, "set in the open"
        store.keep_chain_seen(ChainSeen(state.head, time.time(), 12.0, 360, 1))
        store.keep_publication(state.newest.head.block + 40, Weights(state.records[0].head.block, {EVE: 1.0}))
        own = Reader(tmp_path).read()
        shown = own.revealed()
    assert own.facts is not None
    assert own.facts.published[0].decided.by_hotkey == state.newest.weights[0].by_hotkey
    assert [one.record for one in shown.rounds] == [state.records[0]]
    assert (shown.withheld, shown.finished) == (1, own.finished)
    said = whole(shown) + json.dumps(everything(shown)) + metrics.exposition(shown).decode()
    assert "1 newer round will be shown" in said
    assert own.rounds[-1].sha256 not in said
    assert shown.facts is not None
    assert shown.facts.published[0].decided.by_hotkey == {EVE: 1.0}


def test_what_may_be_concealed_is_not_for_others_either(tmp_path: Path) -> None:
    state = watched(tmp_path, rounds=2, published=False)
    with closing(Store(tmp_path / "store.db")) as store:
        store.keep_chain_seen(ChainSeen(state.head, time.time(), 12.0, 360, None))
    unasked = Reader(tmp_path).read().revealed()
    assert (unasked.rounds, unasked.withheld) == ((), 2)
    said = whole(unasked) + json.dumps(everything(unasked), allow_nan=False)
    assert "block -1" not in said
    assert everything(unasked)["now"]["weights"]["0"]["decided_at"] is None
    for leftover in ("store.db-wal", "store.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    damaged = Reader(tmp_path).read()
    assert "store" in names(damaged)
    assert (damaged.revealed().rounds, damaged.revealed().withheld) == ((), 2)
    assert len(Reader(None, [tmp_path / "records"]).read().revealed().rounds) == 2, "somebody has named them"


def test_a_mechanism_that_pays_nobody_holds_nothing_back(tmp_path: Path) -> None:
    state = watched(tmp_path, rounds=2)
    with closing(Store(tmp_path / "store.db")) as store:
        store.keep_chain_seen(ChainSeen(state.head, time.time(), 12.0, 360, 1))
    own = Reader(tmp_path).read()
    assert own.facts is not None
    nobody = Published(Weights(state.newest.head.block, {}), None, (), 0)
    facts = replace(own.facts, published={**own.facts.published, 1: nobody})
    assert replace(own, facts=facts).revealed().rounds == own.rounds


def test_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    with telling(watched(tmp_path)):
        now = Reader(tmp_path).read()

    def level(free: float, size: float) -> list[str]:
        return [a.level for a in alarms(replace(now, free_bytes=int(free), disk_bytes=int(size))) if a.name == "disk_full"]

    assert level(0.9e9, 1e12) == ["critical"]
    assert level(LITTLE_FREE - 1, 1e12) == ["warning"]
    assert level(LITTLE_FREE, 1e12) == []
    assert level(2e9, 10e9) == [], "a small disk need not have 20 GB"


def test_what_cannot_be_read_is_an_alarm_and_the_rest_is_shown(tmp_path: Path) -> None:
    state = watched(tmp_path)
    paths = sorted((tmp_path / "records").iterdir())
    paths[0].write_text("{}")
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    for leftover in ("store.db-wal", "store.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    (tmp_path / telemetry.STATUS).write_text("[")

    def wrong():
        raise Rejected(Reason.COMPETITION_FILE, "no *.yaml", "at least one competition", "folder")

    found = Reader(tmp_path, rules=wrong).read()
    assert sorted(names(found)) == ["records", "rules", "status_old", "store"], "each once"
    assert [one.record for one in found.rounds] == list(state.records[1:])
    assert all(alarm.advice and alarm.sentence for alarm in found.alarms)


def test_records_alone_are_nobodys_to_watch(tmp_path: Path) -> None:
    state = watched(tmp_path)
    found = Reader(None, [tmp_path / "records"], rounds=2).read()
    assert found.alarms == ()
    assert [one.record for one in found.rounds] == list(state.records[-2:])
    assert found.status is None


def test_a_record_is_read_once_and_again_when_it_changes(tmp_path: Path) -> None:
    watched(tmp_path)
    reader = Reader(tmp_path)
    first, second = reader.read(), reader.read()
    assert all(a is b for a, b in zip(first.rounds, second.rounds, strict=True))
    path = first.rounds[0].path
    os.utime(path, ns=(1, 1))
    third = reader.read()
    assert third.rounds[0] is not first.rounds[0]
    assert third.rounds[0].record == first.rounds[0].record
    shutil.rmtree(tmp_path / "records")
    assert reader.read().rounds == ()


def test_reading_disturbs_nobody(tmp_path: Path) -> None:
    state = watched(tmp_path)

    def kept() -> list[str]:
        return sorted(p.name for p in tmp_path.rglob("*"))

    before = kept()
    assert Reader(tmp_path).read().facts is not None
    assert kept() == before, "of a validator that is stopped"
    with telling(state):
        store = Store(tmp_path / "store.db")
        before = kept()
        found = Reader(tmp_path).read()
        store.open_round(FIRST + 100 * WINDOW, {})
        after = Reader(tmp_path).read()
        assert kept() == before
        store.close()
    assert found.facts is not None
    assert after.facts is not None
    assert len(after.facts.open_rounds) == len(found.facts.open_rounds) + 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (7500, "2 h 5 min"), (180_000, "2 days 2 h")],
)
def test_spans_of_time_in_words(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


def test_times_of_blocks_are_counted_from_the_newest_one(tmp_path: Path) -> None:
    state = watched(tmp_path)
    with telling(state):
        found = Reader(tmp_path).read()
    at = found.time_of(state.head + 100)
    assert at is not None
    assert at == pytest.approx(time.time() - 8 + 1200, abs=60)
    assert found.block in (state.head, state.head + 1, state.head + 2)
