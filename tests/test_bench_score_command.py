from __future__ import annotations

import json

from sn29.cli import main


def test_the_fast_rules_and_their_plain_loops_agree(capsys):
    assert main(["bench", "score", "--models", "5", "--samples", "300", "--times", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [timed["rule"] for timed in found] == ["oldest_holder", "champion, mid-reign", "champion, first window"]
    assert all(timed["same"] and timed["seconds"] > 0 and len(timed["ratios"]) == 1 for timed in found)
    assert main(["bench", "score", "--models", "4", "--samples", "64", "--times", "1"]) == 0
    assert "times a plain loop" in capsys.readouterr().out
