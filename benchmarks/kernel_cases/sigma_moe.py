"""The cases of model/kernels/triton/sigma_moe.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton

from benchmarks.kernel_cases.case import ARCHITECTURES, TYPE_NAMES, CompileCase
from benchmarks.kernel_cases.shipped import SIGMA_MOE
from model.kernels.triton.sigma_moe import (
    SUM_TILES,
    ExpertTiles,
    backward_tiles,
    expert_constants,
    mlp_constants,
    mlp_tiles,
    sum_constants,
    weight_constants,
    weight_splits,
    weight_tiles,
)
from model.kernels.triton.sigma_moe_kernels import (
    backward_kernel,
    forward_kernel,
    sum_kernel,
    weight_gradient_kernel,
)


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel in every tile shape that the published configurations take, in bf16 and fp16."""
    for name, (d, num_experts, G, k, num_tokens) in SIGMA_MOE.items():
        yield from _cases(f"{name} bf16", torch.bfloat16, d, num_experts, G, k, num_tokens * k)
    yield from _cases("259m fp16", torch.float16, *SIGMA_MOE["259m"][:4])
    yield from _cases("259m swiglu bf16", torch.bfloat16, *SIGMA_MOE["259m"][:4], swiglu=True)
    # Two experts of a rank in expert parallelism: a row is a token with one choice, and segments are split.
    yield from _cases("259m ep bf16", torch.bfloat16, 1024, 2, 128, 1)
    yield from _cases("259m tp bf16", torch.bfloat16, 1024, 16, 128, 4, total=32)  # half of the experts are here
    yield from _cases("259m fp32", torch.float32, *SIGMA_MOE["259m"][:4])


def _cases(
    name: str,
    dtype: torch.dtype,
    d: int,
    num_experts: int,
    G: int,
    k: int,
    num_rows: int = 8192,
    *,
    swiglu: bool = False,
    total: int = 0,
) -> Iterator[CompileCase]:
    half, width = f"*{TYPE_NAMES[dtype]}", 2 * G if swiglu else G
    kinds = dict.fromkeys(("scores_ptr", "grad_scores_ptr"), "*fp32") | dict.fromkeys(("order_ptr", "load_ptr"), "*i64")
    kinds["present_ptr"] = "*i8"
    present: dict[str, None] = {} if total else {"present_ptr": None}
    experts = expert_constants(total - num_experts if total else 0, num_experts, total or num_experts)

    def case(
        kernel: Any, what: str, constants: dict[str, Any], tiles: ExpertTiles | None, **special: str
    ) -> CompileCase:
        return CompileCase.of(
            f"sigma_moe {what} {name}",
            kernel,
            kinds | special,
            constants,
            half,
            num_warps=SUM_TILES["warps"] if tiles is None else tiles.warps,
            num_stages=3 if tiles is None else tiles.stages,
            registers=0 if tiles is None else tiles.registers,
            is_gemm=tiles is not None and dtype != torch.float32,
            # Rows of d = 412 half-precision numbers are 824 bytes; GEMMs load weights beside them.
            load_bytes=16 if d * dtype.itemsize % 16 == 0 or tiles is not None else 8,
        )

    row_stride = triton.cdiv(d, 8) * 8
    choices = (mlp_tiles(n * num_experts, num_experts, G, dtype, swiglu=swiglu) for n in (64, 512))
    for tiles in dict.fromkeys(choices):
        constants = mlp_constants("forward", tiles, d, G, k, row_stride, swiglu=swiglu) | experts
        yield case(forward_kernel, f"forward {tiles.rows} rows", constants | present, tiles)
        for back, where, architectures in by_architecture(partial(backward_tiles, tiles, d, G, swiglu=swiglu)):
            constants = mlp_constants("backward", back, d, G, k, row_stride, swiglu=swiglu) | experts
            found = case(backward_kernel, f"backward {back.rows} rows{where}", constants | present, back)
            yield replace(found, architectures=architectures)
    if k > 1:
        constants = sum_constants(d, k, triton.cdiv(G, tiles.hidden), row_stride)
        none = {"residual_ptr": None}
        yield case(sum_kernel, "sum", constants | present | none, None, num_tokens="i32")
        if not total:  # one rank has all experts
            yield case(sum_kernel, "sum and residual", constants | present, None, num_tokens="i32")
    for columns, first, what in ((width, False, "grad_up"), (G, True, "grad_down")):
        for tiles, where, architectures in by_architecture(partial(weight_tiles, columns, d, num_experts, dtype)):
            splits = weight_splits(tiles, num_rows, num_experts, columns, d)
            constants = weight_constants(tiles, d, columns, k, splits, width_first=first) | experts
            out = "*fp32" if splits > 1 else half
            found = case(weight_gradient_kernel, f"{what}{where}", constants, tiles, out_ptr=out)
            yield replace(found, architectures=architectures)


def by_architecture(
    tiles_of: Callable[..., ExpertTiles],
) -> list[tuple[ExpertTiles, str, tuple[int, ...]]]:
    """Tiles by `capability` -> tiles, what a case's name says of them, and the architectures that take them."""
    here, elsewhere = tiles_of(capability=(9, 0)), tiles_of(capability=(10, 0))
    if here == elsewhere:
        return [(here, "", ARCHITECTURES)]
    return [(here, "", (90,)), (elsewhere, " not on sm_90", tuple(a for a in ARCHITECTURES if a != 90))]
