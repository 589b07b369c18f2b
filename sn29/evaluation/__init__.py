"""Losses of single samples under strangers' models: the engine that computes them, the child process that it runs in."""
