from __future__ import annotations

import pickle

import pytest

from sn29.errors import Reason, Rejected, Sn29Error, Unavailable, reasons_table


def test_every_reason_has_a_sentence_and_something_to_do():
    for reason in Reason:
        assert reason.code == reason.name.lower()
        for text in (reason.sentence, reason.advice):
            assert len(text) > 5
            assert not text.endswith(".")
            assert "|" not in text, "it stands in a table"
    assert len({reason.sentence for reason in Reason}) == len(Reason), "a sentence twice would make one reason of two"


def test_the_table_has_a_row_for_each():
    rows = reasons_table().splitlines()
    assert len(rows) == 2 + len(Reason)
    assert all(row.startswith(f"| `{reason.code}` | ") for row, reason in zip(rows[2:], Reason, strict=True))


@pytest.mark.parametrize("error", [Unavailable("text", "gone", 3.0), Rejected(Reason.SETTING, 1, 2, "here")], ids=str)
def test_a_failure_is_the_same_in_another_process(error: Sn29Error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
