"""The cases of model/kernels/triton/switchhead_value.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.compiled_case import TENSOR_CORE
from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import GATED
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton.switchhead_value import (
    backward_tiles,
    forward_tiles,
    shared_experts,
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
            options: dict[str, Any] = {"load_bytes": row_load(d, h), "tensor_cores": dtype != torch.float32}
            tiles = forward_tiles(h, dtype)
            shared = {sm: shared_experts(E, tiles.columns, sm // 10) for sm in TENSOR_CORE}
            for number in sorted(set(shared.values()), reverse=True):
                of = tuple(sm for sm in shared if shared[sm] == number)
                where = "" if 90 in of else " not on sm_90"
                case = make_case(
                    f"switchhead_value forward{where} E{E} {name}", value_forward_kernel, pointers,
                    {"d": d, "h": h, "E": E, "UNROLL": number}, tiles, **options,
                )  # fmt: skip
                yield replace(case, architectures=of)
            yield make_case(
                f"switchhead_value backward {name}", value_backward_kernel, pointers, {"d": d, "h": h},
                backward_tiles(h, dtype), **options,
            )  # fmt: skip
