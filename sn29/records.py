"""The words of the house: frozen records that the stages hand to each other. Imports nothing of ours but errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sn29.errors import Reason, Rejected

MAX_COMMITMENT_BYTES = 128
"""The chain's largest raw commitment field that every reader decodes (`Raw0..Raw128`)."""

_REPO_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_COMMITMENT = re.compile(
    rf"(?P<namespace>{_REPO_PART}):(?P<name>{_REPO_PART}):(?P<revision>[0-9a-f]{{40}})"
    r":(?P<digest>[A-Za-z0-9+/]{43}=):(?P<competition>[a-z0-9][a-z0-9_-]{0,15})"
)
_SEALED = re.compile(r"sealed:(?P<digest>[A-Za-z0-9+/]{43}=):(?P<competition>[a-z0-9][a-z0-9_-]{0,15})")
_MODEL_ID = re.compile(rf"(?P<namespace>{_REPO_PART})/(?P<name>{_REPO_PART})@(?P<revision>[0-9a-f]{{40}})")


@dataclass(frozen=True, slots=True, order=True)
class ModelId:
    """Where a model lives on the Hub: a repository at one immutable commit."""

    namespace: str
    name: str
    revision: str
    """Hub commit sha, 40 hex digits."""

    @property
    def repo(self) -> str:
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> ModelId:
        """From `namespace/name@revision`. Raises Rejected(SETTING)."""
        found = _MODEL_ID.fullmatch(text)
        if not found:
            raise Rejected(Reason.SETTING, text, "namespace/name@REVISION with 40 hex digits")
        return cls(**found.groupdict())


@dataclass(frozen=True, slots=True)
class Commitment:
    """A miner's claim on chain: this model, for this competition, from this block on."""

    hotkey: str
    block: int
    """The block that included the commitment: the claim's age is counted from here."""
    model: ModelId
    digest: str
    """base64(sha256(content id and hotkey)): see `models.checkpoint.digest`."""
    competition: str

    def encode(self) -> bytes:
        """The chain's bytes. Raises Rejected when they exceed 128 bytes (namespace and name share about 37)."""
        m = self.model
        data = f"{m.namespace}:{m.name}:{m.revision}:{self.digest}:{self.competition}".encode()
        if len(data) > MAX_COMMITMENT_BYTES:
            raise Rejected(Reason.MALFORMED_COMMITMENT, f"{len(data)} bytes", f"at most {MAX_COMMITMENT_BYTES} bytes", m.repo)
        if not _COMMITMENT.fullmatch(data.decode()):
            raise Rejected(Reason.MALFORMED_COMMITMENT, data.decode(), _COMMITMENT.pattern)
        return data

    @classmethod
    def parse(cls, hotkey: str, block: int, data: bytes) -> Commitment:
        """From the chain's bytes. Raises Rejected(MALFORMED_COMMITMENT); never anything else, whatever the bytes."""
        text = data.decode("utf-8", errors="replace")
        found = _COMMITMENT.fullmatch(text) if len(data) <= MAX_COMMITMENT_BYTES else None
        if not found:
            shown = "".join(c if c.isprintable() else "?" for c in text[:160])
            raise Rejected(Reason.MALFORMED_COMMITMENT, repr(shown), "namespace:name:revision:digest:competition", hotkey)
        part = found.groupdict()
        model = ModelId(part["namespace"], part["name"], part["revision"])
        return cls(hotkey, block, model, part["digest"], part["competition"])


@dataclass(frozen=True, slots=True)
class Sealed:
    """A claim that does not say yet where the model is: a commitment with the same digest is to follow."""

    hotkey: str
    block: int
    """The block that included it."""
    digest: str
    """As in the commitment that follows: bound to the files and to the hotkey, and of no use to anybody else."""
    competition: str

    def encode(self) -> bytes:
        """The chain's bytes; at most 67 of them. Raises Rejected for a competition's name that does not fit."""
        data = f"sealed:{self.digest}:{self.competition}"
        if not _SEALED.fullmatch(data):
            raise Rejected(Reason.MALFORMED_COMMITMENT, data, _SEALED.pattern)
        return data.encode()

    @classmethod
    def parse(cls, hotkey: str, block: int, data: bytes) -> Sealed | None:
        """From the chain's bytes; None when they are anything else, whatever it is."""
        found = _SEALED.fullmatch(data.decode("utf-8", errors="replace")) if len(data) <= MAX_COMMITMENT_BYTES else None
        return cls(hotkey, block, found["digest"], found["competition"]) if found else None


@dataclass(frozen=True, slots=True)
class RawCommitment:
    """What a hotkey wrote on chain, as bytes, with the block that included it."""

    hotkey: str
    block: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """A point of the chain."""

    block: int
    hash: str
    """0x and 64 hex digits."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which chain answers, and with which rules."""

    genesis: str
    """Hash of block 0: the chain's name for good; 0x and 64 hex digits."""
    spec_version: int
    """The runtime's version; it rises when the chain's rules are upgraded."""


@dataclass(frozen=True, slots=True)
class Neuron:
    """One registered participant of the subnet."""

    uid: int
    hotkey: str
    coldkey: str
    permit: bool
    """May set weights for others."""
    stake: float
    incentive: float
    last_update: int
    """Block of its last weight set (or commit of one); registration block before that."""
    registered_at: int


@dataclass(frozen=True, slots=True)
class Metagraph:
    """The subnet's neurons at one block."""

    netuid: int
    block: int
    neurons: tuple[Neuron, ...]

    def uid_of(self) -> Mapping[str, int]:
        return MappingProxyType({n.hotkey: n.uid for n in self.neurons})


