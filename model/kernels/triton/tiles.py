"""Tiles that were measured on a card, in one table, which stands before what a kernel's module computes from the shape.

tiles.json is the table, a list of entries: a kernel, the shape at which a card timed it, the card's compute capability
and the tiles. `python -m benchmarks.gpu apply` writes it from what `tune` recorded (docs/gpu.md). An entry is taken for
its very widths, experts and dtype, and where a kernel's module names the rows of a launch, for its number of rows or
more: of fewer nothing was measured. So tiles, like everything that decides the bits of a result, still depend on shapes
and the kind of card alone; with another table they are others.

A launch looks its tiles up once for each shape, and not at all while there are no entries.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.kernels import backend

FILE = Path(__file__).with_name("tiles.json")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
GEMM = ("rows", "columns", "depth", "warps", "stages")
ATTENTION = ("queries", "keys", "warps", "stages")
MLP = ("rows", "hidden", "reduce", "out", "warps", "stages")
KERNELS: dict[str, tuple[str, ...]] = {
    "sigma_moe forward": MLP,
    "sigma_moe backward": (*MLP, "piece", "registers"),
    "sigma_moe weight gradient": ("rows", "hidden", "out", "warps", "stages"),
    "sigma_moe sum": ("tokens", "columns", "warps"),
    "set_gemm project": GEMM,
    "set_gemm gradient": GEMM,
    "gated_sum": ("rows", "columns", "warps"),
    "gated_spread": ("rows", "columns", "warps"),
    "softmax": ("block", "warps"),
    "norm forward": ("warps",),
    "norm backward": ("warps", "resident"),
    "norm sum": ("rows", "columns", "warps"),
    "rope": ("tile", "warps"),
    "route choose and place": ("tokens", "depth", "warps", "stages"),
    "route place": ("placers", "counts"),
    "relative_attention places": ("queries", "keys", "warps", "stages", "depth"),
    **{f"relative_attention {what}": ATTENTION for what in ("forward", "queries", "k and v", "k", "v")},
}
"""Kernel -> the numbers that its tiles have, as its module counts them."""
MOST_WARPS, MOST_STAGES, MIN_REGISTERS = 32, 8, 24

Tiles = Mapping[str, int]
Key = tuple[str, tuple[int, int], str, frozenset[tuple[str, int]]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table."""

    kernel: str
    capability: tuple[int, int]
    dtype: str
    shape: Mapping[str, int]
    """Widths, experts and what else a kernel is compiled for; its own names."""
    rows: int
    """Fewest rows, of those that the grid goes over, for which the entry counts; 0 where a kernel is asked for none."""
    tiles: Tiles
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Where the tiles come from; read by nobody."""

    @property
    def key(self) -> Key:
        return self.kernel, self.capability, self.dtype, frozenset(self.shape.items())

    def as_json(self) -> dict[str, Any]:
        """As the file has it."""
        found = {name: dict(v) if isinstance(v, Mapping) else v for name, v in vars(self).items()}
        return found | {"capability": "{}.{}".format(*self.capability)}


class Table(dict[Key, Entry]):
    """The entries by what a launch asks for."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """ValueError for two entries of one key."""
        super().__init__()
        for entry in entries:
            if entry.key in self:
                raise ValueError(f"two entries of {entry.kernel} for {dict(entry.shape)}, {entry.dtype}")
            self[entry.key] = entry
        self.used: set[Key] = set()
        """Entries that a launch took."""


def measured(kernel: str, dtype: torch.dtype, *, at: int = 0, **shape: int) -> Tiles | None:
    """The tiles of a launch over `at` rows on the current card, if the table has any; else the caller's own hold."""
    return _looked_up(kernel, dtype, at, backend.cuda_capability(), **shape) if _table else None


@functools.lru_cache(maxsize=4096)
def _looked_up(kernel: str, dtype: torch.dtype, at: int, capability: tuple[int, int], **shape: int) -> Tiles | None:
    """Once for each shape, as long as the table stays."""
    key = kernel, capability, DTYPES.get(dtype, ""), frozenset(shape.items())
    entry = _table.get(key)
    if entry is None or at < entry.rows:
        return None
    _table.used.add(key)
    return entry.tiles


@contextlib.contextmanager
def placed(entries: Iterable[Entry]) -> Iterator[Table]:
    """Inside, the table has `entries` too, in the place of those for the same launches. Raises ValueError."""
    global _table
    before, more = _table, [checked(entry) for entry in entries]
    _table = Table((before | Table(more)).values())
    _looked_up.cache_clear()
    try:
        yield _table
    finally:
        _table = before
        _looked_up.cache_clear()


def load(path: Path = FILE) -> Table:
    """ValueError, which names the file, for what is no table of tiles."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Table([entry_of(one) for one in found])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name} is no table of tiles: {error}") from error


def entry_of(found: Mapping[str, Any]) -> Entry:
    """An entry as the file has it. Raises ValueError, TypeError or KeyError."""
    major, minor = map(int, found["capability"].split("."))
    return checked(Entry(**{**found, "capability": (major, minor)}))


def checked(entry: Entry) -> Entry:
    """`entry`, or ValueError for numbers that no kernel takes. Whether these fit a card says
    `python -m benchmarks.compiled`."""
    names = KERNELS.get(entry.kernel)
    if names is None:
        raise ValueError(f"no kernel is called {entry.kernel!r}; there are {', '.join(KERNELS)}")
    said = f"{entry.kernel} {dict(entry.tiles)}"
    if entry.tiles.keys() != set(names):
        raise ValueError(f"{said}: its tiles are {', '.join(names)}")
    for name, value in entry.tiles.items():
        if not fits(name, value):
            raise ValueError(f"{said}: {name} {value!r}")
    if entry.dtype not in DTYPES.values():
        raise ValueError(f"{said}: dtype {entry.dtype!r} is not among {', '.join(DTYPES.values())}")
    if not entry.shape or not all(isinstance(v, int) and v >= 0 for v in (*entry.shape.values(), entry.rows)):
        raise ValueError(f"{said}: shape and rows are whole numbers, not {dict(entry.shape)} and {entry.rows!r}")
    return entry


def fits(name: str, value: Any) -> bool:
    """Whether Triton takes it: blocks and warps are powers of two."""
    if not isinstance(value, int):
        return False
    if name == "stages":
        return 1 <= value <= MOST_STAGES
    if name == "registers":  # of a thread; 0: as the compiler likes
        return value == 0 or (value in range(MIN_REGISTERS, 256, 8))
    return value > 0 and value & (value - 1) == 0 and not (name == "warps" and value > MOST_WARPS)


_table = load()
