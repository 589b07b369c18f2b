"""A model's files: what they claim (inspect, without a weight read), their identity (digest), and the one way to load them.

Nothing that a stranger wrote reaches a library that interprets it: config.json and the safetensors headers pass the strict
parsers below, the tensor list is computed here from the checked numbers, and transformers gets a config object made of those
numbers and a state dict whose names and shapes are already known to fit.
"""

from __future__ import annotations

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected, Unavailable
from sn29.models.config import (
    FAMILIES as FAMILIES,
)
from sn29.models.config import (
    MAX_CONFIG_BYTES,
    ModelConfig,
    Refusals,
    expected_tensors,
    read_config,
)
from sn29.models.config import (
    parse_config as parse_config,
)
from sn29.models.config import (
    strict_json as strict_json,
)
from sn29.records import ModelFacts, ModelId, RepoFile, RepoListing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Read = Callable[[str, int, int], bytes]
"""read(path, start, length) -> at most `length` bytes of a file of the repository."""
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor -> shape."""

MAX_FILES = 64
MAX_JSON_BYTES = 20_000_000
"""Of one JSON file beside config.json, all of which are fetched; cl100k's tokenizer.json has 4 MB."""
_HEADER_BYTES, _HEADER_BYTES_A_FILE, _HEADER_BYTES_A_TENSOR = 8 * 1024, 1024, 192
"""Bounds for all headers of a model together, and for its index: so many bytes, and so many more for each file and each
tensor that the config implies. A 7B's 291 tensors in three files are allowed 67 kB and take 34. What is refused is read
twice: with the other files that is less than 150 kB."""
_MOST_TENSORS = 2000
"""For a model whose config does not say: 128 layers of Phi have 1,796."""
_INDEX = "model.safetensors.index.json"
_PIECE = 1 << 20
"""Values of a tensor that are hashed at a time; part of the digest's definition."""
_SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_ALLOWED_FILE = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors|model\.safetensors\.index\.json"
    r"|model-[0-9]{5}-of-[0-9]{5}\.safetensors|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model|README\.md|LICENSE(\.md|\.txt)?|\.gitattributes"
)
_NOWHERE = ModelId("local", "model", "0" * 40)
_BYTES_OF = {"F32": 4, "F16": 2, "BF16": 2}


# --- identity ---------------------------------------------------------------------------------------------------------


def content_id(files: Iterable[RepoFile]) -> str:
    """sha256 hex over the sorted (path, size, object id) of the *.safetensors and *.json files.

    One Hub request gives all of it. README and .gitattributes are left out, so that a new text beside the same model
    is the same model. Raises Rejected(MISSING_FILE) when there is no such file: the digest of nothing would make
    all empty repositories alike.
    """
    lines = sorted(f"{f.path}\0{f.size}\0{f.oid}\n" for f in files if is_content(f.path))
    if not lines:
        raise Rejected(Reason.MISSING_FILE, "no *.safetensors and no *.json", "config.json and model.safetensors")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_content(path: str) -> bool:
    """Whether a file has part in the content id: the files that a validator fetches."""
    return path.endswith((".safetensors", ".json"))


def is_allowed(path: str) -> bool:
    """Whether a repository of a model may hold a file of this name at all."""
    return _ALLOWED_FILE.fullmatch(path) is not None


def weights_id(files: Iterable[RepoFile]) -> str:
    """sha256 hex over the sorted object ids of the *.safetensors files: unchanged by another config or file name."""
    oids = sorted(f.oid for f in files if f.path.endswith(".safetensors"))
    return hashlib.sha256("\n".join(oids).encode()).hexdigest()


def digest(content: str, hotkey: str) -> str:
    """base64(sha256(content id, hotkey)): what a commitment carries, of no use under another hotkey."""
    return b64encode(hashlib.sha256((content + hotkey).encode()).digest()).decode()


def local_listing(folder: Path) -> RepoListing:
    """A folder as the Hub would list it: weights by sha256, small files by their git blob id.

    Raises Rejected(MISSING_FILE) when the folder is not there.
    """
    if not folder.is_dir():
        raise Rejected(Reason.MISSING_FILE, folder, "a folder with config.json and model.safetensors")
    files = []
    for name, size in _names(folder):
        path = folder / name
        if name.endswith(".safetensors"):
            with path.open("rb") as stream:
                oid = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            oid = git_blob(path.read_bytes())
        files.append(RepoFile(name, size, oid))
    return RepoListing(_NOWHERE, tuple(files))


