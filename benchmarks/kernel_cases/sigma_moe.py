"""The cases of model/kernels/triton/sigma_moe.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase
from benchmarks.kernel_cases.shipped import SIGMA_MOE
from model.kernels.triton.sigma_moe import (
    SUM_TILES,
    ExpertTiles,
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
        signature = {n: kinds.get(n, half) for n in kernel.arg_names} | dict.fromkeys(constants, "constexpr") | special
        warps, stages = (tiles.warps, tiles.stages) if tiles is not None else (SUM_TILES["warps"], 3)
        return CompileCase(
            name=f"sigma_moe {what} {name}",
            kernel=kernel,
            signature=signature,
            constexprs=constants,
            num_warps=warps,
            num_stages=stages,
            is_gemm=tiles is not None and dtype != torch.float32,
            # Rows of d = 412 half-precision numbers are 824 bytes; GEMMs load weights beside them.
            load_bytes=16 if d * dtype.itemsize % 16 == 0 or tiles is not None else 8,
        )

    choices = (mlp_tiles(n * num_experts, num_experts, G, dtype, swiglu=swiglu) for n in (64, 512))
    for tiles in dict.fromkeys(choices):
        for kernel, what in ((forward_kernel, "forward"), (backward_kernel, "backward")):
            constants = mlp_constants(tiles, d, G, k, triton.cdiv(d, 8) * 8, swiglu=swiglu) | experts
            yield case(kernel, f"{what} {tiles.rows} rows", constants | present, tiles)
    if k > 1:
        constants = sum_constants(d, k, triton.cdiv(G, tiles.hidden), triton.cdiv(d, 8) * 8)
        none = {"residual_ptr": None}
        yield case(sum_kernel, "sum", constants | present | none, None, num_tokens="i32")
        if not total:  # one rank has all experts
            yield case(sum_kernel, "sum and residual", constants | present, None, num_tokens="i32")
    for columns, first, what in ((width, False, "grad_up"), (G, True, "grad_down")):
        tiles = weight_tiles(columns, dtype)
        splits = weight_splits(tiles, num_rows, num_experts, columns, d)
        constants = weight_constants(tiles, d, columns, k, splits, width_first=first) | experts
        out = "*fp32" if splits > 1 else half
        yield case(weight_gradient_kernel, what, constants, tiles, out_ptr=out)
