"""Losses before and after: the validators' rule, whichever way the model is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sn29.errors import Reason, Rejected, Unavailable
from sn29.evaluation.engine import all_nats
from sn29.evaluation.streamed import free_memory
from sn29.lab.losses import Taken, change, document_nats, layer_by_layer, of_model
from sn29.lab.weights import open_weights
from sn29.models import checkpoint
from sn29.models.config import parse_config
from sn29.training.study_results import Interval

DOCUMENTS = [[(5 * n + m) % 300 for n in range(10 + 7 * m)] for m in range(40)]


def test_losses_are_the_plain_engines(make_checkpoint: Callable[..., Path]):
    """More documents than are taken at once, reported as they are done."""
    folder, reports = make_checkpoint(), []
    found = document_nats(folder, DOCUMENTS, threads=1, report=lambda done, of: reports.append((done, of)))
    model = checkpoint.load(folder, dtype=torch.float32)
    assert found == pytest.approx(all_nats(model, DOCUMENTS, 1), rel=1e-6)
    assert reports == [(32, 40), (40, 40)]
    assert of_model(model, DOCUMENTS, 1, threads=1) == found


def test_little_memory_reads_layer_by_layer(make_checkpoint: Callable[..., Path]):
    folder = make_checkpoint(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    some = DOCUMENTS[:2]
    reports: list[tuple[int, int]] = []
    found = document_nats(folder, some, threads=1, memory_bytes=60_000_000, report=lambda done, of: reports.append((done, of)))
    assert len(reports) > 6  # layers, not documents
    assert found == document_nats(folder, some, threads=1)


def test_what_is_free_decides_where_nothing_is_said(make_checkpoint: Callable[..., Path]):
    """55e9 parameters in float32 are 218 GB; 20,000 fit everywhere."""
    small = open_weights(make_checkpoint())
    changes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 64, "num_attention_heads": 64}
    large = parse_config(json.dumps({**small.raw, "head_dim": 128, "num_key_value_heads": 8, **changes}).encode())

    def way(memory_bytes: int) -> str:
        try:
            return "as a whole" if layer_by_layer(large, DOCUMENTS, memory_bytes=memory_bytes) is None else "layer by layer"
        except Unavailable:
            return "not at all"

    assert [way(most) for most in (1_000_000, 100_000_000_000, 300_000_000_000)] == ["not at all", "layer by layer", "as a whole"]
    assert way(0) == way(free_memory())
    assert layer_by_layer(small.config, DOCUMENTS) is None


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "PhiForCausalLM"])
def test_what_the_last_tokens_take_is_the_rest_of_the_loss(make_checkpoint: Callable[..., Path], family: str):
    """Of 300 tokens the first 290: nats among them are those of a softmax without the others, by plain torch."""
    folder, taken = make_checkpoint(family), Taken(290)
    documents = [[n % 290 for n in ids] for ids in DOCUMENTS]
    among, whole = document_nats(folder, documents, head=taken.head), document_nats(folder, documents)
    assert taken.tokens == sum(map(len, documents))
    assert sum(among) + taken.total == pytest.approx(sum(whole), rel=1e-6)
    model, ids = checkpoint.load(folder, dtype=torch.float32), torch.tensor([[1, *documents[3]]])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1]
    plain = -logits[:, :290].log_softmax(1).gather(1, ids[0, 1:, None]).sum()
    assert among[3] == pytest.approx(float(plain), rel=1e-5)
    share = torch.log1p(logits[:, 290:].exp().sum(1) / logits[:, :290].exp().sum(1)).max()
    alone = Taken(290)
    document_nats(folder, documents[3:4], head=alone.head)
    assert alone.largest == pytest.approx(float(share), rel=1e-4)
    assert alone.largest <= taken.largest


def test_tokens_without_a_row_and_no_documents_are_refused(make_checkpoint: Callable[..., Path]):
    for documents, said in (([[1, 300]], "token 300"), ([], "no document")):
        with pytest.raises(Rejected, match=said) as error:
            document_nats(make_checkpoint(), documents)
        assert error.value.reason is Reason.SETTING


def test_a_change_is_of_the_sums_with_an_interval_over_documents():
    """(110 + 210 + 310) / (100 + 200 + 300) = 1.05; the first document changes most, by 10 %.

    d = 5, 0, -5: sqrt(2/3 ((5 / 500)^2 + (5 / 300)^2)) = 1.587 %; 600^2 / 140,000 = 2.6 documents count, t at 2 degrees is 4.303.
    """
    found = change([100.0, 200.0, 300.0], [110.0, 210.0, 310.0])
    assert found.percent == pytest.approx(5.0)
    assert found.relative == pytest.approx(0.05)
    assert found.largest == pytest.approx(0.1)
    assert (found.interval.low, found.interval.high) == pytest.approx((5 - 6.829, 5 + 6.829), abs=0.01)
    assert (found.is_above_zero, found.is_within(11.8), found.is_within(11.9)) == (False, False, True)
    assert change([100.0, 200.0, 300.0], [110.0, 220.0, 330.0]).is_above_zero
    same = change([1.0, 2.0], [1.0, 2.0])
    assert (same.percent, same.interval, same.largest) == (0.0, Interval(0.0, 0.0), 0.0)
    assert same.is_within(0.0)
    alone = change([2.0], [2.1])
    assert (alone.interval, alone.is_above_zero, alone.is_within(100.0)) == (None, False, False)
