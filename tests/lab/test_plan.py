"""Plans: memory against the sums of its parts, speeds against rows that others measured, the seeds' claims."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from sn29.errors import Reason, Rejected
from sn29.lab.cost import Costs, config_for, config_of, costs_of
from sn29.lab.plan import (
    GIB,
    USABLE,
    Compared,
    Devices,
    Job,
    against_published,
    devices_of,
    fits,
    mean_error,
    memory_of,
    optimizers_that_fit,
    plan,
    published_utilisation,
    rows_of,
    sweep,
    utilisation_from,
    work,
)
from sn29.lab.published import HELD_OUT, ROWS, lengths_of, mpt_config

JOB = Job(2048, 1 << 19, "adamw", "bfloat16", devices_of("2x48GB", "bfloat16", 364))


@pytest.fixture(scope="module")
def seven() -> Costs:
    """6.9B, all in bfloat16."""
    return costs_of(config_of(config_for(6.9e9)), "bfloat16")


@pytest.fixture(scope="module")
def compared() -> dict[tuple[str, str], list[Compared]]:
    found: dict[tuple[str, str], list[Compared]] = {}
    for each in [each for device in ("a100", "h100", HELD_OUT) for each in against_published(device)]:
        found.setdefault((each.row.device, each.row.model), []).append(each)
    return found


# --- beside what others measured --------------------------------------------------------------------------------------


def test_published_rows_are_met_within_15_percent(compared: dict[tuple[str, str], list[Compared]]) -> None:
    assert len(ROWS) == 50 + 8 + 31 + 6 + 39 + 7
    for device, count, most in (("a100", 50, 0.09), ("h100", 31, 0.15), (HELD_OUT, 39, 0.05)):
        rows = [each for (of, _), found in compared.items() if of == device for each in found]
        assert len(rows) == count
        assert mean_error(rows) <= most
    five = [each for model in ("125m", "1b", "3b", "7b", "30b") for each in compared["a100", model]]
    assert len(five) == 31
    assert mean_error(five) == pytest.approx(0.080, abs=0.001)


def test_rows_that_nothing_was_fitted_on(compared: dict[tuple[str, str], list[Compared]]) -> None:
    for model in ("7b", "13b"):
        assert max(abs(each.error) for each in compared[HELD_OUT, model]) < 0.05
    assert [mean_error(against_published(device, 0.0)) for device in ("a100", "h100")] == [
        pytest.approx(0.093, abs=0.001), pytest.approx(0.153, abs=0.001),
    ]  # fmt: skip


def test_half_the_square_is_further_off() -> None:
    errors = []
    for device, model in dict.fromkeys((row.device, row.model) for row in ROWS if row.device != HELD_OUT):
        costs = costs_of(config_of(mpt_config(model)), "bfloat16")
        half = replace(costs, heads_width=costs.heads_width // 2)
        first, *others = lengths_of(device, model)

        def of(row, half=half):
            return work(half, row.row_tokens, row.rows, checkpointing=row.checkpointing, sharded=True)

        errors += [abs(of(first) / of(row) / (row.tokens_per_second / first.tokens_per_second) - 1) for row in others]
    assert statistics.fmean(errors) == pytest.approx(0.312, abs=0.001)


def test_the_seeds_claim_of_30b(compared: dict[tuple[str, str], list[Compared]]) -> None:
    """It says: nothing from 2,048 to 4,096, 15 % at 8,192. Its source says: 11 % and 37 %; operations alone 4 % and 13 %."""
    speeds = {row.row_tokens: row.tokens_per_second for row in lengths_of("a100", "30b")}
    assert speeds[4096] / speeds[2048] - 1 == pytest.approx(-0.11, abs=0.005)
    assert speeds[8192] / speeds[2048] - 1 == pytest.approx(-0.37, abs=0.005)
    costs = costs_of(config_of(mpt_config("30b")), "bfloat16")
    alone = {s: costs.operations(2048).total / costs.operations(s).total - 1 for s in (4096, 8192)}
    assert alone[4096] == pytest.approx(-0.04, abs=0.005)
    assert alone[8192] == pytest.approx(-0.12, abs=0.005)


def test_longer_rows_cost_smaller_models_more(compared: dict[tuple[str, str], list[Compared]]) -> None:
    at = {model: {each.row.row_tokens: each for each in compared["a100", model]} for model in ("125m", "1b", "3b", "30b")}
    planned = [at[model][4096].planned for model in ("125m", "1b", "3b", "30b")]
    measured = [at[model][4096].measured for model in ("125m", "1b", "3b", "30b")]
    assert planned == sorted(planned)
    assert measured == sorted(measured)


def test_published_models_have_their_parameters() -> None:
    """NumParams of the table less the learned places, which transformers' MPT does not have."""
    for model, count, width, row in (("125m", 124_131_840, 768, 512), ("7b", 6_658_859_008, 4096, 2048)):
        found = costs_of(config_of(mpt_config(model)), "bfloat16").parameters
        assert found.total == pytest.approx(count - row * width, rel=1e-3)


