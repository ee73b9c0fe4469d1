"""gated_sum and gated_spread in torch's operators, for any device and dtype: model/kernels/triton/gated_rows.py says
what they compute, and has the kernels."""

from __future__ import annotations

from torch import Tensor

from model.kernels.dtypes import wide_dtype


def gated_sum(
    products: Tensor,
    scores: Tensor,
    index: Tensor,
    mixed: Tensor,
    *,
    chosen: Tensor | None = None,
    dot: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills `mixed`, and where given `chosen` and the second of `dot`."""
    scores, index = scores.flatten(0, 1), index.flatten(0, 1)
    found = products.gather(1, index[:, :, None].expand(-1, -1, products.shape[2]))
    if chosen is not None:
        chosen.copy_(found)
    found = found.to(wide_dtype(found.dtype))
    mixed.copy_((found * scores[:, :, None]).sum(1))
    if dot is not None:
        _similarity(found, *dot)


def gated_spread(
    rows: Tensor,
    scores: Tensor,
    index: Tensor,
    gated: Tensor,
    *,
    dot: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills `gated`, and where given the second of `dot`."""
    wide, scores, index = wide_dtype(rows.dtype), scores.flatten(0, 1), index.flatten(0, 1)
    gates = scores.new_zeros(gated.shape[:2], dtype=wide).scatter_(1, index, scores.to(wide))
    gated.copy_(rows.to(wide)[:, None] * gates[:, :, None])
    if dot is not None:
        chosen, grad_scores = dot
        _similarity(chosen.to(wide), rows, grad_scores)


def _similarity(found: Tensor, rows: Tensor, grad_scores: Tensor) -> None:
    """grad_scores[p, j] = <rows[p], found[p, j]>."""
    grad_scores.view(found.shape[:2]).copy_((found * rows.to(found.dtype)[:, None]).sum(-1))
