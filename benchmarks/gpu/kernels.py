"""Times of every op at shipped shapes, in percent of its roofline, beside other implementations of the same work.

The roofline of a phase is the longer of two times: its useful FLOPs (the op's own formula, chosen experts alone) at the
measured rate of a bf16 product, and its least bytes (every input read once, every result written once) at the measured
rate of a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import kernel_peers
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.command import Context, Failed, Part
from benchmarks.gpu.equality import backends_on
from benchmarks.gpu.timing import Inputs, Work, backward_of, clock_of, draw, draw_sets, forward_of, measure
from benchmarks.op_cases import Build
from benchmarks.op_shapes import equality_cases, outlines, shipped_cases

ROUNDS = 50


class Phase(NamedTuple):
    """What one phase has to do at least."""

    flops: int
    bytes: int

    def roofline(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Milliseconds."""
        return 1e3 * max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def parts(model: str, *, tiny: bool) -> Iterator[Part]:
    builds = equality_cases(small=True) if tiny else shipped_cases(model)
    for build, case in zip(builds, outlines(builds), strict=True):
        name = f"kernel {'tiny' if tiny else model} {case.op} {case.shape}"
        yield Part(name, functools.partial(compute, build=build))


def work_of(build: Build, dtype: torch.dtype) -> dict[str, Phase]:
    """Counted on the meta device, where ops have shapes and formulas alone."""
    inputs = draw(build, torch.device("meta"), dtype, 0)
    case = inputs.case
    with FlopCounterMode(display=False) as forward:
        outputs = case.compute(dict(inputs.tensors), "triton")
    with FlopCounterMode(display=False) as backward:
        grads = torch.autograd.grad(outputs, inputs.leaves, inputs.upstream)
    names = {*case.leaves, *case.per_token}
    read = nbytes(t for name, t in inputs.tensors.items() if name in names)
    return {
        "forward": Phase(forward.get_total_flops(), read + nbytes(outputs)),
        "backward": Phase(backward.get_total_flops(), read + nbytes(inputs.upstream) + nbytes(grads)),
    }


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def compute(context: Context, *, build: Build) -> dict[str, Any]:
    """Every backend but the reference, and the peers, in bf16; what cannot run says why."""
    rates = ceilings(context)
    clock = clock_of(context.device)
    rounds = 2 if context.tiny else ROUNDS
    phases = work_of(build, torch.bfloat16)
    sets = draw_sets(build, context.device, torch.bfloat16, clock.l2_bytes, tiny=context.tiny)
    case = sets[0].case
    floor = {name: phase.roofline(*rates) for name, phase in phases.items()}
    rows: list[dict[str, Any]] = []

    def row(name: str, works: dict[str, list[Work]]) -> None:
        found: dict[str, Any] = {"backend": name}
        for phase, same in works.items():
            ms = measure(clock, same, rounds)
            found[phase] = ms.as_result() | {"of_roofline": round(floor[phase] / ms.median, 4)}
        rows.append(found)

    for backend, why_not in backends_on(case.op, context.device.type, torch.bfloat16, case.widths).items():
        if backend == "reference":
            continue
        if why_not is not None:
            rows.append({"backend": backend, "skipped": why_not})
            continue
        try:
            row(backend, works_of(sets, backend, clock))
        except Exception as error:  # one that cannot be captured must not hide the others
            rows.append({"backend": backend, "reason": f"{type(error).__name__}: {str(error)[:500]}"})
    for peer in kernel_peers.PEERS.get(case.op, ()):
        try:
            row(peer.name, kernel_peers.works(peer, sets, clock))
        except Exception as error:
            rows.append({"backend": peer.name, "skipped": f"{type(error).__name__}: {str(error)[:300]}"})
    work = {name: phase._asdict() | {"roofline_ms": round(floor[name], 5)} for name, phase in phases.items()}
    result = {"op": case.op, "shape": case.shape, "sets": len(sets), "work": work, "backends": rows}
    bad = [f"{found['backend']}: {found['reason']}" for found in rows if "reason" in found]
    if bad:
        raise Failed("; ".join(bad), result)
    return result


def works_of(sets: list[Inputs], backend: str, clock: Any) -> dict[str, list[Work]]:
    """Phase -> the same work on every set of inputs."""
    return {
        "forward": [forward_of(inputs, backend) for inputs in sets],
        "backward": [backward_of(inputs, backend, clock) for inputs in sets],
    }
