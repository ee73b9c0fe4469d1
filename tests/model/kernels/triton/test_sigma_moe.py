"""sigma_moe's Triton kernels, interpreted, against the fp64 loop: values, every gradient, and what they touch."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases.recording import Launch, recording
from model.kernels.backend import triton_limit
from model.kernels.ops.route import Choice, group_choices
from model.kernels.ops.sigma_moe import HeldExperts, sigma_moe
from model.kernels.triton import sigma_moe as kernels
from model.kernels.triton.tiles import Entry, placed
from tests.model.kernels.checks import error
from tests.model.kernels.test_sigma_moe import NAMES, Case, Shape, loop, make_case, run

# Inputs are the same numbers on both sides. Half precision rounds the hidden layer and its gradient, the gated one,
# every row and the result: measured 5e-4 (fp16) and 4e-3 (bf16) at most.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SMALL = kernels.ExpertTiles(rows=16, hidden=16, reduce=16, out=16, warps=4, stages=2)
"""Several tiles in every direction at tiny sizes; no size below is a multiple of it unless said."""

SHAPES = {
    "odd": Shape(N=21, d=37, E=3, G=13, k=2),
    "hidden in chunks": Shape(N=9, d=18, E=2, G=35, k=1),
    "chunks and choices": Shape(N=7, d=20, E=3, G=20, k=2),
    "multiples of the tile": Shape(N=16, d=32, E=2, G=16, k=2),
    "all tokens on one expert": Shape(N=35, d=8, E=4, G=8, k=1, experts="one"),
    "one and no token on an expert": Shape(N=19, d=8, E=6, G=8, k=2, experts="single"),
    "one token": Shape(N=1, d=17, E=4, G=8, k=4),
    "one expert": Shape(N=9, d=8, E=1, G=8, k=1),
    "SwiGLU": Shape(N=21, d=37, E=3, G=13, k=2, swiglu=True),
    "SwiGLU in chunks": Shape(N=9, d=18, E=2, G=35, k=2, swiglu=True),
}
MANY = {
    "5 experts, 3 chosen": Shape(N=50, d=40, E=5, G=24, k=3),
    "64 experts, 8 chosen": Shape(N=40, d=20, E=64, G=17, k=8),
    "33 experts, 7 chosen": Shape(N=21, d=33, E=33, G=9, k=7),
    "8 experts, all chosen": Shape(N=30, d=20, E=8, G=33, k=8),
    "all of 300 on one": Shape(N=300, d=24, E=3, G=16, k=1, experts="one"),
    "more experts than slots": Shape(N=3, d=9, E=16, G=8, k=2),
    "SwiGLU, 5 experts, 3 chosen": Shape(N=50, d=40, E=5, G=24, k=3, swiglu=True),
    "SwiGLU, 64 experts, 8 chosen": Shape(N=40, d=20, E=64, G=17, k=8, swiglu=True),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "mlp_tiles", lambda *_, **__: SMALL)
    monkeypatch.setattr(kernels, "weight_tiles", lambda *_, **__: SMALL)


def check(case: Case, expected: list[Tensor], dtype: torch.dtype, first_expert: int = 0) -> list[Launch]:
    """Right, the same again bit for bit, within bounds, no races and no atomics."""

    def run() -> list[Tensor]:
        leaves = case.x, case.scores, case.up_experts, case.down_experts
        y = case(backend="triton", first_expert=first_expert)
        assert y.dtype == case.x.dtype
        return [y.detach(), *torch.autograd.grad(y, leaves, case.grad)]

    with recording() as launches:
        results = run()
    for what, actual, right in zip(("y", *NAMES), results, expected, strict=True):
        assert error(actual, right) <= TOLERANCE[dtype], what
    for what, first, again in zip(("y", *NAMES), results, run(), strict=True):
        assert torch.equal(first, again), what
    assert not any(launch.atomics for launch in launches)
    return launches


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_loop(name: str, dtype: torch.dtype, small_tiles: None) -> None:
    case = make_case(SHAPES[name], dtype, scores_dtype=torch.float32)
    check(case, loop(case), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tiles", ["small", "shipped"])
@pytest.mark.parametrize("name", SHAPES | MANY)
def test_equals_loop_in_every_way(name: str, tiles: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    case = make_case((SHAPES | MANY)[name], dtype)
    check(case, loop(case), dtype)


@pytest.mark.parametrize("swiglu", [False, True], ids=["ReLU", "SwiGLU"])
@pytest.mark.parametrize("G, piece", [pytest.param(48, 16, marks=pytest.mark.slow), (67, 16), (80, 32)])
def test_backward_in_pieces(G: int, swiglu: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden layer goes through the gate a few columns at a time: also where it ends inside a piece, and where
    pieces divide it and tiles of 64 do not."""
    tiles = dataclasses.replace(SMALL, hidden=64, piece=piece)
    monkeypatch.setattr(kernels, "launch_tiles", lambda phase, inputs: tiles)
    case = make_case(Shape(N=21, d=18, E=3, G=G, k=2, swiglu=swiglu), torch.bfloat16)
    check(case, loop(case), torch.bfloat16)


