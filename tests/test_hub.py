"""The Hub adapter against the loopback Hub, and against servers that misbehave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

import sn29
from sn29.errors import Reason, Rejected, Unavailable
from sn29.hub import Hub, HubDataset
from sn29.localnet.http_exchange import Reply, Request
from sn29.localnet.hub import LoopbackHub
from sn29.records import ModelId

GONE = ModelId("alice", "model", "0" * 40)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def alice(server: LoopbackHub) -> Hub:
    return Hub(server.endpoint, server.add_user("alice"))


@pytest.fixture
def anyone(server: LoopbackHub) -> Hub:
    return Hub(server.endpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (made / "config.json").write_text("{}")
    (made / "sub" / "x.txt").write_text("x")
    (made / ".cache").mkdir()
    (made / ".cache" / "lock").write_text("stays behind")
    return made


def _at(name: str, revision: str) -> ModelId:
    return ModelId.parse(f"{name}@{revision}")


@contextmanager
def _serving(reply: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server that answers every GET with `reply`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply(self)

        def log_message(self, format: str, *args: object) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def test_upload_makes_the_repository_hold_exactly_the_folder_in_one_commit(
    server: LoopbackHub, alice: Hub, anyone: Hub, folder: Path
) -> None:
    assert alice.whoami() == "alice"
    alice.create("alice/model")
    alice.create("alice/model")
    first = alice.upload("alice/model", folder, message="first")
    assert alice.upload("alice/model", folder, message="nothing new") == first == anyone.resolve("alice/model")

    listing = anyone.listing(_at("alice/model", first))
    assert [file.path for file in listing.files] == [".gitattributes", "config.json", "model.safetensors", "sub/x.txt"]
    assert listing.files[1].oid == "git:9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert listing.files[2].oid.startswith("sha256:")
    assert listing.num_bytes == listing.files[0].size + 2 + 256_000 + 1

    (folder / "sub" / "x.txt").unlink()
    (folder / "config.json").write_text('{"a": 1}')
    second = alice.upload("alice/model", folder, message="second")
    now = anyone.listing(_at("alice/model", second))
    assert [file.path for file in now.files] == [".gitattributes", "config.json", "model.safetensors"]
    assert anyone.listing(_at("alice/model", first)) == listing, "a revision never changes"
    commits = HfApi(endpoint=server.endpoint).list_repo_commits("alice/model", token=False)
    assert [commit.title for commit in commits] == ["second", "first", "initial commit"]
    assert len([s for s in server.served if s.method == "PUT"]) == 1, "the unchanged weights went over the wire once"


class LosesAReply(LoopbackHub):
    """Makes the first commit that it is asked for, and then says that it could not."""

    lost = False

    def answer(self, request: Request) -> Reply:
        reply = super().answer(request)
        if "/commit/" in request.path and not self.lost:
            self.lost = True
            return Reply(503)
        return reply


def test_commit_whose_reply_was_lost_is_not_made_twice(folder: Path, tmp_path: Path) -> None:
    with LosesAReply(tmp_path / "hub") as server:
        alice = Hub(server.endpoint, server.add_user("alice"))
        alice.create("alice/model")
        revision = alice.upload("alice/model", folder, message="first")
        assert server.lost
        assert revision == alice.resolve("alice/model")
        commits = HfApi(endpoint=server.endpoint).list_repo_commits("alice/model", token=False)
    assert [commit.title for commit in commits] == ["first", "initial commit"]


def test_private_repository_opens_to_the_public(alice: Hub, anyone: Hub, folder: Path) -> None:
    alice.create("alice/model", private=True)
    model = _at("alice/model", alice.upload("alice/model", folder, message="first"))
    for look in (
        lambda hub: hub.listing(model),
        lambda hub: hub.read(model, "config.json", length=2),
        lambda hub: list(hub.stream(model, "config.json")),
    ):
        for hub in (anyone, alice):  # our own token is not used for it: all validators see the same
            with pytest.raises(Rejected) as caught:
                look(hub)
            assert caught.value.reason is Reason.REPOSITORY_GONE
    expected = alice.listing(model, as_owner=True)
    alice.set_private("alice/model", False)
    assert anyone.listing(model) == expected


def test_each_way_of_being_gone_has_its_reason(server: LoopbackHub, alice: Hub, anyone: Hub, folder: Path) -> None:
    def reason(look: Callable[[], object]) -> Reason:
        with pytest.raises(Rejected) as caught:
            look()
        return caught.value.reason

    assert reason(lambda: anyone.listing(GONE)) is Reason.REPOSITORY_GONE
    assert reason(lambda: anyone.listing(ModelId("a--b", "c..d", "0" * 40))) is Reason.REPOSITORY_GONE
    assert reason(lambda: anyone.read(ModelId("a--b", "c..d", "0" * 40), "x", length=1)) is Reason.REPOSITORY_GONE
    alice.create("alice/model")
    assert reason(lambda: anyone.listing(GONE)) is Reason.REVISION_GONE
    model = _at("alice/model", alice.upload("alice/model", folder, message="first"))
    assert reason(lambda: anyone.read(model, "no.json", length=1)) is Reason.MISSING_FILE

    owner = HfApi(endpoint=server.endpoint, token=server.add_user("alice"))
    owner.update_repo_settings("alice/model", gated="manual")
    assert reason(lambda: anyone.read(model, "config.json", length=1)) is Reason.REPOSITORY_CLOSED
    owner.update_repo_settings("alice/model", gated=False)
    owner.super_squash_history("alice/model")
    assert reason(lambda: anyone.listing(model)) is Reason.REVISION_GONE

    alice.delete("alice/model")
    alice.delete("alice/model")
    assert reason(lambda: anyone.listing(model)) is Reason.REPOSITORY_GONE
    assert reason(Hub(server.endpoint).whoami) is Reason.SETTING
    assert reason(Hub(server.endpoint, "hf_" + "0" * 32).whoami) is Reason.SETTING
    assert reason(lambda: Hub(server.endpoint, server.add_user("bob")).create("alice/x")) is Reason.SETTING


def test_model_with_more_files_than_a_page_is_refused_and_a_data_set_is_not(alice: Hub, anyone: Hub, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1001):
        (many / f"{number:04}.txt").write_text("x")
    alice.create("alice/many")
    with pytest.raises(Rejected) as caught:
        anyone.listing(_at("alice/many", alice.upload("alice/many", many, message="many")))
    assert caught.value.reason is Reason.FORBIDDEN_FILE
    alice.create("alice/many", kind="dataset")
    revision = alice.upload("alice/many", many, message="many", kind="dataset")
    assert len(HubDataset(anyone, "alice/many", revision).files()) == 1002


def test_read_takes_a_span_and_stream_goes_to_the_end(alice: Hub, anyone: Hub, folder: Path) -> None:
    alice.create("alice/model")
    model = _at("alice/model", alice.upload("alice/model", folder, message="first"))
    whole = (folder / "model.safetensors").read_bytes()
    assert anyone.read(model, "model.safetensors", length=8) == whole[:8]
    assert anyone.read(model, "model.safetensors", start=1000, length=500) == whole[1000:1500]
    assert anyone.read(model, "model.safetensors", start=255_990, length=500) == whole[255_990:]
    assert anyone.read(model, "model.safetensors", start=256_000, length=500) == b""
    assert anyone.read(model, "model.safetensors", length=0) == b""
    assert anyone.reader(model)("model.safetensors", 8, 4) == whole[8:12]
    assert b"".join(anyone.stream(model, "model.safetensors")) == whole
    assert b"".join(anyone.stream(model, "model.safetensors", start=200_000)) == whole[200_000:]


def test_server_that_ignores_range_is_cut_off() -> None:
    sent = []

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("X-Repo-Commit", GONE.revision)
        handler.send_header("Content-Length", str(1 << 30))
        handler.end_headers()
        try:
            for block in range(1 << 14):
                handler.wfile.write(block.to_bytes(4, "big") * (1 << 14))
                sent.append(1 << 16)
        except ConnectionError:
            return

    with _serving(reply) as endpoint:
        got = Hub(endpoint).read(GONE, "model.safetensors", start=(1 << 16) - 4, length=8)
    assert got == bytes(4) + (1).to_bytes(4, "big")
    assert sum(sent) < 1 << 26, "what the sockets' buffers hold, far from the file's 1 GiB"


def test_data_set_is_read_by_ranges(server: LoopbackHub, alice: Hub, anyone: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    texts = [f"{number} " * 200 for number in range(4000)]
    table = pa.table({"text": texts, "id": list(range(4000))})
    pq.write_table(table, data / "a.parquet", row_group_size=100, compression="none", use_dictionary=False)
    alice.create("alice/data", kind="dataset")
    revision = alice.upload("alice/data", data, message="data", kind="dataset")

    files = HubDataset(anyone, "alice/data", revision)
    size = (data / "a.parquet").stat().st_size
    assert files.revision == revision
    assert ("a.parquet", size) in files.files()
    server.served.clear()
    with files.open("a.parquet") as remote:
        parquet = pq.ParquetFile(remote)
        assert parquet.num_row_groups == 40
        assert parquet.read_row_group(17, columns=["text"])["text"].to_pylist() == texts[1700:1800]
    bodies = [line.num_bytes for line in server.served if line.port == "store"]
    assert all(line.range for line in server.served)
    assert sum(bodies) < size / 8
    with files.open("a.parquet") as remote:
        whole = (data / "a.parquet").read_bytes()
        assert remote.read() == whole
        assert remote.seek(-10, os.SEEK_END) == size - 10
        assert remote.read(4) + remote.read(100) == whole[-10:]
        assert remote.read(1) == b""


def test_503_is_tried_again_and_a_long_rate_limit_is_handed_on() -> None:
    asked = []

    def reply(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        status, wait = (503, "0") if len(asked) < 3 else (429, "300")
        handler.send_response(status)
        handler.send_header("Retry-After", wait)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with _serving(reply) as endpoint, pytest.raises(Unavailable) as caught:
        Hub(endpoint).listing(GONE)
    assert len(asked) == 3
    assert caught.value.retry_s == 300


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[1]", b'[{"type": "file", "path": "x", "size": -1, "oid": "y"}]'])
def test_reply_that_is_no_listing_says_nothing_about_the_model(body: bytes) -> None:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json; charset=utf-8")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    with _serving(reply) as endpoint, pytest.raises(Unavailable):
        Hub(endpoint, attempts=1).listing(GONE)


def test_page_of_something_between_us_and_the_hub_is_no_long_list() -> None:
    page = b"<html>sign in to the airport's network" + b" " * 200_000

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", str(len(page)))
        handler.end_headers()
        handler.wfile.write(page)

    with _serving(reply) as endpoint, pytest.raises(Unavailable, match="not JSON: text/html"):
        Hub(endpoint, attempts=1).listing(GONE)


@pytest.mark.timeout(30)
def test_silent_server_and_closed_port_are_unavailable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = Hub(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2, attempts=2)
        for ask in (lambda: hub.listing(GONE), lambda: hub.read(GONE, "x", length=1), lambda: hub.resolve("alice/m")):
            with pytest.raises(Unavailable):
                ask()
        closed = Hub(f"http://127.0.0.1:{silent.getsockname()[1]}", "hf_x", timeout_s=0.2, attempts=1)
    with pytest.raises(Unavailable):
        closed.create("alice/model")


def test_library_is_set_as_we_need_it_even_when_another_imported_it_first() -> None:
    program = (
        "import huggingface_hub.file_download, sn29.hub; from huggingface_hub import constants, get_session\n"
        "from huggingface_hub.utils._runtime import is_xet_available\n"
        "assert not is_xet_available() and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN\n"
        "request = get_session().build_request('GET', 'http://127.0.0.1/', timeout=None)\n"
        "for hook in get_session().event_hooks['request']: hook(request)\n"
        "assert request.extensions['timeout']['read'] == sn29.hub.LIBRARY_TIMEOUT_S\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sn29.__file__).parents[1]), "HF_HUB_DISABLE_XET": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
