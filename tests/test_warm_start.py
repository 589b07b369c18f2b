"""A second validator takes over the first one's losses, after a sample of them; and one that lies."""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_node import LoopbackNode
from test_ending import run, submitted, until
from test_round import NETUID, WINDOW, Subnet, go, subnet

from neurons.adapters import Tokenizers, dataset_of
from neurons.validator import _until_it_answers
from sn29 import record_files
from sn29.chain import Chain
from sn29.changeover import due, note, software
from sn29.errors import Reason, Rejected, Unavailable
from sn29.examination import Machine, Ports
from sn29.hub import Hub
from sn29.localnet import text
from sn29.localnet.hub_faults import Fault
from sn29.localnet.ledger import Ledger
from sn29.localnet.network import Localnet, prepare
from sn29.models.fetch import fetch
from sn29.publication import Publisher
from sn29.records import ModelId
from sn29.round_record import RoundRecord, address, canonical
from sn29.settings import default_cache
from sn29.store import Store
from sn29.warm_start import begin_from, warm_start

__all__ = ["subnet"]
TEXTS = 8
"""Of a window; three models make 24 cells."""


@pytest.fixture
def judged(subnet, model) -> Subnet:
    """The first validator, whose folder is `first`, has judged two rounds, and the window of the second one is open."""
    for names in (("ann", "ben"), ("cat",)):
        for name in names:
            subnet.publish(name, model(ord(name[0])))
        subnet.next_window()
        go(subnet, "first")
    return subnet


def begin(
    subnet: Subnet,
    state: str,
    named: Sequence[Path],
    cells: int = 200,
    dtype: str = "float32",
    waits: bool = False,
    nodes: Sequence[LoopbackNode] = (),
    start: RoundRecord | None = None,
) -> bool:
    """waits: as the validator does. nodes: one to be asked, and archives. start: that of --start-record."""
    store = Store(subnet.folder / state / "store.db")
    hub = Hub(subnet.hub.endpoint, timeout_s=20, attempts=1, pause_s=0.05)
    machine = Machine(subnet.folder / state / "models", subnet.folder / state / "records", "cpu", dtype, 1, 120, 60)

    async def story() -> bool:
        urls = [node.url for node in nodes]
        asked = Chain(NETUID, network=urls[0], fallbacks=[], archives=urls[1:]) if urls else subnet.chain("validator")
        async with asked as chain:
            folder = subnet.folder / "competitions"
            tokenizers = Tokenizers(hub, subnet.folder / state / "tokenizers")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            if start is not None:
                return await begin_from(ports, subnet.rules(), start, Path("RECORD"))
            if waits:
                step = functools.partial(warm_start, ports, subnet.rules(), named, cells=cells)
                await _until_it_answers(step, Publisher(chain, store), 0.05)
                return store.last_finished() is not None
            return await warm_start(ports, subnet.rules(), named, cells=cells)

    try:
        return asyncio.run(story())
    finally:
        store.close()


def stored(subnet: Subnet, state: str) -> Store:
    return Store(subnet.folder / state / "store.db", read_only=True)


def newest(subnet: Subnet, state: str) -> tuple[Path, RoundRecord]:
    return next(record_files.newest_first(subnet.folder / state / "records"))


def said(events: list[tuple[str, str]], name: str) -> list[str]:
    return [sentence for event, sentence in events if event == name]


