"""The cases of model/kernels/triton/rope.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.kernel_cases.case import CompileCase
from benchmarks.kernel_cases.shipped import ROTATED
from model.kernels.triton.rope import TILE, WARPS, Sizes, rotate_kernel


def compile_cases() -> Iterator[CompileCase]:
    """Every head of the configurations in bf16, one in fp16 and fp32; heads, strides and tokens decide nothing."""
    for width, half in ROTATED:
        yield _case(width, half, "bf16")
    for kind in ("fp16", "fp32"):
        yield _case(*ROTATED[0], kind)


def _case(width: int, half: int, kind: str) -> CompileCase:
    constants = Sizes(width, half).constants(TILE)
    kinds = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{kind}")
    kinds |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "direction": "fp32"} | dict.fromkeys(constants, "constexpr")
    return CompileCase(
        name=f"rotate {width} by {half} {kind}",
        kernel=rotate_kernel,
        signature={name: kinds.get(name, "i32") for name in rotate_kernel.arg_names},
        constexprs=constants,
        num_warps=WARPS,
        load_bytes=math.gcd(16, 4 * half),  # a row of a table
    )
