"""The tokenizer: SentencePiece, trained on lines, exact both ways.

As in the paper: BPE, 8000 pieces, digits split. For decode(encode(text)) == text for every text: no normalisation,
spaces kept, newline a piece of its own, bytes for characters without a piece. There is no BOS and no padding; unk is 0,
EOS 1. The papers' own models, which lose all that, are trained with `normalization` nmt_nfkc.
"""

import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from common.errors import DataError
from common.hashing import GOLDEN_RATIO, mix64
from common.progress_bar import byte_bar, heartbeat
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.raw.documents import stable_fractions
from data_prep.stages.selection import Selection
from data_prep.stages.word_cache import WordCache, is_word_by_word
from data_prep.work.parts import Part, read_index

# SentencePiece drops training lines above 4192 bytes; 1024 characters are at most 4096 bytes of UTF-8.
MAX_LINE_CHARACTERS = 1024
# From each file this many times its share of the sample is read, and the seed chooses among that: a full pass
# over C4 only to draw 100 MB would take as long as tokenising it on 64 cores.
SAMPLE_OVERSAMPLING = 4
MAX_LEFT_OUT = 0.05  # of the documents, for being longer than a share, before a warning
# Encoding time grows faster than the length: 3.6 MB a second for whole documents, 4.5 in such segments (BPE, without
# the cache of words).
SEGMENT_CHARACTERS = 2048
# The character that SentencePiece writes for a space, and therefore the only one that it cannot tell from a
# space.
SPACE_SYMBOL = "\u2581"


LINES = re.compile(r"[^\n]*\n|[^\n]+")
# Training such that decode(encode(text)) == text.
LOSSLESS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # runs of spaces: 2% fewer tokens on technical text
    "user_defined_symbols": ["\n"],
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
}


MARKER_SIGNS = frozenset("<>[]{}|")
"""A piece with one of these may be a marker that somebody put into the vocabulary; whether it is, no model says."""


