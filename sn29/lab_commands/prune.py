"""`sn29 lab vocab prune`: model and tokenizer without what a text never uses, written when the proof holds."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected, Unavailable

if TYPE_CHECKING:
    from sn29.lab.grow import Grown
    from sn29.lab.losses import Change
    from sn29.lab.pruning import Effect, LossProof, RoundTrips, Rows, Segmentation
    from sn29.lab.vocabulary import Kept, Pruned, Vocabulary
    from sn29.lab.weights import Card, Report, Source, Weights
    from sn29.lab_settings import LabVocabPruneSettings
    from sn29.models.tokenizer import Tokenizer

_IDENTITY = "new loss = old loss + log of the mass kept"
_REASONS = {
    "used": "what occurs in the text",
    "spelling": "bytes and letters, so that every text can be spelled",
    "added": "special and added tokens",
    "listed": "asked for with --keep",
    "ancestors": "parts on the way to these",
}


@dataclass(frozen=True, slots=True)
class Text:
    """What has been read of the corpus."""

    name: str
    documents: int
    tokens: int
    used: tuple[int, ...]
    """Ids that occur --min-count times."""
    rare: tuple[int, ...]
    """Ids that occur less often."""
    lines: tuple[str, ...]
    """Of --keep."""
    listed: tuple[int, ...]
    """Their ids."""
    counted: tuple[str, ...]
    """The first --proof-documents of those counted."""
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown of the new tokenizer and the new model."""

    counted: Segmentation
    held_out: Segmentation | None
    random: RoundTrips
    """Of random texts, and of the spellings of what went."""
    fingerprint: str
    """Of the new tokenizer."""
    losses: LossProof
    """Of documents that are cut as before, counted and held-out ones."""
    on_counted: Effect | None
    recut_counted: Effect | None
    """Those of the measured counted documents that are cut otherwise, as --min-count has it; None without one."""
    on_held_out: Effect | None
    recut_held_out: Effect | None


def prune(words: list[str]) -> int:
    """0: the proof holds and the model is written. Raises Rejected when it does not."""
    from sn29.lab_settings import LabVocabPruneSettings
    from sn29.settings import read

    settings = read(LabVocabPruneSettings, words)
    if not settings.model or settings.out is None:
        missing = "MODEL" if not settings.model else "--out"
        raise Rejected(Reason.SETTING, f"no {missing}", "a model and a new folder for --out")
    _check_out(settings.out)
    work = prepared(settings, words)
    made = work.write()
    if settings.json_output:
        print(json.dumps(made.as_json(), indent=1))
    else:
        made.show(settings.out)
    return 0


def _check_out(out: Path) -> None:
    """Before the long count. Raises Rejected as `check_free`, Unavailable where no folder can be made."""
    from sn29.lab.weights import check_free, left_behind

    check_free(out)
    try:
        there = next(path for path in out.absolute().parents if path.exists())
        tempfile.TemporaryDirectory(prefix=f".{out.name}.try-", dir=there).cleanup()
    except OSError as error:
        raise Unavailable(str(out), f"the disk: {error.strerror}") from None
    for left in left_behind(out):
        print(f"  {left}: of another run to {out}, to be deleted if none is at work", file=sys.stderr)


def prepared(settings: LabVocabPruneSettings, words: list[str]) -> Work:
    """All that is to be written, before it is proved. Raises Rejected, Unavailable."""
    from sn29.lab.pruning import Beside, named_ids, rows_of, with_rows
    from sn29.lab.reinvest import reinvested
    from sn29.lab.vocabulary import Vocabulary, kept, without_the_rest
    from sn29.lab.weights import check_room, open_weights, source_of
    from sn29.lab_commands.inputs import model_folder

    assert settings.out is not None
    folder, name = model_folder(settings.model, settings.hub_endpoint, settings.work_dir)
    weights, beside = open_weights(folder), Beside.read(folder)
    check_room(settings.out, weights.num_bytes * (1 if settings.reinvest == "nothing" else 2))  # the pruned one, and the grown
    vocabulary, tokenizer = Vocabulary.read(settings.tokenizer or folder / "tokenizer.json")
    if vocabulary.num_ids > (rows := weights.config.number("vocab_size")):
        raise Rejected(Reason.VOCABULARY, f"{rows} rows", f"at least the tokenizer's {vocabulary.num_ids}", name)
    named = {weights.config.start_token, *named_ids(weights.raw, "config.json"), *beside.ids(vocabulary)}
    text = _read(settings, vocabulary, tokenizer)
    stays = kept(vocabulary, text.used, listed=text.listed, named=named)
    pruned = without_the_rest(vocabulary, stays.entries)
    rows_kept = rows_of(pruned, weights.config, named, settings.multiple)
    new, grown = with_rows(weights, rows_kept), None
    if settings.reinvest != "nothing":
        grown = reinvested(new, weights.num_parameters, settings.reinvest, seed=settings.seed)
    return Work(
        settings, tuple(words), folder, source_of(folder, name), text, stays, vocabulary, tokenizer, pruned, rows_kept, weights,
        new, grown, beside.renamed(pruned, rows_kept.new_id), _not_taken(settings.model),
    )  # fmt: skip


