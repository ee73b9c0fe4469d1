"""SwitchHead as GEMMs over all experts (backend `dense`) and by sets of experts (backend `sets`), the Triton kernels
interpreted, against the fp64 loops of the test of the other backends. A test that takes `op` runs for both ops,
one that takes `way` for both backends. What `sets` has alone is in test_sets.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fake_cuda import fake_cuda
from benchmarks.kernel_cases.recording import recording
from benchmarks.launch_counter import LaunchCounter
from model.kernels.backend import MOST_EXPERTS_IN_SETS
from model.kernels.dense import gemms, plain_rows, switchhead_output, switchhead_value
from model.kernels.ops.route import Choice
from model.kernels.ops.switchhead import Inputs
from model.kernels.triton import gated_rows
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
from tests.model.kernels.triton.small_tiles import use_tiles

Way = tuple[str, str]
FUSED: Way = ("dense", "fused")
SETS: Way = ("sets", "fused")
# Tiles are 16 wide: most shapes have a part of one, in both directions.
SHAPES = [
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
SMALL = SHAPES[0]
MANY_EXPERTS = Shape(19, 9, 1, 6, 64, 8)
LIMIT = DENSE_TOLERANCE | {torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


both_ways = pytest.mark.parametrize("way", [FUSED, SETS], ids=["dense", "sets"])


def assert_equals_loop(op: Op, way: Way, shape: Shape, dtype: torch.dtype) -> None:
    """And no access out of bounds, no element written twice, no atomics."""
    if way == SETS and shape.E > MOST_EXPERTS_IN_SETS:
        pytest.skip("2^E numbers of sets: refused")
    case, upstream, expected = expectation(op, shape, dtype)
    with recording() as launches:
        actual = run(computed(op, way), case, upstream)
    given = (case.rows, case.rows, case.choice.scores, case.experts)
    for name, ours, exact, like in zip(NAMES, actual, expected, given, strict=True):
        assert ours.dtype == like.dtype
        assert ours.is_contiguous()
        assert error(ours, exact) <= LIMIT[dtype], f"{name} is off by {error(ours, exact):.1e}"
    assert not any(launch.atomics for launch in launches)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_ways
@both_ops
def test_forward_and_every_gradient_equal_the_loop(op: Op, way: Way, shape: Shape) -> None:
    assert_equals_loop(op, way, shape, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@both_ways
@both_ops
def test_other_dtypes(op: Op, way: Way, dtype: torch.dtype) -> None:
    assert_equals_loop(op, way, SMALL, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        MANY_EXPERTS,
        Shape(300, 412, 2, 76, 5, 3),
        Shape(260, 264, 4, 112, 4, 2),
        Shape(140, 72, 2, 132, 8, 4),
        Shape(600, 72, 2, 128, 4, 2),
        Shape(300, 64, 2, 256, 5, 3),
    ],
    ids=str,
)
@both_ways
@both_ops
def test_shipped_tiles_equal_the_loop(
    op: Op, way: Way, shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert_equals_loop(op, way, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_ops
def test_chunks_of_tokens(op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 tokens, the last one short. Each fills its own part of every result."""
    monkeypatch.setattr(gemms, "CHUNK_BYTES", 8 * SMALL.H * SMALL.E * SMALL.h * dtype.itemsize)
    assert_equals_loop(op, FUSED, SMALL, dtype)


