"""The cases of model/kernels/triton/sorted_gemm.py for SwitchHead; expert_linear.py beside it has those for MoA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import SORTED
from model.kernels.triton.gated_gemm import gradient_tiles, padded_experts
from model.kernels.triton.sorted_gemm import project_tiles, sorted_project_kernel, sorted_weight_gradient_kernel
from model.kernels.triton.sorted_slots import slot_stride


def compile_cases() -> Iterator[CompileCase]:
    """SwitchHead's projections of 2 of 5 experts a head, forward and backward."""
    for (d, h), H in SORTED.items():
        rows = (d, 0, d, 2), (H * h, h, h, 2)
        yield from projection_cases(f"sorted {d}x{h}", 2, 5, *rows, value_is_gated=True)
        if h == 112:
            yield from projection_cases(f"sorted {d}x{h} fp32", 2, 5, *rows, value_is_gated=True, dtype=torch.float32)


def projection_cases(
    name: str,
    k: int,
    E: int,
    wide: tuple[int, ...],
    narrow: tuple[int, ...],
    *,
    value_is_gated: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[CompileCase]:
    """Value and output, forward and backward. `wide` and `narrow`: stride, stride of routers, width and divisor of the
    rows. The wide rows that value's backward pass and output's forward pass write are
    scaled by gates, value's only if it has any (SwitchHead; not expert_linear)."""
    names = ("rows", "weights", "out", "wide", "narrow", "grad_weights")
    pointers = dict.fromkeys(names, TYPE_NAMES[dtype]) | {"order": "i64", "load": "i64"}
    load, tensor_cores = row_load(wide[2], narrow[2]), dtype != torch.float32
    common: dict[str, Any] = {"k": k, "PADDED_E": padded_experts(E)}
    for what, source, target, transposed, gated in (
        ("value", wide, narrow, False, False),
        ("value backward", narrow, wide, True, value_is_gated),
        ("output", narrow, wide, False, True),
        ("output backward", wide, narrow, True, False),
    ):
        constants = common | dict(zip(("row_stride", "router_stride", "inner_width", "divide"), source, strict=True))
        stride = slot_stride(target[2]) if target is wide else target[2]
        constants |= {"width": target[2], "out_stride": stride, "TRANSPOSED": transposed, "GATED": gated}
        # Without gates their argument is the rows.
        kinds = pointers | {"gates": "fp32" if gated else pointers["rows"]}
        yield make_case(
            f"{name} {what}", sorted_project_kernel, kinds, constants, project_tiles(target[2], dtype),
            load_bytes=load, tensor_cores=tensor_cores,
        )  # fmt: skip
    for what, narrow_first, gated in (("value", False, value_is_gated), ("output", True, True)):
        constants = common | {"d": wide[2], "h": narrow[2], "NARROW_FIRST": narrow_first, "GATED": gated}
        for side, rows in (("wide", wide), ("narrow", narrow)):
            constants |= {f"{side}_stride": rows[0], f"{side}_router_stride": rows[1], f"{side}_divide": rows[3]}
        kinds = pointers | {"gates": "fp32" if gated else pointers["rows"]}
        yield make_case(
            f"{name} {what} grad_experts", sorted_weight_gradient_kernel, kinds, constants,
            gradient_tiles(narrow[2], dtype), load_bytes=load, tensor_cores=tensor_cores,
        )  # fmt: skip
