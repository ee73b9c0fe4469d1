"""Plain text files as documents: a document is a whole file, or the text between blank lines."""

from collections.abc import Iterator
from typing import Literal

from common.splits import SplitName
from data_prep.raw.records import EXCERPT_BYTES, Document, NoText, Rejected, checked_text, too_long
from data_prep.raw.unpack import Unpacked

TextDocuments = Literal["file", "blank_lines"]
NEAR_BYTES = 1 << 12
"""How far before its place a text may be cut, so that it is cut between two lines or words; but never so far that more
than twice as much is held out."""


def text_documents(
    content: Unpacked, split: SplitName, *, by: TextDocuments, max_bytes: int, held_out: float = 0.0
) -> Iterator[Document | Rejected]:
    """Documents with the line where each begins, from 1. Memory: the longest one allowed. `held_out`: the share of each
    that is another document, of validation: its end."""
    pieces = _whole(content, max_bytes) if by == "file" else _between_blank_lines(content, max_bytes)
    for number, data in pieces:
        if len(data) > max_bytes:
            yield too_long(number, data, max_bytes)
            continue
        try:
            text = checked_text(data, "the file" if by == "file" else "the document")
        except NoText as error:
            yield Rejected(number, error.reason, error.detail, data[:EXCERPT_BYTES], len(data))
            continue
        end = _where_to_cut(text, held_out)
        for place, part, of in ((0, text[:end], split), (end, text[end:], "validation")):
            if part and not part.isspace():
                yield Document(number + text.count(b"\n", 0, place), of, part)


def _where_to_cut(text: bytes, held_out: float) -> int:
    """Where the last `held_out` of a text begins: behind a line end, else a blank, else a character."""
    place = len(text) - round(len(text) * held_out)
    if place == len(text):
        return place
    earliest = max(0, place - min(NEAR_BYTES, len(text) - place))
    for mark in (b"\n", b" "):
        if (found := text.rfind(mark, earliest, place)) >= 0:
            return found + 1
    while place and text[place] & 0xC0 == 0x80:  # inside a character
        place -= 1
    return place


def _whole(content: Unpacked, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    if data := content.read(max_bytes + 1):
        yield 1, data


def _between_blank_lines(content: Unpacked, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(line, text) of each text between blank lines; only its beginning if it is longer than `max_bytes`."""
    waiting: list[bytes] = []
    size = kept = 0  # bytes of `waiting`, and without the line end behind them, which is no part of the document
    number = first = 1
    begins, is_blank = True, True  # a long line comes in pieces: the first alone begins it, and its end may be blank
    for line in content.lines(max_bytes=max_bytes):
        is_blank = line.isspace() and (begins or is_blank)
        if is_blank:
            if waiting:
                yield first, b"".join(waiting).rstrip(b"\r\n")
            waiting, size, kept = [], 0, 0
        else:
            first = first if waiting else number
            if kept <= max_bytes:
                waiting.append(line)
                text = line.rstrip(b"\r\n")
                size, kept = size + len(line), size + len(text) if text else kept
        begins = line.endswith(b"\n")
        number += begins
    if waiting:
        yield first, b"".join(waiting).rstrip(b"\r\n")
