"""sigma_moe, expert_linear and expert_linear_sum in bf16 on either kind of CPU, against loops in fp64: widened to fp32,
and as products of bf16 in tiles that rows of zeros fill up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.kernels import dtypes
from model.kernels.cpu import expert_linear as linear
from model.kernels.cpu import sigma_moe as moe
from model.kernels.cpu import workers
from model.kernels.cpu.sorted_rows import TILE_STEP, tile_rows
from model.kernels.ops.sigma_moe import Inputs
from tests.model.kernels import test_expert_linear as of_linear
from tests.model.kernels import test_sigma_moe as of_moe


@pytest.fixture(params=[True, False], ids=["products of bf16", "widened"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Of the mode: rounded once, or the hidden layer, the gated one and every row as well. All scratch is NaN before,
    so that a row which nothing filled is seen."""
    monkeypatch.setattr(dtypes, "multiplies_bf16", lambda: request.param)
    dtypes.cpu_gemm_dtype.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose scratch is this thread's
    for op in of_linear.OPS:
        of_linear.run(of_linear.make_case(op, of_linear.SHAPES["plain"], torch.bfloat16), "cpu")
    for name in ("plain", "SwiGLU"):
        of_moe.run(of_moe.make_case(of_moe.SHAPES[name], torch.bfloat16), "cpu")
    for buffer in workers._local.buffers.values():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
    yield 2**-7 if request.param else 2**-8
    torch.set_num_threads(threads)
    dtypes.cpu_gemm_dtype.cache_clear()


@pytest.mark.parametrize("name", of_moe.SHAPES)
def test_sigma_moe(name: str, tolerance: float) -> None:
    case = of_moe.make_case(of_moe.SHAPES[name], torch.bfloat16)
    results, expected = of_moe.run(case, "cpu"), of_moe.loop(case)
    for what, value, wanted in zip(("y", *of_moe.NAMES), results, expected, strict=True):
        assert of_moe.error(value, wanted) <= tolerance, what
    # Of tensor-parallel ranks: backward in two parts.
    leaves = (t.detach() for t in (case.x, case.scores, case.order, case.load, case.up_experts, case.down_experts))
    x, scores, order, load, up_experts, down_experts = leaves
    inputs = Inputs(x, scores, order, load, up_experts, down_experts, 0)
    _, hidden = moe.forward(inputs)
    grad_x, grad_scores, grad_hidden = moe.input_gradients(case.grad, inputs, hidden)
    parts = (grad_x, grad_scores, *moe.expert_gradients(case.grad, inputs, hidden, grad_hidden))
    for what, value, wanted in zip(of_moe.NAMES, parts, expected[1:], strict=True):
        assert of_moe.error(value, wanted) <= tolerance, f"{what}, in two parts"


@pytest.mark.parametrize("op", of_linear.OPS)
@pytest.mark.parametrize("name", of_linear.SHAPES)
def test_expert_linear(name: str, op: str, tolerance: float) -> None:
    case = of_linear.make_case(op, of_linear.SHAPES[name], torch.bfloat16)
    of_linear.assert_equal(case, of_linear.run(case, "cpu"), tolerance)
    if op == "expert_linear":
        x, experts = (leaf.detach() for leaf in case.leaves)
        arguments = (case.grad, x, case.order, case.load, experts)
        y = linear.forward(x, case.order, case.load, experts, case.grad.shape[1])
        parts = [y, linear.input_gradient(*arguments), linear.expert_gradient(*arguments)]
        of_linear.assert_equal(case, parts, tolerance)


def test_few_shapes_occur() -> None:
    """Of 1,000 counts one in TILE_STEP, and no row is lost; other dtypes have no use for it."""
    assert {tile_rows(count, torch.bfloat16) for count in range(1, 1001)} == set(range(32, 1025, TILE_STEP))
    assert all(0 <= tile_rows(count, torch.bfloat16) - count < TILE_STEP for count in range(1001))
    assert tile_rows(33, torch.float32) == 33
