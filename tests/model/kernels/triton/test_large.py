"""Kernels whose offsets inside a sequence are 32 bits refuse a sequence that is too large, before anything is launched:
else they would read and write elsewhere. On fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fake_cuda import fake_cuda
from benchmarks.launch_counter import LaunchCounter
from model.dropout import Draw
from model.kernels.ops import causal_attention, relative_attention
from model.kernels.ops.elementwise import dropout, keep_mask, rotate

H, HEAD = 16, 64


def heads(T: int) -> Tensor:
    """[1, T, H, HEAD], which holds 2^31 values where T = 2^21."""
    return torch.empty(1, T, H, HEAD, dtype=torch.bfloat16, device="cuda")


def rotated(T: int) -> Any:
    cos, sin = (torch.empty(T, 1, HEAD // 4, device="cuda") for _ in range(2))
    return rotate(heads(T), heads(T), (cos, sin), backend="triton")


def rotated_together(T: int) -> Any:
    cos, sin = (torch.empty(T, 1, HEAD // 4, device="cuda") for _ in range(2))
    return rotate(heads(T), None, (cos, sin), heads=H // 2, backend="triton")


def attended(T: int) -> Any:
    q = heads(T).transpose(1, 2)
    return causal_attention.causal_attention(causal_attention.Inputs(q, q, q, None, None), backend="triton")


def attended_relatively(T: int) -> Any:
    q = heads(256)
    k, position = heads(T), torch.empty(T, H, HEAD, dtype=torch.bfloat16, device="cuda")
    return relative_attention.relative_attention(relative_attention.Inputs(q, q, k, k, position), backend="triton")


def drawn() -> Draw:
    return Draw(0.1, 3, torch.empty(1, dtype=torch.int64, device="cuda"))


def dropped(T: int) -> Any:
    return dropout(heads(T).flatten(2), drawn(), backend="triton")


def masked(T: int) -> Any:
    return keep_mask((1, T, H, HEAD), drawn(), backend="triton")


OPS: list[Callable[[int], Any]] = [rotated, rotated_together, attended, attended_relatively, dropped, masked]


@pytest.mark.parametrize("compute", OPS, ids=lambda op: op.__name__)
def test_a_sequence_beyond_32_bits_is_refused(compute: Callable[[int], Any]) -> None:
    with fake_cuda(), LaunchCounter() as counter:
        compute(2**20)
        assert counter.counts.total.triton > 0
        before = counter.counts.total.triton
        with pytest.raises(ValueError, match=r"too many|are possible"):
            compute(2**21 + 1)
        assert counter.counts.total.triton == before
