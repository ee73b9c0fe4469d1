"""What the entries of the table of measured tiles (model/kernels/triton/tiles.json) compile to.

They are no cases of benchmarks/kernel_cases: the op itself is run on fake CUDA tensors with the entry in place, and
what it launches is compiled for the entry's own architecture, as `tune` compiles its candidates. There are few, so
nothing is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks.compiled_case import SHARED_BYTES
from benchmarks.gpu.tile_compilation import Compiler, Resources
from benchmarks.gpu.tile_search import Search, Tiles, text, warps_of
from model.kernels.triton.tiles import Entry, load

SECONDS = 600.0
"""Of waiting for one of them."""


def searched() -> Iterator[tuple[Entry, Search | None]]:
    """Every entry with the search at whose shape it was timed; None of one that no search knows."""
    entries = load().values()
    if entries:
        from benchmarks.gpu.tuned_kernels import searches

        known = {(*search.entry(search.own).key[2:], search.kernel): search for search in searches(tiny=False)}
        for entry in entries:
            yield entry, known.get((*entry.key[2:], entry.kernel))


def check(architectures: Sequence[int], only: str) -> tuple[int, list[str]]:
    """How many entries of these architectures there are whose search matches the expression `only`, and what is wrong
    with them, in words."""
    count, wrong, tried = 0, list[str](), dict[int, list[tuple[str, Search, Tiles]]]()
    for entry, search in searched():
        architecture = 10 * entry.capability[0] + entry.capability[1]
        said = f"{entry.kernel} {dict(entry.shape)}, {text(dict(entry.tiles))}"
        if architecture not in architectures or not re.search(only, search.name if search else said):
            continue
        count += 1
        if search is None:
            wrong.append(f"{said}: no search of benchmarks/gpu/tuned_kernels.py has this kernel and shape")
        elif architecture not in SHARED_BYTES:
            wrong.append(f"{said}: what fits sm_{architecture} is not known")
        else:
            tried.setdefault(architecture, []).append((said, search, dict(entry.tiles)))
    for architecture, ones in tried.items():
        needs = compiled([(search, tiles) for _, search, tiles in ones], architecture)
        for (said, _, tiles), need in zip(ones, needs, strict=True):
            why = need.rejected(architecture, warps_of(tiles))
            wrong += [f"{said}: {why}"] if why else []
    return count, wrong


def compiled(tried: Sequence[tuple[Search, Tiles]], architecture: int) -> list[Resources]:
    """Of searches that differ, in processes that touch no GPU."""
    compiler = Compiler(architecture)
    try:
        for search, tiles in tried:
            compiler.begin(search, [tiles])
        return [compiler.resources(search, SECONDS)[0] for search, _ in tried]
    finally:
        compiler.stop()
