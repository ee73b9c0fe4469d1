"""What the kernels of attention share: the rows of a head, one of each token, and their padding to whole 16 bytes."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_rows(tensor, start, num_rows, stride, h, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `start` to `start` + ROWS of [num_rows, h] at distance `stride`; 0 outside of it."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < h)[None, :]
    return tl.load(tensor + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(tensor, values, start, num_rows, stride, h, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < h)[None, :]
    target = tensor + rows[:, None] * stride + columns[None, :]
    tl.store(target, values.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def load_each(tensor, start, num_rows, ROWS: tl.constexpr):
    """A number of each row; 0 outside."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(tensor + rows, mask=rows < num_rows, other=0.0)


# -------------------------------------------------------------------------------------------------------------- host


def padded(t: Tensor) -> Tensor:
    """A contiguous tensor, whose rows are whole 16 bytes in half precision: zeros follow the columns of a head."""
    missing = -t.shape[-1] % 8
    return F.pad(t, (0, missing)) if missing else t.contiguous()


def narrowed(t: Tensor, width: int) -> Tensor:
    """Without the columns after `width`."""
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))


def span(t: Tensor) -> int:
    """Values of [B, ...] from the first to behind the last of a sequence."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
