"""What it costs to refuse or to admit a model by its metadata: bytes over the wire, requests, seconds, for a 14 GB model.

    python tests/bench/inspection.py [--times 5]

Makes a Llama of 6.8e9 parameters as it lies on a Hub, its weight files sparse (the few spans of weights that are read are
zeros), in one file and in three, and serves them from a loopback Hub over HTTP. Two tables: what a validator asks for stage
by stage, and what it has asked for in all when it says no, by the product's own way (`examination.inspect`, with a store
that is empty at first). Times depend on the machine; bytes and requests do not: tests/test_inspection_costs.py keeps them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sn29 import examination, telemetry
from sn29.errors import Rejected
from sn29.examination import Entrant, Machine, Ports, Rules
from sn29.hub import Hub
from sn29.localnet.git_objects import GitRepository, pointer
from sn29.localnet.hub import LoopbackHub
from sn29.models import checkpoint
from sn29.records import Commitment, Head, ModelFacts, ModelId, Outcome, Window
from sn29.rules.competition import HallOfFame, violations
from sn29.rules.schedule import in_force, parse_file
from sn29.rules.selection import Claim, Inspected, first_claims
from sn29.store import Store

BLOCK = 1000
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
        if change == "padded":
            header["__metadata__"] = {"x": "y" * 25_000}
            header["extra"] = header.pop(mine[-1])
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
    """That the Hub sent, headers and redirects not counted."""
    seconds: float


class Validator:
    """One that looks at commitments on a Hub, as a round does; its store is new each time it is asked to forget."""

    def __init__(self, served: LoopbackHub, folder: Path) -> None:
        self._served, self._folder, self._stores = served, folder, 0
        file = parse_file("c00", (REPOSITORY / "competitions" / "c00.yaml").read_text())
        self._competition = in_force(file, BLOCK)
        hall = HallOfFame(max_fraction=0.0, decay_per_epoch=0.995, blocks_per_epoch=361, entries=())
        self._rules = Rules({"c00": file}, hall, {})
        self._machine = Machine(folder / "models", folder / "records", "cpu", "float32", 1, 60.0, 60.0)
        self.forget()

    def forget(self) -> None:
        self._stores += 1
        self.store = Store(self._folder / f"store-{self._stores}.db")
        self._hub = Hub(self._served.endpoint)
        self._ports = Ports(None, self._hub, self.store, None, None, self._machine, None)  # type: ignore[arg-type]

    def listing(self, model: ModelId) -> str:
        return f"{len(self._hub.listing(model).files)} files"

    def config(self, model: ModelId) -> str:
        """All that costs no header."""

        class Enough(Exception):
            pass

        def accept(facts: ModelFacts) -> None:
            self._accept(facts)
            raise Enough

        listing = self._hub.listing(model)
        with contextlib.suppress(Enough):
            checkpoint.inspect(listing, self._hub.reader(listing), accept)
        return "allowed by its config"

    def metadata(self, model: ModelId) -> str:
        listing = self._hub.listing(model)
        return f"{checkpoint.inspect(listing, self._hub.reader(listing), self._accept).num_parameters:,} parameters"

    def _accept(self, facts: ModelFacts) -> None:
        for violation in violations(self._competition, facts, 100_276):
            raise violation

    def inspect(self, model: ModelId, block: int = 100, earlier: Mapping[str, Claim] = MappingProxyType({})) -> str:
        """What a round would say of a commitment to it."""
        hotkey = f"5{model.name}"
        content = checkpoint.content_id(Hub(self._served.endpoint).listing(model).files)
        self._served.served.clear()  # that was the miner's
        commitment = Commitment(hotkey, block, model, checkpoint.digest(content, hotkey), "c00")
        window = Window("c00", 1, Head(BLOCK, "0x" + "0" * 64))
        found = asyncio.run(
            examination.inspect(self._ports, self._rules, self._competition, window, commitment, 100_276, earlier=earlier)
        )
        if isinstance(found, Outcome):
            return f"{found.reason}: {found.detail[:100]}"
        if not isinstance(found, Entrant):
            return "copy: its files are known"
        return f"allowed: {found.facts.num_parameters:,} parameters"

    def claims(self, model: ModelId) -> Mapping[str, Claim]:
        """That somebody has the files of this model from block 50 on."""
        files = Hub(self._served.endpoint).listing(model).files
        mine = Commitment("5first", 50, model, "", "c00")
        return first_claims([Inspected(mine, checkpoint.content_id(files), (checkpoint.weights_id(files),))], {}).claims


def measured(served: LoopbackHub, look: Callable[[], str], before: Callable[[], None], times: int) -> Cost:
    """The same look several times, each after `before`; the median time."""
    took, said, rows = [], "", []
    for _ in range(times):
        before()
        served.served.clear()
        started = time.perf_counter()
        try:
            said = look()
        except Rejected as error:
            said = f"{error.reason.code}: {error.where} {error.got[:60]}"
        took.append(time.perf_counter() - started)
        rows = [row for row in served.served if row.path]
    return Cost(said, len(rows), sum(row.num_bytes for row in rows), statistics.median(took))


def stages(served: LoopbackHub, validator: Validator, model: ModelId, times: int) -> dict[str, Cost]:
    """What each stage asks for alone: what is asked for until then, less what was until the one before."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("listing", lambda: validator.listing(model)),
        ("config.json", lambda: validator.config(model)),
        ("headers and index", lambda: validator.metadata(model)),
        ("weights, ranged reads", lambda: validator.inspect(model)),
    ]
    found, before = {}, Cost("", 0, 0, 0.0)
    for name, look in looks:
        cost = measured(served, look, validator.forget, times)
        alone = Cost(cost.said, cost.requests - before.requests, cost.num_bytes - before.num_bytes, cost.seconds - before.seconds)
        found[name], before = alone, cost
    found["every later round"] = measured(served, lambda: validator.inspect(model), lambda: None, times)
    return found


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
    yield "a tensor renamed, and as long a header as may be", with_config({}, 1, "padded")
    yield "a header of 2 MB", with_config({}, 1, "bloated")
    wrong = with_config({}, 3)
    index = json.loads(wrong["model.safetensors.index.json"])  # type: ignore[arg-type]
    index["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    yield "an index that leads elsewhere", {**wrong, "model.safetensors.index.json": json.dumps(index, indent=2).encode()}


@dataclass(frozen=True, slots=True)
class Costs:
    """All that the command prints."""

    num_bytes: int
    """Of the model."""
    stages: Mapping[str, Mapping[str, Cost]]
    """Of an honest model, in one file and in three."""
    verdicts: Mapping[str, Cost]
    """In all, by what is wrong with the model."""


def measure(folder: Path, times: int) -> Costs:
    with LoopbackHub(folder / "hub") as served:
        models = {what: publish(served, folder / "hub", f"case-{n}", files) for n, (what, files) in enumerate(cases())}
        validator = Validator(served, folder)
        honest = [what for what in models if what.startswith("honest")]
        validator.inspect(models[honest[0]])  # what is made once by a process is no model's cost
        by_stage = {what: stages(served, validator, models[what], times) for what in honest}
        verdicts = {
            what: measured(served, lambda model=model: validator.inspect(model), validator.forget, times)  # type: ignore[misc]
            for what, model in models.items()
        }
        first = models[honest[0]]
        claims = validator.claims(first)
        verdicts["an exact copy"] = measured(served, lambda: validator.inspect(first, earlier=claims), validator.forget, times)
        size = sum(f.size for f in Hub(served.endpoint).listing(first).files)
    return Costs(size, by_stage, verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    telemetry.configure(level="ERROR")
    with tempfile.TemporaryDirectory(prefix="sn29-inspection-") as folder:
        costs = measure(Path(folder), times)
    print(f"a model of {costs.num_bytes / 1e9:.1f} GB; requests and bytes as the Hub counts them, redirects included\n")
    for what, found in costs.stages.items():
        print(f"| {what}: each stage alone | requests | bytes | seconds |\n|---|---|---|---|")
        for stage, cost in found.items():
            print(f"| {stage} | {cost.requests} | {cost.num_bytes:,} | {cost.seconds:.3f} |")
        print()
    print("| what, in all | said | requests | bytes | seconds |\n|---|---|---|---|---|")
    for what, cost in costs.verdicts.items():
        print(f"| {what} | {cost.said} | {cost.requests} | {cost.num_bytes:,} | {cost.seconds:.3f} |")
    most = max(costs.verdicts.values(), key=lambda c: c.num_bytes)
    print(f"\nlargest: {most.num_bytes:,} bytes; slowest: {max(c.seconds for c in costs.verdicts.values()):.3f} s")


if __name__ == "__main__":
    main()
