from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sn29.errors import Reason, Rejected
from sn29.records import Commitment, Head, Identity, Loss, ModelFacts, ModelId, Outcome, RepoFile, RepoListing, Weights
from sn29.round_record import RoundRecord
from sn29.store import ChainSeen, Sent, Standing, Store, StoredRepository, Unanswered

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


FACTS = ModelFacts("content", "weights", "LlamaForCausalLM", 100, 400, 300, 32, 2, 1, True)


def test_what_was_seen_of_a_revision_is_known_again_to_the_software_that_read_it(store, tmp_path):
    model = COMMITMENT.model
    listing = RepoListing(model, (RepoFile("config.json", 3, "git:" + "1" * 40), RepoFile("é.json", 0, "git:" + "2" * 40)))
    assert store.repository(model, read_by="sn29 1") is None
    store.keep_repository(listing, None, read_by="sn29 1")
    assert store.repository(model, read_by="sn29 1") == StoredRepository(listing, None)
    store.keep_repository(listing, FACTS, read_by="sn29 1")
    store = reopened(store, tmp_path)
    assert store.repository(model, read_by="sn29 1") == StoredRepository(listing, FACTS)
    assert store.repository(model, read_by="sn29 2") == StoredRepository(listing, None)
    assert store.repository(replace(model, revision="b" * 40), read_by="sn29 1") is None


def test_a_content_has_its_digest_and_its_fingerprint_whichever_comes_first(store, tmp_path):
    store.keep_fingerprint("one", "print")
    store.keep_tensor_digest("one", "digest", 2000)
    store.keep_tensor_digest("two", "other", 1000)
    store.keep_fingerprint("two", "another")
    store.keep_fingerprint("three", "alone")
    store.keep_tensor_digest("two", "newer", 2000)
    store = reopened(store, tmp_path)
    assert [store.fingerprint(name) for name in ("one", "two", "three", "four")] == ["print", "another", "alone", None]
    assert [store.tensor_digest(name) for name in ("one", "two", "three")] == ["digest", "newer", None]
    assert store.tensor_digests() == {"one": "digest", "two": "newer"}
    assert store.tensor_digests(before=2000) == {"two": "newer"}


def test_failures_are_counted_across_restarts(store, tmp_path):
    assert store.count_failure(COMMITMENT) == 1
    assert reopened(store, tmp_path).count_failure(COMMITMENT) == 2


def test_rounds_in_which_a_model_did_not_answer_are_known_for_a_while(store, tmp_path):
    one, other = str(COMMITMENT.model), "bob/model@1"
    store.keep_unanswered([Unanswered("5Alice", one, 360), Unanswered("5Bob", other, 360, placed=True)], forget_before=0)
    store.keep_unanswered([Unanswered("5Alice", one, 360, placed=True, over=True)], forget_before=0)
    store.keep_unanswered([Unanswered("5Alice", one, 360), Unanswered("5Alice", one, 720)], forget_before=0)
    store = reopened(store, tmp_path)
    first, second = Unanswered("5Alice", one, 360, True, True), Unanswered("5Alice", one, 720)
    assert store.unanswered(since=0, before=721) == (first, Unanswered("5Bob", other, 360, True), second)
    assert store.unanswered(since=0, before=720, model=COMMITMENT.model) == (first,)
    assert store.unanswered(since=361, before=800) == (second,)
    store.keep_unanswered([], forget_before=361)
    assert store.unanswered(since=0, before=800) == (second,)


