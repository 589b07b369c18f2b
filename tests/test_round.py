"""The stories on a real chain, a real Hub and a real store: rounds, examination, publication, submission."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from loopback_node import LoopbackNode

from neurons.adapters import Tokenizers, dataset_of, parse_texts, read_texts
from sn29 import telemetry
from sn29.chain import Chain, create_wallet
from sn29.corpus import LocalFolder, draw
from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.worker import Evaluator
from sn29.examination import EXCUSED_BLOCKS, Machine, Ports, Rules
from sn29.hub import Hub
from sn29.localnet.http_exchange import Wire
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.hub_faults import Fault
from sn29.localnet.ledger import Ledger, LedgerSubstrate
from sn29.measurement import unfit
from sn29.models import checkpoint
from sn29.publication import Publisher, Step
from sn29.records import Commitment, Head, Loss, ModelId, Weights
from sn29.replay import compare, recompute
from sn29.round import begin_with, plan_round, run_round
from sn29.round_record import RoundRecord, decode, encode
from sn29.store import Store, Unanswered
from sn29.submission import submit

NETUID = 29
WINDOW = 1000
RULES = f"""\
reward_share: 1
families: [LlamaForCausalLM]
tokenizer: {{free: true}}
limits: {{parameters: 60000, bytes: 1e6, max_tokens: 300, max_chars: 200, round_trip_failures: 1}}
dataset: {{folder: text, files: "*.parquet", column: text}}
samples: {{count: 8, window_blocks: {WINDOW}}}
scoring:
  rule: oldest_holder
  group: 1
  skew: 1.0
  advantage: {{initial: 0.004, decay_per_epoch: 0.995, blocks_per_epoch: 361}}
pool: {{keep: 4, pending: 4}}
"""


@dataclass
class Subnet:
    """A chain, a Hub, competition files with their text, and wallets by name."""

    folder: Path
    hub: LoopbackHub
    ledger: Ledger
    evaluator: Evaluator

    def chain(self, name: str) -> Chain:
        return Chain(NETUID, network="local", wallet=self.wallet(name), substrate=LedgerSubstrate(self.folder / "chain.db"))

    def wallet(self, name: str, *, validator: bool = False):
        path = self.folder / "wallets"
        if (path / name).exists():
            from sn29.chain import load_wallet

            return load_wallet(name, "default", path)
        wallet = create_wallet(name, "default", path)
        stake = 1000 if validator else 0
        self.ledger.register(wallet.hotkey.ss58_address, wallet.coldkeypub.ss58_address, stake=stake, permit=validator)
        self.ledger.advance(1)
        return wallet

    def hotkey(self, name: str) -> str:
        return str(self.wallet(name).hotkey.ss58_address)

    def rules(self) -> Rules:
        read = parse_texts(read_texts(self.folder / "competitions"))
        return Rules(read.files, read.hall_of_fame, read.hashes)

    def publish(self, name: str, folder: Path, digest: str | None = None, competition: str = "c00") -> Commitment:
        """What a miner with its own tools does: upload, commit; the digest may lie."""
        hub = Hub(self.hub.endpoint, token=self.hub.add_user(name))
        hub.create(f"{name}/model")
        revision = hub.upload(f"{name}/model", folder, message="model")
        model = ModelId(name, "model", revision)
        right = checkpoint.digest(checkpoint.content_id(hub.listing(model).files), self.hotkey(name))
        commitment = Commitment(self.hotkey(name), 0, model, digest or right, competition)

        async def commit() -> None:
            async with self.chain(name) as chain:
                await chain.commit(commitment.encode(), again=True)

        asyncio.run(commit())
        return commitment

    def next_window(self) -> None:
        self.ledger.advance((self.ledger.head() // WINDOW + 1) * WINDOW + self.ledger.finality_lag - self.ledger.head())


@pytest.fixture
def subnet(evaluator, tmp_path: Path) -> Iterator[Subnet]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "competitions" / "text").mkdir(parents=True)
    (tmp_path / "competitions" / "c00.yaml").write_text(RULES)
    texts = [f"the text number {i} about the {word}" for i in range(10) for word in ("sea", "hills", "theatre")]
    pq.write_table(pa.table({"text": texts}), tmp_path / "competitions" / "text" / "a.parquet", row_group_size=5)
    ledger = Ledger.create(tmp_path / "chain.db", netuid=NETUID, block_seconds=0.4, tempo=100_000, weights_rate_limit=0)
    with LoopbackHub(tmp_path / "hub") as hub:
        subnet = Subnet(tmp_path, hub, ledger, evaluator)
        subnet.wallet("validator", validator=True)
        yield subnet
    ledger.close()


def go(subnet: Subnet, state: str = "state", *, attempts: int = 1, timeout_s: float = 20, hub_kind=Hub, **machine):
    """One round by the validator with this state folder; (store, record of the round)."""
    store = Store(subnet.folder / state / "store.db")
    hub = hub_kind(subnet.hub.endpoint, timeout_s=timeout_s, attempts=attempts, pause_s=0.05, say=telemetry.warn)
    plain = Machine(subnet.folder / state / "models", subnet.folder / state / "records", "cpu", "float32", 1, 120, 60)

    async def turn() -> None:
        async with subnet.chain("validator") as chain:
            folder = subnet.folder / "competitions"
            tokenizers = Tokenizers(hub, subnet.folder / state / "tokenizers")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, replace(plain, **machine), subnet.evaluator)
            plan = await plan_round(ports, subnet.rules(), catch_up=2)
            assert plan is not None
            await run_round(ports, subnet.rules(), plan)

    asyncio.run(turn())
    return store, store.rounds()[-1].record


def reasons(subnet: Subnet, record) -> dict[str, str]:
    """Miner's name -> reason code or status."""
    names = {subnet.hotkey(path.name): path.name for path in (subnet.folder / "wallets").iterdir()}
    outcomes = [m.outcome for m in record.competitions["c00"].models]
    return {names[o.hotkey]: o.reason or o.status for o in outcomes}


