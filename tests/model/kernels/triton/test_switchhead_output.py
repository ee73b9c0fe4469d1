"""The Triton kernels of switchhead_output, interpreted, against the fp64 loop of the test of the other backends."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.recording import recording
from model.kernels.ops.switchhead_output import switchhead_output
from tests.model.kernels.test_switchhead_output import NAMES, TOLERANCE, error, expectation, inputs, oracle, run
from tests.model.kernels.triton.small_tiles import gemm_bytes, of_kernels, use_tiles

# N tokens, d, H, h, E, k, routing as in the imported test. Tiles are 16 wide: most shapes have a part of one.
SHAPES = [
    (18, 17, 2, 17, 5, 3, "random"),
    (17, 32, 1, 16, 4, 2, "first"),
    (18, 13, 1, 5, 4, 1, "single"),
    (9, 18, 3, 3, 2, 1, "random"),
    (17, 7, 1, 18, 2, 2, "random"),
    (17, 8, 1, 4, 10, 8, "single"),
    (1, 20, 2, 5, 6, 4, "random"),
    (6, 5, 1, 1, 1, 1, "random"),
    (0, 12, 2, 5, 4, 2, "random"),
]
SMALL = (18, 9, 2, 5, 5, 3, "random")
MANY_EXPERTS = (19, 9, 1, 6, 64, 8, "random")
STRATEGIES = ("gated", "sorted")
HALF = 2**-8
"""bf16: gated rows or slots' products, and results, are rounded once each, 2^-9 (0.0029 at most measured)."""
LIMIT = TOLERANCE | {torch.bfloat16: HALF, torch.float16: HALF / 8}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


def assert_equals_loop(shape: tuple, strategy: str, dtype: torch.dtype) -> None:
    tensors, upstream, expected = expectation(shape, dtype)
    with recording() as launches:
        actual = run(switchhead_output, tensors, upstream, f"triton:{strategy}")
    for name, ours, exact, given in zip(NAMES, actual, expected, (tensors[0], *tensors[:2], tensors[3]), strict=True):
        assert ours.dtype == given.dtype
        assert ours.is_contiguous()
        assert error(ours, exact) <= LIMIT[dtype], f"{name} is off by {error(ours, exact):.1e}"
    assert not any(launch.atomics for launch in launches)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient_equal_the_loop(shape: tuple, strategy: str) -> None:
    assert_equals_loop(shape, strategy, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [SMALL], ids=str)
def test_other_dtypes(shape: tuple, strategy: str, dtype: torch.dtype) -> None:
    assert_equals_loop(shape, strategy, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [*SHAPES, MANY_EXPERTS], ids=str)
def test_all_shapes_in_other_dtypes(shape: tuple, strategy: str, dtype: torch.dtype) -> None:
    assert_equals_loop(shape, strategy, dtype)


