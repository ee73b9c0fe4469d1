"""Rotary position embedding on a part of each head (RoFormer, arXiv 2104.09864), half-split pairing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.config import RopeConfig
from model.documents import Documents, Seen
from model.kernels.ops import elementwise


def rotated_width(head_dim: int, fraction: float) -> int:
    """Dimensions of a head that are rotated: int(fraction * head_dim), rounded down to even."""
    return int(fraction * head_dim) // 2 * 2


def rope_tables(positions: Tensor, head_dim: int, config: RopeConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, n / 2] fp32 of the angles of `positions` [T], or [B, T, 1, n / 2] of [B, T]; n =
    rotated_width. Angles in fp64, rounded to fp32: cosines are off by up to 6e-5 at position 2048, by 4e-3, as much as
    bf16 rounds, at 131,072."""
    width = rotated_width(head_dim, config.fraction)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / max(width, 1)
    angles = (positions.double()[..., None] * config.base**-exponent).float()[..., None, :]
    return angles.cos(), angles.sin()


class RopeTables:
    """The tables of one layer, kept between calls: they depend on positions alone. Kept ones have a power of two rows,
    of which a context takes the first ones: together they are at most twice the longest, whatever lengths there are,
    and none is dropped, because a CUDA graph reads them where they are. Not part of the module's state, which is saved
    and converted to other dtypes."""

    def __init__(self, head_dim: int, config: RopeConfig) -> None:
        self._head_dim, self._config = head_dim, config
        self._kept: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, documents: Seen | None, L: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`rope_tables` of a context of L tokens. Where positions begin again in `documents`, their rows are gathered
        from what is kept. Those that go on in a cache may be beyond any length, so nothing of them is kept."""
        if isinstance(documents, Documents):
            cos, sin = self(None, L, device)
            return cos[documents.positions], sin[documents.positions]
        if documents is not None:
            return rope_tables(documents.positions, self._head_dim, self._config)
        rows = 1 << (L - 1).bit_length()
        if (rows, device) not in self._kept:
            self._kept[rows, device] = rope_tables(torch.arange(rows, device=device), self._head_dim, self._config)
        cos, sin = self._kept[rows, device]
        return cos[:L], sin[:L]


def last_rows(tables: tuple[Tensor, Tensor], T: int) -> tuple[Tensor, Tensor]:
    """The rows of a context's tables that belong to its last T tokens, the chunk."""
    cos, sin = (table[..., table.shape[-3] - T :, :, :] for table in tables)
    return cos, sin


def rotate(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], *, backend: str) -> tuple[Tensor, Tensor]:
    """Queries [B, T, H, h], the last T tokens of a context of L, and keys [B, L, G, h] with the context's `tables`.
    `backend` is a resolved one of `elementwise`."""
    if _is_plain(backend, tables):
        return apply_rope(q, *last_rows(tables, q.shape[1])), apply_rope(k, *tables)
    return elementwise.rotate(q, k, tables, backend=backend)


def rotate_joint(joint: Tensor, heads: int, tables: tuple[Tensor, Tensor], *, backend: str) -> tuple[Tensor, Tensor]:
    """As `rotate`, for queries and keys that are one tensor [B, T, H + G, h], the queries its first `heads` = H."""
    if _is_plain(backend, tables):
        q, k = apply_rope(joint, *tables).split([heads, joint.shape[2] - heads], dim=2)
        return q, k
    return elementwise.rotate(joint, None, tables, heads=heads, backend=backend)


def _is_plain(backend: str, tables: tuple[Tensor, Tensor]) -> bool:
    """Operators below are the specification; so they are where nothing is rotated."""
    return backend in ("reference", "cpu") or tables[0].shape[-1] == 0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first n dimensions of `x` [B, T, H, h]: dimension i pairs with i + n / 2 (not with i + 1).

    `cos`, `sin` [T, 1, n / 2] or [B, T, 1, n / 2] from `rope_tables`. Computed in fp32, returned in the dtype of `x`.
    Apply it before the heads are transposed, while rows are contiguous.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Writes both halves and the rest into one result, which is twice as fast as concatenation. The gradient is the
    rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    result = torch.empty_like(x)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    result[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    result[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    result[..., 2 * half :] = x[..., 2 * half :]
    return result
