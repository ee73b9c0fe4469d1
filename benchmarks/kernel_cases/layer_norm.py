"""The cases of model/kernels/triton/layer_norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton

from benchmarks.kernel_cases.case import CompileCase, row_load
from benchmarks.kernel_cases.shipped import NORMS
from model.kernels.triton.layer_norm import (
    SUM_TILES,
    norm_backward_kernel,
    norm_forward_kernel,
    norm_sum_kernel,
    warps,
)

FLOATS = ("scale", "epsilon")
WIDE = ("mean_ptr", "rstd_ptr", "parts_ptr")


def compile_cases() -> Iterator[CompileCase]:
    """Every width in bf16: by itself, and after the addition with or without dropout, as its configurations have it;
    one in fp16 and fp32."""
    for width, dropout in NORMS:
        yield from _cases(width, "bf16", dropout=dropout)
    for kind in ("fp16", "fp32"):
        yield from _cases(1024, kind, dropout=True)


def _cases(width: int, kind: str, *, dropout: bool) -> Iterator[CompileCase]:
    constants = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    after, name = ("after dropout" if dropout else "after a sum"), f"{width} {kind}"
    without = {} if dropout else {"sequence_index_ptr": None}
    alone = {"branch_ptr": None, "sum_ptr": None, "sequence_index_ptr": None}
    yield _case(f"norm forward alone {name}", norm_forward_kernel, kind, constants | alone)
    yield _case(f"norm forward {after} {name}", norm_forward_kernel, kind, constants | without)
    without = {} if dropout else {"sequence_index_ptr": None, "grad_branch_ptr": None}
    alone = {"grad_sum_ptr": None, "sequence_index_ptr": None, "grad_branch_ptr": None}
    yield _case(f"norm backward alone {name}", norm_backward_kernel, kind, constants | alone)
    yield _case(f"norm backward {after} {name}", norm_backward_kernel, kind, constants | without)
    if dropout and kind == "bf16":  # the residual stream goes on beside a block's first norm
        without = {"sequence_index_ptr": None, "grad_branch_ptr": None}
        yield _case(f"norm backward after a sum {name}", norm_backward_kernel, kind, constants | without)
    constants = {"WIDTH": width, "ROWS": SUM_TILES["rows"], "COLUMNS": SUM_TILES["columns"]}
    yield _case(f"norm sum {name}", norm_sum_kernel, kind, constants)


def _thread_bytes(width: int) -> int:
    """Of a row of 128 values in half precision each of a warp's threads has 4."""
    return 2 * triton.next_power_of_2(width) // (32 * warps(width))


def _case(name: str, kernel: Any, kind: str, constants: dict[str, Any]) -> CompileCase:
    width = constants["WIDTH"]
    kinds = {n: f"*{kind}" for n in kernel.arg_names if n.endswith("_ptr")} | dict.fromkeys(WIDE, "*fp32")
    kinds |= {"sequence_index_ptr": "*i64"} | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={n: kinds.get(n, "i32") for n in kernel.arg_names},
        constexprs=constants,
        num_warps=SUM_TILES["warps"] if kernel is norm_sum_kernel else warps(width),
        load_bytes=16 if kernel is norm_sum_kernel else min(row_load(width), _thread_bytes(width)),
    )
