"""Several documents in one sequence, each for itself: attention stays inside, positions begin again."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """What attention needs of the documents in a batch of whole sequences; the same in every layer."""

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


def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, shared: bool = False) -> Tensor:
    """Fused attention of q [B, H, T, h] over k and v [B, H, T, h] ([B, 1, T, h] if `shared` by the heads), inside each
    document. Without `documents` the mask is not made: the fastest kernels know causality."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=shared)


def rope_positions(documents: Documents | None, T: int, device: torch.device) -> Tensor:
    """Positions for rope_tables: [T], or [B, T] where documents begin again at 0."""
    return torch.arange(T, device=device) if documents is None else documents.positions
