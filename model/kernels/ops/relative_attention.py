"""Transformer-XL attention (arXiv 1901.02860, section 3.3) after its projections: content and position terms.

    out[i] = sum over j <= M + i of  softmax_j(a[i] . k[j] + b[i] . p[j + T - 1 - i]) v[j]

The T queries are the last of a context of L = M + T tokens; row c of the position keys p, a place, is that of distance
L - 1 - c. The content queries a and the position queries b hold biases and the scale of the logits already.

Shapes: B sequences, H heads, h head_dim; K heads of keys and values and P heads of position keys, each shared by H / K
or H / P heads, one after the other. Kernels are given H or 1: others are copied before. The softmax is fp32 whatever
the storage dtype.

The reference makes [T, L] matrices of all heads, four of them at a time; kernels keep one number per query and head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import implementation
from model.kernels.op import op
from model.kernels.ops.causal_attention import of_each_head


class Inputs(NamedTuple):
    """Of the op, in the layout of the projections: tokens before heads."""

    content_queries: Tensor
    """[B, T, H, h]."""
    position_queries: Tensor | None
    """[B, T, H, h]; None where they are the content queries, in a model without biases."""
    k: Tensor
    """[B, L, K, h]."""
    v: Tensor
    """[B, L, K, h]."""
    position_keys: Tensor
    """[L, P, h]."""


def relative_attention(inputs: Inputs, *, backend: str) -> Tensor:
    """-> [B, T, H, h] in the dtype of the queries; differentiable in every tensor. `backend` is a resolved one."""
    if inputs.position_queries is inputs.content_queries:
        inputs = inputs._replace(position_queries=None)
    H = inputs.content_queries.shape[2]
    k, v = (of_each_head(t, H, dim=2) for t in (inputs.k, inputs.v))
    inputs = inputs._replace(k=k, v=v, position_keys=of_each_head(inputs.position_keys, H, dim=1))
    if backend == "reference":
        return relative_attention_reference(inputs)
    return _relative_attention(*inputs, backend)[0]


def relative_attention_reference(inputs: Inputs) -> Tensor:
    """The specification."""
    content, position, *keys, _ = inputs
    for_content, for_position, k, v = (
        t.transpose(1, 2) for t in (content, content if position is None else position, *keys)
    )
    T, L = for_content.shape[2], k.shape[2]
    position_keys = inputs.position_keys.transpose(0, 1)  # [., L, h]
    logits = for_content @ k.transpose(2, 3) + relative_shift(for_position @ position_keys.transpose(1, 2))
    future = torch.ones(T, L, dtype=torch.bool, device=k.device).triu(L - T + 1)
    return weighted(logits, future, v).transpose(1, 2)


def weighted(logits: Tensor, unseen: Tensor, v: Tensor) -> Tensor:
    """The values `v` [B, H or 1, L, h] by the softmax of `logits` [B, H, T, L] where not `unseen`."""
    weights = logits.masked_fill(unseen, -math.inf).softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def relative_shift(x: Tensor) -> Tensor:
    """out[..., i, j] = x[..., i, j + T - 1 - i] for `x` [..., T, L], without an index tensor; if j + T - 1 - i is L or
    more (keys after the query), the value is meaningless."""
    T, L = x.shape[-2:]
    # One more column shifts row i by i places against the rows of a [T, L] matrix.
    padded = F.pad(x, (1, 0)).reshape(*x.shape[:-2], (L + 1) * T)
    return padded[..., T:].view(x.shape)


# ---------------------------------------------------------------------------------------------------------------- op


@op("relative_attention")
def _relative_attention(
    content_queries: Tensor, position_queries: Tensor | None, k: Tensor, v: Tensor, position_keys: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """-> the result, and the logarithm of the softmax's sum [B, H, T] fp32."""
    inputs = Inputs(content_queries, position_queries, k, v, position_keys)
    return implementation("relative_attention", backend).forward(inputs)


@_relative_attention.register_fake
def _(content_queries, position_queries, k, v, position_keys, backend):
    B, T, H, _ = content_queries.shape
    out = content_queries.new_empty(content_queries.shape)
    return out, content_queries.new_empty(B, H, T, dtype=torch.float32)


@op("relative_attention_backward")
def _relative_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    content_queries: Tensor,
    position_queries: Tensor | None,
    k: Tensor,
    v: Tensor,
    position_keys: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of the five inputs; an empty one of position queries that are not given."""
    inputs = Inputs(content_queries, position_queries, k, v, position_keys)
    return implementation("relative_attention", backend).backward(grad, out, log_sum, inputs)


@_relative_attention_backward.register_fake
def _(grad, out, log_sum, content_queries, position_queries, k, v, position_keys, backend):
    given = content_queries, position_queries, k, v, position_keys
    return tuple(grad.new_empty((0,) if t is None else t.shape) for t in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors
    of_content, of_position, *others = _relative_attention_backward(grad, *saved, ctx.backend)
    return of_content, None if saved[3] is None else of_position, *others, None


_relative_attention.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.relative_attention)
def _forward_flops(content_queries: Any, position_queries: Any, k: Any, *_: Any, **__: Any) -> int:
    """Content, position and values over all of [T, L], as the reference computes them."""
    B, T, H, h = content_queries
    return 3 * 2 * B * H * T * k[1] * h


@register_flop_formula(torch.ops.switchall.relative_attention_backward)
def _backward_flops(grad: Any, out: Any, log_sum: Any, *inputs: Any, **kwargs: Any) -> int:
    """Two products for each of the three; what is computed again is not counted."""
    return 2 * _forward_flops(*inputs)
