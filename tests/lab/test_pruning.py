"""The model without rows: the identity of its losses, the ids that files name, and the parameters spent again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sn29.errors import Rejected
from sn29.evaluation.engine import all_nats
from sn29.evaluation.head import tiles_for
from sn29.evaluation.profile import ROW_TOKENS, Profile
from sn29.evaluation.streamed import config_of, needs
from sn29.lab.grow import LOSSLESS
from sn29.lab.losses import change, document_nats
from sn29.lab.pruning import (
    Beside,
    DocumentLoss,
    Rows,
    Segmentation,
    check_tensors,
    effect,
    log_kept,
    loss_proof,
    named_ids,
    random_texts,
    renamed,
    rows_of,
    segmentation,
    summed,
    with_rows,
)
from sn29.lab.reinvest import reinvested
from sn29.lab.vocabulary import Pruned, Vocabulary, kept, without_the_rest
from sn29.lab.weights import Card, Weights, open_weights, save
from sn29.models import checkpoint
from sn29.models.config import parse_config

CARD = Card("t", (), (), "sn29", ())
FAMILIES = ("LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM")
KEPT = Rows((0, 1, 2, *range(3, 300, 2)), 300)
"""Every other id."""
DOCUMENTS = [[3 + 2 * ((7 * n + k) % 140) for n in range(length)] for k, length in enumerate((1, 9, 40, 90))]
"""Of ids that stay."""


def saved(weights: Weights, folder: Path) -> Path:
    save(weights, folder, CARD)
    return folder


def lively(make_checkpoint: Callable[..., Path], family: str, folder: Path, **config: Any) -> Path:
    """A model whose head is sure of things, with a bias of its own where it has one: fresh ones give all ids the same."""
    weights = open_weights(make_checkpoint(family, seed=3, **config))
    generator = torch.Generator().manual_seed(1)

    def read(name: str) -> torch.Tensor:
        found = weights.read(name)
        return (
            torch.randn(found.shape, generator=generator) if name == "lm_head.bias" else found * 8 if found.dim() == 2 else found
        )

    return saved(Weights(weights.config, weights.raw, weights.dtypes, read), folder)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_loss_is_the_old_one_plus_the_log_of_what_was_kept(
    family: str, tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    old = lively(make_checkpoint, family, tmp_path / "old", tie_word_embeddings=tied)
    pruned = with_rows(open_weights(old), KEPT)
    new = saved(pruned, tmp_path / "new")
    assert pruned.config.number("vocab_size") == len(KEPT.old)
    after = [[KEPT.new_id[id_] for id_ in ids] for ids in DOCUMENTS]
    losses = loss_proof(old, new, DOCUMENTS, after, KEPT)
    proved = summed(losses)
    assert proved.holds
    assert proved.error < 1e-6
    assert proved.effect is not None
    assert proved.effect.percent < -1, "much of the mass was on ids that went"
    model = checkpoint.load(old, dtype=torch.float32)
    for ids, loss in zip(DOCUMENTS, losses, strict=True):  # the definition, from full logits
        seen = torch.tensor([[model.config.bos_token_id or 1, *ids[:-1]]])
        with torch.inference_mode():
            p = model(input_ids=seen, use_cache=False).logits[0].double().softmax(-1)
        assert loss.log_kept == pytest.approx(float(p[:, list(KEPT.old)].sum(1).log().sum()), rel=1e-5)
    assert [loss.old for loss in losses] == pytest.approx(all_nats(model, DOCUMENTS, 1), rel=1e-6)
    assert [loss.new for loss in losses] == pytest.approx(
        all_nats(checkpoint.load(new, dtype=torch.float32), after, KEPT.new_id[1]), rel=1e-6
    )


def test_rows_that_are_not_the_right_ones_fail_the_proof(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    old = lively(make_checkpoint, "LlamaForCausalLM", tmp_path / "old")
    wrong = Rows((0, 1, 2, *range(4, 300, 2), 3), 300)
    new = saved(with_rows(open_weights(old), wrong), tmp_path / "new")
    after = [[KEPT.new_id[id_] for id_ in ids] for ids in DOCUMENTS]
    assert not summed(loss_proof(old, new, DOCUMENTS, after, KEPT)).holds
    assert not summed([DocumentLoss(5, 10.0, -0.1, 9.9), DocumentLoss(5, 10.0, 0.1, 10.1)]).holds, "a loss that rose"
    assert summed([DocumentLoss(5, 10.0, -0.1, 9.9)]).holds
    assert not summed([DocumentLoss(0, 0.0, 0.0, 0.0)]).holds, "nothing is shown by a document without a token"
    assert not summed([]).holds


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.layers.1.mlp.fc1.weight"])
def test_every_written_tensor_is_compared_to_the_bit(name: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two rows changed for one another that no measured document holds: the losses are the same ones."""
    old = open_weights(lively(make_checkpoint, "PhiForCausalLM", tmp_path / "old"))
    good = with_rows(old, KEPT)
    check_tensors(old, saved(good, tmp_path / "good"), KEPT)

    def read(asked: str) -> torch.Tensor:
        found = good.read(asked)
        if asked == name:
            found[[-1, -2]] = found[[-2, -1]]
        return found

    wrong = saved(Weights(good.config, good.raw, good.dtypes, read), tmp_path / "wrong")
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        after = [[KEPT.new_id[id_] for id_ in ids] for ids in DOCUMENTS]
        assert not {len(KEPT.old) - 1, len(KEPT.old) - 2} & {id_ for ids in after for id_ in ids}
    with pytest.raises(Rejected, match=f"another {name}"):
        check_tensors(old, wrong, KEPT)


