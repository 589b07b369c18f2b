"""Which rules judge which round, on a real store; and two validators that get new files in the middle of a window."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import re
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_round import RULES, WINDOW, Subnet, subnet

from neurons.adapters import RulesReader, Tokenizers, dataset_of, parse_texts, read_texts
from neurons.validator import NotedRules, _rounds
from sn29 import rules
from sn29.changeover import due, note, software
from sn29.errors import Reason, Rejected
from sn29.examination import Machine, Ports, Rules
from sn29.hub import Hub
from sn29.records import Head
from sn29.round import Plan, plan_round, run_round
from sn29.round_record import RoundRecord
from sn29.settings import ValidatorSettings, read
from sn29.store import Store

__all__ = ["subnet"]
OLD = {"c00.yaml": RULES}
NEW = {"c00.yaml": RULES.replace("group: 1", "group: 2")}
THIRD = {**OLD, "c01.yaml": RULES.replace("reward_share: 1", "reward_share: 0")}
HERE = {"rules": "1", "torch": "2.13.0"}
UPGRADED = {"rules": "2", "torch": "2.13.0"}


def parse(texts: Mapping[str, str]) -> Rules:
    read = parse_texts(texts)
    return Rules(read.files, read.hall_of_fame, read.hashes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.db")


def judged(store: Store, block: int, texts=OLD, running=HERE, said=None) -> tuple[str, int, int | None] | None:
    """(texts of the rules that judge the round which is due at a final block, since, last), after a look with these."""
    note(store, block, texts, running, parse)
    found = due(store, block, running, 2, parse, set() if said is None else said)
    if found is None:
        return None
    names = {tuple(sorted(parse(t).hashes.items())): n for n, t in (("old", OLD), ("new", NEW), ("third", THIRD))}
    return names[tuple(sorted(found.rules.hashes.items()))], found.since, found.last


def finish(store: Store, block: int) -> None:
    store.open_round(block, {"rules": dict(parse(OLD).hashes)})
    store.finish_round(block, RoundRecord(Head(block, "0x" + "0" * 64), {}, (), {}, (), {}, {}, {}, {}), {})


def test_the_first_rules_hold_from_the_start(store):
    assert judged(store, 2500) == ("old", 0, None)
    assert judged(store, 2600) == ("old", 0, None)
    assert len(store.rules_kept()) == 1


def test_new_files_inside_a_window_hold_from_the_next_one_on(store, events):
    assert judged(store, 2010) == ("old", 0, None)
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    for block in (2500, 2600, 2999):
        assert judged(store, block, NEW) == ("old", 0, 2999), "restarted or not, the round that is open is ended as it was begun"
    sentences = [sentence for event, sentence in events if event == "rules"]
    assert sentences == [
        "new rules (c00.yaml has another text) take effect from block 3000 on: earlier rounds are judged as before"
    ]
    finish(store, 2000)
    assert judged(store, 2999, NEW) == ("old", 0, 2999), "nothing is due, and nothing by the new ones"
    assert judged(store, 3000, NEW) == ("new", 3000, None)
    finish(store, 3000)
    assert judged(store, 3500, THIRD) == ("new", 3000, 3999)
    assert [kept.since for kept in store.rules_kept()] == [3000, 4000], "of what is over only the newest is kept"


def test_a_round_that_was_missed_is_judged_by_what_held_at_its_block(store):
    judged(store, 1010)
    finish(store, 1000)
    judged(store, 2010)
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    judged(store, 2500, NEW)
    assert judged(store, 3100, NEW) == ("old", 0, 2999)
    finish(store, 2000)
    assert judged(store, 3100, NEW) == ("new", 3000, None)


@pytest.mark.parametrize("catch_up", [1, 2])
def test_a_round_that_catch_up_leaves_out_stays_out_whatever_would_judge_it(store, catch_up):
    """New files came while a round was open; the machine was off for twenty windows then."""
    judged(store, 1010)
    finish(store, 1000)
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    assert judged(store, 2500, NEW) == ("old", 0, 2999)
    note(store, 23_500, NEW, HERE, parse)
    found = due(store, 23_500, HERE, catch_up, parse, set())
    assert (found.rules.hashes, found.since, found.last) == (parse(NEW).hashes, 3000, None)


def test_what_is_taken_back_before_its_block_never_held(store, events):
    judged(store, 1010)
    finish(store, 1000)
    judged(store, 2010)
    store.open_round(2000, {})
    judged(store, 2500, NEW)
    assert judged(store, 2600, OLD) == ("old", 0, None)
    assert [kept.since for kept in store.rules_kept()] == [0]
    assert judged(store, 3500, OLD) == ("old", 0, None)
    judged(store, 3600, NEW)
    assert judged(store, 3700, THIRD) == ("old", 0, 3999), "of two changes in a window the later one holds"
    assert judged(store, 4000, THIRD) == ("old", 0, 3999), "the round before it is still open"
    finish(store, 3000)
    assert judged(store, 4000, THIRD) == ("third", 4000, None)


@pytest.mark.parametrize("back", [3010, 3900, 9100])
def test_who_did_not_look_since_a_round_block_leaves_out_what_came_from_there_on(store, events, back):
    """Whether the others got the new files before its block or after it cannot be known, however short it was away."""
    judged(store, 2010)
    finish(store, 2000)
    judged(store, 2999)
    following = (back // 1000 + 1) * 1000
    assert judged(store, back, NEW) is None
    assert events == [
        (
            "rules",
            f"new rules (c00.yaml has another text) take effect from block {following} on: nobody looked here since block 3000,"
            " so what others judge by from there on is not known: that is left out",
        )
    ]
    assert [kept.since for kept in store.rules_kept()] == [0, following]
    assert judged(store, following, NEW) == ("new", following, None)
    finish(store, following)
    judged(store, following + 10, THIRD)
    assert [kept.since for kept in store.rules_kept(gaps=True)] == [following, following + 1000], "what is over is forgotten"


def test_who_was_away_goes_on_with_the_round_that_is_open_by_the_rules_that_it_was_begun_with(store):
    judged(store, 1010)
    finish(store, 1000)
    judged(store, 2010)
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    assert judged(store, 3010, NEW) == ("old", 0, 2999)
    finish(store, 2000)
    assert judged(store, 3500, NEW) is None, "3000 is left out"
    assert judged(store, 4000, NEW) == ("new", 4000, None)


def test_what_was_noted_for_a_block_that_passed_unseen_never_took_effect(store):
    """The others may have had the third files before it, or after it."""
    judged(store, 2010)
    finish(store, 2000)
    judged(store, 2500, NEW)
    assert judged(store, 3010, THIRD) is None
    assert [kept.since for kept in store.rules_kept(gaps=True)] == [0, 3000, 4000]
    assert judged(store, 4000, THIRD) == ("third", 4000, None)


@pytest.mark.parametrize("again", [OLD, THIRD])
def test_files_that_change_again_bring_no_round_back_that_is_left_out(store, again):
    judged(store, 2010)
    finish(store, 2000)
    assert judged(store, 3010, NEW) is None
    assert judged(store, 3020, again) is None
    assert judged(store, 3030, again) is None
    assert judged(store, 4000, again)[1:] == (4000, None)


def test_who_looked_all_the_time_was_here_though_busy_with_an_earlier_round(store):
    """Nothing but the look itself tells so: the round of 3000 was not opened yet."""
    judged(store, 1010)
    finish(store, 1000)
    judged(store, 2010)
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    written = []
    for block in range(2020, 3016):
        note(store, block, OLD, HERE, parse)
        written.append(store.looked())
    assert set(written) == {2010, 3000}, "one write a window"
    assert judged(store, 3016, NEW) == ("old", 0, 3999)


def test_who_looked_since_the_newest_round_block_judges_its_round_by_the_rules_of_before(store):
    judged(store, 2010)
    finish(store, 2000)
    judged(store, 3001)
    assert judged(store, 3010, NEW) == ("old", 0, 3999)


def test_with_windows_of_two_lengths_new_rules_hold_from_the_shorter_one_s_next_block_on(store):
    """Inside the longer window too: everywhere from the same block on."""
    both = {**OLD, "c01.yaml": THIRD["c01.yaml"].replace("window_blocks: 1000", "window_blocks: 3000")}
    assert both["c01.yaml"] != THIRD["c01.yaml"]
    for block in (3010, 4010):
        note(store, block, both, HERE, parse)
    note(store, 4500, {**both, **NEW}, HERE, parse)
    assert [kept.since for kept in store.rules_kept()] == [0, 5000], "c01's window is 3000 to 5999"


def test_other_software_waits_for_its_block_and_says_which(store, events):
    judged(store, 2010)
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    said: set[int] = set()
    for block in (2500, 2600):
        assert judged(store, block, running=UPGRADED, said=said) is None
    (sentence,) = [sentence for event, sentence in events if event == "rules_wait"]
    assert sentence == (
        "the window that is open was begun with other rules (rules 1 -> 2): this software judges from block 3000 on; until then"
        " the weights that stand are set again. To finish the window start the former software"
    )
    assert judged(store, 2700) == ("old", 0, None), "the former software finishes it"
    assert judged(store, 2800, running=UPGRADED) is None
    assert judged(store, 3000, running=UPGRADED) == ("old", 3000, None), "nobody waits for a round that it must not judge"


def test_software_that_comes_when_the_round_has_ended_waits_without_a_warning(store, events):
    judged(store, 2010)
    finish(store, 2000)
    assert judged(store, 2500, running=UPGRADED) is None
    assert judged(store, 3001, running=UPGRADED) == ("old", 3000, None)
    assert [event for event, _ in events] == ["rules"]


def test_a_round_that_an_older_sn29_opened_by_other_files_is_not_judged_by_these(store, events):
    store.open_round(2000, {"rules": dict(parse(NEW).hashes)})
    assert judged(store, 2500) == ("old", 3000, None)
    assert due(store, 2500, HERE, 2, parse, set()).since == 3000
    assert events == [("rules", "the window that is open was begun with other files: these hold from block 3000 on")]


def test_an_ancient_round_that_was_never_finished_skips_no_window(store, events):
    store.open_round(1000, {"rules": dict(parse(NEW).hashes)})
    finish(store, 8000)
    assert judged(store, 9100) == ("old", 0, None)
    assert events == []


def test_files_that_this_software_does_not_read_are_not_judged_by(store, events):
    note(store, 2010, {"c00.yaml": "no competition"}, HERE, lambda texts: parse(OLD))
    store.open_round(2000, {"rules": dict(parse(OLD).hashes)})
    with pytest.raises(Rejected):
        parse({"c00.yaml": "no competition"})
    said: set[int] = set()
    for block in (2500, 2600):
        assert judged(store, block, said=said) is None
    first, second = events
    assert first[1].endswith("take effect from block 3000 on: what is due before that, the former software judges")
    assert second[0] == "rules_wait"
    assert judged(store, 3000) == ("old", 3000, None)


def test_what_decides_a_bit_is_named():
    found = software()
    assert set(found) == {"rules", "engine", "torch", "transformers", "tokenizers", "numpy"}
    assert all(re.fullmatch(r"\d[0-9.a-z]*", one) for one in found.values()), "without the build: cu126 and cu128 are one code"


CODE = (1, "839913c9236553b2")
"""RULES_VERSION, and a digest of the code of sn29/rules as it was when that was last looked at."""


def test_a_change_of_the_rules_raises_their_version():
    """Every change of the code fails here once. Where the same commitments and losses come to other weights by it, or might,
    raise RULES_VERSION; then write both here."""
    folder = Path(rules.__file__).parent
    code = [(path.name, shape(ast.parse(path.read_text()))) for path in sorted(folder.glob("[!_]*.py"))]
    assert (rules.RULES_VERSION, hashlib.sha256(repr(code).encode()).hexdigest()[:16]) == CODE


def shape(node: Any) -> Any:
    """A syntax tree without comments and docstrings, the same in every Python: fields that are empty are left out."""
    if isinstance(node, ast.AST):
        fields = [(name, shape(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *(field for field in fields if field[1] != [])]
    if isinstance(node, list):
        return [shape(one) for one in node if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return repr(node)


# --- two validators ---------------------------------------------------------------------------------------------------


def turn(subnet: Subnet, state: str, texts: Mapping[str, str], running: Mapping[str, str], *, judge: bool = True) -> int | None:
    """What the validator's loop does once with these files; block of the round that it planned. It is run if `judge`."""
    store = Store(subnet.folder / state / "store.db")
    hub = Hub(subnet.hub.endpoint, timeout_s=20, attempts=1, pause_s=0.05)
    machine = Machine(subnet.folder / state / "models", subnet.folder / state / "records", "cpu", "float32", 1, 120, 60)

    async def once() -> int | None:
        async with subnet.chain("validator") as chain:
            folder = subnet.folder / "competitions"
            tokenizers = Tokenizers(hub, subnet.folder / state / "tokenizers")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            block = (await chain.finalized()).block
            note(store, block, texts, running, parse)
            found = due(store, block, running, 2, parse, set())
            if found is None:
                return None
            plan = await plan_round(ports, found.rules, catch_up=2, since=found.since, last=found.last)
            if plan is not None and judge:
                await run_round(ports, found.rules, plan)
            return plan.block if plan else None

    try:
        return asyncio.run(once())
    finally:
        store.close()


