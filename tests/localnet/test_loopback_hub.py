"""The loopback Hub, spoken to by the unmodified huggingface_hub client, by git, and by plain HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save_file

import sn29.hub  # the settings that the client needs: no Xet, a timeout on every request
from sn29.localnet.git_objects import GitRepository
from sn29.localnet.hub import LoopbackHub

ROOT = Path(sn29.hub.__file__).parents[1]


def _get(url: str, **headers: str) -> tuple[int, bytes]:
    """Status and body, by a client that knows nothing of Hubs."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def alice(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.add_user("alice"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model: large files, small files, a folder, and names whose order in a git tree is not the plain one."""
    made = tmp_path / "model"
    (made / "a").mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "README.md").write_text("# A model\n")
    (made / "a" / "notes.txt").write_text("inside\n")
    (made / "a.txt").write_text("beside\n")
    (made / "empty").write_bytes(b"")
    tensors = {"wte": np.arange(4096, dtype=np.float32).reshape(64, 64), "bias": np.ones(64, dtype=np.float16)}
    save_file(tensors, made / "model.safetensors")
    return made


def test_client_uploads_and_reads_back_what_it_uploaded(hub: LoopbackHub, alice: HfApi, folder: Path, tmp_path: Path) -> None:
    assert alice.whoami()["name"] == "alice"
    alice.create_repo("alice/model")
    alice.create_repo("alice/model", exist_ok=True)
    sha = alice.upload_folder(repo_id="alice/model", folder_path=folder).oid

    anyone = HfApi(endpoint=hub.endpoint, token=False)
    info = anyone.model_info("alice/model", files_metadata=True)
    weights = next(s for s in info.siblings or [] if s.rfilename == "model.safetensors")
    assert info.sha == sha
    assert (info.private, info.gated) == (False, False)
    assert weights.size == (folder / "model.safetensors").stat().st_size
    assert weights.lfs is not None

    tree = {entry.path for entry in anyone.list_repo_tree("alice/model", revision=sha, recursive=True)}
    names = {"a.txt", "a/notes.txt", "config.json", "README.md", "empty", "model.safetensors", ".gitattributes"}
    assert tree == names | {"a"}
    assert {entry.path for entry in anyone.list_repo_tree("alice/model", "a")} == {"a/notes.txt"}
    assert {entry.path for entry in anyone.get_paths_info("alice/model", ["a", "a.txt", "no"])} == {"a", "a.txt"}

    metadata = anyone.get_safetensors_metadata("alice/model")
    assert metadata.parameter_count == {"F32": 4096, "F16": 64}

    fetched = Path(
        snapshot_download("alice/model", revision=sha, endpoint=hub.endpoint, token=False, local_dir=tmp_path / "down")
    )
    for name in names - {".gitattributes"}:
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    again = alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert again.oid == sha, "an upload that changes nothing makes no commit"


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_finds_nothing_wrong_and_gives_the_same_names(hub: LoopbackHub, alice: HfApi, folder: Path, tmp_path: Path) -> None:
    alice.create_repo("alice/model")
    sha = alice.upload_folder(repo_id="alice/model", folder_path=folder).oid
    (folder / "a.txt").unlink()
    alice.upload_folder(repo_id="alice/model", folder_path=folder, delete_patterns="*")

    def git(*arguments: str) -> str:
        command = ["git", "--git-dir", str(tmp_path / "hub/repos/models/alice/model.git"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git("fsck", "--full", "--strict", "--no-dangling") == ""
    assert git("rev-parse", "main~1") == sha
    assert git("show", f"{sha}:a/notes.txt") == "inside"
    listed = {name: blob for _, _, blob, name in (row.split() for row in git("ls-tree", "-r", sha).splitlines())}
    stated = {entry.path: entry.blob_id for entry in alice.list_repo_tree("alice/model", revision=sha, recursive=True)
              if hasattr(entry, "blob_id")}  # fmt: skip
    assert listed == stated


def test_sizes_of_files_that_compress_well_and_badly(alice: HfApi) -> None:
    """Sizes come from the first bytes of a git object: their code tables can be longer than the header."""
    texts = {
        "plain.json": b"a" * 300_000,
        "varied.json": "".join(f'"{i * 7919 % 100_003}": {i},' for i in range(40_000)).encode(),
    }
    alice.create_repo("alice/texts")
    for name, data in texts.items():
        alice.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id="alice/texts")
    listed = {f.path: f.size for f in alice.list_repo_tree("alice/texts")}
    assert {name: listed[name] for name in texts} == {name: len(data) for name, data in texts.items()}


def test_private_repository_looks_as_if_it_were_not_there(hub: LoopbackHub, alice: HfApi, folder: Path, tmp_path: Path) -> None:
    alice.create_repo("alice/model", private=True)
    alice.upload_folder(repo_id="alice/model", folder_path=folder)
    anyone = HfApi(endpoint=hub.endpoint, token=False)
    bob = HfApi(endpoint=hub.endpoint, token=hub.add_user("bob"))
    for stranger in (anyone, bob):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("alice/model")
        with pytest.raises(RepositoryNotFoundError):
            list(stranger.list_repo_tree("alice/model"))
        assert not stranger.file_exists("alice/model", "config.json")
    assert alice.model_info("alice/model").private

    alice.update_repo_settings("alice/model", private=False)
    assert not anyone.model_info("alice/model").private
    alice.update_repo_settings("alice/model", gated="auto")
    assert list(anyone.list_repo_tree("alice/model")), "a gated repository still lists its files"
    with pytest.raises(GatedRepoError):
        anyone.hf_hub_download("alice/model", "config.json", local_dir=tmp_path)


def test_nobody_writes_to_another_users_repository(hub: LoopbackHub, alice: HfApi, folder: Path) -> None:
    alice.create_repo("alice/model")
    head = alice.model_info("alice/model").sha
    bob = HfApi(endpoint=hub.endpoint, token=hub.add_user("bob"))
    forged = HfApi(endpoint=hub.endpoint, token="hf_" + "0" * 32)
    for stranger, status in ((bob, 403), (forged, 401)):
        for write in (
            lambda api: api.upload_folder(repo_id="alice/model", folder_path=folder),
            lambda api: api.delete_repo("alice/model"),
            lambda api: api.update_repo_settings("alice/model", private=True),
            lambda api: api.create_repo("alice/other"),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                write(stranger)
            assert caught.value.response.status_code == status
    assert alice.model_info("alice/model").sha == head


def test_missing_things_have_their_own_errors(alice: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/nothing")
    alice.create_repo("alice/model")
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/model", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        alice.hf_hub_download("alice/model", "nothing.json", local_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        alice.delete_file("nothing.json", "alice/model")
    alice.delete_repo("alice/model")
    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/model")


def test_commit_on_an_old_parent_is_refused(alice: HfApi) -> None:
    alice.create_repo("alice/model")
    first = alice.model_info("alice/model").sha
    alice.upload_file(path_or_fileobj=b"one", path_in_repo="x.txt", repo_id="alice/model")
    with pytest.raises(HfHubHTTPError) as caught:
        alice.upload_file(path_or_fileobj=b"two", path_in_repo="x.txt", repo_id="alice/model", parent_commit=first)
    assert caught.value.response.status_code == 412


def test_one_commit_adds_replaces_and_deletes(alice: HfApi) -> None:
    alice.create_repo("alice/data", repo_type="dataset")
    alice.create_commit(
        "alice/data",
        [CommitOperationAdd("keep.txt", b"keep"), CommitOperationAdd("old/gone.txt", b"x")],
        commit_message="first",
        repo_type="dataset",
    )
    alice.create_commit(
        "alice/data",
        [CommitOperationDelete("old/"), CommitOperationAdd("keep.txt", b"kept"), CommitOperationAdd("new.txt", b"n")],
        commit_message="second",
        commit_description="with a body",
        repo_type="dataset",
    )
    assert set(alice.list_repo_files("alice/data", repo_type="dataset")) == {".gitattributes", "keep.txt", "new.txt"}
    second, *_ = log = alice.list_repo_commits("alice/data", repo_type="dataset")
    assert [commit.title for commit in log] == ["second", "first", "initial commit"]
    assert (second.message, second.authors) == ("with a body", ["alice"])
    with pytest.raises(BadRequestError):
        alice.create_commit("alice/data", [CommitOperationAdd("new.txt/x", b"")], commit_message="third", repo_type="dataset")


def test_rewritten_history_forgets_its_revisions(alice: HfApi) -> None:
    alice.create_repo("alice/model")
    old = alice.upload_file(path_or_fileobj=b"one", path_in_repo="x.txt", repo_id="alice/model").oid
    alice.super_squash_history("alice/model")
    assert len(alice.list_repo_commits("alice/model")) == 1
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/model", revision=old)


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [("bytes=0-3", 206, b"0123"), ("bytes=6-", 206, b"6789"), ("bytes=-2", 206, b"89"), ("bytes=8-99", 206, b"89"),
     ("bytes=10-", 416, b""), ("bits=0-3", 200, b"0123456789")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["small.txt", "large.safetensors"])
def test_ranges(hub: LoopbackHub, alice: HfApi, name: str, asked: str, status: int, got: bytes) -> None:
    alice.create_repo("alice/model")
    alice.upload_file(path_or_fileobj=b"0123456789", path_in_repo=name, repo_id="alice/model")
    assert _get(f"{hub.endpoint}/alice/model/resolve/main/{name}", Range=asked) == (status, got)


def test_large_files_come_from_another_origin_by_a_signed_address(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    alice.create_repo("alice/model", private=True)
    alice.upload_file(path_or_fileobj=b"0123456789", path_in_repo="x.safetensors", repo_id="alice/model")
    alice.hf_hub_download("alice/model", "x.safetensors", local_dir=tmp_path)
    body = hub.served[-1]
    assert (body.port, body.method, body.status, body.num_bytes) == ("store", "GET", 200, 10)
    assert _get(hub._store.url + body.path)[0] == 403


def test_same_clock_gives_the_same_revisions(tmp_path: Path, folder: Path) -> None:
    def publish(place: Path) -> str:
        with LoopbackHub(place, clock=lambda: 1_700_000_000.0) as hub:
            api = HfApi(endpoint=hub.endpoint, token=hub.add_user("alice"))
            api.create_repo("alice/model")
            return str(api.upload_folder(repo_id="alice/model", folder_path=folder).oid)

    assert publish(tmp_path / "one") == publish(tmp_path / "two")


def test_killed_hub_starts_again_with_everything(tmp_path: Path, folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sn29.localnet.hub import LoopbackHub\n"
        "hub = LoopbackHub(Path(sys.argv[1])); hub.start()\n"
        "print(hub.endpoint, hub.add_user('alice'), flush=True); time.sleep(600)"
    )
    place, environment = tmp_path / "hub", {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", program, str(place)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout is not None
        endpoint, token = child.stdout.readline().split()
        before = HfApi(endpoint=endpoint, token=token)
        before.create_repo("alice/model", private=True)
        sha = before.upload_folder(repo_id="alice/model", folder_path=folder).oid
        expected = list(before.list_repo_tree("alice/model", recursive=True))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    (place / "tmp" / "left-by-the-kill").write_bytes(b"half a file")
    with LoopbackHub(place) as hub:
        after = HfApi(endpoint=hub.endpoint, token=token)
        assert hub.add_user("alice") == token
        assert after.model_info("alice/model").sha == sha
        assert list(after.list_repo_tree("alice/model", recursive=True)) == expected
        got = after.hf_hub_download("alice/model", "model.safetensors", local_dir=tmp_path / "down")
        assert Path(got).read_bytes() == (folder / "model.safetensors").read_bytes()
        assert not list((place / "tmp").iterdir())


def test_taken_port_leaves_the_running_hub_alone(hub: LoopbackHub, tmp_path: Path) -> None:
    upload = tmp_path / "hub" / "tmp" / "upload-under-way"
    upload.write_bytes(b"half")
    with pytest.raises(OSError, match="in use"):
        LoopbackHub(tmp_path / "hub", port=int(hub.endpoint.rpartition(":")[2]))
    assert upload.exists()


def test_git_repository_refuses_paths_that_git_refuses(tmp_path: Path) -> None:
    git = GitRepository(tmp_path / "x.git")
    git.init()
    blob = git.add_blob(b"")
    for path in ("../x", "/x", "a//b", ".git/hooks/x", "a/.GIT/x", "", "a\nb"):
        with pytest.raises(ValueError, match="is not a path"):
            git.commit({path: blob}, None, "alice", 0, "no")
    with pytest.raises(ValueError, match="both a file and a folder"):
        git.commit({"a": blob, "a/b": blob}, None, "alice", 0, "no")
