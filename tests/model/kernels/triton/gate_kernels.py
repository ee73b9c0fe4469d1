"""Kernels for the tests of benchmarks/compiled.py: a good one, and one for each rule that it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from benchmarks.kernel_cases.case import CompileCase


@triton.jit
def matmul(
    a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr
):
    """Row-major a [., K] times b [K, N]; a program has one tile [M, N]."""
    i = tl.program_id(0) * M + tl.arange(0, M)
    j = tl.arange(0, N)
    k = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + i[:, None] * K + (start + k)[None, :], mask=i[:, None] < ROWS, other=0.0)
        right = tl.load(b + (start + k)[:, None] * N + j[None, :])
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    tl.store(out + i[:, None] * N + j[None, :], accumulator, mask=i[:, None] < ROWS)


@triton.jit
def copy(x, out, STRIDE: tl.constexpr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * STRIDE)
    if ATOMIC:
        tl.atomic_add(out + i, value)
    else:
        tl.store(out + i, value)


@triton.jit
def impossible(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "no such block")
    tl.store(x, 0.0)


def compile_cases() -> Iterator[CompileCase]:
    def gemm(name: str, M: int, N: int, K: int, *, warps: int = 4, stages: int = 3, kind: str = "*bf16") -> CompileCase:
        constants: dict[str, Any] = {"M": M, "N": N, "BLOCK_K": K, "ROWS": 1000, "PRECISION": "ieee"}
        signature = {"a": kind, "b": kind, "out": "*fp32", "K": "i32"} | dict.fromkeys(constants, "constexpr")
        return CompileCase(
            name=name, kernel=matmul, signature=signature, constexprs=constants, num_warps=warps, num_stages=stages,
            is_gemm=True, divisible=frozenset({"K"}),
        )  # fmt: skip

    def copying(name: str, stride: int, *, atomic: bool) -> CompileCase:
        constants = {"STRIDE": stride, "ATOMIC": atomic, "BLOCK": 1024}
        signature = {"x": "*fp32", "out": "*fp32"} | dict.fromkeys(constants, "constexpr")
        return CompileCase(name=name, kernel=copy, signature=signature, constexprs=constants)

    yield gemm("good", 64, 64, 64)
    yield gemm("good again", 64, 64, 64)
    yield gemm("spills", 128, 256, 64, stages=2)
    yield gemm("shared", 128, 128, 64, stages=9)
    yield gemm("no tensor cores", 16, 16, 16, warps=1, kind="*fp32")
    yield copying("good copy", 1, atomic=False)
    yield copying("narrow", 3, atomic=False)
    yield copying("atomic", 1, atomic=True)
    yield CompileCase(
        name="impossible", kernel=impossible, signature={"x": "*fp32", "BLOCK": "constexpr"}, constexprs={"BLOCK": 1}
    )