def git_blob(content: bytes) -> str:
    """The object id of a small file on the Hub."""
    return "git:" + hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def local_reader(folder: Path) -> Read:
    """The `Read` of a folder."""

    def read(path: str, start: int, length: int) -> bytes:
        with (folder / path).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    return read


# --- what the metadata shows ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that metadata shows of a model."""

    facts: ModelFacts | None
    """None when config.json does not say them."""
    refusals: tuple[Rejected, ...]


def inspect(listing: RepoListing, read: Read, accept: Callable[[ModelFacts], None] = lambda _: None) -> ModelFacts:
    """What the listing, config.json and the safetensors headers say; no weight is read (60 to 100 kB for a 7B).

    Stops at the first refusal: nothing is read after it. `accept` is asked as soon as the config is known and may raise
    Rejected before a header is read. Raises Rejected with FORBIDDEN_FILE, MISSING_FILE, TOO_LARGE, BAD_CONFIG, FAMILY or
    TENSORS, and what `read` raises; of the files' content, whatever it is, nothing else. Unavailable also when other bytes
    came than the listing tells of: what a faulty line brings must refuse nobody for good.
    """
    for found in _findings(listing, read):
        if isinstance(found, Rejected):
            raise found
        facts = found
        accept(facts)
    return facts  # without a refusal there are facts


def inspect_all(listing: RepoListing, read: Read) -> Inspection:
    """The same with every reason that applies, for an owner who wants to mend them all. Raises what `read` raises."""
    facts, refusals = None, []
    for found in _findings(listing, read):
        if isinstance(found, Rejected):
            refusals.append(found)
        else:
            facts = found
    return Inspection(facts, tuple(refusals))


def _findings(listing: RepoListing, read: Read) -> Iterator[Rejected | ModelFacts]:
    """What is wrong, cheapest first, each thing read only when it is its turn; the facts as soon as config.json says them."""
    by_path = {f.path: f for f in listing.files}
    weights, refusals = _look_at_files(listing.files)
    yield from refusals
    config = expected = None
    if (file := by_path.get("config.json")) is not None:
        config, wrong = read_config(_whole(read, file) if file.size <= MAX_CONFIG_BYTES else b" " * (MAX_CONFIG_BYTES + 1))
        yield from wrong
    if config is not None:
        expected = expected_tensors(config)
        yield _facts(listing, config, expected)
    places: dict[str, str] = {}
    readable, left = bool(weights), _longest(_MOST_TENSORS if expected is None else len(expected), len(weights))
    for name in weights:
        held = _look_at_header(read, by_path[name], left, expected, places.keys())
        yield from held.refusals
        left -= held.num_bytes
        readable = readable and held.names is not None
        places.update(dict.fromkeys(held.names or (), name))
    if expected is None or not readable:
        return
    if missing := sorted(expected.keys() - places.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield Rejected(Reason.TENSORS, f"no {missing[0]}{more}", f"{missing[0]} {list(expected[missing[0]])}")
    elif _INDEX in by_path:
        yield from _look_at_index(read, by_path[_INDEX], places)


def _facts(listing: RepoListing, config: ModelConfig, expected: Mapping[str, tuple[int, ...]]) -> ModelFacts:
    return ModelFacts(
        content_id=content_id(listing.files),
        weights_id=weights_id(listing.files),
        family=config.family,
        num_parameters=sum(math.prod(shape) for shape in expected.values()),
        num_bytes=listing.num_bytes,
        vocab_size=config.number("vocab_size"),
        hidden_size=config.number("hidden_size"),
        num_layers=config.number("num_hidden_layers"),
        start_token=config.start_token,
        has_tokenizer=any(f.path == "tokenizer.json" for f in listing.files),
    )


def _look_at_files(files: Collection[RepoFile]) -> tuple[tuple[str, ...], tuple[Rejected, ...]]:
    """The weight files in order (none when it is not plain which they are), and FORBIDDEN_FILE, MISSING_FILE, TOO_LARGE."""
    names, refusals = {f.path for f in files}, Refusals()
    if len(files) > MAX_FILES:
        refusals.append(Rejected(Reason.FORBIDDEN_FILE, f"{len(files)} files", f"at most {MAX_FILES}"))
    if len(names) != len(files):  # no Hub can hold that; a faulty one could list it
        refusals.append(Rejected(Reason.FORBIDDEN_FILE, "a path that is listed twice", "each path once"))
    foreign = sorted(name for name in names if not _ALLOWED_FILE.fullmatch(name))
    what = "weights, named JSON files, a tokenizer, a README"
    refusals += [Rejected(Reason.FORBIDDEN_FILE, name[:120], what) for name in foreign[:8]]
    if len(foreign) > 8:
        refusals.append(Rejected(Reason.FORBIDDEN_FILE, f"{len(foreign) - 8} more such files", what))
    for f in files:
        if f.path.endswith(".json") and f.path not in ("config.json", *foreign) and f.size > MAX_JSON_BYTES:
            refusals.append(Rejected(Reason.TOO_LARGE, f"{f.size:,} bytes", f"at most {MAX_JSON_BYTES:,} bytes", f.path))
    if "config.json" not in names:
        refusals.append(Rejected(Reason.MISSING_FILE, "no config.json", "config.json"))
    return refusals.of(lambda: _weights(names)) or (), tuple(refusals)


def _weights(names: Collection[str]) -> tuple[str, ...]:
    """The one set of weights: `model.safetensors` alone, or shards 1 to n of n. Raises Rejected.

    Loaders disagree which of two sets counts, so that one could be inspected and the other one scored.
    """
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if "model.safetensors" in names:
        if shards or _INDEX in names:
            got = f"model.safetensors and {(shards or [_INDEX])[0]}"
            raise Rejected(Reason.FORBIDDEN_FILE, got, "one set of weights: model.safetensors, or shards with their index")
        return ("model.safetensors",)
    if not shards:
        raise Rejected(Reason.MISSING_FILE, "no model.safetensors", "one set of weights")
    count = int(shards[0][-17:-12])
    wanted = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(min(count, MAX_FILES))]
    if shards != wanted:
        absent = sorted(set(wanted) - set(shards)) or [f"{len(shards)} shards of more than one set"]
        reason = Reason.MISSING_FILE if set(wanted) - set(shards) else Reason.FORBIDDEN_FILE
        raise Rejected(reason, f"no {absent[0]}" if reason is Reason.MISSING_FILE else absent[0], f"shards 1 to {count}")
    return tuple(shards)


