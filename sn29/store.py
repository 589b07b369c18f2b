"""What a validator must not forget: one SQLite file (WAL). The only `import sqlite3` beside the localnet's ledger.

What was kept here survives `kill -9` at any instant: every method is one transaction, flushed before it returns. Losses are
keyed by content, tokenizer, numeric profile and sample, so a row is never used for anything but what it was measured on.

A file of an older schema is brought up to date by the first validator that opens it: copied beside itself, then changed in one
transaction. A file of a newer schema is refused.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Commitment, Identity, Loss, ModelFacts, ModelId, Outcome, RepoFile, RepoListing, Weights
from sn29.round_record import RoundRecord, decode, encode

SCHEMA = 6

_TABLES = """
create table meta(key text primary key, value text not null) strict;
create table claim(key text primary key, block integer not null, hotkey text not null) strict;
create table first_seen(hotkey text, digest text, block integer not null, primary key (hotkey, digest)) strict;
create table verdict(
  hotkey text, block integer, data blob, rules text, outcome text not null,
  primary key (hotkey, block, data, rules)) strict;
create table failure(hotkey text, block integer, data blob, count integer not null,
  primary key (hotkey, block, data)) strict;
create table unanswered(
  hotkey text, model text, round integer, placed integer not null, over integer not null,
  primary key (hotkey, model, round)) strict;
create table repository(model text primary key, files text not null, facts text, read_by text not null) strict;
create table content(content_id text primary key, tensor_digest text, since integer, fingerprint text) strict;
create table loss(
  content_id text, tokenizer_id text, profile text, sample text,
  nats real not null, tokens integer not null, reason text not null, imported integer not null default 0,
  primary key (content_id, tokenizer_id, profile, sample)) strict, without rowid;
create table imported(
  number integer primary key, source text not null, address text not null, block integer not null, at real not null,
  cells integer not null, checked integer not null) strict;
create table rules(since integer primary key, texts text not null, software text not null) strict;
create table round(block integer primary key, plan text not null, record text, weights text) strict;
create table standing(round integer, competition text, model text, hotkey text not null, weight real not null,
  primary key (round, competition, model)) strict;
create table publication(mechanism integer, block integer, round integer not null, weights text not null,
  primary key (mechanism, block)) strict;
create table sent(mechanism integer, since integer, round integer not null, weights text not null,
  block integer, reveals_at integer, digests text not null, primary key (mechanism, since)) strict;
"""

_FROM_2 = """
create table first_seen(hotkey text, digest text, block integer not null, primary key (hotkey, digest)) strict;
alter table publication rename to publication_2;
create table publication(mechanism integer, block integer, round integer not null, weights text not null,
  primary key (mechanism, block)) strict;
insert into publication select 0, block, round, weights from publication_2;
drop table publication_2;
create table sent(mechanism integer, since integer, round integer not null, weights text not null,
  block integer, reveals_at integer, digests text not null, primary key (mechanism, since)) strict;
"""
"""From schema 2, which knew one mechanism, and weights that stand or do not."""
_KEEP_CLAIM = (
    "insert into claim values (?1, ?2, ?3) on conflict do update set block = ?2, hotkey = ?3 where (?2, ?3) < (block, hotkey)"
)
_KEEP_FIRST_SEEN = "insert into first_seen values (?1, ?2, ?3) on conflict do update set block = min(block, ?3)"

_FROM_3 = """
create table repository(model text primary key, files text not null, facts text, read_by text not null) strict;
create table content(content_id text primary key, tensor_digest text, since integer, fingerprint text) strict;
"""
"""From schema 3, which asked the Hub for everything in each round, and knew a content by its files alone."""

_FROM_4 = """
create table unanswered(
  hotkey text, model text, round integer, placed integer not null, over integer not null,
  primary key (hotkey, model, round)) strict;
"""
"""From schema 4, by which every round waited for whoever did not answer."""

_FROM_5 = """
alter table loss add column imported integer not null default 0;
create table imported(
  number integer primary key, source text not null, address text not null, block integer not null, at real not null,
  cells integer not null, checked integer not null) strict;
create table rules(since integer primary key, texts text not null, software text not null) strict;
"""
"""From schema 5, which knew no losses but its own, and judged a round by whatever files and software it was started with."""

_STEPS = {2: _FROM_2, 3: _FROM_3, 4: _FROM_4, 5: _FROM_5}
"""By the schema that they lead from, to the next one."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One evaluated model in one round."""

    competition: str
    model: str
    """Model id."""
    hotkey: str
    weight: float
    """Share of the competition's reward, 0..1."""


