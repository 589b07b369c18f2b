"""Settings of the programs, from one list: flag > environment > .env > file > default. A program receives no more than its own.

Each setting is declared once, below. Its name is its flag; from it follow the variable and the key in the file:

  a name with a dot (and netuid) means the same to every program   --state.dir  SN29_STATE_DIR          state: {dir: ...}
  a name without one is its program's own                          --threads    SN29_VALIDATOR_THREADS  validator: {threads: ...}

The well-known flags and variables of Bittensor are understood as well: `--wallet.name --wallet.hotkey --subtensor.network`
as in the years before SDK 11, `-w -H -n` and `BT_WALLET` as btcli has them now. Lists are separated by commas. Whoever names
a network and `--subtensor.chain_endpoint` means the address, as in those years.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from sn29.errors import Reason, Rejected, WrongUsage

DEFAULT_HUB = "https://huggingface.co"
COMPETITIONS = "competitions/*.yaml"
"""Stands for the names of the competitions that have a file here, where values of a flag are listed."""
_RULES = ("oldest_holder", "pairwise_epsilon", "champion")
CONFIG_FILE = "sn29.yaml"
"""Read from the working directory where no other is named."""
_ADDRESS = "subtensor.chain_endpoint"
"""The name that wins over the other names of its setting: programs of former years were given both, and took the address."""
_OTHERS_VARIABLES = (
    "BT_WALLET_PASSWORD", "BT_WALLET_PASSWORD_FILE", "BITTENSOR_RUNTIME_CACHE_DIR", "BTCLI_TOKEN_SYMBOLS_CACHE",
    "BT_CHAIN_ENDPOINT", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
"""What libraries read from the environment themselves: in .env they reach them too."""


def default_localnet() -> Path:
    """Where a localnet lives unless told otherwise."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "sn29/localnet"


def default_cache() -> Path:
    """Where fetched packages live: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sn29"


def _flag(
    default: Any,
    description: str,
    *names: str,
    ge: float | None = None,
    le: float | None = None,
    variables: tuple[str, ...] = (),
    old: tuple[str, ...] = (),
    secret: bool = False,
    said: str = "",
    values: tuple[str, ...] = (),
) -> Any:
    """A setting: the flags that name it, the first one shown first, and its bounds.

    variables: what others call it in the environment; old: the same, with a notice. A secret is never shown. said: the default
    in words, where it is another one on other machines. values: what completion offers, where more than these can be given.
    """
    return Field(
        default,
        description=description,
        validation_alias=AliasChoices(*names),
        ge=ge,
        le=le,
        repr=not secret,
        json_schema_extra={
            "about": description,
            "variables": [*variables],
            "old": [*old],
            "secret": secret,
            "said": said,
            "values": [*values],
        },
    )


class _Settings(BaseSettings):
    """What all programs share: how they speak, and the file that their settings are in."""

    model_config = SettingsConfigDict(
        case_sensitive=True, frozen=True, extra="forbid", cli_implicit_flags=True, cli_hide_none_type=True
    )

    config: Path | None = _flag(None, f"YAML file of settings; default: {CONFIG_FILE} here, if there is one", "config")
    log_json: bool = _flag(False, "events as JSON lines", "log.json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _flag("INFO", "least level of events that are shown", "log.level")
    log_file: Path | None = _flag(None, "append events to this file as JSON lines too", "log.file")
    log_file_mb: float = _flag(100.0, "MB after which the log file is begun anew; 0 = never", "log.file-mb", ge=0)
    log_keep: int = _flag(5, "older log files that are kept beside it", "log.keep", ge=0)
    debug: bool = _flag(False, "the same as --log.level DEBUG", "logging.debug")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """--help names the variables beside the flags."""
        for setting in settings_of(cls):
            setting.info.description = f"{setting.extra['about']} [{' '.join(setting.variables)}]"

    @classmethod
    def program(cls) -> str:
        """Whose settings they are, e.g. `localnet up`: a word of variables and keys."""
        return " ".join(cls.program_words())

    @classmethod
    def program_words(cls) -> list[str]:
        """How it is called, behind `sn29`."""
        return str(cls.model_config.get("cli_prog_name") or "sn29").split()[1:]

    @field_validator("*", mode="before")
    @classmethod
    def _split_list(cls, value: Any, info: Any) -> Any:
        if "tuple" not in str(cls.model_fields[info.field_name].annotation) or not isinstance(value, str | list | tuple):
            return value
        parts = [value] if isinstance(value, str) else value
        split = [part.strip() for text in parts for part in str(text).split(",") if part.strip()]
        return () if split == ["none"] else tuple(split)

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return value.expanduser() if isinstance(value, Path) else value

    @field_validator("*")
    @classmethod
    def _is_finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a finite number")
        return value

    @model_validator(mode="after")
    def _speak_up(self) -> Self:
        if self.debug and "log_level" not in self.model_fields_set:
            object.__setattr__(self, "log_level", "DEBUG")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `read` found: it knows where each value came from."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a program, by all its names."""

    field: str
    info: FieldInfo
    names: tuple[str, ...]
    """Flags without dashes, the first one first."""
    section: str
    """The program that it belongs to, e.g. `validator`; empty when it means the same to all."""

    @property
    def extra(self) -> dict[str, Any]:
        return dict(self.info.json_schema_extra)  # type: ignore[arg-type]

    @property
    def variables(self) -> tuple[str, ...]:
        """Names in the environment, strongest first; old ones are not among them."""
        words = f"{self.section} {self.names[0]}".split()
        own = "_".join(["SN29", *words]).upper().replace(".", "_").replace("-", "_").replace(" ", "_")
        return (own, *self.extra["variables"])

    @property
    def keys(self) -> tuple[str, ...]:
        """Names in the file, as dotted paths; none for the file's own name."""
        if self.field == "config":
            return ()
        prefix = f"{self.section.replace(' ', '.')}." if self.section else ""
        return tuple(f"{prefix}{name}" for name in self.names if len(name) > 1)


def settings_of(kind: type[_Settings]) -> Iterator[Setting]:
    """A program's settings in the order of --help, without its positional arguments."""
    for field, info in kind.model_fields.items():
        if isinstance(info.validation_alias, AliasChoices):
            names = tuple(str(name) for name in info.validation_alias.choices)
            shared = "." in names[0] or names[0] in ("netuid", "config")
            yield Setting(field, info, names, "" if shared else kind.program())


