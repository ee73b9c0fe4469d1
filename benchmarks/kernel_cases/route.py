"""The cases of model/kernels/triton/route.py and logit_gradient.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase, make_case
from benchmarks.kernel_cases.shipped import MOA, MOA_CHOICES, ROUTERS, SIGMA_MOE_ROUTERS, UNREGULARISED_ROUTERS
from model.kernels.choice import MEASURED
from model.kernels.triton.gated_gemm import padded_experts
from model.kernels.triton.logit_gradient import TILE, logit_gradient_kernel
from model.kernels.triton.route import (
    ADD_UP,
    COUNTS,
    GRADIENT_OPTIONS,
    OPTIONS,
    RouterTiles,
    add_up_kernel,
    choose_kernel,
    gradients_kernel,
    place_kernel,
    precision,
)


def compile_cases() -> Iterator[CompileCase]:
    """Every router of the shipped configurations in bf16; one of SwitchHead and one of sigma-MoE in fp16 and fp32."""
    moa = [(d, 1, E, k, (0,)) for (d, _), E in MOA.items() for k in MOA_CHOICES[d]]
    # Which of a routing's results a gradient reaches: scores of SwitchHead, logits of MoA's softmax, sigma-MoE's both.
    for shapes, has_logits, has_scores in (
        (ROUTERS, False, True), (moa, True, False), (SIGMA_MOE_ROUTERS, True, True)
    ):  # fmt: skip
        for shape in shapes:
            yield from _cases(shape, torch.bfloat16, has_logits=has_logits, has_scores=has_scores)
        for dtype in (torch.float16, torch.float32) if has_scores else ():
            yield from _cases(shapes[0], dtype, has_logits=has_logits, has_scores=has_scores)
    for unregularised in UNREGULARISED_ROUTERS:
        yield from _cases(unregularised, torch.bfloat16, has_logits=False, has_scores=True, which=" of scores alone")
    yield from logit_gradient_cases()


def _cases(
    shape: tuple[int, int, int, int, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    has_logits: bool,
    has_scores: bool,
    which: str = "",
) -> Iterator[CompileCase]:
    d, R, E, k, dropouts = shape
    tiles, kind, name = RouterTiles.of(R, E, dtype), TYPE_NAMES[dtype], f"d{d} R{R} E{E} k{k} {TYPE_NAMES[dtype]}"
    tile = {"TOKENS": tiles.tokens, "ROUTERS": tiles.routers, "EXPERTS": tiles.experts}
    load = math.gcd(16, d * dtype.itemsize)
    # Beside 128 columns there are 32 tokens, too few rows for HGMMA and UTC*MMA: it is HMMA everywhere. 64 spill.
    is_few = tiles.tokens < 64 and dtype != torch.float32
    for dropout in dropouts:
        constants = {"K": k, "K_PADDED": triton.next_power_of_2(k), "DROPOUT": dropout, "DEPTH": tiles.depth, **tile}
        pointers = {"x": kind, "weight": kind, "keep": "i1" if dropout else "fp32", "logits": "fp32", "scores": "fp32"}
        pointers |= {"index": "i64", "counts": "i32"}
        yield make_case(
            f"route choose {name} dropout {dropout}", choose_kernel, pointers, {"d": d} | constants,
            launch=tiles.options, is_gemm=dtype != torch.float32 and not is_few, load_bytes=load,
        )  # fmt: skip
    pointers = {"grad_logits": "fp32", "grad_scores": "fp32", "x": kind, "weight": kind, "scores": "fp32"}
    groups = triton.cdiv(R, tiles.routers)
    pointers |= {"index": "i64", "grad_x": kind if groups == 1 else "fp32", "partial": "fp32"}
    constants = {"K": k, "HAS_LOGITS": has_logits, "HAS_SCORES": has_scores, **precision(dtype), **tile}
    constants |= {"TOKENS": tiles.gradient_tokens, "DEPTH": tiles.gradient_depth}
    yield make_case(
        f"route gradients {name}{which}", gradients_kernel, pointers, {"d": d} | constants,
        launch=GRADIENT_OPTIONS, is_gemm=dtype == torch.bfloat16 and not is_few, load_bytes=load,
    )  # fmt: skip
    pointers = {"partial": "fp32", "total": kind}
    yield make_case(f"route add_up {kind}", add_up_kernel, pointers, {"BLOCK": ADD_UP}, launch=OPTIONS)
    if dtype == torch.bfloat16 or tiles.tokens != RouterTiles.of(R, E, torch.bfloat16).tokens:
        pointers = {"index": "i64", "counts": "i32", "load": "i64", "order": "i64"}
        # Gathers single int64 numbers, one per token and router.
        name, constants = f"route place R{R} E{E} k{k} {tiles.tokens} tokens", {"K": k, "BLOCKS": COUNTS, **tile}
        yield make_case(name, place_kernel, pointers, constants, launch=tiles.options, load_bytes=8)


def logit_gradient_cases() -> Iterator[CompileCase]:
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