def test_two_validators_that_change_their_rules_at_other_times_judge_alike(subnet, model):
    """One is restarted with the new files while its round is open, the other one gets them when it has ended."""
    for seed, name in enumerate(("ann", "ben")):
        subnet.publish(name, model(seed))
    subnet.next_window()
    block = subnet.ledger.head() // WINDOW * WINDOW
    assert turn(subnet, "early", OLD, HERE, judge=False) == block
    assert turn(subnet, "early", NEW, HERE) == block
    assert turn(subnet, "late", OLD, HERE) == block
    assert turn(subnet, "late", NEW, HERE) is None
    assert turn(subnet, "upgraded", OLD, HERE, judge=False) == block
    assert turn(subnet, "upgraded", OLD, UPGRADED) is None, "it must not judge this one"
    subnet.next_window()
    for state in ("early", "late"):
        assert turn(subnet, state, NEW, HERE) == block + WINDOW
    assert turn(subnet, "upgraded", OLD, UPGRADED) == block + WINDOW
    stores = [Store(subnet.folder / state / "store.db", read_only=True) for state in ("early", "late")]
    first, second = ([r.record for r in store.rounds()] for store in stores)
    assert first == second
    hashes = [record.competitions["c00"].file_sha256 for record in first]
    assert hashes == [parse(OLD).hashes["c00"], parse(NEW).hashes["c00"]]
    upgraded = Store(subnet.folder / "upgraded" / "store.db", read_only=True)
    assert upgraded.last_finished() == block + WINDOW
    assert [r.block for r in upgraded.open_rounds()] == [block]
    assert replace(first[0], weights={}) != first[0], "weights were decided"


