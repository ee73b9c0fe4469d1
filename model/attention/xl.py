"""Attention with relative positions of Transformer-XL (arXiv 1901.02860, section 3.3 and appendix B)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LayerCache
from model.documents import Seen
from model.kernels.ops.causal_attention import of_each_head
from model.kernels.ops.relative_attention import Inputs, weighted
from model.kernels.ops.relative_attention import relative_attention as attend

BASE = 10000.0
"""Base of the geometric progression of the sinusoids' wavelengths."""


def sinusoids(distances: Tensor, d_model: int) -> Tensor:
    """r [L, d_model] fp32 of `distances` [L]: sine on the even channels, cosine on the odd ones. Angles in fp64."""
    exponent = torch.arange(0, d_model, 2, dtype=torch.float64, device=distances.device) / d_model
    angles = distances.double()[:, None] * BASE**-exponent
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model].float()


class Sinusoids:
    """r of one layer, kept between calls, because it depends on the length of the context alone. Tables have a power of
    two rows, of which a context takes the last ones: together they are at most twice the longest, whatever lengths
    there are, and none is dropped, because a CUDA graph reads them where they are. Not part of the module's state,
    which is saved and converted to other dtypes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, L: int, d_model: int, like: Tensor) -> Tensor:
        """r [L, d_model] of the distances L - 1 to 0, in the dtype and on the device of `like`."""
        rows = 1 << (L - 1).bit_length()
        key = rows, d_model, like.dtype, like.device
        if key not in self._kept:
            distances = torch.arange(rows - 1, -1, -1, device=like.device)
            self._kept[key] = sinusoids(distances, d_model).to(like.dtype)
        return self._kept[key][rows - L :]


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    kept_sinusoids: Sinusoids,
    *,
    scale: Tensor | float,
    backend: str,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    seen: Seen | None = None,
) -> Tensor:
    """softmax over j of scale * ((q_i + u) . k_j + (q_i + v) . W_pos r(i - j)), causal, times the values.

    `q` [B, H, T, h] are the last T positions of a context of L = M + T; `k`, `v` [B, K, L, h] (shared by H / K heads
    each); `position_weight` [K h, d_model] maps r, of the layer's `kept_sinusoids`, to their position keys;
    u = `content_bias` and v = `position_bias` [H, h]. Returns [B, H, T, h] in the dtype of `q`; the softmax is fp32.
    With a cache in `seen` k and v are those of the T new tokens, and the context is what it keeps. `backend` is a
    resolved one; a cache is read with torch's operators.
    """
    if isinstance(seen, LayerCache):
        return _cached_attention(seen, q, k, v, position_weight, scale, content_bias, position_bias)
    assert seen is None, "documents and Transformer-XL exclude each other; refused by the configuration"
    position_keys = _position_keys(kept_sinusoids(k.shape[2], position_weight.shape[1], q), position_weight, q)
    for_content, for_position = _queries(q, scale, content_bias, position_bias)
    position = None if for_position is for_content else for_position.transpose(1, 2)
    queries, keys = (for_content.transpose(1, 2), position), (k.transpose(1, 2), v.transpose(1, 2))
    inputs = Inputs(*queries, *keys, position_keys.transpose(0, 1))
    return attend(inputs, backend=backend).transpose(1, 2)


def _cached_attention(
    cache: LayerCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_weight: Tensor,
    scale: Tensor | float,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
) -> Tensor:
    """As `relative_attention`, with the context's keys in the order of the cache's slots: the position logits of all
    distances, of which each slot takes its own."""
    q, k, v = cache.extend(q, k, v)
    width = position_weight.shape[1]
    position_keys = cache.position_keys(
        lambda distances: _position_keys(sinusoids(distances, width).to(q.dtype), position_weight, q)
    )
    k, v = (of_each_head(t, q.shape[1], dim=1) for t in (k, v))
    position_keys = of_each_head(position_keys, q.shape[1], dim=0)
    for_content, for_position = _queries(q, scale, content_bias, position_bias)
    distance = cache.now.distance[:, None].expand(-1, q.shape[1], -1, -1)
    logits = for_content @ k.transpose(2, 3) + (for_position @ position_keys.transpose(1, 2)).gather(3, distance)
    return weighted(logits, ~cache.now.seen, v)


def _position_keys(r: Tensor, position_weight: Tensor, q: Tensor) -> Tensor:
    """[K, D, h] of `r` [D, d_model], in the dtype of the queries `q` [B, H, T, h]."""
    return F.linear(r, position_weight).view(len(r), -1, q.shape[3]).transpose(0, 1)


def _queries(
    q: Tensor, scale: Tensor | float, content_bias: Tensor | None, position_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Those of the content logits and of the position logits. The scale goes to the narrow factor: one pass over [T, h]
    instead of one over [T, L]."""
    for_content = (q if content_bias is None else q + content_bias[:, None]) * scale
    for_position = for_content if content_bias is position_bias else (q + position_bias[:, None]) * scale  # type: ignore[index]
    return for_content, for_position
