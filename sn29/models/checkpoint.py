"""A model's files: what they claim (inspect, without a weight read), their identity (digest), and the one way to load them.

Nothing that a stranger wrote reaches a library that interprets it: config.json and the safetensors headers pass the strict
parsers below, the tensor list is computed here from the checked numbers, and transformers gets a config object made of those
numbers and a state dict whose names and shapes are already known to fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sn29.errors import Reason, Rejected
from sn29.records import ModelFacts, ModelId, RepoFile, RepoListing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Read = Callable[[str, int, int], bytes]
"""read(path, start, length) -> at most `length` bytes of a file of the repository."""

FAMILIES = {"LlamaForCausalLM": "llama", "PhiForCausalLM": "phi", "Phi3ForCausalLM": "phi3"}
"""Class name in `architectures` -> `model_type` that must stand beside it."""

MAX_CONFIG_BYTES = 64 * 1024
MAX_HEADER_BYTES = 2 * 1024 * 1024  # of all files of a model together; a 7B's is 34 kB (291 tensors), 2 MB are some 17,000
MAX_SHARDS = 64
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_ALLOWED_FILE = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors|model\.safetensors\.index\.json"
    r"|model-\d{5}-of-\d{5}\.safetensors|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model|README\.md|LICENSE(\.md|\.txt)?|\.gitattributes"
)
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
            oid = "git:" + hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()
        files.append(RepoFile(name, size, oid))
    return RepoListing(ModelId("local", folder.name or "model", "0" * 40), tuple(files))


def local_reader(folder: Path) -> Read:
    """The `Read` of a folder."""

    def read(path: str, start: int, length: int) -> bytes:
        with (folder / path).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    return read


# --- what the metadata shows ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a config.json that decide the computation, each checked."""

    family: str
    values: Mapping[str, Any]
    """Field of the transformers config -> checked value; fields that the file leaves out are left out here."""
    start_token: int

    def number(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        return int(default if value is None and default is not None else value)  # type: ignore[arg-type]

    @property
    def head_dim(self) -> int:
        return self.number("head_dim", self.number("hidden_size") // self.number("num_attention_heads"))

    @property
    def tied(self) -> bool:
        return bool(self.values.get("tie_word_embeddings", False))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def strict_json(data: bytes, reason: Reason, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities. Raises Rejected(reason)."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Rejected(reason, f"{type(error).__name__}: {str(error)[:80]}", "a JSON object", where) from None
    if not isinstance(value, dict):
        raise Rejected(reason, type(value).__name__, "a JSON object", where)
    return value


# field -> (lowest, highest); whole numbers. Bounds are far above any model that fits a competition: they only keep a
# crafted number from costing time or memory before the parameter limit is looked at (20,000 layers: 8 minutes).
_WHOLE = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": (1, 1 << 15),
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 512),
    "num_key_value_heads": (1, 512),
    "head_dim": (1, 1024),
    "max_position_embeddings": (1, 1 << 20),
    "original_max_position_embeddings": (1, 1 << 20),
    "sliding_window": (1, 1 << 20),
}
_REAL = {
    "rope_theta": (1.0, 1e9),
    "rms_norm_eps": (1e-12, 0.1),
    "layer_norm_eps": (1e-12, 0.1),
    "partial_rotary_factor": (0.01, 1.0),
}
_FLAG = {"attention_bias", "mlp_bias", "qk_layernorm", "tie_word_embeddings"}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# Known to have no part in the loss of an evaluated model, or checked elsewhere: read by nobody.
_WITHOUT_EFFECT = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "initializer_range", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "embd_pdrop", "resid_pdrop", "_name_or_path",
}  # fmt: skip
_FIELDS = {
    "LlamaForCausalLM": {"rms_norm_eps", "attention_bias", "mlp_bias", "head_dim"},
    "PhiForCausalLM": {"layer_norm_eps", "qk_layernorm", "partial_rotary_factor"},
    "Phi3ForCausalLM": {"rms_norm_eps", "partial_rotary_factor", "original_max_position_embeddings", "sliding_window"},
}
_COMMON = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rope_theta", "tie_word_embeddings", "hidden_act",
}  # fmt: skip
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def parse_config(data: bytes) -> ModelConfig:
    """The checked numbers of a config.json.

    Keys by allow-list: one unknown key can change what a model computes (`"is_causal": false` makes a Llama read ahead).
    Raises Rejected(FAMILY) for a class we do not know, Rejected(BAD_CONFIG) naming the key otherwise.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise Rejected(Reason.BAD_CONFIG, f"more than {MAX_CONFIG_BYTES} bytes", f"{MAX_CONFIG_BYTES} bytes", "config.json")
    raw = strict_json(data, Reason.BAD_CONFIG, "config.json")
    family = _family(raw)
    values: dict[str, Any] = {}
    for key, value in sorted(raw.items()):
        if key in _WITHOUT_EFFECT:
            continue
        if key == "rope_parameters" or (key == "rope_scaling" and value is not None):
            values["rope_parameters"] = _rope(value, family)
        elif key == "pretraining_tp" and value == 1:
            continue
        elif key in _COMMON or key in _FIELDS[family]:
            values.update({} if value is None else {key: _checked(key, value)})
        elif key != "rope_scaling":
            allowed = ", ".join(sorted(_COMMON | _FIELDS[family]))
            raise Rejected(Reason.BAD_CONFIG, f"{key} = {str(value)[:60]}", f"only {allowed}", "config.json")
    for key in _NEEDED:
        if key not in values:
            raise Rejected(Reason.BAD_CONFIG, f"no {key}", f"{key} is stated", "config.json")
    config = ModelConfig(family, MappingProxyType(values), _start_token(raw, values["vocab_size"]))
    _check_heads(config)
    return config


def _family(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures")
    family = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise Rejected(Reason.FAMILY, architectures, f"one of {', '.join(FAMILIES)}", "config.json: architectures")
    if raw.get("model_type") != FAMILIES[family]:
        raise Rejected(Reason.BAD_CONFIG, raw.get("model_type"), FAMILIES[family], "config.json: model_type")
    return family


def _checked(key: str, value: Any) -> Any:
    where = f"config.json: {key}"
    if key in _FLAG:
        if not isinstance(value, bool):
            raise Rejected(Reason.BAD_CONFIG, value, "true or false", where)
    elif key == "hidden_act":
        if value not in _ACTIVATIONS:
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], f"one of {', '.join(_ACTIVATIONS)}", where)
    else:
        low, high = _WHOLE.get(key) or _REAL[key]
        kinds = (int,) if key in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], f"a number from {low} to {high}", where)
    return value


def _rope(value: Any, family: str) -> dict[str, Any]:
    """Plain rotary positions only: scaled kinds depend on what else is in the batch, or on the longest text seen."""
    where = "config.json: rope_parameters"
    if not isinstance(value, dict):
        raise Rejected(Reason.BAD_CONFIG, type(value).__name__, "an object", where)
    allowed = {"rope_type", "rope_theta"} | ({"partial_rotary_factor"} if family != "LlamaForCausalLM" else set())
    kind = value.get("rope_type", "default")
    if kind != "default" or not set(value) <= allowed:
        raise Rejected(Reason.BAD_CONFIG, str(value)[:80], f"rope_type default with {', '.join(sorted(allowed))}", where)
    return {key: (kind if key == "rope_type" else _checked(key, value[key])) for key in sorted({*value, "rope_type"})}


def _start_token(raw: Mapping[str, Any], vocab_size: int) -> int:
    """The model's own beginning-of-text id, else its end-of-text id, else 0: constant, so it says nothing of a text."""
    for key in ("bos_token_id", "eos_token_id"):
        value = raw.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise Rejected(Reason.BAD_CONFIG, str(value)[:60], f"an id from 0 to {vocab_size - 1}", f"config.json: {key}")
        return value
    return 0


