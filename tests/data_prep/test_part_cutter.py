"""Two processes that read the same files, as copies of an array task do: neither costs the other a part."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from common.errors import PassingError
from data_prep.config.schema import DataConfig, IngestConfig
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.raw.locations import RemoteFile
from data_prep.stages.id_maker import IdRecipe
from data_prep.stages.ingest import IngestTask, RawInput, ingest_batch, read_state
from data_prep.stages.part_cutter import Encoding

WORDS = "word " * 40
FIRST = "a.jsonl.zst"
LINES = [json.dumps({"text": f"{number} {WORDS}"}).encode() + b"\n" for number in range(200)]
LINES[3] = b'{"text": 3}\n'  # goes to the quarantine
PACKED = b"".join(map(zstandard.compress, LINES))  # in frames, so that the first is read before the last
SECOND = "".join(json.dumps({"text": f"second {number} {WORDS}"}) + "\n" for number in range(30)).encode()


class Breaking(io.BytesIO):
    """A connection that breaks before the last bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > len(PACKED) - 999:
            raise RuntimeError("connection lost")
        return super().read(999 if size is None else min(size, 999))


@pytest.fixture(params=["text", "ids"])
def task(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IngestTask:
    """Two files of a web server in one batch, the first of many parts of its own."""
    monkeypatch.setattr("data_prep.stages.part_cutter.PENDING_BYTES", 2000)
    monkeypatch.setattr("data_prep.raw.unpack.BLOCK_BYTES", 4000)
    monkeypatch.setattr("common.files.os.fsync", lambda descriptor: None)  # seconds for each where the disk is busy
    monkeypatch.setattr("data_prep.stages.ingest.time.sleep", lambda seconds: None)
    recipe = IdRecipe(model=None, settings=TokenizerConfig(type="bytes"))
    names = (FIRST, "b.jsonl")
    return IngestTask(
        config=DataConfig(input=names, output="out", ingest=IngestConfig(max_bad_files=0.5)),
        files=tuple(RawInput(raw=RemoteFile(f"http://host/{name}"), name=name, size=100) for name in names),
        split="train",
        folder=tmp_path,
        key="key",
        part_bytes=5000,
        encoding=None if request.param == "text" else Encoding(recipe=recipe, validation_fraction=0.0, folder=tmp_path),
    )


def serve(monkeypatch: pytest.MonkeyPatch, *attempts: Callable[[], io.BytesIO]) -> None:
    """What each attempt at the first file finds; the last one for ever."""
    left = list(attempts)

    def opened(file: RemoteFile, mode: str) -> io.BytesIO:
        if file.name != FIRST:
            return io.BytesIO(SECOND)
        return (left.pop(0) if len(left) > 1 else left[0])()

    monkeypatch.setattr(RemoteFile, "open", opened)


def whole() -> io.BytesIO:
    return io.BytesIO(PACKED)


def broken() -> io.BytesIO:
    return Breaking(PACKED)


def cut() -> io.BytesIO:
    return io.BytesIO(PACKED[:-5])


def files(task: IngestTask) -> dict[str, str]:
    """Hash of each file of the stage."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(task.folder.iterdir())}


@pytest.mark.parametrize("said_so", [True, False])
def test_a_copy_that_fails_for_good_takes_nothing_away(
    task: IngestTask, monkeypatch: pytest.MonkeyPatch, said_so: bool
) -> None:
    """From a copy that has finished, and from one that has written its parts but not yet said so."""
    serve(monkeypatch, whole)
    ingest_batch(task)
    if not said_so:
        (task.folder / "key.json").unlink()
    before = files(task)
    assert len(before) > 10
    serve(monkeypatch, broken)
    with pytest.raises(PassingError, match="connection lost"):
        ingest_batch(task)
    assert files(task) == before


def test_a_file_that_is_read_again_gives_what_it_gives_at_once(
    task: IngestTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, whole)
    ingest_batch(task)
    before = files(task)
    for path in task.folder.iterdir():
        path.unlink()
    serve(monkeypatch, broken, broken, whole)
    ingest_batch(task)
    assert files(task) == before


def test_a_file_that_is_damaged_for_one_copy_alone(task: IngestTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that was cut: the next file's parts get names that no part of the damaged one has had."""
    serve(monkeypatch, whole)
    ingest_batch(task)
    before, found = files(task), read_state(task)
    serve(monkeypatch, cut)
    ingest_batch(task)
    left = read_state(task)
    assert found is not None and left is not None and left.files[0].damaged
    counts = [(file.documents, sum(part.documents for part in left.parts)) for file in left.files]
    assert counts == [(0, 30), (30, 30)]
    assert not {part.name for part in left.parts} & {part.name for part in found.parts if part.files[0][0] == FIRST}
    after = files(task)
    parts_of_first = [part.name for part in found.parts if part.files[0][0] == FIRST]
    assert len(parts_of_first) > 5
    for name in after.keys() & before.keys():
        if name.partition(".")[0] in parts_of_first:
            assert after[name] == before[name]


def test_a_damaged_file_takes_nothing_of_the_one_before_it(task: IngestTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose last documents stand in a part that is still open when the parts of the damaged one begin."""
    monkeypatch.setattr("data_prep.stages.part_cutter.PENDING_BYTES", 10_000)  # one has fewer, the other has more
    serve(monkeypatch, cut)
    ingest_batch(replace(task, files=task.files[::-1], part_bytes=1 << 20))
    left = read_state(task)
    assert left is not None
    assert [(file.documents, file.damaged is None) for file in left.files] == [(30, True), (0, False)]
    assert [(part.documents, part.files) for part in left.parts] == [(30, (("b.jsonl", 30),))]
