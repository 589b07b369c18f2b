"""The runtime metadata of a real chain: V15 of subtensor's local network at spec 461, out of the SDK's own source package.

`metadata()` is it with the one storage item added that spec 474 brought and that the SDK's SetWeights reads. What is
spliced in is SCALE, by hand: the metadata is one byte string whose parts name no lengths, so an item goes right behind
the count that it raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

from sn29.errors import Reason, Rejected, Unavailable

_PACKAGE, _VERSION = "bittensor", "11.3.0"
_SHA256 = "8ce05029a712866048c6cf3e3d5df1592ac896175f5b4227f63044b7e7b7edb3"
_MEMBER = f"{_PACKAGE}-{_VERSION}/tests/fixtures/golden.json"
_PIP_TIMEOUT_S = 600.0


def metadata(cache: Path, block_seconds: float, without: Collection[str] = ()) -> bytes:
    """`MetadataVersioned` bytes: b"meta", the version 15 and the body.

    block_seconds: what the constant Aura.SlotDuration says.
    without: storage items ("Pallet.Name") that this runtime does not have.
    """
    raw = _with_slot_duration(_fetched(cache).read_bytes(), round(block_seconds * 1000))
    if "SubtensorModule.SubnetEpochConsensus" not in without:
        raw = _with_epoch_consensus(raw)
    for item in without:
        if item != "SubtensorModule.SubnetEpochConsensus":
            raw = _without(raw, *item.split("."))
    return raw


def _fetched(cache: Path) -> Path:
    """The file with the metadata, got by pip once for each user. Raises Unavailable, or Rejected(CORRUPT)."""
    target = cache / f"metadata-v15-{_VERSION}-{_SHA256[:16]}.bin"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            with tarfile.open(_download(Path(scratch))) as archive:
                golden = json.load(archive.extractfile(_MEMBER))  # type: ignore[arg-type]
            part = Path(scratch) / "part"
            part.write_bytes(_stripped(bytes.fromhex(golden["metadata"]["v15_hex"][2:])))
            os.replace(part, target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--no-binary", _PACKAGE, "--dest", str(folder), f"{_PACKAGE}=={_VERSION}"]
    what = f"the source of {_PACKAGE} {_VERSION} from the Python package index"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(what, f"pip was not done after {_PIP_TIMEOUT_S:.0f} s") from None
    archive = folder / f"{_PACKAGE}-{_VERSION}.tar.gz"
    if done.returncode or not archive.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise Unavailable(what, said[-1] if said else f"pip ended with {done.returncode}")
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != _SHA256:
        raise Rejected(Reason.CORRUPT, f"sha256 {got}", f"sha256 {_SHA256}", archive.name)
    return archive


def compact(number: int) -> bytes:
    """A SCALE compact integer below 2**30."""
    if number < 1 << 6:
        return bytes([number << 2])
    if number < 1 << 14:
        return (number << 2 | 1).to_bytes(2, "little")
    return (number << 2 | 2).to_bytes(4, "little")


def read_compact(data: bytes, at: int) -> tuple[int, int]:
    """(the integer, where it ends); below 2**30 only."""
    size = {0: 1, 1: 2, 2: 4}[data[at] & 3]
    return int.from_bytes(data[at : at + size], "little") >> 2, at + size


def _text(value: str) -> bytes:
    return compact(len(value)) + value.encode()


def _stripped(answer: bytes) -> bytes:
    """The metadata in the runtime's answer, an Option of a byte vector."""
    size, start = read_compact(answer, 1)
    return answer[start : start + size]


def wrapped(raw: bytes) -> bytes:
    """The reverse of `_stripped`: what the runtime call Metadata_metadata_at_version answers."""
    return b"\x01" + compact(len(raw)) + raw


def _with_epoch_consensus(raw: bytes) -> bytes:
    """With SubtensorModule.SubnetEpochConsensus: netuid -> the enum EpochConsensus (Yuma, Null), Yuma where not stored."""
    types, types_start = read_compact(raw, 5)
    # The registry of types ends where the pallets' count stands, right before the first pallet.
    types_end = raw.index(_text("System") + b"\x01" + _text("System")) - 1
    variants = b"".join(_text(name) + compact(0) + bytes([index]) + compact(0) for index, name in enumerate(("Yuma", "Null")))
    path = compact(2) + _text("pallet_subtensor") + _text("EpochConsensus")
    added = compact(types) + path + compact(0) + b"\x01" + compact(2) + variants + compact(0)

    pallet = _text("SubtensorModule") + b"\x01" + _text("SubtensorModule")
    items_at = raw.index(pallet) + len(pallet)
    items, items_start = read_compact(raw, items_at)
    netuid_type = _key_type(raw, items_start, "Tempo")
    identity = b"\x06"
    kind = b"\x01" + compact(1) + identity + compact(netuid_type) + compact(types)
    entry = _text("SubnetEpochConsensus") + b"\x01" + kind + compact(1) + b"\x00" + compact(0)

    head = raw[:5] + compact(types + 1) + raw[types_start:types_end] + added
    return head + raw[types_end:items_at] + compact(items + 1) + entry + raw[items_start:]


def _with_slot_duration(raw: bytes, milliseconds: int) -> bytes:
    """The constant's value are the eight bytes behind its name and its type."""
    name = _text("Aura") + b"\x01" + _text("Aura")
    at = raw.index(_text("SlotDuration"), raw.index(name)) + len(_text("SlotDuration"))
    size, start = read_compact(raw, read_compact(raw, at)[1])
    return raw[:start] + milliseconds.to_bytes(size, "little") + raw[start + size :]


def _key_type(raw: bytes, start: int, item: str) -> int:
    """The id of the key's type of a map with one Identity hasher, which follows the item's name and modifier."""
    at = raw.index(_text(item) + b"\x01\x01" + compact(1) + b"\x06", start) + len(_text(item)) + 4
    return read_compact(raw, at)[0]


def _without(raw: bytes, pallet: str, item: str) -> bytes:
    """With the item under a name that nobody asks for; its length stays, so that nothing else moves."""
    start = raw.index(_text(pallet) + b"\x01" + _text(pallet))
    at = raw.index(_text(item), start) + len(_text(item)) - len(item)
    return raw[:at] + b"_" * len(item) + raw[at + len(item) :]
