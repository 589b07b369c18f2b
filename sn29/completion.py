"""What can be written behind `sn29`, as data, and as scripts that complete it in bash, zsh and fish.

The scripts need no Python while they complete: all words, flags and choices stand in them. Values of flags that are files or
folders, and arguments that can be, are completed from the disk.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sn29.command_table import COMMANDS
from sn29.settings import COMPETITIONS, Setting, programs, settings_of

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Option:
    """A flag by all its names."""

    setting: Setting
    flags: tuple[str, ...]
    """With dashes; for one without a value also its negation."""
    choices: tuple[str, ...]
    takes: Literal["nothing", "word", "path"]

    def values(self, competitions: str) -> list[str]:
        """What can be offered for it; `competitions` is how a shell finds the names of those that are in files here."""
        return [competitions if one == COMPETITIONS else one for one in self.choices or self.setting.extra["values"]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A command as it can be written; its words, e.g. `doctor miner`."""

    words: tuple[str, ...]
    about: str
    options: tuple[Option, ...]
    choices: tuple[str, ...]
    """What stands for its argument, if that is one of a few words."""
    takes_path: bool
    """Whether its arguments can be files or folders."""
    settings: Any = None
    """The class of its settings, if it has one."""


def entries() -> tuple[Entry, ...]:
    """Every command, in the order of `sn29 --help`; behind `doctor` each of the programs that it looks at."""
    kinds = {tuple(kind.program_words()): kind for kind in programs()}
    found = []
    for words, command in COMMANDS.items():
        choices = tuple(re.fullmatch(r"\[?([a-z|]*)\]?", command.takes)[1].split("|")) if command.takes.islower() else ()  # type: ignore[index]
        for name in [words, *(name for name in kinds if name[: len(words)] == words and name not in COMMANDS)]:
            kind = kinds.get(name)
            options = tuple(map(_option, settings_of(kind))) if kind else ()
            takes_path = bool(command.takes) and not choices and command.takes not in ("HOTKEY", "[PROGRAM] [FLAGS]")
            found.append(Entry(name, command.about, options, choices, takes_path, kind))
    return tuple(found)


def _option(setting: Setting) -> Option:
    flags = [f"--{name}" if len(name) > 1 else f"-{name}" for name in setting.names]
    kinds = list(_plain(setting.info.annotation))
    if bool in kinds:
        return Option(setting, (*flags, *(f"--no-{name}" for name in setting.names)), (), "nothing")
    choices = tuple(str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind) if value != "")
    return Option(setting, tuple(flags), choices, "path" if Path in kinds else "word")


