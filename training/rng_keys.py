"""Counter-based random keys, which depend on the position in training and not on the process.

A key mixes all its parts instead of adding them up. Epoch 1 of seed 0 therefore differs from
epoch 0 of seed 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits for integers or integer arrays, which are broadcast.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014), applied after each part.
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(part) for part in parts)), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            bits = state ^ np.asarray(part).astype(np.uint64)
            bits = bits + _GOLDEN
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = bits ^ (bits >> np.uint64(31))
    return state


def seed_of(*parts: int) -> int:
    """Return a seed for ``torch.manual_seed`` from integers."""
    return int(mix(*parts)) >> 1  # torch takes a signed 64-bit seed
