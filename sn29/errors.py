"""The two kinds of expected failure. Whatever is neither is a bug and propagates.

Sn29Error
  Unavailable   the world did not answer; nothing is known; try again
  Rejected      something was looked at and breaks a rule; final; carries the rule's reason and both values
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from enum import Enum


class Reason(Enum):
    """Why something was refused: the closed list. `value` is (sentence, what its owner can do).

    The members down to DEADLINE are what a miner can be told of a model, in the order in which a validator comes to
    them; the others are of the node's own files and keys.
    """

    MALFORMED_COMMITMENT = (
        "the string on chain is not namespace:name:revision:digest:competition",
        "commit again with `sn29 miner`, which writes the string for you",
    )
    UNKNOWN_COMPETITION = (
        "the commitment names a competition that is not in force",
        "see `sn29 competitions check` for the ones that are",
    )
    COPY = (
        "the same model was committed earlier by another hotkey",
        "train a model of your own; the earlier commitment keeps the claim",
    )
    REPOSITORY_GONE = ("the repository cannot be found by the public", "publish it, then commit again")
    REVISION_GONE = (
        "the committed revision is no longer in the repository",
        "never rewrite a repository after committing; commit again",
    )
    REPOSITORY_CLOSED = ("the repository is private or gated", "make it public without a gate")
    DIGEST = (
        "the files are not the ones that the commitment claims for this hotkey",
        "commit with `sn29 miner`, which computes it for your hotkey",
    )
    FORBIDDEN_FILE = (
        "the repository holds a file that no model needs, or two sets of weights",
        "keep to one set of *.safetensors, config.json, generation_config.json, tokenizer files and README.md",
    )
    MISSING_FILE = ("a file that every model needs is missing", "add it and commit again")
    TOO_LARGE = ("the repository, or one of its files, is larger than allowed", "publish a smaller checkpoint")
    BAD_CONFIG = ("config.json is not usable", "write it with save_pretrained of the pinned transformers")
    FAMILY = ("the model's class is not one of the competition's", "train a model of an allowed class")
    PARAMETERS = ("the number of parameters is outside the competition's limits", "shrink or grow the model")
    TENSORS = (
        "the safetensors files do not hold exactly the tensors that config.json implies",
        "write the files with save_pretrained of the pinned transformers",
    )
    VOCABULARY = (
        "the embedding has fewer rows than the tokenizer has ids",
        "give the embedding at least one row for each id",
    )
    TOKENIZER = ("the tokenizer is not usable or not the one required", "use the competition's tokenizer")
    ROUND_TRIP = (
        "the tokenizer does not give back the text that it was given",
        "use a lossless (byte-level or byte-fallback) tokenizer",
    )
    CORRUPT = ("a file is not what the Hub said it is", "upload the file again and commit again")
    NOT_FINITE = ("the model's weights or losses are not finite numbers", "check the training run for divergence")
    NOT_CAUSAL = (
        "what the model says of a token depends on tokens that come after it",
        "train a causal model: it is scored on text that it has not read yet",
    )
    NOT_DETERMINISTIC = (
        "the model does not give the same numbers twice for the same text",
        "publish the weights as save_pretrained writes them, and run `sn29 check` on them",
    )
    CRASHED = ("the evaluation of the model ended without a result, twice", "run `sn29 check` on the model")
    DEADLINE = ("the evaluation of the model did not end in time, twice", "publish a faster model")
    DATASET = (
        "the data set cannot serve samples",
        "name parquet files with enough different texts in row groups of at most 20 MB of text (training: 1 GB)",
    )
    COMPETITION_FILE = (
        "the competition file is not valid",
        "mend what is named there; `sn29 competitions check DIR` looks at the files again",
    )
    RECORD = (
        "the round record is not usable",
        "take the file as its validator wrote it; see `sn29 replay --help` for other data",
    )
    SETTING = ("the setting is not usable", "give it a value that the rule allows; the command's --help says what it is for")
    CLAIM = (
        "what the command claims of its result was measured, and does not hold",
        "nothing was written: do less at once, or state the wider limit that you accept where --help names one",
    )
    NOT_REGISTERED = (
        "the hotkey is not registered on the subnet",
        "register it with `btcli subnets register`, then start again",
    )
    NOT_PERMITTED = (
        "the chain does not permit this hotkey to set weights",
        "a validator permit needs stake: see `btcli subnets metagraph`",
    )
    OUTDATED = ("the subnet asks for a newer version of this software", "update sn29 and start again")
    NO_WEIGHTS = (
        "there is no weight to set for any registered hotkey",
        "nothing to do: the weights on chain stay until a round has a winner",
    )
    REFUSED_BY_CHAIN = ("the chain refuses the transaction for good", "look up the chain's own error name")

    @property
    def code(self) -> str:
        """Stable short name for machines, e.g. `parameters`."""
        return self.name.lower()

    @property
    def sentence(self) -> str:
        return self.value[0]

    @property
    def advice(self) -> str:
        return self.value[1]


NAME_A_WALLET = "name a wallet that exists: --wallet.name, --wallet.hotkey, --wallet.path; make one with `btcli wallet create`"


def reasons_table() -> str:
    """The closed list in Markdown, for the README and `sn29 reasons`; both values stand in each refusal itself."""
    rows = (f"| `{reason.code}` | {reason.sentence} | {reason.advice} |" for reason in Reason)
    return "\n".join(["| reason | what it says | what to do |", "|---|---|---|", *rows])


def shown(value: object, longest: int = 300) -> str:
    """A value as one printable line: what strangers wrote ends up in logs, records and terminals."""
    text = str(value)[: longest + 1]
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """The one that a mistyped word was meant to be; empty where none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, [one for one in known if one != word and one[:1].isalpha()], n=1, cutoff=0.6)), "")


