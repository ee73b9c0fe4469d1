"""Linear maps without bias: one, or several of the same tokens as one GEMM (SwitchHead's dense queries and keys).
Several maps have separate weights, one product forward and two backward. The GEMMs are wider, and the gradient of the
tokens is one sum inside a GEMM, not one per map added up by autograd (docs/kernels.md has times).

`region_linear` is such a map inside a tensor-parallel region: it computes the gradients of its weights while the
gradient of the region's input is summed over ranks (model/parallel/overlap.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.parallel.context import ParallelContext
from model.parallel.overlap import Late, Slot, enter_overlapped

MULTIPLE = 8
"""Halves in 16 bytes."""


def region_linear(x: Tensor, late: Late) -> Tensor:
    """`x` [..., d] and `late.weights` [w_i, d] -> [..., sum of w_i], the maps side by side."""
    if late.slot is None and len(late.weights) == 1:
        return aligned_linear(x, late.weights[0])
    return _Linear.apply(late.slot, x, *late.weights)


def aligned_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., d] and `weight` [w, d] -> [..., w]. On a GPU in half precision widths that are no multiple of 8, such
    as the hidden layers of the published models (4188), are filled up with zeros before the product: rows that do not
    begin at multiples of 16 bytes make cuBLAS take kernels of an older GPU (docs/gpu.md). The result is then a view,
    which must not be changed in place. Not in tensor-parallel regions."""
    filled = padding(x, weight)
    return F.linear(x, weight) if filled == (0, 0) else _Filled.apply(x, weight, None, *filled)[..., : len(weight)]


def filled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x` [..., d], `weight` [w, d] and `bias` [w] -> [..., w], where `aligned_linear` would fill nothing up. Elsewhere
    the last axes may be wider: that of the result is w filled up, with zeros behind the w columns, and `x` may be such
    a result. So a hidden layer that is no multiple of 8 wide is filled up once, by the product that makes it, and no
    pass over it, nor over its gradient, copies rows from one width to the other. Not in tensor-parallel regions."""
    filled = padding(x, weight)
    return F.linear(x, weight) + bias if filled == (0, 0) else _Filled.apply(x, weight, bias, *filled)


class _Filled(torch.autograd.Function):
    """Keeps x as it is filled up, and the weight, which is filled up again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: int, rows: int) -> Tensor:
        ctx.columns, ctx.rows, ctx.given = columns, rows, x.shape[-1]
        x = _padded(x, 0, weight.shape[1] + columns - ctx.given)
        ctx.save_for_backward(x, weight)
        ctx.outputs = None if bias is None else len(bias)
        filled = _padded(weight, 0, columns, 0, rows)
        if bias is None:
            return F.linear(x, filled)
        return torch.addmm(_padded(bias, 0, rows), x.flatten(0, -2), filled.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, columns = weight.shape
        grad_x = grad @ _padded(weight, 0, ctx.columns, 0, ctx.rows)
        flat = grad.flatten(0, -2)
        grad_weight = (flat.t() @ x.flatten(0, -2))[:rows, :columns]
        grad_bias = None if ctx.outputs is None else flat.sum(0)[: ctx.outputs]
        return grad_x[..., : ctx.given], grad_weight, grad_bias, None, None


def _padded(t: Tensor, *lacking: int) -> Tensor:
    """As F.pad, which copies where nothing is lacking too."""
    return F.pad(t, lacking) if any(lacking) else t


def padding(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Columns and rows that `weight` lacks."""
    if x.device.type != "cuda" or x.element_size() != 2:
        return 0, 0
    rows, columns = weight.shape
    return -columns % MULTIPLE, -rows % MULTIPLE


def column_linear(x: Tensor, weight: Tensor, parallel: ParallelContext) -> Tensor:
    """The only linear map of a region enters it: `x` [B, T, d], or with sequence parallelism this rank's tokens of it,
    and this rank's rows `weight` [w, d] -> [B, T, w].

    megatron-core's ColumnParallelLinear has this overlap inside. With sequence parallelism it divides the first
    dimension, and gathers the tokens once more in the backward pass: in that case our own function enters the region
    (docs/parallelism.md has the measurement).
    """
    if parallel.tensor_group is None or parallel.sequence_parallel:
        x, _, (late,) = enter_overlapped(x, parallel, (weight,))
        return region_linear(x, late)
    from model.parallel import megatron_core

    return megatron_core.column_linear(x, weight, parallel.tensor_group)


class _Linear(torch.autograd.Function):
    """Keeps the weights for the backward pass, which concatenates them again."""

    @staticmethod
    def forward(ctx: Any, slot: Slot | None, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.slot = slot
        ctx.save_for_backward(x, *weights)
        return F.linear(x, _joined(weights))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        widths = [len(weight) for weight in weights]
        grad_x = grad @ _joined(weights)
        if ctx.slot is None:
            return None, grad_x, *_weight_gradients(grad, x, widths)
        ctx.slot.leave(partial(_weight_gradients, grad, x, widths))
        return None, grad_x, *[None] * len(weights)


def _weight_gradients(grad: Tensor, x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).split(widths)


def _joined(weights: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)
