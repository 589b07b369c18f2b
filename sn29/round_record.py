"""Everything that a round's weights depend on, and what came out: written down so that anybody can compute it again.

A record is canonical JSON: ASCII, keys sorted, no spaces, floats as the shortest text that reads back as the same float64,
whole numbers without a point. So one record has one text, and the sha256 of the text is its address. A file of records
is named `<block>-<first 16 digits of the address>.json` (`record_files`).

Losses stand in the JSON itself. 10 models x 1,500 samples are 381 kB: 275 kB of losses, 88 kB of sample ids and sizes, the
rest 18 kB. As float64 in an .npy file beside it the losses would be 120 kB. At 20 rounds a day the difference is 1.1 GB a year
and competition: worth one file, one hash, and nothing to go astray. A loss of +inf (a sample that the model could not
be scored on) is null, and the reasons stand beside them, one for each null, in order. NaN does not occur. A model that was
stopped before the end of the window has losses of the leading samples only, and says why (`rules.sequential`).

The fields of the JSON are the fields of the frozen records below; `RoundRecord` adds "schema": 5. What the rules alone
understand is kept as the rules wrote it: a competition's parameters, the hall of fame, a scoring rule's memory and duels.

Schema 4 knew no stopping: its models have no `stopped`. Schema 3 knew a model by its files alone: its models have no
`tensor_digest` and no `resembles` either. Schema 2 knew no mechanisms: it has one `weights`, and one `last_weights` or null,
which are those of mechanism 0. Records of all three are read, and are records of schema 5 from then on: `address` is that of
the text of schema 5, while the name of a file of an older schema
carries, and is checked against, the sha256 of the text that stands in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

from sn29.errors import Reason, Rejected
from sn29.records import Entry, Head, ModelFacts, Outcome, Score, Weights, Window

SCHEMA = 5
_NEW_OF_MODELS: Mapping[int, Mapping[str, str]] = {4: {"tensor_digest": "", "resembles": ""}, 5: {"stopped": ""}}
"""Fields of a model's record that a schema brought, with what they are in records of older ones."""
MAX_BYTES = 64 * 2**20
"""Longest text that is read, in bytes: room for 3.4 million losses, 200 times a round of 10 models and 1,500 samples."""

_TOO_LARGE = 2**53
"""No count and no block comes near; from there on other readers of JSON round whole numbers, and a store takes none of 2**63."""

