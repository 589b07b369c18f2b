from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sn29.errors import Reason, Rejected, Unavailable, shown
from sn29.models import checkpoint
from sn29.records import RepoFile

SHAPES = [
    ("LlamaForCausalLM", {}),
    (
        "LlamaForCausalLM",
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    ("LlamaForCausalLM", {"head_dim": 16}),
    ("PhiForCausalLM", {"qk_layernorm": True, "num_key_value_heads": 2}),
    ("PhiForCausalLM", {"tie_word_embeddings": True}),
    ("Phi3ForCausalLM", {"num_key_value_heads": 2}),
    ("Phi3ForCausalLM", {"tie_word_embeddings": True, "sliding_window": 8}),
]


def inspect(folder: Path):
    return checkpoint.inspect(checkpoint.local_listing(folder), checkpoint.local_reader(folder))


def edited(folder: Path, to: Path, **config) -> Path:
    """A copy of a checkpoint with other values in config.json; None removes a key."""
    shutil.copytree(folder, to)
    raw = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return to


@pytest.mark.parametrize(("family", "config"), SHAPES)
def test_expected_tensors_are_those_that_transformers_builds(family, config, make_checkpoint):
    import torch
    import transformers

    folder = make_checkpoint(family, **config)
    parsed = checkpoint.parse_config((folder / "config.json").read_bytes())
    config_class = getattr(transformers, family.removesuffix("ForCausalLM") + "Config")
    with torch.device("meta"):
        model = getattr(transformers, family)(config_class(**json.loads((folder / "config.json").read_text())))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert checkpoint.expected_tensors(parsed) == built
    assert inspect(folder).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "config"), SHAPES)
def test_a_loaded_model_computes_what_was_saved(family, config, make_checkpoint):
    import torch
    import transformers

    folder = make_checkpoint(family, **config)
    ours = checkpoint.load(folder, dtype=torch.float32)
    theirs = getattr(transformers, family).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("change", "reason", "named"),
    [
        ({"is_causal": False}, Reason.BAD_CONFIG, "is_causal"),
        ({"attn_implementation": "evil/kernel"}, Reason.BAD_CONFIG, "attn_implementation"),
        ({"auto_map": {"AutoModel": "x.Y"}}, Reason.BAD_CONFIG, "auto_map"),
        ({"quantization_config": {}}, Reason.BAD_CONFIG, "quantization_config"),
        ({"num_hidden_layers": 10_000_000}, Reason.BAD_CONFIG, "num_hidden_layers"),
        ({"num_hidden_layers": True}, Reason.BAD_CONFIG, "num_hidden_layers"),
        ({"hidden_size": "32"}, Reason.BAD_CONFIG, "hidden_size"),
        ({"vocab_size": None}, Reason.BAD_CONFIG, "vocab_size"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 1e30}}, Reason.BAD_CONFIG, "yarn"),
        ({"bos_token_id": 300}, Reason.BAD_CONFIG, "bos_token_id"),
        ({"num_key_value_heads": 3}, Reason.BAD_CONFIG, "heads"),
        ({"model_type": "phi"}, Reason.BAD_CONFIG, "model_type"),
        ({"architectures": ["SlicedLlamaForCausalLM"]}, Reason.FAMILY, "SlicedLlamaForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, Reason.FAMILY, "GPT2LMHeadModel"),
        ({"num_hidden_layers": 3}, Reason.TENSORS, "model.layers.2"),
        ({"vocab_size": 301}, Reason.TENSORS, "[301, 32]"),
        ({"tie_word_embeddings": True}, Reason.TENSORS, "lm_head"),
    ],
)
def test_a_config_that_lies_or_does_too_much_is_refused_by_name(change, reason, named, make_checkpoint, tmp_path):
    folder = edited(make_checkpoint(), tmp_path / "edited", **change)
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert refused.value.reason is reason
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_evil.py", "adapter_config.json",
        "adapter_model.safetensors", "sub/config.json", "x.safetensors", "model.gguf", "tf_model.h5", "flax_model.msgpack",
        "Config.json", "chat_template.jinja", "preprocessor_config.json", "model-1-of-2.safetensors",
        "model-٠٠٠٠١-of-٠٠٠٠١.safetensors",
    ],
)  # fmt: skip
def test_a_file_that_no_model_needs_is_refused(name, make_checkpoint, tmp_path):
    folder = edited(make_checkpoint(), tmp_path / "edited")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert (refused.value.reason, refused.value.got) == (Reason.FORBIDDEN_FILE, shown(name))


