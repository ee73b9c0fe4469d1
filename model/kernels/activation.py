"""The activation between an expert's two matrices: ReLU, or SwiGLU where the first matrix has twice the columns.

    ReLU     hidden [n, G]     activated = ReLU(hidden)
    SwiGLU   hidden [n, 2 G]   activated = SiLU(hidden[:, :G]) * hidden[:, G:]               (arXiv 2002.05202)

The matrices' shapes say which it is: up [.., d, W] and down [.., G, d] are SwiGLU's if W = 2 G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def is_swiglu(up_experts: Tensor, down_experts: Tensor) -> bool:
    """Whether `up_experts` [E, d, W] and `down_experts` [E, G, d] are SwiGLU's. ValueError unless W is G or 2 G."""
    W, G = up_experts.shape[2], down_experts.shape[1]
    if W not in (G, 2 * G):
        raise ValueError(f"up_experts has {W} columns; for the {G} rows of down_experts ReLU needs {G}, SwiGLU {2 * G}")
    return W == 2 * G


def activate(hidden: Tensor, *, swiglu: bool) -> Tensor:
    """[n, W] -> [n, G], differentiable."""
    if not swiglu:
        return F.relu(hidden)
    gate, linear = hidden.chunk(2, dim=-1)
    return F.silu(gate) * linear


def activate_kept(hidden: Tensor, *, swiglu: bool) -> Tensor:
    """As `activate`, without a gradient. It leaves in `hidden` what `activation_gradient` takes: for ReLU the result,
    which is `hidden` itself, for SwiGLU both halves unchanged."""
    return activate(hidden, swiglu=True) if swiglu else hidden.relu_()


def activation_gradient(grad: Tensor, hidden: Tensor, *, swiglu: bool, out: Tensor | None = None) -> Tensor:
    """The gradient of `hidden` [n, W], as `activate_kept` left it, for the gradient `grad` [n, G] of the activated
    layer. `out` [n, W], where given, may be `grad` itself for ReLU."""
    out = torch.empty_like(hidden) if out is None else out
    if not swiglu:
        return torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=out)
    gate, linear = hidden.chunk(2, dim=-1)
    grad_gate, grad_linear = out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_linear)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * linear, gate))
    return out
