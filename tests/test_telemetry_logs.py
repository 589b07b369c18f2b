"""Logs: one line an event, for people and for machines; one commitment's life by its hotkey; and no secret in any of them."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

import neurons
from sn29 import telemetry
from sn29.chain import create_wallet, load_wallet
from sn29.concealment import clean, conceal, reveal, without_secrets
from sn29.errors import Rejected
from sn29.localnet import text
from sn29.localnet.ledger import Ledger
from sn29.localnet.network import NETUID, prepare
from sn29.settings import default_cache

ROOT = Path(__file__).parents[1]
SAYING = {"sn29/hub.py", "sn29/models/fetch.py", "sn29/models/disk.py", "sn29/evaluation/fleet.py"}
"""Adapters and numbers do not know telemetry: the programs give them `say`."""

# ---- what is told, in the source --------------------------------------------------------------------------------------


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """(file:line, call) of every event that is told somewhere in the source."""
    for file in sorted(path for top in ("sn29", "neurons") for path in (ROOT / top).rglob("*.py")):
        source, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
        speakers = {"tell", "warn"} if "telemetry" in source and name != "sn29/telemetry.py" else set()
        speakers |= {"say", "_say"} if name in SAYING else set()
        for node in ast.walk(ast.parse(source)) if speakers else ():
            if isinstance(node, ast.Call) and len(node.args) >= 2 and ast.unparse(node.func).rpartition(".")[2] in speakers:
                yield f"{name}:{node.lineno}", node


def test_every_event_has_a_fixed_name_of_one_word():
    names = set()
    for where, call in _calls():
        first = call.args[0]
        assert isinstance(first, ast.Constant), f"{where}: an event's name is made up at run time"
        assert re.fullmatch(r"[a-z][a-z_]*", str(first.value)), f"{where}: {first.value!r}"
        names.add(first.value)
    assert len(names) > 40, "the test has lost sight of them"


OF_ONE_COMMITMENT = {
    "inspected", "remembered", "refused", "waiting", "fetched", "evaluated", "probed", "scored", "suspect", "mismatch",
    "uploaded", "sealed", "committed", "public", "hidden", "judged", "submitted", "queued", "forecast", "held",
}  # fmt: skip
"""Events of a commitment's life. A weight set is one too, in publication.py; it names nobody."""


def test_what_is_told_of_one_commitment_has_its_hotkey():
    seen = set()
    for where, call in _calls():
        event = call.args[0].value if isinstance(call.args[0], ast.Constant) else ""
        if event in OF_ONE_COMMITMENT and not where.startswith("sn29/publication.py"):
            named = {keyword.arg for keyword in call.keywords}
            assert "hotkey" in named or None in named, f"{where}: {event} without hotkey="
            seen.add(event)
    assert seen == OF_ONE_COMMITMENT


# ---- lines -----------------------------------------------------------------------------------------------------------


