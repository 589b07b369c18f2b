from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import recorded

from sn29 import record_files
from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Outcome, Weights
from sn29.round_record import MAX_BYTES, RoundRecord, address, canonical, decode, encode

INF = math.inf
VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture(scope="module")
def record() -> RoundRecord:
    table = recorded.losses(40, 7, ann=(0.0, 0.01), bob=(-0.01, 0.01))
    table["cid"] = (INF, *table["ann"][1:])
    return recorded.round_record(
        7560, table, {"ann": 7000, "bob": 7100, "cid": 7200},
        others=[recorded.refused("dan", 7300)],
        no_competition=[Outcome("eve", "", 7301, "rejected", reason="malformed_commitment", detail="?", got="x", limit="y")],
    )  # fmt: skip


def changed(text: bytes, change: object) -> bytes:
    data = json.loads(text)
    change(data)  # type: ignore[operator]
    return canonical(data)


def without_stops(data: dict) -> None:
    """What schema 4 has of a model."""
    for kept in data["competitions"].values():
        for model in kept["models"]:
            del model["stopped"]


def without_digests(data: dict) -> None:
    """What schema 3 has of a model."""
    without_stops(data)
    for kept in data["competitions"].values():
        for model in kept["models"]:
            del model["tensor_digest"], model["resembles"]


def test_a_record_comes_back_as_it_was_to_the_bit(record: RoundRecord) -> None:
    text = encode(record)
    again = decode(text)
    assert again == record
    assert encode(again) == text
    cid = again.competitions["c00"].model("cid")
    assert cid is not None
    assert cid.losses[0] == INF
    assert cid.unscored == ("too_long",)
    assert json.loads(text)["competitions"]["c00"]["models"][2]["losses"][0] is None
    assert address(record) == hashlib.sha256(text).hexdigest()


def test_the_text_is_canonical(record: RoundRecord) -> None:
    text = encode(record)
    assert text.isascii()
    assert b", " not in text.replace(b"(got 9, rule", b"")
    assert text.startswith(b'{"competitions":{"c00":{"datasets":')
    assert b"NaN" not in text
    shuffled = replace(record, versions=dict(reversed(record.versions.items())))
    assert encode(shuffled) == text
    assert encode(replace(record, versions={**record.versions, "torch": "2.13.1"})) != text


def test_strange_floats_and_texts_survive(record: RoundRecord) -> None:
    strange = (0.1 + 0.2, 5e-324, 1.7976931348623157e308, 0.0, 1 / 3, *([2.0] * 35))
    kept = record.competitions["c00"]
    ann = replace(kept.models[0], losses=strange, outcome=replace(kept.models[0].outcome, detail="\ud800 \x00 é"))
    other = replace(record, competitions={"c00": replace(kept, models=(ann, *kept.models[1:]))})
    again = decode(encode(other)).competitions["c00"].models[0]
    assert [x.hex() for x in again.losses] == [x.hex() for x in strange]
    assert again.outcome.detail == ann.outcome.detail


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(schema=1), "schema 1"),
        (lambda d: d.update(schema=True), "schema True"),
        (lambda d: d.pop("schema"), "schema None"),
        (lambda d: d.pop("machine"), "record.machine"),
        (lambda d: d.update(extra=1), "the field extra"),
        (lambda d: d["head"].update(block="7560"), "record.head.block"),
        (lambda d: d["head"].update(block=True), "a whole number"),
        (lambda d: d["competitions"]["c00"]["models"][0].update(num_tokens=10**30), "a whole number below 9,007,199,254,740,992"),
        (lambda d: d["competitions"]["c00"]["models"][0].update(num_tokens=-1), "got -1 tokens, rule 0 or more"),
        (lambda d: d["weights"]["0"]["by_hotkey"].update(ann=1), "record.weights.0.by_hotkey.ann"),
        (lambda d: d["weights"].update({"00": d["weights"]["0"]}), "the key '00'"),
        (lambda d: d.update(schema=2), "the field tensor_digest"),
        (lambda d: d.update(schema=3), "the field tensor_digest"),
        (lambda d: d.update(schema=4), "the field stopped"),
        (lambda d: (d.update(schema=2), without_digests(d)), "record.last_weights.0"),
        (lambda d: without_digests(d), "tensor_digest"),
        (lambda d: without_stops(d), "stopped"),
        (lambda d: d["competitions"]["c00"]["models"][0]["losses"].pop(), "39 losses"),
        (lambda d: d["competitions"]["c00"]["models"][0].update(stopped="why"), "40 losses of who was stopped"),
        (lambda d: d["competitions"]["c00"]["models"][0].update(stopped="why", losses=[]), "0 losses of who was stopped"),
        (lambda d: d["competitions"]["c00"]["models"][3].update(stopped="why"), "status rejected"),
        (lambda d: d["competitions"]["c00"]["models"][0]["losses"].append(1.0), "41 losses"),
        (lambda d: d["competitions"]["c00"]["models"][0]["losses"].__setitem__(3, -1.0), "negative"),
        (lambda d: d["competitions"]["c00"]["models"][0]["losses"].__setitem__(3, "5"), "losses[3]"),
        (lambda d: d["competitions"]["c00"]["models"][0]["losses"].__setitem__(3, None), "0 reasons"),
        (lambda d: d["competitions"]["c00"]["models"].append(d["competitions"]["c00"]["models"][0]), "every hotkey once"),
        (lambda d: d["competitions"]["c00"]["scores"][0].update(weight=None), "weight"),
    ],
)
def test_what_is_not_a_record_is_refused_by_field(record: RoundRecord, change: object, named: str) -> None:
    with pytest.raises(Rejected) as error:
        decode(changed(encode(record), change))
    assert error.value.reason is Reason.RECORD
    assert named in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"{", b'{"schema":3,"schema":3}', b'{"schema":NaN}', b'{"schema":Infinity}', b'{"schema":1e999}',
        b"\xff\xfe", b"[" * 100_000, b'{"a":' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
