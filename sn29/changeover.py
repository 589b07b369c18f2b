"""New rules take effect at the first round block after they were seen: a round is judged by one set, everywhere the same.

    rules            the competition files, and the software that moves a loss or a weight
    note             keeps in the store what a validator has now, with the block from which on it holds
    due              what the round that is due is judged by: what holds at its block. Older files are in the store, and used for
                     it; other software cannot judge it, and says from which block on it judges

A round block is one at which a window of any competition opens. Validators that get new rules between the same two of them,
sooner or later, restarted or not, so change at the same block, if each looks for new files all the time, also while it works on
a round. Where windows are of different lengths, that block may lie inside a longer one, whose later rounds are then judged by
the new rules. One that did not look between a round block and its getting new rules cannot know on which side of that block the
others got them: it leaves out the rounds from the first such block on, up to the one from which on it has the new rules. Who
gets them after another round block changes at another one: what everybody should change at once stands in the files themselves
with its block, days ahead: see `rules.schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from sn29.errors import Rejected
from sn29.evaluation import profile
from sn29.examination import Rules
from sn29.rules import RULES_VERSION
from sn29.rules.selection import next_round
from sn29.store import RulesKept, Store
from sn29.telemetry import tell, warn

Parse = Callable[[Mapping[str, str]], Rules]
"""The rules that competition files say, given by name. Raises Rejected(COMPETITION_FILE)."""


@dataclass(frozen=True, slots=True)
class Due:
    """What the round that is due is judged by."""

    rules: Rules
    since: int
    """They judge no round of an earlier block,"""
    last: int | None
    """and none of a later one; None: there are no other ones yet."""


def software() -> dict[str, str]:
    """Name -> version of what decides the bits of a loss, and what is made of it."""
    # Without the build that a local part names: 2.9.0+cu126 and 2.9.0+cu128 are the same code.
    libraries = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {"rules": str(RULES_VERSION), "engine": str(profile.VERSION), **libraries}


def note(store: Store, block: int, texts: Mapping[str, str], running: Mapping[str, str], parse: Parse) -> None:
    """Notes what a validator has at a final block: its files, and the software that is running."""
    _note(store, block, texts, running, parse)
    looked = store.looked()
    if looked is None or looked < _newest(parse(texts), block):  # one write a window
        store.keep_looked(block)


def _note(store: Store, block: int, texts: Mapping[str, str], running: Mapping[str, str], parse: Parse) -> None:
    now, kept = RulesKept(0, texts, running), store.rules_kept(gaps=True)
    if not any(one.texts for one in kept):
        rules = parse(texts)
        opened = [one for one in store.open_rounds() if one.block >= _newest(rules, block)]  # by an sn29 that kept no rules
        since = _next(rules, block) if any(one.plan.get("rules") not in (None, dict(rules.hashes)) for one in opened) else 0
        if kept:
            since = max(since, _next(rules, kept[-1].since))
        store.keep_rules(RulesKept(since, texts, running))
        if since:
            tell("rules", f"the window that is open was begun with other files: these hold from block {since} on", block=since)
        return
    standing = max((one for one in kept if one.since <= block), key=lambda one: one.since, default=kept[0])
    if _same(kept[-1], now):
        return
    if _same(standing, now):
        store.keep_rules(standing)
        tell("rules", "the rules of before are back; what was noted for a later block never took effect")
        return
    if not standing.texts:
        standing = kept[-1]
    before = _parsed(standing, parse)
    rules = before or parse(texts)
    since = _next(rules, block)
    what = f"new rules ({'; '.join(differences(standing, now))}) take effect from block {since} on"
    unknown = _next(rules, _last_look(store))
    if unknown < since:
        how = f"nobody looked here since block {unknown}, so what others judge by from there on is not known: that is left out"
    elif before is None or dict(standing.software) != dict(running):
        how = "what is due before that, the former software judges"
    else:
        how = "earlier rounds are judged as before"
    store.keep_rules(RulesKept(since, texts, running), unknown=unknown)
    tell("rules", f"{what}: {how}", block=since)


def due(store: Store, block: int, running: Mapping[str, str], catch_up: int, parse: Parse, said: set[int]) -> Due | None:
    """What the round that is due at a final block is judged by, or the next one if none is; None while this software must not
    judge it. Of rounds that were missed those that --catch-up leaves out are not due, whatever they would be judged by.

    said: the blocks of which that was told.
    """
    kept = store.rules_kept(gaps=True)
    for one, following in zip(kept, (*kept[1:], None), strict=True):
        if following is None:
            return Due(parse(one.texts), one.since, None)
        rules, last = _parsed(one, parse) if one.texts else None, following.since - 1
        after = max(store.last_finished() or 0, one.since - 1) or None
        found = next_round(_lengths(rules or parse(kept[-1].texts)), block, after, catch_up)
        is_over = block > last and (found is None or found > last)
        if rules is not None and one.software == running and not is_over:
            return Due(rules, one.since, last)
        if block > last:
            continue  # nobody waits for a round that this software cannot judge
        if found is not None and one.texts and one.since not in said:
            said.add(one.since)
            what = "; ".join(differences(one, following))
            why = f"the window that is open was begun with other rules ({what})"
            how = f"this software judges from block {following.since} on; until then the weights that stand are set again"
            warn("rules_wait", f"{why}: {how}. To finish the window start the former software", block=following.since)
        return None
    return None


def differences(old: RulesKept, new: RulesKept) -> list[str]:
    """What became different, each with both values."""
    names = sorted({*old.texts, *new.texts})
    files = [f"{n} {_how(old.texts.get(n), new.texts.get(n))}" for n in names if old.texts.get(n) != new.texts.get(n)]
    words = sorted({*old.software, *new.software})
    versions = [(n, old.software.get(n, "-"), new.software.get(n, "-")) for n in words]
    return [*(f"{name} {before} -> {after}" for name, before, after in versions if before != after), *files]


def _how(before: str | None, after: str | None) -> str:
    return "is new" if before is None else "is gone" if after is None else "has another text"


def _same(one: RulesKept, other: RulesKept) -> bool:
    return dict(one.texts) == dict(other.texts) and dict(one.software) == dict(other.software)


def _parsed(kept: RulesKept, parse: Parse) -> Rules | None:
    """None: files of a former software that this one does not read."""
    try:
        return parse(kept.texts)
    except Rejected:
        return None


def _lengths(rules: Rules) -> dict[str, int]:
    """Blocks of a window, by competition; the same at every block."""
    return {name: rules.at(name, 0).samples.window_blocks for name in rules.files}


def _last_look(store: Store) -> int:
    """The newest block at which this validator is known to have had the rules of before: new ones came after it."""
    return max(store.looked() or 0, store.last_finished() or 0, *(one.block for one in store.open_rounds()), 0)


def _newest(rules: Rules, block: int) -> int:
    """The block of the newest round at this block."""
    return max(block // length * length for length in _lengths(rules).values())


def _next(rules: Rules, block: int) -> int:
    """The next round's block after this one."""
    return min((block // length + 1) * length for length in _lengths(rules).values())
