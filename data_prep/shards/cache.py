"""Remote data sets through a bounded folder on a local disk; data_prep/shards/cache_folder.py says what lies in it.

Shards are fetched whole, hashed on the way, and get their names by a rename. A shard left by an earlier job, or from
before a loss of power, is hashed when a process first holds it, and fetched again if it is damaged. All processes of a
node may share a folder; each shard is then fetched once. The least recently used shard is removed first. If a process
has mapped a removed shard, its blocks stay on the disk until that process opens another one, so mapped shards may
exceed the bound.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError, PassingError, UnreadableError
from common.folders import is_full, no_room
from common.hashing import sha256_file
from common.urls import without_secrets
from data_prep.raw.locations import RemoteFile, UnreachableError, read_error
from data_prep.shards.cache_folder import KEY, CacheFolder, StoredShard, locked, mark_used, partial
from data_prep.shards.format import MANIFEST_FILE, Manifest, ShardEntry

PAUSES_SECONDS = (0, 0.2, 0.8)
"""Before each attempt to fetch a file."""
BLOCK_BYTES = 1 << 22


class ShardCache:
    """Local copies of one remote data set."""

    def __init__(self, url: str, cache_dir: Path, limit_bytes: int) -> None:
        """Fetches manifest and tokenizer; `url`: that of manifest.json or of its folder. Raises DataError."""
        base = url.rstrip("/")
        self._url = base.rpartition("/")[0] if base.endswith(".json") else base
        self._limit = limit_bytes
        self._trusted: set[str] = set()  # shards that this process has fetched or hashed
        raw = _read_all(base if base.endswith(".json") else f"{base}/{MANIFEST_FILE}")
        self._cache = CacheFolder(cache_dir, limit_bytes)
        self._folder = self._cache.add(raw)
        self.manifest = Manifest.load(self._folder)
        tokenizer = self.manifest.tokenizer
        if tokenizer.file is not None:
            assert tokenizer.sha256 is not None
            with locked(self._cache.lock(self._folder / tokenizer.file)):
                if not _is_intact(self._folder / tokenizer.file, tokenizer.sha256):
                    self._fetch(tokenizer.file, tokenizer.sha256)
        self._check_limit()

    def _check_limit(self) -> None:
        largest = max((entry.bytes + entry.index_bytes for entry in self.manifest.entries), default=0)
        if largest > self._limit:
            raise DataError(
                f"data.cache_bytes: {self._limit} holds not even one shard of {without_secrets(self._url)}, the "
                f"largest has {largest} bytes with its index; set it to several times that"
            )

    @contextlib.contextmanager
    def hold(self, entry: ShardEntry) -> Iterator[None]:
        """The shard and its index are in the manifest's folder, and stay while the context lasts. Raises DataError."""
        stored = StoredShard(self._folder / entry.file, self._folder / entry.index_file)
        with locked(self._cache.lock(stored.shard)):
            if not self._is_here(entry, stored):
                stored.remove()
                self._cache.reserve(stored, (entry.bytes, entry.index_bytes))
                self._fetch(entry.index_file, entry.index_sha256)
                self._fetch(entry.file, entry.sha256)
            self._trusted.add(entry.file)
            mark_used(stored.shard)
            yield

    def _is_here(self, entry: ShardEntry, stored: StoredShard) -> bool:
        if entry.file in self._trusted:  # if it was removed since then, the process that fetched it again has hashed it
            return stored.shard.exists() and stored.index.exists()
        return _is_intact(stored.index, entry.index_sha256) and _is_intact(stored.shard, entry.sha256)

    def _fetch(self, name: str, sha256: str) -> None:
        """Copies one file, hashed on the way; a broken connection or copy is tried again, a wrong file never stays."""
        path, url = self._folder / name, f"{self._url}/{name}"
        for pause in PAUSES_SECONDS:
            time.sleep(pause)
            problem = _copy(url, partial(path), sha256)
            if problem is None:
                partial(path).replace(path)
                return
        partial(path).unlink(missing_ok=True)
        message = f"cannot fetch {without_secrets(url)} ({len(PAUSES_SECONDS)} attempts): {problem}"
        if isinstance(problem, UnreadableError):
            raise UnreadableError(message, problem.file, problem.number)
        raise DataError(message)


def _is_intact(path: Path, sha256: str) -> bool:
    return path.exists() and sha256_file(path) == sha256


def _copy(url: str, path: Path, sha256: str) -> str | UnreadableError | None:
    """Copies; returns what is wrong with the copy, as an UnreadableError if it may be another time. Raises PassingError
    if the disk is full."""
    size = written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with RemoteFile(url).open("rb") as source, path.open("r+b" if path.exists() else "wb") as target:
            size = os.fstat(target.fileno()).st_size  # as reserved
            while block := source.read(BLOCK_BYTES):
                target.write(block)
                written += len(block)
            target.truncate()
    except DataError:
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        if is_full(error):
            path.unlink(missing_ok=True)
            room = no_room(path.parent, max(size, written + BLOCK_BYTES), f"a copy of {without_secrets(url)}")
            raise PassingError(f"{KEY}: {room}; make room, or name another folder") from None
        return _fault(RemoteFile(url), error)
    found = sha256_file(path)
    return None if found == sha256 else f"it does not match the manifest: expected sha256 {sha256}, found {found}"


def _fault(file: RemoteFile, error: Exception) -> str | UnreadableError:
    text = without_secrets(f"{type(error).__name__}: {error}")
    if isinstance(read_error(file, error), UnreachableError):
        return UnreadableError(text, str(file))
    if isinstance(error, FileNotFoundError):
        return UnreadableError(text, str(file), errno.ENOENT)
    return text


def _read_all(url: str) -> bytes:
    """The content of a file; tries again after an error that may pass, such as a lost connection. Raises DataError,
    UnreadableError after such an error."""
    file = RemoteFile(url)
    for pause in PAUSES_SECONDS:
        time.sleep(pause)
        try:
            with file.open("rb") as stream:
                return stream.read()
        except DataError as error:
            raise DataError(f"data.manifest: {error}") from None
        except Exception as error:  # every file system of fsspec has errors of its own
            problem = read_error(file, error)
        if not isinstance(problem, UnreachableError):
            raise DataError(f"data.manifest: {problem}")
    raise UnreadableError(f"data.manifest: {problem} ({len(PAUSES_SECONDS)} attempts)", str(file))
