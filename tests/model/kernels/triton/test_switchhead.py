"""The Triton kernels of switchhead_value and switchhead_output, interpreted, against the fp64 loops of the test of the
other backends: gate-scaled GEMMs and sorted slots (backend `triton`), GEMMs over all experts (`dense`) and by sets of
experts (`sets`). A test that takes `op` runs for both ops, one that takes `way` for all four. What each has alone is in
test_gated_and_sorted.py, test_dense.py and test_sets.py."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from benchmarks.kernel_cases.recording import recording
from model.kernels.backend import MOST_EXPERTS_IN_SETS
from tests.model.kernels.checks import assert_repeats, error
from tests.model.kernels.test_switchhead import (
    DENSE_TOLERANCE,
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
    expectation,
    inputs,
    run,
    strided,
)
from tests.model.kernels.triton.small_tiles import use_tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = 2**-8
"""bf16: gated rows or slots' products, and results, are rounded once each, 2^-9 (0.0029 at most measured)."""
SORTED_LIMIT = TOLERANCE | {torch.bfloat16: HALF, torch.float16: HALF / 8}
DENSE_LIMIT = DENSE_TOLERANCE | {torch.float16: 2**-10}
# Tiles are 16 wide: most shapes have a part of one, in both directions.
SORTED_SHAPES = [
    Shape(18, 17, 2, 17, 3, 2),
    Shape(17, 32, 1, 16, 4, 2, "first"),
    Shape(18, 13, 1, 5, 4, 1, "single"),
    Shape(6, 5, 1, 1, 1, 1),
    Shape(0, 12, 2, 5, 4, 2),
]
MORE_SORTED_SHAPES = [
    Shape(18, 17, 2, 17, 5, 3),
    Shape(9, 18, 3, 3, 2, 1),
    Shape(17, 7, 1, 18, 2, 2),
    Shape(17, 8, 1, 4, 10, 8, "single"),
    Shape(1, 20, 2, 5, 6, 4),
    Shape(19, 9, 1, 6, 64, 8),
]
DENSE_SHAPES = [
    Shape(18, 17, 2, 17, 4, 3),
    Shape(35, 17, 1, 19, 5, 3),
    Shape(49, 32, 3, 16, 3, 2),
    Shape(33, 32, 1, 16, 4, 2, "first"),
    Shape(40, 7, 2, 35, 2, 2),
    Shape(17, 32, 1, 16, 4, 2, "first"),
    Shape(18, 13, 1, 5, 4, 1, "single"),
    Shape(37, 8, 1, 4, 6, 4, "single"),
    Shape(17, 7, 1, 35, 2, 2),
    Shape(17, 8, 1, 4, 10, 8, "single"),
    Shape(6, 5, 1, 1, 1, 1),
    Shape(1, 12, 2, 5, 4, 2),
    Shape(0, 12, 2, 5, 4, 2),
]
SHIPPED_SORTED_SHAPES = [
    Shape(300, 412, 2, 76, 5, 3),
    Shape(260, 264, 4, 112, 4, 2, "first"),
    Shape(140, 136, 2, 132, 8, 4, "single"),
    Shape(200, 72, 2, 64, 16, 3),
    Shape(130, 40, 1, 24, 64, 8),
]
SHIPPED_DENSE_SHAPES = [
    *DENSE_SHAPES,
    Shape(19, 9, 1, 6, 64, 8),
    Shape(300, 412, 2, 76, 5, 3),
    Shape(260, 264, 4, 112, 4, 2),
    Shape(140, 72, 2, 132, 8, 4),
    Shape(600, 72, 2, 128, 4, 2),
    Shape(300, 64, 2, 256, 5, 3),
]


class Way(NamedTuple):
    backend: str
    strategy: str

    @property
    def limit(self) -> dict[torch.dtype, float]:
        return SORTED_LIMIT if self.backend == "triton" else DENSE_LIMIT

    @property
    def small(self) -> Shape:
        return Shape(18, 9, 2, 5, 3, 2) if self.backend == "triton" else DENSE_SHAPES[0]


GATED, SORTED, FUSED, SETS = (
    Way("triton", "gated"),
    Way("triton", "sorted"),
    Way("dense", "fused"),
    Way("sets", "fused"),
)
WAYS = {"gated": GATED, "sorted": SORTED, "dense": FUSED, "sets": SETS}
all_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def on_shapes(of_sorted: list[Shape], of_dense: list[Shape]) -> pytest.MarkDecorator:
    """Each way on its own shapes."""
    return pytest.mark.parametrize(
        "way, shape",
        [
            pytest.param(way, shape, id=f"{name}-{shape}")
            for name, way in WAYS.items()
            for shape in (of_sorted if way.backend == "triton" else of_dense)
            if way != SETS or shape.E <= MOST_EXPERTS_IN_SETS  # 2^E numbers of sets: refused
        ],
    )


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


