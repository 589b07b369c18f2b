"""What a program says that it is doing: the file that other processes read."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_round import Subnet, go, subnet  # noqa: F401

from sn29 import telemetry
from sn29.errors import Rejected
from sn29.publication import Publisher
from sn29.telemetry import Status


@pytest.fixture
def status(tmp_path: Path) -> Iterator[Path]:
    telemetry.configure(level="CRITICAL")
    path = tmp_path / "folder" / telemetry.STATUS
    telemetry.keep_status(path, "validator")
    yield path
    telemetry.leave_status()


def read(path: Path) -> Status:
    return Status.from_json(path.read_text())


def test_a_change_of_stage_is_written_at_once_and_the_rest_within_a_second(status: Path) -> None:
    assert read(status).stage == "waiting"
    telemetry.note(hotkey="5Validator", round=7200, head=7300, head_time=1.5)
    telemetry.stage("measuring", 0, 4, "5Alice")
    written = read(status)
    assert (written.stage, written.done, written.of, written.detail) == ("measuring", 0, 4, "5Alice")
    assert (written.hotkey, written.round, written.head, written.head_time) == ("5Validator", 7200, 7300, 1.5)
    telemetry.stage("measuring", 1, 4)
    assert read(status) == written, "not more than once a second"
    while time.time() - written.updated < 1.1:
        time.sleep(0.05)
    telemetry.note()
    assert (read(status).done, read(status).stage_started) == (1, written.stage_started)


def test_waiting_there_is_no_round_in_hand_and_the_time_of_stages_is_added_up(status: Path) -> None:
    telemetry.note(round=7200)
    telemetry.stage("reading")
    assert read(status).round == 7200
    telemetry.stage("deciding")
    telemetry.stage("waiting", detail="tried again:\nthe Hub\tdoes not answer")
    ended = read(status)
    assert (ended.round, ended.detail) == (None, "tried again: the Hub does not answer")
    assert set(ended.stage_seconds) == {"waiting", "reading", "deciding"}
    assert all(0 <= seconds < 60 for seconds in ended.stage_seconds.values())


def test_events_are_counted_and_warnings_are_kept_but_not_those_of_miners(status: Path) -> None:
    for i in range(3):
        telemetry.tell("fetched", "some bytes", hotkey=f"5{i}")
    telemetry.warn("refused", "too large", hotkey="5Eve")
    for i in range(telemetry.MAX_WARNINGS + 5):
        telemetry.warn("mismatch", f"number {i}\nin two lines {'x' * 1000}", hotkey="5Bob")
    telemetry.stage("reading")
    found = read(status)
    assert found.counters == {"fetched": 3, "refused": 1, "mismatch": telemetry.MAX_WARNINGS + 5}
    assert len(found.warnings) == telemetry.MAX_WARNINGS
    assert {w.event for w in found.warnings} == {"mismatch"}
    assert found.warnings[-1].sentence.startswith(f"number {telemetry.MAX_WARNINGS + 4} in two lines")
    assert max(len(w.sentence) for w in found.warnings) <= 400


def test_it_says_what_was_done_when_counting_began(status: Path) -> None:
    telemetry.stage("training", detail="run 1")
    telemetry.stage("training", 90_000, 100_000)
    telemetry.stage("training", 90_010, 100_000)
    telemetry.stage("reading")
    telemetry.stage("training", 90_020, 100_000)
    telemetry.note(head=5)
    telemetry.stage("reading")
    telemetry.stage("fetching", 7, 10)
    assert (read(status).done_before, read(status).done) == (7, 7)
    telemetry.stage("waiting")
    telemetry.stage("training", 90_020, 100_000)
    assert read(status).done_before == 90_020


def test_the_last_word_says_that_it_ended(tmp_path: Path) -> None:
    for why in ("", "no wallet\nhere"):
        telemetry.keep_status(tmp_path / telemetry.STATUS, "validator")
        telemetry.note(round=7200)
        telemetry.stage("measuring", 1, 2, "5Alice")
        telemetry.leave_status(why)
        ended = read(tmp_path / telemetry.STATUS)
        assert (ended.stage, ended.of, ended.round, ended.detail) == (telemetry.STOPPED, 0, None, why.replace("\n", " "))


def test_weights_are_set_beside_a_round_without_hiding_it(status: Path) -> None:
    with telemetry.publishing():
        assert read(status).stage == "publishing"
        telemetry.stage("measuring", 1, 2)
        assert read(status).stage == "measuring"
    telemetry.stage("waiting")
    assert read(status).stage == "waiting"


def test_starts_are_counted_over_processes(tmp_path: Path) -> None:
    path = tmp_path / telemetry.STATUS
    for n in range(telemetry.MAX_STARTS + 2):
        telemetry.keep_status(path, "miner")
        assert len(read(path).starts) == min(n + 1, telemetry.MAX_STARTS)
    telemetry.leave_status()
    path.write_text("{")
    telemetry.keep_status(path, "miner")
    assert len(read(path).starts) == 1, "a damaged file is no reason not to start"
    telemetry.leave_status()


def test_a_reader_never_sees_half_a_file(status: Path) -> None:
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for name in telemetry.STAGES:
                telemetry.stage(name, detail="x" * 300)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert {read(status).program for _ in range(300)} == {"validator"}
    finally:
        over.set()
        for writer in writers:
            writer.join()


def test_a_folder_that_goes_away_stops_nobody(status: Path) -> None:
    status.unlink()
    status.parent.rmdir()
    telemetry.stage("reading")
    telemetry.tell("fetched", "goes on")
    assert not status.exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", "{}", '{"version": "0.1.0"}',
        '{"version": 1, "program": "v", "pid": 1, "started": 1, "updated": 1}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": NaN}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "warnings": 5}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "counters": {"a": "b"}}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "counters": [1]}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "head": "x"}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "head": 1' + "0" * 400 + "}",
        "[" * 100_000,
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "next_window": 1.7e308}',
        '{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "round": -1e16}',
        r'{"version": "\ud800", "program": "v", "pid": 1, "started": 1, "updated": 1}',
        r'{"version": "1", "program": "v", "pid": 1, "started": 1, "updated": 1, "counters": {"\u202e": 1}}',
    ],
    ids=range(18),
)  # fmt: skip
def test_what_no_program_wrote_is_refused(text: str) -> None:
    with pytest.raises(Rejected, match=r"status\.json"):
        Status.from_json(text)


def test_fields_of_a_later_version_are_left_out(status: Path) -> None:
    telemetry.warn("mismatch", "a sentence")
    telemetry.stage("reading")
    data = json.loads(status.read_text())
    data["warnings"][0]["colour"] = data["new"] = "blue"
    assert Status.from_json(json.dumps(data)) == read(status)
    assert Status.from_json(read(status).to_json()) == read(status)


def test_a_round_tells_its_stages(subnet: Subnet, model, status: Path) -> None:  # noqa: F811
    subnet.publish("ann", model(seed=1))
    subnet.publish("ben", model(seed=2))
    subnet.next_window()
    store, record = go(subnet)
    telemetry.stage("waiting")
    spent = read(status)
    assert set(spent.stage_seconds) >= {"reading", "inspecting", "fetching", "measuring", "deciding"}
    assert spent.counters["evaluated"] == 2
    assert spent.next_window is not None
    assert spent.next_window > record.head.block

    async def publish() -> None:
        async with subnet.chain("validator") as chain:
            await Publisher(chain, store).look()

    asyncio.run(publish())
    telemetry.stage("reading")
    head = read(status).head
    assert head is not None
    assert record.head.block <= head <= subnet.ledger.head()
    assert read(status).counters["published"] == 1
