"""Token ids that another program made, as documents.

    megatron     NAME.bin beside NAME.idx: the index says where documents end
    token_array  ids one after the other, as NumPy's .npy, with the header of llm.c, or without any header as nanoGPT
                 writes them: an id ends each document, or comes before it

Files are read from front to back in blocks, so memory is that of a block and of one document.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from common.splits import SplitName
from data_prep.raw.megatron_index import MegatronIndex
from data_prep.raw.records import EXCERPT_BYTES, Document, Rejected
from data_prep.raw.unpack import ZIP_MAGIC, DamagedFileError, Unpacked

BLOCK_IDS = 1 << 20
NPY_MAGIC = b"\x93NUMPY"
MAX_NPY_HEADER_BYTES = 1 << 14  # numpy itself reads no more than 10,000 of it
LLM_C_HEADER_BYTES = 1024
LLM_C_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version) in karpathy/llm.c
FEWEST_TELLING_IDS = 16  # with fewer, that every second one is 0 says nothing
_NONE = np.empty(0, np.int64)
Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids, and of the documents that end in the block by the index: their tokens, and where in the block they end."""


@dataclass(frozen=True, kw_only=True)
class IdReading:
    """What is known about the ids before a file is opened."""

    vocab_size: int
    """Pieces of the tokenizer; every id but those that end documents is below it."""
    has_model: bool
    """Whether the tokenizer is tokenizer.model, not one that is not here."""
    eos_id: int
    """Its id of the end of a document."""
    end_id: int
    """The id that ends documents in the files; the same, or another, which need be no piece."""
    array_dtype: str
    """Dtype of arrays without a header."""
    max_bytes: int
    """Most bytes of a document, at `dtype`."""
    dtype: np.dtype[np.generic]
    """Of the ids in a Document: the one of shards."""


def id_documents(
    content: Unpacked, split: SplitName, reading: IdReading, index: MegatronIndex | None
) -> Iterator[Document | Rejected]:
    """The documents of a file, their ids as bytes, without the id that ends them; `index` of a .bin of Megatron-LM.

    A document ends where the index says so and at each end id. The first end id of an array that begins with it ends
    nothing. Raises DataError for an id that the tokenizer does not have, DamagedFileError for a file that is cut.
    """
    blocks = _array_blocks(content, reading) if index is None else _indexed_blocks(content, index)
    position = begin = 0  # ids before the block, and before the document
    held = _Held()
    for ids, lengths, stops in blocks:
        is_end = (ids == reading.end_id) | (ids == reading.eos_id)
        _check_ids(ids, is_end, position, content.name, reading)
        data, start = ids.astype(reading.dtype), 0
        for end, after in _cuts(is_end, lengths, stops):
            held.add(data[start:end], reading.max_bytes)
            if held.bytes or index is not None or position + after > 1:
                yield held.take(begin, split, reading)
            start, begin = after, position + after
        held.add(data[start:], reading.max_bytes)
        position += len(ids)
    if held.bytes:
        yield held.take(begin, split, reading)


def _cuts(is_end: np.ndarray, lengths: np.ndarray, stops: np.ndarray) -> Iterator[tuple[int, int]]:
    """(end of a document, begin of the next) in a block, in order. Where the index ends a document just behind an end
    id, that is one end."""
    marked = np.flatnonzero(is_end)
    twice = np.zeros(len(stops), np.bool_)
    twice[lengths > 0] = is_end[stops[lengths > 0] - 1]
    ends = np.concatenate([marked, stops[~twice]])
    begins = np.concatenate([marked + 1, stops[~twice]])
    order = np.argsort(begins, kind="stable")  # at the same place an end id comes before empty documents
    return zip(ends[order].tolist(), begins[order].tolist(), strict=True)


