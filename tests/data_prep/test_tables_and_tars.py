"""Parquet files, webdataset tars and pipes."""

import gzip
import hashlib
import inspect
import io
import json
import os
import pickle
import subprocess
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import webdataset
import zstandard
from webdataset.tariterators import tar_file_iterator

from common.errors import DataError, PassingError
from data_prep.cli import main
from data_prep.raw import parquet_rows
from data_prep.raw.documents import Document, RawFile, Rejected
from data_prep.raw.file_kinds import HEAD_BYTES
from data_prep.raw.locations import PipeFile, RemoteFile, expand
from data_prep.raw.unpack import DamagedFileError, NoDocumentError
from tests.data_prep.outcome import outputs
from tests.data_prep.raw_files import read, write

TEXTS = [f"text {number} ü\n" for number in range(9)]


def tar_of(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


TEXT_TAR = tar_of(*((f"dir.v1/{number:04d}.txt", text.encode()) for number, text in enumerate(TEXTS)))


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["tar", "tar.gz", "tar.zst"])
@pytest.mark.parametrize("format", ["auto", "webdataset"])
def test_text_members_are_documents(tmp_path: Path, pack: Any, format: str) -> None:
    assert read(write(tmp_path / "a.tar", pack(TEXT_TAR)), format) == (TEXTS, [])


def test_a_member_as_long_as_is_allowed_is_read_and_a_longer_one_is_not_cut(tmp_path: Path) -> None:
    stored = tar_of(("a.txt", b"x" * 1024), ("b.txt", b"x" * 1025), ("c.json", b'{"text": "' + b"x" * 1012 + b'"}'))
    texts, (rejected,) = read(write(tmp_path / "a.tar", stored), max_document_bytes=1024)
    assert texts == ["x" * 1024, "x" * 1012] and (rejected.position, rejected.reason) == (2, "too long")


