"""webdataset tars as documents: every .txt member is a document, and so is every .json member with a text whose sample
has no .txt.

webdataset groups the members into samples (group_by_keys). Its iterator over the members of a tar (tar_file_iterator)
is not used, for three reasons that a test holds: it takes a tar that was cut between two members for a whole one, it
reads a member of any size into memory, and what it is told to skip is missing from the sample, so that nothing can be
said of a sample without text. Nothing is decoded but text and JSON: any other member, a pickle least of all, is passed
over unread, and named if its sample has no text. Nothing is unpacked to disk, so a link leads nowhere: one that stands
for a text is a document that is missing, and said to be.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import DataError
from common.splits import SplitName
from data_prep.raw.file_kinds import BYTE_ORDER_MARK
from data_prep.raw.json_text import json_record, named, text_in
from data_prep.raw.records import EXCERPT_BYTES, Document, NoText, Rejected, checked_text, too_long
from data_prep.raw.unpack import BLOCK_BYTES, DamagedFileError, Unpacked

TEXT_ENDINGS, JSON_ENDING = ("txt", "text"), "json"
_META = re.compile(r"__[^/]*__($|/)")  # what describes the archive, by webdataset's rule
_RECENT_BYTES = 1 << 16  # more than tarfile reads ahead of itself


@dataclass(frozen=True)
class _Link:
    """What a member has in place of a content."""

    target: str


class _Tail:
    """The content for tarfile; keeps its last bytes."""

    def __init__(self, content: Unpacked) -> None:
        self._content = content
        self.position = 0
        self._recent = b""

    def read(self, size: int) -> bytes:
        data = self._content.read(size)
        self.position += len(data)
        self._recent = (self._recent + data)[-_RECENT_BYTES:]
        return data

    def from_position(self, position: int) -> bytes:
        """The bytes read since a position, which is not far back."""
        return self._recent[len(self._recent) - (self.position - position) :] if position < self.position else b""


def tar_documents(
    content: Unpacked, split: SplitName, *, text_key: str, max_bytes: int
) -> Iterator[Document | Rejected]:
    """Documents with the number of their sample, from 1. Memory: the text and JSON members of one sample, each of
    `max_bytes` at most. Raises DamagedFileError for an archive that is truncated or goes on after its end."""
    from webdataset.tariterators import group_by_keys  # here: 3 s, as it imports torch

    try:
        for number, sample in enumerate(group_by_keys(_members(content, max_bytes)), 1):
            yield from _sample_documents(number, sample, split, text_key, max_bytes)
    except DataError:  # a ValueError too
        raise
    except ValueError as error:  # two members of one name
        raise DamagedFileError(f"{content.name} is damaged ({error.args[0]}); make it again") from None


def _members(content: Unpacked, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Name and content of every file of the archive, as group_by_keys takes them; None for what is not decoded, and
    the beginning of what is too long."""
    stream = _Tail(content)
    with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]  # its stub wants more of it
        for member in archive:
            archive.members = []  # else it remembers every one
            name = member.name
            is_link = member.issym() or member.islnk()  # tar makes them of files with two names
            if not (member.isreg() or is_link) or name.rpartition("/")[2].startswith(".") or _META.match(name):
                continue
            if "." not in name.rpartition("/")[2]:
                name += ".(no ending)"
            data: bytes | _Link | None = None
            if is_link:
                data = _Link(member.linkname)
            elif name.lower().rpartition(".")[2] in (*TEXT_ENDINGS, JSON_ENDING):
                opened = archive.extractfile(member)
                assert opened is not None, "a regular member"
                data = opened.read(min(member.size, max_bytes + 1))  # which is allocated before it is read
            yield {"fname": name, "data": data, "__url__": ""}
        end = stream.from_position(archive.offset)
    size, zeros = len(end), not end.strip(b"\0")
    while block := stream.read(BLOCK_BYTES):
        size, zeros = size + len(block), zeros and not block.strip(b"\0")
    if size < tarfile.BLOCKSIZE:
        raise DamagedFileError(f"{content.name} is damaged (a tar archive without its end); fetch it again")
    if not zeros:
        # As `cat a.tar b.tar` makes them; tarfile also ends at a member whose header is damaged.
        raise DamagedFileError(f"{content.name} is damaged, or several tar archives in one; give each of them alone")


def _sample_documents(
    number: int, sample: dict[str, Any], split: SplitName, text_key: str, max_bytes: int
) -> Iterator[Document | Rejected]:
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    texts = [name for name in members if name.rpartition(".")[2] in TEXT_ENDINGS]
    chosen = texts or [name for name in members if name.rpartition(".")[2] == JSON_ENDING]
    if not chosen:
        detail = f"sample {sample['__key__']} has {named(sorted(members))}; only .txt and .json members are read"
        yield Rejected(number, "no text", detail, b"", 0)
    for name in chosen:
        data: bytes | _Link = members[name]
        if isinstance(data, _Link):
            detail = f"{sample['__key__']}.{name} is a link to {data.target}; make the archive with `tar --dereference "
            yield Rejected(number, "a link", detail + "--hard-dereference`", b"", 0)
            continue
        if len(data) > max_bytes:
            yield too_long(number, data, max_bytes)
            continue
        try:
            if texts:
                text = checked_text(data.removeprefix(BYTE_ORDER_MARK), "the member")
            else:
                text = text_in(json_record(data), text_key)
            yield Document(number, split, text)
        except NoText as error:
            detail = f"{sample['__key__']}.{name}: {error.detail}"
            yield Rejected(number, error.reason, detail, data[:EXCERPT_BYTES], len(data))
