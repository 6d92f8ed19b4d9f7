"""Random numbers as pure functions of what they are for: nothing is drawn in an order that had to be replayed."""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.hashing import derive_seed

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]


def splitmix64(x: UInt64Array) -> UInt64Array:
    """Steele, Lea and Flood, 2014: every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = x ^ (x >> np.uint64(31))
    return mixed


def uniforms(seed: int, purpose: str, *counters: Any) -> Float64Array:
    """Numbers in [0, 1), one for each tuple of counters; each purpose has its own.

    Args:
        counters: arrays of integers, or integers, that broadcast to the shape of the result.
    """
    state = np.asarray(derive_seed(seed, purpose), dtype=np.uint64)
    with np.errstate(over="ignore"):  # numpy warns of wrapping where it is not an array that wraps
        for counter in counters:
            state = splitmix64(state ^ splitmix64(np.asarray(counter).astype(np.uint64)))
    numbers: Float64Array = (state >> np.uint64(11)).astype(np.float64) / 2.0**53  # so never 1.0
    return numbers
