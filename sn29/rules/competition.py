"""Competitions and the hall of fame, read from YAML.

A competition is one file, `competitions/<name>.yaml`; adding the file registers the competition. Whatever is wrong
with a file is said when it is read, in one line that names the file, the field, what stands there and what the rule
asks for.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sn29.errors import Reason, Rejected
from sn29.records import ModelFacts
from sn29.rules.fields import (
    Fingerprint,
    Glob,
    Hotkey,
    HubId,
    Number,
    Revision,
    Section,
    Weight,
    WholeNumber,
    Words,
    broken,
    validate,
)
from sn29.rules.scoring_fields import Advantage as Advantage
from sn29.rules.scoring_fields import Champion, OldestHolder
from sn29.rules.scoring_fields import Scoring as Scoring
from sn29.rules.yaml_text import load

SHARE_TOLERANCE = 1e-9
"""By how much the reward shares of a mechanism's competitions together may miss 1: room for float addition, not for a
typing error."""
MAX_MECHANISM = 15
"""The chain numbers a subnet's mechanisms within 16 bits that it shares with 4,096 subnets."""

SCHEDULE_FIELDS = ("clock", "changes", "overrides")
"""Fields of a file that say when its rules change and for whom: `rules.schedule` reads them."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,15}")


# ---- a competition ---------------------------------------------------------------------------------------------------


class FixedTokenizer(Section):
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


class FreeTokenizer(Section):
    """Every model brings its own tokenizer."""

    free: Literal[True]
    start_token: Annotated[WholeNumber, Field(ge=0)] | None = None
    """Id of the token that stands in front of every text, for all models; left out: the one that a model's config
    names."""
    default: FixedTokenizer | None = None
    """What a model reads through that brings none. Left out: such a model is refused. See `tokenizer_for`."""


class HubDataset(Section):
    """Evaluation text from parquet files of a Hub data set."""

    hub: HubId
    revision: Revision | None
    """Commit of the data set, 40 hex digits. null: not pinned yet, and validators on it may draw different samples."""
    files: Glob
    """Pattern of the parquet files inside the data set."""
    column: Words
    """Name of the column that holds the text."""
    weight: Weight = 1.0
    """This data set's part of a window's samples, in proportion to the weights of all: see `samples_per_dataset`."""


class FolderDataset(Section):
    """Evaluation text from parquet files in a folder of this machine: for localnet and for trying things out."""

    folder: Words
    files: Glob
    """Pattern of the parquet files inside the folder."""
    column: Words
    """Name of the column that holds the text."""
    weight: Weight = 1.0
    """This data set's part of a window's samples, in proportion to the weights of all: see `samples_per_dataset`."""


class Limits(Section):
    """What a model may be. A value equal to the limit is allowed."""

    parameters: Annotated[WholeNumber, Field(gt=0)]
    """Elements of all tensors in the safetensors headers, at most."""
    min_parameters: Annotated[WholeNumber, Field(ge=0)] = 0
    """The same, at least."""
    bytes: Annotated[WholeNumber, Field(gt=0)]
    """All files of the repository together, in bytes."""
    max_tokens: Annotated[WholeNumber, Field(gt=0)]
    """Tokens of one sample. A sample that is longer under a model's tokenizer cannot be scored by that model."""
    max_chars: Annotated[WholeNumber, Field(gt=0)]
    """Characters of one sample. A longer text is cut here for all models alike, before any tokenizer sees it."""
    round_trip_failures: Annotated[WholeNumber, Field(ge=0)]
    """Samples per window that a tokenizer may fail to give back unchanged; with one more the model is refused."""
    unscored: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """Share of a window's samples on which a model may have no finite loss, because its numbers overflow or because the
    sample is longer than `max_tokens` under its own tokenizer; with more it is refused. What is too long under the
    competition's tokenizer is so for every model and does not count. 0.1 of 1,500 samples: 150. Each such sample counts
    against the model anyway (as 28 % worse under `champion`): the limit is there to name a model that is broken."""


class Samples(Section):
    """How many texts decide, and for how long."""

    count: Annotated[WholeNumber, Field(gt=0)]
    """Samples per window."""
    window_blocks: Annotated[WholeNumber, Field(gt=0)]
    """Length of a window in blocks of 12 s. Each window draws its samples anew."""


@dataclass(frozen=True, slots=True)
class WhenEmpty:
    """What becomes of a competition's share in a round in which it has no valid model: see `rules.weights.combine`."""

    policy: Literal["share", "hold", "burn"] = "share"
    burn_hotkey: str = ""


class Pool(Section):
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


Dataset = Annotated[
    Annotated[FolderDataset, Tag("<folder>")] | Annotated[HubDataset, Tag("<hub>")], _kind("folder", "<folder>", "<hub>")
]