def _not_taken(model: str) -> tuple[str, ...]:
    """Files of a folder that stay behind: the old vocabulary in other forms, and what validators allow no model."""
    from sn29.lab.pruning import STALE
    from sn29.lab_commands.inputs import local_path
    from sn29.models.checkpoint import is_allowed

    folder = local_path(model)
    found = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return tuple(name for name in found if name in STALE or not (is_allowed(name) or name.startswith(".")))


def _read(settings: LabVocabPruneSettings, vocabulary: Vocabulary, tokenizer: Tokenizer) -> Text:
    """One pass: of every twenty documents one is held out, up to --held-out; the others are counted. Raises as `encoded`."""
    import numpy as np

    from sn29.lab.vocabulary import Usage
    from sn29.lab_commands.vocabulary import encoded, open_corpus

    lines = tuple(filter(None, _lines(settings.keep)))
    listed = {id_ for ids in tokenizer.encode_batch(lines) for id_ in ids}
    opened = open_corpus(settings.text, settings.hub_endpoint, "--text")
    held_out: dict[str, None] = {}
    usage = Usage(vocabulary)
    counted: list[str] = []
    first = None  # is counted in any case: it may be the only one
    for texts, ids in encoded(opened, tokenizer, settings.seed, settings.max_documents):
        some = [(text, each) for text, each in zip(texts, ids, strict=True) if each]
        for text, _ in some:
            first = text if first is None else first
            if len(held_out) < settings.held_out and text != first and _is_drawn(text):
                held_out[text] = None
        here = [(text, each) for text, each in some if text not in held_out]
        usage.add([each for _, each in here], sum(len(text.encode()) for text, _ in here))
        counted += [text for text, _ in here[: max(0, settings.proof_documents - len(counted))]]
    counts = usage.finish()
    used, rare = (
        tuple(np.flatnonzero(where).tolist())
        for where in (counts >= settings.min_count, (counts > 0) & (counts < settings.min_count))
    )
    return Text(
        opened.name, usage.documents, int(counts.sum()), used, rare, lines, tuple(listed), tuple(counted), tuple(held_out)
    )  # fmt: skip


