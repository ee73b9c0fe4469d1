"""The folder that a cache of shards may write and clear: its own, below the folder that the user names.

    CACHE_DIR/switchall-cache/OWNER.txt   says whose folder this is; without it nothing here is touched
    .../lock                              held while room is made
    .../DIGEST/manifest.json              a data set; the folder is named by the sha256 of this file
    .../DIGEST/locks/NAME.lock            held while a shard is fetched, or opened, or removed
    .../DIGEST/train-00000.tar, ...       what that manifest lists

So every file that may be removed is on a list, which is written before the first of them and which a hash proves to be
the cache's own. All other files, in CACHE_DIR or in here, stay and do not count towards the limit.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError, PassingError
from common.files import write_file
from common.folders import check_writable_folder, free_bytes, no_room
from common.locks import NoLocks, file_lock
from data_prep.shards.format import MANIFEST_FILE, Manifest, ShardEntry

KEY = "data.cache_dir"
NAME = "switchall-cache"
MARKER = "OWNER.txt"
MARKER_TEXT = (
    "Shards of remote data sets that switchall fetched (data.cache_dir). It removes them when it needs room.\n"
    "The whole folder may be removed while no run uses it.\n"
)
DIGEST = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class StoredShard:
    """A shard with its index, whole or being fetched."""

    shard: Path
    index: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All names under which it may lie there, in the order in which a file gets them: who looks for them in it
        misses none that is renamed meanwhile."""
        return partial(self.shard), partial(self.index), self.shard, self.index

    def size_and_use(self) -> tuple[int, float]:
        """Bytes, and when it was last used; (0, 0) if it is not there."""
        sizes, used = dict[int, int](), 0.0
        for path in self.files:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino], used = status.st_size, max(used, status.st_mtime)  # once under its two names
        return sum(sizes.values()), used

    def remove(self) -> None:
        for path in self.files:
            path.unlink(missing_ok=True)


class CacheFolder:
    """The cache's own folder below `cache_dir`, made if it is not there. Raises DataError for one that is not ours."""

    def __init__(self, cache_dir: Path, limit_bytes: int) -> None:
        check_writable_folder(cache_dir, KEY)
        self.root = cache_dir / NAME
        self._limit = limit_bytes
        self._lists: dict[str, list[ShardEntry]] = {}  # by digest: a list never changes
        check_writable_folder(self.root, KEY)
        self.root.mkdir(parents=True, exist_ok=True)
        # The marker is written before anything else, so what another process puts here meanwhile comes after it.
        others = {path.name for path in self.root.iterdir() if not path.name.startswith(f".{MARKER}.")}
        if (self.root / MARKER).is_file():
            return
        if others:
            raise DataError(
                f"{KEY}: {self.root} holds {min(others)} and not the {MARKER} of a cache, so it is left alone; move it "
                "or name another folder"
            )
        write_file(self.root / MARKER, MARKER_TEXT.encode())

    def add(self, manifest: bytes) -> Path:
        """The folder of a data set, with its manifest in it. It is named after the manifest's content, so that another
        version of the data under the same URL gets another folder."""
        folder = self.root / hashlib.sha256(manifest).hexdigest()[:24]
        path = folder / MANIFEST_FILE
        with locked(self.lock(path)):
            if not path.exists() or path.read_bytes() != manifest:
                write_file(path, manifest)
        return folder

    def lock(self, file: Path) -> Path:
        """The lock of a file of a data set."""
        folder = self.root / file.relative_to(self.root).parts[0]
        return folder / "locks" / (file.relative_to(folder).as_posix().replace("/", "_") + ".lock")

    def reserve(self, shard: StoredShard, sizes: tuple[int, int]) -> None:
        """Makes room for a shard and its index and makes them count: as files of full size without blocks."""
        with locked(self.root / "lock"):
            self._make_room(sum(sizes))
            for path, size in zip((shard.shard, shard.index), sizes, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial(path).open("wb") as stream:
                    stream.truncate(size)

    def _make_room(self, needed: int) -> None:
        """Removes shards, least recently used first, until `needed` bytes fit into the limit and onto the disk; skips
        what another process holds."""
        found = [(shard, *shard.size_and_use()) for shard in self._shards()]
        total = sum(size for _, size, _ in found)
        for shard, size, _ in sorted(found, key=lambda entry: entry[2]):
            if total + needed <= self._limit and needed <= free_bytes(self.root):
                return
            if size:
                with locked(self.lock(shard.shard), wait=False) as free:
                    if free:
                        shard.remove()
                        total -= size
        if total + needed > self._limit:
            raise DataError(
                f"data.cache_bytes: {self._limit} are full of shards that other processes are fetching now; set it to "
                f"at least {total + needed}"
            )
        if needed > free_bytes(self.root):
            raise PassingError(f"{KEY}: {no_room(self.root, needed, 'a shard')}; make room, or name another folder")

    def _shards(self) -> Iterator[StoredShard]:
        """Every shard that a manifest in here lists, whether it is there or not."""
        for folder in sorted(self.root.iterdir()):
            if not DIGEST.fullmatch(folder.name) or folder.is_symlink():
                continue
            if folder.name not in self._lists:
                entries = _listed(folder)
                if entries is None:
                    continue
                self._lists[folder.name] = entries
            for entry in self._lists[folder.name]:
                yield StoredShard(folder / entry.file, folder / entry.index_file)


def _listed(folder: Path) -> list[ShardEntry] | None:
    """The shards of a data set, or None unless its manifest is the one that the folder is named by."""
    try:
        if hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()[:24] != folder.name:
            return None
        return Manifest.load(folder).entries
    except (OSError, DataError):
        return None


def mark_used(path: Path) -> None:
    """Now, by a clock that goes on between two calls: that of os.utime stands still for milliseconds. FileNotFoundError
    for a file that another process removed."""
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except PermissionError:  # another user's, whose group may write it: that lets nobody name the time
        os.utime(path)


def partial(path: Path) -> Path:
    """The name of a file while it is being fetched."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock of the cache as `file_lock` does. Raises DataError for a file system without locks."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(file_lock(path, wait=wait))
        except NoLocks as error:
            raise DataError(f"{KEY}: no lock on {path} ({error.strerror}); name a folder on a local disk") from None
        yield held
