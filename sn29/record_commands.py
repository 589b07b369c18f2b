"""Commands that read round records: replay, audit, explain, competitions simulate. They decide nothing; they read and print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sn29 import record_files
from sn29 import replay as again
from sn29.errors import Reason, Rejected
from sn29.records import Weights
from sn29.round_record import Json, RoundRecord, loads
from sn29.rules.competition import Competition
from sn29.rules.decision import Decision
from sn29.settings import AuditSettings, ExplainSettings, ReplaySettings, SimulateSettings, read

RECORDS = "records"
"""Folder of the round records in a validator's state folder."""


def replay(words: list[str]) -> int:
    settings = read(ReplaySettings, words)
    data = loads(record_files.read_text(settings.record), str(settings.record))
    if again.is_by_hand(data):
        return _replay_by_hand(settings, data)
    record = record_files.read(settings.record)
    if settings.rule or settings.competitions is not None:
        return _replay_otherwise(settings, record)
    decision = again.recompute(record)
    difference = again.compare(record, decision)
    if settings.json_output:
        found = {"equal": not difference, "difference": difference and asdict(difference)}
        _print_json(_decided(decision, record.head.block) | found)
    else:
        print("\n".join(_told(decision)))
        said = f"not what was recorded (recorded | computed): {difference}" if difference else "the same bits as recorded"
        print(f"round of block {record.head.block}: {said}")
    return 1 if difference else 0


def _replay_otherwise(settings: ReplaySettings, record: RoundRecord) -> int:
    change, hall = None, None
    if settings.competitions is not None:
        from neurons.adapters import parse_texts, read_texts

        files = parse_texts(read_texts(settings.competitions))
        change, hall = again.from_files(files.files), files.hall_of_fame
    if settings.rule:
        change = again.other_rule(settings.rule, change)
    assert change is not None
    found = again.what_if(record, change, hall)
    refused = {hotkey: str(error) for hotkey, error in sorted(found.refused.items())}
    if settings.json_output:
        then = {"recorded_weights": _plain(record.weights), "refused": refused}
        _print_json(_decided(found.decision, record.head.block) | then)
    else:
        print("\n".join([*_told(found.decision, record.weights), *(f"  not scored: {why}" for why in refused.values())]))
    return 0


def _replay_by_hand(settings: ReplaySettings, data: Json) -> int:
    def look_up(name: str, block: int) -> Competition:
        from neurons.adapters import read_competitions

        found = read_competitions(settings.competitions or Path("competitions"), block)[0]
        if name not in found:
            raise Rejected(Reason.RECORD, name, f"one of {', '.join(found)}", f"{settings.record}: competition")
        return found[name]

    contest = again.by_hand(data, look_up, str(settings.record))
    if settings.rule:
        contest = again.changed(contest, again.Changed(again.with_rule(contest.competition, settings.rule)))
    decision = again.decide_by_hand(contest)
    if settings.json_output:
        _print_json(_decided(decision, contest.window.seed.block))
    else:
        print("\n".join(_told(decision)))
    return 0


def audit(words: list[str]) -> int:
    settings = read(AuditSettings, words)
    from sn29 import audit as audits

    found = audits.audit(record_files.read(settings.first), record_files.read(settings.second))
    if settings.json_output:
        _print_json({"equal": not found, "differences": [asdict(d) for d in found]})
    elif found:
        print("\n".join([f"first cause: {found[0]}", *(f"  then {d}" for d in found[1:])]))
    else:
        print("equal")
    return 1 if found else 0


def explain(words: list[str]) -> int:
    settings = read(ExplainSettings, words)
    from sn29 import explain as explains

    paths = record_files.paths([settings.records or settings.state_dir / RECORDS])
    if settings.round is not None:
        paths = [path for path in paths if record_files.read(path).head.block == settings.round]
    if not paths:
        raise Rejected(Reason.SETTING, settings.round, "the block of a recorded round", "--round")
    records = map(record_files.read, paths)
    lines, data = explains.explain(records, settings.hotkey, record_files.written(paths[-1]))
    if settings.json_output:
        _print_json(data)
    else:
        print("\n".join(lines))
    return 0


