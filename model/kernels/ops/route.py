"""Routing: from tokens to the chosen experts, their scores, the load of every expert and the order that groups slots.

    logits = x weight^T (fp32),  scores = sigmoid(logits),  index = the k best experts of every token and router
                                                      (SwitchHead section 2.2; sigma-MoE, arXiv 2310.10837, eq. 11)

Shapes: N tokens, R independent routers (heads; 1 for the feed-forward), E experts, k choices, d d_model. A slot
n*k + j of a router is the j-th choice of token n. Everything is fp32 whatever the storage dtype (fp64 stays fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.kernels.backend import ADDING, implementation
from model.kernels.dtypes import wide_dtype
from model.kernels.op import op


class Routing(NamedTuple):
    """What one selection decides. Gradients flow through `logits` (all experts) and `scores` (the chosen ones)."""

    logits: Tensor
    """[N, R, E] fp32, before expert dropout."""
    scores: Tensor
    """[N, R, k] fp32: sigmoid of the chosen logits, best first; no softmax, no renormalisation."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """[N, R, k] int64: the chosen experts, best first; of equal ones the lowest."""
    load: Tensor
    """[R, E] int64: how many slots chose each expert."""
    order: Tensor
    """[R, N*k] int64: the slots of each router grouped by expert, in token order (a stable counting sort)."""

    @property
    def choice(self) -> Choice:
        return Choice(self.scores, self.index, self.order, self.load)


class Choice(NamedTuple):
    """The part of a routing that the ops over chosen experts need. Those of one router take it without the axis R."""

    scores: Tensor
    """[N, R, k] fp32."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """[N, R, k] int64, distinct along k."""
    order: Tensor
    """[R, N*k] int64: the slots of each router grouped by expert, in token order."""
    load: Tensor
    """[R, E] int64."""


def route(
    x: Tensor, weight: Tensor, k: int, *, keep: Tensor | None = None, drop_scores: bool = False, backend: str
) -> Routing:
    """`x` [N, d], `weight` [R, E, d]; `keep` [N, R, E] bool marks the experts that expert dropout leaves.

    With `drop_scores` (sigma-MoE) a dropped expert scores 0 for choosing and for weighting; without (SwitchHead) it is
    only never preferred in choosing and its weight is the true score. `backend` is a resolved one.
    """
    if not 1 <= k <= weight.shape[1]:
        raise ValueError(f"{k} active experts of {weight.shape[1]}: k must be in 1..{weight.shape[1]}")
    if backend == "reference":
        return route_reference(x, weight, k, keep=keep, drop_scores=drop_scores)
    return Routing(*_route(x, weight, keep, k, drop_scores, backend))


def route_handing_on(
    x: Tensor, weight: Tensor, k: int, *, keep: Tensor | None = None, drop_scores: bool = False, backend: str
) -> tuple[Tensor, Routing]:
    """`x` for what is computed of it next, and `route`: a backend of `ADDING` sums the gradients of x by both inside
    its product (model/kernels/op.py, `hand_on`)."""
    if backend not in ADDING["route"]:
        return x, route(x, weight, k, keep=keep, drop_scores=drop_scores, backend=backend)
    x, *found = _route.hand_on(x, weight, keep, k, drop_scores, backend)
    return x, Routing(*found)


def route_reference(
    x: Tensor, weight: Tensor, k: int, *, keep: Tensor | None = None, drop_scores: bool = False
) -> Routing:
    """The specification, in operators that autograd, torch.compile and meta tensors know."""
    E = weight.shape[1]
    wide = wide_dtype(x.dtype)
    logits = torch.einsum("nd,red->nre", x.to(wide), weight.to(wide))
    scores = torch.sigmoid(logits)
    if keep is not None and drop_scores:
        scores = scores * keep
    choosing = scores if keep is None or drop_scores else logits.masked_fill(~keep, float("-inf"))
    index = choosing.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return Routing(logits, scores.gather(-1, index), index, *_grouped(index, E))


def with_choice(routing: Routing, index: Tensor, *, keep: Tensor | None = None, drop_scores: bool = False) -> Routing:
    """`routing` with another choice, `index` [N, R, k] int64, whoever made it: the same logits, and the scores, load
    and order of the experts that it names. `keep` and `drop_scores` are those of `route`. Plain operators."""
    scores = torch.sigmoid(routing.logits.gather(-1, index))
    if keep is not None and drop_scores:
        scores = scores * keep.gather(-1, index)
    return Routing(routing.logits, scores, index, *_grouped(index, routing.logits.shape[-1]))


def group_choices(index: Tensor, num_experts: int, *, backend: str) -> tuple[Tensor, Tensor]:
    """`index` [N, R, k] int64 -> order [R, N*k] and load [R, E], both int64, for choices that no router grouped: a
    rank's share of the choices, or a part of the tokens. On the device of `index`, without waiting for it."""
    if backend in ("cpu", "triton"):
        return _group_choices(index.contiguous(), num_experts, backend)
    load, order = _grouped(index, num_experts)
    return order, load


