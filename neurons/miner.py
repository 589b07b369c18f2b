"""The miner: `python neurons/miner.py --help`, or `sn29 miner --help`.

Trains a model on the competition's kind of text (or takes the folder that --model names), checks it as a validator would,
publishes it as one commit on the Hub, commits to it on chain, reads the commitment back. Killed anywhere, it goes on.

The repository is private from before the upload until the commitment is final. With --sealed the chain gets the digest
alone first, and where the model is when that is final; see `sn29.submission` for the order of the steps.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sn29 import telemetry
from sn29.errors import Reason, Rejected, Sn29Error
from sn29.rules.competition import Competition, HubDataset, tokenizer_for
from sn29.settings import MinerSettings, read

if TYPE_CHECKING:
    from sn29.hub import Hub
    from sn29.submission import FixedText


Chosen = TypeVar("Chosen")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when the commitment stands on chain, 1 when something was refused, with one line that says what."""
    try:
        settings = read(MinerSettings, sys.argv[1:] if arguments is None else arguments)
        telemetry.configure(as_json=settings.log_json, level=settings.log_level, file=settings.log_file)
        asyncio.run(run(settings))
    except Sn29Error as error:
        print(f"sn29 miner: {error}", file=sys.stderr)
        if isinstance(error, Rejected):
            print(f"  what to do: {error.reason.advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sn29 miner: stopped; start again with the same --work.dir to go on", file=sys.stderr)
        return 1
    return 0


async def run(settings: MinerSettings) -> None:
    """Train, check, publish, commit."""
    from neurons.adapters import Tokenizers, open_chain, read_files
    from sn29.hub import Hub
    from sn29.rules.schedule import in_force
    from sn29.submission import FixedText, check, submit

    file = chosen(read_files(settings).files, settings.competition)
    if "/" not in settings.repo:
        raise Rejected(Reason.SETTING, settings.repo or "nothing", "namespace/name", "--repo")
    hub = Hub(settings.hub_endpoint, token=settings.hub_token or None)
    chain = open_chain(settings)  # a missing key is said now, not after the training
    async with chain:
        competition = in_force(file, (await chain.head()).block)
    own = settings.model is None or (settings.model / "tokenizer.json").exists()
    prescribed = tokenizer_for(competition, own)
    tokenizers = Tokenizers(hub, settings.work_dir / "tokenizers")
    fixed = FixedText(*tokenizers(prescribed)) if prescribed else None
    telemetry.tell("started", f"miner {chain.hotkey} for {competition.name}", hotkey=chain.hotkey)
    folder = settings.model or train(settings, competition, hub, fixed)
    checked = await check(folder, competition, fixed, threads=settings.threads, deadline_s=900)
    for refusal in checked.refusals:
        telemetry.warn("check", str(refusal), hotkey=chain.hotkey, reason=refusal.reason.code)
    if checked.refusals and not settings.force:
        raise checked.refusals[0]
    if not checked.refusals:
        telemetry.tell("check", "a validator would evaluate this model", hotkey=chain.hotkey)
    async with chain:
        await submit(chain, hub, folder, settings.repo, competition, fixed, sealed=settings.sealed, force=settings.force)


def chosen(competitions: Mapping[str, Chosen], name: str) -> Chosen:
    """One of them by its name. Raises Rejected(UNKNOWN_COMPETITION)."""
    if name not in competitions:
        raise Rejected(Reason.UNKNOWN_COMPETITION, name, ", ".join(competitions), "--competition")
    return competitions[name]


def train(settings: MinerSettings, competition: Competition, hub: Hub, fixed: FixedText | None) -> Path:
    """A new model of the settings' shape, trained on the data set's training files; the checkpoint's folder."""
    import torch

    from sn29.models.tokenizer import Tokenizer
    from sn29.training.trainer import Progress, Recipe, Shape
    from sn29.training.trainer import train as train_model

    torch.set_num_threads(settings.threads)
    path = fixed.path if fixed else settings.tokenizer
    if path is None:
        raise Rejected(Reason.SETTING, "no --tokenizer", f"a tokenizer.json: {competition.name} has a free one", "--tokenizer")
    tokenizer = Tokenizer.load(path)
    texts = training_files(settings, competition, hub)
    shape = Shape(
        family=settings.family or competition.families[0],
        vocab_size=tokenizer.largest_id() + 1,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        max_positions=competition.limits.max_tokens,
        tied=settings.tied,
        start_token=start_token(competition, tokenizer),
    )
    recipe = Recipe(
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        max_tokens=settings.max_tokens,
        learning_rate=settings.learning_rate,
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.01,
        clip=1.0,
        seed=settings.seed,
        checkpoint_every=100,
        count_documents=2000 if settings.min_count else 0,
        min_count=max(1, settings.min_count),
    )

    def report(progress: Progress) -> None:
        if progress.step == 1 or progress.step % 20 == 0 or progress.step == recipe.steps:
            telemetry.tell(
                "training", f"step {progress.step} of {recipe.steps}", step=progress.step, steps=recipe.steps,
                loss=round(progress.loss_per_token, 4), tokens=progress.tokens_seen,
            )  # fmt: skip

    def documents(skip: int) -> Iterator[list[int]]:
        return tokenised(tokenizer, texts, competition.dataset.column, settings.seed, skip)

    folder = train_model(settings.work_dir / "training", shape, documents, recipe, report, settings.start)
    if fixed is None:
        shutil.copyfile(path, folder / "tokenizer.json")
    return folder


def tokenised(tokenizer, files, column: str, seed: int, skip: int) -> Iterator[list[int]]:  # type: ignore[no-untyped-def]
    """Token ids of the training documents from number `skip` on, for ever: pass after pass, each in another order."""
    from sn29.corpus import documents

    number = 0
    for passes in count():
        for text in documents(files, column, seed=seed + passes, shuffle_buffer=1000):
            if number >= skip:  # reading on is cheap (15,000 documents: 0.1 s), tokenising is not
                yield tokenizer.encode(text)
            number += 1


def start_token(competition: Competition, tokenizer) -> int:  # type: ignore[no-untyped-def]
    """The competition's, else the tokenizer's own beginning or end of text."""
    if competition.tokenizer.start_token is not None:
        return competition.tokenizer.start_token
    found = (tokenizer.id_of(token) for token in ("<s>", "<|endoftext|>", "</s>"))
    return next((token for token in found if token is not None), 0)


def training_files(settings: MinerSettings, competition: Competition, hub: Hub) -> tuple[Path, ...]:
    """The data set's training files on this disk, fetched and verified first when it lives on the Hub."""
    from fnmatch import fnmatch

    from sn29.hub import HubDataset as DatasetFiles
    from sn29.models.fetch import fetch
    from sn29.records import ModelId

    pattern, source = settings.text or competition.dataset.files, competition.dataset
    if isinstance(source, HubDataset):
        namespace, _, name = source.hub.partition("/")
        revision = source.revision or hub.resolve(source.hub, "dataset")
        folder = settings.work_dir / "text" / revision
        files_of = DatasetFiles(hub, source.hub, revision)
        listing = hub.listing(ModelId(namespace, name, revision), "dataset")
        fetch(files_of, listing, folder, only=lambda path: fnmatch(path, pattern), deadline_s=24 * 3600)
    else:
        folder = settings.competitions_dir / source.folder
    found = tuple(sorted(p for p in folder.rglob("*.parquet") if fnmatch(p.relative_to(folder).as_posix(), pattern)))
    if not found:
        raise Rejected(Reason.SETTING, pattern, "a pattern that matches a file of the data set", "--text")
    return found


if __name__ == "__main__":
    sys.exit(main())