@dataclass(frozen=True, slots=True)
class StoredRepository:
    """What was seen of a model's repository at its revision, which does not change."""

    listing: RepoListing
    facts: ModelFacts | None
    """None: its metadata was not read, or not by the software that asks."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A round in which a model could not be judged: its repository did not answer, or its evaluation gave nothing."""

    hotkey: str
    model: str
    """Model id."""
    round: int
    """Block."""
    placed: bool = False
    """It had a place under evaluation, in vain."""
    over: bool = False
    """Its evaluation failed in such a way that it is tried again in the next round only."""


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A round as it was opened, and as it ended (None while it is open)."""

    block: int
    plan: Mapping[str, Any]
    record: RoundRecord | None


@dataclass(frozen=True, slots=True)
class StoredLoss:
    """One cell of the table of losses."""

    content_id: str
    tokenizer_id: str
    profile: str
    loss: Loss
    imported: int = 0
    """Number of the import that it came with; 0: measured here."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Losses that were taken over from another validator's record."""

    source: str
    """Whose, as the operator named it: the path of the record."""
    address: str
    """sha256 hex of the record."""
    block: int
    """Of its round."""
    at: float
    """When, in seconds since 1970."""
    cells: int
    """How many losses."""
    checked: int
    """So many of them were measured here as well, to the same bits."""


@dataclass(frozen=True, slots=True)
class LossesOfAnother:
    """What is taken over of a record's losses."""

    came: Imported
    cells: Sequence[StoredLoss]
    tensor_digests: Sequence[tuple[str, str, int]]
    """(content id, digest as it was measured here, block of the round since which it is known)."""


@dataclass(frozen=True, slots=True)
class RulesKept:
    """What rounds are judged by from a block on."""

    since: int
    texts: Mapping[str, str]
    """File name -> text of the competition files."""
    software: Mapping[str, str]
    """Name -> version of whatever moves a loss or a weight."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Weights that were sent, or are about to be, and are not known to stand on chain yet."""

    since: int
    """Head before they were sent: the chain shows them, if ever, after it."""
    weights: Weights
    block: int | None = None
    """Block that took them; None while nobody knows whether one did."""
    reveals_at: int | None = None
    """Block of the epoch in which the chain reveals them; None for a plain set."""
    digests: tuple[str, ...] = ()
    """sha256 hex of the commit that the chain keeps until then: of each that was sent, while it is not known which one the chain
    took. Empty for a plain set."""


@dataclass(frozen=True, slots=True)
class ChainSeen:
    """The chain as it was last seen to go on: what its age is counted from while it does not answer."""

    block: int
    """Newest final block."""
    at: float
    """When it came, in seconds since 1970 by this machine's clock."""
    block_seconds: float
    epoch: int
    """Blocks."""
    reveal_epochs: int | None
    """Epochs until committed weights stand; 0 when they are set in the open, None while nobody has asked."""


def shown_upto(seen: ChainSeen | None, mechanisms: Iterable[tuple[Weights | None, tuple[int, Weights] | None]]) -> float:
    """The newest block of whose rounds, and of those before, everybody may see the weights: the chain shows them, or conceals
    none. Of others nothing is told, or they would be copied.

    mechanisms: of each the weights that were decided and are ours to publish, and (block, weights) of our set that stands.
    """
    if seen is not None and seen.reveal_epochs == 0:
        return math.inf
    paying = [stands for decided, stands in mechanisms if stands or (decided and decided.by_hotkey)]
    return min((stands[1].block if stands else -1 for stands in paying), default=-1)


Say = Callable[[str, str], None]
"""say(event, sentence)."""


