"""`sn29 ...`: parses before it imports anything heavy, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

from sn29 import __version__
from sn29.command_table import COMMANDS, GROUPS, Command
from sn29.concealment import clean, guard
from sn29.errors import Rejected, Sn29Error, nearest

_HEAD = f"sn29 {__version__}: node software of Bittensor subnet 29"
_TAIL = """\
SETTINGS
  Every flag is a variable too (--state.dir is SN29_STATE_DIR; --help names it in brackets), and a key of sn29.yaml:
  flag > environment > .env > sn29.yaml > default. `sn29 config PROGRAM` shows what is in force and where it comes from.

EXIT STATUS
  0  done          1  refused, or not available: a line on standard error says what, with both values
  2  wrong usage: an unknown command or flag, or a value that is missing or not allowed
  130  stopped by Ctrl-C          commands that say otherwise say so in their --help (validator and miner: 0)

  sn29 COMMAND --help   the flags of a command
  sn29 lab --help       the commands of a group of words
  sn29 --version"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or unavailable (one line on standard error says what), 2 wrong usage."""
    words = sys.argv[1:] if arguments is None else arguments
    for name, command in COMMANDS.items():
        if words[: len(name)] == list(name):
            return _guarded(name, command, words[len(name) :])
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    if words[:1] == ["help"]:
        return main([*words[1:], "--help"])
    asked = [word for word in words if word not in ("--help", "-h")]
    shown = usage(asked)
    if shown and (not asked or asked != words):
        print(shown)
        return 0
    print(f"{shown}\nsn29: {' '.join(asked)} needs one of these" if shown else _unknown(asked), file=sys.stderr)
    return 2


def _unknown(words: list[str]) -> str:
    """One line: no such command, the nearest one, and where all of them stand."""
    names = {name[:n] for name in COMMANDS for n in range(1, len(name) + 1)}
    group = next((words[:n] for n in range(len(words), -1, -1) if not n or tuple(words[:n]) in names), [])
    behind = len(group)
    inside = sorted(" ".join(name[behind:]) for name in names if [*name[:behind]] == group and len(name) > behind)
    near = nearest(" ".join(words[behind : behind + 2]), inside) or nearest(words[behind], inside)
    meant = f" did you mean {' '.join([*group, near])!r}?" if near else ""
    where = " ".join(["sn29", *group, "--help"])
    return f"sn29: no command {' '.join(words[: behind + 1])!r};{meant} `{where}` lists all there are"


def usage(words: list[str]) -> str:
    """What there is; behind `sn29 lab`, the lines of that group of words alone. Empty: no such group."""
    if words:
        return "\n".join(_line(name, one) for name, one in COMMANDS.items() if name[: len(words)] == tuple(words))
    parts = [_HEAD]
    for group, title in GROUPS.items():
        lines = [_line(name, command) for name, command in COMMANDS.items() if command.group == group]
        parts.append("\n".join([title.upper(), *lines]))
    return "\n\n".join([*parts, _TAIL])


def _line(name: tuple[str, ...], command: Command) -> str:
    shown = " ".join(["sn29", *name, *([command.takes] if command.takes else [])])
    return f"  {shown:<32} {command.about}"


def _guarded(name: tuple[str, ...], command: Command, words: list[str]) -> int:
    guard()
    try:
        return _function(name, command)(words)
    except Sn29Error as error:
        program = f"sn29 {' '.join(name)}: "
        print(program + clean(error).removeprefix(program), file=sys.stderr)
        if isinstance(error, Rejected):
            print(f"  what to do: {clean(error.advice)}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # whoever reads (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"sn29 {' '.join(name)}: stopped", file=sys.stderr)
        return 130


def _function(name: tuple[str, ...], command: Command) -> Callable[[list[str]], int]:
    """What carries it out. What its libraries read from the environment is set before they are imported."""
    if name == ("bench", "score"):
        for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = "1"  # one core; before numpy is imported
    if name[0] == "lab":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own: the lab's commands show theirs
    module, _, function = command.place.partition(":")
    found: Callable[[list[str]], int] = getattr(import_module(module), function)
    return found


if __name__ == "__main__":
    sys.exit(main())
