"""The Hub: the one adapter, and the only importer, of huggingface_hub. The same for the public Hub and a loopback one.

Strangers' repositories are read without a token, so that every validator sees the same; a token serves its owner's
own repositories only. Every request has a timeout (the library's calls come without) and every body that is read into
memory has a limit. What comes out is `Unavailable` when the Hub did not answer and `Rejected` when it did and said no.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast
from urllib.parse import quote

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)
from huggingface_hub.utils._http import default_client_factory

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import ModelId, RepoFile, RepoListing

Kind = Literal["model", "dataset"]
T = TypeVar("T")

LIBRARY_TIMEOUT_S = 60.0
"""For the library's own requests (they write): longest silence in one of them. A commit may take many seconds."""
_LONGEST_WAIT_S = 10.0
"""A pause that the Hub asks for and that is longer than this is the caller's to decide on."""
_SLOWEST_BYTES_PER_S = 50_000
_PAGE_BYTES = 16 << 20
_DATASET_PAGES = 100
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


class Hub:
    """One Hub, seen by one user or by nobody in particular."""

    def __init__(
        self, endpoint: str | None = None, token: str | None = None, *, timeout_s: float = 20.0, attempts: int = 4
    ) -> None:
        """`endpoint` None is the public Hub. `timeout_s` is the longest silence in a read; `attempts` counts tries."""
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token, self._timeout_s, self._attempts = token, timeout_s, attempts
        self._api = HfApi(endpoint=self.endpoint, token=token or False)

    # ---------------------------------------------------------------- reading

    def listing(self, repo: ModelId, kind: Kind = "model", *, as_owner: bool = False) -> RepoListing:
        """The files of a repository at a revision, with sizes and oids.

        One request for a model; a data set's may have many pages. `as_owner` sends the token, to see one's own private
        repository. Raises Rejected(REPOSITORY_GONE | REVISION_GONE | REPOSITORY_CLOSED), Rejected(FORBIDDEN_FILE) for
        a model with more files than one page holds (1,000 on the public Hub), Unavailable.
        """
        where = str(repo)
        address = f"/api/{kind}s/{quote(repo.repo)}/tree/{repo.revision}?recursive=true&expand=false"
        url: str | None = self.endpoint + address
        files: list[RepoFile] = []
        for _ in range(1 if kind == "model" else _DATASET_PAGES):
            page, url = self._json(str(url), where, as_owner=as_owner)
            files += [_repo_file(row, where) for row in _rows(page, where) if row.get("type") == "file"]
            if not url:
                return RepoListing(repo, tuple(sorted(files)))
        raise Rejected(Reason.FORBIDDEN_FILE, f"more than {len(files)} files", "files that a model needs", where)

    def read(
        self, repo: ModelId, path: str, *, start: int = 0, length: int, kind: Kind = "model", as_owner: bool = False
    ) -> bytes:
        """At most `length` bytes from byte `start` on; fewer at the file's end.

        A server that ignores Range is cut off once it has sent start + length bytes. Raises as `stream` does.
        """

        def whole() -> bytes:
            ends = time.monotonic() + self._timeout_s + (start + length) / _SLOWEST_BYTES_PER_S
            found = bytearray()
            pieces = self._chunks(repo, path, kind, start, start + length, self._timeout_s, as_owner) if length else ()
            for data in pieces:
                found += data
                if time.monotonic() > ends:
                    raise Unavailable(f"{repo} {path}", f"{len(found)} of {length} bytes came in time")
            return bytes(found)

        return self._again(whole)

    def stream(
        self, repo: ModelId, path: str, *, start: int = 0, kind: Kind = "model", timeout_s: float | None = None
    ) -> Iterator[bytes]:
        """The file's bytes from `start` to its end, one attempt; `timeout_s` is the longest silence (default: ours).

        Raises Rejected(REPOSITORY_GONE | REVISION_GONE | REPOSITORY_CLOSED | MISSING_FILE), Unavailable.
        """
        return self._chunks(repo, path, kind, start, None, timeout_s or self._timeout_s)

    def reader(self, repo: ModelId, *, as_owner: bool = False) -> Callable[[str, int, int], bytes]:
        """read(path, start, length) of a model's files, for what inspects them. Raises as `stream` does."""
        return lambda path, start, length: self.read(repo, path, start=start, length=length, as_owner=as_owner)

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
        time.sleep(error.retry_s or min(_LONGEST_WAIT_S, 0.25 * 2**tried))

    def _call(self, where: str, call: Callable[[], Any]) -> Any:
        """A call of the library, with our errors and retries."""

        def attempt() -> Any:
            with _our_errors(where):
                return call()

        return self._again(attempt)

    @contextmanager
    def _response(self, url: str, where: str, timeout_s: float, token: str | bool, **headers: str) -> Iterator[httpx2.Response]:
        # identity: of a compressed body a Range would mean other bytes
        sent = {**build_hf_headers(token=token), "Accept-Encoding": "identity", **headers}
        with _our_errors(where), get_session().stream("GET", url, headers=sent, timeout=timeout_s) as response:
            if response.status_code != 416:  # a span behind the end: no bytes, not an error
                hf_raise_for_status(response)
            yield response

    def _json(self, url: str, where: str, *, as_owner: bool) -> tuple[Any, str | None]:
        """The reply's value and the address of the next page."""

        def whole() -> tuple[Any, str | None]:
            ends = time.monotonic() + 2 * self._timeout_s
            body = bytearray()
            token = self._token or False if as_owner else False
            with self._response(url, where, self._timeout_s, token) as response:
                for data in response.iter_raw():
                    body += data
                    if len(body) > _PAGE_BYTES or time.monotonic() > ends:
                        raise Unavailable(where, f"the reply did not end within {len(body)} bytes")
                following = response.links.get("next", {}).get("url")
            try:
                return json.loads(body), following
            except ValueError as error:
                raise Unavailable(where, "the reply is not JSON") from error

        return self._again(whole)

    def _chunks(
        self, repo: ModelId, path: str, kind: Kind, start: int, stop: int | None, timeout_s: float, as_owner: bool = False
    ) -> Iterator[bytes]:
        """Bytes start..stop of a file, also from a server that ignores Range and sends it all."""
        where = f"{repo} {path}"
        with _our_errors(where):
            url = hf_hub_url(repo.repo, path, repo_type=kind, revision=repo.revision, endpoint=self.endpoint)
        span = {} if not start and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        token = self._token or False if as_owner else False
        with self._response(url, where, timeout_s, token, **span) as response:
            if response.status_code == 416:
                return
            at = _first_byte(response, start, where)
            for data in response.iter_raw():
                wanted = data[max(0, start - at) : None if stop is None else max(0, stop - at)]
                at += len(data)
                if wanted:
                    yield wanted
                if stop is not None and at >= stop:
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

    def stream(self, repo: ModelId, path: str, *, start: int = 0, timeout_s: float | None = None) -> Iterator[bytes]:
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
        raise _from_status(error, where) from error
    except (httpx2.HTTPError, httpx2.StreamError, OfflineModeIsEnabled) as error:
        raise Unavailable(where, f"{type(error).__name__}: {error}") from error
    except HFValidationError as error:  # no Hub can hold a repository of that name
        raise Rejected(Reason.REPOSITORY_GONE, "a name that is not allowed", str(error), where) from error
    except RuntimeError as error:  # how the library reports that the upload of a large file failed
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _from_status(error.__cause__, where) from error
        if isinstance(error.__cause__, httpx2.HTTPError):
            raise Unavailable(where, f"{type(error.__cause__).__name__}: {error.__cause__}") from error
        raise


