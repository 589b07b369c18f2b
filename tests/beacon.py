"""A drand beacon of the tests' own, so that commit-reveal runs whole on a machine without a network.

The SDK seals weights for drand's quicknet, whose future signatures nobody here can make. `install` puts a copy of the
SDK's core first on the path in which quicknet's public key is replaced by the key of `TestBeacon`: everything else of
the SDK is as published. It must run before bittensor is imported; conftest.py sees to that, also for child processes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Container
from functools import lru_cache
from pathlib import Path

QUICKNET = (
    "83cf0f2896adee7eb8b5f01fcad3912212c437e0073e911fb90022d3e760183c8c4b450b6a0a6c3ac6a5776a2d106451"
    "0d1fec758c921cc22b0e17e63aaf4bcb5ed66304de9cf809bd274ca73bab4af5a6e9c76a4bc09e76eae8991ef5ece45a"
)
PUBLIC_KEY = (
    "b00ba682fb1c07dbac4223fd8e3bbfad5d165ecb8eaa4f28276e8e12698311f4655626dc91396359710554416646f1bc"
    "12c04eb569f30bcc69d3cb4b9660901f04ae7069b1a3cf3a1440d72ff1e6a506faece39a512136d5c412a05e062931e6"
)
"""Of the secret below, on G2, compressed, in hex. Kept, because working it out would slow down every test run."""
_SECRET = hashlib.sha256(b"sn29 beacon").digest()
_SCHEME = b"BLS_SIG_BLS12381G1_XMD:SHA-256_SSWU_RO_NUL_"


class TestBeacon:
    """Signs any round, past or future: the chain that asks knows what time it is."""

    __test__ = False

    def __init__(self, missing: Container[int] = ()) -> None:
        """missing: rounds that were never published."""
        self.missing = missing

    def signature(self, reveal_round: int) -> str | None:
        return None if reveal_round in self.missing else sign(reveal_round)


def _load_curve() -> None:
    """Imports py_ecc, which lets Python recurse 100,000 deep from then on: deeper than the stack of C, so that JSON of a stranger
    that is refused otherwise would end the process. Its own sums here need no such depth."""
    limit = sys.getrecursionlimit()
    import py_ecc  # noqa: F401

    sys.setrecursionlimit(limit)


@lru_cache(maxsize=1024)
def sign(reveal_round: int) -> str:
    """The round's signature as drand publishes it: 48 bytes in hex. Takes some 13 ms."""
    _load_curve()
    from py_ecc.bls.hash_to_curve import hash_to_G1
    from py_ecc.bls.point_compression import compress_G1
    from py_ecc.optimized_bls12_381 import multiply

    message = hashlib.sha256(reveal_round.to_bytes(8, "big")).digest()
    point = multiply(hash_to_G1(message, _SCHEME, hashlib.sha256), _secret())
    return int(compress_G1(point)).to_bytes(48, "big").hex()


def public_key() -> str:
    """`PUBLIC_KEY`, worked out."""
    _load_curve()
    from py_ecc.bls.point_compression import compress_G2
    from py_ecc.optimized_bls12_381 import G2, multiply

    return "".join(int(half).to_bytes(48, "big").hex() for half in compress_G2(multiply(G2, _secret())))


def _secret() -> int:
    from py_ecc.optimized_bls12_381 import curve_order

    return int.from_bytes(_SECRET, "big") % curve_order


def install() -> Path:
    """Makes bittensor seal for our beacon, here and in child processes; the folder that is now first on the path.

    Raises RuntimeError when it is too late, or when this core does not hold the key that is to be replaced.
    """
    if "bittensor_core" in sys.modules:
        raise RuntimeError("bittensor_core is imported already: the tests' beacon must be installed before")
    found = importlib.util.find_spec("bittensor_core")
    if found is None or found.origin is None:
        raise RuntimeError("bittensor_core is not installed: the tests' beacon needs a copy of it")
    source = Path(found.origin).parent
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sn29"
    if not source.is_relative_to(base):  # a child process finds the copy already
        source = patched_core(source, base) / source.name
    folder = str(source.parent)
    sys.path.insert(0, folder)
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != folder]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *inherited])
    importlib.invalidate_caches()
    return source.parent


def patched_core(source: Path, cache: Path) -> Path:
    """A folder with a copy of the package `source` that seals for our beacon, made once per core and key."""
    (library,) = source.glob("*.so")
    content = library.read_bytes()
    folder = cache / f"beacon-{hashlib.sha256(content + PUBLIC_KEY.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    count = content.count(QUICKNET.encode())
    if count != 1:
        raise RuntimeError(f"{library} holds quicknet's public key {count} times, not once: tests/beacon.py does not fit it")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # another process may be making the same one
        made = Path(scratch) / folder.name
        shutil.copytree(source, made / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        (made / source.name / library.name).write_bytes(content.replace(QUICKNET.encode(), PUBLIC_KEY.encode()))
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
