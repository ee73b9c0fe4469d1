"""Output layer and cross-entropy on CPU, chunk of tokens by chunk of tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.dtypes import gradient_dtype, wide_dtype
from model.kernels.ops.linear_cross_entropy import Inputs, local_targets


def forward(inputs: Inputs, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op of model/kernels/ops/linear_cross_entropy.py; `chunk_bytes` of logits at a time."""
    hidden, weight, bias, targets, ignore_index, need_hidden, need_weight, group, first_class = inputs
    (N, d), V = hidden.shape, weight.shape[0]
    dtype = wide_dtype(hidden.dtype)
    wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    token_loss = hidden.new_zeros(N, dtype=dtype)
    grad_hidden = hidden.new_empty((N, d) if need_hidden else (0,), dtype=gradient_dtype(hidden.dtype))
    grad_weight = wide_weight.new_zeros((V, d) if need_weight else (0,))
    grad_bias = wide_weight.new_zeros(V if need_weight and bias is not None else 0)

    kept = targets != ignore_index
    inverse_count = 1.0 / max(int(kept.sum()), 1)
    chunk_size = max(1, min(N, chunk_bytes // (V * dtype.itemsize)))
    buffer = wide_weight.new_empty(chunk_size, V)
    for start in range(0, N, chunk_size):
        chunk = slice(start, min(start + chunk_size, N))
        rows, keep = hidden[chunk].to(dtype), kept[chunk]
        logits = buffer[: rows.shape[0]]
        torch.mm(rows, wide_weight.t(), out=logits)
        if wide_bias is not None:
            logits += wide_bias
        target = torch.where(keep, targets[chunk], 0)
        maximum, exp_sum, target_logit = shard_statistics(logits, target, first_class=first_class)
        if group is not None:
            own = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
            rescale = (own - maximum).exp_()
            logits *= rescale[:, None]
            sums = torch.stack([exp_sum * rescale, target_logit])
            dist.all_reduce(sums, group=group)
            exp_sum, target_logit = sums.unbind()
        token_loss[chunk] = torch.where(keep, exp_sum.log() + maximum - target_logit, 0.0)
        if not (need_hidden or need_weight):
            continue
        scale = shard_gradient(logits, target, exp_sum, first_class=first_class)
        scale = torch.where(keep, scale * inverse_count, 0.0)[:, None]
        if need_hidden:
            grad_hidden[chunk] = (logits @ wide_weight).mul_(scale)
        if need_weight:
            grad_weight.addmm_(logits.t(), rows * scale)
            if bias is not None:
                grad_bias += (logits.t() @ scale)[:, 0]
    loss = token_loss.sum() * inverse_count
    grad_weight, grad_bias = (grad.to(gradient_dtype(weight.dtype)) for grad in (grad_weight, grad_bias))
    return loss, token_loss, grad_hidden, grad_weight, grad_bias


def shard_statistics(logits: Tensor, targets: Tensor, *, first_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(logit - maximum) and target logit (0 where another shard has the target), each [C], of a
    vocabulary shard's `logits` [C, V], whose first class is `first_class`. Leaves exp(logit - maximum) in `logits`."""
    maximum = logits.amax(1)
    local, here = local_targets(logits, targets, first_class)
    target_logit = torch.where(here, logits.gather(1, local[:, None])[:, 0], 0.0)
    exp_sum = logits.sub_(maximum[:, None]).exp_().sum(1)
    return maximum, exp_sum, target_logit


def shard_gradient(exponentials: Tensor, targets: Tensor, exp_sum: Tensor, *, first_class: int) -> Tensor:
    """Turns a shard's exp(logit - maximum) [C, V] into d token_loss / d logit but for a factor per token, and returns
    these factors [C]: the next products multiply their narrow side by them, not the wide one.

    `exp_sum` [C] is the sum over all shards of the same exponentials.
    """
    local, here = local_targets(exponentials, targets, first_class)
    exponentials.scatter_add_(1, local[:, None], torch.where(here, -exp_sum, 0.0)[:, None])
    return 1.0 / exp_sum
