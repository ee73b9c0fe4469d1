"""Which candidates of `tune` a GPU need not see: compiles them without one, and says what each needs.

    python -m benchmarks.gpu candidates [--only PART] [--prune]

A line per candidate: registers and stack per thread, shared memory per block, and why it is rejected, if it is. --prune
writes the rejected ones of these parts to benchmarks/gpu/pruned.json, which `tune` leaves out on the same architecture.
A candidate takes 1 to 10 s of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

from benchmarks.gpu.tile_search import PRUNED, candidates, pruned, text, warps_of
from common.arguments import at_least
from common.files import write_json

SECONDS = 3600.0
"""Of waiting for the candidates of a part."""


def add_command(commands: Any) -> None:
    what = "compile the candidates of tune without a GPU: registers, stack and shared memory"
    parser = commands.add_parser("candidates", help=what, description=what)
    parser.add_argument("--only", metavar="PART", action="append", help="parts of this beginning; repeatable")
    parser.add_argument("--architecture", type=int, default=90, choices=(80, 90, 100, 120), help="default 90")
    parser.add_argument("--processes", type=at_least(1), default=2, help="default: %(default)s")
    parser.add_argument("--prune", action="store_true", help=f"write the rejected ones to {PRUNED.name}")
    parser.set_defaults(act=act)


def act(options: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("benchmarks.gpu candidates: TRITON_INTERPRET=1 turns the compiler off: unset it", file=sys.stderr)
        return 2
    from benchmarks.gpu.tile_compilation import Compiler
    from benchmarks.gpu.tuned_kernels import searches

    chosen = [s for s in searches(tiny=False) if not options.only or s.name.startswith(tuple(options.only))]
    if not chosen:
        print(f"benchmarks.gpu candidates: no part begins with {' or '.join(options.only)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # read by the processes, which start now
        compiler = Compiler(options.architecture, options.processes)
        try:
            for search in chosen:
                compiler.begin(search, candidates(search))
            for search in chosen:
                print(search.name)
                rejected = {}
                tried = candidates(search)
                for tiles, needs in zip(tried, compiler.resources(search, SECONDS), strict=True):
                    why = needs.rejected(options.architecture, warps_of(tiles))
                    sizes = f"{needs.registers:4} registers {needs.stack_bytes:5} stack {needs.shared_bytes:7} shared"
                    print(f"    {text(tiles):64}{sizes}  {why}", flush=True)
                    if why and tiles != search.today:
                        rejected[text(tiles)] = why
                print(f"    {len(tried)} candidates, {len(rejected)} rejected")
                if options.prune:
                    prune(options.architecture, search.name, rejected)
        finally:
            compiler.stop()
    return 0


def prune(architecture: int, part: str, rejected: dict[str, str]) -> None:
    """Replaces what pruned.json says of the part; of another architecture it keeps nothing."""
    import triton

    parts = pruned(architecture) | {part: rejected}
    found = {"architecture": architecture, "triton": triton.__version__, "parts": parts}
    write_json(PRUNED, found)
