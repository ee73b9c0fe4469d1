"""Near-duplicates: documents that share a band's hash are compared, and those that resemble a kept one are dropped.

    join     band-NNN.rows: of one band, (hash, document) sorted; documents of the same hash become candidate pairs,
             (later document, earlier document), sorted
    compare  similar-NNNNN.rows: of one range of later documents, the pairs of all bands, once each, whose estimated
             similarity reaches the threshold: (later, earlier, similarity in millionths), sorted
    choose   near.rows: in the order of the later document, what resembles one before it that stays is dropped. So each
             dropped document has a kept one that it resembles, and chains of resemblance drop no more than that (a
             union-find over pairs would)

Bands and ranges are divided among processes; each is one file, whole or absent, which a later start takes over. The
choice depends on all that come before, so one process makes it, but it looks at no signature.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from common.files import replacing, write_json
from common.progress_bar import byte_bar
from data_prep.stages.dedup_task import DedupTask, Piece, divided, group_starts, read_rows, row_blocks, write_rows
from data_prep.stages.signatures import band_shape, read_band, read_low_bytes, similarity
from data_prep.work.folder import read_json
from data_prep.work.parallel import Workers

# Each document is compared with this many first ones of a bucket: a bucket of n costs 8 n pairs and not n * n / 2.
# Documents that resemble the first share other bands with it too.
BUCKET_COMPARISONS = 8
PAIRS_PER_BATCH = 1 << 15  # 2 x 8 MB of signature bytes
HISTOGRAM_BINS = 20  # of similarity, from 0 to 1
# Ranges of later documents: many, so that a kill costs little and all processes have work to the end. But each opens
# nearly every part once, for the earlier documents of its pairs, so not more.
RANGE_DOCUMENTS = 1 << 16
MAX_RANGES = 512
ROW_BYTES = 16
NEAR = "near.json"


def find_near(task: DedupTask, workers: Workers) -> dict[str, Any]:
    """near.rows: uint64 (document, kept document that it resembles, similarity in millionths), sorted. Returns how many
    there are (`near`), and how many of each similarity (`near_similarity`)."""
    if not task.path(NEAR).exists():
        bands = join_bands(task, workers)
        ranges = compare(task, bands, workers)
        _choose(task, ranges)
    found: dict[str, Any] = read_json(task.path(NEAR))
    return found


def join_bands(task: DedupTask, workers: Workers) -> list[Piece]:
    """The bands, whose files are all there."""
    count, _ = band_shape(task.config.threshold)
    bands = divided(task, count, least=1, most=count, file="band-{}.rows")
    todo = [band for band in bands if not band.path.exists()]
    size = task.documents * ROW_BYTES
    workers.run(
        _join_band,
        todo,
        sizes=[size] * len(todo),
        done=size * (count - len(todo)),
        description="joining bands",
    )
    return bands


def _join_band(band: Piece) -> None:
    task = band.task
    assert task.signatures is not None, "near-duplicates need signatures"
    bits = np.memmap(task.path("exact.bits"), np.uint8, mode="r")  # which the processes share
    name = band.file.removesuffix(".rows")
    with (
        task.sorter(f"{name}-pairs", 2) as by_later,
        replacing(band.path) as stream,
    ):
        with task.sorter(f"{name}-hash", 2) as by_hash:
            for part, offset in zip(task.parts, task.offsets[:-1].tolist(), strict=True):
                local, hashes = read_band(task.signatures, part, band.number)
                documents = local + offset
                left = (bits[documents >> 3] >> (documents & 7).astype(np.uint8)) & 1 == 0
                by_hash.add(np.column_stack([hashes[left], documents[left].astype(np.uint64)]))
            for rows in candidate_pairs(by_hash.blocks()):
                by_later.add(rows)
        for rows in by_later.blocks():
            write_rows(stream, rows)


def candidate_pairs(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """From sorted rows uint64 (hash, document): (later, earlier) for documents of the same hash, each with the first
    BUCKET_COMPARISONS of its bucket."""
    carried = np.empty((0, 2), np.uint64)  # the first documents of the bucket that may go on in the next block
    for block in blocks:
        rows = np.concatenate([carried, block])
        start = group_starts(rows[1:, 0] != rows[:-1, 0])
        place = np.arange(len(rows)) - start  # in the bucket
        later = len(carried) + np.flatnonzero(place[len(carried) :])
        for distance in range(BUCKET_COMPARISONS):
            later = later[place[later] > distance]  # few: most buckets hold one document
            if not len(later):
                break
            yield np.column_stack([rows[later, 1], rows[start[later] + distance, 1]])
        carried = rows[start[-1] : start[-1] + BUCKET_COMPARISONS]


def compare(task: DedupTask, bands: list[Piece], workers: Workers) -> list[Piece]:
    """The ranges of later documents, whose files are all there."""
    ranges = divided(task, task.documents, least=RANGE_DOCUMENTS, most=MAX_RANGES, file="similar-{}.rows")
    pairs = np.zeros(len(ranges), np.int64)
    bounds = np.array([0, *(piece.stop for piece in ranges)], np.uint64)
    for band in bands:
        pairs += np.diff(np.searchsorted(read_rows(band.path, 2)[:, 0], bounds))
    todo = [piece for piece in ranges if not piece.path.exists()]
    sizes = [int(pairs[piece.number]) * ROW_BYTES for piece in todo]
    done = int(pairs.sum()) * ROW_BYTES - sum(sizes)
    work = [(piece, bands) for piece in todo]
    workers.run(_compare_range, work, sizes=sizes, done=done, description="comparing candidates")
    return ranges


def _compare_range(range_and_bands: tuple[Piece, list[Piece]]) -> None:
    piece, bands = range_and_bands
    task = piece.task
    name = piece.file.removesuffix(".rows")
    bounds = np.array([piece.start, piece.stop], np.uint64)
    with (
        task.sorter(f"{name}-later", 3) as by_later,
        task.sorter(f"{name}-earlier", 2) as by_earlier,
        replacing(piece.path) as stream,
    ):
        for band in bands:
            rows = read_rows(band.path, 2)
            low, high = np.searchsorted(rows[:, 0], bounds)
            by_earlier.add(rows[low:high, ::-1])
        # By the earlier document, which may be anywhere: so one batch after the other goes through the parts, and opens
        # each once. The later ones are all in the few parts of this range.
        for pairs in once_each(by_earlier.blocks()):
            similar = similarities(task, pairs)
            chosen = similar >= task.config.threshold
            millionths = np.rint(similar[chosen] * 1e6).astype(np.uint64)
            by_later.add(np.column_stack([pairs[chosen, 1], pairs[chosen, 0], millionths]))
        for rows in by_later.blocks():
            write_rows(stream, rows)


def once_each(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Sorted rows without repeats, PAIRS_PER_BATCH at most at a time."""
    last = np.empty((0, 2), np.uint64)
    for block in blocks:
        rows = np.concatenate([last, block])
        new = np.concatenate([[len(last) == 0], (rows[1:] != rows[:-1]).any(axis=1)])
        last = rows[-1:]
        unique = rows[new]
        for start in range(0, len(unique), PAIRS_PER_BATCH):
            yield unique[start : start + PAIRS_PER_BATCH]