def test_the_open_window_is_judged_at_once_and_to_the_bit_as_the_first_validator_did(judged, events):
    path, record = newest(judged, "first")
    assert begin(judged, "second", [judged.folder / "first"], cells=10)
    store = stored(judged, "second")
    (came,) = store.imports().values()
    assert (came.source, came.address, came.block) == (str(path), address(record), record.head.block)
    assert came.cells == 3 * TEXTS
    assert 10 <= came.checked < 3 * TEXTS
    assert {cell.imported for cell in store.each_loss()} == {1}
    assert store.count_losses() == 3 * TEXTS
    assert store.last_finished() == record.head.block - WINDOW, "what is remembered is of the round before"
    (sentence,) = said(events, "warm_start")
    assert sentence.startswith(
        f"24 losses of 3 models were taken over from {path}; {came.checked} were measured here and are the same to the bit, 10 of"
    )
    assert sentence.endswith("Wrong ones would have gone unseen: 1% of them with at most 90.4%, 5% of them with at most 59.9%")
    events.clear()
    _, own = go(judged, "second")
    assert own == record
    assert said(events, "evaluated") == ["0 samples measured, 8 known"] * 3
    assert said(events, "fetched") == []
    assert store.weights()[0].block == record.head.block, "its own round, whose weights are its own to set"
    assert store.taken_over() != record.head.block
    events.clear()
    assert not begin(judged, "second", [judged.folder / "first"])
    assert said(events, "warm_start") == ["rounds were judged here already: nothing is taken over"]


def test_the_draw_is_the_stores_own_and_the_same_after_a_restart(tmp_path):
    first, again, other = (Store(tmp_path / name / "store.db").secret() for name in ("one", "one", "two"))
    assert first == again
    assert len({first, other}) == 2, "who writes a record must not know what is drawn of it"
    assert len(first) == 64


