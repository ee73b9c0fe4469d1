"""Transformer-XL attention on GPUs: content logits and probabilities never leave the chip, and the position logits
exist for a few sequences at a time.

The position term of query i and key j is a product with place c = j + T - 1 - i, row c of the position keys. As a dense
product it stands at places, and attention wants it at keys: each row is shifted by another distance. A kernel of its
own computes it and stores every element at its key, so that attention reads whole tiles of it beside the keys. The
gradient goes the other way: it is stored at its place, where it is a factor of two dense products. The matrix of a
chunk of sequences is read as soon as it is written, mostly from the L2 cache; CHUNK_BYTES bounds it.

Backward, as in FlashAttention-2 (arXiv 2307.08691), nothing is kept but the logarithm of the softmax's sum; every
gradient has programs that own it, and there are no atomics. One kernel walks over keys and gives the gradient of the
content queries and that of the position logits, one walks over queries and gives those of keys and values.

Layout: queries [B, T, H, h], keys and values [B, L, K, h], position keys [L, P, h], results likewise; K and P are H or
1. h is padded to a multiple of 8. Matrices of logits are [H, B, T, L], their rows padded to a multiple of 8. Sums are
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.backend import attention_limit, cuda_capability
from model.kernels.ops.relative_attention import Inputs
from model.kernels.triton.heads import load_each, load_rows, narrowed, padded, store_rows
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.tiles import measured

CHUNK_BYTES = 32 << 20
"""Of a matrix of logits; one sequence at least is computed at a time. Two of them exist in the backward pass."""
SIZES = ("B", "T", "L", "H", "K", "P", "eighths")
"""One machine code for all values."""


@triton.jit(do_not_specialize=SIZES)
def position_logits_kernel(
    queries, position_keys, logits,
    B, T, L, H, P, eighths,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """One program per (KEYS places, query tile, head of a sequence) -> logits [H, B, T, L], each at its key."""
    h, stride = eighths * 8, tl.cdiv(L, 8) * 8  # so that the compiler knows that rows are whole 16 bytes
    c0, i0 = tl.program_id(0) * KEYS, tl.program_id(1) * QUERIES
    b, head = (tl.program_id(2) // H).to(tl.int64), tl.program_id(2) % H
    if c0 + KEYS + i0 + QUERIES <= T:  # all of it before the first key
        return
    i, c, columns = i0 + tl.arange(0, QUERIES), c0 + tl.arange(0, KEYS), tl.arange(0, DEPTH)
    queries += (b * T * H + head) * h
    position_keys += (head % P) * h
    total = tl.zeros((QUERIES, KEYS), tl.float32)
    for begin in range(0, h, DEPTH):
        inside = begin + columns < h
        from_queries = queries + i[:, None] * (H * h) + begin + columns[None, :]
        from_places = position_keys + c[:, None] * (P * h) + begin + columns[None, :]
        q = tl.load(from_queries, mask=(i < T)[:, None] & inside[None, :], other=0.0)
        rows = tl.load(from_places, mask=(c < L)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(q, tl.trans(rows), total, input_precision="ieee")
    j = c[None, :] - (T - 1) + i[:, None]
    target = logits + (head * B + b) * T * stride + (i[:, None] * stride + j)
    mask = (i < T)[:, None] & (c < L)[None, :] & (j >= 0)
    tl.store(target, total.to(logits.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    queries, k, v, logits, out, log_sum,
    B, T, L, H, K, eighths,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program per (query tile, head of a sequence) -> out [B, T, H, h], log_sum [B, H, T] fp32."""
    h, stride = eighths * 8, tl.cdiv(L, 8) * 8
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i0, M = tile * QUERIES, L - T
    own = (b * T * H + head) * h
    k += (b * L * K + head % K) * h
    v += (b * L * K + head % K) * h
    i, j = i0 + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    of_position = logits + (head * B + b) * T * stride + (i[:, None] * stride + j[None, :])
    q = load_rows(queries + own, i0, T, H * h, h, QUERIES, WIDTH)
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES, WIDTH), tl.float32)
    for j0 in range(0, tl.minimum(L, M + i0 + QUERIES), KEYS):
        inside = (i < T)[:, None] & (j0 + j < stride)[None, :]
        content = tl.load(of_position + j0, mask=inside, other=0.0).to(tl.float32)
        keys = load_rows(k, j0, L, K * h, h, KEYS, WIDTH)
        content = tl.dot(q, tl.trans(keys), content, input_precision="ieee")
        content = tl.where(j0 + j[None, :] <= M + i[:, None], content, float("-inf"))
        larger = tl.maximum(maximum, tl.max(content, 1))
        weights = tl.exp(content - larger[:, None])
        shrink = tl.exp(maximum - larger)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v, j0, L, K * h, h, KEYS, WIDTH)
        mean = tl.dot(weights.to(values.dtype), values, mean * shrink[:, None], input_precision="ieee")
        maximum = larger
    store_rows(out + own, mean / total[:, None], i0, T, H * h, h, QUERIES, WIDTH)
    tl.store(log_sum + (b * H + head) * T + i, maximum + tl.log(total), mask=i < T)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    queries, k, v, logits, out, grad, log_sum, delta, grad_queries, grad_places,
    B, T, L, H, K, eighths,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program per (query tile, head of a sequence) -> grad_queries like the content queries, grad_places
    [H, B, T, L], which is the gradient of the position logits at their places, and delta [B, H, T] fp32, the inner
    product of a result and its gradient."""
    h, stride = eighths * 8, tl.cdiv(L, 8) * 8
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i0, M = tile * QUERIES, L - T
    own, statistics = (b * T * H + head) * h, (b * H + head) * T
    k += (b * L * K + head % K) * h
    v += (b * L * K + head % K) * h
    i, j = i0 + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    logits += (head * B + b) * T * stride
    grad_places += (head * B + b) * T * stride
    row = i[:, None] * stride + j[None, :]
    upstream = load_rows(grad + own, i0, T, H * h, h, QUERIES, WIDTH)
    result = load_rows(out + own, i0, T, H * h, h, QUERIES, WIDTH)
    inner = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + statistics + i, inner, mask=i < T)
    q = load_rows(queries + own, i0, T, H * h, h, QUERIES, WIDTH)
    normaliser = load_each(log_sum + statistics, i0, T, QUERIES)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    zeros = tl.zeros((QUERIES, KEYS), tl.float32)
    first = T - 1 - i  # the place of key 0
    for j0 in range(0, tl.minimum(L, M + i0 + QUERIES), KEYS):
        inside = (i < T)[:, None] & (j0 + j < stride)[None, :]
        content = tl.load(logits + (row + j0), mask=inside, other=0.0).to(tl.float32)
        keys = load_rows(k, j0, L, K * h, h, KEYS, WIDTH)
        content = tl.dot(q, tl.trans(keys), content, input_precision="ieee")
        seen = j0 + j[None, :] <= M + i[:, None]
        weights = tl.where(seen, tl.exp(content - normaliser[:, None]), 0.0)
        values = load_rows(v, j0, L, K * h, h, KEYS, WIDTH)
        slopes = tl.dot(upstream, tl.trans(values), zeros, input_precision="ieee")
        of_logits = (weights * (slopes - inner[:, None])).to(keys.dtype)
        tl.store(grad_places + (row + first[:, None] + j0), of_logits, mask=seen & (i < T)[:, None])
        total = tl.dot(of_logits, keys, total, input_precision="ieee")
    store_rows(grad_queries + own, total, i0, T, H * h, h, QUERIES, WIDTH)
    for c0 in range(0, T - 1 - i0, KEYS):  # places before key 0
        mask = (c0 + j[None, :] < first[:, None]) & (i < T)[:, None]
        tl.store(grad_places + (row + c0), zeros.to(grad_places.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    queries, k, v, logits, grad, log_sum, delta, grad_k, grad_v,
    B, T, L, H, K, eighths,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr
):  # fmt: skip
    """One program per (key tile, head of keys of a sequence) -> grad_k, grad_v like the keys, or one of them where the
    registers do not hold both. It adds up the heads of queries that share its keys, in order. Its tiles are [keys,
    queries]."""
    h, stride = eighths * 8, tl.cdiv(L, 8) * 8
    j0, key_head = tl.program_id(0) * KEYS, tl.program_id(1)
    b, key_head = (key_head // K).to(tl.int64), key_head % K
    M = L - T
    own = (b * L * K + key_head) * h
    keys = load_rows(k + own, j0, L, K * h, h, KEYS, WIDTH)
    if OF_K:
        values = load_rows(v + own, j0, L, K * h, h, KEYS, WIDTH)
    r, j = tl.arange(0, QUERIES), j0 + tl.arange(0, KEYS)
    zeros = tl.zeros((KEYS, QUERIES), tl.float32)
    if OF_K:
        of_keys = tl.zeros((KEYS, WIDTH), tl.float32)
    if OF_V:
        of_values = tl.zeros((KEYS, WIDTH), tl.float32)
    for head in range(key_head, H, K):
        of_head, statistics = (b * T * H + head) * h, (b * H + head) * T
        of_position = logits + (head * B + b) * T * stride + j[:, None]
        for i0 in range(tl.maximum(0, j0 - M) // QUERIES * QUERIES, T, QUERIES):
            i = i0 + r
            q = load_rows(queries + of_head, i0, T, H * h, h, QUERIES, WIDTH)
            inside = (j < stride)[:, None] & (i < T)[None, :]
            content = tl.load(of_position + i[None, :] * stride, mask=inside, other=0.0).to(tl.float32)
            content = tl.dot(keys, tl.trans(q), content, input_precision="ieee")
            normaliser = load_each(log_sum + statistics, i0, T, QUERIES)
            seen = (j[:, None] <= M + i[None, :]) & (i < T)[None, :]
            weights = tl.where(seen, tl.exp(content - normaliser[None, :]), 0.0)
            upstream = load_rows(grad + of_head, i0, T, H * h, h, QUERIES, WIDTH)
            if OF_V:
                of_values = tl.dot(weights.to(q.dtype), upstream, of_values, input_precision="ieee")
            if OF_K:
                inner = load_each(delta + statistics, i0, T, QUERIES)
                slopes = tl.dot(values, tl.trans(upstream), zeros, input_precision="ieee")
                of_logits = weights * (slopes - inner[None, :])
                of_keys = tl.dot(of_logits.to(q.dtype), q, of_keys, input_precision="ieee")
    if OF_K:
        store_rows(grad_k + own, of_keys, j0, L, K * h, h, KEYS, WIDTH)
    if OF_V:
        store_rows(grad_v + own, of_values, j0, L, K * h, h, KEYS, WIDTH)


# -------------------------------------------------------------------------------------------------------------- host

PLACES = {"QUERIES": 128, "KEYS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
"""Constants and launch options of `position_logits_kernel`."""
TILES = {
    64: {"forward": (64, 64, 4, 2), "queries": (64, 32, 4, 2), "k and v": (32, 64, 8, 2)},
    128: {"forward": (64, 64, 4, 2), "queries": (64, 32, 4, 2), "k and v": (32, 64, 8, 2)},
    256: {"forward": (64, 32, 8, 2), "queries": (64, 32, 8, 2), "k": (16, 64, 8, 2), "v": (16, 64, 8, 2)},
}
"""Widest head -> what is computed -> queries and keys of a tile, warps, pipeline stages: what compiles without spilled
registers on every architecture of benchmarks/compiled.py."""
TILES_ON = {(10, 256, "k"): (32, 64, 8, 1)}
"""Other tiles for GPUs of one major capability: the same for a width and what is computed."""


def tiles(h: int, what: str, capability: int = 9) -> dict[str, int]:
    """Constants and launch options for heads of width `h` on GPUs of a major capability."""
    width = widest(h)
    queries, keys, warps, stages = TILES_ON.get((capability, width, what), TILES[width][what])
    found = {"QUERIES": queries, "KEYS": keys, "WIDTH": width, "num_warps": warps, "num_stages": stages}
    return found if what in ("forward", "queries") else found | {"OF_K": "k" in what, "OF_V": "v" in what}


OWN_NAMES = {
    "queries": "QUERIES", "keys": "KEYS", "depth": "DEPTH", "warps": "num_warps", "stages": "num_stages"
}  # fmt: skip
"""What the numbers of a tile are called in the table of those that were measured -> in a launch."""


def launch_tiles(inputs: Inputs, what: str) -> dict[str, int]:
    """Of a launch: what was measured, else `PLACES` for "places" and `tiles`."""
    h = inputs.k.shape[3]
    own = PLACES if what == "places" else tiles(h, what, cuda_capability()[0])
    found = measured(f"relative_attention {what}", inputs.k.dtype, h=h)
    return own if found is None else own | {OWN_NAMES[name]: value for name, value in found.items()}


def widest(h: int) -> int:
    """The row of `TILES` for heads of width `h`."""
    return next(width for width in TILES if width >= h)


class Chunk(NamedTuple):
    """Some sequences of the inputs, which is all that the kernels see of them."""

    sequences: slice
    inputs: Inputs
    sizes: dict[str, int]
    logits: Tensor
    """[H, B, T, L] with padded rows: the workspace of the position logits, the same memory for all chunks."""


def _prepared(inputs: Inputs) -> Inputs:
    """As the kernels read them. ValueError for what they cannot."""
    (_, T, H, h), L = inputs.content_queries.shape, inputs.k.shape[1]
    limit = attention_limit("cpu", None, (h,))
    if limit is not None:
        raise ValueError(f"relative_attention: {limit}: set kernels.backend=reference")
    if max(L * H * (h + 7), T * (L + 7)) >= 2**31:  # offsets inside a sequence, and inside a matrix, are 32 bits
        raise ValueError(
            f"relative_attention: {L} tokens of {H} heads of {h} are too many: set kernels.backend=reference"
        )
    return Inputs(*(None if t is None else padded(t) for t in inputs))  # type: ignore[arg-type]


def workspace(inputs: Inputs) -> Tensor:
    """[H, B, T, L] whose rows are padded to whole 16 bytes, for as many sequences as CHUNK_BYTES allow."""
    (B, T, H, _), L = inputs.content_queries.shape, inputs.k.shape[1]
    row = triton.cdiv(L, 8) * 8
    sequences = CHUNK_BYTES // max(1, H * T * row * inputs.k.element_size())
    sequences = max(1, min(B, sequences, 65535 // H))  # programs on a grid's second and third axis
    return inputs.k.new_empty(H, sequences, T, row)


def _chunks(inputs: Inputs) -> Iterator[Chunk]:
    """Each with the position logits of its sequences."""
    content, position, k, v, position_keys = inputs
    position = content if position is None else position
    (B, T, H, h), (_, L, K, _), P = content.shape, k.shape, position_keys.shape[1]
    logits, places = workspace(inputs), launch_tiles(inputs, "places")
    at_once = logits.shape[1]
    for first in range(0, B if content.numel() > 0 else 0, at_once):
        chosen = slice(first, min(first + at_once, B))
        count = chosen.stop - first
        part = Inputs(content[chosen], position[chosen], k[chosen], v[chosen], position_keys)
        sizes = {"B": count, "T": T, "L": L, "H": H, "eighths": h // 8}
        grid = triton.cdiv(L, places["KEYS"]), triton.cdiv(T, places["QUERIES"]), count * H
        position_logits_kernel[grid](part.position_queries, position_keys, logits, P=P, **sizes, **places)
        yield Chunk(chosen, part, sizes | {"K": K}, logits)


@on_its_device
def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-> out [B, T, H, h] and the logarithm of the softmax's sum [B, H, T] fp32."""
    narrow, inputs = inputs.content_queries.shape[3], _prepared(inputs)
    B, T, H, _ = inputs.content_queries.shape
    out = torch.empty_like(inputs.content_queries)
    log_sum = out.new_empty(B, H, T, dtype=torch.float32)
    options = launch_tiles(inputs, "forward")
    for sequences, part, sizes, logits in _chunks(inputs):
        grid = triton.cdiv(T, options["QUERIES"]), sizes["B"] * H
        given = part.content_queries, part.k, part.v, logits
        forward_kernel[grid](*given, out[sequences], log_sum[sequences], **sizes, **options)
    return narrowed(out, narrow), log_sum


