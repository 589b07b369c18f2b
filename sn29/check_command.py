"""`sn29 check` and `sn29 reasons`: would a validator accept this model, and if not, for which reasons, all of them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.concealment import clean
from sn29.errors import Reason, Rejected, Unavailable, WrongUsage, reasons_table

if TYPE_CHECKING:
    from sn29.hub import Hub
    from sn29.records import ModelId
    from sn29.rules.competition import Competition
    from sn29.settings import CheckSettings
    from sn29.submission import Checked, FixedText

DEADLINE_S = 3600.0
THREADS = 2


def reasons(words: list[str]) -> int:
    """No argument."""
    if words[:1] in (["--help"], ["-h"]):
        print("usage: sn29 reasons\n\nEvery reason for which something can be refused, as a Markdown table.")
        return 0
    if words:
        raise WrongUsage(" ".join(words), "no argument", "sn29 reasons")
    print(reasons_table())
    return 0


def check(words: list[str]) -> int:
    """MODEL: a folder, or REPO@REVISION."""
    from sn29.settings import CheckSettings, read

    settings = read(CheckSettings, words)
    folder = Path(settings.model).expanduser()
    if "@" not in settings.model and not folder.is_dir():
        raise Rejected(Reason.SETTING, f"no folder {folder}", "a folder, or REPO@REVISION on the Hub", "MODEL")
    competition = _competition(settings)
    from sn29.hub import Hub

    hub = Hub(settings.hub_endpoint)
    try:
        if "@" in settings.model and not folder.is_dir():
            checked = _repository(settings, hub, competition)
        else:
            checked = _folder(settings, hub, competition, folder)
    except Unavailable as error:
        _say_unavailable(error, competition.name, as_json=settings.json_output)
        return 2
    _say(checked, competition.name, as_json=settings.json_output)
    return 1 if checked.refusals else 0


def _competition(settings: CheckSettings) -> Competition:
    from neurons.adapters import read_competitions
    from sn29.rules.schedule import in_force, parse_file

    named = Path(settings.competition)
    if named.suffix != ".yaml":
        from neurons.miner import chosen

        competitions = read_competitions(settings.competitions_dir, settings.at)[0]
        if not settings.competition:
            names = ", ".join(competitions)
            raise WrongUsage("none", names, said="--competition is missing", advice=f"name one with --competition: {names}")
        return chosen(competitions, settings.competition)
    if not named.is_file():
        raise Rejected(Reason.SETTING, named, "a competition file that exists", "--competition")
    return in_force(parse_file(named.stem, named.read_text(encoding="utf-8")), settings.at)


def _folder(settings: CheckSettings, hub: Hub, competition: Competition, folder: Path) -> Checked:
    from sn29.models import checkpoint
    from sn29.submission import check as check_folder
    from sn29.submission import inspect

    fixed = _fixed(settings, hub, competition, has_own=(folder / "tokenizer.json").exists())
    if settings.metadata_only:
        return inspect(checkpoint.local_listing(folder), checkpoint.local_reader(folder), competition, fixed)
    return asyncio.run(check_folder(folder, competition, fixed, threads=THREADS, deadline_s=DEADLINE_S))


def _repository(settings: CheckSettings, hub: Hub, competition: Competition) -> Checked:
    """A repository as everybody sees it: without a token. A branch stands for the revision that it points to now."""
    from sn29.records import ModelId
    from sn29.submission import Checked

    repo, _, revision = settings.model.rpartition("@")
    ModelId.parse(f"{repo}@{'0' * 40}")  # whether the name can be one, before anybody is asked
    try:
        if len(revision) != 40:
            revision = hub.resolve(repo, ref=revision)
            _unless(settings.json_output, f"{repo} is at {revision}")
        return _published(settings, hub, competition, ModelId.parse(f"{repo}@{revision}"))
    except Rejected as error:  # e.g. a gated repository, which lists its files and gives none
        if error.reason is Reason.SETTING:
            raise
        return Checked(None, (error,))


def _published(settings: CheckSettings, hub: Hub, competition: Competition, model: ModelId) -> Checked:
    """Raises Rejected for what the Hub says of the repository, Unavailable."""
    from sn29.settings import default_cache
    from sn29.submission import check_published, inspect

    listing = hub.listing(model)
    fixed = _fixed(settings, hub, competition, has_own=any(f.path == "tokenizer.json" for f in listing.files))
    if settings.metadata_only:
        return inspect(listing, hub.reader(listing), competition, fixed)
    models, most = default_cache() / "models", int(settings.models_gb * 1e9) or None
    _unless(settings.json_output, f"what the metadata allows is fetched into {models}")
    with _progress() as progress:
        return asyncio.run(
            check_published(
                hub, listing, competition, fixed, models, threads=THREADS, deadline_s=DEADLINE_S, models_bytes=most,
                progress=progress,
            )
        )  # fmt: skip


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error from the first byte on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda num_bytes, total: bar.update(task, advance=num_bytes, total=total, visible=True)


def _fixed(settings: CheckSettings, hub: Hub, competition: Competition, *, has_own: bool) -> FixedText | None:
    """The competition's tokenizer for such a model, from the file that the settings name or from the Hub; None: its own."""
    from sn29.rules.competition import tokenizer_for

    prescribed = tokenizer_for(competition, has_own)
    if prescribed is None:
        return None
    from neurons.adapters import Tokenizers
    from sn29.models.tokenizer import Tokenizer
    from sn29.settings import default_cache
    from sn29.submission import FixedText

    if settings.tokenizer is None:
        try:
            return Tokenizers(hub, default_cache() / "tokenizers")(prescribed)
        except Rejected as error:  # the competition's own repository: nothing is known of the model then
            raise Unavailable(f"tokenizer of {competition.name}", str(error)) from None
    where = f"--tokenizer {settings.tokenizer}"
    try:
        tokenizer = Tokenizer.load(settings.tokenizer)
    except Rejected as error:
        raise Rejected(Reason.SETTING, error.got, error.limit, where) from None
    if prescribed.fingerprint not in (None, found := tokenizer.fingerprint()):
        raise Rejected(Reason.SETTING, f"a tokenizer {found}", prescribed.fingerprint, where)
    return FixedText(settings.tokenizer, tokenizer.largest_id())


