"""The elementwise kernels, interpreted, with every access checked: bytes a value, no races, no atomics, the same bits
again; strides that the model gives them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.recording import recording
from model.attention import rope
from model.kernels.ops.elementwise import dropout, keep_mask, layer_norm
from model.kernels.triton import dropout as dropout_kernels
from model.kernels.triton import layer_norm as norm_kernels
from model.kernels.triton import rope as rope_kernels
from tests.model.kernels.test_elementwise import (
    DTYPES,
    HEADS,
    NORMS,
    SHAPES,
    Heads,
    Norm,
    Shape,
    check_dropout,
    check_norm,
    check_rotation,
    mask_by_hand,
    normal,
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_kernels, "BLOCK", 16)
    monkeypatch.setattr(rope_kernels, "TILE", 32)
    monkeypatch.setattr(norm_kernels, "RESIDENT_WARPS", 4)
    monkeypatch.setattr(norm_kernels, "SUM_TILES", {"rows": 2, "columns": 16, "warps": 4})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_dropout_in_small_blocks(name: str, dtype: torch.dtype) -> None:
    """Within bounds, without races and atomics, once forward and once backward."""
    shape = SHAPES[name]
    if shape.T * shape.held > 1000:
        shape = Shape(2, 3, 41)
    with recording() as launches:
        check_dropout(shape, dtype, "triton", has_residual=True)
        keep_mask(shape.size, shape.draw(), backend="triton")
    kernels = ["dropout_kernel", "dropout_kernel", "keep_mask_kernel"]
    assert [launch.kernel for launch in launches] == (kernels if shape.T else [])
    assert not any(launch.atomics for launch in launches)


def test_bytes_a_value() -> None:
    """In bf16 6 forward, with the residual stream, and 4 backward; the sequence's index besides."""
    shape = Shape(2, 8, 16)
    x, residual = (normal(shape.size, seed, torch.bfloat16).requires_grad_() for seed in range(2))
    with recording() as launches:
        dropout(x, shape.draw(), residual, backend="triton").backward(torch.ones(shape.size, dtype=torch.bfloat16))
    assert len(launches) == 2
    for launch, each in zip(launches, (6, 4), strict=True):
        index = launch.tensors.pop("sequence_index_ptr").requested_bytes
        assert index == 8 * 2 * 8  # 8 blocks of 2 sequences
        assert launch.requested_bytes == each * x.numel()


def test_strides_and_views() -> None:
    """A transposed activation, a gradient that autograd expanded, every second sequence's index."""
    shape = Shape(2, 6, 10)
    x = normal((2, 10, 6), 0).transpose(1, 2).requires_grad_()
    draw = shape.draw()._replace(sequence_index=shape.draw().sequence_index.repeat_interleave(2)[::2])
    with recording():
        y = dropout(x, draw, normal((10, 2, 6), 1).permute(1, 2, 0), backend="triton")
        (grad,) = torch.autograd.grad(y.sum(), [x])
    scale = mask_by_hand(shape)[..., 0] / 0.7
    torch.testing.assert_close(y, normal((10, 2, 6), 1).permute(1, 2, 0) + x * scale)
    torch.testing.assert_close(grad, scale)


def test_a_sequence_of_too_many_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 2147481600 are possible"):
        dropout_kernels.grid(2**31 - 1, 1)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed gradients"])
@pytest.mark.parametrize("name", HEADS)
def test_rotation_in_small_blocks(name: str, transposed: bool) -> None:
    """One launch each way for queries and keys together; no copy of a gradient that attention left transposed."""
    case = HEADS[name]
    if case.T > 20:  # several blocks here, too, with fewer programs to interpret
        case = Heads(1, 11, 17, 5, 4, 16, 8)
    with recording() as launches:
        check_rotation(case, torch.bfloat16, transposed=transposed)
    assert [launch.kernel for launch in launches] == ["rotate_kernel"] * (2 if case.T else 0)
    assert not any(launch.atomics for launch in launches)


def test_bytes_of_a_rotation() -> None:
    """In bf16 2 read and 2 written per value; a token's angles once a head, of which memory sees one."""
    B, T, H, h, half = 2, 8, 3, 16, 4
    joint = normal((B, T, 2 * H, h), 0, torch.bfloat16)
    angle = normal((T, 1, half), 1)
    with recording() as launches:
        rope.rotate_joint(joint, H, (angle.cos(), angle.sin()), backend="triton")
    (launch,) = launches
    for table in ("cos_ptr", "sin_ptr"):
        assert launch.tensors[table].distinct_bytes == T * half * 4
        assert launch.tensors.pop(table).requested_bytes == B * T * 2 * H * half * 4
    assert launch.requested_bytes == 4 * joint.numel()
    rows = {name: traffic.distinct_bytes for name, traffic in launch.tensors.items()}
    assert rows == dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), joint.numel())


def test_heads_of_odd_strides_are_copied() -> None:
    """Every second value of a wider tensor, and rows that no unit divides."""
    wide = normal((1, 4, 2, 32), 0)
    angle = normal((4, 1, 3), 1)
    tables = angle.cos(), angle.sin()
    for q in (wide[..., ::2], torch.as_strided(wide, (1, 4, 2, 16), (0, 33, 17, 1))):
        found = rope.rotate(q, q, tables, backend="triton")
        for actual, expected in zip(found, rope.rotate(q, q, tables, backend="cpu"), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_norm_in_small_parts(name: str) -> None:
    """Programs of several rows, the last with fewer; a sum of several tiles of programs and columns; no races, no
    atomics."""
    with recording() as launches:
        check_norm(NORMS[name], torch.bfloat16, "triton")
    kernels = ["norm_forward_kernel", "norm_backward_kernel", "norm_sum_kernel"]
    assert [launch.kernel for launch in launches] == (kernels if NORMS[name].T else kernels[2:])
    assert not any(launch.atomics for launch in launches)


def test_bytes_of_a_norm() -> None:
    """In bf16 8 a value forward and 10 backward after dropout; statistics, parameters and parts besides."""
    case = Norm(2, 4, 16, branch=True, probability=0.3)
    size = (case.B, case.T, case.d)
    x, branch, *upstream = (normal(size, seed, torch.bfloat16) for seed in range(4))
    weight, bias = (normal((case.d,), seed, torch.bfloat16) for seed in (4, 5))
    leaves = [t.requires_grad_() for t in (x, branch, weight, bias)]
    with recording() as launches:
        found = layer_norm(x, weight, bias, 1e-5, branch=branch, draw=case.draw(), backend="triton")
        torch.autograd.grad(found, leaves, upstream)
    forward, backward, _ = launches
    streams = ("x_ptr", "branch_ptr", "sum_ptr", "y_ptr")
    assert sum(forward.tensors[name].requested_bytes for name in streams) == 8 * x.numel()
    streams = ("grad_y_ptr", "grad_sum_ptr", "sum_ptr", "grad_x_ptr", "grad_branch_ptr")
    assert sum(backward.tensors[name].requested_bytes for name in streams) == 10 * x.numel()
    # 8 rows in 4 programs: a row of each for weight and bias, in fp32.
    assert backward.tensors["parts_ptr"].requested_bytes == 4 * 2 * case.d * 4
