"""The Triton kernels of switchhead_value and switchhead_output, interpreted, against the fp64 loops of the test of the
other backends. A test that takes `op` runs for both."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.recording import recording
from model.kernels.triton import gated_gemm, sorted_slots, switchhead_output
from model.kernels.triton import switchhead_value as value_kernels
from tests.model.kernels.test_switchhead import (
    NAMES,
    TOLERANCE,
    VALUE,
    Case,
    Op,
    Shape,
    both_ops,
    check_op,
    computed,
    double,
    error,
    expectation,
    inputs,
    run,
    strided,
)
from tests.model.kernels.triton.small_tiles import gemm_bytes, of_kernels, use_tiles

# Tiles are 16 wide: most shapes have a part of one.
SOME = [
    Shape(18, 17, 2, 17, 3, 2),
    Shape(17, 32, 1, 16, 4, 2, "first"),
    Shape(18, 13, 1, 5, 4, 1, "single"),
    Shape(6, 5, 1, 1, 1, 1),
    Shape(0, 12, 2, 5, 4, 2),
]
SHAPES = [
    *SOME,
    Shape(18, 17, 2, 17, 5, 3),
    Shape(9, 18, 3, 3, 2, 1),
    Shape(17, 7, 1, 18, 2, 2),
    Shape(17, 8, 1, 4, 10, 8, "single"),
    Shape(1, 20, 2, 5, 6, 4),
]
SMALL = Shape(18, 9, 2, 5, 3, 2)
MANY_EXPERTS = Shape(19, 9, 1, 6, 64, 8)
HALF = 2**-8
"""bf16: gated rows or slots' products, and results, are rounded once each, 2^-9 (0.0029 at most measured)."""
LIMIT = TOLERANCE | {torch.bfloat16: HALF, torch.float16: HALF / 8}
both_strategies = pytest.mark.parametrize("strategy", ["gated", "sorted"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


def assert_equals_loop(op: Op, shape: Shape, strategy: str, dtype: torch.dtype) -> None:
    case, upstream, expected = expectation(op, shape, dtype)
    with recording() as launches:
        actual = run(computed(op, ("triton", strategy)), case, upstream)
    given = (case.rows, case.rows, case.choice.scores, case.experts)
    for name, ours, exact, like in zip(NAMES, actual, expected, given, strict=True):
        assert ours.dtype == like.dtype
        assert ours.is_contiguous()
        assert error(ours, exact) <= LIMIT[dtype], f"{name} is off by {error(ours, exact):.1e}"
    assert not any(launch.atomics for launch in launches)


@both_strategies
@pytest.mark.parametrize(
    "shape", [*SOME, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES if shape not in SOME)], ids=str
)
@both_ops
def test_forward_and_every_gradient_equal_the_loop(op: Op, shape: Shape, strategy: str) -> None:
    assert_equals_loop(op, shape, strategy, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@both_strategies
@both_ops
def test_other_dtypes(op: Op, strategy: str, dtype: torch.dtype) -> None:
    assert_equals_loop(op, SMALL, strategy, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@both_strategies
@pytest.mark.parametrize("shape", [*SHAPES, MANY_EXPERTS], ids=str)
@both_ops
def test_all_shapes_in_other_dtypes(op: Op, shape: Shape, strategy: str, dtype: torch.dtype) -> None:
    assert_equals_loop(op, shape, strategy, dtype)


@pytest.mark.slow
@both_ops
def test_many_experts(op: Op) -> None:
    assert_equals_loop(op, MANY_EXPERTS, "sorted", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@both_strategies
@pytest.mark.parametrize(
    "shape",
    [
        Shape(300, 412, 2, 76, 5, 3),
        Shape(260, 264, 4, 112, 4, 2, "first"),
        Shape(140, 136, 2, 132, 8, 4, "single"),
        Shape(200, 72, 2, 64, 16, 3),
        Shape(130, 40, 1, 24, 64, 8),
    ],
    ids=str,
)
@both_ops
def test_shipped_tiles_equal_the_loop(
    op: Op, shape: Shape, strategy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert_equals_loop(op, shape, strategy, dtype)


def test_fewer_experts_share_a_tile_where_tensor_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capability 10: 4 or 5 of 128 columns do not fit by Triton 3.7.1, which torch 2.13 brings."""
    shared = value_kernels.shared_experts
    assert [[shared(E, 128, major) for E in (2, 3, 4, 5, 8, 64)] for major in (9, 10)] == [
        [2, 3, 4, 5, 4, 4],
        [2, 3, 2, 1, 2, 2],
    ]
    assert [shared(E, 64, 10) for E in (4, 5)] == [4, 5]
    monkeypatch.undo()
    asked: list[int] = []

    def noted(*given: int) -> int:
        asked.append(shared(*given))
        return asked[-1]

    monkeypatch.setattr(value_kernels, "shared_experts", noted)
    monkeypatch.setattr(value_kernels, "cuda_capability", lambda: (10, 0))
    assert_equals_loop(VALUE, Shape(20, 40, 1, 100, 4, 2), "gated", torch.bfloat16)
    assert asked == [2]


@both_strategies
@both_ops
def test_non_contiguous_inputs_and_expanded_gradient(op: Op, strategy: str) -> None:
    case, upstream = strided(inputs(op, SMALL, torch.float32)), torch.ones(())
    expected = run(op.loop, case.to(double), upstream)
    with recording():
        actual = run(computed(op, ("triton", strategy)), case, upstream)
    for name, ours, exact in zip(NAMES, actual, expected, strict=True):
        assert error(ours, exact) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@both_strategies
@both_ops
def test_repetition_is_bitwise_equal(op: Op, strategy: str, dtype: torch.dtype) -> None:
    case, upstream, _ = expectation(op, SMALL, dtype)
    first, second = (run(computed(op, ("triton", strategy)), case, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))


LAUNCHES = {("switchhead_value", "sorted"): 6, ("switchhead_output", "sorted"): 5}
"""The sort is the router's; gate-scaled GEMMs are six, with the gates and their gradient."""


@both_strategies
@both_ops
def test_launches_do_not_depend_on_the_routing(op: Op, strategy: str) -> None:
    """The same kernels on the same grids whatever was chosen: nothing was copied to the host to decide."""
    seen = []
    for routing in ("random", "first"):
        with recording(check=False) as launches:
            case = inputs(op, SMALL._replace(routing=routing), torch.float32)
            run(computed(op, ("triton", strategy)), case, torch.ones(()))
        seen.append([(launch.kernel, launch.grid) for launch in launches])
    assert seen[0] == seen[1]
    assert len(seen[0]) == LAUNCHES.get((op.name, strategy), 6)


@both_strategies
@both_ops
def test_half_of_the_heads_each(op: Op, strategy: str) -> None:
    """Tensor parallelism: ranks hold heads. What a head has, its value or the gradient of its row, scores and experts,
    is its rank's, bit for bit; y and the gradients of x are summed over ranks."""
    case, upstream, _ = expectation(op, Shape(9, 5, 4, 6, 3, 2), torch.float32)
    whole, function = run(computed(op, ("triton", strategy)), case, upstream), computed(op, ("triton", strategy))
    halves = []
    for heads in (slice(0, 2), slice(2, 4)):
        (scores, index, order, load), rows, grad = case.choice, case.rows, upstream
        choice = case.choice._replace(scores=scores[:, heads], index=index[:, heads], order=order[heads])
        choice = choice._replace(load=load[heads])
        rows, grad = (rows, grad[:, heads]) if op is VALUE else (rows[:, heads], grad)
        halves.append(run(function, Case(rows, choice, case.experts[heads]), grad))
    own, summed = (0, 1) if op is VALUE else (1, 0)
    for i, axis in ((own, 1), (2, 1), (3, 0)):
        assert torch.equal(torch.cat([half[i] for half in halves], axis), whole[i]), NAMES[i]
    torch.testing.assert_close(halves[0][summed] + halves[1][summed], whole[summed], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("E, k, strategy", [(4, 2, "gated"), (5, 3, "gated"), (5, 2, "sorted"), (8, 4, "gated")])
@both_ops
def test_half_of_the_experts_decides(op: Op, E: int, k: int, strategy: str) -> None:
    with recording(check=False) as launches:
        computed(op, ("triton", None))(inputs(op, Shape(3, 4, 1, 4, E, k), torch.float32))
    gated_kernel = f"{op.name.removeprefix('switchhead_')}_forward_kernel"
    assert (gated_kernel in {launch.kernel for launch in launches}) == (strategy == "gated")


@pytest.mark.slow
@both_strategies
@both_ops
def test_opcheck(op: Op, strategy: str) -> None:
    check_op(op, Shape(9, 6, 2, 5, 4, 2), torch.float32, "triton", strategy)


@both_ops
def test_dtypes_that_no_kernel_has_are_refused(op: Op) -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64 by torch\.float64"):
        op.call(*inputs(op, SMALL, torch.float64), backend="triton")
    case = inputs(op, SMALL, torch.float32)
    with pytest.raises(ValueError, match=r"not torch\.float32 by torch\.bfloat16"):
        op.call(case.rows, case.choice, case.experts.bfloat16(), backend="triton")


@pytest.mark.parametrize("N, R, E, k", [(70, 2, 5, 3), (9, 1, 64, 8), (9, 3, 2, 1), (1, 1, 1, 1), (0, 2, 3, 1)])
def test_sort_is_the_stable_one(N: int, R: int, E: int, k: int) -> None:
    index = torch.rand(N, R, E, generator=torch.Generator().manual_seed(0)).topk(k).indices
    with recording():
        order, load = sorted_slots.sort_slots(index, E)
    slots = index.transpose(0, 1).reshape(R, N * k)
    assert torch.equal(order, slots.sort(dim=-1, stable=True).indices)
    assert torch.equal(load, torch.stack([row.bincount(minlength=E) for row in slots]))


@both_ops
def test_traffic(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 x 64 tiles, half precision: at most 1.1 times what plain GEMMs over K-concatenated experts ask for (gates,
    and the rows for their gradient, are the rest), and less where a tile of x serves all experts: value forward."""
    use_tiles(monkeypatch, 64)
    N, d, H, h, E, k, _ = shape = Shape(256, 128, 2, 64, 4, 2)
    with recording(check=False) as launches:
        run(computed(op, ("triton", "gated")), inputs(op, shape, torch.bfloat16), torch.ones(()))
    to_narrow, to_wide = (N, H * h, E * d), (N, d, H * E * h)
    forward, backward, share = (to_narrow, to_wide, 0.75) if op is VALUE else (to_wide, to_narrow, 1.1)
    name = op.name.removeprefix("switchhead_")
    for kernel, size, limit in (
        (f"{name}_forward_kernel", forward, share),
        (f"{name}_backward_kernel", backward, 1.1),
        ("gated_weight_gradient_kernel", (H * E * d, h, N), 1.1),
    ):
        requested, flops = of_kernels(launches, kernel)
        assert flops == E / k * 2 * N * H * k * d * h
        assert requested <= limit * gemm_bytes(64, 2, size), kernel
    requested, _ = of_kernels(launches, "dense_gates_kernel", "gate_gradient_kernel")
    assert requested <= 0.2 * sum(of_kernels(launches, launch.kernel)[0] for launch in launches)


@both_ops
def test_sorted_traffic(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 x 64 tiles and 256 tokens per expert: flops 1.3 times the useful ones, bytes of every GEMM 1.5 times those
    of its useful rows; a slot's wide row is read once more, to be summed."""
    use_tiles(monkeypatch, 64)
    N, d, H, h, E, k, _ = shape = Shape(512, 128, 1, 64, 4, 2)
    with recording(check=False) as launches:
        run(computed(op, ("triton", "sorted")), inputs(op, shape, torch.bfloat16), torch.ones(()))
    useful, slots = 2 * N * H * k * d * h, N * H * k
    to_narrow, to_wide = (slots, h, d), (slots, d, h)
    projections = [launch for launch in launches if launch.kernel == "sorted_project_kernel"]
    sizes = (to_narrow, to_wide) if op is VALUE else (to_wide, to_narrow)
    for launch, size in zip(projections, sizes, strict=True):
        assert launch.dot_flops <= 1.3 * useful
        assert launch.requested_bytes <= 1.5 * gemm_bytes(64, 2, size)
    requested, flops = of_kernels(launches, "sorted_weight_gradient_kernel")
    assert flops <= 1.3 * useful
    assert requested <= 1.5 * (gemm_bytes(64, 2, (d, h, slots)) + 2 * E * d * h)
    assert of_kernels(launches, "sum_slots_kernel")[0] == 2 * (slots + N) * d


@both_ops
def test_gradients_of_gates_beyond_2_to_the_31(op: Op) -> None:
    """What the column tiles saw of them, [tiles, H, E, N], is the one tensor that many tokens make that long. As bytes,
    of which 16 tokens' alone are touched; 32-bit offsets would be negative."""
    N, E, tile = 2**29, 4, 16
    partial = torch.empty(2, 1, E, N, dtype=torch.int8)
    gates = torch.empty(1, E, N, dtype=torch.int8)
    gates[:, :, :tile] = 1
    narrow, wide = tile, 2 * tile  # of the gradient, and of the rows, which are cut into two tiles
    kernel, d, h = (
        (value_kernels.value_backward_kernel, wide, narrow)
        if op is VALUE
        else (switchhead_output.output_backward_kernel, narrow, wide)
    )
    grad, rows = torch.ones(tile, narrow), torch.ones(tile, wide)
    experts, target = torch.full((1, E, d * h), 1 / tile), torch.zeros_like(rows)
    kernel[(2,)](grad, rows, gates, experts, target, partial, N, d, h, 1, E, tile, tile, tile)
    assert (partial[:, 0, :, :tile] == tile).all() and (target == E).all()
    index, scores = torch.full((tile, 1, 1), E - 1), torch.empty(tile, 1, 1)
    gated_gemm.gate_gradient_kernel[(1, 1)](partial, index, scores, N, E, 2, 1, 1, tile)
    assert (scores == 2 * tile).all()


@pytest.mark.parametrize(
    "width, largest, tile",
    [
        (112, 128, 128),  # 1.14 times as wide
        (98, 128, 128),  # 1.31 with each tile: none fits, and of those that pad least the widest
        (99, 128, 128),  # 1.29
        (76, 128, 32),  # 96: 1.26
        (132, 128, 32),  # 160: 1.21; 192 and 256 are too wide
        (64, 128, 64),
        (128, 128, 128),
        (40, 128, 64),  # no tile fits, and of those that pad least the widest
        (112, 64, 64),
        (7, 64, 32),
    ],
)
def test_a_tile_is_the_widest_that_multiplies_few_zeros(width: int, largest: int, tile: int) -> None:
    assert gated_gemm.column_tile(width, largest) == tile
