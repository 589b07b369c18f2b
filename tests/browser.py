"""A real Chromium, headless, spoken to by its DevTools over a websocket: what it shows, asks for and complains of."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
needed = pytest.mark.skipif(PROGRAM is None, reason="no chromium, chromium-browser or google-chrome on this machine")
DEADLINE_S = 60.0


@dataclass
class Tab:
    """One page of the browser, and everything that it asked for and said since it was opened."""

    connection: ClientConnection
    asked: list[str] = field(default_factory=list)
    """Addresses of all requests."""
    complaints: list[str] = field(default_factory=list)
    """What the console says at level warning or above, failed requests and exceptions."""
    _last: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        self.connection.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        ends = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends:
            message = json.loads(self.connection.recv(timeout=DEADLINE_S))
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._hear(message)
        raise AssertionError(f"no answer to {method}")

    def _hear(self, message: dict[str, Any]) -> None:
        said = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(said["request"]["url"])
            case "Network.responseReceived" if said["response"]["status"] >= 400:
                self.complaints.append(f"{said['response']['status']} {said['response']['url']}")
            case "Log.entryAdded" if said["entry"]["level"] in ("warning", "error"):
                self.complaints.append(said["entry"]["text"])
            case "Runtime.consoleAPICalled" if said["type"] in ("warning", "error", "assert"):
                self.complaints.append(str(said["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(said["exceptionDetails"]))
        self._events.append(message)

    def look(self, width: int, *, dark: bool, height: int = 900) -> None:
        """The size of the window, and what the reader prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, url: str) -> None:
        """Until the page is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        ends = time.monotonic() + DEADLINE_S
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            assert time.monotonic() < ends, f"{url} is not loaded"
            self._hear(json.loads(self.connection.recv(timeout=DEADLINE_S)))

    def run(self, expression: str) -> Any:
        """What a JavaScript expression is there."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> Path:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))
        return path


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser whose profile is in `folder`, with one empty tab."""
    assert PROGRAM is not None
    command = [
        PROGRAM, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
        "--hide-scrollbars", f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(process, folder / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=DEADLINE_S) as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None, open_timeout=DEADLINE_S) as connection:
            tab = Tab(connection)
            for domain in ("Page", "Network", "Log", "Runtime"):
                tab.call(f"{domain}.enable")
            tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
            yield tab
    finally:
        process.terminate()
        process.wait(30)


def _port(process: subprocess.Popen[bytes], path: Path) -> int:
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        if path.exists() and (lines := path.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError("the browser says no port")
