"""A Hub on this machine: enough of the public Hub's protocol for huggingface_hub, kept in one folder.

    repos/models|datasets/NAMESPACE/NAME.git   a bare git repository each, large files under its lfs/objects
    users/TOKEN                                holds the name of the user whose token it is
    admin                                      token of whoever may set faults: see `hub_faults`
    tmp/                                       what was being written; emptied at start

Two ports, as in production: the Hub answers a request for a large file with a redirect to the store, another origin,
where a signed address takes the place of the token. A reader sees public repositories; a private one looks as if it
were not there. Large files travel by plain HTTP: a client must set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

from sn29.localnet.git_objects import GitRepository, write_whole
from sn29.localnet.http_exchange import HttpServer, Refusal, Reply, Request, as_content, as_json
from sn29.localnet.hub_faults import Change, Fault, Faults
from sn29.localnet.hub_repository import (
    LARGE_FILE_SUFFIXES,
    HubRepository,
    date,
    is_large,
    log_row,
    message,
    row,
    sibling,
    write_settings,
)

_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_FILE_SUFFIXES)
_TREE_PAGE = 1000
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_TOKEN = re.compile(r"hf_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Served:
    """One line of the Hub's record of requests."""

    port: str
    """`hub` or `store`."""
    method: str
    path: str
    range: str
    status: int
    num_bytes: int
    """Of the reply's body as it should be, or of the request's for a PUT."""
    faulty: bool = False


