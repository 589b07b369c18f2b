"""What a training run needs: memory by part, tokens a second, days, money; and what longer rows cost.

    Costs (sn29/lab/cost.py) + Job -> Memory of a device -> rows of a micro-batch -> tokens a second -> days

The time of a token is its operations over what the device does of them:

    (6 x weights x 4/3 + 12 x width x row x 5/3) x (1 + 1,000 / tokens of a micro-batch) / (utilisation x peak)
                   ~~~                       ~~~    where activations are computed again: another forward pass, and in flash
                                             attention's backward pass the scores once more
                                                 where weights are sharded: they are brought together for each micro-batch

Attention counts full square, though causal kernels leave half of it out: they run at about half the rate of large matrix
products. Against 81 published rows of 8 model sizes and two kinds of GPU (`published.ROWS`), speeds relative to each size's
shortest row are 10.7 % off on average (A100: 8.4 %, H100: 14.3 %; worst 43 %); with half the square, 31.2 %. The factors of
computing again are those of that table's own page; 1,000 tokens are fitted to these rows: without them it is 9.3 and 15.3 %.
39 rows that nothing was fitted on, of the A100 with 40 GB: 4.7 %, worst 22 %. On the H100 30 of 31 planned speeds are too
high, by 20 % for rows of 8,192 and more: the price of long rows is understated there. `sn29 lab plan --published` has every row.

The network between devices is in none of it but as far as the published rows had it: 8 devices of one machine.

Bytes are those of `sn29 train`, whose hidden states between the layers are float32 under autocast. Of the 58 published rows
of the A100 with 80 GB (as GPT-NeoX of the same shapes) 14 find no room for their micro-batch; were their hidden states in
bfloat16, which that page does not say, 3 would, each by one row: so near is the ledger.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sn29.errors import Reason, Rejected
from sn29.lab.cost import Costs, config_of, costs_of
from sn29.lab.published import ROWS, Published, lengths_of, mpt_config, parameters_of
from sn29.training.devices import SHEETS
from sn29.training.objective import LOGITS_AT_ONCE, ROWS_AT_ONCE
from sn29.training.optimizers import KINDS, stated_bytes

GIB = 2**30
USABLE = 0.92
"""Of a device's memory: the rest is the driver's, the kernels' own, and gaps between tensors."""
AGAIN_DENSE, AGAIN_SCORES = 4 / 3, 5 / 3
GATHERING_TOKENS = 1000.0
ASSUMED_UTILISATION = 0.4
"""Where none was given, measured or published."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What it is trained on."""

    count: int
    name: str
    memory_bytes: float
    """Of each."""
    peak: float
    """Floating-point operations a second of each; 0: not known."""
    square: float = 1.0
    """Of attention's scores, what its kernels take the time of."""


@dataclass(frozen=True, slots=True)
class Job:
    """How it is trained."""

    row_tokens: int
    batch_tokens: int
    """Of a step, on all devices."""
    optimizer: str
    """A name of `optimizers.KINDS`."""
    dtype: str
    """One of `cost.DTYPES`; the `Costs` beside it are of the same."""
    devices: Devices
    rows: int = 0
    """Of a micro-batch, on each device; 0: as many as fit and as a step has."""
    checkpointing: bool | None = None
    """Activations are computed again; None: where it does not fit otherwise."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each device at the highest, by part."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    """Weights in the type of the products, or brought together from the other devices."""
    activations: float
    logits: float
    """Pieces of them, and what stands between the layers and the head: the whole would be rows x tokens x vocabulary."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes out of a job."""

    row_tokens: int
    rows: int
    checkpointing: bool
    memory: Memory
    fits: bool
    operations: float
    """Of a token, forward and backward, without anything done twice."""
    share: float
    """Of attention's scores in them, full square."""
    tokens_per_second: float
    """Of all devices; 0: their peak is not known."""
    mfu: float
    """Operations a second over the peak."""
    step_tokens: int
    """Of a step: as many micro-batches as --batch-tokens holds, one at least."""


