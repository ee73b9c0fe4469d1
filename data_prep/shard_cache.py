"""Remote data sets through a bounded folder on a local disk.

    CACHE/lock                               held while room is made
    CACHE/DIGEST/                            a data set, as data_prep writes it: manifest.json, tokenizer, then shards
    CACHE/DIGEST/locks/train-00000.tar.lock  held while that shard is fetched, or opened, or removed

Shards come whole, are hashed on the way, and appear under their names by a rename. What lies there from before, a job
or a loss of power ago, is hashed when a process holds it first, and fetched again if it is damaged.
All processes of a node may share a folder; each shard is then fetched once. What was used longest ago goes first. A
shard that a process has mapped when it goes is on the disk until that process opens another one, so the bound may be
passed by what other processes have mapped.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.locations import RemoteFile
from data_prep.shard_format import INDEX_SUFFIX, MANIFEST_FILE, DataError, Manifest, ShardEntry, sha256_file

ATTEMPTS = 3
BLOCK_BYTES = 1 << 22


class ShardCache:
    """Local copies of one remote data set."""

    def __init__(self, url: str, folder: Path, limit_bytes: int) -> None:
        """Fetches manifest and tokenizer; `url` is of manifest.json or its folder. Raises DataError."""
        base = url.rstrip("/")
        self._url = base.rpartition("/")[0] if base.endswith(".json") else base
        self._limit = limit_bytes
        self._root = folder
        self._trusted: set[str] = set()  # shards that this process has fetched or hashed
        manifest_url = base if base.endswith(".json") else f"{base}/{MANIFEST_FILE}"
        raw = _read_all(manifest_url)
        # By its content: another version of the data under the same URL gets another folder.
        self._folder = folder / hashlib.sha256(raw).hexdigest()[:24]
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir: {folder} cannot be written: {error.strerror}") from None
        with _locked(self._folder / "locks" / "manifest.lock"):
            path = self._folder / MANIFEST_FILE
            if not path.exists() or path.read_bytes() != raw:
                partial = path.with_suffix(".partial")
                partial.write_bytes(raw)
                partial.replace(path)
            self.manifest = Manifest.load(path)
            tokenizer = self.manifest.tokenizer
            if tokenizer.file is not None:
                assert tokenizer.sha256 is not None
                if not _is_intact(self._folder / tokenizer.file, tokenizer.sha256):
                    self._fetch(tokenizer.file, tokenizer.sha256)
        self._check_limit()

    def _check_limit(self) -> None:
        largest = max((_size(entry) for entries in self.manifest.splits.values() for entry in entries), default=0)
        if largest > self._limit:
            raise DataError(
                f"data.cache_bytes: {self._limit} holds not even one shard of {self._url}, the largest has {largest} "
                f"bytes with its index; set it to several times that"
            )

    @contextlib.contextmanager
    def hold(self, entry: ShardEntry) -> Iterator[None]:
        """The shard and its index are in the manifest's folder, and stay while the context lasts. Raises DataError."""
        with _locked(self._lock_of(self._folder / entry.file)):
            shard, index = self._folder / entry.file, self._folder / entry.index_file
            if not self._is_here(entry):
                _remove(shard, index)
                with _locked(self._root / "lock"):
                    self._make_room(_size(entry))
                    # At full size (without blocks) from the start, so that others count it.
                    for path, size in ((shard, entry.bytes), (index, entry.index_bytes)):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with _partial(path).open("wb") as stream:
                            stream.truncate(size)
                self._fetch(entry.index_file, entry.index_sha256)
                self._fetch(entry.file, entry.sha256)
            self._trusted.add(entry.file)
            os.utime(shard)
            yield

    def _is_here(self, entry: ShardEntry) -> bool:
        shard, index = self._folder / entry.file, self._folder / entry.index_file
        if entry.file in self._trusted:  # if it went since then, who fetched it again has hashed it
            return shard.exists() and index.exists()
        return _is_intact(index, entry.index_sha256) and _is_intact(shard, entry.sha256)

    def _make_room(self, needed: int) -> None:
        """Removes shards, least recently used first, until `needed` bytes fit; skips what another process holds."""
        sizes: dict[Path, int] = {}
        used: dict[Path, float] = {}
        for path in self._root.glob("*/**/*"):
            name = path.name.removesuffix(".partial")
            if not name.endswith((".tar", INDEX_SUFFIX)):
                continue
            shard = path.with_name(name.removesuffix(".tar").removesuffix(INDEX_SUFFIX) + ".tar")
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile by the process that fetches it
                status = path.stat()
                sizes[shard] = sizes.get(shard, 0) + status.st_size
                used[shard] = max(used.get(shard, 0.0), status.st_mtime)
        total = sum(sizes.values())
        for shard in sorted(used, key=lambda shard: used[shard]):
            if total + needed <= self._limit:
                return
            with _locked(self._lock_of(shard), wait=False) as free:
                if free:
                    _remove(shard, shard.with_name(shard.name.removesuffix(".tar") + INDEX_SUFFIX))
                    total -= sizes[shard]
        if total + needed > self._limit:
            raise DataError(
                f"data.cache_bytes: {self._limit} are full of shards that other processes are fetching now; set it to "
                f"at least {total + needed}"
            )

    def _lock_of(self, shard: Path) -> Path:
        folder = self._root / shard.relative_to(self._root).parts[0]
        return folder / "locks" / (shard.relative_to(folder).as_posix().replace("/", "_") + ".lock")

    def _fetch(self, name: str, sha256: str) -> None:
        """Copies one file, hashed on the way; a broken connection or copy is tried again, a wrong file never stays."""
        path, url = self._folder / name, f"{self._url}/{name}"
        for attempt in range(ATTEMPTS):
            problem = _copy(url, _partial(path), sha256)
            if problem is None:
                _partial(path).replace(path)
                return
            if attempt + 1 < ATTEMPTS:
                time.sleep(0.2 * 4**attempt)
        _partial(path).unlink(missing_ok=True)
        raise DataError(f"cannot fetch {url} ({ATTEMPTS} attempts): {problem}")


def _size(entry: ShardEntry) -> int:
    return entry.bytes + entry.index_bytes


def _is_intact(path: Path, sha256: str) -> bool:
    return path.exists() and sha256_file(path) == sha256


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _copy(url: str, path: Path, sha256: str) -> str | None:
    """Copies; returns what is wrong with the copy."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with RemoteFile(url).open("rb") as source, path.open("r+b" if path.exists() else "wb") as target:
            while block := source.read(BLOCK_BYTES):
                target.write(block)
            target.truncate()
    except DataError:
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        return f"{type(error).__name__}: {error}"
    found = sha256_file(path)
    return None if found == sha256 else f"it does not match the manifest: expected sha256 {sha256}, found {found}"


def _read_all(url: str) -> bytes:
    problem: Any = None
    for attempt in range(ATTEMPTS):
        try:
            with RemoteFile(url).open("rb") as stream:
                return stream.read()
        except FileNotFoundError:
            raise DataError(f"data.manifest: there is no {url}") from None
        except DataError:
            raise
        except Exception as error:  # every file system of fsspec has errors of its own
            problem = error
            time.sleep(0.2 * 4**attempt)
    raise DataError(f"data.manifest: cannot read {url}: {type(problem).__name__}: {problem}")


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock, which ends with the process; without `wait` yields False if another has it. Lock files
    are never removed: two processes could then lock two files of one name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
