from __future__ import annotations

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from sn29.errors import Rejected, Unavailable
from sn29.records import Commitment, Head, Identity, Loss, ModelFacts, ModelId, Outcome, RepoFile, RepoListing, Weights
from sn29.round_record import RoundRecord
from sn29.store import SCHEMA, ChainSeen, Sent, Standing, Store, StoredRepository, Unanswered, opened

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


VECTORS = Path(__file__).parent / "vectors"
OLDER = (2, 3, 4, 5)


def older(schema: int, path: Path) -> Path:
    """A store as the software of that time left it: the tables that it made, and some rows."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript("pragma journal_mode=wal;" + (VECTORS / f"store_schema{schema}.sql").read_text())
    return path


def tables(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Table -> its columns, as SQLite understands them."""
    with closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("select name from sqlite_master where type = 'table'")]
        return {name: db.execute(f"pragma table_xinfo({name})").fetchall() for name in names}


def rows(path: Path, *but: str) -> dict[str, list[tuple[object, ...]]]:
    """Table -> its rows, of all tables but some."""
    with closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("select name from sqlite_master where type = 'table'") if row[0] not in but]
        return {name: db.execute(f"select * from {name}").fetchall() for name in names}


@pytest.mark.parametrize("schema", OLDER)
def test_a_store_of_an_older_schema_is_copied_and_brought_up_to_date(tmp_path, schema):
    path, said = older(schema, tmp_path / "store.db"), []
    before = rows(path)
    with pytest.raises(Rejected, match=f"got schema {schema} in .* rule schema {SCHEMA}; start the validator once"):
        Store(path, read_only=True)
    assert rows(path) == before, "who only reads changes nothing"
    Store(path, say=lambda *words: said.append(words)).close()
    backup = tmp_path / f"store.db.schema{schema}.bak"
    assert said == [("store", f"schema {schema} is brought up to schema {SCHEMA}; as it was it is kept in {backup}")]
    assert rows(backup) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.db", backup.name], "one file, and no part of it is left"
    Store(tmp_path / "new.db").close()
    assert tables(path) == tables(tmp_path / "new.db"), "what is migrated is what is made"
    store = Store(path, say=lambda *words: said.append(words))
    assert len(said) == 1, "once"
    assert store.claims() == {"content": (20, "5Bob")}
    assert store.publications() == ((7561, Weights(7560, {"ann": 1.0})),)
    assert [r.block for r in store.open_rounds()] == [7920]
    assert store.chain() == "0xabc netuid 29"
    assert (store.tensor_digests(), store.imports(), store.rules_kept()) == ({}, {}, ())
    assert store.unanswered(since=0, before=10) == ()
    if schema > 2:
        assert store.losses("content", "tokenizer", "p", ["s1", "s2"]) == {
            "s1": Loss("s1", 1.5, 3, ""), "s2": Loss("s2", math.inf, 900, "too_long"),
        }  # fmt: skip
        assert [cell.imported for cell in store.each_loss()] == [0, 0]


def test_a_round_of_schema_2_is_read_and_decides_the_same(tmp_path):
    path = older(2, tmp_path / "store.db")
    text = (VECTORS / "round_record_schema2_first.json").read_text()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("insert into round values (7560, '{}', ?, '{\"ann\": 0.1, \"bob\": 0.9}')", (text,))
    for store in (Store(path), Store(path)):
        assert store.belong_to(Identity("0xabc", 474), 29) is None
        assert store.weights() == {0: Weights(7560, {"ann": 0.1, "bob": 0.9})}
        assert store.rounds()[0].record.weights == {0: Weights(7560, {"ann": 1.0})}
        assert store.first_decided() == 7560
        store.close()


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from sn29.store import Store

path, old, before = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
count = 0

def look(frame, event, what):
    global count
    if event == "c_call" and frame.f_code.co_filename.endswith(("store.py", "tempfile.py")):
        count += 1
        if count > before:
            os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(look)
Store(path)
"""


@pytest.mark.parametrize("schema", [2, 5])
def test_a_migration_that_is_killed_leaves_the_old_store_or_the_new_one(tmp_path, schema):
    """At every call of SQLite and of the system that it makes, one process each; what is there then is migrated by the next."""
    source = older(schema, tmp_path / "source.db")
    old = rows(source)
    Store(shutil.copy(source, tmp_path / "done.db")).close()
    new = rows(tmp_path / "done.db")
    seen: Counter[str] = Counter()
    for calls in count():
        folder = tmp_path / str(calls)
        folder.mkdir()
        path = Path(shutil.copy(source, folder / "store.db"))
        if (pid := os.fork()) == 0:
            sys.argv = ["", str(path), str(source), str(calls)]
            exec(KILLED, {"__name__": "killed"})
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = rows(path)
        assert found in (old, new), calls
        seen["old" if found == old else "new"] += 1
        backup = folder / f"store.db.schema{schema}.bak"
        if backup.exists():
            assert rows(backup) == old, calls
            seen["backed up"] += 1
        else:
            assert found == old, "nothing is changed that was not copied"
        Store(path).close()
        assert rows(path) == new, calls
        assert sorted(p.name for p in folder.iterdir()) == ["store.db", backup.name], "what the killed one left lies about"
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert seen["old"] > 20
    assert seen["backed up"] > 10
    assert seen["new"] > 0


@pytest.mark.parametrize(
    ("schema", "got", "rule"),
    [
        (str(SCHEMA + 1), f"schema {SCHEMA + 1} in ", f"schema 2 to {SCHEMA}, of this software; start the one that wrote it"),
        ("99", "schema 99 in ", f"schema 2 to {SCHEMA}, of this software; start the one that wrote it"),
        ("1", "schema 1 in ", f"schema 2 to {SCHEMA}"),
        ("six", "schema unknown in ", "a store of sn29"),
    ],
    ids=["next", "much newer", "too old", "no number"],
)
def test_a_file_of_a_newer_or_unknown_schema_is_refused_with_both_numbers(store, tmp_path, schema, got, rule):
    store.close()
    path = tmp_path / "state" / "store.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("update meta set value = ? where key = 'schema'", (schema,))
    before = path.read_bytes()
    with pytest.raises(Rejected) as refused:
        Store(path)
    assert refused.value.got == f"{got}{path}"
    assert refused.value.limit == rule
    with pytest.raises(Rejected) as refused:
        Store(path, read_only=True)
    assert refused.value.got == f"{got}{path}"
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.bak"))


def test_a_file_that_is_no_store_is_left_alone(tmp_path):
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    with closing(sqlite3.connect(other)) as db, db:
        db.execute("create table recipe(name text)")
    text.write_text("no database at all, but long enough to be read as one" * 100)
    for path, complaint in ((other, "a store of sn29"), (text, "file is not a database")):
        before = path.read_bytes()
        with pytest.raises(Rejected, match=complaint):
            Store(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True])
def test_what_sqlite_cannot_read_is_unavailable(tmp_path, read_only):
    path = tmp_path / "store.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("drop table round")
    with pytest.raises(Unavailable, match="no such table: round"), opened(path, read_only=read_only) as store:
        store.open_rounds()


def test_there_is_nothing_to_read_where_no_validator_has_run(tmp_path):
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
