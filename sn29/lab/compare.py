"""Models side by side on the same documents, whatever their tokenizers.

The measure is the validators': total nats of a document behind the model's start token, every token scored. It needs no
denominator, so none can be got wrong; sn29/models/tokenizer.py says why no choice of tokenizer gets text for free. What is
shown beside it:

    difference        by document, where both models read the same text; 95 % intervals over documents
    bits per byte     nats / ln 2 / bytes of the raw document in UTF-8, never of tokens (false records came from byte tables of
                      vocabularies: openai/parameter-golf #1271 reported 0.9485 for 1.1289)
    nats per token    a mean over different things under two tokenizers: longer tokens are fewer and dearer, whatever the model

A document that a tokenizer does not give back to the letter, of more tokens than the model has positions, or whose loss is no
number, has no loss under that model (+inf, as for validators). It is lost to a model that can score it, left out of sums and
named in the result.

Worked example: nats 10, 20, 30 and 9, 21, 27 of 10, 20, 30 bytes. Difference 57 / 60 - 1 = -5 %; each document alike
(0.9 x 1.05 x 0.9)^(1/3) - 1 = -5.25 %; the second model wins 2 of 3; bits per byte 60 / 60 / ln 2 = 1.443 and 1.371.

Intervals of a ratio of sums, R = sum b / sum a. The delete-one jackknife: without document i it is R - d_i / (A - a_i), with
d_i = b_i - R a_i and A = sum a (Tukey 1958; Cochran, Sampling Techniques, 6.17). Few long documents decide the sums, so Student's
t is taken at the degrees of the effective number of documents, A^2 / sum a_i^2 (Kish 1965), less one. Where there is no
difference, 4 to 6 of 100 such intervals miss 0 for 10 to 200 documents whose lengths spread by 0.2 to 1.2 in log and whose
differences are symmetric (a percentile bootstrap: up to 16); of differences as skewed as an exponential's, 10 of 100 at 10 or 20
documents, 5 to 8 at 200. Each interval stands for itself: none is widened for how many groups, models or tasks are looked at.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sn29.errors import Reason, Rejected
from sn29.models.tokenizer import Tokenizer
from sn29.training.study_results import Interval, t_interval, t_quantile

_AT_ONCE = 256
"""Documents that are tokenised together."""
FEW = 10
"""Below so many documents (or items) no interval of a ratio is given."""
LOST, TOO_LONG, NOT_FINITE = Reason.ROUND_TRIP.code, "too_long", Reason.NOT_FINITE.code
"""Why a document has no loss: the names that validators give (evaluation/worker.py)."""


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    source: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Reading:
    """Documents as one model's tokenizer reads them."""

    ids: tuple[tuple[int, ...], ...]
    problems: tuple[str, ...]
    """Of each: "", LOST or TOO_LONG."""

    @property
    def scored(self) -> tuple[int, ...]:
        """Numbers of the documents that have a loss."""
        return tuple(number for number, problem in enumerate(self.problems) if not problem)


def read(tokenizer: Tokenizer, documents: Sequence[Document], max_tokens: int) -> Reading:
    """`max_tokens`: what the model has positions for. Raises Rejected(TOKENIZER) when the tokenizer gives up."""
    ids: list[tuple[int, ...]] = []
    problems: list[str] = []
    for first in range(0, len(documents), _AT_ONCE):
        texts = [document.text for document in documents[first : first + _AT_ONCE]]
        for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
            ids.append(tuple(found))
            lost = not tokenizer.round_trips(text, found)
            problems.append(LOST if lost else TOO_LONG if len(found) > max_tokens else "")
    return Reading(tuple(ids), tuple(problems))


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on the documents."""

    name: str
    reading: Reading
    nats: tuple[float, ...]
    """Of each document; +inf for those with a problem."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Of each document: "", LOST, TOO_LONG or NOT_FINITE."""
        both = zip(self.reading.problems, self.nats, strict=True)
        return tuple(problem or ("" if math.isfinite(nats) else NOT_FINITE) for problem, nats in both)