@on_its_device
def backward(grad: Tensor, out: Tensor, log_sum: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """-> the gradients of the inputs, in their order."""
    narrow, inputs, grad, out = grad.shape[3], _prepared(inputs), padded(grad), padded(out)
    k, position_keys = inputs.k, inputs.position_keys
    (B, T, H, h), (_, L, K, _), P = grad.shape, k.shape, position_keys.shape[1]
    content, position, v = inputs.content_queries, inputs.position_queries, inputs.v
    of_content, of_k, of_v = (torch.empty_like(t) for t in (content, k, v))
    of_position = content.new_empty(0) if position is None else torch.empty_like(position)
    delta, of_logits = torch.empty_like(log_sum), workspace(inputs)
    of_places = k.new_empty(triton.cdiv(B, of_logits.shape[1]), L, H, h)
    keys_of_heads = position_keys.transpose(0, 1).expand(H, L, h)
    for number, (sequences, part, sizes, logits) in enumerate(_chunks(inputs)):
        statistics = log_sum[sequences], delta[sequences]
        options, given = launch_tiles(inputs, "queries"), (part.content_queries, part.k, part.v, logits)
        grid, upstream = (triton.cdiv(T, options["QUERIES"]), sizes["B"] * H), grad[sequences]
        results = of_content[sequences], of_logits
        query_gradient_kernel[grid](*given, out[sequences], upstream, *statistics, *results, **sizes, **options)
        results = of_k[sequences], of_v[sequences]
        for what in TILES[widest(h)]:
            if what in ("forward", "queries"):
                continue
            options = launch_tiles(inputs, what)
            grid = triton.cdiv(L, options["KEYS"]), sizes["B"] * K
            key_gradient_kernel[grid](*given, upstream, *statistics, *results, **sizes, **options)
        # Two dense products of all heads: [H, tokens, L] times the position keys, and its transpose times the queries.
        rows = of_logits.view(-1, of_logits.shape[3])[: H * sizes["B"] * T].view(H, sizes["B"] * T, -1)[..., :L]
        of_queries = (of_content if position is None else of_position)[sequences].flatten(0, 1).transpose(0, 1)
        if position is None:  # added to what the kernel gave
            torch.baddbmm(of_queries, rows, keys_of_heads, out=of_queries)
        else:
            torch.bmm(rows, keys_of_heads, out=of_queries)
        assert part.position_queries is not None
        queries = part.position_queries.flatten(0, 1).transpose(0, 1)
        torch.bmm(rows.transpose(1, 2), queries, out=of_places[number].transpose(0, 1))
    if P == 1 < H:
        of_places = of_places.sum((0, 2)).unsqueeze(1)
    else:
        of_places = of_places.sum(0) if len(of_places) != 1 else of_places[0]
    of_content, of_k, of_v, of_places = (narrowed(t, narrow) for t in (of_content, of_k, of_v, of_places))
    return of_content, of_position if position is None else narrowed(of_position, narrow), of_k, of_v, of_places
