"""What reading a raw file gives: documents and, in their places, records that give no document."""

from dataclasses import dataclass

from common.splits import SplitName

EXCERPT_BYTES = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a raw file."""

    position: int
    """Its position in the `unit` of its format: its line, row or sample, from 1, or its byte in the unpacked file."""
    split: SplitName
    """Where it goes, before `validation_fraction` takes its share of train."""
    data: bytes
    """Its text in UTF-8; for enwik8 its bytes; for formats of token ids these, in the dtype of shards."""


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


class NoText(ValueError):
    """A record that gives no document; reason and detail as in Rejected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def too_long(position: int, record: bytes, max_bytes: int) -> Rejected:
    """A record that is longer than allowed; `record` is its beginning, or all of it."""
    detail = f"more than ingest.max_document_bytes {max_bytes}"
    return Rejected(position, "too long", detail, record[:EXCERPT_BYTES], len(record))


def checked_text(data: bytes, what: str) -> bytes:
    """The bytes, if they are UTF-8 and not blank. `what`: their name in the message. Raises NoText."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoText("not UTF-8", f"byte {error.start:,} of {what}: {error.reason}") from None
    if not text or text.isspace():
        raise NoText("empty", "the text is empty or blank")
    return data
