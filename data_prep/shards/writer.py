"""Writing shards and manifests. The same tokens and settings give the same bytes, on any machine at any time.

The tar headers are written here and not by webdataset: its default mtime is a float, which adds a 1 KB PAX
header to every member and a different sha256 to every run.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replacing, write_file
from data_prep.shards.format import (
    INDEX_SUFFIX,
    MANIFEST_FILE,
    MEMBER_SUFFIX,
    TAR_BLOCK_BYTES,
    Manifest,
    ShardEntry,
    ShardIndex,
    SplitTotals,
    manifest_digest,
)


def write_manifest(folder: Path, body: dict[str, Any]) -> Manifest:
    """Adds the digest to a manifest body (JSON types only), writes it atomically and loads it back,
    validated."""
    body = {**body, "digest": manifest_digest(body)}
    write_file(folder / MANIFEST_FILE, (json.dumps(body, indent=2) + "\n").encode("ascii"))
    return Manifest.load(folder)


class ShardWriter:
    """One tar: NAME.tar and its index get their names in `finish`, after which the shard is complete."""

    def __init__(self, folder: Path, name: str, *, dtype: np.dtype[Any], tokens_per_member: int) -> None:
        self._folder = folder
        self._name = name
        self._dtype = dtype.newbyteorder("<")
        self._replacing = replacing(folder / f"{name}.tar")
        self._stream = self._replacing.__enter__()
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._member = np.empty(tokens_per_member, self._dtype)
        self._fill = 0  # ids in self._member
        self._member_offset: list[int] = []
        self._member_tokens: list[int] = []
        self._document_start: list[np.ndarray] = []
        self.tokens = 0
        """Ids so far."""

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: integer ids [sum(lengths)], EOS included; lengths int64 [documents], all above 0."""
        assert len(tokens) == lengths.sum() and (lengths > 0).all(), "a document without a token has no place"
        self._document_start.append(self.tokens + np.cumsum(lengths) - lengths)
        self.tokens += len(tokens)
        while len(tokens):
            taken = min(len(tokens), len(self._member) - self._fill)
            self._member[self._fill : self._fill + taken] = tokens[:taken]
            self._fill += taken
            tokens = tokens[taken:]
            if self._fill == len(self._member):
                self._write_member()

    def _write_member(self) -> None:
        data = self._member[: self._fill].tobytes()
        header = tarfile.TarInfo(f"{self._name}-{len(self._member_tokens):06d}{MEMBER_SUFFIX}")
        header.size, header.mtime, header.uid, header.gid, header.mode = len(data), 0, 0, 0, 0o644
        self._append(header.tobuf(tarfile.USTAR_FORMAT))
        self._member_offset.append(self._bytes)
        self._member_tokens.append(self._fill)
        self._append(data)
        self._append(b"\0" * (-len(data) % TAR_BLOCK_BYTES))
        self._fill = 0

    def _append(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def finish(self) -> ShardEntry:
        """Ends the tar (two zero blocks) and writes the index first, the tar's name last."""
        if self._fill:
            self._write_member()
        self._append(b"\0" * (2 * TAR_BLOCK_BYTES))
        starts = np.concatenate([np.empty(0, np.int64), *self._document_start])
        index = ShardIndex(
            member_offset=np.array(self._member_offset, np.int64),
            member_tokens=np.array(self._member_tokens, np.int64),
            document_start=starts,
        ).to_bytes()
        write_file(self._folder / f"{self._name}{INDEX_SUFFIX}", index)
        self._replacing.__exit__(None, None, None)
        return ShardEntry(
            file=f"{self._name}.tar",
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            tokens=self.tokens,
            documents=len(starts),
            index_file=f"{self._name}{INDEX_SUFFIX}",
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def discard(self, error: BaseException) -> None:
        """Removes what was written."""
        self._replacing.__exit__(type(error), error, error.__traceback__)


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
