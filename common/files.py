"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.strict_json import dumps


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes JSON beside `path`, flushes it to the disk and renames it into place. NaN and infinities become null."""
    replace_file(path, [dumps(value, indent=indent).encode() + b"\n"])


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Writes `parts` beside `path`, flushes them to the disk and renames them into place."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, read: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file's bytes; `read`, if given, hears how many more were read."""
    with open(path, "rb", buffering=0) as file:
        if read is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
            read(len(block))
        return digest.hexdigest()
