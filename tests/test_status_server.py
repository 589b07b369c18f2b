"""The pages over real HTTP, in a real browser, and in the process that a program starts beside itself."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
from browser import Tab, chromium, needed
from prometheus_client.parser import text_string_to_metric_families
from recorded import WINDOW, c00_text
from watched import ALICE, BOB, FIRST, Watched, telling, watched

from neurons.status_page import beside
from sn29 import telemetry
from sn29.errors import Reason, Rejected, Unavailable
from sn29.report import server as serving
from sn29.report.server import Pages, Server, address_of
from sn29.report.site import POLICY
from sn29.report.snapshot import Reader
from sn29.rules.schedule import parse_file
from sn29.settings import ValidatorSettings, read
from sn29.store import ChainSeen, Store

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURES = os.environ.get("SN29_SCREENSHOTS")
"""Folder in which screenshots are kept."""


@contextmanager
def served(folder: Path, host: str = "127.0.0.1", silence_s: float = serving.SILENCE_S, port: int = 0) -> Iterator[Server]:
    reader = Reader(folder, rules=lambda: {"c00": parse_file("c00", c00_text("champion"))})
    with Server(host, port, Pages(reader), silence_s=silence_s) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A validator at work: its status is written again and again, as by `neurons.status_page`."""
    made = watched(tmp_path_factory.mktemp("state"))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(1.0):
            telemetry.note()

    with telling(made):
        beating = threading.Thread(target=beat)
        beating.start()
        yield made
        over.set()
        beating.join()


@pytest.fixture(scope="module")
def server(state: Watched) -> Iterator[Server]:
    with served(state.folder) as one:
        yield one


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    host, port = server.server_address[0], server.server_address[1]
    connection = http.client.HTTPConnection(str(host), int(port), timeout=30)
    try:
        connection.request(method, path, headers={"Host": headers.pop("host", f"127.0.0.1:{port}"), **headers})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def test_pages_json_metrics_and_health(server: Server, state: Watched) -> None:
    block = state.newest.head.block
    for path in ("/", "/competition/c00", f"/miner/{ALICE}", f"/round/{block}"):
        status, headers, body = ask(server, path)
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert body.startswith(b"<!DOCTYPE html>")
        assert (headers["content-security-policy"], headers["x-content-type-options"]) == (POLICY, "nosniff")
        name = "/status.json" if path == "/" else f"{path}.json"
        status, headers, body = ask(server, name)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(body)
    status, _, body = ask(server, "/metrics")
    assert status == 200
    assert len(list(text_string_to_metric_families(body.decode()))) > 30
    assert ask(server, "/healthz")[0] == 200
    assert ask(server, "/?x=1")[0] == 200


def test_health_is_503_when_the_program_is_silent(tmp_path: Path) -> None:
    watched(tmp_path, rounds=1)
    with served(tmp_path) as server:
        status, _, body = ask(server, "/healthz")
    assert status == 503
    assert b"critical: no status.json" in body


@pytest.mark.parametrize(
    "path", ["/x", "/miner/nobody", "/round/7", "/round/7.json", "/favicon.ico", "/../../etc/passwd", "/%00", "//x/"]
)
def test_there_is_nothing_else(server: Server, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_reading(server: Server, method: str) -> None:
    status, headers, _ = ask(server, "/", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_the_body(server: Server) -> None:
    status, headers, body = ask(server, "/competition/c00", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 10_000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8080", 200), ("LOCALHOST", 200), ("127.0.0.1", 200), ("127.0.0.2:1", 200),
        ("[::1]:29", 200), ("evil.example", 421), ("evil.example:80", 421), ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421), ("", 421), ("10.0.0.1", 200), ("validator", 421),
    ],
)  # fmt: skip
def test_a_name_that_was_bent_to_this_machine_gets_no_answer(server: Server, host: str, status: int) -> None:
    for path in ("/", "/status.json", "/metrics"):
        assert ask(server, path, host=host)[0] == status


