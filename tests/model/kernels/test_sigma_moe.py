"""sigma_moe against a loop over tokens and choices in fp64, forward and every gradient, for every backend."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.kernels import backend as kernel_backend
from model.kernels.cpu import workers
from model.kernels.ops.route import Choice, group_choices
from model.kernels.ops.sigma_moe import FUSES_ADDITION, HeldExperts, sigma_moe
from tests.model.kernels.checks import assert_compiles, assert_repeats, error, flops, stored_in_reverse
from tests.model.kernels.chosen import chosen_experts


class Shape(NamedTuple):
    N: int
    d: int
    E: int
    G: int
    k: int
    experts: str = "random"
    """See chosen.py."""
    swiglu: bool = False
    """Instead of ReLU: the first matrix has twice the columns."""


SHAPES = {
    "plain": Shape(N=33, d=24, E=8, G=16, k=3),
    "k is 1": Shape(N=17, d=16, E=4, G=8, k=1),
    "two experts, both chosen": Shape(N=9, d=8, E=2, G=8, k=2),
    "odd widths": Shape(N=21, d=13, E=5, G=7, k=2),
    "64 experts, k is 8": Shape(N=40, d=12, E=64, G=5, k=8),
    "more experts than slots": Shape(N=3, d=8, E=16, G=8, k=2),
    "all tokens on one expert": Shape(N=19, d=8, E=6, G=16, k=1, experts="one"),
    "one and no token on an expert": Shape(N=19, d=8, E=6, G=8, k=2, experts="single"),
    "one token": Shape(N=1, d=8, E=4, G=8, k=4),
    "empty": Shape(N=0, d=8, E=4, G=8, k=2),
    "SwiGLU": Shape(N=33, d=24, E=8, G=16, k=3, swiglu=True),
    "SwiGLU, odd widths": Shape(N=21, d=13, E=5, G=7, k=2, swiglu=True),
    "SwiGLU, one and no token on an expert": Shape(N=19, d=8, E=6, G=8, k=2, experts="single", swiglu=True),
}
NAMES = ("x", "scores", "up_experts", "down_experts")
BACKENDS = kernel_backend.BACKENDS["sigma_moe"]
NATIVE = tuple(backend for backend in BACKENDS if backend != "triton")
"""Those that are fast enough here for the whole table: the interpreted kernels have tables of their own in triton/."""

# Rounding of inputs is not an error here (the loop gets the same values), so fp32 differs by the order of its sums.
# bf16: `reference` computes in fp32 and rounds once, half a unit of 2^-8; the others round the hidden layer, the gated
# one and every row too: a few times that. `cpu` does so where the CPU multiplies bf16 (test_bf16_products.py has both).
TOLERANCE = {
    torch.float64: dict.fromkeys(BACKENDS, 1e-12),
    torch.float32: dict.fromkeys(BACKENDS, 1e-5),
    torch.bfloat16: {"reference": 2**-8, "cpu": 2**-7, "grouped_mm": 2**-6, "triton": 2**-7},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are split into several blocks in the small shapes too."""
    monkeypatch.setattr(workers, "BLOCK_TOKENS", 16)


class Case(NamedTuple):
    x: Tensor
    scores: Tensor
    index: Tensor  # type: ignore[assignment]
    order: Tensor
    load: Tensor
    up_experts: Tensor
    down_experts: Tensor
    grad: Tensor

    @property
    def choice(self) -> Choice:
        return Choice(self.scores, self.index, self.order, self.load)

    def __call__(self, *, backend: str, first_expert: int = 0, residual: Tensor | None = None) -> Tensor:
        experts = HeldExperts(self.up_experts, self.down_experts, first_expert)
        return sigma_moe(self.x, self.choice, experts, backend=backend, residual=residual)


def make_case(shape: Shape, dtype: torch.dtype, *, scores_dtype: torch.dtype | None = None) -> Case:
    N, d, E, G, k, experts, swiglu = shape
    generator = torch.Generator().manual_seed(N * 7 + d)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    index, order, load = chosen_experts(normal(N, E), k, experts)
    W = 2 * G if swiglu else G
    x, up, down = normal(N, d).to(dtype), (normal(E, d, W) / d**0.5).to(dtype), (normal(E, G, d) / G**0.5).to(dtype)
    scores = normal(N, k).sigmoid().to(scores_dtype or dtype)
    for leaf in (x, scores, up, down):
        leaf.requires_grad_()
    return Case(x, scores, index, order, load, up, down, normal(N, d).to(dtype))


