from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from test_examination import Site, site

from sn29 import telemetry
from sn29.localnet.http_exchange import Wire
from sn29.localnet.hub_faults import Fault
from sn29.measurement import Against, Turn, _read_ahead, measure
from sn29.models import checkpoint
from sn29.records import Loss, Sample
from sn29.rules.evidence import Sums
from sn29.rules.sequential import Bar

TEXTS = tuple(Sample(f"{n:032x}", f"the text number {n} about the sea and the hills") for n in range(40))


def go(site: Site, entrant, samples=TEXTS, against=None, turn=None, ports=None):
    return asyncio.run(measure(ports or site.ports, site.competition, entrant, samples, 1000, (), against, turn))


def said(events: list[tuple[str, str]], name: str) -> list[str]:
    return [sentence for event, sentence in events if event == name]


def holder_of(site: Site, entrant) -> Against:
    """The model as the crown's holder, measured in full."""
    found = go(site, entrant)
    assert len(found.losses) == len(TEXTS)
    return Against(Bar(entrant.commitment.hotkey, 0.0005, 0.02, {}), tuple(loss.nats for loss in found.losses))


def test_a_hopeless_challenger_is_measured_on_as_many_samples_as_say_so(site, model, events):
    """A model whose logits are random and large is 40 % worse on every sample."""
    against = holder_of(site, site.entrant(site.publish("ann", model(1))))
    worse = site.entrant(site.publish("ben", model(2, initializer_range=1.0)))
    equal = site.entrant(site.publish("cat", model(3)))
    found = go(site, worse, against=against)
    assert (found.outcome.status, len(found.losses)) == ("evaluated", 16)
    assert found.stopped.startswith("stopped after 16 of 40 samples: its losses are ")
    assert said(events, "evaluated")[-1].startswith("16 samples measured, 0 known; stopped after 16 of 40 samples")
    full = go(site, equal, against=against)
    assert (len(full.losses), full.stopped) == (40, "")
    # without anybody to beat it is measured to the end, from where it stopped, and with the same losses
    rest = go(site, worse)
    assert (rest.losses[:16], rest.stopped, len(rest.losses)) == (found.losses, "", 40)
    assert said(events, "evaluated")[-1] == "24 samples measured, 16 known"
    # and who knows more than others stops where they stop
    assert go(site, worse, against=against) == found
    assert said(events, "evaluated")[-1].startswith("0 samples measured, 40 known; stopped after 16 of 40")


def test_what_earlier_windows_say_of_a_challenger_counts(site, model):
    """A little worse than the holder on 16 samples says nothing, but with a thousand before it does."""
    against = holder_of(site, site.entrant(site.publish("ann", model(1))))
    entrant = site.entrant(site.publish("ben", model(2)))
    assert go(site, entrant, against=against).stopped == ""
    mean, spread = int(0.02 * 2**24), int(0.0001 * 2**48)
    known = {entrant.commitment.hotkey: Sums(1000, 1000 * mean, 1000 * (spread + mean * mean))}
    found = go(site, entrant, against=replace(against, bar=replace(against.bar, known=known)))
    assert len(found.losses) == 16
    assert "on the 1,016 samples so far" in found.stopped


def test_a_known_loss_that_comes_out_differently_is_told_and_the_row_measured_anew(site, model, events):
    entrant = site.entrant(site.publish("ann", model(1)))
    first = go(site, entrant, TEXTS[:10])
    rows = site.ports.store._db.execute("select distinct content_id, tokenizer_id, profile from loss").fetchall()
    assert len(rows) == 1
    assert rows[0][2].startswith("packed-1 rows of 1024, documents attention, eager tiles 256x300, ")
    site.ports.store.keep_losses(*rows[0], [replace(loss, nats=loss.nats * 1.001) for loss in first.losses])
    found = go(site, entrant)
    assert found.losses[:10] == first.losses
    assert len(said(events, "mismatch")) == 1
    assert "measured anew" in said(events, "mismatch")[0]
    assert go(site, entrant) == found


def test_known_losses_that_are_right_are_kept_and_two_of_them_measured_again(site, model, events):
    entrant = site.entrant(site.publish("ann", model(1)))
    first = go(site, entrant, TEXTS[:10])
    assert go(site, entrant).losses[:10] == first.losses
    assert said(events, "mismatch") == []
    assert said(events, "evaluated")[-1] == "30 samples measured, 10 known"


