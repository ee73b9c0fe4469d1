"""Output layer and cross-entropy in one op that never holds the logits of all tokens.

    loss = mean over tokens n with targets[n] != ignore_index of  logsumexp(l_n) - l_n[targets[n]],
    l_n = hidden[n] weight^T + bias,        d loss / d l_n = (softmax(l_n) - onehot(targets[n])) / number of such tokens

Shapes: N tokens, d d_model, V vocabulary. The gradients are computed in the forward pass, chunk of tokens by chunk of
tokens, while the chunk's logits exist; the backward pass scales them by the loss's own gradient. Of fp16 they stay in
fp32 until then: a gradient divided by 16384 tokens is 1e-6, of which fp16 keeps three bits, and only that scaling, by
the loss scale, lifts it into fp16's range (by 65536 often, which is no fp16 number either).

Measured (N=8192, d=512, V=32000, forward + backward, peak resident set above the inputs): fp32 7.5 s and 264 MB where
F.cross_entropy(F.linear(h, w, b).float(), t) takes 11.4 s and 3049 MB; bf16 7.0 s and 348 MB against 16.1 s and 2959 MB
(CPU seconds; bf16 is computed in fp32). Chunks of 32, 64 and 128 MB: 8.1, 8.0 and 7.5 s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import implementation
from model.kernels.dtypes import gradient_dtype, wide_dtype
from model.kernels.op import op
from model.parallel.context import ParallelContext

CHUNK_BYTES = 128 * 2**20
"""Logits of one chunk on a CPU. A chunk reads and writes the whole weight gradient once, so small chunks cost memory
traffic."""
CHUNK_BYTES_ON_GPU = 4 * CHUNK_BYTES
CHUNK_MULTIPLE = 256
"""Tokens of a chunk on a GPU, so that only the last one leaves tiles of its products unfilled."""


class Inputs(NamedTuple):
    """What every backend takes of a call."""

    hidden: Tensor
    weight: Tensor
    """This rank's classes, from `first_class` on, of those that the ranks of `group` hold; so is `bias`."""
    bias: Tensor | None
    targets: Tensor
    ignore_index: int
    need_hidden: bool
    """Whether the gradient of `hidden` is wanted."""
    need_weight: bool
    """Whether those of `weight` and `bias` are."""
    group: dist.ProcessGroup | None
    first_class: int


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    backend: str,
    parallel: ParallelContext | None = None,
) -> tuple[Tensor, Tensor]:
    """`hidden` [N, d], `weight` [V, d], `bias` [V] or None, `targets` [N] int64.

    Returns the loss (fp32 scalar, 0 with zero gradients where every token is ignored) and the detached loss of each
    token [N] (fp32, 0 where ignored). fp64 stays fp64. `backend` is a resolved one.

    With tensor parallelism in `parallel`, `weight` and `bias` are this rank's classes, V of V x ranks, all else is the
    same on every rank; so are the results. The gradient of `hidden` is that of this rank's classes: their sum over
    ranks is what `enter_region` makes of it, which can leave each rank the tokens that it needs.
    """
    group = None if parallel is None else parallel.tensor_group
    first_class = weight.shape[0] * parallel.tensor_rank if parallel is not None else 0
    if backend == "reference":
        return linear_cross_entropy_reference(
            Inputs(hidden, weight, bias, targets, ignore_index, True, True, group, first_class)
        )
    grad = torch.is_grad_enabled()
    need_hidden = grad and hidden.requires_grad
    need_weight = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    group_name = "" if group is None else group.group_name
    settings = ignore_index, need_hidden, need_weight, group_name, first_class, backend
    loss, token_loss, *_ = _linear_cross_entropy(hidden, weight, bias, targets, *settings)
    return loss, token_loss