def _span(read: Read, file: RepoFile, start: int, length: int) -> bytes:
    """Bytes of a file, as many as its stated size has there. Raises Unavailable when fewer come."""
    wanted = max(0, min(length, file.size - start))
    data = read(file.path, start, wanted) if wanted else b""
    if len(data) != wanted:
        raise Unavailable(file.path, f"{len(data)} of {wanted} bytes came")
    return data


def _whole(read: Read, file: RepoFile) -> bytes:
    """A small file. Raises Unavailable when it is not the one that the listing names."""
    data = _span(read, file, 0, file.size)
    found = f"sha256:{hashlib.sha256(data).hexdigest()}" if file.oid.startswith("sha256:") else git_blob(data)
    if file.oid not in ("", found):
        raise Unavailable(file.path, f"came as {found}, the Hub lists {file.oid}")
    return data


# --- safetensors headers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str
    """`F32`, `F16` or `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int


def _longest(num_tensors: int, num_files: int) -> int:
    return _HEADER_BYTES + _HEADER_BYTES_A_FILE * num_files + _HEADER_BYTES_A_TENSOR * num_tensors


@dataclass(frozen=True, slots=True)
class _Held:
    """What one weight file holds."""

    names: tuple[str, ...] | None
    """Tensors that are right; None when the header cannot be read at all."""
    refusals: tuple[Rejected, ...]
    num_bytes: int = 0
    """Of the header."""


def _look_at_header(read: Read, file: RepoFile, longest: int, expected: Shapes | None, taken: Collection[str]) -> _Held:
    """One file's header, of at most `longest` bytes, against the expected tensors that are not `taken` by other files.

    Without `expected` (no usable config) the header's own form is checked alone. A refusal is for good, and a span of a
    file has no hash to check it by, so the bytes that it rests on are read twice. Raises Unavailable when they differ.
    """
    held = _held(read, file, longest, expected, taken)
    if held.refusals and [*map(str, held.refusals)] != [*map(str, _held(read, file, longest, expected, taken).refusals)]:
        raise Unavailable(file.path, "two readings of its header differ")
    return held


def _held(read: Read, file: RepoFile, longest: int, expected: Shapes | None, taken: Collection[str]) -> _Held:
    try:
        tensors, num_bytes = _header(read, file, longest)
    except Rejected as error:
        return _Held(None, (error,))
    right = {name for name, t in tensors.items() if expected is None or (name not in taken and expected.get(name) == t.shape)}
    wrong = [name for name in tensors if name not in right]
    if not wrong:
        return _Held(tuple(tensors), (), num_bytes)
    assert expected is not None
    name = wrong[0]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    limit = "each tensor once" if name in taken else f"{name[:80]} {list(expected.get(name, ())) or 'absent'}"
    got = f"{name[:80]} {list(tensors[name].shape)}{more}"
    return _Held(tuple(right), (Rejected(Reason.TENSORS, got, limit, file.path),), num_bytes)


def _header(read: Read, file: RepoFile, longest: int) -> tuple[dict[str, Tensor], int]:
    """(name -> tensor, byte at which the data begins) of a safetensors file: 8 bytes of length, JSON, data without gaps.

    What the safetensors library would refuse is refused here. Raises Rejected(TENSORS).
    """
    where = file.path
    length = int.from_bytes(_span(read, file, 0, 8), "little")
    if not 2 <= length <= min(longest, file.size - 8):
        raise Rejected(Reason.TENSORS, f"a header of {length} bytes", f"at most {longest} bytes, and inside the file", where)
    header = strict_json(_span(read, file, 8, length), Reason.TENSORS, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Rejected(Reason.TENSORS, "__metadata__ with something else", "texts", where)
    tensors = {name: _tensor(name, entry, where) for name, entry in header.items()}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise Rejected(Reason.TENSORS, f"a gap or overlap at byte {tensor.start}", f"the next tensor at byte {end}", where)
        end = tensor.stop
    if end != file.size - 8 - length:
        raise Rejected(Reason.TENSORS, f"{file.size - 8 - length} bytes of data", f"{end} bytes", where)
    return tensors, 8 + length


def _tensor(name: str, entry: Any, where: str) -> Tensor:
    """One header entry. Raises Rejected(TENSORS)."""
    bad = Rejected(Reason.TENSORS, f"{name[:80]}: {str(entry)[:80]}", "F32, F16 or BF16 with a shape and its bytes", where)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES_OF:
        raise bad
    for numbers in (shape, span):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 50 for n in numbers):
            raise bad
    if len(span) != 2 or len(shape) > 2 or span[1] - span[0] != math.prod(shape) * _BYTES_OF[dtype]:
        raise bad
    return Tensor(dtype, tuple(shape), span[0], span[1])


def _look_at_index(read: Read, file: RepoFile, places: Mapping[str, str]) -> Iterator[Rejected]:
    """What is wrong with an index of shards. Nothing here loads by it, but others do: it must say what is so."""
    if file.size > (longest := _longest(len(places), 0)):
        yield Rejected(Reason.TENSORS, f"{file.size:,} bytes", f"at most {longest:,} bytes", file.path)
        return
    try:
        index = strict_json(_whole(read, file), Reason.TENSORS, file.path)
    except Rejected as error:
        yield error
        return
    stated = index.get("weight_map")
    if not isinstance(stated, dict) or not set(index) <= {"metadata", "weight_map"}:
        yield Rejected(Reason.TENSORS, ", ".join(sorted(index))[:120], "metadata and weight_map", file.path)
    elif stated != places:
        both = stated.keys() & places.keys()
        name = min((stated.keys() ^ places.keys()) | {name for name in both if stated[name] != places[name]})
        got = f"{name[:80]} in {str(stated.get(name, 'no file'))[:80]}"
        yield Rejected(Reason.TENSORS, got, f"in {places.get(name, 'no file')}", file.path)


# --- canonical identity of the weights --------------------------------------------------------------------------------


def tensor_digest(folder: Path, *, threads: int = 1) -> str:
    """sha256 hex over the sorted (name, shape, values) of all tensors: known again however they were packed.

    Sharding, file names, metadata, order, config.json and README have no part in it, nor has the data type that the
    values are kept in: bfloat16, float16 and float32 that are equal as float32 are equal here, as are 0 and -0. A head
    that repeats the embedding counts as tied. The values are read in pieces of some 4 MB for each thread. Raises Rejected
    as `inspect` does of files and headers.
    """
    places = tensors_of([RepoFile(name, size, "") for name, size in _names(folder)], local_reader(folder))
    values_of = {name: (folder / path, start, tensor) for name, (path, start, tensor) in places.items()}
    with ThreadPoolExecutor(threads) as pool:  # hashing leaves the interpreter's lock
        values = dict(zip(places, pool.map(_values_digest, values_of.values()), strict=True))
    if values.get("lm_head.weight") == values.get("model.embed_tokens.weight"):
        values.pop("lm_head.weight", None)
    lines = sorted(f"{name}\0{list(places[name][2].shape)}\0{value}\n" for name, value in values.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tensors_of(files: Collection[RepoFile], read: Read) -> dict[str, tuple[str, int, Tensor]]:
    """Name -> (file, byte of the file at which its values begin, header entry) of every tensor, from the headers alone.

    Raises Rejected as `inspect` does of files and headers, and what `read` raises.
    """
    names = _weights([f.path for f in files])
    places: dict[str, tuple[str, int, Tensor]] = {}
    for file in (f for f in files if f.path in names):
        tensors, begins = _header(read, file, _longest(_MOST_TENSORS, 0))
        if twice := sorted(tensors.keys() & places.keys()):
            raise Rejected(Reason.TENSORS, twice[0][:80], "each tensor once", file.path)
        places.update({name: (file.path, begins + tensor.start, tensor) for name, tensor in tensors.items()})
    return places


def opened(folder: Path) -> tuple[ModelConfig, dict[str, tuple[str, int, Tensor]]]:
    """A folder's checked config, and where each tensor that it implies lies. Raises Rejected as `inspect`."""
    listing = RepoListing(_NOWHERE, tuple(RepoFile(name, size, "") for name, size in _names(folder)))
    inspect(listing, local_reader(folder))
    return parse_config((folder / "config.json").read_bytes()), tensors_of(listing.files, local_reader(folder))


