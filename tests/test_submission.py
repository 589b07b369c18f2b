"""A miner's submission on a real chain and a real Hub: against front-runners, forks, failures and kill -9."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import submitting
from recorded import losses, refused, round_record
from submitting import NETUID, WatchedChain, WatchedHub
from test_round import RULES, WINDOW, Subnet, go, reasons, subnet  # noqa: F401  (one of them is a fixture)

from sn29 import record_files, telemetry
from sn29.errors import Reason, Rejected, Unavailable
from sn29.explain import Passage
from sn29.hub import Hub
from sn29.localnet.hub import LoopbackHub
from sn29.localnet.ledger import Call, Included, Ledger, LedgerSubstrate
from sn29.models import checkpoint
from sn29.records import Commitment, ModelId, Sealed
from sn29.rules.competition import Competition, parse_competition
from sn29.store import Store
from sn29.submission import follow_up, named_in, submit, verdict


@contextmanager
def world(folder: Path, *, block_seconds: float = 0.05, finality_lag: int = 3) -> Iterator[Subnet]:
    """A subnet without validators."""
    ledger = Ledger.create(
        folder / "chain.db", netuid=NETUID, block_seconds=block_seconds, tempo=100_000, finality_lag=finality_lag
    )
    with LoopbackHub(folder / "hub") as hub:
        yield Subnet(folder, hub, ledger, None)  # nothing is evaluated
    ledger.close()


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Subnet]:
    with world(tmp_path) as subnet:  # noqa: F811
        yield subnet


def rules() -> Competition:
    return parse_competition("c00", RULES)


def nothing(_: str) -> None: ...


def submitted(
    subnet: Subnet,  # noqa: F811
    name: str,
    folder: Path,
    turn: Callable[[str], None] = nothing,
    *,
    sealed: bool = False,
    competition: Competition | None = None,
    substrate: Any = None,
) -> Commitment:
    """The miner's submission; `turn` is called between its steps."""
    hub = WatchedHub(subnet.hub.endpoint, subnet.hub.add_user(name), turn)

    async def story() -> Commitment:
        async with WatchedChain(subnet.folder / "chain.db", subnet.wallet(name), turn, substrate) as chain:
            return await submit(chain, hub, folder, f"{name}/model", competition or rules(), None, sealed=sealed)

    return asyncio.run(story())


def on_chain(subnet: Subnet, name: str) -> bytes | None:  # noqa: F811
    """What the hotkey has on chain at the head."""

    async def ask() -> bytes | None:
        async with subnet.chain(name) as chain:
            return next((c.data for c in await chain.commitments() if c.hotkey == chain.hotkey), None)

    return asyncio.run(ask())


def write(subnet: Subnet, name: str, data: bytes) -> None:  # noqa: F811
    """Takes a commitment into the next block, whatever it is."""
    key, ledger = subnet.wallet(name).hotkey, subnet.ledger
    fields = [{f"Raw{len(data)}": "0x" + data.hex()}]
    call = Call("Commitments", "set_commitment", {"netuid": NETUID, "info": {"fields": fields}})
    nonce = ledger.next_nonce(key.ss58_address)
    assert ledger.submit(call, key.ss58_address, nonce, key.sign(ledger.payload(call, nonce))).error is None


def is_public(subnet: Subnet, repo: str) -> bool:  # noqa: F811
    try:
        Hub(subnet.hub.endpoint).resolve(repo)
    except Rejected:
        return False
    return True


def public_upload(subnet: Subnet, name: str, folder: Path, turn: Callable[[str], None]) -> Commitment:  # noqa: F811
    """What a naive miner does before it commits: a public upload. The commitment that it is going to make."""
    hub = WatchedHub(subnet.hub.endpoint, subnet.hub.add_user(name), turn)
    hub.create(f"{name}/model")
    found = ModelId(name, "model", hub.upload(f"{name}/model", folder, message="model"))
    digest = checkpoint.digest(checkpoint.content_id(hub.listing(found).files), subnet.hotkey(name))
    return Commitment(subnet.hotkey(name), 0, found, digest, "c00")


