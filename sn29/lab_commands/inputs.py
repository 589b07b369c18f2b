"""What the lab's commands read, and how they show that they are at work."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sn29.errors import Reason, Rejected

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sn29.corpus import TextSource
    from sn29.models.tokenizer import Tokenizer

_AT_ONCE = 256
"""Documents that are tokenised together."""
_BETWEEN_LINES_S = 30.0
_LINKED: list[tempfile.TemporaryDirectory[str]] = []
"""Folders of links that live as long as the process."""


# --- models -----------------------------------------------------------------------------------------------------------


def model_folder(text: str, hub_endpoint: str, work_dir: Path) -> tuple[Path, str]:
    """A model's folder, and what a card calls it: the folder's own name, or NAMESPACE/NAME@REVISION.

    From the Hub it is inspected and then fetched into `work_dir/starts/REVISION`, every file checked; a branch stands for
    what it points to now. Files that are no part of a model (a chat template, weights in other formats) are passed over.
    Raises Rejected(SETTING) for what is neither, what the Hub says no with, Unavailable.
    """
    from neurons.training import fetched_model
    from sn29.hub import Hub

    folder = local_path(text)
    if folder.is_dir():
        return _model_files(folder), folder.resolve().name
    found, name = fetched_model(text, Hub(hub_endpoint), work_dir, "MODEL", tidy=True)
    return _model_files(found), name


def local_path(text: str, flag: str = "MODEL") -> Path:
    """With ~ written out. Raises Rejected(SETTING) for a home of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise Rejected(Reason.SETTING, text, "a home that there is", flag) from None


def config_bytes(
    text: str, hub_endpoint: str, limit: str = "a config.json or a folder that exists, or NAMESPACE/NAME@REVISION"
) -> tuple[bytes, str]:
    """The config.json of a file, a folder or a repository, and a name. Nothing else is read.

    Raises Rejected(SETTING) for what is none of them, Rejected(BAD_CONFIG) for a file that is too long, what the Hub says no
    with, Unavailable.
    """
    from sn29.models.config import MAX_CONFIG_BYTES

    path = local_path(text)
    if path.is_dir() or path.is_file():
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise Rejected(Reason.SETTING, f"{path} without config.json", "a folder with one", "MODEL")
        name = path.resolve().name if path.is_dir() else path.resolve().parent.name or path.name
        try:
            data = file.read_bytes()
        except OSError as error:
            raise Rejected(Reason.SETTING, f"{file}: {error.strerror}", "a file that can be read", "MODEL") from None
    else:
        data, name = _config_of_hub(text, hub_endpoint, limit)
    if len(data) > MAX_CONFIG_BYTES:
        raise Rejected(
            Reason.BAD_CONFIG, f"more than {MAX_CONFIG_BYTES} bytes", f"{MAX_CONFIG_BYTES} bytes", f"{name}: config.json"
        )
    return data, name


def _config_of_hub(text: str, hub_endpoint: str, limit: str) -> tuple[bytes, str]:
    from sn29.hub import Hub
    from sn29.models.config import MAX_CONFIG_BYTES
    from sn29.records import ModelId

    repo, at, revision = text.rpartition("@")
    if not at:
        raise Rejected(Reason.SETTING, text, limit, "MODEL")
    hub = Hub(hub_endpoint)
    if not re.fullmatch("[0-9a-f]{40}", revision):
        revision = hub.resolve(repo, ref=revision)
    model = ModelId.parse(f"{repo}@{revision}")
    return hub.read(model, "config.json", length=MAX_CONFIG_BYTES + 1), str(model)


def _model_files(folder: Path) -> Path:
    """The folder, or links to the files of it that a model may consist of."""
    from sn29.models.checkpoint import is_allowed

    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if all(path.is_file() and is_allowed(path.name) for path in found):
        return folder
    _LINKED.append(tempfile.TemporaryDirectory(prefix="sn29-model-"))
    links = Path(_LINKED[-1].name)
    for path in found:
        if path.is_file() and is_allowed(path.name):
            (links / path.name).symlink_to(path.resolve())
    return links


def tokenizer_of(folder: Path, given: Path | None = None) -> Tokenizer:
    """The given tokenizer.json, else the one beside the model. Raises Rejected(SETTING | TOKENIZER)."""
    from sn29.models.tokenizer import Tokenizer

    path = given or folder / "tokenizer.json"
    if not path.is_file():
        got = f"no file {given}" if given else "no tokenizer.json beside the model"
        raise Rejected(Reason.SETTING, got, "a tokenizer.json", "--tokenizer")
    return Tokenizer.load(path)