def linear_cross_entropy_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The specification: all logits at once, in fp32 whatever the storage dtype."""
    hidden, weight, bias, targets, ignore_index, _, _, group, first_class = inputs
    wide = wide_dtype(hidden.dtype)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if group is None:
        token_loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    else:
        from model.parallel import megatron_core

        token_loss = megatron_core.cross_entropy(logits, targets, first=first_class, group=group)
        token_loss = torch.where(targets != ignore_index, token_loss, 0.0)
    num_targets = (targets != ignore_index).sum().clamp_min(1)
    return token_loss.sum() / num_targets, token_loss.detach()


def chunk_bytes(device_type: str) -> int:
    """Of the logits that exist at once."""
    return CHUNK_BYTES_ON_GPU if device_type == "cuda" else CHUNK_BYTES


def chunk_tokens(num_tokens: int, row_bytes: int, limit: int, device_type: str) -> int:
    """How many tokens are taken at once, of which `limit` bytes hold the logits, `row_bytes` each. On a GPU a multiple
    of CHUNK_MULTIPLE where there are more tokens."""
    size = max(1, min(num_tokens, limit // row_bytes))
    return size - size % CHUNK_MULTIPLE if device_type == "cuda" and CHUNK_MULTIPLE < size < num_tokens else size


def working_bytes(
    tokens: int, classes: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype, device_type: str
) -> int:
    """Bytes that the op holds at once beside its arguments and its results, gradients wanted: the logits of a chunk of
    tokens, on a GPU their gradient beside them; and in fp32, where the weight [`classes`, `width`] is not, the sum of
    its gradient, on a CPU the weight too. Without what is as small as the hidden state of a chunk."""
    wide = wide_dtype(dtype)
    chunk = chunk_tokens(tokens, classes * wide.itemsize, chunk_bytes(device_type), device_type)
    row, weight = classes * wide.itemsize, 0
    if device_type == "cuda":
        row += classes * dtype.itemsize
    elif weight_dtype != wide:
        weight += classes * width * wide.itemsize
    if gradient_dtype(weight_dtype) != wide:
        weight += classes * width * wide.itemsize
    return chunk * row + weight


def local_targets(logits: Tensor, targets: Tensor, first_class: int) -> tuple[Tensor, Tensor]:
    """Column of each target, clamped into the shard, and whether the shard has it."""
    local = targets - first_class
    here = (local >= 0) & (local < logits.shape[1])
    return torch.where(here, local, 0), here


# ---------------------------------------------------------------------------------------------------------------- op


@op("linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    group_name: str,
    first_class: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, token_loss and the gradients of hidden, weight and bias for d loss = 1 (empty where not needed), in
    `gradient_dtype`."""
    # RELIES-ON torch-group-name
    group = _resolve_process_group(GroupName(group_name)) if group_name else None
    inputs = Inputs(hidden, weight, bias, targets, ignore_index, need_hidden, need_weight, group, first_class)
    return implementation("linear_cross_entropy", backend).forward(inputs, chunk_bytes(hidden.device.type))


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, targets, ignore_index, need_hidden, need_weight, group_name, first_class, backend):
    wide = wide_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=gradient_dtype(hidden.dtype)),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=gradient_dtype(weight.dtype)),
        weight.new_empty(
            weight.shape[:1] if need_weight and bias is not None else (0,), dtype=gradient_dtype(weight.dtype)
        ),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, _, _, ctx.need_hidden, ctx.need_weight, *_ = inputs
    ctx.has_bias = bias is not None
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 10
    needed = (ctx.need_hidden, ctx.need_weight, ctx.need_weight and ctx.has_bias)
    grads = [
        (grad * grad_loss).to(dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needed, strict=True)
    ]
    return *grads, *(None,) * 7


_linear_cross_entropy.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.linear_cross_entropy)
def linear_cross_entropy_flop(
    hidden_shape, weight_shape, bias_shape, targets_shape, ignore_index, need_hidden, need_weight, *args, **kwargs
) -> int:
    """One product for the logits and one for each gradient, all in the forward pass."""
    V, d = weight_shape
    return 2 * hidden_shape[0] * V * d * (1 + int(need_hidden) + int(need_weight))
