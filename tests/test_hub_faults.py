"""The Hub adapter and the downloads against a Hub whose replies, lines and owners do what they should not.

Every fault hits a real request on its way over a socket: see `localnet.hub_faults`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx2
import pytest

import sn29
from sn29.errors import Reason, Rejected, Unavailable
from sn29.hub import FileRefused, Hub, _is_of_hub, within
from sn29.localnet.http_exchange import HttpServer, Reply, Request, Wire, as_json
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Change, Fault, put_faults
from sn29.models.fetch import fetch
from sn29.records import ModelId, RepoListing

WEIGHTS = b"".join(i.to_bytes(4, "big") for i in range(150_000))
CONFIG = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'


class Site:
    """A Hub with one public model, its owner, a stranger, and what the stranger said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, LoopbackHub(folder / "hub")
        self.said: list[str] = []

    def publish(self) -> None:
        self.owner = Hub(self.server.endpoint, self.server.add_user("alice"))
        made = self.folder / "model"
        made.mkdir()
        (made / "config.json").write_bytes(CONFIG)
        (made / "model.safetensors").write_bytes(WEIGHTS)
        self.owner.create("alice/model")
        revision = self.owner.upload("alice/model", made, message="first")
        self.model = ModelId("alice", "model", revision)
        self.server.served.clear()

    def stranger(self, *, timeout_s: float = 20, attempts: int = 4) -> Hub:
        return Hub(self.server.endpoint, timeout_s=timeout_s, attempts=attempts, pause_s=0.01, say=self.say)

    def say(self, event: str, sentence: str) -> None:
        self.said.append(f"{event}: {sentence}")

    def look(self, hub: Hub, to: Path, silence_s: float = 20) -> RepoListing:
        """All that a validator asks of a model: is it there, its files, its metadata, its bytes."""
        listing = hub.listing(self.model)
        hub.alive(self.model)
        read = hub.reader(listing)
        assert read("config.json", 0, 1 << 16) == CONFIG
        assert read("model.safetensors", 8, 1000) == WEIGHTS[8:1008]
        fetch(hub, listing, to, deadline_s=60, silence_s=silence_s, say=self.say)
        assert (to / "model.safetensors").read_bytes() == WEIGHTS
        assert (to / "config.json").read_bytes() == CONFIG
        return listing


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    with site.server:
        site.publish()
        yield site


@contextmanager
def _another_origin() -> Iterator[tuple[str, list[Request]]]:
    """Address of a server that keeps what it is asked."""
    asked: list[Request] = []

    def answer(request: Request) -> Reply:
        asked.append(request)
        return as_json([], headers={"X-Repo-Commit": "0" * 40})

    server = HttpServer("other", "127.0.0.1", 0, answer)
    server.start()
    try:
        yield server.url, asked
    finally:
        server.stop()


def _reason(look: Callable[[], object]) -> Reason:
    with pytest.raises(Rejected) as caught:
        look()
    return caught.value.reason


TREE, HEAD, CONFIG_GET = r"hub GET .*/tree/", r"hub HEAD .*/resolve/", r"hub GET .*/resolve/.*config\.json"
RESOLVE, STORE = r"hub GET .*/resolve/.*safetensors", r"store GET"
SILENT = Wire(delay_s=30)