def test_a_round_is_open_until_its_record_is_kept(store, tmp_path):
    store.open_round(360, {"block": 360, "windows": {}})
    store.open_round(360, {"block": 360, "windows": {"changed": 1}})
    assert [(r.block, r.plan["windows"]) for r in store.open_rounds()] == [(360, {})]
    assert store.weights() == {}
    assert store.last_finished() is None
    weights = Weights(360, {"5Alice": 1.0})
    record = RoundRecord(Head(360, "0x" + "0" * 64), {}, (), {}, ("5Alice",), {}, {0: weights}, {}, {})
    store.finish_round(360, record, {0: weights}, [Standing("c00", "alice/model@1", "5Alice", 1.0)])
    store.open_round(720, {"block": 720, "windows": {}})
    store = reopened(store, tmp_path)
    assert [r.block for r in store.open_rounds()] == [720]
    assert store.last_finished() == 360
    assert store.weights() == {0: Weights(360, {"5Alice": 1.0})}
    assert store.weights(before=360) == {}
    assert store.rounds()[0].record == record == store.last_record(before=720)
    assert store.last_record(before=360) is None
    assert store.last_evaluated("c00") == {"alice/model@1": 360}
    assert store.last_standing("c00", before=720) == {"5Alice": 1.0}
    assert store.last_standing("c00", before=360) == {}
    store.keep_publication(400, Weights(360, {"5Alice": 1.0}))
    assert store.publications() == ((400, Weights(360, {"5Alice": 1.0})),)


def test_a_store_belongs_to_one_chain(store, tmp_path):
    assert store.belong_to(Identity("0xabc", 461), 29) is None
    assert store.belong_to(Identity("0xabc", 461), 29) is None
    for chain, netuid in ((Identity("0xdef", 461), 29), (Identity("0xabc", 461), 30)):
        store = reopened(store, tmp_path)
        with pytest.raises(Rejected) as refused:
            store.belong_to(chain, netuid)
        assert "0xabc netuid 29" in refused.value.got
        assert f"{chain.genesis} netuid {netuid}" in refused.value.limit
        assert "--state.dir" in refused.value.limit


def test_a_new_runtime_is_told_once_and_no_reason_to_stop(store, tmp_path):
    store.belong_to(Identity("0xabc", 461), 29)
    store = reopened(store, tmp_path)
    assert store.belong_to(Identity("0xabc", 474), 29) == 461
    assert store.belong_to(Identity("0xabc", 474), 29) is None
    with pytest.raises(Rejected):
        store.belong_to(Identity("0xdef", 500), 29)
    assert store.belong_to(Identity("0xabc", 474), 29) is None, "what was refused left nothing behind"


def test_whose_chain_it_is_can_be_asked_without_writing(store, tmp_path):
    assert store.chain() is None
    store.check_chain(Identity("0xabc", 461), 29)
    assert store.chain() is None, "nothing was written"
    store.belong_to(Identity("0xabc", 461), 29)
    store.close()
    store = Store(tmp_path / "state" / "store.db", read_only=True)
    assert store.chain() == "0xabc netuid 29"
    store.check_chain(Identity("0xabc", 999), 29)
    with pytest.raises(Rejected, match="0xdef netuid 29"):
        store.check_chain(Identity("0xdef", 461), 29)


def test_when_the_chain_was_last_seen_survives_a_restart(store, tmp_path):
    assert store.chain_seen() is None
    store.keep_chain_seen(ChainSeen(7, 1.5, 12.0, 360, 0))
    store.keep_chain_seen(ChainSeen(32, 301.5, 12.0, 360, 1))
    assert reopened(store, tmp_path).chain_seen() == ChainSeen(32, 301.5, 12.0, 360, 1)


def test_the_first_block_of_a_digest_stays_whatever_comes_first(store, tmp_path):
    store.keep_first_seen({("5Bob", "one"): 20, ("5Bob", "two"): 30})
    store.keep_first_seen({("5Bob", "one"): 25, ("5Carol", "one"): 21, ("5Bob", "two"): 7})
    store = reopened(store, tmp_path)
    kept = {("5Bob", "one"): 20, ("5Bob", "two"): 7, ("5Carol", "one"): 21}
    assert store.first_seen([*kept, ("5Carol", "two"), ("5'\"Dan", "ü")]) == kept
    assert store.first_seen([("5Bob", "two")]) == {("5Bob", "two"): 7}
    assert store.first_seen([]) == {}


