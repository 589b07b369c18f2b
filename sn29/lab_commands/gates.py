"""`sn29 lab gates`: the gates that carry a model, alone and in sets, and those that do nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.lab_commands.inputs import new_table, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sn29.lab.ablation import Spike
    from sn29.lab.gates import Dead, Finding, Gate, Scan
    from sn29.lab.losses import Change
    from sn29.lab.recycling import Proof
    from sn29.lab.weights import Card
    from sn29.lab_settings import LabGatesSettings
    from sn29.models.config import ModelConfig
    from sn29.models.tokenizer import Tokenizer

_READ_PER_DOCUMENT = 8
"""Documents that are read for each one that is wanted: many are short."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of documents, all of them different ones."""

    name: str
    search: tuple[list[int], ...]
    measured: tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class Recycled:
    """What writing the model anew did."""

    folder: str
    gates: int
    proof: Proof


def gates(words: list[str]) -> int:
    """0: done; with --recycle also: the gates do nothing, and the written model does what it is said to do.

    Raises Rejected when it does not, or they do; what was found is told all the same.
    """
    from sn29.lab_settings import LabGatesSettings
    from sn29.settings import read

    settings = read(LabGatesSettings, words)
    if not settings.model:
        raise Rejected(Reason.SETTING, "no MODEL", "a folder or NAMESPACE/NAME@REVISION")
    from sn29.evaluation.streamed import config_of
    from sn29.lab.weights import check_free
    from sn29.lab_commands.inputs import check_place, command_line, model_folder, tokenizer_of

    if settings.picture is not None:
        check_place(settings.picture)
    if settings.recycle is not None:
        check_free(settings.recycle)
    folder, name = model_folder(settings.model, settings.hub_endpoint, settings.work_dir)
    if settings.recycle is not None:
        _check_disk(settings.recycle, folder)
    tokenizer = tokenizer_of(folder, settings.tokenizer)
    config, texts = config_of(folder), _texts(settings, tokenizer)
    _check(settings, config, texts)
    found, recycled, refusal = _scanned(settings, folder, config, texts), None, None
    if settings.recycle is not None:
        try:
            recycled = _recycle(settings, folder, name, texts, found, command_line("lab gates", words))
        except Sn29Error as error:  # minutes of work are told first
            refusal = error
    if settings.json_output:
        print(json.dumps(_as_json(found, name, texts, recycled), indent=1))
    else:
        _show(found, name, texts, recycled, tokenizer, settings)
    if settings.picture is not None:
        _draw(settings.picture, found, name, settings.tolerance)
    if refusal is not None:
        raise refusal
    return 0


# --- what is looked at ------------------------------------------------------------------------------------------------


def _texts(settings: LabGatesSettings, tokenizer: Tokenizer) -> Texts:
    """The first documents that are long enough, those of the search first; of some that are cut to the same tokens, one."""
    from sn29.lab_commands.inputs import documents, open_text

    wanted = settings.search_documents + settings.documents
    opened = open_text(settings.text, settings.hub_endpoint)
    read = documents(
        opened, settings.hub_endpoint, tokenizer, _READ_PER_DOCUMENT * wanted, settings.max_tokens, seed=settings.seed
    )
    found = dict.fromkeys(tuple(document.ids) for document in read if len(document.ids) == settings.max_tokens)
    long = [list(ids) for ids in found]
    if len(long) < wanted:
        got = f"{len(long)} of {len(read)} documents with {settings.max_tokens} tokens that no other begins with"
        raise Rejected(Reason.DATASET, got, f"{wanted}: see --max-tokens and --documents", opened.name)
    return Texts(opened.name, tuple(long[: settings.search_documents]), tuple(long[settings.search_documents : wanted]))


def _check_disk(out: Path, folder: Path) -> None:
    """Before long work. Raises as `check_room` and `open_weights`."""
    from sn29.lab.weights import check_room, left_behind, open_weights

    check_room(out, open_weights(folder).num_bytes)
    for left in left_behind(out):
        print(f"  {left}: of another run to {out}, to be deleted if none is at work", file=sys.stderr)


