"""Rotary position embedding on a part of each head (RoFormer, arXiv 2104.09864), half-split pairing."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import RopeConfig


def rotated_width(head_dim: int, fraction: float) -> int:
    """Dimensions of a head that are rotated: int(fraction * head_dim), rounded down to even."""
    return int(fraction * head_dim) // 2 * 2


def rope_angles(positions: Tensor, head_dim: int, config: RopeConfig) -> Tensor:
    """Angles [T, n / 2] in radians for `positions` [T]; n = rotated_width. Computed in fp64, returned as fp32."""
    width = rotated_width(head_dim, config.fraction)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / max(width, 1)
    return (positions.double()[:, None] * config.base**-exponent).float()


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the first n dimensions of `x` [B, H, T, h]: dimension i pairs with i + n / 2 (not with i + 1).

    `angles` [T, n / 2]. The rotation runs in fp32 and returns the dtype of `x`.
    """
    half = angles.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)
