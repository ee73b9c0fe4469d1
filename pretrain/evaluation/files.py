"""Lines of published files: plain or gzip, UTF-8; what is wrong is one sentence with file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file, from 1, without their ends; a name ending in .gz is decompressed. Raises UserError."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} line {number}: is no text in UTF-8; download the file again") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is a damaged gzip file ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def json_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of every line of JSON; blank lines are passed over. Raises UserError."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path} line {number}: is not JSON; this file has one JSON object a line") from None


def json_lines(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and the texts at `keys` of every JSON object of a file; blank lines are passed over. Raises
    UserError."""
    for number, row in json_objects(path):
        texts = row if isinstance(row, dict) else {}
        for key in keys:
            if not isinstance(texts.get(key), str) or not texts[key].strip():
                raise UserError(f"{path} line {number}: has no text {key!r}; each line is a JSON object that has one")
        yield number, {key: texts[key] for key in keys}


def files_of(path: Path, patterns: tuple[str, ...], below: tuple[str, ...], what: str) -> list[Path]:
    """`path` itself if it is a file, else the files of the folder that fit one of `patterns`, by name; if it has none,
    those of the first folder among `below` that has some. Raises UserError with `what` is looked for."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"there is no {path}; download {what}, and name its place")
    for folder in (path, *(path / name for name in below)):
        found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        if found:
            return found
    raise UserError(f"{path} holds no file {' or '.join(patterns)}; name the folder of {what}")