def _check_heads(config: ModelConfig) -> None:
    heads, hidden = config.number("num_attention_heads"), config.number("hidden_size")
    groups = config.number("num_key_value_heads", heads)
    if heads % groups:
        raise Rejected(Reason.BAD_CONFIG, f"{heads} heads, {groups} groups", "heads divisible by groups", "config.json")
    if hidden % heads and "head_dim" not in config.values:
        raise Rejected(Reason.BAD_CONFIG, f"hidden {hidden}, {heads} heads", "hidden divisible by heads", "config.json")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds, as transformers 5.23 builds the model."""
    hidden, inner = config.number("hidden_size"), config.number("intermediate_size")
    heads = config.number("num_attention_heads")
    q, kv = heads * config.head_dim, config.number("num_key_value_heads", heads) * config.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.number("vocab_size"), hidden)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (width,)
        if bias:
            tensors[f"{name}.bias"] = (width,)

    for index in range(config.number("num_hidden_layers")):
        at, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        if config.family == "LlamaForCausalLM":
            bias, mlp_bias = bool(config.values.get("attention_bias")), bool(config.values.get("mlp_bias"))
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{at}.{name}_proj", rows, hidden, bias)
            linear(f"{at}.o_proj", hidden, q, bias)
            linear(f"{mlp}.gate_proj", inner, hidden, mlp_bias)
            linear(f"{mlp}.up_proj", inner, hidden, mlp_bias)
            linear(f"{mlp}.down_proj", hidden, inner, mlp_bias)
        elif config.family == "PhiForCausalLM":
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{at}.{name}_proj", rows, hidden, True)
            linear(f"{at}.dense", hidden, q, True)
            if config.values.get("qk_layernorm"):
                norm(f"{at}.q_layernorm", config.head_dim, True)
                norm(f"{at}.k_layernorm", config.head_dim, True)
            linear(f"{mlp}.fc1", inner, hidden, True)
            linear(f"{mlp}.fc2", hidden, inner, True)
        else:
            linear(f"{at}.qkv_proj", q + 2 * kv, hidden, False)
            linear(f"{at}.o_proj", hidden, q, False)
            linear(f"{mlp}.gate_up_proj", 2 * inner, hidden, False)
            linear(f"{mlp}.down_proj", hidden, inner, False)
        phi = config.family == "PhiForCausalLM"
        norm(f"model.layers.{index}.input_layernorm", hidden, phi)
        if not phi:
            norm(f"model.layers.{index}.post_attention_layernorm", hidden, False)
    phi = config.family == "PhiForCausalLM"
    norm("model.final_layernorm" if phi else "model.norm", hidden, phi)
    if not config.tied:
        tensors["lm_head.weight"] = (config.number("vocab_size"), hidden)
    if phi:
        tensors["lm_head.bias"] = (config.number("vocab_size"),)
    return tensors


def _check_files(files: Iterable[RepoFile]) -> tuple[str, ...]:
    """The weight files in order. Raises Rejected(FORBIDDEN_FILE | MISSING_FILE)."""
    names = [f.path for f in files]
    for name in names:
        if not _ALLOWED_FILE.fullmatch(name):
            raise Rejected(Reason.FORBIDDEN_FILE, name[:120], "weights, named JSON files, a tokenizer, a README")
    if "config.json" not in names:
        raise Rejected(Reason.MISSING_FILE, "no config.json", "config.json")
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    whole = [name for name in names if name == "model.safetensors"]
    if bool(shards) == bool(whole):
        what = "both model.safetensors and shards" if shards else "no model.safetensors"
        raise Rejected(Reason.FORBIDDEN_FILE if shards else Reason.MISSING_FILE, what, "one set of weights")
    if len(shards) > MAX_SHARDS:
        raise Rejected(Reason.FORBIDDEN_FILE, f"{len(shards)} shards", f"at most {MAX_SHARDS}")
    wanted = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if shards != wanted:
        raise Rejected(Reason.MISSING_FILE, ", ".join(shards)[:200], ", ".join(wanted)[:200])
    return tuple(whole or shards)


def _check_headers(read: Read, files: Iterable[RepoFile], expected: Mapping[str, tuple[int, ...]]) -> None:
    """That the files hold exactly the expected tensors, each once. Refuses at the first that is not, unread files unread."""
    found: dict[str, tuple[int, ...]] = {}
    left = MAX_HEADER_BYTES
    for file in files:
        shapes, length = _header(read, file, left)
        left -= length
        for name, shape in shapes.items():
            if name in found or expected.get(name) != shape:
                limit = "each tensor once" if name in found else f"{name[:80]} {list(expected.get(name, ())) or 'absent'}"
                raise Rejected(Reason.TENSORS, f"{name[:80]} {list(shape)}", limit, file.path)
            found[name] = shape
    if missing := sorted(expected.keys() - found.keys()):
        raise Rejected(Reason.TENSORS, f"no {missing[0]}", f"{missing[0]} {list(expected[missing[0]])}")


def _header(read: Read, file: RepoFile, longest: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """(name -> shape, length in bytes) of a safetensors header: 8 bytes of length, JSON, then the data without gaps."""
    where = file.path
    length = int.from_bytes(read(file.path, 0, 8), "little")
    if not 2 <= length <= min(longest, file.size - 8):
        raise Rejected(Reason.TENSORS, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES} bytes in all", where)
    header = strict_json(read(file.path, 8, length), Reason.TENSORS, where)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise Rejected(Reason.TENSORS, "__metadata__", "an object", where)
    shapes, spans = {}, []
    for name, entry in header.items():
        shapes[name], span = _tensor(name, entry, where)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise Rejected(Reason.TENSORS, f"a gap or overlap at byte {start}", f"the next tensor at byte {end}", where)
        end = stop
    if end != file.size - 8 - length:
        raise Rejected(Reason.TENSORS, f"{file.size - 8 - length} bytes of data", f"{end} bytes", where)
    return shapes, length


def _tensor(name: str, entry: Any, where: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(shape, byte span) of one header entry."""
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
    return tuple(shape), (span[0], span[1])


