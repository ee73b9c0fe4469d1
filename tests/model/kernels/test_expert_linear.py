"""expert_linear and expert_linear_sum against a loop over tokens and choices in fp64, forward and every gradient."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.kernels import backend as kernel_backend
from model.kernels.cpu import workers
from model.kernels.ops.expert_linear import expert_linear, expert_linear_sum
from model.kernels.ops.route import Choice
from tests.model.kernels.checks import assert_compiles, assert_repeats, error, flops, stored_in_reverse
from tests.model.kernels.chosen import chosen_experts
from tests.tensors import sum_of


class Shape(NamedTuple):
    N: int
    d: int
    h: int
    E: int
    k: int
    experts: str = "random"
    """See chosen.py."""


SHAPES = {
    "plain": Shape(N=33, d=24, h=16, E=8, k=3),
    "k is 1": Shape(N=17, d=16, h=8, E=4, k=1),
    "two experts, both chosen": Shape(N=9, d=8, h=8, E=2, k=2),
    "odd widths": Shape(N=21, d=13, h=7, E=5, k=2),
    "64 experts, k is 8": Shape(N=40, d=12, h=5, E=64, k=8),
    "more experts than slots": Shape(N=3, d=8, h=8, E=16, k=2),
    "h wider than d": Shape(N=11, d=3, h=10, E=3, k=2),
    "all tokens on one expert": Shape(N=19, d=8, h=16, E=6, k=1, experts="one"),
    "one and no token on an expert": Shape(N=19, d=8, h=8, E=6, k=2, experts="single"),
    "one token": Shape(N=1, d=8, h=8, E=4, k=4),
    "empty": Shape(N=0, d=8, h=8, E=4, k=2),
}
BACKENDS = [name for name in kernel_backend.BACKENDS["expert_linear"] if name != "triton"]
"""Triton: tests/model/kernels/triton/test_expert_linear.py."""
OPS = ("expert_linear", "expert_linear_sum")
NAMES = {"expert_linear": ("x", "experts"), "expert_linear_sum": ("a", "gates", "experts")}

# The loop gets the same rounded inputs, so fp32 differs by the order of its sums; bf16 is computed in fp32 and rounded
# once, half a unit of 2^-8, or gated and summed as bf16 where the CPU multiplies it (test_bf16_products.py has both).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are split into several blocks in the small shapes too."""
    monkeypatch.setattr(workers, "BLOCK_TOKENS", 16)


class Case(NamedTuple):
    op: str
    leaves: tuple[Tensor, ...]
    """x, experts; or a, gates, experts."""
    index: Tensor  # type: ignore[assignment]
    order: Tensor
    load: Tensor
    grad: Tensor

    def __call__(self, *leaves: Tensor, backend: str) -> Tensor:
        if self.op == "expert_linear":
            x, experts = leaves
            # What is given for the scores is not looked at.
            return expert_linear(x, Choice(x, self.index, self.order, self.load), experts, backend=backend)
        a, gates, experts = leaves
        return expert_linear_sum(a, Choice(gates, self.index, self.order, self.load), experts, backend=backend)


def make_case(op: str, shape: Shape, dtype: torch.dtype, *, gates_dtype: torch.dtype | None = None) -> Case:
    N, d, h, E, k, experts = shape
    generator = torch.Generator().manual_seed(N * 7 + d)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    index, order, load = chosen_experts(normal(N, E), k, experts)
    if op == "expert_linear":
        leaves = (normal(N, d).to(dtype), (normal(E, d, h) / d**0.5).to(dtype))
        grad = normal(N, k, h).to(dtype)
    else:
        gates = normal(N, k).sigmoid().to(gates_dtype or dtype)
        leaves = (normal(N, k, h).to(dtype), gates, (normal(E, h, d) / h**0.5).to(dtype))
        grad = normal(N, d).to(dtype)
    return Case(op, tuple(leaf.requires_grad_() for leaf in leaves), index, order, load, grad)


