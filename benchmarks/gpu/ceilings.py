"""What the card can do at most, measured before anything of ours: bytes a second, and bf16 FLOPs a second."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.command import Context, Unavailable
from benchmarks.gpu.timing import clock_of, measure

COPY, PRODUCT = "ceiling copy", "ceiling product"
"""Names of the parts."""


def copy(context: Context) -> dict[str, Any]:
    """2 GB from one place of the device's memory to another; read and written bytes count."""
    numel = 1 << (16 if context.tiny else 31)
    clock = clock_of(context.device)
    source = torch.randint(-128, 128, (numel,), dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)
    found = measure(clock, [lambda: target.copy_(source)], 10)
    assert torch.equal(source, target)
    return found.as_result() | {"bytes": 2 * numel, "bytes_per_second": 2e3 * numel / found.median}


def product(context: Context) -> dict[str, Any]:
    """Random factors, for zeros are faster: 8192 x 8192 x 8192."""
    n = 64 if context.tiny else 8192
    clock = clock_of(context.device)
    factors = [torch.randn(2, n, n, dtype=torch.bfloat16, device=context.device) for _ in range(2)]
    out = torch.empty(n, n, dtype=torch.bfloat16, device=context.device)
    found = measure(clock, [lambda pair=pair: torch.mm(pair[0], pair[1], out=out) for pair in factors], 20)  # type: ignore[misc]
    return found.as_result() | {"flops": 2 * n**3, "flops_per_second": 2e3 * n**3 / found.median}


def ceilings(context: Context) -> tuple[float, float]:
    """Bytes and FLOPs a second, as the two parts measured them."""
    if not {COPY, PRODUCT} <= context.measured.keys():
        raise Unavailable(f"the parts {COPY!r} and {PRODUCT!r} have not been measured")
    return (
        float(context.measured[COPY]["bytes_per_second"]),
        float(context.measured[PRODUCT]["flops_per_second"]),
    )
