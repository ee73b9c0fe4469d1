"""The cases of model/kernels/triton/entropy.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_cases.case import CompileCase
from benchmarks.kernel_cases.shipped import SIGMA_MOE_ROUTERS
from model.kernels.triton.entropy import (
    SUM_TILE,
    SUM_WARPS,
    TILE,
    WARPS,
    entropy_backward_kernel,
    entropy_kernel,
    probability_kernel,
)
from model.kernels.triton.gated_gemm import padded_experts

KINDS = {
    **dict.fromkeys(("logits_ptr", "grad_logits_ptr", "grad_value_ptr", "value_ptr"), "*fp32"),
    **dict.fromkeys(("probability_ptr", "parts_ptr", "sum_ptr"), "*fp64"),
    "weight": "fp32",
}


def compile_cases() -> Iterator[CompileCase]:
    """The routers of the feed-forward; logits are fp32 whatever the model's dtype."""
    for E in sorted({E for _, _, E, _, _ in SIGMA_MOE_ROUTERS}):
        constants = {"E": E, "PADDED_E": padded_experts(E)}
        tile = constants | {"BLOCK": TILE // padded_experts(E)}
        parts = constants | {"ROWS": SUM_TILE // padded_experts(E)}
        yield _case(f"entropy forward E{E}", probability_kernel, tile, WARPS)
        yield _case(f"entropy sum E{E}", entropy_kernel, parts, SUM_WARPS)
        yield _case(f"entropy backward E{E}", entropy_backward_kernel, tile, WARPS)


def _case(name: str, kernel: Any, constants: dict[str, Any], warps: int) -> CompileCase:
    kinds = KINDS | dict.fromkeys(constants, "constexpr")
    signature = {n: kinds.get(n, "i32") for n in kernel.arg_names}
    return CompileCase(name=name, kernel=kernel, signature=signature, constexprs=constants, num_warps=warps)
