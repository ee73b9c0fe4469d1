"""Files that are whole or absent, whoever writes them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from common.files import intended_name, replace_file, replacing, replacing_all, temporary_path, write_file, write_json


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": float("nan")})
    assert path.read_bytes() == b'{\n "loss": null\n}\n'
    replace_file(path, [b"one ", b"two"])
    with pytest.raises(KeyError):
        _fail_while_writing(path)
    assert path.read_bytes() == b"one two" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def _fail_while_writing(path: Path) -> None:
    with replacing(path) as stream:
        stream.write(b"half of")
        stream.flush()
        assert path.read_bytes() == b"one two"
        raise KeyError


def test_on_a_full_disk_the_error_names_the_file_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    with monkeypatch.context() as patched:
        # The stream that takes nothing: /dev/full answers every write as a full disk does.
        patched.setattr("common.files.temporary_path", lambda _: tmp_path / "temporary")
        (tmp_path / "temporary").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as refused:
            write_file(path, b"half of")
    assert refused.value.filename == str(path) and list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_replaced_is_named_as_the_user_knows_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        write_file(path, b"content")
    assert refused.value.filename == str(path) and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bytes | list[str]]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        flushed = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        is_folder = flushed.is_dir()
        calls.append(("fsync", [path.name for path in flushed.iterdir()] if is_folder else flushed.read_bytes()))

    def replaced(source: Path, target: Path) -> None:
        calls.append(("replace", source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_file(tmp_path / "a", b"content")
    assert calls == [("fsync", b"content"), ("replace", b"content"), ("fsync", ["a"])]
    calls.clear()
    with replacing_all(tmp_path) as put:  # in the order of the calls
        put("c", b"first")
        put("b", b"last")
    (*calls, (last, names)) = calls
    assert calls == [(call, content) for call in ("fsync", "replace") for content in (b"first", b"last")]
    assert last == "fsync" and sorted(names) == ["a", "b", "c"]
    # Those of this test: a connection of an earlier one may be closed by its thread meanwhile.
    still_open = [os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in os.listdir("/proc/self/fd")]
    assert not [path for path in still_open if path.startswith(os.path.realpath(tmp_path))]


def test_files_of_one_folder_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").write_bytes(b"old")

    def write(*contents: bytes) -> None:
        with replacing_all(tmp_path) as put:
            for name, content in zip("ab", contents, strict=False):
                put(name, content)
                assert not (tmp_path / "a").exists() and (tmp_path / "b").read_bytes() == b"old"
            if len(contents) == 1:
                raise KeyError

    with pytest.raises(KeyError):
        write(b"one")
    with monkeypatch.context() as patched:
        # The second stream takes nothing: /dev/full answers every write as a full disk does.
        patched.setattr("common.files.temporary_path", lambda path: tmp_path / f"{path.name}.tmp")
        (tmp_path / "b.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as refused:
            write(b"one", b"two")
    assert refused.value.filename == str(tmp_path / "b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"b": b"old"}
    write(b"one", b"two")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"one", "b": b"two"}


def test_what_fails_in_the_block_is_what_its_user_hears(tmp_path: Path) -> None:
    """Whatever has become of the temporary file meanwhile, and with the name of the other file that is missing."""
    with pytest.raises(KeyError):
        _fail_without_the_temporary_file(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as missing, replacing(tmp_path / "a") as stream:
        stream.write((tmp_path / "source").read_bytes())
    assert missing.value.filename == str(tmp_path / "source") and list(tmp_path.iterdir()) == []
    with pytest.raises(gzip.BadGzipFile, match="Not a gzipped file"), replacing(tmp_path / "a") as stream:
        stream.write(gzip.decompress(b"damaged"))
    assert list(tmp_path.iterdir()) == []


def _fail_without_the_temporary_file(path: Path) -> None:
    with replacing(path):
        next(path.parent.iterdir()).unlink()
        raise KeyError


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first" * 1000)
        second.write(b"second")
    assert path.read_bytes() == b"first" * 1000  # the outer block ends last


def test_a_stream_can_be_read_back(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as stream:
        stream.write(b"abc")
        stream.seek(0)
        assert stream.read() == b"abc"


def test_a_temporary_name_tells_the_name_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-1.cluster.example")
    for name in ("state.json", "train-00000.idx.safetensors"):
        temporary = temporary_path(tmp_path / name)
        assert temporary.name != name and intended_name(temporary.name) == name
        assert temporary != temporary_path(tmp_path / name)
    for foreign in (".state.json.tmp", "state.json", ".a.b-c-0123abcd.tmp"):
        assert intended_name(foreign) == foreign


def test_what_is_written_is_plain_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"text": "é"}, indent=None)
    assert (tmp_path / "a").read_bytes() == json.dumps({"text": "é"}).encode() + b"\n"
    write_file(tmp_path / "b", b"\0")
    assert (tmp_path / "b").read_bytes() == b"\0"


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    """As root, `--write /dev/null` would leave a file there, for every program of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is a device or a pipe"):
        write_file(pipe, b"content")
    with pytest.raises(FileExistsError):
        _put_into(tmp_path, "a", "pipe")
    assert pipe.is_fifo() and [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
    link = tmp_path / "link"
    link.symlink_to(pipe)
    write_file(link, b"content")  # the link is replaced, and what it led to stays
    assert link.read_bytes() == b"content" and pipe.is_fifo()


def _put_into(folder: Path, *names: str) -> None:
    with replacing_all(folder) as put:
        for name in names:
            put(name, b"content")
