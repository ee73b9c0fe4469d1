"""Files as people have them: byte order marks, packings of every kind, files of other formats, text_key, plain text."""

import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep.cli import main
from data_prep.raw.documents import Document, RawFile, Rejected
from data_prep.raw.unpack import BLOCK_BYTES, NoDocumentError
from tests.data_prep.outcome import one_error
from tests.data_prep.raw_files import read, write

LINES = [json.dumps({"text": f"document {number}", "id": number}).encode() for number in range(5)]
TEXTS = [f"document {number}" for number in range(5)]
SKIPPABLE = b"\x5a\x2a\x4d\x18" + (6).to_bytes(4, "little") + b"hidden"


def long_window(data: bytes) -> bytes:
    """As `zstd --long=31` packs a stream whose size it does not know."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"]
)  # fmt: skip
def test_a_byte_order_mark_costs_no_record(tmp_path: Path, pack: Any) -> None:
    """In front, and where marked files were joined."""
    marked = codecs.BOM_UTF8 + b"\r\n".join(LINES[:2]) + b"\n" + codecs.BOM_UTF8 + b"\n".join(LINES[2:])
    assert read(write(tmp_path / "a", pack(marked))) == (TEXTS, [])


def test_any_number_of_byte_order_marks_is_passed_over(tmp_path: Path) -> None:
    marks = codecs.BOM_UTF8 * 1500
    lines = [marks + LINES[0], marks + b"no JSON", marks + b'{"text": "\xff"}', *LINES[1:]]
    texts, rejected = read(write(tmp_path / "a", b"\n".join(lines)))
    assert (texts, [record.reason for record in rejected]) == (TEXTS, ["not JSON", "not UTF-8"])
    assert rejected[1].detail == "byte 4510 of the line: invalid start byte"


def test_a_byte_order_mark_is_no_part_of_a_text_or_an_article(tmp_path: Path) -> None:
    article = b" = Title = \n text \n"
    path = write(tmp_path / "wiki.train.raw", codecs.BOM_UTF8 + article * 2)
    assert read(path, "wikitext", split="train")[0] == [article.decode()] * 2
    assert read(write(tmp_path / "a.txt", codecs.BOM_UTF8 + b"words\n"), "text") == (["words\n"], [])
    inside = "a zero-width \ufeff inside"
    assert read(write(tmp_path / "a.json", json.dumps({"text": inside}).encode()))[0] == [inside]


@pytest.mark.parametrize(
    "stored",
    [
        long_window(b"\n".join(LINES)),
        SKIPPABLE + zstandard.compress(b"\n".join(LINES)),
        b"".join(SKIPPABLE + zstandard.compress(line + b"\n") for line in LINES) + SKIPPABLE,
    ],
    ids=["long", "skippable first", "many frames"],
)
def test_every_valid_zstd_file_is_read(tmp_path: Path, stored: bytes) -> None:
    for name in ("a.jsonl.zst", "A.JSONL.ZST", "no-ending"):
        assert read(write(tmp_path / name, stored)) == (TEXTS, [])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
NO_DOCUMENT = [
    ("a.json.gz", POINTER, r"a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"),
    ("a.jsonl", POINTER, r"a Git LFS pointer"),
    ("a.jsonl", b"<!DOCTYPE html>\n<html><body>404</body></html>\n", r"is an HTML page, most often an error page"),
    ("a.json.gz", gzip.compress(b"<html>login</html>"), r"is an HTML page"),
    ("a.csv", b"id,text\n1,one\n2,two\n", r"looks like CSV, which is not read; write its rows as JSON lines"),
    ("a.tsv", b"id\ttext\n1\tone\n", r"looks like TSV"),
    ("a.json", b'[{"text": "one"},\n {"text": "two"}]\n', r"is one JSON array.*jq -c '\.\[\]' FILE"),
    ("a.json", b'{\n  "text": "one"\n}\n', r"JSON objects of several lines.*jq -c \. FILE"),
    ("a.xml", b"<?xml version='1.0'?><a/>\n", r"looks like XML"),
    ("a.txt", b"Plain words.\nMore of them.\n", r'holds no JSON lines; if it is plain text set format to "text"'),
    ("a.lz4", b"\x04\x22\x4d\x18" + bytes(range(200)), r"packed with lz4.*read it as `pipe:lz4 -dc FILE`"),
    ("a.jsonl", lzma.compress(b"x"), r"packed with xz.*`pipe:xz -dc FILE`"),
    ("a.jsonl", bz2.compress(b"x"), r"packed with bzip2.*`pipe:bzip2 -dc FILE`"),
    ("a.arrow", b"ARROW1\0\0" + bytes(100), r"an Arrow or Feather file.*as JSON lines or as Parquet"),
    ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0" + bytes(100), r"an Arrow stream"),
    ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", r"a PDF, which is not read; extract its text first"),
    ("a.rtf", b"{\\rtf1 words}\n", r"an RTF document, which is not read; extract its text first"),
    ("a.warc", b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", r"a WARC crawl archive.*extract the text of its pages first"),
    ("a.txt", b"PAR1 begins a Parquet file.\n", r'holds no JSON lines; if it is plain text set format to "text"'),
    ("a.jsonl", codecs.BOM_UTF16_LE + '{"text": "one"}\n'.encode("utf-16-le"), r"UTF-16 text.*iconv -f UTF-16 -t"),
    ("a.jsonl", '{"text": "one"}\n'.encode("utf-16-be"), r"UTF-16 text without a byte order.*iconv -f UTF-16BE"),
    ("a.jsonl", gzip.compress(gzip.compress(LINES[0])), r"packed with gzip twice; unpack it once"),
    ("a.jsonl.zst", gzip.compress(LINES[0]), r"is not a \.zst file but a \.gz file; rename it"),
    ("a.json.gz", zstandard.compress(LINES[0]), r"is not a \.gz file but a \.zst file; rename it"),
    ("A.JSON.GZ", bytes(5000), r"is not a \.gz file: it is filled with zero bytes at its beginning"),
    ("a.jsonl", bytes(5000), r"is filled with zero bytes at its beginning, as an unfinished copy leaves it"),
    ("A.JSONL.ZST", LINES[0], r"damaged \(not a \.zst file\)"),
    ("a.jsonl", b"", r"holds nothing"),
    ("a.jsonl", b"\n\n\n", r"holds only blank lines"),
    ("a.jsonl", b'{"url": "u", "doc": {"body": "b"}}\n', r"keys found: url, doc\.body; set `text_key`"),
    ("a.jsonl", '{"text": "été"}\n'.encode("latin-1"), r"is no UTF-8 text; convert it from its encoding, .*iconv -f"),
    ("a.jsonl", b"\x93\x01\x02" * 900, r"is no text of a kind that is known"),
]  # fmt: skip


# Named by place: names of bytes packed by gzip hold the time, and pytest-xdist wants the same ones in every process.
@pytest.mark.parametrize("name, data, words", NO_DOCUMENT, ids=[f"{n} {case[0]}" for n, case in enumerate(NO_DOCUMENT)])
def test_a_file_without_a_document_is_named_with_what_it_looks_like(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    raw = RawFile(write(tmp_path / name, data))
    with pytest.raises(Exception, match=words) as error:
        list(raw.read())
    assert isinstance(error.value, NoDocumentError) != ("damaged" in words)
    assert str(error.value).startswith(f"{tmp_path / name} ") and "\n" not in str(error.value)


@pytest.mark.parametrize("letters", ["PAR1", "ARROW1", "ORC", "WARC/1.0", "%PDF-1.7", "{\\rtf1"])
def test_plain_text_may_begin_with_the_letters_of_another_format(tmp_path: Path, letters: str) -> None:
    """A file of that format does not pass for text: what follows its letters is none."""
    text = f"{letters} is how such a file begins.\n"
    assert read(write(tmp_path / "a.txt", text.encode()), "text") == ([text], [])
    with pytest.raises(NoDocumentError, match=r"which is not read|a Parquet file"):
        read(write(tmp_path / "b", letters.encode() + b"\x15\0\x15\xe2\xe3" + bytes(100)), "text")


@pytest.mark.parametrize("words", ["some", "very many " * 1000])
def test_json_lines_do_not_pass_for_plain_text(tmp_path: Path, words: str) -> None:
    """They would be one document of braces and keys. The first line may be longer than what is looked at."""
    line = json.dumps({"id": 1, "text": words}).encode()
    with pytest.raises(NoDocumentError, match='holds JSON lines with the key text; set format to "auto"'):
        read(write(tmp_path / "a.jsonl", b"\n".join([line, line])), "text")
    for text in (
        b'{"text": "one object"}\n',
        b'{"text": "one object"}',
        b"{a: 1}\n{b: 2}\n",
        b'{"id": 1}\n{"id": 2}\n',
        b'"text": "{\n{',
    ):
        assert read(write(tmp_path / "a.txt", text), "text") == ([text.decode()], [])


def test_a_file_of_empty_texts_alone_is_no_bad_file(tmp_path: Path) -> None:
    texts, rejected = read(write(tmp_path / "a.jsonl", b'{"text": ""}\n{"text": " "}\n'))
    assert texts == [] and [record.reason for record in rejected] == ["empty", "empty"]


def test_bad_files_are_named_in_the_last_lines_and_count_as_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        write(tmp_path / f"good-{number:02d}.jsonl", b"\n".join(LINES).replace(b"document", b"words %d" % number))
    write(tmp_path / "good-40.jsonl", POINTER)
    write(tmp_path / "good-41.jsonl", b"id,text\n1,one\n")
    config = write(
        tmp_path / "c.json",
        json.dumps(
            {
                "input": f"{tmp_path}/good-*.jsonl",
                "output": str(tmp_path / "out"),
                "workers": 1,
                "tokenizer": {"vocab_size": 280},
            }
        ).encode(),
    )
    assert main(["run", "--config", str(config)]) == 0
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last[0].startswith(f"warning: left out: {tmp_path}/good-40.jsonl is a Git LFS pointer"), last
    assert "good-41.jsonl looks like CSV" in last[1]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["provenance"]["dropped"]["quarantined"] == {"no document": 2}
    records = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_bytes().splitlines()]
    assert [(line["file"], line["reason"]) for line in records] == [
        ("good-40.jsonl", "no document"),
        ("good-41.jsonl", "no document"),
    ]
    assert main(["run", "--config", str(config), "--set", f"input={tmp_path}/good-4*.jsonl", "--force"]) == 2
    assert "2 of 2 raw files are bad (damaged, or without a document), so nothing is left; the" in one_error(capsys)


@pytest.mark.parametrize("bad, named, more", [(5, 5, []), (12, 10, ["warning: 2 more raw files were left out whole"])])
def test_a_refusal_for_bad_files_names_them_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: int, named: int, more: list[str]
) -> None:
    write(tmp_path / "good.jsonl", b"\n".join(LINES))
    files = [write(tmp_path / f"bad-{number:02d}.jsonl", b"id,text\n1,one\n") for number in range(bad)]
    body = {"input": f"{tmp_path}/*.jsonl", "output": str(tmp_path / "out"), "workers": 1}
    assert main(["run", "--config", str(write(tmp_path / "c.json", json.dumps(body).encode()))]) == 2
    *said, error = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("warning: ")]
    assert lines[named:] == more
    for path, line in zip(files, lines[:named], strict=False):
        assert line.startswith(f"warning: left out: {path} looks like CSV")
    assert error.startswith(f"error: {bad} of {bad + 1} raw files are bad")


@pytest.mark.parametrize(
    "bad, most, code", [(0, 0, 0), (1, 0, 2), (1, 0.1, 0), (1, 0.09, 2), (2, 0.1, 2)]
)  # of ten records
def test_as_many_bad_records_as_are_allowed_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: int, most: float, code: int
) -> None:
    lines = [b'{"text": "word"}'] * (9 - bad) + [b"{no json"] * bad + [b'{"text": ""}']  # an empty one is no bad one
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    body = {"input": str(path), "output": str(tmp_path / "out"), "workers": 1, "ingest": {"max_bad_records": most}}
    assert main(["ingest", "--config", str(write(tmp_path / "c.json", json.dumps(body).encode()))]) == code
    if code:
        assert f"{bad} of 10 records are malformed, more than ingest.max_bad_records {most}" in one_error(capsys)


def test_the_text_is_where_text_key_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": {"b": "one"}, "c": 1}\n{"a.b": "two"}\n{"a": "b"}\n')
    texts, (rejected,) = read(path, text_key="a.b")
    assert texts == ["one", "two"]
    assert (rejected.position, rejected.reason) == (3, "no text")
    assert rejected.detail == "the key `a.b` is missing; keys found: a"
    with pytest.raises(NoDocumentError, match=r"the key `text` is missing; keys found: a\.b, c; set `text_key`"):
        read(path)


def test_plain_text_is_a_document_or_several(tmp_path: Path) -> None:
    data = b"\n\nOne.\r\nStill one.\r\n \t\r\nTwo.\n\n\n\nThree \xff.\n\nFour"
    path = write(tmp_path / "a.txt", data)
    to_utf8 = r"; convert it from its encoding, for example: iconv -f ISO-8859-1 -t UTF-8$"
    with pytest.raises(
        NoDocumentError, match=r"gives no document: not UTF-8 \(byte 38 of the file: invalid start byte\)" + to_utf8
    ):
        read(path, "text")
    texts, (rejected,) = read(path, "text", text_documents="blank_lines")
    assert texts == ["One.\r\nStill one.", "Two.", "Four"]
    assert (rejected.position, rejected.reason) == (10, "not UTF-8")
    whole = write(tmp_path / "b.txt.gz", gzip.compress("Zwei Äpfel.\n\nEnde\n".encode()))
    assert read(whole, "text") == (["Zwei Äpfel.\n\nEnde\n"], [])
    long = write(tmp_path / "c.txt", b"small\n\n" + b"word " * 500 + b"\nmore\n\nsmall too\n")
    texts, (rejected,) = read(long, "text", text_documents="blank_lines", max_document_bytes=1024)
    assert (texts, rejected.reason, rejected.position) == (["small", "small too"], "too long", 3)
    lines = write(tmp_path / "f.txt", b"a line\n" * 1000 + b"\nsmall")
    _, (rejected,) = read(lines, "text", text_documents="blank_lines", max_document_bytes=1024)
    assert (rejected.reason, rejected.size) == ("too long", 147 * len("a line\n") - 1), "no more is kept in memory"
    for end in (b"", b"  "):  # where a piece of the long line ends: no document of its own begins behind it
        cut = write(tmp_path / "d.txt", b"w" * BLOCK_BYTES + end + b"\nmore\n\nsmall")
        texts, (rejected,) = read(cut, "text", text_documents="blank_lines", max_document_bytes=1024)
        assert (texts, rejected.reason, rejected.position) == (["small"], "too long", 1)
    blank = write(tmp_path / "e.txt", b"one\n" + b" " * BLOCK_BYTES + b"  \ntwo\n")
    assert read(blank, "text", text_documents="blank_lines", max_document_bytes=1024) == (["one", "two"], [])
    with pytest.raises(NoDocumentError, match=r"more than ingest\.max_document_bytes 1024"):
        read(long, "text", max_document_bytes=1024)


def plain_reading(data: bytes, max_bytes: int) -> list[tuple[int, bytes | str]]:
    """(line, text or the reason to reject it) of what stands between blank lines."""
    found: list[tuple[int, bytes | str]] = []
    lines = re.findall(rb"[^\n]*\n|[^\n]+", data)
    for is_blank, group in itertools.groupby(enumerate(lines, 1), lambda line: line[1].isspace()):
        numbers, of_text = zip(*group, strict=True)
        text = b"".join(of_text).rstrip(b"\r\n")
        if not is_blank:
            found.append((numbers[0], text if len(text) <= max_bytes else "too long"))
    return found


def test_texts_between_blank_lines_are_those_of_a_plain_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the limit falls on lines and their ends, which are no part of the text before them, and blocks on both:
    what is longer goes whole, and nothing of a text is lost."""
    rng, kinds = random.Random(0), set[str]()
    for _ in range(400):
        monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", rng.choice([1, 3, 5, 64]))
        parts = [b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b" ", b"a", b"bc", b"\xc3\xa9", b"defg", b"h" * 9]
        data = b"".join(rng.choice(parts) for _ in range(rng.randint(1, 14)))
        max_bytes, records = rng.randint(5, 12), list[Document | Rejected]()
        with contextlib.suppress(NoDocumentError):  # at the end, or at once for what looks like another file
            path = write(tmp_path / "a.txt", data)
            for record in RawFile(
                path, format="text", text_documents="blank_lines", max_document_bytes=max_bytes
            ).read():
                records.append(record)
        found = [(r.position, r.data if isinstance(r, Document) else r.reason) for r in records]
        expected = plain_reading(data, max_bytes)
        assert found == expected, (data, max_bytes)
        kinds |= {text if isinstance(text, str) else "a text" for _, text in expected}
    assert kinds == {"a text", "too long"}