class NeuronSettings(_Settings):
    """A registered participant: its keys, its chain, its Hub."""

    wallet_name: str = _flag(
        "default", "name of the wallet (coldkey)", "wallet.name", "wallet", "w", variables=("BT_WALLET",), old=("BT_WALLET_NAME",)
    )
    wallet_hotkey: str = _flag(
        "default", "name of the hotkey", "wallet.hotkey", "wallet-hotkey", "H", variables=("BT_WALLET_HOTKEY",)
    )
    wallet_path: Path = _flag(
        Path("~/.bittensor/wallets"), "folder of the wallets", "wallet.path", "wallet-path", variables=("BT_WALLET_PATH",)
    )
    netuid: int = _flag(29, "number of the subnet", "netuid", ge=0, variables=("BT_NETUID",))
    network: str = _flag(
        "finney", "finney, test, local (a node on this machine), localnet (embedded), or a ws:// address",
        "subtensor.network", _ADDRESS, "network", "n",
        variables=("BT_NETWORK",), old=("BT_SUBTENSOR_CHAIN_ENDPOINT", "BT_SUBTENSOR_NETWORK"),
        values=("finney", "test", "local", "localnet"),
    )  # fmt: skip
    fallbacks: tuple[str, ...] | None = _flag(
        None, "ws:// addresses to go on with when the network's own fails; `none` for none; default: the network's own spares",
        "subtensor.fallbacks", "fallback-endpoints", variables=("BT_FALLBACK_ENDPOINTS",),
    )  # fmt: skip
    archives: tuple[str, ...] | None = _flag(
        None, "ws:// addresses of nodes that keep old blocks; `none` for none; default: the network's own",
        "subtensor.archives", "archive-endpoints", variables=("BT_ARCHIVE_ENDPOINTS",),
    )  # fmt: skip
    chain_deadline_s: float = _flag(60.0, "seconds that one question to the chain may take", "chain.deadline", ge=0.05)
    locks_dir: Path = _flag(
        Path("~/.sn29/locks"), "folder of the locks that let one process at a time write for a hotkey", "locks.dir"
    )
    localnet_dir: Path = _flag(
        default_localnet(), "folder of the localnet, for --network localnet", "localnet.dir", said="~/.local/share/sn29/localnet"
    )
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    competitions_git: str = _flag("", "REPO@COMMIT whose competitions/ is read instead of the folder", "competitions.git")
    stop_within_s: float = _flag(
        10.0, "seconds from the first SIGTERM or Ctrl-C to the end; what is in hand is ended or rolled back", "stop.within", ge=2
    )
    status_port: int = _flag(0, "port of the status page and the metrics; 0 = none", "status.port", ge=0, le=65535)
    status_host: str = _flag("127.0.0.1", "address that the page is served on; 0.0.0.0 = to everybody", "status.host")

    @field_validator("fallbacks", "archives")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        wrong = [address for address in value or () if not address.startswith(("ws://", "wss://"))]
        if wrong:
            raise ValueError(f"{wrong[0]} is not a ws:// or wss:// address")
        return value


