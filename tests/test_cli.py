"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sn29.localnet import text
from sn29.settings import default_cache

ROOT = Path(__file__).parents[1]


def sn29(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process whose home is empty; fetched packages are shared."""
    command = [sys.executable, "-m", "sn29.cli", *words]
    with tempfile.TemporaryDirectory() as home:
        cache = str(default_cache().parent)
        env = {**os.environ, "COLUMNS": "200", "HOME": home, "XDG_CACHE_HOME": cache}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def test_help_needs_nothing_heavy():
    """Of any command: all are asked in one process, and the first that brings a library in is named."""
    script = (
        "import sys\nfrom sn29.cli import main\nfrom sn29.command_table import COMMANDS\nhad = set()\n"
        "heavy = {'torch', 'transformers', 'bittensor', 'huggingface_hub', 'datasets', 'pyarrow', 'matplotlib', 'rich'}\n"
        "for name in [(), *COMMANDS]:\n"
        "    try: main([*name, '--help'])\n    except SystemExit: pass\n"
        "    for library in heavy & sys.modules.keys() - had: print(name, library, file=sys.stderr)\n"
        "    had |= heavy & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") >= 30


def test_an_unknown_command_is_said_and_is_wrong_usage():
    done = sn29("compititions")
    assert done.returncode == 2
    assert "compititions" in done.stderr


def test_competitions_check(tmp_path):
    done = sn29("competitions", "check")
    assert done.returncode == 0, done.stderr
    assert "c00" in done.stdout
    assert "6,900,000,000" in done.stdout
    folder = shutil.copytree(ROOT / "competitions", tmp_path / "competitions")
    c01 = folder / "c01.yaml"
    c01.write_text(c01.read_text().replace("reward_share: 0.5", "reward_share: 0.7"))
    done = sn29("competitions", "check", str(folder))
    assert done.returncode == 1
    assert "0.7" in done.stderr
    assert "1.2" in done.stderr
    c01.write_text(c01.read_text().replace("parameters: 3.9e9", "parameters: many"))
    done = sn29("competitions", "check", str(folder))
    assert done.returncode == 1
    assert all(word in done.stderr for word in ("c01.yaml", "limits.parameters", "many", "number"))
    assert sn29("competitions", "check", str(tmp_path / "nowhere")).returncode == 1


@pytest.fixture(scope="module")
def free_competition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """c01 at tiny size, in a file."""
    c01 = (ROOT / "competitions" / "c01.yaml").read_text()
    path = tmp_path_factory.mktemp("competition") / "c09.yaml"
    path.write_text(c01.replace("parameters: 3.9e9", "parameters: 30_000".replace("_", "")))
    return path


def test_check_says_allowed(free_competition, make_checkpoint, byte_tokenizer, tmp_path):
    folder = shutil.copytree(make_checkpoint("Phi3ForCausalLM", tie_word_embeddings=True, vocab_size=258), tmp_path / "model")
    shutil.copy(byte_tokenizer, folder / "tokenizer.json")
    done = sn29("check", str(folder), "--competition", str(free_competition))
    assert done.returncode == 0, done
    assert "allowed for c09" in done.stdout


def test_check_says_why_not_with_both_values(free_competition, make_checkpoint, tmp_path):
    folder = make_checkpoint("Phi3ForCausalLM")
    done = sn29("check", str(folder), "--competition", str(free_competition), "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["allowed"] is False
    refusals = {r["reason"]: r for r in answer["refusals"]}
    assert refusals["parameters"]["got"] == f"{answer['facts']['num_parameters']:,}"
    assert "30,000" in refusals["parameters"]["limit"]
    assert refusals["tokenizer"]["got"] == "no tokenizer.json"
    plain = sn29("check", str(folder), "--competition", str(free_competition))
    assert plain.returncode == 1
    assert "30,000" in plain.stdout
    assert "what to do" in plain.stdout


def test_check_with_the_fixed_tokenizer_of_c00(make_checkpoint):
    """The real c00: GPT-4's tokenizer by its fingerprint, here from the pinned package instead of the Hub."""
    gpt4 = text.build(default_cache()).gpt4 / "tokenizer.json"
    llama = make_checkpoint(vocab_size=100_277, hidden_size=8, intermediate_size=16, num_attention_heads=2)
    done = sn29("check", str(llama), "--competition", "c00", "--tokenizer", str(gpt4))
    assert done.returncode == 0, done
    small = make_checkpoint(vocab_size=100_276, hidden_size=8, intermediate_size=16, num_attention_heads=2)
    done = sn29("check", str(small), "--competition", "c00", "--tokenizer", str(gpt4), "--metadata-only")
    assert done.returncode == 1
    assert "100277" in done.stdout
    other = text.build(default_cache()).llama32k / "tokenizer.json"
    done = sn29("check", str(llama), "--competition", "c00", "--tokenizer", str(other))
    assert done.returncode == 1
    assert "3bbe182d" in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["check", ".", "--competition", "c99"], ["c99", "c00"]),
        (["check", "nowhere", "--competition", "c01"], ["nowhere"]),
        (["check", ".", "--competition", "no.yaml"], ["no.yaml"]),
        (["validator", "--wallet.path", "nowhere", "--network", "localnet", "--localnet.dir", "nowhere"], ["nowhere"]),
        (["validator", "--wallet.path", "nowhere", "--network", "finney"], ["c00.yaml", "dataset.revision", "finney"]),
        (["miner", "--competition", "c00"], ["--repo", "namespace/name"]),
        (["miner", "--competition", "c77", "--repo", "a/b"], ["c77"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_1(words, named):
    done = sn29(*words)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    for word in named:
        assert word in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["check"], "MODEL"),
        (["validator", "--nope"], "--nope"),
        (["validator", "--netuid", "x"], "--netuid"),
        (["miner", "--steps"], "--steps"),
        (["validator", "word"], "word"),
        (["config", "mner"], "mner"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_exit_2(words, named):
    done = sn29(*words)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert named in done.stderr.splitlines()[0]


def test_no_command_says_what_the_environment_holds_secret(tmp_path):
    """One that keeps no log, and what Python itself says of an error and of a warning."""
    secret = "tok-1f2e3d4c5b6a"
    env = {**os.environ, "HF_TOKEN": secret, "COLUMNS": "200"}
    last_words = (
        f"import threading, warnings\nfrom sn29.concealment import guard\nguard()\nwarnings.warn({secret!r})\n"
        f"def end(): raise ValueError({secret!r})\n"
        "thread = threading.Thread(target=end)\nthread.start()\nthread.join()\nend()"
    )
    (tmp_path / "last.py").write_text(last_words.replace(repr(secret), "__import__('os').environ['HF_TOKEN']"))
    for command in (["-m", "sn29.cli", "replay", f"/nowhere/{secret}"], [str(tmp_path / "last.py")]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 1
        assert "$HF_TOKEN" in done.stderr
        assert secret not in done.stderr + done.stdout
    assert done.stderr.count("$HF_TOKEN") == 3


def _up(folder: Path, wallets: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    """A localnet in the foreground of another process, and what it printed until it was up."""
    command = [sys.executable, "-m", "sn29.cli", "localnet", "up", "--dir", str(folder), "--wallet.path", str(wallets), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("up: "):
            return process, said
    raise AssertionError(said)


def test_a_localnet_survives_ctrl_c_and_a_kill(tmp_path):
    folder, wallets = tmp_path / "localnet", tmp_path / "wallets"
    process, said = _up(folder, wallets, "--miner", "ann/default")
    second = sn29("localnet", "up", "--dir", str(folder))
    assert second.returncode == 1
    assert "up already" in second.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    again, said_again = _up(folder, wallets, "--miner", "ann/default")
    endpoint = re.compile(r"http://127\.0\.0\.1:\d+")
    assert endpoint.search(said)[0] == endpoint.search(said_again)[0], "the Hub keeps its address"
    registered = re.compile(r"registered ann/default: .*")
    assert registered.search(said)[0] == registered.search(said_again)[0], "key and token stay"
    again.kill()
    again.wait()
    time.sleep(0.1)
    third, _ = _up(folder, wallets)
    third.send_signal(signal.SIGTERM)
    assert third.wait(20) == 0


def test_a_group_of_commands_says_what_is_in_it():
    found = sn29("lab", "vocab", "--help")
    assert found.returncode == 0
    assert [line.split()[3] for line in found.stdout.splitlines()] == ["stats", "prune"]
    missed = sn29("lab", "none")
    assert missed.returncode == 2
    assert "no command 'lab none'" in missed.stderr
    assert len(missed.stderr.splitlines()) == 1
