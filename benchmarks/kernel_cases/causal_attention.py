"""The cases of model/kernels/triton/causal_attention.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.kernel_cases.case import CompileCase, without_wide_heads
from model.kernels.triton.causal_attention import (
    SIZES,
    TILES,
    TILES_ON,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    tiles,
)

KERNELS = {"forward": forward_kernel, "queries": query_gradient_kernel}
OTHERS = 8
"""A major capability without tiles of its own."""
RANGES = ("first", "end")
"""int32, or None with memory."""
KINDS = dict.fromkeys(SIZES, "i32") | {"scale": "fp32"} | dict.fromkeys(("log_sum", "delta"), "*fp32")
"""Of what is the same whatever the dtype."""


def compile_cases() -> Iterator[CompileCase]:
    """Every class of widths, with documents; one with memory. Of lengths, heads, strides and a head's own width, which
    is a multiple of 8, machine code knows nothing."""
    for kind in ("bf16", "fp16"):
        for width in sorted(TILES, key=lambda width: abs(width - 128)) if kind == "bf16" else (128,):
            yield from _cases(width, kind, documents=True)
    yield from _cases(128, "bf16", documents=False)


def _cases(width: int, kind: str, *, documents: bool) -> Iterator[CompileCase]:
    for what in TILES[width]:
        kernel, name = KERNELS.get(what, key_gradient_kernel), f"{'document' if documents else 'memory'} attention"
        name = f"{name} {what} {width}"
        found = _case(f"{name} {kind}", kernel, kind, tiles(width, what, OTHERS), documents)
        taken = without_wide_heads(found.architectures, width)
        others = [major for major, *row in TILES_ON if row == [width, what]]
        yield replace(found, architectures=tuple(a for a in taken if a // 10 not in others))
        for major in others:
            found = _case(f"{name} on sm_{major}0 {kind}", kernel, kind, tiles(width, what, major), documents)
            yield replace(found, architectures=(10 * major,))


def _case(name: str, kernel: Any, kind: str, constants: dict[str, Any], documents: bool) -> CompileCase:
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    ranges = [name for name in RANGES if name in kernel.arg_names]
    constants |= {} if documents else dict.fromkeys(ranges)
    kinds = KINDS | dict.fromkeys(ranges, "*i32") | dict.fromkeys(constants, "constexpr")
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={n: kinds.get(n, f"*{kind}") for n in kernel.arg_names},
        constexprs=constants,
        num_warps=warps,
        num_stages=stages,
        is_gemm=True,
    )
