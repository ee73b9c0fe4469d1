"""Stored files as they were downloaded (plain, gzip, zstd, zip) as one stream of unpacked bytes, hashed on the way.

Nothing is extracted to disk: a zip gives the bytes of one member, whatever folder its name says, and every
other member is left alone.
"""

import contextlib
import gzip
import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import zstandard
from isal import igzip, igzip_lib

from common.errors import DataError
from data_prep.raw.file_kinds import HEAD_BYTES, foreign
from data_prep.raw.locations import InputFile, read_errors, sha256_of, size_and_stamp

GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A frame of bytes that are not content; zstd and its parallel tools may put one anywhere, first too.
ZSTD_SKIPPABLE = tuple(bytes((first,)) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
# A file with such a name (in any case) that does not open as one is damaged, and not text by chance.
PACKED_SUFFIXES: dict[str, tuple[bytes, ...]] = {
    ".gz": (GZIP_MAGIC,),
    ".tgz": (GZIP_MAGIC,),
    ".zip": (ZIP_MAGIC,),
    ".zst": (ZSTD_MAGIC, *ZSTD_SKIPPABLE),
}
BLOCK_BYTES = 1 << 20
# 4 bytes of zstd may stand for 128 KB: of pieces of this size one unpacks to 16 MB at most.
ZSTD_PIECE_BYTES = 1 << 9
# `zstd --long=31`, the most that there is: the frame says how much memory its window takes.
ZSTD_WINDOW_BYTES = 1 << 31
ISAL_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub has it as an instance
DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    ISAL_ERROR,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
)


class DamagedFileError(DataError):
    """A file whose content cannot be trusted (truncated, a checksum fails) or cannot be read."""


class NoDocumentError(DamagedFileError):
    """A file that is not damaged, but gives no document."""


class _CountingStream:
    """The stored bytes of a file, hashed and counted as they are read. `ahead`: the first bytes, which were read from
    the stream already, because not every stream can go back."""

    def __init__(self, stream: IO[bytes], ahead: bytes) -> None:
        self._stream = stream
        self._ahead = ahead
        self.hash = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int) -> bytes:
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        data = data or self._stream.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        """Fills a buffer, for igzip; fewer bytes only at the end."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _ZstdFrames:
    """The content of consecutive zstd frames. zstandard's own stream reader takes a truncated file for a whole one."""

    def __init__(self, stored: _CountingStream) -> None:
        self._stored = stored
        self._frame = self._next_frame()
        self._begun = False  # whether the current frame was given a byte
        self._unread = b""
        self._content = memoryview(b"")

    def read(self, size: int) -> bytes:
        blocks = []
        while size > 0 and (len(self._content) or self._unpack()):
            block, self._content = self._content[:size], self._content[size:]
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def _unpack(self) -> bool:
        """Goes on by a piece, which may have no content yet; False at the end."""
        self._unread = self._unread or self._stored.read(1 << 16)
        packed, self._unread = self._unread[:ZSTD_PIECE_BYTES], self._unread[ZSTD_PIECE_BYTES:]
        if not packed:
            if self._begun:
                raise EOFError("the last zstd frame is cut")
            return False
        self._content = memoryview(self._frame.decompress(packed))
        self._begun = True
        if self._frame.eof:
            self._unread, self._begun = self._frame.unused_data + self._unread, False
            self._frame = self._next_frame()
        return True

    @staticmethod
    def _next_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()


