"""A chain node on this machine: the JSON-RPC of a real one, over a websocket, in front of the embedded chain's file.

State and rules are the ledger's (sn29/localnet); here is only what a wire needs: SCALE bytes by real runtime metadata,
signatures, the transaction pool, inclusion and finality as a client sees them, and the faults of a real network. The
unmodified SDK and `btcli` talk to it. `python -m tests.loopback_node CHAIN --port 0` runs one as a process.
"""

from .faults import Faults, Traffic
from .node import LoopbackNode

__all__ = ["Faults", "LoopbackNode", "Traffic"]