def test_published_utilisation_is_that_of_the_nearest_size() -> None:
    found = published_utilisation("a100", 6_900_000_000)
    assert found is not None
    assert 0.7 < found < 0.8
    assert published_utilisation("a100", 10**12) == published_utilisation("a100", 30 * 10**9)
    assert published_utilisation("l40s", 10**9) is None


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "each"),
    [
        ("adamw", "bfloat16", 12.0),
        ("adamw8bit", "bfloat16", 6.03),
        ("lion", "bfloat16", 8.0),
        ("adafactor", "bfloat16", 4.0),
        ("adamw", "mixed", 16.0),
    ],
)
def test_bytes_a_parameter(seven: Costs, name: str, dtype: str, each: float) -> None:
    one = replace(JOB, optimizer=name, dtype=dtype, devices=devices_of("48GB", "bfloat16"))
    memory = memory_of(seven, one, 1, checkpointing=True)
    found = (memory.weights + memory.gradients + memory.optimizer) / seven.parameters.total
    assert found == pytest.approx(each, abs=0.02)
    two = memory_of(seven, replace(one, devices=devices_of("2x48GB", "bfloat16")), 1, checkpointing=True)
    assert (two.weights, two.gradients, two.optimizer) == (memory.weights / 2, memory.gradients / 2, memory.optimizer / 2)
    assert memory.total == pytest.approx(sum(getattr(memory, part) for part in memory.__slots__))


def test_two_cards_of_48_gb_hold_69b_without_adamw(seven: Costs) -> None:
    """The seed's machine."""
    found = {name: is_enough for name, _, is_enough in optimizers_that_fit(seven, JOB)}
    assert {name for name in found if not found[name]} == {"adamw", "soap"}
    alone = {
        name: is_enough for name, _, is_enough in optimizers_that_fit(seven, replace(JOB, devices=devices_of("48GB", "bfloat16")))
    }
    assert (alone["lion"], alone["muon"]) == (False, False), "not without sharding"
    assert not plan(seven, JOB, 0.4).fits
    assert plan(seven, replace(JOB, optimizer="lion"), 0.4).fits


def test_the_most_rows_that_fit(seven: Costs) -> None:
    job = replace(JOB, devices=devices_of("8xh100", "bfloat16"))
    rows, again = rows_of(seven, job)
    assert fits(memory_of(seven, job, rows, checkpointing=again), job.devices)
    assert rows == 32 or not fits(memory_of(seven, job, rows + 1, checkpointing=again), job.devices)
    both = [rows_of(seven, replace(job, checkpointing=which)) for which in (False, True)]
    times = [work(seven, 2048, count, checkpointing=which, sharded=True) for count, which in both]
    assert (rows, again) == both[times.index(min(times))]
    assert rows_of(seven, replace(job, batch_tokens=8 * 2048))[0] == 1, "no more than a step has"
    assert rows_of(seven, replace(job, rows=2, checkpointing=True)) == (2, True)
    assert rows_of(seven, JOB) == (1, True), "does not fit at all"


