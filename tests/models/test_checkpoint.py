from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sn29.errors import Reason, Rejected
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


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "\udcff", '{"a":' * 5000, '"x"'])
def test_a_config_that_is_no_json_object_is_refused(text):
    with pytest.raises(Rejected) as refused:
        checkpoint.parse_config(text.encode(errors="surrogateescape"))
    assert refused.value.reason is Reason.BAD_CONFIG


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_evil.py", "adapter_config.json", "sub/config.json", "x.safetensors"]
)
def test_a_file_that_no_model_needs_is_refused(name, make_checkpoint, tmp_path):
    folder = edited(make_checkpoint(), tmp_path / "edited")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(Rejected) as refused:
        inspect(folder)
    assert (refused.value.reason, refused.value.got) == (Reason.FORBIDDEN_FILE, name)


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

    files = [RepoFile("config.json", len(config), "git:" + "a" * 40)]
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
