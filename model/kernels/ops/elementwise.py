"""What lies between the matrix products, each as one pass over memory where a backend fuses it: dropout with the
residual addition inside, masks of expert dropout, rotary position embedding, LayerNorm after a residual addition, the
entropy regulariser of a router.

    dropout      y = residual + x * mask / (1 - p), or without residual; the mask is drawn again in the backward pass
    keep_mask    the mask alone, of experts
    rotate       queries and keys by the tables of model/attention/rope.py, which also has the plain operators
    layer_norm   s = x + dropout(branch), and (s - mean) / sqrt(variance + epsilon) * weight + bias, of each token
    entropy      weight * sum_e log(p_e) mean_n share[n, e] with share = softmax(logits), and sum_n share[n, e]

Masks are those of model/dropout.py bit for bit, in every backend. Backends `cpu` and `reference` are plain operators,
which autograd and torch.compile see through; `cpu` computes in the dtype of the tensors. Nothing here counts as flops:
what it costs is bytes (docs/kernels.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dropout import Draw
from model.kernels.backend import implementation
from model.kernels.cpu import elementwise as cpu
from model.kernels.dtypes import wide_dtype
from model.kernels.op import op


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


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    *,
    branch: Tensor | None = None,
    draw: Draw | None = None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`x` and `branch` [B, T, d] of one dtype, `weight` and `bias` [d] -> the sum of x and of the branch after dropout
    by `draw` (x itself without a branch), and the sum's LayerNorm, both [B, T, d]. Differentiable in all four. The norm
    is that of the sum as it is stored. Who goes on with the sum, or with x, takes the one returned: what comes back for
    it is added inside the norm's backward pass."""
    assert branch is None or (branch.dtype, branch.shape) == (x.dtype, x.shape), "the sum has one dtype and shape"
    assert branch is not None or draw is None, "dropout of a branch that is not given"
    if backend == "reference":
        return layer_norm_reference(x, branch, weight, bias, epsilon, draw)
    if backend == "cpu":
        return cpu.layer_norm(x, branch, weight, bias, epsilon, draw)
    drawn = (0.0, 0, None, 0) if draw is None else (draw.probability, draw.key, draw.sequence_index, draw.first_token)
    if branch is None:
        x, _, y, _, _ = _layer_norm.hand_on(x, branch, weight, bias, epsilon, *drawn, backend)
        return x, y
    total, y, _, _ = _layer_norm(x, branch, weight, bias, epsilon, *drawn, backend)
    return total, y


def layer_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """The specification."""
    wide = wide_dtype(x.dtype)
    if branch is not None:
        x = (x.to(wide) + branch.to(wide)).to(x.dtype) if draw is None else dropout_reference(branch, x, draw)
    y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), epsilon)
    return x, y.to(x.dtype)


def entropy(logits: Tensor, probability: Tensor, weight: float, *, backend: str) -> tuple[Tensor, Tensor]:
    """The entropy regulariser of `logits` [N, E] fp32, linearised at the `probability` [E] fp64 of another step, and
    the sums of softmax(logits) over tokens, [E] fp64. The value, a scalar in fp32, is differentiable in the logits. The
    probability must not change between forward and backward pass."""
    if backend in ("reference", "cpu"):
        return entropy_reference(logits, probability, weight)
    return _entropy(logits, probability, weight, backend)


