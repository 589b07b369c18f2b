"""The trainer on tiny models: exact where it can be, and going on where it was. Killed: tests/test_train_command.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from runs import PACKING, RECIPE, SHAPE, TEXT, Few, Pieces, ignore, losses, packing

from sn29.errors import Reason, Rejected
from sn29.evaluation.engine import sample_nats
from sn29.models import checkpoint
from sn29.training.feed import Feed, Portions
from sn29.training.objective import Objective, make_batch
from sn29.training.optimizers import KINDS, is_installed
from sn29.training.packing import Mode
from sn29.training.parallel import World
from sn29.training.shape import FAMILIES, build_model, shape_of
from sn29.training.shared_rows import Rows
from sn29.training.trainer import learning_rate, train


@pytest.fixture(autouse=True)
def one_thread():
    """As in the child processes: models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_straight_and_falls_along_a_cosine():
    recipe = replace(RECIPE, steps=14, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(14)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.5)
    assert 0 < rates[13] < 0.03
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_learning_rate_of_wsd_is_stable_and_then_falls_straight():
    recipe = replace(RECIPE, steps=20, warmup_steps=2, learning_rate=1.0, schedule="wsd", decay_share=0.25)
    rates = [learning_rate(recipe, step) for step in range(20)]
    assert rates == pytest.approx([0.5, 1.0, *[1.0] * 13, 1.0, 0.8, 0.6, 0.4, 0.2])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_training_learns_and_its_checkpoint_is_what_a_validator_accepts(tmp_path, family):
    shape = replace(SHAPE, family=family, tied=family != "PhiForCausalLM")
    seen = []
    folder = train(tmp_path, shape, Pieces, replace(RECIPE, steps=120), seen.append)

    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "curve.jsonl", "state.pt"]
    facts = checkpoint.inspect(checkpoint.local_listing(folder), checkpoint.local_reader(folder))
    assert (facts.family, facts.vocab_size, facts.start_token) == (family, 400, 399)

    curve = losses(tmp_path)
    assert [p.loss_per_token for p in seen] == curve
    assert [p.step for p in seen] == list(range(1, 121))
    assert sum(p.tokens for p in seen) == seen[-1].tokens_seen
    assert all(p.flops > 6 * 3000 * p.tokens for p in seen), "about 6 for each of some 5,000 weights and token"
    assert curve[0] == pytest.approx(math.log(400), rel=0.1)
    assert sum(curve[-10:]) / 10 < 0.6 * curve[0]

    loaded = checkpoint.load(folder, dtype=torch.float32)
    sample = list(TEXT[200:260])
    assert sample_nats(loaded, sample, 399) < 0.7 * len(sample) * math.log(400)


@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_the_first_loss_is_the_fresh_models_own(tmp_path, mode):
    """Of the documents as each way of packing shows them."""
    recipe = replace(RECIPE, steps=1, packing=packing(mode), count_documents=0)
    train(tmp_path, SHAPE, Pieces, recipe, ignore)
    portions = Portions(recipe.packing, recipe.batch_tokens, 0, recipe.pool_documents, recipe.seed)
    group = Feed(Pieces(0, 1), 0, portions, Rows.all_own(400)).take()
    batch = make_batch(group)
    expected = Objective(build_model(SHAPE, recipe.seed))(batch).item() / batch.useful
    assert losses(tmp_path) == [pytest.approx(expected, rel=1e-6)]


def test_groups_that_are_added_up_are_one_larger_step(tmp_path):
    """The same rows in one pass and in three, and in half of the precision: the same curve, but for rounding."""

    class Alike(Pieces):
        """Rows of one length, so that three groups of 200 are one of 600."""

        def __next__(self):
            return super().__next__()[:20]

    recipe = replace(RECIPE, steps=1, batch_tokens=600, pool_documents=30, packing=packing(Mode.UNPACKED), count_documents=0)
    whole = train(tmp_path / "whole", SHAPE, Alike, recipe, ignore)
    parts = train(tmp_path / "parts", SHAPE, Alike, replace(recipe, accumulation=3), ignore)
    assert losses(tmp_path / "whole") == [pytest.approx(losses(tmp_path / "parts")[0], rel=1e-6)]
    one, other = (checkpoint.load(folder, dtype=torch.float32).state_dict() for folder in (whole, parts))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_less_memory_and_half_the_precision_give_almost_the_same_curve(tmp_path):
    recipe = replace(RECIPE, steps=20)
    train(tmp_path / "plain", SHAPE, Pieces, recipe, ignore)
    train(tmp_path / "again", SHAPE, Pieces, replace(recipe, activation_checkpointing=True), ignore)
    train(tmp_path / "half", SHAPE, Pieces, replace(recipe, dtype="bfloat16"), ignore)
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "again") == pytest.approx(plain, rel=1e-6)
    half = losses(tmp_path / "half")
    assert half != plain
    assert half == pytest.approx(plain, rel=0.04)  # 0.0004, and 0.027 in the last step
    saved = checkpoint.load(tmp_path / "half" / "checkpoint", dtype=torch.float32).state_dict()
    assert any((v != v.bfloat16().float()).any() for v in saved.values()), "the weights themselves are float32"


def test_training_goes_on_from_a_checkpoint(tmp_path):
    first = train(tmp_path / "first", SHAPE, Pieces, replace(RECIPE, steps=80), ignore)
    second = replace(RECIPE, steps=1, seed=9)
    train(tmp_path / "second", shape_of(first), Pieces, second, ignore, start=first)
    (loss,) = losses(tmp_path / "second")
    portions = Portions(PACKING, second.batch_tokens, 0, second.pool_documents, second.seed)
    batch = make_batch(Feed(Pieces(0, 1), 0, portions, Rows.all_own(400)).take())
    full = Objective(checkpoint.load(first, dtype=torch.float32))
    assert loss == pytest.approx(full(batch).item() / batch.useful, rel=1e-5)

    with pytest.raises(Rejected) as refused:
        train(tmp_path / "third", replace(SHAPE, num_layers=1), Pieces, second, ignore, start=first)
    assert refused.value.reason is Reason.BAD_CONFIG
    assert "num_hidden_layers 2, rule num_hidden_layers 1" in str(refused.value)