class Store:
    """The validator's memory, in `path`. Several processes may read while one writes."""

    def __init__(self, path: Path, *, read_only: bool = False, immutable: bool = False, say: Say = lambda *_: None) -> None:
        """Opens or creates the file; one of an older schema is copied and brought up to date, unless it is only read.

        say: is told of that. Raises Rejected(SETTING) for a file of another schema, and one that is no store.
        """
        if read_only and not path.exists():
            raise no_store(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            address = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}{'&immutable=1' if immutable else ''}"
            self._db = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
            schema = self._schema()
            if schema is not None and not min(_STEPS) <= schema <= SCHEMA:
                whose = ", of this software; start the one that wrote it" if schema > SCHEMA else ""
                self._refuse(path, schema, f"schema {min(_STEPS)} to {SCHEMA}{whose}")
            if not read_only:
                self._create(path, schema, say)
            elif schema != SCHEMA:
                self._refuse(path, schema, f"schema {SCHEMA}; start the validator once, which brings it up to date")
        except (OSError, sqlite3.Error) as error:
            raise Rejected(Reason.SETTING, f"{path}: {error}", "a store, in a folder that can be written to") from None

    def _refuse(self, path: Path, schema: int | None, rule: str) -> NoReturn:
        self._db.close()
        raise Rejected(Reason.SETTING, f"schema {schema if schema is not None else 'unknown'} in {path}", rule)

    def _schema(self) -> int | None:
        """None in a file that has no tables yet, or not ours."""
        if not self._value("select 1 from sqlite_master where name = 'meta'"):
            return None
        found = str(self._value("select value from meta where key = 'schema'"))
        return int(found) if found.isdecimal() else None

    def _create(self, path: Path, schema: int | None, say: Say) -> None:
        if schema is None and self._value("select 1 from sqlite_master"):
            self._refuse(path, None, "a store of sn29")
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")  # a kept loss survives a power cut too
        if schema is not None and schema < SCHEMA:
            kept = self._back_up(path, schema)
            say("store", f"schema {schema} is brought up to schema {SCHEMA}; as it was it is kept in {kept}")
        with self._transaction() as db:
            now = self._schema()  # another process may have been quicker
            if now is None:
                _run(db, _TABLES)
                db.execute("insert into meta values ('schema', ?)", (str(SCHEMA),))
                return
            for step in range(now, SCHEMA):
                _run(db, _STEPS[step])
                if step == 2:
                    self._weights_by_mechanism(db)
            if now < SCHEMA:
                db.execute("update meta set value = ? where key = 'schema'", (str(SCHEMA),))

    def _back_up(self, path: Path, schema: int) -> Path:
        """A whole copy beside the file, on the disk before anything is changed; what an earlier try left is replaced."""
        kept = path.with_name(f"{path.name}.schema{schema}.bak")
        part = path.with_name(f".{kept.name}.part")
        _remove(part)
        try:
            with closing(sqlite3.connect(part)) as copy:
                self._db.backup(copy)
                copy.execute("pragma journal_mode=delete")  # one file
            _flush(part)
            os.replace(part, kept)
        finally:
            _remove(part)
        _flush(path.parent)
        return kept

    @staticmethod
    def _weights_by_mechanism(db: sqlite3.Connection) -> None:
        """Schema 2 knew one mechanism."""
        for block, weights in db.execute("select block, weights from round where weights is not null").fetchall():
            db.execute("update round set weights = ? where block = ?", (json.dumps({"0": json.loads(weights)}), block))

    def close(self) -> None:
        self._db.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    def _value(self, query: str, values: Sequence[object] = ()) -> Any:
        row = self._db.execute(query, values).fetchone()
        return row[0] if row else None

    # --- identity of the chain --------------------------------------------------------------------------------------

    def belong_to(self, chain: Identity, netuid: int) -> int | None:
        """Ties the store to one chain and subnet. The chain's runtime when the store was last used, if it was another one.

        Raises Rejected(SETTING) when the store belongs to another chain or subnet: its blocks, claims and weights mean
        nothing there. A runtime changes with every upgrade of the chain, which is no reason to stop.
        """
        runtime = str(chain.spec_version)
        with self._transaction() as db:
            self.check_chain(chain, netuid)
            db.execute("insert or ignore into meta values ('chain', ?)", (f"{chain.genesis} netuid {netuid}",))
            before = self._value("select value from meta where key = 'spec_version'")
            db.execute("insert or replace into meta values ('spec_version', ?)", (runtime,))
        return int(before) if before not in (None, runtime) else None

    def chain(self) -> str | None:
        """Genesis and subnet that the store belongs to, as one text; None before it was ever used."""
        kept = self._value("select value from meta where key = 'chain'")
        return None if kept is None else str(kept)

    def check_chain(self, chain: Identity, netuid: int) -> None:
        """Raises Rejected(SETTING) when the store belongs to another chain or subnet; writes nothing."""
        kept, name = self.chain(), f"{chain.genesis} netuid {netuid}"
        if kept not in (None, name):
            limit = f"one of {name}, the network that was asked for; give another --state.dir, or that network again"
            raise Rejected(Reason.SETTING, f"a store of {kept}", limit)

    def secret(self) -> str:
        """A random text that nobody else knows, drawn once: what is drawn by it is the same after a restart. 64 hex digits."""
        with self._transaction() as db:
            db.execute("insert or ignore into meta values ('secret', ?)", (secrets.token_hex(32),))
        return str(self._value("select value from meta where key = 'secret'"))

    def chain_seen(self) -> ChainSeen | None:
        """What `keep_chain_seen` kept last."""
        text = self._value("select value from meta where key = 'chain_seen'")
        return ChainSeen(**json.loads(text)) if text else None

    def keep_chain_seen(self, seen: ChainSeen) -> None:
        with self._transaction() as db:
            db.execute("insert or replace into meta values ('chain_seen', ?)", (json.dumps(asdict(seen)),))

    # --- claims and verdicts ----------------------------------------------------------------------------------------

    def claims(self) -> dict[str, tuple[int, str]]:
        """Model id, content id, weights id or tensor digest -> the earliest (block, hotkey) that was ever seen to claim it."""
        return {key: (block, hotkey) for key, block, hotkey in self._db.execute("select key, block, hotkey from claim")}

    def keep_claims(self, claims: Mapping[str, tuple[int, str]]) -> None:
        """Notes claims; of two for one key the earlier stays, whatever was noted first."""
        with self._transaction() as db:
            db.executemany(_KEEP_CLAIM, [(key, *claim) for key, claim in claims.items()])

    def first_seen(self, claims: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Of these (hotkey, digest): the block of the earliest commitment by which the hotkey was ever seen to claim the digest.

        The chain keeps a hotkey's newest commitment alone, with its block: what it claimed before is known only here.
        """
        wanted = json.dumps(list(claims))
        rows = self._db.execute(
            "select hotkey, digest, block from json_each(?) as wanted"
            " join first_seen on hotkey = wanted.value ->> 0 and digest = wanted.value ->> 1",
            (wanted,),
        )
        return {(hotkey, digest): block for hotkey, digest, block in rows}

    def keep_first_seen(self, seen: Mapping[tuple[str, str], int]) -> None:
        """Notes blocks of commitments; of two for one hotkey and digest the earlier stays, whatever was noted first."""
        with self._transaction() as db:
            db.executemany(_KEEP_FIRST_SEEN, [(*key, block) for key, block in seen.items()])

    def verdict(self, hotkey: str, block: int, data: bytes, rules: str) -> Outcome | None:
        """The final refusal of this commitment under these rules (a hash of the competition), if there is one."""
        text = self._value(
            "select outcome from verdict where hotkey = ? and block = ? and data = ? and rules = ?",
            (hotkey, block, data, rules),
        )
        return Outcome(**json.loads(text)) if text else None

    def keep_verdict(self, outcome: Outcome, data: bytes, rules: str) -> None:
        with self._transaction() as db:
            db.execute(
                "insert or replace into verdict values (?, ?, ?, ?, ?)",
                (outcome.hotkey, outcome.block, data, rules, json.dumps(asdict(outcome))),
            )

    def count_failure(self, commitment: Commitment) -> int:
        """Counts a crash or a missed deadline of this commitment's evaluation; how many there were."""
        key = (commitment.hotkey, commitment.block, commitment.encode())
        with self._transaction() as db:
            db.execute("insert into failure values (?, ?, ?, 1) on conflict do update set count = count + 1", key)
        return int(self._value("select count from failure where hotkey = ? and block = ? and data = ?", key))

    def forget_failures(self, commitment: Commitment) -> None:
        """An evaluation of this commitment has ended well: what failed before was not the model's fault."""
        key = (commitment.hotkey, commitment.block, commitment.encode())
        with self._transaction() as db:
            db.execute("delete from failure where hotkey = ? and block = ? and data = ?", key)

    def keep_unanswered(self, found: Iterable[Unanswered], *, forget_before: int) -> None:
        """Notes them; what was noted of the same round before stays true. Older rounds than `forget_before` are forgotten."""
        with self._transaction() as db:
            db.execute("delete from unanswered where round < ?", (forget_before,))
            db.executemany(
                "insert into unanswered values (?1, ?2, ?3, ?4, ?5) on conflict do update"
                " set placed = max(placed, ?4), over = max(over, ?5)",
                [(u.hotkey, u.model, u.round, int(u.placed), int(u.over)) for u in found],
            )

    def unanswered(self, *, since: int, before: int, model: ModelId | None = None) -> tuple[Unanswered, ...]:
        """Of the rounds from block `since` on and before another; of all models, or of one. Oldest first."""
        query = "select * from unanswered where round >= ? and round < ? and (?3 is null or model = ?3) order by round, hotkey"
        rows = self._db.execute(query, (since, before, None if model is None else str(model)))
        return tuple(Unanswered(hotkey, name, round, bool(placed), bool(over)) for hotkey, name, round, placed, over in rows)

    # --- models -----------------------------------------------------------------------------------------------------

    def repository(self, model: ModelId, *, read_by: str) -> StoredRepository | None:
        """What was seen of a model's repository; without the facts when other software than `read_by` read them."""
        query = "select files, facts, read_by from repository where model = ?"
        row = self._db.execute(query, (str(model),)).fetchone()
        if row is None:
            return None
        listing = RepoListing(model, tuple(RepoFile(**file) for file in json.loads(row[0])))
        facts = ModelFacts(**json.loads(row[1])) if row[1] and row[2] == read_by else None
        return StoredRepository(listing, facts)

    def keep_repository(self, listing: RepoListing, facts: ModelFacts | None, *, read_by: str) -> None:
        """Keeps what a commitment's digest was found to be of, and what the metadata said if it was read."""
        files = json.dumps([asdict(file) for file in listing.files])
        with self._transaction() as db:
            row = (str(listing.model), files, json.dumps(asdict(facts)) if facts else None, read_by)
            db.execute("insert or replace into repository values (?, ?, ?, ?)", row)

    def tensor_digest(self, content_id: str) -> str | None:
        """The canonical digest of a content's tensors, if it was ever evaluated."""
        found = self._value("select tensor_digest from content where content_id = ?", (content_id,))
        return None if found is None else str(found)

    def tensor_digests(self, *, before: int | None = None) -> dict[str, str]:
        """By content id, of everything that was ever evaluated; or of that alone which was so in a round before a block."""
        query = "select content_id, tensor_digest from content where tensor_digest is not null and since < ?"
        return dict(self._db.execute(query, (before if before is not None else 1 << 62,)))

    def keep_tensor_digest(self, content_id: str, digest: str, block: int) -> None:
        """Notes what the evaluation of a content found in the round of `block`."""
        with self._transaction() as db:
            _keep_tensor_digests(db, [(content_id, digest, block)])

    def fingerprint(self, content_id: str) -> str | None:
        """The weights' fingerprint as text, if it was ever taken."""
        found = self._value("select fingerprint from content where content_id = ?", (content_id,))
        return None if found is None else str(found)

    def keep_fingerprint(self, content_id: str, text: str) -> None:
        with self._transaction() as db:
            db.execute(
                "insert into content(content_id, fingerprint) values (?1, ?2) on conflict do update set fingerprint = ?2",
                (content_id, text),
            )

    # --- losses -----------------------------------------------------------------------------------------------------

    def losses(self, content_id: str, tokenizer_id: str, profile: str, samples: Iterable[str]) -> dict[str, Loss]:
        """What is known of these samples (by id) under this model."""
        wanted = json.dumps(list(samples))
        rows = self._db.execute(
            "select sample, nats, tokens, reason from loss where content_id = ? and tokenizer_id = ? and profile = ?"
            " and sample in (select value from json_each(?))",
            (content_id, tokenizer_id, profile, wanted),
        )
        return {row[0]: Loss(*row) for row in rows}

    def keep_losses(self, content_id: str, tokenizer_id: str, profile: str, losses: Iterable[Loss]) -> None:
        rows = [(content_id, tokenizer_id, profile, x.sample, x.nats, x.num_tokens, x.reason) for x in losses]
        with self._transaction() as db:
            db.executemany("insert or replace into loss values (?, ?, ?, ?, ?, ?, ?, 0)", rows)

    def forget_losses(self, content_id: str, tokenizer_id: str, profile: str) -> None:
        """Of a row that was found to be wrong."""
        with self._transaction() as db:
            key = (content_id, tokenizer_id, profile)
            db.execute("delete from loss where content_id = ? and tokenizer_id = ? and profile = ?", key)

    def count_losses(self) -> int:
        return int(self._value("select count(*) from loss"))

    def each_loss(self) -> Iterator[StoredLoss]:
        """All of them, by key."""
        query = "select * from loss order by content_id, tokenizer_id, profile, sample"
        for content, tokenizer, profile, sample, nats, tokens, reason, imported in self._db.execute(query):
            yield StoredLoss(content, tokenizer, profile, Loss(sample, nats, tokens, reason), imported)

    def nats(self, content_id: str, tokenizer_id: str, samples: Iterable[str]) -> dict[str, tuple[float, ...]]:
        """Sample -> what is known of it under this model, whichever way it was computed."""
        rows = self._db.execute(
            "select sample, nats from loss where content_id = ? and tokenizer_id = ?"
            " and sample in (select value from json_each(?)) order by profile",
            (content_id, tokenizer_id, json.dumps(list(samples))),
        )
        found: dict[str, tuple[float, ...]] = {}
        for sample, nats in rows:
            found[sample] = (*found.get(sample, ()), nats)
        return found

    def imports(self) -> dict[int, Imported]:
        """By number, oldest first."""
        return {number: Imported(*rest) for number, *rest in self._db.execute("select * from imported order by number")}

    # --- rounds and weights -----------------------------------------------------------------------------------------

    def open_round(self, block: int, plan: Mapping[str, Any]) -> None:
        """Fixes what the round at `block` is about before anything of it is done; a restart goes on with it."""
        with self._transaction() as db:
            db.execute("insert or ignore into round(block, plan) values (?, ?)", (block, json.dumps(plan)))

    def finish_round(
        self, block: int, record: RoundRecord, weights: Mapping[int, Weights], standings: Iterable[Standing] = ()
    ) -> None:
        """Keeps the round's record, who stood where in it, and the weights it decided, by mechanism, in one step."""
        kept = encode(record).decode()
        decided = json.dumps({str(mechanism): dict(one.by_hotkey) for mechanism, one in sorted(weights.items())})
        rows = [(block, x.competition, x.model, x.hotkey, x.weight) for x in standings]
        with self._transaction() as db:
            db.execute("update round set record = ?, weights = ? where block = ?", (kept, decided, block))
            db.executemany("insert or replace into standing values (?, ?, ?, ?, ?)", rows)

    def begin(
        self,
        record: RoundRecord,
        standings: Iterable[Standing],
        claims: Mapping[str, tuple[int, str]],
        seen: Mapping[tuple[str, str], int],
        losses: LossesOfAnother | None = None,
    ) -> None:
        """Takes over another validator's round as the first one, and losses of its next one, in one step. What was noted or
        measured here stays as it is. See `weights`, `taken_over`, `first_seen`, `imports`."""
        block, kept = record.head.block, encode(record).decode()
        rows = [(block, x.competition, x.model, x.hotkey, x.weight) for x in standings]
        with self._transaction() as db:
            db.execute("insert into meta values ('taken_over', ?)", (str(block),))
            weights = json.dumps({str(mechanism): dict(one.by_hotkey) for mechanism, one in sorted(record.weights.items())})
            db.execute(
                "insert or replace into round(block, plan, record, weights) values (?, '{}', ?, ?)", (block, kept, weights)
            )
            db.executemany("insert or replace into standing values (?, ?, ?, ?, ?)", rows)
            db.executemany(_KEEP_CLAIM, [(key, *claim) for key, claim in claims.items()])
            db.executemany(_KEEP_FIRST_SEEN, [(*key, first) for key, first in seen.items()])
            if losses is not None:
                _import(db, losses)

    def taken_over(self) -> int | None:
        """Block of the round that is another validator's: its weights are not ours to set."""
        block = self._value("select value from meta where key = 'taken_over'")
        return None if block is None else int(block)

    def last_evaluated(self, competition: str) -> dict[str, int]:
        """Model id -> block of the newest round that evaluated it in this competition."""
        query = "select model, max(round) from standing where competition = ? group by model"
        return dict(self._db.execute(query, (competition,)))

    def last_standing(self, competition: str, *, before: int) -> dict[str, float]:
        """Hotkey -> share of the competition's reward in the newest round before a block."""
        query = (
            "select hotkey, weight from standing where competition = ?1 and round ="
            " (select max(round) from standing where competition = ?1 and round < ?2)"
        )
        return dict(self._db.execute(query, (competition, before)))

    def rounds(self) -> tuple[StoredRound, ...]:
        """Every round with its record, oldest first: for reports, since it reads them all."""
        rows = self._db.execute("select block, plan, record from round order by block")
        return tuple(StoredRound(row[0], json.loads(row[1]), decode(row[2].encode()) if row[2] else None) for row in rows)

    def record_texts(self) -> Iterator[tuple[int, bytes]]:
        """(block, record as it was written) of each finished round, oldest first; one in memory at a time."""
        for block, text in self._db.execute("select block, record from round where record is not null order by block"):
            yield block, text.encode()

    def decided(self) -> Iterator[tuple[int, dict[int, Weights]]]:
        """(block, mechanism -> weights) of each finished round, oldest first."""
        for block, text in self._db.execute("select block, weights from round where weights is not null order by block"):
            yield block, {int(m): Weights(block, MappingProxyType(kept)) for m, kept in json.loads(text).items()}

    def last_record(self, *, before: int) -> RoundRecord | None:
        """Of the newest finished round before a block."""
        text = self._value(
            "select record from round where record is not null and block < ? order by block desc limit 1", (before,)
        )
        return decode(text.encode()) if text else None

    def open_rounds(self) -> tuple[StoredRound, ...]:
        """Rounds that were opened and not finished, oldest first."""
        rows = self._db.execute("select block, plan from round where record is null order by block")
        return tuple(StoredRound(row[0], json.loads(row[1]), None) for row in rows)

    def last_finished(self) -> int | None:
        """Block of the newest finished round."""
        block = self._value("select max(block) from round where record is not null")
        return None if block is None else int(block)

    def weights(self, *, before: int | None = None) -> dict[int, Weights]:
        """Mechanism -> weights of the newest finished round (before a block, if one is given); empty when there is none."""
        row = self._db.execute(
            "select block, weights from round where weights is not null and block < ? order by block desc limit 1",
            (before if before is not None else 1 << 62,),
        ).fetchone()
        return {int(m): Weights(row[0], MappingProxyType(kept)) for m, kept in json.loads(row[1]).items()} if row else {}

    def first_decided(self) -> int | None:
        """Block of the oldest round that decided weights, also of one that was forgotten; None when there is none."""
        forgotten = "select value from meta where key = 'first_decided'"
        block = self._value(f"select coalesce(({forgotten}), min(block)) from round where weights is not null")
        return None if block is None else int(block)

    # --- rules over time --------------------------------------------------------------------------------------------

    def rules_kept(self, *, gaps: bool = False) -> tuple[RulesKept, ...]:
        """What rounds were, are and will be judged by, by block. gaps: also from where on that is not known, without texts."""
        rows = self._db.execute("select since, texts, software from rules where ? or texts != '{}' order by since", (gaps,))
        return tuple(RulesKept(since, json.loads(texts), json.loads(software)) for since, texts, software in rows)

    def keep_rules(self, rules: RulesKept, *, unknown: int | None = None) -> None:
        """These from their block on: what was noted for that block or a later one never took effect. Of those before it the
        newest is kept, since a round that is open was begun with it. unknown: the block from which on, up to that of these, it
        is not known what others judge by; what was noted for that block or a later one goes as well."""
        first = rules.since if unknown is None else min(unknown, rules.since)
        row = (rules.since, json.dumps(dict(rules.texts)), json.dumps(dict(rules.software)))
        with self._transaction() as db:
            db.execute("delete from rules where since >= ?", (first,))
            db.execute("delete from rules where since < (select max(since) from rules where texts != '{}')")
            if first < rules.since:
                db.execute("insert into rules values (?, '{}', '{}')", (first,))
            db.execute("insert into rules values (?, ?, ?)", row)

    def looked(self) -> int | None:
        """What `keep_looked` kept last."""
        block = self._value("select value from meta where key = 'looked'")
        return None if block is None else int(str(block))

    def keep_looked(self, block: int) -> None:
        """The final block at which the rules were looked at."""
        with self._transaction() as db:
            db.execute("insert or replace into meta values ('looked', ?)", (str(block),))

    # --- the file itself --------------------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything that is read inside is of one moment, whatever a validator writes meanwhile."""
        self._db.execute("begin")
        try:
            yield
        finally:
            self._db.execute("rollback")

    def faults(self) -> tuple[str, ...]:
        """What SQLite finds wrong with the file, page by page; empty when it is whole."""
        try:
            return tuple(row[0] for row in self._db.execute("pragma integrity_check") if row[0] != "ok")
        except sqlite3.DatabaseError as error:
            return (str(error),)

    # --- weights on their way to the chain --------------------------------------------------------------------------

    def keep_sent(self, mechanism: int, sent: Sent, *, instead_of: Sent | None = None) -> None:
        """Notes what is about to be sent, and later what became of it: a crash between the two is seen by its block.

        instead_of: another note that goes with the same step.
        """
        row = (mechanism, sent.since, sent.weights.block, _text(sent.weights), sent.block, sent.reveals_at)
        with self._transaction() as db:
            if instead_of is not None:
                db.execute("delete from sent where mechanism = ? and since = ?", (mechanism, instead_of.since))
            db.execute("insert or replace into sent values (?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(sent.digests)))

    def forget_sent(self, mechanism: int, sent: Sent) -> None:
        """It never landed, or the chain dropped it, or a later one took its place."""
        with self._transaction() as db:
            db.execute("delete from sent where mechanism = ? and since = ?", (mechanism, sent.since))

    def sent(self, mechanism: int = 0) -> tuple[Sent, ...]:
        """What is on its way, oldest first."""
        query = "select since, round, weights, block, reveals_at, digests from sent where mechanism = ? order by since"
        rows = self._db.execute(query, (mechanism,))
        return tuple(
            Sent(since, _weights(round, kept), block, reveals_at, tuple(json.loads(digests)))
            for since, round, kept, block, reveals_at, digests in rows
        )

    def keep_publication(self, block: int, weights: Weights, mechanism: int = 0, sent: Sent | None = None) -> None:
        """Notes that these weights were set on chain at `block` and read back; everything sent up to `sent` is settled."""
        with self._transaction() as db:
            row = (mechanism, block, weights.block, _text(weights))
            db.execute("insert or replace into publication values (?, ?, ?, ?)", row)
            if sent is not None:
                db.execute("delete from sent where mechanism = ? and since <= ?", (mechanism, sent.since))

    def publications(self, mechanism: int = 0) -> tuple[tuple[int, Weights], ...]:
        """(block of the set, weights) of each, oldest first."""
        query = "select block, round, weights from publication where mechanism = ? order by block"
        return tuple((block, _weights(round, kept)) for block, round, kept in self._db.execute(query, (mechanism,)))

    def count_publications(self, mechanism: int = 0) -> int:
        return int(self._value("select count(*) from publication where mechanism = ?", (mechanism,)))

    def mechanisms(self) -> tuple[int, ...]:
        """Those that something was published for."""
        return tuple(row[0] for row in self._db.execute("select distinct mechanism from publication order by mechanism"))

    def last_publication(self, mechanism: int = 0) -> tuple[int, Weights] | None:
        """The newest of `publications`."""
        query = "select block, round, weights from publication where mechanism = ? order by block desc limit 1"
        row = self._db.execute(query, (mechanism,)).fetchone()
        return (row[0], _weights(row[1], row[2])) if row else None


def reading(path: Path, *, briefly: bool = False) -> AbstractContextManager[Store]:
    """A store that is only looked at, beside the process that writes it. As `opened`.

    briefly: one that nobody uses is read as it lies, by whoever may read the file; SQLite would put two files beside it.
    """
    return opened(path, read_only=True, immutable=briefly and not path.with_name(f"{path.name}-wal").exists())


@contextmanager
def opened(path: Path, *, read_only: bool = False, immutable: bool = False, say: Say = lambda *_: None) -> Iterator[Store]:
    """A store that is closed at the end. Raises Rejected(SETTING) as `Store` does, Unavailable for what SQLite cannot read or
    write: a damaged file, a disk that fails."""
    store = Store(path, read_only=read_only, immutable=immutable, say=say)
    try:
        yield store
    except sqlite3.Error as error:
        raise Unavailable(str(path), str(error)) from None
    finally:
        store.close()


def _keep_tensor_digests(db: sqlite3.Connection, found: Sequence[tuple[str, str, int]]) -> None:
    """(content id, digest, block) each; the newest counts, since a content's tensors change only with how they are digested."""
    db.executemany(
        "insert into content(content_id, tensor_digest, since) values (?1, ?2, ?3)"
        " on conflict do update set tensor_digest = ?2, since = min(coalesce(since, ?3), ?3)",
        found,
    )


def _import(db: sqlite3.Connection, losses: LossesOfAnother) -> None:
    came = losses.came
    row = (came.source, came.address, came.block, came.at, came.cells, came.checked)
    number = db.execute("insert into imported values (null, ?, ?, ?, ?, ?, ?)", row).lastrowid
    cells = [
        (x.content_id, x.tokenizer_id, x.profile, x.loss.sample, x.loss.nats, x.loss.num_tokens, x.loss.reason, number)
        for x in losses.cells
    ]
    db.executemany("insert or ignore into loss values (?, ?, ?, ?, ?, ?, ?, ?)", cells)
    _keep_tensor_digests(db, losses.tensor_digests)


def no_store(path: Path) -> Rejected:
    how = "run `sn29 validator` first, or name the folder of one that has run: --state.dir"
    return Rejected(Reason.SETTING, f"no store at {path}", "the state folder of a validator that has run", advice=how)


def _run(db: sqlite3.Connection, statements: str) -> None:
    """One after the other: `executescript` would end the transaction."""
    for statement in filter(str.strip, statements.split(";")):
        db.execute(statement)


def _remove(part: Path) -> None:
    """A file that was not finished, with what SQLite may have put beside it."""
    for more in ("", "-journal", "-wal", "-shm"):
        part.with_name(part.name + more).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """A file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(weights: Weights) -> str:
    return json.dumps(dict(weights.by_hotkey))


def _weights(block: int, text: str) -> Weights:
    return Weights(block, MappingProxyType(json.loads(text)))


class _Transaction:
    """`with` block that holds SQLite's write lock from its first line: all of it is kept, or nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("begin immediate")
        return self._db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("rollback" if kind else "commit")


# --- compacting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compacted:
    """What `compact` did."""

    bytes_before: int
    bytes_after: int
    rounds: int
    """That were forgotten."""
    losses: int
    """That went with them."""


def compact(path: Path, keep_rounds: int = 0, progress: Callable[[str], None] = lambda _: None) -> Compacted:
    """Writes the store anew without its empty pages, and puts the new file in the old one's place when it is on the disk.

    keep_rounds: finished rounds that are kept, the newest ones; 0: all. Of an older round go its record and weights, and the
    losses of texts that it names and no kept round does. Nothing goes that a later round asks for: claims, first blocks,
    refusals, what was seen of repositories and tensors, standings, publications, notes of what was sent, and the newest record
    with its weights and the memory of the crowns. Losses of texts that no record names belong to a round that is open, and stay.

    The caller holds the lock of the state folder. Raises Rejected(SETTING).
    """
    if not path.exists():
        raise no_store(path)
    store = Store(path)  # a file of an older schema is brought up to date first
    part = path.with_name(f".{path.name}.compact.part")
    try:
        store._db.execute("pragma busy_timeout=2000")
        if store._db.execute("pragma wal_checkpoint(truncate)").fetchone()[0]:
            raise Rejected(Reason.SETTING, f"{path}, which another process reads now", "a store that nobody uses; try again")
        _remove(part)
        if keep_rounds:
            rounds, losses = _copy_newest(store._db, part, keep_rounds, progress)
        else:
            progress("copying")
            store._db.execute("vacuum into ?", (str(part),))
            rounds = losses = 0
        store.close()
        was = path.stat()
        os.chown(part, was.st_uid, was.st_gid)
        part.chmod(stat.S_IMODE(was.st_mode))
        _flush(part)
        done = Compacted(was.st_size, part.stat().st_size, rounds, losses)
        for more in ("-wal", "-shm"):  # empty, and of the old file: beside the new one they would be taken for its own
            path.with_name(path.name + more).unlink(missing_ok=True)
        os.replace(part, path)
        _flush(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise Rejected(Reason.SETTING, f"{path}: {error}", "a store, and as much free room on its disk as it takes") from None
    finally:
        store.close()
        _remove(part)
    return done


def _copy_newest(db: sqlite3.Connection, part: Path, keep_rounds: int, progress: Callable[[str], None]) -> tuple[int, int]:
    """Writes `part` without what is forgotten. (rounds, losses) that are."""
    blocks = [row[0] for row in db.execute("select block from round where record is not null order by block desc")]
    old = set(blocks[keep_rounds:])
    named, kept = set[str](), set[str]()
    for count, block in enumerate(blocks):
        progress(f"reading record {count + 1} of {len(blocks)}")
        text = db.execute("select record from round where block = ?", (block,)).fetchone()[0]
        samples = {s.id for c in decode(text.encode()).competitions.values() for s in c.samples}
        (named if block in old else kept).update(samples)
    progress("copying")
    db.execute("pragma temp_store=memory")
    db.execute("create temp table gone(key primary key) without rowid")
    db.executemany("insert into gone values (?)", [(key,) for key in (*(named - kept), *old)])
    db.execute("attach ? as part", (str(part),))
    db.execute("pragma part.journal_mode=off")  # nobody uses it yet
    losses = 0
    with _Transaction(db):
        _run(db, _TABLES.replace("create table ", "create table part."))
        for (table,) in db.execute("select name from part.sqlite_master where type = 'table'").fetchall():
            key = {"loss": "sample", "round": "block"}.get(table, "null")
            rows = db.execute(f"insert into part.{table} select * from main.{table} where {key} is null or {key} not in gone")
            if table == "loss":
                losses = db.execute("select count(*) from main.loss").fetchone()[0] - rows.rowcount
        first = "select 'first_decided', min(block) from main.round where weights is not null having count(*)"
        db.execute(f"insert or ignore into part.meta {first}")
    return len(old), losses
