"""The expert projections of Mixture of Attention Heads: one matrix per expert, from tokens to slots and back.

    expert_linear      y[n, j] = x[n] W[e],                               e = index[n, j]         (the queries)
    expert_linear_sum  y[n]    = sum over j of gates[n, j] * a[n, j] W[e]                         (the output)
                                                                        (MoA, arXiv 2210.05144, section 3)

Shapes: N tokens, d d_model (wide), h head_dim (narrow), E experts, k experts per token. A slot n*k + j is one (token,
choice) pair. Wide rows belong to tokens and narrow ones to slots: each op is the other's input gradient.

Measured (N=2048, d=416, h=88, E=10, k=4, both ops forward + backward, one thread on a busy machine, share of torch.mm's
rate at 2048^3 in the same run): 51% in fp32; F.grouped_mm 33%, a loop over experts with index_add 34%, reference 31%.
bf16 is computed in fp32 where the CPU has no AMX: 88% of torch.mm's bf16 rate, the others 52-60%.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import gemm_dtype
from model.kernels.cpu.sorted_rows import expert_segment, mm_into, sorted_gates, sum_slots
from model.kernels.cpu.workers import run_tasks, scratch
from model.kernels.ops.route import counting_sort


def expert_linear(x: Tensor, index: Tensor, order: Tensor, load: Tensor, experts: Tensor, *, backend: str) -> Tensor:
    """`x` [N, d], `index` [N, k] int64, `order` [N*k] (slots grouped by expert, in token order) and `load` [E] int64 as
    `model.kernels.ops.route` gives them, `experts` [E, d, h] -> [N, k, h] in the dtype of `x`.

    Differentiable in `x` and `experts`. `backend` is a resolved one (model/kernels/backend.py).
    """
    if backend == "reference":
        return expert_linear_reference(x, index, experts)
    return _expert_linear(x, order, load, experts, index.shape[1], backend)


def expert_linear_sum(
    a: Tensor, gates: Tensor, index: Tensor, order: Tensor, load: Tensor, experts: Tensor, *, backend: str
) -> Tensor:
    """`a` [N, k, h], `gates` [N, k], `experts` [E, h, d]; `index`, `order`, `load` as above -> [N, d] in the dtype of
    `a`. Differentiable in `a`, `gates` (any float dtype) and `experts`."""
    if backend == "reference":
        return expert_linear_sum_reference(a, gates, index, experts)
    return _expert_linear_sum(a, gates, order, load, experts, backend)


def group_choices(index: Tensor, num_experts: int, *, backend: str) -> tuple[Tensor, Tensor]:
    """`index` [N, k] -> order [N*k] and load [E] for the ops above, where no router gives them: a tensor-parallel rank
    takes some of a token's choices. On the device of `index`, without waiting for it."""
    if backend == "triton":
        from model.kernels.triton.sorted_slots import sort_slots

        order, load = sort_slots(index[:, None].contiguous(), num_experts)
        return order[0], load[0]
    if backend == "cpu":
        load, order = counting_sort(index[:, None], num_experts)
        return order[0], load[0]
    slots = index.flatten()
    load = torch.zeros(num_experts, dtype=torch.int64, device=index.device)
    return slots.sort(stable=True).indices, load.scatter_add_(0, slots, torch.ones_like(slots))


