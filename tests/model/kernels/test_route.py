"""route against a loop over tokens and experts in fp64, with every gradient; choices, ties, expert dropout, order."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from model.kernels import backend as kernel_backend
from model.kernels.cpu import workers
from model.kernels.cpu.route import counting_sort, top_k
from model.kernels.dense import route as dense_route
from model.kernels.ops.route import Routing, route
from tests.model import oracles
from tests.model.kernels.checks import assert_compiles, assert_repeats, error, flops, stored_in_reverse


class Shape(NamedTuple):
    N: int
    d: int
    R: int
    E: int
    k: int


SHAPES = {
    "feed-forward": Shape(N=33, d=24, R=1, E=16, k=4),
    "heads": Shape(N=20, d=16, R=4, E=5, k=3),
    "k is 1": Shape(N=17, d=8, R=2, E=4, k=1),
    "all experts chosen": Shape(N=9, d=8, R=3, E=2, k=2),
    "64 experts, k is 8, odd width": Shape(N=30, d=13, R=1, E=64, k=8),
    "one expert": Shape(N=7, d=5, R=2, E=1, k=1),
    "one token": Shape(N=1, d=8, R=1, E=4, k=2),
    "empty": Shape(N=0, d=8, R=2, E=4, k=2),
}
DROPOUT = ("none", "attention", "feed-forward")
BACKENDS = tuple(name for name in kernel_backend.BACKENDS["route"] if name not in ("triton", "cuda"))
"""The Triton kernels, slow in the interpreter and without fp64, have tests of their own: triton/test_route.py; so has
the CUDA C++, which is emulated here: cuda/test_route.py."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}  # bf16: only the gradients are rounded


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are split into several blocks in the small shapes too."""
    monkeypatch.setattr(workers, "BLOCK_TOKENS", 16)


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    keep: Tensor | None
    drop_scores: bool
    grad_logits: Tensor
    grad_scores: Tensor


def make_case(shape: Shape, dropout: str, dtype: torch.dtype) -> Case:
    N, d, R, E, k = shape
    generator = torch.Generator().manual_seed(N + 11 * E)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    x, weight = normal(N, d).to(dtype).requires_grad_(), (normal(R, E, d) / d**0.5).to(dtype).requires_grad_()
    # Half of the experts dropped: often fewer than k are left.
    keep = None if dropout == "none" else torch.rand(N, R, E, generator=generator) < 0.5
    return Case(x, weight, keep, dropout == "feed-forward", normal(N, R, E).to(wide), normal(N, R, k).to(wide))


def run(case: Case, k: int, backend: str) -> tuple[Routing, list[Tensor]]:
    x, weight, keep, drop_scores, grad_logits, grad_scores = case
    routing = route(x, weight, k, keep=keep, drop_scores=drop_scores, backend=backend)
    grads = torch.autograd.grad((routing.logits, routing.scores), (x, weight), (grad_logits, grad_scores))
    return routing, list(grads)


def flat(results: tuple[Routing, list[Tensor]]) -> list[Tensor]:
    return [*results[0], *results[1]]


Choices = tuple[tuple[int, ...], ...]


def kept_of(case: Case, n: int, r: int) -> list[bool]:
    return [True] * case.weight.shape[1] if case.keep is None else case.keep[n, r].tolist()


def choices_of(case: Case, k: int, decided: Tensor) -> Choices:
    """The experts of every token and router; `decided` [N, R, E] are the values that decide (scores or logits)."""
    found, dropped = [], 0.0 if case.drop_scores else -math.inf
    for n, of_token in enumerate(decided.tolist()):
        for r, values in enumerate(of_token):
            left = [v if here else dropped for v, here in zip(values, kept_of(case, n, r), strict=True)]
            found.append(tuple(oracles.choose(left, k)))
    return tuple(found)


def loop(case: Case, k: int, decided: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, scores and gradients in fp64."""
    return loop_of_choices(case, k, choices_of(case, k, decided))


def loop_of_choices(case: Case, k: int, choices: Choices) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, weight = (t.detach().double().requires_grad_() for t in (case.x, case.weight))
    N, (R, E, _) = x.shape[0], weight.shape
    rows, of_rows = [x.new_zeros(0, E)], [x.new_zeros(0, k)]
    for n in range(N):
        for r in range(R):
            all_logits = weight[r] @ x[n]
            all_scores = 1 / (1 + torch.exp(-all_logits))
            if case.drop_scores:
                all_scores = all_scores * torch.tensor(kept_of(case, n, r))
            rows.append(all_logits[None])
            of_rows.append(all_scores[None, list(choices[n * R + r])])
    logits, scores = torch.cat(rows).view(N, R, E), torch.cat(of_rows).view(N, R, k)
    grads = [torch.zeros_like(x), torch.zeros_like(weight)]
    if N > 0:
        upstream = (case.grad_logits.double(), case.grad_scores.double())
        grads = list(torch.autograd.grad((logits, scores), (x, weight), upstream))
    return logits.detach(), scores.detach(), grads


