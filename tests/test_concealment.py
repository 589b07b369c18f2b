"""What is secret by its form, beyond what the log's tests plant."""

from __future__ import annotations

import pytest

from sn29 import concealment
from sn29.concealment import clean

KEY = "Xy7_pQ-0a1B2c3D4"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"Authorization: Bearer {KEY}, 401", "Authorization: Bearer ***, 401"),
        (f"{{'Authorization': 'Bearer {KEY}'}}", "{'Authorization': 'Bearer ***'}"),
        (f"https://node.example/v2/{KEY} refused", "https://node.example/v2/*** refused"),
        ("https://node.example/0123abcd-0123-0123-0123-0123456789ab", "https://node.example/***"),
        (f"https://node.example/v3/{'0a' * 16}/x", "https://node.example/v3/***/x"),
        ("http://me:pro'xy@proxy:8080", "http://proxy:8080"),
        ('http://me:pro"xy@proxy:8080', "http://proxy:8080"),
    ],
)
def test_a_secret_in_a_header_or_an_address_is_taken_out(said, shown):
    assert clean(said) == shown


@pytest.mark.parametrize(
    "said",
    [
        f"https://hub.example/api/models/ann/model-of-v2/revision/{'0a' * 20}",
        f"https://hub.example/ann/model/{'ab' * 32}.json",
        "http://127.0.0.1:2939/miner/5F3sa2TJAWMqDhXG6jhV4N8ko9SxwGy8TpaNS1repo5EYjQX",
        "the bearer of this news",
        '{"url":"https://a.example","to":"b@c"}',
    ],
)
def test_an_address_without_a_secret_stays_whole(said):
    assert clean(said) == said


def test_the_password_of_one_wallet_is_a_secret(monkeypatch):
    """Bittensor 11 reads it from a variable that is named by the wallet's path."""
    name = "BT_PW__HOME_ME__BITTENSOR_WALLETS_DEFAULT_HOTKEYS_DEFAULT"
    monkeypatch.setenv(name, "Zm9vYmFyYmF6")
    concealment.conceal_environment()
    try:
        assert clean("with Zm9vYmFyYmF6") == f"with ${name}"
    finally:
        concealment.reveal("Zm9vYmFyYmF6")