# --- text -------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class OpenText:
    """A source of documents that has been found."""

    name: str
    """For a card: what was asked for, with the revision or hash of its files."""
    source: TextSource


def open_text(source: str, hub_endpoint: str, flag: str = "--text") -> OpenText:
    """`source` as `sn29 data stats` reads it; empty: the 14M characters of packages of `sn29 study packing`.

    Raises Rejected(SETTING), Unavailable.
    """
    from neurons.training import parse_source
    from sn29.corpus import LocalFolder, TextSource
    from sn29.hub import Hub

    if source:
        found = parse_source(source, Hub(hub_endpoint), flag)
        asked = source.removeprefix("hub:").partition("@")[0] if source.startswith("hub:") else Path(source).name
    else:
        from sn29.localnet import text
        from sn29.settings import default_cache

        folder = text.build(default_cache(), lambda what: print(f"  {what}", file=sys.stderr)).dataset
        found, asked = TextSource(LocalFolder(folder), "data/eval-*.parquet", "text"), "packages"
    return OpenText(f"{asked}@{found.data.revision[:16]}", found)


def some_texts(opened: OpenText, count: int, seed: int) -> Iterator[str]:
    """`count` documents that stand for all of a source (0: all of them), in an order that depends on the seed alone.

    Raises as `corpus.spread`.
    """
    from sn29.corpus import one_pass, spread

    return islice(spread(opened.source, seed), count) if count else one_pass(opened.source, seed)


def documents(
    source: str | OpenText,
    hub_endpoint: str,
    tokenizer: Tokenizer,
    count: int,
    max_tokens: int = 0,
    *,
    seed: int = 29,
) -> list[Document]:
    """`some_texts` as text and token ids.

    `max_tokens` > 0: ids (not the text) are cut there. A text that came before, and one without a token, is left out.
    Raises Rejected(DATASET) for a source without documents, as `open_text` and `some_texts`.
    """
    opened = open_text(source, hub_endpoint) if isinstance(source, str) else source
    texts = iter(dict.fromkeys(some_texts(opened, count, seed)))
    found: list[Document] = []
    with progress(f"reading {opened.name}") as report:
        while batch := list(islice(texts, _AT_ONCE)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if ids:
                    found.append(Document(text, list(ids[: max_tokens or None])))
            report(len(found), count)
    if not found:
        raise Rejected(Reason.DATASET, "no document", "at least one", opened.name)
    return found


# --- the command line -------------------------------------------------------------------------------------------------


def command_line(name: str, words: Sequence[str]) -> str:
    """As it was typed, for a model card: `sn29 lab grow MODEL --layers 40`."""
    return shlex.join(["sn29", *name.split(), *words])


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """`stages` with one stage."""
    with stages() as say:
        yield say(what)


@contextmanager
def stages() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """One bar on standard error while the block runs: say(what begins) gives report(done, of), which moves it (of 0: not known).

    Where that is no terminal: a line for each beginning, and every half minute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield _lines
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def say(what: str) -> Callable[[int, int], None]:
            shown.update(task, description=what, completed=0, total=None)
            return lambda done, of: shown.update(task, completed=done, total=of or None)

        yield say


def _lines(what: str) -> Callable[[int, int], None]:
    print(f"  {what}", file=sys.stderr)
    told = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _BETWEEN_LINES_S:
            told = time.monotonic()
            print(f"  {what}: {done:,}{f' of {of:,}' if of else ''}", file=sys.stderr)

    return report


def new_table(*names: str) -> Table:
    """A table for people, the first column left, the others right. Too narrow a console gets more lines: no number is cut."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, show_header=any(names))
    for number, name in enumerate(names):
        found.add_column(name, justify="right" if number else "left", overflow="fold")
    return found


def say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def check_place(path: Path, flag: str = "--picture") -> None:
    """Before long work, whether `write_picture` can write there. Raises Rejected(SETTING)."""
    why = "" if path.name and not path.is_dir() else "a folder"
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        why = error.strerror or type(error).__name__
    if why:
        raise Rejected(Reason.SETTING, f"{path}: {why}", "a file that can be written", flag)


def write_picture(path: Path, text: str, flag: str = "--picture") -> None:
    """A file whole or not at all. Raises Rejected(SETTING) for a place that cannot be written."""
    limit = "a file that can be written"
    if not path.name:
        raise Rejected(Reason.SETTING, path, limit, flag)
    new = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")  # a name of its own: nothing that is there is touched
    try:
        with new.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise Rejected(Reason.SETTING, f"{path}: {error.strerror}", limit, flag) from None
    finally:
        with suppress(OSError):
            new.unlink()
