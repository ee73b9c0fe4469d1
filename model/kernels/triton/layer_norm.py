"""LayerNorm in Triton, with the residual addition and the dropout before it: one launch forward, two backward.

Bytes per value in bf16, forward 8 (residual and branch read, their sum and the norm written), 4 without a branch;
backward 8 (the sum and both gradients read, one gradient written), 10 after dropout, 6 without a branch. A row stays in
registers between its statistics and its norm. Statistics are fp32 [N] and kept. Gradients of weight and bias are sums
over rows: a number of programs that depends on the shape alone takes as many rows each, and a second launch adds their
sums up in order. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.dropout import Draw
from model.kernels.triton.dropout import is_kept, mask_arguments, sequence_hash
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.tiles import Tiles, measured

RESIDENT_WARPS = 2048
"""Of the backward pass: at most 16 for each SM of an H100, which then all run at once."""
SUM_TILES: Tiles = {"rows": 128, "columns": 32, "warps": 8}
"""Of the sum over programs."""
COUNTS = ["tokens", "rows", "num_rows", "num_parts", "threshold", "key_low", "key_high", "first_counter"]
"""Arguments that are not worth machine code of their own."""


@triton.jit
def mask_scale(
    row, column, sequence_index_ptr, tokens, scale, threshold, key_low, key_high, first_counter, WIDTH: tl.constexpr
):  # fmt: skip
    """mask / (1 - p) of a row of [B, tokens, WIDTH], fp32."""
    sequence = row // tokens
    hashed = sequence_hash(sequence_index_ptr, sequence, key_low, key_high)
    counter = first_counter.to(tl.uint32) + ((row - sequence * tokens) * WIDTH + column).to(tl.uint32)
    return tl.where(is_kept(counter, hashed, threshold), scale, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def norm_forward_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, sequence_index_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr,
    tokens, epsilon, scale, threshold, key_low, key_high, first_counter,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sum = x + dropout(branch) and y = norm(sum) of one row of WIDTH; rstd = 1 / sqrt(variance + epsilon). Without
    `sequence_index_ptr` there is no dropout, without `branch_ptr` no sum. The norm is that of the sum as it is
    stored."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    start = row.to(tl.int64) * WIDTH
    x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        if sequence_index_ptr is not None:
            branch *= mask_scale(
                row, column, sequence_index_ptr, tokens, scale, threshold, key_low, key_high, first_counter, WIDTH
            )
        stored = (x + branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + column, stored, mask=mask)
        x = stored.to(tl.float32)
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / WIDTH + epsilon)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + start + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
    grad_y_ptr, grad_sum_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, sequence_index_ptr,
    grad_x_ptr, grad_branch_ptr, parts_ptr,
    rows, num_rows, tokens, scale, threshold, key_low, key_high, first_counter,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`rows` rows after each other, loaded two ahead. `grad_sum_ptr`: gradient of the sum by its other uses, if it has
    any. `grad_branch_ptr`: only with dropout, else it is that of x. parts [2, programs, WIDTH] fp32: gradients of
    weight and bias."""
    part = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    grad_weight, grad_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    first = part * rows
    for number in tl.range(0, tl.minimum(rows, num_rows - first), num_stages=3):
        row = first + number
        start = row.to(tl.int64) * WIDTH
        grad_y = tl.load(grad_y_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(sum_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        normal = (x - mean) * rstd
        grad_weight += grad_y * normal
        grad_bias += grad_y
        grad_normal = grad_y * weight
        along = tl.sum(grad_normal * normal, 0) / WIDTH
        grad = (grad_normal - tl.sum(grad_normal, 0) / WIDTH - normal * along) * rstd
        if grad_sum_ptr is not None:
            grad += tl.load(grad_sum_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + column, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_branch_ptr is not None:
            grad *= mask_scale(
                row, column, sequence_index_ptr, tokens, scale, threshold, key_low, key_high, first_counter, WIDTH
            )
            tl.store(grad_branch_ptr + start + column, grad.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    own = part.to(tl.int64) * WIDTH
    tl.store(parts_ptr + own + column, grad_weight, mask=mask)
    tl.store(parts_ptr + tl.num_programs(0).to(tl.int64) * WIDTH + own + column, grad_bias, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def norm_sum_kernel(
    parts_ptr, grad_weight_ptr, grad_bias_ptr, num_parts,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum over `num_parts` of parts [2, num_parts, WIDTH] for COLUMNS columns of the weight (program_id(1) = 0) or of
    the bias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    parts_ptr += which.to(tl.int64) * num_parts * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, num_parts, ROWS, num_stages=3):
        part = first + tl.arange(0, ROWS)
        inside = (part < num_parts)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(parts_ptr + part[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(grad_weight_ptr + column, result.to(grad_weight_ptr.dtype.element_ty), mask=column < WIDTH)
    else:
        tl.store(grad_bias_ptr + column, result.to(grad_bias_ptr.dtype.element_ty), mask=column < WIDTH)


# -------------------------------------------------------------------------------------------------------------- host


def warps(width: int) -> int:
    """8 values a thread, or 16 of wide rows."""
    return min(16, max(1, triton.next_power_of_2(width) // (256 if width <= 2048 else 512)))


def backward_tiles(width: int) -> Tiles:
    """Warps of a program of the backward pass, and of all together."""
    return {"warps": warps(width), "resident": RESIDENT_WARPS}


def rows_each(num_rows: int, tiles: Tiles) -> int:
    """Rows of a program of the backward pass."""
    return max(1, triton.cdiv(num_rows * tiles["warps"], tiles["resident"]))


def draw_arguments(draw: Draw | None, tokens: int, width: int) -> dict[str, int | float]:
    """Those of `mask_scale`, by name."""
    if draw is None:
        return {"tokens": tokens, "scale": 1.0, "threshold": 0, "key_low": 0, "key_high": 0, "first_counter": 0}
    found = mask_arguments(draw, width)
    assert not found["DIVIDED"], "every rank has whole rows of the residual stream"
    names = ("threshold", "key_low", "key_high", "first_counter")
    return {"tokens": tokens, "scale": 1.0 / (1.0 - draw.probability)} | {name: found[name] for name in names}


@on_its_device
def layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, draw: Draw | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `model.kernels.ops.elementwise._layer_norm`."""
    (B, T, d), x = x.shape, x.contiguous()
    branch = None if branch is None else branch.contiguous()
    total = x.new_empty(0) if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(B * T, dtype=torch.float32, device=x.device) for _ in range(2))
    if B * T > 0:
        tiles = measured("norm forward", x.dtype, d=d) or {"warps": warps(d)}
        norm_forward_kernel[(B * T,)](
            x, branch, weight.contiguous(), bias.contiguous(),
            None if draw is None else draw.sequence_index.contiguous(), None if branch is None else total, y, mean,
            rstd, epsilon=epsilon, **draw_arguments(draw, T, d), WIDTH=d, BLOCK=triton.next_power_of_2(d),
            num_warps=tiles["warps"],
        )  # fmt: skip
    return total, y, mean, rstd


@on_its_device
def layer_norm_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor],
    draw: Draw | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `model.kernels.ops.elementwise._layer_norm_backward`."""
    (B, T, d), device = total.shape, total.device
    grad_y, total = grad_y.contiguous(), total.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=device)
    grad_branch = total.new_empty(0) if draw is None else torch.empty(total.shape, dtype=total.dtype, device=device)
    grad_weight, grad_bias = (torch.empty(d, dtype=weight.dtype, device=device) for _ in range(2))
    tiles = measured("norm backward", total.dtype, d=d) or backward_tiles(d)
    rows = rows_each(B * T, tiles)
    num_parts = triton.cdiv(B * T, rows)
    parts = torch.empty((2, num_parts, d), dtype=torch.float32, device=device)
    if num_parts > 0:
        norm_backward_kernel[(num_parts,)](
            grad_y, grad_sum, total, weight.contiguous(), *statistics,
            None if draw is None else draw.sequence_index.contiguous(), grad_x, None if draw is None else grad_branch,
            parts, rows=rows, num_rows=B * T, **draw_arguments(draw, T, d), WIDTH=d, BLOCK=triton.next_power_of_2(d),
            num_warps=tiles["warps"],
        )  # fmt: skip
    summing = measured("norm sum", total.dtype, d=d) or SUM_TILES
    norm_sum_kernel[(triton.cdiv(d, summing["columns"]), 2)](
        parts, grad_weight, grad_bias, num_parts, WIDTH=d, ROWS=summing["rows"], COLUMNS=summing["columns"],
        num_warps=summing["warps"],
    )  # fmt: skip
    return grad_x, grad_branch, grad_weight, grad_bias
