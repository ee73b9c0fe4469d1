"""Messages about files that give no document: what such a file looks like, and what to do about it. Its first bytes
alone decide: nothing here opens, unpacks or decodes a file.
"""

import re

from common.errors import TO_UTF8

HEAD_BYTES = 4096
"""First bytes of a file's content that the functions below want."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257

# A text may begin with these letters too, so they count only if no text follows.
_LETTERS = (b"BZh", b"LZIP", b"ORC", b"FEA1", b"Rar!", PARQUET_MAGIC, b"ARROW1")
# Formats that may be text throughout: if `format` says that a file is text, that is believed.
_TEXT_FORMATS = (b"%PDF-", b"{\\rtf", b"WARC/")
_UNPACK = "unpack it, or read it as `pipe:{} FILE`"
_AS_JSON = "write its rows as JSON lines or as Parquet"
# (offset, bytes there, what the file is, what to do)
_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs.", "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
    (0, b"/annex/objects/", "a git-annex pointer, not the file itself", "fetch the file with `git annex get`"),
    (0, b"\x1f\x8b", "packed with gzip twice", "unpack it once"),
    (0, b"\x28\xb5\x2f\xfd", "packed with zstd twice", "unpack it once"),
    (0, b"PK\x03\x04", "a zip archive inside another packing", "unpack it"),
    (0, b"BZh", "packed with bzip2, which is not read", _UNPACK.format("bzip2 -dc")),
    (0, b"\xfd7zXZ", "packed with xz, which is not read", _UNPACK.format("xz -dc")),
    (0, b"\x04\x22\x4d\x18", "packed with lz4, which is not read", _UNPACK.format("lz4 -dc")),
    (0, b"\x02\x21\x4c\x18", "packed with lz4, which is not read", _UNPACK.format("lz4 -dc")),
    (0, b"\xff\x06\x00\x00sNaPpY", "packed with snappy, which is not read", "unpack it"),
    (0, b"LZIP", "packed with lzip, which is not read", _UNPACK.format("lzip -dc")),
    (0, b"\x1f\x9d", "packed with compress, which is not read", _UNPACK.format("gzip -dc")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive, which is not read", "unpack it"),
    (0, b"Rar!", "a RAR archive, which is not read", "unpack it"),
    (0, PARQUET_MAGIC, "a Parquet file, which format auto and parquet read", "unpack it if it is packed"),
    (0, b"ARROW1", "an Arrow or Feather file, which is not read", _AS_JSON),
    (0, b"FEA1", "a Feather file, which is not read", _AS_JSON),
    (0, b"\xff\xff\xff\xff", "an Arrow stream, which is not read", _AS_JSON),
    (0, b"ORC", "an ORC file, which is not read", _AS_JSON),
    (0, b"Obj\x01", "an Avro file, which is not read", _AS_JSON),
    (0, b"SQLite format 3\0", "an SQLite database, which is not read", _AS_JSON),
    (0, b"\x89HDF", "an HDF5 file, which is not read", _AS_JSON),
    (0, b"\x93NUMPY", "a NumPy array, which is not read", _AS_JSON),
    (0, b"%PDF-", "a PDF, which is not read", "extract its text first"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document, which is not read", "extract its text first"),
    (0, b"{\\rtf", "an RTF document, which is not read", "extract its text first"),
    (0, b"WARC/", "a WARC crawl archive, which is not read", "extract the text of its pages first"),
    (0, b"\x89PNG", "a PNG image", "leave it out of the input"),
    (0, b"\xff\xd8\xff", "a JPEG image", "leave it out of the input"),
    (0, b"\x7fELF", "a program", "leave it out of the input"),
    (0, b"\xff\xfe\x00\x00", "UTF-32 text, which is not read", "convert it: iconv -f UTF-32 -t UTF-8"),
    (0, b"\x00\x00\xfe\xff", "UTF-32 text, which is not read", "convert it: iconv -f UTF-32 -t UTF-8"),
    (0, b"\xff\xfe", "UTF-16 text, which is not read", "convert it: iconv -f UTF-16 -t UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text, which is not read", "convert it: iconv -f UTF-16 -t UTF-8"),
    (_TAR_OFFSET, _TAR_MAGIC, "a tar archive", 'set format to "webdataset" to read its .txt and .json members'),
)


def is_tar(head: bytes) -> bool:
    """Whether content begins as a tar archive does."""
    return head[_TAR_OFFSET:].startswith(_TAR_MAGIC)


def is_parquet(head: bytes) -> bool:
    """Whether content begins as a Parquet file does: a page header or a footer, which hold zero bytes, follow."""
    return head.startswith(PARQUET_MAGIC) and not _is_text(head)


def foreign(head: bytes, *, plain_text: bool = False) -> str | None:
    """For content that does not begin like text, e.g. "a PDF, which is not read; extract its text first"; else None.
    `plain_text`: the user says that it is text."""
    words = (*_LETTERS, *_TEXT_FORMATS) if plain_text else _LETTERS
    for offset, magic, what, fix in _KINDS:
        if head.startswith(magic, offset) and not (magic in words and _is_text(head)):
            return f"{what}; {fix}"
    if head and not head.strip(b"\0"):
        return "filled with zero bytes at its beginning, as an unfinished copy leaves it; fetch it again"
    for encoding, zeros in (("UTF-16LE", head[1:64:2]), ("UTF-16BE", head[0:64:2])):
        if len(zeros) > 3 and not zeros.strip(b"\0"):
            return f"UTF-16 text without a byte order mark, which is not read; convert it: iconv -f {encoding} -t UTF-8"
    return None


def json_lines(head: bytes) -> str | None:
    """For content that its user calls plain text and that begins as JSON lines with a `text` do: what it is and what to
    do; else None. One object alone may be a text."""
    first, *rest = head.removeprefix(BYTE_ORDER_MARK).lstrip().split(b"\n", 1)
    follows = rest[0].startswith(b"{") if rest else len(head) >= HEAD_BYTES
    if not follows or re.match(rb'\{(.*[{,])?\s*"text"\s*:\s*"', first) is None:
        return None
    return 'holds JSON lines with the key text; set format to "auto" (plain text is a preparation of its own)'


def no_json_lines(head: bytes) -> str:
    """What content looks like if none of its lines gave a document."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    start = text[:512].lower()
    if not text:
        return "holds nothing" if not head else "holds only blank lines"
    if start.startswith((b"<!doctype html", b"<html")) or b"<html" in start:
        return "is an HTML page, most often an error page or a login page; fetch the file again"
    if start.startswith(b"<"):
        return "looks like XML, which is not read; write its records as JSON lines"
    if start.startswith(b"["):
        return "is one JSON array, not a JSON object a line; turn it into JSON lines: jq -c '.[]' FILE"
    if start.startswith(b"{") and text.split(b"\n", 1)[0].rstrip() in (b"{", b'{"'):
        return "holds JSON objects of several lines, not one a line; turn it into JSON lines: jq -c . FILE"
    separator = _table_separator(text)
    if separator:
        return f"looks like {separator}, which is not read; write its rows as JSON lines or as Parquet"
    if not _is_text(head):
        has_controls = any(byte < 0x20 and byte not in b"\t\n\f\r" for byte in head)
        kind = "is no text of a kind that is known; only what docs/data.md lists is read"
        return kind if has_controls else f"is no UTF-8 text; {TO_UTF8}"
    if not start.startswith(b"{"):
        return 'holds no JSON lines; if it is plain text set format to "text"'
    return ""


def _table_separator(text: bytes) -> str | None:
    """CSV or TSV if the first lines all have as many commas or tabs, and at least one."""
    lines = [line for line in text.split(b"\n")[:4] if line.strip()][:3]
    for name, separator in (("TSV", b"\t"), ("CSV", b","), ("CSV", b";")):
        counts = {line.count(separator) for line in lines}
        if len(lines) > 1 and len(counts) == 1 and counts != {0} and not text.startswith(b"{"):
            return name
    return None


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character that the cut divides
    return True