class _Held:
    """The pieces of a document that goes on in the next block; of one that is too long only the first."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.bytes = 0

    def add(self, ids: np.ndarray, max_bytes: int) -> None:
        if self.bytes <= max_bytes and ids.size:  # none where a block ends just behind a document
            self._pieces.append(ids.tobytes())
        self.bytes += ids.nbytes

    def take(self, position: int, split: SplitName, reading: IdReading) -> Document | Rejected:
        """The document, which is then forgotten."""
        pieces, size = self._pieces, self.bytes
        self._pieces, self.bytes = [], 0
        if size == 0:
            return Rejected(position, "empty", "the document holds no id", b"", 0)
        if size > reading.max_bytes:
            detail = (
                f"more than ingest.max_document_bytes {reading.max_bytes}; documents end at the id {reading.end_id}, "
                "see end_of_document"
            )
            first = np.frombuffer(pieces[0][:EXCERPT_BYTES], reading.dtype)
            return Rejected(position, "too long", detail, " ".join(map(str, first))[:EXCERPT_BYTES].encode(), size)
        return Document(position, split, b"".join(pieces))


def _check_ids(ids: np.ndarray, is_end: np.ndarray, position: int, name: str, reading: IdReading) -> None:
    foreign = ((ids < 0) | (ids >= reading.vocab_size)) & ~is_end
    if foreign.any():
        at = int(foreign.argmax())
        where = f"{name}: token {position + at:,} is the id {ids[at]}"
        if not reading.has_model:
            raise DataError(
                f"{where}, and tokenizer.vocab_size is {reading.vocab_size}; set it to that of the tokenizer that made "
                "these ids (with the ids that it was given later, which its size may leave out)"
            )
        raise DataError(
            f"{where}, and tokenizer.model has {reading.vocab_size} pieces; name the model that made these ids, or, if "
            "this id ends documents, set end_of_document to it"
        )


def _indexed_blocks(content: Unpacked, index: MegatronIndex) -> Iterator[Block]:
    for lengths in index.lengths():
        stops = np.cumsum(lengths)
        tokens, first = int(stops[-1]), 0
        for start in range(0, max(tokens, 1), BLOCK_IDS):
            stop = min(tokens, start + BLOCK_IDS)
            last = int(np.searchsorted(stops, stop, side="right"))
            yield _read(content, index.dtype, stop - start), lengths[first:last], stops[first:last] - start
            first = last


def _array_blocks(content: Unpacked, reading: IdReading) -> Iterator[Block]:
    dtype, count = _array_header(content)
    if count is None:
        yield from _plain_blocks(content, reading)
        return
    for start in range(0, count, BLOCK_IDS):
        yield _read(content, dtype, min(BLOCK_IDS, count - start)), _NONE, _NONE
    if content.read(1):
        raise DamagedFileError(f"{content.name} holds more than the {count:,} ids of its header; fetch it again")


def _plain_blocks(content: Unpacked, reading: IdReading) -> Iterator[Block]:
    """Of an array without a header. Nothing in it says how many bytes an id has, so what another size looks like is
    refused: most of it would pass for ids."""
    dtype = np.dtype(reading.array_dtype).newbyteorder("<")
    largest, most = max(reading.vocab_size - 1, reading.end_id), int(np.iinfo(dtype).max)
    if largest > most:
        raise DataError(
            f"id_dtype: {reading.array_dtype} holds numbers up to {most:,}, and ids of {content.name} may be "
            f"{largest:,} (the tokenizer's, end_of_document); set it to what wrote them, such as uint32"
        )
    if content.peek(len(ZIP_MAGIC)) == ZIP_MAGIC:
        raise DataError(f"{content.name} is a zip, as .npz files are; save each array by itself, with numpy.save")
    is_first = True
    while data := content.read(BLOCK_IDS * dtype.itemsize):
        if len(data) % dtype.itemsize:
            raise DamagedFileError(
                f"{content.name} ends inside an id of {dtype.itemsize} bytes (id_dtype); fetch it again"
            )
        ids = np.frombuffer(data, dtype)
        if is_first and len(ids) >= FEWEST_TELLING_IDS and not ids[1::2].any():
            raise DataError(
                f"{content.name}: every second id is 0, as where ids have more bytes than id_dtype "
                f"{reading.array_dtype}; set it to what wrote them (uint32, int32, int64)"
            )
        is_first = False
        yield ids, _NONE, _NONE


def _read(content: Unpacked, dtype: np.dtype[np.generic], count: int) -> np.ndarray:
    data = content.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise DamagedFileError(f"{content.name} ends after {content.position:,} bytes, too early; fetch it again")
    return np.frombuffer(data, dtype)


def _array_header(content: Unpacked) -> tuple[np.dtype[np.generic], int | None]:
    """Reads the header of an array: (dtype, ids); (any, None) without one."""
    head = content.peek(LLM_C_HEADER_BYTES)
    if head.startswith(NPY_MAGIC):
        return _npy_header(content)
    if len(head) == LLM_C_HEADER_BYTES:
        magic, version, count, *zeros = np.frombuffer(head, "<i4").tolist()
        if (magic, version) in LLM_C_DTYPES and not any(zeros):
            content.read(LLM_C_HEADER_BYTES)
            return np.dtype(LLM_C_DTYPES[magic, version]), count
    return np.dtype("<u2"), None


def _npy_header(content: Unpacked) -> tuple[np.dtype[np.generic], int]:
    head = io.BytesIO(content.peek(MAX_NPY_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(head)
    except Exception:  # a header is Python, and numpy passes on what Python's parser and tokenizer raise
        raise DamagedFileError(f"{content.name} has a damaged header; fetch it again") from None
    if dtype.kind not in "iu" or len(shape) != 1:
        raise DamagedFileError(
            f"{content.name} is an array of {dtype} with {len(shape)} dimensions; save integers with one: "
            "ids.reshape(-1)"
        )
    content.read(head.tell())
    return dtype, shape[0]
