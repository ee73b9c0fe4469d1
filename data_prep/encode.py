"""Text to token ids on several processes, in order, with bounded memory.

The unit of work is a chunk of lines, not a file, so that one huge file also uses every worker. Results come
back in the order of the chunks, so the output does not depend on the number of processes.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.documents import Chunk, goes_to_validation, parse_bytes, parse_texts
from data_prep.shard_format import BYTE_VALUES, DataError, SplitName, dtype_name
from data_prep.tokenizer import TextTokenizer

# Chunks handed out per worker: one in work, one waiting. At 1 MB of text a chunk this bounds memory to a few
# MB each.
CHUNKS_PER_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents of one chunk as ids."""

    source: int
    """Which input file, by position in the list of inputs."""
    stored_bytes: int
    """How far the input file was consumed by this chunk."""
    ids: np.ndarray
    """uint16 or uint32 [sum(lengths)]: the ids of all documents, one after the other, without EOS."""
    lengths: np.ndarray
    """int64 [documents]: ids of each document."""
    text_bytes: np.ndarray
    """int64 [documents]: UTF-8 bytes of each document's text."""
    split: SplitName
    """Where the documents go, save those of `validation`."""
    validation: np.ndarray
    """bool [documents]: whether the hash of the text sends the document to validation."""


class ChunkEncoder:
    """Tokenises chunks with one model, or as bytes without one; built once in every worker process."""

    def __init__(self, model_path: Path | None, validation_fraction: float) -> None:
        self._tokenizer = None if model_path is None else TextTokenizer.load(model_path)
        vocab_size = BYTE_VALUES if self._tokenizer is None else self._tokenizer.vocab_size
        self._dtype = np.dtype(dtype_name(vocab_size))
        self._validation_fraction = validation_fraction

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Parses and tokenises one chunk. Raises DataError with file and line (or byte) for a malformed one."""
        ids: list[np.ndarray] = [np.empty(0, self._dtype)]
        text_bytes: list[int] = []
        validation: list[bool] = []
        if self._tokenizer is None:
            for data in parse_bytes(chunk):
                ids.append(np.frombuffer(data, np.uint8).astype(self._dtype))
                text_bytes.append(len(data))
                validation.append(False)  # the formats that go with bytes come in splits
        else:
            for text in parse_texts(chunk):
                ids.append(self._tokenizer.encode(text).astype(self._dtype))
                text_bytes.append(len(text.encode("utf-8")))
                validation.append(goes_to_validation(text, validation_fraction=self._validation_fraction))
        return EncodedChunk(
            source=chunk.source,
            stored_bytes=chunk.stored_bytes,
            ids=np.concatenate(ids),
            lengths=np.array([len(document) for document in ids[1:]], np.int64),
            text_bytes=np.array(text_bytes, np.int64),
            split=chunk.split,
            validation=np.array(validation, np.bool_),
        )


_encoder: ChunkEncoder | None = None  # of this worker process


def _start_worker(model_path: Path | None, validation_fraction: float) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    _encoder = ChunkEncoder(model_path, validation_fraction)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _encoder is not None, "the worker was not started by _start_worker"
    return _encoder.encode(chunk)


def encode_chunks(
    chunks: Iterable[Chunk], *, model_path: Path | None, validation_fraction: float, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encodes chunks on `workers` processes (1: in this one) and yields the results in order; as bytes if there
    is no model. Raises DataError."""
    if workers == 1:
        encoder = ChunkEncoder(model_path, validation_fraction)
        yield from map(encoder.encode, chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        # spawn: a fork would copy the parent's threads' locks (tqdm has a monitor thread)
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(model_path, validation_fraction),
    )
    waiting: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process died (most often: killed for memory); run again with fewer `workers`"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
