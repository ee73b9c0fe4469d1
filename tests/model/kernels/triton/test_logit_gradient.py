"""The gradient of a router's logits in two bf16 parts, its Triton kernel interpreted, against fp64 and torch's form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases.recording import recording
from model.kernels.dense import route as dense_route
from model.kernels.triton import logit_gradient

SHAPES = [(37, 16, 4, 2), (29, 1, 64, 8), (11, 3, 5, 3), (7, 2, 1, 1), (1, 1, 6, 6), (0, 2, 4, 2)]


def inputs(N: int, R: int, E: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of logits and of scores, scores, index."""
    generator = torch.Generator().manual_seed(N + E)
    index = torch.rand(N, R, E, generator=generator).topk(k).indices
    scores = torch.rand(N, R, k, generator=generator)
    scores[:, :, -1] *= 0.0  # a dropped one
    return torch.randn(N, R, E, generator=generator), torch.randn(N, R, k, generator=generator), scores, index


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=["both", "logits", "scores"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_parts_are_the_gradient_to_16_bits(shape: tuple[int, int, int, int], given: tuple[bool, bool]) -> None:
    N, R, E, _ = shape
    grad_logits, grad_scores, scores, index = inputs(*shape)
    arguments = grad_logits if given[0] else None, grad_scores if given[1] else None, scores, index, E
    with recording() as launches:
        parts = logit_gradient.in_two_parts(*arguments)
    assert parts.shape == (N, 2, R, E) and parts.dtype == torch.bfloat16
    exact = grad_logits.double() * given[0]
    wide = scores.double()
    exact.scatter_add_(-1, index, grad_scores.double() * wide * (1 - wide) * given[1])
    high, low = parts.double().unbind(1)
    assert torch.equal(high.bfloat16(), exact.float().bfloat16()), "the high part is the rounded gradient"
    assert ((high + low - exact).abs() <= 2**-16 * exact.abs() + 1e-7).all()
    assert torch.equal(parts, dense_route._in_two_parts(*arguments)), "torch's form has other bits"
    assert len(launches) == (N > 0)


def test_strided_gradients_are_read_where_they_stand() -> None:
    grad_logits, grad_scores, scores, index = inputs(9, 2, 4, 2)
    expected = logit_gradient.in_two_parts(grad_logits, grad_scores, scores, index, 4)
    logits, chosen, scores, index = strided = [
        torch.stack([t, t], -1)[..., 0] for t in (grad_logits, grad_scores, scores, index)
    ]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(logit_gradient.in_two_parts(logits, chosen, scores, index, 4), expected)