def judged(subnet: Subnet, state: str = "state", *, late: bool = False) -> dict[str, str]:  # noqa: F811
    """What the next window's round (late: the last one's) makes of each miner: `owner` of its model, or why not.

    Whose a model is, is decided before it is downloaded: the validator has no room for that here, which spares the test
    the evaluation, and an owner is one whose download was put off.
    """
    if not late:
        subnet.next_window()
    subnet.ledger.advance(WINDOW // 4)  # the round is closed over what could not be looked at
    store, record = go(subnet, state, models_dir=subnet.folder / "chain.db" / "no folder")
    store.close()
    return {name: "owner" if reason == "unavailable" else reason for name, reason in reasons(subnet, record).items()}


class FrontRunner:
    """Watches a miner on chain and Hub and commits to the same model as soon as it can, in the very next block."""

    def __init__(self, subnet: Subnet, name: str, victim: str) -> None:  # noqa: F811
        subnet.wallet(name)
        self.subnet, self.name, self.victim = subnet, name, victim
        self.hub = Hub(subnet.hub.endpoint, attempts=1)
        self.copied = b""

    def turn(self, _: str) -> None:
        """Takes the files' digest for its own hotkey where it can see the files, else whatever its victim has on chain."""
        head = self.subnet.ledger.head()
        victim = self.subnet.hotkey(self.victim)
        standing = self.subnet.ledger.read(head, lambda state: state.get("Commitments.CommitmentOf", NETUID, victim))
        try:
            found = ModelId(self.victim, "model", self.hub.resolve(f"{self.victim}/model"))
            digest = checkpoint.digest(checkpoint.content_id(self.hub.listing(found).files), self.subnet.hotkey(self.name))
            data = Commitment(self.subnet.hotkey(self.name), 0, found, digest, "c00").encode()
        except Rejected:
            ((_, text),) = standing["info"]["fields"][0].items() if standing else (("", "0x"),)
            data = bytes.fromhex(text.removeprefix("0x"))
        if data and data != self.copied:
            self.copied = data
            write(self.subnet, self.name, data)
        self.subnet.ledger.advance(1)


# --- front-runners ----------------------------------------------------------------------------------------------------


def test_a_front_runner_beats_a_public_upload_and_nothing_else(subnet, model):  # noqa: F811
    """One thief a miner, each with a turn and a block after every step of its victim; one validator judges them all."""
    thieves = {name: FrontRunner(subnet, f"thief_of_{name}", name) for name in ("plain", "private", "sealed")}
    commitment = public_upload(subnet, "plain", model(seed=1), thieves["plain"].turn)
    write(subnet, "plain", commitment.encode())
    submitted(subnet, "private", model(seed=2), thieves["private"].turn)
    submitted(subnet, "sealed", model(seed=3), thieves["sealed"].turn, sealed=True)
    for thief in thieves.values():
        thief.turn("the end")
        assert thief.copied.startswith(thief.victim.encode() + b":model:"), "it saw the files in the end"
    assert judged(subnet) == {
        "plain": "copy", "thief_of_plain": "owner",
        "private": "owner", "thief_of_private": "copy",
        "sealed": "owner", "thief_of_sealed": "copy",
    }  # fmt: skip


def test_what_a_sealed_miner_shows_at_which_step(quick, model):
    """The order of the steps, and what can be seen by others after each of them."""
    seen: list[tuple[str, str, bool]] = []
    quick.wallet("ann")

    def turn(step: str) -> None:
        if step != "look":
            standing = quick.ledger.read(
                quick.ledger.head(), lambda s: s.get("Commitments.CommitmentOf", NETUID, quick.hotkey("ann"))
            )
            text = "" if standing is None else bytes.fromhex(next(iter(standing["info"]["fields"][0].values()))[2:]).decode()
            seen.append((step, text.partition(":")[0], is_public(quick, "ann/model")))

    commitment = submitted(quick, "ann", model(seed=1), turn, sealed=True)
    assert seen == [
        ("create", "", False), ("hide", "", False), ("upload", "", False), ("seal", "sealed", False),
        ("commit", "ann", False), ("show", "ann", True),
    ]  # fmt: skip
    assert on_chain(quick, "ann") == commitment.encode()
    assert quick.ledger.finalized() >= commitment.block
    assert quick.ledger.next_nonce(quick.hotkey("ann")) == 2, "a seal and a commitment were written"


def test_a_fork_that_takes_the_commitment_away_shows_nothing(tmp_path, model):
    """What is shown once a commitment is included can be stolen when its block is replaced; shown once it is final, not."""
    with world(tmp_path, block_seconds=0.2, finality_lag=12) as forking:
        folder, fork = model(seed=1), Fork(forking, "ann")
        with pytest.raises(Unavailable, match="the chain does not show it"):
            submitted(forking, "ann", folder, fork.turn)
        assert fork.undone is not None, "the commitment was undone"
        assert not is_public(forking, "ann/model")
        assert on_chain(forking, "ann") is None
        again = submitted(forking, "ann", folder)
        assert on_chain(forking, "ann") == again.encode()
        assert is_public(forking, "ann/model")


def test_a_fork_that_moves_the_commitment_to_a_later_block_is_followed(tmp_path, model):
    with world(tmp_path, block_seconds=0.2, finality_lag=12) as forking:
        fork = Fork(forking, "ann", again=True)
        commitment = submitted(forking, "ann", model(seed=1), fork.turn)
        assert commitment.block > fork.included_at
        assert forking.ledger.finalized() >= commitment.block
        assert on_chain(forking, "ann") == commitment.encode()


class Fork:
    """Replaces the block of a miner's first commitment once it is included, long before it is final."""

    def __init__(self, subnet: Subnet, name: str, *, again: bool = False) -> None:  # noqa: F811
        self.subnet, self.hotkey, self.again = subnet, subnet.hotkey(name), again
        """again: the commitment is included once more, in a later block."""
        self.undone: Included | None = None
        self.included_at = 0

    def turn(self, _: str) -> None:
        ledger = self.subnet.ledger
        head = ledger.head()
        standing = ledger.read(head, lambda state: state.get("Commitments.CommitmentOf", NETUID, self.hotkey))
        if self.undone is None and standing is not None:
            self.included_at = standing["block"]
            (self.undone,) = ledger.fork(head - self.included_at + 1)
            if self.again:
                ledger.include(self.undone.call, self.undone.signer, self.undone.nonce)


# --- what validators remember -----------------------------------------------------------------------------------------


def test_a_seal_that_a_validator_saw_keeps_its_block_across_a_restart(subnet, model):  # noqa: F811
    """Files that leak after the seal help nobody against a validator that saw it; one that came later cannot know."""
    leaked = FrontRunner(subnet, "thief", "ann")
    subnet.wallet("ann")
    subnet.ledger.advance(WINDOW // 2)
    commitment = public_upload(subnet, "ann", model(seed=1), nothing)
    write(subnet, "ann", Sealed(commitment.hotkey, 0, commitment.digest, "c00").encode())
    subnet.ledger.advance(1)
    leaked.turn("leaked")
    assert judged(subnet, "saw") == {"ann": "sealed", "thief": "owner"}
    write(subnet, "ann", commitment.encode())  # erases the seal, and its block, from the chain
    assert judged(subnet, "saw") == {"ann": "owner", "thief": "copy"}
    assert judged(subnet, "late", late=True) == {"ann": "copy", "thief": "owner"}


def test_the_block_of_a_commitment_that_was_repeated_is_remembered(subnet, model):  # noqa: F811
    """Also if nobody could look at the files before the chain forgot it: a digest has one hotkey and one model."""
    subnet.wallet("ann")
    subnet.ledger.advance(WINDOW // 2)
    commitment = public_upload(subnet, "ann", model(seed=1), nothing)
    write(subnet, "ann", commitment.encode())
    subnet.ledger.advance(1)
    first = subnet.ledger.head()
    hub = Hub(subnet.hub.endpoint, token=subnet.hub.add_user("ann"))
    hub.set_private("ann/model", True)
    assert judged(subnet) == {"ann": "repository_gone"}
    hub.set_private("ann/model", False)
    write(subnet, "ann", commitment.encode())
    assert judged(subnet) == {"ann": "owner"}
    store = Store(subnet.folder / "state" / "store.db")
    assert set(store.claims().values()) == {(first, commitment.hotkey)}
    store.close()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_submission_that_is_repeated_hides_and_writes_nothing(quick, model):
    folder = model(seed=1)
    quick.wallet("ann")
    commitment = submitted(quick, "ann", folder)
    steps: list[str] = []
    assert submitted(quick, "ann", folder, steps.append) == commitment
    assert set(steps) == {"look"}
    assert quick.ledger.next_nonce(quick.hotkey("ann")) == 1


def test_an_update_that_breaks_a_rule_leaves_what_stands_in_sight(quick, model):
    quick.wallet("ann")
    commitment = submitted(quick, "ann", model(seed=1))
    steps: list[str] = []
    with pytest.raises(Rejected) as refused:
        submitted(quick, "ann", model(seed=2, hidden_size=64, intermediate_size=256), steps.append)
    assert refused.value.reason is Reason.PARAMETERS
    assert set(steps) <= {"look"}, "it is refused before anything is hidden or uploaded"
    assert Hub(quick.hub.endpoint).listing(commitment.model).files
    assert on_chain(quick, "ann") == commitment.encode()


def test_an_update_that_cannot_be_committed_stays_private_until_it_is(quick, model):
    """The files are on the Hub and nobody has claimed them: whoever saw them now could."""
    quick.wallet("ann")
    first = submitted(quick, "ann", model(seed=1))
    for _ in range(30):  # the room of an epoch, in commitments
        write(quick, "ann", first.encode())
    update = model(seed=2)
    why = "SpaceLimitExceeded|the chain does not show it"  # the latter where the answer came after our deadline
    with pytest.raises(Unavailable, match=why):
        submitted(quick, "ann", update)
    assert not is_public(quick, "ann/model")
    quick.ledger.advance(100_001)
    second = submitted(quick, "ann", update)
    assert is_public(quick, "ann/model")
    assert second.model != first.model


def test_too_long_a_name_is_said_before_anything_is_uploaded(quick, model):
    quick.wallet("ann")
    hub = WatchedHub(quick.hub.endpoint, quick.hub.add_user("ann"), pytest.fail)

    async def story() -> None:
        async with quick.chain("ann") as chain:
            await submit(chain, hub, model(seed=1), f"ann/{'m' * 40}", rules(), None)

    with pytest.raises(Rejected, match="bytes"):
        asyncio.run(story())


@pytest.mark.parametrize(("rule", "lost"), [("oldest_holder", "the age of its claim"), ("champion", "the crown")])
def test_a_hotkey_that_is_paid_is_warned_before_it_gives_its_place_up(quick, model, tmp_path, rule, lost):
    text = (
        RULES
        if rule == "oldest_holder"
        else RULES[: RULES.index("scoring:")] + "scoring: {rule: champion}\npool: {keep: 4, pending: 4}\n"
    )
    competition = parse_competition("c00", text)
    quick.wallet("ann")
    submitted(quick, "ann", model(seed=1), competition=competition)
    log = tmp_path / "log.jsonl"
    telemetry.configure(level="WARNING", file=log)
    try:
        submitted(quick, "ann", model(seed=2), competition=competition)
        assert not log.exists() or "paid" not in log.read_text(), "it was not paid"
        submitted(quick, "ann", model(seed=3), competition=competition, substrate=Paid(quick.folder / "chain.db"))
    finally:
        telemetry.configure(level="CRITICAL")
    (event,) = (json.loads(line) for line in log.read_text().splitlines())
    assert event["event"] == "paid"
    assert lost in event["message"]
    assert "another hotkey" in event["message"]


class Paid(LedgerSubstrate):
    """A chain that pays everybody: the ledger computes no rewards."""

    async def runtime_call(self, api: str, method: str, params: list[Any], block_hash: str | None = None) -> Any:
        found = await super().runtime_call(api, method, params, block_hash)
        return found | {"incentives": [1000] * found["num_uids"]} if method == "get_metagraph" else found


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_a_sealed_submission_killed_between_any_two_steps_ends_the_same(tmp_path, model):
    """Six steps, a miner killed after each of them and started again; and one that is killed after all of them in turn."""
    with world(tmp_path) as killing:
        deaths = {f"after{n}": [n] for n in range(1, 7)} | {"often": [3, 4, 5, 5]}
        miners = {}
        for name, after in deaths.items():
            killing.wallet(name)
            miners[name] = {"token": killing.hub.add_user(name), "deaths": after}
        asked = {
            "chain": str(tmp_path / "chain.db"), "wallets": str(tmp_path / "wallets"), "hub": killing.hub.endpoint,
            "rules": RULES, "folder": str(model(seed=1)), "sealed": True, "miners": miners,
        }  # fmt: skip
        subprocess.run([sys.executable, submitting.__file__], input=json.dumps(asked), text=True, check=True, timeout=120)
        for name in deaths:
            data = on_chain(killing, name)
            commitment = Commitment.parse(killing.hotkey(name), 0, data)
            files = Hub(killing.hub.endpoint).listing(commitment.model).files
            assert commitment.digest == checkpoint.digest(checkpoint.content_id(files), killing.hotkey(name))
            assert killing.ledger.next_nonce(killing.hotkey(name)) == 2, "one seal and one commitment, neither of them twice"


# --- afterwards -------------------------------------------------------------------------------------------------------


def test_what_became_of_a_commitment_is_the_newest_record_that_names_it(tmp_path):
    first = round_record(360, losses(50, 1, ann=(0.0, 0.0)), {"ann": 5}, others=[refused("bob", 7)])
    second = round_record(720, losses(50, 2, ann=(0.0, 0.0), eve=(-0.2, 0.01)), {"ann": 5, "eve": 600}, before=first)
    third = round_record(1080, losses(50, 3, eve=(-0.2, 0.01)), {"eve": 600}, before=second)
    records = (first, second, third)
    model = first.competitions["c00"].models[0].outcome.model
    found = named_in(records, "ann", model)
    assert found is not None
    assert (found.block, found.place, found.num_models) == (720, 2, 2)
    assert verdict(found).startswith("round of block 720, c00: accepted, ")
    assert verdict(found).endswith("50 samples, place 2 of 2, 0.00% of the competition's reward")
    assert named_in(records, "ann", model.replace("a" * 40, "c" * 40)) is None, "another revision is another commitment"
    no = named_in(records, "bob", f"bob/model@{'b' * 40}")
    assert no is not None
    assert verdict(no).startswith("round of block 360, c00: refused: bob: the number of parameters is outside ")
    assert verdict(no).endswith("(got 9, rule at most 8)")


def test_a_commitment_that_nobody_could_look_at_is_not_named_yet():
    gone = replace(
        refused("ann", 7), outcome=replace(refused("ann", 7).outcome, status="unavailable", reason="", detail="no answer")
    )
    waits = replace(
        refused("bob", 7), outcome=replace(refused("bob", 7).outcome, status="waiting", reason="waiting", detail="no place")
    )
    record = round_record(360, losses(50, 1, eve=(0.0, 0.0)), {"eve": 5}, others=[gone, waits])
    assert named_in((record,), "ann", f"ann/model@{'b' * 40}") is None
    found = named_in((record,), "bob", f"bob/model@{'b' * 40}")
    assert found is not None
    assert verdict(found) == "round of block 360, c00: waiting: no place"


@pytest.mark.parametrize("comes", [True, False])
def test_a_submission_is_followed_until_a_record_names_it_or_the_windows_are_over(quick, tmp_path, comes):
    """Records of windows before the commitment's own do not count, nor do those of others."""
    records = tmp_path / "records"
    quick.wallet("ann")
    ann = Commitment("ann", 400, ModelId("ann", "model", "a" * 40), "digest", "c00")
    record_files.write(records, round_record(360, losses(50, 1, ann=(0.0, 0.0)), {"ann": 5}))
    quick.ledger.advance(400)
    looks: list[str] = []

    def turn(step: str) -> None:
        looks.append(step)
        if len(looks) == 1:
            raise Unavailable("the node", "no answer")  # and is asked again
        if len(looks) == 2:
            name = "ann" if comes else "bob"
            record_files.write(records, round_record(720, losses(50, 2, **{name: (0.0, 0.0)}), {name: 400}))
        quick.ledger.advance(200)

    async def story() -> Passage | None:
        async with WatchedChain(quick.folder / "chain.db", quick.wallet("ann"), turn) as chain:
            return await follow_up(chain, records, ann, window_blocks=360, windows=2, poll_s=0.01)

    found = asyncio.run(story())
    if comes:
        assert found is not None
        assert found.block == 720
        assert 2 <= len(looks) <= 5, "from the second on it is there, at block 720 it is believed"
    else:
        assert found is None
        assert 5 <= len(looks) <= 8, "blocks 720 to 1440, at 200 a look"


def test_a_submission_that_waits_for_a_place_is_followed_on(quick, tmp_path):
    records = tmp_path / "records"
    quick.wallet("ann")
    ann = Commitment("ann", 400, ModelId("ann", "model", "b" * 40), "digest", "c00")
    blocks = [720, 1080, 1440]
    quick.ledger.advance(2000)

    def turn(_: str) -> None:
        block = blocks.pop(0)
        no, reason = refused("ann", 400), "waiting" if blocks else "out_of_reach"
        waits = replace(no, outcome=replace(no.outcome, status="waiting", reason=reason, detail="no place"))
        record_files.write(records, round_record(block, losses(50, 2, bob=(0.0, 0.0)), {"bob": 400}, others=[waits]))

    async def story() -> Passage | None:
        async with WatchedChain(quick.folder / "chain.db", quick.wallet("ann"), turn) as chain:
            return await follow_up(chain, records, ann, window_blocks=360, windows=5, poll_s=0.01)

    found = asyncio.run(story())
    assert found is not None
    assert (found.block, found.outcome.reason) == (1440, "out_of_reach")
