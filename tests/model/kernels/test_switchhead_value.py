"""switchhead_value against a loop in fp64 written from the equation; every backend, strategy, dtype and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.kernels.cpu import grouping
from model.kernels.ops.switchhead_value import switchhead_value

# N tokens, d, H, h, E, k, routing (random; first: all tokens on experts 0..k-1; single: one token on the last expert)
SHAPES = [
    (37, 11, 2, 7, 5, 3, "random"),
    (64, 16, 4, 8, 4, 2, "random"),
    (29, 13, 3, 5, 4, 2, "first"),
    (29, 13, 1, 5, 4, 1, "single"),
    (21, 9, 5, 3, 2, 1, "random"),
    (18, 10, 2, 6, 2, 2, "random"),
    (40, 17, 1, 9, 64, 8, "random"),
    (33, 8, 2, 4, 10, 8, "single"),
    (1, 12, 2, 5, 4, 2, "random"),
    (6, 5, 1, 1, 1, 1, "random"),
    (0, 12, 2, 5, 4, 2, "random"),
    (1100, 6, 1, 4, 3, 2, "random"),  # groups longer than MAX_GROUP_ROWS
]
BACKENDS = ["reference", "cpu", "cpu:all", "cpu:sets", "cpu:experts"]
NAMES = ("v", "x", "scores", "experts")
# Largest error in the norm, relative. fp32: sums of at most 1100 terms. bf16, cpu: fp32 inside, one rounding (2^-9) of
# results and of the saved products; reference: einsum rounds gates, products and gated products too, 2^-9 each.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8}
REFERENCE_TOLERANCE = TOLERANCE | {torch.bfloat16: 2**-6}


def inputs(shape: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, scores, index, experts; only the k chosen scores exist, in random order (as after expert dropout)."""
    N, d, H, h, E, k, routing = shape
    generator = torch.Generator().manual_seed(seed)
    preference = torch.rand(N, H, E, generator=generator)
    if routing != "random":
        preference[..., :k] += 1.0
    if routing == "single":
        preference[N // 2, :, -1] += 2.0
    index = preference.topk(k, -1).indices
    scores = torch.rand(N, H, k, generator=generator, dtype=torch.float64)
    x, experts = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, d), (H, E, d, h)))
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), scores.to(narrow), index, experts.to(dtype)


def oracle(x: Tensor, scores: Tensor, index: Tensor, experts: Tensor) -> Tensor:
    rows = []
    for n in range(index.shape[0]):
        for head in range(index.shape[1]):
            chosen = zip(scores[n, head], index[n, head].tolist(), strict=True)
            rows.append(sum(s * (x[n] @ experts[head, e]) for s, e in chosen))
    shape = (*index.shape[:2], experts.shape[-1])
    return torch.stack(rows).view(shape) if rows else (x.sum() + scores.sum() + experts.sum()) * x.new_zeros(shape)


def run(op: Callable[..., Tensor], tensors: tuple, upstream: Tensor, *extra: str) -> list[Tensor]:
    x, scores, index, experts = tensors
    leaves = [t.detach().requires_grad_() for t in (x, scores, experts)]
    y = op(leaves[0], leaves[1], index, leaves[2], *extra)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype).expand_as(y))]


