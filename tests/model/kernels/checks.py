"""What is asked of every op: how far a result is off, strides, torch's compiler, the same bits again, counted FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def error(actual: Tensor, expected: Tensor) -> float:
    """In the norm, relative; absolute where there is nothing to compare with."""
    assert actual.shape == expected.shape
    difference, norm = (actual.double() - expected).norm().item(), expected.norm().item()
    return difference / norm if norm > 1e-8 else difference


def stored_in_reverse(t: Tensor) -> Tensor:
    """The same values, the first axis contiguous and the last one not."""
    axes = range(t.dim())[::-1]
    return t.detach().permute(*axes).contiguous().permute(*axes).requires_grad_(t.requires_grad)


def assert_compiles(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor | None = None) -> None:
    """Without a graph break, with the value and the gradients of the eager call, to the last bit."""
    results = [torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), function(*leaves)]
    assert torch.equal(*results)
    for one, other in zip(*(torch.autograd.grad(y, leaves, grad) for y in results), strict=True):
        assert torch.equal(one, other)


def assert_repeats(run: Callable[[], Sequence[Tensor]], times: int = 2) -> None:
    """Bit for bit."""
    first = run()
    for _ in range(times - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def flops(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """-> those of the forward pass and those of the backward pass of its sum."""
    with FlopCounterMode(display=False) as counter:
        y = forward()
    with FlopCounterMode(display=False) as of_gradients:
        y.sum().backward()
    return counter.get_total_flops(), of_gradients.get_total_flops()
