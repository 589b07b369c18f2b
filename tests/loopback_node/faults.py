"""What can go wrong with a node, as plain settings that a test changes while the node runs, and what it has counted."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, fields
from typing import Any

SUBMITS = ("ok", "drop_before", "drop_after", "swallow", "mute", "late", "never", "twice")


@dataclass
class Faults:
    """All off by default. Each may be set at any time, from any thread; `clear` sets everything back."""

    submits: deque[str] = field(default_factory=deque)
    """What happens to the next submits, in order, one word each; when it is empty they go well:

    ok; drop_before (connection cut, not passed on); drop_after (passed on, connection cut before the answer); swallow (not
    passed on, never answered); mute (passed on, never answered); late or late:N (answered and ready, included N blocks
    later, 3 when not said); never (answered and ready, never included); twice (the node tries to include it twice).
    """
    drop_after_bytes: int | None = None
    """A connection is cut when it has sent this many bytes more, in the middle of a message if it falls there; once."""
    drop_requests: int = 0
    """So many next requests get the connection cut instead of an answer."""
    silent: bool = False
    """Requests are taken and never answered; the connection stays open and answers pings."""
    silent_handshake: bool = False
    """Connections are taken and the websocket handshake never answered."""
    delay_s: float = 0.0
    """Each message is answered so much later; messages wait side by side."""
    refusal: str | None = None
    """The endpoint's policy refuses: "429" or "403" at the handshake, "-32004" or "-32005" to requests, "1008" closes."""
    retry_after: str | None = None
    """What a refusal says about when to come again, in seconds."""
    idle_s: float | None = None
    """A connection on which nothing was asked for so long is closed as done with (1000)."""
    lag: int = 0
    """The node shows the chain as it was so many blocks ago; what is submitted goes on to the others."""
    stands_at: int | None = None
    """The node shows no block after this one; what is submitted goes on to the others."""
    keeps_states: int | None = None
    """A read of a state older than so many blocks is answered "State already discarded"."""

    def set(self, name: str, value: Any) -> None:
        if name not in {each.name for each in fields(self)}:
            raise ValueError(f"no fault {name!r}")
        if name == "submits":
            for word in value:
                if word.split(":")[0] not in SUBMITS:
                    raise ValueError(f"no fault of a submit {word!r}")
            value = deque(value)
        setattr(self, name, value)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


@dataclass
class Traffic:
    """Counted since the start or the last `reset`; bytes are those of the JSON text, without the websocket's frames."""

    requests: Counter[str] = field(default_factory=Counter)
    """By method; a runtime call as "state_call:Api_method"."""
    connections: int = 0
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def total(self) -> int:
        """Requests."""
        return sum(self.requests.values())

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]