def _said(script: str, *, env: dict[str, str] | None = None, status: int = 0) -> str:
    """Standard error of a process that says something."""
    start = "from pathlib import Path\nfrom sn29 import telemetry\nfrom sn29.telemetry import *\n"
    done = subprocess.run(
        [sys.executable, "-c", start + script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    return done.stderr


HOSTILE = "ann/\x1b[2J\x1b]0;owned\x07model\nFAKE line\r\u202e\u2028x\x9b31m {event} <red>"


def test_people_get_one_line_an_event_with_nothing_that_moves_a_terminal():
    said = _said(f"configure()\ntell('fetched', 'downloaded ' + {HOSTILE!r}, hotkey='5Fann', model={HOSTILE!r})")
    assert said.count("\n") == 1
    assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d INFO    fetched       downloaded ann/\?\[2J\?\]0;owned\?model FAKE line", said)
    assert all(character.isprintable() for character in said[:-1])
    assert "hotkey=5Fann" in said
    assert "{event} <red>" in said, "what strangers write is no format and no markup"


def test_machines_get_one_object_a_line():
    said = _said(f"configure(as_json=True)\nwarn('refused', {HOSTILE!r}, hotkey='5Fann', got=7, share=0.5)\ntell('x', 'y')")
    first, second = map(json.loads, said.splitlines())
    assert (first["level"], first["event"], first["hotkey"], first["got"], first["share"]) == (
        "WARNING",
        "refused",
        "5Fann",
        7,
        0.5,
    )
    assert first["message"].startswith("ann/?[2J")
    assert set(second) == {"time", "level", "event", "message"}


def test_json_has_no_word_for_what_is_no_number():
    said = _said("configure(as_json=True)\ntell('x', 'y', loss=float('inf'), share=float('nan'), uid=True)")
    line = json.loads(said, parse_constant=lambda word: pytest.fail(word))
    assert (line["loss"], line["share"], line["uid"]) == ("inf", "nan", True)


def test_within_about_everything_is_about_one_hotkey():
    said = _said(
        "import asyncio\nconfigure(as_json=True)\n"
        "async def one(name):\n"
        "    with telemetry.about(name):\n"
        "        await asyncio.sleep(0)\n"
        "        await asyncio.to_thread(warn, 'download_cut', 'goes on')\n"
        "        tell('fetched', 'all', hotkey='5Fother')\n"
        "async def both():\n    await asyncio.gather(one('5Fann'), one('5Fben'))\n    tell('over', 'all')\n"
        "asyncio.run(both())"
    )
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["hotkey"] for line in lines if line["event"] == "download_cut"} == {"5Fann", "5Fben"}
    assert {line["hotkey"] for line in lines if line["event"] == "fetched"} == {"5Fother"}
    assert "hotkey" not in lines[-1]


def test_what_libraries_log_and_what_nobody_expected_are_events_too():
    script = (
        "import logging\nconfigure(as_json=True)\n"
        "logging.getLogger('hub').error('lost\\n%s', 7)\nlogging.getLogger('hub').info('no')\n1 / 0"
    )
    first, second = map(json.loads, _said(script, status=1).splitlines())
    assert (first["event"], first["level"], first["message"]) == ("library", "ERROR", "hub: lost 7")
    assert (second["event"], second["level"]) == ("bug", "ERROR")
    assert "ZeroDivisionError" in second["traceback"]


def test_what_ends_a_thread_and_warnings_are_events_too():
    script = (
        "import os, threading, warnings\nconfigure(as_json=True)\nwarnings.warn(os.environ['HF_TOKEN'])\n"
        "thread = threading.Thread(target=lambda: {}[os.environ['HF_TOKEN']], name='t')\nthread.start()\nthread.join()"
    )
    first, second = map(json.loads, _said(script, env={"HF_TOKEN": "tok-1f2e3d4c5b6a"}).splitlines())
    assert (first["event"], first["level"]) == ("library", "WARNING")
    assert "UserWarning: $HF_TOKEN" in first["message"]
    assert (second["event"], second["message"]) == ("bug", "thread t ended by what nobody expected: KeyError('$HF_TOKEN')")


# ---- the file --------------------------------------------------------------------------------------------------------


def _numbers(folder: Path) -> dict[str, list[int]]:
    """The numbered events of each log file, oldest file first."""
    files = sorted(folder.glob("*.jsonl"), key=lambda path: (path.name == "log.jsonl", path.name))
    return {path.name: [json.loads(line)["n"] for line in path.read_text().splitlines()] for path in files}


def test_the_log_file_is_begun_anew_and_old_ones_go_over_restarts_too(tmp_path):
    for start in (0, 150, 300):
        _said(f"configure(level='INFO', file=Path({str(tmp_path / 'log.jsonl')!r}), file_mb=0.004, keep=3)\n"
              f"for n in range({start}, {start} + 150): tell('counted', 'x' * 20, n=n)")  # fmt: skip
    found = _numbers(tmp_path)
    assert len(found) == 4, "the file and three older ones"
    numbers = [n for some in found.values() for n in some]
    assert numbers == list(range(numbers[0], 450)), "nothing between the oldest that is kept and the newest is lost"
    assert all(path.stat().st_size <= 4000 for path in tmp_path.glob("*.jsonl"))


def test_a_file_that_somebody_else_moves_away_is_begun_anew(tmp_path):
    """As logrotate does, without a word to the program."""
    log = tmp_path / "log.jsonl"
    _said(f"configure(file=Path({str(log)!r}))\ntell('counted', 'a', n=1)\nPath({str(log)!r}).rename({str(tmp_path / 'old')!r})\n"
          "tell('counted', 'b', n=2)")  # fmt: skip
    assert json.loads((tmp_path / "old").read_text())["n"] == 1
    assert json.loads(log.read_text())["n"] == 2


def test_several_programs_write_one_file_and_begin_it_anew_without_losing_a_line(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom sn29.telemetry import *\n"
        f"configure(level='INFO', file=Path({str(tmp_path / 'log.jsonl')!r}), file_mb=0.01, keep=1000)\ninput()\n"
        "for n in range(1000): tell('counted', 'x' * 20, n=n, who=sys.argv[1])"
    )
    programs = [
        subprocess.Popen([sys.executable, "-c", script, who], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
        for who in ("ann", "ben")
    ]
    for program in programs:
        assert program.stdin is not None
        program.stdin.write(b"\n")
        program.stdin.close()
    assert [program.wait(60) for program in programs] == [0, 0]
    lines = [json.loads(line) for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert sorted((line["who"], line["n"]) for line in lines) == [(who, n) for who in ("ann", "ben") for n in range(1000)]
    assert len([*tmp_path.iterdir()]) > 10, "it was begun anew"


def test_only_files_that_we_have_named_are_deleted(tmp_path):
    """And a name is no format: braces and brackets are characters."""
    others = ("sn29{a}[1].miner.log", "sn29{a}[1].2026.log", "sn29{a}[1].log.gz", "sn29xax1.2026-01-01_00-00-00_000000.log")
    for name in others:
        (tmp_path / name).write_text("another's\n")
        os.utime(tmp_path / name, (1, 1))
    _said(f"configure(file=Path({str(tmp_path / 'sn29{a}[1].log')!r}), file_mb=0.001, keep=2)\n"
          "for n in range(50): tell('counted', 'x' * 50, n=n)")  # fmt: skip
    found = {path.name for path in tmp_path.iterdir()}
    assert found > set(others)
    ours = found - set(others)
    assert len(ours) == 3
    assert all(re.fullmatch(r"sn29\{a\}\[1\](\.\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6})?\.log", name) for name in ours)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_costs_lines_of_the_file_and_is_said_once(as_json, tmp_path):
    """The limit of a file's size stands for the disk: the kernel writes what fits and then refuses."""
    log = tmp_path / "log.jsonl"
    said = _said(
        f"import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"configure(as_json={as_json}, file=Path({str(log)!r}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "for n in range(100): tell('counted', 'x' * 50, n=n)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "for n in range(100, 110): tell('counted', 'x' * 50, n=n)"
    )
    assert len(said.splitlines()) == 112, "each event, one line that says that some are lost, one that it is over"
    assert said.count("log_file") == 2
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [line["n"] for line in lines if line["event"] == "counted"]
    assert kept[-10:] == [*range(100, 110)]
    (over,) = [line for line in lines if line["event"] == "log_file"]
    assert over["lost"] == 110 - len(kept) + 1, "those, and the line that said so"


def test_a_log_file_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Rejected, match=re.escape(str(tmp_path / "file" / "log"))):
        telemetry.configure(level="CRITICAL", file=tmp_path / "file" / "log")


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_what_is_secret_by_its_form_or_by_name_is_taken_out():
    assert clean("at wss://ann:pa55@node.example:9944/v1/0123456789abcdef, again") == "at wss://node.example:9944/***, again"
    assert clean("GET https://hub.example/a/b?X-Amz-Signature=abc&x=1 failed") == "GET https://hub.example/a/b?*** failed"
    assert (
        clean("at wss://node.example?apikey=abcd, WSS://node.example/abcd") == "at wss://node.example/***, WSS://node.example/***"
    )
    assert clean("wss://node.example/v1/a;bcdef HTTPS://Hub/x?sig=abc") == "wss://node.example/*** HTTPS://Hub/x?***"
    assert clean("https://ann:p@55@host/x to https://a.b/c@d") == "https://host/x to https://a.b/c@d"
    assert clean("token hf_abcdefghijkl") == "token hf_***"
    assert clean("ws://127.0.0.1:9944 and ws://[::1]:9944/") == "ws://127.0.0.1:9944 and ws://[::1]:9944/"
    conceal("ann/secret-model", "(--repo)")
    try:
        assert clean("ann/secret-model@0123: 404") == "(--repo)@0123: 404"
        assert without_secrets("first\n  ann/secret-model\n") == "first\n  (--repo)\n", "a traceback keeps its lines"
    finally:
        reveal("ann/secret-model")
    assert clean("ann/secret-model") == "ann/secret-model"
    conceal("abc", "(short)")
    assert clean("abcdef") == "abcdef"


SECRETS = {
    "HF_TOKEN": "tok-1f2e3d4c5b6a", "BT_WALLET_PASSWORD": "correct horse battery", "WANDB_API_KEY": "wandb-77aa66bb",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+0099", "SOMEBODYS_MNEMONIC": "legal winner thank year wave sausage",
}  # fmt: skip


def test_a_setting_whose_name_ends_like_a_secrets_is_none():
    env = {"SN29_MINER_START_TOKEN": "competition", "SN29_HUB_TOKEN": "tok-0099887766"}
    said = _said("configure()\ntell('started', 'a competition with tok-0099887766')", env=env)
    assert "a competition with $SN29_HUB_TOKEN" in said


@pytest.mark.parametrize(
    "secret", ["pa\\ss'w\"ord", 'with"one', "with'one", "-----BEGIN\nabcdefghijk\nEND---", "of words/and+signs", "swordfish"]
)
def test_a_secret_is_found_in_every_form_that_it_is_written_in(secret):
    conceal(secret, "(hidden)")
    try:
        for said in (secret, repr(secret), repr(f"'{secret}"), repr(f'"{secret}'), f"{KeyError(secret)}", repr({secret: 1}),
                     quote(secret), quote(secret, safe=""), quote_plus(secret)):  # fmt: skip
            assert clean(said).strip("'\"\\{}: 1") == "(hidden)", said
    finally:
        reveal(secret)
    assert clean("swordfish") == "swordfish"


def test_which_variables_are_secret():
    """Machines make no plain words and no paths that are there; people make up passwords."""
    env = {
        "CI_TOKEN": "default", "X_TOKEN": str(ROOT), "PYTHON_SEED": "123456", "AN_ACCESS_KEY": "validator",
        "A_PASSWORD": "swordfish", "MY_PASS": "tunafish7", "GH_PAT": "ghp-00112233", "TOKEN_OF_CI": "ci-99887766",
        "WALLET_SEED": "0x99aabbccddee", "COMPASS": "northwards",
    }  # fmt: skip
    said = _said(f"configure()\ntell('x', {' '.join(env.values())!r})", env=env)
    shown = "default PATH 123456 validator $A_PASSWORD $MY_PASS $GH_PAT $TOKEN_OF_CI $WALLET_SEED northwards"
    assert said.endswith(f" {shown.replace('PATH', str(ROOT))}\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_no_variable_and_no_error_brings_a_secret_into_a_traceback(as_json, tmp_path):
    """In the text of an error, in local variables of every frame, in what libraries log, and in the exception that ends it."""
    script = (
        "import logging, os\n"
        f"configure(as_json={as_json}, level='DEBUG', file=Path({str(tmp_path / 'log.jsonl')!r}))\n"
        "def ask(token, password):\n    phrase = os.environ['SOMEBODYS_MNEMONIC']\n"
        "    raise ValueError(f'{token}: {phrase} at https://u:{password}@host/x?key={token}') from KeyError(password)\n"
        "try: ask(os.environ['HF_TOKEN'], os.environ['BT_WALLET_PASSWORD'])\n"
        "except ValueError as error:\n"
        "    bug('it failed')\n    warn('unavailable', str(error), hotkey=os.environ['WANDB_API_KEY'])\n"
        "    logging.getLogger('x').exception('with %s', os.environ)\n"
        "ask(os.environ['AWS_SECRET_ACCESS_KEY'], os.environ['HF_TOKEN'])"
    )
    said = _said(script, env=SECRETS, status=1) + (tmp_path / "log.jsonl").read_text()
    assert said.count("Traceback") >= 4, "there is something to look through"
    assert "$HF_TOKEN" in said
    for name, value in SECRETS.items():
        assert value not in said, name


# ---- a real round ----------------------------------------------------------------------------------------------------

REPO = "ann/never-seen-before"


@dataclass
class Rehearsal:
    """A sealed submission and a round that judges it, by the two programs, and all that they said."""

    hotkey: str
    miner: str
    """Standard output and error, and the log file."""
    validator: str
    validator_log: list[dict[str, object]]
    miner_log: list[dict[str, object]]
    secrets: dict[str, str]
    competitions: Path


def _wallet_secrets(folder: Path) -> Iterator[tuple[str, str]]:
    """What stands in the key files and is no address and no public key."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for name, value in json.loads(file.read_text()).items():
            if name in ("secretPhrase", "secretSeed", "privateKey") and value:
                yield f"{file.relative_to(folder)} {name}", str(value)


def _run(program: str, *flags: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, str(Path(neurons.__file__).parent / program), *flags], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory, make_checkpoint) -> Rehearsal:
    folder = tmp_path_factory.mktemp("logs")
    texts = text.build(default_cache())
    localnet = prepare(folder / "localnet", texts, block_seconds=0.05, window_blocks=4000)
    wallets, window = folder / "wallets", 4000
    model = make_checkpoint("Phi3ForCausalLM", vocab_size=32_000)
    (model / "tokenizer.json").write_bytes((texts.llama32k / "tokenizer.json").read_bytes())
    with localnet.serve():
        for name in ("ann", "val"):
            localnet.register(name, "default", wallets, validator=name == "val")
        common = (
            "--wallet.path", str(wallets), "-n", "localnet", "--localnet.dir", str(localnet.folder), "--hub.endpoint",
            localnet.endpoint, "--netuid", str(NETUID), "--competitions.dir", str(localnet.competitions), "--locks.dir",
            str(folder / "locks"), "--threads", "1", "--poll", "0.2", "--log.level", "DEBUG",
        )  # fmt: skip
        secrets = {**SECRETS, "HF_TOKEN": localnet.hub_token("ann")}
        miner = _run(
            "miner.py", *common, "--wallet.name", "ann", "--repo", REPO, "--competition", "c01", "--model", str(model),
            "--sealed", "--work.dir", str(folder / "ann"), "--log.file", str(folder / "ann.jsonl"), env=secrets,
        )  # fmt: skip
        ledger = Ledger.open(localnet.chain)
        ledger.advance((ledger.head() // window + 1) * window + ledger.finality_lag - ledger.head())
        ledger.close()
        validator = _run(
            "validator.py", *common, "--wallet.name", "val", "--state.dir", str(folder / "val"), "--dtype", "float32",
            "--rounds", "1", "--log.file", str(folder / "val.jsonl"),
            env={**secrets, "PATH": str(folder), "CXX": ""},  # no compiler, which would work for half a minute
        )  # fmt: skip
    logs = {name: (folder / f"{name}.jsonl").read_text() for name in ("ann", "val")}
    parsed = {name: [json.loads(line) for line in log.splitlines()] for name, log in logs.items()}
    return Rehearsal(
        str(load_wallet("ann", "default", wallets).hotkey.ss58_address), miner + logs["ann"], validator + logs["val"],
        parsed["val"], parsed["ann"],
        {**secrets, **dict(_wallet_secrets(wallets))}, localnet.competitions,
    )  # fmt: skip


def test_one_commitments_life_is_found_by_its_hotkey_in_order(rehearsal):
    """By grep, in what people read and in what machines read."""
    for log, life in (
        (rehearsal.miner_log, ["started", "check", "uploaded", "sealed", "committed", "public"]),
        (rehearsal.validator_log, ["inspected", "fetched", "evaluated", "scored", "weights"]),
    ):
        found = [str(line["event"]) for line in log if rehearsal.hotkey in json.dumps(line)]
        assert [event for event in found if event in life] == life, found
    people = [line for line in rehearsal.validator.splitlines() if rehearsal.hotkey in line and not line.startswith("{")]
    assert [line.split()[3] for line in people if line.split()[3] in life] == life
    inspected = next(line for line in rehearsal.validator_log if line["event"] == "inspected")
    assert str(inspected["model"]).startswith(REPO), "from here on the hotkey leads to the model, and back"


def test_nothing_secret_is_in_what_the_two_programs_say(rehearsal):
    assert sum("secretPhrase" in name or "secretSeed" in name for name in rehearsal.secrets) >= 4, "there are wallets to look for"
    for said in (rehearsal.miner, rehearsal.validator):
        assert len(said) > 1000
        for name, value in rehearsal.secrets.items():
            assert value not in said, name


def test_a_repository_is_not_named_before_the_chain_names_it(rehearsal):
    """From its own "committed" on, which stands in a final block: there everybody can read it."""
    committed = next(line for line in rehearsal.miner_log if line["event"] == "committed")
    before = rehearsal.miner_log[: rehearsal.miner_log.index(committed)]
    assert [line["event"] for line in before].count("uploaded") == 1
    assert REPO not in json.dumps(before)
    said = [str(line["message"]) for line in rehearsal.miner_log if line["event"] in ("committed", "public")]
    assert len(said) == 2
    assert all(message.startswith(REPO) for message in said)


def test_an_address_with_a_key_in_it_is_shown_without(rehearsal, tmp_path):
    """A node that is not there, asked for by the real validator until it is stopped."""
    wallets = tmp_path / "wallets"
    create_wallet("val", "default", wallets)
    command = [
        sys.executable, str(Path(neurons.__file__).parent / "validator.py"), "--wallet.name", "val",
        "--wallet.path", str(wallets),
        "-n", "ws://user:pa55w0rd-in-url@127.0.0.1:1/api-key-0123456789", "--subtensor.fallbacks", "none",
        "--subtensor.archives", "none", "--poll", "0.2", "--state.dir", str(tmp_path / "state"), "--log.level", "DEBUG",
        "--log.file", str(tmp_path / "log.jsonl"), "--competitions.dir", str(rehearsal.competitions), "--threads", "1",
        "--locks.dir", str(tmp_path / "locks"),
    ]  # fmt: skip
    done = asyncio.run(_until_unavailable(command, tmp_path / "log.jsonl"))
    said = done + (tmp_path / "log.jsonl").read_text()
    assert "127.0.0.1" in said
    assert "pa55w0rd-in-url" not in said
    assert "api-key-0123456789" not in said


async def _until_unavailable(command: list[str], log: Path) -> str:
    """Standard error of a process that is asked to end once it has said what is not to be had, at most after 60 s."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
    )
    ends = asyncio.get_running_loop().time() + 60
    while asyncio.get_running_loop().time() < ends and process.returncode is None:
        if log.exists() and '"unavailable"' in log.read_text():
            process.terminate()
            break
        await asyncio.sleep(0.1)
    said, _ = await process.communicate()
    return said.decode()
