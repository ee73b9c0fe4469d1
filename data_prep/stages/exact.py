"""Exact duplicates: documents with the same hash, of which all but the first are dropped.

shares  exact-NNNNN.rows: the documents whose hash leaves NNNNN when divided by the number of shares, sorted by hash
        in a process each: (document, first document of its hash), sorted
merge   exact.rows, the rows of all shares, and exact.bits, one bit a document
"""

from collections.abc import Iterable, Iterator

import numpy as np

from common.files import replacing, write_file
from data_prep.stages.dedup_task import DedupTask, Piece, divided, group_starts, row_blocks, write_rows
from data_prep.work.parallel import Workers
from data_prep.work.parts import read_hashes

# In one piece C4's 365 million documents would take one process 5 minutes (0.7 us each). Each share reads all hashes
# again, which is a third of its time at 16, so there are no more.
SHARE_DOCUMENTS = 1 << 20
MAX_SHARES = 16
ROW_BYTES = 24


def find_exact(task: DedupTask, workers: Workers) -> None:
    """exact.rows: uint64 (document, first document with the same text), sorted; exact.bits: one bit a document."""
    if task.path("exact.rows").exists():
        return
    shares = []
    if task.config.exact:
        shares = divided(
            task, task.documents, least=SHARE_DOCUMENTS, most=MAX_SHARES, file="exact-{}.rows"
        )  # shares of the hashes, of which there are as many as documents
        todo = [(share, len(shares)) for share in shares if not share.path.exists()]
        sizes = [(share.stop - share.start) * ROW_BYTES for share, _ in todo]
        done = task.documents * ROW_BYTES - sum(sizes)
        workers.run(_find_share, todo, sizes=sizes, done=done, description="finding exact duplicates")
    bits = np.zeros(task.documents // 8 + 1, np.uint8)
    with task.sorter("exact-document", 2) as by_document, replacing(task.path("exact.rows")) as stream:
        for share in shares:
            for rows in row_blocks(share.path, 2):
                by_document.add(rows)
        for rows in by_document.blocks():
            write_rows(stream, rows)
            documents = rows[:, 0].astype(np.int64)
            np.bitwise_or.at(bits, documents >> 3, np.uint8(1) << (documents & 7).astype(np.uint8))
        write_file(task.path("exact.bits"), bits.tobytes())


def _find_share(share_and_shares: tuple[Piece, int]) -> None:
    share, shares = share_and_shares
    task = share.task
    name = share.file.removesuffix(".rows")
    with (
        task.sorter(f"{name}-hash", 3) as by_hash,
        task.sorter(f"{name}-document", 2) as by_document,
        replacing(share.path) as stream,
    ):
        for part, offset in zip(task.parts, task.offsets[:-1].tolist(), strict=True):
            hashes = read_hashes(task.selection.ingest, part.name)
            kept = np.flatnonzero(task.selection.keep(part) & (hashes[:, 0] % np.uint64(shares) == share.number))
            by_hash.add(np.column_stack([hashes[kept], (kept + offset).astype(np.uint64)]))
        for rows in repeats(by_hash.blocks()):
            by_document.add(rows)
        for rows in by_document.blocks():
            write_rows(stream, rows)


def repeats(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """From sorted rows (hash, hash, document): (document, first document of its hash) for all but the first."""
    first = np.empty((0, 3), np.uint64)  # the first row of the group that may go on in the next block
    for block in blocks:
        rows = np.concatenate([first, block])
        start = group_starts((rows[1:, :2] != rows[:-1, :2]).any(axis=1))
        later = np.flatnonzero(start != np.arange(len(rows)))
        yield np.column_stack([rows[later, 2], rows[start[later], 2]])
        first = rows[start[-1] : start[-1] + 1]
