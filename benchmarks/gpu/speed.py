"""`speed`: how near to its own ceilings the card is used, by each kernel and by whole micro-steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import attention, block, ceilings, counters, kernel_peers, kernels, micro_step, sparse, tuned_step
from benchmarks.gpu.command import Context, Part
from benchmarks.op_shapes import MODELS


def parts(*, tiny: bool) -> Iterator[Part]:
    """Kernels of the 1B model before everything that needs more than torch and triton."""
    yield Part(ceilings.COPY, ceilings.copy)
    yield Part(ceilings.PRODUCT, ceilings.product)
    first, *others = MODELS
    yield from kernels.parts(first, tiny=tiny)
    yield from attention.speed_parts()
    yield from sparse.parts()
    steps = [*micro_step.parts(tiny=tiny), *tuned_step.parts(tiny=tiny)]
    yield from (part for part in steps if "262m" not in part.name)
    yield from block.parts(tiny=tiny)
    yield from counters.parts(tiny=tiny)
    for model in others if not tiny else ():
        yield from kernels.parts(model, tiny=tiny)
    yield from (part for part in steps if "262m" in part.name)
    yield Part("peers", peers)


def peers(context: Context) -> dict[str, Any]:
    """Which packages with implementations of the same work can be imported here."""
    return {"importable": kernel_peers.importable()}