def simulate(words: list[str]) -> int:
    settings = read(SimulateSettings, _repeated(words, "--rounds"))
    from sn29.rules.schedule import parse_file

    try:
        text = settings.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(Reason.COMPETITION_FILE, str(error)[:200], "a file of UTF-8 text", str(settings.file)) from None
    file = parse_file(settings.file.stem, text)
    rounds = tuple(again.simulate(record_files.read_all(settings.rounds), file))
    if settings.json_output:
        _print_json([asdict(r) | {"refused": {h: str(e) for h, e in r.refused.items()}} for r in rounds])
    else:
        print("\n".join(_told_simulated(rounds)))
    return 0


def _repeated(words: list[str], flag: str) -> list[str]:
    """`--rounds a b c` as `--rounds a --rounds b --rounds c`: what a shell makes of records/*.json."""
    found: list[str] = []
    inside = False
    for word in words:
        if word.startswith("-"):
            inside = word == flag
        elif inside and found[-1] != flag:
            found.append(flag)
        found.append(word)
    return found


# --- in words ---------------------------------------------------------------------------------------------------------


def _told(decision: Decision, recorded: Mapping[int, Weights] | None = None) -> list[str]:
    """Scores and weights, best first."""
    lines = []
    for name, scored in sorted(decision.scored.items()):
        lines.append(name if scored.scores else f"{name}: nobody was scored")
        for s in sorted(scored.scores, key=lambda s: (-s.weight, -s.win_rate, s.hotkey)):
            lines.append(f"  {s.hotkey}  share {s.weight:.4f}  win rate {s.win_rate:.4f}  wins {s.wins:g}")
    nothing = Weights(0, {})
    for mechanism in sorted({*decision.weights, *(recorded or {})}):
        now = decision.weights.get(mechanism, nothing).by_hotkey
        then = recorded.get(mechanism, nothing).by_hotkey if recorded else {}
        which = f" of mechanism {mechanism}" if mechanism else ""
        lines.append(f"weights{which}{', with what was recorded' if recorded else ''}")
        for hotkey in sorted({*now, *then}, key=lambda h: (-now.get(h, 0.0), h)):
            was = f"  ({then.get(hotkey, 0.0):.6f})" if recorded else ""
            lines.append(f"  {hotkey}  {now.get(hotkey, 0.0):.6f}{was}")
    return lines


def _decided(decision: Decision, block: int) -> dict[str, Json]:
    scores = {name: [asdict(s) for s in scored.scores] for name, scored in sorted(decision.scored.items())}
    return {"block": block, "scores": scores, "weights": _plain(decision.weights)}


def _plain(weights: Mapping[int, Weights]) -> Json:
    """Mechanism -> hotkey -> weight."""
    return {str(mechanism): dict(one.by_hotkey) for mechanism, one in sorted(weights.items())}


def _told_simulated(rounds: Sequence[again.Simulated]) -> list[str]:
    """Mean weight of every hotkey, then and with the new file, the largest change first."""

    def mean(weights: Sequence[Mapping[str, float]], hotkey: str) -> float:
        return math.fsum(w.get(hotkey, 0.0) for w in weights) / len(weights)

    rows = []
    for hotkey in {hotkey for r in rounds for hotkey in (*r.then, *r.instead, *r.refused)}:
        then, instead = mean([r.then for r in rounds], hotkey), mean([r.instead for r in rounds], hotkey)
        why = next((f"  not allowed: {r.refused[hotkey]}" for r in rounds if hotkey in r.refused), "")
        rows.append((-abs(instead - then), hotkey, f"  {hotkey}  {then:.6f} -> {instead:.6f}{why}"))
    return [f"mean weight in {len(rounds)} rounds, then -> with the new file", *(row[2] for row in sorted(rows))]


def _print_json(value: Json) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))