class TextTokenizer:
    """A SentencePiece model on text: `encode` to int32 ids, `decode` back to the same text.

    Exact for models that `train_tokenizer` made with `byte_fallback`. Without it, characters outside the
    vocabulary become unk; a foreign model may normalise text.
    """

    def __init__(self, model: bytes, *, name: str) -> None:
        """`model` is the content of a model file, `name` what messages call it. Raises DataError."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(f"{name} is not a SentencePiece model; point tokenizer.model at a *.model file") from None
        if self._model.eos_id() < 0:
            raise DataError(f"{name} has no EOS piece, which must end every document; use a model with eos_id >= 0")
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        self._newline = self._find_newline()
        symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode("utf-8")]
        self.has_byte_pieces: bool = all(self._model.is_byte(piece) for piece in symbol)
        self._space_symbol = np.array(symbol, np.int32) if self.has_byte_pieces else None
        by_word = self._newline is not None and is_word_by_word(model)
        self._words = WordCache(self._model, self._newline) if by_word and self._newline is not None else None

    def _find_newline(self) -> np.ndarray | None:
        """Ids of a lone newline (the leading space, if the model puts one, and the newline's piece), or None.

        None if the model cannot be cut at newlines: it drops them, or has pieces that reach across them.
        """
        ids: np.ndarray = self._model.encode_as_numpy("\n")
        pieces = [self._model.id_to_piece(piece) for piece in range(self.vocab_size)]
        if not len(ids) or pieces[ids[-1]] not in ("\n", "<0x0A>"):
            return None
        return None if any("\n" in piece and piece != "\n" for piece in pieces) else ids

    def text_piece(self, number: int) -> str | None:
        """The piece of an id that stands in texts; None for a control piece, a marker such as <|endoftext|>, and an id
        beyond the vocabulary."""
        if number >= self.vocab_size or self._model.is_control(number) or self._model.is_unknown(number):
            return None
        piece: str = self._model.id_to_piece(number)
        return None if set(piece) & MARKER_SIGNS and not self._model.is_byte(number) else piece

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Reads a model file. Raises DataError if it is missing or unusable."""
        try:
            return cls(path.read_bytes(), name=str(path))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None

    def encode(self, text: str) -> np.ndarray:
        """int32 ids [n] of a text, without EOS."""
        if self._words is not None and SPACE_SYMBOL not in text:
            return self._words.encode(text)
        if self._newline is None or (len(text) <= SEGMENT_CHARACTERS and SPACE_SYMBOL not in text):
            ids: np.ndarray = self._model.encode_as_numpy(text)
            return ids
        if self._space_symbol is None:
            return np.concatenate(list(self._segments(text, self._newline, opens_text=True)))
        parts: list[np.ndarray] = []
        for number, part in enumerate(text.split(SPACE_SYMBOL)):
            if number:  # as its three bytes, since SentencePiece would turn the character into a space
                parts.append(self._space_symbol)
            parts += self._segments(part, self._newline, opens_text=number == 0)
        return np.concatenate(parts)

    def encode_lines(self, text: str) -> np.ndarray:
        """int32 ids [n] of a text whose lines are cut into pieces one by one, each with its newline."""
        lines: list[np.ndarray] = [self._model.encode_as_numpy(line) for line in LINES.findall(text)]
        return np.concatenate([np.empty(0, np.int32), *lines])

    def _segments(self, text: str, newline: np.ndarray, *, opens_text: bool) -> Iterator[np.ndarray]:
        """Ids of a text, cut before newlines: the same ids as in one go, since no piece reaches across.

        A segment that does not open the document must not get the leading space that SentencePiece puts before a text,
        so it is encoded after a newline (its own, or one that is added and cut off again).
        """
        start = 0
        while start < len(text):
            stop = text.find("\n", start + SEGMENT_CHARACTERS)
            stop = len(text) if stop < 0 else stop
            segment = text[start:stop]
            if start > 0:
                yield self._model.encode_as_numpy(segment)[len(newline) - 1 :]
            elif opens_text:
                yield self._model.encode_as_numpy(segment)
            else:
                yield self._model.encode_as_numpy("\n" + segment)[len(newline) :]
            start = stop

    def piece(self, number: int) -> str:
        piece: str = self._model.id_to_piece(number)
        return piece

    def piece_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes that each id is decoded to, inside a text; 0 for unk and control pieces."""
        model, sizes = self._model, np.zeros(self.vocab_size, np.int64)
        for number in range(self.vocab_size):
            if model.is_byte(number):
                sizes[number] = 1
            elif not (model.is_control(number) or model.is_unknown(number)):
                sizes[number] = len(model.id_to_piece(number).replace(SPACE_SYMBOL, " ").encode("utf-8"))
        return sizes

    def prefix_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: bytes that decoding takes from a document that begins with the id: 1 of a piece that
        opens with a blank, if SentencePiece puts one before a text, else 0."""
        opens = [self.piece(number).startswith(SPACE_SYMBOL) for number in range(self.vocab_size)]
        puts_one = opens[int(self._model.encode_as_numpy("a")[0])]
        return np.array(opens, np.int64) * puts_one

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids [n] (any integer dtype)."""
        text: str = self._model.decode(ids.tolist())
        return text


def normalizer_name(model: bytes) -> str:
    """Name of the rule by which a serialised model changes text before it is cut into pieces, such as nmt_nfkc."""
    from sentencepiece import sentencepiece_model_pb2  # here: it loads protobuf

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    name: str = proto.normalizer_spec.name or "unnamed"
    return name


def sentences(texts: Iterable[str], config: TokenizerConfig) -> Iterator[str]:
    """What a model is trained on, as tokenizer.sentences says."""
    if config.sentences == "documents":
        return (text + (config.separator or "") for text in texts)
    if config.sentences == "lines":
        return (line for text in texts for line in text.split("\n") if line)
    return training_lines(texts)


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines to train on: documents split at newlines, long lines cut at a space so that none is dropped."""
    for text in texts:
        for line in text.split("\n"):
            while len(line) > MAX_LINE_CHARACTERS:
                cut = line.rfind(" ", 1, MAX_LINE_CHARACTERS)
                cut = cut if cut > 0 else MAX_LINE_CHARACTERS
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """The parts of one batch of raw files that a tokenizer may be trained on."""

    parts: tuple[Part, ...]
    files: frozenset[str]
    """Names of the raw files whose documents are looked at."""

    def usable(self, part: Part) -> np.ndarray:
        """bool [documents]: which documents of a part are from these files."""
        names, counts = zip(*part.files, strict=True)
        return np.repeat([name in self.files for name in names], counts)


def sample_documents(
    sources: Sequence[SampleSource],
    selection: Selection,
    *,
    sample_bytes: int | None,
    seed: int,
    validation_fraction: float,
) -> Iterator[str]:
    """A sample of at most `sample_bytes` of UTF-8 text, in reading order; all of the text if there is no more, or for
    None.

    Each batch of raw files (a large file is one alone) gives its share by bytes of text. From the first
    `SAMPLE_OVERSAMPLING` shares of its text, the documents with the smallest hash of (seed, text) are taken. Documents
    that go to validation are left out.
    Memory: 24 bytes for each document of these shares, and one document. Documents longer than the share of their file
    do not fit into it; if there are many, a warning says so.
    """
    totals = [sum(part.bytes for part in source.parts) for source in sources]
    budget = sum(totals) if sample_bytes is None else sample_bytes
    seen: Counter[str] = Counter()
    with byte_bar(total=sum(totals), description="sampling text") as bar:
        for source, size in zip(sources, totals, strict=True):
            share = budget * size // max(1, sum(totals))
            for part, chosen in _choose(source, selection, share, seed, validation_fraction, seen):
                yield from (data.decode("utf-8") for _, data in selection.documents(part, chosen))
            bar.update(size)
    if seen["longer"] > MAX_LEFT_OUT * seen["documents"]:
        print(
            f"warning: the tokenizer is trained on short documents: {seen['longer'] / seen['documents']:.0%} of those "
            f"looked at are longer than their raw file's share of tokenizer.sample_bytes {budget} (about "
            f"{budget // max(1, len(sources))} bytes of each of {len(sources)} files); raise it",
            file=sys.stderr,
        )


def _choose(
    source: SampleSource,
    selection: Selection,
    share: int,
    seed: int,
    validation_fraction: float,
    seen: Counter[str],
) -> Iterator[tuple[Part, np.ndarray]]:
    """The parts of one raw file and which of their documents to take, bool [documents]: at most `share` bytes. Adds to
    `seen` the documents looked at, and how many were longer than that."""
    parts, sizes, priorities = [], [], []
    left = SAMPLE_OVERSAMPLING * share
    for part in source.parts:
        if left <= 0:
            break
        index = read_index(selection.ingest, part.name)
        usable = (
            source.usable(part) & selection.keep(part) & (stable_fractions(index.hash[:, 0]) >= validation_fraction)
        )
        before = np.cumsum(index.size * usable) - index.size
        looked_at = usable & (before < left)
        seen.update(documents=int(looked_at.sum()), longer=int((looked_at & (index.size > share)).sum()))
        usable &= (before < left) & (index.size <= share)
        left -= int(index.size[usable].sum())
        parts.append(part)
        sizes.append(np.where(usable, index.size, share + 1))  # too large to be taken
        priorities.append(
            np.where(usable, mix64(index.hash[:, 1] ^ np.uint64(seed * GOLDEN_RATIO % 2**64)), np.iinfo(np.uint64).max)
        )
    if not parts:
        return
    size = np.concatenate(sizes)
    order = np.argsort(np.concatenate(priorities), kind="stable")
    fits = np.cumsum(np.minimum(size[order], share + 1)) <= share
    chosen = np.zeros(len(size), np.bool_)
    chosen[order[fits]] = True
    start = 0
    for part in parts:
        yield part, chosen[start : start + part.documents]
        start += part.documents


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    sources: tuple[SampleSource, ...]
    selection: Selection
    config: TokenizerConfig
    validation_fraction: float


def train_on_sample(task: TrainTask) -> bytes:
    """The model file, trained on the sample that the config asks for. Raises DataError."""
    texts = sample_documents(
        task.sources,
        task.selection,
        sample_bytes=task.config.sample_bytes,
        seed=task.config.seed,
        validation_fraction=task.validation_fraction,
    )
    return train_tokenizer(texts, task.config)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Trains a model and returns its file content. The same texts and config give the same bytes. Raises
    DataError."""
    failed: list[BaseException] = []
    lines = _noting(sentences(texts, config), failed)
    first = next(lines, None)
    if first is None:
        raise DataError(
            "no text to train a tokenizer on; check `input`, `validation_fraction` and `filter`, or raise "
            "tokenizer.sample_bytes"
        )
    model = io.BytesIO()
    with heartbeat(f"training {config.type}, {config.vocab_size} pieces"):
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], lines),  # no list: the trainer keeps a copy anyway
                model_writer=model,
                model_type=config.type,
                vocab_size=config.vocab_size,
                split_digits=config.split_digits,
                byte_fallback=config.byte_fallback,
                num_threads=1,  # more gain nothing for BPE, and change the sums and so the model for unigram
                minloglevel=2,
                **(LOSSLESS if config.normalization == "identity" else {}),  # else SentencePiece's defaults
            )
        except RuntimeError as error:  # what the texts raise too, as words
            raise (failed[0] if failed else DataError(_explain(str(error), config))) from None
    plain = config.type == "unigram" and config.normalization == "identity"
    return _with_plain_newline(model.getvalue()) if plain else model.getvalue()


def _noting(lines: Iterator[str], failed: list[BaseException]) -> Iterator[str]:
    """The lines; what they raise is put into `failed` on its way."""
    try:
        yield from lines
    except (Exception, KeyboardInterrupt) as error:
        failed.append(error)
        raise


def _with_plain_newline(model: bytes) -> bytes:
    """The newline as a normal piece of the score that SentencePiece gives to user-defined ones: then it does not look
    up every character among the user-defined pieces, which took 15% of the time to encode."""
    from sentencepiece import sentencepiece_model_pb2  # here: it loads protobuf

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    best = max(piece.score for piece in proto.pieces if piece.type == piece.NORMAL)
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED:
            piece.type, piece.score = piece.NORMAL, best - 0.1
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized


def _explain(error: str, config: TokenizerConfig) -> str:
    limit = re.search(r"value <= (\d+)", error)
    if limit:
        size = f"tokenizer.vocab_size {config.vocab_size}"
        return f"{size} is too large for this text; use at most {limit[1]}, or more text"
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", error)
    if needed:
        return f"tokenizer.vocab_size {config.vocab_size} is too small for this text; use more than {needed[1]}"
    return f"SentencePiece refused to train: {error.rsplit('] ', 1)[-1]}"
