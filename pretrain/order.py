"""The order of training windows: a function of (seed, position) alone, in constant memory.

Position g counts the sequences that the run has consumed. Epoch g // n visits each of the n windows once, in the order
of a keyed permutation of 0..n-1 that is evaluated point by point (a Feistel network with cycle walking), so any rank
can compute its own indices and resuming needs no state beyond g.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
"""Rounds of the network. Four already give a pseudorandom permutation (Luby and Rackoff); two more cost 30 ns each."""


def window_order(positions: NDArray[np.int64], num_windows: int, *, seed: int) -> NDArray[np.int64]:
    """Window index for each position; `positions` int64 of any shape, result the same shape, values < num_windows."""
    assert num_windows > 0
    epochs, offsets = np.divmod(positions, num_windows)
    windows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(offsets[chosen], num_windows, key=f"{seed}/{epoch}")
    return windows


def permute(index: NDArray[np.int64], size: int, *, key: str) -> NDArray[np.int64]:
    """Image of each `index` (< size) under the bijection of 0..size-1 that `key` selects."""
    bits = max(2, (size - 1).bit_length())
    half = np.uint64((bits + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(f"{key}/more".encode()).digest()
    round_keys = np.frombuffer(digest[: 8 * ROUNDS], dtype="<u8")
    values = np.asarray(index, dtype=np.uint64).copy()
    pending = np.ones(values.shape, dtype=bool)
    # The network permutes a power of four that holds `size` (at most 4 x larger): values that land outside walk on.
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[pending] = (left << half) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64-bit finaliser (splitmix64): every output bit depends on every input bit. Wraps modulo 2^64 by intention."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
