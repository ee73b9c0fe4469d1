"""Reading tokens back: one shard, or the token address space of a whole split.

Token i of a split is well defined by the manifest alone (shards in order, members in order), so the trainer
can address windows without reading anything in between. Readers memory-map the tars; nothing is unpacked and
nothing is pickled.
"""

import hashlib
import mmap
from collections import OrderedDict
from types import TracebackType

import numpy as np

from data_prep.shard_format import REBUILD, DataError, Manifest, ShardEntry, ShardIndex, check_size


class ShardReader:
    """One shard, memory-mapped. Opening costs the index (about 8 bytes a document) and no token.

    With `verify_on_first_read` the first `read` hashes the whole shard (about 0.1 s for 128 MB) and refuses a
    shard that differs from the manifest. Not safe for concurrent first reads from several threads.
    """

    def __init__(self, manifest: Manifest, entry: ShardEntry, verify_on_first_read: bool) -> None:
        self._entry = entry
        self._path = manifest.folder / entry.file
        self._dtype = manifest.numpy_dtype
        self._unverified = verify_on_first_read
        check_size(self._path, entry.bytes)
        self._index = ShardIndex.load(manifest, entry)
        # member_start[m] is the shard's token offset of member m; one more element holds the end.
        self._member_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._index.member_tokens)])
        try:
            with self._path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot open {self._path}: {error.strerror}") from None
        if len(self._map) != entry.bytes:  # replaced between the check above and the mapping
            raise DataError(f"{self._path} changed size while it was opened; {REBUILD}")

    @property
    def num_tokens(self) -> int:
        """Token ids in the shard, EOS included."""
        return self._entry.tokens

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return self._entry.documents

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
        if self._unverified:
            self._verify()
        tokens = np.empty(stop - start, np.int64)
        member = int(np.searchsorted(self._member_start, start, side="right")) - 1
        position = start
        while position < stop:
            member_start, member_stop = self._member_start[member : member + 2].tolist()
            end = min(stop, member_stop)
            offset = int(self._index.member_offset[member]) + (position - member_start) * self._dtype.itemsize
            tokens[position - start : end - start] = np.frombuffer(
                self._map, self._dtype, count=end - position, offset=offset
            )
            position = end
            member += 1
        return tokens

    def _verify(self) -> None:
        found = hashlib.sha256(self._map).hexdigest()
        if found != self._entry.sha256:
            raise DataError(
                f"{self._path} does not match the manifest: expected sha256 {self._entry.sha256}, "
                f"found {found}; {REBUILD}"
            )
        self._unverified = False

    def close(self) -> None:
        """Unmaps the shard. Arrays that were read stay valid: they are copies."""
        self._map.close()


class SplitReader:
    """The token addresses 0 .. num_tokens - 1 of one split. Use from one thread at a time.

    Shards open on first use and at most `max_open_shards` stay mapped (a mapped file holds one descriptor;
    the usual limit is 1,024). A shard is hashed at most once in the life of a reader, however often it is
    opened again.
    """

    def __init__(
        self, manifest: Manifest, split: str, verify_on_first_read: bool, *, max_open_shards: int = 128
    ) -> None:
        assert max_open_shards >= 1, f"max_open_shards must be at least 1, not {max_open_shards}"
        self._manifest = manifest
        self._entries = manifest.split(split)
        self._end_tokens = manifest.tokenizer.end_tokens
        self._verify_on_first_read = verify_on_first_read
        self._max_open_shards = max_open_shards
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._verified: set[int] = set()
        zero = np.zeros(1, np.int64)
        self._shard_start = np.concatenate([zero, np.cumsum([e.tokens for e in self._entries], dtype=np.int64)])
        self._document_start = np.concatenate([zero, np.cumsum([e.documents for e in self._entries], dtype=np.int64)])

    @property
    def num_tokens(self) -> int:
        """Token ids in the split, EOS included."""
        return int(self._shard_start[-1])

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return int(self._document_start[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a fresh int64 array, across members and shards. IndexError if out of
        range."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"token range [{start}, {stop}) is outside [0, {self.num_tokens})")
        parts = []
        shard = int(np.searchsorted(self._shard_start, start, side="right")) - 1
        position = start
        while position < stop:
            shard_start, shard_stop = self._shard_start[shard : shard + 2].tolist()
            end = min(stop, shard_stop)
            parts.append(self._read_shard(shard, position - shard_start, end - shard_start))
            position = end
            shard += 1
        if len(parts) == 1:  # nearly every window: no second copy
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document of the split as int64, without its EOS (bytes have none). DataError if there
        is no such document."""
        if not 0 <= index < self.num_documents:
            raise DataError(f"no document {index}: the split has {self.num_documents}, numbered from 0")
        shard = int(np.searchsorted(self._document_start, index, side="right")) - 1
        starts = self._shard(shard).document_starts
        local = index - int(self._document_start[shard])
        stop = int(starts[local + 1]) if local + 1 < len(starts) else self._entries[shard].tokens
        return self._read_shard(shard, int(starts[local]), stop - self._end_tokens)

    def _read_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        tokens = self._shard(shard).read(start, stop)
        self._verified.add(shard)
        return tokens

    def _shard(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is None:
            verify = self._verify_on_first_read and shard not in self._verified
            reader = ShardReader(self._manifest, self._entries[shard], verify)
            self._open[shard] = reader
            if len(self._open) > self._max_open_shards:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return reader

    def close(self) -> None:
        """Unmaps every shard."""
        for reader in self._open.values():
            reader.close()
        self._open.clear()

    def __enter__(self) -> "SplitReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
