"""The cases of model/kernels/triton/expert_linear.py."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernel_cases.case import CompileCase
from benchmarks.kernel_cases.shipped import MOA
from benchmarks.kernel_cases.sorted_gemm import projection_cases


def compile_cases() -> Iterator[CompileCase]:
    """MoA's projections; the order is the router's. Of its choices, 2 to 8, addresses alone know: 6 are compiled."""
    for (d, h), E in MOA.items():
        wide, narrow = (d, 0, d, 6), (h, 0, h, 1)
        yield from projection_cases(f"expert_linear {d}x{h}", 6, E, wide, narrow, value_is_gated=False)