def _unless(as_json: bool, line: str) -> None:
    if not as_json:
        print(line)


def _say_unavailable(error: Unavailable, competition: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"competition": competition, "allowed": None, "unavailable": clean(error)}, indent=2))
    else:
        print(f"sn29 check: nothing is known, try again: {clean(error)}", file=sys.stderr)


def _say(checked: Checked, competition: str, *, as_json: bool) -> None:
    if as_json:
        told: dict[str, Callable[[Rejected], str]] = {
            "reason": lambda r: r.reason.code,
            "sentence": lambda r: r.reason.sentence,
            "advice": lambda r: r.advice,
            "got": lambda r: r.got,
            "limit": lambda r: r.limit,
            "where": lambda r: r.where,
        }
        refusals = [{key: of(refusal) for key, of in told.items()} for refusal in checked.refusals]
        facts = asdict(checked.facts) if checked.facts else None
        answer = {"competition": competition, "allowed": not refusals, "refusals": refusals, "facts": facts}
        print(json.dumps({**answer, "tensor_digest": checked.tensor_digest}, indent=2))
        return
    if checked.facts:
        f = checked.facts
        print(f"{f.family}, {f.num_parameters:,} parameters, vocabulary {f.vocab_size:,}, {f.num_bytes:,} bytes")
        print(f"content {f.content_id}" + (f", tensors {checked.tensor_digest}" if checked.tensor_digest else ""))
    for refusal in checked.refusals:
        print(f"refused for {competition} ({refusal.reason.code}): {refusal}\n  what to do: {refusal.advice}")
    if not checked.refusals:
        print(f"allowed for {competition}")
