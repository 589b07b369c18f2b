"""`sn29 competitions check | show | diff | pin`: whether competition files are valid, what they say, how two differ, and pins
for what they name. And `sn29 simulate incentive | sequential`: what a file's rule would do."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from neurons.adapters import RuleFiles
    from sn29.hub import Hub
    from sn29.rules.competition import HallOfFame
    from sn29.rules.schedule import Clock, CompetitionFile
    from sn29.rules.yaml_text import HubPlace


# ---- check -----------------------------------------------------------------------------------------------------------


def check(words: list[str]) -> int:
    """DIR (default: competitions), the only argument."""
    if words[:1] in (["--help"], ["-h"]):
        print("usage: sn29 competitions check [DIR]\n\nValidates DIR/*.yaml (default: competitions). Exit 1 when one is wrong.")
        return 0
    if len(words) > 1:
        raise Rejected(Reason.SETTING, " ".join(words), "at most one folder", "sn29 competitions check")
    from neurons.adapters import read_competitions

    folder = Path(words[0] if words else "competitions")
    competitions, hall, hashes = read_competitions(folder)
    for name, competition in competitions.items():
        open_pins = f"; not pinned yet: {', '.join(competition.unpinned)}" if competition.unpinned else ""
        limit = f"{competition.limits.parameters:,} parameters"
        print(
            f"{name}  {competition.reward_share:.0%}  {', '.join(competition.families)}  {limit}  {hashes[name][:12]}{open_pins}"
        )
    print(f"{len(competitions)} competitions and {len(hall.entries)} hall of fame entries in {folder} are valid")
    return 0


# ---- show ------------------------------------------------------------------------------------------------------------


def show(words: list[str]) -> int:
    """The rules in force at a block, and what comes next."""
    from sn29.settings import ShowSettings, read

    settings = read(ShowSettings, words)
    from neurons.adapters import parse_texts, read_texts
    from sn29.rules.schedule import in_force

    found = parse_texts(read_texts(settings.folder))
    blocks = {name: block_of(settings.at, file) for name, file in found.files.items()}
    at = max(blocks.values())
    if settings.json_output:
        answer = {name: _as_json(file, blocks[name], found.hashes[name]) for name, file in found.files.items()}
        fame = [{**e.model_dump(), "share": share} for e, share in _fame(found.hall_of_fame, at)]
        print(json.dumps({"competitions": answer, "hall_of_fame": fame}, indent=2))
        return 0
    for name, file in found.files.items():
        print(f"{name} at block {blocks[name]:,}{_time(file.clock, blocks[name])}")
        for field, value in _fields(in_force(file, blocks[name]).model_dump(exclude={"name"})):
            print(f"  {field:<34} {value}")
        for hotkey, override in file.overrides.items():
            print(f"  for validator {hotkey}: {', '.join(f'{field} {value}' for field, value in override.items())}")
        print(*_next_lines(file, blocks[name]), sep="\n")
    for entry, share in _fame(found.hall_of_fame, at):
        what = f"{entry.reward_epochs:g} epochs of all emission in total"
        print(f"hall of fame: {entry.hotkey} gets {share:.4%} of the weights at block {at:,} ({what}): {entry.reason}")
    return 0


def block_of(at: str, file: CompetitionFile) -> int:
    """The block that `--at` means for this file: a number, or a UTC time by the file's clock. Raises Rejected(SETTING)."""
    if at.isdecimal():
        return int(at)
    if file.clock is None:
        if len(file.versions) == 1:
            return 0  # the same rules at every block
        raise Rejected(Reason.SETTING, at, f"a block: {file.name}.yaml has changes and no clock", "--at")
    try:
        return max(0, file.clock.block_at(at))
    except Rejected as error:
        raise Rejected(Reason.SETTING, at, f"a block, or {error.limit}", "--at") from None


def _as_json(file: CompetitionFile, block: int, digest: str) -> dict[str, Any]:
    from sn29.rules.schedule import in_force

    now = in_force(file, block)
    since = max(v.block for v in file.versions if v.block <= block)
    return {
        "block": block,
        "in_force_since": since,
        "rules_id": now.id,
        "file_sha256": digest,
        "rules": now.model_dump(mode="json"),
        "overrides": {hotkey: dict(override) for hotkey, override in file.overrides.items()},
        "next": [
            {
                "block": v.block,
                "time": file.clock.time_of(v.block) if file.clock else None,
                "origin": v.origin,
                "what": list(v.what),
            }
            for v in file.versions
            if v.block > block
        ],
    }


def _next_lines(file: CompetitionFile, block: int) -> list[str]:
    coming = [version for version in file.versions if version.block > block]
    if not coming:
        return ["  no change comes after this block"]
    return ["  next:", *(f"    block {v.block:,}{_time(file.clock, v.block)}: {'; '.join(v.what)}  ({v.origin})" for v in coming)]


