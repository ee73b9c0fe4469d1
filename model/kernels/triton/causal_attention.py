"""Causal attention that does not begin at the first token, on GPUs: logits and probabilities never leave the chip, and
there is no mask in memory.

FlashAttention-2 (arXiv 2307.08691): a program walks over tiles of keys or queries, nothing is kept but the logarithm of
the softmax's sum, every gradient has programs that own it, and there are no atomics. What a query sees is a range of
keys, so a walk covers the tiles in that range alone: of queries it begins at the first key of the tile's first query,
and of keys it ends behind the last query that sees the tile's last key. Both are read from memory, so the host never
waits.

Layout: queries [B, H, T, h], keys and values [B, K, L, h], K is H or 1, read where they stand by their strides: those
of the projections, tokens before heads, or of heads before tokens. Results have tokens before heads in memory. Only
rows that are no whole 16 bytes are copied. Sums are fp32, logits to the base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.backend import attention_limit, cuda_capability
from model.kernels.ops.causal_attention import Inputs
from model.kernels.triton.heads import load_each, load_rows, narrowed, padded, span, store_rows
from model.kernels.triton.launch import on_its_device

AXES = ("batch", "head", "token")
STRIDES = tuple(f"{name}_{axis}" for name in "qkvgo" for axis in AXES)
"""In eighths of their number of values; o is the result, g its gradient."""
SIZES = ("T", "L", "H", "K", "eighths", "scale", *STRIDES)
"""One machine code for all values."""
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)
"""Below every logit, and finite: a row that sees nothing of a tile keeps a maximum that can be subtracted."""


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    queries, k, v, first, out, log_sum,
    T, L, H, K, eighths, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program per (query tile, head of a sequence) -> out [B, T, H, h], log_sum [B, H, T] fp32 to the base 2.
    `first` [B, T] int32, or None for 0."""
    h = eighths * 8  # so that the compiler knows that rows are whole 16 bytes
    tiles = tl.cdiv(T, QUERIES)
    tile, row = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles  # the longest first
    b, head = (row // H).to(tl.int64), row % H
    i0, M, steepness = tile * QUERIES, L - T, scale * LOG2_E
    queries += (b * q_batch + head * q_head) * 8
    k += (b * k_batch + head % K * k_head) * 8
    v += (b * v_batch + head % K * v_head) * 8
    i, j = i0 + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    begin = 0
    if first is not None:
        first += b * T
        begins = tl.load(first + i, mask=i < T, other=0)
        begin = tl.load(first + i0) // KEYS * KEYS
    q = load_rows(queries, i0, T, q_token * 8, h, QUERIES, WIDTH)
    maximum = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES, WIDTH), tl.float32)
    zeros = tl.zeros((QUERIES, KEYS), tl.float32)
    for j0 in range(begin, tl.minimum(L, M + i0 + QUERIES), KEYS):
        keys = load_rows(k, j0, L, k_token * 8, h, KEYS, WIDTH)
        logits = tl.dot(q, tl.trans(keys), zeros, input_precision="ieee") * steepness
        seen = j0 + j[None, :] <= M + i[:, None]
        if first is not None:
            seen = seen & (j0 + j[None, :] >= begins[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v, j0, L, v_token * 8, h, KEYS, WIDTH)
        mean = tl.dot(weights.to(values.dtype), values, mean * shrink[:, None], input_precision="ieee")
        maximum = larger
    store_rows(out + (b * T * H + head) * h, mean / total[:, None], i0, T, H * h, h, QUERIES, WIDTH)
    tl.store(log_sum + (b * H + head) * T + i, maximum + tl.log2(total), mask=i < T)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    queries, k, v, first, out, grad, log_sum, delta, grad_queries,
    T, L, H, K, eighths, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    o_batch, o_head, o_token,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program per (query tile, head of a sequence) -> grad_queries [B, T, H, h], and delta [B, H, T] fp32, the
    inner product of a result and its gradient."""
    h = eighths * 8
    tiles = tl.cdiv(T, QUERIES)
    tile, row = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, head = (row // H).to(tl.int64), row % H
    i0, M, steepness = tile * QUERIES, L - T, scale * LOG2_E
    statistics = (b * H + head) * T
    queries += (b * q_batch + head * q_head) * 8
    out += (b * o_batch + head * o_head) * 8
    grad += (b * g_batch + head * g_head) * 8
    k += (b * k_batch + head % K * k_head) * 8
    v += (b * v_batch + head % K * v_head) * 8
    i, j = i0 + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    begin = 0
    if first is not None:
        first += b * T
        begins = tl.load(first + i, mask=i < T, other=0)
        begin = tl.load(first + i0) // KEYS * KEYS
    upstream = load_rows(grad, i0, T, g_token * 8, h, QUERIES, WIDTH)
    result = load_rows(out, i0, T, o_token * 8, h, QUERIES, WIDTH)
    inner = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + statistics + i, inner, mask=i < T)
    q = load_rows(queries, i0, T, q_token * 8, h, QUERIES, WIDTH)
    normaliser = load_each(log_sum + statistics, i0, T, QUERIES)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    zeros = tl.zeros((QUERIES, KEYS), tl.float32)
    for j0 in range(begin, tl.minimum(L, M + i0 + QUERIES), KEYS):
        keys = load_rows(k, j0, L, k_token * 8, h, KEYS, WIDTH)
        logits = tl.dot(q, tl.trans(keys), zeros, input_precision="ieee") * steepness
        seen = j0 + j[None, :] <= M + i[:, None]
        if first is not None:
            seen = seen & (j0 + j[None, :] >= begins[:, None])
        weights = tl.where(seen, tl.exp2(logits - normaliser[:, None]), 0.0)
        values = load_rows(v, j0, L, v_token * 8, h, KEYS, WIDTH)
        slopes = tl.dot(upstream, tl.trans(values), zeros, input_precision="ieee")
        of_logits = (weights * (slopes - inner[:, None])).to(keys.dtype)
        total = tl.dot(of_logits, keys, total, input_precision="ieee")
    store_rows(grad_queries + (b * T * H + head) * h, total * scale, i0, T, H * h, h, QUERIES, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    queries, k, v, first, end, grad, log_sum, delta, grad_k, grad_v,
    T, L, H, K, eighths, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr
):  # fmt: skip
    """One program per (key tile, head of keys of a sequence) -> grad_k, grad_v [B, L, K, h], or one of them where the
    registers do not hold both. It adds up the heads of queries that share its keys, in order. Its tiles are [keys,
    queries]. `end` [B, L] int32, or None for T."""
    h = eighths * 8
    tiles = tl.cdiv(L, KEYS)
    j0, row = tl.program_id(0) % tiles * KEYS, tl.program_id(0) // tiles
    b, key_head = (row // K).to(tl.int64), row % K
    M, steepness = L - T, scale * LOG2_E
    k += (b * k_batch + key_head * k_head) * 8
    v += (b * v_batch + key_head * v_head) * 8
    r, j = tl.arange(0, QUERIES), j0 + tl.arange(0, KEYS)
    last = T
    if first is not None:
        first += b * T
        last = tl.load(end + b * L + tl.minimum(j0 + KEYS, L) - 1)
    keys = load_rows(k, j0, L, k_token * 8, h, KEYS, WIDTH)
    if OF_K:
        values = load_rows(v, j0, L, v_token * 8, h, KEYS, WIDTH)
    zeros = tl.zeros((KEYS, QUERIES), tl.float32)
    if OF_K:
        of_keys = tl.zeros((KEYS, WIDTH), tl.float32)
    if OF_V:
        of_values = tl.zeros((KEYS, WIDTH), tl.float32)
    for head in range(key_head, H, K):
        of_head, upstream_of_head = (
            queries + (b * q_batch + head * q_head) * 8,
            grad + (b * g_batch + head * g_head) * 8,
        )
        statistics = (b * H + head) * T
        for i0 in range(tl.maximum(0, j0 - M) // QUERIES * QUERIES, last, QUERIES):
            i = i0 + r
            q = load_rows(of_head, i0, T, q_token * 8, h, QUERIES, WIDTH)
            logits = tl.dot(keys, tl.trans(q), zeros, input_precision="ieee") * steepness
            normaliser = load_each(log_sum + statistics, i0, T, QUERIES)
            seen = (j[:, None] <= M + i[None, :]) & (i < T)[None, :]
            if first is not None:
                begins = tl.load(first + i, mask=i < T, other=0)
                seen = seen & (j[:, None] >= begins[None, :])
            weights = tl.where(seen, tl.exp2(logits - normaliser[None, :]), 0.0)
            upstream = load_rows(upstream_of_head, i0, T, g_token * 8, h, QUERIES, WIDTH)
            if OF_V:
                of_values = tl.dot(weights.to(q.dtype), upstream, of_values, input_precision="ieee")
            if OF_K:
                inner = load_each(delta + statistics, i0, T, QUERIES)
                slopes = tl.dot(values, tl.trans(upstream), zeros, input_precision="ieee")
                of_logits = weights * (slopes - inner[None, :])
                of_keys = tl.dot(of_logits.to(q.dtype), q, of_keys, input_precision="ieee")
    own = (b * L * K + key_head) * h
    if OF_K:
        store_rows(grad_k + own, of_keys * scale, j0, L, K * h, h, KEYS, WIDTH)
    if OF_V:
        store_rows(grad_v + own, of_values, j0, L, K * h, h, KEYS, WIDTH)


# -------------------------------------------------------------------------------------------------------------- host

TILES = {
    64: {"forward": (128, 64, 4, 3), "queries": (64, 32, 4, 2), "k and v": (32, 64, 4, 2)},
    128: {"forward": (128, 32, 8, 2), "queries": (64, 64, 8, 2), "k and v": (32, 64, 8, 2)},
    256: {"forward": (64, 32, 8, 2), "queries": (64, 32, 8, 2), "k": (16, 64, 8, 2), "v": (16, 64, 8, 2)},
}
"""Widest head -> what is computed -> queries and keys of a tile, warps, pipeline stages: what compiles without spilled
registers on sm_80 (benchmarks/compiled.py)."""
TILES_ON = {
    (9, 64, "queries"): (64, 64, 4, 2),
    (9, 64, "k and v"): (64, 64, 4, 2),
    (9, 128, "forward"): (128, 64, 8, 3),
    (9, 128, "queries"): (128, 64, 8, 2),
    (9, 128, "k and v"): (32, 128, 8, 2),
    (10, 64, "queries"): (64, 64, 4, 2),
    (10, 128, "forward"): (128, 64, 8, 3),
    (10, 128, "queries"): (128, 64, 8, 2),
    (10, 256, "k"): (32, 64, 8, 1),
}
"""Larger tiles, or such as fit, on GPUs of one major capability: the same for a width and what is computed. A group of
four warps multiplies 64 rows at a time there, so eight take tiles of 128."""


def tiles(h: int, what: str, capability: int = 9) -> dict[str, int]:
    """Constants and launch options for heads of width `h` on GPUs of a major capability."""
    width = widest(h)
    queries, keys, warps, stages = TILES_ON.get((capability, width, what), TILES[width][what])
    found = {"QUERIES": queries, "KEYS": keys, "WIDTH": width, "num_warps": warps, "num_stages": stages}
    return found if what in ("forward", "queries") else found | {"OF_K": "k" in what, "OF_V": "v" in what}


def widest(h: int) -> int:
    """The row of `TILES` for heads of width `h`."""
    return next(width for width in TILES if width >= h)


def _readable(t: Tensor) -> Tensor:
    """The tensor [B, heads, tokens, h] itself where its rows are whole 16 bytes in half precision, else a copy."""
    strides = [stride for stride, size in zip(t.stride()[:3], t.shape, strict=False) if size > 1]
    return t if t.stride(3) == 1 and not any(n % 8 for n in (t.shape[3], *strides)) else padded(t)


def _prepared(inputs: Inputs) -> Inputs:
    """As the kernels read them. ValueError for what they cannot."""
    limit = attention_limit("cpu", None, inputs.q.shape[3:])
    if limit is not None:
        raise ValueError(f"causal_attention: {limit}: set kernels.backend=reference")
    q, k, v = map(_readable, inputs[:3])
    (_, H, _, h), L = q.shape, k.shape[2]
    if max(span(q), span(k), span(v), L * H * h) >= 2**31:  # offsets inside a sequence are 32 bits
        raise ValueError(
            f"causal_attention: {L} tokens of {H} heads of {h} are too many: set kernels.backend=reference"
        )
    return Inputs(q, k, v, *(None if t is None else t.contiguous() for t in inputs[3:]))


def _sizes(inputs: Inputs, scale: float, **others: Tensor) -> dict[str, float]:
    """What the kernels are told of the tensors, and of `others` by their prefix."""
    (_, H, T, h), (_, K, L, _) = inputs.q.shape, inputs.k.shape
    found = {"T": T, "L": L, "H": H, "K": K, "eighths": h // 8, "scale": scale}
    for name, t in {"q": inputs.q, "k": inputs.k, "v": inputs.v, **others}.items():
        found |= {f"{name}_{axis}": t.stride(n) // 8 for n, axis in enumerate(AXES)}
    return found


@on_its_device
def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> out [B, H, T, h], in memory [B, T, H, h], and the logarithm of the softmax's sum [B, H, T] fp32, base 2."""
    narrow, inputs = inputs.q.shape[3], _prepared(inputs)
    B, H, T, h = inputs.q.shape
    out = inputs.q.new_empty(B, T, H, h)
    log_sum = out.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() > 0:
        options = tiles(h, "forward", cuda_capability()[0])
        grid = (triton.cdiv(T, options["QUERIES"]) * B * H,)
        tensors = inputs.q, inputs.k, inputs.v, inputs.first, out, log_sum
        forward_kernel[grid](*tensors, **_sizes(inputs, narrow**-0.5), **options)
    return narrowed(out, narrow).transpose(1, 2), log_sum


@on_its_device
def backward(grad: Tensor, out: Tensor, log_sum: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of q, k and v, shaped as these, in memory with tokens before heads."""
    narrow, inputs, grad, out = grad.shape[3], _prepared(inputs), _readable(grad), _readable(out)
    (B, H, T, h), (_, K, L, _) = inputs.q.shape, inputs.k.shape
    of_q, delta = out.new_empty(B, T, H, h), torch.empty_like(log_sum)
    of_k, of_v = (out.new_empty(B, L, K, h) for _ in range(2))
    if out.numel() > 0:
        sizes, capability = _sizes(inputs, narrow**-0.5, g=grad), cuda_capability()[0]
        options = tiles(h, "queries", capability)
        grid = (triton.cdiv(T, options["QUERIES"]) * B * H,)
        tensors = inputs.q, inputs.k, inputs.v, inputs.first
        of_result = {f"o_{axis}": out.stride(n) // 8 for n, axis in enumerate(AXES)}
        query_gradient_kernel[grid](*tensors, out, grad, log_sum, delta, of_q, **sizes, **of_result, **options)
        for what in TILES[widest(h)]:
            if what in ("forward", "queries"):
                continue
            options = tiles(h, what, capability)
            grid = (triton.cdiv(L, options["KEYS"]) * B * K,)
            key_gradient_kernel[grid](*tensors, inputs.end, grad, log_sum, delta, of_k, of_v, **sizes, **options)
    of_q, of_k, of_v = (narrowed(t, narrow).transpose(1, 2) for t in (of_q, of_k, of_v))
    return of_q, of_k, of_v
