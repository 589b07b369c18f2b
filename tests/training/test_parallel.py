"""Two processes of torchrun against one: the same curve, the same weights, and each goes on where the other was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SHAPE, Pieces, ignore, losses
from two_processes import CASES, HALF

from sn29.models import checkpoint
from sn29.training.optimizers import KINDS, is_installed
from sn29.training.parallel import World, threads_of
from sn29.training.trainer import train

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the runs of two processes, after those of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parallel")
    for name, recipe in CASES.items():
        if is_installed(KINDS[recipe.optimizer]):
            train(folder / "one" / name, SHAPE, Pieces, recipe, ignore)
    train(folder / "two" / "from-one", SHAPE, Pieces, CASES["adamw"], ignore, until=HALF)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(HERE / "two_processes.py"), str(folder / "two")], env=environment, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    torch.set_num_threads(threads)


# Muon makes its steps orthogonal in bfloat16, in which parts that are added in another order differ more.
NEAR = {"muon": 1e-4}
RUN = [
    pytest.param(
        name, marks=pytest.mark.skipif(not is_installed(KINDS[recipe.optimizer]), reason=f"{recipe.optimizer}: sn29[optim]")
    )
    for name, recipe in CASES.items()
]


@pytest.mark.parametrize("name", RUN)
def test_two_processes_do_what_one_does(ran, name):
    assert losses(ran / "two" / name) == pytest.approx(losses(ran / "one" / name), rel=NEAR.get(name, 1e-5))
    one, two = (checkpoint.load(ran / n / name / "checkpoint", dtype=torch.float32).state_dict() for n in ("one", "two"))
    far = max(float((one[key] - two[key]).norm() / one[key].norm()) for key in one)
    assert far < 100 * NEAR.get(name, 1e-5)


@pytest.mark.parametrize("name", RUN)
def test_one_process_goes_on_where_two_were(ran, name):
    half = ran / "two" / f"{name}-half"
    assert len(losses(half)) == HALF
    train(half, SHAPE, Pieces, CASES[name], ignore)
    assert losses(half) == pytest.approx(losses(ran / "one" / name), rel=NEAR.get(name, 1e-5))


def test_two_processes_go_on_where_one_was(ran):
    found = losses(ran / "two" / "from-one")
    assert found[:HALF] == losses(ran / "one" / "adamw")[:HALF], "the one's own steps"
    assert found == pytest.approx(losses(ran / "one" / "adamw"), rel=1e-5)
    assert (ran / "two" / "mapped").read_text() == "{False}", "a file that another host replaces must not be in use any more"


def test_what_one_process_cannot_do_all_refuse(ran):
    """And nobody waits for a process that has ended."""
    for name, said in [("apart", "a run of 0 and of 12 steps"), ("broken", "its disk is gone")]:
        first, second = ((ran / "two" / f"{name}-{rank}").read_text() for rank in (0, 1))
        assert said in first
        assert first.replace("from-one", "elsewhere") == second


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads_of(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert [threads_of(8), threads_of(2)] == [2, 1]


def test_shards_are_dealt_to_processes():
    assert [World(rank, 2).shards(6) for rank in (0, 1)] == [(0, 2, 4), (1, 3, 5)]
    assert World().summed([1.5, 2]) == [1.5, 2]
    assert World().gathered("x") == ["x"]