class ValidatorSettings(NeuronSettings):
    """Pull miners' models, check them, measure the loss of every sample, set weights on chain."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 validator")

    state_dir: Path = _flag(Path("~/.sn29/validator"), "folder of the store and the downloaded models", "state.dir")
    device: str = _flag("cpu", "device of the evaluation, e.g. cuda:0", "device")
    dtype: Literal["float32", "bfloat16"] = _flag("bfloat16", "number format of the evaluated models", "dtype")
    threads: int = _flag(
        max(1, (os.cpu_count() or 2) // 2), "CPU threads of one evaluation", "threads", ge=1, said="half of the cores"
    )
    evaluation_memory_gb: float = _flag(
        0.0, "GB of the device that a model may take; a larger one is read layer by layer; 0 = all", "evaluation.memory", ge=0
    )
    fleet: str = _flag("", "evaluate on a Ray cluster: local:N, auto or HOST:PORT; empty = on this machine alone", "fleet")
    evaluation_deadline_s: float = _flag(900.0, "seconds after which an evaluation is stopped", "evaluation.deadline", ge=1)
    download_deadline_s: float = _flag(3600.0, "seconds after which a download is put off", "download.deadline", ge=1)
    tui: bool = _flag(False, "a live table of the round below the lines, where standard error is a terminal", "tui")
    wandb: str = _flag("", "project of Weights & Biases that each round is logged to; needs sn29[wandb]", "wandb")
    rounds: int = _flag(0, "stop after this many rounds and one weight set; 0 = never", "rounds", ge=0)
    models_gb: float = _flag(
        0.0, "GB of disk for downloaded models; the least useful are deleted first; 0 = what is free", "models.gb", ge=0
    )
    start_record: Path | None = _flag(
        None, "first start: go on from this round record of another validator (it is replayed first)", "start-record"
    )
    warm_start: tuple[Path, ...] = _flag(
        (), "first start: folders or files of another validator's records, whose losses of the round that is due are taken over "
        "too, once a sample of them was measured here and is the same to the bit", "warm-start",
    )  # fmt: skip
    warm_start_cells: int = _flag(
        200, "losses of that sample, drawn by a secret of the store; a share f of wrong ones goes unseen with probability "
        "(1 - f) to the power of it", "warm-start-cells", ge=1,
    )  # fmt: skip
    catch_up: int = _flag(2, "missed windows that are still judged after a pause; older ones are skipped", "catch-up", ge=1)
    poll_s: float = _flag(12.0, "seconds between looks at the chain", "poll", ge=0.05)
    weights_max_change: float = _flag(
        0.75, "share of all weight, up to 1, that one set may move; what moves more is reached by several, an epoch apart",
        "weights.max-change", ge=0.01, le=1,
    )  # fmt: skip
    weights_alarm_epochs: int = _flag(
        3, "an alarm when our last set on chain is older than this many epochs", "weights.alarm-epochs", ge=1
    )


class TrainingSettings(_Settings):
    """A training run: the model, the text, the recipe. Shared by the miner and `sn29 train`."""

    competition: str = _flag("c00", "competition to train for", "competition", values=(COMPETITIONS,))
    work_dir: Path = _flag(Path("~/.sn29/miner"), "folder of checkpoints, text and state", "work.dir")
    start: str = _flag(
        "", "what to train on from: a checkpoint's folder, NAMESPACE/NAME@REVISION on the Hub, or `champion`; default: fresh "
        "weights", "start",
    )  # fmt: skip
    records: Path | None = _flag(
        None, "folder of a validator's round records: for --start champion, and the newest one's samples are not trained on",
        "records",
    )  # fmt: skip
    config_file: Path | None = _flag(None, "config.json of a new model, instead of the flags from --family on", "config-file")
    tokenizer: Path | None = _flag(None, "tokenizer.json for a competition with a free one", "tokenizer")
    text: str = _flag("", "glob of the data sets' training files; default: the competition's files", "text")
    data: tuple[str, ...] = _flag(
        (), "other texts than the competition's: FOLDER/GLOB or hub:NAMESPACE/NAME@REVISION/GLOB, then #COLUMN and *WEIGHT where "
        "they are not text and 1; without GLOB all .parquet files", "data",
    )  # fmt: skip
    family: str = _flag("", "class of a new model; default: the competition's first", "family")
    hidden_size: int = _flag(64, "width of a new model", "hidden-size", ge=1)
    intermediate_size: int = _flag(192, "width of its MLP", "intermediate-size", ge=1)
    num_layers: int = _flag(1, "its layers", "num-layers", ge=1)
    num_heads: int = _flag(4, "its attention heads", "num-heads", ge=1)
    num_kv_heads: int = _flag(0, "its heads of keys and values; 0 = as many", "num-kv-heads", ge=0)
    tied: bool = _flag(True, "one matrix for embedding and head", "tied")
    init_std: float = _flag(0.1, "standard deviation of its fresh weights; wide models want 0.02", "init-std", ge=0)
    packing: Literal["unpacked", "packed", "packed_masked"] = _flag(
        "packed_masked", "one document a row; one stream cut into rows; or documents that share a row without seeing each other",
        "packing",
    )  # fmt: skip
    row_tokens: int = _flag(0, "tokens of a row; 0 = --max-tokens, or 2048", "row-tokens", ge=0)
    context: int = _flag(-1, "tokens that a later piece of a long document sees again; -1 = an eighth of a row", "context", ge=-1)
    start_token: Literal["competition", "none"] = _flag(
        "competition", "token in front of every document, as in the evaluation, or none, and the first token is not scored",
        "start-token",
    )  # fmt: skip
    score_end: bool = _flag(False, "the end of a document is a target too; validators never ask for it", "score-end")
    steps: int = _flag(1000, "optimizer steps", "steps", ge=1)
    batch_tokens: int = _flag(256, "scored tokens of a step", "batch-tokens", ge=1)
    max_tokens: int = _flag(128, "a document is cut to this many tokens; 0 = not cut", "max-tokens", ge=0)
    optimizer: str = _flag(
        "adamw", "adamw, adamw8bit, adamw8bit_ao, lion, lion8bit, adafactor, muon, soap or sgd: `sn29 bench train --optimizers` "
        "says what each costs", "optimizer",
    )  # fmt: skip
    learning_rate: float = _flag(0.0, "highest learning rate; 0 = 0.006 times the optimizer's usual share", "learning-rate", ge=0)
    schedule: Literal["cosine", "wsd"] = _flag("cosine", "half a cosine to 0, or warm-up, stable, decay", "schedule")
    warmup_steps: int = _flag(-1, "steps in which the rate rises; -1 = a twentieth of all", "warmup-steps", ge=-1)
    decay_share: float = _flag(0.2, "share of the steps in which wsd falls to 0", "decay-share", ge=0, le=1)
    weight_decay: float = _flag(0.01, "decay of matrices, per step and unit of learning rate", "weight-decay", ge=0)
    clip: float = _flag(1.0, "longest gradient, in nats per token; 0 = any", "clip", ge=0)
    train_dtype: Literal["float32", "bfloat16"] = _flag(
        "float32", "number format of the products; weights and optimizer are float32", "train-dtype"
    )
    accumulation: int = _flag(1, "forward passes that are added up for a step, per shard of the data", "accumulation", ge=1)
    shards: int = _flag(
        0, "shards of the data, a multiple of the processes; 0 = the processes of the first start", "shards", ge=0
    )
    activation_checkpointing: bool = _flag(False, "less memory for a third more work", "activation-checkpointing")
    compile: bool = _flag(False, "layers through torch.compile", "compile")
    pool_documents: int = _flag(512, "documents that are packed, or sorted by length, together", "pool-documents", ge=1)
    checkpoint_every: int = _flag(100, "steps between two checkpoints", "checkpoint-every", ge=1)
    min_count: int = _flag(
        8, "tokens rarer than this in the first 2,000 documents share one row of the embedding; 0 = none do", "min-count", ge=0
    )
    seed: int = _flag(0, "seed of the initial weights and of the order of the text", "seed")
    threads: int = _flag(
        max(1, (os.cpu_count() or 2) // 2), "CPU threads of all --processes together", "threads", ge=1, said="half of the cores"
    )
    train_device: Literal["cpu", "cuda"] = _flag("cpu", "where it is trained", "train-device")
    peak_tflops: float = _flag(
        0.0,
        "most TFLOP/s of the devices together, for the share of it that is reached; 0 = by the GPU's name",
        "peak-tflops",
        ge=0,
    )
    wandb: str = _flag("", "project of Weights & Biases that steps are logged to; needs sn29[wandb]", "wandb")


class TrainSettings(TrainingSettings):
    """
    Train a model for a competition: from fresh weights, a checkpoint, the Hub, or the crown's holder. Stopped or killed at any
    instant, the same command goes on. --work.dir/training then holds checkpoint/ (what `sn29 check`, `sn29 forecast` and `sn29
    miner --model` take), curve.jsonl, curve.svg, and what a resumed run needs.

    Many processes: --processes N here, or `torchrun ... -m sn29.cli train ...` on every host, with a --work.dir that all see.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 train")

    processes: int = _flag(1, "processes on this machine, one for each GPU", "processes", ge=1)
    until: int = _flag(0, "end after this step of --steps, to go on later; 0 = all", "until", ge=0)
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    json_output: bool = _flag(False, "print each step as a JSON line", "json")


