"""What lies between the matrix products, each as one pass over memory where a backend fuses it: dropout with the
residual addition inside, masks of expert dropout, rotary position embedding.

    dropout      y = residual + x * mask / (1 - p), or without residual; the mask is drawn again in the backward pass
    keep_mask    the mask alone, of experts
    rotate       queries and keys by the tables of model/attention/rope.py, which also has the plain operators

Masks are those of model/dropout.py bit for bit, in every backend. Backends `cpu` and `reference` are plain operators,
which autograd and torch.compile see through; `cpu` computes in the dtype of the tensors. Nothing here counts as flops:
what it costs is bytes (docs/kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.dropout import Draw
from model.kernels.backend import implementation
from model.kernels.cpu import elementwise as cpu
from model.kernels.dtypes import wide_dtype


def dropout(x: Tensor, draw: Draw, residual: Tensor | None = None, *, backend: str) -> Tensor:
    """`x` [B, T, columns], some values zero and the others divided by 1 - p, added to `residual` of the same shape if
    given. Differentiable in both. `backend` is a resolved one."""
    if backend == "reference":
        return dropout_reference(x, residual, draw)
    if backend == "cpu":
        return cpu.dropout(x, residual, draw)
    width, first_column = draw.held(x.shape[2])
    place = draw.probability, draw.key, draw.sequence_index, draw.first_token, width, first_column
    return _dropout(x, residual, *place, backend)


def dropout_reference(x: Tensor, residual: Tensor | None, draw: Draw) -> Tensor:
    """The specification."""
    wide = wide_dtype(x.dtype)
    y = x.to(wide) * draw.mask(x.shape).to(wide) / (1.0 - draw.probability)
    return (y if residual is None else residual.to(wide) + y).to(result_dtype(x, residual))


def keep_mask(shape: tuple[int, ...], draw: Draw, *, backend: str) -> Tensor:
    """Bool mask of `shape` [B, T, columns, ...], True with probability 1 - p; what stands behind the columns (heads) is
    whole on every rank. No gradient."""
    if backend == "reference":
        return draw.mask(shape)
    if backend == "cpu":
        return cpu.keep_mask(shape, draw)
    width, first_column = draw.held(shape[2])
    place = draw.probability, draw.key, draw.sequence_index, draw.first_token, width, first_column
    return _keep_mask(list(shape), *place, backend)


def rotate(
    q: Tensor, k: Tensor | None, tables: tuple[Tensor, Tensor], *, heads: int = 0, backend: str
) -> tuple[Tensor, Tensor]:
    """As the op below; for backends that fuse it."""
    return _rotate(q, k, *tables, heads, backend)


def result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


# ---------------------------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("switchall::dropout", mutates_args=())
def _dropout(
    x: Tensor,
    residual: Tensor | None,
    probability: float,
    key: int,
    sequence_index: Tensor,
    first_token: int,
    width: int,
    first_column: int,
    backend: str,
) -> Tensor:
    columns = width, slice(first_column, first_column + x.shape[2])
    draw = Draw(probability, key, sequence_index, first_token, columns)
    return implementation("elementwise", backend).dropout(x, residual, draw)


@_dropout.register_fake
def _(x, residual, probability, key, sequence_index, first_token, width, first_column, backend):
    return x.new_empty(x.shape, dtype=result_dtype(x, residual))


def _setup_dropout(ctx, inputs, output):
    x, residual, ctx.probability, ctx.key, sequence_index, *ctx.rest = inputs
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(sequence_index)


def _dropout_autograd(ctx, grad):
    (sequence_index,), (dtype, residual_dtype) = ctx.saved_tensors, ctx.dtypes
    grad_x = grad_residual = None
    if ctx.needs_input_grad[0]:
        grad_x = _dropout(grad, None, ctx.probability, ctx.key, sequence_index, *ctx.rest).to(dtype)
    if residual_dtype is not None and ctx.needs_input_grad[1]:
        grad_residual = grad.to(residual_dtype)
    return grad_x, grad_residual, *[None] * 7


_dropout.register_autograd(_dropout_autograd, setup_context=_setup_dropout)


@torch.library.custom_op("switchall::keep_mask", mutates_args=())
def _keep_mask(
    shape: list[int],
    probability: float,
    key: int,
    sequence_index: Tensor,
    first_token: int,
    width: int,
    first_column: int,
    backend: str,
) -> Tensor:
    columns = width, slice(first_column, first_column + shape[2])
    draw = Draw(probability, key, sequence_index, first_token, columns)
    return implementation("elementwise", backend).keep_mask(tuple(shape), draw)


@_keep_mask.register_fake
def _(shape, probability, key, sequence_index, first_token, width, first_column, backend):
    return sequence_index.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("switchall::rotate", mutates_args=())
def _rotate(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, heads: int, backend: str) -> tuple[Tensor, Tensor]:
    """`q` [B, T, H, h] and `k` [B, L, G, h] rotated by tables [L, 1, n / 2] or [B, L, 1, n / 2] fp32, the queries by
    their last T rows. Without `k`, `q` [B, T, H + G, h] holds both, the queries in its first `heads` = H."""
    if k is None:
        q, k = q.split([heads, q.shape[2] - heads], dim=2)
    return implementation("elementwise", backend).rotate(q, k, cos, sin)


@_rotate.register_fake
def _(q, k, cos, sin, heads, backend):
    B, T, H, h = q.shape
    if k is None:
        return q.new_empty(B, T, heads, h), q.new_empty(B, T, H - heads, h)
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("switchall::rotate_backward", mutates_args=())
def _rotate_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, is_joint: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `q` and `k`; `is_joint`: of the tensor that holds both, and an empty one."""
    return implementation("elementwise", backend).rotate_backward(grad_q, grad_k, cos, sin, is_joint)


@_rotate_backward.register_fake
def _(grad_q, grad_k, cos, sin, is_joint, backend):
    B, T, H, h = grad_q.shape
    if is_joint:
        return grad_q.new_empty(B, T, H + grad_k.shape[2], h), grad_q.new_empty(0)
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)


def _setup_rotate(ctx, inputs, output):
    _, k, cos, sin, _, ctx.backend = inputs
    ctx.is_joint = k is None
    ctx.save_for_backward(cos, sin)


def _rotate_autograd(ctx, grad_q, grad_k):
    grads = _rotate_backward(grad_q, grad_k, *ctx.saved_tensors, ctx.is_joint, ctx.backend)
    return grads[0], None if ctx.is_joint else grads[1], None, None, None, None


_rotate.register_autograd(_rotate_autograd, setup_context=_setup_rotate)