def assert_equals_loop(op: Op, way: Way, shape: Shape, dtype: torch.dtype) -> None:
    """And no access out of bounds, no element written twice, no atomics."""
    case, upstream, expected = expectation(op, shape, dtype)
    with recording() as launches:
        actual = run(computed(op, way), case, upstream)
    given = (case.rows, case.rows, case.choice.scores, case.experts)
    for name, ours, exact, like in zip(NAMES, actual, expected, given, strict=True):
        assert ours.dtype == like.dtype
        assert ours.is_contiguous()
        assert error(ours, exact) <= way.limit[dtype], f"{name} is off by {error(ours, exact):.1e}"
    assert not any(launch.atomics for launch in launches)


@on_shapes(SORTED_SHAPES, DENSE_SHAPES)
@both_ops
def test_forward_and_every_gradient_equal_the_loop(op: Op, way: Way, shape: Shape) -> None:
    assert_equals_loop(op, way, shape, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@all_ways
@both_ops
def test_other_dtypes(op: Op, way: Way, dtype: torch.dtype) -> None:
    assert_equals_loop(op, way, way.small, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_shapes([*SORTED_SHAPES, *MORE_SORTED_SHAPES], [])
@both_ops
def test_all_shapes_in_every_dtype(op: Op, way: Way, shape: Shape, dtype: torch.dtype) -> None:
    assert_equals_loop(op, way, shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_shapes(SHIPPED_SORTED_SHAPES, SHIPPED_DENSE_SHAPES)
@both_ops
def test_shipped_tiles_equal_the_loop(
    op: Op, way: Way, shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert_equals_loop(op, way, shape, dtype)


@all_ways
@both_ops
def test_non_contiguous_inputs_and_expanded_gradient(op: Op, way: Way) -> None:
    case, upstream = strided(inputs(op, way.small, torch.float32)), torch.ones(())
    expected = run(op.loop, case.to(double), upstream)
    with recording():
        actual = run(computed(op, way), case, upstream)
    for name, ours, exact in zip(NAMES, actual, expected, strict=True):
        assert error(ours, exact) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@all_ways
@both_ops
def test_repetition_is_bitwise_equal(op: Op, way: Way, dtype: torch.dtype) -> None:
    case, upstream, _ = expectation(op, way.small, dtype)
    assert_repeats(lambda: run(computed(op, way), case, upstream))


OF_SETS = ["count_slots", "place_slots", "set_project", "gated_spread", "set_gradient"]
LAUNCHES = {
    ("dense", "switchhead_value"): ["gated_sum", "gated_spread"],  # between the GEMMs
    ("dense", "switchhead_output"): ["gated_spread", "gated_sum", "gated_spread"],  # the rows are spread again
    ("sets", "switchhead_value"): OF_SETS,
    ("sets", "switchhead_output"): ["gated_spread", *OF_SETS],
}
NUM_LAUNCHES = {("switchhead_output", "sorted"): 5}
"""The sort is the router's; all others are six, gate-scaled GEMMs with the gates and their gradient."""


@all_ways
@both_ops
def test_launches_do_not_depend_on_the_routing(op: Op, way: Way) -> None:
    """The same kernels on the same grids whatever was chosen: nothing was copied to the host to decide."""
    seen = []
    for routing in ("random", "first"):
        with recording(check=False) as launches:
            case = inputs(op, way.small._replace(routing=routing), torch.float32)
            run(computed(op, way), case, torch.ones(()))
        seen.append([(launch.kernel, launch.grid) for launch in launches])
    assert seen[0] == seen[1]
    if way.backend == "triton":
        assert len(seen[0]) == NUM_LAUNCHES.get((op.name, way.strategy), 6)
    else:
        assert [kernel.removesuffix("_kernel") for kernel, _ in seen[0]] == LAUNCHES[way.backend, op.name]


@all_ways
@both_ops
def test_half_of_the_heads_each(op: Op, way: Way) -> None:
    """Tensor parallelism: ranks hold heads. What a head has, its value or the gradient of its row, scores and experts,
    is its rank's, bit for bit unless torch multiplies; y and the gradients of x are summed over ranks."""
    shape = Shape(9, 5, 4, 6, 3, 2) if way.backend == "triton" else Shape(9, 19, 4, 6, 4, 2)
    case, upstream, _ = expectation(op, shape, torch.float32)
    function = computed(op, way)
    whole, halves = run(function, case, upstream), []
    for heads in (slice(0, 2), slice(2, 4)):
        (scores, index, order, load), rows, grad = case.choice, case.rows, upstream
        choice = case.choice._replace(scores=scores[:, heads], index=index[:, heads], order=order[heads])
        choice = choice._replace(load=load[heads])
        rows, grad = (rows, grad[:, heads]) if op is VALUE else (rows[:, heads], grad)
        halves.append(run(function, Case(rows, choice, case.experts[heads]), grad))
    own, summed = (0, 1) if op is VALUE else (1, 0)
    bound = None if way == FUSED else 0.0
    for i, axis in ((own, 1), (2, 1), (3, 0)):
        joined = torch.cat([half[i] for half in halves], axis)
        torch.testing.assert_close(joined, whole[i], msg=NAMES[i], rtol=bound, atol=bound)
    torch.testing.assert_close(halves[0][summed] + halves[1][summed], whole[summed], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@all_ways
@both_ops
def test_opcheck(op: Op, way: Way) -> None:
    check_op(op, Shape(5, 6, 1, 5, 3, 2), torch.float32, *way)
