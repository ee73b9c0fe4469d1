"""The parts between the GEMMs of SwitchHead's dense projections (model/kernels/dense): gated sums and gated spreads.

    gated_sum      mixed[p]    = sum over j of scores[p, j] * products[p, index[p, j]]
    gated_spread   gated[p, e] = scores[p, j] * rows[p] at e = index[p, j], zeros at the experts not chosen
    both           grad_scores[p, j] = <rows[p], the product of the j-th choice>

A pair p = n * H + head is a token at a head. Sums and gates are fp32, and every result is rounded once. Scores and
index [C, H, k] are read where they stand: value's and output's heads are routed together, and each has some of every
token's numbers.

Shape legend: C tokens, H heads, P = C H pairs, E experts of a head, k chosen experts, h head_dim.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.gated_gemm import column_tile
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.tiles import measured

CHOICES = ["H", "scores_stride", "index_stride"]
"""Arguments that are not worth machine code of their own."""


@triton.jit
def first_choice(pairs, stride, H, K: tl.constexpr):
    """Where the numbers of each pair begin in a tensor [C, H, K], `stride` from token to token."""
    token = pairs // H
    return token.to(tl.int64) * stride + (pairs - token * H) * K


@triton.jit(do_not_specialize=CHOICES)
def gated_sum_kernel(
    products,
    scores,
    index,
    rows,
    mixed,
    chosen,
    grad_scores,
    P,
    H,
    scores_stride,
    index_stride,
    E,
    width: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    KEEP: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """products [P, E, width], scores and index [C, H, K] -> mixed [P, width]; KEEP: chosen [P, K, width], the products
    of the choices; DOT: rows [P, width] -> grad_scores [P, K]. Of `products` the chosen rows alone are read, once."""
    pairs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pairs < P
    wide = pairs.to(tl.int64)
    scores += first_choice(pairs, scores_stride, H, K)
    index += first_choice(pairs, index_stride, H, K)
    choice = tl.arange(0, PADDED_K)
    similarity = tl.zeros((BLOCK_M, PADDED_K), dtype=tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (columns < width)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        row = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if DOT:
            row = tl.load(rows + wide[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(K):
            expert = tl.load(index + j, mask=inside, other=0)
            score = tl.load(scores + j, mask=inside, other=0.0).to(tl.float32)
            found = tl.load(products + (wide * E + expert)[:, None] * width + columns[None, :], mask=mask, other=0.0)
            if KEEP:
                tl.store(chosen + (wide * K + j)[:, None] * width + columns[None, :], found, mask=mask)
            product = found.to(tl.float32)
            total += product * score[:, None]
            if DOT:
                dot = tl.sum(product * row, axis=1)
                similarity += tl.where((choice == j)[None, :], dot[:, None], 0.0)
        tl.store(mixed + wide[:, None] * width + columns[None, :], total.to(mixed.dtype.element_ty), mask=mask)
    if DOT:
        places = grad_scores + wide[:, None] * K + choice[None, :]
        tl.store(places, similarity.to(grad_scores.dtype.element_ty), mask=inside[:, None] & (choice < K)[None, :])


@triton.jit(do_not_specialize=CHOICES)
def gated_spread_kernel(
    rows,
    scores,
    index,
    chosen,
    gated,
    grad_scores,
    P,
    H,
    scores_stride,
    index_stride,
    E,
    width: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rows [P, width], scores and index [C, H, K] -> gated [P, E, width], every element written once; DOT: chosen [P,
    K, width], the products of the choices -> grad_scores [P, K]."""
    pairs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pairs < P
    wide = pairs.to(tl.int64)
    choice = tl.arange(0, PADDED_K)
    slots, present = wide[:, None] * K + choice[None, :], inside[:, None] & (choice < K)[None, :]
    index += first_choice(pairs, index_stride, H, K)
    scores += first_choice(pairs, scores_stride, H, K)
    experts = tl.load(index[:, None] + choice[None, :], mask=present, other=-1).to(tl.int32)
    score = tl.load(scores[:, None] + choice[None, :], mask=present, other=0.0).to(tl.float32)
    similarity = tl.zeros((BLOCK_M, PADDED_K), dtype=tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (columns < width)[None, :]
        row = tl.load(rows + wide[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if DOT:
            for j in tl.static_range(K):
                place = chosen + (wide * K + j)[:, None] * width + columns[None, :]
                dot = tl.sum(tl.load(place, mask=mask, other=0.0).to(tl.float32) * row, axis=1)
                similarity += tl.where((choice == j)[None, :], dot[:, None], 0.0)
        for expert in range(E):
            # Choices of a pair differ: at most one addend is not zero.
            gate = tl.sum(tl.where(experts == expert, score, 0.0), axis=1)
            place = gated + (wide * E + expert)[:, None] * width + columns[None, :]
            tl.store(place, (row * gate[:, None]).to(gated.dtype.element_ty), mask=mask)
    if DOT:
        tl.store(grad_scores + slots, similarity.to(grad_scores.dtype.element_ty), mask=present)


TILE, WARPS = 2048, 4
"""Numbers of a program's tile: 16 a thread, two loads of 16 bytes in half precision."""


def tile(width: int, k: int) -> dict[str, int]:
    """Block sizes for rows of `width` and k choices. Of four, 64 rows of 132 numbers spill on sm_100; of three, rows of
    171, which are loaded number by number; of two, 16 rows of 197 take 250 registers a thread."""
    columns = column_tile(width)
    is_half = k > 3 or width % 2 == 1
    return {"BLOCK_M": TILE // columns // (2 if is_half else 1), "BLOCK_N": columns}


def launch_options(kernel: str, rows: Tensor, E: int, k: int, **flags: bool) -> dict[str, int]:
    """Block sizes and warps of a launch for `rows` [P, h]: what was measured, else `tile`."""
    shape = {"E": E, "k": k, "h": rows.shape[1]} | {name: int(flag) for name, flag in flags.items()}
    found = measured(kernel, rows.dtype, **shape)
    if found is None:
        return tile(rows.shape[1], k) | {"num_warps": WARPS}
    return {"BLOCK_M": found["rows"], "BLOCK_N": found["columns"], "num_warps": found["warps"]}


def _choices(scores: Tensor, index: Tensor) -> dict[str, Any]:
    """Arguments of a launch. What does not have the numbers of a token side by side is copied."""
    scores, index = (t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (scores, index))
    strides = {"scores_stride": scores.stride(0), "index_stride": index.stride(0)}
    return {"scores": scores, "index": index, "H": index.shape[1], "K": index.shape[2]} | strides


@on_its_device
def gated_sum(
    products: Tensor,
    scores: Tensor,
    index: Tensor,
    mixed: Tensor,
    *,
    chosen: Tensor | None = None,
    dot: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills `mixed` [P, h] from `products` [P, E, h], `scores` and `index` [C, H, k]; where given, `chosen` [P, k, h]
    with the products of the choices, and of `dot` (rows [P, h], grad_scores [C, H, k]) the second. All but scores and
    index are contiguous."""
    (P, E, h), k = products.shape, index.shape[2]
    rows, grad_scores = dot or (products, mixed)
    options = launch_options("gated_sum", mixed, E, k, keep=chosen is not None, dot=dot is not None)
    gated_sum_kernel[(triton.cdiv(P, options["BLOCK_M"]),)](
        products=products,
        **_choices(scores, index),
        rows=rows,
        mixed=mixed,
        chosen=mixed if chosen is None else chosen,
        grad_scores=grad_scores,
        P=P,
        E=E,
        width=h,
        PADDED_K=triton.next_power_of_2(k),
        KEEP=chosen is not None,
        DOT=dot is not None,
        **options,
    )


@on_its_device
def gated_spread(
    rows: Tensor,
    scores: Tensor,
    index: Tensor,
    gated: Tensor,
    *,
    dot: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills `gated` [P, E, h] from `rows` [P, h], `scores` and `index` [C, H, k]; where given, of `dot` (chosen [P, k,
    h], grad_scores [C, H, k]) the second. All but scores and index are contiguous."""
    (P, E, h), k = gated.shape, index.shape[2]
    chosen, grad_scores = dot or (rows, gated)
    options = launch_options("gated_spread", rows, E, k, dot=dot is not None)
    gated_spread_kernel[(triton.cdiv(P, options["BLOCK_M"]),)](
        rows=rows,
        **_choices(scores, index),
        chosen=chosen,
        gated=gated,
        grad_scores=grad_scores,
        P=P,
        E=E,
        width=h,
        PADDED_K=triton.next_power_of_2(k),
        DOT=dot is not None,
        **options,
    )