def test_whatever_else_a_file_holds_is_one_refusal(text: bytes) -> None:
    with pytest.raises(Rejected) as error:
        decode(text)
    assert error.value.reason is Reason.RECORD


def test_a_record_with_any_byte_changed_is_read_as_another_or_refused(record: RoundRecord) -> None:
    """Whatever a byte becomes, nothing but Rejected comes out, and what is read is never the record itself."""
    text = encode(record)
    read = 0
    for at in range(0, len(text), 29):
        for byte in (text[at] ^ 1, ord('"'), ord("9"), 0, 255):
            other = text[:at] + bytes([byte]) + text[at + 1 :]
            if other == text:
                continue
            try:
                found = decode(other)
            except Rejected:
                continue
            read += 1
            assert found != record
            assert encode(found) == other
    assert read > 50, "a digit of a loss is still a record"


def test_another_spelling_is_another_text_and_refused(record: RoundRecord) -> None:
    text = encode(record)
    for other in (
        text + b"\n",
        json.dumps(json.loads(text), sort_keys=True).encode(),
        text.replace(b'"block":7560', b'"block":07560'),
    ):
        with pytest.raises(Rejected):
            decode(other)


def test_what_contradicts_itself_cannot_be_made(record: RoundRecord) -> None:
    kept = record.competitions["c00"]
    nan = replace(kept.models[0], losses=(math.nan,) * 40)
    with pytest.raises(Rejected, match="NaN"):
        replace(kept, models=(nan,))
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(replace(record, competitions={"c00": replace(kept, memory_after={"a": math.nan})}))


def test_who_was_stopped_has_losses_of_the_leading_samples(record: RoundRecord) -> None:
    table = dict(record.competitions["c00"].losses)
    table["bob"] = table["bob"][:16]
    stopped = recorded.round_record(
        7560, table, {"ann": 7000, "bob": 7100, "cid": 7200}, rule="champion", stopped={"bob": "stopped after 16 of 40 samples"}
    )
    again = decode(encode(stopped))
    assert again == stopped
    bob = again.competitions["c00"].model("bob")
    assert bob is not None
    assert (len(bob.losses), bob.stopped, len(again.competitions["c00"].samples)) == (16, "stopped after 16 of 40 samples", 40)


def test_a_record_of_schema_4_is_read_as_one_in_which_nobody_was_stopped(record: RoundRecord) -> None:
    text = changed(encode(record), lambda d: (d.update(schema=4), without_stops(d)))
    assert decode(text) == record
    assert json.loads(encode(decode(text)))["schema"] == 5
    with pytest.raises(Rejected, match="another spelling"):
        decode(text.replace(b'"schema":4', b'"schema": 4'))


def test_a_record_of_schema_3_is_read_without_digests(record: RoundRecord) -> None:
    text = changed(encode(record), lambda d: (d.update(schema=3), without_digests(d)))
    assert decode(text) == record
    with pytest.raises(Rejected, match="another spelling"):
        decode(text.replace(b'"schema":3', b'"schema": 3'))


