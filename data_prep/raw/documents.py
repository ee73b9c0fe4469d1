"""Raw corpora as documents, in the order of the file.

    c4, pes2o   one JSON object a line; its `text` is the document
    jsonl       the same with any other keys
    parquet     the strings of a column
    webdataset  tar archives; a document is a member .txt, or the text of a member .json
    text        UTF-8 text; a document is the file, or what stands between blank lines
    wikitext    UTF-8 text; a document is an article: a line ` = Title = ` and all up to the next such line
    enwik8      bytes; a document is a page of the XML dump, so that `show` and `stats` have something to name.
                train, validation and test are consecutive parts of the one file
    megatron, token_array  token ids; see data_prep/raw/token_ids.py

Joining the documents of wikitext or enwik8 gives the file again, byte for byte (but for a byte order mark before
wikitext). A record that cannot be used becomes a `Rejected` in its place, with its line or byte. A fault of the whole
file raises an error, and so does a file that gives no document at all.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import TO_UTF8, DataError
from common.splits import SPLITS, SourceSplit, SplitName
from data_prep.raw.file_kinds import (
    BYTE_ORDER_MARK,
    HEAD_BYTES,
    foreign,
    is_parquet,
    is_tar,
    json_lines,
    no_json_lines,
)
from data_prep.raw.json_text import json_record, text_in
from data_prep.raw.locations import InputFile
from data_prep.raw.megatron_index import INDEX, MegatronIndex
from data_prep.raw.parquet_rows import parquet_documents
from data_prep.raw.plain_text import TextDocuments, text_documents
from data_prep.raw.records import EXCERPT_BYTES, Document, NoText, Rejected, too_long
from data_prep.raw.tar_samples import tar_documents
from data_prep.raw.token_ids import IdReading, id_documents
from data_prep.raw.unpack import DAMAGE, DamagedFileError, NoDocumentError, Unpacked, unpacked

# The keys that every line of a format carries; more keys are allowed (a dump may be annotated).
FORMAT_KEYS: dict[str, frozenset[str]] = {
    "c4": frozenset({"text", "timestamp", "url"}),
    "pes2o": frozenset({"added", "created", "id", "source", "text", "version"}),
}
FormatName = Literal[
    "auto", "c4", "pes2o", "jsonl", "parquet", "webdataset", "text", "wikitext", "enwik8", "megatron", "token_array"
]
ID_FORMATS = ("megatron", "token_array")
"""Formats of token ids: their documents are ids, as bytes, and no text."""
_NAMES = {"parquet": "Parquet file", "webdataset": "tar archive"}
# What `position` counts.
UNITS = ("line", "byte", "row", "sample", "token")
# Files of a split in the archives of Wikitext: as written, and with rare words as <unk>.
WIKITEXT_MEMBERS = {
    split: (f"wiki.{name}.raw", f"wiki.{name}.tokens")
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))
}
ENWIK8_SPLIT_BYTES = (90_000_000, 5_000_000, 5_000_000)
# Where the files of a corpus come from, for messages.
ORIGINS = {
    "wikitext": "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
    "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
}
# Reasons to reject a record that are no sign of damage.
HARMLESS_REASONS = frozenset({"empty"})


class RawFile:
    """One raw file. After `read` has ended, even with DamagedFileError, `format`, `sha256` and `bytes` describe what
    was read.

    `split`: where the documents go (`hash`: train, save those that the hash of their text sends to validation).
    enwik8 is cut into consecutive parts of `split_bytes` (train, validation, test) and must hold exactly these.
    `text_key`: where the text of a JSON record is, dotted. `text_documents`: what a document of format text is;
    `held_out`: the share of each, its end, that is one of validation. `ids`: what is known about the ids of ID_FORMATS,
    which need it.
    """

    def __init__(  # noqa: PLR0913 (settings of a file, each with its default)
        self,
        path: InputFile,
        *,
        format: FormatName = "auto",
        split: SourceSplit = "hash",
        split_bytes: tuple[int, int, int] = ENWIK8_SPLIT_BYTES,
        max_document_bytes: int = 1 << 24,
        text_key: str = "text",
        text_documents: TextDocuments = "file",
        held_out: float = 0.0,
        ids: IdReading | None = None,
    ) -> None:
        self.path = path
        self.format: str = format
        self.sha256 = ""
        self.bytes = 0
        self._split: SplitName = "train" if split == "hash" or split == "position" else split
        self._split_bytes = split_bytes
        self._max_bytes = max_document_bytes
        self._text_key = text_key
        self._text_documents, self._held_out = text_documents, held_out
        self._ids = ids
        self._documents = 0
        self._first_rejected: Rejected | None = None
        self._all_harmless = True

    def read(self) -> Iterator[Document | Rejected]:
        """Every record in order; memory is that of the longest one allowed. Raises DamagedFileError, at any point, for
        a file whose content cannot be trusted, at the end for one without a document, and DataError if it is missing or
        not of its format."""
        member = {"wikitext": WIKITEXT_MEMBERS[self._split], "enwik8": ("enwik8",)}.get(self.format)
        with unpacked(self.path, member=member, binary=self.format in ID_FORMATS) as content:
            try:
                head = content.peek(HEAD_BYTES)
                if is_parquet(head) and not content.is_packed and self.format in ("auto", "parquet"):
                    content.finish()  # hashed first: no web server waits while the rows are read by another connection
                    records = self._rows()
                else:
                    records = self._records(content, head)
                yield from self._noted(records)
            except (DamagedFileError, *DAMAGE):
                self.sha256, self.bytes = content.finish()
                raise
            self.sha256, self.bytes = content.finish()
        self._check_documents(head)

    def _rows(self) -> Iterator[Document | Rejected]:
        self.format = "parquet"
        return parquet_documents(self.path, self._split, text_key=self._text_key, max_bytes=self._max_bytes)

    @property
    def unit(self) -> str:
        """What the positions of its records count: one of UNITS."""
        units = {"wikitext": "byte", "enwik8": "byte", "parquet": "row", "webdataset": "sample"}
        return "token" if self.format in ID_FORMATS else units.get(self.format, "line")

    def _records(self, content: Unpacked, head: bytes) -> Iterator[Document | Rejected]:
        if self._ids is not None:
            return self._id_documents(content, self._ids)
        if self.format == "enwik8":
            return self._pages(content)
        if is_tar(head) and self.format in ("auto", "webdataset"):
            self.format = "webdataset"
            return tar_documents(content, self._split, text_key=self._text_key, max_bytes=self._max_bytes)
        if (kind := foreign(head, plain_text=self.format in ("text", "wikitext"))) is not None:
            raise NoDocumentError(f"{self.path} is {kind}")
        if self.format in ("parquet", "webdataset"):
            raise NoDocumentError(f'{self.path} is no {_NAMES[self.format]}; set format to "auto" or to what it is')
        if self.format not in ("wikitext", "text"):
            return self._lines(content)
        if head.startswith(BYTE_ORDER_MARK):
            content.read(len(BYTE_ORDER_MARK))
        if self.format == "wikitext":
            return self._articles(content)
        if (kind := json_lines(head)) is not None:
            raise NoDocumentError(f"{self.path} {kind}")
        return text_documents(
            content, self._split, by=self._text_documents, max_bytes=self._max_bytes, held_out=self._held_out
        )

    def _id_documents(self, content: Unpacked, ids: IdReading) -> Iterator[Document | Rejected]:
        """An index of Megatron-LM gives nothing: it is read with its .bin file, and here for its hash alone."""
        if self.format != "megatron":
            return id_documents(content, self._split, ids, None)
        assert isinstance(self.path, Path), "data sets of Megatron-LM are local"
        return iter(()) if self._is_index else id_documents(content, self._split, ids, MegatronIndex(self.path))

    @property
    def _is_index(self) -> bool:
        return self.format == "megatron" and self.path.suffix == INDEX

    def _noted(self, records: Iterator[Document | Rejected]) -> Iterator[Document | Rejected]:
        """Passes the records on and notes what they are, to describe a file that gives no document."""
        for record in records:
            if isinstance(record, Document):
                self._documents += 1
            else:
                self._first_rejected = self._first_rejected or record
                self._all_harmless = self._all_harmless and record.reason in HARMLESS_REASONS
            yield record

    def _check_documents(self, head: bytes) -> None:
        """Raises NoDocumentError, with what the file looks like, unless it gave a document or all that it holds are
        records whose text is empty."""
        first = self._first_rejected
        if self._documents or (first is not None and self._all_harmless) or self.format == "enwik8" or self._is_index:
            return
        if self.format in ID_FORMATS:
            words = "holds no document" if first is None else f"gives no document: {first.reason} ({first.detail})"
        elif self.format == "text":
            words = "holds no text" if first is None else f"gives no document: {first.reason} ({first.detail})"
            if first is not None and first.reason == "not UTF-8":
                words += f"; {TO_UTF8}"
        elif self.format in _NAMES:
            words = "holds no record" if first is None else f"gives no document: {first.detail}"
        elif first is not None and first.reason == "no text":
            words = f"gives no document: {first.detail}; set `text_key` to the one that holds the text"
        else:
            words = no_json_lines(head) if first is None or first.reason != "too long" else ""
            if not words and first is not None:
                words = f"gives no document: its first record is rejected, {first.reason} ({first.detail})"
        raise NoDocumentError(f"{self.path} {words}")

    def _lines(self, content: Unpacked) -> Iterator[Document | Rejected]:
        """JSON lines; blank lines are skipped but counted, so that line numbers stay right."""
        number, begun = 1, 0  # bytes of the current line that came in earlier pieces
        for line in content.lines(max_bytes=self._max_bytes):
            ends = line.endswith(b"\n")
            if begun or len(line) > self._max_bytes:
                if not begun:
                    yield too_long(number, line, self._max_bytes)
                begun = 0 if ends else begun + len(line)
            elif not line.isspace():
                try:
                    yield Document(number, self._split, self._text_of(line))
                except NoText as error:
                    yield Rejected(number, error.reason, error.detail, line.rstrip()[:EXCERPT_BYTES], len(line))
            number += ends

    def _text_of(self, line: bytes) -> bytes:
        """The text of a JSON line in UTF-8. Raises NoText."""
        record = json_record(line)
        text = text_in(record, self._text_key)
        if self.format == "auto":
            self.format = detect_format(record)
        return text

    def _articles(self, content: Unpacked) -> Iterator[Document | Rejected]:
        no_article = (
            f"{content.name} has no line ` = Title = ` that opens an article; fetch it again from {ORIGINS['wikitext']}"
        )
        lines = content.lines(max_bytes=self._max_bytes)
        offset = 0
        # Twice the limit: an article is cut there, so that a giant one costs no more memory, and both parts go.
        giant = False
        for article in documents(lines, starts=is_article_heading, if_none=no_article, max_bytes=2 * self._max_bytes):
            giant = giant and not is_article_heading(article[: article.find(b"\n") + 1])
            if giant or len(article) > self._max_bytes:
                if not giant:
                    yield too_long(offset, article, self._max_bytes)
                giant = True
            else:
                yield self._article(offset, article)
            offset += len(article)

    def _article(self, offset: int, article: bytes) -> Document | Rejected:
        try:
            article.decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f"byte {offset + error.start:,} is not UTF-8 ({error.reason})"
            return Rejected(offset, "not UTF-8", detail, article[:EXCERPT_BYTES], len(article))
        return Document(offset, self._split, article)

    def _pages(self, content: Unpacked) -> Iterator[Document]:
        for split, size in zip(SPLITS, self._split_bytes, strict=True):
            offset = content.position
            lines = content.lines(max_bytes=self._max_bytes, limit_bytes=size)
            for page in documents(lines, starts=is_page_start, max_bytes=self._max_bytes):
                yield Document(offset, split, page)
                offset += len(page)
        wanted, found = sum(self._split_bytes), content.position
        if found < wanted or content.read(1):
            holds = f"{found:,}" if found < wanted else f"more than {wanted:,}"
            parts = " + ".join(f"{size:,}" for size in self._split_bytes)
            raise DataError(
                f"{self.path} holds {holds} bytes, not {wanted:,} ({parts}); fetch it again from "
                f"{ORIGINS['enwik8']}, or set split_bytes to the sizes [train, validation, test] of this file"
            )


def detect_format(record: dict[str, object]) -> str:
    """The format whose keys a JSON object with a text carries; jsonl if it is none of the others."""
    return next((name for name, keys in FORMAT_KEYS.items() if keys <= record.keys()), "jsonl")


def documents(
    lines: Iterator[bytes], *, starts: Callable[[bytes], bool], if_none: str = "", max_bytes: int = 1 << 62
) -> Iterator[bytes]:
    """Groups lines into documents, each opened by a line that `starts`; what comes before the first such line
    belongs to the first document. Without any such line all is one document, or DataError(`if_none`). A document
    that has reached `max_bytes` ends at that line."""
    waiting: list[bytes] = []
    started, size = False, 0
    for line in lines:
        begins = starts(line)
        if (begins and started) or size >= max_bytes:
            yield b"".join(waiting)
            waiting, size = [], 0
        started = started or begins
        waiting.append(line)
        size += len(line)
    if if_none and not started:
        raise DataError(if_none)
    if waiting:
        yield b"".join(waiting)


def is_article_heading(line: bytes) -> bool:
    """Whether a line of Wikitext is ` = Title = `, and not ` = = Section = = `; any line end or none. A line of text
    that begins and ends with = passes too: then an article is cut in two, and no text is lost."""
    text = line.rstrip()
    return (
        len(text) > len(b" =  =")
        and text.startswith(b" = ")
        and text.endswith(b" =")
        and not text.startswith(b" = =")
        and not text.endswith(b"= =")
    )


def is_page_start(line: bytes) -> bool:
    """Whether a line of Enwik8 opens a page."""
    return line.strip() == b"<page>"


def stable_fractions(hashes: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1) from the first 64 bits of the sha256 of texts, uint64 [n]: below `validation_fraction`, a
    document goes to validation. The same text always goes the same way, in any file and any run."""
    fractions: np.ndarray = hashes.astype(np.float64) / 2.0**64
    return fractions
