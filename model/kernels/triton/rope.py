"""Rotary position embedding of queries and keys in Triton: one launch each way, 2 bytes read and 2 written per value of
a head in bf16. Cosines and sines are read, not computed: they are those of every backend, and a row of them serves all
heads from the cache.

Heads are read where they stand: as parts of a joint product, or transposed as fused attention leaves their gradients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.heads import span
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.tiles import measured

TILE, WARPS = 2048, 4
"""Values of each half in a program: 16 a thread."""
RUNTIME = [
    f"{side}_{what}" for side in "qk" for what in ("tokens", "heads", "batch", "token", "head", "out_token", "shift")
] + ["q_blocks", "table_batch"]
"""Arguments that are no constants of the machine code: what is known of the strides is UNIT."""


@triton.jit
def rotate_heads(
    x_ptr, y_ptr, cos_ptr, sin_ptr, block, tokens, heads, token_stride, head_stride, out_stride, shift, direction,
    WIDTH: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr
):  # fmt: skip
    """ROWS heads of the tokens of one sequence, strides in units of UNIT values, by the angles of the token's row in
    the tables, `shift` rows further on."""
    row = block * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    inside = (token < tokens)[:, None]
    x_row = ((token * token_stride + head * head_stride) * UNIT)[:, None]
    y_row = (token * out_stride * UNIT + head * WIDTH)[:, None]
    column = tl.arange(0, HALF_PADDED)[None, :]
    mask = inside & (column < HALF)
    angle = ((token + shift) * HALF)[:, None] + column
    cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
    sin *= direction
    first = tl.load(x_ptr + x_row + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + x_row + (HALF + column), mask=mask, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    tl.store(y_ptr + y_row + column, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(y_ptr + y_row + (HALF + column), (second * cos + first * sin).to(kind), mask=mask)
    if 2 * HALF < WIDTH:
        column = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        mask = inside & (column < WIDTH)
        tl.store(y_ptr + y_row + column, tl.load(x_ptr + x_row + column, mask=mask, other=0.0).to(kind), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def rotate_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    q_tokens, q_heads, q_batch, q_token, q_head, q_out_token, q_shift,
    k_tokens, k_heads, k_batch, k_token, k_head, k_out_token, k_shift,
    q_blocks, table_batch, direction,
    WIDTH: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr
):  # fmt: skip
    """The first `q_blocks` programs of a sequence rotate queries, the others keys. `direction` 1.0, or -1.0 for the
    gradient."""
    block, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cos_ptr += sequence * table_batch * HALF
    sin_ptr += sequence * table_batch * HALF
    if block < q_blocks:
        q_out_ptr += sequence * q_tokens * q_out_token * UNIT
        rotate_heads(
            q_ptr + sequence * q_batch * UNIT, q_out_ptr, cos_ptr, sin_ptr, block, q_tokens, q_heads, q_token, q_head,
            q_out_token, q_shift, direction, WIDTH, HALF, UNIT, ROWS, HALF_PADDED, REST_PADDED,
        )  # fmt: skip
    else:
        k_out_ptr += sequence * k_tokens * k_out_token * UNIT
        rotate_heads(
            k_ptr + sequence * k_batch * UNIT, k_out_ptr, cos_ptr, sin_ptr, block - q_blocks, k_tokens, k_heads,
            k_token, k_head, k_out_token, k_shift, direction, WIDTH, HALF, UNIT, ROWS, HALF_PADDED, REST_PADDED,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- host


class Sizes(NamedTuple):
    """What the machine code is made for."""

    width: int
    half: int

    def constants(self, tile: int) -> dict[str, int]:
        """`tile`: pairs of a program."""
        padded = triton.next_power_of_2(self.half)
        return {
            "WIDTH": self.width,
            "HALF": self.half,
            "UNIT": self.unit,
            "ROWS": max(1, tile // padded),
            "HALF_PADDED": padded,
            "REST_PADDED": triton.next_power_of_2(max(1, self.width - 2 * self.half)),
        }

    @property
    def unit(self) -> int:
        """Values of which every stride is a multiple."""
        return math.gcd(16, self.width)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`q` [B, T, H, h], `k` [B, L, G, h], rotated by tables [L, 1, half] or [B, L, 1, half] fp32, the queries by their
    last T rows. Two new tensors."""
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    launch(q, k, q_out, k_out, cos, sin, direction=1.0)
    return q_out, k_out


def rotate_backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, is_joint: bool) -> tuple[Tensor, Tensor]:
    """Gradients of what `rotate` was given; `is_joint`: one tensor [B, T, H + G, h], and an empty one."""
    if not is_joint:
        q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (grad_q, grad_k))
        launch(grad_q, grad_k, q_out, k_out, cos, sin, direction=-1.0)
        return q_out, k_out
    B, T, H, h = grad_q.shape
    joint = torch.empty((B, T, H + grad_k.shape[2], h), dtype=grad_q.dtype, device=grad_q.device)
    launch(grad_q, grad_k, joint.narrow(2, 0, H), joint.narrow(2, H, grad_k.shape[2]), cos, sin, direction=-1.0)
    return joint, joint.new_empty(0)


@on_its_device
def launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> None:
    B, L = k.shape[:2]
    sizes = Sizes(q.shape[3], cos.shape[-1])
    cos, sin = cos.contiguous(), sin.contiguous()
    tiles = measured("rope", q.dtype, h=sizes.width, half=sizes.half) or {"tile": TILE, "warps": WARPS}
    constants = sizes.constants(tiles["tile"])
    tensors: list[Tensor] = []
    sides: dict[str, int] = {}
    blocks: list[int] = []
    for side, x, out in (("q", q, q_out), ("k", k, k_out)):
        if x.stride(3) != 1 or any(stride % sizes.unit for stride in x.stride()[:3]):
            x = x.contiguous()
        if max(span(x), span(out)) >= 2**31:  # offsets inside a sequence are 32 bits
            raise ValueError(
                f"RoPE: {x.shape[1]} tokens of {x.shape[2]} heads of {sizes.width} are too many: set "
                f"kernels.backend=reference"
            )
        tensors.append(x)
        tokens, heads = x.shape[1:3]
        strides = (x.stride(0), x.stride(1), x.stride(2), out.stride(1))
        numbers = (tokens, heads, *(stride // sizes.unit for stride in strides), L - tokens)
        names = ("tokens", "heads", "batch", "token", "head", "out_token", "shift")
        sides |= {f"{side}_{name}": number for name, number in zip(names, numbers, strict=True)}
        blocks.append(triton.cdiv(tokens * heads, constants["ROWS"]))
    if B * sum(blocks) > 0:
        rotate_kernel[(sum(blocks), B)](
            *tensors, q_out, k_out, cos, sin, **sides, q_blocks=blocks[0], table_batch=L if cos.dim() == 4 else 0,
            direction=direction, **constants, num_warps=tiles["warps"],
        )  # fmt: skip