def measured(name: str, reading: Reading, nats: Sequence[float]) -> Measured:
    """`nats`: of `reading.scored`, in that order; +inf where the model says no number."""
    given = dict(zip(reading.scored, nats, strict=True))
    return Measured(name, reading, tuple(given.get(number, math.inf) for number in range(len(reading.ids))))


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """One model on the documents that all models can score."""

    name: str
    nats: float
    bits_per_byte: float
    tokens: int
    tokens_per_byte: float
    nats_per_token: float
    """Not comparable between tokenizers."""
    problems: tuple[tuple[int, str], ...]
    """(number of the document, why it has no loss), of all documents."""


@dataclass(frozen=True, slots=True)
class Group:
    """Documents of one kind, and the second model's nats against the first's on them."""

    name: str
    documents: int
    """That both can score."""
    bytes: int
    bits_per_byte: tuple[float, float]
    percent: float
    """Of the first model's nats: below 0, the second needs fewer."""
    interval: Interval | None
    """Of `percent`, 95 % over documents, as `ratio_interval`; None with fewer than FEW."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A model against the first one, over the documents that both can score."""

    first: str
    second: str
    total: Group
    mean: float
    """Nats of a document: the second's less the first's."""
    mean_interval: Interval | None
    """95 %, Student's t over documents."""
    alike: float
    """Percent, each document counting alike: 100 (exp of the mean of ln(second / first)) - 100: the champion rule's measure
    (rules/champion.py). In `total` long documents weigh more, and its interval is wider where lengths differ much."""
    alike_interval: Interval | None
    """95 %, Student's t over documents."""
    won: float
    """Share of the documents on which the second has fewer nats, ties as a half; of all that either can score."""
    won_interval: Interval | None
    """95 %, Wilson's."""
    by_length: tuple[Group, ...]
    by_source: tuple[Group, ...]
    """Empty with one source."""
    unscored: tuple[tuple[str, int], ...]
    """(group, documents) of the lengths and sources of which there is no document that both can score."""


@dataclass(frozen=True, slots=True)
class Comparison:
    documents: int
    common: int
    """Documents that all models can score; `models` is over these."""
    models: tuple[Model, ...]
    pairs: tuple[Pair, ...]
    """Each other model against the first."""
    as_many_tokens: bool
    """All tokenizers cut each document into as many tokens: then nats per token may be compared."""
    warning: str
    """Why nats per token may not be compared, and whether they would mislead here; "" where they may."""


def compare(documents: Sequence[Document], models: Sequence[Measured]) -> Comparison:
    """Raises Rejected(SETTING) for fewer than two models, Rejected(DATASET) for an empty document and when no document is
    scored by all of them."""
    if len(models) < 2:
        raise Rejected(Reason.SETTING, f"{len(models)} model", "at least two", "MODEL")
    if (empty := next((n for n, document in enumerate(documents, 1) if not document.text), None)) is not None:
        raise Rejected(Reason.DATASET, f"document {empty} is empty", "documents of text")
    common = [n for n in range(len(documents)) if all(math.isfinite(model.nats[n]) for model in models)]
    if not common:
        raise Rejected(Reason.DATASET, f"0 of {len(documents)} documents", "one that all models can score", _why(models))
    num_bytes = sum(documents[n].num_bytes for n in common)
    found = tuple(_model(model, common, num_bytes) for model in models)
    same = all(len({len(model.reading.ids[n]) for model in models}) == 1 for n in common)
    pairs = tuple(_pair(documents, models[0], other) for other in models[1:])
    return Comparison(len(documents), len(common), found, pairs, same, "" if same else _warning(found))