def test_the_next_models_files_come_while_this_one_is_evaluated(site, model, events):
    entrants = [site.entrant(site.publish(name, model(seed))) for seed, name in enumerate(("ann", "ben", "cat"))]

    async def story() -> None:
        turn = Turn.of(1)
        async with turn.evaluating:  # some other model is being evaluated
            works = [
                asyncio.create_task(measure(site.ports, site.competition, e, TEXTS[:2], 1000, (), None, turn)) for e in entrants
            ]
            while len(said(events, "fetched")) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert len(said(events, "fetched")) == 2, "one evaluated and one ahead"
            assert said(events, "evaluated") == []
        assert [(await work).outcome.status for work in works] == ["evaluated"] * 3

    asyncio.run(story())


def test_the_stage_is_what_is_done_and_not_what_is_fetched_beside_it(site, model, tmp_path):
    """Two models at a time, of which one is evaluated: the other one's files come meanwhile."""
    first, second = (site.entrant(site.publish(name, model(seed))) for seed, name in enumerate(("ann", "ben")))
    path = tmp_path / telemetry.STATUS
    telemetry.keep_status(path, "validator")

    def stage() -> str:
        return telemetry.Status.from_json(path.read_bytes()).stage

    async def story() -> None:
        turn, seen = Turn.of(2, 3), []
        with turn.measures("5Other"):
            work = asyncio.create_task(measure(site.ports, site.competition, first, TEXTS[:2], 1000, (), None, turn))
            while not work.done():
                seen.append(stage())
                await asyncio.sleep(0.001)
        assert (await work).outcome.status == "evaluated"
        assert set(seen) == {"measuring"}
        await measure(site.ports, site.competition, second, TEXTS[:2], 1000, (), None, turn)
        spent = telemetry.Status.from_json(path.read_bytes()).stage_seconds
        assert "fetching" in spent, "nothing else was done then"

    try:
        asyncio.run(story())
    finally:
        telemetry.leave_status()


def test_a_disk_with_room_for_one_model_has_it_one_after_the_other(site, model, events):
    entrants = [site.entrant(site.publish(name, model(seed))) for seed, name in enumerate(("ann", "ben", "cat"))]
    size = sum(f.size for f in entrants[0].listing.files if checkpoint.is_content(f.path))
    ports, most = site.validator("state", models_bytes=int(1.5 * size)), 0

    async def watch() -> None:
        nonlocal most
        while True:
            files = [p.stat().st_size for p in ports.machine.models_dir.rglob("*") if p.is_file()]
            most = max(most, sum(files))
            await asyncio.sleep(0.001)

    async def story() -> list[str]:
        turn, watching = Turn.of(1), asyncio.create_task(watch())
        works = [measure(ports, site.competition, e, TEXTS[:2], 1000, (), None, turn) for e in entrants]
        found = [found.outcome.status for found in await asyncio.gather(*works)]
        watching.cancel()
        return found

    site.server.faults.set(Fault("/resolve/", wire=Wire(delay_s=0.1)))  # between the question for room and the first byte
    assert asyncio.run(story()) == ["evaluated"] * 3
    assert said(events, "unavailable") == []
    assert size / 2 < most < 1.5 * size


def test_a_loss_is_another_one_for_another_way_to_compute_it(site, model, events):
    """Another number format, or another most of tokens: nothing is taken over."""
    entrant = site.entrant(site.publish("ann", model(1)))
    go(site, entrant, TEXTS[:2])
    half = replace(site.ports, machine=replace(site.ports.machine, dtype="bfloat16"))
    go(site, entrant, TEXTS[:2], ports=half)
    shorter = site.competition.limits.model_copy(update={"max_tokens": 20})
    site.competition = site.competition.model_copy(update={"limits": shorter})
    found = go(site, entrant, TEXTS[:2])
    assert found.outcome.status in ("evaluated", "rejected")
    assert [s.split(",")[1] for s in said(events, "evaluated")] == [" 0 known"] * 3


def test_a_row_that_is_forgotten_is_that_row_alone(site):
    store = site.ports.store
    for profile in ("one", "other"):
        store.keep_losses("content", "tokenizer", profile, [Loss("s", 1.0, 2, "")])
    store.forget_losses("content", "tokenizer", "one")
    assert store.losses("content", "tokenizer", "one", ["s"]) == {}
    assert store.losses("content", "tokenizer", "other", ["s"]) == {"s": Loss("s", 1.0, 2, "")}


@pytest.mark.parametrize("folder_is_there", [True, False])
def test_reading_ahead_needs_nothing_but_files(tmp_path: Path, folder_is_there):
    folder = tmp_path / "model"
    folder.mkdir()
    if folder_is_there:
        (folder / "inner").mkdir()
        (folder / "model.safetensors").write_bytes(b"0" * 10_000)
    _read_ahead(folder)