def loop(case: Case) -> list[Tensor]:
    """Output and the gradients of NAMES in fp64, one token and one choice at a time."""
    x, scores, up, down = (
        t.detach().double().requires_grad_() for t in (case.x, case.scores, case.up_experts, case.down_experts)
    )
    rows = []
    for n, chosen in enumerate(case.index.tolist()):
        row = torch.zeros(x.shape[1], dtype=torch.float64)
        for j, e in enumerate(chosen):
            hidden, G = x[n] @ up[e], down.shape[1]
            # SwiGLU written out: the first G columns are the gate's.
            activated = torch.relu(hidden) if len(hidden) == G else hidden[G:] * hidden[:G] / (1 + (-hidden[:G]).exp())
            row = row + scores[n, j] * (activated @ down[e])
        rows.append(row)
    y = torch.stack(rows) if rows else (x * 1.0)
    grads = torch.autograd.grad(y, (x, scores, up, down), case.grad.double(), allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


@functools.cache
def expectation(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """What the loop makes of a case; once for all backends."""
    return loop(make_case(shape, dtype))


def run(case: Case, backend: str) -> list[Tensor]:
    y = case(backend=backend)
    assert y.dtype == case.x.dtype
    leaves = (case.x, case.scores, case.up_experts, case.down_experts)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad)]


def possible(backend: str, shape: Shape, dtype: torch.dtype) -> bool:
    return backend != "grouped_mm" or kernel_backend.grouped_mm_limit("cpu", dtype, (shape.d, shape.G)) is None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_loop(name: str, backend: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[name], dtype)
    if not possible(backend, SHAPES[name], dtype):
        with pytest.raises(ValueError, match="Possible: auto, cpu, reference"):
            run(case, backend)
        return
    for what, actual, expected in zip(("y", *NAMES), run(case, backend), expectation(SHAPES[name], dtype), strict=True):
        assert error(actual, expected) <= TOLERANCE[dtype][backend], what


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "k is 1", "odd widths", "empty"])
def test_adds_the_residual_stream(name: str, backend: str, residual_dtype: torch.dtype) -> None:
    """Values, the gradients of all, and that of the residual, which is the output's own."""
    dtype = torch.bfloat16
    case = make_case(SHAPES[name], dtype)
    if not possible(backend, SHAPES[name], dtype):
        return
    residual = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(3)).to(residual_dtype)
    leaves = case.x, case.scores, case.up_experts, case.down_experts, residual.requires_grad_()
    y = case(backend=backend, residual=residual)
    assert y.dtype == residual_dtype
    grad = case.grad.to(residual_dtype)
    *grads, grad_residual = torch.autograd.grad(y, leaves, grad)
    expected, *expected_grads = expectation(SHAPES[name], dtype)
    assert error(y, residual.double() + expected) <= TOLERANCE[dtype][backend]
    assert torch.equal(grad_residual, grad)
    for what, actual, right in zip(NAMES, grads, expected_grads, strict=True):
        assert error(actual, right) <= TOLERANCE[dtype][backend], what


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_may_be_fp32_beside_bf16(backend: str) -> None:
    case = make_case(SHAPES["plain"], torch.bfloat16, scores_dtype=torch.float32)
    results = run(case, backend)
    assert results[2].dtype == torch.float32
    for what, actual, expected in zip(("y", *NAMES), results, loop(case), strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.bfloat16][backend], what


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Non-contiguous x, scores and experts, and a gradient expanded from a scalar."""
    case = make_case(SHAPES["plain"], torch.float32)
    strided = case._replace(
        x=stored_in_reverse(case.x),
        scores=stored_in_reverse(case.scores),
        up_experts=case.up_experts.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        down_experts=stored_in_reverse(case.down_experts),
        grad=torch.tensor(0.3).expand_as(case.grad),
    )
    if backend == "grouped_mm":  # F.grouped_mm itself refuses these strides of the experts
        strided = strided._replace(up_experts=case.up_experts, down_experts=case.down_experts)
    for what, actual, expected in zip(("y", *NAMES), run(strided, backend), loop(strided), strict=True):
        assert error(actual, expected) <= 1e-5, what


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing has written to holds NaN."""
    torch.use_deterministic_algorithms(True)  # the filling is a part of that
    deterministic: Any = torch.utils.deterministic  # whose attribute is a property of the module
    assert deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("held", [slice(1, 3), slice(0, 2), slice(3, 5)], ids=str)