def _why(models: Sequence[Measured]) -> str:
    """How many documents each model has no loss for, by the reason."""
    told = []
    for model in models:
        if counts := Counter(filter(None, model.problems)):
            told.append(f"{model.name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return "; ".join(told)


def _model(model: Measured, common: Sequence[int], num_bytes: int) -> Model:
    nats = math.fsum(model.nats[n] for n in common)
    tokens = sum(len(model.reading.ids[n]) for n in common)
    problems = tuple((number, problem) for number, problem in enumerate(model.problems) if problem)
    bits = nats / math.log(2) / num_bytes
    return Model(model.name, nats, bits, tokens, tokens / num_bytes, nats / tokens, problems)


def _warning(models: Sequence[Model]) -> str:
    """What nats per token would say here."""
    told = "nats per token are not comparable: the tokenizers cut the text differently, so each is a mean over other things"
    by_token = sorted(models, key=lambda model: model.nats_per_token)
    by_text = sorted(models, key=lambda model: model.nats)
    if by_token[0].name == by_text[0].name:
        return told
    return (
        f"{told}; by them {by_token[0].name} would be the best model here, by the nats of the same text it is {by_text[0].name}"
    )


def _pair(documents: Sequence[Document], first: Measured, second: Measured) -> Pair:
    both = [n for n in range(len(documents)) if math.isfinite(first.nats[n] + second.nats[n])]
    either = [n for n in range(len(documents)) if math.isfinite(min(first.nats[n], second.nats[n]))]
    won = sum(1.0 if second.nats[n] < first.nats[n] else 0.5 if second.nats[n] == first.nats[n] else 0.0 for n in either)
    differences = [second.nats[n] - first.nats[n] for n in both]
    logs = [math.log(second.nats[n] / first.nats[n]) for n in both if min(first.nats[n], second.nats[n]) > 0]

    def group(name: str, numbers: Sequence[int]) -> Group:
        return _group(name, [documents[n].num_bytes for n in numbers], *([m.nats[n] for n in numbers] for m in (first, second)))

    by_length: dict[str, list[int]] = {}
    for n in sorted(range(len(documents)), key=lambda n: documents[n].num_bytes):
        by_length.setdefault(_named(_bucket(documents[n].num_bytes)), []).append(n)
    by_source: dict[str, list[int]] = {}
    for n in sorted(range(len(documents)), key=lambda n: documents[n].source):
        by_source.setdefault(documents[n].source, []).append(n)
    if len(by_source) == 1:
        by_source.clear()
    scored = {name: sorted({*numbers} & {*both}) for name, numbers in (by_length | by_source).items()}
    return Pair(
        first.name,
        second.name,
        group("all", both),
        statistics.fmean(differences),
        t_interval(differences),
        _percent(statistics.fmean(logs)),
        None if (over := t_interval(logs)) is None else Interval(_percent(over.low), _percent(over.high)),
        won / len(either),
        _wilson(won, len(either)),
        tuple(group(name, scored[name]) for name in by_length if scored[name]),
        tuple(group(name, scored[name]) for name in by_source if scored[name]),
        tuple((name, len(numbers)) for name, numbers in (by_length | by_source).items() if not scored[name]),
    )


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)


def _group(name: str, sizes: Sequence[int], first: Sequence[float], second: Sequence[float]) -> Group:
    sums, num_bytes = (math.fsum(first), math.fsum(second)), sum(sizes)
    bits = sums[0] / math.log(2) / num_bytes, sums[1] / math.log(2) / num_bytes
    return Group(name, len(sizes), num_bytes, bits, 100 * (sums[1] / sums[0] - 1), ratio_interval(first, second))


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """`jackknife_interval`; None for fewer than FEW."""
    return jackknife_interval(first, second) if len(first) >= FEW else None


def jackknife_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """95 % of 100 (sum of second / sum of first - 1), over documents (or items) that both have; None for fewer than two.

    The module says what it is and how often it errs.
    """
    total = math.fsum(first)
    if max(first, default=0.0) == total:
        return None
    ratio = math.fsum(second) / total
    moved = math.fsum(((b - ratio * a) / (total - a)) ** 2 for a, b in zip(first, second, strict=True))
    effective = round(total**2 / math.fsum(a * a for a in first))
    half = t_quantile(max(1, effective - 1)) * math.sqrt((1 - 1 / len(first)) * moved)
    return Interval(100 * (ratio - 1 - half), 100 * (ratio - 1 + half))


def _bucket(num_bytes: int) -> int:
    """The power of two that a length begins with."""
    return 1 << (num_bytes.bit_length() - 1)


def _named(low: int) -> str:
    return f"{low:,} to {2 * low - 1:,} bytes"


def _wilson(won: float, count: int) -> Interval:
    """95 % of a share (Wilson 1927): right also near 0 and 1, where most documents go one way."""
    z2 = 1.959964**2
    share = won / count
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def excerpts(documents: Sequence[Document], model: Model, most: int = 5) -> Iterator[str]:
    """The documents without a loss under a model, as lines for people, the first `most` of them."""
    for number, problem in model.problems[:most]:
        start = " ".join(documents[number].text[:60].split())
        yield f"document {number + 1} ({documents[number].source}) has no loss under {model.name}: {problem}: {start!r}"
    if len(model.problems) > most:
        yield f"and {len(model.problems) - most} more under {model.name}"