def test_members_of_other_kinds_are_named_and_never_opened(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    stored = tar_of(
        ("__meta__", b"{}"),
        ("a.json", b'{"text": "from json", "n": 1}'),
        ("b.txt", b"\xef\xbb\xbffrom text"), ("b.json", b'{"text": "only what goes with it"}'), ("b.jpg", b"\xff\xd8"),
        ("c.pyd", bomb), ("c.cls", b"3"),
        ("d.pth", bomb),
        ("e.json", b"[1]"),
        ("f.en.txt", b"two languages"), ("f.de.txt", b"zwei Sprachen"),
        ("g.txt", b"\xff"),
        ("g2.txt", b"\xef\xbb\xbf"),
        ("README", b"no ending"),
        ("h.txt", b"x" * 2000),
    )  # fmt: skip
    texts, rejected = read(write(tmp_path / "a.tar", stored), max_document_bytes=1024)
    assert texts == ["from json", "from text", "two languages", "zwei Sprachen"]
    assert [(record.position, record.reason) for record in rejected] == [
        (3, "no text"), (4, "no text"), (5, "not JSON"), (7, "not UTF-8"), (8, "empty"), (9, "no text"),
        (10, "too long"),
    ]  # fmt: skip
    assert rejected[0].detail == "sample c has cls, pyd; only .txt and .json members are read"
    assert not (tmp_path / "exploded").exists()
    images = write(tmp_path / "b.tar", tar_of(("a.jpg", b"\xff\xd8"), ("b.jpg", b"\xff\xd8")))
    with pytest.raises(NoDocumentError, match=r"gives no document: sample a has jpg; only \.txt and \.json"):
        read(images)
    with pytest.raises(NoDocumentError, match=r'a tar archive; set format to "webdataset"'):
        read(images, "jsonl")


def test_links_are_no_documents_and_said_to_be(tmp_path: Path) -> None:
    """tar itself makes a link of a file's second name, so a text can be missing where nobody made a link."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.txt", b"one")
    os.link(folder / "a.txt", folder / "b.txt")
    (folder / "c.json").symlink_to("/etc/passwd")
    (folder / "d.jpg").symlink_to("a.txt")  # its sample has a text
    write(folder / "d.txt", b"two")

    def archive(name: str) -> Path:
        with tarfile.open(tmp_path / name, "w") as made:
            for path in sorted(folder.iterdir()):
                made.add(path, path.name)
        return tmp_path / name

    texts, rejected = read(archive("linked.tar"))
    assert texts == ["one", "two"]
    advice = "; make the archive with `tar --dereference --hard-dereference`"
    assert [(record.position, record.reason, record.detail) for record in rejected] == [
        (2, "a link", "b.txt is a link to a.txt" + advice),
        (3, "a link", "c.json is a link to /etc/passwd" + advice),
    ]
    line = [
        "tar",
        "--dereference",
        "--hard-dereference",
        "--sort=name",
        "-cf",
        str(tmp_path / "whole.tar"),
        "b.txt",
        "d.txt",
    ]
    subprocess.run([*line, "a.txt"], cwd=folder, check=True)
    assert read(tmp_path / "whole.tar") == (["one", "two", "one"], [])
    for path in folder.glob("[acd].*"):
        path.unlink()
    (folder / "b.txt").unlink()
    (folder / "e.txt").symlink_to("nowhere")
    with pytest.raises(NoDocumentError, match=r"gives no document: e\.txt is a link to nowhere; make the archive"):
        read(archive("links.tar"))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[: 4 * 512], "without its end"),  # between two members: what tarfile takes for the end
        (lambda data: data[: 5 * 512 + 100], "is damaged"),
        (lambda data: data + data, "several tar archives in one"),
        (lambda data: data[: 4 * 512] + b"x" * 512 + data[5 * 512 :], "several tar archives in one"),
    ],
    ids=["cut between members", "cut in a member", "joined", "bad header"],
)
def test_a_tar_is_whole_or_damaged(tmp_path: Path, damage: Any, words: str) -> None:
    raw = RawFile(write(tmp_path / "a.tar", damage(TEXT_TAR)))
    with pytest.raises(DamagedFileError, match=words) as raised:
        list(raw.read())
    assert str(raised.value).count("is damaged") == 1, "said once, with one thing to do"
    assert raw.bytes == (tmp_path / "a.tar").stat().st_size


def test_a_long_tar_is_read_in_the_memory_of_a_sample_whatever_zeros_end_it(tmp_path: Path) -> None:
    """As `tar --blocking-factor` writes them, more zeros than are read at once."""
    images = tar_of(*((f"{number:04d}.jpg", bytes(1 << 16)) for number in range(100)), ("a.txt", b"text"))
    path = write(tmp_path / "a.tar", images + bytes(3 << 20))
    read(path)  # imports
    tracemalloc.start()
    texts, rejected = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts, len(rejected)) == (["text"], 100) and peak < 5 << 20


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    members = [
        ("a/1.txt", b"one"),
        ("a/1.cls", b"3"),
        ("a/1.en.txt", b"two"),
        ("b.c/1.txt", b"three"),
        ("2.TXT", b"four"),
    ]
    path = write(tmp_path / "a.tar", tar_of(*members))
    samples = webdataset.WebDataset([f"file:{path}"], shardshuffle=False)  # without .decode()
    expected = [
        data.decode() for sample in samples for name, data in sample.items() if name.rpartition(".")[2] == "txt"
    ]
    assert read(path) == (expected, []) and expected == ["one", "two", "three", "four"]


def test_why_webdatasets_iterator_over_members_does_not_do() -> None:
    """The reasons in raw/tar_samples.py. Where one fails, webdataset may have what is missing: use it then."""
    cut = TEXT_TAR[: 4 * 512]
    assert len(list(tar_file_iterator(io.BytesIO(cut)))) == 2, "a cut tar passes for a whole one"
    assert not {"max_bytes", "max_size", "limit"} & inspect.signature(tar_file_iterator).parameters.keys()
    images = io.BytesIO(tar_of(("a.jpg", b"\xff\xd8"), ("b.txt", b"text")))
    found = tar_file_iterator(images, select_files=lambda name: name.endswith(".txt"))
    assert [member["fname"] for member in found] == ["b.txt"], "what is skipped is not even named"


def test_commands_and_braces(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a b.tar", TEXT_TAR)
    pipe = PipeFile(f"pipe:cat '{path}'")
    raw = RawFile(pipe)
    assert [record.data.decode() for record in raw.read() if isinstance(record, Document)] == TEXTS
    assert (raw.format, raw.bytes, pipe.name, str(pipe)) == ("webdataset", len(TEXT_TAR), "a b.tar", "pipe:...a b.tar")
    lines = write(tmp_path / "lines.jsonl", b'{"text": "one"}\n')
    assert list(RawFile(PipeFile(f"pipe:gzip -c {lines} | gzip -dc")).read()) == [Document(1, "train", b"one")]
    with pytest.raises(PassingError, match=r"^the command of pipe:\.\.\.none\.tar failed \(exit code 1\)"):
        list(RawFile(PipeFile(f"pipe:cat {tmp_path}/none.tar")).read())
    secret = PipeFile("pipe:curl -s -H 'Authorization: Bearer s3cr3t' 'https://user:s3cr3t@host/x.tar?sig=s3cr3t'")
    assert (secret.name, repr(secret)) == ("x.tar", "PipeFile()") and "s3cr3t" not in str(secret)
    assert expand("a-{08..10}.{tar,json}") == [f"a-{n}.{end}" for n in ("08", "09", "10") for end in ("tar", "json")]
    literal = write(tmp_path / "{a,b}.json", b"")
    assert expand(str(literal)) == [str(literal)]
    with pytest.raises(DataError, match=r"Unbalanced braces"):
        expand("a{1")


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow.parquet", reason="reading Parquet is UNTESTED: pyarrow is not installed")


def table_of(arrow: Any, path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    import pyarrow

    arrow.write_table(pyarrow.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_the_rows_of_a_column_are_documents(
    tmp_path: Path, arrow: Any, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    """Nulls and blank rows keep the numbers right, in row groups of 4, decoded a few rows at a time."""
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 20)
    values = [*TEXTS[:3], None, " ", *TEXTS[3:], "x" * 2000]
    path = table_of(
        arrow,
        tmp_path / "a.parquet",
        {"id": list(range(len(values))), "text": values},
        row_group_size=4,
        compression=compression,
    )
    for format in ("auto", "parquet"):
        raw = RawFile(path, format=format, max_document_bytes=1024)
        records = list(raw.read())
        documents = [record for record in records if isinstance(record, Document)]
        assert [record.data.decode() for record in documents] == TEXTS
        assert [record.position for record in documents] == [1, 2, 3, 6, 7, 8, 9, 10, 11]
        rejected = [(record.position, record.reason) for record in records if isinstance(record, Rejected)]
        assert rejected == [(4, "no text"), (5, "empty"), (12, "too long")]
        assert (raw.format, raw.unit, raw.bytes) == ("parquet", "row", path.stat().st_size)


def test_the_column_is_that_of_text_key(tmp_path: Path, arrow: Any) -> None:
    path = table_of(arrow, tmp_path / "a", {"meta": [{"body": "deep", "n": 1}], "raw": [b"bytes"], "n": [3]})
    assert read(path, text_key="meta.body") == (["deep"], [])
    assert read(path, text_key="raw") == (["bytes"], [])
    with pytest.raises(NoDocumentError, match=r"no column `text`; set `text_key` to one of: meta\.body, meta\.n, raw"):
        read(path)
    with pytest.raises(NoDocumentError, match=r"gives no document: `n` is a number, not a string"):
        read(path, text_key="n")


def test_no_server_has_to_wait_while_rows_are_read(tmp_path: Path, arrow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows come by a connection of their own, and web servers end one on which nothing is read for a minute."""
    path = table_of(arrow, tmp_path / "a.parquet", {"text": TEXTS * 500}, compression="none", use_dictionary=False)
    assert path.stat().st_size > 10 * HEAD_BYTES
    streams: list[Any] = []
    real = RemoteFile.open

    def noted(self: RemoteFile, mode: str, *, random_access: bool = False) -> Any:
        assert not random_access or streams[0].read(1) == b"", "the rest of the first connection waits"
        streams.append(real(self, mode, random_access=random_access))
        return streams[-1]

    monkeypatch.setattr(RemoteFile, "open", noted)
    raw = RawFile(RemoteFile(f"file://{path}"))
    assert len(list(raw.read())) == 500 * len(TEXTS) and len(streams) == 2
    assert raw.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parquet_that_cannot_be_read_is_named(tmp_path: Path, arrow: Any) -> None:
    path = table_of(arrow, tmp_path / "a.parquet", {"text": TEXTS * 500}, compression="snappy")
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:100], whole[:300] + bytes(200) + whole[500:]):
        with pytest.raises(DamagedFileError, match=r"a\.parquet is damaged \(.*\); fetch it again"):
            read(write(path, damaged))
    with pytest.raises(NoDocumentError, match=r"a Parquet file.*; unpack it if it is packed"):
        read(write(path, gzip.compress(whole)))
    with pytest.raises(NoDocumentError, match=r"is no Parquet file"):
        read(write(path, b'{"text": "one"}\n'), "parquet")
    write(path, whole)
    with pytest.raises(DataError, match=r"gives a Parquet file.*write it to a file first"):
        list(RawFile(PipeFile(f"pipe:cat {path}")).read())