Json = Any
"""A JSON value that only its owner understands. Its floats are finite."""
Nats = Annotated[float, "+inf is null"]


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One evaluation text, without the text."""

    id: str
    """First 32 hex digits of the text's sha256."""
    num_bytes: int
    """Its length in UTF-8."""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One commitment to a competition and what became of it."""

    outcome: Outcome
    """Hotkey, block of the commitment, model and content id; status; reason code, detail, got and limit if refused."""
    entry: Entry | None = None
    """What it stands for in the scoring: content id and since when this hotkey claims it. None: not a valid entry."""
    tokenizer_id: str = ""
    """Fingerprint of the competition's tokenizer, or the object id of the model's own; empty unless it was evaluated."""
    facts: ModelFacts | None = None
    """What its metadata said; None when it was not read in this round."""
    num_tokens: int = 0
    """Tokens of all samples that were scored."""
    losses: tuple[Nats, ...] = ()
    """Summed nats of each sample, in the order of `CompetitionRecord.samples`; +inf where it could not be scored; empty
    unless it was evaluated. Of a model that was stopped: of the leading samples, those that were measured."""
    unscored: tuple[str, ...] = ()
    """Why, for each +inf in `losses`, in order."""
    tensor_digest: str = ""
    """`models.checkpoint.tensor_digest` of its weights: of two models with the same one the later is a copy. Empty while
    the validator has never evaluated them."""
    resembles: str = ""
    """Hotkey of the earlier model whose weights look like its own (see `models.fingerprint`): it decides nothing."""
    stopped: str = ""
    """Why it was measured on the leading samples only; empty: on all of them, or not evaluated."""

    @property
    def hotkey(self) -> str:
        return self.outcome.hotkey

    @property
    def evaluated(self) -> bool:
        return self.outcome.status == "evaluated"


@dataclass(frozen=True, slots=True)
class CompetitionRecord:
    """One competition in one round."""

    file_sha256: str
    """sha256 hex of the competition file's text."""
    parameters: Json
    """The competition as it was in force in this round, every field: a replay needs no file."""
    window: Window
    """The span of blocks whose first block's hash drew the samples."""
    datasets: Mapping[str, str]
    """Revision (Hub commit) that samples were drawn from, by data set; empty text for a folder of this machine."""
    samples: tuple[SampleRecord, ...]
    """In the order in which they were measured: that of the draw, or `rules.sequential.measuring_order`."""
    models: tuple[ModelRecord, ...]
    """Everybody who committed to this competition: oldest commitment first, of one block the smaller hotkey first."""
    memory_before: Json
    """What the scoring rule remembered of earlier rounds."""
    memory_after: Json
    """What it will remember of this one."""
    scores: tuple[Score, ...]
    """Sorted by hotkey."""
    duels: tuple[Json, ...] = ()
    """Comparisons that the scoring rule made, as it states them (infinite bounds as null)."""

    def __post_init__(self) -> None:
        """Raises Rejected(RECORD) for what contradicts itself."""
        name = self.window.competition
        hotkeys = [m.hotkey for m in self.models]
        if len(set(hotkeys)) < len(hotkeys):
            _refuse(", ".join(sorted(hotkeys)), "every hotkey once", f"{name}: models")
        for m in self.models:
            where, wanted = f"{name}: {m.hotkey}", len(self.samples) if m.evaluated else 0
            if m.stopped and not 0 < len(m.losses) < wanted:
                _refuse(f"{len(m.losses)} losses of who was stopped", f"1 to {wanted - 1} (status {m.outcome.status})", where)
            if not m.stopped and len(m.losses) != wanted:
                _refuse(f"{len(m.losses)} losses", f"{wanted} (status {m.outcome.status})", where)
            if m.num_tokens < 0:
                _refuse(f"{m.num_tokens} tokens", "0 or more", where)
            if m.evaluated and m.entry is None:
                _refuse("no entry", "an entry of every model that was evaluated", where)
            if not all(loss >= 0 for loss in m.losses):
                _refuse("a loss that is negative or NaN", "nats, 0 or more, or null", where)
            if len(m.unscored) != m.losses.count(math.inf):
                _refuse(f"{len(m.unscored)} reasons", f"one for each of {m.losses.count(math.inf)} nulls", where)

    @property
    def mechanism(self) -> int:
        """Number of the mechanism that pays it."""
        number = self.parameters.get("mechanism", 0) if isinstance(self.parameters, Mapping) else 0
        return number if type(number) is int else 0

    def model(self, hotkey: str) -> ModelRecord | None:
        return next((m for m in self.models if m.hotkey == hotkey), None)

    @property
    def losses(self) -> Mapping[str, tuple[float, ...]]:
        """Of every model that was evaluated, by hotkey; a shorter row for who was stopped."""
        return {m.hotkey: m.losses for m in self.models if m.evaluated}


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round of one validator. Two validators that agree write the same record, to the byte."""

    head: Head
    """The block that the round belongs to, and its hash. A block is 12 s."""
    competitions: Mapping[str, CompetitionRecord]
    """By name."""
    no_competition: tuple[Outcome, ...]
    """Commitments that cannot be parsed, or that name a competition that is not in force."""
    hall_of_fame: Json
    """The hall of fame as it was in force."""
    registered: tuple[str, ...]
    """Hotkeys that were registered on the subnet at the round's block, sorted: nobody else gets weight."""
    last_weights: Mapping[int, Weights]
    """What this validator's round before decided, by mechanism: a part of it is kept. Empty in the first round."""
    weights: Mapping[int, Weights]
    """What this round decided, by mechanism."""
    versions: Mapping[str, str]
    """Package -> version, of whatever computes a number here."""
    machine: Mapping[str, str]
    """`dtype` and `device` of the evaluation."""

    def outcomes_of(self, hotkey: str) -> tuple[Outcome, ...]:
        """Everything that this round says about a hotkey's commitment."""
        entered = (m.outcome for _, c in sorted(self.competitions.items()) for m in c.models)
        return tuple(o for o in (*self.no_competition, *entered) if o.hotkey == hotkey)

    def weights_of(self, competition: str) -> Mapping[str, float]:
        """Weights by hotkey of the mechanism that pays a competition; of mechanism 0 for what is no competition."""
        kept = self.competitions.get(competition)
        decided = self.weights.get(kept.mechanism if kept else 0)
        return decided.by_hotkey if decided else {}


# --- text and back ----------------------------------------------------------------------------------------------------


def encode(record: RoundRecord) -> bytes:
    """The record's one text. Raises ValueError for a float that is not finite where no field allows it."""
    return canonical({"schema": SCHEMA, **_plain(RoundRecord, record)})


def decode(text: bytes, where: str = "record") -> RoundRecord:
    """From a text that `encode` could have written, of this schema or of schemas 2 to 4.

    Raises Rejected(RECORD) for any other, naming the field.
    """
    data = loads(text, where)
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or not 2 <= schema <= SCHEMA:
        _refuse(f"schema {schema!r}", f"schema 2 to {SCHEMA}", where)
    spelled = canonical(data)  # a JSON value has one text: if that is the text, the record has no other either
    del data["schema"]
    data = _from_2(data) if schema == 2 else data
    for newer in range(schema + 1, SCHEMA + 1):
        data = _with_models_of(newer, data)
    record: RoundRecord = _read(RoundRecord, data, where)
    if spelled != text:
        _refuse("another spelling of the same record", "sorted keys, no spaces, shortest floats", where)
    return record


