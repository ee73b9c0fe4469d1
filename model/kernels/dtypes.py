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

    Half precision is widened to fp32 unless the CPU multiplies bf16 in AMX tiles: without them torch.mm is about twice
    as fast in fp32 as in bf16, and the sums over choices and over tokens are exact to fp32 for free. With AVX-512 BF16
    torch.mm in bf16 has twice fp32's rate, but not at the first sight of a number of rows, for which oneDNN builds a
    program. Experts get another number in every step, so fp32 is not slower there either (an EPYC, torch 2.13). An op
    that adds the products of many GEMMs up in one buffer (`accumulates`: SwitchHead's sum over heads) is widened on
    every CPU, because each of the additions would be rounded.
    """
    if dtype == torch.bfloat16 and not accumulates and torch.cpu._is_amx_tile_supported():
        return dtype
    return wide_dtype(dtype)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait between forward and backward pass for the loss scale: fp32 for fp16, because a
    gradient divided by 16384 tokens is 1e-6, of which fp16 keeps three bits."""
    return torch.float32 if dtype == torch.float16 else dtype
