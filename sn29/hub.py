"""The Hub: the one adapter, and the only importer, of huggingface_hub. The same for the public Hub and a loopback one.

Strangers' repositories are read without a token, so that every validator sees the same; a token serves its owner's
own repositories only, and never leaves the endpoint: a redirect is followed by hand, to places that a Hub keeps files
in. Every request has a timeout (the library's calls come without) and every body that is read into memory has a limit.
What comes out is `Unavailable` when the Hub did not answer and `Rejected` when it did and said no. A Hub that asks for
a pause gets it from every call, and without another request. `within` bounds what several calls may take together.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast
from urllib.parse import quote

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from sn29.errors import Reason, Rejected, Unavailable, shown
from sn29.records import ModelId, RepoFile, RepoListing

Kind = Literal["model", "dataset"]
T = TypeVar("T")

LIBRARY_TIMEOUT_S = 60.0
"""For the library's own requests (they write): longest silence in one of them. A commit may take many seconds."""
_LONGEST_WAIT_S = 10.0
"""A pause that the Hub asks for and that is longer than this is the caller's to decide on."""
_LONGEST_HOLD_S = 3600.0
"""The public Hub counts requests by windows of 5 minutes; a longer pause than this is not a limit but a mistake."""
_SLOWEST_BYTES_PER_S = 50_000
_PAGE_BYTES = 16 << 20
_MODEL_PAGE_BYTES = 128 << 10
"""Of a stranger's listing. A row has some 350 bytes and a path: 64 files with long names have 30 kB."""
_DATASET_PAGES = 100
_REDIRECTS = 5
_SHORT_BYTES = 16 << 10
"""A body that nobody needs is read to its end up to here, so that its connection can serve the next request."""
_STORES = ("huggingface.co", "hf.co")
"""Where the public Hub keeps files: these hosts and those below them."""
_BLOCK = 64 << 10
"""Smallest span that an opened file asks for; pyarrow reads this much of a footer first."""
_OID = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
_KEPT_FILES = (".gitattributes",)
"""The public Hub makes it with the repository and needs it: an upload leaves it alone."""


def _client() -> httpx2.Client:
    """The library's own HTTP client, but never without a timeout, and never through a proxy to this machine."""
    direct: dict[str, httpx2.BaseTransport | None] = {"all://127.0.0.1": None, "all://localhost": None}
    hooks = default_client_factory().event_hooks
    hooks["request"].append(_give_timeout)
    return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=LIBRARY_TIMEOUT_S, mounts=direct)


def _give_timeout(request: httpx2.Request) -> None:
    """Many calls of the library pass timeout=None, which beats the client's own setting."""
    if not any((request.extensions.get("timeout") or {}).values()):
        request.extensions["timeout"] = httpx2.Timeout(LIBRARY_TIMEOUT_S).as_dict()


# Xet uploads in several commits and hands on corrupt bytes; an implicit token goes to whatever the endpoint is. The
# library reads these variables when it is first imported, perhaps by somebody else before us: so both, which also
# reaches child processes.
for _name in ("XET", "TELEMETRY", "PROGRESS_BARS", "IMPLICIT_TOKEN"):
    os.environ[f"HF_HUB_DISABLE_{_name}"] = "1"
    setattr(constants, f"HF_HUB_DISABLE_{_name}", True)
disable_progress_bars()
huggingface_hub.set_client_factory(_client)


Say = Callable[[str, str], None]
"""say(event, sentence): told what went wrong and is being dealt with. `telemetry.warn` is one."""


def silent(event: str, sentence: str) -> None:
    """Says nothing."""


class FileRefused(Unavailable):
    """The store of a Hub does not hand out a file (403, 404 or 410) that the Hub has sent us there for: the object behind it
    is gone, or the store has a bad day."""


