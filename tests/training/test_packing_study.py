"""The study's runs: same documents for all arms, resumed to the bit, read as the plain model reads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sn29.errors import Rejected
from sn29.training.packing import UNSCORED, Mode, Row
from sn29.training.packing_study import (
    ARMS,
    MODES,
    RATES,
    SIZES,
    Plan,
    Run,
    Texts,
    Tokens,
    Work,
    batches,
    compute_tokens,
    evaluate,
    flop_per_token,
    goal_of,
    layer_weights,
    parameters,
    parts_of,
    pools,
    rate_at,
    runs_of,
    train,
    work_of,
)
from sn29.training.shape import Shape, build_model

PLAN = Plan("test", 1, 16, 24, 2, 40, False, 0.1, 600, 64, 16, 1e-2, "cpu", False, pool_documents=24)
END = PLAN.end_token


def tokens_of(documents: list[list[int]]) -> Tokens:
    return Tokens(np.array(list(chain.from_iterable(documents)), dtype=np.int32), np.cumsum([len(d) for d in documents]))


def random_documents(count: int, seed: int) -> list[list[int]]:
    """Of 1 to 20 ids from 1 to 39; some are longer than a row of 16."""
    numbers = np.random.default_rng(seed)
    return [numbers.integers(1, 40, numbers.integers(1, 21)).tolist() for _ in range(count)]


TEXTS = Texts(tokens_of(random_documents(60, 1)), tokens_of(random_documents(20, 2)))


def model_of(plan: Plan, seed: int = 0):
    shape = Shape(
        family="LlamaForCausalLM", vocab_size=plan.vocabulary, hidden_size=plan.hidden, intermediate_size=plan.inner,
        num_layers=plan.layers, num_heads=plan.heads, max_positions=plan.row_tokens, tied=plan.tied, start_token=END,
    )  # fmt: skip
    return build_model(shape, seed)


# --- documents, rows and batches --------------------------------------------------------------------------------------


def test_every_pass_has_every_document_once_in_an_order_of_its_own():
    drawn = list(chain.from_iterable(islice(pools(TEXTS.training, PLAN, 3), 5)))  # 5 x 24 = two passes of 60
    whole = sorted(TEXTS.training.document(n, 15) for n in range(60))
    assert sorted(drawn[:60]) == sorted(drawn[60:]) == whole
    assert drawn[:60] != drawn[60:]
    assert list(islice(pools(TEXTS.training, PLAN, 3, 2), 3)) == list(islice(pools(TEXTS.training, PLAN, 3), 2, 5))
    assert next(pools(TEXTS.training, PLAN, 4)) != next(pools(TEXTS.training, PLAN, 3))


def test_documents_are_cut_so_that_a_start_token_fits_before_them():
    longest = max(len(document) for pool in islice(pools(TEXTS.training, PLAN, 0), 3) for document in pool)
    assert longest == PLAN.row_tokens - 1


@pytest.mark.parametrize("name", [name for name in ARMS if ARMS[name].mode is not Mode.PACKED])
def test_an_arm_of_its_own_rows_scores_every_token_and_end_of_the_pool_once(name):
    pool = next(pools(TEXTS.training, PLAN, 0))
    found = [batch for number, batch in islice(batches(TEXTS.training, PLAN, ARMS[name], 0), 200) if number == 0]
    scored = Counter(target for batch in found for row in batch for target in row.targets if target != UNSCORED)
    first = 0 if ARMS[name].start else 1
    assert scored == Counter(chain.from_iterable([*document[first:], END] for document in pool))


def spread(batch: list[Row]) -> int:
    lengths = [len(row.ids) for row in batch]
    return max(lengths) - min(lengths)


def test_unpacked_mixed_has_the_rows_of_unpacked_with_all_lengths_in_a_step():
    whole = replace(PLAN, pool_documents=60)
    alike, mixed = (
        [batch for number, batch in islice(batches(TEXTS.training, whole, ARMS[name], 0), 30) if number == 0]
        for name in ("unpacked", "unpacked-mixed")
    )
    assert sorted(row.ids for batch in alike for row in batch) == sorted(row.ids for batch in mixed for row in batch)
    assert max(map(spread, alike)) < min(map(spread, mixed))


@pytest.mark.timeout(60)
def test_text_without_a_row_is_refused_and_not_looked_through_for_ever():
    barren = tokens_of([[7]] * 60)  # one token, no start token: the end alone is scored
    with pytest.raises(Rejected, match="no row of 480 documents"):
        next(batches(barren, replace(PLAN, row_tokens=100_000), ARMS["packed"], 0))


def test_the_packed_arms_score_the_stream_with_and_without_first_tokens():
    stream = [t for pool in islice(pools(TEXTS.training, PLAN, 0), 2) for document in pool for t in (*document, END)]
    for name, left_out in (("packed", set()), ("packed-first", {n for n, t in enumerate(stream) if n and stream[n - 1] == END})):
        found = islice(batches(TEXTS.training, PLAN, ARMS[name], 0), 300)
        made = [row for number, batch in found if number < 2 for row in batch]
        scored = Counter(t for row in made for t in row.targets if t != UNSCORED)
        wanted = Counter(t for n, t in enumerate(stream[: len(made) * 16 + 1]) if n and n not in left_out)
        assert scored == wanted


def row_of(scored: int) -> Row:
    return Row((1,) * scored, (2,) * scored, (0, scored))


def test_work_counts_padding_and_what_a_token_may_look_at():
    two = [Row((1, 2, 3), (2, 3, 4), (0, 3)), Row((1, 2), (2, UNSCORED), (0, 2))]
    assert work_of(two, Mode.UNPACKED) == Work(scored=4, through=6, pairs=12)  # padded to 3: 2 x (1 + 2 + 3)
    both = [Row((1, 2, 3, 1, 2), (2, 3, 4, 2, UNSCORED), (0, 3, 5))]
    assert work_of(both, Mode.PACKED_MASKED) == Work(scored=4, through=5, pairs=9)  # 1 + 2 + 3, 1 + 2
    assert work_of([Row((1,) * 5, (2,) * 5, (0, 5))], Mode.PACKED) == Work(scored=5, through=5, pairs=15)


def test_a_large_batch_goes_through_the_model_in_parts_each_padded_to_its_own_longest():
    batch = [row_of(n) for n in (6_000, 7_000, 9_000, 10_000)]
    assert parts_of(batch) == [batch[:2], batch[2:]]
    assert work_of(batch, Mode.UNPACKED).through == 2 * 7_000 + 2 * 10_000
    assert work_of(batch, Mode.UNPACKED).scored == 32_000
    assert parts_of(batch[:2]) == [batch[:2]]


def test_flop_are_those_of_the_model():
    model = model_of(PLAN)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    assert layer_weights(PLAN) == matrices
    assert parameters(PLAN) == sum(p.numel() for p in model.parameters())
    assert parameters(replace(PLAN, tied=True)) == sum(p.numel() for p in model_of(replace(PLAN, tied=True)).parameters())
    assert parameters(SIZES["tiny"]) == 361_280
    # 16 wide, 40 ids, 1 layer of 4 * 16 * 16 + 3 * 16 * 24 = 2176 weights
    assert Work(4, 6, 12).flop(PLAN) == 6 * (2176 * 6 + 40 * 16 * 4) + 12 * 16 * 12


def test_equal_compute_is_what_packed_takes():
    long = replace(PLAN, tokens=5_000)
    for name in ("unpacked", "masked", "masked+start"):
        spent = compute_tokens(long, name, TEXTS) * flop_per_token(long, name, TEXTS)
        assert spent == pytest.approx(long.tokens * flop_per_token(long, "packed", TEXTS), rel=1e-3)
    assert compute_tokens(long, "packed", TEXTS) == long.tokens
    # shorter looks back: less work a token than rows of 16 that see all of their past
    assert compute_tokens(long, "masked", TEXTS) > long.tokens


def test_the_runs_of_a_study_are_whole_seed_by_seed():
    runs = runs_of(PLAN, TEXTS, [5, 6])
    assert len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.arm for run in runs if run.kind == "tokens"} == set(ARMS)
    for run in runs:
        assert run.after is None or runs.index(run.after) < runs.index(run)
    assert not any(run.kind == "compute" and run.arm in ("packed", "packed-first", "unpacked-mixed") for run in runs)
    assert {(run.kind, run.arm, run.seed) for run in runs if run.kind in RATES} == {(k, arm, 5) for k in RATES for arm in MODES}


def test_the_rate_rises_and_falls_with_the_tokens():
    run, later = Run("tokens", "masked", 0), Run("continued", "masked", 0)
    rates = [rate_at(PLAN, run, share / 1000) for share in range(1001)]
    assert max(rates) == pytest.approx(PLAN.learning_rate)
    assert rates.index(max(rates)) == 20
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert 0 < rates[0] < 0.1 * PLAN.learning_rate
    assert max(rate_at(PLAN, later, share / 1000) for share in range(1001)) == pytest.approx(
        PLAN.continue_rate * PLAN.learning_rate
    )
    for kind, times in RATES.items():
        shares = [share / 1000 for share in range(1001)]
        assert [rate_at(PLAN, Run(kind, "masked", 0), s) for s in shares] == pytest.approx([times * rate for rate in rates])


# --- reading ----------------------------------------------------------------------------------------------------------


def plain_nats(model, ids: list[int]) -> list[float]:
    """By transformers' own call, of every token but the first."""
    with torch.inference_mode():
        logp = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return [-float(logp[n, token]) for n, token in enumerate(ids[1:])]