@functools.cache
def expectation(shape: tuple, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """Inputs, upstream gradient, and what the loop makes of them; once for all backends."""
    tensors = inputs(shape, dtype)
    upstream = torch.randn(shape[0], shape[2], shape[3], generator=torch.Generator().manual_seed(1)).to(dtype)
    return tensors, upstream, run(oracle, tuple(t.double() if t.is_floating_point() else t for t in tensors), upstream)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def skip_too_many_sets(shape: tuple, backend: str) -> None:
    if backend == "cpu:sets" and shape[4] > 10:
        pytest.skip("C(64, 8) sets: never chosen, too many to enumerate")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient_equal_the_loop(shape: tuple, backend: str, dtype: torch.dtype) -> None:
    skip_too_many_sets(shape, backend)
    tensors, upstream, expected = expectation(shape, dtype)
    limit = (REFERENCE_TOLERANCE if backend == "reference" else TOLERANCE)[dtype]
    actual = run(switchhead_value, tensors, upstream, backend)
    for name, ours, exact, given in zip(NAMES, actual, expected, (tensors[0], *tensors[:2], tensors[3]), strict=True):
        assert ours.dtype == given.dtype
        assert error(ours, exact) <= limit, f"{name} is off by {error(ours, exact):.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_expanded_gradient(backend: str) -> None:
    x, scores, index, experts = inputs(SHAPES[1], torch.float64)
    strided = (
        torch.stack([x, -x], -1)[..., 0],
        scores.transpose(0, 2).contiguous().transpose(0, 2),
        torch.cat([index, index], 1)[:, : index.shape[1]],
        experts.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    )
    assert not any(t.is_contiguous() for t in strided)
    upstream = torch.ones(1, 1, 1, dtype=torch.float64)
    expected = run(oracle, (x, scores, index, experts), upstream)
    for name, ours, exact in zip(NAMES, run(switchhead_value, strided, upstream, backend), expected, strict=True):
        assert error(ours, exact) < 1e-13, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repetition_is_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    tensors = inputs((700, 40, 3, 24, 4, 2, "random"), dtype)
    upstream = torch.randn(700, 3, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    first = run(switchhead_value, tensors, upstream, backend)
    for _ in range(2):
        assert all(map(torch.equal, first, run(switchhead_value, tensors, upstream, backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x, scores, index, experts = inputs((5, 4, 2, 3, 4, 2, "random"), torch.float64)
    leaves = [t.requires_grad_() for t in (x, scores, experts)]
    assert torch.autograd.gradcheck(lambda a, b, c: switchhead_value(a, b, index, c, backend), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    x, scores, index, experts = inputs((9, 6, 2, 5, 4, 2, "random"), dtype)
    leaves = [t.requires_grad_() for t in (x, scores, experts)]
    torch.library.opcheck(torch.ops.switchall.switchhead_value, (*leaves[:2], index, leaves[2], backend))
    plain = [t.detach() for t in leaves]
    grad = torch.randn(9, 2, 5).to(dtype)
    saved = torch.ops.switchall.switchhead_value(*plain[:2], index, plain[2], backend)[1:]
    arguments = (grad, *plain[:2], index, plain[2], *saved, backend)
    torch.library.opcheck(torch.ops.switchall.switchhead_value_backward, arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_graph_break(backend: str) -> None:
    tensors = inputs(SHAPES[0], torch.float32)
    upstream = torch.ones(1, 1, 1)

    def function(x: Tensor, scores: Tensor, index: Tensor, experts: Tensor) -> Tensor:
        return switchhead_value(x.sin(), scores, index, experts, backend).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, tensors, upstream), run(function, tensors, upstream), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors(backend: str) -> None:
    tensors = tuple(t.to("meta") for t in inputs(SHAPES[0], torch.bfloat16))
    results = run(switchhead_value, tensors, torch.ones(1, 1, 1, device="meta"), backend)
    assert [(t.shape, t.dtype, t.device.type) for t in results[1:]] == [
        (t.shape, t.dtype, "meta") for t in (tensors[0], tensors[1], tensors[3])
    ]
    assert results[0].shape == (37, 2, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_useful_flops_are_counted(backend: str) -> None:
    N, d, H, h, _, k, _ = SHAPES[0]
    with FlopCounterMode(display=False) as forward:
        switchhead_value(*inputs(SHAPES[0], torch.float32), backend)
    assert forward.get_total_flops() == 2 * N * H * k * d * h
    with FlopCounterMode(display=False) as both:
        run(switchhead_value, inputs(SHAPES[0], torch.float32), torch.ones(1, 1, 1), backend)
    assert both.get_total_flops() == 3 * 2 * N * H * k * d * h


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda"):
        switchhead_value(*inputs(SHAPES[0], torch.float32), "cuda")
    with pytest.raises(ValueError, match="gated, sorted"):
        switchhead_value(*inputs(SHAPES[0], torch.float32), "triton:sets")


# N, E, k: what is measured fastest at d = 1024, h = 112 (benchmarks/kernels_switchhead.py).
@pytest.mark.parametrize(
    "shape, strategy",
    [
        ((2048, 4, 2), "sets"),
        ((2048, 5, 3), "sets"),
        ((2048, 8, 4), "experts"),
        ((2048, 64, 8), "experts"),
        ((2048, 4, 4), "all"),
        ((2048, 1, 1), "all"),
        ((16, 4, 2), "experts"),
        ((0, 4, 2), "experts"),
    ],
)
def test_strategy_follows_from_the_shape(shape: tuple[int, int, int], strategy: str) -> None:
    assert grouping.choose_strategy(*shape) == strategy
