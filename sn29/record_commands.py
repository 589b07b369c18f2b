"""Commands that read round records: replay, audit, explain, competitions simulate. They decide nothing; they read and print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sn29 import record_files
from sn29 import replay as again
from sn29.concealment import clean
from sn29.errors import Reason, Rejected
from sn29.records import Weights
from sn29.round_record import Json, RoundRecord, loads
from sn29.rules.competition import Competition
from sn29.rules.decision import Decision
from sn29.settings import AuditSettings, ExplainSettings, ReplaySettings, SimulateSettings, read

if TYPE_CHECKING:
    from sn29.explain import Seen

RECORDS = "records"
"""Folder of the round records in a validator's state folder."""


def replay(words: list[str]) -> int:
    settings = read(ReplaySettings, words)
    text = record_files.read_text(settings.record)
    if not text.lstrip().startswith(b"{"):  # a store, a picture, a table: its bytes would say nothing
        raise Rejected(
            Reason.RECORD, "no JSON object", "a round record", str(settings.record), said=f"{settings.record} is no round record"
        )
    data = loads(text, str(settings.record))
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
    written = record_files.written(paths[-1])
    lines, data = explains.explain(map(record_files.read, paths), settings.hotkey, written)
    if not data["rounds"]:
        seen = explains.everybody(map(record_files.read, paths))
        one = explains.meant(settings.hotkey, seen)
        if len(one) != 1:
            return _nobody(settings, data, one or seen, several=bool(one))
        lines, data = explains.explain(map(record_files.read, paths), one[0].hotkey, written)
        lines = [one[0].name, *lines]
    if settings.json_output:
        _print_json(data)
    else:
        print("\n".join(lines))
    return 0


_LISTED = 20
"""Hotkeys that are named where none was found: a subnet has 256."""


def _nobody(settings: ExplainSettings, data: Json, seen: Sequence[Seen], *, several: bool) -> int:
    """Says whom one may ask about. Exit status: 1 for an address that these rounds do not name, 2 for what is none."""
    from sn29.explain import is_address

    found = is_address(settings.hotkey)
    if settings.json_output and found:
        _print_json(data)
    why = "no commitment of this hotkey is in these rounds" if found else (
        "more than one hotkey is meant" if several else "this is no ss58 address, and no hotkey or repository of these rounds"
    )  # fmt: skip
    more = [f"  and {len(seen) - _LISTED} more: `sn29 report` has them all"] if len(seen) > _LISTED else []
    lines = [f"sn29 explain: {settings.hotkey!r}: {why}", "hotkeys of these rounds:", *(f"  {one}" for one in seen[:_LISTED])]
    print("\n".join([clean(line) for line in (lines if seen else lines[:1])] + more), file=sys.stderr)
    return 1 if found else 2


_WITHOUT_ROUNDS = (
    "the file's name says which competition it is for (these rounds have {}); a new competition has rounds once it is in force: "
    "see `sn29 competitions check` now, and rehearse it with `sn29 localnet up` (docs/owner.md)"
)


def simulate(words: list[str]) -> int:
    settings = read(SimulateSettings, _repeated(words, "--rounds"))
    from sn29.rules.schedule import parse_file

    try:
        text = settings.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(Reason.COMPETITION_FILE, str(error)[:200], "a file of UTF-8 text", str(settings.file)) from None
    file = parse_file(settings.file.stem, text)
    known: set[str] = set()
    read_rounds = 0

    def with_it() -> Iterator[RoundRecord]:
        nonlocal read_rounds
        for record in record_files.read_all(settings.rounds):
            read_rounds += 1
            known.update(record.competitions)
            if file.name in record.competitions:
                yield record

    rounds = tuple(again.simulate(with_it(), file))
    if skipped := read_rounds - len(rounds):
        print(f"{skipped} of {read_rounds} rounds skipped: they have no {file.name}", file=sys.stderr)
    if not rounds:
        print(f"sn29 competitions simulate: no round has {file.name}, so there is nothing to compare it with", file=sys.stderr)
        print(f"  what to do: {_WITHOUT_ROUNDS.format(', '.join(sorted(known)))}", file=sys.stderr)
        return 1
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
    number = f"{len(rounds)} round{'s' if len(rounds) > 1 else ''}"
    return [f"mean weight in {number}, then -> with the new file", *(row[2] for row in sorted(rows))]


def _print_json(value: Json) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))
