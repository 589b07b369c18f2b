"""Settings of the programs: flag > environment > default. One frozen record a program; nobody receives more than its own.

The well-known flags are understood in both spellings: `--wallet.name --wallet.hotkey --subtensor.network` as in the years
before SDK 11, and `-w -H -n` as btcli writes them now.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from sn29.errors import Reason, Rejected

DEFAULT_HUB = "https://huggingface.co"


def default_localnet() -> Path:
    """Where a localnet lives unless told otherwise."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "sn29/localnet"


def default_cache() -> Path:
    """Where fetched packages live: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sn29"


def _flag(default: Any, description: str, *names: str, ge: float | None = None) -> Any:
    """A setting with the flags that name it, the first one shown first, and its least value."""
    return Field(default, description=description, validation_alias=AliasChoices(*names), ge=ge)


class _Environment(PydanticBaseSettingsSource):
    """The variables that operators already export, first found wins; kept apart from the flags so that --help stays short."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        names = self.settings_cls.environment.get(field_name, ())  # type: ignore[attr-defined]
        found = next((os.environ[name] for name in names if os.environ.get(name)), None)
        alias = field.validation_alias
        key = str(alias.choices[0]) if isinstance(alias, AliasChoices) else field_name
        return found, key, False

    def __call__(self) -> dict[str, Any]:
        rows = (self.get_field_value(info, name) for name, info in self.settings_cls.model_fields.items())
        return {key: value for value, key, _ in rows if value is not None}


class _Settings(BaseSettings):
    """What all programs share: how settings are read, and how they speak."""

    model_config = SettingsConfigDict(
        case_sensitive=True, frozen=True, extra="forbid", cli_implicit_flags=True, cli_hide_none_type=True
    )
    environment: ClassVar[dict[str, tuple[str, ...]]] = {}

    log_json: bool = _flag(False, "events as JSON lines", "log.json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _flag("INFO", "least level of events that are shown", "log.level")
    log_file: Path | None = _flag(None, "append events to this file as JSON lines too", "log.file")

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return value.expanduser() if isinstance(value, Path) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)


_CHAIN_ENVIRONMENT = {
    "wallet_name": ("BT_WALLET", "BT_WALLET_NAME"),
    "wallet_hotkey": ("BT_WALLET_HOTKEY",),
    "wallet_path": ("BT_WALLET_PATH",),
    "network": ("BT_NETWORK", "BT_SUBTENSOR_NETWORK"),
    "localnet_dir": ("SN29_LOCALNET_DIR",),
    "hub_endpoint": ("SN29_HUB_ENDPOINT", "HF_ENDPOINT"),
}


class NeuronSettings(_Settings):
    """A registered participant: its keys, its chain, its Hub."""

    environment: ClassVar[dict[str, tuple[str, ...]]] = _CHAIN_ENVIRONMENT

    wallet_name: str = _flag("default", "name of the wallet (coldkey)", "wallet.name", "wallet", "w")
    wallet_hotkey: str = _flag("default", "name of the hotkey", "wallet.hotkey", "wallet-hotkey", "H")
    wallet_path: Path = _flag(Path("~/.bittensor/wallets"), "folder of the wallets", "wallet.path", "wallet-path")
    netuid: int = _flag(29, "number of the subnet", "netuid", ge=0)
    network: str = _flag(
        "finney", "finney, test, local (a node on this machine), localnet (embedded), or a ws:// address",
        "subtensor.network", "subtensor.chain_endpoint", "network", "n",
    )  # fmt: skip
    localnet_dir: Path = _flag(default_localnet(), "folder of the localnet, for --network localnet", "localnet.dir")
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint")
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")