def test_a_round_begins_though_the_first_endpoint_stands_still(subnet, tmp_path):
    """Its node answers every question, and has not seen the window open."""
    (tmp_path / "two").mkdir()
    good, frozen = tmp_path / "two" / "good.db", tmp_path / "two" / "frozen.db"
    ledger = Ledger.create(good, netuid=NETUID, block_seconds=0.05)
    ledger.advance(WINDOW - 100)
    with sqlite3.connect(good) as db:
        db.execute("vacuum into ?", (str(frozen),))
    db.close()
    with sqlite3.connect(frozen) as db:
        db.execute("update chain set value = value - 1000000 where name = 'offset'")
    db.close()
    ledger.advance(WINDOW)

    async def story(first: str, spare: str) -> None:
        async with Chain(NETUID, network=first, fallbacks=[spare]) as chain:
            machine = Machine(tmp_path, tmp_path, "cpu", "float32", 1, 120, 60)
            hub, folder = Hub(subnet.hub.endpoint), subnet.folder / "competitions"
            store = Store(tmp_path / "two" / "store.db")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), Tokenizers(hub, tmp_path / "tokenizers"), machine, None)
            assert await plan_round(ports, subnet.rules(), catch_up=2) is None
            await asyncio.sleep(1)
            plan = await plan_round(ports, subnet.rules(), catch_up=2)
            assert plan is not None
            assert plan.block == WINDOW

    with LoopbackNode(frozen) as first, LoopbackNode(good) as spare:
        asyncio.run(story(first.url, spare.url))
    ledger.close()