class Unpacked:
    """The content of one file, read once from front to back."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        *,
        name: str,
        finish: Callable[[], tuple[str, int]],
        is_packed: bool = True,
    ) -> None:
        self._read = read
        self._finish = finish
        self.name = name
        """The file as the user named it; in a zip, with the member."""
        self.is_packed = is_packed
        """Whether the content differs from the stored bytes."""
        self.position = 0
        """Unpacked bytes read so far."""
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, which stay to be read; fewer only at the end."""
        while len(self._ahead) < size and (more := self._read(size - len(self._ahead))):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer, or none, only at the end."""
        pieces = [self._ahead[:size]] if self._ahead else []
        self._ahead = self._ahead[size:]
        left = size - sum(map(len, pieces))
        # In blocks, because streams allocate what they are asked for; joined once, as in `lines`.
        while left and (more := self._read(min(left, BLOCK_BYTES))):
            pieces.append(more)
            left -= len(more)
        self.position += size - left
        return b"".join(pieces)

    def lines(self, *, max_bytes: int, limit_bytes: int | None = None) -> Iterator[bytes]:
        """Lines with their ends, which are newlines alone, so that joining them gives the content. A line longer
        than `max_bytes` comes in pieces longer than that, of which only the last ends in a newline. With a limit, only
        the next `limit_bytes` bytes are read, and nothing after them."""
        waiting: list[bytes] = []  # of the line that goes on in the next block: joined once, or a long one takes hours
        size, stop = 0, None if limit_bytes is None else self.position + limit_bytes
        while block := self.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - self.position)):
            first, *others = block.split(b"\n")
            waiting.append(first)
            size += len(first)
            if others:
                yield b"".join([*waiting, b"\n"])
                yield from (line + b"\n" for line in others[:-1])
                waiting, size = [others[-1]], len(others[-1])
            if size > max_bytes:
                yield b"".join(waiting)
                waiting, size = [], 0
        if size:
            yield b"".join(waiting)

    def finish(self) -> tuple[str, int]:
        """sha256 and size of the whole stored file, however much of its content was read."""
        return self._finish()


@contextlib.contextmanager
def unpacked(path: InputFile, *, member: tuple[str, ...] | None, binary: bool = False) -> Iterator[Unpacked]:
    """Opens a file by what its first bytes say it is. `member`: names, without folders, that the one file inside a
    zip may have. `binary`: content that may begin with any bytes, so that only its name says that it is packed. Raises
    DamagedFileError, also while it is being read, DataError for a file that is missing or unreadable, or
    UnreachableError (a DataError) if that may pass."""
    with read_errors(path):
        try:
            with path.open("rb") as stored:
                magic = stored.read(len(ZIP_MAGIC))
                _check_suffix(path, stored, magic)
                if binary and path.suffix.lower() not in PACKED_SUFFIXES:
                    counter = _CountingStream(stored, magic)
                    yield _counted(str(path), counter.read, counter, is_packed=False)
                    return
                if magic == ZIP_MAGIC:
                    with zipfile.ZipFile(stored) as archive:
                        yield from _zipped(path, archive, _find_member(archive, path, member))
                    return
                counter = _CountingStream(stored, magic)
                if magic.startswith(GZIP_MAGIC):
                    with igzip.IGzipFile(fileobj=counter, mode="rb") as text:
                        yield _counted(str(path), text.read, counter)
                elif magic == ZSTD_MAGIC or magic in ZSTD_SKIPPABLE:
                    yield _counted(str(path), _ZstdFrames(counter).read, counter)
                else:
                    yield _counted(str(path), counter.read, counter, is_packed=False)
        except DAMAGE as error:
            raise DamagedFileError(f"{path} is damaged ({error}); fetch it again") from None


def _check_suffix(path: InputFile, stored: IO[bytes], magic: bytes) -> None:
    """Raises DamagedFileError for a file whose name promises a packing that its first bytes deny."""
    wanted = PACKED_SUFFIXES.get(path.suffix.lower(), (b"",))
    if magic.startswith(wanted):
        return
    suffix = path.suffix.lower()
    if other := next((name for name, magics in PACKED_SUFFIXES.items() if magic.startswith(magics)), None):
        raise NoDocumentError(f"{path} is not a {suffix} file but a {other} file; rename it")
    kind = foreign(magic + stored.read(HEAD_BYTES))
    if kind is not None:
        raise NoDocumentError(f"{path} is not a {suffix} file: it is {kind}")
    raise DamagedFileError(f"{path} is damaged (not a {suffix} file); fetch it again")


def _counted(name: str, read: Callable[[int], bytes], counter: _CountingStream, *, is_packed: bool = True) -> Unpacked:
    def finish() -> tuple[str, int]:
        while counter.read(BLOCK_BYTES):  # whatever follows the last gzip member belongs to the hash too
            pass
        return counter.hash.hexdigest(), counter.bytes

    return Unpacked(read, name=name, finish=finish, is_packed=is_packed)


def _find_member(archive: zipfile.ZipFile, path: InputFile, member: tuple[str, ...] | None) -> zipfile.ZipInfo:
    if member is None:
        raise DataError(f"{path} is a zip archive, which only the formats wikitext and enwik8 read; unpack it")
    found = [info for info in archive.infolist() if PurePosixPath(info.filename).name in member and not info.is_dir()]
    if len(found) != 1:
        names = " or ".join(member)
        raise DataError(f"{path} holds {len(found)} files named {names}, expected 1; fetch the original archive again")
    name = PurePosixPath(found[0].filename).name
    if found[0].flag_bits & 1:
        raise DataError(f"{path}: {name} is encrypted; fetch the original archive again")
    if found[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: {name} is packed in an uncommon way; unpack it and give its path instead")
    return found[0]


def _zipped(path: InputFile, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[Unpacked]:
    """The hash takes a pass of its own, because a zip is read from its end."""
    size = size_and_stamp(path)[0] or 0
    with archive.open(member) as content:
        name = f"{path}/{member.filename}"
        yield Unpacked(content.read, name=name, finish=lambda: (sha256_of(path), size))
