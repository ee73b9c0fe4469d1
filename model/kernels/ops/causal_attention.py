"""Causal attention in the two cases that torch's fastest kernels leave out: inside the documents of a sequence, and
with a memory before the chunk. A query sees a range of keys, so no mask is needed.

    out[i] = sum over first[i] <= j <= M + i of  softmax_j(q[i] . k[j] / sqrt(h)) v[j]

The T queries are the last of a context of L = M + T tokens. Shapes: B sequences, H heads, h head_dim, K heads of keys
and values, each of which H / K heads share, one after the other. Kernels are given H or 1: others are copied before.

The reference gives scaled_dot_product_attention a mask [B, 1, T, L], for which it computes all of [T, L] on CUDA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import implementation
from model.kernels.op import op


class Inputs(NamedTuple):
    """Of the op."""

    q: Tensor
    """[B, H, T, h]."""
    k: Tensor
    """[B, K, L, h]."""
    v: Tensor
    """[B, K, L, h]."""
    first: Tensor | None = None
    """[B, T] int32: the first key that a query sees, never less than that of the query before; None: key 0."""
    end: Tensor | None = None
    """[B, L] int32: how many queries have a `first` up to this key, so none from there on sees it; None without
    `first`. It follows from `first`, which is the same in every layer."""


def causal_attention(inputs: Inputs, *, backend: str) -> Tensor:
    """-> [B, H, T, h] in the dtype of the queries; differentiable in q, k and v. `backend` is a resolved one."""
    if backend == "reference":
        return causal_attention_reference(inputs)
    k, v = (of_each_head(t, inputs.q.shape[1], dim=1) for t in inputs[1:3])
    return _causal_attention(*inputs._replace(k=k, v=v), backend)[0]


def of_each_head(keys: Tensor, num_heads: int, *, dim: int) -> Tensor:
    """Keys or values of K heads along `dim` -> those of H = `num_heads`, head i of which has those of i // (H / K). As
    they are with K = 1, which broadcasting or a kernel shares, or K = H."""
    groups = keys.shape[dim]
    return keys if groups in (1, num_heads) else keys.repeat_interleave(num_heads // groups, dim)


def causal_attention_reference(inputs: Inputs) -> Tensor:
    """The specification."""
    q, k, v = inputs[:3]
    return torch_attention(q, k, v, mask=dense_mask(inputs), shared=q.shape[1] != k.shape[1])


def torch_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, shared: bool) -> Tensor:
    """scaled_dot_product_attention where `mask` says so, causal with None; never by matrices [T, L] of all heads, which
    torch makes on CUDA where none of its fused kernels takes a call.

    Flash attention takes half precision without a mask on cards of compute capability 8.0 or newer: any width up to
    256, of which some cards train none of 193 to 224, and keys and values of groups as they are. What is left is for
    the memory-efficient kernel, which is not given groups."""
    is_flash = mask is None and q.element_size() == 2 and (q.shape[3] <= 192 or 224 < q.shape[3] <= 256)
    if q.device.type == "cuda" and not is_flash:
        return memory_efficient_attention(q, k, v, mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
    """The same of what that kernel takes: as many heads of keys as of queries, and rows of whole 16 bytes, filled up
    with columns of 0. A single head of keys is copied too: where all heads see one by a stride of 0, torch takes heads
    for the queries of a new token and gives them the masks of other queries (its issue 191937, of 2.12)."""
    H, h = q.shape[1], q.shape[3]
    if missing := -h % (16 // q.element_size()):
        q, k, v = (F.pad(t, (0, missing)) for t in (q, k, v))
    k, v = (t if t.shape[1] == H else t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=h**-0.5)[..., :h]


def dense_mask(inputs: Inputs) -> Tensor:
    """[B, 1, T, L], or [T, L] without `first`, bool: whether the query may see the key."""
    (T, L), first, device = (inputs.q.shape[2], inputs.k.shape[2]), inputs.first, inputs.q.device
    before = torch.ones(T, L, dtype=torch.bool, device=device).tril(L - T)
    if first is None:
        return before
    return ((torch.arange(L, device=device) >= first[:, :, None]) & before)[:, None]


# ---------------------------------------------------------------------------------------------------------------- op


@op("causal_attention")
def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, end: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """-> the result, and the logarithm of the softmax's sum [B, H, T] fp32."""
    return implementation("causal_attention", backend).forward(Inputs(q, k, v, first, end))


def _like(t: Tensor) -> Tensor:
    """An empty result shaped as `t`, in memory with tokens before heads."""
    B, H, T, h = t.shape
    return t.new_empty(B, T, H, h).transpose(1, 2)


@_causal_attention.register_fake
def _(q, k, v, first, end, backend):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@op("causal_attention_backward")
def _causal_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of q, k and v."""
    inputs = Inputs(q, k, v, first, end)
    return implementation("causal_attention", backend).backward(grad, out, log_sum, inputs)


@_causal_attention_backward.register_fake
def _(grad, out, log_sum, q, k, v, first, end, backend):
    return _like(q), _like(k), _like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *_causal_attention_backward(grad, *ctx.saved_tensors, ctx.backend), None, None, None


_causal_attention.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.causal_attention)
def _forward_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Logits and values over all of [T, L], as the reference computes them."""
    B, H, T, h = q
    return 2 * 2 * B * H * T * k[2] * h


@register_flop_formula(torch.ops.switchall.causal_attention_backward)
def _backward_flops(grad: Any, out: Any, log_sum: Any, *inputs: Any, **kwargs: Any) -> int:
    """Two products for each of the two; what is computed again is not counted."""
    return 2 * _forward_flops(*inputs)
