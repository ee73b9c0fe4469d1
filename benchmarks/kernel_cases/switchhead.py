"""The cases of model/kernels/triton that SwitchHead launches where it multiplies all experts, or sets of them:
gated_gemm.py, switchhead_value.py, switchhead_output.py, gated_rows.py and set_gemm.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from benchmarks.compiled_case import TENSOR_CORE
from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import GATED, GATED_ROWS, SETS
from model.kernels.backend import TRITON_DTYPES
from model.kernels.triton import gated_gemm, gated_rows, set_gemm, switchhead_output, switchhead_value
from model.kernels.triton.gated_gemm import GATE_BLOCK, padded_experts


def compile_cases() -> Iterator[CompileCase]:
    """Every shape in bf16, the first in fp16 and fp32."""
    yield from gate_cases()
    for dtype in TRITON_DTYPES:
        for d, h in GATED if dtype == torch.bfloat16 else [*GATED][:1]:
            yield from gated_cases(d, h, dtype)
        for h, k in GATED_ROWS if dtype == torch.bfloat16 else GATED_ROWS[:1]:
            yield from row_cases(h, k, TYPE_NAMES[dtype])
        for shape in SETS if dtype == torch.bfloat16 else SETS[:1]:
            yield from set_cases(*shape, dtype)


def gate_cases() -> Iterator[CompileCase]:
    """Of 2, 3 and 4 choices."""
    for k in (2, 3, 4):
        constants = {"K": k, "PADDED_K": triton.next_power_of_2(k), "BLOCK": GATE_BLOCK}
        load = 16 if k % 2 == 0 else 4  # rows of three are no vectors, and of an int64 only the low half is wanted
        pointers = {"index": "i64", "scores": "fp32", "gates": "fp32"}
        yield make_case(f"gated dense_gates k{k}", gated_gemm.dense_gates_kernel, pointers, constants, load_bytes=load)
        pointers = {"index": "i64", "partial": "fp32", "grad_scores": "fp32"}
        kernel = gated_gemm.gate_gradient_kernel
        yield make_case(f"gated gate_gradient k{k}", kernel, pointers, constants, load_bytes=load)


def gated_cases(d: int, h: int, dtype: torch.dtype) -> Iterator[CompileCase]:
    """The gate-scaled kernels of both projections, forward and backward, and the gradient of their experts."""
    kind, shape, E = TYPE_NAMES[dtype], {"d": d, "h": h}, GATED[d, h]
    name = f"{d}x{h} {kind}"
    options: dict[str, Any] = {"load_bytes": row_load(d, h), "tensor_cores": dtype != torch.float32}
    pointers = dict.fromkeys(("x", "experts", "grad", "v", "grad_x", "a", "y", "grad_a"), kind)
    pointers |= {"gates": "fp32", "grad_gates": "fp32"}
    tiles = switchhead_value.forward_tiles(h, dtype)
    shared = {sm: switchhead_value.shared_experts(E, tiles.columns, sm // 10) for sm in TENSOR_CORE}
    for number in sorted(set(shared.values()), reverse=True):
        of = tuple(sm for sm in shared if shared[sm] == number)
        where, constants = "" if 90 in of else " not on sm_90", shape | {"E": E, "UNROLL": number}
        title, kernel = f"switchhead_value forward{where} E{E} {name}", switchhead_value.value_forward_kernel
        yield replace(make_case(title, kernel, pointers, constants, tiles, **options), architectures=of)
    for what, kernel, tiles in (
        ("value backward", switchhead_value.value_backward_kernel, switchhead_value.backward_tiles(h, dtype)),
        ("output forward", switchhead_output.output_forward_kernel, switchhead_output.forward_tiles(h, dtype)),
        ("output backward", switchhead_output.output_backward_kernel, switchhead_output.backward_tiles(h, dtype)),
    ):
        yield make_case(f"switchhead_{what} {name}", kernel, pointers, shape, tiles, **options)
    pointers = {"wide": kind, "narrow": kind, "gates": "fp32", "grad_experts": kind}
    for what, narrow_first in (("value", False), ("output", True)):
        constants, kernel = shape | {"NARROW_FIRST": narrow_first}, gated_gemm.gated_weight_gradient_kernel
        tiles = gated_gemm.gradient_tiles(h, dtype)
        yield make_case(f"gated {what} grad_experts {name}", kernel, pointers, constants, tiles, **options)


def row_cases(h: int, k: int, kind: str) -> Iterator[CompileCase]:
    """What the four GEMM passes of the dense projections launch, whatever d_model and E."""
    pointers = dict.fromkeys(("products", "rows", "mixed", "chosen", "gated"), kind) | {
        "scores": "fp32",
        "index": "i64",
    }
    shape = {"width": h, "K": k, "PADDED_K": 1 << (k - 1).bit_length()} | gated_rows.tile(h, k)
    for what, kernel, flags in (
        ("value forward", gated_rows.gated_sum_kernel, {"KEEP": True, "DOT": False}),
        ("value backward", gated_rows.gated_spread_kernel, {"DOT": True}),
        ("output forward", gated_rows.gated_spread_kernel, {"DOT": False}),
        ("output backward", gated_rows.gated_sum_kernel, {"KEEP": False, "DOT": True}),
    ):
        # Without DOT its argument is one of the rows.
        kinds = pointers | {"grad_scores": "fp32" if flags["DOT"] else kind}
        # Single int64 numbers are gathered; rows are what wide loads are for.
        options: dict[str, Any] = {"load_bytes": row_load(h), "num_warps": gated_rows.WARPS}
        yield make_case(f"dense {what} {h} k{k} {kind}", kernel, kinds, shape | flags, **options)


def set_cases(d: int, h: int, H: int, E: int, k: int, dtype: torch.dtype) -> Iterator[CompileCase]:
    """What `kernels.backend=sets` launches."""
    kind = TYPE_NAMES[dtype]
    rows = ("rows", "experts", "mixed", "products", "wide", "gated", "grad_experts")
    pointers = dict.fromkeys(rows, kind) | {"scores": "fp32"} | dict.fromkeys(("order", "load", "index"), "i64")
    shape: dict[str, Any] = {"d": d, "h": h, "E": E, "K": k}
    project, gradient = shape | {"PADDED_K": 1 << (k - 1).bit_length()}, shape | {"PADDED_E": padded_experts(E)}
    options: dict[str, Any] = {"load_bytes": row_load(d, h), "tensor_cores": dtype != torch.float32}
    for capability, where, architectures in (((9, 0), "", (90,)), ((10, 0), " not on sm_90", (80, 100, 120))):
        tiles = set_gemm.project_tiles(h, k, dtype, capability), set_gemm.gradient_tiles(d, h, H * E, dtype, capability)
        for what, kernel, constants, own in (
            ("value forward", set_gemm.set_project_kernel, project | {"TRANSPOSED": False}, tiles[0]),
            ("output backward", set_gemm.set_project_kernel, project | {"TRANSPOSED": True}, tiles[0]),
            ("value grad_experts", set_gemm.set_gradient_kernel, gradient | {"NARROW_FIRST": False}, tiles[1]),
            ("output grad_experts", set_gemm.set_gradient_kernel, gradient | {"NARROW_FIRST": True}, tiles[1]),
        ):
            name = f"sets {what}{where} E{E} k{k} {d}x{h} {kind}"
            case = make_case(name, kernel, pointers, constants, own, **options)
            yield replace(case, architectures=architectures)