PASSING_FAULTS = [
    *(Fault(place, times=2, status=503, headers={"Retry-After": "0"}) for place in (TREE, HEAD, CONFIG_GET, RESOLVE, STORE)),
    *(Fault(place, times=1, status=500) for place in (TREE, CONFIG_GET, STORE)),
    *(Fault(place, times=1, wire=Wire(drop=True)) for place in (TREE, HEAD, CONFIG_GET, RESOLVE, STORE)),
    *(Fault(place, times=1, wire=SILENT) for place in (TREE, HEAD, CONFIG_GET, RESOLVE, STORE)),
    *(Fault(place, times=1, wire=Wire(cut_at=20)) for place in (TREE, CONFIG_GET, STORE)),
    *(Fault(place, times=1, wire=Wire(stall_at=20, stall_s=30)) for place in (TREE, CONFIG_GET, STORE)),
    *(Fault(place, times=1, wire=Wire(length_by=30)) for place in (TREE, CONFIG_GET)),
    *(Fault(place, times=1, wire=Wire(length_by=-30)) for place in (TREE, CONFIG_GET)),
    *(Fault(place, times=1, wire=Wire(flip_at=0)) for place in (TREE, CONFIG_GET)),
    Fault(TREE, times=1, status=429, headers={"Retry-After": "1"}),
    Fault(STORE, skip=1, times=1, wire=Wire(cut_at=300_000)),
    Fault(STORE, skip=1, times=3, wire=Wire(cut_at=150_000)),
    Fault(STORE, skip=1, times=1, wire=Wire(stall_at=300_000, stall_s=30)),
    Fault(STORE, skip=1, times=1, wire=Wire(flip_at=300_000)),
    Fault(STORE, skip=1, times=1, wire=Wire(length_by=-300_000)),
    Fault(STORE, times=1, headers={"Content-Range": "bytes 0-9/10"}),
    Fault(STORE, times=1, status=403),
    Fault(STORE, times=1, status=404),
    Fault(RESOLVE, times=1, status=403),
    Fault(RESOLVE, times=1, status=404),
    Fault(TREE, times=1, status=302, headers={"Location": "http://192.0.2.1/api/models/alice/model/tree/main"}),
    Fault(RESOLVE, times=1, status=302, headers={"Location": "https://192.0.2.1/weights"}),
    Fault(RESOLVE, times=1, status=302, headers={"Location": "file:///etc/passwd"}),
    Fault(RESOLVE, times=1, status=302, headers={"Location": "http://[::bad"}),
]


def _name(fault: Fault) -> str:
    wire = {name: value for name, value in fault.to_json()["wire"].items() if value}
    return f"{fault.match} {fault.status or ''} {fault.headers or ''} {wire or ''} skip={fault.skip}"


@pytest.mark.parametrize("fault", PASSING_FAULTS, ids=_name)
def test_fault_that_passes_is_survived_and_told(site: Site, fault: Fault) -> None:
    site.server.faults.set(fault)
    patience_s = 0.5 if fault.wire.delay_s or fault.wire.stall_s else 20
    site.look(site.stranger(timeout_s=patience_s), site.folder / "to", patience_s)
    assert site.server.faults.hits() == (fault.times,)
    assert len(site.said) >= 1, "what went wrong is said"


HARMLESS_FAULTS = [
    Fault(RESOLVE, ignore_range=True),
    Fault(STORE, ignore_range=True),
    Fault(STORE, wire=Wire(length_by=30)),
    Fault(STORE, wire=Wire(bytes_per_s=5e6)),
    Fault(".", wire=Wire(delay_s=0.01)),
]


@pytest.mark.parametrize("fault", HARMLESS_FAULTS, ids=_name)
def test_fault_that_costs_bytes_or_time_only_is_not_even_noticed(site: Site, fault: Fault) -> None:
    site.server.faults.set(fault)
    site.look(site.stranger(), site.folder / "to")
    assert site.server.faults.hits() > (0,)
    assert not site.said


def test_cut_download_fetches_only_the_rest_and_forgotten_range_skips_what_is_there(site: Site) -> None:
    hub = site.stranger()
    listing = hub.listing(site.model)
    cut = Fault(STORE, times=1, wire=Wire(cut_at=300_000))
    site.server.faults.set(cut)
    fetch(hub, listing, site.folder / "one", deadline_s=60, say=site.say)
    assert [s.range for s in site.server.served if s.port == "store"] == ["", "bytes=300000-"]
    assert "goes on at byte 300,000 of 600,000" in site.said[-1]
    site.server.faults.set(cut, Fault(STORE, ignore_range=True))
    fetch(hub, listing, site.folder / "two", deadline_s=60)
    assert (site.folder / "two" / "model.safetensors").read_bytes() == WEIGHTS


