"""Raw dumps: C4 and peS2o files of one JSON object a line, gzipped or plain, as bounded chunks of lines.

The parent process decompresses, hashes and cuts files into chunks; whoever gets a chunk parses it. A
malformed line is an error that names file and line.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from data_prep.shard_format import DataError

# The keys that every line of a format carries; more keys are allowed (a dump may be annotated).
FORMAT_KEYS: dict[str, frozenset[str]] = {
    "c4": frozenset({"text", "timestamp", "url"}),
    "pes2o": frozenset({"added", "created", "id", "source", "text", "version"}),
}
FormatName = Literal["auto", "c4", "pes2o"]
# About 0.3 s of BPE encoding: small enough to spread over workers, large enough that handing it over costs
# nothing.
CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive lines of one file."""

    source: int
    """Which input file, by position in the list of inputs."""
    path: str
    """The file as the user named it, for messages."""
    first_line: int
    """Line number of `lines[0]`, counted from 1."""
    lines: tuple[bytes, ...]
    """Raw lines; blank ones included, so that numbers stay right."""
    stored_bytes: int
    """How far the file was consumed by this chunk, in stored (compressed) bytes."""


class _CountingStream:
    """The stored bytes of a file, hashed and counted as they are read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.hash = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data


class RawFile:
    """One raw file. After `chunks` is exhausted, `format`, `sha256` and `bytes` describe what was read."""

    def __init__(self, path: Path, *, source: int = 0, format: FormatName = "auto") -> None:
        self.path = path
        self.source = source
        self.format: str = format
        self.sha256 = ""
        self.bytes = 0

    def chunks(self, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """The lines of the file in order, about `chunk_bytes` of text at a time. Raises DataError if it is
        damaged."""
        try:
            with self.path.open("rb") as stored:
                gzipped = stored.read(2) == GZIP_MAGIC
                stored.seek(0)
                counter = _CountingStream(stored)
                if gzipped:
                    with gzip.GzipFile(fileobj=counter, mode="rb") as text:  # type: ignore[call-overload]
                        yield from self._cut(text, counter, chunk_bytes)
                else:
                    yield from self._cut(_plain_lines(counter), counter, chunk_bytes)
                while counter.read(1 << 20):  # whatever follows the last gzip member belongs to the hash too
                    pass
                self.sha256, self.bytes = counter.hash.hexdigest(), counter.bytes
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path} is damaged ({error}); fetch it again") from None
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from None

    def _cut(self, text: Iterator[bytes] | IO[bytes], counter: _CountingStream, chunk_bytes: int) -> Iterator[Chunk]:
        lines: list[bytes] = []
        size, first_line, consumed = 0, 1, 0

        def chunk() -> Chunk:
            return Chunk(
                source=self.source,
                path=str(self.path),
                first_line=first_line,
                lines=tuple(lines),
                stored_bytes=counter.bytes - consumed,
            )

        for line in text:
            if self.format == "auto" and line.strip():
                self.format = detect_format(line, where=f"{self.path}:{first_line + len(lines)}")
            lines.append(line)
            size += len(line)
            if size >= chunk_bytes:
                yield chunk()
                first_line, consumed = first_line + len(lines), counter.bytes
                lines, size = [], 0
        if lines or counter.bytes > consumed:
            yield chunk()


def _plain_lines(stream: _CountingStream) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parse_object(line: bytes, *, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}); repair or remove the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}; repair or remove the line")
    return record


def detect_format(line: bytes, *, where: str) -> str:
    """The format whose keys a line carries; DataError with the keys found if there is none."""
    record = _parse_object(line, where=where)
    for name, keys in FORMAT_KEYS.items():
        if keys <= record.keys():
            return name
    known = "; ".join(f"{name} has {', '.join(sorted(keys))}" for name, keys in FORMAT_KEYS.items())
    found = ", ".join(sorted(record)) or "none"
    raise DataError(f"{where}: unknown format, its keys are {found} ({known}); set `format` to read only their text")


def parse_texts(chunk: Chunk) -> Iterator[str]:
    """The text of every document of a chunk, in order; blank lines are passed over. DataError names file and
    line."""
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        if line.isspace() or not line:
            continue
        where = f"{chunk.path}:{number}"
        text = _parse_object(line, where=where).get("text")
        if not isinstance(text, str):
            raise DataError(f"{where}: the key `text` is missing or not a string; repair or remove the line")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                message = "the text holds half of a UTF-16 surrogate pair, which is no character"
                raise DataError(f"{where}: {message}; repair or remove the line") from None
        yield text


def stable_fraction(data: bytes) -> float:
    """A number in [0, 1) that depends on the bytes alone: the first 64 bits of their sha256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def goes_to_validation(text: str, *, validation_fraction: float) -> bool:
    """Whether a document belongs to validation: the same text always goes the same way, in any file and any
    run."""
    return validation_fraction > 0 and stable_fraction(text.encode("utf-8")) < validation_fraction