def _values_digest(place: tuple[Path, int, Tensor]) -> str:
    """sha256 hex of a tensor's values, each piece in the smallest form that holds them: bfloat16's 2 bytes, or float32's 4.

    A model in bfloat16 costs no conversion then, and half the bytes to hash.
    """
    import numpy as np

    path, start, tensor = place
    digest, left = hashlib.sha256(), math.prod(tensor.shape)
    kind = {"BF16": "<u2", "F16": "<f2", "F32": "<u4"}[tensor.dtype]
    with path.open("rb") as stream:
        stream.seek(start)
        while left:
            raw = np.fromfile(stream, dtype=kind, count=min(left, _PIECE))
            if not raw.size:
                raise Rejected(Reason.TENSORS, f"{path.name} ends early", "all values of its header", path.name)
            left -= raw.size
            bits = raw if tensor.dtype == "BF16" else raw.astype("<f4").view("<u4") if tensor.dtype == "F16" else raw
            if tensor.dtype != "BF16" and not (bits & 0xFFFF).any():
                bits = (bits >> 16).astype("<u2")
            bits[bits == 1 << (8 * bits.itemsize - 1)] = 0
            digest.update(bytes([bits.itemsize]))
            digest.update(bits.data)
    return digest.hexdigest()


# --- loading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The one way a checkpoint becomes a model: checked config, strict state dict, finite weights, evaluation mode.

    The config that transformers gets is made here from the checked numbers, and the weights go in as tensors: no
    file of the folder is interpreted by it. Raises Rejected as `inspect`, and Rejected(NOT_FINITE) naming the tensor.
    """
    import torch
    import transformers

    listing = RepoListing(_NOWHERE, tuple(RepoFile(name, size, "") for name, size in _names(folder)))
    inspect(listing, local_reader(folder))
    config = parse_config((folder / "config.json").read_bytes())
    state = _tensors(folder, _weights([f.path for f in listing.files]), dtype)
    for name, tensor in state.items():
        # one pass without a copy: 15 GB/s in bfloat16 where isfinite().all() reaches 0.7; a NaN is both ends
        if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor))):
            raise Rejected(Reason.NOT_FINITE, f"NaN or infinity in {name}", "finite weights")
    config_class = getattr(transformers, config.family.removesuffix("ForCausalLM") + "Config")
    model, report = getattr(transformers, config.family).from_pretrained(
        None,
        config=config_class(**config.settings()),
        state_dict=state,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if wrong:
        raise Rejected(Reason.TENSORS, str(wrong)[:300], "every tensor loaded, none left over")
    return model.to(device).eval()


def _names(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of a folder's files, sorted; names that start with a dot are no part of a model and are never uploaded."""
    found = ((p.relative_to(folder), p) for p in sorted(folder.rglob("*")) if p.is_file())
    return [(name.as_posix(), p.stat().st_size) for name, p in found if not any(part.startswith(".") for part in name.parts)]


def _tensors(folder: Path, weights: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the files. Raises Rejected(TENSORS) for a file that only the library finds wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = {}
    for file in weights:
        try:
            found.update({name: tensor.to(dtype) for name, tensor in load_file(folder / file, device="cpu").items()})
        except SafetensorError as error:
            raise Rejected(Reason.TENSORS, str(error)[:200], "a file that the safetensors library reads", file) from None
    return found