def _is_drawn(text: str) -> bool:
    """One text of twenty, the same ones wherever they stand."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % 20 == 0


def _lines(path: Path | None) -> list[str]:
    try:
        return [] if path is None else path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(Reason.SETTING, error, "a text file in UTF-8", "--keep") from None


# --- proving and writing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """All that a pruned model is made of."""

    settings: LabVocabPruneSettings
    words: tuple[str, ...]
    folder: Path
    source: Source
    text: Text
    stays: Kept
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    pruned: Pruned
    rows: Rows
    old: Weights
    new: Weights
    grown: Grown | None
    files: dict[str, bytes | None]
    not_taken: tuple[str, ...]

    def write(self) -> Made:
        """Raises Rejected when a proof fails: then nothing is there."""
        from sn29.lab.weights import save, scratch_beside
        from sn29.lab_commands.inputs import progress

        out, grown = self.settings.out, self.grown
        assert out is not None
        tokens = self._tokens()
        made: list[Made] = []
        with progress(f"writing and proving {out.name}") as report, scratch_beside(out) as scratch:

            def proved(folder: Path) -> Card:
                made.append(Made(self, self._losses(folder, tokens, report), None))
                return made[-1].card()

            def proved_again(folder: Path) -> Card:
                """Of the grown model, against the pruned one beside it."""
                made.append(Made(self, made[-1].proof, self._step(small, folder, tokens.after, report)))
                return made[-1].card()

            small = out if grown is None else scratch / "pruned"
            save(self.new, small, proved, beside=self.folder, files=self.files, report=report)
            if grown is not None:
                save(grown.weights, out, proved_again, beside=self.folder, files=self.files, report=report)
        return made[-1]

    def _step(self, small: Path, grown: Path, tokenizer: Tokenizer, report: Report) -> Change:
        """What growing did to the losses of counted documents. Raises Rejected when it is not lossless."""
        from sn29.lab.grow import LOSSLESS
        from sn29.lab.losses import change, document_nats

        documents = [pair.new for pair in self._pairs(self.text.counted, tokenizer)]
        found = [document_nats(folder, documents, report=report, **self._how) for folder in (small, grown)]
        step = change(*found)
        if step.largest > LOSSLESS:
            got = f"a loss that growing changes by {step.largest:.2g}"
            raise Rejected(Reason.CLAIM, got, f"at most {LOSSLESS:g}", "--reinvest")
        return step

    @property
    def _how(self) -> dict[str, Any]:
        return {"threads": self.settings.threads, "memory_bytes": int(self.settings.memory_gb * 1e9)}

    def _tokens(self) -> _Tokens:
        """The proof of the tokenizer alone. Raises Rejected when it fails."""
        from sn29.lab.vocabulary import Vocabulary

        with tempfile.TemporaryDirectory(prefix="sn29-prune-") as scratch:
            path = Path(scratch) / "tokenizer.json"
            path.write_bytes(self.pruned.as_json())
            again, after = Vocabulary.read(path)
        if again.ids != self.pruned.vocabulary.ids:
            raise _failed("other ids than were given", "the library's own numbers")
        if wrong := [entry for entry, id_ in again.ids.items() if self.rows.old[id_] != self.vocabulary.ids[entry]]:
            raise _failed(f"another row for {wrong[0]!r}", "for each entry the row that it had")
        counted, held_out, lines = (self._cut(each, after) for each in (self.text.counted, self.text.held_out, self.text.lines))
        broken, of = counted.broken + held_out.broken, counted.documents + held_out.documents
        if broken:
            raise _failed(f"{broken:,} of {of:,} documents cut otherwise", "none of those whose tokens all stay")
        exact = [("counted documents", counted)] * (self.settings.min_count == 1) + [("lines of --keep", lines)]
        for what, found in exact:
            if otherwise := found.documents - found.unchanged:
                raise _failed(f"{otherwise:,} of {found.documents:,} {what} cut otherwise", "none")
        return _Tokens(counted, held_out if held_out.documents else None, self._round_trips(after), after)

    def _round_trips(self, after: Tokenizer) -> RoundTrips:
        """Of random texts and the spellings of what went. Raises Rejected when one comes back as it did not before."""
        from sn29.lab.pruning import random_texts, round_trips, spellings

        went, seed = sorted(set(self.vocabulary.ids.values()) - self.pruned.new_id.keys()), self.settings.seed
        texts = [*random_texts(self.settings.random_texts, seed), *spellings(self.tokenizer, went, seed)]
        found = round_trips(self.tokenizer, after, texts)
        if found.different:
            got = f"{len(found.different)} of {found.texts:,} texts come back otherwise, the first {found.different[0]!r}"
            raise _failed(got, "as they did before")
        if _is_lossless(self.tokenizer) and not _is_lossless(after):
            raise _failed("a text that does not come back", "every text, as before")
        return found

    def _cut(self, texts: Sequence[str], after: Tokenizer) -> Segmentation:
        from sn29.lab.pruning import Segmentation, segmentation
        from sn29.lab_commands.inputs import progress
        from sn29.lab_commands.vocabulary import AT_ONCE

        found = Segmentation()
        with progress("cutting documents with both tokenizers") as report:
            for at in range(0, len(texts), AT_ONCE):
                part = texts[at : at + AT_ONCE]
                found += segmentation(self.tokenizer.encode_batch(part), after.encode_batch(part), self.pruned)
                report(found.documents, len(texts))
        return found

    def _losses(self, folder: Path, tokens: _Tokens, report: Report) -> Proof:
        """The proof of the model in its files. Raises Rejected when it fails."""
        from sn29.lab.pruning import MAX_ERROR, DocumentLoss, check_tensors, effect, loss_proof, summed

        check_tensors(self.old, folder, self.rows)
        counted, held_out = self._pairs(self.text.counted, tokens.after), self._pairs(self.text.held_out, tokens.after)
        both = counted + held_out
        before, after = [pair.old for pair in both], [pair.new for pair in both]
        if not any(pair.is_same for pair in both):
            limit = "one at least: more --documents, or a lower --min-count"
            raise Rejected(Reason.SETTING, "no document that is cut as before", limit, "the losses' proof")
        found = loss_proof(self.folder, folder, before, after, self.rows, report=report, **self._how)
        proved = summed([loss for loss, pair in zip(found, both, strict=True) if pair.is_same])
        if not proved.holds:
            got = f"an error of {proved.error:.2g}, {proved.risen} documents that cost more"
            raise Rejected(Reason.CLAIM, got, f"at most {MAX_ERROR:g}, none", _IDENTITY)

        def effects(losses: Sequence[DocumentLoss], pairs: Sequence[_Pair]) -> list[Effect | None]:
            """On all, and on those that are cut otherwise."""
            return [effect(losses), effect([loss for loss, pair in zip(losses, pairs, strict=True) if not pair.is_same])]

        first = len(counted)
        costs = (*effects(found[:first], counted), *effects(found[first:], held_out))
        return Proof(tokens.counted, tokens.held_out, tokens.random, tokens.after.fingerprint(), proved, *costs)

    def _pairs(self, texts: Sequence[str], after: Tokenizer) -> list[_Pair]:
        """The documents that losses are measured on, those without a token left out."""
        found = (self._pair(text, after) for text in texts[: self.settings.documents])
        return [pair for pair in found if pair.old]

    def _pair(self, text: str, after: Tokenizer) -> _Pair:
        """The first --max-tokens of a text. One that is cut otherwise has no place at which both could be cut off: the text
        itself is made shorter, until neither has more (and perhaps what is left is cut as before)."""
        from sn29.lab.pruning import is_same

        while True:
            old, new = self.tokenizer.encode(text), after.encode(text)
            longest = max(len(old), len(new))
            most = self.settings.max_tokens or longest
            if (same := is_same(old, new, self.pruned)) or longest <= most:
                return _Pair(old[:most], new[:most], same)
            text = text[: len(text) * most // longest]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A document as both tokenizers cut it."""

    old: list[int]
    new: list[int]
    is_same: bool