class MinerSettings(NeuronSettings, TrainingSettings):
    """
    Train, measure the checkpoint by the validators' own rule, publish it when it would win, see what became of it, train on.

    It runs until it is stopped (or for --cycles), and goes on where it was when it is started again. A forecast needs
    --records; `--cycles 1 --publish-at 0` trains once, publishes and ends. While its own hotkey holds the crown it publishes
    nothing: a new commitment would give the crown up. With --steps and the other flags of the training as they were when the
    run was begun; --start is for the first run.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 miner")

    repo: str = _flag("", "repository on the Hub: namespace/name", "repo")
    hub_token: str = _flag(
        "", "token that may write to the repository (better: HF_TOKEN)", "hub.token", variables=("HF_TOKEN",), secret=True
    )
    model: Path | None = _flag(None, "publish this folder instead of training, then end", "model")
    publish_at: float = _flag(
        0.8, "probability of winning from which on a checkpoint is published; 0 = every run's last one, unmeasured",
        "publish-at", ge=0, le=1,
    )  # fmt: skip
    records: Path | None = _flag(
        None, "folder of a validator's round records (or its state folder), for forecasts, for what becomes of our commitment "
        "and for --start champion", "records",
    )  # fmt: skip
    forecast_every: int = _flag(0, "steps between two forecasts; 0 = at the end of each training run", "forecast-every", ge=0)
    cycles: int = _flag(0, "end after so many training runs of --steps; 0 = never", "cycles", ge=0)
    follow: int = _flag(3, "windows that are waited for a record that names our commitment", "follow", ge=0)
    give_up_crown: bool = _flag(False, "publish although this hotkey holds the crown, which it gives up by it", "give-up-crown")
    publish_now: bool = _flag(
        False, "ask the miner that works in --work.dir to publish at its next forecast, whatever that says, and end",
        "publish-now",
    )  # fmt: skip
    processes: int = _flag(1, "processes of the training on this machine, one for each GPU", "processes", ge=1)
    forecast_device: Literal["", "cpu", "cuda"] = _flag(
        "", "where a checkpoint is measured for a forecast; default: where it is trained", "forecast-device"
    )
    evaluation_deadline_s: float = _flag(
        21_600.0, "seconds after which the check or the measuring of our own checkpoint is stopped", "evaluation.deadline", ge=1
    )
    poll_s: float = _flag(
        12.0, "seconds between two looks at chain and records while there is nothing else to do", "poll", ge=0.05
    )
    force: bool = _flag(False, "publish although the checks refuse the model", "force")
    sealed: bool = _flag(
        False,
        "commit to the digest alone first, to the repository when that is final, and show it when that is final too",
        "sealed",
    )


class LocalnetSettings(_Settings):
    """A chain and a Hub on this machine, for rehearsals. State survives a restart; Ctrl-C leaves it whole."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 localnet up")

    localnet_dir: Path = _flag(
        default_localnet(), "folder of all state", "localnet.dir", "dir", said="~/.local/share/sn29/localnet"
    )
    port: int = _flag(0, "port of the Hub; 0 = the one of last time, or a free one", "port", ge=0)
    block_seconds: float = _flag(1.0, "seconds a block, for a new localnet", "block-seconds", ge=0.01)
    window_blocks: int = _flag(60, "blocks of a sample window, for a new localnet", "window-blocks", ge=4)
    miners: tuple[str, ...] = _flag((), "wallet/hotkey to make (if new) and register", "miner")
    validators: tuple[str, ...] = _flag((), "the same with stake and a validator permit", "validator")
    wallet_path: Path = _flag(
        Path("~/.bittensor/wallets"), "folder of the wallets to register", "wallet.path", variables=("BT_WALLET_PATH",)
    )


class DemoSettings(_Settings):
    """A whole subnet on this machine: chain, Hub, miners that train and publish, a validator that sets weights."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 demo")

    folder: Path | None = _flag(None, "folder of everything the demo makes; default: a new one, kept for you to look at", "dir")
    block_seconds: float = _flag(1.0, "seconds a block of the chain", "block-seconds", ge=0.01)
    steps: int = _flag(0, "training steps of the first miner of each competition; 0 = as the demo is tuned", "steps", ge=0)
    open_page: bool = _flag(False, "open the page in the browser at the end", "open")
    node: str = _flag(
        "", "command of a node that serves the demo's chain over a websocket: it is given the chain's file and prints its "
        "ws:// address, e.g. 'python -m tests.loopback_node' in a clone; default: the chain is embedded", "node",
    )  # fmt: skip


class CheckSettings(_Settings):
    """
    Run the checks that a validator would run on a model. Exit 0: allowed. Exit 1: refused, with all reasons. Exit 2: Hub, disk
    or evaluation did not answer, so nothing is known; with --json the answer has `unavailable` then.

    All reasons: of the metadata all that apply, then, where it can be loaded, what tokenizer and weights show. A repository
    is fetched only if its metadata is allowed, into the folder models of sn29's cache, where it stays for the next time.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 check")

    model: CliPositionalArg[str] = Field(description="folder with config.json and *.safetensors, or REPO@REVISION on the Hub")
    competition: str = _flag("", "c00, or the path of a competition file", "competition", values=(COMPETITIONS,))
    competitions_dir: Path = _flag(Path("competitions"), "folder where c00 is looked up", "competitions.dir")
    at: int = _flag(0, "block whose rules are asked for; 0 = before every change of the file", "at")
    tokenizer: Path | None = _flag(None, "tokenizer.json of the competition, if its Hub is not to be asked", "tokenizer")
    hub_endpoint: str = _flag(
        DEFAULT_HUB, "Hub of REPO and of the competition's tokenizer", "hub.endpoint", variables=("HF_ENDPOINT",)
    )
    metadata_only: bool = _flag(False, "stop before the weights are fetched or loaded", "metadata-only")
    models_gb: float = _flag(
        40.0, "GB that fetched models may take in the cache; the longest unused are deleted first; 0 = what is free",
        "models.gb", ge=0,
    )  # fmt: skip
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class BenchEvalSettings(_Settings):
    """
    Time the packed engine beside the plain twin and padded batches, in turns, on random weights. Exit 1: a goal of this
    model, type and device is missed.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 bench eval")

    model: str = _flag("llama-100k", "tiny, llama-2k, llama-100k, phi3-32k, phi-50k, llama-8k, 1.1b, phi3-3.8b or 6.9b", "model")
    device: str = _flag("cpu", "cpu or cuda", "device")
    dtype: str = _flag("bfloat16", "float32 or bfloat16", "dtype")
    samples: int = _flag(8, "samples, of FineWeb-like lengths; few fill their rows badly", "samples")
    max_tokens: int = _flag(4096, "tokens of the longest sample", "max-tokens")
    times: int = _flag(5, "repetitions, whose median counts", "times")
    threads: int = _flag(1, "CPU threads", "threads")
    row_tokens: int = _flag(0, "tokens of a packed row; 0 = 1024 on a CPU, 8192 on CUDA", "row-tokens")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class BenchTrainSettings(_Settings):
    """
    Time training in the three packing modes beside one document a step and padded batches, in turns, on random weights:
    forward and backward of the same documents, useful tokens a second. Exit 1: a goal is missed.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 bench train")

    model: str = _flag("llama-2k", "a model of `sn29 bench eval`", "model")
    device: Literal["cpu", "cuda"] = _flag("cpu", "cpu or cuda", "device")
    dtype: Literal["float32", "bfloat16"] = _flag("float32", "of products; bfloat16 by autocast, weights in float32", "dtype")
    documents: int = _flag(512, "documents packed, or sorted by length, together; of FineWeb-like lengths", "documents", ge=1)
    tokens: int = _flag(16_000, "scored tokens that each way is timed on, spread evenly over the documents", "tokens", ge=1)
    max_tokens: int = _flag(1024, "tokens of the longest document", "max-tokens", ge=1)
    row_tokens: int = _flag(1024, "tokens of a packed row", "row-tokens", ge=1)
    batch_tokens: int = _flag(1024, "scored tokens of one forward, as near as whole rows come", "batch-tokens", ge=1)
    times: int = _flag(5, "repetitions, whose median counts", "times", ge=1)
    threads: int = _flag(1, "CPU threads", "threads", ge=1)
    optimizers: bool = _flag(False, "what each optimizer costs instead: bytes of state and time per parameter", "optimizers")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class BenchStreamSettings(_Settings):
    """
    Time a model that is read layer by layer, because it is larger than the memory that it may use, beside plain reading of
    its files. Exit 1: its losses are not those of the resident model, or a goal is missed.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 bench stream")

    model: str = _flag("llama-8k", "a model of `sn29 bench eval`", "model")
    device: str = _flag("cpu", "cpu or cuda", "device")
    dtype: Literal["float32", "bfloat16"] = _flag("bfloat16", "number format", "dtype")
    share: float = _flag(0.25, "memory that it may use, as a share of its weights; never less than it needs", "share", ge=0)
    samples: int = _flag(1, "samples; few leave the disk the slower one", "samples", ge=1)
    max_tokens: int = _flag(16, "tokens of the longest sample", "max-tokens", ge=1)
    row_tokens: int = _flag(64, "tokens of a packed row", "row-tokens", ge=64)
    times: int = _flag(5, "repetitions, whose median counts", "times", ge=1)
    json_output: bool = _flag(False, "print everything as JSON", "json")


class BenchStartSettings(_Settings):
    """
    Time a model's start in a child of its own, from the job to its first loss, beside plain reading of its weights and a
    new interpreter's imports, in turns. Exit 1: it takes more than a second beyond the reading.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 bench start")

    model: str = _flag("llama-8k", "a model of `sn29 bench eval`", "model")
    times: int = _flag(5, "repetitions, whose median counts", "times", ge=1)
    json_output: bool = _flag(False, "print everything as JSON", "json")