def test_one_hostile_repository_harms_nobody_else(subnet, model):
    header = b'{"x":{"dtype":[],"shape":[1],"data_offsets":[0,4]}}'
    hostile = model(seed=1)
    (hostile / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    escape = model(seed=2)
    config = json.loads((escape / "config.json").read_text())
    (escape / "config.json").write_text(json.dumps(config | {"\x1b[31mforged\nline": 1}))
    subnet.publish("honest", model(seed=3))
    subnet.publish("hostile", hostile)
    subnet.publish("escape", escape)
    subnet.publish("liar", model(seed=4), digest="A" * 43 + "=")
    subnet.publish("thief", model(seed=3))
    subnet.next_window()
    _, record = go(subnet)
    assert reasons(subnet, record) == {
        "honest": "evaluated", "hostile": "tensors", "escape": "bad_config", "liar": "digest", "thief": "copy",
    }  # fmt: skip
    assert record.weights[0].by_hotkey == {subnet.hotkey("honest"): 1.0}
    assert all(m.outcome.detail.isprintable() for m in record.competitions["c00"].models)


def test_a_commitment_after_the_seed_block_waits_for_the_next_window(subnet, model):
    subnet.publish("early", model(seed=1))
    subnet.next_window()
    subnet.publish("late", model(seed=2))
    _, record = go(subnet)
    assert reasons(subnet, record) == {"early": "evaluated"}
    subnet.next_window()
    _, record = go(subnet)
    assert reasons(subnet, record) == {"early": "evaluated", "late": "evaluated"}


def test_a_machine_that_cannot_evaluate_blames_no_miner(subnet, model):
    subnet.publish("honest", model(seed=1))
    subnet.next_window()
    with pytest.raises(Unavailable, match="1 models could not be looked at"):
        go(subnet, device="cuda:99")
    _, record = go(subnet)
    assert reasons(subnet, record) == {"honest": "evaluated"}


def test_a_hub_that_does_not_answer_delays_the_round_and_a_gone_repository_does_not(subnet, model):
    subnet.publish("ann", model(seed=1))
    subnet.publish("ben", model(seed=2))
    subnet.next_window()
    subnet.hub.stop()
    with pytest.raises(Unavailable):
        go(subnet)
    subnet.hub = LoopbackHub(subnet.folder / "hub", port=int(subnet.hub.endpoint.rsplit(":", 1)[1]))
    subnet.hub.start()
    Hub(subnet.hub.endpoint, token=subnet.hub.add_user("ben")).delete("ben/model")
    _, record = go(subnet)
    assert reasons(subnet, record) == {"ann": "evaluated", "ben": "repository_gone"}


def test_a_silent_hub_costs_a_miner_the_window_only_after_a_quarter_of_it(subnet, model, events):
    subnet.publish("ann", model(seed=1))
    subnet.next_window()
    subnet.hub.stop()
    subnet.ledger.advance(WINDOW // 4)
    _, record = go(subnet)
    assert reasons(subnet, record) == {"ann": "unavailable"}
    assert record.weights[0].by_hotkey == {}
    (said,) = [sentence for event, sentence in events if event == "weights"]
    assert said == f"round of block {record.head.block} decided: there is nobody to pay, so nothing is set on chain"
    subnet.hub.start = lambda: None  # stopped for good; the fixture's exit stops it again
    subnet.hub.stop = lambda: None


def test_an_opened_round_is_resumed_only_while_it_is_due(subnet, model):
    subnet.publish("ann", model(seed=1))
    subnet.next_window()
    store = Store(subnet.folder / "state" / "store.db")
    head = subnet.ledger.head() // WINDOW * WINDOW
    store.open_round(head - 5 * WINDOW, {"block": head - 5 * WINDOW, "rules": dict(subnet.rules().hashes), "windows": {}})
    store.close()
    _, record = go(subnet)
    assert record.head.block == head


def test_a_checkpoint_that_nobody_commits_to_is_deleted(subnet, model):
    subnet.publish("ann", model(seed=1))
    subnet.next_window()
    go(subnet)
    first = {path.name for path in (subnet.folder / "state" / "models").iterdir()}
    subnet.publish("ann", model(seed=2))
    subnet.next_window()
    go(subnet)
    assert first.isdisjoint(path.name for path in (subnet.folder / "state" / "models").iterdir())


def test_under_champion_memory_is_carried_and_a_repeated_commitment_makes_nobody_younger(subnet, model):
    """Three rounds; every record replays to the same bits, and the holder's claim keeps its first block."""
    path = subnet.folder / "competitions" / "c00.yaml"
    text = path.read_text()
    path.write_text(text[: text.index("scoring:")] + "scoring: {rule: champion}\n" + text[text.index("pool:") :])
    holder = model(seed=1)
    subnet.publish("holder", holder)
    subnet.next_window()
    _, first = go(subnet)
    subnet.publish("other", model(seed=2))
    subnet.publish("holder", holder)
    subnet.next_window()
    _, second = go(subnet)
    subnet.next_window()
    _, third = go(subnet)
    kept = [record.competitions["c00"] for record in (first, second, third)]
    blocks = [next(m for m in k.models if m.hotkey == subnet.hotkey("holder")) for k in kept]
    assert blocks[0].outcome.block < blocks[1].outcome.block, "the chain has the newer commitment"
    assert blocks[0].entry == blocks[1].entry == blocks[2].entry, "the claim is as old as it was"
    assert kept[1].memory_before == kept[0].memory_after
    assert kept[2].memory_before == kept[1].memory_after
    assert kept[2].duels[0]["num_samples"] > kept[1].duels[0]["num_samples"], "evidence adds up"
    for record in (first, second, third):
        assert compare(record, recompute(record)) is None
        assert decode(encode(record)) == record
    assert len(list((subnet.folder / "state" / "records").iterdir())) == 3


def under_champion(subnet: Subnet, *, samples: int, **fields: float) -> None:
    path = subnet.folder / "competitions" / "c00.yaml"
    text = path.read_text()
    rule = "".join(f", {name}: {value}" for name, value in fields.items())
    text = text[: text.index("scoring:")] + f"scoring: {{rule: champion{rule}}}\n" + text[text.index("pool:") :]
    path.write_text(text.replace("count: 8", f"count: {samples}"))


def test_a_hopeless_challenger_is_stopped_and_rests_then_and_the_decision_is_that_of_the_full_evaluation(subnet, model):
    under_champion(subnet, samples=24)
    subnet.publish("ann", model(seed=1))
    subnet.publish("cat", model(seed=3))
    records = []
    for window in range(4):
        if window == 1:
            subnet.publish("ben", model(seed=2, initializer_range=1.0))  # 40 % worse on every text
        subnet.next_window()
        _, record = go(subnet)
        records.append(record.competitions["c00"])
        assert compare(record, recompute(record)) is None, "replays to the same bits"
        under_champion(subnet, samples=24, stop_error_rate=0)
        _, full = go(subnet, "full")
        under_champion(subnet, samples=24)
        assert {len(losses) for losses in full.competitions["c00"].losses.values()} == {24}
        assert full.weights == record.weights
    ann, ben, cat = (subnet.hotkey(name) for name in ("ann", "ben", "cat"))
    assert [len(r.losses.get(ben, ())) for r in records] == [0, 16, 16, 0], "not there; stopped twice; not asked again"
    assert [len(r.losses[hotkey]) for r in records for hotkey in (ann, cat)] == [24] * 8
    stopped = records[1].model(ben)
    assert stopped.stopped.startswith("stopped after 16 of 24 samples: its losses are ")
    resting = records[3].model(ben).outcome
    assert (resting.status, resting.reason) == ("waiting", "out_of_reach")
    assert "stopped after 0 of 24 samples" in resting.detail
    assert len(full.competitions["c00"].losses) == 2, "what two windows say of it in full is enough too"


def test_a_late_validator_that_begins_with_a_record_goes_on_like_the_one_that_wrote_it(subnet, model):
    path = subnet.folder / "competitions" / "c00.yaml"
    text = path.read_text()
    path.write_text(text[: text.index("scoring:")] + "scoring: {rule: champion}\n" + text[text.index("pool:") :])
    holder = model(seed=1)
    committed = [subnet.publish("holder", holder), subnet.publish("other", model(seed=2))]
    committed.append(subnet.publish("shadow", in_disguise(holder)))
    subnet.next_window()
    store, first = go(subnet)
    assert reasons(subnet, first) == {"holder": "evaluated", "other": "evaluated", "shadow": "evaluated"}
    assert begin(subnet, "late", first) is True
    known = Store(subnet.folder / "late" / "store.db").first_seen((c.hotkey, c.digest) for c in committed)
    assert sorted(known) == sorted((c.hotkey, c.digest) for c in committed), "from the record, before the chain was asked"
    assert begin(subnet, "late", first) is False, "a restart with the same flag changes nothing"
    subnet.next_window()
    _, second = go(subnet)
    late, of_late = go(subnet, "late")
    assert reasons(subnet, second)["shadow"] == "near_copy", "known from the first round: not measured again"
    shadow = second.competitions["c00"].model(subnet.hotkey("shadow"))
    models = [replace(m, tensor_digest="") if m == shadow else m for m in second.competitions["c00"].models]
    assert of_late == replace(second, competitions={"c00": replace(second.competitions["c00"], models=tuple(models))})
    assert late.claims() == {key: claim for key, claim in store.claims().items() if key != shadow.tensor_digest}
    seen = [(c.hotkey, c.digest) for c in committed]
    assert late.first_seen(seen) == store.first_seen(seen)
    assert len(late.first_seen(seen)) == 3
    assert (late.taken_over(), store.taken_over()) == (first.head.block, None)
    assert of_late.competitions["c00"].memory_before["holder"] is not None

    elsewhere = replace(first, head=replace(first.head, hash="0x" + "12" * 32))
    ahead = replace(first.competitions["c00"].window, seed=Head(first.head.block + 1000, "0x" + "12" * 32))
    later = replace(first, competitions={"c00": replace(first.competitions["c00"], window=ahead)})
    forged = replace(first, weights={0: replace(first.weights[0], by_hotkey={subnet.hotkey("other"): 1.0})})
    for wrong in (elsewhere, later, forged):
        with pytest.raises(Rejected) as refusal:
            begin(subnet, "new", wrong)
        assert refusal.value.reason is Reason.RECORD


def in_disguise(source: Path) -> Path:
    """The same losses from other weights: the embedding of a token that no text has is another one."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(source, source.with_name(f"{source.name}-disguised"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][299] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def begin(subnet: Subnet, state: str, record: RoundRecord) -> bool:
    machine = Machine(subnet.folder / state / "models", subnet.folder / state / "records", "cpu", "float32", 1, 120, 60)
    store = Store(subnet.folder / state / "store.db")

    async def turn() -> bool:
        async with subnet.chain("validator") as chain:
            folder = subnet.folder / "competitions"
            tokenizers = Tokenizers(Hub(subnet.hub.endpoint), subnet.folder / state / "tokenizers")
            hub = Hub(subnet.hub.endpoint)
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            return await begin_with(ports, record)

    return asyncio.run(turn())


# --- copies by their tensors ------------------------------------------------------------------------------------------


def repacked(source: Path) -> Path:
    """The same tensors in other files: two shards, float32 for bfloat16, another text of the config."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(source, source.with_name(f"{source.name}-repacked"))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, folder / f"model-{i + 1:05d}-of-00002.safetensors", metadata={"salt": "1"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    return folder


def in_bfloat16(source: Path) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_a_copy_that_was_packed_otherwise_belongs_to_the_older_claim_whichever_was_evaluated_first(subnet, model, events):
    """One validator evaluates original and copy together; for the other one the original does not answer at first."""
    original = in_bfloat16(model(seed=1))
    subnet.publish("owner", original)
    subnet.publish("thief", repacked(original))
    subnet.next_window()
    _, first = go(subnet)
    assert reasons(subnet, first) == {"owner": "evaluated", "thief": "copy"}
    owner, thief = (next(m for m in first.competitions["c00"].models if m.hotkey == subnet.hotkey(n)) for n in ("owner", "thief"))
    assert owner.tensor_digest == thief.tensor_digest != ""
    assert owner.facts.weights_id != thief.facts.weights_id
    assert f"first committed by {owner.hotkey} at block {owner.outcome.block}" in thief.outcome.detail
    assert thief.resembles == owner.hotkey
    assert next(sentence for event, sentence in events if event == "suspect").endswith("alike, to 0.00%; the losses decide")
    assert first.weights[0].by_hotkey == {owner.hotkey: 1.0}

    subnet.hub.faults.set(Fault("/owner/", status=500))
    subnet.ledger.advance(WINDOW // 4)  # a round waits so long for who does not answer
    _, other = go(subnet, "other")
    assert reasons(subnet, other) == {"owner": "unavailable", "thief": "evaluated"}
    subnet.hub.faults.set()
    subnet.next_window()
    events.clear()
    (store, second), (other_store, of_other) = go(subnet), go(subnet, "other")
    assert second.competitions["c00"].models == of_other.competitions["c00"].models
    assert reasons(subnet, second) == reasons(subnet, first)
    assert [event for event, _ in events].count("fetched") == 3, "the thief's files are not fetched again where it is known"
    assert second.competitions["c00"].scores == of_other.competitions["c00"].scores
    assert store.tensor_digests() == other_store.tensor_digests()
    assert store.claims() == other_store.claims()
    for record in (first, other, second, of_other):
        assert compare(record, recompute(record)) is None
        assert decode(encode(record)) == record

    assert begin(subnet, "late", second) is True
    assert Store(subnet.folder / "late" / "store.db").tensor_digests() == {}, "only what was read here refuses anybody"
    subnet.next_window()
    assert reasons(subnet, go(subnet, "late")[1]) == reasons(subnet, first)


def test_a_round_that_is_tried_again_gives_the_same_places(subnet, model):
    """Two places: original and copy get them. That the second is a copy is known by the next try, but not for this round."""
    path = subnet.folder / "competitions" / "c00.yaml"
    path.write_text(path.read_text().replace("keep: 4, pending: 4", "keep: 1, pending: 1"))
    original = model(seed=1)
    subnet.publish("owner", original)
    subnet.publish("thief", repacked(original))
    subnet.publish("ben", model(seed=2))
    subnet.publish("hal", model(seed=3))
    subnet.next_window()
    subnet.hub.faults.set(Fault("/hal/", status=502))
    with pytest.raises(Unavailable, match="1 models could not be looked at"):
        go(subnet)
    subnet.hub.faults.set()
    store, record = go(subnet)
    assert reasons(subnet, record) == {"owner": "evaluated", "thief": "copy", "ben": "waiting", "hal": "waiting"}
    assert len(store.tensor_digests()) == 2
    subnet.next_window()
    _, record = go(subnet)
    assert reasons(subnet, record) == {"owner": "evaluated", "thief": "copy", "ben": "evaluated", "hal": "waiting"}


# --- a Hub that does what it should not -------------------------------------------------------------------------------

TREE, CONFIG, RESOLVE, STORE = (
    r"hub GET .*/{}/.*/tree/",
    r"hub GET .*/{}/.*config",
    r"hub GET .*/{}/.*safetensors",
    r"store GET .*/{}/",
)
WIDE = {"hidden_size": 40}
DOWNLOAD = 9
"""Requests for the weights of a WIDE model before they are downloaded: the header in two, and the fingerprint of 7 tensors."""


def in_turn(name: str, place: str, *faults: Fault, skip: int = 0) -> list[Fault]:
    """Each of the faults hits one request of a miner's, the first ones or (with `skip`) the first after so many good ones."""
    return [replace(fault, match=place.format(name), skip=skip, times=1) for fault in faults]


def line(**wire: float) -> Fault:
    return Fault("", wire=Wire(**wire))


def test_every_fault_that_passes_is_survived_by_a_round_and_told(subnet, model, events):
    """Three miners whose requests are hit by each kind of fault at least once, and nobody is refused for it."""
    for seed, name in enumerate(("ann", "ben", "cat")):
        subnet.publish(name, model(seed=seed, **WIDE))
    subnet.next_window()
    away = Fault("", status=302, headers={"Location": "https://192.0.2.1/weights"})
    busy, full = Fault("", status=503, headers={"Retry-After": "0"}), Fault("", status=429, headers={"Retry-After": "1"})
    other_span = Fault("", headers={"Content-Range": "bytes 0-9/10"})
    subnet.hub.faults.set(
        *in_turn("ann", TREE, busy, line(drop=True)),
        *in_turn("ben", TREE, line(cut_at=20), full),
        *in_turn("cat", TREE, away),
        *in_turn("ann", CONFIG, Fault("", status=500), line(flip_at=7)),
        *in_turn("ben", CONFIG, line(length_by=30), line(length_by=-30)),
        *in_turn("cat", CONFIG, line(delay_s=30), line(stall_at=20, stall_s=30)),
        *in_turn("ann", RESOLVE, away, Fault("", status=404), line(drop=True)),
        *in_turn("ben", STORE, Fault("", status=403), Fault("", status=500)),
        *in_turn("ben", STORE, other_span, skip=1),
        *in_turn("ann", STORE, line(cut_at=100_000), Fault("", ignore_range=True), skip=DOWNLOAD),
        *in_turn("ben", STORE, line(flip_at=70_000), skip=DOWNLOAD),
        *in_turn("cat", STORE, line(stall_at=50_000, stall_s=30), line(length_by=-20_000), skip=DOWNLOAD),
    )
    _, record = go(subnet, attempts=4, timeout_s=1, silence_s=1)
    assert reasons(subnet, record) == dict.fromkeys(("ann", "ben", "cat"), "evaluated")
    assert set(subnet.hub.faults.hits()) == {1}
    told = Counter(event for event, _ in events)
    assert told["hub_retry"] >= 15
    assert told["download_cut"] >= 4
    assert (told["hub_limit"], told["wrong_bytes"]) == (1, 1), "a length that is too long and a forgotten Range do no harm"
    assert {"refused", "unavailable", "bug"}.isdisjoint(told)


def test_a_repository_that_changes_in_the_middle_of_a_round_has_its_reason_and_harms_nobody(subnet, model, events):
    """When their weights are asked for they are gone, private, gated and rewritten; of hal the Hub says nothing at all."""
    changes = {"dan": "delete", "eve": "private", "fay": "gated", "gus": "squash"}
    for seed, name in enumerate(("ann", *changes, "hal")):
        subnet.publish(name, model(seed=seed, **WIDE))
    subnet.next_window()
    now = [Fault(STORE.format(name), DOWNLOAD, 1, change, wire=Wire(drop=True)) for name, change in changes.items()]
    subnet.hub.faults.set(*now, Fault("/hal/", status=502))
    with pytest.raises(Unavailable, match="1 models could not be looked at"):
        go(subnet)
    said = sorted(sentence for event, sentence in events if event == "refused")
    assert [reason.sentence in one for reason, one in zip(GONE, said, strict=True)] == [True] * 4
    subnet.hub.faults.set()
    events.clear()
    _, record = go(subnet)
    assert reasons(subnet, record) == {
        "ann": "evaluated", "dan": "repository_gone", "eve": "repository_gone", "fay": "repository_closed",
        "gus": "revision_gone", "hal": "evaluated",
    }  # fmt: skip
    assert [event for event, _ in events].count("fetched") == 1, "what was measured is known"
    assert compare(record, recompute(record)) is None


GONE = (Reason.REPOSITORY_GONE, Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED, Reason.REVISION_GONE)


def test_a_miner_who_never_answers_holds_up_two_rounds_and_no_more(subnet, model, events):
    """Each for a quarter of the window; after that the others do not wait for it, and after a week it is excused again."""
    subnet.publish("ann", model(seed=1))
    subnet.publish("hal", model(seed=2))
    subnet.hub.faults.set(Fault("/hal/", status=502))
    for _ in range(2):
        subnet.next_window()
        for _ in range(2):
            with pytest.raises(Unavailable, match="1 models could not be looked at"):
                go(subnet)
        subnet.ledger.advance(WINDOW // 4)
        _, record = go(subnet)
        assert reasons(subnet, record) == {"ann": "evaluated", "hal": "unavailable"}
    for _ in range(2):
        subnet.next_window()
        store, record = go(subnet)
        assert reasons(subnet, record) == {"ann": "evaluated", "hal": "unavailable"}
    since, head = EXCUSED_BLOCKS, subnet.ledger.head()
    assert len({row.round for row in store.unanswered(since=head - since, before=head)}) == 4
    subnet.ledger.advance(EXCUSED_BLOCKS + WINDOW)
    subnet.next_window()
    go(subnet)  # the round before, which is past its quarter
    with pytest.raises(Unavailable, match="1 models could not be looked at"):
        go(subnet)


def test_a_round_does_not_wait_for_a_model_that_is_tried_again_in_the_next_one(subnet, model, events):
    subnet.publish("ann", model(seed=1))
    subnet.next_window()
    _, record = go(subnet, evaluation_deadline_s=0.005)
    assert reasons(subnet, record) == {"ann": "unavailable"}
    subnet.next_window()
    _, record = go(subnet, evaluation_deadline_s=0.005)
    assert reasons(subnet, record) == {"ann": "deadline"}


def test_who_had_a_place_in_vain_twice_keeps_it_from_no_newcomer(subnet, model):
    """One place for the paid, one for the new; the older of the two new ones was never brought to an end before."""
    path = subnet.folder / "competitions" / "c00.yaml"
    path.write_text(path.read_text().replace("keep: 4, pending: 4", "keep: 1, pending: 1"))
    subnet.publish("ann", model(seed=1))
    subnet.next_window()
    go(subnet)
    hal = subnet.publish("hal", model(seed=2))
    subnet.publish("ben", model(seed=3))
    rows = [Unanswered(hal.hotkey, str(hal.model), block, placed=True) for block in (10, 20)]
    subnet.next_window()
    for state, vain, expected in (("two", rows, "ben"), ("one", rows[:1], "hal")):
        shutil.copytree(subnet.folder / "state", subnet.folder / state)
        Store(subnet.folder / state / "store.db").keep_unanswered(vain, forget_before=0)
        _, record = go(subnet, state)
        assert {n for n, r in reasons(subnet, record).items() if r == "evaluated"} == {"ann", expected}


class BrokenHub(Hub):
    """Has a bug that one miner's files bring up."""

    def stream(self, repo, path, **more):
        return 1 // 0 if repo.namespace == "hal" else super().stream(repo, path, **more)


def test_a_bug_in_the_measuring_of_one_model_stops_no_other(subnet, model, events):
    subnet.publish("hal", model(seed=1))
    subnet.publish("ann", model(seed=2))
    subnet.next_window()
    subnet.ledger.advance(WINDOW // 4)
    _, record = go(subnet, hub_kind=BrokenHub)
    assert reasons(subnet, record) == {"ann": "evaluated", "hal": "unavailable"}
    assert [event for event, _ in events].count("bug") == 1


def test_what_a_killed_evaluation_left_is_gone_after_a_round(subnet, model):
    left = subnet.folder / "state" / "evaluations" / "sn29-evaluation-abc"
    left.mkdir(parents=True)
    (left / "job.json").write_text("texts of a window")
    subnet.publish("ann", model(seed=1))
    subnet.next_window()
    go(subnet)
    assert list(left.parent.iterdir()) == []


def test_what_makes_a_model_unfit_is_decided_over_the_whole_window():
    lost = Loss("a", float("inf"), 3, "round_trip")
    good = Loss("b", 10.0, 3, "")
    assert unfit([lost, good], 1) is None
    assert unfit([lost, lost, good], 1).reason is Reason.ROUND_TRIP
    assert unfit([lost], 1).reason is Reason.NOT_FINITE
    assert unfit([], 1) is None


def test_a_share_of_the_samples_may_have_no_loss_and_no_more():
    none, long, good = (Loss("a", float("inf"), 3, reason) for reason in ("not_finite", "too_long", ""))
    good = replace(good, nats=10.0)
    assert unfit([*[none] * 75, *[long] * 75, *[good] * 1350], 3, 0.1) is None
    broken = unfit([*[none] * 76, *[long] * 75, *[good] * 1349], 3, 0.1)
    assert (broken.reason, broken.limit) == (Reason.NOT_FINITE, "at most 10.0% of the samples (limits.unscored)")
    assert broken.got == "76 samples with no finite loss and 75 of too many tokens, of 1,500"
    assert unfit([*[long] * 151, *[good] * 1349], 3, 0.1).reason is Reason.TOKENIZER
    shared = unfit([*[long] * 1000, *[good] * 500], 3, 0.1, own_tokenizer=False)
    assert shared is None, "too long under the competition's tokenizer is too long for everybody"
    assert unfit([none, *[good] * 1499], 3, 0.0).reason is Reason.NOT_FINITE


def test_a_competition_with_a_mechanism_of_its_own_is_paid_by_that_alone(subnet, model):
    """c00 and c01, each all of its mechanism: one round, two rows on chain, one record that replays."""
    subnet.ledger.set_params(mechanisms=2)
    rules = subnet.folder / "competitions" / "c00.yaml"
    (rules.parent / "c01.yaml").write_text(rules.read_text() + "mechanism: 1\n")
    subnet.publish("ann", model(seed=1))
    subnet.publish("ben", model(seed=2), competition="c01")
    subnet.next_window()
    store, record = go(subnet)
    ann, ben = subnet.hotkey("ann"), subnet.hotkey("ben")
    assert {m: dict(w.by_hotkey) for m, w in record.weights.items()} == {0: {ann: 1.0}, 1: {ben: 1.0}}
    assert compare(record, recompute(record)) is None
    assert store.weights() == record.weights

    async def story() -> list[dict[str, float]]:
        async with subnet.chain("validator") as chain:
            assert all(step.settled for step in (await Publisher(chain, store).look()).values())
            return [await chain.weights(chain.hotkey, mechid=m) for m in (0, 1)]

    assert asyncio.run(story()) == [{ann: 1.0}, {ben: 1.0}]


def test_weights_that_were_taken_over_with_a_record_are_not_set(subnet):
    store = Store(subnet.folder / "state" / "store.db")
    subnet.wallet("ann")
    theirs, ours = (Weights(block, {subnet.hotkey("ann"): 1.0}) for block in (10, 20))
    store.begin(empty(10, theirs), (), {"content": (5, subnet.hotkey("ann"))}, {})
    assert (store.weights(), store.last_finished(), len(store.claims())) == ({0: theirs}, 10, 1)
    subnet.next_window()

    async def story() -> list[dict[int, Step]]:
        async with subnet.chain("validator") as chain:
            of_theirs = await Publisher(chain, store).look()
            store.open_round(20, {})
            store.finish_round(20, empty(20, ours), {0: ours})
            return [of_theirs, await Publisher(chain, store).look()]

    assert asyncio.run(story()) == [{}, {0: Step.STANDS}]


def empty(block: int, weights: Weights) -> RoundRecord:
    """The record of a round without a competition."""
    return RoundRecord(Head(block, "0x" + "0" * 64), {}, (), {}, (), {}, {0: weights}, {}, {})


# --- submission -------------------------------------------------------------------------------------------------------


def test_a_model_is_private_until_its_commitment_stands(subnet, model):
    """The Hub's own log: nobody but the owner is served a file of the repository before the commitment's block."""
    hub = Hub(subnet.hub.endpoint, token=subnet.hub.add_user("ann"))
    competition = subnet.rules().at("c00", 0)

    async def story() -> Commitment:
        async with subnet.chain("ann") as chain:
            return await submit(chain, hub, model(seed=1), "ann/model", competition, None)

    subnet.wallet("ann")
    commitment = asyncio.run(story())
    assert Hub(subnet.hub.endpoint).listing(commitment.model).files
    asked = [(row.method, row.path) for row in subnet.hub.served]
    opened = max(i for i, (method, path) in enumerate(asked) if method == "PUT" and path.endswith("/settings"))
    uploaded = max(i for i, (method, path) in enumerate(asked) if "/commit/" in path)
    assert uploaded < opened
    assert asyncio.run(story()) == commitment, "a submission that is repeated changes nothing"


def test_a_model_that_breaks_a_rule_is_neither_committed_nor_shown(subnet, model):
    hub = Hub(subnet.hub.endpoint, token=subnet.hub.add_user("ann"))
    competition = subnet.rules().at("c00", 0)
    subnet.wallet("ann")

    async def story() -> None:
        async with subnet.chain("ann") as chain:
            await submit(chain, hub, model(seed=1, hidden_size=64, intermediate_size=256), "ann/model", competition, None)

    with pytest.raises(Rejected) as refused:
        asyncio.run(story())
    assert refused.value.reason is Reason.PARAMETERS

    async def standing() -> tuple:
        async with subnet.chain("ann") as chain:
            return await chain.commitments()

    assert asyncio.run(standing()) == ()
    with pytest.raises(Rejected) as hidden:
        Hub(subnet.hub.endpoint).resolve("ann/model")
    assert hidden.value.reason in (Reason.REPOSITORY_GONE, Reason.REPOSITORY_CLOSED)


def test_the_same_samples_are_drawn_for_every_validator(subnet):
    data = LocalFolder(subnet.folder / "competitions" / "text")
    one, two = (draw(data, "*.parquet", "text", 8, 200, block_hash="0xab", competition="c00", window=3) for _ in range(2))
    assert one == two