def test_reading_agrees_with_the_plain_model_document_by_document():
    model, held = model_of(PLAN), TEXTS.held(PLAN)
    found = evaluate(model, held, PLAN)
    for n, ids in enumerate(held):
        single = plain_nats(model, ids) if len(ids) > 1 else []
        eos = plain_nats(model, [END, *ids])
        assert found["nats"]["single"][n] == pytest.approx(sum(single), rel=1e-4, abs=1e-4)
        assert found["nats"]["single_eos"][n] == pytest.approx(sum(eos[1:]), rel=1e-4, abs=1e-4)
        assert found["nats"]["single_eos_first"][n] == pytest.approx(eos[0], rel=1e-4)
        assert found["tokens"]["single"][n] == found["tokens"]["packed_rest"][n] == len(ids) - 1
    assert model.training


def test_packed_rows_are_the_stream_and_their_parts_add_up():
    model, held = model_of(PLAN), TEXTS.held(PLAN)
    found = evaluate(model, held, PLAN)
    stream = [END, *chain.from_iterable([*ids, END] for ids in held)]
    whole = sum(sum(plain_nats(model, stream[i : i + 17])) for i in range(0, len(stream) - 1, 16))
    parts = ("packed_rest", "packed_first", "packed_end")
    assert sum(sum(found["nats"][part]) for part in parts) == pytest.approx(whole, rel=1e-5)
    assert sum(sum(found["tokens"][part]) for part in parts) == len(stream) - 1


