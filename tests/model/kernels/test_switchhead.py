"""switchhead_value and switchhead_output against loops in fp64 written from the equations: every backend, strategy,
dtype and gradient. A test that takes `op` runs for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernel_cases.recording import recording
from model.kernels.cpu import grouping
from model.kernels.dense import gemms
from model.kernels.ops.route import Choice, group_choices
from model.kernels.ops.switchhead import choose_strategy, switchhead_output, switchhead_value
from tests.model.kernels.checks import assert_compiles, assert_repeats, error
from tests.model.kernels.triton.small_tiles import use_tiles


class Shape(NamedTuple):
    N: int
    d: int
    H: int
    h: int
    E: int
    k: int
    routing: str = "random"
    """random; first: all tokens on experts 0..k-1; single: likewise, but one token on the last expert."""


SHAPES = [
    Shape(37, 11, 2, 7, 5, 3),
    Shape(64, 16, 4, 8, 4, 2),
    Shape(29, 13, 3, 5, 4, 2, "first"),
    Shape(29, 13, 1, 5, 4, 1, "single"),
    Shape(21, 9, 5, 3, 2, 1),
    Shape(18, 10, 2, 6, 2, 2),
    Shape(40, 17, 1, 9, 64, 8),
    Shape(33, 8, 2, 4, 10, 8, "single"),
    Shape(1, 12, 2, 5, 4, 2),
    Shape(6, 5, 1, 1, 1, 1),
    Shape(0, 12, 2, 5, 4, 2),
    Shape(170, 6, 1, 4, 3, 2),
]
LONG = SHAPES[-1]
"""Its groups are of more than 48 rows, those of tokens with the same set of experts too."""
WAYS: list[tuple[str, str | None]] = [
    ("reference", None), ("cpu", None), ("cpu", "all"), ("cpu", "sets"), ("cpu", "experts"), ("dense", "plain")
]  # fmt: skip
"""Backend and strategy; None: what the shape chooses."""
STRATEGIES = [way for way in WAYS if way[1]]
# Largest error in the norm, relative. fp32: sums of at most 170 terms. bf16: fp32 inside, one rounding (2^-9) of
# results and of the saved products.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8}
DENSE_TOLERANCE = TOLERANCE | {torch.bfloat16: 2**-7}
"""Products and gated rows are rounded to bf16 before they are summed or multiplied, and so is a result: 2^-8 each."""


class Case(NamedTuple):
    """Inputs of an op: `rows` are x [N, d] or a [N, H, h]."""

    rows: Tensor
    choice: Choice
    experts: Tensor

    def to(self, to: Callable[[Tensor], Tensor]) -> Case:
        """With every tensor changed by `to`."""
        return Case(to(self.rows), Choice(*map(to, self.choice)), to(self.experts))


class Op(NamedTuple):
    """What differs between the two ops."""

    name: str
    call: Callable[..., Tensor]
    loop: Callable[[Case], Tensor]
    rows: Callable[[Shape], tuple[int, ...]]
    experts: Callable[[Shape], tuple[int, ...]]
    result: Callable[[Shape], tuple[int, ...]]


def value_loop(case: Case) -> Tensor:
    x, (scores, index, *_), experts = case
    rows = []
    for n in range(index.shape[0]):
        for head in range(index.shape[1]):
            chosen = zip(scores[n, head], index[n, head].tolist(), strict=True)
            rows.append(sum(s * (x[n] @ experts[head, e]) for s, e in chosen))
    return or_empty(rows, case, (*index.shape[:2], experts.shape[-1]))


def output_loop(case: Case) -> Tensor:
    a, (scores, index, *_), experts = case
    rows = []
    for n in range(index.shape[0]):
        terms = [
            s * (a[n, head] @ experts[head, e])
            for head in range(index.shape[1])
            for s, e in zip(scores[n, head], index[n, head].tolist(), strict=True)
        ]
        rows.append(torch.stack(terms).sum(0))
    return or_empty(rows, case, (index.shape[0], experts.shape[-1]))


def or_empty(rows: list, case: Case, shape: tuple[int, ...]) -> Tensor:
    total = case.rows.sum() + case.choice.scores.sum() + case.experts.sum()
    return torch.stack(rows).view(shape) if rows else total * case.rows.new_zeros(shape)


VALUE = Op(
    "switchhead_value", switchhead_value, value_loop,
    lambda s: (s.N, s.d), lambda s: (s.H, s.E, s.d, s.h), lambda s: (s.N, s.H, s.h),
)  # fmt: skip
OUTPUT = Op(
    "switchhead_output", switchhead_output, output_loop,
    lambda s: (s.N, s.H, s.h), lambda s: (s.H, s.E, s.h, s.d), lambda s: (s.N, s.d),
)  # fmt: skip
NAMES = ("result", "rows", "scores", "experts")
both_ops = pytest.mark.parametrize("op", [VALUE, OUTPUT], ids=["value", "output"])
all_ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(filter(None, way)))


def inputs(op: Op, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Case:
    """The k chosen scores stand in random order, as after expert dropout."""
    N, _, H, _, E, k, routing = shape
    generator = torch.Generator().manual_seed(seed)
    preference = torch.rand(N, H, E, generator=generator)
    if routing != "random":
        preference[..., :k] += 1.0
    if routing == "single":
        preference[N // 2, :, -1] += 2.0
    index = preference.topk(k, -1).indices
    scores = torch.rand(N, H, k, generator=generator, dtype=torch.float64)
    sizes = op.rows(shape), op.experts(shape)
    rows, experts = (torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    return Case(rows, Choice(scores, index, *group_choices(index, E, backend="reference")), experts)


def gradient(op: Op, shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(op.result(shape), generator=torch.Generator().manual_seed(1)).to(dtype)


def double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def run(function: Callable[[Case], Tensor], case: Case, upstream: Tensor) -> list[Tensor]:
    """NAMES: the result and the gradients."""
    leaves = [t.detach().requires_grad_() for t in (case.rows, case.choice.scores, case.experts)]
    y = function(Case(leaves[0], case.choice._replace(scores=leaves[1]), leaves[2]))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype).expand_as(y))]


def computed(op: Op, way: tuple[str, str | None]) -> Callable[[Case], Tensor]:
    return lambda case: op.call(*case, backend=way[0], strategy=way[1])


@functools.cache
def expectation(op: Op, shape: Shape, dtype: torch.dtype) -> tuple[Case, Tensor, list[Tensor]]:
    """Inputs, upstream gradient, and what the loop makes of them; once for all backends."""
    case, upstream = inputs(op, shape, dtype), gradient(op, shape, dtype)
    return case, upstream, run(op.loop, case.to(double), upstream)


def strided(case: Case) -> Case:
    """The same values, no tensor contiguous."""
    (rows, (scores, index, order, load), experts) = case
    found = Case(
        torch.stack([rows, -rows], -1)[..., 0],
        Choice(
            scores.transpose(0, 2).contiguous().transpose(0, 2),
            torch.cat([index, index], 1)[:, : index.shape[1]],
            torch.stack([order, order], -1)[..., 0],
            torch.stack([load, load], -1)[..., 0],
        ),
        experts.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    )
    assert not any(t.is_contiguous() for t in (found.rows, *found.choice, found.experts))
    return found


CASES = [
    pytest.param(
        way,
        shape,
        dtype,
        id=f"{' '.join(filter(None, way))}-{shape}-{dtype}",
        marks=[] if dtype == torch.float32 or some else pytest.mark.slow,
    )
    for way in WAYS
    for shape in SHAPES
    if way[1] != "sets" or shape.E <= 10  # C(64, 8) sets: never chosen, too many to enumerate
    for dtype in TOLERANCE
    for some in [shape in (SHAPES[0], SHAPES[3], SHAPES[7], LONG)]
]
"""Every shape in fp32; fp64 and bf16 at odd sizes, with a rare expert, many sets and long groups, the others slow."""


@pytest.mark.parametrize("way, shape, dtype", CASES)
@both_ops
def test_forward_and_every_gradient_equal_the_loop(
    op: Op, shape: Shape, way: tuple[str, str | None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shape == LONG:
        monkeypatch.setattr(grouping, "MAX_GROUP_ROWS", 48)
    case, upstream, expected = expectation(op, shape, dtype)
    actual = run(computed(op, way), case, upstream)
    given = (case.rows, case.rows, case.choice.scores, case.experts)
    for name, ours, exact, like in zip(NAMES, actual, expected, given, strict=True):
        assert ours.dtype == like.dtype
        tolerance = (DENSE_TOLERANCE if way[0] == "dense" else TOLERANCE)[dtype]
        assert error(ours, exact) <= tolerance, f"{name} is off by {error(ours, exact):.1e}"


@all_ways
@both_ops
def test_non_contiguous_inputs_and_expanded_gradient(op: Op, way: tuple[str, str | None]) -> None:
    case, upstream = inputs(op, SHAPES[1], torch.float64), torch.ones((), dtype=torch.float64)
    expected = run(op.loop, case, upstream)
    for name, ours, exact in zip(NAMES, run(computed(op, way), strided(case), upstream), expected, strict=True):
        assert error(ours, exact) < 1e-13, name


@both_ops
@pytest.mark.parametrize("strategy", ["all", "sets", "experts"])
@pytest.mark.parametrize("threads", [2, 3])
def test_heads_that_threads_share_give_what_one_thread_gives(op: Op, strategy: str, threads: int) -> None:
    """Two threads take one head and two of three: each sums its own heads, and the parts are added."""
    case, upstream, expected = expectation(op, Shape(150, 6, 3, 4, 3, 2), torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):  # the second time the scratch holds what the first left
            for name, ours, exact in zip(
                NAMES, run(computed(op, ("cpu", strategy)), case, upstream), expected, strict=True
            ):
                assert error(ours, exact) < 1e-13, name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_ways
@both_ops
def test_repetition_is_bitwise_equal(op: Op, way: tuple[str, str | None], dtype: torch.dtype) -> None:
    shape = Shape(700, 40, 3, 24, 4, 2)
    case, upstream = inputs(op, shape, dtype), gradient(op, shape, dtype)
    assert_repeats(lambda: run(computed(op, way), case, upstream), times=3)


@all_ways
@both_ops
def test_gradcheck(op: Op, way: tuple[str, str | None]) -> None:
    rows, choice, experts = inputs(op, Shape(5, 4, 2, 3, 4, 2), torch.float64)
    leaves = [t.requires_grad_() for t in (rows, choice.scores, experts)]
    function = computed(op, way)
    assert torch.autograd.gradcheck(lambda a, b, c: function(Case(a, choice._replace(scores=b), c)), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "op, way",
    [
        # What a strategy keeps is one function of both ops: in the fast tests one of them goes with it.
        pytest.param(op, way, id=f"{op.name} {way[0]} {way[1]}", marks=[] if op is fast else pytest.mark.slow)
        for way, fast in zip(STRATEGIES, (VALUE, OUTPUT, OUTPUT, VALUE), strict=True)
        for op in (VALUE, OUTPUT)
    ],
)
def test_opcheck(op: Op, way: tuple[str, str], dtype: torch.dtype) -> None:
    check_op(op, Shape(9, 6, 2, 5, 4, 2), dtype, *way)


def check_op(op: Op, shape: Shape, dtype: torch.dtype, *way: str) -> None:
    """torch's own check of schema, fake tensors and autograd registration, of the op and of its backward pass."""
    forward, backward = (getattr(torch.ops.switchall, name).default for name in (op.name, f"{op.name}_backward"))
    rows, choice, experts = inputs(op, shape, dtype)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (rows, *choice, experts)]
    torch.library.opcheck(forward, (*leaves, *way))
    plain = [t.detach() for t in leaves]
    saved = forward(*plain, *way)[1:]
    torch.library.opcheck(backward, (gradient(op, shape, dtype), *plain, *saved, *way))


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "cpu", "dense"])
@both_ops
def test_compiles_without_graph_breaks(op: Op, backend: str) -> None:
    rows, choice, experts = inputs(op, SHAPES[0], torch.float32)

    def function(rows: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        return op.call(rows.sin(), choice._replace(scores=scores), experts, backend=backend).cos().sum()

    assert_compiles(function, [t.requires_grad_() for t in (rows, choice.scores, experts)])


@all_ways
@both_ops
def test_meta_tensors(op: Op, way: tuple[str, str | None]) -> None:
    case = inputs(op, SHAPES[0], torch.bfloat16).to(lambda t: t.to("meta"))
    results = run(computed(op, way), case, torch.ones((), device="meta"))
    assert [(t.shape, t.dtype, t.device.type) for t in results[1:]] == [
        (t.shape, t.dtype, "meta") for t in (case.rows, case.choice.scores, case.experts)
    ]
    assert results[0].shape == op.result(SHAPES[0])


@all_ways
@both_ops
def test_useful_flops_are_counted(op: Op, way: tuple[str, str | None]) -> None:
    """k experts of a token, forward and twice that backward; the reference computes all E."""
    N, d, H, h, E, k, _ = SHAPES[0]
    flops = 2 * N * H * (E if way[0] == "reference" else k) * d * h
    case, gates = inputs(op, SHAPES[0], torch.float32), 0
    if way[0] == "reference":  # its products with the gates are GEMMs too
        gates = 2 * N * H * E * h if op is VALUE else 0
    with FlopCounterMode(display=False) as forward:
        computed(op, way)(case)
    with FlopCounterMode(display=False) as both:
        run(computed(op, way), case, torch.ones(()))
    assert flops <= forward.get_total_flops() <= flops + gates
    assert 3 * flops <= both.get_total_flops() <= 3 * (flops + 2 * N * H * E * h * (way[0] == "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_ops
def test_chunks_of_tokens_are_the_whole(op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As chunks of 20 tokens, the last one short; the experts' gradient is summed in fp32 and rounded once."""
    shape = Shape(70, 11, 2, 7, 5, 3)
    case, upstream, expected = expectation(op, shape, dtype)
    monkeypatch.setattr(gemms, "CHUNK_BYTES", 20 * shape.H * shape.E * shape.h * dtype.itemsize + 1)
    assert [len(chunk) for chunk in gemms.chunks(70, shape.H * shape.E * shape.h, dtype.itemsize)] == [20, 20, 20, 10]
    for name, ours, exact in zip(NAMES, run(computed(op, ("dense", "plain")), case, upstream), expected, strict=True):
        assert error(ours, exact) <= DENSE_TOLERANCE[dtype], name


def test_chunks_fill_the_tiles_of_a_gemm() -> None:
    sizes = [len(chunk) for chunk in gemms.chunks(100_000, 4096, 2)]
    assert sizes == [32768, 32768, 32768, 1696]
    assert [len(chunk) for chunk in gemms.chunks(9000, 16384 + 4, 2)] == [7936, 1064]  # 8190 fit
    assert gemms.chunks(0, 64, 2) == []


@both_ops
def test_unknown_backend_or_strategy_is_refused(op: Op) -> None:
    case = inputs(op, SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match=f"{op.name} has no backend 'cuda': there is reference, cpu, triton"):
        op.call(*case, backend="cuda")
    with pytest.raises(ValueError, match=f"{op.name} has no strategy 'sets' for triton: there is gated, sorted"):
        op.call(*case, backend="triton", strategy="sets")
    with pytest.raises(ValueError, match=r"backend=dense.* of the same dtype, not torch\.float32 by torch\.bfloat16"):
        op.call(case.rows, case.choice, case.experts.bfloat16(), backend="dense")


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("N, R, E, k", [(70, 2, 5, 3), (9, 1, 64, 8), (9, 3, 2, 1), (1, 1, 1, 1), (0, 2, 3, 1)])
def test_choices_that_no_router_grouped_are_sorted_stably(
    N: int, R: int, E: int, k: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's in small blocks, within bounds and without races."""
    use_tiles(monkeypatch, 16)
    index = torch.rand(N, R, E, generator=torch.Generator().manual_seed(0)).topk(k).indices
    with recording():
        order, load = group_choices(index, E, backend=backend)
    slots = index.transpose(0, 1).reshape(R, N * k)
    assert order.dtype == load.dtype == torch.int64
    assert torch.equal(order, slots.sort(dim=-1, stable=True).indices)
    assert torch.equal(load, torch.stack([row.bincount(minlength=E) for row in slots]))


# What is measured fastest at d = 1024, h = 112 (docs/kernels.md), and the arithmetic for a GPU.
@pytest.mark.parametrize(
    "backend, N, E, k, strategy",
    [
        ("cpu", 2048, 4, 2, "sets"),
        ("cpu", 2048, 5, 3, "sets"),
        ("cpu", 2048, 8, 4, "experts"),
        ("cpu", 2048, 64, 8, "experts"),
        ("cpu", 2048, 4, 4, "all"),
        ("cpu", 2048, 1, 1, "all"),
        ("cpu", 16, 4, 2, "experts"),
        ("cpu", 0, 4, 2, "experts"),
        ("triton", 16, 4, 2, "gated"),
        ("triton", 16, 5, 3, "gated"),
        ("triton", 16, 5, 2, "sorted"),
        ("triton", 16, 8, 4, "gated"),
    ],
)
def test_strategy_follows_from_the_shape(backend: str, N: int, E: int, k: int, strategy: str) -> None:
    assert choose_strategy(backend, N, E, k) == strategy
