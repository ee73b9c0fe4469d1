"""Dropout in Triton: one pass over memory, masks hashed in registers from the counters of model/dropout.py and never
stored.

Bytes per value in bf16: 2 read and 2 written, 2 more read for the residual stream. Per value two rounds of the hash are
about 20 integer instructions, which at an H100's rate take about as long as its 6 bytes: the mask is drawn again in the
backward pass because its 2 x 1 bytes would not be much cheaper, and would have to be kept.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.dropout import Draw, signed
from model.kernels.triton.launch import on_its_device

BLOCK, WARPS = 2048, 4
"""16 values a thread: two 16-byte loads in half precision."""
LARGEST_SEQUENCE = 2**31 - BLOCK
"""Values of one sequence: offsets inside a sequence are 32 bits."""
COUNTERS = ["threshold", "key_low", "key_high", "first_counter", "width", "held"]
"""Arguments of a kernel that differ from site to site: none is worth machine code of its own."""


@triton.jit
def mix(x):
    """Bijective hash of 32-bit values [...] uint32; `_mix` of model/dropout.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def sequence_hash(sequence_index_ptr, sequence, key_low, key_high):
    """What tells the mask of one sequence at one site from all others, uint32. The halves of the key are int32 bits."""
    index = tl.load(sequence_index_ptr + sequence)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    return mix(mix(low ^ key_low.to(tl.uint32)) ^ high ^ key_high.to(tl.uint32))


@triton.jit
def is_kept(counter, sequence, threshold):
    """Mask of the values numbered `counter` uint32 in a sequence whose hash is `sequence`."""
    return (mix(mix(counter) ^ sequence) >> 8).to(tl.int32) >= threshold


@triton.jit
def counters(offsets, first_counter, width, held, DIVIDED: tl.constexpr):
    """Numbers of the values at `offsets` int32 of a sequence of which a token has `held` columns of `width`; DIVIDED:
    not all of them."""
    if DIVIDED:
        token = offsets // held
        offsets += token * (width - held)
    return first_counter.to(tl.uint32) + offsets.to(tl.uint32)


@triton.jit(do_not_specialize=COUNTERS)
def dropout_kernel(
    x_ptr, residual_ptr, y_ptr, sequence_index_ptr, num_values, scale, threshold, key_low, key_high, first_counter,
    width, held,
    DIVIDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = residual + x * mask * scale for BLOCK of the `num_values` values of a sequence; all [B, num_values].
    A value that is not finite stays so under its zero, as in the specification."""
    sequence = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_values
    base = sequence.to(tl.int64) * num_values
    x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    hashed = sequence_hash(sequence_index_ptr, sequence, key_low, key_high)
    keep = is_kept(counters(offsets, first_counter, width, held, DIVIDED), hashed, threshold)
    y = x * tl.where(keep, scale, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTERS)
def keep_mask_kernel(
    mask_ptr, sequence_index_ptr, num_values, threshold, key_low, key_high, first_counter, width, held,
    DIVIDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The mask alone, bool [B, num_values]."""
    sequence = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hashed = sequence_hash(sequence_index_ptr, sequence, key_low, key_high)
    keep = is_kept(counters(offsets, first_counter, width, held, DIVIDED), hashed, threshold)
    base = sequence.to(tl.int64) * num_values
    tl.store(mask_ptr + base + offsets, keep, mask=offsets < num_values)


# -------------------------------------------------------------------------------------------------------------- host


def mask_arguments(draw: Draw, columns: int, features: int = 1) -> dict[str, int | bool]:
    """Arguments of a kernel that decide the mask of a tensor of `columns`, each of `features` values, by name. Integers
    are 32 bits wide, always."""
    width, first_column = draw.held(columns)
    return {
        "threshold": round(draw.probability * 2**24),
        "key_low": signed(draw.key),
        "key_high": signed(draw.key >> 32),
        "first_counter": signed((draw.first_token * width + first_column) * features),
        "width": width * features,
        "held": columns * features,
        "DIVIDED": columns != width,
    }


def grid(num_values: int, sequences: int) -> tuple[int, int]:
    if num_values > LARGEST_SEQUENCE:
        raise ValueError(f"dropout of {num_values} values a sequence: at most {LARGEST_SEQUENCE} are possible")
    return triton.cdiv(num_values, BLOCK), sequences


@on_its_device
def dropout(x: Tensor, residual: Tensor | None, draw: Draw) -> Tensor:
    """As `model.kernels.ops.elementwise.dropout`."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() > 0:
        B = x.shape[0]
        num_values = x.numel() // B
        dropout_kernel[grid(num_values, B)](
            x, residual, y, draw.sequence_index.contiguous(), num_values, 1.0 / (1.0 - draw.probability),
            **mask_arguments(draw, x.shape[2]), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y


def keep_mask(shape: tuple[int, ...], draw: Draw) -> Tensor:
    """As `model.kernels.ops.elementwise.keep_mask`."""
    return _keep_mask(draw.sequence_index.contiguous(), shape, draw)


@on_its_device
def _keep_mask(sequence_index: Tensor, shape: tuple[int, ...], draw: Draw) -> Tensor:
    mask = torch.empty(shape, dtype=torch.bool, device=sequence_index.device)
    if mask.numel() > 0:
        num_values, features = mask.numel() // shape[0], math.prod(shape[3:])
        keep_mask_kernel[grid(num_values, shape[0])](
            mask, sequence_index, num_values, **mask_arguments(draw, shape[2], features), BLOCK=BLOCK, num_warps=WARPS
        )
    return mask