@pytest.mark.slow
def test_many_experts() -> None:
    assert_equals_loop(MANY_EXPERTS, "sorted", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "shape",
    [
        (300, 412, 2, 76, 5, 3, "random"),
        (260, 264, 4, 112, 4, 2, "first"),
        (140, 136, 2, 132, 8, 4, "single"),
        (200, 72, 2, 64, 16, 3, "random"),
        (130, 40, 1, 24, 64, 8, "random"),
    ],
    ids=str,
)
def test_shipped_tiles_equal_the_loop(
    shape: tuple, strategy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert_equals_loop(shape, strategy, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_non_contiguous_inputs_and_expanded_gradient(strategy: str) -> None:
    a, scores, index, experts = inputs(SMALL, torch.float32)
    strided = (
        torch.stack([a, -a], -1)[..., 0],
        scores.transpose(0, 2).contiguous().transpose(0, 2),
        torch.cat([index, index], 1)[:, : index.shape[1]],
        experts.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    )
    assert not any(t.is_contiguous() for t in strided)
    upstream = torch.ones(1, 1)
    expected = run(oracle, tuple(t.double() if t.is_floating_point() else t for t in strided), upstream)
    with recording():
        actual = run(switchhead_output, strided, upstream, f"triton:{strategy}")
    for name, ours, exact in zip(NAMES, actual, expected, strict=True):
        assert error(ours, exact) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_repetition_is_bitwise_equal(strategy: str, dtype: torch.dtype) -> None:
    tensors, upstream, _ = expectation(SMALL, dtype)
    first, second = (run(switchhead_output, tensors, upstream, f"triton:{strategy}") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_launches_do_not_depend_on_the_routing(strategy: str) -> None:
    """The same kernels on the same grids whatever was chosen: nothing was copied to the host to decide."""
    seen = []
    for routing in ("random", "first"):
        with recording(check=False) as launches:
            run(
                switchhead_output,
                inputs((*SMALL[:6], routing), torch.float32),
                torch.ones(1, 1),
                f"triton:{strategy}",
            )
        seen.append([(launch.kernel, launch.grid) for launch in launches])
    assert seen[0] == seen[1]
    assert len(seen[0]) == {"gated": 6, "sorted": 7}[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_of_the_heads_each(strategy: str) -> None:
    """Tensor parallelism: ranks hold heads. The gradients of a, scores and experts are theirs, bit for bit; y is summed
    over ranks."""
    (a, scores, index, experts), upstream, _ = expectation((9, 19, 4, 6, 4, 2, "random"), torch.float32)
    whole = run(switchhead_output, (a, scores, index, experts), upstream, f"triton:{strategy}")
    halves = [
        run(
            switchhead_output,
            (a[:, heads], scores[:, heads], index[:, heads], experts[heads]),
            upstream,
            f"triton:{strategy}",
        )
        for heads in (slice(0, 2), slice(2, 4))
    ]
    for i, axis in ((1, 1), (2, 1), (3, 0)):
        assert torch.equal(torch.cat([half[i] for half in halves], axis), whole[i]), NAMES[i]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("E, k, strategy", [(4, 2, "gated"), (5, 3, "gated"), (5, 2, "sorted"), (8, 4, "gated")])
def test_half_of_the_experts_decides(E: int, k: int, strategy: str) -> None:
    with recording(check=False) as launches:
        switchhead_output(*inputs((3, 4, 1, 4, E, k, "random"), torch.float32), "triton")
    assert ("output_forward_kernel" in {launch.kernel for launch in launches}) == (strategy == "gated")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck(strategy: str) -> None:
    a, scores, index, experts = inputs((9, 6, 2, 5, 4, 2, "random"), torch.float32)
    leaves = [t.requires_grad_() for t in (a, scores, experts)]
    backend = f"triton:{strategy}"
    torch.library.opcheck(torch.ops.switchall.switchhead_output, (*leaves[:2], index, leaves[2], backend))
    plain = [t.detach() for t in leaves]
    saved = torch.ops.switchall.switchhead_output(*plain[:2], index, plain[2], backend)[1:]
    arguments = (torch.randn(9, 6), *plain[:2], index, plain[2], *saved, backend)
    torch.library.opcheck(torch.ops.switchall.switchhead_output_backward, arguments)


def test_dtypes_that_no_kernel_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64 by torch\.float64"):
        switchhead_output(*inputs(SMALL, torch.float64), "triton")
    a, scores, index, experts = inputs(SMALL, torch.float32)
    with pytest.raises(ValueError, match=r"not torch\.float32 by torch\.bfloat16"):
        switchhead_output(a, scores, index, experts.bfloat16(), "triton")


def test_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 x 64 tiles, half precision: at most 1.1 times what plain GEMMs over K-concatenated experts ask for (gates,
    and for their gradient a, are the rest)."""
    use_tiles(monkeypatch, 64)
    N, d, H, h, E, k = 256, 128, 2, 64, 4, 2
    tensors = inputs((N, d, H, h, E, k, "random"), torch.bfloat16)
    with recording(check=False) as launches:
        run(switchhead_output, tensors, torch.ones(1, 1), "triton:gated")
    useful = 2 * N * H * k * d * h
    for names, size in (
        (("output_forward_kernel",), (N, d, H * E * h)),
        (("output_backward_kernel",), (N, H * h, E * d)),
        (("gated_weight_gradient_kernel",), (H * E * d, h, N)),
    ):
        requested, flops = of_kernels(launches, *names)
        assert flops == E / k * useful
        assert requested <= 1.1 * gemm_bytes(64, 2, size), names


def test_sorted_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 x 64 tiles and 256 tokens per expert: flops 1.3 times the useful ones, bytes of every GEMM 1.5 times those
    of its useful rows; a slot's wide row is read once more, to be summed."""
    use_tiles(monkeypatch, 64)
    N, d, H, h, E, k = 512, 128, 1, 64, 4, 2
    tensors = inputs((N, d, H, h, E, k, "random"), torch.bfloat16)
    with recording(check=False) as launches:
        run(switchhead_output, tensors, torch.ones(1, 1), "triton:sorted")
    useful = 2 * N * H * k * d * h
    projections = [launch for launch in launches if launch.kernel == "sorted_project_kernel"]
    for launch, size in zip(projections, ((N * H * k, d, h), (N * H * k, h, d)), strict=True):
        assert launch.dot_flops <= 1.3 * useful
        assert launch.requested_bytes <= 1.5 * gemm_bytes(64, 2, size)
    requested, flops = of_kernels(launches, "sorted_weight_gradient_kernel")
    assert flops <= 1.3 * useful
    assert requested <= 1.5 * (gemm_bytes(64, 2, (d, h, N * H * k)) + 2 * E * d * h)
    assert of_kernels(launches, "sum_slots_kernel")[0] == 2 * (N * H * k + N) * d
