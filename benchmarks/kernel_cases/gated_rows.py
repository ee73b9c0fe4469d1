"""The cases of model/kernels/triton/gated_rows.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import GATED_ROWS
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton.gated_rows import WARPS, gated_spread_kernel, gated_sum_kernel, tile


def compile_cases() -> Iterator[CompileCase]:
    """What the four GEMM passes of SwitchHead's dense projections launch, whatever d_model and E."""
    for dtype in TRITON_DTYPES:
        kind = TYPE_NAMES[dtype]
        row_names = ("products", "rows", "mixed", "chosen", "gated")
        pointers = dict.fromkeys(row_names, kind) | {"scores": "fp32", "index": "i64"}
        for h, k in GATED_ROWS if dtype == torch.bfloat16 else GATED_ROWS[:1]:
            shape = {"width": h, "K": k, "PADDED_K": 1 << (k - 1).bit_length()} | tile(h, k)
            for what, kernel, flags in (
                ("value forward", gated_sum_kernel, {"KEEP": True, "DOT": False}),
                ("value backward", gated_spread_kernel, {"DOT": True}),
                ("output forward", gated_spread_kernel, {"DOT": False}),
                ("output backward", gated_sum_kernel, {"KEEP": False, "DOT": True}),
            ):
                # Without DOT its argument is one of the rows.
                kinds = pointers | {"grad_scores": "fp32" if flags["DOT"] else kind}
                # Single int64 numbers are gathered; rows are what wide loads are for.
                yield make_case(
                    f"dense {what} {h} k{k} {kind}",
                    kernel,
                    kinds,
                    shape | flags,
                    load_bytes=row_load(h),
                    num_warps=WARPS,
                )
