"""SwitchHead's expert projections: per token and head, a gated sum over the k chosen of E experts.

    switchhead_value    v[n, H] = sum over j of       scores[n, H, j] * x[n]    W_V[H, index[n, H, j]]
    switchhead_output   y[n]    = sum over H and j of scores[n, H, j] * a[n, H] W_O[H, index[n, H, j]]
                                                                        (SwitchHead, arXiv 2312.07987, section 2.2)

Letters of shapes, of einsums and of name suffixes: N (n) tokens, d d_model, H heads, h head_dim, E (e) experts of a
head, k chosen experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import ADDING, check_backend, implementation, triton_limit
from model.kernels.cpu.grouping import saved_shapes
from model.kernels.dtypes import wide_dtype
from model.kernels.op import op
from model.kernels.ops.route import Choice
from model.parallel.overlap import Slot

STRATEGIES = {
    "cpu": ("all", "sets", "experts"),
    "triton": ("gated", "sorted"),
    "dense": ("fused", "plain"),
    "sets": ("fused",),
}
"""How a backend may go through the experts, with the same result: see model/kernels/cpu/grouping.py,
model/kernels/triton/gated_gemm.py and model/kernels/dense/gemms.py."""


class Inputs(NamedTuple):
    """What every backend takes of a call of either op, forward and backward."""

    rows: Tensor
    """x [N, d] of value, a [N, H, h] of output."""
    choice: Choice
    experts: Tensor
    """[H, E, d, h] of value, [H, E, h, d] of output."""
    strategy: str

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], strategy: str) -> Inputs:
        """From the tensors of a custom op: rows, those of the choice, experts."""
        rows, *choice, experts = tensors
        return cls(rows, Choice(*choice), experts, strategy)

    def contiguous(self) -> Inputs:
        """The same with every tensor contiguous."""
        choice = Choice(*(t.contiguous() for t in self.choice))
        return Inputs(self.rows.contiguous(), choice, self.experts.contiguous(), self.strategy)


def switchhead_value(
    x: Tensor,
    choice: Choice,
    experts: Tensor,
    *,
    backend: str,
    strategy: str | None = None,
    slot: Slot | None = None,
) -> Tensor:
    """`x` [N, d], `choice` of N tokens and H routers, `experts` [H, E, d, h] -> [N, H, h] in the dtype of `x`.

    Differentiable in `x`, the choice's scores and `experts`. `backend` is a resolved one (model/kernels/backend.py);
    `strategy` is one of `STRATEGIES` for tests and benchmarks, else chosen by the shapes. With `slot` the gradient of
    the experts is left to it (model/parallel/overlap.py), but by the reference, which gives it at once.
    """
    if backend == "reference":
        return switchhead_value_reference(x, choice, experts)
    strategy = _resolve_strategy("switchhead_value", backend, strategy, choice, experts)
    if slot is not None:
        return _LateValue.apply(slot, x, *choice, experts, backend, strategy)
    return torch.ops.switchall.switchhead_value(x, *choice, experts, backend, strategy)[0]


def switchhead_value_handing_on(
    x: Tensor, choice: Choice, experts: Tensor, *, backend: str, slot: Slot | None = None
) -> tuple[Tensor, Tensor]:
    """`x` for what is computed of it next, and `switchhead_value`: a backend of `ADDING` sums the gradients of x by
    both inside its product, but not with a `slot` (model/kernels/op.py, `hand_on`)."""
    if backend not in ADDING["switchhead_value"] or slot is not None:
        return x, switchhead_value(x, choice, experts, backend=backend, slot=slot)
    strategy = _resolve_strategy("switchhead_value", backend, None, choice, experts)
    return _value.hand_on(x, *choice, experts, backend, strategy)[:2]


def switchhead_output(
    a: Tensor, choice: Choice, experts: Tensor, *, backend: str, strategy: str | None = None
) -> Tensor:
    """`a` [N, H, h], attention's result per head, `choice` of N tokens and H routers, `experts` [H, E, h, d] -> [N, d]
    in the dtype of `a`. Differentiable in `a`, the choice's scores and `experts`; the rest as above."""
    if backend == "reference":
        return switchhead_output_reference(a, choice, experts)
    strategy = _resolve_strategy("switchhead_output", backend, strategy, choice, experts)
    return torch.ops.switchall.switchhead_output(a, *choice, experts, backend, strategy)[0]


def choose_strategy(backend: str, num_tokens: int, num_experts: int, k: int) -> str:
    """By the shape alone, so that every rank and every repetition takes the same path. Measurements and arithmetic:
    docs/kernels.md."""
    if backend == "triton":
        return "gated" if 2 * k >= num_experts else "sorted"
    if 8 * k > 7 * num_experts:
        return "all"
    return "sets" if num_tokens >= 128 * math.comb(num_experts, k) else "experts"


