"""Text that a user hands to a command, in a file or on standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import TO_UTF8, UserError


def name_of(path: Path) -> str:
    """What messages call it; `-` is standard input."""
    return "standard input" if str(path) == "-" else str(path)


def read_bytes(path: Path, option: str, most: int = -1) -> bytes:
    """All of the file that `option` names, or its first `most` bytes. Raises UserError."""
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read(most)
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"{option}: {name_of(path)} cannot be read: {error.strerror}") from None


def decoded(data: bytes, path: Path, option: str) -> str:
    """What read_bytes gave, as text, without a byte order mark. Raises UserError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {name_of(path)} is no text in UTF-8 (byte {error.start}); {TO_UTF8}") from None