def _time(clock: Clock | None, block: int) -> str:
    return f" ({clock.time_of(block)} by the file's clock)" if clock else ""


def _fields(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    from sn29.rules.schedule import differences

    return [(field, value) for field, _, value in differences({}, section)]


def _fame(hall: HallOfFame, block: int) -> list[tuple[Any, float]]:
    """Every entry with its hotkey's share of the weights at the block, as if all were registered."""
    from sn29.rules.weights import hall_of_fame_shares

    shares = hall_of_fame_shares(hall, block, {entry.hotkey for entry in hall.entries})
    return [(entry, shares.get(entry.hotkey, 0.0)) for entry in hall.entries]


# ---- diff ------------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A field that two files set differently from a block on."""

    file: str
    block: int
    field: str
    old: str
    new: str


def diff(words: list[str]) -> int:
    """What two files, or folders of files, say differently. Exit 0 also when they do."""
    from sn29.settings import DiffSettings, read

    settings = read(DiffSettings, words)
    found = compare(_read(settings.old), _read(settings.new), by_name=settings.old.is_dir() or settings.new.is_dir())
    if settings.json_output:
        print(json.dumps([d._asdict() for d in found], indent=2))
        return 0
    for d in found:
        when = f" from block {d.block:,} on" if d.block else ""
        print(f"{d.file}{when}: {d.field}: {d.old} -> {d.new}")
    if not found:
        print("no difference: the same rules at every block")
    return 0


def compare(old: RuleFiles, new: RuleFiles, *, by_name: bool = True) -> list[Difference]:
    """Everything that differs, at the first block where it does. Two single files are compared whatever their names."""
    from sn29.rules.schedule import differences

    olds, news = dict(old.files), dict(new.files)
    if not by_name and len(olds) == len(news) == 1:
        olds = dict(zip(news, olds.values(), strict=True))
    found: list[Difference] = []
    for name in sorted(olds.keys() | news.keys()):
        if name not in olds or name not in news:
            found.append(Difference(f"{name}.yaml", 0, "the file", *(("-", "there") if name in news else ("there", "-"))))
        else:
            found += _compare_files(name, olds[name], news[name])
    fame = differences(old.hall_of_fame.model_dump(), new.hall_of_fame.model_dump())
    return [*found, *(Difference("hall_of_fame.yaml", 0, *each) for each in fame)]


def _compare_files(name: str, old: CompetitionFile, new: CompetitionFile) -> list[Difference]:
    from sn29.rules.schedule import differences, in_force

    found: list[Difference] = []
    before: frozenset[tuple[str, str, str]] = frozenset()
    for block in sorted({version.block for file in (old, new) for version in file.versions}):
        rules = [in_force(file, block).model_dump(exclude={"name"}) for file in (old, new)]
        now = differences(*rules)
        found += [Difference(f"{name}.yaml", block, *each) for each in now if each not in before]
        ended = {each[0] for each in before} - {each[0] for each in now}
        values = dict(_fields(rules[1]))
        found += [Difference(f"{name}.yaml", block, f, values.get(f, "-"), "the same in both") for f in sorted(ended)]
        before = frozenset(now)
    overrides = differences({"overrides": old.overrides}, {"overrides": new.overrides})
    return [*found, *(Difference(f"{name}.yaml", 0, *each) for each in overrides)]


def _read(path: Path) -> RuleFiles:
    """A folder; or one file, which need not fit together with others. Raises Rejected."""
    from neurons.adapters import HALL_OF_FAME, NOBODY, RuleFiles, parse_texts, read_texts
    from sn29.rules.competition import parse_hall_of_fame
    from sn29.rules.schedule import parse_file

    if path.is_dir():
        return parse_texts(read_texts(path))
    text = _text_of(path)
    if path.name == HALL_OF_FAME:
        return RuleFiles({}, parse_hall_of_fame(text), {})
    return RuleFiles({path.stem: parse_file(path.stem, text)}, NOBODY, {})


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(Reason.SETTING, str(error)[:200], "a competition file of UTF-8 text", str(path)) from None


# ---- pin -------------------------------------------------------------------------------------------------------------


def pin(words: list[str]) -> int:
    """Writes revisions and fingerprints into a file."""
    from sn29.settings import PinSettings, read

    settings = read(PinSettings, words)
    from sn29.hub import Hub

    written = pin_file(settings.file, Hub(settings.hub_endpoint))
    for line in written:
        print(f"{settings.file.name}: {line}")
    print(f"{len(written)} pins written" if written else f"{settings.file.name}: every Hub id has its pins already")
    return 0


def pin_file(path: Path, hub: Hub) -> tuple[str, ...]:
    """Resolves what has no pin yet, and replaces the file in one step; what was written, a line each.

    A pin that is there stays. A tokenizer whose fingerprint is given gets the revision of today only if its content
    has that fingerprint. Raises Rejected (nothing is written then), Unavailable.
    """
    from sn29.rules.schedule import parse_file
    from sn29.rules.yaml_text import hub_places, with_pins

    path = path.resolve()  # a link stays a link
    text = _text_of(path)
    parse_file(path.stem, text)
    revisions: dict[tuple[str, bool], str] = {}
    pins = {place: values for place in hub_places(path.name, text) if (values := _pins(place, hub, revisions))}
    if not pins:
        return ()
    new = with_pins(path.name, text, pins)
    parse_file(path.stem, new)
    part = path.with_name(f".{path.name}.part")  # no *.yaml: a validator that reads this folder must not see it
    with part.open("wb") as file:
        file.write(new.encode())
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, part)
    os.replace(part, path)
    return tuple(
        f"{'.'.join(map(str, place.path))}.{field} {value}  ({place.hub})"
        for place, values in pins.items()
        for field, value in values.items()
    )