def test_whoever_listens_to_others_answers_to_names_of_its_network_and_not_to_strangers(state: Watched) -> None:
    with served(state.folder, "0.0.0.0") as server:
        found = {
            host: ask(server, "/status.json", host=host)[0] for host in ("validator:9129", "10.0.0.1", "evil.example:9129", "")
        }
    assert found == {"validator:9129": 200, "10.0.0.1": 200, "evil.example:9129": 421, "": 421}


def test_whoever_listens_to_others_does_not_show_weights_that_the_chain_conceals(tmp_path: Path) -> None:
    state = watched(tmp_path, published=False)
    with closing(Store(tmp_path / "store.db")) as store:
        store.keep_chain_seen(ChainSeen(state.head, time.time(), 12.0, 360, 1))
    for host, shown in (("127.0.0.1", True), ("0.0.0.0", False)):
        with served(tmp_path, host) as server:
            assert (ask(server, f"/round/{state.newest.head.block}.json")[0] == 200) == shown
            assert (ALICE.encode() in ask(server, "/metrics")[2]) == shown
            assert (ALICE.encode() in ask(server, "/status.json")[2]) == shown


def test_what_is_no_request_is_left_alone(server: Server) -> None:
    where = (str(server.server_address[0]), int(server.server_address[1]))
    long = b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"
    many = b"GET / HTTP/1.1\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n"
    for sent, expected in ((long, b"414"), (many, b"431"), (b"\x16\x03\x01\x02\x00\r\n\r\n", b"400"), (b"GET\r\n\r\n", b"400")):
        with socket.create_connection(where, timeout=30) as connection:
            connection.sendall(sent)
            answer = connection.recv(400)
        assert expected in answer.split(b"\n")[0] or expected in answer, sent[:20]
    assert ask(server, "/healthz")[0] == 200


def test_slow_visitors_do_not_keep_others_out(server: Server) -> None:
    where = (str(server.server_address[0]), int(server.server_address[1]))
    slow = [socket.create_connection(where, timeout=30) for _ in range(serving.MAX_CONNECTIONS + 8)]
    try:
        for connection in slow[:8]:
            assert connection.recv(1) == b"", "the oldest ones had to go"
        for connection in slow[8:]:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(3):
            assert ask(server, "/healthz")[0] == 200
            slow[-1].sendall(b"x")
    finally:
        for connection in slow:
            connection.close()


def test_a_request_that_never_ends_is_left(state: Watched) -> None:
    with served(state.folder, silence_s=0.2) as server:
        where = (str(server.server_address[0]), int(server.server_address[1]))
        with socket.create_connection(where, timeout=30) as connection:
            connection.setblocking(False)
            with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe
                _until(lambda: connection.sendall(b"GET / HTTP/1.1\r\nX: ") and False)


def test_a_new_round_is_on_the_next_page(tmp_path: Path) -> None:
    watched(tmp_path, rounds=1)
    with served(tmp_path) as server:
        assert f"{FIRST + 360:,}".encode() not in ask(server, "/competition/c00")[2]
        (tmp_path / "store.db").unlink()
        watched(tmp_path, rounds=2)
        time.sleep(serving.FRESH_S + 0.1)
        assert f"{FIRST + 360:,}".encode() in ask(server, "/competition/c00")[2]


@pytest.mark.parametrize("where", ["", "x", "localhost", ":80", "localhost:", "localhost:x", "localhost:70000", "localhost:٣"])
def test_an_address_that_is_none(where: str) -> None:
    with pytest.raises(Rejected, match="HOST:PORT"):
        address_of(where)


def test_a_port_that_is_taken_is_said(server: Server, state: Watched) -> None:
    port = int(server.server_address[1])
    with pytest.raises(Unavailable, match=f"port {port} is taken by another program; name another port with --serve"):
        Server("127.0.0.1", port, server.pages)
    with pytest.raises(Unavailable, match="no address of this machine"):
        Server("192.0.2.1", 0, server.pages)


def test_addresses_of_both_kinds() -> None:
    assert address_of("127.0.0.1:2929") == ("127.0.0.1", 2929)
    assert address_of("[::1]:0") == ("::1", 0)
    assert address_of("0.0.0.0:80") == ("0.0.0.0", 80)


