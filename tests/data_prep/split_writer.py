"""The documents of a split to shards, one document after the other, and what they must read as: what tests of the shard
format write."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards.format import Manifest, dtype_name
from data_prep.shards.manifest_records import ShardEntry, SplitTotals
from data_prep.shards.writer import ShardWriter, write_manifest

EOS = 1


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


def write_data(
    folder: Path,
    documents: list[np.ndarray],
    *,
    vocab_size: int,
    tokens_per_shard: int,
    tokens_per_member: int,
) -> Manifest:
    """Writes documents as the train split of a complete folder, with a file that stands in for the
    tokenizer."""
    folder.mkdir(exist_ok=True)
    dtype = np.dtype(dtype_name(vocab_size))
    sizes: dict[str, Any] = {"tokens_per_shard": tokens_per_shard, "tokens_per_member": tokens_per_member}
    writer = SplitWriter(folder, "train", dtype=dtype, eos_id=EOS, **sizes)
    for document in documents:
        writer.add_document(document, text_bytes=7)
    entries, totals = writer.finish()
    (folder / "tokenizer.model").write_bytes(b"stand-in")
    sha256 = hashlib.sha256(b"stand-in").hexdigest()
    body = {
        "format_version": 1,
        "dtype": dtype.name,
        "tokenizer": {"file": "tokenizer.model", "sha256": sha256, "vocab_size": vocab_size, "eos_id": EOS},
        "splits": {"train": [entry.model_dump() for entry in entries], "validation": []},
        "totals": {
            "train": totals.model_dump(),
            "validation": {"documents": 0, "tokens": 0, "text_bytes": 0},
        },
        "provenance": {"inputs": [], "config": {}, "versions": {}},
    }
    return write_manifest(folder, body)


def random_documents(rng: np.random.Generator, count: int, vocab_size: int) -> list[np.ndarray]:
    return [rng.integers(2, vocab_size, size=int(rng.integers(0, 400))) for _ in range(count)]


def joined(documents: list[np.ndarray]) -> np.ndarray:
    """The reference: documents one after the other, each followed by EOS."""
    return np.concatenate([np.append(document, EOS) for document in documents])
