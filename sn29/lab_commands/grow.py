"""`sn29 lab grow`: a larger model that says the same, written when its losses show it; and plans of larger ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from rich.table import Table

    from sn29.lab.grow import Grown
    from sn29.lab.growth_plan import Cost, Planned
    from sn29.lab.losses import Change
    from sn29.lab.weights import Weights
    from sn29.lab_settings import LabGrowSettings
    from sn29.rules.schedule import CompetitionFile

_ROUNDED = 1.001
"""Times the bound: the mean row as its type holds it."""
_FLAGS = ("layers", "intermediate", "hidden", "heads", "kv_heads", "vocab")
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What new tokens take from the others of the measured documents, in nats a token: log(1 + p_new / p_old)."""

    mean: float
    largest: float
    bound: float
    """Which is claimed of each token."""

    @property
    def is_met(self) -> bool:
        return self.largest <= _ROUNDED * self.bound + 1e-7  # what float32 sees of a loss


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the losses of both models say."""

    change: Change
    """Among the tokens that the old model has."""
    tokens: int
    documents: int
    text: str
    limit: float | None
    """Largest relative change, of all documents together and of each; None: none is stated."""
    new_tokens: NewTokens | None
    """None: there are none."""

    @property
    def is_met(self) -> bool:
        kept = self.limit is None or max(abs(self.change.relative), self.change.largest) <= self.limit
        return kept and (self.new_tokens is None or self.new_tokens.is_met)

    @property
    def claim(self) -> str:
        if self.limit is None:
            return "none: it is another function"
        claim = f"at most {self.limit:g} either way, together and in each document"
        return claim if self.new_tokens is None else f"{claim}, and {self.new_tokens.bound:.3g} nats a token for new tokens"

    @property
    def found(self) -> str:
        found = f"a loss that changed by {self.change.relative:+.2e} of itself, in one document by {self.change.largest:.2e}"
        new = self.new_tokens
        return found if new is None else f"{found}, and new tokens take up to {new.largest:.3g} nats a token"


def grow(words: list[str]) -> int:
    """0: written (or planned). Raises Rejected when the claim does not hold."""
    from sn29.lab_settings import LabGrowSettings
    from sn29.settings import read

    settings = read(LabGrowSettings, words)
    _check(settings)
    if settings.schedule:
        return _schedule(settings)
    if settings.dry_run:
        return _show_plan(settings, _base_of(settings))
    from sn29.lab.weights import open_weights
    from sn29.lab_commands.inputs import command_line, model_folder

    folder, name = model_folder(settings.model, settings.hub_endpoint, settings.work_dir)
    return _write(settings, open_weights(folder), folder, name, command_line("lab grow", words))


def _check(settings: LabGrowSettings) -> None:
    """Raises Rejected(SETTING) for what cannot be asked for together."""
    flags = [f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(settings, name)] + ["--untie"] * settings.untie
    asked = [flag for flag, given in (("--to", settings.to), ("--schedule", settings.schedule)) if given]
    if not settings.model:
        raise Rejected(Reason.SETTING, "no MODEL", "a folder, NAMESPACE/NAME@REVISION or a config.json")
    if len(asked) + bool(flags) != 1:
        got = " and ".join([*asked, *flags]) or "nothing to grow"
        limit = "one of --to, --schedule, or sizes such as --layers and --intermediate"
        raise Rejected(Reason.SETTING, got, limit)
    if settings.out is None and not (settings.dry_run or settings.schedule):
        raise Rejected(Reason.SETTING, "no --out", "a new folder for the model, or --dry-run")
    if not all(word.isdecimal() for word in settings.after):
        raise Rejected(Reason.SETTING, ",".join(settings.after), "numbers of layers, from 0, with commas between", "--after")
    _check_effect(settings)


def _check_effect(settings: LabGrowSettings) -> None:
    """Raises Rejected(SETTING) for a flag without effect beside the others."""
    keeps = settings.place in ("interleaved", "top")
    deeper, plans = bool(settings.layers or settings.to), bool(settings.dry_run or settings.schedule)
    split = bool(settings.intermediate) and settings.mlp == "split"
    for name, has_effect, limit in (
        ("place", deeper, "with --layers or --to"),
        ("after", bool(settings.layers), "with --layers"),
        ("mlp", bool(settings.intermediate), "with --intermediate"),
        ("noise", split or (deeper and keeps), "with --mlp split, or new layers whose outputs are zero"),
        ("limit", not plans, "without --dry-run and --schedule, which measure nothing"),
        ("row_tokens", plans, "with --dry-run or --schedule"),
        ("optimizer", plans, "with --dry-run or --schedule"),
        ("dry_run", not settings.schedule, "without --schedule, which reads no weights"),
        ("picture", bool(settings.schedule), "with --schedule"),
    ):
        if not has_effect and getattr(settings, name) != type(settings).model_fields[name].default:
            flag = f"--{name.replace('_', '-')}"
            raise Rejected(Reason.SETTING, f"{flag} without effect", limit, flag)


def _base_of(settings: LabGrowSettings) -> Weights:
    """The model by its config.json alone. Raises Rejected, Unavailable."""
    from sn29.lab.growth_plan import sketch
    from sn29.lab_commands.inputs import config_bytes

    return sketch(config_bytes(settings.model, settings.hub_endpoint)[0])


def _asked(base: Weights, settings: LabGrowSettings) -> Grown:
    """As `_made`; raises Rejected(SETTING) for a model that has all that already."""
    found = _made(base, settings)
    if found.weights.shapes == base.shapes:
        got = f"a model that has this already, and {base.num_parameters:,} parameters"
        raise Rejected(Reason.SETTING, got, "something to grow")
    return found


def _made(base: Weights, settings: LabGrowSettings) -> Grown:
    """The operators that the flags name, those that others depend on first. Raises as they do."""
    from sn29.lab import grow as operators
    from sn29.lab import growth_plan

    if settings.to:
        plan = growth_plan.planned(base.raw, int(settings.to))
        return growth_plan.carried_out(base, plan, place=settings.place, noise=settings.noise, seed=settings.seed)
    seed, noise, found = settings.seed, settings.noise, operators.start(base)
    if settings.untie:
        found = found.then(operators.untie(found.weights))
    if settings.vocab:
        found = found.then(operators.more_tokens(found.weights, settings.vocab, seed=seed))
    if settings.hidden:
        wider = operators.widen_hidden(found.weights, settings.hidden, settings.heads, settings.kv_heads, seed=seed)
        found = found.then(wider)
    elif settings.heads or settings.kv_heads:
        heads = settings.heads or base.config.number("num_attention_heads")
        found = found.then(operators.widen_attention(found.weights, heads, settings.kv_heads, seed=seed))
    if settings.intermediate:
        found = found.then(operators.widen_mlp(found.weights, settings.intermediate, settings.mlp, noise=noise, seed=seed))
    if settings.layers:
        after = tuple(map(int, settings.after))
        found = found.then(operators.deepen(found.weights, settings.layers, settings.place, after=after, noise=noise, seed=seed))
    return found


# --- a model ----------------------------------------------------------------------------------------------------------


def _write(settings: LabGrowSettings, base: Weights, folder: Path, name: str, command: str) -> int:
    from sn29.lab.losses import document_nats, layer_by_layer
    from sn29.lab.weights import Card, check_free, check_room, left_behind, save, source_of
    from sn29.lab_commands.inputs import documents, open_text, progress, tokenizer_of

    assert settings.out is not None
    grown = _asked(base, settings)
    check_free(settings.out)
    check_room(settings.out, grown.weights.num_bytes)
    for left in left_behind(settings.out):
        print(f"  {left}: of another run to {settings.out}, to be deleted if none is at work", file=sys.stderr)
    text = open_text(settings.text, settings.hub_endpoint)
    tokenizer = tokenizer_of(folder, settings.tokenizer)
    ids = [found.ids for found in documents(text, settings.hub_endpoint, tokenizer, settings.documents, settings.max_tokens)]
    threads, memory = settings.threads, int(settings.memory_gb * 1e9)
    layer_by_layer(grown.weights.config, ids, threads=threads, memory_bytes=memory)  # fits, or is refused here
    with progress(f"losses of {name}") as report:
        before = document_nats(folder, ids, threads=threads, memory_bytes=memory, report=report)
    source = source_of(folder, name)
    measured: list[Verdict] = []

    def card(part: Path) -> Card:
        with progress("losses of the new model") as report:
            measured.append(
                judged(part, before, ids, base, grown, settings.limit, text.name, threads=threads, memory_bytes=memory,
                       report=report)
            )  # fmt: skip
        if not measured[0].is_met:
            raise Rejected(Reason.CLAIM, measured[0].found, measured[0].claim, "the grown model")
        return Card(f"{name}, grown", grown.said, [source], command, _figures(base, grown, measured[0], settings.seed))

    facts = None
    try:
        with progress(f"writing {settings.out}") as report:
            facts = save(grown.weights, settings.out, card, beside=folder, report=report)
    finally:
        if settings.json_output and measured:  # also of a claim that does not hold
            loss = {**asdict(measured[0]), "relative": measured[0].change.relative, "is_met": measured[0].is_met}
            model = None if facts is None else asdict(facts)
            print(json.dumps({"said": grown.said, "loss": loss, "model": model, "source": asdict(source)}, indent=1))
    if not settings.json_output:
        _show(settings, grown, _figures(base, grown, measured[0], settings.seed))
    return 0


def judged(
    folder: Path, before: Sequence[float], ids: Sequence[Sequence[int]], base: Weights, grown: Grown, limit: float, text: str,
    **how: Any,
) -> Verdict:  # fmt: skip
    """What the losses of the grown model in a folder say beside those `before` (`limit` 0: as is stated for what was done).

    With new tokens it is held to the function that it was on the old ones: their rows are left out of the softmax, and what
    they take is a figure of its own. Raises as `document_nats`, which is given `how`.
    """
    from sn29.lab.losses import Taken, change, document_nats

    taken, new = Taken(base.config.number("vocab_size")), None
    if grown.nats_per_token:
        after = document_nats(folder, ids, head=taken.head, **how)
        new = NewTokens(taken.total / taken.tokens, taken.largest, grown.nats_per_token)
    else:
        after = document_nats(folder, ids, **how)
    return Verdict(change(before, after), sum(map(len, ids)), len(ids), text, limit or grown.limit, new)


def _figures(base: Weights, grown: Grown, verdict: Verdict, seed: int) -> list[tuple[str, str]]:
    found, new = verdict.change, verdict.new_tokens
    rows = [
        ("parameters before", f"{base.num_parameters:,}"),
        ("parameters after", f"{grown.weights.num_parameters:,}"),
        ("loss before, nats a token", f"{found.before / verdict.tokens:.7f}"),
        ("loss after, nats a token", f"{found.after / verdict.tokens + (new.mean if new else 0.0):.7f}"),
        ("relative change" + " among the old tokens" * bool(new), f"{found.relative:+.2e}"),
        ("largest of one document", f"{found.largest:.2e}"),
    ]
    if new:
        rows.append(("taken by new tokens, nats a token", f"{new.mean:.3g}, of one token at most {new.largest:.3g}"))
    return [
        *rows,
        ("claimed", verdict.claim),
        ("measured in float32 on", f"{verdict.documents} documents, {verdict.tokens:,} tokens of {verdict.text}"),
        ("seed of new weights", str(seed)),
    ]


def _show(settings: LabGrowSettings, grown: Grown, figures: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console

    from sn29.lab_commands.inputs import new_table, say

    console = Console(markup=False)
    say(console, *grown.said)
    shown = new_table("", "")
    shown.columns[1].justify = "left"
    for name, value in figures:
        shown.add_row(name, value)
    console.print("", shown, "")
    say(console, f"Written: {settings.out}")


# --- plans ------------------------------------------------------------------------------------------------------------


def _show_plan(settings: LabGrowSettings, base: Weights) -> int:
    """What would be made, with its cost; nothing is read or written."""
    from rich.console import Console

    from sn29.lab.growth_plan import Planned, cost, numbers_of
    from sn29.lab_commands.inputs import say

    grown = _asked(base, settings)
    budget = int(settings.to) or grown.weights.num_parameters
    before, after = (numbers_of(weights.raw) for weights in (base, grown.weights))
    plans = [Planned(of or base.num_parameters, w.raw, c, {}) for of, w, c in ((0, base, before), (budget, grown.weights, after))]
    costs = [cost(plan.config, settings.row_tokens, settings.optimizer) for plan in plans]
    if settings.json_output:
        print(json.dumps({"said": grown.said, "models": [_as_json(p, c) for p, c in zip(plans, costs, strict=True)]}, indent=1))
        return 0
    console = Console(markup=False)
    say(console, *grown.said)
    console.print("", _models(["before", "after"], plans, costs), "")
    say(console, _said_of_cost(settings))
    return 0


def _schedule(settings: LabGrowSettings) -> int:
    """A model for each value of the competition's parameter limit that the model does not exceed, and a config.json of each in
    --out."""
    from rich.console import Console

    from neurons.adapters import parse_texts, read_texts
    from sn29.lab.growth_plan import cost, schedule
    from sn29.lab.weights import check_free
    from sn29.lab_commands.inputs import check_place, say

    if settings.out is not None:
        check_free(settings.out)
    if settings.picture is not None:
        check_place(settings.picture)
    files = parse_texts(read_texts(settings.competitions_dir)).files
    if settings.schedule not in files:
        raise Rejected(Reason.SETTING, settings.schedule, ", ".join(files), "--schedule")
    file, base = files[settings.schedule], _base_of(settings)
    if base.config.family not in file.versions[-1].competition.families:
        families = ", ".join(file.versions[-1].competition.families)
        raise Rejected(Reason.FAMILY, base.config.family, families, settings.schedule)
    limits = _limits_above(base, file, settings.schedule)
    plans = schedule(base.raw, [limit for _, limit in limits])
    costs = [cost(plan.config, settings.row_tokens, settings.optimizer) for plan in plans]
    if settings.out is not None:
        _write_configs(settings.out, plans)
    if settings.picture is not None:
        _draw(settings, [block for block, _ in limits], plans)
    if settings.json_output:
        times = [file.clock.time_of(block) if file.clock else None for block, _ in limits]
        found = [
            {"block": block, "time": time, **_as_json(plan, each)}
            for (block, _), time, plan, each in zip(limits, times, plans, costs, strict=True)
        ]
        print(json.dumps(found, indent=1))
        return 0
    console = Console(markup=False)
    console.print(_models([f"{block:,}" for block, _ in limits], plans, costs, "from block"), "")
    say(console, _said_of_cost(settings))
    for what, path in ((f"A {_CONFIG} of each", settings.out), ("The picture", settings.picture)):
        say(console, *[f"{what}: {path}"] * (path is not None))
    return 0


def _limits_above(base: Weights, file: CompetitionFile, name: str) -> list[tuple[int, int]]:
    """(block, parameters) of each limit that the file sets, but for those that the model exceeds; no model shrinks, so that
    smaller ones after larger ones are not planned for. Raises Rejected(PARAMETERS) when it exceeds all."""
    found: list[tuple[int, int]] = []
    for version in file.versions:
        limit = int(version.competition.limits.parameters)
        if not found or limit > found[-1][1]:
            found.append((version.block, limit))
    own = base.num_parameters
    above = [each for each in found if each[1] >= own]
    if not above:
        raise Rejected(Reason.PARAMETERS, f"{own:,} parameters", f"at most {found[-1][1]:,}", name)
    if passed := len(found) - len(above):
        print(f"  {passed} of {len(found)} limits are passed over: below the model's own {own:,} parameters", file=sys.stderr)
    return above


def _write_configs(folder: Path, plans: Sequence[Planned]) -> None:
    """FOLDER/01-3.90B/config.json and so on: all, or none. Raises as `new_folder`."""
    from sn29.lab.weights import new_folder

    with new_folder(folder) as part:
        for number, plan in enumerate(plans, 1):
            place = part / f"{number:02d}-{plan.budget / 1e9:.2f}B"
            place.mkdir()
            with (place / _CONFIG).open("w", encoding="utf-8") as file:
                file.write(json.dumps(plan.raw, indent=2, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _draw(settings: LabGrowSettings, blocks: Sequence[int], plans: Sequence[Planned]) -> None:
    """Parameters against blocks."""
    from sn29.lab_commands.inputs import write_picture
    from sn29.report import pictures

    assert settings.picture is not None
    names = [(f"from block {block:,}", 0) for block in blocks]
    alt = f"parameters of the models that {settings.schedule} allows, by block, from {plans[0].parameters:,}"
    panels = [("billions of parameters", [plan.parameters / 1e9 for plan in plans])]
    write_picture(settings.picture, pictures.standalone(pictures.weights(names, panels, alt)))


def _as_json(plan: Planned, of: Cost) -> dict[str, Any]:
    return {
        "budget": plan.budget,
        "parameters": plan.parameters,
        "unused": plan.unused,
        "changes": {name: list(both) for name, both in plan.changes.items()},
        "config": dict(plan.raw),
        **asdict(of),
    }


def _models(names: Sequence[str], plans: Sequence[Planned], costs: Sequence[Cost], first: str = "") -> Table:
    from sn29.lab_commands import inputs

    columns = (first, "parameters", "unused", "layers", "hidden", "MLP", "GFLOP a token", "H100 h", "train GB", "file GB")
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size")
    table, rows = inputs.new_table(*columns), []
    table.padding = (0, 0, 0, 0)  # to fit in 80 characters
    for name, plan, of in zip(names, plans, costs, strict=True):
        sizes = [str(plan.config.number(field)) for field in fields]
        figures = [of.flops_per_token / 1e9, of.h100_hours, of.training_bytes / 1e9, of.file_bytes / 1e9]
        rows.append((name, f"{plan.parameters:,}", f"{plan.unused:.2%}", *sizes, *(f"{figure:.1f}" for figure in figures)))
        table.add_row(*rows[-1])
    for number, column in enumerate(table.columns):  # headings may take more lines, numbers may not: 74 characters in all
        column.width = max(len(text) for text in (*(row[number] for row in rows), *columns[number].split()))
    return table


def _said_of_cost(settings: LabGrowSettings) -> str:
    return (
        f"GFLOP of training for a token in rows of {settings.row_tokens:,}; hours of an H100 for a billion tokens at 40 % of 989 "
        f"TFLOP/s; GB of weights, gradients and {settings.optimizer}'s state in float32, without activations; GB of a file in "
        "bfloat16."
    )
