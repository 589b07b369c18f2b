"""Fetching from the loopback Hub: whole, resumed, checked, and given up in time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import sn29
from sn29.errors import Reason, Rejected, Unavailable
from sn29.hub import Hub
from sn29.localnet.http_exchange import Wire
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Fault
from sn29.models.disk import Disk
from sn29.models.fetch import fetch
from sn29.records import ModelId, RepoFile, RepoListing

SIZE = 4_000_000
MODEL = ModelId("alice", "model", "0" * 40)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"".join(i.to_bytes(4, "big") for i in range(SIZE // 4)))
    (made / "config.json").write_text("{}")
    (made / "sub" / "empty").write_bytes(b"")
    return made


@pytest.fixture
def listing(server: LoopbackHub, folder: Path) -> RepoListing:
    alice = Hub(server.endpoint, server.add_user("alice"))
    alice.create("alice/model")
    revision = alice.upload("alice/model", folder, message="first")
    found = alice.listing(ModelId("alice", "model", revision))
    server.served.clear()
    return found


def _large_file(server_folder: Path) -> Path:
    (found,) = (p for p in (server_folder / "repos").rglob("lfs/objects/*/*/*"))
    return found


def _is_plain(path: str) -> bool:
    return not path.startswith(".")


def test_fetch_brings_every_file_once(server: LoopbackHub, listing: RepoListing, folder: Path, tmp_path: Path) -> None:
    counted: list[int] = []
    hub, to = Hub(server.endpoint), tmp_path / "to"
    assert fetch(hub, listing, to, only=_is_plain, deadline_s=60, progress=counted.append) == to
    names = {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "sub/empty"}
    for name in names:
        assert (to / name).read_bytes() == (folder / name).read_bytes()
    assert sum(counted) == SIZE + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "model", "to"], "nothing is left beside it"

    server.served.clear()
    assert fetch(hub, listing, to, only=_is_plain, deadline_s=60) == to
    assert not server.served, "a whole folder costs no request"
    fetch(hub, listing, to, deadline_s=60)
    assert {Path(line.path).name for line in server.served} == {".gitattributes"}, "only what was missing is fetched"
    assert (to / "model.safetensors").stat().st_size == SIZE


def test_fetch_killed_midway_fetches_only_the_rest(
    server: LoopbackHub, listing: RepoListing, folder: Path, tmp_path: Path
) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from sn29.hub import Hub\n"
        "from sn29.models.fetch import fetch; from sn29.records import ModelId\n"
        "endpoint, model, to = sys.argv[1:]; hub = Hub(endpoint); come = []\n"
        "def progress(n):\n"
        "    come.append(n)\n"
        "    if sum(come) > 1_000_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "fetch(hub, hub.listing(ModelId.parse(model)), Path(to), deadline_s=60, progress=progress)\n"
    )
    to = tmp_path / "to"
    command = [sys.executable, "-c", program, server.endpoint, str(listing.model), str(to)]
    environment = {**os.environ, "PYTHONPATH": str(Path(sn29.__file__).parents[1])}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert not to.exists()
    (part,) = (tmp_path / "to.part" / "parts").iterdir()
    kept = part.stat().st_size
    assert 900_000 < kept < SIZE

    counted: list[int] = []
    server.served.clear()
    fetch(Hub(server.endpoint), listing, to, deadline_s=60, progress=counted.append)
    assert (to / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    weights = [line for line in server.served if line.port == "store"]
    assert [(line.range, line.num_bytes) for line in weights] == [(f"bytes={kept}-", SIZE - kept)]
    assert sum(counted) == SIZE - kept, "the small files before it had come whole"


def test_wrong_bytes_are_fetched_again_once_and_then_refused(server: LoopbackHub, listing: RepoListing, tmp_path: Path) -> None:
    body = _large_file(tmp_path / "hub")
    with body.open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\xff")
    counted: list[int] = []
    with pytest.raises(Rejected) as caught:
        fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=60, progress=counted.append)
    assert caught.value.reason is Reason.CORRUPT
    assert 2 * SIZE <= sum(counted) < 2 * SIZE + 1000
    assert not (tmp_path / "to").exists()


def test_wrong_bytes_on_our_own_disk_are_replaced(server: LoopbackHub, listing: RepoListing, tmp_path: Path) -> None:
    weights = next(file for file in listing.files if file.path == "model.safetensors")
    parts = tmp_path / "to.part" / "parts"
    parts.mkdir(parents=True)
    (parts / weights.oid.replace(":", "-")).write_bytes(b"x" * 1000)
    to = fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=60)
    assert (to / "model.safetensors").read_bytes()[:8] == bytes(7) + b"\1"


@pytest.mark.parametrize("change", [-1000, 1000])
def test_file_of_another_length_than_the_hub_said_is_refused(
    server: LoopbackHub, listing: RepoListing, tmp_path: Path, change: int
) -> None:
    files = tuple(replace(file, size=file.size + change) if file.size == SIZE else file for file in listing.files)
    with pytest.raises(Rejected) as caught:
        fetch(Hub(server.endpoint), replace(listing, files=files), tmp_path / "to", deadline_s=60)
    assert caught.value.reason is Reason.CORRUPT


def test_wrong_small_file_is_refused(server: LoopbackHub, listing: RepoListing, tmp_path: Path) -> None:
    files = tuple(replace(f, oid="git:" + "1" * 40) if f.path == "config.json" else f for f in listing.files)
    with pytest.raises(Rejected) as caught:
        fetch(Hub(server.endpoint), replace(listing, files=files), tmp_path / "to", deadline_s=60)
    assert caught.value.reason is Reason.CORRUPT


class CutEvery:
    """The Hub through a line that drops after 300,000 bytes, and first a few times before the first byte."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._calls = hub, 0

    def stream(self, repo: ModelId, path: str, *, start: int = 0, timeout_s: float | None = None) -> Iterator[bytes]:
        self._calls += 1
        left = 0 if self._calls <= 2 else 300_000
        for data in self._hub.stream(repo, path, start=start, timeout_s=timeout_s):
            if left <= 0:
                raise Unavailable(path, "the line dropped", retry_s=0.001)
            yield data[:left]
            left -= len(data)


