"""A training run of a competition, from settings: which text, which model, which recipe, and who is told.

`sn29 train` runs it alone, `neurons/miner.py` in slices. The run's folder also gets `training.json`: what is known of the
run beside its weights (what it was kept from reading, for `sn29 forecast`; the shards of its data, for a resumed run).
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29 import telemetry
from sn29.errors import Reason, Rejected, Unavailable
from sn29.rules.competition import Competition, tokenizer_for
from sn29.settings import TrainingSettings

if TYPE_CHECKING:
    from sn29.corpus import TextSource, TrainingText
    from sn29.hub import Hub
    from sn29.mining import Slice
    from sn29.models.tokenizer import Tokenizer
    from sn29.training.packing import Packing
    from sn29.training.parallel import World
    from sn29.training.trainer import Progress, Recipe, Shape

ABOUT = "training.json"
_TEXTS_AT_ONCE = 64
"""Documents that are tokenised together: the library then uses all cores."""
_PATIENCE_S = 600.0
"""Seconds for which text that cannot be read is asked for again, with pauses that double from one second."""
_USUAL_RATE = 6e-3
"""AdamW's learning rate where none is given: for models as small as the flags' defaults."""


def never() -> bool:
    return False


# --- text -------------------------------------------------------------------------------------------------------------


def sources_of(settings: TrainingSettings, competition: Competition, hub: Hub, competitions_dir: Path) -> list[TextSource]:
    """What is trained on: --data, else the competition's data sets by their weights, with --text as the files' pattern.

    Raises Rejected(SETTING) for a source that cannot be read as one.
    """
    from neurons.adapters import dataset_of
    from sn29.corpus import TextSource

    if settings.data:
        return [parse_source(text, hub) for text in settings.data]
    opened = dataset_of(hub, competitions_dir)
    return [
        TextSource(opened(competition, index), settings.text or source.files, source.column, source.weight)
        for index, source in enumerate(competition.datasets)
    ]


_SOURCE = re.compile(r"(?P<where>[^#]+?)(?:#(?P<column>[^#*]+))?(?:\*(?P<weight>[0-9.]+))?")


def parse_source(text: str, hub: Hub, flag: str = "--data") -> TextSource:
    """`FOLDER/GLOB` or `hub:NAMESPACE/NAME@REVISION/GLOB`, then `#COLUMN` (text) and `*WEIGHT` (1) where they are others.

        corpus/web/*.parquet#body*2      the files *.parquet of the folder corpus/web, column body, twice as often as others
        hub:HuggingFaceFW/fineweb@main/data/CC-MAIN-2024-10/*.parquet

    A folder or `hub:NAMESPACE/NAME@REVISION` alone stands for all its .parquet files, at any depth; a file for itself. A
    branch (default: main) is resolved once, when the run starts. Raises Rejected(SETTING), naming `flag`; Unavailable.
    """  # fmt: skip
    from sn29.corpus import LocalFile, LocalFolder, TextSource
    from sn29.hub import HubDataset
    from sn29.records import ModelId

    limit = "a folder, a .parquet file, FOLDER/GLOB or hub:NAMESPACE/NAME@REVISION/GLOB, then #COLUMN, *WEIGHT"
    found = _SOURCE.fullmatch(text)
    if found is None:
        raise Rejected(Reason.SETTING, text, limit, flag)
    where, column = found["where"], found["column"] or "text"
    try:
        weight = float(found["weight"] or 1)
    except ValueError:
        raise Rejected(Reason.SETTING, f"*{found['weight']} in {text}", "a weight that is a number", flag) from None
    if where.startswith("hub:"):
        name, _, rest = where.removeprefix("hub:").partition("@")
        revision, _, pattern = rest.partition("/")
        ModelId.parse(f"{name}@{'0' * 40}")  # whether the name can be one, before anybody is asked
        if not re.fullmatch("[0-9a-f]{40}", revision):
            revision = hub.resolve(name, "dataset", ref=revision or "main")
        return TextSource(HubDataset(hub, name, revision), pattern, column, weight)
    path = Path(where).expanduser()
    if path.is_dir():
        return TextSource(LocalFolder(path), "", column, weight)
    if path.is_file():
        return TextSource(LocalFile(path.parent, path.name), escape(path.name), column, weight)
    if not path.parent.is_dir() or escape(path.name) == path.name:  # a name without a star is not looked for in a whole tree
        raise Rejected(Reason.SETTING, where, limit, flag)
    return TextSource(LocalFolder(path.parent), path.name, column, weight)


class TokenStream:
    """The token ids of training text, exactly again from any document: `sn29.training.feed.Documents`."""

    def __init__(self, text: TrainingText, tokenizer: Tokenizer, asked_to_stop: Callable[[], bool] = never) -> None:
        self._text, self._tokenizer, self._asked_to_stop = text, tokenizer, asked_to_stop
        self._began = text.state_dict()
        self._held: list[list[int]] = []
        self._used = 0

    def __next__(self) -> list[int]:
        """Waits for text that cannot be read; raises Unavailable when that takes too long, or nobody waits any more."""
        if self._used == len(self._held):
            self._began, self._used = self._text.state_dict(), 0
            self._held = self._tokenizer.encode_batch(
                [_patiently(self._text, self._asked_to_stop) for _ in range(_TEXTS_AT_ONCE)]
            )
        self._used += 1
        return self._held[self._used - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"text": self._began, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises Rejected(SETTING) for a state of other files, seed or shards."""
        self._text.load_state_dict(state["text"])
        self._began, self._held, self._used = state["text"], [], 0
        for _ in range(state["used"]):
            next(self)


def _patiently(text: TrainingText, asked_to_stop: Callable[[], bool]) -> str:
    pause_s, begun = 1.0, time.monotonic()
    while True:
        try:
            return next(text)
        except Unavailable as error:
            if time.monotonic() - begun + pause_s > _PATIENCE_S:
                raise
            telemetry.warn("text", f"{error}; asked again in {pause_s:g} s")
            again = time.monotonic() + max(pause_s, error.retry_s or 0.0)
            while time.monotonic() < again:
                if asked_to_stop():
                    raise
                time.sleep(0.2)
            pause_s = min(2 * pause_s, 60.0)


# --- model and recipe -------------------------------------------------------------------------------------------------


def shape_for(settings: TrainingSettings, competition: Competition, tokenizer: Tokenizer, start: Path | None) -> Shape:
    """The start's, the config file's, or that of the flags. Raises Rejected as `shape_of`, BAD_CONFIG for too few rows."""
    from sn29.training.trainer import Shape, shape_of

    start_token = start_token_of(competition, tokenizer)
    rows = tokenizer.largest_id() + 1
    if given := start or settings.config_file:
        shape = shape_of(given, start_token, init_std=settings.init_std)
        if shape.vocab_size < rows:
            raise Rejected(Reason.VOCABULARY, f"vocab_size {shape.vocab_size}", f"at least the tokenizer's {rows}", str(given))
        return shape
    return Shape(
        family=settings.family or competition.families[0],
        vocab_size=rows,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        max_positions=competition.limits.max_tokens,
        tied=settings.tied,
        start_token=start_token,
        init_std=settings.init_std,
        num_kv_heads=settings.num_kv_heads,
    )


def start_token_of(competition: Competition, tokenizer: Tokenizer) -> int:
    """The competition's, else the tokenizer's own beginning or end of text."""
    if competition.tokenizer.start_token is not None:
        return competition.tokenizer.start_token
    found = (tokenizer.id_of(token) for token in ("<s>", "<|endoftext|>", "</s>"))
    return next((token for token in found if token is not None), 0)


def _end_token(tokenizer: Tokenizer, start_token: int) -> int:
    found = (tokenizer.id_of(token) for token in ("<|endoftext|>", "</s>"))
    return next((token for token in found if token is not None), start_token)


def packing_for(settings: TrainingSettings, competition: Competition, tokenizer: Tokenizer, start_token: int) -> Packing:
    """Raises Rejected(SETTING) for numbers that do not go together."""
    from sn29.training.packing import Mode, Packing

    row = settings.row_tokens or settings.max_tokens or min(2048, competition.limits.max_tokens)
    return Packing(
        mode=Mode(settings.packing),
        row_tokens=row,
        end_token=_end_token(tokenizer, start_token),
        start_token=None if settings.start_token == "none" or settings.packing == "packed" else start_token,
        score_end=settings.score_end,
        context=row // 8 if settings.context < 0 else settings.context,
    )


def recipe_for(settings: TrainingSettings, packing: Packing, shards: int) -> Recipe:
    """Raises Rejected(SETTING) for an optimizer that is none, or whose package is not installed, and a rate that only rises."""
    from sn29.training.optimizers import kind_of
    from sn29.training.trainer import Recipe

    usual = _USUAL_RATE * kind_of(settings.optimizer).usual_rate
    if settings.warmup_steps > settings.steps:
        got = f"{settings.warmup_steps} steps in which the rate rises"
        raise Rejected(Reason.SETTING, got, f"at most all {settings.steps} steps", "--warmup-steps")
    return Recipe(
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        max_tokens=settings.max_tokens,
        learning_rate=settings.learning_rate or usual,
        warmup_steps=max(1, settings.steps // 20) if settings.warmup_steps < 0 else settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        seed=settings.seed,
        checkpoint_every=settings.checkpoint_every,
        packing=packing,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        decay_share=settings.decay_share,
        dtype=settings.train_dtype,
        accumulation=settings.accumulation,
        shards=shards,
        activation_checkpointing=settings.activation_checkpointing,
        compile=settings.compile,
        pool_documents=settings.pool_documents,
        count_documents=2000 if settings.min_count else 0,
        min_count=max(1, settings.min_count),
    )


def tokenizer_of(settings: TrainingSettings, competition: Competition, hub: Hub, start: Path | None) -> tuple[Path, bool]:
    """(tokenizer.json, whether it has to lie beside the model).

    The competition's fixed one, fetched and checked; where models bring their own: the start's, whose weights mean its ids,
    else --tokenizer, else the competition's default. Raises Rejected(SETTING | TOKENIZER), Unavailable.
    """
    from neurons.adapters import Tokenizers

    own = start / "tokenizer.json" if start and (start / "tokenizer.json").is_file() else settings.tokenizer
    prescribed = tokenizer_for(competition, own is not None)
    if prescribed is not None:
        return Tokenizers(hub, settings.work_dir / "tokenizers")(prescribed).path, False
    if own is None or not own.is_file():
        got = f"no file {own}" if own else "no --tokenizer"
        raise Rejected(Reason.SETTING, got, f"a tokenizer.json: {competition.name} has a free one", "--tokenizer")
    return own, True


# --- where it begins --------------------------------------------------------------------------------------------------


def fetched_start(start: str, competition: Competition, hub: Hub, work_dir: Path, records: Path | None) -> Path | None:
    """The folder that a run begins from; None for fresh weights.

    `start`: empty, a folder, NAMESPACE/NAME@REVISION (a branch stands for what it points to now), or `champion`: what holds
    the crown by the newest of a validator's records. From the Hub it is inspected before it is fetched into
    `work_dir/starts/REVISION`, and every file is checked. Raises Rejected(SETTING), as `checkpoint.inspect`, Unavailable.
    """
    from sn29.mining import CHAMPION

    if not start:
        return None
    if start == CHAMPION:
        start = champion_of(competition.name, records)
    elif Path(start).expanduser().is_dir():
        return Path(start).expanduser()
    limit = "a checkpoint's folder that exists, NAMESPACE/NAME@REVISION, or champion"
    return fetched_model(start, hub, work_dir, "--start", limit)[0]


def fetched_model(
    name: str,
    hub: Hub,
    work_dir: Path,
    flag: str,
    limit: str = "a model's folder that exists, or NAMESPACE/NAME@REVISION",
    *,
    tidy: bool = False,
) -> tuple[Path, str]:
    """(folder, NAMESPACE/NAME@REVISION with the commit's 40 digits) of a model on the Hub, inspected before it is fetched.

    `tidy`: files that a model may not bring into a competition are left there; else they are refused. Raises
    Rejected(SETTING) naming the flag and the limit for a name that is none, as `checkpoint.inspect`, Unavailable.
    """
    from sn29.models import checkpoint
    from sn29.models.fetch import fetch
    from sn29.records import ModelId

    repo, at, revision = name.rpartition("@")
    if not at:
        raise Rejected(Reason.SETTING, name, limit, flag)
    if not re.fullmatch("[0-9a-f]{40}", revision):
        revision = hub.resolve(repo, ref=revision)
    listing = hub.listing(ModelId.parse(f"{repo}@{revision}"))
    if tidy:
        listing = replace(listing, files=tuple(file for file in listing.files if checkpoint.is_allowed(file.path)))
    folder = work_dir / "starts" / revision
    if not folder.is_dir():
        checkpoint.inspect(listing, hub.reader(listing))
        telemetry.tell("start", f"fetching {repo}@{revision}")
        fetch(hub, listing, folder, only=checkpoint.is_content, deadline_s=24 * 3600)
    return folder, f"{repo}@{revision}"


def champion_of(competition: str, records: Path | None) -> str:
    """namespace/name@revision of who has the largest weight in the newest record. Raises Rejected(SETTING | RECORD)."""
    from sn29.mining import CHAMPION, holder_in

    if records is None:
        raise Rejected(Reason.SETTING, "no --records", "a folder of a validator's round records", f"--start {CHAMPION}")
    holder = holder_in(records, competition)
    if holder is None or not holder.outcome.model:
        raise Rejected(Reason.SETTING, f"nobody holds the crown of {competition}", "a holder to begin from", str(records))
    return holder.outcome.model


# --- the run ----------------------------------------------------------------------------------------------------------


def train_for(
    settings: TrainingSettings,
    competition: Competition,
    hub: Hub,
    asked: Slice,
    asked_to_stop: Callable[[], bool] = never,
    *,
    competitions_dir: Path | None = None,
    told: Callable[[Progress, Watch], None] | None = None,
    saved: Callable[[int], None] = lambda step: None,
    world: World | None = None,
) -> Path:
    """A slice of a training run in `asked.folder`, or the rest of one that was cut off: the checkpoint's folder.

    `asked.start` is as in `fetched_start`, and looked at only when the folder holds no run yet. `told` hears of every step
    (default: an event for every 20th); `asked_to_stop` is looked at after each, and then a checkpoint is written. Every
    process of a `world` calls this with the same arguments. Raises what `trainer.train`, the text, tokenizer and Hub raise.
    """
    import torch

    from sn29.corpus import TrainingText
    from sn29.models.tokenizer import Tokenizer
    from sn29.training.parallel import alone, threads_of
    from sn29.training.trainer import check_world, train

    torch.set_num_threads(threads_of(settings.threads))
    world, folder = world or alone(settings.train_device), asked.folder
    about = _about(folder)
    start = _in_turn(world, lambda: _start_of(settings, competition, hub, asked))
    path, is_own = _in_turn(world, lambda: tokenizer_of(settings, competition, hub, start))
    tokenizer = Tokenizer.load(path)
    resumed = bool(asked.start or settings.config_file) and (folder / "state.pt").exists() and "shape" in about
    shape = _shape_in(about, folder) if resumed else shape_for(settings, competition, tokenizer, start)
    packing = packing_for(settings, competition, tokenizer, shape.start_token)
    recipe = recipe_for(settings, packing, settings.shards or about.get("shards") or world.processes)
    where = competitions_dir or settings.competitions_dir  # type: ignore[attr-defined]
    sources = world.together(lambda: sources_of(settings, competition, hub, where))

    def open_documents(shard: int, shards: int) -> TokenStream:
        text = TrainingText(
            sources, seed=settings.seed, shards=shards, shard=shard, exclude=asked.exclude, max_chars=competition.limits.max_chars
        )
        return TokenStream(text, tokenizer, asked_to_stop)

    check_world(recipe, world)
    if world.is_first:
        _write_about(about, settings, shape, recipe, asked)
    watch = Watch(settings, folder, world, told)
    try:
        return train(
            folder, shape, open_documents, recipe, watch.step, start,
            until=asked.until, asked_to_stop=asked_to_stop, saved=saved, beside={"tokenizer.json": path} if is_own else {},
            world=world,
        )  # fmt: skip
    finally:
        watch.close()
        if world.device.startswith("cuda"):  # for whoever measures the checkpoint next, in a process of its own
            gc.collect()
            torch.cuda.empty_cache()


def _in_turn(world: World, work: Callable[[], Any]) -> Any:
    """What downloads is done by the first process, and by the others when it lies there. What is raised, all raise."""
    found = world.together(lambda: work() if world.is_first else None)
    return world.together(lambda: found if world.is_first else work())


def _start_of(settings: TrainingSettings, competition: Competition, hub: Hub, asked: Slice) -> Path | None:
    from sn29.training.trainer import mend

    if (asked.folder / "state.pt").exists():  # its own weights are newer; only shape and tokenizer are taken from there
        mend(asked.folder)
        return asked.folder / "checkpoint" if asked.start and (asked.folder / "checkpoint").is_dir() else None
    return fetched_start(asked.start, competition, hub, settings.work_dir, settings.records)


def _about(folder: Path) -> dict[str, Any]:
    """What training.json says; empty for a new run, or a file that is not ours."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shape_in(about: Mapping[str, Any], folder: Path) -> Shape:
    from sn29.training.trainer import Shape

    try:
        return Shape(**about["shape"])
    except TypeError as error:
        limit = "the shape of a run of this version; another --work.dir begins anew"
        raise Rejected(Reason.SETTING, str(error), limit, str(folder / ABOUT)) from None


def _write_about(before: Mapping[str, Any], settings: TrainingSettings, shape: Shape, recipe: Recipe, asked: Slice) -> None:
    """What was never read in the run so far: only that may a later slice still call left out."""
    folder, excluded = asked.folder, set(asked.exclude)
    if (folder / "state.pt").exists():
        excluded &= set(before.get("excluded", ()))
    said = {
        "began": before.get("began", time.time()),
        "competition": settings.competition,
        "start": before.get("start", asked.start),
        "shards": recipe.shards,
        "shape": asdict(shape),
        "recipe": asdict(recipe),
        "excluded": sorted(excluded),
    }
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{ABOUT}.new"
    with new.open("w", encoding="utf-8") as out:
        json.dump(said, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    new.replace(folder / ABOUT)


# --- who is told ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """What is said of a run while it runs."""

    settings: TrainingSettings
    folder: Path
    world: World
    told: Callable[[Progress, Watch], None] | None = None
    seconds: list[float] = field(default_factory=list)
    """Of the last steps."""
    _log: telemetry.Curves | None = None
    _peak: float | None = None

    def step(self, progress: Progress) -> None:
        self.seconds = [*self.seconds[-49:], progress.seconds]
        if self.settings.wandb:
            self._to_wandb(progress)
        (self.told or _tell)(progress, self)

    def seconds_left(self, progress: Progress) -> float:
        """By the mean of the last 50 steps."""
        return (progress.steps - progress.step) * sum(self.seconds) / len(self.seconds)

    def utilisation(self, progress: Progress) -> float | None:
        """Share of the devices' peak that went into the model (MFU), by the step alone; None where no peak is known."""
        if self._peak is None:
            self._peak = self.settings.peak_tflops or _peak_of(self.world) * self.world.processes
        return progress.flops / progress.seconds / (self._peak * 1e12) if self._peak else None

    def _to_wandb(self, progress: Progress) -> None:
        if self._log is None:
            about = _about(self.folder)
            self._log = telemetry.Curves(self.settings.wandb, self.folder, about)
        values = {
            "loss": progress.loss_per_token, "tokens": progress.tokens_seen, "learning_rate": progress.learning_rate,
            "gradient_norm": progress.gradient_norm, "tokens_per_second": progress.tokens_per_second,
        }  # fmt: skip
        if (share := self.utilisation(progress)) is not None:
            values["mfu"] = share
        self._log.log(values, step=progress.step)

    def close(self) -> None:
        if self._log is not None:
            self._log.finish()


def _peak_of(world: World) -> float:
    """TFLOP/s of one device; 0 where it is not known."""
    if not world.device.startswith("cuda"):
        return 0.0
    import torch

    from sn29.training.devices import SHEETS, sheet_name

    name = sheet_name(torch.cuda.get_device_name(world.device))
    return SHEETS[name].peak / 1e12 if name else 0.0


def _tell(progress: Progress, watch: Watch) -> None:
    telemetry.stage("training", progress.step, progress.steps)
    if progress.step == 1 or progress.step % 20 == 0 or progress.step == progress.steps:
        telemetry.tell(
            "training", f"step {progress.step} of {progress.steps}", step=progress.step, steps=progress.steps,
            loss=round(progress.loss_per_token, 4), tokens=progress.tokens_seen,
            tokens_per_s=round(progress.tokens_per_second), left_s=round(watch.seconds_left(progress)),
        )  # fmt: skip
