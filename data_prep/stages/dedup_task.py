"""What the removal of duplicates is told, and what its steps share: spans of documents, and rows in files.

A document's number is its position in reading order: files, then documents of a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.presence import exists
from data_prep.config.schema import DedupConfig
from data_prep.stages.external_sort import ExternalSorter
from data_prep.stages.selection import Selection
from data_prep.work.parts import Part

READ_BYTES = 1 << 20  # of a file of rows at a time


@dataclass(frozen=True, kw_only=True)
class DedupTask:
    """What is compared, and where the results go."""

    config: DedupConfig
    parts: tuple[Part, ...]
    selection: Selection
    """The documents that are left before this stage."""
    signatures: Path | None
    """Folder of signatures; None without near-duplicates."""
    folder: Path

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent, with each piece: without the names of raw files, of which there may be 100,000. Only
        the samples want them, which no worker makes."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "parts": self._nameless}

    @cached_property
    def _nameless(self) -> tuple[Part, ...]:
        return tuple(replace(part, files=()) for part in self.parts)

    @cached_property  # asked for again and again, and C4 has 25,000 parts
    def offsets(self) -> np.ndarray:
        """int64 [parts + 1]: number of the first document of each part."""
        return np.concatenate([[0], np.cumsum([part.documents for part in self.parts], dtype=np.int64)])

    @property
    def documents(self) -> int:
        return int(self.offsets[-1])

    def path(self, name: str) -> Path:
        """An intermediate file."""
        return self.folder / name

    def sorter(self, name: str, columns: int) -> ExternalSorter:
        return ExternalSorter(self.folder, name, columns=columns, memory_bytes=self.config.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One of the pieces into which a step is divided. Each leaves one file, by which a later start knows that it is
    done."""

    task: DedupTask
    number: int
    start: int
    """Of what is divided, such as documents."""
    stop: int
    file: str

    @property
    def path(self) -> Path:
        return self.task.path(self.file)


def divided(task: DedupTask, total: int, *, least: int, most: int, file: str) -> list[Piece]:
    """`total` things in at most `most` pieces of `least` or more, in order. Depends on nothing else, least of all on
    the number of workers, so that every start of a preparation finds the pieces of the one before. `file`: their names,
    with {} for the number."""
    size = max(least, -(-total // most))
    return [
        Piece(task=task, number=number, start=start, stop=min(start + size, total), file=file.format(f"{number:05d}"))
        for number, start in enumerate(range(0, total, size))
    ]


def write_rows(stream: IO[bytes], rows: np.ndarray) -> None:
    stream.write(np.ascontiguousarray(rows, np.uint64).tobytes())


def read_rows(path: Path, columns: int) -> np.ndarray:
    """Rows uint64 [n, columns] of a file, mapped and not read."""
    if not exists(path) or path.stat().st_size == 0:
        return np.empty((0, columns), np.uint64)
    return np.memmap(path, np.uint64, mode="r").reshape(-1, columns)


def row_blocks(path: Path, columns: int) -> Iterator[np.ndarray]:
    """The rows of a file in order, about READ_BYTES at a time."""
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES // (8 * columns) * 8 * columns):
            yield np.frombuffer(block, np.uint64).reshape(-1, columns)


def group_starts(differs: np.ndarray) -> np.ndarray:
    """int64 [n]: index of the first row of each row's group, from bool [n - 1]: whether a row differs from the one
    before it."""
    new = np.concatenate([[True], differs])
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