def test_registers_of_the_backward() -> None:
    """Two programs of 8 warps, or three of 4, share the 65,536 registers and 227 KB of a multiprocessor of an H100."""
    for rows in (64, 512):
        forward = kernels.mlp_tiles(rows * 8, 8, 128, torch.bfloat16, swiglu=False)
        backward = kernels.backward_tiles(forward, 2048, 128, swiglu=False, capability=(9, 0))
        programs = 65536 // (backward.registers * 32 * backward.warps)
        assert programs == {64: 3, 128: 2}[backward.rows]
        stage = 2 * backward.reduce * (backward.rows + backward.hidden)
        assert programs * (backward.stages * stage + 1024) <= 227 << 10
        for d_model, G, swiglu, capability in (
            (412, 128, False, (9, 0)),
            (2048, 100, False, (9, 0)),  # they would spill
            (2048, 128, True, (9, 0)),
            (2048, 128, False, (10, 0)),
        ):
            other = kernels.backward_tiles(forward, d_model, G, swiglu=swiglu, capability=capability)
            assert other.registers == 0 and "maxnreg" not in other.launch
    assert backward.launch == {"num_warps": 8, "num_stages": 3, "maxnreg": 128}


def test_the_backward_kernel_alone_has_fewer_registers() -> None:
    E, d, G, k, N = 8, 128, 128, 2, 4096
    inputs = kernels.Inputs(
        torch.empty(N, d, device="meta", dtype=torch.bfloat16),
        torch.empty(N, k, device="meta"),
        torch.empty(N * k, device="meta"),
        torch.empty(E, device="meta"),
        torch.empty(E, d, G, device="meta"),
        torch.empty(E, G, d, device="meta"),
        0,
    )
    forward, backward = (kernels.launch_tiles(phase, inputs) for phase in ("forward", "backward"))
    assert (forward.rows, forward.launch) == (128, {"num_warps": 8, "num_stages": 3})
    assert backward == dataclasses.replace(forward, registers=128)
    # A measured tile is for as many experts as were there: of half of them a launch has half the programs.
    other = dataclasses.asdict(forward) | {"rows": 64}
    for name in ("piece", "registers"):
        other.pop(name)
    shape = {"d": d, "E": E, "here": E, "k": k, "G": G, "swiglu": 0}
    entry = Entry(kernel="sigma_moe forward", capability=(9, 0), dtype="bf16", shape=shape, rows=N * k, tiles=other)
    half = inputs._replace(up_experts=inputs.up_experts[:4], down_experts=inputs.down_experts[:4])
    with placed([entry]):
        assert kernels.launch_tiles("forward", inputs).rows == 64
        assert kernels.launch_tiles("forward", half) == forward


def test_wide_tiles_of_the_weight_gradient_where_programs_are_enough() -> None:
    for experts, d_model, capability, columns in (
        (64, 2048, (9, 0), 256),
        (32, 1024, (9, 0), 256),
        (31, 1024, (9, 0), 128),
        (64, 2048, (8, 0), 128),
    ):
        tiles = kernels.weight_tiles(128, d_model, experts, torch.bfloat16, capability)
        assert (tiles.out, tiles.stages) == (columns, 5 if columns == 256 else 3)
        assert kernels.weight_splits(tiles, 2048 * experts, experts, 128, d_model) == 1
    assert kernels.weight_tiles(64, 2048, 64, torch.bfloat16, (9, 0)).out == 128  # half of a tile, and not compiled


def test_shipped_tiles_in_fp16() -> None:
    case = make_case(Shape(N=70, d=24, E=2, G=16, k=2), torch.float16)
    launches = check(case, loop(case), torch.float16)
    names = ["forward_kernel", "sum_kernel", "backward_kernel", "sum_kernel", *["weight_gradient_kernel"] * 2]
    assert [launch.kernel for launch in launches] == names