class HeldHub(Hub):
    """Lists nothing before it is told to: so long a round lasts."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, timeout_s=20, attempts=1, pause_s=0.05)
        self.asked, self.go_on = threading.Event(), threading.Event()

    def listing(self, *words, **more):
        self.asked.set()
        assert self.go_on.wait(60)
        return super().listing(*words, **more)


def test_a_round_before_the_last_that_may_be_judged_is_planned_only_while_it_is_due(subnet):
    """As `due`: one that --catch-up leaves out is not brought back by a bound."""
    store = Store(subnet.folder / "bounded" / "store.db")
    subnet.next_window()
    first = subnet.ledger.head() // WINDOW * WINDOW
    finish(store, first)
    for _ in range(4):
        subnet.next_window()

    async def planned(last: int) -> Plan | None:
        async with subnet.chain("validator") as chain:
            hub = Hub(subnet.hub.endpoint, timeout_s=20, attempts=1, pause_s=0.05)
            machine = Machine(subnet.folder / "models", subnet.folder / "records", "cpu", "float32", 1, 120, 60)
            folder = subnet.folder / "competitions"
            tokenizers = Tokenizers(hub, subnet.folder / "tokenizers")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            return await plan_round(ports, parse(OLD), catch_up=2, last=last)

    assert asyncio.run(planned(first + 2 * WINDOW - 1)) is None
    found = asyncio.run(planned(first + 4 * WINDOW - 1))
    assert found is not None
    assert found.block == first + 3 * WINDOW
    store.close()


def test_whatever_fails_while_the_rules_are_looked_at_ends_nothing(subnet, events):
    """Here the store's file."""
    path = subnet.folder / "failing" / "store.db"
    store, hub = Store(path), Hub(subnet.hub.endpoint, timeout_s=20, attempts=1, pause_s=0.05)
    folder = subnet.folder / "competitions"
    settings = read(ValidatorSettings, ["--network", "localnet", "--competitions.dir", str(folder)])

    def rename(old: str, new: str) -> None:
        with closing(sqlite3.connect(path)) as other, other:
            other.execute(f"alter table {old} rename to {new}")

    async def story() -> None:
        async with subnet.chain("validator") as chain:
            machine = Machine(path.parent / "models", path.parent / "records", "cpu", "float32", 1, 120, 60)
            tokenizers = Tokenizers(hub, path.parent / "tokenizers")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            noted, done = NotedRules(ports, RulesReader(settings), HERE, asyncio.Lock()), asyncio.Event()
            rename("rules", "gone")
            watching = asyncio.create_task(noted.watch(done, 0.05))
            async with asyncio.timeout(60):
                while "bug" not in [event for event, _ in events] and not watching.done():
                    await asyncio.sleep(0.05)
                rename("gone", "rules")
                while not store.rules_kept() and not watching.done():
                    await asyncio.sleep(0.05)
            done.set()
            await watching

    asyncio.run(story())
    assert [kept.since for kept in store.rules_kept()] == [0]
    store.close()


