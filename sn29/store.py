"""What a validator must not forget: one SQLite file (WAL). The only `import sqlite3` beside the localnet's ledger.

What was kept here survives `kill -9` at any instant: every method is one transaction, flushed before it returns. Losses are
keyed by content, tokenizer, numeric profile and sample, so a row is never used for anything but what it was measured on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sn29.errors import Reason, Rejected
from sn29.records import Commitment, Loss, Outcome, Weights
from sn29.round_record import RoundRecord, decode, encode

SCHEMA = 2

_TABLES = """
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
"""


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
class StoredRound:
    """A round as it was opened, and as it ended (None while it is open)."""

    block: int
    plan: Mapping[str, Any]
    record: RoundRecord | None


class Store:
    """The validator's memory, in `path`. Several processes may read while one writes."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Opens or creates the file. Raises Rejected(SETTING) for a file of another schema."""
        if read_only and not path.exists():
            raise Rejected(Reason.SETTING, f"no store at {path}", "the state folder of a validator that has run")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            address = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._db = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
            if not read_only:
                self._create()
        except (OSError, sqlite3.Error) as error:
            raise Rejected(Reason.SETTING, f"{path}: {error}", "a folder that can be written to") from None
        schema = self._value("select value from meta where key = 'schema'")
        if schema != str(SCHEMA):
            raise Rejected(Reason.SETTING, f"schema {schema} in {path}", f"schema {SCHEMA}")

    def _create(self) -> None:
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")  # a kept loss survives a power cut too
        with self._transaction() as db:
            if not db.execute("select 1 from sqlite_master where name = 'meta'").fetchone():
                for statement in filter(str.strip, _TABLES.split(";")):
                    db.execute(statement)
                db.execute("insert into meta values ('schema', ?)", (str(SCHEMA),))

    def close(self) -> None:
        self._db.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    def _value(self, query: str, values: Sequence[object] = ()) -> Any:
        row = self._db.execute(query, values).fetchone()
        return row[0] if row else None

    # --- identity of the chain --------------------------------------------------------------------------------------

    def belong_to(self, chain: str) -> None:
        """Ties the store to one chain and subnet. Raises Rejected(SETTING) when it belongs to another."""
        with self._transaction() as db:
            db.execute("insert or ignore into meta values ('chain', ?)", (chain,))
        kept = self._value("select value from meta where key = 'chain'")
        if kept != chain:
            raise Rejected(Reason.SETTING, f"a store of {kept}", f"one of {chain}; give another --state.dir")

    # --- claims and verdicts ----------------------------------------------------------------------------------------

    def claims(self) -> dict[str, tuple[int, str]]:
        """Model id, content id or weights id -> the earliest (block, hotkey) that was ever seen to claim it."""
        return {key: (block, hotkey) for key, block, hotkey in self._db.execute("select key, block, hotkey from claim")}

    def keep_claims(self, claims: Mapping[str, tuple[int, str]]) -> None:
        """Notes claims; of two for one key the earlier stays, whatever was noted first."""
        with self._transaction() as db:
            db.executemany(
                "insert into claim values (?1, ?2, ?3) on conflict do update set block = ?2, hotkey = ?3"
                " where (?2, ?3) < (block, hotkey)",
                [(key, block, hotkey) for key, (block, hotkey) in claims.items()],
            )

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
            db.executemany("insert or replace into loss values (?, ?, ?, ?, ?, ?, ?)", rows)

    def count_losses(self) -> int:
        return int(self._value("select count(*) from loss"))

    # --- rounds and weights -----------------------------------------------------------------------------------------

    def open_round(self, block: int, plan: Mapping[str, Any]) -> None:
        """Fixes what the round at `block` is about before anything of it is done; a restart goes on with it."""
        with self._transaction() as db:
            db.execute("insert or ignore into round(block, plan) values (?, ?)", (block, json.dumps(plan)))

    def finish_round(self, block: int, record: RoundRecord, weights: Weights, standings: Iterable[Standing] = ()) -> None:
        """Keeps the round's record, who stood where in it, and the weights it decided, in one step."""
        kept = encode(record).decode()
        rows = [(block, x.competition, x.model, x.hotkey, x.weight) for x in standings]
        with self._transaction() as db:
            db.execute(
                "update round set record = ?, weights = ? where block = ?", (kept, json.dumps(dict(weights.by_hotkey)), block)
            )
            db.executemany("insert or replace into standing values (?, ?, ?, ?, ?)", rows)

    def begin(self, record: RoundRecord, standings: Iterable[Standing], claims: Mapping[str, tuple[int, str]]) -> None:
        """Takes over another validator's round as the first one, in one step. See `weights` and `taken_over`."""
        block, kept = record.head.block, encode(record).decode()
        rows = [(block, x.competition, x.model, x.hotkey, x.weight) for x in standings]
        with self._transaction() as db:
            db.execute("insert into meta values ('taken_over', ?)", (str(block),))
            weights = json.dumps(dict(record.weights.by_hotkey))
            db.execute("insert into round(block, plan, record, weights) values (?, '{}', ?, ?)", (block, kept, weights))
            db.executemany("insert into standing values (?, ?, ?, ?, ?)", rows)
            db.executemany("insert into claim values (?, ?, ?)", [(key, *claim) for key, claim in claims.items()])

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

    def weights(self, *, before: int | None = None) -> Weights | None:
        """The weights of the newest finished round (before a block, if one is given); None when there is none."""
        row = self._db.execute(
            "select block, weights from round where weights is not null and block < ? order by block desc limit 1",
            (before if before is not None else 1 << 62,),
        ).fetchone()
        return Weights(row[0], MappingProxyType(json.loads(row[1]))) if row else None

    def keep_publication(self, block: int, weights: Weights) -> None:
        """Notes that these weights were set on chain at `block` and read back."""
        with self._transaction() as db:
            db.execute(
                "insert or replace into publication values (?, ?, ?)",
                (block, weights.block, json.dumps(dict(weights.by_hotkey))),
            )

    def publications(self) -> tuple[tuple[int, Weights], ...]:
        """(block of the set, weights) of each, oldest first."""
        rows = self._db.execute("select block, round, weights from publication order by block")
        return tuple((row[0], Weights(row[1], MappingProxyType(json.loads(row[2])))) for row in rows)


class _Transaction:
    """`with` block that holds SQLite's write lock from its first line: all of it is kept, or nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("begin immediate")
        return self._db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("rollback" if kind else "commit")
