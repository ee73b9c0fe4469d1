"""Text to token ids, a part at a time."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from common.errors import DataError
from common.files import replacing, write_file
from common.splits import SPLITS, SplitName
from data_prep.raw.documents import stable_fractions
from data_prep.raw.records import EXCERPT_BYTES
from data_prep.shards.format import dtype_name
from data_prep.stages.id_maker import IdRecipe
from data_prep.stages.selection import Selection
from data_prep.work.parts import Part, read_index

FIRST_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """One part to tokenise."""

    part: Part
    selection: Selection
    recipe: IdRecipe
    validation_fraction: float
    folder: Path


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """The documents of one split of a part."""

    start: int
    """Where its ids begin in PART.tok, counted in ids."""
    tokens: np.ndarray
    """int64 [documents]: ids of each document, EOS included."""
    text_bytes: np.ndarray
    """int64 [documents]: UTF-8 bytes of the text of each."""


class _Ids:
    """Growing ids of one split; an array that doubles, since thousands of small ones take twice the memory."""

    def __init__(self, dtype: np.dtype[np.generic]) -> None:
        self._ids = np.empty(FIRST_IDS, dtype)
        self._fill = 0
        self.tokens: list[int] = []
        self.text_bytes: list[int] = []

    def add(self, ids: np.ndarray, eos: int | None, text_bytes: int) -> None:
        stop = self._fill + len(ids)
        if stop >= len(self._ids):
            grown = np.empty(max(2 * len(self._ids), stop + 1), self._ids.dtype)
            grown[: self._fill] = self._ids[: self._fill]
            self._ids = grown
        self._ids[self._fill : stop] = ids
        if eos is not None:
            self._ids[stop] = eos
            stop += 1
        self.tokens.append(stop - self._fill)
        self.text_bytes.append(text_bytes)
        self._fill = stop

    def raw(self) -> memoryview:
        return self._ids[: self._fill].data.cast("B")


class PartEncoder:
    """Writes PART.tok, the ids of train, validation and test, each document followed by EOS if the recipe has it, then
    PART.safetensors: int64 `SPLIT_tokens` and `SPLIT_bytes` [documents], int64 `crc32` [1] of PART.tok. Memory: the ids
    of the part, up to twice."""

    def __init__(self, folder: Path, name: str, recipe: IdRecipe) -> None:
        self._folder, self._name, self._maker = folder, name, recipe.maker()
        dtype = np.dtype(dtype_name(self._maker.vocab_size))
        self._splits: dict[SplitName, _Ids] = {split: _Ids(dtype) for split in SPLITS}

    def add(self, data: bytes, split: SplitName) -> None:
        """Appends one document, its text in UTF-8 or, if the recipe takes these, its ids as bytes. Raises DataError for
        one that would have no id at all."""
        ids = self._maker.ids(data)
        if not len(ids) and self._maker.eos_id is None:
            raise DataError(
                f"tokenizer.separator: a document has neither a piece nor an end, so it has no place in a shard: "
                f"{data[:EXCERPT_BYTES].decode(errors='replace')!a}; set separator to null, or to a text that has "
                "pieces, or remove that document"
            )
        self._splits[split].add(ids, self._maker.eos_id, self._maker.text_bytes(data, ids))

    def finish(self) -> None:
        """Gives the files their names."""
        crc, arrays = 0, {}
        with replacing(self._folder / f"{self._name}.tok") as stream:
            for split, ids in self._splits.items():
                raw = ids.raw()
                crc = zlib.crc32(raw, crc)
                stream.write(raw)
                arrays[f"{split}_tokens"] = np.array(ids.tokens, np.int64)
                arrays[f"{split}_bytes"] = np.array(ids.text_bytes, np.int64)
        arrays["crc32"] = np.array([crc], np.int64)
        write_file(self._folder / f"{self._name}.safetensors", safetensors.numpy.save(arrays))


def encode_part(task: EncodeTask) -> None:
    """Tokenises the documents of a part that are left."""
    part = task.part
    to_validation = np.zeros(part.documents, np.bool_)
    if task.validation_fraction and part.split == "train":
        hashes = read_index(task.selection.ingest, part.name).hash
        to_validation = stable_fractions(hashes[:, 0]) < task.validation_fraction
    encoder = PartEncoder(task.folder, part.name, task.recipe)
    for number, data in task.selection.documents(part):
        encoder.add(data, "validation" if to_validation[number] else part.split)
    encoder.finish()


def encoded_splits(folder: Path, part: Part) -> dict[SplitName, EncodedSplit]:
    """Lengths of the documents of a part, by split."""
    arrays = safetensors.numpy.load_file(folder / f"{part.name}.safetensors")
    start, found = 0, {}
    for split in SPLITS:
        tokens = arrays[f"{split}_tokens"]
        found[split] = EncodedSplit(start=start, tokens=tokens, text_bytes=arrays[f"{split}_bytes"])
        start += int(tokens.sum())
    return found


def read_tokens(folder: Path, name: str, dtype: np.dtype[np.generic]) -> np.ndarray:
    """All ids of a part. Raises DataError if they were damaged after they were written."""
    path = folder / f"{name}.tok"
    data = path.read_bytes()
    if zlib.crc32(data) != int(safetensors.numpy.load_file(folder / f"{name}.safetensors")["crc32"][0]):
        # Not this folder alone: of ids that were made while reading there is no text to make them from again.
        raise DataError(f"{path} was damaged after it was written; remove {folder.parent}")
    return np.frombuffer(data, dtype)
