"""Reading tokens back: one shard, or the token address space of a whole split.

Token i of a split is well defined by the manifest alone (shards in order, members in order), so the trainer
can address windows without reading anything in between. Readers memory-map the tars; nothing is unpacked and
nothing is pickled.
"""

import hashlib
import mmap
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType

import numpy as np

from common.errors import DataError
from data_prep.shards.cache_folder import mark_used
from data_prep.shards.format import REBUILD, Manifest, ShardEntry, ShardIndex, check_size, unreadable

MAX_OPEN_SHARDS = 128
"""Of one reader."""
Stamp = tuple[int, int]
"""Size in bytes of a file, and when its content last changed, nanoseconds since the epoch, as the file system tells."""


class ShardReader:
    """One shard, memory-mapped. Opening costs the index (about 8 bytes a document) and no token.

    With `verify_on_first_read` the first `read` hashes the whole shard and refuses it if it differs from the manifest,
    unless the file has the stamp `hashed`, with which that was done.
    Not safe for concurrent first reads from several threads.
    """

    def __init__(
        self, manifest: Manifest, entry: ShardEntry, verify_on_first_read: bool, *, hashed: Stamp | None = None
    ) -> None:
        self._entry = entry
        self._path = manifest.inside(entry.file)
        self._dtype = manifest.numpy_dtype
        check_size(self._path, entry.bytes)
        self._index = ShardIndex.load(manifest, entry)
        # member_start[m] is the shard's token offset of member m; one more element holds the end. Lists: bisect on
        # them takes 0.2 us, np.searchsorted on an array 2 us, as much as copying a window.
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._index.member_tokens)])
        # Token t of member m is element t + shift[m] of the file: data begins on tar blocks, so nothing is unaligned.
        self._shift: list[int] = (self._index.member_offset // self._dtype.itemsize - starts[:-1]).tolist()
        self._member_start: list[int] = starts.tolist()
        try:
            with self._path.open("rb") as stream:
                status = os.fstat(stream.fileno())  # of what is mapped, whatever has the name by then
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(self._path, error) from None
        if len(self._map) != entry.bytes:  # the file was replaced between the check above and the mapping
            raise DataError(f"{self._path} changed size while it was opened; {REBUILD}")
        self.stamp: Stamp = (status.st_size, status.st_mtime_ns)
        self._unverified = verify_on_first_read and self.stamp != hashed
        self._elements = np.frombuffer(self._map, self._dtype, count=entry.bytes // self._dtype.itemsize)

    @property
    def num_tokens(self) -> int:
        """Token ids in the shard, EOS included."""
        return self._entry.tokens

    @property
    def document_starts(self) -> np.ndarray:
        """int64 [documents]: token offset at which each document starts; it ends where the next one
        starts."""
        return self._index.document_start

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int64 array, across members. IndexError if the range is not in the
        shard."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"token range [{start}, {stop}) is outside [0, {self.num_tokens}) of {self._path}")
        tokens = np.empty(stop - start, np.int64)
        self.read_into(tokens, start)
        return tokens

    def read_into(self, tokens: np.ndarray, start: int) -> None:
        """Fills `tokens` ([n], any dtype that holds the ids) with the shard's tokens from `start`, across members; the
        caller checks the range."""
        if self._unverified:
            self._verify()
        starts, shift, elements = self._member_start, self._shift, self._elements
        member = bisect_right(starts, start) - 1
        stop = start + len(tokens)
        if stop <= starts[member + 1]:  # nearly every window
            first = start + shift[member]
            tokens[:] = elements[first : first + len(tokens)]
            return
        position = start
        while position < stop:
            end = min(stop, starts[member + 1])
            first = position + shift[member]
            tokens[position - start : end - start] = elements[first : first + end - position]
            position = end
            member += 1

    def _verify(self) -> None:
        found = hashlib.sha256(self._map).hexdigest()
        if found != self._entry.sha256:
            raise DataError(
                f"{self._path} does not match the manifest: expected sha256 {self._entry.sha256}, "
                f"found {found}; {REBUILD}"
            )
        self._unverified = False

    @property
    def is_verified(self) -> bool:
        """Whether the shard need not be hashed any more."""
        return not self._unverified

    def close(self) -> None:
        """Unmaps the shard. Arrays that were read stay valid: they are copies."""
        self._elements = self._elements[:0].copy()  # a view of the mapping would keep it open
        self._map.close()

    def touch(self) -> None:
        """Marks the file as used now, for a cache that removes what was used longest ago."""
        with suppress(FileNotFoundError):
            mark_used(self._path)

    @property
    def is_stored(self) -> bool:
        """Whether the file still stands under its name: a cache may have removed it, while the mapping lives on."""
        return self._path.exists()


Hold = Callable[[ShardEntry], AbstractContextManager[object]]
"""Brings a shard and its index into the manifest's folder, and keeps them there while the context lasts."""


class SplitReader:
    """The token addresses 0 .. num_tokens - 1 of one split. Use from one thread at a time.

    Shards open on first use and at most `max_open_shards` stay mapped (a mapped file holds one descriptor). A shard is
    hashed at most once in the life of a reader, however often it is opened again, unless its file was replaced
    meanwhile.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        verify_on_first_read: bool,
        *,
        max_open_shards: int = MAX_OPEN_SHARDS,
        hold: Hold | None = None,
    ) -> None:
        """`hold` fetches a shard that is not in the folder yet, see data_prep/shards/cache.py."""
        assert max_open_shards >= 1, f"max_open_shards must be at least 1, not {max_open_shards}"
        self._manifest = manifest
        self._entries = manifest.split(split)
        self._end_tokens = manifest.tokenizer.end_tokens
        self._verify_on_first_read = verify_on_first_read
        self._max_open_shards = max_open_shards
        self._hold = hold
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._hashed: dict[str, Stamp] = {}
        zero = np.zeros(1, np.int64)
        self._shard_start = np.concatenate([zero, np.cumsum([e.tokens for e in self._entries], dtype=np.int64)])
        self._document_start = np.concatenate([zero, np.cumsum([e.documents for e in self._entries], dtype=np.int64)])
        self._starts: list[int] = self._shard_start.tolist()

    def trust(self, hashed: Mapping[str, Stamp]) -> None:
        """`hashed`: name -> stamp of shards whose sha256 was found right: they are not hashed while they have it."""
        self._hashed |= hashed

    @property
    def num_tokens(self) -> int:
        """Token ids in the split, EOS included."""
        return int(self._shard_start[-1])

    @property
    def num_documents(self) -> int:
        return int(self._document_start[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int64 array, across members and shards. IndexError if out of
        range."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"token range [{start}, {stop}) is outside [0, {self.num_tokens})")
        tokens = np.empty(stop - start, np.int64)
        self._read_into(tokens, start)
        return tokens

    def read_rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [s, s + length) for every s of `starts` (int64 [n]) as [n, length] in the dtype of the shards (uint16
        takes a quarter of int64's memory traffic), across members and shards. IndexError if one is out of range."""
        if len(starts) and not 0 <= starts.min() <= starts.max() <= self.num_tokens - length:
            raise IndexError(f"windows of {length} tokens leave [0, {self.num_tokens})")
        rows = np.empty((len(starts), length), self._manifest.numpy_dtype)
        shard_starts = self._starts
        for row, start in zip(rows, starts.tolist(), strict=True):
            shard = bisect_right(shard_starts, start) - 1
            if start + length <= shard_starts[shard + 1]:  # nearly every window
                self._shard(shard).read_into(row, start - shard_starts[shard])
            else:
                self._read_into(row, start)
        return rows

    def document_index(self, starts: np.ndarray, length: int) -> np.ndarray:
        """For the windows of `read_rows`: int64 [n, length], 0 for tokens of the document that a window begins in, 1
        for the next one, and so on. EOS belongs to the document that it ends."""
        begins = np.zeros((len(starts), length), np.int64)
        for row, start in zip(begins, starts.tolist(), strict=True):
            shard, stop = bisect_right(self._starts, start) - 1, start + length
            while shard < len(self._entries) and self._starts[shard] < stop:
                first = self._starts[shard]
                of_shard = self._shard(shard).document_starts
                low, high = np.searchsorted(of_shard, [start - first + 1, stop - first])
                row[of_shard[low:high] + (first - start)] = 1
                shard += 1
        return np.cumsum(begins, axis=1)

    def _read_into(self, tokens: np.ndarray, start: int) -> None:
        shard = bisect_right(self._starts, start) - 1
        position, stop = start, start + len(tokens)
        while position < stop:
            shard_start, end = self._starts[shard], min(stop, self._starts[shard + 1])
            self._shard(shard).read_into(tokens[position - start : end - start], position - shard_start)
            position = end
            shard += 1

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document of the split as int64, without its EOS (bytes have none). DataError if there
        is no such document."""
        if not 0 <= index < self.num_documents:
            raise DataError(f"no document {index}: the split has {self.num_documents}, numbered from 0")
        shard = int(np.searchsorted(self._document_start, index, side="right")) - 1
        starts = self._shard(shard).document_starts
        local = index - int(self._document_start[shard])
        stop = int(starts[local + 1]) if local + 1 < len(starts) else self._entries[shard].tokens
        return self._shard(shard).read(int(starts[local]), stop - self._end_tokens)

    def _shard(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is None:
            entry = self._entries[shard]
            if self._hold is not None:
                for other in self._open.values():  # least recently used first
                    other.touch()
            with nullcontext() if self._hold is None else self._hold(entry):
                verify, hashed = self._verify_on_first_read, self._hashed.get(entry.file)
                reader = ShardReader(self._manifest, entry, verify, hashed=hashed)
            self._open[shard] = reader
            gone = (
                []
                if self._hold is None
                else [s for s, other in self._open.items() if s != shard and not other.is_stored]
            )
            while len(self._open) - len(gone) > self._max_open_shards:
                gone.append(next(s for s in self._open if s not in gone))
            for old in gone:  # the disk is free again only when nothing maps them
                self._close_shard(old)
        self._open.move_to_end(shard)
        return reader

    def _close_shard(self, shard: int) -> None:
        reader = self._open.pop(shard)
        if reader.is_verified:
            self._hashed[self._entries[shard].file] = reader.stamp
        reader.close()

    def close(self) -> None:
        """Unmaps every shard."""
        for shard in list(self._open):
            self._close_shard(shard)

    def __enter__(self) -> "SplitReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