def test_an_effect_of_few_documents_has_no_interval() -> None:
    one = DocumentLoss(5, 10.0, -0.1, 9.9)
    (few, enough) = (effect([one] * count) for count in (9, 10))
    assert few is not None
    assert enough is not None
    assert (few.documents, few.percent, few.interval) == (9, pytest.approx(-1), None)
    assert enough.interval is not None
    assert effect([]) is None


def test_layer_by_layer_gives_the_same_shares(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    old = lively(make_checkpoint, "PhiForCausalLM", tmp_path / "old", num_hidden_layers=8, hidden_size=64)
    profile = Profile(ROW_TOKENS["cpu"], tiles_for(torch.device("cpu"), 300, compiled=False), "documents")
    least = needs(config_of(old), torch.float32, profile, max(map(len, DOCUMENTS)), 2)
    assert least.streamed + 1000 < least.resident
    whole, streamed = log_kept(old, DOCUMENTS, KEPT), log_kept(old, DOCUMENTS, KEPT, memory_bytes=least.streamed + 1000)
    assert streamed == whole
    assert all(found < 0 for found in whole)


def vocabulary_of(ids: dict[str, int]) -> Vocabulary:
    model = {"type": "BPE", "vocab": ids, "merges": []}
    return Vocabulary({"model": model, "added_tokens": []}, ids)


def test_rows_in_the_order_of_the_entries_then_named_ones_then_what_fills_up() -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "bos_token_id": 9, "eos_token_id": [9, 11],
    }  # fmt: skip
    config = parse_config(json.dumps(raw).encode())
    vocabulary = vocabulary_of({"a": 0, "b": 2, "c": 5, "ab": 7})
    pruned = without_the_rest(vocabulary, {"a", "b", "c"})
    assert rows_of(pruned, config, {9, 11}).old == (0, 2, 5, 9, 11)
    assert rows_of(pruned, config, {9, 11}, multiple=4).old == (0, 2, 5, 9, 11, 1, 3, 4)
    with pytest.raises(Rejected, match="5 rows that stay, the next multiple is 64"):
        rows_of(pruned, config, {9, 11}, multiple=64)
    too_few = without_the_rest(vocabulary_of({"a": 0, "b": 12}), {"a", "b"})
    with pytest.raises(Rejected, match="at least 13"):
        rows_of(too_few, config, {9})


