"""Documents to parts, while raw files are read one after the other: small files share a part, and the documents of a
damaged file are taken back."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.splits import SplitName
from data_prep.raw.documents import stable_fractions
from data_prep.raw.records import Document
from data_prep.stages.encode import PartEncoder
from data_prep.stages.id_maker import IdRecipe
from data_prep.work.parts import PART_DOCUMENTS, Part, PartWriter

# Text of one file that waits in memory until the file has been read whole; a file with more gets parts of its own,
# which can be left out.
PENDING_BYTES = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become ids while they are read, without text on disk."""

    recipe: IdRecipe
    validation_fraction: float
    folder: Path


class _EncodedPart:
    """A part of which only the ids are written."""

    def __init__(self, encoding: Encoding, name: str, split: SplitName) -> None:
        self._name, self.split, self.bytes, self.documents = name, split, 0, 0
        self._fraction = encoding.validation_fraction if split == "train" else 0.0
        self._encoder = PartEncoder(encoding.folder, name, encoding.recipe)

    def add(self, data: bytes, position: int) -> None:
        split = self.split
        if self._fraction:
            hashes = np.frombuffer(hashlib.sha256(data).digest(), ">u8")
            split = "validation" if stable_fractions(hashes)[0] < self._fraction else split
        self._encoder.add(data, split)
        self.bytes += len(data)
        self.documents += 1

    def finish(self, files: tuple[tuple[str, int], ...]) -> Part:
        self._encoder.finish()
        return Part(name=self._name, documents=self.documents, bytes=self.bytes, split=self.split, files=files)

    def discard(self, error: BaseException) -> None:
        """Nothing is written before `finish`."""


class PartCutter:
    """Cuts the documents of files into parts, each of one split. A context manager: an error leaves no open part.

    `key`: first part of the names of the parts. For each file: `begin`, `add` for each document, then `end`, or
    `forget` if it cannot be trusted.

    Several processes may cut the same files into the same folder at once, as two copies of an array task do. So a name
    stands for one content only, and no finished part is removed: another process may have counted on it.
    """

    def __init__(self, folder: Path, key: str, part_bytes: int, encoding: Encoding | None) -> None:
        self._folder, self._key, self._part_bytes, self._encoding = folder, key, part_bytes, encoding
        self._writer: PartWriter | _EncodedPart | None = None
        self._files: list[tuple[str, int]] = []  # (name, documents) of what is in the open part
        self.parts: list[Part] = []
        self._left_out = 0  # names that parts of damaged files have, and no other part may get
        self.begin("")

    def begin(self, name: str) -> None:
        """The next file."""
        self._name = name
        self._pending: list[Document] = []
        self._pending_bytes = 0
        self._first_own: int | None = None  # the first of the parts that are this file's alone, if it has such

    def add(self, document: Document) -> None:
        """The next document of the file."""
        if self._first_own is not None:
            self._write(document)
            return
        self._pending.append(document)
        self._pending_bytes += len(document.data)
        if self._pending_bytes > PENDING_BYTES:
            self.close()
            self._first_own = len(self.parts)
            self._write_pending()

    def end(self) -> None:
        """The file has been read to its end, and stays."""
        self._write_pending()
        if self._first_own is not None:
            self.close()

    def forget(self, error: Exception, *, reads_again: bool) -> None:
        """Takes back every document of the file, because of `error`. `reads_again`: the file follows once more, and
        gives the same parts. Those of a file that is left out stay in the folder, in no record, as long as it does."""
        if self._first_own is not None:
            own = len(self.parts) - self._first_own
            if self._writer is not None:
                self._writer.discard(error)
                self._writer, self._files = None, []
                own += 1
            del self.parts[self._first_own :]
            self._left_out += 0 if reads_again else own
        self.begin(self._name)

    def close(self) -> None:
        """Finishes the open part."""
        if self._writer is not None:
            self.parts.append(self._writer.finish(tuple(self._files)))
            self._writer, self._files = None, []

    def _write_pending(self) -> None:
        for document in self._pending:
            self._write(document)
        self._pending = []

    def _write(self, document: Document) -> None:
        writer = self._writer
        if writer is not None:
            full = writer.bytes >= self._part_bytes or writer.documents >= PART_DOCUMENTS
            if full or writer.split != document.split:
                self.close()
                writer = None
        if writer is None:
            writer = self._writer = self._open(document.split)
        writer.add(document.data, document.position)
        if self._files and self._files[-1][0] == self._name:
            self._files[-1] = (self._name, self._files[-1][1] + 1)
        else:
            self._files.append((self._name, 1))

    def _open(self, split: SplitName) -> PartWriter | _EncodedPart:
        name = f"{self._key}-{len(self.parts) + self._left_out:05d}"
        if self._encoding is not None:
            return _EncodedPart(self._encoding, name, split)
        return PartWriter(self._folder, name, split)

    def __enter__(self) -> "PartCutter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._writer is not None:
            self._writer.discard(error)
