"""The folder of downloaded models: how much it may hold, and what is deleted first when another needs the place.

NAME        a whole model; NAME is its content id
NAME.part   one that is being fetched, or was: what came is kept (see `fetch`)
NAME.used   locked by whoever uses the model, also from another process; its time is when that was last
NAME.gone   on its way out: a model is renamed before it is deleted, so that NAME is whole or not there
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sn29.errors import Unavailable
from sn29.models.fetch import SPARE_DISK_BYTES

_KINDS = (".part", ".used", ".gone")


@dataclass(frozen=True, slots=True)
class Held:
    """What the folder holds of one model."""

    name: str
    num_bytes: int
    is_whole: bool
    used_at: float
    """When it was last needed, by this machine's clock: it decides what is fetched again, never a number."""


class Disk:
    """Keeps one folder of models within its bounds. Raises OSError where the disk itself fails."""

    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int | None = None,
        spare_bytes: int = SPARE_DISK_BYTES,
        say: Callable[[str, str], None] = lambda event, sentence: None,
    ) -> None:
        """`budget_bytes` is what the folder may hold, `spare_bytes` what must stay free on its disk whatever it holds."""
        self.folder, self._budget, self._spare, self._say = folder, budget_bytes, spare_bytes, say

    @contextmanager
    def using(self, name: str) -> Iterator[Path]:
        """The model's folder, there or not yet, which nobody deletes until the block is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(name, fcntl.LOCK_SH) as mark:
            try:
                yield self.folder / name
            finally:
                os.utime(mark.name)

    def make_room(self, num_bytes: int, paid: Collection[str] = ()) -> tuple[str, ...]:
        """Delete what is least useful until so many bytes may be written; the names of what was deleted.

        Halves of models go first, then whole ones that earn nothing, then those named in `paid`; among equals the one
        that was needed longest ago. What is in use stays. Raises Unavailable, and has deleted nothing then, when that
        is not enough.
        """
        short = self._short_of(num_bytes)
        if short <= 0:
            return ()
        free = [held for held in self.held() if not self._is_used(held.name)]
        missing = short - sum(held.num_bytes for held in free)
        if missing > 0:
            why = f"{num_bytes:,} bytes of disk are needed, {missing:,} more than there are without all models not in use"
            raise Unavailable("disk", why)
        deleted = []
        for held in sorted(free, key=lambda held: (held.is_whole, held.name in paid, held.used_at, held.name)):
            if self._short_of(num_bytes) <= 0:
                break
            if self._delete(held.name):
                deleted.append(held.name)
                self._say("deleted", f"model {held.name} of {held.num_bytes:,} bytes, to make room")
        if self._short_of(num_bytes) > 0:  # somebody began to use one of them meanwhile
            raise Unavailable("disk", f"{num_bytes:,} bytes of disk are needed, and too much is in use")
        return tuple(deleted)

    def keep_only(self, wanted: Collection[str]) -> tuple[str, ...]:
        """Delete every model that is not wanted and not in use, and what a kill left behind; the names of the models."""
        for gone in self.folder.glob("*.gone"):
            shutil.rmtree(gone)
        unwanted = [held for held in self.held() if held.name not in wanted and self._delete(held.name)]
        return tuple(held.name for held in unwanted if held.num_bytes)

    def held(self) -> tuple[Held, ...]:
        """What the folder holds, by name."""
        names = {_model(path) for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return tuple(self._look(name) for name in sorted(names))

    def _look(self, name: str) -> Held:
        whole, part, mark = (self.folder / f"{name}{kind}" for kind in ("", ".part", ".used"))
        used_at = max(path.stat().st_mtime if path.exists() else 0.0 for path in (whole, mark))
        return Held(name, _bytes_in(whole) + _bytes_in(part), whole.is_dir(), used_at)

    def _short_of(self, num_bytes: int) -> int:
        """How many bytes must go before so many may come."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free - self._spare
        if self._budget is not None:
            free = min(free, self._budget - _bytes_in(self.folder))
        return num_bytes - free

    def _is_used(self, name: str) -> bool:
        try:
            with self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except BlockingIOError:
            return True

    def _delete(self, name: str) -> bool:
        """False when it is in use."""
        try:
            with self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB) as mark:
                for path in (self.folder / name, self.folder / f"{name}.part"):
                    gone = self.folder / f"{name}.gone"
                    if gone.exists():
                        shutil.rmtree(gone)
                    if path.exists():
                        path.rename(gone)
                        shutil.rmtree(gone)
                os.unlink(mark.name)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _locked(self, name: str, how: int) -> Iterator[BinaryIO]:
        """The model's mark, locked. Raises BlockingIOError when `how` does not wait and another holds it."""
        path = self.folder / f"{name}.used"
        while True:
            with path.open("ab") as mark:
                fcntl.flock(mark, how)
                if _is_at(path, mark):
                    yield mark
                    return
            # the model was deleted, and its mark with it, while we waited: again with a new one


def _model(path: Path) -> str:
    return path.stem if path.suffix in _KINDS else path.name


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _bytes_in(folder: Path) -> int:
    """0 for one that is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
