"""Encoded parts to shards. Where a shard begins and ends follows from the lengths of the documents alone, so shards
can be written in any order, by any number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json
from common.splits import SplitName
from data_prep.shards.format import ShardEntry, SplitTotals
from data_prep.shards.writer import ShardWriter
from data_prep.stages.encode import encoded_splits, read_tokens
from data_prep.work.folder import read_json
from data_prep.work.parallel import Workers
from data_prep.work.parts import Part

FEW_TOKENS = 1 << 28
"""Fewer are written by one process: others that import torch would start longer than it writes."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive documents of one split of a part."""

    part: Part
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    name: str
    split: SplitName
    pieces: tuple[Piece, ...]
    tokens: int
    encoded: Path
    folder: Path
    dtype: str
    tokens_per_member: int

    @property
    def bytes(self) -> int:
        """Of its ids."""
        return self.tokens * np.dtype(self.dtype).itemsize


def cut_shards(
    parts: Sequence[Part], encoded: Path, split: SplitName, tokens_per_shard: int
) -> Iterator[tuple[tuple[Piece, ...], int]]:
    """The pieces of each shard of a split and their ids: a shard ends with the document that takes it to
    `tokens_per_shard` or beyond."""
    pieces: list[Piece] = []
    filled = 0
    for part in parts:
        stop = np.cumsum(encoded_splits(encoded, part)[split].tokens)
        first = 0
        while first < len(stop):
            before = int(stop[first - 1]) if first else 0
            last = int(np.searchsorted(stop, before + tokens_per_shard - filled))  # the document that fills the shard
            end = min(last + 1, len(stop))
            pieces.append(Piece(part=part, first=first, stop=end))
            filled += int(stop[end - 1]) - before
            first = end
            if filled >= tokens_per_shard:
                yield tuple(pieces), filled
                pieces, filled = [], 0
    if pieces:
        yield tuple(pieces), filled


def split_totals(parts: Sequence[Part], encoded: Path, splits: Sequence[SplitName]) -> dict[SplitName, SplitTotals]:
    """Sums over each split."""
    sums = {split: np.zeros(3, np.int64) for split in splits}
    for part in parts:
        found = encoded_splits(encoded, part)
        for split, so_far in sums.items():
            of = found[split]
            so_far += (len(of.tokens), of.tokens.sum(), of.text_bytes.sum())
    return {
        split: SplitTotals(documents=int(documents), tokens=int(tokens), text_bytes=int(text_bytes))
        for split, (documents, tokens, text_bytes) in sums.items()
    }


def read_entry(task: ShardTask) -> ShardEntry | None:
    """The entry of a shard that is complete and still in the folder, or None."""
    body: dict[str, Any] | None = read_json(task.folder / f"{task.name}.json")
    if body is None or not all((task.folder / body[key]).exists() for key in ("file", "index_file")):
        return None
    return ShardEntry.model_validate(body)


def write_shard(task: ShardTask) -> None:
    """Writes NAME.tar, its index and NAME.json, which is the entry of the manifest."""
    dtype = np.dtype(task.dtype)
    writer = ShardWriter(task.folder, task.name, dtype=dtype, tokens_per_member=task.tokens_per_member)
    try:
        for piece in task.pieces:
            found = encoded_splits(task.encoded, piece.part)[task.split]
            stop = found.start + np.cumsum(found.tokens)
            start = found.start if piece.first == 0 else int(stop[piece.first - 1])
            ids = read_tokens(task.encoded, piece.part.name, dtype)
            writer.add_documents(ids[start : int(stop[piece.stop - 1])], found.tokens[piece.first : piece.stop])
        entry = writer.finish()
    except BaseException as error:
        writer.discard(error)
        raise
    write_json(task.folder / f"{task.name}.json", entry.model_dump(mode="json"))


def write_shards(tasks: Sequence[ShardTask], finished: Sequence[ShardTask], workers: Workers) -> None:
    """Writes shards on all processes, or, where there is little to write, in this one alone. `finished`: those that an
    earlier start has written.

    webdataset brings torch: several seconds and 190 MB. So it is imported before the processes are forked, once for all
    of them; those of the stages before are ended.
    """
    if sum(task.tokens for task in tasks) < FEW_TOKENS:
        workers = Workers(1)
    elif workers.count > 1:
        import webdataset.writer  # noqa: F401

        workers.close()
    sizes, done = [task.bytes for task in tasks], sum(task.bytes for task in finished)
    workers.run(write_shard, tasks, sizes=sizes, done=done, description="writing shards")