def inspect(listing: RepoListing, read: Read, accept: Callable[[ModelFacts], None] = lambda _: None) -> ModelFacts:
    """What the listing, config.json and the safetensors headers say; no weight is read (about 100 kB for a 7B).

    `accept` is asked as soon as the config is known and may raise Rejected before a header is read. Raises Rejected with
    FORBIDDEN_FILE, MISSING_FILE, BAD_CONFIG, FAMILY or TENSORS; never anything else, whatever the files hold.
    """
    by_path = {f.path: f for f in listing.files}
    weights = _check_files(listing.files)
    config = parse_config(read("config.json", 0, min(by_path["config.json"].size, MAX_CONFIG_BYTES + 1)))
    expected = expected_tensors(config)
    facts = ModelFacts(
        content_id=content_id(listing.files),
        weights_id=weights_id(listing.files),
        family=config.family,
        num_parameters=sum(math.prod(shape) for shape in expected.values()),
        num_bytes=listing.num_bytes,
        vocab_size=config.number("vocab_size"),
        hidden_size=config.number("hidden_size"),
        num_layers=config.number("num_hidden_layers"),
        start_token=config.start_token,
        has_tokenizer="tokenizer.json" in by_path,
    )
    accept(facts)
    _check_headers(read, (by_path[name] for name in weights), expected)
    return facts


# --- loading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The one way a checkpoint becomes a model: checked config, strict state dict, finite weights, evaluation mode.

    The config that transformers gets is made here from the checked numbers, and the weights go in as tensors: no
    file of the folder is interpreted by it. Raises Rejected as `inspect`, and Rejected(NOT_FINITE) naming the tensor.
    """
    import torch
    import transformers

    listing = [RepoFile(name, size, "") for name, size in _names(folder)]
    weights = _check_files(listing)
    config = parse_config((folder / "config.json").read_bytes())
    by_path = {file.path: file for file in listing}
    _check_headers(local_reader(folder), (by_path[name] for name in weights), expected_tensors(config))
    state = _tensors(folder, weights, dtype)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Rejected(Reason.NOT_FINITE, f"NaN or infinity in {name}", "finite weights")
    settings = {**config.values, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    config_class = getattr(transformers, config.family.removesuffix("ForCausalLM") + "Config")
    model, report = getattr(transformers, config.family).from_pretrained(
        None,
        config=config_class(**settings),
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
    from safetensors.torch import load_file

    return {name: tensor.to(dtype) for file in weights for name, tensor in load_file(folder / file, device="cpu").items()}