class BenchScoreSettings(_Settings):
    """
    Time the scoring rules on one window beside a plain loop over samples and models, in turns, on one core. Exit 1: the
    two disagree.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 bench score")

    models: int = _flag(256, "models", "models", ge=2, le=1000)
    samples: int = _flag(20_000, "samples of the window", "samples", ge=16)
    times: int = _flag(5, "repetitions, whose median counts", "times", ge=1)
    json_output: bool = _flag(False, "print everything as JSON", "json")


class IncentiveSettings(_Settings):
    """Play attacks and honest progress against each scoring rule and print who would be paid. Exit 1: a goal is missed."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 simulate incentive")

    rule: str = _flag("all", "oldest_holder, pairwise_epsilon, champion, or all", "rule", values=(*_RULES, "all"))
    attack: str = _flag("all", "a kind of scene (copies, improvement, ...), a part of a scene's name, or all", "attack")
    competition: str = _flag(
        "c00", "competition whose own rule is played with the fields of its file", "competition", values=(COMPETITIONS,)
    )
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    runs: int = _flag(40, "runs of a scene; a quarter for rules without memory, a tenth for five validators", "runs")
    days: int = _flag(30, "days of a run, of 20 windows of 360 blocks", "days")
    windows_per_day: int = _flag(4, "windows a day of champion, 1, 2, 4, 5, 10 or 20; in races always 20", "windows-per-day")
    samples: int = _flag(1500, "texts of a window", "samples")
    seed: int = _flag(29, "seed of all worlds", "seed")
    workers: int = _flag(2, "processes", "workers")
    picture: Path | None = _flag(None, "write the picture to this SVG file", "picture")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class DataSettings(_Settings):
    """What commands share that look at training text."""

    sources: CliPositionalArg[list[str]] = Field([], description="folders, .parquet files or hub:NAMESPACE/NAME@REVISION")
    pattern: str = _flag(
        "", "only files that match, where SOURCE has no GLOB: data/train-*.parquet; default: all, or the competition's", "pattern"
    )
    column: str = _flag("", "column of the texts; default: text, or the competition's", "column")
    tokenizer: Path | None = _flag(None, "tokenizer.json to count tokens with", "tokenizer")
    competition: str = _flag(
        "", "look at this competition's data sets too, and count with its tokenizer", "competition", values=(COMPETITIONS,)
    )
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    max_documents: int = _flag(100_000, "documents of each source that are looked at; 0 = all", "max-documents", ge=0)
    seed: int = _flag(0, "seed of the order of the documents", "seed")
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    picture: Path | None = _flag(None, "write a picture of it to this SVG file", "picture")
    json_output: bool = _flag(False, "print everything as JSON", "json")