def similarities(task: DedupTask, pairs: np.ndarray) -> np.ndarray:
    """float64 [n]: estimated similarity of pairs uint64 [n, 2] of documents."""
    assert task.signatures is not None, "near-duplicates need signatures"
    documents, inverse = np.unique(pairs, return_inverse=True)
    low_bytes = np.empty((len(documents), 256), np.uint8)
    owner = np.searchsorted(task.offsets, documents.astype(np.int64), side="right") - 1
    numbers, starts = np.unique(owner, return_index=True)
    for number, start, stop in zip(numbers.tolist(), starts, [*starts[1:], len(owner)], strict=True):
        local = documents[start:stop].astype(np.int64) - task.offsets[number]
        low_bytes[start:stop] = read_low_bytes(task.signatures, task.parts[number], local)
    first, second = inverse.reshape(-1, 2).T
    return similarity(low_bytes[first], low_bytes[second])


def _choose(task: DedupTask, ranges: list[Piece]) -> None:
    """near.rows, and near.json last."""
    dropped = bytearray(task.documents // 8 + 1)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    last = -1  # the newest document dropped: pairs come sorted by it
    total = sum(piece.path.stat().st_size for piece in ranges)
    with (
        replacing(task.path("near.rows")) as stream,
        byte_bar(total=total, description="choosing near-duplicates") as bar,
    ):
        for rows in (rows for piece in ranges for rows in row_blocks(piece.path, 3)):
            bar.update(rows.nbytes)
            chosen = []
            for place, (later, earlier, _) in enumerate(rows.tolist()):
                if later == last or dropped[earlier >> 3] >> (earlier & 7) & 1:
                    continue
                dropped[later >> 3] |= 1 << (later & 7)
                last = later
                chosen.append(place)
            write_rows(stream, rows[chosen])
            bins = rows[chosen, 2].astype(np.int64) * HISTOGRAM_BINS // 1_000_000
            histogram += np.bincount(np.minimum(bins, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    write_json(task.path(NEAR), {"near": int(histogram.sum()), "near_similarity": histogram.tolist()})