def rewritten_header(folder: Path, to: Path, change) -> Path:
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return to


def rename(header):
    header["model.norm.weights"] = header.pop("model.norm.weight")


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = [0, 128]


def widen(header):
    header["model.norm.weight"]["dtype"] = "F64"


def grow(header):
    header["model.norm.weight"]["shape"] = [1 << 49]


@pytest.mark.parametrize("change", [rename, overlap, widen, grow])
def test_a_header_that_does_not_fit_its_config_is_refused(change, make_checkpoint, tmp_path):
    folder = rewritten_header(make_checkpoint(), tmp_path / "edited", change)
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert refused.value.reason is Reason.TENSORS
    assert "model.norm.weight" in str(refused.value) or "byte" in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, (1 << 62).to_bytes(8, "little"), b"\x02\0\0\0\0\0\0\0{}extra"])
def test_a_file_that_is_no_safetensors_is_refused(data, make_checkpoint, tmp_path):
    folder = edited(make_checkpoint(), tmp_path / "edited")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert refused.value.reason is Reason.TENSORS


def test_what_only_the_library_finds_wrong_is_a_refusal_too(make_checkpoint, tmp_path):
    """Not an exception that ends the child: whoever wrote the file is told."""
    import torch

    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"a": [1, 2, 3]}')
    with pytest.raises(Rejected) as refused:
        checkpoint._tensors(tmp_path, ["model.safetensors"], torch.float32)
    assert (refused.value.reason, refused.value.where) == (Reason.TENSORS, "model.safetensors")


def test_an_offset_that_the_library_would_not_read_is_refused_by_the_header(make_checkpoint, tmp_path):
    folder = rewritten_header(make_checkpoint(), tmp_path / "edited", lambda header: None)
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b"[0, ", b"[-0, ").replace(b"[0,", b"[-0,")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert refused.value.reason is Reason.TENSORS
    assert "-0" in str(refused.value)