def loop(case: Case) -> list[Tensor]:
    """Output and the gradient of every leaf in fp64, one token and one choice at a time."""
    leaves = tuple(t.detach().double().requires_grad_() for t in case.leaves)
    y = torch.zeros(case.grad.shape, dtype=torch.float64)
    parts = []
    for n, chosen in enumerate(case.index.tolist()):
        if case.op == "expert_linear":
            x, experts = leaves
            parts.append(torch.stack([x[n] @ experts[e] for e in chosen]))
        else:
            a, gates, experts = leaves
            parts.append(sum_of(gates[n, j] * (a[n, j] @ experts[e]) for j, e in enumerate(chosen)))
    y = torch.stack(parts) if parts else y + 0.0 * leaves[-1].sum()
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad.double(), allow_unused=True, materialize_grads=True)]


def run(case: Case, backend: str) -> list[Tensor]:
    y = case(*case.leaves, backend=backend)
    assert y.dtype == case.leaves[0].dtype
    assert y.is_contiguous()
    assert y.shape == case.grad.shape
    return [y.detach(), *torch.autograd.grad(y, case.leaves, case.grad)]


def stored_strided(case: Case) -> Case:
    """Axes stored in reverse order, and a gradient expanded from a scalar."""
    leaves = tuple(map(stored_in_reverse, case.leaves))
    return case._replace(leaves=leaves, grad=torch.tensor(0.3).expand_as(case.grad))


def assert_equal(case: Case, actual: list[Tensor], tolerance: float) -> None:
    for what, value, expected in zip(("y", *NAMES[case.op]), actual, loop(case), strict=True):
        assert error(value, expected) <= tolerance, what


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_loop(name: str, op: str, backend: str, dtype: torch.dtype) -> None:
    case = make_case(op, SHAPES[name], dtype)
    assert_equal(case, run(case, backend), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_may_be_fp32_beside_bf16(backend: str) -> None:
    case = make_case("expert_linear_sum", SHAPES["plain"], torch.bfloat16, gates_dtype=torch.float32)
    results = run(case, backend)
    assert results[2].dtype == torch.float32
    assert_equal(case, results, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_strides(op: str, backend: str) -> None:
    strided = stored_strided(make_case(op, SHAPES["plain"], torch.float32))
    assert_equal(strided, run(strided, backend), 1e-5)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit(op: str, backend: str, threads: int) -> None:
    case = make_case(op, Shape(N=300, d=64, h=32, E=8, k=3), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_repeats(lambda: run(case, backend), times=4)
        assert torch.get_num_threads() == threads
        assert_equal(case, run(case, backend), 1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, backend: str) -> None:
    case = make_case(op, Shape(N=5, d=4, h=3, E=4, k=2), torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: case(*leaves, backend=backend), case.leaves)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    check_op(op, SHAPES["plain"], dtype, "cpu")


def check_op(op: str, shape: Shape, dtype: torch.dtype, backend: str) -> None:
    case = make_case(op, shape, dtype)
    *rows, experts = case.leaves
    k = [shape.k] if op == "expert_linear" else []
    forward, backward = (getattr(torch.ops.switchall, name).default for name in (op, f"{op}_backward"))
    torch.library.opcheck(forward, (*rows, case.order, case.load, experts, *k, backend))
    detached = [t.detach() for t in (case.grad, *rows, case.order, case.load, experts)]
    torch.library.opcheck(backward, (*detached, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op: str, backend: str) -> None:
    case = make_case(op, SHAPES["plain"], torch.float32)

    def function(rows: Tensor, *rest: Tensor) -> Tensor:
        return torch.tanh(case(rows * 2, *rest, backend=backend))

    assert_compiles(function, case.leaves, case.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op: str, backend: str) -> None:
    real = make_case(op, SHAPES["plain"], torch.bfloat16)
    leaves = tuple(t.detach().to("meta").requires_grad_() for t in real.leaves)
    case = Case(op, leaves, *(t.to("meta") for t in real[2:]))
    y = case(*case.leaves, backend=backend)
    assert y.is_meta
    assert y.shape == case.grad.shape
    y.backward(case.grad)
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_flop_counter(op: str, backend: str) -> None:
    """N k d h multiply-adds forward and twice that backward; the reference computes every expert (E instead of k)."""
    shape = SHAPES["plain"]
    macs = shape.N * (shape.E if backend == "reference" else shape.k) * shape.d * shape.h
    case = make_case(op, shape, torch.float32)
    assert flops(lambda: case(*case.leaves, backend=backend)) == (2 * macs, 4 * macs)
