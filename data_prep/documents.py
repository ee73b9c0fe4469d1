"""Raw corpora as bounded chunks of documents, in the order of the file.

    c4, pes2o   one JSON object a line; its `text` is the document
    wikitext    UTF-8 text; a document is an article: a line ` = Title = ` and all up to the next such line
    enwik8      bytes; a document is a page of the XML dump, so that `show` and `stats` have something to name.
                train, validation and test are consecutive parts of the one file

The parent process decompresses, hashes and cuts files into chunks; whoever gets a chunk parses it. Joining
the documents of wikitext or enwik8 gives the file again, byte for byte. What is malformed is an error that
names the file and the line or byte.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.shard_format import SPLITS, DataError, SplitName
from data_prep.unpack import Unpacked, unpacked

# The keys that every line of a format carries; more keys are allowed (a dump may be annotated).
FORMAT_KEYS: dict[str, frozenset[str]] = {
    "c4": frozenset({"text", "timestamp", "url"}),
    "pes2o": frozenset({"added", "created", "id", "source", "text", "version"}),
}
FormatName = Literal["auto", "c4", "pes2o", "wikitext", "enwik8"]
SourceSplit = Literal["train", "validation", "test", "hash", "position"]
WIKITEXT_MEMBERS = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}
ENWIK8_SPLIT_BYTES = (90_000_000, 5_000_000, 5_000_000)
# Where the files of a corpus come from, for messages.
ORIGINS = {
    "wikitext": "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
    "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
}
# About 0.3 s of BPE encoding: small enough to spread over workers, large enough that handing it over costs
# nothing.
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of one file."""

    source: int
    """Which input file, by position in the list of inputs."""
    path: str
    """The file as the user named it, for messages."""
    format: str
    """Format of the file."""
    split: SplitName
    """Split of the documents, before `validation_fraction` takes its share of train."""
    first_record: int
    """Number of `records[0]`, counted from 1: for JSON its line."""
    first_byte: int
    """Offset of `records[0]` in the unpacked file."""
    records: tuple[bytes, ...]
    """Raw lines of JSON, blank ones included, so that numbers stay right; or the bytes of whole documents."""
    stored_bytes: int
    """How far the file was consumed by this chunk, in stored (compressed) bytes."""


class RawFile:
    """One raw file. After `chunks` is exhausted, `format`, `sha256` and `bytes` describe what was read.

    `split`: where the documents go (`hash`: train, save those that `goes_to_validation` takes). enwik8 is cut
    into consecutive parts of `split_bytes` (train, validation, test) and must hold exactly these.
    """

    def __init__(
        self,
        path: Path,
        *,
        source: int = 0,
        format: FormatName = "auto",
        split: SourceSplit = "hash",
        split_bytes: tuple[int, int, int] = ENWIK8_SPLIT_BYTES,
    ) -> None:
        self.path = path
        self.source = source
        self.format: str = format
        self.sha256 = ""
        self.bytes = 0
        self._split: SplitName = "train" if split == "hash" or split == "position" else split
        self._split_bytes = split_bytes
        self._consumed = 0  # stored bytes that the chunks so far account for

    def chunks(self, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """The records of the file in order, about `chunk_bytes` of text at a time (a longer document is a chunk
        of its own). Raises DataError if the file is missing, damaged or not of its format."""
        self._consumed = 0
        member = {"wikitext": WIKITEXT_MEMBERS[self._split], "enwik8": "enwik8"}.get(self.format)
        with unpacked(self.path, member=member) as content:
            if self.format == "enwik8":
                yield from self._enwik8(content, chunk_bytes)
            elif self.format == "wikitext":
                no_article = (
                    f"{content.name} has no line ` = Title = ` that opens an article; fetch it again from "
                    f"{ORIGINS['wikitext']}"
                )
                articles = documents(content.lines(), starts=is_article_heading, if_none=no_article)
                yield from self._cut(articles, content, self._split, chunk_bytes)
            else:
                yield from self._cut(content.lines(), content, self._split, chunk_bytes)
            self.sha256, self.bytes = content.finish()

    def _enwik8(self, content: Unpacked, chunk_bytes: int) -> Iterator[Chunk]:
        for split, size in zip(SPLITS, self._split_bytes, strict=True):
            pages = documents(content.lines(limit_bytes=size), starts=is_page_start)
            yield from self._cut(pages, content, split, chunk_bytes)
        wanted, found = sum(self._split_bytes), content.position
        if found < wanted or content.read(1):
            holds = f"{found:,}" if found < wanted else f"more than {wanted:,}"
            parts = " + ".join(f"{size:,}" for size in self._split_bytes)
            raise DataError(
                f"{self.path} holds {holds} bytes, not {wanted:,} ({parts}); fetch it again from "
                f"{ORIGINS['enwik8']}, or set split_bytes to the sizes [train, validation, test] of this file"
            )

    def _cut(self, records: Iterator[bytes], content: Unpacked, split: SplitName, chunk_bytes: int) -> Iterator[Chunk]:
        waiting: list[bytes] = []
        size, first_record, first_byte = 0, 1, content.position

        def chunk() -> Chunk:
            stored_bytes, self._consumed = content.stored_bytes - self._consumed, content.stored_bytes
            return Chunk(
                source=self.source,
                path=content.name,
                format=self.format,
                split=split,
                first_record=first_record,
                first_byte=first_byte,
                records=tuple(waiting),
                stored_bytes=stored_bytes,
            )

        for record in records:
            if self.format == "auto" and record.strip():
                self.format = detect_format(record, where=f"{self.path}:{first_record + len(waiting)}")
            waiting.append(record)
            size += len(record)
            if size >= chunk_bytes:
                yield chunk()
                first_record, first_byte = first_record + len(waiting), first_byte + size
                waiting, size = [], 0
        if waiting or content.stored_bytes > self._consumed:
            yield chunk()


def documents(lines: Iterator[bytes], *, starts: Callable[[bytes], bool], if_none: str = "") -> Iterator[bytes]:
    """Groups lines into documents, each opened by a line that `starts`; what comes before the first such line
    belongs to the first document. Without any such line all is one document, or DataError(`if_none`)."""
    waiting: list[bytes] = []
    started = False
    for line in lines:
        if starts(line):
            if started:
                yield b"".join(waiting)
                waiting = []
            started = True
        waiting.append(line)
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


def _parse_object(line: bytes, *, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}); repair or remove the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}; repair or remove the line")
    return record