class Competition(Section):
    """The rules for one prize."""

    also: ClassVar[tuple[str, ...]] = ("dataset", *SCHEDULE_FIELDS)

    name: Words
    """The file's name without `.yaml`, as commitments spell it. Not a field of the file."""
    reward_share: Annotated[Number, Field(ge=0, le=1)]
    """Share of the reward of its mechanism. The shares of all competitions in force there sum to 1."""
    families: tuple[Literal["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"], ...]
    """Exact names of the transformers classes that a model's config.json may name."""
    tokenizer: Annotated[
        Annotated[FreeTokenizer, Tag("<free>")] | Annotated[FixedTokenizer, Tag("<fixed>")],
        _kind("free", "<free>", "<fixed>"),
    ]
    limits: Limits
    datasets: tuple[Dataset, ...]
    """Where the samples come from. A file may say `dataset: {...}` for `datasets: [{...}]`."""
    samples: Samples
    scoring: Scoring = Champion()
    pool: Pool
    grace_blocks: Annotated[WholeNumber, Field(ge=0)] = 0
    """For how many blocks after a change a model that was committed before it may still be what it was allowed to be:
    see `rules.schedule.rules_for`."""
    when_empty: Literal["share", "hold", "burn"] = "share"
    """Without a valid model the competition's share goes to the other competitions' models (share), stays with the
    last weights (hold), or goes to `burn_hotkey` (burn)."""
    burn_hotkey: Hotkey | None = None
    """Who gets the share with `when_empty: burn`: the subnet owner's hotkey, whose emission the chain burns."""
    mechanism: Annotated[WholeNumber, Field(ge=0, le=MAX_MECHANISM)] = 0
    """Number of the subnet's mechanism that the competition is paid by. Each mechanism has weights of its own on chain,
    and its part of the subnet's emission is the subnet owner's to set; a subnet has mechanism 0 alone unless the owner
    made more."""

    @model_validator(mode="before")
    @classmethod
    def _one_dataset_is_a_list_of_one(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "dataset" not in data:
            return data
        if "datasets" in data:
            raise broken("dataset and datasets", "one of the two")
        return {"datasets" if key == "dataset" else key: [v] if key == "dataset" else v for key, v in data.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Competition:
        if not self.families or len(set(self.families)) != len(self.families):
            raise broken(f"families {list(self.families)}", "at least one, and each once")
        if self.limits.min_parameters > self.limits.parameters:
            raise broken(f"limits.min_parameters {self.limits.min_parameters:,}", f"at most {self.limits.parameters:,}")
        if not self.datasets:
            raise broken("datasets []", "at least one")
        if 0 in samples_per_dataset(self):
            got = " + ".join(map(str, samples_per_dataset(self)))
            raise broken(f"samples.count {self.samples.count} = {got}", "at least one sample of every data set")
        if (self.when_empty == "burn") != (self.burn_hotkey is not None):
            raise broken(f"when_empty {self.when_empty}, burn_hotkey {self.burn_hotkey}", "burn and its hotkey, or neither")
        if isinstance(self.scoring, OldestHolder) and self.samples.count < self.scoring.group:
            raise broken(f"samples.count {self.samples.count}", f"at least scoring.group, {self.scoring.group}")
        return self

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Fields by which validators could come to judge on different content. A public network refuses the file then.

        A fixed tokenizer's revision is not among them: its fingerprint pins the content wherever it is fetched from.
        """
        found = []
        default = self.tokenizer.default if isinstance(self.tokenizer, FreeTokenizer) else self.tokenizer
        if default is not None and default.fingerprint is None:
            found.append("tokenizer.fingerprint" if default is self.tokenizer else "tokenizer.default.fingerprint")
        for index, dataset in enumerate(self.datasets):
            name = "dataset" if len(self.datasets) == 1 else f"datasets.{index}"
            if isinstance(dataset, FolderDataset):
                found.append(f"{name}.folder")
            elif dataset.revision is None:
                found.append(f"{name}.revision")
        return tuple(found)

    @property
    def dataset(self) -> HubDataset | FolderDataset:
        """The first data set: the one whose text a miner trains on unless told otherwise."""
        return self.datasets[0]

    @property
    def on_empty(self) -> WhenEmpty:
        """For `rules.weights.combine`."""
        return WhenEmpty(self.when_empty, self.burn_hotkey or "")

    @property
    def id(self) -> str:
        """sha256 hex of every value in force, defaults included: a verdict holds for exactly these rules.

        A file's own hash would not do: the same file means something else after each of its changes.
        """
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def samples_per_dataset(competition: Competition) -> tuple[int, ...]:
    """How many of a window's samples each data set gives, in the order of `datasets`; sums to `samples.count`.

    Largest remainder: count * weight / (sum of weights) rounded down, then one more for the largest fractions, the
    earlier data set first among equals. Weights 0.30, 0.35, 0.35 of 10 samples are 3, 3.5, 3.5: so 3, 4, 3.
    """
    weights, count = [d.weight for d in competition.datasets], competition.samples.count
    total = math.fsum(weights)
    quotas = [count * weight / total for weight in weights]
    shares = [math.floor(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - quotas[i], i))
    for index in order[: count - sum(shares)]:
        shares[index] += 1
    return tuple(shares)


def tokenizer_for(competition: Competition, has_own: bool) -> FixedTokenizer | None:
    """What a model reads its text through that has, or has not, a tokenizer.json; None: that one."""
    if isinstance(competition.tokenizer, FixedTokenizer):
        return competition.tokenizer
    return None if has_own else competition.tokenizer.default


def named_start_token(competition: Competition, has_own: bool) -> int | None:
    """Id of the token in front of every text as the rules name it; None: the one that the model's config names."""
    fixed, named = tokenizer_for(competition, has_own), competition.tokenizer.start_token
    return fixed.start_token if fixed is not None and named is None else named


def violations(competition: Competition, facts: ModelFacts, largest_id: int | None = None) -> tuple[Rejected, ...]:
    """Every rule of the competition that a model breaks by its metadata; empty when it may be evaluated.

    `largest_id` is the largest id of `tokenizer_for` this model; None when it reads through its own, whose ids only
    the evaluation sees. A model that was committed under older rules is judged by `rules.schedule.rules_for`.
    """
    limits = competition.limits
    found = []
    if facts.family not in competition.families:
        found.append((Reason.FAMILY, facts.family, " or ".join(competition.families), "families"))
    if facts.num_parameters > limits.parameters:
        got, limit = f"{facts.num_parameters:,}", f"at most {limits.parameters:,}"
        found.append((Reason.PARAMETERS, got, limit, "limits.parameters"))
    if facts.num_parameters < limits.min_parameters:
        got, limit = f"{facts.num_parameters:,}", f"at least {limits.min_parameters:,}"
        found.append((Reason.PARAMETERS, got, limit, "limits.min_parameters"))
    if facts.num_bytes > limits.bytes:
        found.append((Reason.TOO_LARGE, f"{facts.num_bytes:,} bytes", f"at most {limits.bytes:,} bytes", "limits.bytes"))
    if tokenizer_for(competition, facts.has_tokenizer) is None and not facts.has_tokenizer:
        found.append((Reason.TOKENIZER, "no tokenizer.json", "a tokenizer in the repository", "tokenizer.free"))
    needed = max((i for i in (largest_id, named_start_token(competition, facts.has_tokenizer)) if i is not None), default=-1)
    if needed >= facts.vocab_size:
        got, limit = f"{facts.vocab_size} rows", f"at least {needed + 1}: the ids go up to {needed}"
        found.append((Reason.VOCABULARY, got, limit, "tokenizer"))
    return tuple(Rejected(reason, got, limit, f"{competition.name}: {field}") for reason, got, limit, field in found)


# ---- the hall of fame ------------------------------------------------------------------------------------------------


class HallOfFameEntry(Section):
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


class HallOfFame(Section):
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
    """The competition `name` before any of its changes, from the text of `<name>.yaml`; `schedule.parse_file` reads all.

    Raises Rejected(COMPETITION_FILE).
    """
    data = read_fields(name, text)
    return competition_of(f"{name}.yaml", name, {key: value for key, value in data.items() if key not in SCHEDULE_FIELDS})


def competition_of(where: str, name: str, fields: Mapping[str, object]) -> Competition:
    """The record of these fields; `where` begins every complaint. Raises Rejected(COMPETITION_FILE)."""
    return validate(Competition, where, {**fields, "name": name})


def read_fields(name: str, text: str) -> dict[str, object]:
    """The fields of `<name>.yaml`, not looked at yet. Raises Rejected(COMPETITION_FILE) for a bad name, or no YAML."""
    where = f"{name}.yaml"
    if not _NAME.fullmatch(name):
        raise Rejected(Reason.COMPETITION_FILE, f"the name {name!r}", f"a name like {_NAME.pattern}", where)
    data = load(where, text)
    if "name" in data:
        raise Rejected(Reason.COMPETITION_FILE, "the field name", "no name inside: the file's name is the name", where)
    return data


def parse_hall_of_fame(text: str) -> HallOfFame:
    """From the text of `hall_of_fame.yaml`. Raises Rejected(COMPETITION_FILE)."""
    return validate(HallOfFame, "hall_of_fame.yaml", load("hall_of_fame.yaml", text))


def check_together(competitions: Sequence[Competition]) -> None:
    """That these can be in force at the same time. Raises Rejected(COMPETITION_FILE)."""
    if not competitions:
        raise Rejected(Reason.COMPETITION_FILE, "no competition", "at least one", "competitions")
    names = [c.name for c in competitions]
    if len(set(names)) != len(names):
        raise Rejected(Reason.COMPETITION_FILE, ", ".join(sorted(names)), "every name once", "competitions")
    for mechanism in sorted({c.mechanism for c in competitions}):
        paid = sorted((c for c in competitions if c.mechanism == mechanism), key=lambda c: c.name)
        total = math.fsum(c.reward_share for c in paid)
        if abs(total - 1) > SHARE_TOLERANCE:
            shares = " + ".join(f"{c.reward_share:g} ({c.name})" for c in paid)
            where = f"competitions: reward_share{f' of mechanism {mechanism}' if mechanism else ''}"
            raise Rejected(Reason.COMPETITION_FILE, f"{shares} = {total:.12g}", "1", where)