def devices_of(text: str, dtype: str, peak_tflops: float = 0.0, here: Devices | None = None) -> Devices:
    """`8xH100`, `2xAda6000`, `2x48GB`, `here` for the one that was measured; one without a count.

    `peak_tflops` > 0: instead of the sheet's, which is of 16-bit products: there is none for float32. Raises Rejected(SETTING).
    """
    found = re.fullmatch(r"(?:(\d{1,6})\s*x\s*)?([\w.-]+)", text.strip(), re.IGNORECASE)
    count, name = (int(found[1] or 1), found[2].lower()) if found else (0, text)
    size = re.fullmatch(r"(\d{1,5}(?:\.\d+)?)gb", name)
    if name == "here" and here is not None and count:
        return replace(here, count=count, peak=1e12 * peak_tflops or here.peak)
    memory = float(size[1]) * GIB if size else SHEETS[name].memory_gib * GIB if name in SHEETS else 0.0
    peak = SHEETS[name].peak if name in SHEETS and dtype != "float32" else 0.0
    if not count or not memory:
        limit = f"COUNTxNAME, COUNTxMEMORY as 2x48GB, here beside --measure; names: {', '.join(SHEETS)}"
        raise Rejected(Reason.SETTING, text, limit, "--devices")
    return Devices(count, name, memory, 1e12 * peak_tflops or peak)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_of(costs: Costs, job: Job, rows: int, *, checkpointing: bool) -> Memory:
    """Of each device, weights, gradients and optimizer sharded over all of them (FSDP); `rows` of a micro-batch on each.

    float32 and mixed: 4 bytes a weight, 4 a gradient; bfloat16: 2 and 2, with the optimizer's state as it is in float32 (16-bit
    states would be half of it, and lose small updates). Raises Rejected(SETTING) for an optimizer that is none.
    """
    count, parameters, tokens = job.devices.count, costs.parameters, rows * job.row_tokens
    each, product = (2 if job.dtype == "bfloat16" else 4), (4 if job.dtype == "float32" else 2)
    tables = parameters.embedding + parameters.head + parameters.other
    if count > 1:  # this layer and the next one, this one's gradient; what is outside of layers, with a float32 gradient
        copies = 3.0 * costs.largest_layer * product + tables * (each + 4.0)
    else:
        copies = float(costs.weights.total * product) if job.dtype == "mixed" else 0.0
    kept = rows * costs.kept.of(job.row_tokens)
    if checkpointing:
        kept = costs.layers * tokens * costs.hidden * each + rows * costs.kept_layer.of(job.row_tokens)
    pieces = min(tokens, max(ROWS_AT_ONCE, LOGITS_AT_ONCE["cuda"] // costs.vocabulary)) * costs.vocabulary
    return Memory(
        weights=parameters.total * each / count,
        gradients=parameters.total * each / count,
        optimizer=stated_bytes(job.optimizer, costs.shapes) / count,
        copies=copies,
        activations=kept,
        logits=2 * 4.0 * pieces + 2.0 * tokens * costs.hidden * each,
    )


def fits(memory: Memory, devices: Devices) -> bool:
    return memory.total <= USABLE * devices.memory_bytes


def rows_of(costs: Costs, job: Job) -> tuple[int, bool]:
    """(rows of a micro-batch on each device, whether activations are computed again): as the job says, else the fastest that fit.

    Never more rows than a device's share of a step. Where not one row fits: (1, True), or what the job says.
    """
    found = []
    for again in (False, True) if job.checkpointing is None else (job.checkpointing,):
        rows = _most(costs, job, again)
        if rows:
            found.append((_work(costs, job, rows, again), rows, again))
    if not found:
        return job.rows or 1, job.checkpointing is not False
    _, rows, again = min(found)
    return rows, again


def _most(costs: Costs, job: Job, again: bool) -> int:
    """Rows that fit; 0 for none."""

    def fit(rows: int) -> bool:
        return fits(memory_of(costs, job, rows, checkpointing=again), job.devices)

    if job.rows:
        return job.rows if fit(job.rows) else 0
    low, high = 0, max(1, job.batch_tokens // (job.row_tokens * job.devices.count))  # `low` rows fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle) else (low, middle - 1)
    return low


# --- time -------------------------------------------------------------------------------------------------------------


def work(
    costs: Costs, row_tokens: int, rows: int, *, checkpointing: bool, sharded: bool, gathering: float = GATHERING_TOKENS,
    square: float = 1.0,
) -> float:  # fmt: skip
    """Operations of a token as the time has them: what is done twice, and what bringing weights together costs."""
    each = costs.operations(row_tokens)
    scores = square * each.scores
    done = each.dense * (AGAIN_DENSE if checkpointing else 1) + scores * (AGAIN_SCORES if checkpointing else 1)
    return done * (1 + gathering / (rows * row_tokens) if sharded else 1)


def _work(costs: Costs, job: Job, rows: int, again: bool) -> float:
    many = job.devices.count > 1
    return work(costs, job.row_tokens, rows, checkpointing=again, sharded=many, square=job.devices.square)


def plan(costs: Costs, job: Job, utilisation: float) -> Plan:
    """`utilisation`: share of the peak at which the operations of `work` run. Raises Rejected(SETTING)."""
    rows, again = rows_of(costs, job)
    memory = memory_of(costs, job, rows, checkpointing=again)
    each, devices = costs.operations(job.row_tokens), job.devices
    done = _work(costs, job, rows, again)
    speed = utilisation * devices.peak * devices.count / done
    mfu = speed * each.total / (devices.peak * devices.count) if devices.peak else 0.0
    micro = rows * job.row_tokens * devices.count
    step = micro * max(1, job.batch_tokens // micro)
    return Plan(job.row_tokens, rows, again, memory, fits(memory, devices), each.total, each.share, speed, mfu, step)


def sweep(costs: Costs, job: Job, lengths: Sequence[int], utilisation: float) -> list[Plan]:
    """The job with rows of other lengths, as many tokens a step."""
    return [plan(costs, replace(job, row_tokens=length), utilisation) for length in lengths]


def utilisation_from(costs: Costs, job: Job, mfu: float) -> float:
    """The `utilisation` at which this job reaches this MFU: of the peak, in operations that are done once."""
    rows, again = rows_of(costs, job)
    done = _work(costs, job, rows, again)
    return mfu * done / costs.operations(job.row_tokens).total


def optimizers_that_fit(costs: Costs, job: Job) -> list[tuple[str, Memory, bool]]:
    """(name, memory with the job's rows, or one, and activations computed again; whether it fits), for each of `KINDS`."""
    found = []
    for name in KINDS:
        memory = memory_of(costs, replace(job, optimizer=name), job.rows or 1, checkpointing=job.checkpointing is not False)
        found.append((name, memory, fits(memory, job.devices)))
    return found


# --- what others measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """A published row: speed relative to that of the same model's shortest row."""

    row: Published
    measured: float
    planned: float

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


def against_published(device: str, gathering: float = GATHERING_TOKENS) -> list[Compared]:
    """The rows of one device; of each model all but the shortest, which the others are relative to."""
    found = []
    for model in dict.fromkeys(row.model for row in ROWS if row.device == device):
        costs = _published_costs(model)
        first, *others = lengths_of(device, model)
        of_first = _published_work(costs, first, gathering)
        found += [
            Compared(row, row.tokens_per_second / first.tokens_per_second, of_first / _published_work(costs, row, gathering))
            for row in others
        ]
    return found


@functools.cache
def _published_costs(model: str) -> Costs:
    return costs_of(config_of(mpt_config(model)), "bfloat16")


def _published_work(costs: Costs, row: Published, gathering: float = GATHERING_TOKENS) -> float:
    return work(costs, row.row_tokens, row.rows, checkpointing=row.checkpointing, sharded=True, gathering=gathering)


def published_utilisation(device: str, parameters: int) -> float | None:
    """The median over the rows, all of 16-bit products, of the published model that is nearest in size; None without any."""
    models = sorted({row.model for row in ROWS if row.device == device})
    if not models:
        return None
    nearest = min(models, key=lambda model: abs(math.log(parameters_of(model) / parameters)))
    costs = _published_costs(nearest)
    found = [row.tokens_per_second * _published_work(costs, row) / SHEETS[device].peak for row in lengths_of(device, nearest)]
    return statistics.median(found)


def mean_error(compared: Sequence[Compared]) -> float:
    return statistics.fmean(abs(each.error) for each in compared)
