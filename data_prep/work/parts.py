"""Parts: documents of raw files, cleaned of what is damaged, as every later stage reads them.

A raw file becomes parts of about `PART_BYTES` of text or `PART_DOCUMENTS` documents, so that one huge file keeps every
process busy and a stage never holds more than a part; small files share one, for every part costs some files on
disk. NAME.zst is the text of its documents, one after the other, as
one zstd frame with a checksum; NAME.safetensors holds an array element for each document: int64 `size` in bytes, int64
`position` in the raw file, and uint64 `hash` [documents, 2], the first 128 bits of the sha256 of the text.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import zstandard

from common.errors import DataError
from common.files import replacing, write_file
from common.splits import SplitName

# Some seconds of BPE encoding: small enough to spread 1 GB over 32 processes, large enough that C4 is 25,000 parts.
PART_BYTES = 1 << 25
# Short documents fill a part by their number: its arrays, above all the signatures, take about 1 KB for each.
PART_DOCUMENTS = 1 << 16
READ_BYTES = 1 << 18
ZSTD_LEVEL = 1  # 2.6 times smaller at 300 MB a second; level 3 is 8% smaller and half as fast


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is known about a part without opening it."""

    name: str
    documents: int
    bytes: int
    """Bytes of text."""
    split: SplitName
    """Split of its documents, before `validation_fraction` takes its share of train."""
    files: tuple[tuple[str, int], ...] = ()
    """(name, documents) of the raw files that it holds documents of, in their order."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Part":
        return cls(**{**body, "files": tuple((name, documents) for name, documents in body["files"])})

    def file_of(self, document: int) -> str:
        """Name of the raw file of a document, given its number in the part."""
        for name, documents in self.files:
            if document < documents:
                return name
            document -= documents
        raise IndexError(f"part {self.name} has {self.documents} documents")

    def count_by_file(self, chosen: np.ndarray) -> dict[str, int]:
        """How many of the chosen documents (bool [documents]) each raw file has."""
        stops = np.cumsum([documents for _, documents in self.files]).tolist()
        starts = [0, *stops[:-1]]
        return {
            name: int(chosen[start:stop].sum())
            for (name, _), start, stop in zip(self.files, starts, stops, strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class PartIndex:
    """Arrays of a part, as described at the top of this file."""

    size: np.ndarray
    position: np.ndarray
    hash: np.ndarray


class PartWriter:
    """Writes one part into a folder; nothing is there under its name before `finish`."""

    def __init__(self, folder: Path, name: str, split: SplitName) -> None:
        self._folder, self._name, self.split = folder, name, split
        self._replacing = replacing(folder / f"{name}.zst")
        self._stream = self._replacing.__enter__()
        self._frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).stream_writer(
            self._stream, closefd=False
        )
        self._sizes: list[int] = []
        self._positions: list[int] = []
        self._hashes = bytearray()
        self.bytes = self.documents = 0

    def add(self, data: bytes, position: int) -> None:
        """Appends one document."""
        self._frame.write(data)
        self._sizes.append(len(data))
        self._positions.append(position)
        self._hashes += hashlib.sha256(data).digest()[:16]
        self.bytes += len(data)
        self.documents += 1

    def finish(self, files: tuple[tuple[str, int], ...] = ()) -> Part:
        """Gives the part its name. `files`: as in Part."""
        self._frame.close()
        arrays = {
            "size": np.array(self._sizes, np.int64),
            "position": np.array(self._positions, np.int64),
            "hash": np.frombuffer(bytes(self._hashes), ">u8").astype(np.uint64).reshape(-1, 2),
        }
        write_file(self._folder / f"{self._name}.safetensors", safetensors.numpy.save(arrays))
        self._replacing.__exit__(None, None, None)
        return Part(name=self._name, documents=self.documents, bytes=self.bytes, split=self.split, files=files)

    def discard(self, error: BaseException) -> None:
        """Removes what was written."""
        self._replacing.__exit__(type(error), error, error.__traceback__)


def read_index(folder: Path, name: str) -> PartIndex:
    """The arrays of a part."""
    return PartIndex(**safetensors.numpy.load_file(folder / f"{name}.safetensors"))


def read_hashes(folder: Path, name: str) -> np.ndarray:
    """`hash` of a part; reads that array alone."""
    with safetensors.safe_open(folder / f"{name}.safetensors", framework="numpy") as file:
        hashes: np.ndarray = file.get_tensor("hash")
    return hashes


def read_documents(folder: Path, name: str, sizes: np.ndarray) -> Iterator[bytes]:
    """The documents of a part in order, given their `size`; memory is that of one. Raises DataError if the part was
    damaged after it was written."""
    path = folder / f"{name}.zst"
    try:
        with path.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as frame:
            buffer, start = b"", 0
            for size in sizes.tolist():
                if start + size > len(buffer):
                    buffer = buffer[start:] + _read(frame, max(size - (len(buffer) - start), READ_BYTES))
                    start = 0
                if start + size > len(buffer):
                    raise zstandard.ZstdError("it ends too early")
                yield buffer[start : start + size]
                start += size
            if len(buffer) > start or frame.read(1):
                raise zstandard.ZstdError("it goes on behind the last document")
    except zstandard.ZstdError as error:
        raise DataError(f"{path} was damaged after it was written ({error}); remove {folder.parent}") from None


def _read(frame: Any, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end."""
    blocks = []
    while size > 0 and (block := frame.read(size)):
        blocks.append(block)
        size -= len(block)
    return b"".join(blocks)
