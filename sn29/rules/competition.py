"""Competitions and the hall of fame, read from YAML. The only owner of `yaml`.

A competition is one file, `competitions/<name>.yaml`; adding the file registers the competition. Whatever is wrong
with a file is said when it is read, in one line that names the file, the field, what stands there and what the rule
asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sn29.errors import Reason, Rejected
from sn29.records import ModelFacts

SHARE_TOLERANCE = 1e-9
"""By how much the reward shares of all competitions together may miss 1: room for float addition, not for a typing
error."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,15}")
_MAX_SHOWN = 80


# ---- values ----------------------------------------------------------------------------------------------------------


def _broken(got: object, rule: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{rule}", {"got": got, "rule": rule})


def _number(value: object) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _broken(value, "a number")
    if not math.isfinite(value):
        raise _broken(value, "a finite number")
    return value


def _whole_number(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise _broken(value, "a whole number")
    return int(number)


def _matching(pattern: str, rule: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise _broken(value, rule)
        return value

    return AfterValidator(check)


Number = Annotated[float, BeforeValidator(_number)]
WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
HubId = Annotated[str, _matching(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", "a Hub id: owner/name")]
Revision = Annotated[str, _matching("[0-9a-f]{40}", "a commit sha of 40 hex digits in lower case, in quotes")]
Fingerprint = Annotated[str, _matching("[0-9a-f]{64}", "a sha256 of 64 hex digits in lower case, in quotes")]
Hotkey = Annotated[str, _matching("[1-9A-HJ-NP-Za-km-z]{47,48}", "a hotkey: an ss58 address")]
Glob = Annotated[str, _matching(r"(?!/)(?!.*\.\.)[^\\\s]+", "a file pattern inside the data set, such as data/*.parquet")]
Words = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    """Frozen; a field that is not known is an error, and one that is missing too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        known = ", ".join(field for field in cls.model_fields if field != "name")
        if not isinstance(data, Mapping):
            raise _broken(data, f"a mapping with the fields {known}")
        unknown = [str(key) for key in data if key not in cls.model_fields]
        if unknown:
            raise _broken(f"the field {unknown[0]}", f"one of {known}")
        return data


_Record = TypeVar("_Record", bound=_Section)


# ---- a competition ---------------------------------------------------------------------------------------------------


class FixedTokenizer(_Section):
    """Every model reads its text through this tokenizer; its own, if it has one, is not looked at."""

    hub: HubId
    """Hub repository that the tokenizer is fetched from."""
    revision: Revision | None = None
    """Commit of that repository, 40 hex digits. May be left out: the fingerprint already says which tokenizer is
    meant."""
    fingerprint: Fingerprint | None
    """sha256 of the tokenizer's content, 64 hex digits, as `models.tokenizer` computes it. null: not pinned yet."""
    start_token: Annotated[WholeNumber, Field(ge=0)]
    """Id of the token that stands in front of every text, unscored, so that the text's first token costs something
    too."""


class FreeTokenizer(_Section):
    """Every model brings its own tokenizer."""

    free: Literal[True]
    start_token: Annotated[WholeNumber, Field(ge=0)] | None = None
    """Id of the token that stands in front of every text, for all models; left out: the one that a model's config
    names."""


class HubDataset(_Section):
    """Evaluation text from parquet files of a Hub data set."""

    hub: HubId
    revision: Revision | None
    """Commit of the data set, 40 hex digits. null: not pinned yet, and validators on it may draw different samples."""
    files: Glob
    """Pattern of the parquet files inside the data set."""
    column: Words
    """Name of the column that holds the text."""


class FolderDataset(_Section):
    """Evaluation text from parquet files in a folder of this machine: for localnet and for trying things out."""

    folder: Words
    files: Glob
    """Pattern of the parquet files inside the folder."""
    column: Words
    """Name of the column that holds the text."""


class Limits(_Section):
    """What a model may be at most. A value equal to the limit is allowed."""

    parameters: Annotated[WholeNumber, Field(gt=0)]
    """Elements of all tensors in the safetensors headers."""
    bytes: Annotated[WholeNumber, Field(gt=0)]
    """All files of the repository together, in bytes."""
    max_tokens: Annotated[WholeNumber, Field(gt=0)]
    """Tokens of one sample. A sample that is longer under a model's tokenizer cannot be scored by that model."""
    max_chars: Annotated[WholeNumber, Field(gt=0)]
    """Characters of one sample. A longer text is cut here for all models alike, before any tokenizer sees it."""
    round_trip_failures: Annotated[WholeNumber, Field(ge=0)]
    """Samples per window that a tokenizer may fail to give back unchanged; with one more the model is refused."""


class Samples(_Section):
    """How many texts decide, and for how long."""

    count: Annotated[WholeNumber, Field(gt=0)]
    """Samples per window."""
    window_blocks: Annotated[WholeNumber, Field(gt=0)]
    """Length of a window in blocks of 12 s. Each window draws its samples anew."""


class Advantage(_Section):
    """By how much a later model must be better: `initial * decay_per_epoch ** (age in epochs)` of the earlier one's
    loss."""

    initial: Annotated[Number, Field(ge=0, lt=1)]
    """Fraction of the loss by which a later model must be better than one committed this very block."""
    decay_per_epoch: Annotated[Number, Field(gt=0, le=1)]
    """What is left of the advantage after one more epoch of age, as a fraction."""
    blocks_per_epoch: Annotated[WholeNumber, Field(gt=0)]
    """Length of an epoch in blocks."""


class Scoring(_Section):
    """How losses become shares of the competition's reward."""

    rule: Literal["oldest_holder"]
    """See `rules.scoring.oldest_holder`."""
    group: Annotated[WholeNumber, Field(gt=0)]
    """Samples whose losses are added up to decide one win."""
    skew: Annotated[Number, Field(gt=0, le=16)]
    """Exponent on the win rate: 1 pays in proportion to wins, more favours the best."""
    advantage: Advantage


class Pool(_Section):
    """How many models of the competition are evaluated in one round at most: `keep + pending`."""

    keep: Annotated[WholeNumber, Field(gt=0)]
    """Models that stay under evaluation because of their weight in the last round."""
    pending: Annotated[WholeNumber, Field(ge=0)]
    """Further models per round, first those that were never evaluated."""


def _kind(key: str, with_key: str, without_key: str) -> Discriminator:
    def choose(value: object) -> str:
        has_key = key in value if isinstance(value, Mapping) else hasattr(value, key)
        return with_key if has_key else without_key

    return Discriminator(choose)


class Competition(_Section):
    """The rules for one prize."""

    name: Words
    """The file's name without `.yaml`, as commitments spell it. Not a field of the file."""
    reward_share: Annotated[Number, Field(ge=0, le=1)]
    """Share of the subnet's reward. The shares of all competitions in force sum to 1."""
    families: tuple[Literal["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"], ...]
    """Exact names of the transformers classes that a model's config.json may name."""
    tokenizer: Annotated[
        Annotated[FreeTokenizer, Tag("<free>")] | Annotated[FixedTokenizer, Tag("<fixed>")],
        _kind("free", "<free>", "<fixed>"),
    ]
    limits: Limits
    dataset: Annotated[
        Annotated[FolderDataset, Tag("<folder>")] | Annotated[HubDataset, Tag("<hub>")],
        _kind("folder", "<folder>", "<hub>"),
    ]
    samples: Samples
    scoring: Scoring
    pool: Pool

    @model_validator(mode="after")
    def _fits_together(self) -> Competition:
        if not self.families or len(set(self.families)) != len(self.families):
            raise _broken(f"families {list(self.families)}", "at least one, and each once")
        if self.samples.count < self.scoring.group:
            raise _broken(f"samples.count {self.samples.count}", f"at least scoring.group, {self.scoring.group}")
        return self

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Fields by which validators could come to judge on different content. A public network refuses the file then.

        A fixed tokenizer's revision is not among them: its fingerprint pins the content wherever it is fetched from.
        """
        found = []
        if isinstance(self.tokenizer, FixedTokenizer) and self.tokenizer.fingerprint is None:
            found.append("tokenizer.fingerprint")
        if isinstance(self.dataset, FolderDataset):
            found.append("dataset.folder")
        elif self.dataset.revision is None:
            found.append("dataset.revision")
        return tuple(found)


def violations(competition: Competition, facts: ModelFacts, largest_id: int | None = None) -> tuple[Rejected, ...]:
    """Every rule of the competition that a model breaks by its metadata; empty when it may be evaluated.

    `largest_id` is the largest id of the competition's own tokenizer; None for a free one, whose ids only the
    evaluation sees.
    """
    limits, tokenizer = competition.limits, competition.tokenizer
    found = []
    if facts.family not in competition.families:
        found.append((Reason.FAMILY, facts.family, " or ".join(competition.families), "families"))
    if facts.num_parameters > limits.parameters:
        got, limit = f"{facts.num_parameters:,}", f"at most {limits.parameters:,}"
        found.append((Reason.PARAMETERS, got, limit, "limits.parameters"))
    if facts.num_bytes > limits.bytes:
        found.append((Reason.TOO_LARGE, f"{facts.num_bytes:,} bytes", f"at most {limits.bytes:,} bytes", "limits.bytes"))
    if isinstance(tokenizer, FreeTokenizer) and not facts.has_tokenizer:
        found.append((Reason.TOKENIZER, "no tokenizer.json", "a tokenizer in the repository", "tokenizer.free"))
    needed = max((i for i in (largest_id, tokenizer.start_token) if i is not None), default=-1)
    if needed >= facts.vocab_size:
        got, limit = f"{facts.vocab_size} rows", f"at least {needed + 1}: the ids go up to {needed}"
        found.append((Reason.VOCABULARY, got, limit, "tokenizer"))
    return tuple(Rejected(reason, got, limit, f"{competition.name}: {field}") for reason, got, limit, field in found)


# ---- the hall of fame ------------------------------------------------------------------------------------------------


class HallOfFameEntry(_Section):
    """A reward for something other than a model, paid out over time."""

    hotkey: Hotkey
    block: Annotated[WholeNumber, Field(ge=0)]
    """Block from which on the reward is paid."""
    reward_epochs: Annotated[Number, Field(gt=0)]
    """All that will ever be paid, in epochs of the subnet's whole miner emission: 0.2 is a fifth of one epoch's,
    once."""
    reason: Words
    """What it is for."""
    url: str = ""
    """Where that can be checked."""


class HallOfFame(_Section):
    """Entries and the speed at which they are paid: see `rules.weights.hall_of_fame_shares`."""

    max_fraction: Annotated[Number, Field(ge=0, le=1)]
    """Share of the weights, 0..1, that all entries together get at most."""
    decay_per_epoch: Annotated[Number, Field(gt=0, lt=1)]
    """What an entry pays in one epoch as a fraction of what it paid in the epoch before."""
    blocks_per_epoch: Annotated[WholeNumber, Field(gt=0)]
    """Length of an epoch in blocks."""
    entries: tuple[HallOfFameEntry, ...]


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_competition(name: str, text: str) -> Competition:
    """The competition `name`, from the text of `<name>.yaml`. Raises Rejected(COMPETITION_FILE)."""
    where = f"{name}.yaml"
    if not _NAME.fullmatch(name):
        raise Rejected(Reason.COMPETITION_FILE, f"the name {name!r}", f"a name like {_NAME.pattern}", where)
    data = _load(where, text)
    if "name" in data:
        raise Rejected(Reason.COMPETITION_FILE, "the field name", "no name inside: the file's name is the name", where)
    return _validate(Competition, where, {**data, "name": name})


def parse_hall_of_fame(text: str) -> HallOfFame:
    """From the text of `hall_of_fame.yaml`. Raises Rejected(COMPETITION_FILE)."""
    return _validate(HallOfFame, "hall_of_fame.yaml", _load("hall_of_fame.yaml", text))


def check_together(competitions: Sequence[Competition]) -> None:
    """That these can be in force at the same time. Raises Rejected(COMPETITION_FILE)."""
    if not competitions:
        raise Rejected(Reason.COMPETITION_FILE, "no competition", "at least one", "competitions")
    names = [c.name for c in competitions]
    if len(set(names)) != len(names):
        raise Rejected(Reason.COMPETITION_FILE, ", ".join(sorted(names)), "every name once", "competitions")
    total = math.fsum(c.reward_share for c in competitions)
    if abs(total - 1) > SHARE_TOLERANCE:
        shares = " + ".join(f"{c.reward_share:g} ({c.name})" for c in sorted(competitions, key=lambda c: c.name))
        raise Rejected(Reason.COMPETITION_FILE, f"{shares} = {total:.12g}", "1", "competitions: reward_share")


def _validate(record: type[_Record], where: str, data: Mapping[str, object]) -> _Record:
    try:
        return record.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    # The parts in angle brackets name our choice between two kinds of section, not a field of the file.
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
    rule = first["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
    got = first.get("ctx", {}).get("got", "nothing" if first["type"] == "missing" else first["input"])
    if first["type"] == "missing":
        rule = "a value"
    raise Rejected(Reason.COMPETITION_FILE, _shown(got), rule, f"{where}: {field}" if field else where)


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


# ---- YAML ------------------------------------------------------------------------------------------------------------


def _load(where: str, text: str) -> dict[str, object]:
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader with fewer types
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"{where}: line {mark.line + 1}" if mark else where
        raise Rejected(Reason.COMPETITION_FILE, error.problem or "unreadable text", "YAML", line) from None
    except RecursionError:
        raise Rejected(Reason.COMPETITION_FILE, "nested too deep", "a mapping of fields", where) from None
    except yaml.YAMLError as error:
        raise Rejected(Reason.COMPETITION_FILE, " ".join(str(error).split()), "YAML", where) from None
    if not isinstance(data, dict):
        raise Rejected(Reason.COMPETITION_FILE, _shown(data), "a mapping of fields", where)
    return data


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2's core schema, which are what a reader expects.

    PyYAML follows YAML 1.1, where 6.9e9 is a string, 1:30 is ninety, `no` is false and a second `limits:` silently
    replaces the first. Here 6.9e9 is a number, only true and false are booleans, and a repeated key is an error. Tags
    and aliases have no use in a file that people read to know the rules, so they are errors as well.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, "a tag (!) or an alias (*)", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} a second time", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: Iterable[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


# The longest numbers stay shorter than a commit sha, so that a sha of digits is never taken for one.
_resolve("null", r"(?:~|null|)$", ["~", "n", ""])
_resolve("bool", r"(?:true|false)$", "tf")
_resolve("int", r"(?:0|-?[1-9][0-9]{0,29})$", "-0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]{1,20}|[0-9]{1,20}\.[0-9]{0,20}|[0-9]{1,20}(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?$",
    "-+.0123456789",
)
_resolve("float", r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$", "-+.")
