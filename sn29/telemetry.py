"""What the programs say: one event a line, for people or (with --log.json) for machines. The only import of loguru and wandb.

An event has a fixed name, a sentence and fields: `tell("fetched", "downloaded 3 files", hotkey=..., bytes=...)`. One
commitment's life can be followed by its hotkey.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from loguru import Message

Tell = Callable[..., None]
"""tell(event, sentence, **fields)."""


def configure(*, as_json: bool = False, level: str = "INFO", file: Path | None = None) -> None:
    """Sends events to standard error, and as JSON lines to `file` as well if one is given."""
    logger.remove()
    if as_json:
        logger.add(_write_json, level=level)
    else:
        logger.add(sys.stderr, level=level, format="{time:HH:mm:ss} {level: <7} {message}{extra[shown]}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a", encoding="utf-8", buffering=1)

        def append(message: Message) -> None:
            stream.write(_json_line(message))

        logger.add(append, level=level)


def tell(event: str, sentence: str, **fields: Any) -> None:
    """One event at level INFO."""
    _emit("INFO", event, sentence, fields)


def warn(event: str, sentence: str, **fields: Any) -> None:
    """One event that somebody should look at."""
    _emit("WARNING", event, sentence, fields)


def bug(sentence: str) -> None:
    """An exception nobody expected, with its traceback: call it from an `except` block."""
    logger.bind(event="bug", fields={}, shown="").opt(exception=True).error("{}", sentence)


def _emit(level: str, event: str, sentence: str, fields: dict[str, Any]) -> None:
    shown = "".join(f" {name}={value}" for name, value in fields.items())
    logger.bind(event=event, fields=fields, shown=shown).log(level, "{}", sentence)


def _json_line(message: Message) -> str:
    record = message.record
    line = {
        "time": record["time"].timestamp(),
        "level": record["level"].name,
        "event": record["extra"].get("event", "log"),
        "message": record["message"],
        **record["extra"].get("fields", {}),
    }
    if record["exception"] is not None:
        line["exception"] = str(record["exception"].value)
    return json.dumps(line, default=str) + "\n"


def _write_json(message: Message) -> None:
    sys.stderr.write(_json_line(message))


# --- curves elsewhere -------------------------------------------------------------------------------------------------


def open_wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases with `log(values, step=n)` and `finish()`; a folder's run goes on when it is opened again.

    WANDB_MODE=offline writes below the folder, for `wandb sync` later. Raises Rejected(SETTING) where it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise Rejected(Reason.SETTING, "--wandb without the package", "pip install 'sn29[wandb]'", "--wandb") from None
    name = hashlib.sha256(f"{folder.resolve()} {config.get('began')}".encode()).hexdigest()[:16]
    return wandb.init(project=project, dir=folder, id=name, resume="allow", config=dict(config))
