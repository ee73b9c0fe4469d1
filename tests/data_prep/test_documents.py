"""Raw files: formats, lines, and what happens to what cannot be read."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from common.errors import DataError
from data_prep.raw.documents import Document, RawFile, Rejected, stable_fractions
from data_prep.raw.unpack import DamagedFileError, Unpacked
from tests.data_prep.conftest import c4_line, pes2o_line, write_dump


def read(path: Path, format: Any = "auto", **settings: Any) -> tuple[RawFile, list[str], list[Rejected]]:
    """The file, the texts of its documents and what was rejected."""
    raw = RawFile(path, format=format, **settings)
    records = list(raw.read())
    texts = [record.data.decode() for record in records if isinstance(record, Document)]
    return raw, texts, [record for record in records if isinstance(record, Rejected)]


@pytest.mark.parametrize(
    "name, line", [("c4", c4_line), ("pes2o", pes2o_line), ("jsonl", lambda text: {"text": text, "meta": 1})]
)
@pytest.mark.parametrize("block_bytes", [7, 300, 1 << 20])
def test_texts_come_back_in_order_with_hash_size_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: Any, block_bytes: int
) -> None:
    monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", block_bytes)
    texts = [f"text {number}\nline two  ü" for number in range(20)]
    path = write_dump(tmp_path / "a.json.gz", [line(text) for text in texts])
    raw = RawFile(path)
    records = list(raw.read())
    assert [(r.position, r.data.decode()) for r in records if isinstance(r, Document)] == list(enumerate(texts, 1))
    stored = path.read_bytes()
    assert (raw.format, raw.bytes, raw.sha256) == (name, len(stored), hashlib.sha256(stored).hexdigest())


def test_plain_files_concatenated_gzip_zstd_and_blank_lines_are_read(tmp_path: Path) -> None:
    first, second = (
        write_dump(tmp_path / f"{n}.gz", [c4_line(f"text {n}"), b"", c4_line(f"more {n}")]).read_bytes() for n in (1, 2)
    )
    both = tmp_path / "both.json.gz"
    both.write_bytes(first + second)
    expected = ["text 1", "more 1", "text 2", "more 2"]
    assert read(both)[1:] == (expected, [])
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(first + second).removesuffix(b"\n").replace(b"\n", b"\r\n"))
    raw, texts, _ = read(plain)
    assert texts == expected
    assert raw.sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()
    frames = tmp_path / "a.jsonl.zst"
    frames.write_bytes(b"".join(zstandard.compress(gzip.decompress(part)) for part in (first, second)))
    assert read(frames)[1:] == (expected, [])


@pytest.mark.parametrize(
    "bad, reason, detail",
    [
        (b'{"text": "cut', "not JSON", "Invalid control character"),
        (b'{"text": "\xff"}', "not UTF-8", "byte 10 of the line"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8", "byte 10 of the line"),
        (b"[" * 100_000, "not JSON", "recursion|Stack overflow"),  # before Python 3.14 | from it on
        (b"[1, 2]", "not JSON", "expected an object, found list"),
        (b'{"url": "x"}', "no text", "the key `text` is missing; keys found: url"),
        (b'{"text": null}', "no text", "`text` is null, not a string"),
        (b'{"text": "\\ud800"}', "not UTF-8", "half of a UTF-16 surrogate pair"),
        (b'{"text": ""}', "empty", "blank"),
        (b'{"text": " \\n\\t "}', "empty", "blank"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "too long", "ingest.max_document_bytes 150000"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1000, 1 << 20])
def test_a_malformed_line_is_rejected_with_its_number_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, reason: str, detail: str, block_bytes: int
) -> None:
    monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", block_bytes)
    path = write_dump(tmp_path / "bad.json.gz", [c4_line("good")] * 3 + [b"", bad, c4_line("more")])
    _, texts, (rejected,) = read(path, max_document_bytes=150_000)
    assert texts == ["good"] * 3 + ["more"]
    assert (rejected.position, rejected.reason) == (5, reason)
    assert any(part in rejected.detail for part in detail.split("|"))
    assert bad.startswith(rejected.record)


def test_the_format_is_that_of_the_first_line_that_can_be_read(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "x.json.gz", [b"oops", {"no": "text"}, pes2o_line("a"), c4_line("b")])
    raw, texts, rejected = read(path)
    assert (raw.format, texts, [r.position for r in rejected]) == ("pes2o", ["a", "b"], [1, 2])


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "cut.json.gz", [c4_line(f"{n} text" * 9) for n in range(500)])
    whole = path.read_bytes()
    for damaged in (
        whole[:-40],
        whole[:-1],
        whole[:600] + b"\0\0\0\0" + whole[604:],
        b"x" + whole[1:],
        b"",
        whole + b"x",
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"cut\.json\.gz is damaged .*; fetch it again"):
            read(path)
    with pytest.raises(DataError, match=r"cannot read .*none\.gz: No such file"):
        read(tmp_path / "none.gz")


def test_what_is_packed_otherwise_is_named_and_goes_whole(tmp_path: Path) -> None:
    data = b'{"text": "one"}\n' * 100
    for name, content in (("bzip2", bz2.compress(data)), ("xz", lzma.compress(data))):
        for suffix in (name, "jsonl"):
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(content)
            with pytest.raises(DamagedFileError, match=f"{name}.*, which is not read"):
                read(path)


def test_a_zstd_file_is_whole_or_damaged(tmp_path: Path) -> None:
    data = b"".join(b'{"text": "%d %d"}\n' % (number, number * number) for number in range(5000))
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    path = tmp_path / "a.jsonl.zst"
    for length in (*range(len(whole) - 6, len(whole)), len(whole) // 2, 3, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            read(path)
    path.write_bytes(whole)
    assert len(read(path)[1]) == 5000


def test_a_long_file_of_one_line_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    """60 MB of newline-free noise, one rejection, then a good line."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        for _ in range(60):
            stream.write(os.urandom(1 << 20).replace(b"\n", b" "))
        stream.write(b'\n{"text": "good"}\n')
    _, texts, (rejected,) = read(path, max_document_bytes=1 << 20)
    assert (texts, rejected.position, rejected.reason) == (["good"], 1, "too long")
    assert rejected.size < 3 << 20


