"""The cases of model/kernels/triton/switchhead_value.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import GATED
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton.gated_gemm import unrolled_experts
from model.kernels.triton.switchhead_value import (
    MAX_UNROLLED,
    backward_tiles,
    forward_tiles,
    value_backward_kernel,
    value_forward_kernel,
)


def compile_cases() -> Iterator[CompileCase]:
    """The gate-scaled kernels."""
    for dtype in TRITON_DTYPES:
        kind = TYPE_NAMES[dtype]
        pointers = dict.fromkeys(("x", "experts", "grad", "v", "grad_x"), kind) | {
            "gates": "fp32",
            "grad_gates": "fp32",
        }
        for d, h in GATED if dtype == torch.bfloat16 else [*GATED][:1]:
            E, name = GATED[d, h], f"{d}x{h} {kind}"
            forward = {"d": d, "h": h, "E": E, "UNROLL": unrolled_experts(E, MAX_UNROLLED)}
            for what, kernel, constants, tiles in (
                (f"forward E{E}", value_forward_kernel, forward, forward_tiles(h, dtype)),
                ("backward", value_backward_kernel, {"d": d, "h": h}, backward_tiles(h, dtype)),
            ):
                yield make_case(
                    f"switchhead_value {what} {name}", kernel, pointers, constants, tiles,
                    load_bytes=row_load(d, h), tensor_cores=dtype != torch.float32,
                )  # fmt: skip