@pytest.mark.parametrize("swiglu", [False, True], ids=["ReLU", "SwiGLU"])
def test_slots_of_other_ranks_experts_give_nothing(swiglu: bool, held: slice, backend: str, poisoned: None) -> None:
    """Tensor parallelism: against all experts of which the others' second matrices are 0. Nobody chose the last one."""
    shape = Shape(N=19, d=8, E=5, G=6, k=2, swiglu=swiglu)
    whole = make_case(shape, torch.float64)
    index = torch.where(whole.index == 4, (whole.index.flip(1) + 1) % 4, whole.index)
    order, load = group_choices(index[:, None], 5, backend="reference")
    here = torch.zeros(5, 1, 1, dtype=torch.float64)
    here[held] = 1
    whole = whole._replace(index=index, order=order[0], load=load[0])
    y, grad_x, grad_scores, grad_up, grad_down = loop(whole._replace(down_experts=whole.down_experts * here))
    start, stop = int(whole.load[: held.start].sum()), int(whole.load[: held.stop].sum())
    part = whole._replace(
        index=index - held.start,
        order=whole.order[start:stop],
        load=whole.load[held],
        up_experts=whole.up_experts.detach()[held].requires_grad_(),
        down_experts=whole.down_experts.detach()[held].requires_grad_(),
    )
    run(make_case(SHAPES["plain"], torch.float64), backend)  # leaves numbers in the scratch
    expected = (y, grad_x, grad_scores, grad_up[held], grad_down[held])
    for what, actual, right in zip(("y", *NAMES), run(part, backend), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12, msg=what)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("backend", NATIVE)
def test_repeats_bit_for_bit(backend: str, threads: int) -> None:
    shape = Shape(N=300, d=64, E=8, G=32, k=3)
    case = make_case(shape, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_repeats(lambda: run(case, backend), times=4)
        assert torch.get_num_threads() == threads
        first = run(case, backend)
    finally:
        torch.set_num_threads(before)
    for what, actual, expected in zip(("y", *NAMES), first, expectation(shape, torch.float32), strict=True):
        assert error(actual, expected) <= 1e-5, what


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str, swiglu: bool) -> None:
    shape = Shape(N=5, d=4, E=4, G=3, k=2, swiglu=swiglu)
    case = make_case(shape, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, scores, up, down: sigma_moe(
            x, case.choice._replace(scores=scores), HeldExperts(up, down), backend=backend
        ),
        (case.x, case.scores, case.up_experts, case.down_experts),
    )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "grouped_mm", "triton"])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    shape = Shape(N=3, d=8, E=2, G=8, k=1) if backend == "triton" else SHAPES["plain"]  # it calls the op a dozen times
    x, scores, _, order, load, up, down, grad = make_case(shape, dtype)
    inputs = x, scores, order, load, up, down, backend
    torch.library.opcheck(torch.ops.switchall.sigma_moe.default, inputs)
    if backend in FUSES_ADDITION:
        torch.library.opcheck(torch.ops.switchall.sigma_moe.default, (*inputs, 0, grad.clone().requires_grad_()))
    detached = [t.detach() for t in (grad, x, scores, order, load, up, down)]
    hidden = torch.ops.switchall.sigma_moe(*detached[1:], backend)[1]
    torch.library.opcheck(torch.ops.switchall.sigma_moe_backward.default, (*detached, hidden, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    case = make_case(SHAPES["plain"], torch.float32)

    def function(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        choice = case.choice._replace(scores=scores)
        return torch.tanh(sigma_moe(x * 2, choice, HeldExperts(up, down), backend=backend))

    assert_compiles(function, (case.x, case.scores, case.up_experts, case.down_experts), case.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors(backend: str) -> None:
    real = make_case(SHAPES["plain"], torch.bfloat16)
    case = Case(*(t.detach().to("meta").requires_grad_(t.requires_grad) for t in real))
    y = case(backend=backend)
    assert y.is_meta
    assert y.shape == case.x.shape
    y.backward(case.grad)
    assert case.up_experts.grad is not None
    assert case.up_experts.grad.shape == case.up_experts.shape


@pytest.mark.parametrize("name", ["plain", "SwiGLU"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flop_counter(backend: str, name: str) -> None:
    """2 N k d G multiply-adds forward (3 with SwiGLU) and twice that backward; the reference computes every expert (E
    instead of k)."""
    shape = SHAPES[name]
    experts = shape.E if backend == "reference" else shape.k
    macs = (3 if shape.swiglu else 2) * shape.N * experts * shape.d * shape.G
    case = make_case(shape, torch.float32)
    assert flops(lambda: case(backend=backend)) == (2 * macs, 4 * macs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_widths_are_refused(backend: str) -> None:
    case = make_case(SHAPES["plain"], torch.float32)
    with pytest.raises(ValueError, match="up_experts has 16 columns; for the 15 rows of down_experts ReLU needs 15"):
        run(case._replace(down_experts=case.down_experts[:, 1:]), backend)
