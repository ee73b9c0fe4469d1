"""Writing shards and manifests. The same tokens and settings give the same bytes, on any machine at any time.

webdataset's TarWriter writes the tars, with every field of a header fixed. mtime is the whole number 0, for a float
would add a PAX header of 1 KB to every member.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from common.files import replacing, write_file
from common.hashing import sha256_stream
from data_prep.shards.format import (
    INDEX_SUFFIX,
    MANIFEST_FILE,
    MEMBER_SUFFIX,
    TAR_BLOCK_BYTES,
    Manifest,
    ShardEntry,
    ShardIndex,
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
        from webdataset.writer import TarWriter  # here: it imports torch, which readers of shards do without

        self._folder = folder
        self._name = name
        self._dtype = dtype.newbyteorder("<")
        self._replacing = replacing(folder / f"{name}.tar")
        self._stream = self._replacing.__enter__()
        self._tar = TarWriter(self._stream, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False)
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
        key = f"{self._name}-{len(self._member_tokens):06d}"
        self._tar.write({"__key__": key, MEMBER_SUFFIX.removeprefix("."): data})
        self._member_offset.append(self._bytes + TAR_BLOCK_BYTES)  # behind a header of one block
        self._member_tokens.append(self._fill)
        self._bytes += TAR_BLOCK_BYTES + len(data) + -len(data) % TAR_BLOCK_BYTES
        self._fill = 0

    def finish(self) -> ShardEntry:
        """Ends the tar and writes the index first, the tar's name last."""
        if self._fill:
            self._write_member()
        self._tar.close()
        self._bytes += 2 * TAR_BLOCK_BYTES
        written = self._stream.seek(0, os.SEEK_END)
        assert written == self._bytes + -self._bytes % tarfile.RECORDSIZE, "every header is one block"
        # Two blocks of zeros end a tar. tarfile fills its last record with more, which shards have never had: without
        # them they keep the sha256 that they had before TarWriter wrote them.
        self._stream.truncate(self._bytes)
        self._stream.seek(0)
        sha256 = sha256_stream(self._stream)
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
            sha256=sha256,
            tokens=self.tokens,
            documents=len(starts),
            index_file=f"{self._name}{INDEX_SUFFIX}",
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def discard(self, error: BaseException) -> None:
        """Removes what was written."""
        with contextlib.suppress(OSError):  # such as the full disk that is the reason
            self._tar.close()
        self._replacing.__exit__(type(error), error, error.__traceback__)
