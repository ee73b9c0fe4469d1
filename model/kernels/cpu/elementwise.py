"""The elementwise ops on the CPU: plain operators, which autograd knows, in the dtype of their tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.dropout import Draw


def dropout(x: Tensor, residual: Tensor | None, draw: Draw) -> Tensor:
    """As `model.kernels.ops.elementwise.dropout`."""
    y = (x * draw.mask(x.shape).to(x.dtype)).div_(1.0 - draw.probability)
    return y if residual is None else residual + y


def keep_mask(shape: tuple[int, ...], draw: Draw) -> Tensor:
    """As `model.kernels.ops.elementwise.keep_mask`."""
    return draw.mask(shape)


def layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """As `model.kernels.ops.elementwise.layer_norm`."""
    if branch is not None:
        x = x + branch if draw is None else dropout(branch, x, draw)
    return x, F.layer_norm(x, weight.shape, weight, bias, epsilon)
