"""MinHash signatures, by which near-duplicates are found.

A document is the set of its word n-grams; words are runs of letters and digits in lower case. rensa's RMinHash takes
64-bit hashes of the n-grams to 256 values of which a share J agrees between two documents of Jaccard similarity J. The
values of a band together are one hash; documents that share a band's hash are candidates, whose similarity is then
estimated from the low bytes of all 256 values.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from common.errors import DataError
from common.files import replacing, write_file
from common.hashing import splitmix64
from data_prep.stages.selection import Selection
from data_prep.work.parts import Part

PERMUTATIONS = 256
SEED = 1
MIN_CANDIDATE_RECALL = 0.98
BATCH_CHARACTERS = 1 << 20  # of text whose n-grams are hashed in one go: 8 MB of arrays
BATCH_DOCUMENTS = 1 << 11  # rensa gives their values as Python numbers: 20 MB
WORD = re.compile(r"\w+")


def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands for which two documents at the threshold share one with probability
    MIN_CANDIDATE_RECALL, 1 - (1 - threshold ** rows) ** bands."""
    shapes = [(PERMUTATIONS // rows, rows) for rows in range(PERMUTATIONS, 0, -1)]
    return next((b, r) for b, r in shapes if 1 - (1 - threshold**r) ** b >= MIN_CANDIDATE_RECALL)


@dataclass(frozen=True, kw_only=True)
class SignatureTask:
    """One part to sign."""

    part: Part
    selection: Selection
    shingle_words: int
    threshold: float
    folder: Path


def sign_part(task: SignatureTask) -> None:
    """Writes PART.sig, the low bytes of the signatures, uint8 [documents, 256] with zeros for documents that are
    not candidates, and PART.safetensors: int64 `document` [signed], uint64 `bands` [bands, signed]. Documents that a
    filter dropped or that hold no word are not signed."""
    bands, rows = band_shape(task.threshold)
    numbers: list[int] = []
    hashes: list[np.ndarray] = []
    with replacing(task.folder / f"{task.part.name}.sig") as stream:
        low_bytes = np.zeros((task.part.documents, PERMUTATIONS), np.uint8)
        for batch in _batches(task):
            signed, digests = signatures([text for _, text in batch], task.shingle_words)
            documents = [batch[row][0] for row in signed.tolist()]
            numbers += documents
            low_bytes[documents] = digests.astype(np.uint8)
            hashes.append(band_hashes(digests, bands, rows))
        stream.write(low_bytes.tobytes())
    arrays = {
        "document": np.array(numbers, np.int64),
        "bands": np.concatenate([np.empty((bands, 0), np.uint64), *hashes], axis=1),
    }
    write_file(task.folder / f"{task.part.name}.safetensors", safetensors.numpy.save(arrays))


def _batches(task: SignatureTask) -> Iterator[list[tuple[int, str]]]:
    """The documents left by the filters, (number in the part, text), BATCH_CHARACTERS or BATCH_DOCUMENTS at a time."""
    batch: list[tuple[int, str]] = []
    characters = 0
    for number, data in task.selection.documents(task.part):
        text = data.decode("utf-8")
        batch.append((number, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def signatures(texts: list[str], shingle_words: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, signatures): int64 [n] of the texts that hold a word, uint32 [n, 256]. A text of fewer words than an
    n-gram is one n-gram."""
    from rensa import RMinHash  # here: only this stage needs it

    words = [WORD.findall(text.lower()) for text in texts]
    counts = np.array([len(found) for found in words], np.int64)
    signed = np.flatnonzero(counts)
    if not len(signed):
        return signed, np.empty((0, PERMUTATIONS), np.uint32)
    (flat,) = RMinHash.hash_token_sets([[word for found in words for word in found]])
    shingles, offsets = shingle_hashes(np.array(flat, np.uint64), counts[signed], shingle_words)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, PERMUTATIONS, SEED)
    return signed, np.array(matrix.to_rows(), np.uint32)


def shingle_hashes(words: np.ndarray, counts: np.ndarray, shingle_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of consecutive documents: `words` uint64 [sum(counts)] are word hashes, `counts` int64
    [documents], all above 0. Returns uint64 hashes and uint64 offsets [documents + 1] into them."""
    stop = np.cumsum(counts)
    rolled = np.zeros(len(words), np.uint64)
    for distance in range(shingle_words):
        # A document shorter than n uses the words it has: those behind its end count as 0.
        ahead = words[distance:]  # none if all documents together have fewer words than an n-gram
        shifted = np.concatenate([ahead, np.zeros(len(words) - len(ahead), np.uint64)])
        inside = np.arange(len(words)) + distance < np.repeat(stop, counts)
        rolled = splitmix64(rolled + np.where(inside, shifted, np.uint64(0)) + np.uint64(distance + 1))
    num_shingles = np.maximum(counts - shingle_words + 1, 1)
    position = np.arange(len(words)) - np.repeat(stop - counts, counts)
    kept = rolled[position < np.repeat(num_shingles, counts)]
    return kept, np.concatenate([[0], np.cumsum(num_shingles)]).astype(np.uint64)


def band_hashes(digests: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [bands, documents] from signatures uint32 [documents, 256]."""
    hashes = np.empty((bands, len(digests)), np.uint64)
    for band in range(bands):
        mixed = np.zeros(len(digests), np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            mixed = splitmix64(mixed + digests[:, column].astype(np.uint64))
        hashes[band] = mixed
    return hashes


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [n]: estimated Jaccard similarity from the low bytes uint8 [n, 256] of two signatures; 1 value in 256
    agrees by chance."""
    agree = (first == second).mean(axis=1)
    corrected: np.ndarray = np.maximum(0.0, (agree - 1 / 256) / (1 - 1 / 256))
    return corrected


def read_band(folder: Path, part: Part, band: int) -> tuple[np.ndarray, np.ndarray]:
    """(document, hash): int64 and uint64 [signed] of one band of a part; reads that band alone."""
    with safetensors.safe_open(folder / f"{part.name}.safetensors", framework="numpy") as file:
        return file.get_tensor("document"), file.get_slice("bands")[band]


def read_low_bytes(folder: Path, part: Part, documents: np.ndarray) -> np.ndarray:
    """uint8 [n, 256] of some documents of a part, int64 [n]; reads these rows alone."""
    rows = np.empty((len(documents), PERMUTATIONS), np.uint8)
    # Not mapped: the documents of a batch lie in nearly every part of the corpus, and a mapping for each costs more.
    path = folder / f"{part.name}.sig"
    with path.open("rb", buffering=0) as stream:
        for row, document in zip(rows, documents.tolist(), strict=True):
            stream.seek(PERMUTATIONS * document)
            if stream.readinto(row.data) != PERMUTATIONS:
                raise DataError(f"{path} was damaged after it was written (it ends too early); remove {folder}")
    return rows
