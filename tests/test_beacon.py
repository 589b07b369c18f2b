"""The tests' own beacon: its key, and the copy of the SDK's core that seals for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import beacon
import bittensor_core
import pytest


def test_the_kept_public_key_is_the_secret_s() -> None:
    assert beacon.public_key() == beacon.PUBLIC_KEY != beacon.QUICKNET


def test_what_the_sdk_seals_opens_with_our_signature_of_the_round_only() -> None:
    sealed, reveal_round = bittensor_core.encrypt_at_round(b"not yet", 1000)
    assert reveal_round == 1000
    assert bytes(bittensor_core.decrypt_with_signature(sealed, beacon.sign(1000))) == b"not yet"
    with pytest.raises(ValueError, match="decrypt"):
        bittensor_core.decrypt_with_signature(sealed, beacon.sign(1001))
    assert beacon.TestBeacon(missing={1000}).signature(1000) is None


def test_child_processes_seal_for_our_beacon_too() -> None:
    script = "import bittensor_core; print(bytes(bittensor_core.encrypt_at_round(b'child', 1000)[0]).hex())"
    sealed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert bytes(bittensor_core.decrypt_with_signature(bytes.fromhex(sealed), beacon.sign(1000))) == b"child"


def test_a_core_without_quicknet_s_key_is_named_and_one_that_is_imported_is_too_late(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "core.abi3.so").write_bytes(b"another version")
    with pytest.raises(RuntimeError, match="0 times, not once"):
        beacon.patched_core(tmp_path / "core", tmp_path / "cache")
    (tmp_path / "core" / "core.abi3.so").write_bytes(b"<" + beacon.QUICKNET.encode() + b">")
    for _ in range(2):
        made = beacon.patched_core(tmp_path / "core", tmp_path / "cache")
        assert (made / "core" / "core.abi3.so").read_bytes() == b"<" + beacon.PUBLIC_KEY.encode() + b">"
    with pytest.raises(RuntimeError, match="imported already"):
        beacon.install()
