"""A validator's state folder for tests: real records of the real rules, a real store, a status as the validator writes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recorded import WINDOW, losses, refused, round_record

from sn29 import record_files, telemetry
from sn29.records import Outcome, Weights
from sn29.round_record import RoundRecord
from sn29.store import ChainSeen, Sent, Standing, Store

FIRST = 4_810_320
HOSTILE = "</td><script>alert(1)</script> \"onload='x' \u202e\x00"
ALICE, BOB, CAROL, DAVE, EVE, ZED, VALIDATOR = (
    f"5{name:e<46}z" for name in ("Alice", "Bob", "Carol", "Dave", "Eve", "Zed", "Validator")
)


@dataclass(frozen=True)
class Watched:
    """The folder, and what is in it."""

    folder: Path
    records: tuple[RoundRecord, ...]
    """Oldest first: Alice holds the crown; Bob is a little better from the third round on; Eve is refused, Zed writes HOSTILE."""
    head: int

    @property
    def newest(self) -> RoundRecord:
        return self.records[-1]


def watched(folder: Path, rounds: int = 4, *, age_s: float = 0.0, published: bool = True) -> Watched:
    """age_s: how long ago the chain was seen and the status was written."""
    store = Store(folder / "store.db")
    records: list[RoundRecord] = []
    nowhere = Outcome(
        ZED, "", FIRST - 20, "rejected", "", "", "malformed_commitment", f"cannot be read: {HOSTILE}", HOSTILE, "a:b:c"
    )
    commits = {ALICE: FIRST - 5000, BOB: FIRST - 3000, CAROL: FIRST - 2000, DAVE: FIRST - 100}
    for i in range(rounds):
        shifts = {ALICE: (0.0, 0.004), BOB: (-0.004 * (i > 1), 0.004), CAROL: (0.01, 0.004), DAVE: (0.03, 0.01)}
        record = round_record(
            FIRST + i * WINDOW, losses(60, i, **shifts), commits, rule="champion", before=records[-1] if records else None,
            others=[refused(EVE, FIRST - 50)], no_competition=[nowhere],
        )  # fmt: skip
        record_files.write(folder / "records", record)
        store.open_round(record.head.block, {})
        kept = record.competitions["c00"]
        standings = [Standing("c00", m.outcome.model, m.hotkey, 0.0) for m in kept.models if m.evaluated]
        store.finish_round(record.head.block, record, record.weights, standings)
        records.append(record)
    newest = records[-1].head.block
    if published:
        store.keep_publication(newest + 30, records[-1].weights[0])
    store.keep_sent(0, Sent(newest + 60, Weights(newest, {ALICE: 1.0})))
    head = newest + WINDOW + 120
    store.open_round(newest + WINDOW, {})
    store.keep_chain_seen(ChainSeen(head - 10, time.time() - age_s - 120, 12.0, 360, 0))
    store.close()
    return Watched(folder, tuple(records), head)


@contextmanager
def telling(state: Watched) -> Iterator[None]:
    """A validator that is at work on the next round writes its status there."""
    telemetry.configure(level="CRITICAL")
    telemetry.keep_status(state.folder / telemetry.STATUS, "validator")
    try:
        window = state.newest.head.block + WINDOW
        telemetry.note(hotkey=VALIDATOR, head=state.head, head_time=time.time() - 8, next_window=window + WINDOW)
        telemetry.tell("round", "begun", block=window)
        telemetry.tell("evaluated", "60 samples", hotkey=ALICE)
        telemetry.tell("evaluated", "60 samples", hotkey=BOB)
        telemetry.warn("refused", "the number of parameters", hotkey=EVE)
        telemetry.warn("mismatch", f"812.5 nats where 812.6 were measured {HOSTILE}", hotkey=BOB)
        telemetry.stage("reading")
        telemetry.note(round=window)
        telemetry.stage("measuring", 2, 5, f"c00: {CAROL}")
        yield
    finally:
        telemetry.leave_status()
