"""The Triton kernels of expert_linear, interpreted, against the fp64 loop of the test of the other backends."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.recording import recording
from tests.model.kernels.test_expert_linear import (
    OPS,
    SHAPES,
    TOLERANCE,
    Case,
    Shape,
    assert_equal,
    check_op,
    make_case,
    run,
    stored_strided,
)
from tests.model.kernels.triton.small_tiles import use_tiles

TOLERANCE = TOLERANCE | {torch.float16: 2**-11}
"""bf16: sums over k are of slot rows, and weight gradients of gated rows, each rounded once like the results: 2^-9."""
FAST = set(SHAPES) - {"64 experts, k is 8", "plain", "more experts than slots"}
SMALL = Shape(N=12, d=20, h=9, E=4, k=2)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


def check(op: str, shape: Shape, dtype: torch.dtype) -> None:
    case = make_case(op, shape, dtype)
    with recording() as launches:
        results = run(case, "triton")
    assert_equal(case, results, TOLERANCE[dtype])
    assert not any(launch.atomics for launch in launches)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", sorted(FAST))
def test_equals_loop(name: str, op: str) -> None:
    check(op, SHAPES[name], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes(op: str, dtype: torch.dtype) -> None:
    check(op, SMALL, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_loop_in_every_dtype(name: str, op: str, dtype: torch.dtype) -> None:
    check(op, SHAPES[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape", [Shape(N=300, d=416, h=88, E=10, k=4), Shape(N=150, d=260, h=146, E=16, k=8)], ids=str
)
def test_shipped_tiles_equal_the_loop(
    shape: Shape, op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    check(op, shape, dtype)


def test_gates_may_be_fp32_beside_bf16() -> None:
    case = make_case("expert_linear_sum", SMALL, torch.bfloat16, gates_dtype=torch.float32)
    results = run(case, "triton")
    assert results[2].dtype == torch.float32
    assert_equal(case, results, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("op", OPS)
def test_strides(op: str) -> None:
    strided = stored_strided(make_case(op, SMALL, torch.float32))
    with recording():
        assert_equal(strided, run(strided, "triton"), 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_on_grids_of_the_shape(op: str) -> None:
    """Twice the same bits; and the same kernels on the same grids when all tokens choose the same experts."""
    case, grids = make_case(op, SMALL, torch.bfloat16), []
    results = []
    for _ in range(2):
        with recording(check=False) as launches:
            results.append(run(case, "triton"))
        grids.append([(launch.kernel, launch.grid) for launch in launches])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with recording(check=False) as launches:
        run(make_case(op, SMALL._replace(experts="one"), torch.bfloat16), "triton")
    grids.append([(launch.kernel, launch.grid) for launch in launches])
    assert grids[0] == grids[1] == grids[2]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    check_op(op, Shape(N=7, d=6, h=5, E=3, k=2), torch.float32, "triton")


@pytest.mark.parametrize("op", OPS)
def test_some_choices_of_a_token(op: str) -> None:
    """Tensor parallelism: a rank takes some of a token's slots, with all experts. Query slots are concatenated, output
    tokens and the experts' gradients summed."""
    case = make_case(op, Shape(N=9, d=12, h=7, E=5, k=4), torch.float32)
    *rows, experts = case.leaves
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        index = case.index[:, part]
        order, load = index.flatten().sort(stable=True).indices, index.flatten().bincount(minlength=5)
        leaves = tuple(t[:, part].detach().requires_grad_() if op != "expert_linear" else t for t in rows)
        grad = case.grad[:, part] if op == "expert_linear" else case.grad
        halves.append(run(Case(op, (*leaves, experts), index, order, load, grad), "triton"))
    if op == "expert_linear":
        (y, x, w), (y2, x2, w2) = halves
        combined = [torch.cat([y, y2], 1), x + x2, w + w2]
    else:
        (y, a, g, w), (y2, a2, g2, w2) = halves
        combined = [y + y2, torch.cat([a, a2], 1), torch.cat([g, g2], 1), w + w2]
    assert_equal(case, combined, TOLERANCE[torch.float32])