class DataStatsSettings(DataSettings):
    """
    How long the documents of training text are: how many, how many tokens, quantiles and a histogram, what share is in long
    ones, how often long ones come again when all lengths are drawn evenly, exact duplicates, and what packing loses.

    SOURCE is a folder with .parquet files, a .parquet file, or hub:NAMESPACE/NAME@REVISION, of which only what is looked at
    is read; FOLDER/GLOB, .../GLOB and #COLUMN as in `sn29 train --data`. Where --max-documents leaves some out, whole row
    groups are drawn over all files. Several sources are told of one by one and together. Without --tokenizer and
    --competition a token is a byte.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 data stats")

    row_tokens: int = _flag(2048, "tokens of a row for what packing loses", "row-tokens", ge=1)
    evenly_tokens: int = _flag(0, "tokens that are drawn evenly; 0 = as many as there are", "evenly-tokens", ge=0)


class StudyPackingSettings(_Settings):
    """
    Measure what packing costs: train the same small model on the same documents, packed in several ways, with equal scored
    tokens and with equal compute, read held-out documents one by one and packed, and write the table with intervals, as
    study.md, study.csv, study.html and study.svg. A study that is stopped goes on where it was; more seeds can be added later.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 study packing")

    size: str = _flag("tiny", "tiny (0.36M parameters), small (1.3M), both for a CPU, or medium (138M, for a GPU)", "size")
    seeds: int = _flag(3, "how many times all is repeated, with other weights and documents", "seeds", ge=1)
    first_seed: int = _flag(0, "the first seed", "first-seed", ge=0)
    dir: Path = _flag(Path("~/.sn29/study"), "folder of the runs and the report; one folder holds one plan", "dir")
    workers: int = _flag(1, "runs at a time, each a process of one thread", "workers", ge=1)
    text: str = _flag("", "a source as of `sn29 data stats`; default: 14M characters of packages", "text")
    pattern: str = _flag("", "only files that match, e.g. data/train-*.parquet; default: all", "pattern")
    column: str = _flag("", "column of the texts; default: text", "column")
    max_documents: int = _flag(0, "documents that are trained on at most; 0: all of them", "max-documents", ge=0)
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))
    held_out: int = _flag(1200, "documents that are held out for the evaluation", "held-out", ge=1)
    tokenizer: Path | None = _flag(None, "tokenizer.json to use; default: byte BPE trained on the text", "tokenizer")
    tokens: int = _flag(0, "scored tokens of a run; default: the size's", "tokens", ge=0)
    row_tokens: int = _flag(0, "tokens of a packed row, and most of a document; default: the size's", "row-tokens", ge=0)
    batch_tokens: int = _flag(0, "scored tokens of a step; default: the size's", "batch-tokens", ge=0)
    learning_rate: float = _flag(0.0, "highest learning rate; default: the size's", "learning-rate", ge=0)
    device: Literal["", "cpu", "cuda"] = _flag("", "cpu or cuda; default: the size's", "device")
    report_only: bool = _flag(False, "write the report again from the finished runs; train nothing", "report-only")
    json_output: bool = _flag(False, "print the results as JSON", "json")


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
    rule: str = _flag("", "score with this rule instead: oldest_holder, pairwise_epsilon or champion", "rule", values=_RULES)
    competitions: Path | None = _flag(None, "score by the competition files of this folder instead", "competitions")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class StoreSettings(_Settings):
    """A validator's store."""

    state_dir: Path = _flag(Path("~/.sn29/validator"), "state folder of the validator", "state.dir")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class StoreCheckSettings(StoreSettings):
    """
    Look at a validator's store and records: is the file whole, do records have the hash that they are named by, are the losses
    the recorded ones, which rounds are open, which losses does no record refer to. Reads only, beside a running validator, the
    store as of one moment: store.db-wal grows by what the validator writes meanwhile.
    Exit 0: nothing is wrong. Exit 1: something is, and the table says what.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 store check")


class StoreCompactSettings(StoreSettings):
    """
    Write a store anew, without the room of what was deleted; the new file takes the old one's place, owner and mode when it is
    on the disk, which holds both until then. The validator must have ended. --keep-rounds also forgets older rounds: their
    records and weights in the store, and the losses of texts that no kept round was decided by. Kept are all claims, refusals,
    standings, publications and what was seen of models, and the memory of the crowns, which is in the newest record; the files
    in records/ stay. `sn29 explain` and `sn29 replay` read those files.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 store compact")

    keep_rounds: int = _flag(0, "finished rounds that are kept, the newest ones, at least 2; 0 = all", "keep-rounds", ge=0)

    @field_validator("keep_rounds")
    @classmethod
    def _are_some(cls, value: int) -> int:
        if value == 1:
            raise ValueError("0, or at least 2")
        return value


class StoreExportSettings(StoreSettings):
    """
    Write a validator's losses, outcomes, scores, weights and publications as flat tables, one file each, with columns.md, which
    says what every column is. Reads only, beside a running validator, everything as of one moment: store.db-wal grows by what
    the validator writes meanwhile. In CSV, text that a spreadsheet would take for a formula (it begins with = + - @, a tab or the
    end of a line) has an apostrophe before it.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 store export")

    format: Literal["parquet", "csv"] = _flag("parquet", "of the files", "format")
    out: Path = _flag(Path("export"), "folder of the files; an export that is there is replaced", "out")


class AuditSettings(_Settings):
    """Say where the records of two validators differ, first cause first. Exit 0: they are equal. Exit 1: they are not."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 audit")

    first: CliPositionalArg[Path] = Field(description="a round record")
    second: CliPositionalArg[Path] = Field(description="another validator's record of the same round")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class ExplainSettings(_Settings):
    """Why a hotkey got its weight: seen, refused why, evaluated, lost to whom by how much, and what would win."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 explain")

    hotkey: CliPositionalArg[str] = Field(description="the miner's hotkey, its beginning, or the owner of its repository")
    round: int | None = _flag(None, "only the round of this block", "round")
    state_dir: Path = _flag(_RECORDS, "state folder of a validator: its records are in the folder `records` there", "state.dir")
    records: Path | None = _flag(None, "folder with round records, or one record, instead", "records")
    json_output: bool = _flag(False, "print the answer as JSON", "json")


class ReportSettings(_Settings):
    """
    Pages to look at: what a validator is doing now, every competition, every miner, every round. --out writes them as one HTML
    file that needs nothing else; --serve shows them live, with JSON beside each page (/status.json, /competition/c00.json),
    /metrics for Prometheus and /healthz for whoever restarts what hangs: 503 while the state is old or an alarm is critical.

    RECORD is a round record or a folder of them, to be shown instead of a validator's state folder. Nothing is written there.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 report")

    records: CliPositionalArg[list[Path]] = Field([], description="round records, or folders of them, instead of --state.dir")
    state_dir: Path = _flag(_RECORDS, "state folder of a validator, or work folder of a miner", "state.dir")
    out: Path | None = _flag(None, "write the page to this file", "out")
    serve: str = _flag("", "HOST:PORT to show the pages on until Ctrl-C; [::1]:PORT for IPv6; port 0 = a free one", "serve")
    rounds: int = _flag(40, "newest rounds that are shown", "rounds", ge=1, le=1000)
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files: what changes next", "competitions.dir")
    competitions_git: str = _flag("", "REPO@COMMIT whose competitions/ is read instead of the folder", "competitions.git")
    weights_alarm_epochs: int = _flag(
        3, "an alarm when the last set on chain is older than this many epochs", "weights.alarm-epochs", ge=1
    )
    parent: int = _flag(0, "with --serve: end when the process of this number, our parent, has; 0 = never", "parent", ge=0)
    json_output: bool = _flag(False, "print everything that the pages say as JSON", "json")


