"""One commitment's way, on a real Hub, a real store and real child processes: what is asked, what is kept, what is blamed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from neurons.adapters import NOBODY
from sn29 import telemetry
from sn29.errors import Reason
from sn29.evaluation.worker import ChildEnded, Ending
from sn29.examination import Entrant, Machine, Measured, Ports, Rules, _blame, inspect, measure
from sn29.hub import Hub
from sn29.localnet.http_exchange import Wire
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Change, Fault
from sn29.models import checkpoint, fingerprint
from sn29.models.disk import Disk
from sn29.records import Commitment, Head, ModelId, Sample, Window
from sn29.rules.schedule import in_force, parse_file
from sn29.rules.selection import Claim, Inspected
from sn29.store import Store

RULES = """\
reward_share: 1
families: [LlamaForCausalLM]
tokenizer: {free: true}
limits: {parameters: 60000, bytes: 1e6, max_tokens: 300, max_chars: 200, round_trip_failures: 1}
dataset: {folder: text, files: "*.parquet", column: text}
samples: {count: 2, window_blocks: 1000}
pool: {keep: 4, pending: 4}
"""
WINDOW = Window("c00", 1, Head(1000, "0x" + "12" * 32))
SAMPLES = (Sample("0" * 32, "the text about the sea"), Sample("1" * 32, "the theatre in the hills"))


class Site:
    """A Hub, its miners, and a validator that looks at them."""

    def __init__(self, folder: Path, server: LoopbackHub) -> None:
        self.folder, self.server = folder, server
        self.rules = Rules({"c00": parse_file("c00", RULES)}, NOBODY, {"c00": "0"})
        self.competition = in_force(self.rules.files["c00"], 1000)
        self.ports = self.validator("state")

    def validator(self, state: str, **machine: Any) -> Ports:
        folder = self.folder / state
        plain = Machine(folder / "models", folder / "records", "cpu", "float32", 1, 120, 60)
        hub = Hub(self.server.endpoint, timeout_s=2, attempts=2, pause_s=0.05, say=telemetry.warn)
        unused: Any = None
        return Ports(unused, hub, Store(folder / "store.db"), unused, unused, replace(plain, **machine))

    def publish(self, name: str, model: Path, block: int = 100) -> Commitment:
        hub = Hub(self.server.endpoint, token=self.server.add_user(name))
        hub.create(f"{name}/model")
        found = ModelId(name, "model", hub.upload(f"{name}/model", model, message="model"))
        content = checkpoint.content_id(hub.listing(found).files)
        self.server.served.clear()
        return Commitment(f"5{name}", block, found, checkpoint.digest(content, f"5{name}"), "c00")

    def look(self, commitment: Commitment, ports: Ports | None = None, **claims: Any) -> Any:
        self.server.served.clear()
        return asyncio.run(inspect(ports or self.ports, self.rules, self.competition, WINDOW, commitment, None, **claims))

    def entrant(self, commitment: Commitment) -> Entrant:
        found = self.look(commitment)
        assert isinstance(found, Entrant), found
        return found

    def measure(self, entrant: Entrant, ports: Ports | None = None, paid: tuple[str, ...] = ()) -> Measured:
        return asyncio.run(measure(ports or self.ports, self.competition, entrant, SAMPLES, 1000, paid))

    def asked(self) -> list[tuple[str, str, int]]:
        """(port and method, path, bytes) of each request since the last look."""
        return [(f"{s.port} {s.method}", s.path, s.num_bytes) for s in self.server.served]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with LoopbackHub(tmp_path / "hub") as server:
        site = Site(tmp_path, server)
        yield site
        site.ports.store.close()


@pytest.fixture
def model(make_checkpoint, byte_tokenizer, tmp_path):
    """model(seed) -> a legal checkpoint with its tokenizer in a folder of its own."""

    def make(seed: int = 0, **config: Any) -> Path:
        source = make_checkpoint(seed=seed, **config)
        folder = shutil.copytree(source, tmp_path / "models" / source.name, dirs_exist_ok=True)
        shutil.copy(byte_tokenizer, folder / "tokenizer.json")
        return Path(folder)

    return make


@pytest.fixture
def events() -> Iterator[list[tuple[str, str]]]:
    """(event, sentence) of everything that is told from here on."""
    found: list[tuple[str, str]] = []
    telemetry.configure(level="CRITICAL")
    handler = logger.add(lambda m: found.append((m.record["extra"]["event"], m.record["message"])), level="INFO")
    yield found
    logger.remove(handler)


# --- liveness ---------------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_revision_costs_one_request_without_a_body(site, model):
    commitment = site.publish("ann", model(1))
    first = site.entrant(commitment)
    assert sum(num_bytes for _, _, num_bytes in site.asked()) > 50_000
    again = site.entrant(commitment)
    assert again == first
    assert [(what, num_bytes) for what, _, num_bytes in site.asked()] == [("hub HEAD", 0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("delete", Reason.REPOSITORY_GONE),
        ("private", Reason.REPOSITORY_GONE),
        ("gated", Reason.REPOSITORY_CLOSED),
        ("squash", Reason.REVISION_GONE),
    ],
)
def test_a_repository_that_is_not_public_any_more_has_its_reason_though_all_is_known(site, model, change: Change, reason):
    commitment = site.publish("ann", model(1))
    site.entrant(commitment)
    site.server.faults.set(Fault("ann", times=1, change=change))
    for _ in range(2):
        found = site.look(commitment)
        assert (found.status, found.reason) == ("rejected", reason.code)
        assert len(site.asked()) == 1, "neither remembered nor looked into"
    if change == "private":
        Hub(site.server.endpoint, token=site.server.add_user("ann")).set_private("ann/model", False)
        assert isinstance(site.look(commitment), Entrant)


@pytest.mark.parametrize(
    "fault",
    [Fault("ann", status=500), Fault("ann", status=403), Fault("ann", wire=Wire(drop=True)),
     Fault("ann", status=429, headers={"Retry-After": "60"}), Fault("ann", status=302, headers={"Location": "https://example.org"})],
    ids=["500", "403 of a proxy", "dropped", "429", "another origin"],
)  # fmt: skip
def test_a_hub_that_does_not_answer_puts_a_known_model_off(site, model, fault):
    commitment = site.publish("ann", model(1))
    known = site.entrant(commitment)
    site.server.faults.set(fault)
    found = site.look(commitment)
    assert (found.status, found.reason) == ("unavailable", "unavailable")
    site.server.faults.set()
    assert site.look(commitment, site.validator("state")) == known


def test_a_listed_file_that_the_hub_does_not_find_is_a_revision_that_may_come_back(site, model):
    commitment = site.publish("ann", model(1))
    site.server.faults.set(Fault("resolve.*config", status=404, headers={"X-Error-Code": "EntryNotFound"}))
    assert site.look(commitment).reason == "revision_gone"
    site.server.faults.set()
    assert isinstance(site.look(commitment), Entrant)


# --- a refusal is for good --------------------------------------------------------------------------------------------


def test_files_that_are_not_the_committed_ones_are_listed_twice_before_they_are_refused(site, model):
    commitment = site.publish("ann", model(1))
    wrong = replace(commitment, digest="A" * 43 + "=")
    assert site.look(wrong).reason == "digest"
    assert [what for what, path, _ in site.asked() if "/tree/" in path] == ["hub GET", "hub GET"]
    assert site.look(wrong).reason == "digest"
    assert site.asked() == [], "remembered"


def test_a_list_with_a_flipped_digit_blames_nobody(site, model):
    """The digit is one of an object id, so that the list is one of other files: whatever byte it is, no refusal comes of it."""
    commitment = site.publish("ann", model(1))
    Hub(site.server.endpoint).listing(commitment.model)
    size = next(s.num_bytes for s in site.server.served if "/tree/" in s.path)
    outcomes = set()
    for at in range(0, size, 37):
        site.server.faults.set(Fault("tree", times=1, wire=Wire(flip_at=at)))
        found = site.look(commitment, site.validator(f"state {at}"))
        outcomes.add("entrant" if isinstance(found, Entrant) else found.status)
    assert outcomes <= {"entrant", "unavailable"}
    assert "unavailable" in outcomes
    site.server.faults.set()
    assert isinstance(site.look(commitment), Entrant)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_an_exact_copy_costs_its_list_of_files(site, model):
    commitment = site.publish("thief", model(1), block=200)
    facts = site.entrant(site.publish("ann", model(1))).facts
    claims = {facts.content_id: Claim(100, "5ann")}
    found = site.look(commitment, site.validator("other"), earlier=claims)
    assert found == Inspected(commitment, facts.content_id, (facts.weights_id,))
    assert [what for what, _, _ in site.asked()] == ["hub GET"]
    assert sum(num_bytes for _, _, num_bytes in site.asked()) < 2000
    assert site.look(commitment, site.validator("other"), earlier=claims) == found
    assert site.asked() == [], "a revision does not change"
    assert isinstance(site.look(commitment, since=90, earlier=claims), Entrant), "an earlier claim is looked into"


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_costs_one_request_a_tensor_within_its_budget(site, model):
    commitment = site.publish("ann", model(1))
    found = site.entrant(commitment)
    taken = fingerprint.decode(site.ports.store.fingerprint(found.facts.content_id))
    spans = [num_bytes for what, _, num_bytes in site.asked() if what == "store GET"]
    assert len(taken) >= 4
    assert len(spans) == 2 + len(taken), "the header's length, the header, and each tensor once"
    assert sum(spans[2:]) <= fingerprint.BUDGET_BYTES


def test_a_model_is_judged_without_its_fingerprint_and_it_is_taken_later(site, model, events):
    commitment = site.publish("ann", model(1))
    site.server.faults.set(Fault("store GET", skip=2, status=500))
    found = site.entrant(commitment)
    assert site.ports.store.fingerprint(found.facts.content_id) is None
    assert "no_fingerprint" in [event for event, _ in events]
    site.server.faults.set()
    site.entrant(commitment)
    assert site.ports.store.fingerprint(found.facts.content_id) is not None


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_file_that_changed_on_our_disk_is_fetched_again_and_nobody_is_blamed(site, model, events):
    """And losses without a digest, as a store of the schema before has them, are measured once more."""
    entrant = site.entrant(site.publish("ann", model(1)))
    content = entrant.facts.content_id
    folder = shutil.copytree(model(1), site.ports.machine.models_dir / content)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    site.server.served.clear()
    first = site.measure(entrant)
    assert first.outcome.status == "evaluated"
    assert [what for what, _, _ in site.asked() if what == "store GET"] == ["store GET"]
    assert [event for event, _ in events if event in ("disk", "refused")] == ["disk"]
    digest = site.ports.store.tensor_digest(content)
    assert digest == checkpoint.tensor_digest(model(1))
    site.server.served.clear()
    assert site.measure(entrant) == first, "nothing is measured twice"
    with sqlite3.connect(site.folder / "state" / "store.db") as db:
        db.execute("update content set tensor_digest = null")
    db.close()
    assert site.measure(entrant) == first
    assert site.ports.store.tensor_digest(content) == digest
    assert site.asked() == [], "the files are here"


def test_models_that_earn_nothing_make_room_longest_unused_first_and_one_that_is_used_stays(site, model, events):
    entrants = [site.entrant(site.publish(name, model(seed))) for seed, name in enumerate(("ann", "ben", "cat", "dan"))]
    contents = [e.facts.content_id for e in entrants]
    size = sum(f.size for f in entrants[0].listing.files if checkpoint.is_content(f.path))
    ports = site.validator("state", models_bytes=int(3.5 * size))
    for content in contents[:3]:
        with Disk(ports.machine.models_dir).using(content) as folder:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"0" * size)
        time.sleep(0.02)
    with Disk(ports.machine.models_dir).using(contents[1]):
        found = site.measure(entrants[3], ports, paid=(contents[0],))
    assert found.outcome.status == "evaluated"
    left = {held.name for held in Disk(ports.machine.models_dir).held() if held.is_whole}
    assert left == {contents[0], contents[1], contents[3]}
    assert [event for event, _ in events if event == "deleted"] == ["deleted"]
    too_small = site.measure(entrants[2], site.validator("state", models_bytes=1000))
    assert (too_small.outcome.status, "disk" in too_small.outcome.detail) == ("unavailable", True)


def test_a_child_that_is_killed_from_outside_is_not_the_models_fault(site, model):
    """Somebody (the kernel, when memory is short) kills each child as soon as it is there."""
    entrant = site.entrant(site.publish("ann", model(1)))
    for _ in range(3):

        async def story() -> Measured:
            task = asyncio.create_task(measure(site.ports, site.competition, entrant, SAMPLES, 1000))
            while not task.done():
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
            return task.result()

        found = asyncio.run(story())
        assert found.outcome.status == "unavailable"
        assert "killed" in found.outcome.detail
    assert isinstance(site.look(entrant.commitment), Entrant)


def _children() -> list[int]:
    """Evaluations that this process has started and that run their own program by now."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if b"sn29.evaluation.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.parametrize(
    ("ending", "reason"),
    [(Ending.DEADLINE, Reason.DEADLINE), (Ending.CPU_TIME, Reason.DEADLINE), (Ending.TOKENIZER, Reason.TOKENIZER),
     (Ending.MEMORY, Reason.CRASHED), (Ending.ABORT, Reason.CRASHED), (Ending.FAULT, Reason.CRASHED),
     (Ending.ERROR, Reason.CRASHED)],
)  # fmt: skip
def test_how_an_evaluation_ends_twice_says_why_a_model_is_refused(site, ending, reason):
    blamed = _blame(ChildEnded(ending, "the last line"), site.ports.machine)
    assert blamed.reason is reason
    assert "the last line" in blamed.got


def test_an_evaluation_that_fails_twice_is_the_models_fault_if_our_own_model_passes(site, model, events):
    entrant = site.entrant(site.publish("ann", model(1)))
    slow = replace(site.ports, machine=replace(site.ports.machine, evaluation_deadline_s=0.2))
    found = site.measure(entrant, slow)
    assert (found.outcome.status, found.outcome.reason) == ("rejected", "deadline")
    assert [event for event, _ in events if event == "retry"] == ["retry", "retry"]
    assert site.look(entrant.commitment).reason == "deadline", "remembered"
