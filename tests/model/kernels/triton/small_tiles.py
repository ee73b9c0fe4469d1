"""The kernels of SwitchHead and of expert_linear at tiles of 16, so that small shapes have several of everything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.kernel_cases.recording import Launch
from model.kernels.triton import (
    gated_gemm,
    gated_rows,
    set_gemm,
    sorted_gemm,
    sorted_slots,
    switchhead_output,
    switchhead_value,
)
from model.kernels.triton.gated_gemm import GemmTiles


def use_tiles(monkeypatch: pytest.MonkeyPatch, size: int, depth: int | None = None) -> None:
    """Rows and columns of every tile; sums and the sort take half as many tokens as they would, or fewer."""
    tiles = GemmTiles(size, size, depth or size, 4, 1)
    for module, name in (
        (gated_gemm, "gradient_tiles"),
        (sorted_gemm, "gradient_tiles"),
        (sorted_gemm, "project_tiles"),
        (set_gemm, "project_tiles"),
        (set_gemm, "gradient_tiles"),
        (switchhead_value, "forward_tiles"),
        (switchhead_value, "backward_tiles"),
        (switchhead_output, "forward_tiles"),
        (switchhead_output, "backward_tiles"),
    ):
        monkeypatch.setattr(module, name, lambda *_: tiles)
    monkeypatch.setattr(gated_rows, "tile", lambda *_: {"BLOCK_M": size, "BLOCK_N": size})
    monkeypatch.setattr(gated_gemm, "GATE_BLOCK", size)
    monkeypatch.setattr(sorted_slots, "SUM_TILE", (size, size))
    monkeypatch.setattr(sorted_slots, "SORT_TILE", 512)
    monkeypatch.setattr(sorted_slots, "COUNT_BLOCK", 2)


def gemm_bytes(tile: int, dtype_bytes: int, *sizes: tuple[int, int, int]) -> int:
    """What GEMMs of M x N x K at square tiles ask for: both operands once per tile, the result once."""
    return sum(dtype_bytes * (2 * M * N * K // tile + M * N) for M, N, K in sizes)


def of_kernels(launches: Sequence[Launch], *names: str) -> tuple[int, int]:
    """-> (requested bytes, flops of tl.dot) of the launches of these kernels; each must have run."""
    chosen = [launch for launch in launches if launch.kernel in names]
    assert {launch.kernel for launch in chosen} == set(names)
    return sum(launch.requested_bytes for launch in chosen), sum(launch.dot_flops for launch in chosen)