@both_ways
@both_ops
def test_non_contiguous_inputs_and_expanded_gradient(op: Op, way: Way) -> None:
    case, upstream = strided(inputs(op, SMALL, torch.float32)), torch.ones(())
    expected = run(op.loop, case.to(double), upstream)
    with recording():
        actual = run(computed(op, way), case, upstream)
    for name, ours, exact in zip(NAMES, actual, expected, strict=True):
        assert error(ours, exact) < LIMIT[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_ways
@both_ops
def test_repetition_is_bitwise_equal(op: Op, way: Way, dtype: torch.dtype) -> None:
    case, upstream = inputs(op, SMALL, dtype), gradient(op, SMALL, dtype)
    first, second = (run(computed(op, way), case, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))


@both_ops
def test_launches_do_not_depend_on_the_routing(op: Op) -> None:
    """One between the GEMMs of the forward pass; in the backward pass the output's rows are spread again."""
    seen = []
    for routing in ("random", "first"):
        with recording(check=False) as launches:
            case = inputs(op, SMALL._replace(routing=routing), torch.float32)
            run(computed(op, FUSED), case, torch.ones(()))
        seen.append([(launch.kernel, launch.grid) for launch in launches])
    assert seen[0] == seen[1]
    kernels = [kernel.removesuffix("_kernel") for kernel, _ in seen[0]]
    expected = ["gated_sum", "gated_spread"] if op is VALUE else ["gated_spread", "gated_sum", "gated_spread"]
    assert kernels == expected


def copies(shape: Shape, op: Op, compute: Callable[[Inputs, Tensor, Tensor], Any]) -> Counter[str]:
    """What `compute` copies of the inputs of a call and of its result, given the products that value keeps. The choices
    are those of some heads that were routed together with others, as value's and output's are."""
    N, _, H, h, E, k, _ = shape
    with fake_cuda(), torch.device("cuda"), LaunchCounter() as counter:
        scores, index = (torch.empty(N, 2 * H, k, dtype=kind)[:, H:] for kind in (torch.float32, torch.int64))
        sizes = op.rows(shape), op.experts(shape), op.result(shape), (N * H * k, h)
        rows, experts, result, kept = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        order, load = (torch.empty(H, size, dtype=torch.int64) for size in (N * k, E))
        compute(Inputs(rows, Choice(scores, index, order, load), experts, "fused"), result, kept)
    names = {name: number for (_, name), number in counter.counts.by_operator.items()}
    assert sum(number for name, number in names.items() if name.startswith("gated_")) > 0
    return Counter({name: names[name] for name in ("clone", "_to_copy") if name in names})


def test_the_choices_of_heads_that_were_routed_together_are_not_copied() -> None:
    """But value's experts, which its products take side by side, and their gradient back."""
    value, output = switchhead_value, switchhead_output
    assert not copies(SMALL, OUTPUT, lambda inputs, result, kept: output.forward(inputs))
    assert not copies(SMALL, OUTPUT, lambda inputs, result, kept: output.backward(result, inputs, ()))
    assert copies(SMALL, VALUE, lambda inputs, result, kept: value.forward(inputs)) == {"clone": 1}
    both = copies(SMALL, VALUE, lambda inputs, result, kept: value.backward(result, inputs, (kept,)))
    assert both == {"clone": 1, "_to_copy": 1}
    # Under tensor parallelism in two parts, each of which copies what it needs itself.
    of_inputs = copies(SMALL, VALUE, lambda inputs, result, kept: value.input_gradients(result, inputs, (kept,)))
    of_experts = copies(SMALL, VALUE, lambda inputs, result, kept: value.expert_gradient(result, inputs, (kept,), None))
    assert of_inputs == {"clone": 1} and of_experts == {"_to_copy": 1}


@both_ways
@both_ops
def test_half_of_the_heads_each(op: Op, way: Way) -> None:
    """Tensor parallelism: ranks hold heads. What a head has is its rank's; y and the gradients of x are summed."""
    shape = Shape(9, 19, 4, 6, 4, 2)
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
    for i, axis in ((own, 1), (2, 1), (3, 0)):
        torch.testing.assert_close(torch.cat([half[i] for half in halves], axis), whole[i], msg=NAMES[i])
    torch.testing.assert_close(halves[0][summed] + halves[1][summed], whole[summed], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@both_ways
@both_ops
def test_opcheck(op: Op, way: Way) -> None:
    check_op(op, Shape(5, 6, 1, 5, 3, 2), torch.float32, *way)


def pairs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Products [P, E, h], scores and index [C, H, k], rows [P, h]."""
    C, H, E, h, k = 7, 3, 5, 19, 3
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(C, H, E, generator=generator).topk(k).indices
    products, rows = (torch.randn(C * H, *size, generator=generator).to(dtype) for size in ((E, h), (h,)))
    return products, torch.rand(C, H, k, generator=generator), index, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_forms_of_the_rows_agree(dtype: torch.dtype) -> None:
    """Triton's and torch's, which differ by the order of the sums over h and k alone."""
    products, scores, index, rows = pairs(dtype)
    (P, E, h), k = products.shape, index.shape[2]
    found = []
    for form in (gated_rows, plain_rows):
        mixed, chosen, gated = rows.new_empty(P, h), rows.new_empty(P, k, h), rows.new_empty(P, E, h)
        of_sum, of_spread = torch.empty_like(scores), torch.empty_like(scores)
        with recording():
            form.gated_sum(products, scores, index, mixed, chosen=chosen, dot=(rows, of_sum))
            form.gated_spread(rows, scores, index, gated, dot=(chosen, of_spread))
        found.append((mixed, chosen, gated, of_sum, of_spread))
    for name, fused, plain in zip(("mixed", "chosen", "gated", "of_sum", "of_spread"), *found, strict=True):
        if name in ("chosen", "gated"):
            assert torch.equal(fused, plain), name
        torch.testing.assert_close(fused, plain, msg=name)
    assert ((found[0][2] == 0).all(2).sum(1) == E - k).all(), "an expert that was not chosen has no zeros"


@both_ops
def test_traffic(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the parts between the GEMMs, per token: docs/kernels.md has the sum."""
    monkeypatch.undo()
    shape = N, _, H, h, E, k, _ = Shape(64, 16, 2, 64, 4, 2)
    case, upstream = inputs(op, Shape(*shape), torch.bfloat16), gradient(op, Shape(*shape), torch.bfloat16)
    with recording(check=False) as launches:
        run(computed(op, FUSED), case, upstream)
    wide, chosen, narrow = 2 * N * H * E * h, 2 * N * H * k * h, 2 * N * H * h
    stored = [{n: t.store_bytes for n, t in launch.tensors.items() if t.store_bytes} for launch in launches]
    loaded = [{n: t.load_bytes for n, t in launch.tensors.items() if t.load_bytes} for launch in launches]
    of_scores, of_index = 4 * N * H * k, 8 * N * H * k
    choices = {"scores": of_scores, "index": of_index}
    if op is VALUE:
        assert stored == [{"mixed": narrow, "chosen": chosen}, {"gated": wide, "grad_scores": of_scores}]
        assert loaded == [choices | {"products": chosen}, choices | {"rows": narrow, "chosen": chosen}]
    else:
        assert stored == [{"gated": wide}, {"mixed": narrow, "grad_scores": of_scores}, {"gated": wide}]
        assert loaded == [
            choices | {"rows": narrow},
            choices | {"products": chosen, "rows": narrow},
            choices | {"rows": narrow},
        ]
