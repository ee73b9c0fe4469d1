"""Names and addresses: bytes that are no UTF-8, `~`, web servers of all manners, secrets that are written nowhere."""

import errno
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common.errors import PASSING, SCARCE, DataError, PassingError, kind_of
from common.terminal import visible
from common.urls import may_hold_secret, without_secrets
from data_prep.cli import main
from data_prep.config.resolved import _names
from data_prep.raw.documents import RawFile
from data_prep.raw.locations import (
    PipeFile,
    RemoteFile,
    UnreachableError,
    identity,
    is_file,
    match,
    read_error,
    sha256_of,
    size_and_stamp,
)
from data_prep.shards.format import Manifest
from tests.data_prep.conftest import make_texts
from tests.data_prep.outcome import one_error
from tests.data_prep.raw_files import write

SECRET = "s3cr3tSignature"
LINES = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(60, seed=9) if text).encode()


class Server(BaseHTTPRequestHandler):
    """Gives LINES at /SIGNED if the signature is right, and at /chunked without saying how long they are; leaves in
    their middle where `cuts` says so."""

    cuts = False

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, _, query = self.path.partition("?")
        status = {"/gone.jsonl": 404, "/busy.jsonl": 503}.get(path, 200)
        if path.startswith("/signed") and f"sig={SECRET}" not in query:
            status = 403
        data = LINES if status == 200 else b"<html>no</html>"
        self.send_response(status)
        self.send_header("Set-Cookie", "none=1")
        if path.endswith(".gz"):
            data = gzip.compress(LINES, mtime=0)
            self.send_header("Content-Encoding", "gzip")
        if path != "/chunked.jsonl":
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if self.cuts else data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="reading from web servers is UNTESTED: aiohttp is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(folder: Path, input: Any, *overrides: str, **changes: Any) -> int:
    body = {"input": input, "output": str(folder / "out"), "workers": 1, "tokenizer": {"vocab_size": 400}, **changes}
    config = write(folder / "config.json", json.dumps(body).encode())
    sets = [word for override in overrides for word in ("--set", override)]
    return main(["run", "--config", str(config), *sets])


@pytest.mark.parametrize("name", ["a.jsonl?version=3", "chunked.jsonl", "signed.jsonl?se=2030&sig=" + SECRET])
def test_a_web_server_is_read_with_or_without_a_size_and_a_query(tmp_path: Path, site: str, name: str) -> None:
    assert run(tmp_path, f"{site}/{name}") == 0
    (record,) = Manifest.load(tmp_path / "out").provenance.inputs
    assert (record.name, record.bytes) == (name.partition("?")[0], len(LINES))
    size = size_and_stamp(RemoteFile(f"{site}/{name}"))[0]
    assert size == (None if name.startswith("chunked") else len(LINES))


@pytest.mark.parametrize(
    "name, code, words",
    [
        ("gone.jsonl", 2, "input: cannot read ADDRESS/gone.jsonl: the server answers 404 (Not Found)"),
        ("signed.jsonl?sig=old" + SECRET[:5], 2, "answers 403 (Forbidden); a signed URL may have expired"),
        ("busy.jsonl", 1, "cannot read ADDRESS/busy.jsonl: the server answers 503 (Service Unavailable)"),
        ("*.jsonl?sig=" + SECRET, 2, "has a `*` and a query, which no server lists; name each URL"),
    ],
)
def test_what_a_web_server_refuses_is_one_sentence(
    tmp_path: Path, site: str, capsys: pytest.CaptureFixture[str], name: str, code: int, words: str
) -> None:
    assert run(tmp_path, f"{site}/{name}") == code
    error = one_error(capsys)
    assert words.replace("ADDRESS", site) in error and SECRET[:5] not in error


def test_a_server_that_is_not_there_may_come_back(site: str) -> None:
    with pytest.raises(UnreachableError, match=r"cannot read http://127\.0\.0\.1:1/a: ClientConnector\w*: .*127"):
        match(Path(), "http://127.0.0.1:1/a?sig=x")
    assert issubclass(UnreachableError, PassingError)


def test_a_packed_file_that_a_server_calls_an_encoding_is_read_as_it_is_stored(tmp_path: Path, site: str) -> None:
    """As Apache does with .gz: unpacked on the way it would be no gzip file, and its hash another one."""
    assert run(tmp_path, f"{site}/a.jsonl.gz") == 0
    (record,) = Manifest.load(tmp_path / "out").provenance.inputs
    stored = gzip.compress(LINES, mtime=0)
    assert (record.bytes, record.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())


