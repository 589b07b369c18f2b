"""`sn29 report`: pages about what a validator does and what rounds decided, as one file or served live."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable
from sn29.settings import ReportSettings, default_cache, read

_FIRST_ANSWER_S, _ASKED_AGAIN_S = 2.0, 60.0
"""How long served pages wait for the competition files of a commit, and after what pause they are asked for again."""

if TYPE_CHECKING:
    from sn29.report.snapshot import Reader
    from sn29.rules.schedule import CompetitionFile


def report(words: list[str]) -> int:
    """Exit status 0 when it was written, or stopped by a signal."""
    settings = read(ReportSettings, words)
    asked = [
        name for name, given in (("--out", settings.out), ("--serve", settings.serve), ("--json", settings.json_output)) if given
    ]
    if len(asked) != 1:
        raise Rejected(Reason.SETTING, " and ".join(asked) or "none of them", "one of --out FILE, --serve HOST:PORT and --json")
    reader = _reader(settings)
    if settings.serve:
        return _serve(settings, reader)
    from sn29.report import site

    snapshot = reader.read()
    for alarm in snapshot.alarms:
        print(f"sn29 report: {alarm.level}: {alarm.sentence}; what to do: {alarm.advice}", file=sys.stderr)
    if settings.json_output:
        print(json.dumps(site.everything(snapshot), indent=2, sort_keys=True, allow_nan=False))
    else:
        assert settings.out is not None
        _write(settings.out, site.whole(snapshot))
        what = f"{len(snapshot.rounds)} rounds, {len(snapshot.hotkeys)} miners, {settings.out.stat().st_size:,} bytes"
        print(f"{settings.out}: {what}")
    return 0


def _reader(settings: ReportSettings) -> Reader:
    """Raises Unavailable where there is nothing to show, Rejected(SETTING) for records that are none."""
    from sn29 import record_files
    from sn29.report.snapshot import Reader
    from sn29.telemetry import STATUS

    rules = _rules(settings)
    if settings.records:
        record_files.paths(settings.records)
        return Reader(None, settings.records, rules, settings.rounds)
    if not settings.state_dir.is_dir():
        why = "no such folder; name the state folder of a validator that has run with --state.dir, or round records"
        raise Unavailable(str(settings.state_dir), why)
    kept = (STATUS, "store.db", record_files.FOLDER)
    if not settings.serve and not any((settings.state_dir / name).exists() for name in kept):  # what is served may come yet
        why = "no validator or miner has run with it; start one, or name its folder with --state.dir, or round records"
        raise Unavailable(str(settings.state_dir), why)
    return Reader(settings.state_dir, (), rules, settings.rounds, settings.weights_alarm_epochs)


def _rules(settings: ReportSettings) -> Callable[[], Mapping[str, CompetitionFile]]:
    """Reads the competition files, and parses them when they have changed. A folder that was not asked for may be missing."""
    if settings.competitions_git:
        return _of_commit(settings)
    kept: dict[str, str] = {}
    files: dict[str, CompetitionFile] = {}

    def read_again() -> Mapping[str, CompetitionFile]:
        from neurons.adapters import parse_texts, read_texts

        nonlocal kept, files
        asked = "competitions_dir" in settings.model_fields_set
        if not asked and not settings.competitions_dir.is_dir():
            return {}
        texts = read_texts(settings.competitions_dir)
        if texts != kept:
            files = dict(parse_texts(texts).files)
            kept = texts
        return files

    return read_again


def _of_commit(settings: ReportSettings) -> Callable[[], Mapping[str, CompetitionFile]]:
    """A commit does not change. Served pages do not wait for whoever has it: it is asked for in a thread, until it is there."""
    from neurons.adapters import parse_texts, read_git_texts

    found: Mapping[str, CompetitionFile] | Sn29Error = Unavailable("--competitions.git", "no answer yet")

    def ask() -> None:
        nonlocal found
        while isinstance(found, Sn29Error):
            try:
                found = parse_texts(read_git_texts(settings.competitions_git, default_cache() / "competitions.git")).files
            except Sn29Error as error:
                found = error
            if not settings.serve:
                return
            time.sleep(_ASKED_AGAIN_S if isinstance(found, Sn29Error) else 0)

    def now() -> Mapping[str, CompetitionFile]:
        if isinstance(found, Sn29Error):
            raise found
        return found

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_FIRST_ANSWER_S if settings.serve else None)
    return now


def _write(path: Path, page: str) -> None:
    """Whole or not at all. Raises Unavailable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.write(page)
            os.chmod(part, 0o644)
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Unavailable(str(path), f"{error.strerror or error}; name a file that can be written with --out") from None


def _serve(settings: ReportSettings, reader: Reader) -> int:
    """Until a signal comes, or the parent has ended."""
    from sn29.report.server import Pages, Server, address_of

    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())

    def say(sentence: str) -> None:
        print(f"sn29 report: {sentence}", file=sys.stderr, flush=True)

    with Server(*address_of(settings.serve), Pages(reader), say) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        print(f"up: {server.url}; metrics at {server.url}metrics, Ctrl-C stops it", flush=True)
        while not over.wait(1.0):
            if settings.parent and os.getppid() != settings.parent:
                break
        server.shutdown()
        serving.join()
    return 0