def _plain(annotation: Any) -> Iterator[Any]:
    """The types that a value can be of: of an optional one, of a list its elements'."""
    if get_origin(annotation) in (Union, UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from _plain(inner)
    else:
        yield annotation


def script(shell: str) -> str:
    """For one of SHELLS."""
    found = entries()
    if shell == "fish":
        return _fish(found)
    head = "#compdef sn29\n(( $+functions[compdef] )) || { autoload -U compinit && compinit }\n" if shell == "zsh" else ""
    load = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + load + _bash(found)


def _programs(found: tuple[Entry, ...]) -> set[tuple[str, ...]]:
    """Every beginning of a command that has settings: what can be written behind `sn29 config`."""
    return {entry.words[:n] for entry in found if entry.settings for n in range(1, len(entry.words) + 1)}


def _children(found: tuple[Entry, ...]) -> dict[str, list[str]]:
    """Words that go on from a beginning, by that beginning; `` is where all commands begin."""
    children: dict[str, list[str]] = {}
    for entry in found:
        for n, word in enumerate(entry.words):
            known = children.setdefault(" ".join(entry.words[:n]), [])
            known += [word] * (word not in known)
    return children


_BASH = """\
# The commands, flags and values of sn29, written by `sn29 completion`.
_sn29() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[$((COMP_CWORD - 1))]}}"
    local before="" key="" subs="" flags="" config="" word
    local words=("${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}")
    if [[ $cur == "=" ]]; then cur=""
    elif [[ $prev == "=" ]]; then prev="${{COMP_WORDS[$((COMP_CWORD - 2))]}}"
    elif [[ $cur == --*=* ]]; then prev="${{cur%%=*}}" before="${{cur%%=*}}=" cur="${{cur#*=}}"; fi
    [[ ${{words[0]}} == config ]] && config=yes words=("${{words[@]:1}}")
    for word in "${{words[@]}}"; do
        case "$key/$word" in
            {nodes}) key="$key/$word" ;;
            *) break ;;
        esac
    done
    COMPREPLY=()
    case "$key:$prev" in
        {paths}) _sn29_paths; return ;;
{values}
        {words}) return ;;
    esac
    case "$key" in
{commands}
    esac
    [[ -n $config ]] && case "$key" in
{programs}
    esac
    if [[ $cur != -* && -n $subs ]]; then COMPREPLY=($(compgen -W "$subs" -- "$cur"))
    elif [[ $cur != -* ]]; then
        case "$key" in {takes_path}) _sn29_paths; return ;; esac
    fi
    [[ $cur == -* ]] && COMPREPLY+=($(compgen -W "$flags --help" -- "$cur"))
}}
_sn29_competitions() {{
    local file
    for file in $(ls competitions 2>/dev/null); do
        # compgen -W expands its words once more: a name like $(COMMAND).yaml would be run
        case "$file" in *[!A-Za-z0-9_.-]*|hall_of_fame.yaml) ;; *.yaml) printf '%s ' "${{file%.yaml}}" ;; esac
    done
}}
_sn29_paths() {{
    local IFS=$'\\n'
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -P "$before" -f -- "$cur"))
}}
complete -F _sn29 sn29
"""


def _bash(found: tuple[Entry, ...]) -> str:
    children = _children(found)
    choices: dict[str, list[str]] = {}
    paths: list[str] = []
    words: list[str] = []
    for key, option in ((_key(entry.words), option) for entry in found for option in entry.options):
        named = [f'"{key}:{flag}"' for flag in option.flags]
        if values := option.values("$(_sn29_competitions)"):
            choices.setdefault(" ".join(values), []).extend(named)
        elif option.takes != "nothing":
            (paths if option.takes == "path" else words).extend(named)
    commands = {_key(tuple(start.split())): (subs, ["--version"] if not start else []) for start, subs in children.items()}
    for entry in found:
        flags = [flag for option in entry.options for flag in option.flags]
        subs = dict.fromkeys([*commands.get(_key(entry.words), ([], []))[0], *entry.choices])
        commands[_key(entry.words)] = ([*subs], flags)
    nodes = [f'"{_key((*start.split(), sub))}"' for start, subs in children.items() for sub in subs]
    programs = {
        _key(tuple(start.split())): [sub for sub in subs if (*start.split(), sub) in _programs(found)]
        for start, subs in children.items()
    }
    reply = 'COMPREPLY=($(compgen -P "$before" -W "{}" -- "$cur")); return'
    return _BASH.format(
        nodes="|".join(nodes),
        paths="|".join(paths),
        words="|".join(words),
        values="\n".join(f"        {'|'.join(named)}) {reply.format(shown)} ;;" for shown, named in choices.items()),
        commands="\n".join(
            f'        "{key}") subs="{" ".join(subs)}" flags="{" ".join(flags)}" ;;' for key, (subs, flags) in commands.items()
        ),
        programs="\n".join(f'        "{key}") subs="{" ".join(subs)}" ;;' for key, subs in programs.items()),
        takes_path="|".join(f'"{_key(entry.words)}"' for entry in found if entry.takes_path),
    )  # fmt: skip


def _key(words: tuple[str, ...]) -> str:
    return "".join(f"/{word}" for word in words)


_FISH = """\
# The commands, flags and values of sn29, written by `sn29 completion`.
set -g __sn29_nodes {nodes}
function __sn29_at
    set -l words (commandline -opc)
    set -e words[1]
    test "$words[1]" = config; and set -e words[1]
    set -l key
    for word in $words
        contains -- "$key/$word" $__sn29_nodes; or break
        set key "$key/$word"
    end
    test "$key" = "$argv[1]"
end
function __sn29_no_config
    set -l words (commandline -opc)
    test "$words[2]" != config
end
function __sn29_competitions
    set -l files competitions/*.yaml
    string replace -rf '^.*/([A-Za-z0-9_.-]*)[.]yaml$' '$1' -- $files | string match -v hall_of_fame
end
complete -c sn29 -f
complete -c sn29 -l help -d "what there is here"
"""


def _fish(found: tuple[Entry, ...]) -> str:
    about = {" ".join(entry.words): entry.about for entry in found}
    children = _children(found)
    nodes = [_key((*start.split(), sub)) for start, subs in children.items() for sub in subs]
    lines = [_FISH.format(nodes=" ".join(nodes))]

    def line(words: tuple[str, ...], *rest: str, also: str = "") -> None:
        lines.append(f"complete -c sn29 -n \"__sn29_at '{_key(words)}'{also}\" {' '.join(rest)}\n")

    for start, subs in children.items():
        for sub in subs:
            said = about.get(f"{start} {sub}".strip(), f"sn29 {f'{start} {sub}'.strip()} ...")
            words = tuple(start.split())
            also = "" if (*words, sub) in _programs(found) else "; and __sn29_no_config"
            line(words, "-a", sub, "-d", shlex.quote(said), also=also)
    for entry in found:
        if entry.takes_path:
            line(entry.words, "-F")
        for choice in entry.choices:
            line(entry.words, "-a", choice)
        for option in entry.options:
            takes = {"nothing": "", "word": "-x", "path": "-r -F"}[option.takes]
            offered = " ".join(option.values("(__sn29_competitions)"))
            values = f"-x -a {shlex.quote(offered)}" if offered else takes
            for flag in option.flags:
                name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                line(entry.words, name, values, "-d", shlex.quote(str(option.setting.extra["about"])))
    return "".join(lines)