def test_a_folder_of_files_that_cannot_be_asked_for_is_refused_in_words(tmp_path):
    """Here by its name's length; a network's disk that is away fails so too."""
    with pytest.raises(Rejected, match="File name too long"):
        read_texts(tmp_path / ("n" * 300))


class RefusedTwice:
    """A chain that answers what cannot be right at first."""

    def __init__(self, chain: Any) -> None:
        self.chain, self.asked = chain, 0

    async def finalized(self) -> Any:
        self.asked += 1
        if self.asked <= 2:
            raise Rejected(Reason.SETTING, "a block", "another")
        return await self.chain.finalized()


def test_what_is_refused_while_the_rules_are_looked_at_is_said_once_and_no_bug(subnet, events):
    store, hub = Store(subnet.folder / "refusing" / "store.db"), Hub(subnet.hub.endpoint, timeout_s=20, attempts=1, pause_s=0.05)
    folder = subnet.folder / "competitions"
    settings = read(ValidatorSettings, ["--network", "localnet", "--competitions.dir", str(folder)])

    async def story() -> None:
        async with subnet.chain("validator") as chain:
            machine = Machine(folder.parent / "models", folder.parent / "records", "cpu", "float32", 1, 120, 60)
            tokenizers = Tokenizers(hub, folder.parent / "tokenizers")
            asked = RefusedTwice(chain)
            ports = Ports(asked, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            noted, done = NotedRules(ports, RulesReader(settings), HERE, asyncio.Lock()), asyncio.Event()
            watching = asyncio.create_task(noted.watch(done, 0.05))
            async with asyncio.timeout(60):
                while not store.rules_kept() and not watching.done():
                    await asyncio.sleep(0.05)
            done.set()
            await watching

    asyncio.run(story())
    store.close()
    (sentence,) = [sentence for event, sentence in events if event == "rules_unread"]
    assert "another" in sentence
    assert "bug" not in [event for event, _ in events]


def test_files_that_come_during_a_round_are_noted_when_they_come(subnet, model):
    """A round that lasts beyond the next window's block: who ends it sooner, or is restarted, changes at the same block."""
    subnet.publish("ann", model(1))
    subnet.next_window()
    block = subnet.ledger.head() // WINDOW * WINDOW
    folder, state = subnet.folder / "competitions", subnet.folder / "slow"
    settings = read(
        ValidatorSettings, ["--network", "localnet", "--competitions.dir", str(folder), "--rounds", "1", "--poll", "0.05"]
    )
    store, hub = Store(state / "store.db"), HeldHub(subnet.hub.endpoint)

    async def story() -> None:
        async with subnet.chain("validator") as chain:
            machine = Machine(state / "models", state / "records", "cpu", "float32", 1, 120, 60)
            tokenizers = Tokenizers(hub, state / "tokenizers")
            ports = Ports(chain, hub, store, dataset_of(hub, folder), tokenizers, machine, subnet.evaluator)
            noted, done = NotedRules(ports, RulesReader(settings), HERE, asyncio.Lock()), asyncio.Event()
            tasks = [asyncio.create_task(_rounds(settings, noted, done, None)), asyncio.create_task(noted.watch(done, 0.05))]
            assert await asyncio.to_thread(hub.asked.wait, 60)
            (folder / "c00.yaml").write_text(NEW["c00.yaml"])
            async with asyncio.timeout(60):
                while len(store.rules_kept()) == 1:
                    await asyncio.sleep(0.05)
            subnet.next_window()
            hub.go_on.set()
            await asyncio.gather(*tasks)

    asyncio.run(story())
    assert [kept.since for kept in store.rules_kept()] == [0, block + WINDOW]
    (ended,) = store.rounds()
    assert (ended.block, ended.record.competitions["c00"].file_sha256) == (block, parse(OLD).hashes["c00"])
    found = due(store, subnet.ledger.head(), HERE, 2, parse, set())
    assert (found.rules.hashes["c00"], found.since) == (parse(NEW).hashes["c00"], block + WINDOW)
