"""The order of training windows: a function of (seed, position) alone, in constant memory.

Position g counts the sequences that the run has consumed. Epoch g // n visits each of the n windows once, in the order
of a keyed permutation of 0..n-1 that is evaluated point by point (a Feistel network with cycle walking), so any rank
can compute its own indices and resuming needs no state beyond g.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from common.hashing import mix64, number_of

ROUNDS = 6
"""Rounds of the network. Four already give a pseudorandom permutation (Luby and Rackoff); two more cost 30 ns each."""


def window_order(
    positions: NDArray[np.int64], num_windows: int, *, seed: int | str, block_windows: int = 0, blocks: int = 1
) -> NDArray[np.int64]:
    """Window index for each position; `positions` int64 of any shape, result the same shape, values < num_windows.
    With `block_windows` > 0 the shuffle has two levels, see `permute_in_blocks`."""
    assert num_windows > 0
    epochs, offsets = np.divmod(positions, num_windows)
    windows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen, key = epochs == epoch, f"{seed}/{epoch}"
        windows[chosen] = (
            permute_in_blocks(offsets[chosen], num_windows, block_windows, blocks, key=key)
            if block_windows
            else permute(offsets[chosen], num_windows, key=key)
        )
    return windows


def permute_in_blocks(
    index: NDArray[np.int64], size: int, block_windows: int, blocks: int, *, key: str
) -> NDArray[np.int64]:
    """A bijection of 0..size-1 whose reads stay local: neighbouring windows form blocks, the blocks are shuffled, and
    the windows of each `blocks` consecutive ones of that order are shuffled together. So at most 2 x `blocks` blocks
    are read at a time. The first block begins at a different window for every key. If block_windows does not divide the
    size, the remaining windows join the last group."""
    block_windows = min(block_windows, size)
    num_blocks, group_windows = size // block_windows, blocks * block_windows
    first = number_of(f"{key}/first") % size
    groups, places = np.divmod(index, group_windows)
    windows = np.empty_like(index)
    for group in np.unique(groups).tolist():
        chosen = groups == group
        held = min(group_windows, size - group * group_windows)
        place = permute(places[chosen], held, key=f"{key}/{group}")
        of_group, within = np.divmod(place, block_windows)
        left_over = of_group >= held // block_windows
        block = permute(np.where(left_over, 0, group * blocks + of_group), num_blocks, key=f"{key}/blocks")
        windows[chosen] = np.where(left_over, num_blocks, block) * block_windows + within
    return (windows + first) % size


def permute(index: NDArray[np.int64], size: int, *, key: str) -> NDArray[np.int64]:
    """Image of each `index` (< size) under the bijection of 0..size-1 that `key` selects."""
    bits = max(2, (size - 1).bit_length())
    half = np.uint64((bits + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(f"{key}/more".encode()).digest()
    round_keys = np.frombuffer(digest[: 8 * ROUNDS], dtype="<u8")
    values = np.asarray(index, dtype=np.uint64).flatten()
    # The network permutes a power of four that holds `size` (at most 4 x larger): values that land outside walk on.
    walking = np.arange(values.size)
    while walking.size:
        left, right = values[walking] >> half, values[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right + round_key) & mask)
        moved = (left << half) | right
        values[walking] = moved
        walking = walking[moved >= np.uint64(size)]
    return values.astype(np.int64).reshape(np.shape(index))
