"""The cases of model/kernels/triton/relative_attention.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.kernel_cases.case import CompileCase, without_wide_heads
from model.kernels.triton.relative_attention import (
    PLACES,
    SIZES,
    TILES,
    TILES_ON,
    forward_kernel,
    key_gradient_kernel,
    position_logits_kernel,
    query_gradient_kernel,
    tiles,
)

KERNELS = {"forward": forward_kernel, "queries": query_gradient_kernel}
WIDE = ("log_sum", "delta")
"""fp32 whatever the dtype."""


def compile_cases() -> Iterator[CompileCase]:
    """Every class of widths. Of lengths, heads and a head's own width, which is a multiple of 8, machine code knows
    nothing."""
    for kind in ("bf16", "fp16"):
        yield _case(f"relative attention places {kind}", position_logits_kernel, kind, dict(PLACES))
        for width in sorted(TILES, key=lambda width: abs(width - 128)) if kind == "bf16" else (128,):
            for what in TILES[width]:
                kernel, name = KERNELS.get(what, key_gradient_kernel), f"relative attention {what} {width}"
                found = _case(f"{name} {kind}", kernel, kind, tiles(width, what))
                taken = without_wide_heads(found.architectures, width)
                others = [major for major, *row in TILES_ON if row == [width, what]]
                yield replace(found, architectures=tuple(a for a in taken if a // 10 not in others))
                for major in others:
                    found = _case(f"{name} on sm_{major}0 {kind}", kernel, kind, tiles(width, what, major))
                    yield replace(found, architectures=(10 * major,))


def _case(name: str, kernel: Any, kind: str, constants: dict[str, int]) -> CompileCase:
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    kinds = dict.fromkeys(constants, "constexpr") | dict.fromkeys(SIZES, "i32") | dict.fromkeys(WIDE, "*fp32")
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={n: kinds.get(n, f"*{kind}") for n in kernel.arg_names},
        constexprs=constants,
        num_warps=warps,
        num_stages=stages,
        is_gemm=True,
    )
