from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sn29.errors import Reason, Rejected
from sn29.records import Commitment, Head, Loss, ModelId, Outcome, Weights
from sn29.round_record import RoundRecord
from sn29.store import Standing, Store

COMMITMENT = Commitment("5Alice", 7, ModelId("alice", "model", "a" * 40), "A" * 43 + "=", "c00")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state" / "store.db")


def reopened(store: Store, tmp_path: Path) -> Store:
    store.close()
    return Store(tmp_path / "state" / "store.db")


def test_losses_are_kept_for_exactly_what_they_were_measured_on(store, tmp_path):
    rows = [Loss("s1", 12.5, 3, ""), Loss("s2", math.inf, 900, "too_long"), Loss("s3", 0.1 + 0.2, 1, "")]
    store.keep_losses("content", "tokenizer", "float32", rows)
    store = reopened(store, tmp_path)
    assert store.losses("content", "tokenizer", "float32", ["s3", "s2", "s1", "s9"]) == {row.sample: row for row in rows}
    assert store.losses("other", "tokenizer", "float32", ["s1"]) == {}
    assert store.losses("content", "other", "float32", ["s1"]) == {}
    assert store.losses("content", "tokenizer", "bfloat16", ["s1"]) == {}
    assert store.count_losses() == 3


def test_nan_is_no_loss(store):
    with pytest.raises(sqlite3.IntegrityError):  # SQLite reads NaN as null, which the column does not take
        store.keep_losses("content", "tokenizer", "float32", [Loss("s1", math.nan, 3, "")])
    assert store.count_losses() == 0


def test_the_earliest_claim_stays_whatever_comes_first(store):
    store.keep_claims({"weights": (20, "5Bob")})
    store.keep_claims({"weights": (10, "5Carol"), "other": (5, "5Bob")})
    store.keep_claims({"weights": (30, "5Alice")})
    store.keep_claims({"weights": (10, "5Bob")})
    assert store.claims() == {"weights": (10, "5Bob"), "other": (5, "5Bob")}


def test_a_verdict_holds_for_its_commitment_and_its_rules(store, tmp_path):
    outcome = Outcome("5Alice", "c00", 7, "rejected", "alice/model@" + "a" * 40, reason="copy", detail="why", got="1", limit="2")
    store.keep_verdict(outcome, COMMITMENT.encode(), "rules 1")
    store = reopened(store, tmp_path)
    assert store.verdict("5Alice", 7, COMMITMENT.encode(), "rules 1") == outcome
    assert store.verdict("5Alice", 7, COMMITMENT.encode(), "rules 2") is None
    assert store.verdict("5Alice", 8, COMMITMENT.encode(), "rules 1") is None


def test_failures_are_counted_across_restarts(store, tmp_path):
    assert store.count_failure(COMMITMENT) == 1
    assert reopened(store, tmp_path).count_failure(COMMITMENT) == 2


def test_a_round_is_open_until_its_record_is_kept(store, tmp_path):
    store.open_round(360, {"block": 360, "windows": {}})
    store.open_round(360, {"block": 360, "windows": {"changed": 1}})
    assert [(r.block, r.plan["windows"]) for r in store.open_rounds()] == [(360, {})]
    assert store.weights() is None
    assert store.last_finished() is None
    weights = Weights(360, {"5Alice": 1.0})
    record = RoundRecord(Head(360, "0x" + "0" * 64), {}, (), {}, ("5Alice",), None, weights, {}, {})
    store.finish_round(360, record, weights, [Standing("c00", "alice/model@1", "5Alice", 1.0)])
    store.open_round(720, {"block": 720, "windows": {}})
    store = reopened(store, tmp_path)
    assert [r.block for r in store.open_rounds()] == [720]
    assert store.last_finished() == 360
    assert store.weights() == Weights(360, {"5Alice": 1.0})
    assert store.weights(before=360) is None
    assert store.rounds()[0].record == record == store.last_record(before=720)
    assert store.last_record(before=360) is None
    assert store.last_evaluated("c00") == {"alice/model@1": 360}
    assert store.last_standing("c00", before=720) == {"5Alice": 1.0}
    assert store.last_standing("c00", before=360) == {}
    store.keep_publication(400, Weights(360, {"5Alice": 1.0}))
    assert store.publications() == ((400, Weights(360, {"5Alice": 1.0})),)


def test_a_store_belongs_to_one_chain(store, tmp_path):
    store.belong_to("0xabc netuid 29")
    store.belong_to("0xabc netuid 29")
    with pytest.raises(Rejected) as refused:
        reopened(store, tmp_path).belong_to("0xdef netuid 29")
    assert "0xabc" in refused.value.got
    assert "0xdef" in refused.value.limit


def test_a_file_of_another_schema_is_refused_and_left_alone(store, tmp_path):
    store.close()
    path = tmp_path / "state" / "store.db"
    with sqlite3.connect(path) as db:
        db.execute("update meta set value = '99' where key = 'schema'")
    with pytest.raises(Rejected, match="schema 99") as refused:
        Store(path)
    assert refused.value.reason is Reason.SETTING
    with pytest.raises(Rejected, match="no store"):
        Store(tmp_path / "nowhere" / "store.db", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_what_was_kept_survives_sigkill(tmp_path):
    """A process that keeps losses one after the other is killed: every loss that it reported kept is there, whole."""
    script = (
        "import sys; from pathlib import Path; from sn29.store import Store; from sn29.records import Loss\n"
        f"store = Store(Path({str(tmp_path / 'store.db')!r}))\n"
        "for i in range(100000):\n"
        "    store.keep_losses('content', 'tokenizer', 'p', [Loss(f's{i}-{j}', i + j / 8, 1, '') for j in range(8)])\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 50:
            os.kill(process.pid, signal.SIGKILL)
            break
    last = max(int(line) for line in [line, *process.stdout])
    process.wait()
    store = Store(tmp_path / "store.db")
    names = [f"s{i}-{j}" for i in range(last + 1) for j in range(8)]
    assert len(store.losses("content", "tokenizer", "p", names)) == len(names)
    assert store.count_losses() % 8 == 0
