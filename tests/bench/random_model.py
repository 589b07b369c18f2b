"""A model of random weights from a config.json, of any size: to see what a command takes in time and memory.

    python tests/bench/random_model.py config.json MODEL [--tokenizer tokenizer.json] [--seed 29]

Written in bfloat16, tensor by tensor; every matrix is normal with a deviation of 0.02, norms are 1. What it says is noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor

from sn29.errors import Sn29Error
from sn29.lab.weights import Card, Source, Weights, save, with_config
from sn29.models.config import expected_tensors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path, help="folder of the checkpoint: new, or empty")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json that is put beside it")
    parser.add_argument("--seed", type=int, default=29)
    asked = parser.parse_args()
    files = {"tokenizer.json": asked.tokenizer.read_bytes()} if asked.tokenizer else {}
    card = Card("Random weights", ("Noise.",), (Source(asked.config.name, f"seed {asked.seed}"),), " ".join(sys.argv), ())
    try:
        facts = save(weights(asked.config.read_bytes(), asked.seed), asked.out, card, files=files)
    except Sn29Error as error:
        print(f"random_model: {error}", file=sys.stderr)
        return 1
    print(f"{asked.out}: {facts.num_parameters:,} parameters")
    return 0


def weights(config_json: bytes, seed: int) -> Weights:
    """Raises Rejected as `parse_config`."""

    config, raw = with_config(json.loads(config_json), {})
    shapes = expected_tensors(config)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape, dtype=torch.bfloat16) if name.endswith("bias") else torch.ones(shape, dtype=torch.bfloat16)
        chance = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=chance)

    return Weights(config, raw, dict.fromkeys(shapes, "BF16"), read)


if __name__ == "__main__":
    sys.exit(main())
