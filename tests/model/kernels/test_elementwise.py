"""The elementwise ops of every backend against plain loops and fp64: masks bit for bit, values, every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention import rope
from model.dropout import PIECE, Draw, site_key
from model.kernels import backend as kernel_backend
from model.kernels.ops import elementwise
from model.kernels.ops.elementwise import dropout, keep_mask, layer_norm
from model.kernels.triton import layer_norm as norm_kernels

BACKENDS = kernel_backend.BACKENDS["elementwise"]
KEY = site_key(5, "blocks.3.attention")
SEQUENCES = (3, 900_000_000_007, 2**32 - 1)
"""Global indices beyond 32 bits too."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Shape:
    """[B, T, held] of tokens from `first` on and columns from `start` on of `width`."""

    B: int
    T: int
    held: int
    probability: float = 0.3
    first: int = 0
    width: int = 0
    start: int = 0

    @property
    def size(self) -> tuple[int, int, int]:
        return self.B, self.T, self.held

    def draw(self) -> Draw:
        columns = (self.width, slice(self.start, self.start + self.held)) if self.width else None
        return Draw(self.probability, KEY, torch.tensor(SEQUENCES[: self.B]), self.first, columns)


SHAPES = {
    "odd": Shape(3, 5, 7),
    "one value": Shape(1, 1, 1),
    "several blocks": Shape(2, 5, 823),
    "a rank's tokens": Shape(3, 4, 9, first=12),
    "a rank's columns": Shape(2, 6, 5, width=15, start=10),
    "a rank's tokens and columns": Shape(2, 3, 4, first=6, width=8, start=4),
    "nearly all zero": Shape(2, 7, 13, probability=0.97),
    "empty": Shape(2, 0, 8),
}


def mix(x: int) -> int:
    """Two rounds of a multiply-xorshift hash, in Python's unbounded integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def mask_by_hand(shape: Shape, features: int = 1) -> Tensor:
    """[B, T, held, features] bool, a value at a time."""
    width, kept = shape.width or shape.held, []
    for sequence in SEQUENCES[: shape.B]:
        low, high = mix(sequence % 2**32 ^ KEY % 2**32), (sequence >> 32) ^ (KEY >> 32)
        hashed = mix((low ^ high) % 2**32)
        for t in range(shape.first, shape.first + shape.T):
            for column in range(shape.start, shape.start + shape.held):
                for feature in range(features):
                    counter = (t * width + column) * features + feature
                    kept.append(mix(mix(counter % 2**32) ^ hashed) >> 8 >= round(shape.probability * 2**24))
    return torch.tensor(kept, dtype=torch.bool).view(*shape.size, features)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_masks_are_the_loops(name: str, backend: str) -> None:
    shape = SHAPES[name]
    expected = mask_by_hand(shape)[..., 0]
    assert torch.equal(keep_mask(shape.size, shape.draw(), backend=backend), expected)
    ones = dropout(torch.ones(shape.size), shape.draw(), backend=backend)
    assert torch.equal(ones != 0, expected)
    # Of heads and experts: what stands behind the columns is whole.
    if shape.T * shape.held < 100:
        found = keep_mask((*shape.size, 3), shape.draw(), backend=backend)
        assert torch.equal(found, mask_by_hand(shape, 3))


def test_a_mask_on_a_cpu_is_hashed_in_pieces_that_stay_in_the_cache() -> None:
    """And in numbers of 32 bits: no temporary is larger than a piece, but the mask and the counters of one sequence."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                largest = max(largest, t.numel() * t.element_size())
            return result

    B, T, columns = 16, 40, 1000
    assert B * T * columns > 2 * PIECE
    draw = Draw(0.3, KEY, torch.arange(B))
    with Sizes():
        mask = draw.mask((B, T, columns))
    assert largest == 4 * PIECE > mask.numel()
    for row in (0, B - 1):
        alone = draw._replace(sequence_index=draw.sequence_index[row : row + 1]).mask((1, T, columns))
        assert torch.equal(mask[row : row + 1], alone)


def check_dropout(shape: Shape, dtype: torch.dtype, backend: str, *, has_residual: bool) -> None:
    """Value and gradients against fp64, rounded once (backend `cpu` rounds every operation, as it always did)."""
    x, residual, grad = (normal(shape.size, seed, dtype) for seed in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_()][: 1 + has_residual]
    y = dropout(x, shape.draw(), residual if has_residual else None, backend=backend)
    grads = torch.autograd.grad(y, leaves, grad)
    scale = mask_by_hand(shape)[..., 0].double() / (1 - shape.probability)
    expected = x.double() * scale + (residual.double() if has_residual else 0)
    rounding = EPSILON[dtype] * (2 if backend == "cpu" else 0.51 if dtype != torch.float32 else 1.5)
    largest = (x.double() * scale).abs() + residual.double().abs()
    assert y.dtype == dtype and ((y.double() - expected).abs() <= rounding * largest).all()
    assert all(g.dtype == dtype for g in grads)
    assert ((grads[0].double() - grad.double() * scale).abs() <= rounding * (grad.double() * scale).abs()).all()
    if has_residual:
        assert torch.equal(grads[1], grad)