def _from_status(error: HfHubHTTPError, where: str) -> Unavailable | Rejected:
    status = error.response.status_code
    got = f"HTTP {status}: {error.server_message or 'no message'}"
    if isinstance(error, GatedRepoError | DisabledRepoError):
        return Rejected(Reason.REPOSITORY_CLOSED, got, "a public repository without a gate", where)
    if isinstance(error, RepositoryNotFoundError):
        return Rejected(Reason.REPOSITORY_GONE, got, "a public repository", where)
    if isinstance(error, RevisionNotFoundError):
        return Rejected(Reason.REVISION_GONE, got, "a revision in the repository's history", where)
    if isinstance(error, EntryNotFoundError):
        return Rejected(Reason.MISSING_FILE, got, "a file of that name", where)
    if status in (401, 403) and "authorization" in error.response.request.headers:
        return Rejected(Reason.SETTING, got, "a token with the right to do this", where)
    if status in (401, 403):
        return Rejected(Reason.REPOSITORY_CLOSED, got, "a public repository without a gate", where)
    return Unavailable(where, got, _retry_s(error.response))


def _retry_s(response: httpx2.Response) -> float | None:
    """Seconds to wait, from the reply's Retry-After or from its rate limit when that is used up."""
    asked = response.headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and not limit.remaining else None


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
    if not isinstance(path, str) or not isinstance(size, int) or size < 0 or not _OID.fullmatch(oid):
        raise Unavailable(where, "the Hub's reply has a file without path, size or oid")
    return RepoFile(path, size, oid)


def _is_same(path: Path, file: RepoFile) -> bool:
    """Whether a local file has the content that the Hub states."""
    if path.stat().st_size != file.size:
        return False
    kind, _, oid = file.oid.partition(":")
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as content:
        while data := content.read(1 << 20):
            digest.update(data)
    return digest.hexdigest() == oid
