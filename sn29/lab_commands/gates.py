"""`sn29 lab gates`: the gates that carry a model, alone and in sets, and those that do nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected
from sn29.lab_commands.inputs import new_table, say

if TYPE_CHECKING:
    from rich.table import Table

    from sn29.lab.ablation import Removal, Spike
    from sn29.lab.gates import Finding, Gate, Say, Scan
    from sn29.lab.losses import Change
    from sn29.lab.weights import Card, Report
    from sn29.lab_settings import LabGatesSettings
    from sn29.models.tokenizer import Tokenizer

_UNCHANGED = {"float32": 1e-5, "bfloat16": 1e-2}
"""What the recycled model may differ by, relative, in one document from the model without the recycled gates."""
_READ_PER_DOCUMENT = 8
"""Documents that are read for each one that is wanted: many are short."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of documents, no document in both."""

    name: str
    search: tuple[list[int], ...]
    measured: tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class Recycled:
    """What writing the model anew did."""

    folder: str
    gates: int
    difference: float
    """The largest of one document, relative, to the model without these gates."""
    change: Change
    """Against the model as it was."""


def gates(words: list[str]) -> int:
    """0: done; with --recycle also: the written model does what it is said to do. Raises Rejected when it does not."""
    from sn29.lab_settings import LabGatesSettings
    from sn29.settings import read

    settings = read(LabGatesSettings, words)
    if not settings.model:
        raise Rejected(Reason.SETTING, "no MODEL", "a folder or NAMESPACE/NAME@REVISION", "sn29 lab gates")
    from sn29.lab.weights import check_free
    from sn29.lab_commands.inputs import command_line, model_folder, tokenizer_of

    if settings.recycle is not None:
        check_free(settings.recycle)
    folder, name = model_folder(settings.model, settings.hub_endpoint, settings.work_dir)
    tokenizer = tokenizer_of(folder, settings.tokenizer)
    texts = _texts(settings, tokenizer)
    found, before, without = _scanned(settings, folder, texts)
    recycled = None
    if settings.recycle is not None:
        command = command_line("lab gates", words)
        recycled = _recycle(settings, folder, name, texts, found.dead.gates, (before, without), command)
    if settings.picture is not None:
        _draw(settings.picture, found, name, settings.tolerance)
    if settings.json_output:
        print(json.dumps(_as_json(found, name, texts, recycled), indent=1))
    else:
        _show(found, name, texts, recycled, tokenizer, settings)
    return 0


# --- what is looked at ------------------------------------------------------------------------------------------------


def _texts(settings: LabGatesSettings, tokenizer: Tokenizer) -> Texts:
    """The first documents that are long enough; those of the search come first."""
    from sn29.lab_commands.inputs import documents, open_text

    wanted = settings.search_documents + settings.documents
    opened = open_text(settings.text, settings.hub_endpoint)
    read = documents(
        opened, settings.hub_endpoint, tokenizer, _READ_PER_DOCUMENT * wanted, settings.max_tokens, seed=settings.seed
    )
    long = [document.ids for document in read if len(document.ids) == settings.max_tokens]
    if len(long) < wanted:
        got = f"{len(long)} of {len(read)} documents with {settings.max_tokens} tokens"
        raise Rejected(Reason.DATASET, got, f"{wanted}: see --max-tokens and --documents", opened.name)
    return Texts(opened.name, tuple(long[: settings.search_documents]), tuple(long[settings.search_documents : wanted]))


def _scanned(settings: LabGatesSettings, folder: Path, texts: Texts) -> tuple[Scan, list[float], list[float]]:
    """(what was found, nats of the measured documents, and the same without the dead gates). The model is gone afterwards."""
    import torch

    from sn29.evaluation.streamed import config_of
    from sn29.lab.ablation import Subject
    from sn29.lab.gates import Plan, scan
    from sn29.lab.losses import check_ids
    from sn29.models import checkpoint

    if settings.device != "cpu" and not torch.cuda.is_available():
        raise Rejected(Reason.SETTING, settings.device, "cpu: this torch sees no GPU", "--device")
    config = config_of(folder)
    check_ids([*texts.search, *texts.measured], config.number("vocab_size"))
    model = checkpoint.load(folder, dtype=getattr(torch, settings.dtype), device=settings.device)
    rows = {"threads": settings.threads} if model.device.type == "cpu" else {"row_tokens": 2048, "batch_tokens": 16_384}
    search, measured = (Subject(model, ids, config.start_token, **rows) for ids in (texts.search, texts.measured))
    plan = Plan(
        top=settings.top, threshold=settings.threshold / 100, largest=settings.largest, tolerance=settings.tolerance / 100
    )
    with _stages() as say:
        found = scan(search, measured, plan, say)
    nats = measured.nats([{}, found.dead.gates] if settings.recycle is not None else [{}]).tolist()
    return found, nats[0], nats[-1]


