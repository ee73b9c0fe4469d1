"""Text to token ids, a part at a time."""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.numpy

from data_prep.documents import stable_fractions
from data_prep.selection import Selection
from data_prep.shard_format import BYTE_VALUES, SPLITS, DataError, SplitName, dtype_name
from data_prep.store import Part, read_index
from data_prep.tokenizer import TextTokenizer
from data_prep.work import replacing, write_atomically


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """One part to tokenise."""

    part: Part
    selection: Selection
    model: Path | None
    """SentencePiece model; None for bytes."""
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


def is_encoded(task: EncodeTask) -> bool:
    """Whether the part has been tokenised."""
    return (task.folder / f"{task.part.name}.safetensors").exists()


@lru_cache(maxsize=1)  # per process
def _tokenizer(model: Path) -> TextTokenizer:
    return TextTokenizer.load(model)


def encode_part(task: EncodeTask) -> None:
    """Writes PART.tok, the ids of train, validation and test, each document followed by EOS (bytes have none), and
    PART.safetensors: int64 `SPLIT_tokens` and `SPLIT_bytes` [documents], int64 `crc32` [1] of PART.tok."""
    part = task.part
    keep = task.selection.keep(part)
    to_validation = np.zeros(part.documents, np.bool_)
    if task.validation_fraction and part.split == "train":
        hashes = read_index(task.selection.ingest, part.name).hash
        to_validation = stable_fractions(hashes[:, 0]) < task.validation_fraction
    tokenizer = None if task.model is None else _tokenizer(task.model)
    dtype = np.dtype(dtype_name(BYTE_VALUES if tokenizer is None else tokenizer.vocab_size))
    ids: dict[SplitName, list[np.ndarray]] = {split: [] for split in SPLITS}
    text_bytes: dict[SplitName, list[int]] = {split: [] for split in SPLITS}
    for number, data in task.selection.documents(part, keep):
        split: SplitName = "validation" if to_validation[number] else part.split
        if tokenizer is None:
            ids[split].append(np.frombuffer(data, np.uint8).astype(dtype))
        else:
            found = tokenizer.encode(data.decode("utf-8"))
            document = np.empty(len(found) + 1, dtype)  # concatenate with a cast takes 10 times as long
            document[:-1], document[-1] = found, tokenizer.eos_id
            ids[split].append(document)
        text_bytes[split].append(len(data))
    crc = 0
    with replacing(task.folder / f"{part.name}.tok") as stream:
        for split in SPLITS:
            for document in ids[split]:
                raw = document.tobytes()
                crc = zlib.crc32(raw, crc)
                stream.write(raw)
    arrays = {"crc32": np.array([crc], np.int64)}
    for split in SPLITS:
        arrays[f"{split}_tokens"] = np.array([len(document) for document in ids[split]], np.int64)
        arrays[f"{split}_bytes"] = np.array(text_bytes[split], np.int64)
    write_atomically(task.folder / f"{part.name}.safetensors", safetensors.numpy.save(arrays))


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
        raise DataError(f"{path} was damaged after it was written; remove {folder}")
    return np.frombuffer(data, dtype)
