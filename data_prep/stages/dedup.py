"""Duplicates over all files: equal hashes for exact ones, MinHash and LSH for near ones. Joins go through external
sorts, so memory grows with the corpus by only one bit a document.

Steps, which are divided into pieces that all processes share, each piece leaving a file:

    exact     exact.rows: every document but the first of its hash is dropped (exact.py)
    near      near.rows: what resembles a document before it that stays is dropped (near.py)
    verdicts  PART.safetensors: what becomes of the documents of each part
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors.numpy

from common.files import TEMPORARY, write_file, write_json
from data_prep.stages.dedup_task import DedupTask, Piece, divided, read_rows
from data_prep.stages.exact import find_exact
from data_prep.stages.near import find_near
from data_prep.stages.selection import EXACT, NEAR
from data_prep.work.folder import read_json
from data_prep.work.parallel import Workers
from data_prep.work.parts import read_index

VERDICT_PIECES = 64  # of the parts; a part's file is its own record that it is done
DONE = "done.json"
KINDS = (("exact", 2, EXACT), ("near", 3, NEAR))  # (name, columns, verdict) of the rows
# What a killed start leaves half-written, and the bands of code before this, which were not sorted.
REMAINS = ("*.run", "band-*.pairs")
INTERMEDIATE = ("exact-*.rows", "band-*.rows", "similar-*.rows")


def counts(task: DedupTask) -> dict[str, Any]:
    """Documents dropped as `exact` and `near` duplicates, and how many of the near ones have each similarity, from 0 to
    1 (`near_similarity`)."""
    found: dict[str, Any] = read_json(task.folder / DONE)
    return found


def find_duplicates(task: DedupTask, workers: Workers) -> None:
    """Finds all duplicates; after a kill it goes on where it was."""
    _remove(task, REMAINS)  # this process alone has the output: array tasks have no part in this stage
    for path in task.folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink()
    find_exact(task, workers)
    near = find_near(task, workers) if task.config.near else {"near": 0}
    _write_verdicts(task, workers)
    _remove(task, INTERMEDIATE)
    write_json(task.folder / DONE, {"exact": len(read_rows(task.path("exact.rows"), 2)), **near})


def _remove(task: DedupTask, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in task.folder.glob(pattern):
            path.unlink()


def _write_verdicts(task: DedupTask, workers: Workers) -> None:
    """PART.safetensors, uint8 `verdict` [documents], for every part that has duplicates."""
    pieces = divided(task, len(task.parts), least=1, most=VERDICT_PIECES, file="")
    sizes = [int(task.offsets[piece.stop] - task.offsets[piece.start]) for piece in pieces]
    workers.run(_write_some_verdicts, pieces, sizes=sizes, description="writing what is dropped")


def _write_some_verdicts(piece: Piece) -> None:
    task = piece.task
    found = [(read_rows(task.path(f"{name}.rows"), columns), verdict) for name, columns, verdict in KINDS]
    for number in range(piece.start, piece.stop):
        path = task.path(f"{task.parts[number].name}.safetensors")
        if path.exists():
            continue
        start, stop = task.offsets[number : number + 2].tolist()
        verdicts = np.zeros(stop - start, np.uint8)
        for rows, verdict in found:
            low, high = np.searchsorted(rows[:, 0], np.array([start, stop], np.uint64))
            verdicts[rows[low:high, 0].astype(np.int64) - start] = verdict
        if verdicts.any():
            write_file(path, safetensors.numpy.save({"verdict": verdicts}))


def samples(task: DedupTask) -> list[dict[str, Any]]:
    """Examples of what was dropped and why: `config.samples` of each kind, spread evenly."""
    lines = []
    for kind, columns, _ in KINDS:
        rows = read_rows(task.path(f"{kind}.rows"), columns)
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