def expert_linear_reference(x: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    """The specification: every expert computes every token, the chosen results are gathered. Half precision is
    computed in fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    products = torch.einsum("nd,edh->neh", x.to(wide), experts.to(wide))
    return products.gather(1, index[:, :, None].expand(-1, -1, experts.shape[2])).to(x.dtype)


def expert_linear_sum_reference(a: Tensor, gates: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    """The specification: the gated row of a slot stands at its expert, all others are zero."""
    wide = torch.promote_types(a.dtype, torch.float32)
    gated = a.to(wide) * gates.to(wide)[:, :, None]
    by_expert = gated.new_zeros(a.shape[0], experts.shape[0], a.shape[2])
    by_expert = by_expert.scatter(1, index[:, :, None].expand_as(a), gated)
    return torch.einsum("neh,ehd->nd", by_expert, experts.to(wide)).to(a.dtype)


# --------------------------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("switchall::expert_linear", mutates_args=())
def _expert_linear(x: Tensor, order: Tensor, load: Tensor, experts: Tensor, k: int, backend: str) -> Tensor:
    return {"cpu": _linear_cpu, "triton": _linear_triton}[backend](x, order, load, experts, k)


@torch.library.custom_op("switchall::expert_linear_backward", mutates_args=())
def _expert_linear_backward(
    grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and experts for the output's gradient `grad` [N, k, h]."""
    forms = {"cpu": _linear_backward_cpu, "triton": _linear_backward_triton}
    return forms[backend](grad, x, order, load, experts)


@torch.library.custom_op("switchall::expert_linear_sum", mutates_args=())
def _expert_linear_sum(a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor, backend: str) -> Tensor:
    return {"cpu": _sum_cpu, "triton": _sum_triton}[backend](a, gates, order, load, experts)


@torch.library.custom_op("switchall::expert_linear_sum_backward", mutates_args=())
def _expert_linear_sum_backward(
    grad: Tensor, a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of a, gates and experts for the output's gradient `grad` [N, d]."""
    forms = {"cpu": _sum_backward_cpu, "triton": _sum_backward_triton}
    return forms[backend](grad, a, gates, order, load, experts)


@_expert_linear.register_fake
def _(x, order, load, experts, k, backend):
    return x.new_empty(x.shape[0], k, experts.shape[2])


@_expert_linear_sum.register_fake
def _(a, gates, order, load, experts, backend):
    return a.new_empty(a.shape[0], experts.shape[2])


@_expert_linear_backward.register_fake
def _(grad, x, order, load, experts, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, experts))


@_expert_linear_sum_backward.register_fake
def _(grad, a, gates, order, load, experts, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, gates, experts))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*(t for t in tensors if isinstance(t, Tensor)))


def _linear_autograd(ctx, grad):
    grad_x, grad_experts = _expert_linear_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, None, None, grad_experts, None, None


def _sum_autograd(ctx, grad):
    grad_a, grad_gates, grad_experts = _expert_linear_sum_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_a, grad_gates, None, None, grad_experts, None


