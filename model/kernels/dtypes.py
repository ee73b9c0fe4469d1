"""In which dtype the ops compute, whatever dtype their tensors are stored in."""

from __future__ import annotations

import functools

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what every reference computes in, and what logits, scores and losses are."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def cpu_gemm_dtype(dtype: torch.dtype, *, accumulates: bool = False) -> torch.dtype:
    """The dtype in which the CPU backends multiply tensors of `dtype`.

    bf16 is multiplied as it is where the CPU has instructions for it: AMX tiles, or AVX-512 BF16 with twice the rate of
    fp32. oneDNN builds a program for every shape, so the ops give it few (cpu/sorted_rows.py, `tile_rows`).
    Other half precision is widened to fp32: torch.mm is about twice as fast in it, and the sums over choices and over
    tokens are exact to fp32 for free. An op that adds the products of many GEMMs up in one buffer (`accumulates`:
    SwitchHead's sum over heads) is widened on every CPU, because each of the additions would be rounded.
    """
    if dtype == torch.bfloat16 and not accumulates and multiplies_bf16():
        return dtype
    return wide_dtype(dtype)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    # RELIES-ON torch-cpu
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait between forward and backward pass for the loss scale: fp32 for fp16, because a
    gradient divided by 16384 tokens is 1e-6, of which fp16 keeps three bits."""
    return torch.float32 if dtype == torch.float16 else dtype
