"""Duplicates over all files: equal hashes for exact ones, MinHash and LSH for near ones. Joins go through external
sorts, so memory grows with the corpus by only one bit a document.

A document's number is its position in reading order (files, then documents of a file). Steps, each leaving a file:

    exact   (hash, number) sorted: every document but the first of its hash is dropped
    bands   for each band (hash, number) sorted: documents that share a hash become candidate pairs
    near    all pairs sorted, once each, by the later document: similarity is estimated, and a document is dropped if
            it is similar to one before it that stays. So each dropped document has a kept one that it resembles, and
            chains of resemblance drop no more than that (a union-find over pairs would)
    parts   the verdicts of each part
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy

from common.files import replacing, write_file, write_json
from common.presence import exists
from data_prep.config.schema import DedupConfig
from data_prep.stages.external_sort import ExternalSorter
from data_prep.stages.selection import EXACT, NEAR, Selection
from data_prep.stages.signatures import band_shape, read_band, read_low_bytes, similarity
from data_prep.work.folder import read_json
from data_prep.work.parallel import Workers
from data_prep.work.parts import Part, read_index

# Each document is compared with this many first ones of a bucket: a bucket of n costs 8 n pairs and not n * n / 2.
# Documents that resemble the first share other bands with it too.
BUCKET_COMPARISONS = 8
PAIRS_PER_BATCH = 1 << 15  # 2 x 8 MB of signature bytes
HISTOGRAM_BINS = 20  # of similarity, from 0 to 1
DONE = "done.json"


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

    @cached_property  # asked for again and again, and C4 has 25,000 parts
    def offsets(self) -> np.ndarray:
        """int64 [parts + 1]: number of the first document of each part."""
        return np.concatenate([[0], np.cumsum([part.documents for part in self.parts], dtype=np.int64)])

    def path(self, name: str) -> Path:
        """An intermediate file."""
        return self.folder / name

    def sorter(self, name: str, columns: int) -> ExternalSorter:
        return ExternalSorter(self.folder, name, columns=columns, memory_bytes=self.config.memory_bytes)


def is_deduplicated(task: DedupTask) -> bool:
    """Whether all duplicates have been found."""
    return (task.folder / DONE).exists()


def counts(task: DedupTask) -> dict[str, Any]:
    """Documents dropped as `exact` and `near` duplicates, and how many of the near ones have each similarity, from 0 to
    1 (`near_similarity`)."""
    found: dict[str, Any] = read_json(task.folder / DONE)
    return found


def find_duplicates(tasks: Iterable[DedupTask], workers: Workers) -> None:
    """Finds all duplicates; after a kill it goes on where it was."""
    for task in tasks:
        _find(task, workers)


def _find(task: DedupTask, workers: Workers) -> None:
    if not task.path("exact.rows").exists():
        _find_exact(task)
    near: dict[str, Any] = {"near": 0}
    if task.config.near:
        bands, _ = band_shape(task.config.threshold)
        todo = [(task, band) for band in range(bands) if not _band_file(task, band).exists()]
        sizes = [sum(part.bytes for part in task.parts)] * len(todo)
        workers.run(_find_candidates, todo, sizes=sizes, description="joining bands")
        if not task.path("near.json").exists():
            _find_near(task, bands)
        near = read_json(task.path("near.json"))
    _write_verdicts(task)
    exact = task.path("exact.rows").stat().st_size // 16
    write_json(task.folder / DONE, {"exact": exact, **near})
    for path in task.folder.glob("band-*.pairs"):
        path.unlink()


def _write_rows(stream: IO[bytes], rows: np.ndarray) -> None:
    stream.write(np.ascontiguousarray(rows, np.uint64).tobytes())


def _find_exact(task: DedupTask) -> None:
    """exact.rows: uint64 (document, first document with the same text), sorted; exact.bits: one bit a document."""
    bits = np.zeros(int(task.offsets[-1]) // 8 + 1, np.uint8)
    with (
        task.sorter("exact-hash", 3) as by_hash,
        task.sorter("exact-document", 2) as by_document,
        replacing(task.path("exact.rows")) as stream,
    ):
        if task.config.exact:
            for part, offset in zip(task.parts, task.offsets[:-1].tolist(), strict=True):
                kept = np.flatnonzero(task.selection.keep(part))
                hashes = read_index(task.selection.ingest, part.name).hash[kept]
                by_hash.add(np.column_stack([hashes, (kept + offset).astype(np.uint64)]))
            for rows in _repeats(by_hash.blocks()):
                by_document.add(rows)
        for rows in by_document.blocks():
            _write_rows(stream, rows)
            documents = rows[:, 0].astype(np.int64)
            np.bitwise_or.at(bits, documents >> 3, np.uint8(1) << (documents & 7).astype(np.uint8))
        write_file(task.path("exact.bits"), bits.tobytes())


def _repeats(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """From sorted rows (hash, hash, document): (document, first document of its hash) for all but the first."""
    first = np.empty((0, 3), np.uint64)  # the first row of the group that may go on in the next block
    for block in blocks:
        rows = np.concatenate([first, block])
        start = _group_starts((rows[1:, :2] != rows[:-1, :2]).any(axis=1))
        later = np.flatnonzero(start != np.arange(len(rows)))
        yield np.column_stack([rows[later, 2], rows[start[later], 2]])
        first = rows[start[-1] : start[-1] + 1]


def _group_starts(differs: np.ndarray) -> np.ndarray:
    """int64 [n]: index of the first row of each row's group, from bool [n - 1]: whether a row differs from the one
    before it."""
    new = np.concatenate([[True], differs])
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def _band_file(task: DedupTask, band: int) -> Path:
    return task.path(f"band-{band:03d}.pairs")


def _find_candidates(task_and_band: tuple[DedupTask, int]) -> None:
    """band-NNN.pairs: uint64 (later document, earlier document) of one band."""
    task, band = task_and_band
    assert task.signatures is not None, "near-duplicates need signatures"
    bits = np.fromfile(task.path("exact.bits"), np.uint8)
    with task.sorter(f"band-{band:03d}", 2) as by_hash, replacing(_band_file(task, band)) as stream:
        for part, offset in zip(task.parts, task.offsets[:-1].tolist(), strict=True):
            local, hashes = read_band(task.signatures, part, band)
            documents = local + offset
            left = (bits[documents >> 3] >> (documents & 7).astype(np.uint8)) & 1 == 0
            by_hash.add(np.column_stack([hashes[left], documents[left].astype(np.uint64)]))
        for rows in candidate_pairs(by_hash.blocks()):
            _write_rows(stream, rows)


def candidate_pairs(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """From sorted rows uint64 (hash, document): (later, earlier) for documents of the same hash, each with the first
    BUCKET_COMPARISONS of its bucket."""
    carried = np.empty((0, 2), np.uint64)  # the first documents of the bucket that may go on in the next block
    for block in blocks:
        rows = np.concatenate([carried, block])
        number = np.arange(len(rows))
        start = _group_starts(rows[1:, 0] != rows[:-1, 0])
        for distance in range(BUCKET_COMPARISONS):
            later = np.flatnonzero((start + distance < number) & (number >= len(carried)))
            if not len(later):
                break
            yield np.column_stack([rows[later, 1], rows[start[later] + distance, 1]])
        carried = rows[start[-1] : start[-1] + BUCKET_COMPARISONS]


def _find_near(task: DedupTask, bands: int) -> None:
    """near.rows: uint64 (document, kept document that it resembles, similarity in millionths), sorted; near.json: how
    many."""
    assert task.signatures is not None, "near-duplicates need signatures"
    dropped = bytearray(int(task.offsets[-1]) // 8 + 1)
    count = 0
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    last = -1  # the newest document dropped: pairs come sorted by it
    with task.sorter("pairs", 2) as sorter, replacing(task.path("near.rows")) as stream:
        for band in range(bands):
            for rows in _file_rows(_band_file(task, band)):
                sorter.add(rows)
        for pairs in _once_each(sorter.blocks()):
            similar = _similarities(task, pairs)
            kept_rows = []
            chosen = np.flatnonzero(similar >= task.config.threshold)
            for later, earlier, value in zip(*pairs[chosen].T.tolist(), similar[chosen].tolist(), strict=True):
                if later == last or dropped[earlier >> 3] >> (earlier & 7) & 1:
                    continue
                dropped[later >> 3] |= 1 << (later & 7)
                last = later
                kept_rows.append((later, earlier, round(value * 1e6)))
            if kept_rows:
                rows = np.array(kept_rows, np.uint64)
                _write_rows(stream, rows)
                histogram += np.bincount(
                    np.minimum(rows[:, 2].astype(np.int64) * HISTOGRAM_BINS // 1_000_000, HISTOGRAM_BINS - 1),
                    minlength=HISTOGRAM_BINS,
                )
                count += len(rows)
    body = {"near": count, "near_similarity": histogram.tolist()}
    write_json(task.path("near.json"), body)


def _file_rows(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            yield np.frombuffer(block, np.uint64).reshape(-1, 2)


def _once_each(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Sorted rows without repeats, PAIRS_PER_BATCH at most at a time."""
    last = np.empty((0, 2), np.uint64)
    for block in blocks:
        rows = np.concatenate([last, block])
        new = np.concatenate([[len(last) == 0], (rows[1:] != rows[:-1]).any(axis=1)])
        last = rows[-1:]
        unique = rows[new]
        for start in range(0, len(unique), PAIRS_PER_BATCH):
            yield unique[start : start + PAIRS_PER_BATCH]


