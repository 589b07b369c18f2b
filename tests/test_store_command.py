"""`sn29 store check|compact|export` on a state folder of three rounds."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from itertools import count
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from recorded import losses, model, refused, round_record

from sn29 import cli, record_files
from sn29.records import Loss, Weights
from sn29.round_record import RoundRecord
from sn29.store import Imported, LossesOfAnother, Sent, Standing, Store, StoredLoss, compact, opened
from sn29.store_command import TABLES

BLOCKS = (7200, 7560, 7920)
COMMITTED = {"ann": 7000, "bob": 7100}


def rounds() -> list[RoundRecord]:
    """Two models on 40 texts, one text too long for bob; a third one refused."""
    found: list[RoundRecord] = []
    for number, block in enumerate(BLOCKS):
        table = losses(40, number, ann=(0.0, 0.01), bob=(0.01, 0.01))
        table["bob"] = (math.inf, *table["bob"][1:])
        before = found[-1] if found else None
        found.append(round_record(block, table, COMMITTED, before=before, others=[refused("cat", 7100)]))
    return found


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    store = Store(folder / "store.db")
    came = Imported("her/records/8280-ab.json", "ab" * 32, 8280, 1.5, 1, 1)
    open_cell = StoredLoss("content of ann", "tokenizer", "a profile", Loss("f" * 32, 8.25, 3, ""))
    store.begin(rounds()[0], [], {}, {}, LossesOfAnother(came, [open_cell], []))
    for record in rounds():
        block, kept = record.head.block, record.competitions["c00"]
        record_files.write(folder / "records", record)
        store.open_round(block, {"block": block})
        for m in (m for m in kept.models if m.losses):
            cells = [
                Loss(s.id, nats, 25 if math.isfinite(nats) else 900, "" if math.isfinite(nats) else "too_long")
                for s, nats in zip(kept.samples, m.losses, strict=True)
            ]
            store.keep_losses(m.outcome.content_id, m.tokenizer_id, "a profile", cells)
        store.finish_round(block, record, record.weights, [Standing("c00", m.outcome.model, m.hotkey, 0.5) for m in kept.models])
        store.keep_publication(block + 5, record.weights[0])
    store.keep_claims({"content of ann": (7000, "ann")})
    store.keep_first_seen({("ann", "digest"): 7000})
    store.keep_tensor_digest("content of ann", "tensors", 7200)
    store.open_round(8280, {"block": 8280})
    store.keep_sent(0, Sent(8000, Weights(7920, {"ann": 1.0})))
    store.close()
    return folder


def run(*words: str | Path) -> int:
    return cli.main(["store", *map(str, words)])


# --- check ------------------------------------------------------------------------------------------------------------


def checked(state: Path, capsys) -> dict[str, str]:
    """Check -> what was found; a fault has an exclamation mark in front."""
    status = run("check", "--state.dir", state, "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["whole"] == (status == 0)
    return {f["check"]: f"{'!' if f['is_fault'] else ''}{f['said']}" for f in said["findings"]}


def test_a_whole_store_is_whole(state, capsys):
    assert checked(state, capsys) == {
        "integrity": "every page is whole",
        "open rounds": "of block 8280",
        "records in the store": "3 finished rounds, each with its own record",
        "record files": f"3 in {state / 'records'}, each with the hash that it is named by",
        "losses in the records": "240 cells are as they were recorded",
        "losses": "241 cells, 1 of them imported; no record refers to 1"
        " (of a round that is open, or of models that were refused after they were measured)",
        "imported": "1 losses of the round of block 8280, 1 of them measured here as well, from her/records/8280-ab.json",
    }
    assert run("check", "--state.dir", state) == 0
    said = capsys.readouterr().out
    assert "every page is whole" in said
    assert "FAULT" not in said


def test_a_record_whose_hash_is_not_its_name_and_a_loss_that_was_changed_are_found(state, capsys):
    first, second, third = sorted((state / "records").iterdir())
    first.write_bytes(first.read_bytes().replace(b'"ann"', b'"eve"'))
    second.rename(second.with_name("7560-0123456789abcdef.json"))
    third.unlink()
    with closing(sqlite3.connect(state / "store.db")) as db, db:
        db.execute("update loss set nats = 1.5 where nats = (select max(nats) from loss where nats < 9e999)")
    found = checked(state, capsys)
    assert found["record files"].startswith(f"!2: {first}: the round record is not usable (got sha256 ")
    assert found["losses in the records"].startswith("!1: block 7")
    assert "1.5 nats in the store and " in found["losses in the records"]
    assert found["integrity"] == "every page is whole"
    assert run("check", "--state.dir", state) == 1
    assert capsys.readouterr().out.count("FAULT") == 2


def test_a_damaged_file_is_found_and_so_is_a_record_of_another_round(state, capsys):
    with closing(sqlite3.connect(state / "store.db")) as db, db:
        db.execute("update round set record = (select record from round where block = 7200) where block = 7560")
    found = checked(state, capsys)
    assert found["records in the store"] == "!1: the round of block 7560 has the record of block 7200"
    data = bytearray((state / "store.db").read_bytes())
    data[8 * 4096 : 12 * 4096] = b"\x5a" * (4 * 4096)
    (state / "store.db").write_bytes(data)
    assert list(checked(state, capsys)) == ["integrity"], "nothing else can be believed"


def test_there_must_be_a_store(tmp_path, capsys):
    for words in (["check"], ["compact"], ["export", "--out", tmp_path / "out"]):
        assert run(*words, "--state.dir", tmp_path / "nowhere") == 1
        assert "no store at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- compact ----------------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("select name from sqlite_master where type = 'table'")]
        return {name: sorted(db.execute(f"select * from {name}").fetchall(), key=repr) for name in names}


def test_a_compacted_store_is_smaller_and_says_the_same(state, capsys):
    store = Store(state / "store.db")
    store.keep_losses("gone", "tokenizer", "p", [Loss(f"s{i}", 1.0, 1, "") for i in range(20_000)])
    store.forget_losses("gone", "tokenizer", "p")
    store.close()
    before, size = contents(state / "store.db"), (state / "store.db").stat().st_size
    (state / "store.db").chmod(0o660)
    assert run("compact", "--state.dir", state, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"bytes_before": size, "bytes_after": (state / "store.db").stat().st_size, "rounds": 0, "losses": 0}
    assert said["bytes_after"] < size / 2
    assert contents(state / "store.db") == before
    assert stat.S_IMODE((state / "store.db").stat().st_mode) == 0o660
    assert sorted(p.name for p in state.iterdir()) == ["lock", "records", "store.db"]


def test_old_rounds_are_forgotten_and_nothing_that_a_later_one_asks_for(state, capsys):
    path = state / "store.db"
    before, kept = contents(path), Store(path, read_only=True)
    asked = {"before": 8280}
    last = kept.last_record(**asked), kept.weights(**asked), kept.last_standing("c00", before=8280), kept.last_evaluated("c00")
    assert kept.first_decided() == 7200
    kept.close()
    assert run("compact", "--state.dir", state, "--keep-rounds", "2") == 0
    assert "forgotten: 1 rounds and 80 losses" in capsys.readouterr().out
    after, store = contents(path), Store(path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"round", "loss", "meta"}
    assert set(after["meta"]) - set(before["meta"]) == {("first_decided", "7200")}
    assert store.first_decided() == 7200, "the alarm of one that never set weights counts from there"
    assert [r.block for r in store.rounds()] == [7560, 7920, 8280]
    assert store.losses("content of ann", "tokenizer", "a profile", ["f" * 32]), "of the round that is open"
    now = store.last_record(**asked), store.weights(**asked), store.last_standing("c00", before=8280), store.last_evaluated("c00")
    assert now == last
    store.close()
    assert len(list((state / "records").iterdir())) == 3
    assert checked(state, capsys)["losses in the records"] == "160 cells are as they were recorded"
    assert run("compact", "--state.dir", state, "--keep-rounds", "1") == 2
    assert "0, or at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["a validator", "a `sn29 store compact`"], ids=["validator", "compact"])
def test_a_store_that_another_process_works_on_is_not_touched(state, capsys, who):
    """The lock that it holds, held by a process of its own."""
    code = "import sys, time; from pathlib import Path; from neurons.validator import alone; lock = alone(Path(sys.argv[1])"
    given = "" if who == "a validator" else f", {who!r}"
    command = [sys.executable, "-c", f"{code}{given}); print('held', flush=True); time.sleep(60)", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = (state / "store.db").read_bytes()
        try:
            assert run("compact", "--state.dir", state) == 1
        finally:
            other.kill()
    said = capsys.readouterr().err
    assert f"got {who} that works in {state} (process {other.pid}), rule " in said
    assert f"this is process {os.getpid()}" in said
    assert (state / "store.db").read_bytes() == before
    assert run("compact", "--state.dir", state) == 0, "the lock ended with its process"


def test_a_store_that_is_being_read_is_not_replaced(state, capsys):
    reader, writer = Store(state / "store.db", read_only=True), Store(state / "store.db")
    with reader.snapshot():
        assert reader.count_losses() == 241
        writer.keep_claims({"x": (1, "5Ann")})
        assert run("compact", "--state.dir", state) == 1
    assert "which another process reads now" in capsys.readouterr().err
    assert len(reader.claims()) == 2
    reader.close()
    writer.close()
    assert run("compact", "--state.dir", state) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("keep_rounds", ["0", "2"])
def test_a_compacting_by_root_leaves_the_store_to_its_owner(state, keep_rounds):
    for path in (state, state / "store.db"):
        os.chown(path, 10001, 10002)
    assert run("compact", "--state.dir", state, "--keep-rounds", keep_rounds) == 0
    owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in state.iterdir() if path.is_file()}
    assert owners == {"lock": (10001, 10002), "store.db": (10001, 10002)}


def test_what_is_forgotten_takes_no_room_while_the_rest_is_copied(state):
    """No file of the process may become larger than a third of the store."""
    path = state / "store.db"
    with opened(path) as store:
        gone = [sample.id for sample in rounds()[0].competitions["c00"].samples]
        for number in range(500):
            store.keep_losses(f"content {number}", "tokenizer", "p", [Loss(sample, 1.0, 1, "") for sample in gone])
    before = path.stat().st_size
    if (pid := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before // 3, before // 3))
            compact(path, 2)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.stat().st_size < before / 3


def test_a_compacting_that_is_killed_leaves_the_old_file_or_the_new_one(state):
    """At every call of SQLite and of the system that it makes."""
    path = state / "store.db"
    Store(path).close()
    old, original = contents(path), path.read_bytes()
    compact(path, 2)
    new = contents(path)
    seen = set()
    for calls in count():
        path.write_bytes(original)
        if (pid := os.fork()) == 0:
            done = 0

            def look(frame, event, what, limit=calls):
                nonlocal done
                if event == "c_call" and what.__name__ in ("execute", "executemany", "fsync", "replace", "close"):
                    done += 1
                    if done > limit:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(look)
            compact(path, 2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = contents(path)
        assert found in (old, new), calls
        seen.add(found == new)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if calls % 10 == 0:
            compact(path, 2)
            assert contents(path) == new, "what the killed one left is no obstacle"
        for left in state.glob("store.db-*"):
            left.unlink()
    assert seen == {False, True}
    assert not list(state.glob(".*.part"))


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export_has_every_row_of_the_moment_while_a_validator_writes(state, tmp_path, capsys):
    writer = Store(state / "store.db")
    with writer._transaction() as db:  # in the middle of its own step
        db.execute("delete from loss")
        assert run("export", "--state.dir", state, "--out", tmp_path / "p") == 0
        assert run("export", "--state.dir", state, "--out", tmp_path / "c", "--format", "csv", "--json") == 0
    writer.close()
    out = capsys.readouterr().out
    rows = json.loads(out[out.index("{\n") :])["rows"]
    assert rows == {"losses": 241, "outcomes": 9, "scores": 6, "weights": 3, "publications": 3}
    for name, columns in TABLES.items():
        table = pq.read_table(tmp_path / "p" / f"{name}.parquet")
        assert table.column_names == list(columns)
        kinds = {"int64": int, "double": float, "string": str}
        assert [kinds[str(field.type)] for field in table.schema] == [kind for kind, _ in columns.values()]
        with (tmp_path / "c" / f"{name}.csv").open(newline="") as file:
            written = list(csv.DictReader(file))
        assert [{k: kind(row[k]) for k, (kind, _) in columns.items()} for row in written] == table.to_pylist()
        assert len(written) == rows[name]
    losses = pq.read_table(tmp_path / "p" / "losses.parquet").to_pylist()
    assert sum(math.isinf(row["nats"]) for row in losses) == 3
    assert [row["imported"] for row in losses if row["sample"] == "f" * 32] == [1]
    outcomes = pq.read_table(tmp_path / "p" / "outcomes.parquet").to_pylist()
    assert {(row["hotkey"], row["status"], row["reason"]) for row in outcomes} == {
        ("ann", "evaluated", ""), ("bob", "evaluated", ""), ("cat", "rejected", "parameters"),
    }  # fmt: skip
    weights = pq.read_table(tmp_path / "p" / "weights.parquet").to_pylist()
    record = rounds()[0]
    assert {row["hotkey"]: row["weight"] for row in weights if row["round"] == 7200} == dict(record.weights[0].by_hotkey)
    said = (tmp_path / "p" / "columns.md").read_text()
    assert all(f"| `{column}` |" in said for columns in TABLES.values() for column in columns)


def test_no_text_of_a_miner_is_a_formula_in_a_spreadsheet(state, tmp_path):
    texts = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "plain=text"]
    with opened(state / "store.db") as store:
        store.keep_losses("content", "tokenizer", "p", [Loss(f"s{i}", -1.5, 1, text) for i, text in enumerate(texts)])
    assert run("export", "--state.dir", state, "--out", tmp_path, "--format", "csv") == 0
    with (tmp_path / "losses.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["content_id"] == "content"]
    assert [row["reason"] for row in rows] == [*(f"'{text}" for text in texts[:-1]), texts[-1]]
    assert {row["nats"] for row in rows} == {"-1.5"}, "a number is no text"


def test_an_export_replaces_one_of_before_and_leaves_nothing_half_written(state, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("export", "--state.dir", state, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with closing(sqlite3.connect(state / "store.db")) as db, db:
        db.execute("update round set record = '{}' where block = 7920")
    assert run("export", "--state.dir", state, "--out", out) == 1
    assert "record of block 7920" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    assert run("export", "--state.dir", state, "--out", tmp_path / "file") == 1
    assert f"--out: the setting is not usable (got {tmp_path / 'file'}: File exists" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare (util-linux) is not on this machine")
def test_a_backup_on_a_read_only_disk_is_checked_and_exported(state, tmp_path):
    """A mount of its own, which the process takes with it."""
    command = f"mount --bind {state} {state} && mount -o remount,ro,bind {state} {state} && ! touch {state}/x 2>/dev/null"
    if subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    ours = f"{sys.executable} -m sn29.cli store"
    check, export = f"{ours} check --state.dir {state}", f"{ours} export --state.dir {state} --out {tmp_path / 'out'}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f"{command} && {check} && {export}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "losses.parquet").exists()


def test_the_models_of_these_tests_are_what_a_validator_keeps():
    assert model("ann", 7000, (1.0,)).outcome.content_id == "content of ann"
