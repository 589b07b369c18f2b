"""One commitment's way, on a real Hub, a real store and real child processes: what is asked, what is kept, what is blamed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import OnItsOwnLoop

from neurons.adapters import NOBODY, Tokenizers
from sn29 import telemetry
from sn29.errors import Reason, Rejected
from sn29.evaluation.profile import Profile, Tiles
from sn29.evaluation.worker import ChildEnded, Ending, Evaluator, Job
from sn29.examination import (
    Entrant,
    FixedText,
    Machine,
    Ports,
    Rules,
    inspect,
)
from sn29.hub import Hub
from sn29.localnet.http_exchange import Wire
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Change, Fault
from sn29.measurement import Measured, _blame, _may_be_the_models, measure
from sn29.models import checkpoint, fingerprint
from sn29.models.disk import Disk
from sn29.models.tokenizer import Tokenizer
from sn29.records import Commitment, Head, ModelId, Sample, Window
from sn29.rules.competition import FixedTokenizer
from sn29.rules.schedule import in_force, parse_file
from sn29.rules.selection import Claim, Inspected
from sn29.store import Store, Unanswered

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

    def __init__(self, folder: Path, server: LoopbackHub, evaluator: Evaluator) -> None:
        self.folder, self.server, self.evaluator = folder, server, evaluator
        self.rules = Rules({"c00": parse_file("c00", RULES)}, NOBODY, {"c00": "0"})
        self.competition = in_force(self.rules.files["c00"], 1000)
        self.ports = self.validator("state")

    def validator(self, state: str, **machine: Any) -> Ports:
        folder = self.folder / state
        plain = Machine(folder / "models", folder / "records", "cpu", "float32", 1, 120, 60)
        hub = Hub(self.server.endpoint, timeout_s=20, attempts=2, pause_s=0.05, say=telemetry.warn)
        unused: Any = None
        return Ports(unused, hub, Store(folder / "store.db"), unused, unused, replace(plain, **machine), self.evaluator)

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

    def measure(self, entrant: Entrant, ports: Ports | None = None, paid: tuple[str, ...] = (), block: int = 1000) -> Measured:
        return asyncio.run(measure(ports or self.ports, self.competition, entrant, SAMPLES, block, paid))

    def asked(self) -> list[tuple[str, str, int]]:
        """(port and method, path, bytes) of each request since the last look."""
        return [(f"{s.port} {s.method}", s.path, s.num_bytes) for s in self.server.served]


@pytest.fixture
def site(tmp_path: Path, evaluator: Evaluator) -> Iterator[Site]:
    with LoopbackHub(tmp_path / "hub") as server:
        site = Site(tmp_path, server, evaluator)
        yield site
        site.ports.store.close()


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


def test_a_list_that_is_itself_what_is_wrong_must_come_twice(site, model, events):
    commitment = site.publish("ann", model(1))
    more = {"Link": f'<{site.server.endpoint}/more>; rel="next"'}
    site.server.faults.set(Fault("tree", times=1, headers=more))
    assert isinstance(site.look(commitment), Entrant), "one reply says that there is another page"
    assert [event for event, _ in events if event == "hub_retry"] == ["hub_retry"]
    site.server.faults.set(Fault("tree", headers=more))
    other = site.validator("other")
    assert site.look(commitment, other).reason == "forbidden_file"
    assert len(site.asked()) == 2
    assert site.look(commitment, other).reason == "forbidden_file"
    assert site.asked() == [], "remembered"


@pytest.mark.timeout(60)
def test_a_hub_that_is_silent_costs_one_commitment_a_bounded_time(site, model):
    commitment = site.publish("ann", model(1))
    hub = Hub(site.server.endpoint, timeout_s=60, attempts=9, pause_s=0.01)
    hurried = replace(site.ports, hub=hub, machine=replace(site.ports.machine, inspection_s=2))
    site.server.faults.set(Fault("store GET", wire=Wire(delay_s=90)))
    assert site.look(commitment, hurried).status == "unavailable"


def test_a_store_that_refuses_in_two_rounds_what_the_hub_lists_is_a_revision_that_is_gone(site, model):
    """Its owner has deleted the object behind the listed file: the Hub itself goes on to name it."""
    commitment = site.publish("ann", model(1))
    site.server.faults.set(Fault("store GET", status=403))
    first = site.look(commitment)
    assert first.status == "unavailable", "a store may have a bad day"
    row = Unanswered(commitment.hotkey, str(commitment.model), 1000)
    site.ports.store.keep_unanswered([row], forget_before=0)
    assert site.look(commitment).status == "unavailable", "in the same round"
    second = site.look(commitment, block=2000)
    assert (second.status, second.reason) == ("rejected", "revision_gone")
    assert "HTTP 403" in second.got
    site.server.faults.set(Fault(".", status=403))
    assert site.look(commitment, block=2000).status == "unavailable", "the Hub itself does not answer"
    site.server.faults.set()
    entrant = site.look(commitment, block=2000)
    assert isinstance(entrant, Entrant), "it may come back"
    site.server.faults.set(Fault("store GET", status=404))
    assert site.measure(entrant).outcome.status == "unavailable"
    assert site.measure(entrant, block=2000).outcome.reason == "revision_gone"


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


def test_a_bit_that_flips_while_a_fingerprint_is_taken_later_refuses_nobody(site, model, events):
    """The headers are read once more then, and nothing says whether they came as they are."""
    commitment = site.publish("ann", model(1))
    for at in (0, 10, 60, 333):
        ports = site.validator(f"state {at}")
        site.server.faults.set(Fault("store GET", skip=2, status=500))
        assert isinstance(site.look(commitment, ports), Entrant)
        events.clear()
        site.server.faults.set(Fault("store GET", skip=1 if at else 0, times=1, wire=Wire(flip_at=at)))
        found = site.look(commitment, ports)
        assert isinstance(found, Entrant), (at, found)
    assert "no_fingerprint" in [event for event, _ in events]
    ports = site.validator("other")
    site.server.faults.set(Fault("store GET", skip=2, status=500))
    assert isinstance(site.look(commitment, ports), Entrant)
    site.server.faults.set(Fault("hub GET .*safetensors", times=1, change="gated"))
    assert site.look(commitment, ports).reason == "repository_closed", "what the Hub says of the repository counts here too"


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
    asyncio.run(site.evaluator.choose(300, device="cpu", dtype="float32"))  # the server is there
    for _ in range(3):

        async def story() -> Measured:
            task = asyncio.create_task(measure(site.ports, site.competition, entrant, SAMPLES, 1000))
            while not task.done():
                for pid in _children(site.evaluator.server_pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.005)
            return task.result()

        found = asyncio.run(story())
        assert found.outcome.status == "unavailable"
        assert "killed" in found.outcome.detail
    assert isinstance(site.look(entrant.commitment), Entrant)


def _children(server_pid: int) -> list[int]:
    """Evaluations that are running."""
    return [int(pid) for pid in Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [(Ending.DEADLINE, Reason.DEADLINE), (Ending.CPU_TIME, Reason.DEADLINE), (Ending.TOKENIZER, Reason.TOKENIZER),
     (Ending.MEMORY, Reason.CRASHED), (Ending.ABORT, Reason.CRASHED), (Ending.FAULT, Reason.CRASHED),
     (Ending.ERROR, Reason.CRASHED), (Ending.KILLED, None), (Ending.DEVICE, None), (Ending.DEVICE_MEMORY, None),
     (Ending.MACHINE, None)],
)  # fmt: skip
def test_how_an_evaluation_ends_twice_says_why_a_model_is_refused_or_that_it_is_not(site, ending, reason):
    way = Profile(256, Tiles(64, 128, compiled=False), "documents")
    own = Job("/model", "/model/tokenizer.json", 1, 50, "float32", "cpu", 1, way, ())
    shared = replace(own, tokenizer="/elsewhere/tokenizer.json")
    ended = ChildEnded(ending, "the last line")
    assert _may_be_the_models(ended, own) == (reason is not None)
    assert _may_be_the_models(ended, shared) == (reason is not None and ending is not Ending.TOKENIZER)
    if reason is not None:
        blamed = _blame(ended, site.ports.machine)
        assert blamed.reason is reason
        assert "the last line" in blamed.got


def test_a_model_that_is_too_slow_has_its_second_try_in_the_next_round(site, model, events):
    """Whatever else runs on this machine now may have ended by then. A round that waits for others is no next round."""
    entrant = site.entrant(site.publish("ann", model(1)))
    slow = replace(site.ports, machine=replace(site.ports.machine, evaluation_deadline_s=0.005))
    first = site.measure(entrant, slow)
    assert (first.outcome.status, first.is_over) == ("unavailable", True)
    assert "0.005 s" in first.outcome.detail
    assert "next round" in first.outcome.detail
    again = site.measure(entrant, slow)
    assert (again.outcome.status, again.is_over) == ("unavailable", True)
    assert [event for event, _ in events if event == "retry"] == ["retry"], "not tried again in this round"
    found = site.measure(entrant, slow, block=2000)
    assert (found.outcome.status, found.outcome.reason) == ("rejected", "deadline")
    assert site.look(entrant.commitment, slow).reason == "deadline", "remembered"
    assert isinstance(site.look(entrant.commitment), Entrant), "until the operator gives it more time"


SPOILED = """\
import os, sys
from importlib.machinery import PathFinder

