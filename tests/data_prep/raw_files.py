"""A raw file of a test, and what is read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.raw.documents import Document, RawFile, Rejected


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path, format: Any = "auto", **settings: Any) -> tuple[list[str], list[Rejected]]:
    records = list(RawFile(path, format=format, **settings).read())
    texts = [record.data.decode() for record in records if isinstance(record, Document)]
    return texts, [record for record in records if isinstance(record, Rejected)]