def _pins(place: HubPlace, hub: Hub, revisions: dict[tuple[str, bool], str]) -> dict[str, str]:
    """What this section lacks. A Hub id is resolved once, so that all sections that name it get one revision."""
    values = {}
    revision = place.revision
    if revision is None:
        key = (place.hub, place.is_tokenizer)
        if key not in revisions:
            revisions[key] = hub.resolve(place.hub, "model" if place.is_tokenizer else "dataset")
        values["revision"] = revision = revisions[key]
    if place.is_tokenizer and (place.revision is None or place.fingerprint is None):
        fingerprint = _fingerprint(hub, place.hub, revision)
        if place.fingerprint is None:
            values["fingerprint"] = fingerprint
        elif place.fingerprint != fingerprint:
            raise Rejected(Reason.TOKENIZER, f"fingerprint {fingerprint}", place.fingerprint, f"{place.hub}@{revision}")
    return values


def _fingerprint(hub: Hub, repo: str, revision: str) -> str:
    """Of the content of the repository's tokenizer.json. Raises Rejected(TOKENIZER), Unavailable."""
    from sn29.models.fetch import fetch
    from sn29.models.tokenizer import Tokenizer
    from sn29.records import ModelId

    where = ModelId.parse(f"{repo}@{revision}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / revision
        fetch(hub, hub.listing(where), folder, only=lambda path: path == "tokenizer.json", deadline_s=300)
        if not (folder / "tokenizer.json").exists():
            raise Rejected(Reason.TOKENIZER, "no tokenizer.json", "a tokenizer.json", str(where))
        return Tokenizer.load(folder / "tokenizer.json").fingerprint()


# ---- simulate sequential ---------------------------------------------------------------------------------------------


def simulate_sequential(words: list[str]) -> int:
    """Samples saved by stopping, and who was stopped wrongly."""
    from sn29.settings import SequentialSettings, read

    settings = read(SequentialSettings, words)
    from rich.console import Console
    from rich.progress import Progress

    from neurons.adapters import read_competitions
    from neurons.miner import chosen
    from sn29 import stopping

    competition = chosen(read_competitions(settings.competitions_dir)[0], settings.competition)
    plan = stopping.Plan(settings.runs, settings.windows, settings.samples, settings.seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("challengers")
        result = stopping.simulate(competition, plan, lambda done, of: progress.update(task, completed=done, total=of))
    if settings.json_output:
        print(stopping.as_json(result))
    else:
        for table in stopping.tables(result):
            Console().print(table)
    return 0 if all(met for _, _, met in result.goals) else 1


def simulate_incentive(words: list[str]) -> int:
    """Attacks and honest progress under each scoring rule."""
    from sn29.settings import IncentiveSettings, read

    settings = read(IncentiveSettings, words)
    from rich.console import Console
    from rich.progress import Progress

    from neurons.adapters import read_competitions
    from neurons.miner import chosen
    from sn29 import incentive

    base = chosen(read_competitions(settings.competitions_dir)[0], settings.competition)
    competitions, scenes = incentive.chosen_rules(base, settings.rule), incentive.chosen_scenes(settings.attack, settings.days)
    plan = incentive.Plan(settings.runs, settings.days, settings.samples, settings.seed, settings.windows_per_day)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(scenes)} scenes, {len(competitions)} rules")
        result = incentive.simulate(
            competitions, scenes, plan, settings.workers, lambda done, of: progress.update(task, completed=done, total=of)
        )
    if settings.picture is not None:
        settings.picture.write_text(incentive.picture(result), encoding="utf-8")
    if settings.json_output:
        print(incentive.as_json(result))
    else:
        console = Console()
        for table in incentive.tables(result):
            console.print(table)
    return 0 if all(goal.met for goal in result.goals) else 1