def test_a_record_of_schema_2_is_read_with_its_weights_for_mechanism_0() -> None:
    """Two rounds that follow on each other, as schema 2 had them written."""
    texts = [(VECTORS / f"round_record_schema2_{name}.json").read_bytes() for name in ("first", "second")]
    first, second = (decode(text) for text in texts)
    assert json.loads(texts[1])["schema"] == 2
    assert (first.last_weights, second.last_weights) == ({}, first.weights)
    assert first.weights == {0: Weights(7560, {"ann": 1.0})}
    assert all(decode(encode(record)) == record for record in (first, second))
    assert all(json.loads(encode(record))["schema"] == 5 for record in (first, second))
    for text in texts:
        data = json.loads(text)
        for other in (data | {"schema": 3}, data | {"weights": {"0": data["weights"]}}, data | {"weights": None}):
            with pytest.raises(Rejected):
                decode(canonical(other))
        with pytest.raises(Rejected):
            decode(text.replace(b'"schema":2', b'"schema": 2'))


def test_files(record: RoundRecord, tmp_path: Path) -> None:
    path = record_files.write(tmp_path / "records", record)
    assert path.name == f"7560-{address(record)[:16]}.json"
    assert record_files.read(path) == record
    assert record_files.write(tmp_path / "records", record) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    other = path.rename(path.with_name("anything.json"))
    assert record_files.read(other) == record
    flipped = bytearray(other.read_bytes())
    at = flipped.index(b"ann")
    flipped[at] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(Rejected, match="sha256"):
        record_files.read(path)
    wrong_block = other.rename(path.with_name(path.name.replace("7560-", "7561-")))
    with pytest.raises(Rejected, match="block 7560"):
        record_files.read(wrong_block)


def test_files_that_cannot_be_read_or_written_are_unavailable(record: RoundRecord, tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        record_files.read(tmp_path / "nowhere.json")
    with pytest.raises(Unavailable):
        record_files.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        record_files.write(tmp_path / "file", record)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        os.truncate(file.fileno(), MAX_BYTES + 10)
    with pytest.raises(Rejected, match="at most"):
        record_files.read(large)


def test_folders_are_read_by_block(record: RoundRecord, tmp_path: Path) -> None:
    for block in (10_080, 7_560, 720):
        record_files.write(tmp_path, replace(record, head=recorded.head(block)))
    (tmp_path / "notes.txt").write_text("no record")
    assert [r.head.block for r in record_files.read_all([tmp_path])] == [720, 7_560, 10_080]
    files = sorted(tmp_path.glob("*.json"))
    assert [r.head.block for r in record_files.read_all(files)] == [720, 7_560, 10_080], "as a shell lists them: 10080 first"
    with pytest.raises(Rejected):
        record_files.paths([])


def test_only_later_records_are_read_and_a_half_one_may_be_passed_over(record: RoundRecord, tmp_path: Path) -> None:
    assert record_files.newest(tmp_path / "nowhere") is None
    assert record_files.newest(tmp_path) is None
    assert list(record_files.since(tmp_path / "nowhere", -1)) == []
    paths = [record_files.write(tmp_path, replace(record, head=recorded.head(block))) for block in (720, 7_560, 10_080)]
    assert [r.head.block for r in record_files.since(tmp_path, -1)] == [720, 7_560, 10_080]
    assert [r.head.block for r in record_files.since(tmp_path, 720)] == [7_560, 10_080]
    assert [r.head.block for r in record_files.since(paths[0], 719)] == [720]
    assert list(record_files.since(paths[0], 720)) == []
    newest = record_files.newest(tmp_path)
    assert newest is not None
    assert newest.head.block == 10_080
    paths[2].write_bytes(paths[2].read_bytes()[:1000])
    with pytest.raises(Rejected, match="as its name says"):
        record_files.newest(tmp_path)
    told: list[str] = []
    newest = record_files.newest(tmp_path, lambda error: told.append(str(error)))
    assert newest is not None
    assert newest.head.block == 7_560
    assert [r.head.block for r in record_files.since(tmp_path, 720, lambda error: told.append(str(error)))] == [7_560]
    assert len(told) == 2
    assert all(paths[2].name in text for text in told)


def test_the_stated_size(capsys: pytest.CaptureFixture[str]) -> None:
    """What `round_record` says about 10 models x 1,500 samples."""
    models = {f"5{chr(97 + i) * 47}": (0.001 * i, 0.02) for i in range(10)}
    record = recorded.round_record(7560, recorded.losses(1500, 3, **models), {h: 7000 + i for i, h in enumerate(models)})
    text = encode(record)
    rows = [list(row) for row in record.competitions["c00"].losses.values()]
    inline, as_npy = len(canonical(rows)), 10 * 1500 * 8 + 128
    started = time.perf_counter()
    decode(text)
    print(f"{len(text):,} bytes; losses {inline:,} as text, {as_npy:,} as .npy; read in {time.perf_counter() - started:.3f} s")
    print(capsys.readouterr().out, file=sys.stderr)
    assert 270_000 < inline < 280_000
    assert 375_000 < len(text) < 390_000
