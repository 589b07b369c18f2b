"""HTTP/1.1 on loopback with the standard library: a request in, a reply out, byte ranges, files sent by the kernel.

A reply may ask for a `Wire` that spoils it on its way, so that clients can be tried against bad lines.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_BODY_IN_MEMORY = 256 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_PIECE = 64 << 10


class Body:
    """A request's body and no byte more."""

    def __init__(self, source: BufferedIOBase, length: int) -> None:
        self._source, self._left = source, length

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def drained(self) -> bool:
        """Read what a refused request still sends, up to 1 MB; False when more is left than that."""
        self.read(1 << 20)
        return self._left == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `body` is read at most once, by `read_body` or as a stream of `body_bytes` bytes."""

    port: str
    """`hub` or `store`: which of the two ports it came in by."""
    method: str
    path: str
    """As sent: still percent-encoded, without the query."""
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    """By lower-case name."""
    body: Body
    body_bytes: int

    def read_body(self) -> bytes:
        if self.body_bytes > MAX_BODY_IN_MEMORY:
            raise Refusal(413, message=f"at most {MAX_BODY_IN_MEMORY} bytes")
        return self.body.read()

    def json(self) -> Any:
        try:
            return json.loads(self.read_body() or b"{}")
        except ValueError as error:
            raise Refusal(400, message="the body is not JSON") from error


@dataclass(frozen=True, slots=True)
class FileSpan:
    """`length` bytes of a file from byte `start` on."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Wire:
    """What happens to a reply on its way. Offsets count the bytes of this reply's body."""

    delay_s: float = 0.0
    """Silence before the first byte of the reply."""
    drop: bool = False
    """The connection is closed and nothing is said; the request was done all the same."""
    cut_at: int | None = None
    """The connection is closed after so many bytes."""
    stall_at: int | None = None
    """Silence of `stall_s` before this byte."""
    stall_s: float = 0.0
    flip_at: int | None = None
    """This byte has another lowest bit."""
    length_by: int = 0
    """Content-Length says so many bytes more (and the line ends early) or fewer (and the body is cut to fit)."""
    bytes_per_s: float | None = None


WIRE = Wire()
"""The good line."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int = 200
    body: bytes | FileSpan = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    wire: Wire = WIRE

    @property
    def num_bytes(self) -> int:
        return self.body.length if isinstance(self.body, FileSpan) else len(self.body)


class Refusal(Exception):
    """A reply that says no, in the words that the Hub's client understands: X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(f"{status} {code} {message}")
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.reply = as_json({"error": message}, status, {name: value for name, value in headers.items() if value})


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def as_content(request: Request, content: bytes | Path, headers: Mapping[str, str]) -> Reply:
    """A file's content: all of it with 200, the span that a Range header asks for with 206, or 416."""
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    first, last = (found[1], found[2]) if found else ("", "")
    if not first and not last:
        start, stop, status = 0, size, 200
    elif not first:
        start, stop, status = max(0, size - int(last)), size, 206
    else:
        start, stop, status = int(first), min(size, int(last) + 1 if last else size), 206
    if status == 206 and start >= stop:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    span = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if status == 206 else {}
    body = FileSpan(content, start, stop - start) if isinstance(content, Path) else content[start:stop]
    return Reply(status, body, {"Accept-Ranges": "bytes", **headers, **span})


class HttpServer:
    """One listening port whose every request goes through `answer`, one thread a connection."""

    def __init__(self, name: str, host: str, port: int, answer: Callable[[Request], Reply]) -> None:
        self._server = _Server((host, port), _Handler)
        self._server.name, self._server.answer = name, answer
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every open connection."""
        self._server.stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.drop_connections()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    name: str
    answer: Callable[[Request], Reply]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._guard = threading.Lock()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self._guard:
            self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        with self._guard:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the other side closed it first


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes: without this each reply waits 40 ms
    server: _Server

    def _exchange(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdigit():
            self.close_connection = True
            self._send(Refusal(411, message="a Content-Length is needed").reply)
            return
        query = parse_qs(url.query, keep_blank_values=True)
        body = Body(self.rfile, int(length))
        reply = self.server.answer(Request(self.server.name, self.command, url.path, query, headers, body, int(length)))
        self.close_connection = self.close_connection or not body.drained()
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _exchange

    def _send(self, reply: Reply) -> None:
        wire = reply.wire
        self.server.stopping.wait(wire.delay_s)
        self.close_connection = self.close_connection or wire.drop or wire.cut_at is not None or wire.length_by > 0
        if wire.drop:
            return
        try:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(max(0, reply.num_bytes + wire.length_by)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command == "HEAD":
                return
            if wire != WIRE:
                for data in self._spoiled(reply):
                    self.wfile.write(data)
            elif isinstance(reply.body, bytes):
                self.wfile.write(reply.body)
            else:
                with reply.body.path.open("rb") as file:
                    self.connection.sendfile(file, reply.body.start, reply.body.length or None)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client went away: its own affair

    def _spoiled(self, reply: Reply) -> Iterator[bytes]:
        """The body's pieces, as the wire lets them through."""
        wire, body, at = reply.wire, reply.body, 0
        end = reply.num_bytes + min(0, wire.length_by)
        end = end if wire.cut_at is None else min(end, wire.cut_at)
        with nullcontext(BytesIO(body)) if isinstance(body, bytes) else body.path.open("rb") as source:
            source.seek(body.start if isinstance(body, FileSpan) else 0)
            while at < end:
                if at == wire.stall_at:
                    self.server.stopping.wait(wire.stall_s)
                stop = min(end, at + _PIECE)
                if wire.stall_at is not None and at < wire.stall_at:
                    stop = min(stop, wire.stall_at)
                data = bytearray(source.read(stop - at))
                if wire.flip_at is not None and at <= wire.flip_at < stop:
                    data[wire.flip_at - at] ^= 1
                yield bytes(data)
                if wire.bytes_per_s:
                    self.server.stopping.wait(len(data) / wire.bytes_per_s)
                at = stop

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the Hub keeps its own record of requests."""