def test_nan_in_the_weights_is_refused_by_name(make_checkpoint, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = edited(make_checkpoint(), tmp_path / "edited")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors")
    inspect(folder)  # metadata cannot show it
    with pytest.raises(Rejected) as refused:
        checkpoint.load(folder, dtype=torch.float32)
    assert refused.value.reason is Reason.NOT_FINITE
    assert "model.norm.weight" in refused.value.got


def test_identity_ignores_the_readme_and_binds_the_hotkey():
    weights = RepoFile("model.safetensors", 10, "sha256:" + "a" * 64)
    config = RepoFile("config.json", 5, "git:" + "b" * 40)
    readme = RepoFile("README.md", 7, "git:" + "c" * 40)
    one = checkpoint.content_id([weights, config])
    assert checkpoint.content_id([readme, config, weights]) == one
    assert checkpoint.content_id([weights, RepoFile("config.json", 5, "git:" + "d" * 40)]) != one
    assert checkpoint.content_id([RepoFile("other.safetensors", 10, weights.oid), config]) != one
    assert checkpoint.weights_id([weights, config]) == checkpoint.weights_id([RepoFile("other.safetensors", 10, weights.oid)])
    assert checkpoint.digest(one, "5Alice") != checkpoint.digest(one, "5Bob")
    assert len(checkpoint.digest(one, "5Alice")) == 44
    with pytest.raises(Rejected):
        checkpoint.content_id([readme])


def test_no_header_brings_up_anything_but_a_refusal(make_checkpoint, tmp_path):
    """Seeded mutations of a good header: another value of another type at each place. Only Rejected comes out."""
    folder = edited(make_checkpoint(), tmp_path / "edited")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    good = json.loads(data[8 : 8 + length])
    names = [name for name in good if name != "__metadata__"]
    values = [
        None,
        True,
        -1,
        0,
        2**70,
        1.5,
        "F32",
        "",
        [],
        [[]],
        {},
        {"a": []},
        ["F32"],
        [0, 2**63],
        [-1, 3],
        [1, 2, 3],
        "\ud800",
    ]
    for number, value in enumerate(values * 3):
        header = json.loads(json.dumps(good))
        name, key = names[number % len(names)], ("dtype", "shape", "data_offsets")[number // len(values)]
        if (key, value) == ("dtype", "F32"):
            continue  # the one that is right
        header[name][key] = value
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(Rejected) as refused:
            inspect(folder)
        assert refused.value.reason is Reason.TENSORS
        assert str(refused.value).isprintable()


def test_headers_are_bounded_for_all_files_together_and_read_no_further_than_the_first_wrong_name(make_checkpoint):
    config = (make_checkpoint() / "config.json").read_bytes()
    header = json.dumps({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20)}).encode()
    body = len(header).to_bytes(8, "little") + header
    names = [f"model-{i + 1:05d}-of-{40:05d}.safetensors" for i in range(40)]
    asked = []

    def read(path: str, start: int, length: int) -> bytes:
        asked.append(path)
        return (config if path == "config.json" else body)[start : start + length]

    files = [RepoFile("config.json", len(config), checkpoint.git_blob(config))]
    files += [RepoFile(name, len(body), "sha256:" + "b" * 64) for name in names]
    with pytest.raises(Rejected, match="x0"):
        checkpoint.inspect(checkpoint.RepoListing(checkpoint.ModelId("a", "b", "0" * 40), tuple(files)), read)
    assert set(asked) == {"config.json", names[0]}


def test_a_rule_that_the_config_shows_costs_no_header(make_checkpoint):
    folder = make_checkpoint()
    asked = []

    def read(path: str, start: int, length: int) -> bytes:
        asked.append(path)
        return checkpoint.local_reader(folder)(path, start, length)

    def accept(facts) -> None:
        raise Rejected(Reason.PARAMETERS, facts.num_parameters, 1)

    with pytest.raises(Rejected) as refused:
        checkpoint.inspect(checkpoint.local_listing(folder), read, accept)
    assert refused.value.reason is Reason.PARAMETERS
    assert asked == ["config.json"]


def test_what_a_download_tool_leaves_behind_is_no_part_of_a_model(make_checkpoint, tmp_path):
    folder = edited(make_checkpoint(), tmp_path / "edited")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert {f.path for f in checkpoint.local_listing(folder).files} == {p.name for p in folder.iterdir() if p.is_file()}
    inspect(folder)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(make_checkpoint, tmp_path_factory) -> Path:
    """The default checkpoint in several files with their index, as save_pretrained writes it."""
    import transformers

    folder = tmp_path_factory.mktemp("sharded") / "model"
    transformers.LlamaForCausalLM.from_pretrained(make_checkpoint()).save_pretrained(folder, max_shard_size="70kB")
    return folder


def reasons(folder: Path) -> list[tuple[str, str]]:
    found = checkpoint.inspect_all(checkpoint.local_listing(folder), checkpoint.local_reader(folder))
    return [(refusal.reason.code, str(refusal)) for refusal in found.refusals]


INDEX = "model.safetensors.index.json"


def test_a_sharded_checkpoint_is_the_same_model(sharded, make_checkpoint):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert inspect(sharded).num_parameters == inspect(make_checkpoint()).num_parameters
    assert reasons(sharded) == []


def second_set(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model.safetensors")


def single_with_index(folder: Path) -> None:
    for path in folder.glob("model-*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(b"x" * 100)


def one_shard_less(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def two_counts(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00001-of-00002.safetensors")


def more_than_the_count(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00004-of-00003.safetensors")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def large_json(folder: Path) -> None:
    with (folder / "vocab.json").open("wb") as out:
        out.truncate(checkpoint.MAX_JSON_BYTES + 1)


def many_files(folder: Path) -> None:
    for number in range(70):
        (folder / f"{number}.txt").write_text("")


@pytest.mark.parametrize(
    ("spoil", "code", "named"),
    [
        (second_set, "forbidden_file", "model.safetensors and model-00001"),
        (single_with_index, "forbidden_file", "index.json"),
        (one_shard_less, "missing_file", "no model-00002-of-00003"),
        (two_counts, "missing_file", "no model-00002-of-00002"),
        (more_than_the_count, "forbidden_file", "more than one set"),
        (no_config, "missing_file", "config.json"),
        (large_json, "too_large", "20,000,001"),
        (many_files, "forbidden_file", "at most 64"),
    ],
)
def test_which_files_there_are_is_decided_by_one_rule(spoil, code, named, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    assert len(list(folder.glob("model-*"))) == 3
    spoil(folder)
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert refused.value.reason.code == code
    assert named in str(refused.value)
    assert len(reasons(folder)) <= 12


def test_a_path_that_is_listed_twice_is_refused(make_checkpoint):
    listing = checkpoint.local_listing(make_checkpoint())
    twice = checkpoint.RepoListing(listing.model, (*listing.files, listing.files[0]))
    with pytest.raises(Rejected, match="listed twice"):
        checkpoint.inspect(twice, checkpoint.local_reader(make_checkpoint()))


def entry_elsewhere(index):
    index["weight_map"]["model.norm.weight"] = "../other-miner/model.safetensors"


def entry_of_another_shard(index):
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"


def entry_absolute(index):
    index["weight_map"]["model.norm.weight"] = "/models/other/model.safetensors"


def entry_too_many(index):
    index["weight_map"]["model.extra.weight"] = "pytorch_model.bin"


def entry_missing(index):
    del index["weight_map"]["model.norm.weight"]


def entry_no_text(index):
    index["weight_map"]["model.norm.weight"] = ["model-00003-of-00003.safetensors"]


def no_map(index):
    index["weight_map"] = list(index["weight_map"])


def further_key(index):
    index["transformers_weights"] = "../other-miner/model.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        entry_elsewhere, entry_of_another_shard, entry_absolute, entry_too_many, entry_missing, entry_no_text, no_map,
        further_key,
    ],
)  # fmt: skip
def test_an_index_must_say_what_is_so(change, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    ((code, said),) = reasons(folder)
    assert code == "tensors"
    assert INDEX in said


@pytest.mark.parametrize("data", [b"[]", b'{"weight_map": {"a": "b", "a": "b"}}', b"x", b" " * 30_000])
def test_an_index_that_is_no_plain_json_of_its_size_is_refused(data, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "model")
    (folder / INDEX).write_bytes(data)
    ((code, said),) = reasons(folder)
    assert (code, INDEX in said) == ("tensors", True)


def test_every_reason_is_told(sharded, tmp_path):
    folder = edited(sharded, tmp_path / "model", is_causal=False, attn_implementation="evil/kernel", num_hidden_layers=3)
    (folder / "evil.py").write_text("")
    (folder / "pytorch_model.bin").write_text("")
    told = reasons(folder)
    assert [code for code, _ in told] == ["forbidden_file", "forbidden_file", "bad_config", "bad_config", "tensors"]
    words = [
        "evil.py",
        "pytorch_model.bin",
        "attn_implementation",
        "is_causal",
        "no model.layers.2.input_layernorm.weight and 8 more",
    ]
    assert all(word in said for word, (_, said) in zip(words, told, strict=True))
    facts = checkpoint.inspect_all(checkpoint.local_listing(folder), checkpoint.local_reader(folder)).facts
    assert facts is not None, "the rules of a competition can be asked all the same"
    assert facts.num_layers == 3


# --- headers ----------------------------------------------------------------------------------------------------------


def with_header(folder: Path, to: Path, header: bytes, data: bytes = b"") -> Path:
    shutil.copytree(folder, to)
    (to / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return to


def fat_metadata(header):
    header["__metadata__"] = {"x": "y" * 90_000}


def metadata_of_numbers(header):
    header["__metadata__"] = {"format": 1}


def metadata_list(header):
    header["__metadata__"] = ["pt"]


def many_empty(header):
    header.update({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100)})


def further_field(header):
    header["model.norm.weight"]["strides"] = [1]


def packed_integers(header):
    header["model.norm.weight"]["dtype"] = "I32"


def deep_shape(header):
    header["model.norm.weight"]["shape"] = [1, 1, 32]


def hole(header):
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0]:
            entry["data_offsets"] = [n + 128 for n in entry["data_offsets"]]


def beyond(header):
    header["model.norm.weight"]["data_offsets"] = [1 << 45, (1 << 45) + 128]


@pytest.mark.parametrize(
    "change",
    [
        fat_metadata, metadata_of_numbers, metadata_list, many_empty, further_field, packed_integers, deep_shape, hole,
        beyond,
    ],
)  # fmt: skip
def test_a_header_that_the_format_or_the_config_does_not_allow_is_refused(change, make_checkpoint, tmp_path):
    folder = rewritten_header(make_checkpoint(), tmp_path / "edited", change)
    told = reasons(folder)
    assert told[0][0] == "tensors"
    with pytest.raises(Rejected) as refused:
        checkpoint.load(folder, dtype=None)
    assert refused.value.reason is Reason.TENSORS


def test_a_tensor_twice_in_one_header_or_in_two_files_is_refused(make_checkpoint, sharded, tmp_path):
    data = (make_checkpoint() / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b"model.layers.1.", b"model.layers.0.")
    (told,) = reasons(with_header(make_checkpoint(), tmp_path / "one", header, data[8 + length :]))
    assert "a key stands twice" in told[1]
    folder = shutil.copytree(sharded, tmp_path / "two")
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    assert "each tensor once" in reasons(folder)[0][1]
    with pytest.raises(Rejected, match="each tensor once"):
        checkpoint.tensor_digest(folder)


def test_bytes_after_the_tensors_are_refused(make_checkpoint, tmp_path):
    folder = shutil.copytree(make_checkpoint(), tmp_path / "model")
    with (folder / "model.safetensors").open("ab") as out:
        out.write(b"PK\x03\x04")
    ((code, said),) = reasons(folder)
    assert code == "tensors"
    assert "bytes of data" in said


def test_what_a_faulty_line_brings_refuses_nobody_for_good(sharded):
    """Bytes that are not those of the listing, or that differ from one reading to the next: nothing is known."""
    listing, read = checkpoint.local_listing(sharded), checkpoint.local_reader(sharded)
    first = "model-00001-of-00003.safetensors"
    asked = []

    def flipped(path: str, start: int, length: int) -> bytes:
        asked.append(path)
        data = read(path, start, length)
        wrong = path == spoiled and (path != first or (start == 8 and asked.count(path) == 2))
        return bytes([data[0], data[1] ^ 1]) + data[2:] if wrong else data

    def short(path: str, start: int, length: int) -> bytes:
        return read(path, start, length)[: -1 if path == spoiled else None]

    for fault in (flipped, short):
        for spoiled in ("config.json", first, INDEX):
            asked.clear()
            with pytest.raises(Unavailable) as failed:
                checkpoint.inspect(listing, fault)
            assert spoiled in str(failed.value)
    spoiled = ""
    checkpoint.inspect(listing, flipped)


# --- canonical digest -------------------------------------------------------------------------------------------------


def saved(folder: Path, to: Path, state: dict, **metadata: str) -> Path:
    from safetensors.torch import save_file

    shutil.copytree(folder, to)
    save_file(state, to / "model.safetensors", metadata=metadata)
    return to


def test_the_same_values_have_the_same_digest_however_they_are_packed(make_checkpoint, sharded, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = make_checkpoint()
    state = load_file(folder / "model.safetensors")
    same = checkpoint.tensor_digest(folder)
    assert checkpoint.tensor_digest(sharded) == same
    assert checkpoint.tensor_digest(folder, threads=3) == same
    assert checkpoint.tensor_digest(saved(folder, tmp_path / "metadata", state, author="me")) == same
    assert checkpoint.tensor_digest(edited(folder, tmp_path / "config", rope_theta=5000.0)) == same

    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    back = {name: tensor.to(torch.float32) for name, tensor in half.items()}
    mixed = {name: half[name] if number % 2 else back[name] for number, name in enumerate(half)}
    rounded = checkpoint.tensor_digest(saved(folder, tmp_path / "bf16", half))
    assert rounded != same
    assert checkpoint.tensor_digest(saved(folder, tmp_path / "f32", back)) == rounded
    assert checkpoint.tensor_digest(saved(folder, tmp_path / "mixed", mixed)) == rounded
    ten_bits = {name: tensor.to(torch.float16) for name, tensor in state.items()}
    as_f16 = checkpoint.tensor_digest(saved(folder, tmp_path / "f16", ten_bits))
    assert as_f16 not in (same, rounded)
    widened = {name: tensor.to(torch.float32) for name, tensor in ten_bits.items()}
    assert checkpoint.tensor_digest(saved(folder, tmp_path / "widened", widened)) == as_f16

    zero, negative = dict(state), dict(state)
    zero["model.norm.weight"] = torch.zeros(32)
    negative["model.norm.weight"] = -torch.zeros(32, dtype=torch.bfloat16)
    assert checkpoint.tensor_digest(saved(folder, tmp_path / "zero", zero)) == checkpoint.tensor_digest(
        saved(folder, tmp_path / "negative", negative)
    )


def test_another_name_shape_or_bit_is_another_digest(make_checkpoint, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = make_checkpoint()
    state = load_file(folder / "model.safetensors")
    found = {checkpoint.tensor_digest(folder)}
    one_bit = {name: tensor.clone() for name, tensor in state.items()}
    one_bit["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[-1, -1] ^= 1
    turned = state | {"model.layers.0.mlp.up_proj.weight": state["model.layers.0.mlp.up_proj.weight"].reshape(32, 64)}
    renamed = {name.replace("q_proj", "r_proj"): tensor for name, tensor in state.items()}
    swapped = state | {
        "model.layers.0.self_attn.q_proj.weight": state["model.layers.0.self_attn.k_proj.weight"],
        "model.layers.0.self_attn.k_proj.weight": state["model.layers.0.self_attn.q_proj.weight"],
    }
    for number, changed in enumerate((one_bit, turned, renamed, swapped)):
        copies = {name: tensor.clone() for name, tensor in changed.items()}
        found.add(checkpoint.tensor_digest(saved(folder, tmp_path / str(number), copies)))
    assert len(found) == 5


def test_a_head_that_repeats_the_embedding_is_a_tied_one(make_checkpoint, tmp_path):
    from safetensors.torch import load_file

    tied = make_checkpoint(tie_word_embeddings=True)
    state = load_file(tied / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    untied = saved(edited(tied, tmp_path / "config", tie_word_embeddings=False), tmp_path / "untied", state)
    assert reasons(untied) == []
    assert checkpoint.tensor_digest(untied) == checkpoint.tensor_digest(tied)


def test_a_digest_is_made_of_whole_pieces(make_checkpoint, tmp_path):
    """A tensor of more than one piece, in which the second alone needs all its bits."""
    import torch

    values = torch.ones(1025, 1024)
    shapes = [values, values.clone()]
    shapes[1][1024, 7] = 1 + 2**-20
    digests = [checkpoint.tensor_digest(saved(make_checkpoint(), tmp_path / str(n), {"x": v})) for n, v in enumerate(shapes)]
    narrow = checkpoint.tensor_digest(saved(make_checkpoint(), tmp_path / "bf16", {"x": values.to(torch.bfloat16)}))
    assert digests[0] == narrow != digests[1]