def entropy_reference(logits: Tensor, probability: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The specification."""
    value = linear_entropy(logits.log_softmax(-1).exp().mean(0), probability, weight)
    return value, logits.detach().softmax(-1).sum(0, dtype=torch.float64)


def linear_entropy(share: Tensor, probability: Tensor, weight: float) -> Tensor:
    """weight * sum_e log(p_e) share_e of the mean `share` [E] over tokens: the entropy's term, linearised at p."""
    # The 1 of (1 + log p) is left out: sum_e p_e = 1 has no gradient, and without it the value is the entropy's.
    coefficient = probability.float().clamp_min(1e-30).log()
    return weight * (coefficient * share).sum()


def result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


# ---------------------------------------------------------------------------------------------------------------- ops


@op("dropout")
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


@op("keep_mask")
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


@op("rotate")
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


@op("rotate_backward")
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


@op("layer_norm")
def _layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    probability: float,
    key: int,
    sequence_index: Tensor | None,
    first_token: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the sum (empty without a branch), its norm, mean and rstd = 1 / sqrt(variance + epsilon) of every row, [B T]
    fp32. Without `sequence_index` there is no dropout."""
    draw = _drawn(probability, key, sequence_index, first_token)
    return implementation("elementwise", backend).layer_norm(x, branch, weight, bias, epsilon, draw)


@_layer_norm.register_fake
def _(x, branch, weight, bias, epsilon, probability, key, sequence_index, first_token, backend):
    rows = x.shape[0] * x.shape[1]
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    return total, x.new_empty(x.shape), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@op("layer_norm_backward")
def _layer_norm_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    probability: float,
    key: int,
    sequence_index: Tensor | None,
    first_token: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, of the branch (empty without dropout: that of x), of weight and bias. `grad_sum`: that of the
    sum by its other uses."""
    draw = _drawn(probability, key, sequence_index, first_token)
    module = implementation("elementwise", backend)
    return module.layer_norm_backward(grad_y, grad_sum, total, weight, (mean, rstd), draw)


@_layer_norm_backward.register_fake
def _(grad_y, grad_sum, total, weight, mean, rstd, probability, key, sequence_index, first_token, backend):
    branch = total.new_empty(0) if sequence_index is None else total.new_empty(total.shape)
    return total.new_empty(total.shape), branch, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _drawn(probability: float, key: int, sequence_index: Tensor | None, first_token: int) -> Draw | None:
    return None if sequence_index is None else Draw(probability, key, sequence_index, first_token)


def _setup_layer_norm(ctx, inputs, output):
    x, branch, weight, _, _, ctx.probability, ctx.key, sequence_index, ctx.first_token, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.has_branch = branch is not None
    ctx.save_for_backward(x if branch is None else total, weight, mean, rstd, sequence_index)
    ctx.mark_non_differentiable(mean, rstd, *([] if ctx.has_branch else [total]))
    ctx.set_materialize_grads(False)


def _layer_norm_autograd(ctx, grad_sum, grad_y, *_):
    total, weight, mean, rstd, sequence_index = ctx.saved_tensors
    if grad_y is None and grad_sum is None:
        return (None,) * 10
    grad_y = torch.zeros_like(total) if grad_y is None else grad_y
    place = ctx.probability, ctx.key, sequence_index, ctx.first_token, ctx.backend
    grads = _layer_norm_backward(grad_y, grad_sum, total, weight, mean, rstd, *place)
    grad_x, grad_branch, grad_weight, grad_bias = grads
    if sequence_index is None:
        grad_branch = grad_x if ctx.has_branch else None
    return grad_x, grad_branch, grad_weight, grad_bias, *[None] * 6


def _added_norm_gradient(ctx, grad_sum, _, grad_y, *rest):
    """Without a branch the sum is x. Writes to nothing."""
    if grad_y is None:
        return grad_sum, *[None] * 9
    return _layer_norm_autograd(ctx, grad_sum, grad_y, *rest)


_layer_norm.register_autograd(_layer_norm_autograd, setup_context=_setup_layer_norm)
_layer_norm.register_added_gradient(_added_norm_gradient)


@op("entropy")
def _entropy(logits: Tensor, probability: Tensor, weight: float, backend: str) -> tuple[Tensor, Tensor]:
    """-> the value [] fp32, and sums of softmax(logits) [E] fp64."""
    return implementation("elementwise", backend).entropy(logits, probability, weight)


@_entropy.register_fake
def _(logits, probability, weight, backend):
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape[1], dtype=torch.float64)


@op("entropy_backward")
def _entropy_backward(grad_value: Tensor, logits: Tensor, probability: Tensor, weight: float, backend: str) -> Tensor:
    """-> the gradient of the logits."""
    return implementation("elementwise", backend).entropy_backward(grad_value, logits, probability, weight)


@_entropy_backward.register_fake
def _(grad_value, logits, probability, weight, backend):
    return logits.new_empty(logits.shape)


def _setup_entropy(ctx, inputs, output):
    logits, probability, ctx.weight, ctx.backend = inputs
    ctx.save_for_backward(logits, probability)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _entropy_autograd(ctx, grad_value, _):
    if grad_value is None:
        return (None,) * 4
    return _entropy_backward(grad_value, *ctx.saved_tensors, ctx.weight, ctx.backend), None, None, None


_entropy.register_autograd(_entropy_autograd, setup_context=_setup_entropy)
