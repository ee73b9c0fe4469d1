"""Attention with relative positions of Transformer-XL (arXiv 1901.02860, section 3.3 and appendix B)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10000.0
"""Base of the geometric progression of the sinusoids' wavelengths."""


def sinusoids(distances: Tensor, d_model: int) -> Tensor:
    """r [L, d_model] fp32 of `distances` [L]: sine on the even channels, cosine on the odd ones. Angles in fp64."""
    exponent = torch.arange(0, d_model, 2, dtype=torch.float64, device=distances.device) / d_model
    angles = distances.double()[:, None] * BASE**-exponent
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model].float()


def relative_shift(x: Tensor) -> Tensor:
    """out[..., i, j] = x[..., i, j + T - 1 - i] for `x` [..., T, L], without an index tensor; if j + T - 1 - i is L or
    more (keys after the query), the value is meaningless."""
    T, L = x.shape[-2:]
    # One more column shifts row i by i places against the rows of a [T, L] matrix.
    padded = F.pad(x, (1, 0)).reshape(*x.shape[:-2], (L + 1) * T)
    return padded[..., T:].view(x.shape)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    *,
    scale: Tensor | float,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """softmax over j of scale * ((q_i + u) . k_j + (q_i + v) . W_pos r(i - j)), causal, times the values.

    `q` [B, H, T, h] are the last T positions of a context of L = M + T; `k`, `v` [B, H or 1, L, h] (1: shared by the
    heads); `position_weight` [H h or h, d_model] maps r to all heads' position keys; u = `content_bias` and v =
    `position_bias` [H, h]. Returns [B, H, T, h] in the dtype of `q`; the softmax is fp32.
    """
    T, L, h = q.shape[2], k.shape[2], q.shape[3]
    r = sinusoids(torch.arange(L - 1, -1, -1, device=q.device), position_weight.shape[1])
    position_keys = F.linear(r.to(q.dtype), position_weight).view(L, -1, h).transpose(0, 1)  # [., L, h]
    # The scale goes to the narrow factor: one pass over [T, h] instead of one over [T, L].
    for_content = (q if content_bias is None else q + content_bias[:, None]) * scale
    for_position = for_content if content_bias is position_bias else (q + position_bias[:, None]) * scale  # type: ignore[index]
    logits = for_content @ k.transpose(2, 3) + relative_shift(for_position @ position_keys.transpose(1, 2))
    future = torch.ones(T, L, dtype=torch.bool, device=q.device).triu(L - T + 1)
    weights = logits.masked_fill(future, -math.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return weights.to(q.dtype) @ v