class ForecastSettings(_Settings):
    """
    What would become of a checkpoint that is committed now: the checks of a validator, then its losses on the texts of a
    window that a validator has recorded, judged by the competition's own rule beside the recorded models.

    Exit 0: it would be accepted. Exit 1: refused, with all reasons. Exit 2: Hub, data set or evaluation did not answer, so
    nothing is known. Exit 3: accepted, but the probability to have won within --windows is below --fail-below,
    or not known, because no record says who is there.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 forecast")

    checkpoint: CliPositionalArg[str] = Field(description="folder of a model as save_pretrained writes it, or REPO@REVISION")
    competition: str = _flag("", "competition that it is for, e.g. c00", "competition", values=(COMPETITIONS,))
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    records: Path | None = _flag(
        None, "folder of a validator's round records (or its state folder), or one record; needed", "records"
    )
    now: int = _flag(0, "block of the commitment that is thought of; 0 = that of the newest record", "now", ge=0)
    hotkey: str = _flag("", "hotkey that would commit: its older model goes; empty: a new one", "hotkey")
    windows: int = _flag(20, "windows to come within which it is to win", "windows", ge=1, le=1000)
    fail_below: float = _flag(0.0, "exit 3 when the probability of that is below this, 0 to 1", "fail-below", ge=0, le=1)
    seed: int = _flag(29, "seed of the draws", "seed", ge=0)
    device: Literal["cpu", "cuda"] = _flag("cpu", "where it is evaluated", "device")
    threads: int = _flag(2, "CPU threads of the evaluation", "threads", ge=1)
    deadline_s: float = _flag(3600.0, "seconds that an evaluation may take", "deadline", ge=1)
    hub_endpoint: str = _flag(
        DEFAULT_HUB, "Hub of REPO, of the data set and of the competition's tokenizer", "hub.endpoint", variables=("HF_ENDPOINT",)
    )
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
    hub_endpoint: str = _flag(DEFAULT_HUB, "address of the Hub", "hub.endpoint", variables=("HF_ENDPOINT",))


class DoctorOfValidator(ValidatorSettings):
    """Look, without changing anything, at all that a validator with these settings needs. Exit 0: all is well. Exit 1: not."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 doctor validator")

    @classmethod
    def program(cls) -> str:
        """The program's own settings, so that what is looked at is what will run."""
        return "validator"

    only: tuple[str, ...] = _flag((), "only these checks, e.g. chain,clock", "doctor.only", "only")
    check_deadline_s: float = _flag(60.0, "seconds that one check may take", "doctor.deadline", ge=0.05)
    json_output: bool = _flag(False, "print the findings as JSON", "doctor.json", "json")


class DoctorOfMiner(MinerSettings):
    """Look, without changing anything, at all that a miner with these settings needs. Exit 0: all is well. Exit 1: not."""

    model_config = SettingsConfigDict(cli_prog_name="sn29 doctor miner")

    @classmethod
    def program(cls) -> str:
        return "miner"

    only: tuple[str, ...] = _flag((), "only these checks, e.g. chain,clock", "doctor.only", "only")
    check_deadline_s: float = _flag(60.0, "seconds that one check may take", "doctor.deadline", ge=0.05)
    json_output: bool = _flag(False, "print the findings as JSON", "doctor.json", "json")


class SequentialSettings(_Settings):
    """
    Play challengers of many qualities in full and with stopping, and print samples saved and who was stopped wrongly. Exit
    1: a goal is missed.
    """

    model_config = SettingsConfigDict(cli_prog_name="sn29 simulate sequential")

    competition: str = _flag(
        "c00", "competition whose rule is played with the fields of its file", "competition", values=(COMPETITIONS,)
    )
    competitions_dir: Path = _flag(Path("competitions"), "folder of the competition files", "competitions.dir")
    runs: int = _flag(100, "seasons of each challenger", "runs")
    windows: int = _flag(12, "windows of a season", "windows")
    samples: int = _flag(1500, "texts of a window", "samples")
    seed: int = _flag(29, "seed of all worlds", "seed")
    json_output: bool = _flag(False, "print everything as JSON", "json")


# ---- where values come from ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """A value as somebody wrote it, and where."""

    value: Any
    origin: str
    """E.g. `--netuid`, `environment BT_WALLET`, `.env HF_TOKEN`, `sn29.yaml wallet.name`, `default`."""


AnySettings = TypeVar("AnySettings", bound=_Settings)


def read(kind: type[AnySettings], arguments: list[str]) -> AnySettings:
    """The settings of a program. Raises WrongUsage for a flag that there is not, an argument that is missing and a value that is
    not allowed, Rejected(SETTING) for a file that cannot be read; both name where it stands and both values. `--help` exits.

    Says on standard error when a variable was used by a name of former years.
    """
    settings, origins = read_with_origins(kind, arguments)
    for setting in settings_of(kind):
        old = next((name for name in setting.extra["old"] if origins[setting.field].endswith(f" {name}")), None)
        if old:
            print(f"sn29: {old} is an old name; the setting is read from {setting.variables[-1]} now", file=sys.stderr)
    return settings


def read_with_origins(kind: type[AnySettings], arguments: list[str]) -> tuple[AnySettings, dict[str, str]]:
    """(settings, where the value of each field came from). Raises as `read` does."""
    given = _gathered(kind, arguments)
    try:
        settings = kind(**{name: one.value for name, one in given.items()})
    except ValidationError as error:
        raise _wrong_value(kind, error.errors()[0], given) from None
    return settings, {s.field: given[s.names[0]].origin if s.names[0] in given else "default" for s in settings_of(kind)}


def _wrong_value(kind: type[_Settings], first: Mapping[str, Any], given: Mapping[str, Given]) -> WrongUsage:
    """What pydantic found, in words: the setting as it was written, its value, the values that are allowed."""
    name = str(first["loc"][0]) if first["loc"] else ""
    where = given[name].origin if name in given else f"--{name}"
    setting = next((one for one in settings_of(kind) if one.names[0] == name), None)
    limit = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    wanted = next((words for start, words in _WANTED.items() if first["type"].startswith(start)), "")
    if wanted and setting:
        bounds = {f"{word} {end:g}" for one in setting.info.metadata for word, end in _bounds(one)}
        limit = ", ".join(["a whole number" if setting.info.annotation is int else wanted, *sorted(bounds)])
    elif first["type"] == "literal_error":
        limit = limit.replace("'", "")
    about = f" ({setting.extra['about']})" if setting else ""
    got = "(hidden)" if setting and setting.extra["secret"] else first.get("input")
    return WrongUsage(got, limit, where, advice=f"{where}{about} takes {limit}")


_WANTED = {
    "int_": "a whole number", "float_": "a number", "bool_": "true or false", "greater_": "a number", "less_": "a number"
}  # fmt: skip
"""How pydantic's names of mistakes begin, and what was wanted."""


