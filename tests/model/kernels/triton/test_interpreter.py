"""The repaired interpreter: bf16 equals torch's, counters equal counting by hand, and every check can fail."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from benchmarks.kernel_cases.recording import recording
from model.kernels.triton.interpreter import narrow, repair, widen

repair()


@triton.jit
def _elementwise(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    a, b = tl.load(x + i, mask=mask), tl.load(y + i, mask=mask)
    base = out + i
    tl.store(base, a + b, mask=mask)
    tl.store(base + n, a * b, mask=mask)
    tl.store(base + 2 * n, tl.where(a > b, a, -b), mask=mask)
    tl.store(base + 3 * n, tl.maximum(a, b), mask=mask)
    tl.store(base + 4 * n, (a.to(tl.float32) * 1.01).to(out.dtype.element_ty), mask=mask)
    tl.store(base + 5 * n, (i * 3 + 1).to(out.dtype.element_ty), mask=mask)
    tl.store(base + 6 * n, tl.abs(b).to(tl.float16).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _matmul(a, b, out, M, N, K, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        left, right = start + tl.arange(0, BLOCK)[None, :], start + tl.arange(0, BLOCK)[:, None]
        rows = tl.load(a + i * K + left, mask=(i < M) & (left < K), other=0.0)
        columns = tl.load(b + right * N + j, mask=(right < K) & (j < N), other=0.0)
        accumulator = tl.dot(rows, columns, accumulator, input_precision="ieee")
    tl.store(out + i * N + j, accumulator, mask=(i < M) & (j < N))


@triton.jit
def _faulty(x, out, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    if FAULT == "load beyond":
        tl.store(out + i, tl.load(x + i + 1), mask=i < n)
    elif FAULT == "store before":
        tl.store(out + i - 1, tl.load(x + i, mask=i < n), mask=i < n)
    elif FAULT == "same place":
        tl.store(out + i % BLOCK, tl.load(x + i, mask=i < n), mask=i < n)
    elif FAULT == "twice":
        tl.store(out + program * BLOCK + tl.arange(0, BLOCK) // 2, tl.load(x + i, mask=i < n), mask=i < n)
    elif FAULT == "load what another stored":
        before = tl.load(out + i - BLOCK, mask=(program > 0) & (i < n), other=0.0)
        tl.store(out + i, before + 1, mask=i < n)
    elif FAULT == "store what another loaded":
        after = tl.load(out + i + BLOCK, mask=i + BLOCK < n, other=0.0)
        tl.store(out + i, after, mask=i < n)
    elif FAULT == "nothing":
        tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _add_atomically(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + i % 2, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _square(x):
    return x * x + tl.zeros_like(x)


@triton.jit
def _norm(x):
    return tl.sum(_square(x), axis=1)


@triton.jit
def _norms(x, out, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, 4)
    rows = tl.load(x + i[:, None] * 4 + columns[None, :], mask=(i < N)[:, None], other=0.0)
    tl.store(out + i, _norm(rows), mask=i < N)


@triton.jit
def _times(x, out, NUMBER: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.load(x + i) * NUMBER)
    tl.store(out + 4 + i, NUMBER * tl.load(x + i))


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_elementwise_equals_torch_bit_for_bit(dtype: torch.dtype) -> None:
    x, y = normal(300, dtype=dtype), normal(301, dtype=dtype)[1:]
    out = torch.empty(7, 300, dtype=dtype)
    _elementwise[(5,)](x, y, out, 300, BLOCK=64)
    scaled = (x.float() * torch.tensor(1.01)).to(dtype)
    expected = [x + y, x * y, torch.where(x > y, x, -y), torch.maximum(x, y), scaled]
    expected += [(torch.arange(300) * 3 + 1).to(dtype), y.abs().half().to(dtype)]
    for row, (actual, wanted) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(actual, wanted), row


def test_rounding_is_that_of_torch() -> None:
    """Every sign, exponent and pattern around the rounding bit, infinities and numbers that round to them."""
    high = torch.arange(0, 2**16, 7)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = ((high[:, None] << 16) | low).flatten().to(torch.uint32).view(torch.float32)
    numbers = bits[~bits.isnan()]
    assert numbers.isinf().sum() >= 1
    expected = numbers.to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(narrow(numbers.numpy()).view("int16")).view(torch.bfloat16), expected)
    assert torch.equal(torch.from_numpy(widen(expected.view(torch.int16).numpy().view("uint16"))), expected.float())
    assert bool(torch.from_numpy(widen(narrow(torch.tensor([float("nan")]).numpy()))).isnan())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-6)])
def test_dot(dtype: torch.dtype, tolerance: float) -> None:
    a, b, out = normal(45, 70, dtype=dtype), normal(70, 27, dtype=dtype), torch.empty(45, 27, dtype=dtype)
    with recording() as launches:
        _matmul[(2,)](a, b, out, 45, 27, 70, BLOCK=32)
    expected = a.double() @ b.double()
    assert ((out.double() - expected).norm() / expected.norm()).item() <= tolerance
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.dot_flops) == ("_matmul", (2, 1, 1), 2 * 3 * 2 * 32**3)
    size = dtype.itemsize
    assert {name: (t.load_bytes, t.store_bytes, t.distinct_bytes) for name, t in launch.tensors.items()} == {
        "a": (45 * 70 * size, 0, 45 * 70 * size),
        "b": (2 * 70 * 27 * size, 0, 70 * 27 * size),
        "out": (0, 45 * 27 * size, 45 * 27 * size),
    }
    assert launch.requested_bytes == size * (45 * 70 + 2 * 70 * 27 + 45 * 27)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("load beyond", "load of 1 elements outside x, bytes 132 to 256 of 256"),
        ("store before", "store of 1 elements outside out, bytes -4"),
        ("same place", "out: overlapping stores of two programs"),
        ("twice", "out: one store writes an element twice"),
        ("load what another stored", "out: a program loads what another one of the launch stores"),
        ("store what another loaded", "out: a program stores what another one of the launch loads"),
    ],
)
def test_faults_are_seen(fault: str, message: str) -> None:
    """In one allocation, so that what is outside one tensor is inside another."""
    memory = torch.zeros(192)
    x, out = memory[:64], memory[64:128]
    _faulty[(2,)](x, out, 64, FAULT=fault, BLOCK=32)  # unseen without the checks
    with recording(), pytest.raises(InterpreterError, match=message):
        _faulty[(2,)](x, out, 64, FAULT=fault, BLOCK=32)
    with recording() as launches:
        _faulty[(2,)](x, out, 64, FAULT="nothing", BLOCK=32)
    assert len(launches) == 1


def test_unwritten_memory_is_poisoned() -> None:
    with recording():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_atomics_are_counted() -> None:
    for dtype, floats in ((torch.float32, 40), (torch.int32, 0)):
        x, out = torch.ones(40, dtype=dtype), torch.zeros(2, dtype=dtype)
        with recording() as launches:
            _add_atomically[(2,)](x, out, 40, BLOCK=32)
        assert (launches[0].atomics, launches[0].float_atomics) == (40, floats)
        assert out.tolist() == [20, 20]
    with pytest.raises(InterpreterError, match="bf16 atomics"):
        _add_atomically[(1,)](torch.ones(40, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), 40, BLOCK=32)


def test_helpers_are_called_and_the_language_is_itself_after_a_launch() -> None:
    """A kernel's functions, and those that they call, find the language that was patched for it, once."""

    def language() -> list[object]:
        return [tl.load, tl.range, tl.reduce, tl.math.exp, tl.core.add, tl.core.reduce, tl.tensor.__add__, tl.tensor.T]

    before, x, out = language(), normal(7, 4), torch.empty(7)
    with recording():
        _norms[(4,)](x, out, 7, BLOCK=2)
    torch.testing.assert_close(out, x.square().sum(1))
    assert all(now is then for now, then in zip(language(), before, strict=True))
    assert all(map(tl.core.is_builtin, (tl.load, tl.core.add, tl.core.reduce, tl.math.exp)))


def test_numbers_that_are_equal_are_not_taken_for_one_another() -> None:
    """Blocks that stand for numbers are kept from launch to launch, of every type of block: 1, 1.0, True. (-0.0 is 0.0
    to Triton, compiled or not.)"""
    for dtype in (torch.float32, torch.float16, torch.int32, torch.int64):
        x = torch.tensor([1, 2, 3, 5], dtype=dtype)
        for number in (1, 1.0, 0, 2.5, 2, 0.0, -1, True, 2.5):
            out = torch.full((8,), 7.0)
            with recording():
                _times[(1,)](x, out, NUMBER=number)
            assert torch.equal(out, (x * number).repeat(2).float()), (dtype, number)


def test_functions_that_are_replaced_are_those_that_triton_calls() -> None:
    """One that it no longer called would have no effect, without a word."""
    calls = [node.func for node in ast.walk(ast.parse(inspect.getsource(stock))) if isinstance(node, ast.Call)]
    called = {getattr(function, "attr", getattr(function, "id", "")) for function in calls}
    assert called >= {"_patch_lang", "_patch_lang_tensor", "_patch_attr", "_get_np_dtype", "binary_op", "cast_impl"}


def test_repair_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 must be set"):
        repair()