def add_user(folder: Path, name: str) -> str:
    """The user's token on the Hub in `folder`, running or not; one who is there already keeps theirs."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a user name")
    users = folder / "users"
    users.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in users.iterdir():
        if _TOKEN.fullmatch(file.name) and file.read_text() == name:
            return file.name
    token = f"hf_{secrets.token_hex(16)}"
    write_whole(users / token, name.encode())
    return token


class LoopbackHub:
    """Serves `folder` on loopback; a new one on the same folder goes on where the last one was, however it ended.

    One process at a time serves a folder.
    """

    def __init__(self, folder: Path, port: int = 0, host: str = "127.0.0.1", clock: Callable[[], float] = time.time) -> None:
        """Port 0 takes a free one. `clock` gives commits their time, in seconds since 1970, so that shas can repeat.

        Raises OSError when the port is taken, and has touched nothing then.
        """
        self._folder, self._clock = folder, clock
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(32)
        self._hub = HttpServer("hub", host, port, self.answer)
        self._store = HttpServer("store", host, 0, self.answer)
        self.endpoint = self._hub.url
        for part in ("repos", "users", "tmp"):
            (folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (folder / "tmp").iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._admin = secrets.token_hex(16)
        write_whole(folder / "admin", self._admin.encode())
        self.faults = Faults()
        self.served: deque[Served] = deque(maxlen=10_000)
        """The latest requests, oldest first."""

    def start(self) -> None:
        self._store.start()
        self._hub.start()

    def stop(self) -> None:
        self._hub.stop()
        self._store.stop()

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def add_user(self, name: str) -> str:
        """The user's token: see the function of that name."""
        return add_user(self._folder, name)

    # ---------------------------------------------------------------- every request

    def answer(self, request: Request) -> Reply:
        """The one function that every request of both ports passes: the place to delay, refuse or falsify replies."""
        admin = request.path.startswith("/admin/")
        fault = None if admin else self.faults.due(f"{request.port} {request.method} {request.path}")
        reply = self._faulty(request, fault) if fault else self._route(request)
        sent = 0 if request.method == "HEAD" else reply.num_bytes
        size = request.body_bytes if request.method == "PUT" else sent
        span = request.headers.get("range", "")
        self.served.append(Served(request.port, request.method, request.path, span, reply.status, size, fault is not None))
        return reply

    def _faulty(self, request: Request, fault: Fault) -> Reply:
        if fault.change:
            self._happen(fault.change, request)
        if fault.ignore_range:
            request = replace(request, headers={n: v for n, v in request.headers.items() if n != "range"})
        return fault.spoil(Reply(fault.status) if fault.status else self._route(request))

    def _route(self, request: Request) -> Reply:
        """What the Hub answers when nothing goes wrong."""
        try:
            for port, method, pattern, serve in _ROUTES:
                part = _parts(pattern, request) if request.port == port else None
                if part is not None and re.fullmatch(method, request.method):
                    return serve(self, request, part)
            raise Refusal(404, message=f"this Hub has no {request.method} {request.path}")
        except Refusal as refusal:
            return refusal.reply

    def _happen(self, change: Change, request: Request) -> None:
        """What the owner of the request's repository does just now."""
        found = (_parts(pattern, request) for port, _, pattern, _ in _ROUTES if request.port == port)
        part = next((part for part in found if part and part.get("namespace")), None)
        if part is None:
            return
        kind = part["kind"].strip("/") or "models"
        git = GitRepository(self._repo_folder(kind, part["namespace"], part["name"]))
        repo = HubRepository(kind, part["namespace"], part["name"], git)
        with self._lock:
            if not repo.exists():
                return
            if change == "delete":
                self._remove(repo)
            elif change == "squash":
                self._squash(repo, repo.namespace, "squash")
            else:
                write_settings(git, {**repo.settings(), change: True if change == "private" else "auto"})

    def _faults_set(self, request: Request, part: Mapping[str, str]) -> Reply:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(token.encode(), self._admin.encode()):
            raise Refusal(403, message="only the Hub's administrator may do this")
        try:
            self.faults.set(*(Fault.parse(value) for value in request.json()))
        except (ValueError, TypeError) as error:
            raise Refusal(400, message=str(error)) from error
        return as_json({})

    def _user(self, request: Request) -> str:
        """The caller's name, empty when anonymous. Raises Refusal(401) for a token that nobody has."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token:
            return ""
        file = self._folder / "users" / token
        if not _TOKEN.fullmatch(token) or not file.exists():
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return file.read_text()

    def _repo_folder(self, kind: str, namespace: str, name: str) -> Path:
        if not _NAME.fullmatch(namespace) or not _NAME.fullmatch(name):
            raise Refusal(400, message="a repository is named NAMESPACE/NAME")
        return self._folder / "repos" / kind / namespace / f"{name}.git"

    def _repo(self, request: Request, part: Mapping[str, str], *, write: bool = False, content: bool = False) -> HubRepository:
        """The repository that the path names, if the caller may read it, write it, or read its files' content."""
        kind, user = part["kind"].strip("/") or "models", self._user(request)
        git = GitRepository(self._repo_folder(kind, part["namespace"], part["name"]))
        repo = HubRepository(kind, part["namespace"], part["name"], git)
        owner = user == repo.namespace
        if not repo.exists() or (repo.settings()["private"] and not owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not owner:
            raise Refusal(403 if user else 401, message="you may not write to this repository")
        if content and repo.settings()["gated"] and not owner:
            raise Refusal(403 if user else 401, "GatedRepo", "access to this repository is restricted")
        return repo

    def _revision(self, repo: HubRepository, revision: str) -> str:
        if oid := repo.git.find(revision):
            return oid
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # ---------------------------------------------------------------- accounts and repositories

    def _whoami(self, request: Request, part: Mapping[str, str]) -> Reply:
        user = self._user(request)
        if not user:
            raise Refusal(401, message="Invalid username or password.")
        return as_json({"type": "user", "name": user, "auth": {"accessToken": {"role": "write"}}})

    def _create(self, request: Request, part: Mapping[str, str]) -> Reply:
        user, asked = self._user(request), request.json()
        namespace, kind = asked.get("organization") or user, f"{asked.get('type') or 'model'}s"
        if not user or namespace != user or kind not in ("models", "datasets"):
            raise Refusal(403 if user else 401, message=f"you may not create {kind} in {namespace!r}")
        folder = self._repo_folder(kind, namespace, str(asked.get("name")))
        repo = HubRepository(kind, namespace, str(asked["name"]), GitRepository(folder))
        url = {"url": self._page(repo), "name": repo.id}
        with self._lock:
            if folder.exists():
                return as_json({**url, "error": "You already created this repository"}, 409)
            self._found(repo, private=asked.get("visibility") == "private")
        return as_json(url)

    def _found(self, repo: HubRepository, *, private: bool) -> None:
        """Make the repository elsewhere, with the first commit that the public Hub makes too, and move it in whole."""
        made = GitRepository(self._folder / "tmp" / secrets.token_hex(8))
        made.init()
        blobs = {".gitattributes": made.add_blob(_ATTRIBUTES.encode())}
        made.commit(blobs, None, repo.namespace, int(self._clock()), "initial commit")
        write_settings(made, {"private": private, "gated": False})
        repo.git.folder.parent.mkdir(parents=True, exist_ok=True)
        made.folder.rename(repo.git.folder)

    def _delete(self, request: Request, part: Mapping[str, str]) -> Reply:
        asked = request.json()
        named = {"kind": f"{asked.get('type') or 'model'}s", "name": str(asked.get("name"))}
        named["namespace"] = asked.get("organization") or self._user(request)
        repo = self._repo(request, named, write=True)
        with self._lock:
            self._remove(repo)
        return as_json({})

    def _remove(self, repo: HubRepository) -> None:
        gone = self._folder / "tmp" / secrets.token_hex(8)
        repo.git.folder.rename(gone)
        shutil.rmtree(gone)

    def _change_settings(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo, asked = self._repo(request, part, write=True), request.json()
        with self._lock:
            settings = repo.settings()
            if "visibility" in asked:
                settings["private"] = asked["visibility"] == "private"
            if "gated" in asked:
                settings["gated"] = asked["gated"]
            write_settings(repo.git, settings)
        return as_json(settings)

    def _page(self, repo: HubRepository) -> str:
        return f"{self.endpoint}/{'datasets/' if repo.kind == 'datasets' else ''}{repo.id}"

    # ---------------------------------------------------------------- reading

    def _info(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo = self._repo(request, part)
        oid = self._revision(repo, part["revision"] or "main")
        *_, first = history = list(repo.git.history(oid))
        info = {
            "id": repo.id,
            "author": repo.namespace,
            "sha": oid,
            "lastModified": date(history[0]),
            "createdAt": date(first),
            **repo.settings(),
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [sibling(entry, "blobs" in request.query) for entry in repo.git.files(oid).values()],
        }
        return as_json(info)

    def _tree(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo = self._repo(request, part)
        entries = repo.git.entries(self._revision(repo, part["revision"]))
        folder = part["path"].strip("/")
        if folder and not any(entry.path == folder and entry.is_folder for entry in entries):
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        inside = [entry for entry in entries if not folder or entry.path.startswith(folder + "/")]
        recursive = request.query.get("recursive", ["false"])[0].lower()
        if recursive not in ("true", "1"):
            inside = [entry for entry in inside if "/" not in entry.path.removeprefix(folder + "/")]
        start = int(request.query.get("cursor", ["0"])[0])
        end = start + _TREE_PAGE
        following = f'<{self.endpoint}{request.path}?recursive={recursive}&cursor={end}>; rel="next"'
        return as_json([row(e) for e in inside[start:end]], 200, {"Link": following} if end < len(inside) else {})

    def _paths_info(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo = self._repo(request, part)
        entries = repo.git.entries(self._revision(repo, part["revision"]))
        asked = {path.strip("/") for path in parse_qs(request.read_body().decode()).get("paths", [])}
        return as_json([row(entry) for entry in entries if entry.path in asked])

    def _refs(self, request: Request, part: Mapping[str, str]) -> Reply:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._repo(request, part).git.head()}
        return as_json({"branches": [main], "converts": [], "tags": [], "pullRequests": []})

    def _commits(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo = self._repo(request, part)
        history = repo.git.history(self._revision(repo, part["revision"]))
        return as_json([log_row(commit) for commit in history])

    def _resolve(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo = self._repo(request, part, content=True)
        oid = self._revision(repo, part["revision"])
        entry = repo.git.files(oid).get(part["path"])
        named = {"X-Repo-Commit": oid}
        if not entry or (entry.sha256 and not repo.git.large_file(entry.sha256).exists()):
            raise Refusal(404, "EntryNotFound", "Entry not found", commit=oid)
        if not entry.sha256:
            content = repo.git.read_blob(entry.oid)
            return as_content(request, content, {**named, "ETag": f'"{entry.oid}"', "Content-Type": "text/plain"})
        linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        return Reply(302, b"", {**named, **linked, "Location": self._signed(repo, entry.sha256, "GET")})

    # ---------------------------------------------------------------- writing

    def _validate_yaml(self, request: Request, part: Mapping[str, str]) -> Reply:
        return as_json({"errors": [], "warnings": []})

    def _preupload(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo = self._repo(request, part, write=True)
        files = repo.git.files(self._revision(repo, part["revision"]))
        rows = []
        for asked in request.json().get("files", []):
            large = is_large(asked["path"], asked["size"])
            there = files.get(asked["path"])
            oid = (there.sha256 or there.oid) if there else None
            mode = "lfs" if large else "regular"
            rows.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": rows})

    def _lfs_batch(self, request: Request, part: Mapping[str, str]) -> Reply:
        """The git-lfs batch call: where to put each object; one that is there already gets no `actions`."""
        repo, objects = self._repo(request, part, write=True), []
        for asked in request.json().get("objects", []):
            oid, size = str(asked["oid"]), int(asked["size"])
            if not re.fullmatch(r"[0-9a-f]{64}", oid):
                raise Refusal(422, message=f"{oid!r} is not a sha256")
            actions = {
                "upload": {"href": self._signed(repo, oid, "PUT"), "header": {}},
                "verify": {"href": f"{self._page(repo)}.git/info/lfs/objects/verify", "header": {}},
            }
            there = repo.has_large_file(oid, size)
            objects.append({"oid": oid, "size": size, **({} if there else {"actions": actions})})
        return as_json({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, request: Request, part: Mapping[str, str]) -> Reply:
        repo, asked = self._repo(request, part, write=True), request.json()
        if not repo.has_large_file(str(asked.get("oid")), asked.get("size")):
            raise Refusal(404, message="the object is not there")
        return as_json({})

    def _commit(self, request: Request, part: Mapping[str, str]) -> Reply:
        """One commit from lines of JSON: a header, then files, large files and deletions."""
        repo, user = self._repo(request, part, write=True), self._user(request)
        if part["revision"] != "main":
            raise Refusal(404, "RevisionNotFound", "main is the only branch")
        try:
            lines = [json.loads(line) for line in request.read_body().splitlines()]
            (_, header), *operations = [(line["key"], line["value"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(400, message="the commit is not lines of JSON") from error
        with self._lock:
            head = repo.git.head()
            if header.get("parentCommit") not in (None, head):
                raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            blobs = {path: entry.oid for path, entry in repo.git.files(head).items()}
            for key, value in operations:
                repo.apply(blobs, key, value)
            try:
                oid = repo.git.commit(blobs, head, user, int(self._clock()), message(header))
            except ValueError as error:
                raise Refusal(400, message=str(error)) from error
        return as_json({"success": True, "commitOid": oid, "commitUrl": f"{self._page(repo)}/commit/{oid}"})

    def _super_squash(self, request: Request, part: Mapping[str, str]) -> Reply:
        """Rewrite history: main becomes one commit without parents, every earlier revision is gone."""
        repo, user = self._repo(request, part, write=True), self._user(request)
        with self._lock:
            self._squash(repo, user, str(request.json().get("message") or "squash"))
        return as_json({})

    def _squash(self, repo: HubRepository, user: str, title: str) -> None:
        blobs = {path: entry.oid for path, entry in repo.git.files(repo.git.head()).items()}
        repo.git.commit(blobs, None, user, int(self._clock()), title)

    # ---------------------------------------------------------------- the store

    def _signed(self, repo: HubRepository, sha256: str, method: str) -> str:
        path = quote(f"/{repo.kind}/{repo.id}/{sha256}")
        return f"{self._store.url}{path}?signature={self._signature(method, path)}"

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()[:32]

    def _stored(self, request: Request, part: Mapping[str, str]) -> Path:
        method = "PUT" if request.method == "PUT" else "GET"
        if request.query.get("signature", [""])[0] != self._signature(method, request.path):
            raise Refusal(403, message="the address is not signed for this")
        folder = self._repo_folder(part["kind"], part["namespace"], part["name"])
        return GitRepository(folder).large_file(part["sha256"])

    def _store_get(self, request: Request, part: Mapping[str, str]) -> Reply:
        file = self._stored(request, part)
        if not file.exists():
            raise Refusal(404, message="the object is not there")
        return as_content(request, file, {"ETag": f'"{part["sha256"]}"', "Content-Type": "application/octet-stream"})

    def _store_put(self, request: Request, part: Mapping[str, str]) -> Reply:
        file, temporary = self._stored(request, part), self._folder / "tmp" / secrets.token_hex(8)
        digest = hashlib.sha256()
        with temporary.open("wb") as out:
            while data := request.body.read(1 << 20):
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != part["sha256"]:
            temporary.unlink()
            raise Refusal(400, message="the bytes do not have the sha256 that they were announced with")
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, file)
        return Reply(200, b"", {"ETag": f'"{part["sha256"]}"'})


def _parts(pattern: re.Pattern[str], request: Request) -> dict[str, str] | None:
    """What the path names, unquoted; None when it is not of this pattern."""
    found = pattern.fullmatch(request.path)
    return {key: unquote(value) for key, value in found.groupdict(default="").items()} if found else None


_REPO = r"(?P<namespace>[^/]+)/(?P<name>[^/]+?)"
_NAMED = rf"/(?P<kind>models|datasets)/{_REPO}"
_API = rf"/api{_NAMED}"
_PAGE = rf"/(?P<kind>datasets/)?{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
_Serve = Callable[[LoopbackHub, Request, Mapping[str, str]], Reply]
_ROUTES: tuple[tuple[str, str, re.Pattern[str], _Serve], ...] = tuple(
    (port, method, re.compile(path), serve)
    for port, method, path, serve in (
        ("hub", "PUT", r"/admin/faults", LoopbackHub._faults_set),
        ("hub", "GET", r"/api/whoami-v2", LoopbackHub._whoami),
        ("hub", "POST", r"/api/repos/create", LoopbackHub._create),
        ("hub", "DELETE", r"/api/repos/delete", LoopbackHub._delete),
        ("hub", "POST", r"/api/validate-yaml", LoopbackHub._validate_yaml),
        ("hub", "PUT", rf"{_API}/settings", LoopbackHub._change_settings),
        ("hub", "GET", rf"{_API}(?:/revision/{_REVISION})?", LoopbackHub._info),
        ("hub", "GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", LoopbackHub._tree),
        ("hub", "POST", rf"{_API}/paths-info/{_REVISION}", LoopbackHub._paths_info),
        ("hub", "GET", rf"{_API}/refs", LoopbackHub._refs),
        ("hub", "GET", rf"{_API}/commits/{_REVISION}", LoopbackHub._commits),
        ("hub", "POST", rf"{_API}/preupload/{_REVISION}", LoopbackHub._preupload),
        ("hub", "POST", rf"{_API}/commit/{_REVISION}", LoopbackHub._commit),
        ("hub", "POST", rf"{_API}/super-squash/{_REVISION}", LoopbackHub._super_squash),
        ("hub", "POST", rf"{_PAGE}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch),
        ("hub", "POST", rf"{_PAGE}\.git/info/lfs/objects/verify", LoopbackHub._lfs_verify),
        ("hub", "GET|HEAD", rf"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", LoopbackHub._resolve),
        ("store", "GET|HEAD", rf"{_NAMED}/(?P<sha256>[0-9a-f]{{64}})", LoopbackHub._store_get),
        ("store", "PUT", rf"{_NAMED}/(?P<sha256>[0-9a-f]{{64}})", LoopbackHub._store_put),
    )
)