def test_computing_again_keeps_less(seven: Costs) -> None:
    kept, again = (memory_of(seven, JOB, 4, checkpointing=which).activations for which in (False, True))
    assert again < kept / 5
    assert kept == 4 * seven.kept.of(2048)


# --- time -------------------------------------------------------------------------------------------------------------


def test_speed_is_operations_over_rate(seven: Costs) -> None:
    job = replace(JOB, devices=devices_of("h200", "bfloat16"), optimizer="lion", rows=2, checkpointing=False)
    found = plan(seven, job, 0.5)
    assert found.step_tokens == 1 << 19
    assert plan(seven, replace(job, batch_tokens=2048), 0.5).step_tokens == 2 * 2048, "a micro-batch is the least of a step"
    assert found.tokens_per_second == pytest.approx(0.5 * 989e12 / seven.operations(2048).total)
    assert found.mfu == pytest.approx(0.5)
    four = plan(seven, replace(job, devices=devices_of("4xh200", "bfloat16")), 0.5)
    assert four.tokens_per_second == pytest.approx(4 * found.tokens_per_second / (1 + 1000 / 4096)), "weights are gathered"
    again = plan(seven, replace(job, checkpointing=True), 0.5)
    assert 1.3 < found.tokens_per_second / again.tokens_per_second < 5 / 3


def test_an_mfu_that_is_given_comes_out(seven: Costs) -> None:
    job = replace(JOB, devices=devices_of("8xh100", "bfloat16"))
    assert plan(seven, job, utilisation_from(seven, job, 0.37)).mfu == pytest.approx(0.37)


def test_a_sweep_is_slower_with_longer_rows(seven: Costs) -> None:
    found = sweep(seven, replace(JOB, devices=devices_of("64xh100", "bfloat16"), batch_tokens=1 << 22), (1024, 4096, 16_384), 0.4)
    assert [each.row_tokens for each in found] == [1024, 4096, 16_384]
    speeds = [each.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True)
    assert [each.share for each in found] == sorted(each.share for each in found)


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices() -> None:
    found = devices_of("8xH100", "bfloat16")
    assert (found.count, found.memory_bytes, found.peak) == (8, 80 * GIB, 989e12)
    assert (devices_of("2 x 48GB", "bfloat16").count, devices_of("48gb", "bfloat16").peak) == (2, 0.0)
    assert devices_of("24.5GB", "float32", 100).peak == 100e12
    assert 0.5 < USABLE < 1
    assert devices_of("8xH100", "float32").peak == 0.0, "the sheets' numbers are of 16-bit products"


def test_the_device_that_was_measured() -> None:
    here = Devices(1, "here", 16e9, 5e10, 0.5)
    assert devices_of("here", "float32", here=here) == here
    assert devices_of("2xhere", "float32", here=here) == replace(here, count=2)
    with pytest.raises(Rejected, match="--measure"):
        devices_of("here", "mixed")


def test_a_kernel_that_leaves_half_the_square_out_is_faster(seven: Costs) -> None:
    job = replace(JOB, devices=devices_of("h200", "bfloat16"), optimizer="lion", rows=2, checkpointing=False)
    half = replace(job, devices=replace(job.devices, square=0.5))
    each = seven.operations(2048)
    ratio = plan(seven, half, 0.5).tokens_per_second / plan(seven, job, 0.5).tokens_per_second
    assert ratio == pytest.approx(each.total / (each.dense + each.scores / 2))


@pytest.mark.parametrize("text", ["", "8xVoodoo", "0xH100", "x", "2x48", "8xH100xH100", "-1xH100", "2x0GB"])
def test_devices_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Rejected, match="2x48GB") as caught:
        devices_of(text, "mixed")
    assert caught.value.reason is Reason.SETTING


def test_an_optimizer_that_is_none_is_refused(seven: Costs) -> None:
    with pytest.raises(Rejected, match="adamw"):
        memory_of(seven, replace(JOB, optimizer="newton"), 1, checkpointing=True)