def changed(subnet: Subnet, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder of a validator whose older record, which is not measured against anything, was changed."""
    folder = shutil.copytree(subnet.folder / "first", subnet.folder / "liar")
    path = record_files.paths([folder / "records"])[0]
    record = json.loads(path.read_bytes())
    change(record)
    path.unlink()
    text = canonical(record)
    (path.parent / f"{path.name.partition('-')[0]}-{hashlib.sha256(text).hexdigest()[:16]}.json").write_bytes(text)
    return folder


def test_nothing_that_a_record_says_of_tensors_and_claims_refuses_anybody(judged):
    """The older record names the tensors of one model as another's, and claims of a hotkey that never was, of one that
    committed to something else, and of one that committed later."""
    _, record = newest(judged, "first")
    victim = record.competitions["c00"].model(judged.hotkey("cat"))

    def plant(older: dict[str, Any]) -> None:
        models = older["competitions"]["c00"]["models"]
        one, two = sorted(models, key=lambda m: m["outcome"]["block"])
        two["tensor_digest"] = one["tensor_digest"]
        for place, hotkey in enumerate(("5" + "E" * 47, judged.hotkey("dan"), judged.hotkey("eve"))):
            evil = copy.deepcopy(one)
            evil |= {"losses": [], "num_tokens": 0, "unscored": [], "facts": None, "tensor_digest": victim.tensor_digest}
            evil["entry"] = {"block": 2 + place, "content_id": victim.entry.content_id}
            evil["outcome"] |= {"hotkey": hotkey, "block": 2 + place, "model": victim.outcome.model, "content_id": ""}
            evil["outcome"] |= {"status": "rejected", "reason": "copy"}
            models.append(evil)
        models.sort(key=lambda m: (m["outcome"]["block"], m["outcome"]["hotkey"]))

    hub = Hub(judged.hub.endpoint)
    judged.publish("dan", checkpoint_of(hub, victim.outcome.model, judged.folder / "copied"), digest="A" * 43 + "=")
    judged.publish("eve", judged.folder / "copied")
    assert begin(judged, "second", [changed(judged, plant)])
    store = stored(judged, "second")
    assert store.count_losses() == 3 * TEXTS
    eve = judged.hotkey("eve")
    assert {hotkey for _, hotkey in store.claims().values()} <= {*record.registered, eve}
    assert store.claims()[victim.entry.content_id][0] > victim.entry.block, "of who committed later: from the chain's block on"
    _, own = go(judged, "second")
    assert own == record


def test_who_committed_again_keeps_the_age_of_the_model_though_its_block_is_forgotten_or_an_archive_is_away(
    subnet, model, events
):
    """dan copied ann's model between her two commitments to it."""
    ann = model(1)
    subnet.publish("ann", ann)
    subnet.next_window()
    go(subnet, "first")
    for name in ("dan", "ann"):
        subnet.publish(name, ann)
    subnet.next_window()
    first, record = go(subnet, "first")
    chain, named = subnet.folder / "chain.db", [subnet.folder / "first"]
    with LoopbackNode(chain) as node, LoopbackNode(chain) as archive:
        node.faults.keeps_states = WINDOW
        archive.faults.refusal, archive.faults.retry_after = "403", "1000"
        with pytest.raises(Unavailable, match="403"):
            begin(subnet, "second", named, nodes=(node, archive))
        assert stored(subnet, "second").last_finished() is None, "nothing is decided while it is not known"
        archive.faults.clear()
        assert begin(subnet, "second", named, nodes=(node, archive))
        assert said(events, "claims") == ["1 of the record's 1 claims are taken over, which the chain shows"]
        events.clear()
        assert begin(subnet, "third", named, nodes=(node,))
    (entry,) = (m.entry for m in record.competitions["c00"].models if m.hotkey == subnet.hotkey("ann"))
    assert entry.block < WINDOW
    says_one, says_both, warns = said(events, "claims")
    assert says_one.endswith(f" since block {entry.block} is the record's word")
    assert says_both == "1 of the record's 1 claims are taken over"
    assert warns.startswith(f"no node that was asked keeps the state of block {entry.block} and before: since when 1 models are")
    assert warns.endswith("To have both shown start with --subtensor.archives, and with a new --state.dir")
    for state in ("second", "third"):
        kept = stored(subnet, state).claims()[entry.content_id]
        assert kept == first.claims()[entry.content_id] == (entry.block, subnet.hotkey("ann"))
    assert go(subnet, "third")[1] == record


def checkpoint_of(hub: Hub, model: str, folder: Path) -> Path:
    """The files of a repository."""
    fetch(hub, hub.listing(ModelId.parse(model)), folder, deadline_s=60)
    return folder


def lying(subnet: Subnet, change: str) -> Path:
    """The folder of a validator that judged the second round as the first one did, but by losses that were changed: a record
    that gives its own bits."""
    source, folder = subnet.folder / "first", subnet.folder / "liar"
    shutil.copytree(source, folder)
    path, _ = newest(subnet, "liar")
    path.unlink()
    with closing(sqlite3.connect(folder / "store.db")) as db, db:
        block = db.execute("select max(block) from round").fetchone()[0]
        db.execute("delete from standing where round = ?", (block,))
        db.execute("delete from round where block = ?", (block,))
        db.execute(f"update loss set nats = {change}")
    shutil.copytree(source / "models", folder / "models", dirs_exist_ok=True)
    go(subnet, "liar")
    return folder


def test_a_record_that_lies_is_refused_with_both_values_and_nothing_is_taken_over(judged):
    folder = lying(judged, "nats * (1 - 0.004 * (abs(random()) % 2))")  # about half of the cells are a little better
    (_, honest), (path, record) = newest(judged, "first"), newest(judged, "liar")
    assert record.head == honest.head
    with pytest.raises(Rejected) as refused:
        begin(judged, "second", [folder], cells=12)
    assert refused.value.reason is Reason.RECORD
    assert refused.value.where.startswith(f"{path}: c00: 5")
    theirs, sample = refused.value.got.split(" nats on sample ")
    assert refused.value.limit.endswith(", measured here, but for 1e-05 of it")
    mine = float(refused.value.limit.partition(",")[0])
    kept, right = record.competitions["c00"], honest.competitions["c00"]
    place = [s.id for s in kept.samples].index(sample)
    assert float(theirs) in {m.losses[place] for m in kept.models}
    assert mine in {m.losses[place] for m in right.models}
    store = stored(judged, "second")
    assert (store.count_losses(), store.imports(), store.last_finished(), store.claims()) == (0, {}, None, {})
    with pytest.raises(Rejected) as again:
        begin(judged, "second", [folder], cells=12)
    assert str(again.value) == str(refused.value), "who tries until it passes draws the same cells"
    assert begin(judged, "second", [judged.folder / "first"]), "the honest one is taken over after it"


def test_a_machine_of_another_kind_gives_no_losses(judged, events):
    """Within what machines differ by: a bias of it would move a crown."""
    folder = lying(judged, "nats * 1.000004")
    events.clear()
    assert begin(judged, "second", [folder])
    store = stored(judged, "second")
    assert (store.count_losses(), store.imports(), store.last_finished()) == (
        0,
        {},
        newest(judged, "liar")[1].head.block - WINDOW,
    )
    (sentence,) = said(events, "warm_start")
    assert sentence.startswith("none of its losses is taken over, as by a machine of another kind: got ")
    _, record = newest(judged, "first")
    assert go(judged, "second")[1] == record, "it measures them itself"


def test_a_cell_that_stands_out_is_measured_though_it_was_not_drawn(judged):
    ids = [sample.id for sample in newest(judged, "first")[1].competitions["c00"].samples]
    folder = lying(judged, f"case when sample = '{ids[3]}' then 1e300 else nats end")
    with pytest.raises(Rejected, match=rf"got 1e\+300 nats on sample {ids[3]}, rule \d"):
        begin(judged, "second", [folder], cells=1)
    assert begin(judged, "third", [judged.folder / "first"], cells=1), "the honest one has none"


def test_an_interrupted_start_leaves_nothing(judged):
    state = judged.folder / "second"
    state.mkdir()
    (state / "records").write_text("in the way")
    with pytest.raises(Unavailable):
        begin(judged, "second", [judged.folder / "first"], cells=1)
    store = stored(judged, "second")
    assert (store.count_losses(), store.imports(), store.tensor_digests(), store.claims()) == (0, {}, {}, {})


def test_a_record_whose_losses_no_round_would_ask_for_is_begun_from_alone(judged, events):
    path, record = newest(judged, "first")
    alone = judged.folder / "alone" / path.name
    alone.parent.mkdir()
    shutil.copy(path, alone)
    events.clear()
    assert begin(judged, "second", [alone])
    judged.next_window()
    assert begin(judged, "third", [judged.folder / "first"])
    for state in ("second", "third"):
        store = stored(judged, state)
        assert store.last_finished() == store.taken_over() == record.head.block
        assert store.count_losses() == 0
    assert said(events, "fetched") == []
    first, second = said(events, "warm_start")
    assert first.startswith(f"{alone} has none beside it that it follows on: begun from without its losses")
    assert second.startswith(f"{path} is not of the round that is due, of {record.head.block + WINDOW}: begun from")


def test_a_hub_that_is_away_for_a_moment_is_waited_for(judged, events):
    judged.hub.faults.set(Fault("GET .*/(ann|ben|cat)/", status=503, times=4))
    assert begin(judged, "second", [judged.folder / "first"], waits=True)
    assert judged.hub.faults.hits() == (4,)
    assert any("503" in sentence for sentence in said(events, "unavailable")), "the cause"
    assert stored(judged, "second").count_losses() > 0


def test_models_that_are_not_served_any_more_are_left_out(judged, events):
    judged.hub.faults.set(Fault(r"GET .*/ann/model/.*safetensors", status=503))
    assert begin(judged, "second", [judged.folder / "first"])
    assert stored(judged, "second").count_losses() == 2 * TEXTS
    assert sum("left out" in sentence for sentence in said(events, "warm_start")) == 1
    judged.hub.faults.set(Fault(r"GET .*/(ann|ben|cat)/model/.*safetensors", status=503))
    with pytest.raises(Unavailable):
        begin(judged, "third", [judged.folder / "first"])
    assert stored(judged, "third").count_losses() == 0


@pytest.mark.timeout(600)
def test_a_new_validator_is_at_work_in_the_window_that_is_open(tmp_path, make_checkpoint):
    """Two real validators on a localnet; the second one starts when the first has judged two windows."""
    localnet = prepare(tmp_path / "localnet", text.build(default_cache()), block_seconds=0.5, window_blocks=4000)
    (localnet.competitions / "c01.yaml").unlink()
    rules = localnet.competitions / "c00.yaml"
    rules.write_text(rules.read_text().replace("reward_share: 0.5", "reward_share: 1").replace("count: 60", "count: 12"))
    wallets = tmp_path / "wallets"
    with localnet.serve():
        for name in ("val", "new"):
            localnet.register(name, "default", wallets, validator=True)
        localnet.register("ann", "default", wallets)
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        forward(localnet, 1)
        asyncio.run(submitted(localnet, wallets, "ann", make_checkpoint(vocab_size=100_277, **shape)))
        state, late = tmp_path / "val", tmp_path / "new"
        flags = ("--dtype", "float32", "--state.dir")
        one = run("validator", localnet, state, "val", *flags, str(state), "--rounds", "2")
        for _ in range(2):
            forward(localnet)
            until(one, "published")
        other = run("validator", localnet, late, "new", *flags, str(late), "--rounds", "1", "--warm-start", str(state))
        until(other, "published")
        assert [process.wait(60) for process in (one.process, other.process)] == [0, 0]
        list(other.news())
    assert [event["measured"] for event in other.events if event["event"] == "evaluated"] == [0]
    assert [path.name for path in records(state)] == [path.name for path in records(late)], "to the bit"
    stores = [Store(folder / "store.db", read_only=True) for folder in (state, late)]
    assert stores[0].publications()[-1][1] == stores[1].publications()[-1][1]
    (came,) = stores[1].imports().values()
    assert (came.source, came.cells, came.checked) == (str(records(state)[-1]), 12, 12)


def records(state: Path) -> list[Path]:
    return sorted((state / "records").iterdir())


def forward(localnet: Localnet, blocks: int = 0) -> None:
    """By so many blocks, or until the next window is open."""
    ledger = Ledger.open(localnet.chain)
    ledger.advance(blocks or (ledger.head() // 4000 + 1) * 4000 + ledger.finality_lag - ledger.head())
    ledger.close()


def test_a_window_that_others_judge_by_other_rules_is_left_to_them(judged, events):
    """The files were replaced while it was open; and other software."""
    path, record = newest(judged, "first")
    rules = judged.folder / "competitions" / "c00.yaml"
    kept = rules.read_text()
    rules.write_text(kept.replace("initial: 0.004", "initial: 0.5"))
    sha = hashlib.sha256(rules.read_bytes()).hexdigest()
    assert begin(judged, "second", [judged.folder / "first"])
    rules.write_text(kept)
    numpy = judged.folder / "numpy"
    other = replace(record, versions={**record.versions, "numpy": "1.0.0", "torch": record.versions["torch"] + "+cu999"})
    older = record_files.paths([judged.folder / "first" / "records"])[0]
    record_files.write(numpy, other)
    shutil.copy(older, numpy)
    assert begin(judged, "third", [numpy])
    for state in ("second", "third"):
        store = stored(judged, state)
        assert (store.count_losses(), store.imports()) == (0, {})
        assert store.last_finished() == store.taken_over() == record.head.block
    judged.next_window()
    assert go(judged, "third")[1] == go(judged, "first")[1], "and it judges the next one as the others do"
    first, second = said(events, "warm_start")
    theirs = record.competitions["c00"].file_sha256
    assert f"{path} was judged by other rules than are here, named second (file of c00 {theirs[:12]} -> {sha[:12]}; " in first
    assert "c00.scoring.advantage.initial 0.004 -> 0.5): begun from without its losses" in first
    assert f"named second (numpy 1.0.0 -> {version('numpy')}): begun from without its losses" in second


@pytest.mark.parametrize("how", ["warm", "start"])
def test_who_begins_from_an_earlier_round_that_was_judged_by_other_rules_leaves_the_open_window_out(judged, events, how):
    """Early in a window, the other validator is still at work on it."""
    path, record = newest(judged, "first")
    judged.next_window()
    rules = judged.folder / "competitions" / "c00.yaml"
    former = rules.read_text()
    rules.write_text(former.replace("initial: 0.004", "initial: 0.5"))
    if how == "warm":
        assert begin(judged, "second", [judged.folder / "first"])
    else:
        assert begin(judged, "second", [], start=record)
        assert not begin(judged, "second", [], start=record), "as each restart with the same flags does"
        path = Path("RECORD")
    texts, store = {"c00.yaml": rules.read_text()}, Store(judged.folder / "second" / "store.db")
    opened = record.head.block + WINDOW
    note(store, judged.ledger.head(), texts, software(), lambda _: judged.rules())
    assert [kept.since for kept in store.rules_kept()] == [opened + WINDOW]
    assert due(store, judged.ledger.head(), software(), 2, lambda _: judged.rules(), set()) is None
    found = due(store, opened + WINDOW, software(), 2, lambda _: judged.rules(), set())
    assert (found.since, found.last) == (opened + WINDOW, None)
    store.close()
    (sentence,) = said(events, "warm_start")
    assert sentence.startswith(f"{path} was judged by other rules than are here, named second (file of c00 ")
    assert sentence.endswith("the window that is open is left out, since by which it is judged is not known")


def test_a_repository_that_is_closed_while_the_sample_is_measured_says_nothing_of_the_record(judged, events):
    """Its owner waits for the last request, which is for all of the weights."""
    weights = r"GET .*/ann/model/.*safetensors"
    judged.hub.faults.set(Fault(weights))
    assert begin(judged, "other", [judged.folder / "first"])
    (requests,) = judged.hub.faults.hits()
    judged.hub.faults.set(Fault(weights, skip=requests - 1, change="private"))
    events.clear()
    assert begin(judged, "second", [judged.folder / "first"])
    assert stored(judged, "second").count_losses() == 2 * TEXTS
    left_out = [sentence for sentence in said(events, "warm_start") if "left out" in sentence]
    assert len(left_out) == 1
    assert left_out[0].startswith("its losses are left out: they cannot be checked now (")
    assert Reason.REPOSITORY_GONE.sentence in left_out[0]


def test_what_cannot_be_compared_is_refused(judged, tmp_path):
    with pytest.raises(Rejected, match="got losses in float32, rule bfloat16, as this validator measures"):
        begin(judged, "second", [judged.folder / "first"], dtype="bfloat16")
    data = judged.folder / "competitions" / "text" / "a.parquet"
    kept = data.read_bytes()
    pq.write_table(pa.table({"text": [f"another text, number {i}" for i in range(30)]}), data, row_group_size=5)
    with pytest.raises(Rejected, match=r"rule 8 texts, the first .*, drawn here"):
        begin(judged, "second", [judged.folder / "first"])
    data.write_bytes(kept)
    _, record = newest(judged, "first")
    later = replace(record, head=replace(record.head, block=9_000_000))
    elsewhere = record_files.write(tmp_path / "elsewhere", later)
    with pytest.raises(
        Rejected, match=r"got block 9000000, rule at most \d+, a day ahead of the node: is the record of this net"
    ):
        begin(judged, "second", [elsewhere])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Rejected, match="rule files or folders with round records"):
        begin(judged, "second", [tmp_path / "empty"])
    assert stored(judged, "second").count_losses() == 0