def _similarities(task: DedupTask, pairs: np.ndarray) -> np.ndarray:
    """float64 [n]: estimated similarity of pairs uint64 [n, 2] of documents."""
    assert task.signatures is not None, "near-duplicates need signatures"
    documents, inverse = np.unique(pairs, return_inverse=True)
    low_bytes = np.empty((len(documents), 256), np.uint8)
    owner = np.searchsorted(task.offsets, documents.astype(np.int64), side="right") - 1
    for number in np.unique(owner).tolist():
        rows = np.flatnonzero(owner == number)
        local = documents[rows].astype(np.int64) - task.offsets[number]
        low_bytes[rows] = read_low_bytes(task.signatures, task.parts[number], local)
    first, second = inverse.reshape(-1, 2).T
    return similarity(low_bytes[first], low_bytes[second])


def _write_verdicts(task: DedupTask) -> None:
    """PART.safetensors, uint8 `verdict` [documents], for every part that has duplicates."""
    exact = read_rows(task.folder, "exact.rows", 2)
    near = read_rows(task.folder, "near.rows", 3)
    offsets = task.offsets.tolist()
    for part, start, stop in zip(task.parts, offsets[:-1], offsets[1:], strict=True):
        verdicts = np.zeros(part.documents, np.uint8)
        for rows, verdict in ((exact, EXACT), (near, NEAR)):
            low, high = np.searchsorted(rows[:, 0], np.array([start, stop], np.uint64))
            verdicts[rows[low:high, 0].astype(np.int64) - start] = verdict
        if verdicts.any():
            path = task.folder / f"{part.name}.safetensors"
            write_file(path, safetensors.numpy.save({"verdict": verdicts}))