class AfterTorch:
    def find_spec(self, name, path=None, target=None):
        if name != "torch.nn.functional":
            return None
        spec = PathFinder.find_spec(name, path)
        plainly = spec.loader.exec_module

        def then(module):
            plainly(module)
            spoil(module)

        spec.loader.exec_module = then
        return spec

def spoil(module):
    import torch
    plain = module.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        if query.shape[-1] not in %s:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **more)
        %s

    module.scaled_dot_product_attention = attention

sys.meta_path.insert(0, AfterTorch())
"""
"""A sitecustomize.py for children: torch's attention does something else for heads of these sizes."""
OF_THE_MODEL, OF_ALL = (8,), (8, 16)
"""Sizes of the heads of the miner's model, and of ours in the self-test too."""
READS_AHEAD = "return plain(query, key, value, None, 0.0, False, **more)"
DRAWS = "return plain(query, key, value, attn_mask, dropout_p, is_causal, **more) + torch.randn(())"
NO_ROOM = "raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB. Process 4711 has 70 GiB in use.')"


@pytest.fixture
def spoil(site, tmp_path, monkeypatch):
    """spoil(head sizes, what attention does) -> from here on in every child: as a library or a machine that fails would."""
    spoiled = OnItsOwnLoop(tmp_path / "evaluations")

    def put(heads: tuple[int, ...], what: str) -> None:
        (tmp_path / "spoiled").mkdir(exist_ok=True)
        (tmp_path / "spoiled" / "sitecustomize.py").write_text(SPOILED % (heads, what))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'spoiled'}{os.pathsep}{Path(__file__).parents[1]}")
        site.ports = replace(site.ports, evaluator=spoiled)

    yield put
    asyncio.run(spoiled.close())


