from __future__ import annotations

from pathlib import Path

import pytest

from sn29.errors import Rejected
from sn29.settings import CheckSettings, LocalnetSettings, MinerSettings, ValidatorSettings, read


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BT_WALLET", "BT_WALLET_NAME", "BT_NETWORK", "BT_SUBTENSOR_NETWORK", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


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


def test_a_flag_beats_the_environment_beats_the_default(monkeypatch):
    assert read(ValidatorSettings, []).wallet_name == "default"
    monkeypatch.setenv("BT_WALLET_NAME", "old")
    assert read(ValidatorSettings, []).wallet_name == "old"
    monkeypatch.setenv("BT_WALLET", "new")
    assert read(ValidatorSettings, []).wallet_name == "new"
    assert read(ValidatorSettings, ["-w", "flag"]).wallet_name == "flag"
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert read(MinerSettings, []).hub_token == "hf_x"


def test_home_is_expanded_and_lists_add_up():
    assert read(ValidatorSettings, ["--state.dir", "~/x"]).state_dir == Path.home() / "x"
    assert read(LocalnetSettings, ["--miner", "a/b", "--miner", "c/d"]).miners == ("a/b", "c/d")
    assert read(CheckSettings, ["folder", "--competition", "c00"]).model_dir == Path("folder")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--netuid", "twenty"], ["--netuid", "twenty", "integer"]),
        (["--dtype", "int4"], ["--dtype", "int4", "bfloat16"]),
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["--netuid"], ["netuid"]),
    ],
)
def test_a_wrong_flag_is_one_line_with_both_values(flags, named):
    with pytest.raises(Rejected) as refused:
        read(ValidatorSettings, flags)
    assert "\n" not in str(refused.value)
    for word in named:
        assert word in str(refused.value)
