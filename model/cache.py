"""Keys and values of the tokens that were read, so that a new token costs one pass of itself (generation).

A layer keeps what attention reads of a token: H x head_dim keys and values of SwitchHead, after its value (and key)
experts, those of its K heads of keys and values of dense attention, one pair of width head_dim of MoA. Each is computed
once, when the token is new. Keys are kept after RoPE.

Token n of a text (from 0) sees what it saw in training, where texts are read in chunks of sequence_length = T tokens
with the last M = memory_length tokens before the chunk as memory: the tokens from max(0, floor(n / T) T - M) to n. So a
cache of M + T slots is enough for texts of any length, and token n has slot n mod (M + T). A model without memory reads
one chunk, T tokens at most. Rows of a batch are texts of their own, each with its own length.

With RoPE and a memory positions count from the first token of the memory, which moves from chunk to chunk: these keys
are kept before RoPE, and rotated whenever they are read.

Shape legend: R rows of the cache, B of them in a call, n new tokens of each, S slots, H heads, G heads of keys and
values (1 with MoA, num_kv_heads of dense attention), h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Rotation = Callable[[Tensor, Tensor], Tensor]
"""Rotates x [B, H, L, h] by RoPE of its positions [B, L]."""


class Places(NamedTuple):
    """Where the new tokens of one call stand and what they see; the same in every layer."""

    rows: Tensor
    """[B] int64: the rows of the cache that they belong to."""
    is_all: bool
    """Whether these are all rows, in order."""
    is_first: bool
    """Whether nothing is kept yet in these rows: then new tokens see each other alone."""
    positions: Tensor
    """[B, n] int64, in the text."""
    slots: Tensor
    """[B, n] int64."""
    read: int
    """How many slots are read, from the first on (S)."""
    distance: Tensor
    """[B, n, S] int64: how far before the new token the token of a slot stands, modulo the number of slots."""
    seen: Tensor
    """[B, 1, n, S] bool: whether it is seen."""
    starts: Tensor
    """[B, 1] int64: the first position that is seen."""


class KVCache:
    """What all layers keep of R texts."""

    def __init__(
        self,
        rotations: Sequence[Rotation | None],
        *,
        rows: int,
        chunk: int,
        memory: int,
        capacity: int | None = None,
    ) -> None:
        """`rotations`: of each layer, None where keys are kept as they are given. `capacity`: no text becomes longer
        than this; None: `memory` + `chunk` slots, which is never too few."""
        self.chunk, self.memory = chunk, memory
        self.slots = min(memory + chunk, capacity or memory + chunk)
        self.lengths = [0] * rows
        """Tokens that were read of each text."""
        self.layers = [LayerCache(self, rotation) for rotation in rotations]
        self.now: Places

    @property
    def limit(self) -> int | None:
        """Tokens that a text may have; None with memory: any number."""
        return None if self.memory else self.slots

    def room(self, row: int) -> int:
        """New tokens that one call may bring to a row: up to the end of its chunk."""
        assert self.limit is None or self.lengths[row] < self.limit, "the text is longer than the context"
        room = self.chunk - self.lengths[row] % self.chunk
        # Where slots are used again, those of tokens that nobody sees are; else there is nothing behind the last slot.
        return room if self.slots == self.memory + self.chunk else min(room, self.slots - self.lengths[row])

    def begin(self, rows: Sequence[int], counts: Sequence[int], device: torch.device) -> Places:
        """Before the layers: row rows[i] gets counts[i] >= 1 new tokens; the call has n = max(counts), and what stands
        behind the tokens of a row is computed, but never seen, because the next tokens take its place."""
        n = max(counts)
        assert all(count >= 1 and n <= self.room(row) for row, count in zip(rows, counts, strict=True))
        first = torch.tensor([self.lengths[row] for row in rows], device=device)[:, None]
        positions = first + torch.arange(n, device=device)
        starts = (first // self.chunk * self.chunk - self.memory).clamp(min=0)
        read = min(self.slots, max(self.lengths[row] for row in rows) + n)
        distance = (positions[:, :, None] - torch.arange(read, device=device)) % self.slots
        seen = (positions[:, :, None] - distance >= starts[:, :, None])[:, None]
        is_all = list(rows) == list(range(len(self.lengths)))
        self.now = Places(
            rows=torch.tensor(list(rows), device=device),
            is_all=is_all,
            is_first=not any(self.lengths[row] for row in rows),
            positions=positions,
            slots=positions % self.slots,
            read=read,
            distance=distance,
            seen=seen,
            starts=starts,
        )
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        return self.now

    def forget(self, row: int) -> None:
        """The next tokens of a row begin a text."""
        self.lengths[row] = 0

    def keep(self, rows: Sequence[int]) -> None:
        """From now on these rows alone, in this order; one that is named twice becomes two texts."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.keep(rows)

    @property
    def bytes(self) -> int:
        """Size of all kept keys and values, slots that are still empty included."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())


class LayerCache:
    """What one layer keeps. Attention is given it in place of model/documents.py's `Documents`."""

    def __init__(self, cache: KVCache, rotation: Rotation | None) -> None:
        self._cache, self._rotation = cache, rotation
        self._keys: Tensor | None = None
        """[R, slots, G, h]."""
        self._values: Tensor | None = None
        self._position_keys: Tensor | None = None

    @property
    def now(self) -> Places:
        return self._cache.now

    @property
    def positions(self) -> Tensor:
        """[B, n] int64: by which RoPE rotates the new queries and keys; zeros where `extend` does."""
        return self.now.positions if self._rotation is None else torch.zeros_like(self.now.positions)

    def extend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps the new keys and values, k and v [B, G, n, h]. -> q [B, H, n, h], and all keys and values that are
        read, [B, G, S, h], in the order of `now.distance`."""
        now = self.now
        if self._keys is None or self._values is None:
            shape = (len(self._cache.lengths), self._cache.slots, k.shape[1], k.shape[3])
            self._keys, self._values = k.new_zeros(shape), v.new_zeros(shape)
        found = []
        for kept, new in ((self._keys, k), (self._values, v)):
            kept[now.rows[:, None], now.slots] = new.transpose(1, 2)
            found.append((kept if now.is_all else kept[now.rows])[:, : now.read].transpose(1, 2))
        keys, values = found
        if self._rotation is not None:
            last = now.positions[:, -1:]
            # Slots that nobody sees hold tokens before the first, which have no position.
            q = self._rotation(q, now.positions - now.starts)
            keys = self._rotation(keys, (last - now.distance[:, -1] - now.starts).clamp(min=0))
        return q, keys, values

    def position_keys(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Transformer-XL's position keys [G, slots, h] of the distances from 0 on: `make` computes those of distances
        [slots] once, for weights do not change while a text is generated."""
        if self._position_keys is None:
            self._position_keys = make(torch.arange(self._cache.slots, device=self.now.rows.device))
        return self._position_keys

    def keep(self, rows: Sequence[int]) -> None:
        index = self.now.rows.new_tensor(list(rows)) if self._keys is not None else None
        if index is not None and self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[index], self._values[index]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self._keys, self._values) if tensor is not None]
