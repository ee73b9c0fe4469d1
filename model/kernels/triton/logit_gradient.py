"""The gradient of a router's logits as the sum of two bf16 numbers, the operand of model/kernels/dense/route.py.

    grad = grad_logits + score (1 - score) grad_score at the chosen experts        high = bf16(grad), low = bf16(rest)

One launch; in torch's operators it is nine, each over numbers of all experts. Shape legend: N tokens, R routers, E
experts of a router, k chosen experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.gated_gemm import padded_experts
from model.kernels.triton.launch import on_its_device


@triton.jit
def logit_gradient_kernel(
    grad_logits,
    grad_scores,
    scores,
    index,
    parts,
    pairs,
    R,
    E: tl.constexpr,
    K: tl.constexpr,
    PADDED_E: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_logits [N, R, E], grad_scores and scores [N, R, K] fp32, index [N, R, K] -> parts [N, 2, R, E] bf16. A pair
    p = n * R + router."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    experts = tl.arange(0, PADDED_E)
    mask = inside[:, None] & (experts < E)[None, :]
    own = pair.to(tl.int64)
    grad = tl.zeros((BLOCK, PADDED_E), dtype=tl.float32)
    if HAS_LOGITS:
        grad = tl.load(grad_logits + own[:, None] * E + experts[None, :], mask=mask, other=0.0)
    if HAS_SCORES:
        for j in tl.static_range(K):
            expert = tl.load(index + own * K + j, mask=inside, other=-1).to(tl.int32)
            score = tl.load(scores + own * K + j, mask=inside, other=0.0)
            found = tl.load(grad_scores + own * K + j, mask=inside, other=0.0) * score * (1.0 - score)
            grad += tl.where(expert[:, None] == experts[None, :], found[:, None], 0.0)
    high = grad.to(parts.dtype.element_ty)
    low = (grad - high.to(tl.float32)).to(parts.dtype.element_ty)
    place = parts + ((own // R) * 2 * R + own % R)[:, None] * E + experts[None, :]
    tl.store(place, high, mask=mask)
    tl.store(place + R * E, low, mask=mask)


TILE = 2048
"""Numbers of a program's tile, 16 a thread at 4 warps."""


@on_its_device
def in_two_parts(
    grad_logits: Tensor | None, grad_scores: Tensor | None, scores: Tensor, index: Tensor, num_experts: int
) -> Tensor:
    """-> [N, 2, R, E] bf16. `grad_logits` [N, R, E], `grad_scores` and `scores` [N, R, k], all fp32, `index` [N, R, k];
    at least one of the gradients is there."""
    N, R, k = index.shape
    parts = scores.new_empty(N, 2, R, num_experts, dtype=torch.bfloat16)
    padded = padded_experts(num_experts)
    block = max(1, TILE // padded)
    if N > 0:
        logit_gradient_kernel[(triton.cdiv(N * R, block),)](
            grad_logits=scores if grad_logits is None else grad_logits.contiguous(),
            grad_scores=scores if grad_scores is None else grad_scores.contiguous(),
            scores=scores.contiguous(),
            index=index.contiguous(),
            parts=parts,
            pairs=N * R,
            R=R,
            E=num_experts,
            K=k,
            PADDED_E=padded,
            HAS_LOGITS=grad_logits is not None,
            HAS_SCORES=grad_scores is not None,
            BLOCK=block,
            num_warps=4,
        )
    return parts