LASTING_FAULTS = [
    Fault(".", status=500),
    Fault(".", wire=Wire(drop=True)),
    Fault(".", status=403),
    Fault(".", status=404),
    Fault(".", status=200),
    Fault(".", status=204),
    Fault(".", status=304),
    Fault(".", status=302, headers={"Location": "https://example.org/"}),
    Fault(".", status=302, headers={"Location": "/again"}),
    Fault(".", status=429, headers={"Retry-After": "299"}),
    Fault("GET", wire=Wire(cut_at=5)),
]


@pytest.mark.parametrize("fault", LASTING_FAULTS, ids=_name)
def test_fault_that_lasts_says_nothing_about_the_model(site: Site, fault: Fault) -> None:
    hub = site.stranger(attempts=1)
    listing = hub.listing(site.model)
    site.server.faults.set(fault)
    asks: list[Callable[[], object]] = [
        lambda: site.stranger(attempts=1).listing(site.model),
        lambda: site.stranger(attempts=1).reader(listing)("config.json", 0, 1 << 16),
        lambda: fetch(site.stranger(attempts=1), listing, site.folder / "to", deadline_s=1),
    ]
    for ask in asks if fault.match == "GET" else [*asks, lambda: site.stranger(attempts=1).alive(site.model)]:
        with pytest.raises(Unavailable):
            ask()
    site.server.faults.set()
    site.look(hub, site.folder / "to")


@pytest.mark.parametrize("status", [403, 404, 410, 500])
def test_span_that_is_refused_costs_as_many_requests_as_there_are_attempts(site: Site, status: int) -> None:
    """And not as many for each attempt. That it is the store that refuses is known from the error."""
    hub = site.stranger()
    listing = hub.listing(site.model)
    site.server.faults.set(Fault(STORE, status=status))
    hub.asked.clear()
    with pytest.raises(Unavailable) as caught:
        hub.reader(listing)("model.safetensors", 0, 8)
    assert isinstance(caught.value, FileRefused) == (status != 500)
    assert hub.asked["files"] == 2 * 4, "each attempt asks the Hub and is sent to the store"
    site.server.faults.set(Fault(CONFIG_GET, wire=Wire(flip_at=3)))
    hub.asked.clear()
    with pytest.raises(Unavailable, match="other bytes came"):
        hub.reader(listing)("config.json", 0, len(CONFIG))
    assert hub.asked["files"] == 4
    site.server.faults.set(Fault(STORE, status=status))
    with pytest.raises(Unavailable) as caught:
        fetch(hub, listing, site.folder / "to", deadline_s=60)
    assert isinstance(caught.value, FileRefused) == (status != 500)


@pytest.mark.timeout(25)
def test_calls_within_a_time_end_in_it_together(site: Site) -> None:
    """Also in threads, and whatever the Hub's own timeouts and pauses are."""
    hub = site.stranger()
    listing = hub.listing(site.model)

    async def look(seconds: float) -> None:
        with within(seconds):
            read = hub.reader(listing)
            for ask in (lambda: hub.listing(site.model), lambda: hub.alive(site.model), lambda: read("config.json", 0, 9)):
                with pytest.raises(Unavailable):
                    await asyncio.to_thread(ask)

    site.server.faults.set(Fault(".", wire=Wire(delay_s=60)))
    asyncio.run(look(0.3))
    hub.asked.clear()
    asyncio.run(look(0))
    assert not hub.asked
    slow = Hub(site.server.endpoint, pause_s=60)
    site.server.faults.set(Fault(".", status=500))
    with within(5), pytest.raises(Unavailable, match="500"):
        slow.listing(site.model)
    assert slow.asked["api"] == 1, "there is no time for the pause"
    site.server.faults.set()
    assert hub.listing(site.model) == listing