def test_places_count_tokens_from_the_start_of_the_document():
    held = [[1, 2, 3, 4, 5], [6]]
    found = evaluate(model_of(PLAN), held, PLAN)
    assert found["places"]["single"]["tokens"][:3] == [0, 2, 2]  # tokens 2, 3 and 4, 5 of the first
    assert found["places"]["single_eos"]["tokens"][:3] == [2, 2, 2]
    assert found["places"]["packed"]["tokens"][:3] == [2, 2, 2]
    for view, parts in (("single", ["single"]), ("single_eos", ["single_eos", "single_eos_first"]),
                        ("packed", ["packed_rest", "packed_first"])):  # fmt: skip
        whole = sum(sum(found["nats"][part]) for part in parts)
        assert sum(found["places"][view]["nats"]) == pytest.approx(whole, abs=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(tokens: int):
    def tell(done: int, goal: int) -> None:
        if done >= tokens:
            raise Stopped

    return tell


def without_seconds(folder: Path, run: Run) -> tuple[dict, list]:
    result = json.loads((folder / f"{run.name}.json").read_text())
    curve = [json.loads(line) for line in (folder / f"{run.name}.jsonl").read_text().splitlines()]
    return {k: v for k, v in result.items() if k != "seconds"}, [{k: v for k, v in c.items() if k != "seconds"} for c in curve]


@pytest.mark.parametrize("name", ["packed", "masked+start"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(name, tmp_path):
    run, (whole, parts) = Run("tokens", name, 7), (tmp_path / "whole", tmp_path / "parts")
    whole.mkdir()
    parts.mkdir()
    train(PLAN, run, TEXTS, whole, lambda done, goal: None)
    for tokens in (100, 300, 320):
        with pytest.raises(Stopped):
            train(PLAN, run, TEXTS, parts, stop_after(tokens), save_seconds=0.0)
        assert not (parts / f"{run.name}.json").exists()
    train(PLAN, run, TEXTS, parts, lambda done, goal: None)
    assert without_seconds(parts, run) == without_seconds(whole, run)


def test_all_arms_score_the_same_number_of_tokens_and_begin_alike(tmp_path):
    for name in ARMS:
        result = train(PLAN, Run("tokens", name, 1), TEXTS, tmp_path, lambda done, goal: None)
        assert PLAN.tokens <= result["tokens"] < PLAN.tokens + 1.5 * PLAN.batch_tokens
        assert result["steps"] == pytest.approx(PLAN.tokens / PLAN.batch_tokens, abs=2)  # a pool is 3.5 batches
    kept = {path.name for path in tmp_path.glob("*.pt")}
    assert kept == {"packed-seed1.pt"}  # the others are done with


def test_a_continued_run_begins_where_the_packed_one_ended(tmp_path):
    before, run = Run("tokens", "packed", 2), Run("continued", "masked", 2)
    train(PLAN, before, TEXTS, tmp_path, lambda done, goal: None)
    still = replace(PLAN, continue_rate=0.0)
    result = train(still, run, TEXTS, tmp_path, lambda done, goal: None)
    assert goal_of(PLAN, run, TEXTS) == 30
    nats = json.loads((tmp_path / f"{before.name}.json").read_text())["evaluation"]["nats"]
    assert result["evaluation"]["nats"]["single"] == pytest.approx(nats["single"], abs=1e-4)
    moved = train(replace(PLAN, continue_share=0.5), Run("continued", "unpacked", 2), TEXTS, tmp_path, lambda done, goal: None)
    assert moved["evaluation"]["nats"]["single"] != pytest.approx(nats["single"], abs=1e-4)
