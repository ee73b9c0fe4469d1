"""The cases of model/kernels/triton for slots that are sorted by expert: sorted_gemm.py, which SwitchHead and MoA
(expert_linear.py) launch, and sorted_slots.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import MOA, MOA_CHOICES, SORTED
from model.kernels.triton.gated_gemm import gradient_tiles, padded_experts
from model.kernels.triton.sorted_gemm import project_tiles, sorted_project_kernel, sorted_weight_gradient_kernel
from model.kernels.triton.sorted_slots import (
    COUNT_BLOCK,
    SORT_TILE,
    SUM_TILE,
    count_slots_kernel,
    mix_slots_kernel,
    place_slots_kernel,
    slot_stride,
    sum_slots_kernel,
)

SORTS = ((5, 2), (5, 3), (5, 4), (4, 2))
"""Experts and choices: a tensor-parallel rank's share of SwitchHead's or MoA's, and a shared selector's without memory.
"""


def compile_cases() -> Iterator[CompileCase]:
    """MoA's projections, SwitchHead's of 2 of 5 experts a head, forward and backward; and what sorts and sums slots."""
    for (d, h), E in MOA.items():
        # The order is the router's. Of its choices, 2 to 8, addresses alone know: 6 are compiled.
        wide, narrow = (d, 0, d, 6), (h, 0, h, 1)
        yield from projection_cases(f"expert_linear {d}x{h}", 6, E, wide, narrow, value_is_gated=False)
    for (d, h), H in SORTED.items():
        rows = (d, 0, d, 2), (H * h, h, h, 2)
        yield from projection_cases(f"sorted {d}x{h}", 2, 5, *rows, value_is_gated=True)
        if h == 112:
            yield from projection_cases(f"sorted {d}x{h} fp32", 2, 5, *rows, value_is_gated=True, dtype=torch.float32)
    yield from slot_cases()


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


def slot_cases() -> Iterator[CompileCase]:
    """The sorts of shipped models; sums, and mixtures of SwitchHead's and of MoA's slots."""
    pointers = dict.fromkeys(("index", "order", "load"), "i64") | {"counts": "i32"}
    for num_experts, k in SORTS:
        padded, padded_k = padded_experts(num_experts), triton.next_power_of_2(k)
        constants = {"K": k, "PADDED_K": padded_k, "PADDED_E": padded, "TOKENS": SORT_TILE // (padded_k * padded)}
        # Three numbers of 8 bytes: no row but the first begins at a multiple of 16, and only their low halves are read.
        load_bytes = 16 if k == padded_k else 4
        name = "" if (num_experts, k) == SORTS[0] else f" {k} of {num_experts}"
        yield make_case(
            f"sorted count_slots{name}", count_slots_kernel, pointers, constants, num_warps=8, load_bytes=load_bytes
        )
        constants = constants | {"COUNTS": COUNT_BLOCK}
        yield make_case(
            f"sorted place_slots{name}", place_slots_kernel, pointers, constants, num_warps=8, load_bytes=load_bytes
        )
    block = {"BLOCK_M": SUM_TILE[0], "BLOCK_N": SUM_TILE[1]}
    pointers = dict.fromkeys(("rows", "y", "products", "mixed"), "bf16") | {"scores": "fp32"}
    for width, choices in MOA_CHOICES.items():
        for k in choices:
            constants = {"width": width, "K": k, "stride": slot_stride(width)} | block
            yield make_case(f"sorted sum_slots {width} k{k}", sum_slots_kernel, pointers, constants)
    mixtures = [(h, 2, *what) for _, h in SORTED for what in ((True, False), (False, True), (True, True))]
    for width, k, mix, dot in (*mixtures, *((h, 1, True, True) for _, h in MOA)):
        constants = {"width": width, "K": k, "MIX": mix, "DOT": dot} | block
        name = f"sorted mix_slots {width} k{k}{' mix' * mix}{' dot' * dot}"
        kinds = pointers | {"grad_scores": "fp32" if dot else "bf16"}  # without, its argument is `mixed`
        yield make_case(name, mix_slots_kernel, kinds, constants, load_bytes=row_load(width))
