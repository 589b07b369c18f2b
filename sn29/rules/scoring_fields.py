"""The `scoring` section of a competition file: which rule turns losses into shares of the reward, and its numbers.

Every number has a default, so `scoring: {rule: champion}` is a whole section, and a competition without one is judged
by `champion` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Never

from pydantic import Discriminator, Field, PlainValidator, Tag, model_validator

from sn29.rules.fields import Number, Section, WholeNumber, broken

MAX_ADVANTAGE = 0.1
"""Largest advantage under `champion`: above it a holder would be out of reach, because `champion` counts no sample as
more than 22 % better (`rules.evidence.CLIP`)."""


class Advantage(Section):
    """By how much a later model must be better: `initial * decay_per_epoch ** (age in epochs)` of the earlier one's
    loss."""

    initial: Annotated[Number, Field(ge=0, lt=1)] = 0.004
    """Fraction of the loss by which a later model must be better than one committed this very block."""
    decay_per_epoch: Annotated[Number, Field(gt=0, le=1)] = 0.995
    """What is left of the advantage after one more epoch of age, as a fraction."""
    blocks_per_epoch: Annotated[WholeNumber, Field(gt=0)] = 361
    """Length of an epoch in blocks."""


class FlooredAdvantage(Advantage):
    """An advantage that never goes away: at least `floor` of it is left."""

    initial: Annotated[Number, Field(ge=0, lt=1)] = 0.002
    """As above. Half of the reference's, because evidence is asked for besides: with 0.004 an honest improvement of 0.3 %
    waits for 3.75 days before a brand-new holder (`sn29 simulate incentive` of a file that says so), with this one for 0.4."""
    floor: Annotated[Number, Field(ge=0, lt=1)] = 0.0005
    """Smallest fraction of the loss by which a later model must be better, however old the earlier one is."""

    @model_validator(mode="after")
    def _is_in_reach(self) -> FlooredAdvantage:
        if max(self.initial, self.floor) > MAX_ADVANTAGE:
            raise broken(f"initial {self.initial:g}, floor {self.floor:g}", f"at most {MAX_ADVANTAGE:g} each")
        return self


class OldestHolder(Section):
    """Every group of samples is held by the oldest model until a later one is better by its advantage: see
    `rules.oldest_holder`."""

    rule: Literal["oldest_holder"] = "oldest_holder"
    group: Annotated[WholeNumber, Field(gt=0)] = 10
    """Samples whose losses are added up to decide one win."""
    skew: Annotated[Number, Field(gt=0, le=16)] = 2.0
    """Exponent on the win rate: 1 pays in proportion to wins, more favours the best."""
    advantage: Advantage = Advantage()


class Epsilon(Section):
    """An advantage that shrinks linearly: from `start` to `end` over the first `blocks` of a model's age."""

    start: Annotated[Number, Field(ge=0, lt=1)] = 0.005
    """Fraction of the loss by which a later model must be better than one committed this very block."""
    end: Annotated[Number, Field(ge=0, lt=1)] = 0.0005
    """What is left of it from an age of `blocks` on."""
    blocks: Annotated[WholeNumber, Field(gt=0)] = 50400
    """Blocks of 12 s; 50400 are 7 days."""


class PairwiseEpsilon(Section):
    """Every model against every other one on mean loss, then a softmax: see `rules.pairwise_epsilon`."""

    rule: Literal["pairwise_epsilon"] = "pairwise_epsilon"
    epsilon: Epsilon = Epsilon()
    temperature: Annotated[Number, Field(gt=0, le=100)] = 0.01
    """Of the softmax over win rates: at 0.01 a model that wins 5 % more of its matches gets 148 times the share."""


class Winner(Section):
    """The holder of the crown takes all."""

    kind: Literal["winner"] = "winner"


class LastHolders(Section):
    """The last holders of the crown that are still there share, the present one first."""

    kind: Literal["last_holders"] = "last_holders"
    decay: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """What a holder gets as a fraction of what the next one after it gets."""
    count: Annotated[WholeNumber, Field(ge=1, le=64)] = 4
    """Holders that share, at most."""


class Bootstrap(Section):
    """Every model gets the share of seeded bootstrap draws of the window in which it ends up with the crown."""

    kind: Literal["bootstrap"] = "bootstrap"
    draws: Annotated[WholeNumber, Field(ge=1, le=10_000)] = 200
    """Draws; one is worth 1 / draws of the reward."""


def one_of(key: str, names: tuple[str, ...]) -> tuple[Discriminator, PlainValidator]:
    """Chooses between sections by the field `key`; the second is what stands for every name that is not known.

    Tags in angle brackets are no field of the file. A name that is not known is reported at the field itself.
    """

    def name_in(value: object) -> object:
        return value.get(key, "nothing") if isinstance(value, Mapping) else getattr(value, key, None)

    def choose(value: object) -> str:
        name = name_in(value) if isinstance(value, Mapping) or hasattr(value, key) else names[0]
        return f"<{name}>" if name in names else key

    def refuse(value: object) -> Never:
        raise broken(name_in(value), " or ".join(repr(name) for name in names))

    return Discriminator(choose), PlainValidator(refuse)


_KIND, _NO_KIND = one_of("kind", ("winner", "last_holders", "bootstrap"))
_RULE, _NO_RULE = one_of("rule", ("champion", "oldest_holder", "pairwise_epsilon"))

Share = Annotated[
    Annotated[Winner, Tag("<winner>")]
    | Annotated[LastHolders, Tag("<last_holders>")]
    | Annotated[Bootstrap, Tag("<bootstrap>")]
    | Annotated[Never, _NO_KIND, Tag("kind")],
    _KIND,
]
"""How the reward is shared below the crown."""


class Champion(Section):
    """One model holds the crown until another one is shown to be better by more than its advantage: see
    `rules.champion`."""

    rule: Literal["champion"] = "champion"
    advantage: FlooredAdvantage = FlooredAdvantage()
    error_rate: Annotated[Number, Field(gt=0, le=0.5)] = 0.01
    """Probability, at most, that a holder ever loses the crown to models that are not better by its advantage: all
    challengers and all windows of its reign together."""
    near_copy: Annotated[Number, Field(ge=0, lt=0.1)] = 1e-3
    """Standard deviation of the per-sample log ratio of two models' losses below which they are the same model."""
    share: Share = Winner()
    stop_error_rate: Annotated[Number, Field(ge=0, le=0.2)] = 0.02
    """Probability, at most, that a challenger which is better by the advantage is ever stopped before the end of a window, all
    windows of a reign together (`rules.sequential`); 0: everybody is measured in full. Who wins is better by more, and is
    stopped far less often: `sn29 simulate sequential`."""


Scoring = Annotated[
    Annotated[Champion, Tag("<champion>")]
    | Annotated[OldestHolder, Tag("<oldest_holder>")]
    | Annotated[PairwiseEpsilon, Tag("<pairwise_epsilon>")]
    | Annotated[Never, _NO_RULE, Tag("rule")],
    _RULE,
]
"""How losses become shares of the competition's reward: the section of one rule, chosen by its field `rule`."""
