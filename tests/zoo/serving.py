"""The loopback Hub with the zoo on it, and a Hub that lies where a case says so."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from sn29.localnet.git_objects import GitRepository, pointer
from sn29.localnet.http_exchange import Reply, Request, as_content
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_repository import is_large, write_settings
from sn29.records import ModelId

from .case import Case, Lies, content_of

OWNER = "zoo"


class LyingHub(LoopbackHub):
    """Serves what stands in its folder, but of some repositories it says something else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lies: dict[str, Lies] = {}
        self._asked: dict[str, int] = {}

    def answer(self, request: Request) -> Reply:
        reply = super().answer(request)
        name = next((part for part in request.path.split("/") if part in self.lies), "")
        if not name or reply.status >= 400:
            return reply
        lies = self.lies[name]
        if "/tree/" in request.path:
            return self._listed(reply, lies)
        path = request.path.rpartition("/resolve/")[2].partition("/")[2]
        if path not in lies.bodies:
            return reply
        turn = self._asked.get(request.path, 0)
        self._asked[request.path] = turn + 1
        body = lies.bodies[path][min(turn, len(lies.bodies[path]) - 1)]
        kept = {key: value for key, value in reply.headers.items() if key.lower().startswith("x-")}
        return as_content(request, body, {**kept, "ETag": '"a"', "Content-Type": "application/octet-stream"})

    def _listed(self, reply: Reply, lies: Lies) -> Reply:
        assert isinstance(reply.body, bytes)
        rows = json.loads(reply.body)
        for row in rows:
            row.update(lies.stated.get(row["path"], {}))
            if row.get("lfs", 0) is None:
                del row["lfs"]
        return replace(reply, body=json.dumps([*rows, *lies.rows]).encode())


def place(hub: LyingHub, folder: Path, case: Case) -> ModelId:
    """The repository on the Hub in `folder`, as after an upload; the revision that the commitment names."""
    name = f"{case.name[:27].strip('-')}-{hashlib.sha256(case.name.encode()).hexdigest()[:6]}"  # a commitment has room for 34
    repository = GitRepository(folder / "repos" / "models" / OWNER / f"{name}.git")
    repository.init()
    blobs = {path: _add(repository, path, content_of(content), path in case.small) for path, content in case.files.items()}
    revision = repository.commit(blobs, None, OWNER, 1_700_000_000, "model")
    told = dict(case.settings)
    if told.pop("rewritten", False):
        repository.commit(blobs | {"README.md": repository.add_blob(b"another\n")}, None, OWNER, 1_700_000_001, "another history")
    if not told.pop("gone", False):
        write_settings(repository, {"private": False, "gated": False} | told)
    if case.lies is not None:
        hub.lies[name] = case.lies
    return ModelId(OWNER, name, revision)


def _add(repository: GitRepository, path: str, content: bytes, small: bool) -> str:
    if small or not is_large(path, len(content)):
        return repository.add_blob(content)
    sha256 = hashlib.sha256(content).hexdigest()
    file = repository.large_file(sha256)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return repository.add_blob(pointer(sha256, len(content)))
