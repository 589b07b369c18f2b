from __future__ import annotations

import json

import pytest

from sn29.bench_start_command import bench_start
from sn29.errors import Rejected


def test_a_models_start_is_timed(capsys):
    status = bench_start(["--model", "tiny", "--times", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status in (0, 1)  # a time is no test
    assert found["weights_bytes"] > 100_000
    assert 0 < found["reading_s"][0] < found["imports_s"][0]
    assert len(found["first_loss_s"]) == 1


def test_an_unknown_model_is_refused():
    with pytest.raises(Rejected):
        bench_start(["--model", "huge"])
