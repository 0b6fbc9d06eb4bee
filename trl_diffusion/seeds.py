"""Random streams that are addressed by what they are for."""

from __future__ import annotations


# Random streams of a training run.
TRAINING, EVALUATION, DRAWS, CHECKS, STORED, CHOICE, SUPERVISED = range(7)

_MASK64 = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """
    Mixes integers into one seed between 0 and 2**63 - 1 (SplitMix64 finaliser, chained), so that a random stream can
    be addressed by what it is for, such as `(seed, row, iteration)`, instead of by what was drawn before it.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (int(part) & _MASK64)) & _MASK64
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1
