"""What a tool for preparing data wrote: its documents, decoded, against those of the raw files."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from common.errors import DataError
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader


class Written(NamedTuple):
    """The documents of one output, or of the raw files."""

    documents: int
    tokens: int
    """End of document included; 0 for raw files."""
    text_bytes: int
    """UTF-8."""
    digest: str
    """Sum of the hashes of all documents: the same in any order."""


def content(texts: Iterable[bytes], tokens: int) -> Written:
    """Of the texts of the documents."""
    documents, text_bytes, total = 0, 0, 0
    for text in texts:
        documents += 1
        text_bytes += len(text)
        total += int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return Written(documents, tokens, text_bytes, f"{total % 2**64:016x}")


def raw(paths: list[Path]) -> Written:
    """C4's files."""

    def texts() -> Iterator[bytes]:
        for path in paths:
            with gzip.open(path) as stream:
                for line in stream:
                    yield json.loads(line)["text"].encode()

    return content(texts(), 0)


def ours(folder: Path) -> Written:
    """All splits of a prepared folder, decoded by SentencePiece itself."""
    manifest = Manifest.load(folder)
    entry = manifest.tokenizer
    assert entry.file is not None and entry.eos_id is not None
    tokenizer = SentencePieceProcessor(model_file=str(folder / entry.file))
    parts = []
    for split in manifest.splits:
        with SplitReader(manifest, split, verify_on_first_read=False) as reader:
            parts.append(reader.read(0, reader.num_tokens))
    ids = np.concatenate(parts)
    texts = (tokenizer.decode(part.tolist()).encode() for part in documents(ids, entry.eos_id))
    return content(texts, len(ids))


def documents(ids: np.ndarray, eos_id: int) -> list[np.ndarray]:
    """`ids` [n] cut after every end of document, without it."""
    return [part[:-1] for part in np.split(ids, np.flatnonzero(ids == eos_id) + 1) if len(part)]


def byte_level(folder: Path, names: str, tokenizer: Path) -> Written:
    """Files of plain 16-bit ids of a byte-level BPE of the tokenizers library; the end of document is id 0. `names`:
    "*.ds" of datatrove's DocumentTokenizer, "*.npy" of `dolma tokens`, which are no NumPy files."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    byte_of = {character: byte for byte, character in enumerate(_characters())}
    pieces = [b""] * len(vocabulary)
    for piece, number in vocabulary.items():
        if number != 0:
            pieces[number] = bytes(byte_of[character] for character in piece)
    ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.rglob(names))])
    return content((b"".join(map(pieces.__getitem__, part.tolist())) for part in documents(ids, 0)), len(ids))


def _characters() -> list[str]:
    """The character that a byte-level BPE writes for each byte: itself if it is printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    characters, spare = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return characters


def check(found: dict[str, Written], source: Written) -> None:
    """Raises DataError for a tool whose output is not the text of `source`, or whose tokens are 1.5 times those of
    another: then they did not do the same work."""
    for tool, one in found.items():
        if (one.documents, one.text_bytes, one.digest) != (source.documents, source.text_bytes, source.digest):
            raise DataError(
                f"{tool} wrote {one.documents:,} documents of {one.text_bytes:,} bytes, the raw files have "
                f"{source.documents:,} of {source.text_bytes:,} or another text: these times compare nothing"
            )
    tokens = {tool: one.tokens for tool, one in found.items()}
    if tokens and max(tokens.values()) > 1.5 * min(tokens.values()):
        raise DataError(f"tokens differ by more than tokenizers do: {tokens}; these times compare nothing")