def read_rows(folder: Path, name: str, columns: int) -> np.ndarray:
    """Rows uint64 [n, columns] of a result, mapped and not read."""
    path = folder / name
    if not exists(path) or path.stat().st_size == 0:
        return np.empty((0, columns), np.uint64)
    return np.memmap(path, np.uint64, mode="r").reshape(-1, columns)


def samples(task: DedupTask) -> list[dict[str, Any]]:
    """Examples of what was dropped and why: `config.samples` of each kind, spread evenly."""
    lines = []
    for kind, columns in (("exact", 2), ("near", 3)):
        rows = read_rows(task.folder, f"{kind}.rows", columns)
        wanted = np.unique(np.linspace(0, len(rows) - 1, task.config.samples).astype(np.int64))[: len(rows)]
        for document, other, *millionths in rows[wanted].tolist():
            line = {"kind": kind, **_excerpt(task, document, ""), **_excerpt(task, other, "kept_")}
            lines.append({**line, "similarity": round(millionths[0] / 1e6, 3)} if millionths else line)
    return lines


EXCERPT_CHARACTERS = 200


def _excerpt(task: DedupTask, document: int, prefix: str) -> dict[str, Any]:
    number = int(np.searchsorted(task.offsets, document, side="right")) - 1
    part, local = task.parts[number], document - int(task.offsets[number])
    position = int(read_index(task.selection.ingest, part.name).position[local])
    chosen = np.zeros(part.documents, np.bool_)
    chosen[local] = True
    _, data = next(iter(task.selection.documents(part, chosen)))
    return {
        f"{prefix}file": part.file_of(local),
        f"{prefix}position": position,
        f"{prefix}excerpt": data.decode("utf-8")[:EXCERPT_CHARACTERS],
    }
