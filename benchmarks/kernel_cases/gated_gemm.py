"""The cases of model/kernels/triton/gated_gemm.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import GATED
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton.gated_gemm import (
    GATE_BLOCK,
    dense_gates_kernel,
    gate_gradient_kernel,
    gated_weight_gradient_kernel,
    gradient_tiles,
)


def compile_cases() -> Iterator[CompileCase]:
    """Gates of 2, 3 and 4 choices, and the gradient of the experts of both projections."""
    for k in (2, 3, 4):
        constants = {"K": k, "PADDED_K": triton.next_power_of_2(k), "BLOCK": GATE_BLOCK}
        load = 16 if k % 2 == 0 else 4  # rows of three are no vectors, and of an int64 only the low half is wanted
        pointers = {"index": "i64", "scores": "fp32", "gates": "fp32"}
        yield make_case(f"gated dense_gates k{k}", dense_gates_kernel, pointers, constants, load_bytes=load)
        pointers = {"index": "i64", "partial": "fp32", "grad_scores": "fp32"}
        yield make_case(f"gated gate_gradient k{k}", gate_gradient_kernel, pointers, constants, load_bytes=load)
    for dtype in TRITON_DTYPES:
        kind = TYPE_NAMES[dtype]
        pointers = {"wide": kind, "narrow": kind, "gates": "fp32", "grad_experts": kind}
        for d, h in GATED if dtype == torch.bfloat16 else [*GATED][:1]:
            for what, narrow_first in (("value", False), ("output", True)):
                constants = {"d": d, "h": h, "NARROW_FIRST": narrow_first}
                name = f"gated {what} grad_experts {d}x{h} {kind}"
                yield make_case(
                    name, gated_weight_gradient_kernel, pointers, constants, gradient_tiles(h, dtype),
                    load_bytes=row_load(d, h), tensor_cores=dtype != torch.float32,
                )  # fmt: skip
