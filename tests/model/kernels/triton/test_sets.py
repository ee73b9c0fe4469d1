"""SwitchHead's tokens grouped by the set of their chosen experts (backend `sets`), interpreted, against the fp64 loops
of the test of the other backends. A test that takes `op` runs for both."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernel_cases.recording import recording
from model.kernels.backend import resolve
from model.kernels.triton import gated_rows, set_gemm, sorted_slots
from model.kernels.triton.gated_gemm import GemmTiles
from tests.model.kernels.test_switchhead import (
    DENSE_TOLERANCE,
    NAMES,
    OUTPUT,
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
    gradient,
    inputs,
    run,
    strided,
)

SETS = ("sets", "fused")
# Tiles are 16 wide: most shapes have a part of one, in both directions, and sets without a token.
SHAPES = [
    Shape(70, 17, 2, 19, 5, 3),
    Shape(90, 32, 3, 16, 4, 2),
    Shape(33, 32, 1, 16, 4, 2, "first"),
    Shape(18, 13, 1, 5, 4, 1, "single"),
    Shape(40, 7, 2, 35, 2, 2),
    Shape(37, 8, 1, 4, 6, 4, "single"),
    Shape(6, 5, 1, 1, 1, 1),
    Shape(0, 12, 2, 5, 4, 2),
]
SMALL = Shape(50, 17, 2, 19, 4, 2)
LIMIT = DENSE_TOLERANCE | {torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = GemmTiles(16, 16, 16, 4, 1)
    monkeypatch.setattr(set_gemm, "project_tiles", lambda *_: tiles)
    monkeypatch.setattr(set_gemm, "gradient_tiles", lambda *_: tiles)
    monkeypatch.setattr(gated_rows, "tile", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16})
    monkeypatch.setattr(sorted_slots, "SORT_TILE", 512)
    monkeypatch.setattr(sorted_slots, "COUNT_BLOCK", 2)


def assert_equals_loop(op: Op, shape: Shape, dtype: torch.dtype) -> None:
    """And no access out of bounds, no element written twice, no atomics."""
    case, upstream, expected = expectation(op, shape, dtype)
    with recording() as launches:
        actual = run(computed(op, SETS), case, upstream)
    given = (case.rows, case.rows, case.choice.scores, case.experts)
    for name, ours, exact, like in zip(NAMES, actual, expected, given, strict=True):
        assert ours.dtype == like.dtype
        assert ours.is_contiguous()
        assert error(ours, exact) <= LIMIT[dtype], f"{name} is off by {error(ours, exact):.1e}"
    assert not any(launch.atomics for launch in launches)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_ops
def test_forward_and_every_gradient_equal_the_loop(op: Op, shape: Shape) -> None:
    assert_equals_loop(op, shape, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@both_ops
def test_other_dtypes(op: Op, dtype: torch.dtype) -> None:
    assert_equals_loop(op, SMALL, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, Shape(600, 72, 2, 128, 4, 2), Shape(260, 264, 4, 112, 4, 2), Shape(300, 64, 2, 256, 5, 3)],
    ids=str,
)
@both_ops
def test_shipped_tiles_equal_the_loop(
    op: Op, shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert_equals_loop(op, shape, dtype)


@both_ops
def test_non_contiguous_inputs_and_expanded_gradient(op: Op) -> None:
    case, upstream = strided(inputs(op, SMALL, torch.float32)), torch.ones(())
    expected = run(op.loop, case.to(double), upstream)
    with recording():
        actual = run(computed(op, SETS), case, upstream)
    for name, ours, exact in zip(NAMES, actual, expected, strict=True):
        assert error(ours, exact) < LIMIT[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_ops
def test_repetition_is_bitwise_equal(op: Op, dtype: torch.dtype) -> None:
    case, upstream, _ = expectation(op, SMALL, dtype)
    first, second = (run(computed(op, SETS), case, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))


@both_ops
def test_launches_do_not_depend_on_the_routing(op: Op) -> None:
    seen = []
    for routing in ("random", "first"):
        with recording(check=False) as launches:
            case = inputs(op, SMALL._replace(routing=routing), torch.float32)
            run(computed(op, SETS), case, torch.ones(()))
        seen.append([(launch.kernel, launch.grid) for launch in launches])
    assert seen[0] == seen[1]
    kernels = [kernel.removesuffix("_kernel") for kernel, _ in seen[0]]
    grouping = ["count_slots", "place_slots", "set_project"]
    expected = [*grouping, "gated_spread", "set_gradient"]
    assert kernels == (expected if op is VALUE else ["gated_spread", *expected])


def test_only_the_chosen_experts_are_multiplied() -> None:
    """Beside the tiles that a set leaves partly empty: 6 sets of 2 of 4 experts, a head."""
    shape = Shape(16 * 40, 32, 2, 16, 4, 2)
    case = inputs(VALUE, shape, torch.float32)
    with recording(check=False) as launches:
        run(computed(VALUE, SETS), case, gradient(VALUE, shape, torch.float32))
    useful = 2 * shape.N * shape.H * shape.k * shape.d * shape.h
    forward, backward = (
        sum(launch.dot_flops for launch in launches if launch.kernel == f"set_{name}_kernel")
        for name in ("project", "gradient")
    )
    padding = 16 / shape.N
    assert useful <= forward <= useful * (1 + 6 * padding)
    assert useful <= backward <= useful * (1 + 2 * 4 * padding)  # an expert has N / 2 tokens


@triton.jit
def list_tiles_kernel(load, found, SETS: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    number, first, stop = set_gemm.find_set(load, tile, SETS, BLOCK_M)
    tl.store(found + 3 * tile + 0, number)
    tl.store(found + 3 * tile + 1, first)
    tl.store(found + 3 * tile + 2, stop)


@pytest.mark.parametrize(
    "load", [[0, 5, 0, 40, 16, 1, 0, 33], [0] * 8, [0, 0, 0, 64, 0, 0, 0, 0], [16] * 8, [1] * 8, [17, 0] * 4]
)
def test_tiles_of_sets_are_counted_in_rounds(load: list[int]) -> None:
    begin = [0, *itertools.accumulate(load)]
    rounds = range(max(load) // 16 + 1)
    expected = [
        (number, begin[number] + 16 * turn, begin[number + 1])
        for turn in rounds
        for number, count in enumerate(load)
        if count > 16 * turn
    ]
    found = torch.full((len(expected) + 5, 3), -1)
    list_tiles_kernel[(len(found),)](torch.tensor(load), found, SETS=8, BLOCK_M=16)
    assert [tuple(row) for row in found[: len(expected)].tolist()] == expected
    assert all(first >= stop for _, first, stop in found[len(expected) :].tolist()), "a tile of no set has no row"


@both_ops
def test_half_of_the_heads_each(op: Op) -> None:
    """Tensor parallelism: ranks hold heads."""
    shape = Shape(40, 19, 4, 6, 4, 2)
    case, upstream, expected = expectation(op, shape, torch.float32)
    halves = []
    for heads in (slice(0, 2), slice(2, 4)):
        (scores, index, order, load), rows, grad = case.choice, case.rows, upstream
        choice = case.choice._replace(scores=scores[:, heads], index=index[:, heads], order=order[heads])
        choice = choice._replace(load=load[heads])
        rows, grad = (rows, grad[:, heads]) if op is VALUE else (rows[:, heads], grad)
        halves.append(run(computed(op, SETS), Case(rows, choice, case.experts[heads]), grad))
    own, summed = (0, 1) if op is VALUE else (1, 0)
    for i, axis in ((own, 1), (2, 1), (3, 0)):
        assert error(torch.cat([half[i] for half in halves], axis), expected[i]) < LIMIT[torch.float32], NAMES[i]
    assert error(halves[0][summed] + halves[1][summed], expected[summed]) < LIMIT[torch.float32]


@both_ops
def test_torch_knows_the_op(op: Op) -> None:
    check_op(op, Shape(9, 8, 2, 8, 4, 2), torch.float32, *SETS)


def test_what_cannot_be_grouped_is_refused() -> None:
    def resolved(dtype: torch.dtype, *widths: int) -> str:
        return resolve("sets", VALUE.name, "cuda", dtype=dtype, widths=widths)

    assert resolved(torch.bfloat16, 2048, 128, 4, 2) == resolved(torch.float32, 12, 4, 6, 3) == "sets"
    for dtype, widths, words in (
        (torch.bfloat16, (1024, 64, 8, 4), "the sets of at most 6 experts, not 8"),
        (torch.bfloat16, (1024, 100, 4, 2), "100 is no multiple of 8"),
        (torch.float32, (10, 4, 4, 2), "10 is no multiple of 4"),
        (torch.float64, (1024, 64, 4, 2), "take float32, bfloat16 and float16"),
    ):
        with pytest.raises(
            ValueError, match=f"^kernels.backend=sets cannot compute switchhead_value on cuda: .*{words}"
        ):
            resolved(dtype, *widths)
    case = inputs(OUTPUT, SMALL, torch.float32)
    with pytest.raises(ValueError, match=r"backend=sets .* of the same dtype, not torch\.float32 by torch\.bfloat16"):
        OUTPUT.call(case.rows, case.choice, case.experts.bfloat16(), backend="sets")
