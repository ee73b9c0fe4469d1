"""The cases of model/kernels/triton/sorted_slots.py."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from benchmarks.kernel_cases.case import CompileCase, make_case, row_load
from benchmarks.kernel_cases.shipped import MOA, MOA_CHOICES, SORTED
from model.kernels.triton.gated_gemm import padded_experts
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