def detect_format(line: bytes, *, where: str) -> str:
    """The format whose keys a line carries; DataError with the keys found if there is none."""
    record = _parse_object(line, where=where)
    for name, keys in FORMAT_KEYS.items():
        if keys <= record.keys():
            return name
    known = "; ".join(f"{name} has {', '.join(sorted(keys))}" for name, keys in FORMAT_KEYS.items())
    found = ", ".join(sorted(record)) or "none"
    raise DataError(f"{where}: unknown format, its keys are {found} ({known}); set `format` to read only their text")


def parse_texts(chunk: Chunk) -> Iterator[str]:
    """The text of every document of a chunk, in order; blank lines of JSON are passed over. DataError names
    file and line (JSON) or byte (wikitext)."""
    if chunk.format == "wikitext":
        yield from _decode_records(chunk)
        return
    for number, line in enumerate(chunk.records, start=chunk.first_record):
        if line.isspace() or not line:
            continue
        where = f"{chunk.path}:{number}"
        text = _parse_object(line, where=where).get("text")
        if not isinstance(text, str):
            raise DataError(f"{where}: the key `text` is missing or not a string; repair or remove the line")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                message = "the text holds half of a UTF-16 surrogate pair, which is no character"
                raise DataError(f"{where}: {message}; repair or remove the line") from None
        yield text


def parse_bytes(chunk: Chunk) -> Iterator[bytes]:
    """The bytes of every document of a chunk, in order: as stored for enwik8, UTF-8 for text. Raises as
    `parse_texts`."""
    if chunk.format == "enwik8":
        yield from chunk.records
    else:
        yield from (text.encode("utf-8") for text in parse_texts(chunk))


def _decode_records(chunk: Chunk) -> Iterator[str]:
    offset = chunk.first_byte
    for record in chunk.records:
        try:
            yield record.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{chunk.path}: byte {offset + error.start:,}"
            raise DataError(f"{where} is not UTF-8 ({error.reason}); fetch the file again, or repair it") from None
        offset += len(record)


def stable_fraction(data: bytes) -> float:
    """A number in [0, 1) that depends on the bytes alone: the first 64 bits of their sha256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def goes_to_validation(text: str, *, validation_fraction: float) -> bool:
    """Whether a document belongs to validation: the same text always goes the same way, in any file and any
    run."""
    return validation_fraction > 0 and stable_fraction(text.encode("utf-8")) < validation_fraction
