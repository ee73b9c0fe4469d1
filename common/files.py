"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from common.strict_json import dumps

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[^.]+-\d+-[0-9a-f]{8}\.tmp")
"""Names that `temporary_path` gives: .NAME.HOST-PROCESS-TOKEN.tmp."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream, for writing and reading. Its content gets the name `path` when the block ends without an error.

    A reader, or a crash, sees all of the content or none of it: it goes to a temporary name, is flushed to the disk
    and renamed, and the rename is made durable. Any number of processes, on any nodes, may write the same path.
    Raises FileExistsError where a device or a named pipe is in the place: the rename would remove it, for every user.
    """
    refuse_special(path)
    temporary = temporary_path(path)
    stream = temporary.open("w+b")
    try:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk closing fails too, for it writes what is left
            stream.close()
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            # With the name that a user knows: that of a failed write is none at all. What has no number is none of the
            # system's errors but a library's, as of a damaged gzip file, and says itself what is wrong.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def replacing_all(folder: Path) -> Iterator[Callable[[str, bytes], None]]:
    """A function of a name and a content, for files of one folder that belong together. They get their names, in the
    order of the calls, when the block ends without an error; after an error in it every file is what it was."""
    written: list[tuple[Path, Path]] = []

    def put(name: str, content: bytes) -> None:
        path = folder / name
        refuse_special(path)
        temporary = temporary_path(path)
        written.append((temporary, path))
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    try:
        yield put
        for temporary, path in written:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(folder)


def refuse_special(path: Path) -> None:
    """Raises FileExistsError if the path is a device, a pipe or a socket. A link to one may be replaced."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # writing says what is wrong
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise FileExistsError(errno.EEXIST, "is a device or a pipe, which no file may replace", str(path))


def write_file(path: Path, content: bytes) -> None:
    """Writes a file as `replacing` does."""
    replace_file(path, [content])


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Writes the parts, one after the other, as `replacing` does."""
    with replacing(path) as stream:
        stream.writelines(parts)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes JSON and a newline as `replacing` does. NaN and infinities become null."""
    write_file(path, dumps(value, indent=indent).encode() + b"\n")


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other process, on any node, uses."""
    host = socket.gethostname().replace(".", "_")
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def intended_name(name: str) -> str:
    """For a temporary file that a killed process left, the name that it would have got; any other name as it is."""
    found = TEMPORARY.fullmatch(name)
    return found["name"] if found else name


def sync_directory(path: Path) -> None:
    """Makes renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
