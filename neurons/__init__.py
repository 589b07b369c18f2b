"""The two programs of the subnet, validator and miner, and the adapters that their settings ask for."""
