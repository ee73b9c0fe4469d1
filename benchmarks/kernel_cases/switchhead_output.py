"""The cases of model/kernels/triton/switchhead_output.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import GATED
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton.switchhead_output import (
    backward_tiles,
    forward_tiles,
    output_backward_kernel,
    output_forward_kernel,
)


def compile_cases() -> Iterator[CompileCase]:
    """The gate-scaled kernels."""
    for dtype in TRITON_DTYPES:
        kind = TYPE_NAMES[dtype]
        pointers = dict.fromkeys(("a", "experts", "grad", "y", "grad_a"), kind) | {
            "gates": "fp32",
            "grad_gates": "fp32",
        }
        for d, h in GATED if dtype == torch.bfloat16 else [*GATED][:1]:
            for what, kernel, tiles in (
                ("forward", output_forward_kernel, forward_tiles(h, dtype)),
                ("backward", output_backward_kernel, backward_tiles(h, dtype)),
            ):
                yield make_case(
                    f"switchhead_output {what} {d}x{h} {kind}", kernel, pointers, {"d": d, "h": h}, tiles,
                    load_bytes=row_load(d, h), tensor_cores=dtype != torch.float32,
                )  # fmt: skip
