"""Training speeds that others have measured and published, to hold a plan against.

Source: mosaicml/llm-foundry (Apache License 2.0), scripts/train/benchmarking/README.md at commit
061f2c7ce64e655100286584a7629e2a09f827ba, the rows of 8 GPUs of its tables "H100 80GB BF16", "A100 80GB with 1600 Gbps" and
"A100 40GB with 1600 Gbps": MPT models (no biases, tied head, 50,368 tokens) under FSDP. Copied are model, row length, rows of
a micro-batch, whether activations are computed again, and tokens per second and GPU; the row of the 125m model that stands
there twice is here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SOURCE = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, commit 061f2c7 (Apache-2.0)"
GPUS = 8
HELD_OUT = "a100-40gb"
"""Device whose rows nothing was fitted on."""
_MPT = {
    "125m": (768, 12), "350m": (1024, 24), "760m": (1536, 24), "1b": (2048, 24), "3b": (2560, 32), "7b": (4096, 32),
    "13b": (5120, 40), "30b": (7168, 48),
}  # fmt: skip
"""Name -> width, layers. With 50,368 rows of embedding and a learned place each, its matrices give the table's NumParams."""

# device model: row tokens/rows of a micro-batch/r where activations are computed again = tokens per second and GPU
_ROWS = """
a100 125m: 512/128=165681 1024/64=156468 2048/32=141737 4096/16=118396 8192/8=90392 16384/4=60040 32768/2=36407 65536/1=20368
a100 350m: 512/128=69330 1024/64=64813 2048/32=58782 4096/16=49555 8192/8=36569 16384/4=23559 32768/2=13652 65536/1=7524
a100 760m: 512/96=29446 1024/48=29765 2048/24=32434 4096/12=27351 8192/6=20933 16384/3=14274 32768/1=8802 65536/1/r=4143
a100 1b: 512/56=23148 1024/18=22112 2048/14=20513 4096/7=17807 8192/3=13814 16384/2=9956 32768/1=6275 65536/1/r=3044
a100 3b: 512/40=12127 1024/20=11580 2048/10=10811 4096/5=9457 8192/3=7695 16384/1=5529 32768/3/r=3029 65536/1/r=1767
a100 7b: 1024/64/r=4357 2048/6=4641 4096/16/r=3684 8192/8/r=3206 16384/4/r=2453 32768/2/r=1672 65536/1/r=1013
a100 13b: 1024/40/r=2330 2048/2=2262 4096/10/r=2060 8192/5/r=1795 16384/3/r=1431 32768/1/r=1016
a100 30b: 512/12/r=967 1024/6/r=946 2048/3/r=916 4096/1/r=814 8192/1/r=574
a100-40gb 125m: 512/104=156735 1024/52=148289 2048/26=136334 4096/13=115162 8192/5=86858 16384/2=55484 32768/1=32651
a100-40gb 350m: 512/64=66284 1024/32=62523 2048/16=55995 4096/8=46833 8192/4=34933 16384/2=22896 32768/1=13416
a100-40gb 760m: 512/48=34938 1024/24=33422 2048/12=30173 4096/6=25863 8192/3=20106 16384/1=13914 32768/1/r=7183
a100-40gb 1b: 512/32=21782 1024/16=20959 2048/8=19271 4096/4=16856 8192/2=13474 16384/1=9715 32768/1/r=5095
a100-40gb 3b: 512/20=11324 1024/10=10731 2048/5=10065 4096/2=8777 8192/1=7149 16384/2/r=4465 32768/1/r=2955
a100-40gb 7b: 512/48/r=3895 1024/24/r=3854 2048/12/r=3679 4096/6/r=3366 8192/3/r=2887 16384/1/r=2249
a100-40gb 13b: 512/16/r=1763 1024/8/r=1727 2048/4/r=1668 4096/2/r=1603 8192/1/r=1407
h100 760m: 512/96=83749 1024/48=78581 2048/24=63147 4096/12=55459 8192/6=41825 16384/3=27815 32768/1=16291
h100 1b: 512/56=52275 1024/18=48910 2048/14=45455 4096/7=38535 8192/3=29157 16384/2=19649 32768/1=12025 65536/1/r=5506
h100 3b: 512/40=27965 1024/20=27046 4096/5=20964 8192/3=16578 16384/1=11152 32768/3/r=5873 65536/1/r=3262
h100 7b: 1024/64/r=10203 2048/6=10643 4096/16/r=8611 8192/8/r=6935 32768/2/r=3318 65536/1/r=1956
h100 13b: 1024/40/r=5502 2048/2=4792 4096/10/r=4717 16384/3/r=2985 32768/1/r=1976
h100 30b: 1024/6/r=2084 2048/3/r=2002 4096/1/r=1802 8192/1/r=1384
"""


@dataclass(frozen=True, slots=True)
class Published:
    """One row of the tables."""

    device: str
    model: str
    row_tokens: int
    rows: int
    """Of a micro-batch, on each GPU."""
    checkpointing: bool
    tokens_per_second: float
    """Of one GPU."""


def _read(text: str) -> tuple[Published, ...]:
    found = []
    for line in text.strip().splitlines():
        (device, model), entries = line.partition(":")[0].split(), line.partition(":")[2].split()
        for entry in entries:
            place, speed = entry.split("=")
            row_tokens, rows, *again = place.split("/")
            found.append(Published(device, model, int(row_tokens), int(rows), again == ["r"], float(speed)))
    return tuple(found)


ROWS: Sequence[Published] = _read(_ROWS)


def parameters_of(model: str) -> int:
    """Of one of its models, about: without places and norms. Raises KeyError for another name."""
    width, layers = _MPT[model]
    return 50_368 * width + 12 * layers * width**2


def mpt_config(model: str) -> dict[str, Any]:
    """The config.json of one of its models. Raises KeyError for another name."""
    width, layers = _MPT[model]
    return {
        "model_type": "mpt", "d_model": width, "n_layers": layers, "n_heads": width // 64 if width < 4096 else width // 128,
        "vocab_size": 50_368, "expansion_ratio": 4, "max_seq_len": 65_536,
    }  # fmt: skip


def lengths_of(device: str, model: str) -> list[Published]:
    """Rows of one device and model, the shortest first; the first is what the others are compared with."""
    found = [row for row in ROWS if (row.device, row.model) == (device, model)]
    return sorted(found, key=lambda row: row.row_tokens)