@pytest.mark.parametrize(
    ("what", "reason"), [(READS_AHEAD, "not_causal"), (DRAWS, "not_deterministic"), ("os.abort()", "crashed")]
)
def test_a_model_that_fails_twice_is_refused_if_our_own_model_passes(site, model, events, spoil, what, reason):
    """Metadata cannot show it, and no repository that passes the metadata does it: here torch does it to this model alone."""
    entrant = site.entrant(site.publish("ann", model(1)))
    spoil(OF_THE_MODEL, what)
    found = site.measure(entrant)
    assert (found.outcome.status, found.outcome.reason) == ("rejected", reason)
    assert [event for event, _ in events if event == "retry"] == ["retry", "retry"]
    assert site.look(entrant.commitment).reason == reason, "remembered"


def test_a_machine_on_which_our_own_model_fails_too_refuses_nobody(site, model, events, spoil):
    entrant = site.entrant(site.publish("ann", model(1)))
    spoil(OF_ALL, READS_AHEAD)
    found = site.measure(entrant)
    assert (found.outcome.status, "this machine" in found.outcome.detail) == ("unavailable", True)
    assert [event for event, _ in events if event == "retry"] == ["retry"]
    assert isinstance(site.look(entrant.commitment), Entrant)


def test_a_gpu_that_is_full_refuses_nobody_however_often(site, model, events, spoil):
    entrant = site.entrant(site.publish("ann", model(1)))
    spoil(OF_THE_MODEL, NO_ROOM)
    for block in (1000, 2000):
        found = site.measure(entrant, block=block)
        assert (found.outcome.status, found.is_over) == ("unavailable", False)
        assert "too little free memory on its GPU" in found.outcome.detail
    assert "retry" not in [event for event, _ in events]
    assert isinstance(site.look(entrant.commitment), Entrant)


