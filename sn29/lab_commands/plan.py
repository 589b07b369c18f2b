"""`sn29 lab plan`: what a training costs, by config alone; beside measured and published steps."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected
from sn29.lab_commands.inputs import config_bytes, new_table, say

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig

    from sn29.lab.cost import Costs
    from sn29.lab.plan import Compared, Devices, Job, Memory, Plan
    from sn29.lab.steps import Timed
    from sn29.lab_settings import LabPlanSettings

PUBLISHED_WITHIN = 0.15
"""Mean difference of the plan from published rows that is still right."""
_LONG, _BIAS = 8192, 0.1
"""Tokens of long rows, and the mean difference of theirs that is told."""
_TOKENS_A_PARAMETER = 20
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Planned:
    """All about one model."""

    name: str
    costs: Costs
    job: Job
    utilisation: float
    source: str
    """Of the utilisation: given, measured, published, assumed."""
    plan: Plan
    sweep: tuple[Plan, ...]
    optimizers: tuple[tuple[str, Memory, bool], ...]
    tokens: float
    """Of the training."""
    timed: Timed | None
    remarks: tuple[str, ...]
    """What is to be known beside the numbers."""

    def days(self, plan: Plan) -> float | None:
        """None where it does not fit, or the speed is not known."""
        is_known = plan.fits and plan.tokens_per_second
        return self.tokens / plan.tokens_per_second / _SECONDS_A_DAY if is_known else None


def plan(words: list[str]) -> int:
    """Exit 0; 1 where the plan is further than it says from what was measured, here or by others."""
    from sn29.lab_commands.inputs import check_place, write_picture
    from sn29.lab_settings import LabPlanSettings
    from sn29.settings import read

    for word in words:
        if re.fullmatch(r"\d+,\d+(?:e\d+|[KMBT])", word, re.IGNORECASE):
            raise Rejected(Reason.SETTING, word, f"{word.replace(',', '.')}: a point; several models with spaces", "MODEL")
    settings = read(LabPlanSettings, words)
    if settings.published:
        if settings.models or settings.picture is not None or settings.measure:
            got = "--published with MODEL, --picture or --measure"
            raise Rejected(Reason.SETTING, got, "on its own, or with --json", "--published")
        return _against_published(settings)
    if not settings.models:
        raise Rejected(Reason.SETTING, "no model", "a size as 6.9B, a config.json, a folder, or NAMESPACE/NAME@REVISION", "MODEL")
    _check(settings)
    if settings.picture is not None:
        check_place(settings.picture)
    found = [_planned(word, settings) for word in settings.models]
    if settings.picture is not None:
        write_picture(settings.picture, _picture(found))
    if settings.json_output:
        print(json.dumps([_as_json(each, settings) for each in found], indent=1, allow_nan=False))
    else:
        _show(found, settings)
    return 0 if all(each.timed is None or each.timed.is_within for each in found) else 1


def _check(settings: LabPlanSettings) -> None:
    """Raises Rejected(SETTING)."""
    from sn29.training.optimizers import KINDS

    if settings.optimizer not in KINDS:
        raise Rejected(Reason.SETTING, settings.optimizer, ", ".join(KINDS), "--optimizer")
    if settings.mfu and settings.measure:
        raise Rejected(Reason.SETTING, "--mfu beside --measure", "one of them", "--mfu")
    if settings.devices.lower().endswith("here") and not settings.measure:
        raise Rejected(Reason.SETTING, settings.devices, "--measure cpu or cuda beside it", "--devices")
    for flag, values in (("--lengths", settings.lengths), ("--measure-lengths", settings.measure_lengths or (1,))):
        if not values or min(values) < 1 or list(values) != sorted(set(values)):
            raise Rejected(Reason.SETTING, ",".join(map(str, values)) or "none", "numbers from 1 on, each above the last", flag)


# --- models -----------------------------------------------------------------------------------------------------------


def _config(word: str, settings: LabPlanSettings) -> tuple[str, PreTrainedConfig]:
    """(name, config). Raises Rejected(SETTING | BAD_CONFIG), what the Hub says no with, Unavailable."""
    from sn29.lab.cost import config_for, config_of
    from sn29.models.config import strict_json

    size = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", word, re.IGNORECASE)
    if size:
        parameters = float(size[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[size[2].upper()]
        return word, config_of(config_for(parameters, family=settings.family, vocabulary=settings.vocabulary))
    limit = "a size as 6.9B, a config.json or a folder that exists, or NAMESPACE/NAME@REVISION"
    data, name = config_bytes(word, settings.hub_endpoint, limit)
    return name, config_of(strict_json(data, Reason.BAD_CONFIG, f"{name}: config.json"))


def _planned(word: str, settings: LabPlanSettings) -> Planned:
    """Raises Rejected, Unavailable."""
    from sn29.lab import plan as plans
    from sn29.lab.cost import costs_of
    from sn29.lab.published import GPUS

    name, config = _config(word, settings)
    costs = costs_of(config, settings.dtype)
    remarks = _places(name, costs, settings)
    timed = _timed(config, settings) if settings.measure else None
    again = {"auto": None, "on": True, "off": False}[settings.checkpointing]
    devices = plans.devices_of(settings.devices, settings.dtype, settings.peak_tflops, _here(timed, settings))
    job = plans.Job(
        settings.row_tokens, settings.batch_tokens, settings.optimizer, settings.dtype, devices, settings.rows, again
    )  # fmt: skip
    utilisation, source = _utilisation(costs, job, settings, timed)
    if timed is not None and not source.endswith(_MEASURED):
        remarks += (f"what was measured on {timed.device} is not used: --devices is {settings.devices}; here is what it is of",)
    if devices.count > GPUS:
        remarks += (f"the network between machines is not planned: as between {GPUS} devices of one",)
    return Planned(
        name, costs, job, utilisation, source, plans.plan(costs, job, utilisation),
        tuple(plans.sweep(costs, job, settings.lengths, utilisation)), tuple(plans.optimizers_that_fit(costs, job)),
        settings.tokens or _TOKENS_A_PARAMETER * costs.parameters.total, timed, remarks,
    )  # fmt: skip


def _places(name: str, costs: Costs, settings: LabPlanSettings) -> tuple[str, ...]:
    """A warning for rows that a model with rotary positions is not made for. Raises Rejected(SETTING) for learned ones."""
    asked = {"--row-tokens": settings.row_tokens, "--lengths": settings.lengths[-1]}
    if settings.measure_lengths:
        asked["--measure-lengths"] = settings.measure_lengths[-1]
    beyond = {flag: tokens for flag, tokens in asked.items() if 0 < costs.places < tokens}
    if beyond and costs.positions == "learned":
        flag, tokens = next(iter(beyond.items()))
        raise Rejected(Reason.SETTING, f"rows of {tokens:,} tokens", f"the {costs.places:,} places that {name} has learned", flag)
    return (f"warning: {name} is made for rows of {costs.places:,} tokens at most",) if beyond else ()


def _here(timed: Timed | None, settings: LabPlanSettings) -> Devices | None:
    """The device that was measured."""
    from sn29.lab.plan import Devices
    from sn29.lab.steps import SQUARE

    if timed is None:
        return None
    return Devices(1, "here", timed.memory_bytes, timed.matrix_rate, SQUARE[settings.measure])


_MEASURED = "measured here"


def _utilisation(costs: Costs, job: Job, settings: LabPlanSettings, timed: Timed | None) -> tuple[float, str]:
    """(share of the peak in operations of `plan.work`, where it is from)."""
    from sn29.lab import plan as plans
    from sn29.training.devices import sheet_name

    if settings.mfu:
        return plans.utilisation_from(costs, job, settings.mfu), f"MFU {settings.mfu:.0%} as given"
    if timed is not None and job.devices.name in ("here", sheet_name(timed.device)) and job.devices.peak:
        nearest = min(timed.steps, key=lambda step: abs(step.row_tokens - job.row_tokens))
        rate = nearest.utilisation * timed.matrix_rate
        return rate / job.devices.peak, f"{nearest.utilisation:.0%} of matrix products' rate, {_MEASURED}"
    found = plans.published_utilisation(job.devices.name, costs.parameters.total) if job.dtype != "float32" else None
    if found is not None:
        return found, f"{found:.0%} of the peak, as published for {job.devices.name}"
    return plans.ASSUMED_UTILISATION, f"{plans.ASSUMED_UTILISATION:.0%} of the peak, assumed: --mfu or --measure"


def _timed(config: PreTrainedConfig, settings: LabPlanSettings) -> Timed:
    import torch

    from sn29.lab.steps import measure
    from sn29.lab_commands.inputs import progress

    torch.set_num_threads(settings.threads)
    with progress("training steps") as report:
        return measure(
            config, settings.measure_lengths, tokens=settings.measure_tokens, layers=settings.measure_layers,
            optimizer=settings.optimizer, dtype=settings.dtype, checkpointing=settings.checkpointing == "on",
            device=settings.measure, times=settings.times, report=report,
        )  # fmt: skip


# --- what is shown ----------------------------------------------------------------------------------------------------


def _show(found: Sequence[Planned], settings: LabPlanSettings) -> None:
    from rich.console import Console

    console = Console()
    if len(found) == 1:
        (each,) = found
        say(console, _head(each))
        console.print("", _parts(each), "", _memory(each), "")
        say(console, *_verdict(each, settings))
        console.print("", _optimizers(each), "", _sweep(each, settings), "")
    else:
        say(console, *map(_head, found))
        console.print("", _side_by_side(found), "")
    for each in found:
        if each.timed is not None:
            console.print(_steps(each.timed), "")
            say(console, *_claim(each.timed))
        say(console, *each.remarks)
    if settings.picture is not None:
        say(console, f"The picture: {settings.picture}")


def _head(each: Planned) -> str:
    c = each.costs
    tied = "a tied head" if c.is_tied else "a head of its own"
    return (
        f"{each.name}: {c.family}, {c.layers} layers of {c.hidden:,}, positions {c.positions}, {c.activation}, "
        f"{c.vocabulary:,} tokens and {tied}: {c.parameters.total:,} parameters"
    )


def _parts(each: Planned) -> Table:
    p, o = each.costs.parameters, each.costs.operations(each.job.row_tokens)
    table = new_table("", "parameters", "share", f"MFLOP a token, rows of {each.job.row_tokens:,}", "share")
    rows: list[tuple[str, int | None, float | None]] = [
        ("embedding", p.embedding, 0.0), ("head", p.head, o.head), ("attention, projections", p.attention, o.projections),
        ("attention, scores", None, o.scores), ("MLP", p.mlp, o.mlp), ("norms", p.norms, None),
        *([("between embedding and layers", p.other, o.other)] if p.other else []), ("all", p.total, o.total),
    ]  # fmt: skip
    for name, count, operations in rows:
        table.add_row(
            name, "" if count is None else f"{count:,}", "" if count is None else f"{count / p.total:.1%}",
            "" if operations is None else f"{operations / 1e6:,.1f}", "" if operations is None else f"{operations / o.total:.1%}",
        )  # fmt: skip
    return table


def _memory(each: Planned) -> Table:
    m, devices = each.plan.memory, each.job.devices
    table = new_table(f"GB on each of {devices.count} {devices.name}", each.job.dtype)
    for name in ("weights", "gradients", "optimizer", "copies", "activations", "logits", "total"):
        table.add_row({"optimizer": f"state of {each.job.optimizer}"}.get(name, name), f"{getattr(m, name) / 1e9:,.2f}")
    return table


def _verdict(each: Planned, settings: LabPlanSettings) -> list[str]:
    from sn29.lab.plan import USABLE

    p, devices = each.plan, each.job.devices
    room = f"{USABLE * devices.memory_bytes / 1e9:.1f} GB: {USABLE:.0%} of the {devices.memory_bytes / 2**30:g} GiB of a device"
    rows = f"micro-batches of {p.rows} {'row' if p.rows == 1 else 'rows'}"
    again = ", activations computed again" if p.checkpointing else ""
    said = [f"{'fits' if p.fits else 'DOES NOT FIT'} ({room}): {rows}{again}"]
    if not p.fits:
        others = ", ".join(name for name, _, fits in each.optimizers if fits)
        return [*said, f"of the optimizers {others or 'none'} would fit, at one row" if not each.job.rows else ""]
    if p.step_tokens > each.job.batch_tokens:
        said.append(f"a step has {p.step_tokens:,} tokens: more than the {each.job.batch_tokens:,} of --batch-tokens")
    days = each.days(p)
    if days is None:
        return [
            *said,
            f"the peak of {devices.name} in {each.job.dtype} is not known: --peak-tflops gives it, for tokens a second and days",
        ]
    money = f", {_money(each, p, settings):,.0f} at {settings.price:g} a device and hour" if settings.price else ""
    said.append(f"{p.tokens_per_second:,.0f} tokens/s, MFU {p.mfu:.1%} ({each.source})")
    return [*said, f"{each.tokens:,.0f} tokens: {days:,.1f} days{money}"]


def _money(each: Planned, plan: Plan, settings: LabPlanSettings) -> float:
    return (each.days(plan) or 0.0) * 24 * each.job.devices.count * settings.price


def _optimizers(each: Planned) -> Table:
    from sn29.training.optimizers import KINDS

    again = "activations computed again" if each.job.checkpointing is not False else "activations kept"
    table = new_table(
        "optimizer", "state, bytes a parameter", f"GB a device, micro-batch {each.job.rows or 1}, {again}", "fits", ""
    )
    for name, memory, fits in each.optimizers:
        state = memory.optimizer * each.job.devices.count / each.costs.parameters.total
        alone = "" if KINDS[name].is_sharded or each.job.devices.count == 1 else "sn29 train does not shard it"
        table.add_row(name, f"{state:.2f}", f"{memory.total / 1e9:,.1f}", "yes" if fits else "no", alone)
    return table


def _sweep(each: Planned, settings: LabPlanSettings) -> Table:
    money = ["cost"] if settings.price else []
    table = new_table("tokens of a row", "scores' share", "rows", "again", "GB", "tokens/s", "beside the first", "days", *money)
    first = next((p.tokens_per_second for p in each.sweep if p.fits), 0.0)
    for p in each.sweep:
        days = each.days(p)
        beside = f"{p.tokens_per_second / first - 1:+.0%}" if days else ""
        table.add_row(
            f"{p.row_tokens:,}", f"{p.share:.1%}", f"{p.rows}{' > step' if p.step_tokens > each.job.batch_tokens else ''}",
            "yes" if p.checkpointing else "no",
            f"{p.memory.total / 1e9:,.1f}{'' if p.fits else ' no room'}", f"{p.tokens_per_second:,.0f}" if days else "",
            beside, f"{days:,.1f}" if days else "", *([f"{_money(each, p, settings):,.0f}"] if money else []),
        )  # fmt: skip
    return table


def _side_by_side(found: Sequence[Planned]) -> Table:
    """Operations of a token for each model and length, beside the first length's: the kernels' efficiency is the same."""
    table = new_table("tokens of a row", *(f"{each.name}: speed, scores' share" for each in found))
    for number, plan in enumerate(found[0].sweep):
        cells = [f"{_slower(each)[number]:+.0%}, {each.sweep[number].share:.0%}" for each in found]
        table.add_row(f"{plan.row_tokens:,}", *cells)
    return table


def _slower(each: Planned) -> list[float]:
    """Speed at each length beside the first, all else as large as it is there: micro-batches and what is computed again."""
    from sn29.lab.plan import work

    sizes = [work(each.costs, p.row_tokens, 1, checkpointing=False, sharded=False) for p in each.sweep]
    return [sizes[0] / size - 1 for size in sizes]


def _steps(timed: Timed) -> Table:
    table = new_table(
        f"{timed.layers} layers, {timed.parameters / 1e6:,.1f}M", "rows", "s", "optimizer s", "of matrix products", "MFU",
        "a token, beside the first", "planned", "off, of the increase",
    )  # fmt: skip
    for step, error in zip(timed.steps, timed.errors, strict=True):
        table.add_row(
            f"{step.row_tokens:,}", f"{step.rows}", f"{step.seconds:.3f}", f"{step.optimizer_seconds:.3f}",
            f"{step.utilisation:.0%}", f"{step.mfu:.0%}", f"{step.relative:.2f}", f"{step.planned:.2f}", f"{error:+.0%}",
        )  # fmt: skip
    return table


def _claim(timed: Timed) -> list[str]:
    from sn29.lab.steps import WITHIN, WITHIN_BYTES

    verdict, most = "pass" if timed.is_within else "MISS", WITHIN["cuda" if timed.peak_bytes else "cpu"]
    flat = 1 - 1 / timed.steps[-1].relative
    memory = "not measurable on a CPU"
    if timed.peak_bytes:
        memory = f"{timed.peak_bytes / 1e9:.2f} GB, planned {timed.planned_bytes / 1e9:.2f}, {timed.bytes_error:+.0%}"
        memory = f"{memory}, goal within {WITHIN_BYTES:.0%}"
    return [
        f"{verdict}  what longer rows add to the time of a token: {timed.worst:.0%} off at worst, goal within {most:.0%}; a plan "
        f"without attention: 100% ({flat:.0%} of the time)",
        f"memory {memory}; matrix products at {timed.matrix_rate / 1e9:,.0f} GFLOP/s; the speed itself is measured, not planned",
    ]


def _picture(found: Sequence[Planned]) -> str:
    from sn29.report import pictures

    lengths = [plan.row_tokens for plan in found[0].sweep]
    lines = [pictures.Line(each.name, n, lengths, [100 * x for x in _slower(each)]) for n, each in enumerate(found)]
    alt = f"Speed of training against tokens of a row, beside rows of {lengths[0]:,}: {', '.join(each.name for each in found)}"
    what = "tokens a second, %"
    return pictures.standalone(pictures.above(lines, "tokens of a row", what, alt, doubling=True))


def _as_json(each: Planned, settings: LabPlanSettings) -> dict[str, Any]:
    costs = each.costs
    operations = costs.operations(each.job.row_tokens)
    about = {key: value for key, value in asdict(replace(costs, shapes={})).items() if key != "shapes"}

    def told(plan: Plan) -> dict[str, Any]:
        days = each.days(plan)
        money = _money(each, plan, settings) if settings.price and days else None
        return {**asdict(plan), "memory_total": plan.memory.total, "days": days, "cost": money}

    slower: Callable[[int], float] = _slower(each).__getitem__
    return {
        "name": each.name, "costs": about, "parameters": costs.parameters.total,
        "operations": {**asdict(operations), "total": operations.total, "share_of_scores": operations.share},
        "job": asdict(each.job), "utilisation": each.utilisation, "utilisation_source": each.source, "tokens": each.tokens,
        "plan": told(each.plan),
        "sweep": [{**told(plan), "slower": slower(number)} for number, plan in enumerate(each.sweep)],
        "optimizers": [
            {"name": name, "memory": asdict(memory), "total": memory.total, "fits": fits}
            for name, memory, fits in each.optimizers
        ],
        "measured": each.timed and {**asdict(each.timed), "errors": each.timed.errors, "worst": each.timed.worst},
        "remarks": each.remarks,
    }  # fmt: skip


# --- beside what others published -------------------------------------------------------------------------------------


def _against_published(settings: LabPlanSettings) -> int:
    """Exit 0 where the mean difference is within PUBLISHED_WITHIN for each kind of device."""
    from sn29.lab.plan import against_published, mean_error
    from sn29.lab.published import HELD_OUT, ROWS

    found = {device: against_published(device) for device in dict.fromkeys(row.device for row in ROWS)}
    errors = {device: mean_error(rows) for device, rows in found.items()}
    unfitted = {device: mean_error(against_published(device, 0.0)) for device in found}
    if settings.json_output:
        rows = [{**asdict(each), "error": each.error} for rows in found.values() for each in rows]
        told = {"mean_error": errors, "mean_error_without_fit": unfitted, "held_out": HELD_OUT, "rows": rows}
        print(json.dumps(told, indent=1, allow_nan=False))
    else:
        _show_published(found, unfitted)
    return 0 if max(errors.values()) <= PUBLISHED_WITHIN else 1


def _show_published(found: dict[str, list[Compared]], unfitted: dict[str, float]) -> None:
    from rich.console import Console

    from sn29.lab.published import SOURCE

    console = Console()
    table = new_table("speed beside the shortest row", "tokens of a row", "micro-batch", "again", "measured", "planned", "off")
    before = ""
    for device, rows in found.items():
        for each in rows:
            row, name = each.row, f"{device} {each.row.model}"
            table.add_row(
                name if name != before else "", f"{row.row_tokens:,}", f"{row.rows}", "yes" if row.checkpointing else "no",
                f"{each.measured - 1:+.0%}", f"{each.planned - 1:+.0%}", f"{each.error:+.0%}",
            )  # fmt: skip
            before = name
    console.print(table, "")
    for device, rows in found.items():
        say(console, *_published_verdict(device, rows, unfitted[device]))
    say(console, f"Source: {SOURCE}")


def _published_verdict(device: str, rows: Sequence[Compared], unfitted: float) -> list[str]:
    from sn29.lab.plan import GATHERING_TOKENS, mean_error
    from sn29.lab.published import HELD_OUT

    error, worst = mean_error(rows), max((each.error for each in rows), key=abs)
    verdict = "pass" if error <= PUBLISHED_WITHIN else "MISS"
    fitted = (
        f"the {GATHERING_TOKENS:,.0f} tokens of bringing weights together are fitted on these rows; without it {unfitted:.1%}"
    )
    said = [
        f"{verdict}  {device}: {error:.1%} off on average of {len(rows)} rows, goal at most {PUBLISHED_WITHIN:.0%}; "
        f"worst {worst:+.0%}; "
        f"{'nothing is fitted on these rows' if device == HELD_OUT else fitted}"
    ]
    long = [each.error for each in rows if each.row.row_tokens >= _LONG]
    high, bias = sum(each.error > 0 for each in rows), statistics.fmean(long)
    if abs(bias) > _BIAS:
        price = "understated" if bias > 0 else "overstated"
        said.append(
            f"      {high} of {len(rows)} planned speeds are too high; rows of {_LONG:,} and more by {bias:+.0%} on average: "
            f"the price of long rows is {price}"
        )
    return said