def test_training_refuses_what_it_cannot_do(tmp_path):
    train(tmp_path / "run", SHAPE, Pieces, replace(RECIPE, steps=2), ignore)
    cases = [
        ("run", SHAPE, Pieces, replace(RECIPE, steps=3), Reason.SETTING),
        ("short", SHAPE, Few, RECIPE, Reason.SETTING),
        ("family", replace(SHAPE, family="GPT2LMHeadModel"), Pieces, RECIPE, Reason.FAMILY),
        ("name", SHAPE, Pieces, replace(RECIPE, optimizer="adam"), Reason.SETTING),
    ]
    with pytest.raises(Rejected, match=r"got steps 3, rule steps 2, with which the run was begun"):
        train(tmp_path / "run", SHAPE, Pieces, replace(RECIPE, steps=3), ignore)
    for name, shape, source, recipe, reason in cases:
        with pytest.raises(Rejected) as refused:
            train(tmp_path / name, shape, source, recipe, ignore)
        assert refused.value.reason is reason, name
    with pytest.raises(Rejected, match="2 processes for 3 shards"):
        train(tmp_path / "world", SHAPE, Pieces, replace(RECIPE, shards=3), ignore, world=World(0, 2))
    with pytest.raises(Rejected, match="adafactor in 2 processes, rule one process, or adamw"):
        train(tmp_path / "world", SHAPE, Pieces, replace(RECIPE, shards=2, optimizer="adafactor"), ignore, world=World(0, 2))


def test_a_loss_that_is_none_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(Rejected, match=r"in step \d+, rule a finite loss") as refused:
        train(tmp_path, SHAPE, Pieces, replace(RECIPE, learning_rate=1e30, checkpoint_every=1), ignore)
    assert refused.value.reason is Reason.NOT_FINITE
    steps = len(losses(tmp_path))
    assert f"step {steps + 1}" in str(refused.value)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == steps
    checkpoint.load(tmp_path / "checkpoint", dtype=torch.float32)  # its weights are finite


def test_a_finished_run_is_not_trained_again(tmp_path):
    train(tmp_path, SHAPE, Pieces, replace(RECIPE, steps=5), ignore)
    before = (tmp_path / "curve.jsonl").read_bytes()
    seen = []
    train(tmp_path, SHAPE, Pieces, replace(RECIPE, steps=5), seen.append)
    assert seen == []
    assert (tmp_path / "curve.jsonl").read_bytes() == before


# ---- going on --------------------------------------------------------------------------------------------------------


def case(name, mode):
    """Passed over where the package is missing."""
    kind = KINDS[name]
    marks = [] if is_installed(kind) else [pytest.mark.skip(reason=f"{kind.package} is not installed (sn29[optim])")]
    return pytest.param(name, mode, id=f"{name}-{mode}", marks=marks)


RESUMED = [
    case("adamw", Mode.PACKED),
    *(case(name, Mode.PACKED_MASKED) for name in KINDS if name != "adamw8bit_ao"),  # that one compiles for half a minute
]


@pytest.mark.parametrize(("name", "mode"), RESUMED)
def test_a_run_in_slices_is_the_run_in_one_go(tmp_path, name, mode):
    """To the bit, with every optimizer; what may change from start to start changes nothing."""
    rate = RECIPE.learning_rate * min(1.0, KINDS[name].usual_rate)
    recipe = replace(RECIPE, steps=15, optimizer=name, learning_rate=rate, packing=packing(mode))
    whole = train(tmp_path / "whole", SHAPE, Pieces, recipe, ignore)
    train(tmp_path / "parts", SHAPE, Pieces, recipe, ignore, until=4)
    steps = iter(range(100))
    train(tmp_path / "parts", SHAPE, Pieces, replace(recipe, checkpoint_every=3), ignore, asked_to_stop=lambda: next(steps) == 4)
    assert len(losses(tmp_path / "parts")) == 9, "five steps, then it was asked to stop"
    saved, beside = [], {"a": tmp_path / "whole" / "curve.jsonl"}
    parts = train(tmp_path / "parts", SHAPE, Pieces, recipe, ignore, saved=saved.append, beside=beside)
    assert saved == [10, 15]
    assert (parts / "a").read_bytes() == beside["a"].read_bytes()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dropout_goes_on_with_the_numbers_that_would_have_come(tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = replace(SHAPE, family="PhiForCausalLM", more='{"resid_pdrop": 0.3}')
    recipe, world = replace(RECIPE, steps=6), World(device=device)
    train(tmp_path / "whole", shape, Pieces, recipe, ignore, world=world)
    train(tmp_path / "parts", shape, Pieces, recipe, ignore, world=world, until=3)
    train(tmp_path / "parts", shape, Pieces, recipe, ignore, world=world)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6 if device == "cpu" else 1e-3)


def test_a_folder_left_between_two_renames_is_mended(tmp_path):
    folder = train(tmp_path, SHAPE, Pieces, replace(RECIPE, steps=3), ignore)
    folder.rename(tmp_path / "checkpoint.old")
    assert train(tmp_path, SHAPE, Pieces, replace(RECIPE, steps=3), ignore).is_dir()
    assert not (tmp_path / "checkpoint.old").exists()
