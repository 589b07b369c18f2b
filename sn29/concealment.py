"""What must not leave this process in words: secrets, and characters that would do something to a terminal.

Everything that is told, logged or printed of an error goes through `clean` (one line) or `without_secrets` (a traceback).
What is secret is known from three sides: values that a program names (`conceal`), values of variables whose names say so, and
forms that only secrets have: a token of the Hub or of a header, what stands before @ or behind ? in an address, and a key in
the path of one: a UUID, 32 hex digits, or what follows /v2/. Of a ws:// address, a node's, only the host is shown.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
import warnings
from types import TracebackType
from urllib.parse import quote, quote_plus

_named: dict[str, str] = {}
"""Each form of each secret -> what is shown in its place; the longest first, because a secret may hold another one."""
_PASSWORD = re.compile(r"(PASSWORD|PASSPHRASE|(^|_)PASS|SECRET|MNEMONIC|SEED_?PHRASE)$|^BT_PW_", re.I)
"""Variables of secrets that people make up; BT_PW_ and a wallet's path is where Bittensor reads that hotkey's password."""
_TOKEN = re.compile(r"(TOKEN|API_?KEY|PRIVATE_?KEY|ACCESS_KEY|(^|_)SEED|_PAT)$|^TOKEN_", re.I)
"""Variables of secrets that machines make up."""
_PLAIN = re.compile(r"[a-z]{1,10}|\d{1,10}")
"""No machine makes up such a secret: CI_TOKEN=default is a word, and hiding it would hide it in half of all sentences."""
_SHORTEST = 6
"""Characters of a secret. What is shorter stands in half of all words, and hiding it would say what it is."""
_FORMS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"(?<=://)(?:[^\s/?#'\"]|['\"](?![],:;)}>]))+@"), ""),
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]{6,}"), r"\1***"),
    (re.compile(r"(\bwss?://[^\s/?#'\",;)]+)[/?#][^\s'\"]*[^\s'\",;)]", re.I), r"\1/***"),
    (
        re.compile(
            r"(\bhttps?://[^\s?'\"]*?/)(?:(?<=/v\d/)[\w-]{10,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})(?![\w.-])",
            re.I,
        ),
        r"\1***",
    ),
    (re.compile(r"(\bhttps?://[^\s?'\"]*)\?[^\s'\")>]+", re.I), r"\1?***"),
)


def conceal(value: str, shown: str) -> None:
    """From now on `shown` is said where `value` would be. Nothing happens for one shorter than 6 characters."""
    global _named  # a new one: other threads go through the old one
    if len(value) >= _SHORTEST:
        known = _named | dict.fromkeys(_forms(value), shown)
        _named = {form: known[form] for form in sorted(known, key=len, reverse=True)}


def reveal(value: str) -> None:
    """It is no secret any more."""
    global _named
    _named = {form: shown for form, shown in _named.items() if form not in _forms(value)}


def _forms(value: str) -> set[str]:
    """As it is, as it stands in an address, and in `repr` of a text, whose other characters say which quotes are escaped."""
    within = {repr(value)[1:-1], repr(f"'\"{value}")[4:-1]}
    return {value, *within, quote(value), quote(value, safe=""), quote_plus(value)}


def conceal_environment() -> None:
    """All variables whose names say that they are secret: HF_TOKEN, BT_WALLET_PASSWORD, WANDB_API_KEY. Of our own settings
    one is; SN29_MINER_START_TOKEN is a word. A path that is there is the place of a secret."""
    for name, value in os.environ.items():
        is_made_up = _PASSWORD.search(name) or (_TOKEN.search(name) and not _PLAIN.fullmatch(value))
        is_path = value.startswith("/") and os.path.exists(value)
        if is_made_up and not is_path and (not name.startswith("SN29_") or name == "SN29_HUB_TOKEN"):
            conceal(value, f"${name}")


def guard() -> None:
    """What Python itself says, of errors that end a program or a thread and of warnings, is without secrets too."""
    conceal_environment()

    def ended(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if not issubclass(kind, SystemExit):
            sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = ended
    threading.excepthook = lambda end: ended(end.exc_type, end.exc_value, end.exc_traceback)
    if getattr(warnings.formatwarning, "__module__", "") != __name__:
        said = warnings.formatwarning

        def without(*words: object, **more: object) -> str:
            return without_secrets(said(*words, **more))  # type: ignore[arg-type]

        warnings.formatwarning = without


def without_secrets(text: str) -> str:
    for form, shown in _named.items():
        text = text.replace(form, shown)
    for pattern, shown in _FORMS:
        text = pattern.sub(shown, text)
    return text


def clean(text: object) -> str:
    """One printable line without secrets: strangers write names of repositories, and errors carry addresses."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in without_secrets(str(text)))
