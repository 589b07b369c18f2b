"""What the loopback Hub does wrong when it is told to: faults of its replies, of the wire, and of its owners.

A test sets them on the running object (`hub.faults.set(Fault(...))`), another process by `put_faults`.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sn29.localnet.http_exchange import WIRE, Reply, Wire

Change = Literal["", "delete", "private", "gated", "squash"]
"""What the owner does to the repository: `squash` rewrites its history, so that every revision before is gone."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One rule: which requests it hits, and what happens to them."""

    match: str
    """Regular expression, searched in `hub GET /alice/model/resolve/REVISION/config.json` (or `store GET ...`)."""
    skip: int = 0
    """So many matching requests pass first."""
    times: int | None = None
    """So many are hit then; None: all."""
    change: Change = ""
    """Done to the repository before the request is answered."""
    ignore_range: bool = False
    status: int | None = None
    """Answered instead of doing what was asked. A redirect is a status of 302 with a Location among `headers`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Set on the reply, over its own."""
    wire: Wire = WIRE

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Fault:
        """From what `to_json` gives. Raises ValueError."""
        try:
            fault = cls(**{**dict(value), "wire": Wire(**dict(value).get("wire", {}))})
            re.compile(fault.match)
        except (TypeError, re.error) as error:
            raise ValueError(f"not a fault: {error}") from error
        if fault.change not in get_args(Change):
            raise ValueError(f"not a change: {fault.change!r}")
        return fault

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def spoil(self, reply: Reply) -> Reply:
        """The reply with this fault's headers and on its wire."""
        return Reply(reply.status, reply.body, {**reply.headers, **self.headers}, self.wire)


class Faults:
    """The faults that are set now, and how often each was met."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._set: list[tuple[Fault, list[int]]] = []

    def set(self, *faults: Fault) -> None:
        """These and no others from now on; no argument takes all away."""
        with self._guard:
            self._set = [(fault, [0]) for fault in faults]

    def due(self, line: str) -> Fault | None:
        """The first fault that the request meets and that hits it."""
        with self._guard:
            for fault, met in self._set:
                if not re.search(fault.match, line):
                    continue
                met[0] += 1
                if fault.skip < met[0] <= fault.skip + (met[0] if fault.times is None else fault.times):
                    return fault
        return None

    def hits(self) -> tuple[int, ...]:
        """How many requests each fault hit, in the order in which they were set."""
        with self._guard:
            return tuple(min(max(0, met[0] - fault.skip), fault.times or met[0]) for fault, met in self._set)


def put_faults(endpoint: str, hub_folder: Path, faults: Sequence[Fault]) -> None:
    """Set the faults of a Hub that another process runs. Raises OSError when it does not answer or does not take them."""
    body = json.dumps([fault.to_json() for fault in faults]).encode()
    headers = {"Authorization": f"Bearer {(hub_folder / 'admin').read_text()}"}
    request = urllib.request.Request(f"{endpoint}/admin/faults", data=body, headers=headers, method="PUT")
    with urllib.request.urlopen(request, timeout=10):
        return
