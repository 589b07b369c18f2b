"""`sn29 report` as its user types it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded import WINDOW
from watched import ALICE, FIRST, watched

from sn29 import cli

REPOSITORY = Path(__file__).resolve().parents[1]


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    assert cli.main(["report", *words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    first, advice = said.err.splitlines()
    assert advice.startswith("  what to do: ")
    return first


def in_one_line(words: list[str], capsys: pytest.CaptureFixture) -> str:
    assert cli.main(["report", *words]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


def test_a_state_folder_becomes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    watched(tmp_path / "state", rounds=2)
    out = tmp_path / "new" / "report.html"
    assert cli.main(["report", "--state.dir", str(tmp_path / "state"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: 2 rounds, 6 miners, {out.stat().st_size:,} bytes\n"
    assert "critical: no status.json" in said.err, "what is on the page is said here too"
    assert "; what to do: look at its log" in said.err
    assert f"Round of block {FIRST + WINDOW:,}" in out.read_text()
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_records_become_one_file_that_has_no_alarms(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = watched(tmp_path / "state", rounds=3)
    out = tmp_path / "report.html"
    records = sorted((state.folder / "records").iterdir())
    assert cli.main(["report", str(records[0]), str(records[1]), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    page = out.read_text()
    assert f"Round of block {FIRST + WINDOW:,}" in page
    assert f"Round of block {FIRST + 2 * WINDOW:,}" not in page
    assert cli.main(["report", str(state.folder / "records"), "--rounds", "1", "--out", str(out)]) == 0
    assert f"Round of block {FIRST:,}" not in out.read_text()


def test_coming_changes_are_read_from_the_competition_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = watched(tmp_path / "state", rounds=1)
    words = ["report", "--state.dir", str(state.folder), "--competitions.dir", str(REPOSITORY / "competitions"), "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["competitions"]) == {"c00", "c01"}
    assert found["competitions"]["c01"]["changes"][0]["what"]
    assert found["miners"][ALICE]["rounds"][0]["place"] == 1
    assert found["now"]["rounds"][0]["block"] == FIRST


def test_what_cannot_be_is_said_in_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = watched(tmp_path / "state", rounds=1)
    folder, out = str(state.folder), tmp_path / "out.html"
    assert "one of --out FILE, --serve HOST:PORT and --json" in refused(["--state.dir", folder], capsys)
    assert "--out and --json" in refused(["--state.dir", folder, "--out", str(out), "--json"], capsys)
    assert "no such folder; name" in in_one_line(["--state.dir", str(tmp_path / "none"), "--out", str(out)], capsys)
    (empty := tmp_path / "empty").mkdir()
    for what in (["--out", str(out)], ["--json"]):
        said = in_one_line(["--state.dir", str(empty), *what], capsys)
        assert f"{empty}: no validator or miner has run with it; start one, or name its folder" in said
    assert not list(empty.iterdir())
    assert "files or folders with round records" in refused([str(tmp_path), "--out", str(out)], capsys)
    assert "HOST:PORT" in refused(["--state.dir", folder, "--serve", "2929"], capsys)
    assert cli.main(["report", "--state.dir", folder, "--out", str(out), "--rounds", "0"]) != 0
    assert "at least 1" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["report", str(state.folder / "records"), "--out", str(state.folder)]) == 1
    said = capsys.readouterr().err
    assert f"{state.folder}: Is a directory; name a file that can be written with --out" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = in_one_line(["--state.dir", folder, "--serve", f"127.0.0.1:{port}"], capsys)
    assert said == f"sn29 report: 127.0.0.1:{port}: port {port} is taken by another program; name another port with --serve\n"
    assert not list(tmp_path.rglob("*.part"))


def test_served_until_a_signal_comes(tmp_path: Path) -> None:
    state = watched(tmp_path / "state", rounds=1)
    command = [sys.executable, "-m", "sn29.cli", "report", "--state.dir", str(state.folder), "--serve", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.match(r"up: http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert found is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
        connection.request("GET", "/competition/c00.json")
        assert json.loads(connection.getresponse().read())["rounds"][0]["holder"] == ALICE
        connection.close()
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=30)
        assert (process.returncode, out, error) == (0, "", "")


def test_a_git_server_that_never_answers_holds_up_no_page(tmp_path: Path) -> None:
    watched(tmp_path / "state", rounds=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        git = f"http://ann:planted@127.0.0.1:{silent.getsockname()[1]}/rules@{'a' * 40}"
        words = ["--state.dir", str(tmp_path / "state"), "--serve", "127.0.0.1:0", "--competitions.git", git]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "sn29.cli", "report", *words]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout is not None
            port = re.match(r"up: http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
            assert port is not None
            connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=30)
            connection.request("GET", "/healthz")
            said = connection.getresponse().read().decode()
            connection.close()
            os.killpg(process.pid, signal.SIGKILL)
    assert "--competitions.git: no answer yet" in said


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    watched(tmp_path, rounds=1)
    code = (
        "import subprocess, sys, os, time; p = subprocess.Popen([sys.executable, '-m', 'sn29.cli', 'report', '--state.dir', "
        f"{str(tmp_path)!r}, '--serve', '127.0.0.1:0', '--parent', str(os.getpid())], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    ends = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < ends
        time.sleep(0.1)
