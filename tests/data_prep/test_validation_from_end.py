"""One long text has both splits: the end of a file is held out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.raw.documents import RawFile
from data_prep.raw.records import Document
from data_prep.shards.format import Manifest
from pretrain.cli.train import main as train
from tests.data_prep.outcome import one_error
from tests.data_prep.raw_corpus import sample_texts
from tests.data_prep.raw_files import write


def pieces(path: Path, held_out: float) -> list[tuple[int, str, bytes]]:
    found = list(RawFile(path, format="text", held_out=held_out).read())
    assert all(isinstance(one, Document) for one in found)
    return [(one.position, one.split, one.data) for one in found if isinstance(one, Document)]


def test_a_text_is_cut_between_lines_words_or_characters(tmp_path: Path) -> None:
    lines = write(tmp_path / "lines", b"one\ntwo\nthree\nfour\n")
    assert pieces(lines, 0.3) == [(1, "train", b"one\ntwo\n"), (3, "validation", b"three\nfour\n")]
    words = write(tmp_path / "words", b"one two three four")
    assert pieces(words, 0.4) == [(1, "train", b"one two "), (1, "validation", b"three four")]
    for held_out in np.linspace(0.01, 0.99, 50):
        characters = "äπ語🙂" * 5
        parts = pieces(write(tmp_path / "characters", characters.encode()), float(held_out))
        assert "".join(data.decode() for _, _, data in parts) == characters
        assert [split for _, split, _ in parts] in (["train", "validation"], ["train"], ["validation"])
    assert pieces(lines, 0.0) == [(1, "train", b"one\ntwo\nthree\nfour\n")]
    assert pieces(write(tmp_path / "blank", b"one\ntwo\n\n\n\n\n"), 0.1) == [(1, "train", b"one\ntwo\n\n\n\n")]
    long_line = write(tmp_path / "long", b"title\n" + b"x" * 1000)
    assert [len(data) for *_, data in pieces(long_line, 0.1)] == [905, 101]


def prepare(folder: Path, *settings: str, **changes: Any) -> int:
    body = {"output": str(folder / "out"), "workers": 1, "tokenizer": {"vocab_size": 400}, **changes}
    config = write(folder / "config.json", json.dumps(body).encode())
    return main(["run", "--config", str(config), *(word for one in settings for word in ("--set", one))])


@pytest.fixture
def books(tmp_path: Path) -> str:
    """Two long texts."""
    for number in range(2):
        write(tmp_path / f"{number}.txt", "\n".join(sample_texts(8, skip=8 * number)).encode())
    return f"{tmp_path}/*.txt"


def test_each_file_gives_its_end_to_validation(tmp_path: Path, books: str, capsys: pytest.CaptureFixture[str]) -> None:
    end = ("format=text", "validation_from=end", "validation_fraction=0.1")
    assert prepare(tmp_path, *end, input=books) == 0
    manifest = Manifest.load(tmp_path / "out")
    totals, size = manifest.totals, sum(path.stat().st_size for path in tmp_path.glob("*.txt"))
    assert (totals["train"].documents, totals["validation"].documents) == (2, 2)
    assert totals["train"].text_bytes + totals["validation"].text_bytes == size
    assert 0.1 * size <= totals["validation"].text_bytes < 0.1 * size + 2 * 4096
    assert "no document went" not in capsys.readouterr().err
    assert prepare(tmp_path, *end, input=books) == 0
    assert "up to date" in capsys.readouterr().out
    assert prepare(tmp_path, *end[:2], "validation_fraction=0.2", input=books, output=str(tmp_path / "more")) == 0
    assert Manifest.load(tmp_path / "more").totals["validation"].text_bytes > 0.2 * size


@pytest.mark.parametrize(
    "format, words",
    [
        ("text", "is a share of whole documents, and there is one; of plain text (format=text) validation_from=end"),
        ("jsonl", "is a share of whole documents, and there is one; of plain text (format=text) validation_from=end"),
    ],
)
def test_one_document_alone_is_said_with_what_would_hold_out_some_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, words: str
) -> None:
    text = "\n".join(sample_texts(8))
    write(tmp_path / "a", (text if format == "text" else json.dumps({"text": text})).encode())
    assert prepare(tmp_path, f"format={format}", input=str(tmp_path / "a")) == 0
    assert f"no document went to validation; validation_fraction {words}" in capsys.readouterr().err


def test_an_end_that_repeats_its_text_is_said_to_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not advised to be held out."""
    write(tmp_path / "a", (sample_texts(1)[0] + "\n").encode() * 30)
    end = ("format=text", "validation_from=end", "validation_fraction=0.2")
    assert prepare(tmp_path, *end, input=str(tmp_path / "a"), dedup={"threshold": 0.8}) == 0
    said = capsys.readouterr()
    assert "duplicates    near          1\n" in said.out
    assert "no document went to validation; the ends of files are left out, as the table above says" in said.err


def test_of_ids_that_are_one_document_it_is_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16) % 90)
    tokenizer = {"type": "ids", "name": "mine", "vocab_size": 100}
    ids = {"format": "token_array", "end_of_document": 99, "tokenizer": tokenizer}
    assert prepare(tmp_path, input=str(tmp_path / "a.npy"), **ids) == 0
    said = capsys.readouterr().err
    assert "and there is one; name a file with its end as validation_input, and one without it as input" in said


@pytest.mark.parametrize("settings", [(), ("format=jsonl",), ("format=text", "text_documents=blank_lines")])
def test_it_is_refused_where_files_are_no_documents(
    tmp_path: Path, books: str, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
) -> None:
    assert prepare(tmp_path, *settings, "validation_from=end", input=books) == 2
    assert 'validation_from: end is for files that are one document; set format to "text"' in one_error(capsys)


def test_it_is_refused_beside_a_validation_input(
    tmp_path: Path, books: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"input": books, "validation_input": books, "format": "text", "validation_from": "end"}
    assert prepare(tmp_path, **body) == 2
    assert "validation_from: has no effect with validation_input" in one_error(capsys)


def test_training_on_one_document_says_how_some_of_it_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", "\n".join(sample_texts(8)).encode())
    assert prepare(tmp_path, "format=text", input=str(tmp_path / "a")) == 0
    capsys.readouterr()
    config = str(REPOSITORY / "configs" / "switchall_tiny.json")
    given = ["--config", config, "--run-dir", str(tmp_path / "run"), f"--set=data.manifest={tmp_path / 'out'}"]
    assert train(given) == 2
    assert one_error(capsys) == (
        f"error: data.manifest: no document of {tmp_path / 'out'} went to validation; prepare the data again, with a "
        "larger validation_fraction, or with validation_from=end if it is one long text, or set evaluate.sequences to 0"
    )
