"""Raw files: formats, lines, and what a damaged file says."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest

from data_prep.documents import RawFile, goes_to_validation, parse_texts
from data_prep.shard_format import DataError
from tests.data_prep.conftest import c4_line, pes2o_line, write_dump


def read(path: Path, format: Any = "auto", chunk_bytes: int = 300) -> tuple[RawFile, list[str]]:
    raw = RawFile(path, format=format)
    return raw, [text for chunk in raw.chunks(chunk_bytes=chunk_bytes) for text in parse_texts(chunk)]


@pytest.mark.parametrize("name, line", [("c4", c4_line), ("pes2o", pes2o_line)])
@pytest.mark.parametrize("chunk_bytes", [1, 300, 1 << 20])
def test_texts_come_back_in_order_with_hash_size_and_format(
    tmp_path: Path, name: str, line: Any, chunk_bytes: int
) -> None:
    texts = [f"text {number}\nline two  ü" for number in range(20)]
    path = write_dump(tmp_path / "a.json.gz", [line(text) for text in texts])
    raw, found = read(path, chunk_bytes=chunk_bytes)
    assert found == texts
    stored = path.read_bytes()
    assert (raw.format, raw.bytes, raw.sha256) == (name, len(stored), hashlib.sha256(stored).hexdigest())
    chunks = list(RawFile(path).chunks(chunk_bytes=chunk_bytes))
    assert sum(chunk.stored_bytes for chunk in chunks) == len(stored)


def test_plain_files_concatenated_gzip_and_blank_lines_are_read(tmp_path: Path) -> None:
    first, second = (
        write_dump(tmp_path / f"{n}.gz", [c4_line(f"text {n}"), b"", c4_line(f"more {n}")]).read_bytes() for n in (1, 2)
    )
    both = tmp_path / "both.json.gz"
    both.write_bytes(first + second)
    expected = ["text 1", "more 1", "text 2", "more 2"]
    assert read(both)[1] == expected
    plain = tmp_path / "plain.json"
    plain.write_bytes(gzip.decompress(first + second).removesuffix(b"\n").replace(b"\n", b"\r\n"))
    raw, texts = read(plain)
    assert texts == expected
    assert raw.sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "bad, message",
    [
        (b'{"text": "cut', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'{"url": "x"}', "`text` is missing or not a string"),
        (b'{"text": null}', "`text` is missing or not a string"),
        (b'{"text": "\\ud800"}', "half of a UTF-16 surrogate pair"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, bad: bytes, message: str) -> None:
    path = write_dump(tmp_path / "bad.json.gz", [c4_line("good")] * 3 + [b"", bad, c4_line("good")])
    for chunk_bytes in (1, 1 << 20):
        with pytest.raises(DataError, match=rf"bad\.json\.gz:5: .*{message}.*repair or remove"):
            read(path, chunk_bytes=chunk_bytes)


def test_unknown_keys_name_the_known_formats_unless_the_format_is_set(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "x.json.gz", [{"text": "a", "meta": 1}])
    with pytest.raises(DataError, match=r"x\.json\.gz:1: unknown format, its keys are meta, text \(c4 has"):
        read(path)
    assert read(path, format="c4")[1] == ["a"]


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "cut.json.gz", [c4_line(f"{n} text" * 9) for n in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"cut\.json\.gz is damaged .*; fetch it again"):
        read(path)
    path.write_bytes(whole[:600] + b"\0\0\0\0" + whole[604:])
    with pytest.raises(DataError, match=r"cut\.json\.gz is damaged .*; fetch it again"):
        read(path)
    with pytest.raises(DataError, match=r"cannot read .*none\.gz: No such file"):
        read(tmp_path / "none.gz")


def test_the_validation_choice_is_stable_and_near_its_fraction() -> None:
    texts = [f"document {number}" for number in range(4000)]
    chosen = [text for text in texts if goes_to_validation(text, validation_fraction=0.05)]
    assert chosen[:3] == ["document 21", "document 22", "document 55"]
    assert 150 < len(chosen) < 250
    assert not any(goes_to_validation(text, validation_fraction=0.0) for text in texts)
