"""The trainer on tiny models: exact where it can be, and killed where it hurts."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from sn29.errors import Reason, Rejected
from sn29.evaluation.engine import sample_nats
from sn29.models import checkpoint
from sn29.training import trainer
from sn29.training.trainer import Place, Recipe, Rows, Shape, build_model, learning_rate, make_batch, summed_nats, train

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "LICENSE").read_bytes()
FAMILIES = ["LlamaForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"]

SHAPE = Shape(
    family="LlamaForCausalLM", vocab_size=400, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    max_positions=128, tied=True, start_token=399,
)  # fmt: skip
RECIPE = Recipe(
    steps=40, batch_tokens=200, max_tokens=60, learning_rate=2e-2, warmup_steps=4, weight_decay=0.01, clip=1.0, seed=3,
    checkpoint_every=10, pool_documents=16, count_documents=50, min_count=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """As in the child processes: models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(skip):
    """Pieces of the licence as bytes, 20 to 90 of them, for ever; the same number is the same piece."""
    number = skip
    while True:
        start = number * 37 % (len(TEXT) - 90)
        yield list(TEXT[start : start + 20 + number * 13 % 71])
        number += 1


def ignore(_):
    pass


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "curve.jsonl").read_text().splitlines()]


def as_rows(samples):
    return [torch.tensor(sample) for sample in samples]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_loss_in_pieces_is_the_plain_loss():
    generator = torch.Generator().manual_seed(1)
    ids, width, tokens = trainer._LOGITS_AT_ONCE // 5, 3, 12  # five tokens at a time: three pieces

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [draw(tokens, width), draw(ids, width), draw(ids)]
    targets = torch.randint(ids, (tokens,), generator=generator)
    ours = [t.clone().requires_grad_() for t in tensors]
    plain = [t.clone().requires_grad_() for t in tensors]

    nats = trainer._SummedNats.apply(*ours, targets)
    logits = plain[0] @ plain[1].T + plain[2]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (nats / 7).backward()
    (expected / 7).backward()

    assert nats.item() == pytest.approx(expected.item(), rel=1e-13)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_loss_nor_gradient(family):
    model = build_model(replace(SHAPE, family=family), seed=5).double()
    samples = as_rows(islice(documents(0), 7))
    assert len({len(sample) for sample in samples}) > 3

    def run(groups):
        model.zero_grad()
        nats = [summed_nats(model, make_batch(group, 399), torch.zeros(400)) for group in groups]
        sum(nats).backward()
        return sum(nats).item(), [p.grad.clone() for p in model.parameters()]

    together, grads = run([samples])
    alone, grads_alone = run([[sample] for sample in samples])
    assert together == pytest.approx(alone, rel=1e-12)
    for a, b in zip(grads, grads_alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_row_is_exact(family, tied):
    """The small model with one row for many tokens and the full model that repeats it have the same losses."""
    shape = replace(SHAPE, family=family, tied=tied)
    rows = Rows([*range(0, 300, 2), 399], shape.vocab_size)
    assert rows.size == 152
    small = trainer._small_model(shape, rows, seed=5).double()
    full = build_model(shape, seed=6).double()
    full.load_state_dict(rows.expand(small.state_dict()))
    sample = list(TEXT[:40])  # odd and even bytes: tokens with and without a row of their own

    nats = summed_nats(small, make_batch([rows.row_of[torch.tensor(sample)]], int(rows.row_of[399])), rows.log_count.double())
    assert nats.item() == pytest.approx(sample_nats(full.eval(), sample, 399), rel=1e-6)  # the engine's softmax is float32


def test_rows_are_found_again_in_a_checkpoint():
    rows = Rows([1, 5, 399], SHAPE.vocab_size)
    small = trainer._small_model(SHAPE, rows, seed=5).state_dict()
    full = rows.expand(small)
    found = Rows.found(full)
    assert found.own == (1, 5, 399)
    for name, tensor in found.reduce(full).items():
        assert torch.equal(tensor, small[name]), name
    assert Rows.found(build_model(SHAPE, seed=5).state_dict()).size == SHAPE.vocab_size  # nothing is shared


def test_tokens_that_are_often_seen_get_their_own_row():
    rows = Rows.counted(documents, SHAPE, RECIPE)
    often = {token for token in range(256) if sum(d.count(token) for d in islice(documents(0), 50)) >= 2}
    assert set(rows.own) == often | {399}
    assert rows.log_count[-1].item() == pytest.approx(math.log(400 - len(rows.own)))
    assert Rows.counted(documents, SHAPE, replace(RECIPE, count_documents=0)).size == 400


def test_the_learning_rate_rises_straight_and_falls_along_a_cosine():
    recipe = replace(RECIPE, steps=14, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(14)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.5)
    assert 0 < rates[13] < 0.03
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_batches_hold_each_document_once_and_can_be_continued_anywhere():
    rows = Rows(range(400), 400)

    def take(place, count):
        return list(islice(trainer.batches(documents, RECIPE, rows, 399, place), count))

    whole = take(Place(0, 0), 12)
    scored = [tuple(targets.tolist()) for _, batch in whole for targets in batch.targets.split(batch.real.sum(1).tolist())]
    pools = whole[-1][0].pool  # documents of the finished pools
    expected = [tuple(document[:60]) for document in islice(documents(0), pools)]
    assert pools >= 32
    assert sorted(scored[:pools]) == sorted(expected)
    assert all(torch.all(batch.inputs[:, 0] == 399) for _, batch in whole)
    for done in (1, 3, 7):
        again = take(whole[done - 1][0], 12 - done)
        assert [place for place, _ in again] == [place for place, _ in whole[done:]]
        assert all(torch.equal(a.inputs, b.inputs) for (_, a), (_, b) in zip(again, whole[done:], strict=True))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns_and_its_checkpoint_is_what_a_validator_accepts(tmp_path, family):
    shape = replace(SHAPE, family=family, tied=family != "PhiForCausalLM")
    seen = []
    folder = train(tmp_path, shape, documents, replace(RECIPE, steps=120), seen.append)

    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "curve.jsonl", "state.pt"]
    facts = checkpoint.inspect(checkpoint.local_listing(folder), checkpoint.local_reader(folder))
    assert (facts.family, facts.vocab_size, facts.start_token) == (family, 400, 399)

    curve = losses(tmp_path)
    assert [p.loss_per_token for p in seen] == curve
    assert [p.step for p in seen] == list(range(1, 121))
    assert curve[0] == pytest.approx(math.log(400), rel=0.05)
    assert sum(curve[-10:]) / 10 < 0.6 * curve[0]

    sample = list(TEXT[200:260])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    rows = Rows(state["own"], 400)
    small = trainer._small_model(shape, rows, seed=0)
    small.load_state_dict(state["model"])
    batch = make_batch([rows.row_of[torch.tensor(sample)]], int(rows.row_of[399]))
    reloaded = sample_nats(checkpoint.load(folder, dtype=torch.float32), sample, 399)
    assert summed_nats(small, batch, rows.log_count).item() == pytest.approx(reloaded, rel=1e-5)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    first = train(tmp_path / "first", SHAPE, documents, replace(RECIPE, steps=80), ignore)
    second = replace(RECIPE, steps=1, seed=9)
    train(tmp_path / "second", SHAPE, documents, second, ignore, start=first)
    (loss,) = losses(tmp_path / "second")
    _, batch = next(trainer.batches(documents, second, Rows(range(400), 400), 399, Place(0, 0)))
    full = checkpoint.load(first, dtype=torch.float32)
    expected = summed_nats(full, batch, torch.zeros(400)).item() / len(batch.targets)
    assert loss == pytest.approx(expected, rel=1e-5)

    with pytest.raises(Rejected) as refused:
        train(tmp_path / "third", replace(SHAPE, num_layers=1), documents, second, ignore, start=first)
    assert refused.value.reason is Reason.BAD_CONFIG
    assert "num_hidden_layers 2, rule num_hidden_layers 1" in str(refused.value)


