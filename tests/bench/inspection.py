"""What it costs to refuse or to admit a model by its metadata: bytes over the wire, requests, seconds, for a 14 GB model.

    python tests/bench/inspection.py [--times 5]

Not a test: times depend on the machine. Makes a Llama of 6.7e9 parameters as it lies on a Hub, its weight files sparse (no
weight is ever read), in one file and in three, serves them from a loopback Hub over HTTP and inspects them through the
product's own adapter. A row for each rule that metadata can show: what a validator fetches before it says no.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sn29.errors import Rejected
from sn29.hub import Hub
from sn29.localnet.git_objects import GitRepository, pointer
from sn29.localnet.hub import LoopbackHub
from sn29.models import checkpoint
from sn29.records import ModelFacts, ModelId
from sn29.rules.competition import parse_competition, violations

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100_352, "hidden_size": 4096,
    "intermediate_size": 10_752, "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 100_257, "eos_token_id": 100_257,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "transformers_version": "5.23.0",
}  # fmt: skip
Files = dict[str, bytes | tuple[bytes, int]]
"""Path -> content, or for weights (header with its length, size of the file)."""


def weights(config: Mapping[str, Any], shards: int, change: str = "") -> Files:
    """Headers of a checkpoint of this config in bfloat16, tensors dealt out in order; `change` spoils the last file's."""
    shapes = checkpoint.expected_tensors(checkpoint.parse_config(json.dumps(config).encode()))
    names, files = sorted(shapes), Files()
    index: dict[str, str] = {}
    for shard in range(shards):
        path = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        index.update(dict.fromkeys(mine, path))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in mine:
            size, shape = 2 * math.prod(shapes[name]), list(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        if change == "transposed" and shard == shards - 1:
            header["model.embed_tokens.weight" if shards == 1 else mine[1]]["shape"].reverse()
        if change == "renamed" and shard == shards - 1:
            header["extra"] = header.pop(mine[-1])
        if change == "bloated":
            header["__metadata__"] = {"x": "y" * 1_900_000}
        text = json.dumps(header, separators=(",", ":")).encode()
        files[path] = (len(text).to_bytes(8, "little") + text, 8 + len(text) + at)
    if shards > 1:
        total = {"metadata": {"total_size": at}, "weight_map": index}
        files["model.safetensors.index.json"] = json.dumps(total, indent=2).encode()
    return files


def publish(hub: LoopbackHub, folder: Path, name: str, files: Files) -> ModelId:
    """A repository on the loopback Hub's disk, without an upload: sparse large files cannot be sent."""
    git = GitRepository(folder / f"repos/models/bench/{name}.git")
    git.init()
    blobs = {}
    for number, (path, content) in enumerate(sorted(files.items())):
        if isinstance(content, bytes):
            blobs[path] = git.add_blob(content)
            continue
        data, size = content
        oid = f"{number:02x}" + "0" * 62
        blobs[path] = git.add_blob(pointer(oid, size))
        git.large_file(oid).parent.mkdir(parents=True)
        with git.large_file(oid).open("wb") as out:
            out.write(data)
            out.truncate(size)
    (git.folder / "hub.json").write_text('{"private": false, "gated": false}')
    return ModelId("bench", name, git.commit(blobs, None, "bench", 0, "model"))


@dataclass(frozen=True, slots=True)
class Cost:
    said: str
    requests: int
    num_bytes: int
    seconds: float


def inspected(served: LoopbackHub, model: ModelId, *, copy: bool, times: int) -> Cost:
    """A validator's inspection, several times; the median time."""
    competition = parse_competition("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
    hub, said, took = Hub(served.endpoint), "", []

    def accept(facts: ModelFacts) -> None:
        for violation in violations(competition, facts, 100_276):
            raise violation

    served.served.clear()
    for _ in range(times):
        started = time.perf_counter()
        try:
            listing = hub.listing(model)
            if copy:  # what is known of the content is known by its id: nothing else is asked for
                said = checkpoint.content_id(listing.files)[:12]
            else:
                said = f"allowed: {checkpoint.inspect(listing, hub.reader(model), accept).num_parameters:,} parameters"
        except Rejected as error:
            said = f"{error.reason.code}: {error.where} {error.got[:60]}"
        took.append(time.perf_counter() - started)
    rows = list(served.served)
    return Cost(said, len(rows), sum(row.num_bytes for row in rows), statistics.median(took))


def cases() -> Iterator[tuple[str, Files]]:
    """What is published under which name."""

    def with_config(change: Mapping[str, Any], shards: int = 1, spoil: str = "") -> Files:
        return {**weights(CONFIG, shards, spoil), "config.json": json.dumps({**CONFIG, **change}, indent=2).encode()}

    yield "honest, one file", with_config({})
    yield "honest, three files", with_config({}, 3)
    yield "a pickle beside it", {**with_config({}), "pytorch_model.bin": b"x"}
    yield "two sets of weights", {**with_config({}, 3), **weights(CONFIG, 1)}
    yield "one config key too many", with_config({"is_causal": False})
    yield "another class", with_config({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    yield "too many parameters", with_config({"num_hidden_layers": 60})
    yield "too few embedding rows", with_config({"vocab_size": 100_000, "bos_token_id": 0})
    yield "a tensor renamed, one file", with_config({}, 1, "renamed")
    yield "a tensor transposed, last of three", with_config({}, 3, "transposed")
    yield "another width than the config", with_config({"intermediate_size": 10_496})
    yield "a header of 2 MB", with_config({}, 1, "bloated")
    wrong = with_config({}, 3)
    index = json.loads(wrong["model.safetensors.index.json"])  # type: ignore[arg-type]
    index["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    yield "an index that leads elsewhere", {**wrong, "model.safetensors.index.json": json.dumps(index, indent=2).encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory(prefix="sn29-inspection-") as folder, LoopbackHub(Path(folder)) as served:
        published = [(f"case-{n}", *case) for n, case in enumerate(cases())]
        models = {what: publish(served, Path(folder), name, files) for name, what, files in published}
        costs = {what: inspected(served, model, copy=False, times=times) for what, model in models.items()}
        first = next(iter(models))
        costs["known content, from its listing alone"] = inspected(served, models[first], copy=True, times=times)
        size = sum(f.size for f in Hub(served.endpoint).listing(models[first]).files)
    print(f"a model of {size / 1e9:.1f} GB; requests and bytes as the Hub counts them, redirects included\n")
    print("| what | said | requests | bytes | seconds |\n|---|---|---|---|---|")
    for what, cost in costs.items():
        print(f"| {what} | {cost.said} | {cost.requests // times} | {cost.num_bytes // times:,} | {cost.seconds:.3f} |")
    worst = max(costs.values(), key=lambda c: c.num_bytes)
    print(f"\nlargest: {worst.num_bytes // times:,} bytes; slowest: {max(c.seconds for c in costs.values()):.3f} s")


if __name__ == "__main__":
    main()
