from __future__ import annotations

import pytest

from sn29.errors import Reason, Rejected, Unavailable
from sn29.records import Commitment, ModelId, Sealed

GOOD = Commitment("5Alice", 7, ModelId("alice", "my-model_1.5", "0123456789abcdef" * 2 + "01234567"), "A" * 43 + "=", "c00")


def test_a_commitment_survives_the_chain():
    data = GOOD.encode()
    assert data == b"alice:my-model_1.5:0123456789abcdef0123456789abcdef01234567:" + b"A" * 43 + b"=:c00"
    assert Commitment.parse("5Alice", 7, data) == GOOD


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\xff\xfe\x00",
        GOOD.encode() + b":more",
        GOOD.encode().replace(b"alice", b"../.."),
        GOOD.encode().replace(b"c00", b""),
        GOOD.encode().replace(b"0123456789abcdef", b"0123456789ABCDEF"),
        GOOD.encode().replace(b"=:", b":"),
        GOOD.encode() + b"\n",
        b"a" * 200,
        "名:名:".encode() + GOOD.encode()[20:],
    ],
)
def test_whatever_else_stands_on_chain_is_one_refusal_that_can_be_printed(data):
    with pytest.raises(Rejected) as refused:
        Commitment.parse("5Alice", 7, data)
    assert refused.value.reason is Reason.MALFORMED_COMMITMENT
    assert str(refused.value).isprintable()


def test_a_seal_survives_the_chain_and_is_nothing_else():
    seal = Sealed("5Alice", 7, GOOD.digest, "c00")
    data = seal.encode()
    assert data == b"sealed:" + b"A" * 43 + b"=:c00"
    assert Sealed.parse("5Alice", 7, data) == seal
    with pytest.raises(Rejected):
        Commitment.parse("5Alice", 7, data)
    for other in (b"", b"\xff", data + b"\n", data[:-1] + b"\xff", data + b":more", GOOD.encode(), data.replace(b"=", b"")):
        assert Sealed.parse("5Alice", 7, other) is None
    with pytest.raises(Rejected):
        Sealed("5Alice", 7, GOOD.digest, "a name that is too long").encode()


def test_a_name_that_does_not_fit_is_refused_before_it_is_committed():
    fits = ModelId("a" * 17, "b" * 20, "0" * 40)
    assert len(Commitment("h", 0, fits, GOOD.digest, "c00").encode()) == 128
    with pytest.raises(Rejected, match="129 bytes"):
        Commitment("h", 0, ModelId("a" * 17, "b" * 21, "0" * 40), GOOD.digest, "c00").encode()


def test_model_ids():
    text = "alice/model@" + "a" * 40
    assert str(ModelId.parse(text)) == text
    for wrong in ("alice/model", "alice@" + "a" * 40, "alice/model@main", "alice/../x@" + "a" * 40, "/model@" + "a" * 40):
        with pytest.raises(Rejected):
            ModelId.parse(wrong)


def test_every_reason_says_what_is_wrong_and_what_to_do():
    for reason in Reason:
        assert reason.code == reason.name.lower()
        assert len(reason.sentence) > 10
        assert len(reason.advice) > 5
    error = Rejected(Reason.PARAMETERS, "7,000", "at most 6,900", "c00: limits.parameters")
    assert "7,000" in str(error)
    assert "6,900" in str(error)
    assert "limits.parameters" in str(error)
    assert Unavailable("hub", "HTTP 503", retry_s=7).retry_s == 7