@dataclass(frozen=True, slots=True)
class SubnetParams:
    """The chain's own settings that a neuron must respect."""

    tempo: int
    """Blocks between reward runs."""
    weights_rate_limit: int
    """Blocks that must lie between two weight sets of one hotkey."""
    min_weights: int
    max_weight: float
    """Largest share that one uid may get, 0..1."""
    version_key: int
    commit_reveal: bool
    """Whether weights are committed encrypted and shown by the chain itself some epochs later."""
    immunity_blocks: int
    reveal_epochs: int = 1
    """Epochs between the epoch of a commit and the one that reveals it."""
    mechanisms: int = 1
    """Mechanisms of the subnet, numbered from 0; each has weights of its own."""
    last_epoch_block: int | None = None
    """Block of the newest reward run; None when the runtime does not say."""
    next_epoch_block: int | None = None
    """Block at which the next one is expected; None when the runtime does not say."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A write that the chain took."""

    block: int
    verified_by_readback: bool
    """True when the outcome was read back from the chain; we do that always, also after an unclear reply."""
    mode: str = "plain"
    """`plain` (it stands on chain) or `timelocked` (an encrypted commit of weights stands there until its reveal)."""
    reveal_round: int | None = None
    """The drand round whose signature opens a timelocked commit."""
    reveals_at: int | None = None
    """Block of the epoch in which a timelocked commit is revealed, as the schedule stood when it was included."""
    digest: str = ""
    """sha256 hex of a timelocked commit's bytes: which of the `PendingReveal`s it is. Empty when plain."""


@dataclass(frozen=True, slots=True)
class PendingReveal:
    """An encrypted commit of weights that the chain has not opened yet."""

    hotkey: str
    commit_block: int
    reveal_round: int
    epoch: int
    """The subnet's epoch in which it was committed; `SubnetParams.reveal_epochs` later it is opened or dropped."""
    digest: str = ""
    """sha256 hex of the encrypted bytes."""


@dataclass(frozen=True, slots=True, order=True)
class RepoFile:
    """One file of a Hub repository at a revision, as the Hub's metadata states it."""

    path: str
    size: int
    oid: str
    """`sha256:<64 hex>` for a file in large file storage, `git:<40 hex>` (blob id) for a small one."""


@dataclass(frozen=True, slots=True)
class RepoListing:
    """A repository at a revision: what one Hub request says before a byte of a file is fetched."""

    model: ModelId
    files: tuple[RepoFile, ...]
    """Sorted by path."""

    @property
    def num_bytes(self) -> int:
        return sum(f.size for f in self.files)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What config.json and the safetensors headers say about a model, weights unread."""

    content_id: str
    """sha256 hex over the model's files: see `models.checkpoint.content_id`."""
    weights_id: str
    """sha256 hex over the object ids of the safetensors files alone: the same in a copy with another config text."""
    family: str
    """The transformers class, e.g. `LlamaForCausalLM`."""
    num_parameters: int
    num_bytes: int
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    num_layers: int
    start_token: int
    """Id that stands in front of every text and is not scored itself."""
    has_tokenizer: bool


@dataclass(frozen=True, slots=True, order=True)
class Sample:
    """One evaluation text."""

    id: str
    """sha256 hex of the text, first 32 digits: the same text is the same sample wherever it stands."""
    text: str = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Window:
    """The span of blocks in which one set of samples decides; opened by the hash of a finalized block."""

    competition: str
    index: int
    seed: Head
    """Samples are drawn from this block's hash; only commitments of earlier blocks are judged on them."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Summed nats of one sample under one model; +inf with a reason when it cannot be scored; never NaN."""

    sample: str
    """Sample id."""
    nats: float
    num_tokens: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one commitment in one round."""

    hotkey: str
    competition: str
    """Empty when the commitment does not name one."""
    block: int
    status: str
    """`evaluated`, `rejected` or `unavailable`."""
    model: str = ""
    """namespace/name@revision; empty when the commitment does not name one."""
    content_id: str = ""
    reason: str = ""
    """Reason code, e.g. `copy`; empty when evaluated."""
    detail: str = ""
    """The sentence with both values."""
    got: str = ""
    """What was found, when something was refused."""
    limit: str = ""
    """What the rule asks for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A hotkey's model in a competition."""

    content_id: str
    block: int
    """Since when this hotkey claims this content."""


@dataclass(frozen=True, slots=True)
class Score:
    """One model's standing in one competition in one round. What a win is, the competition's rule says."""

    hotkey: str
    wins: float
    """`oldest_holder`: groups of samples won, under the advantage of earlier commitments. `pairwise_epsilon`: matches
    won against the other competitive models. `champion`: samples on which no other model's loss is lower (of equal
    ones the oldest commitment's, near copies left out, of who was stopped only what was measured); it decides nothing there."""
    win_rate: float
    """Wins over what could be won: groups, matches or samples that somebody was scored on. Under `oldest_holder` and
    `champion` all scores of a round sum to 1, or to 0 when nobody won; not where somebody was stopped, whose rate is over the
    samples that it was measured on."""
    win_rate_without_advantage: float
    """The same without any advantage of earlier commitments; under `champion` equal to `win_rate`, which has none."""
    advantage: float
    """The factor that a later model's loss must get below: 1 - what is left of the advantage."""
    weight: float
    """Share of the competition's reward, 0..1."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a validator sets on chain, by hotkey: non-negative, sum 1 (or empty: nothing to set)."""

    block: int
    """The block whose round decided them."""
    by_hotkey: Mapping[str, float]
