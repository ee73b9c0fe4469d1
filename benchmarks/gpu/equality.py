"""Whether a backend of an op computes what the reference does in fp64, on the device and at shipped shapes.

The reference computes every expert for every token, in fp64 too much for one piece: it goes through the tokens in
chunks, and the gradients of what all tokens share are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Inputs
from model.kernels.backend import BACKENDS, resolve

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""||a - b|| / ||b|| of every tensor; half precision rounds the hidden activations of an op too."""
NEAR_TIES = 2e-3
"""How far the reference, plain PyTorch in the dtype, may be off instead, and others with it: rounding decides on
which side of a ReLU numbers near 0 fall. In fp32 a σ-MoE of 16.8 million hidden numbers is off by 9e-4 (H200)."""
ROWS, TIES_OF_A_ROW = 10, 0.3
"""How many times as far as a whole tensor one row of it may be off: of 16,384 rows one that is wrong altogether is 8e-3
of the tensor's norm, which bf16 may be off. And the least of it in σ-MoE, where a ReLU near 0 is a share of a row."""
REPEATING = ("triton", "cuda", "dense", "sets")
"""Backends that promise the same bits when repeated; of the others it is only recorded."""
CHUNK_TOKENS = 1024

WITH_TRITON = ("triton", "sets")
"""Backends that have Triton kernels of their own."""

Tensors = dict[str, Tensor]


def backends_on(op: str, device_type: str, dtype: torch.dtype, widths: Sequence[int] = ()) -> dict[str, str | None]:
    """Every backend of the op -> None, or why it cannot compute it here."""
    found: dict[str, str | None] = {}
    for name in BACKENDS[op]:
        try:
            resolve(name, op, device_type, dtype=dtype, widths=widths)
            found[name] = None
        except ValueError as error:
            found[name] = str(error)
    return found


def results_by_triton(inputs: Inputs, dtype: torch.dtype) -> None:
    """Runs the case by every backend of `WITH_TRITON` that can, for what compiles and launches."""
    case = inputs.case
    usable = backends_on(case.op, inputs.leaves[0].device.type, dtype, case.widths)
    for backend in WITH_TRITON:
        if usable.get(backend, "absent") is None:
            results(inputs, backend)


def results(
    inputs: Inputs, backend: str, within: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext()
) -> tuple[Tensors, Tensors]:
    """Outputs and the gradients of all leaves by name, and the tensors as `compute` left them (its choices, if any).
    `within`: in which context the passes "forward" and "backward" run. AssertionError where the case's own check does
    not hold."""
    case, tensors = inputs.case, dict(inputs.tensors)
    with within("forward"):
        outputs = case.compute(tensors, backend)
    with within("backward"):
        grads = torch.autograd.grad(outputs, inputs.leaves, inputs.upstream)
    if case.check is not None:
        case.check(tensors)
    found = {f"output {number}": y.detach() for number, y in enumerate(outputs)}
    return found | {f"gradient of {n}": g for n, g in zip(case.leaves, grads, strict=True)}, tensors


def expected(inputs: Inputs, left: Tensors, chunk: int = CHUNK_TOKENS) -> Tensors:
    """The reference in fp64 on the same inputs, `chunk` tokens at a time. `left`: what `results` gave besides: the
    reference takes its choices."""
    case = inputs.case
    exact = {name: left[name].detach().double() for name in case.leaves}
    num_tokens = next(exact[name].shape[0] for name in case.leaves if name in case.per_token)
    total = case.share(left) if case.share is not None else None
    pieces: dict[str, list[Tensor]] = {}
    for begin in range(0, num_tokens, chunk):
        rows = slice(begin, begin + chunk)
        part = {name: t[rows] if name in case.per_token else t for name, t in left.items()}
        for name in case.leaves:
            part[name] = (exact[name][rows] if name in case.per_token else exact[name]).clone().requires_grad_()
        outputs = case.compute(part, "reference")
        weight = 1.0 if total is None else case.share(part) / total  # type: ignore[misc]
        upstream = [(u[rows] if u.dim() else u * weight).double() for u in inputs.upstream]
        grads = torch.autograd.grad(outputs, [part[name] for name in case.leaves], upstream)
        for number, y in enumerate(outputs):
            pieces.setdefault(f"output {number}", []).append(y.detach() if y.dim() else y.detach() * weight)
        for name, g in zip(case.leaves, grads, strict=True):
            pieces.setdefault(f"gradient of {name}", []).append(g)
    return {name: _joined(name, found, case.per_token) for name, found in pieces.items()}