def _check(settings: LabGatesSettings, config: ModelConfig, texts: Texts) -> None:
    """Raises Rejected(SETTING) for a device or tokens that there are not, Unavailable for more memory than there is."""
    import torch

    from sn29.evaluation.streamed import free_memory
    from sn29.lab.ablation import needed_bytes
    from sn29.lab.losses import check_ids

    if settings.device != "cpu" and not torch.cuda.is_available():
        raise Rejected(Reason.SETTING, settings.device, "cpu: this torch sees no GPU", "--device")
    both = [*texts.search, *texts.measured]
    check_ids(both, config.number("vocab_size"))
    free = int(settings.memory_gb * 1e9) or free_memory(settings.device)
    scanning, proving = (
        needed_bytes(
            config, dtype, settings.device, [len(ids) for ids in documents], backward=backward, threads=settings.threads
        )
        for dtype, documents, backward in (
            (getattr(torch, settings.dtype), both, True),
            (torch.float32, texts.measured, False),
        )
    )  # fmt: skip
    if scanning > free:
        advice = "fewer or shorter documents" if settings.dtype == "bfloat16" else "--dtype bfloat16 takes about half"
        why = f"{scanning:,} bytes are needed for the gates of this model in {settings.dtype}, {free:,} may be used: {advice}"
        raise Unavailable("memory", why)
    if settings.recycle is not None and proving > free:
        why = f"{proving:,} bytes are needed to prove --recycle in float32, {free:,} may be used: without --recycle, or elsewhere"
        raise Unavailable("memory", why)


def _scanned(settings: LabGatesSettings, folder: Path, config: ModelConfig, texts: Texts) -> Scan:
    """What was found. The model is gone afterwards."""
    import torch

    from sn29.lab.ablation import Subject, pieces_of
    from sn29.lab.gates import Plan, scan
    from sn29.lab_commands.inputs import stages
    from sn29.models import checkpoint

    model = checkpoint.load(folder, dtype=getattr(torch, settings.dtype), device=settings.device)
    search, measured = (
        Subject(model, ids, config.start_token, pieces_of(settings.device), threads=settings.threads)
        for ids in (texts.search, texts.measured)
    )
    plan = Plan(
        top=settings.top, threshold=settings.threshold / 100, largest=settings.largest, tolerance=settings.tolerance / 100
    )
    with stages() as say:
        return scan(search, measured, plan, say)


def _recycle(settings: LabGatesSettings, folder: Path, name: str, texts: Texts, found: Scan, command: str) -> Recycled:
    """Write the model with its dead gates begun again.

    Raises Rejected(CLAIM) when there are none, or they are not shown to do nothing, and as `recycling.proved`.
    """
    from sn29.lab.ablation import pieces_of
    from sn29.lab.recycling import proved, recycled
    from sn29.lab.weights import Card, open_weights, save, source_of
    from sn29.lab_commands.inputs import progress

    assert settings.recycle is not None
    dead, count = found.dead, found.dead.count
    if not (count and dead.does_nothing):
        got = f"{count:,} gates that change the loss by {_of_dead(dead)}" if count else "no gate to recycle"
        limit = f"gates that do nothing: at most {settings.tolerance:g} %, the interval as well"
        raise Rejected(Reason.CLAIM, got, limit, "--recycle")
    done: list[Recycled] = []
    source = source_of(folder, name)

    def card(written: Path) -> Card:
        proof = proved(
            folder, written, dead.gates, texts.measured, pieces_of(settings.device),
            device=settings.device, threads=settings.threads,
        )  # fmt: skip
        done.append(Recycled(str(settings.recycle), count, proof))
        what = (
            f"{count:,} gates of the MLPs, without which the loss changes by {_of_dead(dead)}, have fresh random inputs and "
            "outputs of zero, so that training can use them.",
            "The model computes what it computes without these gates; every other weight is the source's to the bit.",
        )
        figures = (
            ("gates recycled", f"{count:,}"),
            ("largest relative difference of a document to the model without them, float32", f"{proof.difference:.2g}"),
            (f"loss on {len(texts.measured)} documents, float32", _shown(proof.change)),
        )
        return Card(f"{name}, {count:,} gates recycled", what, (source,), command, figures)

    with progress("writing") as report:
        save(recycled(open_weights(folder), dead.gates, settings.seed), settings.recycle, card, beside=folder, report=report)
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
    _show_sets(console, found, settings)
    say(console, "One gate removed; on the measured documents, ranks by those of the search")
    console.print(_singles(found.singles), "")
    if found.spikes:
        say(console, "Massive activations, on the documents of the search")
        console.print(_spikes(found.spikes, texts, tokenizer), "")
    say(console, "What a layer's MLP carries, on the documents of the search")
    console.print(_layers(found), "")
    _show_dead(console, found, settings)
    if recycled is not None:
        proof = recycled.proof
        say(
            console,
            f"{recycled.folder}: {recycled.gates:,} gates recycled, every other weight the same; differs by at most "
            f"{proof.difference:.1g} (relative, in one document, float32) from the model without them, and from the model as it "
            f"was by {_shown(proof.change)}",
        )
    if settings.picture is not None:
        say(console, f"The picture: {settings.picture}")