def _resolve_strategy(op: str, backend: str, strategy: str | None, choice: Choice, experts: Tensor) -> str:
    check_backend(op, backend)
    N, _, k = choice.index.shape
    if strategy is None and backend == "sets":
        return "fused"
    if strategy is None and backend == "dense":
        on_gpu = experts.device.type == "cuda" and triton_limit("cuda", experts.dtype) is None
        return "fused" if on_gpu else "plain"
    if strategy is None:
        return choose_strategy(backend, N, experts.shape[1], k)
    if strategy not in STRATEGIES[backend]:
        raise ValueError(f"{op} has no strategy {strategy!r} for {backend}: there is {', '.join(STRATEGIES[backend])}")
    return strategy


# ---------------------------------------------------------------------------------------------------- specifications


def switchhead_value_reference(x: Tensor, choice: Choice, experts: Tensor) -> Tensor:
    """The specification: every expert computes every token, the gate of one that was not chosen is 0. Half precision is
    computed in fp32."""
    wide = wide_dtype(x.dtype)
    products_nHeh = torch.einsum("nd,Hedh->nHeh", x.to(wide), experts.to(wide))
    return torch.einsum("nHeh,nHe->nHh", products_nHeh, _gates(choice, experts, wide)).to(x.dtype).contiguous()


def switchhead_output_reference(a: Tensor, choice: Choice, experts: Tensor) -> Tensor:
    """The specification: the gated row of a head stands at each of its experts. Half precision is computed in fp32."""
    wide = wide_dtype(a.dtype)
    gated_nHeh = torch.einsum("nHe,nHh->nHeh", _gates(choice, experts, wide), a.to(wide))
    return torch.einsum("nHeh,Hehd->nd", gated_nHeh, experts.to(wide)).to(a.dtype).contiguous()


def _gates(choice: Choice, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H, E]: the score of a chosen expert, else 0."""
    (N, H, _), E = choice.index.shape, experts.shape[1]
    return choice.scores.new_zeros(N, H, E).scatter_add(2, choice.index, choice.scores).to(dtype)


# --------------------------------------------------------------------------------------------------------------- ops
# A custom op takes tensors, no record of them; the first thing that it does is to make one. Both return, after the
# result, what their backward pass takes again: the products of value's slots, and how the CPU grouped the tokens
# (`Grouping.saved`). It is empty where a backend needs none.

Saved = tuple[Tensor, Tensor, Tensor]


@op("switchhead_value")
def _value(
    x: Tensor,
    scores: Tensor,
    index: Tensor,
    order: Tensor,
    load: Tensor,
    experts: Tensor,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> v, products [slots or rows, h] and `Grouping.saved`."""
    inputs = Inputs.of((x, scores, index, order, load, experts), strategy)
    v, products, *grouping = implementation("switchhead_value", backend).forward(inputs)
    return v, products, *(grouping or _no_grouping(index))


@op("switchhead_value_backward")
def _value_backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    index: Tensor,
    order: Tensor,
    load: Tensor,
    experts: Tensor,
    products: Tensor,
    token: Tensor,
    place: Tensor,
    ends: Tensor,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, scores and experts for the output's gradient `grad` [N, H, h]."""
    inputs = Inputs.of((x, scores, index, order, load, experts), strategy)
    return implementation("switchhead_value", backend).backward(grad, inputs, (products, token, place, ends))


