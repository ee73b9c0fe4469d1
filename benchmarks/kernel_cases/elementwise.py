"""The cases of model/kernels/triton: dropout.py, entropy.py, layer_norm.py and rope.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton

from benchmarks.kernel_cases.case import CompileCase, row_load
from benchmarks.kernel_cases.shipped import NORMS, ROTATED, SIGMA_MOE_ROUTERS
from model.kernels.triton import dropout, entropy, layer_norm, rope
from model.kernels.triton.gated_gemm import padded_experts


def compile_cases() -> Iterator[CompileCase]:
    """One launch each that reads and writes whole tensors."""
    yield from dropout_cases()
    yield from entropy_cases()
    yield from norm_cases()
    yield from rope_cases()


def dropout_cases() -> Iterator[CompileCase]:
    """Shapes decide nothing but whether a rank holds all columns: one machine code for all models."""
    options: dict[str, Any] = {"num_warps": dropout.WARPS, "divisible": frozenset({"num_values"})}
    index = {"sequence_index_ptr": "*i64"}
    for kind in ("bf16", "fp16", "fp32"):
        kinds = index | dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), f"*{kind}") | {"scale": "fp32"}
        for divided in (False, True):
            for residual in (False, True):
                constants = {"DIVIDED": divided, "BLOCK": dropout.BLOCK} | ({} if residual else {"residual_ptr": None})
                name = f"dropout{' residual' * residual}{' divided' * divided} {kind}"
                yield CompileCase.of(name, dropout.dropout_kernel, kinds, constants, **options)
    for divided in (False, True):
        kinds, constants = index | {"mask_ptr": "*i1"}, {"DIVIDED": divided, "BLOCK": dropout.BLOCK}
        # It loads nothing but the index of a sequence.
        name = f"keep_mask{' divided' * divided}"
        yield CompileCase.of(name, dropout.keep_mask_kernel, kinds, constants, load_bytes=8, **options)


def entropy_cases() -> Iterator[CompileCase]:
    """The routers of the feed-forward; logits are fp32 whatever the model's dtype."""
    kinds = dict.fromkeys(("logits_ptr", "grad_logits_ptr", "grad_value_ptr", "value_ptr"), "*fp32")
    kinds |= dict.fromkeys(("probability_ptr", "parts_ptr", "sum_ptr"), "*fp64") | {"weight": "fp32"}
    for E in sorted({E for _, _, E, _, _ in SIGMA_MOE_ROUTERS}):
        constants = {"E": E, "PADDED_E": padded_experts(E)}
        tile = constants | {"BLOCK": entropy.TILE // padded_experts(E)}
        parts = constants | {"ROWS": entropy.SUM_TILE // padded_experts(E)}
        for what, kernel, sizes, warps in (
            ("forward", entropy.probability_kernel, tile, entropy.WARPS),
            ("sum", entropy.entropy_kernel, parts, entropy.SUM_WARPS),
            ("backward", entropy.entropy_backward_kernel, tile, entropy.WARPS),
        ):
            yield CompileCase.of(f"entropy {what} E{E}", kernel, kinds, sizes, num_warps=warps)


def norm_cases() -> Iterator[CompileCase]:
    """Every width in bf16: by itself, and after the addition with or without dropout, as its configurations have it;
    one in fp16 and fp32."""
    for width, has_dropout in NORMS:
        yield from _norms(width, "bf16", has_dropout=has_dropout)
    for kind in ("fp16", "fp32"):
        yield from _norms(1024, kind, has_dropout=True)


def _norms(width: int, kind: str, *, has_dropout: bool) -> Iterator[CompileCase]:
    after = "after dropout" if has_dropout else "after a sum"
    forward, backward = layer_norm.norm_forward_kernel, layer_norm.norm_backward_kernel
    tiles, total = layer_norm.SUM_TILES, layer_norm.norm_sum_kernel
    index, branch = {"sequence_index_ptr": None}, {"grad_branch_ptr": None}
    sizes = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    names = {*forward.arg_names, *backward.arg_names, *total.arg_names}
    kinds = {n: f"*{kind}" for n in names if n.endswith("_ptr")} | dict.fromkeys(("scale", "epsilon"), "fp32")
    kinds |= dict.fromkeys(("mean_ptr", "rstd_ptr", "parts_ptr"), "*fp32") | {"sequence_index_ptr": "*i64"}
    # Of a row of 128 values in half precision each of a warp's threads has 4.
    load = min(row_load(width), 2 * triton.next_power_of_2(width) // (32 * layer_norm.warps(width)))
    for what, kernel, absent in (
        ("forward alone", forward, {"branch_ptr": None, "sum_ptr": None} | index),
        (f"forward {after}", forward, {} if has_dropout else index),
        ("backward alone", backward, {"grad_sum_ptr": None} | index | branch),
        (f"backward {after}", backward, {} if has_dropout else index | branch),
        # The residual stream goes on beside a block's first norm.
        *((("backward after a sum", backward, index | branch),) if has_dropout and kind == "bf16" else ()),
    ):
        name, warps = f"norm {what} {width} {kind}", layer_norm.warps(width)
        yield CompileCase.of(name, kernel, kinds, sizes | absent, num_warps=warps, load_bytes=load)
    sizes = {"WIDTH": width, "ROWS": tiles["rows"], "COLUMNS": tiles["columns"]}
    yield CompileCase.of(f"norm sum {width} {kind}", total, kinds, sizes, num_warps=tiles["warps"])


def rope_cases() -> Iterator[CompileCase]:
    """Every head of the configurations in bf16, one in fp16 and fp32; heads, strides and tokens decide nothing."""
    for width, half, kind in (*((*head, "bf16") for head in ROTATED), *((*ROTATED[0], k) for k in ("fp16", "fp32"))):
        kinds = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{kind}")
        kinds |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "direction": "fp32"}
        constants = rope.Sizes(width, half).constants(rope.TILE)
        load = math.gcd(16, 4 * half)  # a row of a table
        name = f"rotate {width} by {half} {kind}"
        yield CompileCase.of(name, rope.rotate_kernel, kinds, constants, num_warps=rope.WARPS, load_bytes=load)