def test_cut_connections_are_taken_up_where_they_were_cut(
    server: LoopbackHub, listing: RepoListing, folder: Path, tmp_path: Path
) -> None:
    counted: list[int] = []
    to = fetch(CutEvery(Hub(server.endpoint)), listing, tmp_path / "to", deadline_s=60, progress=counted.append)
    assert (to / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sum(counted) == listing.num_bytes


def test_repository_that_closes_midway_is_refused_with_the_hubs_reason(
    server: LoopbackHub, listing: RepoListing, tmp_path: Path
) -> None:
    Hub(server.endpoint, server.add_user("alice")).delete("alice/model")
    with pytest.raises(Rejected) as caught:
        fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=60)
    assert caught.value.reason is Reason.REPOSITORY_GONE


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/x", "a//x", "./x", "", "a\\x", "C:x", "a\nb", "x" * 300, "b/c", "B", "é" * 200, "\ud800"],
)
def test_path_that_leads_elsewhere_is_refused_before_any_request(tmp_path: Path, path: str) -> None:
    files = (RepoFile(path, 1, "git:" + "0" * 40), RepoFile("b", 1, "git:" + "0" * 40))
    with pytest.raises(Rejected) as caught:
        fetch(Hub("http://127.0.0.1:9"), RepoListing(MODEL, tuple(sorted(files))), tmp_path / "to", deadline_s=60)
    assert caught.value.reason is Reason.FORBIDDEN_FILE
    assert not list(tmp_path.iterdir())


def test_disk_without_room_is_unavailable_before_any_request(tmp_path: Path) -> None:
    files = (RepoFile("model.safetensors", 1 << 60, "sha256:" + "0" * 64),)
    with pytest.raises(Unavailable, match="bytes of disk"):
        fetch(Hub("http://127.0.0.1:9"), RepoListing(MODEL, files), tmp_path / "to", deadline_s=60)


