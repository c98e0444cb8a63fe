"""Counter-based randomness: every draw is a stateless hash of what it is for.

A generator that is advanced by use makes a draw depend on everything drawn before it. Here a draw
depends only on its key (seed, episode, position, ...), so an episode is the same in any row, any
batch and any order. The hash is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators"), folded over the parts of the key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(*parts: Any) -> NDArray[np.uint64]:
    """Hash broadcastable integer arrays into 64 bits, element by element.

    Args:
        *parts: Integers or integer arrays, broadcast against each other. Negative and larger
            integers count modulo 2**64. Their order matters.

    Returns:
        `uint64` array of the broadcast shape (a 0-d array for scalars).
    """
    with np.errstate(over="ignore"):
        h: Any = np.uint64(GOLDEN)
        for part in parts:
            h = (_as_uint64(part) ^ h) + np.uint64(GOLDEN)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
            h = (h ^ (h >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
            h = h ^ (h >> np.uint64(31))
    return np.asarray(h, np.uint64)


def uniform53(h: Any) -> NDArray[np.float64]:
    """Turn 64-bit hashes into uniform numbers in [0, 1) from their top 53 bits."""
    return (np.asarray(h, np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*parts: Any) -> np.random.Generator:
    """Make a NumPy generator of its own for a key of integers."""
    return np.random.default_rng(int(mix64(*parts)))


def _as_uint64(part: Any) -> NDArray[np.uint64]:
    if isinstance(part, int):
        return np.asarray(part & 0xFFFFFFFFFFFFFFFF, np.uint64)
    array = np.asarray(part)
    if array.dtype.kind not in "iub":
        raise TypeError(f"mix64 hashes integers, got an array of {array.dtype}: {part!r}")
    return array.astype(np.uint64)
