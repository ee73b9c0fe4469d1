"""Sorting more rows than memory holds: sorted runs on disk, then one merge."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

# lexsort needs the rows, an int64 order and the sorted copy: a run is this fraction of the memory allowed.
RUN_SHARE = 4
MIN_MERGE_ROWS = 1024


class ExternalSorter:
    """Rows of uint64, added in any order, come back in ascending order of their columns, first column first.

    Memory: about `memory_bytes`, whatever the number of rows (plus 8 KB a run while merging). Disk: the size of the
    rows, in files of `folder` that begin with `name` and are removed at the end of the `with` block.
    """

    def __init__(self, folder: Path, name: str, *, columns: int, memory_bytes: int) -> None:
        self._folder, self._name, self._columns = folder, name, columns
        self._run_rows = max(1, memory_bytes // (8 * columns * RUN_SHARE))
        self._waiting: list[np.ndarray] = []
        self._waiting_rows = 0
        self._runs: list[tuple[Path, int]] = []

    def add(self, rows: np.ndarray) -> None:
        """Appends rows: uint64 [n, columns]."""
        while len(rows):
            taken = rows[: self._run_rows - self._waiting_rows]
            # A copy: a view would keep the caller's whole array alive.
            self._waiting.append(taken.copy())
            self._waiting_rows += len(taken)
            rows = rows[len(taken) :]
            if self._waiting_rows == self._run_rows:
                self._spill()

    def _sorted_waiting(self) -> np.ndarray:
        rows = np.concatenate([np.empty((0, self._columns), np.uint64), *self._waiting])
        self._waiting, self._waiting_rows = [], 0
        return _sorted(rows)

    def _spill(self) -> None:
        rows = self._sorted_waiting()
        path = self._folder / f"{self._name}-{len(self._runs):05d}.run"
        self._runs.append((path, len(rows)))
        with path.open("wb") as stream:  # tofile passes over a disk that is full while the last bytes are written
            stream.write(rows.data)

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, as arrays uint64 [n, columns] of any length above 0. Call it once."""
        last = self._sorted_waiting()
        if not self._runs:
            if len(last):
                yield last
            return
        if len(last):
            self._waiting, self._waiting_rows = [last], len(last)
            self._spill()
        block_rows = max(MIN_MERGE_ROWS, self._run_rows // len(self._runs))
        runs = [_Run(path, rows, self._columns, block_rows) for path, rows in self._runs]
        while runs:
            # Everything up to the smallest of the last rows in memory is complete: what follows on disk is larger.
            bound = min(tuple(run.buffer[-1].tolist()) for run in runs)
            yield _sorted(np.concatenate([run.take(bound) for run in runs]))
            runs = [run for run in runs if run.fill()]

    def __enter__(self) -> "ExternalSorter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path, _ in self._runs:
            path.unlink(missing_ok=True)


class _Run:
    """A sorted file, of which a block is in memory."""

    def __init__(self, path: Path, rows: int, columns: int, block_rows: int) -> None:
        self._path, self._rows, self._columns, self._block_rows = path, rows, columns, block_rows
        self._read = 0
        self.buffer = np.empty((0, columns), np.uint64)
        self.fill()

    def fill(self) -> bool:
        """Reads the next block if nothing is left in memory; whether there is a row."""
        if not len(self.buffer) and self._read < self._rows:
            count = min(self._block_rows, self._rows - self._read)
            offset = self._read * self._columns * 8
            flat = np.fromfile(self._path, np.uint64, count=count * self._columns, offset=offset)
            self.buffer = flat.reshape(-1, self._columns)
            self._read += count
        return len(self.buffer) > 0

    def take(self, bound: tuple[int, ...]) -> np.ndarray:
        """Removes and returns the rows up to and including `bound`."""
        low, high = 0, len(self.buffer)
        for column, value in enumerate(bound):
            part = self.buffer[low:high, column]
            key = np.uint64(value)
            low, high = low + int(np.searchsorted(part, key, "left")), low + int(np.searchsorted(part, key, "right"))
        taken, self.buffer = self.buffer[:high], self.buffer[high:]
        return taken


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T[::-1])]