@pytest.mark.parametrize("block", [30, 1 << 20])
def test_a_line_as_long_as_is_allowed_is_read_and_lines_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Also behind one that comes in many pieces."""
    monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", block)

    def line(size: int) -> bytes:
        """With its end."""
        return b'{"text": "' + b"x" * (size - 13) + b'"}\n'

    lines = [line(100), line(101), line(999), b"no json\n", b"\n", line(99), line(100)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    records = list(RawFile(tmp_path / "a.jsonl", max_document_bytes=100).read())
    found = [(record.position, record.reason if isinstance(record, Rejected) else "") for record in records]
    assert found == [(1, ""), (2, "too long"), (3, "too long"), (4, "not JSON"), (6, ""), (7, "")]


def test_pages_are_named_by_their_byte_in_the_whole_file(tmp_path: Path) -> None:
    pages = [b"<page>\n" + b"x" * size + b"\n" for size in (3, 5, 1, 9, 2)]
    content, sizes = b"".join(pages), (len(b"".join(pages[:2])), len(pages[2]) + len(pages[3]) - 4, len(pages[4]) + 4)
    (tmp_path / "enwik8").write_bytes(content)
    found = list(RawFile(tmp_path / "enwik8", format="enwik8", split_bytes=sizes).read())
    documents = [record for record in found if isinstance(record, Document)]
    assert [record.split for record in documents] == [*["train"] * 2, *["validation"] * 2, "test"]
    assert len(documents) == len(found) and b"".join(record.data for record in documents) == content
    for record in documents:
        assert content[record.position :].startswith(record.data)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_a_small_text_costs_no_memory_for_the_longest_allowed(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.txt").write_bytes(pack(b"text"))
    tracemalloc.start()
    (document,) = RawFile(tmp_path / "a.txt", format="text", max_document_bytes=1 << 28).read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(document, Document) and document.data == b"text" and peak < 4 << 20


def test_a_giant_document_in_zstd_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    """100 MB of one letter in 4 KB: unpacked at once they were copied for every MB read, 7 s and 200 MB."""
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as stream, zstandard.ZstdCompressor(level=1).stream_writer(stream) as packed:
        for block in (b'{"text": "', *[b"a" * (1 << 20)] * 100, b'"}\n{"text": "good"}\n'):
            packed.write(block)
    assert path.stat().st_size < 5000
    tracemalloc.start()
    _, texts, (rejected,) = read(path, max_document_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts, rejected.position, rejected.reason) == (["good"], 1, "too long")
    assert peak < 60 << 20


def test_a_giant_article_goes_as_a_whole(tmp_path: Path) -> None:
    rng = random.Random(1)
    giant = b" = Giant = \n" + b"".join(b" %d = not a heading \n" % rng.randrange(10**9) for _ in range(900))
    small = b" = Small = \n text \n"
    (tmp_path / "wiki.train.raw").write_bytes(small + giant + small)
    raw = RawFile(tmp_path / "wiki.train.raw", format="wikitext", split="train", max_document_bytes=3000)
    records = list(raw.read())
    assert [type(record) for record in records] == [Document, Rejected, Document]
    assert [record.position for record in records] == [0, len(small), len(small) + len(giant)]


def test_the_validation_choice_is_stable_and_near_its_fraction() -> None:
    texts = [f"document {number}" for number in range(4000)]
    hashes = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    chosen = np.flatnonzero(stable_fractions(np.array(hashes, np.uint64)) < 0.05)
    assert chosen[:3].tolist() == [21, 22, 55]
    assert 150 < len(chosen) < 250


class Block(bytes):
    """Notes how many bytes are copied to put it behind others."""

    copied = 0

    def __radd__(self, before: bytes) -> "Block":
        Block.copied += len(before)
        return Block(bytes(before) + bytes(self))


def test_a_text_that_comes_in_short_pieces_is_put_together_once() -> None:
    """As a web server sends it: one of 1 GB has 16,384 pieces."""
    stream, Block.copied = io.BytesIO(bytes(range(200))), 0
    read = lambda size: Block(stream.read(min(size, 7)))  # noqa: E731
    unpacked = Unpacked(read, name="a", finish=lambda: ("", 0))
    assert unpacked.peek(3) == bytes(range(3))
    copied = Block.copied
    assert [unpacked.read(size) for size in (1, 0, 99, 1000, 1)] == [
        bytes(range(1)), b"", bytes(range(1, 100)), bytes(range(100, 200)), b"",
    ]  # fmt: skip
    assert unpacked.position == 200 and Block.copied == copied


@pytest.mark.parametrize("max_bytes", [1, 9, 40, 10**6])
@pytest.mark.parametrize("block_bytes", [1, 3, 8, 1000])
def test_lines_are_those_of_the_content_and_a_long_one_is_put_together_once(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, max_bytes: int
) -> None:
    """A line of 1 GB, which ingest.max_document_bytes allows, has 1,024 blocks: adding each of them to those before
    would copy 500 GB."""
    monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", block_bytes)
    rng = random.Random(0)
    content = b"".join(b"x" * rng.choice([0, 1, 7, 8, 9, 200]) + b"\n" * rng.choice([0, 1, 1, 2]) for _ in range(99))
    stream = io.BytesIO(content)
    unpacked = Unpacked(lambda size: Block(stream.read(size)), name="a", finish=lambda: ("", 0))
    Block.copied = 0
    pieces = list(unpacked.lines(max_bytes=max_bytes))
    assert b"".join(pieces) == content and all(pieces)
    assert all(b"\n" not in piece[:-1] for piece in pieces)
    assert all(piece.endswith(b"\n") or len(piece) > max_bytes for piece in pieces[:-1])
    if max_bytes == 10**6:
        assert pieces == content.splitlines(keepends=True)
    assert Block.copied == 0