def test_training_refuses_what_it_cannot_do(tmp_path):
    train(tmp_path / "run", SHAPE, documents, replace(RECIPE, steps=2), ignore)
    cases = [
        ("run", SHAPE, documents, replace(RECIPE, steps=3), Reason.SETTING),
        ("short", SHAPE, lambda skip: islice(documents(skip), max(0, 20 - skip)), RECIPE, Reason.SETTING),
        ("family", replace(SHAPE, family="GPT2LMHeadModel"), documents, RECIPE, Reason.FAMILY),
        ("diverged", SHAPE, documents, replace(RECIPE, learning_rate=1e30), Reason.NOT_FINITE),
    ]
    for name, shape, source, recipe, reason in cases:
        with pytest.raises(Rejected) as refused:
            train(tmp_path / name, shape, source, recipe, ignore)
        assert refused.value.reason is reason, name


def test_a_finished_run_is_not_trained_again(tmp_path):
    train(tmp_path, SHAPE, documents, replace(RECIPE, steps=5), ignore)
    before = (tmp_path / "curve.jsonl").read_bytes()
    seen = []
    train(tmp_path, SHAPE, documents, replace(RECIPE, steps=5), seen.append)
    assert seen == []
    assert (tmp_path / "curve.jsonl").read_bytes() == before


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_trainer import RECIPE, SHAPE, documents
from sn29.training.trainer import train
torch.set_num_threads(1)
train(Path(sys.argv[1]), SHAPE, documents, RECIPE, lambda progress: print(progress.step, flush=True))
"""


def child(folder):
    command = [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment)


def test_a_killed_run_goes_on_to_the_same_curve_and_the_same_weights(tmp_path):
    undisturbed = child(tmp_path / "undisturbed")
    killed = child(tmp_path / "killed")
    for line in killed.stdout:
        if int(line) == 26:  # between the states of step 20 and step 30
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "killed" / "checkpoint.new").mkdir(exist_ok=True)  # as if it had been killed while writing one
    with open(tmp_path / "killed" / "curve.jsonl", "a") as curve:
        curve.write('{"step": 99, "lo')

    resumed = child(tmp_path / "killed")
    steps = [int(line) for line in resumed.communicate()[0].split()]
    undisturbed.communicate()
    assert resumed.returncode == undisturbed.returncode == 0
    assert steps[0] in (21, 31)  # 31 when the kill came late
    assert steps[-1] == 40
    for name in ("curve.jsonl", "checkpoint/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    assert not (tmp_path / "killed" / "checkpoint.new").exists()
