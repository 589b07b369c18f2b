"""The pages as they are read: one by one behind addresses, or all in one file; and what they say as JSON.

answer(snapshot, "/miner/5F..")        a page, whole; None: there is no such page
answer_json(snapshot, "/round/7200")   the same as JSON; of a round its record, as `sn29 replay` reads it
whole(snapshot)                        one self-contained file
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sn29 import explain, record_files
from sn29.report import pages
from sn29.report.markup import text
from sn29.report.page import Cast
from sn29.report.snapshot import Snapshot
from sn29.report.style import css
from sn29.rules.schedule import in_force
from sn29.telemetry import Status

REFRESH_S = 5
_LIVE = (
    """
const parts=d=>[...d.querySelectorAll('[data-live]')];let answered=new Date,asking=false;
const again=async()=>{if(document.hidden||asking)return;asking=true;try{
const r=await fetch(location.href,{signal:AbortSignal.timeout(%d)});if(!r.ok)throw r;
const d=new DOMParser().parseFromString(await r.text(),'text/html'),now=parts(d);
for(const e of parts(document)){const n=now.find(n=>n.dataset.live===e.dataset.live);
if(n&&e.innerHTML!==n.innerHTML&&!e.contains(document.activeElement)){
const open=[...e.querySelectorAll('details')].map(x=>x.open);e.innerHTML=n.innerHTML;
e.querySelectorAll('details').forEach((x,i)=>{x.open=!!open[i]})}}
document.title=d.title;document.querySelector('[rel=icon]').href=d.querySelector('[rel=icon]').href;answered=new Date
}catch(e){const said='No answer since '+answered.toISOString().slice(11,16)+' UTC';
document.querySelector('[data-live=alarms]').innerHTML='<p class="state bad">'+said+': what is below is old</p>';
document.title='(!) '+said}asking=false};
setInterval(again,%d);document.addEventListener('visibilitychange',again)
""".strip().replace("\n", "")
    % (4000 * REFRESH_S, 1000 * REFRESH_S)
)
"""Keeps what is marked up to date on the first page, and says when nothing answers; everything is there without it."""
_HASH = base64.b64encode(hashlib.sha256(_LIVE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_HASH}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Of every page that is served: were a string ever not escaped, a browser would still load and run nothing."""
_FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_PATH = re.compile(r"/(competition|miner|round)/([^/]{1,200})")
MAX_KEPT = 64
"""Bodies of pages that are kept: a competition's pictures take half a second to draw."""


def link(kind: str, name: str) -> str:
    """The address of a page that is served."""
    return "/" if kind == "now" else f"/{kind}/{_quoted(name)}"


def _quoted(name: str) -> str:
    return quote(name, safe="", errors="replace")


def anchor(kind: str, name: str) -> str:
    """The same inside the one file."""
    return f"#{_id(kind, name)}"


def _id(kind: str, name: str) -> str:
    return kind if kind == "now" else f"{kind}-{_quoted(name)}"


def parsed(path: str) -> tuple[str, str] | None:
    """(kind, name) of an address; None where no page can be."""
    if path == "/":
        return "now", ""
    found = _PATH.fullmatch(path)
    return (found[1], unquote(found[2])) if found else None


