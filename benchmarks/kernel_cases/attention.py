"""The cases of model/kernels/triton/causal_attention.py and relative_attention.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.kernel_cases.case import ARCHITECTURES, CompileCase, without_wide_heads
from model.kernels.triton import causal_attention, relative_attention

OTHERS = 8
"""A major capability without tiles of its own."""
RANGES = ("first", "end")
"""Of documents: int32, or None with memory."""
KINDS = {"scale": "fp32"} | dict.fromkeys(("log_sum", "delta"), "*fp32") | dict.fromkeys(RANGES, "*i32")
"""Of what is the same whatever the dtype."""


def compile_cases() -> Iterator[CompileCase]:
    """Every class of widths, with documents; one with memory; and Transformer-XL's. Of lengths, heads, strides and a
    head's own width, which is a multiple of 8, machine code knows nothing."""
    for kind in ("bf16", "fp16"):
        yield from _cases(causal_attention, "document attention", kind)
    yield from _cases(causal_attention, "memory attention", "bf16", [128])
    for kind in ("bf16", "fp16"):
        places = dict(relative_attention.PLACES)
        kernel = relative_attention.position_logits_kernel
        yield _case(relative_attention, f"relative attention places {kind}", kernel, kind, places)
        yield from _cases(relative_attention, "relative attention", kind)


def _cases(module: Any, name: str, kind: str, widths: Iterable[int] = ()) -> Iterator[CompileCase]:
    """At `widths`; without any at all of them in bf16, at 128 in fp16."""
    every = sorted(module.TILES, key=lambda width: abs(width - 128)) if kind == "bf16" else [128]
    kernels = {"forward": module.forward_kernel, "queries": module.query_gradient_kernel}
    for width in widths or every:
        for what in module.TILES[width]:
            kernel = kernels.get(what, module.key_gradient_kernel)
            own = [major for major, *row in module.TILES_ON if row == [width, what]]
            taken = tuple(a for a in without_wide_heads(ARCHITECTURES, width) if a // 10 not in own)
            on = {OTHERS: ("", taken)} | {major: (f" on sm_{major}0", (10 * major,)) for major in own}
            for major, (where, architectures) in on.items():
                title, tiles = f"{name} {what} {width}{where} {kind}", module.tiles(width, what, major)
                yield replace(_case(module, title, kernel, kind, tiles), architectures=architectures)


def _case(module: Any, name: str, kernel: Any, kind: str, tiles: dict[str, Any]) -> CompileCase:
    options = {option: tiles.pop(option) for option in ("num_warps", "num_stages")}
    absent = [name for name in RANGES if name in kernel.arg_names] if name.startswith("memory") else []
    kinds = dict.fromkeys(module.SIZES, "i32") | KINDS
    return CompileCase.of(name, kernel, kinds, tiles | dict.fromkeys(absent), f"*{kind}", is_gemm=True, **options)
