"""The index of a Megatron-LM data set: which of the ids in NAME.bin are a document.

NAME.idx, as megatron.core.datasets.indexed_dataset writes it, little-endian: 9 bytes `MMIDIDX`, uint64 version 1,
uint8 code of the ids' dtype, uint64 sequences, uint64 entries of the document index; then int32 tokens [sequences],
int64 byte in NAME.bin [sequences], int64 document index [entries]: document d is the sequences from entry d up to
entry d + 1. megatron.core itself is not imported: it brings torch, which the preparation does without.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import DataError
from data_prep.raw.unpack import DamagedFileError

BIN, INDEX = ".bin", ".idx"
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point
_BYTES_OF_SEQUENCE, _BYTES_OF_ENTRY = 4 + 8, 8
_DOCUMENTS_AT_ONCE = 4096


def bin_pattern(pattern: str) -> str:
    """The pattern of the .bin files of a data set, which may be named by them, by the .idx or, as in Megatron-LM,
    without an ending."""
    return pattern.removesuffix(INDEX).removesuffix(BIN) + BIN


def index_of(path: Path) -> Path:
    """The index of a .bin file."""
    return path.with_suffix(INDEX)


class MegatronIndex:
    """The index of one .bin file. It is mapped into memory: what is read of it the system may take back."""

    def __init__(self, bin_file: Path) -> None:
        """Raises DataError if there is none, DamagedFileError if it is not an index, or not the one of that file."""
        self.path = index_of(bin_file)
        try:
            with self.path.open("rb") as stream:
                header = stream.read(_HEADER.size)
            size, bin_size = self.path.stat().st_size, bin_file.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {self.path}, the index of {bin_file.name}: {error.strerror}") from None
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DamagedFileError(f"{self.path} is no index of Megatron-LM; fetch it again")
        _, version, code, self._sequences, self._entries = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise DamagedFileError(
                f"{self.path} has version {version} and dtype {code}; integers of version 1 are read"
            )
        expected = _HEADER.size + self._sequences * _BYTES_OF_SEQUENCE + self._entries * _BYTES_OF_ENTRY
        if size == expected + self._sequences and self._sequences:
            raise DamagedFileError(
                f"{self.path} is the index of a multimodal data set, which is not read; use text alone"
            )
        if size != expected:
            raise DamagedFileError(f"{self.path} has {size:,} bytes, its header says {expected:,}; fetch it again")
        self.dtype = np.dtype(_DTYPES[code])
        """Of the ids in the .bin file."""
        described = int(self._pointers[-1]) + int(self._tokens[-1]) * self.dtype.itemsize if self._sequences else 0
        if bin_size != described:
            raise DamagedFileError(
                f"{bin_file} has {bin_size:,} bytes, {self.path.name} describes {described:,}; fetch both again"
            )
        first, last = (self._documents[0], self._documents[-1]) if self._entries else (0, 0)
        if (first, last) != (0, self._sequences):
            raise self._broken()

    def lengths(self) -> Iterator[np.ndarray]:
        """int64 [n]: tokens of the next documents, in the order of the file. Raises DamagedFileError if the index
        contradicts itself."""
        begun = 0  # bytes of the .bin file
        for first in range(0, self._entries - 1, _DOCUMENTS_AT_ONCE):
            bounds = np.array(self._documents[first : first + _DOCUMENTS_AT_ONCE + 1])
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > self._sequences:
                raise self._broken()
            tokens = self._tokens[bounds[0] : bounds[-1]].astype(np.int64)
            stops = np.concatenate([[0], np.cumsum(tokens)])
            pointers = self._pointers[bounds[0] : bounds[-1]]
            if (tokens < 0).any() or (pointers != begun + stops[:-1] * self.dtype.itemsize).any():
                raise self._broken()
            begun += int(stops[-1]) * self.dtype.itemsize
            yield np.diff(stops[bounds - bounds[0]])

    @property
    def _tokens(self) -> np.ndarray:
        return self._array("<i4", _HEADER.size, self._sequences)

    @property
    def _pointers(self) -> np.ndarray:
        return self._array("<i8", _HEADER.size + 4 * self._sequences, self._sequences)

    @property
    def _documents(self) -> np.ndarray:
        return self._array("<i8", _HEADER.size + _BYTES_OF_SEQUENCE * self._sequences, self._entries)

    def _array(self, dtype: str, offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, "r", offset, (count,))

    def _broken(self) -> DamagedFileError:
        return DamagedFileError(
            f"{self.path}: its documents are not all sequences of the .bin file, one after the other; write both again "
            "with tools/preprocess_data.py"
        )
