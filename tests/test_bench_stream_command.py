from __future__ import annotations

import json

import pytest

from sn29.bench_stream_command import bench_stream
from sn29.errors import Rejected


def test_a_streamed_model_is_timed_and_gives_the_resident_losses(capsys):
    status = bench_stream(["--model", "tiny", "--times", "2", "--dtype", "float32", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is True
    assert status in (0, 1)  # a speed is no test
    assert len(found["disk"]) == len(found["streamed"]) == 2
    bench_stream(["--model", "tiny", "--times", "1"])
    assert "to the bit" in capsys.readouterr().out


def test_an_unknown_model_is_refused():
    with pytest.raises(Rejected):
        bench_stream(["--model", "huge"])
