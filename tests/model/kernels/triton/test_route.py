"""The Triton router against the loop in fp64, with every gradient; load, order, ties, dropout; with the interpreter's
checks. The cases and the loop are those of tests/model/kernels/test_route.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases.recording import Launch, recording
from model.kernels.ops.route import Routing, route
from model.kernels.triton import route as kernels
from tests.model import oracles
from tests.model.kernels.checks import assert_repeats, error
from tests.model.kernels.test_route import DROPOUT, Case, Shape, flat, loop, make_case, run, stored_strided

FAST = {
    "feed-forward": Shape(N=33, d=24, R=1, E=16, k=4),
    "heads, two blocks": Shape(N=70, d=13, R=4, E=5, k=3),
    "one expert": Shape(N=7, d=5, R=2, E=1, k=1),
    "one token": Shape(N=1, d=8, R=1, E=4, k=2),
    "empty": Shape(N=0, d=8, R=2, E=4, k=2),
    "two groups of routers": Shape(N=6, d=40, R=3, E=64, k=8),
}
SLOW = {
    f"E {E} k {k} R {R} N {N}": Shape(N=N, d=d, R=R, E=E, k=k)
    for E, k in ((2, 1), (2, 2), (3, 2), (5, 3), (8, 8), (16, 4), (33, 7), (64, 1), (64, 8), (100, 4))
    for R, N, d in ((1, 150, 136), (3, 65, 31), (10, 20, 64))
} | FAST
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half: only the gradients are rounded


def launches_of(case: Case, k: int) -> tuple[Routing, list[Tensor], list[Launch]]:
    with recording() as launches:
        routing, grads = run(case, k, "triton")
    return routing, grads, launches


def compare(shape: Shape, dropout: str, dtype: torch.dtype) -> None:
    case = make_case(shape, dropout, dtype)
    routing, grads, launches = launches_of(case, shape.k)
    assert {t.dtype for t in routing[:2]} == {torch.float32} and {g.dtype for g in grads} == {dtype}
    groups = -(-shape.R // kernels.RouterTiles.of(shape.R, shape.E, dtype).routers)
    assert len(launches) == (0 if shape.N == 0 else 4 if groups == 1 else 5)
    assert sum(launch.atomics for launch in launches) == 0
    decided = routing.logits.detach() if dropout == "attention" else routing.logits.detach().sigmoid()
    logits, scores, expected_grads = loop(case, shape.k, decided)
    assert error(routing.logits.detach(), logits) <= 1e-6
    assert error(routing.scores.detach(), scores) <= 1e-6
    for what, actual, expected in zip(("x", "weight"), grads, expected_grads, strict=True):
        assert error(actual, expected) <= TOLERANCE[dtype], what
    check_choices(routing, case, shape)


def test_gradients_in_bf16_are_multiplied_as_two_parts() -> None:
    """Of logits whose gradients differ by less than a bf16 number tells: what they leave of each other is exact."""
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = torch.ones(1, 2, 16, dtype=torch.bfloat16)
    weight[:, 1] = -1.0
    logits = route(x, weight, 1, backend="triton").logits
    pull = torch.tensor([1.0 + 2.0**-12, 1.0]).expand(20, 1, 2)
    (grad,) = torch.autograd.grad(logits, x, pull)
    assert torch.equal(grad, torch.full_like(grad, 2.0**-12))


def check_choices(routing: Routing, case: Case, shape: Shape) -> None:
    """Choices equal numpy's stable sort; load and order equal counting by hand."""
    values = routing.logits.detach()
    if case.keep is not None:
        values = values.sigmoid() * case.keep if case.drop_scores else values.masked_fill(~case.keep, -math.inf)
    index = torch.from_numpy(np.argsort(-values.numpy(), axis=-1, kind="stable")[..., : shape.k].copy())
    assert torch.equal(routing.index, index)
    for r in range(shape.R):
        slots = index[:, r].flatten()
        assert torch.equal(routing.order[r], slots.sort(stable=True).indices)
        assert torch.equal(routing.load[r], slots.bincount(minlength=shape.E))


