"""sn29: the node software of Bittensor subnet 29, and the research tool of the subnet."""

__version__ = "0.1.0"
