"""`sn29 forecast`: would this checkpoint win if it were committed now, how surely, and what is missing."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.concealment import clean
from sn29.errors import Reason, Rejected, Unavailable

if TYPE_CHECKING:
    from sn29.forecast import Forecast, Progress
    from sn29.hub import Hub
    from sn29.rules.competition import Competition
    from sn29.settings import ForecastSettings
    from sn29.submission import FixedText

DOING = {
    "check": "the checks of a validator",
    "draw": "texts of the recorded window",
    "measure": "losses on them",
    "decide": "windows to come",
}


def forecast(words: list[str]) -> int:
    """CHECKPOINT: a folder, or REPO@REVISION."""
    from sn29.settings import ForecastSettings, read

    settings = read(ForecastSettings, words)
    records, written, block = _records(settings)
    from neurons.adapters import read_competitions
    from neurons.miner import chosen
    from sn29.hub import Hub

    competition = chosen(read_competitions(settings.competitions_dir, settings.now or block)[0], settings.competition)
    hub = Hub(settings.hub_endpoint)
    try:
        found = _forecast(settings, competition, hub, records)
    except Unavailable as error:
        if settings.json_output:
            print(json.dumps({"competition": competition.name, "accepted": None, "unavailable": clean(error)}, indent=2))
        else:
            print(f"sn29 forecast: nothing is known, try again: {clean(error)}", file=sys.stderr)
        return 2
    if settings.json_output:
        print(json.dumps(as_json(found), indent=2))
    else:
        print("\n".join(told(found, datetime.now(UTC) if settings.now else written)))
    if not found.accepted:
        return 1
    return 3 if (found.probability or 0.0) < settings.fail_below else 0


def _records(settings: ForecastSettings) -> tuple[Path, datetime | None, int]:
    """(folder or file, when the newest record that can be read was written, its block). Raises Rejected(SETTING | RECORD)."""
    from sn29 import record_files

    named = settings.records
    if named is None or not named.exists():
        got = "nothing" if named is None else f"{named}, which is not there"
        raise Rejected(Reason.SETTING, got, "a folder of a validator's round records, or one record", "--records")
    if named.is_file():
        return named, record_files.written(named), record_files.read(named).head.block
    path, newest = next(record_files.newest_first(named, lambda _: None), (named, None))  # the forecast tells what it skips
    return named, record_files.written(path) if newest else None, newest.head.block if newest else 0


def _forecast(settings: ForecastSettings, competition: Competition, hub: Hub, records: Path) -> Forecast:
    """Raises Rejected(SETTING | RECORD | DATASET), Unavailable."""
    from sn29.evaluation.worker import SeveralReasons
    from sn29.forecast import refused

    folder = Path(settings.checkpoint).expanduser()
    if "@" not in settings.checkpoint or folder.is_dir():
        if not folder.is_dir():
            raise Rejected(Reason.SETTING, folder, "a folder that exists, or REPO@REVISION", "CHECKPOINT")
        return asyncio.run(_of_folder(settings, competition, hub, records, folder))
    try:
        with _fetched(settings, competition, hub) as brought:
            return asyncio.run(_of_folder(settings, competition, hub, records, brought))
    except SeveralReasons as error:
        return refused(competition, error.found)


@contextmanager
def _fetched(settings: ForecastSettings, competition: Competition, hub: Hub) -> Iterator[Path]:
    """The repository's files, verified, in the folder of fetched models, while nobody else deletes them there.

    Raises SeveralReasons for what Hub and metadata show, Rejected(SETTING) for what is no name, Unavailable.
    """
    from sn29.evaluation.worker import SeveralReasons
    from sn29.models import checkpoint
    from sn29.models.disk import Disk
    from sn29.models.fetch import fetch
    from sn29.records import ModelId
    from sn29.settings import default_cache
    from sn29.submission import inspect

    repo, _, revision = settings.checkpoint.rpartition("@")
    ModelId.parse(f"{repo}@{'0' * 40}")  # whether the name can be one, before anybody is asked
    try:
        listing = hub.listing(ModelId.parse(f"{repo}@{revision if len(revision) == 40 else hub.resolve(repo, ref=revision)}"))
        fixed = _fixed(hub, competition, has_own=any(f.path == "tokenizer.json" for f in listing.files))
        checked = inspect(listing, hub.reader(listing), competition, fixed)
    except Rejected as error:
        if error.reason is Reason.SETTING:
            raise
        raise SeveralReasons((error,)) from None
    if checked.refusals or checked.facts is None:
        raise SeveralReasons(checked.refusals)
    disk = Disk(default_cache() / "models", budget_bytes=None)
    with disk.using(checked.facts.content_id) as folder:
        try:
            fetch(hub, listing, folder, only=checkpoint.is_content, deadline_s=settings.deadline_s, room=disk.make_room)
        except Rejected as error:
            raise SeveralReasons((error,)) from None
        yield folder


def _fixed(hub: Hub, competition: Competition, *, has_own: bool) -> FixedText | None:
    """The competition's tokenizer for such a model; None: its own. Raises Unavailable."""
    from neurons.adapters import Tokenizers
    from sn29.rules.competition import tokenizer_for
    from sn29.settings import default_cache

    prescribed = tokenizer_for(competition, has_own)
    try:
        return Tokenizers(hub, default_cache() / "tokenizers")(prescribed) if prescribed else None
    except Rejected as error:  # the competition's own repository: nothing is known of the model then
        raise Unavailable(f"tokenizer of {competition.name}", str(error)) from None