def test_bytes_that_change_on_the_line_each_time_are_not_the_models_fault(site: Site) -> None:
    hub = site.stranger()
    listing = hub.listing(site.model)
    two = [Fault(STORE, times=1, wire=Wire(flip_at=at)) for at in (100_000, 200_000)]
    site.server.faults.set(*two)
    with pytest.raises(Unavailable, match="other bytes came each time"):
        fetch(hub, listing, site.folder / "to", deadline_s=60, say=site.say)
    assert [line.split(":")[0] for line in site.said] == ["wrong_bytes", "wrong_bytes"]
    site.server.faults.set(Fault(STORE, wire=Wire(flip_at=100_000)))
    assert _reason(lambda: fetch(hub, listing, site.folder / "to", deadline_s=60)) is Reason.CORRUPT
    assert not (site.folder / "to.part").exists(), "nothing of it is kept"


# ---- the repository behind the commitment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("delete", Reason.REPOSITORY_GONE),
        ("private", Reason.REPOSITORY_GONE),
        ("gated", Reason.REPOSITORY_CLOSED),
        ("squash", Reason.REVISION_GONE),
    ],
)
def test_repository_that_changes_between_two_requests_has_its_reason(site: Site, change: Change, reason: Reason) -> None:
    hub = site.stranger()
    listing = hub.listing(site.model)
    site.server.faults.set(Fault(RESOLVE, times=1, change=change))
    assert _reason(lambda: fetch(hub, listing, site.folder / "to", deadline_s=60)) is reason
    assert _reason(lambda: hub.alive(site.model)) is reason
    assert _reason(lambda: hub.reader(listing)("config.json", 0, 100)) is reason
    if change != "gated":  # a gated repository still lists its files: why `alive` asks for one
        assert _reason(lambda: hub.listing(site.model)) is reason


def test_repository_that_closes_while_its_weights_come_keeps_what_came(site: Site) -> None:
    hub = site.stranger()
    listing = hub.listing(site.model)
    cut = Fault(STORE, times=1, wire=Wire(cut_at=300_000))
    site.server.faults.set(cut, Fault(RESOLVE, skip=1, change="private"))
    assert _reason(lambda: fetch(hub, listing, site.folder / "to", deadline_s=60)) is Reason.REPOSITORY_GONE
    site.server.faults.set()
    site.owner.set_private("alice/model", False)
    site.server.served.clear()
    fetch(hub, listing, site.folder / "to", deadline_s=60)
    assert [s.range for s in site.server.served if s.port == "store"] == ["bytes=300000-"]


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, Reason.REPOSITORY_GONE),
        (401, {"X-Error-Message": "Invalid username or password."}, Reason.REPOSITORY_GONE),
        (401, {}, Reason.REPOSITORY_GONE),
        (401, {"X-Error-Code": "GatedRepo"}, Reason.REPOSITORY_CLOSED),
        (403, {"X-Error-Code": "GatedRepo"}, Reason.REPOSITORY_CLOSED),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, Reason.REPOSITORY_CLOSED),
        (404, {"X-Error-Code": "RepoNotFound"}, Reason.REPOSITORY_GONE),
        (404, {"X-Error-Code": "RevisionNotFound"}, Reason.REVISION_GONE),
        (404, {"X-Error-Code": "EntryNotFound"}, Reason.MISSING_FILE),
        (200, {"X-Repo-Commit": "1" * 40}, Reason.REVISION_GONE),
        (307, {"X-Repo-Commit": "1" * 40, "Location": "/elsewhere"}, Reason.REVISION_GONE),
    ],
)
def test_what_the_hub_says_no_with_has_its_reason(site: Site, status: int, headers: dict[str, str], reason: Reason) -> None:
    site.server.faults.set(Fault("resolve", status=status, headers=headers))
    hub = site.stranger()
    assert _reason(lambda: hub.alive(site.model)) is reason
    assert _reason(lambda: hub.read(site.model, "config.json", length=10)) is reason
    assert hub.asked["files"] == 2, "an answer is not asked for again"


