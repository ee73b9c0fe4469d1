"""Which tokens a query sees: those before it in its sequence; of several documents in one sequence those of its own,
where positions begin again; with a cache those that were read before."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LayerCache


class Documents(NamedTuple):
    """What attention needs to know about the documents in a batch of whole sequences; the same in every layer."""

    positions: Tensor
    """[B, T] int64: position of each token in its document, 0 at the first token of the sequence too."""
    mask: Tensor
    """[B, 1, T, T] bool: whether the query (second last axis) may see the key."""

    @classmethod
    def of(cls, index: Tensor) -> Documents:
        """From the document index of each token, [B, T] int64, rising by one where a document begins."""
        T = index.shape[1]
        places = torch.arange(T, device=index.device)
        begins = F.pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
        positions = places - torch.where(begins, places, 0).cummax(1).values
        same = index[:, :, None] == index[:, None, :]
        return cls(positions, same.tril()[:, None])


Seen = Documents | LayerCache
"""What a layer is given where a query does not see exactly what stands before it in its sequence."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Seen | None, *, shared: bool = False) -> Tensor:
    """Fused attention of q [B, H, T, h], the last T tokens of a context of L = M + T, over k and v [B, H, L, h] ([B, 1,
    L, h] if `shared` by the heads); with `documents` inside each document, and without memory (M = 0); with a cache of
    T = L new tokens over what it keeps too. Without documents and memory no mask is made, because the fastest kernels
    know causality."""
    T, L = q.shape[2], k.shape[2]
    if isinstance(documents, LayerCache):
        q, k, v = documents.extend(q, k, v)
        mask = None if documents.now.is_first else documents.now.seen
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
    if documents is not None:
        assert L == T, "documents of a memory are not known; refused by the configuration"
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=shared)
    if L == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    seen = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=shared)