def _joined(name: str, pieces: list[Tensor], per_token: Sequence[str]) -> Tensor:
    is_sum = pieces[0].dim() == 0 or (name.startswith("gradient of ") and name.split()[-1] not in per_token)
    return torch.stack(pieces).sum(0) if is_sum else torch.cat(pieces)


def errors(actual: Tensors, wanted: Tensors) -> dict[str, float]:
    """Relative error of every tensor; absolute where the expected one is zero."""
    found = {}
    for name, value in wanted.items():
        difference, norm = (actual[name].double() - value).norm().item(), value.norm().item()
        found[name] = difference / norm if norm > 1e-8 else difference
    return found


def row_errors(actual: Tensors, wanted: Tensors) -> dict[str, float]:
    """Of every tensor the error of its worst row along the last axis, or of its worst number if it is a vector,
    relative to the row's own norm or the rows' root mean square, whichever is larger; absolute where all is expected
    zero."""
    found = {}
    for name, value in wanted.items():
        rows = value.flatten(0, -2) if value.dim() > 1 else value.reshape(-1, 1)
        difference = (actual[name].double().reshape(rows.shape) - rows).norm(dim=1)
        norms = rows.norm(dim=1)
        norms = norms.clamp_min(norms.square().mean().sqrt())
        worst = (
            torch.where(norms > 1e-8, difference / norms, difference).amax() if len(rows) > 0 else norms.new_zeros(())
        )
        found[name] = worst.item()
    return found


def furthest(found: dict[str, float], limits: dict[str, float] | None = None) -> str:
    """The name that is furthest off, in shares of its limit if these are given. Of a NaN nothing is further: to `max`
    it is neither larger nor smaller than a number."""
    return max(found, key=lambda n: (math.isnan(found[n]), found[n] / limits[n] if limits else found[n]))


def row_limit(op: str, limit: float) -> float:
    """What a row may be off where the whole tensor may be off by `limit`."""
    return max(ROWS * limit, TIES_OF_A_ROW if op == "sigma_moe" else 0.0)


def same_bits(actual: Tensors, again: Tensors) -> bool:
    return all(torch.equal(actual[name], again[name]) for name in actual)


def check(
    inputs: Inputs,
    dtype: torch.dtype,
    backend: str,
    wanted: Tensors | None,
    reference: dict[str, float] | None = None,
) -> tuple[dict[str, Any], Tensors]:
    """Row of one backend, with `failed`, and the expected values: `wanted`, or computed if there are none yet or the
    backend chose by itself. `reference`: the errors of the backend `reference`, None for itself."""
    actual, left = results(inputs, backend)
    again, _ = results(inputs, backend)
    chose = any(name in inputs.case.per_token and name not in inputs.tensors for name in left)
    if wanted is None or chose:
        wanted = expected(inputs, left)
    found, same = errors(actual, wanted), same_bits(actual, again)
    if reference is None:
        ties = NEAR_TIES if inputs.case.op == "sigma_moe" else 0.0
        limits = dict.fromkeys(found, max(TOLERANCE[dtype], ties))
    else:
        limits = {name: max(TOLERANCE[dtype], 1.05 * reference[name]) for name in found}
    worst = furthest(found, limits)
    # `not <=`: a NaN fails.
    failed = not all(found[name] <= limits[name] for name in found)
    of_rows = row_errors(actual, wanted)
    wrong = [name for name, error in of_rows.items() if not error <= row_limit(inputs.case.op, limits[name])]
    failed |= len(wrong) > 0
    failed |= not same and backend in REPEATING
    row: dict[str, Any] = {"backend": backend, "worst": worst, "error": found[worst], "errors": found, "repeats": same}
    row["worst_row"] = of_rows[furthest(of_rows)]
    if wrong:
        row["wrong_rows"] = {name: of_rows[name] for name in wrong}
    return row | {"failed": failed}, wanted
