"""The pages over HTTP: read-only, for people, for Prometheus and for whoever restarts what hangs. Standard library alone.

Only GET and HEAD; no request has a body that is read, no answer depends on anything but the address. What is asked by a name is
answered only if no stranger can have it: else his web page could read the answers through the visitor's browser, by a name of his
that leads here (DNS rebinding). Whoever listens to others does not show weights that the chain conceals: see `Snapshot.revealed`.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.report import metrics
from sn29.report.site import POLICY, Site, answer_json
from sn29.report.snapshot import Reader, Snapshot

MAX_CONNECTIONS = 32
"""At a time; for the next one the visitor goes who has been asking for longest, and has not ended."""
SILENCE_S = 10.0
"""A visitor has so long for the whole request, and to take the answer."""
FRESH_S = 1.0
"""A reading is used again for so long: many visitors cost the disk no more than one."""
_HTML, _JSON, _PLAIN = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"


def address_of(where: str) -> tuple[str, int]:
    """(host, port) of `HOST:PORT`. Raises Rejected(SETTING)."""
    host, colon, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise Rejected(Reason.SETTING, where, "HOST:PORT, such as 127.0.0.1:2929", "--serve")
    return host, int(port)


class Pages:
    """What is read and made, shared by all requests."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._site = reader, Site()
        self._reading, self._drawing = threading.Lock(), threading.Lock()
        self._read_at = -FRESH_S
        self._last: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        with self._reading:
            if self._last is None or time.monotonic() - self._read_at > FRESH_S:
                self._last, self._read_at = self._reader.read(), time.monotonic()
            return self._last

    def page(self, snapshot: Snapshot, path: str) -> str | None:
        with self._drawing:  # matplotlib's settings are the process's
            return self._site.answer(snapshot, path)


class Server(ThreadingHTTPServer):
    """Serves until `shutdown`; what it does not know it answers with 404."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self, host: str, port: int, pages: Pages, say: Callable[[str], None] = lambda _: None, silence_s: float = SILENCE_S
    ) -> None:
        """Raises Unavailable when nothing can listen there."""
        self.pages, self.say, self._silence_s = pages, say, silence_s
        self._changing = threading.Lock()
        self._visitors = 0
        self._asking: dict[Any, float] = {}  # connections whose request has not come whole, and since when; oldest first
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), _Handler)
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"{host}:{port}", _why_not(error, port)) from None
        self.is_loopback = _is_loopback(self.server_address[0])

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def snapshot(self) -> Snapshot:
        return self.pages.snapshot() if self.is_loopback else self.pages.snapshot().revealed()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changing:
            is_full = self._visitors >= MAX_CONNECTIONS
            if is_full and self._asking:
                self._leave(next(iter(self._asking)))
            elif is_full:
                self.shutdown_request(request)
                return
            self._visitors += 1
            self._asking[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changing:
                self._visitors -= 1
                self._asking.pop(request, None)

    def has_asked(self, request: Any) -> None:
        """The request has come whole."""
        with self._changing:
            self._asking.pop(request, None)

    def service_actions(self) -> None:
        """Called now and then while it serves."""
        with self._changing:
            for request, since in list(self._asking.items()):
                if time.monotonic() - since > self._silence_s:
                    self._leave(request)

    def _leave(self, request: Any) -> None:
        """Its thread finds that nothing more comes, and ends."""
        del self._asking[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who went away is none; anything else is said in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.say(f"a request failed: {type(error).__name__}: {error}")

    def is_ours(self, host: str) -> bool:
        """Whether a request that names this host is for us: see above."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.strip("[]").lower()
        is_near = "." not in name and ":" not in name and not self.is_loopback  # `validator`, of a network of containers
        return bool(name) and (name == "localhost" or is_near or _is_address(name))


def _why_not(error: OSError | UnicodeError, port: int) -> str:
    """Why nothing can listen there, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"port {port} is taken by another program; name another port with --serve"
    if number == errno.EACCES:
        return f"port {port} is for root alone; name one from 1024 on with --serve"
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"no address of this machine ({said}); name one with --serve, such as 127.0.0.1:2929"


def _is_loopback(host: str | bytes | bytearray) -> bool:
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SILENCE_S
    server_version, sys_version = "sn29", ""

    def do_GET(self) -> None:
        self.server.has_asked(self.connection)
        try:
            status, kind, body = self._found()
        except Sn29Error as error:
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, _PLAIN, f"{error}\n".encode()
        except Exception:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, _PLAIN, b"this page could not be made\n")
            raise
        self._send(status, kind, body)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, _PLAIN, b"only GET and HEAD\n", Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _found(self) -> tuple[HTTPStatus, str, bytes]:
        if not self.server.is_ours(self.headers.get("Host", "")):
            return HTTPStatus.MISDIRECTED_REQUEST, _PLAIN, b"only by its address, or localhost\n"
        path, snapshot = self.path.partition("?")[0].partition("#")[0], self.server.snapshot()
        if path == "/metrics":
            return HTTPStatus.OK, metrics.CONTENT_TYPE, metrics.exposition(snapshot)
        if path == "/healthz":
            return _health(snapshot)
        if path.endswith(".json"):
            data = answer_json(snapshot, path.removesuffix(".json"))
            if data is not None:
                return HTTPStatus.OK, _JSON, data if isinstance(data, bytes) else _as_json(data)
        elif (page := self.server.pages.page(snapshot, path)) is not None:
            return HTTPStatus.OK, _HTML, page.encode(errors="replace")
        return HTTPStatus.NOT_FOUND, _PLAIN, b"there is no such page\n"

    def _send(self, status: HTTPStatus, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        every = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in (every | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody is told of each request."""


def _health(s: Snapshot) -> tuple[HTTPStatus, str, bytes]:
    alarms = [f"{alarm.level}: {alarm.sentence}; what to do: {alarm.advice}\n" for alarm in s.alarms]
    said = "".join(alarms) or ("stopped, as it was asked to\n" if s.was_asked_to_stop else "all is well\n")
    return HTTPStatus.OK if s.is_healthy else HTTPStatus.SERVICE_UNAVAILABLE, _PLAIN, said.encode(errors="replace")


def _as_json(value: Any) -> bytes:
    return f"{json.dumps(value, indent=2, sort_keys=True, allow_nan=False)}\n".encode()