def test_gates_and_sums_over_k_are_fp32(small_tiles: None) -> None:
    """Both ways, to the last bit: all experts are the identity, so rows in bf16 are a gate times x, or times the
    gradient, rounded once, and what is summed up over eight of them is rounded once."""
    generator = torch.Generator().manual_seed(0)
    x, grad, scores = (0.5 + torch.rand(20, columns, generator=generator) for columns in (16, 16, 8))
    x, grad = x.bfloat16().requires_grad_(), grad.bfloat16()
    identity = torch.eye(16, dtype=torch.bfloat16).expand(8, 16, 16)
    index = torch.rand(20, 8, generator=generator).argsort(1)
    order, load = (t[0] for t in group_choices(index[:, None], 8, backend="reference"))
    y = sigma_moe(x, Choice(scores, index, order, load), HeldExperts(identity, identity), backend="triton")
    (grad_x,) = torch.autograd.grad(y, x, grad)
    for found, given in ((y, x), (grad_x, grad)):
        rows = (given.float()[:, None] * scores[:, :, None]).bfloat16()
        assert torch.equal(found, rows.double().sum(1).bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["odd", "hidden in chunks", "chunks and choices", "one expert"])
def test_the_sum_over_k_adds_the_residual_stream(name: str, dtype: torch.dtype, small_tiles: None) -> None:
    """In the sum's own launch, which reads it once, rounds once and writes nothing else; not contiguous either. Where a
    row is the output already (one choice) there is no sum, and it is added behind."""
    case, shape = make_case(SHAPES[name], dtype), SHAPES[name]
    residual = torch.randn(shape.d, shape.N, generator=torch.Generator().manual_seed(3)).to(dtype).t()
    with recording() as launches, torch.no_grad():
        y = case(backend="triton", residual=residual)
    assert error(y, residual.double() + loop(case)[0]) <= TOLERANCE[dtype]
    sums = [launch for launch in launches if launch.kernel == "sum_kernel"]
    assert len(launches) == 1 + len(sums) == (1 if name == "one expert" else 2)
    for launch in sums:
        read = {name: traffic.load_bytes for name, traffic in launch.tensors.items()}
        written = {name: traffic.store_bytes for name, traffic in launch.tensors.items() if traffic.store_bytes}
        assert read["residual_ptr"] == written["y_ptr"] == y.numel() * y.element_size()
        assert set(written) == {"y_ptr"}