@pytest.mark.parametrize(
    ("ids", "start"),
    [({"bos_token_id": 5, "eos_token_id": 7}, 5), ({"bos_token_id": None, "eos_token_id": [7, 9]}, 7), ({}, 0)],
    ids=["beginning", "end", "neither"],
)
def test_the_start_token_stays_the_same_row(
    ids: dict[str, Any], start: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where config.json names none and id 0 is meant, which another row may have taken."""
    folder = make_checkpoint("LlamaForCausalLM")
    weights = open_weights(folder)
    raw = {key: value for key, value in weights.raw.items() if key not in ("bos_token_id", "eos_token_id")} | ids
    old = Weights(parse_config(json.dumps(raw).encode()), raw, weights.dtypes, weights.read)
    assert old.config.start_token == start
    new = with_rows(old, Rows((20, 9, 7, 5, 0), 300))
    assert (20, 9, 7, 5, 0)[new.config.start_token] == start
    assert torch.equal(
        new.read("model.embed_tokens.weight")[new.config.start_token], old.read("model.embed_tokens.weight")[start]
    )
    assert torch.equal(new.read("model.norm.weight"), old.read("model.norm.weight"))


def test_ids_in_files() -> None:
    new_id = {1: 0, 5: 1, 9: 2}
    raw = {
        "bos_token_id": 1, "eos_token_id": [5, 9], "pad_token_id": -1, "unk_token_id": None, "suppress_tokens": [9, 4, 1],
        "max_length": 5, "bad_words_ids": None,
    }  # fmt: skip
    assert renamed(raw, new_id, "generation_config.json") == {
        "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": -1, "suppress_tokens": [2, 0],
    }  # fmt: skip
    with pytest.raises(Rejected, match="pad_token_id 6"):
        renamed({"pad_token_id": 6}, new_id, "config.json")
    for wrong in ({"eos_token_id": "0"}, {"eos_token_id": [1, "5"]}, {"pad_token_id": True}):
        with pytest.raises(Rejected, match="a whole number"):
            renamed(wrong, new_id, "generation_config.json")
        with pytest.raises(Rejected, match="a whole number"):
            named_ids(wrong, "generation_config.json")
    with pytest.raises(Rejected, match="suppress_tokens"):
        renamed({"suppress_tokens": [[1]]}, new_id, "generation_config.json")
    with pytest.raises(Rejected, match="bad_words_ids"):
        renamed({"bad_words_ids": [[1]]}, new_id, "generation_config.json")


def test_files_beside_the_model(tmp_path: Path) -> None:
    vocabulary = vocabulary_of({"a": 0, "b": 2, "c": 5})
    pruned = without_the_rest(vocabulary, {"a", "c"})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "c", "added_tokens_decoder": {"5": {"content": "c"}}}')
    (tmp_path / "added_tokens.json").write_text('{"c": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.5}')
    (tmp_path / "vocab.json").write_text("{}")
    files = Beside.read(tmp_path).renamed(pruned, pruned.new_id)
    told = {name: None if content is None else json.loads(content) for name, content in files.items()}
    assert told.pop("tokenizer.json")["model"]["vocab"] == {"a": 0, "c": 1}
    assert told == {
        "vocab.json": None, "tokenizer_config.json": {"eos_token": "c", "added_tokens_decoder": {"1": {"content": "c"}}},
        "added_tokens.json": {"c": 1}, "generation_config.json": {"eos_token_id": 1, "temperature": 0.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "ids"),
    [
        ("tokenizer_config.json", {"pad_token": "b", "eos_token": {"content": "c"}, "unk_token": None}, {2, 5}),
        ("tokenizer_config.json", {"additional_special_tokens": ["a", {"content": "b"}]}, {0, 2}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "b"}}, "chat_template": "c"}, {2}),
        ("special_tokens_map.json", {"pad_token": "b", "additional_special_tokens": ["c"]}, {2, 5}),
        ("added_tokens.json", {"b": 2}, {2}),
        ("generation_config.json", {"eos_token_id": [5, 2], "pad_token_id": -1, "temperature": 1}, {2, 5}),
    ],
    ids=["config", "additional", "decoder", "map", "added", "generation"],
)  # fmt: skip
def test_tokens_that_only_files_beside_name(file: str, content: dict[str, Any], ids: set[int], tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert Beside.read(tmp_path).ids(vocabulary_of({"a": 0, "b": 2, "c": 5})) == ids


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer_config.json", b"{bad", "tokenizer_config.json"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"0": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", b'{"pad_token": "[PAD]"}', "'\\[PAD\\]', which is not in tokenizer.json"),
        ("special_tokens_map.json", b'"a"', "special_tokens_map.json"),
        ("added_tokens.json", b"[1, 2]", "added_tokens.json"),
        ("added_tokens.json", b'{"a": "0"}', "added_tokens.json"),
        ("generation_config.json", b"[1]", "generation_config.json"),
        ("generation_config.json", b"\xff", "generation_config.json"),
        ("generation_config.json", b'{"eos_token_id": "0"}', "eos_token_id"),
    ],
    ids=range(11),
)
def test_files_beside_that_are_none_are_named(file: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(Rejected, match=complaint):
        Beside.read(tmp_path).ids(vocabulary_of({"a": 0}))


def test_segmentations_are_counted() -> None:
    pruned = Pruned(vocabulary_of({"a": 0}), {1: 0, 3: 1})
    found = segmentation([[1, 3], [1, 2], [3, 3]], [[0, 1], [0, 0, 0], [1, 0]], pruned)
    assert found == Segmentation(3, 1, 1, 6, 7), "the second used an id that went, the third is broken"
    assert (found.changed_share, found.inflation) == (pytest.approx(2 / 3), pytest.approx(1 / 6))
    assert found + found == Segmentation(6, 2, 2, 12, 14)


def test_random_texts_are_the_same_ones_and_of_every_kind() -> None:
    texts = list(random_texts(400, 3))
    assert texts == list(random_texts(400, 3))
    assert texts != list(random_texts(400, 4))
    everything = "".join(texts)
    assert everything.encode().decode() == everything, "no half of a surrogate pair"
    assert {chr(n) for n in range(256)} <= set(everything)
    assert max(map(ord, everything)) > 0xFFFF
    assert min(map(len, texts)) >= 1


@pytest.mark.parametrize("how", ["mlp", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_freed_parameters_are_spent_without_a_change_of_the_losses(
    family: str, how: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    old = lively(make_checkpoint, family, tmp_path / "old", vocab_size=900, tie_word_embeddings=False)
    small = saved(with_rows(open_weights(old), Rows(KEPT.old, 900)), tmp_path / "small")
    budget = open_weights(old).num_parameters
    grown = reinvested(open_weights(small), budget, how)
    assert 0.995 * budget <= grown.weights.num_parameters <= budget
    layers = grown.weights.config.number("num_hidden_layers")
    assert (layers > 2) == (how == "layers")
    large = saved(grown.weights, tmp_path / "large")
    documents = [[KEPT.new_id[id_] for id_ in ids] for ids in DOCUMENTS]
    step = change(document_nats(small, documents), document_nats(large, documents))
    assert step.largest <= LOSSLESS
    assert math.isfinite(step.after)


def test_a_budget_that_no_neuron_comes_near_is_named(make_checkpoint: Callable[..., Path]) -> None:
    weights = open_weights(make_checkpoint("LlamaForCausalLM", vocab_size=50))
    one = 2 * 3 * 32  # a neuron in each of two layers
    for freed in (0, one - 1):  # 0.4 % of the model: little, and yet all of it
        with pytest.raises(Rejected, match=rf"0 of {freed} freed parameters spent"):
            reinvested(weights, weights.num_parameters + freed, "mlp")
    assert reinvested(weights, weights.num_parameters + one, "mlp").weights.config.number("intermediate_size") == 65


def test_a_round_width_leaves_little_of_what_was_freed(make_checkpoint: Callable[..., Path]) -> None:
    """Of a large model less than 0.5 % is freed: a round width is near enough to the model's size, and spends nothing."""
    weights = open_weights(make_checkpoint("LlamaForCausalLM", vocab_size=2000, intermediate_size=1536))
    one = 2 * 3 * 32  # a neuron in each of two layers; 9 of them are 0.4 % of the model
    grown = reinvested(weights, weights.num_parameters + 9 * one + 5, "mlp").weights
    assert grown.config.number("intermediate_size") == 1545


def test_kept_entries_are_named_once() -> None:
    vocabulary = vocabulary_of({"a": 0, "b": 1, "ab": 2})
    stays = kept(vocabulary, [0], listed=[0, 1], named=[2, 400])
    assert (stays.used, stays.spelling, stays.added, stays.listed) == ({"a"}, {"b"}, {"ab"}, frozenset())
