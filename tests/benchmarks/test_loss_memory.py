"""What the planner believes that the loss holds (working_bytes), against the allocations inside its implementations: of
the CPU's a real call, of Triton's one on fake CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.fake_cuda import fake_cuda
from benchmarks.launch_counter import LaunchCounter
from model.kernels.backend import implementation
from model.kernels.ops.linear_cross_entropy import Inputs, chunk_bytes, working_bytes
from pretrain.planning.ledger import Ledger


def held(backend: str, tokens: int, classes: int, width: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that a call allocates at most, less its results."""
    hidden, weight = (torch.empty(size, width, dtype=dtype, device=device) for size in (tokens, classes))
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    inputs = Inputs(hidden, weight, None, targets, -100, True, True, None, 0)
    if device == "cpu":
        hidden.normal_()
        weight.normal_()
    with Ledger() as live:
        results: tuple[Tensor, ...] = implementation("linear_cross_entropy", backend).forward(
            inputs, chunk_bytes(device)
        )
    return live.peak - sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in results}.values())


@pytest.mark.parametrize("tokens", [100, 3000], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_s_loss_holds_what_is_planned(dtype: torch.dtype, tokens: int) -> None:
    planned = working_bytes(tokens, 16_000, 96, dtype, dtype, "cpu")
    assert held("cpu", tokens, 16_000, 96, dtype, "cpu") == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("tokens", [512, 16_384], ids=["one chunk", "four chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_s_loss_holds_what_is_planned(dtype: torch.dtype, tokens: int) -> None:
    planned = working_bytes(tokens, 32_000, 1024, dtype, dtype, "cuda")
    with fake_cuda(), LaunchCounter():
        assert held("triton", tokens, 32_000, 1024, dtype, "cuda") == pytest.approx(planned, rel=0.05)