def _bounds(one: Any) -> Iterator[tuple[str, float]]:
    for field, word in (("ge", "at least"), ("le", "at most")):
        if (end := getattr(one, field, None)) is not None:
            yield word, end


def _wrong_words(kind: type[_Settings], said: str) -> WrongUsage:
    """What the parser said of a command line, in words. What stands behind = is not repeated: it may be a token."""
    program = str(kind.model_config.get("cli_prog_name"))
    advice = f"`{program} --help` lists its flags and arguments"
    kind_of_mistake, _, words = said.partition(": ")
    if kind_of_mistake == "unrecognized arguments":
        flag = next((word.partition("=")[0] for word in words.split() if word.startswith("-")), "")
        known = [f"--{name}" for setting in settings_of(kind) for name in setting.names if len(name) > 1]
        near = difflib.get_close_matches(flag, known, n=1)
        said = f"no flag {flag}{f'; did you mean {near[0]}?' if near else ''}" if flag else f"{words}: more words than it takes"
    elif kind_of_mistake == "the following arguments are required":
        about = next((info.description for field, info in kind.model_fields.items() if field.upper() in words.split(", ")), "")
        said = f"{words} is missing{f': {about}' if about else ''}"
    elif words.startswith("expected "):
        said = f"{kind_of_mistake.removeprefix('argument ')} stands without its value"
    return WrongUsage(said, f"what {program} takes", said=said, advice=advice)


def make_folder(path: Path, where: str) -> None:
    """A folder that a setting names, if it is not there yet. Raises Rejected(SETTING) where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Rejected(Reason.SETTING, f"{path}: {error.strerror}", "a folder that can be written to", where) from None


def shown_value(setting: Setting, settings: _Settings) -> str:
    """A value as it may be printed: of a secret only whether there is one."""
    value = getattr(settings, setting.field)
    if setting.extra["secret"] and value:
        return "(hidden)"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "" if value is None else str(value)


def _gathered(kind: type[_Settings], arguments: list[str]) -> dict[str, Given]:
    """First name (or a positional's field) -> the strongest value that was given for it."""
    try:
        arguments, written = _as_written(kind, arguments)
        flags = CliSettingsSource(kind, cli_parse_args=arguments, cli_exit_on_error=False)()
    except SettingsError as error:
        raise _wrong_words(kind, str(error).splitlines()[0].removeprefix("error parsing CLI: ")) from None
    given = {name: Given(value, written.get(name, f"--{name}")) for name, value in flags.items()}
    dotenv = _dotenv(kind)
    for place, variables in (("environment", os.environ), (".env", dotenv)):
        for setting in settings_of(kind):
            found = [name for name in (*setting.variables, *setting.extra["old"]) if variables.get(name)]
            if found and setting.names[0] not in given:
                given[setting.names[0]] = Given(variables[found[0]], f"{place} {found[0]}")
    for name in _OTHERS_VARIABLES:
        if dotenv.get(name):
            os.environ.setdefault(name, str(dotenv[name]))
    named = given["config"].value if "config" in given else None
    for name, one in _of_file(kind, Path(named or CONFIG_FILE), must_exist=named is not None).items():
        given.setdefault(name, one)
    return given


def _as_written(kind: type[_Settings], arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """(arguments without flags that an address makes void, first name of a setting -> the flag that it was given by)."""
    first = {name: setting.names[0] for setting in settings_of(kind) for name in setting.names}
    addressed = [first[_ADDRESS]] if any(_name_of(word) == _ADDRESS for word in arguments) and _ADDRESS in first else []
    kept: list[str] = []
    written: dict[str, str] = {}
    skip_value = False
    for word in arguments:
        name = _name_of(word)
        is_void = name is not None and name != _ADDRESS and first.get(name) in addressed
        if name in first and not is_void:
            written[first[name]] = word.partition("=")[0]
        if not is_void and not skip_value:
            kept.append(word)
        skip_value = is_void and "=" not in word
    return kept, written


def _name_of(word: str) -> str | None:
    """The flag's name in a word of the command line; None for a value."""
    return word.lstrip("-").partition("=")[0] if word.startswith("-") else None


def _dotenv(kind: type[_Settings]) -> Mapping[str, str | None]:
    """The variables of `.env` in the working directory; names that we do not know are other programs'."""
    try:
        return DotEnvSettingsSource(kind, env_file=".env", case_sensitive=True).env_vars
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(Reason.SETTING, error, "a text file in UTF-8", ".env") from None


def _of_file(kind: type[_Settings], path: Path, *, must_exist: bool) -> dict[str, Given]:
    """What the YAML file says to this program. Raises Rejected(SETTING) for a key that no program knows, whoever it is for."""
    if not path.is_file():
        if must_exist:
            raise Rejected(Reason.SETTING, f"no file {path}", "a YAML file of settings", "--config")
        return {}
    from sn29.rules.yaml_text import load

    try:
        text = path.read_text(encoding="utf-8")
        is_empty = all(line.lstrip()[:1] in ("", "#") for line in text.splitlines())
        pairs = [] if is_empty else list(_flat(load(path.name, text)))
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(Reason.SETTING, error, "a text file in UTF-8", str(path)) from None
    except Rejected as error:
        raise Rejected(Reason.SETTING, error.got, error.limit, error.where) from None
    found = dict(pairs)
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise Rejected(Reason.SETTING, f"{twice[0]}, twice", "each setting once", path.name)
    known = {key for program in programs() for setting in settings_of(program) for key in setting.keys}
    for key in found:
        if key not in known:
            own = [name for name in sorted(known) if name.endswith(f".{key}")]
            near = " or ".join(own or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0))
            raise Rejected(Reason.SETTING, f"{key}, which is no setting", f"a known one, such as {near}", path.name)
    given: dict[str, Given] = {}
    for setting in settings_of(kind):
        used = [key for key in setting.keys if found.get(key) is not None]
        used = [key for key in used if key == _ADDRESS] or used
        if len(used) > 1:
            raise Rejected(Reason.SETTING, f"{used[0]} and {used[1]}", "one of them: they are the same setting", path.name)
        if used:
            given[setting.names[0]] = Given(found[used[0]], f"{path.name} {used[0]}")
    return given


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path -> value: `wallet: {name: x}` and `wallet.name: x` are the same."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def programs(base: type[_Settings] = _Settings) -> Iterator[type[_Settings]]:
    """The settings of every command."""
    from sn29 import lab_settings as lab_settings  # whose classes then are subclasses of ours

    found = [base] if base.model_config.get("cli_prog_name") else []
    for kind in base.__subclasses__():
        found += programs(kind)
    yield from dict.fromkeys(found)  # the miner's have two parents
