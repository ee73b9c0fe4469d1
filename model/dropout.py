"""Dropout whose mask is a function of where the value sits, never of rank, call order or random state.

The mask bit of an element depends on (seed, site, global sequence index, token, feature) alone. The global sequence
index counts every sequence of the run, so it also tells the step. Two layouts, a recomputed block and a resumed run
therefore draw the same masks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.hashing import number_of

PIECE = 2**18
"""Values that a CPU hashes at a time: 1 MB, which stays in the cache, and which no allocator gives back."""


def site_key(seed: int, site: str) -> int:
    """A 63-bit key for one place in the model, e.g. `blocks.3.attention`: stable across runs and Python versions."""
    return number_of(f"{seed}/{site}") >> 1


class Draw(NamedTuple):
    """Which mask of a tensor [B, T, columns, ...]: that of one place in the model, for these sequences."""

    probability: float
    """Of a zero, in [0, 1)."""
    key: int
    """`site_key` of the place."""
    sequence_index: Tensor
    """[B] int64: index of each sequence in the whole run."""
    first_token: int = 0
    """Place in the sequence of the tensor's first token, if a rank holds some of the tokens."""
    columns: tuple[int, slice] | None = None
    """(number of all columns, slice of those in the tensor), if a rank holds some of the columns. A slice may reach
    beyond them: what stands there is filled up with zeros, whatever the mask."""

    def held(self, columns: int) -> tuple[int, int]:
        """How many columns there are in all, and which is the first of a tensor of `columns`."""
        if self.columns is None:
            return columns, 0
        width, held = self.columns
        # Not held.indices(width): torch 2.11 cannot compile that.
        first, last = held.start or 0, width if held.stop is None else held.stop
        assert held.step is None and last - first == columns, f"{columns} columns are not {held} of {width}"
        return width, first

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Bool mask of `shape` [B, T, columns, ...]: the specification of every backend."""
        width, first = self.held(shape[2])
        mask = keep_mask(
            probability=self.probability,
            key=self.key,
            sequence_index=self.sequence_index,
            shape=(*shape[:2], width, *shape[3:]),
            first_token=self.first_token,
        )
        found = mask[:, :, first : first + shape[2]]
        beyond = shape[2] - found.shape[2]
        return found if beyond == 0 else torch.cat([found, found.new_zeros(*shape[:2], beyond, *shape[3:])], dim=2)


def keep_mask(
    *, probability: float, key: int, sequence_index: Tensor, shape: tuple[int, ...], first_token: int = 0
) -> Tensor:
    """Boolean mask, True with probability 1 - `probability`.

    `sequence_index` [B] int64: index of each sequence in the whole run. `shape` is [B, ...]: the remaining axes are
    token and feature (or head, expert), numbered in row-major order. Returns a bool tensor of `shape`: the rows of the
    sequence's mask from `first_token` on, of which nothing else is computed.
    The probability is met to 2^-24; the mixing is two rounds of a 32-bit multiply-xorshift hash.
    """
    device = sequence_index.device
    per_token = math.prod(shape[2:])
    first, last = first_token * per_token, (first_token + shape[1]) * per_token
    counter = torch.arange(first, last, dtype=torch.int64, device=device).to(torch.int32)
    low, high = sequence_index.to(torch.int32), (sequence_index >> 32).to(torch.int32)
    sequence = _mix(_mix(low ^ signed(key)) ^ high ^ signed(key >> 32))[:, None]
    at_once = max(1, PIECE // max(1, len(sequence)) if device.type == "cpu" else len(counter))
    threshold = round(probability * 2**24)
    pieces = [_shifted(_mix(_mix(part) ^ sequence), 8).ge(threshold) for part in counter.split(at_once)]
    return (torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]).view(shape)


def signed(value: int) -> int:
    """The int32 of the same bits as the lowest 32 of `value`."""
    return ((value + 2**31) & 0xFFFFFFFF) - 2**31


def _mix(x: Tensor) -> Tensor:
    """Bijective hash of 32-bit values held in int32, whose products wrap. Changes `x`, which nobody else may hold."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= _shifted(x, shift)
        x *= signed(factor)
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x` without its lowest `bits`, zeros above: the shift alone copies the sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