@pytest.mark.parametrize(
    "dropout, dtype",
    [
        *((dropout, torch.float32) for dropout in DROPOUT),
        ("feed-forward", torch.bfloat16),
        ("attention", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FAST)
def test_equals_loop(name: str, dropout: str, dtype: torch.dtype) -> None:
    compare(FAST[name], dropout, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("name", SLOW)
def test_equals_loop_on_many_shapes(name: str, dropout: str, dtype: torch.dtype) -> None:
    compare(SLOW[name], dropout, dtype)


@pytest.mark.parametrize("favourite", [0, 7])
def test_experts_with_none_one_and_all_tokens(favourite: int) -> None:
    """One-hot tokens read logits off the weight: all choose `favourite`, one chooses expert 3, none expert 5."""
    N, E = 140, 8
    logits = torch.full((N, E), -5.0)
    logits[:, favourite], logits[:, 1], logits[90, 3] = 5.0, 1.0, 2.0
    with recording():
        routing = route(torch.eye(N), logits.t()[None].contiguous(), 2, backend="triton")
    expected = [0] * E
    expected[favourite], expected[1], expected[3] = N, N - 1, 1
    assert routing.load[0].tolist() == expected
    assert torch.equal(routing.order[0], routing.index.flatten().sort(stable=True).indices)


@pytest.mark.parametrize("drop_scores", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_ties_go_to_the_lowest_index(fraction: float, drop_scores: bool) -> None:
    """Coarse values tie often, +0.0 and -0.0 tie, sigmoid saturates at 1; with everything dropped, all tie."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2, 3, (70, 16), generator=generator).float() * 40
    logits[torch.rand(70, 16, generator=generator) < 0.1] *= -0.0
    keep = torch.rand(70, 1, 16, generator=generator) >= fraction
    actual = route(torch.eye(70), logits.t()[None], 8, keep=keep, drop_scores=drop_scores, backend="triton")
    assert torch.equal(actual.logits[:, 0], logits)
    dropped = 0.0 if drop_scores else -math.inf
    for n in range(70):
        values = logits[n].sigmoid() if drop_scores else logits[n]
        expected = oracles.choose([float(v) if bool(keep[n, 0, e]) else dropped for e, v in enumerate(values)], 8)
        assert actual.index[n, 0].tolist() == expected


def test_place_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of `place` and of the gradients that take several blocks each, and more counts than are read at once."""
    monkeypatch.setattr(kernels, "MAX_PLACERS", 3)
    monkeypatch.setattr(kernels, "MAX_GRADIENT_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "COUNTS", 8)
    monkeypatch.setattr(kernels, "TILE", 128)  # 16 tokens a block
    shape = Shape(N=300, d=8, R=1, E=8, k=2)
    case = make_case(shape, "none", torch.float32)
    routing, grads, launches = launches_of(case, shape.k)
    assert [launch.grid[0] for launch in launches[:2]] == [19, 3]
    check_choices(routing, case, shape)
    expected = run(case, shape.k, "cpu")[1]
    for actual, e in zip(grads, expected, strict=True):
        assert error(actual, e.double()) <= 2e-6


def test_one_of_two_gradients() -> None:
    shape = FAST["feed-forward"]
    case = make_case(shape, "none", torch.float32)
    both = run(case, shape.k, "triton")[1]
    r = route(case.x, case.weight, shape.k, backend="triton")
    with recording():
        only_logits = torch.autograd.grad(r.logits, (case.x, case.weight), case.grad_logits, retain_graph=True)
        only_scores = torch.autograd.grad(r.scores, (case.x, case.weight), case.grad_scores)
    for a, b, c in zip(both, only_logits, only_scores, strict=True):
        torch.testing.assert_close(a, b + c)


def test_strides_and_mixed_dtypes() -> None:
    case = make_case(FAST["heads, two blocks"], "attention", torch.bfloat16)
    strided = stored_strided(case._replace(weight=case.weight.detach().float().requires_grad_()))
    routing, grads, _ = launches_of(strided, 3)
    _, scores, expected = loop(strided, 3, routing.logits.detach())
    assert error(routing.scores.detach(), scores) <= 1e-6
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    assert error(grads[0], expected[0]) <= 2**-8 and error(grads[1], expected[1]) <= 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    case = make_case(Shape(N=150, d=32, R=2, E=16, k=4), "feed-forward", dtype)
    assert_repeats(lambda: flat(run(case, 4, "triton")))


def test_bf16_gradients_are_split_into_two_numbers() -> None:
    """Rounded to one bf16 number, a gradient of the logits would lose 2^-9; the result in fp32 shows 16 bits of it."""
    case = make_case(Shape(N=64, d=32, R=1, E=16, k=4), "none", torch.bfloat16)
    routing = route(case.x, case.weight, 4, backend="triton")
    rows, matrix = case.x.detach(), case.weight.detach()
    partial: list[Tensor] = []
    original = kernels._add_up

    def keep_partial(parts: Tensor, total: Tensor) -> None:
        partial.append(parts.clone())
        original(parts, total)

    kernels._add_up = keep_partial
    try:
        kernels.backward(case.grad_logits, None, rows, matrix, routing.scores.detach(), routing.index)
    finally:
        kernels._add_up = original
    expected = torch.einsum("nre,nd->red", case.grad_logits.double(), rows.double())
    assert error(partial[0].sum(0), expected) <= 2**-16


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="routes to at most 1024 experts, not 1025"):
        route(torch.ones(2, 3), torch.ones(1, 1025, 3), 5, backend="triton")
