"""Dense products of torch whose sums are kept wider than their factors."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b: `a` and `b` in any dtype, `out` and the sums in a wider one, or the same."""
    if a.dtype == out.dtype or a.device.type == "cpu":  # on the CPU torch has no product of halves in fp32
        a, b = a.to(out.dtype), b.to(out.dtype)
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    # GPU-ONLY half-gemm-in-fp32
    return torch.addmm(out, a, b, out.dtype, out=out) if add else torch.mm(a, b, out.dtype, out=out)


def add_product(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor:
    """`total` += a @ b, all of one dtype, or a new tensor without `total`. The sum costs one more read of `total`
    inside the product, where a sum of two tensors reads both and writes a third."""
    return torch.mm(a, b) if total is None else multiply(a, b, total, add=True)
