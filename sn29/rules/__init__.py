"""The rules of the game, as pure functions: values in, values out. No I/O, no clock, no randomness, no torch.

`competition` is what a prize asks for, read from YAML; `selection` says which commitments are looked at and which are
copies; `scoring` turns losses into scores, and `weights` the scores of all competitions into weights.
"""

RULES_VERSION = 1
"""One more with every change of this software by which the same commitments and losses come to other weights: validators of
different versions judge no common round (see `sn29.changeover`)."""
