"""The cases of model/kernels/triton/logit_gradient.py."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernel_cases.case import CompileCase, make_case
from benchmarks.kernel_cases.shipped import ROUTERS, SIGMA_MOE_ROUTERS
from model.kernels.choice import MEASURED
from model.kernels.triton.gated_gemm import padded_experts
from model.kernels.triton.logit_gradient import TILE, logit_gradient_kernel


def compile_cases() -> Iterator[CompileCase]:
    """The routers that `auto` leaves to `dense` on CUDA. SwitchHead's has a gradient of scores alone."""
    narrowest = next(line.least for line in MEASURED if line.ops == ("route",))
    for shapes, has_logits in ((ROUTERS, False), (SIGMA_MOE_ROUTERS, True)):
        for d, R, E, k, _ in shapes:
            if d < narrowest:
                continue
            padded = padded_experts(E)
            constants = {"E": E, "K": k, "PADDED_E": padded, "HAS_LOGITS": has_logits, "HAS_SCORES": True}
            constants |= {"BLOCK": TILE // padded}
            pointers = dict.fromkeys(("grad_logits", "grad_scores", "scores"), "fp32")
            pointers |= {"index": "i64", "parts": "bf16"}
            # Of choices single numbers are loaded, of logits whole rows.
            yield make_case(
                f"logit gradient d{d} R{R} E{E} k{k}", logit_gradient_kernel, pointers, constants,
                load_bytes=16 if has_logits else 4,
            )  # fmt: skip
