"""The cases of model/kernels/triton/set_gemm.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import SETS
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton.gated_gemm import padded_experts
from model.kernels.triton.set_gemm import gradient_tiles, project_tiles, set_gradient_kernel, set_project_kernel


def compile_cases() -> Iterator[CompileCase]:
    """What `kernels.backend=sets` launches for the shapes that it takes of SwitchHead's."""
    for dtype in TRITON_DTYPES:
        kind = TYPE_NAMES[dtype]
        rows = ("rows", "experts", "mixed", "products", "wide", "gated", "grad_experts")
        pointers = dict.fromkeys(rows, kind) | {"scores": "fp32"}
        pointers |= dict.fromkeys(("order", "load", "index"), "i64")
        for d, h, H, E, k in SETS if dtype == torch.bfloat16 else SETS[:1]:
            name = f"E{E} k{k} {d}x{h} {kind}"
            shape: dict[str, Any] = {"d": d, "h": h, "E": E, "K": k}
            options: dict[str, Any] = {"load_bytes": row_load(d, h), "tensor_cores": dtype != torch.float32}
            for capability, where, architectures in (((9, 0), "", (90,)), ((10, 0), " not on sm_90", (80, 100, 120))):
                project = project_tiles(h, k, dtype, capability)
                gradient = gradient_tiles(d, h, H * E, dtype, capability)
                padded = {"PADDED_K": 1 << (k - 1).bit_length()}, {"PADDED_E": padded_experts(E)}
                for what, kernel, constants, tiles in (
                    ("value forward", set_project_kernel, padded[0] | {"TRANSPOSED": False}, project),
                    ("output backward", set_project_kernel, padded[0] | {"TRANSPOSED": True}, project),
                    ("value grad_experts", set_gradient_kernel, padded[1] | {"NARROW_FIRST": False}, gradient),
                    ("output grad_experts", set_gradient_kernel, padded[1] | {"NARROW_FIRST": True}, gradient),
                ):
                    case = make_case(
                        f"sets {what}{where} {name}", kernel, pointers, shape | constants, tiles, **options
                    )
                    yield dataclasses.replace(case, architectures=architectures)
