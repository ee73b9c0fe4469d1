"""Flat pieces of parameters, described as rectangles of whole tensors, which is how DCP addresses them.

ZeRO cuts the flattened shard of a parameter anywhere; a tensor- or expert-parallel shard is a slab of the parameter. A
flat range of a row-major tensor of n dimensions is at most 2 n - 1 rectangles, each of them contiguous in the range: no
rank needs another's elements to describe, save or restore its own.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # DCP, whose import takes two seconds, calls the methods that need it
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes), one of each per dimension."""


def rectangles(shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """Elements [start, stop) of the row-major tensor `shape` as disjoint rectangles, in the order of the elements.
    Empty for an empty range; a scalar is one rectangle of no dimensions."""
    assert 0 <= start <= stop <= math.prod(shape), f"[{start}, {stop}) of {tuple(shape)}"
    if start == stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if start == first * row and stop == (last + 1) * row:
        zeros = (0,) * (len(shape) - 1)
        return [((first, *zeros), (last + 1 - first, *shape[1:]))]
    if first == last:
        inner = rectangles(shape[1:], start - first * row, stop - first * row)
        return [((first, *offsets), (1, *sizes)) for offsets, sizes in inner]
    # A part of a row, whole rows, a part of a row.
    head = (first + 1) * row if start % row else start
    tail = stop - stop % row
    return [
        *rectangles(shape, start, head),
        *rectangles(shape, head, tail),
        *rectangles(shape, tail, stop),
    ]


def fault_in(shape: Sequence[int], parts: Sequence[Rectangle], *, whole: bool) -> str:
    """What keeps `parts` from being disjoint rectangles of the tensor `shape`, and with `whole` all of it; empty if
    nothing does. Only rectangles that meet in one dimension are compared, the one in which they are shortest: cut from
    flat ranges they are whole rows, and in the dimension of a row each would meet all others."""
    if not shape:
        return ""
    for offsets, sizes in parts:
        if any(o < 0 or n < 0 or o + n > size for o, n, size in zip(offsets, sizes, shape, strict=True)):
            return f"the chunk at {offsets} of {sizes} elements leaves the shape {tuple(shape)}"
    axis = min(range(len(shape)), key=lambda d: sum(sizes[d] for _, sizes in parts) / max(1, shape[d]))
    ordered = sorted(parts, key=lambda part: part[0][axis])
    active: list[tuple[int, int]] = []  # where those end that begin before this one, and their numbers
    for number, (offsets, sizes) in enumerate(ordered):
        del active[: bisect.bisect_right(active, (offsets[axis], len(ordered)))]
        for _, other in active:
            if _meet(ordered[other], (offsets, sizes)):
                return f"overlapping chunks: {ordered[other]} and {(offsets, sizes)}"
        bisect.insort(active, (offsets[axis] + sizes[axis], number))
    elements = sum(math.prod(sizes) for _, sizes in parts)
    return f"{elements} of {math.prod(shape)} elements" if whole and elements != math.prod(shape) else ""


def _meet(one: Rectangle, other: Rectangle) -> bool:
    return all(a < b + n and b < a + m for a, m, b, n in zip(*one, *other, strict=True))


@dataclass(frozen=True)
class Chunk:
    """One rectangle of a tensor: where it begins, and its elements."""

    offsets: tuple[int, ...]
    values: Tensor
    """The rectangle's elements, in its shape: a view into the owner's memory, which a load fills."""


class Fragments:
    """The rectangles of one tensor that this rank saves, or restores.

    Carries the methods by which DCP asks an object for them (torch 2.13, distributed/_checkpointable.py).
    """

    def __init__(self, shape: Sequence[int], chunks: Iterable[Chunk]) -> None:
        self.shape = torch.Size(shape)
        """Of the whole tensor."""
        self.chunks = {torch.Size(chunk.offsets): chunk.values for chunk in chunks}
        assert self.chunks, "fragments of nothing"

    @property
    def numel(self) -> int:
        """Elements held here."""
        return sum(values.numel() for values in self.chunks.values())

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets, values.shape) for offsets, values in self.chunks.items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, values.shape),
                    properties=TensorProperties(dtype=values.dtype),
                    size=self.shape,
                ),
            )
            for offsets, values in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.chunks[index.offset]


def single_fragment(values: Tensor) -> Fragments:
    """A tensor that one rank holds alone."""
    return Fragments(values.shape, [Chunk((0,) * values.ndim, values)])


def flat_range(
    flat: Tensor, start: int, *, local_shape: Sequence[int], shape: Sequence[int], dim: int | None, offset: int
) -> Fragments:
    """Elements start .. start + len(flat) of a shard of `local_shape`, which lies at `offset` along `dim` of the whole
    tensor `shape` (`dim` None: it is the whole tensor). `flat` [n]; the chunks are views of it."""
    chunks, used = [], 0
    for place, sizes in rectangles(local_shape, start, start + flat.numel()):
        length = math.prod(sizes)
        place = tuple(p + offset if axis == dim else p for axis, p in enumerate(place))
        chunks.append(Chunk(place, flat[used : used + length].view(sizes)))
        used += length
    return Fragments(shape, chunks)
