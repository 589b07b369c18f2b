"""What must not leave this process in words: secrets, and characters that would do something to a terminal.

Everything that is told, logged or printed of an error goes through `clean` (one line) or `without_secrets` (a traceback).
What is secret is known from three sides: values that a program names (`conceal`), values of variables whose names say so, and
forms that only secrets have: a token of the Hub, what stands before @ or behind ? in an address. Of an address of a node, whose
path is often the key to it, only the host is shown.
"""

from __future__ import annotations

import os
import re

_named: dict[str, str] = {}
"""Secret -> what is shown in its place."""
_VARIABLE = re.compile("(TOKEN|PASSWORD|PASSPHRASE|SECRET|MNEMONIC|SEED_?PHRASE|API_?KEY|PRIVATE_?KEY|ACCESS_KEY)$", re.I)
_SHORTEST = 6
"""Characters of a secret. What is shorter stands in half of all words, and hiding it would say what it is."""
_FORMS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"(?<=://)[^\s/@'\"]+@"), ""),
    (re.compile(r"(\bwss?://[^\s/'\",;)]+)/[^\s'\",;)]+"), r"\1/***"),
    (re.compile(r"(\bhttps?://[^\s?'\"]*)\?[^\s'\")>]+"), r"\1?***"),
)


def conceal(value: str, shown: str) -> None:
    """From now on `shown` is said where `value` would be. Nothing happens for one shorter than 6 characters."""
    if len(value) >= _SHORTEST:
        _named[value] = shown


def reveal(value: str) -> None:
    """It is no secret any more."""
    _named.pop(value, None)


def conceal_environment() -> None:
    """All variables whose names end as those of secrets do: HF_TOKEN, BT_WALLET_PASSWORD, WANDB_API_KEY. Of our own settings
    one is a secret; SN29_MINER_START_TOKEN is a word."""
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and (not name.startswith("SN29_") or name == "SN29_HUB_TOKEN"):
            conceal(value, f"${name}")


def without_secrets(text: str) -> str:
    for value in sorted(_named, key=len, reverse=True):  # a secret may hold another one
        text = text.replace(value, _named[value])
    for form, shown in _FORMS:
        text = form.sub(shown, text)
    return text


def clean(text: object) -> str:
    """One printable line without secrets: strangers write names of repositories, and errors carry addresses."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in without_secrets(str(text)))
