"""scaled_dot_product_attention by each of torch's backends: against fp64, and timed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.command import Context, Failed, Part, Unavailable
from benchmarks.gpu.equality import DTYPES, TOLERANCE, errors, furthest, row_errors, row_limit, same_bits
from benchmarks.gpu.timing import Clock, Work, clock_of, measure

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


class Shape(NamedTuple):
    """Sequences, heads, tokens, head_dim."""

    B: int
    H: int
    T: int
    h: int


SHAPES = {"1b": Shape(8, 8, 2048, 128), "262m dense": Shape(8, 16, 512, 64), "262m rope": Shape(8, 4, 1024, 100)}
TINY = Shape(2, 2, 16, 8)


def truth_parts() -> Iterator[Part]:
    for model in SHAPES:
        for dtype in ("bf16", "fp16"):
            yield Part(f"attention {model} {dtype}", functools.partial(equality, model=model, dtype=dtype))


def speed_parts() -> Iterator[Part]:
    for model in SHAPES:
        yield Part(f"attention {model}", functools.partial(timing, model=model))


def drawn(context: Context, model: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    torch.manual_seed(seed)
    shape = TINY if context.tiny else SHAPES[model]
    found = [torch.randn(shape, device=context.device, dtype=torch.float32).to(dtype) for _ in range(4)]
    return [*(t.requires_grad_() for t in found[:3]), found[3]]


def attended(tensors: list[Tensor], backend: SDPBackend) -> dict[str, Tensor]:
    q, k, v, upstream = tensors
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, (q, k, v), upstream)), strict=True))


def exactly(tensors: list[Tensor]) -> dict[str, Tensor]:
    """softmax(q k^T / sqrt(h)) v in fp64 by plain operators, one sequence at a time."""
    pieces: list[list[Tensor]] = []
    for rows in zip(*(t.detach().double().split(1) for t in tensors), strict=True):
        q, k, v = (t.clone().requires_grad_() for t in rows[:3])
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        y = logits.masked_fill(later, float("-inf")).softmax(-1) @ v
        pieces.append([y.detach(), *torch.autograd.grad(y, (q, k, v), rows[3])])
    return dict(zip(NAMES, map(torch.cat, zip(*pieces, strict=True)), strict=True))


def equality(context: Context, *, model: str, dtype: str) -> dict[str, Any]:
    """Every backend twice; whether it repeats its bits is recorded, not demanded."""
    kind = DTYPES[dtype]
    tensors = drawn(context, model, kind, seed=0)
    wanted = exactly(tensors)
    rows: list[dict[str, Any]] = []
    for name, backend in BACKENDS.items():
        try:
            actual, again = attended(tensors, backend), attended(tensors, backend)
        except RuntimeError as error:
            rows.append({"backend": name, "skipped": str(error).splitlines()[0]})
            continue
        found, of_rows = errors(actual, wanted), row_errors(actual, wanted)
        failed = not all(value <= TOLERANCE[kind] for value in found.values())
        failed |= not all(value <= row_limit("attention", TOLERANCE[kind]) for value in of_rows.values())
        row = {"backend": name, "error": found[furthest(found)], "errors": found, "repeats": same_bits(actual, again)}
        rows.append(row | {"worst_row": of_rows[furthest(of_rows)], "failed": failed})
    result = {"shape": list(tensors[0].shape), "dtype": dtype, "backends": rows}
    bad = [row for row in rows if row.get("failed")]
    if bad:
        said = (f"{row['backend']} differs by {row['error']:.1e}, a row by {row['worst_row']:.1e}" for row in bad)
        raise Failed("; ".join(said), result)
    if all("skipped" in row for row in rows):
        raise Unavailable("no backend of attention takes this shape here")
    return result


def timing(context: Context, *, model: str) -> dict[str, Any]:
    """Forward and backward of every backend, bf16. FLOPs are those of the causal half."""
    _, flops_per_second = ceilings(context)
    clock = clock_of(context.device)
    shape = TINY if context.tiny else SHAPES[model]
    flops = 2 * shape.B * shape.H * shape.T * shape.T * shape.h  # two products of 2 T T h, half of each
    sets = [drawn(context, model, torch.bfloat16, seed) for seed in range(2)]
    rows: list[dict[str, Any]] = []
    for name, backend in BACKENDS.items():
        row: dict[str, Any] = {"backend": name}
        rows.append(row)
        try:
            for phase, factor in (("forward", 1.0), ("backward", 2.5)):
                works = [_work(phase, tensors, backend, clock) for tensors in sets]
                found = measure(clock, works, 3 if context.tiny else 30)
                share = factor * flops / (1e-3 * found.median) / flops_per_second
                row[phase] = found.as_result() | {"of_ceiling": round(share, 4)}
        except RuntimeError as error:
            row["skipped"] = str(error).splitlines()[0]
    return {"shape": list(shape), "flops": flops, "backends": rows}


def _work(phase: str, tensors: list[Tensor], backend: SDPBackend, clock: Clock) -> Work:
    """Of the backward pass the forward one is done here, and kept."""
    q, k, v, upstream = tensors

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if phase == "forward":
        return forward
    with clock.draw_on():
        y = forward()
    return lambda: torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True)
