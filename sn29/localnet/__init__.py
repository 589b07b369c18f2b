"""A whole subnet on one machine: chain, Hub and text behind the adapters that production uses."""
