"""Attacks on the scoring rules, played with fixed seeds: who would be paid, day by day, under each rule.

    scenes (who commits what, and when) -> losses of every window -> rules.scoring.score -> shares -> tables, goals, picture

The world is a plain one, stated whole so that its figures can be judged. A window has `samples` new texts of lognormal
length (median 600 tokens, sigma 0.8, at most 4096) at 2.35 nats a token. A model's loss on a text is its parent's times
exp(shift + sd * z), with z a standard normal number of its own for each text: a copy shares all of the original's ups and
downs and adds its own, and `shift` is the true mean of the log ratio. What is left out: texts that are alike, pools,
downloads, the moving average of the weights.

Window k of run r draws its numbers from numpy's Generator seeded with (seed, crc32 of the scene's name, r, k), so that
every rule sees the same worlds and no figure depends on the number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from sn29.errors import Reason, Rejected
from sn29.records import Entry
from sn29.rules.competition import Competition
from sn29.rules.scoring import Memory, score
from sn29.rules.scoring_fields import Champion, OldestHolder, PairwiseEpsilon

BLOCKS_PER_DAY = 7200
WINDOW_BLOCKS = 360
WINDOWS_PER_DAY = BLOCKS_PER_DAY // WINDOW_BLOCKS
START_BLOCK = 5_000_000
"""Day 0."""
NATS_PER_TOKEN = 2.35
COPIES = "copies", "renewed copies"
"""Kinds of scenes to which the goal for copies applies."""
MAX_COPY_SHARE = 0.01
VALIDATORS = 5
EVALUATION_NOISE = 1e-3
"""Relative, per sample, model and validator: ten times what another batch size changes in bfloat16."""
HONEST_SD = 0.015
"""Standard deviation of the log ratio between a model and one that was trained on from it; measured: 0.1 to 1.6 %."""
APART_SD = 0.03
"""The same between models that were trained apart; measured: 3 % and more."""

Numbers = NDArray[np.float64]
_RULES = {"oldest_holder": OldestHolder, "pairwise_epsilon": PairwiseEpsilon, "champion": Champion}


# ---- scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """How a model's losses arise."""

    shift: float = 0.0
    """Mean of log(loss / loss of the parent); negative is better."""
    sd: float = HONEST_SD
    """Standard deviation of the same over texts."""
    parent: int | None = 0
    """Place of the parent in the scene; None: the texts' own nats."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A commitment: from `day` on (may lie before day 0) the hotkey stands for this model and for no other."""

    hotkey: str
    day: float
    model: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One play. The weight of the `watched` hotkeys is counted."""

    name: str
    kind: str
    """`copies`, `renewed copies`, `worse`, `improvement`, `spoilers`, `sandbagging`, `re-commitment` or `agreement`."""
    models: tuple[Model, ...]
    """The first one is the original, which everybody starts from."""
    claims: tuple[Claim, ...]
    watched: frozenset[str]
    race: bool = False
    """Ends when the watched ones have more than half of the weight; counted is the time until then."""


def scenes(days: int) -> tuple[Scene, ...]:
    """All that is played; `days` is the length of those that renew something every day."""
    return (*_copies(days), *_worse(), *_improvements(), *_spoilers(), *_sandbagging(), *_recommitments(days), _agreement(days))


def _rivals(
    name: str, kind: str, age: float, rivals: Sequence[Model], claims: Sequence[Claim] | None = None, race: bool = False
) -> Scene:
    """An original that is `age` days old at day 0, when the rivals commit."""
    given = claims or [Claim(f"rival{n}", 0.0, n + 1) for n in range(len(rivals))]
    watched = frozenset(claim.hotkey for claim in given if claim.hotkey.startswith("rival"))
    return Scene(name, kind, (Model(parent=None), *rivals), (Claim("original", -age - 0.01, 0), *given), watched, race)


def _copies(days: int) -> Iterator[Scene]:
    same_content = [Claim(f"rival{n}", 0.0, 0) for n in range(6)]
    yield _rivals("6 copies, same content", "copies", 0, [], same_content)
    yield _rivals("6 copies, permuted (sd 1e-7)", "copies", 0, [Model(sd=1e-7)] * 6)
    for sd in (0.0001, 0.001, 0.01, 0.02):
        for count in (1, 6):
            yield _rivals(f"{count} cop{'y' if count == 1 else 'ies'}, sd {sd:.2%}", "copies", 0, [Model(sd=sd)] * count)
    for sd in (0.0001, 0.001, 0.01, 0.02):
        yield _rivals(f"6 copies, sd {sd:.2%}, 60 d old", "copies", 60, [Model(sd=sd)] * 6)
    daily = [Claim(f"rival{n}", float(day), 1 + 6 * day + n) for day in range(days) for n in range(6)]
    fresh = [Model(sd=0.01)] * (6 * days)
    yield _rivals("6 new copies daily, sd 1.00%, 60 d old", "renewed copies", 60, fresh, daily)


def _worse() -> Iterator[Scene]:
    for shift in (0.001, 0.002, 0.004):
        yield _rivals(f"6 models {shift:.1%} worse, sd 2%", "worse", 7, [Model(shift=shift, sd=0.02)] * 6)


def _improvements() -> Iterator[Scene]:
    for age in (0, 7, 30):
        for gain in (0.0015, 0.003, 0.006, 0.01):
            yield improvement(gain, age, HONEST_SD)
    yield improvement(0.003, 30, APART_SD)


def improvement(gain: float, age: float, sd: float) -> Scene:
    """One honest challenger, better by `gain` in the mean, of an original that is `age` days old."""
    apart = ", trained apart (sd 3%)" if sd == APART_SD else ""
    return _rivals(f"{gain:.2%} better than {age:g} d old{apart}", "improvement", age, [Model(-gain, sd)], race=True)


def _spoilers() -> Iterator[Scene]:
    """Copies whose only use is to lower or to delay somebody else, here `rival`."""
    for gain, count, sd in ((0.003, 6, 0.001), (0.003, 6, 0.02), (0.0015, 60, 0.02)):
        spoiled = [Claim("rival", 0.0, 1), *(Claim(f"spoiler{n}", -1.0, 2 + n) for n in range(count))]
        models = [Model(-gain), *[Model(sd=sd)] * count]
        name = f"{gain:.2%} better than 30 d old, {count} spoilers sd {sd:.1%}"
        yield _rivals(name, "spoilers", 30, models, spoiled, race=True)
    second = [Claim("rival", -5.0, 1)]
    yield _rivals("runner-up 0.20% behind", "spoilers", 30, [Model(0.002)], second)
    against = [*second, *(Claim(f"spoiler{n}", 0.0, 2 + n) for n in range(6))]
    yield _rivals("runner-up 0.20% behind, 6 spoilers sd 0.1%", "spoilers", 30, [Model(0.002), *[Model(sd=0.001)] * 6], against)


def _sandbagging() -> Iterator[Scene]:
    """Somebody has a model that is 0.6 % better; another miner comes with 0.4 % on day 7. Does holding back pay?"""
    models = [Model(-0.003), Model(-0.003, 0.005, parent=1), Model(-0.004)]
    other = Claim("another", 7.0, 3)
    yield _rivals("0.6% better, published at once", "sandbagging", 30, models, [Claim("rival", 0.0, 2), other])
    held = [Claim("rival", 0.0, 1), Claim("rival", 8.0, 2), other]
    yield _rivals("0.3% at once, 0.6% on day 8", "sandbagging", 30, models, held)
    keys = [Claim("rival0", 0.0, 1), Claim("rival1", 8.0, 2), other]
    yield _rivals("0.3% at once, 0.6% on day 8, two hotkeys", "sandbagging", 30, models, keys)


def _recommitments(days: int) -> Iterator[Scene]:
    again = [Claim("original", float(day), 0) for day in range(days)]
    for gain in (0.0015, 0.003):
        name = f"{gain:.2%} better than 30 d old, re-committed daily"
        yield _rivals(name, "re-commitment", 30, [Model(-gain)], [Claim("rival", 0.0, 1), *again], race=True)
    disguised = [Claim("original", float(day), 2 + day) for day in range(days)]
    models = [Model(-0.003), *[Model(sd=0.0005)] * days]
    name = "0.30% better than 30 d old, a new near copy daily"
    yield _rivals(name, "re-commitment", 30, models, [Claim("rival", 0.0, 1), *disguised], race=True)
    copies = [*(Claim(f"rival{n}", 0.0, 1 + n) for n in range(6)), Claim("original", 1.0, 0)]
    for sd in (1e-7, 0.001):
        name = f"re-committed on day 1, 6 copies sd {sd:.0e}"
        yield _rivals(name, "re-commitment", 0, [Model(sd=sd)] * 6, copies)


def _agreement(days: int) -> Scene:
    """A model 0.3 % better every third day, each trained on from the last one, and copies of the first."""
    copies = [Model(sd=0.0001), Model(sd=0.001), Model(sd=0.01)]
    steps = max(1, math.ceil(days / 3))
    better = [Model(-0.003, parent=3 + n if n else 0) for n in range(steps)]
    claims = [Claim(f"copy{n}", -1.0, 1 + n) for n in range(3)] + [Claim(f"better{n}", 3.0 * n, 4 + n) for n in range(steps)]
    return _rivals("five validators", "agreement", 30, [*copies, *better], claims)


def chosen_rules(base: Competition, name: str) -> tuple[Competition, ...]:
    """`base` under the rule of this name, or under all of them: its own with the fields of its file, others with the
    defaults. Raises Rejected(SETTING) for an unknown name.
    """
    if name not in ("all", *_RULES):
        raise Rejected(Reason.SETTING, name, f"all or one of {', '.join(_RULES)}", "--rule")
    names = _RULES if name == "all" else (name,)
    scorings = [base.scoring if base.scoring.rule == each else _RULES[each]() for each in names]
    return tuple(base.model_copy(update={"scoring": scoring}) for scoring in scorings)


def chosen_scenes(attack: str, days: int) -> tuple[Scene, ...]:
    """Those of a kind, or with these words in their name. Raises Rejected(SETTING) when there is none."""
    found = tuple(s for s in scenes(days) if attack in ("all", s.kind))
    found = found or tuple(s for s in scenes(days) if attack in s.name)
    if not found:
        kinds = ", ".join(dict.fromkeys(s.kind for s in scenes(days)))
        raise Rejected(Reason.SETTING, attack, f"all, a part of a scene's name, or one of {kinds}", "--attack")
    return found


# ---- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it is played."""

    runs: int
    days: int
    samples: int
    """Texts of a window."""
    seed: int
    windows_per_day: int = WINDOWS_PER_DAY
    """Windows that are played of a rule that remembers, where no time is counted: a divisor of 20."""

    def __post_init__(self) -> None:
        for flag, value in (("runs", self.runs), ("days", self.days), ("samples", self.samples)):
            if value < 1:
                raise Rejected(Reason.SETTING, value, "at least 1", f"--{flag}")
        if self.windows_per_day < 1 or WINDOWS_PER_DAY % self.windows_per_day:
            raise Rejected(Reason.SETTING, self.windows_per_day, "1, 2, 4, 5, 10 or 20", "--windows-per-day")