def test_parts_of_a_sum_are_not_rounded(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """257 and -256 from two programs are 1; a bf16 number has no 257. Of an expert's rows in four parts, and of a
    gate's gradient by a hidden layer in two."""
    monkeypatch.setattr(kernels, "weight_splits", lambda *_: 4)
    order, load = torch.arange(64), torch.tensor([64])
    x, grad, scores = torch.zeros(64, 16), torch.zeros(64, 16), torch.ones(64, 1)
    x[:, 0], grad[:16, 0], grad[15, 0], grad[16:32, 0] = 1.0, 16.0, 17.0, -16.0
    x, grad, scores = x.bfloat16(), grad.bfloat16(), scores.bfloat16().requires_grad_()
    choice = Choice(scores, torch.zeros(64, 1, dtype=torch.int64), order, load)
    down = torch.eye(16).bfloat16()[None].requires_grad_()
    y = sigma_moe(x, choice, HeldExperts(torch.eye(16).bfloat16()[None], down), backend="triton")
    assert torch.autograd.grad(y, down, grad)[0][0, 0, 0] == 1.0
    up, down = torch.zeros(1, 16, 32, dtype=torch.bfloat16), torch.zeros(1, 32, 16, dtype=torch.bfloat16)
    up[0, 0], down[0, :16, 0], down[0, 15, 0], down[0, 16:, 0] = 1.0, 16.0, 17.0, -16.0
    y = sigma_moe(x, choice, HeldExperts(up, down), backend="triton")
    assert torch.autograd.grad(y, scores, x)[0].eq(1.0).all()


class Held(NamedTuple):
    """Experts first to last - 1 of the shape are on this rank."""

    shape: Shape
    first: int
    last: int


HELD = {
    "half of the experts": Held(Shape(N=20, d=12, E=4, G=8, k=2), 2, 4),
    "one choice": Held(Shape(N=20, d=12, E=4, G=8, k=1), 1, 3),
    "hidden in chunks": Held(Shape(N=20, d=12, E=4, G=35, k=2), 2, 4),
    "SwiGLU in chunks": Held(Shape(N=14, d=12, E=4, G=20, k=3, swiglu=True), 1, 3),
    "nobody chose them": Held(Shape(N=5, d=8, E=5, G=8, k=1, experts="one"), 0, 2),
}


@pytest.mark.parametrize("whole_order", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_experts_of_one_rank(name: str, whole_order: bool, small_tiles: None) -> None:
    """Tensor parallelism: slots of other ranks' experts, missing from `order` or not, give nothing."""
    shape, first, last = HELD[name]
    whole = make_case(shape, torch.float32)
    here = torch.zeros(shape.E, 1, 1)
    here[first:last] = 1
    y, grad_x, grad_scores, grad_up, grad_down = loop(whole._replace(down_experts=whole.down_experts * here))
    # What an expert gets from the loss does not depend on the others; a silent one's own gradient is not asked for.
    expected = [y, grad_x, grad_scores, grad_up[first:last], grad_down[first:last]]
    start, stop = int(whole.load[:first].sum()), int(whole.load[:last].sum())
    part = whole._replace(
        index=whole.index - first,
        order=whole.order[start:stop],
        load=whole.load[first:last],
        up_experts=whole.up_experts.detach()[first:last].requires_grad_(),
        down_experts=whole.down_experts.detach()[first:last].requires_grad_(),
    )
    if whole_order:
        check(part._replace(order=whole.order, load=whole.load), expected, torch.float32, first_expert=first)
    else:
        check(part, expected, torch.float32)


def test_split_segments(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs share an expert's rows: 40 rows in 4 parts of 16, the last one empty; experts with fewer rows too."""
    monkeypatch.setattr(kernels, "weight_splits", lambda *_: 4)
    case = make_case(Shape(N=40, d=20, E=3, G=12, k=2, experts="one"), torch.bfloat16)
    assert int(case.load.max()) == 40
    check(case, loop(case), torch.bfloat16)


def test_segments_are_split_where_programs_are_few() -> None:
    tiles = kernels.weight_tiles(128, 1024, 2, torch.bfloat16)
    assert kernels.weight_splits(tiles, 32768, 32, 128, 1024) == 1
    assert kernels.weight_splits(tiles, 32768, 2, 128, 1024) == 16
    assert kernels.weight_splits(tiles, 1024, 2, 128, 1024) == 2  # at least 4 iterations for each
    assert kernels.weight_splits(tiles, 0, 2, 128, 1024) == 1


def test_strides(small_tiles: None) -> None:
    """No tensor is contiguous, and the gradient is expanded from a scalar."""
    case = make_case(Shape(N=18, d=20, E=3, G=12, k=2), torch.float32)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x.detach(), x.detach() + 1], dim=-1)[..., 0].requires_grad_(x.requires_grad)

    strides = Case(*(strided(t) for t in case))._replace(grad=torch.tensor(0.3).expand_as(case.grad))
    expected = loop(case._replace(grad=strides.grad))
    with recording():
        results = run(strides, "triton")
    for what, actual, right in zip(("y", *NAMES), results, expected, strict=True):
        assert error(actual, right) <= TOLERANCE[torch.float32], what


def test_reads_rows_once_and_weights_once_per_tile() -> None:
    """At shipped tiles, in elements: what two GEMM kernels with 64 x 64 tiles must ask for, and what is asked for."""
    N, d, _, G, k, *_ = shape = Shape(N=128, d=128, E=2, G=128, k=1)
    case = make_case(shape, torch.bfloat16)
    with recording(check=False) as launches, torch.no_grad():
        case(backend="triton")
    (launch,) = launches
    tiles = sum(-(-n // 64) for n in case.load.tolist())
    read = {name: traffic.load_bytes // 2 for name, traffic in launch.tensors.items()}
    assert read["x_ptr"] == N * k * d
    assert read["up_ptr"] == read["down_ptr"] == tiles * d * G
    written = {name: traffic.store_bytes // 2 for name, traffic in launch.tensors.items() if traffic.store_bytes}
    assert written == {"hidden_ptr": N * k * G, "rows_ptr": N * k * d}
    assert launch.dot_flops == 2 * 2 * tiles * 64 * d * G


def test_fp64_is_refused() -> None:
    assert triton_limit("cpu", torch.float64) is not None
    with pytest.raises(ValueError, match="backend=triton cannot compute sigma_moe"):
        run(make_case(Shape(N=3, d=8, E=2, G=8, k=1), torch.float64), "triton")