def test_what_progress_raises_ends_the_fetch_at_once(server: LoopbackHub, listing: RepoListing, tmp_path: Path) -> None:
    def stop(num_bytes: int) -> None:
        raise Unavailable("download", "the validator is stopping")

    with pytest.raises(Unavailable, match="is stopping"):
        fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=60, progress=stop)
    assert len(server.served) == 1, "it is not taken for a cut line"


def test_line_that_drops_after_a_few_bytes_is_given_up_and_what_came_is_kept(
    server: LoopbackHub, listing: RepoListing, tmp_path: Path
) -> None:
    server.faults.set(Fault("store GET", wire=Wire(cut_at=1000)))
    said: list[str] = []
    with pytest.raises(Unavailable):
        fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=5, say=lambda event, sentence: said.append(event))
    assert 2 <= server.faults.hits()[0] <= 5
    assert set(said) == {"download_cut"}
    (part,) = (tmp_path / "to.part" / "parts").iterdir()
    assert part.stat().st_size == 1000 * server.faults.hits()[0]


def test_trickle_ends_at_the_deadline(server: LoopbackHub, listing: RepoListing, tmp_path: Path) -> None:
    server.faults.set(Fault("store GET", wire=Wire(bytes_per_s=200_000)))
    with pytest.raises(Unavailable, match="did not end in time"):
        fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=0.5)
    assert len([line for line in server.served if line.port == "store"]) == 1


def test_room_is_asked_for_what_is_still_to_come(server: LoopbackHub, listing: RepoListing, tmp_path: Path) -> None:
    hub, disk = Hub(server.endpoint), Disk(tmp_path / "models", budget_bytes=2 * listing.num_bytes)
    asked: list[int] = []
    with disk.using("a") as folder:
        fetch(hub, listing, folder, deadline_s=60, room=disk.make_room)
    with disk.using("b") as folder:
        server.faults.set(Fault("store GET", skip=1, status=403), Fault("store GET", wire=Wire(cut_at=1_000_000)))
        with pytest.raises(Unavailable):
            fetch(hub, listing, folder, deadline_s=0.5, room=asked.append)
        server.faults.set()
        fetch(hub, listing, folder, deadline_s=60, room=asked.append)
    assert asked[0] == listing.num_bytes
    assert asked[1] == SIZE - 1_000_000, "the small files before it had come whole"
    with disk.using("c") as folder:
        fetch(hub, listing, folder, deadline_s=60, room=disk.make_room)
    assert [held.name for held in disk.held()] == ["b", "c"], "the one that was needed longest ago made room"
    with disk.using("b"), disk.using("c"), disk.using("d") as folder:
        server.served.clear()
        with pytest.raises(Unavailable, match="more than there are"):
            fetch(hub, listing, folder, deadline_s=60, room=disk.make_room)
        assert not server.served, "before any request"


def test_disk_that_fills_up_meanwhile_ends_the_fetch_and_not_the_process(
    server: LoopbackHub, listing: RepoListing, folder: Path, tmp_path: Path
) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from sn29.hub import Hub\n"
        "from sn29.errors import Unavailable; from sn29.models.fetch import fetch; from sn29.records import ModelId\n"
        "endpoint, model, to = sys.argv[1:]; hub = Hub(endpoint); listing = hub.listing(ModelId.parse(model))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: fetch(hub, listing, Path(to), deadline_s=60)\n"
        "except Unavailable as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, server.endpoint, str(listing.model), str(tmp_path / "to")]
    environment = {**os.environ, "PYTHONPATH": str(Path(sn29.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "the disk: File too large" in done.stdout
    fetch(Hub(server.endpoint), listing, tmp_path / "to", deadline_s=60)
    assert (tmp_path / "to" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [line.range for line in server.served if line.port == "store"][-1] == "bytes=1000000-"


@pytest.mark.timeout(30)
def test_server_that_never_answers_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    files = (RepoFile("model.safetensors", 10, "sha256:" + "0" * 64),)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = Hub(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=3600)
        with pytest.raises(Unavailable):
            fetch(hub, RepoListing(MODEL, files), tmp_path / "to", deadline_s=1)
