"""What is searched: the tiles of a Triton kernel at one shape, and the candidates around those that it has today.

A launch looks into the table of measured tiles (model/kernels/triton/tiles.py) before it takes those of its module.
`tiles_of` puts a candidate there for a while, for the very shape that is searched; nothing stays.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.op_cases import Build
from model.kernels import backend
from model.kernels.triton import tiles as measured_tiles
from model.kernels.triton.tiles import Entry

DTYPE = torch.bfloat16
Tiles = dict[str, int]
"""Name -> size, warps or stages: one configuration of a kernel, as its module counts them."""
MOST = 40
"""Candidates of a kernel, today's tiles among them."""
CHANGES = 2
"""A candidate differs from today's tiles in at most so many numbers."""
PRUNED = Path(__file__).with_name("pruned.json")
"""What `python -m benchmarks.gpu candidates --prune` left out: part -> tiles as text -> why."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A kernel at one shape: one part of `tune`."""

    name: str
    kernels: tuple[str, ...]
    """Functions whose launches are timed, all of one phase together."""
    phase: str
    """"forward" or "backward": in which the op launches them. The other phase keeps today's tiles."""
    build: Build
    backend: str
    kernel: str
    """Its name in the table of measured tiles; `shape` and `rows` are what its launches ask for there."""
    shape: Mapping[str, int]
    rows: int = 0
    own: Tiles
    """Of the kernel's module, by the shape."""
    values: Mapping[str, Sequence[int]]
    """Name -> what candidates try."""
    fits: Callable[[Tiles], bool] = lambda tiles: True
    """The kernel's own rules."""

    @property
    def today(self) -> Tiles:
        """What is launched now."""
        found = measured_tiles.measured(self.kernel, DTYPE, at=self.rows, **self.shape)
        return self.own if found is None else {name: found[name] for name in self.own}

    def entry(self, tiles: Tiles) -> Entry:
        """A line of the table for the current card, or for an H100 where there is none."""
        return Entry(
            kernel=self.kernel,
            capability=backend.cuda_capability(),
            dtype=measured_tiles.DTYPES[DTYPE],
            shape=self.shape,
            rows=self.rows,
            tiles=tiles,
        )


@contextlib.contextmanager
def tiles_of(search: Search, tiles: Tiles) -> Iterator[None]:
    """Inside, the kernel's host code launches it with `tiles`; of none, with today's."""
    with measured_tiles.placed([search.entry(tiles)] if tiles else []):
        yield


def text(tiles: Tiles) -> str:
    """As tables show them and pruned.json names them."""
    return ", ".join(f"{name} {value}" for name, value in tiles.items())


def warps_of(tiles: Tiles) -> int:
    """Triton's default where the tiles do not say."""
    return tiles.get("warps", 4)


def candidates(search: Search, pruned: Iterable[str] = ()) -> list[Tiles]:
    """Today's tiles first, then what differs from them in one number, then in two; without what does not fit and what
    is `pruned`, as text."""
    names, skipped = list(search.today), set(pruned)
    found = [search.today]
    for count in range(1, CHANGES + 1):
        for changed in itertools.combinations(names, count):
            others = [[v for v in search.values.get(name, ()) if v != search.today[name]] for name in changed]
            for values in itertools.product(*others):
                tiles = search.today | dict(zip(changed, values, strict=True))
                if search.fits(tiles) and text(tiles) not in skipped:
                    found.append(tiles)
    return found[:MOST]


def pruned(architecture: int, path: Path = PRUNED) -> dict[str, dict[str, str]]:
    """Part -> tiles as text -> why they are left out; empty where the file is of another architecture."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return dict(found["parts"]) if found["architecture"] == architecture else {}
