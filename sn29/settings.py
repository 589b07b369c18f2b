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
    competitions_git: str = _flag("", "REPO@COMMIT whose competitions/ is read instead of the folder", "competitions.git")


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
    start_record: Path | None = _flag(
        None, "first start: go on from this round record of another validator (it is replayed first)", "start-record"
    )
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
    at: int = _flag(0, "block whose rules are asked for; 0 = before every change of the file", "at")
    tokenizer: Path | None = _flag(None, "tokenizer.json of the competition, if its Hub is not to be asked", "tokenizer")
    hub_endpoint: str = _flag(DEFAULT_HUB, "Hub that has the competition's tokenizer", "hub.endpoint")
    metadata_only: bool = _flag(False, "stop before the weights are loaded", "metadata-only")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class IncentiveSettings(_Settings):
    """Play attacks and honest progress against each scoring rule and print who would be paid. Exit 1: a goal is missed."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 simulate incentive")

    rule: str = _flag("all", "oldest_holder, pairwise_epsilon, champion, or all", "rule")
    attack: str = _flag("all", "a kind of scene (copies, improvement, ...), a part of a scene's name, or all", "attack")
    competition: str = _flag("c00", "competition whose own rule is played with the fields of its file", "competition")
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    runs: int = _flag(40, "runs of a scene; a quarter for rules without memory, a tenth for five validators", "runs")
    days: int = _flag(30, "days of a run, of 20 windows of 360 blocks", "days")
    windows_per_day: int = _flag(4, "windows a day of champion, 1, 2, 4, 5, 10 or 20; in races always 20", "windows-per-day")
    samples: int = _flag(1500, "texts of a window", "samples")
    seed: int = _flag(29, "seed of all worlds", "seed")
    workers: int = _flag(2, "processes", "workers")
    picture: Path | None = _flag(None, "write the picture to this SVG file", "picture")
    json_output: bool = _flag(False, "print everything as JSON", "json")


_RECORDS = Path("~/.sn29/validator")


class ReplaySettings(_Settings):
    """
    Compute scores and weights again from a round record alone. Exit 0: the same bits as recorded. Exit 1: not, and what
    differs first. With --rule or --competitions: what would have come out instead, exit 0.

    RECORD may also be written by hand, to score a matrix of losses from anywhere:

      {"losses": {"ann": [812.5, 640.25], "bob": [811.0, null]},
       "commit_blocks": {"ann": 7012, "bob": 7350},
       "block": 7560,
       "competition": "c00"}

    losses: nats of each model on the same samples in the same order, null where it has none. commit_blocks: since when each
    claims its model. block: ages are counted to it. competition: a name, looked up in --competitions (default: the folder
    competitions), or an object with the fields of a competition file. May be left out: content_ids (equal ones are one
    model), hash (0x and 64 hex digits: orders the samples into groups).
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 replay")

    record: CliPositionalArg[Path] = Field(description="a round record, or one written by hand")
    rule: str = _flag("", "score with this rule instead: oldest_holder, pairwise_epsilon or champion", "rule")
    competitions: Path | None = _flag(None, "score by the competition files of this folder instead", "competitions")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class AuditSettings(_Settings):
    """Say where the records of two validators differ, first cause first. Exit 0: they are equal. Exit 1: they are not."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 audit")

    first: CliPositionalArg[Path] = Field(description="a round record")
    second: CliPositionalArg[Path] = Field(description="another validator's record of the same round")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class ExplainSettings(_Settings):
    """Why a hotkey got its weight: seen, refused why, evaluated, lost to whom by how much, and what would win."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 explain")

    hotkey: CliPositionalArg[str] = Field(description="ss58 address of the miner's hotkey")
    round: int | None = _flag(None, "only the round of this block", "round")
    state_dir: Path = _flag(_RECORDS, "state folder of a validator: its records are in the folder `records` there", "state.dir")
    records: Path | None = _flag(None, "folder with round records, or one record, instead", "records")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class SimulateSettings(_Settings):
    """What a new competition file would have changed in recorded rounds: every hotkey's mean weight, then and with it."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 competitions simulate")

    file: CliPositionalArg[Path] = Field(description="the new file; its name says which competition it is for")
    rounds: tuple[Path, ...] = _flag((), "round records, or a folder of them; of one validator", "rounds")
    json_output: bool = _flag(False, "print every round as JSON", "json")


class ShowSettings(_Settings):
    """Which rules are in force at a block, and what comes next."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 competitions show")

    folder: CliPositionalArg[Path] = Field(Path("competitions"), description="folder of the competition files")
    at: str = _flag("0", "block, or UTC time such as 2027-02-01 for files with a clock; 0 = before every change", "at")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class DiffSettings(_Settings):
    """Every field that two competition files, or two folders of them, set differently, and from which block on."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 competitions diff")

    old: CliPositionalArg[Path] = Field(description="file or folder")
    new: CliPositionalArg[Path] = Field(description="file or folder")
    json_output: bool = _flag(False, "print the differences as JSON", "json")


class PinSettings(_Settings):
    """Resolve every Hub id of a competition file that has no pin yet, and write revision and fingerprint into the file."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 competitions pin")

    file: CliPositionalArg[Path] = Field(description="competition file; comments and layout stay as they are")
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint")


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
