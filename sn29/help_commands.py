"""`sn29 config | completion | reference`: what this software says of itself."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from sn29.command_table import COMMANDS, GROUPS, Command
from sn29.concealment import clean
from sn29.errors import WrongUsage, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sn29.completion import Entry, Option


def config(words: list[str]) -> int:
    """[PROGRAM] [its flags]: nothing is run."""
    from sn29.settings import programs, read_with_origins, settings_of, shown_value

    kinds = {str(kind.model_config.get("cli_prog_name")).removeprefix("sn29 "): kind for kind in programs()}
    if words[:1] in (["--help"], ["-h"]):
        print("usage: sn29 config [--json] [PROGRAM] [FLAGS]\n")
        print("Every setting of a program (default: validator), its value, and where the value comes from:")
        print(f"a flag, the environment, .env, the YAML file, or the default.\n\nPROGRAM: {', '.join(kinds)}")
        return 0
    as_json = words[:1] == ["--json"]
    words = words[1:] if as_json else words
    name = next((" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in kinds), "")
    if words and not name and not words[0].startswith("-"):
        near = nearest(words[0], kinds)
        said = f"no program {words[0]}{f'; did you mean {near}?' if near else ''}"
        raise WrongUsage(words[0], ", ".join(kinds), said=said, advice="`sn29 config --help` lists them")
    kind = kinds[name or "validator"]
    settings, origins = read_with_origins(kind, words[len(name.split()) :])
    rows = [(s.names[0], clean(shown_value(s, settings)), origins[s.field]) for s in settings_of(kind)]
    if as_json:
        print(json.dumps([dict(zip(("name", "value", "origin"), row, strict=True)) for row in rows], indent=2))
        return 0
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")
    return 0


_INSTALL = """\
usage: sn29 completion bash|zsh|fish

Prints a script that completes commands, flags, choices and files:

  bash   sn29 completion bash > ~/.local/share/bash-completion/completions/sn29   (needs bash-completion)
         or, in ~/.bashrc:    source <(sn29 completion bash)
  zsh    in ~/.zshrc:         source <(sn29 completion zsh)
  fish   sn29 completion fish > ~/.config/fish/completions/sn29.fish

It is read when a new shell begins; after an update of sn29, print it again."""


def completion(words: list[str]) -> int:
    """The script for one shell."""
    from sn29.completion import SHELLS, script

    if words[:1] in (["--help"], ["-h"]):
        print(_INSTALL)
        return 0
    if len(words) != 1 or words[0] not in SHELLS:
        got, limit = " ".join(words), ", ".join(SHELLS)
        advice = f"name one of {limit}: `sn29 completion --help` says where the script goes"
        raise WrongUsage(got, limit, said=f"no shell {got}" if got else "the name of your shell is missing", advice=advice)
    sys.stdout.write(script(words[0]))
    return 0


# ---- the reference ---------------------------------------------------------------------------------------------------

_START = """\
# Commands

Made by `sn29 reference > docs/commands.md` from what `sn29 COMMAND --help` is made of; a test fails when it is stale.

Every flag has a variable and a key in `sn29.yaml`: `--state.dir`, `SN29_STATE_DIR`, `state: {dir: ...}`; a flag without a dot
is its program's own: `--threads`, `SN29_VALIDATOR_THREADS`, `validator: {threads: ...}`. Strongest first: flag, environment,
`.env`, `sn29.yaml`, default. A flag without a value, as `--json`, has a negation, `--no-json`. Lists are separated by commas.
`sn29 config PROGRAM` shows what is in force here."""


def reference(words: list[str]) -> int:
    """The whole of it on standard output."""
    if words:
        print("usage: sn29 reference\n\nPrints every command and flag in Markdown: what docs/commands.md is made of.")
        return 0 if words[:1] in (["--help"], ["-h"]) else 2
    print("\n".join(_reference()))
    return 0


def _reference() -> Iterator[str]:
    from sn29.completion import entries

    found = entries()
    validator = next(entry for entry in found if entry.words == ("validator",))
    common = {s.names for s in (o.setting for o in validator.options) if s.names[0].split(".")[0] in ("config", "log", "logging")}
    yield _START
    yield "\n## Flags of every command\n\nOf every one that has flags.\n"
    yield from _table([option for option in validator.options if option.setting.names in common])
    for group, title in GROUPS.items():
        yield f"\n## {title}"
        for entry in found:
            if (command := _command_of(entry.words)).group == group:
                takes = "" if entry.words not in COMMANDS else f" {command.takes}" if command.takes else ""
                yield f"\n### sn29 {' '.join(entry.words)}{takes}\n"
                yield from _section(entry, common)


def _command_of(words: tuple[str, ...]) -> Command:
    """What the table says of it; behind `doctor miner` what it says of `doctor`."""
    return next(command for name, command in COMMANDS.items() if words[: len(name)] == name)


def _section(entry: Entry, common: set[tuple[str, ...]]) -> Iterator[str]:
    from inspect import cleandoc

    if entry.settings is None:
        yield f"{entry.about[0].upper()}{entry.about[1:]}."
        return
    yield cleandoc(entry.settings.__doc__)
    positional = [(name, one.description) for name, one in entry.settings.model_fields.items() if one.validation_alias is None]
    if positional:
        yield ""
    for name, about in positional:
        yield f"- `{name}`: {about}"
    own = [option for option in entry.options if option.setting.names not in common]
    if own:
        yield ""
        yield from _table(own)


def _table(options: list[Option]) -> Iterator[str]:
    yield "| flag | what it is | default | variables |\n|---|---|---|---|"
    for option in options:
        extra = option.setting.extra
        flags = ", ".join(f"`{flag}`" for flag in option.flags if not flag.startswith("--no-"))
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        default = extra["said"] or _shown(option.setting.info.default)
        variables = ", ".join(f"`{name}`" for name in option.setting.variables)
        yield f"| {flags} | {extra['about'].replace('|', chr(92) + '|')}{choices} | {default} | {variables} |"


def _shown(default: object) -> str:
    """A value in backticks; nothing for none."""
    if isinstance(default, bool):
        return "on" if default else "off"
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
    return f"`{shown}`" if shown else ""
