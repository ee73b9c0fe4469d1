"""Where raw files lie: paths, globs and URLs that fsspec opens."""

import glob
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from data_prep.shard_format import DataError
from data_prep.stage_config import URL


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with the few names of a Path that reading needs."""

    url: str

    @property
    def name(self) -> str:
        """File name without its folder."""
        return PurePosixPath(self.url.split("?")[0]).name

    @property
    def suffix(self) -> str:
        """The last dot of the name and what follows."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: str) -> IO[bytes]:
        """Opens for reading, in mode rb."""
        filesystem, path = _filesystem(self.url)
        stream: IO[bytes] = filesystem.open(path, mode)
        return stream

    def resolve(self) -> "RemoteFile":
        """Itself: a URL is absolute."""
        return self

    def __str__(self) -> str:
        return self.url


InputFile = Path | RemoteFile


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # here: 40 ms that local runs do not need

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"cannot open {url}: {error}") from None
    return filesystem, path


def match(root: Path, pattern: str) -> list[InputFile]:
    """What a path, glob or URL finds below a root, sorted; folders included. A name that exists is meant
    literally, even with [brackets]."""
    if URL.match(pattern):
        filesystem, path = _filesystem(pattern)
        try:
            found = [path] if filesystem.exists(path) else sorted(filesystem.glob(path)) if "*" in path else []
        except Exception as error:  # every file system of fsspec has errors of its own
            raise DataError(f"cannot look for {pattern}: {type(error).__name__}: {error}") from None
        return [RemoteFile(str(filesystem.unstrip_protocol(name))) for name in found]
    whole = root / pattern
    return [whole] if whole.exists() else [Path(name) for name in sorted(glob.glob(str(whole), recursive=True))]


def is_file(file: InputFile) -> bool:
    """Whether something that `match` found is a file."""
    if isinstance(file, Path):
        return file.is_file()
    filesystem, path = _filesystem(file.url)
    return bool(filesystem.isfile(path))


def size_and_stamp(file: InputFile) -> tuple[int, str]:
    """Bytes as stored, and what changes when the file does: modification time, or the store's own tag (etag,
    checksum) of a URL. Raises DataError if there is no such file."""
    try:
        if isinstance(file, Path):
            status = file.stat()
            return status.st_size, str(status.st_mtime_ns)
        filesystem, path = _filesystem(file.url)
        info = filesystem.info(path)
        return int(info["size"]), str(filesystem.ukey(path))
    except (OSError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {file}: {reason}") from None


def sha256_of(file: InputFile, *, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of a file as stored; `on_bytes` is told the size of each block read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()
