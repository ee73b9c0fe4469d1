"""Recomputing activations in the backward pass instead of keeping them (arXiv 1604.06174, and 2205.05198 for
`selective`).

    none        every activation is kept
    selective   outputs of matrix products, of our ops with products and of fused attention are kept; what lies between
                them (norms, dropout, rotations, gates, casts) and the attention matrices of Transformer-XL are computed
                again
    full        a block keeps its input alone

Numbers do not change: dropout masks are functions of position (model/dropout.py), and statistics and memories record
only in the first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.memory import LayerMemory
from model.routing import RoutingStatistics

Recompute = Literal["none", "selective", "full"]

KEPT_NAMESPACES = ("switchall",)
KEPT_OPERATORS = {  # RELIES-ON torch-kept
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}
"""What `selective` keeps. Batched products (bmm) are the attention matrices, T x L per head: they are what it saves."""

CHEAP_OPERATORS = {"switchall::dropout", "switchall::layer_norm", "switchall::rotate"}
"""Ours that `selective` computes again, of model/kernels/ops/elementwise.py. What `entropy` gives is a few numbers, and
kept."""


class _Paused(AbstractContextManager[None]):
    """Statistics and memories do not see the forward pass inside: it is a repetition."""

    def __init__(self, recorders: Sequence[RoutingStatistics | LayerMemory]) -> None:
        self._recorders = recorders

    def __enter__(self) -> None:
        for recorder in self._recorders:
            recorder.is_paused = True

    def __exit__(self, *exception: object) -> None:
        for recorder in self._recorders:
            recorder.is_paused = False


class _Both(AbstractContextManager[None]):
    """Two contexts as one. (contextlib's ExitStack would enter them when made, not when used.)"""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._inner.__exit__(*exception)
        self._outer.__exit__(*exception)


def recomputed(
    function: Callable[..., Any],
    state: tuple[Any, ...],
    *,
    mode: Recompute,
    recorders: Sequence[RoutingStatistics | LayerMemory],
) -> Any:
    """`function(state)`, whose activations are kept as `mode` says. `recorders`: the statistics and memories that
    `function` writes to."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(state)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if mode == "full":
            return nullcontext(), _Paused(recorders)
        forward, again = create_selective_checkpoint_contexts(_policy)
        return forward, _Both(_Paused(recorders), again)

    # Nothing draws from torch's generators, so their state is not kept.
    return checkpoint(function, state, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    kept = (operator.namespace in KEPT_NAMESPACES and name not in CHEAP_OPERATORS) or name in KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
