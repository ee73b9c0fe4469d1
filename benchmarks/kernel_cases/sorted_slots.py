"""The cases of model/kernels/triton/sorted_slots.py."""

from __future__ import annotations

from collections.abc import Iterator

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


def compile_cases() -> Iterator[CompileCase]:
    """The sort for 2 of 5 experts; sums, and mixtures of SwitchHead's and of MoA's slots."""
    padded = padded_experts(5)
    constants = {"K": 2, "PADDED_K": 2, "PADDED_E": padded, "TOKENS": SORT_TILE // (2 * padded)}
    pointers = dict.fromkeys(("index", "order", "load"), "i64") | {"counts": "i32"}
    yield make_case("sorted count_slots", count_slots_kernel, pointers, constants, num_warps=8)
    yield make_case(
        "sorted place_slots", place_slots_kernel, pointers, constants | {"COUNTS": COUNT_BLOCK}, num_warps=8
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