# --- the competition's own tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil_file", ["gone", "cut", "other"])
def test_a_fixed_tokenizer_that_is_lost_on_our_disk_is_fetched_again(site, byte_tokenizer, tmp_path, events, spoil_file):
    hub = Hub(site.server.endpoint, token=site.server.add_user("zoo"))
    hub.create("zoo/tokenizer")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(byte_tokenizer, folder)
    revision = hub.upload("zoo/tokenizer", folder, message="tokenizer")
    wanted = FixedTokenizer(
        hub="zoo/tokenizer", revision=revision, fingerprint=Tokenizer.load(byte_tokenizer).fingerprint(), start_token=0
    )
    tokenizers = Tokenizers(site.ports.hub, tmp_path / "kept")
    first = tokenizers(wanted)
    assert tokenizers(wanted) is first
    assert first == (first.path, 257, f"sha256:{hashlib.sha256(byte_tokenizer.read_bytes()).hexdigest()}")
    if spoil_file == "gone":
        first.path.unlink()
    elif spoil_file == "cut":
        first.path.write_bytes(first.path.read_bytes()[:-100])
    else:
        first.path.write_text(first.path.read_text().replace('"th"', '"ht"'))
    assert tokenizers(wanted) == first
    assert first.path.read_bytes() == byte_tokenizer.read_bytes()
    assert Tokenizers(site.ports.hub, tmp_path / "kept")(wanted) == first, "and by the next program"


@pytest.mark.parametrize("how", ["gone", "cut", "refused by the adapter"])
def test_the_loss_of_a_fixed_tokenizer_refuses_no_model(site, make_checkpoint, byte_tokenizer, tmp_path, how):
    """Between the adapter's look at the file and the child's it is gone, or another one."""
    path = shutil.copy(byte_tokenizer, tmp_path / "tokenizer.json")
    text = FixedText(path, 257, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")

    def fixed(wanted: FixedTokenizer) -> FixedText:
        if how == "refused by the adapter":
            raise Rejected(Reason.TOKENIZER, "another one", "the one that is pinned")
        return text

    site.rules = Rules({"c00": parse_file("c00", RULES.replace("{free: true}", FIXED))}, NOBODY, {"c00": "0"})
    site.competition = in_force(site.rules.files["c00"], 1000)
    site.ports = replace(site.ports, tokenizer=fixed)
    entrant = site.entrant(site.publish("ann", make_checkpoint(seed=1)))
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    found = site.measure(entrant)
    assert (found.outcome.status, "tokenizer" in found.outcome.detail) == ("unavailable", True)
    shutil.copy(byte_tokenizer, path)
    text = FixedText(path, 257, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    assert isinstance(site.look(entrant.commitment), Entrant)


FIXED = "{hub: zoo/tokenizer, fingerprint: null, start_token: 0}"
