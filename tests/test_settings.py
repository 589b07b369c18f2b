from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from annotated_types import Le

from sn29 import cli
from sn29.errors import Rejected
from sn29.settings import (
    CheckSettings,
    DoctorOfMiner,
    DoctorOfValidator,
    LocalnetSettings,
    MinerSettings,
    NeuronSettings,
    Setting,
    ValidatorSettings,
    programs,
    read,
    read_with_origins,
    settings_of,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, and a working directory without files."""
    for kind in programs():
        for setting in settings_of(kind):
            for name in (*setting.variables, *setting.extra["old"]):
                monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", [ValidatorSettings, MinerSettings])
@pytest.mark.parametrize(
    "flags",
    [
        ["--wallet.name", "w", "--wallet.hotkey", "h", "--netuid", "5", "--subtensor.network", "test"],
        ["--wallet", "w", "--wallet-hotkey", "h", "--netuid", "5", "--network", "test"],
        ["-w", "w", "-H", "h", "--netuid=5", "-n", "test"],
        ["-w", "w", "-H", "h", "--netuid=5", "--subtensor.chain_endpoint", "test"],
    ],
)
def test_both_spellings_of_the_well_known_flags(kind, flags):
    settings = read(kind, flags)
    assert (settings.wallet_name, settings.wallet_hotkey, settings.netuid, settings.network) == ("w", "h", 5, "test")


@pytest.mark.parametrize(
    "words",
    [
        ["--subtensor.chain_endpoint", "ws://a", "--subtensor.network", "finney"],
        ["--subtensor.network", "finney", "--subtensor.chain_endpoint", "ws://a"],
        ["--subtensor.network=finney", "--subtensor.chain_endpoint=ws://a", "-n", "test"],
    ],
)
def test_an_address_beats_a_network_that_is_named_beside_it(words, monkeypatch):
    settings, origins = read_with_origins(ValidatorSettings, ["--netuid", "3", *words, "-w", "me"])
    assert (settings.network, origins["network"]) == ("ws://a", "--subtensor.chain_endpoint")
    assert (settings.netuid, settings.wallet_name) == (3, "me")
    Path("sn29.yaml").write_text("subtensor: {network: finney, chain_endpoint: 'ws://b'}\n")
    settings, origins = read_with_origins(ValidatorSettings, [])
    assert (settings.network, origins["network"]) == ("ws://b", "sn29.yaml subtensor.chain_endpoint")
    monkeypatch.setenv("BT_SUBTENSOR_NETWORK", "finney")
    monkeypatch.setenv("BT_SUBTENSOR_CHAIN_ENDPOINT", "ws://c")
    settings, origins = read_with_origins(ValidatorSettings, [])
    assert (settings.network, origins["network"]) == ("ws://c", "environment BT_SUBTENSOR_CHAIN_ENDPOINT")


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize("name", ["SN29_VALIDATOR_POLL", "SN29_CHAIN_DEADLINE", "SN29_WEIGHTS_MAX_CHANGE"])
def test_a_number_is_a_finite_one(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(Rejected, match=name):
        read(ValidatorSettings, [])


def test_a_flag_beats_the_environment_beats_dotenv_beats_the_file_beats_the_default(monkeypatch):
    def name() -> tuple[str, str]:
        settings, origins = read_with_origins(ValidatorSettings, [])
        return settings.wallet_name, origins["wallet_name"]

    assert name() == ("default", "default")
    Path("sn29.yaml").write_text("wallet:\n  name: file\n")
    assert name() == ("file", "sn29.yaml wallet.name")
    Path(".env").write_text("export BT_WALLET_NAME='old'  # a comment\n")
    assert name() == ("old", ".env BT_WALLET_NAME")
    Path(".env").write_text("BT_WALLET_NAME=old\nBT_WALLET=dotenv\nOTHER_PROGRAMS_SECRET=1\n")
    assert name() == ("dotenv", ".env BT_WALLET")
    monkeypatch.setenv("BT_WALLET_NAME", "variable")
    assert name() == ("variable", "environment BT_WALLET_NAME"), "an old name here beats a new one in .env"
    monkeypatch.setenv("BT_WALLET", "new")
    assert name() == ("new", "environment BT_WALLET")
    monkeypatch.setenv("SN29_WALLET_NAME", "ours")
    assert name() == ("ours", "environment SN29_WALLET_NAME")
    settings, origins = read_with_origins(ValidatorSettings, ["-w", "flag"])
    assert (settings.wallet_name, origins["wallet_name"]) == ("flag", "-w"), "as it was written"
    monkeypatch.setenv("SN29_WALLET_NAME", "")
    assert name()[0] == "new", "an empty variable is none: compose files write them"


_ANY = {
    "config": None, "subtensor.fallbacks": "ws://a,wss://b", "subtensor.archives": "ws://a", "round": "7",
    "lengths": "64,128", "measure-lengths": "64,128", "corpus-tokens": "1e9,2e8",
}  # fmt: skip


def _example(setting: Setting) -> str | None:
    """A value, as text, that is not the default."""
    name, default = setting.names[0], setting.info.default
    if name in _ANY:
        return _ANY[name]
    if get_origin(setting.info.annotation) is Literal:
        return str(next(value for value in get_args(setting.info.annotation) if value != default))
    if isinstance(default, bool):
        return "false" if default else "true"
    most = next((bound.le for bound in setting.info.metadata if isinstance(bound, Le)), None)
    if isinstance(default, float) and most is not None:
        return str(default / 2 or float(most) / 2)
    return str(default + 7) if isinstance(default, int | float) else "some/thing"


@pytest.mark.parametrize("kind", list(programs()), ids=lambda kind: kind.__name__)
def test_every_setting_can_be_given_by_flag_environment_dotenv_and_file(kind, monkeypatch):
    positional = ["x.yaml"] * sum(info.is_required() for info in kind.model_fields.values())
    inherited = {field for base in kind.__bases__ if base in list(programs()) for field in base.model_fields}
    for setting in settings_of(kind):
        if setting.field in inherited:
            continue
        text = _example(setting)
        if text is None:
            continue
        flag = f"--{setting.names[0]}"
        is_switch = isinstance(setting.info.default, bool)
        words = [flag if text == "true" else f"--no-{setting.names[0]}"] if is_switch else [flag, text]
        wanted = getattr(read(kind, [*positional, *words]), setting.field)
        assert wanted != setting.info.default, setting.names
        for variable in setting.variables:
            with monkeypatch.context() as patch:
                patch.setenv(variable, text)
                assert getattr(read(kind, positional), setting.field) == wanted, variable
            Path(".env").write_text(f"{variable}={text}\n")
            assert getattr(read(kind, positional), setting.field) == wanted, variable
            Path(".env").unlink()
        for key in setting.keys:
            Path("sn29.yaml").write_text(f"{key}: {text}\n")
            assert getattr(read(kind, positional), setting.field) == wanted, key
            Path("sn29.yaml").unlink()


def test_one_name_means_one_thing():
    """A variable or a key that two programs read is the same setting for both."""
    meaning: dict[str, tuple[str, ...]] = {}
    for kind in programs():
        for setting in settings_of(kind):
            for name in (*setting.variables, *setting.keys):
                known = meaning.setdefault(name, setting.names)
                assert set(known) & set(setting.names), f"{name}: {known} and {setting.names}"


def test_a_program_reads_its_own_section_and_the_doctor_reads_it_too(monkeypatch):
    Path("sn29.yaml").write_text("validator: {threads: 3, device: 'cuda:1'}\nminer:\n  threads: 5\nsubtensor.network: test\n")
    assert (read(ValidatorSettings, []).threads, read(MinerSettings, []).threads) == (3, 5)
    assert read(DoctorOfValidator, []).device == "cuda:1"
    monkeypatch.setenv("SN29_MINER_THREADS", "6")
    assert read(DoctorOfMiner, []).threads == 6
    assert read(ValidatorSettings, []).threads == 3
    assert {read(kind, []).network for kind in (ValidatorSettings, MinerSettings, DoctorOfMiner)} == {"test"}


def test_a_file_by_another_name_must_exist(monkeypatch):
    Path("other.yaml").write_text("netuid: 7\n")
    Path("sn29.yaml").write_text("netuid: 8\n")
    assert read(ValidatorSettings, ["--config", "other.yaml"]).netuid == 7
    monkeypatch.setenv("SN29_CONFIG", "other.yaml")
    assert read(ValidatorSettings, []).netuid == 7
    with pytest.raises(Rejected, match=r"none\.yaml"):
        read(ValidatorSettings, ["--config", "none.yaml"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("walet: {name: x}", ["walet.name", "such as wallet.name"]),
        ("weights: {max_change: 1}", ["weights.max_change", "such as weights.max-change"]),
        ("threads: 3", ["threads", "miner.threads", "validator.threads"]),
        ("wallet.name: a\nwallet: {name: b}\n", ["wallet.name", "twice"]),
        ("wallet: a\nwallet.name: b\n", ["wallet.name and wallet", "same setting"]),
        ("netuid: many", ["sn29.yaml netuid", "many", "a whole number"]),
        ("- a\n- b\n", ["sn29.yaml", "mapping"]),
        ("a: [", ["sn29.yaml", "line 1"]),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_name(text, named):
    Path("sn29.yaml").write_text(text)
    with pytest.raises(Rejected) as refused:
        read(ValidatorSettings, [])
    assert "\n" not in str(refused.value)
    for word in named:
        assert word in str(refused.value)


def test_a_file_of_comments_says_nothing():
    Path("sn29.yaml").write_text("# netuid: 3\n\n")
    assert read(ValidatorSettings, []).netuid == 29


def test_what_is_wrong_in_a_variable_is_said_with_its_name(monkeypatch):
    Path(".env").write_text("SN29_NETUID=many\n")
    with pytest.raises(Rejected, match=r"\.env SN29_NETUID.*many"):
        read(ValidatorSettings, [])
    monkeypatch.setenv("BT_FALLBACK_ENDPOINTS", "http://a")
    with pytest.raises(Rejected, match=r"BT_FALLBACK_ENDPOINTS.*http://a is not a ws://"):
        read(ValidatorSettings, ["--netuid", "1"])
    Path(".env").write_bytes(b"\xff\xfe")
    with pytest.raises(Rejected, match=r"\.env.*UTF-8"):
        read(ValidatorSettings, [])


def test_a_folder_named_dotenv_is_a_virtual_environment():
    Path(".env").mkdir()
    assert read(ValidatorSettings, []).netuid == 29


def test_old_names_are_understood_with_a_notice(monkeypatch, capsys):
    monkeypatch.setenv("BT_SUBTENSOR_NETWORK", "test")
    assert read(ValidatorSettings, []).network == "test"
    notice = capsys.readouterr().err
    assert "BT_SUBTENSOR_NETWORK" in notice
    assert "BT_NETWORK" in notice
    assert read(ValidatorSettings, ["-n", "finney"]).network == "finney"
    monkeypatch.setenv("BT_NETWORK", "local")
    assert read(ValidatorSettings, []).network == "local"
    assert capsys.readouterr().err == "", "no word about a name that was not used"


def test_lists_are_flags_again_and_again_or_separated_by_commas():
    assert read(LocalnetSettings, ["--miner", "a/b", "--miner", "c/d"]).miners == ("a/b", "c/d")
    assert read(ValidatorSettings, ["--subtensor.fallbacks", "ws://a,wss://b"]).fallbacks == ("ws://a", "wss://b")
    assert read(ValidatorSettings, ["--subtensor.fallbacks", "none"]).fallbacks == ()
    assert read(ValidatorSettings, []).fallbacks is None, "the network's own"
    Path("sn29.yaml").write_text("subtensor:\n  archives: [ws://a, ws://b]\n  fallbacks: []\n")
    settings = read(ValidatorSettings, [])
    assert (settings.archives, settings.fallbacks) == (("ws://a", "ws://b"), ())


def test_home_is_expanded():
    assert read(ValidatorSettings, ["--state.dir", "~/x"]).state_dir == Path.home() / "x"
    assert read(CheckSettings, ["folder", "--competition", "c00"]).model == "folder"


def test_logging_debug_is_a_log_level():
    assert read(ValidatorSettings, ["--logging.debug"]).log_level == "DEBUG"
    assert read(ValidatorSettings, ["--logging.debug", "--log.level", "ERROR"]).log_level == "ERROR"


def test_what_libraries_read_from_the_environment_reaches_them_from_dotenv():
    Path(".env").write_text("BT_WALLET_PASSWORD=from-dotenv\nBITTENSOR_RUNTIME_CACHE_DIR=not-this\nSOMETHING_ELSE=1\n")
    code = "import os; from sn29.settings import *; read(ValidatorSettings, []); print(*(os.environ.get(n) for n in NAMES))"
    names = ["BT_WALLET_PASSWORD", "BITTENSOR_RUNTIME_CACHE_DIR", "SOMETHING_ELSE"]
    env = {"PYTHONPATH": str(ROOT), "BITTENSOR_RUNTIME_CACHE_DIR": "kept", "HOME": "."}
    done = subprocess.run([sys.executable, "-c", f"NAMES = {names}; {code}"], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["from-dotenv", "kept", "None"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--netuid", "twenty"], ["--netuid", "twenty", "a whole number"]),
        (["--dtype", "int4"], ["--dtype", "int4", "bfloat16"]),
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["--netuid"], ["netuid"]),
        (["--weights.max-change", "1.5"], ["--weights.max-change", "1.5", "1"]),
        (["--subtensor.archives", "9944"], ["--subtensor.archives", "9944", "ws://"]),
    ],
)
def test_a_wrong_flag_is_one_line_with_both_values(flags, named):
    with pytest.raises(Rejected) as refused:
        read(ValidatorSettings, flags)
    assert "\n" not in str(refused.value)
    for word in named:
        assert word in str(refused.value)


def test_help_names_the_variables(capsys):
    with pytest.raises(SystemExit):
        read(MinerSettings, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for setting in settings_of(MinerSettings):
        assert f"[{' '.join(setting.variables)}]" in said


def test_config_prints_values_and_origins_and_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Path("sn29.yaml").write_text("miner: {steps: 5}\n")
    assert cli.main(["config", "--json", "miner", "-w", "ann"]) == 0
    said = capsys.readouterr().out
    rows = {row["name"]: (row["value"], row["origin"]) for row in json.loads(said)}
    assert rows["wallet.name"] == ("ann", "-w")
    assert rows["steps"] == ("5", "sn29.yaml miner.steps")
    assert rows["hub.token"] == ("(hidden)", "environment HF_TOKEN")
    assert rows["netuid"] == ("29", "default")
    assert cli.main(["config", "miner"]) == 0
    said += capsys.readouterr().out
    assert re.search(r"(?m)^steps +5 +sn29\.yaml miner\.steps$", said)
    assert "hf_secret" not in said + repr(read(MinerSettings, []))
    assert cli.main(["config", "mner"]) == 2
    assert "sn29 config --help" in capsys.readouterr().err


def test_the_example_has_only_variables_that_are_read():
    known = {name for setting in (*settings_of(ValidatorSettings), *settings_of(MinerSettings)) for name in setting.variables}
    lines = (ROOT / ".env.example").read_text().splitlines()
    written = [found[1] for line in lines if (found := re.match(r"#?([A-Z0-9_]+)=", line))]
    assert len(written) > 10
    assert set(written) <= known
    Path(".env").write_text("\n".join(line.removeprefix("#") if re.match(r"#[A-Z0-9_]+=", line) else line for line in lines))
    for kind in (ValidatorSettings, MinerSettings):
        assert isinstance(read(kind, []), NeuronSettings)