@contextmanager
def _stages() -> Iterator[Say]:
    """One bar on standard error, that says what is done now."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def say(what: str) -> Report:
            shown.update(task, description=what, completed=0, total=None)
            return lambda done, of: shown.update(task, completed=done, total=of)

        yield say


def _recycle(
    settings: LabGatesSettings, folder: Path, name: str, texts: Texts, dead: Removal, nats: tuple[list[float], list[float]],
    command: str,
) -> Recycled:  # fmt: skip
    """Write the model with these gates begun again. Raises Rejected(CLAIM) when it is not the model without them."""
    import torch

    from sn29.evaluation.streamed import config_of
    from sn29.lab.ablation import Subject
    from sn29.lab.losses import change
    from sn29.lab.recycling import recycled
    from sn29.lab.weights import Card, open_weights, save, source_of
    from sn29.lab_commands.inputs import progress
    from sn29.models import checkpoint

    assert settings.recycle is not None
    before, without = nats
    done: list[Recycled] = []
    count = sum(int(mask.sum()) for mask in dead.values())
    source = source_of(folder, name)

    def card(written: Path) -> Card:
        model = checkpoint.load(written, dtype=getattr(torch, settings.dtype), device=settings.device)
        subject = Subject(model, texts.measured, config_of(written).start_token, threads=settings.threads)
        after = subject.nats([{}])[0].tolist()
        difference = max(abs(a - b) / b for a, b in zip(after, without, strict=True))
        if difference > _UNCHANGED[settings.dtype]:
            got, limit = f"a relative difference of {difference:.2g} of one document", f"{_UNCHANGED[settings.dtype]:.0e}"
            raise Rejected(Reason.CLAIM, got, f"{limit} from the model without these gates", "--recycle")
        done.append(Recycled(str(settings.recycle), count, difference, change(before, after)))
        what = (
            f"{count:,} gates of the MLPs that do next to nothing have fresh random inputs and outputs of zero, so that training "
            "can use them.",
            "The model computes what it computes without these gates.",
        )
        figures = (
            ("gates recycled", f"{count:,}"),
            ("largest relative difference of a document to the model without them", f"{difference:.2g}"),
            (f"loss on {len(after)} documents", _shown(done[0].change)),
        )
        return Card(f"{name}, {count:,} gates recycled", what, (source,), command, figures)

    with progress("writing") as report:
        save(recycled(open_weights(folder), dead, settings.seed), settings.recycle, card, beside=folder, report=report)
    return done[0]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _as_json(found: Scan, name: str, texts: Texts, recycled: Recycled | None) -> dict[str, Any]:
    from dataclasses import replace

    plain = asdict(replace(found, dead=replace(found.dead, gates={})))
    plain["dead"]["gates"] = {str(layer): mask.nonzero()[:, 0].tolist() for layer, mask in found.dead.gates.items()}
    return {"model": name, "text": texts.name, **plain, "recycled": None if recycled is None else asdict(recycled)}


def _show(
    found: Scan, name: str, texts: Texts, recycled: Recycled | None, tokenizer: Tokenizer, settings: LabGatesSettings
) -> None:
    from rich.console import Console

    console = Console()
    searched, measured = found.tokens
    say(
        console,
        f"\n{name}: {found.layers} layers of {found.width:,} gates, {found.parameters:,} parameters",
        f"{texts.name}: {len(texts.search)} documents ({searched:,} tokens) for the search, {len(texts.measured)} others "
        f"({measured:,} tokens) for what is said of its finds; {found.loss:.3f} nats a token",
        f"{found.candidates} candidates, {found.ablations} sets of gates removed exactly\n",
    )
    if found.sets or found.crossed:
        console.print(_sets(found), "")
        least = sum(each.zero.percent < settings.threshold for each in found.sets)
        if least:
            say(console, f"{least} of these cost {settings.threshold:g} % in the search and less on the measured documents\n")
    else:
        say(console, f"no set of at most {settings.largest} gates costs {settings.threshold:g} %\n")
    console.print(_singles(found.singles), "")
    if found.spikes:
        console.print(_spikes(found.spikes, texts, tokenizer), "")
    console.print(_layers(found), "")
    dead = found.dead
    say(
        console,
        f"{dead.count:,} of {found.layers * found.width:,} gates, with {dead.parameters:,} parameters ({dead.share:.2%} of the "
        f"model), change the loss together by {_shown(dead.change)} (up or down at most {settings.tolerance:g} % was asked for)",
    )
    if recycled is not None:
        say(
            console,
            f"{recycled.folder}: {recycled.gates:,} gates recycled; differs by at most {recycled.difference:.1g} (relative, in "
            f"one document) from the model without them, and from the model as it was by {_shown(recycled.change)}",
        )
    if settings.picture is not None:
        say(console, f"The picture: {settings.picture}")


def _shown(change: Change) -> str:
    return f"{change.percent:+.2f} % ({change.interval.low:+.2f} to {change.interval.high:+.2f})"


def _named(gates: Sequence[Gate]) -> str:
    """layer 11: 1229 1487"""
    layers = list(dict.fromkeys(layer for layer, _ in gates))
    return "; ".join(f"{layer}: {' '.join(str(g) for at, g in gates if at == layer)}" for layer in layers)


def _sets(found: Scan) -> Table:
    table = new_table("set (layer: gates)", "set to 0 (95 %)", "to their means", "all others of the layer", "each alone")
    for each in (*found.sets, *found.crossed):
        table.add_row(
            _named(each.gates), _shown(each.zero), "" if each.mean is None else f"{each.mean.percent:+.2f} %",
            "" if each.complement is None else f"{each.complement.percent:+.2f} %",
            ", ".join(f"{percent:+.1f}" for percent in each.alone) + " %",
        )  # fmt: skip
    return table


def _singles(singles: Sequence[Finding]) -> Table:
    table = new_table("one gate", "set to 0 (95 %)", "to its mean", "rank by magnitude", "energy", "first order", "Fisher")
    for each in singles:
        mean = "" if each.mean is None else f"{each.mean.percent:+.2f} %"
        table.add_row(_named(each.gates), _shown(each.zero), mean, *(f"{rank:,}" for rank in each.ranks[0]))
    return table


def _spikes(spikes: Sequence[Spike], texts: Texts, tokenizer: Tokenizer) -> Table:
    """One row for a dimension."""
    table = new_table("massive dimension", "behind layers", "largest", "times the median", "at tokens")
    for dimension in dict.fromkeys(spike.dimension for spike in spikes):
        of = sorted((spike for spike in spikes if spike.dimension == dimension), key=lambda spike: spike.layer)
        top = max(of, key=lambda spike: spike.ratio)
        tokens = dict.fromkeys(
            "the start token" if at == 0 else repr(tokenizer.decode([texts.search[number][at - 1]])) for number, at in top.places
        )
        layers = f"{of[0].layer} to {of[-1].layer}" if len(of) > 1 else str(of[0].layer)
        table.add_row(str(dimension), layers, f"{top.value:+,.0f}", f"{top.ratio:,.0f}", ", ".join([*tokens][:4]))
    return table


def _layers(found: Scan) -> Table:
    shares = [count / found.width for count in found.curves[0].removed]
    names = [f"the least {share:.0%} removed" if share < 1 else "all removed" for share in shares]
    table = new_table("layer", "candidates", "all candidates removed", *names, "do nothing")
    for curve in found.curves:
        mask = found.dead.gates.get(curve.layer)
        table.add_row(
            str(curve.layer), str(curve.candidates), f"{curve.together:+.1f} %", *(f"{value:+.1f} %" for value in curve.percent),
            "0" if mask is None else f"{int(mask.sum()):,}",
        )  # fmt: skip
    return table


def _short(gates: Sequence[Gate]) -> str:
    return " + ".join(str(gate) for _, gate in gates) if len(gates) <= 3 else f"{len(gates)} gates"


def _draw(path: Path, found: Scan, name: str, tolerance: float) -> None:
    from sn29.lab_commands.inputs import write_picture
    from sn29.report import pictures

    whole = [curve.percent[-1] for curve in found.curves]
    least = [curve.percent[-2] for curve in found.curves]
    sets = [(each.gates[0][0], each.zero.percent, _short(each.gates)) for each in found.sets]
    shares, costs = zip(*found.dead.curve, strict=True)
    alt = (
        f"{name}: what each layer's MLP carries, with {len(sets)} sets of gates, and the loss against the share of gates removed"
    )
    drawn = pictures.gates(whole, least, sets, [100 * share for share in shares], costs, tolerance, alt)
    write_picture(path, pictures.standalone(drawn))