@dataclass(frozen=True, slots=True)
class Run:
    """What happened in one run."""

    scene: str
    rule: str
    shares: tuple[float, ...]
    """Of the watched hotkeys, window by window; for agreement the mean vtrust of the validators."""
    days: tuple[float, ...]
    """When: one for each share."""
    won: float | None = None
    """Day of a race's end; None: not within the plan's days, or no race."""
    lowest: float = 1.0
    """Agreement: the lowest vtrust of one validator in one window."""


def play(competition: Competition, scene: Scene, plan: Plan, run: int) -> Run:
    """One run of a scene under the competition's rule. Window 0 is before everything: only who was there is scored."""
    validators = VALIDATORS if scene.kind == "agreement" else 1
    memories = [Memory.empty()] * validators
    shares: list[float] = []
    days: list[float] = []
    won, lowest = None, 1.0
    for window in _windows(competition, scene, plan):
        block = START_BLOCK + window * WINDOW_BLOCKS
        standing = _standing(scene, block)
        losses = _losses(scene, sorted({claim.model for claim in standing.values()}), plan, run, window)
        paid = []
        for validator in range(validators):
            seen = losses if validators == 1 else _with_noise(losses, scene, plan, run, window, validator)
            weights, memories[validator] = _scored(competition, standing, seen, block, plan, memories[validator])
            paid.append(weights)
        if window == 0:
            continue
        days.append(window / WINDOWS_PER_DAY)
        if validators > 1:
            trusts = vtrust(paid)
            shares.append(statistics.fmean(trusts))
            lowest = min(lowest, *trusts)
        else:
            shares.append(math.fsum(weight for hotkey, weight in paid[0].items() if hotkey in scene.watched))
        if scene.race and shares[-1] > 0.5:
            won = days[-1]
            break
    return Run(scene.name, competition.scoring.rule, tuple(shares), tuple(days), won, lowest)