_ENDS: ContextVar[float] = ContextVar("ends", default=math.inf)
"""Monotonic time at which the calls of this task, and of the threads that it starts by `asyncio.to_thread`, are over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is asked of a Hub within the block ends after so many seconds together: then all of it is Unavailable."""
    before = _ENDS.set(min(_ENDS.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _ENDS.reset(before)


class Hub:
    """One Hub, seen by one user or by nobody in particular."""

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        *,
        timeout_s: float = 20.0,
        attempts: int = 4,
        pause_s: float = 0.5,
        say: Say = silent,
    ) -> None:
        """`endpoint` None is the public Hub. `timeout_s` is the longest silence in a read; `attempts` counts tries, with
        `pause_s` between the first two and twice that each time after, unless the Hub asks for another."""
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._home = httpx2.URL(self.endpoint)
        self._token, self._timeout_s, self._say = token, timeout_s, say
        self._attempts, self._pause_s = attempts, pause_s
        self._api = HfApi(endpoint=self.endpoint, token=token or False)
        self._held: dict[str, float] = {}
        """Monotonic time before which nothing may be asked, by budget."""
        self.asked: Counter[str] = Counter()
        """Requests so far of the reading methods, by the Hub's budgets: `api` and `files` (500 and 3,000 in 5 minutes)."""

    # ---------------------------------------------------------------- reading

    def listing(self, repo: ModelId, kind: Kind = "model", *, as_owner: bool = False) -> RepoListing:
        """The files of a repository at a revision, with sizes and oids.

        One request for a model; a data set's may have many pages. `as_owner` sends the token, to see one's own private
        repository. Raises Rejected(REPOSITORY_GONE | REVISION_GONE | REPOSITORY_CLOSED), Rejected(FORBIDDEN_FILE) for
        a model with more files than one page holds (1,000 on the public Hub, or 128 kB of rows), Unavailable.
        """
        where = str(repo)
        address = f"/api/{kind}s/{quote(repo.repo)}/tree/{repo.revision}?recursive=true&expand=false"
        url: str | None = self.endpoint + address
        files: list[RepoFile] = []
        longest = _MODEL_PAGE_BYTES if kind == "model" and not as_owner else _PAGE_BYTES
        for _ in range(1 if kind == "model" else _DATASET_PAGES):
            page, url = self._json(str(url), where, as_owner=as_owner, longest=longest)
            files += [_repo_file(row, where) for row in _rows(page, where) if row.get("type") == "file"]
            if not url:
                return RepoListing(repo, tuple(sorted(files)))
        raise Rejected(Reason.FORBIDDEN_FILE, f"more than {len(files)} files", "files that a model needs", where)

    def alive(self, repo: ModelId, path: str = "config.json") -> None:
        """Returns when everybody can read the repository at its revision now: one request of the larger budget, no body.

        Raises Rejected(REPOSITORY_GONE | REVISION_GONE | REPOSITORY_CLOSED), Rejected(MISSING_FILE) when the revision is
        there without `path`, Unavailable. A listing does not tell as much: a gated repository still gives one.
        """
        where = f"{repo} {path}"
        with _our_errors(where):
            url = hf_hub_url(repo.repo, path, revision=repo.revision, endpoint=self.endpoint)

        def ask() -> None:
            with self._response(url, where, self._timeout_s, revision=repo.revision, method="HEAD"):
                return

        self._again(ask)

    def read(
        self, repo: ModelId, path: str, *, start: int = 0, length: int, kind: Kind = "model", as_owner: bool = False
    ) -> bytes:
        """At most `length` bytes from byte `start` on; fewer at the file's end.

        A server that ignores Range is cut off once it has sent start + length bytes. Raises as `stream` does.
        """

        return self._again(lambda: self._span(repo, path, start, length, kind, as_owner))

    def _span(self, repo: ModelId, path: str, start: int, length: int, kind: Kind = "model", as_owner: bool = False) -> bytes:
        """`read`, one attempt."""
        ends = min(_ENDS.get(), time.monotonic() + self._timeout_s + (start + length) / _SLOWEST_BYTES_PER_S)
        found = bytearray()
        pieces = self._chunks(repo, path, kind, start, start + length, self._timeout_s, as_owner) if length else ()
        for data in pieces:
            found += data
            if time.monotonic() > ends:
                raise Unavailable(f"{repo} {path}", f"{len(found)} of {length} bytes came in time")
        return bytes(found)

    def stream(
        self, repo: ModelId, path: str, *, start: int = 0, kind: Kind = "model", timeout_s: float | None = None
    ) -> Generator[bytes, None, None]:
        """The file's bytes from `start` to its end, one attempt; `timeout_s` is the longest silence (default: ours).

        Raises Rejected(REPOSITORY_GONE | REVISION_GONE | REPOSITORY_CLOSED | MISSING_FILE), Unavailable.
        """
        return self._chunks(repo, path, kind, start, None, timeout_s or self._timeout_s)

    def reader(self, repo: ModelId | RepoListing, *, as_owner: bool = False) -> Callable[[str, int, int], bytes]:
        """read(path, start, length) of a model's files, for what inspects them. Raises as `stream` does.

        With a listing, bytes that are not as it states are the line's fault and not the miner's: too few of them, or
        a whole file with another hash, are asked for again and then Unavailable.
        """
        model = repo if isinstance(repo, ModelId) else repo.model
        files = {} if isinstance(repo, ModelId) else {file.path: file for file in repo.files}

        def checked(path: str, start: int, length: int) -> bytes:
            data = self._span(model, path, start, length, as_owner=as_owner)
            file = files.get(path)
            if file is None:
                return data
            due = max(0, min(length, file.size - start))
            if len(data) != due:
                raise Unavailable(f"{model} {path}", f"{len(data)} of {due} bytes came")
            if start == 0 and due == file.size and not _has_oid(data, file):
                raise Unavailable(f"{model} {path}", f"other bytes came than {file.oid}")
            return data

        return lambda path, start, length: self._again(lambda: checked(path, start, length))

    def open(self, repo: ModelId, path: str, size: int, kind: Kind = "dataset") -> BinaryIO:
        """A seekable file of `size` bytes, each span read by Range when it is asked for: for pyarrow."""

        def read(start: int, length: int) -> bytes:
            return self.read(repo, path, start=start, length=length, kind=kind)

        return cast(BinaryIO, _RemoteFile(read, size))

    def resolve(self, repo_name: str, kind: Kind = "model", ref: str = "main") -> str:
        """The revision that a branch points to now. With the owner's token, if there is one. Raises as `listing`."""
        url = f"{self.endpoint}/api/{kind}s/{quote(repo_name)}/revision/{quote(ref, safe='')}"
        info, _ = self._json(url, repo_name, as_owner=True)
        if not isinstance(info, dict) or not isinstance(info.get("sha"), str):
            raise Unavailable(repo_name, "the Hub's reply names no revision")
        return str(info["sha"])

    # ---------------------------------------------------------------- writing, with the owner's token

    def create(self, repo_name: str, *, private: bool = False, kind: Kind = "model") -> None:
        """Make the repository; one that exists already stays as it is."""
        self._call(repo_name, lambda: self._api.create_repo(repo_name, private=private, repo_type=kind, exist_ok=True))

    def set_private(self, repo_name: str, private: bool, kind: Kind = "model") -> None:
        self._call(repo_name, lambda: self._api.update_repo_settings(repo_name, private=private, repo_type=kind))

    def delete(self, repo_name: str, kind: Kind = "model") -> None:
        """Delete the repository; one that is gone already is no error."""
        self._call(repo_name, lambda: self._api.delete_repo(repo_name, repo_type=kind, missing_ok=True))

    def whoami(self) -> str:
        """The name of the token's user. Raises Rejected(SETTING) without a token or with one that the Hub refuses."""
        if not self._token:
            raise Rejected(Reason.SETTING, "no token", "a Hub token", self.endpoint)
        return str(self._call("whoami", self._api.whoami)["name"])

    def upload(self, repo_name: str, folder: Path, *, message: str, kind: Kind = "model") -> str:
        """Make the repository hold exactly the folder's files, in one commit; the revision that does.

        Files and folders whose name starts with a dot stay behind. When the repository holds them already, its present
        revision comes back and nothing is written: so the call can be repeated, also after a commit with unknown
        outcome, because every attempt looks at main first and commits on top of what it saw.
        """
        local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        local = {name: path for name, path in local.items() if not any(part[0] == "." for part in name.split("/"))}
        tried = 0
        while True:
            head, operations = self._difference(repo_name, local, kind)
            if not operations:
                return head
            tried += 1
            try:
                with _our_errors(repo_name):
                    done = self._api.create_commit(
                        repo_name, operations, commit_message=message, repo_type=kind, parent_commit=head
                    )
                return str(done.oid)
            except Unavailable as error:
                self._pause(error, tried)

    def _difference(self, repo_name: str, local: Mapping[str, Path], kind: Kind) -> tuple[str, list[Any]]:
        """Main's revision and the operations that make it hold the local files."""
        head = self.resolve(repo_name, kind)
        present = self.listing(ModelId.parse(f"{repo_name}@{head}"), kind, as_owner=True).files
        same = {file.path for file in present if file.path in local and _is_same(local[file.path], file)}
        operations = [CommitOperationAdd(name, path) for name, path in local.items() if name not in same]
        gone = {file.path for file in present} - local.keys() - set(_KEPT_FILES)
        return head, operations + [CommitOperationDelete(name, is_folder=False) for name in sorted(gone)]

    # ---------------------------------------------------------------- requests

    def _again(self, attempt: Callable[[], T]) -> T:
        """The call, tried again after a pause while it is Unavailable."""
        for tried in range(1, self._attempts):
            try:
                return attempt()
            except Unavailable as error:
                self._pause(error, tried)
        return attempt()

    def _pause(self, error: Unavailable, tried: int) -> None:
        """Wait before the next attempt; raises the error when there is none or the Hub asked for a long wait."""
        if tried >= self._attempts or (error.retry_s or 0.0) > _LONGEST_WAIT_S:
            raise error
        pause_s = error.retry_s or min(_LONGEST_WAIT_S, self._pause_s * 2 ** (tried - 1))
        if time.monotonic() + pause_s >= _ENDS.get():
            raise error
        self._say("hub_retry", f"{error}; attempt {tried + 1} of {self._attempts} in {pause_s:.1f} s")
        time.sleep(pause_s)

    def _call(self, where: str, call: Callable[[], Any]) -> Any:
        """A call of the library, with our errors and retries."""

        def attempt() -> Any:
            with _our_errors(where):
                return call()

        return self._again(attempt)

    @contextmanager
    def _response(
        self, url: str, where: str, timeout_s: float, *, revision: str = "", as_owner: bool = False, method: str = "GET",
        **headers: str,
    ) -> Iterator[httpx2.Response]:  # fmt: skip
        """The reply at the end of the redirects; with HEAD the first one that states a commit.

        Raises for a reply that says no, for a redirect to where no Hub keeps files, and, if a `revision` is given,
        Rejected(REVISION_GONE) when the Hub takes it for the name of another commit: a branch can have a name of 40 hex
        digits, and move. A reply without the word of a Hub on the commit is something else's that stands between.
        """
        # identity: of a compressed body a Range would mean other bytes
        home = httpx2.URL(url).origin == self._home.origin
        token = self._token or False if as_owner and home else False
        sent = {**build_hf_headers(token=token), "Accept-Encoding": "identity", **headers}
        with _our_errors(where):
            request = get_session().build_request(method, url, headers=sent, timeout=min(timeout_s, _left_s(where)))
            stated = ""
            for _ in range(_REDIRECTS + 1):
                with self._sent(request, where) as response:
                    if self._is_hub(request.url):
                        stated = response.headers.get("x-repo-commit", stated)
                    if revision and stated not in ("", revision):
                        raise Rejected(Reason.REVISION_GONE, f"a name for commit {stated}", "the id of a commit", where)
                    if (stated and method == "HEAD") or response.status_code in (200, 206, 416):
                        if revision and not stated:
                            raise Unavailable(where, f"HTTP {response.status_code} that is no reply of a Hub")
                        yield response
                        return
                    if response.next_request is None:
                        raise Unavailable(where, f"HTTP {response.status_code} without what was asked for")
                    request = response.next_request
        raise Unavailable(where, f"more than {_REDIRECTS} redirects")

    @contextmanager
    def _sent(self, request: httpx2.Request, where: str) -> Iterator[httpx2.Response]:
        """The reply to one request, closed at the end. Raises for one that says no, or may not be asked now or there."""
        if not _is_of_hub(self._home, request.url):
            raise Unavailable(where, f"a redirect to {request.url.copy_with(query=None)}, which is no place of this Hub")
        api = request.url.path.startswith("/api/") and not request.url.path.startswith("/api/resolve-cache/")
        budget = "api" if api else "files"
        held_s = self._held.get(budget, 0.0) - time.monotonic()
        if held_s > 0:
            raise Unavailable(where, f"the Hub asked for {held_s:.0f} s more without requests", retry_s=held_s)
        _left_s(where)
        self.asked[budget] += 1
        response = get_session().send(request, stream=True, follow_redirects=False)
        try:
            self._keep_to_limit(response, budget)
            if request.method == "HEAD" or response.status_code >= 300:
                _drain(response)
            if response.status_code >= 400 and response.status_code != 416:  # 416, a span behind the end: no bytes
                if self._is_hub(request.url):
                    raise _from_status(response, where)
                kind = FileRefused if response.status_code in (403, 404, 410) else Unavailable
                raise kind(where, f"HTTP {response.status_code} from {request.url.host}", _retry_s(response))
            yield response
        finally:
            response.close()

    def _is_hub(self, url: httpx2.URL) -> bool:
        """Whether it is a Hub that answers there, who can speak for a repository, and not a store: a mirror may redirect
        to the public Hub."""
        return url.origin == self._home.origin or (url.scheme, url.host) == ("https", _STORES[0])

    def _keep_to_limit(self, response: httpx2.Response, budget: str) -> None:
        """No more requests of this budget before the time that the Hub names, if it says that there are enough."""
        retry_s = _retry_s(response) if response.status_code == 429 else _reset_s(response)
        if retry_s:
            retry_s = min(retry_s, _LONGEST_HOLD_S)
            self._held[budget] = time.monotonic() + retry_s
            self._say("hub_limit", f"the Hub asks for {retry_s:.0f} s without requests of its budget {budget!r}")

    def _json(self, url: str, where: str, *, as_owner: bool, longest: int = _PAGE_BYTES) -> tuple[Any, str | None]:
        """The reply's value and the address of the next page. Raises Rejected(FORBIDDEN_FILE) beyond `longest` bytes.

        Of JSON only: the page of something that stands between us and the Hub says nothing about a model, however long.
        """

        def whole() -> tuple[Any, str | None]:
            ends = min(_ENDS.get(), time.monotonic() + 2 * self._timeout_s)
            body = bytearray()
            with self._response(url, where, self._timeout_s, as_owner=as_owner) as response:
                kind = response.headers.get("content-type", "no type")
                if not kind.startswith("application/json"):
                    raise Unavailable(where, f"the reply is not JSON: {shown(kind, 60)}")
                for data in response.iter_raw():
                    body += data
                    if len(body) > longest:
                        limit = f"files whose list has at most {longest:,} bytes"
                        raise Rejected(Reason.FORBIDDEN_FILE, "a longer list", limit, where)
                    if time.monotonic() > ends:
                        raise Unavailable(where, f"the reply did not end in time, after {len(body)} bytes")
                following = response.links.get("next", {}).get("url")
            try:
                return json.loads(body), following
            except (ValueError, RecursionError) as error:
                raise Unavailable(where, "the reply is not JSON") from error

        return self._again(whole)

    def _chunks(
        self, repo: ModelId, path: str, kind: Kind, start: int, stop: int | None, timeout_s: float, as_owner: bool = False
    ) -> Generator[bytes, None, None]:
        """Bytes start..stop of a file, also from a server that ignores Range and sends it all."""
        where = f"{repo} {path}"
        with _our_errors(where):
            url = hf_hub_url(repo.repo, path, repo_type=kind, revision=repo.revision, endpoint=self.endpoint)
        span = {} if not start and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with self._response(url, where, timeout_s, revision=repo.revision, as_owner=as_owner, **span) as response:
            if response.status_code == 416:
                return
            at = _first_byte(response, start, where)
            is_exact = stop is not None and response.headers.get("content-length") == str(stop - at)
            for data in response.iter_raw():
                wanted = data[max(0, start - at) : None if stop is None else max(0, stop - at)]
                at += len(data)
                if wanted:
                    yield wanted
                if stop is not None and at >= stop and not (is_exact and at == stop):
                    return


class HubDataset:
    """A data set at one revision, as the corpus reads it: sorted files, each opened by Range requests."""

    def __init__(self, hub: Hub, name: str, revision: str) -> None:
        """Raises Rejected(SETTING) for a name or revision that cannot be one."""
        self.revision = revision
        self._hub, self._repo = hub, ModelId.parse(f"{name}@{revision}")
        self._sizes: dict[str, int] | None = None

    def files(self) -> tuple[tuple[str, int], ...]:
        """(path, bytes) of every file, sorted by path. Asked for once: a revision does not change."""
        return tuple(self._by_path().items())

    def open(self, path: str) -> BinaryIO:
        return self._hub.open(self._repo, path, self._by_path()[path])

    def stream(self, repo: ModelId, path: str, *, start: int = 0, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        """A file's bytes for `models.fetch`."""
        return self._hub.stream(repo, path, start=start, kind="dataset", timeout_s=timeout_s)

    def _by_path(self) -> dict[str, int]:
        if self._sizes is None:
            self._sizes = {file.path: file.size for file in self._hub.listing(self._repo, "dataset").files}
        return self._sizes


class _RemoteFile(io.RawIOBase):
    """Reads through `read(start, length)`, at least a block at a time, and keeps the last span."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0
        self._kept_at, self._kept = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        skip = self._at - self._kept_at
        if not 0 <= skip <= skip + length <= len(self._kept):
            self._kept_at, skip = self._at, 0
            self._kept = self._read(self._at, min(max(length, _BLOCK), left))
            if len(self._kept) < length:
                raise Unavailable("a file on the Hub", f"{len(self._kept)} of {length} bytes at {self._at}")
        self._at += length
        return self._kept[skip : skip + length]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _our_errors(where: str) -> Iterator[None]:
    """Turn what the library and its HTTP client raise into Unavailable or Rejected."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _from_status(error.response, where, error.server_message) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OfflineModeIsEnabled) as error:
        raise Unavailable(where, f"{type(error).__name__}: {error}") from error
    except HFValidationError as error:  # no Hub can hold a repository of that name
        raise Rejected(Reason.REPOSITORY_GONE, "a name that is not allowed", str(error), where) from error
    except RuntimeError as error:  # how the library reports that the upload of a large file failed
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _from_status(error.__cause__.response, where, error.__cause__.server_message) from error
        if isinstance(error.__cause__, httpx2.HTTPError):
            raise Unavailable(where, f"{type(error.__cause__).__name__}: {error.__cause__}") from error
        raise


_BY_CODE = {
    "RepoNotFound": (Reason.REPOSITORY_GONE, "a public repository"),
    "RevisionNotFound": (Reason.REVISION_GONE, "a revision in the repository's history"),
    "EntryNotFound": (Reason.MISSING_FILE, "a file of that name"),
    "GatedRepo": (Reason.REPOSITORY_CLOSED, "a public repository without a gate"),
}


def _from_status(response: httpx2.Response, where: str, words: str | None = None) -> Unavailable | Rejected:
    """What a reply of the Hub itself means that says no: by its headers, because a body may have any length.

    To a stranger the Hub shows a private repository as one that never was. 401 without a code is that too [issues of
    huggingface_hub]; 403 and 404 without a word from the Hub are of something between us and it.
    """
    status, code = response.status_code, response.headers.get("x-error-code", "")
    said = response.headers.get("x-error-message") or words or ""
    got = f"HTTP {status}: {shown(said) or code or 'no message'}"
    if code in _BY_CODE:
        reason, limit = _BY_CODE[code]
        if reason is Reason.REPOSITORY_GONE:
            got += " (deleted, renamed or private: the Hub does not say which)"
        return Rejected(reason, got, limit, where)
    if "authorization" in response.request.headers and status in (401, 403):
        return Rejected(Reason.SETTING, got, "a token with the right to do this", where)
    if status == 401:
        return Rejected(Reason.REPOSITORY_GONE, got, "a public repository", where)
    if said == "Access to this resource is disabled." or (said and status == 403):
        return Rejected(Reason.REPOSITORY_CLOSED, got, "a public repository without a gate", where)
    return Unavailable(where, got, _retry_s(response))


def _left_s(where: str) -> float:
    """Seconds that `within` leaves. Raises Unavailable when there are none."""
    left = _ENDS.get() - time.monotonic()
    if left <= 0:
        raise Unavailable(where, "the time for this repository is over: it did not answer in time")
    return left


def _drain(response: httpx2.Response) -> None:
    left = _SHORT_BYTES
    for data in response.iter_raw():
        left -= len(data)
        if left < 0:
            return


def _retry_s(response: httpx2.Response) -> float | None:
    """Seconds to wait, from the reply's Retry-After (seconds or a date), or from its rate limit when that is used up."""
    asked = response.headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]{1,9}", asked):
        return float(asked)
    try:
        date = parsedate_to_datetime(asked)
    except ValueError:
        return _reset_s(response)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _reset_s(response: httpx2.Response) -> float | None:
    """Seconds until the Hub counts anew, when it says that no request is left until then."""
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and not limit.remaining else None


def _is_of_hub(home: httpx2.URL, url: httpx2.URL) -> bool:
    """Whether a request may go there: to the Hub itself; from a Hub on this machine to this machine only; else by https
    to the public Hub's stores or below the Hub's own host; on a Hub that is plain http, to its host's other ports too."""
    if url.origin == home.origin:
        return True
    if _is_this_machine(home.host):
        return _is_this_machine(url.host)
    if url.scheme == home.scheme == "http":
        return url.host == home.host
    return url.scheme == "https" and any(url.host == host or url.host.endswith(f".{host}") for host in (*_STORES, home.host))


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _first_byte(response: httpx2.Response, start: int, where: str) -> int:
    """The offset of the body's first byte: 0 for a whole file, `start` for the span that was asked for."""
    if response.status_code == 200:
        return 0
    if response.headers.get("content-range", "").startswith(f"bytes {start}-"):
        return start
    raise Unavailable(where, f"HTTP {response.status_code} with another span: {response.headers.get('content-range')}")


def _rows(page: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(page, list) and all(isinstance(row, dict) for row in page):
        return page
    raise Unavailable(where, "the Hub's reply is not a list of files")


def _repo_file(row: Mapping[str, Any], where: str) -> RepoFile:
    lfs = row.get("lfs")
    held = lfs if isinstance(lfs, dict) else row
    path, size = row.get("path"), held.get("size")
    oid = f"{'git' if held is row else 'sha256'}:{held.get('oid')}"
    # A path with half a character, which JSON can name, cannot be in git.
    whole = isinstance(path, str) and path.encode(errors="replace").decode() == path
    if not isinstance(path, str) or not whole or not isinstance(size, int) or size < 0 or not _OID.fullmatch(oid):
        raise Unavailable(where, "the Hub's reply has a file without path, size or oid")
    return RepoFile(path, size, oid)


def _is_same(path: Path, file: RepoFile) -> bool:
    """Whether a local file has the content that the Hub states."""
    if path.stat().st_size != file.size:
        return False
    digest = _start_digest(file)
    with path.open("rb") as content:
        while data := content.read(1 << 20):
            digest.update(data)
    return digest.hexdigest() == file.oid.partition(":")[2]


def _has_oid(data: bytes, file: RepoFile) -> bool:
    digest = _start_digest(file)
    digest.update(data)
    return digest.hexdigest() == file.oid.partition(":")[2]


def _start_digest(file: RepoFile) -> hashlib._Hash:
    """git hashes a header with the size before the content; large file storage the content alone."""
    return hashlib.sha256() if file.oid.startswith("sha256:") else hashlib.sha1(b"blob %d\0" % file.size)