def test_alive_is_one_request_without_a_body_of_the_larger_budget(site: Site) -> None:
    hub = site.stranger()
    hub.alive(site.model)
    hub.alive(site.model, "model.safetensors")
    assert [(s.port, s.method, s.status, s.num_bytes) for s in site.server.served] == [
        ("hub", "HEAD", 200, 0),
        ("hub", "HEAD", 302, 0),
    ]
    assert hub.asked == {"files": 2}
    assert _reason(lambda: hub.alive(site.model, "none.json")) is Reason.MISSING_FILE
    assert _reason(lambda: hub.alive(ModelId("a--b", "c", "0" * 40))) is Reason.REPOSITORY_GONE


def test_listing_that_is_too_long_is_refused_before_it_has_come(site: Site) -> None:
    rows = [{"type": "file", "path": f"{n:0250}", "size": 1, "oid": "0" * 40} for n in range(900)]
    long = HttpServer("long", "127.0.0.1", 0, lambda request: as_json(rows))
    deep = HttpServer("deep", "127.0.0.1", 0, lambda request: Reply(200, b"[" * 100_000))
    for server in (long, deep):
        server.start()
    assert _reason(lambda: Hub(long.url).listing(site.model)) is Reason.FORBIDDEN_FILE
    with pytest.raises(Unavailable):
        Hub(deep.url, attempts=1).listing(site.model)
    for server in (long, deep):
        server.stop()


# ---- redirects -------------------------------------------------------------------------------------------------------


def test_token_never_leaves_the_endpoint(site: Site) -> None:
    with _another_origin() as (url, asked):
        site.server.faults.set(Fault(r"hub (GET|POST)", status=307, headers={"Location": f"{url}/taken"}))
        asks: list[Callable[[], object]] = [
            lambda: site.owner.listing(site.model, as_owner=True),
            lambda: site.owner.read(site.model, "config.json", length=10, as_owner=True),
            lambda: site.owner.resolve("alice/model"),
            site.owner.whoami,
            lambda: site.owner.create("alice/other"),
        ]
        for ask in asks:
            with suppress(Unavailable, TypeError):  # what the other origin answers is no reply of a Hub
                ask()
    assert len(asked) >= 4, "a store on this machine is another origin of the same machine: it is asked"
    assert not [request for request in asked if "authorization" in request.headers]


def test_next_page_of_another_origin_is_asked_without_the_token(site: Site) -> None:
    with _another_origin() as (url, asked):
        site.server.faults.set(Fault(TREE, headers={"Link": f'<{url}/next>; rel="next"'}))
        site.owner.create("alice/data", kind="dataset")
        revision = site.owner.resolve("alice/data", "dataset")
        site.owner.listing(ModelId("alice", "data", revision), "dataset", as_owner=True)
    assert [("authorization" in request.headers) for request in asked] == [False]


def test_renamed_repository_is_followed_on_its_hub(site: Site) -> None:
    old, new = ModelId("alice", "old", site.model.revision), site.model
    site.server.faults.set(
        Fault("/api/models/alice/old", status=307, headers={"Location": f"/api/models/alice/model/tree/{new.revision}"}),
        Fault("/alice/old/", status=307, headers={"Location": f"/alice/model/resolve/{new.revision}/config.json"}),
    )
    hub = site.stranger()
    assert hub.listing(old).files == hub.listing(new).files
    hub.alive(old)
    assert hub.read(old, "config.json", length=1000) == CONFIG