class Site:
    """Pages, with what takes long kept from one answer to the next."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], str] = OrderedDict()

    def answer(self, s: Snapshot, path: str) -> str | None:
        """One page, whole; None: there is none of that address."""
        where = parsed(path)
        body = self._body(s, *where) if where else None
        if where is None or body is None:
            return None
        title = _title(s, *where)
        return _shell(s, where, title, f'<main id="main">\n{body}\n</main>')

    def _body(self, s: Snapshot, kind: str, name: str) -> str | None:
        if kind == "now":
            return pages.now(s, pages.cast_of(s), link)
        key = (kind, name, tuple(one.sha256 for one in s.rounds), _rules_key(s, name), s.head is None)
        if key not in self._kept:
            body = _made(s, pages.cast_of(s), link, kind, name)
            if body is None:
                return None
            self._kept[key] = body
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def _rules_key(s: Snapshot, name: str) -> object:
    """Changes when the rules that a competition's page tells do, and the times of those to come once an hour."""
    versions = s.files[name].versions if name in s.files else ()
    return repr(versions), sum(v.block <= (s.block or 0) for v in versions), int(s.at // 3600) if versions else 0


def _made(s: Snapshot, cast: Cast, links: pages.Links, kind: str, name: str) -> str | None:
    if kind == "competition" and name in s.competitions:
        return pages.competition(s, cast, links, name)
    if kind == "miner" and name in cast.labels:
        return pages.miner(s, cast, links, name)
    one = next((one for one in s.rounds if str(one.block) == name), None) if kind == "round" else None
    return pages.one_round(s, cast, links, one) if one else None


def _title(s: Snapshot, kind: str, name: str) -> str:
    program = s.status.program if s.status else "report"
    worst = "" if not s.alarms else f"({len(s.alarms)}) "
    return f"{worst}sn29 {program}" if kind == "now" else f"{kind.capitalize()} {name} · sn29"


def _icon(s: Snapshot) -> str:
    colour = "1b7a4a" if not s.alarms else "c4651c" if s.is_healthy else "b3261e"
    circle = f"%3Ccircle cx='4' cy='4' r='3' fill='%23{colour}'/%3E"
    svg = f"%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E{circle}%3C/svg%3E"
    return f'<link rel="icon" href="data:image/svg+xml,{svg}">'


def _shell(s: Snapshot, where: tuple[str, str], title: str, main: str) -> str:
    kind, name = where
    head = f"<title>{text(title)}</title>\n{_icon(s)}\n<style>{css()}</style>"
    if kind == "now":
        head += f'\n<noscript><meta http-equiv="refresh" content="{6 * REFRESH_S}"></noscript>'
    data = "/status.json" if kind == "now" else f"{link(kind, name)}.json"
    foot = f'<footer data-live="foot">Read {pages.when(s.at)}. As JSON: <a href="{text(data)}">{text(data)}</a>. '
    foot += 'For machines: <a href="/metrics">/metrics</a>, <a href="/healthz">/healthz</a>.</footer>'
    script = f"\n<script>{_LIVE}</script>" if kind == "now" else ""
    return _document(head, f"{_top(s, link, where)}\n{main}\n{foot}{script}")


def _top(s: Snapshot, links: pages.Links, where: tuple[str, str] | None) -> str:
    targets = [("now", "", "Now"), *(("competition", name, name) for name in s.competitions)]
    if s.newest is not None:
        targets.append(("round", str(s.newest.block), "Newest round"))
    marks = {True: ' aria-current="page"', False: ""}
    nav = "".join(f'<a href="{text(links(k, n))}"{marks[where == (k, n)]}>{text(said)}</a>' for k, n, said in targets)
    return (
        '<a class="skip" href="#main">Skip to the content</a>\n<header class="top">'
        f'<a class="brand" href="{links("now", "")}">sn29</a><nav aria-label="Pages" data-live="pages">{nav}</nav></header>'
    )


def _document(head: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# --- one file ---------------------------------------------------------------------------------------------------------


def whole(s: Snapshot) -> str:
    """Every page in one file, under one another."""
    cast = pages.cast_of(s)
    targets = [("competition", name) for name in s.competitions]
    targets += [("round", str(one.block)) for one in reversed(s.rounds)]
    targets += [("miner", hotkey) for hotkey in cast.labels]
    parts = [f'<section id="now">{_static(pages.now(s, cast, anchor))}</section>']
    for kind, name in targets:
        body = _made(s, cast, anchor, kind, name)
        if body is not None:
            parts.append(f'<section class="page" id="{text(_id(kind, name))}">{_static(body)}</section>')
    title = "Rounds of the subnet" if s.status is None else f"sn29 {s.status.program}"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_FILE_POLICY}">\n'
    head = f"{policy}<title>{text(title)}</title>\n{_icon(s)}\n<style>{css()}</style>"
    main = f'<main id="main">\n{"".join(parts)}\n</main>'
    top = _static(_top(s, anchor, None))
    return _document(head, f"{top}\n{main}\n<footer>Written {pages.when(s.at)}. Nothing in it is updated.</footer>")


def _static(body: str) -> str:
    """Without what lives: nobody is told that a file changes."""
    return re.sub(r' (?:data-live="[a-z]+"|role="status"|aria-live="polite")', "", body)


# --- JSON -------------------------------------------------------------------------------------------------------------


def answer_json(s: Snapshot, path: str) -> bytes | Mapping[str, Any] | None:
    """What the page of an address says; bytes are JSON already. None: there is no such page. Raises Unavailable, where a record's
    file went away meanwhile."""
    if path in ("/status", "/"):
        return status_json(s)
    where = parsed(path)
    if where is None:
        return None
    kind, name = where
    if kind == "round":
        one = next((one for one in s.rounds if str(one.block) == name), None)
        return record_files.read_text(one.path) if one else None
    if kind == "miner" and name in s.hotkeys:
        return miner_json(s, name)
    return competition_json(s, name) if kind == "competition" and name in s.competitions else None


def everything(s: Snapshot) -> Mapping[str, Any]:
    """All pages but the rounds', whose records are files already."""
    return {
        "now": status_json(s),
        "competitions": {name: competition_json(s, name) for name in s.competitions},
        "miners": {hotkey: miner_json(s, hotkey) for hotkey in s.hotkeys},
    }


def status_json(s: Snapshot) -> Mapping[str, Any]:
    """The first page."""
    published = s.facts.published.items() if s.facts else ()
    return {
        "at": s.at,
        "healthy": s.is_healthy,
        "alarms": [asdict(alarm) for alarm in s.alarms],
        "status": _of_status(s.status),
        "block": s.block,
        "weights": {
            str(mechanism): {
                "decided_at": one.decided.block if one.decided else None,
                "set_at": one.stands[0] if one.stands else None,
                "age_epochs": (s.block - one.stands[0]) / s.epoch if one.stands and s.block is not None else None,
                "on_the_way": len(one.on_its_way),
                "decided": dict(one.decided.by_hotkey) if one.decided else {},
                "on_chain": dict(one.stands[1].by_hotkey) if one.stands else {},
            }
            for mechanism, one in published
        },
        "rounds_withheld": s.withheld,
        "open_rounds": list(s.facts.open_rounds) if s.facts else [],
        "rounds": [
            {"block": one.block, "finished": one.written, "file": one.path.name, "sha256": one.sha256} for one in s.rounds
        ],
        "competitions": list(s.competitions),
        "judged_by": [{"from_block": r.since, "software": dict(r.software)} for r in s.facts.rules] if s.facts else [],
        "imports": [asdict(one) | {"source": Path(one.source).name} for one in s.facts.imports] if s.facts else [],
        "disk": {"free_bytes": s.free_bytes, "size_bytes": s.disk_bytes} if s.disk_bytes else None,
    }


def _of_status(status: Status | None) -> Mapping[str, Any] | None:
    return asdict(status) if status else None


def competition_json(s: Snapshot, name: str) -> Mapping[str, Any]:
    rounds = [one for one in s.rounds if name in one.record.competitions]
    file, block = s.files.get(name), s.block or 0
    return {
        "name": name,
        "rounds": [pages.standings_json(one, name, compare=one is rounds[-1]) for one in reversed(rounds)],
        "rules": in_force(file, block).model_dump(mode="json") if file else None,
        "changes": [{"block": v.block, "what": list(v.what)} for v in file.versions if v.block > block] if file else [],
    }


def miner_json(s: Snapshot, hotkey: str) -> Mapping[str, Any]:
    """What `sn29 explain --json` says."""
    return explain.explain((one.record for one in s.rounds), hotkey)[1]  # type: ignore[no-any-return]
