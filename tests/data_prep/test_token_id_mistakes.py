"""Files and settings of token ids that cannot be used: each is one sentence with the file or the key."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_prep.cli import main
from data_prep.raw import token_ids
from tests.data_prep.id_files import EOS, write_llm_c, write_megatron, write_plain
from tests.data_prep.outcome import one_error


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _patched(path: Path, offset: int, data: bytes) -> None:
    body = bytearray(path.read_bytes())
    body[offset : offset + len(data)] = data
    path.write_bytes(body)


def _without_documents(path: Path) -> None:
    """An index of two sequences whose document index has no entry."""
    _cut(path, 58)
    _patched(path, 26, struct.pack("<Q", 0))


def _npy(header: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: _cut(folder / "two.bin", 7), "two.bin has 7 bytes, two.idx describes 8"),
        (lambda folder: _cut(folder / "two.idx", 60), "two.idx has 60 bytes, its header says 82"),
        (lambda folder: _cut(folder / "two.idx", 20), "two.idx is no index of Megatron-LM"),
        (lambda folder: (folder / "two.idx").unlink(), "two.bin has no index beside it; fetch two.idx too"),
        (lambda folder: _patched(folder / "two.idx", 9, b"\2"), "two.idx has version 2 and dtype 8"),
        (lambda folder: _patched(folder / "two.idx", 17, b"\6"), "version 1 and dtype 6; integers"),
        (lambda folder: _patched(folder / "two.idx", 34, b"\3"), "its documents are not all sequences"),
        (lambda folder: _patched(folder / "two.idx", 42, b"\2"), "its documents are not all sequences"),
        (lambda folder: _patched(folder / "two.idx", 58, b"\1"), "its documents are not all sequences"),
        (lambda folder: _patched(folder / "two.idx", 66, b"\3"), "its documents are not all sequences"),
        (lambda folder: _without_documents(folder / "two.idx"), "its documents are not all sequences"),
        (lambda folder: _patched(folder / "two.idx", 82, b"\0\0"), "two.idx is the index of a multimodal data set"),
    ],
)
def test_a_damaged_data_set_is_refused_by_name(
    damage: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    id_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Even where another file is whole: ids are never left out unsaid."""
    for name in ("same", "two"):
        write_megatron(tmp_path / name, "uint16", [[[5, 6]], [[7, 8]]])
    damage(tmp_path)
    files = [f"{tmp_path}/same.bin", f"{tmp_path}/two.bin"]
    assert main(["run", "--config", str(id_config(format="megatron", input=files, validation_fraction=0))]) == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize(
    "write, settings, message",
    [
        (
            lambda path: write_plain(path, [5, 6, 500, 7], "<u2"),
            {},
            "token 2 is the id 500, and tokenizer.model has 500 pieces; name the model that made these ids, or, if "
            "this id ends documents, set end_of_document to it",
        ),
        (lambda path: write_plain(path, [5, -6], "<i4"), {"id_dtype": "int32"}, "token 1 is the id -6"),
        (lambda path: path.write_bytes(b"abc"), {}, "ends inside an id of 2 bytes (id_dtype)"),
        (lambda path: path.write_bytes(b""), {}, "holds no document"),
        (lambda path: _cut(write_llm_c(path, [5, 6, 7]), 1029), {}, "ends after 1,029 bytes, too early"),
        (
            lambda path: path.write_bytes(write_llm_c(path, [5, 6]).read_bytes() + b"\0"),
            {},
            "more than the 2 ids of its header",
        ),
        (lambda path: np.save(path.open("wb"), np.zeros((2, 2), np.int32)), {}, "int32 with 2 dimensions"),
        (lambda path: np.save(path.open("wb"), np.zeros(2)), {}, "is an array of float64"),
        (lambda path: np.save(path.open("wb"), np.array([{}])), {}, "is an array of object"),
        (lambda path: np.savez(path.open("wb"), ids=np.zeros(9, np.uint16)), {}, "is a zip, as .npz files are; save"),
        *(
            (lambda path, header=header: path.write_bytes(_npy(header)), {}, "ids.bin has a damaged header; fetch")
            for header in ("'''", "-" * 9000 + "1", "{[]: 3}", "(" * 5000, " {\n 1\n  2", "{'descr': [[]]}")
        ),
        (
            lambda path: write_plain(path, [5, 6, 1, 7] * 4, "<u4"),
            {},
            "ids.bin: every second id is 0, as where ids have more bytes than id_dtype uint16; set it to",
        ),
        (lambda path: write_plain(path, [5] * 16, "<i8"), {"id_dtype": "int32"}, "more bytes than id_dtype int32"),
        (
            lambda path: write_plain(path, [5, 6], "<u4"),
            {"end_of_document": 65536},
            "id_dtype: uint16 holds numbers up to 65,535, and ids of",
        ),
        (
            lambda path: write_plain(path, [5] * 600, "<u2"),
            {"ingest": {"max_document_bytes": 1024}},
            "too long (more than ingest.max_document_bytes 1024; documents end at the id 1, see end_of_document)",
        ),
    ],
)
def test_an_array_that_cannot_be_read_is_one_sentence(
    write: Callable[[Path], object],
    settings: dict[str, Any],
    message: str,
    id_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "ids.bin")
    changes = {"format": "token_array", "input": f"{tmp_path}/ids.bin", "validation_fraction": 0, **settings}
    assert main(["run", "--config", str(id_config(**changes))]) == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize("block", [1, 3, 4, 1 << 20])