# ---- a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return Path(PICTURES) if PICTURES else tmp_path


_OVERLAPS = """[...document.querySelectorAll('main *')].filter(e => {
  if (e.closest('.box, svg, figure, pre')) return false;
  const r = e.getBoundingClientRect(); return r.width > 0 && r.right > document.documentElement.clientWidth + 1}).length"""
_CUT = """[...document.querySelectorAll('.cards tbody td')].filter(e =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.textContent)"""
_CONTRAST = """(() => {
  const parse = c => c.match(/[0-9.]+/g).map(Number);
  const linear = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = parse(c).map(x => linear(x / 255));
    return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parse(c).length < 4 || parse(c)[3] > 0) return c } return 'rgb(255,255,255)' };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const said = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!said || e.closest('svg, script, style, noscript, .skip')) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) bad.push(`${e.tagName} ${e.className} ${ratio.toFixed(2)} ${e.textContent.slice(0, 30)}`) }
  return bad })()"""


def paths(state: Watched) -> dict[str, str]:
    return {"now": "", "competition": "competition/c00", "miner": f"miner/{BOB}", "round": f"round/{state.newest.head.block}"}


@needed
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_pages_render_without_a_complaint(
    tab: Tab, server: Server, state: Watched, pictures: Path, width: int, dark: bool
) -> None:
    tab.look(width, dark=dark)
    for name, path in paths(state).items():
        tab.asked.clear()
        tab.complaints.clear()
        tab.go(server.url + path)
        assert tab.run("document.querySelectorAll('main h1').length") == 1
        assert tab.run("document.documentElement.scrollWidth") <= width, "a page that scrolls sideways cannot be read on a phone"
        assert tab.run(_OVERLAPS) == 0
        if width == 360:
            assert tab.run(_CUT) == [], "what to do is read without scrolling sideways"
            assert name == "miner" or tab.run("document.querySelectorAll('.cards .why').length") > 0
        assert tab.run(_CONTRAST) == []
        paper = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(22, 24, 27)") == dark
        picture = tab.picture(pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png")
        assert picture.stat().st_size > 10_000
        assert tab.complaints == []
        assert tab.asked == [server.url + path]


@needed
def test_links_lead_where_they_say(tab: Tab, server: Server, state: Watched) -> None:
    tab.look(1200, dark=False)
    tab.complaints.clear()
    tab.go(server.url)
    for selector, title in (
        ("nav a[href='/competition/c00']", "Competition c00"),
        (f"main a[href='/miner/{BOB}']", f"Miner {BOB[:4]}…{BOB[-4:]}"),
        (f"main a[href='/round/{FIRST}']", f"Round of block {FIRST:,}"),
        ("a.brand", "Validator"),
    ):
        _click(tab, selector)
        assert tab.run("document.querySelector('h1').textContent") == title
    assert tab.complaints == []
    found = tab.run("[...document.querySelectorAll('a')].map(a => a.getAttribute('href')).filter(h => !h.startsWith('#'))")
    assert {ask(server, href)[0] for href in found} == {200}


def _click(tab: Tab, selector: str) -> None:
    target = tab.run(f"document.querySelector({json.dumps(selector)}).href")
    tab.run(f"document.querySelector({json.dumps(selector)}).click()")
    ends = time.monotonic() + 30
    while tab.run("location.href + document.readyState") != f"{target}complete":
        assert time.monotonic() < ends, target
        time.sleep(0.02)


@needed
def test_a_keyboard_and_a_screen_reader_find_their_way(tab: Tab, server: Server, state: Watched) -> None:
    tab.look(1200, dark=False)
    for path in paths(state).values():
        tab.go(server.url + path)
        tab.call("Accessibility.enable")
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        roles = [node.get("role", {}).get("value") for node in nodes if not node.get("ignored")]
        assert {"banner", "navigation", "main", "contentinfo"} <= set(roles)
        for role in ("table", "progressbar", "img", "link", "region", "image"):
            unnamed = [
                n for n in nodes if n.get("role", {}).get("value") == role and not n.get("ignored") and not n["name"]["value"]
            ]
            assert unnamed == [], role
        levels = tab.run("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels)), "no level is left out"
        assert tab.run("[...document.querySelectorAll('th')].every(h => h.scope)")
        tab.run("document.querySelector('.skip').focus()")
        assert tab.run("getComputedStyle(document.querySelector('.skip')).position") == "static", "seen when it is reached"
        outlined = "(e => { e.focus({focusVisible: true}); return getComputedStyle(e).outlineStyle })"
        assert tab.run(f"{outlined}(document.querySelector('nav a'))") == "solid"


@needed
def test_the_first_page_keeps_up_to_date_by_itself(tab: Tab, server: Server, state: Watched) -> None:
    tab.look(1200, dark=False)
    tab.complaints.clear()
    tab.go(server.url)
    assert "2 of 5" in tab.run("document.body.innerText")
    tab.run("document.querySelector('summary').click()")
    telemetry.stage("measuring", 4, 5, "c00: the next one")
    ends = time.monotonic() + 40
    while "4 of 5" not in tab.run("document.body.innerText"):
        assert time.monotonic() < ends
        time.sleep(0.2)
    assert tab.run("document.querySelector('details').open"), "what the reader opened stays open"
    assert tab.complaints == []
    telemetry.stage("measuring", 2, 5, "c00: the next one")


@needed
def test_an_open_page_gets_what_is_new_in_every_part_and_says_when_nothing_answers_any_more(
    tab: Tab, tmp_path: Path, pictures: Path
) -> None:
    tab.look(1200, dark=False)
    state = watched(tmp_path, rounds=2)
    with telling(state):
        with served(tmp_path) as server:
            tab.go(server.url)
            newest = f"{state.newest.head.block + WINDOW:,}"
            assert newest not in tab.run("document.querySelector('[data-live=rounds]').innerText")
            tab.run("document.querySelector('summary').click()")
            (tmp_path / "store.db").unlink()
            watched(tmp_path, rounds=3)
            telemetry.warn("mismatch", "a new sentence")
            telemetry.stage("deciding")
            for part, what in (
                ("rounds", newest),
                ("warnings", "a new sentence"),
                ("work", "Deciding"),
                ("counters", "mismatch"),
            ):
                _until(lambda part=part, what=what: what in tab.run(f"document.querySelector('[data-live={part}]').innerText"))
            _until(lambda: tab.run("document.querySelector('nav').innerHTML").count("/round/4811040"))
            assert tab.run("document.querySelector('details').open"), "what the reader opened stays open"
            assert "No answer" not in tab.run("document.body.innerText")
        _until(lambda: "No answer since" in tab.run("document.querySelector('[data-live=alarms]').innerText"))
        assert "All is well" not in tab.run("document.body.innerText")
        assert tab.run("document.title").startswith("(!) No answer since")
        tab.picture(pictures / "no-answer.png")
        with served(tmp_path, port=int(server.server_address[1])):
            _until(lambda: "No answer" not in tab.run("document.body.innerText"))
            assert not tab.run("document.title").startswith("(!)")


@needed
@pytest.mark.parametrize("width", [360, 1200])
def test_the_one_file_opens_from_the_disk(tab: Tab, state: Watched, tmp_path: Path, pictures: Path, width: int) -> None:
    from sn29.report.site import whole

    path = tmp_path / "report.html"
    path.write_text(whole(Reader(state.folder).read()), encoding="utf-8")
    tab.look(width, dark=False)
    tab.asked.clear()
    tab.complaints.clear()
    tab.go(path.as_uri())
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run(f"document.querySelector(\"main a[href='#miner-{BOB}']\").click()")
    assert tab.run("location.hash") == f"#miner-{BOB}"
    top = tab.run(f"document.getElementById('miner-{BOB}').getBoundingClientRect().top")
    assert abs(top) < 5, "the page has gone there"
    tab.picture(pictures / f"report-{width}.png")
    assert tab.complaints == []
    assert tab.asked == [path.as_uri()]


# ---- beside a program ------------------------------------------------------------------------------------------------

_PROGRAM = """
import asyncio, sys
from pathlib import Path
from neurons.status_page import beside
from sn29 import telemetry
from sn29.settings import ValidatorSettings, read

async def run():
    settings = read(ValidatorSettings, sys.argv[1:])
    telemetry.configure(as_json=True)
    async with beside(settings, "validator", settings.state_dir):
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(run())
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@contextmanager
def program(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_TOKEN": "hf_planted", "BT_WALLET_PASSWORD": "planted"}
    command = [sys.executable, "-c", _PROGRAM, "--state.dir", str(folder), "--status.port", str(port)]
    command += ["--competitions.git", f"http://ann:planted@127.0.0.1:9/rules@{'a' * 40}", "--weights.alarm-epochs", "20"]
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _until(what: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.1)


def _answers(port: int) -> dict | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/status.json")
        return json.loads(connection.getresponse().read())
    except OSError:
        return None
    finally:
        connection.close()


def _child_of(pid: int) -> int | None:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.mark.timeout(240)
def test_the_page_is_a_process_of_its_own_that_dies_and_is_started_again_and_ends_with_the_program(tmp_path: Path) -> None:
    port = _free_port()
    with program(tmp_path, port) as process:
        _until(lambda: _answers(port))
        answer = _answers(port)
        assert answer is not None
        assert answer["status"]["pid"] == process.pid
        child = _child_of(process.pid)
        assert child is not None
        environment = Path(f"/proc/{child}/environ").read_text()
        assert "planted" not in environment
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        assert "planted" not in "".join(words)
        assert words[words.index("--weights.alarm-epochs") + 1] == "20"
        assert "PYTHONPATH" in environment
        os.kill(child, signal.SIGKILL)
        _until(lambda: _child_of(process.pid) not in (None, child) and _answers(port))
        assert process.poll() is None
        status = tmp_path / telemetry.STATUS
        _until(lambda: [w.event for w in telemetry.Status.from_json(status.read_text()).warnings] == ["status_page"])
        process.kill()  # nothing is left to it to end its child
        process.wait()
        _until(lambda: _answers(port) is None)


def test_a_program_that_fails_says_why_in_its_last_word(tmp_path: Path) -> None:
    settings = read(ValidatorSettings, ["--state.dir", str(tmp_path)])

    async def run(error: BaseException | None) -> None:
        async with beside(settings, "validator", tmp_path):
            if error is not None:
                raise error

    setting = Rejected(Reason.SETTING, "no wallet", "a wallet with a hotkey")
    for error, said, counted, refused in (
        (None, "", 0, 0),
        (asyncio.CancelledError(), "", 0, 0),
        (setting, str(setting), 0, 1),
        (Unavailable("the node", "silent"), "the node: silent", 1, 1),
        (setting, str(setting), 1, 2),
        (None, "", 1, 2),
    ):
        with nullcontext() if error is None else pytest.raises(type(error)):
            asyncio.run(run(error))
        last = telemetry.Status.from_json((tmp_path / telemetry.STATUS).read_bytes())
        assert (last.stage, last.detail) == (telemetry.STOPPED, said)
        assert len(last.starts) == counted, "only the one that could not stay up"
        assert len(last.refused) == refused


def test_a_port_that_is_taken_does_not_disturb_the_program(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = int(taken.getsockname()[1])
    with program(tmp_path, port) as process:
        said: list[dict[str, str]] = []
        assert process.stderr is not None
        hearing = threading.Thread(target=lambda: said.extend(map(json.loads, process.stderr)))
        hearing.start()
        _until(lambda: said)
        for _ in range(2):  # it tries again, in silence
            _until(lambda: _child_of(process.pid))
            _until(lambda: not _child_of(process.pid))
        taken.close()
        _until(lambda: _answers(port))
        _until(lambda: len(said) > 1)
        assert process.poll() is None
        process.kill()
        hearing.join(60)
    (no, up) = [line["message"] for line in said]
    assert no == (
        f"no page on http://127.0.0.1:{port}/: port {port} is taken by another program; name another port with --status.port; "
        "all else goes on, and the page is tried again"
    )
    assert up == f"status page, metrics and health check on http://127.0.0.1:{port}/"