_expert_linear.register_autograd(_linear_autograd, setup_context=_setup_context)
_expert_linear_sum.register_autograd(_sum_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.switchall.expert_linear)
def linear_flop(x_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """2 flops per multiply-add, k experts per token."""
    return 2 * order_shape[0] * experts_shape[1] * experts_shape[2]


@register_flop_formula(torch.ops.switchall.expert_linear_backward)
def linear_backward_flop(grad_shape, x_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """Input and weight gradient: twice the forward pass."""
    return 2 * linear_flop(x_shape, order_shape, load_shape, experts_shape)


@register_flop_formula(torch.ops.switchall.expert_linear_sum)
def sum_flop(a_shape, gates_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """2 flops per multiply-add, k experts per token."""
    return 2 * order_shape[0] * experts_shape[1] * experts_shape[2]


@register_flop_formula(torch.ops.switchall.expert_linear_sum_backward)
def sum_backward_flop(grad_shape, a_shape, gates_shape, order_shape, load_shape, experts_shape, *args, **kwargs) -> int:
    """Input and weight gradient: twice the forward pass."""
    return 2 * sum_flop(a_shape, gates_shape, order_shape, load_shape, experts_shape)


# ------------------------------------------------------------------------------------------------------------- Triton
# Imported where it runs: users of the CPU need no triton.


def _linear_triton(*tensors_and_k):
    from model.kernels.triton.expert_linear import forward_triton

    return forward_triton(*tensors_and_k)


def _linear_backward_triton(*tensors):
    from model.kernels.triton.expert_linear import backward_triton

    return backward_triton(*tensors)


def _sum_triton(*tensors):
    from model.kernels.triton.expert_linear import forward_sum_triton

    return forward_sum_triton(*tensors)


def _sum_backward_triton(*tensors):
    from model.kernels.triton.expert_linear import backward_sum_triton

    return backward_sum_triton(*tensors)


# --------------------------------------------------------------------------------------------------------------- CPU
# The slots of one expert are one task: gathered into a tile that stays in cache, multiplied, and written to the slots
# they belong to (disjoint ones: nothing depends on which worker takes which).


def _linear_cpu(x: Tensor, order: Tensor, load: Tensor, experts: Tensor, k: int) -> Tensor:
    (N, d), h = x.shape, experts.shape[2]
    dtype, counts, tokens = gemm_dtype(x.dtype), load.tolist(), order // k
    source, y = x.to(dtype), x.new_empty(N * k, h)

    def compute(expert: int) -> None:
        segment = expert_segment(counts, expert)
        wide, narrow = scratch("gathered", (counts[expert], d), dtype), scratch("narrow", (counts[expert], h), dtype)
        torch.index_select(source, 0, tokens[segment], out=wide)
        torch.mm(wide, experts[expert].to(dtype), out=narrow)
        y.index_copy_(0, order[segment], narrow.to(y.dtype))

    run_tasks(counts, compute)
    return y.view(N, k, h)


def _linear_backward_cpu(
    grad: Tensor, x: Tensor, order: Tensor, load: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor]:
    (_, k, h), d = grad.shape, x.shape[1]
    dtype, counts, tokens = gemm_dtype(x.dtype), load.tolist(), order // k
    source, narrow_source = x.to(dtype), grad.reshape(-1, h).to(dtype)
    rows, grad_experts = scratch("rows", (order.shape[0], d), dtype), experts.new_empty(experts.shape)

    def compute(expert: int) -> None:
        segment = expert_segment(counts, expert)
        wide, narrow = scratch("gathered", (counts[expert], d), dtype), scratch("narrow", (counts[expert], h), dtype)
        torch.index_select(source, 0, tokens[segment], out=wide)
        torch.index_select(narrow_source, 0, order[segment], out=narrow)
        mm_into(grad_experts[expert], wide.t(), narrow)
        torch.mm(narrow, experts[expert].to(dtype).t(), out=rows[segment])

    run_tasks(counts, compute)
    _clear_unused(grad_experts, counts)
    return sum_slots(rows, order, k, x), grad_experts


def _sum_cpu(a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor) -> Tensor:
    (N, k, h), d = a.shape, experts.shape[2]
    dtype, counts = gemm_dtype(a.dtype), load.tolist()
    source, gate_column = a.reshape(N * k, h).to(dtype), sorted_gates(gates, order, dtype)
    rows = scratch("rows", (N * k, d), dtype)

    def compute(expert: int) -> None:
        segment = expert_segment(counts, expert)
        narrow = scratch("narrow", (counts[expert], h), dtype)
        torch.index_select(source, 0, order[segment], out=narrow)
        # The gate multiplies the narrow side: the same product, fewer bytes.
        torch.mm(narrow.mul_(gate_column[segment]), experts[expert].to(dtype), out=rows[segment])

    run_tasks(counts, compute)
    return sum_slots(rows, order, k, a.new_empty(N, d))


def _sum_backward_cpu(
    grad: Tensor, a: Tensor, gates: Tensor, order: Tensor, load: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (N, k, h), d, slots = a.shape, experts.shape[2], order.shape[0]
    dtype, counts, tokens = gemm_dtype(a.dtype), load.tolist(), order // k
    source, wide_source = a.reshape(slots, h).to(dtype), grad.to(dtype)
    gate_column, gate_rows = sorted_gates(gates, order, dtype), a.new_empty(slots, dtype=dtype)
    grad_a, grad_experts = a.new_empty(slots, h), experts.new_empty(experts.shape)

    def compute(expert: int) -> None:
        segment = expert_segment(counts, expert)
        wide = scratch("gathered", (counts[expert], d), dtype)
        narrow, grad_narrow = (scratch(name, (counts[expert], h), dtype) for name in ("narrow", "grad_narrow"))
        torch.index_select(wide_source, 0, tokens[segment], out=wide)
        torch.index_select(source, 0, order[segment], out=narrow)
        torch.mm(wide, experts[expert].to(dtype).t(), out=grad_narrow)
        torch.linalg.vecdot(grad_narrow, narrow, out=gate_rows[segment])
        grad_a.index_copy_(0, order[segment], grad_narrow.mul_(gate_column[segment]).to(a.dtype))
        mm_into(grad_experts[expert], narrow.mul_(gate_column[segment]).t(), wide)

    run_tasks(counts, compute)
    _clear_unused(grad_experts, counts)
    grad_gates = gates.new_empty(slots)
    grad_gates[order] = gate_rows.to(gates.dtype)
    return grad_a.view(N, k, h), grad_gates.view(N, k), grad_experts


def _clear_unused(grad_experts: Tensor, counts: list[int]) -> None:
    """Zero gradient for the experts that no token chose."""
    for expert, count in enumerate(counts):
        if count == 0:
            grad_experts[expert].zero_()