def test_the_beginning_of_a_document_that_is_too_long_is_shown_wherever_a_block_ends(
    block: int, id_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_ids, "BLOCK_IDS", block)
    array = write_plain(tmp_path / "ids.bin", [5, 6, EOS, *[7] * 600, EOS], "<u2")
    limits = {"max_document_bytes": 1024, "max_bad_records": 1}
    changes = {"format": "token_array", "input": str(array), "validation_fraction": 0, "ingest": limits}
    assert main(["run", "--config", str(id_config(**changes))]) == 0
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["token"], found["reason"]) == (3, "too long") and found["excerpt"].startswith("7")


@pytest.mark.parametrize("format", ["token_array", "megatron"])
def test_a_piece_of_texts_ends_no_document(
    format: str, tmp_path: Path, id_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As 2, the EOS of Llama's models, is in a model that has another. Documents would be cut inside."""
    model = sentencepiece.SentencePieceProcessor(model_file=json.loads(id_config().read_text())["tokenizer"]["model"])
    write_plain(tmp_path / "ids.bin", [7, 8, EOS], "<u2")
    write_megatron(tmp_path / "ids", "uint16", [[[7, 8, EOS]]])
    texts = [number for number in range(model.vocab_size()) if not model.is_control(number)][1:]  # but <unk>
    for number in (texts[0], texts[-1], model.piece_to_id("<0x0A>")):
        given = {"format": format, "input": str(tmp_path / "ids.bin"), "end_of_document": number}
        assert main(["run", "--config", str(id_config(**given))]) == 2
        words = f"end_of_document: {number} is the piece {model.id_to_piece(number)!r} of tokenizer.model"
        assert words in one_error(capsys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": {}}, "tokenizer.model: format"),
        ({"filter": {}}, "filter: format"),
        ({"dedup": {}}, "dedup: format"),
        ({"text_key": "content"}, "text_key: has no effect"),
        ({"id_dtype": "int32"}, "id_dtype: has no effect"),
        ({"input": "s3://bucket/a"}, "is read from local files"),
        ({"format": "jsonl", "end_of_document": 2}, "end_of_document: has no effect"),
    ],
)
def test_keys_that_do_not_go_with_ids_are_refused(
    changes: dict[str, Any], message: str, id_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--config", str(id_config(**{"format": "megatron", "input": "a", **changes}))]) == 2
    assert message in one_error(capsys)