async def _of_folder(settings: ForecastSettings, competition: Competition, hub: Hub, records: Path, folder: Path) -> Forecast:
    from neurons.adapters import dataset_of
    from sn29.evaluation.worker import Here
    from sn29.forecast import forecast as forecast_of

    fixed = await asyncio.to_thread(_fixed, hub, competition, has_own=(folder / "tokenizer.json").exists())
    with _progress() as progress:
        async with Here() as here:
            return await forecast_of(
                folder, competition, fixed, records, dataset_of(hub, settings.competitions_dir), here,
                threads=settings.threads, deadline_s=settings.deadline_s, device=settings.device, now=settings.now,
                hotkey=settings.hotkey, windows=settings.windows, seed=settings.seed, progress=progress,
            )  # fmt: skip


@contextmanager
def _progress() -> Iterator[Progress]:
    """One bar on standard error, which says what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {what: bars.add_task(said, total=None, start=False) for what, said in DOING.items()}

        def progress(what: str, done: int, total: int) -> None:
            bars.start_task(tasks[what])
            bars.update(tasks[what], completed=done, total=total)

        yield progress


# --- in words -----------------------------------------------------------------------------------------------------------


def told(found: Forecast, since: datetime | None) -> list[str]:
    """The forecast as lines, the verdict first; `since` is when block `found.now` was."""
    lines = [f"{found.competition}: {found.said}"]
    if found.refusals:
        for refusal in found.refusals:
            lines += [f"  {refusal.reason.code}: {refusal}", f"  what to do: {refusal.advice}"]
        return lines
    if found.facts is not None:
        lines.append(f"  {found.facts.family}, {found.facts.num_parameters:,} parameters, content {found.facts.content_id[:16]}")
    if found.first_window < 0:
        none = "  no record here says anything of the competition: whether others are there, and how good they are, is not known"
        return [*lines, none, *_told_warnings(found)]
    lines.append(f"  committed at block {found.now:,}, it is judged first in the window of block {found.first_window:,}")
    if found.window is not None:
        lines.append(
            f"  measured on {found.num_samples:,} texts of the window of block {found.window.seed.block:,}: "
            f"{found.nats_per_sample:.2f} nats a text"
        )
    return [*lines, *_told_duel(found), *_told_future(found, since), *_told_warnings(found)]


def _told_warnings(found: Forecast) -> list[str]:
    return [f"  warning: {each}" for each in found.warnings]


def _told_duel(found: Forecast) -> list[str]:
    from sn29.explain import percent

    c = found.against
    if c is None:
        return []
    if c.near_copy:
        return [
            f"  near copy of {c.other}'s earlier model: on {c.num_samples:,} texts their losses vary by less than two models' do",
            "  to win it must differ from text to text: what scales all losses alike leaves it a copy",
        ]
    worse = c.mean >= 0
    low, high = (c.low, c.high) if worse else (-c.high, -c.low)
    way = f"{percent(abs(c.mean))} {'higher' if worse else 'lower'} than {c.other}'s"
    lines = [f"  its losses are {way} ({percent(low)} to {percent(high)}, {c.kind})"]
    if c.needed is not None:
        short = f"{percent(found.missing)} are missing" if found.missing else "they are, and it remains to be shown"
        lines.append(f"  to win they must be lower by {percent(c.needed)}, what is left of the holder's advantage: {short}")
    return lines


def _told_future(found: Forecast, since: datetime | None) -> list[str]:
    from sn29.explain import percent

    p, lines = found.prospect, []
    for number in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if found.holder and not found.near_copy_of and 1 < number < len(found.chances):
            c = found.chances[number - 1]
            lines.append(f"  within {number} windows {c.probability:.1%} ({c.low:.1%} to {c.high:.1%})")
    if p is None or p.lost_to is None or found.near_copy_of:
        return lines
    if p.improvement is not None:
        lines.append(f"  would win in its first window: losses that are {percent(p.improvement)} lower on every text")
    if p.wins_by_evidence is not None:
        after = p.wins_by_evidence - found.now
        lines.append(f"  if all windows were like this one it wins at block {p.wins_by_evidence:,}{_when(after, since)}")
    if p.wins_at is not None:
        lines.append(f"  by decay of the advantage alone it wins at block {p.wins_at:,}{_when(p.wins_at - found.now, since)}")
    elif p.why_never:
        lines.append(f"  by decay of the advantage alone it never wins: {p.why_never}")
    return lines


def _when(blocks: int, since: datetime | None) -> str:
    from sn29.explain import when

    return when(blocks, since, "in {} days")


def as_json(found: Forecast) -> dict[str, Any]:
    """Every field, what follows from them, and refusals as `sn29 check --json` spells them."""
    from sn29.explain import BLOCK_SECONDS

    refusals = [
        {
            "reason": r.reason.code, "sentence": r.reason.sentence, "advice": r.advice, "got": r.got, "limit": r.limit,
            "where": r.where,
        }
        for r in found.refusals
    ]  # fmt: skip
    data = asdict(replace(found, refusals=())) | {"refusals": refusals, "accepted": found.accepted, "said": found.said}
    data |= {"probability": found.probability, "missing": found.missing, "near_copy_of": found.near_copy_of}
    if found.prospect is not None and found.prospect.wins_at is not None:
        data["wins_by_decay_in_s"] = (found.prospect.wins_at - found.now) * BLOCK_SECONDS
    plain: dict[str, Any] = _finite(data)
    return plain


def _finite(value: Any) -> Any:
    """Infinity and NaN as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
