"""Which models stay on the disk: real folders, real locks, a user that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sn29
from sn29.errors import Unavailable
from sn29.models.disk import Disk

MODEL = 1000


def _put(folder: Path, name: str, used_at: float, num_bytes: int = MODEL) -> None:
    """A model of that size, last used then."""
    (folder / name).mkdir(parents=True)
    (folder / name / "model.safetensors").write_bytes(b"x" * num_bytes)
    with Disk(folder).using(name.removesuffix(".part")):
        pass
    os.utime(folder / f"{name.removesuffix('.part')}.used", (used_at, used_at))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """a, b, c, d, used in this order, and half of e, used last."""
    folder = tmp_path / "models"
    for at, name in enumerate(("a", "b", "c", "d", "e.part")):
        _put(folder, name, 1_700_000_000.0 + at)
    return folder


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_least_useful_goes_first(models: Path) -> None:
    said: list[str] = []
    disk = Disk(models, budget_bytes=5 * MODEL, say=lambda event, sentence: said.append(sentence))
    paid = {"a", "c"}
    assert disk.make_room(0, paid) == ()
    assert disk.make_room(MODEL, paid) == ("e",), "half a model first"
    assert disk.make_room(MODEL, paid) == (), "there is room already"
    assert disk.make_room(MODEL + 1, paid) == ("b",), "then the unpaid one that was needed longest ago"
    assert disk.make_room(4 * MODEL, paid) == ("d", "a"), "then the other unpaid one; the paid ones last, by age"
    assert _names(models) == {"c"}
    assert len(said) == 4
    assert "1,000 bytes" in said[0]


def test_model_in_use_stays_whoever_uses_it(models: Path) -> None:
    disk = Disk(models, budget_bytes=5 * MODEL)
    with disk.using("a") as folder:
        assert folder == models / "a"
        with pytest.raises(Unavailable, match="1,000 more than there are"):
            disk.make_room(5 * MODEL)
        assert _names(models) == {"a", "b", "c", "d", "e.part"}, "what would not be enough is not deleted"
        assert disk.make_room(4 * MODEL) == ("e", "b", "c", "d")
        assert disk.keep_only(()) == ()
    assert disk.keep_only(()) == ("a",)
    assert list(models.iterdir()) == []


def test_being_used_makes_a_model_young(models: Path) -> None:
    disk = Disk(models, budget_bytes=5 * MODEL)
    with disk.using("a"):
        pass
    assert disk.make_room(2 * MODEL) == ("e", "b")


def test_model_of_a_killed_process_is_free_again(models: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sn29.models.disk import Disk\n"
        "with Disk(Path(sys.argv[1])).using('a'): print('held', flush=True); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sn29.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", program, str(models)], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert "a" not in Disk(models).keep_only(())
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert Disk(models).keep_only(()) == ("a",)


def test_what_nobody_wants_and_what_a_kill_left_is_swept(models: Path) -> None:
    (models / "f.gone").mkdir()
    (models / "f.gone" / "model.safetensors").write_bytes(b"x")
    assert Disk(models).keep_only({"a", "e"}) == ("b", "c", "d")
    assert _names(models) == {"a", "e.part"}
    assert Disk(models / "none").keep_only(()) == ()


def test_room_on_the_disk_itself_counts(models: Path) -> None:
    free = shutil.disk_usage(models).free
    with pytest.raises(Unavailable):
        Disk(models, spare_bytes=free).make_room(1 << 40)
    assert len(_names(models)) == 5
