"""A router's entropy regulariser and the sums of its probabilities in Triton: two launches forward, one backward.

    share = softmax(logits), value = weight * sum_e log(p_e) mean_n share[n, e], probability_sum[e] = sum_n share[n, e]

Logits are read once forward and once backward, which writes their gradient: 12 bytes a token and expert. Sums over
tokens are fp64: a number of programs that depends on the shape alone takes as many tokens each, and a second launch
adds their sums up in order. No atomics. Shape legend: N tokens, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.gated_gemm import padded_experts
from model.kernels.triton.launch import on_its_device

TILE, WARPS = 2048, 8
"""Logits of a tile, 8 a thread: with 16, and their sums in fp64, registers do not suffice on sm_80."""
PROGRAMS = 128
"""At most so many share the tokens: about one for each SM of an H100, and as many sums for the second launch."""
SUM_TILE, SUM_WARPS = 2048, 8
"""Of the sum over programs: 8 numbers of fp64 a thread."""
COUNTS = ["num_tokens", "num_tiles", "num_parts"]
"""Arguments that are not worth machine code of their own."""


@triton.jit
def softmax(logits, expert, E: tl.constexpr):
    """Over the E experts of each row of `logits` [BLOCK, PADDED_E] fp32; 0 behind them."""
    logits = tl.where((expert < E)[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def log_probability(probability_ptr, expert, E: tl.constexpr):
    """[PADDED_E] fp32 of probabilities [E] fp64: an expert that was never likely has the log of 1e-30. A NaN stays."""
    p = tl.load(probability_ptr + expert, mask=expert < E, other=1.0).to(tl.float32)
    return tl.log(tl.where(p < 1e-30, 1e-30, p))


@triton.jit(do_not_specialize=COUNTS)
def probability_kernel(
    logits_ptr, parts_ptr, num_tokens, num_tiles,
    E: tl.constexpr, PADDED_E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of softmax(logits [N, E]) over `num_tiles` tiles of BLOCK tokens -> a row of parts [programs, E] fp64."""
    program = tl.program_id(0)
    expert = tl.arange(0, PADDED_E)
    total = tl.zeros((BLOCK, PADDED_E), tl.float64)
    for number in tl.range(0, num_tiles, num_stages=3):
        token = (program * num_tiles + number) * BLOCK + tl.arange(0, BLOCK)
        inside = (token < num_tokens)[:, None] & (expert < E)[None, :]
        place = token.to(tl.int64)[:, None] * E + expert[None, :]
        logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, softmax(logits, expert, E), 0.0).to(tl.float64)
    tl.store(parts_ptr + program * E + expert, tl.sum(total, 0), mask=expert < E)


@triton.jit(do_not_specialize=COUNTS)
def entropy_kernel(
    parts_ptr, probability_ptr, value_ptr, sum_ptr, num_parts, num_tokens, weight,
    E: tl.constexpr, PADDED_E: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program: the sum over parts [num_parts, E] fp64, and the regulariser fp32 with its `weight`."""
    expert = tl.arange(0, PADDED_E)
    total = tl.zeros((ROWS, PADDED_E), tl.float64)
    for first in tl.range(0, num_parts, ROWS, num_stages=3):
        part = first + tl.arange(0, ROWS)
        inside = (part < num_parts)[:, None] & (expert < E)[None, :]
        total += tl.load(parts_ptr + part[:, None] * E + expert[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    tl.store(sum_ptr + expert, result, mask=expert < E)
    terms = log_probability(probability_ptr, expert, E).to(tl.float64) * result
    value = tl.sum(terms, 0) / num_tokens.to(tl.float64) * weight
    tl.store(value_ptr, value.to(tl.float32))


@triton.jit(do_not_specialize=COUNTS)
def entropy_backward_kernel(
    grad_value_ptr, logits_ptr, probability_ptr, grad_logits_ptr, num_tokens, weight,
    E: tl.constexpr, PADDED_E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad_logits = grad_value * weight / N * share * (log p - sum_e share log p) of BLOCK tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED_E)
    inside = (token < num_tokens)[:, None] & (expert < E)[None, :]
    place = token.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    share = softmax(logits, expert, E)
    logs = log_probability(probability_ptr, expert, E)[None, :]
    scale = tl.load(grad_value_ptr).to(tl.float32) * weight / num_tokens.to(tl.float32)
    grad = scale * share * (logs - tl.sum(share * logs, 1)[:, None])
    tl.store(grad_logits_ptr + place, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------------------------- host


def tokens_each(num_tokens: int, block: int) -> tuple[int, int]:
    """Programs of the forward pass of one token or more, and tiles of `block` tokens of each."""
    num_tiles = triton.cdiv(triton.cdiv(num_tokens, block), PROGRAMS)
    return triton.cdiv(num_tokens, num_tiles * block), num_tiles


@on_its_device
def entropy(logits: Tensor, probability: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """As `model.kernels.ops.elementwise._entropy`."""
    (N, E), device = logits.shape, logits.device
    if N == 0:  # the mean of no tokens
        return logits.new_full((), torch.nan, dtype=torch.float32), logits.new_zeros(E, dtype=torch.float64)
    constants = {"E": E, "PADDED_E": padded_experts(E)}
    block, rows = (max(1, tile // constants["PADDED_E"]) for tile in (TILE, SUM_TILE))
    num_parts, num_tiles = tokens_each(N, block)
    parts = torch.empty((num_parts, E), dtype=torch.float64, device=device)
    value = torch.empty((), dtype=torch.float32, device=device)
    probability_sum = torch.empty(E, dtype=torch.float64, device=device)
    probability_kernel[(num_parts,)](
        logits.contiguous(), parts, num_tokens=N, num_tiles=num_tiles, **constants, BLOCK=block, num_warps=WARPS
    )
    entropy_kernel[(1,)](
        parts, probability.contiguous(), value, probability_sum, num_parts=num_parts, num_tokens=N, weight=weight,
        **constants, ROWS=rows, num_warps=SUM_WARPS,
    )  # fmt: skip
    return value, probability_sum


@on_its_device
def entropy_backward(grad_value: Tensor, logits: Tensor, probability: Tensor, weight: float) -> Tensor:
    """As `model.kernels.ops.elementwise._entropy_backward`."""
    (N, E), padded = logits.shape, padded_experts(logits.shape[1])
    block = max(1, TILE // padded)
    grad_logits = torch.empty((N, E), dtype=logits.dtype, device=logits.device)
    if N > 0:
        entropy_backward_kernel[(triton.cdiv(N, block),)](
            grad_value, logits.contiguous(), probability.contiguous(), grad_logits, num_tokens=N, weight=weight,
            E=E, PADDED_E=padded, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return grad_logits
