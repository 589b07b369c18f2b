"""What one pass of a validator asks of a node: requests, bytes, and round trips one after another; ours beside the SDK's.

    python tests/bench/chain.py [--neurons 256] [--commitments 250]

Over the loopback node (tests/loopback_node), with the chain's real metadata. "In a row" is how many answers had to be
waited for one after another: the time of the pass, less the time without delay, over a delay that the node adds to each.
The naive pass is the SDK's own way: metagraph, hyperparameters, commitments, `execute(SetWeights)`. Both set the same row.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from beacon import install  # noqa: E402

install()

import bittensor as bt  # noqa: E402
from bittensor.keyfiles import Keypair  # noqa: E402
from chain_net import NETUID, Net  # noqa: E402

from sn29.chain import Chain  # noqa: E402
from sn29.localnet.ledger import Call  # noqa: E402
from sn29.records import Weights  # noqa: E402

DELAY_S = 0.1
Step = tuple[str, Callable[[], Awaitable[Any]]]


def populated(folder: Path, neurons: int, commitments: int) -> tuple[Net, list[Any], list[str]]:
    """A chain with two validators and miners with commitments; the validators' wallets and the miners' hotkeys."""
    net = Net(folder, node=True, block_seconds=0.5, weights_rate_limit=0, tempo=360)
    validators = [net.wallet(name, permit=True) for name in ("ours", "naive")]
    miners = [Keypair.create_from_uri(f"//miner {i}").ss58_address for i in range(neurons - len(validators))]
    for miner in miners:
        net.ledger.register(miner, miner, stake=1)
    net.ledger.advance(1)
    for i, miner in enumerate(miners[:commitments]):
        data = f"somebody{i:03}:some-model-{i:03}:{i:040x}:{'q' * 43}=:c00".encode()
        info = {"fields": [{f"Raw{len(data)}": "0x" + data.hex()}]}
        net.ledger.include(Call("Commitments", "set_commitment", {"netuid": NETUID, "info": info}), miner, 0)
    net.ledger.advance(5)
    return net, validators, miners


def our_pass(chain: Chain, weights: Weights) -> list[Step]:
    block = 0

    async def finalized() -> None:
        nonlocal block
        block = (await chain.finalized()).block

    return [
        ("head", chain.head),
        ("finalized block", finalized),
        ("settings", lambda: chain.params(block)),
        ("metagraph", lambda: chain.metagraph(block)),
        ("commitments", lambda: chain.commitments(block)),
        ("set of weights", lambda: chain.set_weights(weights, version_key=1)),
    ]


def naive_pass(client: Any, wallet: Any, row: dict[int, float]) -> list[Step]:
    block = 0

    async def finalized() -> None:
        nonlocal block
        block = await client.finalized_block()

    return [
        ("head", client.block),
        ("finalized block", finalized),
        ("settings", lambda: client.read("subnet_hyperparameters", netuid=NETUID)),
        ("metagraph", lambda: client.subnets.metagraph(NETUID, block=block)),
        ("commitments", lambda: client.subnets.commitments(NETUID, block=block)),
        ("set of weights", lambda: client.execute(bt.SetWeights(netuid=NETUID, weights=row, version_key=1), wallet)),
    ]


async def measured(node: Any, connect: Step, steps: list[Step]) -> list[tuple[str, int, int, int]]:
    """Of each step: name, requests, bytes both ways, answers waited for in a row (for the set: with what it waits for)."""
    rows = []
    for name, step in [connect, *steps]:
        node.traffic.reset()
        node.faults.delay_s = DELAY_S
        began = time.monotonic()
        await step()
        spent = time.monotonic() - began
        node.faults.delay_s = 0.0
        traffic = node.traffic
        rows.append((name, traffic.total, traffic.bytes_in + traffic.bytes_out, round(spent / DELAY_S)))
    return rows


async def compare(net: Net, wallets: list[Any], miners: list[str]) -> None:
    weights = {miner: float(i + 1) for i, miner in enumerate(miners[:64])}
    node = net.node
    assert node is not None
    chain = net.chain(wallets[0])
    ours = await measured(node, ("connection", chain.open), our_pass(chain, Weights(0, weights)))
    uids = (await chain.metagraph()).uid_of()
    await chain.close()
    client = bt.Client(node.url)
    row = {uids[miner]: weight for miner, weight in weights.items()}
    naive = await measured(node, ("connection", client.connect), naive_pass(client, wallets[1], row))
    await client.close()
    print(f"{'':18}{'requests':>20}{'bytes':>22}{'in a row':>20}")
    print(f"{'':18}" + f"{'ours':>10}{'SDK':>10}" * 3)
    for mine, theirs in zip(
        [*ours, ("together", *(sum(r[i] for r in ours) for i in (1, 2, 3)))],
        [*naive, ("together", *(sum(r[i] for r in naive) for i in (1, 2, 3)))],
        strict=True,
    ):
        print(f"{mine[0]:18}" + "".join(f"{mine[i]:>10,}{theirs[i]:>10,}" for i in (1, 2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=256)
    parser.add_argument("--commitments", type=int, default=250)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BITTENSOR_RUNTIME_CACHE_DIR"] = str(Path(folder) / "runtime")
        os.environ["BTCLI_TOKEN_SYMBOLS_CACHE"] = str(Path(folder) / "symbols.json")
        net, wallets, miners = populated(Path(folder), arguments.neurons, arguments.commitments)
        assert net.node is not None
        with net.node as node:
            asyncio.run(Chain(NETUID, network=node.url).open())  # the metadata is fetched once and kept on disk
            asyncio.run(compare(net, wallets, miners))


if __name__ == "__main__":
    main()
