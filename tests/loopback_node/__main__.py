"""`python -m tests.loopback_node CHAIN`: a node as a process; prints its address, ends with its standard input or a signal."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from . import LoopbackNode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.loopback_node", description=__doc__)
    parser.add_argument("chain", type=Path, help="the chain's file, made by Ledger.create")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--without", action="append", default=[], metavar="PALLET.ITEM", help="a storage item the runtime lacks")
    parser.add_argument("--beacon", action="store_true", help="with the tests' drand beacon, for commit-reveal weights")
    parser.add_argument("--detached", action="store_true", help="stay when standard input ends")
    arguments = parser.parse_args()
    beacon = None
    if arguments.beacon:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from beacon import TestBeacon

        beacon = TestBeacon()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with LoopbackNode(arguments.chain, port=arguments.port, beacon=beacon, without=arguments.without) as node:
        print(node.url, flush=True)
        if not arguments.detached:
            threading.Thread(target=_wait_for_the_end_of_input, args=(stop,), daemon=True).start()
        stop.wait()


def _wait_for_the_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