def test_place_of_small_files_on_the_public_hub_is_followed(site: Site) -> None:
    """It answers resolve with a relative redirect to a cache, and states the commit on the first reply."""
    cached = f"/alice/model/resolve/{site.model.revision}/config.json?cached"
    headers = {"Location": cached, "X-Repo-Commit": site.model.revision}
    hub = site.stranger()
    site.server.faults.set(Fault("resolve/.*/config.json", times=1, status=307, headers=headers))
    hub.alive(site.model)
    assert hub.asked["files"] == 1, "the first reply says it"
    site.server.faults.set(Fault("resolve/.*/config.json", times=1, status=307, headers=headers))
    assert hub.read(site.model, "config.json", length=1000) == CONFIG


@pytest.mark.parametrize(
    ("home", "allowed", "refused"),
    [
        (
            "https://huggingface.co",
            ["https://huggingface.co/x", "https://cdn-lfs.huggingface.co/x", "https://cas-bridge.xethub.hf.co/x"],
            ["http://huggingface.co/x", "https://huggingface.co.evil.org/x", "https://evilhf.co/x", "https://10.0.0.1/x",
             "http://127.0.0.1/x", "http://169.254.169.254/latest", "https://localhost/x", "ftp://hf.co/x"],
        ),
        (
            "https://hub.example.org",
            ["https://hub.example.org/x", "https://store.hub.example.org/x", "https://cdn.hf.co/x"],
            ["https://example.org/x", "http://hub.example.org/x", "http://127.0.0.1/x"],
        ),
        ("http://hub:8080", ["http://hub:9000/x", "https://cdn.hf.co/x"], ["http://other:8080/x", "http://127.0.0.1:8080/x"]),
        ("http://127.0.0.1:1", ["http://127.0.0.1:2/x", "http://localhost:3/x", "http://[::1]:4/x"],
         ["https://huggingface.co/x", "http://10.0.0.1/x", "http://127.0.0.1.evil.org/x"]),
    ],
)  # fmt: skip
def test_requests_go_to_where_a_hub_keeps_files_only(home: str, allowed: list[str], refused: list[str]) -> None:
    for url in allowed:
        assert _is_of_hub(httpx2.URL(home), httpx2.URL(url)), url
    for url in refused:
        assert not _is_of_hub(httpx2.URL(home), httpx2.URL(url)), url


# ---- limits of the Hub -----------------------------------------------------------------------------------------------


def test_hub_that_asks_for_a_pause_is_left_alone_by_all_calls_of_that_budget(site: Site) -> None:
    hub = site.stranger()
    site.server.faults.set(Fault(TREE, status=429, headers={"Retry-After": "299"}))
    for number in range(5):
        with pytest.raises(Unavailable) as caught:
            hub.listing(replace(site.model, name=f"model{number}"))
        assert caught.value.retry_s is not None
        assert 200 < caught.value.retry_s <= 299
    assert len(site.server.served) == 1, "the others did not even ask"
    assert site.said == ["hub_limit: the Hub asks for 299 s without requests of its budget 'api'"]
    hub.alive(site.model)
    assert len(site.server.served) == 2, "files have a budget of their own"


@pytest.mark.parametrize(
    "headers",
    [
        {"RateLimit": '"api";r=0;t=120', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
        {"Retry-After": "in 120 s, with +0000"},
        {"Retry-After": "in 120 s, with GMT"},
        {"Retry-After": "120"},
    ],
)
def test_pause_is_read_however_the_hub_writes_it(site: Site, headers: dict[str, str]) -> None:
    if "in 120 s" in headers.get("Retry-After", ""):
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=120))
        headers = {"Retry-After": date.replace("+0000", "GMT") if headers["Retry-After"].endswith("GMT") else date}
    hub = site.stranger()
    site.server.faults.set(Fault(TREE, times=1, status=429, headers=headers))
    with pytest.raises(Unavailable) as caught:
        hub.listing(site.model)
    assert caught.value.retry_s is not None
    assert 60 < caught.value.retry_s <= 120


@pytest.mark.parametrize("asked", ["soon", "-5", "1e9", "\u00b2", "99999999999999999999", ""])
def test_pause_that_is_no_time_is_ours_to_choose(site: Site, asked: str) -> None:
    site.server.faults.set(Fault(TREE, times=1, status=429, headers={"Retry-After": asked}))
    assert site.stranger().listing(site.model).files