def _grouped(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`index` [N, R, k] -> load [R, E] and order [R, N*k], both int64."""
    slots = index.transpose(0, 1).flatten(1)
    load = slots.new_zeros(slots.shape[0], num_experts).scatter_add_(1, slots, torch.ones_like(slots))
    return load, slots.sort(dim=-1, stable=True).indices


# ---------------------------------------------------------------------------------------------------------------- op


@op("route")
def _route(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logits, scores, index, load, order as in `Routing`."""
    return implementation("route", backend).forward(x, weight, keep, k, drop_scores)


@_route.register_fake
def _(x, weight, keep, k, drop_scores, backend):
    N, (R, E, _) = x.shape[0], weight.shape
    wide = wide_dtype(x.dtype)
    return (
        x.new_empty(N, R, E, dtype=wide),
        x.new_empty(N, R, k, dtype=wide),
        x.new_empty(N, R, k, dtype=torch.int64),
        x.new_empty(R, E, dtype=torch.int64),
        x.new_empty(R, N * k, dtype=torch.int64),
    )


@op("group_choices")
def _group_choices(index: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("route", backend).group_choices(index, num_experts)


@_group_choices.register_fake
def _(index, num_experts, backend):
    N, R, k = index.shape
    return index.new_empty(R, N * k), index.new_empty(R, num_experts)


@op("route_backward")
def _route_backward(
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    index: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight."""
    return implementation("route", backend).backward(grad_logits, grad_scores, x, weight, scores, index)


@op("route_backward_added", changes=("total",))
def _route_backward_added(
    total: Tensor,
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    index: Tensor,
    backend: str,
) -> Tensor:
    """Adds the gradient of x to `total` [N, d] -> gradient of weight."""
    return implementation("route", backend).backward(grad_logits, grad_scores, x, weight, scores, index, total)[1]


@_route_backward_added.register_fake
def _(total, grad_logits, grad_scores, x, weight, scores, index, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_route_backward.register_fake
def _(grad_logits, grad_scores, x, weight, scores, index, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))


def _setup_context(ctx, inputs, output):
    x, weight, _, _, _, ctx.backend = inputs
    _, scores, index, load, order = output
    ctx.save_for_backward(x, weight, scores, index)
    ctx.mark_non_differentiable(index, load, order)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_logits, grad_scores, *_):
    if grad_logits is None and grad_scores is None:
        return (None,) * 6
    grad_x, grad_weight = _route_backward(grad_logits, grad_scores, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_weight, None, None, None, None


def _added(ctx, total, grad_logits, grad_scores, *_):
    if grad_logits is None and grad_scores is None:
        return total, *[None] * 5
    total = total.contiguous()
    grad_weight = _route_backward_added(total, grad_logits, grad_scores, *ctx.saved_tensors, ctx.backend)
    return total, grad_weight, *[None] * 4


_route.register_autograd(_autograd, setup_context=_setup_context)
_route.register_added_gradient(_added)


@register_flop_formula(torch.ops.switchall.route)
def route_flop(x_shape, weight_shape, *args, **kwargs) -> int:
    """The logits; sigmoid, selection and sort are not counted."""
    R, E, d = weight_shape
    return 2 * x_shape[0] * R * E * d


@register_flop_formula(torch.ops.switchall.route_backward_added)
def route_backward_added_flop(total_shape, *args, **kwargs) -> int:
    return route_backward_flop(*args, **kwargs)


@register_flop_formula(torch.ops.switchall.route_backward)
def route_backward_flop(grad_logits_shape, grad_scores_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    """Gradients of x and of weight."""
    R, E, d = weight_shape
    return 2 * 2 * x_shape[0] * R * E * d