class ValidatorSettings(NeuronSettings):
    """Pull miners' models, check them, measure the loss of every sample, set weights on chain."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 validator")

    state_dir: Path = _flag(Path("~/.sn29/validator"), "folder of the store and the downloaded models", "state.dir")
    device: str = _flag("cpu", "device of the evaluation, e.g. cuda:0", "device")
    dtype: Literal["float32", "bfloat16"] = _flag("bfloat16", "number format of the evaluated models", "dtype")
    threads: int = _flag(max(1, (os.cpu_count() or 2) // 2), "CPU threads of one evaluation", "threads", ge=1)
    evaluation_deadline_s: float = _flag(900.0, "seconds after which an evaluation is stopped", "evaluation.deadline", ge=1)
    download_deadline_s: float = _flag(3600.0, "seconds after which a download is put off", "download.deadline", ge=1)
    rounds: int = _flag(0, "stop after this many rounds and one weight set; 0 = never", "rounds", ge=0)
    catch_up: int = _flag(2, "missed windows that are still judged after a pause; older ones are skipped", "catch-up", ge=1)
    poll_s: float = _flag(12.0, "seconds between looks at the chain", "poll", ge=0.05)


class MinerSettings(NeuronSettings):
    """Train a model on real text, check it as a validator would, publish it, commit to it on chain."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 miner")

    environment: ClassVar[dict[str, tuple[str, ...]]] = {**_CHAIN_ENVIRONMENT, "hub_token": ("HF_TOKEN",)}

    competition: str = _flag("c00", "competition to enter", "competition")
    repo: str = _flag("", "repository on the Hub: namespace/name", "repo")
    hub_token: str = _flag("", "token that may write to the repository (better: HF_TOKEN)", "hub.token")
    work_dir: Path = _flag(Path("~/.sn29/miner"), "folder of checkpoints, text and state", "work.dir")
    start: Path | None = _flag(None, "checkpoint folder to train on from, of the same shape; default: fresh weights", "start")
    model: Path | None = _flag(None, "publish this folder instead of training", "model")
    tokenizer: Path | None = _flag(None, "tokenizer.json for a competition with a free one", "tokenizer")
    text: str = _flag("", "glob of the data set's training files; default: the competition's files", "text")
    family: str = _flag("", "class of a new model; default: the competition's first", "family")
    hidden_size: int = _flag(64, "width of a new model", "hidden-size", ge=1)
    intermediate_size: int = _flag(192, "width of its MLP", "intermediate-size", ge=1)
    num_layers: int = _flag(1, "its layers", "num-layers", ge=1)
    num_heads: int = _flag(4, "its attention heads", "num-heads", ge=1)
    tied: bool = _flag(True, "one matrix for embedding and head", "tied")
    steps: int = _flag(1000, "optimizer steps", "steps", ge=1)
    batch_tokens: int = _flag(256, "tokens of a step", "batch-tokens", ge=1)
    max_tokens: int = _flag(128, "a document is cut to this many tokens", "max-tokens", ge=1)
    learning_rate: float = _flag(6e-3, "highest learning rate", "learning-rate")
    min_count: int = _flag(
        8, "tokens rarer than this in the first 2,000 documents share one row of the embedding; 0 = none do", "min-count", ge=0
    )
    seed: int = _flag(0, "seed of the initial weights and of the order of the text", "seed")
    threads: int = _flag(max(1, (os.cpu_count() or 2) // 2), "CPU threads of the training", "threads", ge=1)
    force: bool = _flag(False, "publish although the checks refuse the model", "force")


class LocalnetSettings(_Settings):
    """A chain and a Hub on this machine, for rehearsals. State survives a restart; Ctrl-C leaves it whole."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 localnet up")

    environment: ClassVar[dict[str, tuple[str, ...]]] = {"localnet_dir": ("SN29_LOCALNET_DIR",)}

    localnet_dir: Path = _flag(default_localnet(), "folder of all state", "localnet.dir", "dir")
    port: int = _flag(0, "port of the Hub; 0 = the one of last time, or a free one", "port", ge=0)
    block_seconds: float = _flag(1.0, "seconds a block, for a new localnet", "block-seconds", ge=0.01)
    window_blocks: int = _flag(60, "blocks of a sample window, for a new localnet", "window-blocks", ge=4)
    miners: tuple[str, ...] = _flag((), "wallet/hotkey to make (if new) and register", "miner")
    validators: tuple[str, ...] = _flag((), "the same with stake and a validator permit", "validator")
    wallet_path: Path = _flag(Path("~/.bittensor/wallets"), "folder of the wallets to register", "wallet.path")


class DemoSettings(_Settings):
    """A whole subnet on this machine: chain, Hub, miners that train and publish, a validator that sets weights."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 demo")

    folder: Path | None = _flag(None, "folder of everything the demo makes; default: a new one, kept for you to look at", "dir")
    block_seconds: float = _flag(1.0, "seconds a block of the chain", "block-seconds", ge=0.01)
    steps: int = _flag(0, "training steps of the first miner of each competition; 0 = as the demo is tuned", "steps", ge=0)
    open_page: bool = _flag(False, "open the page in the browser at the end", "open")


class CheckSettings(_Settings):
    """Run the checks that a validator would run on a model folder. Exit 0: allowed. Exit 1: refused, with the reason."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 check")

    model_dir: CliPositionalArg[Path] = Field(description="folder with config.json and *.safetensors")
    competition: str = _flag("", "c00, or the path of a competition file", "competition")
    competitions_dir: Path = _flag(Path("competitions"), "folder where c00 is looked up", "competitions.dir")
    tokenizer: Path | None = _flag(None, "tokenizer.json of the competition, if its Hub is not to be asked", "tokenizer")
    hub_endpoint: str = _flag(DEFAULT_HUB, "Hub that has the competition's tokenizer", "hub.endpoint")
    metadata_only: bool = _flag(False, "stop before the weights are loaded", "metadata-only")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


AnySettings = TypeVar("AnySettings", bound=_Settings)


def read(kind: type[AnySettings], arguments: list[str]) -> AnySettings:
    """The settings of a program. Raises Rejected(SETTING) naming the flag and both values; `--help` exits."""
    try:
        return CliApp.run(kind, cli_args=arguments, cli_exit_on_error=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Rejected(Reason.SETTING, first.get("input"), first["msg"], f"--{where}") from None
    except SettingsError as error:
        raise Rejected(Reason.SETTING, str(error).splitlines()[0][:200], "flags that --help lists") from None
