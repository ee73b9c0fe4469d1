"""Files of token ids, as other programs write them, and what a preparation has made of them. For tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader

EOS = 1  # of the models that a preparation trains
Documents = list[list[list[int]]]
"""Each a list of sentences of ids."""
ODD: Documents = [
    [[]],  # a sentence without ids
    [[5], [], [6, 7]],
    [],  # a document without sentences
    [[8] * 5001],  # longer than a shard, and than several blocks
    [[9, EOS]],
    [[EOS]],
    [],
    [[10, EOS, 11], [12]],  # an end inside
    [[13]],
]


Prepare = Callable[..., Path]
"""The fixture `prepare_ids`: keys of a config to the folder of its data."""


def write_megatron(prefix: Path, dtype: str, documents: Documents) -> None:
    """The .bin and .idx file of a data set."""
    sentences = [sentence for document in documents for sentence in document]
    sizes = np.array([len(sentence) for sentence in sentences], "<i4")
    ids = np.array([number for sentence in sentences for number in sentence], dtype)
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * ids.itemsize
    ends = np.cumsum([0, *map(len, documents)]).astype("<i8")
    code = {"int32": 4, "uint16": 8}[dtype]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sentences), len(ends))
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    index = b"".join(array.tobytes() for array in (sizes, pointers.astype("<i8"), ends))
    prefix.with_suffix(".idx").write_bytes(header + index)


def write_plain(path: Path, ids: list[int], dtype: str) -> Path:
    path.write_bytes(np.array(ids, dtype).tobytes())
    return path


def write_llm_c(path: Path, ids: Sequence[int], *, dtype: str = "<u2", magic: int = 20240520, version: int = 1) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
    return path


def stored_documents(folder: Path, split: str = "train") -> list[list[int]]:
    with SplitReader(Manifest.load(folder), split, verify_on_first_read=True) as reader:
        return [reader.document(number).tolist() for number in range(reader.num_documents)]