def test_what_is_sent_is_kept_until_it_stands(store, tmp_path):
    one, two = Weights(360, {"5Alice": 1.0}), Weights(720, {"5Alice": 0.5, "5Bob": 0.5})
    store.keep_sent(0, Sent(370, one))
    store.keep_sent(1, Sent(370, two))
    store = reopened(store, tmp_path)
    assert store.sent() == (Sent(370, one),)
    store.keep_sent(0, Sent(370, one, 372, 1080, ("ab", "cd")))
    assert store.sent()[0].digests == ("ab", "cd")
    store.keep_sent(0, Sent(730, two, 733, 1440))
    store.keep_sent(0, Sent(1100, two))
    assert [sent.block for sent in store.sent()] == [372, 733, None]
    store.keep_publication(733, two, 0, store.sent()[1])
    assert [sent.since for sent in store.sent()] == [1100], "what stands has overtaken what was sent before it"
    store.keep_sent(0, Sent(1110, one), instead_of=store.sent()[0])
    assert [sent.since for sent in store.sent()] == [1110]
    store.forget_sent(0, store.sent()[0])
    assert store.sent() == ()
    assert store.sent(1) == (Sent(370, two),)
    assert (store.publications(), store.publications(1)) == (((733, two),), ())


SCHEMA_2 = """
create table meta(key text primary key, value text not null) strict;
create table claim(key text primary key, block integer not null, hotkey text not null) strict;
create table verdict(
  hotkey text, block integer, data blob, rules text, outcome text not null,
  primary key (hotkey, block, data, rules)) strict;
create table failure(hotkey text, block integer, data blob, count integer not null,
  primary key (hotkey, block, data)) strict;
create table loss(
  content_id text, tokenizer_id text, profile text, sample text,
  nats real not null, tokens integer not null, reason text not null,
  primary key (content_id, tokenizer_id, profile, sample)) strict, without rowid;
create table round(block integer primary key, plan text not null, record text, weights text) strict;
create table standing(round integer, competition text, model text, hotkey text not null, weight real not null,
  primary key (round, competition, model)) strict;
create table publication(block integer primary key, round integer not null, weights text not null) strict;
insert into meta values ('schema', '2'), ('chain', '0xabc netuid 29');
insert into claim values ('content', 20, '5Bob');
insert into publication values (7561, 7560, '{"ann": 1.0}');
insert into round values (7920, '{"block": 7920}', null, null);
"""


def test_a_store_of_schema_2_is_brought_up_to_date(tmp_path):
    """A round's record of then is read too, and decides the same."""
    path = tmp_path / "store.db"
    text = (Path(__file__).parent / "vectors" / "round_record_schema2_first.json").read_text()
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA_2)
        db.execute("insert into round values (7560, '{}', ?, '{\"ann\": 0.1, \"bob\": 0.9}')", (text,))
    db.close()
    with pytest.raises(Rejected, match="start the validator once"):
        Store(path, read_only=True)
    for store in (Store(path), Store(path)):
        assert store.belong_to(Identity("0xabc", 474), 29) is None
        assert store.claims() == {"content": (20, "5Bob")}
        assert store.publications() == ((7561, Weights(7560, {"ann": 1.0})),)
        assert store.weights() == {0: Weights(7560, {"ann": 0.1, "bob": 0.9})}
        assert [r.block for r in store.open_rounds()] == [7920]
        assert store.rounds()[0].record.weights == {0: Weights(7560, {"ann": 1.0})}
        assert store.first_decided() == 7560
        assert store.tensor_digests() == {}
        store.close()


def test_a_store_of_schema_3_is_brought_up_to_date(store, tmp_path):
    """It lacks three tables; all else is as it was."""
    store.keep_losses("content", "tokenizer", "p", [Loss("s1", 1.5, 3, "")])
    store.close()
    path = tmp_path / "state" / "store.db"
    with sqlite3.connect(path) as db:
        db.executescript("drop table repository; drop table content; drop table unanswered")
        db.execute("update meta set value = '3' where key = 'schema'")
    db.close()
    with pytest.raises(Rejected, match="start the validator once"):
        Store(path, read_only=True)
    for store in (Store(path), Store(path, read_only=True)):
        assert store.count_losses() == 1
        assert store.tensor_digests() == {}
        assert store.unanswered(since=0, before=10) == ()
        store.close()


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
