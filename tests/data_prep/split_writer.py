"""The documents of a split to shards, one document after the other: what tests of the shard format write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards.manifest_records import ShardEntry, SplitTotals
from data_prep.shards.writer import ShardWriter


class SplitWriter:
    """Writes the documents of one split into shards NAME-00000.tar, NAME-00001.tar, ...

    A shard closes after the document that takes it to `tokens_per_shard` or beyond, so documents never span
    shards. Memory: one member (`tokens_per_member` ids) and the document starts of one shard.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        dtype: np.dtype[Any],
        eos_id: int | None,
        tokens_per_shard: int,
        tokens_per_member: int,
    ) -> None:
        self._folder = folder
        self._split = split
        self._eos = np.array([] if eos_id is None else [eos_id], dtype)
        self._tokens_per_shard = tokens_per_shard
        self._tokens_per_member = tokens_per_member
        self._shard: ShardWriter | None = None
        self._entries: list[ShardEntry] = []
        self._text_bytes = 0

    def add_document(self, tokens: np.ndarray, *, text_bytes: int) -> None:
        """Appends one document: integer ids [n] without EOS (n may be 0 if there is an EOS to follow);
        `text_bytes` is the UTF-8 size of its text."""
        if self._shard is None:
            name = f"{self._split}-{len(self._entries):05d}"
            self._shard = ShardWriter(
                self._folder, name, dtype=self._eos.dtype, tokens_per_member=self._tokens_per_member
            )
        ended = np.concatenate([tokens, self._eos], dtype=self._eos.dtype, casting="unsafe")
        self._shard.add_documents(ended, np.array([len(ended)], np.int64))
        self._text_bytes += text_bytes
        if self._shard.tokens >= self._tokens_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.finish())
            self._shard = None

    def finish(self) -> tuple[list[ShardEntry], SplitTotals]:
        """Closes the last shard; the entries in order and their sums."""
        self._close_shard()
        totals = SplitTotals(
            documents=sum(entry.documents for entry in self._entries),
            tokens=sum(entry.tokens for entry in self._entries),
            text_bytes=self._text_bytes,
        )
        return self._entries, totals