@op("switchhead_value_backward_added", changes=("total",))
def _value_backward_added(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    index: Tensor,
    order: Tensor,
    load: Tensor,
    experts: Tensor,
    products: Tensor,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of x to `total` [N, d] -> gradients of scores and experts. Of backends that need no
    grouping."""
    inputs = Inputs.of((x, scores, index, order, load, experts), strategy)
    _, *found = implementation("switchhead_value", backend).backward(grad, inputs, (products,), total)
    return found[0], found[1]


@op("switchhead_output")
def _output(
    a: Tensor,
    scores: Tensor,
    index: Tensor,
    order: Tensor,
    load: Tensor,
    experts: Tensor,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y and `Grouping.saved`."""
    inputs = Inputs.of((a, scores, index, order, load, experts), strategy)
    y, *grouping = implementation("switchhead_output", backend).forward(inputs)
    return y, *(grouping or _no_grouping(index))


@op("switchhead_output_backward")
def _output_backward(
    grad: Tensor,
    a: Tensor,
    scores: Tensor,
    index: Tensor,
    order: Tensor,
    load: Tensor,
    experts: Tensor,
    token: Tensor,
    place: Tensor,
    ends: Tensor,
    backend: str,
    strategy: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of a, scores and experts for the output's gradient `grad` [N, d]."""
    inputs = Inputs.of((a, scores, index, order, load, experts), strategy)
    return implementation("switchhead_output", backend).backward(grad, inputs, (token, place, ends))


def _no_grouping(index: Tensor) -> Saved:
    return index.new_empty(0), index.new_empty(0), index.new_empty(0)


@_value.register_fake
def _(x, scores, index, order, load, experts, backend, strategy):
    (N, H, k), (_, E, _, h) = index.shape, experts.shape
    per_token = {"all": E, "gated": 0}.get(strategy, k)
    return x.new_empty(N, H, h), x.new_empty(N * H * per_token, h), *_fake_grouping(index, E, backend, strategy)


@_output.register_fake
def _(a, scores, index, order, load, experts, backend, strategy):
    _, E, _, d = experts.shape
    return a.new_empty(a.shape[0], d), *_fake_grouping(index, E, backend, strategy)


def _fake_grouping(index: Tensor, num_experts: int, backend: str, strategy: str) -> Saved:
    if backend != "cpu":
        return _no_grouping(index)
    N, H, k = index.shape
    token, place, ends = (index.new_empty(shape) for shape in saved_shapes(N, H, num_experts, k, strategy))
    return token, place, ends


def _fake_gradients(grad, rows, scores, index, order, load, experts, *saved):
    return tuple(t.new_empty(t.shape) for t in (rows, scores, experts))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend, ctx.strategy = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(backward: Any) -> Any:
    """The autograd formula of an op whose backward pass is the op `backward`."""

    def formula(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        grad_rows, grad_scores, grad_experts = backward(grad, *ctx.saved_tensors, ctx.backend, ctx.strategy)
        return grad_rows, grad_scores, None, None, None, grad_experts, None, None

    return formula


for _op, _op_backward in ((_value, _value_backward), (_output, _output_backward)):
    _op_backward.register_fake(_fake_gradients)
    _op.register_autograd(_autograd(_op_backward), setup_context=_setup_context)


@_value_backward_added.register_fake
def _(total, grad, x, scores, index, order, load, experts, products, backend, strategy):
    return scores.new_empty(scores.shape), experts.new_empty(experts.shape)


def _added_value_gradient(ctx: Any, total: Tensor, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return total, *[None] * 7
    *inputs, products = ctx.saved_tensors[:7]
    total = total.contiguous()
    grad_scores, grad_experts = _value_backward_added(total, grad, *inputs, products, ctx.backend, ctx.strategy)
    return total, grad_scores, None, None, None, grad_experts, None, None


_value.register_added_gradient(_added_value_gradient)


class _LateValue(torch.autograd.Function):
    """switchhead_value, whose backward pass computes the gradients of `x` and the scores and leaves the experts'."""

    @staticmethod
    def forward(ctx: Any, slot: Slot, *inputs: Any) -> Tensor:
        *tensors, backend, ctx.strategy = inputs
        ctx.slot, ctx.module = slot, implementation("switchhead_value", backend)
        v, *saved = torch.ops.switchall.switchhead_value(*inputs)
        ctx.save_for_backward(*tensors, *saved)
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors  # read once: recomputation hands it out once
        tensors, saved = everything[:6], everything[6:]
        arguments = grad, Inputs.of(tensors, ctx.strategy), saved
        grad_x, grad_scores, kept = ctx.module.input_gradients(*arguments)
        ctx.slot.leave(lambda: (ctx.module.expert_gradient(*arguments, kept),))
        return None, grad_x, grad_scores, *[None] * 6


@register_flop_formula([torch.ops.switchall.switchhead_value, torch.ops.switchall.switchhead_output])
def _forward_flops(rows: Any, scores: Any, index: Any, order: Any, load: Any, experts: Any, *_: Any, **__: Any) -> int:
    """Useful flops: k experts per token and head, whatever the strategy computes."""
    return 2 * math.prod(index) * math.prod(experts[2:])


@register_flop_formula([torch.ops.switchall.switchhead_value_backward, torch.ops.switchall.switchhead_output_backward])
def _backward_flops(grad: Any, *args: Any, **kwargs: Any) -> int:
    """Input and weight gradient: twice the forward pass."""
    return 2 * _forward_flops(*args)


@register_flop_formula(torch.ops.switchall.switchhead_value_backward_added)
def _added_flops(total: Any, grad: Any, *args: Any, **kwargs: Any) -> int:
    return _backward_flops(grad, *args)
