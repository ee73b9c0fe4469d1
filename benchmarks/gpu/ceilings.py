"""What the card can do at most, measured before anything of ours: bytes a second, and bf16 FLOPs a second."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.command import Context, Unavailable
from benchmarks.gpu.timing import clock_of, measure

COPY, PRODUCT = "ceiling copy", "ceiling product"
"""Names of the parts."""


def copy(context: Context) -> dict[str, Any]:
    """2 GB from one place of the device's memory to another; read and written bytes count. The faster of two ways: the
    driver's copy, and a kernel that writes what it reads (which was the faster one on an H200)."""
    numel = 1 << (14 if context.tiny else 29)
    clock = clock_of(context.device)
    source = torch.randint(-(2**31), 2**31, (numel,), dtype=torch.int32, device=context.device)
    target = torch.empty_like(source)
    ways = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.bitwise_or(source, 0, out=target)}
    found = {}
    for name, way in ways.items():
        target.zero_()
        found[name] = measure(clock, [way], 10)
        assert torch.equal(source, target)
    best = min(found.values(), key=lambda times: times.median)
    moved = 2 * numel * source.element_size()
    each = {f"{name}_ms": round(times.median, 5) for name, times in found.items()}
    return best.as_result() | each | {"bytes": moved, "bytes_per_second": 1e3 * moved / best.median}


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
    copied, multiplied = context.measured[COPY], context.measured[PRODUCT]
    return float(copied["bytes_per_second"]), float(multiplied["flops_per_second"])