def _show_sets(console: Console, found: Scan, settings: LabGatesSettings) -> None:
    asked = f"{settings.threshold:g} %"
    if found.sets:
        say(
            console, "Sets of gates removed; on the measured documents, but for what they cost in the search and each costs alone"
        )
        console.print(_sets(found.sets), "")
        less = sum(each.zero.percent < settings.threshold for each in found.sets)
        if less:
            say(console, f"{less} of these cost {asked} in the search and less on the measured documents\n")
    else:
        say(console, f"no set of at most {settings.largest} gates that costs {asked} was found\n")
    if found.crossed:
        say(console, f"Sets and gates of two layers that cost together {asked} more than by themselves")
        console.print(_sets(found.crossed), "")
    if found.lost:
        say(console, f"{found.lost} more cost {asked} in the search, and perhaps nothing on the measured documents\n")


def _show_dead(console: Console, found: Scan, settings: LabGatesSettings) -> None:
    dead, asked = found.dead, f"{settings.tolerance:g} %"
    if not dead.count:
        tried, _, drift = found.dead.curve[1]
        few = f"{round(tried * found.layers * found.width):,} gates"
        say(
            console,
            f"no gate is shown to do nothing: without the least important {few} documents of the search change by {drift:.2f} %, "
            f"and half of {asked} is what may be",
        )
        return
    say(
        console,
        f"The least important {dead.count:,} of {found.layers * found.width:,} gates, with {dead.parameters:,} parameters "
        f"({dead.share:.2%} of the model), "
        + (f"do nothing within {asked}" if dead.does_nothing else f"are not shown to do nothing within {asked}")
        + f": without them the loss of the measured documents changes by {_of_dead(dead)}",
    )
    if not dead.does_nothing:
        say(console, "more --documents make the interval narrower; a smaller --tolerance chooses fewer gates")


def _of_dead(dead: Dead) -> str:
    return f"{_shown(dead.change)}, and one document by {dead.moved:.2f} % on average, up or down"


def _shown(change: Change) -> str:
    each = change.interval
    return f"{change.percent:+.2f} % ({'one document' if each is None else f'{each.low:+.2f} to {each.high:+.2f}'})"


def _named(gates: Sequence[Gate]) -> str:
    """layer 11: 1229 1487"""
    layers = list(dict.fromkeys(layer for layer, _ in gates))
    return "; ".join(f"{layer}: {' '.join(str(g) for at, g in gates if at == layer)}" for layer in layers)


def _sets(findings: Sequence[Finding]) -> Table:
    whole = ["all others of the layer"] * any(each.complement is not None for each in findings)
    table = new_table("set (layer: gates)", "set to 0 (95 %)", "to their means", *whole, "in the search", "each alone")
    for each in findings:
        table.add_row(
            _named(each.gates), _shown(each.zero), "" if each.mean is None else f"{each.mean.percent:+.2f} %",
            *(["" if each.complement is None else f"{each.complement.percent:+.2f} %"] * len(whole)),
            f"{each.searched:+.1f} %", ", ".join(f"{percent:+.1f}" for percent in each.alone) + " %",
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
    table = new_table("layer", "candidates", "all candidates removed", *names, "least important")
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
    shares, costs, moved = zip(*found.dead.curve, strict=True)
    alt = (
        f"{name}: what each layer's MLP carries, with {len(sets)} sets of gates, and the loss against the share of gates removed"
    )
    drawn = pictures.gates(whole, least, sets, [100 * share for share in shares], costs, moved, tolerance, alt)
    write_picture(path, pictures.standalone(drawn))
