"""Computes one case by Triton, forward and backward, and prints which kernels it launched in how many warps.

    python -m benchmarks.gpu.launched MODEL NUMBER DEVICE

What benchmarks/gpu/sanitizer.py starts under its tool.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.equality import results_by_triton
from benchmarks.gpu.sanitizer import LAUNCHED, cases
from benchmarks.gpu.timing import draw
from model.kernels.backend import interpreting


def main(arguments: Sequence[str]) -> int:
    model, number, device = arguments
    launches = watch()
    build = cases(model, tiny=model == "tiny")[int(number)]
    results_by_triton(draw(build, torch.device(device), torch.bfloat16, seed=0), torch.bfloat16)
    if device == "cuda":
        torch.cuda.synchronize()
    print(LAUNCHED + json.dumps({kernel: sorted(warps) for kernel, warps in launches.items()}))
    return 0


def watch() -> dict[str, set[int]]:
    """From now on every launch of a Triton kernel is noted here: its name -> its numbers of warps."""
    from triton.runtime.jit import JITFunction

    launches: dict[str, set[int]] = defaultdict(set)

    def noting(run: Any) -> Any:
        def noted(self: Any, *args: Any, **options: Any) -> Any:
            launches[self.fn.__name__].add(options.get("num_warps", 4))
            return run(self, *args, **options)

        return noted

    JITFunction.run = noting(JITFunction.run)
    if interpreting():  # it needs numpy
        from triton.runtime.interpreter import InterpretedFunction

        InterpretedFunction.run = noting(InterpretedFunction.run)
    return launches


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