@functools.cache
def expectation(name: str, dropout: str, dtype: torch.dtype, choices: Choices) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What the loop makes of a case; once for all backends that choose alike."""
    return loop_of_choices(make_case(SHAPES[name], dropout, dtype), SHAPES[name].k, choices)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_loop(name: str, backend: str, dropout: str, dtype: torch.dtype) -> None:
    shape, wide = SHAPES[name], torch.promote_types(dtype, torch.float32)
    case = make_case(shape, dropout, dtype)
    routing, grads = run(case, shape.k, backend)
    assert (routing.logits.dtype, routing.scores.dtype) == (wide, wide)
    assert [g.dtype for g in grads] == [dtype, dtype]
    decided = routing.logits.detach() if dropout == "attention" else routing.logits.detach().sigmoid()
    choices = choices_of(case, shape.k, decided)
    logits, scores, expected_grads = expectation(name, dropout, dtype, choices)
    assert error(routing.logits.detach(), logits) <= min(TOLERANCE[dtype], 1e-5)
    assert error(routing.scores.detach(), scores) <= min(TOLERANCE[dtype], 1e-5)
    for what, actual, expected in zip(("x", "weight"), grads, expected_grads, strict=True):
        assert error(actual, expected) <= TOLERANCE[dtype], what


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_index_load_order(name: str, backend: str, dropout: str) -> None:
    """Choices equal numpy's stable sort; load and order equal counting by hand."""
    shape = SHAPES[name]
    case = make_case(shape, dropout, torch.float32)
    actual = route(case.x, case.weight, shape.k, keep=case.keep, drop_scores=case.drop_scores, backend=backend)
    scores, logits = actual.logits.detach().sigmoid(), actual.logits.detach()
    if case.keep is not None:
        scores = scores * case.keep if case.drop_scores else scores
        logits = logits.masked_fill(~case.keep, -math.inf)
    values = scores if case.drop_scores else logits
    index = torch.from_numpy(np.argsort(-values.numpy(), axis=-1, kind="stable")[..., : shape.k].copy())
    assert torch.equal(actual.index, index)
    torch.testing.assert_close(actual.scores.detach(), scores.gather(-1, index))
    for r in range(shape.R):
        slots = index[:, r].flatten().tolist()
        assert actual.order[r].tolist() == [s for e in range(shape.E) for s, chosen in enumerate(slots) if chosen == e]
        assert actual.load[r].tolist() == [slots.count(e) for e in range(shape.E)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_ties_go_to_the_lowest_index(backend: str, fraction: float) -> None:
    """One-hot tokens read logits off the weight: coarse values tie often, +0.0 and -0.0 tie, sigmoid saturates at 1."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2, 3, (200, 16), generator=generator).float() * 40
    logits[torch.rand(200, 16, generator=generator) < 0.1] *= -0.0
    keep = torch.rand(200, 1, 16, generator=generator) >= fraction
    for drop_scores in (False, True):
        actual = route(torch.eye(200), logits.t()[None], 8, keep=keep, drop_scores=drop_scores, backend=backend)
        torch.testing.assert_close(actual.logits[:, 0], logits)
        values = actual.logits[:, 0].sigmoid() if drop_scores else actual.logits[:, 0]
        dropped = 0.0 if drop_scores else -math.inf
        for row, kept, index in zip(values.tolist(), keep[:, 0].tolist(), actual.index[:, 0].tolist(), strict=True):
            assert index == oracles.choose([v if here else dropped for v, here in zip(row, kept, strict=True)], 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_k_on_every_kind_of_number(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, -math.inf, 1.0, -1.0, 1.0000001, 0.5], dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    values = special[torch.randint(0, special.numel(), (500, 33), generator=generator)]
    for k in (1, 5, 33):
        expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(top_k(values, k), expected)


def test_counting_sort_of_many_experts() -> None:
    """Beyond 2^15 experts the keys no longer fit 16 bits."""
    index = torch.randint(0, 40000, (50, 2, 4), generator=torch.Generator().manual_seed(2))
    load, order = counting_sort(index, 40000)
    slots = index.transpose(0, 1).reshape(2, -1)
    assert torch.equal(order, slots.sort(dim=-1, stable=True).indices)
    assert torch.equal(load, torch.stack([row.bincount(minlength=40000) for row in slots]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_two_gradients(backend: str) -> None:
    """The entropy regulariser alone or the scores alone."""
    case = make_case(SHAPES["heads"], "none", torch.float32)
    both = run(case, 3, backend)[1]
    r = route(case.x, case.weight, 3, backend=backend)
    inputs = (case.x, case.weight)
    only_logits = torch.autograd.grad(r.logits, inputs, case.grad_logits, retain_graph=True)
    only_scores = torch.autograd.grad(r.scores, inputs, case.grad_scores, retain_graph=True)
    for a, b, c in zip(both, only_logits, only_scores, strict=True):
        torch.testing.assert_close(a, b + c)


def stored_strided(case: Case) -> Case:
    assert case.keep is not None
    return case._replace(
        x=stored_in_reverse(case.x),
        weight=stored_in_reverse(case.weight),
        keep=case.keep.transpose(0, 1).contiguous().transpose(0, 1),
        grad_logits=torch.tensor(0.3).expand_as(case.grad_logits),
        grad_scores=torch.tensor(0.7).expand_as(case.grad_scores),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    strided = stored_strided(make_case(SHAPES["heads"], "attention", torch.float32))
    r, grads = run(strided, 3, backend)
    _, scores, expected = loop(strided, 3, r.logits.detach())
    assert error(r.scores.detach(), scores) <= 1e-5
    for actual, e in zip(grads, expected, strict=True):
        assert error(actual, e) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend: str) -> None:
    case = make_case(Shape(N=500, d=32, R=2, E=16, k=4), "feed-forward", torch.float32)
    assert_repeats(lambda: flat(run(case, 4, backend)), times=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    case = make_case(Shape(N=4, d=3, R=2, E=4, k=2), "feed-forward", torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: route(x, w, 2, keep=case.keep, drop_scores=True, backend=backend)[:2], (case.x, case.weight)
    )


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dropout", ["none", "attention"])
def test_opcheck(dropout: str, backend: str) -> None:
    case = make_case(SHAPES["heads"], dropout, torch.bfloat16)
    torch.library.opcheck(torch.ops.switchall.route.default, (case.x, case.weight, case.keep, 3, False, backend))
    _, scores, index, _, _ = torch.ops.switchall.route(case.x.detach(), case.weight.detach(), None, 3, False, backend)
    torch.library.opcheck(
        torch.ops.switchall.route_backward.default,
        (case.grad_logits, case.grad_scores, case.x.detach(), case.weight.detach(), scores, index, backend),
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    case = make_case(SHAPES["feed-forward"], "none", torch.float32)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        r = route(x * 2, weight, 4, backend=backend)
        return r.scores.square().sum() + r.logits.logsumexp(-1).sum() + r.load.sum() + r.order.sum()

    assert_compiles(function, (case.x, case.weight))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_meta_tensors(backend: str) -> None:
    shape = SHAPES["heads"]
    x = torch.empty(shape.N, shape.d, device="meta", requires_grad=True)
    weight = torch.empty(shape.R, shape.E, shape.d, device="meta", requires_grad=True)
    r = route(x, weight, shape.k, backend=backend)
    N, _, R, E, k = shape
    assert [tuple(t.shape) for t in r] == [(N, R, E), (N, R, k), (N, R, k), (R, E), (R, N * k)]
    r.scores.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_flop_counter(backend: str) -> None:
    N, d, R, E, _ = SHAPES["heads"]
    case = make_case(SHAPES["heads"], "none", torch.float32)
    product = 2 * N * R * E * d
    assert flops(lambda: route(case.x, case.weight, 3, backend=backend).scores) == (product, 2 * product)


def test_impossible_k_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5 active experts of 4: k must be in 1\.\.4"):
        route(torch.ones(2, 3), torch.ones(1, 4, 3), 5, backend="cpu")


def test_gradients_beside_bf16_are_multiplied_in_two_parts() -> None:
    """As near to fp64 as rounding the result allows; with the high part alone they are off by 1.4 times as much."""
    torch.manual_seed(0)
    N, R, E, d, k = 200, 2, 8, 48, 2
    x, weight = torch.randn(N, d).bfloat16(), torch.randn(R, E, d).bfloat16()
    grad_logits, scores = torch.randn(N, R, E), torch.rand(N, R, k)
    found = dense_route.backward(grad_logits, None, x, weight, scores, torch.zeros(N, R, k, dtype=torch.int64))
    exact = (
        torch.einsum("nre,red->nd", grad_logits.double(), weight.double()),
        torch.einsum("nre,nd->red", grad_logits.double(), x.double()),
    )
    for actual, wanted in zip(found, exact, strict=True):
        rounding = (wanted.bfloat16().double() - wanted).norm()
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - wanted).norm() <= 1.05 * rounding