@pytest.mark.parametrize("has_residual", [True, False], ids=["with residual", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_dropout_equals_fp64(name: str, backend: str, dtype: torch.dtype, has_residual: bool) -> None:
    check_dropout(SHAPES[name], dtype, backend, has_residual=has_residual)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_cpu_computes_what_it_always_did(dtype: torch.dtype) -> None:
    """Bit for bit: a product, a quotient and a sum in the dtype of the tensor."""
    shape = SHAPES["a rank's tokens and columns"]
    x, residual = (normal(shape.size, seed, dtype) for seed in range(2))
    draw = shape.draw()
    expected = x * draw.mask(x.shape).to(dtype) / (1.0 - draw.probability)
    assert torch.equal(dropout(x, draw, backend="cpu"), expected)
    assert torch.equal(dropout(x, draw, residual, backend="cpu"), residual + expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_so(backend: str) -> None:
    """Also under a zero of the mask: the guard against non-finite steps must see it."""
    shape = Shape(1, 4, 16, probability=0.5)
    x = torch.full(shape.size, torch.inf)
    x[0, 2:] = torch.nan
    assert not dropout(x, shape.draw(), torch.ones(shape.size), backend=backend).isfinite().any()


def test_gradients_that_are_not_needed() -> None:
    """Of a residual stream alone, or of neither."""
    shape = SHAPES["odd"]
    x, residual = normal(shape.size, 0), normal(shape.size, 1).requires_grad_()
    y = dropout(x, shape.draw(), residual, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), [residual])
    assert torch.equal(grad, torch.ones_like(grad))
    assert not dropout(x, shape.draw(), backend="triton").requires_grad


def test_opcheck() -> None:
    """Schema, fake tensors and autograd registration."""
    shape = SHAPES["a rank's columns"]
    draw = shape.draw()
    place = (draw.probability, draw.key, draw.sequence_index, 0, shape.width, shape.start, "triton")
    x, residual = (normal(shape.size, seed, torch.bfloat16).requires_grad_() for seed in range(2))
    for rest in (residual, None):
        torch.library.opcheck(elementwise._dropout.overload, (x, rest, *place))
    torch.library.opcheck(elementwise._keep_mask.overload, (list(shape.size), *place))


@dataclass(frozen=True)
class Heads:
    """q [B, T, H, h] and k [B, L, G, h] of which `half` pairs a head are rotated."""

    B: int
    T: int
    L: int
    H: int
    G: int
    h: int
    half: int
    joint: bool = False
    documents: bool = False
    """Every sequence has tables of its own."""


HEADS = {
    "joint": Heads(2, 5, 5, 3, 3, 16, 4, joint=True),
    "joint, odd": Heads(1, 7, 7, 2, 2, 14, 7, joint=True, documents=True),
    "memory": Heads(2, 3, 8, 2, 2, 12, 3),
    "memory, one key head, documents": Heads(2, 3, 7, 4, 1, 22, 5, documents=True),
    "odd head_dim": Heads(3, 4, 4, 2, 5, 9, 2),
    "all rotated": Heads(1, 6, 6, 1, 1, 32, 16),
    "several blocks": Heads(1, 70, 90, 5, 4, 16, 8),
    "no tokens": Heads(2, 0, 0, 2, 2, 8, 2),
}


def check_rotation(case: Heads, dtype: torch.dtype, *, transposed: bool = False) -> None:
    """Triton's against complex numbers in fp64, with gradients. `transposed`: upstream gradients as attention's."""
    q, grad_q = (normal((case.B, case.T, case.H, case.h), seed, dtype) for seed in (0, 1))
    k, grad_k = (normal((case.B, case.L, case.G, case.h), seed, dtype) for seed in (2, 3))
    angle = normal((*([case.B] if case.documents else []), case.L, 1, case.half), 4) * 3
    tables = angle.cos(), angle.sin()

    def by_hand(x: Tensor, direction: int) -> Tensor:
        turn = torch.polar(torch.ones_like(angle).double(), angle.double() * direction)
        turn = turn.narrow(-3, case.L - x.shape[1], x.shape[1])
        turned = torch.complex(x[..., : case.half].double(), x[..., case.half : 2 * case.half].double()) * turn
        return torch.cat([turned.real, turned.imag, x[..., 2 * case.half :].double()], dim=-1)

    if transposed:
        grad_q, grad_k = (g.transpose(1, 2).contiguous().transpose(1, 2) for g in (grad_q, grad_k))
    leaves = [torch.cat([q, k], dim=2)] if case.joint else [q, k]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    if case.joint:
        found = rope.rotate_joint(leaves[0], case.H, tables, backend="triton")
    else:
        found = rope.rotate(leaves[0], leaves[1], tables, backend="triton")
    grads = torch.autograd.grad(found, leaves, (grad_q, grad_k))
    grads = grads[0].split([case.H, case.G], dim=2) if case.joint else grads
    for actual, x, direction in zip((*found, *grads), (q, k, grad_q, grad_k), (1, 1, -1, -1), strict=True):
        assert actual.dtype == dtype and actual.shape == x.shape
        expected = by_hand(x.detach(), direction)
        # Rounded once; a pair's length is the size of both, and the tables are fp32.
        pairs, rest = x.detach().double().abs().split([2 * case.half, case.h - 2 * case.half], dim=-1)
        size = torch.cat([pairs.unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 1, 2), rest], dim=-1)
        rounding = EPSILON[dtype] * (0.51 if dtype != torch.float32 else 2) + 2e-7
        assert ((actual.double() - expected).abs() <= rounding * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_rotation_equals_complex_numbers(name: str, dtype: torch.dtype) -> None:
    check_rotation(HEADS[name], dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["joint", "memory, one key head, documents"])
def test_plain_rotation_is_what_it_was(name: str, backend: str) -> None:
    """Bit for bit that of each tensor by itself; and a width of zero rotates nothing in every backend."""
    case = HEADS[name]
    q, k = normal((case.B, case.T, case.H, case.h), 0), normal((case.B, case.L, case.G, case.h), 1)
    angle = normal((case.L, 1, case.half), 2)
    tables = angle.cos(), angle.sin()
    expected = rope.apply_rope(q, *rope.last_rows(tables, case.T)), rope.apply_rope(k, *tables)
    if case.joint:
        found = rope.rotate_joint(torch.cat([q, k], dim=2), case.H, tables, backend=backend)
    else:
        found = rope.rotate(q, k, tables, backend=backend)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(found, expected, strict=True))
    nothing = rope.rotate(q, k, (tables[0][..., :0], tables[1][..., :0]), backend="triton")
    assert torch.equal(nothing[0], q) and torch.equal(nothing[1], k)


def test_opcheck_of_the_rotation() -> None:
    case = HEADS["memory"]
    q, k = normal((2, 3, 2, 12), 0).requires_grad_(), normal((2, 8, 2, 12), 1).requires_grad_()
    angle = normal((case.L, 1, case.half), 2)
    torch.library.opcheck(elementwise._rotate.overload, (q, k, angle.cos(), angle.sin(), 0, "triton"))
    torch.library.opcheck(elementwise._rotate.overload, (k, None, angle.cos(), angle.sin(), 1, "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_of_dropout_has_the_wider_dtype(backend: str) -> None:
    x, residual = normal((2, 3, 8), 0, torch.bfloat16), normal((2, 3, 8), 1)
    draw = Draw(0.25, KEY, torch.tensor(SEQUENCES[:2]))
    for total in (dropout(x, draw, residual, backend=backend), dropout(residual, draw, x, backend=backend)):
        assert total.dtype == torch.float32
    kept = draw.mask(x.shape) / 0.75
    found = dropout(residual, draw, x, backend=backend)
    torch.testing.assert_close(found, x.float() + residual * kept, rtol=1e-6, atol=1e-6)


@dataclass(frozen=True)
class Norm:
    """A row of [B, T, d] is one token; `branch` is added before, after dropout with `probability`."""

    B: int
    T: int
    d: int
    branch: bool = False
    probability: float = 0.0
    first: int = 0

    def draw(self) -> Draw | None:
        sequences = torch.tensor(SEQUENCES[: self.B])
        return Draw(self.probability, KEY, sequences, self.first) if self.probability else None


NORMS = {
    "alone": Norm(2, 3, 24),
    "after a sum": Norm(2, 4, 13, branch=True),
    "after dropout": Norm(2, 3, 20, branch=True, probability=0.3),
    "a rank's tokens": Norm(2, 2, 33, branch=True, probability=0.5, first=6),
    "odd": Norm(1, 5, 7, branch=True),
    "empty": Norm(2, 0, 8, branch=True),
}


def check_norm(case: Norm, dtype: torch.dtype, backend: str) -> None:
    """Both results and every gradient against fp64. The norm is that of the sum as it is stored, so the sum is given
    to the oracle; gradients of half precision are compared by norm, as several values are rounded on the way."""
    size = (case.B, case.T, case.d)
    x, branch = (normal(size, seed, dtype) + 3 for seed in (0, 1))
    weight, bias = (normal((case.d,), seed, dtype) for seed in (2, 3))
    leaves = [t.requires_grad_() for t in (x, branch, weight, bias)]
    upstream = normal(size, 4, dtype), normal(size, 5, dtype)
    total, y = layer_norm(
        x, weight, bias, 0.03, branch=branch if case.branch else None, draw=case.draw(), backend=backend
    )
    used = leaves if case.branch else [x, weight, bias]
    grads = torch.autograd.grad((total, y), used, upstream)

    exact = [t.detach().double().requires_grad_() for t in used]
    scale = torch.ones(size, dtype=torch.float64)
    if case.probability:
        shape = Shape(*size, probability=case.probability, first=case.first)
        scale = mask_by_hand(shape)[..., 0].double() / (1 - case.probability)
    wanted_total = exact[0] + exact[1] * scale if case.branch else exact[0]
    stored = wanted_total + (total.detach().double() - wanted_total).detach()
    centred = stored - stored.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 0.03).sqrt()
    wanted_y = centred / deviation * exact[-2] + exact[-1]
    wanted = torch.autograd.grad((wanted_total, wanted_y), exact, [g.double() for g in upstream])
    assert total.dtype == y.dtype == dtype and [g.dtype for g in grads] == [dtype] * len(used)
    rounding = EPSILON[dtype] * (2 if backend == "cpu" and dtype != torch.float32 else 1)
    assert ((total.double() - wanted_total).abs() <= 2 * rounding * (wanted_total.abs() + 6)).all()
    for actual, expected in zip((y.detach(), *grads), (wanted_y.detach(), *wanted), strict=True):
        error = (actual.double() - expected).norm()
        assert error <= (2e-6 if dtype == torch.float32 else rounding) * expected.norm(), (actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_equals_fp64(name: str, backend: str, dtype: torch.dtype) -> None:
    check_norm(NORMS[name], dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_that_of_the_sum_as_it_is_stored(backend: str) -> None:
    """A sum of about 200 is rounded to whole numbers in bf16, as far apart as the values of a row are."""
    x, branch = (normal((2, 3, 64), seed, torch.bfloat16) + 100 for seed in (0, 1))
    weight, bias = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    total, y = layer_norm(x, weight, bias, 1e-5, branch=branch, backend=backend)
    expected = torch.nn.functional.layer_norm(total.double(), (64,))
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_norm_on_the_cpu_is_what_it_was(dtype: torch.dtype) -> None:
    """Bit for bit torch's operators, and so is the reference in fp32 and fp64."""
    case = NORMS["after dropout"]
    x, branch = (normal((case.B, case.T, case.d), seed, dtype) for seed in (0, 1))
    weight, bias = (normal((case.d,), seed, dtype) for seed in (2, 3))
    draw = case.draw()
    assert draw is not None
    for given, total in ((draw, dropout(branch, draw, x, backend="cpu")), (None, x + branch)):
        y = torch.nn.functional.layer_norm(total, (case.d,), weight, bias, 1e-5)
        for backend in ("cpu", "reference") if dtype in (torch.float32, torch.float64) else ("cpu",):
            found = layer_norm(x, weight, bias, 1e-5, branch=branch, draw=given, backend=backend)
            assert torch.equal(found[0], total) and torch.equal(found[1], y)


def test_one_result_of_the_norm_without_gradient() -> None:
    """The last block's sum has no other use, and a probe may use the sum alone."""
    x, branch = (normal((2, 3, 8), seed).requires_grad_() for seed in (0, 1))
    weight, bias = (normal((8,), seed).requires_grad_() for seed in (2, 3))
    for which in (0, 1):
        found = [
            torch.autograd.grad(layer_norm(x, weight, bias, 1e-5, branch=branch, backend=b)[which].square().sum(), [x])
            for b in ("triton", "cpu")
        ]
        torch.testing.assert_close(*found)


def test_opcheck_of_the_norm() -> None:
    x, branch = (normal((2, 3, 8), seed).requires_grad_() for seed in (0, 1))
    weight, bias = (normal((8,), seed).requires_grad_() for seed in (2, 3))
    sequence_index = torch.tensor([3, 4])
    for rest, index in ((branch, sequence_index), (branch, None), (None, None)):
        torch.library.opcheck(
            elementwise._layer_norm.overload, (x, rest, weight, bias, 1e-5, 0.3, KEY, index, 0, "triton")
        )


def test_the_programs_of_a_norm() -> None:
    """As many as an H100 holds at once, whatever the width, and no program without a row."""
    for width, num_rows in ((128, 512), (412, 16384), (1024, 4096), (2048, 16384), (4096, 16384)):
        rows = norm_kernels.rows_each(num_rows, norm_kernels.backward_tiles(width))
        programs = -(-num_rows // rows)
        assert programs * norm_kernels.warps(width) <= norm_kernels.RESIDENT_WARPS and (programs - 1) * rows < num_rows