def test_reading_a_file_from_a_web_server_may_take_as_long_as_it_takes(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp's own limit, of 5 minutes, is of the whole file; it goes on while what was read is encoded."""
    import aiohttp

    asked: list[tuple[str, Any]] = []
    real = aiohttp.ClientSession._request

    async def noted(session: Any, method: str, url: Any, **options: Any) -> Any:
        asked.append((method, session.timeout))
        return await real(session, method, url, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "_request", noted)
    assert len(list(RawFile(RemoteFile(f"{site}/long.jsonl")).read())) == LINES.count(b"\n")
    assert "GET" in [method for method, _ in asked]
    assert all(limit.total is None and limit.sock_connect and limit.sock_read for _, limit in asked)


def test_a_connection_lost_while_files_are_compared_may_come_back(
    tmp_path: Path, site: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, f"{site}/signed.jsonl?sig={SECRET}") == 0
    (tmp_path / "out" / "run.json").unlink()  # which spares the comparison
    monkeypatch.setattr(Server, "cuts", True)
    capsys.readouterr()
    assert run(tmp_path, f"{site}/signed.jsonl?sig={SECRET}") == 1
    said = capsys.readouterr().err
    assert f"error: cannot read {site}/signed.jsonl: C" in said and "not enough data" in said.lower()


class Lost(MemoryFileSystem):
    """A store that answers nothing."""

    protocol = "lost"
    cachable = False

    def info(self, path: str, **_: object) -> dict[str, Any]:
        raise ConnectionResetError("Connection reset by peer")


@pytest.mark.parametrize("name", ["a.jsonl", "*.jsonl"])
def test_a_store_that_does_not_answer_is_not_called_empty(tmp_path: Path, name: str) -> None:
    fsspec.register_implementation("lost", Lost, clobber=True)
    assert run(tmp_path, f"lost://bucket/{name}") == 1
    with pytest.raises(UnreachableError, match=r"cannot read lost://bucket/.*: ConnectionResetError: Connection reset"):
        match(Path(), f"lost://bucket/{name}")
    with pytest.raises(UnreachableError, match="ConnectionResetError"):
        is_file(RemoteFile(f"lost://bucket/{name}"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, *SCARCE, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_a_file_server_that_fails_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """What may pass in training may pass here, and what the node lacks for a moment, and nothing else."""

    def fail(path: Path, mode: str) -> None:
        raise OSError(number, os.strerror(number), str(path))

    path = write(tmp_path / "a.jsonl", LINES)
    monkeypatch.setattr(type(path), "open", fail)
    for read in (lambda: next(RawFile(path).read()), lambda: sha256_of(path)):
        with pytest.raises(DataError, match=rf"cannot read .*a\.jsonl: {os.strerror(number)}$") as error:
            read()
        assert isinstance(error.value, PassingError) == (number in PASSING | SCARCE)


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("timed out"), gzip.BadGzipFile("no")])
def test_of_errors_without_a_number_those_of_a_connection_may_pass(error: OSError) -> None:
    passes = not isinstance(error, gzip.BadGzipFile)
    assert (kind_of(error) is PassingError) == passes
    assert isinstance(read_error(Path("a.gz"), error), PassingError) == passes


def test_no_secret_of_a_signed_url_is_written_or_printed(
    tmp_path: Path, site: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifest, records, run.json, work folder and its names, output; of a run, of a failure, of a second signature."""
    urls = [f"{site}/signed-{number}.jsonl?X-Amz-Signature={number}&sig={SECRET}&part=1" for number in range(3)]
    assert run(tmp_path, urls, keep_work=True, dedup={"near": False}) == 0
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        assert SECRET.encode() not in path.read_bytes() and SECRET not in str(path), path
    again = [url.replace("X-Amz-Signature=", "X-Amz-Signature=new") for url in urls]
    assert run(tmp_path, again, keep_work=True, dedup={"near": False}) == 0
    assert "up to date" in capfd.readouterr().out
    monkeypatch.setattr("data_prep.stages.ingest.time.sleep", lambda seconds: None)

    def lose(self: RemoteFile, mode: str) -> None:
        raise RuntimeError(f"lost {self.url}")

    monkeypatch.setattr(RemoteFile, "open", lose)
    assert run(tmp_path, urls, "output=" + str(tmp_path / "second")) == 1
    out, err = capfd.readouterr()
    assert "RuntimeError: lost http://127" in err and "the file is read again" in err
    assert SECRET not in out + err


@pytest.mark.parametrize(
    "status, passes", [(404, False), (410, False), (408, True), (425, True), (429, True), (500, True)]
)
def test_what_a_server_answers_for_a_while_is_asked_again(status: int, passes: bool) -> None:
    error = OSError("no")
    error.status = status  # type: ignore[attr-defined]
    found = read_error(RemoteFile("https://host/a"), error)
    assert isinstance(found, UnreachableError) == passes and f"the server answers {status} (" in str(found)


def test_secrets_and_identities_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://me:pass@host/a/b.json.gz?part=2&X-Amz-Signature=xyz&X-Amz-Expires=60&sig=q&token=t&se=1"
    file = RemoteFile(url)
    assert (str(file), file.name, repr(file)) == ("https://host/a/b.json.gz", "b.json.gz", "RemoteFile()")
    assert identity(file) == "https://host/a/b.json.gz?part=2"
    kept = "https://host/a?section=1&step=2&token_count=3&signature_of=4"  # only begin as parts of signatures do
    assert identity(RemoteFile(kept)) == kept
    text = f"failed: ClientError(403, url='{url}') and s3://key:word@bucket/x?versionId=1 but a?b stays"
    assert without_secrets(text) == (
        "failed: ClientError(403, url='https://host/a/b.json.gz') and s3://bucket/x but a?b stays"
    )
    assert may_hold_secret(text) and may_hold_secret("a, http://host/b?c") and may_hold_secret("https://token@host/")
    harmless = "s3://bucket/a?.jsonl sftp://me@host/a https://host/a@b"
    assert not may_hold_secret(harmless) and without_secrets("https://host/a@b") == "https://host/a@b"
    assert without_secrets("https://me:p@ss@host/a?mail=a@b, https://host?to=a@b") == "https://host/a https://host"
    # Characters that should have been written %3F and %23, and an address that leads to another one.
    assert without_secrets("s3://me:p?a#s@host/a https://host#a@b") == "s3://host/a https://host#a@b"
    inner = "zip://a.json::s3://me:pass@host/b.zip"
    assert may_hold_secret(inner) and without_secrets(inner) == "zip://a.json::s3://host/b.zip"
    many = "a" * 200_000  # a length that squares of would take minutes
    assert without_secrets(f"{many} {many}https://me:pass@host/") == f"{many} {many}https://host/"
    with monkeypatch.context() as patch:  # Python's for names on disks: an old locale has no such letter
        patch.setattr(os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))
        assert list(_names([RemoteFile("s3://b/中.jsonl"), PipeFile("pipe:cat é.gz")]).values()) == ["中.jsonl", "é.gz"]
    two = [RemoteFile(f"https://host/get?id={number}") for number in (1, 2)]
    assert list(_names(two).values()) == ["get", "get~2"]
    assert identity(two[0]) != identity(two[1])


def test_question_marks_are_globs_where_there_is_no_query() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        memory.pipe(f"/marks/{name}", b"{}")
    assert [file.name for file in match(Path(), "memory://marks/a?.jsonl")] == ["a1.jsonl", "a2.jsonl"]


def test_a_name_that_is_no_utf8_is_read_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9 \x1b[31m.jsonl"
    with open(path, "wb") as stream:
        stream.write(LINES + b"not json\n")
    assert run(tmp_path, f"{tmp_path}/caf*.jsonl", dedup={"near": False}) == 0
    out = tmp_path / "out"
    (record,) = Manifest.load(out).provenance.inputs
    assert record.name == "caf\\xe9 \x1b[31m.jsonl"
    assert json.loads((out / "quarantine.jsonl").read_text())["file"] == record.name
    assert run(tmp_path, f"{tmp_path}/caf*.jsonl", dedup={"near": False}) == 0
    assert main(["stats", str(out)]) == main(["verify", str(out)]) == 0
    with open(path, "wb") as stream:
        stream.write(b"<html>")
    assert run(tmp_path, f"{tmp_path}/caf*.jsonl", "output=" + str(tmp_path / "other")) == 2
    captured = capsys.readouterr()
    assert "\\x1b[31m.jsonl is an HTML page" in captured.err and "\x1b[31m" not in captured.err + captured.out


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", LINES)
    assert match(Path(), "~/a.jsonl") == match(Path(), "~/*.jsonl") == [path]
    (tmp_path / "~").mkdir()
    write(tmp_path / "~" / "a.jsonl", LINES)
    assert match(Path(), "~/a.jsonl") == [Path("~/a.jsonl")], "what has that very name is meant"
    bracketed = tmp_path / "root [work]"
    bracketed.mkdir()
    write(bracketed / "a.jsonl", LINES)
    assert match(bracketed, "*.jsonl") == [bracketed / "a.jsonl"]


def test_control_characters_are_visible() -> None:
    assert visible("a\x1b]0;title\x07b\x9b2J\r\x7f\u202ec\td\n") == "a\\x1b]0;title\\x07b\\x9b2J\\r\\x7f\\u202ec\td\n"
    plain = "naïve 中文 🙂 \u200d"
    assert visible(plain) == plain


def test_a_missing_aiohttp_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: object) -> Any:
        raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(
        DataError, match=r'^cannot open https://host/a: .*install them with pip install -e "\.\[http\]"'
    ):
        match(Path(), "https://host/a?sig=x")