@dataclass(frozen=True)
class _Tokens:
    counted: Segmentation
    held_out: Segmentation | None
    random: RoundTrips
    after: Tokenizer


def _failed(got: str, limit: str) -> Rejected:
    return Rejected(Reason.CLAIM, got, limit, "the pruned tokenizer")


def _is_lossless(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.check_lossless()
    except Rejected:
        return False
    return True


# --- what is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A pruned model, proved."""

    work: Work
    proof: Proof
    step: Change | None
    """What growing did; None: not grown."""

    @property
    def stays(self) -> dict[str, int]:
        return {name: len(getattr(self.work.stays, name)) for name in _REASONS}

    @property
    def said(self) -> tuple[str, ...]:
        return () if self.step is None or self.work.grown is None else tuple(self.work.grown.said)

    @property
    def parameters(self) -> dict[str, int]:
        before, pruned = self.work.old.num_parameters, self.work.new.num_parameters
        grown = None if self.step is None else self.work.grown
        return {"before": before, "pruned": pruned, "after": pruned if grown is None else grown.weights.num_parameters}

    def rows(self) -> list[tuple[str, str]]:
        """Every figure as (name, value)."""
        proof, rows = self.proof, self.work.rows
        entries, settings = len(self.work.pruned.vocabulary), self.work.settings
        text, (before, pruned, _) = self.work.text, self.parameters.values()
        named = [(_REASONS[reason], count) for reason, count in self.stays.items() if count]
        went = sum(id_ not in self.work.pruned.new_id for id_ in text.rare)
        to = f"up to {settings.max_tokens:,} tokens" if settings.max_tokens else "whole"
        return [
            ("text that was counted", f"{text.name}: {text.documents:,} documents, {text.tokens:,} tokens"),
            *((f"stay: {what}", f"{count:,}") for what, count in named),
            *([(f"go though they occur, less than {settings.min_count} times", f"{went:,}")] if settings.min_count > 1 else []),
            ("entries", f"{len(self.work.vocabulary):,} to {entries:,}"),
            ("rows of the embedding", f"{rows.of:,} to {len(rows.old):,}, {len(rows.old) - entries:,} of them without an entry"),
            ("parameters", f"{before:,} to {pruned:,} ({pruned / before - 1:+.2%})"),
            ("counted documents cut as before", f"{proof.counted.unchanged:,} of {proof.counted.documents:,}"),
            ("texts (random ones, spellings of what went) that come back as before",
             f"{proof.random.texts:,}, {proof.random.whole:,} of them to the character"),
            ("documents that losses are measured on", f"{to}, in float32"),
            (f"error of {_IDENTITY}", f"at most {proof.losses.error:.1e} ({proof.losses.documents} documents)"),
            ("loss by renormalisation alone", _effect(proof.losses.effect)),
            *(_costs("counted", proof.counted, proof.on_counted, proof.recut_counted) if settings.min_count > 1 else []),
            *_costs("held-out", proof.held_out, proof.on_held_out, proof.recut_held_out),
            ("fingerprint of the new tokenizer", proof.fingerprint),
            *self._grown(),
            *([("files that were not taken", ", ".join(self.work.not_taken))] if self.work.not_taken else []),
        ]  # fmt: skip

    def _grown(self) -> list[tuple[str, str]]:
        if self.step is None:
            return []
        before, pruned, after = self.parameters.values()
        spent = f"{after - pruned:,} of {before - pruned:,} ({(after - pruned) / (before - pruned):.1%})"
        return [
            ("freed parameters that were spent again", spent),
            ("parameters with these", f"{after:,} ({after / before - 1:+.3%})"),
            ("largest change of a loss by that", f"{self.step.largest:.1e}"),
        ]  # fmt: skip

    def card(self) -> Card:
        from sn29.lab.weights import Card
        from sn29.lab_commands.inputs import command_line

        least = self.work.settings.min_count
        used = "never uses" if least == 1 else f"uses less than {least} times"
        what = (
            f"The vocabulary without entries that a text {used}, and the embedding and head without their rows. Everything "
            "else of the model is the same to the bit. Texts made of what stays are cut as before, and every text comes back as "
            "it did before. The loss of a text that is cut as before is the old one plus the log of the probability that the "
            "old model had left for what stays, so it is lower.",
            *self.said,
        )
        command = command_line("lab vocab prune", self.work.words)
        return Card(f"{self.work.source.name}, vocabulary pruned", what, (self.work.source,), command, self.rows())

    def as_json(self) -> dict[str, object]:
        text, proof = self.work.text, asdict(self.proof)
        held = self.proof.held_out
        return {
            "text": {"source": text.name, "documents": text.documents, "tokens": text.tokens},
            "stays": self.stays,
            "entries": {"before": len(self.work.vocabulary), "after": len(self.work.pruned.vocabulary)},
            "rows": {"before": self.work.rows.of, "after": len(self.work.rows.old)},
            "parameters": self.parameters,
            "min_count": self.work.settings.min_count,
            "not_taken": self.work.not_taken,
            "proof": proof,
            "held_out": None if held is None else {"changed_share": held.changed_share, "inflation": held.inflation},
            "reinvested": None if self.step is None else {"said": self.said, "step": asdict(self.step)},
        }

    def show(self, out: Path) -> None:
        from rich.console import Console

        from sn29.lab_commands.inputs import new_table, say

        console = Console()
        shown = new_table(f"{self.work.source.name}, pruned", "")
        shown.columns[1].justify = "left"
        for name, value in self.rows():
            shown.add_row(name, value)
        console.print(shown)
        say(console, *self.said, f"The model: {out}")
        if self.proof.on_held_out is not None and self.proof.on_held_out.percent > 0:
            say(console, "Text that was not counted costs more now: count more of it.")
        say(console, "A competition that prescribes its tokenizer refuses this model; one with a free tokenizer takes it.")


def _costs(which: str, cut: Segmentation | None, on_all: Effect | None, recut: Effect | None) -> list[tuple[str, str]]:
    """What it costs that documents are cut otherwise."""
    if cut is None:
        return []
    measured = [("", on_all), (" that are cut otherwise", recut)]
    return [
        (f"{which} documents cut otherwise", f"{cut.changed_share:.1%} of {cut.documents:,}"),
        (f"tokens of {which} documents", f"{cut.inflation:+.3%}"),
        *((f"loss of {found.documents} {which} documents{what}", _effect(found)) for what, found in measured if found),
    ]


def _effect(found: Effect | None) -> str:
    assert found is not None, "of documents that there are"
    each = found.interval
    told = "too few documents for an interval" if each is None else f"{each.low:+.3f} to {each.high:+.3f}"
    return f"{found.before:,.1f} to {found.after:,.1f} nats, {found.percent:+.3f} % ({told})"
