"""The rules of the game, as pure functions: values in, values out. No I/O, no clock, no randomness, no torch.

`competition` is what a prize asks for, read from YAML; `selection` says which commitments are looked at and which are
copies; `scoring` turns losses into scores, and `weights` the scores of all competitions into weights.
"""