def test_last_request_of_a_budget_is_answered_and_the_next_one_waits(site: Site) -> None:
    hub = site.stranger()
    site.server.faults.set(Fault(TREE, times=1, headers={"RateLimit": '"api";r=0;t=55'}))
    assert hub.listing(site.model).files
    with pytest.raises(Unavailable, match="without requests"):
        hub.listing(site.model)
    assert len(site.server.served) == 1


def test_256_commitments_cost_two_api_requests_each_at_most(site: Site) -> None:
    """A round looks whether each is alive, lists it, and reads metadata; the public Hub allows 500 and 3,000 in 5 minutes."""
    hub = site.stranger()
    for _ in range(256):
        hub.alive(site.model)
        read = hub.reader(hub.listing(site.model))
        read("config.json", 0, 1 << 16)
        read("model.safetensors", 0, 8)
        read("model.safetensors", 8, 1000)
    assert hub.asked["api"] == 256
    assert hub.asked["files"] == 256 * (1 + 1 + 2 * 2)
    assert hub.asked["files"] < 3000


# ---- the faults themselves -------------------------------------------------------------------------------------------


def test_another_process_sets_faults_with_the_folders_token(site: Site) -> None:
    folder = site.folder / "hub"
    put_faults(site.server.endpoint, folder, [Fault(TREE, skip=1, times=1, status=500, wire=Wire(delay_s=0.01))])
    hub = site.stranger(attempts=1)
    assert hub.listing(site.model).files
    with pytest.raises(Unavailable):
        hub.listing(site.model)
    assert hub.listing(site.model).files
    assert site.server.faults.hits() == (1,)
    put_faults(site.server.endpoint, folder, [])
    assert site.server.faults.hits() == ()

    other = site.folder / "other"
    other.mkdir()
    (other / "admin").write_text("guessed")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        put_faults(site.server.endpoint, other, [])


@pytest.mark.parametrize("wrong", ['[{"match": "("}]', '[{"match": "x", "change": "burn"}]', '[{"mach": "x"}]', "[1]", "3"])
def test_what_is_no_fault_is_refused(site: Site, wrong: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        [Fault.parse(value) for value in json.loads(wrong)]


def test_faults_count_their_hits_over_threads(site: Site) -> None:
    site.server.faults.set(Fault(TREE, skip=3, times=4, status=500))
    hubs = [site.stranger(attempts=1) for _ in range(12)]
    failed = []

    def ask(hub: Hub) -> None:
        try:
            hub.listing(site.model)
        except Unavailable:
            failed.append(hub)

    threads = [threading.Thread(target=ask, args=(hub,)) for hub in hubs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 4
    assert site.server.faults.hits() == (4,)


def test_reads_send_no_credentials_that_lie_about(tmp_path: Path) -> None:
    """A token in the environment or on the disk, and passwords in .netrc, are for others: all validators see the same."""
    (tmp_path / "token").write_text("hf_" + "a" * 34)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login bob password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    program = (
        "import sys; from sn29.hub import Hub; from sn29.records import ModelId\n"
        "hub, model = Hub(sys.argv[1]), ModelId('alice', 'model', '0' * 40)\n"
        "hub.listing(model); hub.alive(model); hub.read(model, 'config.json', length=2)\n"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(Path(sn29.__file__).parents[1]), "HF_TOKEN": "hf_" + "b" * 34, "HOME": str(tmp_path),
        "HF_TOKEN_PATH": str(tmp_path / "token"), "NETRC": str(tmp_path / ".netrc"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
    }  # fmt: skip
    with _another_origin() as (url, asked):
        subprocess.run([sys.executable, "-c", program, url], check=True, env=environment)
    assert [request.method for request in asked] == ["GET", "HEAD", "GET"]
    assert not [request for request in asked if "authorization" in request.headers]
