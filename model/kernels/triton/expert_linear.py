"""expert_linear and expert_linear_sum on GPUs: sorted GEMMs of one router (model/kernels/triton/sorted_gemm.py).

`order` [N*k] and `load` [E] are the router's, of any integer dtype.
"""

from __future__ import annotations

from torch import Tensor

from model.kernels.triton.gated_gemm import check_dtypes
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.sorted_gemm import Rows, project, sorted_weight_gradient
from model.kernels.triton.sorted_slots import mix_slots, slot_stride, sum_slots


@on_its_device
def forward(x: Tensor, order: Tensor, load: Tensor, experts: Tensor, k: int) -> Tensor:
    """x [N, d], experts [E, d, h] -> [N, k, h]: every slot's own expert."""
    check_dtypes(x, experts)
    x, order, load, experts = (t.contiguous() for t in (x, order, load, experts))
    h = experts.shape[2]
    y = project(Rows.of_tokens(x, k), order, load, experts[None], None, k, transposed=False)
    return y.view(x.shape[0], k, h)


def backward(grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and experts for `grad` [N, k, h]."""
    arguments = grad.contiguous(), x, order, load, experts
    return input_gradient(*arguments), expert_gradient(*arguments)


@on_its_device
def input_gradient(grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    grad, order, load, experts = (t.contiguous() for t in (grad, order, load, experts))
    narrow, stride = Rows.of_slots(grad), slot_stride(x.shape[1])
    slots = project(narrow, order, load, experts[None], None, grad.shape[1], transposed=True, stride=stride)
    return sum_slots(slots, *x.shape)


@on_its_device
def expert_gradient(grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    grad, x, order, load, experts = (t.contiguous() for t in (grad, x, order, load, experts))
    k, narrow = grad.shape[1], Rows.of_slots(grad)
    return sorted_weight_gradient(
        Rows.of_tokens(x, k), narrow, order, load, experts[None], None, k, narrow_first=False
    )[0]


@on_its_device
def sum_forward(a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    """a [N, k, h], gates [N, k], experts [E, h, d] -> [N, d]: summed over k."""
    check_dtypes(a, experts)
    a, gates, order, load, experts = (t.contiguous() for t in (a, gates, order, load, experts))
    (N, k, _), d = a.shape, experts.shape[2]
    rows, scores, stride = Rows.of_slots(a), gates[:, None], slot_stride(d)
    wide = project(rows, order, load, experts[None], scores, k, transposed=False, stride=stride)
    return sum_slots(wide, N, d)


@on_its_device
def sum_backward(
    grad: Tensor, a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, gates and experts for `grad` [N, d]."""
    grad, a, gates, order, load, experts = (t.contiguous() for t in (grad, a, gates, order, load, experts))
    N, k, h = a.shape
    wide, weights = Rows.of_tokens(grad, k), experts[None]
    products = project(wide, order, load, weights, None, k, transposed=True)
    # A slot is a token with one choice here: its gradient and its gate's, both from its own product.
    grad_a, grad_gates = mix_slots(products, gates.view(N * k, 1, 1), a.view(N * k, 1, h))
    grad_experts = sorted_weight_gradient(
        wide, Rows.of_slots(a), order, load, weights, gates[:, None], k, narrow_first=True
    )
    return grad_a.view(N, k, h), grad_gates.view(N, k), grad_experts[0]
