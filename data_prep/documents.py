"""Raw corpora as documents, in the order of the file.

    c4, pes2o   one JSON object a line; its `text` is the document
    jsonl       the same with any other keys
    wikitext    UTF-8 text; a document is an article: a line ` = Title = ` and all up to the next such line
    enwik8      bytes; a document is a page of the XML dump, so that `show` and `stats` have something to name.
                train, validation and test are consecutive parts of the one file

Joining the documents of wikitext or enwik8 gives the file again, byte for byte. A record that cannot be used comes as
a `Rejected`, in its place, with the line or byte where it stands; what concerns a whole file raises.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import orjson

from data_prep.locations import InputFile
from data_prep.shard_format import SPLITS, DataError, SplitName
from data_prep.unpack import Unpacked, unpacked

# The keys that every line of a format carries; more keys are allowed (a dump may be annotated).
FORMAT_KEYS: dict[str, frozenset[str]] = {
    "c4": frozenset({"text", "timestamp", "url"}),
    "pes2o": frozenset({"added", "created", "id", "source", "text", "version"}),
}
FormatName = Literal["auto", "c4", "pes2o", "jsonl", "wikitext", "enwik8"]
SourceSplit = Literal["train", "validation", "test", "hash", "position"]
WIKITEXT_MEMBERS = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}
ENWIK8_SPLIT_BYTES = (90_000_000, 5_000_000, 5_000_000)
# Where the files of a corpus come from, for messages.
ORIGINS = {
    "wikitext": "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
    "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
}
EXCERPT_BYTES = 200
# Reasons for which a record is rejected that say nothing about damage.
HARMLESS_REASONS = frozenset({"empty"})


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a raw file."""

    position: int
    """Its line, from 1 (JSON), or its byte offset in the unpacked file (wikitext, enwik8)."""
    split: SplitName
    """Where it goes, before `validation_fraction` takes its share of train."""
    data: bytes
    """Its text in UTF-8; for enwik8 its bytes."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One record of a raw file that gives no document."""

    position: int
    """As in Document."""
    reason: str
    """One of a few words, for counting."""
    detail: str
    """What exactly is wrong."""
    record: bytes
    """The first bytes of the record."""
    size: int
    """Bytes of the record."""


class _NoDocument(ValueError):
    """(reason, detail) of a line that gives no document."""


class RawFile:
    """One raw file. After `read` is exhausted, `format`, `sha256` and `bytes` describe what was read.

    `split`: where the documents go (`hash`: train, save those that the hash of their text sends to validation).
    enwik8 is cut into consecutive parts of `split_bytes` (train, validation, test) and must hold exactly these.
    """

    def __init__(
        self,
        path: InputFile,
        *,
        format: FormatName = "auto",
        split: SourceSplit = "hash",
        split_bytes: tuple[int, int, int] = ENWIK8_SPLIT_BYTES,
        max_document_bytes: int = 1 << 24,
    ) -> None:
        self.path = path
        self.format: str = format
        self.sha256 = ""
        self.bytes = 0
        self._split: SplitName = "train" if split == "hash" or split == "position" else split
        self._split_bytes = split_bytes
        self._max_bytes = max_document_bytes

    def read(self, *, on_bytes: Callable[[int], object] | None = None) -> Iterator[Document | Rejected]:
        """Every record in order; memory is that of the longest one allowed. `on_bytes` is told how many stored bytes
        were consumed. Raises DamagedFileError, at any point, for a file whose content cannot be trusted, and DataError
        if it is missing or not of its format."""
        member = {"wikitext": WIKITEXT_MEMBERS[self._split], "enwik8": "enwik8"}.get(self.format)
        reported = 0
        with unpacked(self.path, member=member) as content:
            for record in self._records(content):
                yield record
                if on_bytes is not None and content.stored_bytes > reported:
                    on_bytes(content.stored_bytes - reported)
                    reported = content.stored_bytes
            self.sha256, self.bytes = content.finish()
        if on_bytes is not None:
            on_bytes(max(0, self.bytes - reported))

    def _records(self, content: Unpacked) -> Iterator[Document | Rejected]:
        if self.format == "enwik8":
            return self._pages(content)
        return self._articles(content) if self.format == "wikitext" else self._lines(content)

    def _lines(self, content: Unpacked) -> Iterator[Document | Rejected]:
        """JSON lines; blank ones are passed over, but counted, so that numbers stay right."""
        number, begun = 1, 0  # bytes of the current line that came in earlier pieces
        for line in content.lines(max_bytes=self._max_bytes):
            ends = line.endswith(b"\n")
            if begun or len(line) > self._max_bytes:
                if not begun:
                    yield self._too_long(number, line)
                begun = 0 if ends else begun + len(line)
            elif not line.isspace():
                try:
                    yield Document(number, self._split, self._text_of(line))
                except _NoDocument as error:
                    reason, detail = error.args
                    yield Rejected(number, reason, detail, line.rstrip()[:EXCERPT_BYTES], len(line))
            number += ends

    def _too_long(self, position: int, record: bytes) -> Rejected:
        detail = f"more than ingest.max_document_bytes {self._max_bytes}"
        return Rejected(position, "too long", detail, record[:EXCERPT_BYTES], len(record))

    def _text_of(self, line: bytes) -> bytes:
        """The text of a JSON line in UTF-8. Raises _NoDocument."""
        try:
            record = _parsed(line)
        except UnicodeDecodeError as error:
            raise _NoDocument("not UTF-8", f"byte {error.start} of the line: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise _NoDocument("not JSON", str(error)) from None
        if not isinstance(record, dict):
            raise _NoDocument("not JSON", f"expected an object, found {type(record).__name__}")
        text = record.get("text")
        if not isinstance(text, str):
            raise _NoDocument("no text", "the key `text` is missing or not a string")
        if self.format == "auto":
            self.format = detect_format(record)
        if not text or text.isspace():
            raise _NoDocument("empty", "the text is empty or blank")
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError:
            message = "the text holds half of a UTF-16 surrogate pair, which is no character"
            raise _NoDocument("not UTF-8", message) from None

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
                    yield self._too_long(offset, article)
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


def _parsed(line: bytes) -> object:
    """A JSON value. Raises ValueError, UnicodeDecodeError if it is not UTF-8, or RecursionError."""
    try:
        return orjson.loads(line)  # twice as fast; refuses more: NaN, 1e999, half of a surrogate pair
    except ValueError:
        # json.loads would take bytes too, but lets surrogates in UTF-8 pass and guesses UTF-16.
        return json.loads(line.decode("utf-8"))


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


def stable_fraction(digest: bytes) -> float:
    """The same number for one sha256."""
    return int.from_bytes(digest[:8], "big") / 2**64