class Sn29Error(Exception):
    """Root of all failures that are expected in normal operation."""

    exit_status = 1
    """Of a command that ends with it."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as what it is, not by calling it again with its sentence: processes of a training tell each other."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class Unavailable(Sn29Error):
    """The chain, the Hub, the disk or a child process did not answer: nothing is known, so try again later."""

    def __init__(
        self, what: str, why: str, retry_s: float | None = None, *, certain: bool = False, forgotten: bool = False
    ) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why = what, why
        self.forgotten = forgotten
        """Of a read: the nodes did answer, that they have thrown the block's state away, or it cannot be read by this SDK: asking
        them again changes nothing."""
        self.certain = certain
        """Of a write: the other side has for certain not taken it and never will, so it may be sent again at any time."""
        self.retry_s = retry_s
        """Seconds after which the other side asked to be tried again; None when it did not say."""


class Rejected(Sn29Error):
    """A rule is broken, for good. `got` is what was found, `limit` what the rule asks for."""

    def __init__(self, reason: Reason, got: object, limit: object, where: str = "", *, said: str = "", advice: str = "") -> None:
        """said: another sentence than the reason's; advice: what to do, where the reason's own words are for others."""
        self.reason, self.got, self.limit, self.where = reason, shown(got), shown(limit), shown(where)
        self.own_advice = shown(advice)
        """Empty where the reason's own words will do."""
        sentence = f"{self.where + ': ' if where else ''}{reason.sentence} (got {self.got}, rule {self.limit})"
        super().__init__(shown(said) if said else sentence)

    @property
    def advice(self) -> str:
        """What to do about this very refusal; of a field that there is not, the one that may be meant."""
        if self.own_advice:
            return self.own_advice
        if self.reason is Reason.SETTING:
            return f"mend {self.where or 'it'}: {self.limit}"
        if self.reason is Reason.COMPETITION_FILE and self.got.startswith("the field "):
            near = nearest(self.got.split(" ")[-1], self.limit.removeprefix("one of ").split(", "))
            return f"did you mean {near}? {self.reason.advice}" if near else self.reason.advice
        return self.reason.advice


class WrongUsage(Rejected):
    """What nobody can run: an unknown flag or word, an argument that is missing, a setting whose value is not allowed."""

    exit_status = 2

    def __init__(self, got: object, limit: object, where: str = "", *, said: str = "", advice: str = "") -> None:
        super().__init__(Reason.SETTING, got, limit, where, said=said, advice=advice)
