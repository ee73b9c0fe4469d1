"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
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
    """
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
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # With the name that a user knows: that of a failed write is none at all.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


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
