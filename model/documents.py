"""Which tokens a query sees: those before it in its sequence; of several documents in one sequence those of its own,
where positions begin again; with a cache those that were read before."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LayerCache
from model.kernels.ops.causal_attention import Inputs, torch_attention
from model.kernels.ops.causal_attention import causal_attention as attend


class Documents(NamedTuple):
    """What attention needs to know about the documents in a batch of whole sequences; the same in every layer."""

    positions: Tensor
    """[B, T] int64: position of each token in its document, 0 at the first token of the sequence too."""
    first: Tensor
    """[B, T] int32: place in the sequence of the first token of each token's document."""
    end: Tensor
    """[B, T] int32: the place behind its last token."""

    @classmethod
    def of(cls, index: Tensor) -> Documents:
        """From the document index of each token, [B, T] int64, rising by one where a document begins."""
        T = index.shape[1]
        places = torch.arange(T, device=index.device)
        borders = index[:, 1:] != index[:, :-1]
        begins, ends = F.pad(borders, (1, 0), value=True), F.pad(borders, (0, 1), value=True)
        first = torch.where(begins, places, 0).cummax(1).values
        end = torch.where(ends, places + 1, T).flip(1).cummin(1).values.flip(1)
        return cls(places - first, first.int(), end.int())


def document_index(tokens: Tensor, end: int) -> Tensor:
    """The document of each token, [B, T] int64 as in `Documents.of`, where the id `end` is the last of each document:
    of a text that did not come with its index, as a batch of a run does."""
    is_end = (tokens == end).long()
    return is_end.cumsum(1) - is_end


Seen = Documents | LayerCache
"""What a layer is given where a query does not see exactly what stands before it in its sequence."""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Seen | None, *, backend: str, shared: bool = False
) -> Tensor:
    """Fused attention of q [B, H, T, h], the last T tokens of a context of L = M + T, over k and v [B, H, L, h] ([B, K,
    L, h] if `shared`, by H / K heads each); with `documents` inside each document, and without memory (M = 0); with a
    cache of T = L new tokens over what it keeps too. `backend` is a resolved one of the op for documents and memory.
    Without either torch's fastest kernels know causality, and a cache is read with torch's operators."""
    T, L = q.shape[2], k.shape[2]
    if isinstance(documents, LayerCache):
        q, k, v = documents.extend(q, k, v)
        mask = None if documents.now.is_first else documents.now.seen
        return torch_attention(q, k, v, mask=mask, shared=shared)
    if documents is not None:
        assert L == T, "documents of a memory are not known; refused by the configuration"
        return attend(Inputs(q, k, v, documents.first, documents.end), backend=backend)
    if L == T:
        return torch_attention(q, k, v, mask=None, shared=shared)
    return attend(Inputs(q, k, v), backend=backend)