def test_a_missing_pyarrow_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a Parquet file, which the package pyarrow reads; install it with pip.*parq"):
        read(write(tmp_path / "a", b"PAR1" + bytes(100) + b"PAR1"))


def test_all_kinds_in_one_run_are_the_same_with_any_workers(tmp_path: Path, arrow: Any) -> None:
    """The same texts as JSON lines, Parquet, tar and text files give the same shards."""
    texts = [f"{number} " + text * 9 for number, text in enumerate(TEXTS * 12)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write(tmp_path / "lines.jsonl", lines.encode())
    table_of(arrow, tmp_path / "rows.parquet", {"text": texts}, row_group_size=10)
    write(tmp_path / "members.tar", tar_of(*((f"{n:05d}.txt", text.encode()) for n, text in enumerate(texts))))
    (tmp_path / "files").mkdir()
    for number, text in enumerate(texts):
        write(tmp_path / "files" / f"{number:05d}.txt", text.encode())
    settings = {"workers": 1, "tokenizer": {"vocab_size": 280}, "validation_fraction": 0.2}
    made = {}
    for name, where, workers in (
        ("lines", "lines.jsonl", 1), ("rows", "rows.parquet", 2), ("members", "members.tar", 2),
        ("files", "files/*.txt", 1), ("files2", "files/*.txt", 2),
    ):  # fmt: skip
        body = {**settings, "input": f"{tmp_path}/{where}", "output": str(tmp_path / f"out-{name}"), "workers": workers}
        body |= {"format": "text"} if name.startswith("files") else {}
        config = write(tmp_path / f"{name}.json", json.dumps(body).encode())
        assert main(["run", "--config", str(config)]) == 0
        made[name] = outputs(tmp_path / f"out-{name}")
    assert made["files"] == made["files2"]
    for name in ("rows", "members", "files"):
        assert {file: sha for file, sha in made[name].items() if file.endswith((".tar", ".model"))} == {
            file: sha for file, sha in made["lines"].items() if file.endswith((".tar", ".model"))
        }