def vtrust(paid: Sequence[Mapping[str, float]]) -> list[float]:
    """Per validator: the sum over hotkeys of the smaller of its weight and the median weight of all validators.

    What the chain calls vtrust when stakes are equal. Example: weights (1, 0), (1, 0), (0, 1) have the median (1, 0) and
    give 1, 1 and 0.
    """
    hotkeys = sorted({hotkey for weights in paid for hotkey in weights})
    median = {hotkey: statistics.median(weights.get(hotkey, 0.0) for weights in paid) for hotkey in hotkeys}
    return [math.fsum(min(weights.get(hotkey, 0.0), median[hotkey]) for hotkey in hotkeys) for weights in paid]


def _windows(competition: Competition, scene: Scene, plan: Plan) -> range:
    """A rule without memory judges every window alone: one a day says as much as twenty.

    Of one that remembers every window is played where the time of a change is what counts.
    """
    per_day = WINDOWS_PER_DAY if scene.race or scene.kind == "agreement" else plan.windows_per_day
    per_day = per_day if isinstance(competition.scoring, Champion) else 1
    return range(0, plan.days * WINDOWS_PER_DAY + 1, WINDOWS_PER_DAY // per_day)


def _standing(scene: Scene, block: int) -> dict[str, Claim]:
    """Each hotkey's newest claim from before the block. To commit to what one claims already changes nothing."""
    found: dict[str, Claim] = {}
    for claim in sorted(scene.claims, key=lambda claim: claim.day):
        if _block(claim) < block and (claim.hotkey not in found or claim.model != found[claim.hotkey].model):
            found[claim.hotkey] = claim
    return found


def _block(claim: Claim) -> int:
    return START_BLOCK + round(claim.day * BLOCKS_PER_DAY)


def _losses(scene: Scene, models: Sequence[int], plan: Plan, run: int, window: int) -> dict[int, Numbers]:
    """Nats of every text for each of the models."""
    numbers = _generator(scene, plan, run, window)
    tokens = np.minimum(600 * np.exp(0.8 * numbers.standard_normal(plan.samples)), 4096)
    log_nats: dict[int | None, Numbers] = {None: np.log(NATS_PER_TOKEN * tokens)}

    def add(place: int) -> None:
        model = scene.models[place]
        if place in log_nats:
            return
        if model.parent is not None:
            add(model.parent)
        log_nats[place] = log_nats[model.parent] + (model.shift + model.sd * numbers.standard_normal(plan.samples))

    for place in models:
        add(place)
    return {place: np.exp(log_nats[place]) for place in models}


def _with_noise(
    losses: Mapping[int, Numbers], scene: Scene, plan: Plan, run: int, window: int, validator: int
) -> dict[int, Numbers]:
    """As one validator measures them: the same content is measured once, each content with noise of its own."""
    numbers = _generator(scene, plan, run, window, validator + 1)
    return {p: row * (1 + EVALUATION_NOISE * numbers.standard_normal(len(row))) for p, row in losses.items()}


def _generator(scene: Scene, plan: Plan, *parts: int) -> np.random.Generator:
    return np.random.default_rng([plan.seed, zlib.crc32(scene.name.encode()), *parts])


def _scored(
    competition: Competition, standing: Mapping[str, Claim], losses: Mapping[int, Numbers], block: int, plan: Plan, memory: Memory
) -> tuple[dict[str, float], Memory]:
    rows = {hotkey: cast(Sequence[float], losses[claim.model]) for hotkey, claim in standing.items()}
    entries = {hotkey: Entry(_content(claim.model), _block(claim)) for hotkey, claim in standing.items()}
    seed = hashlib.sha256(f"{plan.seed}:{block}".encode()).digest()
    scored = score(competition, rows, entries, block, seed, memory)
    return {s.hotkey: s.weight for s in scored.scores}, scored.memory


def _content(model: int) -> str:
    return hashlib.sha256(f"model {model}".encode()).hexdigest()


# ---- many runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """A scene under a rule, over all runs. Shares are of the watched hotkeys; a mean of means over windows."""

    scene: str
    kind: str
    race: bool
    rule: str
    runs: int
    mean: float
    """Of all runs and windows; for agreement the mean vtrust."""
    worst: float
    """Largest mean share of one run; for agreement the lowest vtrust of one validator in one window."""
    below: float
    """Fraction of runs whose mean share is below `MAX_COPY_SHARE`."""
    daily: tuple[float, ...]
    """Mean share on day 1, 2, ...: the day's last window. In a race: fraction of runs won until then."""
    median_days: float | None = None
    """Of a race: days until half of the runs were won; None: fewer were."""
    most_days: float | None = None
    """The same for 95 % of the runs."""

    def won_by(self, day: float) -> float:
        """Fraction of a race's runs that were won until that day."""
        return self.daily[min(len(self.daily), int(day)) - 1]


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the verdict."""

    text: str
    got: str
    met: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that a simulation found."""

    plan: Plan
    summaries: tuple[Summary, ...]
    goals: tuple[Goal, ...]


def simulate(
    competitions: Sequence[Competition],
    chosen: Sequence[Scene],
    plan: Plan,
    workers: int,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Every scene under the rule of every competition. `advance` is told after each piece how much is done."""
    pieces = [(c, s, plan, run) for s in chosen for c in competitions for run in range(runs_of(c, s, plan))]
    found: dict[tuple[str, str], list[Run]] = {(s.name, c.scoring.rule): [] for s in chosen for c in competitions}
    for done, run in enumerate(_played(pieces, workers), 1):
        found[run.scene, run.rule].append(run)
        advance(done, len(pieces))
    by_name = {s.name: s for s in chosen}
    summaries = tuple(summed(by_name[name], rule, runs, plan.days) for (name, rule), runs in found.items())
    return Result(plan, summaries, goals(summaries))


def runs_of(competition: Competition, scene: Scene, plan: Plan) -> int:
    """Fewer of five validators, because each run has days / 3 changes at the top, and fewer of rules without memory,
    because each of their days is a throw of its own.
    """
    if scene.kind == "agreement":
        return max(1, plan.runs // 10)
    return plan.runs if isinstance(competition.scoring, Champion) else max(1, plan.runs // 4)


def _played(pieces: Sequence[tuple[Competition, Scene, Plan, int]], workers: int) -> Iterator[Run]:
    if workers == 1:
        yield from (play(*piece) for piece in pieces)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(play, *piece) for piece in pieces]):
            yield future.result()


def summed(scene: Scene, rule: str, runs: Sequence[Run], days: int) -> Summary:
    """The runs of one scene under one rule, in any order, as one line."""
    means = sorted(statistics.fmean(run.shares) for run in runs)
    mean = math.fsum(means) / len(means)
    if scene.kind == "agreement":
        lowest = min(run.lowest for run in runs)
        return Summary(scene.name, scene.kind, scene.race, rule, len(runs), mean, lowest, 0.0, ())
    below = sum(m < MAX_COPY_SHARE for m in means) / len(means)
    if scene.race:
        won = sorted(math.inf if run.won is None else run.won for run in runs)
        by_day = tuple(sum(day <= end for day in won) / len(won) for end in range(1, days + 1))
        middle, most = (won[math.ceil(part * len(won)) - 1] for part in (0.5, 0.95))
        finite = [None if math.isinf(day) else day for day in (middle, most)]
        return Summary(scene.name, scene.kind, scene.race, rule, len(runs), mean, means[-1], below, by_day, *finite)
    last = {day: place for place, day in enumerate(runs[0].days) if day == int(day)}
    daily = tuple(math.fsum(sorted(run.shares[last[day]] for run in runs)) / len(runs) for day in range(1, days + 1))
    return Summary(scene.name, scene.kind, scene.race, rule, len(runs), mean, means[-1], below, daily)


# ---- goals -----------------------------------------------------------------------------------------------------------


def goals(summaries: Sequence[Summary]) -> tuple[Goal, ...]:
    """What `champion` is to reach, for the scenes that were played."""
    ours = [s for s in summaries if s.rule == "champion"]
    found = []
    copies = [s for s in ours if s.kind in COPIES]
    if copies:
        worst = min(copies, key=lambda s: (s.below, -s.worst))
        what = f"all copies together have under 1% of the weight in at least 99% of runs, in each of {len(copies)} scenes"
        found.append(Goal(what, f"{worst.below:.1%} in the worst: {worst.scene}", worst.below >= 0.99))
    for gain, day, words in ((0.003, 1, "a day"), (0.0015, 7, "a week")):
        for age in (0, 7, 30):
            name = improvement(gain, age, HONEST_SD).name
            for s in (s for s in ours if s.scene == name):
                what = f"{name}: wins within {words} in at least 95% of runs"
                found.append(Goal(what, f"{s.won_by(day):.1%}", s.won_by(day) >= 0.95))
    for s in (s for s in ours if s.kind == "agreement"):
        got = f"{s.mean:.4f} (lowest of one validator in one window: {s.worst:.3f})"
        found.append(Goal("five validators agree: mean vtrust at least 0.995", got, s.mean >= 0.995))
    return tuple(found)


# ---- for people ------------------------------------------------------------------------------------------------------


def tables(result: Result) -> tuple[Table, ...]:
    """Shares, races, agreement and goals; what was not played is left out."""
    rules = list(dict.fromkeys(s.rule for s in result.summaries))
    end = result.plan.days
    found = []
    for title, rows, cell in (
        (
            f"Share of the weight in %: on day 1, on day {end}, mean of all days, largest mean of a run",
            [s for s in result.summaries if not s.race and s.kind != "agreement"],
            _share_cell,
        ),
        (
            "Days until the challenger has more than half of the weight: in half of the runs, in 95% of them",
            [s for s in result.summaries if s.race],
            _race_cell,
        ),
        (
            "Agreement of five validators: mean vtrust, lowest of one validator in one window",
            [s for s in result.summaries if s.kind == "agreement"],
            lambda s: f"{s.mean:6.4f} {s.worst:6.3f}",
        ),
    ):
        if rows:
            found.append(_table(title, rules, rows, cell))
    if result.goals:
        table = Table("", "goal of champion", "reached", box=box.SIMPLE)
        for goal in result.goals:
            table.add_row("pass" if goal.met else "FAIL", goal.text, goal.got)
        found.append(table)
    return tuple(found)


def _table(title: str, rules: Sequence[str], rows: Sequence[Summary], cell: Callable[[Summary], str]) -> Table:
    table = Table("scene", title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for rule in rules:
        table.add_column(rule, justify="right", no_wrap=True)
    cells = {(s.scene, s.rule): cell(s) for s in rows}
    before = ""
    for name, kind in dict.fromkeys((s.scene, s.kind) for s in rows):
        if kind != before:
            table.add_row(f"[italic]{kind}")
        before = kind
        table.add_row(f"  {name}", *(cells.get((name, rule), "") for rule in rules))
    return table


def _share_cell(s: Summary) -> str:
    return " ".join(f"{100 * share:5.1f}" for share in (s.daily[0], s.daily[-1], s.mean, s.worst))


def _race_cell(s: Summary) -> str:
    return " ".join("never" if day is None else f"{day:5.2f}" for day in (s.median_days, s.most_days))


def as_json(result: Result) -> str:
    """Everything, as one JSON object."""
    return json.dumps(asdict(result), indent=1)


PICTURED = (
    ("6 copies, sd 0.10%", "6 copies, sd 0.10%"),
    ("6 copies, sd 1.00%", "6 copies, sd 1.00%"),
    ("6 models 0.2% worse, sd 2%", "6 models 0.2% worse, sd 2%"),
    (improvement(0.0015, 0, HONEST_SD).name, "0.15% better than a new model"),
    (improvement(0.0015, 7, HONEST_SD).name, "0.15% better than 7 d old"),
    ("0.30% better than 30 d old, 6 spoilers sd 2.0%", "0.3% better, against 6 spoilers"),
)
"""Scenes of the picture, three a row, with their titles: first what attackers get, then how fast progress is paid."""
_COLOURS = {"oldest_holder": "#0067a5", "pairwise_epsilon": "#957000", "champion": "#00836a"}
_STYLE: Mapping[str, object] = {"svg.hashsalt": "sn29", "svg.fonttype": "none", "font.size": 10, "axes.titlesize": 10}


def picture(result: Result) -> str:
    """SVG text: shares of attackers above, races below; the same bytes for the same result."""
    with rc_context(dict(_STYLE)):  # type: ignore[arg-type]
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        grid = figure.subplots(2, 3, sharey=True, squeeze=False)
        for place, (scene, title) in enumerate(PICTURED):
            _panel(grid[place // 3][place % 3], title, [s for s in result.summaries if s.scene == scene])
        grid[0][0].set_ylabel("attackers' share of the weight")
        grid[1][0].set_ylabel("runs that the challenger has won")
        for axes in grid[1]:
            axes.set_xlabel("days")
        lines = [figure.axes[0].plot([], [], color=colour)[0] for colour in _COLOURS.values()]
        figure.legend(lines, list(_COLOURS), loc="outside upper center", ncols=3, frameon=False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def _panel(axes: Axes, title: str, summaries: Sequence[Summary]) -> None:
    axes.set_title(title, loc="left")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color="#dcdedf", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for s in summaries:
        axes.plot(range(1, len(s.daily) + 1), s.daily, color=_COLOURS[s.rule], linewidth=2)