def _from_2(data: dict[str, Json]) -> dict[str, Json]:
    """The fields of schema 3. What is not as schema 2 has it is left for the reader to refuse."""
    changed = dict(data)
    for name in ("weights", "last_weights"):
        if name in data:
            changed[name] = {} if data[name] is None and name == "last_weights" else {"0": data[name]}
    return changed


def _with_models_of(schema: int, data: dict[str, Json]) -> dict[str, Json]:
    """The fields of a schema. What is not as the one before has it is left for the reader to refuse."""
    competitions, new = data.get("competitions"), _NEW_OF_MODELS.get(schema, {})
    if not isinstance(competitions, dict):
        return data
    return {**data, "competitions": {name: _with_fields(kept, new, schema) for name, kept in competitions.items()}}


def _with_fields(kept: Json, new: Mapping[str, str], schema: int) -> Json:
    if not isinstance(kept, dict) or not isinstance(kept.get("models"), list):
        return kept
    models = [m if isinstance(m, dict) else {} for m in kept["models"]]
    for name in new:
        if any(name in m for m in models):
            _refuse(f"the field {name}", f"the fields of schema {schema - 1}", "record: models")
    return {**kept, "models": [{**m, **new} for m in models]}


def address(record: RoundRecord) -> str:
    """sha256 hex of the record's text, as `encode` writes it."""
    return hashlib.sha256(encode(record)).hexdigest()


def canonical(value: Json) -> bytes:
    """A JSON value's one text. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def loads(text: bytes, where: str) -> Json:
    """Strict JSON: at most MAX_BYTES, no key twice, no NaN, no float beyond float64. Raises Rejected(RECORD)."""
    if len(text) > MAX_BYTES:
        _refuse(f"{len(text):,} bytes", f"at most {MAX_BYTES:,} bytes", where)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        _refuse(" ".join(str(error).split())[:200], "JSON, no key twice, finite numbers", where)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:80]!r} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name}")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]}")
    return number


def _refuse(got: object, limit: object, where: str) -> NoReturn:
    raise Rejected(Reason.RECORD, got, limit, where)


@cache
def _fields(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _plain(kind: Any, value: Any) -> Json:
    """A value of a field's type as JSON; what `_read` takes back."""
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return {name: _plain(inner, getattr(value, name)) for name, inner in _fields(kind).items()}  # type: ignore[arg-type]
    if origin is tuple:
        inner = get_args(kind)[0]
        if inner is Nats:
            return [None if loss == math.inf else float(loss) for loss in value]
        return [_plain(inner, item) for item in value]
    if origin is not None and issubclass(origin, Mapping):
        return {str(key): _plain(get_args(kind)[1], item) for key, item in value.items()}
    if origin is UnionType:
        return None if value is None else _plain(_other_than_none(kind), value)
    return float(value) if kind is float else value


def _read(kind: Any, value: Json, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        inner = get_args(kind)[0]
        if inner is Nats:
            return _read_losses(value, where)
        return tuple(_read(inner, item, f"{where}[{i}]") for i, item in enumerate(_of_type(list, value, where)))
    if origin is not None and issubclass(origin, Mapping):
        of_key, inner = get_args(kind)
        items = _of_type(dict, value, where).items()
        return {_key(of_key, key, where): _read(inner, item, f"{where}.{key[:80]}") for key, item in items}
    if origin is UnionType:
        return None if value is None else _read(_other_than_none(kind), value, where)
    return value if kind is Any else _of_type(kind, value, where)


def _read_fields(kind: type, value: Json, where: str) -> Any:
    data, fields = _of_type(dict, value, where), _fields(kind)
    for name in data:
        if name not in fields:
            _refuse(f"the field {name[:80]}", f"one of {', '.join(fields)}", where)
    for name in fields:
        if name not in data:
            _refuse("nothing", "a value", f"{where}.{name}")
    return kind(**{name: _read(inner, data[name], f"{where}.{name}") for name, inner in fields.items()})


def _key(kind: type, text: str, where: str) -> Any:
    if kind is int and not re.fullmatch("0|[1-9][0-9]{0,8}", text):
        _refuse(f"the key {text[:80]!r}", "a whole number", where)
    return kind(text)


def _read_losses(value: Json, where: str) -> tuple[float, ...]:
    losses = tuple(math.inf if item is None else item for item in _of_type(list, value, where))
    strange = next((i for i, loss in enumerate(losses) if type(loss) is not float), None)
    return losses if strange is None else _refuse(losses[strange], "a float or null", f"{where}[{strange}]")


def _of_type(kind: type, value: Json, where: str) -> Any:
    if type(value) is not kind:  # isinstance would take true for 1
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number with a point"}
        _refuse(json.dumps(value)[:80], names.get(kind, kind.__name__), where)
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        _refuse(json.dumps(value)[:80], f"a whole number below {_TOO_LARGE:,}", where)
    return value


def _other_than_none(kind: Any) -> Any:
    return next(inner for inner in get_args(kind) if inner is not NoneType)
