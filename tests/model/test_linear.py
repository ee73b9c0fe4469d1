"""model/linear.py: one GEMM for several maps equals the maps one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import linear
from model.linear import aligned_linear, filled_linear, padding, region_linear
from model.parallel.overlap import Late


def joint_linear(x: Tensor, *weights: Tensor) -> Tensor:
    return region_linear(x, Late(weights))


# tokens, d, widths
SHAPES = [((5,), 7, (3, 4)), ((2, 3), 8, (1, 6, 5)), ((0,), 4, (2, 2)), ((300,), 64, (48, 48))]


@pytest.mark.parametrize("tokens, d, widths", SHAPES)
def test_equals_separate_maps(tokens: tuple[int, ...], d: int, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*tokens, d, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(width, d, dtype=torch.float64, requires_grad=True) for width in widths]
    upstream = torch.randn(*tokens, sum(widths), dtype=torch.float64)
    joint = joint_linear(x, *weights)
    apart = torch.cat([F.linear(x, weight) for weight in weights], -1)
    torch.testing.assert_close(joint, apart)
    found, expected = (torch.autograd.grad(y, [x, *weights], upstream) for y in (joint, apart))
    torch.testing.assert_close(found, expected)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3), (2, 3), (5, 3))]
    assert torch.autograd.gradcheck(joint_linear, leaves)


def test_compiles_without_graph_break_and_counts_flops() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(size, requires_grad=True) for size in ((4, 3), (2, 3), (5, 3))]
    compiled = torch.compile(lambda *t: joint_linear(*t).cos(), fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(y.sum(), leaves) for y in (compiled(*leaves), joint_linear(*leaves).cos()))
    torch.testing.assert_close(found, expected)
    with FlopCounterMode(display=False) as counter:
        joint_linear(*leaves).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 3 * 7


@pytest.mark.parametrize("d, width", [(7, 13), (8, 13), (12, 16), (16, 24)])
def test_filled_up_widths_give_the_same_product(d: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in half precision; and the product that it takes has whole multiples of 8."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, d, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, width, dtype=torch.float64)
    expected = F.linear(x, weight)
    assert linear.padding(x, weight) == (0, 0), "on a CPU nothing is filled up"
    monkeypatch.setattr(linear, "padding", lambda x, weight: (-weight.shape[1] % 8, -weight.shape[0] % 8))
    with FlopCounterMode(display=False) as counter:
        found = aligned_linear(x, weight)
        gradients = torch.autograd.grad(found, (x, weight), upstream)
    assert counter.get_total_flops() == 3 * 2 * 10 * (d + -d % 8) * (width + -width % 8)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, weight), upstream))
    assert torch.autograd.gradcheck(aligned_linear, (x, weight))


@pytest.mark.parametrize("d, width", [(7, 13), (8, 13), (12, 16), (16, 24)])
def test_a_filled_up_hidden_layer_is_never_copied_to_another_width(
    d: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two maps with biases, the second one on the filled up result of the first: those of plain operators, and nothing
    as large as the hidden layer or its gradient is filled up or cut."""
    torch.manual_seed(0)
    shapes = (2, 50, d), (width, d), (width,), (d, width), (d,)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def two_maps(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        hidden = filled_linear(x, up, up_bias)
        assert hidden.shape[2] == width + -width % 8 and not hidden[..., width:].any()
        return filled_linear(hidden.relu(), down, down_bias)[..., :d]

    x, up, up_bias, down, down_bias = leaves
    expected = F.linear(F.linear(x, up, up_bias).relu(), down, down_bias)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(F.linear(x, up) + up_bias, filled_linear(x, up, up_bias), rtol=0, atol=0)
    monkeypatch.setattr(linear, "padding", lambda x, weight: (-weight.shape[1] % 8, -weight.shape[0] % 8))
    with _Copies() as copies:
        found = two_maps(*leaves)
        gradients = torch.autograd.grad(found, leaves, upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, upstream))
    assert all(shape.numel() < 2 * 50 * width for shape in copies.shapes)
    assert bool(copies.shapes) == (d % 8 > 0 or width % 8 > 0), "the weights are filled up"
    assert (torch.Size([d]) in copies.shapes) == (d % 8 > 0), "nor is a bias that lacks nothing"


class _Copies(TorchDispatchMode):
    """Shapes of what is filled up or copied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in ("aten::constant_pad_nd", "aten::slice_backward", "aten::clone", "aten::copy_"):
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device, size, expected", [("cuda", 2, (1, 3)), ("cuda", 4, (0, 0)), ("cpu", 2, (0, 0))])
def test_widths_are_filled_up_in_half_precision_on_a_gpu(device: str, size: int, expected: tuple[int, int]) -> None:
    """By what lacks to multiples of 8 of 7 columns and 13 rows."""
    x: Any = SimpleNamespace(device=SimpleNamespace(type=device), element_size=lambda: size)
    assert padding(x, torch.empty(13, 7)) == expected
    assert padding(x, torch.empty(16, 24)) == (0, 0)
